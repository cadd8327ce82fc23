"""`python -m alula` is the command line of `alula`."""

import sys

from alula.cli import main

if __name__ == "__main__":
    sys.exit(main())
