"""gatys.py against the paper's equations, written out as loops in float64, and its printed gradients."""

import inspect
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as nnf
import torchvision

import common
import gatys
from common import VGG, InputError, gram_matrix
from gatys import Diverged, Region, content_loss, optimize, paint, style_loss, stylize, total_loss, total_variation

ROOT = Path(__file__).parent.parent

SMALL = {
    "vgg_weights": "random",
    "content_layers": ["relu2_2"],
    "style_layers": ["relu1_1", "relu2_1"],
    "num_steps": 2,
    "lbfgs_iters": 3,
    "beta": 1.0,
    "precision": "float32",
}
N, H, W = 3, 4, 5
M = H * W
HALVES = [(torch.arange(40) < 20).float()[:, None].expand(1, 1, 40, 56), (torch.arange(56) < 28).expand(1, 1, 40, 56)]


def feature_maps(seed):
    """Two feature maps (1, N, H, W) in float64, before the ReLU."""
    return [*torch.randn(2, 1, N, H, W, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))]


def gram_by_loops(f):
    """Gatys Eq. 3: G_ij = Σ_k F_ik F_jk."""
    f = f.reshape(N, M)
    return [[sum(f[i, k] * f[j, k] for k in range(M)) for j in range(N)] for i in range(N)]


def style_by_loops(f, p):
    """Gatys Eq. 4: E_l = 1/(4 N² M²) Σ_ij (G_ij − A_ij)²."""
    G, A = gram_by_loops(f), gram_by_loops(p)
    return sum((G[i][j] - A[i][j]) ** 2 for i in range(N) for j in range(N)) / (4 * N**2 * M**2)


# --- Losses ---


def test_content_loss_is_eq_1_over_the_number_of_entries():
    f, p = feature_maps(0)
    eq_1 = 0.5 * sum((a - b) ** 2 for a, b in zip(f.flatten(), p.flatten(), strict=True))
    assert content_loss(f, p).item() == pytest.approx(eq_1.item() / (N * M), rel=1e-6)


def test_style_loss_is_eq_4():
    f, p = feature_maps(1)
    torch.testing.assert_close(style_loss(gram_matrix(f), gram_matrix(p)), style_by_loops(f, p))


def test_total_loss_is_eq_5_and_7():
    x = torch.rand(1, 3, 4, 6, dtype=torch.float64)
    names = ["relu1_1", "relu2_1", "relu3_1", "relu4_2", "relu5_2"]
    maps = {name: feature_maps(seed) for seed, name in enumerate(names)}
    F, P = ({name: pair[k] for name, pair in maps.items()} for k in (0, 1))
    style_layers = ["relu1_1", "relu2_1", "relu3_1"]
    A = {name: gram_matrix(P[name]) for name in style_layers}
    content_layers = ["relu4_2", "relu5_2"]
    regions = [Region(None, 0.25, A), Region(None, 0.5, {"relu1_1": A["relu1_1"]})]
    losses = total_loss(x, F, {name: P[name] for name in content_layers}, regions, 2.0, 70.0, 0.5)
    eq_5 = 0.25 * sum(1 / 3 * style_by_loops(F[name], P[name]) for name in style_layers)
    eq_5 += 0.5 * style_by_loops(F["relu1_1"], P["relu1_1"])
    eq_1 = sum(1 / 2 * 0.5 * ((F[name] - P[name]) ** 2).sum() / (N * M) for name in content_layers)
    tv = sum(((x[0, c, i + 1, j] - x[0, c, i, j]) ** 2) for c in range(3) for i in range(3) for j in range(6)) / 54
    tv += sum(((x[0, c, i, j + 1] - x[0, c, i, j]) ** 2) for c in range(3) for i in range(4) for j in range(5)) / 60
    assert losses["style"].item() == pytest.approx(eq_5.item(), rel=1e-6)
    assert losses["content"].item() == pytest.approx(eq_1.item(), rel=1e-6)
    assert total_variation(x).item() == pytest.approx(tv.item(), rel=1e-6)
    assert losses["total"].item() == pytest.approx((2 * eq_1 + 70 * eq_5 + 0.5 * tv).item(), rel=1e-6)


