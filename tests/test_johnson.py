"""johnson.py against the paper's equations and table of sizes; training that resumes exactly; published models."""

import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_cli import readme_commands
from torch import nn

import johnson
from common import VGG, InputError, gram_matrix
from johnson import Objective, Photos, TransformNet, content_loss, load_network, style_loss, stylize, total_variation

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


def test_total_variation():
    y = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    down = sum(
        (y[b, c, i + 1, j] - y[b, c, i, j]) ** 2 for b in range(2) for c in range(3) for i in range(3) for j in range(5)
    )
    right = sum(
        (y[b, c, i, j + 1] - y[b, c, i, j]) ** 2 for b in range(2) for c in range(3) for i in range(4) for j in range(4)
    )
    assert total_variation(y).item() == pytest.approx((down / 90 + right / 96).item(), rel=1e-9)


def objective(**changes):
    settings = {"content_layer": "relu2_1", "style_layers": ["relu1_1", "relu2_1"]}
    settings |= {"content_weight": 2.0, "style_weight": 3.0, "tv_weight": 5.0} | changes
    vgg = VGG(["relu1_1", "relu2_1"], "vgg16", "random")
    return Objective(vgg, torch.rand(1, 3, 24, 32), Namespace(**settings), torch.float32)


def test_eq_5_weighs_the_terms_and_leaves_the_targets_out_of_the_graph():
    loss = objective()
    x, y = torch.rand(2, 3, 16, 16, requires_grad=True), torch.rand(2, 3, 16, 16, requires_grad=True)
    losses = loss(x, y)
    expected = 2 * losses["content"] + 3 * losses["style"] + 5 * losses["variation"]
    assert losses["total"].item() == pytest.approx(expected.item())
    losses["total"].backward()
    assert x.grad is None
    assert y.grad.abs().sum() > 0
    assert loss(x, x)["content"] == 0


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


# --- Data ---


