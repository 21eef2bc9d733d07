"""The programs in studies/."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))

import pseudo_labels
import spatial_classes as spatial
import toy2d


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
