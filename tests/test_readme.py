"""What README.md, the notebook and the benchmark print, show and state is true."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, TINY, save_noise, split

import cyclegan
import gatys
from common import load_image

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
NOTEBOOK = ROOT / "notebooks" / "style_transfer.ipynb"

# In their place the shell calls functions that print their arguments, so that loops and variables are expanded.
STUBS = """set -e; PATH=/nowhere
seq() { local i; for ((i = 1; i <= $1; i++)); do echo $i; done; }
for program in python python3 pip curl unzip mkdir ffmpeg; do
  eval "$program() { printf '%s\\0' $program \\"\\$@\\"; echo; }"
done
"""


def commands():
    """List the commands of all `sh` blocks, as a shell expands them: [program, argument, …] each."""
    blocks = "".join(re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)).replace(".venv/bin/", "")
    result = subprocess.run(["bash", "-c", STUBS + blocks], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr  # a program that is not stubbed
    return [line.rstrip("\0").split("\0") for line in result.stdout.splitlines()]


@pytest.fixture
def folder(monkeypatch):
    """Put what the README's commands expect into the working folder."""
    monkeypatch.setattr(gatys, "find_faces", lambda content: content[:, :1])  # an extra: tested in test_gatys.py
    monkeypatch.setattr(cyclegan, "download", lambda name: Path("data", name))
    shutil.copytree(ROOT / "examples", "examples")
    parts = [f"data/{name}/{part}" for name in cyclegan.DATASETS for part in ("trainA", "trainB", "testA", "testB")]
    shutil.copytree(ROOT / "models", "models")
    for name in ("train2014", "frames", *parts):  # what is downloaded, or made by ffmpeg, in the lines before
        save_noise(*(f"{name}/{k}.png" for k in range(6)), size=(40, 36))


@pytest.mark.skipif(not shutil.which("bash"), reason="needs a shell")
def test_every_command_works(folder, capsys):
    seen = set()
    for program, *arguments in commands():
        if program not in ("python", "python3") or arguments[0] in ("-m", "tests/benchmark.py"):
            continue
        (script, *sub), rest = split(shlex.join(arguments))
        main, tiny = SCRIPTS[script], TINY[" ".join([script, *sub])].split()
        # Of commands that differ in values alone, as those of a loop, the others are only read.
        shape = (script, *sub, *sorted(word for word in rest if word.startswith("-") or Path(word).is_dir()))
        if shape in seen:
            main.parse_args([*sub, *rest])
            continue
        seen.add(shape)
        main.main([*sub, *rest, *tiny, *(["--image-size", "24"] if sub in (["stylize"], ["translate"]) else [])])
        assert Path(capsys.readouterr().out.splitlines()[-1]).stat().st_size > 0, arguments
    assert len(seen) > 15


def test_every_command_in_the_text_can_be_read(folder):
    """Of those without an ellipsis."""
    text = re.sub(r"^```sh\n.*?^```", "", README, flags=re.MULTILINE | re.DOTALL).replace("\\\n", " ")
    found = re.findall(r"`(python \w+\.py [^`…]+)`", text) + re.findall(r"^python \w+\.py [^…\n]+$", text, re.MULTILINE)
    for _, script, *arguments in (shlex.split(command, comments=True) for command in found):
        for word in (Path(word) for word in arguments if word.endswith(".pth")):
            word.parent.mkdir(exist_ok=True)
            word.touch()
        SCRIPTS[script].parse_args(arguments)


def test_the_python_examples_work(folder):
    paint, translate, export = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    exec(paint.replace("512", "40"), {})
    assert max(load_image("picture.png").shape) == 40
    exec(translate.replace("192", "32"), {})
    assert load_image("horse2zebra.jpg").shape == (1, 3, 4 * 32, 6 * 32)
    pytest.importorskip("onnxscript")
    exec(export, {})
    assert Path("wave.onnx").stat().st_size > 0


COMMANDS = ["gatys.py content.jpg style.jpg", "johnson.py train --style a.jpg --data b", "johnson.py stylize a.jpg"]
COMMANDS += ["cyclegan.py train x y", "cyclegan.py translate a.jpg"]


def test_every_flag_is_documented_and_every_documented_flag_is_there(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # argparse breaks lines at hyphens
    for (script, *sub), _ in map(split, COMMANDS):
        with pytest.raises(SystemExit):
            SCRIPTS[script].parse_args([*sub, "--help"])
    texts = capsys.readouterr().out, README
    flags, written = (set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text)) for text in texts)
    assert flags - written <= {"--output", "--help"}
    assert written - flags <= {"--find-links", "--help", "--index-url", "--no-deps", "--no-index", "--quick"}


