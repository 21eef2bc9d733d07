"""What the four methods share."""

import sys

store = None  # what the processes of a run share, where there are several


class InputError(Exception):
    """A mistake the user can put right: ends the program with this one line and status 2."""


def is_first_to(what: str) -> bool:
    """Whether no other process of this run has asked the same."""
    try:
        return store is None or store.add(what, 1) == 1
    except RuntimeError:  # nobody holds the store any more
        return True


def warn(message: str) -> None:
    """One line on stderr, once a run, of what the user should know; the run goes on."""
    if is_first_to(message):
        print(f"warning: {message}", file=sys.stderr)
