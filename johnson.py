"""Fast style transfer: train a network once for a style, then stylise any picture in one pass.

    J. Johnson, A. Alahi, L. Fei-Fei: "Perceptual Losses for Real-Time Style Transfer and Super-Resolution", ECCV 2016.

Gatys et al. change the pixels of one picture until a fixed loss network likes it. Here a second network, the image
transformation network f_W, learns to do that in one pass: it is trained on many photos x to make ŷ = f_W(x), so that
the same kind of loss, of ŷ against the photo and the painting, becomes small.

    python johnson.py stylize photo.jpg
    python johnson.py train --style style.jpg --data photos/ -o style.pth
    python johnson.py stylize photo.jpg --model style.pth

Where this departs from the paper:

- Instance norm in place of batch norm (Ulyanov, Vedaldi, Lempitsky 2016); nearest-neighbour upsampling and a
  convolution in place of the transposed one, which leaves a checkerboard (Odena, Dumoulin, Olah 2016); reflection
  padding in every convolution in place of a large one at the start. The paper's network is that of
  `--norm batch --upsample transposed --padding start`.
- The loss network is rescaled so that every layer's mean activation over the style image is 1, so that the losses'
  weights mean about the same for VGG-16 and VGG-19 (Gatys et al. do so for every filter, over ImageNet). The total
  variation is a mean, so that its weight means the same at every size.
- The content layer is relu2_2, as in the paper's text; the authors' released code has relu3_3.
- The last layer's tanh gets a tenth of its argument, so that the first steps of training do not saturate it.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common import (
    VGG,
    ArgumentParser,
    InputError,
    check_output,
    find_images,
    fingerprint,
    gram_matrix,
    hold_out,
    load_checkpoint,
    load_image,
    number,
    one_line_errors,
    pick_device,
    pick_precision,
    provenance,
    replacing,
    rescale,
    save_checkpoint,
    save_image,
    transform_files,
)

CONTENT_LAYER = "relu2_2"
STYLE_LAYERS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3")
MODEL = Path(__file__).parent / "models" / "auvers.pth"  # trained on examples/style.jpg, as the README says
MARGIN = 8  # px that are added to each side of a picture before stylising it, and cut off again
STRIP = 2**19  # pixels of a feature map that are convolved at a time, outside training


# --- Network -----------------------------------------------------------------------------------------------


class Convolution(nn.Module):
    """A convolution of the paper's Table 1, behind an upsampling if it has stride 1/2.

    Modules are named so that models of the fast_neural_style example of pytorch/examples load as they are.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, upsample: str = "", pad: str = "reflect"
    ):
        super().__init__()
        self.upsample = upsample == "nearest"
        self.scale = 2 if upsample else 1 / stride  # rows of the result for a row of the input …
        self.reflect = kernel // 2 if pad == "reflect" and upsample != "transposed" else 0
        self.lost = kernel - 1 if pad == "none" else 0  # … and how many are missing
        if upsample == "transposed":
            self.conv2d: nn.Module = nn.ConvTranspose2d(inputs, outputs, kernel, 2, kernel // 2, output_padding=1)
        else:
            self.conv2d = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2 if pad == "zeros" else 0)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x at once, or if it is large in strips of rows: one padded and upsampled copy would fill memory."""
        width = int(x.shape[-1] * max(1, self.scale) ** 2)
        rows, strip = x.shape[-2], max(32, STRIP // width // 2 * 2)
        if torch.is_grad_enabled() or rows <= strip:
            return self.convolve(x)
        y = None
        for top in range(0, rows, strip):
            above = min(top, 4)  # a strip overlaps its neighbours by the 4 rows that a 9×9 kernel reaches
            part = self.convolve(x[..., top - above : top + strip + 4, :])[..., int(above * self.scale) :, :]
            if y is None:
                y = part.new_empty(*part.shape[:2], math.ceil(rows * self.scale) - self.lost, part.shape[-1])
            first, last = int(top * self.scale), int((top + strip) * self.scale)
            y[..., first:last, :] = part[..., : last - first, :]
        return y

    def convolve(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # which would copy x to float32 for these two
            if self.upsample:
                x = nnf.interpolate(x, scale_factor=2, mode="nearest")
            if self.reflect:
                x = nnf.pad(x, [self.reflect] * 4, mode="reflect")
        return self.conv2d(x)


class Residual(nn.Module):
    """R128: two 3×3 convolutions around a skip connection (He et al. 2016), without a ReLU after the sum."""

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
        self.deconv3 = Convolution(32, 3, 9, pad=pad)

    def forward(self, x: Tensor) -> Tensor:
        """Map pictures (B, 3, H, W) in [0, 1] to stylised ones of the same size and range."""
        height, width = x.shape[-2:]
        if self.architecture["padding"] == "start":
            x = reflect(x, 40)
        elif min(height, width) < 5:  # reflection needs more pixels than it adds
            raise InputError(f"{width}×{height} px is too small: the network needs 5 px a side")
        linear = self.architecture["output"] == "linear"
        y = self.conv1(255 * x if linear else x)
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
        y = (y / 255).clamp(0, 1) if linear else (torch.tanh(y / 10) + 1) / 2
        return y[..., :height, :width]  # a side that is no multiple of 4 was rounded up


def reflect(x: Tensor, margin: int) -> Tensor:
    """Pad (B, 3, H, W) by `margin` px a side with its mirror images, however small it is."""
    for dim in (-2, -1):
        n = x.shape[dim]
        index = torch.arange(-margin, n + margin, device=x.device).abs() % max(1, 2 * (n - 1))
        x = x.index_select(dim, torch.minimum(index, 2 * (n - 1) - index).clamp_min(0))
    return x


# --- Losses ------------------------------------------------------------------------------------------------


def content_loss(f: Tensor, f_target: Tensor) -> Tensor:
    """The feature reconstruction loss of feature maps (B, C, H, W), a mean over the batch."""
    # Johnson Eq. 2:  ℓ_feat = 1/(C H W) ‖φ(ŷ) − φ(y)‖²
    return (f.float() - f_target.float()).square().mean()


def style_loss(g: Tensor, g_target: Tensor) -> Tensor:
    """The style reconstruction loss of Gram matrices (B, C, C), which are 1/(C H W) Σ_hw φ_c φ_c' (Eq. 3)."""
    # Johnson Eq. 4:  ℓ_style = ‖G(ŷ) − G(y)‖_F²   (a mean over the batch)
    return (g - g_target).square().sum((1, 2)).mean()