def test_guided_gram_is_eq_4_of_gatys_2017():
    """F_r = T_r ∘ F with Σ T_r² = 1; the mask is averaged over the pixels that an entry stands for."""
    f, _ = feature_maps(4)
    T = torch.rand(1, 1, 2 * H, 3 * W, dtype=torch.float64)
    t = torch.tensor([[T[0, 0, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3].mean() for j in range(W)] for i in range(H)])
    wanted = torch.tensor(gram_by_loops(f * t / t.square().sum().sqrt())).double() / N
    torch.testing.assert_close(gram_matrix(gatys.guide(f, T))[0], wanted, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(gram_matrix(gatys.guide(f, torch.ones(1, 1, 1, 1))), gram_matrix(f))
    assert gatys.guide(f, None) is f
    assert not gatys.guide(f, torch.zeros(1, 1, 9, 9)).any()
    left = (torch.arange(W) < 2).double().expand(1, 1, H, W)  # regions that share out the picture add up to it
    parts = [T.square().mean() * gram_matrix(gatys.guide(f, T)) for T in (left, 1 - left)]
    torch.testing.assert_close(sum(parts), gram_matrix(f), rtol=1e-5, atol=1e-9)


def test_protection_loss_is_eq_1_within_the_mask_over_all_layers():
    pairs = [feature_maps(5), feature_maps(6)]
    T = torch.rand(1, 1, H, W, dtype=torch.float64)
    wanted = sum(0.5 * (T * (f - p)).square().sum() / (N * M) for f, p in pairs) / 2
    F, P = ({f"relu{k + 1}_1": pair[i] for k, pair in enumerate(pairs)} for i in (0, 1))
    assert gatys.protection_loss(F, P, T).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_gradient_of_the_content_loss_is_eq_2():
    before_relu, p = feature_maps(2)
    before_relu.requires_grad_()
    F, P = before_relu.relu(), p.relu()
    (content_loss(F, P) * N * M).backward()
    eq_2 = torch.where(F > 0, F - P, 0)
    torch.testing.assert_close(before_relu.grad, eq_2, rtol=1e-5, atol=1e-6)


def test_gradient_of_the_style_loss_is_eq_6():
    before_relu, p = feature_maps(3)
    before_relu.requires_grad_()
    F, P = before_relu.relu(), p.relu()
    style_loss(gram_matrix(F), gram_matrix(P)).backward()
    F = F.detach()
    f, G, A = F.reshape(N, M), torch.tensor(gram_by_loops(F)).double(), torch.tensor(gram_by_loops(P)).double()
    eq_6 = torch.where(f > 0, (f.T @ (G - A)).T / (N**2 * M**2), 0)
    torch.testing.assert_close(before_relu.grad.reshape(N, M), eq_6, rtol=1e-4, atol=1e-7)


# --- Optimisation ---


def frames(objective, steps, n, *rest, size=8, start=0.0):
    """What `optimize` yields from a grey picture: (picture, losses) each."""
    return list(optimize(torch.full((1, 3, size, size), start), lambda x: {"total": objective(x)}, steps, n, *rest))


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_optimize_finds_the_minimum_and_yields_pictures_with_their_own_losses(optimizer):
    """Beyond [0, 1] too: clamping would cut off the gradient."""
    target, curvature = 1.4 * torch.rand(1, 3, 8, 8) - 0.2, torch.rand(1, 3, 8, 8) + 0.1

    def objective(x):
        return (curvature * (x - target).square()).mean()

    steps = frames(objective, 10, 20, optimizer, start=0.5)
    assert len(steps) == 10
    for x, losses in [*steps, *frames(objective, 3, 2, optimizer, start=0.5)]:
        assert losses["total"] == pytest.approx(objective(x).item(), rel=1e-3, abs=1e-8)
    torch.testing.assert_close(steps[-1][0], target, rtol=0, atol=0.01)


def test_lbfgs_does_not_depend_on_the_scale_of_the_loss():
    """torch's L-BFGS stands still when a loss is small: its thresholds are absolute."""
    target = torch.rand(1, 3, 8, 8)
    small, plain, large = (frames(lambda x, s=s: s * (x - target).pow(4).mean(), 3, 4)[-1][0] for s in (1e-8, 1.0, 1e8))
    torch.testing.assert_close((small, large), (plain, plain), rtol=0, atol=0.01)
    assert plain.mean() > 0.1


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_lbfgs_moves_once_an_evaluation(n):
    """torch's own limit of evaluations would end short steps early, its thresholds the late ones."""
    seen = []
    assert len(frames(lambda x: seen.append(x.detach().clone()) or (x - 1).pow(4).mean(), 12, n)) == 12
    assert len(seen) == 12 * n
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))


