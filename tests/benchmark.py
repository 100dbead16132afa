"""Measure what the README states: `python tests/benchmark.py [--quick] [ROW …]`, all rows by default.

A row has the time and memory of a step, and the time of the same step as it is commonly written, in float32.
"""

import argparse
import math
import subprocess
import sys
import time
from pathlib import Path

import torch
from torchvision.transforms.functional import to_tensor

sys.path.insert(0, str(ROOT := Path(__file__).resolve().parent.parent))

import cyclegan
import gatys
import johnson
from common import VGG, find_images, load_checkpoint, load_image, pick_device, pick_precision, rescale, to_pil

PRECISION = pick_precision("auto", DEVICE := pick_device())


def example(name, size, **options):
    return load_image(ROOT / "examples" / f"{name}.jpg", size, **options).to(DEVICE)


def plain_gram(f):
    return f.flatten(2) @ f.flatten(2).mT / f[0].numel()  # as it is commonly written


def gatys_evaluation(size):
    """Return functions that compute the loss of the default command and its gradient: as it is here, and plainly."""
    content, style = example("content", size), example("style", size)
    args = gatys.settings(content, [style])
    options = [*args.content_layers, *args.style_layers], "vgg19", "auto", "avg"
    objective = gatys.Objective(rescale(VGG(*options, PRECISION).to(DEVICE), [content, style]), content, [style], args)
    vgg = VGG(*options).to(DEVICE, memory_format=torch.contiguous_format)
    with torch.no_grad():
        P, S = vgg(content), vgg(style)

    def plain():
        F = vgg(content.clone().requires_grad_())
        style = sum((plain_gram(F[layer]) - plain_gram(S[layer])).square().sum() for layer in args.style_layers)
        (style + sum((F[layer] - P[layer]).square().mean() for layer in args.content_layers)).backward()

    return lambda: objective(content.clone().requires_grad_())["total"].backward(), plain


def johnson_step(size):
    """Return functions that train on a batch of 4; plainly, all of VGG is run on the photos too."""
    x, y_s, f_W = torch.rand(4, 3, size, size, device=DEVICE), example("style", 512), johnson.TransformNet().to(DEVICE)
    args, optimizer = johnson.parse_args(["train", "--style", "", "--data", ""]), torch.optim.Adam(f_W.parameters())
    layers = [args.content_layer, *args.style_layers]
    objective = johnson.Objective(VGG(layers, "vgg19", precision=PRECISION).to(DEVICE), y_s, args)
    vgg = VGG(layers, "vgg19").to(DEVICE, memory_format=torch.contiguous_format)

    def plain():
        f, target = vgg(f_W(x)), vgg(x)
        style = sum((plain_gram(f[layer]) - objective.G_s[layer]).square().sum() for layer in layers[1:])
        optimizer.zero_grad()
        (style + (f[layers[0]] - target[layers[0]]).square().mean()).backward()
        optimizer.step()

    return lambda: johnson.step(f_W, objective, optimizer, x), plain


def johnson_stylize(size):
    f_W, x = johnson.load_network(johnson.model_file("auvers")).to(DEVICE), torch.rand(1, 3, size, size, device=DEVICE)
    return lambda: johnson.stylize(f_W, x), lambda: johnson.stylize(f_W, x, precision="float32")


def cyclegan_step(size):
    x, y = torch.rand(2, 1, 3, size, size, device=DEVICE)  # batch 1, 9 blocks; plainly it is the same in float32
    args = cyclegan.parse_args(["train", "", ""])
    ours, plain = (cyclegan.CycleGAN(args, DEVICE, precision) for precision in (PRECISION, torch.float32))
    return lambda: ours.step(x, y), lambda: plain.step(x, y)


def cyclegan_translate(size):
    G, x = cyclegan.Generator().to(DEVICE).eval(), torch.rand(1, 3, size, size, device=DEVICE)
    return lambda: cyclegan.translate(G, x), lambda: cyclegan.translate(G, x, precision="float32")


def best(*steps, repeats=3):
    """Measure the shortest time of each step in seconds; the steps take turns."""
    times = [math.inf] * len(steps)
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(DEVICE.type, lambda: None)
    for i in [*range(len(steps))] * (repeats + 1):  # the first round warms up
        start = time.perf_counter()
        steps[i]()
        wait()
        times[i] = min(times[i], time.perf_counter() - start)
    return times


