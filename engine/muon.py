"""Muon for small matrices on any processor, guarded against gradients that vanish or jump."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.hardware import multiplies_bf16

OUTLIER = 10.0  # a gradient norm above so many usual ones is an outlier
RISE = 0.5  # how fast the usual norm follows larger norms, and smaller ones
FALL = 0.05
LARGEST_RISE = 3.0  # a norm counts as at most so many usual ones, so that an outlier cannot set the usual norm
STALE = 2.0  # momentum longer than so many present gradients no longer speaks for them
TINY = torch.finfo(torch.float32).tiny
USUAL = "usual_norm"  # of a matrix: a key of its state that older checkpoints lack


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with steps of AdamW's size, the same but for rounding, several times as fast on a CPU.

    Torch orthogonalises matrix by matrix and in bfloat16 on every processor. Here matrices of one shape are
    orthogonalised together, in the precision that the processor multiplies natively.

    An orthogonalised step has one size, however small or large the gradients are. So it has two guards, which do
    nothing in ordinary training:

    - A gradient longer than `OUTLIER` times the usual of its matrix is cut to the usual length: it would else rule the
      momentum for a hundred steps.
    - A step shrinks where the momentum is longer than `STALE` times the present gradient: torch takes full steps for
      hundreds of batches after the gradients have become zero.

    Args:
        groups: parameter groups of matrices.
        lr: learning rate, 0 or more.
        weight_decay: per unit of learning rate, 0 or more.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, weight_decay: float):
        super().__init__(groups, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch's annotations split this one signature into two
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """One step of every matrix that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        for group in self.param_groups:
            # Wide and tall matrices of one shape are worked on together, the tall ones turned over.
            shapes: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shapes[min(matrix.shape), max(matrix.shape)].append(matrix)
            for matrices in shapes.values():
                self._step_shape(group, matrices)
        return loss

    def _step_shape(self, group: dict[str, Any], matrices: list[Tensor]) -> None:
        """One step of matrices that have a gradient and one shape, or that shape turned over."""
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients)).float()
        gradients = self._without_outliers(matrices, gradients, norms.tolist())

        # Nesterov's momentum.
        momenta = [self._momentum(*pair) for pair in zip(matrices, gradients, strict=True)]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"])

        stack = torch.stack([turned(update) for update in updates]).float()
        length = stack.flatten(1).norm(dim=1)
        steps = orthogonalised(stack, length, group["ns_coefficients"], group["ns_steps"], group["eps"])
        share = (STALE * norms / length.clamp(min=TINY)).clamp(max=1.0)
        steps *= share[:, None, None]

        # A step's root mean square is 0.2, about that of AdamW's (Liu et al. 2025).
        size = group["lr"] * 0.2 * math.sqrt(stack.shape[-1])
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        for matrix, step in zip(matrices, steps, strict=True):
            matrix.add_(step if step.shape == matrix.shape else step.mT, alpha=-size)

    def _momentum(self, matrix: Tensor, gradient: Tensor) -> Tensor:
        """The momentum of a matrix, zero at first and laid out as its gradient."""
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        return state["momentum_buffer"]

    def _without_outliers(
        self, matrices: list[Tensor], gradients: list[Tensor], norms: list[float]
    ) -> list[Tensor]:
        """The gradients, outliers cut to the usual norm of their matrix; that norm then follows the new one."""
        factors = []
        for matrix, norm in zip(matrices, norms, strict=True):
            state = self.state[matrix]
            usual = state.get(USUAL, 0.0)
            outlier = usual > 0 and norm > OUTLIER * usual
            factors.append(usual / norm if outlier else 1.0)
            if norm > 0:  # no gradient tells nothing of how long one usually is
                state[USUAL] = following(usual, norm)

        # Ordinary gradients stay as they are, bit for bit.
        if min(factors) == 1.0:
            return gradients
        return list(torch._foreach_mul(gradients, factors))


def following(usual: float, norm: float) -> float:
    """The usual norm after a gradient of `norm`, above 0: it rises fast and falls slowly. `usual` 0: the first one."""
    if usual == 0:
        return norm
    rate = RISE if norm > usual else FALL
    return usual + rate * (min(norm, LARGEST_RISE * usual) - usual)


def turned(matrix: Tensor) -> Tensor:
    """The matrix, turned over where it is tall."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def orthogonalised(
    stack: Tensor, length: Tensor, coefficients: tuple[float, float, float], count: int, eps: float
) -> Tensor:
    """Nearly the orthogonal matrices nearest to those of `stack` (K, M, N), M <= N, by Newton-Schulz iteration.

    Args:
        stack: float32 matrices.
        length: (K,), their norms.
        coefficients: of a, b, c in the iteration X <- a X + (b G + c G^2) X with G = X X^T.
        count: iterations.
        eps: least length that a matrix is divided by.

    Returns:
        (K, M, N) float32 matrices whose singular values lie about 1; of a zero matrix, zero.
    """
    a, b, c = coefficients
    dtype = torch.bfloat16 if multiplies_bf16(stack.device.type) else torch.float32
    x = (stack / length.clamp(min=eps)[:, None, None]).to(dtype)
    for _ in range(count):
        gram = x @ x.mT
        change = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, change, x, beta=a)
    return x.float()
