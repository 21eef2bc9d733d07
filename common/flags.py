"""The command line: each field of Settings and of a method's Recipe is a flag."""

import argparse
import inspect
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import torch

from common import InputError, warn
from common.datasets import DEFAULTS
from common.deeplab import load_file, unsound
from common.layouts import FILES

# The type of a field says which numbers its flag accepts.
Count = Annotated[int, 1, math.inf]
Seed = Annotated[int, 0, 2**32 - 1]
Share = Annotated[float, 0.0, 1.0]
Positive = Annotated[float, 1e-9, math.inf]
RANGES = (tuple[float, float], tuple[Positive, Positive], tuple[Share, Share])
KEYS = """method recipe args state means headline class_names palette labeled_names iteration logged
training_names seconds miou"""  # of a checkpoint
# The first field of each group of flags. ALONE flags of a group exclude each other.
GROUPS = {"dataset": "data", "weights": "run", "resume": "use a checkpoint"}
ALONE = ("labeled", "labeled_list", "resume", "evaluate", "predict")
COMMANDS = """
  {0} --dataset folder --data-dir my_images --preset small    train
  {0} --evaluate runs/RUN/last.pt                             score its networks
  {0} --predict runs/RUN/last.pt photo.jpg                    label pictures
  {0} --resume runs/RUN/last.pt                               go on with a run"""
# A resumed run keeps these, and its recipe.
FIXED = ("dataset", "preset", "labeled", "labeled_list", "split_seed")
FIXED += ("seed", "supervised", "weights")


@dataclass
class Settings:  # the flags that all methods share; the comments are their help texts
    dataset: str = "streets"  # data set
    preset: Literal["paper", "small"] = "paper"  # recipe: the paper's, or for small hardware
    data_dir: str | None = None  # folder of the data set (default: data/<dataset>; streets: none)
    labeled: str | None = None  # number of labeled images, or their share, such as 0.125 or 1/8
    labeled_list: str | None = None  # file that names the labeled images, one a line
    split_seed: Seed | None = None  # seed that chooses the labeled images (default: --seed)
    supervised: bool = False  # train the baseline, without unlabeled images
    weights: str | None = None  # initial weights: imagenet, none or a file
    seed: Seed = 0  # seed of weights, batches and masks
    device: str | None = None  # torch device (default: cuda if available, else cpu)
    precision: Literal["bf16", "fp32"] | None = None  # number format (default: bf16 on CUDA)
    compile: bool | None = None  # compile the networks (default: on CUDA, for 5000 steps and more)
    accumulate: Count = 1  # split the batch of each rank into N micro-batches
    workers: int | None = None  # number of loader processes
    output_dir: str | None = None  # folder of the run (default: runs/<method>_<dataset>_...)
    eval_every: Count | None = None  # evaluate every N steps (default: 8 times in all)
    save_every: Count | None = None  # save every N steps (default: every 5 minutes)
    tensorboard: bool = False  # also write TensorBoard's files (pip install tensorboard)
    resume: str | None = None  # last.pt to continue; auto: the one in the run's folder, if any
    evaluate: str | None = None  # print the IoU of the networks in this last.pt, and end
    predict: tuple[str, ...] | None = None  # label pictures: a last.pt, then pictures or folders
    full_resolution: bool = False  # with --evaluate: keep the labels at their own size
    evaluate_split: Literal["val", "test"] | None = None  # images to score (default: test if any)
    eval_crop: tuple[Count, Count] | None = None  # evaluate and predict in windows of this size
    keep_aspect: bool = False  # with --predict: do not stretch pictures to the training's size
    out: str = "predictions"  # folder for the results of --predict


