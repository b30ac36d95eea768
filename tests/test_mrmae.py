"""MCMAE, CLIP and DINO against reference numbers of their authors' code, and the facts of MR-MAE Sec. 3.2 and
3.3."""

import hashlib
import re
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import data
import mrmae
import train
import vit
from conftest import ROOT, assert_gradients, build, randomize, run
from vit import UserError


def golden(name):
    return torch.load(Path(__file__).parent / "golden" / f"{name}.pt", weights_only=True)


MCMAE, CLIP, DINO = golden("mcmae_tiny64"), golden("clip_tiny"), golden("dino_tiny")
MCMAE_MASK = MCMAE["mask"].bool()
CONV = "--stem conv --patch-size 16 --image-size 64".split()
CLOSE = dict(atol=5e-6, rtol=0)


# ------------------------------------------------------------------------------------------------------------
# MCMAE
# ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def golden_size(monkeypatch):
    """A size of our own, as a fork would add it: that of MCMAE's reference numbers."""
    sizes = dict(widths=[16, 24], depths=[1, 1], mlp_ratios=[2, 3], depth=2, decoder_mlp_ratio=2)
    monkeypatch.setitem(vit.SIZES, "golden", (48, 2, 4, 32, 2, 4))
    monkeypatch.setitem(vit.STEM_SIZES, "golden", sizes)
    return sizes


def sized(*flags, method="mae"):
    """A model from flags, of a named size."""
    return train.METHODS[method](train.parse_args(["--method", method, *map(str, flags)]))


@pytest.fixture
def mcmae(golden_size):
    model = sized(*CONV, "--size", "golden")
    model.load_state_dict(mrmae.from_official_mcmae({"model": MCMAE["state_dict"]}))  # strict
    return model


def test_mcmae_forward_and_gradients_are_the_authors(mcmae):
    seen, encoder, stem = {}, mcmae.encoder, mcmae.encoder.patch_embed
    parts = {
        "patch_embed1": stem.embed1,
        "blocks1.0": stem.blocks1[0],
        "patch_embed2": stem.embed2,
        "blocks2.0": stem.blocks2[0],
        "patch_embed3": stem.embed3,
        "patch_embed4": stem.proj,
        "stage1_output_decode": mcmae.stage_fusion[0],
        "stage2_output_decode": mcmae.stage_fusion[1],
        "blocks3.0": encoder.blocks[0],
        "blocks3.1": encoder.blocks[1],
    }
    for name, module in parts.items():
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output}))
    encoder.norm.register_forward_hook(
        lambda module, inputs, output: seen.update(fused_before_norm=inputs[0])
    )
    out, order = mcmae.predict(MCMAE["images"], MCMAE_MASK), MCMAE["ids_keep"].argsort(1)
    for name, value in MCMAE["intermediates"].items():
        if name.startswith(("blocks3", "fused")):
            value = vit.gather_tokens(value, order)  # theirs are shuffled, ours in raster order
        assert_close(seen[name], value, **CLOSE, msg=name)
    assert_close(out["latent"], vit.gather_tokens(MCMAE["latent"], order), **CLOSE)
    assert_close(out["pred"], MCMAE["pred"], **CLOSE)
    loss, _ = mcmae(MCMAE["images"], MCMAE_MASK)
    assert_close(loss, MCMAE["loss"], **CLOSE)
    loss.backward()
    assert_gradients(mcmae, mrmae.from_official_mcmae(MCMAE["grads"]), 5e-6)


def test_init_from_a_published_file(mcmae, golden_size, tmp_path):
    path = tmp_path / "mcmae.pth"
    torch.save({"model": MCMAE["state_dict"]}, path)
    model = randomize(sized(*CONV, "--size", "golden"))
    assert train.load_weights(model, path) == "the whole model"
    weights = mcmae.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    wider = sized(*CONV, "--size", "golden", "--image-size", 64, 96)  # the tables are resized
    assert train.load_weights(wider, path) == "the whole model"
    assert wider.encoder.pos_embed.shape == (1, 24, 48)
    golden_size["widths"] = [16, 32]
    for flags in (CONV, ["--image-size", 64, "--patch-size", 16]):
        with pytest.raises(UserError, match="does not fit this MAE"):
            train.load_weights(sized(*flags, "--size", "golden"), path)


