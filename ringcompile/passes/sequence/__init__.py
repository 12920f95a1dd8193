"""Layouts along the sequence: seeded at the inputs, carried by the op rules."""
