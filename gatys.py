"""Neural style transfer by optimising the pixels of a picture.

    L. A. Gatys, A. S. Ecker, M. Bethge: "Image Style Transfer Using Convolutional Neural Networks",
    CVPR 2016.

The feature maps of a network trained to recognise objects say what is in a picture. The
correlations between them, which forget where things are, say how it is painted. Start from a
picture and change its pixels, by gradient descent through the network, until its feature maps match
the photo's and its correlations match the painting's.

    python gatys.py content.jpg style.jpg                                   # style transfer
    python gatys.py content.jpg style.jpg --content-weight 0 --init noise   # texture synthesis
    python gatys.py content.jpg --style-weight 0 --init noise               # feature inversion

    x     the picture                             L_content = ½ mean (F − P)²             Eq. 1
    F, P  feature maps of x and of the photo      E_l = ¼ Σ (G_l − A_l)²                  Eq. 3, 4
    G, A  Gram matrices of x and of the painting  L_total = α L_content + β Σ_l w_l E_l   Eq. 5, 7

L-BFGS changes x until L_total is small.
"""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchvision.transforms.functional import center_crop
from tqdm import tqdm

import common
from common import VGG, InputError, gram_matrix, keep_color, load_image, luminance, rescale, resize

CONTENT_LAYERS = ("relu4_2",)
STYLE_LAYERS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
# w_l of Eq. 5. The paper's are equal. But then relu5_1 has by far the largest gradient, and draws
# a lattice of dots.
STYLE_LAYER_WEIGHTS = (0.2, 0.45, 0.2, 1.0, 0.02)
STARTS = ("recolored", "content", "style", "noise")
# The network pads with zeros, which shows as a frame. So a margin, which the paper does not have,
# is painted too, and cut off.
MARGIN = 8  # px on each side

Maps = dict[str, Tensor]  # a tensor for each layer, or loss
Masks = dict[str, Tensor | None]  # for each layer, T (1, 1, h, w), as in `guide`; None: everywhere
Grams = dict[tuple[int, str], Tensor]  # a Gram matrix for each style and layer
Frame = tuple[Tensor, dict[str, float]]  # a picture on the way, (1, 3, H, W), and its losses

# --- Losses ---------------------------------------------------------------------------------------


def content_loss(f: Tensor, p: Tensor, T: Tensor | None = None) -> Tensor:
    """Compare the feature maps F of x and P of the photo, (1, N, h, w) each.

    T (1, 1, h, w) says how much each position counts, by T²; without it all count 1/M, M = h·w.
    """
    # Gatys Eq. 1:  L_content = ½ Σ_ij (F_ij − P_ij)²
    # Here it is the mean. The sum grows with the picture, and Eq. 4 does not: with a mean, α and β
    # have the same effect at every size.
    difference = f.float() - p.float()
    if T is None:
        return 0.5 * difference.square().mean()
    return 0.5 * (T * difference).square().sum() / f.shape[1]


def style_loss(g: Tensor, a: Tensor) -> Tensor:
    """Compute E_l from the Gram matrices G of x and A of the painting, (1, N, N) each."""
    # Gatys Eq. 3:  G_ij = Σ_k F_ik F_jk
    # Gatys Eq. 4:  E_l = 1/(4 N² M²) Σ_ij (G_ij − A_ij)²   (gram_matrix() has divided by N·M)
    return 0.25 * (g - a).square().sum()


@dataclass
class Style:
    """What one painting asks of x: its Gram matrices A, where they hold, and how much they count.

    In the paper there is one style, which counts everywhere: its share is 1, its T are None.
    """

    A: Maps  # {layer: (1, N, N)}
    T: Masks  # {layer: (1, 1, h, w)}, as in gram_matrix
    share: float = 1.0


class Objective:
    """The losses of x at one scale. It holds what x is compared with: P, and A of each style."""

    def __init__(
        self,
        vgg: Callable[[Tensor, Sequence[str]], Maps],
        photo: Tensor,
        styles: Sequence[Style],
        T_content: Masks,
        T_protected: Masks,
        args: Namespace,
    ) -> None:
        self.vgg = vgg
        self.styles = styles
        self.T_content = T_content  # where x is compared with the photo; in the paper, everywhere
        self.T_protected = T_protected  # where x shall stay the photo (--protect; not in the paper)
        self.args = args
        with torch.no_grad():
            self.P = vgg(photo, [*T_content, *T_protected])

    def __call__(self, x: Tensor) -> Maps:
        """Return the `total` loss of x (1, 3, H, W), and its terms before weighting."""
        return self.losses(x, *self.measure(x))

    def measure(self, x: Tensor) -> tuple[Tensor, Tensor, Grams]:
        """Measure the feature maps of x: the losses of Eq. 1, and the Gram matrices of Eq. 3."""
        style_layers = self.styles[0].A if self.styles else []  # the same in all styles
        F = self.vgg(x, [*self.P, *style_layers])
        L_content = x.new_zeros(())
        for layer, T in self.T_content.items():
            loss = content_loss(F[layer], self.P[layer], T)
            L_content = L_content + loss / len(self.T_content)
        L_protected = x.new_zeros(())
        for layer, T in self.T_protected.items():
            loss = content_loss(F[layer], self.P[layer], T)
            L_protected = L_protected + loss / len(self.T_protected)
        grams = {}
        for s, style in enumerate(self.styles):
            for layer, T in style.T.items():
                grams[s, layer] = gram_matrix(F[layer], T)
        return L_content, L_protected, grams

    def losses(self, x: Tensor, L_content: Tensor, L_protected: Tensor, grams: Grams) -> Maps:
        """Return the losses of x, from what was measured."""
        args = self.args
        w = dict(zip(args.style_layers, args.style_layer_weights, strict=True))
        # Gatys Eq. 5:  L_style = Σ_l w_l E_l   (of each style)
        L_style = x.new_zeros(())
        for (s, layer), G in grams.items():
            style = self.styles[s]
            L_style = L_style + style.share * w[layer] * style_loss(G, style.A[layer])
        # Gatys Eq. 7:  L_total = α L_content + β L_style
        L_total = args.content_weight * L_content + args.style_weight * L_style
        losses = {"content": L_content, "style": L_style}
        if args.tv_weight:  # not in the paper
            losses["variation"] = common.total_variation(x)
            L_total = L_total + args.tv_weight * losses["variation"]
        if self.T_protected:  # not in the paper
            losses["protected"] = L_protected
            L_total = L_total + args.protect_weight * L_protected
        return {"total": L_total, **losses}


