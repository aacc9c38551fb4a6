"""benchmark_gpu.py on a CPU: its parts run and find what is there, and a part that fails costs no other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import benchmark_gpu as script

SMALL = ["--device", "cpu", "--hosts", "embedded", "--batch", "2", "--steps", "1", "--repeats", "1"]


@pytest.mark.parametrize(("argv", "told"), [
    ([], "no CUDA GPU that torch sees"),
    (["--device", "cpu", "--hosts", "gpt5"], "--hosts gpt5 is unknown"),
    (["--device", "cpu", "--steps", "0"], "--steps 0 is not legal"),
])
def test_mistakes_are_one_line(argv, told, capsys):
    with pytest.raises(SystemExit) as ended:
        script.parse(argv)
    assert ended.value.code == 2 and told in capsys.readouterr().err


def test_an_add_on_agrees_with_itself_and_a_device_that_computes_otherwise_is_told(monkeypatch):
    args = script.parse(SMALL)
    found = script.agreement(args)
    assert found["loss"] == found["loss_cpu"] > 0 and found["gradient"] == found["gradient_cpu"] > 0

    # The second device, as it were, has other weights.
    seeds = iter((0, 1))
    whole = script.add_on

    def other(host, device):
        controller = whole(host, device)
        script.torch.nn.init.normal_(controller.model.addon.injector.out.weight, std=0.02 * (1 + next(seeds)))
        return controller

    monkeypatch.setattr(script, "add_on", other)
    with pytest.raises(ValueError, match="loss is .* on the CPU and .* on cpu"):
        script.agreement(args)


def test_decoding_is_measured_beside_the_bare_llm():
    args = script.parse(SMALL)
    found = script.decoding(args, script.adapters.frozen_host("embedded", "cpu"))
    assert found["hrm_tokens_per_second"] > 0 and 0 < found["of_bare"] < 5


def test_a_part_that_fails_leaves_its_error_and_the_others_their_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "agreement", lambda args: {"loss": 1.0})
    monkeypatch.setattr(script, "training", lambda args: 1 / 0)
    for name in ("decoding", "compiled", "speed"):
        def part(args, host, name=name):
            return {"name": name}

        part.__name__ = name
        monkeypatch.setattr(script, name, part)
    path = tmp_path / "new" / "gpu.json"
    assert script.main([*SMALL, "--output", str(path)]) == 1
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["training"] == {"error": "ZeroDivisionError: division by zero"}
    assert found["agreement"] == {"loss": 1.0} and found["hosts"]["embedded"]["speed"] == {"name": "speed"}
