"""`python -m ringcompile`, and `torchrun -m ringcompile`."""

from ringcompile.cli import main

if __name__ == "__main__":
    main()
