"""Context Autoencoder (CAE), Chen et al., "Context Autoencoder for Self-Supervised Representation Learning",
arXiv 2202.03026, and the tokenizers that its targets come from.

Reading order of the project: vit -> mrmae -> mixedae -> **cae** -> data -> train -> finetune -> dense.

The task is to predict the hidden patches of an image from the visible ones. CAE does it in two steps: it
first predicts the *representations* of the hidden patches, in the space that the encoder itself maps patches
to, and then decodes these into pixels or tokens. Fig. 1, with shapes:

    images (B, C, height, width)
        -- patch embedding + positions --> x (B, L, D); a block-wise mask shows V patches and hides U
        the V visible patches:
            -- encoder F, self-attention -------------------------> Z_v    (B, 1 + V, D), CLS first
            -- drop CLS; `project` if Dd is not D ----------------> Z_v    (B, V, Dd), as H reads it
            -- regressor H, U mask queries attend to [Z_v, Z_m] --> Z_m    (B, U, Dd)
            -- decoder G, self-attention among the U -------------> Y_m    logits (B, U, vocabulary), or
                                                                           pixels (B, U, P)
        the U hidden patches:
            -- encoder F again, without gradient -----------------> (B, 1 + U, D)
            -- drop CLS; the same `project` ----------------------> Z_m with a bar (B, U, Dd)
    Eq. 1: loss = l_y(Y_m, the true tokens or pixels) + lambda l_z(Z_m, sg[Z_m with a bar])

The paper's targets are tokens. Pixels (its Table 9) are our default, because they need no tokenizer.

    the paper           here
    F, H, G             encoder, regressor, decoder (in the code below, `F` is torch.nn.functional)
    X_v, X_m            not tensors of their own: all patches are embedded into `x`, each by itself, and F
                        gets the rows `seen_ids` or `hidden_ids` of `x`
    P_v, P_m            positions, in two tables of the same formula: F adds `encoder.pos_embed` (width D) in
                        `encoder.embed`; H and G add `pos_embed` (width Dd), its rows pos_visible, pos_hidden
    Z_v                 out["visible"] of `CAE.predict`, with a CLS token in front
    Q_m                 regressor.mask_token, the same query for every hidden patch
    Z_m                 out["predicted"]
    Z_m with a bar      out["target"]. Beware: not the paper's "targets", which are Y_m with a bar
    Y_m with a bar      `targets`, by `CAE.targets`; --target chooses their kind
    l_y, l_z, lambda    decoding_loss, alignment_loss, align_weight (--align-weight); the sum: CAE.forward
    sg[ ]               stop gradient: the last pass of `CAE.predict` is under torch.no_grad
    masking             block_mask
    tokenizer           DVAE or DalleEncoder: open_tokenizer opens it, `CAE.targets` asks it

Letters: B images, C channels, L patches (V visible, U hidden), D width of F, Dd (--decoder-width) width of H
and G, P = C p p values of a patch of p x p pixels. P alone is that number; P_v and P_m are positions, and
P(. | .) is a probability. H, G and K are not those of vit.py: here they are the regressor, the decoder and,
in the discrete VAE, the number of tokens to choose from.

Appendix B reads the three networks as the three factors of a probability:

    P(Y_m | X_v, P_v, P_m) = P(Z_v | X_v, P_v)  P(Z_m | Z_v, P_v, P_m)  P(Y_m | Z_m, P_m)
                             F                  H                       G

It assumes that, given the rest, Z_v does not depend on P_m, nor Y_m on P_v. (Strictly, the right side is the
joint probability of Z_v, Z_m and Y_m: the paper does not write the integral over Z_v and Z_m.)

Only F is transferred, and F alone should learn the representation: H never changes Z_v, and l_z keeps the
predictions of H in the space of F's output. If that works, G can rebuild an image from the output of F
without H (Sec. 4, Fig. 3 and 10). The log shows whether it can: `through_H` is l_y of hidden patches that G
decodes from Z_m, `skipped` is l_y of the same patches decoded from the output of F. `skipped` should be about
as low, or lower. The picture "H skipped" shows it, too.

Run it:
    python train.py --method cae         # pixels as targets, on the drawn set `shapes`
    python train.py --method dvae        # trains a tokenizer, whose tokens can be the targets:
    python train.py --method cae --target dvae:runs/dvae/tokenizer.pt --out runs/cae-dvae
    python cae.py                        # prints the shapes of what `predict` returns
The paper's own runs (Appendix A) and the rows of its tables stand as commands in docs/recipes.md.

Where the paper is silent, the authors' code (https://github.com/Atten4Vis/CAE) decides; the list stands at
the end of this file.
"""

import argparse
import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from data import denormalize
from vit import (
    Block,
    CrossAttention,
    LayerScale,
    Mlp,
    Residual,
    UserError,
    bounded,
    build_encoder,
    call_block,
    gather_tokens,
    init_weights,
    load_file,
    load_strictly,
    natural_float,
    natural_int,
    norm_pix,
    one_line,
    patchify,
    positive_float,
    positive_int,
    rename,
    set_drop_paths,
    sincos_positions,
    size_int,
    undo_norm_pix,
    unit_float,
    unpatchify,
    visible_ids,
)


