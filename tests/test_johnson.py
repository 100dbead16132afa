"""johnson.py against the paper's equations and network, written out; its training; published models."""

import inspect
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as nnf
from PIL import Image
from test_common import equal
from torch import nn

import common
import johnson
from common import VGG, InputError, gram_matrix
from johnson import Objective, TransformNet, content_loss, load_network, style_loss, stylize

ROOT = Path(__file__).parent.parent
STYLE, PHOTO, FOLDER = (ROOT / "examples" / name for name in ("style.jpg", "content.jpg", ""))
NETWORKS = [(n, u, p) for n in ("instance", "batch") for u in ("nearest", "transposed") for p in ("reflect", "start")]
PAPER = ["--norm", "batch", "--upsample", "transposed", "--padding", "start"]
TINY = """--image-size 16 --style-size 32 --batch-size 2 --vgg vgg16 --vgg-weights random --workers 0 --device cpu
    --content-layer relu2_1 --style-layers relu1_1 relu2_1 --precision float32"""


# --- Losses and the step ---


def test_losses_are_eq_2_to_4():
    generator = torch.Generator().manual_seed(0)
    y, target = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64, generator=generator)
    eq_2 = eq_4 = 0.0
    for b in range(2):
        eq_2 += sum((u - v) ** 2 for u, v in zip(y[b].flatten(), target[b].flatten(), strict=True)) / (3 * 4 * 5) / 2
        for c in range(3):
            for d in range(3):
                g = [sum(f[b, c, i, j] * f[b, d, i, j] for i in range(4) for j in range(5)) / 60 for f in (y, target)]
                eq_4 += (g[0] - g[1]) ** 2 / 2  # Eq. 3 in g
    assert content_loss(y, target).item() == pytest.approx(eq_2.item(), rel=1e-6)
    assert style_loss(gram_matrix(y), gram_matrix(target)).item() == pytest.approx(eq_4.item(), rel=1e-9)


CONTENT, STYLES = "relu2_1", ["relu1_2", "relu2_2", "relu3_1"]
WEIGHTS = 2.0, 3.0, 5.0


def loss_network():
    """VGG-16 up to relu3_1, as its paper's table has it."""
    torch.manual_seed(0)
    layers = []
    for c in ((3, 64), (64, 64), None, (64, 128), (128, 128), None, (128, 256)):
        layers += [nn.Conv2d(*c, 3, padding=1), nn.ReLU()] if c else [nn.MaxPool2d(2)]
    for p in nn.Sequential(*layers).parameters():
        nn.init.normal_(p, 0.02, (2 / p[0].numel()) ** 0.5 if p.dim() > 1 else 0.1)
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def objective(tmp_path_factory):
    """A function from a painting and a precision to its Objective."""
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(loss_network().state_dict(), path)
    vgg = VGG([CONTENT, *STYLES], "vgg16", path)
    return lambda y_s, *precision: Objective(vgg, y_s, CONTENT, STYLES, *WEIGHTS, *precision)


def eq_5(y_s, y_hat, y_c):
    """In float64: each layer is divided by its mean activation on the painting."""
    layers = loss_network().double()

    def features(x):
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64).view(2, 3, 1, 1)
        x, maps = (x.double() - mean) / std, {}
        for i, layer in enumerate(layers):
            x = layer(x)
            maps[i] = x
        return {name: maps[i] for name, i in (("relu1_2", 3), ("relu2_1", 6), ("relu2_2", 8), ("relu3_1", 11))}

    def gram(f):
        return torch.einsum("bchw,bdhw->bcd", f, f) / f[0].numel()

    f, f_c, f_s = features(y_hat), features(y_c), features(y_s)
    unit = {name: maps.mean() for name, maps in f_s.items()}
    content = ((f[CONTENT] - f_c[CONTENT]) ** 2 / unit[CONTENT] ** 2).mean()
    style = sum((((gram(f[n]) - gram(f_s[n])) / unit[n] ** 2) ** 2).sum() / len(y_hat) for n in STYLES)
    y = y_hat.double()
    tv = ((y[..., 1:, :] - y[..., :-1, :]) ** 2).mean() + ((y[..., 1:] - y[..., :-1]) ** 2).mean()
    total = WEIGHTS[0] * content + WEIGHTS[1] * style + WEIGHTS[2] * tv
    return {"total": total, "content": content, "style": style, "variation": tv}