def parse_args(method: str, doc: str, recipes: dict, preset=None, argv=None):
    """Returns recipe and settings. preset(name, given flags) may replace recipes[name]."""
    parser = _parser(method, doc, recipes)
    flags = vars(parser.parse_args(argv))
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in flags.items() if v is not None}
    dataset = given.get("dataset", "streets")
    preset = preset or (lambda name, _: recipes[name])
    recipe = preset(_recipe_name(given), given)
    values = {**vars(Settings()), **DEFAULTS[dataset], **vars(recipe), "checkpoint": None}
    values["weights"] = "none" if given.get("preset") == "small" else values["weights"]
    defaults = values | vars(recipes[_recipe_name(given)])
    folder = Path(given.get("output_dir") or _folder(method, defaults, vars(recipe), given))
    path = given.get("resume", given.get("evaluate", given.get("predict", [None])[0]))
    if path == "auto" and "resume" in given:
        path = folder / "last.pt" if (folder / "last.pt").exists() else None
    if path is not None:
        values = _stored(read_checkpoint(Path(path), method), parser, preset, values, given)
        folder = Path(given.get("output_dir", Path(path).parent))
    last = folder / "last.pt"
    if last.exists() and (path is None or ("resume" in given and not last.samefile(path))):
        raise InputError(f"{last} exists: --resume auto continues it, --output-dir starts another")
    if "size" in given and "crop" not in given:
        least = values["crop"] if values["size"] else (math.inf, math.inf)
        if least and any(n < k for n, k in zip(given["size"], least, strict=True)):
            given = {"crop": None, "scale_range": (1.0, 1.0), "scales": (1.0,), **given}  # no crop
    values |= {name: given[name] for name in values if name in given} | {"output_dir": folder}
    usual = vars(recipes[_recipe_name(values)])
    recipe = replace(recipe, **{name: values.pop(name) for name in vars(recipe)})
    for field in fields(recipe):
        if field.type in RANGES and (pair := getattr(recipe, field.name))[0] > pair[1]:
            raise InputError(f"--{field.name.replace('_', '-')}: {pair[0]} is above {pair[1]}")
    changed = [name for name, value in vars(recipe).items() if value != usual[name]]
    args = argparse.Namespace(**values, method=method, changed=changed)
    return recipe, _complete(args, recipe.iterations)


def _stored(checkpoint: dict, parser, preset: Callable, values: dict, given: dict) -> dict:
    """Returns the values with those of a checkpoint. A resumed run keeps its recipe."""
    path = checkpoint["path"]
    stored = {"preset": "paper", **checkpoint["args"], **checkpoint["recipe"]}
    if {*FIXED} - {*stored} or {*checkpoint["recipe"]} - {*values} or checkpoint["iteration"] < 0:
        raise InputError(f"{path}: damaged, or a checkpoint of another version of this file")
    parser.prog += f": {path}"  # the stored values pass through their flags, which refuse bad ones
    for name, value in stored.items():
        words = value if isinstance(value, tuple) else (value,)
        flag = f"--{'no-' * (value is False)}{name.replace('_', '-')}"
        if value is not None and name in values:
            parser.parse_args([flag, *(str(word) for word in words if not isinstance(word, bool))])
    recipe = vars(preset(_recipe_name(stored), stored))
    if missing := [f"--{n.replace('_', '-')} {recipe[n]}" for n in recipe if n not in stored]:
        warn(f"{path}: an older version, which lacks flags; used for them: {', '.join(missing)}")
    values = {**values, **recipe, **stored, "checkpoint": checkpoint}
    dataset = given.get("dataset", values["dataset"])
    if dataset != values["dataset"] or dataset == "streets":  # which has no folder
        values["data_dir"] = None
    if "resume" not in given:
        return {**values, "precision": None}  # the stored one may not suit this machine
    for name in (*FIXED, *recipe):
        if given.get(name, values[name]) != values[name]:
            flag, hint = name.replace("_", "-"), f"a new run can begin with --weights {path}"
            raise InputError(f"--{flag}: this run was started with {values[name]}; {hint}")
    return values


def _recipe_name(given: dict) -> str:
    """Returns the key of the recipe: a data set, or "small"; that of streets is small anyway."""
    dataset = given.get("dataset", "streets")
    return "small" if given.get("preset") == "small" and dataset != "streets" else dataset


def _complete(args: argparse.Namespace, iterations: int) -> argparse.Namespace:
    """Fills in what depends on another setting, on the machine or on torchrun."""
    args.split_seed = args.seed if args.split_seed is None else args.split_seed
    args.rank, args.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    try:
        args.device = torch.device(name)
        torch.zeros(1, device=name).tolist()  # the device "meta" has no values
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if cuda := args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    if args.precision is None:
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bf16" if bf16 else "fp32"
    if args.compile is None:  # Triton needs compute capability 7.0 and a C compiler
        compilers = map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))
        args.compile = cuda and iterations >= 5000 and any(compilers)
        args.compile = args.compile and torch.cuda.get_device_capability() >= (7, 0)
    if args.workers is None:
        args.workers = 0 if args.dataset == "streets" else min(8, os.cpu_count() or 1)
    return args


def commit() -> str | None:
    """Returns the commit of this repository, or None outside git."""
    git, here = "git describe --always --dirty --abbrev=40", Path(__file__).parent
    found = subprocess.run(git, shell=True, capture_output=True, text=True, cwd=here).stdout
    return found.strip() or None


