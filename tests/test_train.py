"""The loop: schedule, groups, resume, signals, guards, files, bad input."""

import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import data
import dense
import finetune
import train
import vit
from conftest import TINY, build, run
from vit import UserError


def checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def without_clock(rows):
    return [
        {key: value for key, value in row.items() if key not in ("images_per_s", "data_wait", "memory_mb")}
        for row in rows
    ]


def same_weights(a, b):
    a, b = checkpoint(a), checkpoint(b)
    moments = [
        torch.equal(a["optimizer"]["state"][i][key], value)
        for i, state in b["optimizer"]["state"].items()
        for key, value in state.items()
    ]
    return (
        a["step"] == b["step"]
        and all(torch.equal(a["model"][name], value) for name, value in b["model"].items())
        and all(moments)
    )


@pytest.fixture(scope="module")
def reference(folder, tmp_path_factory):
    """An undisturbed run of 15 steps, for those that compare with it."""
    out = tmp_path_factory.mktemp("reference") / "run"
    run("--method", "mixedae", "--data", folder, "--out", out, "--log-every", 2, "--val-images", 8)
    return out


def interrupt_at(monkeypatch, step, what):
    """Call what() just before the forward pass of that step (the first is 0)."""
    real = train.forward_backward

    def step_or_interrupt(run, micro_batches, number):
        if number == step:
            what()
        return real(run, micro_batches, number)

    monkeypatch.setattr(train, "forward_backward", step_or_interrupt)


def test_schedule_is_linear_warm_up_then_half_a_cosine():
    assert (
        train.lr_at(0, 1.0, 5, 100) == 0
        and train.lr_at(2.5, 1.0, 5, 100) == 0.5
        and train.lr_at(5, 1.0, 5, 100) == 1
    )
    assert train.lr_at(52.5, 1.0, 5, 100) == pytest.approx(0.5) and train.lr_at(
        100, 1.0, 5, 100
    ) == pytest.approx(0)
    assert train.lr_at(30, 1.0, 5, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi * 25 / 95)))


def test_weight_decay_spares_biases_and_one_dimensional_parameters():
    model = build("mixedae")
    args = train.parse_args(["--weight-decay", "0.07", "--beta2", "0.9", *TINY])
    decayed, plain = train.build_optimizer(model, args).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert (
        decayed["weight_decay"] == 0.07
        and plain["weight_decay"] == 0
        and decayed["betas"] == (0.9, 0.9)
        and decayed["fused"]
    )
    assert {"encoder.cls_token", "decoder.mask_token", "segments", "encoder.blocks.0.attn.qkv.weight"} <= {
        names[id(p)] for p in decayed["params"]
    }
    assert all(names[id(p)].endswith(".bias") or p.ndim == 1 for p in plain["params"])
    assert (
        len(decayed["params"]) + len(plain["params"]) == len(names) - 2
    )  # all but the two fixed position tables


def test_the_learning_rate_rule(folder, tmp_path, capsys):
    run("--data", folder, "--out", tmp_path / "a", "--epochs", 1, "--blr", 1.5e-4, "--accumulate", 2)
    assert "= 16; learning rate 9.375e-06 (blr 0.00015 x 16 / 256)" in capsys.readouterr().out
    run("--data", folder, "--out", tmp_path / "b", "--epochs", 1, "--blr", 1.5e-4, "--lr", 0.01)
    assert "learning rate 0.01 (--lr)" in capsys.readouterr().out


def test_a_run_folder_holds_what_was_promised(reference, folder):
    log = rows(reference)
    assert [row["step"] for row in log] == [2, 4, 5, 6, 8, 10, 12, 14, 15]
    expected = {
        "step",
        "epoch",
        "lr",
        "loss",
        "recon",
        "homocon",
        "homocon_floor",
        "grad_norm",
        "images_per_s",
        "data_wait",
        "memory_mb",
        "skipped_steps",
        "accuracy",
        "accuracy_layers",
    }
    assert all(expected | ({"val_loss"} if row["step"] % 5 == 0 else set()) == row.keys() for row in log)
    assert log[0]["loss"] == pytest.approx(log[0]["recon"] + 0.1 * log[0]["homocon"], rel=1e-5)
    facts = json.loads((reference / "args.json").read_text())
    assert (
        facts["torch"] == torch.__version__
        and facts["width"] == 32
        and "--log-every 2" in facts["command"]
        and "commit" in facts
    )
    assert sorted(os.listdir(reference / "pictures")) == [
        "curves.png",
        "epoch-0001.png",
        "epoch-0002.png",
        "epoch-0003.png",
    ]
    encoder, info = vit.load_encoder(reference / "encoder.pt")
    assert info["method"] == "mixedae" and encoder.features(torch.randn(1, 3, 16, 16))["patches"].shape == (
        1,
        16,
        32,
    )


