"""Small data sets on disk and a way to run a method file's command line in this process."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the networks of the tests are too small to share


def write_pair(image_path: Path, label_path: Path | None, size, num_classes=3, seed=0):
    """An image whose colour tells the class, and its label; size is (height, width)."""
    rng = np.random.default_rng(seed)
    label = np.kron(rng.integers(0, num_classes, (4, 4)), np.ones((size[0] // 4, size[1] // 4)))
    label = label.astype(np.uint8)
    noise = rng.integers(0, 20, (*label.shape, 3))
    image = np.stack([label * 20, 220 - label * 20, label * 9], -1) + noise
    image_path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(image_path)
    if label_path is not None:
        label_path.parent.mkdir(parents=True, exist_ok=True)
        label[0, 0] = 255 if num_classes != 11 else 11
        Image.fromarray(label).save(label_path)


@pytest.fixture
def camvid(tmp_path):
    """CamVid in SegNet's layout: 8 PNG training images, 3 JPEG validation images, 48x64."""
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


@pytest.fixture
def command(monkeypatch, capsys):
    """command("classmix", "--flag", value, ...) -> (exit status, stdout, stderr)."""

    def call(method: str, *argv) -> tuple[int, str, str]:
        module = __import__(method)
        monkeypatch.setattr(sys, "argv", [f"{method}.py", *map(str, argv)])
        status = 0
        try:
            module.main()
        except SystemExit as stop:
            status = stop.code
        out = capsys.readouterr()
        return status, out.out, out.err

    return call
