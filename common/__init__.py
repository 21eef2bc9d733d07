"""What the four methods share."""

import sys


class InputError(Exception):
    """A mistake the user can put right: ends the program with this one line and status 2."""


def warn(message: str) -> None:
    """One line on stderr of what the user should know; the run goes on."""
    print(f"warning: {message}", file=sys.stderr)
