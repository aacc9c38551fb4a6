#!/usr/bin/env bash
# torch 2.13.0: torch.optim.Muon goes on making steps of full size for hundreds of steps after all gradients became zero.
#
# Muon orthogonalises its momentum, so a step's size does not depend on the momentum's. A momentum that decays towards
# zero keeps its direction, and each step is as large as before. One expects, as from SGD, that no gradient soon means no
# movement. Counted: steps of at least half the usual norm after fifty ordinary gradients and then exact zeros.
# Output seen: 446 steps of at least half the usual size after gradients became zero
# Exits 0 while this holds, 1 once it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5

"$folder/venv/bin/python" - <<'PYTHON'
import torch

torch.manual_seed(0)
torch.set_num_threads(1)


def step_norms(gradients: list[torch.Tensor]) -> list[float]:
    """Norm of each step of Muon on one 32 x 32 matrix that is given these gradients in turn."""
    weight = torch.nn.Parameter(torch.zeros(32, 32))
    optimizer = torch.optim.Muon([weight], lr=0.01, weight_decay=0.0)
    norms = []
    for gradient in gradients:
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
        norms.append((weight.detach() - before).norm().item())
    return norms


# Fifty ordinary gradients, then nothing.
ordinary = [torch.randn(32, 32) for _ in range(50)]
norms = step_norms(ordinary + [torch.zeros(32, 32)] * 1000)
usual = sum(norms[25:50]) / 25
after = sum(norm > usual / 2 for norm in norms[50:])
print(f"torch {torch.__version__}: {after} steps of at least half the usual size after gradients became zero")
raise SystemExit(0 if after >= 100 else 1)
PYTHON
