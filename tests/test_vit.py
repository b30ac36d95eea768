"""The encoder and the shared pieces: numerics against slow versions, exact TopK, positions, files."""
import math

import pytest
import torch
from torch.testing import assert_close

import vit
from conftest import randomize
from vit import Attention, Block, UserError, ViT, keep_topk


def tiny(**options):
    return randomize(ViT((16, 24), 4, 32, 2, 2, **options)).eval()


def test_patchify_orders_row_column_channel_and_has_an_inverse():
    images = torch.randn(2, 3, 8, 12)
    patches = vit.patchify(images, 4)
    assert_close(patches[1, 4].view(4, 4, 3), images[1, :, 4:8, 4:8].permute(1, 2, 0))  # patch 4: second row, second column
    assert_close(vit.unpatchify(patches, (2, 3), 4), images)


def test_patch_embedding_is_a_linear_map_of_patchified_pixels():
    encoder, images = tiny(), torch.randn(2, 3, 16, 24)
    weight = encoder.patch_embed.proj.weight.permute(0, 2, 3, 1).reshape(32, -1)
    assert_close(encoder.patch_embed(images), vit.patchify(images, 4) @ weight.T + encoder.patch_embed.proj.bias, atol=1e-5, rtol=1e-5)


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
    assert table.shape == (1, 1 + grid[0] * grid[1], 32) and torch.equal(table[:, 0], encoder.pos_embed[:, 0])
    patches = encoder.pos_embed[0, 1:].T.reshape(1, 32, 14, 14)
    slow = torch.nn.functional.interpolate(patches, size=grid, mode="bicubic")
    assert_close(table[0, 1:].T.reshape(1, 32, *grid), slow)
    assert encoder.features(torch.randn(1, 3, *size))["patches"].shape == (1, grid[0] * grid[1], 32)


def slow_attention(attention, x, topk=None, cls_in_topk=False):
    """One head, one query at a time, by sorting."""
    B, N, D = x.shape
    size, out = D // attention.heads, torch.zeros(B, N, D)
    q, k, v = attention.qkv(x).view(B, N, 3, attention.heads, size).unbind(2)
    for b in range(B):
        for h in range(attention.heads):
            for i in range(N):
                scores = [float(q[b, i, h] @ k[b, j, h]) / math.sqrt(size) for j in range(N)]
                keys = list(range(N))
                if cls_in_topk:
                    keys = sorted(keys, key=lambda j: -scores[j])[:topk]
                elif topk is not None and i > 0:
                    keys = [0] + sorted(range(1, N), key=lambda j: -scores[j])[:topk]
                weights = torch.tensor([scores[j] for j in keys]).softmax(0)
                out[b, i, h * size : (h + 1) * size] = sum(w * v[b, j, h] for w, j in zip(weights, keys))
    return attention.proj(out)


