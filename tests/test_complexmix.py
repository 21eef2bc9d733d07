"""The draw of p, what complexmix.py shares with classmix.py, and its loop."""

import difflib
import inspect
import itertools
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import record

import classmix
import complexmix
from common import ranks
from complexmix import complex_mask, draw_blocks


def test_p_is_uniform_and_independent_in_each_step_and_seed():
    blocks, count = (4, 16, 64, 128), 4000
    drawn, again, other = ([draw_blocks(blocks, s, t) for t in range(count)] for s in (0, 0, 1))
    assert drawn == again
    assert all(drawn[k : k + 50] != other[:50] for k in range(8))  # not a shifted copy either
    pairs = np.unique(list(itertools.pairwise(drawn)), axis=0, return_counts=True)[1] / count
    assert len(pairs) == 16 and np.abs(pairs - 1 / 16).max() < 4 * math.sqrt(15 / 16**2 / count)


def test_the_loop_is_nearly_the_same_text():
    loops = [inspect.getsource(method.train).splitlines() for method in (classmix, complexmix)]
    changes = [line for line in difflib.ndiff(*loops) if line[0] in "+-"]
    assert 10 < len(changes) <= 30, "\n".join(changes)


def test_recipes_differ_from_classmix_s_only_in_the_warm_up():
    ours, theirs = complexmix.RECIPES, classmix.RECIPES
    assert ours.keys() == theirs.keys()
    for name in ours:
        a, b = asdict(ours[name]), asdict(theirs[name])
        different = {key for key in a.keys() & b.keys() if a[key] != b[key]}
        # With the recipe of streets the supervised runs of both files are the same.
        assert different <= {"warmup"} and (name != "streets" or not different)
    paper = ours["cityscapes"]
    assert (paper.blocks, paper.classes, paper.warmup) == ((4, 16, 64, 128), "all", 1_000)
    assert (paper.size, paper.batch_size, paper.iterations) == ((512, 1024), 2, 40_000)
    assert (paper.lr, paper.momentum, paper.weight_decay) == (2.5e-4, 0.9, 5e-4)


TINY = "--dataset camvid --labeled 4 --size 24 32 --weights none --layers 1 1 1 1 --width 4 "
TINY += "--workers 0 --aspp-rates 1 2 --lr 0.05 --iterations 4 --confidence-threshold 0.6"


def train(camvid, *flags, method="complexmix"):
    """Returns the session of a tiny run."""
    return record(method, "--data-dir", camvid, *TINY.split(), *flags)


def weights(session):
    """All numbers of both networks in one vector, batch-norm statistics too."""
    states = [session.state[name].state_dict() for name in ("student", "teacher")]
    return torch.cat([v.flatten().float() for state in states for v in state.values()])


def test_each_step_has_its_own_p(camvid):
    flags = ("--seed", 5, "--warmup", 2, "--iterations", 8, "--blocks", 2, 3, 7)
    flags += ("--mean", 51, 102, 204)
    session, blocks = train(camvid, *flags), [draw_blocks((2, 3, 7), 5, t) for t in range(8)]
    assert session.state["student"].mean.flatten().tolist() == pytest.approx([0.2, 0.4, 0.8])
    assert ["mask" in pictures for pictures in session.pictures] == [False] * 2 + [True] * 6
    assert set(blocks[2:]) == {2, 3, 7}
    for t, pictures in list(enumerate(session.pictures))[2:]:
        rng = torch.Generator().manual_seed(ranks.step_seed(5, t, 0, "mask"))
        mask = complex_mask(pictures["pseudo_label"], 11, blocks[t], generator=rng)
        assert torch.equal(mask, pictures["mask"])


SAME = """| --accumulate 2 --batch-size 4 | --supervised | --mean 51 102 204
| --momentum 0.5 --weight-decay 0.1 --head-factor 3 --lr-power 2
| --flip --crop 32 48 --scale-range 0.5 1.5 | --optimizer adam --lr 0.001 --weighting pixel
| --weight-scope sample --ema-decay 0.5 --confidence-threshold 0.5 | --width 6 --aspp-rates 1 3"""


@pytest.mark.parametrize("flags", SAME.replace("\n", " ").split("|"))
def test_one_block_of_present_classes_trains_as_classmix(camvid, flags):
    flags = (*flags.split(), "--warmup", 0)
    ours = train(camvid, "--blocks", 1, "--classes", "present", *flags)
    theirs = train(camvid, *flags, method="classmix")
    assert torch.equal(weights(ours), weights(theirs))
