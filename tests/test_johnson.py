"""johnson.py against the paper's equations and network, written out; its training; published models."""

import inspect
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as nnf
from PIL import Image
from test_cli import readme_commands
from torch import nn

import common
import johnson
from common import IMAGENET_MEAN, IMAGENET_STD, VGG, InputError, gram_matrix
from johnson import Objective, TransformNet, content_loss, load_network, style_loss, stylize

ROOT = Path(__file__).parent.parent
STYLE = ROOT / "examples" / "style.jpg"
SWITCHES = [
    {"norm": norm, "upsample": upsample, "padding": padding}
    for norm in ("instance", "batch")
    for upsample in ("nearest", "transposed")
    for padding in ("reflect", "start")
]
TINY = (
    "--image-size 16 --style-size 32 --batch-size 2 --vgg vgg16 --vgg-weights random --device cpu --precision float32"
)
PIXELS = [[0.5616, 0.4346, 0.3364], [0.808, 0.6858, 0.4624]]  # of the first version, in float32
TINY_LAYERS = ["--content-layer", "relu2_1", "--style-layers", "relu1_1", "relu2_1"]


# --- Losses ---


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


LAYERS = ("relu2_1", ["relu1_1", "relu1_2", "relu2_1"])


def objective(y_s, lambda_c=2.0, lambda_s=3.0, lambda_tv=5.0):
    return Objective(
        VGG(["relu2_1", "relu1_1", "relu1_2"], "vgg16", "random"), y_s, *LAYERS, lambda_c, lambda_s, lambda_tv
    )


def rescaled_features(y_s):
    """A function from images to relu1_1, 1_2 and 2_1 of VGG-16, each over its mean activation on y_s."""
    layers = VGG(["relu2_1"], "vgg16", "random").double().features

    def features(x):
        x, maps = (x - IMAGENET_MEAN.double()) / IMAGENET_STD.double(), []
        for layer in layers:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                maps.append(x)
        return maps

    means = [f.mean() for f in features(y_s.double())]
    return lambda x: [f / mean for f, mean in zip(features(x.double()), means, strict=True)]


def gram_by_hand(f):
    return torch.stack([m.flatten(1) @ m.flatten(1).T / m.numel() for m in f])


def eq_5(y_s, y_hat, y_c, lambda_c=2.0, lambda_s=3.0, lambda_tv=5.0):
    features = rescaled_features(y_s)
    f, f_c, f_s = features(y_hat), features(y_c), features(y_s)
    content = ((f[2] - f_c[2]) ** 2).mean()
    style = sum(((gram_by_hand(a) - gram_by_hand(b)) ** 2).sum() / len(a) for a, b in zip(f, f_s, strict=True))
    y = y_hat.double()
    tv = ((y[..., 1:, :] - y[..., :-1, :]) ** 2).mean() + ((y[..., 1:] - y[..., :-1]) ** 2).mean()
    terms = {"content": content, "style": style, "variation": tv}
    return {"total": lambda_c * content + lambda_s * style + lambda_tv * tv} | terms


def test_the_objective_is_eq_5_over_the_rescaled_network():
    generator = torch.Generator().manual_seed(0)
    y_s = torch.rand(1, 3, 24, 32, generator=generator)
    y_hat, y_c = torch.rand(2, 2, 3, 16, 20, generator=generator)
    loss = objective(y_s)
    objective(y_s**3)  # for another style: it must not disturb the first
    for name, value in eq_5(y_s, y_hat, y_c).items():
        assert loss(y_hat, y_c)[name].item() == pytest.approx(value.item(), rel=2e-4), name
    assert loss(y_s, y_s)["style"].item() == pytest.approx(0, abs=1e-6)
    y_hat, y_c = y_hat.requires_grad_(), y_c.requires_grad_()
    loss(y_hat, y_c)["total"].backward()
    assert y_c.grad is None
    assert y_hat.grad.abs().sum() > 0


