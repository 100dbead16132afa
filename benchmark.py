"""Measure what the README states: `python benchmark.py [ROW …]`; all rows by default.

One table: for each method the time of a step, that of the same step written plainly and run in turns with it, their
ratio, and the memory; how both grow with the picture; and the two claims of Johnson's paper. It asserts nothing.

    python benchmark.py --quick                                      # smaller pictures, two minutes
    python benchmark.py --json benchmark.json --plot benchmark.png   # the same as a file, and drawn
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import cyclegan
import gatys
import johnson
from common import VGG, autocast, gram_matrix, load_checkpoint, load_image, pick_device, pick_precision

ROOT = Path(__file__).parent
CONTENT, STYLE, PORTRAIT = (ROOT / "examples" / f"{name}.jpg" for name in ("content", "style", "portrait"))
DEVICE = pick_device()
PRECISION = pick_precision("auto", DEVICE)
Step = Callable[[], object]
Row = dict[str, Any]


# --- What is measured: each step as it is here, or plainly: float32, contiguous, as it is commonly written ---


def plain_gram(f: torch.Tensor) -> torch.Tensor:
    """The Gram matrix of feature maps (B, C, H, W), as it is commonly written."""
    f = f.flatten(2)
    return f @ f.mT / f[0].numel()


def gatys_evaluation(size: int, ours: bool = True) -> Step:
    """The loss of the default command and its gradient, at a longer side of `size` px."""
    content, style = (load_image(path, size).to(DEVICE) for path in (CONTENT, STYLE))
    gram, precision = (gram_matrix, PRECISION) if ours else (plain_gram, torch.float32)
    vgg = VGG([*gatys.CONTENT_LAYERS, *gatys.STYLE_LAYERS], "vgg19", pooling="avg").to(DEVICE)
    vgg.to(memory_format=torch.channels_last if ours else torch.contiguous_format)

    def features(image: torch.Tensor) -> dict[str, torch.Tensor]:
        with autocast(DEVICE, precision):
            return vgg(image)

    with torch.no_grad():
        P = {name: features(content)[name] for name in gatys.CONTENT_LAYERS}
        A = {name: gram(features(style)[name]) for name in gatys.STYLE_LAYERS}

    def step() -> None:
        x = content.clone().requires_grad_()
        F = features(x)
        L_content = sum(gatys.content_loss(F[name], P[name]) for name in P)
        L_style = sum(gatys.style_loss(gram(F[name]), A[name]) for name in A) / len(A)
        (L_content + 30 * L_style).backward()

    return step


def johnson_step(size: int, ours: bool = True) -> Step:
    """A step of training on a batch of 4; plainly, all of VGG is run on the photos too."""
    x, y_s = torch.rand(4, 3, size, size, device=DEVICE), load_image(STYLE, 512).to(DEVICE)
    args = johnson.parse_args(["train", "--style", "", "--data", ""])
    layers, weights = [args.content_layer, *args.style_layers], (args.content_weight, args.style_weight, args.tv_weight)
    precision = PRECISION if ours else torch.float32
    objective = johnson.Objective(VGG(layers, "vgg19").to(DEVICE), y_s, layers[0], layers[1:], *weights, precision)
    objective.vgg.to(memory_format=torch.channels_last if ours else torch.contiguous_format)
    f_W = johnson.TransformNet().to(DEVICE)
    optimizer = torch.optim.Adam(f_W.parameters(), args.lr)

    def plain() -> None:
        optimizer.zero_grad()
        y_hat = f_W(x)
        with torch.no_grad():
            target = objective.vgg(x)
        f = objective.vgg(y_hat)
        content = johnson.content_loss(f[layers[0]], target[layers[0]])
        style = sum(johnson.style_loss(plain_gram(f[name]), G) for name, G in objective.G_s.items())
        (weights[0] * content + weights[1] * style + weights[2] * johnson.total_variation(y_hat)).backward()
        optimizer.step()

    return (lambda: johnson.step(f_W, objective, optimizer, x)) if ours else plain


def johnson_stylize(size: int, ours: bool = True) -> Step:
    """One pass of a trained network."""
    network = johnson.load_network(johnson.model_file("auvers")).to(DEVICE)
    x = torch.rand(1, 3, size, size, device=DEVICE)
    return lambda: johnson.stylize(network, x, precision="auto" if ours else "float32")


def cyclegan_step(size: int, ours: bool = True) -> Step:
    """A step of training, batch 1, 9 blocks; plainly, G and F's loss also has gradients for D_X and D_Y."""
    x, y = torch.rand(2, 1, 3, size, size, device=DEVICE)
    gan = cyclegan.CycleGAN(device=DEVICE, precision=PRECISION if ours else torch.float32)

    def textbook() -> None:
        gan.optimizer_G.zero_grad()
        losses, G_x, F_y = cyclegan.generator_losses(gan.G, gan.F, gan.D_X, gan.D_Y, x, y)
        losses["total"].backward()
        gan.optimizer_G.step()
        gan.optimizer_D.zero_grad()
        for D, pool, real, fake in ((gan.D_X, gan.pool_X, x, F_y), (gan.D_Y, gan.pool_Y, y, G_x)):
            cyclegan.discriminator_loss(D, real, pool.query(fake)).backward()
        gan.optimizer_D.step()

    return (lambda: gan.step(x, y)) if ours else textbook


