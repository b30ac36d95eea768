"""Mixed Autoencoder (MixedAE), Chen et al., CVPR 2023, arXiv 2303.17152, in compose mode.

Reading order of the project: vit -> mrmae -> **mixedae** -> data -> train.

Mix the patches of n = 1/r images into one, let each patch find the patches of its own image, and rebuild all n images:

    images (B, C, H, W), a group = n consecutive ones; G = B r groups
        -- Eq. 1: mix, M = sources (G, L) --> mixed (G, L, P)
        -- patch embedding + positions + segments --> (G, L, D) -- encoder, homologous attention Eq. 6 --> z (G, 1+L, D)
              |-- Eq. 7: homologous contrastive loss on the patches of z: find your own image's
        -- decoder.embed -- Eq. 3: unmix, [MASK] where M is another image --> unmixed (B, 1+L, Dd)
        -- decoder --> pred (B, L, P) -- Eq. 4: squared error where M is another image
    Eq. 8: L = L_recon + lambda L_HomoCon

Run it:  python train.py --method mixedae    (the drawn set `shapes`, a laptop; README.md has times, losses and the paper's runs)

The log shows both losses, and beside `homocon` its floor log(r L - 1), below which it cannot fall: with m = r L - 1 positives in its
denominator, -log of a positive's share is on average at least log m. A run that has reached it is not stuck. `accuracy` is the sampling accuracy of Fig. 6 (chance: r).

Where the paper is silent (its appendices A-E are not public)
    - Groups are n consecutive images of one process's micro-batch.
    - Eq. 6 speaks of query *patches* and key *patches*: those take part in TopK. K = 0.25 L counts patches; the CLS key is always
      kept and not counted; the CLS query sees all. The decoder's attention stays global: its n sequences hold one image each.
    - One CLS token a mixed image, without segment; unmixing copies it to each of the n sequences. [MASK] enters after the
      decoder's embedding, as in MAE.
    - Segment embeddings: n learned vectors, added with the positions. A clean image is one segment, as BERT's single sentence is
      segment A: `export` folds segment 0 into the patch bias, and what transfers is a plain ViT with global attention.
    - Eq. 4 is averaged over hidden patches and their values, with MAE's norm_pix targets ("the remaining hyperparameters are all
      maintained the same with MAE").
    - Eq. 7 is averaged over a patch's positives, then over patches (SupCon's L_out, which the paper cites): with its literal sums
      lambda = 0.1 would weigh L (r L - 1) times as much. Computed in fp32.
    - Sampling accuracy: of the K largest patch scores of each query patch (itself included), the share from its own image; mean over
      heads, queries and images.
"""
import argparse
import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from data import MEAN, STD, denormalize
from vit import UserError, build_decoder, build_encoder, init_weights, norm_pix, pack_encoder, patchify, undo_norm_pix, unpatchify

COLOURS = [(0.90, 0.30, 0.24), (0.20, 0.60, 0.86), (0.95, 0.77, 0.06), (0.18, 0.80, 0.44),  # who gave a patch, in the pictures
           (0.61, 0.35, 0.71), (0.90, 0.49, 0.13), (0.10, 0.74, 0.61), (0.50, 0.55, 0.55)]


# --------------------------------------------------------------------------------------------------------------------
# Sec. 3.1: mixing and unmixing
# --------------------------------------------------------------------------------------------------------------------
def draw_sources(groups, n, patches, device):
    """M (Eq. 2): which image gives each patch, (G, L) in 0 .. n-1. Each image gives exactly r L = L / n patches, at random places."""
    balanced = torch.arange(patches, device=device) // (patches // n)  # (L,): 0 .. 0, 1 .. 1, ...
    return balanced[torch.rand(groups, patches, device=device).argsort(dim=1)]


def indicator(sources, n):
    """1(M = i): sources (G, L) -> bool (G, n, L)."""
    return sources.unsqueeze(1) == torch.arange(n, device=sources.device).view(1, n, 1)


