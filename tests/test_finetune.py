"""Fine-tuning and probing: encoders of every layout, heads, optimizers, metrics, the transfer sets in their
own formats, whole runs."""

import argparse
import csv
import json
import math
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.testing import assert_close

import conftest
import data
import finetune
import mrmae
import train
import vit
from conftest import randomize
from test_cae import official
from test_train import Hostile, interrupt_at, one_line, rows
from vit import UserError, ViT

QUICK = "--workers 0 --device cpu --epochs 2 --batch-size 8".split()
run = partial(conftest.run, main=finetune.main, defaults=QUICK)


def parse(*flags):
    return finetune.parse_args([*QUICK, *map(str, flags)])


def vit_of(width=192, depth=2, heads=3, size=(32, 32), patch=8, **options):
    return randomize(ViT(size, patch, width, depth, heads, **options)).eval()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny encoder.pt of mean features."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "encoder.pt"
    torch.save(vit.pack_encoder(vit_of(32, 2, 2, (16, 16), 4), "mixedae", "mean", data.MEAN, data.STD), path)
    return path


def classifier(
    protocol, *flags, classes=3, multi_label=False, fc_norm=None, feature="cls", model=None, method="mae"
):
    args = parse("--protocol", protocol, *flags)
    info = {"method": method, "feature": feature, "mean": data.MEAN, "std": data.STD}
    return finetune.Classifier(
        model or vit_of(32, 2, 2, (16, 16), 4), info, fc_norm, args, classes, multi_label
    )


# ------------------------------------------------------------------------------------------------------------
# Encoders
# ------------------------------------------------------------------------------------------------------------
def layouts(weights):
    """The same ViT as it lies in published files."""
    heads = {"head.weight": torch.randn(10, 192), "head.bias": torch.randn(10)}
    decoder = {
        "mask_token": torch.randn(1, 1, 64),
        "decoder_pos_embed": torch.randn(1, 17, 64),
        "decoder_blocks.0.attn.qkv.weight": torch.randn(192, 64),
    }
    mean_pooled = {
        name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: value
        for name, value in weights.items()
    }
    wrapped = {f"module.backbone.{name}": value for name, value in weights.items()}
    return {
        "mae_pretrain": {"model": {**weights, **decoder}},
        "mae_finetuned": {"model": {**mean_pooled, **heads}, "args": argparse.Namespace(lr=1)},
        "dino": weights,
        "dino_full": {
            "student": {},
            "teacher": {
                **{f"backbone.{k}": v for k, v in weights.items()},
                "head.last_layer.weight_v": torch.randn(4, 4),
            },
            "epoch": 3,
        },
        "timm": {**weights, **heads},
        "compiled": {"state_dict": {f"_orig_mod.module.{name}": value for name, value in weights.items()}},
        "wrapped": {"state_dict": wrapped},
        "model.encoder": {f"model.encoder.{name}": value for name, value in weights.items()},
    }


@pytest.mark.parametrize(
    "name",
    ["mae_pretrain", "mae_finetuned", "dino", "dino_full", "timm", "compiled", "wrapped", "model.encoder"],
)
def test_published_layouts_give_the_features_that_their_names_imply(name, tmp_path, capsys):
    model, images = vit_of(), torch.randn(2, 3, 32, 32)
    torch.save(layouts(model.state_dict())[name], tmp_path / "file.pth")
    loaded, info, fc_norm = finetune.open_encoder(
        parse("--protocol", "linear", "--encoder", tmp_path / "file.pth")
    )
    assert loaded.config == model.config  # 3 heads, from a table of widths
    assert info["feature"] == ("mean" if name == "mae_finetuned" else "cls")
    assert_close(loaded.eval().features(images)["patches"], model.features(images)["patches"])
    said = capsys.readouterr().out
    others = {"mae_pretrain": 3, "mae_finetuned": 2, "dino_full": 1, "timm": 2}.get(name, 0)
    assert f"{len(model.state_dict())} tensors of the encoder, {others} others" in said
    assert (fc_norm is not None) == ("fc_norm stands for norm" in said) == (name == "mae_finetuned")


def test_a_mean_pooled_fine_tuned_file_fills_the_new_layer_norm(tmp_path, capsys):
    model = vit_of()
    torch.save(layouts(model.state_dict())["mae_finetuned"], tmp_path / "file.pth")
    args = parse("--protocol", "finetune", "--encoder", tmp_path / "file.pth")
    loaded, info, fc_norm = finetune.open_encoder(args)
    assert "fills a new LayerNorm" in capsys.readouterr().out
    assert torch.equal(
        finetune.Classifier(loaded, info, fc_norm, args, 3, False).fc_norm.bias, model.norm.bias
    )


@pytest.mark.parametrize("name", ["mae", "cae", "cae-vs-mae"])
def test_a_files_name_does_not_decide_whether_positions_are_trained(name, tmp_path):
    """CAE's layout shows by its tensors: its positions stay fixed, all others are trained, also when the
    fine-tuned encoder is fine-tuned again."""
    for content, heads, trained in ((vit_of().state_dict(), 3, True), (official(48, 48), 4, False)):
        path = tmp_path / f"{name}.pth"
        torch.save({"model": content}, path)
        for _ in range(2):
            args = parse("--protocol", "finetune", "--encoder", path, "--heads", heads)
            model = finetune.Classifier(*finetune.open_encoder(args), args, 3, False)
            assert model.encoder.pos_embed.requires_grad == trained
            path = tmp_path / "encoder.pt"
            test_set = argparse.Namespace(classes=["a", "b", "c"])
            task = finetune.Task(args, model, torch.device("cpu"), None, None, test_set, "top1")
            torch.save(task.export(), path)


def test_encoders_that_do_not_fit_are_named(tmp_path):
    weights = vit_of().state_dict()
    missing = {name: value for name, value in weights.items() if name != "blocks.1.mlp.fc2.bias"}
    odd_width = vit_of(48, 1, 3).state_dict()
    for content, words in (
        ({"model": missing}, "Missing key.*blocks.1.mlp.fc2.bias"),
        ({**weights, "blocks.0.attn.q_norm.weight": torch.ones(64)}, "Unexpected key.*q_norm.weight"),
        ({**weights, "cls_token": torch.zeros(1, 1, 8)}, "size mismatch for cls_token"),
        ({"a": torch.zeros(1)}, "no Vision Transformer"),
        ([1, 2], "no weights by name"),
        ({0: torch.zeros(1)}, "no Vision Transformer"),
        ({**weights, "pos_embed": torch.zeros(3)}, "no Vision Transformer"),
        ({"config": "x", "state_dict": {}}, "not a whole encoder.pt"),
        ({"config": {"kind": "vit"}, "state_dict": {}}, "not a whole encoder.pt"),
        ({"config": vit_of().config, "state_dict": missing, "feature": "cls"}, "blocks.1.mlp.fc2.bias"),
        ({"model": weights, "optimizer": {}, "args": {}, "step": 1}, "give the encoder.pt"),
        (odd_width, "give --heads"),
        ({"model": Hostile()}, "not opened"),
    ):
        torch.save(content, tmp_path / "file.pth")
        with pytest.raises(UserError, match=words):
            finetune.open_encoder(parse("--encoder", tmp_path / "file.pth"))
    torch.save(odd_width, tmp_path / "file.pth")
    assert (
        finetune.open_encoder(parse("--encoder", tmp_path / "file.pth", "--heads", 3))[0].config["heads"] == 3
    )
    torch.save(weights, tmp_path / "file.pth")
    for flags, words in (
        (("--patch-size", 16), "--patch-size 16: .* has 8"),
        (("--width", 8), "has 192"),
        (("--size", "base"), "of its own"),
    ):
        with pytest.raises(UserError, match=words):
            finetune.open_encoder(parse("--encoder", tmp_path / "file.pth", *flags))