def peak():
    """Measure the most memory that this process has had, in GB; on a GPU, that of the tensors there."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")  # of Linux
    return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0]) / 1e9 if status.exists() else math.nan


def measure(name, sizes, repeats):  # a row for each size; the memory is that of a process of its own
    before = None
    for size in sizes:
        code = f"import benchmark as b; b.best(b.ROWS['{name}'][0]({size})[0], repeats=0); print(b.peak())"
        alone = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
        if alone.returncode:
            return print(f"{name:<19} {size:>4} px  does not fit into memory")
        ours, plain = best(*ROWS[name][0](size), repeats=repeats)
        text = f"{ours:>8.3f} s {float(alone.stdout):>6.2f} GB   plainly {plain:>7.3f} s: × {ours / plain:.2f}"
        text += f"  time ∝ side^{math.log(ours / before[0], size / before[1]):.1f}" if before else ""
        print(f"{name:<19} {size:>4} px {text}", flush=True)
        before = ours, size


def kid(a, b):
    """Estimate the kernel distance (Bińkowski et al. 2018) of two sets of features (n, d); of equal ones it is 0."""

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    same = [(kernel(x, x).sum() - kernel(x, x).trace()) / (len(x) * (len(x) - 1)) for x in (a, b)]
    return sum(same) - 2 * kernel(a, b).mean()


@torch.no_grad()
def horse2zebra_kid(size):
    """Print how far translated test pictures are from real ones, and untranslated ones: KID on features of VGG-19."""
    data, vgg = Path("data/horse2zebra"), VGG(["relu4_1", "relu5_1"], "vgg19", pooling="avg").to(DEVICE)
    if not data.is_dir():
        return print("horse2zebra-kid     needs data/horse2zebra: python cyclegan.py train horse2zebra --max-steps 1")

    def features(images):
        """Return the mean and the spread of each filter over the positions, of pictures at 128 px."""
        small = (to_tensor(to_pil(image).resize((128, 128), 1)).unsqueeze(0) for image in images)  # 1: Lanczos
        maps = [vgg(x.to(DEVICE)).values() for x in small]
        return torch.stack([torch.cat([g(f, (2, 3))[0] for f in m for g in (torch.mean, torch.std)]) for m in maps])

    images = {
        part: [load_image(file, shorter=size) for file in find_images(data / part)] for part in ("testA", "testB")
    }
    for direction, source, target in (("x2y", "testA", "testB"), ("y2x", "testB", "testA")):
        G = cyclegan.load_generator(cyclegan.model_file("horse2zebra"), direction)[0].to(DEVICE)
        real = features(images[target]).double()
        made = [cyclegan.translate(G, x.to(DEVICE)) for x in images[source]]
        unit = 3 * real.std(0).mean()
        after, before = (kid(features(pictures).double() / unit, real / unit) for pictures in (made, images[source]))
        print(f"horse2zebra-kid     {size:>4} px {direction}: KID {after:.2f}, untranslated {before:.2f}", flush=True)


def johnson_claims(size):
    """Print the L-BFGS iterations from noise to the loss of one pass (Fig. 5), and the time of 500 (Table 1)."""
    x, args = example("content", size, center_crop=True), gatys.parse_args(["", "", "--init=noise", "--lbfgs-iters=1"])
    for style in johnson.STYLES:
        f_W = johnson.load_network(johnson.model_file(style)).to(DEVICE)
        saved = argparse.Namespace(**load_checkpoint(johnson.model_file(style))["args"])
        vgg = VGG([saved.content_layer, *saved.style_layers], "vgg19", precision=PRECISION).to(DEVICE)
        objective = johnson.Objective(vgg, example("style" if style == "auvers" else style, saved.style_size), saved)
        (seconds,), y_hat = best(lambda f_W=f_W: johnson.stylize(f_W, x)), johnson.stylize(f_W, x)
        noise, reached, start = torch.rand(x.shape).to(DEVICE), objective(y_hat, x)["total"].item(), time.perf_counter()
        for n, (_, losses) in enumerate(gatys.optimize(noise, lambda y, o=objective: o(y, x), 500, args), 1):
            if losses["total"] <= reached or n == 500:
                times = 500 * (time.perf_counter() - start) / n / seconds
                text = f"{style}: {n} iterations reach its loss (paper: 50–100), 500 take {times:.0f} × (about 1000)"
                print(f"johnson-claims      {size:>4} px {seconds:>8.3f} s  {text}", flush=True)
                break


ROWS = {  # what is measured, the sizes, and that of --quick
    "gatys-evaluation": (gatys_evaluation, [512, 1024], 256),
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
        alone = ROWS[name][0] in (johnson_claims, horse2zebra_kid)
        ROWS[name][0](*sizes) if alone else measure(name, sizes, repeats=1 if args.quick else 3)