@pytest.mark.parametrize("topk, cls_in_topk", [(None, False), (1, False), (3, False), (8, False), (1, True), (3, True)])
def test_homologous_attention_equals_sorting_one_query_at_a_time(topk, cls_in_topk):
    attention, x = randomize(Attention(16, 2)), torch.randn(2, 9, 16)
    attention.topk, attention.cls_in_topk = topk, cls_in_topk
    with torch.no_grad():
        assert_close(attention(x), slow_attention(attention, x, topk, cls_in_topk), atol=1e-5, rtol=1e-5)
        attention.record = True
        assert_close(attention(x), slow_attention(attention, x, topk, cls_in_topk), atol=1e-5, rtol=1e-5)
    kept, probabilities = attention.recorded
    assert_close(probabilities.sum(-1), torch.ones(2, 2, 9))
    if topk is not None:
        assert torch.equal(probabilities > 0, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exactly_k_keys_are_kept_even_where_all_scores_tie(dtype):
    rounded = (torch.randn(2, 3, 65, 65) * 4).round().to(dtype)  # a few distinct values: many ties
    for scores in (torch.zeros(2, 3, 65, 65, dtype=dtype), rounded):
        kept = keep_topk(scores, 16)
        assert (kept[..., 1:, 1:].sum(-1) == 16).all()
        assert kept[..., 0, :].all() and kept[..., :, 0].all()  # the CLS query sees all, the CLS key is always kept
        worst_kept = scores[..., 1:, 1:].masked_fill(~kept[..., 1:, 1:], float("inf")).amin(-1)
        best_dropped = scores[..., 1:, 1:].masked_fill(kept[..., 1:, 1:], float("-inf")).amax(-1)
        assert (worst_kept >= best_dropped).all()
        assert (keep_topk(scores, 16, cls_in_topk=True).sum(-1) == 16).all()  # the plain reading: all rows, all keys


def test_keeping_all_keys_is_global_attention():
    attention, x = randomize(Attention(16, 2)), torch.randn(2, 9, 16)
    plain = attention(x)
    attention.topk = 8
    assert_close(attention(x), plain, atol=1e-6, rtol=1e-5)


def test_features():
    encoder, images = tiny(), torch.randn(2, 3, 16, 24)
    seen = {}
    encoder.blocks[0].register_forward_hook(lambda module, inputs, output: seen.update(first=output))
    out = encoder.features(images, taps=[1, 2], attention=True)
    assert_close(out["taps"][0][:, :, 2, 3], seen["first"][:, 1 + 2 * 6 + 3])  # row 2, column 3 of the 4 x 6 grid
    last = encoder.norm(out["taps"][1].flatten(2).transpose(1, 2))
    assert_close(out["patches"], last)
    x = encoder.blocks[1].norm1(seen["first"])
    q, k, _ = encoder.blocks[1].attn.qkv(x).view(2, 25, 3, 2, 16).permute(2, 0, 3, 1, 4)
    assert_close(out["attention"], (q @ k.transpose(-1, -2) / 4).softmax(-1), atol=1e-5, rtol=1e-4)
    assert_close(encoder.features(images)["patches"], out["patches"], atol=1e-5, rtol=1e-5)  # the fused kernel agrees


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
    ids = vit.visible_ids(hidden)
    assert torch.equal(ids, torch.stack([(~row).nonzero()[:, 0] for row in hidden]))  # raster order
    with pytest.raises(ValueError, match="same number"):
        vit.visible_ids(torch.tensor([[True, False], [True, True]]))


def test_recomputing_activations_gives_the_same_gradients():
    block, x = randomize(Block(16, 2)), torch.randn(2, 5, 16)
    block(x).square().sum().backward()
    plain = [p.grad.clone() for p in block.parameters()]
    block.zero_grad()
    vit.recompute(block)
    block(x).square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(block.parameters(), plain))


def test_layer_scale_has_timms_names_and_multiplies_each_branch():
    block, x = randomize(Block(16, 2, layer_scale=0.1)), torch.randn(2, 5, 16)
    assert {"ls1.gamma", "ls2.gamma"} <= dict(block.named_parameters()).keys()
    y = x + block.ls1.gamma * block.attn(block.norm1(x))
    assert_close(block(x), y + block.ls2.gamma * block.mlp(block.norm2(y)))


def test_encoder_file_round_trip(tmp_path):
    encoder = tiny(layer_scale=0.1)
    torch.save(vit.pack_encoder(encoder, "mae", "cls", (0.5,) * 3, (0.2,) * 3), tmp_path / "encoder.pt")
    loaded, info = vit.load_encoder(tmp_path / "encoder.pt")
    images = torch.randn(1, 3, 16, 24)
    assert torch.equal(loaded.features(images)["cls"], encoder.features(images)["cls"])
    assert info["method"] == "mae" and info["feature"] == "cls" and info["mean"] == [0.5] * 3
    assert info["config"] == {"kind": "vit", "image_size": [16, 24], "patch_size": 4, "width": 32, "depth": 2, "heads": 2, "channels": 3,
                              "mlp_ratio": 4.0, "layer_scale": 0.1, "class_token": True, "stem": None}


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
