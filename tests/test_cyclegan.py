"""cyclegan.py against the paper's equations, sizes and schedule; a swap that it learns; an exact resume."""

import http.server
import io
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_cli import readme_commands
from torch import nn

import common
import cyclegan
from common import InputError
from cyclegan import (
    COLUMNS,
    CycleGAN,
    Generator,
    ImagePool,
    Pairs,
    PatchDiscriminator,
    Trainer,
    diagnose,
    discriminator_loss,
    generator_losses,
    load_generator,
    lr_factor,
    translate,
)

ROOT = Path(__file__).parent.parent
TINY = "--crop-size 32 --width 4 --blocks 1 --workers 0 --device cpu --precision float32"


def settings(**changes):
    values = {"lambda_cycle": 10.0, "lambda_identity": 0.5, "pool_size": 50, "lr": 2e-4, "beta1": 0.5}
    return Namespace(**values | {"blocks": 1, "width": 4, "seed": 0} | changes)


def trainer(**changes):
    return Trainer(settings(**changes), torch.device("cpu"), torch.float32)


# --- Networks ---


def test_parameter_counts_and_patch_map():
    G, D = Generator(), PatchDiscriminator()
    assert round(sum(p.numel() for p in G.parameters()) / 1e6, 3) == 11.378
    assert round(sum(p.numel() for p in D.parameters()) / 1e6, 3) == 2.765
    with torch.inference_mode():
        assert D(torch.rand(1, 3, 256, 256)).shape == (1, 1, 30, 30)


@pytest.mark.parametrize("blocks", [6, 9])
def test_generator_layer_sizes(blocks):
    network, sizes = Generator(blocks), []
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(lambda m, i, o: sizes.append((*o.shape[1:], *m.kernel_size)))
    with torch.inference_mode():
        network(torch.rand(1, 3, 32, 48))
    start = [(64, 32, 48, 7, 7), (128, 16, 24, 3, 3), (256, 8, 12, 3, 3)]
    assert sizes == [
        *start,
        *[(256, 8, 12, 3, 3)] * 2 * blocks,
        *[(128, 16, 24, 3, 3), (64, 32, 48, 3, 3), (3, 32, 48, 7, 7)],
    ]


def test_a_patch_has_70_pixels():
    """The support of one verdict's gradient, without the norms, which look at the whole picture."""
    D = PatchDiscriminator(4)
    for i, module in enumerate(D.model):
        if isinstance(module, nn.InstanceNorm2d):
            D.model[i] = nn.Identity()
    x = torch.rand(1, 3, 256, 256, requires_grad=True)
    D(x)[0, 0, 15, 15].backward()
    for others in ((0, 1, 3), (0, 1, 2)):
        seen = x.grad.abs().sum(others).nonzero()
        assert seen.max() - seen.min() + 1 == 70


def test_initial_weights():
    for network in (Generator(2), PatchDiscriminator()):
        weights = torch.cat([p.flatten() for name, p in network.named_parameters() if name.endswith("weight")])
        assert abs(weights.mean()) < 1e-4
        assert weights.std().item() == pytest.approx(0.02, rel=0.01)
        assert all((p == 0).all() for name, p in network.named_parameters() if name.endswith("bias"))
        assert not any(isinstance(m, nn.InstanceNorm2d) and m.affine for m in network.modules())


# --- Losses ---


def mean_abs(a, b):
    return sum(abs(u - v) for u, v in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)) / a.numel()


def mean_square(a, target):
    return sum((u - target) ** 2 for u in a.flatten().tolist()) / a.numel()


@pytest.mark.parametrize("weight", [0.5, 0.0])
def test_generator_losses_are_the_papers(weight):
    """Every term by loops in float64, from networks that are called for each picture alone."""
    torch.manual_seed(0)
    model = CycleGAN(1, 4).double()
    x, y = torch.rand(2, 2, 3, 32, 32, dtype=torch.float64)
    # float() inside the networks is for bfloat16; here it would cost the digits that the test looks at
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda self: self)
        losses, G_x, F_y = generator_losses(model, x, y, 10.0, weight)
        G, F, D_X, D_Y = (
            lambda images, net=net: torch.cat([net(image[None]) for image in images])
            for net in (model.G, model.F, model.D_X, model.D_Y)
        )
        # pictures in the networks' range, -1 … 1, as in the paper
        cycle = mean_abs(2 * F(G(x)) - 1, 2 * x - 1) + mean_abs(2 * G(F(y)) - 1, 2 * y - 1)
        identity = mean_abs(2 * G(y) - 1, 2 * y - 1) + mean_abs(2 * F(x) - 1, 2 * x - 1)
        expected = {"G": mean_square(D_Y(G(x)), 1), "F": mean_square(D_X(F(y)), 1), "cycle": cycle}
        expected["total"] = expected["G"] + expected["F"] + 10 * cycle
        if weight:
            expected["identity"] = identity
            expected["total"] += 0.5 * 10 * identity
        assert torch.allclose(G_x, G(x), atol=1e-12)
        assert torch.allclose(F_y, F(y), atol=1e-12)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-9), name