def test_lbfgs_remembers_20_moves_and_takes_its_learning_rate(spy):
    made = spy(torch.optim, "LBFGS")
    (one, _), (half, _) = (frames(lambda x: (x - 1).square().mean(), 1, 2, "lbfgs", lr)[0] for lr in (None, 0.5))
    torch.testing.assert_close(half, 0.5 * one)
    assert made[0]["history_size"] == 20


def test_first_moves_are_as_large_as_they_should_be():
    """Adam's are its learning rate; torch's L-BFGS bounds the sum of all changes, here their mean at every size."""
    for lr, move in ((None, 0.02), (0.1, 0.1)):
        _, (x, _) = frames(lambda x: x.mean(), 2, 1, "adam", lr, start=0.5)
        torch.testing.assert_close(x, torch.full_like(x, 0.5 - move), rtol=1e-3, atol=0)
    for size in (8, 64):
        ((x, _),) = frames(lambda x: (x - 1).square().mean(), 1, 2, size=size)
        assert x.mean().item() == pytest.approx(1 / 100, rel=1e-3)


def test_a_damped_first_move_has_a_ninth_of_the_finest_stripes():
    """Half a cycle a pixel, in both directions √½ of one, counts 1/(1 + 4 · ½) in z, and so it does in the gradient."""
    stripes = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 3, 6, 8)
    checks = stripes * torch.tensor([1.0, -1.0]).repeat(3)[:, None]
    for pattern, damping, share in ((stripes, 4.0, 1 / 9), (stripes, 0.0, 1.0), (checks, 4.0, (1 + 8**0.5) ** -2)):
        steps = optimize(
            0 * pattern, lambda x, p=pattern: {"total": (x - 1 - p).square().mean()}, 2, 1, damping=damping
        )
        _, (x, _) = steps
        assert (x * pattern).mean() / x.mean() == pytest.approx(share, rel=1e-3)
    odd = torch.rand(1, 3, 7, 9)
    assert torch.equal(next(optimize(odd, lambda x: {"total": x.mean()}, 1, 1, damping=4.0))[0], odd)


def test_a_loss_that_becomes_infinite_stops_it():
    seen = []
    steps = optimize(torch.zeros(1, 3, 4, 4), lambda x: {"total": x.mean() * (math.inf if len(seen) > 1 else 1)}, 10, 3)
    with pytest.raises(Diverged, match="--lr"):
        for x, _ in steps:
            seen.append(x)
            assert x.isfinite().all()
    assert len(seen) == 2


# --- stylize ---


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(1, 3, 40, 56, generator=generator), torch.rand(1, 3, 32, 48, generator=generator) ** 3]


def record(*args, **kwargs):
    """The result of `stylize`, and the frames of `paint` on the way to it: (picture, losses) each."""
    frames = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gatys, "paint", lambda *a, **k: (frames.append(frame) or frame for frame in paint(*a, **k)))
        return stylize(*args, **(SMALL | kwargs)), frames


def test_defaults():
    """The paper's, or the README's where it departs from the paper."""
    defaults = {name: p.default for name, p in inspect.signature(paint).parameters.items() if name != "content"}
    assert defaults == {
        "styles": (), "alpha": 1.0, "beta": 30.0, "tv_weight": 0.0, "content_layers": ("relu4_2",),
        "style_layers": ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"), "style_blend": None, "num_steps": 16,
        "lbfgs_iters": 2, "scales": None, "optimizer": "lbfgs", "lr": None, "init": "recolored",
        "preserve_color": None, "style_masks": (), "painting_masks": (), "protect": None, "protect_weight": 30.0,
        "pooling": "avg", "vgg": "vgg19", "vgg_weights": "auto", "seed": 0, "precision": "auto",
    }  # fmt: skip
    assert gatys.PROTECTED_LAYERS == ("relu1_1", "relu3_1", "relu4_2")


