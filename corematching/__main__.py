"""``python -m corematching`` is ``python run.py``."""

import sys

from corematching.cli import main

if __name__ == "__main__":
    sys.exit(main())
