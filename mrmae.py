"""MR-MAE, "Mimic before Reconstruct", Gao et al., arXiv 2303.05475, and plain MAE (He et al., arXiv 2111.06377), which is its Sec. 3.1.

Reading order of the project: vit -> **mrmae** -> mixedae -> cae -> data -> train -> finetune.

MAE hides 75 % of the patches of an image, encodes the visible quarter alone, and lets a small decoder rebuild the pixels of the rest.
MR-MAE asks one thing more: what the encoder makes of the *visible* patches must tell, by one linear layer, what a frozen teacher (CLIP,
DINO, or any encoder trained here) makes of them. So semantics are learned at the encoder from visible patches, texture at the decoder from
hidden ones, and the two do not quarrel over the same tokens.

    images (B, C, H, W) -- teacher, no gradient --> saliency (B, L): where its CLS looks; features F_v (B, V, Dt) of the visible patches
        the V most salient patches are visible (focused mimicking), the other U are hidden
    images -- patch embedding, or masked convolution stages, + positions --> (B, L, D), the visible ones --> (B, V, D)
        -- encoder, outputs of several blocks summed (multi-layer fusion), final norm --> latent E_v (B, 1+V, D)
              |-- Eq. 2: mimic head L(E_v) (B, V, Dt) against F_v
        -- decoder.embed, [MASK] at the U hidden places --> (B, 1+L, Dd) -- decoder --> pred (B, L, P)
              |-- Eq. 1: squared error on the hidden patches
    loss = .5 L_R + .5 L_M (Sec. 4.1)

Run it:  python train.py --method mae                                              (the drawn set `shapes`, a laptop; README.md has times, losses, the paper's runs)
         python train.py --method mrmae --teacher runs/mixedae/encoder.pt          (any encoder.pt; or clip, dino: downloaded; clip:FILE, dino:FILE)

In the log `recon` is L_R and `mimic` L_M. Targets have mean 0 and deviation 1 over the channels of each token, so 1 is the loss of a head
that says nothing.

Masking. The mask is one, on the grid of tokens. With `--stem conv`, MCMAE's masked convolution stages (vit.ConvStem), the finer stages get the
same mask, each entry repeated over the 4 x 4 or 2 x 2 places of its patch: "multi-scale block-wise masking". It must be so: their 5 x 5
convolutions look across patches, and with a mask of their own they would carry pixels of a hidden patch into visible ones.

Where the paper is silent, the authors' code decides (https://github.com/facebookresearch/mae, https://github.com/Alpha-VL/ConvMAE):
    - norm_pix targets, fixed positions, initialisation, AdamW's betas; both losses averaged over the values of a token and then over tokens. (Eq. 1
      and 2 sum over values; pixels of a patch of 16 and features of ViT-B are both 768, so the balance .5 : .5 is that of the sums.)
    - Visible tokens stay in raster order. The authors keep them in the shuffled order of the draw; the encoder cannot tell.
    - MCMAE's fusion: features of stages 1 and 2, brought to the token grid by a convolution each, are added to the output of the last block,
      before the final norm; fine-tuning drops them. In MR-MAE they are added to the sum of multi-layer fusion.
    - MCMAE (`--method mae --stem conv`) has no CLS; its authors say that MR-MAE's encoder got one (their issue 19), so with `--method mrmae
      --stem conv` it has one, to which no stage features are added.
And where both are silent, it is ours:
    - F_v: the teacher's patch tokens after its last block and final LayerNorm, unprojected ("R^{l_v x C}"; CLIP's projection is trained for
      CLS alone); `--teacher-output` has the other readings. Then an affine-free LayerNorm, token by token, part of L_M: it gives L_M the scale of
      norm_pix pixels, without which .5 : .5 means nothing. No CLS in L_M: Eq. 2 counts l_v patches.
    - The mimic head reads E_v after the final norm, as the decoder does. It has a bias. Mimic only (Table 3, sixth row) has no decoder.
    - Focused mimicking chooses what the *encoder* sees ("select the most salient tokens ... for visible feature mimicking"). Saliency is the softmax
      of the teacher's last layer, CLS row, patches only, mean over heads. Top-k or sampled in proportion: the paper does not say which; top-k is
      the default. (A third reading, random masks and mimicry of their salient tokens alone, is not here.)
    - Multi-layer fusion: the residual stream after four evenly spaced blocks, the last among them (of 12: 3, 6, 9, 12), summed, then one final
      norm. What transfers has no fusion: there this norm, trained on the sum, reads the last block alone (fine-tuning trains a new one).
    - The teacher sees the same crop, with its own image statistics and at the size that it was trained at. If its grid then differs from ours, its
      features and saliency are resized to ours. `dino` is ViT-B/16; the paper does not say which (its reference [47] is another DINO, a detector).
      S, L and H have the teacher of B.
    - Two teachers (Table 4, "Joint"): a head each, L_M is the mean of both losses, saliency the mean of both maps, each divided by its sum.
    - Both targets at the decoder (Table 3, fifth row, where L_R is printed twice): L_M by a linear layer on the decoder's last norm, at hidden
      patches, in place of the encoder's.
    - "Maximum learning rate 1.5e-4" is read as a base rate, as in MAE, fine-tuning's 3e-4 too; warm-up is the same share of a run at every length.
The paper contradicts itself: its "mask ratio 25%" is what stays visible; 85.8 % belongs to 400 epochs (Table 5), not 200 (introduction); MAE-B
has 83.6 and 83.8, box AP at 200 epochs 52.7 and 53.0; "Huge-392" is Huge-393 in Table 6, and neither is a multiple of 16.
"""
import argparse
import contextlib
import fcntl
import hashlib
import math
import zipfile
from http.client import HTTPException
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision.transforms import v2

