"""Mixed Autoencoder (MixedAE), Chen et al., CVPR 2023, arXiv 2303.17152.

Reading order of the project: vit -> mrmae -> **mixedae** -> cae -> data -> train -> finetune.

Mix the patches of n = 1/r images into one, let each patch find the patches of its own image, and rebuild all n images:

    images (B, C, H, W), a group = n consecutive ones; G = B r groups
        -- Eq. 1: mix, M = sources (G, L) --> mixed (G, L, P)
        -- patch embedding + positions + segments --> (G, L, D) -- encoder, homologous attention Eq. 6 --> z (G, 1+L, D)
              |-- Eq. 7: homologous contrastive loss on the patches of z
        -- decoder.embed -- Eq. 3: unmix, [MASK] where M is another image --> unmixed (B, 1+L, Dd)
        -- decoder --> pred (B, L, P) -- Eq. 4: squared error where M is another image
    Eq. 8: L = L_recon + lambda L_HomoCon

That is compose mode: one mixed image a group. Full mode (Sec. 3.2, Fig. 4) draws n masks a group, sources (G, n, L). Each group is first
repeated n times, once for each of its masks; all that follows is the same, with n G = B in place of G and n B in place of B, and its
rows are ordered by group, mask, image. Naive mixing (Sec. 3.1) is this without recognition: --topk 1 --homocon-weight 0 --no-segment-embedding.

Run it:  python train.py --method mixedae    (the drawn set `shapes`, a laptop; README.md has times, losses, every row of Table 3 and the paper's runs)

The log shows both losses, and beside `homocon` its floor log(r L - 1), which it approaches and cannot pass: the r L - 1 positives of a
patch all stand in its denominator, so their shares sum to at most 1, and -log of a share is on average at least log(r L - 1).
`accuracy` is the sampling accuracy of Fig. 6 (chance: r). Eq. 5 says something of the data, not of the network, so it is a test:
test_eq_5_... in tests/test_mixedae.py (equal for independent images, strict for dependent ones; M must be known).

Where the paper is silent (its appendices A-E are not in the PDF)
    - Groups are n consecutive images of one process's micro-batch. The n masks of full mode are independent, as Sec. 3.2 says: a
      patch of an image may be seen under two of them, or under none.
    - Eq. 6 speaks of query *patches* and key *patches*: those take part in TopK. K = 0.25 L counts patches; the CLS key is always
      kept and not counted; the CLS query sees all, so CLS remains a path between the images of a group. `--cls-in-topk` treats CLS
      as one more patch: every query keeps K of all 1 + L keys. The decoder's attention stays global: each of its sequences holds one image.
    - One CLS token per mixed image, without segment; unmixing copies it to each of the n sequences. [MASK] enters after the
      decoder's embedding, as in MAE.
    - Segment embeddings: n learned vectors, added with the positions. A clean image is one segment, as BERT's single sentence is
      segment A: `export` folds segment 0 into the patch bias, and what transfers is a plain ViT with global attention.
    - Eq. 4 is averaged over hidden patches and their values, with MAE's norm_pix targets ("the remaining hyperparameters are all
      maintained the same with MAE").
    - Eq. 7 prints l' for two things; the authors' poster writes l+ for the first, the positives, and so do we. It is averaged over a
      patch's positives, then over patches (L_out of SupCon, the paper's [26]): with literal sums lambda = 0.1 would weigh L (r L - 1)
      times as much. Computed in fp32. The "mean positive" of Table 3c is the average of the projections of an image's patches, the
      query's among them; the denominator stays that of Eq. 7, so the floor above does not hold.
    - Sampling accuracy: of the K largest patch scores of each query patch (itself included), the share from its own image; mean over
      heads, queries and images. Where K > r L not all K can be right, and it ends at r L / K. (`--cls-in-topk`: of the kept keys that
      are patches.)
"""
import argparse
import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from data import COLOURS, MEAN, STD, denormalize
from vit import UserError, build_decoder, build_encoder, init_weights, norm_pix, pack_encoder, patchify, undo_norm_pix, unpatchify


# --------------------------------------------------------------------------------------------------------------------
# Sec. 3.1: mixing and unmixing
# --------------------------------------------------------------------------------------------------------------------
def draw_sources(count, n, patches, device):
    """M (Eq. 2), count times: which of the n images gives each patch, (count, L) in 0 .. n-1 (the paper: 1 .. n).

    Each image gives exactly r L = L / n patches, at random places.
    """
    balanced = torch.arange(patches, device=device) // (patches // n)  # (L,): 0 .. 0, 1 .. 1, ...
    return balanced[torch.rand(count, patches, device=device).argsort(dim=1)]


