"""What runs before the first optimizer step of each method on streets, and how dense its file is.

    python benchmarks/first_step.py [CHECKOUT]

functions, files: those of this repository that run from main() to a step with unlabeled images
(--warmup 0). lines: these functions from `def` to end, docstrings and inner functions included.
executed: lines that run in them. rendering: as lines, but of common/streets.py, which no other
column counts. tokens: per line of code, without comments and docstrings. longest: lines of the
longest function of the method file. depth: deepest nesting of blocks in it.
"""

import ast
import functools
import importlib
import sys
import tempfile
import tokenize
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from unittest.mock import Mock, patch

from torch.optim.optimizer import register_optimizer_step_pre_hook

COLUMNS = ("functions", "files", "lines", "executed", "rendering", "tokens", "longest", "depth")
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


def function_lengths(path: Path) -> dict[tuple[str, int], int]:
    """(file, first line) -> number of lines of each function."""
    found = [n for n in ast.walk(ast.parse(path.read_text())) if type(n) is ast.FunctionDef]
    firsts = [min(node.lineno for node in (f, *f.decorator_list)) for f in found]
    return {(str(path), n): f.end_lineno + 1 - n for f, n in zip(found, firsts, strict=True)}


def depth(node: ast.AST, columns=frozenset()) -> int:
    """The deepest nesting of blocks. An elif is in the column of its if and adds none."""
    if isinstance(node, (ast.If, ast.For, ast.While, ast.With, ast.Try)):
        columns = columns | {node.col_offset}
    return max([len(columns), *(depth(child, columns) for child in ast.iter_child_nodes(node))])


def tokens_per_line(source: str) -> float:
    """Tokens of the Python grammar in a line of code."""
    texts = [n for n in ast.walk(ast.parse(source)) if type(n) is ast.Expr]
    docs = {(n.lineno, n.col_offset) for n in texts if type(n.value) is ast.Constant}
    tokens = tokenize.generate_tokens(StringIO(source).readline)
    lines = [t.start[0] for t in tokens if t.type not in LAYOUT and t.start not in docs]
    return len(lines) / len(set(lines))


def run_to_first_step(method: str, files: set[str]) -> tuple[set, set]:
    """(file, first line) of each function and (file, line) of each line that runs."""
    module, streets = map(importlib.import_module, (method, "common.streets"))
    draw, called, executed = functools.cache(streets.draw), set(), set()

    def trace(frame, event, _):
        file = frame.f_code.co_filename
        if event == "line":
            executed.add((file, frame.f_lineno))
        elif file in files:
            called.add((file, frame.f_code.co_firstlineno))
        return trace if file in files and file != streets.__file__ else None

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()), suppress(EOFError):
        argv = [f"{method}.py", f"--output-dir={folder}/run"]
        argv += ["--warmup=0"] if method != "cowmix" else []
        few = {"draw": lambda seed, index, size: draw(seed, index % 16, size)}
        hook = register_optimizer_step_pre_hook(Mock(side_effect=EOFError))
        with patch.multiple(streets, **few), patch.object(sys, "argv", argv):
            sys.settrace(trace)
            module.main()
    sys.settrace(None)
    hook.remove()
    return called, executed


def main() -> None:
    """Prints a row for each method."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]).resolve()
    sys.path.insert(0, str(root))
    print(" " * 10, *(f"{column:>10}" for column in COLUMNS))
    for method in ("classmix", "complexmix", "cowmix", "c3semiseg"):
        path, lengths = root / f"{method}.py", {}
        for file in (path, *root.glob("common/*.py")):
            lengths |= function_lengths(file)
        called, executed = run_to_first_step(method, {file for file, _ in lengths})
        ran = called & lengths.keys()
        rendering = {place for place in ran if place[0].endswith("streets.py")}
        row = [len(ran - rendering), len({file for file, _ in ran - rendering})]
        row += [sum(map(lengths.get, ran - rendering)), len(executed)]
        row += [sum(map(lengths.get, rendering)), f"{tokens_per_line(path.read_text()):.1f}"]
        row += [max(function_lengths(path).values()), depth(ast.parse(path.read_text()))]
        print(f"{method:10}", *(f"{value:>10}" for value in row))


if __name__ == "__main__":
    main()
