"""Measure the speed and memory that the README states: `python benchmark.py [ROW …]`; all rows by default.

Each row compares two versions in one process, taking turns, or times a whole command; it prints what was measured
beside the figure to reach.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import gatys
from common import VGG, gram_matrix, load_image, pick_device, pick_precision

ROOT = Path(__file__).parent
CONTENT, STYLE = ROOT / "examples" / "content.jpg", ROOT / "examples" / "style.jpg"
DEVICE = pick_device()
PRECISION = pick_precision("auto", DEVICE)


def best(*versions: Callable[[], None], repeats: int = 5) -> list[float]:
    """The shortest time of each version in seconds; the versions take turns."""
    times = [float("inf")] * len(versions)
    for _ in range(repeats + 1):  # the first round warms up
        for i, version in enumerate(versions):
            start = time.perf_counter()
            version()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            times[i] = min(times[i], time.perf_counter() - start)
    return times


def gatys_evaluation() -> str:
    """The loss of the default command at 512 px and its gradient, against plain float32 in contiguous layout."""
    content, style = (load_image(path, 512).to(DEVICE) for path in (CONTENT, STYLE))
    layers = [*gatys.CONTENT_LAYERS, *gatys.STYLE_LAYERS]

    def evaluation(vgg: VGG, precision: torch.dtype, gram: Callable) -> Callable[[], None]:
        def features(image: torch.Tensor) -> dict[str, torch.Tensor]:
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == torch.bfloat16):
                return vgg(image)

        with torch.no_grad():
            P = {name: features(content)[name] for name in gatys.CONTENT_LAYERS}
            A = {name: gram(features(style)[name]) for name in gatys.STYLE_LAYERS}

        def run() -> None:
            x = content.clone().requires_grad_()
            F = features(x)
            L_content = sum(gatys.content_loss(F[name], P[name]) for name in P)
            L_style = sum(gatys.style_loss(gram(F[name]), A[name]) for name in A) / len(A)
            (L_content + 30 * L_style).backward()

        return run

    def plain_gram(f: torch.Tensor) -> torch.Tensor:
        f = f.flatten(2)
        return f @ f.mT / f[0].numel()

    plain = VGG(layers, "vgg19", pooling="avg").to(DEVICE).to(memory_format=torch.contiguous_format)
    ours = VGG(layers, "vgg19", pooling="avg").to(DEVICE)
    slow, fast = best(evaluation(plain, torch.float32, plain_gram), evaluation(ours, PRECISION, gram_matrix))
    return f"{fast:.2f} s, plain float32 {slow:.2f} s: ratio {fast / slow:.2f} (to reach: 0.5)"


def gatys_command() -> str:
    """The README's first command, with start-up and loading: 512 px, then 1024 px."""
    lines, seconds = [], []
    with tempfile.TemporaryDirectory() as folder:
        for size in (512, 1024):
            command = [sys.executable, str(ROOT / "gatys.py"), str(CONTENT), str(STYLE), "-o", f"{folder}/a.png"]
            start = time.perf_counter()
            subprocess.run([*command, "--image-size", str(size)], check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9  # of the largest child up to now
            lines.append(f"{size} px {seconds[-1]:.0f} s, {peak:.2f} GB")
    to_reach = "(to reach: 60 s and 2.5 GB at 512 px, ratio 4.5)"
    return f"{'; '.join(lines)}; ratio {seconds[1] / seconds[0]:.1f} {to_reach}"


def gatys_cuda() -> str:
    """`stylize` on a GPU, without start-up: 512 px by default, and 2048 px."""
    if DEVICE.type != "cuda":
        return "needs a CUDA GPU"
    lines = []
    for size in (512, 512, 2048):  # the first one warms up
        content, style = (load_image(path, size).to(DEVICE) for path in (CONTENT, STYLE))
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        gatys.stylize(content, [style], precision=PRECISION)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 1e9
        lines.append(f"{size} px {time.perf_counter() - start:.1f} s, {peak:.2f} GB")
    return f"{'; '.join(lines[1:])} (to reach: 5 s at 512 px; 2048 px works)"


ROWS = [gatys_evaluation, gatys_command, gatys_cuda]


def main() -> None:
    """Print the rows that the command line names."""
    names = {row.__name__.replace("_", "-"): row for row in ROWS}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(names))
    rows = parser.parse_args().rows or list(names)
    if unknown := set(rows) - set(names):
        parser.error(f"unknown row {', '.join(unknown)}: choose from {', '.join(names)}")
    for name in rows:
        print(f"{name}: {names[name]()}", flush=True)


if __name__ == "__main__":
    main()
