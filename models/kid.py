"""Measure what models of cyclegan.py make of horses and zebras, by KID.

    python models/kid.py data/horse2zebra                          # the shipped one, test pictures
    python models/kid.py data/horse2zebra run/*.pth --held-out --plot kid.png

KID, the kernel inception distance (Bińkowski et al. 2018), is 0 for two sets of a kind. Here it is
of VGG-19's maps and in a unit of its own: it cannot be compared with published figures.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import to_tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
from cyclegan import load_generator, translate
from models.horse2zebra import load, split

SHIPPED = Path(__file__).with_name("horse2zebra.pth")


@functools.cache
def network() -> common.VGG:
    """Make the network that compares pictures, once."""
    return common.VGG(["relu4_1", "relu5_1"], "vgg19", pooling="avg")


@torch.no_grad()
def features(pictures: list[Tensor]) -> Tensor:
    """Return the mean and the spread over the positions of each map of VGG, at 128 px: (n, d)."""
    rows = []
    for picture in pictures:
        small = common.to_pil(picture).resize((128, 128), 1)  # 1: Lanczos
        row = []
        for maps in network()(to_tensor(small).unsqueeze(0)).values():
            f = maps[0].flatten(1)  # (C, h*w)
            row += [f.mean(1), f.std(1)]
        rows.append(torch.cat(row))
    return torch.stack(rows).double()


def kid(made: Tensor, real: Tensor) -> float:
    """Estimate the distance of features (n, d) and (m, d).

    Their unit is three times the spread of `real`.
    """
    unit = 3 * real.std(0).mean()
    made = made / unit
    real = real / unit

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> Tensor:
        k = kernel(a, a)
        return (k.sum() - k.trace()) / (len(a) * (len(a) - 1))

    return float(within(made) + within(real) - 2 * kernel(made, real).mean())


def measure(model: Path, direction: str, sources: list[Tensor], real: Tensor) -> float:
    """Return the KID of what a model makes of `sources`; `real` are features (m, d)."""
    generator, _ = load_generator(model, direction)
    made = [translate(generator, source) for source in sources]
    return kid(features(made), real)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="a folder with trainA, trainB, testA and testB")
    parser.add_argument("models", type=Path, nargs="*", default=[SHIPPED])
    held_out = "take the training pictures that models/horse2zebra.py holds out"
    parser.add_argument("--held-out", action="store_true", help=held_out)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot them over their steps")
    args = parser.parse_args(argv)
    if args.plot:
        common.check_outputs([args.plot], args.models, [".png", ".pdf", ".svg"])
    if args.held_out:
        files = [split(args.data / part)[1] for part in ("trainA", "trainB")]
    else:
        files = [common.find_images(args.data / part) for part in ("testA", "testB")]
    horses, zebras = (load(part, torch.device("cpu")) for part in files)
    real_X = features(horses)
    real_Y = features(zebras)
    to_Y = kid(real_X, real_Y)
    to_X = kid(real_Y, real_X)
    print(f"untranslated: to zebras {to_Y:.2f}, to horses {to_X:.2f}")
    rows = []
    for model in args.models:
        to_Y = measure(model, "x2y", horses, real_Y)
        to_X = measure(model, "y2x", zebras, real_X)
        rows.append((to_Y, to_X))
        print(f"{model.name}: zebras {to_Y:.2f}, horses {to_X:.2f}", flush=True)
    if args.plot:
        from matplotlib import pyplot

        steps = [common.load_checkpoint(model)["step"] for model in args.models]
        pyplot.plot(steps, rows, label=["horses to zebras", "zebras to horses"])
        pyplot.xlabel("step")
        pyplot.ylabel("KID of held-out pictures" if args.held_out else "KID of test pictures")
        pyplot.ylim(0)
        pyplot.legend()
        pyplot.savefig(args.plot, dpi=150)


if __name__ == "__main__":
    with common.one_line_errors():
        main()
