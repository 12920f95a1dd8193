"""Rewrites from a captured program to one rank's, one a file; `compiler.py` has their order."""