def test_the_first_losses_are_those_of_the_equations(pictures):
    """From VGG's own layers: the rescaling, the margin, the weights and the layers of every term."""
    photo = nnf.pad(pictures[0], [8] * 4, mode="replicate")
    options = SMALL | {"alpha": 3.0, "beta": 7.0, "tv_weight": 2.0, "lbfgs_iters": 1, "scales": 1}
    a, b = ((x - common.IMAGENET_MEAN) / common.IMAGENET_STD for x in (photo, pictures[1]))
    style = 0
    for i, layer in enumerate(VGG(["relu2_2"], "vgg19", "random", "avg").features):  # conv1_1, 1_2, pool, 2_1, 2_2
        a, b = layer(a), layer(b)
        if i in (1, 6):
            units = [(f / ((a.mean() + b.mean()) / 2))[0].flatten(1) for f in (a, b)]
            G, A = (f @ f.T / f.numel() for f in units)
            style += ((G - A) ** 2).sum() / 4 / 2
    down, right = photo[..., 1:, :] - photo[..., :-1, :], photo[..., 1:] - photo[..., :-1]
    variation = (down**2).mean() + (right**2).mean()
    _, losses = next(paint(pictures[0], pictures[1:], **options, init="content"))
    assert losses["content"] == pytest.approx(0, abs=1e-6)  # it starts from the photo
    assert losses["style"] == pytest.approx(style.item(), rel=1e-3)
    assert losses["total"] == pytest.approx((7 * style + 2 * variation).item(), rel=1e-3)
    _, losses = next(paint(pictures[0], pictures[1:], **options, init="noise"))
    assert losses["content"] > 0.01


@pytest.mark.parametrize(("optimizer", "size"), [("lbfgs", (37, 53)), ("adam", (64, 16))])
def test_the_loss_falls_and_every_size_comes_out_as_it_went_in(pictures, optimizer, size):
    content = nnf.interpolate(pictures[0], size)
    options = {"optimizer": optimizer, "num_steps": 4, "init": "content", "content_layers": ["relu4_2"], "scales": 1}
    result, frames = record(content, [torch.rand(1, 3, 51, 17) ** 3], **options)
    assert frames[-1][1]["total"] < 0.7 * frames[0][1]["total"]
    assert result.shape == content.shape
    assert 0 <= result.min() < result.max() <= 1


def test_a_fine_scale_starts_from_the_coarse_result(pictures):
    """With one evaluation at the fine scale, its only frame is its start."""
    options = {"num_steps": 1, "lbfgs_iters": 1, "scales": 2, "init": "noise"}
    _, (_, (coarse, _), (fine, _)) = record(pictures[0], pictures[1:], **options)
    expected = nnf.interpolate(coarse, fine.shape[-2:], mode="bicubic").clamp(0, 1)
    torch.testing.assert_close(fine, expected, rtol=0, atol=1e-4)


