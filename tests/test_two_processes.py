"""Two processes log what one logs on the same global batches: every figure is the batch's, none is one rank's share."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from three_systems import STEPS, SYSTEMS, logged
from tiny_runs import ROOT


@pytest.fixture(scope="module")
def of_two_processes(tiny_host, tmp_path_factory) -> dict[str, list[dict[str, float]]]:
    """What the steps of each system log in two processes."""
    out = tmp_path_factory.mktemp("two") / "logged.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, "tests/three_systems.py", str(tiny_host), str(out)], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SYSTEMS)
def test_two_processes_log_what_one_logs(name, of_two_processes, tiny_host):
    two = of_two_processes[name]
    one = logged(name, tiny_host)
    assert len(one) == len(two) == STEPS and one[0]["loss"] != one[1]["loss"]
    for step, (ours, theirs) in enumerate(zip(two, one, strict=True)):
        assert ours.keys() == theirs.keys()
        for metric in theirs:
            assert ours[metric] == pytest.approx(theirs[metric], rel=1e-5, abs=1e-5), (step, metric)
