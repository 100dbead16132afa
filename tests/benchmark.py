"""Measure what the docs state: `python tests/benchmark.py [--quick] [ROW …]`, by default all.

A row has the time and memory of a step, and the time of the same step as commonly written, in
float32. Others say how good the results are.
"""

import argparse
import math
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(ROOT := Path(__file__).resolve().parent.parent))

import common
import cyclegan
import gatys
import johnson
from common import VGG, gram_matrix, load_image, rescale, resize

DEVICE = common.pick_device()
PRECISION = common.pick_precision("auto", DEVICE)


def example(name, size, **options):
    return load_image(ROOT / "examples" / f"{name}.jpg", size, **options).to(DEVICE)


# --- Time and memory: each returns two functions, a step of this code and a plain one -------------


def plain_gram(f):
    return f.flatten(2) @ f.flatten(2).mT / f[0].numel()


def plain_loss(F, P, G, content_layers, style_layers):
    """Compute a loss as it is commonly written, of the maps F of x, P of the photo."""
    content = sum((F[layer] - P[layer]).square().mean() for layer in content_layers)
    style = sum((plain_gram(F[layer]) - G[layer]).square().sum() for layer in style_layers)
    return content + style


def gatys_evaluation(size):
    """Compute the losses of a coarser scale and their gradient."""
    content, style = example("content", size), example("style", size)
    args = gatys.settings(content, [style])
    network = rescale(gatys.network(DEVICE, args), [content, style])
    objective = gatys.make_objective(network, content, [style], args.style_layers, args)
    vgg = VGG(network.layers, "vgg19", pooling="avg").to(DEVICE)
    with torch.no_grad():
        P, G = vgg(content), {layer: plain_gram(f) for layer, f in vgg(style).items()}

    def ours():
        objective(content.clone().requires_grad_())["total"].backward()

    def plain():
        F = vgg(content.clone().requires_grad_())
        plain_loss(F, P, G, args.content_layers, args.style_layers).backward()

    return ours, plain


