"""What surrounds a training loop: folder, log, checkpoints, signals, and the other commands.

A method file calls main(), which hands its train() a recipe and the flags; train() makes a Run
around its networks and goes through steps().
"""

import json
import platform
import shlex
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from common import InputError, is_first_to
from common.augment import without_label
from common.datasets import Batches, Data, endless
from common.deeplab import Loaded
from common.evaluation import (
    autocast,
    evaluate_checkpoint,
    iou_table,
    predict_pictures,
    save_samples,
    score,
)
from common.flags import numbered, parse_args
from common.processes import (
    SIGNALS,
    agree,
    ending,
    is_first_here,
    join,
    launcher,
    leave,
    meet,
    stop,
)
from common.record import best_scores, commit, peak_memory, summary_writer, write_atomically


def main(method: str, doc: str, recipes: dict, network: Callable, train: Callable, preset=None):
    """Run one command of a method file: train, or --evaluate or --predict with a checkpoint.

    network(recipe, num_classes, pretrained) builds what train(recipe, args) trains. preset: see
    parse_args. A user's mistake ends in one line on stderr and status 2.
    """
    with ending(method):
        meet()
        recipe, args = parse_args(method, doc, recipes, preset)
        if args.evaluate is None and args.predict is None:
            if args.processes > 1:
                join(args)
            train(recipe, args)
            leave()
        elif args.rank == 0:  # one process is enough
            (predict_pictures if args.predict else evaluate_checkpoint)(recipe, args, network)


def check_recipe(recipe, args, *, smallest_share: int = 2, accumulate: int | None = None) -> None:
    """InputError where batch size or length leave nothing to mix.

    A batch is split over processes and accumulate (--accumulate unless given); a share is mixed
    within itself, unless smallest_share is 1. Nor do images of different scales make a batch.
    """
    for name, off in (("scale_range", (1.0, 1.0)), ("scales", (1.0,))):
        if getattr(recipe, name, off) != off and recipe.crop is None:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag}: needs --crop, as scaled images differ in size")
    shares = args.processes * (accumulate or args.accumulate)
    if recipe.batch_size % shares:
        why = f"cannot be split into {shares} shares" + " (--group-size)" * (accumulate is not None)
        raise InputError(f"--batch-size {recipe.batch_size}: {why}")
    if args.supervised:
        return
    if recipe.batch_size < smallest_share * shares:
        raise InputError("--batch-size: a share of one image has no other to be mixed with")
    if getattr(recipe, "warmup", 0) >= recipe.iterations:
        raise InputError(f"--warmup {recipe.warmup}: no iteration is left for unlabeled images")


