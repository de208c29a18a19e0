"""How long a batch takes: lengths, costs and sizes in, seconds out. No engine, no clock."""
