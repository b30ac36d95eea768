"""The Vision Transformer that every method here trains, and the few pieces that several methods share.

Reading order of the project: **vit** -> mrmae -> mixedae -> cae -> data -> train -> finetune -> dense.

Letters, used in every file (in brackets: what the papers call the same thing):
    B    images in a batch
    C    channels of an image
    p    side of a patch, in pixels (MixedAE: P)
    P    values of a patch, C p p (MixedAE: P^2 C)
    L    patches of an image
    V    visible patches of an image (MR-MAE: l_v)
    U    hidden patches of an image, U = L - V (MR-MAE: l_m)
    N    tokens that a block sees: patches, and CLS if there is one. (In finetune.py also the samples of a
         set, in dense.py the objects of an image.)
    D    width of the encoder (MR-MAE: C)
    Dd   width of the decoder
    Dt   width of a teacher's features (MR-MAE: C)
    H    heads of an attention layer
    D_h  width of a head, D / H
    K    keys that TopK keeps for each query, in MixedAE
    n    images that are mixed into one, in MixedAE (there 1/r, where r is the share of each)
    G    mixed images in a batch, in MixedAE
Shapes are batch first. Features of tokens have the tokens in the axis before the last, as in (B, N, D); masks
and ids have them in the last, as in (B, L); maps end with the grid, as in (B, D, h, w). A boolean mask called
`hidden` or `mask` is True where a patch is hidden (but in mixedae.py `mask` is M, whole numbers). Images need
not be square: a grid (h, w) has h rows and w columns of patches.

The papers: MAE (arXiv 2111.06377), MR-MAE (2303.05475), MixedAE (2303.17152), CAE (2202.03026); MCMAE
(2205.03892) is MAE with stages of convolutions before the transformer.

    images (B, C, height, width)
        -- PatchEmbed --------------------------> patch tokens   (B, L, D)
        -- + positions, keep the visible ones --> visible tokens (B, V, D)
        -- CLS in front ------------------------> tokens         (B, N, D), N = 1 + V
        -- blocks: attention, MLP --------------> tokens         (B, N, D)
        -- final LayerNorm ---------------------> features       (B, N, D)

The encoder has the parameter names and the numerics of timm's and MAE's ViT, so published weights load into
it and, unless it has a convolution stem, its own weights load into timm. One thing is new: in the homologous
attention of MixedAE (Eq. 6, in `Attention.homologous_attention`) a patch attends only to CLS and to the K
patches with the highest scores. In MixedAE's pre-training all blocks but the first have it. It adds no
parameter and is switched off afterwards.
"""

import argparse
import math
import os
import pickle
import re
from collections import OrderedDict
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import stochastic_depth


# ------------------------------------------------------------------------------------------------------------
# Messages to the user
# ------------------------------------------------------------------------------------------------------------
class UserError(ValueError):
    """Bad user input. The programs print its message, one line, and exit with `code`, without a traceback."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


def print_rank0(line):
    """Print a line once, however many processes there are."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


