"""MR-MAE, "Mimic before Reconstruct" (Gao et al., arXiv 2303.05475), and plain MAE (He et al., arXiv
2111.06377), which it extends and describes in its Sec. 3.1.

Reading order of the project: vit -> **mrmae** -> mixedae -> cae -> data -> train -> finetune -> dense.

MAE hides 75 % of the patches of an image, encodes the visible quarter alone, and lets a small decoder rebuild
the pixels of the rest. MR-MAE adds a second loss: from the encoder's output at the *visible* patches, one
linear layer must predict the features that a frozen teacher (CLIP, DINO, or any encoder trained here) has for
the same patches. So semantics are learned at the encoder from visible patches and texture at the decoder from
hidden ones, and the two do not compete for the same tokens.

    images (B, C, height, width)
        -- teacher, frozen ----------------------> tokens (B, L, Dt), saliency (B, L): where its CLS looks
        -- the V most salient patches -----------> ids (B, V): visible; the other U = L - V are hidden
           (--visible random: V random ones)
        -- tokens at ids ------------------------> features F_v (B, V, Dt)
    images
        -- patch embedding + positions ----------> (B, L, D)
        -- the visible patches ------------------> (B, V, D)
        -- encoder, sum of several blocks, norm -> latent (B, 1 + V, D): CLS, then E_v (B, V, D)
           |-- mimic head, one linear layer -----> mimicked L(E_v) (B, V, Dt)
           |                                       Eq. 2: L_M compares it with F_v, each token normalised
        -- decoder.embed, [MASK] at hidden ------> (B, 1 + L, Dd)
        -- decoder ------------------------------> pred (B, L, P)
                                                   Eq. 1: L_R compares it with target (B, L, P) where hidden
    loss = .5 L_R + .5 L_M (Sec. 4.1)

    In the paper         Here
    l_v, l_m             V, U: how many patches are visible and hidden; L = V + U are all patches
    C                    D of the encoder, Dt of the teacher; our C is the number of image channels
    I_m, D_m             target, pred (B, L, P), read where mask (B, L) is True. The paper counts p^2 values
                         of a patch; with its 3 colours they are our P = C p p
    E_v                  latent[:, 1:]: latent (B, 1 + V, D) has the CLS token in front
    L(E_v), F_v          mimicked, features: lists with (B, V, Dt) for each teacher
    L( )                 one of mimic_heads
    L_R, Eq. 1           reconstruction_loss; `recon` in the log
    L_M, Eq. 2           mimic_loss, which first normalises each token of F_v (ours); `mimic` in the log
    .5 L_R + .5 L_M      MRMAE.forward; the weights are --recon-weight and --mimic-weight
    the teacher          Teacher; open_teachers opens it, MRMAE.ask gets its features
    attention map        saliency (B, L): the attention of the teacher's CLS to each patch, in its last block,
                         mean over heads
    random masking       vit.random_visible: in MAE always, here with --visible random
    Focused Mimicking    salient_visible: the V most salient patches
    Multi-layer Fusion   the sum in MAE.encode, over the blocks of --fuse-layers
    Masked Convolution   vit.ConvStem, with --stem conv (MAE with it is MCMAE); vit.ConvBlock.forward zeroes
                         the hidden places

The last three rows are the tricks of Sec. 3.3. The first two of them are on by default: that is row 4 of
Table 3. --stem conv adds the third: row 7 and, after 400 epochs, the model of Table 1.

Run it (on the drawn set `shapes`, on a laptop):
    python train.py --method mae                                    # makes the teacher of the next line
    python train.py --method mrmae --teacher runs/mae/encoder.pt    # the paper's teacher: --teacher clip
A teacher is any encoder.pt, or clip or dino (downloaded), or clip:FILE, dino:FILE. The encoder of the first
line only serves to try the second line out: it was trained on pixels alone, so it lacks the semantics that
CLIP or DINO has. The training loop is `train_loop` in train.py; each of its steps calls `MRMAE.forward`.

How to read `mimic` in the log: L_M first normalises each token of F_v to mean 0 and variance 1, so 1 is the
loss of a head that predicts zeros. A new head starts at about 1 + 2 D / (D + Dt): at 2 if student and teacher
are equally wide. A value below 1 does not yet prove that the head tells patches apart: if the teacher's
features differ little between patches, always predicting their mean gives such a value, too.

`python mrmae.py` prints the shapes of what `predict` returns. Where the paper is silent, the list at the end
of this file says what we do and why.
"""

import argparse
import fcntl
import hashlib
import os
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision.transforms import v2

from data import MEAN, STD, channels, denormalize, heat_map
from vit import (
    STEM_SIZES,
    UserError,
    ViT,
    all_blocks,
    build_decoder,
    build_encoder,
    find_weights,
    gather_tokens,
    hidden_mask,
    init_weights,
    load_encoder,
    load_file,
    load_strictly,
    natural_float,
    norm_pix,
    one_line,
    pack_encoder,
    patchify,
    positive_float,
    positive_int,
    print_rank0,
    random_visible,
    read_shape,
    rename,
    resize_positions,
    resize_tokens,
    strip_prefixes,
    undo_norm_pix,
    unit_float,
    unpatchify,
    visible_ids,
)


