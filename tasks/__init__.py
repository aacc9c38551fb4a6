"""What Reasoning Gym's tasks are used with: a built-in one, limits of time, the level of chance."""
