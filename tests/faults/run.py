"""Long fault runs: python tests/faults/run.py kill|signals|ranks|fuzz [--count N] [--seed S].

kill     SIGKILL at a random time, also while saving; the resumed run must equal an undisturbed one
signals  SIGINT or SIGTERM at a random time from the first import on, in half of the cases twice
ranks    SIGKILL to one of two ranks; torchrun restarts them and the run ends
fuzz     damaged images, labels, text files, checkpoints, weights: InputError or a good result

Each prints what failed and ends with a line "tried N, passed N"; the status is 1 if any failed.
"""

import argparse
import io
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).parents[k]) for k in (1, 2)]

from conftest import METHODS, children, read_log, same_state, start, tiny, write_pair

STEPS = ("--iterations", "60", "--eval-every", "30", "--save-every", "2")
ENDS = ("stopped by SIGINT", "stopped by SIGTERM")


def make_camvid(root: Path) -> Path:
    for part, count in (("train", 8), ("val", 2)):
        for k in range(count):
            write_pair(
                root / part / f"{k}.png", root / f"{part}annot/{k}.png", (48, 64), 11, seed=k
            )
    return root


def end(process: subprocess.Popen) -> tuple[int, str, list[str]]:
    """Waits, at most two minutes. The lines on stderr come without the warning about CamVid."""
    try:
        out, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        return -1, "", ["hangs"]
    return process.returncode, out, [x for x in errors.splitlines() if "published" not in x]


def command(method: str, work: Path, folder: Path, *more) -> tuple[str, ...]:
    flags = (*tiny(method, work / "camvid"), *STEPS, "--output-dir", str(folder))
    return (f"{method}.py", *flags, *more)


def whole_run(method: str, work: Path) -> tuple[Path, float]:
    """The undisturbed run of a method, made once, and its seconds."""
    folder, begin = work / f"whole {method}", time.monotonic()
    if not folder.exists():
        assert end(start(*command(method, work, folder)))[0] == 0
        (folder / "seconds").write_text(str(time.monotonic() - begin))
    return folder, float((folder / "seconds").read_text())


def equal(one: Path, other: Path) -> str | None:
    try:
        same_state(one, other)
        assert read_log(one) == read_log(other), "log.jsonl differs"
        assert not [*other.glob("*.partial")], "a .partial is left"
    except Exception as error:
        return repr(error)
    return None


def wait_for_saving(folder: Path, process: subprocess.Popen) -> None:
    while not (folder / "last.pt.partial").exists() and process.poll() is None:
        pass


def kill(rng: random.Random, work: Path) -> str | None:
    method, folder = rng.choice(METHODS), work / "run"
    whole, seconds = whole_run(method, work)
    process = start(*command(method, work, folder))
    time.sleep(rng.uniform(0.5, 1) * seconds)
    if rng.random() < 0.5:
        wait_for_saving(folder, process)
    process.kill()
    end(process)
    for signals in (1, 0):  # the first resumed run is killed, too
        process = start(*command(method, work, folder, "--resume", "auto"))
        if signals:
            time.sleep(rng.uniform(0.3, 1) * seconds)
            process.kill()
        status, _, errors = end(process)
    return f"{method}: {status} {errors}" if status else equal(whole, folder)


def signals(rng: random.Random, work: Path) -> str | None:
    method, folder = rng.choice(METHODS), work / "run"
    whole, seconds = whole_run(method, work)
    process = start(*command(method, work, folder))
    time.sleep(rng.uniform(0.1, 1) * seconds)
    twice = rng.random() < 0.5
    if twice and (folder / "config.json").exists():
        wait_for_saving(folder, process)
    number = rng.choice((signal.SIGINT, signal.SIGTERM))
    for _ in range(1 + twice):
        process.send_signal(number)
        time.sleep(0.002)
    status, _, errors = end(process)
    early = number == signal.SIGTERM and status == -number  # the shell's own message
    one_line = len(errors) == 1 and any(text in errors[0] for text in ENDS)
    if status != 0 and not early and not (one_line and status == 128 + number):
        return f"{method}: {number} {twice}: {status} {errors}"
    if one_line and (folder / "last.pt").exists() and "--resume" not in errors[0]:
        return f"{method}: no hint: {errors}"
    if folder.exists() and [*folder.glob("*.partial")]:
        return f"{method}: a .partial is left"
    status, _, errors = end(start(*command(method, work, folder, "--resume", "auto")))
    return f"{method}: {status} {errors}" if status else equal(whole, folder)


