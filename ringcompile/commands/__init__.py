"""Commands of the command line, one a file; `cli` registers them."""
