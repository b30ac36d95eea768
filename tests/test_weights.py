"""Weights of all kinds of files: what is loaded is whole, finite and of the right kind, or one clear line
says what is wrong."""

import os
from functools import partial

import pytest
import torch

import cae
import conftest
import data
import finetune
import mrmae
import train
import vit
from conftest import randomize
from test_train import one_line
from vit import UserError, ViT

SPOILED = {  # what is wrong with a tensor -> the tensor, and a word of the line that answers it
    "nan": (lambda x: x * float("nan"), "not finite"),
    "inf": (lambda x: x + float("inf"), "not finite"),
    "sparse": (lambda x: x.to_sparse(), "is not a dense tensor"),
    "on no device": (lambda x: x.to("meta"), "is not a dense tensor"),
    "whole numbers": (lambda x: x.long(), "torch.int64"),
    "complex": (lambda x: x.to(torch.complex64), "torch.complex64"),
    "a list": (lambda x: x.tolist(), "is not a dense tensor"),
    "another shape": (lambda x: torch.cat([x, x]), "shape"),
    "missing": (lambda x: None, "missing"),
}
NAME = "blocks.0.mlp.fc1.weight"


def spoiled(weights, name, how):
    """A state dict in which one tensor is wrong."""
    value = SPOILED[how][0](weights[name])
    weights = {**weights, name: value}
    if value is None:
        del weights[name]
    return weights


@pytest.fixture(scope="module")
def packed():
    """The content of a tiny encoder.pt."""
    torch.manual_seed(0)
    return vit.pack_encoder(randomize(ViT((16, 16), 4, 32, 2, 2)), "mae", "cls", data.MEAN, data.STD)


@pytest.mark.parametrize("how", SPOILED)
def test_one_function_loads_all_weights(packed, how):
    encoder = ViT(**{key: value for key, value in packed["config"].items() if key != "kind"})
    vit.load_strictly(encoder, packed["state_dict"])
    with pytest.raises((ValueError, RuntimeError), match=f"(?i){SPOILED[how][1]}"):
        vit.load_strictly(encoder, spoiled(packed["state_dict"], NAME, how))
    with pytest.raises(RuntimeError, match="more"):
        vit.load_strictly(encoder, {**packed["state_dict"], "more": torch.zeros(1)})
    half = {name: value.half() for name, value in packed["state_dict"].items()}
    vit.load_strictly(encoder, half)  # another precision is no mistake


@pytest.mark.parametrize("how", ["nan", "sparse", "another shape"])
def test_every_reader_of_weights_uses_it(packed, how, tmp_path):
    word = SPOILED[how][1]
    bad = spoiled(packed["state_dict"], NAME, how)
    torch.save({**packed, "state_dict": bad}, tmp_path / "encoder.pt")
    torch.save({"model": bad}, tmp_path / "published.pth")
    args = train.parse_args(["--method", "mae", *conftest.TINY])
    model = train.METHODS["mae"](args)
    fine = finetune.parse_args(["--encoder", "x", "--heads", "2"])
    encoder = partial(finetune.replace_args, fine)
    readers = {
        "encoder.pt as encoder": lambda: finetune.open_encoder(encoder(encoder=own)),
        "published file as encoder": lambda: finetune.open_encoder(encoder(encoder=other)),
        "encoder.pt in one's own code": lambda: vit.load_encoder(own),
        "--init with an encoder.pt": lambda: train.load_weights(model, own),
        "--init with a published file": lambda: train.load_weights(model, other),
        "--teacher with an encoder.pt": lambda: mrmae.open_teacher(own, (4, 4)),
    }
    own, other = str(tmp_path / "encoder.pt"), str(tmp_path / "published.pth")
    for reader in readers.values():
        with pytest.raises(UserError, match=word):
            reader()


def test_a_teacher_and_a_tokenizer_are_checked_too(tmp_path):
    torch.manual_seed(0)
    weights = {"teacher": {f"backbone.{k}": v for k, v in ViT((32, 32), 8, 64, 2, 1).state_dict().items()}}
    torch.save(weights, tmp_path / "dino.pth")
    assert mrmae.open_teacher(f"dino:{tmp_path / 'dino.pth'}", (4, 4)).width == 64
    weights["teacher"]["backbone.norm.weight"][3] = float("nan")
    torch.save(weights, tmp_path / "dino.pth")
    with pytest.raises(UserError, match="norm.weight .*not finite"):
        mrmae.open_teacher(f"dino:{tmp_path / 'dino.pth'}", (4, 4))
    dvae = train.METHODS["dvae"](train.parse_args(["--method", "dvae", "--image-size", "16"]))
    content = dvae.export()
    next(iter(content["state_dict"].values())).fill_(float("inf"))
    torch.save(content, tmp_path / "tokenizer.pt")
    with pytest.raises(UserError, match="not finite"):
        cae.open_tokenizer(f"dvae:{tmp_path / 'tokenizer.pt'}")


