"""Unpaired image-to-image translation: learn from two sets of pictures to turn one into the other.

    J.-Y. Zhu, T. Park, P. Isola, A. A. Efros: "Unpaired Image-to-Image Translation using
    Cycle-Consistent Adversarial Networks", ICCV 2017. Its appendix, §7, is numbered as in
    arXiv:1703.10593.

Nobody has photos of the same horse as a zebra. So a generator is trained to make pictures that a
discriminator cannot tell from zebras. What ties a zebra to its horse is the way back, which a
second generator learns.

    python cyclegan.py translate horse.jpg          # with a model that is in models/
    python cyclegan.py train horse2zebra -o run/    # downloads the paper's pictures
    python cyclegan.py translate photo.jpg --model run/checkpoint.pth

    X, Y      the domains, and x, y their pictures
    G, F      generators, G: X → Y and F: Y → X
    D_X, D_Y  discriminators, near 1 for real pictures, near 0 for made ones          Eq. 1
    F(G(x)) ≈ x and G(F(y)) ≈ y: cycle consistency                                    Eq. 2
"""

from __future__ import annotations

import math
import shlex
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchvision.datasets.utils import download_and_extract_archive

import common
from common import InputError, autocast

# --- Networks -------------------------------------------------------------------------------------


class Reflect(nn.ReflectionPad2d):
    """Pad by reflection, outside autocast, which on a CPU would copy the input to float32."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


class Upsample(nn.Conv2d):
    """Repeat every pixel, then convolve: (B, C, H, W) → (B, C', 2H, 2W).

    A transposed convolution would leave checkerboards (Odena et al. 2016).
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = nnf.interpolate(x, scale_factor=2, mode="nearest")  # (B, C, 2H, 2W)
            x = nnf.pad(x, [1, 1, 1, 1], mode="reflect")
        return super().forward(x)


def upsampling(kind: str, inputs: int, outputs: int) -> nn.Module:
    """Make the convolution of a uk: `transposed`, as in the paper, or `nearest`."""
    if kind == "transposed":
        return nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=1)
    if kind == "nearest":
        return Upsample(inputs, outputs, 3)
    raise InputError(f"unknown upsample {kind}: choose nearest or transposed")


