"""``python -m bigkern``: the same as the command ``bigkern``."""

import sys

from bigkern.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