# ------------------------------------------------------------------------------------------------------------
# Sec. 3.2: block-wise masking
# ------------------------------------------------------------------------------------------------------------
def block_mask(batch, grid, count, tries=400, at_once=4):
    """Random block-wise masks (Sec. 3.2, Fig. 2), BEiT's rule in the form of CAE's code -> bool (B, L), True
    = hidden, with exactly `count` hidden patches in each row.

    Random boxes are hidden one after the other until `count` patches are. While R patches are missing:
      - The area of the next box is uniform between 16 patches and R, also where R < 16. (16 is for the
        paper's 196 patches; on another grid it is the same share of L.)
      - Its aspect ratio is log-uniform between .3 and 1 / .3, and its place is uniform.
      - It is hidden if it is smaller than the grid on both sides and hides at least one and at most R patches
        more.
    After `tries` boxes, random single patches fill the rest. (Ours: CAE's code tries on without end.)

    All masks of a batch are drawn together, on the CPU: each round of the loop asks which masks are full, and
    on a GPU every such question would make the CPU wait. Many boxes may not be taken. So each round draws
    `at_once` boxes for each mask, takes the first that may be, and throws the others away. The masks have the
    same distribution as with one box after the other: a box that may not be taken changes nothing, and those
    behind the one that is taken are never looked at. (Only `tries` differs: it counts the boxes thrown away,
    too.) It takes about half of the time.
    """
    h, w = grid  # in patches
    smallest = max(1, round(16 / 196 * h * w))  # patches in the smallest box
    rows = torch.arange(h).view(1, 1, h, 1)
    columns = torch.arange(w).view(1, 1, 1, w)
    masks = torch.zeros(batch, 1, h, w, dtype=torch.bool)
    unfinished = torch.arange(batch)  # (b,), the masks that still lack patches

    for _ in range(tries // at_once):
        # Go on with the masks that still lack patches.
        missing = count - masks[unfinished].sum(dim=(1, 2, 3))  # (b,), R
        unfinished = unfinished[missing > 0]
        missing = missing[missing > 0].view(-1, 1, 1, 1)  # (b, 1, 1, 1)
        if len(unfinished) == 0:
            break

        # Draw boxes for each of them, a = at_once: area, shape, place. Heights and widths are in patches.
        numbers = torch.rand(4, len(unfinished), at_once, 1, 1)  # uniform in [0, 1)
        for_area, for_aspect, for_top, for_left = numbers  # each (b, a, 1, 1), as the next six
        area = smallest + (missing - smallest) * for_area  # uniform from `smallest` to R
        aspect = 0.3 ** (2 * for_aspect - 1)  # height / width, log-uniform from .3 to 1 / .3
        height = (area * aspect).sqrt().round()
        width = (area / aspect).sqrt().round()
        top = (for_top * (h - height + 1)).floor()  # uniform in 0 .. h - height
        left = (for_left * (w - width + 1)).floor()

        # Which of them may be taken?
        inside_rows = (rows >= top) & (rows < top + height)  # (b, a, h, 1)
        inside_columns = (columns >= left) & (columns < left + width)  # (b, a, 1, w)
        boxes = inside_rows & inside_columns  # (b, a, h, w)
        more = (boxes & ~masks[unfinished]).sum(dim=(2, 3), keepdim=True)  # how many patches a box hides
        allowed = (height < h) & (width < w) & (more > 0) & (more <= missing)  # (b, a, 1, 1)

        # Hide the patches of the first such box. If there is none, argmax gives 0, and nothing is hidden.
        first = allowed.int().argmax(dim=1, keepdim=True)  # (b, 1, 1, 1)
        masks[unfinished] |= (boxes & allowed).take_along_dim(first, dim=1)  # (b, 1, h, w)

    # Fill the masks that are not full after all tries: sort the patches, hidden ones first and the others in
    # random order, and hide the first `count`. A full mask stays as it is.
    masks = masks.flatten(1)  # (B, L)
    order = (torch.rand(masks.shape) - masks.float()).argsort(dim=1)
    return torch.zeros_like(masks).scatter(1, order[:, :count], True)


# ------------------------------------------------------------------------------------------------------------
# Sec. 3.1: latent contextual regressor H and decoder G. The encoder F is the ViT of vit.py.
# ------------------------------------------------------------------------------------------------------------
class CrossBlock(Residual):
    """A block of the regressor H (Sec. 3.1). Queries are the Z_m of the block before, in the first block the
    mask queries Q_m; keys and values are [Z_v, Z_m]. Z_v is read and never changed.

    `CrossAttention` (in vit.py, behind the line where a first reading may stop) is ordinary attention whose
    queries, keys and values come from three inputs; its keys have no bias. Positions are added to queries and
    keys and not to values, so they act on the attention weights alone. Not in the paper but in CAE's code are
    the LayerNorms of queries, keys and values, layer scale, and norm2 on the main path (see `forward`).
    """

    def __init__(self, dim, heads, layer_scale):
        super().__init__()
        self.norm_q = nn.LayerNorm(dim, eps=1e-6)
        self.norm_k = nn.LayerNorm(dim, eps=1e-6)
        self.norm_v = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = CrossAttention(dim, heads)
        self.mlp = Mlp(dim, 4 * dim)
        self.ls1 = LayerScale(dim, layer_scale)
        self.ls2 = LayerScale(dim, layer_scale)

    def forward(self, x, visible, pos_visible, pos_hidden):
        """Z_m so far (B, U, Dd), Z_v and P_v (B, V, Dd), P_m (B, U, Dd) -> the next Z_m (B, U, Dd)."""
        both = torch.cat([visible, x], dim=1)  # [Z_v, Z_m], (B, V + U, Dd)
        pos = torch.cat([pos_visible, pos_hidden], dim=1)  # [P_v, P_m], (B, V + U, Dd)
        q = self.norm_q(x + pos_hidden)
        k = self.norm_k(both + pos)
        v = self.norm_v(both)
        # norm2 normalises x itself, so the skip connection around the MLP starts from the normalised tensor,
        # as in a post-norm transformer.
        x = self.norm2(x + self.drop(self.ls1(self.attn(q, k, v))))
        return x + self.drop(self.ls2(self.mlp(x)))


class Regressor(nn.Module):
    """H: Z_v (B, V, Dd) and the positions P_v (B, V, Dd), P_m (B, U, Dd) -> Z_m (B, U, Dd)."""

    def __init__(self, width, depth, heads, layer_scale):
        super().__init__()
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))  # Q_m; `CAE.initialise` fills it
        self.blocks = nn.ModuleList(CrossBlock(width, heads, layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)  # F ends in a LayerNorm, too, so both sides of l_z do

    def forward(self, visible, pos_visible, pos_hidden):
        x = self.mask_token.expand_as(pos_hidden)  # Q_m, (B, U, Dd)
        for block in self.blocks:
            x = call_block(block, x, visible, pos_visible, pos_hidden)
        return self.norm(x)


class Decoder(nn.Module):
    """G (Sec. 3.1): Z_m and P_m, both (B, U, Dd) -> Y_m (B, U, outputs). Without blocks it is a linear layer
    on Z_m ("no decoder", Table 2). (vit.Decoder is not this one but MAE's.)"""

    def __init__(self, width, depth, heads, layer_scale, outputs):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, layer_scale=layer_scale) for _ in range(depth))
        if depth:
            self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, outputs)

    def forward(self, z, pos):
        if not self.blocks:  # "no decoder"
            return self.head(z)
        x = z + pos
        for block in self.blocks:
            x = call_block(block, x)
        return self.head(self.norm(x))


