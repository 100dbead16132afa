"""cyclegan.py: its networks by hand, a swap that it learns, data and downloads, what a training leaves, translation."""

import functools
import http.client
import http.server
import math
import shutil
import threading
import zipfile
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as nnf
from conftest import run, save_noise
from test_equations import gan
from torch import nn

import common
import cyclegan
from common import InputError, load_image
from cyclegan import CycleGAN, Generator, PatchDiscriminator, load_generator, translate

# --- Networks ----------------------------------------------------------------------------------------------


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
    G, facts = load_generator(Path("latest_net_G.pth"))
    torch.testing.assert_close(translate(G, x, exact=facts.authors), expected, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="one generator"):
        load_generator(Path("latest_net_G.pth"), "y2x")


# --- Training ----------------------------------------------------------------------------------------------


def test_defaults_are_the_papers():
    args = vars(cyclegan.parse_args(["train", "x", "y"]))
    expected = {
        "lambda_cycle": 10.0, "lambda_identity": 0.5, "pool_size": 50, "lr": 2e-4, "beta1": 0.5, "batch_size": 1,
        "epochs": 100, "decay_epochs": 100, "load_size": 286, "crop_size": 256, "blocks": 9, "width": 64, "seed": 0,
    }  # fmt: skip
    assert {name: args[name] for name in expected} == expected
    small = cyclegan.parse_args(["train", "x", "y", "--crop-size", "128"])
    assert (small.blocks, small.load_size) == (6, 143)
    names = "horse2zebra apple2orange summer2winter_yosemite monet2photo cezanne2photo ukiyoe2photo vangogh2photo maps"
    assert set(cyclegan.DATASETS) == {*names.split(), "facades", "iphone2dslr_flower", "ae_photos"}
    assert cyclegan.SERVER == "https://efrosgans.eecs.berkeley.edu/cyclegan/datasets"


def test_a_step_in_bfloat16():
    """All networks compute in it, and the losses are nearly those of float32."""
    exact, half, (x, y), dtypes = gan(), gan(precision=torch.bfloat16), torch.rand(2, 1, 3, 32, 32), set()
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
    losses = gan(device="cuda", precision=torch.bfloat16).step(x, y)
    assert all(value.isfinite() for value in losses.values())


def discs(color, n, seed):
    """Draw discs of a colour on grey, (n, 3, 32, 32) in [0, 1]."""
    generator, place = torch.Generator().manual_seed(seed), torch.arange(32)
    images = torch.full((n, 3, 32, 32), 120 / 255)
    for image in images:
        for y, x in torch.randint(32, (3, 2), generator=generator):
            image[:, (place[:, None] - y) ** 2 + (place - x) ** 2 < 60] = torch.tensor(color)[:, None]
    return images


def test_a_colour_swap_is_learned():
    """Red discs become blue and the other way round, although no picture of X has its counterpart in Y."""
    red, blue = (0.8, 0.16, 0.16), (0.16, 0.16, 0.8)
    learner, X, Y, test = gan(width=8), discs(red, 64, 1), discs(blue, 64, 2), discs(red, 8, 3)
    swapped, generator = test.flip(1), torch.Generator().manual_seed(0)  # red ↔ blue; grey stays
    for i in range(150):
        x, y = (data[torch.randint(64, (1,), generator=generator)] for data in (X, Y))
        learner.set_lr(2e-3 * min(1, 2 - i / 75))
        learner.step(x, y)
    with torch.no_grad():
        assert (learner.G(test) - swapped).abs().mean() < 0.6 * (test - swapped).abs().mean()


def test_warnings_name_the_remedy():
    ours, x = gan(), torch.rand(2, 3, 32, 32)
    good, D_X_wins, D_Y_wins = ({"D_X": a, "D_Y": b} for a, b in ((0.2, 0.2), (0.001, 0.2), (0.2, 0.001)))

    def warnings(G, F, history):
        ours.G, ours.F = G, F
        return cyclegan.diagnose(ours, x, x, history)

    def dark(x):
        return 0.5 * x

    assert warnings(dark, dark, [good] * 20) == warnings(dark, dark, [D_X_wins] * 19 + [good] * 20) == []
    for start, words, arguments in (
        ("D_X", "--lr", (dark, dark, [D_X_wins] * 20)),
        ("D_Y", "--lr", (dark, dark, [D_Y_wins] * 20)),
        ("G", "identity", (lambda x: x + 0.005, dark, [good])),
        ("F", "light into dark", (dark, lambda x: 1 - x, [good])),
    ):
        (warning,) = warnings(*arguments)
        assert warning.startswith(start)
        assert words in warning


@pytest.fixture
def folders():
    save_noise(*(f"x/{'deep/' * (i % 2)}any name {i}.png" for i in range(5)), size=(40, 40))
    save_noise(*(f"y/{i}.png" for i in range(3)), size=(50, 37))