def test_the_finer_stages_get_the_mask_of_the_token_grid(mcmae):
    seen, stem = [], mcmae.encoder.patch_embed
    for block in (stem.blocks1[0], stem.blocks2[0]):
        block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1].float()))
    mcmae.predict(MCMAE["images"], MCMAE_MASK)
    for mask, stage in zip(seen, (1, 2), strict=True):
        assert torch.equal(mask, MCMAE["masks"][f"keep_mask_stage{stage}"])


@pytest.mark.parametrize("method", ["mae", "mrmae"])
def test_hidden_pixels_do_not_pass_the_convolution_stages(method, teacher_file):
    more = ("--teacher", teacher_file) if method == "mrmae" else ()
    model = randomize(build(method, *CONV, "--image-size", 64, 96, *more))
    images, mask = torch.randn(4, 3, 64, 96), torch.rand(4, 24).argsort(1) < 18
    changed = images + vit.unpatchify(torch.randn(4, 24, 768) * mask.unsqueeze(-1), (4, 6), 16)

    def latents():
        return model.predict(images, mask)["latent"], model.predict(changed, mask)["latent"]

    assert torch.equal(*latents())
    embed = model.encoder.embed
    model.encoder.embed = lambda images, mask, stages: embed(images, None, stages)
    assert not torch.allclose(*latents())  # the masks do it


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def test_sizes_of_mcmae():
    flags = ("--stem", "conv", "--image-size", 224, "--size")
    with torch.device("meta"):
        models = {size: sized(*flags, size) for size in ("micro", "small", "base", "large", "huge")}
    assert count(models["base"]) == 115_041_408  # the authors' counts
    assert count(models["base"].encoder, models["base"].stage_fusion) == 88_932_736
    # Of forks, fine-tuned with 1000 classes, in millions.
    for size, millions in (("small", 22.3), ("large", 323.0), ("huge", 680.7)):
        encoder = models[size].encoder
        assert round((count(encoder) + 1000 * (encoder.width + 1)) / 1e6, 1) == millions
    assert models["micro"].encoder.patch_size == 16 and models["micro"].encoder.grid == (14, 14)


def test_a_conv_encoder_has_a_class_token_in_mrmae_alone(teacher_file, tmp_path):
    for method, prefix in (("mae", 0), ("mrmae", 1)):
        flags = [*CONV, *(("--teacher", teacher_file) if prefix else ())]
        model = build(method, *flags)
        args = train.parse_args(["--method", method, *map(str, flags)])
        torch.save(train.export_encoder(model, args), tmp_path / "encoder.pt")
        encoder, info = vit.load_encoder(tmp_path / "encoder.pt")
        images = torch.randn(2, 3, 64, 64)
        out = encoder.features(images, taps=[2])
        assert (out["cls"] is not None) == bool(prefix)
        assert out["patches"].shape == (2, 16, 32) and out["taps"][0].shape == (2, 32, 4, 4)
        assert info["feature"] == "mean" and encoder.pos_embed.shape == (1, prefix + 16, 32)
        assert torch.equal(out["patches"], model.encoder.eval().features(images)["patches"])

    # The features of the stages are not for CLS.
    ids, mask = torch.arange(4).expand(2, -1), torch.arange(16).expand(2, -1) >= 4
    tokens = model.encode(images, ids, mask)
    for p in model.stage_fusion.parameters():
        nn.init.zeros_(p)
    plain = model.encode(images, ids, mask)
    assert torch.equal(tokens[:, 0], plain[:, 0]) and not torch.allclose(tokens[:, 1:], plain[:, 1:])


# ------------------------------------------------------------------------------------------------------------
# Teachers
# ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    """A tiny encoder.pt, with CLS, of another width than the students'."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("teacher") / "encoder.pt"
    encoder = randomize(vit.ViT((16, 16), 4, 24, 2, 2))
    torch.save(vit.pack_encoder(encoder, "mixedae", "mean", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), path)
    return path


@pytest.fixture
def student(teacher_file):
    """mrmae with that teacher, from further flags."""
    return lambda *flags: build("mrmae", "--teacher", teacher_file, *flags)


def ask(model, images):
    """What the first teacher of a model says of its images, on the teacher's grid."""
    teacher = model.teachers[0]
    return teacher.features(teacher.renormalize(images, model.mean, model.std))


def clip_like(state):
    """The same weights as OpenAI's whole model has them: a prefix, text keys, matrices in fp16."""
    half = {
        f"visual.{name}": value.half() if value.ndim > 1 and not name.endswith("embedding") else value
        for name, value in state.items()
    }
    text = {
        "text_projection": torch.randn(4, 4),
        "logit_scale": torch.ones(()),
        "token_embedding.weight": torch.randn(3, 4),
        "transformer.resblocks.0.ln_1.weight": torch.ones(4),
    }
    return {**half, **text}