# ------------------------------------------------------------------------------------------------------------
# Sec. 3.2, Eq. 1: alignment loss l_z and decoding (reconstruction) loss l_y. `CAE.forward` adds them up.
# ------------------------------------------------------------------------------------------------------------
def alignment_loss(predicted, target):
    """l_z of Eq. 1: mean-squared error of Z_m and sg[Z_m with a bar], both (B, U, Dd) -> (). sg[] stands here
    as `detach`, so that this is Eq. 1 by itself. `CAE.predict` makes the target without a gradient already,
    which also saves the memory of that pass."""
    return (predicted.float() - target.detach().float()).square().mean()


def decoding_loss(decoded, targets):
    """l_y of Eq. 1 -> (). Cross-entropy of logits (B, U, vocabulary) and token ids (B, U), which is the
    paper's; mean-squared error of pixels (B, U, P), which is ours: the paper has a row with pixels (Table 9)
    but does not give their loss."""
    if targets.is_floating_point():  # pixels
        return (decoded.float() - targets).square().mean()
    return F.cross_entropy(decoded.float().flatten(0, 1), targets.flatten())


# ------------------------------------------------------------------------------------------------------------
# Fig. 1: the whole model
# ------------------------------------------------------------------------------------------------------------
class CAE(nn.Module):
    """Fig. 1. `encoder` is what is transferred: a plain ViT with layer scale. encoder.pt tells a linear probe
    to read its CLS token, as the authors do. No loss reads the output of CLS, but patches attend to CLS in
    every block, so it is trained."""

    def __init__(self, args):
        super().__init__()
        self.encoder = build_encoder(args, layer_scale=args.layer_scale)  # F
        L = self.encoder.num_patches
        check_args(args, L)
        self.num_hidden = round(args.mask_ratio * L)  # U
        self.norm_pix = args.norm_pix
        self.mean = args.mean
        self.std = args.std

        # Open the tokenizer. It is frozen, so it stands in a plain list, as MR-MAE's teachers do: thus it
        # stays out of the state dict, the optimizer, DDP and model.train().
        tokenizer = open_tokenizer(args.target)  # None with --target rgb
        self.tokenizers = [tokenizer]

        # Choose what G predicts: tokens if a vocabulary is known, else pixels. Its size comes with the
        # tokenizer or, where a caller of `forward` gives the ids himself, from --vocabulary.
        self.vocabulary = tokenizer.vocabulary if tokenizer else args.vocabulary
        self.output = "logits" if self.vocabulary else "pixels"  # the key of Y_m in what `predict` returns

        # lambda of Eq. 1: 2 for tokens (Sec. 3.2). For pixels .2 (ours): l_y is then a squared error, far
        # smaller than a cross-entropy, and lambda = 2 lowers the accuracy of all probes (docs/results.md).
        self.align_weight = args.align_weight
        if self.align_weight is None:
            self.align_weight = 2.0 if self.vocabulary else 0.2

        # Map Z_v and the target of the alignment to Dd, the width of H and G, where the encoder has another.
        width = args.decoder_width  # Dd
        self.project = nn.Sequential()  # empty: the identity
        if width != self.encoder.width:
            self.project.append(nn.Linear(self.encoder.width, width))
            self.project.append(nn.LayerNorm(width, eps=1e-6))

        # Make the positions that H and G add. The table has a row for CLS, as in the authors' files, which
        # load into it; H and G never use that row.
        positions = sincos_positions(width, self.encoder.grid)  # (1, 1 + L, Dd)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)

        # Build H and G.
        outputs = self.vocabulary or self.encoder.config["channels"] * self.encoder.patch_size**2
        regressor_depth = args.regressor_depth or args.decoder_depth
        self.regressor = Regressor(width, regressor_depth, args.decoder_heads, args.layer_scale)
        self.decoder = Decoder(width, args.decoder_depth, args.decoder_heads, args.layer_scale, outputs)

        self.initialise(args.rescaled_init)
        for part in (self.encoder, self.regressor, self.decoder):
            set_drop_paths(part, args.drop_path)

    def initialise(self, rescaled):
        """As in CAE's code: linear layers xavier-uniform; CLS, mask token and patch embedding from a normal
        distribution of deviation .02, truncated at plus and minus .02.

        rescaled: as the authors initialise ViT-L (BEiT's way): linear layers from that normal distribution
        too, and the last layer of both branches of block i = 1, 2, ... divided by sqrt(2 i).
        """
        # Initialise all linear layers, then what has another distribution. LayerNorms start with 1 and 0.
        self.apply(init_weights)
        encoder = self.encoder
        nn.init.zeros_(encoder.patch_embed.proj.bias)
        normal = [encoder.cls_token, encoder.patch_embed.proj.weight, self.regressor.mask_token]
        if rescaled:
            normal += [module.weight for module in self.modules() if isinstance(module, nn.Linear)]
        for parameter in normal:
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.02, b=0.02)

        # Scale down the output of each branch, the more the deeper its block.
        if rescaled:
            for part in (encoder, self.regressor, self.decoder):
                for i, block in enumerate(part.blocks, start=1):
                    block.attn.proj.weight.data /= math.sqrt(2 * i)
                    block.mlp.fc2.weight.data /= math.sqrt(2 * i)

    def predict(self, images, mask=None):
        """Every tensor of Fig. 1.

        images (B, C, height, width) normalised; mask (B, L) bool, True = hidden, or None to draw one.
        Returns a dict:
            visible       (B, 1 + V, D), Z_v after the last LayerNorm of F, CLS first
            predicted     (B, U, Dd), Z_m
            pixels        (B, U, P), Y_m if the targets are pixels; else
            logits        (B, U, vocabulary), Y_m if they are tokens
            mask          (B, L)
            hidden_ids    (B, U), the ids of the hidden patches
            target        (B, U, Dd), Z_m with a bar; in training only if lambda > 0
        """
        # Embed all patches and add F's positions (P_v and P_m of width D).
        encoder = self.encoder
        x = encoder.embed(images)  # (B, L, D)

        # Split them into visible and hidden ones. Ids are computed where the mask lies (on the CPU, if it is
        # drawn here) and then moved to the device of the images.
        if mask is None:
            mask = block_mask(len(images), encoder.grid, self.num_hidden)  # (B, L)
        check_mask(mask, x.shape[:2])
        seen_ids = visible_ids(mask)  # (B, V), where the mask is False
        hidden_ids = visible_ids(~mask)  # (B, U): what is hidden is visible under the opposite mask
        mask, seen_ids, hidden_ids = (
            part.to(images.device, non_blocking=True) for part in (mask, seen_ids, hidden_ids)
        )

        # Gather P_v and P_m of width Dd, which H and G add.
        pos = self.pos_embed[:, 1:].expand(len(images), -1, -1)  # (B, L, Dd)
        pos_visible = gather_tokens(pos, seen_ids)  # P_v, (B, V, Dd)
        pos_hidden = gather_tokens(pos, hidden_ids)  # P_m, (B, U, Dd)

        # Encode the visible patches (F, the factor P(Z_v | X_v, P_v)).
        visible = encoder.encode(gather_tokens(x, seen_ids))  # Z_v, (B, 1 + V, D)

        # Predict the representations of the hidden ones (H, the factor P(Z_m | Z_v, P_v, P_m)). CLS is left
        # out, as in CAE's code.
        predicted = self.regressor(self.project(visible[:, 1:]), pos_visible, pos_hidden)  # Z_m, (B, U, Dd)

        # Decode them (G, the factor P(Y_m | Z_m, P_m)).
        decoded = self.decoder(predicted, pos_hidden)  # Y_m, (B, U, P or vocabulary)
        out = {
            "visible": visible,
            "predicted": predicted,
            self.output: decoded,
            "mask": mask,
            "hidden_ids": hidden_ids,
        }

        # Make the target of the alignment, Z_m with a bar: encode the hidden patches alone (and CLS) with the
        # same F. torch.no_grad is sg[] of Eq. 1: no gradient flows into this pass. (In training drop path
        # acts in it, too, as in CAE's code.) Training without alignment does not need the target, and saves
        # the pass.
        if self.align_weight or not self.training:
            with torch.no_grad():
                encoded = encoder.encode(gather_tokens(x, hidden_ids))  # (B, 1 + U, D)
                out["target"] = self.project(encoded[:, 1:])  # Z_m with a bar, (B, U, Dd)
        return out

    def forward(self, images, mask=None, ids=None):
        """images (B, C, height, width); mask as in `predict`; ids (B, U), the token ids of the patches that
        `mask` hides, or None to ask the tokenizer -> loss (), {"recon" (of pixels) or "tokens": l_y, "align":
        l_z}."""
        out = self.predict(images, mask)
        targets = self.targets(images, out["hidden_ids"]) if ids is None else ids  # Y_m with a bar

        # l_y of Eq. 1.
        loss = decoding_loss(out[self.output], targets)
        metrics = {"tokens" if self.vocabulary else "recon": loss.detach()}

        # Add lambda l_z of Eq. 1.
        if self.align_weight:
            align = alignment_loss(out["predicted"], out["target"])
            loss = loss + self.align_weight * align
            metrics["align"] = align.detach()
        return loss, metrics

    def targets(self, images, hidden_ids):
        """Y_m with a bar (Sec. 3.2): pixels (B, U, P) or token ids (B, U) of the hidden patches."""
        # Take the pixels themselves.
        if not self.vocabulary:
            patches = patchify(images, self.encoder.patch_size)  # (B, L, P)
            return gather_tokens(norm_pix(patches) if self.norm_pix else patches, hidden_ids)

        # Or ask the tokenizer, in fp32. It gives one id per 8 x 8 pixels and we need one per patch, so resize
        # the images until a patch has 8 x 8 pixels.
        tokenizer = self.tokenizers[0]
        check_tokenizer(tokenizer, self.vocabulary)
        tokenizer.to(images.device)  # model.to(device) does not reach what is in a plain list
        size = [8 * side for side in self.encoder.grid]
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            x = denormalize(images, self.mean, self.std).clamp(0, 1)
            x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
            token_ids = tokenizer.ids(x).flatten(1)  # (B, L)
        return token_ids.gather(1, hidden_ids)

    def skip_regressor(self, images):
        """Fig. 10: all patches through F and straight through G, without H -> (B, L, P or vocabulary)."""
        z = self.encoder.encode(self.encoder.embed(images))[:, 1:]  # (B, L, D)
        return self.decoder(self.project(z), self.pos_embed[:, 1:])

    def visualize(self, images):
        """images (B, C, height, width) -> {title: pictures (B, 3, height, width) in [0, 1]}.

        The image and its visible patches (Fig. 2). For pixels also the reconstruction of the hidden patches,
        and that of Fig. 3: all patches encoded, H skipped, all patches decoded. With norm_pix both are given
        each patch's true mean and deviation.
        """
        # Take the image apart, and paint hidden patches in the mean colour, which is 0 once normalised.
        out = self.predict(images)
        patches = patchify(images, self.encoder.patch_size)  # (B, L, P)
        hidden = out["mask"].unsqueeze(-1)  # (B, L, 1)
        panels = {"image": patches, "visible patches": patches.masked_fill(hidden, 0)}

        # Put the decoded pixels of the hidden patches into their places.
        if not self.vocabulary:
            # masked_scatter fills row after row, in the order of hidden_ids.
            decoded = torch.zeros_like(patches).masked_scatter(hidden, out["pixels"].float())
            skipped = self.skip_regressor(images).float()  # (B, L, P)
            note = ""
            if self.norm_pix:
                decoded = undo_norm_pix(decoded, patches)
                skipped = undo_norm_pix(skipped, patches)
                note = "\n(true mean, std)"
            panels[f"reconstruction{note}"] = torch.where(hidden, decoded, patches)
            panels[f"H skipped{note}"] = skipped

        # Make pictures of all of them.
        pictures = {}
        for title, x in panels.items():
            x = unpatchify(x, self.encoder.grid, self.encoder.patch_size)
            pictures[title] = denormalize(x, self.mean, self.std).clamp(0, 1)
        return pictures

    def numbers(self, images):
        """images (B, C, height, width) -> l_y of the same hidden patches, decoded in two ways: "through_H",
        from Z_m, and "skipped", from the output of F for the whole image (Fig. 10).

        G is trained on Z_m alone. If it can read the output of F as well, both lie in one space: `skipped` is
        then about as low as `through_H`, or lower, because F has seen the hidden patches, and G reads all L
        patches instead of U. Without alignment it is far higher (1.3 against .64 in docs/results.md).
        """
        out = self.predict(images)
        hidden_ids = out["hidden_ids"]
        targets = self.targets(images, hidden_ids)
        skipped = gather_tokens(self.skip_regressor(images), hidden_ids)
        return {
            "through_H": decoding_loss(out[self.output], targets).item(),
            "skipped": decoding_loss(skipped, targets).item(),
        }

    # The values of --size, in place of vit.SIZES: width, depth and heads of F, then of H and G. The widths
    # and depths of F and the 4 blocks are Sec. 5.1's; the widths of H and G and all heads are CAE's code's.
    # --regressor-depth gives H another depth than G.
    sizes = {
        "micro": (128, 4, 4, 64, 2, 4),  # ours: for a laptop
        "tiny": (192, 12, 3, 192, 4, 3),  # ours
        "small": (384, 12, 12, 768, 4, 12),
        "base": (768, 12, 12, 768, 4, 12),
        "large": (1024, 24, 16, 1024, 4, 16),
        "huge": (1280, 32, 16, 1280, 4, 16),  # ours
    }

    @staticmethod
    def add_args(parser):
        add = parser.add_argument_group("CAE").add_argument

        # What is hidden, and what is predicted.
        add(
            "--mask-ratio",
            type=unit_float,
            default=0.5,
            help="share of the patches that is hidden (Sec. 3.2: 98 of 196; Table 5)",
        )
        add(
            "--target",
            default="rgb",
            metavar="rgb | dvae:FILE | dalle:FILE",
            help="pixels, tokens of a tokenizer.pt of --method dvae, or of OpenAI's encoder.pkl (Table 9)",
        )
        add(
            "--norm-pix",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="rgb: each patch normalised, as in MAE (ours: the paper does not say)",
        )

        # Eq. 1, the regressor, and the size of the vocabulary.
        add(
            "--align-weight",
            type=natural_float,
            help="lambda of Eq. 1; 0: no alignment (Table 2) [2 for tokens (Sec. 3.2), .2 for pixels (ours)]",
        )
        add(
            "--regressor-depth",
            type=positive_int,
            help="blocks of H (Sec. 5.1: 4; Table 6) [as many as --decoder-depth]; needed with "
            "--decoder-depth 0 (Table 2)",
        )
        add(
            "--vocabulary",
            type=bounded(int, 2, 65536),
            help="how many ids there are, if you call forward(images, mask, ids) yourself; the file of a "
            "tokenizer says its own",
        )

        # The blocks of F, H and G.
        add(
            "--layer-scale",
            type=positive_float,
            default=0.1,
            help="initial factor of every residual branch (CAE's code; L: 1e-5)",
        )
        add(
            "--drop-path",
            type=bounded(float, 0, 0.99),
            default=0.1,
            help="drop path rate (Appendix A: .1) of the last block of F, H and G each; rises linearly from "
            "0 (CAE's code)",
        )
        add("--rescaled-init", action="store_true", help="BEiT's initialisation (CAE's code, for L alone)")

        # CAE's defaults of flags that all methods have: AdamW's second beta (Appendix A); clipping, the end
        # of the cosine, and the random crop (CAE's code).
        parser.set_defaults(beta2=0.999, clip_grad=3.0, min_lr=1e-5, crop_scale=[0.08, 1.0])
        parser.set_defaults(epochs=2)  # ours, for a laptop


