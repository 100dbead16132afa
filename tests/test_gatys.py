"""gatys.py: the optimisation, scales, starts, masks, colours, tiles; its command line.

Its equations are in test_equations.py.
"""

import contextlib
import functools
import itertools
import math
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as nnf
from conftest import CONTENT, SMALL, STYLE, files, provenance, run, save_noise, tiny
from PIL import Image
from torchvision.transforms.functional import gaussian_blur, to_pil_image

import common
import gatys
from common import VGG, InputError, gram_matrix, load_frames, load_image, luminance, rescale, resize
from gatys import parse_args, settings

close = torch.testing.assert_close
TOP = (torch.arange(40) < 20).float()[:, None].expand(1, 1, 40, 56)
LEFT = (torch.arange(56) < 28).float().expand(1, 1, 40, 56)


@pytest.fixture(autouse=True)
def pictures():
    torch.manual_seed(0)
    return torch.rand(1, 3, 40, 56), torch.rand(1, 3, 32, 48) ** 3


def small_settings(content, styles=(), **options):
    return settings(content, styles, **(SMALL | options))


def paint(content, styles=(), **options):
    """Return all that `paint` yields: (picture, losses) each."""
    args = small_settings(content, styles, **options)
    photo, *paintings = (image[:, :3] for image in (content, *styles))
    return list(gatys.paint(photo, paintings, gatys.network(photo.device, args), args))


def objective_of(vgg, photo, styles, **options):
    """Make the objective of a photo, which has a margin, and of paintings that may have α."""
    args = settings(photo, styles, **options)
    paintings = [style[:, :3] for style in styles]
    return gatys.make_objective(vgg, photo, paintings, args.style_layers, args)


def with_alpha(image, alpha):
    return torch.cat([image, alpha.expand(1, 1, *image.shape[-2:])], dim=1)


def widen(image):
    """Repeat the borders of an image or a mask in a margin."""
    return nnf.pad(image, [8] * 4, mode="replicate")


# --- The optimisation -----------------------------------------------------------------------------


def optimize(objective, steps, iterations, x=None, **options):
    """Return all that `optimize` yields from x, by default a black picture of 8×8 px."""
    x = torch.zeros(1, 3, 8, 8) if x is None else x
    flags = [f"--{name}={value}" for name, value in options.items()]
    args = parse_args(["a", "b", f"--lbfgs-iters={iterations}", *flags])
    return list(gatys.optimize(x, lambda x: {"total": objective(x)}, steps, args))


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_optimize_finds_the_minimum_and_yields_pictures_with_their_own_losses(optimizer):
    """Beyond [0, 1] too: clamping would cut off the gradient."""
    target = 1.4 * torch.rand(1, 3, 8, 8) - 0.2
    curvature = torch.rand(1, 3, 8, 8) + 0.1

    def loss(x):
        return (curvature * (x - target).square()).mean()

    steps = optimize(loss, 10, 20, optimizer=optimizer, init="noise")
    assert len(steps) == 10
    for x, losses in steps:
        assert losses["total"] == pytest.approx(loss(x).item(), rel=1e-3, abs=1e-8)
    close(steps[-1][0], target, rtol=0, atol=0.01)


def test_lbfgs_does_not_depend_on_the_scale_of_the_loss():
    """torch's L-BFGS stands still when a loss is small: its thresholds are absolute."""
    target = torch.rand(1, 3, 8, 8)
    found = []
    for scale in (1e-8, 1, 1e8):
        steps = optimize(lambda x, s=scale: s * (x - target).pow(4).mean(), 3, 4)
        found.append(steps[-1][0])
    small, plain, large = found
    close((small, large), (plain, plain), rtol=0, atol=0.01)
    assert plain.mean() > 0.1
    curvature = 10 ** (3 * torch.rand(1, 3, 8, 8) - 3)
    steps = optimize(lambda x: (curvature * (x - target).pow(4)).mean(), 12, 10, init="noise")
    assert steps[-1][1]["total"] < 1e-15  # nor does it stop where the loss has become small


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_the_picture_moves_once_an_evaluation(optimizer):
    """torch's limit of evaluations would end short steps early, its thresholds the late ones."""
    target = torch.rand(1, 3, 8, 8) + 1
    for iterations in (1, 2, 5):
        seen = []

        def loss(x, seen=seen):
            seen.append(tuple(x.flatten().tolist()))
            return (x - target).pow(4).mean()

        optimize(loss, 12, iterations, optimizer=optimizer)
        assert len(seen) == 12 * iterations == len(set(seen))


def test_first_moves_are_as_large_as_they_should_be():
    """Adam's are its learning rate; that of L-BFGS is 1/100 of white on average, at any size."""
    for options, move in (({}, 0.02), ({"lr": 0.1}, 0.1)):
        _, (x, _) = optimize(lambda x: -x.mean(), 2, 1, optimizer="adam", **options)
        close(x, torch.full_like(x, move), rtol=1e-3, atol=0)
    for size, options, move in ((8, {}, 0.01), (64, {}, 0.01), (8, {"lr": 0.5}, 0.005)):
        black = torch.zeros(1, 3, size, size)
        ((x, _),) = optimize(lambda x: (x - 1).square().mean(), 1, 2, black, **options)
        assert x.mean().item() == pytest.approx(move, rel=1e-3)


@pytest.mark.parametrize("lr", [1, 0.5])
def test_moves_are_bounded_while_no_curvature_is_known(lr):
    """A linear loss has none: after the first move, each is 1/10 of white times the rate.

    torch's L-BFGS by itself bounds the first move alone, and takes the raw gradient next.
    """
    for scale in (1e-6, 1, 1e6):
        steps = optimize(lambda x, s=scale: -s * x.mean(), 2, 2, lr=lr)
        means = [x.mean().item() for x, _ in steps]
        assert means == pytest.approx([0.01 * lr, 0.21 * lr], rel=1e-3)


def test_lbfgs_remembers_a_bounded_move_as_it_was():
    """From its next gradient, torch takes the curvature along the step times the direction."""
    z = torch.zeros(1, 1, 1, 4, requires_grad=True)
    optimizer = gatys.make_optimizer(z, 1, parse_args(["a", "b"]))

    def closure():
        optimizer.zero_grad()
        (z.square() / 2 - z).sum().backward()
        return z.sum()

    optimizer.step(closure)  # moves each value by 1/4
    before = z.detach().clone()
    gatys.bound_move(optimizer, z, torch.zeros_like(z), most=0.1)
    close(z.detach(), before * 0.4)
    assert optimizer.state[z]["t"] == pytest.approx(0.4 * 0.25)
    optimizer.step(closure)
    close(z.detach(), torch.ones_like(z))  # with the right curvature, it is found at once


def test_tiles_save_memory_in_the_optimiser_too():
    """Each step that L-BFGS remembers takes two pictures."""
    z = torch.zeros(1, 3, 8, 8, requires_grad=True)
    for flags, steps in (([], 20), (["--tile-size", "512"], 5)):
        optimizer = gatys.make_optimizer(z, 1, parse_args(["a", "b", *flags]))
        assert optimizer.param_groups[0]["history_size"] == steps


def test_a_flat_loss_leaves_the_picture_alone():
    for optimizer in ("lbfgs", "adam"):
        (x, losses), *_ = optimize(lambda x: 0 * x.sum() + 2, 3, 2, optimizer=optimizer)
        assert not x.any() and losses == {"total": 2}


FLAGS = [({}, True), ({"init": "noise"}, False), ({"optimizer": "adam"}, False)]