def test_what_a_training_leaves(folders, monkeypatch):
    rates, step = [], CycleGAN.step

    def noting(self, x, y):
        rates.append([group["lr"] for group in self.optimizer_G.param_groups + self.optimizer_D.param_groups])
        return step(self, x, y)

    monkeypatch.setattr(CycleGAN, "step", noting)
    command = "cyclegan.py train x y --max-steps 99 --epochs 1 --decay-epochs 2 --pool-size 2 --lr 1e-3 --seed 5"
    run(f"{command} --lambda-cycle 3 --beta1 0.9 --lambda-identity 0 --export new/small.pth -o new/run")
    assert rates == [pytest.approx([rate] * 2) for rate in [1e-3] * 10 + [5e-4] * 5]
    sheets = [f"epoch_{epoch:03d}.jpg" for epoch in (1, 2, 3)]
    files = sorted(path.name for path in Path("new/run").iterdir())
    assert files == ["checkpoint.pth", *sheets, "losses.csv", "losses.png"]
    rows = [row.split(",") for row in Path("new/run/losses.csv").read_text().splitlines()]
    assert rows[0] == ["step", "epoch", "lr", "total", "G", "F", "cycle", "identity", "D_X", "D_Y"]
    assert [row[:2] for row in rows[1:]] == [["1", "1"], ["10", "2"]]
    for _, _, _, total, G, F, cycle, identity, *_ in ([*map(float, row)] for row in rows[1:]):
        assert identity == 0
        assert total == pytest.approx(G + F + 3 * cycle, rel=1e-4)
    whole, small = (common.load_checkpoint(Path("new", name)) for name in ("run/checkpoint.pth", "small.pth"))
    assert whole["step"] == 15
    assert whole["optimizer_D"]["param_groups"][0]["betas"] == (0.9, 0.999)
    assert all(value.dtype == torch.half for value in small["G"].values())
    for model, precision in (("new/small.pth", torch.half), ("new/run/checkpoint.pth", torch.float)):
        for direction, name in (("x2y", "G"), ("y2x", "F")):
            for key, value in load_generator(Path(model), direction)[0].state_dict().items():
                assert torch.equal(value, whole[name][key].to(precision).float())


def test_no_training_overwrites_a_model(folders, fails):
    run("cyclegan.py train x y -o a")
    Path("model.pth").write_text("another model")
    assert "exists" in fails("cyclegan.py train x y -o a")
    assert "model.pth exists" in fails("cyclegan.py train x y -o b --export model.pth")


# --- Data --------------------------------------------------------------------------------------------------


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


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Start a server on the loopback address; return a function that makes the archive that it has of horse2zebra."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(cyclegan, "SERVER", f"http://127.0.0.1:{httpd.server_port}")
    monkeypatch.setenv("no_proxy", "*")
    save_noise("a.bmp", size=(64, 64))

    def archive(*names, damage=slice(0), method=zipfile.ZIP_STORED):
        with zipfile.ZipFile("horse2zebra.zip", "w", method) as file:
            for name in names:
                file.write("a.bmp", f"horse2zebra/{name}")
        data = bytearray(Path("horse2zebra.zip").read_bytes())
        data[damage] = bytes(len(data[damage]))
        Path("horse2zebra.zip").write_bytes(data)

    yield archive
    httpd.shutdown()


def test_a_set_is_downloaded_once_and_whole(served):
    whole = ["trainA/a.bmp", "trainB/b.bmp", "testA/c.bmp"]
    for names, options in (
        (whole, {"damage": slice(100, 1000)}),
        (whole, {"damage": slice(100, 1000), "method": zipfile.ZIP_DEFLATED}),
        (whole, {"damage": slice(15000, None)}),
        (whole[:1], {}),
    ):
        served(*names, **options)
        with pytest.raises(InputError, match=r"cut short or damaged|has no folders"):
            cyclegan.download("horse2zebra")
        assert not any(Path("data").iterdir())
    served(*whole)
    assert cyclegan.download("horse2zebra") == Path("data/horse2zebra")
    assert sorted(str(path) for path in Path("data").rglob("*.bmp")) == sorted(f"data/horse2zebra/{n}" for n in whole)
    Path("horse2zebra.zip").unlink()
    (X, _), (Y, _) = cyclegan.domains(["horse2zebra"], 32)
    assert [path.name for path in (*X, *Y)] == ["a.bmp", "b.bmp"]


def test_without_a_network_a_set_is_one_line_of_error(served, monkeypatch, fails):
    assert "cannot download" in fails("cyclegan.py train horse2zebra")
    monkeypatch.setattr(cyclegan, "download_and_extract_archive", Mock(side_effect=http.client.IncompleteRead(b"")))
    assert "horse2zebra.zip (IncompleteRead" in fails("cyclegan.py train horse2zebra")
    assert "input" in fails("cyclegan.py train horse2zebra -o data/horse2zebra")  # the next call would take it


def test_other_processes_wait_for_the_first_ones_download(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(cyclegan.time, "sleep", lambda seconds: Path("data/horse2zebra").mkdir(parents=True))
    assert cyclegan.download("horse2zebra") == Path("data/horse2zebra")


# --- Translation -------------------------------------------------------------------------------------------


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
    run(f"{command} in -o out")
    assert [str(path) for path in common.find_images(Path("out"))] == ["out/b.png", "out/deep/a.png"]


def test_a_file_that_is_no_model(folders, fails):
    state = Generator(1, 4).state_dict()
    state["model.1.weight"][0] = math.inf
    torch.save({"G": state, "F": state}, "broken.pth")
    torch.save({"weights": torch.rand(3)}, "foreign.pth")
    torch.save({"architecture": {"norm": "instance"}, "model": {"conv1.conv2d.weight": torch.rand(3)}}, "fast.pth")
    for file in ("y/0.png", "broken.pth", "foreign.pth", "fast.pth", "missing.pth", "x"):
        assert file in fails(f"cyclegan.py translate y/0.png --model {file}")
