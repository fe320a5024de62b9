"""``python -m bolaco``, which is how torchrun starts it."""

import sys

from bolaco.cli import main

if __name__ == "__main__":
    sys.exit(main())