def test_discriminator_loss_is_the_papers():
    torch.manual_seed(0)
    D = PatchDiscriminator(4).double()
    real, fake = torch.rand(2, 2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda self: self)
        separate = [torch.cat([D(image[None]) for image in images]) for images in (real, fake)]
        expected = (mean_square(separate[0], 1) + mean_square(separate[1], 0)) / 2
        assert discriminator_loss(D, real, fake).item() == pytest.approx(expected, rel=1e-9)


def test_a_step_changes_each_pair_by_its_own_loss_alone():
    """With one optimiser stopped, the other's networks change and its own do not; and no gradient crosses over."""
    x, y = torch.rand(2, 1, 3, 32, 32)
    for stopped in ("optimizer_G", "optimizer_D"):
        t = trainer()
        before = {name: value.clone() for name, value in t.model.named_parameters()}
        getattr(t, stopped).step = lambda: None
        t.step(x, y, 1e-3)
        for name, value in t.model.named_parameters():
            moving = name.startswith("D_") == (stopped == "optimizer_G")
            changed = not torch.equal(value, before[name])
            # a bias before an instance norm has no effect, hence no gradient to speak of
            assert changed == moving or (moving and name.endswith("bias")), name


def test_discriminators_learn_from_their_own_loss_alone():
    """Their gradients after a step are those of their loss, with nothing left of the generators' step before it."""
    x, y = torch.rand(2, 1, 3, 32, 32)
    t, D, G = trainer(), trainer().model.D_Y, trainer().model.G
    t.optimizer_G.step = t.optimizer_D.step = lambda: None
    t.step(x, y, 1e-3)
    discriminator_loss(D, y, G(x).detach()).backward()
    for (name, p), q in zip(D.named_parameters(), t.model.D_Y.parameters(), strict=True):
        if name.endswith("weight"):  # a bias before a norm has no effect, and no gradient but noise
            assert (p.grad - q.grad).norm() < 1e-3 * q.grad.norm()


# --- The pool ---


def test_pool_fills_first_then_swaps_about_half():
    pool = ImagePool(50, seed=0)
    first = [torch.full((1, 3, 2, 2), float(i)) for i in range(50)]
    assert all(torch.equal(pool.query(image), image) for image in first)
    shown, swapped = set(), 0
    for i in range(50, 1050):
        image = torch.full((1, 3, 2, 2), float(i))
        result = pool.query(image)
        swapped += not torch.equal(result, image)
        shown.add(result[0, 0, 0, 0].item())
    assert 450 < swapped < 550
    assert len(shown) == 1000  # none is shown twice: what is shown leaves the pool
    assert len(pool.images) == 50


def test_pool_keeps_no_graph_and_none_of_size_0():
    made = torch.rand(2, 3, 4, 4, requires_grad=True) * 2
    pool = ImagePool(3, seed=0)
    assert not pool.query(made).requires_grad
    assert not any(image.requires_grad for image in pool.images)
    empty = ImagePool(0, seed=0)
    assert torch.equal(empty.query(made), made)
    assert not empty.images


def test_pool_survives_a_checkpoint(tmp_path):
    pools = [ImagePool(4, seed=0), ImagePool(4, seed=9)]
    for i in range(20):
        pools[0].query(torch.full((1, 3, 2, 2), float(i)))
    torch.save(pools[0].state_dict(), tmp_path / "pool.pth")
    pools[1].load_state_dict(torch.load(tmp_path / "pool.pth", weights_only=True), torch.device("cpu"))
    for i in range(20, 40):
        a, b = (pool.query(torch.full((1, 3, 2, 2), float(i))) for pool in pools)
        assert torch.equal(a, b)


# --- Schedule and warnings ---


def test_learning_rate_factor():
    factors = [lr_factor(epoch, 100, 100) for epoch in (0, 99, 100, 150, 199, 200)]
    assert factors == pytest.approx([1, 1, 1, 0.5, 0.01, 0])
    assert lr_factor(0, 1, 0) == 1