def test_resizing_averages_and_sizes_halve_down_to_192_px():
    noise = torch.rand(1, 3, 128, 128)
    small = gatys.resize(noise, 0.25)
    assert small.shape == (1, 3, 32, 32)
    assert (small - nnf.avg_pool2d(noise, 4)).abs().mean() < 0.05
    for size, scales in ((191, 1), (192, 1), (383, 1), (384, 2), (512, 2), (768, 3), (1024, 3)):
        assert gatys.scale_factors(torch.zeros(1, 3, size // 2, size), None) == [0.25, 0.5, 1][3 - scales :]


def test_every_coarser_scale_has_twice_as_many_steps_and_noise_is_not_damped(pictures, monkeypatch):
    calls = []
    monkeypatch.setattr(gatys, "optimize", lambda x, _, *rest: calls.append(rest) or iter([(x, {"total": 0.0})]))
    for optimizer, init, damping in (("adam", "content", 0), ("lbfgs", "noise", 0), ("lbfgs", "recolored", 4)):
        options = {"num_steps": 3, "lbfgs_iters": 5, "scales": 3, "optimizer": optimizer, "lr": 0.5, "init": init}
        list(paint(pictures[0], pictures[1:], **(SMALL | options)))
        assert calls == [(steps, 5, optimizer, 0.5, damping) for steps in (12, 6, 3)]
        calls.clear()


def test_the_style_is_scaled_with_the_picture_and_the_network_rescaled_once(pictures, spy):
    seen, rescaled = spy(VGG, "forward"), spy(gatys, "rescale")
    list(paint(pictures[0], pictures[1:], **SMALL, scales=2))
    sizes = {n: [tuple(call["x"].shape[-2:]) for call in seen if len(call["layers"]) == n] for n in (1, 2)}
    margin = 2 * gatys.MARGIN
    assert sizes[2] == [(16, 24), (32, 48)]  # the style has two layers
    assert sizes[1] == [(20 + margin, 28 + margin), (40 + margin, 56 + margin)]
    assert [[tuple(image.shape[-2:]) for image in call["images"]] for call in rescaled] == [[(36, 44), (16, 24)]]


def test_zero_weights_skip_what_they_make_needless(pictures, spy):
    seen = spy(VGG, "forward")
    for styles, weights, layers, term in (
        (pictures[1:], {"alpha": 0.0}, ("relu1_1", "relu2_1"), "content"),
        ([], {"beta": 0.0}, ("relu2_2",), "style"),
    ):
        seen.clear()
        _, frames = record(pictures[0], styles, **weights, init="noise")
        assert {tuple(call["layers"]) for call in seen} - {()} == {layers}
        assert frames[-1][1][term] == 0


def test_inversion_comes_nearer_to_the_photo_than_noise(pictures):
    smooth = torchvision.transforms.functional.gaussian_blur(pictures[0], 9)
    result, _ = record(smooth, beta=0.0, init="noise", content_layers=["relu1_1"], num_steps=10)
    noise = gatys.start("noise", smooth, [], [1.0], seed=0)
    assert (result - smooth).square().mean() < 0.1 * (noise - smooth).square().mean()


def test_texture_depends_on_the_seed_and_not_on_the_contents_pixels(pictures):
    arguments = {"alpha": 0.0, "init": "noise"}
    first, _ = record(pictures[0], pictures[1:], **arguments, seed=5)
    second, _ = record(1 - pictures[0], pictures[1:], **arguments, seed=5)
    other, _ = record(pictures[0], pictures[1:], **arguments, seed=6)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.fixture
def regions(spy):
    """A function with the arguments of `paint`: the regions that it gives to `total_loss` first."""
    calls = spy(gatys, "total_loss")

    def first_regions(*args, **kwargs):
        calls.clear()
        next(paint(*args, **(SMALL | kwargs)))
        return calls[0]["regions"]

    return first_regions


def test_blend_weighs_the_gram_matrices(pictures, regions):
    styles = [pictures[1], 1 - pictures[1]]
    first, second, blend, equal = (
        regions(pictures[0], styles, style_blend=shares)[0].A for shares in ([2, 0], [0, 5], [6, 2], None)
    )
    apart = regions(pictures[0], styles, style_masks=[torch.ones(1, 1, 2, 2)] * 2)
    torch.testing.assert_close((first, second), (apart[0].A, apart[1].A))
    assert (first["relu2_1"] - second["relu2_1"]).norm() > 0.1 * first["relu2_1"].norm()
    for layer in SMALL["style_layers"]:
        torch.testing.assert_close(blend[layer], 0.75 * first[layer] + 0.25 * second[layer])
        torch.testing.assert_close(equal[layer], 0.5 * first[layer] + 0.5 * second[layer])


def test_initialisations(pictures):
    content, style = pictures

    def start(init, styles, shares=(1.0,), seed=0):
        return gatys.start(init, content, styles, shares, seed)

    assert torch.equal(start("content", [style]), content)
    assert torch.equal(start("recolored", []), content)
    recolored = start("recolored", [style])
    torch.testing.assert_close(recolored, gatys.match_color(content, [style]).clamp(0, 1))
    torch.testing.assert_close(start("recolored", [1 - style, style], [0.0, 1.0]), recolored)
    noise = start("noise", [style])
    assert noise.shape == content.shape
    assert torch.equal(noise, start("noise", []))
    assert 0 <= noise.min() < noise.max() <= 1
    assert 0.27 < noise.std() < 0.31  # uniform: 0.289
    ramp = torch.linspace(0, 1, 90).expand(1, 3, 30, 90)
    # The first style covers 40×56 at 40×120, so that the middle of it stays.
    from_style = start("style", [ramp, 1 - ramp], [0.5, 0.5])
    assert from_style.shape == content.shape
    torch.testing.assert_close(from_style[0, 0, 20], torch.linspace(32 / 120, 88 / 120, 56), rtol=0, atol=0.02)


def test_matched_colors_have_the_paintings_mean_and_covariance():
    generator = torch.Generator().manual_seed(0)
    mix = torch.tensor([[0.5, 0.2, 0.1], [0.0, 0.4, 0.3], [0.1, 0.1, 0.6]])
    image, *targets = (torch.rand(1, 3, 20, 30, generator=generator) ** k for k in (1, 2, 3))
    targets = [torch.einsum("ij,bjhw->bihw", mix, target) for target in targets]
    matched = gatys.match_color(image, targets)[0].flatten(1).double()
    wanted = torch.cat([target[0].flatten(1) for target in targets], 1).double()
    torch.testing.assert_close(matched.mean(1), wanted.mean(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cov(matched, correction=0), torch.cov(wanted, correction=0), rtol=0, atol=1e-5)
    # Of all maps with these statistics, the one that moves colours least has a symmetric, positive matrix.
    x = image[0].flatten(1).double()
    x, y = (pixels - pixels.mean(1, keepdim=True) for pixels in (x, matched))
    A = torch.linalg.lstsq(x.T, y.T).solution.T
    torch.testing.assert_close(A, A.T, rtol=0, atol=1e-4)
    assert torch.linalg.eigvalsh(A).min() > 0
    larger = [targets[0].repeat(1, 1, 3, 2), targets[1]]  # a style counts as much whatever its size
    torch.testing.assert_close(gatys.match_color(image, larger), gatys.match_color(image, targets))


def test_matched_colors_of_grey_and_flat_pictures():
    grey = torch.rand(1, 1, 9, 9).expand(1, 3, 9, 9)
    flat, colorful = torch.full((1, 3, 9, 9), 0.3), torch.rand(1, 3, 9, 9)
    for image, target in ((grey, colorful), (flat, colorful), (colorful, flat), (flat, flat), (grey, flat)):
        matched = gatys.match_color(image, [target])
        torch.testing.assert_close(matched.mean((2, 3)), target.mean((2, 3)), rtol=0, atol=1e-5)
    noisy = grey + 0.002 * torch.randn(1, 3, 9, 9)  # as of JPEG: it must not become coloured noise
    assert (gatys.match_color(noisy, [colorful]) - gatys.match_color(grey, [colorful])).abs().max() < 0.25


def test_luminance_is_matched_in_mean_and_spread(pictures):
    content, style = pictures[0] ** 2, pictures[1] * 0.6 + 0.1
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    matched = gatys.match_luminance(style, content)
    a, b = (torch.einsum("c,bchw->bhw", weights, image.double()) for image in (matched, content))
    assert a.mean().item() == pytest.approx(b.mean().item(), abs=0.005)  # some of it is clamped
    assert a.std().item() == pytest.approx(b.std().item(), abs=0.01)
    assert torch.equal(matched[:, 0], matched[:, 2])
    stark = gatys.match_luminance(style, (content > 0.4).float())
    assert (stark.min(), stark.max()) == (0, 1)
    assert gatys.match_luminance(torch.full_like(style, 0.5), content).isfinite().all()


def test_preserved_colors_are_the_photos(pictures, spy):
    content, styles = pictures[0] * 0.4 + 0.3, [pictures[1]]  # so that no color leaves the range
    to_iq = torch.tensor([[0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    for picture, _ in paint(content, styles, **SMALL, preserve_color="luminance", scales=2):
        photo = gatys.resize(content, picture.shape[-1] / content.shape[-1])
        inside = ((picture > 0) & (picture < 1)).all(1)[0]
        a, b = (torch.einsum("dc,chw->dhw", to_iq, image[0])[:, inside] for image in (picture, photo))
        assert (a - b).abs().mean() < 0.01
    assert inside.float().mean() > 0.5
    grey = (content * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True).expand_as(content)
    used = spy(gatys, "resize")
    for way, photo, painting in (
        ("histogram", content, gatys.match_color(styles[0], [content]).clamp(0, 1)),
        ("luminance", grey, gatys.match_luminance(styles[0], content)),
    ):
        used.clear()
        next(paint(content, styles, **SMALL, preserve_color=way))
        torch.testing.assert_close([call["image"] for call in used[:2]], [photo, painting])


def test_masks_share_out_the_picture_among_the_styles(pictures, regions):
    """The last style gets the rest, the protected part none, and a style counts as much as it covers."""
    top, left = HALVES[0], 0.2 + 0.6 * HALVES[1]
    styles = [pictures[1], 1 - pictures[1]]
    options = {"protect": top, "init": "content", "scales": 1, "lbfgs_iters": 1}
    found = regions(pictures[0], styles, **options, style_masks=[left])
    for region, mask in zip(found, (left, 1 - left), strict=True):
        torch.testing.assert_close(region.T[..., 8:-8, 8:-8], mask * (1 - top))
        assert region.share == pytest.approx(region.T.square().mean().item())
    swapped = regions(pictures[0], styles[::-1], **options, style_masks=[1 - left, left])
    for one, other in zip(found, swapped[::-1], strict=True):
        torch.testing.assert_close((one.T, one.A), (other.T, other.A))
    overlapping = regions(pictures[0], [*styles, styles[0]], style_masks=[left, left])
    torch.testing.assert_close(overlapping[2].T, (1 - 2 * overlapping[0].T).clamp_min(0))


def test_a_mask_is_scaled_smoothly_and_goes_on_into_the_margin():
    mask = torch.rand(1, 1, 32, 48)
    small = gatys.on(mask, torch.zeros(1, 3, 8, 12), margin=0)
    assert (small - nnf.avg_pool2d(mask, 4)).abs().mean() < 0.1
    wide = gatys.on(mask, torch.zeros(1, 3, 24, 28))
    assert torch.equal(wide, nnf.pad(small, [8] * 4, mode="replicate"))


def test_a_painting_mask_leaves_the_rest_of_the_painting_out(pictures, regions):
    half = [(torch.arange(96) < 48).float().expand(1, 1, 32, 96)]
    grams = []
    for rest in (torch.zeros(1, 3, 32, 48), torch.ones(1, 3, 32, 48)):
        painting = torch.cat([pictures[1], rest], 3)
        A = regions(pictures[0], [painting], style_masks=[torch.ones(1, 1, 2, 2)], painting_masks=half)[0].A["relu1_1"]
        grams.append(A / A.norm())  # the rescaling sees all of it
    assert (grams[0] - grams[1]).norm() < 0.2  # 1.3 without the mask; borders see both


def test_the_protected_part_starts_from_the_photo_and_keeps_it(pictures):
    photo, top = torchvision.transforms.functional.gaussian_blur(pictures[0], 9), HALVES[0]
    options = {"beta": 30.0, "num_steps": 4, "init": "noise", "scales": 2}
    plain, _ = record(photo, pictures[1:], **options)
    kept, frames = record(photo, pictures[1:], **options, protect=top)
    change, changed = ((image - photo).abs() for image in (plain, kept))
    assert changed[..., :16, :].mean() < 0.1 * change[..., :16, :].mean()
    assert changed[..., 24:, :].mean() > 0.5 * change[..., 24:, :].mean()
    losses = frames[-1][1]
    assert losses["protected"] > 0
    total = losses["content"] + 30 * losses["style"] + 30 * losses["protected"]
    assert losses["total"] == pytest.approx(total, rel=1e-4)
    start, losses = next(paint(photo, pictures[1:], **(SMALL | options | {"scales": 1, "lbfgs_iters": 1}), protect=top))
    torch.testing.assert_close(start[..., :20, :], photo[..., :20, :])
    assert (start - photo)[..., 20:, :].abs().mean() > 0.1
    assert list(losses) == ["total", "content", "style", "variation", "protected"]


def test_masks_of_all_kinds(pictures):
    """Black protects nothing, white everything; a single pixel, soft edges, and other sizes are masks as well."""
    options = {"beta": 30.0, "scales": 1}
    plain, _ = record(pictures[0], pictures[1:], **options)
    none, _ = record(pictures[0], pictures[1:], **options, protect=torch.zeros(1, 1, 3, 90))
    everything, _ = record(pictures[0], pictures[1:], **options, protect=torch.ones(1, 1, 1, 1))
    torch.testing.assert_close(everything, pictures[0], rtol=0, atol=0.01)
    assert (none - plain).abs().mean() < 0.05 * (plain - pictures[0]).abs().mean()
    pixel = torch.zeros(1, 1, 40, 56)
    pixel[..., 20, 28] = 1
    styles = [pictures[1], 1 - pictures[1]]
    for mask in (pixel, torch.linspace(0, 1, 200).expand(1, 1, 7, 200), 1 - pixel):
        for where in ({"protect": mask, "style_masks": [mask, 1 - mask]}, {"style_masks": [mask], "beta": 0.0}):
            result, frames = record(pictures[0], styles, **where, painting_masks=[mask] * 2, num_steps=1)
            assert result.isfinite().all()
            assert math.isfinite(frames[-1][1]["total"])


def test_other_tensors_and_precisions_give_nearly_the_same_picture(pictures):
    expected, _ = record(pictures[0], pictures[1:])
    result, _ = record(pictures[0].double().requires_grad_(), [pictures[1].to(memory_format=torch.channels_last)])
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-3)
    assert not result.requires_grad
    half, _ = record(pictures[0], pictures[1:], precision="bfloat16")
    assert not torch.equal(expected, half)
    assert (expected - half).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.0, "beta": 0.0}, "must be positive"),
        ({"styles": [], "beta": 0.0, "init": "style"}, "style image"),
        ({"style_blend": [1.0, 2.0]}, "--style-blend"),
        ({"style_blend": [0.0]}, "--style-blend"),
        ({"content_layers": ["relu9_1"]}, "relu9_1.*relu5_3"),
        ({"scales": 9, "styles": [torch.rand(1, 3, 32, 48)], "style_layers": ["relu5_1"]}, "too small"),
        ({"content": torch.rand(2, 3, 40, 56)}, "shape"),
        ({"content": torch.rand(3, 40, 56)}, "shape"),
        ({"optimizer": "sgd"}, "sgd"),
        ({"init": "photo"}, "photo"),
        ({"preserve_color": "hue"}, "hue"),
        ({"pooling": "min"}, "min"),
    ],
)
def test_arguments_that_make_no_sense(pictures, arguments, message):
    with pytest.raises(InputError, match=message):
        stylize(**(SMALL | {"vgg": "vgg16", "content": pictures[0], "styles": pictures[1:]} | arguments))


def test_more_pixels_than_memory_holds(tmp_path, monkeypatch):
    """The machine's memory, and that of a container on it, which may be less."""
    monkeypatch.setattr(gatys, "Path", lambda name: tmp_path / Path(name).name)
    photo, large = (torch.zeros(1, 3, 1, 1).expand(1, 3, height, 2 * height) for height in (1000, 4000))

    def fails(content, styles, message):
        with pytest.raises(InputError, match=message):
            gatys.check_memory(content, styles, torch.float32)

    gatys.check_memory(large, [], torch.float32)  # not Linux: unknown
    (tmp_path / "meminfo").write_text("MemTotal: 99999999 kB\nMemAvailable: 8000000 kB\n")
    (tmp_path / "memory.max").write_text("max\n")
    gatys.check_memory(photo, [], torch.float32)
    fails(large, [], r"memory for 8000 px: about --image-size \d+ ")
    fails(photo, [large], r"memory for 2000 px: about --image-size \d+ ")
    (tmp_path / "memory.max").write_text("4000000000\n")
    fails(photo, [], "2000 px: about --image-size 1511 ")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_gives_the_cpus_picture(pictures):
    expected, _ = record(pictures[0], pictures[1:], init="noise")
    device = common.pick_device("cuda")
    result, _ = record(pictures[0].to(device), [pictures[1].to(device)], init="noise")
    assert result.device.type == "cuda"
    assert (result.cpu() - expected).abs().mean() < 0.02


def test_faces_are_found_in_a_portrait_and_a_group_and_nowhere_else(capsys):
    """The real detector: a soft ellipse on each face."""
    pytest.importorskip("facenet_pytorch")
    portrait = common.load_image(ROOT / "examples" / "portrait.jpg", 256)
    mask = gatys.find_faces(portrait)
    assert mask.shape == (1, 1, 256, 218)
    assert mask[0, 0, [92, 92, 92, 55, 140], [104, 75, 145, 104, 104]].tolist() == [1] * 5  # nose, cheeks, brow, chin
    assert not mask[..., 200:, :].any()
    assert not mask[..., :30].any()
    assert 0.05 < mask.mean() < 0.25
    assert ((mask > 0) & (mask < 1)).float().mean() > 0.02
    group = gatys.find_faces(torch.cat([portrait, portrait.flip(-1)], -1))
    assert group[0, 0, [92, 92], [104, 218 + 113]].tolist() == [1, 1]
    assert gatys.find_faces(common.load_image(ROOT / "examples" / "content.jpg", 256)) is None
    assert "no face found" in capsys.readouterr().err


def test_without_the_detector_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    with pytest.raises(common.InputError, match="pip install --no-deps facenet-pytorch"):
        gatys.find_faces(torch.zeros(1, 3, 32, 32))
