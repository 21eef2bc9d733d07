"""Small data sets on disk, and ways to run, stop and compare the commands of method files."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / name) for name in (".", "benchmarks", "studies")]
# The networks of the tests, and of the commands that they start, are too small for more threads.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

METHODS = ("classmix", "complexmix", "cowmix", "c3semiseg")
# A tiny run of each method on the camvid fixture in which every part of the loss counts.
TINY = """--dataset camvid --labeled 4 --size 24 32 --weights none --layers 1 1 1 1 --width 4
--batch-size 4 --workers 0 --aspp-rates 1 2 --lr 1e-3"""
OWN = {
    "classmix": "--warmup 2 --confidence-threshold 0.2 --extra-augmentations --flip",
    "complexmix": "--warmup 2 --confidence-threshold 0.21",
    "cowmix": "--confidence-threshold 0.1 --network deeplab --lr-power 0.9",
    "c3semiseg": "--warmup 2 --per-class 3 --consistency-ramp 2 --initial-threshold 0.15",
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny(method: str, camvid: Path) -> tuple[str, ...]:
    """Flags of the tiny run."""
    return (*TINY.split(), *OWN[method].split(), "--data-dir", str(camvid))


def read_log(folder: Path) -> list[dict]:
    """Entries of log.jsonl, without the seconds."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def read_state(folder: Path, name="last.pt") -> dict:
    """What the checkpoint of a run keeps."""
    return torch.load(folder / name, weights_only=True)["state"]


def same_state(a: Path, b: Path) -> None:
    """Asserts that two runs have the same networks, optimizer and schedule, to the bit."""
    torch.testing.assert_close(read_state(a), read_state(b), rtol=0, atol=0)


def stopping_train(method: str, step: int, *numbers: int, rank=0):
    """The method's train; in the middle of a step it sends one rank these signals."""
    from common import run

    class Stopped(run.Session):
        def end_step(self, iteration, pictures):
            for number in numbers if (iteration + 1, self.args.rank) == (step, rank) else ():
                os.kill(os.getpid(), number)
            super().end_step(iteration, pictures)

    return partial(import_module(method).train, make_session=Stopped)


def record(method: str, *argv):
    """Trains in this process; returns the session, with all pictures, losses and batches."""
    from common import run
    from common.flags import parse_args

    class Recorder(run.Session):
        """Writes no files."""

        def restore(self):
            sessions.append(self)
            self.pictures, self.logged, self.indices, self.drawn = [], {}, {}, {}
            return 0

        def log(self, values):
            for name, value in values.items():
                self.logged.setdefault(name, []).append(value.item())

        def batches(self, indices, transform, *, stream, start):
            self.indices[stream], self.drawn[stream] = indices, []
            for batch in super().batches(indices, transform, stream=stream, start=start):
                self.drawn[stream].append(batch)
                yield batch

        def end_step(self, iteration, pictures):
            self.pictures.append(pictures)

    sessions, module, argv = [], import_module(method), list(map(str, argv))
    preset = getattr(module, "preset", None)
    recipe, args = parse_args(method, module.__doc__, module.RECIPES, preset, argv)
    module.train(recipe, args, Recorder)
    return sessions[0]


def start(*argv, ranks=1, options=()) -> subprocess.Popen:
    """Starts a script, or -c CODE, in a process group; by torchrun if there are several ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *((*launcher, *options) if ranks > 1 else ()), *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, start_new_session=True, **pipes)


def children(process: subprocess.Popen) -> list[int]:
    """Process ids of the loader processes or ranks that a process has started."""
    return [*map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())]


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Waits and returns status, stdout and stderr. A process that hangs fails the test."""
    try:
        out, errors = process.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        for number in (*children(process), process.pid):
            os.kill(number, signal.SIGKILL)
        raise
    return process.returncode, out, errors


def problems(errors: str) -> list[str]:
    """Lines on stderr, without the warning that this is not all of CamVid."""
    return [line for line in errors.splitlines() if not line.startswith("warning: --data-dir")]