def floats(losses):
    return {name: value.item() for name, value in losses.items()}


def test_the_objective_is_eq_5_over_the_rescaled_network(objective):
    generator = torch.Generator().manual_seed(0)
    y_s = torch.rand(1, 3, 24, 32, generator=generator)
    y_hat, y_c = torch.rand(2, 2, 3, 16, 20, generator=generator).requires_grad_()
    loss = objective(y_s)
    objective(y_s**3)  # for another style: it must not disturb the first
    losses, expected = loss(y_hat, y_c), eq_5(y_s, y_hat, y_c)
    assert floats(losses) == pytest.approx(floats(expected), 1e-4)
    assert loss(y_s, y_s)["style"].item() == pytest.approx(0, abs=1e-6)
    gradient, for_target = torch.autograd.grad(losses["total"], (y_hat, y_c), allow_unused=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected["total"], y_hat)[0], rtol=1e-3, atol=1e-5)
    assert for_target is None


def test_a_step_is_eq_1(objective):
    """Two steps change the weights as a plain loop does, and return its losses; VGG is left alone."""
    torch.manual_seed(1)
    y_s, x = torch.rand(1, 3, 24, 32), torch.rand(2, 3, 24, 24)
    loss, f_W, plain = objective(y_s), TransformNet(), TransformNet()
    plain.load_state_dict(f_W.state_dict())
    before, vgg = ([p.clone() for p in network.parameters()] for network in (plain, loss.vgg))
    optimizers = [torch.optim.SGD(network.parameters(), 1e-3) for network in (f_W, plain)]
    for _ in range(2):
        losses, expected = johnson.step(f_W, loss, optimizers[0], x), eq_5(y_s, plain(x), x)
        optimizers[1].zero_grad()
        expected["total"].backward()
        optimizers[1].step()
        assert floats(losses) == pytest.approx(floats(expected), 1e-3)
        assert not any(value.requires_grad for value in losses.values())
    for (name, p), q, start in zip(f_W.named_parameters(), plain.parameters(), before, strict=True):
        assert (p - q).norm() < 0.02 * (q - start).norm() + 1e-5, name
    assert all(torch.equal(*pair) for pair in zip(loss.vgg.parameters(), vgg, strict=True))


def test_a_step_in_bfloat16(objective):
    """Both networks compute in it, the losses do not."""
    torch.manual_seed(1)
    y_s, x, f_W, dtypes = torch.rand(1, 3, 24, 32), torch.rand(2, 3, 24, 24), TransformNet(), []
    loss, expected = objective(y_s, torch.bfloat16), eq_5(y_s, f_W(x), x)
    for module in [*f_W.modules(), *loss.vgg.modules()]:
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, i, output: dtypes.append(output.dtype))
    losses = johnson.step(f_W, loss, torch.optim.SGD(f_W.parameters(), 1e-3), x)
    assert set(dtypes) == {torch.bfloat16}
    for name, value in losses.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected[name].item(), rel=0.1), name


# --- Network ---


@pytest.mark.parametrize(("switches", "body"), [(NETWORKS[0], [64] * 10), (NETWORKS[-1], range(82, 63, -2))])
def test_layer_sizes_are_the_papers(switches, body):
    network, sizes = TransformNet(*switches), []
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(lambda m, i, o: sizes.append((o.shape[1], o.shape[-1])))
    with torch.inference_mode():
        assert network(torch.rand(1, 3, 256, 256)).shape == (1, 3, 256, 256)
    first = [(32, 336), (64, 168), (128, 84)] if switches[2] == "start" else [(32, 256), (64, 128), (128, 64)]
    assert sizes == [*first, *[(128, side) for side in body], (64, 128), (32, 256), (3, 256)]
    assert sum(p.numel() for p in network.parameters()) == 1_679_235