def test_warnings_name_the_remedy():
    healthy = dict.fromkeys(COLUMNS, 0.2)
    assert diagnose([list(healthy.values())] * 20) == {}
    cases = {
        "D_X": {"D_X": 0.001},
        "D_Y": {"D_Y": 0.001},
        "G": {"change_G": 0.001},
        "F": {"luminance_F": -0.9},
    }
    for about, change in cases.items():
        rows = [list((healthy | change).values())]
        assert list(diagnose(rows * 20)) == [about]
        assert "--" in diagnose(rows * 20)[about]
        assert diagnose(rows * 19) == {}
        assert diagnose(rows * 3 + [list(healthy.values())] * 20) == {}


def test_signs_tell_the_identity_and_inverted_colours():
    x = torch.rand(2, 3, 16, 16)
    same, inverted = cyclegan.signs(x, x, "G"), cyclegan.signs(x, 1 - x, "G")
    assert same["change_G"] == 0
    assert same["luminance_G"].item() == pytest.approx(1, abs=1e-4)
    assert inverted["luminance_G"].item() == pytest.approx(-1, abs=1e-4)


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
def folders(tmp_path):
    for name, color, n in (("x", RED, 5), ("y", BLUE, 3)):
        (tmp_path / name / "deep").mkdir(parents=True)
        for i, pixels in enumerate(shapes(color, n, seed=n)):
            image = Image.fromarray(pixels)
            image = [image, image.convert("L"), image.convert("P"), image.resize((50, 37)), image.convert("RGBA")][i]
            image.save(tmp_path / name / ("deep" if i % 2 else "") / f"any name {i}.png")
    return [tmp_path / "x", tmp_path / "y"]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_on_seed_and_step_alone(folders, workers):
    X, Y = map(common.find_images, folders)
    args = Namespace(batch_size=2, workers=workers)
    whole = [(x, y) for x, y, _ in cyclegan.batches(Pairs(X, Y, 36, 32, 3), args, 0, 6, 0, 1)]
    parts = [(x, y) for x, y, _ in cyclegan.batches(Pairs(X, Y, 36, 32, 3), args, 4, 6, 0, 1)]
    for (x, y), (x_again, y_again) in zip(whole[4:], parts, strict=True):
        assert x.shape == y.shape == (2, 3, 32, 32)
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)
    shares = [list(cyclegan.batches(Pairs(X, Y, 36, 32, 3), args, 0, 6, rank, 2)) for rank in (0, 1)]
    for (x, y), first, second in zip(whole, *shares, strict=True):
        assert torch.equal(x, torch.cat([first[0], second[0]]))
        assert torch.equal(y, torch.cat([first[1], second[1]]))


def test_an_epoch_is_the_larger_domain_once_and_the_other_is_reshuffled(folders, monkeypatch):
    X, Y = map(common.find_images, folders)
    read = []
    load = cyclegan.load_image
    monkeypatch.setattr(cyclegan, "load_image", lambda path, **k: read.append(path) or load(path, **k))
    pairs = Pairs(X, Y, 36, 32, 0)
    for i in range(30):
        pairs[i]
    xs, ys = read[::2], read[1::2]
    assert all(sorted(xs[k : k + 5]) == X for k in range(0, 30, 5))
    assert all(sorted(ys[k : k + 3]) == Y for k in range(0, 30, 3))
    assert len({tuple(ys[k : k + 3]) for k in range(0, 30, 3)}) > 2
    assert len({tuple(xs[k : k + 5]) for k in range(0, 30, 5)}) > 2


def test_crops_are_flipped_half_the_time(tmp_path):
    ramp = Image.linear_gradient("L").rotate(90).resize((32, 32))
    ramp.save(tmp_path / "a.png")
    pairs = Pairs([tmp_path / "a.png"], [tmp_path / "a.png"], 32, 32, 0)
    rising = [bool(x[0, 0, 0] < x[0, 0, -1]) for x, _, _ in (pairs[i] for i in range(200))]
    assert 70 < sum(rising) < 130


def test_unreadable_files_are_skipped_and_counted(folders, capsys):
    X, Y = map(common.find_images, folders)
    X[0].write_text("no picture")
    pairs = Pairs(X, Y, 36, 32, 0)
    assert sum(pairs[i][2] for i in range(5)) == 1
    assert "warning: cannot read" in capsys.readouterr().err
    for path in X:
        path.write_text("no picture")
    with pytest.raises(InputError, match="domain X"):
        pairs[0]


