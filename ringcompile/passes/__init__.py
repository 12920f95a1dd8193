"""Rewrites from a captured program to one rank's; `pass_list.py` has their order.

Folders are in the order in which a program goes through them; docs/architecture.md has the table.
"""
