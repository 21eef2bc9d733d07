"""The command line: shared flags, one flag for each field of a Recipe, settings of a checkpoint."""

import argparse
import importlib.util
import inspect
import math
import os
import re
import shutil
import types
import typing
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from common import InputError, warn
from common.datasets import DEFAULTS

# The types of a Recipe's fields: they say which numbers its flags accept.
Count = typing.NewType("Count", int)
Seed = typing.NewType("Seed", int)
Share = typing.NewType("Share", float)
Positive = typing.NewType("Positive", float)
LIMITS = {int: (0, math.inf), Count: (1, math.inf), Seed: (0, 2**32 - 1)}
LIMITS |= {float: (0.0, math.inf), Share: (0.0, 1.0), Positive: (1e-9, math.inf)}
RANGES = (tuple[float, float], tuple[Positive, Positive], tuple[Share, Share])
SHARED = {"dataset": "streets", "seed": 0, "accumulate": 1, "out": "predictions"}
SHARED |= {"supervised": False, "tensorboard": False, "full_resolution": False}
# A resumed run keeps these, and its recipe.
FIXED = ("dataset", "labeled", "labeled_list", "split_seed", "seed", "supervised", "weights")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise InputError(f"{message} (see --help)")


def parse_args(method: str, doc: str, recipes: dict, preset: Callable | None = None, argv=None):
    """Returns the recipe and the other settings (a Namespace) that a command line asks for.

    They come from a preset or, with --resume, --evaluate or --predict, from a checkpoint; flags
    that are given change them. preset(dataset, given flags) may choose another recipe than
    recipes[dataset]. args.checkpoint is what was read, or None.
    """
    flags = vars(_parser(method, doc, recipes).parse_args(argv))
    given = {name: value for name, value in flags.items() if value is not None}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    dataset = given.get("dataset", "streets")
    recipe = recipes[dataset] if preset is None else preset(dataset, given)
    settings = {name: None for name in flags if not hasattr(recipe, name)}
    settings |= {**SHARED, **DEFAULTS[dataset], "method": method, "checkpoint": None}
    folders = _folders(method, recipes[dataset], settings, given)
    path = given.get("resume", given.get("evaluate", given.get("predict", [None])[0]))
    if path == "auto":
        found = [folder / "last.pt" for folder in folders if (folder / "last.pt").exists()]
        path = found[-1] if found else None
    if path is not None:
        checkpoint = read_checkpoint(Path(path), method)
        recipe, settings = _stored(checkpoint, type(recipe), settings, given)
    settings |= {name: value for name, value in given.items() if not hasattr(recipe, name)}
    folder = folders[-1] if path is None or "output_dir" in given else Path(path).parent
    last = folder / "last.pt"
    if last.exists() and (path is None or not last.samefile(path)):
        raise InputError(f"--output-dir {folder}: holds a run; add --resume auto to continue it")
    args = argparse.Namespace(**{**settings, "output_dir": folder})
    _complete(args)
    return _override(recipe, given), args


def _stored(checkpoint: dict, recipe_class: type, settings: dict, given: dict):
    """The recipe and the settings of a checkpoint. A resumed run must not change them."""
    settings = {**settings, **checkpoint["args"], "checkpoint": checkpoint}
    try:
        recipe = recipe_class(**checkpoint["recipe"])
    except TypeError as error:
        raise InputError(f"a checkpoint of another version of this file: {error}") from error
    if given.get("dataset", settings["dataset"]) != settings["dataset"]:
        settings["data_dir"] = None
    if "resume" not in given:
        return recipe, {**settings, "precision": None}  # the stored one may not suit this machine
    for name, kept in {**{name: settings[name] for name in FIXED}, **asdict(recipe)}.items():
        if given.get(name, kept) != kept:
            raise InputError(f"{_flag(name)}: this run was started with {kept}; start a new one")
    return recipe, settings