# --- Style transfer -------------------------------------------------------------------------------


def paint(content: Tensor, styles: Sequence[Tensor], vgg: VGG, args: Namespace) -> Iterator[Frame]:
    """Paint `content` in the style of `styles`, images (1, 3, H, W) in [0, 1], each of any size.

    It yields the picture and its losses after every step. The first pictures are small (see
    `plan_scales`).
    """
    common.check_memory(content, bytes_a_pixel(content, args))
    content, styles = prepare_colors(content, styles, args)
    best = None
    for scale in plan_scales(content, args):
        photo = widen(resize(content, scale.factor))
        paintings = [shrink(style, scale.factor) for style in styles]
        if best is None:
            vgg = normalize(vgg, photo, paintings, args)
            x = start(photo, styles, args)
        else:
            x = widen(enlarge(best[0], narrow(photo)))
        objective = make_objective(vgg, photo, paintings, scale.style_layers, args)
        for painted, losses in optimize(x, objective, scale.steps, args):
            frame = narrow(painted).clamp(0, 1), losses
            if better(frame, best):
                best = frame
            yield frame


def stylize(content: Tensor, styles: Sequence[Tensor] = (), **options: object) -> Tensor:
    """Paint `content` in the style of `styles`; return the picture, of the size of `content`.

    Images are (1, 3, H, W) in [0, 1], of any size, or (1, 4, H, W) with α last: what is transparent
    has no part in the result. Options are the flags of the command line, as `style_weight=100`.
    Masks are tensors (1, 1, h, w) in [0, 1]. InputError if something makes no sense.
    """
    args = settings(content, styles, **options)
    photo = fill(content)
    paintings = [fill(style).to(photo) for style in styles]
    best = None
    for frame in paint(photo, paintings, network(photo.device, args), args):
        if better(frame, best):
            best = frame
    return finish(best[0], photo, args)


def normalize(vgg: VGG, photo: Tensor, paintings: Sequence[Tensor], args: Namespace) -> VGG:
    """Rescale VGG to a mean activation of 1 in each layer, over what x is compared with."""
    # The paper (§2) rescales each filter, over many images. Here it is each layer, over the
    # pictures at hand. Some filters are silent in all of them: no factor brings their mean to 1.
    images = [*paintings] if args.style_layers else []
    if args.content_layers or args.protect is not None:
        images.append(photo)
    return rescale(vgg, [shrink(image, min(1.0, 1024 / max(image.shape))) for image in images])


def start(photo: Tensor, styles: Sequence[Tensor], args: Namespace) -> Tensor:
    """Make the picture to start from, of the photo's size. The paper's is noise or an image."""
    h, w = photo.shape[-2:]
    if isinstance(args.init, Tensor):  # a picture to continue from
        grey = args.preserve_color == "luminance"  # as the photo is
        picture = luminance(args.init) if grey else args.init
        x = fit(picture, photo, MARGIN, "bicubic").to(photo).expand_as(photo)
    elif args.init == "noise":  # drawn on the CPU, so that every device starts from the same
        x = torch.rand(photo.shape, generator=torch.Generator().manual_seed(args.seed)).to(photo)
    elif args.init == "style":  # the first painting, enlarged until it covers the photo
        cover = max(h / styles[0].shape[-2], w / styles[0].shape[-1])
        x = center_crop(resize(styles[0], cover), [h, w])
    elif args.init == "recolored" and styles:  # not in the paper: few steps are needed from there
        alpha = None if args.alpha is None else fit(args.alpha, photo, MARGIN)
        x = match_color(photo, styles, args.style_blend, alpha, args.style_alphas).clamp(0, 1)
    else:
        x = photo
    if args.protect is not None:
        x = torch.lerp(x, photo, fit(args.protect, photo, MARGIN).to(x))
    return x


def optimize(
    x: Tensor, objective: Callable[[Tensor], Maps], num_steps: int, args: Namespace
) -> Iterator[Frame]:
    """Change the picture x (1, 3, H, W) so that `objective(x)["total"]` falls.

    It yields x and its losses after each step, which is `args.lbfgs_iters` evaluations.
    """
    # The paper's optimiser changes x itself. Here it changes z, where x = x_0 + unit · smooth(z).
    # torch's L-BFGS begins with a move of Σ |Δz| = 1: with this unit, x changes by 1/100 of white
    # on average. It ignores curvatures below 1e-10: with a gain, Σ |g| = 1e6, all are far larger.
    unit = x.numel() / 100
    x_0 = x
    gain = None
    z = torch.zeros_like(x, memory_format=torch.contiguous_format, requires_grad=True)
    damping = damping_table(x, args)
    optimizer = make_optimizer(z, unit, args)
    losses: Maps = {}

    def closure() -> Tensor:
        nonlocal x, gain, losses
        optimizer.zero_grad()
        x = x_0 + unit * smooth(z, damping)  # not clamped: that would cut off gradients
        losses = objective(x)
        losses["total"].backward()
        if gain is None:
            gain = 1e6 / z.grad.abs().sum().clamp_min(1e-20)
        z.grad *= gain
        return gain * losses["total"].detach()

    for step in range(1, num_steps + 1):
        for _ in range(args.lbfgs_iters):
            z_before = z.detach().clone()
            optimizer.step(closure)
            if args.optimizer == "lbfgs":
                bound_move(optimizer, z, z_before, most=0.1 * args.lr / unit)  # not in the paper
        values = torch.stack([*losses.values()]).tolist()
        if not all(map(math.isfinite, values)):
            advice = "try a smaller --lr, or smaller weights"
            raise InputError(f"the loss is no longer finite in step {step}: {advice}")
        yield x.detach(), dict(zip(losses, values, strict=True))


