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


def commands_in(block):
    """The commands of a shell block, without what follows a #: [(program, flags), ...]."""
    lines = [line.split("#")[0] for line in block.replace("\\\n", " ").splitlines() if "..." not in line]
    found = [re.search(r"\b(train|finetune|dense)\.py\b(.*)", line) for line in lines]
    return [(match[1], match[2].strip()) for match in found if match]


def printed_commands():
    """Every command in a shell block of the README and of docs/."""
    return {command for block in re.findall(r"```sh\n(.+?)```", TEXT, re.S) for command in commands_in(block)}


def first_runs():
    """The commands of the table "What you should see"."""
    section = README.split("## What you should see")[1].split("\n## ")[0]
    found = re.findall(r"^\| `([a-z]+(?: --[^`]+)?)` \|", section, re.M)
    assert len(found) == 6
    return {("train", f"--method {flags}") for flags in found}


def cells(line):
    """The cells of a table's row; a \\| in one is not an edge."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def formed_commands():
    """What a shell block and the table right below it form: the block's last command and, appended, the flags
    of a row, where the table has a column of that name. A row whose cell is prose forms none."""
    formed = set()
    for block, table in re.findall(r"```sh\n((?:(?!```).)+)```\n\n((?:\|[^\n]*\n)+)", TEXT, re.S):
        head, _, *rows = table.splitlines()
        if "flags" not in cells(head):
            continue
        program, base = commands_in(block)[-1]
        for row in rows:
            cell = cells(row)[cells(head).index("flags")]
            flags = re.fullmatch(r"`(--[^`]+)`|defaults", cell)
            assert flags or "`" not in cell, row
            if flags:
                formed.add((program, f"{base} {flags[1] or ''}".strip()))
    return formed


@pytest.mark.parametrize("program, flags", sorted(printed_commands() | first_runs() | formed_commands()))
def test_every_command_is_understood(program, flags):
    PROGRAMS[program].parse_args(shlex.split(flags))


def test_the_tables_form_the_papers_commands():
    formed = {f"{program} {flags}" for program, flags in formed_commands()}
    assert len(formed) >= 100
    for words in (
        ["train", "--method mixedae", "--blr 1.5e-4", "--global-layers 3"],
        ["train", "--method cae", "--target dalle:", "--lr 1.5e-3", "--rescaled-init"],
        ["train", "--method mrmae", "--teacher clip", "--stem conv", "--epochs 800"],
        ["finetune", "--protocol finetune", "--lr 8e-3", "--accumulate 4"],
        ["finetune", "--protocol linear", "--protocol attentive", "--lr .4"],
        ["dense", "--task segment", "--lr 4e-5", "--layer-decay .95"],
        ["dense", "--task detect", "--neck simple", "--image-size 1024"],
    ):
        assert any(all(word in command for word in words) for command in formed), words


def test_every_flag_named_in_the_text_exists():
    parsed = [train.parse_args(["--method", method]) for method in train.METHODS]
    parsed += [finetune.parse_args(["--protocol", protocol]) for protocol in finetune.DEFAULTS]
    parsed += [dense.parse_args(["--task", task]) for task in dense.DEFAULTS]
    known = {"--" + name.replace("_", "-") for args in parsed for name in vars(args)}
    known |= {"--no-norm-pix", "--no-segment-embedding"}
    known |= set(re.findall(r'^\+ +add\("(--[a-z-]+)"', TEXT, re.M))  # the worked examples add some
    assert set(re.findall(r"`(--[a-z-]+)", TEXT)) - known == set()


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 240
    assert len(README.encode()) <= 16_000


def test_every_link_leads_somewhere():
    for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", path.read_text()):
            file = path.parent / target if target else path
            assert file.is_file(), (path.name, target)
            if file.suffix != ".md":
                continue
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert not anchor or anchor in anchors, (path.name, anchor)


def test_no_document_names_a_place_on_one_machine():
    assert re.findall(r"(?<![\w.:/])/(?:home|tmp|work|root|mnt|data|usr)/", TEXT) == []


def test_the_top_level_holds_only_what_was_agreed():
    import subprocess

    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    modules = {f"{kind.__module__}.py" for kind in train.METHODS.values()}
    programs = {"vit.py", "data.py", "train.py", "finetune.py", "dense.py"}
    others = {"README.md", "requirements.txt", "tests", "docs", "LICENSE", ".ci", ".gitignore"}
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
