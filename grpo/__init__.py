"""GRPO in stages: problems, rewards, one stage on TRL's trainer, and the run of all stages."""
