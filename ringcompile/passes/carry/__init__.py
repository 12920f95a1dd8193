"""A program for the next tokens of a sequence, with a cache."""