@pytest.mark.parametrize(("flags", "damped"), FLAGS)
def test_a_damped_first_move_has_little_of_the_finest_stripes(flags, damped):
    """Half a cycle a pixel counts 1/(1 + 5 · ½) in z, and again in the gradient.

    In both directions it is √½ of a cycle.
    """
    stripes = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 3, 6, 8)
    checks = stripes * torch.tensor([1.0, -1.0]).repeat(3)[:, None]
    for pattern, share in ((stripes, 3.5**-2), (checks, (1 + 12.5**0.5) ** -2)):
        _, (x, _) = optimize(
            lambda x, p=pattern: (x - 1 - p).square().mean(), 2, 1, 0 * pattern, **flags
        )
        ratio = (x * pattern).mean() / x.mean()
        assert ratio == pytest.approx(share if damped else 1.0, rel=1e-3)
    odd = torch.rand(1, 3, 7, 9)
    close(optimize(lambda x: x.mean(), 1, 1, odd, **flags)[0][0], odd)


@functools.cache
def photos():
    """Make a small photo of each kind, (1, 3, 32, 48)."""
    color = load_image(CONTENT, 48)
    grey = luminance(color).expand_as(color)
    made = {"color": color, "grey": grey, "drawing": (grey > grey.mean()).float()}
    made["sepia"] = grey * torch.tensor([1.0, 0.85, 0.65]).view(1, 3, 1, 1)
    made["ramp"] = torch.linspace(0, 1, 48).expand_as(color)
    made["white"] = torch.ones_like(color)
    made["noise"] = torch.rand(color.shape, generator=torch.Generator().manual_seed(0))
    return made


@functools.cache
def network(weights, precision):
    layers = ["relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu4_2", "relu5_1"]
    return VGG(layers, "vgg19", weights, "avg", getattr(torch, precision))


KINDS = ["color", "grey", "sepia", "drawing", "ramp", "white", "noise"]
CASES = [(kind, weights, "float32", {}) for kind in KINDS for weights in ("random", "auto")]
CASES += [(kind, "auto", "bfloat16", {}) for kind in ("grey", "drawing")]
CASES += [("grey", "auto", "float32", {"style_weight": 1000.0})]
CASES += [("ramp", "auto", "float32", {"init": "noise"})]


@pytest.mark.parametrize(("kind", "weights", "precision", "options"), CASES)
def test_every_kind_of_photo_can_be_painted(kind, weights, precision, options):
    """The losses fall, and no move goes far; torch's L-BFGS alone makes some of 1e8."""
    photo = photos()[kind]
    if precision == "bfloat16":  # slow on most CPUs
        photo = resize(photo, 0.5)
    for painting in (load_image(STYLE, 48), photos()["drawing"].flip(3)):
        args = settings(photo, [painting], num_steps=6, lbfgs_iters=1, **options)
        frames = gatys.paint(photo, [painting], network(weights, precision), args)
        first, *others = (losses["total"] for _, losses in frames)
        assert min(others) < 0.96 * first
        assert max(others) < 1e6 * first


def test_losses_that_are_not_finite_end_the_run():
    with pytest.raises(InputError, match=r"step 2: .*--lr"):
        optimize(lambda x: x.sum() / (0 if x.any() else 1), 3, 1)
    for broken in ("total", "style"):

        def objective(x, broken=broken):
            losses = {"total": x.sum(), "style": x.sum(), "content": x.sum()}
            return losses | {broken: x.sum() / 0}

        with pytest.raises(InputError, match="step 1"):
            next(gatys.optimize(torch.ones(1, 3, 8, 8), objective, 3, parse_args(["a", "b"])))


# --- Scales ---------------------------------------------------------------------------------------


def plan(side, other=None, **options):
    """Plan the scales of a picture of `side` px; return them and their longer sides."""
    photo = torch.zeros(1, 3, 1, 1)
    args = settings(photo, [photo], **options)
    scales = gatys.plan_scales(photo.expand(1, 3, other or side, side), args)
    return scales, [scale.factor * max(side, other or side) for scale in scales]


