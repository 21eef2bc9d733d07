"""Training gives the numbers that the published programs gave (tests/data/parity/README.md).

    python tests/test_parity.py

A replay calls the train function of a method, in float64, with the recorded batches, initial
weights and random choices. It compares everything else that the recording holds. The command prints
the largest differences, relative to the largest value of the recorded tensor.
"""

import sys
import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import c3semiseg
import classmix
import cowmix
from common.datasets import Data
from common.evaluation import class_iou, confusion_matrix
from common.flags import parse_args

TINY = "--device cpu --precision fp32 --layers 1 1 1 1 --width 2 --output-dir none"
CLASSMIX = "--dataset cityscapes --batch-size 3 --aspp-rates 6 12 --iterations"
COWMIX = "--dataset camvid --batch-size 2 --iterations 8 --consistency-weight 5"
UNET = f"{COWMIX} --lr 1e-3 --weights none --perturbation"
DEEPLAB = f"{COWMIX} --lr 3e-5 --head-factor 10 --aspp-rates 6 12 --network deeplab --perturbation"
C3 = """--dataset streets --weights imagenet --batch-size 4 --group-size 4 --iterations 16
--warmup 4 --aspp-rates 1 2 --embedding 16 --lr 1e-3 --backbone-factor 0.1 --ema-warm-start
--keep 0.8 --consistency-weight 50 --consistency-ramp 6 --contrast-weight 0.15 --contrast-ramp 5
--no-contrast-road --per-class 6 --temperature 0.15 --teacher-view weak --student-view weak"""
RUNS = {  # method and run -> flags
    "classmix default": f"{CLASSMIX} 8",
    "classmix pixel": f"{CLASSMIX} 2 --weighting pixel",
    "classmix ramp": f"{CLASSMIX} 2 --weighting ramp",
    "classmix constant": f"{CLASSMIX} 2 --weighting constant",
    "classmix squared-error": f"{CLASSMIX} 2 --unlabeled-loss squared-error",
    "classmix cut": f"{CLASSMIX} 2 --mask cut",
    "classmix cow": f"{CLASSMIX} 2 --mask cow",
    "classmix supervised": f"{CLASSMIX} 2 --supervised",
    "cowmix cutmix": f"{UNET} cutmix",
    "cowmix cutout": f"{UNET} cutout",
    "cowmix ict": f"{UNET} ict",
    "cowmix aug": f"{UNET} aug",
    "cowmix aug-shift": f"{UNET} aug",
    "cowmix cutmix-deeplab": f"{DEEPLAB} cutmix",
    "c3semiseg": C3,
}
COLUMNS = {  # of the table, and how the names of their quantities begin
    **{"loss": ("loss", "total"), "weight": ("lambda", "confident"), "lr": "lr"},
    **{"gradient": "grad", "label": ("pseudo", "label", "sampled"), "mask": ("mask", "valid")},
    **{"image": ("image", "mixed"), "threshold": "threshold"},
    **{"student": "student", "teacher": "teacher", "IoU": "iou"},
}


@contextmanager
def float64() -> Iterator[pytest.MonkeyPatch]:
    """Computes in float64 where the methods use float32; then undoes all changes of the patch."""
    kept = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield patch
        finally:
            torch.set_default_dtype(kept)


def spy(patch: pytest.MonkeyPatch, owner, name: str, note) -> None:
    """Makes a function call note(arguments, result) each time that it is called."""
    function = getattr(owner, name)

    def call(*args, **options):
        result = function(*args, **options)
        note(args, result)
        return result

    patch.setattr(owner, name, call)


@cache
def read(file: str) -> dict[str, np.ndarray]:
    """Returns the arrays of a recording."""
    return dict(np.load(Path(__file__).with_name("data") / "parity" / file))


