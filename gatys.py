"""Neural style transfer by optimising the pixels of a picture.

    L. A. Gatys, A. S. Ecker, M. Bethge: "Image Style Transfer Using Convolutional Neural Networks", CVPR 2016.

The feature maps F_l of a network trained to recognise objects describe what is in a picture; the correlations G_l
between them, which forget where things are, describe how it is painted. Start from the content photo and change its
pixels, by gradient descent through the network, until its F matches the photo's and its G the painting's.

    python gatys.py content.jpg style.jpg                                     # style transfer
    python gatys.py content.jpg style.jpg --content-weight 0 --init noise     # texture synthesis
    python gatys.py content.jpg --style-weight 0 --init noise                 # feature inversion

Where this departs from the paper:

- The content loss is a mean, where Eq. 1 is a sum, which grows with the picture while Eq. 4 does not. So the weights
  mean the same at every size (the authors' own notebook does likewise).
- The network is rescaled by one factor a layer, not one a filter, over the two pictures at hand, not ImageNet: over
  two pictures some filters stay silent, and no factor brings their mean activation to 1.
- The painting keeps its aspect ratio, and its size relative to the photo is a parameter.
- A margin of 8 px is painted around the picture and cut off in the end: the network pads with zeros, and that shows as
  a frame.
- High frequencies count less in what the optimisation changes than they do in pixels, unless it starts from noise: flat
  areas keep less grain after as many iterations.
- The optimisation starts from the content photo in the colours of the painting (`--init noise` is the paper's) and goes
  from coarse to fine (`--scales 1` is the paper's), both as in Gatys et al., "Controlling Perceptual Factors in Neural
  Style Transfer", CVPR 2017: large shapes of the style are found at low resolution, in a fraction of the time.
"""

from __future__ import annotations

import argparse
import inspect
import io
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import center_crop
from tqdm import tqdm

from common import (
    FORMATS,
    VGG,
    ArgumentParser,
    InputError,
    add_device_arguments,
    autocast,
    catching_interrupts,
    check_outputs,
    gram_matrix,
    keep_color,
    load_image,
    luminance,
    number,
    one_line_errors,
    out_of_memory,
    pick_device,
    pick_precision,
    provenance,
    rescale,
    save_image,
    save_losses,
    say,
    to_pil,
    write_file,
)

CONTENT_LAYERS = ("relu4_2",)
PROTECTED_LAYERS = ("relu1_1", "relu3_1", "relu4_2")
STYLE_LAYERS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
MARGIN = 8  # px around the picture, cut off in the end: there the zero padding of the network paints a frame

# --- Losses ------------------------------------------------------------------------------------------------


def content_loss(f: Tensor, p: Tensor) -> Tensor:
    """Half the mean squared difference of the feature maps F of the picture and P of the photo, each (1, N, H, W)."""
    # Gatys Eq. 1:  L_content = ½ Σ_ij (F_ij − P_ij)²   (here the mean over i, j in place of the sum)
    return 0.5 * (f.float() - p.float()).square().mean()


def style_loss(g: Tensor, a: Tensor) -> Tensor:
    """E_l, from the Gram matrices G of the picture and A of the painting, each (1, N, N), and over its own M."""
    # Gatys Eq. 3:  G_ij = Σ_k F_ik F_jk
    # Gatys Eq. 4:  E_l = 1/(4 N² M²) Σ_ij (G_ij − A_ij)²   (gram_matrix() has already divided by N·M)
    return 0.25 * (g - a).square().sum()


