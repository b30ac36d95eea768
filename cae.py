"""Context Autoencoder (CAE), Chen et al., "Context Autoencoder for Self-Supervised Representation Learning", arXiv 2202.03026, and its tokenizer.

Reading order of the project: vit -> mrmae -> mixedae -> **cae** -> data -> train -> finetune.

Predict the hidden patches Y_m of an image from the visible ones X_v -- not at once, but first their *representation* Z_m, in the space
that the encoder itself maps patches to. Appendix B factorises the task into three terms, and each is a module here (P_v, P_m: positions):

    P(Y_m | X_v, P_v, P_m) = P(Z_v | X_v, P_v)      P(Z_m | Z_v, P_v, P_m)       P(Y_m | Z_m, P_m)
                             encoder F              regressor H                  decoder G

    images (B, C, H, W) -- patch embedding + positions --> (B, L, D), of which a block-wise mask shows V and hides U patches
        the V -- F, self-attention --> visible Z_v (B, 1+V, D)
              -- H, cross-attention of U mask queries to [Z_v, Z_m] --> predicted Z_m (B, U, D')
              -- G, self-attention among the U --> Y_m: pixels (B, U, P), or logits (B, U, vocabulary) of a tokenizer's ids
        the U -- F again, no gradient --> target, the paper's Z_m with a bar (B, U, D')
    Eq. 1: L = l_y(Y_m, target pixels or ids) + lambda l_z(Z_m, sg[target])

F alone transfers, and is meant to do all the representing: H cannot change Z_v, and l_z keeps what H predicts in F's space. If it is
there, G must be able to rebuild an image straight from F, without H (Sec. 4, Fig. 3 and 10): the picture "H skipped", and its error in the log.

Letters are those of vit.py; F, G and H are the paper's three networks (in code `F` is torch.nn.functional); D' is the width of H and G.

Run it:  python train.py --method cae              (pixels as targets; the drawn set `shapes`, a laptop; README.md has times, losses, the paper's runs)
         python train.py --method dvae             (a tokenizer, and then its ids as targets:)
         python train.py --method cae --target dvae:runs/dvae/tokenizer.pt --out runs/cae-dvae

Where the paper is silent, the authors' code (https://github.com/Atten4Vis/CAE) decides:
    - F has a CLS token in both passes; it is left out of everything after (regressor, decoder, losses), so it learns only as a context
      for the patches. Layer scale of .1 (L: 1e-5), drop path also in the pass that makes the target, gradients clipped at 3.
    - Z_v and the target are taken after F's last LayerNorm, Z_m after H's. If D' differs from D, a linear layer and a LayerNorm map Z_v,
      and the target too, to D' (so in S and in our `micro`; B and L have D' = D).
    - In H, positions are added to queries and keys, not to values; queries, keys and values pass a LayerNorm each ("the keys and the
      values are the same" is loosely true); the MLP's residual branch starts from the *normalised* sum. Z_m gets its positions again, once,
      before G.
    - Block-wise masks hide exactly U patches: see `block_mask`. Their minimum of 16 patches a block, of 196, is scaled with the grid (ours).
    - Keys have a bias in F and G (ours, for timm's names; theirs have none: under softmax it changes nothing).
    - The tokenizer sees the same crop, resized to 8 pixels a patch. (Theirs: the same box, resized from the original by Lanczos.)
And where both are silent, it is ours:
    - Pixels as targets (Fig. 3, Table 9): each patch normalised as in MAE (plain pixels probe alike), and lambda = .2, which probes better
      than the paper's 2: that was tuned beside a cross-entropy, some ten times as large (CIFAR-10, README.md, Results).
    - No decoder (Table 2): a linear layer on Z_m, without positions. Position tables of new runs are in MAE's order; theirs are row-first.
    - The discrete VAE that the paper trains on ImageNet is not released. `DVAE` has the encoder that their code loads, and a decoder that
      mirrors it. From DALL-E (Ramesh et al., arXiv 2102.12092): Gumbel-softmax, its temperatures, cosine schedules. Ours: squared error,
      the weight of the KL term, the lengths of the schedules.
"""
import argparse
import math
import sys
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import stochastic_depth
from torchvision.transforms import v2
from tqdm import tqdm

from data import MEAN, STD, denormalize
from vit import (Block, LayerScale, Mlp, UserError, build_encoder, drop_paths, init_weights, load_file, norm_pix, pack_encoder, patchify, rename, sincos_positions, take,
                 undo_norm_pix, unpatchify, visible_ids)


