"""Mixed Autoencoder (MixedAE), Chen et al., CVPR 2023, arXiv 2303.17152.

Reading order of the project: vit -> mrmae -> **mixedae** -> data -> train.

Mix the patches of n = 1/r images into one, let each patch find the patches of its own image, and rebuild all n images:

    images (B, C, H, W), a group = n consecutive ones; G = B r groups
        -- Eq. 1: mix, M = sources (G, L) --> mixed (G, L, P)
        -- patch embedding + positions + segments --> (G, L, D) -- encoder, homologous attention Eq. 6 --> z (G, 1+L, D)
              |-- Eq. 7: homologous contrastive loss on the patches of z: find your own image's
        -- decoder.embed -- Eq. 3: unmix, [MASK] where M is another image --> unmixed (B, 1+L, Dd)
        -- decoder --> pred (B, L, P) -- Eq. 4: squared error where M is another image
    Eq. 8: L = L_recon + lambda L_HomoCon

That is compose mode. Full mode (Sec. 3.2, Fig. 4) draws n masks for each group: sources (G, n, L), so B mixed images, and n B rebuilt
ones, ordered by group, mask, source. It is compose mode on each group repeated n times, and so it is written.

Run it:  python train.py --method mixedae    (the drawn set `shapes`, a laptop; README.md has times, losses, every row of Table 3 and the paper's runs)

The log shows both losses, and beside `homocon` its floor log(r L - 1), below which it cannot fall: with m = r L - 1 positives in its
denominator, -log of a positive's share is on average at least log m. A run that has reached it is not stuck. `accuracy` is the
sampling accuracy of Fig. 6 (chance: r). Eq. 5, an inequality, is checked in tests/test_mixedae.py.

Where the paper is silent (its appendices A-E are not public)
    - Groups are n consecutive images of one process's micro-batch. The n masks of full mode are independent, as Sec. 3.2 says: a
      patch of an image may be seen under two of them, or under none.
    - Eq. 6 speaks of query *patches* and key *patches*: those take part in TopK. K = 0.25 L counts patches; the CLS key is always
      kept and not counted; the CLS query sees all. `--cls-in-topk` is the plain reading: every row picks K of all 1 + L keys.
      The decoder's attention stays global: each of its sequences holds one image.
    - One CLS token a mixed image, without segment; unmixing copies it to each of the n sequences. [MASK] enters after the
      decoder's embedding, as in MAE.
    - Segment embeddings: n learned vectors, added with the positions. A clean image is one segment, as BERT's single sentence is
      segment A: `export` folds segment 0 into the patch bias, and what transfers is a plain ViT with global attention.
    - Eq. 4 is averaged over hidden patches and their values, with MAE's norm_pix targets ("the remaining hyperparameters are all
      maintained the same with MAE").
    - Eq. 7 is averaged over a patch's positives, then over patches (SupCon's L_out, which the paper cites): with its literal sums
      lambda = 0.1 would weigh L (r L - 1) times as much. Computed in fp32. The "mean positive" of Table 3c is the average of the
      projections of an image's patches, the query's among them; the denominator stays that of Eq. 7.
    - Sampling accuracy: of the K largest patch scores of each query patch (itself included), the share from its own image; mean over
      heads, queries and images.
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
def draw_sources(masks, n, patches, device):
    """M (Eq. 2): which image gives each patch, (masks, L) in 0 .. n-1. Each image gives exactly r L = L / n patches, at random places."""
    balanced = torch.arange(patches, device=device) // (patches // n)  # (L,): 0 .. 0, 1 .. 1, ...
    return balanced[torch.rand(masks, patches, device=device).argsort(dim=1)]


def indicator(sources, n):
    """1(M = i): sources (G, L) -> bool (G, n, L)."""
    return sources.unsqueeze(1) == torch.arange(n, device=sources.device).view(1, n, 1)


def mix(x, sources):
    """Eq. 1: x_hat = sum_i 1(M = i) x_i, for each group j (an index that is left out here and below).

    Clean patches x (G, n, L, P), sources M (G, L) -> mixed (G, L, P). G counts mixed images, here and below: in full mode it is B.
    """
    own = indicator(sources, x.shape[1])  # (G, n, L)
    return (own.unsqueeze(-1) * x).sum(dim=1)


def unmix(z, sources, n, mask_token):
    """Eq. 3: z_i = 1(M = i) z_hat + [1 - 1(M = i)] [MASK].

    z (G, 1+L, Dd) is z_hat after decoder.embed, CLS first; sources (G, L); mask_token (1, 1, Dd) -> (B, 1+L, Dd), B = G n, the n
    images of a group one after the other, each with a copy of CLS.
    """
    own = F.pad(indicator(sources, n), (1, 0), value=True)  # (G, n, 1+L)
    unmixed = torch.where(own.unsqueeze(-1), z.unsqueeze(1), mask_token.unsqueeze(1))  # (G, n, 1+L, Dd), fp32 under autocast
    return rearrange(unmixed, "g n l d -> (g n) l d")


def reconstruction_loss(pred, target, sources):
    """Eq. 4: L_recon = sum_i sum_l [1 - 1(M_l = i)] (y_i,l - x_i,l)^2, as a mean.

    pred y, target x (B, L, P), sources M (G, L) -> (): averaged over the P values and over the patches that others cover.
    """
    n = len(pred) // len(sources)
    hidden = rearrange(~indicator(sources, n), "g n l -> (g n) l")  # 1 - 1(M = i), (B, L)
    error = (pred.float() - target).square().mean(dim=-1)  # (B, L)
    return (error * hidden).sum() / hidden.sum()


# --------------------------------------------------------------------------------------------------------------------
# Sec. 3.2: homologous recognition. The attention itself, Eq. 6, is `Attention.explicit` and `keep_topk` in vit.py.
# --------------------------------------------------------------------------------------------------------------------
def homologous_contrastive_loss(z, sources, tau, positives="separate"):
    """Eq. 7: L_HomoCon = - sum_l sum_l+ log( exp(cos(z_l, z_l+) / tau) / sum_{l' != l} exp(cos(z_l, z_l') / tau) ).

    z (G, L, 128, or --projector-width) projected patch features, sources (G, L). l' runs over all L - 1 other patches of the mixed
    image. positives (Table 3c): "separate", l+ runs over the r L - 1 other patches of l's image; "mean", the one positive is the
    average of l and of those. Averaged over l+, l and the mixed images -> ().
    """
    z = z.float()
    cos = F.normalize(z, dim=-1) @ F.normalize(z, dim=-1).transpose(1, 2)  # cos(z_l, z_l'), (G, L, L)
    itself = torch.eye(z.shape[1], dtype=torch.bool, device=z.device)  # (L, L)
    log_denominator = (cos / tau).masked_fill(itself, float("-inf")).logsumexp(dim=-1, keepdim=True)  # (G, L, 1)
    homologous = sources.unsqueeze(1) == sources.unsqueeze(2)  # (G, L, L), itself included
    if positives == "mean":
        mean = homologous.float() @ z / homologous.sum(dim=-1, keepdim=True)  # (G, L, 128)
        return (log_denominator - F.cosine_similarity(z, mean, dim=-1).unsqueeze(-1) / tau).mean()
    positive = homologous & ~itself
    # Every patch has r L - 1 positives, so one mean over all pairs is the mean over l+, then l.
    return ((log_denominator - cos / tau) * positive).sum() / positive.sum()


def sampling_accuracy(attention, kept, sources, k):
    """Fig. 6: how many of the K keys of the highest scores come from the query's own image; chance is r.

    attention (G, H, 1+L, 1+L) probabilities, kept: its TopK choice or None where the layer is global, sources (G, L) -> ().
    """
    if kept is None:
        best = attention[..., 1:, 1:].topk(k, dim=-1).indices  # softmax keeps the order of the scores
        kept = torch.zeros_like(attention[..., 1:, 1:], dtype=torch.bool).scatter(-1, best, True)
    else:
        kept = kept[..., 1:, 1:]  # (G, H, L, L)
    same = (sources.unsqueeze(1) == sources.unsqueeze(2)).unsqueeze(1)  # (G, 1, L, L)
    return (kept & same).sum() / kept.sum()


def images_per_group(ratio, batch_size, patches):
    """r -> n, or one clear line: r = 1/n, n >= 2 (Sec. 3.1: r in (0, 0.5]), n divides the batch and L, and r L >= 2 (Eq. 7)."""
    n = round(1 / ratio) if 1e-6 < ratio <= 1 else 0
    if n < 2 or abs(ratio * n - 1) > 0.01:
        raise UserError(f"--mixing-ratio {ratio} is not 1/n with n >= 2; use .5, .333, .25, .2, .125 ...")
    if batch_size % n:
        raise UserError(f"--batch-size {batch_size} is not a multiple of n = {n} images in a group (--mixing-ratio {ratio})")
    if patches % n or patches // n < 2:
        raise UserError(f"{patches} patches an image cannot be shared by n = {n} images, at least 2 each (--mixing-ratio {ratio}); "
                        f"change --image-size, --patch-size or --mixing-ratio")
    return n


def check_args(args, patches):
    """One clear line for numbers that cannot work. Comparisons are written so that NaN is refused too."""
    if not 0 < args.topk <= 1 or int(args.topk * patches) < 1:
        raise UserError(f"--topk {args.topk}: K = topk x L, L = {patches}; it must keep at least 1 key and at most all (1.0)")
    if not 0 <= args.global_layers <= args.depth:
        raise UserError(f"--global-layers {args.global_layers}: the encoder has {args.depth} layers; give 0 to {args.depth}")
    if not (0 <= args.recon_weight < math.inf and 0 <= args.homocon_weight < math.inf and args.recon_weight + args.homocon_weight > 0):
        raise UserError(f"--recon-weight {args.recon_weight} and --homocon-weight {args.homocon_weight} must be at least 0, and one of them above 0")
    if not (0 < args.temperature < math.inf and args.projector_width >= 1):
        raise UserError(f"--temperature {args.temperature} must be above 0, --projector-width {args.projector_width} at least 1")


class MixedAE(nn.Module):
    """MixedAE of Fig. 2: B clean images make G = B r mixed ones, in full mode B."""

    @staticmethod
    def add_args(parser):
        add = parser.add_argument_group("MixedAE").add_argument
        add("--mixing-ratio", type=float, default=0.25, help="r = 1/n: share of a mixed image that each of its n images gives (Sec. 4.1, Table 3a)")
        add("--mixing-mode", choices=("compose", "full"), default="compose", help="one mixed image a group, or n of them (Sec. 3.2, Fig. 4)")
        add("--topk", type=float, default=0.25, help="K of Eq. 6 in units of L; 1.0 is plain global attention (Table 3d)")
        add("--cls-in-topk", action="store_true", help="the plain reading of Eq. 6: every query picks K of all keys, CLS among both")
        add("--global-layers", type=int, default=1, help="how many of the first layers keep global attention (Table 3e)")
        add("--recon-weight", type=float, default=1.0, help="weight of Eq. 4; 0 trains on Eq. 7 alone, without a decoder (the poster's table b)")
        add("--homocon-weight", type=float, default=0.1, help="lambda of Eq. 8 (Sec. 3.3); 0 trains without Eq. 7 (Table 3f)")
        add("--homocon-position", choices=("post-ln", "pre-ln"), default="post-ln", help="features of Eq. 7: after or before the final LayerNorm (Table 3b)")
        add("--homocon-positives", choices=("separate", "mean"), default="separate", help="each positive by itself, or their mean (Table 3c)")
        add("--temperature", type=float, default=0.25, help="tau of Eq. 7 (Sec. 4.1)")
        add("--projector-width", type=int, default=128, help="output width of the linear projector before Eq. 7 (Sec. 4.1)")
        add("--segment-embedding", action=argparse.BooleanOptionalAction, default=True, help="tell a group's images apart by a learned vector (Sec. 3.2)")
        add("--segment-export", choices=("first", "mean", "none"), default="first", help="which segment encoder.pt gives to a clean image (ours)")
        add("--norm-pix", action=argparse.BooleanOptionalAction, default=True, help="targets normalised patch by patch (Sec. 4.1: as MAE)")

    def __init__(self, args):
        super().__init__()
        self.encoder = encoder = build_encoder(args)
        L = encoder.num_patches
        self.n = n = images_per_group(args.mixing_ratio, args.batch_size, L)
        self.masks = n if args.mixing_mode == "full" else 1  # mixed images that a group makes
        check_args(args, L)

        k = int(args.topk * L)  # K of Eq. 6
        if k < L:  # K = L is no sampling: plain global attention (Table 3d)
            for block in encoder.blocks[args.global_layers :]:  # every layer but the first ones (Sec. 3.2, Table 3e)
                block.attn.topk, block.attn.cls_in_topk = k, args.cls_in_topk
        self.accuracy_keys = k if k < L else L // n  # the keys that Fig. 6 looks at: with K = L the accuracy would always be r
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
        self.position, self.positives = args.homocon_position, args.homocon_positives
        if self.homocon_weight:
            self.projector = nn.Linear(encoder.width, args.projector_width)  # Sec. 4.1: linear, right before Eq. 7
            self.projector.apply(init_weights)
            self.homocon_floor = math.log(L // n - 1)
        if not self.recon_weight and self.position == "pre-ln":
            encoder.norm.requires_grad_(False)  # neither loss sees it

    def predict(self, images, mask=None):
        """Every tensor of Fig. 2. images (B, C, H, W) normalised; mask: M of Eq. 2, the source ids in 0 .. n-1 (the paper counts
        from 1), (G, L), in full mode (G, n, L), or None to draw them.

        Returns mixed (G, L, P), sources as `mask`, z (G, 1+L, D) after and z_pre_ln before the final LayerNorm, and with L_recon
        unmixed (B, 1+L, Dd), pred and target (B, L, P). In full mode the G is B, and the B is n B.
        """
        n, encoder = self.n, self.encoder
        if len(images) % n:
            raise UserError(f"{len(images)} images cannot be split into groups of n = {n}; give a multiple of {n}")
        x = patchify(images, encoder.patch_size)  # (B, L, P)
        groups = repeat(x, "(g n) l p -> (g m) n l p", n=n, m=self.masks)  # in full mode each group once for each of its masks
        sources = draw_sources(len(groups), n, x.shape[1], x.device) if mask is None else mask.flatten(0, -2)  # M, (G, L)
        mixed = mix(groups, sources)  # Eq. 1, (G, L, P)

        tokens = encoder.embed(unpatchify(mixed, encoder.grid, encoder.patch_size))  # (G, L, D)
        if self.segments is not None:
            tokens = tokens + self.segments[sources]  # segment embedding (Sec. 3.2, Fig. 3b), (G, L, D)
        depth = len(encoder.blocks)
        taps = {depth: None}  # receives what the last block gives
        z = encoder.encode(tokens, taps)  # Eq. 6 inside, (G, 1+L, D)
        out = {"mixed": mixed, "sources": sources if self.masks == 1 else sources.unflatten(0, (-1, n)), "z": z, "z_pre_ln": taps[depth]}

        if self.recon_weight:
            out["unmixed"] = unmix(self.decoder.embed(z), sources, n, self.decoder.mask_token)  # Eq. 3, (B, 1+L, Dd)
            out["pred"] = self.decoder(out["unmixed"])  # (B, L, P)
            target = norm_pix(x) if self.norm_pix else x
            out["target"] = repeat(target, "(g n) l p -> (g m n) l p", n=n, m=self.masks)
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
            features = out["z" if self.position == "post-ln" else "z_pre_ln"][:, 1:]  # Table 3b, (G, L, D)
            with torch.autocast(images.device.type, enabled=False):
                homocon = homologous_contrastive_loss(self.projector(features.float()), sources, self.tau, self.positives)  # Eq. 7
            loss = loss + self.homocon_weight * homocon  # Eq. 8: L = L_recon + lambda L_HomoCon
            metrics["homocon"] = homocon.detach()
            if self.positives == "separate":
                metrics["homocon_floor"] = homocon.new_full((), self.homocon_floor)
        return loss, metrics

    @torch.no_grad()
    def visualize(self, images):
        """images (B, C, H, W) -> pictures (B, panels, 3, H, W) in [0, 1], {"accuracy": last layer, "accuracy_layers": [first .. last]}.

        The panels: image, the mixed image of its group (in full mode the first of them), who gave each patch (colours: image 1, 2, ...
        of the group), and with L_recon the reconstruction. With norm_pix it borrows each hidden patch's true mean and standard
        deviation: its colours are not predicted. Images behind the last whole group are left out.
        """
        n, p, grid = self.n, self.encoder.patch_size, self.encoder.grid
        images = images[: len(images) // n * n or len(images)]
        attentions = [block.attn for block in self.encoder.blocks]
        for attention in attentions:
            attention.record = True
        out = self.predict(images)
        sources, layers = out["sources"].flatten(0, -2), []
        for attention in attentions:
            kept, probabilities = attention.recorded
            layers.append(sampling_accuracy(probabilities, kept, sources, self.accuracy_keys).item())
            attention.record, attention.recorded = False, None

        patches, sources = patchify(images, p), sources[:: self.masks]  # (B, L, P), (B / n, L)
        mixed = repeat(denormalize(unpatchify(out["mixed"][:: self.masks], grid, p)), "g c h w -> (g n) c h w", n=n)
        palette = torch.tensor([COLOURS[i % len(COLOURS)] for i in range(n)], device=images.device)  # (n, 3)
        colours = repeat(palette[sources], "g l c -> (g n) l (q c)", n=n, q=p * p)
        pictures = [denormalize(images), mixed, 0.5 * mixed + 0.5 * unpatchify(colours, grid, p)]
        if self.recon_weight:
            pred = rearrange(out["pred"].float(), "(g m n) l p -> g m n l p", n=n, m=self.masks)[:, 0].flatten(0, 1)  # (B, L, P)
            if self.norm_pix:
                pred = undo_norm_pix(pred, patches)
            own = rearrange(indicator(sources, n), "g n l -> (g n) l 1")
            pictures.append(denormalize(unpatchify(torch.where(own, patches, pred), grid, p)))
        return torch.stack(pictures, dim=1).clamp(0, 1), {"accuracy": layers[-1], "accuracy_layers": layers}

    def export(self):
        """What encoder.pt holds: a plain ViT with global attention, a segment (Sec. 3.2; --segment-export) folded into the patch bias."""
        state_dict = dict(self.encoder.state_dict())
        if self.segments is not None and self.segment_export != "none":
            segment = self.segments[0] if self.segment_export == "first" else self.segments.mean(dim=0)  # (D,)
            state_dict["patch_embed.proj.bias"] = state_dict["patch_embed.proj.bias"] + segment
        return pack_encoder(self.encoder, "mixedae", "mean", MEAN, STD, state_dict)  # Sec. 4.2 averages all patch tokens