def test_test_folders_are_used_for_the_samples(folders, tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    for part, folder in zip(("trainA", "trainB", "testA"), [*folders, folders[1]], strict=True):
        shutil.copytree(folder, root / part)
    (X, x_samples), (Y, y_samples) = cyclegan.domains([str(root)], 32)
    assert (len(X), len(Y)) == (5, 3)
    expected = [common.load_image(path, 32, center_crop=True) for path in common.find_images(root / "testA")]
    assert torch.equal(x_samples, torch.cat(expected))
    assert len(y_samples) == 3  # of trainB, as there is no testB
    for i in range(6):
        shutil.copy(X[0], folders[0] / f"{i}.png")
    common.find_images(folders[0])[0].write_text("no picture")
    (X, x_samples), _ = cyclegan.domains([str(folder) for folder in folders], 32)
    assert len(x_samples) == 4
    assert [path for i, path in enumerate(common.find_images(folders[0])) if i not in (1, 2, 3, 4)] == X


# --- Download, from a server on the loopback address ---


def archive(names=("trainA/a.png", "trainB/b.png", "testA/c.png"), root="horse2zebra/", method=zipfile.ZIP_STORED):
    picture = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(picture, "bmp")
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method) as file:
        for name in names:
            file.writestr(root + name if not name.startswith(("/", "..")) else name, picture.getvalue())
    return data.getvalue()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve what `server.body` holds, after telling its length as `server.length`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if not self.path.endswith("/horse2zebra.zip"):
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(httpd.length or len(httpd.body)))
            self.end_headers()
            self.wfile.write(httpd.body)

        def log_message(self, *arguments):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.body, httpd.length = archive(), None
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr(cyclegan, "SERVER", f"http://127.0.0.1:{httpd.server_port}/datasets")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(tmp_path)
    yield httpd
    httpd.shutdown()


def test_a_set_is_downloaded_once(server, tmp_path):
    assert cyclegan.download("horse2zebra") == Path("data/horse2zebra")
    names = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert names == [f"data/horse2zebra/{name}" for name in ("testA/c.png", "trainA/a.png", "trainB/b.png")]
    server.body = b"nothing more"
    (X, _), (Y, _) = cyclegan.domains(["horse2zebra"], 32)
    assert [p.name for p in (*X, *Y)] == ["a.png", "b.png"]


