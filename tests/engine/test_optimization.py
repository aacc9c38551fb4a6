"""optimization: what a part of the program is told of the flags has their defaults."""

from __future__ import annotations

import pytest

import options
from batching import PromptConfig
from engine.machine import MachineConfig
from engine.optimization import OptimConfig
from engine.schedule import ScheduleConfig
from enhanced.training import EnhancedStepConfig
from hybrid.training import HybridStepConfig
from training import AddonStepConfig


@pytest.mark.parametrize(("kind", "arch"), [
    (MachineConfig, "addon"),
    (OptimConfig, "addon"),
    (ScheduleConfig, "addon"),
    (PromptConfig, "addon"),
    (AddonStepConfig, "addon"),
    (HybridStepConfig, "hybrid"),
    (EnhancedStepConfig, "enhanced"),
])
def test_a_config_has_the_defaults_of_the_flags(kind, arch):
    opts = options.collect(["--arch", arch])[0]
    assert kind() == options.part(kind, opts)