def _override(recipe, given: dict):
    """The recipe with the fields that were given as flags."""
    changes = {name: value for name, value in given.items() if hasattr(recipe, name)}
    if "size" in changes and recipe.size is None and "crop" not in changes:
        # The preset crops because image sizes differ. Resized images need no crop.
        uncropped = {"crop": None, "scale_range": (1.0, 1.0), "scales": (1.0,)}
        changes = {name: v for name, v in uncropped.items() if hasattr(recipe, name)} | changes
    for field in fields(recipe):
        low, *_, high = changes.get(field.name, (0, 0)) if field.type in RANGES else (0, 0)
        if low > high:
            raise InputError(f"{_flag(field.name)}: {low} is above {high}")
    return replace(recipe, **changes)


def _complete(args: argparse.Namespace) -> None:
    """Fills in what depends on another setting, on the machine or on torchrun."""
    if args.full_resolution and args.evaluate is None:
        raise InputError("--full-resolution: only goes with --evaluate")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise InputError("--tensorboard: pip install tensorboard first")
    args.split_seed = args.seed if args.split_seed is None else args.split_seed
    args.rank, args.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args.device = _device(args.device)
    cuda = args.device.type == "cuda"
    if args.precision is None:
        args.precision = "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
    if args.compile is None:
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        args.compile = cuda and compiler is not None  # Triton builds its launchers with it
        if cuda and compiler is None:
            warn("no C compiler found: networks run uncompiled (slower)")
    if args.workers is None:
        args.workers = 0 if args.dataset == "streets" else min(8, os.cpu_count() or 1)


def _device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.zeros(1, device=name).tolist()  # the device "meta" has no values
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if name.startswith("cuda"):
        torch.cuda.set_device(name)
    return torch.device(name)


# ---- The parser ----


def _parser(method: str, doc: str, recipes: dict) -> argparse.ArgumentParser:
    """A parser whose flags are None unless they are given."""
    description = doc.strip().split("\n\n")[0]
    parser = _Parser(prog=f"{method}.py", description=description, allow_abbrev=False)
    add, count, natural = parser.add_argument, _number(Count), _number(int)
    either = parser.add_mutually_exclusive_group().add_argument
    command = parser.add_mutually_exclusive_group().add_argument
    seed = {"type": _number(Seed), "metavar": "N"}
    on = {"action": "store_const", "const": True}
    yes_or_no = {"action": argparse.BooleanOptionalAction}
    add("--dataset", choices=list(recipes), help="data set (default: streets)")
    add("--data-dir", help="folder of the data set (default: data/<dataset>)")
    either("--labeled", help="number of labeled images, or their share, such as 0.125 or 1/8")
    either("--labeled-list", metavar="FILE", help="file that names the labeled images, one a line")
    add("--split-seed", **seed, help="seed that chooses the labeled images (default: --seed)")
    add("--supervised", **on, help="train the baseline, without unlabeled images")
    add("--weights", help="initial weights: imagenet, none or a file")
    add("--seed", **seed, help="seed of weights, batches and masks (default: 0)")
    add("--device", help="torch device (default: cuda if available, else cpu)")
    add(
        "--precision",
        choices=("bf16", "fp32"),
        help="number format of the networks (default: bf16 on CUDA)",
    )
    add("--compile", **yes_or_no, help="compile the networks (default: on CUDA)")
    add("--accumulate", type=count, metavar="N", help="split a batch into N micro-batches")
    add("--workers", type=natural, metavar="N", help="number of loader processes")
    add("--output-dir", help="folder of the run (default: runs/<method>_<dataset>_<labeled>_s...)")
    command("--resume", metavar="CKPT|auto", help="continue a last.pt; auto: the newest, if any")
    add(
        "--eval-every",
        type=count,
        metavar="STEPS",
        help="evaluate each STEPS steps (default: 8 times in all)",
    )
    add(
        "--save-every",
        type=count,
        metavar="STEPS",
        help="save each STEPS steps (default: 40 times in all)",
    )
    add("--tensorboard", **on, help="also write TensorBoard event files")
    command("--evaluate", metavar="CKPT", help="print the IoU of student and teacher, and end")
    add("--full-resolution", **on, help="evaluate at the labels' own size")
    add(
        "--evaluate-split",
        choices=("val", "test"),
        help="images to evaluate (default: test if there)",
    )
    command("--predict", nargs="+", metavar=("CKPT", "IMAGE"), help="label pictures, and end")
    add("--out", help="folder for --predict (default: predictions)")
    sections = "numbers in parentheses are sections of the paper"
    add = parser.add_argument_group("recipe", sections).add_argument
    recipe_class = type(recipes["streets"])
    source = inspect.getsource(recipe_class)
    comments = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", source, re.M))
    for field in fields(recipe_class):
        values = {name: getattr(recipe, field.name) for name, recipe in recipes.items()}
        presets = [f"default: {values['streets']}"]
        if len(set(values.values())) > 1:
            presets = [f"{name}: {value}" for name, value in values.items()]
        text = f"{comments[field.name]} [{', '.join(presets)}]"
        add(_flag(field.name), help=text.replace("%", "%%"), **_options(field.type))
    return parser


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _options(kind) -> dict:
    """Options of add_argument for a field's type."""
    if isinstance(kind, types.UnionType):  # X | None
        kind = typing.get_args(kind)[0]
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(kind) is typing.Literal:
        return {"choices": typing.get_args(kind)}
    if typing.get_origin(kind) is tuple:
        kind, *rest = typing.get_args(kind)
        return {"nargs": "+" if rest == [...] else 1 + len(rest), "type": _number(kind)}
    return {"type": _number(kind)}