class Residual(nn.Module):
    """R256: add two 3×3 convolutions to their input (He et al. 2016)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            Reflect(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
            nn.ReLU(inplace=True),
            Reflect(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class Generator(nn.Module):
    """G or F: c7s1-64, d128, d256, R256 × 9, u128, u64, c7s1-3 (§7.2), with instance norm.

    It has 9 `blocks`, or 6 for pictures of 128 px, and `width` channels in the first layer. The
    paper's `upsample` is `transposed`. Layers have the positions of the authors' PyTorch code,
    whose models load as they are.
    """

    def __init__(self, blocks: int = 9, width: int = 64, upsample: str = "transposed") -> None:
        super().__init__()
        self.architecture = {"blocks": blocks, "width": width, "upsample": upsample}
        w = width
        self.model = nn.Sequential(
            Reflect(3),
            nn.Conv2d(3, w, 7),  # c7s1-64  (B, 64, H, W)
            nn.InstanceNorm2d(w),
            nn.ReLU(inplace=True),
            nn.Conv2d(w, 2 * w, 3, stride=2, padding=1),  # d128  (B, 128, H/2, W/2)
            nn.InstanceNorm2d(2 * w),
            nn.ReLU(inplace=True),
            nn.Conv2d(2 * w, 4 * w, 3, stride=2, padding=1),  # d256  (B, 256, H/4, W/4)
            nn.InstanceNorm2d(4 * w),
            nn.ReLU(inplace=True),
            *[Residual(4 * w) for _ in range(blocks)],  # R256 × 9  (B, 256, H/4, W/4)
            upsampling(upsample, 4 * w, 2 * w),  # u128  (B, 128, H/2, W/2)
            nn.InstanceNorm2d(2 * w),
            nn.ReLU(inplace=True),
            upsampling(upsample, 2 * w, w),  # u64  (B, 64, H, W)
            nn.InstanceNorm2d(w),
            nn.ReLU(inplace=True),
            Reflect(3),
            nn.Conv2d(w, 3, 7),  # c7s1-3  (B, 3, H, W)
            nn.Tanh(),  # as in the authors' code; in §7.2, c7s1-3 has a norm and a ReLU
        )
        self.apply(initialize)

    def forward(self, x: Tensor) -> Tensor:
        """Map pictures (B, 3, H, W) in [0, 1] to the other domain; H, W are multiples of 4."""
        y = self.model(2 * x - 1)  # from and to the network's range, -1 … 1
        return (y.float() + 1) / 2


class PatchDiscriminator(nn.Module):
    """D_X or D_Y: C64-C128-C256-C512, then one channel (§7.2): judge every patch of 70×70 px.

    §7.2 has stride 2 for every Ck, so that a verdict would see 94×94 px, where the paper says
    70×70. Here, as in the authors' code, C512 and the last convolution have stride 1.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        w = width
        self.model = nn.Sequential(
            nn.Conv2d(3, w, 4, stride=2, padding=1),  # C64, without a norm  (B, 64, H/2, W/2)
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(w, 2 * w, 4, stride=2, padding=1),  # C128  (B, 128, H/4, W/4)
            nn.InstanceNorm2d(2 * w),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(2 * w, 4 * w, 4, stride=2, padding=1),  # C256  (B, 256, H/8, W/8)
            nn.InstanceNorm2d(4 * w),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(4 * w, 8 * w, 4, stride=1, padding=1),  # C512  (B, 512, H/8 - 1, W/8 - 1)
            nn.InstanceNorm2d(8 * w),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(8 * w, 1, 4, stride=1, padding=1),  # (B, 1, H/8 - 2, W/8 - 2)
        )
        self.apply(initialize)

    def forward(self, x: Tensor) -> Tensor:
        """Map pictures (B, 3, H, W) in [0, 1] to verdicts, near 1 where they look real."""
        return self.model(2 * x - 1).float()


def initialize(module: nn.Module) -> None:
    """Draw a convolution's weights from N(0, 0.02) (§7.1), and set its biases to 0."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        nn.init.zeros_(module.bias)


# --- Losses ---------------------------------------------------------------------------------------


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Average |a − b| as the authors' code does, in -1 … 1: twice that of pictures in [0, 1]."""
    return 2 * (a - b).abs().mean()


