"""cyclegan.py: its networks by hand, what a training leaves, its data, translation."""

import math
import re
import shutil
import zipfile
import zlib
from http.client import IncompleteRead
from pathlib import Path

import pytest
import torch
import torch.nn.functional as nnf
from conftest import equal, run, save_noise
from test_equations import gan
from torch import nn

import common
import cyclegan
import gatys
import johnson
from common import InputError, load_image, to_pil
from cyclegan import CycleGAN, Generator, PatchDiscriminator, load_generator, translate


def norm(y):
    return (y - y.mean((2, 3), keepdim=True)) / (y.var((2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()


def test_the_discriminator_is_the_papers():
    """C64-C128-C256-C512 and one channel, on pictures in -1 … 1."""
    D, x = PatchDiscriminator(6), torch.rand(2, 3, 48, 64)
    convolutions, y = [m for m in D.modules() if isinstance(m, nn.Conv2d)], 2 * x - 1
    for i, (c, stride) in enumerate(zip(convolutions, (2, 2, 2, 1, 1), strict=True)):
        c.weight.data *= 5
        c.bias.data += 0.1
        y = nnf.conv2d(y, c.weight, c.bias, stride, 1)
        y = norm(y) if i in (1, 2, 3) else y
        y = torch.where(y > 0, y, 0.2 * y) if i < 4 else y
    torch.testing.assert_close(D(x), y, rtol=1e-4, atol=1e-4)


def by_hand(p, x):
    """Compute the authors' generator of nine blocks from weights p; x and the result are in -1 … 1."""

    def conv(name, y, reflect=0, **options):
        y = nnf.pad(y, [reflect] * 4, mode="reflect")
        return nnf.conv2d(y, p[f"model.{name}.weight"], p[f"model.{name}.bias"], **options)

    y = norm(conv("1", x, 3)).relu()
    for name in ("4", "7"):
        y = norm(conv(name, y, stride=2, padding=1)).relu()
    for i in range(10, 19):
        z = norm(conv(f"{i}.conv_block.1", y, 1)).relu()
        y = y + norm(conv(f"{i}.conv_block.5", z, 1))
    for i in (19, 22):
        y = norm(nnf.conv_transpose2d(y, p[f"model.{i}.weight"], p[f"model.{i}.bias"], 2, 1, 1)).relu()
    return conv("26", y, 3).tanh()


def test_published_generators_give_the_same_pixels(monkeypatch):
    """They are plain state dicts, and computed in float32 unless bfloat16 is asked for."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    torch.manual_seed(0)
    shapes = {1: (64, 3, 7, 7), 4: (128, 64, 3, 3), 7: (256, 128, 3, 3), 26: (3, 64, 7, 7)}
    shapes |= {19: (256, 128, 3, 3), 22: (128, 64, 3, 3)}  # transposed convolutions name their inputs first
    shapes |= {f"{i}.conv_block.{k}": (256, 256, 3, 3) for i in range(10, 19) for k in (1, 5)}
    state = {f"model.{i}.weight": 0.05 * torch.randn(shape) for i, shape in shapes.items()}
    state |= {f"model.{i}.bias": torch.rand(shape[i in (19, 22)]) for i, shape in shapes.items()}
    unused = {"model.2.running_mean": torch.zeros(64), "model.2.running_var": torch.ones(64)}  # of older files
    torch.save(state | unused, "latest_net_G.pth")
    x = torch.rand(1, 3, 36, 48)
    expected = (by_hand(state, 2 * x - 1) + 1) / 2
    assert expected.std() > 0.01
    network, facts = load_generator(Path("latest_net_G.pth"))
    torch.testing.assert_close(translate(network, x, exact=facts.authors), expected, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="one generator"):
        load_generator(Path("latest_net_G.pth"), "y2x")


def test_a_step_in_bfloat16():
    """All networks compute in it, and the losses are nearly those of float32."""
    exact, half, (x, y), dtypes = gan(), gan("cpu", torch.bfloat16), torch.rand(2, 1, 3, 32, 32), set()
    for network in (half.G, half.F, half.D_X, half.D_Y):
        network.model[-2].register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    losses, expected = half.step(x, y), exact.step(x, y)
    assert dtypes == {torch.bfloat16}
    for name, value in losses.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected[name].item(), rel=0.05), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_step_on_cuda():
    x, y = torch.rand(2, 1, 3, 64, 64, device="cuda")
    losses = gan("cuda", torch.bfloat16).step(x, y)
    assert all(value.isfinite() for value in losses.values())


def test_warnings_name_the_remedy():
    ours, x = gan(), torch.rand(2, 3, 32, 32)
    good, lost = [{"D_X": 0.2, "D_Y": 0.2}] * 20, [{"D_X": 0.001, "D_Y": 0.2}] * 20
    for G, F, history, wanted in (
        (lambda x: x / 2, lambda x: x / 2, good, ""),
        (lambda x: x / 2, lambda x: x / 2, lost[1:], ""),
        (lambda x: x / 2, lambda x: x / 2, lost, "D_X.*--lr"),
        (lambda x: x + 0.005, lambda x: x / 2, good, "G.*identity"),
        (lambda x: x / 2, lambda x: 1 - x, good, "F.*light into dark"),
    ):
        ours.G_ema, ours.F_ema = G, F
        assert re.fullmatch(f"{wanted}.*" if wanted else "", " ".join(cyclegan.diagnose(ours, x, x, history)))


@pytest.fixture
def folders():
    save_noise(*(f"x/{'deep/' * (i % 2)}any name {i}.png" for i in range(5)), size=(40, 40))
    save_noise(*(f"y/{i}.png" for i in range(3)), size=(50, 37))


def test_what_a_training_leaves(folders, monkeypatch):
    rates, step = [], CycleGAN.step
    monkeypatch.setattr(CycleGAN, "step", lambda gan, x, y: rates.append(rate(gan)) or step(gan, x, y))

    def rate(gan):
        return [group["lr"] for group in gan.optimizer_G.param_groups + gan.optimizer_D.param_groups]

    command = "cyclegan.py train x y --max-steps 99 --epochs 1 --decay-epochs 2 --lr 1e-3 --beta1 0.9 --lambda-cycle 3"
    run(f"{command} --lambda-identity 0 --export new/small.pth -o new/run")
    assert rates == [pytest.approx([rate] * 2) for rate in [1e-3] * 10 + [5e-4] * 5]
    files = sorted(path.name for path in Path("new/run").iterdir())
    assert files == ["checkpoint.pth", *[f"epoch_00{n}.jpg" for n in (1, 2, 3)], "losses.csv", "losses.png"]
    header, *rows = (row.split(",") for row in Path("new/run/losses.csv").read_text().splitlines())
    assert header == ["step", "epoch", "lr", "total", "G", "F", "cycle", "identity", "D_X", "D_Y"]
    assert [row[:2] for row in rows] == [["1", "1"], ["10", "2"]]
    _, _, _, total, G, F, cycle, identity, *_ = map(float, rows[1])
    assert (total, identity) == (pytest.approx(G + F + 3 * cycle, rel=1e-4), 0)
    whole = common.load_checkpoint(Path("new/run/checkpoint.pth"))
    assert whole["step"] == 15
    assert whole["optimizer_D"]["param_groups"][0]["betas"] == (0.9, 0.999)
    for model, precision in (("new/small.pth", torch.half), ("new/run/checkpoint.pth", torch.float)):
        assert all(value.dtype == precision for value in common.load_checkpoint(Path(model))["G"].values())
        for direction, name in (("x2y", "G_ema"), ("y2x", "F_ema")):
            for key, value in load_generator(Path(model), direction)[0].state_dict().items():
                assert torch.equal(value, whole[name]["module." + key].to(precision).float())


def test_test_folders_are_used_for_the_samples(folders):
    for part, folder in zip(("trainA", "trainB", "testA"), "xyy", strict=True):
        shutil.copytree(folder, Path("set", part))
    (X, x_samples), (Y, y_samples) = cyclegan.domains(["set"], 32)
    assert (len(X), len(Y)) == (5, 3)
    tests = common.find_images(Path("set/testA"))
    assert torch.equal(x_samples, torch.cat([load_image(path, 32, center_crop=True) for path in tests]))
    assert len(y_samples) == 3  # of trainB, as there is no testB
    save_noise(*(f"x/{i}.png" for i in range(6)))
    (X, x_samples), _ = cyclegan.domains(["x", "y"], 32)
    assert (len(x_samples), X) == (4, common.find_images(Path("x"))[4:])


def test_a_set_is_downloaded_once_and_whole(monkeypatch):
    def serve(*names, failure=None):
        def fetch(url, folder):
            assert url == "https://efrosgans.eecs.berkeley.edu/cyclegan/datasets/horse2zebra.zip"
            save_noise(*(f"{folder}/horse2zebra/{name}" for name in names))
            if failure:
                raise failure

        monkeypatch.setattr(cyclegan, "download_and_extract_archive", fetch)

    for failure in (zipfile.BadZipFile(), zlib.error(), EOFError(), OSError(), IncompleteRead(b""), None):
        serve("trainA/a.png", failure=failure)
        with pytest.raises(InputError, match=r"horse2zebra\.zip"):
            cyclegan.download("horse2zebra")
        assert not any(Path("data").iterdir())
    serve("trainA/a.png", "trainB/b.png")
    for _ in range(2):
        (X, _), (Y, _) = cyclegan.domains(["horse2zebra"], 32)
        assert [*map(str, X + Y)] == ["data/horse2zebra/trainA/a.png", "data/horse2zebra/trainB/b.png"]
        serve(failure=AssertionError())  # the second time it is there


@pytest.mark.parametrize("size", [(37, 53), (96, 24), (5, 9)])
def test_any_size_is_mirrored_to_a_multiple_of_4_and_cut_again(size):
    network, x = Generator(1, 4).eval(), torch.rand(1, 3, *size)
    y = translate(network, x.requires_grad_(), "float32")
    right, below = (max(8, math.ceil(side / 4) * 4) - side for side in size[::-1])
    with torch.no_grad():
        wide = network(nnf.pad(x, (0, right, 0, below), mode="reflect"))
    torch.testing.assert_close(y, wide[..., : size[0], : size[1]])
    assert not y.requires_grad
    y.requires_grad_().sum().backward()  # an ordinary tensor
    with pytest.raises(InputError, match="too small"):
        translate(network, x[..., :4])


def test_pictures_are_translated_at_the_size_of_training():
    """By their shorter side, as training scales them; at another size they would hold horses it has never seen."""
    state = Generator(1, 4).state_dict()
    torch.save({"G": state, "F": state, "settings": {"load_size": 30}}, "model.pth")
    save_noise("in/deep/a.png", "in/b.png", size=(80, 40))
    command = "cyclegan.py translate --model model.pth"
    for flags, shape in (("", (30, 60)), ("--direction y2x", (30, 60)), ("--image-size 24", (12, 24))):
        run(f"{command} in/b.png -o made.png {flags}")
        assert load_image("made.png").shape == (1, 3, *shape)
    run(f"{command} in/b.png -o default.png")
    torch.testing.assert_close(load_image("made.png"), load_image("default.png", 24), rtol=0, atol=0.05)
    run(f"{command} in -o out")
    assert [str(path) for path in common.find_images(Path("out"))] == ["out/b.png", "out/deep/a.png"]


# --- Going on from a model ---------------------------------------------------------------------------------


def test_nearest_upsampling_repeats_pixels():
    """And a transposed convolution's weights, turned by 180°, serve: of a constant they make the same interior."""
    transposed = nn.ConvTranspose2d(3, 2, 3, 2, 1, output_padding=1)
    up = cyclegan.Upsample(3, 2, 3)
    x = torch.rand(1, 3, 5, 4)
    repeated = x.repeat_interleave(2, -2).repeat_interleave(2, -1)
    padded = nn.functional.pad(repeated, [1] * 4, mode="reflect")
    assert torch.allclose(up(x), nn.functional.conv2d(padded, up.weight, up.bias), atol=1e-6)
    spread = torch.zeros(1, 3, 10, 8)
    spread[..., ::2, ::2] = x  # zeros between pixels
    weight = transposed.weight.transpose(0, 1).flip(2, 3)
    expected = nn.functional.conv2d(spread, weight, transposed.bias, padding=1)
    assert torch.allclose(transposed(x), expected, atol=1e-6)


@pytest.mark.parametrize("upsample", ["transposed", "nearest"])
def test_a_training_goes_on_from_a_model(upsample):
    """Its own with discriminators, an exported one without, or two of the authors', one for each direction."""
    save_noise("x/1.png", "x/2.png", "y/1.png", "y/2.png")
    run("cyclegan.py train x y -o a --export a/m.pth", "--upsample", upsample, "--ema", 0)
    state = common.load_checkpoint(Path("a/checkpoint.pth"))
    for name in "GF":
        torch.save(state[name], f"{name}.pth")
    for files in (["a/checkpoint.pth"], ["a/m.pth"], ["G.pth", "F.pth"]):
        networks = cyclegan.load_networks(files, upsample)
        assert networks.keys() == ({"G", "F", "D_X", "D_Y"} if "checkpoint" in files[0] else {"G", "F"})
        for name, network in networks.items():
            for key, value in network.state_dict().items():
                assert torch.allclose(value, state[name][key], atol=1e-3), (files, name, key)
    turned = cyclegan.load_networks(["a/m.pth"], "nearest")["F"].model[11]
    weight = state["F"]["model.11.weight"]
    weight = weight.transpose(0, 1).flip(2, 3) if upsample == "transposed" else weight
    assert isinstance(turned, cyclegan.Upsample) and torch.allclose(turned.weight, weight, atol=1e-3)
    run("cyclegan.py train x y -o b --lr 0 --max-steps 2 --start-from", "a/checkpoint.pth", "--upsample", upsample)
    assert equal(common.load_checkpoint(Path("b/checkpoint.pth"))["D_X"], state["D_X"])


def test_a_training_that_started_from_a_model_is_resumed_without_it(fails):
    save_noise("x/1.png", "x/2.png", "y/1.png", "y/2.png")
    run("cyclegan.py train x y -o a --export m.pth --width 8")
    for folder, steps in (("b", 2), ("c", 1)):
        run("cyclegan.py train x y --epochs 9 --start-from m.pth -o", folder, "--max-steps", steps)
    Path("m.pth").unlink()
    run("cyclegan.py train x y -o c --max-steps 2 --resume")
    b, c = (common.load_checkpoint(Path(folder, "checkpoint.pth")) for folder in "bc")
    assert all(equal(b[name], c[name]) for name in ("G", "F", "D_X", "D_Y", "G_ema", "optimizer_G", "pool_X"))
    for flags in ("--export d/checkpoint.pth", "--start-from a/checkpoint.pth c/checkpoint.pth"):
        assert "checkpoint.pth" in fails(f"cyclegan.py train x y -o d {flags}").replace("one file", "checkpoint.pth")


def test_averaged_weights():
    """w_ema ← d w_ema + (1 − d) w after each step, d = min(ema, (1 + n)/(10 + n)); they are what is exported."""
    save_noise("x/1.png", "x/2.png", "y/1.png", "y/2.png")
    ours = []
    for steps in (1, 2, 3):
        run("cyclegan.py train x y --ema 0.2 --lr 0.01 -o", f"r{steps}", "--max-steps", steps)
        ours.append(common.load_checkpoint(Path(f"r{steps}/checkpoint.pth")))
    key = "model.1.weight"
    expected = ours[0]["G"][key]
    for state, d in zip(ours[1:], (2 / 11, 0.2), strict=True):  # 3/12 would be more than --ema
        expected = d * expected + (1 - d) * state["G"][key]
    assert torch.allclose(ours[2]["G_ema"]["module." + key], expected, atol=1e-6)
    network, _ = cyclegan.load_generator(Path("r3/checkpoint.pth"))
    assert torch.equal(network.state_dict()[key], ours[2]["G_ema"]["module." + key])


def test_authors_generators_of_other_kinds_load_or_are_named():
    G = cyclegan.Generator(blocks=2, width=4)
    state = {key.replace("conv_block.5.", "conv_block.6."): value for key, value in G.state_dict().items()}
    torch.save(state, "dropout.pth")
    assert equal(cyclegan.load_generator(Path("dropout.pth"))[0].state_dict(), G.state_dict())
    for name, word in (("model.model.0.weight", "U-Net"), ("model.2.weight", "batch norm")):
        torch.save({name: torch.rand(4), "model.1.weight": torch.rand(4, 3, 7, 7)}, "other.pth")
        with pytest.raises(InputError, match=word):
            cyclegan.load_generator(Path("other.pth"))


def test_what_is_no_picture_or_too_large_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(common.os, "sysconf", lambda name: 3000)  # pages, of as many bytes
    networks = johnson.TransformNet().eval(), Generator(1, 4).eval()
    vast = torch.zeros(1, 3, 400, 400)
    for x, word in (
        (to_pil(torch.rand(3, 9, 9)), "Image"),
        (255 * torch.ones(1, 3, 9, 9), "0 to 1"),
        (vast, "px would fit"),
    ):
        for network, function in zip(networks, (johnson.stylize, translate), strict=True):
            with pytest.raises(InputError, match=word):
                function(network, x)
        with pytest.raises(InputError, match=word):
            gatys.stylize(x, [torch.rand(1, 3, 64, 64)])