def _number(kind) -> Callable[[str], float]:
    """A parser of numbers of this kind, for argparse."""
    least, largest = LIMITS[kind]

    def number(text: str) -> float:
        value = type(least)(text)
        if not least <= value <= largest or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least} to {largest}")
        return value

    return number


# ---- Folders and checkpoints ----


def _folders(method: str, usual, settings: dict, given: dict) -> list[Path]:
    """--output-dir, or NAME, NAME-2, ... up to the first folder that does not exist.

    NAME is runs/<method>_<dataset>_<labeled>_s<seed>, then the flags that differ from the preset.
    """
    if "output_dir" in given:
        return [Path(given["output_dir"])]
    defaults = {**settings, **asdict(usual)}
    chosen = {**defaults, **given}
    labeled = Path(chosen["labeled_list"] or chosen["labeled"].replace("/", "-")).name
    parts = [method, chosen["dataset"], labeled, f"s{chosen['seed']}"]
    for name, value in given.items():
        if name in ("split_seed", "weights", "supervised", *asdict(usual)):
            text = "x".join(map(str, value)) if isinstance(value, tuple) else Path(str(value)).name
            flag = name.replace("_", "-")
            if value != defaults[name]:
                parts.append(flag if value is True else f"{flag}-{text}")
    folders = [Path("runs") / "_".join(parts)[:200]]  # file systems allow 255 bytes
    while folders[-1].exists():
        folders.append(Path(f"{folders[0]}-{len(folders) + 1}"))
    return folders


def read_checkpoint(path: Path, method: str) -> dict:
    """Reads a last.pt of this method onto the CPU; InputError for anything else."""
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly any type on a foreign file
        raise InputError(f"{path}: not a checkpoint, or a damaged one") from error
    if not isinstance(checkpoint, dict) or not {"method", "recipe", "state"} <= set(checkpoint):
        raise InputError(f"{path}: not a checkpoint of this repository (weights go to --weights)")
    if checkpoint["method"] != method:
        raise InputError(f"{path}: a checkpoint of {checkpoint['method']}, not of {method}")
    return checkpoint
