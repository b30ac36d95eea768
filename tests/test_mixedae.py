"""MixedAE: each equation against a slow second version, and the facts of the paper."""

import argparse
import itertools
import math
import re
import runpy
import shlex
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import mixedae
import vit
from conftest import ROOT, build, randomize
from vit import UserError


def sources_of(G=3, n=4, L=16):
    return mixedae.draw_sources(G, n, L, "cpu")


def images_of(B=8):
    return torch.randn(B, 3, 16, 16)


# ------------------------------------------------------------------------------------------------------------
# Equations
# ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n, L", [(2, 16), (3, 12), (4, 16), (8, 16)])
def test_eq_2_each_image_gives_exactly_its_share_and_places_are_random(n, L):
    sources = sources_of(200, n, L)
    assert all((sources == i).sum(1).eq(L // n).all() for i in range(n))
    assert ((sources == 0).float().mean(0) - 1 / n).abs().max() < 0.15


def test_eq_1_mixing_patch_by_patch():
    x, sources = torch.randn(3, 4, 16, 6), sources_of()
    mixed = mixedae.mix(x, sources)
    for g, l in itertools.product(range(3), range(16)):
        assert torch.equal(mixed[g, l], x[g, sources[g, l], l])


def test_eq_3_unmixing_and_the_parts_tile_the_mixed_sequence():
    z, sources, mask_token = torch.randn(3, 17, 6), sources_of(), torch.randn(1, 1, 6)
    parts = mixedae.unmix(z, sources, 4, mask_token).view(3, 4, 17, 6)
    for g, i in itertools.product(range(3), range(4)):
        assert torch.equal(parts[g, i, 0], z[g, 0])  # CLS, copied to each
        for l in range(16):
            expected = z[g, 1 + l] if sources[g, l] == i else mask_token[0, 0]
            assert torch.equal(parts[g, i, 1 + l], expected)
    tiles = [part * (sources == i).unsqueeze(-1) for i, part in enumerate(parts[:, :, 1:].unbind(1))]
    assert torch.equal(sum(tiles), z[:, 1:])


def test_eq_4_over_the_patches_that_others_cover():
    pred, target, sources = torch.randn(12, 16, 6, requires_grad=True), torch.randn(12, 16, 6), sources_of()
    loss = mixedae.reconstruction_loss(pred, target, sources)
    places = itertools.product(range(3), range(4), range(16))
    hidden = [(4 * g + i, l) for g, i, l in places if sources[g, l] != i]
    assert_close(loss, torch.stack([((pred[b, l] - target[b, l]) ** 2).mean() for b, l in hidden]).mean())
    loss.backward()
    own = mixedae.indicator(sources, 4).view(12, 16)
    assert (pred.grad[own] == 0).all() and (pred.grad[~own] != 0).all()  # no gradient at visible patches


def test_eq_7_with_loops():
    z, sources, tau, L = torch.randn(2, 8, 5), sources_of(2, 2, 8), 0.25, 8
    total = 0.0
    for j, l in itertools.product(range(2), range(L)):
        cos = F.cosine_similarity(z[j, l][None], z[j], dim=-1)
        others = [k for k in range(L) if k != l]
        denominator = sum(math.exp(cos[k] / tau) for k in others)
        positives = [k for k in others if sources[j, k] == sources[j, l]]
        shares = [math.exp(cos[k] / tau) / denominator for k in positives]
        total -= sum(map(math.log, shares)) / len(positives) / L / 2
    assert_close(mixedae.homologous_contrastive_loss(z, sources, tau), torch.tensor(total))


@pytest.mark.parametrize("tau", [0.25, 1.0])
@pytest.mark.parametrize("n", [2, 4])
def test_eq_7_has_its_least_value_on_the_corners_of_a_simplex(n, tau):
    sources, floor = sources_of(2, n, 16), mixedae.homologous_contrastive_floor(16, n, tau)
    corners = F.one_hot(sources, n).float() - 1 / n  # (2, 16, n), all patches of an image at one corner
    loss = mixedae.homologous_contrastive_loss
    assert_close(loss(corners, sources, tau), torch.tensor(floor))
    assert floor > math.log(16 // n - 1)  # as if the cosine of other images could fall without end

    # No features that are near it, and none that are trained, do better.
    features = (corners + 0.1 * torch.randn_like(corners)).requires_grad_()
    for _ in range(50):
        value = loss(features, sources, tau)
        assert value > floor - 1e-5
        features = (features - torch.autograd.grad(value, features)[0]).detach().requires_grad_()

    logged = build("mixedae", "--mixing-ratio", 1 / n, "--temperature", tau)(images_of())[1]["homocon_floor"]
    assert_close(logged, torch.tensor(floor))


def test_eq_7_with_the_mean_positive_of_table_3c():
    z, sources, tau = torch.randn(2, 8, 5), sources_of(2, 2, 8), 0.25
    total = 0.0
    for j, l in itertools.product(range(2), range(8)):
        mean = z[j, sources[j] == sources[j, l]].mean(0)  # l itself among them
        others = z[j, [k for k in range(8) if k != l]]
        score = F.cosine_similarity(z[j, l], mean, dim=0) / tau
        total += ((F.cosine_similarity(z[j, l][None], others) / tau).logsumexp(0) - score) / 8 / 2
    assert_close(mixedae.homologous_contrastive_loss(z, sources, tau, "mean"), total)
    assert "homocon_floor" not in build("mixedae", "--homocon-positives", "mean")(images_of())[1]


def test_eq_7_before_or_after_the_final_norm():
    """Table 3b. What Eq. 7 sees is the last block's output, with or without encoder.norm."""
    images, sources = images_of(), sources_of(2)
    for position in ("pre-ln", "post-ln"):
        model, seen = randomize(build("mixedae", "--homocon-position", position)), {}
        model.encoder.blocks[-1].register_forward_hook(lambda *call: seen.update(last=call[-1]))
        model.projector.register_forward_hook(lambda module, inputs, _: seen.update(features=inputs[0]))
        model(images, sources)
        expected = seen["last"] if position == "pre-ln" else model.encoder.norm(seen["last"])
        assert_close(seen["features"], expected[:, 1:])


def mutual_information(joint):
    """I(A; B) in bits of a joint distribution {(a, b): probability}."""
    a, b = {}, {}
    for (x, y), p in joint.items():
        a[x] = a.get(x, 0) + p
        b[y] = b.get(y, 0) + p
    return sum(p * math.log2(p / a[x] / b[y]) for (x, y), p in joint.items() if p)


def eq_5(dependence, known):
    """Both sides of Eq. 5, exactly: images of two patches, each patch 1 or 2; X_2 copies X_1 with probability
    `dependence`; r = .5.

    known: given M, I(mix; X_1 | M) against I(MAE; X_1 | M); else M is hidden from the mix, while MAE's zeros
    still show it.
    """
    images, masks = list(itertools.product((1, 2), repeat=2)), [(1, 2), (2, 1)]
    mixing, masking = {}, {}
    for x1, x2, M in itertools.product(images, images, masks):
        p = (dependence * (x1 == x2) + (1 - dependence) / 4) / 4 / len(masks)
        mixed = tuple(x1[l] if M[l] == 1 else x2[l] for l in range(2))
        masked = tuple(x1[l] if M[l] == 1 else 0 for l in range(2))
        for joint, what in ((mixing, mixed), (masking, masked)):
            key = ((what, M) if known else what, x1)
            joint[key] = joint.get(key, 0) + p
    return mutual_information(mixing), mutual_information(masking)


def test_eq_5_mixing_raises_the_mutual_information_if_images_share_something():
    """Eq. 5: I(mix(X_1, X_2, M); X_1) >= I(MAE(X_1, M); X_1). M is independent of X_1, so that
    I(. , M; X_1) = I(. ; X_1 | M)."""
    mixing, masking = eq_5(dependence=0, known=True)
    assert mixing == pytest.approx(1) and masking == pytest.approx(1)  # equality: one of two bits
    mixing, masking = eq_5(dependence=0.5, known=True)
    assert mixing > masking + 0.1 and masking == pytest.approx(1)  # these images are dependent
    mixing, masking = eq_5(dependence=0, known=False)
    assert mixing < masking - 0.1  # no theorem when M is hidden: the mix does not say whose patch is whose


def test_eq_8_adds_the_losses_with_lambda():
    model = randomize(build("mixedae", "--homocon-weight", 0.3, "--recon-weight", 0.7))
    images, sources = images_of(), sources_of(2)
    loss, metrics = model(images, sources)
    out = model.predict(images, sources)
    recon = mixedae.reconstruction_loss(out["pred"], out["target"], sources)
    homocon = mixedae.homologous_contrastive_loss(model.projector(out["z"][:, 1:]), sources, 0.25)
    assert_close(loss, 0.7 * recon + 0.3 * homocon)
    assert_close(metrics["recon"], recon.detach())
    assert_close(metrics["homocon"], homocon.detach())


# ------------------------------------------------------------------------------------------------------------
# The figure
# ------------------------------------------------------------------------------------------------------------
def test_predict_is_the_papers_figure():
    model = randomize(build("mixedae"))
    images, sources, seen = images_of(), sources_of(2), {}
    model.decoder.register_forward_hook(lambda module, inputs, _: seen.update(unmixed=inputs[0]))
    out = model.predict(images, sources)
    patches = vit.patchify(images, 4)
    groups = patches.view(2, 4, 16, 48)  # consecutive images
    assert torch.equal(out["mixed"], mixedae.mix(groups, sources)) and torch.equal(out["sources"], sources)
    tokens = model.encoder.embed(vit.unpatchify(out["mixed"], (4, 4), 4)) + model.segments[sources]
    assert_close(out["z"], model.encoder.encode(tokens))
    assert_close(out["z"], model.encoder.norm(out["z_pre_ln"]))
    embedded = model.decoder.embed(out["z"])
    assert torch.equal(out["unmixed"], seen["unmixed"]) and out["unmixed"].shape == (8, 17, 16)
    for b in range(8):  # before positions: the embedded z where M = i, [MASK] elsewhere
        own = sources[b // 4] == b % 4
        assert_close(out["unmixed"][b, 1:][own], embedded[b // 4, 1:][own])
        assert_close(out["unmixed"][b, 1:][~own], model.decoder.mask_token[0].expand(12, -1))
    mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    assert_close(out["target"], (patches - mean) / (var + 1e-6).sqrt())
    assert out["pred"].shape == (8, 16, 48) and out["z"].shape == (2, 17, 32)


def test_full_mode_is_compose_mode_on_each_group_once_for_each_of_its_masks():
    full, compose = build("mixedae", "--mixing-mode", "full"), build("mixedae")
    full.load_state_dict(randomize(compose).state_dict())
    images, sources = images_of(), sources_of(8).view(2, 4, 16)  # 2 groups, 4 masks each
    out = full.predict(images, sources)
    assert out["mixed"].shape == (8, 16, 48) and out["z"].shape == (8, 17, 32)
    assert torch.equal(out["sources"], sources)
    decoded = ("unmixed", "pred", "target")
    assert all(len(out[name]) == 32 for name in decoded)  # n B
    losses = []
    for m in range(4):
        one = compose.predict(images, sources[:, m])
        for g in range(2):
            for name in ("mixed", "z", "z_pre_ln"):
                assert_close(out[name].unflatten(0, (2, 4))[g, m], one[name][g])
            for name in decoded:  # rows: group, mask, source
                assert_close(out[name].unflatten(0, (2, 4, 4))[g, m], one[name].unflatten(0, (2, 4))[g])
        losses.append(compose(images, sources[:, m])[0])
    assert_close(full(images, sources)[0], torch.stack(losses).mean())
    drawn = full.predict(images)["sources"]
    assert drawn.shape == (2, 4, 16) and all((drawn == i).sum(-1).eq(4).all() for i in range(4))
    assert not torch.equal(drawn[:, 0], drawn[:, 1])  # independent masks


@pytest.mark.parametrize(
    "topk, image_size, k",
    [(0.25, 224, 49), (0.125, 224, 24), (0.5, 224, 98), (0.29, 160, 29), (0.33334, 96, 12)],
)
def test_k_is_the_asked_share_of_l(topk, image_size, k):
    """.29 x 100 is 28.999... in floats."""
    model = build("mixedae", "--topk", topk, "--image-size", image_size, "--patch-size", 16)
    assert model.encoder.blocks[1].attn.topk == k


def test_homologous_attention_in_all_but_the_first_layers_of_the_encoder_alone():
    def layers(*flags):
        model = build("mixedae", "--depth", 4, *flags)
        assert all(block.attn.topk is None for block in model.decoder.blocks)
        return [block.attn.topk for block in model.encoder.blocks]

    assert layers("--global-layers", 2, "--topk", 0.5) == [None, None, 8, 8]
    assert layers("--global-layers", 4) == layers("--topk", 1.0) == [None] * 4
    assert layers("--global-layers", 0) == [4] * 4


def test_oracle_attention_equals_encoding_each_image_alone(monkeypatch):
    """Attention masked by M itself is n separate encodings (CLS apart), with a sampling accuracy of 1."""
    model = randomize(build("mixedae", "--global-layers", 0, "--no-segment-embedding"))
    images, sources = images_of(), sources_of(2)
    same = torch.zeros(2, 1, 17, 17, dtype=torch.bool)
    same[:, 0, 1:, 1:] = sources.unsqueeze(1) == sources.unsqueeze(2)
    same[:, :, 0] = True
    monkeypatch.setattr(vit, "keep_topk", lambda scores, k: same.expand_as(scores))
    for block in model.encoder.blocks:
        block.attn.record = True
    z = model.predict(images, sources)["z"]
    kept, attention = model.encoder.blocks[-1].attn.recorded
    assert mixedae.sampling_accuracy(attention, kept, sources, 4) == 1
    embedded = model.encoder.embed(images)
    for b in range(8):
        own = sources[b // 4] == b % 4
        x = embedded[b : b + 1, own]
        for block in model.encoder.blocks:  # plain attention among its own patches
            q, k, v = block.attn.qkv(block.norm1(x)).view(1, 4, 3, 2, 16).permute(2, 0, 3, 1, 4)
            y = (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v
            x = x + block.attn.proj(y.transpose(1, 2).reshape(1, 4, 32))
            x = x + block.mlp(block.norm2(x))
        assert_close(z[b // 4, 1:][own], model.encoder.norm(x)[0], atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------
# Pictures, numbers, files
# ------------------------------------------------------------------------------------------------------------
def test_sampling_accuracy_counts_the_keys_of_the_own_image():
    sources = torch.tensor([[0, 0, 1, 1]])
    attention = torch.zeros(1, 1, 5, 5)
    rows = [[0.4, 0.3, 0.2, 0.1], [0.4, 0.1, 0.3, 0.2], [0.1, 0.2, 0.3, 0.4], [0.3, 0.4, 0.1, 0.2]]
    attention[0, 0, 1:, 1:] = torch.tensor(rows)
    # the two largest: query 0: keys 0 1 (2 right), 1: 0 2 (1), 2: 3 2 (2), 3: 1 0 (0)
    assert mixedae.sampling_accuracy(attention, None, sources, 2) == 5 / 8
    kept = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    assert mixedae.sampling_accuracy(attention, kept, sources, 2) == 0.5
    chance = mixedae.sampling_accuracy(torch.rand(64, 2, 17, 17), None, sources_of(64), 4)
    assert abs(chance - 0.25) < 0.02  # r


@pytest.mark.parametrize("flags", ["", "--topk 1", "--mixing-mode full", "--recon-weight 0"])
@torch.no_grad()
def test_pictures_and_the_accuracy_of_each_layer_with_and_without_topk(flags):
    model, images = randomize(build("mixedae", *flags.split())).eval(), images_of(10)
    torch.manual_seed(1)
    numbers = model.numbers(images)
    layers = [block.attn for block in model.encoder.blocks]
    assert not any(layer.record or layer.recorded for layer in layers)  # global again, and nothing is kept
    for layer in layers:
        layer.record = True
    torch.manual_seed(1)
    sources = model.predict(images[:8])["sources"].flatten(0, -2)  # two images behind the last whole group
    expected = [mixedae.sampling_accuracy(*layer.recorded[::-1], sources, 4).item() for layer in layers]
    assert numbers == {"accuracy": expected[-1], "accuracy_layers": expected}
    assert len(expected) == 2 and 0 < numbers["accuracy"] < 1

    pictures = model.visualize(images)
    titles = ["image", "mixed", "who gave\neach patch", "reconstruction\n(true mean, std)"]
    assert list(pictures) == titles[: 4 if model.recon_weight else 3]
    for picture in pictures.values():
        assert picture.shape == (8, 3, 16, 16) and picture.min() >= 0 and picture.max() <= 1
    for method in (model.visualize, model.numbers):
        with pytest.raises(UserError, match="3 images cannot be split into groups of n = 4"):
            method(images[:3])
    assert not any(layer.record for layer in layers)  # `numbers` has switched it off


@pytest.mark.parametrize("mode", ["compose", "full"])
@torch.no_grad()
def test_pictures_show_the_mixed_image_and_each_images_own_patches(mode):
    model = build("mixedae", "--mixing-mode", mode, "--mean", *[0.5] * 3, "--std", *[0.2] * 3)
    images = torch.rand(8, 3, 16, 16)
    torch.manual_seed(1)
    pictures = [vit.patchify(picture, 4) for picture in model.visualize((images - 0.5) / 0.2).values()]
    torch.manual_seed(1)
    out = model.predict((images - 0.5) / 0.2)
    sources = out["sources"].view(2, -1, 16)[:, 0]  # the first mask of each group
    pred = out["pred"].view(2, -1, 4, 16, 48)[:, 0].flatten(0, 1)
    clean, mixed, who, rebuilt = pictures
    assert_close(clean, vit.patchify(images, 4))
    for b in range(8):
        own = sources[b // 4] == b % 4
        for shown in (mixed, rebuilt):
            assert torch.equal((clean[b] - shown[b]).abs().amax(-1) < 1e-6, own)
        mean, std = clean[b].mean(-1, keepdim=True), (clean[b].var(-1, keepdim=True) + 1e-6 * 0.04).sqrt()
        assert_close(rebuilt[b][~own], (pred[b] * std + mean).clamp(0, 1)[~own])
        colours = (2 * who[b] - mixed[b]).view(16, 16, 3)  # a colour for each image of the group
        expected = torch.tensor(mixedae.COLOURS)[sources[b // 4]]
        assert_close(colours, expected.unsqueeze(1).expand(-1, 16, -1), atol=1e-5, rtol=0)


def test_raw_targets_give_raw_pictures():
    model, images = build("mixedae", "--no-norm-pix"), images_of()
    assert torch.equal(model.predict(images)["target"], vit.patchify(images, 4))
    assert list(model.visualize(images))[-1] == "reconstruction"


def test_export_is_a_plain_encoder_with_segment_0_folded_into_the_patch_bias(tmp_path):
    images = images_of(2)
    for flags in ((), ("--no-segment-embedding",)):
        model = randomize(build("mixedae", *flags, "--mean", 0.1, 0.2, 0.3, "--std", 0.4, 0.5, 0.6))
        torch.save(model.export(), tmp_path / "encoder.pt")
        encoder, info = vit.load_encoder(tmp_path / "encoder.pt")
        assert info["method"] == "mixedae" and info["feature"] == "mean"
        assert (info["mean"], info["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
        assert set(encoder.state_dict()) == set(model.encoder.state_dict())
        for block in model.encoder.blocks:
            block.attn.topk = None
        segment = 0 if flags else model.segments[0]
        expected = model.encoder.encode(model.encoder.embed(images) + segment)
        assert_close(encoder.features(images)["patches"], expected[:, 1:], atol=1e-5, rtol=1e-5)
        assert flags or len(model.segments) == 4


def test_the_file_alone_prints_the_shapes_of_the_figure(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mixedae.py", "--mixing-mode", "full", "--batch-size", "4"])
    runpy.run_path(str(ROOT / "mixedae.py"), run_name="__main__")
    shapes = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(shapes) == ["mixed", "sources", "z", "z_pre_ln", "unmixed", "pred", "target"]
    assert shapes["sources"] == "(1, 4, 64)" and shapes["pred"] == "(16, 64, 192)"


# ------------------------------------------------------------------------------------------------------------
# Training, and flags that do not fit
# ------------------------------------------------------------------------------------------------------------
def ablations():
    """The rows of Table 3 and of the poster, as the README or docs/ gives their flags, and modes that no
    table varies."""
    texts = [path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))]
    row = r"^\| (3[a-f]|poster b) \| (.+?) \| (?:`(.+?)`|defaults) \|"
    rows = re.findall(row, "\n".join(texts), re.M)
    assert {table for table, _, _ in rows} == {"3a", "3b", "3c", "3d", "3e", "3f", "poster b"}
    assert len(rows) == 19
    rows += [
        ("", "full", "--mixing-mode full"),
        ("", "raw pixels", "--no-norm-pix"),
        ("", "Eq. 7 alone before the norm", "--recon-weight 0 --homocon-position pre-ln"),
    ]
    # at the paper's depth Table 3e goes to three global layers
    return {f"{table} {row}": ["--depth", "4", *shlex.split(flags)] for table, row, flags in rows}


ROWS = ablations()


@pytest.mark.parametrize("flags", ROWS.values(), ids=ROWS)
def test_every_parameter_gets_a_gradient_and_one_batch_can_be_overfitted(flags):
    model, images = build("mixedae", *flags), images_of()
    sources = model.predict(images)["sources"]
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for step in range(60):
        optimizer.zero_grad()
        loss, _ = model(images, sources)
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
            assert [name for name, grad in trained.items() if grad is None or not grad.any()] == []
        optimizer.step()
    floor = model.homocon_weight * mixedae.homologous_contrastive_floor(16, model.n, model.tau)
    bound = 0 if model.recon_weight else floor
    assert losses[-1] - bound < 0.8 * (losses[0] - bound)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--mixing-ratio .3", "0.3 is not 1/n"),
        ("--mixing-ratio 1", "1.0 is not 1/n"),
        ("--mixing-ratio 3", "3.0 is not 1/n"),
        ("--mixing-ratio 0", "mixing-ratio: 0: must be a number"),
        ("--mixing-ratio=-.25", "mixing-ratio: -.25: must be a number"),
        ("--mixing-ratio nan", "mixing-ratio: nan: must be a number"),
        ("--mixing-ratio .0153846 --batch-size 65", "2 to 64"),  # 1 / 65
        ("--batch-size 6", "multiple of n = 4"),
        ("--mixing-ratio .333 --batch-size 9", "16 patches"),
        ("--mixing-ratio .0625 --batch-size 16", "at least 2 each"),
        ("--topk .01", "at least 1 key"),
        ("--topk 1.2", "topk: 1.2: must be a number from 0 to 1"),
        ("--topk nan", "topk: nan: must be a number from 0 to 1"),
        ("--global-layers 3", "has 2 layers"),
        ("--global-layers=-1", "must be a whole number"),
        ("--recon-weight 0 --homocon-weight 0", "one of them must be above 0"),
        ("--recon-weight=-1", "recon-weight: -1: must be a number from 0"),
        ("--homocon-weight nan", "homocon-weight: nan: must be a number from 0"),
        ("--homocon-weight inf", "homocon-weight: inf: must be a number from 0"),
        ("--temperature 0", "temperature: 0: must be a number"),
        ("--image-size 18", "multiple of the patch"),
        ("--heads 3", "heads"),
        ("--width 30", "multiple of"),
    ],
)
def test_flags_that_do_not_fit_are_named(flags, words):
    with pytest.raises(UserError, match=words):
        build("mixedae", *flags.split())


def test_images_that_make_no_groups_are_named():
    with pytest.raises(UserError, match="6 images cannot be split into groups of n = 4"):
        build("mixedae")(images_of(6))


@pytest.mark.parametrize("mode, shape", [("compose", (2, 16)), ("full", (2, 4, 16))])
def test_a_given_mask_must_fit(mode, shape):
    model, images = build("mixedae", "--mixing-mode", mode), images_of()
    sources = sources_of(math.prod(shape[:-1])).view(shape)
    unbalanced = sources.clone()
    unbalanced[0, ..., 0] = (unbalanced[0, ..., 0] + 1) % 4  # one image has 3 patches, another 5
    wrong_shape = (sources[:1], sources[..., :8], sources.flatten(), sources.unsqueeze(1))
    message = f"mask must have shape {shape} and give each of the images 0 to 3 exactly r L = 4 patches"
    for wrong in (*wrong_shape, unbalanced, sources + 1):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            model.predict(images, wrong)
    assert torch.equal(model.predict(images, sources)["sources"], sources)


def test_k_is_topk_times_l_rounded_down_but_for_rounding():
    plain = [(0.25, 64, 16), (0.25, 1024, 256), (0.3, 64, 19), (1, 4096, 4096)]
    for topk, L, k in [*plain, (0.29, 100, 29), (0.333, 144, 48)]:
        assert mixedae.keys_per_query(argparse.Namespace(topk=topk), L) == k
