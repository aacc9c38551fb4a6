#!/usr/bin/env bash
# accelerate 1.15.0, torch 2.13.0, no GPU: two processes of torchrun that call Accelerator() do not know of each other,
# and `accelerate launch --cpu --num_processes 2` starts one.
#
# torchrun has set RANK and WORLD_SIZE, so one expects Accelerator() to join them, as it does on GPUs. Without a GPU it
# does so with cpu=True alone; else each process is rank 0 of 1: both train on all data, and both write the same files.
# `accelerate launch` takes the number of processes without a word, by flag or by a config of MULTI_CPU, and starts one.
# Output seen: torchrun, Accelerator(): rank 0 of 1, rank 0 of 1
#              torchrun, Accelerator(cpu=True): rank 0 of 2, rank 1 of 2
#              accelerate launch --cpu --num_processes 2: rank 0 of 1
#              accelerate launch --config_file multi_cpu.yaml: rank 0 of 1
# Exits 0 while this holds, 1 once it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check accelerate==1.15.0
cd "$folder"
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1

cat > who.py <<'PYTHON'
import sys

from accelerate import Accelerator

state = Accelerator(cpu=True) if sys.argv[1:] else Accelerator()
print(f"rank {state.process_index} of {state.num_processes}", flush=True)
PYTHON

cat > multi_cpu.yaml <<'YAML'
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
use_cpu: true
num_machines: 1
num_processes: 2
machine_rank: 0
mixed_precision: 'no'
YAML

# One line: a name, then what each process says of itself, in order.
failed=0
expect() {
    local name=$1 expected=$2
    shift 2
    local seen
    seen=$("$@" 2> errors.txt | grep -o 'rank . of .' | sort | paste -sd, | sed 's/,/, /g')
    echo "$name: $seen"
    [ "$seen" = "$expected" ] || failed=1
}

expect "torchrun, Accelerator()" "rank 0 of 1, rank 0 of 1" venv/bin/torchrun --standalone --nproc_per_node 2 who.py
expect "torchrun, Accelerator(cpu=True)" "rank 0 of 2, rank 1 of 2" \
    venv/bin/torchrun --standalone --nproc_per_node 2 who.py cpu
expect "accelerate launch --cpu --num_processes 2" "rank 0 of 1" \
    venv/bin/accelerate launch --cpu --num_processes 2 who.py cpu
expect "accelerate launch --config_file multi_cpu.yaml" "rank 0 of 1" \
    venv/bin/accelerate launch --config_file multi_cpu.yaml who.py cpu
exit "$failed"
