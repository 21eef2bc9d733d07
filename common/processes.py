"""How the processes of a run meet, agree and part, and how a run of one or more of them ends."""

import os
import re
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

import common
from common import InputError, is_first_to

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AGAIN = 3.0  # seconds
# Exchanged by agree and never freed: gloo's thread would need the interpreter for that, which
# destroy_process_group keeps while it waits for the thread (seen with torch 2.5).
_number = torch.zeros((), dtype=torch.int64)
# What gloo and NCCL say when the other side of a connection has died.
_LOST = re.compile("connection|closed by peer|reset by peer|broken pipe|nccl", re.IGNORECASE)


@contextmanager
def ending(method: str) -> Iterator[None]:
    """A user's mistake, a signal or a lost process ends in one line on stderr and a status.

    Of several processes only the first in trouble prints: the others' is its consequence.
    """
    handlers = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
        if common.store is None:  # else torchrun may still signal this process, which has ended
            _restore(handlers)
        return
    except (InputError, OSError) as error:
        # A loader process wraps the message in a traceback, whose last line it is.
        line = str(error).strip().splitlines()[-1].removeprefix("common.InputError: ")
        status = 2
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        line, status = f"stopped by {signal.Signals(number).name}", 128 + number
    except RuntimeError as error:
        if not dist.is_initialized() or not _LOST.search(str(error)):
            is_first_to("end")  # what the others lose now has its reason in this traceback
            raise
        cause = str(error).strip().splitlines()[0]
        line, status = f"another process is gone ({cause}); --resume auto goes on", 1
    _ignore_signals()
    if is_first_to("end"):
        print(f"{method}.py: {line}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(status)  # the process group cannot be left in an orderly way any more
    _restore(handlers)
    sys.exit(status)


def _restore(handlers: dict) -> None:
    """Who calls main() from a program of their own keeps their signals."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


def stop(number: int, _) -> NoReturn:
    """Of a signal: where there is nothing to be saved."""
    # Where Python swallows it, as in __del__ or while it forks, it has to come again.
    signal.signal(signal.SIGALRM, lambda *_: stop(number, None))
    signal.setitimer(signal.ITIMER_REAL, _AGAIN)
    raise KeyboardInterrupt(number)


def _ignore_signals() -> None:
    """Torchrun sends one to all others as soon as one has left, while they are leaving."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would complain of ended loader workers


def meet() -> None:
    """Reach the processes that torchrun started, if any; only the first one prints progress."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    try:
        store, rank, _ = next(rendezvous("env://"))
    except (RuntimeError, ValueError) as error:
        raise _unmet(error) from error
    # The store outlives a restart; under the old names the new processes would meet the dead.
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    common.store = dist.PrefixStore(restart, store)
    if rank > 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def join(args: Namespace) -> None:
    """Form a group with them; InputError where the devices cannot talk to each other."""
    # What the hosts agree on goes by gloo, so that none of them waits for its device.
    backend = "cpu:gloo,cuda:nccl" if args.device.type == "cuda" else "gloo"
    group = {"store": common.store, "rank": args.rank, "world_size": args.processes}
    # The others wait while the first one evaluates or makes the cache.
    wait = timedelta(hours=3)
    try:
        dist.init_process_group(backend, timeout=wait, **group)
        dist.all_reduce(torch.zeros(1, device=args.device))
    except (RuntimeError, ValueError) as error:
        raise _unmet(error) from error


def _unmet(error: Exception) -> InputError:
    return InputError(f"cannot meet the other processes: {str(error).strip().splitlines()[0]}")


def agree(number: int = 0) -> int:
    """The largest of the processes' numbers, in all of them; each waits for the others."""
    if not dist.is_initialized():
        return number
    dist.all_reduce(_number.fill_(number), dist.ReduceOp.MAX)
    return int(_number)


def gather(tensor: Tensor) -> Tensor:
    """The processes' tensors behind one another, in all of them: (B,...) -> (processes*B,...)."""
    if not dist.is_initialized():
        return tensor
    whole = tensor.new_empty(dist.get_world_size() * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(whole, tensor)
    return whole


def is_first_here() -> bool:
    """Whether this is the one process of its machine that does what all on it need."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def leave() -> None:
    """Part from the others, in order; nothing stops this process any more."""
    _ignore_signals()
    if dist.is_initialized():
        dist.destroy_process_group()


def launcher() -> str:
    """The command that starts as many processes on as many machines."""
    if not dist.is_initialized():
        return "python"
    size = dist.get_world_size()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    machines = f"--nnodes {size // here} " if size > here else ""
    return f"torchrun {machines}--nproc-per-node {here}"
