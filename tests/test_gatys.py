"""gatys.py: the optimisation, scales, starts, masks, colours, and the arguments of stylize."""

import signal
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as nnf
from conftest import files, run, save_noise
from PIL import Image
from torchvision.transforms.functional import gaussian_blur, to_pil_image

import common
import gatys
from common import VGG, InputError, gram_matrix, load_image, rescale
from gatys import parse_args, settings, stylize

close = torch.testing.assert_close
TINY = {"vgg_weights": "random", "content_layers": ["relu2_2"], "style_layers": ["relu1_1", "relu2_1"]}
TINY |= {"num_steps": 2, "lbfgs_iters": 3, "style_weight": 1.0, "precision": "float32"}
TOP = (torch.arange(40) < 20).float()[:, None].expand(1, 1, 40, 56)
LEFT = (torch.arange(56) < 28).float().expand(1, 1, 40, 56)


@pytest.fixture(autouse=True)
def pictures():
    torch.manual_seed(0)
    return torch.rand(1, 3, 40, 56), torch.rand(1, 3, 32, 48) ** 3


def tiny(content, styles=(), **options):
    return stylize(content, styles, **(TINY | options))


def paint(content, styles=(), **options):
    """Return all that `paint` yields: (picture, losses) each."""
    return list(gatys.paint(content, styles, settings(content, styles, **(TINY | options))))


def widen(image):
    """Repeat the borders of an image or a mask in a margin."""
    return nnf.pad(image, [8] * 4, mode="replicate")


def optimize(objective, steps, iterations, x=None, **options):
    """Return all that `optimize` yields from x, by default a black picture of 8×8 px."""
    x = torch.zeros(1, 3, 8, 8) if x is None else x
    args = parse_args(["a", "b", f"--lbfgs-iters={iterations}", *(f"--{k}={v}" for k, v in options.items())])
    return list(gatys.optimize(x, lambda x: {"total": objective(x)}, steps, args))


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_optimize_finds_the_minimum_and_yields_pictures_with_their_own_losses(optimizer):
    """Beyond [0, 1] too: clamping would cut off the gradient."""
    target, curvature = 1.4 * torch.rand(1, 3, 8, 8) - 0.2, torch.rand(1, 3, 8, 8) + 0.1
    steps = optimize(lambda x: (curvature * (x - target).square()).mean(), 10, 20, optimizer=optimizer, init="noise")
    assert len(steps) == 10
    for x, losses in steps:
        assert losses["total"] == pytest.approx((curvature * (x - target).square()).mean().item(), rel=1e-3, abs=1e-8)
    close(steps[-1][0], target, rtol=0, atol=0.01)


def test_lbfgs_does_not_depend_on_the_scale_of_the_loss():
    """torch's L-BFGS stands still when a loss is small: its thresholds are absolute."""
    target = torch.rand(1, 3, 8, 8)
    small, plain, large = (optimize(lambda x, s=s: s * (x - target).pow(4).mean(), 3, 4)[-1][0] for s in (1e-8, 1, 1e8))
    close((small, large), (plain, plain), rtol=0, atol=0.01)
    assert plain.mean() > 0.1
    curvature = 10 ** (3 * torch.rand(1, 3, 8, 8) - 3)
    steps = optimize(lambda x: (curvature * (x - target).pow(4)).mean(), 12, 10, init="noise")
    assert steps[-1][1]["total"] < 1e-15  # nor does it stop where the loss has become small


def test_the_picture_moves_once_an_evaluation():
    """torch's own limit of evaluations would end short steps early, its thresholds the late ones."""
    for iterations in (1, 2, 5):
        seen = []
        optimize(lambda x, seen=seen: seen.append(x.detach()) or (x - 1).pow(4).mean(), 12, iterations)
        assert len(seen) == 12 * iterations == len({x.mean().item() for x in seen})


