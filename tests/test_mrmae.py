"""MCMAE, CLIP and DINO against reference numbers of their authors' code, and the facts of MR-MAE Sec. 3.2 and 3.3."""
import hashlib
import re
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

GOLDEN = Path(__file__).parent / "golden"
MCMAE, CLIP, DINO = (torch.load(GOLDEN / f"{name}.pt", weights_only=True) for name in ("mcmae_tiny64", "clip_tiny", "dino_tiny"))
CONV = "--stem conv --stem-widths 16 24 --stem-depths 1 1 --stem-mlp-ratios 2 3 --patch-size 16".split()
MCMAE_SIZES = (*CONV, *"--image-size 64 --width 48 --depth 2 --heads 4 --mlp-ratio 4 --decoder-width 32 --decoder-depth 2 --decoder-heads 4 --decoder-mlp-ratio 2".split())


# --------------------------------------------------------------------------------------------------------------------
# MCMAE
# --------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def mcmae():
    model = build("mae", *MCMAE_SIZES)
    model.load_state_dict(mrmae.from_official_mcmae({"model": MCMAE["state_dict"]}))  # strict
    return model


def test_mcmae_forward_and_gradients_are_the_authors(mcmae):
    seen, stem = {}, mcmae.encoder.patch_embed
    parts = {"patch_embed1": stem.embed1, "blocks1.0": stem.blocks1[0], "patch_embed2": stem.embed2, "blocks2.0": stem.blocks2[0], "patch_embed3": stem.embed3,
             "patch_embed4": stem.proj, "stage1_output_decode": mcmae.stage_fusion[0], "stage2_output_decode": mcmae.stage_fusion[1],
             "blocks3.0": mcmae.encoder.blocks[0], "blocks3.1": mcmae.encoder.blocks[1]}
    for name, module in parts.items():
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output}))
    mcmae.encoder.norm.register_forward_hook(lambda module, inputs, output: seen.update(fused_before_norm=inputs[0]))
    mask, order = MCMAE["mask"].bool(), MCMAE["ids_keep"].argsort(1)
    out = mcmae.predict(MCMAE["images"], mask)
    for name, value in MCMAE["intermediates"].items():
        if name.startswith(("blocks3", "fused")):
            value = vit.take(value, order)  # theirs are shuffled, ours in raster order
        assert_close(seen[name], value, atol=5e-6, rtol=0, msg=name)
    assert_close(out["latent"], vit.take(MCMAE["latent"], order), atol=5e-6, rtol=0)
    assert_close(out["pred"], MCMAE["pred"], atol=5e-6, rtol=0)
    loss, _ = mcmae(MCMAE["images"], mask)
    assert_close(loss, MCMAE["loss"], atol=5e-6, rtol=0)
    loss.backward()
    assert_gradients(mcmae, mrmae.from_official_mcmae(MCMAE["grads"]), 5e-6)


def test_init_from_a_published_file(mcmae, tmp_path):
    torch.save({"model": MCMAE["state_dict"]}, tmp_path / "mcmae.pth")
    model = randomize(build("mae", *MCMAE_SIZES))
    assert train.load_weights(model, tmp_path / "mcmae.pth") == "the whole model"
    assert all(torch.equal(value, mcmae.state_dict()[name]) for name, value in model.state_dict().items())
    wider = build("mae", *MCMAE_SIZES, "--image-size", 64, 96)  # the tables are resized
    assert train.load_weights(wider, tmp_path / "mcmae.pth") == "the whole model" and wider.encoder.pos_embed.shape == (1, 24, 48)
    with pytest.raises(UserError, match="does not fit this MAE"):
        train.load_weights(build("mae", *MCMAE_SIZES, "--stem-widths", 16, 32), tmp_path / "mcmae.pth")
    with pytest.raises(UserError, match="does not fit this MAE"):
        train.load_weights(build("mae", "--image-size", 64, "--patch-size", 16, "--width", 48, "--heads", 4), tmp_path / "mcmae.pth")


def test_the_finer_stages_get_the_mask_of_the_token_grid(mcmae):
    seen = []
    for block in (mcmae.encoder.patch_embed.blocks1[0], mcmae.encoder.patch_embed.blocks2[0]):
        block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    mcmae.predict(MCMAE["images"], MCMAE["mask"].bool())
    assert torch.equal(seen[0].float(), MCMAE["masks"]["keep_mask_stage1"]) and torch.equal(seen[1].float(), MCMAE["masks"]["keep_mask_stage2"])


