"""`python -m tierd`."""

import sys

from tierd.cli import main

if __name__ == "__main__":
    sys.exit(main())
