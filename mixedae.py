"""Mixed Autoencoder (MixedAE), Chen et al., CVPR 2023, arXiv 2303.17152.

Reading order of the project: vit -> mrmae -> **mixedae** -> cae -> data -> train -> finetune -> dense.

Mix the patches of n = 1/r images into one, let each patch find the patches of its own image, and rebuild all
n images (Fig. 2). The training loop is `train_loop` in train.py; each of its steps calls `MixedAE.forward`.

    In the paper         Here
    B, C, L              B images, C channels, L patches per image
    D_h                  D_h, the width of a head, in vit.py
    P (patch size)       p, encoder.patch_size
    P^2 C                P, the values of a patch
    not named            D, Dd, E: the widths of the encoder, of the decoder and of the projector's output
    r                    args.mixing_ratio, the share of a mixed image that each of its images gives
    1/r                  n, the number of images in a group, which are mixed
    j                    the first axis, of length G: the functions below treat all j at once
    x_i^j                groups[j, i]: image i of the group that mixed image j is made of
    M                    sources: which image gives each patch, 0 .. n-1 (the paper counts 1 .. 1/r)
    1(M = i)             indicator(sources, n)[:, i]
    x_hat, z_hat         mixed, z (after the final LayerNorm; z_pre_ln before it)
    z_i, y_i             unmixed, pred
    x_i in Eq. 4         target
    [MASK]               decoder.mask_token
    K                    args.topk times L: `keys_per_query`, and `topk` in vit.py
    tau, lambda          self.tau, self.homocon_weight

G counts mixed images. In compose mode each of the B r groups gives one mixed image, so G = B r. In full mode
(Sec. 3.2, Fig. 4) each group is mixed n times, each time with a new M, so G = B. The tensor `groups` then
holds every group n times, and `predict` takes and returns M as (B r, n, L); the losses see (G, L), as in
compose mode. For the encoder a mixed image is one image with all its patches visible: B, V and N of vit.py
are G, L and 1 + L.

    images (B, C, height, width)
        -- patchify; n consecutive images are a group ------> groups    (G, n, L, P)
        -- mix with M (Eq. 1) ------------------------------> mixed     (G, L, P)
        -- patch embedding + positions + segments ----------> tokens    (G, L, D)
        -- CLS, encoder with homologous attention (Eq. 6) --> z         (G, 1 + L, D)
           |-- projector, without CLS ----------------------> projected (G, L, E)
           |                                                  Eq. 7: homologous contrastive loss
        -- decoder.embed, unmix with M (Eq. 3) -------------> unmixed   (G n, 1 + L, Dd)
        -- decoder -----------------------------------------> pred      (G n, L, P)
                                                              Eq. 4: reconstruction loss
    loss = Eq. 4 + lambda Eq. 7 (Eq. 8)

Run it:             python train.py --method mixedae
See the shapes:     python mixedae.py                    (or: python mixedae.py --mixing-mode full)
Naive mixing:       add --topk 1 --homocon-weight 0 --no-segment-embedding      (the baseline of Sec. 3.1)

The log shows `recon` (Eq. 4), `homocon` (Eq. 7) beside `homocon_floor`, the least value that it can have, and
the sampling accuracy of Fig. 6, where a random choice of keys would score r: `accuracy` of the last layer
(Fig. 6b) and `accuracy_layers` of each (Fig. 6a).

A new mask is another way to fill `sources` in `MixedAE.predict`, where `draw_sources` is called. Every image
must still give r L patches, because Eq. 7 and its floor rely on it. docs/your-own.md has an example. A new
loss is one more paragraph of `MixedAE.forward`, and one more term in the sum at its end.

Eq. 6 is in vit.py: `Attention.homologous_attention`. Training runs `fused_attention` below it, which computes
the same; a change of Eq. 6 belongs in both. Eq. 5 is a statement about data and not about the network, so it
is checked in tests/test_mixedae.py (test_eq_5_...). What the paper leaves open is listed at the end of this
file.
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
    recording,
    undo_norm_pix,
    unit_float,
    unpatchify,
)

PROJECTOR_WIDTH = 128  # E, output width of the linear projector right before Eq. 7 (Sec. 4.1)


# ------------------------------------------------------------------------------------------------------------
# Sec. 3.1: mixing and unmixing
# ------------------------------------------------------------------------------------------------------------
def draw_sources(count, n, patches, device):
    """M of Eq. 2: which of the n images gives each patch, as numbers 0 .. n-1.

    count and patches are the numbers G and L -> (G, L). In each row every image gives exactly r L = L / n
    patches, at random places.
    """
    balanced = torch.arange(patches, device=device) // (patches // n)  # (L,), r L times 0, r L times 1, ...
    shuffle = torch.rand(count, patches, device=device).argsort(dim=1)  # a random order for each row, (G, L)
    return balanced[shuffle]  # (G, L)


def indicator(sources, n):
    """1(M = i) for each image i: sources (G, L) -> bool (G, n, L)."""
    return sources.unsqueeze(1) == torch.arange(n, device=sources.device).view(1, n, 1)


def mix(x, sources):
    """Eq. 1: x_hat = sum_i 1(M = i) x_i.

    Clean patches x (G, n, L, P), sources M (G, L) -> mixed x_hat (G, L, P).
    """
    from_i = indicator(sources, x.shape[1])  # 1(M = i), (G, n, L)
    return (from_i.unsqueeze(-1) * x).sum(dim=1)  # (G, L, P)


def unmix(embedded, sources, n, mask_token):
    """Eq. 3: z_i = 1(M = i) z_hat + [1 - 1(M = i)] [MASK].

    embedded (G, 1 + L, Dd) is z_hat, CLS first, after decoder.embed: as in MAE, [MASK] enters after the
    decoder's first linear layer. sources M (G, L); mask_token (1, 1, Dd) -> (G n, 1 + L, Dd): the n images of
    a mixed image one after the other, each with a copy of CLS.
    """
    from_i = F.pad(indicator(sources, n), (1, 0), value=True)  # CLS goes to every image, (G, n, 1 + L)
    mask_token = mask_token.to(embedded.dtype).unsqueeze(1)  # (1, 1, 1, Dd)
    unmixed = torch.where(from_i.unsqueeze(-1), embedded.unsqueeze(1), mask_token)  # (G, n, 1 + L, Dd)
    return unmixed.flatten(0, 1)  # (G n, 1 + L, Dd)


def reconstruction_loss(pred, target, sources):
    """Eq. 4: L_recon = sum_i sum_l [1 - 1(M_l = i)] (y_i,l - x_i,l)^2, with a mean in place of the sums.

    pred y and target x (G n, L, P), sources M (G, L) -> (). The mean runs over the hidden patches, those with
    M_l != i, and over their P values.
    """
    n = len(pred) // len(sources)  # images in a mixed image
    hidden = ~indicator(sources, n).flatten(0, 1)  # 1 - 1(M = i), (G n, L)
    error = (pred.float() - target).square().mean(dim=-1)  # (G n, L)
    return (error * hidden).sum() / hidden.sum()


# ------------------------------------------------------------------------------------------------------------
# Sec. 3.2: homologous recognition. Eq. 6, the attention, is `Attention.homologous_attention` in vit.py.
# ------------------------------------------------------------------------------------------------------------
def homologous_pairs(sources):
    """Whether two patches come from the same image, itself included: (G, L) -> bool (G, L, L)."""
    return sources.unsqueeze(1) == sources.unsqueeze(2)


def homologous_contrastive_loss(projected, sources, tau, positives="separate"):
    """Eq. 7: L_HomoCon = - sum_l sum_l+ log p(l, l+), with a mean in place of the sums, where

        p(l, l+) = exp(cos(z_l, z_l+) / tau) / sum_{l' != l} exp(cos(z_l, z_l') / tau).

    projected (G, L, E): the features z_l of the patches after the projector, in fp32; sources (G, L) -> (),
    the mean over l+, l and the mixed images. l' runs over the L - 1 other patches of the mixed image.
    positives (Table 3c): with "separate", l+ runs over the r L - 1 other patches of l's image; with "mean"
    there is one positive, the average of z_l over the r L patches of that image, l among them.

    The paper prints l' for the positives as well as in the denominator. Its poster writes l+ for the
    positives, and so do we.
    """
    # Compare each patch l with each patch l': cos(z_l, z_l').
    cos = F.normalize(projected, dim=-1) @ F.normalize(projected, dim=-1).transpose(1, 2)  # (G, L, L)

    # Sum the denominator over all patches but l itself.
    diagonal = torch.eye(projected.shape[1], dtype=torch.bool, device=projected.device)  # l' = l, (L, L)
    logits_without_self = (cos / tau).masked_fill(diagonal, float("-inf"))  # exp(-inf) = 0, (G, L, L)
    log_denominator = logits_without_self.logsumexp(dim=-1, keepdim=True)  # (G, L, 1)

    # By default every other patch of l's image is a separate positive. Each l has r L - 1 of them, so one
    # mean over all pairs equals the mean over l+ and then over l.
    homologous = homologous_pairs(sources)  # (G, L, L)
    if positives == "separate":
        positive = homologous & ~diagonal  # (G, L, L)
        pair_loss = log_denominator - cos / tau  # -log p(l, l'), (G, L, L)
        return (pair_loss * positive).sum() / positive.sum()

    # Table 3c, second row: the only positive is the average of all patches of l's image.
    centre = homologous.float() @ projected / homologous.sum(dim=-1, keepdim=True)  # (G, L, E)
    positive_logit = F.cosine_similarity(projected, centre, dim=-1).unsqueeze(-1) / tau  # (G, L, 1)
    return (log_denominator - positive_logit).mean()


def homologous_contrastive_floor(L, n, tau):
    """The least value of Eq. 7 with separate positives, for n images of r L = L / n patches each.

    It is far above 0, because the r L - 1 positives of a patch share one denominator. It is reached when all
    patches of an image have the same z_l, and these n vectors lie as far apart as n vectors can: at the
    corners of a simplex, where the cosine between any two is -1 / (n - 1). Multiply p(l, l+) above and below
    by exp(-1 / tau). Then each positive adds 1 to the denominator, and each of the L - r L patches of other
    images exp((-1 / (n - 1) - 1) / tau), so that -log p is the logarithm below.

    No z_l do better. Eq. 7 is convex in the cosines, so it is at least its value for the average cosine a of
    positives and b of other images. That value is the smaller, the smaller b - a is. The squared length of
    the sum of all z_l / |z_l| is L (1 + (r L - 1) a + (L - r L) b) and not negative. So b - a is least for
    a = 1 and b = -1 / (n - 1), the corners again.
    """
    others = L - L / n  # patches of other images
    return math.log(L / n - 1 + others * math.exp((-1 / (n - 1) - 1) / tau))


def sampling_accuracy(attention, keep, sources, k):
    """Fig. 6: of the key patches that TopK keeps for a query patch, the share from its own image -> ().

    attention (G, H, 1 + L, 1 + L): probabilities. keep: the keys that TopK kept, bool of that shape; or None
    in a global layer, where the k key patches with the highest probabilities are taken instead. sources (G,
    L). A random choice of keys scores r. With K > r L not all kept keys can be right, and the best score is
    r L / K.
    """
    if keep is None:
        attention = attention[..., 1:, 1:]  # (G, H, L, L)
        # A higher score has a higher probability, so up to rounding these are the k highest scores.
        best = attention.topk(k, dim=-1).indices  # (G, H, L, k)
        keep = torch.zeros_like(attention, dtype=torch.bool).scatter(-1, best, True)
    else:
        keep = keep[..., 1:, 1:]  # (G, H, L, L)
    right = keep & homologous_pairs(sources).unsqueeze(1)  # (G, H, L, L)
    return right.sum() / keep.sum()


# ------------------------------------------------------------------------------------------------------------
# The numbers n (Eq. 1) and K (Eq. 6)
# ------------------------------------------------------------------------------------------------------------
def images_per_group(args, num_patches):
    """n = 1/r, after a check that groups of n images can be made and mixed. Sec. 3.1 asks for r <= .5; that n
    is at most 64 is ours."""
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
            f"{num_patches} patches per image cannot be shared by n = {n} images, at least 2 each "
            f"(--mixing-ratio {ratio}); change --image-size, --patch-size or --mixing-ratio"
        )
    return n


def keys_per_query(args, num_patches):
    """K of Eq. 6, from --topk, which is K / L."""
    # Round down, but add .1 first: .29 * 100 is 28.999..., and .333 of 144 patches, 47.95, means a third of
    # them. (Beyond 300 patches write .33333.)
    k = int(args.topk * num_patches + 0.1)
    if k < 1:
        raise UserError(f"--topk {args.topk}: K = topk x L, L = {num_patches}, must keep at least 1 key")
    return k


# ------------------------------------------------------------------------------------------------------------
# The method
# ------------------------------------------------------------------------------------------------------------
class MixedAE(nn.Module):
    """MixedAE of Fig. 2. Its flags also make the rows of Table 3, and naive mixing (Sec. 3.1)."""

    @staticmethod
    def add_args(parser):
        add = parser.add_argument_group("MixedAE").add_argument

        # Mix (Sec. 3.1).
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
            help="one mixed image per group, or n of them (Sec. 3.2, Fig. 4)",
        )

        # Homologous attention (Eq. 6).
        add(
            "--topk",
            type=unit_float,
            default=0.25,
            help="K / L of Eq. 6, best equal to r, but set apart; 1: global attention (Sec. 4.1, Table 3d)",
        )
        add(
            "--global-layers",
            type=natural_int,
            default=1,
            help="how many of the first layers keep global attention (Sec. 3.2, Table 3e)",
        )

        # What tells the images of a group apart.
        add(
            "--segment-embedding",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="tell the images of a group apart by a learned vector (Sec. 3.2)",
        )

        # Reconstruction (Eq. 4).
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
            help="normalise the target of each patch (Sec. 4.1: as in MAE)",
        )

        # Homologous contrast (Eq. 7).
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
            help="each positive of Eq. 7 separately, or their mean (Table 3c)",
        )

    def __init__(self, args):
        super().__init__()
        check_args(args)
        num_patches = math.prod(side // args.patch_size for side in args.image_size)  # L
        self.n = images_per_group(args, num_patches)
        self.masks_per_group = self.n if args.mixing_mode == "full" else 1  # Fig. 4
        self.mean = args.mean
        self.std = args.std

        # Use homologous attention in all layers but the first ones (Sec. 3.2, Table 3e). K = L keeps all key
        # patches (Table 3d), so it makes a layer global.
        k = keys_per_query(args, num_patches)  # K of Eq. 6
        layer_k = k if k < num_patches else None
        topk = [None] * args.global_layers + [layer_k] * (args.depth - args.global_layers)
        self.encoder = build_encoder(args, topk=topk)

        # The sampling accuracy (Fig. 6) scores the keys that TopK keeps. In a global layer, which keeps all,
        # it scores the K strongest ones; and where K = L the r L strongest, because with all L keys the
        # accuracy would always be r.
        self.scored_keys = layer_k or num_patches // self.n

        # Give each image of a group, 0 .. n-1, a learned vector (Sec. 3.2, Fig. 3b). The paper gives no
        # standard deviation; we take .02, that of the CLS token.
        self.segments = None
        if args.segment_embedding:
            self.segments = nn.Parameter(torch.empty(self.n, args.width).normal_(std=0.02))  # (n, D)

        # Build only what the losses need: DistributedDataParallel stops on a parameter that gets no gradient.
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
            # Without a decoder, and with Eq. 7 before this norm, nothing trains it.
            self.encoder.norm.requires_grad_(False)

    def predict(self, images, mask=None):
        """The tensors of Fig. 2.

        images (B, C, height, width), normalised. mask: a fixed M, for tests: source ids 0 .. n-1 (G, L), in
        full mode (B r, n, L), where each image gives r L patches; None draws M. Returns a dict:

            "mixed"     (G, L, P)
            "sources"   M, of the shape of `mask`
            "z"         (G, 1 + L, D) after the final LayerNorm
            "z_pre_ln"  (G, 1 + L, D) before it
            "unmixed"   (G n, 1 + L, Dd); this and the next two are missing if --recon-weight is 0
            "pred"      (G n, L, P)
            "target"    (G n, L, P)

        G counts mixed images, as at the top of this file. Each of them is unmixed into n images: G n.
        """
        n = self.n
        if len(images) % n:
            raise UserError(
                f"{len(images)} images cannot be split into groups of n = {n}; give a multiple of {n}"
            )

        # Put n consecutive images into a group. In full mode repeat each group once for each of its masks.
        x = patchify(images, self.encoder.patch_size)  # (B, L, P)
        groups = repeat(x, "(g n) l p -> (g masks) n l p", n=n, masks=self.masks_per_group)  # (G, n, L, P)

        # Draw M, or take the one that is given. Draw a mask of your own here, in place of `draw_sources`.
        if mask is None:
            sources = draw_sources(len(groups), n, x.shape[1], x.device)  # (G, L)
        else:
            self.check_mask(mask, len(images) // n)
            sources = mask.flatten(0, -2)  # (G, L)

        # Mix (Eq. 1). The patch embedding is a convolution, so it gets the mixed patches as an image.
        mixed = mix(groups, sources)  # (G, L, P)
        mixed_images = unpatchify(mixed, self.encoder.grid, self.encoder.patch_size)  # (G, C, h p, w p)

        # Embed, and mark the patches of each image with its segment embedding (Sec. 3.2).
        tokens = self.encoder.embed(mixed_images)  # (G, L, D)
        if self.segments is not None:
            # This is self.segments[sources], whose backward pass would be slow on a GPU.
            tokens = tokens + F.embedding(sources, self.segments)  # (G, L, D)

        # Put CLS in front and encode. In all blocks but the first --global-layers ones (1 by default) the
        # attention is homologous (Eq. 6).
        z_pre_ln, _ = self.encoder.forward_blocks(tokens)  # (G, 1 + L, D)
        z = self.encoder.norm(z_pre_ln)  # (G, 1 + L, D)
        out = {"mixed": mixed, "sources": sources, "z": z, "z_pre_ln": z_pre_ln}
        if self.masks_per_group > 1:  # return M in the shape in which `mask` takes it
            out["sources"] = sources.unflatten(0, (-1, n))  # (B r, n, L)

        # Unmix (Eq. 3) and decode, each image as a sequence of its own. Eq. 4 compares the predictions with
        # the clean patches, by default normalised patch by patch as in MAE.
        if self.recon_weight:
            embedded = self.decoder.embed(z)  # (G, 1 + L, Dd)
            out["unmixed"] = unmix(embedded, sources, n, self.decoder.mask_token)  # (G n, 1 + L, Dd)
            out["pred"] = self.decoder(out["unmixed"])  # (G n, L, P)
            clean = groups.flatten(0, 1)  # (G n, L, P)
            out["target"] = norm_pix(clean) if self.norm_pix else clean
        return out

    def forward(self, images, mask=None):
        """Eq. 8: L_MixedAE = L_recon + lambda L_HomoCon. L_recon has a weight too, 1 by default (ours).

        images and mask as in `predict` -> loss (), {"recon": (), "homocon": (), "homocon_floor": ()}. A loss
        whose weight is 0 is neither computed nor logged.
        """
        out = self.predict(images, mask)
        sources = out["sources"].flatten(0, -2)  # (G, L), in full mode too
        metrics = {}

        # Reconstruct the patches that other images cover (Eq. 4).
        recon = 0
        if self.recon_weight:
            recon = reconstruction_loss(out["pred"], out["target"], sources)
            metrics["recon"] = recon.detach()

        # Let each patch recognise those of its own image (Eq. 7), after or before the final LayerNorm (Table
        # 3b). CLS belongs to no image and is left out. Use fp32: the two or three digits of bf16 are too few
        # for the logits cos / tau.
        homocon = 0
        if self.homocon_weight:
            features = out["z"] if self.homocon_position == "post-ln" else out["z_pre_ln"]  # (G, 1 + L, D)
            with torch.autocast(images.device.type, enabled=False):
                projected = self.projector(features[:, 1:].float())  # (G, L, E)
                homocon = homologous_contrastive_loss(projected, sources, self.tau, self.homocon_positives)
            metrics["homocon"] = homocon.detach()

            # Log its least value beside it, because a loss that has come close to it looks stuck. The formula
            # holds for separate positives only.
            if self.homocon_positives == "separate":
                floor = homologous_contrastive_floor(sources.shape[1], self.n, self.tau)
                metrics["homocon_floor"] = homocon.new_full((), floor)

        # Add the losses (Eq. 8); homocon_weight is lambda. A loss of your own is one more term here, and
        # metrics["mine"] = mine.detach() logs it.
        loss = self.recon_weight * recon + self.homocon_weight * homocon
        return loss, metrics

    def numbers(self, images):
        """Fig. 6, sampling accuracy -> {"accuracy": last layer, "accuracy_layers": [first .. last]}."""
        # Encode while every layer records which keys it keeps.
        images = self.whole_groups(images)
        layers = [block.attn for block in self.encoder.blocks]
        with recording(layers):
            out = self.predict(images)
            recorded = [layer.recorded for layer in layers]

        # Compare what they kept with M.
        sources = out["sources"].flatten(0, -2)  # (G, L)
        accuracies = [
            sampling_accuracy(attention, keep, sources, self.scored_keys).item()
            for keep, attention in recorded
        ]
        return {"accuracy": accuracies[-1], "accuracy_layers": accuracies}

    def export(self):
        """What encoder.pt holds: a plain ViT with global attention.

        The paper does not say what happens to the segments after pre-training. As BERT gives a single
        sentence segment A, we give a clean image segment 0. We add it to the bias of the patch embedding,
        which, like the segments in training (Sec. 3.2), reaches every patch token and not CLS.
        """
        weights = dict(self.encoder.state_dict())
        if self.segments is not None:
            weights["patch_embed.proj.bias"] = weights["patch_embed.proj.bias"] + self.segments[0]
        # "mean": Sec. 4.2 classifies the average of all patch tokens.
        return pack_encoder(self.encoder, "mixedae", "mean", self.mean, self.std, weights)

    # ========================================================================================================
    # A first reading may stop here. What follows: pictures, checks, and what the paper leaves open.
    # ========================================================================================================
    def visualize(self, images):
        """images (B, C, height, width) -> {title: pictures (b, 3, height, width) in [0, 1]}: the images, the
        mixed image of their group, the source of each patch (one colour per image, of eight), and the
        reconstructions.

        The last images are left out if they do not fill a group; then b < B. In full mode the first mixed
        image of each group is shown. With norm_pix each hidden patch of the reconstruction gets its
        true mean and standard deviation, two numbers over all its values: so its brightness and its contrast
        are given, not predicted.
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
            pred = pred[:, 0].flatten(0, 1)  # of the first mask of each group, (b, L, P)
            title = "reconstruction"
            if self.norm_pix:
                pred = undo_norm_pix(pred, patches)
                title += "\n(true mean, std)"
            from_i = indicator(sources, n).flatten(0, 1).unsqueeze(-1)  # (b, L, 1)
            pictures[title] = picture(torch.where(from_i, patches, pred))
        return pictures

    def whole_groups(self, images):
        """The images up to the last whole group. Fewer than n are returned as they are; `predict` refuses
        them."""
        return images[: max(self.n, len(images) // self.n * self.n)]

    def check_mask(self, mask, groups):
        """Refuse an M of wrong shape, or one in which an image does not give exactly r L patches (Eq. 2)."""
        n = self.n
        L = self.encoder.num_patches
        shape = (groups, n, L) if self.masks_per_group > 1 else (groups, L)
        if mask.shape != shape or (indicator(mask.flatten(0, -2), n).sum(dim=-1) != L // n).any():
            raise ValueError(
                f"mask must have shape {shape} and give each of the images 0 to {n - 1} exactly "
                f"r L = {L // n} patches"
            )


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
#   patches. The CLS key is always kept and not counted, and the CLS query sees all keys. So CLS is a way
#   between the images of a group that stays open even where TopK is always right. The other reading, of "all
#   the self-attention operations", counts CLS as one more patch. On our data one seed showed no difference
#   (docs/results.md).
# - TopK is taken separately in each head; the paper does not say whether it is, or jointly over all heads. It
#   calls D_h "the feature dimension"; we take the width of a head, as every ViT does.
# - The decoder's attention is ordinary, and its tokens have no segment embedding, because each of its
#   sequences holds one image.
# - There is one CLS token per mixed image, without segment embedding. Unmixing copies it to each of the n
#   sequences. [MASK] enters after the decoder's embedding, as in MAE.
# - Sec. 1 says that the mixing masks are targets and not inputs. The segment embeddings of Sec. 3.2 put M
#   into the input all the same: which patches belong together can be read off the vectors, whatever the
#   patches show. On our data the network does so: after one epoch Eq. 7 is close to its least value. With
#   `--no-segment-embedding` it stays far above, because the network must compare what the patches show. At a
#   laptop's size three seeds of that encoder did better in every probe than three with segment embeddings,
#   and than three of MAE (docs/results.md).
# - Segment embeddings are n learned vectors, added together with the positions. They get weight decay,
#   because in MAE's rule everything with more than one dimension does. `export` adds segment 0 to the patch
#   bias, so that what transfers is a plain ViT. The argument for this choice is the analogy with BERT.
#   Probed without any segment, an encoder trained with them did as well on our data (docs/results.md).
# - Eq. 5 holds if M is known on both sides. The paper does not say so, but the proof on the authors' poster
#   needs it. Both sides are equal for independent images; the test has a pair of dependent images for which
#   the left side is greater.
# - The augmentation is that of Sec. 4.1, "only standard random cropping and flipping". It gives no numbers; a
#   crop covers .2 to 1 of the image, as in MAE.
# - Eq. 4 is averaged over the hidden patches and their values, with MAE's normalised targets ("the remaining
#   hyperparameters are all maintained the same with MAE").
# - Eq. 7 is averaged over the positives of a patch and then over patches (L_out of SupCon, the paper's [26]).
#   If the losses were summed as they are printed, then for each mixed image Eq. 7 would be L (r L - 1) times
#   larger and Eq. 4 (n - 1) L P times. So lambda = .1 would act as .1 (r L - 1) / ((n - 1) P) does here: .002
#   for ViT-B/16 at 224 pixels. Eq. 7 is computed in fp32. Its projector, a linear layer, has a bias.
# - The "mean positive" of Table 3c is the average of the projections of an image's patches, the query's among
#   them. Its denominator stays that of Eq. 7, so the least value above does not hold for it.
# - The sampling accuracy is a mean over heads, queries and images, and a query patch itself counts as a key
#   from its own image.
# ------------------------------------------------------------------------------------------------------------


if __name__ == "__main__":
    from train import parse_args

    args = parse_args(["--method", "mixedae", *sys.argv[1:]])
    images = torch.randn(args.batch_size, 3, *args.image_size)
    for name, tensor in MixedAE(args).predict(images).items():
        print(f"{name:9} {tuple(tensor.shape)}")
