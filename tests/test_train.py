"""The loop: schedule, groups, resume, signals, guards, files, bad input."""
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import data
import train
import vit
from conftest import TINY, build, run
from vit import UserError


def checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def without_clock(rows):
    return [{key: value for key, value in row.items() if key not in ("images_per_s", "data_wait", "memory_mb")} for row in rows]


def same_weights(a, b):
    a, b = checkpoint(a), checkpoint(b)
    moments = [torch.equal(a["optimizer"]["state"][i][key], value) for i, state in b["optimizer"]["state"].items() for key, value in state.items()]
    return a["step"] == b["step"] and all(torch.equal(a["model"][name], value) for name, value in b["model"].items()) and all(moments)


@pytest.fixture(scope="module")
def reference(folder, tmp_path_factory):
    """An undisturbed run of 15 steps, for those that compare with it."""
    out = tmp_path_factory.mktemp("reference") / "run"
    run("--method", "mixedae", "--data", folder, "--out", out, "--log-every", 2, "--val-images", 8)
    return out


def interrupt_at(monkeypatch, step, what):
    """Call what() just before that optimizer step."""
    real = train.optimizer_step

    def step_or_interrupt(run, micro_batches, number, stop_asked):
        if number == step:
            what()
        return real(run, micro_batches, number, stop_asked)

    monkeypatch.setattr(train, "optimizer_step", step_or_interrupt)


def test_schedule_is_linear_warm_up_then_half_a_cosine():
    assert train.lr_at(0, 1.0, 5, 100) == 0 and train.lr_at(2.5, 1.0, 5, 100) == 0.5 and train.lr_at(5, 1.0, 5, 100) == 1
    assert train.lr_at(52.5, 1.0, 5, 100) == pytest.approx(0.5) and train.lr_at(100, 1.0, 5, 100) == pytest.approx(0)
    assert train.lr_at(30, 1.0, 5, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi * 25 / 95)))


def test_weight_decay_spares_biases_and_one_dimensional_parameters():
    model = build("mixedae")
    args = train.parse_args(["--weight-decay", "0.07", "--beta2", "0.9", *TINY])
    decayed, plain = train.build_optimizer(model, args).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.07 and plain["weight_decay"] == 0 and decayed["betas"] == (0.9, 0.9) and decayed["fused"]
    assert {"encoder.cls_token", "decoder.mask_token", "segments", "encoder.blocks.0.attn.qkv.weight"} <= {names[id(p)] for p in decayed["params"]}
    assert all(names[id(p)].endswith(".bias") or p.ndim == 1 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names) - 2  # all but the two fixed position tables


def test_the_learning_rate_rule(folder, tmp_path, capsys):
    run("--data", folder, "--out", tmp_path / "a", "--epochs", 1, "--blr", 1.5e-4, "--accumulate", 2)
    assert "= 16; learning rate 9.375e-06 (blr 0.00015 x 16 / 256)" in capsys.readouterr().out
    run("--data", folder, "--out", tmp_path / "b", "--epochs", 1, "--blr", 1.5e-4, "--lr", 0.01)
    assert "learning rate 0.01 (--lr)" in capsys.readouterr().out


def test_a_run_folder_holds_what_was_promised(reference, folder):
    log = rows(reference)
    assert [row["step"] for row in log] == [2, 4, 5, 6, 8, 10, 12, 14, 15]
    expected = {"step", "epoch", "lr", "loss", "recon", "homocon", "homocon_floor", "grad_norm", "images_per_s", "data_wait", "memory_mb", "accuracy", "accuracy_layers"}
    assert all(expected | ({"val_loss"} if row["step"] % 5 == 0 else set()) == row.keys() for row in log)
    assert log[0]["loss"] == pytest.approx(log[0]["recon"] + 0.1 * log[0]["homocon"], rel=1e-5)
    facts = json.loads((reference / "args.json").read_text())
    assert facts["torch"] == torch.__version__ and facts["width"] == 32 and "--log-every 2" in facts["command"] and "commit" in facts
    assert sorted(os.listdir(reference / "pictures")) == ["curves.png", "epoch-0001.png", "epoch-0002.png", "epoch-0003.png"]
    encoder, info = vit.load_encoder(reference / "encoder.pt")
    assert info["method"] == "mixedae" and encoder.features(torch.randn(1, 3, 16, 16))["patches"].shape == (1, 16, 32)