def mix(x, sources):
    """Eq. 1: x_hat = sum_i 1(M = i) x_i, for each group j (an index that is left out here and below). Clean patches x (G, n, L, P), sources M (G, L) -> mixed (G, L, P)."""
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
def homologous_contrastive_loss(z, sources, tau):
    """Eq. 7: L_HomoCon = - sum_l sum_l+ log( exp(cos(z_l, z_l+) / tau) / sum_{l' != l} exp(cos(z_l, z_l') / tau) ).

    z (G, L, 128, or --projector-width) projected patch features, sources (G, L). l+ runs over the r L - 1 other patches of l's image
    (positives separately, Table 3c), l' over all L - 1 other patches of the mixed image. Averaged over l+, l and the groups -> ().
    """
    z = F.normalize(z.float(), dim=-1)
    itself = torch.eye(z.shape[1], dtype=torch.bool, device=z.device)  # (L, L)
    similarity = (z @ z.transpose(1, 2) / tau).masked_fill(itself, float("-inf"))  # cos / tau, (G, L, L)
    log_ratio = similarity - similarity.logsumexp(dim=-1, keepdim=True)
    positive = (sources.unsqueeze(1) == sources.unsqueeze(2)) & ~itself  # (G, L, L)
    # Every patch has r L - 1 positives, so one mean over all pairs is the mean over l+, then l.
    return -log_ratio.masked_fill(~positive, 0).sum() / positive.sum()


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


