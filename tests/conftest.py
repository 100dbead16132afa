"""What several test files use."""

import functools
import shlex
import signal
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image

import common
import cyclegan
import gatys
import johnson

load = common._load_weights
ROOT = Path(__file__).parent.parent
CONTENT, STYLE = ROOT / "examples" / "content.jpg", ROOT / "examples" / "style.jpg"


@functools.cache
def random_weights(arch):
    """Draw He-normal weights and small biases for VGG, the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in getattr(torchvision.models, arch)().features.state_dict().items()}
    spread = {key: (2 / shape[1:].numel()) ** 0.5 if len(shape) == 4 else 0.1 for key, shape in shapes.items()}
    return arch, {key: spread[key] * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


common._load_weights = lambda arch, weights: random_weights(arch) if weights == "random" else load(arch, weights)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what runs in its background ignore it

SCRIPTS = {"gatys.py": gatys, "johnson.py": johnson, "cyclegan.py": cyclegan}
TINY = {  # what makes each command small enough for a test
    "gatys.py": """--image-size 48 --num-steps 2 --lbfgs-iters 1 --vgg-weights random --content-layers relu2_2
        --style-layers relu1_1 relu2_1 --precision float32 --device cpu""",
    "johnson.py stylize": "--precision float32 --device cpu",
    "johnson.py train": """--crop-size 16 --style-size 32 --batch-size 2 --iterations 1 --decay-iterations 0
        --workers 0 --vgg vgg16 --vgg-weights random --content-layer relu2_1 --style-layers relu1_1 relu2_1
        --precision float32 --device cpu""",
    "cyclegan.py translate": "--precision float32 --device cpu",
    "cyclegan.py train": """--crop-size 32 --width 4 --blocks 1 --max-steps 1 --workers 0 --precision float32
        --device cpu""",
}


def split(command):
    """Split a command line into its words, of which the first one or two name the command."""
    words = shlex.split(command)
    count = 1 if words[0] == "gatys.py" else 2
    return words[:count], words[count:]


def run(command, *more):
    """Run a command line of one of the scripts, made tiny unless it says otherwise."""
    (script, *sub), arguments = split(command)
    SCRIPTS[script].main([*sub, *TINY[" ".join([script, *sub])].split(), *arguments, *map(str, more)])


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    """Every test works in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fails(capsys):
    """Return a function that runs a command line, demands status 2 and one line of error, and returns that line."""

    def fails(command, *more):
        with pytest.raises(SystemExit, match="2"):
            run(command, *more)
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
        return lines[-1]

    return fails


def save_noise(*paths, size=(48, 48)):
    """Write small pictures of noise, each another one, in folders that are made."""
    for number, path in enumerate(map(Path, paths)):
        path.parent.mkdir(parents=True, exist_ok=True)
        common.to_pil(torch.rand(3, *size[::-1], generator=torch.Generator().manual_seed(number))).save(path)


def norm(y, dims=(2, 3)):
    """Compute instance norm of maps (B, C, H, W) without weights; over (0, 2, 3), batch norm."""
    variance = y.var(dims, keepdim=True, unbiased=False)
    return (y - y.mean(dims, keepdim=True)) / (variance + 1e-5).sqrt()


def provenance(path):
    """Read what a picture tells of how it was made, as one text."""
    with Image.open(path) as picture:
        return picture.getexif()[0x010E]


def files(folder="."):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def state(folder):
    """Read all that a training changes."""
    saved = common.load_checkpoint(next(Path(folder).glob("*checkpoint.pth")))
    names = "G F D_X D_Y optimizer_G optimizer_D pool_X pool_Y G_ema F_ema" if "G" in saved else "model optimizer"
    return {name: saved[name] for name in (*names.split(), "step", *({"E_X", "E_Y"} & saved.keys()))}


equal = functools.partial(torch.testing.assert_close, rtol=0, atol=0)  # of states: bit for bit
