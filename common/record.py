"""What a run writes down about itself, and how."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from common import InputError


def summary_writer() -> type:
    """TensorBoard's; InputError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("--tensorboard: pip install tensorboard first") from error
    return SummaryWriter


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """write() into a file beside path, which then takes its place; InputError if that fails."""
    partial_file = path.with_name(path.name + ".partial")
    try:
        write(partial_file)
        with partial_file.open("rb") as file:  # or a power failure may leave an empty one
            os.fsync(file.fileno())
        os.replace(partial_file, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter
        partial_file.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({str(error).splitlines()[0]})") from error


def best_scores(log: Path, names: Iterable[str]) -> dict[str, dict]:
    """Highest mIoU of each network in a log.jsonl, and its iteration: chosen on what is scored."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    best = {}
    for name in names:
        miou, iteration = max((e[name]["miou"], e["iteration"]) for e in entries if name in e)
        best[name] = {"iteration": iteration, "miou": miou}
    return best


def commit() -> str | None:
    """Of this repository's working tree; None where git does not tell."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:  # no git here
        return None
    return done.stdout.strip() or None


def peak_memory(device: torch.device) -> float:
    """GiB: what CUDA's allocator held, else the most that this process had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
