#!/usr/bin/env bash
# bitsandbytes 0.50.2, transformers 5.23.0, torch 2.13.0, a CPU with AVX512-BF16: calling `state_dict()` on an LLM in 4
# bits changes what the LLM says, and so does saving it. With double quantisation it changes little.
#
# On such a CPU the first forward pass in evaluation mode packs the weights anew, and `state_dict()` packs them back.
# The scales of the blocks do not come back as they were, and the next forward pass packs what is wrong. Nothing warns.
# Output seen: double quantisation False: logits moved by 8.59 after state_dict(), by 7.30 after another
#              double quantisation True: logits moved by 0.41 after state_dict(), by 0.41 after another
# Exits 0 while this holds, 1 once it has changed; on a CPU without AVX512-BF16 it says so and exits 0.
set -euo pipefail

if ! grep -q avx512_bf16 /proc/cpuinfo; then
    echo "this CPU has no AVX512-BF16: bitsandbytes does not pack the weights anew on it"
    exit 0
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 bitsandbytes==0.50.2 accelerate==1.15.0
cd "$folder"
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1

cat > packed.py <<'PYTHON'
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
)
LlamaForCausalLM(config).bfloat16().save_pretrained("llm")
ids = torch.arange(5, 12)[None]


def moved(double: bool) -> list[float]:
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=double)
    model = AutoModelForCausalLM.from_pretrained("llm", dtype=torch.bfloat16, quantization_config=packing)
    with torch.no_grad():
        before = model(input_ids=ids).logits.float()
        distances = []
        for _ in range(2):
            model.state_dict()
            distances.append((model(input_ids=ids).logits.float() - before).abs().max().item())
    return distances


plain = moved(double=False)
double = moved(double=True)
for name, (first, second) in (("False", plain), ("True", double)):
    print(f"double quantisation {name}: logits moved by {first:.2f} after state_dict(), by {second:.2f} after another")
raise SystemExit(0 if plain[0] > 10 * double[0] and plain[0] > 0.1 else 1)
PYTHON
"$folder/venv/bin/python" packed.py 2>/dev/null
