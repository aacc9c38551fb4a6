"""The built-in tasks by name, as Reasoning Gym's registry has its own: (data set class, config class)."""

from __future__ import annotations

from tasks.toy_add import ToyAddConfig, ToyAddDataset
from tasks.toy_chain import ToyChainConfig, ToyChainDataset

BUILT_IN: dict[str, tuple[type, type]] = {
    ToyAddDataset.name: (ToyAddDataset, ToyAddConfig),
    ToyChainDataset.name: (ToyChainDataset, ToyChainConfig),
}
