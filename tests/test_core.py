"""What every method file promises: a part to copy, a loop that can be called, exact resume."""

import ast
import builtins
import inspect
import json
import signal
import symtable
import sys
from importlib import import_module

import conftest
import pytest
import torch
from conftest import METHODS, ROOT, read_log, record, same_state, stopping_train, tiny

from common import InputError, flags, ranks, run
from common.deeplab import DeepLabV2


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of the modules that a source imports."""
    nodes = list(ast.walk(tree))
    names = {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    names |= {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("method", METHODS)
def test_the_part_to_copy_runs_alone(method, monkeypatch):
    source = (ROOT / f"{method}.py").read_text()
    _, core = source.split("# ---- The method: depends only on torch; copy from here ----\n")
    core, _ = core.split("# ---- to here ----\n")
    assert imported(ast.parse(core)) <= {"torch", *sys.stdlib_module_names}
    loaded = {name for name in sys.modules if name.split(".")[0] in ("common", "torchvision")}
    for name in {*loaded, "common", "torchvision"}:
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    namespace = {}
    exec(core, namespace)

    def unresolved(table):
        names = {s.get_name() for s in table.get_symbols() if s.is_global() and s.is_referenced()}
        names -= namespace.keys() | set(dir(builtins))
        return names.union(*map(unresolved, table.get_children()))

    assert not unresolved(symtable.symtable(core, "core", "exec"))


COPIED = [(method, "mix") for method in METHODS[1:]]
COPIED += [("complexmix", name) for name in ("cross_entropy", "network", "check")]


@pytest.mark.parametrize(("method", "name"), COPIED)
def test_functions_are_the_same_text_as_in_classmix(method, name):
    modules = map(import_module, (method, "classmix"))
    ours, theirs = (inspect.getsource(getattr(module, name)) for module in modules)
    assert ours == theirs


def test_nothing_imports_a_method():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("common/*.py")]:
        assert not imported(ast.parse(path.read_text())) & set(METHODS), path


# Decay of the teacher in step k of a run with two steps of warm-up and --ema-decay 0.6.
DECAY = {
    "classmix": lambda k: min(1 - 1 / (k + 1), 0.6),
    "complexmix": lambda k: min(1 - 1 / (max(0, k - 2) + 1), 0.6),
    "cowmix": lambda k: 0.6,
    "c3semiseg": lambda k: 0.6 if k > 2 else 0,
}


@pytest.mark.parametrize("method", METHODS)
def test_train_takes_a_session_of_one_s_own(method, camvid, tmp_path):
    """This one counts the steps and looks at what each of them changes, as benchmarks do."""
    steps, students, teachers, rates, drawn = [], [], [], [], {}

    class Watching(run.Session):
        def look(self):
            for name, seen in (("student", students), ("teacher", teachers)):
                named = self.state[name].named_parameters()  # C3 drops its projection at the end
                kept = [w.detach().flatten() for name, w in named if "projection" not in name]
                seen.append(torch.cat(kept))
            rates.append(self.state["optimizer"].param_groups[0]["lr"])

        def restore(self):
            first = super().restore()
            self.look()
            return first

        def batches(self, indices, *what, stream, **more):
            drawn[stream] = indices == self.split[min(stream, 1)]
            return super().batches(indices, *what, stream=stream, **more)

        def end_step(self, iteration, pictures):
            steps.append(iteration)
            assert self.state["student"].training and self.state["teacher"].training
            self.look()
            super().end_step(iteration, pictures)

    argv = [*tiny(method, camvid), "--ema-decay", "0.6", "--iterations", "6"]
    argv += ["--output-dir", str(tmp_path / "run")]
    module = import_module(method)
    preset = getattr(module, "preset", None)
    recipe, args = flags.parse_args(method, module.__doc__, module.RECIPES, preset, argv)
    module.train(recipe, args, make_session=Watching)
    headline = "teacher" if method == "cowmix" else "student"
    result = json.loads((tmp_path / "run/result.json").read_text())
    last = torch.load(tmp_path / "run/last.pt")
    assert steps == [*range(6)] and result["headline"] == headline
    assert last["miou"] == result[headline]["miou"]
    student, teacher = last["state"]["student"], last["state"]["teacher"]
    statistics = [name for name in student if name.endswith(("mean", "var", "tracked"))]
    same = [torch.equal(student[name], teacher[name]) for name in statistics]
    assert all(same) == (method in ("classmix", "complexmix"))
    assert len(drawn) == (3 if method == "cowmix" else 2) and all(drawn.values())
    assert rates == pytest.approx([rates[0] * (1 - k / 6) ** recipe.lr_power for k in range(7)])
    for k in range(6):
        assert not torch.equal(students[k], students[k + 1])
        followed = students[k if method == "c3semiseg" else k + 1]
        expected = torch.lerp(followed, teachers[k], DECAY[method](k))
        torch.testing.assert_close(teachers[k + 1], expected)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_in_a_run_is_drawn_twice_with_one_seed(method, camvid, monkeypatch):
    drawn, step_seed = [], ranks.step_seed
    monkeypatch.setattr(ranks, "step_seed", lambda *of: drawn.append(step_seed(*of)) or drawn[-1])
    record(method, *tiny(method, camvid), "--accumulate", 2, "--iterations", 5)
    assert len(drawn) >= 3 * 2 and len(set(drawn)) == len(drawn)


# Every one of these changes what a tiny run learns.
SHARED = """--seed 1 | --split-seed 2 | --supervised | --size 32 32 | --crop 16 24 | --batch-size 2
--iterations 6 | --lr 0.004 | --lr-power 2 | --ema-decay 0.1 | --layers 1 2 1 1 | --width 6
--aspp-rates 2 3"""
SGD = """--warmup 1 | --optimizer adam | --momentum 0.5 | --nesterov | --weight-decay 0.1
--head-factor 2 | --mean 10 20 30 | --scale-range 0.5 1.5 --crop 24 32 | --no-flip
--weighting pixel | --weight-scope sample | --confidence-threshold 0.12"""
CHANGES = {
    "classmix": f"""{SGD} | --mask cow | --mask cut | --mask cow --sigma-range 2 3