from data import MEAN, STD, channels, denormalize, heat_map
from vit import (UserError, ViT, build_decoder, build_encoder, init_weights, load_encoder, load_file, norm_pix, pack_encoder, patchify, read_shape, rename,
                 resize_positions, resize_tokens, say, strip_prefixes, take, undo_norm_pix, unpatchify, visible_ids)


# --------------------------------------------------------------------------------------------------------------------
# Sec. 3.1: MAE
# --------------------------------------------------------------------------------------------------------------------
def random_visible(batch, patches, visible, device):
    """Uniformly random masking (Sec. 3.1): the ids (B, V) of the visible patches, sorted. Row by row the first V of a random permutation."""
    noise = torch.rand(batch, patches, device=device)  # (B, L)
    return noise.argsort(dim=1)[:, :visible].sort(dim=1).values


def hidden_mask(ids, patches):
    """Ids of visible patches (B, V) -> mask (B, L) bool, True = hidden."""
    return torch.ones(len(ids), patches, dtype=torch.bool, device=ids.device).scatter(1, ids, False)


def reconstruction_loss(pred, target, mask):
    """Eq. 1: L_R = 1 / l_m || D_m - I_m ||^2, over the l_m masked patches.

    pred D, target I (B, L, P), mask (B, L) bool -> (). The squared norm is a mean over the P values of a patch, as in MAE's code.
    """
    error = (pred.float() - target).square().mean(dim=-1)  # (B, L)
    return (error * mask).sum() / mask.sum()


