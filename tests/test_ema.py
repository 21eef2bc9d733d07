"""common/ema.py: the new teacher; the tests of the methods have its updates."""

import pytest
import torch
from torch import nn

from common.ema import make_teacher, update_teacher


@pytest.mark.parametrize("train_mode", [True, False])
def test_teacher_is_a_detached_copy(train_mode):
    student = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout())
    student(torch.randn(2, 3, 5, 5))  # running statistics that differ from those of a new network
    student.train(not train_mode)
    teacher = make_teacher(student, train_mode=train_mode)
    assert all(module.training == train_mode for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())
    torch.testing.assert_close(teacher.state_dict(), student.state_dict(), rtol=0, atol=0)
    own, theirs = ({t.data_ptr() for t in n.state_dict().values()} for n in (teacher, student))
    assert not own & theirs
    with pytest.raises(ValueError, match="both"):
        update_teacher(teacher, student, decay=0.75, buffers="both")
