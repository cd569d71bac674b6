"""Token models: the decode loop, and the layout of a sequence. Knows no network."""
