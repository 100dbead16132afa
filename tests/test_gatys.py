"""gatys.py: the losses of a picture, the optimisation, scales, starts, masks, colours, and the arguments of stylize.

The equations stand in test_equations.py, the command line in test_cli.py.
"""

import itertools
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as nnf
from PIL import Image
from torchvision.transforms.functional import gaussian_blur

import common
import gatys
from common import VGG, InputError, gram_matrix
from gatys import Objective, paint, settings, style_loss, stylize

CLOSE = torch.testing.assert_close
TINY = {
    "vgg_weights": "random", "content_layers": ["relu2_2"], "style_layers": ["relu1_1", "relu2_1"], "precision": "float32",
    "num_steps": 2, "lbfgs_iters": 3, "style_weight": 1.0,
}  # fmt: skip
TOP = (torch.arange(40) < 20).float()[:, None].expand(1, 1, 40, 56)
LEFT = (torch.arange(56) < 28).float().expand(1, 1, 40, 56)


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, 3, 40, 56, generator=generator), torch.rand(1, 3, 32, 48, generator=generator) ** 3


def frames(content, styles=(), **options):
    """Return all that `paint` yields: (picture, losses) each."""
    return list(paint(content, styles, settings(content, styles, **(TINY | options))))


def tiny(content, styles=(), **options):
    return stylize(content, styles, **(TINY | options))


# --- Optimisation ---


def optimize(objective, steps, iterations, x=None, **options):
    """Return all that `optimize` yields from x, by default a grey picture of 8×8 px."""
    x = torch.zeros(1, 3, 8, 8) if x is None else x
    args = gatys.parse_args(["a", "b", f"--lbfgs-iters={iterations}", *(f"--{k}={v}" for k, v in options.items())])
    return list(gatys.optimize(x, lambda x: {"total": objective(x)}, steps, args))


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_optimize_finds_the_minimum_and_yields_pictures_with_their_own_losses(optimizer):
    """Beyond [0, 1] too: clamping would cut off the gradient."""
    target, curvature = 1.4 * torch.rand(1, 3, 8, 8) - 0.2, torch.rand(1, 3, 8, 8) + 0.1
    steps = optimize(lambda x: (curvature * (x - target).square()).mean(), 10, 20, optimizer=optimizer, init="noise")
    assert len(steps) == 10
    for x, losses in steps:
        assert losses["total"] == pytest.approx((curvature * (x - target).square()).mean().item(), rel=1e-3, abs=1e-8)
    CLOSE(steps[-1][0], target, rtol=0, atol=0.01)


def test_lbfgs_does_not_depend_on_the_scale_of_the_loss():
    """torch's L-BFGS stands still when a loss is small: its thresholds are absolute."""
    target = torch.rand(1, 3, 8, 8)
    small, plain, large = (optimize(lambda x, s=s: s * (x - target).pow(4).mean(), 3, 4)[-1][0] for s in (1e-8, 1, 1e8))
    CLOSE((small, large), (plain, plain), rtol=0, atol=0.01)
    assert plain.mean() > 0.1


@pytest.mark.parametrize(("optimizer", "iterations"), [("lbfgs", 1), ("lbfgs", 2), ("lbfgs", 5), ("adam", 3)])
def test_the_picture_moves_once_an_evaluation(optimizer, iterations):
    """torch's own limit of evaluations would end short steps early, its thresholds the late ones."""
    seen = []
    optimize(lambda x: seen.append(x.detach()) or (x - 1).pow(4).mean(), 12, iterations, optimizer=optimizer)
    assert len(seen) == 12 * iterations
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(seen))