def part(arrays: dict, prefix: str) -> dict:
    """Returns the arrays whose names begin with the prefix, which is cut off."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


class Replay:
    """A session that gives train the recorded batches and keeps what train shows it.

    recorded: the run's arrays, without those that train gets; each has a row for each value seen.
    """

    micro_batches = range(1)

    def __init__(self, arrays: dict[str, np.ndarray], run: str):
        self.arrays, self.seen = arrays, defaultdict(list)
        own = part(arrays, f"{run}/" if run else "").items()
        self.recorded = {k: v for k, v in own if not k.startswith(("images", "labels", "init"))}
        for name, array in self.recorded.items():
            if name == "image_mix" or name.startswith(("student", "teacher", "iou")):
                self.recorded[name] = array[None]  # seen once
            elif name == "lr" and array.ndim == 1:  # the same in all steps
                self.recorded[name] = np.tile(array, (8, 2 // len(array)))
            elif name.startswith("sampled"):  # the order of the pixels of a class does not count
                self.recorded[name] = np.sort(array)
        height, width = (41, 57) if run == "cutmix-deeplab" else arrays["images"].shape[2:]
        self.images = torch.from_numpy(arrays["images"])[..., :height, :width] / 255
        self.labels = torch.from_numpy(arrays["labels"])[..., :height, :width].long()
        init = "init-deeplab/" if run == "cutmix-deeplab" else "init-unet/"
        self.init = part(arrays, "init/" if "init/mean" in arrays else init)

    def take(self, name: str) -> torch.Tensor:
        """Takes an array out of recorded; train gets it. Masks are unpacked."""
        array = self.recorded.pop(name)
        if name in ("mask", "box"):
            array = np.unpackbits(array, axis=-1, count=self.images.shape[-1]).astype(bool)
        return torch.from_numpy(array.astype(np.int64) if array.dtype.kind == "u" else array)

    def see(self, name: str, value) -> None:
        """Keeps a copy of a value for the comparison. Two quantities are recorded once only."""
        if name in self.recorded and not (self.seen[name] and name in ("label_mix", "image_mix")):
            self.seen[name].append(torch.as_tensor(value).detach().clone())

    def load_weights(self, network, source) -> None:
        """Loads the recorded initial weights."""
        state = {name: torch.from_numpy(array) for name, array in self.init.items()}
        network.load_state_dict(state, strict=False)

    # What train calls:

    def __call__(self, recipe, args, data, split, state, **_):
        """Takes the place of the class Session."""
        self.recipe, self.state = recipe, state
        state["optimizer"].register_step_pre_hook(lambda *_: self.before_step())
        # Training changes these tensors in place, and c3semiseg.py drops the projection heads last.
        kept = {"keep_vars": True}  # their memory may still move
        self.networks = {k: state[k].state_dict(**kept) for k in ("student", "teacher")}
        return self

    def restore(self) -> int:
        """Returns the first iteration."""
        return 0

    def batches(self, indices, transform, *, stream: int, start: int):
        """Yields images with their labels, or unlabeled images, which have no padding."""
        names = ("index_l", "index_u" if "index_u" in self.recorded else "index_a", "index_b")
        for index in self.take(names[stream]):
            image = self.images[index]
            yield image, self.labels[index] if stream == 0 else torch.zeros_like(image[:, 0])

    def log(self, values: dict) -> None:
        """Sees losses, lambda and the share of confident pixels."""
        for name, value in values.items():
            self.see(name, value)

    def before_step(self) -> None:
        """Sees what the optimizer is about to use."""
        gradients = [p.grad for p in self.state["student"].parameters() if p.grad is not None]
        self.see("grad_norm", torch.cat([g.flatten() for g in gradients]).norm())
        self.see("lr", self.rates())

    def rates(self) -> list[float]:
        """Returns the learning rates; C3's are recorded as classifiers, backbone, projection."""
        backbone, heads = (group["lr"] for group in self.state["optimizer"].param_groups)
        return [heads, backbone, heads] if "regions" in self.state else [backbone, heads]

    def end_step(self, iteration: int, pictures: dict) -> None:
        """Sees the details of the loss, the next rates, and the networks."""
        self.see("lr_published", self.rates())
        for name in {"mask", "mask_b"} & pictures.keys():
            self.see("mask", np.packbits(pictures[name], axis=-1))
        if seen := {"mixed_image", "seen"} & pictures.keys():
            image, label = pictures[seen.pop()], pictures["pseudo_label"]
            checksum = zlib.crc32(image.mul(255).round().byte().contiguous().numpy())
            self.see("image_mix_crc32", checksum)
            self.see("mixed_crc32", checksum)
            self.see("image_mix", image[..., ::8, ::8])
            if "valid" in self.recorded:
                label = label.masked_fill(~self.valid, 255)
            self.see("pseudo_label", label)
            if "regions" in self.state:
                self.see("thresholds", self.state["regions"].thresholds)
        last = self.recipe.iterations - 1
        for step, suffix in ((0, "_step1"), (4, "_semi1"), (last, "_few"), (last, "")):
            for name, network in self.networks.items() if step == iteration else ():
                for key, tensor in network.items():
                    self.see(f"{name}{suffix}/{key}", tensor)
                self.see(name + suffix, torch.cat([network[key].flatten() for key in self.init]))
        if iteration == last and "iou" in self.recorded:
            image, label = (torch.from_numpy(self.arrays[f"val_{k}"]) for k in ("images", "labels"))
            prediction = self.state["student"].eval()(image / 255).argmax(1)
            self.see("iou", class_iou(confusion_matrix(prediction, label.long(), 19)))


