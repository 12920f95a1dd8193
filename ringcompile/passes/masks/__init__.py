"""What the mask of an attention means: a band of positions, hidden keys, and what is left over."""
