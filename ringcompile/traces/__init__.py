"""Timelines of all ranks, simulated or measured: one form, written for Perfetto, drawn, viewed."""
