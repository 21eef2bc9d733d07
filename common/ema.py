"""The mean teacher (Tarvainen and Valpola 2017, arXiv:1703.01780)."""

import copy

import torch
from torch import nn


def make_teacher(student: nn.Module, *, train_mode: bool) -> nn.Module:
    """Returns a copy that takes no gradient. In train mode, batch norm that is not
    frozen uses the statistics of each batch."""
    return copy.deepcopy(student).requires_grad_(False).train(train_mode)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, *, decay: float, buffers: str) -> None:
    """Sets each parameter, in place, to decay * teacher + (1 - decay) * student.

    buffers says what happens to the batch-norm statistics: "copy" takes the student's, "average"
    treats them like parameters (and copies integers), "keep" leaves the teacher's own.
    """
    if buffers not in ("copy", "average", "keep"):
        raise ValueError(f"buffers must be 'copy', 'average' or 'keep', not {buffers!r}")
    averaged = list(zip(teacher.parameters(), student.parameters(), strict=True))
    copied = []
    if buffers != "keep":
        for old, new in zip(teacher.buffers(), student.buffers(), strict=True):
            average = buffers == "average" and old.is_floating_point()
            (averaged if average else copied).append((old, new))
    old, new = map(list, zip(*averaged, strict=True))
    torch._foreach_lerp_(old, new, 1 - decay)
    for dtype in {old.dtype for old, _ in copied}:  # mixed types are copied one by one
        old, new = zip(*(pair for pair in copied if pair[0].dtype == dtype), strict=True)
        torch._foreach_copy_(old, new)
