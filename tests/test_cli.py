"""The command lines, as a user types them: results of gatys.py, mistakes in all scripts, the order of arguments."""

import contextlib
import itertools
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import CONTENT, ROOT, SCRIPTS, STYLE, files, provenance, run, save_noise, split
from PIL import Image
from torchvision.transforms.functional import to_pil_image

import cyclegan
import gatys
import johnson
from common import load_frames, load_image


def test_the_default_output_is_named_after_the_inputs(capsys):
    run("gatys.py", CONTENT, STYLE)
    assert files() == ["content_style.png"]
    assert load_image("content_style.png").shape == (1, 3, 32, 48)
    for text in ("command: python gatys.py --image-size 48", torch.__version__, "seed: 0", "total"):
        assert text in provenance("content_style.png")
    assert capsys.readouterr().out == "content_style.png\n"
    assert str(gatys.parse_args(["a.jpg", "b.jpg", "c.png"]).output) == "a_b_c.png"
    assert str(gatys.parse_args(["a.jpg", "--style-weight", "0"]).output) == "a_inversion.png"


def test_everything_that_can_be_saved():
    to_pil_image((torch.arange(30) < 15).float().expand(1, 10, 30)).save("mask.png")
    flags = "-o new/a.jpg --save-gif --save-losses --protect mask.png --scales 2"
    run(f"gatys.py {flags} --save-all", CONTENT, STYLE)
    frames = [f"a_frames/{step:04d}.png" for step in range(1, 7)]
    assert files("new") == sorted(["a.gif", "a.jpg", "a_losses.csv", "a_losses.png", *frames])
    assert len(list(load_frames("new/a.gif"))) > 6
    assert (load_image("new/a.gif") - load_image(CONTENT, 48)).abs().mean() < 0.1  # it begins with the photo
    for picture in ("a.gif", "a.jpg", *frames):
        assert load_image(f"new/{picture}").shape == (1, 3, 32, 48)  # also of the coarse scale
    assert load_image("new/a_losses.png").std() > 0.01
    rows = [row.split(",") for row in Path("new/a_losses.csv").read_text().splitlines()]
    assert rows[0] == ["step", "total", "content", "style", "variation", "protected"]
    assert [row[0] for row in rows[1:]] == ["1", "2", "3", "4", "5", "6"]
    run("gatys.py -o new/a.jpg --save-all", CONTENT, STYLE)
    assert files("new/a_frames") == ["0001.png", "0002.png"]  # none of the first run


FLAGS = """--content-weight 50 | --style-weight 1 | --tv-weight 900 | --num-steps 6 | --lbfgs-iters 4 | --scales 2 |
    --content-layers relu1_1 | --style-layers relu2_2 | --optimizer adam | --lr 0.3 | --init content | --init style |
    --init noise | --init noise --seed 8 | --pooling max | --style-layers relu4_1 | --style-layers relu4_1 --vgg vgg16 |
    --precision bfloat16 | --style-scale 0.5 | --preserve-color histogram | --preserve-color luminance | --center-crop |
    --style-blend 5 1 | --style-masks mask.png | --painting-masks mask.png mask.png | --image-size 40 |
    --protect mask.png | --protect mask.png --protect-weight 1 | --style-layer-weights 1 9"""


def test_every_flag_changes_the_picture():
    """No two of these commands give the same picture."""
    save_noise("a.png", "b.png", "c.png", size=(48, 36))
    Image.linear_gradient("L").save("mask.png")
    made = {}
    for flags in ["", *FLAGS.split("|")]:
        run("gatys.py a.png b.png c.png -o d.png --num-steps 3 --lbfgs-iters 3 --content-weight 9", *flags.split())
        made[flags] = load_image("d.png")
    for (flags, picture), (others, other) in itertools.combinations(made.items(), 2):
        assert picture.shape != other.shape or (picture - other).abs().mean() > 5e-5, (flags, others)


@pytest.mark.parametrize(("losses", "interrupted"), [([3, 2, 5], False), ([3, 2, 5, 1], True), ([4, 3, 2], False)])
def test_the_picture_of_the_least_loss_at_full_size_is_kept(monkeypatch, losses, interrupted):
    """Of a finished run, and of one that Ctrl-C ends in its fifth step; the coarse scale's loss is another one."""

    def paint(content, *arguments, **options):
        yield torch.zeros(1, 3, 16, 24), {"total": 0.1}
        for step, loss in enumerate(losses, 2):
            if step == 5:
                signal.raise_signal(signal.SIGINT)
            yield torch.full_like(content, loss / 10), {"total": float(loss)}

    monkeypatch.setattr(gatys, "paint", paint)
    with pytest.raises(SystemExit, match="130") if interrupted else contextlib.nullcontext():
        run("gatys.py --num-steps 4 --scales 1 --save-losses", CONTENT, STYLE)
    least = min(losses[:3])
    assert load_image("content_style.png").mean().item() == pytest.approx(least / 10, abs=0.01)
    assert f"step: {2 + losses.index(least)} of 4" in provenance("content_style.png")
    assert len(Path("content_style_losses.csv").read_text().splitlines()) == 5
    if not interrupted:
        result = gatys.stylize(torch.zeros(1, 3, 32, 48), [torch.zeros(1, 3, 32, 48)])
        assert result.max().item() == pytest.approx(least / 10)


