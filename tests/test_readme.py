"""What README.md, the notebook and the benchmark print, show and state is true."""

import contextlib
import functools
import io
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

import benchmark
import common
import cyclegan
import gatys
import johnson

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOTEBOOK = ROOT / "notebooks" / "style_transfer.ipynb"
SCRIPTS = {"gatys": gatys, "johnson": johnson, "cyclegan": cyclegan, "benchmark": benchmark, "common": common}


# --- Commands ---

# In their place the shell calls functions that print their arguments, so that loops and variables are expanded.
STUBS = """set -e; PATH=/nowhere
seq() { local i; for ((i = 1; i <= $1; i++)); do echo $i; done; }
for program in python python3 pip curl unzip torchrun; do
  eval "$program() { printf '%s\\0' $program \\"\\$@\\"; echo; }"
done
"""
# What makes each command small enough for a test, put after its own arguments, so that it prevails.
TINY = {
    "gatys": "--image-size 96 --num-steps 1 --lbfgs-iters 1 --vgg-weights random --device cpu",
    "johnson stylize": "--image-size 24 --device cpu",
    "johnson train": """--image-size 16 --style-size 32 --batch-size 2 --vgg vgg16 --vgg-weights random --workers 0
        --content-layer relu2_1 --style-layers relu1_1 relu2_1 --precision float32 --iterations 1 --device cpu""",
    "cyclegan train": "--crop-size 32 --width 4 --blocks 1 --workers 0 --precision float32 --max-steps 1 --device cpu",
    "cyclegan translate": "--image-size 24 --device cpu",
}


def commands():
    """The commands of all `sh` blocks, as a shell expands them: [program, argument, …] each."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 8
    script = STUBS + "\n".join(blocks).replace(".venv/bin/", "")
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr  # a program that is not stubbed
    return [line.rstrip("\0").split("\0") for line in result.stdout.splitlines()]


def mentions():
    """The commands of this repository's scripts that the text and the plain blocks mention, without an ellipsis."""
    text = re.sub(r"^```sh\n.*?^```", "", README, flags=re.MULTILINE | re.DOTALL).replace("\\\n", " ")
    found = re.findall(r"`(python \w+\.py [^`…]+)`", text) + re.findall(r"^python \w+\.py [^…\n]+$", text, re.MULTILINE)
    return [shlex.split(command, comments=True) for command in found]


@pytest.fixture
def folder(monkeypatch):
    """What the README's commands expect is in the working folder."""
    monkeypatch.setattr(gatys, "find_faces", lambda content: content[:, :1])  # an extra: tested in test_gatys.py
    monkeypatch.setattr(cyclegan, "download", lambda name: Path("data", name))
    shutil.copytree(ROOT / "examples", "examples")
    for name in ("photos", "holiday", "train2014", *(f"data/{name}/trainA" for name in cyclegan.DATASETS)):
        Path(name).mkdir(parents=True)
        for k in range(6):
            Image.effect_noise((40, 33 + k), 60).convert("RGB").save(f"{name}/{k}.png")
    for name in cyclegan.DATASETS:
        for part in ("trainB", "testA", "testB"):
            shutil.copytree(f"data/{name}/trainA", f"data/{name}/{part}")
    for name in ("horse.jpg", "zebra.jpg"):
        shutil.copy(ROOT / "examples" / "content.jpg", name)
    black, red = (Image.new("RGB", (20, 20), color) for color in ("black", "red"))
    black.save("cat.gif", save_all=True, append_images=[red])


@pytest.mark.skipif(not shutil.which("bash"), reason="needs a shell")
def test_every_command_works(folder, capsys):
    seen = set()
    for program, *arguments in commands():
        if program in ("pip", "curl", "unzip", "torchrun") or arguments[:1] == ["-m"]:
            continue
        script, *rest = arguments
        name = script.removesuffix(".py")
        module = SCRIPTS[name]
        if name == "benchmark":
            module.parse_args(rest)
            continue
        kind = name if name == "gatys" else f"{name} {rest[0]}"
        tiny = TINY[kind].split()
        # Of commands that differ in values alone, as those of a loop, the others are only read.
        shape = (kind, *sorted(word for word in rest if word.startswith("-")), *[w for w in rest if Path(w).is_dir()])
        if shape in seen and kind == "gatys":
            module.parse_args(rest)
            continue
        seen.add(shape)
        module.main([*rest, *tiny])
        result = Path(capsys.readouterr().out.splitlines()[-1])
        assert result.stat().st_size > 0, arguments
    assert len(seen) > 15


