"""What the four methods share."""


class InputError(Exception):
    """A mistake the user can put right: ends the program with this one line and status 2."""
