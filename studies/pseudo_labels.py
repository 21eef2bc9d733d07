"""Measures how right a finished run is on its unlabeled training images and on the scored ones.

    python studies/pseudo_labels.py runs/RUN/last.pt ... --out pseudo_labels.jsonl

The network is the one that the paper reports. Training hides the labels of the unlabeled images;
this study reads them. It prints a line for each run, with numbers in %: mIoU on unlabeled and on
scored images; the share of pixels whose confidence is at least 0.968 (ClassMix's threshold), and
how many of these are right; pixels predicted as each class for 100 pixels that are of this class.
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
def measure(network, images, indices, class_names) -> dict:
    """mIoU of a network on images, its confident pixels, and how often it predicts each class."""
    num_classes = len(class_names)
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
    often = 100 * every.sum(0) / every.sum(1).clamp(min=1)
    return {
        "miou": round(100 * class_iou(every).nanmean().item(), 1),
        "confident": round(100 * confident.sum().item() / every.sum().item(), 1),
        "right": round(100 * confident.trace().item() / max(1, confident.sum().item()), 1),
        "predicted": {
            name: round(n, 1) for name, n in zip(class_names, often.tolist(), strict=True)
        },
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
            entry["unlabeled"] = measure(network, data.train, unlabeled, data.class_names)
        entry["scored"] = measure(network, scored, range(len(scored)), data.class_names)
        lines.append(json.dumps(entry))
        print(lines[-1], flush=True)
    given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