def indicator(sources, n):
    """1(M = i): sources (G, L) -> bool (G, n, L)."""
    return sources.unsqueeze(1) == torch.arange(n, device=sources.device).view(1, n, 1)


def mix(x, sources):
    """Eq. 1: x_hat = sum_i 1(M = i) x_i, for each group j (an index that is left out here and below).

    Clean patches x (G, n, L, P), sources M (G, L) -> mixed (G, L, P).
    """
    own = indicator(sources, x.shape[1])  # (G, n, L)
    return (own.unsqueeze(-1) * x).sum(dim=1)  # (G, L, P)


def unmix(z, sources, n, mask_token):
    """Eq. 3: z_i = 1(M = i) z_hat + [1 - 1(M = i)] [MASK].

    z (G, 1+L, Dd) is z_hat after decoder.embed, CLS first; sources (G, L); mask_token (1, 1, Dd) -> (B, 1+L, Dd), B = G n, the n
    images of a group one after the other, each with a copy of CLS.
    """
    own = F.pad(indicator(sources, n), (1, 0), value=True)  # CLS goes to every image, (G, n, 1+L)
    unmixed = torch.where(own.unsqueeze(-1), z.unsqueeze(1), mask_token.to(z.dtype).unsqueeze(1))  # (G, n, 1+L, Dd)
    return rearrange(unmixed, "g n l d -> (g n) l d")


def reconstruction_loss(pred, target, sources):
    """Eq. 4: L_recon = sum_i sum_l [1 - 1(M_l = i)] (y_i,l - x_i,l)^2, as a mean.

    pred y, target x (B, L, P), sources M (G, L) -> (): averaged over the P values and over the hidden patches, those with M_l != i.
    """
    n = len(pred) // len(sources)
    hidden = rearrange(~indicator(sources, n), "g n l -> (g n) l")  # 1 - 1(M = i), (B, L)
    error = (pred.float() - target).square().mean(dim=-1)  # (B, L)
    return (error * hidden).sum() / hidden.sum()


# --------------------------------------------------------------------------------------------------------------------
# Sec. 3.2: homologous recognition. The attention itself, Eq. 6, is `Attention.explicit` and `keep_topk` in vit.py.
# --------------------------------------------------------------------------------------------------------------------
def homologous_contrastive_loss(z, sources, tau, positives="separate"):
    """Eq. 7: L_HomoCon = - sum_l sum_l+ log( exp(cos(z_l, z_l+) / tau) / sum_{l' != l} exp(cos(z_l, z_l') / tau) ), as a mean.

    z (G, L, E) fp32, patch features after the projector; sources (G, L) -> (): averaged over l+, l and the mixed images. l' runs over
    all L - 1 other patches of the mixed image. positives (Table 3c): "separate", l+ runs over the r L - 1 other patches of l's image;
    "mean", one positive, the average of z over all r L patches of that image, l among them.
    """
    cos = F.normalize(z, dim=-1) @ F.normalize(z, dim=-1).transpose(1, 2)  # cos(z_l, z_l'), (G, L, L)
    itself = torch.eye(z.shape[1], dtype=torch.bool, device=z.device)  # (L, L)
    log_denominator = (cos / tau).masked_fill(itself, float("-inf")).logsumexp(dim=-1, keepdim=True)  # (G, L, 1)
    homologous = sources.unsqueeze(1) == sources.unsqueeze(2)  # (G, L, L), itself included
    if positives == "mean":
        centre = homologous.float() @ z / homologous.sum(dim=-1, keepdim=True)  # (G, L, E)
        return (log_denominator - F.cosine_similarity(z, centre, dim=-1).unsqueeze(-1) / tau).mean()
    positive = homologous & ~itself
    # Every patch has r L - 1 positives, so one mean over all pairs is the mean over l+, then l.
    return ((log_denominator - cos / tau) * positive).sum() / positive.sum()


def sampling_accuracy(attention, keep, sources, k):
    """Fig. 6: of the key patches that TopK keeps for a query patch, the share from its own image -> (). Chance is r; at most r L / K.

    attention (G, H, 1+L, 1+L) probabilities; keep: what TopK kept, bool of the same shape, or None in a global layer: then the k key
    patches of the highest probability stand for it; sources (G, L).
    """
    if keep is None:
        best = attention[..., 1:, 1:].topk(k, dim=-1).indices  # softmax keeps the order of the scores
        keep = torch.zeros_like(attention[..., 1:, 1:], dtype=torch.bool).scatter(-1, best, True)
    else:
        keep = keep[..., 1:, 1:]  # (G, H, L, L)
    same = (sources.unsqueeze(1) == sources.unsqueeze(2)).unsqueeze(1)  # (G, 1, L, L)
    return (keep & same).sum() / keep.sum().clamp(min=1)


