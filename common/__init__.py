"""What the four methods share."""

import os
import signal
import sys
from contextlib import contextmanager


class InputError(Exception):
    """A mistake that the user can correct. It ends the program with this one line and status 2."""


def interrupt(number: int, _) -> None:
    """Handles a signal by KeyboardInterrupt; during the imports it ends the program at once."""
    if hasattr(sys.modules.get("common.run"), "main"):
        raise KeyboardInterrupt(number)
    os.write(2, b"stopped by SIGINT\n")
    os._exit(128 + number)


def warn(message: str) -> None:
    """Prints one warning line to stderr; under torchrun only rank 0 prints it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr)


@contextmanager
def writing(path):
    """Opens a file that takes its place when it is whole. An error, as of a full disk, names it."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # a power failure could leave an empty file
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save may cover one by the other
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise InputError(f"{path}: cannot be written ({cause})") from error
    finally:
        partial.unlink(missing_ok=True)


_program = getattr(sys.modules["__main__"], "__file__", None) or ""  # a notebook has none
if os.path.dirname(os.path.abspath(_program)) == os.path.dirname(os.path.dirname(__file__)):
    signal.signal(signal.SIGINT, interrupt)
