"""Where a decision boundary settles in two dimensions (CowMix, figure 2, section 3.2).

    python studies/toy2d.py

Ten points are labeled; a mean teacher learns from the others. The paper claims: (a) if there is a
gap between the classes, the boundary "settles neatly between the two clusters"; (b) without a gap,
consistency "does more harm than good"; (d) if perturbed points keep their distance to the true
boundary (c), the learned boundary "aligns well with the true class boundary". Seeds differ in the
labels and in the network. Mean and deviation over all seeds:

                                        supervised    (a)           (b)           (d)
    wrong points, %                     14.1 +- 3.7   5.0 +- 3.2    12.0 +- 3.4   6.4 +- 4.9
      outside the gap, %                7.6 +- 4.2    1.2 +- 2.6    5.6 +- 4.6    1.9 +- 3.9
    distance of the boundary, pixels    43.9 +- 7.7   15.3 +- 9.3   38.1 +- 6.0   19.4 +- 12.6
    mean |cos| of the slopes            0.60 +- 0.03  0.91 +- 0.11  0.62 +- 0.04  0.97 +- 0.04

(a) agrees, except for seed 2, whose labels mislead all networks. (b) agrees in part: the boundary
ignores the true one, but no seed is worse than supervised training. (d) agrees: the slopes align,
and each seed beats supervised training and (b), but 2 to 14% of the points stay wrong. We tuned
batch, steps and learning rate, which the paper leaves open, on the errors of seeds 0 and 1.
"""

import json
import sys
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont
from scipy import ndimage
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.ema import make_teacher, update_teacher

SIDE, PIXEL = 512, 2 / 512  # the square [-1,1] x [-1,1] has 512x512 pixels (appendix A)
GAP = 35 * PIXEL  # in (a), no point is nearer to the true boundary (code)
SIGMA, TOLERANCE = 0.117, 0.016  # of the perturbation and of the contour rule (appendix A)
WEIGHT, THRESHOLD, DECAY = 10.0, 0.97, 0.99  # appendix A, appendix A, code
BATCH, LEARNING_RATE, STEPS, SEEDS = 128, 1e-3, 2500, 5  # code: 512, 2e-4, about 51,000 steps
VIEW = 320  # side of a panel of the picture, and of the grid on which networks are measured
CAPTIONS = dict(a="gap of 70 px", b="no gap", c="distance, a line every 20 px", d="along contours")
LEGEND = {"label of class 0": "blue", "label of class 1": "red", "true boundary": "magenta"}
LEGEND |= {"supervised boundary": "darkorange", "probability of class 1": "limegreen"}


def pixel_centres(side: int) -> Tensor:
    """Centres x, y of side x side pixels, row by row: (side * side, 2)."""
    centre = (torch.arange(side) + 0.5) * (2 / side) - 1
    return torch.cartesian_prod(centre, centre).flip(1)


def distance_map() -> Tensor:
    """Signed distance to the true boundary, positive in class 1: float (SIDE,SIDE)."""
    x, y = pixel_centres(SIDE).view(SIDE, SIDE, 2).unbind(-1)
    one = x > 0.45 * torch.sin(3.6 * y)
    inside, outside = map(ndimage.distance_transform_edt, (one, ~one))
    return torch.from_numpy((inside - outside) * PIXEL).float()


def look_up(distance: Tensor, points: Tensor) -> Tensor:
    """Bilinear value of the distance map at points (N,2) -> (N,); its edge goes on outside."""
    image, grid = distance[None, None], points[None, None]
    return F.grid_sample(image, grid, padding_mode="border", align_corners=False).flatten()


def perturb(points: Tensor, distance: Tensor, contour: bool, generator) -> tuple[Tensor, Tensor]:
    """Points and perturbed copies; with contour, of similar distances: (BATCH,2) twice."""
    # The paper draws BATCH pairs and ignores the others; more draws fill the batch instead.
    drawn = BATCH * (12 if contour else 1)  # about one pair in eight is similar
    x = points[torch.randint(len(points), (drawn,), generator=generator)]
    x_hat = x + SIGMA * torch.randn(drawn, 2, generator=generator)
    change = (look_up(distance, x) - look_up(distance, x_hat)).abs()
    similar = change <= (TOLERANCE if contour else torch.inf)
    return x[similar][:BATCH], x_hat[similar][:BATCH]


def train(labeled: Tensor, label: Tensor, draw, *, seed: int) -> nn.Module:
    """Trains a mean teacher and returns it; draw() returns x and x_hat, None is supervised."""
    torch.manual_seed(seed)
    layers = [(nn.Linear(width, 512), nn.ReLU()) for width in (2, 512, 512)]
    student = nn.Sequential(*sum(layers, ()), nn.Linear(512, 2))
    teacher = make_teacher(student, train_mode=False)
    optimizer = torch.optim.Adam(student.parameters(), lr=LEARNING_RATE, fused=True)
    for step in range(STEPS):
        loss = F.cross_entropy(student(labeled), label)
        if draw is not None:
            x, x_hat = draw()
            prob = teacher(x).softmax(1)
            # With two classes, the cross-entropy of probabilities is the binary cross-entropy.
            loss_u = F.cross_entropy(student(x_hat), prob, reduction="none")
            loss = loss + WEIGHT * ((prob.amax(1) >= THRESHOLD) * loss_u).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_teacher(teacher, student, decay=min(DECAY, 1 - 1 / (step + 1)), buffers="copy")
    return teacher


def outline(image: Tensor) -> Tensor:
    """Pixels that differ from the one to the right or below: (H,W) -> (H,W) bool."""
    right, below = image[:, 1:] != image[:, :-1], image[1:] != image[:-1]
    return F.pad(right, (0, 1)) | F.pad(below, (0, 0, 0, 1))


