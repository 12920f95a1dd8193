"""What people and other tools read of a program: text, JSON, Python; never read back."""

from ringcompile.dump.formats import formats, render

__all__ = ["formats", "render"]