@pytest.mark.parametrize("method", ["mae", "mrmae"])
def test_hidden_pixels_do_not_pass_the_convolution_stages(method, teacher_file):
    more = ("--teacher", teacher_file) if method == "mrmae" else ()
    model, images = randomize(build(method, *CONV, "--image-size", 64, 96, *more)), torch.randn(4, 3, 64, 96)
    mask = torch.rand(4, 24).argsort(1) < 18
    changed = images + vit.unpatchify(torch.randn(4, 24, 768) * mask.unsqueeze(-1), (4, 6), 16)
    assert torch.equal(model.predict(images, mask)["latent"], model.predict(changed, mask)["latent"])
    model.encoder.embed, unmasked = (lambda images, mask, stages: unmasked(images, None, stages)), model.encoder.embed
    assert not torch.allclose(model.predict(images, mask)["latent"], model.predict(changed, mask)["latent"])  # the masks do it


def test_sizes_of_mcmae():
    def model(method, *flags):
        with torch.device("meta"):
            return train.METHODS[method](train.parse_args(["--method", method, "--stem", "conv", "--image-size", "224", *flags]))

    base = model("mae", "--size", "base")
    assert sum(p.numel() for p in base.parameters()) == 115_041_408  # the authors' counts
    assert sum(p.numel() for p in base.encoder.parameters()) + sum(p.numel() for p in base.stage_fusion.parameters()) == 88_932_736
    # of forks, fine-tuned, 1000 classes: in millions
    for flags, millions in (("--size small --depth 11 --stem-widths 128 256 --stem-depths 2 2 --stem-mlp-ratios 4 4", 22.3),
                            ("--size large --depth 23 --stem-widths 384 768 --stem-depths 2 2 --stem-mlp-ratios 8 8", 323.0),
                            ("--size huge --depth 31 --stem-widths 768 1024 --stem-depths 2 2 --stem-mlp-ratios 8 8", 680.7)):
        encoder = model("mae", *flags.split()).encoder
        assert round((sum(p.numel() for p in encoder.parameters()) + 1000 * (encoder.width + 1)) / 1e6, 1) == millions
    micro = model("mae", "--mask-ratio", ".5")
    assert micro.encoder.patch_size == 16 and micro.encoder.grid == (14, 14)


def test_a_conv_encoder_has_a_class_token_in_mrmae_alone(teacher_file, tmp_path):
    for method, first in (("mae", 0), ("mrmae", 1)):
        model = build(method, *CONV, "--image-size", 64, *(("--teacher", teacher_file) if first else ()))
        torch.save(model.export(), tmp_path / "encoder.pt")
        encoder, info = vit.load_encoder(tmp_path / "encoder.pt")
        out, images = encoder.features(torch.randn(2, 3, 64, 64), taps=[2]), torch.randn(2, 3, 64, 64)
        assert (out["cls"] is not None) == bool(first) and out["patches"].shape == (2, 16, 32) and out["taps"][0].shape == (2, 32, 4, 4)
        assert info["feature"] == "mean" and encoder.pos_embed.shape == (1, first + 16, 32)
        assert torch.equal(encoder.features(images)["patches"], model.encoder.eval().features(images)["patches"])
    tokens = model.encode(images, torch.arange(4).expand(2, -1), torch.arange(16).expand(2, -1) >= 4)
    for conv in model.stage_fusion:
        nn.init.zeros_(conv.weight), nn.init.zeros_(conv.bias)
    plain = model.encode(images, torch.arange(4).expand(2, -1), torch.arange(16).expand(2, -1) >= 4)
    assert torch.equal(tokens[:, 0], plain[:, 0]) and not torch.allclose(tokens[:, 1:], plain[:, 1:])  # stage features are not for CLS


# --------------------------------------------------------------------------------------------------------------------
# Teachers
# --------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    """A tiny encoder.pt, with CLS, of another width than the students'."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("teacher") / "encoder.pt"
    torch.save(vit.pack_encoder(randomize(vit.ViT((16, 16), 4, 24, 2, 2)), "mixedae", "mean", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), path)
    return path


def clip_like(state):
    """The same weights as OpenAI's whole model has them: a prefix, text keys, matrices in fp16."""
    half = {f"visual.{name}": value.half() if value.ndim > 1 and not name.endswith("embedding") else value for name, value in state.items()}
    return {**half, "text_projection": torch.randn(4, 4), "logit_scale": torch.ones(()), "token_embedding.weight": torch.randn(3, 4), "transformer.resblocks.0.ln_1.weight": torch.ones(4)}