# ============================================================================================================
# A first reading may stop here. What follows: tokenizers, checks, the authors' checkpoints, and where the
# paper is silent.
# ============================================================================================================


# ------------------------------------------------------------------------------------------------------------
# Tokenizers (Sec. 3.2): the discrete VAE (d-VAE) and DALL-E's. Each has `vocabulary` and ids(images
# (B, 3, height, width) in [0, 1]), which gives one id from 0 to vocabulary - 1 for each 8 x 8 pixels:
# (B, h, w), h = height / 8, w = width / 8.
# ------------------------------------------------------------------------------------------------------------
class ResidualConv(nn.Module):
    """x + convolutions(x)."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x):
        return x + self.layers(x)


def perplexity(ids, vocabulary):
    """exp(entropy) of the frequencies of the ids -> (): 1 if only one of them occurs, `vocabulary` if all
    occur equally often."""
    p = torch.bincount(ids.flatten(), minlength=vocabulary) / ids.numel()
    return torch.special.entr(p).sum().exp()


class DVAE(nn.Module):
    """The discrete VAE of CAE's code (--method dvae), which turns an image into tokens and back.

        images (B, 3, height, width) in [0, 1]
            -- three convolutions of stride 2, residual blocks, 1 x 1 ---> logits (B, K, h, w)
            -- Gumbel-softmax: a relaxed draw of one token --------------> weights (B, K, h, w)
            -- sum of the K code vectors with these weights -------------> (B, E, h, w)
            -- 1 x 1 convolution, residual blocks,
               three transposed convolutions, 1 x 1 ---------------------> images again
        loss = squared error + --kl-weight x diversity
        diversity = sum over k of p_k log p_k, p (K,) the mean of softmax(logits) over batch and places

    K (--vocabulary) is the number of tokens to choose from, E (--channels) the width of the convolutions and
    of the code vectors.

    The diversity term is the negative entropy of p: from -log K, if all tokens occur equally often, to 0, if
    one token has all the probability. It stands where a VAE has its KL term, hence the flag's name.
    """

    export_file = "tokenizer.pt"  # the name under which train.py saves what `export` returns

    def __init__(self, args):
        super().__init__()
        if any(side % 8 for side in args.image_size):
            size = " ".join(map(str, args.image_size))
            raise UserError(f"--image-size {size}: the tokenizer needs multiples of 8 pixels")
        # Keep the flags that rebuild this tokenizer from tokenizer.pt.
        shape = ("vocabulary", "channels", "residual_blocks", "image_size")
        training = ("kl_weight", "mean", "std")
        self.config = {name: getattr(args, name) for name in shape + training}

        self.vocabulary = args.vocabulary  # K
        self.kl_weight = args.kl_weight
        self.mean = args.mean
        self.std = args.std

        # Build the layers of CAE's code: an encoder, and a decoder that mirrors it.
        width = args.channels  # E
        down = []
        up = []
        for i in range(3):
            down += [nn.Conv2d(width if i else 3, width, 4, stride=2, padding=1), nn.ReLU()]
            up += [nn.ConvTranspose2d(width, width, 4, stride=2, padding=1), nn.ReLU()]
        self.encoder_layers = nn.Sequential(
            *down,
            *(ResidualConv(width) for _ in range(args.residual_blocks)),
            nn.Conv2d(width, args.vocabulary, 1),
        )
        self.codes = nn.Embedding(args.vocabulary, width)
        self.decoder_layers = nn.Sequential(
            nn.Conv2d(width, width, 1),
            *(ResidualConv(width) for _ in range(args.residual_blocks)),
            *up,
            nn.Conv2d(width, 3, 1),
        )

    def forward(self, images):
        """images (B, 3, height, width) normalised -> loss (), {"recon", "diversity", "perplexity"}.

        The perplexity is that of the most probable ids of the batch, from 1 (the vocabulary has collapsed) to
        K. With several processes each has its own, and the log shows their mean.
        """
        images = denormalize(images, self.mean, self.std)
        logits = self.logits(images)  # (B, K, h, w)

        # Rebuild the images from a relaxed draw of tokens.
        weights = F.gumbel_softmax(logits, tau=0.9, dim=1)  # (B, K, h, w)
        recon = (self.decode(weights).float() - images).square().mean()

        # Spread the probabilities, averaged over the batch and all places, over the vocabulary.
        p = logits.softmax(dim=1).mean(dim=(0, 2, 3))  # (K,)
        diversity = (p * (p + 1e-6).log()).sum()  # 1e-6: the log of a probability of 0 stays finite
        loss = recon + self.kl_weight * diversity
        metrics = {
            "recon": recon.detach(),
            "diversity": diversity.detach(),
            "perplexity": perplexity(logits.argmax(dim=1), self.vocabulary),
        }
        return loss, metrics

    def logits(self, images):
        """images (B, 3, height, width) in [0, 1] -> (B, K, h, w)."""
        return self.encoder_layers(2 * images - 1).float()  # from [0, 1] to [-1, 1] (CAE's code)

    def ids(self, images):
        """images (B, 3, height, width) in [0, 1] -> (B, h, w)."""
        return self.logits(images).argmax(dim=1)

    def decode(self, weights):
        """Weights of the code vectors (B, K, h, w) -> images (B, 3, height, width) in [0, 1]."""
        codes = torch.einsum("bkhw, ke -> behw", weights, self.codes.weight)  # (B, E, h, w)
        return (self.decoder_layers(codes) + 1) / 2

    def visualize(self, images):
        """images (B, 3, height, width) normalised -> {title: pictures in [0, 1]}."""
        images = denormalize(images, self.mean, self.std)
        weights = F.one_hot(self.ids(images), self.vocabulary)  # (B, h, w, K)
        rebuilt = self.decode(weights.permute(0, 3, 1, 2).float()).float()
        return {"image": images.clamp(0, 1), "from its ids": rebuilt.clamp(0, 1)}

    def numbers(self, images):
        """images (B, 3, height, width) normalised -> {"used": the share of the vocabulary that they use}."""
        ids = self.ids(denormalize(images, self.mean, self.std))
        return {"used": len(ids.unique()) / self.vocabulary}

    def export(self):
        """What tokenizer.pt holds."""
        weights = {name: value.cpu() for name, value in self.state_dict().items()}
        return {"config": self.config, "state_dict": weights, "method": "dvae"}

    @staticmethod
    def add_args(parser):
        add = parser.add_argument_group("discrete VAE").add_argument
        add(
            "--vocabulary",
            type=bounded(int, 2, 65536),
            default=256,
            help="K, how many tokens there are (ours; CAE and DALL-E: 8192)",
        )
        add(
            "--channels",
            type=size_int,
            default=32,
            help="E, width of the convolutions and of the code vectors (ours; CAE's code: 256)",
        )
        add("--residual-blocks", type=natural_int, default=2, help="on each side (CAE's code)")
        add("--kl-weight", type=natural_float, default=3e-4, help="weight of the diversity term (ours)")
        parser.set_defaults(epochs=2)  # ours, for a laptop


class DalleBlock(nn.Module):
    """A block of DALL-E's encoder: four times ReLU and convolution, beside the identity."""

    def __init__(self, n_in, n_out):
        super().__init__()
        hidden = n_out // 4
        self.id_path = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        self.res_path = nn.Sequential(
            OrderedDict(
                relu_1=nn.ReLU(),
                conv_1=nn.Conv2d(n_in, hidden, 3, padding=1),
                relu_2=nn.ReLU(),
                conv_2=nn.Conv2d(hidden, hidden, 3, padding=1),
                relu_3=nn.ReLU(),
                conv_3=nn.Conv2d(hidden, hidden, 3, padding=1),
                relu_4=nn.ReLU(),
                conv_4=nn.Conv2d(hidden, n_out, 1),
            )
        )

    def forward(self, x):
        return self.id_path(x) + self.res_path(x) / 64  # 1 / (number of all blocks) squared


