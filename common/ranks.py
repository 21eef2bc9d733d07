"""The ranks of a run. torchrun starts one process for each; without torchrun there is one."""

import io
import os
import sys
import zlib
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from common import InputError

_NUMBER = torch.zeros((), dtype=torch.int64)  # never freed: torch 2.5 may hang when it frees this


def join(args) -> None:
    """Connects the ranks. From here on only rank 0 prints to stdout."""
    # gloo sends numbers between CPUs, so no rank waits for its GPU.
    backend = "cpu:gloo,cuda:nccl" if args.device.type == "cuda" else "gloo"
    if missing := {"RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys():
        raise InputError(f"WORLD_SIZE is set, but not {sorted(missing)}: start it with torchrun")
    store, rank, size = next(rendezvous("env://"))
    # torchrun keeps its store after a restart. The prefix hides the dead ranks.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    wait = timedelta(hours=3)  # rank 0 evaluates meanwhile
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
    if args.rank > 0:
        sys.stdout = io.StringIO()


def leave() -> None:
    """Ends all ranks together. torchrun stops the others when one ends with an error."""
    if dist.is_initialized():
        all_max(0)
        dist.destroy_process_group()


def all_max(number: int) -> int:
    """Returns the largest of the ranks' numbers. Every rank waits for the others."""
    _NUMBER.fill_(number)
    if dist.is_initialized():
        dist.all_reduce(_NUMBER, dist.ReduceOp.MAX)
    return int(_NUMBER)


def all_mean(tensor: Tensor) -> None:
    """Replaces a tensor by its mean over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(tensor.div_(dist.get_world_size()))


def average_statistics(networks) -> None:
    """Averages the batch-norm statistics of networks, which each rank takes from its own images."""
    for name, buffer in (item for network in networks for item in network.named_buffers()):
        if "running" in name:
            all_mean(buffer)


def gather(tensor: Tensor) -> Tensor:
    """Concatenates the tensors of all ranks, in every rank: (B,...) -> (ranks*B,...)."""
    if not dist.is_initialized():
        return tensor
    whole = tensor.new_empty(dist.get_world_size() * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(whole, tensor)
    return whole


def check_batch_size(batch_size: int, args, *, accumulate: int, least: int) -> None:
    """Raises InputError unless the batch divides into ranks * accumulate equal micro-batches."""
    count = args.ranks * accumulate
    if batch_size % count:
        raise InputError(f"--batch-size {batch_size}: cannot be split into {count} micro-batches")
    if batch_size < least * count and not args.supervised:
        raise InputError(f"--batch-size {batch_size}: each micro-batch needs {least} images to mix")


def step_seed(seed: int, iteration: int, micro_batch: int, purpose: str) -> int:
    """Returns a seed for one purpose in one micro-batch of one iteration."""
    words = (seed, iteration, zlib.crc32(purpose.encode()), micro_batch)
    return int(np.random.SeedSequence(words).generate_state(1)[0])