def test_clip_is_the_authors():
    teacher = mrmae.clip_visual(CLIP["state_dict"], 4)
    out = teacher.features(CLIP["images"])
    assert_close(out["tokens"], CLIP["patch_ln_post"], **CLOSE)
    assert_close(out["saliency"], CLIP["cls_attn_mean"], **CLOSE)
    embedded = teacher.vit.embed(CLIP["images"])
    assert_close(teacher.vit.prepend_cls(embedded), CLIP["after_ln_pre"], **CLOSE)
    last, outputs = teacher.vit.forward_blocks(embedded, (1, 2))
    assert_close(torch.stack(outputs), CLIP["block_outputs"], **CLOSE)
    assert_close(last, CLIP["tokens_pre_ln_post"], **CLOSE)
    assert (teacher.mean, teacher.std) == (mrmae.CLIP_MEAN, mrmae.CLIP_STD)
    assert mrmae.clip_visual(CLIP["state_dict"]).vit.blocks[0].attn.heads == 1  # width // 64


def test_clip_in_fp16_with_its_text_tower_or_without_its_projection():
    teacher = mrmae.clip_visual(clip_like(CLIP["state_dict"]), 4)
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    tokens = teacher.features(CLIP["images"])["tokens"]
    assert_close(tokens, CLIP["patch_ln_post"], atol=2e-2, rtol=0)
    plain = {name: value for name, value in CLIP["state_dict"].items() if name != "proj"}
    assert plain.keys() < CLIP["state_dict"].keys()
    assert_close(
        mrmae.clip_visual(plain, 4).features(CLIP["images"])["tokens"], CLIP["patch_ln_post"], **CLOSE
    )


def test_dino_is_the_authors_at_its_own_size_and_at_another():
    backbone = {f"module.backbone.{name}": value for name, value in DINO["state_dict"].items()}
    full = {
        "student": {},
        "teacher": {**backbone, "module.head.mlp.0.weight": torch.zeros(2, 2)},
        "epoch": 1,
    }
    for state in (DINO["state_dict"], full):
        teacher = mrmae.dino(state, 4)
        out = teacher.features(DINO["images"])
        assert_close(out["tokens"], DINO["intermediate_layers"][-1][:, 1:], **CLOSE)
        assert_close(out["saliency"], DINO["cls_attn_mean"], **CLOSE)
    out = teacher.features(DINO["images_48"])
    assert_close(out["tokens"], DINO["tokens_48"][:, 1:], **CLOSE)
    assert_close(out["saliency"], DINO["last_selfattention_48"].mean(1)[:, 0, 1:], **CLOSE)


def test_a_teacher_gives_what_its_encoder_gives_and_says_its_shape(teacher_file):
    teacher, images = mrmae.open_teacher(str(teacher_file), (4, 4)), torch.randn(3, 3, 16, 16)
    reference = vit.load_encoder(teacher_file)[0].features(images, attention=True)
    out = teacher.features(images)
    assert_close(out["tokens"], reference["patches"])
    assert_close(out["saliency"], reference["attention"].mean(1)[:, 0, 1:])
    shape = (teacher.grid, teacher.width, teacher.image_size, teacher.num_prefix_tokens)
    assert shape == ((4, 4), 24, (16, 16), 1)
    without = mrmae.Teacher(vit.ViT((16, 16), 4, 24, 1, 2, class_token=False), data.MEAN, data.STD, "mae")
    assert without.num_prefix_tokens == 0 and without.features(images)["saliency"] is None


def test_a_teacher_sees_its_own_statistics_and_size(student):
    own, ours = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    model = student("--mean", *ours[0], "--std", *ours[1])
    pixels, seen = torch.rand(2, 3, 16, 16), []

    def normalized(mean, std):
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    model.teachers[0].vit.patch_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.predict(normalized(*ours))
    assert_close(seen[0], normalized(*own), atol=1e-5, rtol=1e-5)
    assert model.teachers[0].renormalize(torch.randn(2, 3, 24, 48), *ours).shape == (2, 3, 16, 16)
    plain, images = mrmae.dino(DINO["state_dict"], 4), torch.randn(1, 3, 32, 32)
    assert torch.equal(plain.renormalize(images, data.MEAN, data.STD), images)  # DINO's statistics are ours


