"""``python -m lightning_bigopt.cli``."""

import sys

from lightning_bigopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
