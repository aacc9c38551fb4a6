#!/usr/bin/env bash
# transformers 5.23.0: loading a whole Mamba2 checkpoint draws from torch's global random numbers; loading Llama does not.
#
# `from_pretrained` with every weight in the file, and none missing, has nothing to initialise, so one expects the random
# state to be as before. Mamba2's mixer draws all the same. What is made after the model (an adapter, dropout, the order
# of data) then depends on which family was loaded before it, although the seed is the same.
# Output seen: mamba2: missing keys 0, same weights True, random state moved True
#              llama: missing keys 0, same weights True, random state moved False
# Exits 0 while this holds, 1 once it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0

"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys

import torch
import transformers

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
transformers.logging.disable_progress_bar()


def moved(config: transformers.PretrainedConfig, folder: str) -> bool:
    """Whether loading a saved random model of this shape changes what torch draws next."""
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    torch.manual_seed(0)
    expected = torch.rand(1)

    torch.manual_seed(0)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    changed = not torch.equal(torch.rand(1), expected)
    weights = zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    same = all(torch.equal(one, other) for one, other in weights)
    print(f"{config.model_type}: missing keys {len(info['missing_keys'])}, same weights {same}, "
          f"random state moved {changed}")
    return changed


mamba = transformers.Mamba2Config(**SMALL, state_size=8, num_heads=8, head_dim=8, n_groups=1, expand=2, chunk_size=8)
llama = transformers.LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=4, intermediate_size=64)
found = [moved(config, f"{sys.argv[1]}/{config.model_type}") for config in (mamba, llama)]
raise SystemExit(0 if found == [True, False] else 1)
PYTHON
