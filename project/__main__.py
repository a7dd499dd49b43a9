"""``python -m project``, and the console script ``frozen-backbone``."""

import gc
import os
import sys
from pathlib import Path


def run() -> int:
    """Run the verb in ``sys.argv`` and return the exit code."""
    # The imports create a million permanent objects. Without this, the garbage collector scans them repeatedly during
    # the imports and once more at exit, which takes 2 s.
    gc.disable()
    from project.cli.main import main

    gc.freeze()
    gc.enable()
    if sys.stdout is None:  # the caller closed it
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - open until exit
    try:
        return main(sys.argv[1:])
    finally:
        gc.freeze()


if __name__ == "__main__":
    sys.exit(run())
