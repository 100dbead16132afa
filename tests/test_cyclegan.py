"""cyclegan.py: its networks by hand, what a training leaves, its data, translation."""

import shutil
import socket
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as nnf
from conftest import equal, files, gan, norm, provenance, run, save_noise, state

import common
import cyclegan
import gatys
import johnson
from common import InputError, load_image, to_pil
from cyclegan import Generator, PatchDiscriminator, load_generator, translate


def test_the_discriminator_is_the_papers():
    """C64-C128-C256-C512 and one channel, on pictures in -1 … 1."""
    D, x = PatchDiscriminator(6), torch.rand(2, 3, 48, 64)
    convolutions, y = [m for m in D.modules() if isinstance(m, torch.nn.Conv2d)], 2 * x - 1
    for i, (c, stride) in enumerate(zip(convolutions, (2, 2, 2, 1, 1), strict=True)):
        c.weight.data *= 5
        c.bias.data += 0.1
        y = nnf.conv2d(y, c.weight, c.bias, stride, 1)
        y = norm(y) if i in (1, 2, 3) else y
        y = torch.where(y > 0, y, 0.2 * y) if i < 4 else y
    torch.testing.assert_close(D(x), y, rtol=1e-4, atol=1e-4)


def by_hand(p, x):
    """Compute the authors' generator of nine blocks from weights p; all in -1 … 1."""

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
        y = norm(
            nnf.conv_transpose2d(y, p[f"model.{i}.weight"], p[f"model.{i}.bias"], 2, 1, 1)
        ).relu()
    return conv("26", y, 3).tanh()


