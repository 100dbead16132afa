"""All scripts on tensors that say they are on `mps`, and refuse what Apple's GPUs refuse.

They compute on the CPU.
"""

import pytest
import torch
from conftest import run, save_noise, tiny
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

# What torch 2.6 has not there:
MISSING = ["_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "_linalg_eigh", "linalg_eig"]
# Of channels-last maps these give wrong gradients, or end the process (pytorch 175190, 107214):
BACKWARD = ["avg_pool2d_backward", "max_pool2d_with_indices_backward"]
BACKWARD += ["threshold_backward", "tanh_backward"]


class OnMps(torch.Tensor):
    """A tensor that says it is on `mps`; `inner`, on the CPU, has its values."""

    device = property(lambda self: torch.device("mps:0"))
    tolist = property(lambda self: self.inner.tolist)

    def __new__(cls, inner):
        if inner.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"a MPS Tensor cannot be {inner.dtype}: it has no 64-bit floats")
        size, stride = inner.shape, inner.stride()
        self = torch.Tensor._make_wrapper_subclass(cls, size, stride, dtype=inner.dtype)
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim]
        mixed = not all(isinstance(t, OnMps) for t in tensors) and name not in ("copy_", "index")
        order = name in BACKWARD and not all(t.is_contiguous() for t in tensors if t.ndim == 4)
        sides = name == "_adaptive_avg_pool2d" and not divide(args[0].shape[-2:], args[1])
        if name in MISSING or mixed or order or sides:
            raise RuntimeError(f"MPS refuses {name}: {mixed=}, {order=}, {sides=}")
        args, kwargs = tree_map_only(OnMps, lambda t: t.inner, (args, kwargs or {}))
        result = func(*args, **kwargs)
        # Of a convolution, since torch 2.10 the order of the weights decides as well.
        if name == "convolution" and not args[6]:
            result = result.contiguous(memory_format=order_of(args[:2]))
        return tree_map_only(torch.Tensor, OnMps, result)


def divide(sides, others):
    return all(side % other == 0 for side, other in zip(sides, others, strict=True))


def order_of(tensors):
    """Return torch.channels_last if one of them is in that order alone."""
    last = torch.channels_last
    if any(t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in tensors):
        return last
    return torch.contiguous_format


class Calls(TorchFunctionMode):
    """Turns what is sent to `mps`, or made there, into OnMps, and back."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.__reduce_ex__:
            return args[0].inner.detach().__reduce_ex__(args[1])
        # By this, Module.to sees that it needs new parameters.
        if func is torch._has_compatible_shallow_copy_type:
            return not any(isinstance(t, OnMps) for t in args)
        if func is torch.Tensor.cpu:
            return move(args[0], "cpu")
        if func is torch.Tensor.to:
            tensor, *rest = args
            if rest and isinstance(rest[0], torch.Tensor):
                rest = [rest[0].device, rest[0].dtype]
            return move(tensor, *rest, **kwargs)
        if torch.device(kwargs.get("device") or "cpu").type == "mps":
            return OnMps(func(*args, **kwargs | {"device": "cpu"}))
        return func(*args, **kwargs)


def move(tensor, *where, **kwargs):
    """Do what Tensor.to does, and turn a tensor into OnMps or back."""
    device, dtype, _, order = torch._C._nn._parse_to(*where, **kwargs)
    to_mps = (device or tensor.device).type == "mps"
    result = tensor.inner if isinstance(tensor, OnMps) and not to_mps else tensor
    order = order or torch.preserve_format
    result = result.to(dtype=dtype or tensor.dtype, memory_format=order)
    return OnMps(result.detach()) if to_mps and not isinstance(result, OnMps) else result


MASK = torch.ones(1, 1, 39, 55).triu()  # all sides odd, as pooling to even ones divides
OPTIONS = [
    {"scales": 2, "protect": MASK, "preserve_color": "luminance"},
    {"init": "noise", "optimizer": "adam", "pooling": "max", "style_masks": [MASK]},
    {"init": MASK.expand(1, 3, 39, 55), "preserve_color": "histogram", "tv_weight": 1.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_gatys_paints_what_the_cpu_paints(options):
    """Pictures that are transparent in parts; a painting may be on the CPU."""
    colors = torch.rand(2, 1, 3, 39, 55, generator=torch.Generator().manual_seed(0))
    photo, style = (torch.cat([image, MASK.flip(3)], dim=1) for image in colors)
    expected = tiny(photo, [style], **options)
    for device in ("cpu", "mps"):
        with Calls():
            picture = tiny(photo.to("mps"), [style.to(device)], **options).cpu()
        torch.testing.assert_close(picture, expected, rtol=0, atol=0.02)


def test_all_commands_run():
    save_noise(*(f"x/{i}.png" for i in range(5)), "a.png", size=(60, 40))
    with Calls():
        run("gatys.py a.png a.png --save-gif --save-losses --device mps")
        run("johnson.py stylize a.png --preserve-color luminance --device mps")
        run("cyclegan.py translate a.png --device mps")
        for n in "12":
            run(f"johnson.py train --style a.png --data x --resume --device mps --iterations {n}")
            run(f"cyclegan.py train x x --resume --device mps --max-steps {n}")
