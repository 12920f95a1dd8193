"""Attention that a model writes out by hand becomes the one attention op."""