class MixedAE(nn.Module):
    """MixedAE of Fig. 2, compose mode: B clean images make G = B r mixed ones."""

    panels = ("image", "mixed", "who gave each patch", "reconstruction")

    @staticmethod
    def add_args(parser):
        add = parser.add_argument
        add("--mixing-ratio", type=float, default=0.25, help="r = 1/n: share of a mixed image that each of its n images gives (Sec. 4.1, Table 3a)")
        add("--topk", type=float, default=0.25, help="K of Eq. 6 in units of L; 1.0 is plain global attention (Table 3d)")
        add("--global-layers", type=int, default=1, help="how many of the first layers keep global attention (Table 3e)")
        add("--homocon-weight", type=float, default=0.1, help="lambda of Eq. 8 (Sec. 3.3); 0 trains without Eq. 7 (Table 3f)")
        add("--temperature", type=float, default=0.25, help="tau of Eq. 7 (Sec. 4.1)")
        add("--projector-width", type=int, default=128, help="output width of the linear projector before Eq. 7 (Sec. 4.1)")
        add("--segment-embedding", action=argparse.BooleanOptionalAction, default=True, help="tell a group's images apart by a learned vector (Sec. 3.2)")
        add("--norm-pix", action=argparse.BooleanOptionalAction, default=True, help="targets normalised patch by patch (Sec. 4.1: as MAE)")

    def __init__(self, args):
        super().__init__()
        self.encoder = build_encoder(args)
        self.decoder = build_decoder(args, self.encoder)
        L = self.encoder.num_patches
        self.n = n = check_ratio(args.mixing_ratio, args.batch_size, L)
        if not 0 < args.topk <= 1 or int(args.topk * L) < 1:
            raise UserError(f"--topk {args.topk}: K = topk x L, L = {L}; it must keep at least 1 key and at most all (1.0)")
        if not 0 <= args.global_layers <= args.depth:
            raise UserError(f"--global-layers {args.global_layers}: the encoder has {args.depth} layers; give 0 to {args.depth}")
        k = int(args.topk * L)  # K of Eq. 6
        if k < L:  # K = L is no sampling: plain global attention (Table 3d)
            for block in self.encoder.blocks[args.global_layers :]:
                block.attn.topk = k  # Eq. 6 in every layer but the first ones (Sec. 3.2, Table 3e)
        self.accuracy_keys = k if k < L else L // n  # the keys that Fig. 6 looks at: with K = L the accuracy would always be r
        self.norm_pix, self.weight, self.tau = args.norm_pix, args.homocon_weight, args.temperature
        if args.segment_embedding:
            self.segments = nn.Parameter(torch.empty(n, self.encoder.width).normal_(std=0.02))  # std ours: as CLS and [MASK]
        else:
            self.segments = None
        if not (self.weight >= 0 and self.tau > 0 and args.projector_width >= 1):  # so written, NaN is refused too
            raise UserError(f"--homocon-weight {self.weight} must be at least 0, --temperature {self.tau} above 0, "
                            f"--projector-width {args.projector_width} at least 1")
        if self.weight:  # a module exists only if it is used: DDP stops on a parameter without gradient
            self.projector = nn.Linear(self.encoder.width, args.projector_width)  # Sec. 4.1: linear, right before Eq. 7
            self.projector.apply(init_weights)
            self.homocon_floor = math.log(L // n - 1)

    def predict(self, images, mask=None):
        """Every tensor of Fig. 2. images (B, C, H, W) normalised; mask: M of Eq. 2, the source ids (G, L) in 0 .. n-1
        (the paper counts from 1), or None to draw them.

        Returns mixed (G, L, P), sources (G, L), z (G, 1+L, D), unmixed (B, 1+L, Dd), pred and target (B, L, P).
        """
        n, encoder = self.n, self.encoder
        if len(images) % n:
            raise UserError(f"{len(images)} images cannot be split into groups of n = {n}")
        x = patchify(images, encoder.patch_size)  # (B, L, P)
        groups = rearrange(x, "(g n) l p -> g n l p", n=n)
        sources = draw_sources(len(groups), n, x.shape[1], x.device) if mask is None else mask
        mixed = mix(groups, sources)  # Eq. 1, (G, L, P)

        tokens = encoder.embed(unpatchify(mixed, encoder.grid, encoder.patch_size))  # (G, L, D)
        if self.segments is not None:
            tokens = tokens + self.segments[sources]  # segment embedding (Sec. 3.2, Fig. 3b), (G, L, D)
        z = encoder.encode(tokens)  # Eq. 6 inside, (G, 1+L, D)

        unmixed = unmix(self.decoder.embed(z), sources, n, self.decoder.mask_token)  # Eq. 3, (B, 1+L, Dd)
        pred = self.decoder(unmixed)  # (B, L, P)
        target = norm_pix(x) if self.norm_pix else x
        return {"mixed": mixed, "sources": sources, "z": z, "unmixed": unmixed, "pred": pred, "target": target}

    def forward(self, images, mask=None):
        """images (B, C, H, W) -> loss (), {"recon": (), and with Eq. 7 "homocon": (), "homocon_floor": ()}."""
        out = self.predict(images, mask)
        loss = recon = reconstruction_loss(out["pred"], out["target"], out["sources"])  # Eq. 4
        metrics = {"recon": recon.detach()}
        if self.weight:
            with torch.autocast(images.device.type, enabled=False):
                z = self.projector(out["z"][:, 1:].float())  # after the final [LN] (Table 3b), (G, L, 128)
                homocon = homologous_contrastive_loss(z, out["sources"], self.tau)  # Eq. 7
            loss = recon + self.weight * homocon  # Eq. 8
            metrics |= {"homocon": homocon.detach(), "homocon_floor": homocon.new_full((), self.homocon_floor)}
        return loss, metrics

    @torch.no_grad()
    def visualize(self, images):
        """images (B, C, H, W) -> pictures (B, 4, 3, H, W) in [0, 1], {"accuracy": last layer, "accuracy_layers": [first .. last]}.

        The panels: image, the mixed image of its group, who gave each patch (colours: image 1, 2, ... of the group), reconstruction.
        With norm_pix the reconstruction borrows each hidden patch's true mean and standard deviation: its colours are not predicted.
        """
        n, p, grid = self.n, self.encoder.patch_size, self.encoder.grid
        images = images[: len(images) // n * n]
        attentions = [block.attn for block in self.encoder.blocks]
        for attention in attentions:
            attention.record = True
        out = self.predict(images)
        layers = []
        for attention in attentions:
            kept, probabilities = attention.recorded
            layers.append(sampling_accuracy(probabilities, kept, out["sources"], self.accuracy_keys).item())
            attention.record, attention.recorded = False, None

        patches, pred = patchify(images, p), out["pred"].float()  # (B, L, P)
        if self.norm_pix:
            pred = undo_norm_pix(pred, patches)
        own = rearrange(indicator(out["sources"], n), "g n l -> (g n) l 1")
        mixed = repeat(denormalize(unpatchify(out["mixed"], grid, p)), "g c h w -> (g n) c h w", n=n)
        palette = torch.tensor([COLOURS[i % len(COLOURS)] for i in range(n)], device=images.device)  # (n, 3)
        colours = repeat(palette[out["sources"]], "g l c -> (g n) l (q c)", n=n, q=p * p)
        pictures = [denormalize(images), mixed, 0.5 * mixed + 0.5 * unpatchify(colours, grid, p),
                    denormalize(unpatchify(torch.where(own, patches, pred), grid, p))]
        return torch.stack(pictures, dim=1).clamp(0, 1), {"accuracy": layers[-1], "accuracy_layers": layers}

    def export(self):
        """What encoder.pt holds: a plain ViT with global attention, segment 0 (Sec. 3.2) folded into the patch bias."""
        state_dict = dict(self.encoder.state_dict())
        if self.segments is not None:
            state_dict["patch_embed.proj.bias"] = state_dict["patch_embed.proj.bias"] + self.segments[0]
        return pack_encoder(self.encoder, "mixedae", "mean", MEAN, STD, state_dict)  # Sec. 4.2 averages all patch tokens


def check_ratio(ratio, batch_size, patches):
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