def test_the_log_of_shapes_says_how_much_attention_falls_on_the_objects(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHAPES_TRAIN", 16)
    for method in [name for name, kind in train.METHODS.items() if not hasattr(kind, "export_file")]:
        more = ("--teacher", tmp_path / "mae" / "encoder.pt") if method == "mrmae" else ()
        flags = (
            "--data",
            "shapes",
            "--out",
            tmp_path / method,
            "--epochs",
            1,
            "--log-every",
            1,
            "--val-images",
            16,
        )
        run("--method", method, *more, *flags)
        first, last = rows(tmp_path / method)
        assert "object_attention" not in first  # at the end of an epoch alone
        encoder, _ = vit.load_encoder(tmp_path / method / "encoder.pt")
        images, masks = data.fixed_images(data.Shapes((16, 16), "val", 2000), (16, 16), 16)
        attention = encoder.features(data.normalize(images), attention=True)["attention"].mean(1)[:, 0, 1:]

        def area(b, l):
            return masks[b, 4 * (l // 4) :, 4 * (l % 4) :][:4, :4].float().mean()

        on_object = sum(attention[b, l] * area(b, l) for b in range(16) for l in range(16))
        assert last["object_attention"] == pytest.approx((on_object / attention.sum()).item(), abs=2e-3)
        assert last["object_area"] == pytest.approx(masks.float().mean().item(), abs=1e-5)


def test_draw_makes_the_pictures_of_given_images_with_the_runs_own_flags(reference, folder, tmp_path, capsys):
    images = [str(path) for path in sorted((folder / "val").glob("*/*.png"))]
    before = {file: (reference / file).read_bytes() for file in ("checkpoint.pt", "log.jsonl", "args.json")}
    train.main(
        ["--method", "mixedae", "--out", str(reference), "--device", "cpu", "--draw", *images]
    )  # sizes come from the checkpoint
    path = reference / "pictures" / f"draw-{images[0][-6:-4]}.png"
    said = capsys.readouterr().out
    assert said == f"{path}: step 15\n"
    pixels = np.array(Image.open(path))
    assert pixels.shape == (
        34 + 4 + 8 * 132,
        4 + 5 * 132,
        3,
    )  # a row an image; panels: image, mixed, who, reconstruction, attention
    for row, file in enumerate(images):
        shown = pixels[38 + 132 * row :][4:132:8, 8:132:8][:16, :16]
        true = np.array(Image.open(file).convert("RGB").resize((16, 16), Image.BICUBIC))
        assert np.abs(shown.astype(int) - true).mean() < 20
    path.unlink()
    older = checkpoint(reference)  # a run made before some flags were there
    del older["args"]["mixing_mode"], older["args"]["augment"]
    torch.save(older, tmp_path / "checkpoint.pt")
    run("--method", "mixedae", "--out", tmp_path, "--draw", *images[:4])
    assert (tmp_path / "pictures" / path.name).exists()
    (tmp_path / "checkpoint.pt").unlink()
    assert before == {file: (reference / file).read_bytes() for file in before}
    for flags, words in (
        (images[:3], "multiple of 4"),
        (images[:6], "the last 2 make no whole group"),
        ([__file__] * 4, "cannot be read as an image"),
        (["nothing.png"] * 4, "nothing.png: cannot be read"),
    ):
        run("--method", "mixedae", "--out", reference, "--draw", *flags, code=2)
        one_line(capsys, words)
    run("--method", "mae", "--out", reference, "--draw", *images, code=2)
    one_line(capsys, "method mixedae (now mae)")
    run("--method", "mae", "--out", tmp_path, "--draw", *images, code=2)
    one_line(capsys, "checkpoint.pt: no such file")


def test_a_finished_run_says_so(reference, folder, capsys):
    before = (reference / "checkpoint.pt").stat().st_mtime_ns
    run("--method", "mixedae", "--data", folder, "--out", reference, "--log-every", 2, "--val-images", 8)
    assert "finished already" in capsys.readouterr().out.splitlines()[-1]
    assert len(rows(reference)) == 9 and (reference / "checkpoint.pt").stat().st_mtime_ns == before


def test_what_a_run_made_is_not_overwritten_by_another_start(reference, folder, tmp_path, capsys):
    """Without its checkpoint a run cannot go on. Without its encoder.pt it makes that again."""
    shutil.copytree(reference, tmp_path / "run")
    whole = (reference / "encoder.pt").read_bytes()
    flags = ("--method", "mixedae", "--data", folder, "--out", tmp_path / "run", "--val-images", 8)
    for spoil in (lambda path: path.unlink(), lambda path: path.write_bytes(whole[:100])):
        spoil(tmp_path / "run" / "encoder.pt")
        run(*flags)
        assert vit.load_encoder(tmp_path / "run" / "encoder.pt")
    (tmp_path / "run" / "checkpoint.pt").unlink()
    capsys.readouterr()
    run(*flags, code=2)
    one_line(capsys, "holds encoder.pt but no checkpoint.pt to go on from; choose another --out")
    assert len(rows(tmp_path / "run")) == 9


def test_a_run_of_another_program_is_named(reference, folder, tmp_path, capsys):
    data = ("--data", folder, "--out", tmp_path / "probe")
    probe = ("--protocol", "linear", "--encoder", reference / "encoder.pt", "--epochs", 1, "--batch-size", 8)
    run(*probe, *data, "--workers", 0, "--device", "cpu", main=finetune.main, defaults=())
    capsys.readouterr()
    for more in ((), ("--draw", folder / "val/class0/40.png")):
        run("--method", "mixedae", *data, *more, code=2)
        one_line(capsys, "checkpoint.pt is of a run of finetune.py (now train.py)")

    # But its encoder may be trained on.
    flags = ("--method", "mae", "--data", folder, "--epochs", 1, "--out", tmp_path / "more", "--init")
    run(*flags, tmp_path / "probe" / "checkpoint.pt", code=2)
    one_line(capsys, "give the run's best.pt")
    run(*flags, tmp_path / "probe" / "best.pt", "--heads", 4, code=2)
    one_line(capsys, "has heads 2 (here 4)")
    run(*flags, tmp_path / "probe" / "best.pt")
    assert "fills the encoder" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resumed_run_equals_the_one_never_stopped(
    reference, folder, tmp_path, monkeypatch, number
):
    flags = ("--method", "mixedae", "--data", folder, "--out", tmp_path, "--log-every", 2, "--val-images", 8)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 6, lambda: os.kill(os.getpid(), number))
        run(*flags, code=128 + number)
    assert checkpoint(tmp_path)["step"] in (7, 8)
    (tmp_path / "log.jsonl").open("a").write(
        '{"step": 9, "loss": 1.0}\n{"step": 10, "lo'
    )  # rows after it, and one cut short
    run(*flags, "--workers", 2)  # any number of workers
    assert same_weights(tmp_path, reference) and without_clock(rows(tmp_path)) == without_clock(
        rows(reference)
    )


def test_a_signal_in_the_last_step_is_said_and_its_row_is_written_by_the_next_start(
    folder, tmp_path, capsys, monkeypatch
):
    flags = ("--method", "mae", "--data", folder, "--out", tmp_path)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 14, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(*flags, code=128 + signal.SIGTERM)
    assert "stopped after step 15 of 15" in capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path)] == [5, 10]
    run(*flags)
    assert [row["step"] for row in rows(tmp_path)] == [5, 10, 15]