SIZES = {  # width and depth of F (Sec. 5.1), its heads (CAE's code); width D', depth and heads of G, and so of H
    "micro": (128, 4, 4, 64, 2, 4),  # ours: for a laptop
    "tiny": (192, 12, 3, 192, 4, 3),  # ours
    "small": (384, 12, 12, 768, 4, 12),
    "base": (768, 12, 12, 768, 4, 12),
    "large": (1024, 24, 16, 1024, 4, 16),
    "huge": (1280, 32, 16, 1280, 4, 16),  # ours
}


# --------------------------------------------------------------------------------------------------------------------
# Sec. 3.2: block-wise masking
# --------------------------------------------------------------------------------------------------------------------
def block_mask(batch, grid, count, tries=400):
    """Block-wise masks (Sec. 3.2, Fig. 2), BEiT's as CAE's code draws them: bool (B, L), True = hidden, exactly `count` in each row.

    Random boxes are hidden one after the other. With R patches still to hide, a box has an area uniform between 16 patches (of 196; here
    that share of L) and R, and a log-uniform aspect ratio from .3 to 1 / .3; it is taken if it is smaller than the grid on both sides
    and hides at least one and at most R more. A mask that is not full after `tries` boxes is filled at random (ours: theirs goes on).

    Drawn on the CPU (.1 to .2 ms an image), while a card is still busy with the step before.
    """
    H, W = grid  # in patches
    smallest = max(1, round(16 / 196 * H * W))
    rows, columns = torch.arange(H).view(1, H, 1), torch.arange(W).view(1, 1, W)
    masks, todo = torch.zeros(batch, H, W, dtype=torch.bool), torch.arange(batch)  # todo: (b,), the masks that are not full
    for _ in range(tries):
        R = count - masks[todo].sum(dim=(1, 2))  # (b,)
        todo, R = todo[R > 0], R[R > 0].view(-1, 1, 1)
        if not len(todo):
            break
        for_area, for_aspect, for_top, for_left = torch.rand(4, len(todo), 1, 1)  # uniform in [0, 1), (b, 1, 1) each
        area, aspect = smallest + (R - smallest) * for_area, 0.3 ** (2 * for_aspect - 1)
        h, w = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        top, left = (for_top * (H - h + 1)).floor(), (for_left * (W - w + 1)).floor()
        box = (rows >= top) & (rows < top + h) & (columns >= left) & (columns < left + w)  # (b, H, W)
        more = (box & ~masks[todo]).sum(dim=(1, 2), keepdim=True)
        masks[todo] |= box & (h < H) & (w < W) & (more > 0) & (more <= R)
    masks = masks.flatten(1)
    order = (torch.rand(masks.shape) - masks.float()).argsort(dim=1)  # the hidden ones first, then the others at random
    return torch.zeros_like(masks).scatter(1, order[:, :count], True)


# --------------------------------------------------------------------------------------------------------------------
# Sec. 3.1: latent contextual regressor and decoder. The encoder is the ViT of vit.py.
# --------------------------------------------------------------------------------------------------------------------
class CrossAttention(nn.Module):
    """Multi-head attention of queries to keys and values of their own; keys without bias."""

    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise UserError(f"--decoder-width {dim} is not a multiple of --decoder-heads {heads}")
        self.heads = heads
        self.q, self.k, self.v, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, q, k, v):
        """q (B, U, D'), k and v (B, V + U, D') -> (B, U, D')."""
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.q(q), self.k(k), self.v(v)))  # (B, H, U or V + U, D' / H)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """A block of the regressor (Sec. 3.1): queries Z_m, keys and values [Z_v, Z_m]. Z_v is read, never changed.

    Positions are added to queries and keys, not to values, and the MLP's branch starts from the normalised sum (CAE's code).
    `drop_path` as in vit.Block.
    """

    def __init__(self, dim, heads, layer_scale):
        super().__init__()
        self.norm_q, self.norm_k, self.norm_v, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(4))
        self.attn, self.mlp = CrossAttention(dim, heads), Mlp(dim, 4 * dim)
        self.ls1, self.ls2 = LayerScale(dim, layer_scale), LayerScale(dim, layer_scale)
        self.drop_path = 0.0

    def forward(self, x, visible, pos_x, pos_visible):
        """Z_m so far (B, U, D'), Z_v (B, V, D'), their positions P_m and P_v -> the next Z_m."""
        def drop(branch):
            return stochastic_depth(branch, self.drop_path, "row", self.training)

        both, pos = torch.cat([visible, x], dim=1), torch.cat([pos_visible, pos_x], dim=1)  # [Z_v, Z_m], [P_v, P_m], (B, V + U, D')
        x = x + drop(self.ls1(self.attn(self.norm_q(x + pos_x), self.norm_k(both + pos), self.norm_v(both))))
        x = self.norm2(x)
        return x + drop(self.ls2(self.mlp(x)))


class Regressor(nn.Module):
    """H: Z_v (B, V, D') and positions -> Z_m (B, U, D')."""

    def __init__(self, width, depth, heads, layer_scale):
        super().__init__()
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))  # the mask query, the same for all hidden patches
        self.blocks = nn.ModuleList(CrossBlock(width, heads, layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, visible, pos_visible, pos_hidden):
        x = self.mask_token.to(visible.dtype).expand_as(pos_hidden)  # Q_m, (B, U, D')
        for block in self.blocks:
            x = block(x, visible, pos_hidden, pos_visible)
        return self.norm(x)


class Decoder(nn.Module):
    """G (Sec. 3.1): Z_m and P_m, each (B, U, D') -> Y_m (B, U, outputs). Without blocks a linear layer on Z_m (Table 2)."""

    def __init__(self, width, depth, heads, layer_scale, outputs):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, layer_scale=layer_scale) for _ in range(depth))
        if depth:
            self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, outputs)

    def forward(self, z, pos):
        if not self.blocks:
            return self.head(z)
        x = z + pos
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# --------------------------------------------------------------------------------------------------------------------
# Eq. 1
# --------------------------------------------------------------------------------------------------------------------
def alignment_loss(predicted, target):
    """l_z of Eq. 1: mean-squared error of Z_m and the target, both (B, U, D') -> ()."""
    return (predicted.float() - target.detach().float()).square().mean()  # sg[]; `predict` builds no graph for it either, to save memory


