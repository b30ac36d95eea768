"""The encoder and the shared pieces: numerics against slow versions, exact TopK, positions, masks, files."""

import argparse
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import vit
from conftest import randomize
from vit import Attention, Block, CrossAttention, UserError, ViT, keep_topk

STEM = {"widths": [8, 12], "depths": [1, 2], "mlp_ratios": [2.0, 2.0]}


def tiny(**options):
    return randomize(ViT((16, 24), 4, 32, 2, 2, **options)).eval()


def conv(**options):
    return randomize(ViT((32, 32), 16, 32, 3, 2, stem=STEM, **options)).eval()


# ------------------------------------------------------------------------------------------------------------
# Patches, masks, positions
# ------------------------------------------------------------------------------------------------------------
def test_patchify_orders_row_column_channel_and_has_an_inverse():
    images = torch.randn(2, 3, 8, 12)
    patches = vit.patchify(images, 4)
    second = images[1, :, 4:8, 4:8].permute(1, 2, 0)  # patch 4: second row, second column
    assert_close(patches[1, 4].view(4, 4, 3), second)
    assert_close(vit.unpatchify(patches, (2, 3), 4), images)


def test_normalised_targets_use_the_unbiased_variance_and_can_be_undone():
    patches = torch.randn(2, 5, 12) * torch.tensor([1.0, 1.0, 1e-4, 3.0, 1.0]).view(5, 1)  # one nearly flat
    target = vit.norm_pix(patches)
    for b in range(2):
        for l in range(5):
            x = patches[b, l]
            var = (x - x.mean()).square().sum() / 11
            assert_close(target[b, l], (x - x.mean()) / (var + 1e-6).sqrt())
    assert_close(vit.undo_norm_pix(target, patches), patches)


def test_patch_embedding_is_a_linear_map_of_patchified_pixels():
    encoder, images = tiny(), torch.randn(2, 3, 16, 24)
    weight = encoder.patch_embed.proj.weight.permute(0, 2, 3, 1).reshape(32, -1)
    expected = vit.patchify(images, 4) @ weight.T + encoder.patch_embed.proj.bias
    assert_close(encoder.patch_embed(images), expected, atol=1e-5, rtol=1e-5)


def test_random_masks_show_the_asked_number_at_any_place_in_raster_order():
    ids = vit.random_visible(400, 12, 3, "cpu")
    assert ids.shape == (400, 3) and (ids.diff(dim=1) > 0).all()
    hidden = vit.hidden_mask(ids, 12)
    assert hidden.dtype == torch.bool and (hidden.sum(1) == 9).all()
    assert all((~row).nonzero()[:, 0].tolist() == own.tolist() for row, own in zip(hidden, ids))
    assert torch.equal(vit.visible_ids(hidden), ids)
    assert ((~hidden).float().mean(0) - 3 / 12).abs().max() < 0.1  # every place is visible about as often
    assert not (ids == ids[0]).all()
    tokens = torch.randn(400, 12, 5)
    assert torch.equal(vit.gather_tokens(tokens, ids), tokens[~hidden].view(400, 3, 5))
    with pytest.raises(ValueError, match="same number of patches, not 0 to 1"):
        vit.visible_ids(torch.tensor([[True, False], [True, True]]))


def test_positions_encode_the_column_first_then_the_row():
    table = vit.sincos_positions(16, (3, 5))
    assert table.shape == (1, 16, 16) and (table[0, 0] == 0).all()
    for row in range(3):
        for column in range(5):
            angles = [10000 ** (-k / 4) for k in range(4)]
            expected = [f(c * a) for c in (column, row) for f in (math.sin, math.cos) for a in angles]
            assert_close(table[0, 1 + row * 5 + column], torch.tensor(expected))


