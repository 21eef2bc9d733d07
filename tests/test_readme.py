"""The examples for copying run as they are printed; tables in the README are those of the logs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README, COPY = ((ROOT / name).read_text() for name in ("README.md", "COPY.md"))
EXAMPLES = {
    re.search(r"(cowmix|classmix|complexmix|c3semiseg)", code)[0]: code
    for code in re.findall(r"```python\n(.*?)```", README + COPY, re.S)
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


@pytest.mark.parametrize("name", ["camvid", "streets"])
def test_tables_are_those_of_the_logs(name):
    program = [sys.executable, ROOT / "benchmarks/table.py", name]
    table = subprocess.run(program, check=True, capture_output=True, text=True).stdout
    assert table.count("\n") > 3 and table in README


def test_links_and_pictures_are_there():
    for file in (ROOT / "README.md", ROOT / "COPY.md", ROOT / "studies/README.md"):
        text = re.sub(r"```.*?```", "", file.read_text(), flags=re.S)
        links = re.findall(r"\]\(([^)#:]+)\)", text)
        assert all((file.parent / link).exists() for link in links)


def test_logs_hold_no_path_of_a_machine():
    for path in (ROOT / "results").rglob("*.json"):
        assert not re.search(r'"(/|~|\.\./|[A-Z]:\\)', path.read_text()), path