def test_every_mentioned_command_can_be_read(folder):
    assert len(mentions()) >= 2
    for _, script, *arguments in mentions():
        for word in arguments:
            if word.endswith(".pth"):
                Path(word).parent.mkdir(exist_ok=True)
                Path(word).touch()
        SCRIPTS[script.removesuffix(".py")].parse_args(arguments)


def test_the_python_examples_work(folder):
    paint, translate = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    exec(paint.replace("512", "40"), {})
    with Image.open("picture.png") as picture:
        assert max(picture.size) == 40
    exec(translate.replace("192", "32"), {})
    with Image.open("horse2zebra.jpg") as picture:
        assert picture.size == (6 * 32, 4 * 32)


# --- Flags and defaults ---


def flags_of(module, *command):
    """The flags that `--help` shows."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        module.parse_args([*command, "--help"])
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text.getvalue())) - {"--help"}


COMMANDS = {
    "gatys": (gatys, [], ["content.jpg"]),
    "johnson": (johnson, ["train"], ["--style", "a.jpg", "--data", "b"]),
    "stylize": (johnson, ["stylize"], ["a.jpg"]),
    "cyclegan": (cyclegan, ["train"], ["x", "y"]),
    "translate": (cyclegan, ["translate"], ["a.jpg"]),
}


def test_every_flag_is_documented_and_every_documented_flag_is_there():
    flags = set().union(*(flags_of(module, *command) for module, command, _ in COMMANDS.values()))
    assert len(flags) > 50
    written = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", README))
    assert flags - written <= {"--output"}
    elsewhere = {"--help", "--no-deps", "--nproc-per-node"} | flags_of(benchmark)
    assert written - flags <= elsewhere


def tables(header):
    """The rows of all tables whose first column is called so: ({column: cell}, the section that it is in) each."""
    for section in re.split(r"^## ", README, flags=re.MULTILINE):
        columns = None
        for line in section.splitlines():
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            if not line.startswith("|"):
                columns = None
            elif columns is None and cells:
                columns = cells
            elif columns and columns[0].startswith(header) and not set(line) <= set("|-: "):
                assert len(cells) == len(columns), line
                yield dict(zip(columns, cells, strict=True)), section


def test_the_defaults_in_the_tables_are_those_of_the_scripts():
    checked = 0
    for row, section in tables("flag"):
        name = re.search(r"(gatys|johnson|cyclegan)\.py", section)[1]
        module, command, needed = COMMANDS[name]
        args = vars(module.parse_args([*command, *needed]))
        args |= {"content_weight": args.get("alpha"), "style_weight": args.get("beta")} if name == "gatys" else {}
        flags = re.findall(r"`--([a-z0-9-]+)`", row[next(iter(row))])
        here = row["paper"] if "the same" in row["here"] else row["here"]
        for flag, value in zip(flags, [here] if len(flags) == 1 else here.split(", "), strict=False):
            default, value = args[flag.replace("-", "_")], re.sub(r"(?<=\d) (?=\d)", "", value).strip("`")
            if isinstance(default, tuple | list) and default:
                assert value in (", ".join(default), f"{default[0]} … {default[-1]}"), flag
            elif default is None or default is False or default == () or " " in value:  # none of its own, or in words
                assert not re.fullmatch(r"[\d.e-]+", value) or flag == "lr", flag
            elif isinstance(default, int | float):
                assert float(value) == default, flag
            elif value:
                assert value == str(default), flag
            checked += bool(value)
    assert checked > 35


def test_pictures_are_small_and_links_lead_somewhere():
    pictures = set(re.findall(r"!\[[^]]*\]\(([^)]+)\)", README) + re.findall(r'<img src="([^"]+)"', README))
    assert len(pictures) > 20
    assert sum((ROOT / picture).stat().st_size for picture in pictures) <= 4_000_000
    links = set(re.findall(r"(?<!!)\[[^]]*\]\(([^)#]+)[^)]*\)", README))
    assert len(links) > 5
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


# --- How to read this ---


def found(path):
    """What `module.name` or `module.Class.name` is; a function of a test file by its text."""
    module, *names = path.split(".")
    if module.startswith("test_"):
        return re.search(rf"^def {names[0]}\(", (ROOT / "tests" / f"{module}.py").read_text(encoding="utf-8"), re.M)
    return functools.reduce(getattr, names, SCRIPTS[module])


def test_every_equation_has_its_function_and_test():
    rows = [row for row, _ in tables("equation")]
    for row in rows:
        paths = re.findall(r"`([\w.]+)`", row["function"] + row["test"])
        assert len(paths) >= 2, row
        assert all(found(path) for path in paths), row
    listed = {row["equation"] for row in rows}
    assert len(listed) == len(rows)
    wanted = {f"Gatys Eq. {n}" for n in range(1, 8)} | {f"Johnson Eq. {n}" for n in range(1, 6)}
    wanted |= {f"CycleGAN Eq. {n}" for n in range(1, 5)} | {"CycleGAN §4", "CycleGAN §5.2"}
    for name, paper in (("common", None), ("gatys", "Gatys"), ("johnson", "Johnson"), ("cyclegan", "CycleGAN")):
        text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        for source, numbers in re.findall(r"(Gatys et al\. 2017, |Gatys |Johnson(?:'s)? |)Eq\. (\d(?:, \d)*)", text):
            cited = "Gatys 2017" if "2017" in source else source.split("'")[0].strip() or paper
            wanted |= {f"{cited} Eq. {n}" for n in numbers.split(", ") if cited}
    assert wanted <= listed


def test_scripts_are_as_long_as_it_says():
    rows = [row for row, _ in tables("read") if "," in row["lines, in all"]]
    assert len(rows) == 4
    for row in rows:
        lines = (ROOT / re.search(r"\]\(([^)]+)", row["read"])[1]).read_text(encoding="utf-8").splitlines()
        rule = next(i for i, line in enumerate(lines) if line.startswith("# Nothing below is in "))
        for said, counted in zip(row["lines, in all"].split(", "), (rule, len(lines)), strict=True):
            assert int(said) == pytest.approx(counted, rel=0.1), row


# --- Notebook and benchmark ---


def test_the_notebook_has_its_outputs_and_nothing_of_where_it_was_run():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 1_500_000
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/jpeg" in output.get("data", ()) for output in outputs) > 15
    assert not any(output["output_type"] == "error" for output in outputs)
    texts = "".join("".join(output.get("text", "")) for output in outputs)
    assert not re.search(r"/(home|root|tmp|usr|work|Users)/", texts)


def test_the_notebook_runs(monkeypatch):
    """At a tiny size, in a kernel of its own."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("NOTEBOOK_SIZE", "48")
    monkeypatch.setenv("NOTEBOOK_STEPS", "1")
    notebook = nbformat.read(NOTEBOOK, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        cell.outputs, cell.execution_count = [], None
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute()  # CellExecutionError on the first that fails
    assert all(cell.execution_count for cell in code)


def test_the_benchmark_measures_every_row_and_prints_a_table(monkeypatch, capsys):
    """With small networks and pictures, and without processes of their own."""

    def best(*versions, repeats):
        for version in versions:
            version()
        return [1.0, 0.5][: len(versions)]

    monkeypatch.setattr(benchmark, "best", best)
    monkeypatch.setattr(benchmark, "alone", lambda name, size, ours=True: (size**2 / 1e6, 0.5))
    ran = subprocess.CompletedProcess([], 0, "a.png\n1.5")
    monkeypatch.setattr(benchmark.subprocess, "run", lambda command, **options: ran)
    monkeypatch.setattr(benchmark, "load_image", lambda path, size, **crop: common.load_image(path, 32, **crop))
    monkeypatch.setattr(benchmark, "VGG", functools.partial(common.VGG, weights="random"))
    monkeypatch.setattr(cyclegan, "CycleGAN", functools.partial(cyclegan.CycleGAN, blocks=1, width=4))
    monkeypatch.setattr(cyclegan, "Generator", lambda blocks=1, width=4, G=cyclegan.Generator: G(blocks, width))
    monkeypatch.setattr(gatys, "optimize", lambda *arguments: iter([(None, {"total": 0.0})]))
    rows = {name: (measure, function, 32, 32) for name, (measure, function, *_) in benchmark.ROWS.items()}
    monkeypatch.setattr(benchmark, "ROWS", rows)
    benchmark.main(["--quick", "--json", "a.json", "--plot", "a.png"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    assert list(dict.fromkeys(line[0] for line in lines)) == ["row", *rows]
    assert sum("side^2.00" in line for line in lines) == 3
    figures = json.loads(Path("a.json").read_text())
    assert figures["rows"][0]["ratio"] == 2
    assert {"device", "versions", "precision"} <= set(figures)
    with Image.open("a.png") as picture:
        assert picture.width > 500


def test_the_benchmark_measures_a_step_in_a_process_of_its_own(monkeypatch):
    seconds, gigabytes = benchmark.alone("johnson_stylize", 64)
    assert 0 < seconds < 60
    assert 0.05 < gigabytes < 10
    failed = subprocess.CompletedProcess([], -9, "")  # as without memory
    monkeypatch.setattr(benchmark.subprocess, "run", lambda command, **options: failed)
    assert benchmark.alone("johnson_stylize", 64) is None