def write_pair(image_path: Path, label_path: Path | None, size, num_classes=3, seed=0):
    """Writes an image whose colour tells the class, and its label; size is (height, width)."""
    rng = np.random.default_rng(seed)
    label = np.kron(rng.integers(0, num_classes, (4, 4)), np.ones((size[0] // 4, size[1] // 4)))
    label = label.astype(np.uint8)
    noise = rng.integers(0, 20, (*label.shape, 3))
    image = np.stack([label * 20, 220 - label * 20, label * 9], -1) + noise
    image_path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(image_path)
    if label_path is not None:
        label_path.parent.mkdir(parents=True, exist_ok=True)
        label[0, 0] = {11: 11, 34: 0}.get(num_classes, 255)  # void, as the data set has it
        Image.fromarray(label).save(label_path)


def publish(monkeypatch, name: str, **counts: int):
    """Sets the counts that the data set was published with."""
    from common import layouts

    monkeypatch.setitem(layouts.COUNTS, name, counts)


def write_cityscapes(root: Path, train=4, val=2, size=(48, 96), kinds=("labelIds",), parents=True):
    """Official folders, alternating between two cities; parents: below those of the archives."""
    above = [f"{name}_trainvaltest/" * parents for name in ("leftImg8bit", "gtFine")]
    for part, k in [("train", k) for k in range(train)] + [("val", k) for k in range(val)]:
        city = f"{part}{'ba'[k % 2]}"
        name = f"{part}/{city}/{city}_{k:06d}_000019"
        image = root / f"{above[0]}leftImg8bit/{name}_leftImg8bit.png"
        for kind in kinds:
            label = root / f"{above[1]}gtFine/{name}_gtFine_{kind}.png"
            write_pair(image, label, size, 34 if kind == "labelIds" else 19, seed=k)
            Image.new("RGBA", size[::-1]).save(str(label).replace(kind, "color"))
    return root


def write_voc(voc: Path, train=(), val=(), folder="SegmentationClass", size=(40, 60)):
    """Images and palette masks of ids as "2007_000001", by number; ImageSets' val.txt."""
    for k in (*train, *val):
        name = f"2007_{k:06d}"
        image, label = voc / f"JPEGImages/{name}.jpg", voc / folder / f"{name}.png"
        write_pair(image, label, (size[0] + 4 * (k % 3), size[1]), 21, seed=k)
        mask = Image.open(label)
        mask.putpalette(list(range(255, -1, -1)) * 3)
        mask.save(label)
    lists = voc / "ImageSets/Segmentation"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / "val.txt").write_text("".join(f"2007_{k:06d}\n" for k in val))
    return voc


def write_sbd(voc: Path, cls: Path, numbers, size=(40, 60)):
    """SBD's .mat of some images of VOC, whose JPEGs are written where they are not there."""
    cls.mkdir(parents=True)
    for k in numbers:
        name = f"2007_{k:06d}"
        image = voc / f"JPEGImages/{name}.jpg"
        if not image.exists():
            write_pair(image, None, size, seed=k)
        label = np.full(Image.open(image).size[::-1], k % 21, np.uint8)
        savemat(cls / f"{name}.mat", {"GTcls": {"Segmentation": label, "Boundaries": [1]}})


def write_bdd100k(root: Path, train=4, val=2, *, old=False):
    """images/10k and labels/sem_seg/masks, or the old layout."""
    images, labels = ("images", "labels") if old else ("images/10k", "labels/sem_seg/masks")
    for part, k in [("train", k) for k in range(train)] + [("val", k) for k in range(val)]:
        label = root / labels / part / f"{part}-{k}{'_train_id' * old}.png"
        write_pair(root / images / part / f"{part}-{k}.jpg", label, (36, 64), 19, seed=k)
    return root


@pytest.fixture
def camvid(tmp_path, monkeypatch):
    """CamVid in SegNet's layout: 8 PNG training images, 3 JPEG validation images, 48x64."""
    publish(monkeypatch, "camvid", train=8, val=3)
    root = tmp_path / "camvid"
    for part, count, suffix in (("train", 8, "png"), ("val", 3, "jpg")):
        for k in range(count):
            image, label = root / part / f"{k:03d}.{suffix}", root / f"{part}annot" / f"{k:03d}.png"
            write_pair(image, label, (48, 64), 11, seed=k)
    return root


@pytest.fixture
def folder(tmp_path):
    """A user's data: 3 classes, 6 labeled and 4 unlabeled images of different sizes."""
    root = tmp_path / "mine"
    for k in range(10):
        label = root / "labels/train" / f"street {k}.png" if k < 6 else None
        size = (40 + 4 * k, 64)
        write_pair(root / "images/train" / f"street {k}.jpg", label, size, 3, seed=k)
    for k in range(3):
        label = root / "labels/val/sub" / f"{k}.png"
        write_pair(root / "images/val/sub" / f"{k}.png", label, (44, 64), 3, seed=k)
    (root / "classes.txt").write_text("road\ncar\nsky\n")
    return root


@pytest.fixture(autouse=True)
def handlers():
    """Puts the signal handlers back that a command replaces, and stops its alarm."""
    used = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    kept = {number: signal.getsignal(number) for number in used}
    yield
    signal.alarm(0)
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def command(monkeypatch, capsys):
    """command("classmix", "--flag", value, ...) -> (exit status, stdout, stderr)."""

    def call(method: str, *argv) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{method}.py", *map(str, argv)])
        status = 0
        try:
            import_module(method).main()
        except SystemExit as stop:
            status = stop.code
        out = capsys.readouterr()
        return status, out.out, out.err

    return call