def images_per_group(ratio, batch_size, patches):
    """n of r = 1/n. A UserError unless n >= 2 (Sec. 3.1: r in (0, 0.5]; 64 at most, ours), n divides the batch and L, and r L >= 2 (Eq. 7
    needs a positive)."""
    n = round(1 / ratio) if 1e-6 < ratio <= 1 else 0  # so written, NaN is refused too
    if not 2 <= n <= 64 or abs(ratio * n - 1) > 0.01:
        raise UserError(f"--mixing-ratio {ratio} is not 1/n with n from 2 to 64; use .5, .333, .25, .2, .125 ...")
    if batch_size % n:
        raise UserError(f"--batch-size {batch_size} is not a multiple of n = {n} images in a group (--mixing-ratio {ratio})")
    if patches % n or patches // n < 2:
        raise UserError(f"{patches} patches an image cannot be shared by n = {n} images, at least 2 each (--mixing-ratio {ratio}); "
                        f"change --image-size, --patch-size or --mixing-ratio")
    return n


def keys(topk, patches):
    """K of Eq. 6 from --topk, its share of L. The small addend is for shares such as .29, which floats miss by less."""
    return int(topk * patches + 1e-6)


def check_args(args, patches):
    """A UserError for flags that cannot work. Comparisons are written so that NaN is refused too."""
    if not 0 < args.topk <= 1 or keys(args.topk, patches) < 1:
        raise UserError(f"--topk {args.topk}: K = topk x L, L = {patches}; it must keep at least 1 key and at most all (1.0)")
    if not 0 <= args.global_layers <= args.depth:
        raise UserError(f"--global-layers {args.global_layers}: the encoder has {args.depth} layers; give 0 to {args.depth}")
    weights = args.recon_weight, args.homocon_weight
    if not (all(0 <= weight < math.inf for weight in weights) and any(weights)):
        raise UserError(f"--recon-weight {weights[0]} and --homocon-weight {weights[1]} must be at least 0, and one of them above 0")
    if not (0 < args.temperature < math.inf and args.projector_width >= 1):
        raise UserError(f"--temperature {args.temperature} must be above 0, --projector-width {args.projector_width} at least 1")