# ------------------------------------------------------------------------------------------------------------
# Patches
# ------------------------------------------------------------------------------------------------------------
def patchify(images, p):
    """(B, C, h p, w p) -> (B, L, P). Patches row by row; inside: row, column, channel (MAE's order)."""
    return rearrange(images, "b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=p, p2=p)


def unpatchify(patches, grid, p):
    """(B, L, P) -> (B, C, h p, w p), the inverse of `patchify`; grid = (h, w)."""
    return rearrange(patches, "b (h w) (p1 p2 c) -> b c (h p1) (w p2)", h=grid[0], w=grid[1], p1=p, p2=p)


def patch_stats(patches):
    """Mean and standard deviation of each patch over all its P values, each (B, L, 1).

    As in MAE, the variance is the unbiased one, and 1e-6 is added to it, so that a flat patch does not lead
    to a division by zero.
    """
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (var + 1e-6).sqrt()


def norm_pix(patches):
    """MAE's normalised targets: each patch (B, L, P) minus its mean, over its standard deviation."""
    mean, std = patch_stats(patches)
    return (patches - mean) / std


def undo_norm_pix(pred, patches):
    """Predictions of `norm_pix` targets -> pixels, for pictures. The model does not predict the mean and the
    standard deviation of a patch, so those of the true `patches` are used."""
    mean, std = patch_stats(patches)
    return pred * std + mean


# ------------------------------------------------------------------------------------------------------------
# Masks
# ------------------------------------------------------------------------------------------------------------
def random_visible(batch, patches, visible, device):
    """Uniformly random masking (MR-MAE Sec. 3.1): the ids (B, V) of the visible patches, in raster order.

    batch, patches and visible are the numbers B, L and V.
    """
    noise = torch.rand(batch, patches, device=device)  # (B, L)
    return noise.argsort(dim=1)[:, :visible].sort(dim=1).values  # the first V of a random permutation


def hidden_mask(ids, patches):
    """Ids of visible patches (B, V) -> mask (B, L) bool, True = hidden. patches is the number L."""
    return torch.ones(len(ids), patches, dtype=torch.bool, device=ids.device).scatter(1, ids, False)


def visible_ids(hidden):
    """(B, L) bool, True = hidden -> (B, V) ids of the visible patches, in raster order."""
    # The rows of a batch must have the same length.
    counts = (~hidden).sum(dim=1)  # (B,)
    if counts.min() != counts.max():
        raise ValueError(
            f"each row of a mask must show the same number of patches, not {counts.min()} to {counts.max()}"
        )
    return hidden.int().argsort(dim=1, stable=True)[:, : int(counts[0])]  # False sorts before True


def gather_tokens(tokens, ids):
    """Tokens (B, L, D) at ids (B, V) -> (B, V, D)."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


# ------------------------------------------------------------------------------------------------------------
# Positions
# ------------------------------------------------------------------------------------------------------------
def sincos_positions(dim, grid, prefix=1):
    """MAE's fixed 2-D sine-cosine table (1, prefix + L, dim) for a grid (h, w) of patches.

    prefix: 1 if a CLS token stands in front, whose row is zero; else 0. The first half of the channels
    encodes the column, the second half the row. For a coordinate c each half is [sin(c w_k) | cos(c w_k)],
    with w_k = 10000^(-4 k / dim) for k = 0 .. dim/4 - 1, computed in float64.
    """
    if dim % 4:
        raise UserError(f"width {dim}: the sine-cosine position table needs a multiple of 4")
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))  # w_k, (dim / 4,)

    # Turn the row and the column of each patch into angles c w_k.
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")  # each (h, w)
    row = rows.flatten().outer(frequencies)  # (L, dim / 4)
    column = columns.flatten().outer(frequencies)  # (L, dim / 4)
    table = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)  # (L, dim)

    # Put the row of zeros for CLS in front.
    return F.pad(table, (0, 0, prefix, 0)).unsqueeze(0).float()  # (1, prefix + L, dim)


def resize_tokens(tokens, old_grid, new_grid, **how):
    """(B, h w, D) on old_grid -> (B, h' w', D) on new_grid, in fp32.

    how: other arguments for F.interpolate than size=new_grid and mode="bicubic". DINO, for example, resizes
    by a scale factor (`mrmae.dino_positions`).
    """
    tokens = rearrange(tokens.float(), "b (h w) d -> b d h w", h=old_grid[0])
    tokens = F.interpolate(tokens, **{"size": tuple(new_grid), "mode": "bicubic", **how})
    return rearrange(tokens, "b d h w -> b (h w) d")


def resize_positions(table, old_grid, new_grid, **how):
    """A position table for old_grid -> one for new_grid. Each is (1, 1 + h w, D), or (1, h w, D) without CLS.
    The row of CLS stays as it is."""
    if tuple(old_grid) == tuple(new_grid):
        return table
    prefix = table.shape[1] - old_grid[0] * old_grid[1]  # 1 with a row for CLS, else 0
    patches = resize_tokens(table[:, prefix:], old_grid, new_grid, **how)
    return torch.cat([table[:, :prefix], patches.to(table.dtype)], dim=1)


# ------------------------------------------------------------------------------------------------------------
# Attention
# ------------------------------------------------------------------------------------------------------------
def keep_topk(scores, k):
    """TopK of MixedAE Eq. 6 (Sec. 3.2): scores (B, H, N, N) -> bool (B, H, N, N), True where a key is kept.

    k is the paper's K. Each query patch keeps exactly the k key patches with the highest scores, separately
    in each head. Token 0 is CLS. Eq. 6 speaks of query and key patches, so CLS takes no part: its key is
    always kept and not counted, and its query sees all keys. No gradient flows through the choice of keys; it
    flows through the scores of those that are kept.
    """
    patches = scores[..., 1:, 1:]  # (B, H, L, L)
    best = patches.topk(k, dim=-1, sorted=False).indices  # (B, H, L, k)

    # Mark the k best keys by their indices. Comparing with the k-th best score would keep more than k where
    # scores tie, as they often do in bf16.
    keep = torch.zeros_like(patches, dtype=torch.bool).scatter(-1, best, True)

    # Put the row and the column of CLS in front; they are True.
    return F.pad(keep, (1, 0, 1, 0), value=True)  # (B, H, N, N)


class Attention(nn.Module):
    """Multi-head self-attention; with `topk` = K the homologous attention of MixedAE Eq. 6.

    While `record` is True (see `recording`) each forward stores `recorded` = (keep, attention): the keys that
    TopK kept, and the probabilities, both (B, H, N, N). A layer without `topk` has ordinary attention, which
    MixedAE calls global; its keep is None.
    """

    record = False
    recorded = None

    def __init__(self, dim, heads, topk=None):
        super().__init__()
        if dim % heads:
            raise UserError(f"width {dim} is not a multiple of {heads} heads")
        self.heads = heads
        self.topk = topk
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):  # (B, N, D)
        # Compute queries, keys and values of all heads at once, each (B, H, N, D_h).
        qkv = self.qkv(x)  # (B, N, 3 D)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)

        # Attend, in training and evaluation by the fused form of Eq. 6. It computes the same as the plain
        # form, but keeps no scores or probabilities for the backward pass, only the mask of chosen keys. The
        # plain form runs while `record` is True, and is the one to read beside Eq. 6. A change of Eq. 6
        # belongs in both; both choose the keys by `keep_topk`.
        if self.record:
            x = self.homologous_attention(q, k, v)  # (B, H, N, D_h)
        else:
            x = self.fused_attention(q, k, v)  # (B, H, N, D_h)

        # Put the heads side by side again and mix them.
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))  # (B, N, D)

    def homologous_attention(self, q, k, v):
        """MixedAE Eq. 6: A_HomoAtt = softmax(TopK(q k^T / sqrt(D_h))), where k are the keys.

        q, k, v (B, H, N, D_h) -> A_HomoAtt v (B, H, N, D_h). Without `topk` it is ordinary attention.
        """
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # q k^T / sqrt(D_h), (B, H, N, N)
        keep = None
        if self.topk is not None:
            keep = keep_topk(scores, self.topk)
            scores = scores.masked_fill(~keep, float("-inf"))  # softmax gives 0 to what is not kept
        attention = scores.softmax(dim=-1)  # A_HomoAtt, (B, H, N, N)
        if self.record:
            self.recorded = (keep, attention.detach())
        return attention.to(v.dtype) @ v  # under CUDA autocast the softmax is fp32 and v is not

    def fused_attention(self, q, k, v):
        """Eq. 6 as well, by PyTorch's fused attention, which takes the choice of keys as a boolean mask."""
        keep = None
        if self.topk is not None:
            with torch.no_grad():  # for the choice alone; the fused attention computes its own scores
                scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
                keep = keep_topk(scores, self.topk)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


@contextmanager
def recording(layers):
    """In `with recording(layers):` these attention layers record. When it ends, also by an error, they stop
    and forget what they recorded."""
    for layer in layers:
        layer.record = True
    try:
        yield
    finally:
        for layer in layers:
            layer.record = False
            layer.recorded = None


# ------------------------------------------------------------------------------------------------------------
# Blocks
# ------------------------------------------------------------------------------------------------------------
class Residual(nn.Module):
    """The base of all blocks. It has two attributes that other code sets.

    drop_path (set by `set_drop_paths`): the probability that a sample skips a residual branch in training.
    recompute (set by `train.wrap_ddp`): compute the block's activations again in the backward pass instead of
    keeping them, which saves memory.
    """

    drop_path = 0.0
    recompute = False

    def drop(self, branch):
        # Kept branches are divided by 1 - drop_path, so that the expected output is unchanged.
        return stochastic_depth(branch, self.drop_path, "row", self.training)


class Mlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between them.

    hidden: the width between the layers. layer: the class of both; the convolution stem passes 1 x 1
    convolutions.
    """

    def __init__(self, dim, hidden, layer=nn.Linear):
        super().__init__()
        self.fc1 = layer(dim, hidden)
        self.fc2 = layer(hidden, dim)
        self.activation = F.gelu  # mrmae.py sets another for CLIP

    def forward(self, x):  # (B, N, D); with convolutions (B, D, h, w)
        return self.fc2(self.activation(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch; CAE starts it at .1."""

    def __init__(self, dim, initial):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(initial)))

    def forward(self, x):  # (B, N, D)
        return x * self.gamma


