"""Scores by hand, predictions for pictures of any size, and the pictures that are written."""

import json
from argparse import Namespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from common import InputError, evaluation, pictures
from common.datasets import open_dataset
from common.evaluation import class_iou, confusion_matrix, evaluate, predict

CPU = torch.device("cpu")
ARGS = Namespace(device=CPU, workers=0, precision="fp32", weights="none", eval_crop=None)


def test_iou_by_hand():
    label = torch.tensor([[[0, 0, 1], [1, 255, 255]]])
    prediction = torch.tensor([[[0, 1, 1], [1, 0, 3]]])
    matrix = confusion_matrix(prediction, label, 4)
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    iou = class_iou(matrix)
    assert iou[:2].tolist() == pytest.approx([1 / 2, 2 / 3]) and iou[2:].isnan().all()
    iou = class_iou(confusion_matrix(torch.tensor([0, 2]), torch.tensor([0, 0]), 3))
    assert iou[0] == 0.5 and iou[1].isnan() and iou[2] == 0  # a class that is only predicted


class Reader(nn.Module):
    """Reads the class off the red channel of the images that conftest writes, and adds `shift`."""

    def __init__(self, num_classes: int, shift: int = 0):
        super().__init__()
        self.num_classes = num_classes
        self.register_buffer("shift", torch.tensor(shift))

    def features(self, image):
        assert not self.training
        return image

    def classify(self, features, size):
        centers = ((torch.arange(self.num_classes) - self.shift) * 20 + 9.5) / 255
        logits = -(features[:, :1] - centers.view(1, -1, 1, 1)).abs()
        return F.interpolate(logits, size, mode="bilinear", align_corners=True)


def test_evaluate_scores_a_perfect_network_and_keeps_modes(camvid):
    data = open_dataset("camvid", camvid)
    networks = {"student": Reader(11).train(), "teacher": Reader(11, shift=1).eval()}
    scores = evaluate(networks, data.train, 11, ARGS)
    assert scores["student"]["miou"] == 1.0 and scores["teacher"]["miou"] < 0.1
    assert networks["student"].training and not networks["teacher"].training
    absent = evaluate({"student": Reader(13)}, data.train, 13, ARGS)["student"]  # two more classes
    assert absent["miou"] == 1.0 and absent["iou"][11:] == [None, None]
    half = open_dataset("camvid", camvid, size=(24, 32), full_labels=True)
    assert 0.5 < evaluate(networks, half.val, 11, ARGS)["student"]["miou"] < 1
    rows = [line.split() for line in evaluation.iou_table(scores, data.class_names).splitlines()]
    assert rows[0] == ["student", "teacher"] and len(rows) == 13
    assert rows[1][:2] == ["sky", "100.00"] and rows[-1][:2] == ["mIoU", "100.00"]


def test_images_of_different_sizes_are_scored_whole_and_void_ones_are_refused(folder):
    data = open_dataset("folder", folder)
    scores = evaluate({"student": Reader(3)}, data.train, 3, ARGS)
    assert min(scores["student"]["iou"]) > 0.8  # JPEG blurs the borders
    for path in (folder / "labels/val").rglob("*.png"):
        Image.new("L", (64, 44), 255).save(path)
    with pytest.raises(InputError, match="no labeled pixel"):
        evaluate({"student": Reader(3)}, data.val, 3, ARGS)


@pytest.mark.parametrize("crop", [(20, 30), (48, 64), (7, 64), (100, 9)])
def test_windows_cover_the_image(crop):
    """A network of single pixels gives the same, and each window has the crop's size at most."""
    image, network, seen = torch.rand(2, 3, 48, 64), Reader(11).eval(), []
    features = network.features
    network.features = lambda part: seen.append(part.shape[-2:]) or features(part)
    found = evaluation.segment(network, image, (96, 128), crop)
    whole = network.classify(image, (48, 64))
    wanted = F.interpolate(whole, (96, 128), mode="bilinear", align_corners=True)
    assert found.shape == (2, 96, 128) and (found == wanted.argmax(1)).float().mean() > 0.999
    assert set(seen) == {(min(48, crop[0]), min(64, crop[1]))}


