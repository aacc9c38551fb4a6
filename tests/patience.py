"""How long a test waits for another process. No test measures this: it only ends what would hang for ever."""

HANG_S = 1800  # a slow machine, shared with others, is no failure