def cyclegan_translate(size: int, ours: bool = True) -> Step:
    """One pass of a generator of 9 blocks, of the paper's width."""
    network, x = cyclegan.Generator().to(DEVICE).eval(), torch.rand(1, 3, size, size, device=DEVICE)
    return lambda: cyclegan.translate(network, x, "auto" if ours else "float32")


# --- How it is measured --------------------------------------------------------------------------------------


def best(*versions: Step, repeats: int) -> list[float]:
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


def peak() -> float:
    """The most memory that this process has had up to now, in GB; on a GPU, that of the tensors there."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")  # on Linux, ru_maxrss begins with what the parent process had
    if status.exists():
        return 1024 * next(float(line.split()[1]) for line in status.open() if line.startswith("VmHWM:")) / 1e9
    return (1 if sys.platform == "darwin" else 1024) * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def alone(name: str, size: int, ours: bool = True) -> tuple[float, float] | None:
    """The time of a step in seconds and the memory in GB, in a process of its own; None if that does not fit."""
    code = f"import benchmark as b; t = b.best(b.{name}({size}, {ours}), repeats=1)[0]; print(t, b.peak())"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return None if result.returncode else tuple(map(float, result.stdout.split()))  # type: ignore[return-value]


def free_memory() -> float:
    """GB that can be had now, of the GPU if there is one; infinite where that is not known."""
    if DEVICE.type == "cuda":
        return torch.cuda.mem_get_info()[0] / 1e9
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((1024 * float(line.split()[1]) / 1e9 for line in lines if line.startswith("MemAvailable:")), math.inf)


# --- The rows ------------------------------------------------------------------------------------------------


def step_row(name: str, size: int, quick: bool) -> Iterator[Row]:
    """A step here and plainly, in turns; the memory of each alone."""
    function = globals()[name]
    ours, plain = best(function(size), function(size, False), repeats=2 if quick else 4)
    memory = [alone(name, size, ours) for ours in ((True,) if quick else (True, False))]
    row = {"setting": f"{size} px", "seconds": ours, "plain": plain, "ratio": ours / plain}
    yield row | dict(zip(("GB", "plain GB"), (m and m[1] for m in memory), strict=False))


def growth_row(name: str, size: int, quick: bool) -> Iterator[Row]:
    """A step at 256 px, 512 px, … as far as memory goes, and the exponent: 2 is proportional to the pixels."""
    points: list[tuple[int, float, float]] = []
    for size in (256, 512) if quick else (256, 512, 1024, 2048):
        if len(points) > 1:  # four times as much as what the last doubling added
            expected = points[-1][2] + 4 * (points[-1][2] - points[-2][2])
            if expected > free_memory():
                yield {"setting": f"{size} px", "note": f"would need about {expected:.0f} GB"}
                break
        if (measured := alone(name, size)) is None:
            yield {"setting": f"{size} px", "note": "does not fit into memory"}
            break
        points.append((size, *measured))
        yield {"setting": f"{size} px", "size": size, "seconds": measured[0], "GB": measured[1]}
    if len(points) > 1:
        logs = [[math.log(value) for value in column[:2]] for column in points]
        slope = statistics.linear_regression(*zip(*logs, strict=True)).slope
        yield {"setting": f"{points[0][0]}–{points[-1][0]} px", "exponent": slope, "note": f"time ∝ side^{slope:.2f}"}


def gatys_command(name: str, size: int, quick: bool) -> Iterator[Row]:
    """The README's first command, with start-up and loading."""
    with tempfile.TemporaryDirectory() as folder:
        for side in (size,) if quick else (size, 2 * size):
            arguments = [str(CONTENT), str(STYLE), "-o", f"{folder}/a.png", "--image-size", str(side)]
            code = f"import benchmark as b; b.gatys.main({arguments}); print(b.peak())"
            start = time.perf_counter()
            result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
            seconds = time.perf_counter() - start
            yield {"setting": f"{side} px", "seconds": seconds, "GB": float(result.stdout.split()[-1])}