def test_first_moves_are_as_large_as_they_should_be():
    """Adam's are its learning rate; torch's L-BFGS bounds the sum of all changes, here their mean at every size."""
    for options, move in (({}, 0.02), ({"lr": 0.1}, 0.1)):
        _, (x, _) = optimize(lambda x: -x.mean(), 2, 1, optimizer="adam", **options)
        CLOSE(x, torch.full_like(x, move), rtol=1e-3, atol=0)
    for size, options, move in ((8, {}, 0.01), (64, {}, 0.01), (8, {"lr": 0.5}, 0.005)):
        ((x, _),) = optimize(lambda x: (x - 1).square().mean(), 1, 2, torch.zeros(1, 3, size, size), **options)
        assert x.mean().item() == pytest.approx(move, rel=1e-3)


def test_lbfgs_remembers_20_moves(monkeypatch):
    lbfgs, made = torch.optim.LBFGS, []
    monkeypatch.setattr(torch.optim, "LBFGS", lambda *args, **options: made.append(lbfgs(*args, **options)) or made[0])
    optimize(lambda x: (x - 1).square().mean(), 1, 1)
    assert made[0].param_groups[0]["history_size"] == 20


@pytest.mark.parametrize(
    ("options", "damped"), [({}, True), ({"init": "noise"}, False), ({"optimizer": "adam"}, False)]
)
def test_a_damped_first_move_has_a_ninth_of_the_finest_stripes(options, damped):
    """Half a cycle a pixel, in both directions √½ of one, counts 1/(1 + 4 · ½) in z, and so it does in the gradient."""
    stripes = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 3, 6, 8)
    checks = stripes * torch.tensor([1.0, -1.0]).repeat(3)[:, None]
    for pattern, share in ((stripes, 1 / 9), (checks, (1 + 8**0.5) ** -2)):
        start = 0 * pattern
        _, (x, _) = optimize(lambda x, p=pattern: (x - 1 - p).square().mean(), 2, 1, start, **options)
        assert (x * pattern).mean() / x.mean() == pytest.approx(share if damped else 1.0, rel=1e-3)
    odd = torch.rand(1, 3, 7, 9)
    CLOSE(optimize(lambda x: x.mean(), 1, 1, odd, **options)[0][0], odd)


def test_a_loss_that_becomes_infinite_stops_it():
    seen = []
    args = gatys.parse_args(["a", "b"])
    steps = gatys.optimize(
        torch.zeros(1, 3, 4, 4), lambda x: {"total": x.mean() * (math.inf if len(seen) > 1 else 1)}, 10, args
    )
    with pytest.raises(InputError, match="--lr"):
        seen.extend(x for x, _ in steps if seen.append(x) or x.isfinite().all())
    assert len(seen) >= 2


# --- The losses that paint makes smaller, scales, starts ---


def test_the_first_losses_are_those_of_the_equations(pictures):
    """From VGG's own layers: the rescaling, the margin, the weights and the layers of every term."""
    photo = nnf.pad(pictures[0], [8] * 4, mode="replicate")
    a, b = ((x - common.IMAGENET_MEAN) / common.IMAGENET_STD for x in (photo, pictures[1]))
    style = 0
    for i, layer in enumerate(VGG(["relu2_2"], "vgg19", "random", "avg").features):  # conv1_1, 1_2, pool, 2_1, 2_2
        a, b = layer(a), layer(b)
        if i in (1, 6):
            units = [(f / ((a.mean() + b.mean()) / 2))[0].flatten(1) for f in (a, b)]
            G, A = (f @ f.T / f.numel() for f in units)
            style += {1: 0.3, 6: 2.0}[i] * ((G - A) ** 2).sum() / 4
    down, right = photo[..., 1:, :] - photo[..., :-1, :], photo[..., 1:] - photo[..., :-1]
    variation = (down**2).mean() + (right**2).mean()
    options = {"content_weight": 3, "style_weight": 7, "tv_weight": 2, "lbfgs_iters": 1, "scales": 1}
    options["style_layer_weights"] = [0.3, 2]
    _, losses = frames(pictures[0], pictures[1:], init="content", **options)[0]
    assert losses["content"] == pytest.approx(0, abs=1e-6)  # it starts from the photo
    assert losses["style"] == pytest.approx(style.item(), rel=1e-3)
    assert losses["total"] == pytest.approx((7 * style + 2 * variation).item(), rel=1e-3)
    assert list(losses) == ["total", "content", "style", "variation"]
    assert frames(pictures[0], pictures[1:], init="noise", **options)[0][1]["content"] > 0.01