class Block(Residual):
    """A pre-norm transformer block: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, dim, heads, mlp_ratio=4.0, layer_scale=None, topk=None):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, topk)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)

    def forward(self, x):  # (B, N, D)
        x = x + self.drop(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop(self.ls2(self.mlp(self.norm2(x))))


def call_block(block, *inputs):
    """block(*inputs). With block.recompute its activations are computed again in the backward pass."""
    if block.recompute:
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def all_blocks(module):
    """The blocks of a module, of whatever kind, in the order of its forward pass."""
    return [part for part in module.modules() if isinstance(part, Residual)]


def set_drop_paths(module, rate):
    """Stochastic depth (fine-tuning, CAE): `drop_path` rises linearly over the blocks, from 0 to `rate`."""
    blocks = all_blocks(module)
    for block, value in zip(blocks, torch.linspace(0, rate, len(blocks)).tolist()):
        block.drop_path = value


def init_weights(module):
    """MAE's initialisation of new modules, for `Module.apply`. Linear layers get xavier-uniform weights and
    bias 0. LayerNorms keep PyTorch's weight 1 and bias 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)  # as in MAE, qkv counts as one (3 D, D) matrix, not as three
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------------------------
# Encoder
# ------------------------------------------------------------------------------------------------------------
class PatchEmbed(nn.Module):
    """(B, C, h p, w p) -> (B, L, D), by one linear map that all patches share. It is written as a
    convolution, so that its parameters have timm's names and shapes."""

    def __init__(self, patch_size, channels, width):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)
        # As in MAE, initialise the weight as that of a linear layer; the bias keeps the default of nn.Conv2d.
        nn.init.xavier_uniform_(self.proj.weight.view(width, -1))

    def forward(self, images, hidden=None, stages=None):
        # Each patch is embedded by itself, so a hidden one cannot reach the others, and `hidden` is not
        # needed. It and `stages` are for ConvStem, which may stand in the place of this class.
        return rearrange(self.proj(images), "b d h w -> b (h w) d")