def ranks(rng: random.Random, work: Path) -> str | None:
    folder, options = work / "run", ("--max-restarts=1", "--monitor-interval=0.1")
    flags = command("classmix", work, folder, "--resume", "auto")
    process = start(*flags, ranks=2, options=options)
    deadline = time.monotonic() + 100
    while not (folder / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(rng.uniform(0, 2))
    if found := children(process):
        os.kill(rng.choice(found), signal.SIGKILL)
    status, _, errors = end(process)
    done = status == 0 and (folder / "result.json").exists()
    return None if done else f"{status} {errors[-3:]}"


# ---- Damage ----


def chunks(rng: random.Random, data: bytes) -> bytes:
    """Damages, drops or adds a chunk of a PNG, with a right checksum."""
    out, place, found = [data[:8]], 8, []
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        found.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += length + 12
    kind = rng.choice((b"iCCP", b"pHYs", b"gAMA", b"zTXt", b"tRNS", b"PLTE", b"eXIf", b"cHRM"))
    big = b"a\0\0" + zlib.compress(bytes(2**21))
    found.insert(rng.randrange(len(found) + 1), (kind, rng.choice((b"", rng.randbytes(9), big))))
    k = rng.randrange(len(found))
    found[k] = (found[k][0], flips(rng, found[k][1] or b"\0"))
    if rng.random() < 0.2:
        del found[rng.randrange(len(found))]
    for name, content in found:
        crc = struct.pack(">I", zlib.crc32(name + content))
        out.append(struct.pack(">I", len(content)) + name + content + crc)
    return b"".join(out)


def flips(rng: random.Random, data: bytes) -> bytes:
    damaged, reach = bytearray(data), rng.choice((40, len(data)))
    for _ in range(rng.randint(1, 5)):
        damaged[rng.randrange(min(reach, len(data)))] = rng.randrange(256)
    return bytes(damaged)


def truncated(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def fuzz(rng: random.Random, work: Path) -> str | None:
    """One damaged file, read as training reads it."""
    import classmix
    from common import InputError, datasets, deeplab, evaluation, flags, layouts

    warnings.simplefilter("ignore")
    small, table = classmix.RECIPES["streets"], layouts._table(range(19))
    net = classmix.network(small, 11, pretrained=False)
    if not (work / "last.pt").exists():
        whole, _ = whole_run("classmix", work)
        shutil.copy(whole / "last.pt", work / "last.pt")
        torch.save(net.state_dict(), work / "weights.pt")
        (work / "classes.txt").write_text("road\ncar\nsky\n", "utf-16")
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 19, (12, 16)).astype(np.uint8))

    def picture(kind: str) -> bytes:
        file = io.BytesIO()
        (pixels if kind == "PNG" else pixels.convert("RGB")).save(file, kind)
        return file.getvalue()

    def read_checkpoint(path: Path):
        for flag in ("--resume", "--evaluate"):
            argv = [flag, str(path)]
            recipe, args = flags.parse_args("classmix", "", classmix.RECIPES, argv=argv)
            evaluation._load_network(recipe, args, classmix.network, "teacher")

    def read_images(path: Path):
        datasets._check_pair(path, path if path.suffix == ".png" else None)
        evaluation.predict(net, path, (16, 16), "cpu")
        if path.suffix == ".png":
            datasets._read_label(path, table)

    kinds = (
        "PNG",
        "PNG",
        "PPM",
        "SGI",
        "BMP",
        "TIFF",
        "JPEG",
        "WEBP",
        "classes",
        "last",
        "weights",
    )
    kind, damages = rng.choice(kinds), [flips, truncated]
    if kind.isupper():
        data, path, read = picture(kind), work / f"x.{kind.lower()}", read_images
        damages += [chunks] if kind == "PNG" else []
    else:
        path = work / {"classes": "x.txt", "last": "x/last.pt", "weights": "x.pt"}[kind]
        source = {"classes": "classes.txt", "last": "last.pt", "weights": "weights.pt"}[kind]
        data = (work / source).read_bytes()
        load = lambda path: deeplab.load_weights(net, path)  # noqa: E731
        read = {"classes": layouts.read_lines, "last": read_checkpoint, "weights": load}[kind]
    path.parent.mkdir(exist_ok=True)
    damage = rng.choice(damages)
    path.write_bytes(damage(rng, data))
    signal.alarm(60)
    try:
        read(path)
    except InputError as error:
        one_line = "\n" not in str(error) and str(path) in str(error)
        return None if one_line else f"{kind}: {error}"
    except SystemExit as stop:
        return None if stop.code == 2 else f"{kind}: {stop.code}"
    except Exception as error:
        shutil.copy(path, Path(tempfile.gettempdir()) / f"fault{path.suffix}")
        return f"{kind}, {damage.__name__}: {error!r}"
    finally:
        signal.alarm(0)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("kill", "signals", "ranks", "fuzz"))
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args, passed = parser.parse_args(), 0
    with tempfile.TemporaryDirectory() as name:
        make_camvid(Path(name) / "camvid")
        for k in range(args.count):
            shutil.rmtree(Path(name) / "run", ignore_errors=True)
            problem = globals()[args.what](random.Random(f"{args.seed} {k}"), Path(name))
            passed += problem is None
            if problem:
                print(f"{args.what} {k}: {problem}", flush=True)
    print(f"{args.what}: tried {args.count}, passed {passed}")
    sys.exit(passed < args.count)


if __name__ == "__main__":
    main()
