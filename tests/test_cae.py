"""CAE against reference numbers of the authors' code and against slow versions; its masks, losses and
tokenizers."""

import math
import os
import random
import re
import runpy
import shlex
import signal
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import cae
import data
import finetune
import train
import vit
from conftest import ROOT, TINY, assert_gradients, build, randomize, run
from test_train import Hostile, interrupt_at, one_line, rows, same_weights, without_clock
from vit import UserError

GOLDEN = torch.load(Path(__file__).parent / "golden" / "cae_tiny.pt", weights_only=True)
SIZES = (
    "--image-size 32 --patch-size 8 --width 32 --depth 2 --heads 4 --decoder-width 32 --decoder-heads 4 "
    "--decoder-depth 2 --drop-path 0"
).split()
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_forward_losses_and_gradients_are_the_authors():
    model = build("cae", *SIZES, "--vocabulary", 64)
    model.load_state_dict(cae.from_official({"model": GOLDEN["state_dict"]}))  # strict
    out = model.predict(GOLDEN["images"], GOLDEN["mask"])
    out["logits"] = out["logits"].flatten(0, 1)
    theirs = {"visible": "latent", "predicted": "latent_pred", "target": "latent_align", "logits": "logits"}
    for name, their_name in theirs.items():
        assert_close(out[name], GOLDEN["outputs"][their_name], atol=1e-5, rtol=0)

    extra = GOLDEN["extra"]
    loss, metrics = model(GOLDEN["images"], GOLDEN["mask"], extra["labels"].view(2, 8))
    assert_close(loss.item(), extra["loss_total"], atol=1e-5, rtol=0)
    assert_close(metrics["tokens"].item(), extra["loss_main"], atol=1e-5, rtol=0)
    assert_close(2 * metrics["align"].item(), extra["loss_align_weighted"], atol=1e-5, rtol=0)
    loss.backward()
    assert_gradients(model, cae.from_official(extra["grads"]), 1e-5)


def official(width, decoder_width, depth=2, blocks=2, vocabulary=7, old=False):
    """Random weights under the authors' names, 16 patches of 4 x 4 pixels, four heads; old: the names of
    their first release."""
    weights = {}
    normal = torch.Generator().manual_seed(1)

    def put(name, *shape):
        weights[name] = 0.3 * torch.randn(shape, generator=normal)

    def norm(name, dim):
        put(f"{name}.weight", dim)
        put(f"{name}.bias", dim)

    def linear(name, n_in, n_out):
        put(f"{name}.weight", n_out, n_in)
        put(f"{name}.bias", n_out)

    def block(name, dim, cross):
        ending, attn = ("_cross", "cross_attn") if cross else ("", "attn")
        for x in ("gamma_1", "gamma_2"):
            put(f"{name}.{x}{ending}", dim)
        for x in ("norm1_q", "norm1_k", "norm1_v", "norm2_cross") if cross else ("norm1", "norm2"):
            norm(f"{name}.{x}", dim)
        for x in ("q", "k", "v") if cross else ("qkv",):
            put(f"{name}.{attn}.{x}.weight", dim if cross else 3 * dim, dim)
        for x in ("q_bias", "v_bias"):
            put(f"{name}.{attn}.{x}", dim)
        linear(f"{name}.{attn}.proj", dim, dim)
        linear(f"{name}.mlp{ending}.fc1", dim, 4 * dim)
        linear(f"{name}.mlp{ending}.fc2", 4 * dim, dim)

    for encoder in ("encoder", "teacher" if old else "alignment_encoder"):
        put(f"{encoder}.cls_token", 1, 1, width)
        put(f"{encoder}.pos_embed", 1, 17, width)
        put(f"{encoder}.patch_embed.proj.weight", width, 3, 4, 4)
        put(f"{encoder}.patch_embed.proj.bias", width)
        norm(f"{encoder}.norm", width)
        for i in range(depth):
            block(f"{encoder}.blocks.{i}", width, False)
    put("mask_token", 1, 1, decoder_width)
    put("rd_pos_embed", 1, 17, decoder_width)
    if decoder_width != width:
        linear("encoder_to_decoder" if old else "encoder_to_regresser", width, decoder_width)
        norm("encoder_to_decoder_norm" if old else "encoder_to_regresser_norm", decoder_width)
    h, g = ("pretext_neck", "pretext_neck") if old else ("regresser", "decoder")
    for i in range(blocks):
        block(f"{h}.regressor_blocks.{i}", decoder_width, True)
        block(f"{g}.decoder_blocks.{i}", decoder_width, False)
    norm(f"{h}.norm", decoder_width)
    norm(f"{g}.norm2" if old else f"{g}.norm", decoder_width)
    linear(f"{g}.head", decoder_width, vocabulary)
    return weights


