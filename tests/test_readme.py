"""The README, the files and the code say the same."""

import importlib
import inspect
import re
import shlex

import pytest

import dense
import finetune
import train
from conftest import ROOT

README = (ROOT / "README.md").read_text()
TEXT = "\n".join(path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))])
PROGRAMS = {"train": train, "finetune": finetune, "dense": dense}


def test_every_equation_stands_where_the_table_says():
    rows = re.findall(r"^\| (MixedAE|MR-MAE|CAE) \| (.+?) \| .+? \| `(.+?)` \|$", TEXT, re.M)
    assert len(rows) >= 10
    for paper, equation, place in rows:
        module, *names = place.removeprefix("tests/").replace(".py::", ".").split(".")
        value = importlib.import_module(module)
        for name in names:
            value = getattr(value, name)
        assert equation.replace("\\|", "|") in inspect.getsource(value), (place, equation)


def test_ci_runs_the_readmes_test_command():
    assert (
        re.search(r"Run the tests.*?:\n\n```sh\n(.+)\n```", README)[1]
        in (ROOT / ".ci" / "run").read_text().splitlines()
    )


def commands():
    """Every command in a shell block of the README and of docs, without what follows a #."""
    blocks = "\n".join(re.findall(r"```sh\n(.+?)```", TEXT, re.S)).replace("\\\n", " ")
    lines = [line.split("#")[0] for line in blocks.splitlines() if "..." not in line]
    found = [re.search(r"(train|finetune|dense)\.py\b(.*)", line) for line in lines]
    return sorted({(match[1], match[2].strip()) for match in found if match})


@pytest.mark.parametrize("program, flags", commands())
def test_every_command_is_understood(program, flags):
    PROGRAMS[program].parse_args(shlex.split(flags))


def test_every_flag_named_in_the_text_exists():
    parsed = [train.parse_args(["--method", method]) for method in train.METHODS]
    parsed += [finetune.parse_args(["--protocol", protocol]) for protocol in finetune.DEFAULTS]
    parsed += [dense.parse_args(["--task", task]) for task in dense.DEFAULTS]
    known = {"--" + name.replace("_", "-") for args in parsed for name in vars(args)}
    named = set(re.findall(r"`(--[a-z-]+)", TEXT))
    assert named - known - {"--no-norm-pix", "--no-segment-embedding"} == set()


def test_the_top_level_holds_only_what_was_agreed():
    import subprocess

    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    modules = {f"{kind.__module__}.py" for kind in train.METHODS.values()}
    programs = {"vit.py", "data.py", "train.py", "finetune.py", "dense.py"}
    others = {"README.md", "requirements.txt", "tests", "docs", "assets", "LICENSE", ".ci", ".gitignore"}
    assert {file.split("/")[0] for file in files} <= modules | programs | others


def test_imports_form_a_tree():
    rooms = {"train", "finetune", "dense", "mixedae", "mrmae", "cae"}
    allowed = {
        "train": {"mixedae", "mrmae", "cae"},
        "finetune": rooms - {"dense", "finetune"},
        "dense": rooms,
    }
    for room in rooms:
        text = (ROOT / f"{room}.py").read_text()
        imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.M))
        assert imported & rooms <= allowed.get(room, set()), room


def test_every_line_has_at_most_110_columns():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        wide = [i for i, line in enumerate(path.read_text().splitlines(), start=1) if len(line) > 110]
        assert not wide, (path.name, wide)