def test_predict_at_any_size_equals_plain_upsampling(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 220, (300, 47, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[274] = 6  # the photograph lies on its side
    Image.fromarray(np.rot90(pixels)).save(tmp_path / "a.png", exif=exif)
    args = Namespace(**vars(ARGS), keep_aspect=True)
    picture, prediction = predict(Reader(11), tmp_path / "a.png", (60, 80), args)
    scale = (60 * 80 / (300 * 47)) ** 0.5
    resized = picture.resize((round(47 * scale), round(300 * scale)), Image.Resampling.BILINEAR)
    image = torch.from_numpy(np.array(resized)).movedim(2, 0)[None].float() / 255
    wanted = Reader(11).eval().classify(image, (300, 47))
    assert prediction.dtype == np.uint8 and np.array_equal(picture, pixels)
    assert (wanted.argmax(1)[0].numpy() == prediction).mean() > 0.999


def test_predicted_pictures_hold_ids_and_colors(tmp_path):
    palette, pixels = [(200, 0, 0), (0, 200, 0)], np.uint8([[[10, 0, 0], [30, 0, 0]]])
    Image.fromarray(pixels).save(tmp_path / "x.png")
    state = {"state": {"student": Reader(2).state_dict()}, "headline": "student"}
    args = Namespace(checkpoint={**state, "class_names": "ab", "palette": palette}, **vars(ARGS))
    args.predict, args.out = ["last.pt", tmp_path / "x.png"], tmp_path / "out"
    args.keep_aspect = False
    evaluation.predict_pictures(Namespace(size=None), args, lambda *_, pretrained: Reader(2))
    indexed = Image.open(args.out / "x.png")
    assert np.asarray(indexed).tolist() == [[0, 1]]
    colors = np.asarray(indexed.convert("RGB"))
    assert colors.tolist() == [[list(color) for color in palette]]
    assert Image.open(args.out / "x_overlay.png").size == (2, 1)
    legend = Image.open(args.out / "legend.png")
    assert {(count, color)[1] for count, color in legend.getcolors()} >= {*palette, (0, 0, 0)}


def test_an_overlay_shows_picture_classes_and_borders():
    picture, label = Image.new("RGB", (6, 4), (100, 100, 100)), np.zeros((4, 6), np.uint8)
    label[:, 3:] = 1
    classes = pictures.colorize(label, [(200, 0, 0), (0, 200, 0)])
    for turned in (False, True):  # the border stands, then lies
        seen = picture.transpose(Image.Transpose.TRANSPOSE) if turned else picture
        ids = classes.transpose(Image.Transpose.TRANSPOSE) if turned else classes
        drawn = np.asarray(pictures.overlay(seen, ids))
        row = (drawn[:, 2] if turned else drawn[2]).tolist()
        assert row == 3 * [[140, 60, 60]] + [[0, 0, 0]] + 2 * [[60, 140, 60]]


def test_a_sheet_shows_images_labels_masks_and_a_legend():
    palette = [(255, 0, 0), (0, 255, 0)]
    columns = {
        "image": torch.full((2, 3, 8, 16), 0.2),
        "truth": torch.tensor([1, 255]).view(2, 1, 1).expand(2, 8, 16),
        "mask": torch.tensor([True, False]).view(2, 1, 1).expand(2, 8, 16),
        "prediction": torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(2, 2, 8, 16),
    }
    sheet = np.asarray(pictures.draw_samples(columns, palette, ("car", "road")))
    grey, red, green, black, white = 3 * [51], [255, 0, 0], [0, 255, 0], 3 * [0], 3 * [255]
    top = int(((sheet == 51).all(2).sum(1) > 200).argmax())  # the first row of the images
    width, height = sheet.shape[1] // 4, 16 * (8 + 2)  # enlarged 16 times
    for row, wanted in enumerate([[grey, green, white, red], [grey, black, black, red]]):
        y = top + 64 + row * height
        assert sheet[y, width // 2 :: width].tolist() == wanted
    below = sheet[top + 2 * height :].reshape(-1, 3).tolist()
    assert all(color in below for color in (red, green, black))


def test_a_chart_puts_lines_and_bands_where_their_values_are():
    lines = {"low": ([0, 10], [1, 1], 0), "high": ([0, 10], [3, 3], [0.5, 0.5])}
    chart = np.asarray(pictures.draw_chart(lines, "% mIoU", "step"))
    colors = np.array([[[31, 119, 180]], [[255, 127, 14]]])
    blue, orange = np.abs(chart[:, 300] - colors).sum(2)
    low, high = blue.argmin(), orange.argmin()
    assert blue[low] < 90 and orange[high] < 90 and high < low
    pale = np.ptp(chart[:, 300].astype(int), axis=1) > 10  # not grey
    assert pale[high - 20 : high + 20].all() and not pale[low - 20 : low - 5].any()


def test_a_run_s_curve_has_what_its_log_has(tmp_path):
    scores = {"student": {"miou": 0.25, "iou": []}, "teacher": {"miou": 0.5, "iou": []}}
    entries = [{"iteration": k, "loss_l": 1 / k, "lambda": k / 4, "lr": 1} for k in (1, 2, 3)]
    entries.append({"iteration": 3, **scores})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    with mock.patch.object(pictures, "draw_chart", wraps=pictures.draw_chart) as drawn:
        curve = pictures.draw_curve(tmp_path / "log.jsonl")
    lines = {name: line for call in drawn.call_args_list for name, line in call.args[0].items()}
    assert lines.keys() == {"loss_l", "lambda", "student", "teacher"}
    assert lines["lambda"][:2] == ([1, 2, 3], [0.25, 0.5, 0.75])
    assert lines["teacher"][:2] == ([3], [50])
    assert curve.height == 3 * 260
