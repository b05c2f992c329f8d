"""`python -m hyperadapt_peft`: the command line."""

import sys

from hyperadapt_cli import main


if __name__ == "__main__":
    sys.exit(main())