def test_accumulation_takes_contiguous_slices(folder, tmp_path):
    """MAE's loss is a mean over images: two micro-batches of 4 give the gradient of one of 8, for given
    masks."""
    args = train.parse_args(["--method", "mae", *TINY])
    device = train.start_processes(args)
    try:
        run_ = train.build_run(args, {"images": 8, "classes": []}, device)
        images, mask = (
            torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8),
            torch.rand(8, 16).argsort(1) < 12,
        )
        real, masks = run_.model.predict, iter([mask, mask[:4], mask[4:]])
        run_.model.predict = lambda images, _: real(images, next(masks))
        norms = []
        for micro_batches in ([images], [images[:4], images[4:]]):
            train.forward_backward(run_, [(part, None) for part in micro_batches], 0)
            norms.append([p.grad.clone() for p in run_.model.parameters() if p.requires_grad])
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*norms))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "flags",
    [
        ("--recompute",),
        ("--precision", "bf16"),
        ("--precision", "fp16"),
        ("--blr", 1e-3),
        ("--image-size", 16, 24),
        ("--seed", 5),
    ],
)
def test_flags_train(folder, tmp_path, flags):
    run("--method", "mixedae", "--data", folder, "--out", tmp_path, "--epochs", 2, *flags)
    losses = [row["loss"] for row in rows(tmp_path)]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)


def test_recompute_changes_nothing(reference, folder, tmp_path):
    run(
        "--method",
        "mixedae",
        "--data",
        folder,
        "--out",
        tmp_path,
        "--log-every",
        2,
        "--val-images",
        8,
        "--recompute",
    )
    assert same_weights(tmp_path, reference)


