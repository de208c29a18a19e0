"""The streaming data source: prompts in, micro-batches of trajectories out."""
