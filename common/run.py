"""What surrounds a training loop: run folder, log, checkpoints, evaluation, signals."""

import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common import InputError, evaluation, ranks
from common.datasets import Data, MicroBatches, endless
from common.flags import parse_args
from common.ranks import SIGNALS, all_max

try:
    import resource
except ImportError:  # Windows
    resource = None


def main(method: str, doc: str, recipes: dict, network: Callable, train: Callable, preset=None):
    """Runs one command of a method file: train, or evaluate or predict with a checkpoint.

    network(recipe, num_classes, pretrained=) builds what train(recipe, args) trains. A user's
    mistake or a signal ends the program with one line on stderr.
    """
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    try:
        recipe, args = parse_args(method, doc, recipes, preset)
        if args.predict is not None:
            evaluation.predict_pictures(recipe, args, network)
        elif args.evaluate is not None:
            evaluation.evaluate_checkpoint(recipe, args, network)
        else:
            ranks.join(args)
            train(recipe, args)
            ranks.leave()
    except KeyboardInterrupt as error:
        number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
        line, status = f"stopped by {number.name}", 128 + number
    except (InputError, OSError) as error:  # a loader process puts its traceback before the line
        line, status = str(error).strip().splitlines()[-1].removeprefix("common.InputError: "), 2
    else:
        return
    print(f"{method}.py: {line}", file=sys.stderr, flush=True)
    sys.exit(status)


def _interrupt(number: int, _) -> None:
    raise KeyboardInterrupt(number)


def prepare(network: nn.Module, args, *, train: bool) -> nn.Module:
    """Returns a network that is ready for the device.

    Its forward pass runs under autocast, in channels_last memory on CUDA, and compiled with
    --compile. With train=True and several ranks it becomes a DistributedDataParallel, which
    averages gradients over the ranks.
    """
    torch.backends.cudnn.benchmark = True
    if args.device.type == "cuda":
        network.to(memory_format=torch.channels_last)
    network.forward = evaluation.autocast(args)(network.forward)
    if args.compile:
        network.compile()
    return DistributedDataParallel(network) if train and args.ranks > 1 else network


