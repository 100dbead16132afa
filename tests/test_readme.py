"""What README.md, docs/, the notebook and the benchmark print, show and state is true."""

import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS, TINY, save_noise, split

import cyclegan
import gatys
import johnson
from common import load_checkpoint, load_image

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
NOTEBOOK = ROOT / "notebooks" / "style_transfer.ipynb"

# In place of the programs, the shell calls functions that print their arguments. So loops and
# variables are expanded.
STUBS = """set -e; PATH=/nowhere
seq() { local i; for ((i = 1; i <= $1; i++)); do echo $i; done; }
for program in python python3 pip curl unzip mkdir ffmpeg; do
  eval "$program() { printf '%s\\0' $program \\"\\$@\\"; echo; }"
done
"""


def blocks(language, text=README):
    """List the texts of all code blocks in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text=README):
    """List the commands of all `sh` blocks, as a shell expands them: [program, argument, …]."""
    script = STUBS + "".join(blocks("sh", text)).replace(".venv/bin/", "")
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr  # a program that is not stubbed
    return [line.rstrip("\0").split("\0") for line in result.stdout.splitlines()]


def script_commands(text=README):
    """List those commands that run one of the three scripts: ([script, …], arguments) each."""
    for program, *arguments in commands(text):
        if program in ("python", "python3") and arguments[0] in SCRIPTS:
            yield split(shlex.join(arguments))


@pytest.fixture
def folder(monkeypatch):
    """Put what the commands of the pages expect into the working folder."""
    # Finding faces needs an extra. It is tested in test_gatys.py.
    monkeypatch.setattr(gatys, "find_faces", lambda content: content[:, :1])
    monkeypatch.setattr(cyclegan, "download", lambda name: Path("data", name))
    shutil.copytree(ROOT / "examples", "examples")
    shutil.copytree(ROOT / "models", "models")
    folders = ["train2014", "frames"]  # what the lines before download, or ffmpeg makes
    for name in cyclegan.DATASETS:
        folders += [f"data/{name}/{part}" for part in ("trainA", "trainB", "testA", "testB")]
    for name in folders:
        save_noise(*(f"{name}/{k}.png" for k in range(6)), size=(40, 36))


# --- Commands -------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("bash"), reason="needs a shell")
def test_every_command_works(folder, capsys):
    seen = set()
    for (script, *sub), arguments in script_commands():
        words = [word for word in arguments if word.startswith("-") or Path(word).is_dir()]
        shape = (script, *sub, *sorted(words))
        if shape in seen:
            # Of commands that differ in values alone, as those of a loop, only one is run.
            SCRIPTS[script].parse_args([*sub, *arguments])
            continue
        seen.add(shape)
        tiny = TINY[" ".join([script, *sub])].split()
        if sub in (["stylize"], ["translate"]):
            tiny += ["--image-size", "24"]
        if "--style-layer-weights" in arguments:
            tiny += ["--style-layer-weights", "0.5", "0.5"]  # of the two layers in TINY
        if "--padding" in arguments:
            tiny += ["--crop-size", "48"]  # more than its 40 px
        SCRIPTS[script].main([*sub, *arguments, *tiny])
        written = capsys.readouterr().out.splitlines()[-1]
        assert Path(written).stat().st_size > 0, arguments
    assert len(seen) > 15


@pytest.mark.skipif(not shutil.which("bash"), reason="needs a shell")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_command_writes_over_the_picture_of_another(page):
    written = Counter()
    for (script, *sub), arguments in script_commands(page.read_text(encoding="utf-8")):
        if sub == ["train"]:  # a second training does not start over the first one
            continue
        args = SCRIPTS[script].parse_args([*sub, *arguments])
        # Without -o, the names of the inputs decide.
        inputs = vars(args).get("inputs") or [args.content, *args.styles]
        written[args.output or f"{script} {inputs}"] += 1
    assert not [output for output, count in written.items() if count > 1]


def test_every_command_in_the_text_can_be_read(folder):
    """Commands with an ellipsis are left out."""
    text = re.sub(r"^```sh\n.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    text = text.replace("\\\n", " ")
    found = re.findall(r"`(python \w+\.py [^`…]+)`", text)
    found += re.findall(r"^python \w+\.py [^…\n]+$", text, re.MULTILINE)
    for command in found:
        _, script, *arguments = shlex.split(command, comments=True)
        for word in arguments:
            if word.endswith(".pth"):
                Path(word).parent.mkdir(exist_ok=True)
                Path(word).touch()
        SCRIPTS[script].parse_args(arguments)


@pytest.mark.parametrize("style", johnson.STYLES)
def test_the_last_command_of_each_style_takes_as_many_steps_as_its_training_did(style):
    """The commands in the files are older: there, --decay-iterations are a part of --iterations."""
    text = (ROOT / "models" / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    command = re.search(rf"^python johnson.py (train .* -o {style}.pth .*)$", text, re.MULTILINE)[1]
    args = johnson.parse_args(shlex.split(command))
    saved = load_checkpoint(johnson.model_file(style))
    assert args.iterations + args.decay_iterations == saved["step"]
    constant = saved["args"]["iterations"] - saved["args"]["decay_iterations"]
    assert args.iterations == max(1, constant)
    for name in ("batch_size", "crop_size", "seed", "style_size", "vgg"):
        assert vars(args)[name] == saved["args"][name], name


def test_the_first_command_and_that_of_the_tests_are_lines_of_their_own():
    """CI takes the second one from the page, by `grep '^python3 .*pytest'`."""
    page = PAGES[0].read_text(encoding="utf-8")
    lines = re.findall(r"^python3 .*", page, re.MULTILINE)
    assert [line.rsplit("/", 1)[-1] for line in lines[1:]] == ["python -m pytest -q"]
    assert lines[0].endswith("gatys.py examples/content.jpg examples/style.jpg")


# --- Python examples ------------------------------------------------------------------------------


def python_example(word):
    """Return the one Python block that has this word."""
    (example,) = (block for block in blocks("python") if word in block)
    return example


def test_the_example_of_gatys_works(folder):
    exec(python_example("from gatys import").replace("512", "40"), {})
    assert max(load_image("picture.png").shape) == 40


def test_the_example_of_cyclegan_works(folder):
    exec(python_example("horse2zebra.jpg").replace("192", "32"), {})
    assert load_image("horse2zebra.jpg").shape == (1, 3, 4 * 32, 6 * 32)


def test_the_example_of_onnx_works():
    pytest.importorskip("onnxscript")
    exec(python_example("onnx"), {})
    assert Path("wave.onnx").stat().st_size > 0


def test_every_python_example_is_tried():
    assert len(blocks("python")) == 3


# --- Flags ----------------------------------------------------------------------------------------

COMMANDS = [
    "gatys.py content.jpg style.jpg",
    "johnson.py train --style a.jpg --data b",
    "johnson.py stylize a.jpg",
    "cyclegan.py train x y",
    "cyclegan.py translate a.jpg",
]


def help_texts(capsys, monkeypatch, columns):
    """List what `--help` prints for each of the commands."""
    monkeypatch.setenv("COLUMNS", columns)
    texts = []
    for command in COMMANDS:
        (script, *sub), _ = split(command)
        with pytest.raises(SystemExit):
            SCRIPTS[script].parse_args([*sub, "--help"])
        texts.append(capsys.readouterr().out)
    return texts


def flags_in(text):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))


def test_every_flag_is_documented_and_every_documented_flag_is_there(capsys, monkeypatch):
    # argparse breaks lines at hyphens, unless they are long
    flags = flags_in("".join(help_texts(capsys, monkeypatch, columns="300")))
    written = flags_in(README)
    assert flags - written <= {"--output", "--help"}
    of_pip = {"--find-links", "--index-url", "--no-deps", "--no-index"}
    of_nbconvert = {"--clear-output", "--inplace"}
    of_the_benchmark = {"--quick"}
    assert written - flags <= of_pip | of_nbconvert | of_the_benchmark | {"--help"}


def test_the_help_has_groups_and_examples_that_can_be_read(capsys, monkeypatch):
    for text in help_texts(capsys, monkeypatch, columns="100"):
        groups = [line for line in text.splitlines() if re.fullmatch("[a-z ]+:", line)]
        assert {"pictures:", "machine:"} <= set(groups)
    for script, module in SCRIPTS.items():
        with pytest.raises(SystemExit):
            module.parse_args(["--help"])
        _, examples = capsys.readouterr().out.split("\nexamples:\n")
        for example in examples.splitlines():
            assert shlex.split(example, comments=True)[:2] == ["python", script]


# --- Tables and links -----------------------------------------------------------------------------


def tables(header):
    """List the rows of all tables whose first column is called so.

    Each is ({column: cell}, the section that the table is in).
    """
    for section in re.split(r"^## ", README, flags=re.MULTILINE):
        columns = None
        for line in section.splitlines():
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            if not line.startswith("|"):
                columns = None
            elif columns is None and cells:
                columns = cells
            elif columns and columns[0].startswith(header) and not set(line) <= set("|-: "):
                yield dict(zip(columns, cells, strict=True)), section


def test_the_defaults_in_the_tables_are_those_of_the_scripts():
    checked = 0
    for row, section in tables("flag"):
        name = re.search(r"(gatys|johnson|cyclegan)\.py", section)[0]
        command = next(command for command in COMMANDS if command.startswith(name))
        (script, *sub), needed = split(command)
        args = vars(SCRIPTS[script].parse_args([*sub, *needed]))
        flags = re.findall(r"`--([a-z0-9-]+)`", row[next(iter(row))])
        here = row.get("paper", "") if "the same" in row["here"] else row["here"]
        values = [here] if len(flags) == 1 else here.split(", ")
        for flag, value in zip(flags, values, strict=False):
            value = re.sub(r"(?<=\d) (?=\d)", "", value).strip("`")
            check_default(flag, value, args[flag.replace("-", "_")])
            checked += bool(value)
    assert checked > 35


def check_default(flag, value, default):
    """Compare what a table says with a default of the parser."""
    if isinstance(default, tuple | list) and default and value != "equal shares":
        whole = ", ".join(map(str, default))
        assert value in (whole, f"{default[0]} … {default[-1]}"), flag
    elif default is None or default is False or default == () or " " in value:
        # it has none of its own, or the table says it in words
        assert not re.fullmatch(r"[\d.e-]+", value) or flag == "lr", flag
    elif isinstance(default, int | float):
        assert float(value) == default, flag
    elif value:
        assert value == str(default), flag


def test_links_lead_somewhere():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
        for link in links:
            if link.startswith("https://"):
                continue
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), (page, link)
            if anchor:
                assert anchor in anchors(target), (page, link)


def anchors(page):
    """List what GitHub makes of a page's headings: lower case, no punctuation, hyphens."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_every_picture_of_the_examples_is_shown_or_has_credits():
    """`examples/` has inputs alone, each with credits; `examples/results/` what a page shows."""
    shown = README + NOTEBOOK.read_text(encoding="utf-8")
    for path in (ROOT / "examples" / "results").rglob("*.*"):
        assert path.relative_to(ROOT / "examples").as_posix() in shown, path
    credits = (ROOT / "examples" / "CREDITS.md").read_text(encoding="utf-8")
    for path in (ROOT / "examples").iterdir():
        assert path.name == "CREDITS.md" or f"{path.name}" in credits, path


