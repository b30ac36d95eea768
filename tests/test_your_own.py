"""The worked examples of the documents: a new method, a new mask, a new loss, and the encoder in other code.

Each example is taken out of its document and applied to a copy of the programs. The copy is imported in place
of the originals for one test.
"""

import importlib
import re
import shutil
import sys

import pytest
import torch
from torch.testing import assert_close
from torchvision.transforms.v2.functional import to_pil_image

import vit
from conftest import ROOT, TINY, run, write_encoder

README = (ROOT / "README.md").read_text()
YOUR_OWN = (ROOT / "docs" / "your-own.md").read_text()
PROGRAMS = [path.stem for path in ROOT.glob("*.py")]


def blocks(text, kind):
    """The code blocks of one kind of a document."""
    return re.findall(rf"```{kind}\n(.+?)```", text, re.S)


@pytest.mark.parametrize("text", [README, YOUR_OWN], ids=["README.md", "your-own.md"])
def test_the_code_of_the_documents_has_at_most_110_columns(text):
    lines = "".join(blocks(text, "python") + blocks(text, "diff")).splitlines()
    assert max(map(len, lines)) <= 110


def patched(source, diff):
    """Apply a diff as the documents write them: hunks behind lines @@, without line numbers."""
    for hunk in diff.split("@@\n")[1:]:
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """fork(diff, {name: text}) -> {program: module}, imported from a copy with the diff and the new files."""
    before = dict(sys.modules)

    def make(diff, new_files=()):
        folder = tmp_path / "fork"
        folder.mkdir()
        for program in PROGRAMS:
            shutil.copy(ROOT / f"{program}.py", folder)
        for name, text in dict(new_files).items():
            (folder / name).write_text(text)
        path = folder / re.match(r"--- (\w+\.py)\n", diff)[1]
        path.write_text(patched(path.read_text(), diff))

        monkeypatch.syspath_prepend(folder)
        for program in PROGRAMS:
            sys.modules.pop(program, None)
        modules = {program: importlib.import_module(program) for program in PROGRAMS}
        assert all(module.__file__.startswith(str(folder)) for module in modules.values())
        return modules

    yield make
    for name in sys.modules.keys() - before.keys():
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in sys.modules[name].__file__:
            del sys.modules[name]
    sys.modules.update({program: before[program] for program in PROGRAMS if program in before})


def train_and_probe(modules, folder, out, *flags):
    """Train one epoch and stop within it, go on to the end of the second, draw, and probe the encoder."""
    train, probe = modules["train"].main, modules["finetune"].main
    flags = [*flags, "--data", folder, "--out", out, "--epochs", 2, "--log-every", 1]
    run(*flags, "--max-steps", 3, main=train)
    run(*flags, main=train)
    rows = modules["data"].read_log(out)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert (out / "pictures" / "epoch-0002.png").is_file()

    probing = "--protocol linear --feature mean --cache-features --epochs 1 --batch-size 8".split()
    flags = ["--encoder", out / "encoder.pt", "--data", folder, "--out", out / "probe"]
    run(*probing, *flags, main=probe, defaults=["--workers", "0", "--device", "cpu"])
    assert (out / "probe" / "results.json").is_file()
    return rows


def test_a_method_of_the_readme_trains_resumes_and_is_probed(fork, folder, tmp_path):
    (simmim,) = [block for block in blocks(README, "python") if "class SimMIM" in block]
    (diff,) = blocks(README, "diff")
    modules = fork(diff, {"simmim.py": simmim})
    rows = train_and_probe(modules, folder, tmp_path / "run", "--method", "simmim", "--lr", 1e-2)
    assert {"recon", "val_loss"} <= rows[-1].keys()

    # Its loss looks at hidden patches alone, and hidden pixels do not reach the encoder.
    args = modules["train"].parse_args(["--method", "simmim", *TINY, "--mask-ratio", ".75"])
    model = modules["train"].METHODS["simmim"](args).eval()
    images = torch.randn(2, 3, 16, 16)
    mask = model.predict(images)["mask"]
    assert mask.sum(dim=1).tolist() == [12, 12]
    changed = modules["vit"].patchify(images, 4)
    changed[mask] += 1
    changed = modules["vit"].unpatchify(changed, (4, 4), 4)
    assert_close(model.predict(changed, mask)["pred"], model.predict(images, mask)["pred"])
    out = model.predict(images, mask)
    assert_close(model(images, mask)[0], (out["pred"] - out["target"])[mask].abs().mean())
    pictures = model.visualize(images)
    assert all(0 <= picture.min() and picture.max() <= 1 for picture in pictures.values())


