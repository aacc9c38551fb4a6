"""The built-in tasks by name, as Reasoning Gym's registry has its own: (data set class, config class)."""

from __future__ import annotations

from tasks.toy_add import ToyAddConfig, ToyAddDataset
from tasks.toy_automaton import ToyAutomatonConfig, ToyAutomatonDataset
from tasks.toy_chain import ToyChainConfig, ToyChainDataset
from tasks.toy_chase import ToyChaseConfig, ToyChaseDataset
from tasks.toy_rewrite import ToyRewriteConfig, ToyRewriteDataset

BUILT_IN: dict[str, tuple[type, type]] = {
    ToyAddDataset.name: (ToyAddDataset, ToyAddConfig),
    ToyChainDataset.name: (ToyChainDataset, ToyChainConfig),
    ToyChaseDataset.name: (ToyChaseDataset, ToyChaseConfig),
    ToyAutomatonDataset.name: (ToyAutomatonDataset, ToyAutomatonConfig),
    ToyRewriteDataset.name: (ToyRewriteDataset, ToyRewriteConfig),
}