--weighting ramp | --weighting ramp --ramp-iterations 3 | --weighting constant
--unlabeled-loss soft-cross-entropy | --unlabeled-loss squared-error | --no-extra-augmentations""",
    "complexmix": f"{SGD} | --blocks 2 3 | --classes present | --unlabeled-weight 0.5",
    "cowmix": """--network unet | --flip | --head-factor 3 | --consistency-weight 3
--confidence-threshold 0.12 | --sigma-range 8 8 | --p-range 0.1 0.1 | --color-jitter
--scale-range 0.5 1.5 --crop 24 32 | --perturbation cowout | --perturbation cutmix
--perturbation cutout | --perturbation cutout --color-jitter | --perturbation ict
--perturbation ict --ict-alpha 5 | --perturbation aug | --perturbation aug --supervised
--perturbation aug --flip-probability 1 | --perturbation aug --translation 20
--perturbation aug --scaling 0.5 0.5 | --perturbation aug --rotation 90
--perturbation aug --brightness 0.5 | --perturbation aug --contrast 2""",
    "c3semiseg": """--mixing intra | --mixing none | --teacher-view strong | --student-view weak
--student-view jitter | --jitter 0.1 | --hue 0 | --operations 1 | --operation-probability 0.9
--magnitude 1 | --consistency-weight 5 | --consistency-ramp 9 | --contrast-weight 3
--contrast-ramp 60 | --contrast labeled | --contrast unlabeled | --contrast none
--no-contrast-road | --per-class 5 | --no-hard-sampling | --temperature 0.5 | --embedding 5
--keep 0.3 | --keep 1 | --threshold-momentum 0.1 | --initial-threshold 0.25 | --rotation 0
--no-flip | --group-size 2 | --scales 0.75 1.25 --crop 24 32 | --ema-warm-start | --warmup 1
--backbone-factor 0.1 | --no-warmup-contrast""",
}


@pytest.mark.parametrize("method", METHODS)
def test_every_field_of_a_recipe_changes_the_run(method, camvid):
    flags = f"{SHARED} | {CHANGES[method]}".replace("\n", " | ").split(" | ")
    named = {word[2:].removeprefix("no-").replace("-", "_") for word in " ".join(flags).split()}
    assert named >= set(import_module(method).Recipe.__dataclass_fields__)
    ends = {}
    for text in ("", *flags):
        argv = (*tiny(method, camvid), "--size", 48, 64, "--iterations", 5, *text.split())
        student = record(method, *argv).state["student"].state_dict()
        end = torch.cat([value.flatten().double() for value in student.values()])
        assert end.isfinite().all()
        ends.setdefault(end.numpy().tobytes(), []).append(text)
    assert [texts for texts in ends.values() if len(texts) > 1] == []


REFUSED = {
    "--accumulate 3": "--batch-size 4",
    "--scale-range 0.5 1.5": "--scale-range: .*--crop",
    # of C3-SemiSeg
    "--scales 0.5 1.5": "--scales: .*--crop",
    "--batch-size 4 --group-size 3 --accumulate 3": "cannot be split into 3",
    "--batch-size 5 --group-size 4": "--batch-size 5: cannot be split into 2",
    "--warmup 6": "6 of them are warm-up",
}


@pytest.mark.parametrize("method", METHODS)
def test_flags_that_do_not_go_together_are_refused(method, camvid):
    for text in list(REFUSED)[2:] if method == "c3semiseg" else list(REFUSED)[:2]:
        with pytest.raises(InputError, match=REFUSED[text]):
            record(method, *tiny(method, camvid), "--iterations", 6, *text.split())


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_and_killed_run_ends_alike(method, command, camvid, tmp_path, monkeypatch):
    """As undisturbed, to the bit, also if crops are padded with another mean than ImageNet's."""
    state = DeepLabV2(11, layers=(1, 1, 1, 1), width=4).state_dict()
    torch.save({**state, "mean": torch.full((3, 1, 1), 0.9)}, tmp_path / "weights.pth")
    flags = (*tiny(method, camvid), "--weights", tmp_path / "weights.pth", "--crop", 28, 40)
    flags += ("--iterations", 12, "--eval-every", 8, "--save-every", 8)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command(method, *flags, "--output-dir", whole)[::2] == (0, "")
    with monkeypatch.context() as patch:
        train = stopping_train(method, 5, signal.SIGTERM)
        patch.setattr(import_module(method), "train", train)
        status, _, errors = command(method, *flags, "--output-dir", parts)
    last = parts / "last.pt"
    line = f"{method}.py: stopped by SIGTERM after iteration 5; continue with --resume {last}\n"
    assert (status, errors) == (143, line)
    code = f"import sys; sys.path.append({str(ROOT / 'tests')!r}); import conftest, {method}\n"
    code += f"{method}.train = conftest.stopping_train({method!r}, 11, {signal.SIGKILL})\n"
    process = conftest.start("-c", f"{code}{method}.main()", "--resume", last)
    status, printed, _ = conftest.finish(process)
    assert status == -signal.SIGKILL and "resumed after iteration 5" in printed
    assert read_log(parts)[-1]["iteration"] == 10 and not (parts / "result.json").exists()
    status, printed, _ = command(method, *flags, "--resume", "auto", "--output-dir", parts)
    assert status == 0 and "resumed after iteration 8" in printed
    same_state(whole, parts)
    assert read_log(whole) == read_log(parts) and (parts / "result.json").exists()
