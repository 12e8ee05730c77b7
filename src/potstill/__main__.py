"""`python -m potstill` is `potstill`."""

from potstill.cli import main

if __name__ == "__main__":
    main()
