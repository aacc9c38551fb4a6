"""Flags under the heading `hybrid`: the encoder-decoder's shape and losses. A new flag is one line here."""

from __future__ import annotations

from flag_table.flag import hybrid, own_weights

TABLE = (
    # Encoder and decoder; the planner/worker LM has a width, too.
    own_weights("d_model", "int", 256, "width of encoder and decoder, or of planner and worker; a multiple of 2 "
                "x n_heads", low=8, shape=True),
    hybrid("encoder", "str", "mamba2", "the network that reads the prompt", choices=("mamba2", "transformer"),
           shape=True),
    hybrid("encoder_layers", "int", 4, "layers of the encoder", low=1, high=128, shape=True),
    hybrid("decoder_layers", "int", 4, "layers of the decoder", low=1, high=128, shape=True),
    hybrid("state_size", "int", 64, "state of Mamba2 per channel", low=1, shape=True),
    hybrid("tie_embeddings", "bool", True, "one table of embeddings for tokens in and out", shape=True),
    # The HRM between them.
    hybrid("h_len", "int", 8, "tokens of the slow state", low=1, shape=True),
    hybrid("l_len", "int", 16, "tokens of the fast state", low=1, shape=True),
    hybrid("h_cycles", "int", 2, "cycles of HRM: l_steps L steps and one H step each", low=1, high=64, depth=True,
           protocol=True),
    hybrid("bridge", "str", "prefix", "z_H becomes prefix_len memory tokens, or one vector",
           choices=("prefix", "cross_attn"), shape=True),
    hybrid("prefix_len", "int", 8, "memory tokens of the prefix bridge", low=1, shape=True),
    # The gate through which HRM acts.
    hybrid("hrm_gate_warmup_steps", "int", 0, "batches with the gate shut, that is without HRM", low=0),
    hybrid("hrm_gate_ramp_steps", "int", 0, "batches after the gate's warmup in which its scale rises from 0",
           low=0),
    hybrid("hrm_gate_scale", "float", 1.0, "the scale that the gate reaches; 0 = encoder-decoder without HRM",
           low=0, high=1, protocol=True),
    # Further losses.
    hybrid("deep_supervision", "bool", False, "the z_H of earlier cycles have a decoder loss too"),
    hybrid("ds_weight", "float", 0.1, "weight of each earlier cycle's loss", low=0),
    hybrid("use_halting", "bool", False, "learn when to stop cycling, and stop there at evaluation"),
    hybrid("halting_weight", "float", 0.01, "weight of the halting losses, times the mean gate", low=0),
    hybrid("halting_target", "float", 1.0, "aim of the sum of halting probabilities", low=0),
    hybrid("halt_threshold", "float", 0.99, "summed halting probability at which an example stops", low=0,
           exclusive_low=True, protocol=True),
)
