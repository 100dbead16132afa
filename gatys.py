"""Neural style transfer by optimising the pixels of a picture.

    L. A. Gatys, A. S. Ecker, M. Bethge: "Image Style Transfer Using Convolutional Neural Networks", CVPR 2016.

The feature maps of a network trained to recognise objects say what is in a picture. The correlations between them,
which forget where things are, say how it is painted. Start from a picture and change its pixels, by gradient descent
through the network, until its feature maps match the photo's and its correlations match the painting's.

    python gatys.py content.jpg style.jpg                                     # style transfer
    python gatys.py content.jpg style.jpg --content-weight 0 --init noise     # texture synthesis
    python gatys.py content.jpg --style-weight 0 --init noise                 # feature inversion

    x  the picture    F, P  feature maps of x and of the photo         L_content = ½ mean (F − P)²           Eq. 1
                      G, A  Gram matrices of x and of the painting     E_l = ¼ Σ (G_l − A_l)²                Eq. 3, 4
                      L_total = α L_content + β Σ_l w_l E_l, made small by L-BFGS, which changes x           Eq. 5, 7
"""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchvision.transforms.functional import center_crop
from tqdm import tqdm

import common
from common import VGG, InputError, gram_matrix, keep_color, load_image, luminance, pool_mask, rescale, resize

CONTENT_LAYERS = ("relu4_2",)
STYLE_LAYERS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
# w_l of Eq. 5. The paper's are equal. But then relu5_1 has by far the largest gradient, and draws a lattice of dots.
STYLE_LAYER_WEIGHTS = (0.2, 0.45, 0.2, 1.0, 0.02)
STARTS = ("recolored", "content", "style", "noise")
PROTECTED_LAYERS = ("relu1_1", "relu3_1", "relu4_2")  # fine and coarse; what --protect keeps is compared there
MARGIN = 8  # px painted around the picture and cut off in the end: the network pads with zeros, which shows as a frame
Frame = tuple[Tensor, dict[str, float]]  # a picture on the way, (1, 3, H, W) in [0, 1], and its losses

# --- Losses ------------------------------------------------------------------------------------------------


