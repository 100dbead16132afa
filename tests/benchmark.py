"""Measure what the README states: `python tests/benchmark.py [--quick] [ROW …]`, by default all.

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

import cyclegan
import gatys
import johnson
from common import (
    VGG,
    find_images,
    gram_matrix,
    load_checkpoint,
    load_image,
    pick_device,
    pick_precision,
    rescale,
    resize,
)
from models.horse2zebra import features, kid

PRECISION = pick_precision("auto", DEVICE := pick_device())


def example(name, size, **options):
    return load_image(ROOT / "examples" / f"{name}.jpg", size, **options).to(DEVICE)


def plain_gram(f):
    return f.flatten(2) @ f.flatten(2).mT / f[0].numel()


def plain_loss(F, P, G, content_layers, style_layers):
    """Compute a loss as it is commonly written, of the maps F of x, P of the photo."""
    content = sum((F[layer] - P[layer]).square().mean() for layer in content_layers)
    style = sum((plain_gram(F[layer]) - G[layer]).square().sum() for layer in style_layers)
    return content + style


def gatys_evaluation(size):
    """Return functions that compute losses of a coarser scale and their gradient, and plainly."""
    content, style = example("content", size), example("style", size)
    args = gatys.settings(content, [style])
    network = rescale(gatys.network(DEVICE, args), [content, style])
    objective = gatys.make_objective(network, content, [style], args.style_layers, args)
    vgg = VGG(network.layers, "vgg19", pooling="avg").to(DEVICE)
    with torch.no_grad():
        P, G = vgg(content), {layer: plain_gram(f) for layer, f in vgg(style).items()}

    def plain():
        F = vgg(content.clone().requires_grad_())
        plain_loss(F, P, G, args.content_layers, args.style_layers).backward()

    return lambda: objective(content.clone().requires_grad_())["total"].backward(), plain


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


def johnson_step(size):
    """Return functions that train on a batch of 4; plainly, all of VGG is run on the photos too."""
    x, y_s = torch.rand(4, 3, size, size, device=DEVICE), example("style", 512)
    f_W = johnson.TransformNet().to(DEVICE)
    args = johnson.parse_args(["train", "--style", "", "--data", ""])
    optimizer = torch.optim.Adam(f_W.parameters())
    layers = [args.content_layer, *args.style_layers]
    phi = VGG(layers, "vgg19", precision=PRECISION).to(DEVICE)
    objective = johnson.Objective(phi, y_s, args)
    vgg = VGG(layers, "vgg19").to(DEVICE, memory_format=torch.contiguous_format)

    def plain():
        loss = plain_loss(vgg(f_W(x)), vgg(x), objective.G_s, layers[:1], layers[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return lambda: johnson.step(f_W, objective, optimizer, x), plain


def johnson_stylize(size):
    f_W = johnson.load_network(johnson.model_file("auvers")).to(DEVICE)
    x = torch.rand(1, 3, size, size, device=DEVICE)
    return lambda: johnson.stylize(f_W, x), lambda: johnson.stylize(f_W, x, precision="float32")


def cyclegan_step(size):
    """Return functions that train on a batch of 1, with 9 blocks; plainly, in float32."""
    x, y = torch.rand(2, 1, 3, size, size, device=DEVICE)
    args = cyclegan.parse_args(["train", "", ""])
    ours = cyclegan.CycleGAN(args, DEVICE, PRECISION)
    plain = cyclegan.CycleGAN(args, DEVICE, torch.float32)
    return lambda: ours.step(x, y), lambda: plain.step(x, y)


def cyclegan_translate(size):
    G, x = cyclegan.Generator().to(DEVICE).eval(), torch.rand(1, 3, size, size, device=DEVICE)
    return lambda: cyclegan.translate(G, x), lambda: cyclegan.translate(G, x, precision="float32")


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


def measure(name, sizes, repeats):
    """Print a row for each size. The memory is that of a process of its own."""
    before = None
    for size in sizes:
        step = f"b.ROWS['{name}'][0]({size})[0]"
        code = f"import benchmark as b; b.best({step}, repeats=0); print(b.peak())"
        command, folder = [sys.executable, "-c", code], Path(__file__).parent
        alone = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if alone.returncode:
            return print(f"{name:<19} {size:>4} px  does not fit into memory")
        ours, plain = best(*ROWS[name][0](size), repeats=repeats)
        text = f"{ours:>8.3f} s {float(alone.stdout):>6.2f} GB   plainly {plain:>7.3f} s"
        text += f": × {ours / plain:.2f}"
        if before:
            text += f"  time ∝ side^{math.log(ours / before[0], size / before[1]):.1f}"
        print(f"{name:<19} {size:>4} px {text}", flush=True)
        before = ours, size


@torch.no_grad()
def horse2zebra_kid(size):
    """Print how far translated and untranslated test pictures are from real ones, by KID."""
    data = Path("data/horse2zebra")
    if not data.is_dir():
        advice = "python cyclegan.py train horse2zebra --max-steps 1"
        return print(f"horse2zebra-kid     needs data/horse2zebra: {advice}")
    vgg = VGG(["relu4_1", "relu5_1"], "vgg19", pooling="avg").to(DEVICE)
    images = {}
    for part in ("testA", "testB"):
        images[part] = [load_image(path, shorter=size) for path in find_images(data / part)]
    for direction, source, target in (("x2y", "testA", "testB"), ("y2x", "testB", "testA")):
        G = cyclegan.load_generator(cyclegan.model_file("horse2zebra"), direction)[0].to(DEVICE)
        real = features(vgg, images[target])
        made = [cyclegan.translate(G, x.to(DEVICE)) for x in images[source]]
        after, before = (kid(features(vgg, x), real) for x in (made, images[source]))
        text = f"KID {after:.2f}, untranslated {before:.2f}"
        print(f"horse2zebra-kid     {size:>4} px {direction}: {text}", flush=True)


def johnson_claims(size):
    """Print the L-BFGS iterations from noise to the loss of one pass (Fig. 5, Table 1)."""
    x = example("content", size, center_crop=True)
    args = gatys.parse_args(["", "", "--init=noise", "--lbfgs-iters=1"])
    for style in johnson.STYLES:
        f_W = johnson.load_network(johnson.model_file(style)).to(DEVICE)
        saved = argparse.Namespace(**load_checkpoint(johnson.model_file(style))["args"])
        layers = [saved.content_layer, *saved.style_layers]
        vgg = VGG(layers, "vgg19", precision=PRECISION).to(DEVICE)
        painting = example("style" if style == "auvers" else style, saved.style_size)
        objective = partial(johnson.Objective(vgg, painting, saved), x=x)
        (seconds,), y_hat = best(lambda f_W=f_W: johnson.stylize(f_W, x)), johnson.stylize(f_W, x)
        reached, start = objective(y_hat)["total"].item(), time.perf_counter()
        noise = torch.rand(x.shape).to(DEVICE)
        for n, (_, losses) in enumerate(gatys.optimize(noise, objective, 500, args), 1):
            if losses["total"] <= reached or n == 500:
                break
        times = 500 * (time.perf_counter() - start) / n / seconds
        text = f"{style}: {n} iterations reach its loss (paper: 50–100), "
        text += f"500 take {times:.0f} × (about 1000)"
        print(f"johnson-claims      {size:>4} px {seconds:>8.3f} s  {text}", flush=True)


ROWS = {  # what is measured, the sizes, and that of --quick
    "gatys-evaluation": (gatys_evaluation, [512, 1024], 256),
    "gatys-style": (gatys_style, [512], 256),
    "johnson-step": (johnson_step, [256], 64),
    "johnson-stylize": (johnson_stylize, [512, 1024, 2048], 256),
    "cyclegan-step": (cyclegan_step, [256], 64),
    "cyclegan-translate": (cyclegan_translate, [256, 512, 1024], 128),
    "johnson-claims": (johnson_claims, [256], 128),
    "horse2zebra-kid": (horse2zebra_kid, [192], 192),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", default=ROWS, help=", ".join(ROWS))
    parser.add_argument("--quick", action="store_true", help="smaller pictures, in two minutes")
    args = parser.parse_args()
    print(f"{DEVICE}, {torch.get_num_threads()} threads, {PRECISION}, torch {torch.__version__}")
    for name in args.rows:
        sizes = ROWS[name][2:] if args.quick else ROWS[name][1]
        alone = ROWS[name][0] in (gatys_style, johnson_claims, horse2zebra_kid)
        ROWS[name][0](*sizes) if alone else measure(name, sizes, repeats=1 if args.quick else 3)