def gatys_cuda(name: str, size: int, quick: bool) -> Iterator[Row]:
    """`stylize` on a GPU, without start-up."""
    if DEVICE.type != "cuda":
        yield {"note": "needs a CUDA GPU"}
        return
    for side in (size,) if quick else (size, 2048):
        content, style = (load_image(path, side).to(DEVICE) for path in (CONTENT, STYLE))
        torch.cuda.reset_peak_memory_stats()
        (seconds,) = best(lambda c=content, s=style: gatys.stylize(c, [s]), repeats=1)
        yield {"setting": f"{side} px", "seconds": seconds, "GB": peak()}


def johnson_claims(name: str, size: int, quick: bool) -> Iterator[Row]:
    """Fig. 5 and Table 1: L-BFGS iterations from noise to the network's loss, and the time of 500 of them."""
    for style in johnson.STYLES[:1] if quick else johnson.STYLES:
        file = johnson.model_file(style)
        network, args = johnson.load_network(file).to(DEVICE), load_checkpoint(file)["settings"]
        vgg = VGG([args["content_layer"], *args["style_layers"]], args["vgg"]).to(DEVICE)
        weights = [args[f"{name}_weight"] for name in ("content", "style", "tv")]
        painting = ROOT / "examples" / ("style.jpg" if style == "auvers" else f"{style}.jpg")
        y_s = load_image(painting, args["style_size"]).to(DEVICE)
        objective = johnson.Objective(vgg, y_s, args["content_layer"], args["style_layers"], *weights, PRECISION)
        for path in (CONTENT,) if quick else (CONTENT, PORTRAIT):
            x = load_image(path, size, center_crop=True).to(DEVICE)
            (seconds,) = best(lambda x=x, network=network: johnson.stylize(network, x), repeats=5)
            reached = objective(johnson.stylize(network, x), x)["total"].item()
            noise, most = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)), 60 if quick else 500
            start, n, loss = time.perf_counter(), 0, math.inf
            for _, values in gatys.optimize(noise.to(DEVICE), lambda y, x=x, o=objective: o(y, x), most, 1):
                n, loss = n + 1, values["total"]
                if loss <= reached:
                    break
            times = 500 * (time.perf_counter() - start) / n / seconds
            text = f"{n}" if loss <= reached else f"more than {n}"
            note = f"its loss takes {text} iterations (paper: 50–100), 500 take {times:.0f} times as long (about 1000)"
            row = {"setting": f"{style}, {path.stem}", "seconds": seconds, "iterations": n, "speed-up": times}
            yield row | {"note": note}


