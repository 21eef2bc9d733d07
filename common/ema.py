"""The mean teacher (Tarvainen and Valpola 2017, arXiv:1703.01780)."""

import copy

import torch
from torch import nn


def make_teacher(student: nn.Module, *, train_mode: bool) -> nn.Module:
    """A copy of the student, buffers too, that takes no gradient.

    train_mode=True normalises by the statistics of the batch it labels, False by running ones.
    """
    return copy.deepcopy(student).requires_grad_(False).train(train_mode)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, *, decay: float, buffers: str) -> None:
    """Each parameter becomes decay * teacher + (1 - decay) * student, in place.

    buffers says what happens to batch-norm statistics: "copy" the student's, "average" them like
    the parameters (integers are copied), or "keep" the teacher's own.
    """
    if buffers not in ("copy", "average", "keep"):
        raise ValueError(f"buffers is 'copy', 'average' or 'keep', not {buffers!r}")
    averaged, source = list(teacher.parameters()), list(student.parameters())
    copied, copied_from = [], []
    if buffers != "keep":
        for mine, theirs in zip(teacher.buffers(), student.buffers(), strict=True):
            average = buffers == "average" and mine.is_floating_point()
            (averaged if average else copied).append(mine)
            (source if average else copied_from).append(theirs)
    torch._foreach_lerp_(averaged, source, 1 - decay)
    if copied:
        torch._foreach_copy_(copied, copied_from)
