"""The Vision Transformer that every method here trains, and the few pieces that several methods share.

Reading order of the project: **vit** -> mrmae -> mixedae -> cae -> data -> train -> finetune.

The encoder has the parameter names and the numerics of timm's and MAE's ViT, so published weights load into it and its own
weights load into timm. One thing is new: the homologous TopK attention of MixedAE (Eq. 6), `Attention.topk`, which adds no
parameter and can be switched off after pre-training.

    images (B, C, H, W) -- PatchEmbed or ConvStem --> (B, L, D) + pos_embed -- keep the visible --> (B, V, D)
        -- CLS in front --> (B, N, D) -- blocks --> (B, N, D) -- norm --> tokens (B, N, D)

Letters, used in every file:
    B images            G = B r groups of images (MixedAE)     n = 1/r images in a group
    L patches           V visible, U hidden patches            N tokens that a block sees (patches + CLS)
    D width             H heads                                K keys that TopK keeps
    C channels          p patch size in pixels                 P = C p p values of a patch     Dt width of a teacher's features (MR-MAE)
    Dd decoder width    D_h = D / H, width of a head           (H and W are the image's height and width in (B, C, H, W))
MixedAE writes P for our p and P^2 C for our P; MR-MAE writes l_v, l_m for our V, U, C for our D and Dt, p^2 for our P.
Batch first, tokens last but one, always. A `hidden` mask is True where a patch is hidden, always. Images need not be square.
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


class UserError(ValueError):
    """A mistake that its maker can mend: the programs print its one line and exit with `code`, without a traceback."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


