"""Measures how right a finished run is on its unlabeled training images and on the scored ones.

    python studies/pseudo_labels.py runs/RUN/last.pt ... --out pseudo_labels.jsonl

The network is the one that the paper reports. Training hides the labels of the unlabeled images;
this study reads them. It prints a line for each run: mIoU on unlabeled and on scored images, the
share of pixels whose confidence is at least 0.968 (ClassMix's threshold), and how many of these
are right, all in %.
"""

import argparse
import json
from importlib import import_module
from pathlib import Path

import figures  # noqa: F401  finds the method files
import torch

from common.datasets import open_dataset
from common.deeplab import load_file
from common.evaluation import class_iou, confusion_matrix
from common.flags import parse_args

THRESHOLD = 0.968


@torch.no_grad()
def measure(network, images, indices, num_classes: int) -> dict[str, float]:
    """% mIoU of a network on images, its share of confident pixels, and how many are right."""
    matrices = torch.zeros(2, num_classes, num_classes, dtype=torch.int64)  # all, confident
    for k in indices:
        image, label = images[k]
        features = network.features(image[None] / 255)
        prob = network.classify(features, label.shape).softmax(1)
        confidence, prediction = prob[0].max(0)
        for matrix, threshold in zip(matrices, (0, THRESHOLD), strict=True):
            seen = confidence >= threshold
            matrix += confusion_matrix(prediction[seen], label[seen].long(), num_classes)
    every, confident = matrices
    return {
        "miou": 100 * class_iou(every).nanmean().item(),
        "confident": (100 * confident.sum() / every.sum()).item(),
        "right": (100 * confident.trace() / confident.sum().clamp(min=1)).item(),
    }


def main() -> None:
    """Prints a JSON line for each checkpoint, and writes them to a file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    given, lines = parser.parse_args(), []
    for path in given.checkpoints:
        method = load_file(path)["method"]
        module, argv = import_module(method), ["--evaluate", str(path), "--device", "cpu"]
        preset = getattr(module, "preset", None)
        recipe, args = parse_args(method, "", module.RECIPES, preset, argv)
        data = open_dataset(args.dataset, args.data_dir, size=recipe.size)
        network = module.network(recipe, data.num_classes, pretrained=False).eval()
        network.load_state_dict(args.checkpoint["state"][args.checkpoint["headline"]])
        labeled = set(args.checkpoint["labeled_names"])
        unlabeled = [k for k, name in enumerate(data.train.names) if name not in labeled]
        _, scored = data.scored(None)
        entry = {"run": path.parent.name}
        if unlabeled:
            entry["unlabeled"] = measure(network, data.train, unlabeled, data.num_classes)
        entry["scored"] = measure(network, scored, range(len(scored)), data.num_classes)
        lines.append(json.dumps(entry))
        print(lines[-1], flush=True)
    given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
