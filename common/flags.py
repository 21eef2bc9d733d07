"""The command line: shared flags, one flag for each Recipe field, settings from a checkpoint."""

import argparse
import inspect
import itertools
import math
import os
import re
import types
import typing
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from shutil import which

import torch

from common import InputError, warn
from common.datasets import DEFAULTS

# With the recipe, what a resumed run cannot change.
_FIXED = ("dataset", "labeled", "labeled_list", "split_seed", "seed", "supervised", "weights")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise InputError(f"{message} (see --help)")


def parse_args(method: str, doc: str, recipes: dict, preset: Callable | None = None, argv=None):
    """(recipe, args) of a command line: a preset or a checkpoint's settings, then the flags given.

    preset(dataset, **flags given, of those it takes) is the recipe that they change, without it
    recipes[dataset].
    args.checkpoint is what --resume, --evaluate or --predict read, or None; args.method is method.
    """
    parser = _parser(method, doc, recipes)
    defaults = vars(parser.parse_args([]))
    blank = argparse.Namespace(**dict.fromkeys(defaults))
    given = {k: v for k, v in vars(parser.parse_args(argv, blank)).items() if v is not None}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    dataset = given.get("dataset", defaults["dataset"])
    defaults.update(DEFAULTS[dataset], method=method, checkpoint=None)
    usual, picks = recipes[dataset], {}
    if preset is not None:
        picks = {k: given[k] for k in inspect.signature(preset).parameters if k in given}
        picks.pop("dataset", None)
        usual = preset(dataset, **picks)
    recipe, args = _override(usual, defaults, given)
    # The folder's name tells what picked the preset, not what came with it.
    usual = replace(usual, **{name: getattr(recipes[dataset], name) for name in picks})
    folder = args.output_dir or default_folder(recipe, args, usual)
    named = (args.evaluate, args.predict and args.predict[0], args.resume)
    source = next((name for name in named if name is not None), None)
    if source == "auto":
        source = _newest([Path(folder)] if args.output_dir else numbered(folder))
    if source is not None:
        checkpoint = read_checkpoint(Path(source), method)
        stored = checkpoint["args"]
        if given.get("dataset", stored["dataset"]) != stored["dataset"]:
            stored = {**stored, "data_dir": None}
        defaults.update(stored, checkpoint=checkpoint)
        recipe, args = _continue(type(recipe), defaults, given)
        folder = args.output_dir or str(Path(source).parent)
    args.output_dir_given, args.source = args.output_dir is not None, source
    args.output_dir = folder
    _complete(args)
    return recipe, args


def _complete(args: argparse.Namespace) -> None:
    """Fill in what depends on another setting, on the machine or on torchrun."""
    if args.full_resolution and args.evaluate is None:
        raise InputError("--full-resolution: goes with --evaluate")
    args.split_seed = args.seed if args.split_seed is None else args.split_seed
    args.device = _device(args.device)
    # torchrun's; one process without it.
    args.rank, args.processes = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1))
    )
    cuda = args.device.type == "cuda"
    args.precision = args.precision or ("bf16" if cuda else "fp32")
    if args.compile is None:
        # Triton builds its launchers with it.
        args.compile = cuda and bool(os.environ.get("CC") or which("gcc") or which("clang"))
        if cuda and not args.compile:
            warn("no C compiler is here, so that networks are not compiled, which is slower")
    if args.workers is None:
        args.workers = 0 if args.dataset == "streets" else min(8, os.cpu_count() or 1)


