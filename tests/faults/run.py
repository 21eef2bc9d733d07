"""Long fault runs: python tests/faults/run.py kill|signals|ranks|fuzz [--count N] [--seed S].

kill: SIGKILL, often while saving; signals: SIGINT or SIGTERM, also twice and during imports; after
either, the resumed run must equal an undisturbed one. ranks: SIGKILL to a rank. fuzz: a damaged
file must give an InputError that names it, or be read. The last line says: tried N, passed N.
"""

import argparse
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import zlib
from functools import partial
from importlib import import_module
from pathlib import Path

from PIL import Image

sys.path[:0] = [str(Path(__file__).parents[k]) for k in (1, 2)]
conftest = import_module("conftest")
STEPS = ("--iterations", 40, "--eval-every", 20, "--save-every", 1, "--resume", "auto")
CHUNKS = (b"iCCP", b"pHYs", b"gAMA", b"zTXt", b"tRNS", b"PLTE", b"eXIf", b"cHRM", b"IDAT", b"IEND")


def command(method: str, folder: Path) -> list[str]:
    flags = (*conftest.tiny(method, folder.parent / "camvid"), *STEPS, "--output-dir", folder)
    return [f"{method}.py", *map(str, flags)]


def check(method: str, work: Path) -> None:
    """Resumes the run and compares its end with that of an undisturbed run."""
    whole = work / f"whole {method}"
    for folder in (work / "run",) if whole.exists() else (whole, work / "run"):
        status, _, errors = conftest.finish(conftest.start(*command(method, folder)))
        assert status == 0, errors
    conftest.same_state(whole, work / "run")
    assert conftest.read_log(whole) == conftest.read_log(work / "run"), f"{method}: another log"
    assert not [*work.glob("run/*.partial")], f"{method}: a .partial"


def stop(numbers: tuple, rng: random.Random, work: Path) -> None:
    """Sends a signal at a random time or, in half of the cases, while a checkpoint is written."""
    method, number = rng.choice(conftest.METHODS), rng.choice(numbers)
    process = conftest.start(*command(method, work / "run"))
    time.sleep(rng.uniform(0.3, 12))
    deadline = time.monotonic() + rng.choice((0, 9))
    while time.monotonic() < deadline and not (work / "run/last.pt.partial").exists():
        pass
    for _ in range(rng.choice((1, 2))):
        process.send_signal(number)
        time.sleep(0.001)
    status, _, errors = conftest.finish(process)
    lines = conftest.problems(errors) or [""]
    hint = "--resume" in lines[0] or not (work / "run/last.pt").exists()
    stopped = status == 128 + number and f"by {number.name}" in lines[0] and hint
    silent = status in (0, -signal.SIGKILL, -signal.SIGTERM)  # SIGTERM: during the imports
    assert len(lines) == 1 and (stopped or silent), f"{method}: {status} {errors}"
    check(method, work)


def ranks(rng: random.Random, work: Path) -> None:
    options = ("--max-restarts=1", "--monitor-interval=0.1")
    process = conftest.start(*command("classmix", work / "run"), ranks=2, options=options)
    while not (work / "run/last.pt").exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(rng.uniform(0, 1))
    for child in rng.sample(conftest.children(process), 1):
        os.kill(child, signal.SIGKILL)
    status, _, errors = conftest.finish(process)
    assert status == 0 and (work / "run/result.json").exists(), errors


def damage(rng: random.Random, data: bytes, png: bool) -> bytes:
    """Cuts the end, changes bytes or, with a right checksum, damages or adds a chunk of a PNG."""
    kind = rng.randrange(3 if png else 2)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        changed, reach = bytearray(data), min(len(data), rng.choice((40, 10**9)))
        for _ in range(rng.randint(1, 5)):
            changed[rng.randrange(reach)] = rng.randrange(256)
        return bytes(changed)
    content = rng.choice((b"", rng.randbytes(9), b"a\0\0" + zlib.compress(bytes(2**21))))
    header, chunk = data[12:29], rng.choice(CHUNKS) + content
    chunks = rng.choice(([header, chunk], [b"IHDR" + damage(rng, header[4:], False)]))
    pack = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return data[:8] + b"".join(pack) + data[33:]


def fuzz(rng: random.Random, work: Path) -> None:
    from common import InputError, datasets, deeplab, evaluation, flags, layouts

    classmix, last = import_module("classmix"), work / "run/last.pt"
    if not (work / "x.pt").exists():
        conftest.finish(conftest.start(*command("classmix", last.parent)))
        shutil.copy(last, work / "x.pt")
        picture = Image.open(work / "camvid/trainannot/0.png")
        for kind in ("png", "ppm", "sgi", "bmp", "tif", "jpg", "webp"):
            (picture if kind == "png" else picture.convert("RGB")).save(work / f"x.{kind}")
        (work / "x.txt").write_bytes("road\ncar\n".encode("utf-16"))
    source = rng.choice([*work.glob("x.*"), work / "x.png", work / "x.pt"])
    path, kind = work / f"damaged{source.suffix}", source.suffix
    path.write_bytes(damage(rng, source.read_bytes(), kind == ".png"))
    signal.alarm(60)  # a hang ends this program
    try:
        if kind == ".txt":
            layouts.read_lines(path)
        elif kind == ".pt" and rng.random() < 0.5:
            net = deeplab.DeepLabV2(11, layers=(1, 1, 1, 1), width=4, rates=(1, 2))
            deeplab.load_weights(net, path)
        elif kind == ".pt":
            argv = [rng.choice(("--resume", "--evaluate")), str(path)]
            recipe, args = flags.parse_args("classmix", "", classmix.RECIPES, argv=argv)
            evaluation._load_network(recipe, args, classmix.network, "teacher")
        else:
            layouts.check_pair(path, path if kind == ".png" else None)
            datasets.read_image(path, evaluation.ImageOps.exif_transpose)
        if kind == ".png":
            layouts.read_label(path, layouts._table(range(11)))
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error), error
    signal.alarm(0)


RUNS = {"kill": partial(stop, (signal.SIGKILL,)), "ranks": ranks, "fuzz": fuzz}
RUNS["signals"] = partial(stop, (signal.SIGINT, signal.SIGTERM))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=RUNS)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args, passed = parser.parse_args(), 0
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for k, part in enumerate(["train"] * 8 + ["val"] * 3):
            image, label = (work / f"camvid/{part}{end}/{k}.png" for end in ("", "annot"))
            conftest.write_pair(image, label, (48, 64), 11, seed=k)
        for k in range(args.count):
            shutil.rmtree(work / "run", ignore_errors=True)
            try:
                RUNS[args.what](random.Random(f"{args.seed} {k}"), work)
                passed += 1
            except Exception as error:
                print(f"{args.what}, {k} of --seed {args.seed}: {error!r}", flush=True)
    print(f"{args.what}: tried {args.count}, passed {passed}")
    sys.exit(passed < args.count)


if __name__ == "__main__":
    main()