@pytest.mark.parametrize("heads", [None, 4])
def test_clip_is_the_authors(heads):
    teacher = mrmae.clip_visual(CLIP["state_dict"], heads)
    if heads is None:
        assert teacher.vit.blocks[0].attn.heads == 1  # width // 64
        return
    for output in ("pre_ln", "post_ln", "projected"):
        expected = CLIP["patch_" + {"pre_ln": "pre_ln_post", "post_ln": "ln_post"}.get(output, output)]
        assert_close(teacher.features(CLIP["images"], output)["tokens"], expected, atol=5e-6, rtol=0)
    assert_close(teacher.features(CLIP["images"])["saliency"], CLIP["cls_attn_mean"], atol=5e-6, rtol=0)
    assert_close(teacher.vit.put_cls(teacher.vit.embed(CLIP["images"])), CLIP["after_ln_pre"], atol=5e-6, rtol=0)
    state, _ = teacher.look(CLIP["images"])
    assert_close(state[0], CLIP["block_outputs"][0], atol=5e-6, rtol=0)
    assert (teacher.mean, teacher.std) == (mrmae.CLIP_MEAN, mrmae.CLIP_STD)


def test_clip_in_fp16_with_its_text_tower():
    teacher = mrmae.clip_visual(clip_like(CLIP["state_dict"]), 4)
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in teacher.parameters()) and not teacher.training
    assert_close(teacher.features(CLIP["images"])["tokens"], CLIP["patch_ln_post"], atol=2e-2, rtol=0)


def test_dino_is_the_authors_at_its_own_size_and_at_another():
    full = {"student": {}, "teacher": {**{f"module.backbone.{name}": value for name, value in DINO["state_dict"].items()}, "module.head.mlp.0.weight": torch.zeros(2, 2)}, "epoch": 1}
    for state in (DINO["state_dict"], full):
        teacher = mrmae.dino(state, 4)
        out = teacher.features(DINO["images"])
        assert_close(out["tokens"], DINO["intermediate_layers"][-1][:, 1:], atol=5e-6, rtol=0)
        assert_close(out["saliency"], DINO["cls_attn_mean"], atol=5e-6, rtol=0)
    out = teacher.features(DINO["images_48"])
    assert_close(out["tokens"], DINO["tokens_48"][:, 1:], atol=5e-6, rtol=0)
    assert_close(out["saliency"], DINO["last_selfattention_48"].mean(1)[:, 0, 1:], atol=5e-6, rtol=0)


def test_asking_for_some_patches_gives_what_asking_for_all_gives_there(teacher_file):
    for teacher in (mrmae.open_teacher(str(teacher_file), "post_ln", (4, 4)), mrmae.clip_visual(CLIP["state_dict"], 4)):
        images, ids = torch.randn(3, 3, *teacher.vit.config["image_size"]), torch.rand(3, 16).argsort(1)[:, :5]
        state, _ = teacher.look(images)
        assert_close(teacher.describe(state, ids), vit.take(teacher.describe(state), ids), atol=1e-6, rtol=1e-5)
    reference = vit.load_encoder(teacher_file)[0].features(images[:, :, :16, :16], attention=True)
    out = mrmae.open_teacher(str(teacher_file), "post_ln", (4, 4)).features(images[:, :, :16, :16])
    assert_close(out["tokens"], reference["patches"])
    assert_close(out["saliency"], reference["attention"].mean(1)[:, 0, 1:])


