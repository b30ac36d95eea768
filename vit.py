"""The Vision Transformer that every method here trains, and the few pieces that several methods share.

Reading order of the project: **vit** -> mrmae -> mixedae -> cae -> data -> train -> finetune -> dense.

    images (B, C, height, width)
        -- PatchEmbed --------------------------> patch tokens   (B, L, D)
        -- + positions, keep the visible ones --> visible tokens (B, V, D)
        -- CLS in front ------------------------> tokens         (B, N, D)
        -- blocks: attention, MLP --------------> tokens         (B, N, D)
        -- final LayerNorm ---------------------> what probes, decoders and losses read

The encoder has the parameter names and the numerics of timm's and MAE's ViT, so published weights load into
it and its own weights load into timm. One thing is new: the homologous TopK attention of MixedAE (Eq. 6, in
`Attention.homologous_attention`). It adds no parameter and is switched off after pre-training.

Letters, used in every file:
    B images            n = 1/r images in a group (MixedAE)    G mixed images: B r, or B in full mode
    L patches           V visible, U hidden patches            N tokens that a block sees (patches + CLS)
    D width             H heads, D_h = D / H width of a head   K keys that TopK keeps
    C channels          p patch size in pixels                 P = C p p values of a patch
    Dd decoder width    Dt width of a teacher's features (MR-MAE)
MixedAE writes P for our p and P^2 C for our P; MR-MAE writes l_v, l_m for our V, U and C for our D and Dt.
Shapes are batch first, and tokens are the last axis but one, always. A `hidden` mask is True where a patch is
hidden, always. Images need not be square: grids are written (h, w), in patches.
"""

import argparse
import math
import os
import pickle
import re
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import stochastic_depth


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
    """Mean and standard deviation of each patch over all its P values: two of (B, L, 1).

    The variance is the unbiased one and 1e-6 stands inside the root, as in MAE: it matters in flat patches.
    """
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (var + 1e-6).sqrt()


def norm_pix(patches):
    """MAE's normalised targets: each patch (B, L, P) minus its mean, over its standard deviation."""
    mean, std = patch_stats(patches)
    return (patches - mean) / std


def undo_norm_pix(pred, patches):
    """Predictions of `norm_pix` targets -> pixels, for pictures. The mean and deviation are those of the true
    `patches`: the model has not predicted them."""
    mean, std = patch_stats(patches)
    return pred * std + mean


# ------------------------------------------------------------------------------------------------------------
# Masks
# ------------------------------------------------------------------------------------------------------------
def random_visible(batch, patches, visible, device):
    """Uniformly random masking (MR-MAE Sec. 3.1): the ids (B, V) of the visible patches, in raster order."""
    noise = torch.rand(batch, patches, device=device)  # (B, L)
    return noise.argsort(dim=1)[:, :visible].sort(dim=1).values  # the first V of a random permutation


def hidden_mask(ids, patches):
    """Ids of visible patches (B, V) -> mask (B, L) bool, True = hidden."""
    return torch.ones(len(ids), patches, dtype=torch.bool, device=ids.device).scatter(1, ids, False)