# === From here: Gatys et al. 2017, "Controlling Perceptual Factors in Neural Style Transfer", =====
# === arXiv:1611.07865: scales (its §6), regions (§4) and colours (§5). ============================

# Fine and coarse layers, which --protect compares. This flag is in no paper.
PROTECTED_LAYERS = ("relu1_1", "relu3_1", "relu4_2")


@dataclass
class Scale:
    """One size at which x is painted."""

    factor: float  # of the full size
    steps: int
    style_layers: list[str]


def plan_scales(content: Tensor, args: Namespace) -> list[Scale]:
    """Plan the scales from coarse to fine; a single one is the paper's of 2016.

    The coarsest has a longer side of 128 px, where shapes as large as the painting's are made; of
    a smaller photo, each is half as large as the next. Without --scales, each is at most twice as
    large as the one before. The second takes a third of the steps of the coarsest, each later one a
    seventh.
    """
    side = max(content.shape[-2:])
    count = args.scales
    if count is None:
        count = 1 + math.ceil(math.log2(max(1, side / 128)))
    coarsest = 128 / side if side > 128 else 0.5 ** (count - 1)  # relative to the full size
    scales = []
    for k in range(count):
        factor = coarsest ** ((count - 1 - k) / max(1, count - 1))  # in equal ratios, up to 1
        steps = max(1, round(args.num_steps / (1, 3, 7)[min(k, 2)]))
        scales.append(Scale(factor, steps, list(args.style_layers)))
    # Not in the paper: relu5_1 makes the largest shapes. At full size they are there, and it would
    # only add dots.
    finest = [layer for layer in args.style_layers if layer < "relu5"]
    if count > 1 and finest:
        scales[-1].style_layers = finest
    if isinstance(args.init, Tensor) and args.scales is None:
        # Coarser ones would lose the details of a picture to continue from. The finest stays as it
        # is, with a part of the steps, and without relu5_1.
        return scales[-1:]
    return scales


def make_objective(
    vgg: VGG,
    photo: Tensor,
    paintings: Sequence[Tensor],
    style_layers: Sequence[str],
    args: Namespace,
) -> Callable[[Tensor], Maps]:
    """Compute what x is compared with, and return the function from x to its losses."""
    A = []
    for painting, alpha in zip(paintings, args.style_alphas, strict=True):
        mask = everywhere(painting, args) if alpha is None else fit(alpha, painting)
        A.append(painting_grams(vgg, painting, mask, style_layers, args))
    styles = place_styles(A, photo, args) if style_layers else []
    T_content = guide(everywhere(photo, args), args.content_layers, photo)
    T_protected = {}
    if args.protect is not None:
        mask = fit(args.protect, photo, MARGIN)
        for layer in PROTECTED_LAYERS:
            T = at_layer(mask, layer)
            # Not Σ T² = 1, as in `guide`: each position counts 1/M, however few are protected.
            T_protected[layer] = T.to(photo) / T.numel() ** 0.5
    make = TiledObjective if args.tile_size else Objective
    return make(vgg, photo, styles, T_content, T_protected, args)


@torch.no_grad()
def painting_grams(
    vgg: VGG, painting: Tensor, mask: Tensor | None, layers: Sequence[str], args: Namespace
) -> Maps:
    """Compute A, the Gram matrices of a painting, where a mask (1, 1, H, W) is 1."""
    T = guide(mask, layers, painting)
    A: Maps = {}
    for tile in tiles(painting, args.tile_size):  # a single one, without --tile-size
        F = tile_maps(vgg, tile, painting, layers)
        for layer in layers:
            A[layer] = A.get(layer, 0) + gram_matrix(F[layer], cut(T[layer], tile, layer))
    return A


def place_styles(A: Sequence[Maps], photo: Tensor, args: Namespace) -> list[Style]:
    """Decide where each style holds, and its share: the part of the picture that it covers."""
    layers = [*A[0]]
    free = torch.ones(1, 1, *photo.shape[-2:])  # where there is a style
    if args.protect is not None:
        free = free * (1 - fit(args.protect, photo, MARGIN))
    if args.alpha is not None:
        free = free * fit(args.alpha, photo, MARGIN)
    if not args.style_masks:
        # Σ_s b_s ‖G − A_s‖² = ‖G − Σ_s b_s A_s‖² + a constant: to blend styles is to blend their
        # Gram matrices.
        blend = {}
        for layer in layers:
            blend[layer] = sum(b * a[layer] for b, a in zip(args.style_blend, A, strict=True))
        whole = args.protect is None and args.alpha is None
        mask = everywhere(photo, args) if whole else free
        return [Style(blend, guide(mask, layers, photo), free.mean().item())]
    masks = [fit(mask, photo, MARGIN) for mask in args.style_masks]
    if len(masks) < len(A):
        masks.append((1 - sum(masks)).clamp(0, 1))  # the last style goes where there is room
    styles = []
    for a, b, mask in zip(A, args.style_blend, masks, strict=True):
        covered = free * mask
        share = len(A) * b * covered.mean().item()  # without --style-blend, len(A) * b is 1
        styles.append(Style(a, guide(covered, layers, photo), share))
    return styles


def guide(mask: Tensor | None, layers: Sequence[str], image: Tensor) -> Masks:
    """Return T of each layer, on the device of `image`, from a mask (1, 1, H, W)."""
    # 2017, Eq. 4:  F_r = T_r ∘ F,  with Σ T_r² = 1   (the product is in gram_matrix())
    guides: Masks = dict.fromkeys(layers)
    if mask is not None:
        for layer in layers:
            T = at_layer(mask, layer).to(image)
            guides[layer] = T / T.square().sum().sqrt().clamp_min(1e-3)
    return guides


def everywhere(image: Tensor, args: Namespace) -> Tensor | None:
    """Return None, a mask that is 1 everywhere. Tiles, which cut it, need a tensor."""
    return torch.ones(1, 1, *image.shape[-2:]) if args.tile_size else None