class MAE(nn.Module):
    """Plain MAE; with --stem conv MCMAE."""

    @staticmethod
    def add_args(parser):
        add = parser.add_argument_group("MAE").add_argument
        add("--mask-ratio", type=float, default=0.75, help="share of the patches that is hidden (MR-MAE Sec. 3.1: 75 %%)")
        add("--norm-pix", action=argparse.BooleanOptionalAction, default=True,
            help="targets normalised patch by patch (MAE's command; losses with and without are not comparable)")
        add("--mlp-ratio", type=float, default=4.0, help="hidden width of the encoder's MLPs, of its width (MAE's code)")
        add("--decoder-mlp-ratio", type=float, default=4.0, help="the same for the decoder (MAE's code)")
        add("--stem", choices=("patch", "conv"), default="patch", help="what comes before the blocks: a linear patch embedding, or the masked "
            "convolution stages of MCMAE (MR-MAE Sec. 3.3), for which patches have 16 pixels")
        add("--stem-widths", type=int, nargs=2, metavar=("FIRST", "SECOND"), help="of the two convolution stages [base: 256 384 (MCMAE's code); micro: 32 64 (ours)]")
        add("--stem-depths", type=int, nargs=2, metavar=("FIRST", "SECOND"), help="blocks of the two stages [base: 2 2 (MCMAE's code); micro: 1 1 (ours)]")
        add("--stem-mlp-ratios", type=float, nargs=2, default=[4.0, 4.0], metavar=("FIRST", "SECOND"), help="of the two stages (MCMAE's code)")

    def __init__(self, args, class_token=None):
        super().__init__()
        stem = None
        if args.stem == "conv":
            stem = {"widths": args.stem_widths, "depths": args.stem_depths, "mlp_ratios": args.stem_mlp_ratios}
        elif args.stem_widths or args.stem_depths:
            raise UserError("--stem-widths and --stem-depths go with --stem conv")
        ratios = [("--mlp-ratio", args.mlp_ratio, args.width), ("--decoder-mlp-ratio", args.decoder_mlp_ratio, args.decoder_width)]
        for flag, ratio, width in [*ratios, *(("--stem-mlp-ratios", *pair) for pair in zip(args.stem_mlp_ratios, args.stem_widths or ()))]:
            if not 1 <= ratio * width < math.inf:  # so written, NaN is refused too
                raise UserError(f"{flag} {ratio}: an MLP that is {ratio} x {width} wide cannot be; the ratio must be above 0, and finite")
        class_token = not stem if class_token is None else class_token  # MCMAE has none
        self.encoder = build_encoder(args, mlp_ratio=args.mlp_ratio, class_token=class_token, stem=stem)
        self.decoder = build_decoder(args, self.encoder, mlp_ratio=args.decoder_mlp_ratio)
        self.fuse_layers = []  # blocks whose outputs are summed (Sec. 3.3); MAE: none, the last block alone
        if stem:  # to the token grid: 4 x 4 places of stage 1 and 2 x 2 of stage 2 lie in a patch
            self.stage_fusion = nn.ModuleList(nn.Conv2d(w, args.width, k, stride=k) for w, k in zip(stem["widths"], (4, 2))).to(memory_format=torch.channels_last)
        self.norm_pix = args.norm_pix
        self.panels = ["image", "visible patches", "reconstruction\n(true mean, std)" if self.norm_pix else "reconstruction"]
        L = self.encoder.num_patches
        if not 0 < args.mask_ratio < 1 or not 0 < int(L * (1 - args.mask_ratio)) < L:
            raise UserError(f"--mask-ratio {args.mask_ratio}: of {L} patches at least 1 must stay visible and at least 1 be hidden")
        self.num_visible = int(L * (1 - args.mask_ratio))  # V

    def encode(self, images, ids, mask):
        """Images -> E_v (B, 1+V, D) of the visible patches ids (B, V); mask (B, L) is True at the others."""
        stages, taps = [], dict.fromkeys(self.fuse_layers)
        x = take(self.encoder.embed(images, mask, stages), ids)  # (B, V, D)
        x = self.encoder.encode_raw(x, taps)  # (B, 1+V, D)
        if taps:
            x = sum(taps.values())  # multi-layer fusion (Sec. 3.3), CLS too
        if stages:
            fine = sum(take(rearrange(conv(stage), "b d h w -> b (h w) d"), ids) for conv, stage in zip(self.stage_fusion, stages))  # (B, V, D)
            x = x + F.pad(fine, (0, 0, self.encoder.first, 0))  # not to CLS
        return self.encoder.norm(x)

    def insert_masks(self, latent, ids):
        """E_v (B, 1+V, D) -> what the decoder sees (B, 1+L, Dd): the visible tokens at their places, [MASK] at the others."""
        y = self.decoder.embed(latent)  # (B, 1+V, Dd)
        cls, y = y[:, : self.encoder.first], y[:, self.encoder.first :]
        full = self.decoder.mask_token.to(y.dtype).expand(len(y), self.encoder.num_patches, -1)
        full = full.scatter(1, ids.unsqueeze(-1).expand_as(y), y)  # (B, L, Dd)
        return torch.cat([cls, full], dim=1)

    def target(self, images):
        """I of Eq. 1, of every patch: (B, L, P)."""
        patches = patchify(images, self.encoder.patch_size)
        return norm_pix(patches) if self.norm_pix else patches

    def predict(self, images, mask=None):
        """Every tensor of Fig. 2 (1). images (B, C, H, W) normalised; mask (B, L) bool, True = hidden, or None to draw one.

        Returns latent (B, 1+V, D), pred (B, L, P), target (B, L, P), mask (B, L). Without CLS latent is (B, V, D).
        """
        L = self.encoder.num_patches
        ids = random_visible(len(images), L, self.num_visible, images.device) if mask is None else visible_ids(mask)  # (B, V)
        mask = hidden_mask(ids, L)
        latent = self.encode(images, ids, mask)
        pred = self.decoder(self.insert_masks(latent, ids))  # (B, L, P)
        return {"latent": latent, "pred": pred, "target": self.target(images), "mask": mask}

    def forward(self, images, mask=None):
        """images (B, C, H, W) -> loss (), {"recon": ()}."""
        out = self.predict(images, mask)
        loss = reconstruction_loss(out["pred"], out["target"], out["mask"])  # Eq. 1
        return loss, {"recon": loss.detach()}

    def pictures(self, images, out):
        """Image, visible patches and, if there is a prediction, the reconstruction: a list of (B, 3, H, W) in [0, 1]."""
        p, grid = self.encoder.patch_size, self.encoder.grid
        patches, hidden = patchify(images, p), out["mask"].unsqueeze(-1)  # (B, L, P), (B, L, 1)
        panels = [patches, patches.masked_fill(hidden, 0)]
        if "pred" in out:
            pred = out["pred"].float()
            panels.append(torch.where(hidden, undo_norm_pix(pred, patches) if self.norm_pix else pred, patches))
        return [denormalize(unpatchify(x, grid, p)).clamp(0, 1) for x in panels]

    @torch.no_grad()
    def visualize(self, images):
        """images (B, C, H, W) -> pictures (B, 3, 3, H, W) in [0, 1], {}. The panels: image, visible patches, reconstruction.

        With norm_pix the reconstruction borrows each hidden patch's true mean and standard deviation: its colours are not predicted.
        """
        return torch.stack(self.pictures(images, self.predict(images)), dim=1), {}

    def export(self):
        """What encoder.pt holds: a plain ViT, whose CLS token MAE's authors probe, or MCMAE's encoder."""
        return pack_encoder(self.encoder, "mae", "cls" if self.encoder.first else "mean", MEAN, STD)