def slow_cae(w, images, mask):
    """CAE as facts of the authors' code, one image after the other, with their names and no module of
    ours."""

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def heads(q, k, v):
        parts = zip(q.chunk(4, -1), k.chunk(4, -1), v.chunk(4, -1))
        return torch.cat([torch.softmax(a * a.shape[-1] ** -0.5 @ b.T, -1) @ c for a, b, c in parts], -1)

    def mlp(name, x):
        return linear(f"{name}.fc2", F.gelu(linear(f"{name}.fc1", x)))

    def self_block(name, x):
        y = norm(f"{name}.norm1", x)
        q, k, v = (y @ part.T for part in w[f"{name}.attn.qkv.weight"].chunk(3))
        y = heads(q + w[f"{name}.attn.q_bias"], k, v + w[f"{name}.attn.v_bias"])
        x = x + w[f"{name}.gamma_1"] * linear(f"{name}.attn.proj", y)
        return x + w[f"{name}.gamma_2"] * mlp(f"{name}.mlp", norm(f"{name}.norm2", x))

    def cross_block(name, x, u, pos_x, pos_u):
        kv = torch.cat([u, x])
        pos = torch.cat([pos_u, pos_x])
        attn = f"{name}.cross_attn"
        q = norm(f"{name}.norm1_q", x + pos_x) @ w[f"{attn}.q.weight"].T + w[f"{attn}.q_bias"]
        k = norm(f"{name}.norm1_k", kv + pos) @ w[f"{attn}.k.weight"].T
        v = norm(f"{name}.norm1_v", kv) @ w[f"{attn}.v.weight"].T + w[f"{attn}.v_bias"]
        y = w[f"{name}.gamma_1_cross"] * linear(f"{attn}.proj", heads(q, k, v))
        x = norm(f"{name}.norm2_cross", x + y)
        return x + w[f"{name}.gamma_2_cross"] * mlp(f"{name}.mlp_cross", x)

    def encode(patches, where):
        kernel = w["encoder.patch_embed.proj.weight"].permute(0, 2, 3, 1).flatten(1)
        x = patches[where] @ kernel.T + w["encoder.patch_embed.proj.bias"]
        pos = w["encoder.pos_embed"][0]
        x = torch.cat([w["encoder.cls_token"][0] + pos[:1], x + pos[1:][where]])
        for i in range(2):
            x = self_block(f"encoder.blocks.{i}", x)
        return norm("encoder.norm", x)

    def project(x):
        if "encoder_to_regresser.weight" not in w:
            return x
        return norm("encoder_to_regresser_norm", linear("encoder_to_regresser", x))

    results = []
    for patches, hidden in zip(vit.patchify(images, 4), mask):
        z = encode(patches, ~hidden)
        pos = w["rd_pos_embed"][0, 1:]
        u = project(z[1:])
        x = w["mask_token"][0].expand(int(hidden.sum()), -1)
        for i in range(2):
            x = cross_block(f"regresser.regressor_blocks.{i}", x, u, pos[hidden], pos[~hidden])
        predicted = norm("regresser.norm", x)
        y = predicted + pos[hidden]
        for i in range(2):
            y = self_block(f"decoder.decoder_blocks.{i}", y)
        logits = linear("decoder.head", norm("decoder.norm", y))
        results.append((z, predicted, project(encode(patches, hidden)[1:]), logits))
    return [torch.stack(values) for values in zip(*results)]