def visible_ids(hidden):
    """(B, L) bool, True = hidden -> (B, V) ids of the visible patches, in raster order."""
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
    encodes the column, the second half the row. Each half is [sin | cos] of the coordinate times 10000^(-k /
    (dim / 4)), k = 0 .. dim/4 - 1, computed in float64.
    """
    if dim % 4:
        raise UserError(f"width {dim}: the sine-cosine position table needs a multiple of 4")
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))  # (dim / 4,)
    rows, columns = torch.cartesian_prod(*map(torch.arange, grid)).T  # (L,) each
    angles = [axis.outer(frequencies) for axis in (columns, rows)]  # two of (L, dim / 4)
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)  # (L, dim)
    return F.pad(table, (0, 0, prefix, 0)).unsqueeze(0).float()  # (1, prefix + L, dim)


def resize_tokens(tokens, old_grid, new_grid, **how):
    """(B, h w, D) on old_grid -> (B, h' w', D) on new_grid, in fp32.

    how: arguments of F.interpolate. The defaults are size=new_grid and mode="bicubic".
    """
    tokens = rearrange(tokens.float(), "b (h w) d -> b d h w", h=old_grid[0])
    tokens = F.interpolate(tokens, **{"size": tuple(new_grid), "mode": "bicubic", **how})
    return rearrange(tokens, "b d h w -> b (h w) d")


def resize_positions(table, old_grid, new_grid, **how):
    """A position table (1, [1 +] h w, D) for old_grid -> the same for new_grid. CLS's row stays as it is."""
    if tuple(old_grid) == tuple(new_grid):
        return table
    prefix = table.shape[1] - old_grid[0] * old_grid[1]  # 1 with a row of CLS, else 0
    patches = resize_tokens(table[:, prefix:], old_grid, new_grid, **how)
    return torch.cat([table[:, :prefix], patches.to(table.dtype)], dim=1)


# ------------------------------------------------------------------------------------------------------------
# Attention
# ------------------------------------------------------------------------------------------------------------
def keep_topk(scores, k, cls_in_topk=False):
    """TopK of MixedAE Eq. 6 (Sec. 3.2), the keys that a query may see: scores (B, H, N, N) -> bool.

    k is the paper's K. Token 0 is CLS. In every head by itself, each query patch keeps exactly the k key
    patches with the highest scores. Eq. 6 speaks of query and key patches, so CLS takes no part: its key is
    always kept and not counted, and its query sees all. With cls_in_topk CLS counts as one more patch: every
    row keeps exactly k of all N keys. Which keys are kept is a choice without gradient; the scores that are
    kept have one.
    """
    first = 0 if cls_in_topk else 1  # the first token that takes part
    keep = torch.ones_like(scores, dtype=torch.bool)  # CLS's row and column stay so without cls_in_topk
    # (B, H, L, k); with cls_in_topk (B, H, N, k)
    best = scores.detach()[..., first:, first:].topk(k, dim=-1, sorted=False).indices
    # Scatter indices: a threshold would keep more than k where scores tie, as they often do in bf16.
    keep[..., first:, first:] = False
    keep[..., first:, first:].scatter_(-1, best, True)
    return keep


class Attention(nn.Module):
    """Multi-head self-attention; with `topk` = K the homologous attention of MixedAE Eq. 6.

    While `record` is True each forward stores `recorded` = (keep, attention), both (B, H, N, N): the keys
    that TopK kept (None in a global layer) and the probabilities.
    """

    record = False
    recorded = None

    def __init__(self, dim, heads, topk=None, cls_in_topk=False):
        super().__init__()
        if dim % heads:
            raise UserError(f"width {dim} is not a multiple of {heads} heads")
        self.heads = heads
        self.topk = topk
        self.cls_in_topk = cls_in_topk
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):  # (B, N, D)
        # Compute queries, keys and values of all heads at once.
        qkv = self.qkv(x)  # (B, N, 3 D)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)  # (B, H, N, D_h)

        # Attend. Eq. 6 as written needs the whole matrix of probabilities. PyTorch's fused attention computes
        # the same without storing it, so that is used unless somebody wants to look at the matrix.
        if self.record:
            x = self.homologous_attention(q, k, v)  # (B, H, N, D_h)
        else:
            x = self.fused_attention(q, k, v)

        # Put the heads side by side again and mix them.
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))  # (B, N, D)

    def homologous_attention(self, q, k, v):
        """MixedAE Eq. 6: A_HomoAtt = softmax(TopK(q k^T / sqrt(D_h))), and the result A_HomoAtt v; k are the
        keys. All are (B, H, N, D_h). Without `topk` it is ordinary attention."""
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # q k^T / sqrt(D_h), (B, H, N, N)
        keep = None
        if self.topk is not None:
            keep = keep_topk(scores, self.topk, self.cls_in_topk)
            scores = scores.masked_fill(~keep, float("-inf"))  # softmax gives 0 to what is not kept
        attention = scores.softmax(dim=-1)
        if self.record:
            self.recorded = (keep, attention.detach())
        return attention.to(v.dtype) @ v  # under CUDA autocast the softmax is fp32, v is not

    def fused_attention(self, q, k, v):
        """The same result by PyTorch's fused attention, which takes the choice of keys as a boolean mask."""
        keep = None
        if self.topk is not None:
            with torch.no_grad():  # the choice has no gradient; the fused attention computes the scores anew
                scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
                keep = keep_topk(scores, self.topk, self.cls_in_topk)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


