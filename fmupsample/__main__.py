"""``python -m fmupsample`` is the ``fmupsample`` command."""

import sys

from fmupsample_cli.main import main

if __name__ == "__main__":
    sys.exit(main())
