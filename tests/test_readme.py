"""The README, the files and the code say the same."""
import importlib
import inspect
import re
import shlex

import pytest

import finetune
import train
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_every_equation_stands_where_the_table_says():
    rows = re.findall(r"^\| (MixedAE|MR-MAE|CAE) \| (.+?) \| .+? \| `(.+?)` \|$", README, re.M)
    assert len(rows) >= 10
    for paper, equation, place in rows:
        module, *names = place.removeprefix("tests/").replace(".py::", ".").split(".")
        value = importlib.import_module(module)
        for name in names:
            value = getattr(value, name)
        assert equation.replace("\\|", "|") in inspect.getsource(value), (place, equation)


def test_ci_runs_the_readmes_test_command():
    assert re.search(r"Run the tests.*?:\n\n```sh\n(.+)\n```", README)[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def commands():
    blocks = "\n".join(re.findall(r"```sh\n(.+?)```", README, re.S)).replace("\\\n", " ")
    found = {re.search(r"(train|finetune)\.py\b(.*)", line.split("#")[0]) for line in blocks.splitlines() if "..." not in line}
    return sorted({(match[1], match[2].strip()) for match in found if match})


@pytest.mark.parametrize("program, flags", commands())
def test_every_command_is_understood(program, flags):
    {"train": train, "finetune": finetune}[program].parse_args(shlex.split(flags))


def test_every_flag_named_in_the_readme_exists():
    known = set()
    for method in train.METHODS:
        known |= {"--" + name.replace("_", "-") for name in vars(train.parse_args(["--method", method]))}
    for protocol in finetune.DEFAULTS:
        known |= {"--" + name.replace("_", "-") for name in vars(finetune.parse_args(["--protocol", protocol]))}
    named = set(re.findall(r"`(--[a-z-]+)", README))
    assert named - known - {"--no-norm-pix"} == set()


def test_the_top_level_holds_only_what_was_agreed():
    import subprocess

    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    agreed = {"README.md", "requirements.txt", "mixedae.py", "cae.py", "mrmae.py", "vit.py", "data.py", "train.py", "finetune.py", "tests", "assets", "LICENSE",
              ".ci", ".gitignore"}
    assert {file.split("/")[0] for file in files} <= agreed


def test_imports_form_a_tree():
    for method in ("mrmae", "mixedae", "cae"):
        imported = set(re.findall(r"^(?:from|import) (\w+)", (ROOT / f"{method}.py").read_text(), re.M))
        assert imported & {"train", "finetune", "mixedae", "mrmae", "cae"} == set()
