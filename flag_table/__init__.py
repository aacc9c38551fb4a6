"""The flags of `train.py`, one module for each heading of --help. flags.py puts them together."""