@pytest.mark.parametrize("decoder_width", [32, 24])
def test_random_weights_against_a_slow_version(decoder_width, tmp_path):
    weights = official(32, decoder_width)
    flags = (
        f"--heads 4 --decoder-width {decoder_width} --decoder-heads 4 --decoder-depth 2 --drop-path 0".split()
    )
    ids = ("--vocabulary", 7)
    model = build("cae", *flags, *ids)
    model.load_state_dict(cae.from_official({f"module.{name}": value for name, value in weights.items()}))
    mask = cae.block_mask(4, (4, 4), 8)
    out = model.predict(IMAGES, mask)
    names = ("visible", "predicted", "target", "logits")
    for name, expected in zip(names, slow_cae(weights, IMAGES, mask)):
        assert_close(out[name], expected, atol=2e-5, rtol=1e-4)

    # --init takes such a file; with pixels as targets the head is another one.
    path = tmp_path / "official.pth"
    torch.save({"model": weights, "optimizer": {}, "args": {}}, path)
    fresh = build("cae", *flags, *ids)
    assert train.load_weights(fresh, path) == "the whole model"
    assert torch.equal(fresh.predict(IMAGES, mask)["predicted"], out["predicted"])
    assert train.load_weights(build("cae", *flags), path) == "the encoder"

    old, new = cae.from_official(official(32, decoder_width, old=True)), cae.from_official(weights)
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in new)


def test_finetune_reads_an_official_file_and_its_twelve_heads(tmp_path, capsys):
    weights = official(48, 48)
    path = tmp_path / "cae.pth"
    torch.save({"model": weights}, path)
    args = finetune.parse_args(["--protocol", "linear", "--encoder", str(path), "--heads", "12"])
    loaded, info, _ = finetune.open_encoder(args)

    model = vit.ViT((16, 16), 4, 48, 2, 12, layer_scale=0.1)
    ours = cae.from_official(weights)
    encoder = {name: value for name, value in ours.items() if name.startswith("encoder.")}
    model.load_state_dict({name.removeprefix("encoder."): value for name, value in encoder.items()})
    assert_close(loaded.eval().features(IMAGES)["patches"], model.features(IMAGES)["patches"])
    assert info["feature"] == "cls"
    said = capsys.readouterr().out
    assert "CAE layout" in said and f"{len(model.state_dict())} tensors" in said
    heads = {layout.name: layout.heads.get(384) for layout in finetune.LAYOUTS}
    assert heads["CAE"] == 12 and heads["MAE, DINO or timm"] == 6


# ------------------------------------------------------------------------------------------------------------
# Masks
# ------------------------------------------------------------------------------------------------------------
def slow_block_mask(grid, hidden, random):
    """CAE's code, box by box, with Python's random numbers."""
    mask = torch.zeros(grid, dtype=torch.bool)
    while (left := hidden - int(mask.sum())) > 0:
        for _ in range(10):
            area = random.uniform(16, left)
            aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= grid[0] or w >= grid[1]:
                continue
            top, first = random.randint(0, grid[0] - h), random.randint(0, grid[1] - w)
            box = mask[top : top + h, first : first + w]
            if 0 < int((~box).sum()) <= left:
                box[:] = True
                break
    return mask


@pytest.mark.parametrize(
    "grid, hidden",
    [
        ((14, 14), 98),
        ((4, 4), 13),
        ((4, 4), 1),
        ((8, 8), 32),
        ((6, 11), 40),
        ((1, 9), 4),
        ((2, 2), 2),
        ((14, 14), 195),
        ((20, 12), 7),
    ],
)
def test_block_masks_hide_exactly_as_many_as_asked(grid, hidden):
    mask = cae.block_mask(1000, grid, hidden)
    assert mask.shape == (1000, grid[0] * grid[1]) and (mask.sum(1) == hidden).all()


def test_block_masks_have_the_authors_distribution():
    fast = cae.block_mask(2000, (14, 14), 98).view(-1, 14, 14).float()
    slow = torch.stack([slow_block_mask((14, 14), 98, random.Random(i)) for i in range(2000)]).float()
    assert (fast.mean(0) - slow.mean(0)).abs().max() < 0.07  # five deviations of the difference
    assert fast[:, 7, 7].mean() > 0.8 and fast[:, 0, 0].mean() < 0.1

    def edges(masks):  # how compact masks are
        rows = (masks[:, 1:] != masks[:, :-1]).sum()
        columns = (masks[:, :, 1:] != masks[:, :, :-1]).sum()
        return (rows + columns) / len(masks)

    assert edges(fast) == pytest.approx(edges(slow).item(), rel=0.03)


# ------------------------------------------------------------------------------------------------------------
# The three parts and Eq. 1
# ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def model():
    return randomize(build("cae", "--drop-path", 0, "--decoder-width", 24, "--decoder-heads", 2))