def test_a_step_is_eq_1():
    """Two steps give the weights and losses of a plain loop with torch's Adam, and leave VGG alone."""
    torch.manual_seed(0)
    y_s, x = torch.rand(1, 3, 24, 32), torch.rand(2, 3, 24, 24)
    loss, f_W = objective(y_s), TransformNet()
    plain = TransformNet()
    plain.load_state_dict(f_W.state_dict())
    vgg = [p.clone() for p in loss.vgg.parameters()]
    optimizers = [torch.optim.Adam(network.parameters(), 1e-3) for network in (f_W, plain)]
    for _ in range(2):
        losses = johnson.step(f_W, loss, optimizers[0], x)
        expected = eq_5(y_s, plain(x), x)
        optimizers[1].zero_grad()
        expected["total"].backward()
        optimizers[1].step()
        assert all(losses[name].item() == pytest.approx(expected[name].item(), rel=1e-3) for name in expected)
        assert not any(value.requires_grad for value in losses.values())
    for (name, p), q in zip(f_W.named_parameters(), plain.named_parameters(), strict=True):
        if name.endswith("weight"):  # a bias before a norm has no effect, and no gradient but noise
            assert (p - q[1]).abs().mean() < 2e-5, name
    assert all(torch.equal(p, q) for p, q in zip(vgg, loss.vgg.parameters(), strict=True))


# --- Network ---


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "-".join(s.values()))
def test_layer_sizes_are_the_papers(switches):
    network, sizes = TransformNet(**switches), []
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(lambda m, i, o: sizes.append((o.shape[1], o.shape[-1])))
    with torch.inference_mode():
        y = network(torch.rand(1, 3, 256, 256))
    assert y.shape == (1, 3, 256, 256)
    if switches["padding"] == "start":
        body = [(128, side) for side in range(82, 63, -2)]
        assert sizes == [(32, 336), (64, 168), (128, 84), *body, (64, 128), (32, 256), (3, 256)]
    else:
        assert sizes == [(32, 256), (64, 128), (128, 64), *[(128, 64)] * 10, (64, 128), (32, 256), (3, 256)]
    assert sum(p.numel() for p in network.parameters()) == 1_679_235


@pytest.mark.parametrize("switches", [SWITCHES[0], SWITCHES[-1]], ids=["ours", "paper"])
@pytest.mark.parametrize("size", [(37, 53), (24, 96), (96, 24), (9, 5)])
def test_size_in_is_size_out(switches, size):
    with torch.inference_mode():
        y = TransformNet(**switches).eval()(torch.rand(1, 3, *size))
    assert y.shape == (1, 3, *size)
    assert 0 <= y.min() <= y.max() <= 1


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "-".join(s.values()))
@pytest.mark.parametrize("size", [(301, 40), (129, 37), (65, 33)])
def test_a_large_picture_goes_through_in_strips_with_the_same_result(switches, size, monkeypatch):
    network, x = TransformNet(**switches).eval(), torch.rand(1, 3, *size)
    network.deconv3.conv2d.weight.data *= 100  # more contrast than a fresh network gives
    whole = network(x)  # with gradients: never in strips
    monkeypatch.setattr(johnson, "STRIP", 1)  # 32 rows each
    with torch.inference_mode():
        assert (network(x) - whole).abs().max() < 1e-4
    assert (whole[..., 1:, :] - whole[..., :-1, :]).abs().max() > 0.01  # a shift could be seen