class ViT(nn.Module):
    """A Vision Transformer encoder. Its positions are a sine-cosine table, which pre-training keeps fixed;
    fine-tuning may train it, and files of other authors replace it.

    image_size: (height, width) in pixels. class_token: whether a CLS token stands in front (MCMAE has none).
    stem: None for a patch embedding, or the widths, depths and mlp_ratios of a ConvStem in a dict. topk: for
    each block its K of MixedAE Eq. 6, or None for ordinary attention.

    `config` holds all arguments but `topk`: `ViT(**config)` builds the encoder that transfers, whose
    attention is ordinary.
    """

    def __init__(
        self,
        image_size,
        patch_size,
        width,
        depth,
        heads,
        channels=3,
        mlp_ratio=4.0,
        layer_scale=None,
        class_token=True,
        stem=None,
        topk=None,
    ):
        super().__init__()
        if any(side % patch_size for side in image_size):
            raise UserError(
                f"image size {image_size[0]} x {image_size[1]} is not a multiple of the patch size "
                f"{patch_size}"
            )

        # Keep what rebuilds the encoder: all arguments but `topk`.
        self.config = dict(
            image_size=list(image_size),
            patch_size=patch_size,
            width=width,
            depth=depth,
            heads=heads,
            channels=channels,
            mlp_ratio=mlp_ratio,
            layer_scale=layer_scale,
            class_token=class_token,
            stem=stem,
        )
        self.width = width
        self.patch_size = patch_size
        self.grid = tuple(side // patch_size for side in image_size)  # (h, w)
        self.num_patches = math.prod(self.grid)  # L
        self.num_prefix_tokens = int(class_token)  # timm's name: how many tokens stand before the patches

        self.patch_embed = (
            ConvStem(channels, width, **stem) if stem else PatchEmbed(patch_size, channels, width)
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02)) if class_token else None
        positions = sincos_positions(width, self.grid, self.num_prefix_tokens)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)  # (1, 1 + L, D); without CLS (1, L, D)
        self.resize = resize_positions  # mrmae.py sets another for DINO, whose rule differs
        self.norm_pre = nn.Identity()  # CLIP has a LayerNorm here
        topk_per_block = topk or [None] * depth
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, layer_scale, block_topk) for block_topk in topk_per_block
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(init_weights)

    def embed(self, images, hidden=None, stages=None):
        """images (B, C, h p, w p) -> patch tokens with positions (B, L, D).

        If the images have another size than the encoder was built for, the position table is resized. hidden,
        stages: see `ConvStem.forward`.
        """
        x = self.patch_embed(images, hidden, stages)  # (B, L, D)
        grid = tuple(side // self.patch_size for side in images.shape[-2:])
        return x + self.resize(self.pos_embed, self.grid, grid)[:, self.num_prefix_tokens :]

    def prepend_cls(self, x):
        """Put CLS with its position in front, (B, V, D) -> (B, 1 + V, D), if the encoder has one. Then apply
        `norm_pre`, which does nothing except in CLIP."""
        if self.cls_token is not None:
            cls = self.cls_token + self.pos_embed[:, :1]  # (1, 1, D)
            x = torch.cat([cls.expand(len(x), -1, -1), x], dim=1)
        return self.norm_pre(x)

    def forward_blocks(self, x, taps=()):
        """Put CLS in front of embedded patches (B, V, D), and run the blocks.

        Returns the output of the last block (B, 1 + V, D), before the final norm, and a list of the outputs
        of the blocks in `taps`, which are counted from 1, in the order of `taps`.
        """
        x = self.prepend_cls(x)
        tapped = {}
        for number, block in enumerate(self.blocks, start=1):
            x = call_block(block, x)
            if number in taps:
                tapped[number] = x
        return x, [tapped[number] for number in taps]

    def encode(self, x):
        """Embedded patches (B, V, D) -> tokens after the final norm (B, 1 + V, D)."""
        return self.norm(self.forward_blocks(x)[0])

    def features(self, images, hidden=None, taps=(), attention=False):
        """What probes, teachers, dense heads and pictures read.

        images (B, C, h p, w p) normalised; hidden (B, L) bool or None; taps: the blocks, counted from 1,
        whose outputs are returned as maps, which is not possible together with `hidden`. Returns a dict:

            "cls"        (B, 1, D) after the final norm, or None if there is no CLS
            "patches"    (B, V, D) after the final norm
            "taps"       a list of (B, D, h, w), before the norm
            "attention"  (B, H, N, N), the softmax of the last block, if `attention` asks for it
        """
        # Embed, and drop what is hidden.
        x = self.embed(images, hidden)  # (B, L, D)
        if hidden is not None:
            x = gather_tokens(x, visible_ids(hidden))  # (B, V, D)

        # Encode; record the attention of the last block if it is wanted.
        last = self.blocks[-1].attn
        with recording([last] if attention else []):
            x, tapped = self.forward_blocks(x, taps)  # (B, N, D)
            recorded = last.recorded
        x = self.norm(x)  # (B, N, D)

        # Split CLS from the patches, and make maps of the taps.
        prefix = self.num_prefix_tokens
        h = images.shape[-2] // self.patch_size
        maps = [rearrange(tokens[:, prefix:], "b (h w) d -> b d h w", h=h) for tokens in tapped]
        out = {"cls": x[:, :1] if prefix else None, "patches": x[:, prefix:], "taps": maps}
        if attention:
            out["attention"] = recorded[1]
        return out


@torch.no_grad()
def patch_attention(encoder, images):
    """The attention of the last block, mean over heads, with the patches alone as keys. images (B, C, h p,
    w p) normalised -> (B, N, L), each row with the sum 1. Row 0 is that of CLS, if the encoder has one."""
    attention = encoder.features(images, attention=True)["attention"]  # (B, H, N, N)
    attention = attention.float().mean(dim=1)[:, :, encoder.num_prefix_tokens :]  # (B, N, L)
    return attention / attention.sum(dim=2, keepdim=True)


def cls_attention(encoder, images):
    """Where CLS looks (MixedAE Fig. 5): its row of `patch_attention`, as maps (B, h, w) with the sum 1."""
    maps = patch_attention(encoder, images)[:, 0]  # (B, L)
    return rearrange(maps, "b (h w) -> b h w", h=images.shape[-2] // encoder.patch_size)


# ------------------------------------------------------------------------------------------------------------
# Decoder
# ------------------------------------------------------------------------------------------------------------
class Decoder(nn.Module):
    """The transformer decoder of the MAE family. Where [MASK] tokens go is the method's business:

        latent (B, 1 + V, D)
            -- embed, a linear layer ---------> (B, 1 + V, Dd)
            -- the method inserts mask_token -> (B, 1 + L, Dd)
            -- forward -----------------------> (B, L, P)

    If the encoder has no CLS, the sequences have V and L tokens instead.
    """

    def __init__(self, encoder, width, depth, heads, mlp_ratio=4.0):
        super().__init__()
        if depth < 1:
            raise UserError(
                f"--decoder-depth {depth}: needs at least 1 block; without one no hidden patch sees a "
                "visible patch"
            )
        self.num_prefix_tokens = encoder.num_prefix_tokens
        self.embed = nn.Linear(encoder.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
        positions = sincos_positions(width, encoder.grid, self.num_prefix_tokens)  # (1, 1 + L, Dd)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pred = nn.Linear(width, encoder.config["channels"] * encoder.patch_size**2)  # P
        self.apply(init_weights)

    def features(self, x):
        """A sequence with [MASK] inserted (B, 1 + L, Dd) -> patch tokens after the last norm (B, L, Dd)."""
        x = x + self.pos_embed
        for block in self.blocks:
            x = call_block(block, x)
        return self.norm(x)[:, self.num_prefix_tokens :]

    def forward(self, x):
        """A sequence with [MASK] inserted (B, 1 + L, Dd) -> predicted patches (B, L, P)."""
        return self.pred(self.features(x))


# ------------------------------------------------------------------------------------------------------------
# Sizes of encoder and decoder
# ------------------------------------------------------------------------------------------------------------
SIZES = {  # width, depth and heads of the encoder, then of the decoder
    "micro": (128, 4, 4, 64, 2, 4),  # ours: for a laptop
    "tiny": (192, 12, 3, 192, 4, 3),  # DeiT; the decoder is ours: MAE's has five times this ViT's weights
    "small": (384, 12, 6, 512, 8, 16),  # DeiT; from here on the decoder is MAE's, which has one for all sizes
    "base": (768, 12, 12, 512, 8, 16),  # ViT
    "large": (1024, 24, 16, 512, 8, 16),  # ViT
    "huge": (1280, 32, 16, 512, 8, 16),  # ViT
}
SIZE_FLAGS = ("width", "depth", "heads", "decoder_width", "decoder_depth", "decoder_heads")


def build_encoder(args, **options):
    """The encoder that the size flags describe; `options` are further arguments of ViT."""
    return ViT(args.image_size, args.patch_size, args.width, args.depth, args.heads, **options)


def build_decoder(args, encoder, **options):
    """The decoder that the size flags describe; `options` are further arguments of Decoder."""
    return Decoder(encoder, args.decoder_width, args.decoder_depth, args.decoder_heads, **options)


# ------------------------------------------------------------------------------------------------------------
# The convolution stem of MCMAE, for --stem conv in mrmae.py. Else skip it: to the next line of `=`.
# ------------------------------------------------------------------------------------------------------------
def conv_embed(channels, width, k):
    """A patch embedding of MCMAE: a convolution of k x k with stride k, LayerNorm over channels, GELU.
    (B, channels, h, w) -> (B, width, h / k, w / k)."""
    return nn.Sequential(
        OrderedDict(
            proj=nn.Conv2d(channels, width, kernel_size=k, stride=k),
            norm=LayerNorm2d(width, eps=1e-5),
            gelu=nn.GELU(),
        )
    )


class ConvBlock(Residual):
    """A masked convolution block of MCMAE: where a transformer has attention, a 5 x 5 depthwise convolution
    between two of 1 x 1; then an MLP of 1 x 1 convolutions."""

    def __init__(self, dim, mlp_ratio):
        super().__init__()
        conv = partial(nn.Conv2d, kernel_size=1)
        self.norm1 = LayerNorm2d(dim, eps=1e-5)  # not the transformer's 1e-6
        self.conv1 = conv(dim, dim)
        self.attn = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)  # MCMAE's name; it is no attention
        self.conv2 = conv(dim, dim)
        self.norm2 = LayerNorm2d(dim, eps=1e-5)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), conv)

    def forward(self, x, keep=None):
        """x (B, width, h, w); keep (B, 1, h, w), False where hidden, or None -> (B, width, h, w)."""
        y = self.conv1(self.norm1(x))
        if keep is not None:
            # Zero the hidden places just before the one operation that mixes places, so that none of them
            # reaches a visible one.
            y = y * keep
        x = x + self.drop(self.conv2(self.attn(y)))
        return x + self.drop(self.mlp(self.norm2(x)))