def dalle_group(n_in, n_out):
    return nn.Sequential(OrderedDict(block_1=DalleBlock(n_in, n_out), block_2=DalleBlock(n_out, n_out)))


class DalleEncoder(nn.Module):
    """DALL-E's tokenizer (Ramesh et al., 2021): four groups of two blocks, with max pooling between them.

    Layers have OpenAI's names, so that its file loads (width 256, 8192 tokens).
    """

    def __init__(self, width, vocabulary):
        super().__init__()
        self.vocabulary = vocabulary
        self.blocks = nn.Sequential(
            OrderedDict(
                input=nn.Conv2d(3, width, 7, padding=3),
                group_1=dalle_group(width, width),
                pool_1=nn.MaxPool2d(2),
                group_2=dalle_group(width, 2 * width),
                pool_2=nn.MaxPool2d(2),
                group_3=dalle_group(2 * width, 4 * width),
                pool_3=nn.MaxPool2d(2),
                group_4=dalle_group(4 * width, 8 * width),
                output=nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=nn.Conv2d(8 * width, vocabulary, 1))),
            )
        )

    def ids(self, images):
        """images (B, 3, height, width) in [0, 1] -> (B, h, w). The network wants pixels in [.1, .9]."""
        return self.blocks(0.8 * images + 0.1).argmax(dim=1)


