"""The programs in studies/ that look at patches and masks."""

import json
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))

import masks
import patch_distance as study


def patch(image: np.ndarray, y: int, x: int, side: int) -> np.ndarray:
    """The patch around a pixel of a mirrored image, in [0,1]."""
    half = side // 2
    padded = np.pad(image, ((half, half), (half, half), (0, 0)), mode="symmetric")
    return padded[y : y + side, x : x + side] / 255


def scene(seed: int, size=(14, 17)) -> tuple[np.ndarray, np.ndarray]:
    """A random image and label with void pixels."""
    rng = np.random.default_rng(seed)
    label = rng.choice([0, 1, 2, 255], (*size, 1), p=[0.4, 0.3, 0.2, 0.1])[..., 0]
    return rng.integers(0, 256, (*size, 3), np.uint8), label.astype(np.uint8)


@pytest.mark.parametrize("side", [1, 5, 9])
def test_box_filter_equals_patches(side):
    image, _ = scene(0)
    right, below = study.neighbor_distances(image, side)
    assert right.shape == (14, 16) and below.shape == (13, 17)
    for distances, (down, across) in ((right, (0, 1)), (below, (1, 0))):
        for y, x in np.ndindex(distances.shape):
            difference = patch(image, y, x, side) - patch(image, y + down, x + across, side)
            assert distances[y, x] == pytest.approx(np.linalg.norm(difference), abs=1e-12)
    around = right[6, 7] + right[6, 8] + below[5, 8] + below[6, 8]
    assert study.distance_map(image, side)[6, 8] == pytest.approx(around / 4)
    image[:] = 255  # a flat area has distance 0
    assert (study.distance_map(image, side) == 0).all()


def test_auc_and_correlation_equal_those_of_all_pairs():
    same, boundary = [], []
    total = 0
    for seed in range(2):
        image, label = scene(seed)
        total = total + study.count_pairs(image, label, 3)
        for down, across in ((0, 1), (1, 0)):
            for y, x in np.ndindex(14 - down, 17 - across):
                a, b = label[y, x], label[y + down, x + across]
                if 255 not in (a, b):
                    other = patch(image, y + down, x + across, 3)
                    distance = np.linalg.norm(patch(image, y, x, 3) - other)
                    (same if a == b else boundary).append(distance)
    assert total.sum(1).tolist() == [len(same), len(boundary)]
    farther = np.mean([(b > a) + (a == b) / 2 for a, b in product(same, boundary)])
    assert study.auc(total) == pytest.approx(farther, abs=1e-3)
    crossing = np.repeat([0, 1], [len(same), len(boundary)])
    expected = np.corrcoef(same + boundary, crossing)[0, 1]
    assert study.correlation(total) == pytest.approx(expected, abs=1e-3)


def test_nearest_patches_equal_a_search():
    side, (image, label) = 5, scene(2)
    queries = [(0, *study.draw_query(image, label, side, np.random.default_rng(k))) for k in (0, 1)]
    other, classes = scene(3)
    found = study.nearest(queries, other, classes, side)
    places = list(product(range(2, 12), range(2, 15)))
    for query, distances in zip(queries, found, strict=True):
        patches = [patch(image, y, x, side) for y, x in places]
        mine = min(patches, key=lambda p, q=query: abs(np.square(p - 0.5).sum() - q[3]))  # Q . Q
        best = {True: np.inf, False: np.inf}
        for y, x in (place for place in places if classes[place] != 255):
            kind = bool(classes[y, x] == query[1])
            best[kind] = min(best[kind], np.linalg.norm(patch(other, y, x, side) - mine))
        np.testing.assert_allclose(distances, [best[True], best[False]], rtol=1e-4)
        assert study.nearest([query], image, label, side)[0, 0] < 1e-2  # finds itself
    void = np.full_like(label, 255)
    assert np.isinf(study.nearest(queries, image, void, side)).all()


def test_patch_distance_measures_and_draws(command, camvid, tmp_path):
    flags = ("--dataset", "camvid", "--data-dir", camvid, "--out", tmp_path, "--queries", 4)
    status, out, _ = command("patch_distance", *flags, "--patches", 3, 7)
    numbers = json.loads((tmp_path / "camvid.json").read_text())
    assert status == 0 and json.loads(out[out.index("{") :]) == numbers
    assert numbers["patches Q"] == 4 and 0 < numbers["AUC, 7 pixels"] < 1
    for name in ("maps", "histograms"):
        assert Image.open(tmp_path / f"camvid_{name}.png").width >= 900
    status, _, err = command("patch_distance", *flags)
    assert status == 2 and "--patches 225: larger than the images" in err


def test_numbers_of_a_mask():
    mask = np.array([[1, 1, 0, 0], [1, 1, 0, 1]], bool)
    label = np.array([[0, 0, 1, 1], [0, 0, 1, 1]])
    assert masks.measure(mask, label, 3) == {
        "share of pixels": 5 / 8,
        "perimeter, of 1000 pixels": 500,
        "regions": 3,
        masks.FOLLOWS: 0.5,
        "classes cut": 0.5,
    }


def test_masks_are_measured_and_drawn(command, tmp_path):
    status, out, _ = command("masks", "--images", 2, "--size", 64, 128, "--out", tmp_path)
    assert status == 0 and '"images": 2,' in out
    numbers = json.loads((tmp_path / "streets.json").read_text())
    cut = numbers["ClassMix"]["classes cut, mean and deviation"]
    assert numbers["images"] == 2 and cut == [0, 0]
    for name in ("streets", "streets_blocks", "figure_4"):
        assert Image.open(tmp_path / f"{name}.png").width >= 900
