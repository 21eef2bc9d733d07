"""The programs in studies/."""

import json
from itertools import product
from pathlib import Path

import masks
import numpy as np
import patch_distance as study
import pseudo_labels
import pytest
import spatial_classes as spatial
import torch
import toy2d
from PIL import Image
from torch import nn


@pytest.fixture(scope="module")
def distance():
    return toy2d.distance_map()


def test_toy2d_distance_is_signed_and_goes_on_outside(distance):
    centres = toy2d.pixel_centres(toy2d.SIDE)
    looked_up = toy2d.look_up(distance, centres)
    torch.testing.assert_close(looked_up, distance.flatten(), atol=1e-5, rtol=0)
    assert distance[:, 0].max() < 0 < distance[:, -1].min()
    assert (distance > 0).float().mean() == pytest.approx(0.5, abs=0.01)
    x = torch.tensor([[-3.0, 0.0], [-1.0, 0.0], [3.0, 0.0], [1.0, 0.0]])
    far, edge, far_right, right = toy2d.look_up(distance, x)
    assert far == edge < -0.6 and far_right == right > 0.6


def test_toy2d_contours_keep_pairs_in_their_class(distance):
    generator, points = torch.Generator().manual_seed(0), toy2d.pixel_centres(toy2d.SIDE)
    crossed, sizes = {}, {}
    for contour in (False, True):
        draws = [toy2d.perturb(points, distance, contour, generator) for _ in range(40)]
        x, x_hat = map(torch.cat, zip(*draws, strict=True))
        assert x.shape == x_hat.shape == (40 * toy2d.BATCH, 2)
        m, m_hat = toy2d.look_up(distance, x), toy2d.look_up(distance, x_hat)
        crossed[contour] = ((m > 0) != (m_hat > 0)).float().mean()
        sizes[contour] = (x - x_hat).norm(dim=1).mean()
        assert not contour or (m - m_hat).abs().max() <= toy2d.TOLERANCE
    assert crossed[False] > 0.03 and crossed[True] < 0.2 * crossed[False]
    assert sizes[True] > 0.5 * sizes[False]  # yet the pairs are far apart


def test_toy2d_measures_a_known_decision(monkeypatch):
    x = toy2d.pixel_centres(toy2d.SIDE)[:, 0].view(toy2d.SIDE, -1)
    network = nn.Linear(2, 2)
    for weight, bias, error, pixels, cosine in (
        ([1.0, 0.0], 0.0, 0, 1, 1),  # the true boundary
        ([1.0, 0.0], -0.5, 25, 128, 1),  # too far to the right by 128 pixels
        ([0.0, 1.0], 0.0, 50, 128, 0),  # perpendicular
    ):
        with torch.no_grad():
            network.weight.copy_(torch.tensor([[0.0, 0.0], weight]))
            network.bias.copy_(torch.tensor([0.0, bias]))
        values, prob = toy2d.measure(network, x)
        assert values["error_percent"] == pytest.approx(error, abs=1)
        assert values["boundary_distance_px"] == pytest.approx(pixels, abs=2)
        assert values["cosine"] == pytest.approx(cosine, abs=1e-3)
        assert prob.shape == (toy2d.VIEW, toy2d.VIEW)


def test_toy2d_writes_numbers_and_a_picture(command, tmp_path, monkeypatch):
    for name, value in {"SEEDS": 2, "STEPS": 3, "VIEW": 64, "BATCH": 8}.items():
        monkeypatch.setattr(toy2d, name, value)
    monkeypatch.chdir(tmp_path)
    status, out, err = command("toy2d")
    assert (status, err) == (0, "") and "d cosine" in out
    result = json.loads(Path("results/studies/toy2d.json").read_text())
    assert len(result) == 16 and len(result["d error_percent"]) == 2
    assert Image.open("results/studies/toy2d.png").size == (4 * 76, 64 + 72)


def test_spatial_numbers_of_known_maps():
    label = torch.full((4, 4, 8), 255, dtype=torch.uint8)
    label[:, :2] = 0  # class 0 fills the upper half of each, class 1 the row below in half of them
    label[:2, 2] = 1
    maps = spatial.frequency(label, 3)
    assert maps[0, 0, 0] == 1 and maps[1, 2, 0] == 0.5 and maps[2].max() == 0
    assert spatial.used_area(maps)[:2].tolist() == pytest.approx([0.5, 0.25])
    assert spatial.variation(maps, maps.flip(1))[:2].tolist() == pytest.approx([1, 1])
    assert spatial.variation(maps, maps.roll(1, 1))[0] == pytest.approx(0.5)
    assert spatial.mean_row(label, 0) == pytest.approx((0.25, 0))
    assert spatial.mean_row(label, 1) == pytest.approx((0.625, 0))
    assert spatial.mean_row(label, 2) == (None, None)


def test_spatial_mixes_and_shifts_each_label():
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 5, (70, 6, 9), generator=generator).byte()
    mixed, mask, other = spatial.mix_pairs(label, 5, generator)
    assert torch.equal(mixed, torch.where(mask, label, other))
    same = (label.unsqueeze(1) == other).flatten(2).all(2)  # once, and never upon itself
    assert (same.sum(0) == 1).all() and (same.sum(1) == 1).all() and not same.diag().any()
    shifted = spatial.shift(label, generator)
    for before, after in zip(label, shifted, strict=True):
        rolls = [before.roll((y, x), (0, 1)) for y in range(6) for x in range(9)]
        assert any(torch.equal(after, roll) for roll in rolls)
    assert not torch.equal(label, shifted)


def test_spatial_writes_numbers_and_a_picture(command, camvid, tmp_path):
    flags = ("--dataset", "camvid", "--data-dir", camvid, "--size", 24, 32)
    status, _, err = command("spatial_classes", *flags, "--output-dir", tmp_path)
    assert (status, err) == (0, "")
    result = json.loads((tmp_path / "spatial_camvid.json").read_text())
    assert result["images"] == 8 and len(result["classes"]) == 11
    assert 0 < result["pasted_on_same_class"] < 1
    assert Image.open(tmp_path / "spatial_camvid.png").width > 900
    status, _, err = command("spatial_classes", "--dataset", "voc", "--data-dir", tmp_path / "none")
    assert status == 2 and "no such folder" in err


def test_pseudo_labels_are_compared_with_the_truth():
    """The image holds the logits of its pixels: two right, one wrong but unsure, one void."""
    logits = torch.tensor([[9.0, 0.0, 0.6, 9.0], [0.0, 9.0, 0.4, 0.0]]).view(2, 1, 4)
    label = torch.tensor([[0, 1, 1, 255]]).byte()
    network = nn.Identity()
    network.features, network.classify = lambda image: 255 * image, lambda logits, _: logits
    assert pseudo_labels.measure(network, [(logits, label)], [0], ("a", "b")) == {
        "miou": 50.0,
        "confident": 66.7,
        "right": 100.0,
        "predicted": {"a": 200.0, "b": 50.0},
    }


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
    same, boundary, total = [], [], 0
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