def total_variation(x: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels of x (1, 3, H, W): a smoothness term that the paper has not."""
    return (x[..., 1:, :] - x[..., :-1, :]).square().mean() + (x[..., 1:] - x[..., :-1]).square().mean()


def guide(f: Tensor, T: Tensor | None) -> Tensor:
    """The feature maps F_r of a region r, out of f (1, N, h, w); T (1, 1, H, W) is its mask, None for everywhere."""
    if T is None:
        return f
    f, T = under(T, f)
    # Gatys et al. 2017, Eq. 4:  F_r = T_r ∘ F  with Σ_i T_r,i² = 1   (here M, as gram_matrix() divides by N·M)
    F_r = f * (T * (T.numel() / T.square().sum().clamp_min(1e-6)).sqrt()).to(f.dtype)
    return F_r.mT.unsqueeze(-1)  # (1, N, M, 1)


def under(T: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """What a mask T (1, 1, H, W) shows of f (1, N, h, w), as (1, M, N), and T there, (1, M, 1): black takes no time."""
    t = nnf.adaptive_avg_pool2d(T, f.shape[-2:]).flatten()
    shown = t.nonzero().flatten() if t.any() else t.new_zeros(1, dtype=torch.long)
    return f.flatten(2).mT.index_select(1, shown), t[shown].view(1, -1, 1)


class Region(NamedTuple):
    """A part of the picture that gets a style of its own, or all of it."""

    T: Tensor | None  # its mask (1, 1, H, W), from 0 to 1
    share: float  # its weight: how much of the picture it is
    A: dict[str, Tensor]  # the Gram matrices of its style at the style layers


def divide(
    photo: Tensor,
    A: Sequence[dict[str, Tensor]],
    blend: Sequence[float],
    style_masks: Sequence[Tensor] = (),
    keep: Tensor | None = None,
) -> list[Region]:
    """Which style goes where in the photo (1, 3, H, W): all of them everywhere, or each under its mask; none in `keep`.

    A has the Gram matrices of each style at the style layers, `blend` the share of each.
    """
    if not style_masks:
        # Σ_s b_s ‖G − A_s‖² = ‖G − Σ_s b_s A_s‖² + constant: blending Gram matrices is blending losses.
        A = [{layer: sum(b * G[layer] for b, G in zip(blend, A, strict=True)) for layer in A[0]}] if A else []
    T = [on(mask, photo) for mask in style_masks] or [None if keep is None else torch.ones_like(keep)] * len(A)
    if len(T) < len(A):
        T.append((1 - sum(T)).clamp(0, 1))  # the last one gets the rest
    T = T if keep is None else [(1 - keep) * t for t in T]
    return [Region(t, 1.0 if t is None else t.square().mean().item(), a) for t, a in zip(T, A, strict=True)]


def total_loss(
    x: Tensor,
    F: dict[str, Tensor],
    P: dict[str, Tensor],
    regions: Sequence[Region],
    alpha: float,
    beta: float,
    tv_weight: float = 0.0,
) -> dict[str, Tensor]:
    """The loss of the picture x, `total`, and its terms before weighting: `content`, `style`, `variation`.

    F maps layers to the feature maps of x; P has those of the photo at the content layers. A term without layers, and
    the variation without weight, is 0.
    """
    L_content = sum((content_loss(F[layer], P[layer]) for layer in P), x.new_zeros(())) / max(1, len(P))
    # Gatys Eq. 5:  L_style = Σ_l w_l E_l   with w_l = 1 / number of layers
    L_style = x.new_zeros(())
    for T, share, A in regions:
        w_l = 1 / len(A)
        E = {layer: style_loss(gram_matrix(guide(F[layer], T)), A[layer]) for layer in A}
        L_style = L_style + share * sum(w_l * E[layer] for layer in A)
    # Gatys Eq. 7:  L_total = α L_content + β L_style   (and here the total variation)
    L_tv = total_variation(x) if tv_weight else x.new_zeros(())
    L_total = alpha * L_content + beta * L_style + tv_weight * L_tv
    return {"total": L_total, "content": L_content, "style": L_style, "variation": L_tv}


def protection_loss(F: dict[str, Tensor], P: dict[str, Tensor], T: Tensor) -> Tensor:
    """The content loss inside a mask T (1, 1, H, W), at fine and coarse layers: those of P."""
    losses = []
    for layer in P:
        (f, t), (p, _) = under(T, F[layer]), under(T, P[layer])
        losses.append(0.5 * (t * (f - p)).square().sum() / P[layer].numel())
    return torch.stack(losses).mean()


# --- Style transfer ----------------------------------------------------------------------------------------


def paint(
    content: Tensor,
    styles: Sequence[Tensor] = (),
    *,
    alpha: float = 1.0,
    beta: float = 30.0,
    tv_weight: float = 0.0,
    content_layers: Sequence[str] = CONTENT_LAYERS,
    style_layers: Sequence[str] = STYLE_LAYERS,
    style_blend: Sequence[float] | None = None,
    num_steps: int = 16,
    lbfgs_iters: int = 2,
    scales: int | None = None,
    optimizer: str = "lbfgs",
    lr: float | None = None,
    init: str = "recolored",
    preserve_color: str | None = None,
    style_masks: Sequence[Tensor] = (),
    painting_masks: Sequence[Tensor] = (),
    protect: Tensor | None = None,
    protect_weight: float = 30.0,
    pooling: str = "avg",
    vgg: str = "vgg19",
    vgg_weights: str | Path = "auto",
    seed: int = 0,
    precision: str = "auto",
) -> Iterator[tuple[Tensor, dict[str, float]]]:
    """Paint `content` in the style of `styles`; yield the picture and its losses after every step.

    Args:
        content: (1, 3, H, W) in [0, 1]; pictures are yielded on its device.
        styles: each (1, 3, h, w) in [0, 1], of any size: brush strokes come out as large in px as they are there.
        alpha, beta, tv_weight: α and β of Eq. 7, and the weight of the total variation.
        content_layers, style_layers: names such as `relu4_2`.
        style_blend: one share for each style; None for equal shares.
        num_steps, lbfgs_iters: steps at full size, and iterations in each; every coarser scale has twice as many steps.
        scales: how many sizes to go through, each half the next; None goes down to a longer side of 192 px or more.
        optimizer, lr: `lbfgs` (learning rate 1 by default) or `adam` (0.02 of the range of a pixel).
        init: what to start from: `content`, `recolored` (the content in the styles' colours), `style`, or `noise`
            (white, from `seed`).
        preserve_color: `luminance` paints in grey and puts the content's colours back; `histogram` gives the styles the
            content's colours first.
        style_masks: where in the content each style goes, (1, 1, h, w) in [0, 1] of any size, one for each style; the
            last one may be left out: it gets the rest. None for everywhere.
        painting_masks: likewise from where in each style it is taken, one for each.
        protect, protect_weight: where to keep the content as it is, (1, 1, h, w) in [0, 1], and how strongly.
        pooling, vgg, vgg_weights: of the network; see `common.VGG`.
        precision: of the network: `float32`, `bfloat16`, or `auto`, bfloat16 where the device has it natively.

    Yields:
        (picture (1, 3, h, w) in [0, 1] at the size of the present scale, the losses of `total_loss`).

    Raises:
        InputError: arguments that contradict each other.
        Diverged: the loss is no longer finite.
    """
    blend = check_arguments(content, styles, alpha, beta, style_blend, optimizer, init, preserve_color)
    check_masks(styles, style_masks, painting_masks)
    content_layers = content_layers if alpha else ()
    style_layers, style_masks, painting_masks = (style_layers, style_masks, painting_masks) if beta else ((), (), ())
    protected_layers = () if protect is None else PROTECTED_LAYERS
    dtype = pick_precision(precision, content.device)
    colored = content
    if preserve_color == "histogram":
        styles = [match_color(style, [content]).clamp(0, 1) for style in styles]
    elif preserve_color == "luminance":
        styles = [match_luminance(style, content) for style in styles]
        content = luminance(content).expand_as(content)

    def at(factor: float) -> tuple[Tensor, list[Tensor]]:
        photo = nnf.pad(resize(content, factor), [MARGIN] * 4, mode="replicate")
        return photo, [resize(style, factor) for style in styles if style_layers]

    factors = scale_factors(content, scales)  # …, ¼, ½, 1
    photo, paintings = at(factors[0])
    phi = VGG([*content_layers, *style_layers, *protected_layers], vgg, vgg_weights, pooling).to(content.device)
    phi = rescale(phi, [photo] * bool(content_layers or protected_layers) + paintings)
    x = start(init, photo, styles, blend, seed)
    if protect is not None:
        x = torch.lerp(x, photo, on(protect, photo))

    def features(image: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        with autocast(image.device, dtype):
            return phi(image, layers)

    for factor in factors:
        photo, paintings = at(factor)
        if factor > factors[0]:
            x = nnf.interpolate(x, [side - 2 * MARGIN for side in photo.shape[-2:]], mode="bicubic").clamp(0, 1)
            x = nnf.pad(x, [MARGIN] * 4, mode="replicate")
        with torch.no_grad():
            P = features(photo, [*content_layers, *protected_layers])
            A = []
            for painting, mask in zip(paintings, painting_masks or [None] * len(paintings), strict=True):
                f = features(painting, style_layers)
                mask = None if mask is None else on(mask, painting, margin=0)
                A.append({layer: gram_matrix(guide(f[layer], mask)) for layer in style_layers})
        keep = None if protect is None else on(protect, photo)
        regions = divide(photo, A, blend, style_masks, keep)

        def objective(x: Tensor, P: dict = P, regions: list = regions, keep: Tensor | None = keep) -> dict[str, Tensor]:
            F = features(x, [*P, *style_layers])
            losses = total_loss(x, F, {layer: P[layer] for layer in content_layers}, regions, alpha, beta, tv_weight)
            if keep is not None:
                losses["protected"] = protection_loss(F, {layer: P[layer] for layer in protected_layers}, keep)
                losses["total"] = losses["total"] + protect_weight * losses["protected"]
            return losses

        damping = 4.0 if optimizer == "lbfgs" and init != "noise" else 0.0
        for picture, losses in optimize(x, objective, round(num_steps / factor), lbfgs_iters, optimizer, lr, damping):
            x = picture[..., MARGIN:-MARGIN, MARGIN:-MARGIN].clamp(0, 1)
            yield keep_color(x, resize(colored, factor)) if preserve_color == "luminance" else x, losses


def stylize(content: Tensor, styles: Sequence[Tensor] = (), **options: object) -> Tensor:
    """Paint `content` (1, 3, H, W) in [0, 1] in the style of `styles`; arguments and errors are those of `paint`.

    Returns:
        The picture of the least loss at full size, (1, 3, H, W) in [0, 1].
    """
    best = None
    for frame in paint(content, styles, **options):  # type: ignore[arg-type]
        best = better(frame, best)
    return best[0]


Frame = tuple[Tensor, dict[str, float]]


def better(frame: Frame, best: Frame | None) -> Frame:
    """Which of a frame of `paint` and the best one before it to keep: the finer one, or that with the lesser loss."""
    if best is None or frame[0].shape != best[0].shape or frame[1]["total"] <= best[1]["total"]:
        return frame
    return best


def optimize(
    x: Tensor,
    objective: Callable[[Tensor], dict[str, Tensor]],
    num_steps: int,
    lbfgs_iters: int,
    optimizer: str = "lbfgs",
    lr: float | None = None,
    damping: float = 0.0,
) -> Iterator[tuple[Tensor, dict[str, float]]]:
    """Change the picture x (1, 3, H, W) so that `objective(x)["total"]` falls; yield the picture after every step.

    A step is `lbfgs_iters` iterations of L-BFGS or Adam, each one evaluation of the objective and its gradient. What
    is yielded is the picture that was evaluated last, with all values of its objective. The larger `damping` is, the
    less do high frequencies count in the unknown.

    Raises:
        Diverged: the loss is no longer finite.
    """
    # torch's L-BFGS has absolute thresholds. All changes of its first move sum to 1 at most: in this unit that is 1/100
    # of white a value, at every size. And it passes over curvatures below 1e-10: the gain lets every loss start large.
    unit, gain = x.numel() / 100, None
    # z is a change of the pixels in which high frequencies count less (Mordvintsev et al. 2018). The gradient of pixels
    # is full of them, and few iterations would leave in flat areas what the first ones did: grain, a lattice of dots.
    # Noise is full of them as well, and needs an undamped change to lose them; Adam moves each value by its rate.
    x_0, z = x, torch.zeros_like(x, memory_format=torch.contiguous_format, requires_grad=True)
    fy, fx = torch.fft.fftfreq(x.shape[-2], device=x.device), torch.fft.rfftfreq(x.shape[-1], device=x.device)
    gains = 1 / (1 + damping * torch.hypot(fy[:, None], fx))  # of frequencies up to ½ a pixel: (H, W/2 + 1)
    method: torch.optim.Optimizer
    if optimizer == "lbfgs":
        rate, n = 1.0 if lr is None else lr, lbfgs_iters
        method = torch.optim.LBFGS([z], rate, n, max_eval=2 * n, history_size=20, tolerance_grad=0, tolerance_change=0)
    else:
        method = torch.optim.Adam([z], (0.02 if lr is None else lr) / unit)
    losses: dict[str, Tensor] = {}

    def closure() -> Tensor:
        nonlocal x, losses, gain
        method.zero_grad()
        # Not clamped: that would cut off the gradient of all pixels beyond [0, 1].
        x = x_0 + unit * torch.fft.irfft2(gains * torch.fft.rfft2(z), s=z.shape[-2:])
        losses = objective(x)
        gain = 1e6 / losses["total"].detach().clamp_min(1e-6) if gain is None else gain
        (gain * losses["total"]).backward()
        return gain * losses["total"].detach()

    for step in range(1, num_steps + 1):
        for _ in range(1 if optimizer == "lbfgs" else lbfgs_iters):
            method.step(closure)
        values = torch.stack(list(losses.values())).tolist()
        if not all(map(math.isfinite, values)):
            raise Diverged(f"the loss is no longer finite in step {step}: try a smaller --lr, or smaller weights")
        yield x.detach(), dict(zip(losses, values, strict=True))


class Diverged(InputError):
    """The loss is no longer a finite number."""


def scale_factors(content: Tensor, scales: int | None) -> list[float]:
    """…, ¼, ½, 1: as many as `scales`; None keeps the longer side of `content` at 192 px or more."""
    if scales is None:
        scales = 1 + max(0, math.floor(math.log2(max(content.shape[-2:]) / 192)))
    return [0.5**k for k in reversed(range(scales))]


def resize(image: Tensor, factor: float) -> Tensor:
    """Scale (1, 3, H, W) down by `factor` ≤ 1, smoothly."""
    image = image.detach().float()
    size = [max(1, round(side * factor)) for side in image.shape[-2:]]
    if factor == 1:
        return image
    smooth = nnf.interpolate(image.cpu(), size, mode="bicubic", antialias=True)  # on the CPU, as not every device can
    return smooth.clamp(0, 1).to(image.device)


def on(mask: Tensor, image: Tensor, margin: int = MARGIN) -> Tensor:
    """Scale a mask (1, 1, h, w) to the size of an image with a margin."""
    size = [side - 2 * margin for side in image.shape[-2:]]
    mask = nnf.interpolate(mask.float().cpu(), size, mode="bilinear", antialias=True).clamp(0, 1)
    return nnf.pad(mask, [margin] * 4, mode="replicate").to(image.device)


def start(init: str, photo: Tensor, styles: Sequence[Tensor], blend: Sequence[float], seed: int) -> Tensor:
    """The picture to start from, as large as the photo (1, 3, H, W); `init` is that of `paint`."""
    if init == "content" or (init == "recolored" and not styles):
        return photo
    if init == "recolored":
        return match_color(photo, styles, blend).clamp(0, 1)
    if init == "noise":  # drawn on the CPU, so that every device starts from the same
        return torch.rand(photo.shape, generator=torch.Generator().manual_seed(seed)).to(photo)
    h, w = photo.shape[-2:]
    cover = max(h / styles[0].shape[-2], w / styles[0].shape[-1])
    size = [math.ceil(side * cover) for side in styles[0].shape[-2:]]
    covering = nnf.interpolate(styles[0].cpu(), size, mode="bicubic", antialias=True).clamp(0, 1)
    return center_crop(covering, [h, w]).to(photo.device)


def match_color(image: Tensor, targets: Sequence[Tensor], shares: Sequence[float] | None = None) -> Tensor:
    """Map the colours of `image` (1, 3, H, W) affinely, so that their mean and covariance are those of `targets`.

    `shares` says how much each target counts; None: all the same.
    """

    def statistics(images: Sequence[Tensor], shares: Sequence[float]) -> tuple[Tensor, Tensor]:
        pixels = torch.cat([image.flatten(2)[0] for image in images], dim=1).double().cpu()  # (3, pixels)
        sizes = torch.tensor([image[0, 0].numel() for image in images])
        weights = (torch.tensor(shares).double() / sizes).repeat_interleave(sizes)  # of each pixel
        mean = (pixels * weights).sum(1, keepdim=True) / weights.sum()
        return mean, (pixels - mean) * weights @ (pixels - mean).T / weights.sum()

    def power(C: Tensor, exponent: float, least: float) -> Tensor:
        values, vectors = torch.linalg.eigh(C)
        return vectors * values.clamp_min(least) ** exponent @ vectors.T

    # Gatys et al. 2017, §5.2:  x ↦ A x + b  with A C_x Aᵀ = C_s. Of all such A the symmetric one, the linear Monge map,
    # moves colours least:  A = C_x^-½ (C_x^½ C_s C_x^½)^½ C_x^-½
    (mean_x, C_x), (mean_s, C_s) = statistics([image], [1.0]), statistics(targets, shares or [1.0] * len(targets))
    root, inverse = (power(C_x, exponent, 1e-4) for exponent in (0.5, -0.5))  # no less: that would amplify noise
    A = inverse @ power(root @ C_s @ root, 0.5, 0.0) @ inverse
    matched = A @ (image.flatten(2)[0].double().cpu() - mean_x) + mean_s
    return matched.view(image.shape).to(image)


def match_luminance(style: Tensor, content: Tensor) -> Tensor:
    """`style` in grey, with the mean and the standard deviation of the luminance of `content`, both (1, 3, h, w)."""
    L_s, L_c = luminance(style), luminance(content)
    # Gatys et al. 2017, §5.1:  L_s' = σ_c/σ_s (L_s − μ_s) + μ_c
    matched = L_c.std() / L_s.std().clamp_min(1e-3) * (L_s - L_s.mean()) + L_c.mean()
    return matched.clamp(0, 1).expand_as(style)


# ===========================================================================================================
# Nothing below is in the paper: checks, files, the command line.
# ===========================================================================================================

MOST_PIXELS = 16383  # of the longer side: what WebP holds
BYTES_PER_PIXEL = {torch.bfloat16: 3000, torch.float32: 3500}  # that the default layers take on a CPU (measured)


def check_arguments(
    content: Tensor,
    styles: Sequence[Tensor],
    alpha: float,
    beta: float,
    style_blend: Sequence[float] | None,
    optimizer: str,
    init: str,
    preserve_color: str | None,
) -> list[float]:
    """Raise InputError where the arguments of `paint` contradict each other; return the share of each style."""
    if any(image.ndim != 4 or image.shape[:2] != (1, 3) for image in [content, *styles]):
        raise InputError("images must be of shape (1, 3, H, W)")
    if optimizer not in ("lbfgs", "adam") or init not in ("recolored", "content", "style", "noise"):
        raise InputError(f"unknown optimizer {optimizer} or init {init}")
    if preserve_color not in (None, "luminance", "histogram"):
        raise InputError(f"unknown way to preserve color: {preserve_color}")
    if not (alpha >= 0 and beta >= 0 and alpha + beta > 0):
        raise InputError("nothing to do: --content-weight or --style-weight must be positive")
    if not styles and (beta or init == "style"):
        raise InputError("a style image is needed, unless --style-weight is 0 and --init is not style")
    shares = style_blend or [1.0] * len(styles)
    if len(shares) != len(styles) or (styles and sum(shares) <= 0):
        raise InputError(f"--style-blend needs {len(styles)} shares, one for each style image, not all 0")
    return [share / sum(shares) for share in shares]


def check_masks(styles: Sequence[Tensor], style_masks: Sequence[Tensor], painting_masks: Sequence[Tensor]) -> None:
    """Raise InputError if there are not as many masks as styles, or none; the last of `style_masks` may be left out."""
    if len(style_masks) not in (0, len(styles) - 1, len(styles)):
        raise InputError(f"--style-masks needs {len(styles)} masks, one for each style image, or one less")
    if len(painting_masks) not in (0, len(styles)):
        raise InputError(f"--painting-masks needs {len(styles)} masks, one for each style image")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; InputError on a mistake. What `paint` has a default for gets that default."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], usage="%(prog)s content [style ...] [flags]")
    layers = {"nargs": "+", "metavar": "LAYER"}
    defaults = {name: p.default for name, p in inspect.signature(paint).parameters.items()}

    def add(*names: str, **options: object) -> None:
        dest = options.get("dest", names[-1].lstrip("-").replace("-", "_"))
        default = defaults.get(dest) if names[-1].startswith("-") else None
        parser.add_argument(*names, **{"default": default} | options)  # type: ignore[arg-type]

    def scales(text: str) -> float | None:
        return None if text == "auto" else number(int, 1, 16)(text)

    add("content", type=Path, help="photo: what to paint")
    add("styles", type=Path, nargs="*", metavar="style", help="painting: how to paint it; several are blended")
    add("-o", "--output", type=Path, help=f"of {', '.join(FORMATS)} (default: <content>_<style>.png)")
    add("--image-size", type=number(int, 1, MOST_PIXELS), default=512, help="longer side of the result, in px")
    add("--center-crop", action="store_true", default=False, help="crop all images to their central square first")
    add("--style-scale", type=number(), default=1.0, help="longer side of the style image, relative to the result's")
    add("--content-weight", dest="alpha", metavar="α", type=number(), help="α of Eq. 7")
    add("--style-weight", dest="beta", metavar="β", type=number(), help="β of Eq. 7")
    add("--tv-weight", type=number(), help="weight of the total variation, for smoothness")
    add("--content-layers", **layers, help="of relu1_1 … relu5_4")
    add("--style-layers", **layers, help="of relu1_1 … relu5_4")
    add("--style-blend", nargs="+", type=number(), metavar="SHARE", help="one for each style (default: equal shares)")
    add("--num-steps", type=number(int, 1, 10**6), help="steps at full size; each coarser scale has twice as many")
    add("--lbfgs-iters", type=number(int, 1, 10**6), help="iterations of the optimiser in each step")
    add("--scales", type=scales, help="sizes to go through, each half the next (default: auto, from about 192 px)")
    add("--optimizer", choices=["lbfgs", "adam"], help="the paper's is L-BFGS")
    add("--lr", type=number(), help="learning rate (default: 1 for lbfgs, 0.02 for adam)")
    add("--init", choices=["recolored", "content", "style", "noise"], help="start; the paper's is noise")
    add(
        "--preserve-color",
        choices=["luminance", "histogram"],
        help="keep the photo's colours (default: the painting's)",
    )
    masks = {"nargs": "+", "type": Path, "metavar": "MASK", "default": ()}
    add("--style-masks", **masks, help="where in the photo each style goes: white on black; the last gets the rest")
    add("--painting-masks", **masks, help="from where in each painting its style is taken")
    add("--protect", metavar="MASK", help="keep the photo where this picture is white; faces: find them")
    add("--protect-weight", type=number(), help="how strongly")
    add("--save-mask", action="store_true", default=False, help="write what is protected to <output>_mask.png")
    add("--pooling", choices=["avg", "max"], help="the paper's is avg")
    add("--vgg", choices=["vgg19", "vgg16", "auto"], help="the paper's is vgg19; it needs no download")
    add("--vgg-weights", metavar="FILE", help="torchvision state dict, or random")
    add("--save-gif", action="store_true", default=False, help="write the optimisation as an animation, <output>.gif")
    add("--save-all", action="store_true", default=False, help="write the picture of every step to <output>_frames/")
    add("--save-losses", action="store_true", default=False, help="write <output>_losses.csv and its plot, .png")
    add("--seed", type=number(int, most=2**63), help="of the white noise")
    add_device_arguments(parser)
    args = parser.parse_args(argv)
    if args.output is None:
        names = [path.stem for path in args.styles] or ["inversion"]
        args.output = Path("_".join([args.content.stem, *names]) + ".png")
    return args


def load_arguments(args: argparse.Namespace) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
    """Read what `paint` gets: content, styles, and its other arguments by name; InputError if it exceeds memory."""
    device = pick_device(args.device)
    style_size = max(1, round(args.image_size * args.style_scale))
    if style_size > MOST_PIXELS:
        raise InputError(f"--style-scale {args.style_scale:g} makes the style image larger than {MOST_PIXELS} px")
    content = load_image(args.content, args.image_size, args.center_crop).to(device)
    styles = [load_image(path, style_size, args.center_crop).to(device) for path in args.styles]
    precision = pick_precision(args.precision, device)
    check_memory(content, styles, precision)
    print(f"computing on {device} in {precision}", file=sys.stderr)
    parameters = inspect.signature(paint).parameters.values()
    options = {p.name: getattr(args, p.name) for p in parameters if p.kind == p.KEYWORD_ONLY}
    for name in ("style_masks", "painting_masks"):
        options[name] = [load_mask(path, args.center_crop) for path in getattr(args, name)]
    if args.protect:
        faces = args.protect == "faces"
        options["protect"] = find_faces(content) if faces else load_mask(Path(args.protect), args.center_crop)
    return content, styles, options


def run(args: argparse.Namespace, command: Sequence[str]) -> None:
    """Stylise files as the command line says, and write the picture and what else was asked for."""
    stem = args.output.with_suffix("")
    gif, table, folder, mask = (Path(f"{stem}{end}") for end in (".gif", "_losses.csv", "_frames", "_mask.png"))
    extras = [gif] * args.save_gif + [table, table.with_suffix(".png")] * args.save_losses + [folder] * args.save_all
    extras += [mask] * args.save_mask
    pictures = [args.content, *args.styles, *args.style_masks, *args.painting_masks]
    pictures += [Path(args.protect)] if args.protect not in (None, "faces") else []
    if args.save_mask and not args.protect:
        raise InputError("--save-mask writes what --protect keeps: name a mask, or faces")
    check_outputs([args.output, *extras], pictures, FORMATS)
    content, styles, options = load_arguments(args)
    if args.save_mask and options["protect"] is not None:
        save_image(on(options["protect"], content, margin=0).expand_as(content), mask)
    factors = scale_factors(content, args.scales)
    # The share of the work that each step is: twice as many steps a coarser scale, each a quarter of the work.
    shares = [f**2 for f in factors for _ in range(round(args.num_steps / f))]
    steps = len(shares)
    best: Frame | None = None
    failure: Exception | None = None
    best_step, history = 0, []  # type: int, list[list[float]]
    frames = [to_pil(enlarge(content, content, most=384))]
    bar = tqdm(total=1.0, bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}", smoothing=0)
    with catching_interrupts() as interrupts, bar:
        try:
            for frame in paint(content, styles, **options):
                image, losses = frame
                history.append([len(history) + 1, *losses.values()])
                best = better(frame, best)
                best_step = len(history) if best is frame else best_step
                bar.set_postfix_str(", ".join(f"{name} {value:.4g}" for name, value in losses.items()), refresh=False)
                bar.update(min(1 - bar.n, shares[len(history) - 1] / sum(shares)))
                if args.save_gif:
                    frames.append(to_pil(enlarge(image, content, most=384)))
                if args.save_all:
                    save_frame(image, folder, len(history))
                if interrupts:
                    break
        except Exception as error:  # what there is is saved first
            failure = error
            if out_of_memory(error):
                size = max(content.shape[-2:])
                fits = f"about --image-size {int(0.7 * size)} is likely to fit"  # half the pixels
                failure = InputError(f"out of memory at {size} px: {fits}")
        if best is None:
            raise failure or KeyboardInterrupt
        losses = ", ".join(f"{name} {value:.6g}" for name, value in best[1].items())
        record = provenance(command, seed=args.seed, step=f"{best_step} of {steps}", losses=losses)
        save_image(enlarge(best[0], content), args.output, record)
        if args.save_losses:
            save_losses(["step", *best[1]], history, table)
        if args.save_gif:
            save_gif(frames, gif)
    if failure or interrupts:
        print(f"stopped: {args.output} holds the picture of step {best_step} of {steps}", file=sys.stderr)
        raise failure or SystemExit(130)
    say(args.output)


def check_memory(content: Tensor, styles: Sequence[Tensor], precision: torch.dtype) -> None:
    """Raise InputError if the pictures will not fit into the memory of a Linux machine, or of a container on it."""
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if content.device.type != "cpu" or not meminfo.exists():
        return  # torch itself tells
    free = 1024 * next(float(line.split()[1]) for line in meminfo.open() if line.startswith("MemAvailable:"))
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        free = min(free, float(text))
    pixels = max([content[0, 0].numel(), *(style[0, 0].numel() / 4 for style in styles)])  # styles need no gradient
    longer = max(content.shape[-2:])
    fitting = int(longer * math.sqrt(free / pixels / BYTES_PER_PIXEL[precision]))
    if fitting < longer:
        raise InputError(f"not enough memory for {longer} px: about --image-size {fitting} is likely to fit")


def load_mask(path: Path, center_crop: bool = False) -> Tensor:
    """Read a picture as a mask (1, 1, h, w): its luminance, from 0, black, to 1, white."""
    return luminance(load_image(path, None, center_crop))


def find_faces(image: Tensor) -> Tensor | None:
    """A mask (1, 1, H, W) with a soft ellipse on each face in `image`, found by MTCNN (Zhang et al. 2016); or None."""
    try:
        from facenet_pytorch import MTCNN
    except ImportError as error:
        message = "--protect faces needs a detector: pip install requests, and pip install --no-deps facenet-pytorch"
        raise InputError(message) from error
    boxes, _ = MTCNN(keep_all=True).detect(to_pil(image))
    if boxes is None:
        print("no face found: nothing is protected", file=sys.stderr)
        return None
    mask = torch.zeros(1, 1, *image.shape[-2:])
    y, x = (torch.arange(side).float() for side in image.shape[-2:])
    for left, top, right, bottom in boxes.astype(float):
        # The box ends at brows and chin: an ellipse of 1.4 times its sides, half faded 0.2 further out
        dx = (x - (left + right) / 2) / (0.7 * (right - left))
        dy = (y - (top + bottom) / 2) / (0.7 * (bottom - top))
        radius = (dx.square() + dy.square()[:, None]).sqrt()
        mask = torch.maximum(mask, ((1.2 - radius) / 0.4).clamp(0, 1))
    return mask


def enlarge(image: Tensor, content: Tensor, most: int = MOST_PIXELS) -> Tensor:
    """Scale a picture of a coarse scale up to the size of `content`, or to a longer side of `most` px."""
    height, width = content.shape[-2:]
    shrink = min(1.0, most / max(height, width))
    size = [max(1, round(height * shrink)), max(1, round(width * shrink))]
    if size == list(image.shape[-2:]):
        return image
    return nnf.interpolate(image.cpu(), size, mode="bicubic", antialias=True).clamp(0, 1)


def save_frame(image: Tensor, folder: Path, step: int) -> None:
    """Write <folder>/<step>.png; in the first step, remove those of an earlier run, which may have had more steps."""
    for old in folder.glob("[0-9][0-9][0-9][0-9].png") if step == 1 else ():
        old.unlink()
    save_image(image, folder / f"{step:04d}.png")


def save_gif(frames: Sequence[Image.Image], path: Path, seconds: float = 5.0, most: int = 3_000_000) -> None:
    """Write an animation that fades from the first frame into the second and rests on the last, of `most` bytes."""
    first, second, *rest = frames
    both = Image.new("RGB", (first.width, 2 * first.height))  # the colours of the beginning and of the end
    both.paste(first)
    both.paste(frames[-1], (0, first.height))
    palette = both.quantize(96)
    frames = [Image.blend(first, second, k / 8) for k in range(8)] + [second, *rest]
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    while True:
        durations = [1000 * seconds / len(frames)] * (len(frames) - 1) + [2000]
        data = io.BytesIO()
        frames[0].save(data, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
        if data.tell() <= most or len(frames) < 10:
            break
        frames = [*frames[:-1:2], frames[-1]]  # every second one
    write_file(data.getvalue(), path)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exit with status 2 on a failure that the user can mend."""
    argv = sys.argv[1:] if argv is None else argv
    with one_line_errors():
        run(parse_args(argv), ["python", "gatys.py", *argv])


if __name__ == "__main__":
    main()