@pytest.mark.parametrize("size", [(384, 384), (320, 192)])
def test_positions_resize_by_grid_size_and_leave_cls_alone(size):
    encoder = ViT((224, 224), 16, 32, 1, 2).eval()
    grid = (size[0] // 16, size[1] // 16)
    table = vit.resize_positions(encoder.pos_embed, encoder.grid, grid)
    assert table.shape == (1, 1 + grid[0] * grid[1], 32)
    assert torch.equal(table[:, 0], encoder.pos_embed[:, 0])
    patches = encoder.pos_embed[0, 1:].T.reshape(1, 32, 14, 14)
    slow = nn.functional.interpolate(patches, size=grid, mode="bicubic")
    assert_close(table[0, 1:].T.reshape(1, 32, *grid), slow)
    assert encoder.features(torch.randn(1, 3, *size))["patches"].shape == (1, grid[0] * grid[1], 32)


# ------------------------------------------------------------------------------------------------------------
# Attention
# ------------------------------------------------------------------------------------------------------------
def attend(q, k, v, keys=lambda i, scores: list(range(len(scores)))):
    """Heads (B, H, ., D_h) one query at a time -> (B, U, H D_h), and the probabilities (B, H, U, N).

    keys: (query, scores) -> the keys that it sees.
    """
    (B, H, U, size), N = q.shape, k.shape[2]
    out, probabilities = torch.zeros(B, U, H, size), torch.zeros(B, H, U, N)
    for b in range(B):
        for h in range(H):
            for i in range(U):
                scores = [float(q[b, h, i] @ k[b, h, j]) / math.sqrt(size) for j in range(N)]
                seen = keys(i, scores)
                weights = torch.tensor([scores[j] for j in seen]).softmax(0)
                out[b, i, h] = sum(w * v[b, h, j] for w, j in zip(weights, seen))
                probabilities[b, h, i, seen] = weights
    return out.flatten(2), probabilities


TOPK = [None, 1, 3, 8]


@pytest.mark.parametrize("topk", TOPK)
@torch.no_grad()
def test_homologous_attention_equals_sorting_one_query_at_a_time(topk):
    def keys(i, scores):
        if topk is None or i == 0:
            return list(range(len(scores)))
        return [0, *sorted(range(1, len(scores)), key=lambda j: -scores[j])[:topk]]

    attention, x = randomize(Attention(16, 2, topk)), torch.randn(2, 9, 16)
    q, k, v = attention.qkv(x).view(2, 9, 3, 2, 8).permute(2, 0, 3, 1, 4)
    expected, probabilities = attend(q, k, v, keys)
    for record in (False, True):
        attention.record = record
        assert_close(attention(x), attention.proj(expected), atol=1e-5, rtol=1e-5)
    kept, recorded = attention.recorded
    assert_close(recorded, probabilities, atol=1e-5, rtol=1e-5)
    assert_close(recorded.sum(-1), torch.ones(2, 2, 9))
    assert kept is None if topk is None else torch.equal(recorded > 0, kept)


@pytest.mark.parametrize("topk", TOPK)
def test_the_fused_form_of_homologous_attention_is_equation_6(topk):
    attention, x = randomize(Attention(16, 2, topk)), torch.randn(2, 9, 16)
    results = []
    for attention.record in (True, False):
        given = x.clone().requires_grad_()
        out = attention(given)
        results.append((out, *torch.autograd.grad(out.square().sum(), [given, *attention.parameters()])))
    for written_out, fused in zip(*results):
        assert_close(fused, written_out, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exactly_k_keys_are_kept_even_where_all_scores_tie(dtype):
    rounded = (torch.randn(2, 3, 65, 65) * 4).round().to(dtype)  # a few distinct values: many ties
    for scores in (torch.zeros(2, 3, 65, 65, dtype=dtype), rounded):
        kept = keep_topk(scores, 16)
        patches = kept[..., 1:, 1:]
        assert (patches.sum(-1) == 16).all()
        assert kept[..., 0, :].all() and kept[..., :, 0].all()  # CLS sees all, and every query sees CLS
        worst_kept = scores[..., 1:, 1:].masked_fill(~patches, float("inf")).amin(-1)
        best_dropped = scores[..., 1:, 1:].masked_fill(patches, float("-inf")).amax(-1)
        assert (worst_kept >= best_dropped).all()


def test_keeping_all_keys_is_global_attention():
    x, plain = torch.randn(2, 9, 16), randomize(Attention(16, 2))
    homologous = Attention(16, 2, topk=8)
    homologous.load_state_dict(plain.state_dict())  # TopK adds no parameter
    assert_close(homologous(x), plain(x), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_cross_attention_equals_one_query_at_a_time():
    attention = randomize(CrossAttention(16, 2))
    queries, keys, values = torch.randn(2, 3, 16), torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    q, k, v = attention.q(queries), attention.k(keys), attention.v(values)
    q, k, v = (x.view(2, -1, 2, 8).transpose(1, 2) for x in (q, k, v))
    expected, probabilities = attend(q, k, v)
    assert_close(attention(queries, keys, values), attention.proj(expected), atol=1e-5, rtol=1e-5)
    assert attention.recorded is None and attention.k.bias is None
    attention.record = True
    assert_close(attention(queries, keys, values), attention.proj(expected), atol=1e-5, rtol=1e-5)
    assert_close(attention.recorded, probabilities, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [Attention, CrossAttention])
def test_heads_must_divide_the_width(kind):
    with pytest.raises(UserError, match="width 16 is not a multiple of 3 heads"):
        kind(16, 3)


# ------------------------------------------------------------------------------------------------------------
# Blocks
# ------------------------------------------------------------------------------------------------------------
def gradients(model, function):
    model.zero_grad()
    function().square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("part", ["encoder", "convolution stem", "decoder"])
def test_recomputing_gives_the_same_gradients_by_calling_each_block_twice(part):
    model = conv() if part == "convolution stem" else tiny()
    images, L = torch.randn(2, 3, *model.config["image_size"]), model.num_patches
    hidden = torch.rand(2, L).argsort(1) < 2

    def encode():
        return model.encode(model.embed(images, hidden))

    def decode():
        return model(tokens)

    function, calls = encode, []
    if part == "decoder":
        model, tokens, function = randomize(vit.Decoder(model, 16, 2, 2)), torch.randn(2, 1 + L, 16), decode
    plain = gradients(model, function)
    blocks = vit.all_blocks(model)
    for block in blocks:
        block.recompute = True
        block.register_forward_pre_hook(lambda block, inputs: calls.append(block))
    assert all(map(torch.equal, gradients(model, function), plain))
    assert len(calls) == 2 * len(blocks)  # forward, and again in the backward pass
    calls.clear()
    with torch.no_grad():
        function()
    assert calls == blocks  # once without a gradient, in the order of the forward pass


def test_drop_paths_rise_linearly_over_blocks_of_all_kinds():
    cases = (
        (ViT((16, 16), 4, 32, 5, 2), 0.4, [0, 0.1, 0.2, 0.3, 0.4]),
        (conv(), 0.5, [0, 0.1, 0.2, 0.3, 0.4, 0.5]),  # 1 + 2 convolution blocks, 3 of the transformer
        (ViT((16, 16), 4, 32, 1, 2), 0.4, [0]),
    )
    for encoder, rate, expected in cases:
        vit.set_drop_paths(encoder, rate)
        assert [block.drop_path for block in vit.all_blocks(encoder)] == pytest.approx(expected)


def test_a_dropped_branch_is_dropped_whole_and_the_kept_ones_make_up_for_it():
    block, x = Block(32, 2).train(), torch.randn(2000, 5, 32)
    block.drop_path = 0.4
    branch = block.drop(x)
    kept = branch.flatten(1).any(1)
    assert abs(kept.float().mean() - 0.6) < 0.05 and torch.allclose(branch[kept], x[kept] / 0.6)
    assert torch.equal(block.eval().drop(x), x)
    for block, x in ((block, x), (vit.ConvBlock(8, 2.0), torch.randn(8, 8, 4, 4))):
        block.train().drop_path = 1 - 1e-6
        assert torch.equal(block(x[:8]), x[:8])  # both branches skipped


def test_layer_scale_has_timms_names_and_multiplies_each_branch():
    block, x = randomize(Block(16, 2, layer_scale=0.1)), torch.randn(2, 5, 16)
    assert {"ls1.gamma", "ls2.gamma"} <= dict(block.named_parameters()).keys()
    y = x + block.ls1.gamma * block.attn(block.norm1(x))
    assert_close(block(x), y + block.ls2.gamma * block.mlp(block.norm2(y)))


# ------------------------------------------------------------------------------------------------------------
# Encoder
# ------------------------------------------------------------------------------------------------------------
def test_features():
    encoder, images = tiny(), torch.randn(2, 3, 16, 24)
    seen = {}
    encoder.blocks[0].register_forward_hook(lambda module, inputs, output: seen.update(first=output))
    out = encoder.features(images, taps=[1, 2], attention=True)
    third_row = seen["first"][:, 1 + 2 * 6 + 3]  # row 2, column 3 of the 4 x 6 grid
    assert_close(out["taps"][0][:, :, 2, 3], third_row)
    last = encoder.norm(out["taps"][1].flatten(2).transpose(1, 2))
    assert_close(out["patches"], last)
    x = encoder.blocks[1].norm1(seen["first"])
    q, k, _ = encoder.blocks[1].attn.qkv(x).view(2, 25, 3, 2, 16).permute(2, 0, 3, 1, 4)
    assert_close(out["attention"], (q @ k.transpose(-1, -2) / 4).softmax(-1), atol=1e-5, rtol=1e-4)
    # the fused kernel agrees
    assert_close(encoder.features(images)["patches"], out["patches"], atol=1e-5, rtol=1e-5)


def test_taps_come_in_the_order_asked_for():
    encoder, images = tiny(), torch.randn(2, 3, 16, 24)
    x = encoder.prepend_cls(encoder.embed(images))
    first = encoder.blocks[0](x)
    last = encoder.blocks[1](first)
    out, taps = encoder.forward_blocks(encoder.embed(images), taps=[2, 1])
    assert torch.equal(out, last) and torch.equal(taps[0], last) and torch.equal(taps[1], first)
    assert torch.equal(encoder.encode(encoder.embed(images)), encoder.norm(last))


def test_k_of_each_layer_is_given_to_the_constructor_and_is_no_part_of_the_file():
    encoder = tiny(topk=[None, 5])
    assert [block.attn.topk for block in encoder.blocks] == [None, 5]
    assert "topk" not in encoder.config
    clean, _ = vit.unpack_encoder(vit.pack_encoder(encoder, "mixedae", "mean", (0.5,) * 3, (0.2,) * 3))
    assert all(block.attn.topk is None for block in clean.blocks)
    assert encoder.state_dict().keys() == clean.state_dict().keys()


def test_cls_attention_is_the_mean_over_heads_without_the_cls_key():
    model, images = randomize(tiny()), torch.randn(2, 3, 16, 24)
    maps = vit.cls_attention(model, images)
    attention = model.features(images, attention=True)["attention"]
    assert maps.shape == (2, 4, 6) and model.blocks[-1].attn.recorded is None
    for b in range(2):
        row = sum(attention[b, h, 0, 1:] for h in range(attention.shape[1]))
        assert_close(maps[b].flatten(), row / row.sum())


def test_hidden_patches_do_not_reach_visible_tokens():
    encoder, images = tiny(), torch.randn(2, 3, 16, 24)
    hidden = torch.rand(2, 24).argsort(1) < 18
    before = encoder.features(images, hidden)["patches"]
    noise = vit.unpatchify(torch.randn(2, 24, 48) * hidden.unsqueeze(-1), (4, 6), 4)
    assert torch.equal(encoder.features(images + noise, hidden)["patches"], before)


# ------------------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------------------
TYPES = [
    (vit.bounded(int, 2, 5), {"2": 2, "5": 5}, ("1", "6", "2.5", "two", "nan", "")),
    (vit.bounded(float, 0, 0.5), {"0": 0.0, ".5": 0.5, "1e-3": 1e-3}, ("-.1", ".51", "nan", "inf", "x")),
    (vit.positive_int, {"1": 1}, ("0", "-1", "1.5", "nan", "99999999999")),
    (vit.natural_int, {"0": 0, "7": 7}, ("-1", "nan")),
    (vit.positive_float, {"1e-9": 1e-9, "3": 3.0}, ("0", "-1", "nan", "inf")),
    (vit.natural_float, {"0": 0.0, "3": 3.0}, ("-1", "nan", "inf", "-inf")),
    (vit.unit_float, {"0": 0.0, "1": 1.0}, ("-.01", "1.01", "nan")),
    (vit.size_int, {"1": 1, "65536": 65536}, ("0", "65537")),
]


@pytest.mark.parametrize("kind, good, bad", TYPES)
def test_types_of_flags_refuse_what_is_out_of_range_and_nan(kind, good, bad):
    for text, value in good.items():
        assert kind(text) == value and isinstance(kind(text), type(value))
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="must be a (whole )?number from") as error:
            kind(text)
        assert str(error.value).startswith(f"{text}: must be a")


def test_a_refused_flag_says_what_would_be_right():
    with pytest.raises(argparse.ArgumentTypeError, match="^6: must be a whole number from 2 to 5$"):
        vit.bounded(int, 2, 5)("6")
    with pytest.raises(argparse.ArgumentTypeError, match="^nan: must be a number from 0 to 1$"):
        vit.unit_float("nan")


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------
def test_encoder_file_round_trip(tmp_path):
    encoder = tiny(layer_scale=0.1)
    packed = vit.pack_encoder(encoder, "mae", "cls", (0.5,) * 3, (0.2,) * 3)
    torch.save(packed, tmp_path / "encoder.pt")
    loaded, info = vit.load_encoder(tmp_path / "encoder.pt")
    images = torch.randn(1, 3, 16, 24)
    assert torch.equal(loaded.features(images)["cls"], encoder.features(images)["cls"])
    assert info["method"] == "mae" and info["feature"] == "cls" and info["mean"] == [0.5] * 3
    shape = {"image_size": [16, 24], "patch_size": 4, "width": 32, "depth": 2, "heads": 2, "channels": 3}
    rest = {"mlp_ratio": 4.0, "layer_scale": 0.1, "class_token": True, "stem": None}
    assert info["config"] == {"kind": "vit", **shape, **rest}


class Hostile:
    def __reduce__(self):
        return (print, ("a hostile file ran",))


def test_files_that_cannot_be_read_give_one_line_and_run_nothing(tmp_path, capsys):
    bad = {"hostile": Hostile(), "list": [1, 2], "tensor": torch.zeros(2)}
    for name, value in bad.items():
        torch.save(value, tmp_path / name)
    (tmp_path / "truncated").write_bytes((tmp_path / "tensor").read_bytes()[:200])
    (tmp_path / "empty").touch()
    for name in (*bad, "truncated", "empty", "missing"):
        with pytest.raises(UserError) as error:
            vit.load_encoder(tmp_path / name)
        assert len(str(error.value).splitlines()) == 1 and name in str(error.value) and error.value.code == 2
    assert "hostile file ran" not in capsys.readouterr().out


def test_rename_uses_the_first_match():
    assert vit.rename({"a.b": 1, "c": 2}, [("^a", "x"), ("b", "y")]) == {"x.b": 1, "c": 2}


class WithDecoder(nn.Module):
    """An encoder and a decoder, as the MAE family has them."""

    def __init__(self, image_size=(16, 16), depth=2, heads=2):
        super().__init__()
        self.encoder = ViT(image_size, 4, 32, depth, heads)
        self.decoder = vit.Decoder(self.encoder, 16, 1, 2)


def test_matching_weights_fill_the_whole_model_or_the_encoder_alone():
    source = randomize(WithDecoder()).state_dict()
    encoder = {name: value for name, value in source.items() if name.startswith("encoder.")}
    other = {**source, "decoder.mask_token": torch.zeros(1, 1, 8)}  # of another width
    more = {**source, "teacher.weight": torch.zeros(2)}
    for weights, filled in ((source, True), (more, True), (encoder, False), (other, False)):
        model = WithDecoder()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        expected = "the whole model" if filled else "the encoder"
        assert vit.load_matching(model, weights, {}, "--init FILE") == expected
        for name, value in model.state_dict().items():
            loaded = filled or name.startswith("encoder.")
            assert torch.equal(value, (source if loaded else before)[name]), name


@pytest.mark.parametrize("image_size, shape", [((32, 32), {}), ((16, 24), {"image_size": [24, 16]})])
def test_matching_resizes_the_position_tables_to_the_models_grid(image_size, shape):
    """A file that does not say its image size is of a square one."""
    source = randomize(WithDecoder(shape.get("image_size", (16, 16))))
    model = WithDecoder(image_size)
    assert vit.load_matching(model, source.state_dict(), shape, "--init FILE") == "the whole model"
    for part in ("encoder", "decoder"):
        table = getattr(source, part).pos_embed
        expected = vit.resize_positions(table, source.encoder.grid, model.encoder.grid)
        assert torch.equal(getattr(model, part).pos_embed, expected)


@pytest.mark.parametrize(
    "change, shape, words",
    [
        ({}, {"heads": 4}, "has heads 4 .here 2.; give --heads 4"),
        ({}, {"patch_size": 8}, "has patch-size 8 .here 4.; give --patch-size 8"),
        ({"encoder.blocks.1.mlp.fc1.weight": None}, {}, "blocks.1.mlp.fc1.weight"),
        ({"encoder.cls_token": torch.zeros(1, 1, 8)}, {}, "cls_token"),
        ({"encoder.blocks.0.ls1.gamma": torch.ones(32)}, {}, "blocks.0.ls1.gamma"),  # it computes otherwise
        ({"encoder.pos_embed": torch.zeros(1, 12, 32)}, {}, "does not fit this WithDecoder"),  # 11: no square
        ({"encoder.pos_embed": torch.zeros(3)}, {}, "does not fit this WithDecoder"),
    ],
)
def test_weights_that_do_not_match_the_encoder_are_named_in_one_line(change, shape, words):
    weights = {**WithDecoder().state_dict(), **change}
    weights = {name: value for name, value in weights.items() if value is not None}
    with pytest.raises(UserError, match=words) as error:
        vit.load_matching(WithDecoder(), weights, shape, "--init FILE")
    assert str(error.value).startswith("--init FILE: ") and "\n" not in str(error.value)


def test_a_librarys_error_becomes_one_short_line():
    assert vit.one_line(ValueError("two\n  lines  of words")) == "two lines of words"
    assert vit.one_line(ValueError("x" * 200)) == "x" * 150 and vit.one_line(ValueError("xyz"), 2) == "xy"
    assert vit.one_line(KeyError()) == "KeyError"
