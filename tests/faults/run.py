"""Long fault runs: python tests/faults/run.py kill|signals|ranks|fuzz [--count N] [--seed S].

kill: SIGKILL, often while saving; signals: SIGINT or SIGTERM, also twice and during imports; after
either, the resumed run must equal an undisturbed one. ranks: SIGKILL to a rank. fuzz: a damaged
file must give an InputError that names it, or be read. The last line says: tried N, passed N.
"""

import argparse
import io
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import zlib
from importlib import import_module
from pathlib import Path

from PIL import Image

sys.path[:0] = [str(Path(__file__).parents[k]) for k in (1, 2)]
conftest = import_module("conftest")
STEPS = ("--iterations", 40, "--eval-every", 20, "--save-every", 1, "--resume", "auto")


def command(method: str, work: Path, name="run") -> list[str]:
    return [
        f"{method}.py",
        *conftest.tiny(method, work / "camvid"),
        *map(str, STEPS),
        "--output-dir",
        str(work / name),
    ]


def fork(method: str, work: Path, name="run") -> int:
    """Starts a tiny run in a copy of this process, which has imported everything."""
    module = import_module(method)
    if child := os.fork():
        return child
    sys.argv, sys.stdout, sys.stderr = command(method, work, name), io.StringIO(), io.StringIO()
    try:
        module.main()
    except SystemExit as stop:
        os._exit(stop.code)
    finally:
        (work / "stderr").write_text(sys.stderr.getvalue())
    os._exit(0)


def check(method: str, work: Path) -> None:
    """Resumes the run and compares its end with that of an undisturbed run."""
    whole = work / f"whole {method}"
    for folder in (whole, work / "run"):
        if folder != whole or not whole.exists():
            status = os.waitpid(fork(method, work, folder.name), 0)[1]
            assert status == 0, f"{method}: {(work / 'stderr').read_text()}"
    conftest.same_state(whole, work / "run")
    assert conftest.read_log(whole) == conftest.read_log(work / "run"), f"{method}: another log"
    assert not [*work.glob("run/*.partial")], f"{method}: a .partial"


def wait(rng: random.Random, work: Path, longest: float) -> None:
    """Waits for a random time and then, in half of the cases, until a checkpoint is written."""
    time.sleep(rng.uniform(0, longest))
    deadline = time.monotonic() + rng.choice((0, 9))
    while time.monotonic() < deadline and not (work / "run/result.json").exists():
        if (work / "run/last.pt.partial").exists():
            return


def kill(rng: random.Random, work: Path) -> None:
    method = rng.choice(conftest.METHODS)
    for _ in range(2):  # the resumed run is killed, too
        child = fork(method, work)
        wait(rng, work, 3)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    check(method, work)


def signals(rng: random.Random, work: Path) -> None:
    method, number = rng.choice(conftest.METHODS), rng.choice((signal.SIGINT, signal.SIGTERM))
    process = conftest.start(*command(method, work))
    time.sleep(0.3)  # Python itself starts
    wait(rng, work, 12)
    for _ in range(rng.choice((1, 2))):
        process.send_signal(number)
        time.sleep(0.001)
    status, _, errors = conftest.finish(process)
    lines = conftest.problems(errors)
    stopped = status == 128 + number and len(lines) == 1 and f"by {number.name}" in lines[0]
    early = status == -number == -signal.SIGTERM and not lines  # during the imports
    assert stopped or early or (status, lines) == (0, []), f"{method}: {status} {errors}"
    hint = not (work / "run/last.pt").exists() or status <= 0 or "--resume" in lines[0]
    assert hint, f"{method}: {lines}"
    check(method, work)


def ranks(rng: random.Random, work: Path) -> None:
    options = ("--max-restarts=1", "--monitor-interval=0.1")
    process = conftest.start(*command("classmix", work), ranks=2, options=options)
    while not (work / "run/last.pt").exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(rng.uniform(0, 1))
    for child in rng.sample(conftest.children(process), 1):
        os.kill(child, signal.SIGKILL)
    status, _, errors = conftest.finish(process)
    assert status == 0 and (work / "run/result.json").exists(), errors


