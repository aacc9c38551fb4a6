"""The HRM x Mamba2 encoder-decoder. Importing this package registers its classes with transformers."""

from hybrid.model import HybridConfig, HybridModel

__all__ = ["HybridConfig", "HybridModel"]