def test_hidden_pixels_reach_no_visible_latent_and_the_regressor_changes_none(model):
    out = model.predict(IMAGES)
    mask = out["mask"]
    hidden = vit.unpatchify(mask.unsqueeze(-1).expand(-1, -1, 48).float(), (4, 4), 4).bool()
    other = torch.where(hidden, torch.randn_like(IMAGES), IMAGES)
    again = model.predict(other, mask)
    assert torch.equal(again["visible"], out["visible"]) and not torch.equal(again["target"], out["target"])
    assert torch.equal(again["predicted"], out["predicted"])  # from the visible patches alone
    features = model.encoder.features(IMAGES, hidden=mask)
    assert torch.equal(out["visible"], torch.cat([features["cls"], features["patches"]], dim=1))
    seen = torch.where(hidden, IMAGES, torch.randn_like(IMAGES))
    assert torch.equal(model.predict(seen, mask)["target"], out["target"])  # from the hidden patches alone


def test_the_decoder_sees_predicted_latents_alone(model):
    out = model.predict(IMAGES)
    model.regressor.forward = lambda visible, *positions: out["predicted"]
    assert torch.equal(model.predict(torch.randn_like(IMAGES), out["mask"])["pixels"], out["pixels"])


def test_eq_1_against_loops(model):
    out = model.predict(IMAGES)
    patches = vit.norm_pix(vit.patchify(IMAGES, 4))
    pixels, align = [], []
    for b in range(4):
        for u, l in enumerate(l for l in range(16) if out["mask"][b, l]):
            pixels += [(out["pixels"][b, u, i] - patches[b, l, i]) ** 2 for i in range(48)]
            align += [(out["predicted"][b, u, i] - out["target"][b, u, i]) ** 2 for i in range(24)]
    loss, metrics = model(IMAGES, out["mask"])
    assert_close(metrics["recon"], sum(pixels) / len(pixels), atol=1e-5, rtol=1e-5)
    assert_close(metrics["align"], sum(align) / len(align), atol=1e-5, rtol=1e-5)
    assert_close(loss, metrics["recon"] + 0.2 * metrics["align"])
    assert build("cae", "--vocabulary", 5).align_weight == 2
    assert build("cae", "--vocabulary", 5, "--align-weight", 0).align_weight == 0
    logits, ids = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    log_p = [logits[b, u].softmax(-1)[ids[b, u]].log() for b in range(2) for u in range(3)]
    assert_close(cae.decoding_loss(logits, ids), -sum(log_p) / 6)


def test_no_gradient_flows_into_the_target_pass(model):
    mask = cae.block_mask(4, (4, 4), 8)
    out = model.predict(IMAGES, mask)
    assert not out["target"].requires_grad
    cae.alignment_loss(out["predicted"], out["target"]).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    constant = out["target"].clone()  # in the target's place
    (model.predict(IMAGES, mask)["predicted"] - constant).square().mean().backward()
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters() if p.grad is not None)
    z = torch.randn(2, 3, 4, requires_grad=True)
    cae.alignment_loss(torch.randn(2, 3, 4, requires_grad=True), z).backward()
    assert z.grad is None  # sg[]


def test_the_skipped_regressor_is_encoder_then_decoder(model):
    z = model.encoder.features(IMAGES)["patches"]
    pos = model.pos_embed[:, 1:].expand(4, -1, -1)
    skipped = model.skip_regressor(IMAGES)
    assert_close(skipped, model.decoder(model.project(z), pos))
    out = model.predict(IMAGES)
    model.predict = lambda images, mask=None: out
    targets = model.targets(IMAGES, out["hidden_ids"])
    assert_close(model.targets(IMAGES, torch.arange(16).expand(4, -1)), vit.norm_pix(vit.patchify(IMAGES, 4)))
    skipped = vit.gather_tokens(skipped, out["hidden_ids"])
    assert model.numbers(IMAGES) == {
        "through_H": pytest.approx(cae.decoding_loss(out["pixels"], targets).item()),
        "skipped": pytest.approx(cae.decoding_loss(skipped, targets).item()),
    }


def test_pictures_show_where_the_mask_was(model):
    panels = model.visualize(IMAGES)
    assert [title.split("\n")[0] for title in panels] == [
        "image",
        "visible patches",
        "reconstruction",
        "H skipped",
    ]
    assert all(x.shape == (4, 3, 16, 16) and 0 <= x.min() and x.max() <= 1 for x in panels.values())
    shown, visible, rebuilt, _ = (vit.patchify(x, 4) for x in panels.values())
    mean = vit.patchify(data.denormalize(torch.zeros(1, 3, 16, 16)), 4)
    same = (shown - rebuilt).abs().amax(-1) < 1e-5  # (B, L)
    dark = (visible - mean).abs().amax(-1) < 1e-5
    assert (same.sum(1) == 8).all() and torch.equal(dark, ~same)
    assert list(build("cae", "--vocabulary", 7).visualize(IMAGES)) == ["image", "visible patches"]