ROWS: dict[str, tuple[Callable[[str, int, bool], Iterator[Row]], str, int, int]] = {  # and its size, and the quick one
    "gatys-evaluation": (step_row, "gatys_evaluation", 512, 256),
    "gatys-growth": (growth_row, "gatys_evaluation", 0, 0),
    "gatys-command": (gatys_command, "", 512, 256),
    "gatys-cuda": (gatys_cuda, "", 512, 512),
    "johnson-step": (step_row, "johnson_step", 256, 128),
    "johnson-stylize": (step_row, "johnson_stylize", 512, 256),
    "johnson-growth": (growth_row, "johnson_stylize", 0, 0),
    "johnson-claims": (johnson_claims, "", 256, 128),
    "cyclegan-step": (step_row, "cyclegan_step", 256, 128),
    "cyclegan-translate": (step_row, "cyclegan_translate", 256, 256),
    "cyclegan-growth": (growth_row, "cyclegan_translate", 0, 0),
}


def machine() -> dict[str, str]:
    """What the figures depend on."""
    cpu = Path("/proc/cpuinfo")
    text = cpu.read_text() if cpu.exists() else f"model name: {platform.processor()}"
    processor = text.split("model name")[-1].splitlines()[0].strip("\t: ")
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else processor
    return {
        "device": f"{DEVICE}, {name}, {torch.get_num_threads()} threads of {os.cpu_count()}",
        "precision": str(PRECISION),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
    }


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the steps, here and plainly, and the growth of time and memory."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    steps = [row for row in rows if "ratio" in row]
    for shift, key in ((-0.2, "seconds"), (0.2, "plain")):
        places = [i + shift for i in range(len(steps))]
        axes[0].barh(places, [row[key] for row in steps], 0.4, label={"seconds": "here"}.get(key, key))
    axes[0].set(yticks=range(len(steps)), yticklabels=[f"{r['row']}\n{r['setting']}" for r in steps], xlabel="s a step")
    for axis, key, label in ((axes[1], "seconds", "s"), (axes[2], "GB", "GB")):
        for name in dict.fromkeys(row["row"] for row in rows if "size" in row):
            points = [row for row in rows if row["row"] == name and "size" in row]
            axis.loglog([p["size"] for p in points], [p[key] for p in points], "o-", label=name.removesuffix("-growth"))
        axis.set(xlabel="side, px", ylabel=label)
    for axis in axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--quick", action="store_true", help="smaller pictures and fewer repeats, in two minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw steps and growth")
    args = parser.parse_args(argv)
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"unknown row {', '.join(unknown)}: choose from {', '.join(ROWS)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Print the rows that the command line names, each as soon as it is measured."""
    args = parse_args(argv)
    print("\n".join(f"{name}: {text}" for name, text in machine().items()))
    columns = {
        "seconds": "{:.3g} s",
        "plain": "{:.3g} s",
        "ratio": "{:.2f}",
        "GB": "{:.2f} GB",
        "plain GB": "{:.2f} GB",
    }
    layout = "{:<19} {:<18}" + " {:>8}" * len(columns) + "  {}"
    print(layout.format("row", "setting", *columns, "").rstrip())
    rows: list[Row] = []
    for name in args.rows or ROWS:
        measure, function, size, quick_size = ROWS[name]
        for row in measure(function, quick_size if args.quick else size, args.quick):
            rows.append({"row": name} | row)
            cells = [text.format(row[key]) if row.get(key) else "" for key, text in columns.items()]
            print(layout.format(name, row.get("setting", ""), *cells, row.get("note", "")).rstrip(), flush=True)
    if args.json:
        args.json.write_text(json.dumps(machine() | {"quick": args.quick, "rows": rows}, indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