class MixedAE(nn.Module):
    """MixedAE of Fig. 2: B clean images make G = B r mixed ones, in full mode B. With the flags of README.md also its ablations (Table 3),
    naive mixing (Sec. 3.1) among them."""

    @staticmethod
    def add_args(parser):
        add = parser.add_argument_group("MixedAE").add_argument
        add("--mixing-ratio", type=float, default=0.25, help="r = 1/n: share of a mixed image that each of its n images gives (Sec. 4.1, Table 3a)")
        add("--mixing-mode", choices=("compose", "full"), default="compose", help="one mixed image a group, or n of them (Sec. 3.2, Fig. 4)")
        add("--topk", type=float, default=0.25, help="K / L of Eq. 6: share of the key patches that a query keeps, best equal to r; 1.0 is global attention (Table 3d)")
        add("--cls-in-topk", action="store_true", help="Eq. 6 with CLS as one more patch: every query keeps K of all 1 + L keys")
        add("--global-layers", type=int, default=1, help="how many of the first layers keep global attention (Table 3e)")
        add("--recon-weight", type=float, default=1.0, help="weight of Eq. 4; 0 trains on Eq. 7 alone, without a decoder (the poster's table b)")
        add("--homocon-weight", type=float, default=0.1, help="lambda of Eq. 8 (Sec. 3.3); 0 trains without Eq. 7 (Table 3f)")
        add("--homocon-position", choices=("post-ln", "pre-ln"), default="post-ln", help="Eq. 7 after or before the final LayerNorm (Table 3b)")
        add("--homocon-positives", choices=("separate", "mean"), default="separate", help="each positive by itself, or their mean (Table 3c)")
        add("--temperature", type=float, default=0.25, help="tau of Eq. 7 (Sec. 4.1)")
        add("--projector-width", type=int, default=128, help="E, output width of the linear projector before Eq. 7 (Sec. 4.1)")
        add("--segment-embedding", action=argparse.BooleanOptionalAction, default=True, help="tell a group's images apart by a learned vector (Sec. 3.2)")
        add("--segment-export", choices=("first", "mean", "none"), default="first", help="which segment encoder.pt gives to a clean image (ours)")
        add("--norm-pix", action=argparse.BooleanOptionalAction, default=True, help="targets normalised patch by patch (Sec. 4.1: as MAE)")

    def __init__(self, args):
        super().__init__()
        self.encoder = encoder = build_encoder(args)
        L = encoder.num_patches
        self.n = n = images_per_group(args.mixing_ratio, args.batch_size, L)
        self.mixes = n if args.mixing_mode == "full" else 1  # mixed images that a group makes
        check_args(args, L)

        k = keys(args.topk, L)  # K of Eq. 6
        if k < L:  # K = L is no sampling: plain global attention (Table 3d)
            for block in encoder.blocks[args.global_layers :]:  # every layer but the first ones (Sec. 3.2, Table 3e)
                block.attn.topk, block.attn.cls_in_topk = k, args.cls_in_topk
        self.accuracy_keys = k if k < L else L // n  # in global layers; with K = L every accuracy would be r, so r L keys there
        self.segments, self.segment_export = None, args.segment_export
        if args.segment_embedding:
            self.segments = nn.Parameter(torch.empty(n, encoder.width).normal_(std=0.02))  # std ours: as CLS and [MASK]

        self.panels = ["image", "mixed", "who gave\neach patch"]  # titles of the pictures
        # A module exists only if a loss uses it: DDP stops on a parameter without gradient.
        self.recon_weight, self.norm_pix = args.recon_weight, args.norm_pix
        if self.recon_weight:
            self.decoder = build_decoder(args, encoder)
            self.panels += ["reconstruction\n(true mean, std)" if self.norm_pix else "reconstruction"]
        self.homocon_weight, self.tau = args.homocon_weight, args.temperature
        self.homocon_position, self.homocon_positives = args.homocon_position, args.homocon_positives
        if self.homocon_weight:
            self.projector = nn.Linear(encoder.width, args.projector_width)  # Sec. 4.1: linear, right before Eq. 7
            self.projector.apply(init_weights)
            self.homocon_floor = math.log(L // n - 1)
        if not self.recon_weight and self.homocon_position == "pre-ln":
            encoder.norm.requires_grad_(False)  # no decoder, and Eq. 7 before it: nothing uses it

    def predict(self, images, mask=None):
        """Every tensor of Fig. 2. images (B, C, H, W) normalised; mask: M of Eq. 2, the source ids (G, L), in full mode (G, n, L),
        in 0 .. n-1 (the paper: 1 .. n), or None to draw them.

        Returns mixed (G, L, P), sources as `mask`, z (G, 1+L, D) after the final LayerNorm and z_pre_ln before it, and unless
        --recon-weight is 0 unmixed (B, 1+L, Dd), pred and target (B, L, P). In full mode n G = B stands for G, and n B for B.
        """
        n, encoder = self.n, self.encoder
        if len(images) % n:
            raise UserError(f"{len(images)} images cannot be split into groups of n = {n}; give a multiple of {n}")
        x = patchify(images, encoder.patch_size)  # (B, L, P)
        groups = repeat(x, "(g n) l p -> (g m) n l p", n=n, m=self.mixes)  # full mode: each group once a mask
        sources = draw_sources(len(groups), n, x.shape[1], x.device) if mask is None else mask.flatten(0, -2)  # M, (G, L)
        mixed = mix(groups, sources)  # Eq. 1, (G, L, P)

        image = unpatchify(mixed, encoder.grid, encoder.patch_size)  # the patch embedding is a convolution, for timm's names
        tokens = encoder.embed(image)  # (G, L, D)
        if self.segments is not None:
            tokens = tokens + self.segments[sources]  # segment embedding (Sec. 3.2, Fig. 3b), (G, L, D)
        z_pre_ln = encoder.encode_raw(tokens)  # Eq. 6 inside, (G, 1+L, D)
        z = encoder.norm(z_pre_ln)
        out = {"mixed": mixed, "sources": sources.unflatten(0, (-1, n)) if self.mixes > 1 else sources, "z": z, "z_pre_ln": z_pre_ln}

        if self.recon_weight:
            out["unmixed"] = unmix(self.decoder.embed(z), sources, n, self.decoder.mask_token)  # Eq. 3, (B, 1+L, Dd)
            out["pred"] = self.decoder(out["unmixed"])  # (B, L, P)
            target = norm_pix(x) if self.norm_pix else x
            out["target"] = repeat(target, "(g n) l p -> (g m n) l p", n=n, m=self.mixes)
        return out

    def forward(self, images, mask=None):
        """images (B, C, H, W) -> loss (), {"recon": (), "homocon": (), "homocon_floor": ()}, each only if it has a weight."""
        out = self.predict(images, mask)
        sources, loss, metrics = out["sources"].flatten(0, -2), 0, {}  # (G, L)
        if self.recon_weight:
            recon = reconstruction_loss(out["pred"], out["target"], sources)  # Eq. 4
            loss = loss + self.recon_weight * recon
            metrics["recon"] = recon.detach()
        if self.homocon_weight:
            features = out["z" if self.homocon_position == "post-ln" else "z_pre_ln"][:, 1:]  # Table 3b, (G, L, D)
            with torch.autocast(images.device.type, enabled=False):
                homocon = homologous_contrastive_loss(self.projector(features.float()), sources, self.tau, self.homocon_positives)  # Eq. 7
            loss = loss + self.homocon_weight * homocon  # Eq. 8: L = L_recon + lambda L_HomoCon
            metrics["homocon"] = homocon.detach()
            if self.homocon_positives == "separate":  # the mean positive has no such floor
                metrics["homocon_floor"] = homocon.new_full((), self.homocon_floor)  # a constant, logged to compare with
        return loss, metrics

    @torch.no_grad()
    def visualize(self, images):
        """images (B, C, H, W) -> pictures (B, panels, 3, H, W) in [0, 1], {"accuracy": last layer, "accuracy_layers": [first .. last]}.

        The panels: image, the mixed image of its group (in full mode the first of them), who gave each patch (colours: image 1, 2, ...
        of the group), and unless --recon-weight is 0 the reconstruction. With norm_pix it borrows each hidden patch's true mean and
        standard deviation: its colours are not predicted. Images behind the last whole group are left out.
        """
        n, p, grid = self.n, self.encoder.patch_size, self.encoder.grid
        images = images[: len(images) // n * n or len(images)]  # whole groups; of less than one `predict` says what is wrong
        attentions = [block.attn for block in self.encoder.blocks]
        for attention in attentions:
            attention.record = True
        out = self.predict(images)
        sources = out["sources"].flatten(0, -2)  # (G, L)
        layers = []
        for attention in attentions:
            keep, probabilities = attention.recorded
            layers.append(sampling_accuracy(probabilities, keep, sources, self.accuracy_keys).item())
            attention.record, attention.recorded = False, None

        patches = patchify(images, p)  # (B, L, P)
        sources = sources[:: self.mixes]  # the first mixed image of each group, here and below
        mixed = repeat(denormalize(unpatchify(out["mixed"][:: self.mixes], grid, p)), "g c h w -> (g n) c h w", n=n)
        palette = torch.tensor([COLOURS[i % len(COLOURS)] for i in range(n)], device=images.device)  # (n, 3)
        colours = repeat(palette[sources], "g l c -> (g n) l (q c)", n=n, q=p * p)
        pictures = [denormalize(images), mixed, 0.5 * mixed + 0.5 * unpatchify(colours, grid, p)]
        if self.recon_weight:
            pred = rearrange(out["pred"].float(), "(g m n) l p -> g m n l p", n=n, m=self.mixes)[:, 0].flatten(0, 1)  # (B, L, P)
            if self.norm_pix:
                pred = undo_norm_pix(pred, patches)
            own = rearrange(indicator(sources, n), "g n l -> (g n) l 1")
            pictures.append(denormalize(unpatchify(torch.where(own, patches, pred), grid, p)))
        return torch.stack(pictures, dim=1).clamp(0, 1), {"accuracy": layers[-1], "accuracy_layers": layers}

    def export(self):
        """What encoder.pt holds: a plain ViT with global attention, a segment (Sec. 3.2; --segment-export) folded into the patch bias,
        which reaches every patch token and not CLS, as the segment does in training."""
        state_dict = dict(self.encoder.state_dict())
        if self.segments is not None and self.segment_export != "none":
            segment = self.segments[0] if self.segment_export == "first" else self.segments.mean(dim=0)  # (D,)
            state_dict["patch_embed.proj.bias"] = state_dict["patch_embed.proj.bias"] + segment
        return pack_encoder(self.encoder, "mixedae", "mean", MEAN, STD, state_dict)  # Sec. 4.2 averages all patch tokens
