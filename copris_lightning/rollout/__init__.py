"""Keeping an engine full: the scheduler, rewards, and the thread they live on."""