class Pickled(nn.Module):
    """Stands for every class in OpenAI's encoder.pkl, which is a pickled module: a container without code."""


PICKLED = [
    (Pickled, name)
    for name in (
        "dall_e.encoder.Encoder",
        "dall_e.encoder.EncoderBlock",
        "dall_e.utils.Conv2d",
        "torch.nn.modules.container.Sequential",
        "torch.nn.modules.activation.ReLU",
        "torch.nn.modules.pooling.MaxPool2d",
        "torch.nn.modules.linear.Identity",
    )
]


def build_dvae(content):
    """What tokenizer.pt holds -> DVAE."""
    tokenizer = DVAE(argparse.Namespace(**content["config"]))
    load_strictly(tokenizer, content["state_dict"])
    return tokenizer


def build_dalle(content):
    """OpenAI's encoder.pkl, read as `Pickled`, or its state dict -> DalleEncoder."""
    weights = content.state_dict() if isinstance(content, Pickled) else content
    weights = rename(weights, [(r"\.w$", ".weight"), (r"\.b$", ".bias")])
    width = len(weights["blocks.input.weight"])
    vocabulary = len(weights["blocks.output.conv.weight"])
    tokenizer = DalleEncoder(width, vocabulary)
    load_strictly(tokenizer, weights)
    return tokenizer


