"""johnson.py: its network in all variants, its trainings, published models, and stylising."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as nnf
from conftest import CONTENT, ROOT, STYLE, equal, files, provenance, run, save_noise, state
from conftest import norm as norm_of

import common
import johnson
from common import InputError, load_image
from johnson import TransformNet, load_network, stylize

NETWORKS = [
    (n, u, p)
    for n in ("instance", "batch")
    for u in ("nearest", "transposed")
    for p in ("reflect", "start")
]


def by_hand(p, x, norm="instance", upsample="nearest", padding="reflect"):
    """Compute the supplement's Table 1 up to the last convolution, from weights p."""

    def normalize(name, y):
        y = norm_of(y, (0, 2, 3) if norm == "batch" else (2, 3))
        return y * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]

    def conv(name, y, stride=1, up=False):
        weight, bias = p[f"{name}.conv2d.weight"], p[f"{name}.conv2d.bias"]
        if up and upsample == "transposed":
            return nnf.conv_transpose2d(y, weight, bias, 2, 1, 1)
        y = y.repeat_interleave(2, 2).repeat_interleave(2, 3) if up else y
        k = 0 if padding == "start" and "res" in name else weight.shape[-1] // 2
        y = nnf.pad(y, [k] * 4, mode="constant" if padding == "start" else "reflect")
        return nnf.conv2d(y, weight, bias, stride)

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
    network, x = (
        contrasting(TransformNet(*switches)).double(),
        torch.rand(2, 3, 50, 41, dtype=torch.float64),
    )
    with torch.no_grad():
        expected = ((by_hand(network.state_dict(), x, *switches) / 10).tanh() + 1) / 2
    assert expected.std() > 0.05
    torch.testing.assert_close(network(x).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("edge", ["reflect", "constant"])
@pytest.mark.parametrize("size", [(7, 6), (2, 3)])
def test_nearest_upsampling_is_one_transposed_convolution(edge, size):
    """Maps are enlarged 2×2 by nearest neighbours, padded by 1, convolved; its gradients."""
    layer = johnson.NearestConvolution(5, 4, edge).double()
    maps = torch.randn(2, 5, *size, dtype=torch.float64, requires_grad=True)
    large = maps.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    padded = nnf.pad(large, [1] * 4, mode=edge)
    expected = nnf.conv2d(padded, layer.conv2d.weight, layer.conv2d.bias)
    y = layer(maps)
    torch.testing.assert_close(y, expected)
    weights = torch.randn_like(y)
    variables = [maps, *layer.parameters()]
    gradients = torch.autograd.grad(y, variables, weights)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, variables, weights))


def test_maps_in_bfloat16_are_padded_in_bfloat16():
    """In float32, as autocast does it on a CPU, it would take longer."""
    with torch.autocast("cpu", torch.bfloat16):
        assert johnson.pad(torch.ones(1, 1, 4, 4).bfloat16(), 1, "reflect").dtype == torch.bfloat16


def test_a_training_does_not_write_over_the_model_that_it_starts_from(photos, fails):
    run(TRAIN, "-o", "a.pth")
    Path("a.checkpoint.pth").unlink()
    before = Path("a.pth").read_bytes()
    for flags in ("", "--resume"):
        assert "a.pth exists" in fails(f"{TRAIN} --start-from a.pth -o a.pth {flags}")
    assert Path("a.pth").read_bytes() == before


@pytest.fixture
def photos():
    save_noise(*(f"photos/{i % 2}/{i}.png" for i in range(10)), size=(60, 40))


TRAIN = f"johnson.py train --style {STYLE} --data photos"