def test_init_takes_weights_alone(reference, folder, tmp_path, capsys):
    """A checkpoint fills the whole model, an encoder.pt or a published MAE file the encoder."""
    source = checkpoint(reference)["model"]
    for file in ("checkpoint.pt", "encoder.pt"):
        model = build("mixedae")
        train.load_weights(model, reference / file)
        name = "encoder.blocks.1.mlp.fc1.weight"
        assert torch.equal(model.state_dict()[name], source[name])
        assert torch.equal(model.state_dict()["segments"], source["segments"]) == (file == "checkpoint.pt")
    model = build("mae", "--image-size", 32)  # another grid: the table is resized
    train.load_weights(model, reference / "encoder.pt")
    assert torch.equal(
        model.encoder.pos_embed, vit.resize_positions(source["encoder.pos_embed"], (4, 4), (8, 8))
    )
    for flags, words in (
        (("--depth", 3), "Missing key.*blocks.2."),
        (("--depth", 1), "Unexpected key.*blocks.1."),
        (("--heads", 4), "has heads 2 .here 4"),
        (("--patch-size", 2, "--image-size", 8), "has patch-size 4 .here 2"),
    ):
        for file in ("checkpoint.pt", "encoder.pt"):
            with pytest.raises(UserError, match=words):
                train.load_weights(build("mae", *flags), reference / file)
    golden = torch.load(os.path.join(os.path.dirname(__file__), "golden/mae_tiny.pt"), weights_only=True)
    torch.save({"model": golden["state_dict"]}, tmp_path / "mae.pth")
    sizes = "--image-size 32 --width 48 --depth 2 --heads 4".split()
    sizes += "--decoder-width 32 --decoder-depth 2 --decoder-heads 4".split()
    for method in ("mae", "mixedae"):
        model = build(method, *sizes)
        train.load_weights(model, tmp_path / "mae.pth")
        assert torch.equal(model.encoder.cls_token, golden["state_dict"]["cls_token"])
        assert torch.equal(model.decoder.mask_token, golden["state_dict"]["mask_token"]) == (method == "mae")
    encoder_only = {
        name: value
        for name, value in golden["state_dict"].items()
        if not name.startswith(("decoder", "mask"))
    }
    torch.save({"model": encoder_only}, tmp_path / "encoder_only.pth")
    assert train.load_weights(build("mae", *sizes), tmp_path / "encoder_only.pth") == "the encoder"
    torch.save({"model": {**encoder_only, "cls_token": torch.zeros(1, 1, 8)}}, tmp_path / "odd.pth")
    del encoder_only["blocks.1.mlp.fc1.weight"]
    torch.save({"model": encoder_only}, tmp_path / "holes.pth")
    torch.save(
        {"model": {**golden["state_dict"], "blocks.0.ls1.gamma": torch.ones(48)}}, tmp_path / "more.pth"
    )  # an encoder that computes something else
    torch.save({"model": 3}, tmp_path / "number.pth")
    torch.save([1], tmp_path / "list.pth")
    torch.save({"state_dict": [1]}, tmp_path / "no-names.pth")
    for file, words in (
        ("odd.pth", "size mismatch for cls_token"),
        ("holes.pth", "Missing key.*blocks.1.mlp.fc1.weight"),
        ("more.pth", "Unexpected key.*blocks.0.ls1.gamma"),
        *((f"{name}.pth", "holds no weights by name") for name in ("number", "list", "no-names")),
    ):
        with pytest.raises(UserError, match=words):
            train.load_weights(build("mixedae", *sizes), tmp_path / file)
    run(
        "--method", "mae", "--data", folder, "--out", tmp_path / "run", "--init", tmp_path / "mae.pth", code=2
    )
    error = capsys.readouterr().err
    assert "does not fit this MAE" in error and error.count("\n") == 1


def test_benchmark_prints_a_line_a_method(capsys, monkeypatch):
    monkeypatch.setitem(train.PRODUCT_SIZE, "cpu", 64)
    run("--method", "mixedae", "--benchmark", "mae", "mae --mask-ratio .5")
    lines = capsys.readouterr().out.splitlines()
    assert "TFLOP/s" in lines[0] and [line.split(":")[0] for line in lines[1:]] == [
        "mixedae",
        "mae",
        "mae --mask-ratio .5",
    ]
    assert all(word in line for line in lines[1:] for word in ("images/s", "ms/step", "MB", "GFLOP", "%"))


#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
# ------------------------------------------------------------------------------------------------------------
# What goes wrong
# ------------------------------------------------------------------------------------------------------------
class Hostile:
    def __reduce__(self):
        return (os.system, ("touch hostile-file-ran",))


def one_line_at_the_end(capsys, words):
    assert words in capsys.readouterr().err.strip().splitlines()[-1]


def one_line(capsys, *words):
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines


MISTAKES = [  # flags as typed, a word of the line that answers them
    ("--method mea", "mae"),
    ("--size giant", "large"),
    ("--data imagenot", "neither a set"),
    ("--data=", "neither a set"),
    ("--init=", "an empty name"),
    ("--out=", "an empty name"),
    ("--batch-size 100000000", "larger than the set of 40"),
    ("--lr 1e-3 --min-lr 1", "the learning rate 0.001 is below 1, where its schedule ends"),
    ("--epoch 3", "unrecognized"),
    ("--epochs 0", "whole number from 1"),
    ("--epochs 1e400", "whole number from 1"),
    ("--batch-size 0", "whole number from 1"),
    ("--batch-size two", "whole number from 1"),
    ("--crop-scale .5 .2", "MIN <= MAX"),
    ("--crop-scale 0 1", "0 < MIN"),
    ("--image-size 18", "multiple of the patch size 4"),
    ("--image-size 1 2 3", "one number or two"),
    ("--mixing-ratio .3", "1/n"),
    ("--mixing-ratio nan", "--mixing-ratio"),
    ("--method mae --mask-ratio 1", "at least 1 must stay visible"),
    ("--method mae --mask-ratio 0", "at least 1 be hidden"),
    ("--method mae --mask-ratio nan", "a number from 0 to 1"),
    ("--width 0", "whole number from 1"),
    ("--width 33", "multiple of"),
    ("--patch-size 0", "whole number from 1"),
    ("--lr 0", "a number from 1e-12"),
    ("--lr inf", "a number from 1e-12"),
    ("--blr nan", "a number from 1e-12"),
    ("--beta2 1.5", "a number from 0 to 0.999999"),
    ("--weight-decay -1", "a number from 0"),
    ("--warmup-epochs nan", "a number from 0"),
    ("--seed 99999999999999999999", "whole number from 0"),
    ("--max-steps 0", "whole number from 1"),
    ("--topk nan", "--topk"),
    ("--temperature 0", "--temperature"),
    ("--mean 123.7 116.3 103.5", "a number from 0 to 1"),
    ("--std 0 1 1", "a number from 0.001 to 1"),
    ("--benchmark mae'", "quotation"),
    ("--batch-size 48", "larger than the set of 40"),
    ("--init nothing.pt", "no such file"),
    ("--out /proc/run", "cannot be written"),
    *([] if torch.cuda.is_available() else [("--device cuda", "CUDA")]),
]


@pytest.mark.parametrize("flags, words", MISTAKES)
def test_mistakes_get_one_line_and_code_2(flags, words, folder, tmp_path, capsys):
    run("--data", folder, "--out", tmp_path / "run", *flags.split(), code=2)
    one_line(capsys, words)


def test_an_empty_folder(tmp_path, capsys):
    run("--data", tmp_path, "--out", tmp_path / "run", code=2)
    one_line(capsys, "no images")


def test_the_same_run_with_changed_flags(reference, folder, capsys):
    facts = (reference / "args.json").read_text()
    run(
        "--method",
        "mixedae",
        "--data",
        folder,
        "--out",
        reference,
        "--log-every",
        2,
        "--val-images",
        8,
        "--epochs",
        4,
        "--lr",
        1e-3,
        code=2,
    )
    one_line(capsys, "epochs 3 (now 4)", "lr None (now 0.001)", "another --out")
    run("--method", "mae", "--data", folder, "--out", reference, code=2)
    one_line(capsys, "method mixedae (now mae)")
    run("--data", folder, "--out", reference, "--val-images", 8, "--width", 16, code=2)
    one_line(capsys, "width 32 (now 16)")
    assert (reference / "args.json").read_text() == facts