def at_layer(mask: Tensor, layer: str) -> Tensor:
    """Average a mask (1, 1, H, W) over the pixels that each position of a layer stands for."""
    return nnf.avg_pool2d(mask, pixels(layer))  # rounds down, as VGG's pooling does


def pixels(layer: str) -> int:
    """Return how many pixels a side a position of the layer stands for: 2 for relu2_1, …"""
    return 2 ** (int(layer[4]) - 1)  # reluB_i comes after B − 1 poolings


def widen(image: Tensor) -> Tensor:
    """Add the margin to an image, by repeating its border."""
    return nnf.pad(image, [MARGIN] * 4, mode="replicate")


def narrow(image: Tensor) -> Tensor:
    """Cut the margin off."""
    return image[..., MARGIN:-MARGIN, MARGIN:-MARGIN]


def enlarge(picture: Tensor, photo: Tensor) -> Tensor:
    """Enlarge a picture to the size of `photo`."""
    return nnf.interpolate(picture, photo.shape[-2:], mode="bicubic").clamp(0, 1)


def shrink(painting: Tensor, factor: float) -> Tensor:
    """Scale a painting by `factor`, to 16 px a side or more: VGG pools four times."""
    return resize(painting, max(factor, 16 / min(painting.shape[-2:])))


def fit(mask: Tensor, image: Tensor, margin: int = 0, mode: str = "bilinear") -> Tensor:
    """Scale a mask, or a picture, on the CPU to the size of an image that has a margin."""
    size = [side - 2 * margin for side in image.shape[-2:]]
    mask = mask.detach().float().cpu()
    scaled = nnf.interpolate(mask, size, mode=mode, antialias=True).clamp(0, 1)
    return nnf.pad(scaled, [margin] * 4, mode="replicate")