def test_what_a_training_leaves(photos):
    run(TRAIN, "--iterations", 7, "--decay-iterations", 4, "-o", "new/a.pth")
    assert files("new") == [
        "a.checkpoint.pth",
        "a.losses.csv",
        "a.losses.png",
        "a.pth",
        "a.samples.jpg",
    ]
    assert "command: python johnson.py train" in provenance("new/a.samples.jpg")
    header, _, row = Path("new/a.losses.csv").read_text().splitlines()
    assert header == "step,total,content,style,variation"
    total, content, style, variation = map(float, row.split(",")[1:])
    assert total == pytest.approx(content + 5 * style + 4 * variation, rel=1e-4)
    model, checkpoint = (
        common.load_checkpoint(Path("new", name)) for name in ("a.pth", "a.checkpoint.pth")
    )
    assert all(value.dtype == torch.half for value in model["model"].values())
    (group,) = checkpoint["optimizer"]["param_groups"]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (2.5e-4, (0.9, 0.999), 0)
    assert [common.lr_factor(n, 2, 4) for n in range(6)] == [1, 1, 1, 0.75, 0.5, 0.25]


def test_a_training_starts_from_its_seed_or_from_another_style(photos, capsys):
    network = "--norm batch --upsample transposed --padding start"
    run(f"{TRAIN} --crop-size 44 --lr 0 -o a.pth --seed 7 {network}")
    run(f"{TRAIN} --crop-size 44 --lr 0 -o b.pth --start-from a.pth")
    assert "going on from a.pth: norm batch, upsample transposed" in capsys.readouterr().err
    means = [load_network(Path(name)).in1.running_mean for name in ("a.pth", "b.pth")]
    assert not torch.equal(*means)  # from the first step on, they are those of what it sees
    torch.manual_seed(7)
    expected = TransformNet("batch", "transposed", "start").half().float()
    for path in (Path("a.pth"), Path("b.pth")):
        network = load_network(path)
        assert network.architecture == expected.architecture
        equal(dict(network.named_parameters()), dict(expected.named_parameters()))