# ------------------------------------------------------------------------------------------------------------
# Sec. 3.1: MAE
# ------------------------------------------------------------------------------------------------------------
def reconstruction_loss(pred, target, mask):
    """Eq. 1: L_R = 1 / l_m || D_m - I_m ||^2, over the l_m hidden patches.

    pred, target (B, L, P) hold D_m and I_m where mask (B, L) is True (hidden) -> (). Eq. 1 sums the squared
    errors of a patch; this takes their mean, as MAE's code does. For the target see `MAE.target`.
    """
    error = (pred.float() - target).square().mean(dim=-1)  # of each patch, (B, L)
    return (error * mask).sum() / mask.sum()  # the mean over hidden patches


class MAE(nn.Module):
    """Plain MAE. With --stem conv it is MCMAE: masked convolution stages replace the patch embedding."""

    def __init__(self, args, conv_cls=False):
        """args: the flags, as train.parse_args gives them. conv_cls: whether the encoder has a CLS token also
        with --stem conv. MCMAE's has none, MR-MAE's has one."""
        super().__init__()
        # Build encoder and decoder.
        if args.stem == "conv":
            self.encoder, self.decoder, self.stage_fusion = build_mcmae(args, conv_cls)
        else:
            self.encoder = build_encoder(args)
            self.decoder = build_decoder(args, self.encoder)
        self.fuse_layers = [args.depth]  # numbers, from 1, of the blocks to sum; in plain MAE the last alone

        # Count the visible patches.
        L = self.encoder.num_patches
        self.num_visible = int(L * (1 - args.mask_ratio))  # V, rounded down as in MAE's code
        if not 0 < self.num_visible < L:
            raise UserError(
                f"--mask-ratio {args.mask_ratio}: of {L} patches at least 1 must stay visible and at least 1 "
                f"be hidden"
            )
        self.norm_pix = args.norm_pix
        self.mean = args.mean
        self.std = args.std

    def predict(self, images, mask=None):
        """Every tensor of Fig. 2 (1).

        images (B, C, height, width) normalised; mask (B, L) bool, True = hidden, or None to draw one; the
        mask in use is called `hidden`. Returns latent (B, 1 + V, D), pred (B, L, P), target (B, L, P), mask
        (B, L). Without CLS latent is (B, V, D).
        """
        # Choose the visible patches, at random if no mask is given.
        L = self.encoder.num_patches
        if mask is None:
            ids = random_visible(len(images), L, self.num_visible, images.device)  # (B, V)
        else:
            ids = visible_ids(mask)  # (B, V)
        hidden = hidden_mask(ids, L)  # (B, L), equal to `mask` if that was given

        # Encode them, insert [MASK] at the hidden places, decode.
        latent = self.encode(images, ids, hidden)  # E_v with CLS in front, (B, 1 + V, D)
        pred = self.decoder(self.insert_masks(latent, ids))  # (B, L, P)
        return {"latent": latent, "pred": pred, "target": self.target(images), "mask": hidden}

    def forward(self, images, mask=None):
        """images (B, C, height, width) -> loss (), {"recon": ()}."""
        out = self.predict(images, mask)
        loss = reconstruction_loss(out["pred"], out["target"], out["mask"])  # Eq. 1
        return loss, {"recon": loss.detach()}

    def encode(self, images, ids, hidden):
        """Images -> E_v with CLS in front (B, 1 + V, D). ids (B, V): the visible patches; hidden (B, L): True
        at the others. Unlike encoder.encode this can sum the outputs of several blocks."""
        # Embed all patches and keep the visible ones. A patch embedding treats each patch by itself, so this
        # equals embedding the visible ones alone. A convolution stem looks across patches, so it needs to
        # know which are hidden. It also appends the maps of its two finer stages to the list `stages`; a
        # patch embedding leaves the list empty.
        stages = []
        x = self.encoder.embed(images, hidden, stages)  # (B, L, D)
        x = gather_tokens(x, ids)  # (B, V, D)

        # Multi-layer fusion (Sec. 3.3): sum the outputs of several blocks, CLS included. In plain MAE this is
        # the output of the last block.
        _, outputs = self.encoder.forward_blocks(x, self.fuse_layers)
        x = sum(outputs)  # (B, 1 + V, D)

        # Add the finer stages, as MCMAE does, to the patches and not to CLS. This belongs to the convolution
        # stem and is not the multi-layer fusion of Sec. 3.3.
        if stages:
            fine = sum(conv(stage) for conv, stage in zip(self.stage_fusion, stages))  # (B, D, h, w)
            fine = gather_tokens(rearrange(fine, "b d h w -> b (h w) d"), ids)  # (B, V, D)
            x = x + F.pad(fine, (0, 0, self.encoder.num_prefix_tokens, 0))  # a row of zeros for CLS
        return self.encoder.norm(x)

    def insert_masks(self, latent, ids):
        """E_v (B, 1 + V, D) -> what the decoder sees (B, 1 + L, Dd): the visible tokens at their places, ids
        (B, V), and [MASK] tokens at the others."""
        prefix = self.encoder.num_prefix_tokens
        y = self.decoder.embed(latent)  # (B, 1 + V, Dd)
        cls = y[:, :prefix]  # (B, 1, Dd)
        visible = y[:, prefix:]  # (B, V, Dd)

        # Fill all L places with [MASK], then put the visible tokens at theirs. The decoder adds positions.
        mask_tokens = self.decoder.mask_token.to(y.dtype).expand(len(y), self.encoder.num_patches, -1)
        patches = mask_tokens.scatter(1, ids.unsqueeze(-1).expand_as(visible), visible)  # (B, L, Dd)
        return torch.cat([cls, patches], dim=1)

    def target(self, images):
        """The target of Eq. 1 for all patches, (B, L, P): their pixels, by default normalised patch by patch.
        I_m is its hidden rows."""
        patches = patchify(images, self.encoder.patch_size)
        return norm_pix(patches) if self.norm_pix else patches

    def visualize(self, images):
        """Image, visible patches, reconstruction: {title: (B, 3, height, width) in [0, 1]}."""
        return self.pictures(images, self.predict(images))

    def pictures(self, images, out):
        """The pictures of `visualize`, from what `predict` gave; the reconstruction only if there is one.

        With norm_pix each hidden patch of the reconstruction gets its true mean and standard deviation, two
        numbers over all its values: so its brightness and its contrast are given, not predicted.
        """
        # Paint the hidden patches in the mean colour, which is 0 once normalised.
        p = self.encoder.patch_size
        patches = patchify(images, p)  # (B, L, P)
        hidden = out["mask"].unsqueeze(-1)  # (B, L, 1)
        panels = {"image": patches, "visible patches": patches.masked_fill(hidden, 0)}

        # Put the predictions at the hidden places.
        if "pred" in out:
            pred = out["pred"].float()  # (B, L, P)
            title = "reconstruction"
            if self.norm_pix:
                pred = undo_norm_pix(pred, patches)
                title = "reconstruction\n(true mean, std)"
            panels[title] = torch.where(hidden, pred, patches)

        # Make images of the patches.
        pictures = {}
        for title, panel in panels.items():
            picture = unpatchify(panel, self.encoder.grid, p)  # (B, 3, height, width)
            pictures[title] = denormalize(picture, self.mean, self.std).clamp(0, 1)
        return pictures

    @staticmethod
    def add_args(parser):
        add = parser.add_argument_group("MAE").add_argument

        # What is hidden, and what is predicted.
        add(
            "--mask-ratio",
            type=unit_float,
            default=0.75,
            help="share of the patches that is hidden (MR-MAE Sec. 3.1: 75 %%)",
        )
        add(
            "--norm-pix",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="normalise the target of each patch (MAE's command); losses with and without are not "
            "comparable",
        )

        # Whether a convolution stem makes the tokens.
        add(
            "--stem",
            choices=("patch", "conv"),
            default="patch",
            help="what comes before the blocks: a linear patch embedding, or the masked convolution stages "
            "of MCMAE (MR-MAE Sec. 3.3), for which patches have 16 pixels; vit.STEM_SIZES has its sizes",
        )


