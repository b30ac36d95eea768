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

G counts mixed images. There are B r groups. In compose mode each gives one mixed image, so G = B r. In full
mode (Sec. 3.2, Fig. 4) each gives n of them, every one with its own M, so G = B, and `groups` holds each
group n times. The rest is the same code.

    the paper            here
    x_i^j                groups[j, i]: image i of mixed image j. The functions below treat all j at once.
    r, n                 args.mixing_ratio, self.n = 1/r
    M                    sources: which image gives each patch, 0 .. n-1 (the paper counts 1 .. 1/r)
    1(M = i)             indicator(sources, n)[:, i]
    x_hat, z_hat         mixed, z (after the final LayerNorm; z_pre_ln before it)
    z_i, y_i             unmixed, pred
    x_i in Eq. 4         target
    [MASK]               decoder.mask_token
    K                    args.topk times L
    tau, lambda          self.tau, self.homocon_weight
    P (patch size)       p, encoder.patch_size
    P^2 C                P, the values of a patch
    D_h                  D_h, in vit.py

The other letters, such as Dd, the decoder's width, stand in vit.py; E is the width of the projector's output.

Run it:             python train.py --method mixedae
See the shapes:     python mixedae.py                    (or: python mixedae.py --mixing-mode full)
Naive mixing:       add --topk 1 --homocon-weight 0 --no-segment-embedding      (the baseline of Sec. 3.1)

The log shows `recon` (Eq. 4), `homocon` (Eq. 7) beside the floor that it approaches and cannot pass, and
`accuracy`, the sampling accuracy of Fig. 6, which is r by chance.

A new mask is another way to fill `sources` in `MixedAE.predict`, where `draw_sources` is called. Every image
must still give r L patches, because Eq. 7 and its floor count on it. docs/your-own.md has an example. A new
loss is one more paragraph of `MixedAE.forward`. Eq. 6 is in vit.py: `Attention.homologous_attention`.

Eq. 5 is a statement about data, not about the network, so it is a test: test_eq_5_... in
tests/test_mixedae.py. Both sides are equal for independent images; the test has a pair of dependent images
for which the left side is greater. The paper does not say so, but the poster's proof needs M to be known on
both sides. What the paper leaves open is listed at the end of this file.
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


def unmix(embedded, sources, n, mask_token):
    """Eq. 3: z_i = 1(M = i) z_hat + [1 - 1(M = i)] [MASK].

    embedded (G, 1 + L, Dd) is z_hat after decoder.embed, CLS first; sources M (G, L); mask_token (1, 1, Dd)
    -> (G n, 1 + L, Dd): the n images of a mixed image one after the other, each with a copy of CLS.
    """
    own = F.pad(indicator(sources, n), (1, 0), value=True)  # CLS goes to every image, (G, n, 1 + L)
    mask_token = mask_token.to(embedded.dtype).unsqueeze(1)  # (1, 1, 1, Dd)
    unmixed = torch.where(own.unsqueeze(-1), embedded.unsqueeze(1), mask_token)  # (G, n, 1 + L, Dd)
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
# Sec. 3.2: homologous recognition. Eq. 6, the attention, is `Attention.homologous_attention` in vit.py.
# ------------------------------------------------------------------------------------------------------------
def homologous_pairs(sources):
    """Whether two patches come from the same image, itself included: (G, L) -> bool (G, L, L)."""
    return sources.unsqueeze(1) == sources.unsqueeze(2)


def homologous_contrastive_loss(projected, sources, tau, positives="separate"):
    """Eq. 7: L_HomoCon = - sum_l sum_l+ log( exp(cos(z_l, z_l+) / tau)
                                       / sum_{l' != l} exp(cos(z_l, z_l') / tau) ), as a mean.

    projected (G, L, E): the features z_l of the patches after the projector, in fp32; sources (G, L) -> (),
    the mean over l+, l and the mixed images. l' runs over the L - 1 other patches of the mixed image.
    positives (Table 3c): with "separate", l+ runs over the r L - 1 other patches of l's image; with "mean"
    there is one positive, the average of z_l over the r L patches of that image, l among them.

    The paper prints l' for the positives as well as in the denominator. Its poster writes l+ for the
    positives, and so do we.

    With "separate" it cannot fall below log(r L - 1). The r L - 1 positives of a patch all stand in its
    denominator, so their shares (the fractions inside the log) sum to at most 1 and average at most
    1 / (r L - 1). As -log is convex, the average of -log of the shares is at least -log of their average.
    """
    # Compare each patch l with each patch l': cos(z_l, z_l').
    cos = F.normalize(projected, dim=-1) @ F.normalize(projected, dim=-1).transpose(1, 2)  # (G, L, L)

    # Sum the denominator over all patches but l itself.
    itself = torch.eye(projected.shape[1], dtype=torch.bool, device=projected.device)  # (L, L)
    others = (cos / tau).masked_fill(itself, float("-inf"))  # exp(-inf) = 0, (G, L, L)
    log_denominator = others.logsumexp(dim=-1, keepdim=True)  # (G, L, 1)

    # By default each homologous patch is a positive by itself. Every patch has r L - 1 of them, so one mean
    # over all pairs equals the mean over l+ and then over l.
    homologous = homologous_pairs(sources)  # (G, L, L)
    if positives == "separate":
        positive = homologous & ~itself  # (G, L, L)
        loss = log_denominator - cos / tau  # -log(exp(cos / tau) / denominator), (G, L, L)
        return (loss * positive).sum() / positive.sum()

    # Table 3c, second row: the only positive is the average of the image's patches.
    centre = homologous.float() @ projected / homologous.sum(dim=-1, keepdim=True)  # (G, L, E)
    score = F.cosine_similarity(projected, centre, dim=-1).unsqueeze(-1) / tau  # (G, L, 1)
    return (log_denominator - score).mean()