def johnson_step(size):
    """Train on a batch of 4. Plainly, all of VGG is run on the photos, too."""
    x, y_s = torch.rand(4, 3, size, size, device=DEVICE), example("style", 512)
    f_W = johnson.TransformNet().to(DEVICE)
    args = johnson.parse_args(["train", "--style", "", "--data", ""])
    optimizer = torch.optim.Adam(f_W.parameters())
    layers = [args.content_layer, *args.style_layers]
    phi = VGG(layers, "vgg19", precision=PRECISION).to(DEVICE)
    objective = johnson.Objective(phi, y_s, args)
    vgg = VGG(layers, "vgg19").to(DEVICE)

    def plain():
        loss = plain_loss(vgg(f_W(x)), vgg(x), objective.G_s, layers[:1], layers[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return partial(johnson.step, f_W, objective, optimizer, x), plain


def johnson_stylize(size):
    f_W = johnson.load_network(johnson.model_file("auvers")).to(DEVICE)
    ours = partial(johnson.stylize, f_W, torch.rand(1, 3, size, size, device=DEVICE))
    return ours, partial(ours, precision="float32")


def cyclegan_step(size):
    """Train on a batch of 1, with 9 blocks."""
    x, y = torch.rand(2, 1, 3, size, size, device=DEVICE)
    args = cyclegan.parse_args(["train", "", ""])
    ours = cyclegan.CycleGAN(args, DEVICE, PRECISION)
    plain = cyclegan.CycleGAN(args, DEVICE, torch.float32)
    return partial(ours.step, x, y), partial(plain.step, x, y)


def cyclegan_translate(size):
    G = cyclegan.Generator().to(DEVICE).eval()
    ours = partial(cyclegan.translate, G, torch.rand(1, 3, size, size, device=DEVICE))
    return ours, partial(ours, precision="float32")


def best(*steps, repeats=3):
    """Measure the shortest time of each step in seconds; the steps take turns."""
    times = [math.inf] * len(steps)
    waits = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}
    for i in [*range(len(steps))] * (repeats + 1):  # the first round warms up
        start = time.perf_counter()
        steps[i]()
        waits.get(DEVICE.type, lambda: None)()
        times[i] = min(times[i], time.perf_counter() - start)
    return times


def peak():
    """Measure the most memory that this process has had, in GB; on a GPU, that of tensors there."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")  # of Linux
    if not status.exists():
        return math.nan
    return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0]) / 1e9


def measure(name, size, repeats):
    """Print a row. The memory is that of a process of its own."""
    step = f"b.STEPS['{name}'][0]({size})[0]"
    code = f"import benchmark as b; b.best({step}, repeats=0); print(b.peak())"
    command = [sys.executable, "-c", code]
    memory = float(subprocess.check_output(command, cwd=Path(__file__).parent))
    ours, plain = best(*STEPS[name][0](size), repeats=repeats)
    text = f"{ours:>8.3f} s {memory:>6.2f} GB   plainly {plain:>7.3f} s: × {ours / plain:.2f}"
    print(f"{name:<19} {size:>4} px {text}", flush=True)


# --- How good the results are ---------------------------------------------------------------------


@torch.no_grad()
def style_left(made, photo, painting, side):
    """Return the share of the photo's style distance that is left, at a longer side of `side` px.

    It is the mean over the layers of E_l = ¼ Σ (G − A)² of the picture, divided by that of the
    photo. VGG's unit is its mean activation over the photo and the painting.
    """
    images = [resize(image, side / max(image.shape)) for image in (made, photo, painting)]
    vgg = VGG(gatys.STYLE_LAYERS, "vgg19", pooling="avg").to(DEVICE)
    vgg = rescale(vgg, images[1:])
    G, P, A = ([gram_matrix(f) for f in vgg(image).values()] for image in images)
    E = [gatys.style_loss(g, a) / gatys.style_loss(p, a) for g, p, a in zip(G, P, A, strict=True)]
    return torch.stack(E).mean().item()


def gatys_style(size):
    """Print the share of the style distance that the default command leaves, at three sizes."""
    photo, painting = example("content", size), example("style", size)
    made = gatys.stylize(photo, [painting])
    left = [f"{style_left(made, photo, painting, side):.3f} at {side}" for side in (128, 256, 384)]
    print(f"gatys-style         {size:>4} px  of the style distance is left: {', '.join(left)} px")


def johnson_claims(size):
    """Print the L-BFGS iterations from noise to the loss of one pass (Fig. 5, Table 1)."""
    x = example("content", size, center_crop=True)
    args = gatys.parse_args(["", "", "--init=noise", "--lbfgs-iters=1"])
    for style in johnson.STYLES:
        file = johnson.model_file(style)
        f_W = johnson.load_network(file).to(DEVICE)
        saved = argparse.Namespace(**common.load_checkpoint(file)["args"])
        layers = [saved.content_layer, *saved.style_layers]
        vgg = VGG(layers, "vgg19", precision=PRECISION).to(DEVICE)
        painting = example("style" if style == "auvers" else style, saved.style_size)
        objective = partial(johnson.Objective(vgg, painting, saved), y_c=x)
        [seconds] = best(partial(johnson.stylize, f_W, x))
        reached = objective(johnson.stylize(f_W, x))["total"].item()
        start = time.perf_counter()
        noise = torch.rand(x.shape).to(DEVICE)
        for n, (_, losses) in enumerate(gatys.optimize(noise, objective, 500, args), 1):
            if losses["total"] <= reached or n == 500:
                break
        times = 500 * (time.perf_counter() - start) / n / seconds
        text = f"{style}: {n} iterations reach its loss (paper: 50–100), "
        text += f"500 take {times:.0f} × (about 1000)"
        print(f"johnson-claims      {size:>4} px {seconds:>8.3f} s  {text}", flush=True)


STEPS = {  # what is measured, the sizes, and that of --quick
    "gatys-evaluation": (gatys_evaluation, [512, 1024], 256),
    "johnson-step": (johnson_step, [256], 64),
    "johnson-stylize": (johnson_stylize, [512, 1024, 2048], 256),
    "cyclegan-step": (cyclegan_step, [256], 64),
    "cyclegan-translate": (cyclegan_translate, [256, 512, 1024], 128),
}
RESULTS = {"gatys-style": (gatys_style, 512, 256), "johnson-claims": (johnson_claims, 256, 128)}

if __name__ == "__main__":
    rows = [*STEPS, *RESULTS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", default=rows, help=", ".join(rows))
    parser.add_argument("--quick", action="store_true", help="smaller pictures, in two minutes")
    args = parser.parse_args()
    print(f"{DEVICE}, {torch.get_num_threads()} threads, {PRECISION}, torch {torch.__version__}")
    for name in args.rows:
        if name in RESULTS:
            show, size, small = RESULTS[name]
            show(small if args.quick else size)
            continue
        _, sizes, small = STEPS[name]
        for size in [small] if args.quick else sizes:
            measure(name, size, repeats=1 if args.quick else 3)
