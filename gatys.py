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
- The optimisation starts from the content photo (`--init noise` is the paper's) and goes from coarse to fine
  (`--scales 1` is the paper's), as in Gatys et al., "Controlling Perceptual Factors in Neural Style Transfer",
  CVPR 2017: large shapes of the style are found at low resolution, in a fraction of the time.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torchvision.transforms.functional import center_crop
from tqdm import tqdm

from common import (
    FORMATS,
    VGG,
    ArgumentParser,
    InputError,
    check_output,
    gram_matrix,
    load_image,
    number,
    one_line_errors,
    pick_device,
    pick_precision,
    provenance,
    replacing,
    rescale,
    save_gif,
    save_image,
    uninterrupted,
)

CONTENT_LAYERS = ("relu4_2",)
STYLE_LAYERS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
MARGIN = 8  # px around the picture, cut off in the end: there the zero padding of the network paints a frame
MOST_PIXELS = 16383  # of the longer side: what WebP holds
BYTES_PER_PIXEL = {torch.bfloat16: 3000, torch.float32: 3500}  # that the default layers take on a CPU (measured)


# --- Losses ------------------------------------------------------------------------------------------------


def content_loss(f: Tensor, p: Tensor) -> Tensor:
    """Half the mean squared difference of the feature maps F of the picture and P of the photo, each (1, N, H, W)."""
    # Gatys Eq. 1:  L_content = ½ Σ_ij (F_ij − P_ij)²   (here the mean over i, j in place of the sum)
    return 0.5 * (f.float() - p.float()).square().mean()


def style_loss(g: Tensor, a: Tensor) -> Tensor:
    """E_l, from the Gram matrices G of the picture and A of the painting, each (1, N, N), and over its own M."""
    # Gatys Eq. 4:  E_l = 1/(4 N² M²) Σ_ij (G_ij − A_ij)²   (gram_matrix() has already divided by N·M)
    return 0.25 * (g - a).square().sum()


def total_variation(x: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels of x (1, 3, H, W): a smoothness term that the paper has not."""
    return (x[..., 1:, :] - x[..., :-1, :]).square().mean() + (x[..., 1:] - x[..., :-1]).square().mean()


def total_loss(
    x: Tensor,
    F: dict[str, Tensor],
    P: dict[str, Tensor],
    A: dict[str, Tensor],
    content_weight: float,
    style_weight: float,
    tv_weight: float = 0.0,
) -> dict[str, Tensor]:
    """The loss of the picture x, `total`, and its terms before weighting: `content`, `style`, `variation`.

    F maps layers to the feature maps of x; P has those of the photo at the content layers; A has the Gram matrices of
    the painting at the style layers. A term without layers, or without weight, is left out.
    """
    losses, weights = {}, {"content": content_weight, "style": style_weight, "variation": tv_weight}
    if P:
        losses["content"] = torch.stack([content_loss(F[layer], P[layer]) for layer in P]).mean()
    if A:
        # Gatys Eq. 5:  L_style = Σ_l w_l E_l   with w_l = 1 / number of layers
        losses["style"] = torch.stack([style_loss(gram_matrix(F[layer]), A[layer]) for layer in A]).mean()
    if tv_weight:
        losses["variation"] = total_variation(x)
    # Gatys Eq. 7:  L_total = α L_content + β L_style   (and here the total variation)
    total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
    return {"total": total, **losses}


# --- Optimisation ------------------------------------------------------------------------------------------


class Diverged(InputError):
    """The loss is no longer a finite number."""


class OutOfMemory(InputError):
    """The picture has too many pixels."""


def optimize(
    x: Tensor,
    objective: Callable[[Tensor], dict[str, Tensor]],
    num_steps: int,
    lbfgs_iters: int,
    optimizer: str = "lbfgs",
    lr: float | None = None,
) -> Iterator[tuple[Tensor, dict[str, float]]]:
    """Change the picture x (1, 3, H, W) so that `objective(x)["total"]` falls; yield the picture after every step.

    A step is `lbfgs_iters` iterations of L-BFGS or Adam, each one evaluation of the objective and its gradient. What
    is yielded is the picture that was evaluated last, with all values of its objective.

    Raises:
        Diverged: the loss is no longer finite.
    """
    # torch's L-BFGS has absolute thresholds. All changes of its first move sum to 1 at most: in this unit that is 1/100
    # of white a value, at every size. And it passes over curvatures below 1e-10: the gain lets every loss start large.
    unit, gain = x.numel() / 100, None
    z = (x / unit).contiguous().requires_grad_(True)
    method: torch.optim.Optimizer
    if optimizer == "lbfgs":
        method = torch.optim.LBFGS(
            [z], 1.0 if lr is None else lr, max_iter=lbfgs_iters, history_size=20, tolerance_grad=0, tolerance_change=0
        )
    else:
        method = torch.optim.Adam([z], (0.02 if lr is None else lr) / unit)
    losses: dict[str, Tensor] = {}

    def closure() -> Tensor:
        nonlocal x, losses, gain
        method.zero_grad()
        x = unit * z  # not clamped: that would cut off the gradient of all pixels beyond [0, 1]
        losses = objective(x)
        gain = 1e6 / losses["total"].detach().clamp_min(1e-6) if gain is None else gain
        (gain * losses["total"]).backward()
        return gain * losses["total"].detach()

    for step in range(1, num_steps + 1):
        for _ in range(1 if optimizer == "lbfgs" else lbfgs_iters):
            method.step(closure)
        values = torch.stack(list(losses.values())).tolist()  # read once a step: that makes a GPU wait
        if not all(map(math.isfinite, values)):
            raise Diverged(f"the loss is no longer finite in step {step}: try a smaller --lr, or smaller weights")
        yield x.detach(), dict(zip(losses, values, strict=True))


# --- Style transfer ----------------------------------------------------------------------------------------


class Progress(NamedTuple):
    """What `stylize` reports after every step."""

    step: int  # 1 … steps, over all scales
    steps: int
    done: float  # share of the whole work, 0 … 1: a step at a fine scale is more work than one at a coarse scale
    image: Tensor  # (1, 3, h, w) in [0, 1], at the size of the present scale
    losses: dict[str, float]  # of `total_loss`


def stylize(
    content: Tensor,
    styles: Sequence[Tensor] = (),
    *,
    content_weight: float = 1.0,
    style_weight: float = 30.0,
    tv_weight: float = 0.0,
    content_layers: Sequence[str] = CONTENT_LAYERS,
    style_layers: Sequence[str] = STYLE_LAYERS,
    style_blend: Sequence[float] | None = None,
    num_steps: int = 8,
    lbfgs_iters: int = 4,
    scales: int | None = None,
    optimizer: str = "lbfgs",
    lr: float | None = None,
    init: str = "content",
    pooling: str = "avg",
    arch: str = "vgg19",
    weights: str | Path = "auto",
    seed: int = 0,
    precision: torch.dtype = torch.float32,
    callback: Callable[[Progress], None] = lambda progress: None,
) -> Tensor:
    """Paint `content` in the style of `styles`.

    Args:
        content: (1, 3, H, W) in [0, 1]. The result has its size and device.
        styles: each (1, 3, h, w) in [0, 1], of any size: brush strokes come out as large in px as they are there.
        content_weight, style_weight, tv_weight: α and β of Eq. 7, and the weight of the total variation.
        content_layers, style_layers: names such as `relu4_2`.
        style_blend: one share for each style; None for equal shares.
        num_steps, lbfgs_iters: steps at each scale, and iterations in each step.
        scales: how many sizes to go through, each half the next; None goes down to a longer side of 192 px or more.
        optimizer, lr: `lbfgs` (learning rate 1 by default) or `adam` (0.02 of the range of a pixel).
        init: what to start from: `content`, `style` or `noise` (white noise from `seed`).
        pooling, arch, weights: of the network; see `common.VGG`.
        precision: torch.bfloat16 runs the network in it, by autocast.
        callback: called after every step; what it raises ends the optimisation.

    Returns:
        (1, 3, H, W) in [0, 1].

    Raises:
        InputError: arguments that contradict each other.
        OutOfMemory: more pixels than fit into memory.
        Diverged: the loss is no longer finite. The pictures that `callback` was given are.
    """
    if any(image.ndim != 4 or image.shape[:2] != (1, 3) for image in [content, *styles]):
        raise InputError("images must be of shape (1, 3, H, W)")
    if optimizer not in ("lbfgs", "adam") or init not in ("content", "style", "noise"):
        raise InputError(f"unknown optimizer {optimizer} or init {init}")
    if min(num_steps, lbfgs_iters, 1 if scales is None else scales) < 1:
        raise InputError("the numbers of steps, iterations and scales must be positive")
    if content_weight <= 0 and style_weight <= 0:
        raise InputError("nothing to do: --content-weight or --style-weight must be positive")
    if not styles and (style_weight > 0 or init == "style"):
        raise InputError("a style image is needed, unless --style-weight is 0 and --init is not style")
    shares = style_blend or [1.0] * len(styles)
    if len(shares) != len(styles) or (styles and sum(shares) <= 0):
        raise InputError(f"--style-blend needs {len(styles)} shares, one for each style image, not all 0")
    blend = [share / sum(shares) for share in shares]
    content_layers = content_layers if content_weight > 0 else []
    style_layers = style_layers if style_weight > 0 else []

    content, styles = content.detach().float(), [style.detach().float() for style in styles]
    longer = max(content.shape[-2:])
    pixels = max([content[0, 0].numel(), *(style[0, 0].numel() / 4 for style in styles)])  # styles need no gradient
    needed = pixels * BYTES_PER_PIXEL[precision]
    largest = int(longer * math.sqrt(free_memory(content.device) / needed))
    if largest < longer:
        raise OutOfMemory(f"not enough memory for {longer} px: about --image-size {largest} is likely to fit")
    if scales is None:
        scales = 1 + max(0, math.floor(math.log2(longer / 192)))
    factors = [0.5**k for k in reversed(range(scales))]  # …, ¼, ½, 1
    vgg = VGG([*content_layers, *style_layers], arch, weights, pooling).to(content.device)
    step, work, total_work = 0, 0.0, num_steps * sum(f**2 for f in factors)

    def features(image: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        with torch.autocast(image.device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
            return vgg(image, layers)

    def objective(x: Tensor, P: dict[str, Tensor], A: dict[str, Tensor]) -> dict[str, Tensor]:
        return total_loss(x, features(x, [*P, *A]), P, A, content_weight, style_weight, tv_weight)

    x = content
    for factor in factors:
        photo = nnf.pad(resize(content, factor), [MARGIN] * 4, mode="replicate")
        paintings = [resize(style, factor) for style in styles] if style_layers else []
        if step == 0:
            rescale(vgg, ([photo] if content_layers else []) + paintings)
            x = start(init, photo, styles, seed)
        else:
            size = [side - 2 * MARGIN for side in photo.shape[-2:]]
            x = nnf.pad(nnf.interpolate(x, size, mode="bicubic").clamp(0, 1), [MARGIN] * 4, mode="replicate")

        with torch.no_grad():
            P = features(photo, content_layers)
            grams = [{layer: gram_matrix(F) for layer, F in features(s, style_layers).items()} for s in paintings]
            # Σ_s b_s ‖G − A_s‖² = ‖G − Σ_s b_s A_s‖² + constant: blending Gram matrices is blending losses.
            A = {layer: sum(b * G[layer] for b, G in zip(blend, grams, strict=True)) for layer in style_layers}

        try:
            for picture, losses in optimize(x, partial(objective, P=P, A=A), num_steps, lbfgs_iters, optimizer, lr):
                step, work, x = step + 1, work + factor**2, picture[..., MARGIN:-MARGIN, MARGIN:-MARGIN].clamp(0, 1)
                callback(Progress(step, num_steps * scales, work / total_work, x, losses))
        except RuntimeError as error:  # torch.OutOfMemoryError on a GPU, a plain one on the CPU
            if "out of memory" not in str(error) and "allocate memory" not in str(error):
                raise
            size = int(0.7 * longer)  # half the pixels
            raise OutOfMemory(f"out of memory at {longer} px: about --image-size {size} is likely to fit") from error
    return x


def free_memory(device: torch.device) -> float:
    """Bytes that can still be had; infinity where that is not known, or where torch itself tells when they run out."""
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return math.inf
    return 1024 * next(float(line.split()[1]) for line in meminfo.open() if line.startswith("MemAvailable:"))


def resize(image: Tensor, factor: float) -> Tensor:
    """Scale (1, 3, H, W) down by `factor` ≤ 1, smoothly."""
    size = [max(1, round(side * factor)) for side in image.shape[-2:]]
    if factor == 1:
        return image
    smooth = nnf.interpolate(image.cpu(), size, mode="bicubic", antialias=True)  # on the CPU, as not every device can
    return smooth.clamp(0, 1).to(image.device)


def start(init: str, photo: Tensor, styles: Sequence[Tensor], seed: int) -> Tensor:
    """The picture to start from, as large as the photo (1, 3, H, W): the photo, white noise, or the first style."""
    if init == "content":
        return photo
    if init == "noise":  # drawn on the CPU, so that every device starts from the same
        return torch.rand(photo.shape, generator=torch.Generator().manual_seed(seed)).to(photo)
    h, w = photo.shape[-2:]
    cover = max(h / styles[0].shape[-2], w / styles[0].shape[-1])
    size = [math.ceil(side * cover) for side in styles[0].shape[-2:]]
    covering = nnf.interpolate(styles[0].cpu(), size, mode="bicubic", antialias=True).clamp(0, 1)
    return center_crop(covering, [h, w]).to(photo.device)


# --- Command line ------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; InputError on a mistake."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    layers = {"nargs": "+", "metavar": "LAYER"}

    def scales(text: str) -> float | None:
        return None if text == "auto" else number(int, 1, 16)(text)

    add("content", type=Path, help="photo: what to paint")
    add("styles", type=Path, nargs="*", metavar="style", help="painting: how to paint it; several are blended")
    add("-o", "--output", type=Path, help=".png, .jpg or .webp (default: <content>_<style>.png)")
    add("--image-size", type=number(int, 1, MOST_PIXELS), default=512, help="longer side of the result, in px")
    add("--center-crop", action="store_true", help="crop all images to their central square first")
    add("--style-scale", type=number(), default=1.0, help="longer side of the style image, relative to the result's")
    add("--content-weight", type=number(), default=1.0, help="α of Eq. 7")
    add("--style-weight", type=number(), default=30.0, help="β of Eq. 7")
    add("--tv-weight", type=number(), default=0.0, help="weight of the total variation, for smoothness")
    add("--content-layers", **layers, default=CONTENT_LAYERS, help="of relu1_1 … relu5_4")
    add("--style-layers", **layers, default=STYLE_LAYERS, help="of relu1_1 … relu5_4")
    add("--style-blend", nargs="+", type=number(), metavar="SHARE", help="one for each style (default: equal shares)")
    add("--num-steps", type=number(int, 1, 10**6), default=8, help="steps at each scale; each one is reported")
    add("--lbfgs-iters", type=number(int, 1, 10**6), default=4, help="iterations of the optimiser in each step")
    add(
        "--scales", type=scales, default="auto", help="sizes to go through, each half the next; auto: from about 192 px"
    )
    add("--optimizer", choices=["lbfgs", "adam"], default="lbfgs", help="the paper's is L-BFGS")
    add("--lr", type=number(), help="learning rate (default: 1 for lbfgs, 0.02 for adam)")
    add("--init", choices=["content", "style", "noise"], default="content", help="start; the paper's is noise")
    add("--pooling", choices=["avg", "max"], default="avg", help="the paper's is avg")
    add("--vgg", choices=["vgg19", "vgg16", "auto"], default="vgg19", help="the paper's is vgg19; it needs no download")
    add("--vgg-weights", default="auto", metavar="FILE", help="torchvision state dict, or random")
    add("--save-gif", action="store_true", help="write the optimisation as an animation, <output>.gif")
    add("--save-all", action="store_true", help="write the picture after every step to <output>_frames/")
    add("--save-losses", action="store_true", help="write <output>_losses.csv and its plot, <output>_losses.png")
    add("--seed", type=number(int, most=2**63), default=0, help="of the white noise")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, … or mps")
    add("--precision", choices=["auto", "float32", "bfloat16"], default="auto", help="of the network")
    args = parser.parse_args(argv)
    if args.output is None:
        names = [path.stem for path in args.styles] or ["inversion"]
        args.output = Path("_".join([args.content.stem, *names]) + ".png")
    return args


def run(args: argparse.Namespace, command: Sequence[str]) -> None:
    """Stylise files as the command line says, and write the picture and what else was asked for."""
    check_output(args.output, FORMATS)
    stem = args.output.with_suffix("")
    gif, table, plot, frames = (Path(f"{stem}{end}") for end in (".gif", "_losses.csv", "_losses.png", "_frames"))
    extras = [gif] * args.save_gif + [table, plot] * args.save_losses + [frames / "0001.png"] * args.save_all
    for path in extras:
        check_output(path)
    outputs = [os.path.realpath(path) for path in [args.output, *extras]]
    for path in [args.content, *args.styles]:
        if os.path.realpath(path) in outputs or os.path.realpath(path.parent) == os.path.realpath(frames):
            raise InputError(f"{path} is an input, which would be overwritten: choose another --output")
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    style_size = max(1, round(args.image_size * args.style_scale))
    if style_size > MOST_PIXELS:
        raise InputError(f"--style-scale {args.style_scale:g} makes the style image larger than {MOST_PIXELS} px")
    content = load_image(args.content, args.image_size, args.center_crop).to(device)
    styles = [load_image(path, style_size, args.center_crop).to(device) for path in args.styles]
    print(f"computing on {device} in {str(precision).removeprefix('torch.')}", file=sys.stderr)

    best: Progress | None = None
    history: list[tuple[int, dict[str, float]]] = []
    animation: list[Tensor] = []
    height, width = content.shape[-2:]
    shrink = min(1, 512 / max(height, width))  # larger animations are of little use
    bar = tqdm(total=1.0, bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}", smoothing=0)

    def report(progress: Progress) -> None:
        nonlocal best
        finer = best is None or progress.image.shape != best.image.shape
        if finer or progress.losses["total"] <= best.losses["total"]:
            best = progress
        history.append((progress.step, progress.losses))
        bar.set_postfix_str(", ".join(f"{name} {value:.4g}" for name, value in progress.losses.items()), refresh=False)
        bar.update(progress.done - bar.n)
        if args.save_gif:
            size = [max(1, round(side * shrink)) for side in (height, width)]
            animation.append(nnf.interpolate(progress.image.cpu(), size, mode="bicubic", antialias=True).clamp(0, 1))
        if args.save_all:
            if progress.step == 1:  # an earlier run may have had more steps
                for old in frames.glob("[0-9][0-9][0-9][0-9].png"):
                    old.unlink()
            save_image(progress.image, frames / f"{progress.step:04d}.png")

    stopped: BaseException | None = None
    try:
        image = stylize(
            content,
            styles,
            content_weight=args.content_weight,
            style_weight=args.style_weight,
            tv_weight=args.tv_weight,
            content_layers=args.content_layers,
            style_layers=args.style_layers,
            style_blend=args.style_blend,
            num_steps=args.num_steps,
            lbfgs_iters=args.lbfgs_iters,
            scales=args.scales,
            optimizer=args.optimizer,
            lr=args.lr,
            init=args.init,
            pooling=args.pooling,
            arch=args.vgg,
            weights=args.vgg_weights,
            seed=args.seed,
            precision=precision,
            callback=report,
        )
    except (KeyboardInterrupt, Diverged, OutOfMemory, OSError) as error:
        if best is None:
            raise
        stopped, image = error, nnf.interpolate(best.image, (height, width), mode="bicubic").clamp(0, 1)
    finally:
        bar.close()

    with uninterrupted():
        step, losses = (best.step, best.losses) if stopped else history[-1]
        record = {
            "seed": args.seed,
            "step": f"{step} of {best.steps}",
            "losses": ", ".join(f"{k} {v:.6g}" for k, v in losses.items()),
        }
        save_image(image, args.output, provenance(command, **record))
        if args.save_losses:
            save_losses(history, table, plot)
        if args.save_gif:
            save_gif(animation, gif)
        if stopped:
            print(f"stopped: {args.output} holds the picture of step {step} of {best.steps}", file=sys.stderr)
            raise stopped
        print(args.output)


def save_losses(history: Sequence[tuple[int, dict[str, float]]], table: Path, plot: Path) -> None:
    """Write the losses of each step as a CSV table, a row a step, and as a plot."""
    import matplotlib.pyplot as plt  # here, as it takes long to load and is seldom needed

    plt.switch_backend("agg")  # needs no display
    steps, names = [step for step, _ in history], list(history[0][1])
    with replacing(table) as path, path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *names])
        writer.writerows([step, *losses.values()] for step, losses in history)
    figure, axes = plt.subplots()
    for name in names:
        axes.semilogy(steps, [losses[name] for _, losses in history], label=name)
    axes.set(xlabel="step", ylabel="loss (all but the total before weighting)")
    axes.legend()
    with replacing(plot) as path:
        figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exit with status 2 on a failure that the user can mend."""
    argv = sys.argv[1:] if argv is None else argv
    with one_line_errors():
        run(parse_args(argv), ["python", "gatys.py", *argv])


if __name__ == "__main__":
    main()
