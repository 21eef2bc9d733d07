"""What surrounds a training loop: folder, log, checkpoints, evaluation, signals."""

import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common import InputError, cache, evaluation, interrupt, pictures, ranks
from common.datasets import Data, MicroBatches, check_classes, endless, waiting
from common.deeplab import unsound
from common.flags import commit, parse_args

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAVE_AFTER = 300  # seconds between checkpoints where --save-every is not given
PATIENCE = 5  # seconds that a run waits for data after a signal
ALARM = getattr(signal, "SIGALRM", signal.SIGINT)  # Windows has none


def main(method: str, doc: str, recipes: dict, network: Callable, train: Callable, preset=None):
    """Runs the command of a method file. A user's mistake or a signal ends it with one line."""
    for number in SIGNALS:
        signal.signal(number, interrupt)
    try:
        recipe, args = parse_args(method, doc, recipes, preset)
        if args.evaluate is None and args.predict is None:
            if args.ranks > 1:
                ranks.join(args)
            train(recipe, args)
            ranks.leave()
        elif args.rank == 0:  # one rank is enough
            run = evaluation.evaluate_checkpoint if args.evaluate else evaluation.predict_pictures
            run(recipe, args, network)
        return
    except KeyboardInterrupt as error:
        number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
        line, status = f"stopped by {number.name}{''.join(error.args[1:])}", 128 + number
    except torch.OutOfMemoryError:
        line, status = "out of memory: lower --batch-size, --size, --crop or --eval-crop", 2
    except (InputError, OSError, ImportError) as error:  # a loader process prepends a traceback
        line, status = str(error).strip().splitlines()[-1].removeprefix("common.InputError: "), 2
    finally:
        signal.signal(ALARM, signal.SIG_IGN)  # an alarm would kill the exiting interpreter
    if status == 2 or os.environ.get("RANK", "0") == "0":  # a signal reaches all ranks
        print(f"{method}.py: {line}", file=sys.stderr, flush=True)
    sys.exit(status)


def prepare(network: nn.Module, args, *, train: bool) -> nn.Module:
    """Sets precision, memory layout and compilation. To train, ranks average their gradients."""
    torch.backends.cudnn.benchmark = True
    network.to(memory_format=torch.channels_last)
    network.forward = evaluation.autocast(args)(network.forward)
    if args.compile:  # a graph for each batch size; by default the second one would be slower
        network.compile(dynamic=False)
    if train and args.ranks > 1:  # batch-norm statistics are averaged when they are used
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 renames broadcast_buffers
            return DistributedDataParallel(network, broadcast_buffers=False)
    return network


