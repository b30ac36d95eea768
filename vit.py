"""The Vision Transformer that every method here trains, and the few pieces that several methods share.

Reading order of the project: **vit** -> mrmae -> mixedae -> cae -> data -> train -> finetune.

The encoder has the parameter names and the numerics of timm's and MAE's ViT, so published weights load into it and its own
weights load into timm. One thing is new: the homologous TopK attention of MixedAE (Eq. 6), `Attention.topk`, which adds no
parameter and can be switched off after pre-training.

    images (B, C, H, W) -- PatchEmbed --> (B, L, D) + pos_embed -- keep the visible --> (B, V, D)
        -- CLS in front --> (B, N, D) -- blocks --> (B, N, D) -- norm --> tokens (B, N, D)

Letters, used in every file:
    B images            G = B r groups of images (MixedAE)     n = 1/r images in a group
    L patches           V visible, U hidden patches            N tokens that a block sees (patches + CLS)
    D width             H heads                                K keys that TopK keeps
    C channels          p patch size in pixels                 P = C p p values of a patch
    Dd decoder width    D_h = D / H, width of a head           (H and W are the image's height and width in (B, C, H, W))
MixedAE writes P for our p and P^2 C for our P; MR-MAE writes l_v, l_m, C for our V, U, D and p^2 for our P.
Batch first, tokens last but one, always. A `hidden` mask is True where a patch is hidden, always. Images need not be square.
"""
import argparse
import math
import pickle
import re

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import stochastic_depth


class UserError(ValueError):
    """A mistake that its maker can mend: the programs print its one line and exit with `code`, without a traceback."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


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
SIZE_FLAGS = ("width", "depth", "heads", "decoder_width", "decoder_depth", "decoder_heads")


def add_size_args(parser, encoder=True, decoder=True):
    """The flags that fix the shape of images and, if asked for, of encoder and decoder. `resolve_sizes` fills in what was not given."""
    group = parser.add_argument_group("model size (the defaults are a laptop's; ours)")
    group.add_argument("--image-size", type=int, nargs="+", default=[64], metavar="PIXELS", help="H, or H W; multiples of the patch")
    if not encoder:
        return
    group.add_argument("--patch-size", type=int, default=8, help="pixels; the papers use 16 at 224 pixels")
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
    """Make every size in `args` explicit, in place: image_size [H, W], and the six numbers of `--size` that were not given."""
    if len(args.image_size) > 2:
        raise UserError(f"--image-size takes one number or two (H W), not {len(args.image_size)}")
    args.image_size = [args.image_size[0], args.image_size[-1]]
    if not hasattr(args, "size"):  # no ViT
        return
    for flag, value in zip(SIZE_FLAGS, sizes[args.size]):
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    for flag in ("patch_size", *SIZE_FLAGS):
        least = 0 if flag == "decoder_depth" else 1
        if getattr(args, flag) < least:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least {least}")


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
def sincos_positions(dim, grid):
    """MAE's fixed 2-D sine-cosine table (1, 1 + L, dim) for grid (h, w); the CLS row is zero.

    The first half of the channels encodes the column, the second half the row. Each half is [sin | cos] of the coordinate
    times 10000^(-k / (dim / 4)), k = 0 .. dim/4 - 1, computed in float64.
    """
    if dim % 4:
        raise UserError(f"width {dim}: the sine-cosine position table needs a multiple of 4")
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))  # (dim / 4,)
    rows, columns = torch.meshgrid(*(torch.arange(s, dtype=torch.float64) for s in grid), indexing="ij")
    angles = [c.flatten().outer(frequencies) for c in (columns, rows)]  # two of (L, dim / 4)
    table = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)  # (L, dim)
    return F.pad(table, (0, 0, 1, 0)).unsqueeze(0).float()  # (1, 1 + L, dim)


def resize_positions(table, old_grid, new_grid):
    """(1, 1 + h w, D) for old_grid -> (1, 1 + h' w', D) for new_grid: bicubic by explicit size, the CLS row untouched."""
    if tuple(old_grid) == tuple(new_grid):
        return table
    cls, patches = table[:, :1], table[:, 1:]
    patches = rearrange(patches, "1 (h w) d -> 1 d h w", h=old_grid[0])
    patches = F.interpolate(patches.float(), size=tuple(new_grid), mode="bicubic", align_corners=False)
    return torch.cat([cls, rearrange(patches, "1 d h w -> 1 (h w) d").to(cls.dtype)], dim=1)


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

    def forward(self, x):  # (B, N, D)
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)  # (B, H, N, D / H) each
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
    """Two linear layers with the exact (erf) GELU between them."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):  # (B, N, D)
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch; CAE starts it at .1."""

    def __init__(self, dim, initial):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(initial)))

    def forward(self, x):  # (B, N, D)
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block. `recompute` = True trades time for memory: activations are computed again in backward.
    `drop_path` is the probability that a sample skips a branch in training (stochastic depth; fine-tuning and CAE set it)."""

    def __init__(self, dim, heads, mlp_ratio=4.0, layer_scale=None):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.recompute, self.drop_path = False, 0.0

    def residuals(self, x):  # (B, N, D)
        x = x + self.drop(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop(self.ls2(self.mlp(self.norm2(x))))

    def drop(self, branch):
        if not self.drop_path:
            return branch
        return stochastic_depth(branch, self.drop_path, "row", self.training)  # what stays is divided by 1 - drop_path

    def forward(self, x):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.residuals, x, use_reentrant=False)
        return self.residuals(x)


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


