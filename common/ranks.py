"""Ranks: the processes that torchrun starts, one for each GPU. Without torchrun there is one."""

import io
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NUMBER = torch.zeros((), dtype=torch.int64)  # kept for ever: torch 2.5 may hang where it is freed


def join(args) -> None:
    """Connects the ranks. From here on only rank 0 prints to stdout."""
    if args.ranks > 1:
        # Numbers on the host go through gloo, so that no rank waits for its GPU to send one. The
        # timeout is long because ranks wait while rank 0 evaluates or decodes images.
        backend = "cpu:gloo,cuda:nccl" if args.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=3))
    if args.rank > 0:
        sys.stdout = io.StringIO()


def leave() -> None:
    """Ends all ranks together, because torchrun stops the others when one ends with an error."""
    if dist.is_initialized():
        all_max(0)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        dist.destroy_process_group()


def all_max(number: int) -> int:
    """Returns the largest of the ranks' numbers. Every rank waits for the others."""
    if not dist.is_initialized():
        return number
    dist.all_reduce(_NUMBER.fill_(number), dist.ReduceOp.MAX)
    return int(_NUMBER)


def all_mean(tensor: Tensor) -> None:
    """Replaces a tensor by its mean over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(tensor.div_(dist.get_world_size()))


def gather(tensor: Tensor) -> Tensor:
    """Concatenates the tensors of all ranks, in every rank: (B,...) -> (ranks*B,...)."""
    if not dist.is_initialized():
        return tensor
    whole = tensor.new_empty(dist.get_world_size() * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(whole, tensor)
    return whole