@pytest.mark.parametrize("size", [(384, 384), (320, 192)])
def test_other_image_sizes_resize_the_position_table(size, tmp_path):
    model = vit_of(32, 1, 2, (224, 224), 16)
    torch.save(vit.pack_encoder(model, "mae", "cls", data.MEAN, data.STD), tmp_path / "encoder.pt")
    loaded, _, _ = finetune.open_encoder(parse("--encoder", tmp_path / "encoder.pt", "--image-size", *size))
    images = torch.randn(1, 3, *size)
    assert_close(
        loaded.eval().features(images)["patches"], model.features(images)["patches"]
    )  # the old one resizes at each call
    assert loaded.pos_embed.shape[1] == 1 + size[0] * size[1] // 256


MCMAE = torch.load(Path(__file__).parent / "golden" / "mcmae_tiny64.pt", weights_only=True)


@pytest.mark.parametrize("fine_tuned", [False, True])
def test_mcmaes_published_layout(fine_tuned, tmp_path, capsys, monkeypatch):
    state = dict(MCMAE["state_dict"])
    if fine_tuned:  # the authors' fine-tuning drops decoders and fusion, and renames the last LayerNorm
        state = {
            name.replace("norm.", "fc_norm.", 1) if name.startswith("norm.") else name: value
            for name, value in state.items()
            if not name.startswith(("decoder", "mask_token", "stage"))
        } | {"head.weight": torch.randn(10, 48), "head.bias": torch.randn(10)}
    torch.save({"model": state}, tmp_path / "mcmae.pth")
    args = parse("--protocol", "linear", "--encoder", tmp_path / "mcmae.pth", "--heads", 4)
    loaded, info, fc_norm = finetune.open_encoder(args)
    assert (
        "MCMAE layout, " in capsys.readouterr().out
        and info["feature"] == "mean"
        and (fc_norm is not None) == fine_tuned
    )
    assert (
        loaded.config["stem"] == {"widths": [16, 24], "depths": [1, 1], "mlp_ratios": [2.0, 3.0]}
        and loaded.config["class_token"] is False
    )
    monkeypatch.setitem(vit.SIZES, "golden", (48, 2, 4, 32, 2, 4))
    ratios = dict(mlp_ratios=[2, 3], decoder_mlp_ratio=2)
    monkeypatch.setitem(vit.STEM_SIZES, "golden", dict(widths=[16, 24], depths=[1, 1], depth=2, **ratios))
    whole = mrmae.MAE(train.parse_args("--method mae --stem conv --size golden".split()))
    whole.load_state_dict(mrmae.from_official_mcmae(MCMAE["state_dict"]))
    images = MCMAE["images"]
    assert_close(
        loaded.eval().features(images)["patches"], whole.encoder.features(images)["patches"]
    )  # without fusion
    bigger = finetune.open_encoder(
        parse("--encoder", tmp_path / "mcmae.pth", "--heads", 4, "--image-size", 96, 64)
    )[0]
    assert bigger.pos_embed.shape == (1, 24, 48) and bigger.features(torch.randn(1, 3, 96, 64))[
        "patches"
    ].shape == (1, 24, 48)
    with pytest.raises(UserError, match="no class token; use mean"):
        finetune.Classifier(
            loaded, info, fc_norm, parse("--protocol", "linear", "--feature", "cls"), 3, False
        )
    torch.save(
        {"model": {name: value for name, value in state.items() if name != "blocks1.0.conv2.bias"}},
        tmp_path / "mcmae.pth",
    )
    with pytest.raises(UserError, match="Missing key.*patch_embed.blocks1.0.conv2.bias"):
        finetune.open_encoder(args)


def conv_encoder(class_token=True):
    stem = {"widths": [8, 12], "depths": [1, 2], "mlp_ratios": [2.0, 2.0]}
    return randomize(ViT((32, 32), 16, 32, 3, 2, class_token=class_token, stem=stem)).eval()


def test_conv_stages_learn_at_the_lowest_rate_and_share_the_drop_path():
    model = classifier("finetune", "--drop-path", 0.5, model=conv_encoder())
    groups = finetune.layer_decay_groups(model, 0.5, 0.05)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    names = dict(model.named_parameters())
    assert {
        scale[id(p)]
        for name, p in names.items()
        if name.startswith(("encoder.patch_embed", "encoder.pos_embed", "encoder.cls_token"))
    } == {0.5**4}
    assert (
        scale[id(names["encoder.blocks.0.norm1.weight"])] == 0.5**3 and scale[id(names["head.weight"])] == 1
    )
    assert [
        block.drop_path for block in model.encoder.modules() if hasattr(block, "drop_path")
    ] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    x = torch.randn(8, 8, 4, 4)
    block = model.encoder.patch_embed.blocks1[0].train()
    block.drop_path = 1 - 1e-6
    assert torch.equal(block(x), x)  # both branches skipped


def test_no_encoder_is_a_random_one_of_train_pys_sizes():
    made, info, _ = finetune.open_encoder(
        parse("--encoder", "none", "--image-size", 32, "--patch-size", 4, "--depth", 3)
    )
    assert (
        made.config["image_size"] == [32, 32]
        and len(made.blocks) == 3
        and made.width == 128
        and info["method"] == "random"
    )


def test_image_statistics_can_be_given(encoder):
    for name in ("none", encoder):
        assert finetune.open_encoder(parse("--encoder", name))[1]["mean"] == list(data.MEAN)
        info = finetune.open_encoder(
            parse("--encoder", name, "--mean", 0.5, 0.5, 0.5, "--std", 0.4, 0.4, 0.4)
        )[1]
        assert (info["mean"], info["std"]) == ([0.5] * 3, [0.4] * 3)  # timm's augreg files


