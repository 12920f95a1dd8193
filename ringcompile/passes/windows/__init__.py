"""Convolutions and shifts along the sequence: a rank's own tokens and a few of its neighbours'."""
