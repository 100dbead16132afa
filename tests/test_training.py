"""A training of any script can be stopped at any moment and goes on exactly; and the pictures that it is given."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import equal, run, save_noise, state

import common
from common import Crops, InputError

TRAININGS = {
    "johnson": "johnson.py train --style style.png --data x -o {}/a.pth --iterations",
    "cyclegan": "cyclegan.py train x y --epochs 1 --decay-epochs 99999 --pool-size 2 --batch-size 2 -o {} --max-steps",
}


@pytest.fixture(params=TRAININGS)
def training(request):
    """Return a command line, to be formatted with an output folder and followed by the number of steps."""
    save_noise("style.png", *(f"x/{i:02d}.png" for i in range(19)), *(f"y/{i}.png" for i in range(11)))
    return TRAININGS[request.param]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(training, workers):
    """In the middle of an epoch, with a pool that has begun to exchange pictures, while the learning rate falls."""
    run(training.format("whole"), 23, "--workers", workers)
    for steps in (4, 13, 23, 23):  # the same command again and again
        run(training.format("parts"), steps, "--workers", workers, "--resume")
    equal(state("whole"), state("parts"))
    tables = [next(Path(folder).glob("*losses.csv")).read_text() for folder in ("whole", "parts")]
    assert tables[0] == tables[1]
    assert [row.split(",")[0] for row in tables[0].splitlines()] == ["step", "1", "10", "20"]


PROGRAM = """
import itertools, os, pathlib, signal, sys, conftest
replace, numbers, writes = pathlib.Path.replace, itertools.count(1), int(sys.argv[1])
pathlib.Path.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL) if next(numbers) == writes else replace(*a)
conftest.run(*sys.argv[2:])
"""


@contextlib.contextmanager
def start(*command, writes=0):
    """Run a command in a process of its own, which kills itself in the middle of writing file number `writes`."""
    words = [sys.executable, "-c", PROGRAM, *map(str, (writes, *command))]
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    with Path("log").open("w") as log:
        process = subprocess.Popen(words, stderr=log, env=os.environ | paths, start_new_session=True)
    try:
        yield process
        process.wait(100)
    finally:
        process.kill()


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
@pytest.mark.parametrize("writes", [4, 5, 7])
def test_killed_while_it_writes(training, writes):
    command = [training.format("a"), 6, "--checkpoint-every", 2]
    with start(*command, writes=writes) as process:
        pass
    assert process.returncode == -signal.SIGKILL
    run(*command, "--resume")
    run(training.format("b"), 6)
    equal(state("a"), state("b"))
    assert not list(Path().rglob("*.part"))


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_ctrl_c_writes_a_checkpoint_that_resumes_exactly(training):
    """It reaches the processes that load pictures as well, as in a terminal."""
    with start(training.format("a"), 10**5, "--workers", 1) as process:
        while "total" not in Path("log").read_text():  # in the progress bar
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
    assert process.returncode == 130
    assert "Traceback" not in Path("log").read_text()
    reached = state("a")["step"]
    for folder in "ab":
        run(training.format(folder), reached + 2, "--resume")
    equal(state("a"), state("b"))


def test_what_the_command_line_says_is_taken_and_told(training, capsys):
    """A training can be prolonged, and go on with another learning rate, and with more pictures."""
    run(training.format("a"), 4, "--lr", "2e-3")
    save_noise("x/new.png")
    run(training.format("a"), 4, "--resume")
    assert "→" not in capsys.readouterr().err
    run(training.format("a"), 12, "--lr", "5e-4", "--resume")
    assert "lr 0.002 → 0.0005" in capsys.readouterr().err
    assert state("a")["step"] == 12


def test_a_resumed_training_says_that_it_starts_from_no_other_model(training, capsys):
    other = ["--width", "8"] if "cyclegan" in training else ["--norm", "batch"]
    for folder, flags in (("a", []), ("b", other)):
        run(training.format(folder), 1, *flags)
    models = [next(Path(folder).glob("*checkpoint.pth")) for folder in "aba"]
    for model, steps in zip([*models[:2], "deleted.pth"], (1, 2, 3), strict=True):
        run(training.format("c"), steps, "--resume", "--start-from", model, *(other if steps == 2 else []))
        told = capsys.readouterr().err
        assert f"going on from {models[0] if steps == 1 else 'c'}" in told and told.count("→") == (steps > 1)
        assert ("width 4" if "width" in other[0] else "norm instance") in told
    kept = [common.load_checkpoint(next(Path(folder).glob("*checkpoint.pth"))).get("architecture") for folder in "ac"]
    assert kept[0] == kept[1]


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(training, fails):
    run(training.format("a"), 4)
    before = state("a")
    assert "smaller --lr" in fails(training.format("a"), 30, "--lr", "1e30", "--resume")
    equal(state("a"), before)


def test_no_training_overwrites_another_nor_resumes_what_is_none(training, fails):
    run(training.format("a"), 2)
    assert "exists" in fails(training.format("a"), 2)
    path = next(Path("a").glob("*checkpoint.pth"))
    saved, name = common.load_checkpoint(path), "model" if "johnson" in training else "G"
    for damaged in (saved | {name: {}}, saved | {"step": None}, {"weights": torch.rand(3)}):
        torch.save(damaged, path)
        assert "checkpoint" in fails(training.format("a"), 2, "--resume")


def test_what_goes_wrong_in_a_process_that_loads_pictures_is_one_line(training, fails):
    for path in sorted(Path("x").iterdir())[4:]:  # the first four are the samples
        path.write_text("no picture")
    assert "none of the images in" in fails(training.format("a"), 2, "--workers", 1)


def numbered(folder, n, size=(14, 11), first=0):
    """Write pictures whose red is their number, green grows to the right and blue downwards."""
    y, x = torch.meshgrid(*(torch.arange(side) / 16 for side in size[::-1]), indexing="ij")
    paths = [Path(folder, f"{i:02d}.png") for i in range(first, first + n)]
    for i, path in enumerate(paths, first):
        common.save_image(torch.stack([torch.full_like(x, i / 32), x, y]), path)
    return paths


def numbers(crops, indices, domain=0):
    return tuple(round(crops[i][domain][0].mean().item() * 32) for i in indices)


def test_crops_see_every_picture_once_an_epoch_in_another_order():
    X, Y = numbered("x", 12), numbered("y", 5, first=20)
    crops, other = Crops([X, Y], 11, 8, seed=0), Crops([X, X], 11, 8, seed=1)
    xs = {numbers(crops, range(first, first + 12)) for first in range(0, 60, 12)}
    ys = {numbers(crops, range(first, first + 5), 1) for first in range(0, 60, 5)}
    assert {tuple(sorted(x)) for x in xs} == {tuple(range(12))}
    assert {tuple(sorted(y)) for y in ys} == {tuple(range(20, 25))}
    assert len(xs) == 5 < len(ys)
    assert len({numbers(crops, range(12)), numbers(other, range(12)), numbers(other, range(12), 1)}) == 3
    for i in (59, 3, 30):
        equal(Crops([X, Y], 11, 8, seed=0)[i], crops[i])


def test_crops_lie_anywhere_and_half_of_them_are_mirrored():
    (path,) = numbered("x", 1, size=(15, 12))
    crops, plain, places, mirrored = Crops([[path]], 12, 8, 0, flip=True), Crops([[path]], 12, 8, 0), set(), 0
    for i in range(200):
        (crop,), (same,) = crops[i], plain[i]
        turned = bool(crop[1, 0, 0] > crop[1, 0, -1])
        mirrored += turned
        assert torch.equal(crop.flip(2) if turned else crop, same)
        places.add((round(same[1, 0, 0].item() * 16), round(same[2, 0, 0].item() * 16)))
    assert places == {(x, y) for x in range(8) for y in range(5)}
    assert 70 < mirrored < 130
    (half,) = Crops([[path]], 6, 6, seed=0)[0]  # shorter side 6: the whole height in one crop
    assert half[2, -1, 0] - half[2, 0, 0] > 9 / 16


def test_pictures_that_cannot_be_used_are_passed_over(capsys):
    files = numbered("x", 10)
    files[1].write_text("no picture")
    crops = Crops([files[:3]], 11, 8, seed=0)
    assert set(numbers(crops, range(12))) == {0, 2}
    assert str(files[1]) in capsys.readouterr().err
    squares, rest = common.hold_out(files, 6)
    assert [round(square[0].mean().item() * 32) for square in squares] == [0, 2, 3, 4]
    assert rest == [files[1], *files[5:]]
    assert common.hold_out(files[:8], 6)[1] == files[:8]  # of so few all are trained on
    with pytest.raises(InputError, match="can be read"):
        common.hold_out(files[1:2], 6)