def by_hand(p, x, paper=False):
    """The supplement's Table 1 up to the last convolution, from weights p: the paper's own, or ours."""

    def norm(name, y):
        dims = (0, 2, 3) if paper else (2, 3)
        y = (y - y.mean(dims, keepdim=True)) / (y.var(dims, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return y * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]

    def conv(name, y, stride=1, inner=False):
        weight, bias = p[f"{name}.conv2d.weight"], p[f"{name}.conv2d.bias"]
        if paper and name in ("deconv1", "deconv2"):
            return nnf.conv_transpose2d(y, weight, bias, 2, 1, 1)
        k = weight.shape[-1] // 2
        if paper:
            return nnf.conv2d(y, weight, bias, stride, 0 if inner else k)
        y = y.repeat_interleave(2, 2).repeat_interleave(2, 3) if name in ("deconv1", "deconv2") else y
        return nnf.conv2d(nnf.pad(y, [k] * 4, mode="reflect"), weight, bias, stride)

    y = nnf.pad(x, [40] * 4, mode="reflect") if paper else x
    for i, stride in ((1, 1), (2, 2), (3, 2)):
        y = norm(f"in{i}", conv(f"conv{i}", y, stride)).relu()
    for i in range(1, 6):
        z = norm(f"res{i}.in1", conv(f"res{i}.conv1", y, inner=True)).relu()
        z = norm(f"res{i}.in2", conv(f"res{i}.conv2", z, inner=True))
        y = z + (y[..., 2:-2, 2:-2] if paper else y)
    for i in (1, 2):
        y = norm(f"in{i + 3}", conv(f"deconv{i}", y)).relu()
    return conv("deconv3", y)


@pytest.mark.parametrize("switches", [SWITCHES[0], SWITCHES[-1]], ids=["ours", "paper"])
def test_the_network_is_the_papers(switches):
    torch.manual_seed(0)
    network, x = TransformNet(**switches), torch.rand(2, 3, 64, 48)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if ".in" in f".{name}":
                p.uniform_(0.5, 1.5)
        network.deconv3.conv2d.weight *= 10
        y = by_hand(network.state_dict(), x, paper=switches["padding"] == "start")
        expected = ((y / 10).tanh() + 1) / 2
    y = network(x)  # with gradients: never in strips
    assert expected.std() > 0.05
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-4)


def test_reflect_equals_reflection_padding_and_goes_further():
    x = torch.rand(1, 3, 50, 45)
    assert torch.equal(johnson.reflect(x, 40), nn.functional.pad(x, [40] * 4, mode="reflect"))
    row = torch.tensor([0.0, 1, 2]).view(1, 1, 1, 3)
    assert johnson.reflect(row, 5)[0, 0, 5].tolist() == [1, 0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2, 1][0:13]


def test_nearest_upsampling_leaves_no_checkerboard():
    """The energy at period 2 of a flat picture's result, away from the border."""

    def energy(upsample):
        torch.manual_seed(0)
        with torch.inference_mode():
            y = TransformNet(upsample=upsample)(torch.full((1, 3, 96, 96), 0.5))[..., 32:64, 32:64].double()
        sign = (-1.0) ** torch.arange(32)
        return max((y * sign).mean().abs().item(), (y * sign[:, None]).mean().abs().item())

    assert energy("nearest") < 1e-6
    assert energy("transposed") > 1e-5  # the test can see one


# --- Training ---


@pytest.fixture
def folder(tmp_path):
    for i in range(5):
        (tmp_path / "photos" / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        noise = torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(i))
        image = Image.fromarray((noise.permute(1, 2, 0) * 255).byte().numpy())
        image.save(tmp_path / "photos" / f"{i % 2}" / f"{i}.png")
    return tmp_path / "photos"


def train(*arguments):
    johnson.main(["train", "--style", str(STYLE), *TINY.split(), *TINY_LAYERS, *map(str, arguments)])


def test_defaults_are_the_papers_or_the_readmes():
    args = vars(johnson.parse_args(["train", "--style", "a.jpg", "--data", "photos"]))
    expected = {
        "content_weight": 1.0, "style_weight": 5.0, "tv_weight": 4.0, "content_layer": "relu2_2", "image_size": 256,
        "style_layers": ["relu1_2", "relu2_2", "relu3_3", "relu4_3"], "batch_size": 4, "iterations": 40000, "lr": 1e-3,
        "style_size": 512, "norm": "instance", "upsample": "nearest", "padding": "reflect", "seed": 0, "resume": None,
    }  # fmt: skip
    assert {name: args[name] for name in expected} == expected
    assert inspect.signature(stylize).parameters["strength"].default == 1.0