def test_an_encoder_file_loads_strictly_into_timm(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed; it is not required")
    model = vit_of(192, 12, 3, (224, 224), 16)
    other = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    other.load_state_dict(vit.pack_encoder(model, "mae", "cls", data.MEAN, data.STD)["state_dict"])
    images = torch.randn(1, 3, 224, 224)
    assert_close(
        other.forward_features(images),
        torch.cat([model.features(images)[key] for key in ("cls", "patches")], dim=1),
        atol=1e-4,
        rtol=1e-4,
    )


# ------------------------------------------------------------------------------------------------------------
# Heads and optimizers
# ------------------------------------------------------------------------------------------------------------
def test_fine_tuning_reads_the_mean_of_raw_patch_tokens_through_a_new_layer_norm():
    model = randomize(classifier("finetune")).eval()
    images, raw = torch.randn(2, 3, 16, 16), {}
    model.encoder.blocks[-1].register_forward_hook(lambda module, inputs, output: raw.update(x=output))
    logits = model.logits(images)
    pooled = raw["x"][:, 1:].mean(1)
    mean, var = pooled.mean(-1, keepdim=True), pooled.var(-1, unbiased=False, keepdim=True)
    normed = (pooled - mean) / (var + 1e-6).sqrt() * model.fc_norm.weight + model.fc_norm.bias
    assert_close(logits, normed @ model.head.weight.T + model.head.bias)
    assert model.encoder.pos_embed.requires_grad and isinstance(model.encoder.norm, torch.nn.Identity)
    for method in ("cae", "cae-finetune"):  # CAE's code keeps the positions fixed
        assert not classifier("finetune", method=method).encoder.pos_embed.requires_grad
    model = randomize(classifier("finetune", "--feature", "cls")).eval()
    assert_close(model.logits(images), model.head(model.encoder.features(images)["cls"][:, 0]))
    loss, _ = classifier("finetune").train()(images, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(math.log(3), abs=1e-3)  # the head starts near zero (std 2e-5)


def test_drop_path_rises_linearly_and_drops_whole_branches():
    model = classifier("finetune", "--drop-path", 0.4, model=vit_of(32, 5, 2, (16, 16), 4))
    assert [block.drop_path for block in model.encoder.blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    block, x = model.encoder.blocks[-1].train(), torch.randn(2000, 5, 32)
    branch = block.drop(x)
    kept = branch.flatten(1).any(1)
    assert abs(kept.float().mean() - 0.6) < 0.05 and torch.allclose(branch[kept], x[kept] / 0.6)
    assert torch.equal(block.eval().drop(x), x)


@pytest.mark.parametrize("protocol, feature", [("linear", "cls"), ("linear", "mean"), ("attentive", "cls")])
def test_probes_leave_the_encoder_alone_and_use_running_statistics_at_test_time(protocol, feature):
    model = classifier(protocol, feature=feature)
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    model.train()
    assert not model.encoder.training and model.head.training
    images, labels = torch.randn(8, 3, 16, 16), torch.randint(3, (8,))
    optimizer = finetune.build_optimizer(model, parse("--protocol", protocol))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for _ in range(3):
        optimizer.zero_grad()
        model(images, labels)[0].backward()
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.encoder.state_dict().items())
    assert all(p.grad is not None and p.grad.any() for p in model.head.parameters())
    model.eval()
    assert_close(model.logits(images)[:1], model.logits(images[:1]))  # a sample does not depend on its batch
    out = model.encoder.features(images)
    if protocol == "linear":
        x = out["cls"][:, 0] if feature == "cls" else out["patches"].mean(1)
        norm, fc = model.head
        assert_close(
            model.logits(images),
            (x - norm.running_mean) / (norm.running_var + 1e-6).sqrt() @ fc.weight.T + fc.bias,
        )


def test_the_attentive_head_one_query_and_head_at_a_time():
    head, patches = finetune.AttentiveHead(8, 2, 3).eval(), torch.randn(2, 5, 8)
    head.attn.record = True
    head(patches)
    # A query of zeros looks everywhere alike.
    assert_close(head.attn.recorded, torch.full((2, 2, 1, 5), 0.2))
    randomize(head)
    q = head.attn.q(head.norm_q(head.query))[0, 0]
    for b in range(2):
        k, v, pooled = head.attn.k(head.norm_k(patches[b])), head.attn.v(head.norm_v(patches[b])), []
        for part in (slice(0, 4), slice(4, 8)):
            weights = torch.stack([q[part] @ k[l, part] / 2 for l in range(5)]).softmax(0)
            pooled.append(sum(w * v[l, part] for l, w in enumerate(weights)))
        x = head.attn.proj(torch.cat(pooled))
        expected = head.fc((x - head.norm.running_mean) / (head.norm.running_var + 1e-5).sqrt())
        assert_close(head(patches)[b], expected, atol=1e-5, rtol=1e-5)


def test_layer_decay_groups():
    model = classifier("finetune", model=vit_of(32, 3, 2, (16, 16), 4))
    groups = finetune.layer_decay_groups(model, 0.5, 0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {
        names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]
    }
    assert found.keys() == {name for name, p in model.named_parameters()}
    for name, expected in {
        "encoder.cls_token": (1 / 16, 0),
        "encoder.pos_embed": (1 / 16, 0),
        "encoder.patch_embed.proj.weight": (1 / 16, 0.05),
        "encoder.patch_embed.proj.bias": (1 / 16, 0),
        "encoder.blocks.0.attn.qkv.weight": (1 / 8, 0.05),
        "encoder.blocks.2.norm1.weight": (1 / 2, 0),
        "encoder.blocks.2.mlp.fc1.weight": (1 / 2, 0.05),
        "fc_norm.weight": (1, 0),
        "head.weight": (1, 0.05),
        "head.bias": (1, 0),
    }.items():
        assert found[name] == expected, name


def test_lars_against_its_formula():
    torch.manual_seed(1)
    w, b = torch.randn(3, 4, requires_grad=True), torch.randn(3, requires_grad=True)
    optimizer = finetune.LARS([w, b], lr=0.5, weight_decay=0.1)
    slow, mu = [w.detach().double().clone(), b.detach().double().clone()], [0.0, 0.0]
    for step in range(4):
        gradients = [torch.randn(3, 4), torch.zeros(3) if step == 2 else torch.randn(3)]
        w.grad, b.grad = gradients
        optimizer.param_groups[0]["lr"] = 0.5 / (step + 1)
        optimizer.step()
        for i, g in enumerate(g.double() for g in gradients):
            if i == 0:
                g = g + 0.1 * slow[0]
                g = g * 0.001 * slow[0].norm() / g.norm()
            mu[i] = 0.9 * mu[i] + g
            slow[i] = slow[i] - 0.5 / (step + 1) * mu[i]
    assert_close(w.detach().double(), slow[0], atol=1e-6, rtol=1e-5)
    assert_close(b.detach().double(), slow[1], atol=1e-6, rtol=1e-5)
    zero = torch.zeros(2, 2, requires_grad=True)
    zero.grad = torch.ones(2, 2)
    finetune.LARS([zero], lr=1.0).step()  # no trust ratio where the weight is zero
    assert (zero == -1).all()


def test_the_schedule_ends_at_the_smallest_rate():
    assert train.lr_at(100, 1.0, 5, 100, 0.1) == pytest.approx(0.1) and train.lr_at(5, 1.0, 5, 100, 0.1) == 1
    assert train.lr_at(52.5, 1.0, 5, 100, 0.1) == pytest.approx(0.55) and train.lr_at(
        1, 1.0, 5, 100, 0.1
    ) == pytest.approx(0.2)  # no floor in warm-up


def test_augmented_batches():
    info, images, labels = (
        {"mean": data.MEAN, "std": data.STD},
        torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8),
        torch.arange(8) % 4,
    )
    off = ("--mixup", 0, "--cutmix", 0, "--erasing", 0)
    x, targets = finetune.augmented(
        images, labels, parse("--protocol", "finetune", *off, "--smoothing", 0.2), info, 4, False
    )
    assert_close(x, data.normalize(images))
    assert_close(targets[1], torch.tensor([0.05, 0.85, 0.05, 0.05]))  # s / K off, 1 - s + s / K on
    x, targets = finetune.augmented(
        images, labels, parse("--protocol", "finetune", "--erasing", 0), info, 4, False
    )
    assert_close(targets.sum(1), torch.ones(8))
    assert not torch.equal(x, data.normalize(images))
    boxes = set()
    x, _ = finetune.augmented(
        images,
        labels,
        parse("--protocol", "finetune", "--mixup", 0, "--cutmix", 0, "--erasing", 1),
        info,
        4,
        False,
    )
    for changed in (x != data.normalize(images)).any(1):
        ys, xs = changed.nonzero(as_tuple=True)
        boxes.add((ys.min().item(), xs.min().item(), ys.max().item(), xs.max().item()))
    assert len(boxes) > 4  # image by image


def test_erasing_replaces_one_box_an_image_by_noise():
    images = torch.zeros(2000, 3, 20, 30)
    changed = finetune.erase(images, 0.25) != images
    assert (changed == changed[:, :1]).all()  # all channels together
    erased = changed[:, 0][changed.any(dim=(1, 2, 3))]  # (erased images, 20, 30)
    assert abs(len(erased) / len(images) - 0.25) < 0.04
    h, w = erased.any(2).sum(1), erased.any(1).sum(1)
    assert torch.equal(erased.sum((1, 2)), h * w)  # a box
    share = h * w / 600
    assert share.min() > 0.01 and share.max() < 0.36 and abs(share.mean() - 0.175) < 0.02
    assert (h > 2 * w).any() and (w > 2 * h).any()
    assert erased.any(0).all()  # boxes may lie anywhere
    noise = finetune.erase(images, 1.0)
    noise = noise[noise != 0]
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert torch.equal(finetune.erase(images, 0.0), images)


# ------------------------------------------------------------------------------------------------------------
# Metrics
# ------------------------------------------------------------------------------------------------------------
def test_metrics_on_a_case_counted_by_hand():
    scores = torch.eye(3)[torch.tensor([0, 0, 0, 1, 2, 2])]
    labels = torch.tensor([0, 0, 1, 1, 2, 0])
    assert finetune.confusion_matrix(scores.argmax(1), labels, 3).tolist() == [
        [2, 0, 1],
        [1, 1, 0],
        [0, 0, 1],
    ]
    results = finetune.compute_metrics(scores, labels, "mean_per_class")
    assert results["top1"] == pytest.approx(100 * 4 / 6) and results["mean_per_class"] == pytest.approx(
        100 * (2 / 3 + 1 / 2 + 1) / 3
    )


def test_average_precision_at_eleven_recalls():
    scores, positive = (
        torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]),
        torch.tensor([True, False, True, False, False]),
    )
    # recall .5 at precision 1, recall 1 at precision 2/3: six levels (0 .. .5) of 1, five of 2/3
    assert finetune.average_precision_11(scores, positive) == pytest.approx((6 + 5 * 2 / 3) / 11)
    ranking = torch.tensor(
        [True] + [False] * 5 + [True] * 9
    )  # 10 positives: recall .1 at precision 1, recall 1 at precision 10 / 15
    assert finetune.average_precision_11(torch.arange(15, 0, -1), ranking) == pytest.approx(
        (2 + 9 * 10 / 15) / 11
    )  # exact recalls count
    perfect = torch.randn(40, 3)
    assert finetune.compute_metrics(perfect, (perfect > 0.3).float(), "map11")["map11"] == pytest.approx(100)