def test_a_teacher_sees_its_own_statistics_and_size(teacher_file):
    teacher, pixels = mrmae.open_teacher(str(teacher_file), "post_ln", (4, 4)), torch.rand(2, 3, 16, 16)
    own = (pixels - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    normalised = (pixels - torch.tensor(data.MEAN).view(3, 1, 1)) / torch.tensor(data.STD).view(3, 1, 1)
    assert_close(teacher.renormalize(normalised), own, atol=1e-5, rtol=1e-5)
    assert teacher.renormalize(torch.randn(2, 3, 24, 48)).shape == (2, 3, 16, 16)
    plain = mrmae.dino(DINO["state_dict"], 4)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(plain.renormalize(images), images)  # DINO's statistics are ours


def test_a_teacher_of_another_grid_is_resized_and_says_so(teacher_file, capsys):
    model = build("mrmae", "--teacher", teacher_file, "--image-size", 32, 16)  # a grid of 8 x 4
    assert "sees 16 x 16 pixels, 4 x 4 patches, resized to our 8 x 4" in capsys.readouterr().out
    images = torch.randn(2, 3, 32, 16)
    out, teacher = model.predict(images), model.teachers[0]
    every = teacher.features(teacher.renormalize(images))
    wide = F.interpolate(every["tokens"].transpose(1, 2).unflatten(2, (4, 4)), (8, 4), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
    assert_close(out["features"][0], vit.take(wide, out["ids"]))
    assert out["saliency"][0].shape == (2, 32) and (out["saliency"][0] >= 0).all()


def test_the_teacher_never_changes_and_never_enters_a_checkpoint(teacher_file, folder, tmp_path):
    run("--method", "mrmae", "--teacher", teacher_file, "--data", folder, "--out", tmp_path / "run", "--epochs", 1)
    saved = vit.load_file(tmp_path / "run" / "checkpoint.pt")
    model = build("mrmae", "--teacher", teacher_file)
    assert saved["model"].keys() == model.state_dict().keys() and not any("teacher" in name for name in saved["model"])
    assert not any(p is q for p in model.parameters() for q in model.teachers[0].parameters())
    before = {name: value.clone() for name, value in model.teachers[0].state_dict().items()}
    optimizer = train.build_optimizer(model.train(), train.parse_args(["--method", "mrmae"]))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    model(torch.randn(4, 3, 16, 16))[0].backward()
    optimizer.step()
    assert not model.teachers[0].training and all(torch.equal(value, before[name]) for name, value in model.teachers[0].state_dict().items())
    assert all(p.grad is None for p in model.teachers[0].parameters())
    encoder, info = vit.load_encoder(tmp_path / "run" / "encoder.pt")
    assert info["method"] == "mrmae" and encoder.config["width"] == 32


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_targets_are_fp32_under_autocast(teacher_file, precision):
    model, images = build("mrmae", "--teacher", teacher_file), torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        out = model.predict(images)
        loss, metrics = model(images)
    state, _ = model.teachers[0].look(images)
    assert state[0].dtype == torch.float32
    assert out["features"][0].dtype == out["saliency"][0].dtype == loss.dtype == metrics["mimic"].dtype == torch.float32
    assert out["mimicked"][0].dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


# --------------------------------------------------------------------------------------------------------------------
# Sec. 3.2: the losses
# --------------------------------------------------------------------------------------------------------------------
def test_eq_2_against_loops():
    mimicked, features = torch.randn(2, 3, 5), 4 * torch.randn(2, 3, 5) + 1
    total = 0
    for b in range(2):
        for token in range(3):
            f = features[b, token]
            f = (f - f.mean()) / (f.var(unbiased=False) + 1e-5).sqrt()
            total += ((mimicked[b, token] - f) ** 2).mean()
    assert_close(mrmae.mimic_loss(mimicked, features), total / 6)
    assert_close(mrmae.mimic_loss(torch.zeros(2, 3, 64), torch.randn(2, 3, 64)), torch.tensor(1.0), atol=1e-4, rtol=0)  # a head that says nothing


def test_each_loss_teaches_its_own_patches(teacher_file):
    model, images = randomize(build("mrmae", "--teacher", teacher_file)), torch.randn(2, 3, 16, 16, requires_grad=True)
    out = model.predict(images)
    hidden = out["mask"]
    out["pred"].retain_grad()
    mrmae.reconstruction_loss(out["pred"], out["target"].detach(), hidden).backward(retain_graph=True)
    assert (out["pred"].grad[~hidden] == 0).all() and (out["pred"].grad[hidden] != 0).all()
    images.grad, out["pred"].grad = None, None
    mrmae.mimic_loss(out["mimicked"][0], out["features"][0]).backward()
    by_patch = vit.patchify(images.grad, 4).abs().amax(-1)
    assert (by_patch[hidden] == 0).all() and (by_patch[~hidden] > 0).all() and out["pred"].grad is None


def test_the_total_is_the_weighted_sum_and_two_teachers_share_it(teacher_file):
    model, images = randomize(build("mrmae", "--teacher", teacher_file, teacher_file, "--recon-weight", 0.3, "--mimic-weight", 0.7)), torch.randn(2, 3, 16, 16)
    mask = torch.rand(2, 16).argsort(1) < 12
    loss, metrics = model(images, mask)
    out = model.predict(images, mask)
    mimics = [mrmae.mimic_loss(m, f) for m, f in zip(out["mimicked"], out["features"])]
    assert mimics[0] != mimics[1]  # a head each
    assert_close(loss, 0.3 * mrmae.reconstruction_loss(out["pred"], out["target"], mask) + 0.35 * mimics[0] + 0.35 * mimics[1])
    assert metrics.keys() == {"recon", "mimic", "mimic_1", "mimic_2"} and not any(value.requires_grad for value in metrics.values())


def test_the_defaults_are_the_papers(teacher_file):
    args = train.parse_args(["--method", "mrmae", "--size", "base", "--image-size", "224", "--patch-size", "16"])
    assert (args.recon_weight, args.mimic_weight, args.mask_ratio, args.weight_decay, args.decoder_depth) == (0.5, 0.5, 0.75, 0.05, 8)  # Sec. 3.1 and 4.1
    model = build("mrmae", "--teacher", teacher_file, "--depth", 12)
    assert (model.visible, model.mimic_at, model.fuse_layers, model.num_visible) == ("top-k", "encoder", [3, 6, 9, 12], 4)  # focused and fused: Table 3, fourth row
    images = torch.randn(2, 3, 16, 16)
    loss, metrics = model(images)
    assert_close(loss.detach(), 0.5 * metrics["recon"] + 0.5 * metrics["mimic"])


def test_targets_are_those_of_the_students_patches_in_the_students_order(teacher_file):
    model, images = build("mrmae", "--teacher", teacher_file), torch.randn(3, 3, 16, 16)
    mask = torch.rand(3, 16).argsort(1) < 12
    every = model.teachers[0].features(model.teachers[0].renormalize(images))["tokens"]
    out = model.predict(images, mask)
    for b in range(3):
        assert_close(out["features"][0][b], every[b][~mask[b]], atol=1e-5, rtol=1e-5)  # raster order
        assert out["ids"][b].tolist() == (~mask[b]).nonzero()[:, 0].tolist()
    # the tokens too: a patch whose pixels change moves the mimicry of its own place most
    far = images.clone()
    far[:, :, :4, :4] += 3
    mask[:] = torch.arange(16) >= 4
    moved = (model.predict(far, mask)["mimicked"][0] - model.predict(images, mask)["mimicked"][0]).abs().sum(-1)
    assert (moved.argmax(1) == 0).all()


def test_given_features_are_what_asking_the_teacher_gives(teacher_file):
    model, images = build("mrmae", "--teacher", teacher_file), torch.randn(2, 3, 16, 16)
    given = [teacher.features(teacher.renormalize(images)) for teacher in model.teachers]
    assert_close(model(images, features=given)[0], model(images)[0])


# --------------------------------------------------------------------------------------------------------------------
# Sec. 3.3: the tricks
# --------------------------------------------------------------------------------------------------------------------
def test_focused_mimicking_shows_exactly_the_most_salient_patches(teacher_file):
    saliency = torch.rand(64, 16)
    ids = mrmae.salient_visible(saliency, 4, "top-k")
    assert torch.equal(ids, saliency.argsort(1, descending=True)[:, :4].sort(1).values)
    assert torch.equal(mrmae.salient_visible(torch.ones(2, 16), 4, "top-k").diff(dim=1) > 0, torch.ones(2, 3, dtype=torch.bool))  # ties: still 4 different ones
    model, images = build("mrmae", "--teacher", teacher_file), torch.randn(4, 3, 16, 16)
    out = model.predict(images)
    for b in range(4):
        seen = out["saliency"][0][b]
        assert seen[~out["mask"][b]].min() >= seen[out["mask"][b]].max() and (~out["mask"][b]).sum() == 4


def test_sampling_follows_the_saliency():
    saliency = torch.tensor([0.5, 0.3, 0.1, 0.1]).expand(20000, -1)
    ids = mrmae.salient_visible(saliency, 2, "sampled")
    assert (ids[:, 0] < ids[:, 1]).all()  # two different ones, sorted
    # drawn one after the other: P(0 is among two) = .5 + .3 (.5 / .7) + 2 (.1) (.5 / .9)
    assert abs((ids == 0).any(1).float().mean() - (0.5 + 0.3 * 0.5 / 0.7 + 0.2 * 0.5 / 0.9)) < 0.015


def test_random_masks_do_not_ask_the_saliency(teacher_file):
    model, images = build("mrmae", "--teacher", teacher_file, "--visible", "random"), torch.randn(64, 3, 16, 16)
    mask = model.predict(images)["mask"]
    assert (mask.sum(1) == 12).all() and (mask.float().mean(0) - 0.75).abs().max() < 0.25


def test_joint_saliency_is_the_mean_of_maps_that_sum_to_one():
    a, b = torch.tensor([[0.1, 0.3]]), torch.tensor([[0.02, 0.02]])
    assert_close(mrmae.joint_saliency([a, b]), torch.tensor([[0.375, 0.625]]))


def test_fusion_sums_the_raw_outputs_of_the_asked_blocks(teacher_file):
    assert [mrmae.fused_layers(None, depth) for depth in (12, 11, 4, 2, 1)] == [[3, 6, 9, 12], [2, 5, 8, 11], [1, 2, 3, 4], [1, 2], [1]]
    model, images, outputs = randomize(build("mrmae", "--teacher", teacher_file, "--depth", 3, "--fuse-layers", 3, 1)), torch.randn(2, 3, 16, 16), []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    out = model.predict(images)
    assert_close(out["latent"], model.encoder.norm(outputs[0] + outputs[2]))
    alone = build("mrmae", "--teacher", teacher_file, "--fuse-layers", 2)
    mask = out["mask"]
    assert_close(alone.predict(images, mask)["latent"], alone.encoder.encode(vit.take(alone.encoder.embed(images), vit.visible_ids(mask))))


def ablations():
    """The rows of Tables 3 and 4 that are flags of mrmae, as the README gives them, and modes that no table varies."""
    rows = re.findall(r"^\| (Table [34]) \| (.+?) \| (?:`(--[^`]+)`|defaults) \|", (ROOT / "README.md").read_text(), re.M)
    assert [row for _, row, _ in rows] == ["+ L_M", "+ focused mimic", "+ multi-layer fusion", "both at the decoder", "mimic only", "+ masked convolution", "DINO", "CLIP", "joint"]
    rows += [("", "features alone at the decoder", "--mimic-at decoder --recon-weight 0"), ("", "sampled", "--visible sampled"), ("", "raw pixels", "--no-norm-pix"),
             ("", "pre_ln", "--teacher-output pre_ln")]
    conv = "--stem conv --patch-size 16 --image-size 64 --stem-widths 8 12 --stem-depths 1 1 --stem-mlp-ratios 2 2"
    # of 12 blocks, as in the paper, for the layers' numbers; TEACHER: a file of the test that asks
    return {f"{table} {row}": re.sub(r"\b(clip|dino)\b", "TEACHER", flags.replace("--stem conv", conv)) + " --depth 12" for table, row, flags in rows}


ROWS = ablations()


def flags_of(row, teacher_file):
    """A row's flags, with a teacher if it names none."""
    return ["--teacher", str(teacher_file), *(str(teacher_file) if flag == "TEACHER" else flag for flag in row.split())]


@pytest.mark.parametrize("flags", ROWS.values(), ids=ROWS)
def test_every_row_trains_every_parameter(flags, teacher_file):
    model = build("mrmae", *flags_of(flags, teacher_file)).train()
    images = torch.randn(4, 3, *model.encoder.config["image_size"])
    loss, metrics = model(images)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    assert ("recon" in metrics) == ("--recon-weight 0" not in flags) and "mimic" in metrics
    assert (model.decoder is None) == ("--recon-weight 0" in flags and "--mimic-at" not in flags)
    pictures, _ = model.eval().visualize(images)
    assert pictures.shape[1] == len(model.panels) and 0 <= pictures.min() and pictures.max() <= 1


def test_at_the_decoder_hidden_patches_mimic(teacher_file):
    model, images = randomize(build("mrmae", "--teacher", teacher_file, "--mimic-at", "decoder")), torch.randn(2, 3, 16, 16)
    out = model.predict(images)
    every = model.teachers[0].features(model.teachers[0].renormalize(images))["tokens"]
    assert_close(out["features"][0], every[out["mask"]].view(2, 12, -1), atol=1e-5, rtol=1e-5)
    assert_close(out["mimicked"][0], model.mimic_heads[0](model.decoder.features(model.insert_masks(out["latent"], out["ids"])))[out["mask"]].view(2, 12, -1))
    assert model.mimic_heads[0].in_features == 16  # the decoder's width


def test_one_batch_can_be_learned(teacher_file):
    model, images = build("mrmae", "--teacher", teacher_file), torch.randn(4, 3, 16, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = model(images)[1]
    for _ in range(150):
        loss, metrics = model(images)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert metrics["mimic"] < 0.3 * first["mimic"] and metrics["recon"] < 0.7 * first["recon"]


# --------------------------------------------------------------------------------------------------------------------
# Files and mistakes
# --------------------------------------------------------------------------------------------------------------------
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
    return clip_like({name: value for name, value in CLIP["state_dict"].items()})


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_openais_archive_is_opened_only_with_the_right_hash(clip_64, tmp_path, monkeypatch):
    path = tmp_path / "clip.pt"
    torch.jit.script(Archive(clip_64)).save(path)
    with pytest.raises(UserError, match="clip.pt: its sha256 .* is not that of OpenAI's .* not opened"):
        mrmae.load_clip(path, official=False)
    monkeypatch.setattr(mrmae, "CLIP_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    teacher = mrmae.open_teacher(f"clip:{path}", "projected", (4, 4))
    torch.save(clip_64, tmp_path / "plain.pt")
    plain = mrmae.open_teacher(f"clip:{tmp_path / 'plain.pt'}", "projected", (4, 4))
    assert all(torch.equal(a, b) for a, b in zip(teacher.state_dict().values(), plain.state_dict().values()))


def test_a_download_is_cached_and_verified(clip_64, tmp_path, monkeypatch):
    source = tmp_path / "source.pt"
    torch.save(clip_64, source)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setitem(mrmae.URLS, "clip", source.as_uri())
    with pytest.raises(UserError, match="(?s)could not be downloaded .*invalid hash.* give --teacher clip:FILE"):
        mrmae.open_teacher("clip", "post_ln", (4, 4))
    cached = tmp_path / "hub" / "checkpoints" / "source.pt"
    assert not cached.exists()
    cached.write_bytes(source.read_bytes())  # somebody put another file there
    with pytest.raises(UserError, match="its sha256 .* Remove it"):
        mrmae.open_teacher("clip", "post_ln", (4, 4))
    cached.unlink()
    monkeypatch.setattr(mrmae, "CLIP_SHA256", hashlib.sha256(source.read_bytes()).hexdigest())
    monkeypatch.setattr(torch.jit, "load", lambda path, map_location: type("Archive", (), {"state_dict": lambda self: vit.load_file(path)})())
    assert mrmae.open_teacher("clip", "post_ln", (4, 4)).vit.width == 64
    source.unlink()
    assert mrmae.open_teacher("clip", "post_ln", (4, 4)).vit.width == 64  # from the cache
    torch.save(DINO["state_dict"], tmp_path / "half.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "half.pth").read_bytes()[:9000])
    monkeypatch.setitem(mrmae.URLS, "dino", (tmp_path / "half.pth").as_uri())
    with pytest.raises(UserError, match="(?s)half.pth could not be downloaded .*cannot be read"):
        mrmae.open_teacher("dino", "post_ln", (4, 4))
    assert not (tmp_path / "hub" / "checkpoints" / "half.pth").exists()  # half a file does not stay


def one_line(capsys, *words):
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and error.startswith("train.py: ") and all(word in error for word in words), error


def test_mistakes_get_one_line(teacher_file, clip_64, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setitem(mrmae.URLS, "dino", "http://127.0.0.1:9/dino.pth")  # nobody answers
    torch.save(clip_64, tmp_path / "clip.pt")
    torch.save(DINO["state_dict"], tmp_path / "dino.pth")
    (tmp_path / "truncated.pt").write_bytes((tmp_path / "clip.pt").read_bytes()[:5000])
    torch.save({"visual.layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pt")
    torch.save({**DINO["state_dict"], "norm.bias": torch.zeros(3)}, tmp_path / "odd.pth")
    torch.save(vit.pack_encoder(vit.ViT((16, 16), 4, 24, 1, 2, class_token=False), "mae", "mean", data.MEAN, data.STD), tmp_path / "without-cls.pt")
    torch.save(vit.pack_encoder(vit.ViT((16, 16), 4, 24, 1, 2, channels=1), "mae", "mean", (0.5,), (0.5,)), tmp_path / "grey.pt")
    torch.save(vit.pack_encoder(vit.ViT((16, 16), 4, 24, 1, 2), "mae", "mean", data.MEAN, (0, 0, 0)), tmp_path / "no-std.pt")
    (tmp_path / "broken.zip").write_bytes((tmp_path / "clip.pt").read_bytes().replace(b"PK\x01\x02", b"PK\x09\x09"))
    torch.save({**clip_64, "visual.proj": torch.zeros(5, 6)}, tmp_path / "projection.pt")
    teacher = ("--teacher", teacher_file)
    conv = ("--patch-size", 16, "--image-size", 64, "--stem", "conv")
    for flags, words in (
        ((), ("--teacher", "runs/mixedae/encoder.pt", "one or two (now 0)")),
        (("--teacher", *[teacher_file] * 3), ("one or two (now 3)",)),
        (("--teacher", "CLIP"), ("--teacher CLIP: no such file, nor clip,",)),
        (("--teacher", "clip:"), ("--teacher clip:: names no file",)),
        (("--teacher", tmp_path / "grey.pt"), ("1 channels, not 3",)),
        (("--teacher", tmp_path / "no-std.pt"), ("not a whole encoder.pt", "std")),
        (("--teacher", f"clip:{tmp_path / 'broken.zip'}"), ("broken.zip: cannot be read",)),
        (("--teacher", f"clip:{tmp_path / 'projection.pt'}"), ("proj (5, 6) for a width of 64",)),
        (("--teacher", tmp_path / "none.pt"), ("none.pt: no such file",)),
        (("--teacher", f"clip:{tmp_path / 'none.pt'}"), ("none.pt: cannot be read",)),
        (("--teacher", f"dino:{tmp_path / 'none.pt'}"), ("none.pt: no such file",)),
        (("--teacher", f"clip:{tmp_path / 'truncated.pt'}"), ("truncated.pt: cannot be read",)),
        (("--teacher", tmp_path / "clip.pt"), ("not an encoder.pt",)),
        (("--teacher", f"clip:{tmp_path / 'dino.pth'}"), ("not the visual ViT of CLIP",)),
        (("--teacher", f"clip:{tmp_path / 'resnet.pt'}"), ("not the visual ViT of CLIP",)),
        (("--teacher", f"dino:{tmp_path / 'clip.pt'}"), ("not a ViT of DINO",)),
        (("--teacher", f"dino:{tmp_path / 'odd.pth'}"), ("not a ViT of DINO", "norm.bias")),
        (("--teacher", "dino"), ("http://127.0.0.1:9/dino.pth could not be downloaded", "dino:FILE")),
        ((*teacher, "--teacher-output", "projected"), ("only CLIP has a projection",)),
        (("--teacher", tmp_path / "without-cls.pt"), ("no saliency", "--visible random")),
        ((*teacher, "--fuse-layers", 0, 2), ("--fuse-layers 0 2", "1 to 2")),
        ((*teacher, "--fuse-layers", 3), ("--fuse-layers 3", "1 to 2")),
        ((*teacher, "--fuse-layers", 2, 2), ("at most once",)),
        ((*teacher, "--fuse-layers", 1), ("the last block, 2",)),
        ((*teacher, "--recon-weight", -1), ("--recon-weight -1.0",)),
        ((*teacher, "--mimic-weight", 0), ("--mimic-weight 0.0", "--method mae")),
        ((*teacher, "--mask-ratio", 1), ("--mask-ratio 1.0",)),
        ((*teacher, "--stem-widths", 8, 8), ("go with --stem conv",)),
        ((*teacher, *conv, "--patch-size", 8), ("--patch-size 8", "4 x 2 x 2")),
        ((*teacher, *conv, "--image-size", 60), ("image size 60 x 60", "patch size 16")),
        ((*teacher, *conv, "--size", "large"), ("--stem conv has no size large", "--stem-widths")),
        ((*teacher, *conv, "--stem-depths", 0, 1), ("--stem-depths 0 1", "at least 1")),
        ((*teacher, *conv, "--stem-mlp-ratios", "nan", 2), ("--stem-mlp-ratios nan",)),
        ((*teacher, "--mlp-ratio", 0), ("--mlp-ratio 0.0",)),
        ((*teacher, "--decoder-mlp-ratio", "inf"), ("--decoder-mlp-ratio inf",)),
    ):
        run("--method", "mrmae", "--data", folder, "--out", tmp_path / "run", *flags, code=2)
        one_line(capsys, *words)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(teacher_file, folder, tmp_path):
    flags = ("--method", "mrmae", "--teacher", teacher_file, "--data", folder, "--visible", "sampled")
    run(*flags, "--epochs", 2, "--out", tmp_path / "whole")
    whole = vit.load_file(tmp_path / "whole" / "checkpoint.pt")
    before = train.optimizer_step

    def stopping(run, micro_batches, step, stop_asked):
        return before(run, micro_batches, step, stop_asked or step == 6)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "optimizer_step", stopping)
        run(*flags, "--epochs", 2, "--out", tmp_path / "stopped", code=143)
    run(*flags, "--epochs", 2, "--out", tmp_path / "stopped")
    stopped = vit.load_file(tmp_path / "stopped" / "checkpoint.pt")
    assert stopped["step"] == whole["step"] and all(torch.equal(value, stopped["model"][name]) for name, value in whole["model"].items())
