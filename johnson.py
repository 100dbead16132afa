"""Fast style transfer: train a network once for a style, then stylise any picture in one pass.

    J. Johnson, A. Alahi, L. Fei-Fei: "Perceptual Losses for Real-Time Style Transfer and
    Super-Resolution", ECCV 2016.

Gatys et al. change the pixels of one picture until its losses in a fixed network are small. Here a
second network learns to do that in one pass. It is trained on many photos, so that the same kind of
loss becomes small for all.

    python johnson.py stylize photo.jpg --model wave
    python johnson.py train --style style.jpg --data photos/ -o style.pth

    x    a photo, also the content target y_c    ℓ_feat   mean (φ(ŷ) − φ(y_c))²       Eq. 2
    y_s  the painting, the style target          ℓ_style  Σ (G(ŷ) − G(y_s))²          Eq. 4
    ŷ    f_W(x), the stylised photo              λ_c ℓ_feat + λ_s ℓ_style + λ_TV ℓ_TV,
    φ    the loss network, VGG                   made small over the weights W        Eq. 5, 1
    G    the Gram matrices of φ
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
from common import VGG, InputError, autocast, gram_matrix, keep_color, load_image, rescale

# --- Network ---------------------------------------------------------------------------------


def pad(x: Tensor, margin: int, mode: str) -> Tensor:
    """Add `margin` px to each side of maps (B, C, H, W); InputError if x is too small for that.

    `mode` is torch's: reflect, replicate, or constant, which means 0.
    """
    height, width = x.shape[-2:]
    if margin >= min(height, width):
        raise InputError(f"{width}×{height} px is too small: choose more than {margin} px a side")
    if margin == 0:
        return x
    with torch.autocast(x.device.type, enabled=False):  # on a CPU, it would pad in float32
        return nnf.pad(x, [margin] * 4, mode)


class Convolution(nn.Module):
    """Pad maps (B, C, H, W) as `mode` says (`none`: not at all) and convolve them."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.kernel = kernel
        self.margin = 0 if mode == "none" else kernel // 2
        self.conv2d = nn.Conv2d(inputs, outputs, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        x = pad(x, self.margin, self.mode)
        # In strips, which is not in the paper: the same values, in less memory.
        return in_strips(self.conv2d, x, self.kernel)  # (B, C', H/stride, W/stride)


class NearestConvolution(nn.Module):
    """Double the size by nearest neighbours, pad by 1 px, and convolve with 3×3.

    In place of the paper's stride 1/2, which leaves a checkerboard (Odena, Dumoulin, Olah 2016).
    """

    def __init__(self, inputs: int, outputs: int, mode: str) -> None:
        super().__init__()
        self.mode = "replicate" if mode == "reflect" else mode  # before doubling, that is the same
        self.conv2d = nn.Conv2d(inputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        # Doubling makes equal pixels. Where the 3×3 kernel sees equal ones, its weights are added
        # up instead: one transposed convolution does it all, of half the work. Its 4×4 kernel is
        # the sum of four copies of the other, each shifted by 0 or 1 both ways.
        w = self.conv2d.weight.flip(2, 3).transpose(0, 1)  # (C, C', 3, 3)
        w = nnf.pad(w, [0, 1, 0, 0]) + nnf.pad(w, [1, 0, 0, 0])  # (C, C', 3, 4)
        w = nnf.pad(w, [0, 0, 0, 1]) + nnf.pad(w, [0, 0, 1, 0])  # (C, C', 4, 4)
        bias = self.conv2d.bias
        convolve = partial(nnf.conv_transpose2d, weight=w, bias=bias, stride=2, padding=3)
        return in_strips(convolve, pad(x, 1, self.mode), 3)  # (B, C', 2H, 2W)


class TransposedConvolution(nn.Module):
    """Convolve with the paper's stride 1/2."""

    def __init__(self, inputs: int, outputs: int, mode: str) -> None:
        super().__init__()
        self.conv2d = nn.ConvTranspose2d(inputs, outputs, 3, 2, padding=1, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2d(x)  # (B, C', 2H, 2W)


class Residual(nn.Module):
    """Add two 3×3 convolutions to their input (He et al. 2016).

    No ReLU follows the sum (Gross & Wilber 2016). Unpadded, they lose 2 px a side.
    """

    def __init__(self, channels: int, norm: Callable[[int], nn.Module], mode: str) -> None:
        super().__init__()
        self.conv1 = Convolution(channels, channels, 3, 1, mode)
        self.in1 = norm(channels)
        self.conv2 = Convolution(channels, channels, 3, 1, mode)
        self.in2 = norm(channels)
        self.inside = slice(2, -2) if mode == "none" else slice(None)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu_(self.in1(self.conv1(x)))
        y = self.in2(self.conv2(y))
        return y.add_(x[..., self.inside, self.inside])


CHOICES = {  # of the network, the default first
    "norm": ("instance", "batch"),
    "upsample": ("nearest", "transposed"),
    "padding": ("reflect", "start"),
    "output": ("tanh", "linear"),
}


class TransformNet(nn.Module):
    """The image transformation network f_W of Table 1 in the supplement.

    Modules have the names of pytorch/examples' fast_neural_style, whose models load as they are.

    Args:
        norm: `instance` (Ulyanov, Vedaldi, Lempitsky 2016), or `batch` as in the paper.
        upsample: `nearest`, then a convolution; or `transposed`, a convolution as in the paper.
        padding: `reflect` in every convolution; or `start`, the paper's: a reflection of 40 px at
            the start, zeros in convolutions, and nothing in residual blocks.
        output: `tanh`, scaled to [0, 1]; or `linear`, from 0 … 255 to 0 … 255, as in that example.

    Another word is an InputError.
    """

    def __init__(
        self,
        norm: str = "instance",
        upsample: str = "nearest",
        padding: str = "reflect",
        output: str = "tanh",
    ) -> None:
        super().__init__()
        words = {"norm": norm, "upsample": upsample, "padding": padding, "output": output}
        for name, word in words.items():
            if word not in CHOICES[name]:
                known = " or ".join(CHOICES[name])
                raise InputError(f"{name} {word}: choose {known}")
        self.architecture = words
        self.margin = 40 if padding == "start" else 0
        self.linear = output == "linear"
        mode = "constant" if padding == "start" else "reflect"
        inner = "none" if padding == "start" else "reflect"
        Norm = nn.BatchNorm2d if norm == "batch" else partial(nn.InstanceNorm2d, affine=True)
        Upsampling = NearestConvolution if upsample == "nearest" else TransposedConvolution

        # Table 1: its name of a layer, and what comes out of x (B, 3, H, W). With `start`, H and W
        # are larger by 80 at first; each residual block takes away 16 of these, or 4 at H/4.
        self.conv1 = Convolution(3, 32, 9, 1, mode)  # 32×9×9 conv, stride 1  (B, 32, H, W)
        self.in1 = Norm(32)
        self.conv2 = Convolution(32, 64, 3, 2, mode)  # 64×3×3 conv, stride 2  (B, 64, H/2, W/2)
        self.in2 = Norm(64)
        self.conv3 = Convolution(64, 128, 3, 2, mode)  # 128×3×3 conv, stride 2  (B, 128, H/4, W/4)
        self.in3 = Norm(128)
        self.res1 = Residual(128, Norm, inner)  # Residual block, 128 filters  (B, 128, H/4, W/4)
        self.res2 = Residual(128, Norm, inner)  # Residual block, 128 filters  (B, 128, H/4, W/4)
        self.res3 = Residual(128, Norm, inner)  # Residual block, 128 filters  (B, 128, H/4, W/4)
        self.res4 = Residual(128, Norm, inner)  # Residual block, 128 filters  (B, 128, H/4, W/4)
        self.res5 = Residual(128, Norm, inner)  # Residual block, 128 filters  (B, 128, H/4, W/4)
        self.deconv1 = Upsampling(128, 64, mode)  # 64×3×3 conv, stride 1/2  (B, 64, H/2, W/2)
        self.in4 = Norm(64)
        self.deconv2 = Upsampling(64, 32, mode)  # 32×3×3 conv, stride 1/2  (B, 32, H, W)
        self.in5 = Norm(32)
        self.deconv3 = Convolution(32, 3, 9, 1, mode)  # 3×9×9 conv, stride 1  (B, 3, H, W)

    def forward(self, x: Tensor) -> Tensor:
        """Map pictures (B, 3, H, W) in [0, 1] to stylised ones of the same size and range."""
        height, width = x.shape[-2:]
        y = 255 * x if self.linear else x
        y = pad(y, self.margin, "reflect")
        y = torch.relu_(self.in1(self.conv1(y)))
        y = torch.relu_(self.in2(self.conv2(y)))
        y = torch.relu_(self.in3(self.conv3(y)))
        for residual in (self.res1, self.res2, self.res3, self.res4, self.res5):
            y = residual(y)
        y = torch.relu_(self.in4(self.deconv1(y)))
        y = torch.relu_(self.in5(self.deconv2(y)))
        y = self.deconv3(y)
        y = y[..., :height, :width].float()  # crop: sides were rounded up to multiples of 4
        if self.linear:
            return (y / 255).clamp(0, 1)
        # The paper has tanh(y). Adam's first steps shift y, a sum over 81 · 32 weights, by about 1
        # each: that saturates the tanh, which has no gradient there. With a tenth of y, training
        # needs many times fewer iterations.
        return (torch.tanh(y / 10) + 1) / 2


# --- Losses ----------------------------------------------------------------------------------


def content_loss(f: Tensor, f_target: Tensor) -> Tensor:
    """Compute the feature reconstruction loss of feature maps (B, C, H, W), a mean over B."""
    # Johnson Eq. 2:  ℓ_feat = 1/(C H W) ‖φ(ŷ) − φ(y)‖²
    return (f.float() - f_target.float()).square().mean()


def style_loss(g: Tensor, g_target: Tensor) -> Tensor:
    """Compute the style reconstruction loss of G (B, C, C) and its target (1, C, C)."""
    # Johnson Eq. 3:  G_cc' = 1/(C H W) Σ_hw φ_hwc φ_hwc'   (gram_matrix())
    # Johnson Eq. 4:  ℓ_style = ‖G(ŷ) − G(y)‖_F²
    return (g - g_target).square().sum((1, 2)).mean()


class Objective:
    """Measure ŷ for one painting y_s, (1, 3, h, w) in [0, 1]: hold φ and the Gram matrices of y_s.

    `args` has the layers, content_layer and style_layers, and the weights λ of Eq. 5.
    """

    def __init__(self, vgg: VGG, y_s: Tensor, args: Namespace) -> None:
        # The paper takes VGG as it is. Rescaled to a mean activation of 1 over the painting in each
        # layer, as Gatys et al. do for each filter, one set of weights serves VGG-16 and VGG-19.
        self.vgg = rescale(vgg, [y_s])
        self.args = args
        with torch.no_grad():
            f_s = self.vgg(y_s, args.style_layers)
            self.G_s = {layer: gram_matrix(f) for layer, f in f_s.items()}

    def __call__(self, y_hat: Tensor, y_c: Tensor) -> dict[str, Tensor]:
        """Compute the `total` loss of ŷ for the content target y_c, and its terms before weighting.

        Both are (B, 3, H, W) in [0, 1].
        """
        args = self.args
        layer_c = args.content_layer  # relu2_2 in the paper; relu3_3 in the authors' code
        with torch.no_grad():  # the target does not depend on W: no graph for it
            f_c = self.vgg(y_c, [layer_c])
        f = self.vgg(y_hat, [layer_c, *args.style_layers])
        content = content_loss(f[layer_c], f_c[layer_c])
        style = sum(style_loss(gram_matrix(f[layer]), G) for layer, G in self.G_s.items())
        variation = common.total_variation(y_hat)
        # Johnson Eq. 5:  ŷ = argmin_y λ_c ℓ_feat(y, y_c) + λ_s ℓ_style(y, y_s) + λ_TV ℓ_TV(y)
        # The paper minimises this over the pixels, as a baseline, and over W, in Eq. 1.
        lambda_c, lambda_s, lambda_tv = args.content_weight, args.style_weight, args.tv_weight
        total = lambda_c * content + lambda_s * style + lambda_tv * variation
        return {"total": total, "content": content, "style": style, "variation": variation}


# --- Training --------------------------------------------------------------------------------


def step(
    f_W: TransformNet, objective: Objective, optimizer: torch.optim.Optimizer, x: Tensor
) -> dict[str, Tensor]:
    """Change W a little on the photos x (B, 3, H, W) in [0, 1]; return the losses before."""
    # Johnson Eq. 1:  W* = argmin_W E_{x, y_i} [ Σ_i λ_i ℓ_i(f_W(x), y_i) ]
    # In style transfer, y_c is x itself.
    with autocast(x.device, objective.vgg.precision):
        y_hat = f_W(x)
    losses = objective(y_hat, x)
    optimizer.zero_grad()
    losses["total"].backward()
    common.average_gradients(optimizer)
    optimizer.step()
    return {name: loss.detach() for name, loss in losses.items()}


def train(args: Namespace, command: Sequence[str]) -> None:
    """Train f_W (§4.1: Adam, learning rate 1e-3, batches of 4, 40 000 iterations)."""
    checkpoint, *others = outputs_of(args)
    common.check_outputs([*others, checkpoint], [args.style, args.data], [".pth"])
    device = common.pick_device(args.device)
    precision = common.pick_precision(args.precision, device)
    held_out, files = common.hold_out(common.find_images(args.data), args.crop_size)
    y_s = load_image(args.style, args.style_size).to(device)

    torch.manual_seed(args.seed)
    if args.start_from:
        f_W = load_network(args.start_from[0])
        common.go_on(args, f_W.architecture)
    else:
        f_W = TransformNet(args.norm, args.upsample, args.padding)
    f_W.to(device).train()
    optimizer = torch.optim.Adam(f_W.parameters(), args.lr)
    layers = [args.content_layer, *args.style_layers]
    vgg = VGG(layers, args.vgg, args.vgg_weights, precision=precision).to(device)
    objective = Objective(vgg, y_s, args)

    record = {"architecture": f_W.architecture, "args": common.plain(args)}
    record["command"] = shlex.join(command)

    def sample(iteration: int) -> None:
        save_samples(f_W, held_out.to(device), args, record | {"step": iteration})

    parts = {"model": f_W, "optimizer": optimizer}
    steps = args.iterations + args.decay_iterations
    run = common.Training(args, device, precision, checkpoint, steps, parts, sample, record)
    # Photos are cropped at random. The paper resizes them to 256×256.
    crops = common.Crops([files], args.crop_size, args.crop_size, args.seed)
    for [x] in run.batches(crops):
        # The paper has no --decay-iterations.
        decay = common.lr_factor(run.step, args.iterations, args.decay_iterations)
        optimizer.param_groups[0]["lr"] = args.lr * decay
        run.log(step(f_W, objective, optimizer, x))
    print(args.output)


# --- Stylising -------------------------------------------------------------------------------

# In the paper, stylising is f_W(x). Here, a margin is added to x and cut off again.
MARGIN = 8  # px on each side


@torch.no_grad()
def stylize(
    f_W: TransformNet,
    x: Tensor,
    strength: float = 1.0,
    precision: str = "auto",
    preserve_color: str | None = None,
) -> Tensor:
    """Stylise pictures x, floats (B, 3, H, W) in [0, 1], to float32 ones of the same shape.

    `strength` blends from x (0) to the network's output (1). `preserve_color`, None or luminance,
    keeps I and Q of YIQ. InputError if x is no batch of pictures of more than 8 px a side, or too
    large for the memory.

    Networks learn from VGG's zero padding to paint a faint frame, so a margin is stylised too and
    cut off. Models of pytorch/examples get no margin and stay in float32, unless `precision` says
    bfloat16, so that they give the same pixels as there.
    """
    common.check_memory(x, 300)
    if preserve_color not in (None, "luminance"):
        raise InputError(f"preserve_color {preserve_color}: choose luminance, or None")
    x = x.float()
    height, width = x.shape[-2:]
    margin = 0 if f_W.linear else MARGIN
    with autocast(x.device, common.pick_precision(precision, x.device, exact=f_W.linear)):
        y_hat = f_W(pad(x, margin, "reflect"))
    y_hat = y_hat[..., margin : margin + height, margin : margin + width]
    if preserve_color:
        y_hat = keep_color(y_hat, x)
    return torch.lerp(x, y_hat, strength)


# === Nothing below is in the paper: large pictures, files, the command line. ===

STYLES = ("auvers", "cafe", "kandinsky", "wave")  # in models/: see docs/johnson.md
model_file = partial(common.model_file, known=STYLES)
STYLE_LAYERS = ["relu1_2", "relu2_2", "relu3_3", "relu4_3"]
STRIP = 2**20  # values of maps that are convolved at a time


def in_strips(convolve: Callable[[Tensor], Tensor], x: Tensor, kernel: int) -> Tensor:
    """Convolve padded maps x (B, C, H, W) with a kernel of so many rows; large ones in strips.

    The result is the same. It takes less memory and time: torch's convolutions copy what they are
    given. With gradients, as in a training or an export to ONNX, there are no strips.
    """
    if torch.is_grad_enabled():
        return convolve(x)
    _, channels, height, width = x.shape
    rows = max(32, STRIP // (channels * width))
    rows -= rows % 2  # even, for a stride of 2
    places = height - kernel + 1  # of the kernel, from top to bottom
    done = 0  # rows of y
    for top in range(0, places, rows):
        strip = convolve(x[:, :, top : top + rows + kernel - 1])
        made = strip.shape[2]
        if top == 0:
            total = math.ceil(made * places / min(rows, places))
            y = strip.new_empty(*strip.shape[:2], total, strip.shape[3])
        y[:, :, done : done + made] = strip
        done += made
    return y


def beside(output: Path, end: str) -> Path:
    """Name a file of the training that writes `output`: of a/b.pth, a/b.<end>."""
    return output.with_name(f"{output.stem}.{end}")


def outputs_of(args: Namespace) -> list[Path]:
    """List the files that another training must not overwrite, the checkpoint first."""
    checkpoint = beside(args.output, "checkpoint.pth")
    return [checkpoint, args.output, beside(args.output, "samples.jpg")]


@torch.no_grad()
def save_samples(f_W: TransformNet, x: Tensor, args: Namespace, record: dict) -> None:
    """Write the model with its `record`, in half precision, and a sheet of photos x and f_W(x).

    Every so many iterations, as args.keep_every says, both are written once more, to stay.
    """
    half = {name: value.half() for name, value in f_W.state_dict().items()}
    f_W.eval()
    with autocast(x.device, common.pick_precision(args.precision, x.device)):
        columns = {"x": x, "f_W(x)": f_W(x)}
    f_W.train()
    paths = [args.output]
    step = record["step"]
    if args.keep_every and step % args.keep_every == 0:
        paths.append(beside(args.output, f"{step:06d}.pth"))
    metadata = {"command": record["command"]}
    for path in paths:
        common.save_checkpoint(record | {"model": half}, path)
        common.save_sheet(columns, beside(path, "samples.jpg"), metadata)


def load_network(path: Path) -> TransformNet:
    """Read a model that `train` has written, or one of pytorch/examples' fast_neural_style."""
    state = common.load_checkpoint(path)
    try:
        network = TransformNet(**state.get("architecture", {"output": "linear"}))
        weights = common.plain_weights(state)
        # What else there is, is left out, such as statistics that older torch has kept.
        network.load_state_dict({name: weights[name] for name in network.state_dict()})
    except (AttributeError, InputError, KeyError, RuntimeError, TypeError) as error:
        what = "no model of johnson.py nor of pytorch/examples' fast_neural_style"
        raise InputError(f"{path} is {what}") from error
    return network.eval()


def stylize_files(args: Namespace, command: Sequence[str]) -> None:
    """Stylise files and folders as the command line says; exit with 1 if some cannot be read."""
    device = common.pick_device(args.device)
    network = load_network(args.model).to(device)
    precision = common.pick_precision(args.precision, device, exact=network.linear)
    print(f"computing on {device} in {precision}", file=sys.stderr)

    def transform(x: Tensor) -> Tensor:
        return stylize(network, x.to(device), args.strength, args.precision, args.preserve_color)

    metadata = common.provenance(command, model=args.model.name)
    common.transform_files(args, args.model.stem, transform, metadata)


def parse_args(argv: Sequence[str]) -> Namespace:
    """Read the command line; InputError on a mistake."""
    number = common.number
    parser = common.ArgumentParser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    sub = commands.add_parser("stylize", help="stylise pictures")
    add = sub.add_argument_group("pictures").add_argument
    add("inputs", type=Path, nargs="+", metavar="input", help="picture, animation, or folder")
    add("-o", "--output", type=Path, help="picture, or folder (default: <input>_<model>.png)")
    add("--image-size", type=number(int, 1, 65536), help="longer side, px (default: the input's)")
    add = sub.add_argument_group("style").add_argument
    models = f"{', '.join(STYLES)}, or a file, also of pytorch/examples"
    add("--model", type=model_file, default="auvers", help=models)
    add("--strength", type=number(most=1), default=1.0, help="0: the input, 1: the painted one")
    add("--preserve-color", choices=["luminance"], help="keep the photo's colours")
    common.add_device_arguments(sub)

    sub = commands.add_parser("train", help="make a model")
    add = sub.add_argument_group("pictures").add_argument
    add("--style", type=Path, required=True, help="painting")
    add("--data", type=Path, required=True, help="folder of photos, in it or in folders in it")
    add("-o", "--output", type=Path, default=Path("model.pth"), help="model to write")
    add("--crop-size", type=number(int, 8, 65536), default=256, help="side of the crops in px")
    add("--style-size", type=number(int, 16, 65536), default=512, help="the painting's longer side")
    add = sub.add_argument_group("losses").add_argument
    add("--content-weight", type=number(), default=1.0, help="λ_c of Eq. 5")
    add("--style-weight", type=number(), default=5.0, help="λ_s of Eq. 5")
    add("--tv-weight", type=number(), default=4.0, help="λ_TV of Eq. 5")
    add("--content-layer", default="relu2_2", help="layer of the content loss")
    add("--style-layers", nargs="+", default=STYLE_LAYERS, help="of relu1_1 … relu5_3")
    vgg = "auto: vgg16, a download of 528 MB, or vgg19 if that fails"
    add("--vgg", choices=["auto", "vgg16", "vgg19"], default="auto", help=vgg)
    add("--vgg-weights", default="auto", help="file of VGG's weights, as torchvision saves them")
    add = sub.add_argument_group("network").add_argument
    add("--norm", choices=CHOICES["norm"], default="instance", help="paper: batch")
    add("--upsample", choices=CHOICES["upsample"], default="nearest", help="paper: transposed")
    add("--padding", choices=CHOICES["padding"], default="reflect", help="paper: start, 40 px")
    add("--start-from", nargs=1, type=model_file, default=(), help="model to go on from")
    add = sub.add_argument_group("training").add_argument
    add("--iterations", type=number(int, 1), default=40000, help="steps of Adam")
    add("--decay-iterations", type=number(int), default=0, help="more, while --lr falls to 0")
    add("--lr", type=number(most=1e30), default=1e-3, help="learning rate")
    add("--batch-size", type=number(int, 1), default=4, help="photos per step")
    common.add_training_arguments(sub)

    return common.parse_args(parser, argv, outputs_of)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exit with status 2 on a failure that the user can mend."""
    argv = sys.argv[1:] if argv is None else argv
    with common.one_line_errors():
        args = parse_args(argv)
        work = train if args.command == "train" else stylize_files
        work(args, ["python", "johnson.py", *argv])


if __name__ == "__main__":
    main()