class Run:
    """Folder, log, checkpoints and clock of one training run; the loop stays the caller's.

    split holds the indices of the labeled and of the unlabeled images; state what a checkpoint
    keeps: student, teacher, optimizer and schedule. With args.checkpoint they go on from there.
    headline names the network that the paper reports, "student" or "teacher"; accumulate is the
    number of shares that a process makes of its batch, --accumulate unless given; weights says
    where the student's come from.
    """

    def __init__(
        self, recipe, args, data: Data, split, state: dict, *, weights, headline, accumulate=None
    ):
        self.recipe, self.args, self.data, self.split, self.state = recipe, args, data, split, state
        self.headline, self.share, self.first = headline, 0, args.rank == 0
        self.accumulate = accumulate or args.accumulate
        self.networks = {name: state[name] for name in ("student", "teacher")}
        self.names = [data.train.names[index] for index in split[0]]
        self.scored = data.scored(args.evaluate_split)
        self.start, self.seconds, self.miou = 0, 0.0, None
        self.means: dict[str, tuple[Tensor, int]] = {}  # sum and count
        if args.checkpoint is not None:
            self._restore(args.checkpoint)
        self.iteration, self.began, self.signal = self.start, self.seconds, 0
        if agree(self.start) != -agree(-self.start):
            raise InputError("--resume: not the same checkpoint in all processes; share the folder")
        board = summary_writer() if args.tensorboard else None
        self.folder = self._make_folder()
        self.board = board(self.folder) if board and self.first else None
        self.log_every = max(10, min(100, recipe.iterations // 50))
        self.eval_every = args.eval_every or max(1, recipe.iterations // 8)
        self.save_every = args.save_every or max(1, recipe.iterations // 40)
        self.student = self._ready_networks()
        self._announce(weights)

    def _ready_networks(self) -> torch.nn.Module:
        """Both as the device likes them; the student, whose gradients the processes share."""
        args = self.args
        torch.backends.cudnn.benchmark = True
        for network in self.networks.values():
            if args.device.type == "cuda":
                network.to(memory_format=torch.channels_last)
            # Around the networks only: masks, colour and losses stay float32.
            network.forward = autocast(args)(network.forward)
            if args.compile:
                network.compile()
        student = self.state["student"]
        # The first process's batch-norm statistics are everyone's.
        return DistributedDataParallel(student) if args.processes > 1 else student

    def batches(
        self, batch_size: int, *transforms: Callable, warmup=0, streams=1, replacement=False
    ) -> list[Iterator]:
        """Endless labeled batches; unlabeled ones, of streams orders, after warmup (steps).

        The labels of the latter, which the last of transforms makes, are 255 in padding, else 0.
        """
        args, batches = self.args, []
        if is_first_here():
            self.data.train.prepare()
        agree()
        self.data.train.prepare(build=False)
        for stream in range(1 + streams):
            indices = self.split[min(stream, 1)]
            change = without_label(transforms[-1]) if stream else transforms[0]
            what = (self.data.train, indices, batch_size, change, args.seed, stream)
            drawn = Batches(*what, replacement, part=args.rank, parts=args.processes)
            start = max(self.start, warmup if stream else 0)
            batches.append(endless(drawn, start, args.workers, args.device))
        return batches

    def shares(self, *batches: Iterator) -> Iterator[tuple[Tensor, ...]]:
        """The next batches' tensors, share by share."""
        tensors = [tensor for batch in batches for tensor in next(batch)]
        chunks = [tensor.chunk(self.accumulate) for tensor in tensors]
        for self.share, share in enumerate(zip(*chunks, strict=True)):
            yield share

    def forward(self, *, last: bool) -> AbstractContextManager:
        """Around a forward pass of the student; gradients are exchanged after the last one only."""
        last = last and self.share == self.accumulate - 1
        return nullcontext() if last or self.args.processes == 1 else self.student.no_sync()

    def step_seed(self, purpose: str) -> int:
        """Of this share's randomness; depends only on seed, step, purpose and share."""
        share = self.args.rank * self.accumulate + self.share
        words = (self.args.seed, self.iteration, zlib.crc32(purpose.encode()), share)
        return int(np.random.SeedSequence(words).generate_state(1)[0])

    def generator(self, purpose: str) -> torch.Generator:
        """Seeded so, on the device."""
        return torch.Generator(self.args.device).manual_seed(self.step_seed(purpose))

    def steps(self) -> Iterator[int]:
        """The iterations left. Between them: progress line, checkpoint, leaving on a signal."""
        last = self.recipe.iterations
        if self.start >= last:
            print(f"finished already: {self.folder / 'result.json'}")
            return
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        self.clock = time.perf_counter()
        for done in range(self.start + 1, last + 1):
            self.iteration = done - 1
            yield self.iteration
            if done % self.log_every == 0:
                self._progress(done)
            number = agree(self.signal)  # it may have reached one process only, or them apart
            if done % self.save_every == 0 or done == last or number:
                self._save(done)
            if number and done < last:
                self._leave(done, number)

    def log(self, **values: Tensor) -> None:
        """Add scalars of this step to the means of the next progress line; waits for nothing."""
        for name, value in values.items():
            total, count = self.means.get(name, (0, 0))
            self.means[name] = (total + value.detach().float(), count + 1)

    def evaluate_if_due(self, samples: dict[str, Tensor]) -> None:
        """Now and then, and after the last step: score both networks, write samples as a PNG.

        samples are batches as save_samples takes them, and the student's "logits" (B,K,H,W).
        """
        done, last = self.iteration + 1, self.recipe.iterations
        if done % self.eval_every and done != last:
            return
        self._progress(done)
        if done < last:  # evaluating may take longer than torchrun waits for a signalled process
            self._save(done)
        if not self.first:
            return
        scores = score(self.networks, self.data, self.args)
        self.miou = scores[self.headline]["miou"]
        self._append({"iteration": done, **scores})
        text = ", ".join(f"{name} {100 * score['miou']:.2f}%" for name, score in scores.items())
        part, images = self.scored
        print(f"[{done}/{last}] mIoU on {len(images)} {part} images: {text}", flush=True)
        samples["prediction"] = samples.pop("logits").argmax(1)
        save_samples(self.folder / "samples" / f"{done:06d}.png", samples, self.data.palette)
        if done == last:
            self._finish(scores)
        self.clock = time.perf_counter()

    def _announce(self, weights: Loaded | str) -> None:
        args, data, (labeled, unlabeled) = self.args, self.data, self.split
        part, images = self.scored
        print(f"{args.method} on {args.dataset}{', supervised only' * args.supervised}")
        print("recipe: " + ", ".join(f"{k} {v}" for k, v in asdict(self.recipe).items()))
        print(
            f"data: {len(labeled)} labeled and {len(unlabeled)} unlabeled of {len(data.train)} "
            f"training images, {len(images)} {part} images, {data.num_classes} classes"
        )
        print(f"weights: {weights}")
        print(f"evaluation: last iterate, whole images at {self.recipe.size or 'their own size'}")
        print(f"{args.device}, {args.precision}, torch {torch.__version__}, compile {args.compile}")
        resumed = f"resumed at iteration {self.start}; " * (self.start > 0)
        print(f"{resumed}output in {self.folder}", flush=True)

    def _progress(self, done: int) -> None:
        if not self.means:  # printed already
            return
        self._tick()
        self._average_means()
        self._check_finite(done)
        means = {name: (total / count).item() for name, (total, count) in self.means.items()}
        self.means = {}
        if not self.first:
            return
        rate = (done - self.start) / max(self.seconds - self.began, 1e-9)
        lr = self.state["optimizer"].param_groups[0]["lr"]
        self._append({"iteration": done, **means, "lr": lr, "seconds": round(self.seconds, 2)})
        left = timedelta(seconds=round((self.recipe.iterations - done) / rate))
        values = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        miou = "" if self.miou is None else f"  mIoU {100 * self.miou:.2f}%"
        progress = f"[{done}/{self.recipe.iterations}] {values}{miou}  {rate:.2f} steps/s"
        print(f"{progress}  {left} left  {peak_memory(self.args.device):.2f} GiB", flush=True)

    def _average_means(self) -> None:
        """Over the processes, in all of them: a checkpoint keeps the first one's."""
        for total, _ in self.means.values() if self.args.processes > 1 else ():
            dist.all_reduce(total.div_(self.args.processes))

    def _check_finite(self, done: int) -> None:
        values = {name: total for name, (total, _) in self.means.items()}
        values.update(self.state["student"].named_parameters())
        finite = torch.stack([value.detach().isfinite().all() for value in values.values()])
        if wrong := [name for name, good in zip(values, finite.tolist(), strict=True) if not good]:
            kept = self.folder / "last.pt"
            good = f"the last good checkpoint is {kept}" if kept.exists() else "no checkpoint yet"
            stopped = f"is not finite at iteration {done}: stopped ({good})"
            raise InputError(f"{wrong[0]} {stopped}; lower --lr?")

    def _save(self, done: int) -> None:
        self._tick()
        self._average_means()
        self._check_finite(done)
        if not self.first:
            return
        checkpoint = {
            **self._config(),
            "iteration": done,
            "headline": self.headline,
            "miou": self.miou,
            "seconds": self.seconds,
            "means": self.means,
            "logged": (self.folder / "log.jsonl").stat().st_size,
            "labeled_names": self.names,
            "training_images": len(self.data.train),
            "class_names": list(self.data.class_names),
            "palette": [list(color) for color in self.data.palette],
            "state": {name: thing.state_dict() for name, thing in self.state.items()},
        }
        write_atomically(self.folder / "last.pt", partial(torch.save, checkpoint))

    def _config(self) -> dict:
        left_out = ("device", "workers", "compile", "checkpoint", "resume", "evaluate", "predict")
        left_out += ("out", "method", "output_dir", "output_dir_given", "source", "rank")
        return {
            "method": self.args.method,
            "recipe": asdict(self.recipe),
            "args": {k: v for k, v in vars(self.args).items() if k not in left_out},
            "device": str(self.args.device),
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
            "commit": commit(),
        }

    def _restore(self, checkpoint: dict) -> None:
        if checkpoint["class_names"] != list(self.data.class_names):
            raise InputError(f"--resume: trained on other classes: {checkpoint['class_names']}")
        for name, thing in self.state.items():
            thing.load_state_dict(checkpoint["state"][name])
        self.start, self.seconds = checkpoint["iteration"], checkpoint["seconds"]
        self.miou, self.means = checkpoint["miou"], checkpoint["means"]

    def _make_folder(self) -> Path:
        """The folder given, or the first of FOLDER, FOLDER-2, ... that is free."""
        folder, fresh = Path(self.args.output_dir), self.args.checkpoint is None
        if not self.first:
            return folder
        if fresh and not self.args.output_dir_given:
            folder = next(path for path in numbered(self.args.output_dir) if not path.exists())
        last = folder / "last.pt"
        try:
            if last.exists() and not (self.args.source and last.samefile(self.args.source)):
                raise InputError(f"--output-dir {folder}: holds a run; add --resume auto to go on")
            folder.mkdir(parents=True, exist_ok=True)
            log = folder / "log.jsonl"
            # What a killed run logged after its last checkpoint is logged again.
            log.touch()
            log.write_bytes(log.read_bytes()[: 0 if fresh else self.args.checkpoint["logged"]])
            if fresh or not (folder / "split.txt").exists():
                (folder / "config.json").write_text(json.dumps(self._config(), indent=1))
                names = "".join(f"{name}\n" for name in self.names)
                (folder / "split.txt").write_text(names, "utf-8", "surrogateescape")
        except OSError as error:
            raise InputError(f"--output-dir {folder}: cannot write there ({error})") from error
        return folder

    def _finish(self, scores: dict[str, dict]) -> None:
        args = vars(self.args)
        result = {
            **{name: args[name] for name in ("method", "dataset", "supervised", "seed")},
            "labeled": len(self.names),
            "iterations": self.recipe.iterations,
            "headline": self.headline,
            "evaluated": self.scored[0],
            "class_names": list(self.data.class_names),
            **scores,
            "best": best_scores(self.folder / "log.jsonl", scores),
            "seconds": round(self.seconds, 1),
            "steps_per_second": round(self.recipe.iterations / self.seconds, 3),
            "peak_memory_gib": round(peak_memory(self.args.device), 2),
        }
        write = partial(Path.write_text, data=json.dumps(result, indent=1))
        write_atomically(self.folder / "result.json", write)
        print(iou_table(scores, self.data.class_names))
        print(f"headline: {self.headline}, {100 * self.miou:.2f}% mIoU; results in {self.folder}")

    def _append(self, entry: dict) -> None:
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        for name, value in entry.items() if self.board else ():
            value = value["miou"] if isinstance(value, dict) else value
            self.board.add_scalar(name, value, entry["iteration"])

    def _tick(self) -> None:
        """Count the time since the last tick; evaluation sets the clock anew."""
        if self.args.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now

    def _leave(self, done: int, number: int) -> None:
        if self.first and is_first_to("end"):
            script = f"{self.args.method}.py"
            stopped = f"{script}: stopped by {signal.Signals(number).name} after iteration {done}"
            command = f"{launcher()} {script} --resume {shlex.quote(str(self.folder / 'last.pt'))}"
            print(f"{stopped}; go on with {command}", file=sys.stderr, flush=True)
        agree()  # wait for the checkpoint: when one process has left torchrun kills the others
        leave()
        sys.exit(128 + number)

    def _on_signal(self, number: int, frame) -> None:
        if self.signal and self.args.processes == 1:  # asked twice: at once; torchrun repeats it
            stop(number, frame)
        self.signal = number