class ConvStem(nn.Module):
    """The convolution stages of MCMAE (MR-MAE Sec. 3.3), in place of the patch embedding. w1 and w2 are their
    widths:

        images (B, C, 16 h, 16 w)
            -- embed1 (stride 4), blocks1 --> stage 1 (B, w1, 4 h, 4 w)
            -- embed2 (stride 2), blocks2 --> stage 2 (B, w2, 2 h, 2 w)
            -- embed3 (stride 2), proj -----> tokens  (B, L, D), L = h w
    """

    def __init__(self, channels, width, widths, depths, mlp_ratios):
        super().__init__()
        width1, width2 = widths
        self.embed1 = conv_embed(channels, width1, 4)
        self.embed2 = conv_embed(width1, width2, 2)
        self.embed3 = conv_embed(width2, width, 2)
        self.blocks1 = nn.ModuleList(ConvBlock(width1, mlp_ratios[0]) for _ in range(depths[0]))
        self.blocks2 = nn.ModuleList(ConvBlock(width2, mlp_ratios[1]) for _ in range(depths[1]))
        self.proj = nn.Linear(width, width)  # MCMAE's patch_embed4
        # As MCMAE's code has it; its other convolutions keep PyTorch's default.
        nn.init.xavier_uniform_(self.embed3.proj.weight.view(width, -1))
        # LayerNorm2d returns maps whose channels lie last in memory. Convolutions whose weights lie in the
        # same way need not convert them.
        self.to(memory_format=torch.channels_last)

    def forward(self, images, hidden=None, stages=None):
        """hidden (B, L) bool: patches whose pixels must not reach the others. stages: a list that receives
        the maps of stages 1 and 2."""
        x = images
        for embed, blocks, s in ((self.embed1, self.blocks1, 4), (self.embed2, self.blocks2, 2)):
            # Bring the mask to the grid of the stage: s x s of its places lie in a patch.
            keep = None
            if hidden is not None:
                keep = repeat(~hidden, "b (h w) -> b 1 (h s1) (w s2)", h=images.shape[-2] // 16, s1=s, s2=s)
            x = embed(x)
            for block in blocks:
                x = call_block(block, x, keep)
            if stages is not None:
                stages.append(x)
        return self.proj(rearrange(self.embed3(x), "b d h w -> b (h w) d"))


def stem_size(width1, width2, depth=11, stage_depth=2, stage_mlp_ratio=4):
    """A size with the convolution stem: the widths of its two stages, of `stage_depth` blocks each, and
    `depth`, the number of transformer blocks behind them. The decoder has the MLP ratio of the stages;
    the transformer blocks always have 4."""
    return dict(
        widths=[width1, width2],
        depths=[stage_depth] * 2,
        mlp_ratios=[stage_mlp_ratio] * 2,
        depth=depth,
        decoder_mlp_ratio=stage_mlp_ratio,
    )


STEM_SIZES = {
    "micro": stem_size(32, 64, depth=4, stage_depth=1),  # ours, for a laptop
    "small": stem_size(128, 256),  # forks of MCMAE's code
    "base": stem_size(256, 384),  # MCMAE's code, which has only this size
    "large": stem_size(384, 768, depth=23, stage_mlp_ratio=8),  # forks of MCMAE's code
    "huge": stem_size(768, 1024, depth=31, stage_mlp_ratio=8),  # forks of MCMAE's code
}


# ============================================================================================================
# A first reading may stop here. What follows: the cross-attention of CAE; flags; and files, where
# `pack_encoder` says what encoder.pt holds.
# ============================================================================================================
class CrossAttention(nn.Module):
    """Multi-head attention with separate queries, keys and values: for CAE's regressor and attentive probe.

    As in CAE's code, the keys have no bias. While `record` is True each forward stores the probabilities
    (B, H, U, N) in `recorded`.
    """

    record = False
    recorded = None

    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise UserError(f"width {dim} is not a multiple of {heads} heads")
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, q, k, v):  # (B, U, D), (B, N, D), (B, N, D) -> (B, U, D)
        # Compute queries (B, H, U, D_h), keys and values, both (B, H, N, D_h).
        projected = (self.q(q), self.k(k), self.v(v))
        q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=self.heads) for x in projected)

        # Attend, and put the heads side by side again.
        if self.record:
            self.recorded = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1).detach()
        x = F.scaled_dot_product_attention(q, k, v)  # (B, H, U, D_h)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