def test_equations_lead_to_their_functions_and_tests():
    for row, _ in tables("equation"):
        functions = re.findall(r"`([\w.]+)`", row["function"])
        tests = re.findall(r"`([\w.]+)`", row["test"])
        assert functions and tests, row
        # Tests are in test_equations.py, unless another file is named.
        tests = [test if "." in test else f"test_equations.{test}" for test in tests]
        for name in (*functions, *tests):
            module, *names = name.split(".")
            places = [ROOT / f"{module}.py", ROOT / "tests" / f"{module}.py"]
            text = next(path for path in places if path.exists()).read_text(encoding="utf-8")
            assert re.search(rf"^ *(def|class) {names[-1]}\b", text, re.MULTILINE), row
    wanted = {f"Gatys Eq. {n}" for n in range(1, 8)} | {f"Johnson Eq. {n}" for n in range(1, 6)}
    wanted |= {f"CycleGAN Eq. {n}" for n in range(1, 5)} | {"CycleGAN §4", "CycleGAN §5.2"}
    wanted |= {"Gatys 2017 Eq. 4"}
    assert wanted <= {row["equation"] for row, _ in tables("equation")}


def test_every_choice_of_tests_chooses_some():
    """Each word of a `pytest -k` is in the name of a test."""
    files = (ROOT / "tests").glob("test_*.py")
    tests = "".join(path.read_text(encoding="utf-8") for path in files)
    names = re.findall(r"^def (test_\w+)", tests, re.MULTILINE)
    text = README + NOTEBOOK.read_text(encoding="utf-8")
    choices = re.findall(r'-k (?:\\?"([^"\\]+)|(\w+))', text)
    assert len(choices) > 6
    for choice in choices:
        for word in "".join(choice).split(" or "):
            assert any(word in name for name in names), word


