"""Unpaired image-to-image translation: learn from two sets of pictures to turn one kind into the other, and back.

    J.-Y. Zhu, T. Park, P. Isola, A. A. Efros: "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial
    Networks", ICCV 2017.

Nobody has photos of the same horse as a zebra. So a generator G: X → Y is trained to make pictures that a discriminator
D_Y cannot tell from those of Y, F: Y → X likewise, and what ties a result to its input is the way back: F(G(x)) ≈ x and
G(F(y)) ≈ y.

    python cyclegan.py train horse2zebra -o run/                  # downloads the paper's pictures; or name two folders
    python cyclegan.py translate photo.jpg --model run/checkpoint.pth

Where this departs from the paper:

- Pictures are resized by their shorter side, where the authors' code squashes them to a square.
- The identity loss, which the paper has for photos from paintings (§5.2), is always on, at the same weight.
- Losses of distance are in units of the networks' range, -1 … 1, as there; outside the networks pictures are in [0, 1].
- Generators, layer for layer, are those of the authors' PyTorch code, whose published models load as they are.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import shlex
import signal
import socket
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from http.client import HTTPException, IncompleteRead
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common import (
    NETWORK_TIMEOUT,
    ArgumentParser,
    InputError,
    check_output,
    find_images,
    fingerprint,
    hold_out,
    load_checkpoint,
    load_image,
    number,
    one_line_errors,
    pick_device,
    pick_precision,
    provenance,
    replacing,
    save_checkpoint,
    save_image,
    transform_files,
)

# --- Networks ----------------------------------------------------------------------------------------------


class Reflect(nn.Module):
    """Reflection padding. Under autocast, torch's own would copy its input to float32."""

    def __init__(self, margin: int) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return nnf.pad(x, [self.margin] * 4, mode="reflect")


