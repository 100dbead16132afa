"""Unpaired image-to-image translation: learn from two sets of pictures to turn one kind into the other, and back.

    J.-Y. Zhu, T. Park, P. Isola, A. A. Efros: "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial
    Networks", ICCV 2017. Its appendix, §7, is numbered as in arXiv:1703.10593.

Nobody has photos of the same horse as a zebra. So a generator is trained to make pictures that a discriminator cannot
tell from zebras. What ties a zebra to its horse is the way back, which a second generator learns.

    python cyclegan.py translate horse.jpg          # by a model that comes with this
    python cyclegan.py train horse2zebra -o run/    # downloads the paper's pictures; or name two folders
    python cyclegan.py translate photo.jpg --model run/checkpoint.pth

    X, Y  the domains       G: X → Y, F: Y → X  generators       F(G(x)) ≈ x, G(F(y)) ≈ y  cycle consistency     Eq. 2
    x, y  their pictures    D_X, D_Y  discriminators, near 1 for real pictures, near 0 for made ones             Eq. 1
"""

from __future__ import annotations

import math
import shlex
import socket
import sys
import tempfile
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from http.client import HTTPException
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchvision.datasets.utils import download_and_extract_archive

import common
from common import InputError, autocast

# --- Networks ----------------------------------------------------------------------------------------------