# --- The notebook and the benchmark ---------------------------------------------------------------


def test_the_notebook_has_its_outputs_and_runs(monkeypatch):
    """What is stored tells nothing of where it was run. It runs, tiny, in a kernel of its own."""
    stored = NOTEBOOK.read_text(encoding="utf-8")
    assert stored.count('"image/jpeg"') > 15
    texts = re.sub('"image/.*', "", stored)
    assert not re.search(r"/(home|root|tmp|usr|work|Users)/\w", texts)
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("NOTEBOOK_SIZE", "48")
    monkeypatch.setenv("NOTEBOOK_STEPS", "1")
    notebook = nbformat.read(NOTEBOOK, 4)
    nbclient.execute(notebook, cwd=str(NOTEBOOK.parent), timeout=600)  # the first failure ends it


def test_the_benchmark_prints_a_table():
    """Its smallest row; the others need minutes."""
    benchmark = str(ROOT / "tests" / "benchmark.py")
    command = [sys.executable, benchmark, "--quick", "cyclegan-translate"]
    table = subprocess.check_output(command, text=True, timeout=200)
    row = r"^cyclegan-translate +128 px +[\d.]+ s +\S+ GB +plainly +[\d.]+ s: ×"
    assert re.search(row, table, re.MULTILINE)