def test_checkpoints_that_cannot_be_trusted(reference, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ("--method", "mixedae", "--data", folder, "--out", tmp_path / "run")
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "checkpoint.pt"
    whole = (reference / "checkpoint.pt").read_bytes()
    for content, words in (
        (whole[: len(whole) // 2], "truncated"),
        (b"", "truncated"),
        ((reference / "encoder.pt").read_bytes(), "not a checkpoint"),
    ):
        path.write_bytes(content)
        run(*flags, code=2)
        one_line(capsys, words, "checkpoint.pt")
        assert path.read_bytes() == content
    torch.save({"model": Hostile(), "step": 1}, path)
    run(*flags, code=2)
    one_line(capsys, "not opened")
    run(*flags[:-1], tmp_path / "other", "--init", path, code=2)
    one_line(capsys, "not opened")
    assert not (tmp_path / "hostile-file-ran").exists()


def test_a_run_folder_in_use(folder, tmp_path, capsys):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"""
import fcntl, sys
file = open({str(tmp_path / ".lock")!r}, "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()""",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    holder.stdout.readline()
    run("--data", folder, "--out", tmp_path, code=2)
    one_line(capsys, "another process")
    holder.kill()
    holder.wait()
    run("--data", folder, "--out", tmp_path, "--epochs", 1)  # a dead holder holds nothing


def test_a_full_disk_while_saving_keeps_the_last_good_checkpoint(
    reference, folder, tmp_path, capsys, monkeypatch
):
    flags = ("--method", "mixedae", "--data", folder, "--out", tmp_path, "--log-every", 2, "--val-images", 8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patched:
        interrupt_at(
            patched, 7, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, limits[1]))
        )  # epoch 1 is saved; encoder.pt still fits
        try:
            run(*flags, code=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    output = capsys.readouterr()
    assert "checkpoint.pt could not be written" in output.err and checkpoint(tmp_path)["step"] == 5
    assert rows(tmp_path)[-1]["step"] == 15 and not list(tmp_path.glob("*.tmp"))  # it trained on
    run(*flags)
    assert same_weights(tmp_path, reference)


def blind(images, *statistics):
    """What train.normalize is patched with: images that make every loss NaN."""
    return images.float() * math.nan


def test_a_loss_that_stays_nan_stops_the_run_with_the_last_good_checkpoint(
    folder, tmp_path, capsys, monkeypatch
):
    interrupt_at(monkeypatch, 7, lambda: monkeypatch.setattr(train, "normalize", blind))
    run("--method", "mae", "--data", folder, "--out", tmp_path, "--epochs", 6, code=1)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "10 steps in a row, up to step 17" in error and "learning rate" in error
    saved = checkpoint(tmp_path)
    assert saved["step"] == 5 and all(value.isfinite().all() for value in saved["model"].values())


def test_a_step_that_is_not_finite_changes_no_weight_and_is_counted(folder, tmp_path, capsys, monkeypatch):
    seen, real_step, real_normalize = {}, train.forward_backward, train.normalize

    def watched(run, micro_batches, step):
        seen[step] = {name: value.clone() for name, value in run.model.state_dict().items()}
        monkeypatch.setattr(train, "normalize", blind if step == 7 else real_normalize)
        return real_step(run, micro_batches, step)

    monkeypatch.setattr(train, "forward_backward", watched)
    run("--method", "mae", "--data", folder, "--out", tmp_path, "--log-every", 1)
    assert all(torch.equal(seen[7][name], value) for name, value in seen[8].items())
    assert any(not torch.equal(seen[6][name], value) for name, value in seen[7].items())
    assert [row["skipped_steps"] for row in rows(tmp_path)] == [0] * 7 + [1] * 8
    assert [row["step"] for row in rows(tmp_path) if "loss" not in row] == [8]
    assert "1 of 15 steps were skipped" in capsys.readouterr().out


def test_a_short_fp16_run_may_skip_all_its_steps(folder, tmp_path, capsys, monkeypatch):
    """The scaler begins with a factor under which gradients overflow, and halves it step by step."""
    real = train.forward_backward
    monkeypatch.setattr(train, "forward_backward", lambda *args: {**real(*args), "grad_norm": math.inf})
    run("--method", "mae", "--data", folder, "--out", tmp_path, "--precision", "fp16", "--max-steps", 2)
    said = capsys.readouterr()
    assert "2 of 2 steps were skipped" in said.out and "the loss is not finite" not in said.err
    assert checkpoint(tmp_path)["step"] == 2


def test_weights_that_a_step_has_spoiled_are_not_saved(folder, tmp_path, capsys):
    """The loss of a step is that of the weights before it: good, though its rate of 1e12 has ruined them."""
    flags = ("--method", "mae", "--data", folder, "--lr", 1e12, "--warmup-epochs", 0)
    run(*flags, "--out", tmp_path / "a", "--max-steps", 1, code=1)
    error = capsys.readouterr().err
    assert (
        "the loss is not finite after step 1: not saved" in error
        and error.count("the last good checkpoint") == 1
    )
    assert not (tmp_path / "a" / "checkpoint.pt").exists() and not (tmp_path / "a" / "encoder.pt").exists()


def test_a_run_without_one_good_step_fails(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "normalize", blind)
    run("--method", "mae", "--data", folder, "--out", tmp_path, "--epochs", 1, code=1)
    assert "the loss is not finite after step 5 of 5" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("what", ["write_row", "curves", "picture_sheet"])
def test_a_failed_row_is_repeated_alone_by_the_next_start(
    what, reference, folder, tmp_path, capsys, monkeypatch
):
    """Between the save and the log, in the test, in a picture: nothing is lost, nothing trained twice."""
    flags = ("--method", "mixedae", "--data", folder, "--out", tmp_path, "--log-every", 2, "--val-images", 8)
    real, calls = getattr(train, what), []

    def fail_once(*args):
        calls.append(args)
        if len(calls) == (5 if what == "write_row" else 2):
            raise UserError("the disk is full")
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(train, what, fail_once)
        run(*flags, code=2 if what == "write_row" else 1)  # inside of it every mistake ends with 1
        one_line_at_the_end(capsys, "the disk is full")
    saved = checkpoint(tmp_path)
    assert saved["row_due"] and saved["step"] == {"write_row": 5}.get(what, 10)
    with monkeypatch.context() as patched:
        steps = []
        real_step = train.forward_backward
        patched.setattr(
            train, "forward_backward", lambda run, m, step: steps.append(step) or real_step(run, m, step)
        )
        run(*flags)
    assert steps == list(range(saved["step"], 15))
    assert same_weights(tmp_path, reference) and without_clock(rows(tmp_path)) == without_clock(
        rows(reference)
    )
    assert not checkpoint(tmp_path)["row_due"]


@pytest.mark.parametrize("where", ["the loop", "a loader process"])
def test_what_fails_unforeseen_is_a_traceback_and_ends_the_loaders_processes(
    where, folder, tmp_path, capsys, monkeypatch
):
    def fail(*images):
        raise RuntimeError("no such thing")

    if where == "the loop":
        interrupt_at(monkeypatch, 2, fail)
    else:
        monkeypatch.setattr(train, "train_transform", lambda args: fail)
    run("--data", folder, "--out", tmp_path, "--workers", 2, code=1)
    error = capsys.readouterr().err
    assert "RuntimeError: no such thing" in error and "Traceback" in error and ", in fail" in error
    deadline = time.time() + 30
    while multiprocessing.active_children() and time.time() < deadline:
        time.sleep(0.1)
    assert multiprocessing.active_children() == []


def test_a_second_ctrl_c_leaves_at_once_and_nohup_stays(monkeypatch):
    left, stop = [], []
    monkeypatch.setattr(os, "_exit", left.append)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with train.stop_signals(stop):
            for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
                signal.raise_signal(number)
            assert stop == [signal.SIGTERM, signal.SIGINT, signal.SIGTERM] and not left
            signal.raise_signal(signal.SIGINT)
            assert left == [130]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_training_set_that_changed_is_refused_but_a_finished_run_needs_it_no_more(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "set")
    flags = ("--method", "mae", "--data", tmp_path / "set", "--epochs", 1, "--out", tmp_path / "run")
    extra = tmp_path / "set" / "train" / "class1" / "new.png"

    def grow():
        shutil.copy(folder / "train" / "class0" / "00.png", extra)

    run(*flags, "--max-steps", 2)
    grow()
    capsys.readouterr()
    run(*flags, code=2)
    one_line(capsys, "it had 40 images and has 41")
    extra.unlink()
    (tmp_path / "set" / "train" / "class0").rename(tmp_path / "set" / "train" / "other")
    run(*flags, code=2)
    one_line(capsys, "it had 40 images and has 40, and the first class that differs is class0")
    (tmp_path / "set" / "train" / "other").rename(tmp_path / "set" / "train" / "class0")
    run(*flags)
    grow()
    run(*flags)
    assert "finished already" in capsys.readouterr().out


def test_max_steps_stops_and_saves_there_and_leaves_the_schedule_alone(reference, folder, tmp_path, capsys):
    flags = ("--method", "mixedae", "--data", folder, "--out", tmp_path, "--log-every", 2, "--val-images", 8)
    for steps in (4, 7):  # where a row is due, and where none is
        run(*flags, "--max-steps", steps)
        assert f"stopped after step {steps} of 15" in capsys.readouterr().out
        assert checkpoint(tmp_path)["step"] == steps and rows(tmp_path)[-1]["step"] == 2 * (steps // 2)
    run(*flags, "--max-steps", 7)  # nothing to do
    run(*flags)
    assert same_weights(tmp_path, reference)
    assert without_clock(rows(tmp_path)) == without_clock(rows(reference))


class Bare(torch.nn.Module):
    """The least that a method may have: `encoder`, `add_args`, `__init__`, `forward`."""

    @staticmethod
    def add_args(parser):
        parser.set_defaults(epochs=1)

    def __init__(self, args):
        super().__init__()
        self.encoder = vit.build_encoder(args)

    def forward(self, images):
        loss = self.encoder.features(images)["patches"].square().mean()
        return loss, {"size": loss.detach()}


@pytest.mark.parametrize("data_set", ["", "train/class0"])
def test_a_method_needs_no_pictures_numbers_or_export(data_set, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(train.METHODS, "bare", Bare)
    flags = ("--method", "bare", "--data", folder / data_set, "--out", tmp_path)
    run(*flags, "--mean", 0.5, 0.5, 0.5, "--std", 0.25, 0.25, 0.25)
    assert {"loss", "size", "grad_norm"} <= rows(tmp_path)[
        -1
    ].keys() and "finished" in capsys.readouterr().out
    assert (tmp_path / "pictures" / "epoch-0001.png").exists()  # where CLS looks
    info = vit.load_encoder(tmp_path / "encoder.pt")[1]
    assert (info["method"], info["feature"], info["mean"], info["std"]) == (
        "bare",
        "cls",
        [0.5] * 3,
        [0.25] * 3,
    )


def test_numbers_and_pictures_are_of_the_same_images_each_time(folder, tmp_path, monkeypatch):
    seen = {"numbers": [], "visualize": []}
    for name, calls in seen.items():
        real = getattr(train.METHODS["mixedae"], name)

        def watched(self, images, real=real, calls=calls):
            calls.append(images.clone())
            return real(self, images)

        monkeypatch.setattr(train.METHODS["mixedae"], name, watched)
    run("--method", "mixedae", "--data", folder, "--out", tmp_path, "--log-every", 2, "--val-images", 8)
    images, _ = data.fixed_images(data.open_sets(train.parse_args(["--data", str(folder)]))[1], (16, 16), 8)
    assert len(seen["numbers"]) == 9 and len(seen["visualize"]) == 3
    for calls in seen.values():
        assert all(torch.equal(call, data.normalize(images)) for call in calls)


def test_statistics_reach_the_model_the_pictures_and_the_file(folder, tmp_path, capsys):
    """Grey images stay grey, with one mean and one deviation for all channels."""
    for path in folder.rglob("*.png"):
        grey = tmp_path / "set" / path.relative_to(folder)
        grey.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("L").save(grey)
    flags = ("--method", "mae", "--data", tmp_path / "set", "--epochs", 1)
    run(*flags, "--out", tmp_path / "imagenet")
    assert "8 of 8 sampled images are grey" in capsys.readouterr().out
    run(*flags, "--out", tmp_path / "grey", "--mean", 0.5, 0.5, 0.5, "--std", 0.25, 0.25, 0.25)
    assert "grey" not in capsys.readouterr().out.splitlines()[3]
    assert vit.load_encoder(tmp_path / "grey" / "encoder.pt")[1]["mean"] == [0.5] * 3
    shown = np.array(Image.open(tmp_path / "grey" / "pictures" / "epoch-0001.png"))[40:, 4:260].astype(int)
    assert (shown == shown[..., :1]).all()  # image and visible patches


def test_the_default_batch_is_shared_by_the_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")  # without a rank there is one process
    assert train.parse_args([]).batch_size == 32
    monkeypatch.setenv("RANK", "0")
    for world, batch in ((1, 32), (2, 16), (8, 4), (16, 4)):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        assert train.parse_args([]).batch_size == batch
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert train.parse_args([]).workers == 1


def test_help_shows_the_flags_of_the_method(capsys):
    for method, flag in (
        ("mae", "--mask-ratio"),
        ("mixedae", "--mixing-ratio"),
        ("cae", "--align-weight"),
        ("dvae", "--kl-weight"),
    ):
        with pytest.raises(SystemExit) as left:
            train.main(["--method", method, "-h"])
        assert left.value.code == 0 and flag in capsys.readouterr().out
    with pytest.raises(UserError):
        train.parse_args(["--method", "mae", "--mixing-ratio", ".5"])


def test_the_default_warm_up_is_a_part_of_the_run():
    for program, flags, epochs, warmup in (
        (train, "--method mae", 3, 1),
        (train, "--method mae", 1, 1 / 3),
        (train, "--method mae", 100, 1),
        (finetune, "--protocol linear", 90, 10),
        (finetune, "--protocol linear", 9, 3),
        (finetune, "--protocol finetune", 2, 2 / 3),
        (dense, "--task segment", 5, 0.5),
        (dense, "--task detect", 1, 0.1),
    ):
        args = program.parse_args([*flags.split(), "--epochs", str(epochs)])
        assert args.warmup_epochs == pytest.approx(warmup)
        args = program.parse_args([*flags.split(), "--epochs", str(epochs), "--warmup-epochs", "40"])
        assert args.warmup_epochs == 40


def test_more_epochs_for_a_finished_run_start_from_its_weights(folder, tmp_path, capsys):
    flags = ("--method", "mae", "--data", folder, "--out", tmp_path / "run")
    run(*flags, "--epochs", 1)
    capsys.readouterr()
    run(*flags, "--epochs", 2, code=2)
    one_line(capsys, "epochs 1 (now 2)", f"--init {tmp_path / 'run' / 'checkpoint.pt'}")


def test_the_last_line_recommends_a_command_that_works(folder, tmp_path, capsys):
    """Without labels, or without images to test on, a probe on the same set would fail."""
    for data, words in ((folder, f"--data {folder}"), (folder / "train", "--data SET (labelled")):
        run("--method", "mae", "--data", data, "--epochs", 1, "--out", tmp_path / data.name)
        assert words in capsys.readouterr().out.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "flags",
    ["--batch-size 64", "--init nothing.pt", "--data nowhere", "--method cae --target dvae:nothing.pt"]
    + ["--mixing-ratio .3", "--topk 1e-9"],
)
def test_a_failed_start_leaves_no_folder(flags, folder, tmp_path):
    run("--method", "mixedae", "--data", folder, "--out", tmp_path / "run", *flags.split(), code=2)
    assert not (tmp_path / "run").exists()


def test_a_rank_without_companions(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    run("--method", "mae", "--data", folder, "--out", tmp_path / "run", code=2)
    one_line(capsys, "not WORLD_SIZE, MASTER_ADDR, MASTER_PORT", "unset RANK")