def measure(network: nn.Module, distance: Tensor) -> tuple[dict[str, float], Tensor]:
    """Numbers about the decision, and the probability of class 1: (VIEW,VIEW)."""
    points = pixel_centres(VIEW)
    true = look_up(distance, points)
    prob = network(points).softmax(1)[:, 1].detach()
    wrong = (prob > 0.5) != (true > 0)
    boundary = outline((prob > 0.5).view(VIEW, VIEW)).flatten()
    on = points[boundary].requires_grad_()
    (slope,) = torch.autograd.grad(network(on).diff(dim=1).sum(), on)
    down, right = (s.flatten()[boundary] for s in torch.gradient(true.view(VIEW, VIEW)))
    values = {
        "error_percent": 100 * wrong.float().mean().item(),
        "error_outside_gap_percent": 100 * wrong[true.abs() > GAP].float().mean().item(),
        "boundary_distance_px": true[boundary].abs().mean().item() / PIXEL,
        "cosine": F.cosine_similarity(slope, torch.stack([right, down], 1)).abs().mean().item(),
    }
    return values, prob.view(VIEW, VIEW)


def run_seed(seed: int, distance: Tensor) -> tuple[Tensor, Tensor, dict]:
    """Returns ten labeled points, their classes, and what measure returns for each panel."""
    generator, every = torch.Generator().manual_seed(seed), pixel_centres(SIDE)
    zero, one = every[distance.flatten() < -GAP], every[distance.flatten() > GAP]
    chosen = [p[torch.randperm(len(p), generator=generator)[:5]] for p in (zero, one)]
    labeled, label = torch.cat(chosen), torch.tensor([0, 1]).repeat_interleave(5)
    outside, results = every[distance.flatten().abs() > GAP], {}
    cases = {"supervised": None, "a": (outside, False), "b": (every, False), "d": (every, True)}
    for name, case in cases.items():
        draw = case and partial(perturb, case[0], distance, case[1], generator)
        results[name] = measure(train(labeled, label, draw, seed=seed), distance)
        print(f"seed {seed}, {name}: {results[name][0]}", flush=True)
    return labeled, label, results


def background(name: str, true: Tensor, results: dict) -> Image.Image:
    """The colours of a panel with the true and the supervised boundary."""
    if name == "c":  # red in class 1, blue in class 0, stronger with the distance
        fade = 1 - true.abs() / true.abs().max()
        colours = torch.stack([fade.where(true < 0, 1), fade, fade.where(true > 0, 1)])
        colours[:, outline((true / (20 * PIXEL)).floor())] *= 0.6
    else:  # green: the probability of class 1
        colours = 1 - results[name][1] * torch.tensor([0.8, 0.2, 0.8]).view(3, 1, 1)
    supervised = {} if name == "c" else {"darkorange": results["supervised"][1] > 0.5}
    for colour, one in {"magenta": true > 0, **supervised}.items():
        thick = F.max_pool2d(outline(one)[None].float(), 3, 1, 1)[0] > 0
        colours[:, thick] = torch.tensor(ImageColor.getrgb(colour))[:, None] / 255
    return Image.fromarray((255 * colours).byte().movedim(0, 2).contiguous().numpy())


def figure(distance: Tensor, labeled: Tensor, label: Tensor, results: dict) -> Image.Image:
    """Panels (a) to (d) of figure 2 with captions and a legend."""
    true = look_up(distance, pixel_centres(VIEW)).view(VIEW, VIEW)
    points = 2 * torch.rand(1500, 2, generator=torch.Generator().manual_seed(0)) - 1
    sheet = Image.new("RGB", (4 * (VIEW + 12), VIEW + 72), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(20)
    for column, (name, caption) in enumerate(CAPTIONS.items()):
        corner = torch.tensor([column * (VIEW + 12) + 6, 34])
        sheet.paste(background(name, true, results), tuple(corner.tolist()))
        if name in results:
            key = "error_outside_gap_percent" if name == "a" else "error_percent"
            caption += f": {results[name][0][key]:.1f}% wrong"
            shown = points[look_up(distance, points).abs() > (GAP if name == "a" else 0)]
            dots, circles = (((xy + 1) / 2 * VIEW + corner).tolist() for xy in (shown, labeled))
            pen.point(list(map(tuple, dots)), "black")
            for centre, k in zip(circles, label, strict=True):
                pen.circle(centre, 6, ("blue", "red")[k], "white")
        pen.text((column * (VIEW + 12) + 6, 4), f"({name}) {caption}", "black", font)
    left = 6
    for text, colour in LEGEND.items():
        pen.rectangle((left, VIEW + 46, left + 16, VIEW + 60), colour)
        pen.text((left + 22, VIEW + 42), text, "black", font)
        left += 46 + font.getlength(text)
    return sheet


def main() -> None:
    """Writes the numbers of all seeds, toy2d.json, and the picture of seed 0, toy2d.png."""
    (folder := Path("results/studies")).mkdir(parents=True, exist_ok=True)
    distance, runs = distance_map(), []
    for seed in range(SEEDS):
        labeled, label, results = run_seed(seed, distance)
        runs.append({name: values for name, (values, _) in results.items()})
        if seed == 0:
            figure(distance, labeled, label, results).save(folder / "toy2d.png")
    keys = [(name, key) for name, values in runs[0].items() for key in values]
    summary = {" ".join(key): [round(run[key[0]][key[1]], 3) for run in runs] for key in keys}
    for key, values in summary.items():
        print(f"{key:<37}{mean(values):7.2f} +- {stdev(values):.2f}")
    (folder / "toy2d.json").write_text(json.dumps(summary).replace("], ", "],\n ") + "\n")


if __name__ == "__main__":
    main()