def test_scales_go_from_128_px_to_the_full_size_in_as_few_equal_ratios_up_to_2_as_can_be():
    """A smaller picture has one scale. Steps: all at the first scale, a third, then a seventh.

    relu5_1 counts at all scales but the last, unless that is the only one.
    """
    photo = torch.zeros(1, 3, 1, 1)
    args = parse_args(["a", "b"])
    layers = ["relu1_1", "relu2_1", "relu3_1", "relu4_1"]
    for side in range(1, 4097):
        upright = photo.expand(1, 3, side, max(1, side // 2))
        scales = gatys.plan_scales(upright, args)
        sides = [scale.factor * side for scale in scales]
        assert sides[0] == pytest.approx(min(128, side))
        assert scales[-1].factor == 1
        ratios = [b / a for a, b in itertools.pairwise(sides)]
        assert len(scales) == 1 + math.ceil(math.log2(max(1, side / 128)))
        assert ratios == pytest.approx([ratios[0]] * len(ratios) if ratios else [])
        assert max(ratios, default=1) < 2 + 1e-9
        assert [scale.steps for scale in scales] == [50, 17, 7, 7, 7, 7][: len(scales)]
        used = [scale.style_layers for scale in scales]
        assert used[:-1] == [[*layers, "relu5_1"]] * (len(used) - 1)
        assert used[-1] == (layers if len(used) > 1 else [*layers, "relu5_1"])
    for command in (["a", "b"], ["a", "b", "--scales", "3"]):  # upright or not
        args = parse_args(command)
        tall, wide = (photo.expand(1, 3, *sides) for sides in ((600, 20), (20, 600)))
        assert gatys.plan_scales(tall, args) == gatys.plan_scales(wide, args)


def test_the_number_of_scales_and_of_steps_can_be_chosen():
    for side, count, expected in (
        (512, 1, [512]),
        (512, 2, [128, 512]),
        (512, 3, [128, 256, 512]),
        (2048, 3, [128, 512, 2048]),
        (128, 2, [64, 128]),
        (64, 3, [16, 32, 64]),
    ):
        _, sides = plan(side, scales=count)
        assert sides == pytest.approx(expected)
    for steps, expected in ((1, [1, 1, 1, 1]), (7, [7, 2, 1, 1]), (200, [200, 67, 29, 29])):
        scales, _ = plan(1024, num_steps=steps)
        assert [scale.steps for scale in scales] == expected


def test_layers_of_the_fifth_block_count_at_all_scales_but_the_last():
    """But where there are no others: an objective needs some."""
    for layers, last in (
        (["relu5_3", "relu1_2", "relu5_1"], ["relu1_2"]),
        (["relu5_1"], ["relu5_1"]),
        (["relu4_4"], ["relu4_4"]),
    ):
        scales, _ = plan(256, style_layers=layers)
        assert [scale.style_layers for scale in scales] == [layers, last]
    single, _ = plan(512, scales=1)
    assert single[0].style_layers[-1] == "relu5_1"


def test_no_painting_gets_too_small_for_the_pooling():
    painting = torch.rand(1, 3, 20, 400)
    assert gatys.shrink(painting, 0.25).shape == (1, 3, 16, 320)
    assert gatys.shrink(painting, 0.9).shape == (1, 3, 18, 360)


def test_a_picture_to_continue_from_is_painted_at_the_last_scale_alone():
    """Unless --scales is given: coarser ones would lose its details."""
    init = torch.rand(1, 3, 9, 9)
    full, _ = plan(512)
    assert plan(512, init=init) == (full[-1:], [512])
    assert len(plan(512, init=init, scales=3)[0]) == 3
    assert plan(100, init=init)[0][0].steps == 50


def test_each_scale_has_the_layers_that_were_planned(monkeypatch, pictures):
    """VGG is not computed farther than they need."""
    seen = []
    make, forward = gatys.make_objective, VGG.forward

    def note(vgg, photo, paintings, layers, args):
        seen.append((photo.shape[-1] - 16, paintings[0].shape[-1], layers, set()))
        return make(vgg, photo, paintings, layers, args)

    def run(vgg, x, layers=None):
        if seen:
            seen[-1][3].update(layers)
        return forward(vgg, x, layers)

    monkeypatch.setattr(gatys, "make_objective", note)
    monkeypatch.setattr(VGG, "forward", run)
    paint(pictures[0], pictures[1:], style_layers=["relu1_1", "relu3_1", "relu5_1"], scales=2)
    coarse, fine = seen
    assert coarse == (28, 24, ["relu1_1", "relu3_1", "relu5_1"], {"relu2_2", *coarse[2]})
    assert fine == (56, 48, ["relu1_1", "relu3_1"], {"relu2_2", *fine[2]})


def test_the_first_losses_are_those_of_the_objective(pictures):
    """In units of both pictures' activations, and with a margin around the photo."""
    photo, style = pictures
    layers = ["relu1_1", "relu2_1", "relu2_2"]
    vgg = rescale(VGG(layers, "vgg19", "random", "avg"), [widen(photo), style])
    expected = objective_of(vgg, widen(photo), [style], **SMALL)(widen(photo))
    _, losses = paint(photo, [style], init="content", lbfgs_iters=1)[0]
    expected = {name: value.item() for name, value in expected.items()}
    assert losses == pytest.approx(expected, rel=1e-3)


def test_the_units_are_those_of_pictures_of_1024_px_at_most(monkeypatch, pictures):
    """Larger ones would need more memory than painting in tiles does. VGG takes 16 px or more."""
    seen = []
    monkeypatch.setattr(gatys, "rescale", lambda vgg, images: seen.append(images))
    photo, style, thin = (torch.rand(1, 3, *size) for size in ((48, 2048), (18, 24), (8, 2048)))
    gatys.normalize(None, photo, [style, thin], settings(photo, [style, thin]))
    assert [image.shape[2:] for image in seen[0]] == [(18, 24), (16, 4096), (24, 1024)]


def test_a_coarse_scale_paints_small_pictures_and_a_fine_one_goes_on_from_there(
    monkeypatch, pictures
):
    style = pictures[1]
    photo = torch.lerp(pictures[0], LEFT, 0.95)  # an edge, at which bicubic scaling leaves [0, 1]
    small = [resize(image, 0.5) for image in (photo, style)]
    options = {"lbfgs_iters": 1, "init": "content", "num_steps": 2}
    coarse = paint(small[0], small[1:], **options)
    starts, optimize = [], gatys.optimize

    def note(x, *arguments):
        starts.append(x)
        return optimize(x, *arguments)

    monkeypatch.setattr(gatys, "optimize", note)
    both = paint(photo, [style], scales=2, **options)
    assert [picture.shape[-1] for picture, _ in both] == [28, 28, 56]
    for (a, losses), (b, others) in zip(coarse, both[:2], strict=True):
        close(a, b)
        assert losses == pytest.approx(others)
    # With one evaluation at full size, the picture there is what it starts from.
    enlarged = nnf.interpolate(both[1][0], (40, 56), mode="bicubic").clamp(0, 1)
    close(both[2][0], enlarged, rtol=0, atol=1e-4)
    close(starts[1], widen(enlarged))
    assert (resize(photo, 0.25) - nnf.avg_pool2d(photo, 4)).abs().mean() < 0.05


def test_a_term_without_weight_is_not_computed(pictures):
    """A texture does not look at the photo, nor an inversion at the painting."""
    photo, style = pictures
    for term, others in (("content", (1 - photo, style)), ("style", (photo, 1 - style))):
        options = {f"{term}_weight": 0, "init": "noise"}
        first, second = (paint(x, [y], **options)[-1] for x, y in (pictures, others))
        assert torch.equal(first[0], second[0])
        assert first[1][term] == 0
    first, second = (paint(x, [style], content_weight=0, tv_weight=1) for x in (photo, 1 - photo))
    assert first[0][1].keys() == {"total", "content", "style", "variation"}


# --- What it starts from --------------------------------------------------------------------------


def test_what_it_starts_from(pictures):
    content, style = pictures

    def start(init, styles=(style,), **options):
        args = small_settings(content, styles or [style], init=init, **options)
        return gatys.start(content, styles, args)

    assert torch.equal(start("content"), content)
    assert torch.equal(start("recolored", []), content)
    close(start("recolored"), gatys.match_color(content, [style]).clamp(0, 1))
    close(start("recolored", [1 - style, style], style_blend=[0, 3]), start("recolored"))
    noise = start("noise")
    assert torch.equal(noise, start("noise", seed=0))
    assert not torch.equal(noise, start("noise", seed=1))
    assert 0 <= noise.min() < 0.01 < 0.99 < noise.max() <= 1
    assert noise.std().item() == pytest.approx(12**-0.5, abs=0.02)  # uniform
    ramp = torch.linspace(0, 1, 90).expand(1, 3, 30, 90)  # covers 40×56 at 40×120: its middle stays
    middle = start("style", [ramp, 1 - ramp])[0, 0, 20]
    close(middle, torch.linspace(32 / 120, 88 / 120, 56), rtol=0, atol=0.02)


def test_it_goes_on_from_a_picture(pictures):
    """The picture is scaled, and turned grey if the photo is."""
    content, *styles = pictures
    other = gaussian_blur(content.flip(3), 5)
    common.save_image(other, "other.png")
    for init in (other, "other.png", Path("other.png")):
        args = small_settings(content, styles, init=init)
        same, large = (gatys.start(widen(resize(content, k)), styles, args) for k in (1, 2))
        close(same, widen(other), rtol=0, atol=3e-3)
        assert (resize(large[..., 8:-8, 8:-8], 0.5) - other).abs().mean() < 0.01
    args = small_settings(content, styles, init=other, preserve_color="luminance")
    grey = gatys.start(widen(content), styles, args)
    close(grey, widen(luminance(other)).expand_as(grey))
    first, more = paint(content, styles), paint(content, styles, init=tiny(content, styles))
    assert more[-1][1]["total"] < min(losses["total"] for _, losses in first)


def test_the_best_picture_is_that_of_the_least_loss_at_the_finest_scale():
    """Of equal ones, the last."""
    small, large = torch.rand(1, 3, 4, 6), torch.rand(1, 3, 8, 12)
    for frame, best, expected in (
        ((small, 5), None, True),
        ((small, 5), (small, 6), True),
        ((small, 5), (small, 5), True),
        ((small, 6), (small, 5), False),
        ((large, 6), (small, 5), True),
        ((large, math.nan), (large, 5), False),
    ):
        pair = [pair and (pair[0], {"total": pair[1], "style": 0}) for pair in (frame, best)]
        assert gatys.better(*pair) == expected


# --- Regions --------------------------------------------------------------------------------------


def test_masks_say_where_each_style_goes_and_how_much_it_counts(pictures):
    """A share is the part of the picture that is covered, times what --style-blend says."""
    x, a, b = widen(pictures[0]), pictures[1], 1 - pictures[1]
    grey, left = 0 * LEFT + 0.5, nnf.interpolate(LEFT, (32, 48))
    vgg = VGG(["relu1_1", "relu3_1", "relu4_2"], "vgg19", "random")
    F, A, B = (vgg(image)["relu1_1"] for image in (x, a, b))
    left_of_a = gram_matrix(A, left / left.square().sum().sqrt())
    A, B = gram_matrix(A), gram_matrix(B)

    def E(S, mask=None):
        T = None if mask is None else widen(mask) / widen(mask).square().sum().sqrt()
        return gatys.style_loss(gram_matrix(F, T), S).item()

    halves = 0.5 * E(A, LEFT) + 0.5 * E(B, 1 - LEFT)
    unequal = 0.75 * E(A, LEFT) + 0.25 * E(B, 1 - LEFT)
    no_rest = E(A) + 0.5 * E(B, LEFT)
    for expected, styles, options in (
        (E(A), [a], {"style_masks": [2 * grey]}),
        (E(0.75 * A + 0.25 * B), [a, b], {"style_blend": [6, 2]}),
        (E(0.5 * A + 0.5 * B), [a, b], {}),
        (halves, [a, b], {"style_masks": [LEFT, 1 - LEFT]}),
        (halves, [a, b], {"style_masks": [LEFT]}),  # the last gets the rest
        (unequal, [a, b], {"style_masks": [LEFT], "style_blend": [3, 1]}),
        (E(A), [a, a], {"style_masks": [grey]}),  # grey does not weaken a style
        (E(A) + E(B), [a, b], {"style_masks": [2 * grey, 2 * grey]}),  # they overlap
        (no_rest, [a, b, b], {"style_masks": [2 * grey, LEFT]}),
        (0.5 * E(A, LEFT), [a], {"style_masks": [LEFT]}),
        (0.5 * E(A, 1 - TOP), [a], {"protect": TOP}),
        (0.5 * E(A, 1 - TOP), [a, a], {"protect": TOP, "style_masks": [grey]}),
        (E(left_of_a), [with_alpha(a, left)], {}),
        (E(0.5 * left_of_a + 0.5 * B), [with_alpha(a, left), b], {}),
    ):
        options = {"content_weight": 0, "style_layers": ["relu1_1"]} | options
        args = settings(pictures[0], styles, **options)
        paintings = [style[:, :3] for style in styles]
        objective = gatys.make_objective(vgg, x, paintings, args.style_layers, args)
        assert objective(x)["style"].item() == pytest.approx(expected, rel=0.01), options


def test_what_is_protected_is_compared_with_the_photo(pictures):
    photo = pictures[0]
    vgg = VGG(["relu1_1", "relu3_1", "relu4_2"], "vgg19", "random")
    args = settings(photo, style_weight=0, protect=TOP, content_layers=["relu3_1"])
    x, y = widen(photo), widen(1 - photo)
    losses = gatys.make_objective(vgg, x, [], [], args)(y)
    content, protected = 0, []
    for layer, f, p in zip(vgg.layers, vgg(y).values(), vgg(x).values(), strict=True):
        T = nnf.adaptive_avg_pool2d(widen(TOP), f.shape[-2:])
        protected.append(0.5 * (T * (f - p)).square().mean().item())
        if layer == "relu3_1":
            content = 0.5 * (f - p).square().mean().item()
    expected = sum(protected) / 3
    assert losses["protected"].item() == pytest.approx(expected, rel=1e-4)
    assert losses["content"].item() == pytest.approx(content, rel=1e-4)
    assert losses["total"].item() == pytest.approx(content + 30 * expected, rel=1e-4)


def test_where_a_style_holds_and_its_share(pictures):
    """Where it is not protected, and not transparent: α · (1 − protected)."""
    photo, style = pictures
    x, A = widen(photo), [{"relu1_1": torch.eye(2), "relu2_1": torch.eye(2)}]
    for options, free in (
        ({"protect": TOP}, 1 - TOP),
        ({"alpha": LEFT}, LEFT),
        ({"protect": TOP, "alpha": LEFT}, LEFT * (1 - TOP)),
        ({"protect": TOP, "alpha": LEFT, "style_masks": [0 * LEFT + 0.5]}, LEFT * (1 - TOP) / 2),
    ):
        alpha = options.pop("alpha", None)
        content = photo if alpha is None else with_alpha(photo, alpha)
        args = settings(content, [style], **options)
        (placed,) = gatys.place_styles(A, x, args)
        for layer, mask in (("relu1_1", widen(free)), ("relu2_1", nnf.avg_pool2d(widen(free), 2))):
            close(placed.T[layer], mask / mask.square().sum().sqrt())
        assert placed.share == pytest.approx(widen(free).mean().item(), rel=1e-4)
    (placed,) = gatys.place_styles(A, x, settings(photo, [style]))
    assert placed.share == 1 and placed.T == {"relu1_1": None, "relu2_1": None}


def test_a_mask_is_scaled_to_the_picture_and_repeated_in_its_margin():
    mask, small = torch.rand(1, 1, 32, 48), torch.zeros(1, 3, 8, 12)
    resized = gatys.fit(mask, small)
    assert (resized - nnf.avg_pool2d(mask, 4)).abs().mean() < 0.1
    assert torch.equal(gatys.fit(mask, widen(small), 8), widen(resized))
    start = gatys.fit(LEFT, torch.zeros(1, 3, 80, 112), mode="bicubic")  # which leaves [0, 1]
    assert (start.min(), start.max()) == (0, 1)


def test_the_protected_part_starts_from_the_photo_and_keeps_it(pictures):
    photo, styles = gaussian_blur(pictures[0], 9), pictures[1:]
    options = {"style_weight": 30, "num_steps": 6, "init": "noise", "scales": 2}
    made = [tiny(photo, styles, **options, protect=mask) for mask in (None, TOP)]
    change, changed = ((picture - photo).abs() for picture in made)
    assert changed[..., :16, :].mean() < 0.1 * change[..., :16, :].mean()
    assert changed[..., 24:, :].mean() > 0.5 * change[..., 24:, :].mean()
    start, losses = paint(photo, styles, protect=TOP, init="noise", lbfgs_iters=1)[0]
    total = losses["content"] + losses["style"] + 30 * losses["protected"]
    assert losses["total"] == pytest.approx(total, rel=1e-4)
    close(start[..., :20, :], photo[..., :20, :])
    assert (start - photo)[..., 20:, :].abs().mean() > 0.1
    white, black = torch.ones(1, 1, 1, 1), 0 * TOP
    close(tiny(photo, styles, protect=white, **options), photo, rtol=0, atol=0.01)
    # Protects nothing, and takes no style, of a painting with nothing in it:
    nothing = [with_alpha(styles[0], torch.zeros(1, 1, 1, 1))]
    for tile_size in (None, 32):
        made = tiny(photo, nothing, protect=black, style_masks=[black], tile_size=tile_size)
        assert made.isfinite().all()


def test_a_mask_is_white_where_it_is_opaque_and_white(capsys):
    """Transparent is black, whatever colour lies under it; one without contrast is warned of."""
    alpha = (torch.arange(8) < 4).float().expand(1, 4, 8)
    to_pil_image(torch.cat([torch.ones(3, 4, 8), alpha])).save("drawn.png")
    close(gatys.load_mask(Path("drawn.png")), alpha[None])
    assert capsys.readouterr().err == ""
    Image.new("L", (8, 4), 255).save("white.png")
    close(gatys.load_mask(Path("white.png")), torch.ones(1, 1, 4, 8))
    assert "white.png" in capsys.readouterr().err


def test_faces_are_protected(monkeypatch, pictures):
    """A soft ellipse is made of each box that the detector finds; without a face it is black."""
    photo = torch.rand(1, 3, 100, 120)
    boxes = torch.tensor([[20.0, 30, 50, 70], [80, 30, 110, 70]]).numpy()
    for found, white in ((boxes, 1), (None, 0)):
        detector = mock.Mock(**{"MTCNN.return_value.detect.return_value": (found, None)})
        monkeypatch.setitem(sys.modules, "facenet_pytorch", detector)
        mask = gatys.find_faces(photo)[0, 0]
        assert mask[[50, 50, 30, 50], [35, 95, 35, 20]].tolist() == [white] * 4
        assert not mask[[50, 50, 15, 85], [65, 4, 35, 35]].any()
        assert torch.equal(settings(photo, pictures[1:], protect="faces").protect[0, 0], mask)
        if white:  # the edge, between 0.8 and 1.2 of the ellipse, is soft
            assert mask[50, 35 + 19].item() == pytest.approx(0.5, abs=0.02)  # 0.63 · 30 px wide
            assert mask[50 + 28, 35].item() == pytest.approx(0.5, abs=0.01)  # 0.7 · 40 px high
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)  # not installed
    with pytest.raises(InputError, match="facenet"):
        gatys.find_faces(photo)


# --- Colours --------------------------------------------------------------------------------------


def test_matched_colors_of_grey_and_flat_pictures():
    """Noise as of JPEG must not become coloured noise; contrast is raised three times at most."""
    colorful, grey = torch.rand(1, 3, 9, 9), torch.rand(1, 1, 9, 9).expand(1, 3, 9, 9)
    flat, noisy = 0 * grey + 0.3, grey + 0.002 * torch.randn(1, 3, 9, 9)
    cases = (grey, colorful), (flat, colorful), (colorful, flat), (flat, flat), (grey, flat)
    for image, target in cases:
        matched = gatys.match_color(image, [target])
        close(matched.mean((2, 3)), target.mean((2, 3)), rtol=0, atol=1e-5)
    noisy, clean = (gatys.match_color(image, [colorful]) for image in (noisy, grey))
    assert (noisy - clean).abs().max() < 0.05
    mean = colorful.mean((2, 3), keepdim=True)
    raised = gatys.match_color(0.1 * colorful, [colorful])
    close(raised, mean + 0.3 * (colorful - mean), rtol=0, atol=1e-4)
    # A spread below 1/100 of white counts as 1/100.
    x, target = 0.02 * colorful, 0.1 * colorful
    values, vectors = torch.linalg.eigh(torch.cov(target[0].flatten(1).double(), correction=0))
    A = (vectors * (values**0.5 / 0.01).clamp(max=3) @ vectors.T).float()
    expected = target.mean((2, 3), keepdim=True) + torch.einsum("ij,bjhw->bihw", A, x - 0.02 * mean)
    close(gatys.match_color(x, [target]), expected, rtol=0, atol=1e-4)
    grey_mean = luminance(colorful).mean().expand_as(flat)
    close(gatys.match_luminance(flat, colorful), grey_mean, rtol=0, atol=1e-4)
    faint = flat + 1e-5 * torch.randn(1, 3, 9, 9)
    close(gatys.match_luminance(faint, colorful), grey_mean, rtol=0, atol=0.02)
    assert gatys.match_luminance(colorful**9, (colorful > 0.5).float()).max() == 1


def test_preserved_colors_are_the_photos(pictures):
    content, style = pictures[0] * 0.4 + 0.3, pictures[1]  # so that no color leaves the range
    grey = luminance(content).expand_as(content)
    painted = tiny(grey, [gatys.match_luminance(style, content)], scales=2)
    kept = tiny(content, [style], preserve_color="luminance", scales=2)
    close(kept, common.keep_color(painted, content), rtol=0, atol=1e-4)
    recolored = gatys.match_color(style, [content]).clamp(0, 1)
    close(tiny(content, [style], preserve_color="histogram"), tiny(content, [recolored]))
    args = settings(content, [style], preserve_color="histogram")
    _, (recolored,) = gatys.prepare_colors((content > 0.5).float(), [style], args)
    assert recolored.max() == 1


def test_colors_that_cannot_be_seen_change_nothing(pictures):
    """In tensors, in the start, and in what --preserve-color makes of paintings."""
    content, style = pictures
    left = nnf.interpolate(LEFT, style.shape[-2:])
    for init in ("style", "content"):
        made = []
        for hidden in (0.0, 0.7):
            photo = with_alpha(torch.lerp(0 * content + hidden, content, LEFT), LEFT)
            painting = with_alpha(torch.lerp(0 * style + hidden, style, left), left)
            made.append(tiny(photo, [painting], init=init))
        close(*made, rtol=0, atol=1e-5)
    for mode in (None, "histogram", "luminance"):
        made = []
        for hidden in (0.0, 0.7):
            photo = with_alpha(torch.lerp(0 * content + hidden, content, LEFT), LEFT)
            painting = with_alpha(torch.lerp(0 * style + hidden, style, left), left)
            args = settings(photo, [painting, style], preserve_color=mode)
            grey, paintings = gatys.prepare_colors(photo[:, :3], [painting[:, :3], style], args)
            x = gatys.start(widen(grey), paintings, args)
            visible = LEFT * x[..., 8:-8, 8:-8], left * paintings[0], paintings[1]
            made.append(torch.cat([part.flatten() for part in visible]))
        close(*made, rtol=0, atol=1e-5)
    x, target = (image[..., :half] for image, half in ((content, 28), (style, 24)))
    photo, painting = with_alpha(content, LEFT), with_alpha(style, left)
    start = gatys.start(widen(content), [style], settings(photo, [painting]))[..., 8:-8, 8:36]
    expected = gatys.match_color(x, [target]).clamp(0, 1)
    assert (start - expected).abs().mean() < 0.03  # but for the margin, which counts as well


def test_the_result_has_the_size_and_the_alpha_of_the_photo(pictures):
    photo, style = with_alpha(pictures[0], LEFT), with_alpha(pictures[1], torch.ones(1, 1, 1, 1))
    for options in ({}, {"preserve_color": "luminance"}, {"scales": 2, "tile_size": 32}):
        made = tiny(photo, [style], **options)
        assert made.shape == photo.shape
        assert torch.equal(made[:, 3:], LEFT)
    assert tiny(pictures[0], [style]).shape == (1, 3, 40, 56)
    opaque = tiny(with_alpha(pictures[0], torch.ones(1, 1, 1, 1)), [style])
    close(opaque[:, :3], tiny(pictures[0], pictures[1:]), rtol=0, atol=1e-3)


# --- Tiles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [16, 48, None])
def test_tiles_share_out_the_picture(side):
    """They begin at multiples of 16 px; none has fewer than 16, as the pooling needs them."""
    for length in range(1, 200):
        parts = gatys.cuts(length, side)
        starts, ends = zip(*parts, strict=True)
        assert (starts[0], ends[-1]) == (0, length)
        assert starts[1:] == ends[:-1]
        assert all(start % 16 == 0 for start in starts)
        sizes = [end - start for start, end in parts]
        assert set(sizes[:-1]) <= {side}
        assert min(sizes) >= min(16, length)
        assert side is None or sizes[-1] < side + 16
        assert side is not None or len(parts) == 1
    assert gatys.tiles(torch.zeros(1, 3, 40, 70), 32) == [(0, 40, 0, 32), (0, 40, 32, 70)]
    assert gatys.tiles(torch.zeros(1, 3, 48, 16), 32) == [(0, 32, 0, 16), (32, 48, 0, 16)]


def test_tiles_add_up_to_the_whole_and_need_less_memory(monkeypatch):
    """A picture of odd sides, with masks: the same losses and gradients, of maps not all kept."""
    photo, one, two = (torch.rand(1, 3, *sides) for sides in ((153, 133), (50, 90), (90, 70)))
    layers = ["relu1_1", "relu3_1"]
    styles = [
        with_alpha(image, gatys.fit(mask, image)) for image, mask in ((one, LEFT), (two, TOP))
    ]
    vgg, results = VGG([*layers, "relu4_2"], "vgg19", "random", "avg"), []
    options = {"style_layers": layers, "style_masks": [LEFT], "protect": TOP, "tv_weight": 1}
    monkeypatch.setattr(gatys, "OVERLAP", 48)  # as far as relu4_2 sees
    for tile_size in (None, 64):
        objective = objective_of(vgg, photo, styles, **options, tile_size=tile_size)
        x, saved = (0.3 * photo).requires_grad_(), []

        def note(t, saved=saved):
            saved.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            losses = objective(x)
        losses["total"].backward()
        results.append((losses, x.grad, sum(saved)))
    (whole, gradient, kept), (tiled, tiled_gradient, tiled_kept) = results
    assert whole.keys() == tiled.keys() == {"total", "content", "style", "variation", "protected"}
    close(tiled, whole, rtol=1e-5, atol=0)
    close(tiled_gradient, gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())
    assert tiled_kept < 0.1 * kept


@pytest.mark.parametrize("layer", ["relu5_1", "relu5_4"])
def test_tiles_overlap_as_far_as_their_deepest_layer_sees(layer):
    """To all sides."""
    strip, vgg = torch.rand(1, 3, 16, 432), VGG([layer], "vgg19", "random", "avg")
    for x, tile in ((strip, (0, 16, 208, 224)), (strip.mT, (208, 224, 0, 16))):
        (part,) = gatys.tile_maps(vgg, tile, x, [layer]).values()
        whole = vgg(x)[layer]
        close(part, whole[..., 13:14] if tile[0] == 0 else whole[..., 13:14, :])


def test_a_tile_keeps_no_more_than_its_own_maps():
    """A view would keep those of the overlap in memory too."""
    vgg = VGG(["relu2_1"], "vgg19", "random")
    maps = gatys.tile_maps(vgg, (32, 48, 0, 16), torch.rand(1, 3, 80, 80), ["relu2_1"])["relu2_1"]
    assert maps.shape == (1, 128, 8, 8)
    assert maps.untyped_storage().nbytes() == 4 * maps.numel()


def test_relu5_1_sees_no_farther_than_tiles_overlap():
    x = torch.rand(1, 3, 16, 432).requires_grad_()
    VGG(["relu5_1"], "vgg19", "random", "avg")(x)["relu5_1"][..., 13].sum().backward()
    seen = x.grad.abs().sum((0, 1, 2)).nonzero()
    assert 208 - gatys.OVERLAP <= seen.min() < 208 - gatys.OVERLAP + 16
    assert 224 + gatys.OVERLAP - 16 < seen.max() + 1 <= 224 + gatys.OVERLAP


def test_the_memory_is_checked_before_the_work(monkeypatch, fails):
    """As measured: 3000 bytes a pixel; with tiles 620, and 3000 for each pixel of a tile."""
    photo = torch.zeros(1, 3, 1, 1).expand(1, 3, 4096, 4096)
    for flags, expected in (
        ([], 3000),
        (["--tile-size", "512"], 620 + 3000 * (512 + 160) ** 2 / 4096**2),
        (["--tile-size", "4000"], 3000),
    ):
        args = parse_args(["a", "b", *flags])
        assert gatys.bytes_a_pixel(photo, args) == pytest.approx(expected, abs=1)
    assert (
        gatys.bytes_a_pixel(photo[..., :48, :32], parse_args(["a", "b", "--tile-size=16"])) == 3000
    )
    if hasattr(os, "sysconf"):
        pixels = 48 * 32
        memory = {"SC_PHYS_PAGES": 2900, "SC_PAGE_SIZE": pixels}
        monkeypatch.setattr(os, "sysconf", memory.__getitem__)
        assert "out of memory" in fails("gatys.py", CONTENT, STYLE)
        memory["SC_PHYS_PAGES"] = 3100
        run("gatys.py", CONTENT, STYLE)


# --- stylize --------------------------------------------------------------------------------------


def test_defaults():
    """Those of stylize are the command line's, of which test_readme.py checks the numbers."""
    args = parse_args(["content", "style"])
    assert args.style_layers == [f"relu{block}_1" for block in range(1, 6)]
    image = torch.rand(1, 3, 9, 9)
    assert vars(settings(image, [image], protect=None, lr=None)) == vars(args)
    flags = ["--style-layers", "relu1_1", "relu2_1"]
    assert parse_args(["a", "b", *flags]).style_layer_weights == [0.5, 0.5]
    usual = parse_args(["a", "b", "--style-layers", *args.style_layers])
    assert usual.style_layer_weights == args.style_layer_weights == [0.2, 0.45, 0.2, 1.0, 0.02]
    assert settings(image, [image] * 2, style_blend=(1, 3)).style_blend == [0.25, 0.75]
    assert parse_args(["a", "b", "--optimizer", "adam"]).lr == 0.02
    assert parse_args(["a", "b", "--lr", "0"]).lr == 0


def test_arguments_that_make_no_sense_are_told_in_one_line(pictures):
    image, *pair = pictures
    bad = {"content_weight": -1, "style_blend": [1.0, 2.0], "style_layer_weights": [1.0]}
    bad |= {"alpha": 3, "save_gif": True, "device": "cpu", "tile_size": 24, "style_alphas": [None]}
    bad |= {"no_such_flag": 1, "style_wei": 2, "style_layers": ["relu1_1", "relu1_1"]}
    cases = [({name: value}, name) for name, value in bad.items()]
    cases += [({"styles": image}, "[3, 40, 56]"), ({"protect": LEFT[0]}, "(1, 1, H, W)")]
    cases += [({"style_masks": [2 * LEFT]}, "(1, 1, H, W)"), ({"style_blend": [0.0]}, "not 0")]
    cases += [
        ({"styles": []}, "style image"),
        ({"styles": [], "style_weight": 0, "init": "style"}, "style image"),
    ]
    word = "(1, 3, H, W) with values from 0 to 1"
    wrong = [image[0], torch.cat([image, image]), 255 * image, torch.nan * image, image.byte()]
    cases += [({name: x}, word) for x in wrong for name in ("content", "init")]
    cases += [({"content": "a.png"}, word), ({"init": "a.png"}, "a.png")]
    cases += [({"content": with_alpha(image, 2 * LEFT)}, "(1, 1, H, W)")]
    for arguments, word in cases:
        with pytest.raises(InputError) as error:
            tiny(**{"content": image, "styles": pair} | arguments)
        assert word in str(error.value).replace("-", "_") and "\n" not in str(error.value), (
            arguments
        )
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        tiny(image, pair)


def test_lists_given_empty_stay_empty(pictures):
    content, style = pictures
    args = settings(content, [style], style_layers=[], style_masks=[])
    assert (args.style_layers, args.style_layer_weights, args.style_masks) == ([], [], [])
    assert settings(content, [style], content_layers=[]).content_layers == []
    inversion = tiny(content, init="noise", style_weight=0)
    close(tiny(content, [style], init="noise", style_layers=[]), inversion)
    for nothing in ({"style_blend": []}, {"style_layer_weights": []}):
        with pytest.raises(InputError, match="needs one"):
            settings(content, [style], **nothing)


def test_other_tensors_precisions_and_devices_give_nearly_the_same_picture(pictures):
    photo, style = pictures
    options = {"style_masks": [LEFT], "protect": TOP, "preserve_color": "luminance"}
    expected = tiny(photo, [style], **options)
    with torch.no_grad():
        last = style.to(memory_format=torch.channels_last)
        other = tiny(photo.double().requires_grad_(), [last], **options)
    close(other.float(), expected, rtol=0, atol=1e-3)
    half = tiny(photo, [style], precision="bfloat16", **options)
    assert 0 < (half - expected).abs().mean() < 0.02
    if torch.cuda.is_available():
        for painting in (style.cuda(), style):
            other = tiny(photo.cuda(), [painting], **options).cpu()
            assert (other - expected).abs().mean() < 0.02


# --- The command line -----------------------------------------------------------------------------


def test_the_default_output_is_named_after_the_inputs(capsys):
    run("gatys.py", CONTENT, STYLE)
    assert files() == ["content_style.png"]
    assert load_image("content_style.png").shape == (1, 3, 32, 48)
    for text in ("command: python gatys.py --image-size 48", torch.__version__, "seed: 0", "total"):
        assert text in provenance("content_style.png")
    assert capsys.readouterr().out == "content_style.png\n"


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        ("a.png b.png c.v2.png", "a_b_c.v2.png"),
        ("a.png --style-weight 0", "a_inversion.png"),
        ("in b.png", "in_b/d.png"),
        ("in/. c.v2.png", "in_c.v2/d.png"),
    ],
)
def test_names_of_outputs(arguments, output, monkeypatch):
    save_noise("a.png", "b.png", "c.v2.png", "in/d.png")
    outputs = []
    monkeypatch.setattr(gatys, "paint_file", lambda *inputs: outputs.append(inputs[3].output))
    gatys.run(parse_args(arguments.split()), [])
    assert outputs == [Path(output)]