def by_hand(p, x, norm="instance", upsample="nearest", padding="reflect"):
    """The supplement's Table 1 up to the last convolution, from weights p."""

    def normalize(name, y):
        dims = (0, 2, 3) if norm == "batch" else (2, 3)
        y = (y - y.mean(dims, keepdim=True)) / (y.var(dims, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return y * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]

    def conv(name, y, stride=1, up=False):
        weight, bias = p[f"{name}.conv2d.weight"], p[f"{name}.conv2d.bias"]
        if up and upsample == "transposed":
            return nnf.conv_transpose2d(y, weight, bias, 2, 1, 1)
        y = y.repeat_interleave(2, 2).repeat_interleave(2, 3) if up else y
        k = weight.shape[-1] // 2
        if padding == "start":
            return nnf.conv2d(y, weight, bias, stride, 0 if name.startswith("res") else k)
        return nnf.conv2d(nnf.pad(y, [k] * 4, mode="reflect"), weight, bias, stride)

    y = nnf.pad(x, [40] * 4, mode="reflect") if padding == "start" else x
    for i, stride in ((1, 1), (2, 2), (3, 2)):
        y = normalize(f"in{i}", conv(f"conv{i}", y, stride)).relu()
    for i in range(1, 6):
        z = normalize(f"res{i}.in1", conv(f"res{i}.conv1", y)).relu()
        z = normalize(f"res{i}.in2", conv(f"res{i}.conv2", z))
        y = z + (y[..., 2:-2, 2:-2] if padding == "start" else y)
    for i in (1, 2):
        y = normalize(f"in{i + 3}", conv(f"deconv{i}", y, up=True)).relu()
    return conv("deconv3", y)[..., : x.shape[2], : x.shape[3]]


def contrasting(network):
    """Give a fresh network norms that do something, and more contrast."""
    with torch.no_grad():
        for name, p in network.named_parameters():
            if ".in" in f".{name}":
                p.uniform_(0.5, 1.5)
        network.deconv3.conv2d.weight *= 30
    return network


@pytest.mark.parametrize("switches", NETWORKS, ids="-".join)
def test_the_network_is_the_papers(switches):
    torch.manual_seed(0)
    network, x = contrasting(TransformNet(*switches)).double(), torch.rand(2, 3, 50, 41, dtype=torch.float64)
    with torch.no_grad():
        expected = ((by_hand(network.state_dict(), x, *switches) / 10).tanh() + 1) / 2
    y = network(x)  # with gradients: never in strips
    assert expected.std() > 0.05
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("switches", NETWORKS[:4], ids="-".join)
@pytest.mark.parametrize(("size", "strip"), [((301, 40), 1), ((129, 37), 1), ((65, 33), 1), ((301, 40), 35 * 40)])
def test_a_large_picture_goes_through_in_strips_with_the_same_result(switches, size, strip, spy, monkeypatch):
    network, x = contrasting(TransformNet(*switches)).eval(), torch.rand(1, 3, *size)
    whole = network(x)  # with gradients: never in strips
    monkeypatch.setattr(johnson, "STRIP", strip)  # 32 rows each, and 34 where the map has 40 columns
    convolved = spy(johnson.Convolution, "convolve")
    with torch.inference_mode():
        assert (network(x) - whole).abs().max() < 1e-4
    assert len(convolved) > 16  # the number of convolutions
    assert (whole[..., 1:, :] - whole[..., :-1, :]).abs().max() > 0.1  # a shift could be seen


# --- Training ---


@pytest.fixture
def folder():
    for i in range(5):
        noise = torch.rand(1, 3, 40, 60, generator=torch.Generator().manual_seed(i))
        common.save_image(noise, f"photos/{i % 2}/{i}.png")
    return Path("photos")


def train(arguments):
    johnson.main(["train", "--style", str(STYLE), *TINY.split(), *map(str, arguments)])


def test_defaults_are_the_papers_or_the_readmes():
    args = vars(johnson.parse_args(["train", "--style", "a.jpg", "--data", "photos"]))
    expected = {
        "content_weight": 1.0, "style_weight": 5.0, "tv_weight": 4.0, "content_layer": "relu2_2", "image_size": 256,
        "style_layers": ["relu1_2", "relu2_2", "relu3_3", "relu4_3"], "batch_size": 4, "iterations": 40000, "lr": 1e-3,
        "style_size": 512, "norm": "instance", "upsample": "nearest", "padding": "reflect", "seed": 0, "resume": None,
        "decay_iterations": 0, "start_from": None,
        "vgg": "auto", "vgg_weights": "auto", "output": Path("model.pth"), "device": "auto", "precision": "auto",
    }  # fmt: skip
    assert {name: args[name] for name in expected} == expected
    args = vars(johnson.parse_args(["stylize", "a.jpg"]))
    expected = {"strength": 1.0, "preserve_color": None, "precision": "auto"}
    assert {name: args[name] for name in expected} == expected
    parameters = inspect.signature(stylize).parameters
    assert {name: parameters[name].default for name in expected} == expected
    assert args["model"] == ROOT / "models" / "auvers.pth"
    assert args["image_size"] is None


def test_a_training_of_the_papers_network_interrupted_and_resumed(folder, spy, monkeypatch):
    crops, objectives, vggs = (spy(johnson, name) for name in ("Crops", "Objective", "VGG"))
    arguments = ["--data", folder, *PAPER, "--vgg", "vgg19", "--lr", "2e-3", "--seed", 7, "--iterations", 4]
    train([*arguments, "-o", "whole.pth"])
    resumable, step, steps = [*arguments, "-o", "parts.pth", "--resume", "--checkpoint-every", 1], johnson.step, []

    def interrupted(*things):
        steps.append(len(steps))
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(*things)

    monkeypatch.setattr(johnson, "step", interrupted)
    with pytest.raises(SystemExit, match="130"):
        train(resumable)
    assert len(steps) == 2
    train(resumable)
    assert len(steps) == 4
    whole, parts = (common.load_checkpoint(Path(f"{name}.checkpoint.pth")) for name in ("whole", "parts"))
    assert all(equal(whole[name], parts[name]) for name in ("step", "history", "model", "optimizer"))

    photos = [common.find_images(folder)]
    assert crops[0] == {"domains": photos, "load_size": 16, "crop_size": 16, "seed": 7, "flip": False}
    assert [vggs[0][name] for name in ("arch", "weights", "pooling")] == ["vgg19", "random", "max"]
    assert torch.equal(objectives[0].pop("y_s"), common.load_image(STYLE, 32))
    weights = {"lambda_c": 1.0, "lambda_s": 5.0, "lambda_tv": 4.0, "precision": torch.float32}
    del objectives[0]["vgg"]
    assert objectives[0] == {"content_layer": "relu2_1", "style_layers": ["relu1_1", "relu2_1"]} | weights
    (group,) = whole["optimizer"]["param_groups"]
    adam = {"lr": 2e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False}
    assert {name: group[name] for name in adam} == adam

    torch.manual_seed(7)
    fresh = TransformNet(*NETWORKS[-1]).state_dict()["conv1.conv2d.weight"]
    assert 0 < (whole["model"]["conv1.conv2d.weight"] - fresh).abs().max() < 4 * 2.1e-3
    network = load_network(Path("whole.pth"))
    assert tuple(network.architecture.values()) == (*NETWORKS[-1], "tanh")
    for name, value in network.state_dict().items():
        assert torch.equal(value, whole["model"][name].half().to(value.dtype)), name


def test_what_a_training_leaves_and_another_starts_from(folder, spy, monkeypatch, fails):
    crops = spy(johnson, "Crops")
    for i in range(5, 10):
        shutil.copy(folder / "0" / "0.png", folder / "0" / f"{i}.png")
    train(["--data", folder, "--iterations", 11, "-o", "new/a.pth"])
    names = ["a.checkpoint.pth", "a.losses.csv", "a.losses.png", "a.pth", "a.samples.jpg"]
    assert sorted(path.name for path in Path("new").iterdir()) == names
    rows = Path("new/a.losses.csv").read_text().splitlines()
    assert rows[0] == "step,total,content,style,variation"
    assert [row.split(",")[0] for row in rows[1:]] == ["1", "10"]
    total, content, style, variation = map(float, rows[2].split(",")[1:])
    assert total == pytest.approx(content + 5 * style + 4 * variation, rel=1e-4)
    model, checkpoint = (common.load_checkpoint(Path("new", name)) for name in ("a.pth", "a.checkpoint.pth"))
    assert all(value.dtype == torch.half for value in model["model"].values())
    assert model["architecture"] == {"norm": "instance", "upsample": "nearest", "padding": "reflect", "output": "tanh"}
    assert model["settings"] == model["architecture"] | {
        "content_weight": 1.0, "style_weight": 5.0, "tv_weight": 4.0, "content_layer": "relu2_1", "image_size": 16,
        "style_layers": ["relu1_1", "relu2_1"], "style_size": 32, "batch_size": 2, "lr": 1e-3, "decay_iterations": 0,
        "seed": 0, "precision": "torch.float32", "vgg": "vgg16", "processes": 1,
    }  # fmt: skip
    assert model["command"].startswith("python johnson.py train --style ")
    photos, trained = common.hold_out(common.find_images(folder), 16)
    assert crops[0]["domains"] == [trained]
    assert list(checkpoint["inputs"]["--data"]) == [str(path.relative_to(folder)) for path in trained]
    sheet, first = common.load_image("new/a.samples.jpg")[..., 20:, :], load_network(Path("new/a.pth"))
    assert not first.training
    for left, pictures in ((0, photos), (20, first(photos))):  # below the captions
        assert (sheet[..., : 4 * 16, left : left + 16] - torch.cat([*pictures], -2)).abs().mean() < 0.03

    step, rates = johnson.step, []

    def noting(f_W, objective, optimizer, x):
        if not rates:
            assert f_W.training
            assert equal(f_W.state_dict(), first.state_dict())
        rates.append(optimizer.param_groups[0]["lr"])
        return step(f_W, objective, optimizer, x)

    monkeypatch.setattr(johnson, "step", noting)
    arguments = ["--data", folder, *PAPER, "--iterations", 6, "--decay-iterations", 4, "--lr", 1e-4, "-o", "b.pth"]
    train([*arguments, "--start-from", "new/a.pth"])
    assert rates == pytest.approx([1e-4, 1e-4, 1e-4, 7.5e-5, 5e-5, 2.5e-5])
    assert load_network(Path("b.pth")).architecture == first.architecture  # and not that of the flags
    shutil.copy("b.pth", "c.pth")
    assert "trained with another --start-from" in fails(train, *arguments, "--start-from", "c.pth", "--resume")


def test_no_training_overwrites_another_nor_goes_on_with_another_painting(folder, fails):
    arguments = ["--data", folder, "--iterations", 1]
    train([*arguments, "-o", "a.pth"])
    Path("c.pth").write_text("a model")
    shutil.copy(STYLE, "s.samples.jpg")
    torch.save({name: 2 * value for name, value in loss_network().state_dict().items()}, "other.vgg")
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    for case, words in (
        (["-o", "c.pth"], "c.pth exists"),
        (["-o", "s.pth", "--style", "s.samples.jpg"], "an input"),
        (["-o", folder / "d.pth"], "an input"),
        (["-o", "a.pth", "--resume", "--style", PHOTO], "another --style: style.jpg"),
        (["-o", "a.pth", "--resume", "--vgg-weights", "other.vgg"], "another --vgg-weights: "),
        (["-o", "a.pth", "--resume", "--padding", "start"], "--padding reflect, not start"),
    ):
        assert words in fails(train, *arguments, *case)
    assert all(path.read_bytes() == data for path, data in before.items())


# --- Models ---


@pytest.mark.parametrize("size", [(32, 48), (37, 53)])
def test_published_models_give_the_same_pixels(spy, size):
    """The network of pytorch/examples: no tanh, no margin, 0 … 255, float32."""
    torch.manual_seed(0)
    network, x = contrasting(TransformNet()), 0.5 + 0.01 * torch.rand(1, 3, *size)  # flat: the norms' ε feels the 255
    weights = network.state_dict()
    weights["deconv3.conv2d.weight"] *= 4
    weights["deconv3.conv2d.bias"] += 120
    unused = {f"in{i}.running_{part}": torch.rand(3) for i in range(1, 6) for part in ("mean", "var")}  # in older files
    torch.save(weights | unused, "mosaic.pth")
    expected = by_hand(weights, 255 * x).clamp(0, 255) / 255
    assert 0.1 < expected.std() < 0.4
    precisions = spy(johnson, "pick_precision")
    torch.testing.assert_close(stylize(load_network(Path("mosaic.pth")), x), expected, rtol=0, atol=1e-3)
    stylize(network, x)
    assert [(call["name"], call["exact"]) for call in precisions] == [("auto", True), ("auto", False)]


def test_the_styles_that_come_with_it_have_names(fails):
    for name in johnson.STYLES:
        assert load_network(johnson.parse_args(["stylize", "a.jpg", "--model", name]).model).architecture
    styles = ", ".join(johnson.STYLES)
    error = fails(johnson.main, "stylize", "a.png", "--model", "candy")
    assert f"no such file: candy; name one, or a style: {styles}" in error


def test_the_model_that_comes_with_it_paints_what_it_did():
    """Pixels of the version that trained it."""
    network = load_network(johnson.model_file("auvers"))
    y = stylize(network, common.load_image(PHOTO, 64), precision="float32")
    assert not (y.requires_grad or network.training)
    pixels = [[0.2917, 0.5619, 0.7922], [0.8066, 0.4174, 0.3427], [0.7081, 0.6650, 0.3707], [0.0681, 0.2224, 0.1099]]
    torch.testing.assert_close(y[0, :, [0, 10, 30, -1], [0, 20, 50, -1]].T, torch.tensor(pixels), rtol=0, atol=2e-3)
    y.requires_grad_().sum().backward()  # an ordinary tensor


def test_what_is_no_model():
    broken = TransformNet(output="linear").state_dict()
    broken["in5.bias"][3] = float("nan")
    foreign = {"model.1.weight": torch.zeros(64, 3, 7, 7)}
    cyclegans = {"architecture": {"blocks": 9, "width": 64}, "G": {}, "F": {}}
    for state in (broken, foreign, cyclegans):
        torch.save(state, "a.pth")
        with pytest.raises(InputError, match=r"a\.pth"):
            load_network(Path("a.pth"))


@pytest.mark.parametrize("size", [(1, 1), (3, 70), (37, 53)])
def test_a_margin_hides_the_frame(size):
    """The result is the middle of that of a picture with a reflected margin, however small it is."""
    network, x = TransformNet().eval(), torch.rand(1, 3, *size)
    with torch.inference_mode():
        wide = network(johnson.reflect(x, 8))
    assert torch.equal(stylize(network, x, precision="float32"), wide[..., 8:-8, 8:-8])
    x, row = torch.rand(1, 3, 50, 45), torch.tensor([0.0, 1, 2]).view(1, 1, 1, 3)
    assert torch.equal(johnson.reflect(x, 40), nnf.pad(x, [40] * 4, mode="reflect"))
    assert johnson.reflect(row, 5)[0, 0, 5].tolist() == [1, 0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2, 1]
    with pytest.raises(InputError, match="9×4 px is too small"):
        network(torch.rand(1, 3, 4, 9))
    assert network(torch.rand(1, 3, 5, 9)).shape == (1, 3, 5, 9)


def test_strength_blends_and_colors_can_be_the_photos():
    network, x = contrasting(TransformNet()).eval(), torch.rand(1, 3, 16, 16)
    full = stylize(network, x, precision="float32")
    assert torch.equal(stylize(network, x, strength=0.0), x)
    torch.testing.assert_close(stylize(network, x, 0.25, "float32"), 0.75 * x + 0.25 * full)
    kept = stylize(network, x, 0.25, "float32", preserve_color="luminance")
    torch.testing.assert_close(kept, 0.75 * x + 0.25 * common.keep_color(full, x))
    assert (full - x).abs().mean() > 0.05
    half = stylize(network, x, precision="bfloat16")
    assert 0 < (half - full).abs().max() < 0.1


def test_one_picture(folder, spy):
    network = TransformNet()
    torch.save({"architecture": network.architecture, "model": network.state_dict()}, "m.pth")
    photo, options = folder / "0" / "0.png", spy(johnson, "stylize")

    def run(*arguments):
        johnson.main(["stylize", str(photo), "--model", "m.pth", *arguments, "--device", "cpu"])

    run()
    with Image.open("0_m.png") as picture:
        assert picture.size == (60, 40)
        assert "johnson.py stylize" in picture.text["command"]
    run("-o", "same.png", "--strength", "0")
    assert torch.equal(common.load_image("same.png"), common.load_image(photo))
    run("-o", "new/b.jpg", "--image-size", "30", "--precision", "bfloat16", "--preserve-color", "luminance")
    with Image.open("new/b.jpg") as picture:
        assert picture.size == (30, 20)
    assert (options[-1]["precision"], options[-1]["preserve_color"]) == ("bfloat16", "luminance")


TRAIN = ["train", "--style", STYLE, "--data", FOLDER, *TINY.split()]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["stylize", STYLE, "--strength", "2"], "--strength"),
        (["stylize", STYLE, "-o", STYLE], "an input"),
        (["train", "--data", "."], "--style"),
        ([*TRAIN, "--data", ".", "-o", "../a.pth"], "no images"),
        ([*TRAIN, "--content-layer", "relu9_1"], "relu9_1"),
        ([*TRAIN, "-o", "model.jpg"], ".pth"),
        ([*TRAIN, "--norm", "batch"], "--norm instance, or one process"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments, word, monkeypatch, fails):
    if arguments[-1] == "batch":
        monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun does
    assert word in fails(johnson.main, *arguments)
    assert not list(Path().iterdir())