def in_columns(recipe: dict, changed: list[str]) -> str:
    """Formats a recipe in columns within 100 characters. Stars mark the changed numbers."""
    cells = []
    for name, value in recipe.items():
        text = " ".join(map(str, value)) if isinstance(value, tuple) else value
        cells.append(f"{'*' if name in changed else ' '} {name} {text}")
    width = max(map(len, cells)) + 1
    rows = math.ceil(len(cells) / max(1, 100 // width))
    lines = ["".join(cell.ljust(width) for cell in cells[row::rows]) for row in range(rows)]
    return "\n".join(line.rstrip() for line in lines)


class Session:
    """A training run. A checkpoint saves all of state: networks, optimizer and schedule.

    headline names the network to report. micro_batches are this rank's.
    """

    def __init__(self, recipe, args, data: Data, split, state, *, headline: str, accumulate=None):
        self.recipe, self.args, self.data, self.split, self.state = recipe, args, data, split, state
        self.headline, self.folder, self.first = headline, args.output_dir, args.rank == 0
        self.last, self.partial = self.folder / "last.pt", self.folder / "last.pt.partial"
        self.hint = f"; continue with --resume {shlex.quote(str(self.last))}"
        self.names = [data.train.names[index] for index in split[0]]
        self.networks = {name: state[name] for name in ("student", "teacher")}
        self.part, self.images = data.scored(args.evaluate_split)
        accumulate = accumulate or args.accumulate
        self.micro_batches = range(args.rank * accumulate, (args.rank + 1) * accumulate)
        self.log_every = max(10, min(100, recipe.iterations // 50))
        self.eval_every = args.eval_every or max(1, recipe.iterations // 8)
        self.save_every, self.saved = args.save_every, time.perf_counter()
        self.start, self.seconds, self.miou, self.signal, self.board = 0, 0.0, None, 0, None
        self.terminal = sys.stdout.isatty()
        self.shown, self.scoring = 0.0, 0.0  # time of the last line, seconds of an evaluation
        self.logged, self.pace = (0, 0.0), 0.0  # step and seconds of a log line, seconds a step
        self.sums: dict[str, tuple[Tensor, int]] = {}  # what was logged since the last log line
        self.named = {"headline": headline, "class_names": list(data.class_names)}

    def restore(self) -> int:
        """Prepares the folder, the state and the signals. Returns the first iteration."""
        if checkpoint := self.args.checkpoint:
            if checkpoint["class_names"] != list(self.data.class_names):
                raise InputError(f"--resume: trained on classes {checkpoint['class_names']}")
            evaluation.load_state(self.state, checkpoint)
            self.start, self.seconds = checkpoint["iteration"], checkpoint["seconds"]
            self.miou, self.sums = checkpoint["miou"], checkpoint["means"]
            self.logged = self.start, self.seconds
            self.scoring = checkpoint.get("scoring", 0.0)
        if self.first:
            self._open_folder()
        if ranks.all_max(self.start) != self.start:
            raise InputError("--resume: ranks found different checkpoints; share the folder")
        if self.first and not self.start and self.args.dataset != "streets":
            check_classes(self.data.train, self.split[0], self.data.class_names)
        for number in (ALARM, *SIGNALS):
            signal.signal(number, self._on_signal)
        self.clock = time.perf_counter()
        return self.start

    def batches(self, indices: list[int], transform: Callable, *, stream: int, start: int):
        """Yields this rank's micro-batches from batch `start` on. Each stream has its own order."""
        args, micro_batches, size = self.args, self.micro_batches, self.recipe.batch_size
        rest = (args.ranks * len(micro_batches), args.seed, stream)
        drawn = MicroBatches(self.data.train, indices, transform, size, micro_batches, *rest)
        return endless(drawn, start, args.workers, args.device)

    def log(self, values: dict[str, Tensor]) -> None:
        """Adds scalars to the means of the next log line, without waiting for the device."""
        for name, value in values.items():
            total, count = self.sums.get(name, (0, 0))
            self.sums[name] = (total + value.detach().float(), count + 1)

    def end_step(self, iteration: int, columns: dict[str, Tensor]) -> None:
        """Logs, evaluates and saves when it is time to. Leaves after a signal."""
        done, last = iteration + 1, self.recipe.iterations
        late = not self.save_every and time.perf_counter() - self.saved > SAVE_AFTER
        number = ranks.all_max(self.signal or int(late and self.first))  # 1: only time to save
        evaluating = done % self.eval_every == 0 or done == last
        logging = evaluating or done % self.log_every == 0
        saving = evaluating or number or (self.save_every and done % self.save_every == 0)
        if logging or saving:
            self._log_means(done, logging, saving)
        if saving:
            ranks.average_statistics(self.networks.values())
        if evaluating and number > 1 and self.first:
            self._save(done)  # the sender may kill the run during the evaluation
        if evaluating and self.first:
            self._evaluate(done, columns)
        if saving and self.first:
            self._save(done)
        if number > 1 and done < last:
            ranks.leave()
            raise KeyboardInterrupt(number, f" after iteration {done}{self.hint}")
        if self.first and self.terminal and done < last and time.perf_counter() > self.shown + 1:
            means = (f"{k} {v / n:.3g}" for k, (v, n) in self.sums.items())
            score = "" if self.miou is None else f"{self.headline} {100 * self.miou:.1f}% mIoU"
            line = "  ".join((f"[{done}/{last}]", self._left(done), score, *means))
            line = line[: shutil.get_terminal_size().columns - 1]
            print(f"{line}\033[K\r", end="", flush=True)  # the next line takes its place
            self.shown = time.perf_counter()

    def _left(self, done: int) -> str:
        """Returns the time to the end, at the latest speed, evaluations included."""
        last, every = self.recipe.iterations, self.eval_every
        evaluations = math.ceil(last / every) - (done - 1) // every  # with that of this step
        rest = (last - done) * self.pace + evaluations * self.scoring
        left = f"{rest / 60:.0f} min left" if rest > 90 else f"{rest:.0f} s left"
        return left if self.pace else ""  # no log line yet

    def _on_signal(self, number: int, _) -> None:
        # A second Ctrl-C stops at once, except during a save. (torchrun sends each signal again.)
        again = self.signal and self.args.ranks == 1 and number in SIGNALS
        self.signal = number if number in SIGNALS else self.signal
        late = waiting and time.monotonic() - waiting[0] > PATIENCE
        if late or (again and not self.partial.exists()):
            raise KeyboardInterrupt(self.signal, self.hint if self.last.exists() else "")
        if ALARM not in SIGNALS:
            signal.alarm(1)  # calls this again

    def _open_folder(self) -> None:
        args, log, config = self.args, self.folder / "log.jsonl", self.folder / "config.json"
        left_out = ("device", "workers", "compile", "checkpoint", "resume", "evaluate", "predict")
        left_out += ("out", "keep_aspect", "changed", "method", "output_dir", "rank", "ranks")
        self.config = {
            "method": args.method,
            "recipe": asdict(self.recipe),
            "args": {k: v for k, v in vars(args).items() if k not in left_out},
            "device": str(args.device),
            "versions": {"python": sys.version.split()[0], "torch": str(torch.__version__)},
            "commit": commit(),
        }
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # needs the package tensorboard

            self.board = SummaryWriter(self.folder)
        self.partial.unlink(missing_ok=True)  # of a killed run
        # A killed run repeats the steps after its checkpoint, so the log is cut back to there.
        # A log without this run's checkpoint belongs to another run and is emptied.
        continued = self.start and args.checkpoint["path"].parent.resolve() == self.folder.resolve()
        kept = log.read_bytes()[: args.checkpoint["logged"]] if continued and log.exists() else b""
        cache.write(log, lambda file: file.write(kept))
        if not continued or not config.exists():
            names = "".join(f"{name}\n" for name in self.names).encode("utf-8", "surrogateescape")
            cache.write(config, lambda file: file.write(json.dumps(self.config, indent=1).encode()))
            cache.write(self.folder / "split.txt", lambda file: file.write(names))
        counts = f"{len(self.names)} labeled and {len(self.split[1])} unlabeled"
        scored = f"{len(self.images)} {self.part} images, {self.data.num_classes} classes"
        print(f"{args.method} on {args.dataset}{', supervised only' if args.supervised else ''}")
        print("recipe (*: not as in the preset)" if args.changed else "recipe")
        print(in_columns(vars(self.recipe), args.changed))
        print(f"data: {counts} of {len(self.data.train)} training images, {scored}")
        compiled = "compiled (the first step may take minutes)" if args.compile else "not compiled"
        print(f"device: {args.device}, {args.precision}, networks {compiled}")
        resumed = f", resumed after iteration {self.start}" if self.start else ""
        resumed += ": it had ended" if self.start == self.recipe.iterations else ""
        print(f"output in {self.folder}{resumed}", flush=True)

    def _log_means(self, done: int, logging: bool, saving: bool) -> None:
        """Takes means over all ranks and refuses what is not finite. Logs if it is time to."""
        for total, _ in self.sums.values():
            ranks.all_mean(total)
        means = {name: (total / count).item() for name, (total, count) in self.sums.items()}
        state = {name: part.state_dict() for name, part in self.state.items()} if saving else {}
        if problem := unsound({name: total for name, (total, _) in self.sums.items()} | state):
            raise InputError(f"{problem} at step {done}, not saved in {self.last}; lower --lr?")
        now = time.perf_counter()  # item() has waited for the device
        self.seconds, self.clock = self.seconds + now - self.clock, now
        if logging:
            self.pace = (self.seconds - self.logged[1]) / (done - self.logged[0])
            self.logged = done, self.seconds
            lr, self.sums = self.state["optimizer"].param_groups[0]["lr"], {}
            speed = f"{done / self.seconds:.2f} steps/s  {self._left(done)}"
            if self.first:
                self._append(done, {**means, "lr": lr, "seconds": round(self.seconds, 2)}, speed)

    def _append(self, done: int, entry: dict, note: str) -> None:
        """Writes an entry to log.jsonl, to TensorBoard and, with the note, to stdout."""
        line, log = json.dumps({"iteration": done, **entry}) + "\n", self.folder / "log.jsonl"
        text = log.read_bytes() + line.encode()
        cache.write(log, lambda file: file.write(text))
        shown = {k: 100 * v["miou"] if isinstance(v, dict) else v for k, v in entry.items()}
        for name, value in shown.items() if self.board else ():
            self.board.add_scalar(name, value, done)
        values = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        clear = "\033[K" if self.terminal else ""  # the rest of the line that is rewritten
        print(f"[{done}/{self.recipe.iterations}] {values}  {note}{clear}", flush=True)

    def _evaluate(self, done: int, columns: dict[str, Tensor]) -> None:
        started = time.perf_counter()
        scores = evaluation.evaluate(self.networks, self.images, self.data.num_classes, self.args)
        self.miou = scores[self.headline]["miou"]
        self._append(done, scores, f"% mIoU on {len(self.images)} {self.part} images")
        curve = pictures.draw_curve(self.folder / "log.jsonl")
        cache.write(self.folder / "curve.png", partial(curve.save, format="PNG"))
        sheet = pictures.draw_samples(columns, self.data.palette, self.data.class_names)
        path = self.folder / f"samples/{done:06d}.png"
        cache.write(path, partial(sheet.save, format="PNG"))
        self.clock = time.perf_counter()  # the seconds of a run are those of its training
        self.scoring = self.clock - started
        if done < self.recipe.iterations:
            return
        result = {
            **{name: vars(self.args)[name] for name in ("method", "dataset", "supervised", "seed")},
            "labeled": len(self.names),
            "iterations": self.recipe.iterations,
            "evaluated": self.part,
            **self.named,
            **scores,
            "seconds": round(self.seconds, 1),
            "steps_per_second": round(self.recipe.iterations / self.seconds, 3),
            "gpu_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),  # 0 on a CPU
        }
        text = json.dumps(result, indent=1).encode()
        cache.write(self.folder / "result.json", lambda file: file.write(text))
        print(evaluation.iou_table(scores, self.data.class_names))
        print(f"reported as in the paper: {self.headline}, {100 * self.miou:.2f}% mIoU")

    def _save(self, done: int) -> None:
        checkpoint = {
            **self.config,
            **self.named,
            "iteration": done,
            "miou": self.miou,
            "seconds": self.seconds,
            "scoring": self.scoring,
            "means": self.sums,
            "logged": (self.folder / "log.jsonl").stat().st_size,
            "labeled_names": self.names,
            "training_names": self.data.train.names,
            "palette": [list(color) for color in self.data.palette],
            "state": {name: part.state_dict() for name, part in self.state.items()},
        }
        self.saved = time.perf_counter()
        cache.write(self.last, partial(torch.save, checkpoint))
