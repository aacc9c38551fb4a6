"""Names that other trainers have for what a flag of `train.py` does, so that who types one is told ours.

`HERE` has the arguments of Hugging Face's `TrainingArguments`, and common ones of peft's and TRL's scripts.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXPORT = "`python scripts/export_model.py RUN --to DIR --push USER/NAME`, once the run is done"
ALWAYS = "nothing to set, that is always so"
MEMORY = "--recompute_segments for a gradient through segments, else a smaller --batch_size and --grad_accum_steps"
PROCESSES = "`torchrun --nproc_per_node N train.py ...`; the LLM lies whole on each device"
SHARED = "`accelerate launch` with FSDP version 2, see docs/scaling.md"

# Their name -> what to do here.
HERE = {
    # Batches and steps.
    "per_device_train_batch_size": "--batch_size",
    "train_batch_size": "--batch_size",
    "per_gpu_train_batch_size": "--batch_size",
    "auto_find_batch_size": "--batch_size, which --dry_run tries for time and memory",
    "per_device_eval_batch_size": "--eval_batch_size",
    "per_gpu_eval_batch_size": "--eval_batch_size",
    "gradient_accumulation_steps": "--grad_accum_steps",
    "num_train_epochs": "--epochs, which needs --train_n or --data",
    "num_epochs": "--epochs, which needs --train_n or --data",
    "max_train_steps": "--max_steps",
    "max_train_samples": "--train_n",
    "max_eval_samples": "--eval_n",
    # Optimizer and schedule.
    "optim": "--optimizer",
    "adam_beta1": "--beta1",
    "adam_beta2": "--beta2",
    "max_grad_norm": "--grad_clip",
    "lr_scheduler_type": "--lr_scheduler",
    "warmup_ratio": "--warmup_steps, a number of batches",
    "num_warmup_steps": "--warmup_steps",
    # Precision and memory.
    "bf16": "--mixed_precision bf16",
    "fp16": "--mixed_precision fp16",
    "bf16_full_eval": "--mixed_precision bf16 --host_dtype bf16",
    "fp16_full_eval": "--mixed_precision fp16 --host_dtype fp16",
    "torch_dtype": "--host_dtype",
    "dtype": "--host_dtype",
    "load_in_4bit": "--load_in 4bit",
    "load_in_8bit": "--load_in 8bit",
    "gradient_checkpointing": MEMORY,
    "activation_checkpointing": MEMORY,
    # Logging.
    "report_to": "--trackers",
    "logging_steps": "--log_steps",
    "logging_strategy": "--log_steps",
    "logging_dir": "--save_dir; tensorboard's files lie in the run's folder",
    "project": "--save_dir, whose last part is the trackers' project",
    # Evaluation.
    "eval_strategy": "--eval_every",
    "evaluation_strategy": "--eval_every",
    "eval_steps": "--eval_every",
    "do_eval": "--eval_only",
    "do_predict": "--eval_only, and python generate.py for questions of your own",
    "predict_with_generate": ALWAYS,
    "generation_max_length": "--max_new_tokens",
    "generation_max_new_tokens": "--max_new_tokens",
    # Checkpoints.
    "output_dir": "--save_dir, the folder of all runs, and --run_name",
    "overwrite_output_dir": "--run_name of a new run; an existing one goes on by itself",
    "save_steps": "--save_every",
    "save_strategy": "--save_every",
    "save_total_limit": "--checkpoint_limit",
    "save_only_model": ALWAYS + " of the LLM, which is never saved",
    "save_safetensors": ALWAYS,
    "load_best_model_at_end": "--save_best_model, then --resume RUN@best",
    "resume_from_checkpoint": "--resume",
    "push_to_hub": EXPORT,
    "hub_model_id": EXPORT,
    "hub_private_repo": EXPORT + ", with --private",
    # Data.
    "dataset_name": "--data",
    "train_file": "--data",
    "validation_file": "--eval_data",
    "dataset_text_field": "--question_field and --answer_field",
    "max_length": "--max_seq_len",
    "max_seq_length": "--max_seq_len",
    "group_by_length": "--bucket_batches",
    "train_sampling_strategy": "--bucket_batches, which groups by length",
    "dataloader_num_workers": "--dataset_workers, of --arch hybrid",
    "data_seed": "--seed",
    # Model and machine.
    "model_name_or_path": "--model_name",
    "model_id": "--model_name",
    "lora_r": "--lora_rank",
    "use_peft": "--adapter lora",
    "do_train": ALWAYS + " without --eval_only",
    "use_cpu": "--device cpu",
    "no_cuda": "--device cpu",
    "fsdp": SHARED,
    "fsdp_config": SHARED,
    "deepspeed": PROCESSES + ", or " + SHARED,
}


def hint(name: str, known: Iterable[str], prefix: str = "") -> str:
    """What to add to the line that tells an unknown flag: "; here: --ours", "; did you mean --near?", or nothing.

    `known` are our flags, `prefix` stands before one that is proposed. Hyphens count as underscores.
    """
    plain = name.lstrip("-").replace("-", "_")
    if plain in HERE:
        return f"; here: {HERE[plain]}"
    for near in difflib.get_close_matches(plain, known, n=1):
        return f"; did you mean {prefix}{near}?"
    return ""
