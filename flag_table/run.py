"""Flags under the heading `run`: files, folders, the machine. A new flag is one line here."""

from __future__ import annotations

from flag_table.flag import Flag, addon

TABLE = (
    # Files and folders.
    Flag("config", "path", None, "YAML file of flags, which the command line overrides", nullable=True,
         in_file=False, common=True),
    Flag("run_name", "str", None, "folder in save_dir; none = named by task and time", nullable=True,
         pattern=r"\w[^/\\\x00-\x1f]{0,99}", form="a plain folder name (no slash, not ..)", one_call=True,
         common=True),
    Flag("save_dir", "path", "runs", "folder of all runs", common=True),
    Flag("save_every", "int", 0, "batches between checkpoints; 0 = only at the end", low=0),
    Flag("resume", "path", None, "checkpoint to go on from, or auto = the newest of the run", nullable=True,
         one_call=True, common=True),
    Flag("reset_progress", "bool", False, "take only the weights of resume and begin anew: step, optimizer, data",
         one_call=True),
    Flag("checkpoint_limit", "int", 3, "checkpoints kept; 0 = all", low=0),
    Flag("save_best_model", "bool", False, "also keep the best checkpoint: solved rate, or validation loss"),
    Flag("log_steps", "int", 20, "batches between logged lines", low=1),
    Flag("report", "bool", True, "write report.html at the end: settings, curves, a table of each task, samples"),
    Flag("trackers", "list", "", "where else to log", choices=("tensorboard", "wandb", "trackio", "mlflow",
         "comet_ml", "swanlab", "aim")),
    # The machine.
    Flag("device", "str", "auto", "where to compute; auto = CUDA, else MPS, else CPU",
         choices=("auto", "cpu", "cuda", "mps"), common=True),
    Flag("num_threads", "int", 0, "CPU threads; 0 = OMP_NUM_THREADS, else one or all cores, whichever "
         "multiplies faster at the start", low=0),
    Flag("ddp_timeout_s", "float", 45.0, "of several processes: seconds without an answer from one's machine "
         "until the others name it and end; 0 = they wait as long as the backend does", low=0),
    addon("device_map", "str", "none", "where the frozen LLM lies: on the device, or (auto) spread over all "
          "accelerators, then memory, then the disk", choices=("none", "auto")),
    addon("max_memory", "json", None, "with device_map auto: the most that each place may hold, an accelerator by its "
          "number; a place that is not named holds nothing; none = what is free", nullable=True,
          pattern=r"\s*\{.*\}\s*", form='JSON such as {"0": "10GiB", "cpu": "30GiB"}'),
)