def test_recompute_changes_no_gradient(model):
    mask = cae.block_mask(4, (4, 4), 8)
    model(IMAGES, mask)[0].backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    for block in vit.all_blocks(model):
        block.recompute = True
    model(IMAGES, mask)[0].backward()
    assert_gradients(model, grads, 0)


def test_drop_path_rises_in_each_part_and_is_off_in_validation():
    model = build("cae", "--decoder-depth", 3, "--drop-path", 0.3)
    parts = (model.encoder, model.regressor, model.decoder)
    rates = [[round(block.drop_path, 3) for block in part.blocks] for part in parts]
    assert rates == [[0, 0.3], [0, 0.15, 0.3], [0, 0.15, 0.3]]
    mask = cae.block_mask(4, (4, 4), 8)
    assert not torch.equal(model(IMAGES, mask)[0], model(IMAGES, mask)[0])
    model.eval()
    assert torch.equal(model(IMAGES, mask)[0], model(IMAGES, mask)[0])


def test_initialisation_is_the_authors():
    model = build("cae", "--width", 256)
    for p in (model.encoder.cls_token, model.encoder.patch_embed.proj.weight, model.regressor.mask_token):
        assert p.abs().max() <= 0.02
    assert model.encoder.patch_embed.proj.weight.std().item() == pytest.approx(0.0108, rel=0.05)
    bound = math.sqrt(6 / (256 + 3 * 256))  # xavier
    assert model.encoder.blocks[1].attn.qkv.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    rescaled = build("cae", "--width", 256, "--rescaled-init").encoder.blocks
    assert rescaled[1].attn.qkv.weight.std().item() == pytest.approx(0.0108, rel=0.05)
    second = 0.0108 / math.sqrt(2 * 2)  # the second block
    assert rescaled[1].mlp.fc2.weight.std().item() == pytest.approx(second, rel=0.05)


@pytest.mark.parametrize(
    "size, expected",
    [
        ("small", (384, 12, 12, 768, 4, 12)),
        ("base", (768, 12, 12, 768, 4, 12)),
        ("large", (1024, 24, 16, 1024, 4, 16)),
    ],
)
def test_sizes_are_the_papers(size, expected):
    args = train.parse_args(["--method", "cae", "--size", size])
    assert tuple(getattr(args, flag) for flag in vit.SIZE_FLAGS) == expected
    defaults = (args.beta2, args.clip_grad, args.min_lr, args.crop_scale, args.mask_ratio)
    assert defaults == (0.999, 3.0, 1e-5, [0.08, 1.0], 0.5)


def test_the_file_prints_the_shapes_of_fig_1(capsys):
    runpy.run_path(str(ROOT / "cae.py"), run_name="__main__")
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert printed == {
        "images": "(2, 3, 64, 64)",
        "visible": "(2, 33, 128)",
        "predicted": "(2, 32, 64)",
        "pixels": "(2, 32, 192)",
        "mask": "(2, 64)",
        "hidden_ids": "(2, 32)",
        "target": "(2, 32, 64)",
    }