@pytest.mark.parametrize("how", ["a whole wrong shape", "nan", "missing", "a list"])
def test_a_checkpoint_with_wrong_optimizer_states_is_refused(how, folder, tmp_path, capsys):
    """Fused AdamW would write beyond the end of a state that is too small."""
    run = partial(conftest.run, "--data", folder, "--out", tmp_path / "run")
    run("--method", "mae", "--epochs", 2, "--max-steps", 2)
    path = tmp_path / "run" / "checkpoint.pt"
    saved = torch.load(path)
    state = saved["optimizer"]["state"][0]
    if how == "a whole wrong shape":
        state["exp_avg"] = torch.zeros(1)
    elif how == "nan":
        state["exp_avg_sq"].fill_(float("nan"))
    elif how == "missing":
        del state["exp_avg"]
    else:
        state["exp_avg"] = state["exp_avg"].tolist()
    torch.save(saved, path)
    capsys.readouterr()
    run("--method", "mae", "--epochs", 2, code=2)
    one_line(capsys, "checkpoint.pt", "choose another --out")


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="no regular file"):
        vit.load_file(tmp_path / "pipe")


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "_orig_mod.", "module._orig_mod.backbone."])
def test_wrappers_come_off_for_init_and_teacher_too(prefix, tmp_path):
    torch.manual_seed(0)
    args = train.parse_args(["--method", "mae", *conftest.TINY])
    source, model = randomize(train.METHODS["mae"](args)), train.METHODS["mae"](args)
    weights = {f"{prefix}{name}": value for name, value in source.encoder.state_dict().items()}
    torch.save({"model": weights}, tmp_path / "published.pth")
    assert train.load_weights(model, tmp_path / "published.pth") == "the encoder"
    for name, value in source.encoder.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], value)


def test_dinov2_is_a_teacher(tmp_path):
    """Its mask token is not used, and it has layer scale."""
    torch.manual_seed(0)
    weights = dict(randomize(ViT((32, 32), 8, 64, 2, 1, layer_scale=1.0)).state_dict())
    weights["mask_token"] = torch.zeros(1, 64)
    torch.save(weights, tmp_path / "dinov2.pth")
    teacher = mrmae.open_teacher(f"dino:{tmp_path / 'dinov2.pth'}", (4, 4))
    assert teacher.vit.blocks[0].ls1.gamma.equal(weights["blocks.0.ls1.gamma"])


def test_the_line_says_which_weights_were_taken(packed, tmp_path, capsys):
    weights = packed["state_dict"]
    for key in ("state_dict_ema", "model_ema"):
        torch.save({"state_dict": weights, key: weights}, tmp_path / "timm.pth")
        args = finetune.parse_args(["--encoder", str(tmp_path / "timm.pth"), "--heads", "2"])
        finetune.open_encoder(args)
        assert f"state_dict, not {key}" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["dino", "clip"])
def test_an_encoder_of_ours_is_not_read_as_one_of_others(packed, kind, tmp_path):
    """No tensor shows its heads."""
    torch.save(packed, tmp_path / "encoder.pt")
    with pytest.raises(UserError, match=f"it is an encoder.pt of this project: give it without {kind}:"):
        mrmae.open_teacher(f"{kind}:{tmp_path / 'encoder.pt'}", (4, 4))


def test_clips_of_others_are_refused(tmp_path):
    """OpenCLIP's ViT-H has heads of 80: read with 64 it would give wrong features and no error."""
    weights = {
        "visual.class_embedding": torch.zeros(1280),
        "visual.positional_embedding": torch.zeros(5, 1280),
        "visual.conv1.weight": torch.zeros(1280, 3, 8, 8),
    }
    torch.save(weights, tmp_path / "h.pt")
    with pytest.raises(UserError, match="width 1280.*OpenAI"):
        mrmae.open_teacher(f"clip:{tmp_path / 'h.pt'}", (4, 4))


@pytest.mark.parametrize(
    "mean, std",
    [([0.5] * 2, [0.5] * 3), ([float("nan")] * 3, [0.5] * 3), ([123.7, 116.3, 103.5], [58.4, 57.1, 57.4])]
    + [([0.5] * 3, [0.0, 0.5, 0.5]), ([0.5] * 3, [float("inf")] * 3), ([0.5] * 3, "abc"), (None, [0.5] * 3)],
)
def test_statistics_of_a_file_are_of_images_between_0_and_1(mean, std, packed):
    with pytest.raises(UserError, match="not an encoder.pt"):
        vit.unpack_encoder({**packed, "mean": mean, "std": std})


@pytest.mark.parametrize(
    "flags", ["--mean nan nan nan", "--mean 123.7 116 103", "--mean 0 0 -1", "--std 0 1 1"]
)
@pytest.mark.parametrize("program", [train, finetune])
def test_statistics_as_flags(program, flags, capsys):
    flags = f"{flags} --std .5 .5 .5" if "mean" in flags else f"--mean .5 .5 .5 {flags}"
    conftest.run(*flags.split(), main=program.main, defaults=(), code=2)
    one_line(capsys, "must be a number from")
