"""Mixed Autoencoder (MixedAE), Chen et al., CVPR 2023, arXiv 2303.17152.

Reading order of the project: vit -> mrmae -> **mixedae** -> cae -> data -> train -> finetune -> dense.

Mix the patches of n = 1/r images into one, let each patch find the patches of its own image, and rebuild all
n images (Fig. 2):

    images (B, C, height, width)
        -- patchify, n consecutive images are a group --> groups  (G, n, L, P)
        -- mix with M, Eq. 1 ---------------------------> mixed   (G, L, P)
        -- patch embedding + positions + segments ------> tokens  (G, L, D)
        -- CLS, encoder with homologous attention, Eq. 6 -> z     (G, 1 + L, D)
              '-- projector --> homologous contrastive loss, Eq. 7
        -- decoder.embed, unmix with M, Eq. 3 ----------> unmixed (G n, 1 + L, Dd)
        -- decoder -------------------------------------> pred    (G n, L, P)
              '-- against the clean patches --> reconstruction loss, Eq. 4
    loss = Eq. 4 + lambda Eq. 7, which is Eq. 8

In compose mode each group gives one mixed image, so G = B r. In full mode (Sec. 3.2, Fig. 4) each group
enters n times, every time with a mask of its own, so G = B. All that follows is the same.

    the paper            here
    x_i^j                groups[j, i]: image i of group j. The functions below treat all groups at once.
    r, n                 args.mixing_ratio, self.n = 1/r
    M                    sources: which image gives each patch, 0 .. n-1 (the paper counts 1 .. 1/r)
    1(M = i)             indicator(sources, n)[:, i]
    x_hat, z_hat         mixed, z (after the final LayerNorm; z_pre_ln before it)
    z_i, y_i             unmixed, pred
    x_i in Eq. 4         target
    [MASK]               decoder.mask_token
    K                    args.topk times L
    tau, lambda          self.tau, self.homocon_weight

Run it:             python train.py --method mixedae
See the shapes:     python mixedae.py                    (or: python mixedae.py --mixing-mode full)
Naive mixing:       add --topk 1 --homocon-weight 0 --no-segment-embedding      (the baseline of Sec. 3.1)

The log shows `recon` (Eq. 4), `homocon` (Eq. 7) beside the floor that it approaches and cannot pass, and
`accuracy`, the sampling accuracy of Fig. 6, which is r by chance.

A new mask replaces `draw_sources`. A new loss is one more paragraph of `MixedAE.forward`. Eq. 6 is
`Attention.explicit` with `keep_topk` in vit.py. Eq. 5 is a statement about data, not about the network, so it
is a test: test_eq_5_... in tests/test_mixedae.py (equal for independent images, strict for dependent ones; M
must be known). What the paper leaves open is listed at the end of this file.
"""

import argparse
import math
import sys

import torch
import torch.nn.functional as F
from einops import repeat
from torch import nn

from data import COLOURS, denormalize
from vit import (
    UserError,
    build_decoder,
    build_encoder,
    init_weights,
    natural_float,
    natural_int,
    norm_pix,
    pack_encoder,
    patchify,
    positive_float,
    undo_norm_pix,
    unit_float,
    unpatchify,
)

PROJECTOR_WIDTH = 128  # E, output width of the linear projector right before Eq. 7 (Sec. 4.1)


# ------------------------------------------------------------------------------------------------------------
# Sec. 3.1: mixing and unmixing
# ------------------------------------------------------------------------------------------------------------
def draw_sources(count, n, patches, device):
    """M of Eq. 2, `count` times: which of the n images gives each patch, (count, L) in 0 .. n-1.

    Each image gives exactly r L = L / n patches, at random places.
    """
    balanced = torch.arange(patches, device=device) // (patches // n)  # (L,): 0 .. 0, 1 .. 1, ...
    shuffle = torch.rand(count, patches, device=device).argsort(dim=1)  # (count, L)
    return balanced[shuffle]


def indicator(sources, n):
    """1(M = i) for each image i: sources (G, L) -> bool (G, n, L)."""
    return sources.unsqueeze(1) == torch.arange(n, device=sources.device).view(1, n, 1)


def mix(x, sources):
    """Eq. 1: x_hat = sum_i 1(M = i) x_i.

    Clean patches x (G, n, L, P), sources M (G, L) -> mixed x_hat (G, L, P).
    """
    own = indicator(sources, x.shape[1])  # (G, n, L)
    return (own.unsqueeze(-1) * x).sum(dim=1)  # (G, L, P)


