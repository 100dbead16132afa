"""models/horse2zebra.py, the program of the zebras, at a tiny size, and models/kid.py."""

from pathlib import Path

import pytest
import torch
from conftest import equal, files, save_noise

import common
import cyclegan
from models import horse2zebra as program
from models import kid as measuring


@pytest.fixture
def tiny(monkeypatch):
    """Make the program small, and write twelve horses and thirteen zebras."""
    stages = (program.Stage(2, (32,), 2.5, 0.2, copy=True), program.Stage(4, (34, 40), 1.0, 0.0))
    settings = {
        "STAGES": stages,
        "SCHEDULE": [stage for stage in stages for _ in range(stage.steps)],
        **{"CROP": 32, "LOAD_SIZE": 36, "WIDTH": 4, "BLOCKS": 1},
        **{"LAYERS_Y": ["relu1_2", "relu2_1"], "LAYERS_X": ["relu1_2", "relu2_1", "relu3_1"]},
        **{"HELD_OUT": 3, "STORED": 4, "SHOWN": 3, "SAVE_EVERY": 2, "KEEP_EVERY": 2},
    }
    for name, value in settings.items():
        monkeypatch.setattr(program, name, value)
    monkeypatch.setattr(common, "pick_precision", lambda *options: torch.float32)
    horses = [f"data/trainA/{k:02}.png" for k in range(12)]
    zebras = [f"data/trainB/{k:02}.png" for k in range(13)]
    save_noise(*horses, *zebras)


def test_it_overwrites_no_other_training_and_measures_into_no_model(tiny):
    program.main(["data", "-o", "m.pth"])
    with pytest.raises(common.InputError, match=r"m_checkpoint\.pth exists: go on .* --resume"):
        program.main(["data", "-o", "m.pth"])
    for plot in ("kid.txt", "m.pth"):
        with pytest.raises(common.InputError, match=r"suffix must be one of \.png"):
            measuring.main(["data", "m.pth", "--plot", plot])


def test_there_must_be_more_pictures_than_are_held_out(tiny):
    save_noise("few/1.png", "few/2.png", "few/3.png")
    with pytest.raises(common.InputError, match="only 3 pictures in few: it takes more than the 3"):
        program.split(Path("few"))


def trainer(seed=0):
    real = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return program.Trainer(*real, torch.float32)