# ------------------------------------------------------------------------------------------------------------
# Sec. 3.2 and 3.3: MR-MAE
# ------------------------------------------------------------------------------------------------------------
def mimic_loss(mimicked, features):
    """Eq. 2: L_M = 1 / l_v || L(E_v) - F_v ||^2, over the l_v visible patches.

    mimicked L(E_v), the teacher's features F_v (B, V, Dt) -> (). Eq. 2 sums the squared errors of a token;
    this takes their mean, and first normalises each token of F_v by a LayerNorm without learned parameters.
    Both are ours: see the end of the file. With --mimic-at decoder both are of the hidden patches (B, U, Dt).
    """
    target = F.layer_norm(features.float(), features.shape[-1:])  # (B, V, Dt)
    return (mimicked.float() - target).square().mean()


def salient_visible(saliency, visible):
    """Focused mimicking (Sec. 3.3): the ids (B, V) of the V = `visible` most salient patches, in raster
    order. saliency: (B, L). (Random ones, for which no saliency is needed: vit.random_visible.)"""
    return saliency.topk(visible, dim=1).indices.sort(dim=1).values


def joint_saliency(maps):
    """Saliency of all teachers, a list of (B, L) -> (B, L): the mean of the maps, each first divided by its
    sum, so that each teacher has the same weight. (This is ours: Table 4 only says "Joint".) With one teacher
    the order of its patches stays as it is."""
    return sum(m / m.sum(dim=1, keepdim=True) for m in maps) / len(maps)


class Teacher(nn.Module):
    """A frozen ViT, with the mean and standard deviation of the images that it was trained on."""

    def __init__(self, vit, mean, std, name):
        super().__init__()
        self.vit = vit
        self.mean = mean
        self.std = std
        self.name = name
        self.grid = vit.grid  # (h, w)
        self.width = vit.width  # Dt
        self.image_size = tuple(vit.config["image_size"])  # (height, width)
        self.num_prefix_tokens = vit.num_prefix_tokens
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def features(self, images):
        """images (B, C, height, width), normalised with the teacher's own mean and std -> a dict: "tokens"
        (B, L, Dt), its patches after the final LayerNorm, and "saliency" (B, L), or None without CLS.

        Saliency is the CLS row of the last block's attention, over patches, mean over heads. It sums to less
        than 1, because the weight of CLS on itself is left out. Both are fp32.
        """
        # Move the teacher to the device of the images, at the first call. MRMAE keeps its teachers in a plain
        # list, where model.to(device) does not reach them.
        if self.vit.pos_embed.device != images.device:
            self.to(images.device)

        # Run the ViT. Under autocast its matrix products are in 16 bits; the residual stream and the final
        # LayerNorm stay in fp32, so the tokens are not rounded to 16 bits.
        has_cls = self.num_prefix_tokens > 0
        out = self.vit.features(images, attention=has_cls)

        # Read where CLS looks.
        saliency = None
        if has_cls:
            row = out["attention"][:, :, 0, 1:]  # from CLS to the patches, (B, H, L)
            saliency = row.float().mean(dim=1)  # (B, L)
        return {"tokens": out["patches"].float(), "saliency": saliency}

    def renormalize(self, images, mean, std):
        """Images (B, C, height, width) normalised with mean and std -> what the teacher was trained on: its
        own statistics and size. An oblong image is stretched to a square teacher's size."""
        # Go back to colours in [0, 1], images * std + mean, and normalise these with the teacher's mean and
        # standard deviation, all in one step.
        mean = channels(mean, images)  # (3, 1, 1), as the next three
        std = channels(std, images)
        own_mean = channels(self.mean, images)
        own_std = channels(self.std, images)
        images = images * (std / own_std) + (mean - own_mean) / own_std

        # Resize to the size that the teacher was trained at.
        bicubic = v2.InterpolationMode.BICUBIC
        return v2.functional.resize(images, self.image_size, interpolation=bicubic, antialias=True)