def sampling_accuracy(attention, keep, sources, k):
    """Fig. 6: of the key patches that TopK keeps for a query patch, the share from its own image -> ().

    A random choice of keys scores r. With K > r L not all kept keys can be right, and the best score is
    r L / K. attention (G, H, 1 + L, 1 + L): probabilities. keep: the keys that TopK kept, bool of that shape;
    None in a global layer, for which the k key patches of the highest probability are scored. sources (G, L).
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

        # Use homologous attention in all layers but the first ones (Sec. 3.2, Table 3e). With K = L nothing
        # is dropped (Table 3d), so such a layer is made a global one; with --cls-in-topk as well.
        k = keys_per_query(args, num_patches)  # K of Eq. 6
        layer_k = k if k < num_patches else None
        topk = [None] * args.global_layers + [layer_k] * (args.depth - args.global_layers)
        self.encoder = build_encoder(args, topk=topk, cls_in_topk=args.cls_in_topk)

        # The sampling accuracy (Fig. 6) asks which keys TopK kept. A global layer keeps all, so there we look
        # at its K strongest keys instead. With K = L these would be all keys, and the accuracy always r; then
        # we look at the r L strongest, as many as there are patches of the same image.
        self.scored_keys = layer_k or num_patches // self.n

        # Give each image of a group a learned vector (Sec. 3.2, Fig. 3b). The paper gives no std; we take
        # .02, that of the CLS token.
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
            # Without a decoder, and with Eq. 7 before this norm, nothing trains it.
            self.encoder.norm.requires_grad_(False)

    def predict(self, images, mask=None):
        """The tensors of Fig. 2.

        images (B, C, height, width), normalised. mask: M as source ids in 0 .. n-1, (G, L), in full mode
        (B r, n, L), where each image gives r L patches; None draws it.
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
            tokens = tokens + F.embedding(sources, self.segments)  # (G, L, D)

        # Encode. All blocks but the first ones use homologous attention (Eq. 6).
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
        """Eq. 8: L_MixedAE = L_recon + lambda L_HomoCon. L_recon has a weight too, 1 by default (ours).

        images and mask as in `predict` -> loss (), {"recon": (), "homocon": (), "homocon_floor": ()}. A loss
        whose weight is 0 is neither computed nor logged.
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

            # Log its lower bound beside it, because a loss that has come close to it looks stuck. The bound
            # holds for separate positives only.
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
            # (b r, m, n, L, P), with m masks a group
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
        try:
            out = self.predict(images)
        finally:
            for layer in layers:
                layer.record = False

        # Compare what they kept with M.
        sources = out["sources"].flatten(0, -2)  # (G, L)
        accuracies = []
        for layer in layers:
            keep, attention = layer.recorded
            accuracies.append(sampling_accuracy(attention, keep, sources, self.scored_keys).item())
            layer.recorded = None
        return {"accuracy": accuracies[-1], "accuracy_layers": accuracies}

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

    def whole_groups(self, images):
        """The images up to the last whole group. Less than one group stays, for `predict` to refuse."""
        return images[: max(self.n, len(images) // self.n * self.n)]

    def export(self):
        """What encoder.pt holds: a plain ViT with global attention.

        The paper does not say what happens to the segments after pre-training. As BERT gives a single
        sentence segment A, we give a clean image segment 0: it is added to the bias of the patch embedding,
        which reaches every patch token and not CLS, as the segment (Sec. 3.2) does in training.
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
#   patches. The CLS key is always kept and not counted, and the CLS query sees all keys. So CLS is a path
#   between the images of a group, and TopK does not close it. `--cls-in-topk` is the other reading, of "all
#   the self-attention operations": CLS is one more patch, and every query keeps K of all 1 + L keys. TopK is
#   taken in each head by itself; the paper does not say whether it is, or over all heads. The decoder's
#   attention stays global, because each of its sequences holds one image.
# - There is one CLS token per mixed image, without segment embedding, and unmixing copies it to each of the n
#   sequences. [MASK] enters after the decoder's embedding, as in MAE.
# - Sec. 1 says that the mixing masks are targets and not inputs. The segment embeddings of Sec. 3.2 put M
#   into the input all the same, and on our data they carry Eq. 7: without them it stays far above its floor
#   (docs/results.md). `--no-segment-embedding` leaves them out.
# - Segment embeddings are n learned vectors, added together with the positions. They get weight decay,
#   because in MAE's rule everything with more than one dimension does. `export` folds segment 0 into the
#   patch bias, so that what transfers is a plain ViT with global attention. BERT's analogy alone speaks for
#   it: there a single sentence is segment A.
# - The augmentation is that of Sec. 4.1, "only standard random cropping and flipping". It gives no numbers; a
#   crop covers .2 to 1 of the image, as in MAE.
# - Eq. 4 is averaged over the hidden patches and their values, with MAE's normalised targets ("the remaining
#   hyperparameters are all maintained the same with MAE").
# - Eq. 7 prints l' for two things. The authors' poster writes l+ for the first, the positives, and so do we.
#   We average over a patch's positives and then over patches (L_out of SupCon, the paper's [26]), and Eq. 4
#   is a mean too. The printed sums would change the balance that lambda sets: summing Eq. 7 alone multiplies
#   it by L (r L - 1), and summing Eq. 4 as well multiplies Eq. 4 by (n - 1) L P, for each mixed image. Eq. 7
#   is computed in fp32. The "mean positive" of Table 3c is the average of the projections of an image's
#   patches, the query's among them. Its denominator stays that of Eq. 7, so the floor log(r L - 1) does not
#   hold for it.
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
