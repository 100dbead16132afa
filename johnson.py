"""Fast style transfer: train a network once for a style, then stylise any picture in one pass.

    J. Johnson, A. Alahi, L. Fei-Fei: "Perceptual Losses for Real-Time Style Transfer and Super-Resolution", ECCV 2016.

Gatys et al. change the pixels of one picture until a fixed loss network likes it. Here a second network, the image
transformation network f_W, learns to do that in one pass: it is trained on many photos x to make ŷ = f_W(x), so that
the same kind of loss, of ŷ against the photo and the painting, becomes small.

    python johnson.py stylize photo.jpg --model wave
    python johnson.py train --style style.jpg --data photos/ -o style.pth
    python johnson.py stylize photo.jpg --model style.pth

Where this departs from the paper:

- Instance norm in place of batch norm (Ulyanov, Vedaldi, Lempitsky 2016); nearest-neighbour upsampling and a
  convolution in place of the transposed one, which leaves a checkerboard (Odena, Dumoulin, Olah 2016); reflection
  padding in every convolution in place of a large one at the start. `--norm batch --upsample transposed --padding
  start` is the paper's network, but for the next point.
- The last layer's tanh gets a tenth of its argument, so that the first steps of training do not saturate it.
- The loss network is rescaled so that every layer's mean activation over the style image is 1: one set of weights
  serves VGG-16 and VGG-19 (Gatys et al. do so for every filter, over ImageNet). The total variation is a mean, so that
  its weight means the same at every size.
- The content layer is relu2_2, as in the paper's text; the authors' released code has relu3_3.
- A training may start from another style's network, and its learning rate may fall to 0 in the end: neither by default.
- Photos are cropped at random, where the paper resizes them to 256×256. The painting is 512 px, where the released code
  has 256.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from common import (
    VGG,
    ArgumentParser,
    Crops,
    InputError,
    Training,
    add_device_arguments,
    add_training_arguments,
    all_finite,
    autocast,
    claim_outputs,
    find_images,
    fingerprints,
    gram_matrix,
    hold_out,
    keep_color,
    load_checkpoint,
    load_image,
    number,
    one_line_errors,
    pick_device,
    pick_precision,
    processes,
    provenance,
    rescale,
    save_checkpoint,
    save_sheet,
    say,
    transform_files,
)

# --- Network -----------------------------------------------------------------------------------------------


class Convolution(nn.Module):
    """A convolution of the supplement's Table 1, behind an upsampling if it has stride 1/2.

    Modules are named so that models of the fast_neural_style example of pytorch/examples load as they are.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, upsample: str = "", pad: str = "reflect"
    ) -> None:
        super().__init__()
        self.upsample = upsample == "nearest"
        self.reflect = kernel // 2 if pad == "reflect" and upsample != "transposed" else 0
        if upsample == "transposed":
            self.conv2d: nn.Module = nn.ConvTranspose2d(inputs, outputs, kernel, 2, kernel // 2, output_padding=1)
        else:
            self.conv2d = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2 if pad == "zeros" else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x) if torch.is_grad_enabled() else in_strips(self, x)

    def convolve(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # which would copy x to float32 for these two
            if self.upsample:
                x = nnf.interpolate(x, scale_factor=2, mode="nearest")
            if self.reflect:
                x = nnf.pad(x, [self.reflect] * 4, mode="reflect")
        return self.conv2d(x)


class Residual(nn.Module):
    """R128: a skip connection around two 3×3 convolutions (He et al. 2016).

    There is no ReLU after the sum (Gross & Wilber 2016).
    """

    def __init__(self, channels: int, norm: Callable[[int], nn.Module], pad: str) -> None:
        super().__init__()
        self.conv1, self.in1 = Convolution(channels, channels, 3, pad=pad), norm(channels)
        self.conv2, self.in2 = Convolution(channels, channels, 3, pad=pad), norm(channels)
        self.crop = 2 if pad == "none" else 0  # two convolutions without padding lose 2 px a side

    def forward(self, x: Tensor) -> Tensor:
        y = self.in2(self.conv2(torch.relu_(self.in1(self.conv1(x)))))
        return nnf.pad(x, [-self.crop] * 4) + y


class TransformNet(nn.Module):
    """The image transformation network f_W: c9s1-32, d64, d128, R128 × 5, u64, u32, c9s1-3 (supplement, Table 1).

    Args:
        norm: `instance`, or `batch` as in the paper.
        upsample: `nearest`, followed by a convolution, or `transposed` as in the paper.
        padding: `reflect` in every convolution; or `start`, the paper's: reflection by 40 px at the start, none in the
            residual blocks.
        output: `tanh`, scaled to [0, 1]; or `linear`, in 0 … 255 from and to the network, as in pytorch/examples.
    """

    def __init__(
        self, norm: str = "instance", upsample: str = "nearest", padding: str = "reflect", output: str = "tanh"
    ) -> None:
        super().__init__()
        self.architecture = {"norm": norm, "upsample": upsample, "padding": padding, "output": output}
        self.published = output == "linear"

        def normalization(channels: int) -> nn.Module:
            return nn.BatchNorm2d(channels) if norm == "batch" else nn.InstanceNorm2d(channels, affine=True)

        pad, inner = ("reflect", "reflect") if padding == "reflect" else ("zeros", "none")
        self.conv1, self.in1 = Convolution(3, 32, 9, pad=pad), normalization(32)
        self.conv2, self.in2 = Convolution(32, 64, 3, 2, pad=pad), normalization(64)
        self.conv3, self.in3 = Convolution(64, 128, 3, 2, pad=pad), normalization(128)
        for i in range(1, 6):
            setattr(self, f"res{i}", Residual(128, normalization, inner))
        self.deconv1, self.in4 = Convolution(128, 64, 3, upsample=upsample, pad=pad), normalization(64)
        self.deconv2, self.in5 = Convolution(64, 32, 3, upsample=upsample, pad=pad), normalization(32)
        self.deconv3 = Convolution(32, 3, 9, pad=pad)  # named after those before it: its stride is 1

    def forward(self, x: Tensor) -> Tensor:
        """Map pictures (B, 3, H, W) in [0, 1] to stylised ones of the same size and range."""
        height, width = x.shape[-2:]
        if self.architecture["padding"] == "start":
            x = reflect(x, 40)
        elif min(height, width) < 5:  # reflection needs more pixels than it adds
            raise InputError(f"{width}×{height} px is too small: the network needs 5 px a side")
        y = self.conv1(255 * x if self.published else x)
        y = torch.relu_(self.in1(y))
        y = self.conv2(y)
        y = torch.relu_(self.in2(y))
        y = self.conv3(y)
        y = torch.relu_(self.in3(y))
        for i in range(1, 6):
            y = getattr(self, f"res{i}")(y)
        y = self.deconv1(y)
        y = torch.relu_(self.in4(y))
        y = self.deconv2(y)  # a statement of its own: in a large picture, the map before it is freed now
        y = torch.relu_(self.in5(y))
        y = self.deconv3(y).float()
        # Adam's first steps shift y, a sum over 81 · 32 weights, by about 1 each. Undivided, that saturates the tanh,
        # which has no gradient there: it takes many times as many iterations to come back.
        y = (y / 255).clamp(0, 1) if self.published else (torch.tanh(y / 10) + 1) / 2
        return y[..., :height, :width]  # a side that is no multiple of 4 was rounded up


# --- Losses ------------------------------------------------------------------------------------------------


def content_loss(f: Tensor, f_target: Tensor) -> Tensor:
    """The feature reconstruction loss of feature maps (B, C, H, W), a mean over the batch."""
    # Johnson Eq. 2:  ℓ_feat = 1/(C H W) ‖φ(ŷ) − φ(y)‖²
    return (f.float() - f_target.float()).square().mean()


def style_loss(g: Tensor, g_target: Tensor) -> Tensor:
    """The style reconstruction loss of Gram matrices (B, C, C), a mean over the batch."""
    # Johnson Eq. 3:  G_cc' = 1/(C H W) Σ_hw φ_hwc φ_hwc'   (gram_matrix())
    # Johnson Eq. 4:  ℓ_style = ‖G(ŷ) − G(y)‖_F²
    return (g - g_target).square().sum((1, 2)).mean()


def total_variation(y_hat: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels of ŷ (B, 3, H, W)."""
    down, right = y_hat[..., 1:, :] - y_hat[..., :-1, :], y_hat[..., 1:] - y_hat[..., :-1]
    return down.square().mean() + right.square().mean()


class Objective:
    """Σ_i λ_i ℓ_i(ŷ, y_i), for the style target y_s, an image (1, 3, h, w) in [0, 1], and the loss network φ.

    Args:
        lambda_c, lambda_s, lambda_tv: weights of the content and style losses and the total variation.
        precision: torch.bfloat16 runs φ in it, by autocast.
    """

    def __init__(
        self,
        vgg: VGG,
        y_s: Tensor,
        content_layer: str,
        style_layers: Sequence[str],
        lambda_c: float,
        lambda_s: float,
        lambda_tv: float,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.vgg, self.precision = rescale(vgg, [y_s]), precision
        self.content_layer, self.style_layers = content_layer, style_layers
        self.lambda_c, self.lambda_s, self.lambda_tv = lambda_c, lambda_s, lambda_tv
        with torch.no_grad():
            self.G_s = {layer: gram_matrix(f) for layer, f in self.phi(y_s, style_layers).items()}

    def phi(self, image: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        with autocast(image.device, self.precision):
            return self.vgg(image, layers)

    def __call__(self, y_hat: Tensor, y_c: Tensor) -> dict[str, Tensor]:
        """The terms `content`, `style`, `variation` of ŷ for the content target y_c (B, 3, H, W), and the `total`."""
        with torch.no_grad():  # the target is no function of W: no graph for it
            f_c = self.phi(y_c, [self.content_layer])[self.content_layer]
        f = self.phi(y_hat, [self.content_layer, *self.style_layers])
        content = content_loss(f[self.content_layer], f_c)
        style = sum(style_loss(gram_matrix(f[layer]), G) for layer, G in self.G_s.items())
        variation = total_variation(y_hat)
        # Johnson Eq. 5:  ŷ = argmin_y λ_c ℓ_feat(y, y_c) + λ_s ℓ_style(y, y_s) + λ_TV ℓ_TV(y)
        # The paper minimises this over the pixels, as a baseline, and over W, in Eq. 1.
        total = self.lambda_c * content + self.lambda_s * style + self.lambda_tv * variation
        return {"total": total, "content": content, "style": style, "variation": variation}


# --- Training ----------------------------------------------------------------------------------------------


def step(f_W: TransformNet, objective: Objective, optimizer: torch.optim.Optimizer, x: Tensor) -> dict[str, Tensor]:
    """Change W a little on the photos x (B, 3, H, W) in [0, 1]; return the losses before."""
    # Johnson Eq. 1:  W* = argmin_W E_{x, y_i} [ Σ_i λ_i ℓ_i(f_W(x), y_i) ]   (style transfer: y_c is x itself)
    with autocast(x.device, objective.precision):
        y_hat = f_W(x)
    losses = objective(y_hat, x)
    optimizer.zero_grad()
    losses["total"].backward()
    optimizer.step()
    return {name: loss.detach() for name, loss in losses.items()}


def lr_factor(iteration: int, iterations: int, decay_iterations: int) -> float:
    """1 in iterations 0, 1, …; then linearly down, to reach 0 after the last of `decay_iterations`."""
    return min(1.0, (iterations - iteration) / max(1, decay_iterations))


def train(args: argparse.Namespace, command: Sequence[str]) -> None:
    """Train f_W as the command line says (§4.1: Adam, learning rate 1e-3, batches of 4, 40 000 iterations)."""
    checkpoint, sheet = args.output.with_suffix(".checkpoint.pth"), args.output.with_suffix(".samples.jpg")
    sources = [args.style, args.data, *([args.start_from] if args.start_from else [])]
    resume = claim_outputs(checkpoint, [args.output, sheet], sources, args.resume)
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    held_out, files = hold_out(find_images(args.data), args.image_size)  # the sheet's photos are not trained on
    held_out, y_s = held_out.to(device), load_image(args.style, args.style_size).to(device)

    torch.manual_seed(args.seed)
    f_W = load_network(args.start_from) if args.start_from else TransformNet(args.norm, args.upsample, args.padding)
    f_W.to(device).train()
    optimizer = torch.optim.Adam(f_W.parameters(), args.lr)
    vgg = VGG([args.content_layer, *args.style_layers], args.vgg, args.vgg_weights).to(device)
    weights = args.content_weight, args.style_weight, args.tv_weight
    objective = Objective(vgg, y_s, args.content_layer, args.style_layers, *weights, precision)

    settings = {name: getattr(args, name) for name in SETTINGS} | f_W.architecture
    settings |= {"precision": str(precision), "vgg": vgg.arch}
    record = {"architecture": f_W.architecture, "settings": settings, "command": shlex.join(command)}
    run = Training(
        args, device, checkpoint, resume, args.iterations,
        parts={"model": f_W, "optimizer": optimizer},
        columns=["total", "content", "style", "variation"],
        settings=settings,
        inputs={
            "--data": fingerprints(args.data, files),
            "--style": fingerprints(args.style.parent, [args.style], whole=True),
            "--vgg-weights": fingerprints(Path(), [Path(args.vgg_weights)], whole=True),
            "--start-from": fingerprints(Path(), sources[2:], whole=True),
        },
        record=record,
        written=lambda iteration: save_samples(f_W, precision, held_out, args.output, record | {"step": iteration}),
    )  # fmt: skip
    for (x,) in run.batches(Crops([files], args.image_size, args.image_size, args.seed)):
        optimizer.param_groups[0]["lr"] = args.lr * lr_factor(run.step, args.iterations, args.decay_iterations)
        run.log(step(f_W, objective, optimizer, x))
    say(args.output)


# --- Stylising ---------------------------------------------------------------------------------------------

MARGIN = 8  # px that are added to each side of a picture before stylising it, and cut off again


@torch.no_grad()
def stylize(
    network: TransformNet,
    image: Tensor,
    strength: float = 1.0,
    precision: str = "auto",
    preserve_color: str | None = None,
) -> Tensor:
    """Stylise (B, 3, H, W) in [0, 1]; `strength` blends from the input (0) to the network's output (1).

    With `preserve_color`, `luminance`, the result has the colours of the input (Gatys et al. 2017, see `keep_color`).
    The zero padding of VGG teaches a network to paint a faint frame. It does so in a margin, which is cut off. A
    published model gives the pixels that it gives there: it has no margin, and `auto` is float32.
    """
    height, width = image.shape[-2:]
    margin = 0 if network.published else MARGIN
    with torch.inference_mode(), autocast(image.device, pick_precision(precision, image.device, network.published)):
        y_hat = network(reflect(image, margin))
    y_hat = y_hat[..., margin : margin + height, margin : margin + width]
    return torch.lerp(image, keep_color(y_hat, image) if preserve_color else y_hat, strength)


def reflect(x: Tensor, margin: int) -> Tensor:
    """Pad (B, 3, H, W) by `margin` px a side with its mirror images, however small it is."""
    for dim in (-2, -1):
        n = x.shape[dim]
        index = torch.arange(-margin, n + margin, device=x.device).abs() % max(1, 2 * (n - 1))
        x = x.index_select(dim, torch.minimum(index, 2 * (n - 1) - index).clamp_min(0))
    return x


# ===========================================================================================================
# Nothing below is in the paper: large pictures, files, the command line.
# ===========================================================================================================

MODELS = Path(__file__).parent / "models"
STYLES = ("auvers", "cafe", "kandinsky", "wave")  # models that come with this, trained as the README says
STRIP = 2**19  # pixels of a feature map that are convolved at a time, outside training

# What a resumed training has to have in common with the one that it continues.
SETTINGS = ["content_weight", "style_weight", "tv_weight", "content_layer", "style_layers", "image_size", "style_size"]
SETTINGS += ["batch_size", "lr", "decay_iterations", "seed"]


def in_strips(convolution: Convolution, x: Tensor) -> Tensor:
    """Convolve x (B, C, H, W) in strips of rows if it is large: one padded and upsampled copy would fill memory."""
    conv, rows = convolution.conv2d, x.shape[-2]
    upsampled = convolution.upsample or isinstance(conv, nn.ConvTranspose2d)
    scale = 2 if upsampled else 1 / conv.stride[0]  # rows of the result for a row of x …
    lost = 0 if convolution.reflect or conv.padding[0] else conv.kernel_size[0] - 1  # … and how many are missing
    width = int(x.shape[-1] * max(1, scale) ** 2)
    strip = max(32, STRIP // width // 2 * 2)
    if rows <= strip:
        return convolution.convolve(x)
    y = None
    for top in range(0, rows, strip):
        above = min(top, 4)  # a strip overlaps its neighbours by the 4 rows that a 9×9 kernel reaches
        part = convolution.convolve(x[..., top - above : top + strip + 4, :])[..., int(above * scale) :, :]
        if y is None:
            y = part.new_empty(*part.shape[:2], math.ceil(rows * scale) - lost, part.shape[-1])
        first, last = int(top * scale), int((top + strip) * scale)
        y[..., first:last, :] = part[..., : last - first, :]
    return y


@torch.no_grad()
def save_samples(f_W: TransformNet, precision: torch.dtype, x: Tensor, path: Path, record: dict) -> None:
    """Write the model with its `record`, in half precision, and a sheet of photos x and what it makes of them."""
    half = {name: value.half() for name, value in f_W.state_dict().items()}
    save_checkpoint(record | {"model": half}, path)
    f_W.eval()
    with autocast(x.device, precision):
        columns = {"x": x, "f_W(x)": f_W(x)}
    f_W.train()
    save_sheet(
        columns, path.with_suffix(".losses.png"), path.with_suffix(".samples.jpg"), {"command": record["command"]}
    )


def load_network(path: Path) -> TransformNet:
    """Read a model that `train` has written, or one of the fast_neural_style example of pytorch/examples."""
    state = load_checkpoint(path)
    try:
        if "architecture" in state:
            network, weights = TransformNet(**state["architecture"]), state["model"]
        else:  # a plain state dict; older ones carry statistics that instance norm never used
            network = TransformNet(output="linear")
            weights = {name: value for name, value in state.items() if "running_" not in name}
        network.load_state_dict({name: value.float() for name, value in weights.items()})
        if not all_finite(network.state_dict()):
            raise InputError(f"{path} has weights that are not finite: train it anew, with a smaller --lr")
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise InputError(f"{path} is no model of johnson.py nor of pytorch/examples' fast_neural_style") from error
    return network.eval()


def stylize_files(args: argparse.Namespace, command: Sequence[str]) -> None:
    """Stylise files and folders as the command line says; exit with status 1 if some could not be read."""
    device = pick_device(args.device)
    network = load_network(args.model).to(device)
    precision = pick_precision(args.precision, device, exact=network.published)
    print(f"computing on {device} in {precision}", file=sys.stderr)

    def transform(image: Tensor) -> Tensor:
        return stylize(network, image.to(device), args.strength, args.precision, args.preserve_color)

    metadata = provenance(command, model=args.model.name)
    transform_files(args.inputs, args.output, args.model.stem, transform, args.image_size, metadata)


def model_file(name: str) -> Path:
    """An argparse type: the file of one of STYLES, or any other."""
    path = MODELS / f"{name}.pth" if name in STYLES else Path(name)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"no such file: {name}; name one, or a style: {', '.join(STYLES)}")
    return path


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; InputError on a mistake."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    sub = commands.add_parser("stylize", help="stylise pictures", usage="%(prog)s input [input ...] [flags]")
    sub.set_defaults(run=stylize_files)
    add = sub.add_argument
    add("inputs", type=Path, nargs="+", metavar="input", help="picture, animation, or folder of such")
    add(
        "--model",
        type=model_file,
        default="auvers",
        help=f"{', '.join(STYLES)}, or a file: of train, or of pytorch/examples",
    )
    add("-o", "--output", type=Path, help="picture, or folder for several (default: <input>_<model>.png)")
    add("--image-size", type=number(int, 1, 65536), help="longer side of the result, in px (default: the input's own)")
    add("--strength", type=number(most=1), default=1.0, help="from 0, the input, to 1, the network's output")
    add("--preserve-color", choices=["luminance"], help="keep the photo's colours (default: the painting's)")
    add_device_arguments(sub)

    usage = "%(prog)s --style PAINTING --data FOLDER -o MODEL.pth [flags]"
    sub = commands.add_parser("train", help="make a model of a style", usage=usage)
    sub.set_defaults(run=train)
    add = sub.add_argument
    add("--style", type=Path, required=True, help="painting")
    add("--data", type=Path, required=True, help="folder of photos; searched with all folders in it")
    add("-o", "--output", type=Path, default=Path("model.pth"), help="model to write")
    add("--content-weight", type=number(), default=1.0, help="λ_c of Eq. 5")
    add("--style-weight", type=number(), default=5.0, help="λ_s of Eq. 5")
    add("--tv-weight", type=number(), default=4.0, help="λ_TV of Eq. 5")
    add("--content-layer", default="relu2_2", metavar="LAYER", help="of relu1_1 … relu5_3")
    layers = ["relu1_2", "relu2_2", "relu3_3", "relu4_3"]
    add("--style-layers", nargs="+", default=layers, metavar="LAYER", help="of relu1_1 … relu5_3")
    add("--image-size", type=number(int, 8, 65536), default=256, help="side of the training crops, in px")
    add("--style-size", type=number(int, 16, 65536), default=512, help="longer side of the painting, in px")
    add("--batch-size", type=number(int, 1), default=4, help="photos an iteration")
    add("--iterations", type=number(int, 1), default=40000, help="of Adam")
    add("--decay-iterations", type=number(int), default=0, help="the last ones, while --lr falls to 0")
    add("--lr", type=number(most=1e30), default=1e-3, help="learning rate")
    add("--start-from", type=model_file, metavar="MODEL", help="go on from its weights: a style, or a file")
    add("--norm", choices=["instance", "batch"], default="instance", help="the paper's is batch")
    add("--upsample", choices=["nearest", "transposed"], default="nearest", help="the paper's is transposed")
    add("--padding", choices=["reflect", "start"], default="reflect", help="the paper's is start")
    add("--vgg", choices=["auto", "vgg16", "vgg19"], default="auto", help="the paper's is vgg16; auto: else vgg19")
    add("--vgg-weights", default="auto", metavar="FILE", help="torchvision state dict, or random")
    add_training_arguments(sub)
    add_device_arguments(sub)
    args = parser.parse_args(argv)
    if args.command == "train" and args.output.suffix.lower() not in (".pth", ".pt"):
        raise InputError(f"cannot write {args.output}: its suffix must be .pth or .pt")
    if args.command == "train" and args.norm == "batch" and processes()[1] > 1:
        raise InputError("--norm batch looks at a whole batch: choose --norm instance, or one process")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exit with status 2 on a failure that the user can mend."""
    argv = sys.argv[1:] if argv is None else argv
    with one_line_errors():
        args = parse_args(argv)
        args.run(args, ["python", "johnson.py", *argv])


if __name__ == "__main__":
    main()