class Residual(nn.Module):
    """R256: two 3×3 convolutions around a skip connection (He et al. 2016)."""

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

    Args:
        blocks: residual blocks, 9, or 6 for pictures of 128 px.
        width: channels of the first layer.
    """

    def __init__(self, blocks: int = 9, width: int = 64) -> None:
        super().__init__()
        self.published = False  # by the authors of the paper

        def norm(channels: int) -> list[nn.Module]:
            return [nn.InstanceNorm2d(channels), nn.ReLU(inplace=True)]

        w = width
        self.model = nn.Sequential(  # positions in it are those of the authors' code
            *[Reflect(3), nn.Conv2d(3, w, 7), *norm(w)],  # c7s1-64
            *[nn.Conv2d(w, 2 * w, 3, 2, 1), *norm(2 * w)],  # d128
            *[nn.Conv2d(2 * w, 4 * w, 3, 2, 1), *norm(4 * w)],  # d256
            *[Residual(4 * w) for _ in range(blocks)],  # R256
            *[nn.ConvTranspose2d(4 * w, 2 * w, 3, 2, 1, output_padding=1), *norm(2 * w)],  # u128
            *[nn.ConvTranspose2d(2 * w, w, 3, 2, 1, output_padding=1), *norm(w)],  # u64
            *[Reflect(3), nn.Conv2d(w, 3, 7), nn.Tanh()],  # c7s1-3
        )
        self.apply(initialize)

    def forward(self, x: Tensor) -> Tensor:
        """Map pictures (B, 3, H, W) in [0, 1] to such of the other domain; H and W must be multiples of 4."""
        return (self.model(2 * x - 1).float() + 1) / 2


class PatchDiscriminator(nn.Module):
    """D_X or D_Y: C64-C128-C256-C512, then one channel (§7.2): a verdict on every patch of 70×70 px."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()

        def c(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
            convolution = nn.Conv2d(inputs, outputs, 4, stride, 1)
            return [convolution, nn.InstanceNorm2d(outputs), nn.LeakyReLU(0.2, inplace=True)]

        w = width
        self.model = nn.Sequential(
            *[nn.Conv2d(3, w, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)],  # C64, without a norm
            *c(w, 2 * w, 2),
            *c(2 * w, 4 * w, 2),
            *c(4 * w, 8 * w, 1),
            nn.Conv2d(8 * w, 1, 4, 1, 1),
        )
        self.apply(initialize)

    def forward(self, x: Tensor) -> Tensor:
        """Map pictures (B, 3, H, W) in [0, 1] to verdicts (B, 1, H/8 - 2, W/8 - 2), near 1 if they look real."""
        return self.model(2 * x - 1).float()


def initialize(module: nn.Module) -> None:
    """Weights from N(0, 0.02) (§7.1), biases 0."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        nn.init.zeros_(module.bias)


class CycleGAN(nn.Module):
    """The four networks: G: X → Y, F: Y → X, D_X and D_Y."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.G, self.F = Generator(blocks, width), Generator(blocks, width)
        self.D_X, self.D_Y = PatchDiscriminator(width), PatchDiscriminator(width)

    def generators(self) -> list[nn.Parameter]:
        return [*self.G.parameters(), *self.F.parameters()]

    def discriminators(self) -> list[nn.Parameter]:
        return [*self.D_X.parameters(), *self.D_Y.parameters()]


# --- Losses ------------------------------------------------------------------------------------------------


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean of |a − b| in the networks' range -1 … 1, which is twice that of pictures in [0, 1]."""
    return 2 * (a - b).abs().mean()


def generator_losses(
    model: CycleGAN, x: Tensor, y: Tensor, lambda_cycle: float, lambda_identity: float
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The objective of G and F for x and y (B, 3, H, W), its terms, and what they have made: (losses, G(x), F(y)).

    Instance norm treats every picture by itself, so that G can take x and y in one call.
    """
    G, F, D_X, D_Y = model.G, model.F, model.D_X, model.D_Y
    if lambda_identity:
        G_x, G_y = G(torch.cat([x, y])).chunk(2)
        F_y, F_x = F(torch.cat([y, x])).chunk(2)
    else:
        G_x, F_y = G(x), F(y)
    # §3.1, Eq. 1, in the least-squares form of §4:  L_GAN(G, D_Y) = E_x (D_Y(G(x)) − 1)²   and the same for F, D_X
    losses = {"G": (D_Y(G_x) - 1).square().mean(), "F": (D_X(F_y) - 1).square().mean()}
    # §3.2, Eq. 2:  L_cyc = E_x ‖F(G(x)) − x‖₁ + E_y ‖G(F(y)) − y‖₁   (means over the pixels)
    losses["cycle"] = distance(F(G_x), x) + distance(G(F_y), y)
    # §3.3, Eq. 3:  L(G, F) = L_GAN(G, D_Y) + L_GAN(F, D_X) + λ L_cyc
    total = losses["G"] + losses["F"] + lambda_cycle * losses["cycle"]
    if lambda_identity:
        # §5.2:  L_identity = E_y ‖G(y) − y‖₁ + E_x ‖F(x) − x‖₁,  weighted by 0.5 λ
        losses["identity"] = distance(G_y, y) + distance(F_x, x)
        total = total + lambda_identity * lambda_cycle * losses["identity"]
    return {"total": total} | losses, G_x, F_y


def discriminator_loss(D: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """The objective of D_X or D_Y for real pictures and made ones, (B, 3, H, W) each, in one call."""
    D_real, D_fake = D(torch.cat([real, fake])).chunk(2)
    # §4:  D_Y minimises ½ [E_y (D_Y(y) − 1)² + E_x D_Y(G(x))²]   (the half: its learning is slowed down, §7.1)
    return ((D_real - 1).square().mean() + D_fake.square().mean()) / 2


class ImagePool:
    """Pictures that a generator has made (§4): D is shown the newest one, or half the time an older one of the pool."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.images = size, []  # type: int, list[Tensor]
        self.generator = torch.Generator().manual_seed(seed)

    def query(self, made: Tensor) -> Tensor:
        """Take in pictures (B, 3, H, W) and give back as many: until the pool is full, the same ones."""
        shown = []
        for image in made.detach().clone():  # a part of a larger batch would keep all of it in memory
            if len(self.images) < self.size:
                self.images.append(image)
            elif self.size and torch.rand((), generator=self.generator) < 0.5:
                k = int(torch.randint(self.size, (), generator=self.generator))
                self.images[k], image = image, self.images[k]
            shown.append(image)
        return torch.stack(shown)

    def state_dict(self) -> dict[str, Any]:
        return {"images": [image.cpu() for image in self.images], "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.images = [image.to(device) for image in state["images"]]
        self.generator.set_state(state["generator"])


# --- Data --------------------------------------------------------------------------------------------------

# The authors' archives, at https://efrosgans.eecs.berkeley.edu/cyclegan/datasets/<name>.zip
DATASETS: tuple[str, ...] = (
    "horse2zebra",
    "apple2orange",
    "summer2winter_yosemite",
    "monet2photo",
    "cezanne2photo",
    "ukiyoe2photo",
)
DATASETS += ("vangogh2photo", "maps", "facades", "iphone2dslr_flower", "ae_photos")
SERVER = "https://efrosgans.eecs.berkeley.edu/cyclegan/datasets"


def download(name: str, folder: Path = Path("data")) -> Path:
    """Fetch and unpack the authors' archive `name` unless it is there; return folder/name, whole, with trainA, trainB.

    Raises:
        InputError: the server cannot be reached, the archive is cut short or damaged, or it would write elsewhere.
    """
    target, url = folder / name, f"{SERVER}/{name}.zip"
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    remedy = f"unpack it yourself, to {target}/trainA, trainB, …"
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(4 * NETWORK_TIMEOUT)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as temporary:
        archive, unpacked = Path(temporary, "archive.zip"), Path(temporary, name)
        try:
            print(f"downloading {url}", file=sys.stderr)
            torch.hub.download_url_to_file(url, str(archive))
            with zipfile.ZipFile(archive) as file:  # its table of contents stands at the end: none if cut short
                for member in file.namelist():
                    if not Path(temporary, member).resolve().is_relative_to(unpacked.resolve()):
                        raise InputError(f"{url} holds {member}, which is outside {name}/: do not trust this archive")
                file.extractall(temporary)  # checks every file's sum
        except (zipfile.BadZipFile, zlib.error, EOFError, IncompleteRead) as error:
            raise InputError(f"{url} came cut short or damaged ({error}): try again, or {remedy}") from error
        except (OSError, RuntimeError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise InputError(f"cannot download {url} ({type(error).__name__}: {reason}): {remedy}") from error
        finally:
            socket.setdefaulttimeout(patience)
        if not all((unpacked / part).is_dir() for part in ("trainA", "trainB")):
            raise InputError(f"{url} has no folders trainA and trainB")
        unpacked.rename(target)
    return target


def domains(data: Sequence[str], size: int) -> list[tuple[list[Path], Tensor]]:
    """For X and for Y: the files to train on, and up to four test pictures (B, 3, size, size).

    `data` are two folders; or one with trainA and trainB; or the name of one of the authors' sets. Test pictures are
    from testA and testB, or held out.
    """
    if len(data) == 1:
        root = Path(data[0])
        if not root.is_dir():
            if data[0] not in DATASETS:
                raise InputError(f"no such folder: {root}; name two folders, or a set: {', '.join(DATASETS)}")
            root = download(data[0])
        folders, tests = [root / "trainA", root / "trainB"], [root / "testA", root / "testB"]
    elif len(data) == 2:
        folders, tests = [Path(part) for part in data], []
    else:
        raise InputError(f"{len(data)} folders given: name two, or one set")
    result = []
    for folder, test in zip_longest(folders, tests):
        files = find_images(folder)
        if test and test.is_dir():
            result.append((files, hold_out(find_images(test), size)[0]))
        else:
            samples, files = hold_out(files, size)
            result.append((files, samples))
    return result


class Pairs(Dataset):
    """Endless pairs of random crops of the two domains: item i depends on the seed and on i alone.

    Each pass through a domain is in an order of its own, so that the smaller one is reshuffled and repeated. A file
    that cannot be read is skipped with a warning, and the next one taken; item i is (x, y, number of files skipped),
    with x and y (3, crop, crop) in [0, 1].
    """

    def __init__(self, X: Sequence[Path], Y: Sequence[Path], load_size: int, crop_size: int, seed: int) -> None:
        self.domains, self.load_size, self.crop_size, self.seed = (X, Y), load_size, crop_size, seed
        self.orders: list[tuple[int, list[int]]] = [(-1, []), (-1, [])]

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, int]:
        (x, skipped_x), (y, skipped_y) = self.picture(0, i), self.picture(1, i)
        return x, y, skipped_x + skipped_y

    def picture(self, domain: int, i: int) -> tuple[Tensor, int]:
        files = self.domains[domain]
        epoch, position = divmod(i, len(files))
        generator = torch.Generator()  # which uses the low 32 bits of a seed
        if self.orders[domain][0] != epoch:
            generator.manual_seed(1_000_003 * self.seed + 2 * epoch + domain)
            self.orders[domain] = (epoch, torch.randperm(len(files), generator=generator).tolist())
        generator.manual_seed(1_000_003 * self.seed + 2**31 + 2 * i + domain)
        for skipped in range(len(files)):
            path = files[self.orders[domain][1][(position + skipped) % len(files)]]
            try:
                image = load_image(path, shorter=self.load_size)[0]
            except InputError as error:
                print(f"warning: {error}", file=sys.stderr)
                continue
            n = self.crop_size
            top, left = (int(torch.randint(side - n + 1, (), generator=generator)) for side in image.shape[1:])
            image = image[:, top : top + n, left : left + n]
            return image.flip(2) if torch.rand((), generator=generator) < 0.5 else image, skipped
        raise InputError(f"none of the pictures of domain {'XY'[domain]} can be read")


def batches(
    pairs: Pairs, args: argparse.Namespace, first: int, last: int, rank: int, world: int
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """This process's share of the batches for the steps first … last − 1, as (x, y, number of files skipped)."""
    share = args.batch_size // world
    indices = [step * args.batch_size + rank * share + k for step in range(first, last) for k in range(share)]
    loader = DataLoader(
        pairs,
        share,
        sampler=indices,
        num_workers=args.workers,
        worker_init_fn=ignore_interrupts,
        pin_memory=torch.cuda.is_available(),
    )
    try:
        for x, y, skipped in loader:
            yield x, y, int(skipped.sum())
    except InputError as error:  # a worker's comes with a traceback in its text
        raise InputError(str(error).splitlines()[-1].removeprefix("common.InputError: ")) from error


def ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


# --- Training ----------------------------------------------------------------------------------------------

# What a resumed training has to have in common with the one that it continues.
FIXED = ["lambda_cycle", "lambda_identity", "pool_size", "lr", "beta1", "batch_size", "epochs", "decay_epochs"]
FIXED += ["load_size", "crop_size", "blocks", "width", "seed"]
COLUMNS = ["step", "epoch", "lr", "total", "G", "F", "cycle", "identity", "D_X", "D_Y"]
SHOWN = ["G", "F", "cycle", "D_X", "D_Y"]  # in the progress bar
COLUMNS += ["change_G", "change_F", "luminance_G", "luminance_F"]


def lr_factor(epoch: int, epochs: int, decay_epochs: int) -> float:
    """1 for the first `epochs` epochs, counted from 0; then linearly down, to reach 0 after `decay_epochs` (§7.1)."""
    return 1.0 - max(0, epoch - epochs) / max(1, decay_epochs)


class Trainer:
    """The networks, their optimisers and image pools: all that one step changes."""

    def __init__(self, args: argparse.Namespace, device: torch.device, precision: torch.dtype, rank: int = 0) -> None:
        torch.manual_seed(args.seed)
        self.args, self.device, self.precision = args, device, precision
        self.model = CycleGAN(args.blocks, args.width).to(device)
        betas = (args.beta1, 0.999)
        self.optimizer_G = torch.optim.Adam(self.model.generators(), args.lr, betas)
        self.optimizer_D = torch.optim.Adam(self.model.discriminators(), args.lr, betas)
        self.pool_X, self.pool_Y = (ImagePool(args.pool_size, 1000 * args.seed + 2 * rank + k) for k in (0, 1))

    def step(self, x: Tensor, y: Tensor, lr: float) -> dict[str, Tensor]:
        """One step of Eq. 4 on x and y (B, 3, H, W): G and F first, then D_X and D_Y. Return the losses and signs."""
        args, model = self.args, self.model
        for group in self.optimizer_G.param_groups + self.optimizer_D.param_groups:
            group["lr"] = lr

        for p in model.discriminators():  # no gradients for them while G and F learn
            p.requires_grad_(False)
        with self.autocast():
            losses, G_x, F_y = generator_losses(model, x, y, args.lambda_cycle, args.lambda_identity)
        self.optimizer_G.zero_grad()
        losses["total"].backward()
        average_gradients(model.generators())
        self.optimizer_G.step()

        for p in model.discriminators():
            p.requires_grad_(True)
        with self.autocast():
            losses["D_X"] = discriminator_loss(model.D_X, x, self.pool_X.query(F_y))
            losses["D_Y"] = discriminator_loss(model.D_Y, y, self.pool_Y.query(G_x))
        self.optimizer_D.zero_grad()
        (losses["D_X"] + losses["D_Y"]).backward()
        average_gradients(model.discriminators())
        self.optimizer_D.step()
        return {name: value.detach() for name, value in losses.items()} | signs(x, G_x, "G") | signs(y, F_y, "F")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16)

    def state_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self.model, name).state_dict() for name in ("G", "F", "D_X", "D_Y")}
        pools = gather([self.pool_X.state_dict(), self.pool_Y.state_dict()])
        optimizers = {"optimizer_G": self.optimizer_G.state_dict(), "optimizer_D": self.optimizer_D.state_dict()}
        return parts | optimizers | {"pools": pools}

    def load_state_dict(self, state: dict[str, Any], rank: int = 0) -> None:
        for name in ("G", "F", "D_X", "D_Y"):
            getattr(self.model, name).load_state_dict(state[name])
        self.optimizer_G.load_state_dict(state["optimizer_G"])
        self.optimizer_D.load_state_dict(state["optimizer_D"])
        for pool, saved in zip((self.pool_X, self.pool_Y), state["pools"][rank], strict=True):
            pool.load_state_dict(saved, self.device)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Make the gradients of all processes their mean, that of the joint batch, if there are several."""
    if dist.is_initialized():
        for p in parameters:
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()


def gather(item: Any) -> list[Any]:
    """The items of all processes, in order of their ranks."""
    items = [item]
    if dist.is_initialized():
        items = [None] * dist.get_world_size()
        dist.all_gather_object(items, item)
    return items


@torch.no_grad()
def signs(x: Tensor, made: Tensor, name: str) -> dict[str, Tensor]:
    """What `diagnose` looks at: how far the generator changes x, and how its luminance goes with that of x."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=x.device).view(3, 1, 1)
    a, b = ((weights * image).sum(1).flatten() for image in (x, made))
    correlation = torch.corrcoef(torch.stack([a, b]))[0, 1].nan_to_num(0.0)  # NaN: one of them has one colour only
    return {f"change_{name}": distance(x, made), f"luminance_{name}": correlation}


def diagnose(history: Sequence[Sequence[float]]) -> dict[str, str]:
    """Warnings, by what they are about, from the means over the last 20 rows of the losses."""
    if len(history) < 20:
        return {}
    mean = dict(zip(COLUMNS, (sum(column) / 20 for column in zip(*history[-20:], strict=True)), strict=True))
    found = {}
    for name in ("D_X", "D_Y"):
        if mean[name] < 0.01:
            found[name] = (
                f"{name} tells all pictures apart, so that nothing is learned from it: add pictures or lower --lr"
            )
    for name in ("G", "F"):
        if mean[f"change_{name}"] < 0.02:
            found[name] = f"{name} has become the identity: lower --lambda-identity, or --lambda-cycle"
        elif mean[f"luminance_{name}"] < -0.3:
            found[name] = f"{name} turns light into dark: start again with another --seed, or raise --lambda-identity"
    return found


def train(args: argparse.Namespace, command: Sequence[str]) -> None:
    """Train G, F, D_X and D_Y as the command line says (§7.1)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun sets them
    if world > 1 and torch.cuda.is_available() and args.device in ("auto", "cuda"):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    args.load_size = args.load_size or round(args.crop_size * 286 / 256)
    args.blocks = args.blocks or (6 if args.crop_size <= 128 else 9)
    if args.load_size < args.crop_size:
        raise InputError(f"--load-size {args.load_size} is less than --crop-size {args.crop_size}")
    if args.crop_size % 4:
        raise InputError(f"--crop-size {args.crop_size}: choose a multiple of 4")
    if args.batch_size % world:
        raise InputError(f"--batch-size {args.batch_size} cannot be shared by {world} processes")
    checkpoint = args.output / "checkpoint.pth"
    check_output(checkpoint)
    if any(checkpoint.resolve().is_relative_to(Path(folder).resolve()) for folder in args.data):
        raise InputError(f"{args.output} is among the pictures to train on: choose another --output")
    if args.export:
        check_output(args.export, (".pth", ".pt"))
        if args.export.resolve() == checkpoint.resolve():
            raise InputError(f"{checkpoint} is the checkpoint itself: choose another name for --export")
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if rank > 0:
            dist.barrier()  # until the first process has looked for the pictures, and perhaps downloaded them
    (X, x_samples), (Y, y_samples) = domains(args.data, args.crop_size)
    if world > 1 and rank == 0:
        dist.barrier()

    trainer = Trainer(args, device, precision, rank)
    settings = {name: getattr(args, name) for name in FIXED}
    settings |= {"precision": str(precision), "processes": world}
    settings |= {name: fingerprint(*(path.name for path in files)) for name, files in (("X", X), ("Y", Y))}
    first, history = 0, []  # type: int, list[list[float]]
    if args.resume:
        state = load_checkpoint(args.resume)
        try:
            for name, value in settings.items():
                before = state["settings"].get(name)
                if before != value:
                    raise InputError(f"{args.resume} was trained with {name} {before}, not {value}")
            trainer.load_state_dict(state, rank)
            first, history = int(state["step"]), list(state["history"])
        except InputError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"{args.resume} is no training to resume: name a checkpoint.pth of train") from error
    if checkpoint.exists() and not (args.resume and args.resume.resolve() == checkpoint.resolve()):
        raise InputError(f"{checkpoint} exists: continue with --resume {checkpoint}, or choose another --output")
    epoch_steps = math.ceil(max(len(X), len(Y)) / args.batch_size)
    last = epoch_steps * (args.epochs + args.decay_epochs)
    last = min(last, args.max_steps or last)
    if last == 0:
        raise InputError("nothing to do: choose --epochs or --decay-epochs above 0")
    if first > last:
        raise InputError(f"{args.resume} has had {first} steps already, more than {last}")
    record: dict[str, Any] = {"architecture": {"blocks": args.blocks, "width": args.width}, "settings": settings}
    record |= {"command": shlex.join(command)}

    def save(step: int) -> None:
        state = trainer.state_dict()  # of all processes
        if rank == 0:
            save_checkpoint(record | {"step": step, "history": history} | state, checkpoint)
            if history:
                save_losses(history, args.output)
            if args.export:
                export(args.export, record, trainer.model)

    if rank == 0:
        precision_name = str(precision).removeprefix("torch.")
        print(f"training on {device} in {precision_name}: {len(X)} and {len(Y)} pictures", file=sys.stderr)
    # Ctrl-C ends the training between two steps, so that the checkpoint is whole; a second one ends it at once.
    interrupts: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        interrupts.append(number)
        if world > 1 or len(interrupts) > 1:
            raise KeyboardInterrupt

    handler = signal.signal(signal.SIGINT, interrupt)
    skipped, warned = 0, set()  # type: int, set[str]
    pairs = Pairs(X, Y, args.load_size, args.crop_size, args.seed)
    bar = tqdm(total=last, initial=first, unit="step", disable=rank > 0)
    try:
        for step, (x, y, unreadable) in enumerate(batches(pairs, args, first, last, rank, world), first + 1):
            epoch = (step - 1) // epoch_steps
            lr = args.lr * lr_factor(epoch, args.epochs, args.decay_epochs)
            losses = trainer.step(x.to(device, non_blocking=True), y.to(device, non_blocking=True), lr)
            skipped += unreadable
            bar.update()
            stopping = bool(interrupts)
            epoch_ends = step % epoch_steps == 0 or step == last
            saving = step % args.checkpoint_every == 0 or epoch_ends or stopping
            if step % 10 == 0 or saving:  # not each time: it makes a GPU wait
                means = torch.stack([*losses.values()])
                if world > 1:
                    dist.all_reduce(means)
                values = {"step": step, "epoch": epoch + 1, "lr": lr, "identity": 0.0}
                values |= dict(zip(losses, (means / world).tolist(), strict=True))
                history.append([values[name] for name in COLUMNS])
                bar.set_postfix_str(", ".join(f"{name} {values[name]:.2f}" for name in SHOWN))
                for about, warning in diagnose(history).items():
                    if about not in warned and rank == 0:
                        tqdm.write(f"warning: {warning}", file=sys.stderr)
                    warned.add(about)
                finite = all(map(math.isfinite, history[-1]))
                if not finite or (saving and not all(p.isfinite().all() for p in trainer.model.parameters())):
                    kept = f"{checkpoint} is the last good state: " if checkpoint.exists() else ""
                    raise InputError(f"a loss became infinite; {kept}try a smaller --lr")
            if epoch_ends and rank == 0:
                sheet = sample_sheet(trainer, x_samples.to(device), y_samples.to(device))
                path = args.output / f"epoch_{epoch + 1:03d}.jpg"
                save_image(sheet, path, provenance(command, step=step))
            if saving:
                save(step)
            if stopping:
                raise SystemExit(130)
    finally:
        bar.close()
        signal.signal(signal.SIGINT, handler)
        if interrupts and checkpoint.exists():
            print(f"interrupted: continue with --resume {checkpoint}", file=sys.stderr)
    if skipped:
        print(f"warning: {skipped} times a file could not be read", file=sys.stderr)
    if first == last:  # a finished training
        save(last)
    if rank == 0:
        print(checkpoint)
    if world > 1:
        dist.destroy_process_group()


@torch.no_grad()
def sample_sheet(trainer: Trainer, x: Tensor, y: Tensor) -> Tensor:
    """A sheet (3, H, W) with a row for every test picture: x, G(x), F(G(x)), F(x), and y, F(y), G(F(y)), G(y)."""
    halves = []
    for image, there, back in ((x, trainer.model.G, trainer.model.F), (y, trainer.model.F, trainer.model.G)):
        with trainer.autocast():
            made = there(image)
            columns = [image, made, back(made), back(image)]
        halves.append(torch.cat([torch.cat([*column], -2) for column in columns], -1))
    rows = max(half.shape[1] for half in halves)
    halves = [nnf.pad(half, (0, 0, 0, rows - half.shape[1]), value=1.0) for half in halves]
    return torch.cat([halves[0], halves[0].new_ones(3, rows, 8), halves[1]], -1)


def export(path: Path, record: dict[str, Any], model: CycleGAN) -> None:
    """Write G and F alone, in half precision."""
    half = {name: {k: v.half() for k, v in getattr(model, name).state_dict().items()} for name in ("G", "F")}
    save_checkpoint(record | half, path)


def save_losses(history: Sequence[Sequence[float]], folder: Path) -> None:
    """Write losses.csv, a row for every tenth step, and losses.png, a plot of means over up to 200 stretches."""
    import matplotlib.pyplot as plt  # here, as it takes long to load

    plt.switch_backend("agg")  # needs no display
    with replacing(folder / "losses.csv") as path, path.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *history])
    length = math.ceil(len(history) / 200)
    stretches = [history[i : i + length] for i in range(0, len(history), length)]
    means = [[sum(column) / len(rows) for column in zip(*rows, strict=True)] for rows in stretches]
    steps, _, rates, _, *columns = zip(*means, strict=True)
    figure, (upper, lower) = plt.subplots(2, sharex=True, height_ratios=[4, 1])
    for name, column in zip(COLUMNS[4:10], columns, strict=False):
        upper.semilogy(steps, column, label=name)
    upper.set(ylabel="loss (before weighting)")
    upper.legend()
    lower.plot(steps, rates)
    lower.set(xlabel="step", ylabel="learning rate")
    with replacing(folder / "losses.png") as path:
        figure.savefig(path, dpi=150)
    plt.close(figure)


# --- Translating -------------------------------------------------------------------------------------------


def load_generator(path: Path, direction: str = "x2y") -> Generator:
    """Read G (x2y) or F (y2x) from what `train` has written, or the one generator of a file of the authors' code."""
    state = load_checkpoint(path)
    try:
        if "G" in state:
            architecture, weights = state["architecture"], state["G" if direction == "x2y" else "F"]
        else:  # a plain state dict; older ones carry statistics that instance norm never used
            weights = {name: value for name, value in state.items() if "running_" not in name}
            blocks = sum(name.endswith("conv_block.1.weight") for name in weights)
            architecture = {"blocks": blocks, "width": len(weights["model.1.weight"])}
        network = Generator(**architecture)
        network.load_state_dict({name: value.float() for name, value in weights.items()})
        network.published = "G" not in state
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise InputError(f"{path} is no model of cyclegan.py, nor a generator of its authors' code") from error
    if "G" not in state and direction == "y2x":
        raise InputError(f"{path} holds one generator: leave out --direction")
    return network.eval()


@torch.inference_mode()
def translate(network: Generator, image: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
    """Translate (B, 3, H, W) in [0, 1] of any size from 5 px a side: padded by reflection, then cropped again."""
    height, width = image.shape[-2:]
    if min(height, width) < 5:
        raise InputError(f"{width}×{height} px is too small: the network needs 5 px a side")
    right, below = (max(8, -(-side // 4) * 4) - side for side in (width, height))
    with torch.autocast(image.device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
        return network(nnf.pad(image, (0, right, 0, below), mode="reflect"))[..., :height, :width]


def translate_files(args: argparse.Namespace, command: Sequence[str]) -> None:
    """Translate files and folders as the command line says; exit with status 1 if some could not be read."""
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    network = load_generator(args.model, args.direction).to(device)
    if args.precision == "auto" and network.published:
        precision = torch.float32  # the pixels that its authors' code gives
    print(f"computing on {device} in {str(precision).removeprefix('torch.')}", file=sys.stderr)

    def transform(path: Path) -> Tensor:
        return translate(network, load_image(path, args.image_size).to(device), precision)

    transform_files(args.inputs, args.output, args.direction, transform, provenance(command, model=args.model.name))


# --- Command line ------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; InputError on a mistake."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    sub = commands.add_parser("train", help="learn from two sets of pictures", description="Train G, F, D_X and D_Y.")
    sub.set_defaults(run=train)
    add = sub.add_argument
    add(
        "data",
        nargs="+",
        metavar="DIR",
        help="two folders, X and Y, searched with all folders in them; or one with trainA and trainB; or the name of "
        f"one of the authors' sets, which is downloaded into data/: {', '.join(DATASETS)}",
    )
    add("-o", "--output", type=Path, default=Path("run"), help="folder for the checkpoint, samples and losses")
    add("--lambda-cycle", type=number(), default=10.0, help="λ of Eq. 3")
    add("--lambda-identity", type=number(), default=0.5, help="weight of the identity loss, relative to λ")
    add("--pool-size", type=number(int), default=50, help="made pictures that are kept to be shown again")
    add("--lr", type=number(most=1e30), default=2e-4, help="learning rate of Adam")
    add("--beta1", type=number(most=0.999), default=0.5, help="of Adam")
    add("--batch-size", type=number(int, 1), default=1, help="pictures of each domain a step")
    add("--epochs", type=number(int), default=100, help="with that learning rate; the larger domain once is an epoch")
    add("--decay-epochs", type=number(int), default=100, help="after them, in which it falls linearly to 0")
    add("--max-steps", type=number(int, 1), help="stop after so many, for a trial")
    add(
        "--load-size",
        type=number(int, 32, 65536),
        help="shorter side of a picture, in px (default: 286/256 of --crop-size)",
    )
    add("--crop-size", type=number(int, 32, 65536), default=256, help="side of the training crops, in px")
    add("--blocks", type=number(int, 1, 1000), help="residual blocks (default: 9; 6 for crops up to 128 px)")
    add("--width", type=number(int, 1, 4096), default=64, help="channels of the networks' first layer")
    add("--workers", type=number(int), default=2, help="processes that load pictures")
    add("--seed", type=number(int, most=2**30), default=0, help="of the initial weights, the order and the crops")
    add(
        "--checkpoint-every",
        type=number(int, 1),
        default=1000,
        metavar="STEPS",
        help="write all that can be resumed, also after every epoch",
    )
    add("--resume", type=Path, metavar="FILE", help="continue from this checkpoint.pth")
    add("--export", type=Path, metavar="FILE", help="also write the two generators alone, in half precision")

    sub = commands.add_parser("translate", help="translate pictures", description="Translate pictures.")
    sub.set_defaults(run=translate_files)
    add = sub.add_argument
    add("inputs", type=Path, nargs="+", metavar="input", help="picture, or folder of pictures")
    add("--model", type=Path, required=True, help="of train, or a generator of the authors' code")
    add("--direction", choices=["x2y", "y2x"], default="x2y", help="G or F")
    add("-o", "--output", type=Path, help="picture, or folder for several (default: <input>_<direction>.png)")
    add("--image-size", type=number(int, 1, 65536), help="longer side of the result, in px (default: the input's own)")

    for sub in commands.choices.values():
        sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, … or mps")
        sub.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto", help="of the networks")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exit with status 2 on a failure that the user can mend."""
    argv = sys.argv[1:] if argv is None else argv
    with one_line_errors():
        args = parse_args(argv)
        args.run(args, ["python", "cyclegan.py", *argv])


if __name__ == "__main__":
    main()
