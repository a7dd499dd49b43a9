"""``python -m project``, and the console script ``frozen-backbone``."""

import sys

from project.cli.main import main


def run() -> int:
    """Run the verb that the program's arguments name, and give its exit code."""
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(run())