def test_nearest_neighbours_one_by_one():
    train_x, test_x, labels = torch.randn(30, 6), torch.randn(7, 6), torch.randint(3, (30,))
    votes = finetune.nearest_neighbours(train_x, labels, test_x, 3, k=5)
    for i in range(7):
        similar = torch.stack([torch.nn.functional.cosine_similarity(test_x[i], x, dim=0) for x in train_x])
        expected = torch.zeros(3)
        for j in similar.argsort(descending=True)[:5]:
            expected[labels[j]] += math.exp(similar[j] / 0.07)
        assert_close(votes[i], expected, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------
# Sets
# ------------------------------------------------------------------------------------------------------------
def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def make_aircraft(root):
    base = root / "fgvc-aircraft-2013b" / "data"
    write(base / "variants.txt", "707-320\nA310 long\n")
    write(base / "images_variant_trainval.txt", "001 707-320\n002 A310 long\n003 707-320\n")
    write(base / "images_variant_test.txt", "004 A310 long\n")
    for i in range(1, 5):
        picture(base / "images" / f"{i:03d}.jpg", i)
    return [0, 1, 0], [1]


def make_caltech101(root):  # Ericsson et al.'s lists have a label behind each path, and the background too
    pytest.importorskip("scipy", reason="scipy is not installed; torchvision's Caltech101 needs it")
    base = root / "caltech101"
    for c, name in enumerate(("BACKGROUND_Google", "Faces", "accordion")):
        for i in range(1, 4):
            picture(base / "101_ObjectCategories" / name / f"image_{i:04d}.jpg", 10 * c + i)
    (base / "Annotations").mkdir()
    write(
        base / "train.txt",
        "accordion/image_0001.jpg 2\nBACKGROUND_Google/image_0001.jpg 0\n"
        "Faces/image_0002.jpg 1\nFaces/image_0003.jpg 1\n",
    )
    write(base / "test.txt", "accordion/image_0003.jpg 2\n")
    return [1, 0, 0], [1]


def make_cars(root):
    io = pytest.importorskip("scipy.io", reason="scipy is not installed; torchvision's StanfordCars needs it")
    base = root / "stanford_cars"

    def annotations(entries):
        return np.array(entries, dtype=[("fname", object), ("class", np.int64)])

    (base / "devkit").mkdir(parents=True)
    io.savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(["Audi", "BMW"], dtype=object)})
    io.savemat(
        base / "devkit" / "cars_train_annos.mat",
        {"annotations": annotations([("1.jpg", 2), ("2.jpg", 1), ("3.jpg", 1)])},
    )
    io.savemat(
        base / "cars_test_annos_withlabels.mat", {"annotations": annotations([("1.jpg", 1), ("2.jpg", 2)])}
    )
    for split, count in (("train", 3), ("test", 2)):
        for i in range(1, count + 1):
            picture(base / f"cars_{split}" / f"{i}.jpg", i)
    return [1, 0, 0], [0, 1]


def make_dtd(root):
    base = root / "dtd" / "dtd"
    for split, lines in (
        ("train", "banded/a.jpg\ndotted/a.jpg\n"),
        ("val", "banded/b.jpg\ndotted/b.jpg\n"),
        ("test", "dotted/c.jpg\nbanded/c.jpg\n"),
    ):
        write(base / "labels" / f"{split}1.txt", lines)
        for line in lines.split():
            picture(base / "images" / line)
    return [0, 1, 0, 1], [1, 0]


def make_flowers(root):
    io = pytest.importorskip("scipy.io", reason="scipy is not installed; torchvision's Flowers102 needs it")
    base = root / "flowers-102"
    for i in range(1, 7):
        picture(base / "jpg" / f"image_{i:05d}.jpg", i)
    io.savemat(base / "imagelabels.mat", {"labels": np.array([[1, 2, 1, 2, 102, 1]])})
    io.savemat(
        base / "setid.mat",
        {"trnid": np.array([[1, 2]]), "valid": np.array([[3, 5]]), "tstid": np.array([[4, 6]])},
    )
    return [0, 1, 0, 101], [1, 0]


def make_food(root):
    base = root / "food-101"
    write(
        base / "meta" / "train.json",
        json.dumps({"apple_pie": ["apple_pie/1", "apple_pie/2"], "sushi": ["sushi/1"]}),
    )
    write(base / "meta" / "test.json", json.dumps({"apple_pie": ["apple_pie/3"], "sushi": ["sushi/2"]}))
    for name in ("apple_pie/1", "apple_pie/2", "apple_pie/3", "sushi/1", "sushi/2"):
        picture(base / "images" / f"{name}.jpg")
    return [0, 0, 1], [0, 1]


def make_pets(root):
    base = root / "oxford-iiit-pet"
    write(base / "annotations" / "trainval.txt", "Abyssinian_1 1 1 1\nbeagle_1 2 2 1\n")
    write(base / "annotations" / "test.txt", "beagle_2 2 2 1\nAbyssinian_2 1 1 1\n")
    for name in ("Abyssinian_1", "beagle_1", "Abyssinian_2", "beagle_2"):
        picture(base / "images" / f"{name}.jpg")
    return [0, 1], [1, 0]