class Reflect(nn.ReflectionPad2d):
    """Pad by reflection, outside autocast, which on a CPU would copy the input to float32."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


class Upsample(nn.Conv2d):
    """Repeat every pixel, then convolve: a transposed convolution leaves checkerboards (Odena et al. 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = nnf.pad(nnf.interpolate(x, scale_factor=2, mode="nearest"), [1] * 4, mode="reflect")
        return super().forward(x)


class Residual(nn.Module):
    """R256: add two 3×3 convolutions to their input (He et al. 2016)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            *[Reflect(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels), nn.ReLU(inplace=True)],
            *[Reflect(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels)],
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class Generator(nn.Module):
    """G or F: c7s1-64, d128, d256, R256 × 9, u128, u64, c7s1-3 (§7.2), with instance norm.

    It has 9 `blocks`, or 6 for pictures of 128 px, and `width` channels in the first layer. The paper has `transposed`
    convolutions in u128 and u64. Layers have the positions of the authors' PyTorch code, whose models load as they are.
    """

    def __init__(self, blocks: int = 9, width: int = 64, transposed: bool = True) -> None:
        super().__init__()
        self.architecture = {"blocks": blocks, "width": width, "upsample": "transposed" if transposed else "nearest"}
        w, options = width, {"stride": 2, "padding": 1, "output_padding": 1} if transposed else {}
        Up: type[nn.Module] = nn.ConvTranspose2d if transposed else Upsample
        self.model = nn.Sequential(
            *[Reflect(3), nn.Conv2d(3, w, 7), nn.InstanceNorm2d(w), nn.ReLU(inplace=True)],  # c7s1-64
            *[nn.Conv2d(w, 2 * w, 3, 2, 1), nn.InstanceNorm2d(2 * w), nn.ReLU(inplace=True)],  # d128
            *[nn.Conv2d(2 * w, 4 * w, 3, 2, 1), nn.InstanceNorm2d(4 * w), nn.ReLU(inplace=True)],  # d256
            *[Residual(4 * w) for _ in range(blocks)],  # R256
            *[Up(4 * w, 2 * w, 3, **options), nn.InstanceNorm2d(2 * w), nn.ReLU(inplace=True)],  # u128
            *[Up(2 * w, w, 3, **options), nn.InstanceNorm2d(w), nn.ReLU(inplace=True)],  # u64
            *[Reflect(3), nn.Conv2d(w, 3, 7), nn.Tanh()],  # c7s1-3
        )
        self.apply(initialize)

    def forward(self, x: Tensor) -> Tensor:
        """Map pictures (B, 3, H, W) in [0, 1] to such of the other domain; H and W must be multiples of 4."""
        return (self.model(2 * x - 1).float() + 1) / 2


class PatchDiscriminator(nn.Module):
    """D_X or D_Y: C64-C128-C256-C512, then one channel (§7.2): judge every patch of 70×70 px.

    §7.2 has stride 2 for every Ck, so that a verdict would see 94×94 px, where the paper says 70×70. Here, as in the
    authors' code, C512 and the last convolution have stride 1.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        w = width
        self.model = nn.Sequential(
            *[nn.Conv2d(3, w, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)],  # C64, without a norm
            *[nn.Conv2d(w, 2 * w, 4, 2, 1), nn.InstanceNorm2d(2 * w), nn.LeakyReLU(0.2, inplace=True)],  # C128
            *[nn.Conv2d(2 * w, 4 * w, 4, 2, 1), nn.InstanceNorm2d(4 * w), nn.LeakyReLU(0.2, inplace=True)],  # C256
            *[nn.Conv2d(4 * w, 8 * w, 4, 1, 1), nn.InstanceNorm2d(8 * w), nn.LeakyReLU(0.2, inplace=True)],  # C512
            nn.Conv2d(8 * w, 1, 4, 1, 1),
        )
        self.apply(initialize)

    def forward(self, x: Tensor) -> Tensor:
        """Map pictures (B, 3, H, W) in [0, 1] to verdicts (B, 1, H/8 - 2, W/8 - 2), near 1 if they look real."""
        return self.model(2 * x - 1).float()


def initialize(module: nn.Module) -> None:
    """Draw a convolution's weights from N(0, 0.02) (§7.1), and set its biases to 0."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        nn.init.zeros_(module.bias)


# --- Losses ------------------------------------------------------------------------------------------------


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Average |a − b| in the networks' range -1 … 1, as the authors' code does: twice that of pictures in [0, 1]."""
    return 2 * (a - b).abs().mean()


def generator_losses(gan: CycleGAN, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return what G and F minimise on x and y (B, 3, H, W), `total` and its terms before weighting; and G(x), F(y)."""
    G, F, lambda_cycle, lambda_identity = gan.G, gan.F, gan.args.lambda_cycle, gan.args.lambda_identity
    G_x, F_y = G(x), F(y)
    # §4, in place of Eq. 1's logarithms:  G minimises E_x (D_Y(G(x)) − 1)²,  F minimises E_y (D_X(F(y)) − 1)²
    gan_G, gan_F = (gan.D_Y(G_x) - 1).square().mean(), (gan.D_X(F_y) - 1).square().mean()
    # §3.2, Eq. 2:  L_cyc = E_x ‖F(G(x)) − x‖₁ + E_y ‖G(F(y)) − y‖₁   (means over the pixels)
    cycle = distance(F(G_x), x) + distance(G(F_y), y)
    # §3.3, Eq. 3, what G and F minimise of L(G, F, D_X, D_Y):  both of these + λ L_cyc
    total = gan_G + gan_F + lambda_cycle * cycle
    if gan.args.feature_discriminators:  # not in the paper: the same, of feature maps
        E_X, E_Y = gan.discriminators["E_X"], gan.discriminators["E_Y"]
        total = total + (E_Y(G_x) - 1).square().mean() + (E_X(F_y) - 1).square().mean()
    identity = torch.zeros_like(total)
    if lambda_identity:
        # §5.2:  L_identity = E_y ‖G(y) − y‖₁ + E_x ‖F(x) − x‖₁   (weighted by 0.5 λ, §7.1)
        # The paper has it for paintings → photos (§5.2) and for flowers (§7.1) only. Here it is on by default.
        identity = distance(G(y), y) + distance(F(x), x)
        total = total + lambda_identity * lambda_cycle * identity
    return {"total": total, "G": gan_G, "F": gan_F, "cycle": cycle, "identity": identity}, G_x, F_y


def discriminator_loss(D: nn.Module, real: Tensor, made: Tensor) -> Tensor:
    """Compute what D_X or D_Y minimises on real pictures and made ones, (B, 3, H, W) each."""
    # §4:  D_Y minimises ½ [E_y (D_Y(y) − 1)² + E_x D_Y(G(x))²]   (the half: its learning is slowed down, §7.1)
    return ((D(real) - 1).square().mean() + D(made).square().mean()) / 2


class ImagePool:
    """Keep pictures that a generator has made, to show its discriminator older ones, too (§4)."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.images: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(seed)

    def query(self, made: Tensor) -> Tensor:
        """Take in pictures (B, 3, H, W); return as many, to be shown to the discriminator."""
        shown = []
        for image in made.detach().unbind():
            if len(self.images) < self.size:  # not yet full: keep the picture, and show it
                self.images.append(image)
                shown.append(image)
            elif self.size and torch.rand((), generator=self.generator) < 0.5:  # show an older one, keep this instead
                k = int(torch.randint(self.size, (), generator=self.generator))
                shown.append(self.images[k].to(made))
                self.images[k] = image
            else:  # show the picture, without keeping it
                shown.append(image)
        return torch.stack(shown)

    def state_dict(self) -> dict:
        return {"images": [image.cpu() for image in self.images], "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.images = list(state["images"])
        self.generator.set_state(state["generator"])


# --- Training ----------------------------------------------------------------------------------------------


class CycleGAN:
    """G: X → Y, F: Y → X, D_X and D_Y, with the optimisers and image pools: all that a step changes.

    `real` are a few pictures x and y, for discriminators of feature maps alone.
    """

    def __init__(
        self, args: Namespace, device: torch.device, precision: torch.dtype = torch.float32, real: Sequence[Tensor] = ()
    ) -> None:
        self.args, self.precision = args, precision
        loaded = load_networks(args.start_from) if args.start_from else {}
        if loaded:  # which decides the sizes of the others
            common.go_on(args, loaded["G"].architecture)
        networks = {name: Generator(args.blocks, args.width, args.upsample == "transposed") for name in "GF"}
        networks |= {name: PatchDiscriminator(args.width) for name in ("D_X", "D_Y")} | loaded
        self.G, self.F, self.D_X, self.D_Y = (networks[name].to(device).train() for name in ("G", "F", "D_X", "D_Y"))
        # Samples and exported models have the averages of G and F over about the last tenth of the steps, 1000 at most:
        # w_ema ← d · w_ema + (1 − d) · w  with d = min(ema, (1 + n)/(10 + n)) after n steps. The paper has none.
        average = lambda w_ema, w, n: torch.lerp(w, w_ema, ((1 + n) / (10 + n)).clamp(max=args.ema))  # noqa: E731
        self.G_ema, self.F_ema = (AveragedModel(network, avg_fn=average) for network in (self.G, self.F))
        self.discriminators = nn.ModuleDict({"D_X": self.D_X, "D_Y": self.D_Y})
        if args.feature_discriminators:
            vgg = common.VGG(["relu2_2", "relu3_3", "relu4_3"], "vgg19", precision=precision).to(device)
            for name, pictures in zip(("E_X", "E_Y"), real, strict=True):
                self.discriminators[name] = FeatureDiscriminator(vgg, pictures).to(device)
        betas = args.beta1, 0.999
        self.optimizer_G = torch.optim.Adam(nn.ModuleList([self.G, self.F]).parameters(), args.lr, betas)
        self.optimizer_D = torch.optim.Adam(self.discriminators.parameters(), args.lr, betas)
        self.pool_X, self.pool_Y = (ImagePool(args.pool_size, 1000 * args.seed + k) for k in range(2))

    def step(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Change the networks a little on x and y (B, 3, H, W) in [0, 1]; return the losses before."""
        # §3.3, Eq. 4:  G*, F* = arg min_{G,F} max_{D_X,D_Y} L(G, F, D_X, D_Y),   in turns (with
        # the squares of §4, both minimise): first G and F …
        self.discriminators.requires_grad_(False)
        with autocast(x.device, self.precision):
            losses, G_x, F_y = generator_losses(self, x, y)
        self.optimizer_G.zero_grad()
        losses["total"].backward()
        common.average_gradients(self.optimizer_G)
        self.optimizer_G.step()
        self.G_ema.update_parameters(self.G)
        self.F_ema.update_parameters(self.F)

        # … then D_X and D_Y, on real pictures and on what the pools return for F(y) and G(x).
        self.discriminators.requires_grad_(True)
        with autocast(x.device, self.precision):
            pictures = {"X": (x, self.pool_X.query(F_y)), "Y": (y, self.pool_Y.query(G_x))}
            losses |= {name: discriminator_loss(D, *pictures[name[-1]]) for name, D in self.discriminators.items()}
        self.optimizer_D.zero_grad()
        sum(losses[name] for name in self.discriminators).backward()
        common.average_gradients(self.optimizer_D)
        self.optimizer_D.step()
        return {name: loss.detach() for name, loss in losses.items()}


def train(args: Namespace, command: Sequence[str]) -> None:
    """Train G, F, D_X and D_Y as the command line says (§7.1)."""
    inputs = [Path(folder, path) for path in args.data for folder in (".", "data")]  # data/: downloaded sets
    common.check_outputs(outputs_of(args), [*inputs, *(() if args.resume else args.start_from)])
    device = common.pick_device(args.device)
    precision = common.pick_precision(args.precision, device)
    (X, x_test), (Y, y_test) = domains(args.data, args.crop_size, device)
    epoch_steps = math.ceil(max(len(X), len(Y)) / (args.batch_size * common.process_count()))  # larger domain once
    steps = min(epoch_steps * (args.epochs + args.decay_epochs), args.max_steps or sys.maxsize)

    torch.manual_seed(args.seed)
    gan = CycleGAN(args, device, precision, (x_test, y_test))
    parts = ("G", "F", "optimizer_G", "optimizer_D", "pool_X", "pool_Y", "G_ema", "F_ema")
    record = {"args": common.plain(args), "command": shlex.join(command)}
    sample = partial(save_samples, gan, x_test, y_test, record, epoch_steps)
    changing = {name: getattr(gan, name) for name in parts} | dict(gan.discriminators.items())
    run = common.Training(args, device, precision, outputs_of(args)[0], steps, changing, sample, record, epoch_steps)
    # Pictures are scaled by their shorter side. The authors' code squashes them to a square.
    for x, y in run.batches(common.Crops([X, Y], args.load_size, args.crop_size, args.seed, flip=True)):
        epoch = run.step / epoch_steps
        lr = args.lr * common.lr_factor(epoch, args.epochs, args.decay_epochs)
        for group in gan.optimizer_G.param_groups + gan.optimizer_D.param_groups:
            group.update(lr=lr, betas=(args.beta1, 0.999))  # a checkpoint brings the betas of before
        run.log({"epoch": int(epoch) + 1, "lr": lr} | gan.step(x, y))
    print(outputs_of(args)[0])


# --- Translating -------------------------------------------------------------------------------------------


def translate(network: Generator, x: Tensor, precision: str = "auto", exact: bool = False) -> Tensor:
    """Translate (B, 3, H, W) in [0, 1] of any size from 5 px a side. If it is to be `exact`, `auto` is float32."""
    common.check_memory(x, 15 * network.model[1].out_channels)
    height, width = x.shape[-2:]
    if min(height, width) < 5:
        raise InputError(f"{width}×{height} px is too small: the network needs 5 px a side")
    # Multiples of 4; and 8 at least, as the residual blocks need 2 px at a quarter of the size.
    right, below = (max(8, math.ceil(side / 4) * 4) - side for side in (width, height))
    padded = nnf.pad(x, (0, right, 0, below), mode="reflect")
    with torch.no_grad(), autocast(x.device, common.pick_precision(precision, x.device, exact)):
        return network(padded)[..., :height, :width]


# === Nothing below is in the paper: data, samples, files, the command line. ===

SERVER = "https://efrosgans.eecs.berkeley.edu/cyclegan/datasets"
DATASETS = ("horse2zebra", "apple2orange", "summer2winter_yosemite", "monet2photo", "cezanne2photo", "ukiyoe2photo")
DATASETS += ("vangogh2photo", "maps", "facades", "iphone2dslr_flower", "ae_photos")

model_file = partial(common.model_file, known=["horse2zebra"])  # trained as docs/cyclegan.md says


class FeatureDiscriminator(nn.Module):
    """Judge pictures by feature maps of VGG, which knows a horse from a tree already. The paper has none.

    It is a small one of Projected GANs (Sauer et al. 2021): what it sees of a layer are fixed random mixes of all maps.
    """

    def __init__(self, vgg: common.VGG, real: Tensor) -> None:
        super().__init__()
        self.vgg, self.heads = [vgg], nn.ModuleList()  # in a list, VGG is no part of state_dict()
        for k, f in enumerate(vgg(real).values()):  # scaled to a mean of 1: a norm would hide a lack of contrast
            c = f.shape[1]
            self.register_buffer(f"mix_{k}", torch.randn(64, c, 1, 1) * (2 / c) ** 0.5 / f.float().mean().cpu())
            layers = [nn.Conv2d(64, 128, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(128, 128, 4, 2, 1), nn.LeakyReLU(0.2)]
            self.heads.append(nn.Sequential(*layers, nn.Conv2d(128, 1, 3, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Map pictures (B, 3, H, W) in [0, 1] to verdicts (B, 3, H/8, W/8), of each layer as large as of the first."""
        verdicts = []
        for k, f in enumerate(self.vgg[0](x).values()):
            verdict = self.heads[k](nnf.conv2d(f, self.get_buffer(f"mix_{k}").to(f))).float()
            verdicts.append(nnf.interpolate(verdict, (verdicts or [verdict])[0].shape[-2:]))
        return torch.cat(verdicts, dim=1)


def download(name: str, folder: Path = Path("data")) -> Path:
    """Fetch and unpack the authors' archive `name`, unless it is there; return its folder. InputError if that fails."""
    target, url = folder / name, f"{SERVER}/{name}.zip"
    if name not in DATASETS:
        raise InputError(f"no such folder: {name}; name two folders, or a set: {', '.join(DATASETS)}")
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as temporary:
        try:
            print(f"downloading {url}", file=sys.stderr)
            socket.setdefaulttimeout(common.DOWNLOAD_TIMEOUT)
            download_and_extract_archive(url, temporary)
            _ = [Path(temporary, name, part).stat() for part in ("trainA", "trainB")]  # OSError if one is missing
            Path(temporary, name).rename(target)
        except (OSError, RuntimeError, HTTPException, zipfile.BadZipFile, zlib.error, EOFError) as error:
            reason = f"cannot download {url} whole ({type(error).__name__}: {getattr(error, 'reason', error)})"
            raise InputError(f"{reason}: try again, or unpack it yourself, to {target}/trainA, trainB, …") from error
    return target


def domains(data: Sequence[str], size: int, device: torch.device | str = "cpu") -> list[tuple[list[Path], Tensor]]:
    """For X and for Y, find the files to train on, and up to four test pictures (B, 3, size, size) on `device`.

    `data` are two folders; or one with trainA and trainB; or the name of one of the authors' sets. Test pictures are
    from testA and testB, or held out.
    """
    if len(data) > 2:
        raise InputError(f"{len(data)} folders given: name two, or one set")
    pairs: list[tuple[Path, Path | None]] = [(Path(part), None) for part in data]
    if len(data) == 1:
        root = Path(data[0]) if Path(data[0]).is_dir() else download(data[0])
        pairs = [(root / "trainA", root / "testA"), (root / "trainB", root / "testB")]
    result = []
    for folder, test in pairs:
        files = common.find_images(folder)
        if test and test.is_dir():
            samples, _ = common.hold_out(common.find_images(test), size)
        else:
            samples, files = common.hold_out(files, size)
        result.append((files, samples.to(device)))
    return result


def outputs_of(args: Namespace) -> list[Path]:
    """List the files that another training must not overwrite, the checkpoint first."""
    return [args.output / "checkpoint.pth", *([args.export] if args.export else [])]


@torch.no_grad()
def save_samples(gan: CycleGAN, x: Tensor, y: Tensor, record: dict, epoch_steps: int, step: int) -> None:
    """Write the epoch's sheet of the test pictures x and y, and what is to be exported; print warnings."""
    G, F, epoch = gan.G_ema, gan.F_ema, math.ceil(step / epoch_steps)
    with autocast(x.device, gan.precision):
        columns = {"x": x, "G(x)": G(x), "F(G(x))": F(G(x)), "F(x)": F(x)}
        columns |= {"y": y, "F(y)": F(y), "G(F(y))": G(F(y)), "G(y)": G(y)}
    common.save_sheet(columns, gan.args.output / f"epoch_{epoch:03d}.jpg", {"command": record["command"]})
    if gan.args.export:
        G, F = ({n: v.half() for n, v in net.module.state_dict().items()} for net in (gan.G_ema, gan.F_ema))
        common.save_checkpoint(record | {"step": step, "G": G, "F": F}, gan.args.export)
    for name, before, after in (("G", x, columns["G(x)"]), ("F", y, columns["F(y)"])):
        lightness = torch.stack([picture.mean(1).flatten() for picture in (before, after)])
        if distance(before, after) < 0.02:
            print(f"warning: {name} has become the identity: lower --lambda-identity, or -cycle", file=sys.stderr)
        elif torch.corrcoef(lightness)[0, 1] < -0.3:
            print(f"warning: {name} turns light into dark: raise --lambda-identity, or --seed anew", file=sys.stderr)


def load_generator(path: Path, direction: str = "x2y") -> tuple[Generator, Namespace]:
    """Read G (x2y) or F (y2x) from what `train` has written, or the one generator of a file of the authors' code.

    Returns it with two facts: whether the file is the `authors`', and the `load_size` of its training, if known.
    """
    state = common.load_checkpoint(path)
    authors = "G" not in state  # a plain state dict
    if authors and direction == "y2x" and "model.1.weight" in state:
        raise InputError(f"{path} holds one generator, of one direction: name the file of the other one")
    try:
        name = "G" if direction == "x2y" else "F"
        weights = state if authors else state.get(f"{name}_ema", state[name])
        # Not used are statistics, of older files. With dropout, a block's second convolution has another place.
        weights = {name.removeprefix("module."): value for name, value in weights.items() if "running_" not in name}
        weights = {name.replace("conv_block.6.", "conv_block.5."): value for name, value in weights.items()}
        weights.pop("n_averaged", None)
        blocks, width = sum(name.endswith("conv_block.1.weight") for name in weights), len(weights["model.1.weight"])
        transposed = len(weights[f"model.{10 + blocks}.weight"]) == 4 * width  # its weight has the inputs first
        network = Generator(blocks, width, transposed)
        network.load_state_dict({name: value.float() for name, value in weights.items()})
        load_size = state.get("args", {}).get("load_size")
    except (AttributeError, LookupError, RuntimeError, TypeError) as error:
        other = ", but a U-Net" if "model.model.0.weight" in state else ""
        other = ", but has batch norm" if "model.2.weight" in state else other
        raise InputError(f"{path} is no model of cyclegan.py, nor a ResNet generator of its authors{other}") from error
    if not common.all_finite(network.state_dict()):
        raise InputError(f"{path} has weights that are not finite: train it anew, with a smaller --lr")
    return network.eval(), Namespace(authors=authors, load_size=load_size)


def load_networks(paths: Sequence[Path]) -> dict[str, nn.Module]:
    """Read G and F to go on from, and D_X and D_Y if there are: a file of `train`, or two of the authors' code."""
    direction, state = "y2x" if len(paths) == 1 else "x2y", common.load_checkpoint(paths[0])
    networks: dict[str, nn.Module] = {"G": load_generator(paths[0])[0], "F": load_generator(paths[-1], direction)[0]}
    if len(paths) > 2 or (len(paths) == 2 and "G" in state):
        raise InputError("--start-from takes one file of this script, or two of the authors' code")
    for name in {"D_X", "D_Y"} & state.keys():
        networks[name] = PatchDiscriminator(len(state[name]["model.0.weight"]))
        networks[name].load_state_dict(state[name])
    return networks


def translate_files(args: Namespace, command: Sequence[str]) -> None:
    """Translate files and folders as the command line says; exit with status 1 if some could not be read."""
    device = common.pick_device(args.device)
    network, facts = load_generator(args.model, args.direction)
    network.to(device)
    precision = common.pick_precision(args.precision, device, exact=facts.authors)
    shorter = facts.load_size  # of a horse four times as large it would make no zebra
    size = f", at a shorter side of {shorter} px" if shorter else ""
    print(f"computing on {device} in {precision}{size}", file=sys.stderr)
    metadata, how = common.provenance(command, model=args.model.name), (args.precision, facts.authors)
    common.transform_files(args, args.direction, lambda x: translate(network, x.to(device), *how), metadata, shorter)


def parse_args(argv: Sequence[str]) -> Namespace:
    """Read the command line; InputError on a mistake."""
    number = common.number
    parser = common.ArgumentParser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    sub = commands.add_parser("train", help="learn from two sets", usage="%(prog)s DIR [DIR] -o FOLDER [flags]")
    data = "two folders, X and Y, searched with all folders in them; or one with trainA and trainB; or the name of one "
    data += f"of the authors' sets, which is downloaded into data/: {', '.join(DATASETS)}"
    add = sub.add_argument_group("pictures").add_argument
    add("data", nargs="+", metavar="DIR", help=data)
    add("-o", "--output", type=Path, default=Path("run"), help="folder for the checkpoint, samples and losses")
    add("--load-size", type=number(int, 32, 65536), help="shorter side to scale to (default: 286/256 of --crop-size)")
    add("--crop-size", type=number(int, 32, 65536), default=256, help="side of the training crops, in px")
    add = sub.add_argument_group("losses").add_argument
    add("--lambda-cycle", type=number(), default=10.0, help="λ of Eq. 3")
    add("--lambda-identity", type=number(), default=0.5, help="weight of the identity loss, relative to λ")
    add("--pool-size", type=number(int), default=50, help="made pictures that are kept to be shown again")
    add = sub.add_argument_group("networks").add_argument
    add("--width", type=number(int, 1, 4096), default=64, help="channels of their first layer")
    add("--blocks", type=number(int, 1, 1000), help="residual blocks (default: 9; 6 for crops up to 128 px)")
    add("--upsample", choices=["nearest", "transposed"], default="nearest", help="the paper's is transposed")
    add("--ema", type=number(most=1), default=0.999, help="decay of the averages of G and F; the paper has none")
    add("--feature-discriminators", action="store_true", help="judge VGG's feature maps, too: fewer steps to learn")
    models = "go on from its weights, in its size: horse2zebra, a file, or two of the authors', X → Y and Y → X"
    add("--start-from", nargs="+", type=model_file, metavar="MODEL", default=(), help=models)
    add("--export", type=Path, metavar="FILE", help="also write the two generators alone, in half precision")
    add = sub.add_argument_group("training").add_argument
    add("--epochs", type=number(int), default=100, help="passes through the larger domain, at --lr")
    add("--decay-epochs", type=number(int), default=100, help="epochs after --epochs in which the rate falls to 0")
    add("--max-steps", type=number(int, 1), help="stop after so many, for a trial")
    add("--lr", type=number(most=1e30), default=2e-4, help="learning rate of Adam")
    add("--beta1", type=number(most=0.999), default=0.5, help="share of the old gradients in Adam's average")
    add("--batch-size", type=number(int, 1), default=1, help="pictures of each domain a step")
    common.add_training_arguments(sub)

    sub = commands.add_parser("translate", help="translate pictures", usage="%(prog)s input [input ...] [flags]")
    add = sub.add_argument_group("pictures").add_argument
    add("inputs", type=Path, nargs="+", metavar="input", help="picture, animation, or folder of such")
    add("-o", "--output", type=Path, help="picture, or folder for several (default: <input>_<direction>.png)")
    add("--image-size", type=number(int, 1, 65536), help="longer side of the result, in px (default: as in training)")
    models = "horse2zebra, or a file: of train, or a generator of the authors' code"
    add = sub.add_argument_group("network").add_argument
    add("--model", type=model_file, metavar="MODEL", default="horse2zebra", help=models)
    direction = "x2y: G, for the shipped model horse to zebra; y2x: F, the way back"
    add("--direction", choices=["x2y", "y2x"], default="x2y", help=direction)
    common.add_device_arguments(sub)
    args = common.parse_args(parser, argv, outputs_of)
    if args.command == "translate":
        return args
    args.load_size = args.load_size or round(args.crop_size * 286 / 256)
    args.blocks = args.blocks or (6 if args.crop_size <= 128 else 9)
    if args.load_size < args.crop_size:
        raise InputError(f"--load-size {args.load_size} is less than --crop-size {args.crop_size}")
    if args.crop_size % 4:
        raise InputError(f"--crop-size {args.crop_size}: choose a multiple of 4")
    if args.epochs + args.decay_epochs == 0:
        raise InputError("nothing to do: choose --epochs or --decay-epochs above 0")
    if args.export and args.export.suffix.lower() not in (".pth", ".pt"):
        raise InputError(f"cannot write {args.export}: its suffix must be .pth or .pt")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exit with status 2 on a failure that the user can mend."""
    argv = sys.argv[1:] if argv is None else argv
    with common.one_line_errors():
        args = parse_args(argv)
        {"train": train, "translate": translate_files}[args.command](args, ["python", "cyclegan.py", *argv])


if __name__ == "__main__":
    main()