def decoding_loss(decoded, goal):
    """l_y of Eq. 1 -> (): the paper's cross-entropy of logits (B, U, vocabulary) to ids (B, U), or for pixels (B, U, P), of which the
    paper does not say it, the mean-squared error."""
    if goal.is_floating_point():  # pixels
        return (decoded.float() - goal).square().mean()
    return F.cross_entropy(decoded.float().flatten(0, 1), goal.flatten())


def hidden_of(values, ids):
    """Values (B, L) or (B, L, n) at the hidden patches (B, U) -> (B, U) or (B, U, n)."""
    return values.gather(1, ids) if values.ndim == 2 else take(values, ids)


def check_args(args, patches, regressor_depth):
    """A UserError for flags that cannot work. Comparisons are written so that NaN is refused too."""
    if not 0 < args.mask_ratio < 1 or not 0 < round(args.mask_ratio * patches) < patches:
        raise UserError(f"--mask-ratio {args.mask_ratio}: of {patches} patches at least 1 must stay visible and at least 1 be hidden")
    if args.align_weight is not None and not 0 <= args.align_weight < math.inf:
        raise UserError(f"--align-weight {args.align_weight}: must be at least 0")
    if not 0 < args.layer_scale < math.inf:
        raise UserError(f"--layer-scale {args.layer_scale}: must be above 0")
    if not 0 <= args.drop_path < 1:
        raise UserError(f"--drop-path {args.drop_path}: must be at least 0 and below 1")
    if regressor_depth < 1:
        raise UserError(f"--regressor-depth must be at least 1, nothing else can predict hidden patches (Sec. 5.3); it is {regressor_depth}"
                        f"{', as --decoder-depth: give --regressor-depth 4' if args.regressor_depth is None else ''}")
    if args.vocabulary is not None and (args.vocabulary < 2 or args.target != "rgb"):
        raise UserError(f"--vocabulary {args.vocabulary}: at least 2, and only without a tokenizer (--target {args.target} brings its own)")


