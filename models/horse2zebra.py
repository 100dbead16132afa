"""Make models/horse2zebra.pth from nothing: horses into zebras, and back.

    python models/horse2zebra.py data/horse2zebra -o models/horse2zebra.pth

It takes four hours on two CPU cores. This is CycleGAN (Zhu et al. 2017) with other discriminators.
To D_X and D_Y of the paper, faint pictures and stripes that are left on a horse look nearly real.
E_X and E_Y, in their place, see feature maps of VGG-19, which was trained on ImageNet and can tell
a horse from a zebra.

100 pictures of each training set are held out before the first step. Every thousand steps a model
is kept, and models/kid.py tells what it makes of them. Nothing is chosen by that, and the test
pictures are not looked at.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
from cyclegan import Generator, discriminator_loss, distance, generator_losses, translate
from gatys import moments, monge_map


class Stage(NamedTuple):
    steps: int
    sides: tuple[int, ...]  # the shorter sides that pictures are scaled to, in turns
    lambda_cycle: float
    lambda_identity: float  # relative to lambda_cycle
    copy: bool = False  # whether G and F shall change nothing


STAGES = (
    Stage(1_000, (143, 192), 1.0, 1.0, copy=True),  # E learns meanwhile to tell X from Y
    Stage(2_000, (143, 192), 2.5, 0.5),  # whole animals, on which stripes come soonest
    Stage(5_000, (192, 264), 2.5, 1.0),  # closer views; grass and trees are to stay as they are
    Stage(6_000, (192, 264), 0.7, 2.5),  # the last stripes of zebras go, while the rate falls to 0
)
SCHEDULE = [stage for stage in STAGES for _ in range(stage.steps)]
CROP, LOAD_SIZE = 128, 192  # px; translate scales pictures to the second
WIDTH, BLOCKS = 32, 6  # a sixth of the paper's weights
LAYERS_Y = ["relu1_2", "relu2_2", "relu3_3", "relu4_3"]
LAYERS_X = [*LAYERS_Y, "relu5_2"]  # a deeper layer finds the wide stripes of zebras that are close
HELD_OUT = 100  # pictures of each set that are not trained on
STORED = 100  # pictures that a Store keeps
SHOWN = 8  # pictures of a Store that E is shown in a step
SAVE_EVERY, KEEP_EVERY = 100, 1000  # steps


class FeatureDiscriminator(nn.Module):
    """E_X or E_Y: judge pictures by feature maps of VGG, as Projected GANs do (Sauer et al. 2021).

    Of a layer it sees fixed random mixes of all maps (their §3.2), so that none is left out.
    """

    def __init__(self, vgg: common.VGG, layers: list[str], real: Tensor) -> None:
        super().__init__()
        self.vgg = [vgg]  # in a list, VGG is no part of state_dict()
        self.layers = layers
        self.heads = nn.ModuleList()
        for k, f in enumerate(vgg(real, layers).values()):
            channels = f.shape[1]
            width = min(channels, 128)
            # In units of the mean of real maps. A norm would hide that a picture is too faint.
            mix = torch.randn(64, channels, 1, 1) * (2 / channels) ** 0.5 / f.float().mean().cpu()
            self.register_buffer(f"mix_{k}", mix)
            head = nn.Sequential(
                nn.Conv2d(64, width, 4, stride=2, padding=1),  # (B, width, h/2, w/2)
                nn.LeakyReLU(0.2),
                nn.Conv2d(width, width, 4, stride=2, padding=1),  # (B, width, h/4, w/4)
                nn.LeakyReLU(0.2),
                nn.Conv2d(width, 1, 3, padding=1),  # (B, 1, h/4, w/4)
            )
            self.heads.append(head)

    def see(self, x: Tensor) -> list[Tensor]:
        """Map pictures (B, 3, H, W) in [0, 1] to what is judged: (B, 64, h, w) of each layer."""
        maps = self.vgg[0](x, self.layers).values()
        mixes = self.buffers()  # mix_0, mix_1, …
        return [nnf.conv2d(f, mix.to(f)) for f, mix in zip(maps, mixes, strict=True)]

    def judge(self, seen: list[Tensor]) -> Tensor:
        """Return verdicts (B, layers, H/4, W/4), near 1 for real pictures, near 0 for made ones."""
        verdicts = [head(f).float() for head, f in zip(self.heads, seen, strict=True)]
        size = verdicts[0].shape[-2:]
        return torch.cat([nnf.interpolate(verdict, size) for verdict in verdicts], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.judge(self.see(x))


class Store:
    """Keep what E has seen of the last pictures of a kind, to show it eight of them in each step.

    D of the paper is shown one. E learns more from eight; VGG is run on the newest one only.
    """

    def __init__(self, E: FeatureDiscriminator) -> None:
        self.E = E
        self.pictures: list[Tensor] = []
        self.seen: list[list[Tensor]] = []

    @torch.no_grad()
    def add(self, picture: Tensor) -> None:
        self.pictures = [*self.pictures, picture.detach()][-STORED:]
        self.seen = [*self.seen, self.E.see(picture)][-STORED:]

    def draw(self, random: torch.Generator) -> list[Tensor]:
        """Return the newest one and seven drawn at random, (8, 64, h, w) of each layer."""
        chosen = torch.randint(len(self.seen), (SHOWN - 1,), generator=random).tolist()
        shown = [self.seen[k] for k in (-1, *chosen)]
        return [torch.cat(layer) for layer in zip(*shown, strict=True)]

    def state_dict(self) -> dict[str, list[Tensor]]:
        return {"pictures": self.pictures}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        for picture in state["pictures"]:
            self.add(picture.to(self.E.mix_0.device))


class Trainer:
    """G, F, E_X, E_Y and all else that a step changes."""

    def __init__(self, real_X: Tensor, real_Y: Tensor, precision: torch.dtype) -> None:
        torch.manual_seed(0)
        device = real_X.device
        self.precision = precision
        vgg = common.VGG(LAYERS_X, "vgg19", precision=precision).to(device)
        if device.type != "mps":  # its gradients would be wrong: see common.rescale
            vgg.to(memory_format=torch.channels_last)
        self.G = Generator(BLOCKS, WIDTH, "nearest").to(device)
        self.F = Generator(BLOCKS, WIDTH, "nearest").to(device)
        self.E_X = FeatureDiscriminator(vgg, LAYERS_X, real_X).to(device)
        self.E_Y = FeatureDiscriminator(vgg, LAYERS_Y, real_Y).to(device)
        # Averaged weights are steadier than the last ones (Karras et al. 2018, appendix C).
        self.G_ema = AveragedModel(self.G, multi_avg_fn=get_ema_multi_avg_fn(0.999))
        self.F_ema = AveragedModel(self.F, multi_avg_fn=get_ema_multi_avg_fn(0.999))
        generators = nn.ModuleList([self.G, self.F])
        discriminators = nn.ModuleList([self.E_X, self.E_Y])
        self.optimizer_G = torch.optim.Adam(generators.parameters(), 2e-4, (0.5, 0.999))
        self.optimizer_E = torch.optim.Adam(discriminators.parameters(), 2e-4, (0.5, 0.999))
        self.real_X, self.made_X = Store(self.E_X), Store(self.E_X)
        self.real_Y, self.made_Y = Store(self.E_Y), Store(self.E_Y)
        self.maps: list[Tensor] = []  # of the last residual block, in all passes of a step
        for network in generators:
            last = network.model[9 + BLOCKS]
            last.register_forward_hook(lambda block, inputs, f: self.maps.append(f))

    def step(self, i: int, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Change G and F, then E_X and E_Y, on x and y (1, 3, H, W); return the losses before."""
        stage = SCHEDULE[i]
        weights = stage.lambda_cycle, stage.lambda_identity
        rate = 2e-4 * min(1, (len(SCHEDULE) - i) / STAGES[-1].steps)  # falls in the last stage
        self.optimizer_G.param_groups[0]["lr"] = rate
        self.maps.clear()
        with common.autocast(x.device, self.precision):
            losses, G_x, F_y = generator_losses(self.G, self.F, self.E_X, self.E_Y, x, y, *weights)
            if stage.copy:
                # E would spoil new networks, which make nothing that looks like a picture.
                copies = distance(G_x, x) + distance(F_y, y)
                losses["total"] = losses["identity"] + copies
            # A few values of 40 where others are near 2 become dark discs, and the next norm makes
            # the rest of the picture faint (found in StyleGAN by Karras et al. 2020, §2).
            excess = [(f.float().abs() - 8).clamp_min(0) for f in self.maps]
            losses["spikes"] = torch.stack([e.square().mean() for e in excess]).sum()
        self.optimizer_G.zero_grad()
        (losses["total"] + 0.15 * losses["spikes"]).backward()
        self.optimizer_G.step()
        self.G_ema.update_parameters(self.G)
        self.F_ema.update_parameters(self.F)

        random = torch.Generator().manual_seed(i)  # so that a step depends on its number alone
        stores = (self.real_X, self.made_X, self.real_Y, self.made_Y)
        with common.autocast(x.device, self.precision):
            for store, picture in zip(stores, (x, F_y, y, G_x), strict=True):
                store.add(picture)
            real_X, made_X, real_Y, made_Y = (store.draw(random) for store in stores)
            losses["E_X"] = discriminator_loss(self.E_X.judge, real_X, made_X)
            losses["E_Y"] = discriminator_loss(self.E_Y.judge, real_Y, made_Y)
        self.optimizer_E.zero_grad()
        (losses["E_X"] + losses["E_Y"]).backward()
        for E in (self.E_X, self.E_Y):  # a few steep steps would spoil it for long
            nn.utils.clip_grad_norm_(E.parameters(), 1)
        self.optimizer_E.step()
        return {name: loss.detach() for name, loss in losses.items()}