def test_everything_that_can_be_saved():
    to_pil_image((torch.arange(30) < 15).float().expand(1, 10, 30)).save("mask.png")
    flags = "-o new/a.jpg --save-gif --save-losses --protect mask.png --scales 2 --num-steps 4"
    run(f"gatys.py {flags} --save-all", CONTENT, STYLE)
    assert "of 5" in provenance("new/a.jpg")
    frames = [f"a_frames/{step:04d}.png" for step in range(1, 6)]
    assert files("new") == sorted(["a.gif", "a.jpg", "a_losses.csv", "a_losses.png", *frames])
    shown = list(load_frames("new/a.gif"))
    assert 3 <= len(shown) <= 1 + 5 + 1  # the photo, the steps, the result
    assert (shown[0][0] - load_image(CONTENT, 48)).abs().mean() < 0.1
    assert shown[0][1] == 1000 and shown[1][1] % 100 == 0
    assert (shown[-1][0] - load_image("new/a.jpg")).abs().mean() < 0.1
    assert shown[-1][1] >= 2000  # ms; Pillow joins equal frames
    for picture in ("a.gif", "a.jpg", *frames):
        assert load_image(f"new/{picture}").shape == (1, 3, 32, 48)  # also of the coarse scale
    assert load_image("new/a_losses.png").std() > 0.01
    rows = [row.split(",") for row in Path("new/a_losses.csv").read_text().splitlines()]
    assert rows[0] == ["step", "total", "content", "style", "protected"]
    assert [row[0] for row in rows[1:]] == ["1", "2", "3", "4", "5"]
    run("gatys.py -o new/a.jpg --save-all", CONTENT, STYLE)
    assert files("new/a_frames") == ["0001.png", "0002.png"]  # none of the first run