@pytest.fixture
def folder(tmp_path):
    for i in range(5):
        (tmp_path / "photos" / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        noise = torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(i))
        image = Image.fromarray((noise.permute(1, 2, 0) * 255).byte().numpy())
        image.save(tmp_path / "photos" / f"{i % 2}" / f"{i}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_on_seed_and_iteration_alone(folder, workers):
    photos = Photos(johnson.find_images(folder), 16, seed=3)
    args = Namespace(batch_size=2, iterations=6, workers=workers)
    batches = [x for x, _ in johnson.batches(photos, args, 0, 0, 1)]
    resumed = [x for x, _ in johnson.batches(Photos(photos.files, 16, 3), args, 4, 0, 1)]
    assert torch.equal(torch.stack(batches[4:]), torch.stack(resumed))
    shares = [[x for x, _ in johnson.batches(photos, args, 0, rank, 2)] for rank in (0, 1)]
    assert all(torch.equal(x, torch.cat(pair)) for x, *pair in zip(batches, *shares, strict=True))
    assert len({x.sum().item() for x in batches}) == 6
    assert not torch.equal(batches[0], next(iter(johnson.batches(Photos(photos.files, 16, 4), args, 0, 0, 1)))[0])


def test_an_epoch_sees_every_file_once(folder):
    photos = Photos(johnson.find_images(folder), 40, seed=0)
    for epoch in range(2):
        photos[epoch * 5]
        assert sorted(photos.order[1]) == list(range(5))


def test_unreadable_files_are_skipped_and_counted(folder, capsys):
    for i in range(4):
        (folder / f"{i % 2}" / f"{i}.png").write_text("no picture")
    photos = Photos(johnson.find_images(folder), 16, seed=0)
    assert sum(photos[i][1] for i in range(5)) == 4 + 3 + 2 + 1
    assert "warning: cannot read" in capsys.readouterr().err
    (folder / "0" / "4.png").write_text("no picture")
    with pytest.raises(InputError, match="none of the files"):
        photos[0]


# --- Training ---


def train(*arguments):
    johnson.main(["train", "--style", str(STYLE), *TINY.split(), *TINY_LAYERS, *map(str, arguments)])


def test_one_step_lowers_the_loss_and_leaves_vgg_alone():
    torch.manual_seed(0)
    loss, network, x = objective(tv_weight=0.0), TransformNet(), torch.rand(2, 3, 32, 32)
    before = [p.clone() for p in loss.vgg.parameters()]
    optimizer = torch.optim.Adam(network.parameters(), 1e-5)
    first = loss(x, network(x))["total"]
    first.backward()
    optimizer.step()
    assert loss(x, network(x))["total"] < first
    assert all(torch.equal(p, q) for p, q in zip(before, loss.vgg.parameters(), strict=True))


def test_it_can_learn_one_photo_by_heart():
    torch.manual_seed(0)
    loss, network = objective(style_weight=0.0, tv_weight=0.0), TransformNet()
    x = nn.functional.interpolate(torch.rand(1, 3, 4, 4), (32, 32), mode="bicubic").clamp(0, 1)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(loss(x, network(x))["total"])
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_training_gives_the_same_model_bit_for_bit(folder, tmp_path, workers):
    arguments = ["--data", folder, "--workers", workers, "--norm", "batch", "--checkpoint-every", 3]
    train(*arguments, "--iterations", 7, "-o", tmp_path / "whole.pth")
    train(*arguments, "--iterations", 3, "-o", tmp_path / "parts.pth")
    checkpoint = tmp_path / "parts.checkpoint.pth"
    train(*arguments, "--iterations", 7, "-o", tmp_path / "parts.pth", "--resume", checkpoint)
    whole, parts = (torch.load(tmp_path / f"{name}.checkpoint.pth", weights_only=True) for name in ("whole", "parts"))
    assert whole["model"].keys() == parts["model"].keys()
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])
    for p, q in zip(whole["optimizer"]["state"].values(), parts["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(p[name], q[name]) for name in p)
    assert whole["iteration"] == parts["iteration"] == 7


def test_killed_at_any_moment(folder, tmp_path):
    """kill -9 leaves the last checkpoint, and resuming from it gives the model of an uninterrupted training."""
    arguments = ["--data", folder, "--workers", 0, "--checkpoint-every", 2, "-o", tmp_path / "a.pth"]
    command = ["train", "--style", STYLE, *TINY.split(), *TINY_LAYERS, *arguments, "--iterations", 100000]
    process = subprocess.Popen([sys.executable, ROOT / "johnson.py", *map(str, command)], stderr=subprocess.DEVNULL)
    checkpoint, deadline = tmp_path / "a.checkpoint.pth", time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    reached = torch.load(checkpoint, weights_only=True)["iteration"]
    train(*arguments, "--iterations", reached + 3, "--resume", checkpoint)
    train(*arguments[:-1], tmp_path / "b.pth", "--iterations", reached + 3)
    a, b = (torch.load(tmp_path / f"{name}.checkpoint.pth", weights_only=True)["model"] for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_ctrl_c_writes_a_checkpoint_that_resumes_exactly(folder, tmp_path):
    """Sent to the workers as well, as a terminal does; the checkpoint is of a step that is no regular one."""
    arguments = ["--data", folder, "-o", tmp_path / "a.pth", "--workers", 2, "--checkpoint-every", 1000000]
    command = ["train", "--style", STYLE, *TINY.split(), *TINY_LAYERS, *arguments, "--iterations", 100000]
    process = subprocess.Popen(
        [sys.executable, ROOT / "johnson.py", *map(str, command)],
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    shown = b""
    while b"total" not in shown:  # in the progress bar, from iteration 10 on
        shown += process.stderr.read(1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err
    checkpoint = tmp_path / "a.checkpoint.pth"
    assert f"--resume {checkpoint}".encode() in err.splitlines()[-1]
    reached = torch.load(checkpoint, weights_only=True)["iteration"]
    assert 10 <= reached < 100000
    train(*arguments, "--iterations", reached + 2, "--resume", checkpoint)
    train("--data", folder, "-o", tmp_path / "b.pth", "--iterations", reached + 2)
    a, b = (torch.load(tmp_path / f"{name}.checkpoint.pth", weights_only=True)["model"] for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_no_readable_photo_is_one_line_from_a_worker_too(folder, tmp_path, capsys):
    for i in range(5, 12):
        shutil.copy(folder / "0" / "0.png", folder / "0" / f"{i}.png")
    files = johnson.find_images(folder)
    for path in files[4:]:  # the first four are held out
        path.write_text("no picture")
    with pytest.raises(SystemExit) as exit_:
        train("--data", folder, "--iterations", 1, "--workers", 1, "-o", tmp_path / "a.pth")
    assert exit_.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: none of the files in --data can be read as an image"


def test_what_a_training_leaves(folder, tmp_path):
    train("--data", folder, "--iterations", 11, "-o", tmp_path / "new" / "a.pth", "--workers", 0)
    names = ["a.checkpoint.pth", "a.losses.csv", "a.losses.png", "a.pth", "a.samples.jpg"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names
    rows = (tmp_path / "new" / "a.losses.csv").read_text().splitlines()
    assert rows[0] == "iteration,total,content,style,variation"
    assert [row.split(",")[0] for row in rows[1:]] == ["10", "11"]
    assert (tmp_path / "new" / "a.pth").stat().st_size < 4e6
    model = torch.load(tmp_path / "new" / "a.pth", weights_only=True)
    assert model["settings"]["style_weight"] == 5.0
    assert model["architecture"] == {"norm": "instance", "upsample": "nearest", "padding": "reflect", "output": "tanh"}
    with Image.open(tmp_path / "new" / "a.samples.jpg") as sheet:
        assert sheet.size == (4 * 16, 2 * 16)


def test_resuming_with_other_hyperparameters_names_the_difference(folder, tmp_path, capsys):
    arguments = ["--data", folder, "--workers", 0, "-o", tmp_path / "a.pth", "--iterations", 1]
    train(*arguments)
    other = tmp_path / "other.pth"
    state = VGG(["relu5_3"], "vgg16", "random").features.state_dict()
    torch.save({name: value * 2 for name, value in state.items()}, other)
    for changes, words in (
        (["--lr", "0.5"], ["lr 0.001", "0.5"]),
        (["--style-layers", "relu1_1"], ["style_layers"]),
        (["--padding", "start"], ["padding reflect", "start"]),
        (["--style", ROOT / "examples" / "portrait.jpg"], ["style "]),
        (["--vgg-weights", other], ["vgg_weights "]),
    ):
        with pytest.raises(SystemExit) as exit_:
            train(*arguments, "--resume", tmp_path / "a.checkpoint.pth", *changes)
        assert exit_.value.code == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert all(word in error for word in words)
    train(*arguments, "--resume", tmp_path / "a.checkpoint.pth", "--style-layers", "relu1_1", "relu2_1")  # the same
    first = johnson.find_images(folder)[0]
    first.rename(first.with_stem("z"))
    with pytest.raises(SystemExit):
        train(*arguments, "--resume", tmp_path / "a.checkpoint.pth")
    assert "data " in capsys.readouterr().err
    with pytest.raises(SystemExit):  # and no training is overwritten by another one
        train(*arguments)
    assert "--resume" in capsys.readouterr().err


def test_resuming_a_finished_training_writes_its_model(folder, tmp_path, capsys):
    """It may have been killed between its last checkpoint and its model."""
    arguments = ["--data", folder, "--workers", 0, "-o", tmp_path / "a.pth"]
    train(*arguments, "--iterations", 2)
    model = torch.load(tmp_path / "a.pth", weights_only=True)["model"]
    (tmp_path / "a.pth").unlink()
    checkpoint = tmp_path / "a.checkpoint.pth"
    train(*arguments, "--iterations", 2, "--resume", checkpoint)
    again = torch.load(tmp_path / "a.pth", weights_only=True)["model"]
    assert all(torch.equal(model[name], again[name]) for name in model)
    with pytest.raises(SystemExit):
        train(*arguments, "--iterations", 1, "--resume", checkpoint)
    assert "2 iterations already" in capsys.readouterr().err
    state = torch.load(checkpoint, weights_only=True)
    for change in ({"settings": [1]}, {"model": {}}, {"optimizer": {}}, {"optimizer": 1}, {"iteration": None}):
        torch.save(state | change, checkpoint)
        with pytest.raises(SystemExit) as exit_:
            train(*arguments, "--iterations", 2, "--resume", checkpoint)
        assert exit_.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_no_training_overwrites_another(folder, tmp_path, capsys):
    arguments = ["--data", folder, "--workers", 0, "--iterations", 1]
    for name in "ab":
        train(*arguments, "-o", tmp_path / f"{name}.pth")
    (tmp_path / "c.pth").write_text("a model")
    (tmp_path / "s.jpg").write_bytes(STYLE.read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for case in (
        ["-o", tmp_path / "b.pth", "--resume", tmp_path / "a.checkpoint.pth"],
        ["-o", tmp_path / "c.pth"],
        ["-o", tmp_path / "s.jpg"],
        ["-o", folder / "d.pth"],
    ):
        with pytest.raises(SystemExit) as exit_:
            train(*arguments, *case)
        assert exit_.value.code == 2
        assert "choose another --output" in (error := capsys.readouterr().err) or "suffix" in error
    train(*arguments, "-o", tmp_path / "s.pth", "--style", tmp_path / "s.jpg")
    assert all(path.read_bytes() == data for path, data in before.items())


def test_the_sheet_shows_photos_that_are_held_out(folder, tmp_path, monkeypatch):
    for i in range(5, 10):
        shutil.copy(folder / "0" / "0.png", folder / "0" / f"{i}.png")
    johnson.find_images(folder)[0].write_text("no picture")
    read, load = [], johnson.load_image
    monkeypatch.setattr(johnson, "load_image", lambda path, *a, **k: read.append(path) or load(path, *a, **k))
    train("--data", folder, "--iterations", 10, "--workers", 0, "-o", tmp_path / "a.pth")
    broken, *held_out = johnson.find_images(folder)[:5]
    trained = [path for path in read[1:] if path != broken]  # after the style
    assert len(trained) == 20
    assert not set(held_out) & set(trained)


def test_an_infinite_loss_keeps_the_last_good_checkpoint(folder, tmp_path, capsys):
    arguments = ["--data", folder, "--workers", 0, "-o", tmp_path / "a.pth", "--lr", "1e30"]
    with pytest.raises(SystemExit) as exit_:
        train(*arguments, "--iterations", 20)
    assert exit_.value.code == 2
    assert "--lr" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "a.pth").exists()


def test_two_processes_train_as_one_with_the_joint_batch(folder, tmp_path):
    arguments = ["train", "--style", STYLE, *TINY.split(), *TINY_LAYERS, "--data", folder, "--workers", 0]
    arguments += ["--iterations", 1, "--lr", "1e-3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"]
    two = subprocess.run(
        [*torchrun, ROOT / "johnson.py", *map(str, arguments), "-o", tmp_path / "two.pth"],
        env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    johnson.main([*map(str, arguments), "-o", str(tmp_path / "one.pth")])
    one, two = (torch.load(tmp_path / f"{n}.checkpoint.pth", weights_only=True)["optimizer"] for n in ("one", "two"))
    # After one step Adam's first moment is 0.1 × the gradient.
    one, two = (torch.cat([p["exp_avg"].flatten() for p in state["state"].values()]) for state in (one, two))
    assert one.norm() > 0
    assert (one - two).norm() < 1e-4 * one.norm()


# --- Models ---


class PublishedNet(nn.Module):
    """The fast_neural_style network as pytorch/examples describes it, written independently of TransformNet."""

    def __init__(self):
        super().__init__()

        def layer(i, o, k, s):
            block = nn.Module()
            block.conv2d = nn.Conv2d(i, o, k, s)
            block.run = lambda x: block.conv2d(nn.functional.pad(x, [k // 2] * 4, mode="reflect"))
            return block

        def norm(c):
            return nn.InstanceNorm2d(c, affine=True)

        self.conv1, self.in1 = layer(3, 32, 9, 1), norm(32)
        self.conv2, self.in2 = layer(32, 64, 3, 2), norm(64)
        self.conv3, self.in3 = layer(64, 128, 3, 2), norm(128)
        for i in range(1, 6):
            block = nn.Module()
            block.conv1, block.in1, block.conv2, block.in2 = (
                layer(128, 128, 3, 1),
                norm(128),
                layer(128, 128, 3, 1),
                norm(128),
            )
            setattr(self, f"res{i}", block)
        self.deconv1, self.in4 = layer(128, 64, 3, 1), norm(64)
        self.deconv2, self.in5 = layer(64, 32, 3, 1), norm(32)
        self.deconv3 = layer(32, 3, 9, 1)

    def forward(self, x):
        for conv, norm in ((self.conv1, self.in1), (self.conv2, self.in2), (self.conv3, self.in3)):
            x = norm(conv.run(x)).relu()
        for i in range(1, 6):
            block = getattr(self, f"res{i}")
            x = x + block.in2(block.conv2.run(block.in1(block.conv1.run(x)).relu()))
        for conv, norm in ((self.deconv1, self.in4), (self.deconv2, self.in5)):
            x = norm(conv.run(x.repeat_interleave(2, 2).repeat_interleave(2, 3))).relu()
        return self.deconv3.run(x)


@pytest.mark.parametrize("size", [(32, 48), (37, 53)])
def test_published_models_give_the_same_pixels(tmp_path, size):
    torch.manual_seed(0)
    reference = PublishedNet()
    with torch.no_grad():
        reference.deconv3.conv2d.weight.mul_(30)
        reference.deconv3.conv2d.bias.fill_(120)
    state = reference.state_dict()
    for i in range(1, 6):  # as in the older files
        state[f"in{i}.running_mean"], state[f"in{i}.running_var"] = torch.rand(3), torch.rand(3)
    torch.save(state, tmp_path / "mosaic.pth")
    x = torch.rand(1, 3, *size)
    with torch.no_grad():
        expected = reference(255 * x).clamp(0, 255)[..., : size[0], : size[1]] / 255
    assert expected.std() > 0.03
    torch.testing.assert_close(stylize(load_network(tmp_path / "mosaic.pth"), x), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["image", "text", "truncated", "foreign", "cyclegan", "list", "missing"])
def test_what_is_no_model(tmp_path, kind):
    path = tmp_path / "a.pth"
    if kind == "image":
        shutil.copy(STYLE, path)
    elif kind == "text":
        path.write_text("no model")
    elif kind == "truncated":
        torch.save(TransformNet().state_dict(), path)
        path.write_bytes(path.read_bytes()[:100_000])
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
    y = stylize(network, x)
    assert y.shape == x.shape
    with torch.inference_mode():
        wide = network(johnson.reflect(x, 8))
    assert torch.equal(y, wide[..., 8:-8, 8:-8])


def test_strength_blends():
    network, x = TransformNet().eval(), torch.rand(1, 3, 16, 16)
    full = stylize(network, x)
    assert torch.equal(stylize(network, x, strength=0.0), x)
    torch.testing.assert_close(stylize(network, x, strength=0.25), 0.75 * x + 0.25 * full)
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


def test_a_folder_keeps_its_structure_and_bad_files_do_not_stop_it(folder, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (folder / "1" / "bad.jpg").write_text("no picture")
    Image.new("RGB", (20, 20)).save(folder / "0" / "0.bmp")  # becomes a PNG, of whose name there is one already
    with pytest.raises(SystemExit) as exit_:
        run(folder, "--model", model, "-o", "out")
    assert exit_.value.code == 1
    assert "bad.jpg" in capsys.readouterr().err
    made = sorted(str(path.relative_to("out")) for path in Path("out").rglob("*.png"))
    assert made == ["0/0.png", "0/0_2.png", "0/2.png", "0/4.png", "1/1.png", "1/3.png"]


def test_equal_names_and_inputs_are_never_overwritten(folder, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(folder / "0" / "0.png", folder / "1" / "0.png")
    before = (folder / "0" / "0.png").read_bytes()
    run(folder / "0" / "0.png", folder / "1" / "0.png", "--model", model, "-o", "out")
    assert sorted(path.name for path in Path("out").iterdir()) == ["0.png", "0_2.png"]
    run(folder / "0" / "0.png", "--model", model, "-o", folder / "0")
    assert (folder / "0" / "0.png").read_bytes() == before
    assert (folder / "0" / "0_2.png").exists()


def test_the_readmes_commands_work(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", "examples")
    shutil.copytree(folder, "holiday")
    commands = readme_commands("johnson.py")
    assert len(commands) == 5
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
        (["stylize", STYLE, STYLE, "-o", "a.png"], "a.png"),
        (["train", "--data", "."], "--style"),
        (["train", "--style", STYLE, "--data", "missing"], "missing"),
        (["train", "--style", STYLE, "--data", ".", "-o", "../a.pth"], "no images"),
        (["train", "--style", STYLE, "--data", ROOT / "examples", "--content-layer", "relu9_1"], "relu9_1"),
        (["train", "--style", "missing.jpg", "--data", ROOT / "examples", "--vgg-weights", "random"], "missing.jpg"),
        (["train", "--style", STYLE, "--data", ROOT / "examples", "--resume", "missing.pth"], "missing.pth"),
        (["train", "--style", STYLE, "--data", ROOT / "examples", "-o", "model"], ".pth"),
        (["train", "--style", STYLE, "--data", ROOT / "examples", "-o", "."], ".pth"),
        (["stylize", STYLE, "-o", STYLE], "is the input"),
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