def say(line):
    """Print a line once, however many processes there are."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


# --------------------------------------------------------------------------------------------------------------------
# Sizes, and the flags that choose them
# --------------------------------------------------------------------------------------------------------------------
SIZES = {  # encoder width, depth, heads; decoder width, depth, heads
    "micro": (128, 4, 4, 64, 2, 4),  # ours: for a laptop
    "tiny": (192, 12, 3, 512, 8, 16),  # DeiT
    "small": (384, 12, 6, 512, 8, 16),  # DeiT
    "base": (768, 12, 12, 512, 8, 16),  # ViT; the decoder is MAE's for every size (MixedAE Sec. 4.1)
    "large": (1024, 24, 16, 512, 8, 16),  # ViT
    "huge": (1280, 32, 16, 512, 8, 16),  # ViT
}
STEM_SIZES = {  # with the convolution stem: widths and depths of its two stages, depth of the transformer behind them
    "micro": ([32, 64], [1, 1], 4),  # ours
    "base": ([256, 384], [2, 2], 11),  # MCMAE, the one size that its authors have
}
STEM_FLAGS = ("stem_widths", "stem_depths", "depth")
SIZE_FLAGS = ("width", "depth", "heads", "decoder_width", "decoder_depth", "decoder_heads")


def add_size_args(parser, encoder=True, decoder=True):
    """The flags that fix the shape of images and, if asked for, of encoder and decoder. `resolve_sizes` fills in what was not given."""
    group = parser.add_argument_group("model size (the defaults are a laptop's; ours)")
    group.add_argument("--image-size", type=int, nargs="+", default=[64], metavar="PIXELS", help="H, or H W; multiples of the patch")
    if not encoder:
        return
    group.add_argument("--patch-size", type=int, help="pixels; the papers use 16 at 224 pixels [8]")
    group.add_argument("--size", choices=SIZES, default="micro", help="a named size; the six flags below win over it")
    group.add_argument("--width", type=int, help="D, width of the encoder")
    group.add_argument("--depth", type=int, help="blocks of the encoder")
    group.add_argument("--heads", type=int, help="attention heads of the encoder; no state dict shows them")
    if not decoder:
        return
    group.add_argument("--decoder-width", type=int, help="512 in MAE and MixedAE Sec. 4.1 (its lightweight decoder: 256); the encoder's in CAE")
    group.add_argument("--decoder-depth", type=int, help="8 in MR-MAE Sec. 4.1 and MixedAE Sec. 4.1 (its lightweight decoder: 2); 4 in CAE Sec. 5.1")
    group.add_argument("--decoder-heads", type=int, help="16 in MAE's code, the encoder's in CAE's; the papers are silent")


def resolve_sizes(args, sizes=SIZES):
    """Make every size in `args` explicit, in place: image_size [H, W], and of the others those that were not given."""
    args.image_size = [args.image_size[0], args.image_size[-1]]
    if not hasattr(args, "size"):  # no ViT
        return
    named = {"patch_size": 8, **dict(zip(SIZE_FLAGS, sizes[args.size]))}
    if getattr(args, "stem", "patch") == "conv":
        if args.patch_size not in (None, 16):
            raise UserError(f"--patch-size {args.patch_size}: with --stem conv it is 16 = 4 x 2 x 2, the strides of its stages; leave the flag out")
        missing = [f"--{flag.replace('_', '-')}" for flag in STEM_FLAGS if getattr(args, flag) is None]
        if missing and args.size not in STEM_SIZES:
            raise UserError(f"--stem conv has no size {args.size} of its own (but {', '.join(STEM_SIZES)}): give {', '.join(missing)} too")
        named |= {"patch_size": 16, **dict(zip(STEM_FLAGS, STEM_SIZES.get(args.size, ())))}
    for flag, value in named.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
        given, least = getattr(args, flag), 0 if flag == "decoder_depth" else 1
        given = given if isinstance(given, list) else [given]
        if min(given) < least:
            raise UserError(f"--{flag.replace('_', '-')} {' '.join(map(str, given))}: must be at least {least}")


# --------------------------------------------------------------------------------------------------------------------
# Patches
# --------------------------------------------------------------------------------------------------------------------
def patchify(images, p):
    """(B, C, H, W) -> (B, L, P). Patches row by row; inside a patch: row, column, channel (MAE's order)."""
    return rearrange(images, "b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=p, p2=p)


def unpatchify(patches, grid, p):
    """(B, L, P) -> (B, C, H, W), the inverse of `patchify`; grid = (H / p, W / p)."""
    return rearrange(patches, "b (h w) (p1 p2 c) -> b c (h p1) (w p2)", h=grid[0], w=grid[1], p1=p, p2=p)


def patch_stats(patches):
    """Mean and standard deviation of each patch over all its P values: two (B, L, 1).

    The variance is the unbiased one and 1e-6 stands inside the root, as in MAE: flat patches show the difference.
    """
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (var + 1e-6).sqrt()


def norm_pix(patches):
    """MAE's normalised targets: each patch (B, L, P) minus its mean, over its standard deviation."""
    mean, std = patch_stats(patches)
    return (patches - mean) / std


def undo_norm_pix(pred, patches):
    """Predictions of `norm_pix` targets -> pixels, for pictures: with the true mean and deviation of `patches`, which are not predicted."""
    mean, std = patch_stats(patches)
    return pred * std + mean


def visible_ids(hidden):
    """(B, L) bool, True = hidden -> (B, V) indices of the visible patches, in raster order."""
    counts = (~hidden).sum(dim=1)  # (B,)
    if counts.min() != counts.max():
        raise ValueError(f"a mask must show the same number of patches in each row, not {counts.min()} to {counts.max()}")
    return hidden.int().argsort(dim=1, stable=True)[:, : int(counts[0])]  # False sorts before True


def take(tokens, ids):
    """Tokens (B, L, D) at ids (B, V) -> (B, V, D)."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


# --------------------------------------------------------------------------------------------------------------------
# Positions
# --------------------------------------------------------------------------------------------------------------------
def sincos_positions(dim, grid, first=1):
    """MAE's fixed 2-D sine-cosine table (1, first + L, dim) for grid (h, w); the row of CLS, if there is one (first = 1), is zero.

    The first half of the channels encodes the column, the second half the row. Each half is [sin | cos] of the coordinate
    times 10000^(-k / (dim / 4)), k = 0 .. dim/4 - 1, computed in float64.
    """
    if dim % 4:
        raise UserError(f"width {dim}: the sine-cosine position table needs a multiple of 4")
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))  # (dim / 4,)
    rows, columns = torch.meshgrid(*(torch.arange(s, dtype=torch.float64) for s in grid), indexing="ij")
    angles = [c.flatten().outer(frequencies) for c in (columns, rows)]  # two of (L, dim / 4)
    table = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)  # (L, dim)
    return F.pad(table, (0, 0, first, 0)).unsqueeze(0).float()  # (1, first + L, dim)


def resize_tokens(tokens, old_grid, new_grid, **how):
    """(B, h w, D) on old_grid -> (B, h' w', D) on new_grid, in fp32; how: arguments of F.interpolate [size new_grid, bicubic]."""
    tokens = rearrange(tokens.float(), "b (h w) d -> b d h w", h=old_grid[0])
    tokens = F.interpolate(tokens, **{"size": tuple(new_grid), "mode": "bicubic", **how})
    return rearrange(tokens, "b d h w -> b (h w) d")


def resize_positions(table, old_grid, new_grid, **how):
    """(1, 1 + h w, D) for old_grid -> (1, 1 + h' w', D) for new_grid: bicubic by explicit size; a CLS row, if there is one, untouched."""
    if tuple(old_grid) == tuple(new_grid):
        return table
    first = table.shape[1] - old_grid[0] * old_grid[1]  # 1 with a CLS row, else 0
    patches = resize_tokens(table[:, first:], old_grid, new_grid, **how)
    return torch.cat([table[:, :first], patches.to(table.dtype)], dim=1)


# --------------------------------------------------------------------------------------------------------------------
# Blocks
# --------------------------------------------------------------------------------------------------------------------
def keep_topk(scores, k, cls_in_topk=False):
    """TopK of MixedAE Eq. 6 (Sec. 3.2), the keys that a query may see: scores (B, H, N, N) -> bool, True = kept.

    Token 0 is CLS. Each query patch keeps exactly the k key patches of the highest scores; the CLS key is always kept and not
    counted, and the CLS query sees all. With cls_in_topk CLS is one more patch: every row keeps exactly k of all N keys. Indices are
    scattered, because a threshold would keep more than k where scores tie, as they often do in bf16. The choice has no gradient.
    """
    first = 0 if cls_in_topk else 1  # the first token that takes part
    keep = torch.ones_like(scores, dtype=torch.bool)  # CLS row and column stay True
    best = scores.detach()[..., first:, first:].topk(k, dim=-1, sorted=False).indices  # (B, H, L, k)
    keep[..., first:, first:] = torch.zeros_like(keep[..., first:, first:]).scatter_(-1, best, True)
    return keep


class Attention(nn.Module):
    """Multi-head self-attention; with `topk` = k, the homologous attention of MixedAE Eq. 6.

    With record = True each forward stores `recorded` = (keep, attention), both (B, H, N, N): the kept keys, None in a global layer,
    and the probabilities.
    """

    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise UserError(f"width {dim} is not a multiple of {heads} heads")
        self.heads = heads
        self.topk = None  # K, or None for global attention
        self.cls_in_topk = False
        self.record = False
        self.recorded = None
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x):
        """(B, N, D) -> queries, keys, values, (B, H, N, D / H) each."""
        return rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads).unbind()

    def forward(self, x):  # (B, N, D)
        q, k, v = self.split(x)
        if self.topk is None and not self.record:
            x = F.scaled_dot_product_attention(q, k, v)  # (B, H, N, D / H)
        else:
            x = self.explicit(q, k, v)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))  # (B, N, D)

    def explicit(self, q, k, v):
        """Attention with its matrix written out, for `topk` and `record`. MixedAE Eq. 6: A_HomoAtt = softmax(TopK(q k^T / sqrt(D_h))),
        then the values. q, k, v and result (B, H, N, D_h)."""
        scale = q.shape[-1] ** -0.5  # 1 / sqrt(D_h)
        scores = (q * scale) @ k.transpose(-2, -1)  # (B, H, N, N)
        keep = None
        if self.topk is not None:
            keep = keep_topk(scores, self.topk, self.cls_in_topk)
            scores = scores.masked_fill(~keep, float("-inf"))
        attention = scores.softmax(dim=-1)
        if self.record:
            self.recorded = (keep, attention.detach())
        return attention.to(v.dtype) @ v  # under CUDA autocast the softmax is fp32, v is not


class Mlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between them (`activation`: CLIP has another)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
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


class Block(nn.Module):
    """A pre-norm transformer block. `drop_path` is the probability that a sample skips a branch in training: see `drop_paths`."""

    def __init__(self, dim, heads, mlp_ratio=4.0, layer_scale=None):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = 0.0

    def forward(self, x):  # (B, N, D)
        x = x + self.drop(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop(self.ls2(self.mlp(self.norm2(x))))

    def drop(self, branch):
        return stochastic_depth(branch, self.drop_path, "row", self.training)  # what stays is divided by 1 - drop_path


def drop_paths(module, rate):
    """Stochastic depth (fine-tuning, CAE): `drop_path` of a module's blocks, linearly from 0 in the first to `rate` in the last."""
    blocks = [part for part in module.modules() if hasattr(part, "drop_path")]  # in the order of the forward pass, those of ConvStem too
    for block, value in zip(blocks, torch.linspace(0, rate, len(blocks)).tolist()):
        block.drop_path = value


def recompute(block):
    """Trade time for memory: activations of this block are computed again in backward."""
    block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def init_weights(module):
    """MAE's initialisation, for `Module.apply`: xavier-uniform linear layers without bias, LayerNorm 1 / 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)  # qkv as one (3 D, D) matrix
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


# --------------------------------------------------------------------------------------------------------------------
# Encoder and decoder
# --------------------------------------------------------------------------------------------------------------------
class PatchEmbed(nn.Module):
    """(B, C, H, W) -> (B, L, D): one linear map per patch, kept as a convolution for timm's names."""

    def __init__(self, patch_size, channels, width):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.view(width, -1))  # as a linear layer; its bias keeps the convolution's default

    def forward(self, images):
        return rearrange(self.proj(images), "b d h w -> b (h w) d")


def conv_embed(channels, width, k):
    """A patch embedding of MCMAE: non-overlapping k x k convolution, LayerNorm over channels, GELU. (B, C, h, w) -> (B, width, h / k, w / k)."""
    return nn.Sequential(OrderedDict(proj=nn.Conv2d(channels, width, kernel_size=k, stride=k), norm=LayerNorm2d(width, eps=1e-5), gelu=nn.GELU()))


class ConvBlock(nn.Module):
    """A masked convolution block of MCMAE: a 5 x 5 depthwise convolution between two 1 x 1 ones where a transformer has attention, then an MLP
    of 1 x 1 convolutions. `drop_path` as in Block."""

    def __init__(self, dim, mlp_ratio):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = LayerNorm2d(dim, eps=1e-5)  # not the transformer's 1e-6
        self.conv1 = nn.Conv2d(dim, dim, 1)
        self.attn = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)  # MCMAE's name; no attention
        self.conv2 = nn.Conv2d(dim, dim, 1)
        self.norm2 = LayerNorm2d(dim, eps=1e-5)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Conv2d(dim, hidden, 1), gelu=nn.GELU(), fc2=nn.Conv2d(hidden, dim, 1)))
        self.drop_path = 0.0

    def forward(self, x, keep=None):
        """x (B, width, h, w); keep (B, 1, h, w), False where hidden, or None: nothing is -> (B, width, h, w)."""
        y = self.conv1(self.norm1(x))
        if keep is not None:
            y = y * keep  # just before the one operation that mixes places, so that no hidden one reaches a visible one
        x = x + stochastic_depth(self.conv2(self.attn(y)), self.drop_path, "row", self.training)
        return x + stochastic_depth(self.mlp(self.norm2(x)), self.drop_path, "row", self.training)