def test_an_animation_of_many_steps_has_few_small_pictures():
    """The first step, and about 48 later ones, of 384 px or less."""
    photo = torch.rand(1, 3, 4, 480)
    args = settings(photo, [photo], num_steps=100)
    args.output, args.save_gif, args.save_all = Path("a.png"), True, False
    progress = gatys.Progress(100)
    frames = ((photo * (step / 100), {"total": 1.0 / step}) for step in range(1, 101))
    gatys.watch(frames, photo, args, progress)
    assert len(progress.film) == 1 + 33
    assert {frame.shape[-1] for frame in progress.film} == {384}
    assert progress.film[0].mean() < 0.01 < progress.film[1].mean() < 0.02
    assert (progress.best_step, len(progress.history)) == (100, 100)


FLAGS = """--content-weight 50 | --style-weight 1 | --tv-weight 900 | --num-steps 6 |
    --lbfgs-iters 4 | --scales 2 | --content-layers relu1_1 | --style-layers relu2_2 |
    --optimizer adam | --lr 0.3 | --init content | --init style | --init noise |
    --init noise --seed 8 | --pooling max | --style-layers relu4_1 |
    --style-layers relu4_1 --vgg vgg16 | --precision bfloat16 | --style-scale 0.5 |
    --preserve-color histogram | --preserve-color luminance | --style-blend 5 1 |
    --style-masks mask.png | --image-size 40 | --protect mask.png |
    --protect mask.png --protect-weight 1 | --style-layer-weights 1 9"""


