#!/usr/bin/env bash
# torch 2.13.0, transformers 5.23.0, CPU: `model.requires_grad_(False)` makes `generate` multiply the output head by a
# batched product over a copy of the whole head for every row of the batch. A model whose weights ask for gradient does
# not, although both run without gradient.
#
# `generate` keeps the last position of the states, a slice (B, 1, D) that is not contiguous. torch folds such an input
# into one matrix product where the weight asks for gradient, and else calls bmm on the weight expanded over the rows.
# In bfloat16 the expanded weight is written out: B x V x D numbers, at each prefill. For 128 rows of SmolLM2-135M
# (V 49,152, D 576) torch's linear alone took 14.8 CPU seconds and 7.1 GB on an AVX-512 CPU with bf16 instructions, and
# 0.03 seconds on weights that ask for gradient; in float32 1.1 against 0.1 seconds. A contiguous slice is fast in both.
# Output seen: weights that ask for gradient: generate calls bmm on the head False
#              frozen weights:                generate calls bmm on the head True
#              frozen, contiguous input:      generate calls bmm on the head False
# Exits 0 while this holds, 1 once it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0
cd "$folder"
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1

cat > head.py <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 1531  # no other matrix of the model has this size

config = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)
torch.manual_seed(0)
model = LlamaForCausalLM(config).bfloat16().eval()
prompt = torch.randint(3, VOCABULARY, (8, 12))


def batched_head() -> bool:
    with torch.profiler.profile(record_shapes=True) as watched:
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2, min_new_tokens=2, do_sample=False)
    calls = [event.input_shapes for event in watched.events() if event.name == "aten::bmm"]
    return any([8, 64, VOCABULARY] in shapes for shapes in calls)


asks = batched_head()
model.requires_grad_(False)
frozen = batched_head()
model.lm_head.register_forward_pre_hook(lambda head, inputs: (inputs[0].contiguous(),))
whole = batched_head()
print(f"weights that ask for gradient: generate calls bmm on the head {asks}")
print(f"frozen weights:                generate calls bmm on the head {frozen}")
print(f"frozen, contiguous input:      generate calls bmm on the head {whole}")
raise SystemExit(0 if (asks, frozen, whole) == (False, True, False) else 1)
PYTHON
"$folder/venv/bin/python" head.py 2>/dev/null