def test_first_moves_are_as_large_as_they_should_be():
    """Adam's are its learning rate; torch's L-BFGS bounds the sum of all changes, here their mean at every size."""
    for options, move in (({}, 0.02), ({"lr": 0.1}, 0.1)):
        _, (x, _) = optimize(lambda x: -x.mean(), 2, 1, optimizer="adam", **options)
        close(x, torch.full_like(x, move), rtol=1e-3, atol=0)
    for size, options, move in ((8, {}, 0.01), (64, {}, 0.01), (8, {"lr": 0.5}, 0.005)):
        ((x, _),) = optimize(lambda x: (x - 1).square().mean(), 1, 2, torch.zeros(1, 3, size, size), **options)
        assert x.mean().item() == pytest.approx(move, rel=1e-3)


@pytest.mark.parametrize(("flag", "damped"), [({}, True), ({"init": "noise"}, False), ({"optimizer": "adam"}, False)])
def test_a_damped_first_move_has_little_of_the_finest_stripes(flag, damped):
    """Half a cycle a pixel, in both directions √½ of one, counts 1/(1 + 10 · ½) in z, and again in the gradient."""
    stripes = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 3, 6, 8)
    checks = stripes * torch.tensor([1.0, -1.0]).repeat(3)[:, None]
    for pattern, share in ((stripes, 1 / 36), (checks, (1 + 50**0.5) ** -2)):
        _, (x, _) = optimize(lambda x, p=pattern: (x - 1 - p).square().mean(), 2, 1, 0 * pattern, **flag)
        assert (x * pattern).mean() / x.mean() == pytest.approx(share if damped else 1.0, rel=1e-3)
    odd = torch.rand(1, 3, 7, 9)
    close(optimize(lambda x: x.mean(), 1, 1, odd, **flag)[0][0], odd)


def test_the_first_losses_are_those_of_the_objective(pictures):
    """In units of both pictures' activations, and with a margin around the photo."""
    photo, style = pictures
    vgg = rescale(VGG(["relu1_1", "relu2_1", "relu2_2"], "vgg19", "random", "avg"), [widen(photo), style])
    expected = gatys.Objective(vgg, widen(photo), [style], settings(photo, [style], **TINY))(widen(photo))
    _, losses = paint(photo, [style], init="content", lbfgs_iters=1)[0]
    assert losses == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-3)


def test_a_coarse_scale_paints_small_pictures_and_a_fine_one_goes_on_from_there(pictures):
    small = [gatys.resize(image, 0.5) for image in pictures]
    coarse = paint(small[0], small[1:], num_steps=2, lbfgs_iters=1, init="content")
    both = paint(pictures[0], pictures[1:], num_steps=1, lbfgs_iters=1, init="content", scales=2)
    assert [picture.shape[-1] for picture, _ in both] == [28, 28, 56]  # a coarser scale has twice as many steps
    for (a, losses), (b, others) in zip(coarse, both, strict=False):
        close(a, b)
        assert losses == pytest.approx(others)
    # With one evaluation at full size, the picture there is what it starts from.
    close(both[2][0], nnf.interpolate(both[1][0], (40, 56), mode="bicubic").clamp(0, 1), rtol=0, atol=1e-4)
    assert (gatys.resize(pictures[0], 0.25) - nnf.avg_pool2d(pictures[0], 4)).abs().mean() < 0.05