def choose_classmix(session: Replay, patch) -> dict:
    """Functions of classmix.py that choose as recorded. Also sees the mixed labels."""
    spy(patch, classmix, "consistency", lambda args, _: session.see("label_mix", args[1]))
    if "scores" in session.recorded:
        scores, draw = iter(session.take("scores").double()), classmix.class_mask
        return {"class_mask": lambda label, k, **_: draw(label, k, scores=next(scores))}
    masks = iter(session.take("mask") if "mask" in session.recorded else ())  # not in supervised
    return dict.fromkeys(("cut_mask", "cow_mask"), lambda *_, **options: next(masks))


def choose_cowmix(session: Replay, patch) -> dict:
    """Functions of cowmix.py that choose as recorded. Also sees which pixels count."""

    def note(args, _) -> None:
        session.valid = args[3]
        session.see("valid", np.packbits(session.valid, axis=-1))

    spy(patch, cowmix, "consistency_loss", note)
    if "blend" in session.recorded:
        blends = iter(session.take("blend").numpy())
        generator = SimpleNamespace(beta=lambda *_: next(blends))
        return {"np": SimpleNamespace(random=SimpleNamespace(default_rng=lambda _: generator))}
    if "mask" in session.recorded:
        masks = iter(session.take("mask"))
        return {"box_mask": lambda *_, **options: next(masks)}
    a, b = session.take("matrix_a"), session.take("matrix_b")
    labeled = torch.eye(3).expand_as(a)  # the published program does not warp labeled images
    matrices = iter(torch.stack([labeled, a, b], 1).flatten(0, 1))
    return {"draw_aug": lambda *_: (next(matrices), lambda image: image)}


def choose_c3semiseg(session: Replay, patch) -> dict:
    """Functions of c3semiseg.py that choose as recorded. Also sees the total and the pixels."""

    def note(_, result) -> None:
        index, label = (values.view(-1, 19, 6) for values in result)
        suffix = "_warmup" if len(index) == 4 else ""
        session.see(f"sampled{suffix}", index.sort().values)
        session.see(f"sampled_label{suffix}", label)

    sample = c3semiseg.sample_pixels

    def sample_first(label, *rest, **options):
        score = torch.linspace(1, 0, label[0].numel()).expand(len(label), -1)
        return sample(label, *rest, **options, score=score)

    patch.setattr(c3semiseg, "sample_pixels", sample_first)
    spy(patch, c3semiseg, "sample_pixels", note)
    spy(patch, torch.Tensor, "backward", lambda args, _: session.see("total", args[0]))
    pairs = zip(session.take("order"), session.take("box"), strict=True)
    return {"draw_pairs": lambda *_: next(pairs)}


