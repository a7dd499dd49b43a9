"""``python -m project``, and the console script ``frozen-backbone``."""

import gc
import os
import sys
from pathlib import Path


def run() -> int:
    """Run the verb that the program's arguments name, and give its exit code."""
    # The libraries make a million objects that stay. Without this, the garbage collector walks through them again and
    # again during the imports, and once more when the interpreter ends: 2 s in all.
    gc.disable()
    from project.cli.main import main

    gc.freeze()
    gc.enable()
    if sys.stdout is None:  # closed by the caller
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - for as long as the program runs
    try:
        return main(sys.argv[1:])
    finally:
        gc.freeze()


if __name__ == "__main__":
    sys.exit(run())