def content_loss(f: Tensor, p: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compare the feature maps F of x and P of the photo, (1, N, H, W); with a mask T, (1, 1, h, w), T∘F and T∘P."""
    # Gatys Eq. 1:  L_content = ½ Σ_ij (F_ij − P_ij)²
    # Here it is the mean: the sum grows with the picture, and Eq. 4 does not. So weights mean the same at every size.
    difference = f.float() - p.float()
    return 0.5 * (difference if mask is None else pool_mask(mask, f) * difference).square().mean()


def style_loss(g: Tensor, a: Tensor) -> Tensor:
    """Compute E_l from the Gram matrices G of x and A of the painting, each (1, N, N)."""
    # Gatys Eq. 3:  G_ij = Σ_k F_ik F_jk
    # Gatys Eq. 4:  E_l = 1/(4 N² M²) Σ_ij (G_ij − A_ij)²   (gram_matrix() has already divided by N·M)
    return 0.25 * (g - a).square().sum()


class Objective:
    """The losses of x at one scale. It holds what x is compared with: P of the photo, and A of each painting.

    Eq. 1 and 3 are sums over positions. So a picture that is too large for the memory can be measured tile by tile.
    Without --tile-size there is one tile, the whole picture: read `portion` as 1, and `part` as its first argument.
    """

    def __init__(self, vgg: VGG, photo: Tensor, paintings: Sequence[Tensor], args: Namespace) -> None:
        self.vgg, self.args, self.tiles, self.P = vgg, args, tiles(photo, args.tile_size), {}
        keep = None if args.protect is None else fit(args.protect, photo, MARGIN)
        self.keep = {} if keep is None else {layer: pool_mask(keep, grid(photo, layer)) for layer in PROTECTED_LAYERS}
        with torch.no_grad():
            A = [painting_grams(vgg, *pair, args) for pair in zip(paintings, args.painting_masks, strict=False)]
            layers = [*args.content_layers, *self.keep]
            for tile in self.tiles:  # copies: a part would hold the whole maps of the tile and what surrounds it
                self.P[tile] = {layer: f.clone() for layer, f in tile_maps(vgg, photo, tile, layers).items()}
        self.styles = []  # of each style: its share, its mask at each layer, its Gram matrices
        for share, T, grams in place_styles(A, photo, keep, args) if A else ():
            self.styles.append((share, {layer: pool_mask(T, grid(photo, layer)) for layer in grams}, grams))

    def measure(self, x: Tensor, tile: Tile) -> list[Tensor]:
        """Return what a tile adds to L_content, to what is protected, and to the Gram matrices of each style."""
        F, P, share = tile_maps(self.vgg, x, tile), self.P[tile], partial(portion, x, tile)
        content = [content_loss(F[layer], P[layer]) * share(layer) for layer in self.args.content_layers]
        kept = [content_loss(F[layer], P[layer], part(T, tile, layer)) * share(layer) for layer, T in self.keep.items()]
        L_content, L_protected = (sum(losses, x.new_zeros(())) / max(1, len(losses)) for losses in (content, kept))
        masks = [(layer, T[layer]) for _, T, _ in self.styles for layer in self.args.style_layers]
        G = [gram_matrix(F[layer], part(T, tile, layer)) * share(layer, T) for layer, T in masks]
        return [L_content, L_protected, *G]

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """Return the `total` loss of x (1, 3, H, W), and its terms `content`, `style`, … before weighting."""
        args, L_style, L_tv, measure = self.args, x.new_zeros(()), x.new_zeros(()), self.measure
        if len(self.tiles) > 1:  # a tile's maps are forgotten, and computed again for the gradient
            measure = partial(checkpoint, self.measure, use_reentrant=False)
        L_content, L_protected, *G = map(sum, zip(*(measure(x, tile) for tile in self.tiles), strict=True))
        # Gatys Eq. 5:  L_style = Σ_l w_l E_l   (of each style)
        for share, _, A in self.styles:
            for layer, w_l in zip(args.style_layers, args.style_layer_weights, strict=False):
                L_style = L_style + share * w_l * style_loss(G.pop(0), A[layer])
        if args.tv_weight:
            L_tv = common.total_variation(x)
        # Gatys Eq. 7:  L_total = α L_content + β L_style   (and two terms that are not in the paper)
        alpha, beta = args.content_weight, args.style_weight
        L_total = alpha * L_content + beta * L_style + args.tv_weight * L_tv + args.protect_weight * L_protected
        losses = {"total": L_total, "content": L_content, "style": L_style, "variation": L_tv}
        return losses | ({"protected": L_protected} if self.keep else {})


# --- Style transfer ----------------------------------------------------------------------------------------


def paint(content: Tensor, styles: Sequence[Tensor], args: Namespace) -> Iterator[Frame]:
    """Paint `content` in the style of `styles`, of any size; yield the picture and its losses after every step."""
    common.check_memory(content, 620 if args.tile_size and args.tile_size < max(content.shape[-2:]) else 3000)
    x = None
    for factor, steps in scale_steps(args, content):
        photo = nnf.pad(resize(content, factor), [MARGIN] * 4, mode="replicate")
        paintings = [resize(style, factor) for style in styles if args.style_layers]
        if x is None:
            vgg = network(content.device, args)
            # The paper (§2) rescales each filter, over many images. Here it is each layer, over the pictures at hand:
            # some filters are silent in all of them, and no factor brings their mean activation to 1.
            images = paintings if vgg.layers == args.style_layers else [photo, *paintings]
            vgg = rescale(vgg, [resize(image, min(1.0, 1024 / max(image.shape))) for image in images])
            x = start(photo, styles, args)
        else:
            x = nnf.interpolate(x, [side - 2 * MARGIN for side in photo.shape[-2:]], mode="bicubic").clamp(0, 1)
            x = nnf.pad(x, [MARGIN] * 4, mode="replicate")
        for picture, losses in optimize(x, Objective(vgg, photo, paintings, args), steps, args):
            x = picture[..., MARGIN:-MARGIN, MARGIN:-MARGIN].clamp(0, 1)
            yield x, losses


def stylize(content: Tensor, styles: Sequence[Tensor] = (), **options: object) -> Tensor:
    """Paint `content` in the style of `styles`, images (1, 3, H, W) in [0, 1], each of any size; return the picture.

    Options are the flags of the command line, as `style_weight=100`; masks are tensors (1, 1, h, w) in [0, 1].
    """
    args = settings(content, styles, **options)
    frames = paint(*prepare_colors(content, styles, args), args)
    best, _ = min(frames, key=lambda frame: (-frame[0].numel(), frame[1]["total"]))  # at full size, the least loss
    return finish(best, content, args)


def start(photo: Tensor, styles: Sequence[Tensor], args: Namespace) -> Tensor:
    """Make the picture to start from, of the photo's size (1, 3, H, W). The paper's is noise, or one of the images."""
    x, (h, w) = photo if args.init in STARTS else load_start(photo, args), photo.shape[-2:]
    if args.init == "recolored" and styles:  # not in the paper: few steps are needed from there
        x = match_color(photo, styles, args.style_blend).clamp(0, 1)
    if args.init == "noise":  # drawn on the CPU, so that every device starts from the same
        x = torch.rand(photo.shape, generator=torch.Generator().manual_seed(args.seed)).to(photo)
    if args.init == "style":
        cover = max(h / styles[0].shape[-2], w / styles[0].shape[-1])
        x = center_crop(resize(styles[0], cover, math.ceil), [h, w])
    return x if args.protect is None else torch.lerp(x, photo, fit(args.protect, photo, MARGIN).to(x))


def optimize(x: Tensor, objective: Callable[[Tensor], dict], num_steps: int, args: Namespace) -> Iterator[Frame]:
    """Change the picture x (1, 3, H, W) so that `objective(x)["total"]` falls; yield it and its losses after each step.

    A step is `args.lbfgs_iters` iterations of the optimiser, each one evaluation of the objective and its gradient.
    """
    # The first move of torch's L-BFGS changes all values by 1 in sum. In this unit that is 1/100 of white each.
    unit = x.numel() / 100
    # L-BFGS ignores curvatures below 1e-10. With this gain every loss starts at 1e6, far from there.
    gain, losses = None, {}
    # Noise is full of high frequencies, and only an undamped change removes them. Adam moves all values alike.
    damping = 10.0 if args.optimizer == "lbfgs" and args.init != "noise" else 0.0
    x_0, z = x, torch.zeros_like(x, memory_format=torch.contiguous_format, requires_grad=True)
    method: torch.optim.Optimizer = torch.optim.Adam([z], args.lr / unit)
    n = calls = args.lbfgs_iters
    if args.optimizer == "lbfgs":  # which does all iterations of a step in one call
        limits = {"max_iter": n, "max_eval": 2 * n, "tolerance_grad": 0, "tolerance_change": 0}
        method = torch.optim.LBFGS([z], args.lr, **limits, history_size=5 if args.tile_size else 20)
        calls = 1

    def closure() -> Tensor:
        nonlocal x, losses, gain
        method.zero_grad()
        x = x_0 + unit * smooth(z, damping)  # not clamped: that would cut off the gradient of pixels beyond [0, 1]
        losses = objective(x)
        gain = 1e6 / losses["total"].detach().clamp_min(1e-6) if gain is None else gain
        (gain * losses["total"]).backward()
        return gain * losses["total"].detach()

    for step in range(1, num_steps + 1):
        for _ in range(calls):
            method.step(closure)
        values = torch.stack(list(losses.values())).tolist()
        if not all(map(math.isfinite, values)):
            raise InputError(f"the loss is no longer finite in step {step}: try a smaller --lr, or smaller weights")
        yield x.detach(), dict(zip(losses, values, strict=True))


def smooth(z: Tensor, damping: float) -> Tensor:
    """Divide each frequency of z (1, 3, H, W) by 1 + damping · cycles per pixel, as an equaliser does.

    The paper changes the pixels themselves. Their gradient is full of grain, which few iterations leave. With this,
    coarse changes come first, and every picture can still be reached (Mordvintsev et al., Distill 2018).
    """
    if damping == 0:
        return z
    fy, fx = torch.fft.fftfreq(z.shape[-2]), torch.fft.rfftfreq(z.shape[-1])
    gains = 1 / (1 + damping * torch.hypot(fy[:, None], fx)).to(z.device)  # of frequencies up to ½: (H, W/2 + 1)
    return torch.fft.irfft2(gains * torch.fft.rfft2(z), s=z.shape[-2:])


# === Nothing below is in the paper: scales, masks and colours (Gatys et al. 2017), files, the command line. ===

load_vgg = lru_cache(maxsize=1)(lambda device, *options: VGG(*options).to(device))  # once for many photos


def network(device: torch.device, args: Namespace) -> VGG:
    """Make VGG up to the layers that are compared, on a device."""
    layers = *args.content_layers, *args.style_layers, *(() if args.protect is None else PROTECTED_LAYERS)
    precision = common.pick_precision(args.precision, device)
    return load_vgg(device, layers, args.vgg, args.vgg_weights, args.pooling, precision)


def scale_steps(args: Namespace, content: Tensor) -> list[tuple[float, int]]:
    """Plan the scales from coarse to fine, …, ¼, ½, 1 (2017, §6), and the steps of each; one scale is the paper's."""
    coarser = max(0, math.floor(math.log2(max(content.shape[-2:]) / 192)))  # from 192 px or more
    coarser = coarser if args.init in STARTS else 0  # which would lose the details of a picture to continue from
    return [(0.5**k, 2**k * args.num_steps) for k in reversed(range(args.scales or 1 + coarser))]


OVERLAP = 80  # px around a tile: as far as relu5_1 sees. It is a multiple of 16, as is a tile, because of the pooling
Tile = tuple[int, int, int, int]  # top, bottom, left, right


def tiles(image: Tensor, side: int | None) -> list[Tile]:
    """Cut an image into tiles of `side` px, or a little more at its ends; without it, into a single one."""
    ends = []
    for length in image.shape[-2:]:
        starts = [*range(0, max(1, length - 15), side or length)]
        ends.append([*zip(starts, [*starts[1:], length], strict=True)])
    return [(*rows, *columns) for rows in ends[0] for columns in ends[1]]


def part(maps: Tensor | None, tile: Tile, layer: str) -> Tensor | None:
    """Cut a tile out of what has the size of a layer's maps: reluB_i comes after B − 1 poolings."""
    top, bottom, left, right = (side // 2 ** (int(layer[4]) - 1) for side in tile)
    return None if maps is None else maps[..., top:bottom, left:right]


def tile_maps(vgg: VGG, image: Tensor, tile: Tile, layers: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Compute the feature maps of a tile, with what surrounds it: as parts of those of the image."""
    top, bottom, left, right = tile
    overlap = OVERLAP if max(vgg.layers) <= "relu5_1" else 128  # relu5_4 sees 118 px
    y, x = max(0, top - overlap), max(0, left - overlap)
    maps = vgg(image[..., y : bottom + overlap, x : right + overlap], layers)
    return {layer: part(f, (top - y, bottom - y, left - x, right - x), layer) for layer, f in maps.items()}


def grid(image: Tensor, layer: str) -> Tensor:
    """Take every k-th pixel of an image (1, C, H, W): as many as a layer's maps have positions."""
    k = 2 ** (int(layer[4]) - 1)
    return image[..., k - 1 :: k, k - 1 :: k]


def portion(image: Tensor, tile: Tile, layer: str, T: Tensor | None = None) -> Tensor:
    """Tell how much of all positions of a layer's maps, or of a mask T over them, lies in a tile."""
    weight = torch.ones_like(grid(image, layer)[:, :1]) if T is None else T.square()
    return part(weight, tile, layer).sum() / weight.sum().clamp_min(1e-6)


def painting_grams(vgg: VGG, painting: Tensor, mask: Tensor | None, args: Namespace) -> dict[str, Tensor]:
    """Compute A, the Gram matrices of a painting."""
    A: dict[str, Tensor] = {}
    for tile in tiles(painting, args.tile_size):
        for layer, f in tile_maps(vgg, painting, tile, args.style_layers).items():
            T = pool_mask(None if mask is None else fit(mask, painting), grid(painting, layer))
            A[layer] = A.get(layer, 0) + gram_matrix(f, part(T, tile, layer)) * portion(painting, tile, layer, T)
    return A


def fit(mask: Tensor, image: Tensor, margin: int = 0, mode: str = "bilinear") -> Tensor:
    """Scale a mask (1, 1, h, w), or a picture, to the size of an image that has a margin; leave it on the CPU."""
    size = [side - 2 * margin for side in image.shape[-2:]]
    mask = nnf.interpolate(mask.detach().float().cpu(), size, mode=mode, antialias=True).clamp(0, 1)
    return nnf.pad(mask, [margin] * 4, mode="replicate")


def place_styles(A: Sequence[dict], photo: Tensor, keep: Tensor | None, args: Namespace) -> list[tuple]:
    """Decide where styles go; return of each its share of the loss, its mask (None: everywhere), its Gram matrices."""
    free = torch.ones(1, 1, *photo.shape[-2:]) if keep is None else 1 - keep
    if args.alpha is not None:
        free = free * fit(args.alpha, photo, MARGIN)
    T = [fit(mask, photo, MARGIN) for mask in args.style_masks]
    if not T:
        # Σ_s b_s ‖G − A_s‖² = ‖G − Σ_s b_s A_s‖² + a constant: to blend styles is to blend their Gram matrices.
        blended = {layer: sum(b * a[layer] for b, a in zip(args.style_blend, A, strict=True)) for layer in A[0]}
        return [(free.mean().item(), None if keep is None and args.alpha is None else free, blended)]
    if len(T) < len(A):
        T.append((1 - sum(T)).clamp(0, 1))  # the last style goes where the others leave room
    covered = (sum(T).clamp(max=1) * free).mean().item()  # the sum of all shares
    T = [free * t for t in T]
    parts = [b * t.mean().item() for b, t in zip(args.style_blend, T, strict=True)]
    return [(covered * part / max(sum(parts), 1e-9), t, a) for part, t, a in zip(parts, T, A, strict=True)]


def match_color(image: Tensor, targets: Sequence[Tensor], shares: Sequence[float] | None = None) -> Tensor:
    """Map the colours of an image to the mean and the covariance of those of `targets`, which count by `shares`."""

    def statistics(images: Sequence[Tensor], shares: Sequence[float]) -> tuple[Tensor, Tensor]:
        pixels = [image.flatten(2)[0].cpu().double() for image in images]  # (3, H*W)
        mean = sum(b * p.mean(1, keepdim=True) for b, p in zip(shares, pixels, strict=True))
        return mean, sum(b * (p - mean) @ (p - mean).T / p.shape[1] for b, p in zip(shares, pixels, strict=True))

    def power(C: Tensor, exponent: float, least: float, most: float = math.inf) -> Tensor:
        values, vectors = torch.linalg.eigh(C)
        return vectors * values.clamp(least, most) ** exponent @ vectors.T

    # 2017, §5.2:  x ↦ A x + b  with A C_x Aᵀ = C_s. Of all such A the symmetric one moves colours least: the linear
    # Monge map (Pitié & Kokaram 2007),  A = C_x^-½ (C_x^½ C_s C_x^½)^½ C_x^-½
    mean_x, C_x = statistics([image], [1.0])
    mean_s, C_s = statistics(targets, shares or [1 / len(targets) for _ in targets])
    root, inverse = (power(C_x, exponent, 1e-4) for exponent in (0.5, -0.5))  # no less: that would amplify noise
    A = inverse @ power(root @ C_s @ root, 0.5, 0.0) @ inverse
    A = power(A, 1.0, 0.0, most=3.0)  # a larger gain makes coloured contours of what a JPEG has in flat areas
    matched = A @ (image.flatten(2)[0].cpu().double() - mean_x) + mean_s
    return matched.view(image.shape).to(image)


def prepare_colors(content: Tensor, styles: Sequence[Tensor], args: Namespace) -> tuple[Tensor, Sequence[Tensor]]:
    """Before painting, give the paintings the photo's colours (`histogram`), or turn all grey (`luminance`)."""
    if args.preserve_color == "histogram":
        return content, [match_color(style, [content]).clamp(0, 1) for style in styles]
    if args.preserve_color == "luminance":
        return luminance(content).expand_as(content), [match_luminance(style, content) for style in styles]
    return content, styles


def match_luminance(style: Tensor, content: Tensor) -> Tensor:
    """Turn `style` grey, with the mean and the standard deviation of the luminance of `content`, both (1, 3, h, w)."""
    L_s, L_c = luminance(style), luminance(content)
    # 2017, §5.1:  L_s' = σ_c/σ_s (L_s − μ_s) + μ_c
    return (L_c.std() / L_s.std().clamp_min(1e-3) * (L_s - L_s.mean()) + L_c.mean()).clamp(0, 1).expand_as(style)


def finish(picture: Tensor, content: Tensor, args: Namespace) -> Tensor:
    """After painting, scale a picture to the size of `content`; give back colours, if it is grey, and transparency."""
    if picture.shape != content.shape:
        picture = nnf.interpolate(picture, content.shape[-2:], mode="bicubic").clamp(0, 1)
    picture = keep_color(picture, content) if args.preserve_color == "luminance" else picture
    return picture if args.alpha is None else torch.cat([picture.cpu(), args.alpha], dim=1)


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Read the command line; raise InputError on a mistake. Defaults that depend on other flags are filled in."""
    parser = common.ArgumentParser(__doc__, usage="%(prog)s content [style ...] [flags]")
    add, number = parser.add_argument, common.number
    masks = {"nargs": "+", "type": Path, "metavar": "MASK", "default": ()}
    add = parser.add_argument_group("pictures").add_argument
    add("content", type=Path, help="photo: what to paint; or a folder of photos")
    add("styles", type=Path, nargs="*", metavar="style", help="painting: how to paint it; several are blended")
    add("--image-size", type=number(int, 1, 16383), default=512, help="longer side of the result, in px")
    add("--center-crop", action="store_true", help="crop all images to their central square first")
    add("--style-scale", type=number(most=32), default=1.0, help="size of the painting, relative to the result")
    add = parser.add_argument_group("losses").add_argument
    add("--content-weight", type=number(), default=1.0, metavar="α", help="α of Eq. 7")
    add("--style-weight", type=number(), default=30.0, metavar="β", help="β of Eq. 7")
    add("--tv-weight", type=number(), default=0.0, help="weight of total variation, for smoothness")
    add("--content-layers", nargs="+", default=CONTENT_LAYERS, metavar="LAYER", help="layers of the content loss")
    layers = "layers of the style loss, of relu1_1 … relu5_4"
    add("--style-layers", nargs="+", default=STYLE_LAYERS, metavar="LAYER", help=layers)
    weights = f"w_l of Eq. 5 (default: {' '.join(map(str, STYLE_LAYER_WEIGHTS))}; the paper: 0.2 each)"
    add("--style-layer-weights", nargs="+", type=number(), metavar="W", help=weights)
    add("--style-blend", nargs="+", type=number(), metavar="SHARE", help="share of each style (default: equal ones)")
    add("--pooling", choices=["avg", "max"], default="avg", help="of VGG; the paper's is avg")
    add("--vgg", choices=["vgg19", "vgg16", "auto"], default="vgg19", help="auto: vgg16 if it can be had, else vgg19")
    add("--vgg-weights", default="auto", metavar="FILE", help="of VGG, as torchvision saves them")
    add = parser.add_argument_group("optimisation").add_argument
    add("--optimizer", choices=["lbfgs", "adam"], default="lbfgs", help="the paper's is L-BFGS")
    add("--num-steps", type=number(int, 1, 10**6), default=7, help="steps; at each coarser size twice as many")
    add("--lbfgs-iters", type=number(int, 1, 10**6), default=2, help="iterations of L-BFGS, or Adam, in each step")
    scales = "sizes, each half the next (default: down to 192 px)"
    add("--scales", type=lambda text: None if text == "auto" else number(int, 1, 16)(text), help=scales)
    add("--tile-size", type=number(int, 16, 65536), help="compute in parts of so many px, to save memory")
    add("--lr", type=number(), help="learning rate (default: 1 for lbfgs, 0.02 for adam)")
    add("--init", default="recolored", help=f"{', '.join(STARTS)} (the paper's), or a picture to continue from")
    add("--seed", type=number(int, most=2**63), default=0, help="of the white noise")
    add = parser.add_argument_group("regions and colours").add_argument
    add("--style-masks", **masks, help="where styles go, in white; the last has the rest")
    add("--painting-masks", **masks, help="from where in each painting its style is taken")
    add("--preserve-color", choices=["luminance", "histogram"], help="keep the photo's colours (default: the style's)")
    add("--protect", metavar="MASK", help="keep the photo where this is white; faces: find them")
    add("--protect-weight", type=number(), default=30.0, help="how strongly it is kept")
    add = parser.add_argument_group("output").add_argument
    add("-o", "--output", type=Path, help="picture, or folder (default: <content>_<style>.png)")
    add("--save-gif", action="store_true", help="write the optimisation as an animation, <output>.gif")
    add("--save-all", action="store_true", help="write the picture of every step to <output>_frames/")
    add("--save-losses", action="store_true", help="write <output>_losses.csv and its plot, .png")
    common.add_device_arguments(parser)
    args = parser.parse_intermixed_args(argv)
    n, equal = len(args.styles), [1 / len(args.style_layers) for _ in args.style_layers]
    advice = "to paint many photos, name their folder; to blend so many paintings, give --style-blend"
    blend = args.style_blend or [1.0 for _ in args.styles]
    weights = args.style_layer_weights or (STYLE_LAYER_WEIGHTS if tuple(args.style_layers) == STYLE_LAYERS else equal)
    for mistaken, message in (
        (not args.content_weight + args.style_weight, "nothing to do: give --content-weight or --style-weight"),
        (not n and (args.style_weight or args.init == "style"), "a style image is needed, unless --style-weight is 0"),
        (len(args.style_masks) not in (0, n - 1, n), f"--style-masks needs one for each of {n} styles, or one less"),
        (len(args.painting_masks) not in (0, n), f"--painting-masks needs one for each of {n} styles"),
        (len(blend) != n or (n and not sum(blend)), f"--style-blend needs one for each of {n} styles, not all 0"),
        (args.init not in STARTS and not Path(args.init).is_file(), f"--init {args.init} is no file, nor of {STARTS}"),
        (n > 4 and not (args.style_blend or args.style_masks or args.painting_masks), f"{n} styles given: {advice}"),
        (len(weights) != len(equal), f"--style-layer-weights needs one for each of {len(equal)} layers"),
        (args.tile_size and args.tile_size % 16, f"--tile-size {args.tile_size}: choose a multiple of 16"),
    ):
        if mistaken:
            raise InputError(message)
    args.alpha = None  # (1, 1, H, W), of a photo that is transparent in parts
    args.style_blend, args.style_layer_weights = [share / sum(blend) for share in blend], list(weights)
    args.painting_masks = args.painting_masks or [None for _ in args.styles]
    args.content_layers = list(args.content_layers) if args.content_weight else []  # no weight: nothing to compute
    args.style_layers = list(args.style_layers) if args.style_weight else []
    if args.lr is None:
        args.lr = 1.0 if args.optimizer == "lbfgs" else 0.02
    if args.output is None:
        tag, many = "_".join(path.stem for path in args.styles) or "inversion", args.content.is_dir()
        args.output = Path(f"{args.content.resolve().name}_{tag}" if many else f"{args.content.stem}_{tag}.png")
    return args


def settings(content: Tensor, styles: Sequence[Tensor] = (), **options: object) -> Namespace:
    """Turn the arguments of `stylize` into what `parse_args` returns for such flags; raise InputError on a mistake."""
    if torch.is_inference_mode_enabled():
        raise InputError("painting takes gradients: call it outside of torch.inference_mode()")
    argv, known = ["content", *["style" for _ in styles]], vars(parse_args(["content", "style"]))
    for_files = ("content", "styles", "output", "image_size", "center_crop", "style_scale", "device")
    tensors, options = {}, {"style_blend": [1.0 for _ in styles]} | options
    for name, value in options.items():
        if name not in known or name in for_files or name.startswith("save"):
            raise InputError(f"unknown option {name}: options are the flags of gatys.py, but those about files")
        values = value if isinstance(value, list | tuple) else [] if value is None else [value]
        picture = name in ("init", "style_masks", "painting_masks", "protect") and not isinstance(value, str | Path)
        if values and picture:
            tensors[name], values = value, ["content" for _ in values]
        argv += [f"--{name.replace('_', '-')}", *map(str, values)] if values else []
    args = parse_args(argv)
    vars(args).update(tensors)
    starts = [args.init] if "init" in tensors else []
    common.check_images([content, *styles, *starts], [*args.style_masks, *args.painting_masks, args.protect])
    return args


def load_start(photo: Tensor, args: Namespace) -> Tensor:
    """Scale the picture that --init names to the size of `photo`, which has a margin; say so if that stretches it."""
    image = load_image(args.init, None, args.center_crop) if isinstance(args.init, str) else args.init
    (h, w), (rows, columns) = (side - 2 * MARGIN for side in photo.shape[-2:]), image.shape[-2:]
    if abs(rows * w - columns * h) > max(h, w) + max(rows, columns):  # by more than a pixel
        tqdm.write(f"warning: --init, {columns}×{rows} px, is stretched to the photo's {w}×{h} px", file=sys.stderr)
    grey = args.preserve_color == "luminance"  # as the photo is
    return fit(luminance(image) if grey else image, photo, MARGIN, "bicubic").to(photo).expand_as(photo)


def load_mask(path: Path, center_crop: bool = False) -> Tensor:
    """Read a picture as a mask (1, 1, h, w): its luminance, from 0, black or transparent, to 1, white."""
    image, _ = next(common.load_frames(path, None, center_crop))
    mask = torch.cat([luminance(image[:, :3]), image[:, 3:]], dim=1).prod(1, keepdim=True)  # α may be absent
    if mask.max() - mask.min() < 0.1:
        print(f"warning: the mask {path} has no contrast: it is {mask.mean():.0%} white everywhere", file=sys.stderr)
    return mask


def find_faces(image: Tensor) -> Tensor:
    """Return a mask (1, 1, H, W) with a soft ellipse on each face in `image`, found by MTCNN (Zhang et al. 2016)."""
    try:
        from facenet_pytorch import MTCNN
    except ImportError as error:
        install = "pip install requests, and pip install --no-deps facenet-pytorch"
        raise InputError(f"--protect faces needs a detector: {install}") from error
    boxes, _ = MTCNN(keep_all=True).detect(common.to_pil(image))
    if boxes is None:
        print("no face found: nothing is protected", file=sys.stderr)
    mask = torch.zeros(1, 1, *image.shape[-2:])
    y, x = (torch.arange(side).float() for side in image.shape[-2:])
    for left, top, right, bottom in () if boxes is None else boxes.astype(float):
        # The box ends at brows and chin: an ellipse of 1.4 times its sides, half faded 0.2 further out
        dx, dy = (x - (left + right) / 2) / (right - left), (y - (top + bottom) / 2) / (bottom - top)
        mask = torch.maximum(mask, ((1.2 - torch.hypot(dx, dy[:, None]) / 0.7) / 0.4).clamp(0, 1))
    return mask


def load_inputs(args: Namespace) -> list[Tensor]:
    """Read the paintings, each (1, 3, h, w), and in `args` the masks and the start, in place of their files' names."""
    size, crop = max(1, round(args.image_size * args.style_scale)), args.center_crop
    paintings = [next(common.load_frames(path, size, crop))[0] for path in args.styles]
    args.style_masks = [load_mask(path, crop) for path in args.style_masks]
    args.painting_masks = [path and load_mask(path, crop) for path in args.painting_masks]
    for i, painting in enumerate(paintings):
        if painting.shape[1] == 4:  # what is transparent has no style
            alpha, mask = painting[:, 3:], args.painting_masks[i]
            args.painting_masks[i] = alpha if mask is None else alpha * fit(mask, alpha)
    args.protect = args.protect if args.protect in (None, "faces") else load_mask(Path(args.protect), crop)
    args.init = args.init if args.init in STARTS else load_image(args.init, None, crop)
    return [painting[:, :3] for painting in paintings]


def run(args: Namespace, command: Sequence[str]) -> None:
    """Paint the photo, or all of a folder."""
    planned = common.plan_outputs([args.content], args.output, "")
    pairs = [(photo, to.with_suffix(".png") if to.suffix == ".gif" else to) for photo, to in planned]  # not animated
    files = (*args.styles, *args.style_masks, *args.painting_masks, args.protect, args.init)
    taken = [Path(file) for file in files if file not in (None, "faces", *STARTS)]
    saved = {".gif": args.save_gif, "_frames": args.save_all}
    saved |= {"_losses.csv": args.save_losses, "_losses.png": args.save_losses}
    device = common.pick_device(args.device)
    paintings = [painting.to(device) for painting in load_inputs(args)]
    print(f"computing on {device} in {common.pick_precision(args.precision, device)}", file=sys.stderr)

    def work(photo: Path, output: Path) -> None:
        outputs = {end: Path(f"{output.parent / output.stem}{end}") for end, wanted in saved.items() if wanted}
        common.check_outputs([output, *outputs.values()], [photo, *taken], common.FORMATS)
        taken.extend([output, *outputs.values()])
        image, _ = next(common.load_frames(photo, args.image_size, args.center_crop))
        content, alpha = image[:, :3].to(device), image[:, 3:] if image.shape[1] == 4 else None
        protect = find_faces(content) if args.protect == "faces" else args.protect
        one = {"output": output, "title": photo.name, "alpha": alpha, "protect": protect}
        paint_file(content, paintings, Namespace(**vars(args) | one), outputs, command)

    network(device, args)  # if there is none, no photo can be painted
    common.for_each(pairs, work, disable=True)  # each photo has a bar of its own


def paint_file(content: Tensor, styles: Sequence[Tensor], args: Namespace, extras: dict, command: Sequence) -> None:
    """Paint a photo into `args.output` and `extras`. Whatever stops it, the best picture so far is written."""
    for old in extras["_frames"].glob("[0-9][0-9][0-9][0-9].png") if args.save_all else ():  # of an earlier run
        old.unlink()
    steps, small = sum(steps for _, steps in scale_steps(args, content)), min(1.0, 384 / max(content.shape[-2:]))
    frames = [resize(finish(content, content, args), small)]
    best, best_step, losses, history, stopped = None, 0, {}, [], None
    try:
        with tqdm(paint(*prepare_colors(content, styles, args), args), args.title, steps, unit="step") as bar:
            for step, (picture, terms) in enumerate(bar, 1):
                history.append({"step": step, **terms})
                if best is None or picture.shape != best.shape or terms["total"] <= losses["total"]:
                    best, best_step, losses = picture, step, terms
                bar.set_postfix_str(", ".join(f"{name} {value:.4g}" for name, value in terms.items()), refresh=False)
                if args.save_gif and (step == 1 or step % math.ceil(steps / 48) == 0):
                    frames.append(resize(finish(picture, content, args), small))
                if args.save_all:
                    common.save_image(finish(picture, content, args), extras["_frames"] / f"{step:04d}.png")
    except (Exception, KeyboardInterrupt) as error:  # what there is, is saved first
        stopped = error
    if stopped and common.out_of_memory(stopped):
        size = int(0.7 * max(content.shape[-2:]))  # which has half the pixels
        stopped = InputError(f"out of memory: about --image-size {size} is likely to fit, or --tile-size 512, or less")
    if best is None:
        raise stopped
    record = common.provenance(command, seed=args.seed, step=f"{best_step} of {steps}", losses=losses)
    common.save_image(finish(best, content, args), args.output, record)
    if args.save_losses:
        common.save_losses(history, extras["_losses.csv"])
    if args.save_gif:
        frames[:1] = [torch.lerp(frames[0], frames[1], k / 8) for k in range(8)]  # from the photo
        shown = [(frame, 100.0) for frame in frames]
        common.save_animation([*shown, (resize(finish(best, content, args), small), 2000.0)], extras[".gif"])
    if stopped:
        print(f"stopped: {args.output} holds the picture of step {best_step} of {steps}", file=sys.stderr)
        raise SystemExit(130) if isinstance(stopped, KeyboardInterrupt) else stopped


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exit with status 2 on a failure that the user can mend."""
    with common.one_line_errors():
        run(parse_args(argv), ["python", "gatys.py", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    main()
