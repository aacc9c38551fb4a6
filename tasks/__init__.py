"""What Reasoning Gym's tasks are used with: a built-in one, limits of time, the level of chance."""

from engine.figures import quiet_matplotlib

quiet_matplotlib()  # Reasoning Gym imports it