class CrossAttention(nn.Module):
    """Multi-head attention of queries to keys and values of their own: CAE's regressor and probe.

    Keys have no bias (CAE's code). While `record` is True each forward stores the probabilities in
    `recorded`, (B, H, U, N).
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
        inputs = (self.q(q), self.k(k), self.v(v))
        q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=self.heads) for x in inputs)
        if self.record:
            self.recorded = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1).detach()
        x = F.scaled_dot_product_attention(q, k, v)  # (B, H, U, D_h)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


# ------------------------------------------------------------------------------------------------------------
# Blocks
# ------------------------------------------------------------------------------------------------------------
class Residual(nn.Module):
    """What the blocks have in common: residual branches, and two attributes that are set from outside.
    `drop_path` (by `set_drop_paths`) is the probability that a sample skips a branch in training; `recompute`
    (by train.wrap_ddp) trades time for memory."""

    drop_path = 0.0
    recompute = False

    def drop(self, branch):
        # Kept branches are divided by 1 - drop_path, so that the expected output is unchanged.
        return stochastic_depth(branch, self.drop_path, "row", self.training)


class Mlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between them. `activation` may be set: CLIP has another.

    layer: the kind of the layers; the convolution stem takes convolutions of 1 x 1.
    """

    def __init__(self, dim, hidden, layer=nn.Linear):
        super().__init__()
        self.fc1 = layer(dim, hidden)
        self.fc2 = layer(hidden, dim)
        self.activation = F.gelu

    def forward(self, x):  # (B, N, D)
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

    def __init__(self, dim, heads, mlp_ratio=4.0, layer_scale=None, topk=None, cls_in_topk=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, topk, cls_in_topk)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)

    def forward(self, x):  # (B, N, D)
        x = x + self.drop(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop(self.ls2(self.mlp(self.norm2(x))))


def call_block(block, *inputs):
    """block(*inputs). With `recompute` its activations are computed again in the backward pass."""
    if block.recompute:
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def all_blocks(module):
    """The blocks of a module, of whatever kind, in the order of its forward pass."""
    return [part for part in module.modules() if hasattr(part, "drop_path")]


def set_drop_paths(module, rate):
    """Stochastic depth (fine-tuning, CAE): `drop_path` rises linearly over the blocks, from 0 to `rate`."""
    blocks = all_blocks(module)
    for block, value in zip(blocks, torch.linspace(0, rate, len(blocks)).tolist()):
        block.drop_path = value


def init_weights(module):
    """MAE's initialisation of new modules, for `Module.apply`: linear layers xavier-uniform with bias 0.
    LayerNorms keep PyTorch's weight 1 and bias 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)  # qkv as one (3 D, D) matrix
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------------------------
# Encoder
# ------------------------------------------------------------------------------------------------------------
class PatchEmbed(nn.Module):
    """(B, C, h p, w p) -> (B, L, D): one linear map per patch, kept as a convolution for timm's names."""

    def __init__(self, patch_size, channels, width):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)
        # As a linear layer, xavier-uniform; the bias keeps PyTorch's default of convolutions.
        nn.init.xavier_uniform_(self.proj.weight.view(width, -1))

    def forward(self, images, hidden=None, stages=None):
        # `hidden` and `stages` are there to have ConvStem's signature. A plain patch embedding treats each
        # patch by itself, so it needs neither.
        return rearrange(self.proj(images), "b d h w -> b (h w) d")