def example(title):
    """The diff of a section of docs/your-own.md."""
    (section,) = [part for part in YOUR_OWN.split("\n## ")[1:] if part.startswith(title)]
    (diff,) = blocks(section, "diff")
    return diff


def mixedae(modules, *flags):
    torch.manual_seed(0)
    args = modules["train"].parse_args(["--method", "mixedae", *TINY, *map(str, flags)])
    return modules["train"].METHODS["mixedae"](args)


def losses(modules, *flags):
    """What a model of these flags says of images that are always the same."""
    model = mixedae(modules, *flags)
    torch.manual_seed(1)
    return model(torch.randn(8, 3, 16, 16))


def test_a_mask_in_blocks(fork, folder, tmp_path):
    own = losses({"train": importlib.import_module("train")})
    modules = fork(example("A new mask"))
    train_and_probe(modules, folder, tmp_path / "run", "--method", "mixedae", "--lr", 1e-2)
    assert_close(losses(modules, "--block-side", 1), own, atol=0, rtol=0)

    # Each image gives r L patches, and each block of 2 x 2 is of one image, in full mode too.
    for flags, groups in (((), 2), (("--mixing-mode", "full"), 8)):
        images = torch.randn(8, 3, 16, 32)
        model = mixedae(modules, "--image-size", 16, 32, *flags)
        sources = model.predict(images)["sources"].view(groups, 4, 8)
        assert all(((sources == i).sum(dim=(1, 2)) == 8).all() for i in range(4))
        assert_close(sources, sources[:, ::2, ::2].repeat_interleave(2, 1).repeat_interleave(2, 2))
    with pytest.raises(modules["vit"].UserError, match="cannot share"):
        mixedae(modules, "--block-side", 4)


def test_a_loss_of_visible_patches(fork, folder, tmp_path):
    own, metrics = losses({"train": importlib.import_module("train")})
    modules = fork(example("A new loss"))
    rows = train_and_probe(modules, folder, tmp_path / "run", "--method", "mixedae", "--lr", 1e-2)
    assert all(row["visible"] > 0 for row in rows)
    assert_close(losses(modules, "--visible-weight", 0), (own, metrics), atol=0, rtol=0)
    loss, more = losses(modules, "--visible-weight", 0.5)
    assert_close(loss, own + 0.5 * more.pop("visible"))
    assert_close(more, metrics)


def test_segments_for_half_of_the_mixed_images(fork):
    """The patch of docs/results.md: a mixed image has its segment embeddings or none; export adds none."""
    (diff,) = blocks((ROOT / "docs" / "results.md").read_text(), "diff")
    model, seen = mixedae(fork(diff), "--batch-size", 64), []
    model.segments.data += 10
    model.encoder.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model.predict(torch.randn(64, 3, 16, 16))
    high = seen[0][:, 1:].flatten(1).mean(dim=1) > 5  # (16,), which mixed images have segments
    assert 0 < high.sum() < 16
    exported = model.export()["state_dict"]["patch_embed.proj.bias"]
    assert torch.equal(exported, model.encoder.patch_embed.proj.bias)


@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_the_encoder_in_other_code_as_printed(layer_scale, tmp_path, tmp_path_factory, monkeypatch, capsys):
    pytest.importorskip("timm")
    (snippet,) = [block for block in blocks(README, "python") if "load_encoder" in block]
    (in_timm,) = [block for block in blocks(README, "python") if "VisionTransformer" in block]
    project = tmp_path / "path" / "to" / "this" / "project"
    (project / "runs" / "mixedae").mkdir(parents=True)
    shape = ((32, 48), 8, 32, 2, 2, 3, 4.0, layer_scale)
    shutil.copy(write_encoder(tmp_path_factory, *shape), project / "runs" / "mixedae")
    to_pil_image(torch.randint(256, (3, 90, 70), dtype=torch.uint8)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    names = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert names["feature"].shape == (1, 32)
    exec(compile(in_timm, "README.md", "exec"), names)
    assert capsys.readouterr().out == "torch.Size([1, 32]) torch.Size([1, 24, 32])\n"
    assert sys.modules["vit"] is vit
