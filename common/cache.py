"""Atomic writes, and a disk cache of decoded large images."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from common import InputError


def write(path: Path, save: Callable, suffix: str = ".partial") -> None:
    """Calls save(file) and writes the whole file or nothing. An error names the file."""
    partial = Path(f"{path}{suffix}")  # processes that may write the same file need their own
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())  # a power failure could leave an empty file
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save hides an OSError in __context__
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise InputError(f"{path}: cannot be written ({cause})") from error
    finally:
        partial.unlink(missing_ok=True)


def folder(above: Path, sources: list[Path], settings) -> Path:
    """Returns the cache folder of these settings and files, and removes outdated ones."""
    stats = [(path, path.stat()) for path in sources]
    files = [(os.path.relpath(p, above), s.st_size, s.st_mtime_ns) for p, s in stats]
    version = 3  # raise this when decoding or resizing gives other pixels
    name = hashlib.sha256(repr((version, settings, files)).encode()).hexdigest()[:16]
    for other in set(above.glob("*")) - {above / name}:
        shutil.rmtree(other, ignore_errors=True)
    return above / name