def open_tokenizer(target):
    """--target -> a frozen tokenizer, or None for pixels. A UserError if the file is not of that kind."""
    if target == "rgb":
        return None
    kind, _, path = target.partition(":")
    if kind not in ("dvae", "dalle") or not path:
        raise UserError(f"--target {target}: neither rgb nor dvae:FILE nor dalle:FILE")
    content = load_file(path, PICKLED if kind == "dalle" else ())
    try:
        if not isinstance(content, (dict, Pickled)):
            raise TypeError("no weights by name")
        tokenizer = build_dvae(content) if kind == "dvae" else build_dalle(content)
    except Exception as error:  # damaged and foreign files make them raise all kinds
        what = one_line(error, 120)
        raise UserError(f"--target {target}: not a tokenizer of this kind ({what})") from None
    return tokenizer.requires_grad_(False).eval()


# ------------------------------------------------------------------------------------------------------------
# Checks
# ------------------------------------------------------------------------------------------------------------
def check_args(args, patches):
    """A UserError for flags that are wrong only together, or for this number of patches."""
    if not 0 < round(args.mask_ratio * patches) < patches:
        raise UserError(
            f"--mask-ratio {args.mask_ratio}: of {patches} patches at least 1 must stay visible and at "
            f"least 1 be hidden"
        )
    if args.decoder_depth == 0 and args.regressor_depth is None:
        raise UserError(
            "--decoder-depth 0: by default the regressor has as many blocks, but nothing else can predict "
            "hidden patches (Sec. 5.3); give --regressor-depth 4"
        )
    if args.vocabulary is not None and args.target != "rgb":
        raise UserError(
            f"--vocabulary {args.vocabulary}: goes only without a tokenizer; --target {args.target} brings "
            f"its own"
        )


def check_tokenizer(tokenizer, vocabulary):
    """A UserError if tokens are to be predicted and no tokenizer gives the true ones."""
    if tokenizer is None:
        raise UserError(
            f"--vocabulary {vocabulary}: nothing gives ids to train on; use --target dvae:FILE or "
            f"dalle:FILE, or leave --vocabulary out"
        )


def check_mask(mask, shape):
    """A ValueError unless `mask` is bool, (B, L) = `shape`, and both shows and hides patches."""
    if mask.dtype != torch.bool or mask.shape != shape or mask[0].all() or not mask[0].any():
        raise ValueError(
            f"mask must be bool, {tuple(shape)}, with visible and hidden patches; it is {mask.dtype}, "
            f"{tuple(mask.shape)}"
        )


