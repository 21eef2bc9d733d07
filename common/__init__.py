"""What the four methods share."""

import os
import sys


class InputError(Exception):
    """A mistake that the user can correct. It ends the program with this one line and status 2."""


def warn(message: str) -> None:
    """Prints one warning line to stderr; under torchrun only rank 0 prints it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr)
