"""The command lines, as a user types them: mistakes, the order of arguments, names of models."""

import contextlib
import os

import pytest
import torch
from conftest import ROOT, SCRIPTS, STYLE, files, run, save_noise, split

import cyclegan
import johnson

MISTAKES = [
    ("gatys.py a.png b.png --device gpu", "gpu"),
    (f"gatys.py a.png b.png -o {'n' * 300}.png", "nnn"),
    ("gatys.py a.png", "style image"),
    ("gatys.py a.png b.png -o ./b.png", "input"),
    ("gatys.py c.gif b.png --save-gif -o c.png", "c.gif"),
    ("gatys.py a.png b.png --style-weight nan", "--style-weight"),
    ("gatys.py a.png b.png --style-weight 0 --content-weight 0", "--style-weight"),
    ("gatys.py a.png b.png --protect f.png -o f.png", "input"),
    ("johnson.py stylize a.png --model candy", "candy"),
    ("cyclegan.py translate a.png --model zebra", "horse2zebra"),
    ("cyclegan.py train x y --start-from zebra", "horse2zebra"),
    ("cyclegan.py train horse2giraffe", "apple2orange"),
    ("cyclegan.py train x y -o x/run", "input"),
    ("cyclegan.py train x y --load-size 60 --crop-size 64", "at most --load-size"),
    ("cyclegan.py train x y --crop-size 46", "multiple of 4"),
]


@pytest.fixture
def pictures():
    save_noise("a.png", "b.png", "f.png", "c.gif", "x/0.png", "y/0.png")


@pytest.mark.parametrize(
    ("command", "word"), MISTAKES, ids=[command[:70] for command, _ in MISTAKES]
)
def test_a_mistake_is_told_in_one_line(pictures, command, word, fails):
    before = files()
    assert word in fails(command)
    assert files() == before


def test_a_file_that_is_no_model(pictures, fails):
    torch.save(
        {"architecture": {"norm": "instance"}, "model": {"conv1.conv2d.weight": torch.rand(3)}},
        "foreign.pth",
    )
    for command in ("johnson.py stylize a.png", "cyclegan.py translate a.png"):
        for file in ("foreign.pth", "a.png", "missing.pth", "x"):
            assert file in fails(f"{command} --model {file}")


def test_flags_may_stand_anywhere():
    for commands in (
        ("gatys.py a.png b.png --image-size 40", "gatys.py a.png --image-size 40 b.png"),
        (
            "johnson.py stylize a.png b.png --strength 1",
            "johnson.py stylize a.png --strength 1 b.png",
        ),
        ("cyclegan.py train x y --seed 2 --resume", "cyclegan.py train --resume x --seed 2 y"),
    ):
        usual, other = (
            SCRIPTS[name].parse_args([*sub, *rest]) for (name, *sub), rest in map(split, commands)
        )
        assert usual == other


def test_the_models_that_come_with_it_have_names():
    for name, script in [
        *((style, johnson) for style in johnson.STYLES),
        ("horse2zebra", cyclegan),
    ]:
        args = script.parse_args(
            ["stylize" if script is johnson else "translate", "a.png", "--model", name]
        )
        assert args.model == script.model_file(name) == ROOT / "models" / f"{name}.pth"
    assert cyclegan.parse_args(["translate", "a.png"]) == args
    assert cyclegan.parse_args(["train", "x", "y", "--start-from", name]).start_from == [args.model]


TRAININGS = {  # and what their convolutions and networks are
    f"johnson.py train --style {STYLE} --data photos": (
        "Conv2d NearestConvolution",
        "TransformNet",
    ),
    "cyclegan.py train photos photos": ("Conv2d Upsample", "Generator PatchDiscriminator"),
}


@pytest.mark.parametrize("command", TRAININGS)
def test_a_training_in_bfloat16(command):
    """All convolutions compute in it, on a GPU if there is one; what networks return is float32."""
    save_noise(*(f"photos/{i}.png" for i in range(10)))
    dtypes = {}

    def note(module, inputs, output):
        if torch.is_grad_enabled() and isinstance(output, torch.Tensor):
            dtypes.setdefault(type(module).__name__, set()).add(output.dtype)

    with torch.nn.modules.module.register_module_forward_hook(note):
        run(command, "--precision", "bfloat16", "--device", "auto")
    convolutions, networks = TRAININGS[command]
    assert [dtypes[name] for name in convolutions.split()] == [{torch.bfloat16}] * 2
    assert all(dtypes[name] == {torch.float32} for name in networks.split())


def test_a_reader_that_goes_away_ends_no_work(pictures):
    """As `| head -1` does; what is printed later is not lost."""
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.redirect_stdout(os.fdopen(writer, "w")):
        run("johnson.py stylize a.png b.png f.png -o out")
    assert files("out") == ["a.png", "b.png", "f.png"]
