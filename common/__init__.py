"""What the four methods share."""

import os
import signal
import sys


class InputError(Exception):
    """A mistake that the user can correct. It ends the program with this one line and status 2."""


def interrupt(number: int, _) -> None:
    """Raises KeyboardInterrupt. During the imports, it ends the program at once instead."""
    if hasattr(sys.modules.get("common.run"), "main"):
        raise KeyboardInterrupt(number)
    os.write(2, b"stopped by SIGINT\n")
    os._exit(128 + number)


def warn(message: str) -> None:
    """Prints one warning line to stderr; under torchrun only rank 0 prints it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr)


# Only where a method file of this repository is the program.
_program = getattr(sys.modules["__main__"], "__file__", None) or ""  # a notebook has none
if os.path.dirname(os.path.abspath(_program)) == os.path.dirname(os.path.dirname(__file__)):
    signal.signal(signal.SIGINT, interrupt)
