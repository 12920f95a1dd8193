"""Few ops for many, before anything is split."""
