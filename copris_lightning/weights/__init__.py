"""From the optimizer to the engine: gathering, names, files, adapters, and proof of arrival."""