class ConvStem(nn.Module):
    """The convolution stages of MCMAE (MR-MAE Sec. 3.3), with strides 4, 2 and 2 in place of the patch embedding:

        images (B, C, H, W) -- embed1 (stride 4), blocks1 --> stage 1 (B, w1, H/4, W/4)
            -- embed2 (stride 2), blocks2 --> stage 2 (B, w2, H/8, W/8) -- embed3 (stride 2), proj --> (B, L, D), L = H/16 W/16
    """

    def __init__(self, channels, width, widths, depths, mlp_ratios):
        super().__init__()
        self.embed1, self.embed2, self.embed3 = conv_embed(channels, widths[0], 4), conv_embed(widths[0], widths[1], 2), conv_embed(widths[1], width, 2)
        self.blocks1, self.blocks2 = (nn.ModuleList(ConvBlock(w, ratio) for _ in range(depth)) for w, depth, ratio in zip(widths, depths, mlp_ratios))
        self.proj = nn.Linear(width, width)  # MCMAE's patch_embed4
        nn.init.xavier_uniform_(self.embed3.proj.weight.view(width, -1))  # as MCMAE's code; its other convolutions keep PyTorch's default
        self.to(memory_format=torch.channels_last)  # as LayerNorm2d's output is

    def forward(self, images, hidden=None, stages=None):
        """hidden (B, L) bool: patches whose pixels must not reach the others; stages: a list that receives the maps of stages 1 and 2."""
        x = images
        for embed, blocks, k in ((self.embed1, self.blocks1, 4), (self.embed2, self.blocks2, 2)):  # k x k places of the stage lie in a patch
            x, keep = embed(x), None
            if hidden is not None:
                keep = repeat(~hidden, "b (h w) -> b 1 (h k1) (w k2)", h=images.shape[-2] // 16, k1=k, k2=k)
            for block in blocks:
                x = block(x, keep)
            if stages is not None:
                stages.append(x)
        return self.proj(rearrange(self.embed3(x), "b d h w -> b (h w) d"))


class ViT(nn.Module):
    """A Vision Transformer encoder with fixed sine-cosine positions.

    image_size: (H, W) in pixels; class_token: with a CLS token, or without, as in MCMAE; stem: None (a plain ViT), or the widths, depths and
    mlp_ratios of ConvStem in a dict. `config` holds all arguments: `ViT(**config)` builds the same shape again.
    """

    def __init__(self, image_size, patch_size, width, depth, heads, channels=3, mlp_ratio=4.0, layer_scale=None, class_token=True, stem=None):
        super().__init__()
        if any(s < patch_size or s % patch_size for s in image_size):
            raise UserError(f"image size {image_size[0]} x {image_size[1]} is not a multiple of the patch size {patch_size}"
                            f"{' (the strides 4 x 2 x 2 of the convolution stem)' if stem else ''}")
        self.config = dict(image_size=list(image_size), patch_size=patch_size, width=width, depth=depth, heads=heads,
                           channels=channels, mlp_ratio=mlp_ratio, layer_scale=layer_scale, class_token=class_token, stem=stem)
        self.width, self.patch_size = width, patch_size
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)  # (h, w)
        self.num_patches = self.grid[0] * self.grid[1]  # L
        self.first = int(class_token)  # where the patches begin among the tokens
        self.patch_embed = ConvStem(channels, width, **stem) if stem else PatchEmbed(patch_size, channels, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02)) if class_token else None
        self.pos_embed = nn.Parameter(sincos_positions(width, self.grid, self.first), requires_grad=False)  # (1, 1 + L, D); without CLS (1, L, D)
        self.resize = resize_positions  # for another image size; DINO has a rule of its own
        self.norm_pre = nn.Identity()  # CLIP has one
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(init_weights)

    def embed(self, images, hidden=None, stages=None):
        """(B, C, H, W) -> patch tokens with positions (B, L, D). Another image size than the built one resizes the table.

        hidden, stages: for the convolution stem, see there; a plain patch embedding mixes no patches.
        """
        x = self.patch_embed(images, hidden, stages) if self.config["stem"] else self.patch_embed(images)  # (B, L, D)
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        return x + self.resize(self.pos_embed, self.grid, grid)[:, self.first :]

    def put_cls(self, x):
        """(B, V, D) -> what the first block sees: CLS first (B, 1 + V, D), if there is one."""
        if self.cls_token is not None:
            cls = self.cls_token + self.pos_embed[:, :1]  # (1, 1, D)
            x = torch.cat([cls.expand(len(x), -1, -1), x], dim=1)
        return self.norm_pre(x)

    def encode_raw(self, x, taps=None):
        """Embedded patches (B, V, D) -> the last block's output (B, 1 + V, D), CLS first; without CLS (B, V, D), here and below.

        taps: a dict whose keys are block numbers (from 1); it receives their raw outputs (B, 1 + V, D).
        """
        x = self.put_cls(x)
        for number, block in enumerate(self.blocks, start=1):
            x = block(x)
            if taps is not None and number in taps:
                taps[number] = x
        return x

    def encode(self, x, taps=None):
        """The same, after the final norm."""
        return self.norm(self.encode_raw(x, taps))

    def features(self, images, hidden=None, taps=None, attention=False):
        """What probes, teachers and pictures read.

        images (B, C, H, W) normalised; hidden (B, L) bool or None; taps: block numbers from 1 (whole images only).
        Returns {"cls": (B, 1, D), or None if there is none, "patches": (B, V, D), both after the final norm, "taps": [(B, D, h, w)] raw
        block outputs, "attention": (B, H, N, N), the softmax of the last block, if asked for}.
        """
        x = self.embed(images, hidden)  # (B, L, D)
        if hidden is not None:
            x = take(x, visible_ids(hidden))  # (B, V, D)
        last, tapped = self.blocks[-1].attn, dict.fromkeys(taps or ())
        last.record = attention
        x = self.encode(x, tapped)
        last.record = False
        first, h = self.first, images.shape[-2] // self.patch_size
        out = {"cls": x[:, :1] if first else None, "patches": x[:, first:],
               "taps": [rearrange(t[:, first:], "b (h w) d -> b d h w", h=h) for t in (tapped[number] for number in taps or ())]}
        if attention:
            out["attention"], last.recorded = last.recorded[1], None
        return out