def test_the_log_of_shapes_says_how_much_attention_falls_on_the_objects(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHAPES_TRAIN", 16)
    for method in [name for name, kind in train.METHODS.items() if not hasattr(kind, "export_file")]:
        more = ("--teacher", tmp_path / "mae" / "encoder.pt") if method == "mrmae" else ()
        run("--method", method, *more, "--data", "shapes", "--out", tmp_path / method, "--epochs", 1, "--log-every", 1, "--val-images", 16)
        first, last = rows(tmp_path / method)
        assert "object_attention" not in first  # at the end of an epoch alone
        encoder, _ = vit.load_encoder(tmp_path / method / "encoder.pt")
        images, regions = data.some_images(data.Shapes((16, 16), "val", 2000), (16, 16), 16)
        masks = regions > 0
        assert (tmp_path / method / "pictures" / "patches-0001.png").exists()
        attention = encoder.features(data.normalize(images), attention=True)["attention"].mean(1)[:, 0, 1:]
        on_object = sum(attention[b, l] * masks[b, 4 * (l // 4) :, 4 * (l % 4) :][:4, :4].float().mean() for b in range(16) for l in range(16))
        assert last["object_attention"] == pytest.approx((on_object / attention.sum()).item(), abs=2e-3)
        assert last["object_area"] == pytest.approx(masks.float().mean().item(), abs=1e-5)


def test_draw_makes_the_pictures_of_given_images_with_the_runs_own_flags(reference, folder, tmp_path, capsys):
    images = [str(path) for path in sorted((folder / "val").glob("*/*.png"))]
    before = {file: (reference / file).read_bytes() for file in ("checkpoint.pt", "log.jsonl", "args.json")}
    train.main(["--method", "mixedae", "--out", str(reference), "--device", "cpu", "--draw", *images])  # sizes come from the checkpoint
    path = reference / "pictures" / f"draw-{images[0][-6:-4]}.png"
    said = capsys.readouterr().out
    assert said.startswith(f"{path}: step 15, accuracy ")
    pixels = np.array(Image.open(path))
    assert pixels.shape == (34 + 4 + 8 * 132, 4 + 5 * 132, 3)  # a row an image; panels: image, mixed, who, reconstruction, attention
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
    run("--method", "mixedae", "--out", tmp_path, "--draw", *images[:4], "--beside", reference / "encoder.pt")
    wider = np.array(Image.open(tmp_path / "pictures" / path.name))
    assert wider.shape[1] == pixels.shape[1] + 132
    own, beside = wider[38:, -264:-132], wider[38:, -132:]
    assert np.abs(own[:, :128].astype(int) - beside[:, :128]).max() <= 2  # the same encoder as the run's
    torch.save(vit.pack_encoder(vit.ViT((16, 16), 4, 24, 1, 2, class_token=False), "mae", "mean", (0,) * 3, (1,) * 3), tmp_path / "without.pt")
    run("--method", "mixedae", "--out", tmp_path, "--draw", *images[:4], "--beside", tmp_path / "without.pt", code=2)
    one_line(capsys, "--beside", "no class token")
    run("--method", "mixedae", "--beside", tmp_path / "without.pt", code=2)
    one_line(capsys, "--beside goes with --draw")
    (tmp_path / "checkpoint.pt").unlink()
    assert before == {file: (reference / file).read_bytes() for file in before}
    for flags, words in ((images[:3], "multiple of 4"), (images[:6], "the last 2 make no whole group"), (images * 9, "64 at most"), ([__file__] * 4, "cannot be read as an image"),
                         (["nothing.png"] * 4, "nothing.png: cannot be read")):
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
    bias = vit.load_encoder(reference / "encoder.pt")[0].patch_embed.proj.bias
    run("--method", "mixedae", "--data", folder, "--out", reference, "--log-every", 2, "--val-images", 8, "--segment-export", "none")  # exports anew
    assert torch.allclose(vit.load_encoder(reference / "encoder.pt")[0].patch_embed.proj.bias, bias - checkpoint(reference)["model"]["segments"][0], atol=1e-6)
    run("--method", "mixedae", "--data", folder, "--out", reference, "--log-every", 2, "--val-images", 8)
    assert len(rows(reference)) == 9 and (reference / "checkpoint.pt").stat().st_mtime_ns == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resumed_run_equals_the_one_never_stopped(reference, folder, tmp_path, monkeypatch, number):
    flags = ("--method", "mixedae", "--data", folder, "--out", tmp_path, "--log-every", 2, "--val-images", 8)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 6, lambda: os.kill(os.getpid(), number))
        run(*flags, code=128 + number)
    assert checkpoint(tmp_path)["step"] in (7, 8)
    (tmp_path / "log.jsonl").open("a").write('{"step": 9, "loss": 1.0}\n{"step": 10, "lo')  # rows after it, and one cut short
    run(*flags, "--workers", 2)  # any number of workers
    assert same_weights(tmp_path, reference) and without_clock(rows(tmp_path)) == without_clock(rows(reference))


def test_accumulation_takes_contiguous_slices(folder, tmp_path):
    """MAE's loss is a mean over images: two micro-batches of 4 give the gradient of one of 8, for given masks."""
    args = train.parse_args(["--method", "mae", *TINY])
    device = train.start_processes(args)
    try:
        run_ = train.build_run(args, 8, device)
        images, mask = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8), torch.rand(8, 16).argsort(1) < 12
        real, masks = run_.model.predict, iter([mask, mask[:4], mask[4:]])
        run_.model.predict = lambda images, _: real(images, next(masks))
        norms = []
        for micro_batches in ([images], [images[:4], images[4:]]):
            train.forward_backward(run_, [(part, None) for part in micro_batches], 0)
            norms.append([p.grad.clone() for p in run_.model.parameters() if p.requires_grad])
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*norms))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("flags", [("--recompute",), ("--precision", "bf16"), ("--precision", "fp16"), ("--blr", 1e-3), ("--image-size", 16, 24), ("--seed", 5)])
def test_flags_train(folder, tmp_path, flags):
    run("--method", "mixedae", "--data", folder, "--out", tmp_path, "--epochs", 2, *flags)
    losses = [row["loss"] for row in rows(tmp_path)]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)