def make_sun397(root):
    base = root / "SUN397"
    write(base / "ClassName.txt", "/a/abbey\n/a/apartment_building/outdoor\n")
    for name in (
        "a/abbey/sun_a",
        "a/abbey/sun_b",
        "a/apartment_building/outdoor/sun_c",
        "a/apartment_building/outdoor/sun_d",
    ):
        picture(base / f"{name}.jpg")
    write(base / "Training_01.txt", "/a/abbey/sun_a.jpg\n/a/apartment_building/outdoor/sun_c.jpg\n")
    write(base / "Testing_01.txt", "/a/apartment_building/outdoor/sun_d.jpg\n/a/abbey/sun_b.jpg\n")
    return [0, 1], [1, 0]


def make_voc2007(root):
    base = root / "VOCdevkit" / "VOC2007"
    shown = {
        "000001": [("dog", 0), ("person", 0)],
        "000002": [("cat", 0), ("dog", 1)],
        "000003": [("person", 0)],
    }
    for name, objects in shown.items():
        picture(base / "JPEGImages" / f"{name}.jpg")
        inside = "".join(
            f"<object><name>{thing}</name><difficult>{difficult}</difficult></object>"
            for thing, difficult in objects
        )
        write(base / "Annotations" / f"{name}.xml", f"<annotation>{inside}</annotation>")
    write(base / "ImageSets" / "Main" / "trainval.txt", "000001\n000002\n")
    write(base / "ImageSets" / "Main" / "test.txt", "000003\n")

    def labels(*things):
        return [float(name in things) for name in finetune.VOC_CLASSES]

    return [labels("dog", "person"), labels("cat")], [labels("person")]  # a difficult dog does not count


MAKERS = {
    "aircraft": make_aircraft,
    "caltech101": make_caltech101,
    "cars": make_cars,
    "dtd": make_dtd,
    "flowers": make_flowers,
    "food": make_food,
    "pets": make_pets,
    "sun397": make_sun397,
    "voc2007": make_voc2007,
}


def test_every_set_of_table_2_has_a_stand_in():
    assert {*MAKERS, "cifar10", "cifar100"} == {*finetune.SETS, "cifar10", "cifar100"} and len(MAKERS) == 9


@pytest.mark.parametrize("name", MAKERS)
def test_transfer_sets_in_their_own_format(name, tmp_path, monkeypatch):
    expected = MAKERS[name](tmp_path)
    monkeypatch.setattr(
        torchvision.datasets.Flowers102, "_check_integrity", lambda self: True
    )  # it wants the true files' checksums
    args = parse("--data", name, "--data-root", tmp_path)
    with pytest.raises(UserError, match="is it complete"):  # the real set's sizes are asserted
        finetune.open_labelled(name, args)
    sizes = (4, 1) if name == "caltech101" else tuple(map(len, expected))  # of the lists
    monkeypatch.setitem(finetune.SETS, name, finetune.SETS[name]._replace(sizes=sizes))
    sets = finetune.open_labelled(name, args)
    for found, labels in zip(sets, expected):
        assert found.labels == labels
        image, label = found[0]
        assert image.shape == (3, 20, 24) and image.dtype == torch.uint8 and label == labels[0]
    assert sets[2] == {
        "voc2007": "map11",
        **dict.fromkeys(("aircraft", "caltech101", "flowers", "pets"), "mean_per_class"),
    }.get(name, "top1")


def test_turned_photographs_of_transfer_sets_stand_upright(tmp_path, monkeypatch):
    make_pets(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (24, 20), "red").save(
        tmp_path / "oxford-iiit-pet" / "images" / "Abyssinian_1.jpg", exif=exif
    )
    monkeypatch.setitem(finetune.SETS, "pets", finetune.SETS["pets"]._replace(sizes=(2, 2)))
    train_set, _, _ = finetune.open_labelled("pets", parse("--data-root", tmp_path))
    assert train_set[0][0].shape == (3, 24, 20) and train_set[1][0].shape == (3, 20, 24)


def test_sets_that_are_not_there_say_what_to_do(tmp_path):
    for name in finetune.SETS:
        with pytest.raises(UserError, match="looked below") as raised:
            finetune.open_labelled(name, parse("--data-root", tmp_path))
        assert (
            "\n" not in str(raised.value)
            and (finetune.SETS[name].by_hand or "--download") in str(raised.value)
            or "scipy" in str(raised.value)
        )


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    for module in ("scipy", "scipy.io"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "stanford_cars").mkdir()
    with pytest.raises(UserError, match="pip install scipy"):
        finetune.open_labelled("cars", parse("--data-root", tmp_path))


def test_fewer_labels_of_each_class(folder):
    whole, _, _ = finetune.open_labelled(str(folder), parse())
    part, _, _ = finetune.open_labelled(str(folder), parse("--label-fraction", 0.2))
    labels = part.labels
    assert len(whole) == 40 and labels.count(0) == labels.count(1) == 4
    again, _, _ = finetune.open_labelled(str(folder), parse("--label-fraction", 0.2))
    chosen = [[j for _, j, _ in dataset.samples] for dataset in (part, again)]
    assert chosen[0] == chosen[1]


def test_testing_counts_every_sample_once(folder):
    dataset = finetune.open_labelled(str(folder), parse())[0]
    device = train.start_processes(parse())
    try:
        for batch_size in (7, 64):
            args = parse("--batch-size", batch_size)
            samples = finetune.EvalDataset(dataset, [20, 20])
            out = finetune.predict_dataset(
                lambda images: images.float().mean(dim=(2, 3)), samples, args, device
            )
            expected = torch.stack([dataset[i][0].float().mean(dim=(1, 2)) for i in range(40)])
            assert_close(out, expected)
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------
# Whole runs
# ------------------------------------------------------------------------------------------------------------
def fine_tuned_features_agree(run_folder, cls):
    """encoder.pt of a fine-tuning holds its encoder; the LayerNorm of mean features as its last one."""
    encoder, info = vit.load_encoder(run_folder / "encoder.pt")
    saved = vit.load_file(run_folder / "checkpoint.pt")["model"]
    name = "encoder.norm.bias" if cls else "fc_norm.bias"
    return (
        info["feature"] == ("cls" if cls else "mean")
        and info["method"].endswith("-finetune")
        and torch.equal(encoder.norm.bias, saved[name])
        and torch.equal(encoder.pos_embed, saved["encoder.pos_embed"])
    )