def test_gradients_are_clipped_to_the_asked_norm(folder, tmp_path, monkeypatch):
    norms, real = [], torch.optim.AdamW.step

    def step(self, *rest):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(grads).item())
        return real(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run("--method", "cae", "--data", folder, "--out", tmp_path, "--epochs", 1, "--clip-grad", 0.01)
    assert norms and all(norm == pytest.approx(0.01, rel=1e-3) for norm in norms)


@pytest.mark.parametrize("method", ["cae", "dvae"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(method, folder, tmp_path, monkeypatch):
    flags = ["--method", method, "--data", folder, "--epochs", 2, "--log-every", 3]
    start = partial(run, *flags, defaults=TOKENS if method == "dvae" else TINY)
    start("--out", tmp_path / "whole")
    with monkeypatch.context() as patched:
        interrupt_at(patched, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        start("--out", tmp_path / "stopped", code=128 + signal.SIGTERM)
    # Masks, drop path and Gumbel noise go on where they were.
    start("--out", tmp_path / "stopped", "--workers", 2)
    assert same_weights(tmp_path / "stopped", tmp_path / "whole")
    assert without_clock(rows(tmp_path / "stopped")) == without_clock(rows(tmp_path / "whole"))


def ablations():
    """The rows of Tables 2, 5, 6 and of lambda with the flags that the documentation gives them, and of
    Table 9 what needs no file."""
    texts = "\n".join(path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")))
    found = re.findall(r"^\| (2|5|6|9|App\. A) \| (.+?) \| (?:`(.+?)`|defaults) \|", texts, re.M)
    assert {table for table, _, _ in found} == {"2", "5", "6", "9", "App. A"} and len(found) == 16
    rows = {f"{table} {row}": shlex.split(flags) for table, row, flags in found}
    rows = {
        row: flags
        for row, flags in rows.items()
        if not any("FILE" in flag or "runs/" in flag for flag in flags)
    }
    rows["raw pixels"] = ["--no-norm-pix"]
    rows["L's initialisation"] = ["--rescaled-init", "--layer-scale", "1e-5"]
    return rows


ROWS = ablations()


@pytest.mark.parametrize("flags", ROWS.values(), ids=ROWS)
def test_every_parameter_gets_a_gradient_and_one_batch_can_be_overfitted(flags):
    model = build("cae", "--drop-path", 0, *flags)
    images = torch.randn(8, 3, 16, 16)
    mask = model.predict(images)["mask"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        loss, metrics = model(images, mask)
        loss.backward()
        losses.append(metrics["recon"].item())
        if step == 0:
            trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
            assert [name for name, grad in trained.items() if grad is None or not grad.any()] == []
        optimizer.step()
    # Branches that start at 1e-5 take their time.
    assert losses[-1] < (0.99 if "--rescaled-init" in flags else 0.9) * losses[0]


# ------------------------------------------------------------------------------------------------------------
# Tokenizers
# ------------------------------------------------------------------------------------------------------------
TOKENS = (
    "--method dvae --image-size 16 --vocabulary 6 --channels 8 --batch-size 8 --workers 0 --device cpu"
).split()


def dvae(*flags):
    return cae.DVAE(train.parse_args([*TOKENS, *map(str, flags)]))


def test_the_discrete_vae_against_loops(monkeypatch):
    draws = []

    def gumbel_softmax(logits, tau, dim):
        draws.append((tau, dim))
        return logits.softmax(dim)

    monkeypatch.setattr(cae.F, "gumbel_softmax", gumbel_softmax)
    model = randomize(dvae("--kl-weight", 0.5))
    images = torch.randn(2, 3, 16, 16)
    loss, metrics = model(images)
    assert draws == [(0.9, 1)]
    pixels = data.denormalize(images)
    q = model.logits(pixels).softmax(1)  # (2, 6, 2, 2)
    assert_close(metrics["recon"], F.mse_loss(model.decode(q), pixels).detach())
    p = [sum(q[b, k, y, x] for b in range(2) for y in range(2) for x in range(2)) / 8 for k in range(6)]
    diversity = sum(share * share.log() for share in p)
    assert_close(metrics["diversity"], diversity.detach(), atol=2e-5, rtol=0)
    assert_close(loss, metrics["recon"] + 0.5 * metrics["diversity"])
    loss.backward()
    assert all(parameter.grad.any() for parameter in model.parameters())

    code = model.codes.weight[3].detach()
    alone = model.decode(F.one_hot(torch.full((1, 2, 2), 3), 6).permute(0, 3, 1, 2).float())
    assert_close(alone, (model.decoder_layers(code.view(1, 8, 1, 1).expand(1, 8, 2, 2)) + 1) / 2)
    first = model.decoder_layers[0]
    assert isinstance(first, nn.Conv2d) and first.kernel_size == (1, 1)
    assert cae.perplexity(torch.tensor([0, 1, 2, 3]), 6) == pytest.approx(4)
    assert cae.perplexity(torch.zeros(9, dtype=torch.long), 6) == pytest.approx(1)


def test_a_run_makes_a_tokenizer_that_cae_learns_from(folder, tmp_path, capsys):
    out = tmp_path / "dvae"
    run("--data", folder, "--out", out, "--epochs", 2, "--log-every", 2, defaults=TOKENS)
    target = f"dvae:{out / 'tokenizer.pt'}"
    assert f"python train.py --method cae --target {target}" in capsys.readouterr().out
    log = data.read_log(out)
    assert all(1 <= row["perplexity"] <= 6 and row["used"] <= 1 and -2 < row["diversity"] <= 0 for row in log)
    assert (out / "pictures" / "epoch-0002.png").exists()

    # The tokenizer is no part of the model, and gives the ids of patches that are resized to 8 pixels.
    model = build("cae", "--target", target)
    assert model.vocabulary == 6 and not any("tokenizer" in name for name, _ in model.named_modules())
    assert not any("tokenizer" in name for name in model.state_dict())
    other = dvae()
    other.load_state_dict(torch.load(out / "checkpoint.pt", weights_only=True)["model"])
    pixels = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    twice = F.interpolate(pixels / 255, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    hidden_ids = vit.visible_ids(cae.block_mask(2, (4, 4), 8))
    expected = other.ids(twice).flatten(1).gather(1, hidden_ids)
    assert torch.equal(model.targets(data.normalize(pixels), hidden_ids), expected)

    loss, metrics = model(IMAGES)
    assert metrics.keys() == {"tokens", "align"} and metrics["tokens"] < 3 * math.log(6)
    run("--method", "cae", "--data", folder, "--out", tmp_path / "cae", "--epochs", 1, "--target", target)
    assert "skipped" in data.read_log(tmp_path / "cae")[-1]


def pickled_dalle(monkeypatch, width=8, vocabulary=11):
    """OpenAI's encoder as its file has it: a pickled module of classes that are not installed here, with
    names of their own."""
    encoder, utils = types.ModuleType("dall_e.encoder"), types.ModuleType("dall_e.utils")

    class Conv2d(nn.Module):
        def __init__(self, n_in, n_out, k):
            super().__init__()
            self.n_in, self.n_out, self.kw = n_in, n_out, k
            self.device, self.use_float16 = torch.device("cpu"), True
            self.w = nn.Parameter(torch.randn(n_out, n_in, k, k) / (n_in * k * k) ** 0.5)
            self.b = nn.Parameter(0.1 * torch.randn(n_out))

        def forward(self, x):
            return F.conv2d(x, self.w, self.b, padding=(self.kw - 1) // 2)

    class EncoderBlock(nn.Module):
        def __init__(self, n_in, n_out):
            super().__init__()
            hidden = n_out // 4
            self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
            self.res_path = nn.Sequential()
            widths = (n_in, hidden, hidden, hidden, n_out)
            for i, k in enumerate((3, 3, 3, 1)):
                self.res_path.add_module(f"relu_{i + 1}", nn.ReLU())
                self.res_path.add_module(f"conv_{i + 1}", Conv2d(widths[i], widths[i + 1], k))

        def forward(self, x):
            return self.id_path(x) + self.res_path(x) / 64

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential()
            self.blocks.add_module("input", Conv2d(3, width, 7))
            before = width
            for g, factor in enumerate((1, 2, 4, 8), start=1):
                group = nn.Sequential()
                for i in (1, 2):
                    group.add_module(f"block_{i}", EncoderBlock(before, factor * width))
                    before = factor * width
                if g < 4:
                    group.add_module("pool", nn.MaxPool2d(kernel_size=2))
                self.blocks.add_module(f"group_{g}", group)
            output = nn.Sequential()
            output.add_module("relu", nn.ReLU())
            output.add_module("conv", Conv2d(8 * width, vocabulary, 1))
            self.blocks.add_module("output", output)

        def forward(self, x):
            return self.blocks(x)

    for module, classes in ((utils, [Conv2d]), (encoder, [EncoderBlock, Encoder])):
        for kind in classes:
            kind.__module__, kind.__qualname__ = module.__name__, kind.__name__
            setattr(module, kind.__name__, kind)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
    return Encoder()


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source")
def test_openais_pickled_encoder_gives_its_ids_without_being_unpickled(tmp_path, monkeypatch):
    theirs, images = pickled_dalle(monkeypatch), torch.rand(2, 3, 32, 32)
    expected = theirs(0.8 * images + 0.1)
    torch.save(theirs, tmp_path / "encoder.pkl")
    torch.save(theirs.state_dict(), tmp_path / "state.pt")
    torch.save(theirs, tmp_path / "old.pkl", _use_new_zipfile_serialization=False)
    for name in ("dall_e", "dall_e.encoder", "dall_e.utils"):
        monkeypatch.delitem(sys.modules, name)
    for file in ("encoder.pkl", "state.pt"):
        tokenizer = cae.open_tokenizer(f"dalle:{tmp_path / file}")
        assert tokenizer.vocabulary == 11 and torch.equal(tokenizer.ids(images), expected.argmax(1))
        assert_close(tokenizer.blocks(0.8 * images + 0.1), expected)
        assert not any(p.requires_grad for p in tokenizer.parameters())
    with pytest.raises(UserError, match="before 1.6.*state_dict"):
        cae.open_tokenizer(f"dalle:{tmp_path / 'old.pkl'}")


MISTAKES = [  # flags of --method cae, where DIR is a folder with the files below; words of the message
    ("--target dvae:nothing.pt", "such file or directory"),
    ("--target dvae:DIR/other.pt", "not a tokenizer"),
    ("--target dalle:DIR/other.pt", "not a tokenizer"),
    ("--target dalle:DIR/hostile.pkl", "not opened"),
    ("--target dvae:DIR/nine.pt", "not a tokenizer"),
    ("--target dalle:DIR/tensor.pt", "not a tokenizer"),
    ("--target dvae:DIR/bare.pt", "not a tokenizer"),
    ("--target dvae:DIR/tensor.pt", "not a tokenizer"),
    ("--target vqgan", "neither rgb nor"),
    ("--target dalle:DIR/tokenizer.pt", "not a tokenizer"),
    ("--target dvae:DIR/tokenizer.pt --vocabulary 6", "only without a tokenizer"),
    ("--vocabulary 1", "from 2 to"),
    ("--mask-ratio 0", "at least 1 be hidden"),
    ("--mask-ratio 1", "must stay visible"),
    ("--mask-ratio nan", "from 0 to 1"),
    ("--decoder-depth 0", "give --regressor-depth 4"),
    ("--regressor-depth 0", "--regressor-depth"),
    ("--drop-path 1", "from 0 to 0.99"),
    ("--layer-scale 0", "--layer-scale"),
    ("--align-weight -1", "--align-weight"),
    ("--decoder-heads 3", "multiple of"),
    ("--clip-grad 0", "--clip-grad"),
]
TOKEN_MISTAKES = [  # the same of --method dvae
    ("--image-size 20", "multiples of 8"),
    ("--vocabulary 1", "from 2 to"),
    ("--channels 0", "--channels"),
    ("--kl-weight nan", "--kl-weight"),
    ("--patch-size 4", "unrecognized"),
    ("--temperature 1", "unrecognized"),
    ("--init DIR/tokenizer.pt", "methods that train an encoder"),
]


def test_mistakes_get_one_line(folder, tmp_path, capsys):
    export = dvae().export()
    files = {
        "other.pt": {"x": torch.zeros(1)},
        "hostile.pkl": Hostile(),
        "tokenizer.pt": export,
        "nine.pt": {**export, "config": {**export["config"], "vocabulary": 9}},
        "bare.pt": {**export, "config": {}},
        "tensor.pt": torch.zeros(3),
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    for defaults, mistakes in ((["--method", "cae", *TINY], MISTAKES), (TOKENS, TOKEN_MISTAKES)):
        for flags, words in mistakes:
            flags = flags.replace("DIR", str(tmp_path)).split()
            run("--data", folder, "--out", tmp_path / "run", *flags, code=2, defaults=defaults)
            one_line(capsys, words)
    run("--method", "cae", "--data", folder, "--out", tmp_path / "run", "--vocabulary", 64, code=2)
    assert "nothing gives ids" in capsys.readouterr().err.splitlines()[-1]  # the bar has started
    run("--method", "mae", "--data", folder, "--out", tmp_path / "run", "--decoder-depth", 0, code=2)
    one_line(capsys, "at least 1 block")


def test_masks_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="same number of patches"):
        build("cae").predict(IMAGES, torch.rand(4, 16) > torch.linspace(0.1, 0.9, 4).unsqueeze(1))
    half = cae.block_mask(4, (4, 4), 8)
    for mask in (half.long(), half[:, :12], half[:1], torch.ones_like(half), torch.zeros_like(half)):
        with pytest.raises(ValueError, match="mask must be bool"):
            build("cae").predict(IMAGES, mask)
    with pytest.raises(ValueError, match="mask must be bool"):
        build("cae").predict(torch.randn(4, 3, 32, 16))  # images of another size than the model's