@pytest.mark.parametrize(("optimizer", "size"), [("lbfgs", (37, 53)), ("adam", (64, 16))])
def test_the_loss_falls_and_every_size_comes_out_as_it_went_in(pictures, optimizer, size):
    content, styles = nnf.interpolate(pictures[0], size), [torch.rand(1, 3, 51, 17) ** 3]
    options = {"optimizer": optimizer, "num_steps": 4, "init": "content", "content_layers": ["relu4_2"]}
    (_, first), *_, (_, last) = frames(content, styles, **options)
    assert last["total"] < 0.7 * first["total"]
    result = tiny(content, styles, scales=2, **options)
    assert result.shape == content.shape
    assert 0 <= result.min() < result.max() <= 1


def test_a_coarse_scale_paints_small_pictures_and_a_fine_one_goes_on_from_there(pictures):
    small = [gatys.resize(image, 0.5) for image in pictures]
    options = {"num_steps": 1, "lbfgs_iters": 1}
    coarse = frames(small[0], small[1:], **options | {"num_steps": 2}, init="content")
    both = frames(pictures[0], pictures[1:], **options, scales=2, init="content")
    assert [picture.shape[-1] for picture, _ in both] == [28, 28, 56]  # a coarser scale has twice as many steps
    for (a, losses), (b, others) in zip(coarse, both, strict=False):
        CLOSE(a, b)
        assert losses == pytest.approx(others)
    last = frames(pictures[0], pictures[1:], **options, scales=2, init="noise")  # with one evaluation at full size
    expected = nnf.interpolate(last[1][0], (40, 56), mode="bicubic").clamp(0, 1)
    CLOSE(last[2][0], expected, rtol=0, atol=1e-4)


