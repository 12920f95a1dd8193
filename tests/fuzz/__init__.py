"""Artifacts that were damaged, or made by somebody who means harm, each from a seed."""
