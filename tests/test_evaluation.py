"""Scores by hand and the pictures."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common.datasets import open_dataset
from common.evaluation import (
    class_iou,
    confusion_matrix,
    evaluate,
    iou_table,
    predict,
    save_prediction,
    save_samples,
)

CPU = torch.device("cpu")


def test_iou_by_hand():
    label = torch.tensor([[[0, 0, 1], [1, 255, 255]]])
    prediction = torch.tensor([[[0, 1, 1], [1, 0, 3]]])
    matrix = confusion_matrix(prediction, label, 4)
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    iou = class_iou(matrix)
    assert iou[:2].tolist() == pytest.approx([1 / 2, 2 / 3]) and iou[2:].isnan().all()


def test_confusion_matrix_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 6, (2, 9, 7), generator=generator)
    label[label == 5] = 255
    prediction = torch.randint(0, 5, (2, 9, 7), generator=generator)
    wanted = torch.zeros(5, 5, dtype=torch.int64)
    for t, p in zip(label.flatten().tolist(), prediction.flatten().tolist(), strict=True):
        if t != 255:
            wanted[t, p] += 1
    assert torch.equal(confusion_matrix(prediction, label, 5), wanted)


def test_a_class_that_is_only_predicted_counts_as_zero():
    iou = class_iou(confusion_matrix(torch.tensor([0, 2]), torch.tensor([0, 0]), 3))
    assert iou[0] == 0.5 and iou[1].isnan() and iou[2] == 0


class Reader(nn.Module):
    """Reads the class off the red channel of the images that conftest writes."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes

    def features(self, image):
        assert not self.training
        return image

    def classify(self, features, size):
        centres = (torch.arange(self.num_classes) * 20 + 9.5) / 255
        logits = -(features[:, :1] - centres.view(1, -1, 1, 1)).abs()
        return nn.functional.interpolate(logits, size, mode="bilinear", align_corners=True)


def test_evaluate_scores_a_perfect_network_and_keeps_modes(camvid):
    data = open_dataset("camvid", camvid)
    networks = {"student": Reader(11).train(), "teacher": Reader(11).eval()}
    scores = evaluate(networks, data.train, 11, device=CPU, workers=0)
    assert scores["student"]["miou"] == scores["teacher"]["miou"] == 1.0
    assert networks["student"].training and not networks["teacher"].training
    half = open_dataset("camvid", camvid, size=(24, 32), full_labels=True)
    assert 0.5 < evaluate(networks, half.val, 11, device=CPU, workers=0)["student"]["miou"] < 1
    table = iou_table(scores, data.class_names)
    assert table.splitlines()[0].split() == ["student", "teacher"]
    assert table.splitlines()[-1].split() == ["mIoU", "100.00", "100.00"]
    assert len(table.splitlines()) == 13


def test_predict_at_any_size_equals_plain_upsampling(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 220, (300, 47, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    picture, prediction = predict(Reader(11), tmp_path / "a.png", (60, 80), CPU)
    scale = (60 * 80 / (300 * 47)) ** 0.5
    inside = (round(47 * scale), round(300 * scale))
    resized = np.asarray(Image.fromarray(pixels).resize(inside, Image.Resampling.BILINEAR))
    image = torch.from_numpy(resized.copy()).movedim(2, 0)[None].float() / 255
    logits = Reader(11).eval().classify(image, image.shape[-2:])
    wanted = nn.functional.interpolate(logits, (300, 47), mode="bilinear", align_corners=True)
    assert prediction.dtype == np.uint8 and picture.size == (47, 300)
    assert (wanted.argmax(1)[0].numpy() == prediction).mean() > 0.999


def test_predict_turns_a_photograph_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert predict(Reader(3), tmp_path / "a.jpg", None, CPU)[1].shape == (40, 20)


def test_pictures(tmp_path):
    palette = ((255, 0, 0), (0, 255, 0))
    prediction = np.array([[0, 1], [1, 0]], np.uint8)
    save_prediction(tmp_path, "x", Image.new("RGB", (2, 2), "black"), prediction, palette)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), prediction)
    assert Image.open(tmp_path / "x.png").convert("RGB").getpixel((1, 0)) == (0, 255, 0)
    assert Image.open(tmp_path / "x_overlay.png").getpixel((0, 0)) in ((127, 0, 0), (128, 0, 0))
    columns = {
        "image": torch.rand(2, 3, 8, 16),
        "label": torch.tensor([0, 255]).view(2, 1, 1).expand(2, 8, 16),
        "mask": torch.ones(2, 8, 16, dtype=torch.bool),
        "prediction": torch.rand(2, 5, 8, 16).argmax(1),
    }
    save_samples(tmp_path / "s/sheet.png", columns, [*palette, (9, 9, 9), (8, 8, 8), (7, 7, 7)])
    sheet = Image.open(tmp_path / "s/sheet.png").convert("RGB")
    assert {(255, 0, 0), (0, 0, 0), (255, 255, 255)} <= {c for _, c in sheet.getcolors(1 << 20)}
