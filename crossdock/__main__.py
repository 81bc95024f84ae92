"""`python -m crossdock` and `torchrun -m crossdock`: the command line without an installed script."""

import sys

from crossdock.cli import main

if __name__ == "__main__":
    sys.exit(main())