def test_a_training_in_parts_from_the_command_line(folder, tmp_path, monkeypatch):
    seen, made = [], {}
    crops, adam, init = johnson.Crops, torch.optim.Adam, Objective.__init__
    monkeypatch.setattr(johnson, "Crops", lambda *a: seen.append(a) or crops(*a))
    monkeypatch.setattr(torch.optim, "Adam", lambda *a, **k: made.update(adam=(a[1:], k)) or adam(*a, **k))
    monkeypatch.setattr(
        Objective, "__init__", lambda self, vgg, y_s, *a: made.update(y_s=y_s, rest=a) or init(self, vgg, y_s, *a)
    )
    arguments = ["--data", folder, "--workers", 0, "--norm", "batch", "--lr", "2e-3", "--seed", 7]
    train(*arguments, "--iterations", 4, "-o", tmp_path / "whole.pth")
    for iterations in (1, 3, 4):
        train(*arguments, "--iterations", iterations, "-o", tmp_path / "parts.pth", "--resume")
    whole, parts = (common.load_checkpoint(tmp_path / f"{name}.checkpoint.pth") for name in ("whole", "parts"))
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])
    assert (whole["step"], whole["history"]) == (parts["step"], parts["history"])
    files, *sizes = seen[0]
    assert (files, sizes) == ([common.find_images(folder)], [16, 16, 7])
    assert made["adam"] == ((2e-3,), {})  # betas and all else are torch's, which are the paper's
    assert torch.equal(made["y_s"], common.load_image(STYLE, 32))
    assert made["rest"] == ("relu2_1", ["relu1_1", "relu2_1"], 1.0, 5.0, 4.0, torch.float32)
    torch.manual_seed(7)
    fresh = TransformNet("batch").state_dict()
    assert not torch.equal(whole["model"]["conv1.conv2d.weight"], fresh["conv1.conv2d.weight"])
    assert (whole["model"]["conv1.conv2d.weight"] - fresh["conv1.conv2d.weight"]).abs().max() < 4 * 2.1e-3


