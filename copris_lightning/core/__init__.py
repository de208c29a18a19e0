"""The algorithm: plain data, a state machine and tensor functions. No I/O, clock or framework."""
