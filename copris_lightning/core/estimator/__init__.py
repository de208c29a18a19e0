"""The importance-sampled policy gradient: ratios, losses, corrections, normalization."""
