"""The command line of gatys.py, as a user types it: results, mistakes, interruption."""

import csv
import functools
import inspect
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops, ImageStat

import gatys

ROOT = Path(__file__).parent.parent
CONTENT, STYLE = ROOT / "examples" / "content.jpg", ROOT / "examples" / "style.jpg"
TINY = ["--image-size", "48", "--num-steps", "2", "--lbfgs-iters", "1", "--vgg-weights", "random", "--device", "cpu"]


def gatys_main(*arguments):
    """Run gatys.py on small pictures with random weights; `arguments` come last, so that they prevail."""
    gatys.main([*TINY, *map(str, arguments)])


def files(folder="."):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


# --- Results ---


def test_the_default_output_is_named_after_the_inputs(capsys):
    gatys_main(CONTENT, STYLE)
    assert files() == ["content_style.png"]
    with Image.open("content_style.png") as picture:
        assert picture.size == (48, 32)
        assert picture.text["command"].startswith("python gatys.py --image-size 48")
        assert picture.text["seed"] == "0"
        assert torch.__version__ in picture.text["versions"]
        assert picture.text["losses"].startswith("total ")
    output = capsys.readouterr()
    assert output.out == "content_style.png\n"
    assert "computing on cpu in" in output.err
    assert str(gatys.parse_args(["a.jpg", "b.jpg", "c.png"]).output) == "a_b_c.png"
    assert str(gatys.parse_args(["a.jpg"]).output) == "a_inversion.png"