def test_a_failure_keeps_the_last_good_picture(monkeypatch, fails):
    """A loss that blows up, and a memory that is full."""
    fails("gatys.py --optimizer adam --lr 1e12 --num-steps 9", CONTENT, STYLE)
    assert "step: 1 of 9" in provenance("content_style.png")
    gram_matrix, calls = gatys.gram_matrix, itertools.count(1)

    def full(*arguments):
        if next(calls) > 30:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return gram_matrix(*arguments)

    monkeypatch.setattr(gatys, "gram_matrix", full)
    assert "--image-size 33" in fails("gatys.py -o b.png --num-steps 90", CONTENT, STYLE)
    assert load_image("b.png").shape == (1, 3, 32, 48)


def test_what_is_transparent_has_no_part_in_the_result(monkeypatch):
    """Neither of a photo nor of a painting: colours that cannot be seen change nothing, and are given no style."""
    torch.manual_seed(0)
    noise, alpha = torch.rand(3, 36, 48), (torch.arange(48) < 24).float().expand(1, 36, 48)
    results, objectives, objective = [], [], gatys.Objective
    monkeypatch.setattr(gatys, "Objective", lambda *args: objectives.append(objective(*args)) or objectives[-1])
    for hidden in (torch.tensor([0.0, 1.0, 0.0]), torch.zeros(3)):  # lime, black
        to_pil_image(torch.cat([torch.where(alpha > 0, noise, hidden[:, None, None]), alpha])).save("cut.png")
        run("gatys.py cut.png cut.png -o made.png")
        results.append(next(load_frames("made.png"))[0])
    assert torch.equal(*results)
    assert torch.equal(results[0][0, 3], alpha[0])
    ((share, masks, _),) = objectives[0].styles
    assert share == pytest.approx(0.5, abs=0.01)
    assert masks["relu1_1"][0, 0, 20, [28, 36]].tolist() == [1, 0]  # beside a margin of 8 px


MISTAKES = [
    ("gatys.py a.png b.png --device gpu", "gpu"),
    (f"gatys.py a.png b.png -o {'n' * 300}.png", "nnn"),
    ("gatys.py a.png", "style image"),
    ("gatys.py a.png b.png -o ./b.png", "input"),
    ("gatys.py c.gif b.png --save-gif -o c.png", "c.gif"),
    ("gatys.py a.png b.png --style-layers relu5_1 --image-size 8 --scales 2", "too small"),
    ("gatys.py a.png b.png --style-weight nan", "--style-weight"),
    ("gatys.py a.png b.png --style-weight 0 --content-weight 0", "--style-weight"),
    ("gatys.py a.png b.png --protect f.png -o f.png", "input"),
    ("johnson.py stylize a.png --model candy", "candy"),
    ("cyclegan.py translate a.png --model zebra", "horse2zebra"),
    ("cyclegan.py train x y --start-from zebra", "horse2zebra"),
    ("cyclegan.py train horse2giraffe", "apple2orange"),
    ("cyclegan.py train x y -o x/run", "input"),
    ("cyclegan.py train x y --load-size 33 --crop-size 64", "--load-size"),
    ("cyclegan.py train x y --crop-size 45", "multiple of 4"),
    ("cyclegan.py train x y --export small", ".pth"),
]


@pytest.fixture
def pictures():
    save_noise("a.png", "b.png", "f.png", "c.gif", "x/0.png", "y/0.png")


@pytest.mark.parametrize(("command", "word"), MISTAKES, ids=[command[:70] for command, _ in MISTAKES])
def test_a_mistake_is_told_in_one_line(pictures, command, word, fails):
    before = files()
    assert word in fails(command)
    assert files() == before


def test_a_file_that_is_no_model(pictures, fails):
    broken, infinite = johnson.TransformNet(output="linear").state_dict(), cyclegan.Generator(1, 4).state_dict()
    broken["in5.bias"][3], infinite["model.1.weight"][0] = torch.nan, torch.inf
    torch.save(broken, "broken.pth")
    torch.save({"G": infinite, "F": infinite}, "infinite.pth")
    torch.save({"architecture": {"norm": "instance"}, "model": {"conv1.conv2d.weight": torch.rand(3)}}, "foreign.pth")
    for command in ("johnson.py stylize a.png", "cyclegan.py translate a.png"):
        for file in ("broken.pth", "infinite.pth", "foreign.pth", "a.png", "missing.pth", "x"):
            assert file in fails(f"{command} --model {file}")


def test_flags_may_stand_anywhere():
    for commands in (
        ("gatys.py a.png b.png --image-size 40", "gatys.py a.png --image-size 40 b.png"),
        ("johnson.py stylize a.png b.png --strength 1", "johnson.py stylize a.png --strength 1 b.png"),
        ("cyclegan.py train x y --seed 2 --resume", "cyclegan.py train --resume x --seed 2 y"),
    ):
        usual, other = (SCRIPTS[name].parse_args([*sub, *rest]) for (name, *sub), rest in map(split, commands))
        assert usual == other


def test_the_models_that_come_with_it_have_names():
    for name, script in [*((style, johnson) for style in johnson.STYLES), ("horse2zebra", cyclegan)]:
        args = script.parse_args(["stylize" if script is johnson else "translate", "a.png", "--model", name])
        assert args.model == script.model_file(name) == ROOT / "models" / f"{name}.pth"
    assert cyclegan.parse_args(["translate", "a.png"]) == args
    assert cyclegan.parse_args(["train", "x", "y", "--start-from", name]).start_from == [args.model]


def test_a_reader_that_goes_away_ends_no_work(pictures):
    """As `| head -1` does; what is printed later is not lost."""
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.redirect_stdout(os.fdopen(writer, "w")):
        run("johnson.py stylize a.png b.png f.png -o out")
    assert files("out") == ["a.png", "b.png", "f.png"]
