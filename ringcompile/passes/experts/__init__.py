"""Mixtures of experts: routing that each rank does for its own tokens, and experts on `ep`."""