# ------------------------------------------------------------------------------------------------------------
# The authors' checkpoints
# ------------------------------------------------------------------------------------------------------------
PARTS = [  # the authors' names, of today's code and of the first release, -> ours
    (r"^(pretext_neck\.)?mask_token$", "regressor.mask_token"),
    (r"^(pretext_neck\.)?rd_pos_embed$", "pos_embed"),
    (r"^encoder_to_(regresser|decoder)\.", "project.0."),
    (r"^encoder_to_(regresser|decoder)_norm\.", "project.1."),
    (r"^(regresser|pretext_neck)\.regressor_blocks\.", "regressor.blocks."),
    (r"^(decoder|pretext_neck)\.decoder_blocks\.", "decoder.blocks."),
    (r"^(regresser|pretext_neck)\.norm\.", "regressor.norm."),
    (r"^pretext_neck\.norm2\.", "decoder.norm."),
    (r"^pretext_neck\.head\.", "decoder.head."),
]
IN_A_BLOCK = [  # the same for what is in a block
    (r"\.gamma_([12])(_cross)?$", r".ls\1.gamma"),
    (r"\.norm1_([qkv])\.", r".norm_\1."),
    (r"\.norm2_cross\.", ".norm2."),
    (r"\.cross_attn\.([qv])_bias$", r".attn.\1.bias"),
    (r"\.cross_attn\.", ".attn."),
    (r"\.mlp_cross\.", ".mlp."),
]


def from_official(state_dict):
    """A checkpoint with the authors' names, of today's code or of the first release -> the names of `CAE`.

    Their second copy of the encoder, which makes the targets, is left out. The biases of q and v are joined
    to one of q, k, v (theirs have none for k, hence zeros). Nothing is computed from the values, so a dict of
    gradients is renamed in the same way. train.py's --init takes such a file whole, finetune.py its encoder.
    """
    # Find the weights in the file, without what wrappers put before their names.
    for key in ("model", "module", "state_dict"):
        state_dict = state_dict.get(key, state_dict)
    weights = {name.removeprefix("module."): value for name, value in state_dict.items()}
    copies = ("alignment_encoder.", "teacher.")
    weights = {name: value for name, value in weights.items() if not name.startswith(copies)}

    # Rename them, and join the biases of q, k (theirs has none) and v.
    weights = rename(rename(weights, PARTS), IN_A_BLOCK)
    for name in [name for name in weights if name.endswith(".attn.q_bias")]:
        attn = name.removesuffix("q_bias")
        q = weights.pop(name)
        v = weights.pop(f"{attn}v_bias")
        weights[f"{attn}qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    return weights


# ------------------------------------------------------------------------------------------------------------
# Where the paper is silent
# ------------------------------------------------------------------------------------------------------------
# The authors' code decides:
# - F has a CLS token in both of its passes. It is left out of everything that follows (H, G and both
#   losses), so it learns only as a context for the patches.
# - Layer scale starts at .1 (L: 1e-5). Drop path is active in the pass that makes the target, too.
#   Gradients are clipped at a norm of 3.
# - Z_v and the target are taken after the last LayerNorm of F, Z_m after that of H. Where Dd differs
#   from D, a linear layer and a LayerNorm map Z_v, and the target too, to Dd. That is so in S and in our
#   `micro`; B and L have Dd = D.
# - In H, positions are added to queries and keys and not to values, and queries, keys and values pass a
#   LayerNorm each, so the paper's "the keys and the values are the same" is only loosely true. The skip
#   connection around the MLP, too, starts from the normalised tensor. Z_m gets its positions once more,
#   before G.
# - Block-wise masks hide exactly U patches; see `block_mask`.
# - The paper trains a discrete VAE on ImageNet. Its code is published, its weights and its recipe are not.
#   From the code are the layers, the squared error, Gumbel-softmax with tau = .9 and the diversity term.
# - Fine-tuning on ImageNet: Appendix A gives layer decay, weight decay, epochs, warm-up, batch and rate, and
#   no more. MixUp and the like stand in their scripts; finetune.py says what of them is here. (For ADE20K
#   Appendix A gives no one rate, but those that were searched, four for ViT-B and three for ViT-L.)
#
# We differ from their code in these points:
# - Keys have a bias in F and G, for timm's names; theirs have none. Under softmax it changes nothing.
# - Position tables of new runs encode the column first, as MAE's do; theirs encode the row first. A table
#   that is loaded from a file stays as it is.
# - The tokenizer sees the same crop as F, resized to 8 x 8 pixels per patch. Theirs sees the same box,
#   resized from the original image by Lanczos. Ours runs in fp32 (on CUDA in TF32, unless --precision is
#   fp32). On CUDA DALL-E's runs all convolutions but the last in fp16, so ids may differ where two logits
#   almost tie.
# - The smallest block of a mask scales with the grid (on 14 x 14 patches it is theirs), and a mask that is
#   not full after 400 boxes is filled at random.
#
# Where both are silent, it is ours:
# - Pixels as targets (Fig. 3, Table 9): each patch is normalised as in MAE, and lambda is .2. The paper's 2
#   was chosen among 1, 1.5 and 2 beside a cross-entropy, which is some ten times as large. On CIFAR-10 probes
#   are better with .2 than with 2, and plain pixels do as well as normalised ones, both with 2
#   (docs/results.md).
# - No decoder (Table 2) is a linear layer on Z_m, without positions.
# - The recipe of the discrete VAE. One width E serves the convolutions and the code vectors. The squared
#   error is one of colours in [0, 1], and the diversity term has the weight 3e-4. Of 0, 3e-4, 1e-3 and 1e-2
#   it rebuilt best on `shapes` (two seeds, two epochs, K = 256), and more tokens were used than without the
#   term. For other sets and a larger K it is not tuned.


if __name__ == "__main__":
    from train import parse_args

    model = CAE(parse_args(["--method", "cae"])).eval()
    images = torch.randn(2, 3, *model.encoder.config["image_size"])
    for name, value in {"images": images, **model.predict(images)}.items():
        print(f"{name:10} {tuple(value.shape)}")