def resize_features(features, old_grid, new_grid):
    """What `Teacher.features` gives on one grid -> the same on another."""

    def resize(tokens):
        # Bilinear and not bicubic, because saliency must not become negative; tokens follow the same rule.
        return resize_tokens(tokens, old_grid, new_grid, mode="bilinear", antialias=True)

    saliency = features["saliency"]
    if saliency is not None:
        saliency = resize(saliency.unsqueeze(-1)).squeeze(-1)  # (B, L)
    return {"tokens": resize(features["tokens"]), "saliency": saliency}  # (B, L, Dt)


class MRMAE(MAE):
    """MR-MAE: MAE with a teacher. The teacher's CLS attention chooses the visible patches, and a linear head
    predicts the teacher's features of these patches from E_v. The ablations of Tables 3 and 4 are flags, but
    for two: row 1 of Table 3 is --method mae, "Sep." of Table 4 is finetune.py --evaluate with two runs."""

    def __init__(self, args):
        super().__init__(args, conv_cls=True)
        self.fuse_layers = fused_layers(args.fuse_layers, args.depth)  # multi-layer fusion: see MAE.encode
        self.visible = args.visible
        self.mimic_at = args.mimic_at
        self.recon_weight = args.recon_weight
        self.mimic_weight = args.mimic_weight

        # Open the teachers. They are frozen, so they stand in a plain list and not in an nn.ModuleList: thus
        # they stay out of the state dict, the optimizer, DDP and model.train().
        self.teachers = open_teachers(args, self.encoder.grid)

        # Compile their blocks here, with --compile: train.py compiles only what is part of the model.
        if args.compile:
            for teacher in self.teachers:
                for block in all_blocks(teacher):
                    block.compile(dynamic=False)

        # Leave out what no loss uses, because DDP stops at a parameter without gradient. Without L_R this is
        # the whole decoder or, if the decoder mimics, its layer for pixels.
        if not self.recon_weight:
            if self.mimic_at == "encoder":
                self.decoder = None
            else:
                self.decoder.pred = None

        # Build a mimic head, L of Eq. 2, for each teacher.
        width = args.width if self.mimic_at == "encoder" else args.decoder_width
        heads = [nn.Linear(width, teacher.width) for teacher in self.teachers]
        self.mimic_heads = nn.ModuleList(heads).apply(init_weights)

    def predict(self, images, mask=None, features=None):
        """Every tensor of Fig. 2.

        images (B, C, height, width) normalised; mask (B, L) bool, True = hidden, or None: as --visible says;
        features: for each teacher what `ask` returns for all L patches, computed before, or None to ask the
        teachers here, as training does.

        Returns a dict. A list has one entry for each teacher.

            "latent"     (B, 1 + V, D), E_v with CLS in front
            "mimicked"   a list of L(E_v), (B, V, Dt); with --mimic-at decoder (B, U, Dt)
            "features"   a list of F_v of the same shapes: those rows of the features that are mimicked
            "saliency"   a list of (B, L), or of None for a teacher without CLS
            "mask"       (B, L) bool, True = hidden
            "ids"        (B, V), the visible patches
            "pred"       (B, L, P), as in MAE; this and the next are missing if --recon-weight is 0
            "target"     (B, L, P)
        """
        # Ask the teachers for the features of all patches, and where their CLS looks.
        answers = features or [self.ask(teacher, images) for teacher in self.teachers]
        saliency = [answer["saliency"] for answer in answers]  # each (B, L), or None without CLS

        # Choose the visible patches; by focused mimicking (Sec. 3.3) they are the most salient ones.
        L = self.encoder.num_patches
        if mask is not None:
            ids = visible_ids(mask)  # (B, V)
        elif self.visible == "random":
            ids = random_visible(len(images), L, self.num_visible, images.device)  # (B, V)
        else:
            ids = salient_visible(joint_saliency(saliency), self.num_visible)  # (B, V)
        hidden = hidden_mask(ids, L)  # (B, L), equal to `mask` if that was given

        # Gather F_v, the teachers' features that are to be predicted: of the visible patches or, with
        # --mimic-at decoder, of the hidden ones. (`visible_ids` lists where its argument is False, so of
        # ~hidden it lists the hidden patches.)
        mimic_ids = ids if self.mimic_at == "encoder" else visible_ids(~hidden)  # (B, V), or (B, U)
        F_v = [gather_tokens(answer["tokens"], mimic_ids) for answer in answers]  # each (B, V or U, Dt)

        # Encode the visible patches.
        latent = self.encode(images, ids, hidden)  # E_v with CLS in front, (B, 1 + V, D)
        out = {"latent": latent, "features": F_v, "saliency": saliency, "mask": hidden, "ids": ids}

        # Insert [MASK] at the hidden places and decode.
        if self.decoder is not None:
            decoded = self.decoder.features(self.insert_masks(latent, ids))  # (B, L, Dd)

        # Predict pixels. Eq. 1 reads D_m and I_m out of these.
        if self.recon_weight:
            out["pred"] = self.decoder.pred(decoded)  # (B, L, P)
            out["target"] = self.target(images)  # (B, L, P)

        # Predict the teachers' features, L(E_v), from E_v without CLS or, with --mimic-at decoder, from the
        # decoder's hidden tokens.
        if self.mimic_at == "encoder":
            head_input = latent[:, 1:]  # (B, V, D)
        else:
            head_input = gather_tokens(decoded, mimic_ids)  # (B, U, Dd)
        out["mimicked"] = [head(head_input) for head in self.mimic_heads]  # each (B, V or U, Dt)
        return out

    def ask(self, teacher, images):
        """What `Teacher.features` gives for our images, on our grid: {"tokens": (B, L, Dt), "saliency": (B,
        L), or None without CLS}."""
        features = teacher.features(teacher.renormalize(images, self.mean, self.std))
        if teacher.grid == self.encoder.grid:
            return features
        return resize_features(features, teacher.grid, self.encoder.grid)

    def forward(self, images, mask=None, features=None):
        """images (B, C, height, width) -> loss (), {"mimic": (), and unless --recon-weight is 0 "recon": ()}.
        With two teachers also "mimic_1" and "mimic_2", whose mean is "mimic"."""
        out = self.predict(images, mask, features)

        # Eq. 2: L_M, the mean over the teachers.
        mimics = [mimic_loss(*pair) for pair in zip(out["mimicked"], out["features"])]
        mimic = sum(mimics) / len(mimics)
        metrics = {"mimic": mimic.detach()}

        # Eq. 1: L_R. With --recon-weight 0 nothing predicts pixels.
        recon = 0
        if self.recon_weight:
            recon = reconstruction_loss(out["pred"], out["target"], out["mask"])
            metrics["recon"] = recon.detach()

        # Sec. 4.1: .5 L_R + .5 L_M.
        loss = self.recon_weight * recon + self.mimic_weight * mimic

        # With two teachers, log the mimic loss of each, too.
        if len(mimics) > 1:
            metrics |= {f"mimic_{i}": value.detach() for i, value in enumerate(mimics, start=1)}
        return loss, metrics

    def visualize(self, images):
        """Image, the saliency of each teacher that has CLS (Sec. 3.3), visible patches and, unless
        --recon-weight is 0, the reconstruction: {title: (B, 3, height, width) in [0, 1]}.

        train.render_panels adds what Fig. 3 shows: where CLS looks in the encoder that is being trained.
        """
        out = self.predict(images)
        pictures = self.pictures(images, out)
        image = pictures.pop("image")

        # Draw the attention maps; they come after the image.
        attention = {}
        for i, (teacher, saliency) in enumerate(zip(self.teachers, out["saliency"]), start=1):
            if saliency is not None:
                maps = saliency.unflatten(1, self.encoder.grid)  # (B, h, w)
                attention[f"attention of\nteacher {i}: {teacher.name}"] = heat_map(maps, image)
        return {"image": image, **attention, **pictures}

    def export(self):
        """What encoder.pt holds: the encoder, without fusion, heads and decoder. Its feature is "mean": a
        probe should read the mean of the patches and not CLS, as fine-tuning does in MCMAE's code."""
        return pack_encoder(self.encoder, "mrmae", "mean", self.mean, self.std)

    @staticmethod
    def add_args(parser):
        MAE.add_args(parser)
        add = parser.add_argument_group("MR-MAE").add_argument

        # The teacher, and which patches it lets the student see.
        add(
            "--teacher",
            nargs="+",
            metavar="TEACHER",
            help="one (Sec. 4.1: clip) or two (Table 4) of clip, clip:FILE, dino, dino:FILE or an "
            "encoder.pt; clip and dino, both ViT-B/16, are downloaded into torch.hub's cache",
        )
        add(
            "--visible",
            choices=("top-k", "random"),
            default="top-k",
            help="the most salient patches, or random ones (Table 3: focused mimicking or not)",
        )

        # Where the student mimics.
        add(
            "--fuse-layers",
            type=positive_int,
            nargs="+",
            metavar="BLOCK",
            help="blocks whose outputs are summed; the last one alone: no fusion (Table 3) [four, evenly "
            "spaced: ours]",
        )
        add(
            "--mimic-at",
            choices=("encoder", "decoder"),
            default="encoder",
            help="mimic visible tokens after the encoder, or hidden ones after the decoder (Table 3)",
        )

        # The weights of both losses.
        add(
            "--recon-weight",
            type=natural_float,
            default=0.5,
            help="weight of Eq. 1 (Sec. 4.1); 0: mimic only, without a decoder unless it mimics (Table 3)",
        )
        add(
            "--mimic-weight",
            type=positive_float,
            default=0.5,
            help="weight of Eq. 2 (Sec. 4.1); pixels alone are --method mae",
        )
        parser.set_defaults(epochs=2)  # ours, for a laptop


