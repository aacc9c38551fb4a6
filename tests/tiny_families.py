"""Tiny random causal LMs of several families, in float32, and controllers on them, for the tests of the add-on."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from model import HRMAddonConfig, HRMController

VOCABULARY = 61
PAD, BOS, EOS = 0, 1, 2
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_OWN = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "gpt2": {"n_inner": 48},
    "gpt_neox": {},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 2.0},
    "cohere": {"num_key_value_heads": 2, "logit_scale": 0.25},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "mamba": {"state_size": 8},
    "falcon_mamba": {"state_size": 8},
    "rwkv": {"attention_hidden_size": 32},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_embds": False,
                 "attention_head_size": 8, "feed_forward_size": 48, "local_attn_chunk_length": 16},
    "cpmant": {"dim_ff": 48, "dim_head": 8, "prompt_types": 4, "prompt_length": 4},
    "bart": {"d_model": 32, "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4,
             "encoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48},
    "granite": {"num_key_value_heads": 2, "logits_scaling": 3.0, "embedding_multiplier": 4.0},
}
FAMILIES = ("llama", "qwen2", "gpt2", "gpt_neox", "gemma2", "mamba2")
SCALED = ("cohere", "granite")


def tiny_host(family: str = "llama", seed: int = 0, **changes) -> PreTrainedModel:
    """A random causal LM of `family`, in evaluation mode. Logits spread widely, so that argmax has no near ties."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**_SIZES, "initializer_range": 0.3, **_OWN.get(family, {}), **changes})
    return AutoModelForCausalLM.from_config(config).float().eval()


def tiny_controller(family: str = "llama", trained: bool = True, seed: int = 0, host=None, **settings) -> HRMController:
    """A controller on a tiny host; `trained` stands for training: every zero factor is random, so nothing is hidden."""
    host = tiny_host(family, seed) if host is None else host
    torch.manual_seed(seed + 1)
    shape = {"d_h": 16, "n_heads": 2, "segments": 2, "inner_T": 2, "init_state": "fixed", "state_mix": "sum"}
    settings = {**shape, **settings}
    controller = HRMController(HRMAddonConfig(base_config=host.config, **settings), host=host).eval()
    return randomise(controller, seed) if trained else controller


@torch.no_grad()
def randomise(controller: HRMController, seed: int = 0, size: float = 0.6) -> HRMController:
    """Gives what starts at zero random values: the injector's projection, vocabulary bias, LoRA's B, state gates."""
    generator = torch.Generator().manual_seed(seed + 2)
    for name, parameter in controller.named_parameters():
        if name.endswith(("injector.out.weight", "vocabulary_bias.out.weight", "lora_B.default.weight",
                          "core.low_gate", "core.high_gate", "core.carry_gate")):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return controller


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """(rows, length) token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(EOS + 1, VOCABULARY, (rows, length), generator=generator)


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both (B, longest), padded on the left, as `batching.pad` does, written independently of it."""
    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([torch.full((longest - len(row),), PAD), row]) for row in rows])
    mask = torch.stack([torch.cat([torch.zeros(longest - len(row)), torch.ones(len(row))]) for row in rows]).long()
    return ids, mask