def damaged(rng: random.Random, data: bytes, png: bool) -> bytes:
    """Flips bytes, cuts the end or, with right checksums, changes and adds chunks of a PNG."""
    if (kind := rng.randrange(3)) == 0:
        return data[: rng.randrange(len(data))]
    if png and kind == 1:
        found, place = [], 8
        while place < len(data):
            (size,) = struct.unpack(">I", data[place : place + 4])
            found.append(data[place + 4 : place + 8 + size])
            place += size + 12
        names = (b"iCCP", b"pHYs", b"gAMA", b"zTXt", b"tRNS", b"PLTE", b"eXIf", b"cHRM", b"")
        content = rng.choice((b"", rng.randbytes(9), b"a\0\0" + zlib.compress(bytes(2**21))))
        found.insert(rng.randrange(len(found) + 1), rng.choice(names) + content)
        k = rng.randrange(len(found))
        found[k] = found[k][:4] + damaged(rng, found[k][4:] + b"\0", False)
        chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in found if len(c) > 3)  # fmt: skip  # noqa: E501
        return data[:8] + b"".join(chunks)
    changed, reach = bytearray(data), min(len(data), rng.choice((40, 10**9)))
    for _ in range(rng.randint(1, 5)):
        changed[rng.randrange(reach)] = rng.randrange(256)
    return bytes(changed)


def fuzz(rng: random.Random, work: Path) -> None:
    from common import InputError, datasets, deeplab, evaluation, flags, layouts

    classmix = import_module("classmix")

    def use_checkpoint(path: Path) -> None:
        argv = [rng.choice(("--resume", "--evaluate")), str(path)]
        recipe, args = flags.parse_args("classmix", "", classmix.RECIPES, argv=argv)
        evaluation._load_network(recipe, args, classmix.network, "teacher")

    def use_picture(path: Path) -> None:
        datasets._check_pair(path, path if path.suffix == ".png" else None)
        datasets.read_image(path, evaluation.ImageOps.exif_transpose)
        if path.suffix == ".png":
            datasets._read_label(path, layouts._table(range(11)))

    def use_weights(path: Path) -> None:
        deeplab.load_weights(
            deeplab.DeepLabV2(11, layers=(1, 1, 1, 1), width=4, rates=(1, 2)), path
        )

    whole = work / "whole classmix"
    if not whole.exists():
        os.waitpid(fork("classmix", work, whole.name), 0)
        picture = Image.open(work / "camvid/trainannot/000.png")
        for kind in ("png", "ppm", "sgi", "bmp", "tif", "jpg", "webp"):
            (picture if kind == "png" else picture.convert("RGB")).save(work / f"x.{kind}")
        (work / "x.txt").write_bytes("road\ncar\n".encode("utf-16"))
        shutil.copy(whole / "last.pt", work / "x.pt")
    source = rng.choice([*work.glob("x.*"), work / "x.png", work / "x.pt"])
    uses = {".pt": rng.choice((use_checkpoint, use_weights)), ".txt": layouts.read_lines}
    path = work / "damaged" / source.name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(damaged(rng, source.read_bytes(), source.suffix == ".png"))
    signal.alarm(60)  # a hang ends this program
    try:
        uses.get(path.suffix, use_picture)(path)
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error), error
    signal.alarm(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("kill", "signals", "ranks", "fuzz"))
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args, passed = parser.parse_args(), 0
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for k, part in enumerate(["train"] * 8 + ["val"] * 2):
            image = work / f"camvid/{part}/{k:03d}.png"
            label = work / f"camvid/{part}annot/{k:03d}.png"
            conftest.write_pair(image, label, (48, 64), 11, seed=k)
        for k in range(args.count):
            shutil.rmtree(work / "run", ignore_errors=True)
            try:
                globals()[args.what](random.Random(f"{args.seed} {k}"), work)
                passed += 1
            except Exception as error:
                print(f"{args.what} --seed '{args.seed} {k}': {error!r}", flush=True)
    print(f"{args.what}: tried {args.count}, passed {passed}")
    sys.exit(passed < args.count)


if __name__ == "__main__":
    main()
