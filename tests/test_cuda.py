"""Training, masks and evaluation on a GPU, against the CPU; benchmarks/gpu.sh runs them."""

import functools
import math
import signal
from argparse import Namespace
from importlib import import_module

import pytest
import torch
from conftest import METHODS, read_log, read_state, record, stopping_train

from common import evaluation, run, streets
from common.datasets import open_dataset
from common.deeplab import DeepLabV2

DEVICE = "cuda"
HERE = torch.cuda.is_available()
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not HERE, reason="needs a CUDA device")]
MODULES = {method: import_module(method) for method in METHODS}
TINY = "--layers 1 1 1 1 --width 8 --aspp-rates 1 2 --batch-size 4 --iterations 3 --eval-every 3"
# Steps use unlabeled images from the first or second one on, and all terms count.
OWN = {
    "classmix": "--warmup 1 --confidence-threshold 0.1 --extra-augmentations",
    "complexmix": "--warmup 1 --confidence-threshold 0.1",
    "cowmix": "--confidence-threshold 0.1",
    "c3semiseg": "--warmup 1 --per-class 3 --initial-threshold 0.1",
}
RUNS = [*METHODS, *(f"cowmix {name}" for name in ("cowout", "cutmix", "cutout", "ict", "aug"))]
SCENES = functools.cache(streets.Scenes)
EAGER, COMPILED = ("fp32", "--no-compile"), ("bf16", "--compile")


@pytest.fixture(autouse=True)
def scenes(monkeypatch):
    """Renders scenes once for all tests. Each ends without compiled code and may wait."""
    monkeypatch.setattr(streets, "Scenes", SCENES)
    yield
    torch.compiler.reset()
    torch.cuda.set_sync_debug_mode("default")


def flags(method, device=DEVICE, kind=EAGER) -> tuple:
    """Flags of a run of 3 steps on streets."""
    return (*TINY.split(), *OWN[method].split(), "--device", device, "--precision", *kind)


@pytest.mark.parametrize("kind", [EAGER, COMPILED], ids=["eager", "compiled"])
@pytest.mark.parametrize("method", METHODS)
def test_losses_are_finite_and_begin_as_on_a_cpu(method, kind):
    logged = record(method, *flags(method, kind=kind)).logged
    assert all(math.isfinite(sum(values)) for values in logged.values()) and "loss_u" in logged
    expected = record(method, *flags(method, "cpu")).logged["loss_l"][0]
    assert logged["loss_l"][0] == pytest.approx(expected, rel=0.02)  # weights and batch are equal


@pytest.mark.parametrize("name", RUNS)
def test_a_step_does_not_wait_for_the_device(name):
    sessions, (method, *perturbation) = [], name.split()

    class Strict(run.Session):
        """After the first step, in which libraries are set up, PyTorch refuses to wait."""

        def restore(self):
            sessions.append(self)
            return 0

        def end_step(self, iteration, pictures):
            torch.cuda.set_sync_debug_mode("error" if iteration < 4 else "default")

    argv = (*flags(method), "--iterations", 6, *(f"--perturbation={p}" for p in perturbation))
    recipe, args = run.parse_args(method, "", MODULES[method].RECIPES, None, [*map(str, argv)])
    MODULES[method].train(recipe, args, Strict)
    assert all(total.isfinite() for total, _ in sessions[0].sums.values())


def test_masks_and_thresholds_are_those_of_a_cpu():
    torch.manual_seed(0)
    label, scores = torch.randint(0, 6, (2, 32, 64)), torch.rand(2, 16, 5)  # 5 is no class
    noise, confidence, sigma = torch.randn(2, 32, 64), torch.rand(2, 32, 64), torch.full((2,), 3.0)
    classmix, complexmix, cowmix, c3semiseg = MODULES.values()  # in the order of METHODS

    def results(device):
        own = [values.to(device) for values in (label, scores, noise, sigma, confidence)]
        options = {"sigma_range": (3.0, 3.0), "noise": own[2], "sigma": own[3], "device": device}
        yield cowmix.cow_mask(2, (32, 64), **options)
        yield classmix.class_mask(own[0], 5, scores=own[1][:, 0])
        for kind in ("all", "present"):
            yield complexmix.complex_mask(own[0], 5, 4, classes=kind, scores=own[1])
        yield c3semiseg.ConfidentRegions(5).to(device).update(own[4], own[0])

    for found, expected in zip(results(DEVICE), results("cpu"), strict=True):
        # Smoothed noise is rounded differently: a pixel at the threshold may change.
        assert 0 < expected.float().mean() < 1 and (found.cpu() != expected).sum() <= 2


def test_evaluation_is_that_of_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    data, iou = open_dataset("streets", None, size=(32, 64)), {}
    torch.manual_seed(0)
    network = DeepLabV2(data.num_classes, layers=(1, 1, 1, 1), width=8, rates=(1, 2))
    for device in (DEVICE, "cpu"):
        args = Namespace(device=torch.device(device), precision="fp32", workers=0, eval_crop=None)
        networks = {"student": network.to(device)}
        scores = evaluation.evaluate(networks, data.val, data.num_classes, args)["student"]
        iou[device] = [value or 0.0 for value in scores["iou"]]
    assert iou[DEVICE] == pytest.approx(iou["cpu"], abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_continues(command, tmp_path, monkeypatch, method):
    whole, parts, module = tmp_path / "whole", tmp_path / "parts", MODULES[method]
    assert command(method, *flags(method), "--output-dir", whole)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(module, "train", stopping_train(method, 2, signal.SIGTERM))
        assert command(method, *flags(method), "--output-dir", parts)[0] == 143
    assert command(method, "--resume", parts / "last.pt")[0] == 0
    assert read_log(parts)[0]["loss_l"] == pytest.approx(read_log(whole)[0]["loss_l"], rel=0.02)
    students = [read_state(folder)["student"] for folder in (parts, whole)]
    torch.testing.assert_close(*students, rtol=0.05, atol=0.02)