def generator_losses(
    G: nn.Module,
    F: nn.Module,
    D_X: nn.Module,
    D_Y: nn.Module,
    x: Tensor,
    y: Tensor,
    lambda_cycle: float = 10.0,
    lambda_identity: float = 0.5,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return what G and F minimise on x and y (B, 3, H, W) in [0, 1]; and G(x), F(y).

    The losses are `total` and its terms before weighting: `G`, `F`, `cycle`, `identity`.
    """
    G_x = G(x)
    F_y = F(y)
    # §4, in place of Eq. 1's logarithms:
    # G minimises E_x (D_Y(G(x)) − 1)²,  F minimises E_y (D_X(F(y)) − 1)²
    gan_G = (D_Y(G_x) - 1).square().mean()
    gan_F = (D_X(F_y) - 1).square().mean()
    # §3.2, Eq. 2:  L_cyc = E_x ‖F(G(x)) − x‖₁ + E_y ‖G(F(y)) − y‖₁   (means over the pixels)
    cycle = distance(F(G_x), x) + distance(G(F_y), y)
    # §3.3, Eq. 3, what G and F minimise of L(G, F, D_X, D_Y):  both of these + λ L_cyc
    total = gan_G + gan_F + lambda_cycle * cycle
    identity = torch.zeros_like(total)
    if lambda_identity:
        # §5.2:  L_identity = E_y ‖G(y) − y‖₁ + E_x ‖F(x) − x‖₁   (weighted by 0.5 λ, §7.1)
        # The paper has it for paintings → photos (§5.2) and flowers (§7.1); here it is the default.
        identity = distance(G(y), y) + distance(F(x), x)
        total = total + lambda_identity * lambda_cycle * identity
    losses = {"total": total, "G": gan_G, "F": gan_F, "cycle": cycle, "identity": identity}
    return losses, G_x, F_y


def discriminator_loss(D: nn.Module, real: Tensor, made: Tensor) -> Tensor:
    """Compute what D_X or D_Y minimises on real pictures and made ones, (B, 3, H, W) each."""
    # §4:  D_Y minimises ½ [E_y (D_Y(y) − 1)² + E_x D_Y(G(x))²]
    # (the half is from §7.1, to let D learn more slowly than G; Adam, which divides by the size of
    # gradients, undoes it)
    return ((D(real) - 1).square().mean() + D(made).square().mean()) / 2


class ImagePool:
    """Keep pictures that a generator has made, to show its discriminator older ones, too (§4)."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.images: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(seed)

    def query(self, made: Tensor) -> Tensor:
        """Take in pictures (B, 3, H, W); return as many, to be shown to the discriminator."""
        size = made.shape[1:]
        self.images = [image for image in self.images if image.shape == size]  # --crop-size changed
        shown = []
        for image in made.detach().unbind():
            if len(self.images) < self.size:  # not yet full: keep the picture, and show it
                self.images.append(image)
                shown.append(image)
            elif self.size and torch.rand((), generator=self.generator) < 0.5:
                # show an older one, and keep this one in its place
                k = int(torch.randint(self.size, (), generator=self.generator))
                shown.append(self.images[k].to(made))
                self.images[k] = image
            else:  # show the picture, without keeping it
                shown.append(image)
        return torch.stack(shown)

    def state_dict(self) -> dict:
        return {"images": self.images, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.images = [image.float() for image in state["images"]]
        self.generator.set_state(state["generator"])


# --- Training -------------------------------------------------------------------------------------


class CycleGAN:
    """G, F, D_X and D_Y with the optimisers and image pools: all that a step changes."""

    def __init__(self, args: Namespace, device: torch.device, precision: torch.dtype) -> None:
        self.args = args
        self.precision = precision
        networks = nn.ModuleList(first_networks(args)).to(device).train()
        self.G, self.F, self.D_X, self.D_Y = networks
        self.G_ema = AveragedModel(self.G, avg_fn=self.average)
        self.F_ema = AveragedModel(self.F, avg_fn=self.average)
        betas = (args.beta1, 0.999)
        self.optimizer_G = torch.optim.Adam(networks[:2].parameters(), args.lr, betas)
        self.optimizer_D = torch.optim.Adam(networks[2:].parameters(), args.lr, betas)
        self.pool_X = ImagePool(args.pool_size, seed=1000 * args.seed)
        self.pool_Y = ImagePool(args.pool_size, seed=1000 * args.seed + 1)

    def average(self, w_ema: Tensor, w: Tensor, n: Tensor) -> Tensor:
        """Return d · w_ema + (1 − d) · w  with d = min(ema, (1 + n)/(10 + n)) after n steps.

        This averages the weights over about the last tenth of the steps, 1000 at most. Samples
        and exported models have these averages of G and F. The paper has none.
        """
        d = ((1 + n) / (10 + n)).clamp(max=self.args.ema)
        return torch.lerp(w, w_ema, d)

    def step(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Change the networks a little on x and y (B, 3, H, W); return the losses before."""
        # §3.3, Eq. 4:  G*, F* = arg min_{G,F} max_{D_X,D_Y} L(G, F, D_X, D_Y)
        # They take turns. With the squares of §4, each side minimises losses of its own.
        # First G and F:
        weights = self.args.lambda_cycle, self.args.lambda_identity
        self.D_X.requires_grad_(False)
        self.D_Y.requires_grad_(False)
        with autocast(x.device, self.precision):
            losses, G_x, F_y = generator_losses(self.G, self.F, self.D_X, self.D_Y, x, y, *weights)
        self.optimizer_G.zero_grad()
        losses["total"].backward()
        common.average_gradients(self.optimizer_G)
        self.optimizer_G.step()
        self.G_ema.update_parameters(self.G)
        self.F_ema.update_parameters(self.F)

        # Then D_X and D_Y, on real pictures and on what the pools return for F(y) and G(x):
        self.D_X.requires_grad_(True)
        self.D_Y.requires_grad_(True)
        with autocast(x.device, self.precision):
            losses["D_X"] = discriminator_loss(self.D_X, x, self.pool_X.query(F_y))
            losses["D_Y"] = discriminator_loss(self.D_Y, y, self.pool_Y.query(G_x))
        self.optimizer_D.zero_grad()
        (losses["D_X"] + losses["D_Y"]).backward()
        common.average_gradients(self.optimizer_D)
        self.optimizer_D.step()
        return {name: loss.detach() for name, loss in losses.items()}


def train(args: Namespace, command: Sequence[str]) -> None:
    """Train G, F, D_X and D_Y as the command line says (§7.1)."""
    checkpoint, *exported = outputs_of(args)
    inputs = [Path(name) for name in args.data]
    inputs += [Path("data", name) for name in args.data]  # sets are downloaded to data/
    common.check_outputs([*exported, checkpoint], inputs, [".pth"])
    device = common.pick_device(args.device)
    precision = common.pick_precision(args.precision, device)
    (X, x_test), (Y, y_test) = domains(args.data, args.crop_size)
    at_once = args.batch_size * common.process_count()
    larger = max(len(X), len(Y))
    epoch_steps = math.ceil(larger / at_once)
    steps = epoch_steps * (args.epochs + args.decay_epochs)
    if args.max_steps:
        steps = min(steps, args.max_steps)

    torch.manual_seed(args.seed)
    gan = CycleGAN(args, device, precision)
    parts = {name: part for name, part in vars(gan).items() if hasattr(part, "state_dict")}
    record = {"args": common.plain(args), "command": shlex.join(command)}

    def sample(step: int) -> None:
        epoch = math.ceil(step / epoch_steps)
        keep = args.keep_every and step % (args.keep_every * epoch_steps) == 0
        tests = x_test.to(device), y_test.to(device)
        save_samples(gan, *tests, record | {"step": step}, epoch, bool(keep))

    run = common.Training(
        args, device, precision, checkpoint, steps, parts, sample, record, epoch_steps
    )
    # Pictures are scaled by their shorter side. The authors' code squashes them to a square.
    crops = common.Crops([X, Y], args.load_size, args.crop_size, args.seed, flip=not args.no_flip)
    for x, y in run.batches(crops):
        epoch = run.step / epoch_steps
        lr = args.lr * common.lr_factor(epoch, args.epochs, args.decay_epochs)
        for group in gan.optimizer_G.param_groups + gan.optimizer_D.param_groups:
            group["lr"] = lr
        progress = {"epoch": int(epoch) + 1, "lr": lr}
        run.log(progress | gan.step(x, y))
    print(checkpoint)


# --- Translating ----------------------------------------------------------------------------------


def translate(network: Generator, x: Tensor, precision: str = "auto") -> Tensor:
    """Translate (B, 3, H, W) in [0, 1] of any size from 5 px a side, to the same size.

    `precision` is float32, bfloat16, or auto: bfloat16 where that is fast.
    """
    common.check_memory(x, 15 * network.model[1].out_channels)
    height, width = x.shape[-2:]
    if min(height, width) < 5:
        raise InputError(f"{width}×{height} px is too small: the network needs 5 px a side")

    padding = (0, -width % 4, 0, -height % 4)  # to multiples of 4
    padded = nnf.pad(x.float(), padding, mode="reflect")
    with torch.no_grad(), autocast(x.device, common.pick_precision(precision, x.device)):
        return network(padded)[..., :height, :width]


# === Nothing below is in the paper: data, samples, files, the command line. ===

SERVER = "https://efrosgans.eecs.berkeley.edu/cyclegan/datasets"
DATASETS = ["horse2zebra", "apple2orange", "summer2winter_yosemite", "monet2photo", "maps"]
DATASETS += ["cezanne2photo", "ukiyoe2photo", "vangogh2photo", "facades", "ae_photos"]
DATASETS += ["iphone2dslr_flower"]

# The model in models/, whose README says how it was made.
model_file = partial(common.model_file, known=["horse2zebra"])


def download(name: str, folder: Path = Path("data")) -> Path:
    """Fetch and unpack the authors' set `name`, unless it is there; return its folder.

    InputError if there is no such set, or if that fails.
    """
    if name not in DATASETS:
        sets = ", ".join(DATASETS)
        raise InputError(f"no such folder: {name}; name two folders, or a set: {sets}")
    target = folder / name
    if target.is_dir():
        return target
    url = f"{SERVER}/{name}.zip"
    print(f"downloading {url}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (
            common.download_timeout(),
            tempfile.TemporaryDirectory(prefix=".", dir=folder) as temporary,
        ):
            download_and_extract_archive(url, temporary)
            Path(temporary, name).rename(target)
    except Exception as error:  # no network, a bad proxy, a bad file
        if target.is_dir():  # another process of torchrun was faster
            return target
        reason = f"{type(error).__name__}: {getattr(error, 'reason', error)}"
        advice = f"try again, or unpack it yourself, to {target}/trainA, trainB, …"
        raise InputError(f"cannot download {url} whole ({reason}): {advice}") from error
    return target


def domains(data: Sequence[str], size: int) -> list[tuple[Sequence[Path], Tensor]]:
    """Find, for X and for Y, the files to train on, and up to four test pictures.

    `data` are two folders; or one with trainA and trainB; or the name of one of the authors' sets.
    Test pictures (B, 3, size, size) are from testA and testB, or held out.
    """
    if len(data) > 2:
        raise InputError(f"{len(data)} folders given: name two, or one set")
    if len(data) == 2:
        pairs = [(Path(folder), None) for folder in data]
    else:
        root = Path(data[0])
        if not root.is_dir():
            root = download(data[0])
        pairs = [(root / "trainA", root / "testA"), (root / "trainB", root / "testB")]
    result = []
    for folder, test in pairs:
        files = common.find_images(folder)
        if test and test.is_dir():
            samples, _ = common.hold_out(common.find_images(test), size)
        else:
            samples, files = common.hold_out(files, size)
        result.append((files, samples))
    return result


def outputs_of(args: Namespace) -> list[Path]:
    """List the files that another training must not overwrite, the checkpoint first."""
    checkpoint = args.output / "checkpoint.pth"
    return [checkpoint, args.export] if args.export else [checkpoint]


@torch.no_grad()
def save_samples(gan: CycleGAN, x: Tensor, y: Tensor, record: dict, epoch: int, keep: bool) -> None:
    """Write a sheet of the test pictures x and y; the model for --export; and one to `keep`.

    These are the averages of G and F alone, in half precision, with their `record`.
    """
    G, F = gan.G_ema.module, gan.F_ema.module
    with autocast(x.device, gan.precision):
        columns = {"x": x, "G(x)": G(x), "F(G(x))": F(G(x)), "F(x)": F(x)}
        columns |= {"y": y, "F(y)": F(y), "G(F(y))": G(F(y)), "G(y)": G(y)}
    sheet = gan.args.output / f"epoch_{epoch:03d}.jpg"
    common.save_sheet(columns, sheet, {"command": record["command"]})
    model = dict(record)
    for name, network in (("G", G), ("F", F)):
        model[name] = {key: w.half() for key, w in network.state_dict().items()}
    if gan.args.export:
        common.save_checkpoint(model, gan.args.export)
    if keep:
        common.save_checkpoint(model, sheet.with_suffix(".pth"))


def load_generator(path: Path, direction: str = "x2y") -> tuple[Generator, int | None]:
    """Read G (x2y) or F (y2x) from a file of `train`, or the generator of a file of the authors.

    Returns it with the shorter side of the pictures of its training, in px, or None if the file is
    the authors', which does not say. InputError if it is neither, or damaged.
    """
    return generator_in(common.load_checkpoint(path), path, direction)


def generator_in(state: dict[str, Any], path: Path, direction: str) -> tuple[Generator, int | None]:
    """Do what `load_generator` does, with what was read from its file."""
    authors = "G" not in state  # but plain weights
    name = "G" if direction == "x2y" else "F"
    try:
        saved = state if authors else state.get(f"{name}_ema", state[name])
        network = build_generator(saved)
        load_size = state.get("args", {}).get("load_size")
    except (AttributeError, LookupError, RuntimeError, TypeError) as error:
        what = "no model of cyclegan.py, nor a ResNet generator with instance norm of its authors"
        raise InputError(f"{path} is {what}") from error
    if authors and direction == "y2x":
        raise InputError(f"{path} holds one generator: for the other direction, name its file")
    return network.eval(), load_size


def build_generator(saved: dict[str, Tensor]) -> Generator:
    """Make the generator whose weights are saved."""
    weights = {}
    for name, value in common.plain_weights(saved).items():
        if "running_" not in name and name != "n_averaged":  # statistics that nothing uses
            weights[name] = value
    blocks = sum(name.endswith("conv_block.1.weight") for name in weights)
    width = len(weights["model.1.weight"])
    u128 = weights[f"model.{10 + blocks}.weight"]  # a transposed one has its 4 · width inputs first
    upsample = "transposed" if len(u128) == 4 * width else "nearest"
    network = Generator(blocks, width, upsample)
    network.load_state_dict(weights)
    return network


def first_networks(args: Namespace) -> tuple[Generator, Generator, nn.Module, nn.Module]:
    """Make the G, F, D_X and D_Y to train: new ones, or those of the file that --start-from names.

    It may lack D_X and D_Y.
    """
    saved: dict[str, dict] = {}
    if args.start_from:
        [path] = args.start_from
        saved = common.load_checkpoint(path)
        G, _ = generator_in(saved, path, "x2y")
        F, _ = generator_in(saved, path, "y2x")
        common.go_on(args, G.architecture)
    else:
        G = Generator(args.blocks, args.width, args.upsample)
        F = Generator(args.blocks, args.width, args.upsample)
    D_X = PatchDiscriminator(args.width)
    D_Y = PatchDiscriminator(args.width)
    for name, D in (("D_X", D_X), ("D_Y", D_Y)):
        if name in saved:
            try:
                D.load_state_dict(saved[name])
            except (RuntimeError, TypeError) as error:
                raise InputError(f"{name} in {path} is damaged: use another model") from error
    return G, F, D_X, D_Y


def translate_files(args: Namespace, command: Sequence[str]) -> None:
    """Translate files and folders as args say; exit with status 1 if some could not be read."""
    device = common.pick_device(args.device)
    network, size = load_generator(args.model, args.direction)
    network.to(device)
    if size is None and args.precision == "auto":  # an authors' model: to the pixels of their code
        args.precision = "float32"
    precision = common.pick_precision(args.precision, device)
    told = f", at a shorter side of {size} px" if size else ""
    print(f"computing on {device} in {precision}{told}", file=sys.stderr)

    def transform(x: Tensor) -> Tensor:
        """Translate a picture (1, 3, H, W): made small for the network, then as large again.

        It finds horses only at the size that it was trained on.
        """
        small = common.resize(x, size / min(x.shape[-2:])) if size else x
        made = translate(network, small.to(device), args.precision)
        made = nnf.interpolate(made.cpu(), x.shape[-2:], mode="bicubic", antialias=True)
        return made.clamp(0, 1)

    metadata = common.provenance(command, model=args.model.name)
    shorter = size if args.image_size else None  # then x is small already, and scaled afterwards
    common.transform_files(args, args.direction, transform, metadata, shorter)


def parse_args(argv: Sequence[str]) -> Namespace:
    """Read the command line; InputError on a mistake."""
    number = common.number
    parser = common.ArgumentParser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    sub = commands.add_parser("train", help="learn from two sets")
    add = sub.add_argument_group("pictures").add_argument
    data = "two folders, X and Y, searched with all folders in them; or one with trainA and trainB;"
    data += f" or an authors' set, which is downloaded into data/: {', '.join(DATASETS)}"
    add("data", nargs="+", metavar="DIR", help=data)
    add("-o", "--output", type=Path, default=Path("run"), help="folder for all that is written")
    side = number(int, 32, 65536)
    add("--load-size", type=side, help="shorter side of pictures (default: 286/256 of the crop's)")
    add("--crop-size", type=side, default=256, help="side of the crops, in px")
    add("--no-flip", action="store_true", help="do not mirror half of the crops")
    add = sub.add_argument_group("losses").add_argument
    add("--lambda-cycle", type=number(), default=10.0, help="λ of Eq. 3")
    add("--lambda-identity", type=number(), default=0.5, help="identity loss, relative to λ")
    add("--pool-size", type=number(int), default=50, help="results of G and F kept for D_Y, D_X")
    add = sub.add_argument_group("networks").add_argument
    add("--width", type=number(int, 1, 4096), default=64, help="channels of the first layers")
    add("--blocks", type=number(int, 1, 1000), help="residual blocks (default: 9; 6 up to 128 px)")
    kinds = ["nearest", "transposed"]
    add("--upsample", choices=kinds, default="nearest", help="paper: transposed")
    add("--ema", type=number(most=1), default=0.999, help="decay of the averages of G and F")
    add("--start-from", nargs=1, type=model_file, default=(), help="model to go on from")
    add("--export", type=Path, metavar="FILE", help="write G and F alone, too, in half precision")
    add = sub.add_argument_group("training").add_argument
    add("--epochs", type=number(int), default=100, help="passes through the larger set, at --lr")
    add("--decay-epochs", type=number(int), default=100, help="more, while --lr falls to 0")
    add("--max-steps", type=number(int, 1), help="stop after so many, for a trial")
    add("--lr", type=number(most=1e30), default=2e-4, help="learning rate of Adam")
    add("--beta1", type=number(most=0.999), default=0.5, help="Adam's share of old gradients")
    add("--batch-size", type=number(int, 1), default=1, help="pictures of each domain in a step")
    common.add_training_arguments(sub)

    sub = commands.add_parser("translate", help="translate pictures")
    add = sub.add_argument_group("pictures").add_argument
    add("inputs", type=Path, nargs="+", metavar="input", help="picture, animation, or folder")
    add("-o", "--output", type=Path, help="picture, or folder (default: <input>_<direction>.png)")
    add("--image-size", type=number(int, 1, 65536), help="longer side, px (default: the input's)")
    add = sub.add_argument_group("network").add_argument
    add("--model", type=model_file, default="horse2zebra", help="file of train, or of the authors")
    add("--direction", choices=["x2y", "y2x"], default="x2y", help="G, or F: the way back")
    common.add_device_arguments(sub)

    args = common.parse_args(parser, argv, outputs_of)
    if args.command == "train":
        args.load_size = args.load_size or round(args.crop_size * 286 / 256)
        args.blocks = args.blocks or (6 if args.crop_size <= 128 else 9)
        if args.epochs + args.decay_epochs == 0:
            raise InputError("nothing to do: --epochs and --decay-epochs are 0")
        if args.load_size < args.crop_size or args.crop_size % 4:
            raise InputError("--crop-size must be a multiple of 4, and at most --load-size")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exit with status 2 on a failure that the user can mend."""
    argv = sys.argv[1:] if argv is None else argv
    with common.one_line_errors():
        args = parse_args(argv)
        work = train if args.command == "train" else translate_files
        work(args, ["python", "cyclegan.py", *argv])


if __name__ == "__main__":
    main()
