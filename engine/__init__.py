"""What every run shares: loop, optimizer, checkpoints, logs, intervals."""
