"""Masked Autoencoder (MAE): Sec. 3.1 of "Mimic before Reconstruct" (MR-MAE, arXiv 2303.05475), after He et al., arXiv 2111.06377.

MR-MAE's own additions (Sec. 3.2 on) are not here yet; the file has its name because plain MAE is where that paper starts.

Reading order of the project: vit -> **mrmae** -> mixedae -> cae -> data -> train -> finetune.

Hide 75 % of the patches of an image, encode the visible quarter alone, let a small decoder rebuild the pixels of the rest:

    images (B, C, H, W) -- patch embedding + positions --> (B, L, D)
        -- keep V random patches --> (B, V, D) -- encoder --> latent (B, 1+V, D)
        -- decoder.embed, [MASK] at the U hidden places --> (B, 1+L, Dd) -- decoder --> pred (B, L, P)
        -- Eq. 1: squared error on the hidden patches

Run it:  python train.py --method mae          (the drawn set `shapes`, a laptop; README.md has times, losses and the paper's runs)

Where the paper is silent
    - Everything follows the numerics of MAE's published code: norm_pix targets, fixed positions, initialisation, L_R averaged over
      the P values of a patch and then over the hidden patches. (Eq. 1 sums over values; the factor is P.)
    - Visible tokens stay in raster order. The authors keep them in the shuffled order of the draw; the encoder cannot tell.
"""
import argparse

import torch
from torch import nn

from data import MEAN, STD, denormalize
from vit import (UserError, build_decoder, build_encoder, norm_pix, pack_encoder, patchify, rename, take, undo_norm_pix, unpatchify,
                 visible_ids)


def random_visible(batch, patches, visible, device):
    """Uniformly random masking (Sec. 3.1): the ids (B, V) of the visible patches, sorted. Row by row the first V of a random permutation."""
    noise = torch.rand(batch, patches, device=device)  # (B, L)
    return noise.argsort(dim=1)[:, :visible].sort(dim=1).values


def reconstruction_loss(pred, target, mask):
    """Eq. 1: L_R = 1 / l_m || D_m - I_m ||^2, over the l_m masked patches.

    pred D, target I (B, L, P), mask (B, L) bool -> (). The squared norm is a mean over the P values of a patch, as in MAE's code.
    """
    error = (pred.float() - target).square().mean(dim=-1)  # (B, L)
    return (error * mask).sum() / mask.sum()


class MAE(nn.Module):
    """Plain MAE."""

    @staticmethod
    def add_args(parser):
        parser.add_argument("--mask-ratio", type=float, default=0.75, help="share of the patches that is hidden (MR-MAE Sec. 3.1: 75 %%)")
        parser.add_argument("--norm-pix", action=argparse.BooleanOptionalAction, default=True,
                            help="targets normalised patch by patch (MAE's command; losses with and without are not comparable)")

    def __init__(self, args):
        super().__init__()
        self.encoder = build_encoder(args)
        self.decoder = build_decoder(args, self.encoder)
        self.norm_pix = args.norm_pix
        self.panels = ["image", "visible patches", "reconstruction\n(true mean, std)" if self.norm_pix else "reconstruction"]
        L = self.encoder.num_patches
        if not 0 < args.mask_ratio < 1 or not 0 < int(L * (1 - args.mask_ratio)) < L:
            raise UserError(f"--mask-ratio {args.mask_ratio}: of {L} patches at least 1 must stay visible and at least 1 be hidden")
        self.num_visible = int(L * (1 - args.mask_ratio))  # V

    def predict(self, images, mask=None):
        """Every tensor of Fig. 2 (1). images (B, C, H, W) normalised; mask (B, L) bool, True = hidden, or None to draw one.

        Returns latent (B, 1+V, D), pred (B, L, P), target (B, L, P), mask (B, L).
        """
        B, L = len(images), self.encoder.num_patches
        if mask is None:
            ids = random_visible(B, L, self.num_visible, images.device)  # (B, V)
        else:
            ids = visible_ids(mask)
        mask = torch.ones(B, L, dtype=torch.bool, device=images.device).scatter(1, ids, False)

        visible = take(self.encoder.embed(images), ids)  # (B, V, D)
        latent = self.encoder.encode(visible)  # (B, 1+V, D)

        y = self.decoder.embed(latent)  # (B, 1+V, Dd)
        full = self.decoder.mask_token.to(y.dtype).expand(B, L, -1)  # [MASK] everywhere, then the visible tokens at their places:
        full = full.scatter(1, ids.unsqueeze(-1).expand(-1, -1, y.shape[-1]), y[:, 1:])  # (B, L, Dd)
        pred = self.decoder(torch.cat([y[:, :1], full], dim=1))  # (B, L, P)

        target = patchify(images, self.encoder.patch_size)  # (B, L, P)
        if self.norm_pix:
            target = norm_pix(target)
        return {"latent": latent, "pred": pred, "target": target, "mask": mask}

    def forward(self, images, mask=None):
        """images (B, C, H, W) -> loss (), {"recon": ()}."""
        out = self.predict(images, mask)
        loss = reconstruction_loss(out["pred"], out["target"], out["mask"])  # Eq. 1
        return loss, {"recon": loss.detach()}

    @torch.no_grad()
    def visualize(self, images):
        """images (B, C, H, W) -> pictures (B, 3, 3, H, W) in [0, 1], {}. The panels: image, visible patches, reconstruction.

        With norm_pix the reconstruction borrows each hidden patch's true mean and standard deviation: its colours are not predicted.
        """
        p, grid = self.encoder.patch_size, self.encoder.grid
        out, patches = self.predict(images), patchify(images, self.encoder.patch_size)
        pred, hidden = out["pred"].float(), out["mask"].unsqueeze(-1)  # (B, L, P), (B, L, 1)
        if self.norm_pix:
            pred = undo_norm_pix(pred, patches)
        panels = patches, patches.masked_fill(hidden, 0), torch.where(hidden, pred, patches)
        return torch.stack([denormalize(unpatchify(x, grid, p)).clamp(0, 1) for x in panels], dim=1), {}

    def export(self):
        """What encoder.pt holds: a plain ViT. MAE's authors probe its CLS token."""
        return pack_encoder(self.encoder, "mae", "cls", MEAN, STD)


def from_official_mae(state_dict):
    """The names of a full published MAE file (encoder and decoder) -> those of `MAE`; a file's {"model": ...} is unwrapped."""
    return rename(state_dict.get("model", state_dict), [
        (r"^mask_token$", "decoder.mask_token"),
        (r"^decoder_", "decoder."),
        (r"^", "encoder."),
    ])