def test_published_models_give_the_same_pixels(monkeypatch):
    """The network of pytorch/examples: no tanh, no margin, 0 … 255, float32 by default."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    torch.manual_seed(0)
    network, x = (
        contrasting(TransformNet()),
        0.5 + 0.01 * torch.rand(1, 3, 37, 53),
    )  # flat: the norms' ε feels the 255
    weights = network.state_dict()
    weights["deconv3.conv2d.weight"] *= 4
    weights["deconv3.conv2d.bias"] += 120
    unused = {
        f"in{i}.running_{part}": torch.rand(3) for i in range(1, 6) for part in ("mean", "var")
    }  # in older files
    torch.save(weights | unused, "mosaic.pth")
    expected = by_hand(weights, 255 * x).clamp(0, 255) / 255
    assert 0.1 < expected.std() < 0.4
    torch.testing.assert_close(
        stylize(load_network(Path("mosaic.pth")), x), expected, rtol=0, atol=1e-3
    )


def test_the_models_that_come_with_it_paint_what_they_did():
    """Pixels of the version that trained `auvers`."""
    assert not any(load_network(johnson.model_file(name)).training for name in johnson.STYLES)
    y = stylize(
        load_network(ROOT / "models" / "auvers.pth"), load_image(CONTENT, 64), precision="float32"
    )
    pixels = [
        [0.2917, 0.5619, 0.7922],
        [0.8066, 0.4174, 0.3427],
        [0.7081, 0.6650, 0.3707],
        [0.0681, 0.2224, 0.1099],
    ]
    torch.testing.assert_close(
        y[0, :, [0, 10, 30, -1], [0, 20, 50, -1]].T, torch.tensor(pixels), rtol=0, atol=2e-3
    )
    y.requires_grad_().sum().backward()  # an ordinary tensor


def test_a_margin_hides_the_frame():
    """The result is the middle of that of a picture with a reflected margin of 8 px."""
    network, x = TransformNet().eval(), torch.rand(1, 3, 37, 53)
    with torch.inference_mode():
        wide = network(nnf.pad(x, [8] * 4, mode="reflect"))
    torch.testing.assert_close(stylize(network, x, precision="float32"), wide[..., 8:-8, 8:-8])
    with pytest.raises(InputError, match="too small"):
        network(x[..., :4, :9])


@pytest.mark.parametrize("switches", NETWORKS[:4], ids="-".join)
@pytest.mark.parametrize("size", [(129, 45), (65, 47), (64, 44), (68, 44)])
def test_strips_give_the_same_result(switches, size, monkeypatch):
    network = contrasting(TransformNet(*switches)).eval()
    x = torch.rand(1, 3, *size)
    with torch.inference_mode():
        whole = network(x)
        for values in (1, 32 * 34 * size[1]):
            monkeypatch.setattr(johnson, "STRIP", values)
            torch.testing.assert_close(network(x), whole, rtol=0, atol=1e-4)
    assert (whole[..., 1:, :] - whole[..., :-1, :]).abs().max() > 0.1  # a shift could be seen


@pytest.mark.parametrize("values", [1, 32 * 69 * 35, 32 * 69 * 46, 2**23])
def test_a_large_picture_is_convolved_in_strips_of_an_even_number_of_rows(values, monkeypatch):
    """Of so many values at most, or of 32 rows. A training takes no strips."""
    network = contrasting(TransformNet()).eval()
    x = torch.rand(1, 3, 301, 45)
    seen = {}  # by layer, and the values of a row of its padded maps: the rows of each strip
    for name in ("conv1", "conv2", "conv3", "res1.conv1", "res5.conv2", "deconv3"):
        layer = network.get_submodule(name).conv2d

        def note(layer, inputs, y, name=name):
            row = inputs[0][0, :, 0].numel()
            seen.setdefault((name, row), []).append(y.shape[2] * layer.stride[0])

        layer.register_forward_hook(note)
    transposed = nnf.conv_transpose2d

    def note_transposed(x, **options):
        seen.setdefault(("up", x[0, :, 0].numel()), []).append(x.shape[2] - 2)
        return transposed(x, **options)

    monkeypatch.setattr(nnf, "conv_transpose2d", note_transposed)
    monkeypatch.setattr(johnson, "STRIP", values)
    stylize(network, x, precision="float32")
    assert len(seen) == 8  # two upsamplings
    for (_, row), rows in seen.items():
        most = 2 * max(16, values // row // 2)
        assert set(rows[:-1]) <= {most} and rows[-1] <= most
    seen.clear()
    network(x)
    assert {len(rows) for rows in seen.values()} == {1}


def test_a_picture_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(common.os, "sysconf", lambda name: 1000)  # pages, of as many bytes: 1 MB
    network = TransformNet().eval()
    stylize(network, torch.rand(1, 3, 40, 40))
    with pytest.raises(InputError, match="out of memory"):
        stylize(network, torch.rand(1, 3, 70, 70))


@pytest.mark.parametrize("name", johnson.CHOICES)
def test_an_unknown_word_is_refused(name):
    with pytest.raises(InputError, match=f"{name} batchnorm: choose {johnson.CHOICES[name][0]} or"):
        TransformNet(**{name: "batchnorm"})
    torch.save({"architecture": {name: "batchnorm"}, "model": {}}, "m.pth")
    with pytest.raises(InputError, match=r"m\.pth is no model"):
        load_network(Path("m.pth"))


@pytest.mark.parametrize("switches", [{}, {"padding": "start", "norm": "batch"}], ids=str)
def test_the_comments_say_what_comes_out_of_each_layer(switches):
    """With `start`, they say what would come out without its 80 px."""
    network = TransformNet(**switches).eval()
    x = torch.rand(2, 3, 64, 48)
    shapes = {}
    for name, module in network.named_children():
        module.register_forward_hook(lambda m, i, y, name=name: shapes.update({name: y.shape}))
    network(x)
    lines = re.findall(
        r"self\.(\w+) = .*# .* {2}\(B, (\d+), (H\S*), (W\S*)\)$",
        inspect.getsource(TransformNet),
        re.MULTILINE,
    )
    assert len(lines) == 11
    for name, channels, height, width in lines:
        expected = [eval(side, {"H": 64, "W": 48}) for side in (height, width)]
        if switches:
            left = {"c": 20, "r": 20 - 4 * int(name[-1]), "d": 0}[name[0]]
            scale = {"conv1": 4, "conv2": 2}.get(name, 1)
            expected = [side + left * scale for side in expected]
        assert shapes[name] == (2, int(channels), *expected), name


def test_any_float_is_taken_and_what_is_no_picture_refused():
    network = contrasting(TransformNet()).eval()
    x = torch.rand(2, 3, 20, 24)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        y = stylize(network, x.to(dtype), 0.7, "float32", "luminance")
        assert y.dtype == torch.float32
        expected = stylize(network, x.to(dtype).float(), 0.7, "float32", "luminance")
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
    wrong = [x[:0], x[..., :0], x[0], x[:, :2], x[0, 0, 0, 0], x.byte(), x / 0, 2 * x, x.tolist()]
    for pictures in wrong:
        with pytest.raises(InputError, match="0 to 1"):
            stylize(network, pictures)
    with pytest.raises(InputError, match="luminance"):
        stylize(network, x, preserve_color="histogram")


@pytest.mark.parametrize("key", ["", "model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_weights_load_from_any_wrapper(key, prefix):
    network = TransformNet()
    weights = {prefix + name: weight for name, weight in network.state_dict().items()}
    weights[prefix + "in1.running_mean"] = torch.rand(32)  # older torch kept it, without using it
    torch.save({key: weights, "epoch": 3} if key else weights, "m.pth")
    loaded = load_network(Path("m.pth"))
    equal(loaded.state_dict(), network.state_dict())
    assert loaded.linear and not loaded.training


def test_keep_every_keeps_models_and_sheets(photos):
    kept = [f"a.{step}.{end}" for step in ("000004", "000008") for end in ("pth", "samples.jpg")]
    run(TRAIN, "--iterations", 8, "--keep-every", 4, "-o", "new/a.pth")
    assert set(kept) < set(files("new"))
    models = {name: common.load_checkpoint(Path("new", name)) for name in (*kept[::2], "a.pth")}
    assert [model["step"] for model in models.values()] == [4, 8, 8]
    run(TRAIN, "--iterations", 4, "-o", "b.pth")
    b = common.load_checkpoint(Path("b.pth"))["model"]
    equal(models["a.000004.pth"]["model"], b)
    assert load_image("new/a.000004.samples.jpg").equal(load_image("b.samples.jpg"))
    run("johnson.py stylize photos/0/0.png --model new/a.000004.pth -o y.png")


def test_samples_do_not_change_a_training(photos):
    """They are made in eval mode: batch norm takes the statistics of the training."""
    for name, every in (("a", 1), ("b", 100)):
        run(f"{TRAIN} --norm batch --iterations 3 --checkpoint-every {every} -o {name}/a.pth")
    equal(state("a"), state("b"))
    model = load_network(Path("a/a.pth"))
    held_out, _ = common.hold_out(common.find_images(Path("photos")), 16)
    with torch.inference_mode():
        common.save_sheet({"x": held_out, "f_W(x)": model(held_out)}, Path("sheet.jpg"), {})
    close = torch.testing.assert_close
    close(load_image("sheet.jpg"), load_image("a/a.samples.jpg"), rtol=0, atol=0.05)


def test_the_models_that_come_with_it_have_what_a_training_writes(photos):
    run(TRAIN, "-o", "a.pth")
    written = common.load_checkpoint(Path("a.pth"))
    for name in johnson.STYLES:
        model = common.load_checkpoint(johnson.model_file(name))
        assert model.keys() == written.keys()
        assert model["args"].keys() == written["args"].keys()
        assert not re.search(r"'/|home|root", str(model["args"]))


def test_every_flag_of_stylize(photos):
    network, x = contrasting(TransformNet()).eval(), load_image("photos/0/0.png")
    full = stylize(network, x, precision="float32")
    kept = stylize(network, x, 0.25, "float32", "luminance")
    torch.testing.assert_close(kept, 0.75 * x + 0.25 * common.keep_color(full, x))
    torch.save({"architecture": network.architecture, "model": network.state_dict()}, "m.pth")
    for flag in ("", "--precision bfloat16", "--preserve-color luminance", "--strength 0.5"):
        run(f"johnson.py stylize photos/0/0.png --model m.pth {flag}")
        assert ((load_image("0_m.png") - full).abs().max() > 0.005) == bool(flag)