def test_every_flag_changes_the_picture():
    """No two of these commands give the same picture."""
    save_noise("a.png", "b.png", "c.png", size=(48, 36))
    Image.linear_gradient("L").save("mask.png")
    command = "gatys.py a.png b.png c.png -o d.png --num-steps 3 --lbfgs-iters 3 --content-weight 9"
    made = {}
    for flags in ["", *FLAGS.split("|")]:
        run(command, *flags.split())
        made[flags] = load_image("d.png")
    for (flags, picture), (others, other) in itertools.combinations(made.items(), 2):
        same = picture.shape == other.shape and (picture - other).abs().mean() < 5e-5
        assert not same, (flags, others)


CASES = [([3, 2, 5], False), ([3, 2, 5, 1], True), ([4, 3, 2], False)]


@pytest.mark.parametrize(("losses", "interrupted"), CASES)
def test_the_picture_of_the_least_loss_at_full_size_is_kept(
    monkeypatch, capsys, losses, interrupted
):
    """Of a finished run, and of one that Ctrl-C ends in its fifth step.

    The loss of a coarser scale is another one.
    """

    def paint(content, *arguments):
        yield torch.zeros(1, 3, 16, 24), {"total": 0.1}
        for step, loss in enumerate(losses, 2):
            if step == 5:
                signal.raise_signal(signal.SIGINT)
            yield torch.full_like(content, loss / 10), {"total": float(loss)}

    monkeypatch.setattr(gatys, "paint", paint)
    with pytest.raises(SystemExit, match="130") if interrupted else contextlib.nullcontext():
        run("gatys.py --num-steps 4 --scales 1 --save-losses --save-gif", CONTENT, STYLE)
    least = min(losses[:3])
    for picture in (load_image("content_style.png"), [*load_frames("content_style.gif")][-1][0]):
        assert picture.mean().item() == pytest.approx(least / 10, abs=0.01)
    assert f"step: {2 + losses.index(least)} of 4" in provenance("content_style.png")
    assert len(Path("content_style_losses.csv").read_text().splitlines()) == 5
    last = capsys.readouterr().err.splitlines()[-1]
    stopped = f"stopped: content_style.png holds the picture of step {2 + losses.index(least)} of 4"
    assert (last == stopped) == interrupted
    if not interrupted:
        black = torch.zeros(1, 3, 32, 48)
        assert tiny(black, [black]).max().item() == pytest.approx(least / 10)