# ============================================================================================================
# A first reading may stop here. What follows: MCMAE's parts, the checks of flags, teachers by name and file,
# the names of the authors' checkpoints, and where the paper is silent.
# ============================================================================================================
def build_mcmae(args, class_token):
    """Encoder and decoder of --stem conv, and for each of its two finer stages a convolution that brings the
    stage's map to the token grid. (That is not the multi-layer fusion of Sec. 3.3.)"""
    sizes = STEM_SIZES[args.size]
    stem = {key: sizes[key] for key in ("widths", "depths", "mlp_ratios")}
    encoder = build_encoder(args, class_token=class_token, stem=stem)
    decoder = build_decoder(args, encoder, mlp_ratio=sizes["decoder_mlp_ratio"])

    # A patch holds 4 x 4 places of stage 1 and 2 x 2 of stage 2.
    to_grid = [nn.Conv2d(width, args.width, k, stride=k) for width, k in zip(sizes["widths"], (4, 2))]
    return encoder, decoder, nn.ModuleList(to_grid).to(memory_format=torch.channels_last)


def fused_layers(asked, depth):
    """--fuse-layers -> the numbers of the blocks to sum, in order. By default (None) they are four evenly
    spaced ones (fewer if depth < 4), the last among them."""
    if asked is None:
        return sorted({depth * i // 4 for i in (1, 2, 3, 4)} - {0})
    if max(asked) != depth or len(set(asked)) < len(asked):
        raise UserError(
            f"--fuse-layers {' '.join(map(str, asked))}: give blocks from 1 to {depth}, each at most once "
            f"and the last block, {depth}, among them, or it would learn nothing"
        )
    return sorted(asked)


def open_teachers(args, grid):
    """--teacher -> a list of one or two Teachers. grid: the student's."""
    words = args.teacher or []
    if not 1 <= len(words) <= 2:
        raise UserError(
            f"--teacher: give one or two (now {len(words)}) of clip, dino (both downloaded), clip:FILE, "
            f"dino:FILE or an encoder.pt; to make one: python train.py --method mixedae, then --teacher "
            f"runs/mixedae/encoder.pt"
        )
    teachers = [open_teacher(word, grid) for word in words]
    if args.visible != "random" and not all(teacher.num_prefix_tokens for teacher in teachers):
        raise UserError(
            f"--teacher {' '.join(words)}: a teacher without class token has no saliency; use --visible "
            f"random or another teacher"
        )
    return teachers


# ------------------------------------------------------------------------------------------------------------
# Teachers by name and file
# ------------------------------------------------------------------------------------------------------------
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_SHA256 = "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"  # of OpenAI's ViT-B/16
URLS = {
    "clip": f"https://openaipublic.azureedge.net/clip/models/{CLIP_SHA256}/ViT-B-16.pt",
    "dino": "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
}


def open_teacher(word, grid):
    """One value of --teacher -> Teacher. Prints what it is. grid: the student's.

    To mimic something else, write an nn.Module with the attributes `grid`, `width`, `num_prefix_tokens` (0:
    it has no saliency) and `name` and with the methods `features` and `renormalize`, and return one here. As
    `Teacher` does, it must freeze its parameters, be in eval mode, run `features` without gradients, and move
    itself to the device of the images.
    """
    # Find the file.
    kind, colon, path = word.partition(":")
    published = kind in URLS
    if not published:
        path = word
    elif not colon:
        path = download(kind)
    if not os.path.isfile(path):
        raise UserError(f"--teacher {word}: no such file, nor clip, clip:FILE, dino or dino:FILE")

    # Read it.
    if published:
        try:
            weights = read_weights(kind, path, official=not colon)
            if {"config", "state_dict"} <= weights.keys():
                raise ValueError(f"it is an encoder.pt of this project: give it without {kind}:")
            teacher = clip_visual(weights) if kind == "clip" else dino(weights)
        except Exception as error:  # a file of something else makes them raise all kinds
            why = one_line(error, 500)
            raise UserError(f"--teacher {word}: not a ViT of {kind.upper()} ({why})") from None
    else:
        vit, info = load_encoder(path)
        teacher = Teacher(vit, info["mean"], info["std"], info["method"])

    # Check it and say what it is.
    config = teacher.vit.config
    if config["channels"] != 3:
        raise UserError(f"--teacher {word}: takes images of {config['channels']} channels, not 3")
    height, width = teacher.image_size
    h, w = teacher.grid
    resized = "" if teacher.grid == grid else f", resized to our {grid[0]} x {grid[1]}"
    print_rank0(
        f"teacher {word}: ViT {teacher.width} wide, {config['depth']} blocks; sees {height} x {width} "
        f"pixels, {h} x {w} patches{resized}"
    )
    return teacher


def download(kind):
    """The published file of "clip" or "dino" -> its path in torch.hub's cache. A file that is there is not
    fetched again."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(URLS[kind]).name
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            # One process of this machine downloads; the others wait here and then find the file.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                part = path.with_suffix(".part")
                torch.hub.download_url_to_file(URLS[kind], part)
                read_weights(kind, part, official=True)  # a wrong or a damaged file never gets its name
                part.rename(path)
    except Exception as error:  # no network, a full disk, a wrong hash, half a file
        raise UserError(
            f"--teacher {kind}: {URLS[kind]} could not be downloaded to {path} ({one_line(error, 250)}); "
            f"download it elsewhere and give --teacher {kind}:FILE"
        ) from None
    return path


def read_weights(kind, path, official):
    """The state dict in a file of "clip" or "dino", of which no unknown code is run.

    OpenAI's archive of CLIP is a TorchScript file, which can hold code: it is opened only if its hash is
    right. Every other file must be a plain state dict. official: accept only OpenAI's own archive of CLIP.
    """
    if kind == "dino":  # its authors publish no hash to compare with
        return load_file(path)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest == CLIP_SHA256:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch.jit will go, but CLIP's file needs it
            return torch.jit.load(path, map_location="cpu").state_dict()
    refusal = (
        f"{path}: its sha256 {digest[:12]}... is not that of OpenAI's ViT-B/16 ({CLIP_SHA256[:12]}...), so "
        f"it is not opened as TorchScript, which can hold code"
    )
    if official:
        raise UserError(f"{refusal}. Remove it and download it again")
    try:
        return load_file(path)
    except UserError as error:
        raise UserError(f"{refusal}; nor is it a plain state dict: {error}") from None


def vit_of(weights, heads):
    """A new ViT with the shape of these weights, which have our names.

    heads: None is width // 64, as in CLIP and DINO.
    """
    shape = read_shape(weights)
    return ViT(**shape, heads=heads or shape["width"] // 64)


def quick_gelu(x):
    """CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


def make_clip(vit):
    """Turn our ViT into CLIP's: no bias in the patch embedding, a LayerNorm before the blocks, eps 1e-5,
    QuickGELU."""
    vit.patch_embed.proj.bias = None
    vit.norm_pre = nn.LayerNorm(vit.width)
    for module in vit.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    for block in vit.blocks:
        block.mlp.activation = quick_gelu


def clip_visual(state_dict, heads=None):
    """OpenAI's weights of CLIP (of the whole model or of its visual tower, fp16 or fp32) -> Teacher.

    Its projection, which is for CLS, is not used. heads: see `vit_of`.
    """
    # Take the visual tower, rename its parts, then what is in a block.
    everything = strip_prefixes(find_weights(state_dict, "clip"))
    visual = {name: value for name, value in everything.items() if name.startswith("visual.")}
    weights = rename(visual or everything, [(r"^visual\.", "")])
    parts = [
        (r"^class_embedding$", "cls_token"),
        (r"^positional_embedding$", "pos_embed"),
        (r"^conv1\.", "patch_embed.proj."),
        (r"^ln_pre\.", "norm_pre."),
        (r"^ln_post\.", "norm."),
        (r"^transformer\.resblocks\.", "blocks."),
    ]
    in_a_block = [
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.attn\.in_proj_", ".attn.qkv."),
        (r"\.attn\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.c_fc\.", ".mlp.fc1."),
        (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    ]
    weights = rename(rename(weights, parts), in_a_block)
    weights.pop("proj", None)
    width = len(weights["cls_token"])
    if width > 1024 or width % 64:
        raise ValueError(f"width {width}; only OpenAI's ViTs are known, at most 1024 wide with heads of 64")
    weights["cls_token"] = weights["cls_token"].view(1, 1, -1)
    weights["pos_embed"] = weights["pos_embed"].unsqueeze(0)

    # Fill a ViT of that shape.
    vit = vit_of(weights, heads)
    make_clip(vit)
    load_strictly(vit, weights)  # fp16 values become fp32
    return Teacher(vit, CLIP_MEAN, CLIP_STD, "clip")


def dino_positions(table, old_grid, new_grid):
    """How DINO resizes its position table: by the factors (new + .1) / old. The .1 keeps the result from
    being rounded down to a smaller grid, and moves the sampling points a little.

    In our training a teacher gets images of its own size and does not need it.
    """
    factors = [(new + 0.1) / old for new, old in zip(new_grid, old_grid)]
    return resize_positions(table, old_grid, new_grid, size=None, scale_factor=factors)


def dino(state_dict, heads=None):
    """DINO's weights (of its backbone, or a full checkpoint, of which the teacher is taken) -> Teacher.

    heads: see `vit_of`.
    """
    weights = strip_prefixes(find_weights(state_dict, "dino"))
    unused = ("head.", "mask_token")  # DINOv2 has a mask token
    weights = {name: value for name, value in weights.items() if not name.startswith(unused)}
    vit = vit_of(weights, heads)
    load_strictly(vit, weights)
    vit.resize = dino_positions
    return Teacher(vit, MEAN, STD, "dino")


# ------------------------------------------------------------------------------------------------------------
# The authors' checkpoints
# ------------------------------------------------------------------------------------------------------------
def from_official_mae(state_dict):
    """The names of a full published MAE file (encoder and decoder) -> those of `MAE`.

    A file's {"model": ...} is unwrapped.
    """
    pairs = [
        (r"^mask_token$", "decoder.mask_token"),
        (r"^decoder_", "decoder."),
        (r"^", "encoder."),
    ]
    return rename(state_dict.get("model", state_dict), pairs)


def from_official_mcmae(state_dict):
    """The names of a published MCMAE file -> those of `MAE` with --stem conv.

    A file's {"model": ...} is unwrapped.
    """
    pairs = [
        (r"^mask_token$", "decoder.mask_token"),
        (r"^decoder_", "decoder."),
        (r"^stage1_output_decode\.", "stage_fusion.0."),
        (r"^stage2_output_decode\.", "stage_fusion.1."),
        (r"^patch_embed4\.", "encoder.patch_embed.proj."),
        (r"^patch_embed([123])\.", r"encoder.patch_embed.embed\1."),
        (r"^blocks([12])\.", r"encoder.patch_embed.blocks\1."),
        (r"^blocks3\.", "encoder.blocks."),
        (r"^", "encoder."),
    ]
    return rename(state_dict.get("model", state_dict), pairs)


def from_published(state_dict):
    """A published file of MAE or of MCMAE, told apart by its names."""
    mcmae = "patch_embed4.weight" in state_dict.get("model", state_dict)
    return from_official_mcmae(state_dict) if mcmae else from_official_mae(state_dict)


# ------------------------------------------------------------------------------------------------------------
# Where the paper is silent
# ------------------------------------------------------------------------------------------------------------
# We found no training code of MR-MAE: the address in its abstract holds MCMAE's. First, where MR-MAE follows
# MAE and MCMAE, their code decides (github.com/facebookresearch/mae, github.com/Alpha-VL/ConvMAE):
# - Targets normalised patch by patch (norm_pix), fixed positions, the initialisation, AdamW's betas. L_R is a
#   mean over the values of a patch and then over hidden patches.
# - "Multi-scale block-wise masking": there is one mask, on the grid of tokens. The convolution stages get
#   the same mask, each entry repeated over the 4 x 4 or 2 x 2 places of its patch. It must be so: their 5
#   x 5 convolutions look across patches, and with a mask of their own they would carry pixels of a hidden
#   patch into visible ones.
# - MCMAE brings the features of stages 1 and 2 to the token grid by a convolution each and adds them to
#   the output of the last block, before the final norm; fine-tuning drops them.
# - MCMAE (`--method mae --stem conv`) has no CLS token. Its authors say that MR-MAE's encoder got one
#   (their issue 19), so `--method mrmae --stem conv` has one.
#
# - Order of tokens: raster. MAE's code keeps the shuffled order of the draw; the encoder cannot tell.
#
# Where both are silent, the choice is ours. In the order of the diagram above:
# - Augmentation: the random crop of MAE and of MixedAE (its Sec. 4.1). The paper says nothing of it.
# - The teacher sees the same crop, with its own image statistics and at the size that it was trained at. An
#   oblong crop is stretched to a square teacher's size. If its grid then differs from ours, its features and
#   saliency are resized to ours.
# - Which teachers: `dino` is ViT-B/16 of DINO (Caron et al., the paper's reference [7]); the paper does not
#   say which ViT it took. (Sec. 4.1 and Fig. 3 cite [47] instead, a detector of the same name.) Nor does it
#   name the teachers of the other sizes: `clip` and `dino` are ViT-B/16 for students of every size.
# - Focused masks choose what the *encoder* sees ("we select the most salient tokens ... for visible feature
#   mimicking"). Saliency is the softmax of the teacher's last layer: the row of CLS, patches only, mean over
#   heads. "Most salient" means the top k: the mask of an image then depends on nothing but its crop. MILAN,
#   which the paper calls similar, samples in proportion to saliency; on our data that was neither better nor
#   worse (docs/results.md). A third reading, random masks and a mimic loss on their salient tokens alone, is
#   not here.
# - F_v are the teacher's patch tokens after its last block and its final LayerNorm, without CLS (Eq. 2 counts
#   l_v patches). CLIP itself applies this norm and the projection behind it to CLS alone. We keep the norm,
#   and drop the projection, which would change the width.
# - Multi-layer fusion sums the residual stream after four evenly spaced blocks, the last among them (of 12:
#   3, 6, 9, 12; of the 11 of --stem conv: 2, 5, 8, 11), and then applies one final norm. The encoder that
#   transfers has no fusion: there this norm, trained on the sum, reads the last block alone. (Fine-tuning
#   trains a new norm.)
# - The stem's finer stages, 1 and 2, are added to the sum of multi-layer fusion, at patches and not at CLS.
# - The mimic head reads E_v after the final norm, as the decoder does, and has a bias. Mimic only (Table 3,
#   sixth row) has no decoder.
# - L_M normalises each token of F_v by a LayerNorm without learned parameters. Eq. 2 has no normalisation.
#   Ours gives L_M the scale of norm_pix pixels; without it the weights .5 : .5 would mean nothing.
# - L_M is a mean like L_R, over the values of a feature and then over visible patches. Eq. 1 and 2 sum over
#   the values; a patch of 16 x 16 pixels and a feature of ViT-B both have 768 of them, so the balance .5 : .5
#   is the same.
# - Two teachers (Table 4, "Joint") have a head each. L_M is the mean of both losses, and saliency the mean of
#   both maps, each divided by its sum.
# - Both targets at the decoder: Table 3, fifth row, prints L_R in the column of high-level targets. From the
#   text of Sec. 4.3 we read L_M there: a linear layer on the decoder's last norm, at hidden patches, in place
#   of the encoder's.
# - The recipe: "maximum learning rate 1.5e-4" is read as a base rate, as in MAE, and so is the 3e-4 of
#   fine-tuning. Warm-up is the same share of a run at every length.
# - Which feature transfers: probes and fine-tuning read the mean of the patches (`MRMAE.export`).
#
# The paper contradicts itself. Its "mask ratio 25%" is what stays visible. 85.8 % belongs to 400 epochs
# (Table 5), not 200 (introduction). The introduction puts MR-MAE 1.4 points (base) and 4.1 (huge) above
# CLIP's 84.2, which is 85.6 and 88.3; the tables have 85.5 (200 epochs) or 85.8 (400), and 88.5. MAE-B has
# 83.6 and 83.8, box AP at 200 epochs is 52.7 and 53.0. "Huge-392" is Huge-393 in Table 6, and neither is a
# multiple of 16 (392 is 28 x 14, the patch of MAE's ViT-H, which the stem's strides 4 x 2 x 2 cannot make).


if __name__ == "__main__":  # the shapes of what `predict` returns
    from train import parse_args

    print("The teacher is a small ViT with random weights: it is here for the shapes alone.")
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save(pack_encoder(ViT((64, 64), 8, 96, 2, 2), "untrained", "cls", MEAN, STD), file.name)
        model = MRMAE(parse_args(["--method", "mrmae", "--teacher", file.name]))
    for name, value in model.predict(torch.randn(2, 3, 64, 64)).items():
        tensors = value if isinstance(value, list) else [value]  # a list has a tensor for each teacher
        print(f"{name:10}", *(tuple(tensor.shape) for tensor in tensors))
