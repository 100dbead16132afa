"""All three scripts on a device that refuses what Apple's GPUs refuse: a tensor that says it is on `mps`, and is not.

It computes on the CPU, so that results can be compared with the CPU's. It is no Mac: wrong numbers inside Apple's own
kernels are beyond it.
"""

import functools
import importlib.util
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

import common
import cyclegan
import gatys
import johnson

EXAMPLES = Path(__file__).parent.parent / "examples"
PHOTO, STYLE = str(EXAMPLES / "content.jpg"), str(EXAMPLES / "style.jpg")
aten = torch.ops.aten
# Of channels-last maps these give wrong gradients, or end the process: pytorch issues 175190 and 107214.
BACKWARD = {
    aten.avg_pool2d_backward,
    aten.max_pool2d_with_indices_backward,
    aten.threshold_backward,
    aten.tanh_backward,
}


@functools.cache
def without_kernel():
    """Operations that torch computes on a CPU and not on `mps`, by its own table; and what torch 2.6 had not yet."""
    path = Path(importlib.util.find_spec("torchgen").origin).parent / "packaged/ATen/native/native_functions.yaml"
    devices, structured = {}, {}
    for line in path.read_text(encoding="utf-8").splitlines():
        key, _, value = line.strip().partition(": ")
        if key == "- func":
            name = value.split("(")[0]
        elif key == "structured_delegate":
            structured[name] = value
        elif line.startswith("    ") and value:  # under `dispatch`
            devices.setdefault(name, set()).update(key.split(", "))
    for name, other in structured.items():
        devices[name] = devices.get(name, set()) | devices[other]
    young = {"_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "_linalg_eigh"}
    return young | {
        n for n, on in devices.items() if "CPU" in on and not any("MPS" in d or "Composite" in d for d in on)
    }


class OnMps(torch.Tensor):
    """A tensor that says it is on `mps`; `inner`, on the CPU, has its values."""

    device = property(lambda self: torch.device("mps:0"))
    tolist = property(lambda self: self.inner.tolist)

    def __new__(cls, inner):
        if inner.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"Cannot convert a MPS Tensor to {inner.dtype}: it has no 64-bit floats")
        options = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **options)
        self.inner = inner
        return self

    def __deepcopy__(self, memo):
        copy = OnMps(self.inner.clone())
        return torch.nn.Parameter(copy, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copy

    def __reduce_ex__(self, protocol):
        return self.inner.detach().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        op, name = func.overloadpacket, str(func).removeprefix("aten.").removesuffix(".default")
        tensors = [t for t in tree_flatten((args, kwargs or {}))[0] if isinstance(t, torch.Tensor)]
        if name in without_kernel():
            raise RuntimeError(f"The operator {name} is not currently implemented for the MPS device")
        if any(t.ndim and not isinstance(t, OnMps) for t in tensors) and op not in (aten.copy_, aten.index):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found mps:0 and cpu")
        if op is aten._adaptive_avg_pool2d and any(n % m for n, m in zip(args[0].shape[-2:], args[1], strict=True)):
            raise RuntimeError(f"Adaptive pool MPS: {tuple(args[0].shape)} is not divisible by {args[1]}")
        if op in BACKWARD and not all(t.is_contiguous() for t in tensors if t.ndim == 4):
            raise RuntimeError(f"{name}: of channels-last maps MPS gives wrong gradients")
        args, kwargs = tree_map_only(OnMps, lambda t: t.inner, (args, kwargs or {}))
        result = func(*args, **kwargs)
        if op is aten.convolution and not args[6]:  # since torch 2.10 the order of the weights decides as well
            last = any(t.is_contiguous(memory_format=torch.channels_last) > t.is_contiguous() for t in args[:2])
            result = result.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        return tree_map_only(torch.Tensor, OnMps, result)


class Calls(TorchFunctionMode):
    """Turns what is sent to `mps`, or made there, into OnMps, and back."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch._has_compatible_shallow_copy_type:  # by which Module.to sees that it needs new parameters
            return not any(isinstance(t, OnMps) for t in args)
        if func in (torch.Tensor.to, torch.Tensor.cpu):
            tensor, *rest = args if func is torch.Tensor.to else (*args, "cpu")
            device, dtype, _, order = torch._C._nn._parse_to(*rest, **kwargs)
            like = rest[0] if rest and isinstance(rest[0], torch.Tensor) else tensor
            device = (device if device and like is tensor else like.device).type
            source = tensor.inner if device == "cpu" and isinstance(tensor, OnMps) else tensor
            result = source.to(dtype=dtype or tensor.dtype, memory_format=order or torch.preserve_format)
            return OnMps(result.detach()) if device == "mps" and not isinstance(result, OnMps) else result
        if torch.device(kwargs.get("device") or "cpu").type == "mps":
            return OnMps(func(*args, **kwargs | {"device": "cpu"}))
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def mps():
    with Calls(), mock.patch("torch.backends.mps.is_macos_or_newer", return_value=True):
        yield


SMALL = {
    "precision": "float32",
    "vgg_weights": "random",
    "content_layers": ["relu2_2"],
    "style_layers": ["relu1_1", "relu2_1"],
    "num_steps": 1,
}
MASK = torch.ones(1, 1, 39, 55).triu()  # all sides odd, as pooling to even ones divides


@pytest.mark.parametrize(
    "options",
    [{"scales": 2}, {"init": "noise", "optimizer": "adam"}, {"init": "style", "pooling": "max"}, {"protect": MASK}]
    + [{"preserve_color": way} for way in ("luminance", "histogram")]
    + [{"style_masks": [MASK], "painting_masks": [MASK]}],
    ids=lambda options: " ".join(options),
)
def test_gatys_paints_what_the_cpu_paints(options):
    generator = torch.Generator().manual_seed(0)
    photo, style = (torch.rand(1, 3, *size, generator=generator) for size in ((39, 55), (31, 47)))
    picture = gatys.stylize(photo.to("mps"), [style.to("mps")], **SMALL, **options)
    expected = gatys.stylize(photo, [style], **SMALL, **options)
    torch.testing.assert_close(picture.inner, expected, rtol=0, atol=0.02)


def test_all_commands_run():
    for i in range(5):
        common.save_image(torch.rand(1, 3, 40, 60), f"photos/{i}.png")
    tiny = "--device mps --image-size 47 --num-steps 1 --vgg-weights random --save-gif --save-losses -o a.png"
    gatys.main([PHOTO, STYLE, *tiny.split()])
    tiny = "--device mps --image-size 47 -o b.png"
    johnson.main(["stylize", PHOTO, *tiny.split(), "--preserve-color", "luminance"])
    cyclegan.main(["translate", PHOTO, *tiny.split()])
    tiny = """--device mps --workers 0 --image-size 16 --style-size 32 --batch-size 2 --data photos -o d.pth --resume
        --vgg vgg16 --vgg-weights random --content-layer relu2_1 --style-layers relu1_1 relu2_1 --iterations"""
    for steps in "12":
        johnson.main(["train", "--style", STYLE, *tiny.split(), steps])
    tiny = "--device mps --workers 0 --crop-size 32 --width 4 --blocks 1 -o run --resume --max-steps"
    for steps in "12":
        cyclegan.main(["train", "photos", "photos", *tiny.split(), steps])