def test_a_teacher_of_another_grid_is_resized_and_says_so(student, capsys):
    model = student("--image-size", 32, 16)  # a grid of 8 x 4
    assert "sees 16 x 16 pixels, 4 x 4 patches, resized to our 8 x 4" in capsys.readouterr().out
    images = torch.randn(2, 3, 32, 16)
    out, given = model.predict(images), ask(model, images)
    small = given["tokens"].transpose(1, 2).unflatten(2, (4, 4))  # (B, Dt, 4, 4)
    wide = F.interpolate(small, (8, 4), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
    assert_close(out["features"][0], vit.gather_tokens(wide, out["ids"]))
    assert out["saliency"][0].shape == (2, 32) and (out["saliency"][0] >= 0).all()


def test_the_teacher_never_changes_and_never_enters_a_checkpoint(student, teacher_file, folder, tmp_path):
    flags = ("--method", "mrmae", "--teacher", teacher_file, "--data", folder, "--epochs", 1)
    run(*flags, "--out", tmp_path / "run")
    saved, model = vit.load_file(tmp_path / "run" / "checkpoint.pt")["model"], student()
    assert saved.keys() == model.state_dict().keys() and not any("teacher" in name for name in saved)
    teacher = model.teachers[0]
    assert not any(p is q for p in model.parameters() for q in teacher.parameters())
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    optimizer = train.build_optimizer(model.train(), train.parse_args(["--method", "mrmae"]))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    model(torch.randn(4, 3, 16, 16))[0].backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())
    encoder, info = vit.load_encoder(tmp_path / "run" / "encoder.pt")
    assert info["method"] == "mrmae" and encoder.config["width"] == 32