class ViT(nn.Module):
    """A Vision Transformer encoder with fixed sine-cosine positions.

    image_size: (height, width) in pixels. class_token: whether a CLS token stands in front (MCMAE has none).
    stem: None for a patch embedding, or the widths, depths and mlp_ratios of a ConvStem in a dict.
    topk, cls_in_topk: K of MixedAE Eq. 6 for each block, None in a global one; see `keep_topk`.
    `config` holds all arguments but the last two: `ViT(**config)` builds the encoder that transfers, whose
    attention is global.
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
        cls_in_topk=False,
    ):
        super().__init__()
        if any(side % patch_size for side in image_size):
            raise UserError(
                f"image size {image_size[0]} x {image_size[1]} is not a multiple of the patch size "
                f"{patch_size}"
            )

        # Keep what rebuilds the encoder: all arguments but the last two.
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
        self.resize = resize_positions  # may be set: DINO has a rule of its own for other image sizes
        self.norm_pre = nn.Identity()  # CLIP has a LayerNorm here
        topk = topk or [None] * depth  # K of each block
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, layer_scale, k, cls_in_topk) for k in topk)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(init_weights)

    def embed(self, images, hidden=None, stages=None):
        """images (B, C, h p, w p) -> patch tokens with positions (B, L, D). Another image size than the one
        that the encoder was built for resizes the position table.

        hidden, stages: for a ConvStem, see there. A plain patch embedding mixes no patches and needs neither.
        """
        x = self.patch_embed(images, hidden, stages)
        grid = tuple(side // self.patch_size for side in images.shape[-2:])
        return x + self.resize(self.pos_embed, self.grid, grid)[:, self.num_prefix_tokens :]

    def prepend_cls(self, x):
        """(B, V, D) -> what the first block sees, (B, 1 + V, D). Without CLS it adds nothing."""
        if self.cls_token is not None:
            cls = self.cls_token + self.pos_embed[:, :1]  # (1, 1, D)
            x = torch.cat([cls.expand(len(x), -1, -1), x], dim=1)
        return self.norm_pre(x)

    def forward_blocks(self, x, taps=()):
        """Embedded patches (B, V, D) -> the last block's output (B, 1 + V, D), before the final norm, and a
        list of the outputs of the blocks in `taps` (numbers from 1), in the order asked for."""
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

        images (B, C, h p, w p) normalised; hidden (B, L) bool or None; taps: numbers of blocks, from 1, whose
        output is wanted as a map; only without `hidden`. Returns {"cls": (B, 1, D), or None if there is none,
        "patches": (B, V, D), both after the final norm; "taps": [(B, D, h, w), ...] raw outputs of blocks;
        "attention": (B, H, N, N), the softmax of the last block, if asked for}.
        """
        # Embed, and drop what is hidden.
        x = self.embed(images, hidden)  # (B, L, D)
        if hidden is not None:
            x = gather_tokens(x, visible_ids(hidden))  # (B, V, D)

        # Encode; record the attention of the last block if it is wanted.
        last = self.blocks[-1].attn
        last.record = attention
        x, tapped = self.forward_blocks(x, taps)
        x = self.norm(x)
        last.record = False

        # Split CLS from the patches, and make maps of the taps.
        prefix, h = self.num_prefix_tokens, images.shape[-2] // self.patch_size
        maps = [rearrange(tokens[:, prefix:], "b (h w) d -> b d h w", h=h) for tokens in tapped]
        out = {"cls": x[:, :1] if prefix else None, "patches": x[:, prefix:], "taps": maps}
        if attention:
            out["attention"] = last.recorded[1]
            last.recorded = None
        return out


