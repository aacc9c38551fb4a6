"""The shape of the hybrid, as transformers saves and loads it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

ENCODERS = ("mamba2", "transformer")
BRIDGES = ("prefix", "cross_attn")
# What a saved record without the key was made with, where that is not today's default.
OLD_DEFAULTS = {
    "d_model": 128,
    "n_heads": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "state_size": 32,
    "d_h": 128,
}


class HybridConfig(PreTrainedConfig):
    """Shape of the hybrid; the defaults are those of `train.py --arch hybrid`. Only keyword arguments are taken.

    Attributes:
        vocab_size: V, tokens of the tokenizer.
        d_model: D, width of encoder and decoder.
        n_heads: heads of every attention; d_model and d_h are multiples of twice their number.
        encoder: "mamba2" or "transformer".
        encoder_layers: layers of the encoder.
        decoder_layers: layers of the decoder.
        state_size: state of Mamba2 per channel.
        d_h: d, width of HRM.
        h_layers: layers of the slow block.
        l_layers: layers of the fast block.
        h_len: slots of the slow bank.
        l_len: slots of the fast bank.
        h_cycles: cycles of HRM, at most.
        l_steps: L steps of a cycle; the flag `--inner_T`.
        grad_horizon: which calls carry gradient: "one_step", "full" or "k:N".
        bridge: how the decoder reads z_H: "prefix" (as `prefix_len` tokens) or "cross_attn" (as its mean).
        prefix_len: m, memory tokens of the bridge "prefix".
        gate_scale: 0 to 1, multiplies the gate: training raises it, generation uses it as is; 0 switches HRM off.
        use_halting: at evaluation, stop an example's cycles once its halting probabilities sum to `halt_threshold`.
        halt_threshold: that sum.
        tie_word_embeddings: one table for tokens in and out; the flag `--tie_embeddings`.
        pad_token_id: token that fills up shorter rows.
        bos_token_id: token with which the decoder begins.
        eos_token_id: token that ends an answer.

    Raises:
        ValueError: widths that heads do not divide, unknown encoder or bridge.
    """

    model_type = "hrm_hybrid"

    vocab_size: int = 512
    d_model: int = 256
    n_heads: int = 8
    encoder: str = "mamba2"
    encoder_layers: int = 4
    decoder_layers: int = 4
    state_size: int = 64
    d_h: int = 256
    h_layers: int = 1
    l_layers: int = 1
    h_len: int = 8
    l_len: int = 16
    h_cycles: int = 2
    l_steps: int = 2
    grad_horizon: str = "full"
    bridge: str = "prefix"
    prefix_len: int = 8
    gate_scale: float = 1.0
    use_halting: bool = False
    halt_threshold: float = 0.99
    tie_word_embeddings: bool = True
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int = 2

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("d_model", "d_h"):
            width = getattr(self, name)
            if width % (2 * self.n_heads):
                raise ValueError(
                    f"{name} {width} must be a multiple of twice its {self.n_heads} heads: RoPE turns pairs"
                )

        if self.encoder not in ENCODERS or self.bridge not in BRIDGES:
            raise ValueError(
                f"encoder {self.encoder!r} and bridge {self.bridge!r}: expected mamba2 or transformer, and prefix or "
                "cross_attn"
            )

        # What transformers asks for, under its own names.
        self.hidden_size = self.d_model
        self.num_hidden_layers = self.decoder_layers
        self.num_attention_heads = self.n_heads
        self.is_encoder_decoder = True
        kwargs.setdefault("decoder_start_token_id", self.bos_token_id)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers'. A setting that an older version left out of the record has the value it had then."""
        return super().from_dict(OLD_DEFAULTS | config_dict, **kwargs)