# ------------------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------------------
def bounded(kind, low, high):
    """A type for argparse: an int or a float from `low` to `high`, both included."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # NaN fails every comparison, so this positive test also rejects it
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text}: must be a {what} from {low:g} to {high:g}")
        return value

    return parse


positive_int = bounded(int, 1, 2**31 - 1)
natural_int = bounded(int, 0, 2**31 - 1)
positive_float = bounded(float, 1e-12, 1e12)
natural_float = bounded(float, 0, 1e12)  # a weight; 0 switches it off
unit_float = bounded(float, 0, 1)
size_int = bounded(int, 1, 65536)  # pixels, widths, heads


def file_name(text):
    """A type for argparse: the name of a file or folder. It is empty where a shell variable is not set."""
    if not text:
        raise argparse.ArgumentTypeError("an empty name; give one, or leave the flag out")
    return text


def add_size_args(parser, encoder=True, decoder=True):
    """The flags for the shape of images and, if asked for, of encoder and decoder."""
    add = parser.add_argument_group("model size (the defaults are a laptop's; ours)").add_argument

    # The images.
    add(
        "--image-size",
        type=size_int,
        nargs="+",
        default=[64],
        metavar="PIXELS",
        help="height, or height width",
    )
    if not encoder:
        return

    # The encoder.
    add("--patch-size", type=size_int, help="pixels; the papers use 16 at 224 pixels [8]")
    add("--size", choices=SIZES, default="micro", help="a named size; the flags below win over it")
    add("--width", type=size_int, help="D, width of the encoder")
    add("--depth", type=size_int, help="blocks of the encoder")
    add(
        "--heads",
        type=size_int,
        help="attention heads of the encoder; give it for published files of unusual widths, whose weights "
        "do not show it",
    )
    if not decoder:
        return

    # The decoder.
    add(
        "--decoder-width",
        type=size_int,
        help="512 in MAE and MixedAE Sec. 4.1 (light: 256); in CAE 768 for small and base, 1024 for large",
    )
    add(
        "--decoder-depth",
        type=natural_int,
        help="8 in MR-MAE and MixedAE Sec. 4.1 (light: 2), 4 in CAE Sec. 5.1",
    )
    add(
        "--decoder-heads",
        type=size_int,
        help="16 in MAE's code, the encoder's in CAE's; the papers are silent",
    )


def resolve_sizes(args, sizes=SIZES):
    """Fill in the sizes that were not given, in `args` itself. The image size becomes [height, width]."""
    if len(args.image_size) > 2:
        raise UserError(f"--image-size takes one number or two (height width), not {len(args.image_size)}")
    args.image_size = [args.image_size[0], args.image_size[-1]]
    if not hasattr(args, "size"):  # a method without a ViT
        return
    named = dict(zip(SIZE_FLAGS, sizes[args.size]), patch_size=8)
    if getattr(args, "stem", "patch") == "conv":
        if args.size not in STEM_SIZES:
            raise UserError(f"--stem conv has no size {args.size}; choose {', '.join(STEM_SIZES)}")
        if args.patch_size not in (None, 16):
            raise UserError(
                f"--patch-size {args.patch_size}: the stages of --stem conv have the strides 4 x 2 x 2 = 16; "
                "leave the flag out"
            )
        named.update(patch_size=16, depth=STEM_SIZES[args.size]["depth"])
    for flag, value in named.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------
def one_line(error, length=150):
    """An error of a library as one short line."""
    return " ".join(str(error).split())[:length] or type(error).__name__


def load_file(path, allowed=()):
    """The content of a file of tensors, numbers, strings, lists and dicts, on the CPU. Nothing else is read,
    so code that hides in a file cannot run.

    allowed: further classes that may be read, each as (the class to make instead, its name in the file).
    """
    # Refuse a pipe, for which the program would wait for ever.
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise UserError(f"{path}: is no regular file; give a file of weights")
    try:
        # Name the commonest mistake: a file that begins neither as a zip archive nor as a pickle.
        with open(path, "rb") as file:
            if file.read(1) not in (b"P", b"\x80"):
                raise UserError(f"{path}: truncated, or not written by torch.save: not opened; give weights")

        # Published files hold their flags in an argparse.Namespace, which runs no code when it is loaded.
        with torch.serialization.safe_globals([argparse.Namespace, *allowed]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except OSError as error:
        what = f"{error.strerror.lower()}; give a file of weights, such as RUN/encoder.pt of a train.py run"
        raise UserError(f"{path}: {what}") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: holds more than tensors and plain values, or a whole module as torch before 1.6 wrote "
            "it, so it is not opened. Use a file of plain weights; if you trust this one, convert it once, "
            "where nothing is at risk: torch.save(torch.load(FILE, weights_only=False).state_dict(), NEW)"
        ) from None
    except Exception as error:  # damaged files make torch raise all kinds
        raise UserError(
            f"{path}: cannot be read ({one_line(error, 90)}); is it truncated? use another copy"
        ) from None


def rename(state_dict, pairs):
    """A state dict with its names changed by pairs of regular expressions (pattern, replacement). Of the
    patterns the first that matches a name decides. Values may be anything, for example gradients."""
    renamed = {}
    for name, value in state_dict.items():
        for old, new in pairs:
            if re.search(old, name):
                name = re.sub(old, new, name, count=1)
                break
        renamed[name] = value
    return renamed


# The keys under which published files hold their weights; the first that a file has is taken. "teacher" comes
# first, because a full checkpoint of DINO has a student, too.
WRAPPERS = ("teacher", "model", "module", "state_dict", "model_ema", "state_dict_ema")


def find_weights(content, path):
    """The content of a published file -> its tensors by name. If it has averaged weights (EMA) beside the
    others, a line says which are taken."""
    keys = [key for key in WRAPPERS if isinstance(content.get(key), dict)]
    averaged = [key for key in keys if key.endswith("_ema")]
    if averaged and keys[0] not in averaged:
        print_rank0(f"{path}: takes the weights of {keys[0]}, not {averaged[0]}")
    found = content[keys[0]] if keys else content
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def strip_prefixes(weights, prefixes="module|_orig_mod|backbone|encoder|model"):
    """Remove from the names what wrappers put before them, in whatever order and as often as it is there."""
    return rename(weights, [(rf"^(({prefixes})\.)+", "")])


def load_strictly(module, weights):
    """Check each tensor, then load all. Each must be dense and finite, and hold floats or whole numbers as
    the module's own does; if not, this raises ValueError. Names or shapes that do not fit raise torch's
    RuntimeError."""
    for name, own in module.state_dict().items():
        value = weights.get(name, own)
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{name} is not a dense tensor")
        if value.is_floating_point() != own.is_floating_point():
            raise ValueError(f"{name} is {value.dtype}, not {own.dtype}")
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{name} is not finite")
    module.load_state_dict(weights)


def read_shape(weights):
    """The weights of a ViT for square images, with our names -> the arguments of `ViT`, except heads, which
    no tensor shows.

    Weights that are not those of a ViT raise errors of all kinds, which the callers catch.
    """

    def read_blocks(name):
        """The width of a list of blocks, their number, and their MLP ratio."""
        width = len(weights[f"{name}.0.norm1.weight"])
        depth = sum(key.startswith(f"{name}.") and key.endswith(".norm1.weight") for key in weights)
        return width, depth, len(weights[f"{name}.0.mlp.fc1.weight"]) / width

    # A convolution stem is recognised by its names. Its patches have 16 pixels on a side.
    if "patch_embed.embed1.proj.weight" in weights:
        width1, depth1, ratio1 = read_blocks("patch_embed.blocks1")
        width2, depth2, ratio2 = read_blocks("patch_embed.blocks2")
        stem = dict(widths=[width1, width2], depths=[depth1, depth2], mlp_ratios=[ratio1, ratio2])
        channels = weights["patch_embed.embed1.proj.weight"].shape[1]
        patch_size = 16
    else:
        stem = None
        _, channels, patch_size, _ = weights["patch_embed.proj.weight"].shape

    # The position table has one row per patch, and one for CLS.
    class_token = "cls_token" in weights
    side = math.isqrt(weights["pos_embed"].shape[1] - int(class_token))
    width, depth, mlp_ratio = read_blocks("blocks")
    return dict(
        image_size=[side * patch_size] * 2,
        patch_size=patch_size,
        width=width,
        depth=depth,
        channels=channels,
        mlp_ratio=mlp_ratio,
        layer_scale=1.0 if "blocks.0.ls1.gamma" in weights else None,
        class_token=class_token,
        stem=stem,
    )


def load_matching(model, weights, shape, source):
    """--init: load weights by name into a model that has an `encoder` -> "the encoder" or "the whole model".

    The encoder's weights must all be there and fit. The rest of the model is loaded only if all its tensors
    are there with the right shapes. Position tables are resized to the model's grid. shape: what the file
    says of its encoder (heads, image_size ...), or {}. A UserError begins with `source`.
    """
    # Compare what strict loading does not: no tensor shows the heads, and a position table that belongs to
    # another patch size would be resized.
    own = model.state_dict()
    encoder = model.encoder
    for key in ("patch_size", "heads"):
        here = encoder.config[key]
        if shape.get(key, here) != here:
            flag = key.replace("_", "-")
            raise UserError(f"{source}: has {flag} {shape[key]} (here {here}); give --{flag} {shape[key]}")

    # Load the encoder, with each position table resized.
    try:
        for name in [name for name in own if name.endswith("pos_embed") and name in weights]:
            # A file that does not say its image size is of a square one.
            side = math.isqrt(weights[name].shape[1] - encoder.num_prefix_tokens)
            grid = [pixels // encoder.patch_size for pixels in shape.get("image_size", ())] or (side, side)
            weights = {**weights, name: resize_positions(weights[name], grid, encoder.grid)}
        part = {name: value for name, value in weights.items() if name.startswith("encoder.")}
        load_strictly(encoder, rename(part, [(r"^encoder\.", "")]))

        # Load the whole model if all of it is there.
        whole = all(name in weights and weights[name].shape == value.shape for name, value in own.items())
        if whole:
            load_strictly(model, {name: weights[name] for name in own})
    except (RuntimeError, ValueError, IndexError) as error:
        raise UserError(
            f"{source}: does not fit this {type(model).__name__}: {one_line(error, 250)}"
        ) from None
    return "the whole model" if whole else "the encoder"


def pack_encoder(encoder, method, feature, mean, std, state_dict=None):
    """What encoder.pt holds: how to build the encoder again, its weights, and how to use it.

    feature: what a linear probe should read, "cls" or "mean" (of the patches). mean, std: those by which
    images are normalised. state_dict: weights to take instead of the encoder's own.
    """
    weights = state_dict or encoder.state_dict()
    return {
        "config": {"kind": "vit", **encoder.config},
        "state_dict": {name: value.detach().cpu().clone() for name, value in weights.items()},
        "method": method,
        "feature": feature,
        "mean": list(mean),
        "std": list(std),
    }


def check_statistics(info, channels=3):
    """Raise a ValueError unless mean and std can be those of images with values between 0 and 1."""
    mean = info["mean"]
    std = info["std"]
    fit = all(0 <= m <= 1 for m in mean) and all(1e-3 <= s <= 1 for s in std)  # NaN fails every comparison
    if not (fit and len(mean) == len(std) == channels):
        raise ValueError(f"mean {mean} and std {std} are not of {channels} channels between 0 and 1")


def unpack_encoder(packed, source="encoder"):
    """The dict of `pack_encoder` -> (encoder in eval mode, info: the dict without the weights). A UserError
    begins with `source`."""
    try:
        encoder = ViT(**{key: value for key, value in packed["config"].items() if key != "kind"})
        load_strictly(encoder, packed["state_dict"])
        info = {key: packed[key] for key in ("config", "method", "feature", "mean", "std")}
        check_statistics(info, encoder.config["channels"])
    except Exception as error:  # a damaged or foreign file makes them raise all kinds
        raise UserError(
            f"{source}: not an encoder.pt of this project, or not a whole encoder.pt ({one_line(error)})"
        ) from None
    return encoder.eval(), info


def load_encoder(path):
    """encoder.pt -> (encoder in eval mode, info with method, feature, mean, std, config)."""
    return unpack_encoder(load_file(path), path)
