"""`python -m alula.bench`: the same as `alula bench`."""

import sys

from alula.bench.run import main

sys.exit(main(sys.argv[1:]))
