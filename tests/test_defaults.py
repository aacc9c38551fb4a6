"""Each default stands once: what a config or a part of the program begins with is what `train.py` begins with."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from pathlib import Path

import options
from flags import FIND

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("addon", "enhanced", "engine", "grpo", "hybrid", "suite", "text_data")


def test_the_add_on_begins_as_train_py_makes_it():
    from model import HRMAddonConfig

    opts, config = options.parse([]), HRMAddonConfig()
    settings = config.settings()
    assert settings.pop("verifier_head") == (opts.verifier_weight > 0)
    assert settings == {name: getattr(opts, name) for name in settings}


def test_a_baseline_begins_as_train_py_makes_it():
    from addon.baselines import BaselineConfig

    opts, config = options.parse([]), BaselineConfig()
    assert (config.lora_rank, config.virtual_tokens) == (opts.lora_rank, opts.virtual_tokens)


def test_the_hybrid_begins_as_train_py_makes_it():
    from hybrid.model import HybridConfig

    opts = options.parse(["--arch", "hybrid", "--dataset", "synthetic"])
    other_names = {"l_steps": "inner_T", "tie_word_embeddings": "tie_embeddings", "gate_scale": "hrm_gate_scale"}
    of_the_data = {"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"}
    assert_begins_alike(HybridConfig, opts, of_the_data, other_names)


def test_the_planner_and_worker_begin_as_train_py_makes_them():
    from enhanced.config import EnhancedHRMConfig

    opts = options.parse(["--arch", "enhanced"])
    without_a_flag = {
        *("vocab_size", "mlp_hidden", "adaptive_cycles", "entropy_threshold", "confidence_threshold", "cycle_weight"),
        *("thought_weight", "variance_weight", "covariance_weight", "gate_weight", "exit_weight", "exit_sample"),
        *("thought_ema", "rope_theta"),
    }
    assert_begins_alike(EnhancedHRMConfig, opts, without_a_flag, {})


def assert_begins_alike(kind: type, opts: options.Options, without_a_flag: set[str], other_names: dict[str, str]):
    """Every setting that `kind` itself adds has a flag, but those named, and begins as the flag does."""
    settings = own_settings(kind)
    assert without_a_flag <= settings
    config = kind()
    names = sorted(settings - without_a_flag)
    ours = {name: getattr(config, name) for name in names}
    assert ours == {name: getattr(opts, other_names.get(name, name)) for name in names}


def own_settings(kind: type) -> set[str]:
    """Names of the settings a config adds to those of all transformers configs, however it declares them."""
    from transformers import PreTrainedConfig

    declared = {field.name for field in dataclasses.fields(kind)} | set(inspect.signature(kind).parameters)
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return declared - inherited - {"kwargs", "self"}


def parts() -> list[type]:
    """Every frozen dataclass of the program that holds settings, by its name."""
    files = [*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).glob("*.py"))]
    found = {}
    for path in sorted(files):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for kind in vars(importlib.import_module(name)).values():
            settings = inspect.isclass(kind) and dataclasses.is_dataclass(kind) and kind.__name__.endswith("Config")
            if settings and kind.__module__ == name and kind.__dataclass_params__.frozen:
                found[f"{name}.{kind.__name__}"] = kind
    return list(found.values())


def test_a_part_begins_as_its_flags_do():
    """A field that is named after a flag has the flag's default, of one of the systems that know the flag."""
    others, kinds = [], parts()
    for kind in kinds:
        for field in dataclasses.fields(kind):
            if field.name in FIND and field.name != "arch" and field.default is not dataclasses.MISSING:
                flag = FIND[field.name]
                if field.default not in [flag.default_in(arch) for arch in flag.archs]:
                    others.append(f"{kind.__module__}.{kind.__name__}.{field.name} = {field.default!r}")
    assert kinds and others == []
