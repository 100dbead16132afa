"""cyclegan.py against the paper's equations, sizes and schedule, written out; a swap that it learns; its training."""

import functools
import http.client
import http.server
import io
import math
import shutil
import threading
import zipfile
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as nnf
from PIL import Image
from test_common import equal
from torch import nn

import common
import cyclegan
from common import InputError
from cyclegan import CycleGAN, Generator, ImagePool, PatchDiscriminator, load_generator, lr_factor, translate

TINY = "--crop-size 32 --width 4 --blocks 1 --workers 0 --device cpu --precision float32"


def gan(**changes):
    torch.manual_seed(0)
    return CycleGAN(**{"blocks": 1, "width": 4} | changes)


# --- Networks ---


def test_parameter_counts_and_a_patch_has_70_pixels():
    """The support of one verdict's gradient, without the norms, which look at the whole picture."""
    G, D, x = Generator(), PatchDiscriminator(), torch.rand(1, 3, 256, 256, requires_grad=True)
    assert round(sum(p.numel() for p in G.parameters()) / 1e6, 3) == 11.378
    assert round(sum(p.numel() for p in D.parameters()) / 1e6, 3) == 2.765
    D.model = nn.Sequential(*[module for module in D.model if not isinstance(module, nn.InstanceNorm2d)])
    verdicts = D(x)
    assert verdicts.shape == (1, 1, 30, 30)
    verdicts[0, 0, 15, 15].backward()
    for others in ((0, 1, 3), (0, 1, 2)):
        seen = x.grad.abs().sum(others).nonzero()
        assert seen.max() - seen.min() + 1 == 70