class ViT(nn.Module):
    """A plain Vision Transformer encoder with CLS token and fixed sine-cosine positions.

    image_size: (H, W) in pixels. `config` holds all arguments: `ViT(**config)` builds the same shape again.
    """

    def __init__(self, image_size, patch_size, width, depth, heads, channels=3, mlp_ratio=4.0, layer_scale=None):
        super().__init__()
        if any(s < patch_size or s % patch_size for s in image_size):
            raise UserError(f"image size {image_size[0]} x {image_size[1]} is not a multiple of the patch size {patch_size}")
        self.config = dict(image_size=list(image_size), patch_size=patch_size, width=width, depth=depth, heads=heads,
                           channels=channels, mlp_ratio=mlp_ratio, layer_scale=layer_scale)
        self.width, self.patch_size = width, patch_size
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)  # (h, w)
        self.num_patches = self.grid[0] * self.grid[1]  # L
        self.patch_embed = PatchEmbed(patch_size, channels, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
        self.pos_embed = nn.Parameter(sincos_positions(width, self.grid), requires_grad=False)  # (1, 1 + L, D)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(init_weights)

    def embed(self, images):
        """(B, C, H, W) -> patch tokens with positions (B, L, D). Another image size than the built one resizes the table."""
        x = self.patch_embed(images)  # (B, L, D)
        grid = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        return x + resize_positions(self.pos_embed, self.grid, grid)[:, 1:]

    def encode(self, x, taps=None):
        """Embedded patches (B, V, D) -> tokens after the final norm (B, 1 + V, D), CLS first.

        taps: a dict whose keys are block numbers (from 1); it receives their raw outputs (B, 1 + V, D).
        """
        cls = self.cls_token + self.pos_embed[:, :1]  # (1, 1, D)
        x = torch.cat([cls.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + V, D)
        for number, block in enumerate(self.blocks, start=1):
            x = block(x)
            if taps is not None and number in taps:
                taps[number] = x
        return self.norm(x)

    def features(self, images, hidden=None, taps=None, attention=False):
        """What probes, teachers and pictures read.

        images (B, C, H, W) normalised; hidden (B, L) bool or None; taps: block numbers from 1 (whole images only).
        Returns {"cls": (B, 1, D), "patches": (B, V, D), both after the final norm, "taps": [(B, D, h, w)] raw block outputs,
        "attention": (B, H, N, N), the softmax of the last block, if asked for}.
        """
        x = self.embed(images)  # (B, L, D)
        if hidden is not None:
            x = take(x, visible_ids(hidden))  # (B, V, D)
        last, tapped = self.blocks[-1].attn, dict.fromkeys(taps or ())
        last.record = attention
        x = self.encode(x, tapped)
        last.record = False
        h = images.shape[-2] // self.patch_size
        out = {"cls": x[:, :1], "patches": x[:, 1:], "taps": [rearrange(t[:, 1:], "b (h w) d -> b d h w", h=h) for t in tapped.values()]}
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
    """

    def __init__(self, grid, encoder_width, width, depth, heads, patch_values):
        super().__init__()
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
        self.pos_embed = nn.Parameter(sincos_positions(width, grid), requires_grad=False)  # (1, 1 + L, Dd)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pred = nn.Linear(width, patch_values)
        self.apply(init_weights)

    def forward(self, x):
        """The full sequence, embedded, [MASK] inserted (B, 1 + L, Dd) -> predicted patches (B, L, P)."""
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.pred(self.norm(x))[:, 1:]


def build_encoder(args, **options):
    """The encoder that the size flags describe; `options` are further arguments of ViT."""
    return ViT(args.image_size, args.patch_size, args.width, args.depth, args.heads, **options)


def build_decoder(args, encoder):
    """The decoder that the size flags describe, for this encoder."""
    if args.decoder_depth < 1:
        raise UserError(f"--decoder-depth {args.decoder_depth}: this decoder needs at least 1 block, or no hidden patch sees another")
    patch_values = encoder.config["channels"] * encoder.patch_size**2  # P
    return Decoder(encoder.grid, encoder.width, args.decoder_width, args.decoder_depth, args.decoder_heads, patch_values)


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
            raise UserError(f"{path}: a whole module as torch before 1.6 wrote it, which only free unpickling opens. If you trust it, convert it once, where nothing is "
                            f"at risk: torch.save(torch.load(FILE, weights_only=False).state_dict(), NEW)") from None
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
    if not wrong:
        for name in (name for name in names if name.endswith("pos_embed")):
            side = math.isqrt(weights[name].shape[1] - 1)  # files that say nothing of their shape are square
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


def unpack_encoder(packed):
    """`pack_encoder`'s dict -> (encoder in eval mode, info); info is the dict without the weights."""
    encoder = ViT(**{key: value for key, value in packed["config"].items() if key != "kind"})
    encoder.load_state_dict(packed["state_dict"])
    return encoder.eval(), {key: value for key, value in packed.items() if key != "state_dict"}


def load_encoder(path):
    """encoder.pt -> (encoder in eval mode, info with method, feature, mean, std and config). The one reader of that file."""
    packed = load_file(path)
    if not isinstance(packed, dict) or not {"config", "state_dict"} <= packed.keys():
        raise UserError(f"{path}: not an encoder.pt of this project (no 'config' and 'state_dict' in it)")
    return unpack_encoder(packed)
