"""Keeping an engine full: the scheduler, the engines behind one protocol, and rewards."""