def test_a_failure_keeps_the_last_good_picture(monkeypatch, fails, capsys):
    """A loss that blows up, and a memory that is full."""
    fails("gatys.py --optimizer adam --lr 1e12 --num-steps 9", CONTENT, STYLE)
    assert "step: 1 of 9" in provenance("content_style.png")
    gram_matrix, calls = gatys.gram_matrix, itertools.count(1)

    def full(*arguments):
        if next(calls) > 30:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return gram_matrix(*arguments)

    monkeypatch.setattr(gatys, "gram_matrix", full)
    assert "--image-size 33" in fails("gatys.py -o b.png --num-steps 90", CONTENT, STYLE)
    assert load_image("b.png").shape == (1, 3, 32, 48)


def test_a_failure_before_the_first_picture_writes_nothing(monkeypatch, fails):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(gatys, "gram_matrix", full)
    assert "--tile-size" in fails("gatys.py", CONTENT, STYLE)
    assert files() == []


def test_files_that_are_transparent_in_parts(monkeypatch):
    """Colours that cannot be seen change nothing, and are given no style."""
    noise, alpha = torch.rand(3, 36, 48), (torch.arange(48) < 24).float().expand(1, 36, 48)
    results, objectives, objective = [], [], gatys.Objective

    def note(*arguments):
        objectives.append(objective(*arguments))
        return objectives[-1]

    monkeypatch.setattr(gatys, "Objective", note)
    for hidden in ([0.0, 1.0, 0.0], [0.0, 0.0, 0.0]):  # lime, black
        colors = torch.where(alpha > 0, noise, torch.tensor(hidden).view(3, 1, 1))
        to_pil_image(torch.cat([colors, alpha])).save("cut.png")
        run("gatys.py cut.png cut.png -o made.png")
        results.append(next(load_frames("made.png"))[0])
    assert torch.equal(*results)
    assert torch.equal(results[0][0, 3], alpha[0])
    (style,) = objectives[0].styles
    assert style.share == pytest.approx(0.5, abs=0.01)
    T = style.T["relu1_1"]
    beside = T[0, 0, 20, [28, 36]] / T.max()  # beside a margin of 8 px
    assert beside.tolist() == [1, 0]
    photo, painting = next(load_frames("cut.png"))[0], next(load_frames("cut.png"))[0]
    args = settings(photo, [painting])
    mask = args.style_alphas[0]
    expected = gatys.painting_grams(objectives[0].vgg, painting[:, :3], mask, ["relu1_1"], args)
    close(style.A["relu1_1"], expected["relu1_1"], rtol=1e-4, atol=0)