def test_recompute_changes_nothing(reference, folder, tmp_path):
    run("--method", "mixedae", "--data", folder, "--out", tmp_path, "--log-every", 2, "--val-images", 8, "--recompute")
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
    assert torch.equal(model.encoder.pos_embed, vit.resize_positions(source["encoder.pos_embed"], (4, 4), (8, 8)))
    for flags, words in ((("--depth", 3), "depth 2 .here 3"), (("--heads", 4), "heads 2 .here 4"), (("--patch-size", 2, "--image-size", 8), "patch_size")):
        for file in ("checkpoint.pt", "encoder.pt"):
            with pytest.raises(UserError, match=words):
                train.load_weights(build("mae", *flags), reference / file)
    golden = torch.load(os.path.join(os.path.dirname(__file__), "golden/mae_tiny.pt"), weights_only=True)
    torch.save({"model": golden["state_dict"]}, tmp_path / "mae.pth")
    sizes = "--image-size 32 --width 48 --depth 2 --heads 4 --decoder-width 32 --decoder-depth 2 --decoder-heads 4".split()
    for method in ("mae", "mixedae"):
        model = build(method, *sizes)
        train.load_weights(model, tmp_path / "mae.pth")
        assert torch.equal(model.encoder.cls_token, golden["state_dict"]["cls_token"])
        assert torch.equal(model.decoder.mask_token, golden["state_dict"]["mask_token"]) == (method == "mae")
    encoder_only = {name: value for name, value in golden["state_dict"].items() if not name.startswith(("decoder", "mask"))}
    torch.save({"model": encoder_only}, tmp_path / "encoder_only.pth")
    assert train.load_weights(build("mae", *sizes), tmp_path / "encoder_only.pth") == "the encoder"
    torch.save({"model": {**encoder_only, "cls_token": torch.zeros(1, 1, 8)}}, tmp_path / "odd.pth")
    del encoder_only["blocks.1.mlp.fc1.weight"]
    torch.save({"model": encoder_only}, tmp_path / "holes.pth")
    torch.save({"model": {**golden["state_dict"], "blocks.0.ls1.gamma": torch.ones(48)}}, tmp_path / "more.pth")  # an encoder that computes something else
    torch.save({"model": 3}, tmp_path / "number.pth")
    torch.save([1], tmp_path / "list.pth")
    torch.save({"state_dict": [1]}, tmp_path / "no-names.pth")
    for file, words in (("odd.pth", "cls_token .1, 1, 8."), ("holes.pth", "no encoder.blocks.1.mlp.fc1.weight"), ("more.pth", "blocks.0.ls1.gamma, which is not here"),
                        *((f"{name}.pth", "holds no weights by name") for name in ("number", "list", "no-names"))):
        with pytest.raises(UserError, match=words):
            train.load_weights(build("mixedae", *sizes), tmp_path / file)
    run("--method", "mae", "--data", folder, "--out", tmp_path / "run", "--init", tmp_path / "mae.pth", code=2)
    error = capsys.readouterr().err
    assert "does not fit this MAE" in error and error.count("\n") == 1