METHODS = {  # the method, its choices, the recording, the number of classes
    "classmix": (classmix, choose_classmix, "classmix.npz", 19),
    "cowmix": (cowmix, choose_cowmix, "cutmix.npz", 5),
    "c3semiseg": (c3semiseg, choose_c3semiseg, "c3semiseg.npz", 19),
}


def replay(name: str) -> Iterator[tuple]:
    """Trains as in a recorded run; yields names of quantities, our values and the recorded ones."""
    method, _, run = name.partition(" ")
    module, choose, file, classes = METHODS[method]
    data = Data(train=[], val=[], class_names=("",) * classes, palette=())
    with float64() as patch:
        session = Replay(read(file), run)
        for function, choice in choose(session, patch).items():
            patch.setattr(module, function, choice)
        patch.setattr(module, "open_dataset", lambda *_, **options: data)
        patch.setattr(module, "select", lambda *_, **options: ([], []))
        patch.setattr(module, "load_weights", session.load_weights)
        patch.setattr("builtins.print", lambda *_: None)
        preset, flags = getattr(module, "preset", None), f"{TINY} {RUNS[name]}".split()
        recipe, args = parse_args(method, module.__doc__, module.RECIPES, preset, flags)
        module.train(recipe, args, make_session=session)
    for quantity, rows in session.recorded.items():
        for ours, recorded in zip(session.seen[quantity], rows, strict=True):
            yield quantity, ours, recorded


def difference(ours, recorded) -> float:
    """Returns the largest difference, relative to the largest recorded value. NaN equals NaN."""
    a, b = (torch.as_tensor(x, dtype=torch.float64).nan_to_num(-1) for x in (ours, recorded))
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("error:Detected call of .lr_scheduler")  # too early
def test_training_gives_recorded_numbers(name):
    wrong = {}
    for quantity, ours, recorded in replay(name):
        exact = recorded.dtype.kind == "u" or quantity == "iou"
        if not difference(ours, recorded) <= (0 if exact else 1e-9):
            wrong.setdefault(quantity, difference(ours, recorded))
    assert not wrong


def test_alignment_of_two_views():
    arrays, grids = part(read("cutmix.npz"), "alignment/"), []
    with float64() as patch:
        spy(patch, cowmix, "warp_grid", lambda _, grid: grids.append(grid))
        views = {name: torch.from_numpy(arrays[name]) for name in ("matrix_a", "matrix_b")}
        same, image = torch.nn.Identity(), torch.zeros(8, 3, 48, 64)
        views |= {"color": same, "fill": image[0], "valid": image[:, 0] == 0, "threshold": 0.9}
        cowmix.aug_loss(same, same, image, **views)
        offset = grids[-1][:, ::8, ::8] * torch.tensor([32, 24])  # of the teacher's predictions
    assert difference(offset, arrays["offset"]) < 1e-9


def table() -> Iterator[str]:
    """Yields lines: the largest difference of each quantity in each run, "-" if not recorded."""
    yield " " * 23 + "".join(f"{column:>{max(7, len(column) + 2)}}" for column in COLUMNS)
    for name in RUNS:
        worst = {}
        for quantity, ours, recorded in replay(name):
            column = next(k for k, starts in COLUMNS.items() if quantity.startswith(starts))
            worst[column] = max(worst.get(column, 0), difference(ours, recorded))
        cells = {k: f"{worst[k]:.0e}" if worst.get(k) else "-0"[k in worst] for k in COLUMNS}
        yield f"{name:<23}" + "".join(f"{v:>{max(7, len(k) + 2)}}" for k, v in cells.items())


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(*table(), sep="\n")