def _parser(method: str, doc: str, recipes: dict) -> argparse.ArgumentParser:
    description = doc.strip().split("\n\n")[0]
    parser = _Parser(prog=f"{method}.py", description=description, allow_abbrev=False)
    add, natural, positive = parser.add_argument, _number(0, int), _number(1, int)
    seed = _number(0, int, 2**32 - 1)  # what numpy takes
    add("--dataset", choices=list(recipes), default="streets", help="default: streets")
    add("--data-dir", help="default: data/<dataset>")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--labeled", help="how many labeled images: a count, or a fraction as 0.125 or 1/8")
    either("--labeled-list", metavar="FILE", help="names of the labeled images, one a line")
    add("--split-seed", type=seed, metavar="N", help="of the labeled subset; default: --seed")
    add("--supervised", action="store_true", help="the baseline: the same, no unlabeled data")
    add("--weights", help="imagenet, none or a file")
    add("--seed", type=seed, default=0, metavar="N", help="of weights, batches and masks")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 on CUDA, fp32 on CPU")
    add("--compile", action=argparse.BooleanOptionalAction, help="default: on CUDA")
    add("--accumulate", type=positive, default=1, metavar="N", help="process a batch in N shares")
    add("--workers", type=natural, metavar="N", help="loader processes")
    add("--output-dir", help="default: runs/<method>_<dataset>_<labeled>_s<seed>...")
    command = parser.add_mutually_exclusive_group().add_argument
    command("--resume", metavar="CKPT|auto", help="go on from a last.pt; auto: the newest, if any")
    add("--eval-every", type=positive, metavar="STEPS", help="default: an eighth of the run")
    add("--save-every", type=positive, metavar="STEPS", help="default: a fortieth of the run")
    add("--tensorboard", action="store_true", help="write TensorBoard's event files too")
    command("--evaluate", metavar="CKPT", help="print the IoU of both networks, do not train")
    add("--full-resolution", action="store_true", help="score at the labels' own size")
    add("--evaluate-split", choices=("val", "test"), help="default: test where there is one")
    command("--predict", nargs="+", metavar=("CKPT", "IMAGE"), help="label pictures, do not train")
    add("--out", default="predictions", help="folder of the labeled pictures")
    _add_recipe_flags(parser.add_argument_group("recipe").add_argument, recipes)
    return parser


def _add_recipe_flags(add: Callable, recipes: dict) -> None:
    """A flag for each field; the comment behind it and the presets are its help."""
    recipe_class = type(next(iter(recipes.values())))
    comments = re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", inspect.getsource(recipe_class), re.M)
    for field in fields(recipe_class):
        values = {name: getattr(recipe, field.name) for name, recipe in recipes.items()}
        presets = "; ".join(
            f"{', '.join(name for name in values if values[name] == value)}: {value}"
            for value in dict.fromkeys(values.values())
        )
        presets = presets if len(set(values.values())) > 1 else f"default: {values['streets']}"
        text = f"{dict(comments).get(field.name, '')} [{presets}]".replace("%", "%%")
        options = _options(field.name, field.type, values.values())
        flag = "--" + field.name.replace("_", "-")
        add(flag, help=text, default=argparse.SUPPRESS, **options)


def _options(name: str, kind, presets: Iterable) -> dict:
    """add_argument's options for a field of that type.

    Numbers are not negative, shares not above 1; counts and ranges are 0 only where a preset is.
    """
    options = {}
    if isinstance(kind, types.UnionType):  # with None
        kind = typing.get_args(kind)[0]
    if is_range := typing.get_origin(kind) is tuple:
        kind, *rest = typing.get_args(kind)
        options = {"nargs": "+" if rest == [...] else 1 + len(rest)}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(kind) is typing.Literal:
        return {"choices": typing.get_args(kind)}
    zero = any(0 in (preset if isinstance(preset, tuple) else (preset,)) for preset in presets)
    zero = zero or name in ("warmup", "rotation", "operations")
    smallest = 0 if zero or (kind is float and not is_range) else {int: 1, float: 0.01}[kind]
    smallest = {"size": 16, "crop": 16, "ict_alpha": 0.01, "temperature": 0.01}.get(name, smallest)
    share = name.endswith(("probability", "decay", "threshold", "momentum", "p_range"))
    smallest = 0 if share else smallest
    return {**options, "type": _number(smallest, kind, 1.0 if share else math.inf)}


