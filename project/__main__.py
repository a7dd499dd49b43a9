"""``python -m project``."""

import sys

from project.cli.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