def test_what_a_training_leaves(folder, tmp_path):
    for i in range(5, 10):
        shutil.copy(folder / "0" / "0.png", folder / "0" / f"{i}.png")
    train("--data", folder, "--iterations", 11, "-o", tmp_path / "new" / "a.pth", "--workers", 0)
    names = ["a.checkpoint.pth", "a.losses.csv", "a.losses.png", "a.pth", "a.samples.jpg"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names
    rows = (tmp_path / "new" / "a.losses.csv").read_text().splitlines()
    assert rows[0] == "step,total,content,style,variation"
    assert [row.split(",")[0] for row in rows[1:]] == ["1", "10"]
    assert (tmp_path / "new" / "a.pth").stat().st_size < 4e6
    model = common.load_checkpoint(tmp_path / "new" / "a.pth")
    assert model["settings"]["style_weight"] == 5.0
    assert all(value.dtype == torch.half for value in model["model"].values())
    assert model["architecture"] == {"norm": "instance", "upsample": "nearest", "padding": "reflect", "output": "tanh"}
    checkpoint = common.load_checkpoint(tmp_path / "new" / "a.checkpoint.pth")
    trained = [str(path.relative_to(folder)) for path in common.find_images(folder)[4:]]
    assert sorted(checkpoint["inputs"]["--data"]) == sorted(trained)
    photos, _ = common.hold_out(common.find_images(folder), 16)
    sheet = common.load_image(tmp_path / "new" / "a.samples.jpg")
    assert sheet.shape == (1, 3, 2 * 16, 4 * 16)
    assert (sheet[..., :16, :] - torch.cat([*photos], -1)).abs().mean() < 0.03
    network = load_network(tmp_path / "new" / "a.pth")
    assert not network.training
    assert (sheet[..., 16:, :] - torch.cat([*network(photos)], -1)).abs().mean() < 0.03


def test_no_training_overwrites_another_nor_goes_on_with_another_painting(folder, tmp_path, capsys):
    arguments = ["--data", folder, "--workers", 0, "--iterations", 1]
    train(*arguments, "-o", tmp_path / "a.pth")
    (tmp_path / "c.pth").write_text("a model")
    shutil.copy(STYLE, tmp_path / "s.samples.jpg")
    other = tmp_path / "other.vgg"
    torch.save(
        {name: 2 * value for name, value in VGG(["relu5_3"], "vgg16", "random").features.state_dict().items()}, other
    )
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for case, words in (
        (["-o", tmp_path / "c.pth"], "c.pth exists"),
        (["-o", tmp_path / "s.jpg"], "suffix"),
        (["-o", tmp_path / "s.pth", "--style", tmp_path / "s.samples.jpg"], "an input"),
        (["-o", folder / "d.pth"], "an input"),
        (
            ["-o", tmp_path / "a.pth", "--resume", "--style", ROOT / "examples" / "portrait.jpg"],
            "another --style: style.jpg",
        ),
        (["-o", tmp_path / "a.pth", "--resume", "--vgg-weights", other], "another --vgg-weights: "),
        (["-o", tmp_path / "a.pth", "--resume", "--padding", "start"], "--padding reflect, not start"),
    ):
        with pytest.raises(SystemExit) as exit_:
            train(*arguments, *case)
        assert exit_.value.code == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    assert all(path.read_bytes() == data for path, data in before.items())


# --- Models ---


@pytest.mark.parametrize("size", [(32, 48), (37, 53)])
def test_published_models_give_the_same_pixels(tmp_path, size):
    torch.manual_seed(0)
    channels = {"conv1": (32, 3, 9), "conv2": (64, 32, 3), "conv3": (128, 64, 3)}
    channels |= {f"res{i}.conv{k}": (128, 128, 3) for i in range(1, 6) for k in (1, 2)}
    channels |= {"deconv1": (64, 128, 3), "deconv2": (32, 64, 3), "deconv3": (3, 32, 9)}
    norms = {f"in{i}": c for i, c in enumerate((32, 64, 128, 64, 32), 1)}
    norms |= {f"res{i}.in{k}": 128 for i in range(1, 6) for k in (1, 2)}
    state = {f"{n}.conv2d.weight": torch.randn(o, i, k, k) / (i * k * k) ** 0.5 for n, (o, i, k) in channels.items()}
    state |= {f"{n}.conv2d.bias": torch.rand(o) for n, (o, _, _) in channels.items()}
    state |= {f"{n}.{part}": torch.rand(c) for n, c in norms.items() for part in ("weight", "bias")}
    state["deconv3.conv2d.weight"] *= 30
    state["deconv3.conv2d.bias"] += 120
    weights = dict(state)
    for i in range(1, 6):  # as in the older files
        state[f"in{i}.running_mean"], state[f"in{i}.running_var"] = torch.rand(3), torch.rand(3)
    torch.save(state, tmp_path / "mosaic.pth")
    x = torch.rand(1, 3, *size)
    with torch.no_grad():
        expected = by_hand(weights, 255 * x).clamp(0, 255)[..., : size[0], : size[1]] / 255
    assert expected.std() > 0.03
    torch.testing.assert_close(stylize(load_network(tmp_path / "mosaic.pth"), x), expected, rtol=0, atol=1e-4)


def test_the_model_that_comes_with_it_paints_what_it_did():
    """Pixels of the version that trained it."""
    network = load_network(johnson.MODEL)
    assert not network.training
    y = stylize(network, common.load_image(ROOT / "examples" / "content.jpg", 64), precision="float32")
    torch.testing.assert_close(y[0, :, 10, 20], torch.tensor(PIXELS[0]), rtol=0, atol=2e-3)
    torch.testing.assert_close(y[0, :, 30, 50], torch.tensor(PIXELS[1]), rtol=0, atol=2e-3)
    y.requires_grad_().sum().backward()  # an ordinary tensor


@pytest.mark.parametrize("kind", ["image", "text", "nan", "foreign", "cyclegan", "list", "missing"])
def test_what_is_no_model(tmp_path, kind):
    path = tmp_path / "a.pth"
    if kind == "image":
        shutil.copy(STYLE, path)
    elif kind == "text":
        path.write_text("no model")
    elif kind == "nan":
        state = TransformNet(output="linear").state_dict()
        state["in5.bias"][3] = float("nan")
        torch.save(state, path)
    elif kind == "foreign":
        torch.save({"model.1.weight": torch.zeros(64, 3, 7, 7)}, path)
    elif kind == "cyclegan":
        torch.save({"architecture": {"blocks": 9, "width": 64}, "G": {}, "F": {}}, path)
    elif kind == "list":
        torch.save([1, 2], path)
    with pytest.raises(InputError, match=r"a\.pth"):
        load_network(path)


@pytest.mark.parametrize("size", [(1, 1), (3, 70), (37, 53)])
def test_a_margin_hides_the_frame(size):
    """The result is the middle of that of a picture with a reflected margin, however small it is."""
    network, x = TransformNet().eval(), torch.rand(1, 3, *size)
    y = stylize(network, x, precision="float32")
    assert y.shape == x.shape
    with torch.inference_mode():
        wide = network(johnson.reflect(x, 8))
    assert torch.equal(y, wide[..., 8:-8, 8:-8])


def test_preserved_colors_are_the_photos():
    network, x = TransformNet().eval(), torch.rand(1, 3, 16, 16)
    full = stylize(network, x, precision="float32")
    kept = stylize(network, x, precision="float32", preserve_color="luminance")
    torch.testing.assert_close(kept, common.keep_color(full, x))


def test_strength_blends():
    network, x = TransformNet().eval(), torch.rand(1, 3, 16, 16)
    full = stylize(network, x, precision="float32")
    assert torch.equal(stylize(network, x, strength=0.0), x)
    torch.testing.assert_close(stylize(network, x, 0.25, "float32"), 0.75 * x + 0.25 * full)
    assert (full - x).abs().mean() > 0.05


# --- stylize on the command line ---


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    network = TransformNet()
    torch.save({"architecture": network.architecture, "model": network.state_dict()}, tmp_path / "m.pth")
    return tmp_path / "m.pth"


def run(*arguments):
    johnson.main(["stylize", *map(str, arguments), "--device", "cpu"])


def test_one_picture(folder, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(folder / "0" / "0.png", "--model", model)
    with Image.open("0_m.png") as picture:
        assert picture.size == (60, 40)
        assert "johnson.py stylize" in picture.text["command"]
    run(folder / "0" / "0.png", "--model", model, "-o", "new/b.jpg", "--image-size", 30)
    with Image.open("new/b.jpg") as picture:
        assert picture.size == (30, 20)
    run(folder / "0" / "0.png", "--model", model, "-o", "same.png", "--strength", 0)
    assert torch.equal(common.load_image("same.png"), common.load_image(folder / "0" / "0.png"))


def test_the_readmes_commands_work(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", "examples")
    shutil.copytree(folder, "holiday")
    commands = readme_commands("johnson.py")
    assert len(commands) == 6
    for arguments in commands:
        tiny = [*TINY.split(), *TINY_LAYERS, "--iterations", "1"] if arguments[0] == "train" else ["--image-size", "24"]
        johnson.main([*arguments, *tiny])
    assert Path("examples/content_auvers.jpg").exists()
    assert Path("portrait_style.jpg").exists()
    assert len(list(Path("painted").rglob("*.png"))) == 5


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["stylize"], "input"),
        (["stylize", STYLE, "--model"], "--model"),
        (["stylize", "missing.jpg"], "missing.jpg"),
        (["stylize", STYLE, "--strength", "2"], "--strength"),
        (["stylize", STYLE, "--model", "missing.pth"], "missing.pth"),
        (["train", "--data", "."], "--style"),
        (["train", "--style", STYLE, "--data", "missing"], "missing"),
        (["train", "--style", STYLE, "--data", ".", "-o", "../a.pth"], "no images"),
        (["train", "--style", STYLE, "--data", ROOT / "examples", "--content-layer", "relu9_1"], "relu9_1"),
        (["train", "--style", "missing.jpg", "--data", ROOT / "examples", "--vgg-weights", "random"], "missing.jpg"),
        (["train", "--style", STYLE, "--data", ROOT / "examples", "--resume", "missing.pth"], "missing.pth"),
        (["train", "--style", STYLE, "--data", ROOT / "examples", "-o", "model"], ".pth"),
        (["stylize", STYLE, "-o", STYLE], "an input"),
        (["train", "--style", STYLE, "--data", ROOT / "examples", "--style-weight", "nan"], "--style-weight"),
        ([], "command"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments, word, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    monkeypatch.chdir("empty")
    if arguments[:1] == ["stylize"] and "--model" not in arguments:
        arguments = [*arguments, "--model", model]
    if "--content-layer" in arguments:
        arguments = [*arguments, "--vgg-weights", "random"]
    with pytest.raises(SystemExit) as exit_:
        johnson.main([str(argument) for argument in arguments])
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert word in lines[-1]
