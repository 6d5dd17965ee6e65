"""`python -m ray_prefopt` is the `ray-prefopt` command."""

import sys

from ray_prefopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
