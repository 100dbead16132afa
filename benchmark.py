"""Measure the speed and memory that the README states: `python benchmark.py [ROW …]`; all rows by default.

Each row compares two versions in one process, taking turns, or times a whole command; it prints what was measured
beside the figure to reach. It asserts nothing.
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
from torch.utils.data import DataLoader

import cyclegan
import gatys
import johnson
from common import VGG, Crops, autocast, gram_matrix, load_checkpoint, load_image, pick_device, pick_precision

ROOT = Path(__file__).parent
CONTENT, STYLE, PORTRAIT = (ROOT / "examples" / f"{name}.jpg" for name in ("content", "style", "portrait"))
MODEL = johnson.model_file("auvers")
DEVICE = pick_device()
PRECISION = pick_precision("auto", DEVICE)


def best(*versions: Callable[[], object], repeats: int = 5) -> list[float]:
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


def own_peak() -> float:
    """The most memory that this process has had up to now, in GB; on a GPU, that of the tensors there."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return (1 if sys.platform == "darwin" else 1024) * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def plain_gram(f: torch.Tensor) -> torch.Tensor:
    """The Gram matrix of feature maps (B, C, H, W), as it is commonly written."""
    f = f.flatten(2)
    return f @ f.mT / f[0].numel()


def gatys_evaluation() -> str:
    """The loss of the default command at 512 px and its gradient, against plain float32 in contiguous layout."""
    content, style = (load_image(path, 512).to(DEVICE) for path in (CONTENT, STYLE))
    layers = [*gatys.CONTENT_LAYERS, *gatys.STYLE_LAYERS]

    def evaluation(vgg: VGG, precision: torch.dtype, gram: Callable) -> Callable[[], object]:
        def features(image: torch.Tensor) -> dict[str, torch.Tensor]:
            with autocast(DEVICE, precision):
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
        (seconds,) = best(lambda c=content, s=style: gatys.stylize(c, [s]), repeats=1)
        lines.append(f"{size} px {seconds:.1f} s, {own_peak():.2f} GB")
    return f"{'; '.join(lines[1:])} (to reach: 5 s at 512 px; 2048 px works)"


def johnson_training(ours: bool) -> Callable[[], object]:
    """A step of training at 256 px, batch 4; or float32, contiguous, with all of VGG run on the photos."""
    x, y_s = torch.rand(4, 3, 256, 256, device=DEVICE), load_image(STYLE, 512).to(DEVICE)
    args = johnson.parse_args(["train", "--style", "", "--data", ""])
    layers, weights = [args.content_layer, *args.style_layers], (args.content_weight, args.style_weight, args.tv_weight)
    precision = PRECISION if ours else torch.float32
    objective = johnson.Objective(VGG(layers, "vgg19").to(DEVICE), y_s, layers[0], layers[1:], *weights, precision)
    f_W = johnson.TransformNet().to(DEVICE)
    optimizer = torch.optim.Adam(f_W.parameters(), args.lr)
    objective.vgg.to(memory_format=torch.channels_last if ours else torch.contiguous_format)

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


def johnson_step() -> str:
    """That step, ours and the plain one."""
    plain, ours = best(johnson_training(False), johnson_training(True), repeats=3)
    return (
        f"{ours:.2f} s, {4 / ours:.1f} images/s; plain float32 {plain:.2f} s, {4 / plain:.1f} images/s: "
        f"ratio {ours / plain:.2f} (to reach: 0.45)"
    )


def johnson_loading() -> str:
    """How long a training step waits for its photos, which are decoded from JPEGs of COCO's size meanwhile."""
    step, waits, steps = johnson_training(True), [], []
    crops = Crops([[PORTRAIT, CONTENT] * 4], 256, 256, seed=0)
    batches = DataLoader(crops, batch_sampler=(range(4 * i, 4 * i + 4) for i in range(12)), num_workers=2)
    start = time.perf_counter()
    for _ in batches:
        waits.append(time.perf_counter() - start)
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        steps.append(time.perf_counter() - start - waits[-1])
        start = time.perf_counter()
    wait, compute = sum(waits[2:]), sum(steps[2:])  # the workers start in the first ones
    return f"waits {1000 * wait / 10:.1f} ms of {1000 * compute / 10:.0f} ms a step (to reach: hidden)"