def test_it_makes_a_model_and_resumes_exactly(tiny, monkeypatch, capsys):
    program.main(["data", "-o", "a/m.pth"])
    assert capsys.readouterr().out == "a/m.pth\n"
    kept = ["m_000002.pth", "m_000004.pth", "m_000006.pth"]
    tables = ["m_losses.csv", "m_losses.png"]
    assert files("a") == sorted(["m.pth", "m_checkpoint.pth", *kept, *tables])
    step = program.Trainer.step

    def killed(self, i, *pictures):
        if i == 5:
            raise KeyboardInterrupt
        return step(self, i, *pictures)

    monkeypatch.setattr(program.Trainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        program.main(["data", "-o", "b/m.pth"])
    monkeypatch.setattr(program.Trainer, "step", step)
    for _ in range(2):  # the second time, nothing is left to do
        program.main(["data", "-o", "b/m.pth", "--resume"])
    for name in ("m.pth", "m_checkpoint.pth", *kept):
        a, b = (common.load_checkpoint(Path(folder, name)) for folder in "ab")
        for key in a.keys() - {"args", "command", "history"}:
            equal(a[key], b[key])
    assert [common.load_checkpoint(Path("a", name))["step"] for name in kept] == [2, 4, 6]
    last, final = (common.load_checkpoint(Path("a", name)) for name in (kept[-1], "m.pth"))
    assert last["G"].keys() == final["G"].keys()
    assert final["command"] == "python models/horse2zebra.py"
    different = {key for key in last["G"] if not torch.equal(last["G"][key], final["G"][key])}
    assert {key.split(".")[1] for key in different} == {"18"}  # the last convolution
    for direction in ("x2y", "y2x"):
        network, load_size = cyclegan.load_generator(Path("a/m.pth"), direction)
        assert network.architecture == {"blocks": 1, "width": 4, "upsample": "nearest"}
        assert load_size == 36


def test_what_is_held_out_is_never_trained_on(tiny, monkeypatch):
    """And the test pictures, here missing, are not looked at."""
    trained, matched = [], []
    pictures = program.Pictures

    def pictures_recorded(domains, *sizes, **options):
        trained.extend(domains)
        return pictures(domains, *sizes, **options)

    monkeypatch.setattr(program, "Pictures", pictures_recorded)
    match = program.match_colors

    def match_recorded(network, sources, targets):
        matched.append((sources, targets))
        match(network, sources, targets)

    monkeypatch.setattr(program, "match_colors", match_recorded)
    program.main(["data", "-o", "m.pth"])
    horses, zebras = ([common.load_image(p, shorter=36) for p in used[::7]] for used in trained)
    equal(matched, [(horses, zebras), (zebras, horses)])  # of G, of F
    for part, used in zip(("trainA", "trainB"), trained, strict=True):
        every = common.find_images(Path("data", part))
        kept, apart = program.split(Path("data", part))
        assert used == kept and len(apart) == 3
        assert sorted([*kept, *apart]) == every
        assert apart == every[::4][:3]


def test_pictures_have_the_sizes_of_their_stage_in_turns(tiny, monkeypatch):
    seen = []
    load_image = common.load_image

    def recorded(path, shorter):
        seen.append(shorter)
        return load_image(path, shorter=shorter)

    monkeypatch.setattr(common, "load_image", recorded)
    files = common.find_images(Path("data/trainA"))
    data = program.Pictures([files] * 2, 36, 32, seed=0, flip=True)
    shapes = {tuple(crop.shape) for i in range(6) for crop in data[i]}
    assert shapes == {(3, 32, 32)}
    assert seen == [32, 32, 32, 32, 34, 34, 40, 40, 34, 34, 40, 40]  # of two domains


def test_a_step_minimises_the_papers_losses_by_E_and_spikes(tiny):
    """Spikes are values of the last block above 8, in all passes of both networks."""
    ours, (x, y) = trainer(), torch.rand(2, 1, 3, 32, 32)
    for network in (ours.G, ours.F):
        network.model[7].weight.data *= 100
        network.model[8] = torch.nn.Identity()  # without its norm, the block gets large values
    networks = ours.G, ours.F, ours.E_X, ours.E_Y
    expected, G_x, F_y = cyclegan.generator_losses(*networks, x, y, 1.0, 0.0)  # the second stage
    assert len(ours.maps) == 4  # of G(x), F(y) and the ways back
    excess = sum(((f.abs() - 8).clamp(min=0) ** 2).mean() for f in ours.maps)
    assert excess > 1
    equal(ours.maps[0], ours.G.model[:11](2 * x - 1))  # of the last residual block
    ours.maps.pop()
    weights = [*ours.G.parameters(), *ours.F.parameters()]
    gradients = torch.autograd.grad(expected["total"] + 0.15 * excess, weights)
    seen = [ours.E_X.see(x), ours.E_X.see(F_y), ours.E_Y.see(y), ours.E_Y.see(G_x)]
    for name, E, real, made in (("E_X", ours.E_X, *seen[:2]), ("E_Y", ours.E_Y, *seen[2:])):
        expected[name] = (((E.judge(real) - 1) ** 2).mean() + (E.judge(made) ** 2).mean()) / 2
    before = ours.E_X.heads[0][0].weight.clone()
    losses = ours.step(2, x, y)
    for name in ("total", "G", "F", "cycle", "E_X", "E_Y"):
        assert losses[name].item() == pytest.approx(expected[name].item(), rel=1e-4)
    assert losses["spikes"].item() == pytest.approx(excess.item(), rel=1e-4)
    torch.testing.assert_close([p.grad for p in weights], list(gradients), rtol=1e-3, atol=1e-4)
    assert not torch.equal(ours.E_X.heads[0][0].weight, before)
    assert E(torch.rand(1, 3, 64, 96)).shape == (1, 2, 16, 24)  # H/4, W/4


def test_first_of_all_G_and_F_learn_to_copy_and_E_to_judge(tiny):
    ours, (x, y) = trainer(), torch.rand(2, 1, 3, 32, 32)
    copies = [(network(z), z) for network in (ours.G, ours.F) for z in (x, y)]
    total = sum(2 * (copy - z).abs().mean() for copy, z in copies)
    weights = [*ours.G.parameters(), *ours.F.parameters()]
    gradients = torch.autograd.grad(total, weights)
    before = ours.E_Y.heads[0][0].weight.clone()
    losses = ours.step(0, x, y)
    assert losses["total"].item() == pytest.approx(total.item(), rel=1e-4)
    assert losses["spikes"] == 0
    torch.testing.assert_close([p.grad for p in weights], list(gradients), rtol=1e-3, atol=1e-5)
    assert not torch.equal(ours.E_Y.heads[0][0].weight, before)


def test_E_is_shown_the_newest_picture_and_others_of_its_kind(tiny):
    ours = trainer()
    store, pictures = program.Store(ours.E_Y), torch.rand(6, 1, 3, 32, 32)
    random = torch.Generator().manual_seed(0)
    for picture in pictures:
        store.add(picture.requires_grad_())
        shown = store.draw(random)
        assert [layer.shape[0] for layer in shown] == [3, 3]
        newest = ours.E_Y.see(picture)
        equal([layer[:1] for layer in shown], newest)
        assert not any(layer.requires_grad for layer in shown)
    kept = [ours.E_Y.see(picture) for picture in pictures[-4:]]  # STORED
    drawn = torch.cat([store.draw(random)[1] for _ in range(40)])  # of the second layer
    seen = {k for layer in drawn for k in range(4) if torch.equal(kept[k][1][0], layer)}
    assert seen == {0, 1, 2, 3} and len(store.pictures) == 4
    other = program.Store(ours.E_Y)
    other.load_state_dict(store.state_dict())
    equal(
        other.draw(torch.Generator().manual_seed(1)), store.draw(torch.Generator().manual_seed(1))
    )


def test_E_judges_each_layer_alike_in_units_of_real_maps(tiny):
    """What is random stays, VGG is not saved, and a faint picture looks faint: there is no norm."""
    ours, x = trainer(), torch.rand(2, 3, 32, 32)
    E = ours.E_X
    assert {name.split(".")[0] for name in E.state_dict()} == {"mix_0", "mix_1", "mix_2", "heads"}
    judged = 0
    for mix, head, f in zip(E.buffers(), E.heads, E.vgg[0](x, E.layers).values(), strict=True):
        verdict = head(torch.einsum("dc,bchw->bdhw", mix[..., 0, 0], f))
        judged += (verdict - 1).square().mean() / 3
    torch.testing.assert_close((E(x) - 1).square().mean(), judged)
    E = program.FeatureDiscriminator(
        common.VGG(["relu3_2", "relu4_3"], "vgg19"), ["relu3_2", "relu4_3"], x
    )
    for mix, f in zip(E.buffers(), E.vgg[0](x).values(), strict=True):
        assert mix.std() * f.mean() == pytest.approx((2 / f.shape[1]) ** 0.5, rel=0.05)
    kinds = (torch.nn.Conv2d, torch.nn.LeakyReLU)
    assert all(isinstance(layer, kinds) for head in E.heads for layer in head)


def test_the_rate_falls_in_the_last_stage_and_E_is_clipped(tiny, monkeypatch):
    ours, clipped, clip = trainer(), [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda p, most: clipped.append(most) or clip(p, most)
    )
    rates = []
    for i in range(6):
        ours.step(i, *torch.rand(2, 1, 3, 32, 32))
        rates.append(ours.optimizer_G.param_groups[0]["lr"])
    assert rates == pytest.approx([2e-4, 2e-4, 2e-4, 1.5e-4, 1e-4, 0.5e-4])
    assert ours.optimizer_E.param_groups[0]["lr"] == 2e-4
    assert clipped == [1] * 12
    gradients = [p.grad.norm() for E in (ours.E_X, ours.E_Y) for p in E.parameters()]
    assert torch.stack(gradients).norm() < 2**0.5 + 1e-3


def test_weights_are_averaged(tiny):
    ours = trainer()
    ours.step(0, *torch.rand(2, 1, 3, 32, 32))
    first = [getattr(ours, name).model[1].weight.detach().clone() for name in "GF"]
    ours.step(1, *torch.rand(2, 1, 3, 32, 32))
    for name, w in zip("GF", first, strict=True):
        expected = 0.999 * w + 0.001 * getattr(ours, name).model[1].weight.detach()
        average = getattr(ours, f"{name}_ema").module.model[1].weight
        torch.testing.assert_close(average, expected, rtol=0, atol=1e-8)


def test_each_step_draws_other_pictures(tiny, monkeypatch):
    seeds, draw = [], program.Store.draw

    def recorded(store, random):
        seeds.append(random.initial_seed())
        return draw(store, random)

    monkeypatch.setattr(program.Store, "draw", recorded)
    ours = trainer()
    for i in (3, 4):
        ours.step(i, *torch.rand(2, 1, 3, 32, 32))
    assert seeds == [3] * 4 + [4] * 4


def test_colors_are_matched():
    """What is made has the mean and the covariance of the targets; only the last layer changes."""
    torch.manual_seed(0)
    network = cyclegan.Generator(1, 4, "nearest").eval()
    network.model[-2].weight.data *= 3
    first = network.model[1].weight.clone()
    sources = list(torch.rand(6, 1, 3, 32, 40))
    targets = list(0.2 + 0.6 * torch.rand(6, 1, 3, 32, 40) ** torch.tensor([1, 2, 3]).view(3, 1, 1))
    targets = [0.7 * picture + 0.3 * picture.mean(1, keepdim=True) for picture in targets]
    program.match_colors(network, sources, targets)
    made = [cyclegan.translate(network, picture, "float32") for picture in sources]
    made, real = (
        torch.cat([p[..., ::4, ::4].flatten(2)[0] for p in part], 1) for part in (made, targets)
    )
    torch.testing.assert_close(made.mean(1), real.mean(1), rtol=0, atol=0.01)
    torch.testing.assert_close(torch.cov(made), torch.cov(real), rtol=0, atol=0.01)
    assert torch.equal(network.model[1].weight, first)


def test_kid_by_loops():
    """Bińkowski et al. 2018, Eq. 4: k(a, b) = (a·b / d + 1)³, without pairs of one with itself."""
    made, real = torch.rand(4, 5, 7).double()[:2]
    a, b = (f / (3 * real.std(0).mean()) for f in (made, real))

    def mean(x, y, same):
        pairs = [(i, j) for i in range(5) for j in range(5) if not same or i != j]
        return sum((float(x[i] @ y[j]) / 7 + 1) ** 3 for i, j in pairs) / len(pairs)

    expected = mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)
    assert measuring.kid(made, real) == pytest.approx(expected)


