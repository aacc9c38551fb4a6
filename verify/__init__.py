"""A strict layer of our own before Reasoning Gym's scorers: what else a right answer must be, task by task.

Many of those scorers give a full score to text that answers nothing: a prefix of the gold answer, an integral sign, the
right answer followed by a wrong one. Each task has one rule here; `judge.py` applies it. Nothing of an answer is ever
evaluated.
"""