def test_published_generators_give_the_same_pixels(monkeypatch):
    """They are plain state dicts, and computed in float32 unless bfloat16 is asked for."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    torch.manual_seed(0)
    weights = {name: 0.05 * torch.randn_like(p) for name, p in Generator().state_dict().items()}
    weights |= {name: torch.rand_like(p) for name, p in weights.items() if name.endswith("bias")}
    unused = {
        "model.2.running_mean": torch.zeros(64),
        "model.2.running_var": torch.ones(64),
    }  # of older files
    torch.save(weights | unused, "latest_net_G.pth")
    save_noise("x.png", size=(48, 36))
    x = load_image("x.png")
    expected = (by_hand(weights, 2 * x - 1) + 1) / 2
    assert expected.std() > 0.01
    network, load_size = load_generator(Path("latest_net_G.pth"))
    assert load_size is None
    torch.testing.assert_close(translate(network, x, "float32"), expected, rtol=0, atol=1e-5)
    for precision, same in (("auto", True), ("bfloat16", False)):
        run(f"cyclegan.py translate x.png --model latest_net_G.pth --precision {precision}")
        error = (load_image("x_x2y.png") - expected).abs().max()
        assert (error < 0.6 / 255) == same
    with pytest.raises(InputError, match="one generator"):
        load_generator(Path("latest_net_G.pth"), "y2x")


@pytest.fixture
def folders():
    save_noise(
        *(f"x/{'deep/' * (i % 2)}any name {i}.png" for i in range(5)),
        *(f"y/{i}.png" for i in range(3)),
    )


def test_what_a_training_leaves(folders):
    command = "cyclegan.py train x y --max-steps 99 --epochs 1 --decay-epochs 4 --lr 1e-3"
    command += " --beta1 0.9 --lambda-cycle 3 --lambda-identity 0 --keep-every 2"
    run(f"{command} --export small.pth -o new/run")
    sheets = [f"epoch_00{n}.jpg" for n in "12345"]
    kept = ["epoch_002.pth", "epoch_004.pth"]
    others = ["checkpoint.pth", "losses.csv", "losses.png"]
    assert files("new/run") == sorted([*others, *sheets, *kept])
    assert "command: python cyclegan.py train" in provenance("new/run/epoch_001.jpg")
    header, *_, row = Path("new/run/losses.csv").read_text().splitlines()
    assert header == "step,epoch,lr,total,G,F,cycle,identity,D_X,D_Y"
    step, epoch, lr, total, G, F, cycle, identity, *_ = map(float, row.split(","))
    assert (step, epoch, lr, identity) == (20, 4, 3e-4, 0)
    assert total == pytest.approx(G + F + 3 * cycle, rel=1e-4)
    whole = state("new/run")
    for optimizer in ("optimizer_G", "optimizer_D"):
        (group,) = whole[optimizer]["param_groups"]
        assert (group["lr"], group["betas"]) == (pytest.approx(5e-5), (0.9, 0.999))
    steps = [common.load_checkpoint(Path("new/run", name))["step"] for name in kept]
    assert steps == [10, 20]  # at the end of their epochs, of 5 steps each
    for direction, name in (("x2y", "G_ema"), ("y2x", "F_ema")):
        averaged = {key[7:]: value for key, value in whole[name].items() if key != "n_averaged"}
        equal(
            dict(load_generator(Path("new/run/checkpoint.pth"), direction)[0].state_dict()),
            averaged,
        )
        small = dict(load_generator(Path("small.pth"), direction)[0].state_dict())
        equal(small, {key: value.half().float() for key, value in averaged.items()})
    run(f"{command} --max-steps 9 --checkpoint-every 8 -o unfinished")
    assert not Path("unfinished/epoch_002.pth").exists()
    run(f"{command} --max-steps 10 -o short")
    kept_G = load_generator(Path("new/run/epoch_002.pth"))[0]
    equal(kept_G.state_dict(), load_generator(Path("short/epoch_002.pth"))[0].state_dict())
    last = load_generator(Path("new/run/epoch_004.pth"))[0]
    assert not torch.equal(kept_G.model[1].weight, last.model[1].weight)


@pytest.mark.parametrize("no_flip", [False, True])
def test_half_of_the_crops_are_mirrored_unless_that_is_refused(no_flip, monkeypatch):
    picture = torch.zeros(3, 32, 32)
    picture[..., :8] = 1  # light on the left
    for path in (Path("x/a.png"), Path("y/a.png")):
        path.parent.mkdir()
        to_pil(picture).save(path)
    seen = []

    def step(self, x, y):
        seen.extend([x[..., 0].mean().item(), y[..., 0].mean().item()])
        return {}

    monkeypatch.setattr(cyclegan.CycleGAN, "step", step)
    command = "cyclegan.py train x y --load-size 32 --epochs 20 --max-steps 20"
    run(command, *(["--no-flip"] if no_flip else []))
    assert len(seen) == 40
    assert set(seen) == ({1.0} if no_flip else {0.0, 1.0})


def test_test_folders_are_used_for_the_samples(folders):
    for part, folder in zip(("trainA", "trainB", "testA"), "xyy", strict=True):
        shutil.copytree(folder, Path("set", part))
    (X, x_samples), (Y, y_samples) = cyclegan.domains(["set"], 32)
    assert (len(X), len(Y), len(y_samples)) == (5, 3, 3)  # samples of trainB, as there is no testB
    tests = [
        load_image(path, 32, center_crop=True) for path in common.find_images(Path("set/testA"))
    ]
    assert torch.equal(x_samples, torch.cat(tests))
    save_noise(*(f"many/{i}.png" for i in range(10)))
    (many, samples), _ = cyclegan.domains(["many", "y"], 32)
    assert (len(many), len(samples)) == (6, 4)  # held out, as there are more than 8


def test_a_set_is_downloaded_once_and_whole(monkeypatch):
    def fetch(url, folder):
        assert url == "https://efrosgans.eecs.berkeley.edu/cyclegan/datasets/horse2zebra.zip"
        assert 0 < socket.getdefaulttimeout() < 60
        save_noise(*(f"{folder}/horse2zebra/{part}/a.png" for part in parts))
        if failure:
            raise failure

    monkeypatch.setattr(cyclegan, "download_and_extract_archive", fetch)
    for failure in (zipfile.BadZipFile(), EOFError(), OSError(), None):
        parts = ["trainA"] if failure else []  # the last archive has no folder of that name
        with pytest.raises(InputError, match=r"horse2zebra\.zip"):
            cyclegan.download("horse2zebra")
        assert not any(Path("data").iterdir())
    parts = ["trainA", "trainB"]
    cyclegan.download("horse2zebra")
    assert socket.getdefaulttimeout() is None  # other parts of the process may wait for longer
    failure = AssertionError()  # the second time it is there
    assert len(cyclegan.domains(["horse2zebra"], 32)) == 2
    shutil.rmtree("data/horse2zebra")

    def fetch_slowly(url, folder):  # another process of torchrun is faster
        save_noise(f"{folder}/horse2zebra/trainA/a.png", "data/horse2zebra/trainA/a.png")

    monkeypatch.setattr(cyclegan, "download_and_extract_archive", fetch_slowly)
    assert cyclegan.download("horse2zebra") == Path("data/horse2zebra")


def test_the_pools_of_a_training_have_other_seeds():
    """For each domain, and for another --seed."""
    seeds = []
    for seed in (0, 1, 2):
        ours = gan(seed=seed)
        seeds += [pool.generator.initial_seed() for pool in (ours.pool_X, ours.pool_Y)]
    assert len(set(seeds)) == 6


@pytest.mark.parametrize("size", [(37, 53), (96, 24), (5, 9)])
def test_any_size_is_mirrored_to_a_multiple_of_4_and_cut_again(size):
    network, x = Generator(1, 4).eval(), torch.rand(1, 3, *size)
    y = translate(network, x.requires_grad_(), "float32")
    right, below = (max(-side % 4, 8 - side) for side in size[::-1])
    wide = network(nnf.pad(x, (0, right, 0, below), mode="reflect"))
    torch.testing.assert_close(y, wide[..., : size[0], : size[1]])
    y.requires_grad_().sum().backward()  # an ordinary tensor
    with pytest.raises(InputError, match="too small"):
        translate(network, x[..., :4])


def test_pictures_are_translated_at_the_size_of_training(monkeypatch):
    """The network sees what it has seen in training; the result is as large as the picture."""
    weights = Generator(1, 4).state_dict()
    torch.save({"G": weights, "F": weights, "args": {"load_size": 30}}, "model.pth")
    save_noise("b.png", size=(80, 40))
    to_pil(torch.rand(4, 40, 80)).save("transparent.png")
    seen = []

    def recorded(network, x, *options):
        seen.append(tuple(x.shape[-2:]))
        return translate(network, x, *options)

    monkeypatch.setattr(cyclegan, "translate", recorded)
    command = "cyclegan.py translate --model model.pth"
    for flags in ("--direction y2x", ""):
        run(f"{command} b.png -o as_input.png {flags}")
        assert load_image("as_input.png").shape == (1, 3, 40, 80)
    for size, shape in ((24, (12, 24)), (60, (30, 60)), (160, (80, 160))):
        run(f"{command} b.png -o {size}.png --image-size {size}")
        assert load_image(f"{size}.png").shape == (1, 3, *shape)
    save_noise("small.png", size=(40, 20))
    run(f"{command} small.png -o enlarged.png")
    assert load_image("enlarged.png").shape == (1, 3, 20, 40)
    run(f"{command} transparent.png -o alpha.png")
    assert next(common.load_frames("alpha.png"))[0].shape == (1, 4, 40, 80)
    assert set(seen) == {(30, 60)}
    torch.testing.assert_close(load_image("24.png"), load_image("60.png", 24), rtol=0, atol=0.05)
    enlarged = nnf.interpolate(load_image("60.png"), (40, 80), mode="bicubic")
    assert (load_image("as_input.png") - enlarged).abs().mean() < 0.02


def test_nearest_upsampling_repeats_pixels():
    up, x = cyclegan.Upsample(3, 2, 3), torch.rand(1, 3, 5, 4)
    repeated = nnf.pad(x.repeat_interleave(2, -2).repeat_interleave(2, -1), [1] * 4, mode="reflect")
    assert torch.allclose(up(x), nnf.conv2d(repeated, up.weight, up.bias), atol=1e-6)
    ups = [m for m in Generator(1, 4, "nearest").modules() if isinstance(m, cyclegan.Upsample)]
    assert len(ups) == 2
    with pytest.raises(InputError, match="bilinear: choose nearest or transposed"):
        Generator(1, 4, "bilinear")


@pytest.mark.parametrize("upsample", ["transposed", "nearest"])
def test_a_training_goes_on_from_a_model(folders, upsample, capsys):
    """Its own with discriminators, or an exported one without."""
    run("cyclegan.py train x y -o a --export a/m.pth", "--upsample", upsample, "--ema", 0)
    trained = state("a")
    for path in ("a/checkpoint.pth", "a/m.pth"):
        args = cyclegan.parse_args(["train", "x", "y", "--width", "9", "--start-from", path])
        networks = dict(zip(("G", "F", "D_X", "D_Y"), cyclegan.first_networks(args), strict=True))
        assert (args.width, args.blocks, args.upsample) == (4, 1, upsample)
        for name, network in networks.items():
            known = name in "GF" or "checkpoint" in path
            for key, value in network.state_dict().items():
                same = torch.allclose(value, trained[name][key], rtol=1e-5, atol=1e-3)
                assert same == known or "bias" in key, (name, key)
    run("cyclegan.py train x y -o b --lr 0 --max-steps 2 --start-from", "a/checkpoint.pth")
    assert f"blocks 1, width 4, upsample {upsample}" in capsys.readouterr().err
    equal(state("b")["D_X"], trained["D_X"])


def test_a_training_that_started_from_a_model_is_resumed_without_it(fails):
    save_noise("x/1.png", "x/2.png", "y/1.png", "y/2.png")
    run("cyclegan.py train x y -o a --export m.pth --width 8")
    for folder, steps in (("b", 2), ("c", 1)):
        run("cyclegan.py train x y --epochs 9 --start-from m.pth -o", folder, "--max-steps", steps)
    Path("m.pth").unlink()
    run("cyclegan.py train x y -o c --max-steps 2 --resume")
    equal(state("b"), state("c"))
    assert "checkpoint.pth" in fails("cyclegan.py train x y -o d --export d/checkpoint.pth")


def test_a_resumed_training_may_have_smaller_crops(folders):
    """Pictures of another size leave the pools."""
    command = "cyclegan.py train x y -o a --epochs 1 --decay-epochs 1"
    run(f"{command} --crop-size 36 --load-size 40 --max-steps 3")
    assert {image.shape[1:] for image in state("a")["pool_X"]["images"]} == {(36, 36)}
    run(f"{command} --crop-size 32 --max-steps 99 --resume")
    assert state("a")["step"] == 10
    sides = {image.shape[1:] for name in "XY" for image in state("a")[f"pool_{name}"]["images"]}
    assert sides == {(32, 32)}


def test_a_training_with_nothing_to_do_or_an_odd_suffix_does_not_begin(folders, fails):
    assert "--decay-epochs are 0" in fails("cyclegan.py train x y --epochs 0 --decay-epochs 0")
    assert "one of .pth" in fails("cyclegan.py train x y --export model.png")
    assert "would write over" in fails("cyclegan.py train horse2zebra -o data/horse2zebra")
    assert "one of .pth" in fails("johnson.py train --style x --data y -o model.jpg")


def test_averaged_weights():
    """w_ema ← d w_ema + (1 − d) w after each step, d = min(ema, (1 + n)/(10 + n))."""
    save_noise("x/1.png", "x/2.png", "y/1.png", "y/2.png")
    key, expected = "model.1.weight", 0
    for steps, d in ((1, 0), (2, 2 / 11), (3, 0.2)):  # 3/12 would be more than --ema
        run(f"cyclegan.py train x y --ema 0.2 --lr 0.01 -o r{steps} --max-steps {steps}")
        expected = d * expected + (1 - d) * state(f"r{steps}")["G"][key]
    averaged = state("r3")["G_ema"]["module." + key]
    assert torch.allclose(averaged, expected, atol=1e-6)
    assert torch.equal(load_generator(Path("r3/checkpoint.pth"))[0].state_dict()[key], averaged)


def test_a_file_that_does_not_fit_is_told_in_one_line():
    """A U-Net, a generator with batch norm, one without its last layer, and no weights at all."""
    whole = Generator(1, 4).state_dict()
    batch_norm = whole | {"model.2.weight": torch.rand(4), "model.2.bias": torch.rand(4)}
    short = {name: value for name, value in whole.items() if "model.18" not in name}
    for weights in ({"model.model.0.weight": torch.rand(4)}, batch_norm, short, {"G": 1, "F": 2}):
        torch.save(weights, "other.pth")
        with pytest.raises(InputError, match=r"other\.pth is no model of cyclegan\.py"):
            load_generator(Path("other.pth"))


def test_a_damaged_discriminator_is_told_in_one_line(folders, fails):
    """A layer is missing, has another size, or it is none."""
    run("cyclegan.py train x y -o a")
    saved = common.load_checkpoint(Path("a/checkpoint.pth"))
    for damaged in ({}, saved["D_X"] | {"model.2.weight": torch.rand(2, 4, 4, 4)}, 1, [2]):
        torch.save(saved | {"D_X": damaged}, "damaged.pth")
        assert "D_X" in fails("cyclegan.py train x y -o b --start-from damaged.pth")


def test_what_is_no_picture_or_too_large_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(common.os, "sysconf", lambda name: 3000)  # pages, of as many bytes
    f_W, G, style = johnson.TransformNet().eval(), Generator(1, 4).eval(), torch.rand(1, 3, 64, 64)
    calls = [
        lambda x: johnson.stylize(f_W, x),
        lambda x: translate(G, x),
        lambda x: gatys.stylize(x, [style]),
    ]
    picture, bright, vast = (
        to_pil(torch.rand(3, 9, 9)),
        255 * torch.ones(1, 3, 9, 9),
        torch.zeros(1, 3, 400, 400),
    )
    for x, word in (
        (picture, "Image"),
        (bright, "0 to 1.*, from 255 to 255"),
        (vast, "px would fit"),
    ):
        for call in calls:
            with pytest.raises(InputError, match=word):
                call(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_pictures_of_any_float_are_translated(dtype):
    network, x = Generator(1, 4).eval(), torch.rand(1, 3, 16, 16).to(dtype)
    y = translate(network, x, "float32")
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, translate(network, x.float(), "float32"))


def test_weights_of_other_wrappers_load():
    """Of DataParallel, torch.compile, and in a dictionary of a checkpoint."""
    G = Generator(2, 4)
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        weights = {prefix + name: value for name, value in G.state_dict().items()}
        for saved in (weights, {"state_dict": weights}, {"model_state_dict": weights}):
            torch.save(saved, "wrapped.pth")
            equal(load_generator(Path("wrapped.pth"))[0].state_dict(), G.state_dict())
