"""The viewer: one HTML file with the programs of all ranks, to open in a browser."""

from ringcompile.view.page import page

__all__ = ["page"]