# --------------------------------------------------------------------------------------------------------------------
# Sec. 3.2 and 3.3: MR-MAE
# --------------------------------------------------------------------------------------------------------------------
def mimic_loss(mimicked, features):
    """Eq. 2: L_M = 1 / l_v || L(E_v) - F_v ||^2, over the l_v visible patches.

    mimicked L(E_v), the teacher's features F_v (B, V, Dt) -> (). The squared norm is a mean over the Dt values; each token of F_v is first
    normalised over them (both ours, see above).
    """
    target = F.layer_norm(features.float(), features.shape[-1:])
    return (mimicked.float() - target).square().mean()


def salient_visible(saliency, visible, how):
    """Focused mimicking (Sec. 3.3): the ids (B, V) of the visible patches, sorted. saliency (B, L), not negative.

    how: "top-k", the V most salient ones, or "sampled", V drawn one after the other with probabilities in proportion to it.
    """
    if how == "sampled":
        # The V largest of these are such a draw, as in torch.multinomial, but without its checks, which wait for the card.
        saliency = saliency / torch.empty_like(saliency).exponential_()
    return saliency.topk(visible, dim=1).indices.sort(dim=1).values


def joint_saliency(maps):
    """Saliency of several teachers (Table 4), (B, L) each -> (B, L): the mean, each divided by its sum."""
    return sum(m / m.sum(dim=1, keepdim=True) for m in maps) / len(maps)


class Teacher(nn.Module):
    """A frozen ViT. `features` asks for everything; the method asks in two steps, so that of the last block only what it uses is computed.

    vit: with the teacher's weights, Dt wide; mean, std: of its images; projection (Dt, out) or None: CLIP's. The method keeps teachers in a plain
    list, so they are no part of its state dict, optimizer, DDP or train().
    """

    def __init__(self, vit, mean, std, name, projection=None):
        super().__init__()
        self.vit, self.mean, self.std, self.name = vit, mean, std, name
        self.register_buffer("projection", projection)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def look(self, images):
        """images (B, C, H, W), normalised with the teacher's own mean and std -> state for `describe`, saliency (B, L) or None without CLS.

        Saliency is the CLS row of the last block's attention, over patches, mean over heads; not divided by its sum.
        """
        x = self.vit.put_cls(self.vit.embed(images))  # (B, N, Dt)
        for block in self.vit.blocks[:-1]:
            x = block(x)
        last, saliency = self.vit.blocks[-1], None
        q, k, v = last.attn.split(last.norm1(x))  # (B, H, N, Dt / H)
        if self.vit.first:
            scores = (q[:, :, :1] * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # of CLS alone, (B, H, 1, N)
            saliency = scores.float().softmax(dim=-1)[:, :, 0, 1:].mean(dim=1)
        return (x, q, k, v), saliency

    @torch.no_grad()
    def describe(self, state, ids=None, output="post_ln"):
        """The last block and what follows, for the patches ids (B, V), None: all -> tokens (B, V, Dt) in fp32.

        output: "post_ln", after the final LayerNorm; "pre_ln", before it; "projected", after CLIP's projection too, (B, V, out).
        """
        x, q, k, v = state
        last = self.vit.blocks[-1]
        if ids is None:
            ids = torch.arange(x.shape[1] - self.vit.first, device=x.device).expand(len(x), -1)
        places = ids + self.vit.first
        q = q.gather(2, places[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))  # (B, H, V, Dt / H); keys and values are of all
        attended = last.attn.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))
        x = take(x, places) + last.ls1(attended)
        x = x + last.ls2(last.mlp(last.norm2(x)))
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if output != "pre_ln":
                x = self.vit.norm(x)
            return x @ self.projection if output == "projected" else x

    def features(self, images, output="post_ln"):
        """images (B, C, H, W), normalised with the teacher's own mean and std -> {"tokens": (B, L, Dt), see `describe`, "saliency": (B, L)
        or None}."""
        state, saliency = self.look(images)
        return {"tokens": self.describe(state, output=output), "saliency": saliency}

    def renormalize(self, images):
        """Images normalised as ours (B, C, H, W) -> what the teacher was trained on: its own mean, std and size."""
        mean, std, own_mean, own_std = (channels(x, images) for x in (MEAN, STD, self.mean, self.std))
        images = images * (std / own_std) + (mean - own_mean) / own_std
        size = self.vit.config["image_size"]
        if list(images.shape[-2:]) == size:
            return images
        return v2.functional.resize(images, size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)


