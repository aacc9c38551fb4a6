"""The example that a run shows at its start: prompt and target, and which tokens are read and learned."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.usefixtures("no_curve")  # conftest.py


@pytest.mark.parametrize(("flags", "reads"), [((), True), (("--adapter", "lora", "--d_h", "128", "--n_heads", "4",
                                                            "--segments", "1", "--inner_T", "2"), False)])
def test_a_dry_run_shows_the_masks_of_one_example(call, flags, reads):
    status, _, err = call("--dry_run", *flags)
    lines = err.splitlines()
    begin = lines.index("one example as the LLM reads it; the loss is on the target's tokens alone:")
    prompt, target = (int(line.partition(", ")[2].partition(" tokens")[0]) for line in lines[begin + 1 : begin + 3])
    masks = [line for line in lines if line.startswith("  mask, ")]
    assert status == 0 and f"  mask, the loss is on: 0 x {prompt}, 1 x {target}" in masks
    assert (f"  mask, HRM reads: 1 x {prompt}, 0 x {target}" in masks) == reads == ("HRM" in " ".join(masks))
