"""Heads, features and vocabulary on `tp`."""