def fused_layers(asked, depth):
    """--fuse-layers -> block numbers in order; None: four evenly spaced ones (fewer of a shallow encoder), the last among them."""
    layers = sorted({depth * i // 4 for i in range(1, 5)} - {0}) if asked is None else sorted(asked)
    if layers[0] < 1 or layers[-1] > depth or len(set(layers)) < len(layers):
        raise UserError(f"--fuse-layers {' '.join(map(str, asked))}: the encoder's blocks are 1 to {depth}; give each at most once")
    if layers[-1] < depth:
        raise UserError(f"--fuse-layers {' '.join(map(str, asked))}: the last block, {depth}, must be among them, or it would learn nothing")
    return layers


class MRMAE(MAE):
    """MR-MAE. With the flags of README.md also its ablations (Table 3 and 4). Teachers are opened below, in the next part of the file."""

    @staticmethod
    def add_args(parser):
        MAE.add_args(parser)
        add = parser.add_argument_group("MR-MAE").add_argument
        add("--teacher", nargs="+", metavar="TEACHER", help="one (Sec. 4.1: clip) or two (Table 4) of clip, clip:FILE, dino, dino:FILE or an encoder.pt; clip "
            "and dino, both ViT-B/16, are downloaded into torch.hub's cache")
        add("--teacher-output", choices=("post_ln", "pre_ln", "projected"), default="post_ln", help="the features to mimic: after the teacher's final "
            "LayerNorm, before it, or after CLIP's projection (ours)")
        add("--visible", choices=("top-k", "sampled", "random"), default="top-k", help="the most salient patches, patches sampled by saliency, or random "
            "ones (Table 3: focused mimicking or not)")
        add("--fuse-layers", type=int, nargs="+", metavar="BLOCK", help="blocks whose outputs are summed; the last one alone: no fusion (Table 3) [four, "
            "evenly spaced: ours]")
        add("--mimic-at", choices=("encoder", "decoder"), default="encoder", help="mimic visible tokens after the encoder, or hidden ones after the "
            "decoder (Table 3)")
        add("--recon-weight", type=float, default=0.5, help="weight of Eq. 1 (Sec. 4.1); 0: mimic only, without a decoder (Table 3)")
        add("--mimic-weight", type=float, default=0.5, help="weight of Eq. 2 (Sec. 4.1)")
        parser.set_defaults(epochs=2)  # ours: a laptop's minute and a half

    def __init__(self, args):
        super().__init__(args, class_token=True)
        self.fuse_layers = fused_layers(args.fuse_layers, args.depth)
        self.visible, self.mimic_at, self.output = args.visible, args.mimic_at, args.teacher_output
        self.recon_weight, self.mimic_weight = args.recon_weight, args.mimic_weight
        if not (0 <= self.recon_weight < math.inf and 0 < self.mimic_weight < math.inf):
            raise UserError(f"--recon-weight {self.recon_weight} must be at least 0, --mimic-weight {self.mimic_weight} above 0; pixels alone are --method mae")
        if not args.teacher or len(args.teacher) > 2:
            raise UserError(f"--teacher: give one or two (now {len(args.teacher or ())}) of clip, dino (both downloaded), clip:FILE, dino:FILE or an encoder.pt; to make "
                            f"one: python train.py --method mixedae, then --teacher runs/mixedae/encoder.pt")
        self.teachers = [open_teacher(word, self.output, self.encoder.grid) for word in args.teacher]  # a plain list: see Teacher
        if self.visible != "random" and not all(teacher.vit.first for teacher in self.teachers):
            raise UserError(f"--teacher {' '.join(args.teacher)}: a teacher without class token has no saliency; use --visible random or another teacher")

        # A module exists only if a loss uses it: DDP stops on a parameter without gradient.
        if not self.recon_weight:
            if self.mimic_at == "encoder":
                self.decoder = None
            else:
                self.decoder.pred = None
        width = args.decoder_width if self.mimic_at == "decoder" else args.width
        outputs = [len(t.projection.T) if self.output == "projected" else t.vit.width for t in self.teachers]  # Dt
        self.mimic_heads = nn.ModuleList(nn.Linear(width, Dt) for Dt in outputs).apply(init_weights)  # L of Eq. 2
        self.panels[1:1] = [f"attention of\nteacher {teacher.name}" for teacher in self.teachers if teacher.vit.first]
        if not self.recon_weight:
            self.panels.pop()  # no prediction, no reconstruction

    def predict(self, images, mask=None, features=None):
        """Every tensor of Fig. 2. images (B, C, H, W) normalised; mask (B, L) bool, True = hidden, or None: as --visible says; features: a list,
        for each teacher {"tokens": (B, L, Dt), "saliency": (B, L)} on our grid, or None to ask the teachers.

        Returns latent E_v (B, 1+V, D), mimicked L(E_v) and features F_v: a list, for each teacher (B, V, Dt), with --mimic-at decoder (B, U, Dt); saliency:
        a list, for each teacher (B, L) or None; mask (B, L), ids (B, V); and unless --recon-weight is 0 pred and target (B, L, P).
        """
        L = self.encoder.num_patches
        if features is None:
            looks = [teacher.to(images.device).look(teacher.renormalize(images)) for teacher in self.teachers]
            maps = [self.on_our_grid(saliency, teacher) for (_, saliency), teacher in zip(looks, self.teachers)]
        else:
            maps = [given["saliency"] for given in features]
        if mask is not None:
            ids = visible_ids(mask)  # (B, V)
        elif self.visible == "random":
            ids = random_visible(len(images), L, self.num_visible, images.device)
        else:
            ids = salient_visible(joint_saliency(maps), self.num_visible, self.visible)
        mask = hidden_mask(ids, L)
        asked = ids if self.mimic_at == "encoder" else visible_ids(~mask)  # patches whose features are mimicked
        if features is None:
            features = [self.described(teacher, state, asked) for teacher, (state, _) in zip(self.teachers, looks)]
        else:
            features = [take(given["tokens"], asked) for given in features]

        latent = self.encode(images, ids, mask)  # E_v
        out = {"latent": latent, "features": features, "saliency": maps, "mask": mask, "ids": ids}
        mimicking = latent[:, 1:]  # (B, V, D)
        if self.decoder is not None:
            decoded = self.decoder.features(self.insert_masks(latent, ids))  # (B, L, Dd)
            if self.recon_weight:
                out["pred"], out["target"] = self.decoder.pred(decoded), self.target(images)
            if self.mimic_at == "decoder":
                mimicking = take(decoded, asked)  # (B, U, Dd)
        out["mimicked"] = [head(mimicking) for head in self.mimic_heads]
        return out

    def on_our_grid(self, values, teacher):
        """Features of a teacher's patches (B, L', Dt), or saliency (B, L') or None -> the same on our grid (B, L, Dt) or (B, L)."""
        if values is None or teacher.vit.grid == self.encoder.grid:
            return values
        if values.ndim == 2:
            return self.on_our_grid(values.unsqueeze(-1), teacher).squeeze(-1)
        # Not bicubic, because saliency must not be negative; features follow the same rule.
        return resize_tokens(values, teacher.vit.grid, self.encoder.grid, mode="bilinear", antialias=True)

    def described(self, teacher, state, ids):
        """A teacher's features (B, V, Dt) of the patches ids (B, V) of our grid."""
        if teacher.vit.grid == self.encoder.grid:
            return teacher.describe(state, ids, self.output)
        return take(self.on_our_grid(teacher.describe(state, None, self.output), teacher), ids)

    def forward(self, images, mask=None, features=None):
        """images (B, C, H, W) -> loss (), {"recon": (), "mimic": ()}; of two teachers also "mimic_1" and "mimic_2", of which mimic is the mean."""
        out = self.predict(images, mask, features)
        mimics = [mimic_loss(mimicked, F_v) for mimicked, F_v in zip(out["mimicked"], out["features"])]  # Eq. 2
        mimic = sum(mimics) / len(mimics)
        loss, metrics = self.mimic_weight * mimic, {"mimic": mimic.detach()}
        if self.recon_weight:
            recon = reconstruction_loss(out["pred"], out["target"], out["mask"])  # Eq. 1
            loss = loss + self.recon_weight * recon  # Sec. 4.1: .5 L_R + .5 L_M
            metrics["recon"] = recon.detach()
        if len(mimics) > 1:
            metrics |= {f"mimic_{i}": value.detach() for i, value in enumerate(mimics, start=1)}
        return loss, metrics

    @torch.no_grad()
    def visualize(self, images):
        """images (B, C, H, W) -> pictures (B, panels, 3, H, W) in [0, 1], {}. The panels: image, the CLS attention of each teacher that has CLS (Fig. 3),
        visible patches, and unless --recon-weight is 0 the reconstruction, as in MAE."""
        out = self.predict(images)
        pictures = self.pictures(images, out)
        pictures[1:1] = [heat_map(m.unflatten(1, self.encoder.grid), pictures[0]) for m in out["saliency"] if m is not None]
        return torch.stack(pictures, dim=1), {}

    def export(self):
        """What encoder.pt holds: the encoder without fusion and heads. MCMAE's authors pool its patch tokens."""
        return pack_encoder(self.encoder, "mrmae", "mean", MEAN, STD)


# --------------------------------------------------------------------------------------------------------------------
# Teachers by name and file
# --------------------------------------------------------------------------------------------------------------------
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP_SHA256 = "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"  # of OpenAI's archive of ViT-B/16
URLS = {"clip": f"https://openaipublic.azureedge.net/clip/models/{CLIP_SHA256}/ViT-B-16.pt",
        "dino": "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"}


def vit_of(weights, heads):
    """An untrained ViT, fp32, of the shape of these weights by our names. heads: None, width // 64, as CLIP and DINO have it."""
    shape = read_shape(weights)
    return ViT(**shape, heads=heads or shape["width"] // 64)


def quick_gelu(x):
    """CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


def make_clip(vit):
    """Where CLIP's visual tower differs from our ViT: no bias in the patch embedding, a LayerNorm before the blocks, eps 1e-5, QuickGELU."""
    vit.patch_embed.proj.bias = None
    vit.norm_pre = nn.LayerNorm(vit.width)
    for module in vit.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    for block in vit.blocks:
        block.mlp.activation = quick_gelu


def clip_visual(state_dict, heads=None):
    """CLIP's names (OpenAI's, fp16 or fp32, of the whole model or its visual tower) -> Teacher. heads: see `vit_of`.

    What does not fit raises errors of all kinds; `open_teacher` makes one line of them.
    """
    state = {name.removeprefix("visual."): value for name, value in state_dict.items() if name.startswith("visual.")} or dict(state_dict)
    known = ("class_embedding", "positional_embedding", "proj", "conv1.", "ln_pre.", "ln_post.", "transformer.resblocks.")
    weights = {name: value for name, value in state.items() if name.startswith(known)}
    projection = weights.pop("proj", None)
    weights = rename(weights, [  # parts
        (r"^class_embedding$", "cls_token"),
        (r"^positional_embedding$", "pos_embed"),
        (r"^conv1\.", "patch_embed.proj."),
        (r"^ln_pre\.", "norm_pre."),
        (r"^ln_post\.", "norm."),
        (r"^transformer\.resblocks\.", "blocks."),
    ])
    weights = rename(weights, [  # in a block
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.attn\.in_proj_", ".attn.qkv."),
        (r"\.attn\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.c_fc\.", ".mlp.fc1."),
        (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    ])
    weights |= {"cls_token": weights["cls_token"].view(1, 1, -1), "pos_embed": weights["pos_embed"].unsqueeze(0)}
    vit = vit_of(weights, heads)
    make_clip(vit)
    vit.load_state_dict(weights)
    if projection is not None and (projection.ndim != 2 or len(projection) != vit.width):
        raise ValueError(f"proj {tuple(projection.shape)} for a width of {vit.width}")
    return Teacher(vit, CLIP_MEAN, CLIP_STD, "clip", None if projection is None else projection.float())


def dino_positions(table, old_grid, new_grid):
    """DINO's rule for another image size: by factors (new + .1) / old, which is not quite the new size. (Our training gives a teacher its own size.)"""
    return resize_positions(table, old_grid, new_grid, size=None, scale_factor=[(new + 0.1) / old for new, old in zip(new_grid, old_grid)])


def dino(state_dict, heads=None):
    """DINO's names (of its backbone, or a full checkpoint, of which the teacher is taken) -> Teacher. heads: see `vit_of`."""
    weights = strip_prefixes(state_dict.get("teacher", state_dict))
    weights = {name: value for name, value in weights.items() if not name.startswith("head.")}
    vit = vit_of(weights, heads)
    vit.load_state_dict(weights)
    vit.resize = dino_positions
    return Teacher(vit, MEAN, STD, "dino")


def download(kind):
    """The published file of "clip" or "dino" -> its path in torch.hub's cache. A file that is there is not fetched again."""
    url, path = URLS[kind], Path(torch.hub.get_dir()) / "checkpoints" / Path(URLS[kind]).name
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:  # the other processes of this machine wait for the first one
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                part = path.with_suffix(".part")
                torch.hub.download_url_to_file(url, part, hash_prefix=CLIP_SHA256 if kind == "clip" else None)
                if kind == "dino":
                    load_file(part)  # DINO's authors publish no hash: is it whole?
                part.rename(path)
    except (OSError, HTTPException, RuntimeError, UserError) as error:  # no network, a full disk; a wrong hash, half a file
        raise UserError(f"--teacher {kind}: {url} could not be downloaded to {path} ({' '.join(str(error).split())[:120]}); download it elsewhere and give "
                        f"--teacher {kind}:FILE") from None
    return path


def load_clip(path, official):
    """A state dict of CLIP: OpenAI's archive of ViT-B/16, which is a TorchScript file and could hold code, if its hash is right; any other file must
    be a plain state dict. official: nothing but that archive will do."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if digest == CLIP_SHA256:
        return torch.jit.load(path, map_location="cpu").state_dict()
    script = False
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        script = any("/code/" in name for name in archive.namelist())
    if official or script:
        raise UserError(f"{path}: its sha256 {digest[:12]}... is not that of OpenAI's ViT-B/16 ({CLIP_SHA256[:12]}...), so it is not opened: a TorchScript file could "
                        f"hold code. Remove it and download it again; of another model give a file of its plain state dict")
    return load_file(path)


def open_teacher(word, output, grid):
    """A word of --teacher -> Teacher; says what it is. grid: the student's."""
    kind, colon, path = word.partition(":")
    if kind not in ("clip", "dino"):
        if not Path(word).exists():
            raise UserError(f"--teacher {word}: no such file, nor clip, clip:FILE, dino or dino:FILE")
        vit, info = load_encoder(word)
        teacher = Teacher(vit, info["mean"], info["std"], info["method"])
    else:
        if colon and not path:
            raise UserError(f"--teacher {word}: names no file")
        path = path or download(kind)
        state = load_clip(path, official=not colon) if kind == "clip" else load_file(path)
        try:
            teacher = clip_visual(state) if kind == "clip" else dino(state)
        except Exception as error:  # a file of something else makes them raise all kinds
            what = "the visual ViT of CLIP" if kind == "clip" else "a ViT of DINO"
            raise UserError(f"--teacher {word}: not {what} ({' '.join(str(error).split())[:120]})") from None
    config, own = teacher.vit.config, teacher.vit.grid
    if config["channels"] != len(MEAN):
        raise UserError(f"--teacher {word}: takes images of {config['channels']} channels, not {len(MEAN)}")
    if output == "projected" and teacher.projection is None:
        raise UserError(f"--teacher-output projected: only CLIP has a projection, {word} has none")
    resized = f", resized to our {grid[0]} x {grid[1]}" if own != grid else ""
    say(f"teacher {word}: ViT {config['width']} wide, {config['depth']} blocks; sees {' x '.join(map(str, config['image_size']))} pixels, "
        f"{own[0]} x {own[1]} patches{resized}")
    return teacher


# --------------------------------------------------------------------------------------------------------------------
# The authors' checkpoints
# --------------------------------------------------------------------------------------------------------------------
def from_official_mae(state_dict):
    """The names of a full published MAE file (encoder and decoder) -> those of `MAE`; a file's {"model": ...} is unwrapped."""
    return rename(state_dict.get("model", state_dict), [
        (r"^mask_token$", "decoder.mask_token"),
        (r"^decoder_", "decoder."),
        (r"^", "encoder."),
    ])


def from_official_mcmae(state_dict):
    """The names of a published MCMAE file -> those of `MAE` with --stem conv; a file's {"model": ...} is unwrapped."""
    return rename(state_dict.get("model", state_dict), [
        (r"^mask_token$", "decoder.mask_token"),
        (r"^decoder_", "decoder."),
        (r"^stage1_output_decode\.", "stage_fusion.0."),
        (r"^stage2_output_decode\.", "stage_fusion.1."),
        (r"^patch_embed4\.", "encoder.patch_embed.proj."),
        (r"^patch_embed([123])\.", r"encoder.patch_embed.embed\1."),
        (r"^blocks([12])\.", r"encoder.patch_embed.blocks\1."),
        (r"^blocks3\.", "encoder.blocks."),
        (r"^", "encoder."),
    ])


def from_published(state_dict):
    """A published file of MAE or of MCMAE, told apart by its names."""
    mcmae = "patch_embed4.weight" in state_dict.get("model", state_dict)
    return from_official_mcmae(state_dict) if mcmae else from_official_mae(state_dict)
