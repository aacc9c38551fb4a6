"""Flags under the heading `model`: what trains, and of which shape. A new flag is one line here."""

from __future__ import annotations

from flag_table.flag import ADAPTERS, ARCHS, BLOCKS, RECURRENT, Flag, addon, reasoner, with_hrm

TABLE = (
    # Which system, and what trains.
    Flag("arch", "str", "addon", "system to train: frozen LLM + HRM, encoder-decoder, or planner/worker LM",
         choices=ARCHS, shape=True, common=True),
    reasoner("objective", "str", "ce", "ce = cross-entropy on the answers; grpo = afterwards also rewards on the "
             "model's own answers, in stages", choices=("ce", "grpo"), common=True),
    # The frozen LLM.
    addon("model_name", "path", "assets/tiny_host", "frozen LLM: a local folder, a GGUF file or a hub name",
          common=True),
    addon("revision", "str", None, "branch, tag or commit of a hub model", nullable=True),
    addon("attn_implementation", "str", None, "the frozen LLM's attention, by transformers' name: eager, sdpa, "
          "flash_attention_2, ...; none = transformers' choice", nullable=True, protocol=True),
    addon("load_in", "str", "none", "quantisation of the frozen LLM", choices=("none", "8bit", "4bit"), protocol=True),
    addon("host_dtype", "str", "auto", "what the frozen LLM's weights are held in: as saved (stored), or auto = as "
          "saved where the device multiplies that natively, else fp32 if it fits the memory",
          choices=("auto", "stored", "bf16", "fp32", "fp16"), before="stored", protocol=True),
    reasoner("min_roundtrip", "float", 0.95, "least share of texts that the tokenizer gives back", low=0, high=1,
          before=0.0),
    addon("trust_remote_code", "bool", False, "run Python code that comes with the hub model; holds only where it is "
          "typed", one_call=True, file_turns_on=False),
    # What is trained beside it, and of which size.
    addon("adapter", "str", "hrm", "what trains beside the frozen LLM: the HRM, LoRA, virtual tokens, HRM's "
          "blocks in a single pass, or nothing", choices=ADAPTERS, shape=True, common=True),
    addon("match_params", "int", 0, "size the adapter (d_h, lora_rank or virtual_tokens) to this many trainable "
          "parameters, within 5 %; 0 = off", low=0, one_call=True),
    # The H and L blocks, whose states are z_H and z_L.
    with_hrm("d_h", "int", 128, "width of the HRM; a multiple of 2 x n_heads", low=8, by_arch={"hybrid": 256},
             adapters=BLOCKS, shape=True, common=True),
    with_hrm("h_layers", "int", 1, "layers of the slow block H; 0 = none, L alone recurs", low=0, high=64,
             adapters=BLOCKS, shape=True),
    with_hrm("l_layers", "int", 1, "layers of the fast block L", low=1, high=64, adapters=BLOCKS, shape=True),
    addon("share_hl", "bool", False, "one block serves as both H and L, as in TRM; needs h_layers = l_layers",
          shape=True),
    Flag("n_heads", "int", 4, "attention heads", low=1, by_arch={"hybrid": 8}, adapters=BLOCKS, shape=True),
    # How often the blocks run.
    addon("segments", "int", 1, "recurrence segments in training", low=1, high=256, adapters=RECURRENT,
          depth=True, common=True, protocol=True),
    with_hrm("inner_T", "int", 2, "L steps before each H step", low=1, high=64, aliases=("l_steps",),
             adapters=RECURRENT, depth=True, protocol=True),
    addon("reset_l", "bool", False, "start z_L anew at each segment", adapters=RECURRENT),
    with_hrm("grad_horizon", "str", "full", "block calls that carry gradient: the last of L and of H, all of a "
             "segment, the last N of L, or all of the last N segments", adapters=RECURRENT, depth=True,
             pattern=r"one_step|full|(k|segments):[1-9][0-9]*", form="one_step, full, k:N or segments:N with N >= 1"),
    # What HRM reads and begins with.
    addon("hrm_input", "str", "tokens", "what HRM reads of the prompt: every token, or mean and last token",
          choices=("tokens", "pooled"), adapters=BLOCKS, shape=True),
    addon("hrm_conv", "int", 1, "tokens that HRM reads together by a short convolution, each with those before it; 1 = "
          "each alone", low=1, high=64, adapters=BLOCKS, shape=True),
    addon("hrm_read", "str", "embed+last", "which of the LLM's states HRM reads: of its embeddings and layers",
          choices=("embed", "last", "embed+last", "all"), adapters=BLOCKS, shape=True),
    addon("init_state", "str", "zero", "first z_H and z_L: random vectors in training and fixed buffers at "
          "evaluation, the published fixed buffers in both, or zeros", choices=("random", "fixed", "zero"),
          adapters=RECURRENT),
    addon("state_mix", "str", "gated", "how earlier states enter a block: by the published sum, or by learned "
          "gates that begin at zero", choices=("sum", "gated"), before="sum", adapters=RECURRENT, shape=True),
    # How z_H enters the LLM.
    addon("injector", "str", "cab", "how z_H enters the LLM: by cross-attention or by a gated bias",
          choices=("cab", "grb"), adapters=BLOCKS, shape=True),
    addon("injector_sees", "str", "hidden+embed", "what the injector sees of a position beside z_H: the LLM's state "
          "and its token, or the token alone, so that the answer must come from z_H", choices=("hidden+embed", "embed"),
          adapters=BLOCKS, shape=True),
    addon("cab_mem", "int", 0, "learned memory tokens that cab reads; 0 = all of z_H", low=0, adapters=BLOCKS,
          shape=True),
    addon("cab_gate_init", "float", 1.0, "initial gate of cab, a factor", adapters=BLOCKS),
    addon("grb_gate_init", "float", 0.0, "initial gate of grb, a logit", adapters=BLOCKS),
    addon("logit_bias_head", "bool", False, "add a gated bias over the vocabulary, computed from z_H",
          adapters=BLOCKS, shape=True),
    addon("prompt_gate", "bool", False, "a gate learns for which prompts anything is injected, from the tasks' and "
          "from the text of retain; where it is shut the answer is the bare LLM's; needs retain", adapters=BLOCKS,
          shape=True),
    # Adapters beside HRM, or in its place.
    addon("lora_layers", "int", 0, "besides HRM, LoRA on this many top layers of the LLM", low=0, adapters=BLOCKS,
          shape=True),
    addon("lora_rank", "int", 8, "rank of that LoRA, or of adapter lora", low=1, adapters=("hrm", "mlp", "lora"),
          shape=True),
    addon("virtual_tokens", "int", 20, "learned embeddings of adapter prompt", low=1, adapters=("prompt",),
          shape=True),
    # Halting (adaptive computation time).
    addon("use_act", "bool", False, "learn when to halt, and halt examples at evaluation", adapters=RECURRENT,
          shape=True, common=True),
    addon("halt_detach", "bool", False, "the halting head only reads z_H: its loss does not change z_H; needs "
          "use_act"),
    addon("act_penalty", "float", 0.0, "weight of the sum of 1 - p_halt; needs use_act", low=0,
          adapters=RECURRENT),
    addon("halt_max_segments", "int", 0, "most segments at evaluation with use_act; 0 = segments", low=0,
          adapters=RECURRENT, protocol=True),
)