def test_the_help_has_groups_and_examples_that_can_be_read(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for (script, *sub), _ in map(split, COMMANDS):
        with pytest.raises(SystemExit):
            SCRIPTS[script].parse_args([*sub, "--help"])
        lines = capsys.readouterr().out.splitlines()
        groups = [line for line in lines if re.fullmatch("[a-z ]+:", line)]
        assert {"pictures:", "machine:"} <= set(groups)
    for script, module in SCRIPTS.items():
        with pytest.raises(SystemExit):
            module.parse_args(["--help"])
        _, examples = capsys.readouterr().out.split("\nexamples:\n")
        for example in examples.splitlines():
            assert shlex.split(example, comments=True)[:2] == ["python", script]


def tables(header):
    """List the rows of all tables whose first column is called so: ({column: cell}, the section that it is in) each."""
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
        (script, *sub), needed = split(next(command for command in COMMANDS if command.startswith(name)))
        args = vars(SCRIPTS[script].parse_args([*sub, *needed]))
        flags = re.findall(r"`--([a-z0-9-]+)`", row[next(iter(row))])
        here = row.get("paper", "") if "the same" in row["here"] else row["here"]
        for flag, value in zip(flags, [here] if len(flags) == 1 else here.split(", "), strict=False):
            default, value = args[flag.replace("-", "_")], re.sub(r"(?<=\d) (?=\d)", "", value).strip("`")
            if isinstance(default, tuple | list) and default and value != "equal shares":
                assert value in (", ".join(map(str, default)), f"{default[0]} … {default[-1]}"), flag
            elif default is None or default is False or default == () or " " in value:  # none of its own, or in words
                assert not re.fullmatch(r"[\d.e-]+", value) or flag == "lr", flag
            elif isinstance(default, int | float):
                assert float(value) == default, flag
            elif value:
                assert value == str(default), flag
            checked += bool(value)
    assert checked > 35


def test_links_and_equations_lead_somewhere():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text):
            assert link.startswith("https://") or (page.parent / link).exists(), (page, link)
    for row, _ in tables("equation"):
        for module, *names in (path.split(".") for path in re.findall(r"`([\w.]+)`", row["function"] + row["test"])):
            text = next(path for path in (ROOT / f"{module}.py", ROOT / "tests" / f"{module}.py") if path.exists())
            assert re.search(rf"^ *(def|class) {names[-1]}\b", text.read_text(encoding="utf-8"), re.M), row
    wanted = {f"Gatys Eq. {n}" for n in range(1, 8)} | {f"Johnson Eq. {n}" for n in range(1, 6)}
    wanted |= {f"CycleGAN Eq. {n}" for n in range(1, 5)} | {"CycleGAN §4", "CycleGAN §5.2", "Gatys 2017 Eq. 4"}
    assert wanted <= {row["equation"] for row, _ in tables("equation")}


def test_every_choice_of_tests_chooses_some():
    """Each word of a `pytest -k` is in the name of a test."""
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    names = re.findall(r"^def (test_\w+)", tests, re.MULTILINE)
    choices = re.findall(r'-k (?:\\?"([^"\\]+)|(\w+))', README + NOTEBOOK.read_text(encoding="utf-8"))
    assert len(choices) > 6
    for word in (word for choice in choices for word in "".join(choice).split(" or ")):
        assert any(word in name for name in names), word


def test_the_notebook_has_its_outputs_and_runs(monkeypatch):
    """What is stored tells nothing of where it was run; it runs at a tiny size, in a kernel of its own."""
    stored = NOTEBOOK.read_text(encoding="utf-8")
    assert stored.count('"image/jpeg"') > 15
    assert not re.search(r"/(home|root|tmp|usr|work|Users)/\w", re.sub('"image/.*', "", stored))
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("NOTEBOOK_SIZE", "48")
    monkeypatch.setenv("NOTEBOOK_STEPS", "1")
    nbclient.execute(nbformat.read(NOTEBOOK, 4), cwd=str(NOTEBOOK.parent), timeout=600)  # the first failure ends it


def test_the_benchmark_prints_a_table():
    """Its smallest row; the others need minutes."""
    command = [sys.executable, str(ROOT / "tests" / "benchmark.py"), "--quick", "cyclegan-translate"]
    table = subprocess.check_output(command, text=True, timeout=200)
    assert re.search(r"^cyclegan-translate +128 px +[\d.]+ s +\S+ GB +plainly +[\d.]+ s: ×", table, re.M)