def test_benchmark_prints_a_line_a_method(capsys):
    run("--method", "mixedae", "--benchmark", "mae", "mae --mask-ratio .5")
    lines = capsys.readouterr().out.splitlines()
    assert "TFLOP/s" in lines[0] and [line.split(":")[0] for line in lines[1:]] == ["mixedae", "mae", "mae --mask-ratio .5"]
    assert all(word in line for line in lines[1:] for word in ("images/s", "ms/step", "MB", "GFLOP", "%"))


# --------------------------------------------------------------------------------------------------------------------
# What goes wrong
# --------------------------------------------------------------------------------------------------------------------
class Hostile:
    def __reduce__(self):
        return (os.system, ("touch hostile-file-ran",))


def one_line(capsys, *words):
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines


@pytest.mark.parametrize("flags, words", [
    (["--method", "mea"], "mae"), (["--size", "giant"], "large"), (["--data", "imagenot"], "neither a set"), (["--epoch", "3"], "unrecognized"),
    (["--batch-size", "0"], "at least 1"), (["--batch-size", "two"], "batch-size"), (["--epochs", "0"], "at least 1"), (["--crop-scale", ".5", ".2"], "MIN <= MAX"),
    (["--image-size", "18"], "multiple of the patch size 4"), (["--image-size", "1", "2", "3"], "one number or two"), (["--mixing-ratio", ".3"], "1/n"),
    (["--method", "mae", "--mask-ratio", "1"], "at least 1 must stay visible"), (["--method", "mae", "--mask-ratio", "0"], "at least 1 be hidden"), (["--width", "0"], "at least 1"),
    (["--lr", "0"], "out of range"), (["--blr", "nan"], "out of range"), (["--beta2", "1.5"], "out of range"), (["--weight-decay", "-1"], "out of range"),
    (["--seed", "99999999999999999999"], "out of range"), (["--patch-size", "0"], "at least 1"), (["--topk", "nan"], "at least 1 key"), (["--temperature", "0"], "above 0"),
    (["--projector-width", "0"], "at least 1"), (["--method", "mae", "--mask-ratio", "nan"], "at least 1"), (["--benchmark", "mae'"], "quotation"),
    *([] if torch.cuda.is_available() else [(["--device", "cuda"], "CUDA")]), (["--batch-size", "48"], "larger than the set of 40"), (["--init", "nothing.pt"], "no such file"), (["--out", "/proc/run"], "cannot be written"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)
def test_mistakes_get_one_line_and_code_2(flags, words, folder, tmp_path, capsys):
    run("--data", folder, "--out", tmp_path / "run", *flags, code=2)
    one_line(capsys, words)


def test_an_empty_folder(tmp_path, capsys):
    run("--data", tmp_path, "--out", tmp_path / "run", code=2)
    one_line(capsys, "no images")


def test_the_same_run_with_changed_flags(reference, folder, capsys):
    facts = (reference / "args.json").read_text()
    run("--method", "mixedae", "--data", folder, "--out", reference, "--log-every", 2, "--val-images", 8, "--epochs", 4, "--lr", 1e-3, code=2)
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
    for content, words in ((whole[: len(whole) // 2], "truncated"), (b"", "truncated"), ((reference / "encoder.pt").read_bytes(), "not a checkpoint")):
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
    holder = subprocess.Popen([sys.executable, "-c", f"""
import fcntl, sys
file = open({str(tmp_path / '.lock')!r}, "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()"""], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    run("--data", folder, "--out", tmp_path, code=2)
    one_line(capsys, "another process")
    holder.kill()
    holder.wait()
    run("--data", folder, "--out", tmp_path, "--epochs", 1)  # a dead holder holds nothing


def test_a_full_disk_while_saving_keeps_the_last_good_checkpoint(reference, folder, tmp_path, capsys, monkeypatch):
    flags = ("--method", "mixedae", "--data", folder, "--out", tmp_path, "--log-every", 2, "--val-images", 8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 7, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, limits[1])))  # epoch 1 is saved; encoder.pt still fits
        try:
            run(*flags, code=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    output = capsys.readouterr()
    assert "checkpoint.pt could not be written" in output.err and checkpoint(tmp_path)["step"] == 5
    assert rows(tmp_path)[-1]["step"] == 15 and not list(tmp_path.glob("*.tmp"))  # it trained on
    run(*flags)
    assert same_weights(tmp_path, reference)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the picture of a NaN
def test_a_learning_rate_that_blows_up_stops_with_the_last_good_checkpoint(folder, tmp_path, capsys, monkeypatch):
    flags = ("--method", "mae", "--data", folder, "--out", tmp_path, "--epochs", 6)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 7, lambda: patched.setattr(train, "normalize", lambda images: images.float() * float("nan")))
        run(*flags, code=1)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "10 steps in a row, up to step 17" in error and "learning rate" in error
    saved = checkpoint(tmp_path)
    assert saved["step"] == 5 and all(value.isfinite().all() for value in saved["model"].values())
    run("--method", "mae", "--data", folder, "--out", tmp_path / "wild", "--epochs", 20, "--lr", 1e30, code=1)


def test_a_step_that_is_not_finite_changes_no_weight(folder, tmp_path):
    args = train.parse_args(["--method", "mae", *TINY, "--warmup-epochs", "0"])
    device = train.start_processes(args)
    try:
        run_ = train.build_run(args, 8, device)
        before = {name: value.clone() for name, value in run_.model.state_dict().items()}
        images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
        run_.model.decoder.pred.register_forward_hook(lambda module, inputs, output: output * float("inf"))
        values, finite = train.optimizer_step(run_, [(images, None)], 0, False)
        assert not finite and all(torch.equal(before[name], value) for name, value in run_.model.state_dict().items())
    finally:
        torch.distributed.destroy_process_group()


def test_what_fails_unforeseen_ends_the_loaders_processes_too(folder, tmp_path, capsys, monkeypatch):
    def fail():
        raise RuntimeError("out of memory")

    interrupt_at(monkeypatch, 2, fail)
    run("--data", folder, "--out", tmp_path, "--workers", 2, code=1)
    assert "RuntimeError: out of memory" in capsys.readouterr().err
    import multiprocessing

    deadline = time.time() + 30
    while multiprocessing.active_children() and time.time() < deadline:
        time.sleep(0.1)
    assert multiprocessing.active_children() == []


def test_help_shows_the_flags_of_the_method(capsys):
    for method, flag in (("mae", "--mask-ratio"), ("mixedae", "--mixing-ratio"), ("cae", "--align-weight"), ("dvae", "--kl-weight")):
        with pytest.raises(SystemExit) as left:
            train.main(["--method", method, "-h"])
        assert left.value.code == 0 and flag in capsys.readouterr().out
    with pytest.raises(UserError):
        train.parse_args(["--method", "mae", "--mixing-ratio", ".5"])
