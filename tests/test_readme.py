"""The examples in the README run as they are printed."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = {
    re.search(r"(cowmix|classmix|complexmix|c3semiseg)", code)[0]: code
    for code in re.findall(r"```python\n(.*?)```", README, re.S)
}


@pytest.mark.parametrize("method", ["cowmix", "classmix", "complexmix", "c3semiseg"])
def test_example_trains_student_and_teacher(method, capsys):
    torch.manual_seed(0)
    code = EXAMPLES[method]
    assert len(code.splitlines()) <= 30
    start, loop = re.split(r"(?m)^(?=for )", code)
    namespace = {}
    exec(start, namespace)
    networks = [namespace["student"], namespace["teacher"]]
    before = [[p.clone() for p in network.parameters()] for network in networks]
    exec(loop, namespace)
    for network, old in zip(networks, before, strict=True):
        pairs = list(zip(network.parameters(), old, strict=True))
        assert all(new.isfinite().all() for new, _ in pairs)
        assert any(not torch.equal(new, was) for new, was in pairs)
    assert not any(p.requires_grad for p in namespace["teacher"].parameters())
    assert capsys.readouterr().out.count("loss_l") == 3