def norm(y):
    return (y - y.mean((2, 3), keepdim=True)) / (y.var((2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()


def test_the_discriminator_is_the_papers():
    """C64-C128-C256-C512 and one channel, on pictures in -1 … 1."""
    torch.manual_seed(0)
    D, x = PatchDiscriminator(6), torch.rand(2, 3, 48, 64)
    for p in D.parameters():
        p.data += 0.1 * torch.randn_like(p)
    convolutions, y = [m for m in D.modules() if isinstance(m, nn.Conv2d)], 2 * x - 1
    for i, (c, stride) in enumerate(zip(convolutions, (2, 2, 2, 1, 1), strict=True)):
        y = nnf.conv2d(y, c.weight, c.bias, stride, 1)
        y = norm(y) if i in (1, 2, 3) else y
        y = torch.where(y > 0, y, 0.2 * y) if i < 4 else y
    torch.testing.assert_close(D(x), y, rtol=1e-4, atol=1e-4)


def test_initial_weights():
    for network in (Generator(2), PatchDiscriminator()):
        weights = torch.cat([p.flatten() for name, p in network.named_parameters() if name.endswith("weight")])
        assert abs(weights.mean()) < 1e-4
        assert weights.std().item() == pytest.approx(0.02, rel=0.01)
        assert all((p == 0).all() for name, p in network.named_parameters() if name.endswith("bias"))
        assert not any(isinstance(m, nn.InstanceNorm2d) and m.affine for m in network.modules())


# --- Losses ---


def test_a_step_is_the_papers():
    """Three steps, with a pool of one picture, against a plain loop over Eq. 1 to 3 with torch's Adam."""
    torch.manual_seed(0)
    ours, pairs = gan(lr=1e-3, beta1=0.3, pool_size=1, seed=3, lambda_cycle=7.0), torch.rand(3, 2, 1, 3, 32, 32)
    networks = ours.G, ours.F, ours.D_X, ours.D_Y
    G, F, D_X, D_Y = plain = Generator(1, 4), Generator(1, 4), PatchDiscriminator(4), PatchDiscriminator(4)
    for net, copy in zip(networks, plain, strict=True):
        copy.load_state_dict(net.state_dict())
    adam_G = torch.optim.Adam([*G.parameters(), *F.parameters()], 1e-3, (0.3, 0.999))
    adam_D = torch.optim.Adam([*D_X.parameters(), *D_Y.parameters()], 1e-3, (0.3, 0.999))
    kept, chance = {}, [torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)]
    for x, y in pairs:
        losses = ours.step(x, y)
        G_x, F_y = G(x), F(y)
        cycle = 2 * ((F(G_x) - x).abs().mean() + (G(F_y) - y).abs().mean())
        identity = 2 * ((G(y) - y).abs().mean() + (F(x) - x).abs().mean())
        a, b = ((D_Y(G_x) - 1) ** 2).mean(), ((D_X(F_y) - 1) ** 2).mean()
        total = a + b + 7 * cycle + 3.5 * identity
        expected = {"total": total, "G": a, "F": b, "cycle": cycle, "identity": identity}
        adam_G.zero_grad()
        total.backward()
        adam_G.step()
        shown = []
        for name, fake, random in (("X", F_y.detach(), chance[0]), ("Y", G_x.detach(), chance[1])):
            swap = name in kept and torch.rand((), generator=random) < 0.5
            if swap:
                torch.randint(1, (), generator=random)
            shown.append(kept[name] if swap else fake)
            kept[name] = fake if swap or name not in kept else kept[name]
        expected["D_X"] = (((D_X(x) - 1) ** 2).mean() + (D_X(shown[0]) ** 2).mean()) / 2
        expected["D_Y"] = (((D_Y(y) - 1) ** 2).mean() + (D_Y(shown[1]) ** 2).mean()) / 2
        adam_D.zero_grad()
        (expected["D_X"] + expected["D_Y"]).backward()
        adam_D.step()
        assert losses.keys() == expected.keys()
        for name, value in expected.items():
            assert losses[name].item() == pytest.approx(value.item(), rel=2e-3), name
    for net, copy in zip(networks, plain, strict=True):
        for (key, p), q in zip(net.named_parameters(), copy.parameters(), strict=True):
            if key.endswith("weight"):  # a bias before a norm has no effect, and no gradient but noise
                assert (p - q).abs().mean() < 3e-5, key


def test_a_step_in_bfloat16():
    """All networks compute in it, and the losses are nearly those of float32."""
    exact, half, (x, y), dtypes = gan(), gan(precision=torch.bfloat16), torch.rand(2, 1, 3, 32, 32), []
    for module in [*half.generators.modules(), *half.discriminators.modules()]:
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(lambda m, i, output: dtypes.append(output.dtype))
    losses, expected = half.step(x, y), exact.step(x, y)
    assert set(dtypes) == {torch.bfloat16}
    for name, value in losses.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected[name].item(), rel=0.05), name


def test_defaults_are_the_papers():
    args = vars(cyclegan.parse_args(["train", "x", "y"]))
    expected = {
        "lambda_cycle": 10.0, "lambda_identity": 0.5, "pool_size": 50, "lr": 2e-4, "beta1": 0.5, "batch_size": 1,
        "epochs": 100, "decay_epochs": 100, "load_size": 286, "crop_size": 256, "blocks": 9, "width": 64,
    }  # fmt: skip
    assert {name: args[name] for name in expected} == expected
    small = cyclegan.parse_args(["train", "x", "y", "--crop-size", "128"])
    assert (small.blocks, small.load_size) == (6, 143)
    ours = CycleGAN()
    for optimizer in (ours.optimizer_G, ours.optimizer_D):
        (group,) = optimizer.param_groups
        assert (group["lr"], group["betas"], group["weight_decay"]) == (2e-4, (0.5, 0.999), 0)
    assert (ours.lambda_cycle, ours.lambda_identity, ours.pool_X.size, ours.pool_Y.size) == (10, 0.5, 50, 50)
    assert cyclegan.SERVER == "https://efrosgans.eecs.berkeley.edu/cyclegan/datasets"
    names = "horse2zebra apple2orange summer2winter_yosemite monet2photo cezanne2photo ukiyoe2photo vangogh2photo maps"
    assert set(cyclegan.DATASETS) == {*names.split(), "facades", "iphone2dslr_flower", "ae_photos"}


def test_pool_fills_first_then_swaps_about_half():
    pool = ImagePool(50, seed=0)
    shown = [pool.query(torch.full((1, 3, 2, 2), float(i), requires_grad=True)) for i in range(1050)]
    assert not any(image.requires_grad for image in shown)
    shown = [image[0, 0, 0, 0].item() for image in shown]
    assert shown[:50] == list(range(50))
    assert 450 < sum(i != image for i, image in enumerate(shown)) < 550
    assert len(set(shown[50:])) == 1000  # none is shown twice: what is shown leaves the pool
    assert len(pool.images) == 50
    assert min(image[0, 0, 0].item() for image in pool.images) >= 50  # each place is swapped now and then
    empty, made = ImagePool(0, seed=0), torch.rand(2, 3, 4, 4)
    assert torch.equal(empty.query(made), made)
    assert not empty.images


def test_learning_rate_factor():
    factors = [lr_factor(epoch, 100, 100) for epoch in (0, 99, 100, 150, 199, 200)]
    assert factors == pytest.approx([1, 1, 1, 0.5, 0.01, 0])
    assert lr_factor(0, 1, 0) == 1


def test_warnings_name_the_remedy():
    ours, x, good = gan(), torch.rand(2, 3, 32, 32), [[0.0, 0.2, 0.2]] * 20
    ours.G = ours.F = plain = lambda x: 0.5 * x
    assert cyclegan.diagnose(ours, x, x, good) == []
    for name, row in (("D_X", [0.0, 0.001, 0.2]), ("D_Y", [0.0, 0.2, 0.001])):
        (warning,) = cyclegan.diagnose(ours, x, x, [row] * 20)
        assert warning.startswith(name)
        assert "--" in warning
        assert cyclegan.diagnose(ours, x, x, [row] * 19) == cyclegan.diagnose(ours, x, x, [row] * 20 + good) == []
    for function, words in ((lambda x: x + 0.005, "identity"), (lambda x: 1 - x, "light into dark")):
        for name in "GF":
            ours.G = ours.F = plain
            setattr(ours, name, function)
            (warning,) = cyclegan.diagnose(ours, x, x, good)
            assert warning.startswith(name)
            assert words in warning


# --- Data ---


def shapes(color, n, seed, size=40):
    """Discs of `color` on grey, as uint8 (n, size, size, 3)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.full((n, size, size, 3), 120.0)
    ys, xs = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    for image in images:
        for _ in range(3):
            cy, cx, r = (torch.randint(a, b, (), generator=generator) for a, b in ((0, size), (0, size), (5, 11)))
            inside = (ys - cy) ** 2 + (xs - cx) ** 2 < r * r
            image[inside] = torch.tensor(color)
    return images.byte().numpy()


RED, BLUE = (200.0, 40.0, 40.0), (40.0, 40.0, 200.0)


@pytest.fixture
def folders():
    for name, color, n in (("x", RED, 5), ("y", BLUE, 3)):
        Path(name, "deep").mkdir(parents=True)
        for i, pixels in enumerate(shapes(color, n, seed=n)):
            size = (50, 37) if i == 3 else (40, 40)
            Image.fromarray(pixels).resize(size).save(Path(name, "deep" if i % 2 else "", f"any name {i}.png"))
    return [Path("x"), Path("y")]


def test_test_folders_are_used_for_the_samples(folders):
    for part, folder in zip(("trainA", "trainB", "testA"), [*folders, folders[1]], strict=True):
        shutil.copytree(folder, Path("set", part))
    (X, x_samples), (Y, y_samples) = cyclegan.domains(["set"], 32)
    assert (len(X), len(Y)) == (5, 3)
    tests = common.find_images(Path("set/testA"))
    assert torch.equal(x_samples, torch.cat([common.load_image(path, 32, center_crop=True) for path in tests]))
    assert len(y_samples) == 3  # of trainB, as there is no testB
    for i in range(6):
        shutil.copy(X[0], folders[0] / f"{i}.png")
    (X, x_samples), _ = cyclegan.domains(["x", "y"], 32)
    assert (len(x_samples), X) == (4, common.find_images(folders[0])[4:])


# --- Download ---


def archive(method=zipfile.ZIP_STORED, names=("trainA/a.png", "trainB/b.png", "testA/c.png")):
    """What the server has under the name of horse2zebra."""
    picture, data = io.BytesIO(), io.BytesIO()
    Image.effect_noise((64, 64), 80).save(picture, "bmp")
    with zipfile.ZipFile(data, "w", method) as file:
        for name in names:
            file.writestr(f"horse2zebra/{name}", picture.getvalue())
    return data.getvalue()


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The file that the server, on the loopback address, gives out."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(cyclegan, "SERVER", f"http://127.0.0.1:{httpd.server_port}")
    monkeypatch.setenv("no_proxy", "*")
    yield tmp_path / "horse2zebra.zip"
    httpd.shutdown()


def test_a_set_is_downloaded_once(served):
    served.write_bytes(archive())
    assert cyclegan.download("horse2zebra") == Path("data/horse2zebra")
    names = sorted(str(path) for path in Path("data").rglob("*") if path.is_file())
    assert names == [f"data/horse2zebra/{name}" for name in ("testA/c.png", "trainA/a.png", "trainB/b.png")]
    served.unlink()
    (X, _), (Y, _) = cyclegan.domains(["horse2zebra"], 32)
    assert [p.name for p in (*X, *Y)] == ["a.png", "b.png"]


def test_a_download_that_is_not_whole_is_no_set(served):
    stored, deflated = archive(), archive(zipfile.ZIP_DEFLATED)
    damaged = [data[:100] + bytes(900) + data[1000:] for data in (stored, deflated)]
    for data in (stored[: len(stored) // 2], *damaged, archive(names=["trainA/a.png"])):
        served.write_bytes(data)
        with pytest.raises(InputError, match=r"cut short or damaged|has no folders"):
            cyclegan.download("horse2zebra")
        assert not any(Path("data").iterdir())


def test_other_processes_wait_for_the_first_ones_download(served, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(cyclegan.time, "sleep", lambda seconds: Path("data/horse2zebra").mkdir(parents=True))
    assert cyclegan.download("horse2zebra") == Path("data/horse2zebra")


def test_offline_and_unknown_sets_are_one_clear_line(served, monkeypatch, fails):
    for name, words in (("horse2zebra", "cannot download"), ("horse2giraffe", "apple2orange")):
        assert words in fails(cyclegan.main, "train", name)
    for error in (http.client.IncompleteRead(b""), TimeoutError()):
        monkeypatch.setattr(cyclegan, "download_and_extract_archive", Mock(side_effect=error))
        assert f"horse2zebra.zip ({type(error).__name__}" in fails(cyclegan.main, "train", "horse2zebra")
    for output in ("horse2zebra", "data/horse2zebra"):  # which the next call would take for the set
        assert "an input" in fails(cyclegan.main, "train", "horse2zebra", "-o", output)


# --- Training ---


def train(arguments):
    cyclegan.main(["train", *TINY.split(), *map(str, arguments)])


STATE = ["G", "F", "D_X", "D_Y", "optimizer_G", "optimizer_D", "pools", "step", "history"]


def test_a_training_in_parts_from_the_command_line(folders, spy, monkeypatch):
    """In the middle of an epoch, with a pool that has begun to swap, while the learning rate falls."""
    rates, crops, step = [], spy(cyclegan, "Crops"), CycleGAN.step

    def noting(self, x, y):
        rates.append([g["lr"] for g in self.optimizer_G.param_groups + self.optimizer_D.param_groups])
        return step(self, x, y)

    monkeypatch.setattr(CycleGAN, "step", noting)
    arguments = [*folders, "--epochs", 1, "--decay-epochs", 2, "--pool-size", 2, "--lr", "1e-3", "--seed", 5]
    arguments += ["--lambda-cycle", 3, "--beta1", 0.9, "--lambda-identity", 0, "--export", "new/small.pth"]
    train([*arguments, "-o", "new/run"])
    assert rates == [pytest.approx([rate] * 2) for rate in [1e-3] * 10 + [5e-4] * 5]
    small = common.load_checkpoint(Path("new/small.pth"))
    Path("new/small.pth").unlink()
    for steps in (7, 11, 20, 20):  # at last nothing is left to do but what a killed one may not have written
        Path("new/small.pth").unlink(missing_ok=True)
        train([*arguments, "-o", "parts", "--max-steps", steps, "--resume"])
    whole, parts = (common.load_checkpoint(Path(name, "checkpoint.pth")) for name in ("new/run", "parts"))
    assert whole["step"] == 15
    assert all(equal(whole[name], parts[name]) for name in STATE)
    domains = [common.find_images(folder) for folder in folders]
    assert crops[0] == {"domains": domains, "load_size": 36, "crop_size": 32, "seed": 5, "flip": True}
    assert whole["optimizer_D"]["param_groups"][0]["betas"] == (0.9, 0.999)
    assert [pool.keys() for pool in whole["pools"][0]] == [{"images", "generator"}] * 2
    assert [len(pool["images"]) for pool in whole["pools"][0]] == [2, 2]
    for _, _, _, total, G, F, cycle, identity, *_ in whole["history"]:
        assert identity == 0
        assert total == pytest.approx(G + F + 3 * cycle, rel=1e-5)

    sheets = [f"epoch_{epoch:03d}.jpg" for epoch in (1, 2, 3)]
    files = sorted(path.name for path in Path("new/run").iterdir())
    assert files == ["checkpoint.pth", *sheets, "losses.csv", "losses.png"]
    rows = [row.split(",") for row in Path("new/run/losses.csv").read_text().splitlines()]
    assert rows[0] == ["step", "epoch", "lr", "total", "G", "F", "cycle", "identity", "D_X", "D_Y"]
    assert [row[:2] for row in rows[1:]] == [["1", "1"], ["10", "2"]]
    with Image.open("new/run/epoch_001.jpg") as sheet:
        assert sheet.size == (8 * (32 + 4) + 640, 480)  # with the plot
    assert equal(small["G"], common.load_checkpoint(Path("new/small.pth"))["G"])
    for model, precision in (("new/small.pth", torch.half), ("new/run/checkpoint.pth", torch.float)):
        for direction, name in (("x2y", "G"), ("y2x", "F")):
            for key, value in load_generator(Path(model), direction).state_dict().items():
                assert torch.equal(value, whole[name][key].to(precision).float())
    assert all(value.dtype == torch.half for value in small["G"].values())


def test_a_training_can_be_prolonged(folders, capsys):
    """At the full rate again, on larger pictures; that the plan has changed is said."""
    train([*folders, "-o", "a", "--epochs", 0, "--decay-epochs", 1])
    train([*folders, "-o", "a", "--epochs", 2, "--decay-epochs", 0, "--load-size", 48, "--resume"])
    warnings = [line.split("trained with ")[1] for line in capsys.readouterr().err.splitlines() if "trained" in line]
    plan = ["--epochs 0, not 2", "--decay-epochs 1, not 0", "--load-size 36, not 48"]
    assert warnings == [f"{change} as from now" for change in plan]
    state = common.load_checkpoint(Path("a/checkpoint.pth"))
    assert state["step"] == 10
    assert [row[2] for row in state["history"]] == [pytest.approx(2e-4)] * 2
    assert state["settings"]["load_size"] == 48


def test_the_sheet_shows_both_ways():
    t, x, y = gan(), torch.rand(2, 3, 32, 32), torch.rand(1, 3, 32, 32)
    G, F = t.G, t.F
    columns = cyclegan.sample_columns(t, x, y)
    expected = {"x": x, "G(x)": G(x), "F(G(x))": F(G(x)), "F(x)": F(x)}
    expected |= {"y": y, "F(y)": F(y), "G(F(y))": G(F(y)), "G(y)": G(y)}
    assert list(columns) == list(expected)
    for name, column in expected.items():
        torch.testing.assert_close(columns[name], column, msg=name)


def test_a_bad_command_is_one_clear_line(folders, fails):
    train([*folders, "-o", "a", "--max-steps", 1])
    Path("model.pth").write_text("another model")
    for case, words in (
        ([*folders, "-o", "a", "--resume", "--blocks", 2], "--blocks 1, not 2"),
        ([folders[1], folders[0], "-o", "a", "--resume"], "another X: "),
        ([*folders, "--load-size", 33, "--crop-size", 64], "--load-size"),
        ([*folders, "--crop-size", 45], "multiple of 4"),
        ([*folders, "--crop-size", 28, "--max-steps", 1], "--crop-size"),
        ([*folders, "--export", "small"], ".pth"),
        ([*folders, "--export", "model.pth"], "model.pth exists"),
        ([*folders, "--export", "a/checkpoint.pth", "--resume", "a/checkpoint.pth"], "an input"),
        ([*folders, "-o", folders[0] / "run"], "an input"),
        ([folders[0], "missing"], "no such folder"),
        ([*folders, folders[0]], "name two"),
        ([*folders, "--epochs", 0, "--decay-epochs", 0], "--epochs"),
    ):
        output = [] if "-o" in case else ["-o", "b"]
        assert words in fails(train, *case, *output, "--max-steps", 1), case


def test_a_colour_swap_is_learned():
    """Red discs become blue and the other way round, although no picture of X has its counterpart in Y."""
    t = gan(width=8)
    X, Y = (torch.from_numpy(shapes(c, 64, s, 32)).permute(0, 3, 1, 2).float() / 255 for c, s in ((RED, 1), (BLUE, 2)))
    test = torch.from_numpy(shapes(RED, 8, 3, 32)).permute(0, 3, 1, 2).float() / 255
    true_swap = test.flip(1)  # red ↔ blue; grey stays

    def error():
        with torch.no_grad():
            return (t.G(test) - true_swap).abs().mean().item()

    untrained, generator = error(), torch.Generator().manual_seed(0)
    for i in range(200):
        x, y = (data[torch.randint(64, (1,), generator=generator)] for data in (X, Y))
        t.set_lr(2e-3 * min(1, 2 - i / 100))
        t.step(x, y)
    unchanged = (test - true_swap).abs().mean().item()
    assert error() < 0.45 * untrained
    assert error() < 0.6 * unchanged


def published():
    """The authors' generator as the issue of their code describes it, written independently of Generator."""

    def block():
        module = nn.Module()
        module.conv_block = nn.ModuleDict({"1": nn.Conv2d(256, 256, 3), "5": nn.Conv2d(256, 256, 3)})
        return module

    model = {"1": nn.Conv2d(3, 64, 7), "4": nn.Conv2d(64, 128, 3), "7": nn.Conv2d(128, 256, 3)}
    model |= {str(10 + i): block() for i in range(9)}
    model |= {"19": nn.ConvTranspose2d(256, 128, 3), "22": nn.ConvTranspose2d(128, 64, 3), "26": nn.Conv2d(64, 3, 7)}
    module = nn.Module()
    module.model = nn.ModuleDict(model)
    return module


def published_forward(module, x):
    """x and the result in -1 … 1."""
    m, f = module.model, nn.functional

    def conv(layer, y, reflect):
        return f.conv2d(f.pad(y, [reflect] * 4, mode="reflect"), layer.weight, layer.bias)

    y = norm(conv(m["1"], x, 3)).relu()
    for name in ("4", "7"):
        y = norm(f.conv2d(y, m[name].weight, m[name].bias, 2, 1)).relu()
    for i in range(10, 19):
        block = m[str(i)].conv_block
        y = y + norm(conv(block["5"], norm(conv(block["1"], y, 1)).relu(), 1))
    for name in ("19", "22"):
        y = norm(f.conv_transpose2d(y, m[name].weight, m[name].bias, 2, 1, 1)).relu()
    return conv(m["26"], y, 3).tanh()


def test_published_generators_give_the_same_pixels(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    torch.manual_seed(0)
    module, x = published(), torch.rand(1, 3, 36, 48)
    state = module.state_dict()
    state |= {"model.2.running_mean": torch.zeros(64), "model.2.running_var": torch.ones(64)}  # of older files
    torch.save(state, "latest_net_G.pth")
    network = load_generator(Path("latest_net_G.pth"))
    with torch.no_grad():
        expected = (published_forward(module, 2 * x - 1) + 1) / 2
    assert expected.std() > 0.01
    assert torch.allclose(translate(network, x), expected, atol=1e-5)
    with pytest.raises(InputError, match="one generator"):
        load_generator(Path("latest_net_G.pth"), "y2x")


@pytest.mark.parametrize("size", [(37, 53), (96, 24), (5, 9)])
def test_size_in_is_size_out(size):
    network, x = Generator(1, 4).eval(), torch.rand(1, 3, *size)
    y = translate(network, x.requires_grad_())
    assert y.shape == x.shape
    assert 0 <= y.min() <= y.max() <= 1
    assert not y.requires_grad
    y.requires_grad_().sum().backward()  # an ordinary tensor
    with pytest.raises(InputError, match="too small"):
        translate(network, x[..., :4])


def test_padding_mirrors_the_picture_and_is_cut_off():
    network, x = Generator(1, 4).eval(), torch.rand(1, 3, 32, 40)
    with torch.no_grad():
        assert torch.equal(translate(network, x, "float32"), network(x))  # none is needed
        odd = torch.cat([x[..., :39], x[..., 37:38]], -1)  # its mirror image to the right
        torch.testing.assert_close(translate(network, x[..., :39], "float32"), network(odd)[..., :39])


def test_translate_files_and_folders(folders):
    torch.save({name: Generator(1, 4).state_dict() for name in "GF"}, "model.pth")
    x = common.find_images(folders[0])
    for direction, size, *flags in (("x2y", 50), ("y2x", 24, "--direction", "y2x", "--image-size", "24")):
        cyclegan.main(["translate", str(x[-1]), "--model", "model.pth", "--device", "cpu", *flags])
        with Image.open(f"{x[-1].stem}_{direction}.png") as result:
            assert max(result.size) == size
    cyclegan.main(["translate", str(folders[0]), "--model", "model.pth", "-o", "out"])
    assert [path.relative_to("out") for path in common.find_images(Path("out"))] == [p.relative_to("x") for p in x]


def test_pictures_are_translated_at_the_size_of_training(folders):
    """At another size they would hold horses that the network has never seen."""
    state, x = Generator(1, 4).state_dict(), common.find_images(folders[0])[-1]
    torch.save({"G": state, "F": state, "settings": {"load_size": 30}}, "model.pth")
    for side, *flags in ((40,), (24, "--image-size", "24")):
        cyclegan.main(["translate", str(x), "--model", "model.pth", "-o", "made.png", *flags])
        with Image.open("made.png") as result:
            assert max(result.size) == side


def test_no_model_is_one_clear_line(folders, fails):
    picture = common.find_images(folders[0])[0]
    state = Generator(1, 4).state_dict()
    state["model.1.weight"][0] = math.inf
    torch.save({"G": state, "F": state}, "broken.pth")
    torch.save({"weights": torch.rand(3)}, "foreign.pth")
    torch.save({name: Generator(1, 4).state_dict() for name in "GF"} | {"settings": {"load_size": "?"}}, "odd.pth")
    torch.save({"architecture": {"norm": "instance"}, "model": {"conv1.conv2d.weight": torch.rand(3)}}, "fast.pth")
    for file in (picture, "broken.pth", "foreign.pth", "fast.pth", "odd.pth", "missing.pth", folders[0]):
        assert str(file) in fails(cyclegan.main, "translate", picture, "--model", file)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_step_on_cuda():
    x, y = torch.rand(2, 1, 3, 64, 64, device="cuda")
    losses = gan(device="cuda", precision=torch.bfloat16).step(x, y)
    assert all(value.isfinite() for value in losses.values())