def test_a_teacher_is_moved_once_and_compiled_with_the_rest(student, monkeypatch):
    compiled, moves = [], []
    monkeypatch.setattr(vit.Block, "compile", lambda block, **how: compiled.append((block, how)))
    teacher, images = student("--compile").teachers[0], torch.randn(2, 3, 16, 16)
    assert compiled == [(block, {"dynamic": False}) for block in teacher.vit.blocks]
    move = teacher.to
    monkeypatch.setattr(teacher, "to", lambda device: moves.append(str(device)) or move(device))
    for device in ("cpu", "cpu", "meta", "meta"):
        teacher.features(images.to(device))
    assert moves == ["meta"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_targets_are_fp32_under_autocast(student, precision):
    model, images = student(), torch.randn(2, 3, 16, 16)
    exact = ask(model, images)
    norm = model.teachers[0].vit.norm
    norm.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    seen = []
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        out = model.predict(images, torch.arange(16).expand(2, -1) >= 4)
        loss, metrics = model(images)
    assert seen == [(torch.float32, torch.float32)] * 2  # the last LayerNorm
    features, saliency = out["features"][0], out["saliency"][0]
    assert {x.dtype for x in (features, saliency, loss, metrics["mimic"])} == {torch.float32}
    assert_close(features, vit.gather_tokens(exact["tokens"], out["ids"]), atol=0.1, rtol=0)
    assert_close(saliency, exact["saliency"], atol=5e-3, rtol=0)
    assert out["mimicked"][0].dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


# ------------------------------------------------------------------------------------------------------------
# Sec. 3.2: the losses
# ------------------------------------------------------------------------------------------------------------
def test_eq_2_against_loops():
    mimicked, features = torch.randn(2, 3, 5), 4 * torch.randn(2, 3, 5) + 1
    total = 0
    for b in range(2):
        for token in range(3):
            f = features[b, token]
            f = (f - f.mean()) / (f.var(unbiased=False) + 1e-5).sqrt()
            total += ((mimicked[b, token] - f) ** 2).mean()
    assert_close(mrmae.mimic_loss(mimicked, features), total / 6)
    nothing = mrmae.mimic_loss(torch.zeros(2, 3, 64), torch.randn(2, 3, 64))  # a head that says nothing
    assert_close(nothing, torch.tensor(1.0), atol=1e-4, rtol=0)


def test_each_loss_teaches_its_own_patches(student):
    model, images = randomize(student()), torch.randn(2, 3, 16, 16, requires_grad=True)
    out = model.predict(images)
    pred, hidden = out["pred"], out["mask"]
    pred.retain_grad()
    mrmae.reconstruction_loss(pred, out["target"].detach(), hidden).backward(retain_graph=True)
    assert (pred.grad[~hidden] == 0).all() and (pred.grad[hidden] != 0).all()
    images.grad, pred.grad = None, None
    mrmae.mimic_loss(out["mimicked"][0], out["features"][0]).backward()
    by_patch = vit.patchify(images.grad, 4).abs().amax(-1)
    assert (by_patch[hidden] == 0).all() and (by_patch[~hidden] > 0).all() and pred.grad is None


def test_the_total_is_the_weighted_sum_and_two_teachers_share_it(teacher_file):
    weights = ("--recon-weight", 0.3, "--mimic-weight", 0.7)
    model = randomize(build("mrmae", "--teacher", teacher_file, teacher_file, *weights))
    images, mask = torch.randn(2, 3, 16, 16), torch.rand(2, 16).argsort(1) < 12
    loss, metrics = model(images, mask)
    out = model.predict(images, mask)
    mimics = [mrmae.mimic_loss(m, f) for m, f in zip(out["mimicked"], out["features"])]
    assert mimics[0] != mimics[1]  # a head each
    recon = mrmae.reconstruction_loss(out["pred"], out["target"], mask)
    assert_close(loss, 0.3 * recon + 0.35 * mimics[0] + 0.35 * mimics[1])
    assert metrics.keys() == {"recon", "mimic", "mimic_1", "mimic_2"}
    assert not any(value.requires_grad for value in metrics.values())


def test_the_defaults_are_the_papers(student):
    args = train.parse_args("--method mrmae --size base --image-size 224 --patch-size 16".split())
    found = (args.recon_weight, args.mimic_weight, args.mask_ratio, args.weight_decay, args.decoder_depth)
    assert found == (0.5, 0.5, 0.75, 0.05, 8)  # Sec. 3.1 and 4.1
    model = student("--depth", 12)
    found = (model.visible, model.mimic_at, model.fuse_layers, model.num_visible)
    assert found == ("top-k", "encoder", [3, 6, 9, 12], 4)  # focused and fused: Table 3, fourth row
    loss, metrics = model(torch.randn(2, 3, 16, 16))
    assert_close(loss.detach(), 0.5 * metrics["recon"] + 0.5 * metrics["mimic"])


def test_targets_are_those_of_the_students_patches_in_the_students_order(student):
    model, images = student(), torch.randn(3, 3, 16, 16)
    mask, every = torch.rand(3, 16).argsort(1) < 12, ask(model, images)["tokens"]
    out = model.predict(images, mask)
    for b in range(3):
        assert_close(out["features"][0][b], every[b][~mask[b]], atol=1e-5, rtol=1e-5)  # raster order
        assert out["ids"][b].tolist() == (~mask[b]).nonzero()[:, 0].tolist()
    # The tokens too: a patch whose pixels change moves the mimicry of its own place most.
    far = images.clone()
    far[:, :, :4, :4] += 3
    mask[:] = torch.arange(16) >= 4
    far, near = (model.predict(x, mask)["mimicked"][0] for x in (far, images))
    assert ((far - near).abs().sum(-1).argmax(1) == 0).all()


@pytest.mark.parametrize("flags", [(), ("--image-size", 32, 16)], ids=["its grid", "another grid"])
def test_given_features_are_what_asking_the_teacher_gives(student, flags):
    model = student(*flags)
    images = torch.randn(2, 3, *model.encoder.config["image_size"])
    given = [model.ask(teacher, images) for teacher in model.teachers]
    loss = model(images)[0]
    model.teachers = []  # nobody is asked
    assert_close(model(images, features=given)[0], loss)


# ------------------------------------------------------------------------------------------------------------
# Sec. 3.3: the tricks
# ------------------------------------------------------------------------------------------------------------
def test_focused_mimicking_shows_exactly_the_most_salient_patches(student):
    saliency = torch.rand(64, 16)
    ids = mrmae.salient_visible(saliency, 4)
    assert torch.equal(ids, saliency.argsort(1, descending=True)[:, :4].sort(1).values)
    ties = mrmae.salient_visible(torch.ones(2, 16), 4)
    assert (ties.diff(dim=1) > 0).all()  # still 4 different ones
    out = student().predict(torch.randn(4, 3, 16, 16))
    for seen, hidden in zip(out["saliency"][0], out["mask"]):
        assert seen[~hidden].min() >= seen[hidden].max() and (~hidden).sum() == 4


def test_random_masks_do_not_ask_the_saliency(student):
    mask = student("--visible", "random").predict(torch.randn(64, 3, 16, 16))["mask"]
    assert (mask.sum(1) == 12).all() and (mask.float().mean(0) - 0.75).abs().max() < 0.25


def test_joint_saliency_is_the_mean_of_maps_that_sum_to_one():
    a, b = torch.tensor([[0.1, 0.3]]), torch.tensor([[0.02, 0.02]])
    assert_close(mrmae.joint_saliency([a, b]), torch.tensor([[0.375, 0.625]]))


def test_fusion_sums_the_raw_outputs_of_the_asked_blocks(student):
    defaults = {12: [3, 6, 9, 12], 11: [2, 5, 8, 11], 4: [1, 2, 3, 4], 2: [1, 2], 1: [1]}
    assert {depth: mrmae.fused_layers(None, depth) for depth in defaults} == defaults
    model, outputs = randomize(student("--depth", 3, "--fuse-layers", 3, 1)), []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    images = torch.randn(2, 3, 16, 16)
    out = model.predict(images)
    assert_close(out["latent"], model.encoder.norm(outputs[0] + outputs[2]))
    alone = student("--fuse-layers", 2)
    visible = vit.gather_tokens(alone.encoder.embed(images), out["ids"])
    assert_close(alone.predict(images, out["mask"])["latent"], alone.encoder.encode(visible))


def ablations():
    """The rows of Tables 3 and 4 that are flags of mrmae, as the documents give them, and modes that no table
    varies."""
    documents = "".join(path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
    pattern = r"^\| (Table [34]) \| (.+?) \| (?:`(--[^`]+)`|defaults) \|"
    rows = re.findall(pattern, documents, re.M)
    assert [row for _, row, _ in rows] == [
        "+ L_M",
        "+ focused mimic",
        "+ multi-layer fusion",
        "both at the decoder",
        "mimic only",
        "+ masked convolution",
        "DINO",
        "CLIP",
        "joint",
    ]
    rows += [
        ("", "features alone at the decoder", "--mimic-at decoder --recon-weight 0"),
        ("", "raw pixels", "--no-norm-pix"),
    ]

    def tiny(flags):
        # Of 12 blocks, as in the paper, for the layers' numbers; TEACHER: a file of the test that asks.
        flags = re.sub(r"\b(clip|dino)\b", "TEACHER", flags.replace("--stem conv", " ".join(CONV)))
        return flags + " --depth 12"

    return {f"{table} {row}": tiny(flags) for table, row, flags in rows}


ROWS = ablations()


def flags_of(row, teacher_file):
    """A row's flags, with a teacher if it names none."""
    words = [str(teacher_file) if flag == "TEACHER" else flag for flag in row.split()]
    return ["--teacher", str(teacher_file), *words]


@pytest.mark.parametrize("flags", ROWS.values(), ids=ROWS)
def test_every_row_trains_every_parameter_and_draws_every_panel(flags, teacher_file):
    model = build("mrmae", *flags_of(flags, teacher_file)).train()
    images = torch.randn(4, 3, *model.encoder.config["image_size"])
    loss, metrics = model(images)
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    pixels = "--recon-weight 0" not in flags
    assert "mimic" in metrics and ("recon" in metrics) == pixels
    assert (model.decoder is None) == (not pixels and "--mimic-at" not in flags)

    with torch.no_grad():
        pictures = model.eval().visualize(images)
    teachers = [f"attention of\nteacher {i}: mixedae" for i in range(1, len(model.teachers) + 1)]
    recon = "reconstruction" if "--no-norm-pix" in flags else "reconstruction\n(true mean, std)"
    assert list(pictures) == ["image", *teachers, "visible patches", *[recon] * pixels]
    assert all(picture.shape == images.shape for picture in pictures.values())
    assert all(0 <= picture.min() and picture.max() <= 1 for picture in pictures.values())


def test_at_the_decoder_hidden_patches_mimic(student):
    model, images = randomize(student("--mimic-at", "decoder")), torch.randn(2, 3, 16, 16)
    out, every = model.predict(images), ask(model, images)["tokens"]
    assert_close(out["features"][0], every[out["mask"]].view(2, 12, -1), atol=1e-5, rtol=1e-5)
    decoded = model.decoder.features(model.insert_masks(out["latent"], out["ids"]))
    assert_close(out["mimicked"][0], model.mimic_heads[0](decoded)[out["mask"]].view(2, 12, -1))
    assert model.mimic_heads[0].in_features == 16  # the decoder's width


def test_one_batch_can_be_learned(student):
    model, images = student(), torch.randn(4, 3, 16, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = model(images)[1]
    for _ in range(150):
        loss, metrics = model(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert metrics["mimic"] < 0.3 * first["mimic"] and metrics["recon"] < 0.7 * first["recon"]


def test_the_file_alone_prints_the_shapes_of_the_figure(capsys):
    runpy.run_path(str(ROOT / "mrmae.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "random weights" in printed
    shapes = dict(re.findall(r"^(\w+) +(\(.+\))$", printed, re.M))
    names = {"latent", "features", "saliency", "mask", "ids", "pred", "target", "mimicked"}
    assert shapes.keys() == names and shapes["latent"] == "(2, 17, 128)"


# ------------------------------------------------------------------------------------------------------------
# Files and mistakes
# ------------------------------------------------------------------------------------------------------------
class Archive(nn.Module):
    """What OpenAI's file is: a TorchScript module with parameters under CLIP's names."""

    def __init__(self, state):
        super().__init__()
        for name, value in state.items():
            *path, last = name.split(".")
            module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, nn.Parameter(value))

    def forward(self, x):
        return x


@pytest.fixture(scope="module")
def clip_64():
    """A state dict of CLIP with heads of 64, as --teacher clip:FILE expects."""
    return clip_like(CLIP["state_dict"])


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_openais_archive_is_opened_only_with_the_right_hash(clip_64, tmp_path, monkeypatch):
    path = tmp_path / "clip.pt"
    torch.jit.script(Archive(clip_64)).save(path)
    with monkeypatch.context() as patch:
        patch.setattr(torch.jit, "load", None)  # it is never called
        for official in (True, False):
            refusal = "clip.pt: its sha256 .* is not that of OpenAI's .* not opened"
            with pytest.raises(UserError, match=refusal):
                mrmae.read_weights("clip", path, official)
    monkeypatch.setattr(mrmae, "CLIP_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    teacher = mrmae.open_teacher(f"clip:{path}", (4, 4))
    torch.save(clip_64, tmp_path / "plain.pt")
    plain = mrmae.open_teacher(f"clip:{tmp_path / 'plain.pt'}", (4, 4))
    pairs = zip(teacher.state_dict().values(), plain.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_download_is_cached_and_verified(clip_64, tmp_path, monkeypatch):
    source, cached = tmp_path / "source.pt", tmp_path / "hub" / "checkpoints" / "source.pt"
    torch.save(clip_64, source)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setitem(mrmae.URLS, "clip", source.as_uri())
    wrong = "(?s)could not be downloaded .*its sha256 .* is not that of .* give --teacher clip:FILE"
    with pytest.raises(UserError, match=wrong):
        mrmae.open_teacher("clip", (4, 4))
    assert not cached.exists()
    cached.write_bytes(source.read_bytes())  # somebody put another file there
    with pytest.raises(UserError, match="its sha256 .* Remove it"):
        mrmae.open_teacher("clip", (4, 4))
    cached.unlink()

    monkeypatch.setattr(mrmae, "CLIP_SHA256", hashlib.sha256(source.read_bytes()).hexdigest())
    archive = type("Archive", (), {"state_dict": lambda self: clip_64})
    monkeypatch.setattr(torch.jit, "load", lambda path, map_location: archive())
    assert mrmae.open_teacher("clip", (4, 4)).width == 64
    source.unlink()
    assert mrmae.open_teacher("clip", (4, 4)).width == 64  # from the cache

    half = tmp_path / "half.pth"
    torch.save(DINO["state_dict"], half)
    half.write_bytes(half.read_bytes()[:9000])
    monkeypatch.setitem(mrmae.URLS, "dino", half.as_uri())
    with pytest.raises(UserError, match="(?s)half.pth could not be downloaded .*half.part: "):
        mrmae.open_teacher("dino", (4, 4))
    assert not (cached.parent / "half.pth").exists()  # half a file does not stay


@pytest.fixture(scope="module")
def files(clip_64, teacher_file, tmp_path_factory):
    """A folder of teachers, good and bad."""
    root = tmp_path_factory.mktemp("files")

    def encoder(name, mean=data.MEAN, std=data.STD, **options):
        torch.save(
            vit.pack_encoder(vit.ViT((16, 16), 4, 24, 1, 2, **options), "mae", "mean", mean, std), root / name
        )

    encoder("without-cls.pt", class_token=False)
    encoder("grey.pt", (0.5,), (0.5,), channels=1)
    encoder("no-std.pt", std=(0, 0, 0))
    torch.save(clip_64, root / "clip.pt")
    torch.save(DINO["state_dict"], root / "dino.pth")
    torch.save({"visual.layer1.0.conv1.weight": torch.zeros(1)}, root / "resnet.pt")
    torch.save({**DINO["state_dict"], "norm.bias": torch.zeros(3)}, root / "odd.pth")
    whole = (root / "clip.pt").read_bytes()
    (root / "truncated.pt").write_bytes(whole[:5000])
    (root / "broken.zip").write_bytes(whole.replace(b"PK\x01\x02", b"PK\x09\x09"))
    (root / "encoder.pt").write_bytes(teacher_file.read_bytes())
    return root


MISTAKES = [  # flags, where ROOT/ is the folder above, and words of the line that they get
    ("", "--teacher", "runs/mixedae/encoder.pt", "one or two (now 0)"),
    ("--teacher ROOT/encoder.pt ROOT/encoder.pt ROOT/encoder.pt", "one or two (now 3)"),
    ("--teacher CLIP", "--teacher CLIP: no such file, nor clip,"),
    ("--teacher clip:", "--teacher clip:: no such file"),
    ("--teacher ROOT", "ROOT: no such file"),
    ("--teacher ROOT/grey.pt", "1 channels, not 3"),
    ("--teacher ROOT/no-std.pt", "not a whole encoder.pt", "std"),
    ("--teacher ROOT/none.pt", "none.pt: no such file"),
    ("--teacher clip:ROOT/none.pt", "none.pt: no such file"),
    ("--teacher dino:ROOT/none.pt", "none.pt: no such file"),
    ("--teacher clip:ROOT/broken.zip", "nor is it a plain state dict: ROOT/broken.zip: "),
    ("--teacher clip:ROOT/truncated.pt", "nor is it a plain state dict: ROOT/truncated.pt: "),
    ("--teacher ROOT/clip.pt", "not an encoder.pt"),
    ("--teacher clip:ROOT/dino.pth", "not a ViT of CLIP"),
    ("--teacher clip:ROOT/resnet.pt", "not a ViT of CLIP"),
    ("--teacher dino:ROOT/clip.pt", "not a ViT of DINO"),
    ("--teacher dino:ROOT/odd.pth", "not a ViT of DINO", "norm.bias"),
    ("--teacher dino", "http://127.0.0.1:9/dino.pth could not be downloaded", "dino:FILE"),
    ("--teacher ROOT/without-cls.pt", "no saliency", "--visible random"),
    ("--fuse-layers 0 2", "--fuse-layers: 0", "from 1"),
    ("--fuse-layers 3", "--fuse-layers 3", "1 to 2"),
    ("--fuse-layers 2 2", "at most once"),
    ("--fuse-layers 1", "the last block, 2"),
    ("--recon-weight -1", "--recon-weight: -1"),
    ("--recon-weight nan", "--recon-weight: nan"),
    ("--mimic-weight 0", "--mimic-weight: 0"),
    ("--mask-ratio 1", "--mask-ratio 1.0"),
    ("--mask-ratio 0", "--mask-ratio 0.0"),
    ("--mask-ratio nan", "--mask-ratio: nan"),
    ("--stem conv --patch-size 8 --image-size 64", "--patch-size 8", "4 x 2 x 2"),
    ("--stem conv --patch-size 16 --image-size 60", "image size 60 x 60", "patch size 16"),
    ("--stem conv --patch-size 16 --image-size 64 --size tiny", "--stem conv has no size tiny", "micro"),
]


@pytest.mark.parametrize("flags, words", [(flags, words) for flags, *words in MISTAKES])
def test_mistakes_get_one_line(flags, words, files, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setitem(mrmae.URLS, "dino", "http://127.0.0.1:9/dino.pth")  # nobody answers
    if flags and "--teacher" not in flags:
        flags = f"--teacher ROOT/encoder.pt {flags}"
    flags = flags.replace("ROOT", str(files)).split()
    run("--method", "mrmae", "--data", folder, "--out", tmp_path / "run", *flags, code=2)
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and error.startswith("train.py: "), error
    assert all(word.replace("ROOT", str(files)) in error for word in words), error


def test_a_stopped_run_goes_on_as_if_it_had_not_been(teacher_file, folder, tmp_path):
    flags = ("--method", "mrmae", "--teacher", teacher_file, "--data", folder, "--visible", "random")
    weights = []
    for out, *more in (("whole",), ("stopped", "--max-steps", 7), ("stopped",)):
        run(*flags, "--epochs", 2, "--out", tmp_path / out, *more)
        weights.append(vit.load_file(tmp_path / out / "checkpoint.pt")["model"])
    whole, stopped, resumed = weights
    assert not torch.equal(stopped["mimic_heads.0.weight"], whole["mimic_heads.0.weight"])
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
