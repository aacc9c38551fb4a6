"""The planner/worker causal LM. Importing this package registers its classes with transformers."""

from enhanced.config import EnhancedHRMConfig
from enhanced.model import EnhancedHRMForCausalLM, create_hrm_model_and_tokenizer

__all__ = ["EnhancedHRMConfig", "EnhancedHRMForCausalLM", "create_hrm_model_and_tokenizer"]
