"""What is measured on the day that a cluster is there, in one command: see `__main__`."""