@torch.no_grad()
def cls_attention(encoder, images):
    """Where CLS looks (MixedAE Fig. 5): attention of the last block, mean over heads, CLS as the query and
    the patches as keys. images (B, C, h p, w p) normalised -> (B, h, w), each map with the sum 1."""
    attention = encoder.features(images, attention=True)["attention"]  # (B, H, N, N)
    patches = attention.float().mean(dim=1)[:, 0, 1:]  # (B, L); the CLS key is dropped
    patches = patches / patches.sum(dim=1, keepdim=True)
    return rearrange(patches, "b (h w) -> b h w", h=images.shape[-2] // encoder.patch_size)


# ------------------------------------------------------------------------------------------------------------
# Decoder
# ------------------------------------------------------------------------------------------------------------
class Decoder(nn.Module):
    """The transformer decoder of the MAE family. Where [MASK] tokens go is the method's business:

        latent (B, 1 + V, D) -- embed --> (B, 1 + V, Dd)
            -- the method inserts mask_token --> (B, 1 + L, Dd) -- forward --> (B, L, P)

    For an encoder without CLS there is none here either.
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
        """The sequence with [MASK] inserted (B, 1 + L, Dd) -> patch tokens after the last norm (B, L, Dd)."""
        x = x + self.pos_embed
        for block in self.blocks:
            x = call_block(block, x)
        return self.norm(x)[:, self.num_prefix_tokens :]

    def forward(self, x):
        """The same -> predicted patches (B, L, P)."""
        return self.pred(self.features(x))


# ============================================================================================================
# A first reading may stop here. What follows: the convolution stem of MCMAE, flags, files.
# ============================================================================================================
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
    """The convolution stages of MCMAE (MR-MAE Sec. 3.3), of strides 4, 2 and 2, in place of the patch
    embedding:

    images (B, C, 16 h, 16 w) -- embed1 (stride 4), blocks1 --> stage 1 (B, w1, 4 h, 4 w)
        -- embed2 (stride 2), blocks2 --> stage 2 (B, w2, 2 h, 2 w)
        -- embed3 (stride 2), proj -----> (B, L, D), L = h w
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
        self.to(memory_format=torch.channels_last)  # as LayerNorm2d's output is

    def forward(self, images, hidden=None, stages=None):
        """hidden (B, L) bool: patches whose pixels must not reach the others. stages: a list that receives
        the maps of stages 1 and 2."""
        x = images
        for embed, blocks, k in ((self.embed1, self.blocks1, 4), (self.embed2, self.blocks2, 2)):
            # Bring the mask to the grid of the stage: k x k of its places lie in a patch.
            keep = None
            if hidden is not None:
                keep = repeat(~hidden, "b (h w) -> b 1 (h k1) (w k2)", h=images.shape[-2] // 16, k1=k, k2=k)
            x = embed(x)
            for block in blocks:
                x = call_block(block, x, keep)
            if stages is not None:
                stages.append(x)
        return self.proj(rearrange(self.embed3(x), "b d h w -> b (h w) d"))


# ------------------------------------------------------------------------------------------------------------
# Sizes, and the flags that choose them
# ------------------------------------------------------------------------------------------------------------
class UserError(ValueError):
    """Bad user input: the programs print this one line and exit with `code`, without a traceback."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


def print_rank0(line):
    """Print a line once, however many processes there are."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


SIZES = {  # width, depth and heads of the encoder, then of the decoder
    "micro": (128, 4, 4, 64, 2, 4),  # ours: for a laptop
    "tiny": (192, 12, 3, 192, 4, 3),  # DeiT; the decoder is ours: MAE's is five times the encoder
    "small": (384, 12, 6, 512, 8, 16),  # DeiT
    "base": (768, 12, 12, 512, 8, 16),  # ViT; the decoder is MAE's, which has it for L and H too
    "large": (1024, 24, 16, 512, 8, 16),  # ViT
    "huge": (1280, 32, 16, 512, 8, 16),  # ViT
}
SIZE_FLAGS = ("width", "depth", "heads", "decoder_width", "decoder_depth", "decoder_heads")


def stem_size(width1, width2, depth=11, stage_depth=2, mlp_ratio=4):
    """A size with the convolution stem: the widths of its two stages of `stage_depth` blocks each, and the
    number of blocks behind them. `mlp_ratio` is that of the stages and of the decoder."""
    return dict(
        widths=[width1, width2],
        depths=[stage_depth] * 2,
        mlp_ratios=[mlp_ratio] * 2,
        depth=depth,
        mlp_ratio=4,
        decoder_mlp_ratio=mlp_ratio,
    )


STEM_SIZES = {
    "micro": stem_size(32, 64, depth=4, stage_depth=1),  # ours, for a laptop
    "small": stem_size(128, 256),  # forks of MCMAE's code
    "base": stem_size(256, 384),  # MCMAE's code, which has this size alone
    "large": stem_size(384, 768, depth=23, mlp_ratio=8),  # forks of MCMAE's code
    "huge": stem_size(768, 1024, depth=31, mlp_ratio=8),  # forks of MCMAE's code
}


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


def add_size_args(parser, encoder=True, decoder=True):
    """The flags that fix the shape of images and, if asked for, of encoder and decoder."""
    add = parser.add_argument_group("model size (the defaults are a laptop's; ours)").add_argument
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
    add("--patch-size", type=size_int, help="pixels; the papers use 16 at 224 pixels [8]")
    add("--size", choices=SIZES, default="micro", help="a named size; the flags below win over it")
    add("--width", type=size_int, help="D, width of the encoder")
    add("--depth", type=size_int, help="blocks of the encoder")
    add("--heads", type=size_int, help="attention heads of the encoder; no state dict shows them")
    if not decoder:
        return
    add(
        "--decoder-width",
        type=size_int,
        help="512 in MAE and MixedAE Sec. 4.1 (light: 256); the encoder's in CAE",
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
    """Make every size in `args` explicit, in place: also those not given, and the image size as [height,
    width]."""
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


def build_encoder(args, **options):
    """The encoder that the size flags describe; `options` are further arguments of ViT."""
    return ViT(args.image_size, args.patch_size, args.width, args.depth, args.heads, **options)


def build_decoder(args, encoder, **options):
    """The decoder that the size flags describe; `options` are further arguments of Decoder."""
    return Decoder(encoder, args.decoder_width, args.decoder_depth, args.decoder_heads, **options)


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------
def one_line(error, length=150):
    """An error of a library as one short line."""
    return " ".join(str(error).split())[:length] or type(error).__name__


def load_file(path, allowed=()):
    """A file of tensors, numbers, strings, lists and dicts, on the CPU. Nothing is ever unpickled freely.

    allowed: further classes that may lie in it, each as (the class to make instead, its name in the file).
    """
    # Refuse a pipe, for which the program would wait for ever.
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise UserError(f"{path}: is no regular file; give a file of weights")
    try:
        # Name the commonest mistake: a file that begins neither as a zip archive nor as a pickle.
        with open(path, "rb") as file:
            if file.read(1) not in (b"P", b"\x80"):
                raise UserError(f"{path}: truncated, or not written by torch.save: not opened; give weights")

        # Published files hold their flags in a Namespace, which does nothing.
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
    """A state dict with names changed by (pattern, replacement) regular expressions; the first that matches
    decides. Values are passed through, so a dict of gradients maps the same way."""
    renamed = {}
    for name, value in state_dict.items():
        for old, new in pairs:
            if re.search(old, name):
                name = re.sub(old, new, name, count=1)
                break
        renamed[name] = value
    return renamed


# Where the weights lie in a published file, if the file is not the weights. DINO's has a student too.
WRAPPERS = ("teacher", "model", "module", "state_dict", "model_ema", "state_dict_ema")


def find_weights(content, path):
    """A published file's content -> its tensors by name. If it has averaged weights (EMA) beside the others,
    a line says which are taken."""
    keys = [key for key in WRAPPERS if isinstance(content.get(key), dict)]
    averaged = [key for key in keys if key.endswith("_ema")]
    if averaged and keys[0] not in averaged:
        print_rank0(f"{path}: takes the weights of {keys[0]}, not {averaged[0]}")
    found = content[keys[0]] if keys else content
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def strip_prefixes(weights, prefixes="module|_orig_mod|backbone|encoder|model"):
    """Names without what wrappers put before them, in whatever order and as often as it is there."""
    return rename(weights, [(rf"^(({prefixes})\.)+", "")])


def load_strictly(module, weights):
    """module.load_state_dict, after a look at each tensor, which must be dense, of its counterpart's kind
    (floats or whole numbers) and finite. Raises ValueError, for names and shapes RuntimeError."""
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
    """What the tensors of a square ViT, by our names, say of its shape -> arguments of `ViT` but for heads,
    which no tensor shows.

    What is no ViT raises KeyError, ValueError, IndexError, TypeError or ZeroDivisionError.
    """

    def read_blocks(name):
        """The width of a list of blocks, their number, and their MLP ratio."""
        width = len(weights[f"{name}.0.norm1.weight"])
        depth = sum(key.startswith(f"{name}.") and key.endswith(".norm1.weight") for key in weights)
        return width, depth, len(weights[f"{name}.0.mlp.fc1.weight"]) / width

    # A convolution stem shows by its names. Behind it a patch has 16 pixels.
    if "patch_embed.embed1.proj.weight" in weights:
        width1, depth1, ratio1 = read_blocks("patch_embed.blocks1")
        width2, depth2, ratio2 = read_blocks("patch_embed.blocks2")
        stem = dict(widths=[width1, width2], depths=[depth1, depth2], mlp_ratios=[ratio1, ratio2])
        channels, patch_size = weights["patch_embed.embed1.proj.weight"].shape[1], 16
    else:
        stem = None
        _, channels, patch_size, _ = weights["patch_embed.proj.weight"].shape

    # The position table has a row a patch, and one for CLS.
    class_token = "cls_token" in weights
    side = math.isqrt(weights["pos_embed"].shape[1] - class_token)
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
    """--init: load weights by name into a model with an `encoder`, strictly, and the rest of the model where
    every tensor of it is there with its shape -> "the encoder" or "the whole model".

    shape: what the file says of its encoder (heads, image_size ...), or {}. Position tables are resized to
    the model's grid. A UserError begins with `source`.
    """
    # Compare what no strict loading would notice: the position table depends on the patch size, and no tensor
    # shows the heads.
    own, encoder = model.state_dict(), model.encoder
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
        load_strictly(encoder, rename(part, [("^encoder.", "")]))

        # Load the rest where all of it is there.
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

    feature: "cls" or "mean", the token(s) that a linear probe should read; mean, std: of the images that it
    was trained on; state_dict: other weights than the encoder's own.
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
    """A ValueError unless mean and std are numbers of images whose values lie between 0 and 1."""
    mean, std = info["mean"], info["std"]
    fit = all(0 <= m <= 1 for m in mean) and all(1e-3 <= s <= 1 for s in std)  # NaN fails every comparison
    if not (fit and len(mean) == len(std) == channels):
        raise ValueError(f"mean {mean} and std {std} are not of {channels} channels between 0 and 1")


def unpack_encoder(packed, source="encoder"):
    """`pack_encoder`'s dict -> (encoder in eval mode, the dict without weights). A UserError begins with
    `source`."""
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