@torch.no_grad()
def cls_attention(encoder, images):
    """Where CLS looks (MixedAE Fig. 5): attention of the last block, mean over heads, CLS as the query and the patches as keys.

    images (B, C, H, W) normalised -> (B, h, w); the CLS key is dropped, so each map is divided by its sum.
    """
    attention = encoder.features(images, attention=True)["attention"]  # (B, H, N, N)
    patches = attention.float().mean(dim=1)[:, 0, 1:]  # (B, L)
    return rearrange(patches / patches.sum(dim=1, keepdim=True), "b (h w) -> b h w", h=images.shape[-2] // encoder.patch_size)


class Decoder(nn.Module):
    """The transformer decoder of the MAE family. Where [MASK] tokens go is the method's business:

        latent (B, 1 + V, D) -- embed --> (B, 1 + V, Dd) -- the method inserts mask_token --> (B, 1 + L, Dd) -- forward --> (B, L, P)

    For an encoder without CLS there is none here either.
    """

    def __init__(self, encoder, width, depth, heads, mlp_ratio=4.0):
        super().__init__()
        self.first = encoder.first  # where the patches begin among the tokens
        self.embed = nn.Linear(encoder.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
        self.pos_embed = nn.Parameter(sincos_positions(width, encoder.grid, self.first), requires_grad=False)  # (1, 1 + L, Dd); without CLS (1, L, Dd)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pred = nn.Linear(width, encoder.config["channels"] * encoder.patch_size**2)  # P
        self.apply(init_weights)

    def features(self, x):
        """The full sequence, embedded, [MASK] inserted (B, 1 + L, Dd) -> patch tokens after the last norm (B, L, Dd)."""
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, self.first :]

    def forward(self, x):
        """The same -> predicted patches (B, L, P)."""
        return self.pred(self.features(x))


def build_encoder(args, **options):
    """The encoder that the size flags describe; `options` are further arguments of ViT."""
    return ViT(args.image_size, args.patch_size, args.width, args.depth, args.heads, **options)


def build_decoder(args, encoder, **options):
    """The decoder that the size flags describe, for this encoder; `options` are further arguments of Decoder."""
    if args.decoder_depth < 1:
        raise UserError(f"--decoder-depth {args.decoder_depth}: this decoder needs at least 1 block, or no hidden patch sees another")
    return Decoder(encoder, args.decoder_width, args.decoder_depth, args.decoder_heads, **options)


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------
def load_file(path, allowed=()):
    """A file of tensors, numbers, strings, lists and dicts, on the CPU. Nothing is ever unpickled freely.

    allowed: further classes that may lie in it, each as (the class to make in its place, the name that the file has for it).
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *allowed]):  # published files hold their flags; a Namespace does nothing
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give a file in it") from None
    except pickle.UnpicklingError as error:
        if "persistent_load" in str(error):
            raise UserError(f"{path}: a whole module as torch before 1.6 wrote it, which only free unpickling opens. If you trust it, convert it once, where "
                            f"nothing is at risk: torch.save(torch.load(FILE, weights_only=False).state_dict(), NEW)") from None
        reason = re.search(r"Unsupported global: GLOBAL (\S+)|Trying to load unsupported GLOBAL (\S+)", str(error))
        found = f" ({reason.group(1) or reason.group(2)})" if reason else ""
        raise UserError(f"{path}: holds more than tensors and plain values{found}, so it is not opened; use a file of plain weights") from None
    except Exception as error:  # damaged files make torch raise all kinds
        reason = (str(error) or "it is empty").splitlines()[0][:90]
        raise UserError(f"{path}: cannot be read ({reason}); is it truncated? use another copy") from None


def rename(state_dict, pairs):
    """A state dict with names changed by (pattern, replacement) regular expressions; the first that matches decides.

    Values are passed through, so a dict of gradients maps the same way.
    """
    def new_name(name):
        return next((re.sub(old, new, name, count=1) for old, new in pairs if re.search(old, name)), name)

    return {new_name(name): value for name, value in state_dict.items()}


def strip_prefixes(weights):
    """Names without what wrappers put before them, as often as it is there."""
    prefixes = ("module.", "_orig_mod.", "backbone.", "encoder.", "model.")
    while (prefix := next((p for p in prefixes if weights and any(name.startswith(p) for name in weights)), None)) is not None:
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def read_shape(weights):
    """What the tensors of a square ViT, by our names, say of its shape -> arguments of `ViT` but for heads, which no tensor shows.

    Raises KeyError, ValueError, IndexError, TypeError or ZeroDivisionError where they are no ViT.
    """
    def layers(prefix):
        numbers = {int(name.removeprefix(prefix).split(".")[0]) for name in weights if name.startswith(prefix)}
        if numbers != set(range(len(numbers))) or not numbers:
            raise ValueError(f"{prefix} has gaps")
        return len(numbers)

    def mlp_ratio(block):
        return weights[f"{block}.mlp.fc1.weight"].shape[0] / weights[f"{block}.norm1.weight"].shape[0]

    stem, part = None, "patch_embed."
    if "patch_embed.embed1.proj.weight" in weights:
        stages = "patch_embed.blocks1.", "patch_embed.blocks2."
        stem = {"widths": [len(weights[f"{stage}0.norm1.weight"]) for stage in stages], "depths": [layers(stage) for stage in stages],
                "mlp_ratios": [mlp_ratio(f"{stage}0") for stage in stages]}
        part = "patch_embed.embed1."
    _, channels, patch_size, _ = weights[f"{part}proj.weight"].shape
    patch_size, class_token = 16 if stem else patch_size, not stem or "cls_token" in weights
    width, side = len(weights["blocks.0.norm1.weight"]), round((weights["pos_embed"].shape[1] - class_token) ** 0.5)
    if min(width, patch_size, side) < 1:
        raise ValueError
    return dict(image_size=[side * patch_size] * 2, patch_size=patch_size, width=width, depth=layers("blocks."), channels=channels, mlp_ratio=mlp_ratio("blocks.0"),
                layer_scale=1.0 if "blocks.0.ls1.gamma" in weights else None, class_token=class_token, stem=stem)


def fill(model, weights, shape, source):
    """Load weights by name into a model that has an `encoder` -> "the whole model" or "the encoder".

    If they have every tensor of the model, all are loaded, otherwise the encoder's alone. Each of those must be there and fit: else a
    UserError that begins with `source`. shape: what the file says of its encoder (width, heads, image_size ...), or {}. Position tables
    are resized to the model's grid.
    """
    own, config = model.state_dict(), model.encoder.config
    whole = all(name in weights and (weights[name].shape == value.shape or name.startswith("encoder.") or name.endswith("pos_embed")) for name, value in own.items())
    names = [name for name in own if whole or name.startswith("encoder.")]
    wrong = [f"{key} {shape[key]} (here {config[key]})" for key in ("width", "depth", "heads", "patch_size")
             if shape.get(key, config[key]) != config[key]]
    wrong += [f"no {name}" for name in names if name not in weights]
    wrong += [f"{name}, which is not here" for name in weights if name.startswith(("encoder.blocks.", "encoder.patch_embed.")) and name not in own]
    if not wrong:
        for name in (name for name in names if name.endswith("pos_embed")):
            side = math.isqrt(weights[name].shape[1] - model.encoder.first)  # files that say nothing of their shape are square
            grid = [s // config["patch_size"] for s in shape["image_size"]] if shape else (side, side)
            weights = {**weights, name: resize_positions(weights[name], grid, model.encoder.grid)}
        wrong = [f"{name} {tuple(weights[name].shape)} (here {tuple(own[name].shape)})" for name in names if weights[name].shape != own[name].shape]
    if wrong:
        raise UserError(f"{source}: does not fit this {type(model).__name__}: {', '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}")
    model.load_state_dict({**own, **{name: weights[name] for name in names}})
    return "the whole model" if whole else "the encoder"


def pack_encoder(encoder, method, feature, mean, std, state_dict=None):
    """What encoder.pt holds: how to build the encoder again, its weights, and how to use it.

    feature: "cls" or "mean", the token(s) a linear probe should read; mean, std: of the images it was trained on.
    """
    state_dict = {name: value.detach().cpu().clone() for name, value in (state_dict or encoder.state_dict()).items()}
    return {"config": {"kind": "vit", **encoder.config}, "state_dict": state_dict, "method": method, "feature": feature,
            "mean": list(mean), "std": list(std)}


def unpack_encoder(packed, source="encoder"):
    """`pack_encoder`'s dict -> (encoder in eval mode, info); info is the dict without the weights. A UserError begins with `source`."""
    try:
        encoder = ViT(**{key: value for key, value in packed["config"].items() if key != "kind"})
        encoder.load_state_dict(packed["state_dict"])
        info = {key: packed[key] for key in ("config", "method", "feature", "mean", "std")}
        if not len(info["mean"]) == len(info["std"]) == encoder.config["channels"] or not all(value > 0 for value in info["std"]):
            raise ValueError(f"mean {info['mean']}, std {info['std']}")
    except Exception as error:  # a damaged or foreign file makes them raise all kinds
        raise UserError(f"{source}: not a whole encoder.pt ({' '.join(str(error).split())[:150]})") from None
    return encoder.eval(), info


def load_encoder(path):
    """encoder.pt -> (encoder in eval mode, info with method, feature, mean, std and config). The one reader of that file."""
    packed = load_file(path)
    if not isinstance(packed, dict) or not {"config", "state_dict"} <= packed.keys():
        raise UserError(f"{path}: not an encoder.pt of this project (no 'config' and 'state_dict' in it)")
    return unpack_encoder(packed, path)
