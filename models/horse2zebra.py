"""Make models/horse2zebra.pth from nothing: horses into zebras, and back. 13 hours of one CPU core.

    python models/horse2zebra.py data/horse2zebra -o models/horse2zebra.pth

This is CycleGAN (Zhu et al. 2017) with other discriminators. To D_X and D_Y of the paper, faint
pictures and stripes that are left on a horse look nearly real. E_X and E_Y, in their place, see
feature maps of VGG-19, which was trained on ImageNet and can tell a horse from a zebra.

100 pictures of each training set are held out before the first step. What is made of them is
compared with them every thousand steps, for a table beside the output. Nothing is chosen by it,
and the test pictures are not looked at.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
from cyclegan import Generator, discriminator_loss, generator_losses, translate


class Stage(NamedTuple):
    steps: int
    sides: tuple[int, ...]  # the shorter sides that pictures are scaled to, in turns
    lambda_cycle: float
    lambda_identity: float  # relative to lambda_cycle


STAGES = (
    Stage(10_000, (143, 192), 2.5, 0.2),  # whole animals, on which stripes come soonest
    Stage(18_000, (192, 264), 2.5, 1.0),  # closer views; grass and trees are to stay as they are
    Stage(12_000, (192, 264), 0.7, 2.5),  # the last stripes of zebras go, while the rate falls to 0
)
SCHEDULE = [stage for stage in STAGES for _ in range(stage.steps)]
CROP, LOAD_SIZE = 128, 192  # px; translate scales pictures to the second
WIDTH, BLOCKS = 32, 6  # a sixth of the paper's weights
LAYERS_Y = ["relu1_2", "relu2_2", "relu3_3", "relu4_3"]
LAYERS_X = [*LAYERS_Y, "relu5_2"]  # a deeper layer finds the wide stripes of zebras that are close
HELD_OUT, STORED, SHOWN = 100, 100, 8  # pictures: not trained on; kept for E; shown to E in a step
SAVE_EVERY, LOG_EVERY = 100, 1000  # steps


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
        return [nnf.conv2d(f, mix.to(f)) for f, mix in zip(maps, self.buffers(), strict=True)]

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
        """Return the newest one and seven others, (8, 64, h, w) of each layer."""
        chosen = torch.randint(len(self.seen), (SHOWN - 1,), generator=random).tolist()
        shown = [self.seen[k] for k in (-1, *chosen)]
        return [torch.cat(layer) for layer in zip(*shown, strict=True)]

    def state_dict(self) -> dict[str, list[Tensor]]:
        return {"pictures": self.pictures}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        for picture in state["pictures"]:
            self.add(picture)


class Trainer:
    """G, F, E_X, E_Y and all else that a step changes."""

    def __init__(self, real_X: Tensor, real_Y: Tensor, precision: torch.dtype) -> None:
        torch.manual_seed(0)
        device = real_X.device
        self.precision = precision
        vgg = common.VGG(LAYERS_X, "vgg19", precision=precision).to(device)
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
        with common.autocast(x.device, self.precision):
            for store, picture in zip(self.stores(), (x, F_y, y, G_x), strict=True):
                store.add(picture)
            real_X, made_X, real_Y, made_Y = (store.draw(random) for store in self.stores())
            losses["E_X"] = discriminator_loss(self.E_X.judge, real_X, made_X)
            losses["E_Y"] = discriminator_loss(self.E_Y.judge, real_Y, made_Y)
        self.optimizer_E.zero_grad()
        (losses["E_X"] + losses["E_Y"]).backward()
        for E in (self.E_X, self.E_Y):  # a few steep steps would spoil it for long
            nn.utils.clip_grad_norm_(E.parameters(), 1)
        self.optimizer_E.step()
        return {name: loss.detach() for name, loss in losses.items()}

    def stores(self) -> list[Store]:
        return [self.real_X, self.made_X, self.real_Y, self.made_Y]


@dataclass
class Pictures(Dataset):
    """Item i is a crop of a horse and one of a zebra, (3, 128, 128) each, for step i."""

    domains: list[list[Path]]

    def __getitem__(self, i: int) -> list[Tensor]:
        sides = SCHEDULE[i].sides
        return common.Crops(self.domains, sides[i % len(sides)], CROP, seed=0, flip=True)[i]


# --- What is made of held-out pictures ------------------------------------------------------------


@torch.no_grad()
def features(vgg: common.VGG, pictures: list[Tensor]) -> Tensor:
    """Return the mean and the spread over the positions of each map of VGG, at 128 px: (n, d)."""
    rows = []
    for picture in pictures:
        small = to_tensor(common.to_pil(picture).resize((128, 128), 1)).unsqueeze(0)  # 1: Lanczos
        maps = [f.flatten(2)[0] for f in vgg(small.to(picture.device)).values()]  # (C, h*w)
        rows.append(torch.cat([torch.cat([f.mean(1), f.std(1)]) for f in maps]))
    return torch.stack(rows).double()


def kid(made: Tensor, real: Tensor) -> float:
    """Estimate the kernel distance of features (n, d) (Bińkowski et al. 2018): 0 for equal kinds.

    Its unit is the spread of the real ones, so that it cannot be compared with published figures.
    """
    made, real = (f / (3 * real.std(0).mean()) for f in (made, real))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> Tensor:
        k = kernel(a, a)
        return (k.sum() - k.trace()) / (len(a) * (len(a) - 1))

    return float(within(made) + within(real) - 2 * kernel(made, real).mean())


def match_colors(network: Generator, sources: list[Tensor], targets: list[Tensor]) -> None:
    """Give what a network makes the mean and the covariance of the colours of `targets`.

    It changes the last convolution alone, by the linear Monge map of gatys.match_color.
    """

    def colors(images: list[Tensor]) -> Tensor:
        return torch.cat([image[..., ::4, ::4].flatten(2)[0] for image in images], 1).double().cpu()

    def power(C: Tensor, exponent: float) -> Tensor:
        values, vectors = torch.linalg.eigh(C)
        return vectors * values.clamp_min(1e-8) ** exponent @ vectors.T

    real = colors(targets)  # (3, n)
    last = network.model[-2]
    for _ in range(3):  # as a tanh follows, once is not enough
        made = colors([translate(network, image, "float32") for image in sources])
        root, inverse = power(torch.cov(made), 0.5), power(torch.cov(made), -0.5)
        A = inverse @ power(root @ torch.cov(real) @ root, 0.5) @ inverse
        b = real.mean(1) - A @ made.mean(1)  # in 0 … 1; the network's range is -1 … 1
        bias = A @ last.bias.detach().double().cpu() + 2 * b + A.sum(1) - 1
        last.weight.data = torch.einsum("dc,cijk->dijk", A.to(last.weight), last.weight.data)
        last.bias.data = bias.to(last.bias)


# --- The program ----------------------------------------------------------------------------------


def load(paths: list[Path], device: torch.device) -> list[Tensor]:
    return [common.load_image(path, shorter=LOAD_SIZE).to(device) for path in paths]


def save_log(trainer: Trainer, x: list[Tensor], y: list[Tensor], beside: str, step: int) -> None:
    """Add a line to the table, and write a sheet, of held-out pictures x and y."""
    table = Path(f"{beside}_kid.csv")
    text = table.read_text() if table.exists() else "step,horses to zebras,zebras to horses\n"
    if f"\n{step}," in text:  # a training that goes on has written it before
        return
    vgg = common.VGG(["relu4_1", "relu5_1"], "vgg19", pooling="avg").to(x[0].device)
    G_x = [translate(trainer.G_ema.module, picture) for picture in x]
    F_y = [translate(trainer.F_ema.module, picture) for picture in y]
    kid_G = kid(features(vgg, G_x), features(vgg, y))
    kid_F = kid(features(vgg, F_y), features(vgg, x))
    common.write_file(f"{text}{step},{kid_G:.4f},{kid_F:.4f}\n".encode(), table)
    columns = {"x": x, "G(x)": G_x, "y": y, "F(y)": F_y}
    for name, column in columns.items():
        columns[name] = torch.cat([picture[..., :LOAD_SIZE, :LOAD_SIZE] for picture in column[:12]])
    common.save_sheet(columns, Path(f"{beside}_{step:06}.jpg"), {})


def train(args: argparse.Namespace, beside: str) -> dict[str, Generator]:
    """Train from nothing, or from the checkpoint, to the end; return G and F."""
    device = common.pick_device()
    precision = common.pick_precision("auto", device)
    domains, held_out = [], []
    for part in ("trainA", "trainB"):
        files = common.find_images(args.data / part)
        apart = files[:: len(files) // HELD_OUT][:HELD_OUT]
        held_out.append(load(apart, device))
        domains.append([path for path in files if path not in apart])
    squares = [torch.cat([p[..., :CROP, :CROP] for p in part[:8]]) for part in held_out]
    trainer = Trainer(*squares, precision)

    def sample(step: int) -> None:
        if step % LOG_EVERY == 0:
            save_log(trainer, *held_out, beside, step)

    parts = {name: part for name, part in vars(trainer).items() if hasattr(part, "state_dict")}
    checkpoint = Path(f"{beside}_checkpoint.pth")
    steps = len(SCHEDULE)
    run = common.Training(args, device, precision, checkpoint, steps, parts, sample, record={})
    for x, y in run.batches(Pictures(domains)):
        run.log(trainer.step(run.step, x, y))

    networks = {"G": trainer.G_ema.module, "F": trainer.F_ema.module}
    horses, zebras = (load(files[::7], device) for files in domains)
    match_colors(networks["G"], horses, zebras)
    match_colors(networks["F"], zebras, horses)
    return networks


def main(argv: list[str] | None = None) -> None:
    """Run the command line; write the file that ships."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="a folder with trainA, horses, and trainB, zebras")
    parser.add_argument("-o", "--output", type=Path, default=Path("models/horse2zebra.pth"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, if any")
    defaults = {"batch_size": 1, "workers": 0, "checkpoint_every": SAVE_EVERY}
    defaults |= {"load_size": LOAD_SIZE, "keep_every": None}
    args = parser.parse_args(argv, argparse.Namespace(**defaults))
    networks = train(args, str(args.output.with_suffix("")))
    state = {"args": common.plain(args), "step": len(SCHEDULE)}
    state["command"] = shlex.join(["python", "models/horse2zebra.py", *argv])
    for name, network in networks.items():
        state[name] = {key: value.half() for key, value in network.state_dict().items()}
    common.save_checkpoint(state, args.output)
    print(args.output)


if __name__ == "__main__":
    with common.one_line_errors():
        main()