@pytest.mark.parametrize("told", [True, False])
def test_a_download_cut_short_is_no_set(server, tmp_path, told):
    body = server.body
    server.body, server.length = body[: len(body) // 2], len(body) if told else None
    with pytest.raises(InputError, match=r"cut short|cannot download"):
        cyclegan.download("horse2zebra")
    assert not any(tmp_path.rglob("*.*"))
    server.body, server.length = body, None
    assert cyclegan.download("horse2zebra").is_dir()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_archive_is_no_set(server, tmp_path, method):
    body = bytearray(archive(method=method))
    body[100:1000] = bytes(900)  # in the first picture
    server.body = bytes(body)
    with pytest.raises(InputError, match="damaged"):
        cyclegan.download("horse2zebra")
    server.body = archive(["trainA/a.png"])
    with pytest.raises(InputError, match="trainB"):
        cyclegan.download("horse2zebra")
    assert not (tmp_path / "data" / "horse2zebra").exists()


@pytest.mark.parametrize("path", ["../../evil.png", "/tmp/evil-cyclegan-test.png", "../trainA/evil.png"])
def test_an_archive_cannot_write_outside_its_folder(server, tmp_path, path):
    server.body = archive(["trainA/a.png", "trainB/b.png", path])
    with pytest.raises(InputError, match="outside"):
        cyclegan.download("horse2zebra")
    assert not any(tmp_path.rglob("*.png"))
    assert not Path("/tmp/evil-cyclegan-test.png").exists()


def test_offline_and_unknown_sets_are_one_clear_line(tmp_path, monkeypatch, capsys):
    with socket.socket() as free:  # a port at which nobody answers
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(cyclegan, "SERVER", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(tmp_path)
    for name, words in (("horse2zebra", "cannot download"), ("horse2giraffe", "apple2orange")):
        with pytest.raises(SystemExit) as exit_:
            cyclegan.main(["train", name])
        assert exit_.value.code == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert words in error


# --- Training ---


def train(*arguments):
    cyclegan.main(["train", *TINY.split(), *map(str, arguments)])


def equal(a, b):
    """Whether two states, of tensors in dictionaries and lists, are the same bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


STATE = ["G", "F", "D_X", "D_Y", "optimizer_G", "optimizer_D", "pools", "step"]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_training_gives_the_same_state_bit_for_bit(folders, tmp_path, workers):
    """Also in the middle of an epoch, with a pool that has begun to swap, and while the learning rate falls."""
    arguments = [*folders, "--epochs", 1, "--decay-epochs", 2, "--pool-size", 2, "--workers", workers]
    train(*arguments, "-o", tmp_path / "whole")
    train(*arguments, "-o", tmp_path / "parts", "--max-steps", 7)
    checkpoint = tmp_path / "parts" / "checkpoint.pth"
    train(*arguments, "-o", tmp_path / "parts", "--resume", checkpoint)
    whole, parts = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True) for name in ("whole", "parts"))
    assert whole["step"] == 15
    for name in STATE:
        assert equal(whole[name], parts[name]), name
    untrained = trainer().model.G.state_dict()
    assert not any(torch.equal(whole["G"][name], untrained[name]) for name in untrained if name.endswith("weight"))


def test_killed_at_any_moment(folders, tmp_path):
    """kill -9 leaves the last checkpoint, and resuming from it gives the state of an uninterrupted training."""
    arguments = [*folders, "--checkpoint-every", 2, "--epochs", 10000]
    command = [sys.executable, ROOT / "cyclegan.py", "train", *TINY.split(), *arguments, "-o", tmp_path / "a"]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
    checkpoint, deadline = tmp_path / "a" / "checkpoint.pth", time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    reached = torch.load(checkpoint, weights_only=True)["step"]
    train(*arguments, "-o", tmp_path / "a", "--max-steps", reached + 3, "--resume", checkpoint)
    train(*arguments, "-o", tmp_path / "b", "--max-steps", reached + 3)
    a, b = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True) for name in "ab")
    assert all(equal(a[name], b[name]) for name in STATE)


def test_ctrl_c_writes_a_checkpoint_that_resumes_exactly(folders, tmp_path):
    """Sent to the workers as well, as a terminal does; the checkpoint is of a step that is no regular one."""
    arguments = [*folders, "-o", tmp_path / "a", "--workers", 2, "--epochs", 0, "--decay-epochs", 100000]
    command = [sys.executable, ROOT / "cyclegan.py", "train", *TINY.split(), *arguments]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, start_new_session=True)
    shown = b""
    while b"D_X" not in shown:  # in the progress bar, from step 5 on
        shown += process.stderr.read(1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err
    checkpoint = tmp_path / "a" / "checkpoint.pth"
    assert f"--resume {checkpoint}".encode() in err.splitlines()[-1]
    reached = torch.load(checkpoint, weights_only=True)["step"]
    train(*arguments, "--max-steps", reached + 2, "--resume", checkpoint)
    train(*folders, "-o", tmp_path / "b", *arguments[6:], "--max-steps", reached + 2)
    a, b = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True) for name in "ab")
    assert all(equal(a[name], b[name]) for name in STATE)


def test_what_a_training_leaves(folders, tmp_path):
    run = tmp_path / "new" / "run"
    train(*folders, "-o", run, "--epochs", 2, "--decay-epochs", 0, "--export", run / "small.pth")
    names = ["checkpoint.pth", "epoch_001.jpg", "epoch_002.jpg", "losses.csv", "losses.png", "small.pth"]
    assert sorted(path.name for path in run.iterdir()) == names
    rows = [row.split(",") for row in (run / "losses.csv").read_text().splitlines()]
    assert rows[0] == COLUMNS
    assert [(row[0], row[1]) for row in rows[1:]] == [("5", "1"), ("10", "2")]
    assert all(math.isfinite(float(value)) for row in rows[1:] for value in row)
    with Image.open(run / "epoch_001.jpg") as sheet:
        assert sheet.size == (4 * 32 + 8 + 4 * 32, 4 * 32)
    small = torch.load(run / "small.pth", weights_only=True)
    assert small.keys() == {"architecture", "settings", "command", "G", "F"}
    assert all(value.dtype == torch.half for value in small["G"].values())
    for model, precise in (("small.pth", False), ("checkpoint.pth", True)):
        for direction, name in (("x2y", "G"), ("y2x", "F")):
            network = load_generator(run / model, direction)
            state = torch.load(run / "checkpoint.pth", weights_only=True)[name]
            for key, value in network.state_dict().items():
                assert torch.allclose(value, state[key], rtol=0 if precise else 1e-3, atol=0 if precise else 1e-6)


def test_discriminators_are_shown_what_the_pool_gives(monkeypatch):
    x, y = torch.rand(2, 1, 3, 32, 32)
    t, shown = trainer(pool_size=3), []
    for pool, value in ((t.pool_X, 0.25), (t.pool_Y, 0.75)):
        pool.query(torch.full((3, 3, 32, 32), value))
    loss = cyclegan.discriminator_loss
    monkeypatch.setattr(
        cyclegan, "discriminator_loss", lambda D, real, fake: shown.append((real, fake)) or loss(D, real, fake)
    )
    for _ in range(20):
        t.step(x, y, 1e-4)
    for k, (real, value) in enumerate(((x, 0.25), (y, 0.75))):
        assert all(torch.equal(r, real) for r, _ in shown[k::2])
        assert sum(bool((fake == value).all()) for _, fake in shown[k::2]) == 3  # each of the old ones, once


def test_the_learning_rate_falls_as_scheduled(folders, tmp_path, monkeypatch):
    rates, step = [], Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, x, y, lr: rates.append(lr) or step(self, x, y, lr))
    train(*folders, "-o", tmp_path / "run", "--epochs", 1, "--decay-epochs", 2, "--lr", "1e-3")
    assert rates == pytest.approx([1e-3] * 10 + [5e-4] * 5)
    state = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    assert [state[name]["param_groups"][0]["lr"] for name in ("optimizer_G", "optimizer_D")] == [5e-4] * 2


def test_the_sheet_shows_both_ways():
    t, x, y = trainer(), torch.rand(2, 3, 32, 32), torch.rand(1, 3, 32, 32)
    G, F = t.model.G, t.model.F
    sheet = cyclegan.sample_sheet(t, x, y)
    with torch.no_grad():
        columns = [x, G(x), F(G(x)), F(x)], [y, F(y), G(F(y)), G(y)]
    for half, images in enumerate(columns):
        for column, image in enumerate(images):
            left = half * (4 * 32 + 8) + column * 32
            assert torch.allclose(sheet[:, :32, left : left + 32], image[0], atol=1e-6)
    assert (sheet[:, 32:, 4 * 32 :] == 1).all()  # y has one row only


def test_broken_weights_are_never_saved(folders, tmp_path, monkeypatch, capsys):
    step = Trainer.step

    def breaking(self, x, y, lr):
        losses = step(self, x, y, lr)  # which are finite
        next(self.model.G.parameters()).data[0] = math.nan
        return losses

    monkeypatch.setattr(Trainer, "step", breaking)
    with pytest.raises(SystemExit) as exit_:
        train(*folders, "-o", tmp_path / "a", "--max-steps", 1)
    assert exit_.value.code == 2
    assert "--lr" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "a" / "checkpoint.pth").exists()


def test_one_bad_test_picture_does_not_end_a_training(folders, tmp_path):
    common.find_images(folders[0])[0].write_text("no picture")
    train(*folders, "-o", tmp_path / "run", "--max-steps", 5)
    assert (tmp_path / "run" / "epoch_001.jpg").exists()


def test_a_bad_command_is_one_clear_line(folders, tmp_path, capsys):
    arguments = [*folders, "-o", tmp_path / "a", "--max-steps", 1]
    train(*arguments)
    checkpoint = tmp_path / "a" / "checkpoint.pth"
    text, other, broken = (tmp_path / f"{name}.pth" for name in ("text", "other", "broken"))
    shutil.copy(checkpoint, other)
    torch.save(torch.load(checkpoint, weights_only=True) | {"pools": []}, broken)
    text.write_text("no checkpoint")
    (tmp_path / "empty").mkdir()
    cases = [
        ([*arguments], "--resume"),  # it exists: no training is overwritten by another one
        ([*arguments, "--resume", checkpoint, "--lr", 0.5], "lr 0.0002, not 0.5"),
        ([*arguments, "--resume", checkpoint, "--blocks", 2], "blocks 1, not 2"),
        ([*arguments, "--resume", text], "damaged"),
        ([*folders, "--load-size", 33, "--crop-size", 64], "--load-size"),
        ([*folders, "--crop-size", 45], "multiple of 4"),
        ([*folders, "--crop-size", 28], "--crop-size"),
        ([*folders, "--export", "small"], ".pth"),
        ([*folders, "-o", tmp_path / "c", "--export", tmp_path / "c" / "checkpoint.pth"], "the checkpoint itself"),
        ([*folders, "-o", folders[0] / "run"], "among the pictures"),
        ([*folders, "-o", tmp_path / "a", "--resume", tmp_path / "b" / "checkpoint.pth"], "no such file"),
        ([*folders, "-o", tmp_path / "a", "--resume", other], "exists"),
        ([*folders, "-o", tmp_path / "d", "--resume", broken], "no training to resume"),
        ([folders[1], folders[0], "-o", tmp_path / "a", "--resume", checkpoint], "X "),
        ([*folders, "--epochs", -1], "--epochs"),
        ([folders[0], tmp_path / "empty"], "no images"),
        ([folders[0], tmp_path / "missing"], "no such folder"),
        ([*folders, folders[0]], "name two"),
        ([*folders, "--device", "tpu"], "device"),
        ([*folders, "--epochs", 0, "--decay-epochs", 0], "--epochs"),
    ]
    for case, words in cases:
        with pytest.raises(SystemExit) as exit_:
            train(*(case if "-o" in case else [*case, "-o", tmp_path / "b"]))
        assert exit_.value.code == 2, case
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: "), case
        assert words in error, case


def test_an_infinite_loss_keeps_the_last_good_checkpoint(folders, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        train(*folders, "-o", tmp_path / "a", "--lr", "1e30")
    assert exit_.value.code == 2
    assert "--lr" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "a" / "checkpoint.pth").exists()


def test_two_processes_train_as_one_with_the_joint_batch(folders, tmp_path):
    arguments = ["train", *TINY.split(), *folders, "--batch-size", 2, "--max-steps", 1]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29519"]
    two = subprocess.run(
        [*torchrun, ROOT / "cyclegan.py", *map(str, arguments), "-o", tmp_path / "two"],
        env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    cyclegan.main([*map(str, arguments), "-o", str(tmp_path / "one")])
    one, two = (torch.load(tmp_path / n / "checkpoint.pth", weights_only=True) for n in ("one", "two"))
    assert len(two["pools"]) == 2
    for name in ("optimizer_G", "optimizer_D"):  # after one step Adam's first moment is 0.5 × the gradient
        a, b = (torch.cat([p["exp_avg"].flatten() for p in state[name]["state"].values()]) for state in (one, two))
        assert a.norm() > 0
        assert (a - b).norm() < 1e-4 * a.norm()


def test_a_colour_swap_is_learned():
    """Red discs become blue and the other way round, although no picture of X has its counterpart in Y."""
    t = trainer(width=16)
    X, Y = (torch.from_numpy(shapes(c, 64, s, 32)).permute(0, 3, 1, 2).float() / 255 for c, s in ((RED, 1), (BLUE, 2)))
    test = torch.from_numpy(shapes(RED, 8, 3, 32)).permute(0, 3, 1, 2).float() / 255
    true_swap = test.flip(1)  # red ↔ blue; grey stays

    def error():
        with torch.no_grad():
            return (t.model.G(test) - true_swap).abs().mean().item()

    untrained, generator = error(), torch.Generator().manual_seed(0)
    for i in range(400):
        x, y = (data[torch.randint(64, (1,), generator=generator)] for data in (X, Y))
        t.step(x, y, 5e-4 * min(1, 2 - i / 200))
    unchanged = (test - true_swap).abs().mean().item()
    assert error() < 0.45 * untrained
    assert error() < 0.6 * unchanged


# --- Models of the authors' code ---


def published(blocks=9, width=64):
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

    def norm(y):
        return (y - y.mean((2, 3), keepdim=True)) / (y.var((2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()

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


def test_published_generators_give_the_same_pixels(tmp_path):
    torch.manual_seed(0)
    module, x = published(), torch.rand(1, 3, 36, 48)
    state = module.state_dict()
    state |= {"model.2.running_mean": torch.zeros(64), "model.2.running_var": torch.ones(64)}  # of older files
    torch.save(state, tmp_path / "latest_net_G.pth")
    network = load_generator(tmp_path / "latest_net_G.pth")
    with torch.no_grad():
        expected = (published_forward(module, 2 * x - 1) + 1) / 2
    assert expected.std() > 0.01
    assert torch.allclose(translate(network, x), expected, atol=1e-5)
    with pytest.raises(InputError, match="one generator"):
        load_generator(tmp_path / "latest_net_G.pth", "y2x")


# --- Translating ---


@pytest.mark.parametrize("size", [(37, 53), (24, 96), (96, 24), (5, 9), (32, 32)])
def test_size_in_is_size_out(size):
    network, x = Generator(1, 4).eval(), torch.rand(1, 3, *size)
    y = translate(network, x)
    assert y.shape == x.shape
    assert 0 <= y.min() <= y.max() <= 1


def test_padding_does_not_reach_the_picture_beyond_its_border():
    """A size that needs no padding gives the network's own pixels."""
    network, x = Generator(1, 4).eval(), torch.rand(1, 3, 32, 40)
    with torch.no_grad():
        assert torch.equal(translate(network, x), network(x))


@pytest.fixture
def model(tmp_path):
    networks = CycleGAN(1, 4)
    record = {"architecture": {"blocks": 1, "width": 4}}
    cyclegan.export(tmp_path / "model.pth", record, networks)
    return tmp_path / "model.pth"


def test_translate_files_and_folders(folders, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = common.find_images(folders[0])
    cyclegan.main(["translate", str(x[-1]), "--model", str(model), "--device", "cpu"])
    assert Path(f"{x[-1].stem}_x2y.png").exists()
    cyclegan.main(["translate", str(x[-1]), "--model", str(model), "--direction", "y2x", "--image-size", "24"])
    results = [Image.open(f"{x[-1].stem}_{direction}.png") for direction in ("x2y", "y2x")]
    assert results[0].size == Image.open(x[-1]).size
    assert max(results[1].size) == 24
    x[0].write_text("no picture")
    with pytest.raises(SystemExit) as exit_:
        cyclegan.main(["translate", str(folders[0]), "--model", str(model), "-o", "out"])
    assert exit_.value.code == 1
    made = sorted(p.relative_to("out") for p in Path("out").rglob("*.png"))
    assert made == [p.relative_to(folders[0]) for p in x[1:]]


def test_no_model_is_one_clear_line(folders, tmp_path, capsys):
    picture = common.find_images(folders[0])[0]
    truncated, foreign, fast = tmp_path / "truncated.pth", tmp_path / "foreign.pth", tmp_path / "fast.pth"
    cyclegan.export(truncated, {"architecture": {"blocks": 1, "width": 4}}, CycleGAN(1, 4))
    truncated.write_bytes(truncated.read_bytes()[:5000])
    torch.save({"weights": torch.rand(3)}, foreign)
    torch.save({"architecture": {"norm": "instance"}, "model": {"conv1.conv2d.weight": torch.rand(3)}}, fast)
    for file in (picture, truncated, foreign, fast, tmp_path / "missing.pth", tmp_path):
        with pytest.raises(SystemExit) as exit_:
            cyclegan.main(["translate", str(picture), "--model", str(file)])
        assert exit_.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert str(file) in lines[0]


def test_the_readmes_commands_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", "examples")
    for part, folder in (("trainA", "photos"), ("trainB", "paintings")):
        shutil.copytree(f"examples/{folder}", f"data/horse2zebra/{part}")
    commands = readme_commands("cyclegan.py")
    assert len(commands) == 6
    for n, arguments in enumerate(commands):
        tiny = [*TINY.split(), "--max-steps", str(n + 1)] if arguments[0] == "train" else ["--image-size", "24"]
        cyclegan.main([*arguments, *tiny])
    assert Path("content_x2y.jpg").exists()
    assert Path("style_y2x.jpg").exists()
    assert torch.load("run_zebra/checkpoint.pth", weights_only=True)["step"] == 5


def test_the_readme_documents_every_flag_and_its_default():
    readme = (ROOT / "README.md").read_text()
    section = readme[readme.index("## Unpaired translation") : readme.index("## Speed")]
    parser_text = (ROOT / "cyclegan.py").read_text()
    train_flags = parser_text[parser_text.index('"learn from two sets') : parser_text.index('"translate pictures"')]
    for flag in re.findall(r'"(--[a-z-]+)"', train_flags):
        assert f"`{flag}`" in section or flag == "--output", flag
    args = vars(cyclegan.parse_args(["train", "x", "y"]))
    for line in section.splitlines():
        if line.startswith("| `--") and line.split("|")[3].strip():
            flags = re.findall(r"--([a-z0-9-]+)", line.split("|")[1])
            for flag, value in zip(flags, line.split("|")[3].split(","), strict=False):  # --resume has none
                default = args[flag.replace("-", "_")]
                assert value.strip() == str(default) or default is None or float(value) == default, flag


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_step_on_cuda():
    t = Trainer(settings(), torch.device("cuda"), torch.bfloat16)
    x, y = torch.rand(2, 1, 3, 64, 64, device="cuda")
    losses = t.step(x, y, 2e-4)
    assert all(value.isfinite() for value in losses.values())