def moments(
    images: Sequence[Tensor], alphas: Sequence[Tensor | None], shares: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Compute the mean (C, 1) and the covariance (C, C) of the colours of images (1, C, h, w).

    Each image counts by its share, of 1 in all, and its pixels by its α (1, 1, h, w): what is
    transparent has no colour.
    """
    colors = []
    weights = []
    for image, alpha, share in zip(images, alphas, shares, strict=True):
        counts = torch.ones_like(image[:, :1]) if alpha is None else alpha
        counts = counts.flatten(2)[0].cpu().double()  # (1, h*w)
        colors.append(image.flatten(2)[0].cpu().double())  # (C, h*w)
        weights.append(share * counts / counts.sum().clamp_min(1e-9))
    x = torch.cat(colors, dim=1)  # (C, n)
    w = torch.cat(weights, dim=1)  # (1, n)
    mean = (w * x).sum(1, keepdim=True)
    return mean, (w * (x - mean)) @ (x - mean).T


def match_color(
    image: Tensor,
    targets: Sequence[Tensor],
    shares: Sequence[float] | None = None,
    alpha: Tensor | None = None,
    target_alphas: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Map the colours of an image to the mean and the covariance of those of `targets`.

    Images are (1, 3, h, w) in [0, 1]; the result may leave the range. Targets count by `shares`,
    pixels by α (1, 1, h, w).
    """
    shares = shares or [1 / len(targets) for _ in targets]
    target_alphas = target_alphas or [None for _ in targets]
    mean_x, C_x = moments([image], [alpha], [1])
    mean_s, C_s = moments(targets, target_alphas, shares)
    # 2017, §5.2:  x ↦ A (x − μ_x) + μ_s   (for A, see `monge_map`)
    matched = monge_map(C_x, C_s) @ (image.flatten(2)[0].cpu().double() - mean_x) + mean_s
    return matched.view(image.shape).to(image)


def monge_map(C_x: Tensor, C_s: Tensor) -> Tensor:
    """Return the symmetric A (3, 3) with A C_x Aᵀ = C_s; or near it, if that were more than 3.

    Of all such maps it moves colours least (Pitié & Kokaram 2007).
    """
    # A = C_x^-½ (C_x^½ C_s C_x^½)^½ C_x^-½
    root = power(C_x, 0.5, least=1e-4)  # no less: that would amplify noise
    inverse = power(C_x, -0.5, least=1e-4)
    A = inverse @ power(root @ C_s @ root, 0.5) @ inverse
    # A JPEG has coloured contours in flat areas: more than 3 times would show them.
    return power(A, 1.0, most=3.0)


def power(C: Tensor, exponent: float, least: float = 0.0, most: float = math.inf) -> Tensor:
    """Raise a symmetric matrix to a power, with its eigenvalues clamped first."""
    values, vectors = torch.linalg.eigh(C)
    return vectors * values.clamp(least, most) ** exponent @ vectors.T


def match_luminance(
    style: Tensor, content: Tensor, style_alpha: Tensor | None = None, alpha: Tensor | None = None
) -> Tensor:
    """Turn `style` grey, with the mean and the spread of the luminance of `content`."""
    L_s = luminance(style)
    mean_s, variance_s = moments([L_s], [style_alpha], [1])
    mean_c, variance_c = moments([luminance(content)], [alpha], [1])
    # 2017, §5.1:  L_s' = σ_c/σ_s (L_s − μ_s) + μ_c
    ratio = variance_c.sqrt() / variance_s.sqrt().clamp_min(1e-3)
    matched = ratio.item() * (L_s - mean_s.item()) + mean_c.item()
    return matched.clamp(0, 1).expand_as(style)


def prepare_colors(
    content: Tensor, styles: Sequence[Tensor], args: Namespace
) -> tuple[Tensor, list[Tensor]]:
    """Before painting, give the paintings the photo's colours (`histogram`), or turn all grey."""
    pairs = zip(styles, args.style_alphas, strict=True)
    if args.preserve_color == "histogram":
        recolored = [match_color(style, [content], None, a, [args.alpha]) for style, a in pairs]
        return content, [style.clamp(0, 1) for style in recolored]
    if args.preserve_color == "luminance":
        grey = luminance(content).expand_as(content)
        return grey, [match_luminance(style, content, a, args.alpha) for style, a in pairs]
    return content, list(styles)


def finish(picture: Tensor, content: Tensor, args: Namespace) -> Tensor:
    """After painting, scale a picture to the size of `content`, and give back colours and α."""
    picture = enlarge(picture, content)
    if args.preserve_color == "luminance":
        picture = keep_color(picture, content)
    if args.alpha is not None:
        picture = torch.cat([picture.cpu(), args.alpha], dim=1)
    return picture


# === From here: no paper. The optimiser, large pictures, the command line, files. ================

# --- The optimiser --------------------------------------------------------------------------------


def better(frame: Frame, best: Frame | None) -> bool:
    """Return whether a frame is of a finer scale than the best so far, or of a smaller loss."""
    if best is None or frame[0].shape != best[0].shape:
        return True
    return frame[1]["total"] <= best[1]["total"]


def make_optimizer(z: Tensor, unit: float, args: Namespace) -> torch.optim.Optimizer:
    """Return the optimiser of z, one iteration a call."""
    if args.optimizer == "adam":
        return torch.optim.Adam([z], args.lr / unit)
    history = 5 if args.tile_size else 20
    limits = {"max_iter": 1, "tolerance_grad": 0, "tolerance_change": 0, "history_size": history}
    return torch.optim.LBFGS([z], args.lr, **limits)


@torch.no_grad()
def bound_move(optimizer: torch.optim.LBFGS, z: Tensor, z_before: Tensor, most: float) -> None:
    """Shorten the last move of L-BFGS, so that it changes z by `most` on average.

    Where it knows no curvature, as at the start from a grey photo, it moves by the gradient itself,
    which may be of any size. Where it knows a wrong one, its moves can be as long.
    """
    length = (z - z_before).abs().mean().item()
    if length > most:
        z.copy_(torch.lerp(z_before, z, most / length))
        optimizer.state[z]["t"] *= most / length  # the step that it remembers


def damping_table(x: Tensor, args: Namespace) -> Tensor | None:
    """Return what `smooth` multiplies each frequency of x (1, 3, H, W) with, (H, W/2 + 1).

    The paper changes the pixels themselves. Their gradient is full of grain, and a few iterations
    leave it in the picture. So each frequency is divided by 1 + 5 · cycles per pixel: coarse
    changes come first, and every picture can still be reached (Mordvintsev et al., Distill 2018).
    """
    if args.optimizer == "adam":  # which moves all values alike
        return None
    if args.init == "noise":  # full of high frequencies, which only an undamped change removes
        return None
    fy = torch.fft.fftfreq(x.shape[-2], dtype=torch.float32)
    fx = torch.fft.rfftfreq(x.shape[-1], dtype=torch.float32)  # up to ½
    return (1 / (1 + 5 * torch.hypot(fy[:, None], fx))).to(x.device)


def smooth(z: Tensor, damping: Tensor | None) -> Tensor:
    """Multiply the frequencies of z (1, 3, H, W) with `damping`, as an equaliser does."""
    if damping is None:
        return z
    return torch.fft.irfft2(damping * torch.fft.rfft2(z), s=z.shape[-2:])


# --- Large pictures -------------------------------------------------------------------------------

# Around a tile, in px: relu5_1's receptive field. A multiple of 16, because of the pooling.
OVERLAP = 80
Tile = tuple[int, int, int, int]  # top, bottom, left, right


class TiledObjective:
    """The same losses, of a picture that is too large for the memory.

    Eq. 1 and 3 are sums over positions. So an Objective of its own measures each tile, and what
    they measure is added up.
    """

    def __init__(
        self,
        vgg: VGG,
        photo: Tensor,
        styles: Sequence[Style],
        T_content: Masks,
        T_protected: Masks,
        args: Namespace,
    ) -> None:
        self.parts = []
        for tile in tiles(photo, args.tile_size):
            tile_vgg = partial(tile_maps, vgg, tile)
            tile_styles = [Style(style.A, cut_all(style.T, tile), style.share) for style in styles]
            places = cut_all(T_content, tile), cut_all(T_protected, tile)
            self.parts.append(Objective(tile_vgg, photo, tile_styles, *places, args))

    def __call__(self, x: Tensor) -> Maps:
        """Return the `total` loss of x (1, 3, H, W), and its terms before weighting."""
        L_content = x.new_zeros(())
        L_protected = x.new_zeros(())
        grams: Grams = {}
        for part in self.parts:
            # checkpoint(): the feature maps are forgotten, and computed again for the gradient.
            measured = checkpoint(part.measure, x, use_reentrant=False)
            tile_content, tile_protected, tile_grams = measured
            L_content = L_content + tile_content
            L_protected = L_protected + tile_protected
            for key, G in tile_grams.items():
                grams[key] = grams.get(key, 0) + G
        return self.parts[0].losses(x, L_content, L_protected, grams)


def tiles(image: Tensor, side: int | None) -> list[Tile]:
    """Cut an image into tiles of `side` px; without it, into a single one."""
    rows = cuts(image.shape[-2], side)
    columns = cuts(image.shape[-1], side)
    return [(*row, *column) for row in rows for column in columns]


def cuts(length: int, side: int | None) -> list[tuple[int, int]]:
    """Cut a length into parts of `side` px, (start, end) each.

    The last is longer where less than 16 px would be left over: too few for the pooling.
    """
    starts = [*range(0, max(1, length - 15), side or length)]
    ends = [*starts[1:], length]
    return [*zip(starts, ends, strict=True)]


def cut(maps: Tensor | None, tile: Tile, layer: str) -> Tensor | None:
    """Cut a tile out of what has the size of a layer's maps."""
    if maps is None:
        return None
    top, bottom, left, right = (side // pixels(layer) for side in tile)
    return maps[..., top:bottom, left:right]


def cut_all(masks: Masks, tile: Tile) -> Masks:
    """Cut a tile out of the masks of all layers."""
    return {layer: cut(T, tile, layer) for layer, T in masks.items()}


def tile_maps(vgg: VGG, tile: Tile, image: Tensor, layers: Sequence[str]) -> Maps:
    """Compute the feature maps of a tile, as parts of those of the image."""
    top, bottom, left, right = tile
    deeper = any(layer > "relu5_1" for layer in vgg.layers)
    overlap = 128 if deeper else OVERLAP  # relu5_4's receptive field reaches 118 px
    y = max(0, top - overlap)
    x = max(0, left - overlap)
    maps = vgg(image[..., y : bottom + overlap, x : right + overlap], layers)
    inner = (top - y, bottom - y, left - x, right - x)
    # clone(): a view would keep the whole tile, overlap included, in memory
    return {layer: cut(f, inner, layer).clone() for layer, f in maps.items()}


def network(device: torch.device, args: Namespace) -> VGG:
    """Make VGG up to the layers that are compared, on a device."""
    layers = [*args.content_layers, *args.style_layers]
    if args.protect is not None:
        layers += PROTECTED_LAYERS
    precision = common.pick_precision(args.precision, device)
    return VGG(layers, args.vgg, args.vgg_weights, args.pooling, precision).to(device)


def bytes_a_pixel(content: Tensor, args: Namespace) -> int:
    """Return the memory that painting takes, as measured, for each pixel of `content`."""
    whole = 3000
    if not args.tile_size:
        return whole
    tile = (args.tile_size + 2 * OVERLAP) ** 2 / content[0, 0].numel()
    return round(min(whole, 620 + whole * tile))


# --- The command line -----------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Read the command line; raise InputError on a mistake. Fill in what depends on other flags."""
    number = common.number
    parser = common.ArgumentParser(__doc__, usage="%(prog)s content [style ...] [flags]")

    add = parser.add_argument_group("pictures").add_argument
    add("content", type=Path, help="photo: what to paint; or a folder of photos")
    add("styles", type=Path, nargs="*", metavar="style", help="paintings; several are blended")
    add("--image-size", type=number(int, 1, 16383), default=512, help="result's longer side, in px")
    add("--style-scale", type=number(most=32), default=1.0, help="relative size of the painting")

    add = parser.add_argument_group("losses").add_argument
    add("--content-weight", type=number(), default=1.0, metavar="α", help="α of Eq. 7")
    add("--style-weight", type=number(), default=50.0, metavar="β", help="β of Eq. 7")
    add("--tv-weight", type=number(), default=0.0, help="weight of total variation, for smoothness")
    add("--content-layers", nargs="*", default=[*CONTENT_LAYERS], help="layers of the content loss")
    layers = "layers of the style loss, of relu1_1 … relu5_4; relu5_… are left out at full size"
    add("--style-layers", nargs="*", default=[*STYLE_LAYERS], help=layers)
    weights = f"w_l of Eq. 5 (default: {' '.join(map(str, STYLE_LAYER_WEIGHTS))}; the paper: 0.2)"
    add("--style-layer-weights", nargs="*", type=number(), help=weights)
    add("--style-blend", nargs="*", type=number(), help="share of each style (default: equal ones)")
    add("--pooling", choices=["avg", "max"], default="avg", help="pooling in VGG (paper: avg)")
    networks = "auto: vgg16 if it is available, else vgg19"
    add("--vgg", choices=["vgg19", "vgg16", "auto"], default="vgg19", help=networks)
    add("--vgg-weights", default="auto", help="file of VGG's weights, as torchvision saves them")

    add = parser.add_argument_group("optimisation").add_argument
    add("--optimizer", choices=["lbfgs", "adam"], default="lbfgs", help="the paper's is L-BFGS")
    steps = "steps at 128 px; the next size has a third of them, and each later one a seventh, as"
    steps += " has a picture that --init continues"
    add("--num-steps", type=number(int, 1, 10**6), default=50, help=steps)
    add("--lbfgs-iters", type=number(int, 1, 10**6), default=2, help="iterations in each step")
    scales = "sizes, from 128 px to full (default: each at most twice the one before)"
    add("--scales", type=number(int, 1, 16), help=scales)
    side = "compute in tiles of so many px, to save memory"
    add("--tile-size", type=number(int, 16, 65536), help=side)
    add("--lr", type=number(), help="learning rate (default: 1 for lbfgs, 0.02 for adam)")
    starts = f"{', '.join(STARTS)} (the paper's), or a picture to continue from"
    add("--init", default="recolored", help=starts)
    add("--seed", type=number(int, most=2**63), default=0, help="random seed of the noise")

    add = parser.add_argument_group("regions and colours").add_argument
    masks = "where styles go, in white; the last has the rest"
    add("--style-masks", nargs="*", type=Path, default=(), help=masks)
    add("--preserve-color", choices=["luminance", "histogram"], help="keep the photo's colours")
    add("--protect", metavar="MASK", help="keep the photo where this is white; faces: find them")
    add("--protect-weight", type=number(), default=30.0, help="how strongly it is kept")

    add = parser.add_argument_group("output").add_argument
    add("-o", "--output", type=Path, help="picture, or folder (default: <content>_<style>.png)")
    add("--save-gif", action="store_true", help="write an animation of the steps, <output>.gif")
    add("--save-all", action="store_true", help="write each step's picture to <output>_frames/")
    add("--save-losses", action="store_true", help="write <output>_losses.csv and its plot, .png")
    common.add_device_arguments(parser)
    return complete(parser.parse_intermixed_args(argv))


def complete(args: Namespace) -> Namespace:
    """Fill in the defaults that depend on other arguments, and check those that belong together."""
    many = args.style_blend is None and not args.style_masks
    if args.style_blend is None:
        args.style_blend = [1.0 for _ in args.styles]
    if args.style_layer_weights is None:
        usual = tuple(args.style_layers) == STYLE_LAYERS
        equal = [1 / len(args.style_layers) for _ in args.style_layers]
        args.style_layer_weights = [*STYLE_LAYER_WEIGHTS] if usual else equal
    check(args, many)
    args.style_blend = [share / sum(args.style_blend) for share in args.style_blend]
    args.alpha = None  # (1, 1, H, W), of a photo that is transparent in parts
    args.style_alphas = [None for _ in args.styles]  # (1, 1, h, w) each, of such paintings
    if not args.content_weight:  # nothing to compute
        args.content_layers = []
    if not args.style_weight:
        args.style_layers = []
        args.style_layer_weights = []
    if args.lr is None:
        args.lr = 1.0 if args.optimizer == "lbfgs" else 0.02
    return args


def check(args: Namespace, many: bool) -> None:
    """Raise InputError if arguments do not fit together; `many` paintings need a reason."""

    def demand(fulfilled: object, message: str) -> None:
        if not fulfilled:
            raise InputError(message)

    n = len(args.styles)
    masks = len(args.style_masks)
    layers = len(args.style_layers)
    work = args.content_weight or args.style_weight
    demand(work, "nothing to do: give --content-weight or --style-weight")
    needed = args.style_weight or args.init == "style"
    demand(n or not needed, "a style image is needed, unless --style-weight is 0")
    demand(masks in (0, n - 1, n), f"--style-masks needs one for each of {n} styles, or one less")
    demand(len(args.style_blend) == n, f"--style-blend needs one for each of {n} styles")
    demand(not n or sum(args.style_blend), "--style-blend needs a share that is not 0")
    start = args.init in STARTS or Path(args.init).is_file()
    demand(start, f"--init {args.init} is no file, nor one of {', '.join(STARTS)}")
    advice = "to paint many photos, name their folder; to blend so many paintings, --style-blend"
    demand(n <= 4 or not many, f"{n} styles given: {advice}")
    demand(len({*args.style_layers}) == layers, "--style-layers has a layer twice")
    same = len(args.style_layer_weights) == layers
    demand(same, f"--style-layer-weights needs one for each of {layers} layers")
    whole = not args.tile_size or args.tile_size % 16 == 0  # tiles begin where VGG's pooling does
    demand(whole, f"--tile-size {args.tile_size}: choose a multiple of 16")


FOR_FILES = {"output", "image_size", "style_scale", "device", "save_gif", "save_all", "save_losses"}


def settings(content: Tensor, styles: Sequence[Tensor] = (), **options: object) -> Namespace:
    """Turn the arguments of `stylize` into what `parse_args` returns; InputError on a mistake.

    They are parsed as a command line, so that one place checks them. Where a tensor is given, the
    word `content` holds its place, which every flag accepts; the tensor is put in afterwards.
    """
    if torch.is_inference_mode_enabled():
        raise InputError("painting takes gradients: call it outside of torch.inference_mode()")
    argv = ["content", *("style" for _ in styles)]
    known = vars(parse_args(["content", "style"])).keys() - FOR_FILES
    tensors = {}
    for name, value in options.items():
        if name not in known:
            advice = "options are the flags of gatys.py, but those about files"
            raise InputError(f"unknown option {name}: {advice}")
        if value is None:
            continue
        if name == "init" and not isinstance(value, Tensor) and value not in STARTS:
            value = load_image(value)
        if name in ("init", "style_masks", "protect") and value not in STARTS:
            tensors[name] = value
        words = value if isinstance(value, list | tuple) else [value]
        argv.append(f"--{name.replace('_', '-')}")
        argv += ["content" if name in tensors else str(word) for word in words]
    args = parse_args(argv)
    vars(args).update(tensors)
    colors = [split_alpha(image)[0] for image in (content, *styles)]
    alphas = [split_alpha(image)[1] for image in (content, *styles)]
    starts = [args.init] if isinstance(args.init, Tensor) else []
    common.check_images([*colors, *starts], [*alphas, *args.style_masks])
    if args.protect == "faces":
        args.protect = find_faces(colors[0])
    common.check_images([], [args.protect])
    args.alpha, *args.style_alphas = alphas
    return args


def split_alpha(image: Tensor) -> tuple[Tensor, Tensor | None]:
    """Split (1, 4, H, W) into colours (1, 3, H, W) and α (1, 1, H, W), or None without α."""
    if isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == 4:
        return image[:, :3], image[:, 3:].float().cpu()
    return image, None


def fill(image: Tensor) -> Tensor:
    """Give what is transparent in (1, 4, H, W) the mean of the visible colours: (1, 3, H, W)."""
    colors = image[:, :3].float()
    alpha = image[:, 3:].float()
    if not alpha.numel():  # it has no such channel
        return colors
    mean = (alpha * colors).sum((2, 3), keepdim=True) / alpha.sum().clamp_min(1e-9)
    return torch.lerp(mean.expand_as(colors), colors, alpha)


# --- Files ----------------------------------------------------------------------------------------


def load_mask(path: str | Path) -> Tensor:
    """Read a picture as a mask (1, 1, h, w): its luminance, from 0, black or transparent, to 1."""
    image, _ = next(common.load_frames(path))
    colors, alpha = split_alpha(image)
    mask = luminance(colors)
    if alpha is not None:
        mask = mask * alpha
    if mask.max() - mask.min() < 0.1:
        facts = f"has no contrast: it is {mask.mean():.0%} white everywhere"
        print(f"warning: the mask {path} {facts}", file=sys.stderr)
    return mask


def find_faces(image: Tensor) -> Tensor:
    """Find faces by MTCNN (Zhang et al. 2016); return a mask (1, 1, H, W) of soft ellipses."""
    try:
        from facenet_pytorch import MTCNN
    except ImportError as error:
        install = "pip install requests, and pip install --no-deps facenet-pytorch"
        raise InputError(f"--protect faces needs a detector: {install}") from error
    boxes, _ = MTCNN(keep_all=True).detect(common.to_pil(image))
    mask = torch.zeros(1, 1, *image.shape[-2:])
    if boxes is None:
        print("no face found: nothing is protected", file=sys.stderr)
        return mask
    y = torch.arange(image.shape[-2]).float()[:, None]  # (H, 1)
    x = torch.arange(image.shape[-1]).float()  # (W,)
    for left, top, right, bottom in boxes.astype(float):
        # The box ends at brows, cheeks and chin. So the ellipse is higher than it, and a bit wider.
        dy = (y - (top + bottom) / 2) / (0.7 * (bottom - top))
        dx = (x - (left + right) / 2) / (0.63 * (right - left))
        radius = torch.hypot(dx, dy)  # (H, W), 1 on the ellipse
        mask = torch.maximum(mask, ((1.2 - radius) / 0.4).clamp(0, 1))  # a soft edge
    return mask


def run(args: Namespace, command: Sequence[str]) -> None:
    """Read the paintings and masks; paint the photo, or all of a folder."""
    files = [*args.styles, *args.style_masks]
    size = max(1, round(args.image_size * args.style_scale))
    images = [next(common.load_frames(path, size))[0] for path in args.styles]
    args.style_alphas = [split_alpha(image)[1] for image in images]
    args.style_masks = [load_mask(path) for path in args.style_masks]
    if args.protect not in (None, "faces"):
        files.append(Path(args.protect))
        args.protect = load_mask(args.protect)
    if args.init not in STARTS:
        files.append(Path(args.init))
        args.init = load_image(args.init)
    tag = "_".join(path.stem for path in args.styles) or "inversion"
    pairs = common.plan_outputs([args.content], args.output, tag, animations=False)
    photos = [photo for photo, _ in pairs]
    outputs = []
    for _, output in pairs:
        outputs += [output, *extras(output, args).values()]
    common.check_outputs(outputs, [*photos, *files])
    device = common.pick_device(args.device)
    paintings = [image[:, :3].to(device) for image in images]  # (1, 3, h, w) each
    vgg = network(device, args)
    print(f"computing on {device} in {vgg.precision}", file=sys.stderr)

    def work(photo: Path, output: Path) -> None:
        image, _ = next(common.load_frames(photo, args.image_size))
        content, alpha = split_alpha(image)
        protect = find_faces(content) if args.protect == "faces" else args.protect
        one = vars(args) | {"output": output, "alpha": alpha, "protect": protect}
        paint_file(content.to(device), paintings, vgg, Namespace(**one), command)

    common.for_each(pairs, work, disable=True)  # each photo has a bar of its own


def extras(output: Path, args: Namespace) -> dict[str, Path]:
    """List the files, and the folder, that a run writes beside its picture."""
    wanted = {".gif": args.save_gif, "_frames": args.save_all}
    wanted |= {"_losses.csv": args.save_losses, "_losses.png": args.save_losses}
    stem = output.parent / output.stem
    return {end: Path(f"{stem}{end}") for end, is_wanted in wanted.items() if is_wanted}


@dataclass
class Progress:
    """What there is of a picture so far."""

    steps: int  # in all
    best: Frame | None = None
    best_step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)  # {"step": …, loss: …}
    film: list[Tensor] = field(default_factory=list)  # small pictures for --save-gif


def watch(frames: Iterator[Frame], content: Tensor, args: Namespace, progress: Progress) -> None:
    """Paint, show how far it is, and keep in `progress` what will be written."""
    film_every = math.ceil(progress.steps / 48)
    with tqdm(frames, args.output.name, progress.steps, unit="step") as bar:
        for step, (picture, losses) in enumerate(bar, 1):
            progress.history.append({"step": step, **losses})
            if better((picture, losses), progress.best):
                progress.best = picture, losses
                progress.best_step = step
            text = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
            bar.set_postfix_str(text, refresh=False)
            if args.save_gif and (step == 1 or step % film_every == 0):
                progress.film.append(thumbnail(picture, content, args))
            if args.save_all:
                frame = extras(args.output, args)["_frames"] / f"{step:04d}.png"
                common.save_image(finish(picture, content, args), frame)


def thumbnail(picture: Tensor, content: Tensor, args: Namespace) -> Tensor:
    """Finish a picture, at 384 px or less."""
    small = min(1.0, 384 / max(content.shape[-2:]))
    return resize(finish(picture, content, args), small)


def paint_file(
    content: Tensor, styles: Sequence[Tensor], vgg: VGG, args: Namespace, command: Sequence[str]
) -> None:
    """Paint a photo into `args.output`. Whatever stops it, the best picture so far is written."""
    files = extras(args.output, args)
    if args.save_all:  # of an earlier run
        for old in files["_frames"].glob("[0-9][0-9][0-9][0-9].png"):
            old.unlink()
    steps = sum(scale.steps for scale in plan_scales(content, args))
    progress = Progress(steps, film=[thumbnail(content, content, args)])
    stopped: BaseException | None = None
    try:
        watch(paint(content, styles, vgg, args), content, args, progress)
    except (Exception, KeyboardInterrupt) as error:  # what there is, is saved first
        stopped = error
    if stopped and common.out_of_memory(stopped):
        size = int(0.7 * max(content.shape[-2:]))  # which has half the pixels
        advice = f"about --image-size {size} is likely to fit, or --tile-size 512, or less"
        stopped = InputError(f"out of memory: {advice}")
    if progress.best is None:
        raise stopped
    picture, losses = progress.best
    step = f"{progress.best_step} of {steps}"
    record = common.provenance(command, seed=args.seed, step=step, losses=losses)
    common.save_image(finish(picture, content, args), args.output, record)
    if args.save_losses:
        common.save_losses(progress.history, files["_losses.csv"])
    if args.save_gif:
        film = [*progress.film, thumbnail(picture, content, args)]
        times = [1000.0, *(100.0 for _ in film[2:]), 2000.0]  # ms: the photo, the steps, the result
        common.save_animation(zip(film, times, strict=True), files[".gif"])
    if stopped:
        print(f"stopped: {args.output} holds the picture of step {step}", file=sys.stderr)
        raise SystemExit(130) if isinstance(stopped, KeyboardInterrupt) else stopped


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exit with status 2 on a failure that the user can mend."""
    argv = sys.argv[1:] if argv is None else argv
    with common.one_line_errors():
        run(parse_args(argv), ["python", "gatys.py", *argv])


if __name__ == "__main__":
    main()