@pytest.mark.parametrize(
    "flags",
    [
        ("finetune",),
        ("linear",),
        ("linear", "--cache-features", "--feature", "mean"),
        ("attentive",),
        ("attentive", "--cache-features"),
        ("finetune", "--mixup", 0, "--cutmix", 0, "--randaugment", 0, "--drop-path", 0, "--feature", "cls"),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_every_protocol_runs_and_writes_what_was_promised(flags, encoder, folder, tmp_path, capsys):
    if flags[0] == "finetune" and len(flags) > 1:  # once with convolution stages
        encoder = tmp_path / "conv.pt"
        torch.save(vit.pack_encoder(conv_encoder(), "mrmae", "mean", data.MEAN, data.STD), encoder)
    run("--protocol", *flags, "--encoder", encoder, "--data", folder, "--out", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {"top1", "best_top1"} | ({"knn_top1"} if "--cache-features" in flags else set()) == results.keys()
    log = rows(tmp_path / "run")
    assert (
        [row["step"] for row in log] == [5, 10]
        and results["top1"] == pytest.approx(log[-1]["top1"])
        and results["best_top1"] == max(row["top1"] for row in log)
    )
    table = list(csv.reader((tmp_path / "run" / "confusion.csv").open()))
    assert (
        table[0][1:] == ["class0", "class1"]
        and sum(int(value) for line in table[1:] for value in line[1:]) == 8
    )
    assert sum(int(table[i + 1][i + 1]) for i in range(2)) / 8 == pytest.approx(results["top1"] / 100)
    pictures = os.listdir(tmp_path / "run" / "pictures")
    if flags[0] == "finetune":
        assert fine_tuned_features_agree(tmp_path / "run", "cls" in flags)
    assert ("attention.png" in pictures) == (flags[0] == "attentive")
    capsys.readouterr()
    run(
        "--evaluate",
        tmp_path / "run",
        tmp_path / "run",
        "--predict",
        folder / "val",
        "--out",
        tmp_path / "out",
    )
    predicted = list(csv.reader((tmp_path / "out" / "predictions.csv").open()))
    assert (
        predicted[0] == ["file", "class", "probability"]
        and len(predicted) == 9
        and all(0.5 <= float(line[2]) <= 1 for line in predicted[1:])
    )
    right = sum(line[1] in line[0] for line in predicted[1:])
    assert 100 * right / 8 == pytest.approx(results["best_top1"])  # best.pt, an ensemble with itself
    run("--evaluate", tmp_path / "run", "--out", tmp_path / "out")  # on the set that it was trained for
    assert f"top1 {results['best_top1']:.2f}" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text())["top1"] == pytest.approx(
        results["best_top1"]
    )
    assert {"confusion.csv", "predictions.csv"} <= set(os.listdir(tmp_path / "out"))


@pytest.mark.parametrize(
    "protocol", [("finetune",), ("attentive",), ("linear", "--cache-features")], ids=" ".join
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(protocol, encoder, folder, tmp_path, monkeypatch):
    flags = (
        "--protocol",
        *protocol,
        "--encoder",
        encoder if protocol != ("linear", "--cache-features") else "none",
        "--data",
        folder,
        "--log-every",
        2,
    )
    if "none" in flags:
        flags += ("--image-size", 16, "--patch-size", 4)  # a random encoder is the same one each time
    run(*flags, "--out", tmp_path / "whole")
    with monkeypatch.context() as patched:
        interrupt_at(patched, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(*flags, "--out", tmp_path / "stopped", code=128 + signal.SIGTERM)
    assert not (tmp_path / "stopped" / "results.json").exists()
    run(*flags, "--out", tmp_path / "stopped", "--workers", 2)
    a, b = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"]
        for name in ("whole", "stopped")
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (tmp_path / "whole" / "results.json").read_text() == (
        tmp_path / "stopped" / "results.json"
    ).read_text()


def test_one_image_is_a_batch_where_no_batchnorm_is(encoder, folder, tmp_path):
    flags = ("--protocol", "finetune", "--encoder", encoder, "--data", folder, "--batch-size", 1)
    run(*flags, "--epochs", 1, "--max-steps", 2, "--log-every", 1, "--out", tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2] and rows(tmp_path)[1]["loss"] > 0


def test_broken_training_images_are_left_out_of_cached_features(
    encoder, folder, tmp_path, monkeypatch, capsys
):
    """A broken test image counts as a black one."""
    shutil.copytree(folder, tmp_path / "set")
    for broken in ("train/class1/03.png", "val/class0/40.png"):
        (tmp_path / "set" / broken).write_bytes(b"no image")
    cached, cache_features = [], finetune.cache_features

    def spy(*args, **options):
        cached.append(cache_features(*args, **options))
        return cached[-1]

    monkeypatch.setattr(finetune, "cache_features", spy)
    for protocol in ("linear", "attentive"):
        cached.clear()
        flags = ("--protocol", protocol, "--cache-features", "--epochs", 1, "--encoder", encoder)
        run(*flags, "--data", tmp_path / "set", "--out", tmp_path / protocol)
        (train_x, train_y), (test_x, test_y) = (samples.tensors for samples in cached)
        assert len(train_x) == len(train_y) == 39 and train_y.tolist().count(1) == 19
        assert len(test_x) == len(test_y) == 8 and test_x.isfinite().all() and train_x.isfinite().all()
        said = capsys.readouterr()
        assert "39 training and 8 test images" in said.out
        assert "03.png (cannot identify image file) is broken; it is left out" in said.err
        assert "40.png (cannot identify image file) is broken; it counts as a black image" in said.err
    whole, _, _ = finetune.open_labelled(str(folder), parse())
    labels = [label for i, label in enumerate(whole.labels) if "03.png" not in whole.name(i)]
    assert train_y.tolist() == labels  # each feature keeps its own label

    # Other flags are refused before the long work.
    cached.clear()
    run(*flags, "--data", tmp_path / "set", "--out", tmp_path / protocol, "--seed", 1, code=2)
    assert "other flags: seed 0 (now 1)" in capsys.readouterr().err and not cached


def test_several_sets_make_a_row(encoder, folder, tmp_path, capsys, monkeypatch):
    make_voc2007(tmp_path)
    monkeypatch.setitem(finetune.SETS, "voc2007", finetune.SETS["voc2007"]._replace(sizes=(2, 1)))
    run(
        "--encoder",
        encoder,
        "--data",
        folder,
        "voc2007",
        "--data-root",
        tmp_path,
        "--out",
        tmp_path / "runs",
        "--batch-size",
        2,
        "--epochs",
        1,
    )
    last = capsys.readouterr().out.strip().splitlines()[-3:]
    assert last[:2] == [f"| {folder} | voc2007 | Avg. |", "|---|---|---|"] and len(last[2].split("|")) == 5
    assert sorted(os.listdir(tmp_path / "runs")) == sorted(
        [f"mixedae-linear-{folder.name}", "mixedae-linear-voc2007"]
    )
    run(
        "--evaluate",
        tmp_path / "runs" / "mixedae-linear-voc2007",
        "--predict",
        tmp_path / "VOCdevkit" / "VOC2007" / "JPEGImages",
        "--out",
        tmp_path,
    )
    predicted = [line[:2] for line in csv.reader((tmp_path / "predictions.csv").open())][1:]
    assert (
        len({name for name, _ in predicted}) == 3 and len(predicted) >= 3
    )  # many classes an image, each likelier than not; the best in any case


def test_probes_tell_apart_what_can_be_told_apart(encoder, tmp_path):
    for split, count in (("train", 40), ("val", 20)):
        for i in range(count):
            level = 60 if i % 2 else 190
            path = tmp_path / split / ("dark" if i % 2 else "light") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(
                np.random.default_rng(i).normal(level, 20, (16, 16, 3)).clip(0, 255).astype(np.uint8)
            ).save(path)
    for flags in (("linear", "--cache-features"), ("attentive", "--cache-features"), ("finetune",)):
        run(
            "--protocol",
            *flags,
            "--encoder",
            encoder,
            "--data",
            tmp_path,
            "--out",
            tmp_path / flags[0],
            "--epochs",
            20,
        )
        results = json.loads((tmp_path / flags[0] / "results.json").read_text())
        assert results["top1"] == 100 and results.get("knn_top1", 100) == 100, flags


def test_mistakes_get_one_line(encoder, folder, tmp_path, capsys):
    (tmp_path / "one" / "train" / "only").mkdir(parents=True)
    (tmp_path / "one" / "val" / "only").mkdir(parents=True)
    for split in ("train", "val"):
        picture(tmp_path / "one" / split / "only" / "a.png")
        picture(tmp_path / "flat" / split / "a.png")
        picture(tmp_path / "other" / split / "both" / "a.png")
        picture(tmp_path / "other" / split / split / "a.png")
    flags = ("--encoder", encoder, "--data", folder, "--out", tmp_path / "good")
    run(*flags, "--epochs", 1, "--warmup-epochs", 10)
    assert "warm-up of 10 epochs is longer than half of the run" in capsys.readouterr().out
    best = tmp_path / "good" / "best.pt"
    run("--evaluate", best, "--data", folder / "val", "--out", tmp_path / "out")  # test images alone
    capsys.readouterr()
    for flags, words in (
        (("--data", tmp_path / "flat"), "has no labels"),
        (("--data", tmp_path / "one"), "one class only"),
        (("--data", tmp_path / "other"), "different classes"),
        (("--data", folder / "train"), "no test images"),
        (("--data", "nowhere"), "neither a set"),
        (("--data", folder, tmp_path / "x" / folder.name), "would share a folder"),
        (("--evaluate", best, "--data", folder, "cars"), "one set at a time"),
        (("--evaluate", best, "--out", Path(best).parent), "holds a run, whose results --evaluate would"),
        (("--evaluate", best, "--image-size", 32), "leave the flag out"),
        (("--evaluate", best, "--feature", "cls"), "leave the flag out"),
        (("--evaluate", best, "--mean", 0, 0, 0, "--std", 1, 1, 1), "leave the flag out"),
        (("--evaluate", tmp_path), "no such file"),
        (("--evaluate", encoder), "not a best.pt"),
        (("--predict", folder), "goes with --evaluate"),
        (("--encoder", "nothing.pt"), "no such file"),
        (("--encoder", folder / "train" / "class0" / "00.png"), "not opened"),
        (("--encoder", tmp_path), "is a directory"),
        (("--encoder", best), "not an encoder"),
        (("--patch-size", 8), "has 4"),
        (("--image-size", 1, 2, 3), "one number or two"),
        (("--batch-size", 1), "BatchNorm needs at least 2"),
        (("--crop-scale", 1, 0.2), "needs 0 < MIN <= MAX <= 1"),
        (("--crop-scale", 0, 1), "needs 0 < MIN <= MAX <= 1"),
        (("--protocol", "lineal"), "invalid choice"),
        (("--drop-path", 0.1), "unrecognized"),
        (("--label-fraction", 0), "must be a number from"),
        (("--protocol", "finetune", "--layer-decay", 2), "must be a number from 1e-06 to 1"),
        (("--mean", 0.5, 0.5, 0.5), "give both"),
        (("--std", 1, 0, 1), "must be a number from 0.001"),
        (("--mean", 0, 0, 0, "--std", "nan", 1, 1), "must be a number from 0.001"),
    ):
        run("--encoder", encoder, "--data", folder, "--out", tmp_path / "run", *flags, code=2)
        one_line(capsys, words)


# ------------------------------------------------------------------------------------------------------------
# --objects
# ------------------------------------------------------------------------------------------------------------
def test_shares_of_attention_on_an_object():
    """Four patches in a row, the object on two and a half of them; queries are CLS and the patches."""
    boxed = torch.zeros(1, 4, 2, 8, dtype=torch.uint8)
    boxed[:, 3, :, :5] = 255
    areas = finetune.patch_areas(boxed, (1, 4))
    assert_close(areas, torch.tensor([[1.0, 1.0, 0.5, 0.0]]))
    attention = torch.tensor([[[0.0, 0, 0.5, 0.5], [1, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0], [1, 0, 0, 0]]])
    assert_close(finetune.object_shares(attention, areas), torch.tensor([[0.625, 0.25, 0.5]]))

    # Even attention has the object's own share; without CLS that number is missing, and without a patch that
    # lies wholly in the object the last one is.
    even = torch.full((1, 5, 4), 0.25)
    assert_close(finetune.object_shares(even, areas), torch.full((1, 3), 0.625))
    assert finetune.object_shares(even[:, 1:], areas)[0, 1].isnan()
    assert finetune.object_shares(even, 0.9 * areas)[0, 2].isnan()

    # Small objects count once more; an image without object not at all; unknown numbers are left out.
    shares = torch.tensor([[0.5, 0.6, 0.7], [0.1, 0.2, torch.nan], [0.0, 0.3, torch.nan]])
    numbers = finetune.average_shares(shares)
    assert numbers["all"] == {"images": 2, "area": 0.3, "cls": 0.4, "patches": 0.7, "patches_area": 0.5}
    assert numbers["small"] == {"images": 1, "area": 0.1, "cls": 0.2}


def test_boxes_are_cropped_as_their_image_is(tmp_path):
    """An image of 8 x 16 whose box is white: after resizing and cropping the mask is still on the white."""
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[2:6, 4:10] = 255
    (tmp_path / "val").mkdir()
    Image.fromarray(pixels).save(tmp_path / "val" / "a.png")
    (tmp_path / "val" / "b.png").write_bytes(b"no image")
    rows = ["file,x0,y0,x1,y1", "val/a.png,4,2,9,5", "val/b.png,0,0,3,3", "other,0,0,1,1"]
    (tmp_path / "boxes.csv").write_text("\n".join(rows))
    files = data.open_folder(tmp_path)
    boxes = finetune.read_boxes(tmp_path / "boxes.csv", files, tmp_path)
    assert boxes == [[[4, 2, 9, 5]], [[0, 0, 3, 3]]]
    samples = finetune.BoxedImages(files, boxes, [16, 16])
    boxed, _, broken = samples[0, 0]
    inside = boxed[3] > 127
    assert boxed.shape == (4, 16, 16) and not broken
    assert inside[4:12, :12].all() and inside.sum() == 8 * 12  # twice as large; of 32 columns the middle 16
    assert boxed[0, inside].min() > 127 > boxed[0, ~inside].max()
    boxed, _, broken = samples[0, 1]
    assert not boxed.any() and len(broken) == 1


def boxes_of(folder):
    """A table of boxes for all images of a folder -> its path."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    table = folder / "boxes.csv"
    table.write_text("file,x0,y0,x1,y1\n" + "".join(f"{name},2,2,9,9\n" for name in files))
    return table


def test_objects_compare_encoders(folder, encoder, tmp_path, capsys):
    table = boxes_of(folder)
    table.write_text(table.read_text().replace(",", ", "), encoding="utf-16")  # as some programs write it
    flags = ["--objects", "boxes.csv", "--data", folder, "--out", tmp_path / "out"]
    run(*flags, "--encoder", encoder, "none", "--image-size", 16, "--patch-size", 4)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results) == [str(encoder), "none"] and results["none"]["all"]["images"] == 8  # of val/
    for numbers in (results[str(encoder)]["all"], results["none"]["small"]):
        assert 0 < numbers["area"] < 0.4 and 0 < numbers["cls"] < 1 and 0 < numbers["patches"] < 1
    assert "'all': {'images': 8, 'area': " in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "pictures" / "objects.png") as picture:
        assert picture.size[0] == 5 * (128 + 4) + 4  # the image, and two maps an encoder


def test_mistakes_with_objects_are_one_clear_line(folder, encoder, tmp_path, capsys):
    good = boxes_of(folder).read_text()
    tables = {
        "no_table": "hello\nworld\n",
        "corners": good.replace(",2,2,9,9", ",9,9,2,2"),
        "normalised": good.replace(",2,2,9,9", ",.1,.1,.5,.5"),
        "other_files": good.replace("val/", "validation/"),
        "short": good + "train/class0/00.png,2,2\n",
        "outside": good.replace(",2,2,9,9", ",90,90,99,99"),
        "list.txt": "",
    }
    for name, text in tables.items():
        (tmp_path / name).write_text(text)
    cases = (
        ((tmp_path / "missing", "--data", folder), "No such file"),
        ((tmp_path / "no_table", "--data", folder), "its columns are ['hello']"),
        ((tmp_path / "corners", "--data", folder), "[9, 9, 2, 2]"),
        ((tmp_path / "normalised", "--data", folder), "whole pixels"),
        ((tmp_path / "short", "--data", folder), "line 50 has too few columns"),
        ((tmp_path / "other_files", "--data", folder), "8 of 8 images have no box"),
        ((folder / "boxes.csv", "--data", "shapes"), "takes one folder"),
        ((folder / "boxes.csv", "--data", folder, folder), "takes one folder"),
        ((folder / "boxes.csv", "--data", tmp_path / "list.txt"), "takes one folder"),
    )
    for (table, *flags), words in cases:
        run("--objects", table, *flags, "--encoder", encoder, "--out", tmp_path / "out", code=2)
        one_line(capsys, words)
    run("--encoder", encoder, "none", code=2)
    one_line(capsys, "one encoder a run")
    assert not (tmp_path / "out").exists()

    # A box that leaves its image is that of another size, or another image.
    flags = ("--objects", tmp_path / "outside", "--data", folder, "--encoder", encoder)
    run(*flags, "--out", tmp_path / "out", code=2)
    error = capsys.readouterr().err
    assert error.count("its box 90,90,99,99 (ends included) leaves its 20 x 20 pixels") == 8
    assert "none of the 8 images counts" in error.splitlines()[-1]


def test_evaluating_says_which_epoch_it_is_and_what_the_last_one_was(folder, encoder, tmp_path, capsys):
    flags = ("--encoder", encoder, "--data", folder, "--out", tmp_path / "run")
    run(*flags, "--epochs", 3, "--max-steps", 5)
    for words in ("epoch 1 of 3", "is not finished"):
        capsys.readouterr()
        run("--evaluate", tmp_path / "run", "--out", tmp_path / "out")
        assert words in capsys.readouterr().out
    run(*flags, "--epochs", 3)
    last = json.loads((tmp_path / "run" / "results.json").read_text())["top1"]
    capsys.readouterr()
    run("--evaluate", tmp_path / "run", "--out", tmp_path / "out")
    assert f"after the last epoch it was {last:.2f}" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# --predict
# ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(encoder, folder, tmp_path_factory):
    """A run of one epoch."""
    out = tmp_path_factory.mktemp("finished")
    run("--encoder", encoder, "--data", folder, "--epochs", 1, "--out", out)
    return out


def predicted_rows(out):
    with (out / "predictions.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file))[1:]


def test_predicting_one_image(finished, folder, tmp_path, capsys):
    image = str(folder / "val" / "class0" / "40.png")
    run("--evaluate", finished, "--predict", image, "--out", tmp_path)
    (row,) = predicted_rows(tmp_path)
    run("--evaluate", finished, "--predict", folder / "val", "--out", tmp_path)
    assert row[0] == image and row in predicted_rows(tmp_path) and len(predicted_rows(tmp_path)) == 8
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(".csv: ")[2] for line in lines if ".csv: " in line] == [
        "1 images; 0 broken, left out",
        "8 images; 0 broken, left out",
    ]


@pytest.mark.parametrize("runs", [1, 2])
def test_files_of_any_name_are_predicted_and_broken_ones_left_out(runs, finished, tmp_path, capsys):
    names = [os.fsdecode(b"\xff\xe9.png"), "x" * 246 + ".png", 'a,"b".png', "\u00e9\n.png", "black.png"]
    (tmp_path / "images").mkdir()
    for name in names:
        Image.new("RGB", (20, 20), "black" if name == "black.png" else "red").save(tmp_path / "images" / name)
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    run("--evaluate", *[finished] * runs, "--predict", tmp_path / "images", "--out", tmp_path)
    assert sorted(file for file, _, _ in predicted_rows(tmp_path)) == sorted(
        str(tmp_path / "images" / name) for name in names
    )
    assert all(0.5 <= float(probability) <= 1 for _, _, probability in predicted_rows(tmp_path))
    output = capsys.readouterr()
    assert "predictions.csv: 5 images; 1 broken, left out" in output.out
    why = "broken.png (cannot identify image file) is broken; it is left out"
    assert output.err.count(why) == runs


@pytest.mark.parametrize("runs", [1, 2])
def test_a_broken_test_image_counts_as_a_black_one(runs, finished, folder, tmp_path):
    shutil.copytree(folder / "val", tmp_path / "val")
    broken, tables = tmp_path / "val" / "class1" / "41.png", []
    for write in (lambda: broken.write_bytes(b"no image"), lambda: Image.new("RGB", (20, 20)).save(broken)):
        write()
        run("--evaluate", *[finished] * runs, "--data", tmp_path / "val", "--out", tmp_path / "out")
        tables.append(list(csv.reader((tmp_path / "out" / "confusion.csv").open())))
    assert tables[0] == tables[1]
    assert sum(int(cell) for line in tables[0][1:] for cell in line[1:]) == 8


def test_too_many_broken_test_images_stop_it(finished, tmp_path, capsys):
    for i in range(12):
        (tmp_path / f"{i:02d}.png").write_bytes(b"no image")
    run("--evaluate", finished, "--predict", tmp_path, "--out", tmp_path / "out", code=1)
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        "finetune.py: too many broken images: 12 of 12, the first is "
        f"{tmp_path / '00.png'} (cannot identify image file); repair or remove them"
    )


def test_mistakes_with_predict_are_one_clear_line(finished, folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "out" / "predictions.csv").mkdir(parents=True)  # in the way
    for images, code, words in (
        ("", 2, "--predict: an empty name"),
        ("nowhere", 2, "nowhere: there is no such file or folder; check the path"),
        (tmp_path / "empty", 2, "no images in it (looked for .jpg"),
        (folder / "val", 1, "predictions.csv could not be written"),
    ):
        capsys.readouterr()
        run("--evaluate", finished, "--predict", images, "--out", tmp_path / "out", code=code)
        assert words in capsys.readouterr().err.strip().splitlines()[-1]


def test_an_image_without_a_box_does_not_count_and_is_not_drawn(
    folder, encoder, tmp_path, capsys, monkeypatch
):
    drawn = []

    def keep(panels):
        drawn.append(panels)
        return Image.new("L", (1, 1))

    monkeypatch.setattr(finetune, "picture_sheet", keep)
    lines = boxes_of(folder).read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.startswith("file") or "val/" in line][:-3]
    kept[1] = kept[1].replace("2,2,9,9", "0,0,19,19")  # a large object is drawn after the small ones
    (tmp_path / "boxes.csv").write_text("".join(kept))
    flags = ("--objects", tmp_path / "boxes.csv", "--data", folder, "--encoder", encoder)
    run(*flags, "--out", tmp_path / "out")
    assert "note: 3 of 8 images have no box" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results[str(encoder)]["all"]["images"] == 5
    (panels,) = drawn
    assert all(len(pictures) == 5 for pictures in panels.values())
    with Image.open(folder / kept[1].split(",")[0]) as image:
        image = data.center_crop([16, 16])(data.from_pil(image))
    assert_close(panels["image, box"][-1], image / 255)


def test_a_probe_says_that_its_encoder_has_changed(folder, encoder, tmp_path, capsys):
    packed = torch.load(encoder)
    torch.save(packed, tmp_path / "encoder.pt")
    flags = ("--encoder", tmp_path / "encoder.pt", "--data", folder, "--epochs", 1, "--out", tmp_path / "run")
    run(*flags)
    packed["state_dict"]["norm.weight"] += 1
    torch.save(packed, tmp_path / "encoder.pt")
    capsys.readouterr()
    run(*flags)
    assert "has other weights than when" in capsys.readouterr().out
