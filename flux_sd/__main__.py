"""`python -m flux_sd`: the same as the command `flux-sd`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
