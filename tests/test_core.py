"""What every method file promises: a core to copy, shared text, runs that go on as they were."""

import ast
import builtins
import inspect
import symtable
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from common import run
from common.deeplab import DeepLabV2

METHODS = ("classmix", "complexmix", "cowmix", "c3semiseg")
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("method", METHODS)
def test_core_runs_when_pasted_under_its_imports(method, monkeypatch):
    source = (ROOT / f"{method}.py").read_text()
    core = source.split("depends only on torch; copy from here ----\n")[1].split("# ---- to here")[
        0
    ]
    for name in [name for name in sys.modules if name.split(".")[0] in ("common", "torchvision")]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    imports = [n for n in ast.parse(source).body if isinstance(n, ast.Import | ast.ImportFrom)]
    known = {"torch", *sys.stdlib_module_names}
    known = [ast.unparse(n) for n in imports if ast.unparse(n).split()[1].split(".")[0] in known]
    namespace = {}
    exec("\n".join([*known, core]), namespace)
    assert "import " not in core

    def unresolved(table):
        names = {s.get_name() for s in table.get_symbols() if s.is_global() and s.is_referenced()}
        names -= namespace.keys() | set(dir(builtins))
        return names.union(*map(unresolved, table.get_children()))

    assert not unresolved(symtable.symtable(core, "core", "exec"))


@pytest.mark.parametrize("method", METHODS[1:])
def test_mix_is_the_same_text_everywhere(method):
    texts = [inspect.getsource(import_module(name).mix) for name in (METHODS[0], method)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("method", METHODS)
def test_no_method_imports_another(method):
    tree = ast.parse((ROOT / f"{method}.py").read_text())
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    modules |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert not modules & set(METHODS)


OWN = {"cowmix": "--network deeplab", "c3semiseg": "--warmup 1 --per-class 3"}


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_same(method, command, camvid, tmp_path):
    """To the bit, also in what is padded with the mean of weights that are not ImageNet's."""
    state = DeepLabV2(11, layers=(1, 1, 1, 1), width=4).state_dict()
    torch.save({**state, "mean": torch.full((3, 1, 1), 0.9)}, tmp_path / "weights.pth")
    flags = "--labeled 4 --size 48 64 --crop 64 80 --batch-size 4 --layers 1 1 1 1 --width 4 "
    flags += (
        f"--workers 0 --iterations 4 --save-every 2 --eval-every 4 {OWN.get(method, '--warmup 1')}"
    )
    base = ("--dataset", "camvid", "--data-dir", camvid, "--weights", tmp_path / "weights.pth")
    base += tuple(flags.split())
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command(method, *base, "--output-dir", whole)[0] == 0
    saved, save = [], run.Run._save

    def stop(self, done):
        save(self, done)
        saved.append(done)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Run, "_save", stop)
        command(method, *base, "--output-dir", parts)
    assert saved == [2]
    assert command(method, "--resume", parts / "last.pt")[0] == 0
    a, b = (torch.load(folder / "last.pt", weights_only=True)["state"] for folder in (whole, parts))
    for network in ("student", "teacher"):
        assert all(torch.equal(a[network][name], b[network][name]) for name in a[network])
