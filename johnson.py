"""Fast style transfer: train a network once for a style, then stylise any picture in one pass.

    J. Johnson, A. Alahi, L. Fei-Fei: "Perceptual Losses for Real-Time Style Transfer and Super-Resolution", ECCV 2016.

Gatys et al. change the pixels of one picture until its losses in a fixed network are small. Here a second network
learns to do that in one pass. It is trained on many photos, so that the same kind of loss becomes small for all.

    python johnson.py stylize photo.jpg --model wave
    python johnson.py train --style style.jpg --data photos/ -o style.pth

    x    a photo, also the content target y_c    φ  the loss network, VGG    ℓ_feat   mean (φ(ŷ) − φ(y_c))²     Eq. 2
    y_s  the painting, the style target          G  Gram matrices of φ       ℓ_style  Σ (G(ŷ) − G(y_s))²        Eq. 4
    ŷ    f_W(x), the stylised photo              λ_c ℓ_feat + λ_s ℓ_style + λ_TV ℓ_TV, made small over W        Eq. 5, 1
"""

from __future__ import annotations

import math
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

import common
from common import VGG, InputError, autocast, gram_matrix, keep_color, load_image, rescale, total_variation

# --- Network -----------------------------------------------------------------------------------------------


class Convolution(nn.Module):
    """Convolve (B, C, H, W), after padding it: `pad` is reflect, zeros or none.

    Where the paper has stride 1/2, `upsample` is nearest, or transposed, the paper's, which leaves a checkerboard
    (Odena, Dumoulin, Olah 2016).
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, upsample: str = "", pad: str = "reflect"
    ) -> None:
        super().__init__()
        margin = kernel // 2
        self.upsample = upsample == "nearest"
        self.margin = margin if pad == "reflect" and upsample != "transposed" else 0
        if upsample == "transposed":
            self.conv2d: nn.Module = nn.ConvTranspose2d(inputs, outputs, kernel, 2, margin, output_padding=1)
        else:
            self.conv2d = nn.Conv2d(inputs, outputs, kernel, stride, margin if pad == "zeros" else 0)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # on a CPU, it would pad in float32
            if self.upsample:
                x = nnf.interpolate(x, scale_factor=2, mode="nearest")
            x = reflect(x, self.margin)
        return self.conv2d(x)


def reflect(x: Tensor, margin: int) -> Tensor:
    """Pad pictures or feature maps (B, C, H, W) by their mirror images; InputError if they are too small for that."""
    height, width = x.shape[-2:]
    if margin >= min(height, width):
        raise InputError(f"{width}×{height} px is too small for the network: choose more than {margin} px a side")
    return nnf.pad(x, [margin] * 4, mode="reflect") if margin else x


class Residual(nn.Module):
    """Add two 3×3 convolutions to their input (He et al. 2016). No ReLU follows the sum (Gross & Wilber 2016)."""

    def __init__(self, channels: int, norm: Callable[[int], nn.Module], pad: str) -> None:
        super().__init__()
        self.conv1, self.in1 = Convolution(channels, channels, 3, pad=pad), norm(channels)
        self.conv2, self.in2 = Convolution(channels, channels, 3, pad=pad), norm(channels)
        self.inside = slice(2, -2) if pad == "none" else slice(None)  # two unpadded convolutions lose 2 px a side

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu_(self.in1(self.conv1(x)))
        return x[..., self.inside, self.inside] + self.in2(self.conv2(y))


class TransformNet(nn.Module):
    """The image transformation network f_W of Table 1 in the supplement.

    Modules have the names of the fast_neural_style example in pytorch/examples, whose models load as they are.

    Args:
        norm: `instance` (Ulyanov, Vedaldi, Lempitsky 2016), or `batch` as in the paper.
        upsample: `nearest`, followed by a convolution, or `transposed` as in the paper.
        padding: `reflect` in every convolution; or `start`, the paper's: 40 px at the start, none in residual blocks.
        output: `tanh`, scaled to [0, 1]; or `linear`, in 0 … 255 from and to the network, as in pytorch/examples.
    """

    def __init__(
        self, norm: str = "instance", upsample: str = "nearest", padding: str = "reflect", output: str = "tanh"
    ) -> None:
        super().__init__()
        self.architecture = {"norm": norm, "upsample": upsample, "padding": padding, "output": output}
        self.margin = 40 if padding == "start" else 0
        self.linear = output == "linear"
        pad, inner = ("zeros", "none") if padding == "start" else ("reflect", "reflect")

        def normalization(channels: int) -> nn.Module:
            return nn.BatchNorm2d(channels) if norm == "batch" else nn.InstanceNorm2d(channels, affine=True)

        self.conv1, self.in1 = Convolution(3, 32, 9, pad=pad), normalization(32)
        self.conv2, self.in2 = Convolution(32, 64, 3, 2, pad=pad), normalization(64)
        self.conv3, self.in3 = Convolution(64, 128, 3, 2, pad=pad), normalization(128)
        self.res1, self.res2, self.res3, self.res4, self.res5 = (Residual(128, normalization, inner) for _ in range(5))
        self.deconv1, self.in4 = Convolution(128, 64, 3, upsample=upsample, pad=pad), normalization(64)
        self.deconv2, self.in5 = Convolution(64, 32, 3, upsample=upsample, pad=pad), normalization(32)
        self.deconv3 = Convolution(32, 3, 9, pad=pad)

    def forward(self, x: Tensor) -> Tensor:
        """Map pictures (B, 3, H, W) in [0, 1] to stylised ones of the same size and range."""
        height, width = x.shape[-2:]
        y = reflect(255 * x if self.linear else x, self.margin)
        for conv, norm in ((self.conv1, self.in1), (self.conv2, self.in2), (self.conv3, self.in3)):
            y = conv(y)  # a statement of its own, so that the map before is freed: it is large
            y = torch.relu_(norm(y))
        for residual in (self.res1, self.res2, self.res3, self.res4, self.res5):
            y = residual(y)
        for conv, norm in ((self.deconv1, self.in4), (self.deconv2, self.in5)):
            y = conv(y)
            y = torch.relu_(norm(y))
        y = self.deconv3(y)[..., :height, :width].float()  # a side that is no multiple of 4 was rounded up
        if self.linear:
            return (y / 255).clamp(0, 1)
        # The paper has tanh(y). Adam's first steps shift y, a sum over 81 · 32 weights, by about 1 each: that saturates
        # the tanh, which has no gradient there. With a tenth of y, training needs many times fewer iterations.
        return (torch.tanh(y / 10) + 1) / 2


# --- Losses ------------------------------------------------------------------------------------------------


def content_loss(f: Tensor, f_target: Tensor) -> Tensor:
    """Compute the feature reconstruction loss of feature maps (B, C, H, W), a mean over the batch."""
    # Johnson Eq. 2:  ℓ_feat = 1/(C H W) ‖φ(ŷ) − φ(y)‖²
    return (f.float() - f_target.float()).square().mean()


def style_loss(g: Tensor, g_target: Tensor) -> Tensor:
    """Compute the style reconstruction loss of Gram matrices (B, C, C), a mean over the batch."""
    # Johnson Eq. 3:  G_cc' = 1/(C H W) Σ_hw φ_hwc φ_hwc'   (gram_matrix())
    # Johnson Eq. 4:  ℓ_style = ‖G(ŷ) − G(y)‖_F²
    return (g - g_target).square().sum((1, 2)).mean()


class Objective:
    """The losses of ŷ for one painting y_s, (1, 3, h, w) in [0, 1]. It holds φ and the Gram matrices of y_s."""

    def __init__(self, vgg: VGG, y_s: Tensor, args: Namespace) -> None:
        # The paper takes VGG as it is. Rescaled to a mean activation of 1 over the painting in each layer, as Gatys et
        # al. do for each filter, one set of weights serves VGG-16 and VGG-19.
        self.vgg, self.args = rescale(vgg, [y_s]), args
        with torch.no_grad():
            self.G_s = {layer: gram_matrix(f) for layer, f in self.vgg(y_s, args.style_layers).items()}

    def __call__(self, y_hat: Tensor, y_c: Tensor) -> dict[str, Tensor]:
        """Return the `total` loss of ŷ for the content target y_c (B, 3, H, W), and its terms before weighting."""
        # The content layer is relu2_2, as in the paper's text. The authors' released code has relu3_3.
        args, layer_c = self.args, self.args.content_layer
        with torch.no_grad():  # the target does not depend on W: no graph for it
            f_c = self.vgg(y_c, [layer_c])[layer_c]
        f = self.vgg(y_hat, [layer_c, *args.style_layers])
        content = content_loss(f[layer_c], f_c)
        style = sum(style_loss(gram_matrix(f[layer]), G) for layer, G in self.G_s.items())
        variation = total_variation(y_hat)
        # Johnson Eq. 5:  ŷ = argmin_y λ_c ℓ_feat(y, y_c) + λ_s ℓ_style(y, y_s) + λ_TV ℓ_TV(y)
        # The paper minimises this over the pixels, as a baseline, and over W, in Eq. 1.
        lambda_c, lambda_s, lambda_tv = args.content_weight, args.style_weight, args.tv_weight
        total = lambda_c * content + lambda_s * style + lambda_tv * variation
        return {"total": total, "content": content, "style": style, "variation": variation}


# --- Training ----------------------------------------------------------------------------------------------


def step(f_W: TransformNet, objective: Objective, optimizer: torch.optim.Optimizer, x: Tensor) -> dict[str, Tensor]:
    """Change W a little on the photos x (B, 3, H, W) in [0, 1]; return the losses before."""
    # Johnson Eq. 1:  W* = argmin_W E_{x, y_i} [ Σ_i λ_i ℓ_i(f_W(x), y_i) ]   (style transfer: y_c is x itself)
    with autocast(x.device, objective.vgg.precision):
        y_hat = f_W(x)
    losses = objective(y_hat, x)
    optimizer.zero_grad()
    losses["total"].backward()
    optimizer.step()
    return {name: loss.detach() for name, loss in losses.items()}


def train(args: Namespace, command: Sequence[str]) -> None:
    """Train f_W as the command line says (§4.1: Adam, learning rate 1e-3, batches of 4, 40 000 iterations)."""
    common.check_outputs(outputs_of(args), [args.style, args.data, *(() if args.resume else args.start_from)])
    device = common.pick_device(args.device)
    precision = common.pick_precision(args.precision, device)
    samples, files = common.hold_out(common.find_images(args.data), args.crop_size)
    samples, y_s = samples.to(device), load_image(args.style, args.style_size).to(device)

    torch.manual_seed(args.seed)
    f_W = TransformNet(args.norm, args.upsample, args.padding)
    if args.start_from:
        f_W = load_network(args.start_from[0])
        common.go_on(args, f_W.architecture)
    f_W.to(device).train()
    optimizer = torch.optim.Adam(f_W.parameters(), args.lr)
    vgg = VGG([args.content_layer, *args.style_layers], args.vgg, args.vgg_weights, precision=precision).to(device)
    objective = Objective(vgg, y_s, args)

    record = {"architecture": f_W.architecture, "args": common.plain(args), "command": shlex.join(command)}
    parts = {"model": f_W, "optimizer": optimizer}
    sample = partial(save_samples, f_W, samples, precision, args.output, record)
    steps = args.iterations + args.decay_iterations
    run = common.Training(args, device, precision, outputs_of(args)[0], steps, parts, sample, record)
    # Photos are cropped at random. The paper resizes them to 256×256.
    for (x,) in run.batches(common.Crops([files], args.crop_size, args.crop_size, args.seed)):
        optimizer.param_groups[0]["lr"] = args.lr * common.lr_factor(run.step, args.iterations, args.decay_iterations)
        run.log(step(f_W, objective, optimizer, x))
    print(args.output)


# --- Stylising ---------------------------------------------------------------------------------------------

MARGIN = 8  # px that are added to each side of a picture before stylising it, and cut off again


@torch.no_grad()
def stylize(
    f_W: TransformNet, x: Tensor, strength: float = 1.0, precision: str = "auto", preserve_color: bool = False
) -> Tensor:
    """Stylise (B, 3, H, W) in [0, 1]; `strength` blends from the input (0) to the network's output (1).

    With `preserve_color` it keeps the input's I and Q of YIQ. VGG's zero padding teaches networks to paint a faint
    frame: a margin takes it. Models of pytorch/examples have none, and `auto` is float32: their pixels are as there.
    """
    common.check_memory(x, 300)
    height, width = x.shape[-2:]
    margin = 0 if f_W.linear else MARGIN
    with autocast(x.device, common.pick_precision(precision, x.device, exact=f_W.linear)):
        y_hat = f_W(reflect(x, margin))[..., margin : margin + height, margin : margin + width]
    return torch.lerp(x, keep_color(y_hat, x) if preserve_color else y_hat, strength)


# === Nothing below is in the paper: large pictures, files, the command line. ===

STYLES = ("auvers", "cafe", "kandinsky", "wave")  # models that come with this, trained as docs/johnson.md says
model_file = partial(common.model_file, known=STYLES)
STYLE_LAYERS = ["relu1_2", "relu2_2", "relu3_3", "relu4_3"]
STRIP = 2**19  # pixels of a feature map that are convolved at a time in `convolve_strips`


def convolve_strips(convolution: Convolution, scale: float, x: Tensor) -> Tensor:
    """Convolve x (B, C, H, W) in strips of rows; each row of x makes `scale` rows of the result.

    Copies of whole feature maps, padded and upsampled, would take more than 6 GB for a photo of 12 megapixels.
    """
    rows, strip = x.shape[-2], max(32, STRIP // int(x.shape[-1] * max(1, scale) ** 2) // 2 * 2)
    if rows <= strip or torch.is_grad_enabled():
        return Convolution.forward(convolution, x)
    for top in range(0, rows, strip):
        above = min(top, 4)  # a strip takes along the rows around it that a 9×9 kernel reaches
        part = Convolution.forward(convolution, x[..., top - above : top + strip + 4, :])
        if top == 0:
            y = part.new_empty(*part.shape[:2], math.ceil(rows * scale), part.shape[-1])
        part = part[..., int(above * scale) : int((above + strip) * scale), :]
        y[..., int(top * scale) : int((top + strip) * scale), :] = part
    return y


def outputs_of(args: Namespace) -> list[Path]:
    """List the files that another training must not overwrite, the checkpoint first."""
    checkpoint, samples = (args.output.parent / (args.output.stem + end) for end in (".checkpoint.pth", ".samples.jpg"))
    return [checkpoint, args.output, samples]


@torch.no_grad()
def save_samples(f_W: TransformNet, x: Tensor, precision: torch.dtype, path: Path, record: dict, step: int) -> None:
    """Write the model with its `record`, in half precision, and a sheet of photos x and what it makes of them."""
    half = {name: value.half() for name, value in f_W.state_dict().items()}
    common.save_checkpoint(record | {"step": step, "model": half}, path)
    f_W.eval()
    with autocast(x.device, precision):
        columns = {"x": x, "f_W(x)": f_W(x)}
    f_W.train()
    common.save_sheet(columns, path.with_suffix(".samples.jpg"), {"command": record["command"]})


def load_network(path: Path) -> TransformNet:
    """Read a model that `train` has written, or one of the fast_neural_style example of pytorch/examples."""
    state = common.load_checkpoint(path)
    try:  # those of pytorch/examples are plain state dicts
        network, weights = TransformNet(**state.get("architecture", {"output": "linear"})), state.get("model", state)
        known = network.state_dict()  # older files have statistics, too, that instance norm never used
        network.load_state_dict({n: w.float() for n, w in weights.items() if n in known or "running_" not in n})
        if not common.all_finite(network.state_dict()):
            raise InputError(f"{path} has weights that are not finite: train it anew, with a smaller --lr")
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise InputError(f"{path} is no model of johnson.py nor of pytorch/examples' fast_neural_style") from error
    for name, scale in (("conv1", 1), ("conv2", 0.5), ("conv3", 0.5), ("deconv1", 2), ("deconv2", 2), ("deconv3", 1)):
        getattr(network, name).forward = partial(convolve_strips, getattr(network, name), scale)
    return network.eval()


def stylize_files(args: Namespace, command: Sequence[str]) -> None:
    """Stylise files and folders as the command line says; exit with status 1 if some could not be read."""
    device = common.pick_device(args.device)
    network = load_network(args.model).to(device)
    precision = common.pick_precision(args.precision, device, exact=network.linear)
    print(f"computing on {device} in {precision}", file=sys.stderr)
    options = args.strength, args.precision, args.preserve_color is not None
    metadata = common.provenance(command, model=args.model.name)
    common.transform_files(args, args.model.stem, lambda x: stylize(network, x.to(device), *options), metadata)


def parse_args(argv: Sequence[str]) -> Namespace:
    """Read the command line; InputError on a mistake."""
    number = common.number
    parser = common.ArgumentParser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("stylize", help="stylise pictures", usage="%(prog)s input [input ...] [flags]")
    add = sub.add_argument_group("pictures").add_argument
    add("inputs", type=Path, nargs="+", metavar="input", help="picture, animation, or folder of such")
    add("-o", "--output", type=Path, help="picture, or folder for several (default: <input>_<model>.png)")
    add("--image-size", type=number(int, 1, 65536), help="longer side of the result, in px (default: the input's own)")
    models = f"{', '.join(STYLES)}, or a file, also of pytorch/examples"
    add = sub.add_argument_group("style").add_argument
    add("--model", type=model_file, metavar="MODEL", default="auvers", help=models)
    add("--strength", type=number(most=1), default=1.0, help="from 0, the input, to 1, the network's")
    add("--preserve-color", choices=["luminance"], help="keep the photo's colours (default: the painting's)")
    common.add_device_arguments(sub)
    sub = commands.add_parser("train", help="make a model", usage="%(prog)s --style PAINTING --data FOLDER [flags]")
    add = sub.add_argument_group("pictures").add_argument
    add("--style", type=Path, required=True, help="painting")
    add("--data", type=Path, required=True, help="folder of photos; searched with all folders in it")
    add("-o", "--output", type=Path, default=Path("model.pth"), help="model to write")
    add("--crop-size", type=number(int, 8, 65536), default=256, help="side of the training crops, in px")
    add("--style-size", type=number(int, 16, 65536), default=512, help="longer side of the painting, in px")
    add = sub.add_argument_group("losses").add_argument
    add("--content-weight", type=number(), default=1.0, help="λ_c of Eq. 5")
    add("--style-weight", type=number(), default=5.0, help="λ_s of Eq. 5")
    add("--tv-weight", type=number(), default=4.0, help="λ_TV of Eq. 5")
    add("--content-layer", default="relu2_2", metavar="LAYER", help="layer of the content loss")
    layers = "layers of the style loss, of relu1_1 … relu5_3"
    add("--style-layers", nargs="+", default=STYLE_LAYERS, metavar="LAYER", help=layers)
    add("--vgg", choices=["auto", "vgg16", "vgg19"], default="auto", help="auto: vgg16, of 528 MB, else vgg19")
    add("--vgg-weights", default="auto", metavar="FILE", help="of VGG, as torchvision saves them")
    add = sub.add_argument_group("network").add_argument
    add("--norm", choices=["instance", "batch"], default="instance", help="the paper's is batch")
    add("--upsample", choices=["nearest", "transposed"], default="nearest", help="the paper's is transposed")
    add("--padding", choices=["reflect", "start"], default="reflect", help="start: 40 px, as in the paper")
    add("--start-from", nargs=1, type=model_file, metavar="MODEL", default=(), help="go on from a style, or a file")
    add = sub.add_argument_group("training").add_argument
    add("--iterations", type=number(int, 1), default=40000, help="training steps of Adam")
    add("--decay-iterations", type=number(int), default=0, help="steps after --iterations in which the rate falls to 0")
    add("--lr", type=number(most=1e30), default=1e-3, help="learning rate")
    add("--batch-size", type=number(int, 1), default=4, help="photos an iteration")
    common.add_training_arguments(sub)
    args = common.parse_args(parser, argv, outputs_of)
    if args.command == "train" and args.output.suffix.lower() not in (".pth", ".pt"):
        raise InputError(f"cannot write {args.output}: its suffix must be .pth or .pt")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exit with status 2 on a failure that the user can mend."""
    argv = sys.argv[1:] if argv is None else argv
    with common.one_line_errors():
        args = parse_args(argv)
        {"stylize": stylize_files, "train": train}[args.command](args, ["python", "johnson.py", *argv])


if __name__ == "__main__":
    main()