def test_every_photo_of_a_folder_is_painted_as_it_is_alone(monkeypatch, capsys):
    """With a network that is made once. What fails is passed over, and Ctrl-C ends it all."""
    save_noise("in/a.png", "in/deep/b.jpg", "style.png", size=(48, 36))
    cut = with_alpha(
        load_image("in/a.png"), torch.tensor([0.0, 1]).view(1, 1, 2, 1).repeat(1, 1, 18, 1)
    )
    common.save_image(cut, "in/cut.png")
    Path("in/damaged.png").touch()
    made, load = [], common._load_weights

    def note(*names):
        made.append(names)
        return load(*names)

    monkeypatch.setattr(common, "_load_weights", note)
    monkeypatch.setattr(gatys, "find_faces", lambda content: content[:, :1])
    with pytest.raises(SystemExit, match="1 of 4"):
        run("gatys.py in style.png --save-gif --protect faces")
    assert (len(made), capsys.readouterr().err.count("warning: in/damaged.png: ")) == (1, 1)
    names = ["a.gif", "a.png", "cut.gif", "cut.png", "deep/b.gif", "deep/b.jpg"]
    assert files("in_style") == names
    run("gatys.py in/deep/b.jpg style.png -o alone.jpg --protect faces")
    assert torch.equal(load_image("alone.jpg"), load_image("in_style/deep/b.jpg"))
    monkeypatch.setattr(gatys, "optimize", lambda *arguments: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit, match="130"):
        run("gatys.py in style.png")


def test_an_animation_among_photos_becomes_a_still_picture():
    """Of its first frame."""
    save_noise("in/a.png", "style.png")
    frames = [Image.new("RGB", (48, 48), color) for color in ("red", "blue")]
    for name in ("in/b.gif", "in/C.GIF"):
        frames[0].save(name, "GIF", save_all=True, append_images=frames[1:])
    run("gatys.py in style.png")
    assert files("in_style") == ["C.GIF.png", "a.png", "b.gif.png"]


def test_sizes_of_what_is_read(monkeypatch):
    """The photo's longer side is --image-size, the paintings' that times --style-scale."""
    save_noise("a.png", "b.png", size=(60, 30))
    flags = ["--image-size", "40", "--style-scale", "0.3", "--style-masks", "b.png"]
    read = []
    monkeypatch.setattr(gatys, "paint_file", lambda *inputs: read.extend(inputs))
    gatys.run(parse_args(["a.png", "b.png", *flags, "--protect", "b.png", "--init", "b.png"]), [])
    content, (painting,), _, args, _ = read
    assert content.shape == (1, 3, 20, 40)
    assert painting.shape == (1, 3, 6, 12)
    assert args.style_masks[0].shape == args.protect.shape == (1, 1, 30, 60)
    assert args.init.shape == (1, 3, 30, 60)


def test_a_mistake_that_is_that_of_every_photo_ends_the_run(fails):
    save_noise("in/a.png", "in/b.png", "style.png")
    torch.save({"0.weight": torch.zeros(1)}, "other.pth")
    Path("damaged.png").touch()
    for flags in ("--style-layers relu9_1", "--vgg-weights other.pth", "--init damaged.png"):
        assert flags.split()[1] in fails(f"gatys.py in style.png {flags}")


def test_files_that_make_no_sense_are_told_in_one_line(fails):
    save_noise("in/a.png", "in/a.jpg", "b.png", "f.png", "c.gif", "d_losses.png")
    before = files()
    for command, word in (
        ("b.png in", "is a folder"),
        ("in b.png -o in", "an input"),
        ("in b.png -o c.jpg", "name a folder"),
        ("b.png" + 5 * " b.png", "5 styles"),
        ("in b.png --init nose", "noise"),
        ("b.png b.png --init in", "no file"),
        ("b.png b.png --init in/a.jpg -o in/a.jpg", "input"),
        ("b.png f.png --protect in/a.jpg -o in/a.jpg", "input"),
        ("b.png f.png f.png --style-masks in/a.jpg -o in/a.jpg", "input"),
        ("f.png b.png -o ./b.png", "input"),
        ("c.gif b.png --save-gif -o c.png", "c.gif"),
        ("d_losses.png b.png --save-losses -o d.png", "d_losses.png"),
        ("f.png b.png --tile-size 24", "multiple of 16"),
        ("f.png b.png --tile-size 8", "16"),
        ("f.png b.png b.png b.png --style-masks b.png", "--style-masks"),
        ("f.png b.png --style-masks b.png b.png", "--style-masks"),
        ("f.png b.png --style-blend 0", "not 0"),
        ("f.png b.png --style-layer-weights 1", "--style-layer-weights"),
        ("f.png b.png --style-weight 0 --content-weight 0", "--style-weight"),
        ("in b.png --save-gif", "a.gif"),
        ("f.png", "style image"),
        ("f.png --style-weight 0 --init style", "style image"),
    ):
        assert word in fails(f"gatys.py {command}"), command
        assert files() == before
    image = torch.rand(1, 3, 9, 9)
    settings(image, [image] * 5, style_blend=[1.0] * 5)
    parse_args(["a", "b", "c", "d", "e", "f", "--style-blend", "1", "1", "1", "1", "1"])


def test_the_style_distance_of_the_benchmark():
    """Of the photo all is left, of the painting nothing."""
    import benchmark

    photo, painting = load_image(CONTENT, 48), load_image(STYLE, 64)
    for made, left in ((photo, 1), (painting, 0)):
        assert benchmark.style_left(made, photo, painting, 32) == pytest.approx(left, abs=1e-6)