def test_everything_that_can_be_saved():
    gatys_main(CONTENT, STYLE, "-o", "new/a.jpg", "--save-gif", "--save-all", "--save-losses", "--scales", "2")
    frames = [f"a_frames/{step:04d}.png" for step in range(1, 7)]
    assert files("new") == sorted(["a.gif", "a.jpg", "a_losses.csv", "a_losses.png", *frames])
    with Image.open("new/a.gif") as animation:
        assert animation.size == (48, 32)
        assert animation.n_frames == 8 + 6  # it fades from the photo into the first of them
        photo = gatys.to_pil(gatys.load_image(CONTENT, 48))
        assert ImageStat.Stat(ImageChops.difference(animation.convert("RGB"), photo)).mean < [25, 25, 25]
    with Image.open("new/a_frames/0001.png") as frame:
        assert frame.size == (24, 16)
    with Path("new/a_losses.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["step", "total", "content", "style", "variation"]
    assert [row[0] for row in rows[1:]] == ["1", "2", "3", "4", "5", "6"]
    assert float(rows[6][1]) == pytest.approx(float(rows[6][2]) + 30 * float(rows[6][3]), rel=1e-4)
    assert gatys.load_image("new/a.jpg").shape == (1, 3, 32, 48)
    gatys_main(CONTENT, STYLE, "-o", "new/a.jpg", "--save-all")
    assert files("new/a_frames") == ["0001.png", "0002.png"]  # none of the first run


def test_an_animation_is_3_mb_at_most():
    noise = [Image.effect_noise((384, 384), 90).convert("RGB") for _ in range(40)]
    gatys.save_gif(noise, Path("a.gif"))
    assert Path("a.gif").stat().st_size < 3e6
    with Image.open("a.gif") as animation:
        frames = animation.n_frames
        assert 5 < frames < 40
        animation.seek(frames - 1)
        assert ImageStat.Stat(ImageChops.difference(animation.convert("L"), noise[-1].convert("L"))).mean[0] < 20


FLAGS = """--content-weight 2 alpha | --style-weight 3 beta | --tv-weight 4 tv_weight | --num-steps 6 num_steps
    --content-layers relu3_1 content_layers | --style-layers relu2_2 style_layers | --style-blend 5 style_blend
    --lbfgs-iters 7 lbfgs_iters | --scales 1 scales | --optimizer adam optimizer | --lr 0.5 lr | --init noise init
    --pooling max pooling | --vgg vgg16 vgg | --vgg-weights random vgg_weights | --seed 8 seed
    --precision bfloat16 precision | --preserve-color histogram preserve_color
    --protect-weight 9 protect_weight""".replace("|", "\n").splitlines()


def test_every_flag_reaches_paint(monkeypatch):
    seen = {}

    def paint(content, styles, **options):
        seen.update(options, content=content, styles=styles)
        yield content, {"total": 1.0}

    defaults = {name: p.default for name, p in inspect.signature(gatys.paint).parameters.items()}
    names = list(defaults)[2:]
    monkeypatch.setattr(gatys, "paint", functools.wraps(gatys.paint)(paint))
    gatys.main([str(CONTENT), str(STYLE), "--device", "cpu", "-o", "a.png"])
    for name in names:
        assert seen[name] == defaults[name] or (not len(seen[name]) and not len(defaults[name])), name
    assert (max(seen["content"].shape), max(seen["styles"][0].shape)) == (512, 512)
    flags, masks = [line.split() for line in FLAGS], ("painting_masks", "protect", "style_masks")
    assert {*masks, *(name for *_, name in flags)} == set(names)
    arguments = [part for flag, value, _ in flags for part in (flag, value)]
    for value, name in enumerate(masks, 50):
        Image.new("L", (9, 7), value).save(f"{name}.png")
        arguments += [f"--{name.replace('_', '-')}", f"{name}.png"]
    gatys.main([str(CONTENT), str(STYLE), *arguments])
    for _, value, name in flags:
        assert str(seen[name]).strip("[]'").removesuffix(".0") == value, name
    for value, name in enumerate(masks, 50):
        mask = seen[name] if name == "protect" else seen[name][0]
        torch.testing.assert_close(mask, torch.full((1, 1, 7, 9), value / 255), rtol=0, atol=1e-6)
    gatys.main([str(CONTENT), str(STYLE), "--image-size", "64", "--style-scale", "0.5", "--center-crop", "-o", "b.png"])
    assert (seen["content"].shape, seen["styles"][0].shape) == ((1, 3, 64, 64), (1, 3, 32, 32))


def test_the_command_line_gives_the_picture_of_a_python_call():
    gatys_main(CONTENT, STYLE, "--init", "noise", "--scales", "2", "-o", "a.png")
    content, style = (gatys.load_image(path, 48) for path in (CONTENT, STYLE))
    options = {"init": "noise", "scales": 2, "num_steps": 2, "lbfgs_iters": 1, "vgg_weights": "random"}
    result = gatys.stylize(content, [style], **options)
    assert (gatys.load_image("a.png") - result).abs().max() <= 0.5 / 255 + 1e-6
    first = Path("a.png").read_bytes()
    gatys_main(CONTENT, STYLE, "--init", "noise", "--scales", "2", "-o", "a.png")
    assert Path("a.png").read_bytes() == first


@pytest.mark.parametrize(("losses", "interrupted"), [([3, 2, 5], False), ([3, 2, 5, 1], True), ([4, 3, 2], False)])
def test_the_picture_of_the_least_loss_at_full_size_is_kept(monkeypatch, losses, interrupted):
    """Of a finished run, and of one that Ctrl-C ends in its fourth step; the coarse scale's loss is another one."""

    def paint(content, styles, **options):
        yield torch.zeros(1, 3, 16, 24), {"total": 0.1}
        for step, loss in enumerate(losses, 2):
            if interrupted and step == 4:
                signal.raise_signal(signal.SIGINT)
            yield torch.full_like(content, loss / 10), {"total": float(loss)}

    monkeypatch.setattr(gatys, "paint", functools.wraps(gatys.paint)(paint))
    arguments = [CONTENT, STYLE, "--num-steps", "4", "--scales", "1", "--save-losses"]
    if interrupted:
        with pytest.raises(SystemExit, match="130"):
            gatys_main(*arguments)
    else:
        gatys_main(*arguments)
        result = gatys.stylize(torch.zeros(1, 3, 32, 48), [torch.zeros(1, 3, 32, 48)])
        assert result.max().item() == pytest.approx(min(losses) / 10)
    with Image.open("content_style.png") as picture:
        assert abs(picture.getpixel((5, 5))[0] - 25.5 * min(losses[:3])) < 1
        assert picture.text["step"] == f"{2 + losses.index(min(losses[:3]))} of 4"
    assert len(Path("content_style_losses.csv").read_text().splitlines()) == 5


def test_what_is_protected_can_be_saved():
    """As a picture of the result's size, from a mask of any; also without a style weight."""
    mask = Image.new("L", (30, 10))
    mask.paste(255, (0, 0, 15, 10))
    mask.save("mask.png")
    gatys_main(CONTENT, "--style-weight", "0", "--protect", "mask.png", "--save-mask", "-o", "a.png")
    with Image.open("a_mask.png") as saved:
        assert saved.size == (48, 32)
        assert (saved.getpixel((5, 16)), saved.getpixel((43, 16))) == ((255,) * 3, (0,) * 3)


# --- Mistakes ---


MISTAKES = [
    (["missing.jpg", STYLE], "missing.jpg"),
    ([CONTENT], "style image"),
    ([], "content"),
    ([CONTENT, STYLE, "-o", "a.xyz"], ".png"),
    ([CONTENT, "style.png", "-o", "./style.png"], "input"),
    (["c.gif", STYLE, "--save-gif", "-o", "c.png"], "c.gif"),
    (["d_frames/0008.png", STYLE, "--save-all", "-o", "d.png"], "d_frames"),
    ([CONTENT, STYLE, "--image-size", "0"], "--image-size"),
    ([CONTENT, STYLE, "--image-size", "12"], "too small"),
    ([CONTENT, STYLE, "--style-weight", "nan"], "--style-weight"),
    ([CONTENT, STYLE, "--style-masks", STYLE, STYLE], "--style-masks"),
    ([CONTENT, STYLE, "--painting-masks", STYLE, STYLE], "--painting-masks"),
    ([CONTENT, STYLE, "--protect", "style.png", "-o", "style.png"], "input"),
    ([CONTENT, STYLE, "--protect", "f_mask.png", "--save-mask", "-o", "f.png"], "input"),
    ([CONTENT, STYLE, "--save-mask"], "--protect"),
    ([CONTENT, STYLE, "--style-scale", "1e9"], "--style-scale"),
]


@pytest.mark.parametrize(("arguments", "word"), MISTAKES, ids=lambda value: None if isinstance(value, list) else value)
def test_a_mistake_is_told_in_one_line(arguments, word, fails):
    Path("d_frames").mkdir()
    for name in ("style.png", "f_mask.png", "c.gif", "d_frames/0008.png"):
        Image.new("RGB", (48, 48), "teal").save(name)
    assert word in fails(gatys.main, *TINY, *arguments)


# --- Interruption ---


@pytest.mark.skipif(sys.platform == "win32", reason="signals work differently there")
def test_ctrl_c_saves_the_picture():
    command = [sys.executable, str(ROOT / "gatys.py"), str(CONTENT), str(STYLE), *TINY, "--num-steps", "100000"]
    process = subprocess.Popen([*command, "--save-all", "--save-losses"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not Path("content_style_frames", "0002.png").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "stopped: content_style.png holds the picture of step " in err
    assert "again" in err  # a second Ctrl-C would end it at once
    with Image.open("content_style.png") as picture:
        assert picture.size == (48, 32)
        assert " of 100000" in picture.text["step"]
    assert Path("content_style_losses.csv").exists()


def test_a_full_disk_while_frames_are_saved_keeps_the_picture(monkeypatch, fails):
    save_image = gatys.save_image

    def fail(image, path, *metadata):
        if "0003" in str(path):
            raise OSError(28, "No space left on device")
        save_image(image, path, *metadata)

    monkeypatch.setattr(gatys, "save_image", fail)
    assert "No space left" in fails(gatys.main, *TINY, CONTENT, STYLE, "--save-all", "--num-steps", "9")
    assert Path("content_style.png").exists()


def test_a_move_that_blows_up_does_not_replace_the_last_good_picture(fails):
    fails(gatys.main, *TINY, CONTENT, STYLE, "--optimizer", "adam", "--lr", "1e12", "--num-steps", "9")
    with Image.open("content_style.png") as picture:
        assert picture.text["step"] == "1 of 9"
        assert sum(value in (0, 255) for value in picture.tobytes()) < 0.2 * len(picture.tobytes())


def test_out_of_memory_names_a_size(monkeypatch, fails):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(gatys, "total_loss", full)
    error = fails(gatys.main, *TINY, CONTENT, STYLE)
    assert error.startswith("error: out of memory at 48 px: about --image-size 33")