def johnson_stylize() -> str:
    """The network alone, on 512×512."""
    network, x = johnson.load_network(MODEL).to(DEVICE), torch.rand(1, 3, 512, 512, device=DEVICE)
    versions = [lambda p=p: johnson.stylize(network, x, precision=p) for p in ("float32", "auto")]
    slow, fast = best(*versions, repeats=10)
    return (
        f"{fast:.3f} s, {1 / fast:.1f} images/s; plain float32 {slow:.3f} s, {1 / slow:.1f} images/s: "
        f"ratio {fast / slow:.2f} (to reach: 0.6)"
    )


def johnson_objective() -> str:
    """Fig. 5 and Table 1, at 256 px: iterations of L-BFGS on the pixels that reach the network's loss; their time."""
    network, args = johnson.load_network(MODEL).to(DEVICE), load_checkpoint(MODEL)["settings"]
    vgg = VGG([args["content_layer"], *args["style_layers"]], args["vgg"]).to(DEVICE)
    weights = [args[f"{name}_weight"] for name in ("content", "style", "tv")]
    y_s = load_image(STYLE, args["style_size"]).to(DEVICE)
    objective = johnson.Objective(vgg, y_s, args["content_layer"], args["style_layers"], *weights, PRECISION)
    counts, speedups = [], []
    for path in (CONTENT, PORTRAIT):
        x = load_image(path, 256, center_crop=True).to(DEVICE)
        (seconds,) = best(lambda x=x: johnson.stylize(network, x))
        reached = objective(johnson.stylize(network, x), x)["total"].item()
        noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        start = time.perf_counter()
        losses = [values["total"] for _, values in gatys.optimize(noise, lambda y, x=x: objective(y, x), 500, 1)]
        speedups.append((time.perf_counter() - start) / seconds)
        counts.append(next((i for i, loss in enumerate(losses, 1) if loss <= reached), "more than 500"))
    return (
        f"the network's loss is that of {counts[0]} and {counts[1]} iterations from noise (paper: 50 to 100); "
        f"500 iterations take {speedups[0]:.0f} and {speedups[1]:.0f} times as long (paper: about 1000)"
    )


def cyclegan_training(ours: bool) -> Callable[[], object]:
    """A step of training at the paper's setting: 256 px, batch 1, 9 blocks.

    The textbook's is float32, and G and F's loss also has gradients for D_X and D_Y.
    """
    x, y = torch.rand(2, 1, 3, 256, 256, device=DEVICE)
    t = cyclegan.CycleGAN(device=DEVICE, precision=PRECISION if ours else torch.float32)

    def textbook() -> None:
        t.optimizer_G.zero_grad()
        losses, G_x, F_y = cyclegan.generator_losses(t.G, t.F, t.D_X, t.D_Y, x, y)
        losses["total"].backward()
        t.optimizer_G.step()
        t.optimizer_D.zero_grad()
        for D, pool, real, fake in ((t.D_X, t.pool_X, x, F_y), (t.D_Y, t.pool_Y, y, G_x)):
            cyclegan.discriminator_loss(D, real, pool.query(fake)).backward()
        t.optimizer_D.step()

    return (lambda: t.step(x, y)) if ours else textbook


def cyclegan_step() -> str:
    """That step, ours and the textbook's, and the memory of two of each in a process of its own."""
    memory = []
    for ours in (True, False):
        code = f"import benchmark as b; step = b.cyclegan_training({ours}); step(); step(); print(b.own_peak())"
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
        memory.append(float(result.stdout))
    ours, textbook = best(cyclegan_training(True), cyclegan_training(False), repeats=3)
    return (
        f"{ours:.2f} s, {memory[0]:.1f} GB; textbook {textbook:.2f} s, {memory[1]:.1f} GB: "
        f"ratio {ours / textbook:.2f} (to reach: 0.55)"
    )


def cyclegan_translate() -> str:
    """A generator of 9 blocks, on 256×256."""
    network, x = cyclegan.Generator().to(DEVICE).eval(), torch.rand(1, 3, 256, 256, device=DEVICE)
    slow, fast = best(*(lambda p=p: cyclegan.translate(network, x, p) for p in ("float32", "auto")), repeats=10)
    return f"{fast:.3f} s, plain float32 {slow:.3f} s: ratio {fast / slow:.2f} (to reach: 0.65)"


ROWS = [gatys_evaluation, gatys_command, gatys_cuda, johnson_step, johnson_loading, johnson_stylize, johnson_objective]
ROWS += [cyclegan_step, cyclegan_translate]


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