class Session:
    """Folder, log, checkpoints and evaluation of one training run.

    split holds the indices of the labeled and of the unlabeled images. state holds what a
    checkpoint keeps, by name: "student", "teacher", "optimizer" and whatever else has a
    state_dict. headline is the network to report, "student" or "teacher". A rank has `accumulate`
    micro-batches, or --accumulate; micro_batches numbers them across all ranks.
    """

    def __init__(self, recipe, args, data: Data, split, state, *, headline: str, accumulate=None):
        self.recipe, self.args, self.data, self.split, self.state = recipe, args, data, split, state
        self.headline, self.folder, self.first = headline, args.output_dir, args.rank == 0
        self.names = [data.train.names[index] for index in split[0]]
        self.networks = {name: state[name] for name in ("student", "teacher")}
        self.part, self.images = data.scored(args.evaluate_split)
        accumulate = accumulate or args.accumulate
        self.micro_batches = range(args.rank * accumulate, (args.rank + 1) * accumulate)
        self.log_every = max(10, min(100, recipe.iterations // 50))
        self.eval_every = args.eval_every or max(1, recipe.iterations // 8)
        self.save_every = args.save_every or max(1, recipe.iterations // 40)
        self.start, self.seconds, self.miou, self.signal = 0, 0.0, None, 0
        self.sums: dict[str, tuple[Tensor, int]] = {}  # what was logged since the last log line
        self.board = None

    def restore(self) -> int:
        """Loads the checkpoint, if there is one, and returns the first iteration.

        Also opens the run folder and decodes images into the cache. From here on, a signal ends
        the run after the current step.
        """
        checkpoint = self.args.checkpoint
        if checkpoint is not None:
            if checkpoint["class_names"] != list(self.data.class_names):
                raise InputError(f"--resume: trained on classes {checkpoint['class_names']}")
            for name, part in self.state.items():
                part.load_state_dict(checkpoint["state"][name])
            self.start, self.seconds = checkpoint["iteration"], checkpoint["seconds"]
            self.miou, self.sums = checkpoint["miou"], checkpoint["means"]
        if self.first:
            self._open_folder()
            self._announce()
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            self.data.train.prepare()
        if all_max(self.start) != self.start:
            raise InputError("--resume: ranks found different checkpoints; share the folder")
        self.data.train.prepare()  # the other ranks of this machine find the cache
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        self.resumed_seconds, self.clock = self.seconds, time.perf_counter()
        return self.start

    def batches(self, indices: list[int], transform: Callable, *, stream: int, start: int):
        """Returns an endless iterator of this rank's micro-batches, from batch `start` on.

        Each is a pair of images, RGB float (B,3,H,W) in [0,1], and labels, int64 (B,H,W). Another
        stream has another order of the images.
        """
        args, size = self.args, self.recipe.batch_size
        count = args.ranks * len(self.micro_batches)
        drawn = MicroBatches(
            self.data.train, indices, transform, size, self.micro_batches, count, args.seed, stream
        )
        return endless(drawn, start, args.workers, args.device)

    def log(self, values: dict[str, Tensor]) -> None:
        """Adds scalars to the means of the next log line, without waiting for the device."""
        for name, value in values.items():
            total, count = self.sums.get(name, (0, 0))
            self.sums[name] = (total + value.detach().float(), count + 1)

    def end_step(self, iteration: int, pictures: dict[str, Tensor]) -> None:
        """Logs, saves and evaluates when it is time to, and leaves after a signal.

        pictures are batches as save_samples takes them. "prediction" holds logits, (B,K,H,W).
        """
        done, last = iteration + 1, self.recipe.iterations
        number = all_max(self.signal)  # a signal may have reached one rank only
        evaluating = done % self.eval_every == 0 or done == last
        if done % self.log_every == 0 or evaluating:
            self._write_log_line(done)
        if evaluating and done < last:
            self._save(done)  # a signalled process may be killed before an evaluation ends
        if evaluating and self.first:
            self._evaluate(done, pictures)
        if evaluating or number or done % self.save_every == 0:
            self._save(done)
        if number and done < last:
            self._leave(done, number)

    def _on_signal(self, number: int, _) -> None:
        if self.signal and self.args.ranks == 1:  # a second Ctrl-C; torchrun repeats its signals
            _interrupt(number, None)
        self.signal = number

    def _open_folder(self) -> None:
        log, checkpoint = self.folder / "log.jsonl", self.args.checkpoint
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.folder)
        log.touch()
        # A killed run has logged more than its last checkpoint holds; those steps come again.
        os.truncate(log, min(log.stat().st_size, checkpoint["logged"]) if checkpoint else 0)
        if checkpoint is None or not (self.folder / "config.json").exists():
            (self.folder / "config.json").write_text(json.dumps(self._config(), indent=1))
            names = "".join(f"{name}\n" for name in self.names)
            (self.folder / "split.txt").write_text(names, "utf-8", "surrogateescape")

    def _announce(self) -> None:
        args, data, (labeled, unlabeled) = self.args, self.data, self.split
        print(f"{args.method} on {args.dataset}{', supervised only' if args.supervised else ''}")
        print("recipe: " + ", ".join(f"{k} {v}" for k, v in asdict(self.recipe).items()))
        print(
            f"data: {len(labeled)} labeled and {len(unlabeled)} unlabeled of {len(data.train)} "
            f"training images, {len(self.images)} {self.part} images, {data.num_classes} classes"
        )
        print(f"{args.device}, {args.precision}, torch {torch.__version__}, compile {args.compile}")
        if self.start >= self.recipe.iterations:
            print(f"finished already: {self.folder / 'result.json'}")
        elif self.start > 0:
            print(f"resumed at iteration {self.start}")
        print(f"output in {self.folder}", flush=True)

    def _means(self, done: int) -> dict[str, float]:
        """Means of what was logged, over all ranks. Stops a run whose numbers are not finite."""
        if self.args.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        for total, _ in self.sums.values():
            ranks.all_mean(total)
        means = {name: (total / count).item() for name, (total, count) in self.sums.items()}
        weights = [weight.detach().sum() for weight in self.networks["student"].parameters()]
        checked = {**means, "a weight of the student": torch.stack(weights).sum().item()}
        for name, value in checked.items():
            if not np.isfinite(value):
                last = self.folder / "last.pt"
                kept = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint"
                raise InputError(f"{name} is not finite at iteration {done} ({kept}); lower --lr?")
        return means

    def _write_log_line(self, done: int) -> None:
        means, self.sums = self._means(done), {}
        if not self.first:
            return
        lr = self.state["optimizer"].param_groups[0]["lr"]
        self._append({"iteration": done, **means, "lr": lr, "seconds": round(self.seconds, 2)})
        last = self.recipe.iterations
        rate = (done - self.start) / max(self.seconds - self.resumed_seconds, 1e-9)
        left = timedelta(seconds=round((last - done) / rate))
        values = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        miou = "" if self.miou is None else f"  mIoU {100 * self.miou:.2f}%"
        memory = f"{peak_memory(self.args.device):.2f} GiB"
        speed = f"{rate:.2f} steps/s  {left} left  {memory}"
        print(f"[{done}/{last}] {values}{miou}  {speed}", flush=True)

    def _evaluate(self, done: int, pictures: dict[str, Tensor]) -> None:
        last = self.recipe.iterations
        scores = evaluation.evaluate(self.networks, self.images, self.data.num_classes, self.args)
        self.miou = scores[self.headline]["miou"]
        self._append({"iteration": done, **scores})
        text = ", ".join(f"{name} {100 * score['miou']:.2f}%" for name, score in scores.items())
        print(f"[{done}/{last}] mIoU on {len(self.images)} {self.part} images: {text}", flush=True)
        pictures = {**pictures, "prediction": pictures["prediction"].argmax(1)}
        path = self.folder / "samples" / f"{done:06d}.png"
        evaluation.save_samples(path, pictures, self.data.palette)
        if done == last:
            self._write_result(scores)
            print(evaluation.iou_table(scores, self.data.class_names))
            print(f"headline: {self.headline}, {100 * self.miou:.2f}% mIoU; see {self.folder}")
        self.clock = time.perf_counter()  # the seconds of a run are those of its training

    def _write_result(self, scores: dict[str, dict]) -> None:
        entries = [json.loads(line) for line in (self.folder / "log.jsonl").open()]
        best = {}  # picked on the images that are scored: for comparison only
        for name in scores:
            miou, iteration = max((e[name]["miou"], e["iteration"]) for e in entries if name in e)
            best[name] = {"iteration": iteration, "miou": miou}
        result = {
            **{name: vars(self.args)[name] for name in ("method", "dataset", "supervised", "seed")},
            "labeled": len(self.names),
            "iterations": self.recipe.iterations,
            "headline": self.headline,
            "evaluated": self.part,
            "class_names": list(self.data.class_names),
            **scores,
            "best": best,
            "seconds": round(self.seconds, 1),
            "steps_per_second": round(self.recipe.iterations / self.seconds, 3),
            "peak_memory_gib": round(peak_memory(self.args.device), 2),
        }
        _replace(self.folder / "result.json", lambda p: p.write_text(json.dumps(result, indent=1)))

    def _save(self, done: int) -> None:
        self._means(done)
        if not self.first:
            return
        checkpoint = {
            **self._config(),
            "iteration": done,
            "headline": self.headline,
            "miou": self.miou,
            "seconds": self.seconds,
            "means": self.sums,
            "logged": (self.folder / "log.jsonl").stat().st_size,
            "labeled_names": self.names,
            "training_images": len(self.data.train),
            "class_names": list(self.data.class_names),
            "palette": [list(color) for color in self.data.palette],
            "state": {name: part.state_dict() for name, part in self.state.items()},
        }
        _replace(self.folder / "last.pt", lambda path: torch.save(checkpoint, path))

    def _config(self) -> dict:
        left_out = ("device", "workers", "compile", "checkpoint", "resume", "evaluate", "predict")
        left_out += ("out", "method", "output_dir", "rank", "ranks")
        git, commit = ["git", "describe", "--always", "--dirty", "--abbrev=40"], None
        if shutil.which("git"):
            done = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent)
            commit = done.stdout.strip() or None
        return {
            "method": self.args.method,
            "recipe": asdict(self.recipe),
            "args": {k: v for k, v in vars(self.args).items() if k not in left_out},
            "device": str(self.args.device),
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
            "commit": commit,
        }

    def _append(self, entry: dict) -> None:
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        for name, value in entry.items() if self.board else ():
            value = value["miou"] if isinstance(value, dict) else value
            self.board.add_scalar(name, value, entry["iteration"])

    def _leave(self, done: int, number: int) -> None:
        if self.first:
            launcher = "python"
            if self.args.ranks > 1:
                launcher = f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
            script, last = f"{self.args.method}.py", shlex.quote(str(self.folder / "last.pt"))
            stopped = f"{script}: stopped by {signal.Signals(number).name} after iteration {done}"
            print(f"{stopped}; go on with {launcher} {script} --resume {last}", file=sys.stderr)
        ranks.leave()
        sys.exit(128 + number)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Lets write() fill a temporary file, then renames it: path is never half-written."""
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        with partial.open("rb+") as file:  # otherwise a power failure could leave an empty file
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        partial.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({str(error).splitlines()[0]})") from error


def peak_memory(device: torch.device) -> float:
    """GiB that CUDA's allocator or this process held at most; NaN on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return float("nan")
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