def total_variation(y: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels of y (B, 3, H, W)."""
    return (y[..., 1:, :] - y[..., :-1, :]).square().mean() + (y[..., 1:] - y[..., :-1]).square().mean()


class Objective:
    """The loss of Eq. 5, for a style image (1, 3, h, w) and the loss network φ."""

    def __init__(self, vgg: VGG, style: Tensor, args: argparse.Namespace, precision: torch.dtype) -> None:
        self.vgg, self.args, self.precision = vgg, args, precision
        rescale(vgg, [style])
        with torch.no_grad():
            self.targets = {name: gram_matrix(f) for name, f in self.features(style, args.style_layers).items()}

    def features(self, image: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        with torch.autocast(image.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            return self.vgg(image, layers)

    def __call__(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """The terms `content`, `style`, `variation` of the stylised pictures y of the photos x, and their `total`."""
        args = self.args
        with torch.no_grad():  # the photos are no function of W: no graph for them
            f_target = self.features(x, [args.content_layer])[args.content_layer]
        f = self.features(y, [args.content_layer, *args.style_layers])
        content = content_loss(f[args.content_layer], f_target)
        style = sum(style_loss(gram_matrix(f[name]), G) for name, G in self.targets.items())
        variation = total_variation(y)
        # Johnson Eq. 5:  ŷ = argmin_y λ_c ℓ_feat(y, y_c) + λ_s ℓ_style(y, y_s) + λ_TV ℓ_TV(y)
        total = args.content_weight * content + args.style_weight * style + args.tv_weight * variation
        return {"total": total, "content": content, "style": style, "variation": variation}


# --- Data --------------------------------------------------------------------------------------------------


class Photos(Dataset):
    """Endless random crops: item i depends on the seed and on i alone, whoever asks for it and when.

    Each pass through the files is in an order of its own. A file that cannot be read is skipped with a warning, and the
    next one taken; item i is (crop (3, size, size) in [0, 1], number of files skipped).
    """

    def __init__(self, files: Sequence[Path], size: int, seed: int) -> None:
        self.files, self.size, self.seed = files, size, seed
        self.order: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        epoch, position = divmod(i, len(self.files))
        if self.order[0] != epoch:
            shuffle = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
            self.order = (epoch, torch.randperm(len(self.files), generator=shuffle).tolist())
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + 2**31 + i)
        for skipped in range(len(self.files)):
            path = self.files[self.order[1][(position + skipped) % len(self.files)]]
            try:
                image = load_image(path, shorter=self.size)[0]
            except InputError as error:
                print(f"warning: {error}", file=sys.stderr)
                continue
            top, left = (int(torch.randint(side - self.size + 1, (), generator=generator)) for side in image.shape[1:])
            return image[:, top : top + self.size, left : left + self.size], skipped
        raise InputError("none of the files in --data can be read as an image")


def batches(
    photos: Photos, args: argparse.Namespace, first: int, rank: int, world: int
) -> Iterator[tuple[Tensor, int]]:
    """This process's share of the batches for the iterations from `first` on, as (photos, number of files skipped)."""
    share = args.batch_size // world
    indices = [
        iteration * args.batch_size + rank * share + k
        for iteration in range(first, args.iterations)
        for k in range(share)
    ]
    loader = DataLoader(
        photos,
        share,
        sampler=indices,
        num_workers=args.workers,
        worker_init_fn=ignore_interrupts,
        pin_memory=torch.cuda.is_available(),
    )
    try:
        for crops, skipped in loader:
            yield crops, int(skipped.sum())
    except InputError as error:  # a worker's comes with a traceback in its text
        raise InputError(str(error).splitlines()[-1].removeprefix("common.InputError: ")) from error


def ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


# --- Training ----------------------------------------------------------------------------------------------

# What a resumed training has to have in common with the one that it continues.
FIXED = ["content_weight", "style_weight", "tv_weight", "content_layer", "style_layers", "image_size", "style_size"]
FIXED += ["batch_size", "lr", "norm", "upsample", "padding", "seed"]


def train(args: argparse.Namespace, command: Sequence[str]) -> None:
    """Train f_W as the command line says (§4.1: Adam, learning rate 1e-3, batches of 4, 40 000 iterations)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun sets them
    if world > 1 and torch.cuda.is_available() and args.device in ("auto", "cuda"):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    if world > 1 and args.norm == "batch":
        raise InputError("--norm batch looks at a whole batch: choose --norm instance, or one process")
    if args.batch_size % world:
        raise InputError(f"--batch-size {args.batch_size} cannot be shared by {world} processes")
    check_output(args.output, (".pth", ".pt"))
    checkpoint = args.output.with_suffix(".checkpoint.pth")
    if args.output.resolve().is_relative_to(args.data.resolve()):
        raise InputError(f"{args.output} is in {args.data}, among the photos: choose another --output")
    files = find_images(args.data)
    held_out, files = hold_out(files, args.image_size)  # the sheet shows photos that the network is not trained on
    held_out, photos = held_out.to(device), Photos(files, args.image_size, args.seed)
    style = load_image(args.style, args.style_size)

    torch.manual_seed(args.seed)
    network = TransformNet(args.norm, args.upsample, args.padding).to(device)
    optimizer = torch.optim.Adam(network.parameters(), args.lr)
    first, history = 0, []
    vgg = VGG([args.content_layer, *args.style_layers], args.vgg, args.vgg_weights).to(device)
    settings = {name: getattr(args, name) for name in FIXED} | {"style_layers": list(args.style_layers)}
    settings |= {"vgg": vgg.arch, "vgg_weights": fingerprint(*vgg.state_dict().values()), "style": fingerprint(style)}
    settings |= {"data": fingerprint(*(str(path.relative_to(args.data)) for path in files)), "processes": world}
    settings |= {"precision": str(precision)}
    if args.resume:
        state = load_checkpoint(args.resume)
        try:
            for name, value in settings.items():
                before = state["settings"].get(name)
                if before != value:
                    raise InputError(f"{args.resume} was trained with {name} {before}, not {value}")
            network.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            first, history = int(state["iteration"]), list(state["history"])
        except InputError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"{args.resume} is no training to resume: name a .checkpoint.pth of train") from error
        if first > args.iterations:
            raise InputError(f"{args.resume} has had {first} iterations already: choose --iterations {first} or more")
    for path in (checkpoint, args.output):
        if path.exists() and not (args.resume and args.resume.resolve() == checkpoint.resolve()):
            raise InputError(f"{path} exists: continue with --resume {checkpoint}, or choose another --output")
    if rank == 0:
        print(f"training on {device} in {str(precision).removeprefix('torch.')}: {len(files)} files", file=sys.stderr)
    objective = Objective(vgg, style.to(device), args, precision)
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    f_W = DistributedDataParallel(network) if world > 1 else network

    def transform(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
            return f_W(x)

    record = {"architecture": network.architecture, "settings": settings, "command": shlex.join(command)}

    def save(iteration: int) -> None:
        state = {"iteration": iteration, "history": history, "optimizer": optimizer.state_dict()}
        save_checkpoint(record | state | {"model": network.state_dict()}, checkpoint)
        save_losses(history, args.output.with_suffix(".losses"))
        network.eval()
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
            painted = network(held_out)
        network.train()
        sheet = torch.cat([torch.cat([*row], -1) for row in (held_out, painted)], -2)  # photos above, results below
        save_image(sheet, args.output.with_suffix(".samples.jpg"), provenance(command, iteration=iteration))

    # Ctrl-C ends the training between two iterations, so that the checkpoint is whole; a second one ends it at once.
    interrupts: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        interrupts.append(number)
        if world > 1 or len(interrupts) > 1:
            raise KeyboardInterrupt

    handler = signal.signal(signal.SIGINT, interrupt)
    skipped = 0
    bar = tqdm(total=args.iterations, initial=first, unit="images", unit_scale=args.batch_size, disable=rank > 0)
    try:
        for iteration, (x, unreadable) in enumerate(batches(photos, args, first, rank, world), first + 1):
            x = x.to(device, non_blocking=True)
            losses = objective(x, transform(x))
            optimizer.zero_grad()
            losses["total"].backward()
            optimizer.step()

            skipped += unreadable
            bar.update()
            stopping = bool(interrupts)
            saving = iteration % args.checkpoint_every == 0 or iteration == args.iterations or stopping
            if iteration % 10 == 0 or saving:  # not each time: it makes a GPU wait
                means = torch.stack([*losses.values()]).detach()
                if world > 1:
                    dist.all_reduce(means)
                values = (means / world).tolist()
                if not math.isfinite(values[0]) or not all(p.isfinite().all() for p in network.parameters()):
                    kept = f"{checkpoint} is the last good state: " if checkpoint.exists() else ""
                    raise InputError(f"the loss became infinite; {kept}try a smaller --lr")
                history.append([iteration, *values])
                terms = zip(losses, values, strict=True)
                bar.set_postfix_str(", ".join(f"{name} {value:.3g}" for name, value in terms))
            if saving and rank == 0:
                save(iteration)
            if stopping:
                raise SystemExit(130)
    finally:
        bar.close()
        signal.signal(signal.SIGINT, handler)
        if interrupts and checkpoint.exists():
            print(f"interrupted: continue with --resume {checkpoint}", file=sys.stderr)
    if rank == 0:
        half = {name: value.half() for name, value in network.state_dict().items()}
        save_checkpoint(record | {"iteration": args.iterations, "model": half}, args.output)
    if skipped:
        print(f"warning: {skipped} times a file could not be read", file=sys.stderr)
    if rank == 0:
        print(args.output)
    if world > 1:
        dist.destroy_process_group()


def save_losses(history: Sequence[Sequence[float]], stem: Path) -> None:
    """Write <stem>.csv, a row of losses for every tenth iteration, and a plot of it, <stem>.png."""
    import matplotlib.pyplot as plt  # here, as it takes long to load

    plt.switch_backend("agg")  # needs no display
    names = ["iteration", "total", "content", "style", "variation"]
    with replacing(f"{stem}.csv") as path, path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *history])
    figure, axes = plt.subplots()
    iterations, *columns = zip(*history, strict=True)
    for name, column in zip(names[1:], columns, strict=True):
        axes.semilogy(iterations, column, label=name)
    axes.set(xlabel="iteration", ylabel="loss (content, style and variation before weighting)")
    axes.legend()
    with replacing(f"{stem}.png") as path:
        figure.savefig(path, dpi=150)
    plt.close(figure)


# --- Stylising ---------------------------------------------------------------------------------------------


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
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise InputError(f"{path} is no model of johnson.py nor of pytorch/examples' fast_neural_style") from error
    return network.eval()


@torch.inference_mode()
def stylize(
    network: TransformNet, image: Tensor, strength: float = 1.0, precision: torch.dtype = torch.float32
) -> Tensor:
    """Stylise (B, 3, H, W) in [0, 1]; `strength` blends from the input (0) to the network's output (1).

    The zero padding of VGG teaches a network to paint a faint frame. It does so in a margin, which is cut off.
    """
    height, width = image.shape[-2:]
    margin = 0 if network.architecture["output"] == "linear" else MARGIN  # a published model's pixels stay as they are
    with torch.autocast(image.device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
        painted = network(reflect(image, margin) if margin else image)
    return torch.lerp(image, painted[..., margin : margin + height, margin : margin + width], strength)


def stylize_files(args: argparse.Namespace, command: Sequence[str]) -> None:
    """Stylise files and folders as the command line says; exit with status 1 if some could not be read."""
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    model = args.model or MODEL
    network = load_network(model).to(device)
    if args.precision == "auto" and network.architecture["output"] == "linear":
        precision = torch.float32  # a published model gives the pixels that it gives there
    print(f"computing on {device} in {str(precision).removeprefix('torch.')}", file=sys.stderr)

    def transform(path: Path) -> Tensor:
        return stylize(network, load_image(path, args.image_size).to(device), args.strength, precision)

    transform_files(args.inputs, args.output, model.stem, transform, provenance(command, model=model.name))


# --- Command line ------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; InputError on a mistake."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    sub = commands.add_parser("stylize", help="stylise pictures", description="Stylise pictures in one pass each.")
    sub.set_defaults(run=stylize_files)
    add = sub.add_argument
    add("inputs", type=Path, nargs="+", metavar="input", help="picture, or folder of pictures")
    add("--model", type=Path, help="of train, or of pytorch/examples (default: models/auvers.pth, a Van Gogh)")
    add("-o", "--output", type=Path, help="picture, or folder for several (default: <input>_<model>.png)")
    add("--image-size", type=number(int, 1, 65536), help="longer side of the result, in px (default: the input's own)")
    add("--strength", type=number(most=1), default=1.0, help="from 0, the input, to 1, the network's output")

    sub = commands.add_parser("train", help="make a model of a style", description="Train a network for a style.")
    sub.set_defaults(run=train)
    add = sub.add_argument
    add("--style", type=Path, required=True, help="painting")
    add("--data", type=Path, required=True, help="folder of photos; searched with all folders in it")
    add("-o", "--output", type=Path, default=Path("model.pth"), help="model to write")
    add("--content-weight", type=number(), default=1.0, help="λ_c of Eq. 5")
    add("--style-weight", type=number(), default=5.0, help="λ_s of Eq. 5")
    add("--tv-weight", type=number(), default=4.0, help="λ_TV of Eq. 5")
    add("--content-layer", default=CONTENT_LAYER, metavar="LAYER", help="of relu1_1 … relu5_3")
    add("--style-layers", nargs="+", default=STYLE_LAYERS, metavar="LAYER", help="of relu1_1 … relu5_3")
    add("--image-size", type=number(int, 8, 65536), default=256, help="side of the training crops, in px")
    add("--style-size", type=number(int, 16, 65536), default=512, help="longer side of the painting, in px")
    add("--batch-size", type=number(int, 1), default=4, help="photos an iteration")
    add("--iterations", type=number(int, 1), default=40000, help="of Adam")
    add("--lr", type=number(most=1e30), default=1e-3, help="learning rate")
    add("--norm", choices=["instance", "batch"], default="instance", help="the paper's is batch")
    add("--upsample", choices=["nearest", "transposed"], default="nearest", help="the paper's is transposed")
    add("--padding", choices=["reflect", "start"], default="reflect", help="the paper's is start")
    add("--vgg", choices=["auto", "vgg16", "vgg19"], default="auto", help="the paper's is vgg16; auto: else vgg19")
    add("--vgg-weights", default="auto", metavar="FILE", help="torchvision state dict, or random")
    add("--workers", type=number(int), default=2, help="processes that load photos")
    add(
        "--seed",
        type=number(int, most=2**30),
        default=0,
        help="of the initial weights, the order of the photos and the crops",
    )
    add(
        "--checkpoint-every",
        type=number(int, 1),
        default=500,
        metavar="ITERATIONS",
        help="write all that can be resumed",
    )
    add("--resume", type=Path, metavar="FILE", help="continue from this .checkpoint.pth")

    for sub in commands.choices.values():
        sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, … or mps")
        sub.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto", help="of the networks")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exit with status 2 on a failure that the user can mend."""
    argv = sys.argv[1:] if argv is None else argv
    with one_line_errors():
        args = parse_args(argv)
        args.run(args, ["python", "johnson.py", *argv])


if __name__ == "__main__":
    main()
