"""common/ema.py: the mean teacher."""

import pytest
import torch
from torch import nn

from common.ema import make_teacher, update_teacher


def network(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout())
    net(torch.randn(2, 3, 5, 5) + seed)  # running statistics that differ
    return net


@pytest.mark.parametrize("decay", [0.9, 0.3, 0.0])
def test_update_is_an_exponential_average(decay):
    students = [network(seed) for seed in range(5)]
    teacher = make_teacher(students[0], train_mode=True)
    for student in students[1:]:
        update_teacher(teacher, student, decay=decay, buffers="keep")
    shares = [decay**4] + [(1 - decay) * decay ** (4 - i) for i in range(1, 5)]
    parameters = [network.parameters() for network in (teacher, *students)]
    for mine, *theirs in zip(*parameters, strict=True):
        torch.testing.assert_close(mine, sum(w * p for w, p in zip(shares, theirs, strict=True)))
        assert decay or torch.equal(mine, theirs[-1])


@pytest.mark.parametrize(("buffers", "share"), [("copy", 1.0), ("average", 0.25), ("keep", 0.0)])
def test_buffers(buffers, share):
    before, student = network(0), network(1)
    student[1].num_batches_tracked.fill_(7)
    teacher = make_teacher(before, train_mode=True)
    update_teacher(teacher, student, decay=0.75, buffers=buffers)
    for name in ("running_mean", "running_var"):
        old, new = getattr(before[1], name), getattr(student[1], name)
        torch.testing.assert_close(getattr(teacher[1], name), (1 - share) * old + share * new)
    assert teacher[1].num_batches_tracked == (1 if buffers == "keep" else 7)
    with pytest.raises(ValueError, match="both"):
        update_teacher(teacher, student, decay=0.75, buffers="both")


@pytest.mark.parametrize("train_mode", [True, False])
def test_teacher_is_a_detached_copy(train_mode):
    student = network().train(not train_mode)
    teacher = make_teacher(student, train_mode=train_mode)
    assert all(module.training == train_mode for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())
    torch.testing.assert_close(teacher.state_dict(), student.state_dict(), rtol=0, atol=0)
    own, theirs = ({t.data_ptr() for t in n.state_dict().values()} for n in (teacher, student))
    assert not own & theirs
