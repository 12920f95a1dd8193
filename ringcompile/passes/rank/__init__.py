"""The program of one rank: what it computes in turn, what it sends, what it receives."""
