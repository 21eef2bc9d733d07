"""What the README, COPY.md and results/README.md say: commands, examples, flags, tables, links."""

import re
import runpy
import shlex
import socket
import subprocess
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import METHODS, finish, write_cityscapes
from PIL import Image

from common import streets
from common.flags import _parser, parse_args

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / name for name in ("README.md", "COPY.md", "results/README.md", "studies/README.md")
]
README, COPY, RESULTS, _ = (path.read_text() for path in DOCUMENTS)
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)
EXAMPLES = {
    re.search(r"(cowmix|classmix|complexmix|c3semiseg)", code)[0]: code
    for code in re.findall(r"```python\n(.*?)```", COPY, re.S)
}
# Flags that make the README's trainings small.
SMALL = "--weights none --layers 1 1 1 1 --width 4 --aspp-rates 1 2 --workers 0 --iterations 2"
SMALL += " --warmup 1 --batch-size 2 --size 40 64 --eval-every 2 --output-dir "
ADDED = {
    "python classmix.py": SMALL + "runs/RUN",
    "python classmix.py --dataset cityscapes --labeled 0.125": SMALL + "runs/c",
    "python classmix.py --dataset folder --data-dir my_images --preset small"
    " --output-dir runs/mine": SMALL + "runs/mine",
}


def torchrun(words: list[str]):
    """Runs a command of torchrun with two ranks in all, on one or on two nodes."""
    nodes = 2 if "--nnodes" in words else 1
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]  # is free
    change = {
        "4": str(2 // nodes),
        "HOST:29500": f"localhost:{port}",
        "classmix.py": ROOT / "classmix.py",
    }
    options = [change.get(word, word) for word in words[1 : words.index("classmix.py") + 1]]
    flags = f"{SMALL}runs/{nodes} --batch-size 4 --dataset folder --data-dir my_images".split()
    program = [sys.executable, "-m", "torch.distributed.run", *options, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    results = [finish(node) for node in [subprocess.Popen(program, **pipes) for _ in range(nodes)]]
    assert all(status == 0 and "arning" not in errors for status, _, errors in results), results
    assert sum(out.count("in the paper: student") for _, out, _ in results) == 1


def test_every_command_runs(command, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part, count in (("train", 40), ("val", 12)):  # overview.py draws scenes 3 and 11
        monkeypatch.setitem(streets.COUNTS, part, count)
    folder.rename("my_images")
    write_cityscapes(Path("data/cityscapes"), train=16)
    Image.new("RGB", (80, 60)).save("photo.jpg")
    Path("photos").mkdir()
    Image.new("RGB", (80, 60)).save("photos/other.png")
    lines = [line for language, block in BLOCKS if not language for line in block.splitlines()]
    commands = [line.rpartition(" && ")[2] for line in lines]
    prose = re.sub(r"```.*?```", "", README, flags=re.S).replace("\n", " ")
    commands += re.findall(r"`((?:python|torchrun) [^`]+)`", prose)
    ran = set()
    for text in commands:
        if "pytest" in text:  # .ci/run runs it
            continue
        ran.add(text)
        words = shlex.split(f"{text} {ADDED.get(text, '')}")
        if words[0] == "torchrun":
            torchrun(words)
        elif words[1] == "classmix.py":
            status, _, errors = command("classmix", *words[2:])
            assert status == 0, errors
        else:
            monkeypatch.setattr(sys, "argv", words[1:])
            monkeypatch.syspath_prepend(ROOT / "studies")
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    assert ran >= ADDED.keys() and len(ran) == 8
    assert {"photo.png", "photo_overlay.png", "other.png", "legend.png"} <= {
        path.name for path in Path("predictions").iterdir()
    }
    if torch.__version__ < "2.6":  # as the README says
        return
    (code,) = (block for language, block in BLOCKS if language == "python")
    exec(code)
    program = torch.export.load("student.pt2").module()
    assert program(torch.rand(1, 3, 120, 160)).shape == (1, 8, 120, 160)


def test_flags_of_the_tables_are_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table, count, words = re.search(r"\| table \| rows.*?\n\n", README, re.S)[0], 0, []
    for row in table.strip().splitlines()[2:]:
        name, *_, cell = (text.strip() for text in row.strip("|").split("|"))
        if found := re.match("ClassMix|CowMix|C3-SemiSeg", name):
            module = import_module(found[0].lower().replace("-", ""))
        for text in re.findall("`(.*?)`", cell):
            words = shlex.split(text) if text.startswith("--") else [*words[:-1], text]
            argv, preset = ["--dataset", "cityscapes", *words], getattr(module, "preset", None)
            recipe, _ = parse_args(module.__name__, "", module.RECIPES, preset, argv)
            for name, value in pairwise(words):
                number = vars(recipe).get(name.removeprefix("--").replace("-", "_"))
                assert number is None or value.startswith("--") or value[:2] in str(number)
            count += 1
    assert count == 38


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


@pytest.mark.parametrize("name", ["camvid", "camvid_classes", "streets", "streets_rows", "gpu"])
def test_tables_are_those_of_the_logs(name):
    program = [sys.executable, ROOT / "benchmarks/table.py", name]
    table = subprocess.run(program, check=True, capture_output=True, text=True).stdout
    assert table.count("\n") > 3 and table in (RESULTS if "_" in name else README)


def test_flags_files_and_marks_that_the_documents_name_exist():
    known = {"--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint", "--maxprocesses"}
    for name in METHODS:
        module = import_module(name)
        known |= {*_parser(name, "", module.RECIPES)._option_string_actions}
        code = (ROOT / f"{name}.py").read_text()
        assert all(f"\n{mark}\n" in code for mark in re.findall("`(# ---- .*?)`", README))
    for text in (README, COPY, RESULTS):
        assert {*re.findall(r"(?<![\w-])--[a-z][\w-]+", text)} <= known
    files = {
        path for path in re.findall(r"[\w/-]+\.(?:py|sh|md|txt)\b", README) if "last" not in path
    }
    written = {"my_images/classes.txt", "classes.txt", "split.txt"}  # by users and by runs
    assert all((ROOT / path).exists() for path in files - written)
    rows = re.search(r"A run folder holds:.*?\n\n(.*?)\n\n", README, re.S)[1].splitlines()[2:]
    named = {file for row in rows for file in re.findall("`([^`]+)`", row.split("|")[1])}
    assert named == {"last.pt", "samples/", "curve.png", "split.txt"} | {
        f"{stem}.{end}" for stem, end in (("config", "json"), ("result", "json"), ("log", "jsonl"))
    }


def test_links_and_pictures_are_there():
    for file in DOCUMENTS:
        text = re.sub(r"```.*?```", "", file.read_text(), flags=re.S)
        links = re.findall(r"\]\(([^)#:]+)\)", text)
        assert all((file.parent / link).exists() for link in links)


def test_the_readme_is_short():
    assert README.count("\n") <= 200


def test_logs_hold_no_path_of_a_machine():
    for path in (ROOT / "results").rglob("*.json"):
        assert not re.search(r'"(/|~|\.\./|[A-Z]:\\)', path.read_text()), path
