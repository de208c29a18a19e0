"""The language model that is trained, and the training step."""
