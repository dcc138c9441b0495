"""`python -m gistfast`, and so `torchrun -m gistfast`."""

from gistfast.cli.main import main

if __name__ == "__main__":
    main()
