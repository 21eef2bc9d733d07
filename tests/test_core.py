"""What every method file promises: a core to copy, the same text for what two files share."""

import ast
import builtins
import inspect
import symtable
import sys
from importlib import import_module
from pathlib import Path

import pytest

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