def unmix(z, sources, n, mask_token):
    """Eq. 3: z_i = 1(M = i) z_hat + [1 - 1(M = i)] [MASK].

    z_hat (G, 1 + L, Dd) after decoder.embed, CLS first; sources M (G, L); mask_token (1, 1, Dd)
    -> (G n, 1 + L, Dd): the n images of a group one after the other, each with a copy of CLS.
    """
    own = F.pad(indicator(sources, n), (1, 0), value=True)  # CLS goes to every image, (G, n, 1 + L)
    mask_token = mask_token.to(z.dtype).unsqueeze(1)  # (1, 1, 1, Dd)
    unmixed = torch.where(own.unsqueeze(-1), z.unsqueeze(1), mask_token)  # (G, n, 1 + L, Dd)
    return unmixed.flatten(0, 1)


def reconstruction_loss(pred, target, sources):
    """Eq. 4: L_recon = sum_i sum_l [1 - 1(M_l = i)] (y_i,l - x_i,l)^2, as a mean.

    pred y and target x (G n, L, P), sources M (G, L) -> (). The mean runs over the hidden patches, those with
    M_l != i, and over their P values.
    """
    n = len(pred) // len(sources)
    hidden = ~indicator(sources, n).flatten(0, 1)  # 1 - 1(M = i), (G n, L)
    error = (pred.float() - target).square().mean(dim=-1)  # (G n, L)
    return (error * hidden).sum() / hidden.sum()


# ------------------------------------------------------------------------------------------------------------
# Sec. 3.2: homologous recognition. Eq. 6, the attention, is `Attention.explicit` with `keep_topk` in vit.py.
# ------------------------------------------------------------------------------------------------------------
def homologous_pairs(sources):
    """Whether two patches come from the same image, itself included: (G, L) -> bool (G, L, L)."""
    return sources.unsqueeze(1) == sources.unsqueeze(2)


def homologous_contrastive_loss(z, sources, tau, positives="separate"):
    """Eq. 7: L_HomoCon = - sum_l sum_l+ log( exp(cos(z_l, z_l+) / tau)
                                       / sum_{l' != l} exp(cos(z_l, z_l') / tau) ), as a mean.

    z (G, L, E) in fp32, patches after the projector; sources (G, L) -> (), the mean over l+, l and the mixed
    images. l' runs over the L - 1 other patches of the mixed image. positives (Table 3c): with "separate", l+
    runs over the r L - 1 other patches of l's image; with "mean" there is one positive, the average of z over
    the r L patches of that image, l among them.

    With "separate" it cannot fall below log(r L - 1): the r L - 1 positives of a patch all stand in its
    denominator, so their shares sum to at most 1, and the mean of -log of them is at least log(r L - 1).
    """
    # Compare each patch l with each patch l'.
    cos = F.normalize(z, dim=-1) @ F.normalize(z, dim=-1).transpose(1, 2)  # cos(z_l, z_l'), (G, L, L)

    # Sum the denominator over all patches but l itself.
    itself = torch.eye(z.shape[1], dtype=torch.bool, device=z.device)  # (L, L)
    others = (cos / tau).masked_fill(itself, float("-inf"))  # exp(-inf) = 0, (G, L, L)
    log_denominator = others.logsumexp(dim=-1, keepdim=True)  # (G, L, 1)

    # Take the average of an image as its only positive (Table 3c, second row), or ...
    homologous = homologous_pairs(sources)
    if positives == "mean":
        centre = homologous.float() @ z / homologous.sum(dim=-1, keepdim=True)  # (G, L, E)
        score = F.cosine_similarity(z, centre, dim=-1).unsqueeze(-1) / tau  # (G, L, 1)
        return (log_denominator - score).mean()

    # ... each homologous patch by itself. Every patch has r L - 1 of them, so that one mean over all pairs is
    # the mean over l+ and then over l.
    positive = homologous & ~itself  # (G, L, L)
    loss = log_denominator - cos / tau  # -log(exp(cos / tau) / denominator), (G, L, L)
    return (loss * positive).sum() / positive.sum()