def _number(smallest: float, kind: type, largest: float = math.inf) -> Callable[[str], float]:
    def number(text: str):
        if not smallest <= kind(text) <= largest or kind(text) == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {smallest} to {largest}")
        return kind(text)

    return number


def _override(recipe, defaults: dict, given: dict):
    """The recipe and the other settings, overridden by the flags given."""
    changes = {name: value for name, value in given.items() if hasattr(recipe, name)}
    others = {name: value for name, value in given.items() if name not in changes}
    if changes.get("size") and recipe.size is None and "crop" not in changes:
        # Images that are resized as a whole are not cropped as those of many sizes are.
        off = {"crop": None, "scale_range": (1.0, 1.0), "scales": (1.0,)}
        changes = {**{k: v for k, v in off.items() if hasattr(recipe, k)}, **changes}
    for name, value in changes.items():
        ordered = isinstance(value, tuple) and isinstance(value[0], float) and name != "scales"
        if ordered and value[0] > value[-1]:
            raise InputError(f"--{name.replace('_', '-')}: {value[0]} is above {value[-1]}")
    return replace(recipe, **changes), argparse.Namespace(**{**defaults, **others})


def _continue(recipe_class: type, settings: dict, given: dict):
    """As _override, from a checkpoint's settings; InputError for what --resume cannot change."""
    try:
        recipe = recipe_class(**settings["checkpoint"]["recipe"])
    except TypeError as error:
        raise InputError(f"checkpoint of another version of this file: {error}") from error
    if "resume" not in given:  # bf16 on a CPU is of no use
        return _override(recipe, {**settings, "precision": None}, given)
    kept = {**{name: settings[name] for name in _FIXED}, **asdict(recipe)}
    for name, value in kept.items():
        if given.get(name, value) != value:
            raise InputError(
                f"--{name.replace('_', '-')}: the run to resume has {value}, not {given[name]}; "
                "leave the flag out, or start a new run"
            )
    return _override(recipe, settings, given)


def _device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.zeros(1, device=name).tolist()  # "meta" has no values
        device = torch.device(name)
        if device.type == "cuda":  # what names no device uses this one too
            torch.cuda.set_device(device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not here ({str(error).splitlines()[0]})") from error


def default_folder(recipe, args: argparse.Namespace, usual) -> str:
    """runs/<method>_<dataset>_<labeled>_s<seed> and what differs from the usual recipe."""
    labeled = Path(args.labeled_list).stem if args.labeled_list else args.labeled.replace("/", "-")
    parts = [args.method, args.dataset, labeled, f"s{args.seed}"]
    parts += [] if args.split_seed in (None, args.seed) else [f"split{args.split_seed}"]
    default = DEFAULTS[args.dataset]["weights"]
    parts += [] if args.weights == default else [f"weights-{Path(args.weights).stem}"]
    parts += ["supervised"] * args.supervised
    for name, value in asdict(recipe).items():
        if value != getattr(usual, name):
            text = "x".join(map(str, value)) if isinstance(value, tuple) else value
            parts.append(f"{name.replace('_', '-')}-{text}")
    name = "_".join(parts)
    if len(name) > 200:  # file systems end at 255
        name = f"{name[:190]}_{zlib.crc32(name.encode()):08x}"
    return str(Path("runs") / name)


def numbered(folder: str) -> Iterator[Path]:
    """FOLDER, FOLDER-2, FOLDER-3, ..."""
    yield Path(folder)
    yield from (Path(f"{folder}-{k}") for k in itertools.count(2))


def _newest(folders: Iterable[Path]) -> Path | None:
    """The last.pt of the last of the folders that has one; ends at the first that is not there."""
    there = itertools.takewhile(Path.exists, folders)
    found = [folder / "last.pt" for folder in there if (folder / "last.pt").exists()]
    return found[-1] if found else None


def read_checkpoint(path: Path, method: str) -> dict:
    """A last.pt of this method, on the CPU; InputError for anything else."""
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