class CAE(nn.Module):
    """Fig. 1. H and G have the width D' (--decoder-width) and the same heads. Tokenizers stand below, in the next part of the file."""

    sizes = SIZES

    @staticmethod
    def add_args(parser):
        add = parser.add_argument_group("CAE").add_argument
        add("--mask-ratio", type=float, default=0.5, help="share of the patches that is hidden (Sec. 3.2: 98 of 196; Table 5)")
        add("--target", default="rgb", metavar="rgb | dvae:FILE | dalle:FILE", help="pixels, the ids of a tokenizer.pt of --method dvae, or of OpenAI's encoder.pkl (Table 9)")
        add("--norm-pix", action=argparse.BooleanOptionalAction, default=True, help="rgb: each patch normalised, as in MAE (ours: the paper does not say)")
        add("--align-weight", type=float, help="lambda of Eq. 1; 0: no alignment (Table 2) [2 for ids (Sec. 3.2); .2 for pixels (ours: README, Results)]")
        add("--regressor-depth", type=int, help="blocks of the regressor [as --decoder-depth; Sec. 5.1, Table 6: 4]. --decoder-depth 0: a linear layer (Table 2)")
        add("--vocabulary", type=int, help="for callers of forward(images, mask, ids) alone, without a tokenizer; its file says its own")
        add("--layer-scale", type=float, default=0.1, help="initial factor of every residual branch (CAE's code; L: 1e-5)")
        add("--drop-path", type=float, default=0.1, help="stochastic depth of the last block of each part, rising linearly from 0 (Appendix A)")
        add("--rescaled-init", action="store_true", help="BEiT's initialisation (CAE's code, for L alone)")
        parser.set_defaults(beta2=0.999, clip_grad=3.0, min_lr=1e-5, crop_scale=[0.08, 1.0])  # CAE's code
        parser.set_defaults(epochs=2)  # ours: a laptop's two minutes

    def __init__(self, args):
        super().__init__()
        self.encoder = encoder = build_encoder(args, layer_scale=args.layer_scale)
        L, D, width, heads = encoder.num_patches, encoder.width, args.decoder_width, args.decoder_heads
        regressor_depth = args.decoder_depth if args.regressor_depth is None else args.regressor_depth
        check_args(args, L, regressor_depth)
        self.num_hidden = round(args.mask_ratio * L)  # U
        self.norm_pix = args.norm_pix
        # nn.Module's own __setattr__ would make the tokenizer a part of what is trained, saved and synchronised.
        object.__setattr__(self, "tokenizer", open_tokenizer(args.target))
        self.vocabulary = self.tokenizer.vocabulary if self.tokenizer else args.vocabulary  # None: pixels
        self.align_weight = (2.0 if self.vocabulary else 0.2) if args.align_weight is None else args.align_weight  # lambda of Eq. 1

        self.project = nn.Sequential(nn.Linear(D, width), nn.LayerNorm(width, eps=1e-6)) if width != D else nn.Identity()
        self.pos_embed = nn.Parameter(sincos_positions(width, encoder.grid), requires_grad=False)  # (1, 1 + L, D'), for H and G
        self.regressor = Regressor(width, regressor_depth, heads, args.layer_scale)
        self.decoder = Decoder(width, args.decoder_depth, heads, args.layer_scale, self.vocabulary or encoder.config["channels"] * encoder.patch_size**2)
        self.initialise(args.rescaled_init)
        for part in (encoder, self.regressor, self.decoder):
            drop_paths(part, args.drop_path)
        self.output = "logits" if self.vocabulary else "pixels"
        self.panels = ["image", "visible patches"]
        if not self.vocabulary:
            true = "\n(true mean, std)" if self.norm_pix else ""
            self.panels += [f"reconstruction{true}", f"H skipped{true}"]

    def initialise(self, rescaled):
        """CAE's code: xavier-uniform, tokens and patch embedding a normal of .02 cut at one deviation; `rescaled`: all matrices so, and
        what leaves a branch of block i divided by sqrt(2 i)."""
        normals = [self.encoder.cls_token, self.encoder.patch_embed.proj.weight, self.regressor.mask_token]
        self.apply(init_weights)
        if rescaled:
            normals += [module.weight for module in self.modules() if isinstance(module, nn.Linear)]
        nn.init.zeros_(self.encoder.patch_embed.proj.bias)
        for parameter in normals:
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.02, b=0.02)
        if rescaled:
            for part in (self.encoder, self.regressor, self.decoder):
                for i, block in enumerate(part.blocks, start=1):
                    for layer in (block.attn.proj, block.mlp.fc2):
                        layer.weight.data.div_(math.sqrt(2 * i))

    def predict(self, images, mask=None):
        """Every tensor of Fig. 1. images (B, C, H, W) normalised; mask (B, L) bool, True = hidden, or None to draw one.

        Returns visible (B, 1+V, D), Z_v after F's last LayerNorm, CLS first; predicted (B, U, D'), Z_m; pixels (B, U, P) or logits (B, U,
        vocabulary), Y_m; mask (B, L) and hidden_ids (B, U), where it is True; and target (B, U, D'), Z_m with a bar, but in training only if lambda > 0.
        (What the paper calls targets, Y_m with a bar, is `goal`.)
        """
        encoder = self.encoder
        if list(images.shape[-2:]) != encoder.config["image_size"]:
            raise ValueError(f"images of {tuple(images.shape[-2:])} pixels for a model of {encoder.config['image_size']}")
        if mask is None:
            mask = block_mask(len(images), encoder.grid, self.num_hidden)  # on the CPU, and so are the ids, until the next line but one
        elif mask.dtype != torch.bool or mask.shape != (len(images), encoder.num_patches) or not 0 < mask[0].sum() < encoder.num_patches:
            raise ValueError(f"mask must be bool, {len(images), encoder.num_patches}, with visible and hidden patches; it is {mask.dtype}, {tuple(mask.shape)}")
        seen, hidden_ids = visible_ids(mask), visible_ids(~mask)  # (B, V), (B, U), in raster order
        mask, seen, hidden_ids = (x.to(images.device, non_blocking=True) for x in (mask, seen, hidden_ids))
        x = encoder.embed(images)  # (B, L, D)
        pos = self.pos_embed[:, 1:].expand(len(images), -1, -1)  # (B, L, D')
        pos_hidden = take(pos, hidden_ids)

        visible = encoder.encode(take(x, seen))  # F: P(Z_v | X_v, P_v), (B, 1+V, D)
        predicted = self.regressor(self.project(visible[:, 1:]), take(pos, seen), pos_hidden)  # H: P(Z_m | Z_v, P_v, P_m), (B, U, D')
        decoded = self.decoder(predicted, pos_hidden)  # G: P(Y_m | Z_m, P_m)
        out = {"visible": visible, "predicted": predicted, self.output: decoded, "mask": mask, "hidden_ids": hidden_ids}
        if self.align_weight or not self.training:
            with torch.no_grad():
                out["target"] = self.project(encoder.encode(take(x, hidden_ids))[:, 1:])  # the same weights, on the hidden patches alone
        return out

    def goal(self, images):
        """The targets of Sec. 3.2, of every patch: pixels (B, L, P), or the tokenizer's ids (B, L)."""
        if not self.vocabulary:
            patches = patchify(images, self.encoder.patch_size)
            return norm_pix(patches) if self.norm_pix else patches
        if not self.tokenizer:
            raise UserError(f"--vocabulary {self.vocabulary}: nothing gives ids to train on; use --target dvae:FILE or dalle:FILE, or leave --vocabulary out")
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            size = [8 * side for side in self.encoder.grid]  # a tokenizer gives one id for 8 x 8 pixels: so one a patch
            x = v2.functional.resize(denormalize(images).clamp(0, 1), size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
            return self.tokenizer.to(images.device).ids(x).flatten(1)

    def forward(self, images, mask=None, ids=None):
        """images (B, C, H, W), ids (B, U) of the hidden patches, or None to ask the tokenizer -> loss (), {"recon" or "tokens": (), "align": ()}."""
        out = self.predict(images, mask)
        goal = hidden_of(self.goal(images), out["hidden_ids"]) if ids is None else ids
        loss = decoding_loss(out[self.output], goal)  # l_y of Eq. 1
        metrics = {"tokens" if self.vocabulary else "recon": loss.detach()}
        if self.align_weight:
            align = alignment_loss(out["predicted"], out["target"])  # l_z
            loss = loss + self.align_weight * align  # Eq. 1: l_y + lambda l_z
            metrics["align"] = align.detach()
        return loss, metrics

    def skip_regressor(self, images):
        """Fig. 10: all patches through F, then G, without H -> decoded (B, L, P or vocabulary)."""
        z = self.encoder.encode(self.encoder.embed(images))[:, 1:]  # (B, L, D)
        return self.decoder(self.project(z), self.pos_embed[:, 1:])

    @torch.no_grad()
    def visualize(self, images):
        """images (B, C, H, W) -> pictures (B, panels, 3, H, W) in [0, 1], {"through_H": l_y, "skipped": l_y of the same patches with H skipped}.

        The panels: image, visible patches (Fig. 2), and for pixels the reconstruction and that of Fig. 3, of all patches with H
        skipped. With norm_pix they borrow each patch's true mean and standard deviation: their colours are not predicted.
        """
        p, grid = self.encoder.patch_size, self.encoder.grid
        out, patches = self.predict(images), patchify(images, p)  # (B, L, P)
        hidden = out["mask"].unsqueeze(-1)  # (B, L, 1)
        skipped, panels, ids = self.skip_regressor(images), [patches, patches.masked_fill(hidden, 0)], out["hidden_ids"]
        goal = hidden_of(self.goal(images), ids)
        numbers = {"through_H": decoding_loss(out[self.output], goal).item(), "skipped": decoding_loss(hidden_of(skipped, ids), goal).item()}
        if not self.vocabulary:
            decoded = torch.zeros_like(patches).masked_scatter(hidden, out["pixels"].float())
            decoded, skipped = (undo_norm_pix(x.float(), patches) if self.norm_pix else x.float() for x in (decoded, skipped))
            panels += [torch.where(hidden, decoded, patches), skipped]
        return torch.stack([denormalize(unpatchify(x, grid, p)).clamp(0, 1) for x in panels], dim=1), numbers

    def export(self):
        """What encoder.pt holds: a plain ViT with layer scale. CAE's authors probe its CLS token."""
        return pack_encoder(self.encoder, "cae", "cls", MEAN, STD)


# --------------------------------------------------------------------------------------------------------------------
# Sec. 3.2: targets. A tokenizer has `vocabulary` and ids(images (B, 3, h, w) in [0, 1]) -> (B, h / 8, w / 8), 0 .. vocabulary - 1.
# --------------------------------------------------------------------------------------------------------------------
class Residual(nn.Module):
    """x + convolutions(x)."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, x):
        return x + self.layers(x)


def perplexity(ids, vocabulary):
    """exp of the entropy of how often each id occurs -> (), from 1 (one id alone) to the vocabulary (all alike)."""
    p = torch.bincount(ids.flatten(), minlength=vocabulary) / ids.numel()
    return torch.special.entr(p).sum().exp()


class DVAE(nn.Module):
    """The discrete VAE: --method dvae. One id of a vocabulary for each 8 x 8 pixels, and an image again from the ids.

    images (B, 3, H, W) -- convolutions, three of stride 2 --> logits (B, K, h, w), h = H / 8 -- relaxed draw (Gumbel-softmax) --> weights
    of the K code vectors --> (B, E, h, w) -- the same backwards --> images. Loss: squared error + beta KL(q || uniform).
    """

    export_file = "tokenizer.pt"
    panels = ["image", "from its ids"]

    @staticmethod
    def add_args(parser):
        add = parser.add_argument_group("discrete VAE").add_argument
        add("--vocabulary", type=int, default=256, help="K, how many tokens there are (ours; CAE and DALL-E: 8192)")
        add("--channels", type=int, default=32, help="E, width of the convolutions and of the code vectors (ours; CAE's code: 256)")
        add("--residual-blocks", type=int, default=2, help="on each side (CAE's code)")
        add("--temperature", type=float, nargs=2, default=[1.0, 0.0625], metavar=("FIRST", "LAST"), help="of the Gumbel-softmax (DALL-E)")
        add("--anneal", type=float, default=0.5, help="share of the run in which the temperature falls, by a cosine (ours)")
        add("--kl-weight", type=float, default=1e-3, help="beta (ours: both losses are means here)")
        add("--kl-warmup", type=float, default=0.1, help="share of the run in which beta rises from 0, by a cosine (ours)")
        parser.set_defaults(epochs=2)  # a laptop's minute and a half

    def __init__(self, args):
        super().__init__()
        K, E = args.vocabulary, args.channels
        if K < 2 or E < 1 or args.residual_blocks < 0:
            raise UserError(f"--vocabulary {K} (at least 2), --channels {E} (at least 1) or --residual-blocks {args.residual_blocks} (at least 0) is too small")
        if not all(0 < t < math.inf for t in args.temperature) or not 0 <= args.kl_weight < math.inf or not (0 < args.anneal <= 1 and 0 < args.kl_warmup <= 1):
            raise UserError("--temperature must be above 0, --kl-weight at least 0, --anneal and --kl-warmup above 0 and at most 1")
        if any(side % 8 for side in args.image_size):
            raise UserError(f"--image-size {' '.join(map(str, args.image_size))}: the tokenizer needs multiples of 8 pixels")
        self.config = {"vocabulary": K, "channels": E, "residual_blocks": args.residual_blocks}
        self.vocabulary, self.temperature, self.anneal = K, args.temperature, args.anneal
        self.kl_weight, self.kl_warmup = args.kl_weight, args.kl_warmup
        self.progress = 0.0  # share of the run that is done; the loop sets it before each step
        blocks = args.residual_blocks
        self.encoder_layers = nn.Sequential(
            *(layer for i in range(3) for layer in (nn.Conv2d(E if i else 3, E, 4, stride=2, padding=1), nn.ReLU())),
            *(Residual(E) for _ in range(blocks)), nn.Conv2d(E, K, 1))
        self.codes = nn.Embedding(K, E)
        self.decoder_layers = nn.Sequential(
            *(Residual(E) for _ in range(blocks)),
            *(layer for _ in range(3) for layer in (nn.ConvTranspose2d(E, E, 4, stride=2, padding=1), nn.ReLU())), nn.Conv2d(E, 3, 1))

    def logits(self, images):
        """images in [0, 1] -> (B, K, h, w)."""
        return self.encoder_layers(2 * images - 1).float()  # CAE's code: mean and deviation .5

    def decode(self, weights):
        """Weights of the code vectors (B, K, h, w) -> images in [0, 1], (B, 3, H, W)."""
        return (self.decoder_layers(torch.einsum("bkhw, ke -> behw", weights, self.codes.weight)) + 1) / 2

    @torch.no_grad()
    def ids(self, images):
        return self.logits(images).argmax(dim=1)

    def forward(self, images):
        """images (B, 3, H, W) normalised -> loss (), {"recon", "kl", "perplexity": exp of the entropy of the batch's ids, 1 to K}."""
        images = denormalize(images)
        first, last = self.temperature
        tau = last + (first - last) * 0.5 * (1 + math.cos(math.pi * min(1, self.progress / self.anneal)))
        beta = self.kl_weight * 0.5 * (1 - math.cos(math.pi * min(1, self.progress / self.kl_warmup)))
        logits = self.logits(images)  # of q(id | image), (B, K, h, w)
        recon = (self.decode(F.gumbel_softmax(logits, tau, dim=1)).float() - images).square().mean()
        log_q = logits.log_softmax(dim=1)
        kl = (log_q.exp() * (log_q + math.log(self.vocabulary))).sum(dim=1).mean()  # KL(q || uniform), a mean over the places
        return recon + beta * kl, {"recon": recon.detach(), "kl": kl.detach(), "perplexity": perplexity(logits.argmax(dim=1), self.vocabulary)}

    @torch.no_grad()
    def visualize(self, images):
        """images (B, 3, H, W) -> pictures (B, 2, 3, H, W) in [0, 1], {"used": share of the vocabulary that these images use}."""
        images = denormalize(images)
        ids = self.ids(images)  # (B, h, w)
        if perplexity(ids, self.vocabulary) < 1.5:
            tqdm.write("warning: nearly all patches have the same id, the vocabulary has collapsed; try a smaller --kl-weight or --lr", file=sys.stderr)
        again = self.decode(F.one_hot(ids, self.vocabulary).permute(0, 3, 1, 2).float()).float()
        return torch.stack([images, again], dim=1).clamp(0, 1), {"used": len(ids.unique()) / self.vocabulary}

    def export(self):
        """What tokenizer.pt holds."""
        return {"config": self.config, "state_dict": {name: value.detach().cpu().clone() for name, value in self.state_dict().items()}, "method": "dvae"}


class DalleBlock(nn.Module):
    """A block of DALL-E's encoder: four times ReLU and convolution, beside the identity."""

    def __init__(self, n_in, n_out, gain):
        super().__init__()
        hidden = n_out // 4
        self.gain, self.id_path = gain, nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        sizes = (n_in, hidden, 3), (hidden, hidden, 3), (hidden, hidden, 3), (hidden, n_out, 1)
        self.res_path = nn.Sequential()
        for i, (a, b, k) in enumerate(sizes, start=1):
            self.res_path.add_module(f"relu_{i}", nn.ReLU())
            self.res_path.add_module(f"conv_{i}", nn.Conv2d(a, b, k, padding=k // 2))

    def forward(self, x):
        return self.id_path(x) + self.gain * self.res_path(x)


class DalleEncoder(nn.Module):
    """DALL-E's tokenizer (Ramesh et al., 2021): four groups of blocks at 1, 2, 4 and 8 times the width, halved by max pooling between.
    Modules have OpenAI's names, so that the file's weights load."""

    def __init__(self, width=256, vocabulary=8192, blocks=2):
        super().__init__()
        self.vocabulary, self.blocks = vocabulary, nn.Sequential()
        self.blocks.add_module("input", nn.Conv2d(3, width, 7, padding=3))
        before = width
        for group, factor in enumerate((1, 2, 4, 8), start=1):
            layers = nn.Sequential()
            for i in range(1, blocks + 1):
                layers.add_module(f"block_{i}", DalleBlock(before, factor * width, gain=1 / (4 * blocks) ** 2))  # 1 / (all blocks)^2, theirs
                before = factor * width
            if group < 4:
                layers.add_module("pool", nn.MaxPool2d(2))
            self.blocks.add_module(f"group_{group}", layers)
        self.blocks.add_module("output", nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=nn.Conv2d(before, vocabulary, 1))))

    @torch.no_grad()
    def ids(self, images):
        return self.blocks(0.8 * images + 0.1).argmax(dim=1)  # its pixels lie in [.1, .9]


class Pickled(nn.Module):
    """Stands for every class in OpenAI's encoder.pkl, which is a pickled module: it holds what was pickled, and can do nothing."""


PICKLED = [(Pickled, name) for name in ("dall_e.encoder.Encoder", "dall_e.encoder.EncoderBlock", "dall_e.utils.Conv2d", "torch.nn.modules.container.Sequential",
                                        "torch.nn.modules.activation.ReLU", "torch.nn.modules.pooling.MaxPool2d", "torch.nn.modules.linear.Identity")]


def open_tokenizer(target):
    """--target -> a frozen tokenizer, or None for pixels. A UserError if the file is none of the kind."""
    kind, _, path = target.partition(":")
    if target == "rgb":
        return None
    if kind not in ("dvae", "dalle") or not path:
        raise UserError(f"--target {target}: neither rgb nor dvae:FILE nor dalle:FILE")
    state = load_file(path, PICKLED if kind == "dalle" else ())
    if kind == "dvae" and not (isinstance(state, dict) and state.get("method") == "dvae"):
        raise UserError(f"--target {target}: not a tokenizer.pt of --method dvae")
    try:
        if kind == "dvae":
            training = dict(temperature=[1, 1], anneal=1, kl_weight=0, kl_warmup=1, image_size=[8, 8])  # any values that pass: the shape is in config
            args = argparse.Namespace(**state["config"], **training)
            tokenizer, weights = DVAE(args), state["state_dict"]
        else:
            weights = state.state_dict() if isinstance(state, Pickled) else state
            weights = rename(weights, [(r"\.w$", ".weight"), (r"\.b$", ".bias")])  # theirs have names of their own
            blocks = len({name.split(".")[2] for name in weights if name.startswith("blocks.group_1.block_")})
            tokenizer = DalleEncoder(len(weights["blocks.input.weight"]), len(weights["blocks.output.conv.weight"]), blocks)
        tokenizer.load_state_dict(weights)
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise UserError(f"--target {target}: not a tokenizer of this kind ({' '.join(str(error).split())[:120]})") from None
    return tokenizer.requires_grad_(False).eval()


# --------------------------------------------------------------------------------------------------------------------
# The authors' checkpoints
# --------------------------------------------------------------------------------------------------------------------
def from_official(state_dict):
    """A checkpoint with the authors' names, of today's code or of the first release -> the names of `CAE`.

    The copy of the encoder that makes their targets is left out. Values are passed through or put together (a bias of q, k, v from
    theirs of q and v), so that a dict of gradients maps the same way. train.py's --init takes such a file whole, finetune.py its encoder.
    """
    state = next((state_dict[key] for key in ("model", "module", "state_dict") if isinstance(state_dict.get(key), dict)), state_dict)
    state = {name.removeprefix("module."): value for name, value in state.items()}
    state = {name: value for name, value in state.items() if not name.startswith(("alignment_encoder.", "teacher."))}
    state = rename(state, [  # parts
        (r"^(pretext_neck\.)?mask_token$", "regressor.mask_token"),
        (r"^(pretext_neck\.)?rd_pos_embed$", "pos_embed"),
        (r"^encoder_to_(regresser|decoder)\.", "project.0."),
        (r"^encoder_to_(regresser|decoder)_norm\.", "project.1."),
        (r"^(regresser|pretext_neck)\.regressor_blocks\.", "regressor.blocks."),
        (r"^(decoder|pretext_neck)\.decoder_blocks\.", "decoder.blocks."),
        (r"^(regresser|pretext_neck)\.norm\.", "regressor.norm."),
        (r"^pretext_neck\.norm2\.", "decoder.norm."),
        (r"^pretext_neck\.head\.", "decoder.head."),
    ])
    state = rename(state, [  # in a block
        (r"\.gamma_([12])(_cross)?$", r".ls\1.gamma"),
        (r"\.norm1_([qkv])\.", r".norm_\1."),
        (r"\.norm2_cross\.", ".norm2."),
        (r"\.cross_attn\.([qv])_bias$", r".attn.\1.bias"),
        (r"\.cross_attn\.", ".attn."),
        (r"\.mlp_cross\.", ".mlp."),
    ])
    for name in [name for name in state if name.endswith(".attn.q_bias")]:
        block, q = name.removesuffix("q_bias"), state.pop(name)
        state[f"{block}qkv.bias"] = torch.cat([q, torch.zeros_like(q), state.pop(f"{block}v_bias")])
    return state