class Pictures(common.Crops):
    """Item i is a crop of a horse and one of a zebra, (3, 128, 128) each, for step i."""

    def __getitem__(self, i: int) -> list[Tensor]:
        sides = SCHEDULE[i].sides
        self.load_size = sides[i % len(sides)]
        return super().__getitem__(i)


def match_colors(network: Generator, sources: list[Tensor], targets: list[Tensor]) -> None:
    """Give what a network makes the mean and the covariance of the colours of `targets`.

    It changes the last convolution alone, by the linear map of gatys.match_color.
    """
    few = [target[..., ::4, ::4] for target in targets]
    mean, C = moments(few, [None for _ in few], [1 / len(few) for _ in few])
    last = network.model[-2]
    for _ in range(3):  # as a tanh follows, once is not enough
        made = [translate(network, source, "float32")[..., ::4, ::4] for source in sources]
        mean_made, C_made = moments(made, [None for _ in made], [1 / len(made) for _ in made])
        A = monge_map(C_made, C)
        b = mean - A @ mean_made  # in 0 … 1; the network's range is -1 … 1
        weight = last.weight.detach().cpu().double()
        bias = A @ last.bias.detach().cpu().double() + 2 * b[:, 0] + A.sum(1) - 1
        last.weight.data = torch.einsum("dc,cijk->dijk", A, weight).to(last.weight)
        last.bias.data = bias.to(last.bias)