def _parser(method: str, doc: str, recipes: dict) -> argparse.ArgumentParser:
    """Returns a parser whose flags are None unless they are given."""
    about = {"description": doc.split("\n\n")[0] + "\n" + COMMANDS.format(f"python {method}.py")}
    about |= {"usage": argparse.SUPPRESS, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(f"{method}.py", **about, allow_abbrev=False)
    versions = f"commit {commit()}, torch {torch.__version__}"
    parser.add_argument("--version", action="version", version=versions)
    places = "\n\n".join(f"{name}: {inspect.getdoc(find)}" for name, find in FILES.items())
    shown = {"version": places, "help": "show where the files of each data set belong"}
    parser.add_argument("--list-datasets", action="version", **shown)
    for presets in ({"": Settings()}, recipes):
        if presets is recipes:
            group = parser.add_argument_group(
                "recipe",
                "(4.1): section of the paper; (code): of the published program; (ours): ours",
            )
        recipe_class = type(next(iter(presets.values())))
        comments = dict(re.findall(r"(\w+):.*  # (.*)", inspect.getsource(recipe_class)))
        for field in fields(recipe_class):
            if field.name in GROUPS:
                group = parser.add_argument_group(GROUPS[field.name])
                alone = group.add_mutually_exclusive_group()
            names = {}  # value -> presets
            for name, preset in presets.items():
                names.setdefault(getattr(preset, field.name), []).append(name)
            (usual, _), *others = sorted(names.items(), key=lambda item: -len(item[1]))
            shown = [
                f"{'usual' if others else 'default'}: {usual}",
                *(f"{', '.join(names)}: {k}" for k, names in others),
            ]
            text = f"{comments[field.name]} [{'; '.join(shown)}]".removesuffix(" [default: None]")
            datasets = Literal[tuple(name for name in recipes if name != "small")]
            kind = datasets if field.name == "dataset" else field.type
            options = {"help": text.replace("%", "%%"), **_options(kind)}
            where = alone if field.name in ALONE else group
            where.add_argument("--" + field.name.replace("_", "-"), **options)
    return parser


def _options(kind) -> dict:
    """Returns the options of add_argument for a field of this type."""
    parts = get_args(kind)
    if type(None) in parts:  # X | None
        return _options(parts[0])
    if kind in (str, bool):
        return {"action": argparse.BooleanOptionalAction} if kind is bool else {}
    if get_origin(kind) is Literal:
        return {"choices": parts}
    if get_origin(kind) is tuple:
        names = {tuple[Count, Count]: ("HEIGHT", "WIDTH"), **dict.fromkeys(RANGES, ("LOW", "HIGH"))}
        options = {**_options(parts[0]), "nargs": "+" if parts[-1] is ... else len(parts)}
        return {**options, "metavar": names[kind]} if kind in names else options
    convert, least, largest = parts or (kind, 0, math.inf)

    def number(text: str) -> float:
        value = convert(text)
        if not least <= value <= largest or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least} to {largest}")
        return value

    return {"type": number, "metavar": "N"}


def _folder(method: str, defaults: dict, recipe: dict, given: dict) -> Path:
    """Returns the folder of a run, whose name tells what differs from the defaults."""
    chosen = {**defaults, **given}
    labeled = Path(chosen["labeled_list"] or chosen["labeled"].replace("/", "-")).name
    parts = [method, chosen["dataset"], labeled, f"s{chosen['seed']}"]
    for name in ("preset", "split_seed", "weights", "supervised", *recipe):
        if chosen[name] != defaults[name]:
            text = Path(str(chosen[name])).name.strip("(,)").replace(", ", "x")
            parts.append(f"{name.replace('_', '-')}-{text}".removesuffix("-True"))
    return Path("runs") / "_".join(parts)[:200]  # file systems allow 255 bytes


def read_checkpoint(path: Path, method: str) -> dict:
    """Reads a last.pt of this method onto the CPU; InputError for anything else."""
    try:
        checkpoint = load_file(path)
    except Exception as error:  # torch.load raises nearly any type on a foreign file
        problem = "not a checkpoint, or a damaged one" if path.is_file() else "no such checkpoint"
        raise InputError(f"{path}: {problem}") from error
    if missing := set(KEYS.split()) - set(checkpoint if isinstance(checkpoint, dict) else ()):
        raise InputError(f"{path}: not a checkpoint of this repository, lacks {min(missing)!r}")
    if checkpoint["method"] != method:
        raise InputError(f"{path}: a checkpoint of {checkpoint['method']}, not of {method}")
    if problem := unsound(checkpoint["state"]):
        raise InputError(f"{path}: damaged, {problem}")
    return {**checkpoint, "path": path}