def test_resizing_averages_and_sizes_halve_down_to_192_px():
    noise, args = torch.rand(1, 3, 128, 128), gatys.parse_args(["a", "b"])
    assert (gatys.resize(noise, 0.25) - nnf.avg_pool2d(noise, 4)).abs().mean() < 0.05
    for size, scales in ((191, 1), (192, 1), (383, 1), (384, 2), (512, 2), (768, 3), (1024, 3)):
        planned = gatys.scale_steps(args, torch.zeros(1, 3, size // 2, size))
        assert planned == [(0.25, 64), (0.5, 32), (1, 16)][3 - scales :]


def test_a_term_without_weight_is_not_computed(pictures):
    """Not even the network's layers that it would need, which are too deep for such a small picture."""
    texture = {"content_weight": 0, "content_layers": ["relu5_1"], "init": "noise", "lbfgs_iters": 1}
    content = pictures[0][..., :3, :3]
    first, second, other = (
        frames(x, pictures[1:], **texture, seed=s) for x, s in ((content, 5), (1 - content, 5), (content, 6))
    )
    assert torch.equal(first[-1][0], second[-1][0])  # the photo is not looked at
    assert not torch.equal(first[-1][0], other[-1][0])
    assert first[-1][1]["content"] == 0
    inversion = {"style_weight": 0, "style_layers": ["relu5_1"], "content_layers": ["relu1_1"], "init": "noise"}
    smooth = gaussian_blur(pictures[0], 9)
    steps = frames(smooth, **inversion, num_steps=10)
    assert steps[0][1]["style"] == 0
    noise = gatys.start(smooth, [], settings(smooth, [], **(TINY | inversion)))
    assert (steps[-1][0] - smooth).square().mean() < 0.1 * (noise - smooth).square().mean()


def test_what_it_starts_from(pictures):
    content, style = pictures

    def start(init, styles, **options):
        return gatys.start(content, styles, settings(content, styles or [style], init=init, **options))

    assert torch.equal(start("content", [style]), content)
    assert torch.equal(start("recolored", []), content)
    recolored = gatys.match_color(content, [style]).clamp(0, 1)
    CLOSE(start("recolored", [style]), recolored)
    CLOSE(start("recolored", [1 - style, style], style_blend=[0, 3]), recolored)
    noise = start("noise", [style])
    assert noise.shape == content.shape
    assert torch.equal(noise, start("noise", []))
    assert 0 <= noise.min() < noise.max() <= 1
    assert 0.27 < noise.std() < 0.31  # uniform: 0.289
    ramp = torch.linspace(0, 1, 90).expand(1, 3, 30, 90)  # covers 40×56 at 40×120, so that the middle of it stays
    from_style = start("style", [ramp, 1 - ramp])
    assert from_style.shape == content.shape
    CLOSE(from_style[0, 0, 20], torch.linspace(32 / 120, 88 / 120, 56), rtol=0, atol=0.02)


# --- Masks and blends ---


def style_term(x, styles, **options):
    """Return the style loss of x, which is also the photo, without a margin, and the Gram matrix of a mask's part."""
    args = settings(x, styles, **(TINY | {"style_layers": ["relu1_1"], "content_weight": 0} | options))
    vgg = VGG(["relu1_1", "relu3_1", "relu4_2"], "vgg19", "random")
    objective = Objective(vgg, nnf.pad(x, [8] * 4, mode="replicate"), styles, args)
    return objective(nnf.pad(x, [8] * 4, mode="replicate"))["style"].item()


def test_masks_say_where_each_style_goes_and_how_much_it_counts(pictures):
    x, a, b = pictures[0], pictures[1], 1 - pictures[1]
    vgg = VGG(["relu1_1"], "vgg19", "random")
    F, A, B = (vgg(image)["relu1_1"] for image in (nnf.pad(x, [8] * 4, mode="replicate"), a, b))

    def E(T, S):
        return style_loss(gram_matrix(F, None if T is None else nnf.pad(T, [8] * 4, mode="replicate")), S).item()

    A, B, grey = gram_matrix(A), gram_matrix(B), 0 * LEFT + 0.5
    almost = {"rel": 2e-3}  # the margin repeats the masks' borders
    assert style_term(x, [a]) == pytest.approx(E(None, A))
    assert style_term(x, [a], style_masks=[grey + 0.5]) == pytest.approx(E(None, A))
    assert style_term(x, [a, b], style_blend=[6, 2]) == pytest.approx(E(None, 0.75 * A + 0.25 * B))
    assert style_term(x, [a, b]) == pytest.approx(E(None, 0.5 * A + 0.5 * B))
    halves = 0.5 * E(LEFT, A) + 0.5 * E(1 - LEFT, B)
    assert style_term(x, [a, b], style_masks=[LEFT, 1 - LEFT]) == pytest.approx(halves, **almost)
    assert style_term(x, [a, b], style_masks=[LEFT]) == pytest.approx(halves, **almost)  # the last gets the rest
    unequal = 0.75 * E(LEFT, A) + 0.25 * E(1 - LEFT, B)
    assert style_term(x, [a, b], style_masks=[LEFT], style_blend=[3, 1]) == pytest.approx(unequal, **almost)
    assert style_term(x, [a, a], style_masks=[grey]) == pytest.approx(E(None, A))  # grey does not weaken a style
    assert style_term(x, [a, a], style_masks=[grey + 0.5] * 2) == pytest.approx(E(None, A))  # nor do two add up
    assert style_term(x, [a], style_masks=[LEFT]) == pytest.approx(0.5 * E(LEFT, A), **almost)  # half the picture
    three = {"style_masks": [LEFT, LEFT], "style_blend": [1, 1, 2]}
    expected = 0.25 * E(LEFT, A) + 0.25 * E(LEFT, B) + 0.5 * E(1 - LEFT, A)
    assert style_term(x, [a, b, a], **three) == pytest.approx(expected, **almost)


def test_the_protected_part_has_no_style(pictures):
    x, a = pictures
    F, A = (
        VGG(["relu1_1"], "vgg19", "random")(image)["relu1_1"] for image in (nnf.pad(x, [8] * 4, mode="replicate"), a)
    )
    rest = nnf.pad(1 - TOP, [8] * 4, mode="replicate")
    E = 0.5 * style_loss(gram_matrix(F, rest), gram_matrix(A)).item()
    for masks in ({}, {"style_masks": [torch.ones(1, 1, 2, 2)]}):
        assert style_term(x, [a], protect=TOP, **masks) == pytest.approx(E, rel=2e-3)


def test_a_painting_mask_leaves_the_rest_of_the_painting_out(pictures):
    half = (torch.arange(96) < 48).float().expand(1, 1, 32, 96)
    terms = []
    for rest in (torch.zeros(1, 3, 32, 48), torch.ones(1, 3, 32, 48)):
        painting = torch.cat([pictures[1], rest], 3)
        terms += [style_term(pictures[0], [painting], **masks) for masks in ({"painting_masks": [half]}, {})]
    assert abs(terms[0] - terms[2]) < 0.2 * abs(terms[1] - terms[3])  # borders see both


def test_a_mask_is_scaled_smoothly_and_goes_on_into_the_margin():
    mask = torch.rand(1, 1, 32, 48)
    small = gatys.resize_mask(mask, torch.zeros(1, 3, 8, 12))
    assert (small - nnf.avg_pool2d(mask, 4)).abs().mean() < 0.1
    assert torch.equal(gatys.resize_mask(mask, torch.zeros(1, 3, 24, 28), 8), nnf.pad(small, [8] * 4, mode="replicate"))


def test_the_protected_part_starts_from_the_photo_and_keeps_it(pictures):
    photo, options = gaussian_blur(pictures[0], 9), {"style_weight": 30, "num_steps": 4, "init": "noise"}
    plain, kept = (
        tiny(photo, pictures[1:], scales=2, **options),
        frames(photo, pictures[1:], scales=2, protect=TOP, **options),
    )
    change, changed = ((image - photo).abs() for image in (plain, kept[-1][0]))
    assert changed[..., :16, :].mean() < 0.1 * change[..., :16, :].mean()
    assert changed[..., 24:, :].mean() > 0.5 * change[..., 24:, :].mean()
    losses = kept[-1][1]
    assert losses["protected"] > 0
    total = losses["content"] + 30 * losses["style"] + 30 * losses["protected"]
    assert losses["total"] == pytest.approx(total, rel=1e-4)
    (start, _), *_ = frames(photo, pictures[1:], **options | {"lbfgs_iters": 1}, protect=TOP)
    CLOSE(start[..., :20, :], photo[..., :20, :])
    assert (start - photo)[..., 20:, :].abs().mean() > 0.1
    everything = tiny(photo, pictures[1:], protect=torch.ones(1, 1, 1, 1), **options)
    CLOSE(everything, photo, rtol=0, atol=0.01)


def test_masks_of_all_kinds(pictures):
    """A single pixel, soft edges, black and other sizes are masks as well."""
    pixel = torch.zeros(1, 1, 40, 56)
    pixel[..., 20, 28] = 1
    styles = [pictures[1], 1 - pictures[1]]
    for mask in (pixel, torch.linspace(0, 1, 200).expand(1, 1, 7, 200), 1 - pixel, 0 * pixel):
        for where in ({"protect": mask, "style_masks": [mask, 1 - mask]}, {"style_masks": [mask], "style_weight": 0}):
            for picture, losses in frames(pictures[0], styles, **where, painting_masks=[mask] * 2, num_steps=1):
                assert picture.isfinite().all()
                assert math.isfinite(losses["total"])


# --- Colours ---


def test_matched_colors_of_grey_and_flat_pictures(pictures):
    grey = torch.rand(1, 1, 9, 9).expand(1, 3, 9, 9)
    flat, colorful = torch.full((1, 3, 9, 9), 0.3), torch.rand(1, 3, 9, 9)
    for image, target in ((grey, colorful), (flat, colorful), (colorful, flat), (flat, flat), (grey, flat)):
        matched = gatys.match_color(image, [target])
        CLOSE(matched.mean((2, 3)), target.mean((2, 3)), rtol=0, atol=1e-5)
    noisy = grey + 0.002 * torch.randn(1, 3, 9, 9)  # as of JPEG: it must not become coloured noise
    assert (gatys.match_color(noisy, [colorful]) - gatys.match_color(grey, [colorful])).abs().max() < 0.25
    assert gatys.match_luminance(flat, pictures[0]).isfinite().all()
    assert gatys.match_luminance(pictures[1], (pictures[0] > 0.4).float()).max() == 1  # not more


def test_preserved_colors_are_the_photos(pictures):
    content, styles = pictures[0] * 0.4 + 0.3, [pictures[1]]  # so that no color leaves the range
    picture = tiny(content, styles, preserve_color="luminance", scales=2)
    to_iq = torch.tensor([[0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    a, b = (torch.einsum("dc,chw->dhw", to_iq, image[0]) for image in (picture, content))
    assert (a - b).abs().mean() < 0.01
    grey = common.luminance(content).expand_as(content)
    painted = tiny(grey, [gatys.match_luminance(styles[0], content)], scales=2)
    CLOSE(picture, common.keep_color(painted, content), rtol=0, atol=1e-4)
    recolored = gatys.match_color(styles[0], [content]).clamp(0, 1)
    CLOSE(tiny(content, styles, preserve_color="histogram"), tiny(content, [recolored]))


# --- Arguments of stylize, and files of masks ---


def test_defaults():
    """The paper's, or the README's where it departs from the paper."""
    args = vars(gatys.parse_args(["a", "b"]))
    assert args == args | {
        "content_weight": 1.0, "style_weight": 30.0, "tv_weight": 0.0, "content_layers": ["relu4_2"], "num_steps": 16,
        "style_layers": ["relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"], "style_blend": [1.0], "lbfgs_iters": 2,
        "scales": None, "optimizer": "lbfgs", "lr": 1.0, "init": "recolored", "preserve_color": None, "protect": None,
        "protect_weight": 30.0, "pooling": "avg", "vgg": "vgg19", "vgg_weights": "auto", "seed": 0, "precision": "auto",
        "style_layer_weights": list(gatys.STYLE_LAYER_WEIGHTS), "image_size": 512, "style_scale": 1.0,
    }  # fmt: skip
    assert gatys.PROTECTED_LAYERS == ("relu1_1", "relu3_1", "relu4_2")
    assert gatys.parse_args(["a", "b", "--style-layers", "relu1_1", "relu2_1"]).style_layer_weights == [0.5, 0.5]
    assert vars(settings(torch.rand(1, 3, 9, 9), [torch.rand(1, 3, 9, 9)], protect=None, lr=None)) == args | {
        "content": Path("content"), "styles": [Path("style")], "output": Path("content_style.png")
    }  # fmt: skip


def test_other_tensors_and_precisions_give_nearly_the_same_picture(pictures):
    expected = tiny(*pictures[:1], pictures[1:])
    with torch.no_grad():
        result = tiny(pictures[0].double().requires_grad_(), [pictures[1].to(memory_format=torch.channels_last)])
    CLOSE(result, expected, rtol=0, atol=1e-3)
    half = tiny(*pictures[:1], pictures[1:], precision="bfloat16")
    assert not torch.equal(expected, half)
    assert (expected - half).abs().mean() < 0.02


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_gives_the_cpus_picture(pictures):
    options = {"init": "noise", "style_masks": [LEFT], "protect": TOP, "scales": 2}
    expected, result = (tiny(pictures[0].to(d), [pictures[1].to(d)], **options) for d in ("cpu", "cuda"))
    assert result.device.type == "cuda"
    assert (result.cpu() - expected).abs().mean() < 0.02


MISTAKES = [
    ({"content_weight": 0, "style_weight": 0}, "--content-weight or --style-weight"),
    ({"content_weight": -1}, "--content-weight"),
    ({"styles": [], "style_weight": 0, "init": "style"}, "style image"),
    ({"style_blend": [1.0, 2.0]}, "--style-blend"),
    ({"style_blend": [0.0]}, "--style-blend"),
    ({"style_layer_weights": [1.0]}, "--style-layer-weights"),
    ({"content_layers": ["relu9_1"]}, "relu9_1.*relu5_3"),
    ({"scales": 9, "style_layers": ["relu5_1"]}, "too small"),
    ({"optimizer": "sgd"}, "sgd"),
    ({"pooling": "min"}, "min"),
    ({"alpha": 3}, "unknown option alpha"),
    ({"image_size": 300}, "unknown option image_size"),
    ({"save_gif": True}, "unknown option save_gif"),
    ({"style_masks": [LEFT] * 3}, "--style-masks"),
    ({"painting_masks": [LEFT] * 2}, "--painting-masks"),
    ({"protect": LEFT[0]}, r"tensor \(1, 1, H, W\)"),
    ({"content": torch.rand(2, 3, 40, 56)}, r"tensor \(1, 3, H, W\)"),
    ({"content": 255 * torch.rand(1, 3, 40, 56)}, "from 0 to 1"),
    ({"content": torch.full((1, 3, 40, 56), math.nan)}, "from 0 to 1"),
    ({"content": torch.zeros(1, 3, 40, 56).byte()}, "uint8"),
    ({"content": Image.new("RGB", (40, 56))}, "Image"),
    ({"styles": torch.rand(1, 3, 40, 56)}, r"\(3, 40, 56\)"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_arguments_that_make_no_sense_are_told_in_one_line(pictures, arguments, message):
    with pytest.raises(InputError, match=message) as error:
        tiny(**{"vgg": "vgg16", "content": pictures[0], "styles": pictures[1:]} | arguments)
    assert "\n" not in str(error.value)
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        tiny(pictures[0], pictures[1:])


def test_a_mask_is_white_where_it_is_opaque_and_white(capsys):
    """Transparent is black, whatever colour lies under it; a mask that is the same everywhere is a mistake."""
    drawn = Image.new("RGBA", (8, 4), (255, 255, 255, 0))
    drawn.paste((255, 255, 255, 255), (0, 0, 4, 4))
    drawn.save("drawn.png")
    expected = (torch.arange(8) < 4).float().expand(1, 1, 4, 8)
    CLOSE(gatys.load_mask(Path("drawn.png")), expected)
    assert not capsys.readouterr().err
    Image.new("L", (8, 4), 255).save("white.png")
    CLOSE(gatys.load_mask(Path("white.png")), torch.ones(1, 1, 4, 8))
    assert "warning: the mask white.png" in capsys.readouterr().err


def test_faces_are_protected(monkeypatch, capsys):
    """A soft ellipse on each box that the detector finds; none is said, and the mask is black then."""
    photo, found = torch.rand(1, 3, 100, 120), torch.tensor([[20.0, 30, 50, 70], [80, 30, 110, 70]]).numpy()
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    with pytest.raises(InputError, match="pip install --no-deps facenet-pytorch"):
        gatys.find_faces(photo)
    for boxes in (found, None):
        detector = SimpleNamespace(detect=lambda image, boxes=boxes: (boxes, None))
        monkeypatch.setitem(sys.modules, "facenet_pytorch", SimpleNamespace(MTCNN=lambda keep_all, d=detector: d))
        mask = gatys.find_faces(photo)
        assert mask.shape == (1, 1, 100, 120)
        assert mask[0, 0, [50, 50, 30, 50], [35, 95, 35, 20]].tolist() == [float(boxes is not None)] * 4
        assert not mask[0, 0, [50, 50, 15, 85], [65, 4, 35, 35]].any()
    assert "no face found" in capsys.readouterr().err
