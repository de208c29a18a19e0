"""What makes tokens: vLLM here or on servers, or a simulation, behind one protocol."""