def sampling_accuracy(attention, keep, sources, k):
    """Fig. 6: of the key patches that TopK keeps for a query patch, the share from its own image -> ().

    Chance is r, and the most that can be reached is r L / K where K > r L. attention (G, H, 1 + L, 1 + L),
    probabilities; keep: what TopK kept, bool of the same shape, or None in a global layer, where the k key
    patches of the highest probability stand for it; sources (G, L).
    """
    if keep is None:
        attention = attention[..., 1:, 1:]  # (G, H, L, L)
        best = attention.topk(k, dim=-1).indices  # softmax keeps the order of the scores, (G, H, L, k)
        keep = torch.zeros_like(attention, dtype=torch.bool).scatter(-1, best, True)
    else:
        keep = keep[..., 1:, 1:]  # (G, H, L, L)
    right = keep & homologous_pairs(sources).unsqueeze(1)  # (G, H, L, L)
    return right.sum() / keep.sum().clamp(min=1)


# ------------------------------------------------------------------------------------------------------------
# The method
# ------------------------------------------------------------------------------------------------------------
class MixedAE(nn.Module):
    """MixedAE of Fig. 2. Its flags make the rows of Table 3 as well, and naive mixing (Sec. 3.1)."""

    def __init__(self, args):
        super().__init__()
        check_args(args)
        num_patches = math.prod(side // args.patch_size for side in args.image_size)  # L
        self.n = images_per_group(args, num_patches)
        self.masks_per_group = self.n if args.mixing_mode == "full" else 1  # Fig. 4
        self.mean = args.mean
        self.std = args.std

        # Use homologous attention in all layers but the first ones (Sec. 3.2, Table 3e). K = L keeps every
        # key, which is global attention (Table 3d).
        k = keys_per_query(args, num_patches)  # K of Eq. 6
        layer_k = k if k < num_patches else None
        topk = [None] * args.global_layers + [layer_k] * (args.depth - args.global_layers)
        self.encoder = build_encoder(args, topk=topk, cls_in_topk=args.cls_in_topk)

        # Choose how many of the top keys the sampling accuracy scores in layers without TopK: K as well. With
        # K = L it would always equal chance, so there it is the number of true matches, r L.
        self.scored_keys = layer_k or num_patches // self.n

        # Give each image of a group a learned vector (Sec. 3.2, Fig. 3b). The std is ours, that of CLS.
        self.segments = None
        if args.segment_embedding:
            self.segments = nn.Parameter(torch.empty(self.n, args.width).normal_(std=0.02))

        # Build what the losses need, and nothing else: DistributedDataParallel stops on a parameter that gets
        # no gradient.
        self.recon_weight = args.recon_weight
        self.norm_pix = args.norm_pix
        if self.recon_weight:
            self.decoder = build_decoder(args, self.encoder)
        self.homocon_weight = args.homocon_weight  # lambda
        self.homocon_position = args.homocon_position
        self.homocon_positives = args.homocon_positives
        self.tau = args.temperature
        if self.homocon_weight:
            self.projector = nn.Linear(args.width, PROJECTOR_WIDTH)
            self.projector.apply(init_weights)
        if not self.recon_weight and self.homocon_position == "pre-ln":
            self.encoder.norm.requires_grad_(False)  # there is no decoder, and Eq. 7 reads what comes before

    def predict(self, images, mask=None):
        """Every tensor of Fig. 2.

        images (B, C, height, width), normalised. mask: M as source ids in 0 .. n-1, (G, L), in full mode
        (B r, n, L); None draws it.
        Returns mixed (G, L, P), sources (like `mask`), z (G, 1 + L, D) after the final LayerNorm and z_pre_ln
        before it, and unless --recon-weight is 0 unmixed (G n, 1 + L, Dd), pred and target (G n, L, P). The
        rows of the last three are ordered by group, mask, image.
        """
        n = self.n
        if len(images) % n:
            raise UserError(
                f"{len(images)} images cannot be split into groups of n = {n}; give a multiple of {n}"
            )

        # Put n consecutive images into a group. In full mode each group enters once for each of its masks.
        x = patchify(images, self.encoder.patch_size)  # (B, L, P)
        groups = repeat(x, "(g n) l p -> (g m) n l p", n=n, m=self.masks_per_group)  # (G, n, L, P)

        # Draw M, or take the one that is given. A mask of your own belongs into `draw_sources`.
        if mask is None:
            sources = draw_sources(len(groups), n, x.shape[1], x.device)  # (G, L)
        else:
            sources = mask.flatten(0, -2)  # (G, L)

        # Mix (Eq. 1). The patch embedding is a convolution, so it gets the mixed patches as an image.
        mixed = mix(groups, sources)  # (G, L, P)
        mixed_images = unpatchify(mixed, self.encoder.grid, self.encoder.patch_size)

        # Embed, and mark the patches of each image with its segment embedding (Sec. 3.2).
        tokens = self.encoder.embed(mixed_images)  # (G, L, D)
        if self.segments is not None:
            tokens = tokens + F.embedding(sources, self.segments)  # (G, L, D)

        # Encode. Homologous attention (Eq. 6) is at work in the blocks.
        z_pre_ln, _ = self.encoder.forward_blocks(tokens)  # (G, 1 + L, D)
        z = self.encoder.norm(z_pre_ln)  # (G, 1 + L, D)
        out = {"mixed": mixed, "sources": sources, "z": z, "z_pre_ln": z_pre_ln}
        if self.masks_per_group > 1:
            out["sources"] = sources.unflatten(0, (-1, n))  # (B r, n, L)

        # Unmix (Eq. 3) and decode, each image as a sequence of its own.
        if self.recon_weight:
            embedded = self.decoder.embed(z)  # (G, 1 + L, Dd)
            out["unmixed"] = unmix(embedded, sources, n, self.decoder.mask_token)  # (G n, 1 + L, Dd)
            out["pred"] = self.decoder(out["unmixed"])  # (G n, L, P)
            clean = groups.flatten(0, 1)  # (G n, L, P)
            out["target"] = norm_pix(clean) if self.norm_pix else clean
        return out

    def forward(self, images, mask=None):
        """Eq. 8: L_MixedAE = L_recon + lambda L_HomoCon.

        images and mask as in `predict` -> loss (), {"recon": (), "homocon": (), "homocon_floor": ()}. A loss
        without weight is left out.
        """
        out = self.predict(images, mask)
        sources = out["sources"].flatten(0, -2)  # (G, L), in full mode too
        loss = 0
        metrics = {}

        # Reconstruct the patches that other images cover (Eq. 4).
        if self.recon_weight:
            recon = reconstruction_loss(out["pred"], out["target"], sources)
            loss = loss + self.recon_weight * recon
            metrics["recon"] = recon.detach()

        # Let each patch recognise those of its own image (Eq. 7), after or before the final LayerNorm (Table
        # 3b). CLS belongs to no image and is left out. Contrastive logits need fp32.
        if self.homocon_weight:
            features = out["z"] if self.homocon_position == "post-ln" else out["z_pre_ln"]  # (G, 1 + L, D)
            with torch.autocast(images.device.type, enabled=False):
                projected = self.projector(features[:, 1:].float())  # (G, L, E)
                homocon = homologous_contrastive_loss(projected, sources, self.tau, self.homocon_positives)
            loss = loss + self.homocon_weight * homocon
            metrics["homocon"] = homocon.detach()

            # Log its floor beside it, because a loss that has reached it looks stuck. The mean positive has
            # none.
            if self.homocon_positives == "separate":
                floor = math.log(sources.shape[1] // self.n - 1)  # log(r L - 1)
                metrics["homocon_floor"] = homocon.new_full((), floor)

        # Add a loss of your own here: loss = loss + weight * mine, metrics["mine"] = mine.detach().
        return loss, metrics

    def visualize(self, images):
        """images (B, C, height, width) -> {title: pictures (b, 3, height, width) in [0, 1]}: the images, the
        mixed image of their group, who gave each patch (one colour an image), and the reconstructions.

        b is less than B if the last images make no whole group. In full mode the first mixed image of each
        group is shown. With norm_pix the reconstruction borrows each patch's true mean and standard
        deviation, so its colours are not predicted.
        """
        n = self.n
        p = self.encoder.patch_size
        grid = self.encoder.grid
        images = self.whole_groups(images)
        out = self.predict(images)

        def picture(patches):
            """Normalised patches (b, L, P) -> (b, 3, height, width) in [0, 1]."""
            return denormalize(unpatchify(patches, grid, p), self.mean, self.std).clamp(0, 1)

        # Take the first mixed image of each group, and show it beside all n images of the group.
        sources = out["sources"].flatten(0, -2)[:: self.masks_per_group]  # (b r, L)
        mixed = picture(out["mixed"][:: self.masks_per_group]).repeat_interleave(n, dim=0)

        # Lay a colour over each patch: one for image 1 of the group, another for image 2 ...
        palette = torch.tensor(COLOURS, device=images.device)  # (number of colours, 3)
        colours = palette[sources % len(palette)]  # (b r, L, 3)
        colours = repeat(colours, "g (h w) c -> (g n) c (h p) (w q)", n=n, h=grid[0], p=p, q=p)
        patches = patchify(images, p)  # (b, L, P)
        pictures = {
            "image": picture(patches),
            "mixed": mixed,
            "who gave\neach patch": 0.5 * mixed + 0.5 * colours,
        }

        # Fill the patches that the mixed image lacks with their predictions.
        if self.recon_weight:
            pred = out["pred"].float().unflatten(0, (-1, self.masks_per_group, n))
            pred = pred[:, 0].flatten(0, 1)  # (b, L, P)
            title = "reconstruction"
            if self.norm_pix:
                pred = undo_norm_pix(pred, patches)
                title += "\n(true mean, std)"
            own = indicator(sources, n).flatten(0, 1).unsqueeze(-1)  # (b, L, 1)
            pictures[title] = picture(torch.where(own, patches, pred))
        return pictures

    def numbers(self, images):
        """Fig. 6, sampling accuracy -> {"accuracy": last layer, "accuracy_layers": [first .. last]}."""
        # Encode while every layer records which keys it keeps.
        images = self.whole_groups(images)
        layers = [block.attn for block in self.encoder.blocks]
        for layer in layers:
            layer.record = True
        out = self.predict(images)

        # Compare what they kept with M.
        sources = out["sources"].flatten(0, -2)  # (G, L)
        accuracies = []
        for layer in layers:
            keep, attention = layer.recorded
            accuracies.append(sampling_accuracy(attention, keep, sources, self.scored_keys).item())
            layer.record = False
            layer.recorded = None
        return {"accuracy": accuracies[-1], "accuracy_layers": accuracies}

    def whole_groups(self, images):
        """The images up to the last whole group. Less than one group stays, for `predict` to refuse."""
        return images[: max(self.n, len(images) // self.n * self.n)]

    def export(self):
        """What encoder.pt holds: a plain ViT with global attention.

        A clean image is one segment (Sec. 3.2), so segment 0 is folded into the bias of the patch embedding,
        which reaches every patch token and not CLS, as the segment does in training.
        """
        weights = dict(self.encoder.state_dict())
        if self.segments is not None:
            weights["patch_embed.proj.bias"] = weights["patch_embed.proj.bias"] + self.segments[0]
        # "mean": Sec. 4.2 classifies the average of all patch tokens.
        return pack_encoder(self.encoder, "mixedae", "mean", self.mean, self.std, weights)

    # ========================================================================================================
    # A first reading may stop here. What follows: flags, their checks, and what the paper leaves open.
    # ========================================================================================================
    @staticmethod
    def add_args(parser):
        add = parser.add_argument_group("MixedAE").add_argument
        add(
            "--mixing-ratio",
            type=positive_float,
            default=0.25,
            help="r = 1/n, the share of a mixed image that each of its n images gives (Sec. 4.1, Table 3a)",
        )
        add(
            "--mixing-mode",
            choices=("compose", "full"),
            default="compose",
            help="one mixed image a group, or n of them (Sec. 3.2, Fig. 4)",
        )
        add(
            "--topk",
            type=unit_float,
            default=0.25,
            help="K / L of Eq. 6, best equal to r; 1 is global attention (Sec. 4.1, Table 3d)",
        )
        add(
            "--cls-in-topk",
            action="store_true",
            help="Eq. 6 with CLS as one more patch: every query keeps K of all 1 + L keys (ours)",
        )
        add(
            "--global-layers",
            type=natural_int,
            default=1,
            help="how many of the first layers keep global attention (Sec. 3.2, Table 3e)",
        )
        add(
            "--segment-embedding",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="tell the images of a group apart by a learned vector (Sec. 3.2)",
        )
        add(
            "--recon-weight",
            type=natural_float,
            default=1.0,
            help="weight of Eq. 4; 0 trains on Eq. 7 alone, without a decoder (table b of the poster)",
        )
        add(
            "--norm-pix",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="targets normalised patch by patch (Sec. 4.1: as MAE)",
        )
        add(
            "--homocon-weight",
            type=natural_float,
            default=0.1,
            help="lambda of Eq. 8 (Sec. 3.3); 0 trains without Eq. 7 (Table 3f)",
        )
        add("--temperature", type=positive_float, default=0.25, help="tau of Eq. 7 (Sec. 4.1)")
        add(
            "--homocon-position",
            choices=("post-ln", "pre-ln"),
            default="post-ln",
            help="Eq. 7 after or before the final LayerNorm (Table 3b)",
        )
        add(
            "--homocon-positives",
            choices=("separate", "mean"),
            default="separate",
            help="each positive of Eq. 7 by itself, or their mean (Table 3c)",
        )


def images_per_group(args, num_patches):
    """n = 1/r, if groups of n images can be made and mixed. Sec. 3.1: r is at most .5; n <= 64 is ours."""
    ratio = args.mixing_ratio
    n = round(1 / ratio)
    if not 2 <= n <= 64 or abs(ratio * n - 1) > 0.01:
        raise UserError(
            f"--mixing-ratio {ratio} is not 1/n with n from 2 to 64; use .5, .333, .25, .2, .125 ..."
        )
    if args.batch_size % n:
        raise UserError(
            f"--batch-size {args.batch_size} is not a multiple of n = {n} images in a group "
            f"(--mixing-ratio {ratio})"
        )
    if num_patches % n or num_patches < 2 * n:  # Eq. 7 needs a positive, so each image gives two patches
        raise UserError(
            f"{num_patches} patches an image cannot be shared by n = {n} images, at least 2 each "
            f"(--mixing-ratio {ratio}); change --image-size, --patch-size or --mixing-ratio"
        )
    return n


def keys_per_query(args, num_patches):
    """K of Eq. 6: --topk is its share of the L key patches."""
    # The 1e-6 absorbs rounding: .29 * 100 is 28.999..., which int() would make 28.
    k = int(args.topk * num_patches + 1e-6)
    if k < 1:
        raise UserError(f"--topk {args.topk}: K = topk x L, L = {num_patches}, must keep at least 1 key")
    return k


def check_args(args):
    """The remaining pairs of flags that must fit together."""
    if args.global_layers > args.depth:
        raise UserError(
            f"--global-layers {args.global_layers}: the encoder has {args.depth} layers; "
            f"give 0 to {args.depth}"
        )
    if not args.recon_weight and not args.homocon_weight:
        raise UserError("--recon-weight 0 and --homocon-weight 0 leave no loss; one of them must be above 0")


# ------------------------------------------------------------------------------------------------------------
# Where the paper is silent (its appendices A to E are not in the PDF)
#
# - Groups are n consecutive images of one process's micro-batch. The n masks of full mode are independent, as
#   Sec. 3.2 says: a patch of an image may be seen under two of them, or under none.
# - Eq. 6 speaks of query *patches* and key *patches*, so these take part in TopK, and K = 0.25 L counts
#   patches. The CLS key is always kept and not counted, and the CLS query sees all keys, so CLS remains a
# path between the images of a group. `--cls-in-topk` treats CLS as one more patch: every query keeps K of
# all 1 + L keys. The decoder's attention stays global, because each of its sequences holds one image.
# - There is one CLS token per mixed image, without segment embedding, and unmixing copies it to each of the n
#   sequences. [MASK] enters after the decoder's embedding, as in MAE.
# - Segment embeddings are n learned vectors, added together with the positions. A clean image is one segment,
#   as the single sentence is segment A in BERT. So `export` folds segment 0 into the patch bias, and what
#   transfers is a plain ViT with global attention.
# - Eq. 4 is averaged over the hidden patches and their values, with MAE's normalised targets ("the remaining
#   hyperparameters are all maintained the same with MAE").
# - Eq. 7 prints l' for two things. The authors' poster writes l+ for the first, the positives, and so do we.
#   The loss is averaged over a patch's positives and then over patches (L_out of SupCon, the paper's [26]):
#   with literal sums lambda = 0.1 would weigh L (r L - 1) times as much. It is computed in fp32. The "mean
#   positive" of Table 3c is the average of the projections of an image's patches, the query's among them. Its
#   denominator stays that of Eq. 7, so the floor log(r L - 1) does not hold for it.
# - Sampling accuracy: of the K largest patch scores of each query patch (itself included), the share from its
#   own image; the mean over heads, queries and images. Where K > r L not all K can be right, and it ends at
#   r L / K. With `--cls-in-topk` it is the share among those of the kept keys that are patches.
# ------------------------------------------------------------------------------------------------------------


if __name__ == "__main__":
    from train import parse_args

    args = parse_args(["--method", "mixedae", *sys.argv[1:]])
    images = torch.randn(args.batch_size, 3, *args.image_size)
    for name, tensor in MixedAE(args).predict(images).items():
        print(f"{name:9} {tuple(tensor.shape)}")