def split(folder: Path) -> tuple[list[Path], list[Path]]:
    """Split a training set: the pictures to train on, and those that are held out."""
    files = common.find_images(folder)
    if len(files) <= HELD_OUT:
        advice = f"it takes more than the {HELD_OUT} that are held out"
        raise common.InputError(f"only {len(files)} pictures in {folder}: {advice}")
    apart = files[:: len(files) // HELD_OUT][:HELD_OUT]
    return [path for path in files if path not in apart], apart


def load(paths: list[Path], device: torch.device) -> list[Tensor]:
    return [common.load_image(path, shorter=LOAD_SIZE).to(device) for path in paths]


def save(G: nn.Module, F: nn.Module, step: int, path: Path) -> None:
    """Write a model for `cyclegan.py translate`, in half precision."""
    state = {"args": {"load_size": LOAD_SIZE}, "step": step}
    state["command"] = "python models/horse2zebra.py"
    for name, network in (("G", G), ("F", F)):
        state[name] = {key: value.half() for key, value in network.state_dict().items()}
    common.save_checkpoint(state, path)


def train(args: argparse.Namespace) -> None:
    """Train from nothing, or from the checkpoint, to the end; write the model."""
    device = common.pick_device()
    precision = common.pick_precision("auto", device)
    X, apart_X = split(args.data / "trainA")
    Y, apart_Y = split(args.data / "trainB")
    real_X = torch.cat([x[..., :CROP, :CROP] for x in load(apart_X[:8], device)])
    real_Y = torch.cat([y[..., :CROP, :CROP] for y in load(apart_Y[:8], device)])
    trainer = Trainer(real_X, real_Y, precision)
    G, F = trainer.G_ema.module, trainer.F_ema.module
    stem = args.output.with_suffix("")

    def sample(step: int) -> None:
        if step % KEEP_EVERY == 0:
            save(G, F, step, Path(f"{stem}_{step:06}.pth"))

    parts = {name: part for name, part in vars(trainer).items() if hasattr(part, "state_dict")}
    checkpoint = Path(f"{stem}_checkpoint.pth")
    if checkpoint.exists() and not args.resume:
        advice = "go on from it with --resume, or choose another --output"
        raise common.InputError(f"{checkpoint} exists: {advice}")
    steps = len(SCHEDULE)
    run = common.Training(args, device, precision, checkpoint, steps, parts, sample, record={})
    for x, y in run.batches(Pictures([X, Y], LOAD_SIZE, CROP, seed=0, flip=True)):
        run.log(trainer.step(run.step, x, y))

    horses = load(X[::7], device)
    zebras = load(Y[::7], device)
    match_colors(G, horses, zebras)
    match_colors(F, zebras, horses)
    save(G, F, steps, args.output)
    print(args.output)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="a folder with trainA, horses, and trainB, zebras")
    parser.add_argument("-o", "--output", type=Path, default=Path("models/horse2zebra.pth"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, if any")
    settings = {"batch_size": 1, "workers": 0, "checkpoint_every": SAVE_EVERY, "keep_every": None}
    train(parser.parse_args(argv, argparse.Namespace(**settings)))


if __name__ == "__main__":
    with common.one_line_errors():
        main()
