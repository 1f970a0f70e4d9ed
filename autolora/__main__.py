"""``python -m autolora`` is the same as the command ``autolora``."""

import sys

from autolora.cli import main

if __name__ == "__main__":
    sys.exit(main())