def test_a_model_is_measured_by_what_it_makes_of_each_kind(tiny, monkeypatch, capsys):
    """On test pictures, or on those held out; and plotted over its steps."""
    save_noise(*(f"data/test{part}/{k}.png" for part in "AB" for k in range(3)))
    program.main(["data", "-o", "m.pth"])
    compared = []
    monkeypatch.setattr(measuring, "features", lambda pictures: torch.cat(pictures))
    monkeypatch.setattr(measuring, "kid", lambda *sets: compared.append(sets) or len(compared) / 8)
    capsys.readouterr()
    for flags, parts in (([], "test"), (["--held-out"], "train")):
        compared.clear()
        measuring.main(["data", "m_000002.pth", "m.pth", *flags, "--plot", "kid.png"])
        horses, zebras = (
            common.find_images(Path("data", f"{parts}{part}"))
            if parts == "test"
            else program.split(Path("data", f"train{part}"))[1]
            for part in "AB"
        )
        x, y = ([common.load_image(p, shorter=36) for p in part] for part in (horses, zebras))
        expected = [(torch.cat(x), torch.cat(y)), (torch.cat(y), torch.cat(x))]
        for name in ("m_000002.pth", "m.pth"):
            G, F = (cyclegan.load_generator(Path(name), way)[0] for way in ("x2y", "y2x"))
            for network, sources, targets in ((G, x, y), (F, y, x)):
                made = torch.cat([cyclegan.translate(network, picture) for picture in sources])
                expected.append((made, torch.cat(targets)))
        equal(compared, expected)
        assert capsys.readouterr().out.splitlines() == [
            "untranslated: to zebras 0.12, to horses 0.25",
            "m_000002.pth: zebras 0.38, horses 0.50",
            "m.pth: zebras 0.62, horses 0.75",
        ]
    assert common.load_image("kid.png").std() > 0.01


def test_features_are_means_and_spreads_of_maps():
    f = measuring.features(list(torch.rand(2, 1, 3, 40, 60)))
    assert f.shape == (2, 2 * 512 * 2) and f.isfinite().all() and f.min() >= 0
