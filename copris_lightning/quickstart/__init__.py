"""Reinforcement learning on a laptop: a tiny model and a task with checkable answers."""