def test_sizes_halve_down_to_192_px():
    for size, scales in ((191, 1), (192, 1), (383, 1), (384, 2), (512, 2), (768, 3), (1024, 3)):
        planned = gatys.scale_steps(parse_args(["a", "b"]), torch.zeros(1, 3, size // 2, size))
        assert planned == [(0.25, 28), (0.5, 14), (1, 7)][3 - scales :]


def test_a_term_without_weight_is_not_computed(pictures):
    """A texture does not look at the photo, nor an inversion at the painting."""
    photo, style = pictures
    for term, changed in (("content", (1 - photo, style)), ("style", (photo, 1 - style))):
        first, second = (paint(x, [y], init="noise", **{f"{term}_weight": 0})[-1] for x, y in (pictures, changed))
        assert torch.equal(first[0], second[0])
        assert first[1][term] == 0


def test_what_it_starts_from(pictures):
    content, style = pictures

    def start(init, styles=(style,), **options):
        return gatys.start(content, styles, settings(content, styles or [style], init=init, **options))

    assert torch.equal(start("content"), content)
    assert torch.equal(start("recolored", []), content)
    close(start("recolored"), gatys.match_color(content, [style]).clamp(0, 1))
    close(start("recolored", [1 - style, style], style_blend=[0, 3]), start("recolored"))
    noise = start("noise")
    assert torch.equal(noise, start("noise", seed=0))
    assert not torch.equal(noise, start("noise", seed=1))
    assert 0 <= noise.min() < 0.01 < 0.27 < noise.std() < 0.31 < noise.max() <= 1  # uniform: 0.289
    ramp = torch.linspace(0, 1, 90).expand(1, 3, 30, 90)  # covers 40×56 at 40×120: its middle stays
    close(start("style", [ramp, 1 - ramp])[0, 0, 20], torch.linspace(32 / 120, 88 / 120, 56), rtol=0, atol=0.02)


def test_it_goes_on_from_a_picture(pictures, capsys):
    """At full size only, unless --scales is given; the picture is scaled and turned grey as the photo is."""
    content, styles, other = pictures[0], pictures[1:], gaussian_blur(pictures[0].flip(3), 5)
    common.save_image(other, "other.png")
    for init in (other, "other.png", Path("other.png")):
        args = settings(content, styles, init=init)
        same, large = (gatys.start(widen(gatys.resize(content, size)), styles, args) for size in (1, 2))
        close(same, widen(other), rtol=0, atol=3e-3)
        assert (gatys.resize(large[..., 8:-8, 8:-8], 0.5) - other).abs().mean() < 0.01
    grey = gatys.start(widen(content), styles, settings(content, styles, init=other, preserve_color="luminance"))
    close(grey, widen(common.luminance(other)).expand_as(grey))
    for scales in (None, 3):
        args = settings(content, styles, init=other, scales=scales)
        assert len(gatys.scale_steps(args, gatys.resize(content, 10))) == (scales or 1)
    gatys.start(widen(content), styles, settings(content, styles, init=other[..., 9:]))
    assert capsys.readouterr().err == "warning: --init, 47×40 px, is stretched to the photo's 56×40 px\n"
    first, more = paint(content, styles), paint(content, styles, init=tiny(content, styles))
    assert more[-1][1]["total"] < min(losses["total"] for _, losses in first)


def test_every_photo_of_a_folder_is_painted_as_it_is_alone(monkeypatch, capsys):
    """With a network that is made once. What fails is passed over, and Ctrl-C ends it all."""
    save_noise("in/a.png", "in/deep/b.jpg", "style.png", size=(48, 36))
    Path("in/damaged.png").touch()
    made, load = [], common._load_weights
    monkeypatch.setattr(common, "_load_weights", lambda *names: made.append(names) or load(*names))
    gatys.load_vgg.cache_clear()
    monkeypatch.setattr(gatys, "find_faces", lambda content: content[:, :1])
    with pytest.raises(SystemExit, match="1 of 3"):
        run("gatys.py in style.png --save-gif --protect faces")
    assert (len(made), capsys.readouterr().err.count("warning: in/damaged.png: ")) == (1, 1)
    assert files("in_style") == ["a.gif", "a.png", "deep/b.gif", "deep/b.jpg"]
    run("gatys.py in/deep/b.jpg style.png -o alone.jpg --protect faces")
    assert torch.equal(load_image("alone.jpg"), load_image("in_style/deep/b.jpg"))
    monkeypatch.setattr(gatys, "optimize", lambda *arguments: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit, match="130"):
        run("gatys.py in style.png")


def test_a_mistake_that_is_that_of_every_photo_ends_the_run(fails):
    save_noise("in/a.png", "in/b.png", "style.png")
    torch.save({"0.weight": torch.zeros(1)}, "other.pth")
    Path("damaged.png").touch()
    for flags in ("--style-layers relu9_1", "--vgg-weights other.pth", "--init damaged.png"):
        assert flags.split()[1] in fails(f"gatys.py in style.png {flags}")


def test_files_that_make_no_sense_are_told_in_one_line(fails):
    save_noise("in/a.png", "in/a.jpg", "b.png")
    cases = {"b.png in": "is a folder", "in b.png -o in": "an input", "in b.png -o c.jpg": "name a folder"}
    cases |= {"b.png" + 5 * " b.png": "5 styles", "in b.png --init nose": "noise", "b.png b.png --init in": "no file"}
    for command, word in (cases | {"b.png b.png --init in/a.jpg -o in/a.jpg": "input"}).items():
        assert word in fails(f"gatys.py {command}")
    with pytest.raises(SystemExit, match="1 of 2"):  # there is an a.gif by then
        run("gatys.py in b.png --save-gif")
    settings(torch.rand(1, 3, 9, 9), [torch.rand(1, 3, 9, 9)] * 5)
    parse_args(["a", "b", "c", "d", "e", "f", "--style-blend", "1", "1", "1", "1", "1"])


def test_masks_say_where_each_style_goes_and_how_much_it_counts(pictures):
    """Shares are of the picture that is covered; where masks leave no room or overlap, they add up to 1 at most."""
    x, a, b = widen(pictures[0]), pictures[1], 1 - pictures[1]
    vgg, grey = VGG(["relu1_1", "relu3_1", "relu4_2"], "vgg19", "random"), 0 * LEFT + 0.5
    F, A, B = vgg(x)["relu1_1"], gram_matrix(vgg(a)["relu1_1"]), gram_matrix(vgg(b)["relu1_1"])

    def style(styles, **options):
        args = settings(pictures[0], styles, content_weight=0, style_layers=["relu1_1"], **options)
        return gatys.Objective(vgg, x, styles, args)(x)["style"].item()

    def E(S, T=None):
        return gatys.style_loss(gram_matrix(F, None if T is None else widen(T)), S).item()

    for expected, styles, options in (
        (E(A), [a], {"style_masks": [2 * grey]}),
        (E(0.75 * A + 0.25 * B), [a, b], {"style_blend": [6, 2]}),
        (E(0.5 * A + 0.5 * B), [a, b], {}),
        (0.5 * E(A, LEFT) + 0.5 * E(B, 1 - LEFT), [a, b], {"style_masks": [LEFT]}),  # the last gets the rest
        (0.75 * E(A, LEFT) + 0.25 * E(B, 1 - LEFT), [a, b], {"style_masks": [LEFT], "style_blend": [3, 1]}),
        (E(A), [a, a], {"style_masks": [grey]}),  # grey does not weaken a style
        (0.5 * E(A, LEFT), [a], {"style_masks": [LEFT]}),
        (0.5 * E(A, 1 - TOP), [a], {"protect": TOP}),
        (0.5 * E(A, 1 - TOP), [a, a], {"protect": TOP, "style_masks": [grey]}),
        (E(gram_matrix(vgg(a)["relu1_1"], LEFT)), [a], {"painting_masks": [LEFT]}),
    ):  # fmt: skip
        assert style(styles, **options) == pytest.approx(expected, rel=0.01), options
    objective = gatys.Objective(vgg, x, [], settings(pictures[0], style_weight=0, protect=TOP))
    expected = 0
    for f, p in zip(vgg(1 - x).values(), vgg(x).values(), strict=True):  # of the layers that protect
        expected += 0.5 * (nnf.adaptive_avg_pool2d(widen(TOP), f.shape[-2:]) * (f - p)).square().mean().item() / 3
    assert objective(1 - x)["protected"].item() == pytest.approx(expected, rel=1e-4)
    mask, small = torch.rand(1, 1, 32, 48), torch.zeros(1, 3, 8, 12)
    resized = gatys.fit(mask, small)
    assert (resized - nnf.avg_pool2d(mask, 4)).abs().mean() < 0.1
    assert torch.equal(gatys.fit(mask, widen(small), 8), widen(resized))


def test_tiles_add_up_to_the_whole_and_need_less_memory(monkeypatch):
    """A picture of odd sides, with masks: the same losses and gradients, of maps that are not all kept."""
    photo, painting, other = (torch.rand(1, 3, *sides) for sides in ((153, 133), (50, 90), (90, 70)))
    vgg, results = VGG(["relu1_1", "relu3_1", "relu4_2"], "vgg19", "random", "avg"), []
    options = {"style_layers": ["relu1_1", "relu3_1"], "painting_masks": [TOP, LEFT], "style_masks": [LEFT]}
    monkeypatch.setattr(gatys, "OVERLAP", 48)  # as far as relu4_2 sees
    for tile_size in (None, 64):
        args = settings(photo, [painting, other], **options, protect=TOP, tile_size=tile_size)
        x, saved = (0.3 * photo).requires_grad_(), []
        objective = gatys.Objective(vgg, photo, [painting, other], args)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            losses = objective(x)
        losses["total"].backward()
        results.append((torch.stack(list(losses.values())), x.grad, sum(saved)))
    (whole, gradient, kept), (tiled, tiled_gradient, tiled_kept) = results
    close(tiled, whole, rtol=1e-5, atol=0)
    close(tiled_gradient, gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())
    assert tiled_kept < 0.1 * kept


@pytest.mark.parametrize("layer", ["relu5_1", "relu5_4"])
def test_tiles_overlap_as_far_as_their_deepest_layer_sees(layer):
    x, vgg = torch.rand(1, 3, 16, 432), VGG([layer], "vgg19", "random", "avg")
    (part,) = gatys.tile_maps(vgg, x, (0, 16, 208, 224)).values()
    close(part, vgg(x)[layer][..., 13:14])


def test_relu5_1_sees_no_farther_than_tiles_overlap():
    x = torch.rand(1, 3, 16, 432).requires_grad_()
    VGG(["relu5_1"], "vgg19", "random", "avg")(x)["relu5_1"][..., 13].sum().backward()
    seen = x.grad.abs().sum((0, 1, 2)).nonzero()
    assert 208 - gatys.OVERLAP <= seen.min() < 208 - gatys.OVERLAP + 16
    assert 224 + gatys.OVERLAP - 16 < seen.max() + 1 <= 224 + gatys.OVERLAP


def test_the_protected_part_starts_from_the_photo_and_keeps_it(pictures):
    photo, styles = gaussian_blur(pictures[0], 9), pictures[1:]
    options = {"style_weight": 30, "num_steps": 4, "init": "noise", "scales": 2}
    change, changed = ((tiny(photo, styles, **options, protect=mask) - photo).abs() for mask in (None, TOP))
    assert changed[..., :16, :].mean() < 0.1 * change[..., :16, :].mean()
    assert changed[..., 24:, :].mean() > 0.5 * change[..., 24:, :].mean()
    start, losses = paint(photo, styles, protect=TOP, init="noise", lbfgs_iters=1)[0]
    assert losses["total"] == pytest.approx(losses["content"] + losses["style"] + 30 * losses["protected"], rel=1e-4)
    close(start[..., :20, :], photo[..., :20, :])
    assert (start - photo)[..., 20:, :].abs().mean() > 0.1
    close(tiny(photo, styles, protect=torch.ones(1, 1, 1, 1), **options), photo, rtol=0, atol=0.01)
    black = 0 * TOP  # protects nothing, and takes no style
    assert tiny(photo, styles, protect=black, style_masks=[black], painting_masks=[black]).isfinite().all()


def test_a_mask_is_white_where_it_is_opaque_and_white(capsys):
    """Transparent is black, whatever colour lies under it; a mask that is the same everywhere is warned of."""
    alpha = (torch.arange(8) < 4).float().expand(1, 4, 8)
    to_pil_image(torch.cat([torch.ones(3, 4, 8), alpha])).save("drawn.png")
    close(gatys.load_mask(Path("drawn.png")), alpha[None])
    Image.new("L", (8, 4), 255).save("white.png")
    close(gatys.load_mask(Path("white.png")), torch.ones(1, 1, 4, 8))
    assert "white.png" in capsys.readouterr().err


def test_faces_are_protected(monkeypatch):
    """A soft ellipse is made of each box that the detector finds; without a face the mask is black."""
    photo, boxes = torch.rand(1, 3, 100, 120), torch.tensor([[20.0, 30, 50, 70], [80, 30, 110, 70]]).numpy()
    for found, white in ((boxes, 1), (None, 0)):
        detector = mock.Mock(**{"MTCNN.return_value.detect.return_value": (found, None)})
        monkeypatch.setitem(sys.modules, "facenet_pytorch", detector)
        mask = gatys.find_faces(photo)[0, 0]
        assert mask[[50, 50, 30, 50], [35, 95, 35, 20]].tolist() == [white] * 4
        assert not mask[[50, 50, 15, 85], [65, 4, 35, 35]].any()


def test_matched_colors_of_grey_and_flat_pictures():
    """Noise as of JPEG must not become coloured noise, nor is contrast raised more than three times."""
    colorful, grey = torch.rand(1, 3, 9, 9), torch.rand(1, 1, 9, 9).expand(1, 3, 9, 9)
    flat, noisy = 0 * grey + 0.3, grey + 0.002 * torch.randn(1, 3, 9, 9)
    for image, target in ((grey, colorful), (flat, colorful), (colorful, flat), (flat, flat), (grey, flat)):
        close(gatys.match_color(image, [target]).mean((2, 3)), target.mean((2, 3)), rtol=0, atol=1e-5)
    assert (gatys.match_color(noisy, [colorful]) - gatys.match_color(grey, [colorful])).abs().max() < 0.05
    mean = colorful.mean((2, 3), keepdim=True)
    close(gatys.match_color(0.1 * colorful, [colorful]), mean + 0.3 * (colorful - mean), rtol=0, atol=1e-4)
    assert gatys.match_luminance(flat, colorful).isfinite().all()
    assert gatys.match_luminance(colorful**9, (colorful > 0.5).float()).max() == 1


def test_preserved_colors_are_the_photos(pictures):
    content, style = pictures[0] * 0.4 + 0.3, pictures[1]  # so that no color leaves the range
    painted = tiny(common.luminance(content).expand_as(content), [gatys.match_luminance(style, content)], scales=2)
    kept = tiny(content, [style], preserve_color="luminance", scales=2)
    close(kept, common.keep_color(painted, content), rtol=0, atol=1e-4)
    recolored = gatys.match_color(style, [content]).clamp(0, 1)
    close(tiny(content, [style], preserve_color="histogram"), tiny(content, [recolored]))


def test_defaults():
    """Those of stylize are the command line's, of which test_readme.py checks the numbers."""
    args = parse_args(["content", "style"])
    assert args.style_layers == [f"relu{block}_1" for block in range(1, 6)]
    assert vars(settings(torch.rand(1, 3, 9, 9), [torch.rand(1, 3, 9, 9)], protect=None, lr=None)) == vars(args)
    assert parse_args(["a", "b", "--style-layers", "relu1_1", "relu2_1"]).style_layer_weights == [0.5, 0.5]


def test_arguments_that_make_no_sense_are_told_in_one_line(pictures):
    image, *pair = pictures
    bad = {"content_weight": -1, "style_blend": [1.0, 2.0], "style_layer_weights": [1.0], "alpha": 3, "save_gif": True}
    cases = [({name: value}, name) for name, value in bad.items()]
    cases += [({"styles": image}, "[3, 40, 56]"), ({"protect": LEFT[0]}, "(1, 1, H, W)")]
    for wrong in (image[0], torch.cat([image, image]), 255 * image, torch.nan * image, image.byte(), "a.png"):
        word = "(1, 3, H, W) with values from 0 to 1"
        cases += [({"content": wrong}, word), ({"init": wrong}, "a.png" if isinstance(wrong, str) else word)]
    for arguments, word in cases:
        with pytest.raises(InputError) as error:
            tiny(**{"content": image, "styles": pair} | arguments)
        assert word in str(error.value).replace("-", "_") and "\n" not in str(error.value), arguments
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        tiny(image, pair)


def test_other_tensors_precisions_and_devices_give_nearly_the_same_picture(pictures):
    photo, style = pictures
    options = {"style_masks": [LEFT], "protect": TOP, "preserve_color": "luminance"}
    expected = tiny(photo, [style], **options)
    with torch.no_grad():
        other = tiny(photo.double().requires_grad_(), [style.to(memory_format=torch.channels_last)], **options)
    close(other.float(), expected, rtol=0, atol=1e-3)
    assert 0 < (tiny(photo, [style], precision="bfloat16", **options) - expected).abs().mean() < 0.02
    if torch.cuda.is_available():
        assert (tiny(photo.cuda(), [style.cuda()], **options).cpu() - expected).abs().mean() < 0.02
