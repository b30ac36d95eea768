"""Test a pre-trained encoder on classification: fine-tuning, linear and attentive probes, nearest neighbours.

Reading order of the project: vit -> mrmae -> mixedae -> cae -> data -> train -> **finetune** -> dense.

    # a probe on `shapes`, and its baseline
    python finetune.py --encoder runs/mixedae/encoder.pt --protocol linear --cache-features
    python finetune.py --encoder none --protocol linear --cache-features
    # fine-tuning, and a row of MixedAE's Table 2
    python finetune.py --encoder mae_pretrain_vit_base.pth --protocol finetune --data path/to/imagenet
    python finetune.py --encoder ... --protocol finetune --data aircraft cars pets
    # two finished runs as an ensemble, and the classes of given images
    python finetune.py --evaluate runs/a runs/b --data ...
    python finetune.py --evaluate runs/a --predict path/to/images
    # how much of the attention falls on the objects of a set with boxes (MixedAE Sec. 3.4)
    python finetune.py --objects boxes.csv --data path/to/set --encoder a/encoder.pt b/encoder.pt

Without --feature a probe reads what suits the method: CLS of MAE and CAE, and the mean of the patches of
MixedAE, MR-MAE and a random encoder (--encoder none). So to compare MAE or CAE with a random encoder, give
both runs the same --feature.

A protocol decides what is trained on top of the encoder (letters: see vit.py):

    finetune    images (B, 3, height, width)
                -- encoder, trained: patch tokens -> (B, L, D)
                -- mean, new LayerNorm ------------> (B, D); with --feature cls: LayerNorm, CLS
                -- linear -------------------------> logits (B, classes)

    linear      images (B, 3, height, width)
                -- encoder, frozen ----------------> (B, N, D)
                -- CLS or mean of the patches -----> (B, D)
                -- BatchNorm, linear --------------> logits (B, classes)

    attentive   images (B, 3, height, width)
                -- encoder, frozen: patch tokens --> (B, L, D)
                -- attention of a learned query ---> (B, D)
                -- BatchNorm, linear --------------> logits (B, classes)

To read one run from its flags to results.json, begin with `Classifier` and go on with `transfer`, `run_set`
and `run_task`.

Sources: MixedAE Sec. 4.2 (which follows MAE), MAE's code for fine-tuning and linear probing, CAE Sec. 5.2 and
Appendix A for attentive probing, MR-MAE Sec. 4.1. What is done differently here:
    - MixUp, CutMix and RandAugment are torchvision's. MixUp's partner is the neighbour in the batch (timm:
      the batch reversed). RandAugment always applies two operations at one magnitude, bilinearly. (timm
      applies each of them with probability .5 and at a magnitude that varies by .5, takes them from its list
      of "increasing" operations, and resamples bicubically.)
    - CAE's code fine-tunes with a learned relative position bias, which its paper does not mention. Here
      there is none.
    - The random crop of the linear probe tries ten times for a crop that fits. (MAE's and CAE's code draw
      once and clamp. CAE's attentive probe crops as ours does.)
    - BatchNorm uses its running statistics at test time. (CAE's code uses those of the test batch. About
      MAE's linear probe see `Classifier`.)
    - How Table 2 was trained stands in MixedAE's Appendix B, which is not in the PDF. Here VOC2007 has a
      binary cross-entropy for each class, and docs/recipes.md has the other numbers; both are ours.
"""

import argparse
import contextlib
import copy
import csv
import io
import json
import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.datasets
from torch import nn
from torchvision.transforms import v2
from tqdm import tqdm

import cae
from data import (
    MEAN,
    NAMES,
    STD,
    BrokenImages,
    ImageFiles,
    LabeledDataset,
    ResizeToCover,
    RunFolder,
    TrainDataset,
    add_data_args,
    add_statistics_args,
    broken_name,
    center_crop,
    check_data_args,
    collate,
    fixed_images,
    heat_map,
    load_batches,
    normalize,
    open_folder,
    open_sets,
    picture_sheet,
    read_text,
    train_transform,
)
from mrmae import from_official_mcmae
from train import (
    add_run_args,
    create_run,
    facts_of,
    first_phase,
    inference,
    load_begun,
    local_rank0_first,
    lr_at,
    run_loop,
    resolve_warmup,
    run_program,
    share_of_batch,
    to_device,
)
from vit import (
    CrossAttention,
    UserError,
    ViT,
    add_size_args,
    bounded,
    build_encoder,
    check_statistics,
    file_name,
    find_weights,
    init_weights,
    load_file,
    load_strictly,
    natural_float,
    one_line,
    pack_encoder,
    patch_attention,
    print_rank0,
    read_shape,
    recording,
    rename,
    resize_positions,
    resolve_sizes,
    set_drop_paths,
    strip_prefixes,
    unit_float,
    unpack_encoder,
)


# ------------------------------------------------------------------------------------------------------------
# What is trained on top of an encoder
# ------------------------------------------------------------------------------------------------------------
def init_linear(layer, std=0.01):
    """Initialise a last layer as MAE's, CAE's and mmsegmentation's code do: small normal weights, bias 0.
    Returns the layer."""
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


class AttentiveHead(nn.Module):
    """Attentive probing (CAE Sec. 5.2): one learned query attends to the frozen patches; a BatchNorm without
    affine parameters and a linear layer classify the result. There is no MLP and no skip connection.

    As in CAE's code the query starts at zero (so every patch counts the same at first), query, keys and
    values pass a LayerNorm each, and keys have no bias. CAE's code lets the class token in as a key; the
    paper says patches, and so do we. The linear layers of the attention start Xavier-uniform, as in all
    blocks of ours; in CAE's code from a normal distribution of deviation .02.
    """

    def __init__(self, width, heads, classes):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.norm_q = nn.LayerNorm(width, eps=1e-6)
        self.norm_k = nn.LayerNorm(width, eps=1e-6)
        self.norm_v = nn.LayerNorm(width, eps=1e-6)
        self.attn = CrossAttention(width, heads)
        self.apply(init_weights)
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.fc = init_linear(nn.Linear(width, classes))

    def forward(self, patches):  # (B, L, D) -> logits (B, classes)
        query = self.norm_q(self.query).expand(len(patches), -1, -1)  # (B, 1, D)
        pooled = self.attn(query, self.norm_k(patches), self.norm_v(patches))[:, 0]  # (B, D)
        return self.fc(self.norm(pooled))


class Classifier(nn.Module):
    """An encoder and what its protocol trains on top of it.

    forward(inputs, targets) -> loss (), {}: there are no further terms for the log.
    logits(inputs) -> (B, classes). inputs: normalised images (B, 3, height, width), or with cached features
    what `features` returned for them.
    fc_norm: the state dict of a LayerNorm for mean features, from a fine-tuned file, or None.
    """

    def __init__(self, encoder, info, fc_norm, args, classes, multi_label):
        super().__init__()
        self.encoder = encoder
        self.multi_label = multi_label
        self.frozen = args.protocol != "finetune"
        D = encoder.width

        # Choose the feature. The attentive protocol reads the patches. Else it is --feature; without the flag
        # a probe reads what the encoder's authors probe, and fine-tuning the mean.
        feature = "patches"
        if args.protocol != "attentive":
            feature = args.feature or (info["feature"] if self.frozen else "mean")
        if feature == "cls" and not encoder.num_prefix_tokens:
            raise UserError("--feature cls: this encoder has no class token; use mean")
        self.info = {**info, "feature": feature}

        # Freeze the encoder for a probe.
        if self.frozen:
            encoder.requires_grad_(False)

        # Build what the protocol trains on top of the encoder.
        self.fc_norm = nn.Identity()
        if args.protocol == "attentive":
            self.head = AttentiveHead(D, encoder.config["heads"], classes)  # CAE-B: 12, as its encoder has
        elif args.protocol == "linear":
            # eps is that of MAE's code. There the running mean has momentum .1, and needs some fifty steps to
            # forget that it started at zero. Frozen features do not change, so here it is the average of all
            # batches (momentum None), which is right from the first batch on.
            batch_norm = nn.BatchNorm1d(D, affine=False, eps=1e-6, momentum=None)
            self.head = nn.Sequential(batch_norm, init_linear(nn.Linear(D, classes)))
        else:
            # MAE's code trains the position table too (after it was resized), CAE's keeps it fixed. (If a
            # fine-tuned encoder of CAE is trained again, its method is "cae-finetune".)
            encoder.pos_embed.requires_grad_(info["method"].partition("-")[0] != "cae")
            set_drop_paths(encoder, args.drop_path)
            if feature == "mean":
                # The mean of raw patch tokens passes a LayerNorm of its own, in place of the encoder's.
                encoder.norm = nn.Identity()
                self.fc_norm = nn.LayerNorm(D, eps=1e-6)
                if fc_norm:
                    self.fc_norm.load_state_dict(fc_norm)
            self.head = init_linear(nn.Linear(D, classes), std=2e-5)  # MAE's code

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def prepare(self, images, labels=None):
        """A loaded batch -> arguments of `forward`: images are normalised, cached features stay."""
        if images.ndim == 4:
            images = normalize(images, self.info["mean"], self.info["std"])
        return images, labels

    def features(self, images):
        """Normalised images (B, 3, height, width) -> (B, D), for the attentive protocol (B, L, D)."""
        # A frozen encoder builds no graph, because none of its parameters wants a gradient.
        tokens = self.encoder.encode(self.encoder.embed(images))  # (B, N, D)
        if self.info["feature"] == "cls":
            return tokens[:, 0]
        patches = tokens[:, self.encoder.num_prefix_tokens :]
        return patches.mean(dim=1) if self.info["feature"] == "mean" else patches

    def logits(self, inputs):
        features = self.features(inputs) if inputs.ndim == 4 else inputs
        return self.head(self.fc_norm(features)).float()

    def forward(self, inputs, targets):
        """targets: classes (B,), or (B, classes): probabilities, or 0 and 1 if images have several labels."""
        logits = self.logits(inputs)
        loss = F.binary_cross_entropy_with_logits if self.multi_label else F.cross_entropy
        return loss(logits, targets), {}


# ------------------------------------------------------------------------------------------------------------
# Optimizers
# ------------------------------------------------------------------------------------------------------------
def layer_decay_groups(model, layer_decay, weight_decay):
    """Parameter groups of AdamW with layer-wise learning rates (MAE's code, after BEiT). The loop multiplies
    the rate of a group by its "lr_scale" = layer_decay^(depth + 1 - layer).

    Layer 0: class token, positions, patch embedding; layer i: block i; layer depth + 1: all that follows. No
    weight decay on one-dimensional parameters, positions and the class token.
    """
    depth, groups = len(model.encoder.blocks), {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        # "backbone.encoder.blocks.3.norm1.weight" -> ["blocks", "3", "norm1", "weight"]
        part = name.rpartition("encoder.")[2].split(".")
        layer = depth + 1
        if part[0] in ("cls_token", "pos_embed", "patch_embed"):
            layer = 0
        elif part[0] == "blocks":
            layer = int(part[1]) + 1
        decay = 0.0 if p.ndim == 1 or part[0] in ("cls_token", "pos_embed") else weight_decay
        scale = layer_decay ** (depth + 1 - layer)
        group = groups.setdefault((layer, decay), {"params": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(p)
    return list(groups.values())


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al.), as MAE's linear probe has it. The step of a matrix, its
    gradient plus weight decay, is scaled to the length trust x |w|; vectors take their gradient as it is,
    without decay. The momentum adds up steps before they are multiplied by the learning rate."""

    def __init__(self, params, lr=0.0, weight_decay=0.0, momentum=0.9, trust=0.001):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                step = p.grad
                if p.ndim > 1:
                    step = step + group["weight_decay"] * p
                    w, g = p.norm(), step.norm()
                    step = step * torch.where((w > 0) & (g > 0), group["trust"] * w / g, 1.0)
                state = self.state[p]
                if not state:
                    state["mu"] = torch.zeros_like(p)
                state["mu"].mul_(group["momentum"]).add_(step)
                p.sub_(group["lr"] * state["mu"])


# Of each protocol: the learning rate where neither --lr nor --blr is given, and where the schedule ends.
RATES = {
    "finetune": (1e-3, 1e-6),  # the rate is ours, for a laptop; the end is MAE's code's
    "linear": (6.4, 0.0),  # both are MAE's code's: .1 x 16384 / 256. We keep 6.4 with our batch of 256
    "attentive": (0.1, 1e-6),  # the rate is ours, for a laptop; the end is CAE's code's
}


def build_optimizer(model, args):
    """The optimizer of the protocol."""
    if args.protocol == "finetune":  # MAE's code, with layer decay
        groups = layer_decay_groups(model, args.layer_decay, args.weight_decay)
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)
    params = [p for p in model.parameters() if p.requires_grad]
    if args.protocol == "linear":  # MAE's code
        return LARS(params, weight_decay=args.weight_decay)
    # CAE Appendix A; Nesterov's momentum is its code's.
    return torch.optim.SGD(params, lr=0.0, momentum=0.9, nesterov=True, weight_decay=args.weight_decay)


# ------------------------------------------------------------------------------------------------------------
# Augmentation
# ------------------------------------------------------------------------------------------------------------
def training_transform(args, mean):
    """What is done to each training image, a uint8 tensor: crop and flip as in pre-training (--augment), and
    for fine-tuning RandAugment."""
    steps = [train_transform(args)]
    if getattr(args, "randaugment", 0):  # the probes have no such flag
        augment = v2.RandAugment(  # two operations by default
            magnitude=args.randaugment,
            num_magnitude_bins=11,  # magnitudes 0 to 10, timm's scale
            interpolation=v2.InterpolationMode.BILINEAR,
            fill=[int(255 * channel) for channel in mean],
        )
        steps.append(augment)
    return v2.Compose(steps)


def erase(images, probability):
    """Random erasing: in each of the normalised images (B, C, height, width), with this probability, a random
    box is replaced by normal noise.

    As in torchvision's RandomErasing the box covers .02 to .33 of the image, and its height is .3 to 3.3
    times its width. torchvision takes one image at a time, which keeps a GPU waiting; here one `torch.where`
    erases the boxes of the whole batch.
    """
    height, width = images.shape[2:]

    # Choose the images, b of them.
    chosen = (torch.rand(len(images)) < probability).nonzero().flatten()  # (b,)

    # Draw area and aspect of each box, hence its sides; a side that is longer than the image's is cut.
    area = height * width * torch.empty(len(chosen), 1).uniform_(0.02, 0.33)
    aspect = torch.empty(len(chosen), 1).uniform_(math.log(0.3), math.log(3.3)).exp()
    h = (area * aspect).sqrt().round().clamp(max=height)
    w = (area / aspect).sqrt().round().clamp(max=width)

    # Draw where it begins, and mark its rows and columns. A pixel lies in the box if its row and its column
    # are both marked.
    top = (torch.rand(len(chosen), 1) * (height - h + 1)).floor()
    left = (torch.rand(len(chosen), 1) * (width - w + 1)).floor()
    y, x = torch.arange(height), torch.arange(width)
    rows = (y >= top) & (y < top + h)  # (b, height)
    columns = (x >= left) & (x < left + w)  # (b, width)
    inside = rows[:, None, :, None] & columns[:, None, None, :]  # (b, 1, height, width)

    # Erase.
    chosen = chosen.to(images.device)
    before = images[chosen]  # (b, C, height, width)
    after = torch.where(inside.to(images.device), torch.randn_like(before), before)
    return images.index_copy(0, chosen, after)


def augmented(images, labels, args, info, classes, multi_label):
    """uint8 images (B, 3, height, width) and labels, on the device -> normalised images and targets (B,
    classes), after random erasing (each image by itself), MixUp or CutMix (the whole batch) and label
    smoothing."""
    # Erase after normalising, because the noise is that of normalised pixels.
    x = erase(normalize(images, info["mean"], info["std"]), args.erasing)

    # Mix; with both kinds a coin decides for each batch.
    targets = labels if multi_label else F.one_hot(labels, classes).float()  # (B, classes)
    mixers = []
    if args.mixup:
        mixers.append(v2.MixUp(alpha=args.mixup, num_classes=classes))
    if args.cutmix:
        mixers.append(v2.CutMix(alpha=args.cutmix, num_classes=classes))
    if mixers:
        x, targets = v2.RandomChoice(mixers)(x, targets)

    # Smooth the labels.
    if not multi_label:
        targets = targets * (1 - args.smoothing) + args.smoothing / classes
    return x, targets


# ------------------------------------------------------------------------------------------------------------
# Testing
# ------------------------------------------------------------------------------------------------------------
class EvalDataset(TrainDataset):
    """For testing: (epoch, i) -> (uint8 (3, height, width), whether it is broken, broken names). Every sample
    counts, so a broken one is not replaced by another, but black.

    As in MAE's code an image is resized to 256 / 224 of the size, above 224 pixels to the size itself, and
    cropped at its centre. One that has the size already stays as it is (ours, for sets such as CIFAR).
    """

    channels = 3

    def __init__(self, dataset, image_size):
        self.image_size = image_size
        larger = [int(side * 256 / 224) if side <= 224 else side for side in image_size]
        super().__init__(dataset, v2.Compose([ResizeToCover(larger), v2.CenterCrop(image_size)]))

    def __getitem__(self, index):
        _, i = index
        try:
            return self.read(i), False, []
        except Exception as error:  # bad files make PIL and torchvision raise all kinds
            black = torch.zeros(self.channels, *self.image_size, dtype=torch.uint8)
            return black, True, [broken_name(self.dataset, i, error)]

    def read(self, i):
        """Sample i, resized and cropped."""
        image, _ = self.dataset[i]
        return image if list(image.shape[-2:]) == self.image_size else self.transform(image)


class CachedFeatures(torch.utils.data.TensorDataset):
    """Features in place of images: (epoch, i) -> (feature, label, no broken names)."""

    def __getitem__(self, index):
        return *super().__getitem__(index[1]), []


def read_batches(dataset, chunks, args, device, consequence):
    """Yield (images, labels), on the device, of each list of indices in `chunks`. Broken samples are named,
    and `consequence` says what becomes of them; more than 10 and more than 1 % of the set stop the run."""
    broken, indices = BrokenImages(consequence), [[(0, i) for i in chunk] for chunk in chunks]
    stream = load_batches(dataset, indices, args.workers, device.type == "cuda")
    quiet = dist.get_rank() > 0
    for images, labels, names in tqdm(stream, "reading", len(chunks), leave=False, disable=quiet):
        broken.note(names)
        if len(broken.names) > max(10, 0.01 * len(dataset)):
            raise broken.error(len(dataset))
        if images is None:  # a broken sample of dense.py
            yield None, None
        else:
            yield to_device((images, labels), device)


def predict_dataset(function, dataset, args, device, leave_out=False):
    """Apply `function` (images (b, 3, height, width) -> (b, ...)) to every sample of a set. Returns (N, ...)
    float32, in the order of the set, on every process.

    The processes share the work, and each sample is looked at once, however many there are. A broken image
    counts as a black one; with leave_out its row is NaN. (Not for cached features: they have labels in the
    place of what says that a sample is broken.)
    """
    consequence = "it is left out" if leave_out else "it counts as a black image"

    # Process r takes the chunks r, r + world, ... If there are fewer chunks than processes, the others look
    # at one as well, to know the shape of a row, but do not write it.
    chunks, rank = torch.arange(len(dataset)).split(args.batch_size), dist.get_rank()
    mine = chunks[rank % len(chunks) :: dist.get_world_size()]
    out = None
    batches = read_batches(dataset, [ids.tolist() for ids in mine], args, device, consequence)
    for ids, (images, broken) in zip(mine, batches):
        with inference(args, device):
            rows = function(images).float()
        if leave_out:
            rows[broken] = math.nan
        if out is None:
            out = torch.zeros(len(dataset), *rows.shape[1:], device=device)
        if rank < len(chunks):
            out[ids.to(device)] = rows

    # Each row is written by one process, so the sum is exact.
    dist.all_reduce(out)
    return out


def predict_logits(model, samples, args, device, leave_out=False):
    """A classifier's scores (N, classes) of images or of cached features; leave_out as above."""
    return predict_dataset(
        lambda images: model.logits(model.prepare(images)[0]), samples, args, device, leave_out
    )


def cache_features(model, dataset, args, device, training=False):
    """Look at every image of a set once -> its features (N, D), for the attentive protocol (N, L, D), in
    place of images. Broken images are left out of a training set."""
    samples = EvalDataset(dataset, args.image_size)
    features = predict_dataset(
        lambda images: model.features(model.prepare(images)[0]), samples, args, device, leave_out=training
    ).cpu()
    labels = torch.tensor(dataset.labels)
    read = ~features.flatten(1)[:, 0].isnan()  # (N,)
    if training and not read.all():
        features, labels = features[read], labels[read]
    return CachedFeatures(features, labels)


def confusion_matrix(predicted, labels, classes):
    """predicted (N,), labels (N,) -> how often class i was taken for class j, (classes, classes)."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def average_precision_11(scores, positive):
    """Average precision as VOC2007 has it: the mean, over the recalls 0, .1, .., 1, of the best precision at
    that recall or a higher one. scores (N,), positive (N,)."""
    hits = positive[scores.argsort(descending=True, stable=True)].double()
    recall = hits.cumsum(0) / hits.sum().clamp(min=1)  # where there is nothing to find, the result is 0
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    levels = torch.arange(11, dtype=torch.float64) / 10 - 1e-9  # a recall of just .3 reaches the level .3
    return torch.stack([(precision * (recall >= level)).max() for level in levels]).mean()


def compute_metrics(scores, labels, metric):
    """Scores (N, classes) and labels of the whole test set -> {metric: per cent}; never an average of
    batches."""
    scores = scores.cpu()
    if metric == "map11":
        precisions = [average_precision_11(s, y > 0) for s, y in zip(scores.T, labels.T)]
        return {metric: 100 * torch.stack(precisions).mean().item()}
    matrix = confusion_matrix(scores.argmax(dim=1), labels, scores.shape[1]).double()
    hits, truth = matrix.diag(), matrix.sum(dim=1)
    results = {"top1": 100 * (hits.sum() / truth.sum()).item()}
    if metric == "mean_per_class":
        results[metric] = 100 * (hits / truth)[truth > 0].mean().item()
    return results


def report(folder, scores, test_set, metric):
    """Scores (N, classes) -> the numbers of a test set, see `compute_metrics`. Rank 0, which has the folder,
    writes confusion.csv if an image has one label."""
    labels = torch.tensor(test_set.labels)
    if folder and metric != "map11":
        matrix = confusion_matrix(scores.argmax(dim=1).cpu(), labels, len(test_set.classes))
        write_confusion(folder, matrix, test_set.classes)
    return compute_metrics(scores, labels, metric)


def nearest_neighbours(train, train_labels, test, classes, k=20, temperature=0.07):
    """Scores (N, classes) of the weighted k-nearest-neighbour vote of DINO's code: cosine similarity, weights
    exp(similarity / .07), k = 20."""
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    train_labels = train_labels.to(test.device)
    votes = torch.zeros(len(test), classes, device=test.device)
    for part, votes_of_part in zip(test.split(1024), votes.split(1024)):
        similarity, ids = (part @ train.T).topk(min(k, len(train)), dim=1)  # (b, k)
        votes_of_part.scatter_add_(1, train_labels[ids], (similarity / temperature).exp())
    return votes


def example_of(samples, prepare, device):
    """Arguments of the model for the step that `wrap_ddp` throws away: a batch of two samples, as many as
    BatchNorm needs."""
    batch = collate([samples[0, i] for i in (0, len(samples) - 1)])
    return prepare(*to_device(BrokenImages().count(*batch), device))


def start_testing(model):
    """Switch to eval mode, and give all processes the buffers of process 0: each has updated its statistics
    of BatchNorm with batches of its own."""
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)
    model.eval()


class Tested:
    """What `Task` and the tasks of dense.py do alike. Each has args, model, info (of the encoder), test_set,
    metric (which chooses best.pt), and measure(folder), which returns the numbers of the test set."""

    def test(self, run, epoch_ends):
        """For the loop: at an epoch's end the numbers of the test set. The best model so far is written to
        best.pt, as in MAE's code."""
        if not epoch_ends:
            return {}
        numbers = self.measure(run.folder)
        self.model.train()
        if numbers[self.metric] >= run.state["best"]:  # of equal results the last
            run.state["best"] = numbers[self.metric]
            saved = {**self.best_file(), "epoch": run.state["step"] // run.batches.steps_per_epoch}
            if run.folder:
                run.folder.write("best.pt", lambda file: torch.save(saved, file))
        return numbers

    def best_file(self):
        """What best.pt holds: all that --evaluate needs."""
        return {
            "model": self.model.state_dict(),
            "config": self.model.encoder.config,
            "info": self.info,
            "args": vars(self.args),
            "classes": list(self.test_set.classes),
            "metric": self.metric,
        }


# ------------------------------------------------------------------------------------------------------------
# One run
# ------------------------------------------------------------------------------------------------------------
@dataclass
class Task(Tested):
    """A classifier, and the samples that it is trained and tested on."""

    args: argparse.Namespace
    model: Classifier
    device: torch.device
    train_samples: TrainDataset | CachedFeatures
    test_samples: EvalDataset | CachedFeatures
    test_set: LabeledDataset
    metric: str  # chooses best.pt

    @property
    def info(self):
        return self.model.info

    def measure(self, folder):
        """The numbers of the test set, {metric: per cent}. folder: see `report`."""
        start_testing(self.model)
        scores = predict_logits(self.model, self.test_samples, self.args, self.device)
        return report(folder, scores, self.test_set, self.metric)

    def results(self, folder):
        """What results.json holds. Rank 0, which has the folder, writes the other files of a finished run."""
        results = self.measure(folder)
        if folder and self.args.protocol == "finetune":
            folder.write("encoder.pt", lambda file: torch.save(self.export(), file))
        if folder and self.args.protocol == "attentive":
            self.show_attention(folder)
        if self.model.multi_label or not isinstance(self.train_samples, CachedFeatures):
            return results

        # Add the test by nearest neighbours, which costs nothing once features are cached. The attentive
        # protocol has cached patches; of these compare the means.
        (seen, known), (unseen, labels) = self.train_samples.tensors, self.test_samples.tensors
        seen, unseen = (x.view(len(x), -1, x.shape[-1]).mean(dim=1).to(self.device) for x in (seen, unseen))
        votes = nearest_neighbours(seen, known, unseen, len(self.test_set.classes))
        return {**results, f"knn_{self.metric}": compute_metrics(votes, labels, self.metric)[self.metric]}

    def export(self):
        """encoder.pt of a fine-tuned encoder, for a probe or as a teacher of MR-MAE. A LayerNorm that was
        trained on means becomes its last one, and is applied to each token from now on."""
        encoder, info = copy.deepcopy(self.model.encoder), self.info
        if info["feature"] == "mean":
            encoder.norm = self.model.fc_norm
        method = f"{info['method']}-finetune"
        return pack_encoder(encoder, method, info["feature"], info["mean"], info["std"])

    def show_attention(self, folder):
        """pictures/attention.png: where the learned query looks (CAE Fig. 5), mean over heads, on eight test
        images."""
        model, attention = self.model.eval(), self.model.head.attn
        images, _ = fixed_images(self.test_set, self.args.image_size, 8)
        with inference(self.args, self.device), recording([attention]):
            model.logits(model.prepare(images.to(self.device))[0])
            maps = attention.recorded.float().mean(dim=1).unflatten(-1, model.encoder.grid)  # (8, 1, h, w)
        panels = {"image": images / 255, "attention of\nthe query": heat_map(maps[:, 0].cpu(), images)}
        folder.write_picture("attention.png", picture_sheet(panels))


def write_confusion(folder, matrix, classes):
    """confusion.csv: rows are the true classes. matrix: see `confusion_matrix`."""
    rows = [[name, *row] for name, row in zip(classes, matrix.tolist())]
    write_csv(folder, "confusion.csv", [["true \\ predicted", *classes], *rows])


def write_numbers(folder, said, results):
    """results.json, and a line that shows it, headed by `said`."""
    folder.write_text("results.json", json.dumps(results, indent=1))
    shown = ", ".join(f"{key} {value:.2f}" for key, value in results.items())
    print_rank0(f"{said}: {shown}")


def write_csv(folder, name, rows):
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    folder.write_text(name, text.getvalue())


def replace_args(args, **values):
    """A copy of args with other values."""
    return argparse.Namespace(**{**vars(args), **values})


def run_set(args, argv, opened, train_set, test_set, metric, device):
    """Train and test on one set -> as `run_task`. opened: what `open_encoder` returned."""
    torch.manual_seed(args.seed)
    model = Classifier(*opened, args, len(test_set.classes), metric == "map11").to(device)

    # A resumed probe must cache the features of the encoder that it began with, so load its checkpoint now.
    # That also refuses other flags before the long work.
    begun = load_begun(args) if model.frozen else None
    if begun:
        given = copy.deepcopy(model.encoder.state_dict())
        with contextlib.suppress(RuntimeError, ValueError):  # `resume` will say why it does not fit
            load_strictly(model, begun["model"])
        if any(not value.equal(given[name]) for name, value in model.encoder.state_dict().items()):
            print_rank0(
                f"note: {args.encoder} has other weights than when {args.out} began; this run goes on "
                f"with those it began with; to use the new ones, give another --out"
            )

    # Choose what it is trained and tested on: features, or images.
    folder = None
    if model.frozen and args.cache_features:
        # Take the run's folder before the long work, not after it.
        folder = RunFolder(args.out) if dist.get_rank() == 0 else None
        model.eval()
        train_samples = cache_features(model, train_set, args, device, training=True)
        test_samples = cache_features(model, test_set, args, device)
        args.workers = 0  # there is nothing left to load
    else:
        transform = training_transform(args, model.info["mean"])
        train_samples = TrainDataset(train_set, transform, args.seed)
        test_samples = EvalDataset(test_set, args.image_size)

    # Choose how a loaded batch is prepared: fine-tuning augments it as a whole, too.
    prepare = model.prepare
    if not model.frozen:
        prepare = partial(
            augmented,
            args=args,
            info=model.info,
            classes=len(test_set.classes),
            multi_label=model.multi_label,
        )

    # Make the run, or go on with it.
    default_lr, min_lr = RATES[args.protocol]
    run = create_run(
        args,
        device,
        model,
        optimizer=build_optimizer(model.train(), args),
        example=example_of(train_samples, prepare, device),
        facts={**facts_of(train_set), "images": len(train_samples)},  # broken images are not cached
        default_lr=default_lr,
        min_lr=min_lr,
        schedule=lr_at,
        prepare=prepare,
        export=dict,  # no encoder.pt before the end
        folder=folder,
    )
    header = (
        f"{args.protocol} of {args.encoder} on {args.data}: {len(train_samples)} training and "
        f"{len(test_set)} test images, {len(train_set.classes)} classes, {metric}; features: "
        f"{model.info['feature']}"
    )
    task = Task(args, model, device, train_samples, test_samples, test_set, metric)
    return run_task(run, argv, header, train_samples, task)


def run_task(run, argv, header, dataset, task):
    """Train, then test once more -> (exit code, what results.json holds, or None if the run stopped before
    its end). task: has test(run, epoch_ends), results(folder) and metric, as `Task` has them."""
    code = run_loop(run, argv, header, dataset, task.test)
    if code or run.state["step"] < run.batches.steps:
        return code, None
    results = task.results(run.folder)
    if run.folder:
        results[f"best_{task.metric}"] = run.state["best"]
        already = ", finished already" if run.batches.start == run.batches.steps else ""
        write_numbers(run.folder, f"{run.args.out}{already}", results)
    return 0, results


def transfer(args, argv, device):
    """Train and test on one set after the other; several make a row, as in MixedAE Table 2 -> exit code."""
    if args.protocol != "finetune" and args.batch_size < 2:
        raise UserError("--batch-size 1: BatchNorm needs at least 2 images; use 2 or more")

    # Open the encoder and all sets, to find out what is missing before hours of work. The seed makes a random
    # encoder the same on all processes.
    torch.manual_seed(args.seed)
    opened = open_encoder(args)
    encoder, info, _ = opened
    args = replace_args(args, method=info["method"], image_size=encoder.config["image_size"])
    sets = [local_rank0_first(args, partial(open_labelled, name, args)) for name in args.data]

    # Train.
    numbers = []
    for name, (train_set, test_set, metric) in zip(args.data, sets):
        out = args.out
        if not out or len(sets) > 1:
            out = str(Path(out or "runs") / f"{args.method}-{args.protocol}-{Path(name).name}")
        set_args = replace_args(args, data=name, out=out)
        code, results = run_set(set_args, argv, copy.deepcopy(opened), train_set, test_set, metric, device)
        if results is None:
            return code
        numbers.append(results[metric])

    # Print the row.
    if len(sets) > 1:
        cells = [f"{number:.1f}" for number in [*numbers, sum(numbers) / len(numbers)]]
        print_rank0("| " + " | ".join([*args.data, "Avg."]) + " |")
        print_rank0("|---" * len(cells) + "|")
        print_rank0("| " + " | ".join(cells) + " |")
    return 0


# ------------------------------------------------------------------------------------------------------------
# --evaluate, --predict
# ------------------------------------------------------------------------------------------------------------
def load_finished(path, args, device, build):
    """A run folder or its best.pt -> (model in eval mode, what the file holds). build(encoder, saved, args)
    makes the model of the file's encoder, content and flags. args: the flags of this call; those that
    describe the encoder must be left out or be the run's."""
    file = Path(path) / "best.pt" if os.path.isdir(path) else Path(path)
    if not os.path.exists(file):
        raise UserError(
            f"{file}: no such file; --evaluate takes the folder of a run of this program, which has a "
            f"best.pt after its first epoch"
        )
    saved = load_file(file)
    try:
        check_statistics(saved["info"])
        model = build(ViT(**saved["config"]), saved, argparse.Namespace(**saved["args"]))
        load_strictly(model, saved["model"])
    except Exception as error:  # a damaged or foreign file makes them raise all kinds
        raise UserError(
            f"{file}: not a best.pt of this program ({one_line(error)}); finetune.py and dense.py evaluate "
            f"their own runs"
        ) from None

    # Refuse flags that contradict the run.
    own = {**saved["config"], **saved["info"]}
    for flag in ("image_size", "patch_size", "width", "depth", "heads", "mean", "std", "feature"):
        value = getattr(args, flag, None)
        if flag == "image_size" and value:
            value = [value[0], value[-1]]
        if value not in (None, own.get(flag)):
            raise UserError(
                f"--{flag.replace('_', '-')} {value}: {file} has {own.get(flag)}; leave the flag out"
            )

    # Say which epoch it is, and what the last one had. The run's own test set chose it, so its number there
    # is optimistic.
    last = "beside it lies no results.json: the run is not finished, or the file was moved"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        results = json.loads((file.parent / "results.json").read_text())
        if f"best_{saved['metric']}" in results:  # --evaluate writes a results.json without it
            last = f"after the last epoch it was {results[saved['metric']]:.2f}"
    print_rank0(
        f"{file}: epoch {saved.get('epoch', 'unknown')} of {saved['args']['epochs']}, the best of its run by "
        f"{saved['metric']} on its own test set; {last}"
    )
    return model.to(device).eval(), saved


def evaluate(args, device):
    """--evaluate: one classifier, or several as an ensemble (MR-MAE Table 4: their probabilities are
    averaged), on --data, else on the first run's own test set; with --predict the classes of a folder's
    images, or of one image -> exit code."""

    def build(encoder, saved, run_args):
        classes, multi_label = saved["classes"], saved["metric"] == "map11"
        return Classifier(encoder, saved["info"], None, run_args, len(classes), multi_label)

    # Load the runs.
    models, runs = zip(*[load_finished(path, args, device, build) for path in args.evaluate])
    own, metric = runs[0]["args"], runs[0]["metric"]

    # Open the images: those of --predict, the test set of --data, or that of the first run, which lies where
    # it lay then.
    name = args.data[0] if args.data else own["data"]
    if args.predict:
        files = ImageFiles([args.predict]) if os.path.isfile(args.predict) else open_folder(args.predict)
        dataset = LabeledDataset([(files, [-1] * len(files))], runs[0]["classes"])
    else:
        root = args.data_root if args.data else own["data_root"]
        opened = replace_args(args, image_size=models[0].encoder.config["image_size"], data_root=root)
        _, dataset, metric = local_rank0_first(args, partial(open_labelled, name, opened))
    for path, saved in zip(args.evaluate, runs):
        if saved["classes"] != dataset.classes:
            raise UserError(f"--evaluate {path}: was trained on other classes than those of {name}")

    # Take the folder before the long work, not after it.
    folder = RunFolder(args.out or "runs/evaluate") if dist.get_rank() == 0 else None

    # Average the probabilities, each model's on images of its own size.
    probabilities = 0  # (N, classes)
    for model in models:
        samples = EvalDataset(dataset, model.encoder.config["image_size"])
        logits = predict_logits(model, samples, args, device, leave_out=bool(args.predict))
        scores = logits.sigmoid() if model.multi_label else logits.softmax(dim=1)
        probabilities = probabilities + scores / len(models)
    if folder is None:
        return 0

    # Write the numbers of the test set.
    if not args.predict:
        results = report(folder, probabilities, dataset, metric)
        write_numbers(folder, f"{' + '.join(args.evaluate)} on {name}", results)
        return 0

    # Or write the predicted classes: the best one of each image and, if images have several labels, all that
    # are likelier than not. Files that could not be read are left out.
    read = ~probabilities[:, :1].isnan()  # (N, 1)
    if not read.any():
        raise UserError(f"--predict {args.predict}: none of its {len(read)} images can be read")
    shown = F.one_hot(probabilities.argmax(dim=1), len(dataset.classes)).bool()  # (N, classes)
    if metric == "map11":
        shown |= probabilities >= 0.5
    places = (shown & read).nonzero().tolist()
    rows = [[files.paths[i], dataset.classes[c], f"{probabilities[i, c]:.6f}"] for i, c in places]
    write_csv(folder, "predictions.csv", [["file", "class", "probability"], *rows])
    print_rank0(f"{folder.path / 'predictions.csv'}: {read.sum()} images; {(~read).sum()} broken, left out")
    return 0


# ------------------------------------------------------------------------------------------------------------
# --objects: does an encoder look at the objects? MixedAE Sec. 3.4 and Fig. 5, in numbers and as a picture
# ------------------------------------------------------------------------------------------------------------
SMALL = 0.4  # ours: an object is small if it covers less than this share of its image


class BoxedImages(EvalDataset):
    """(epoch, i) -> (uint8 (4, height, width), whether it is broken, broken names): the image, and as a
    fourth channel 255 where its boxes are, else 0."""

    channels = 4

    def __init__(self, dataset, boxes, image_size):
        super().__init__(dataset, image_size)
        self.transform = center_crop(image_size)
        self.boxes = boxes  # of each sample, a list of [x0, y0, x1, y1] in pixels, ends included

    def read(self, i):
        """Draw the boxes of sample i, then resize and crop them together with the image."""
        image, _ = self.dataset[i]
        mask = torch.zeros_like(image[:1])
        for x0, y0, x1, y1 in self.boxes[i]:
            if not (x1 < image.shape[2] and y1 < image.shape[1]):
                size = f"{image.shape[2]} x {image.shape[1]} pixels"
                raise ValueError(f"its box {x0},{y0},{x1},{y1} (ends included) leaves its {size}")
            mask[:, y0 : y1 + 1, x0 : x1 + 1] = 255
        return self.transform(torch.cat([image, mask]))


def read_boxes(path, dataset, folder):
    """A table with the columns file (relative to the set's folder), x0, y0, x1, y1 (pixels, ends included) ->
    for each sample of the set the list of its boxes. Several boxes of a file count as one object."""
    boxes = defaultdict(list)
    try:
        rows = csv.DictReader(io.StringIO(read_text(path), newline=""), skipinitialspace=True)
        if not {"file", "x0", "y0", "x1", "y1"} <= set(rows.fieldnames or ()):
            raise ValueError(f"its columns are {rows.fieldnames}")
        for row in rows:
            corners = [row[name] for name in ("x0", "y0", "x1", "y1")]
            if None in corners:
                raise ValueError(f"line {rows.line_num} has too few columns")
            x0, y0, x1, y1 = box = list(map(int, corners))
            if not (0 <= x0 <= x1 and 0 <= y0 <= y1):
                raise ValueError(f"the box of {row['file']} is {box}, not two corners")
            boxes[os.path.normpath(row["file"])].append(box)
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(
            f"--objects {path}: is no table of file,x0,y0,x1,y1 in whole pixels ({one_line(error)})"
        ) from None

    # Find those of each sample.
    names = [os.path.relpath(dataset.name(i), folder) for i in range(len(dataset))]
    without = [name for name in names if name not in boxes]
    said = f"{len(without)} of {len(names)} images have no box, such as {without[:1]}"
    if len(without) == len(names):
        raise UserError(
            f"--objects {path}: {said}; its files are like {next(iter(boxes), None)}, and must be relative "
            f"to --data {folder}"
        )
    if without:
        print_rank0(f"note: {said}; they do not count")
    return [boxes.get(name, []) for name in names]


def patch_areas(boxed, grid):
    """Samples of `BoxedImages` (B, 4, height, width) -> how much of each patch the box covers, (B, L)."""
    return F.adaptive_avg_pool2d((boxed[:, 3] > 127).float(), grid).flatten(1)


def object_shares(attention, areas):
    """attention (B, N, L) of `patch_attention`, areas (B, L) of `patch_areas` -> (B, 3), with the columns

        area     the share of the image that the object covers
        cls      the share of CLS's attention that falls on the object, NaN without CLS
        patches  the same, on average over the patches that lie wholly in the object, NaN if there is none

    An encoder that looks everywhere alike has three equal shares.
    """
    share = (attention * areas.unsqueeze(1)).sum(dim=2)  # of each query's attention, (B, N)
    prefix = attention.shape[1] - attention.shape[2]
    of_cls = share[:, 0] if prefix else torch.full_like(share[:, 0], math.nan)
    inside = (areas == 1).float()  # (B, L)
    of_patches = (share[:, prefix:] * inside).sum(dim=1) / inside.sum(dim=1)
    return torch.stack([areas.mean(dim=1), of_cls, of_patches], dim=1)


def average_shares(shares):
    """shares (images, 3) of `object_shares` -> their means over all images, and over those with a small
    object, as results.json has them. The smallest objects hold no whole patch and are missing in "patches";
    "patches_area" is the mean area of the others, which is what even attention of patches would give."""
    area, numbers = shares[:, 0], {}

    # Add a column: the area where the object holds a whole patch, else NaN.
    shares = torch.cat([shares, torch.where(shares[:, 2:].isnan(), math.nan, shares[:, :1])], dim=1)
    for name, chosen in (("all", area > 0), ("small", (area > 0) & (area < SMALL))):
        means = zip(("area", "cls", "patches", "patches_area"), shares[chosen].nanmean(dim=0).tolist())
        known = {key: round(mean, 4) for key, mean in means if not math.isnan(mean)}
        numbers[name] = {"images": int(chosen.sum()), **known}
    return numbers


def object_panels(encoder, attention, areas, images):
    """Where CLS looks (Fig. 5), if there is one, and where the patches that lie wholly in the box look on
    average: {title: (B, 3, height, width)}. attention, areas: see `object_shares`."""
    prefix, inside = encoder.num_prefix_tokens, (areas == 1).float()  # (B, L)
    maps = {"CLS": attention[:, 0]} if prefix else {}
    maps["patches in box"] = torch.einsum("bq,bqk->bk", inside, attention[:, prefix:])
    return {title: heat_map(values.unflatten(1, encoder.grid), images) for title, values in maps.items()}


def look(encoder, info, boxed):
    """Samples of `BoxedImages` (B, 4, height, width) -> attention and areas as `object_shares` takes them."""
    images = normalize(boxed[:, :3], info["mean"], info["std"])
    return patch_attention(encoder, images), patch_areas(boxed, encoder.grid)


def measure_objects(args, device):
    """--objects: nothing is trained; all encoders see the same images (of val/, if there is one), each at its
    own image size -> exit code. results.json has what `average_shares` says of each encoder;
    pictures/objects.png shows what `object_panels` draws of eight images, those with a small object first."""
    # Open the encoders, the images and their boxes.
    opened = {}
    for path in args.encoder:
        torch.manual_seed(args.seed)
        opened[path] = open_encoder(replace_args(args, encoder=path))
    folder = args.data[0]
    train_set, val_set = open_sets(replace_args(args, data=folder))
    dataset = train_set if val_set is None else val_set
    table = args.objects if os.path.exists(args.objects) else Path(folder, args.objects)
    boxes = read_boxes(table, dataset, folder)

    # Take the folder before the long work, not after it.
    out = RunFolder(args.out or "runs/objects") if dist.get_rank() == 0 else None

    results, panels, ids = {}, {}, None
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    for number, (path, (encoder, info, _)) in enumerate(opened.items(), start=1):
        encoder.to(device).eval()

        # Measure the shares of all images.
        samples = BoxedImages(dataset, boxes, encoder.config["image_size"])
        shares = predict_dataset(
            lambda boxed: object_shares(*look(encoder, info, boxed)), samples, args, device, leave_out=True
        ).cpu()
        results[path] = average_shares(shares)
        print_rank0(f"{path}: {results[path]}")

        # Choose the images to draw, the same for all encoders, among those that count for the first one.
        if ids is None:
            area = shares[order, 0]
            small, large = order[(area > 0) & (area < SMALL)], order[area >= SMALL]
            ids = torch.cat([small, large]).tolist()
            print_rank0(f"{len(ids)} of {len(dataset)} images count")
            if not ids:
                raise UserError(
                    f"--objects {table}: none of the {len(dataset)} images counts; no box lies in the centre "
                    f"of its image, which is what an encoder sees"
                )

        # Draw its maps beside the images, in which all but the box is darkened.
        boxed, _, _ = collate([samples[0, i] for i in ids[:8]])  # (b, 4, height, width)
        panels.setdefault("image, box", boxed[:, :3] / 255 * (0.3 + 0.7 * (boxed[:, 3:] > 127)))
        with inference(args, device):
            attention, areas = look(encoder, info, boxed.to(device))
        name = Path(path).resolve().parent.name if Path(path).name == "encoder.pt" else Path(path).stem
        for title, maps in object_panels(encoder, attention.cpu(), areas.cpu(), panels["image, box"]).items():
            panels[f"{number} {name[:18]}\n{title}"] = maps

    # Write.
    if out:
        out.write_text("results.json", json.dumps(results, indent=1))
        out.write_picture("objects.png", picture_sheet(panels))
        print_rank0(f"{out.path}: results.json, pictures/objects.png")
    return 0


# ============================================================================================================
# A first reading may stop here. What follows: flags, encoders of every layout, the sets of MixedAE Table 2.
# ============================================================================================================
# What differs between the protocols. The batches and the 10 epochs of fine-tuning are ours, for a laptop;
# those of the papers are in docs/recipes.md. The other numbers of fine-tuning are those of MAE's code.
PROBE = dict(epochs=90, batch_size=256, weight_decay=0.0)  # MAE's code's and CAE's, but the batch is ours
DEFAULTS = {
    "finetune": dict(epochs=10, batch_size=64, weight_decay=0.05, layer_decay=0.65, drop_path=0.1),
    "linear": PROBE,
    "attentive": PROBE,
}
WARMUP = {"finetune": 1, "linear": 10, "attentive": 10}  # see train.resolve_warmup


def add_encoder_args(parser, nargs=None):
    """The flags that say what is evaluated; dense.py has them too. nargs: of --encoder."""
    add = parser.add_argument_group("what to evaluate").add_argument
    add(
        "--encoder",
        default="runs/mixedae/encoder.pt",
        nargs=nargs,
        help="an encoder.pt, a published file, or none: a random encoder",
    )
    add("--evaluate", nargs="+", metavar="RUN", help="evaluate these finished runs, and stop")
    add(
        "--predict",
        type=file_name,
        metavar="IMAGES",
        help="with --evaluate: predict the images of this folder, or this one",
    )
    add_statistics_args(
        add,
        "what images are normalised with [as encoder.pt says; published files: ImageNet's, but timm's augreg "
        "files want .5 .5 .5]",
    )


def parse_args(argv=None):
    """Flags -> args. --protocol is read first, because each protocol has flags and defaults of its own."""
    argv = sys.argv[1:] if argv is None else list(argv)
    what = "what is trained on top of the encoder"
    protocol, parser = first_phase("finetune.py", "protocol", DEFAULTS, "linear", what, argv)

    # Collect its flags.
    add_encoder_args(parser, nargs="+")
    parser.add_argument(
        "--objects",
        type=file_name,
        metavar="BOXES.CSV",
        help="train nothing: measure how much attention of one or more encoders falls on the objects of the "
        "val images of --data, a folder (MixedAE Sec. 3.4); columns file,x0,y0,x1,y1, files relative to it",
    )
    add_run_args(parser)
    add_data_args(parser, [*NAMES, *SETS], nargs="+", default=None)
    add_size_args(parser, decoder=False)
    add = parser.add_argument_group(protocol).add_argument
    add(
        "--label-fraction",
        type=bounded(float, 1e-9, 1),
        default=1.0,
        help="use this share of each class's images (ours)",
    )
    if protocol in ("finetune", "linear"):
        add(
            "--feature",
            choices=("cls", "mean"),
            help="the class token or the mean of the patch tokens [finetune: mean; linear: what the "
            "encoder's authors probe, and of a random encoder the mean]",
        )
    if protocol == "finetune":
        add_finetune_args(add)
    else:
        add(
            "--cache-features",
            action="store_true",
            help="compute the features once, of the crop that is tested: no augmentation, but seconds "
            "instead of minutes. They lie in the memory of each process, and at first of its card: "
            "attentive, ViT-B at 224 pixels, .6 MB per image; else 3 kB",
        )
    defaults = DEFAULTS[protocol]
    parser.set_defaults(
        image_size=None,
        size=None,
        crop_scale=[0.08, 1.0],  # MAE's code, and CAE's
        **defaults,
    )
    parser.set_defaults(batch_size=share_of_batch(defaults["batch_size"], multiple=2))

    # Parse, and check what takes more than one flag.
    args = parser.parse_args(argv)
    resolve_warmup(args, WARMUP[protocol])
    args.data = args.data or ([] if args.evaluate else ["shapes"])

    if args.evaluate:
        note_useless(parser, argv, "--evaluate", vars(args).keys() - EVALUATE_FLAGS)
    if args.objects:
        note_useless(parser, argv, "--objects", vars(args).keys() - OBJECTS_FLAGS)

    # --objects compares encoders on one folder; everything else takes one encoder.
    args.encoder = [args.encoder] if isinstance(args.encoder, str) else args.encoder
    check_encoder_args(parser, args)
    if args.objects and args.evaluate:
        parser.error("--objects: goes without --evaluate")
    if args.objects:
        name = args.data[0]
        if len(args.data) > 1 or name in (*NAMES, *SETS) or name.endswith(".txt"):
            parser.error(f"--objects: takes one folder, not --data {' '.join(args.data)}")
    elif len(args.encoder) > 1:
        parser.error(f"--encoder {' '.join(args.encoder)}: one encoder a run, unless --objects compares them")
    else:
        args.encoder = args.encoder[0]
    check_data_args(parser, args)
    if args.evaluate and len(args.data) > 1:
        parser.error(f"--evaluate: one set at a time, not --data {' '.join(args.data)}")
    if len({Path(name).name for name in args.data}) < len(args.data):
        parser.error(
            f"--data {' '.join(args.data)}: two of the same name would share a folder; give them one by one, "
            f"each with its --out"
        )
    return args


# The flags that --evaluate and --objects use. Those in the second line of EVALUATE_FLAGS may only repeat what
# the run's encoder has.
EVALUATE_FLAGS = set(
    "protocol evaluate predict data data_root download out device precision workers batch_size "
    "image_size patch_size width depth heads mean std feature".split()
)
OBJECTS_FLAGS = set(
    "protocol objects encoder data out device precision workers batch_size seed "
    "image_size patch_size size width depth heads mean std".split()
)


def note_useless(parser, argv, mode, useless):
    """Name the flags that stand in argv and do nothing in this mode."""
    parser = copy.deepcopy(parser)
    parser.set_defaults(**dict.fromkeys(vars(parser.parse_args(argv))))  # what was not given is None
    given = {flag for flag, value in vars(parser.parse_args(argv)).items() if value is not None}
    named = ", ".join(f"--{flag.replace('_', '-')}" for flag in sorted(given & set(useless)))
    if named:
        print_rank0(f"note: {named}: without effect with {mode}")


def add_layer_args(add):
    """Flags of a trained encoder, here and in dense.py; their defaults stand in DEFAULTS."""
    add(
        "--layer-decay",
        type=bounded(float, 1e-6, 1),
        help="each layer below the head learns at this much of the rate above it",
    )
    add(
        "--drop-path",
        type=bounded(float, 0, 0.99),
        help="stochastic depth of the last block, rising linearly from 0 in the first",
    )


def add_finetune_args(add):
    """The defaults are those of MAE's code for ViT-B at 224 pixels, which MixedAE Sec. 4.2 follows. CAE's
    are the same: layer decay and weight decay stand in its Appendix A, the others in its scripts."""
    add_layer_args(add)
    add("--smoothing", type=unit_float, default=0.1, help="label smoothing")
    add("--mixup", type=natural_float, default=0.8, help="alpha of MixUp; 0: off")
    add(
        "--cutmix",
        type=natural_float,
        default=1.0,
        help="alpha of CutMix; 0: off. With both, a coin decides for each batch",
    )
    add(
        "--randaugment",
        type=bounded(int, 0, 10),
        default=9,
        help="magnitude of two RandAugment operations; 0: off",
    )
    add("--erasing", type=unit_float, default=0.25, help="probability of erasing a random box of an image")


def check_encoder_args(parser, args):
    """One clear line for flags that do not go together."""
    if args.predict and not args.evaluate:
        parser.error(f"--predict {args.predict}: goes with --evaluate RUN")
    if (args.mean is None) != (args.std is None):
        parser.error("--mean and --std: give both")
    mode = "--evaluate" if args.evaluate else "--objects" if getattr(args, "objects", None) else None
    holds_run = args.out and any(os.path.exists(f"{args.out}/{name}.pt") for name in ("checkpoint", "best"))
    if mode and holds_run:
        parser.error(f"--out {args.out}: holds a run, whose results {mode} would replace; choose another")
    if args.image_size and len(args.image_size) > 2:
        parser.error(f"--image-size takes one number or two (height width), not {len(args.image_size)}")


# ------------------------------------------------------------------------------------------------------------
# Encoders
# ------------------------------------------------------------------------------------------------------------
class Layout(NamedTuple):
    """A layout of published files. No tensor shows the number of heads, so they go by the width."""

    name: str
    sign: str  # a tensor of this layout; the first layout whose sign is found is taken
    convert: Callable  # its names -> those of our ViT
    feature: str  # what its authors probe
    heads: dict  # width -> heads


HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
LAYOUTS = (
    Layout("CAE", "blocks.0.attn.q_bias", cae.from_official, "cls", {**HEADS, 384: 12}),  # see cae.CAE.sizes
    Layout("MCMAE", "blocks3.0.norm1.weight", from_official_mcmae, "mean", HEADS),
    Layout("MAE, DINO or timm", "pos_embed", dict, "cls", HEADS),
)
# Tensors whose names begin so belong to heads and decoders.
LEFT_ASIDE = tuple(
    "head fc_norm pre_logits decoder mask_token lm_head regresser pretext_neck encoder_to_ rd_pos_embed "
    "stage".split()
)


def read_published(state, path, heads):
    """A published file's content -> (weights by our names, shape of the ViT, its method and the feature that
    its authors probe, whether its last LayerNorm was one for mean features)."""
    if "args" in state and state.keys() & {"step", "classes"}:
        raise UserError(
            f"{path}: a checkpoint of this project, not an encoder; give the encoder.pt of the run"
        )
    try:
        # Find the weights in the file, and the layout.
        found = strip_prefixes(find_weights(state, path))
        layout = next(layout for layout in LAYOUTS if layout.sign in found)

        # A file that was fine-tuned on mean features has fc_norm in place of norm: take it as norm. Drop
        # heads and decoders.
        mean_pooled = "fc_norm.weight" in found and "norm.weight" not in found
        if mean_pooled:
            found = rename(found, [(r"^fc_norm\.", "norm.")])
        kept = {name: value for name, value in found.items() if not name.startswith(LEFT_ASIDE)}

        # Rename them, and read the shape of the ViT off them. (MCMAE's and CAE's names become those of a
        # whole model, with "encoder." in front.)
        weights = strip_prefixes(layout.convert(kept))
        shape = read_shape(weights)
        if shape["channels"] != 3:
            raise ValueError("not for colour images")
    except Exception:  # names and shapes of all kinds make them raise all kinds
        raise UserError(
            f"{path}: no Vision Transformer for colour images in it (looked for patch_embed.proj.weight, "
            f"pos_embed and blocks.0.mlp.fc1.weight)"
        ) from None
    shape["heads"] = heads or layout.heads.get(shape["width"])
    if shape["heads"] is None:
        raise UserError(
            f"{path}: its file does not say how many heads a ViT of width {shape['width']} has; give --heads"
        )

    # Say what was found.
    print_rank0(
        f"{path}: {layout.name} layout, {len(weights)} tensors of the encoder, {len(found) - len(kept)} "
        f"others (heads, decoder) left aside"
    )
    if mean_pooled:
        print_rank0(
            f"{path}: fine-tuned with mean pooling; its fc_norm stands for norm, and fills a new LayerNorm"
        )

    # Name the method after the file. But only CAE's may be called "cae", because `Classifier` keeps its
    # positions fixed, and so does whoever opens the fine-tuned encoder.
    method = Path(path).stem
    if layout.name == "CAE":
        method = "cae"
    elif method.partition("-")[0] == "cae":
        method = f"published-{method}"
    known = {"method": method, "feature": "mean" if mean_pooled else layout.feature}
    return weights, shape, known, mean_pooled


def open_encoder(args):
    """--encoder -> (ViT at --image-size, info, fc_norm). info has method, feature, mean, std; fc_norm is the
    state dict of a LayerNorm for mean features, or None."""
    path, mean_pooled = args.encoder, False
    info = {"method": "random", "feature": "mean", "mean": list(MEAN), "std": list(STD)}
    flags = ("image_size", "patch_size", "size", "width", "depth", "heads")
    given = {flag: value for flag, value in vars(args).items() if flag in flags and value is not None}

    # "none" is a random encoder. Parsing an empty command line gives the sizes that were not given train.py's
    # defaults.
    if path == "none":
        sizes = argparse.ArgumentParser()
        add_size_args(sizes)
        sizes = sizes.parse_args([], argparse.Namespace(**given))
        resolve_sizes(sizes)
        encoder = build_encoder(sizes)
        print_rank0(
            f"encoder none: random weights, {encoder.width} wide, {sizes.depth} blocks, images of "
            f"{' x '.join(map(str, encoder.config['image_size']))} pixels, patches of {encoder.patch_size}; "
            f"--size, --image-size and --patch-size make it like another"
        )
    else:  # a file: our encoder.pt, or a published one
        state = load_file(path)
        if not isinstance(state, dict):
            raise UserError(f"{path}: holds no weights by name")
        if {"config", "state_dict"} <= state.keys():
            encoder, info = unpack_encoder(state, path)
            weights, shape = state["state_dict"], encoder.config
        else:
            weights, shape, known, mean_pooled = read_published(state, path, args.heads)
            info |= known
        encoder = load_at_size(weights, shape, given, path)
    if args.mean:
        info |= {"mean": args.mean, "std": args.std}
    return encoder, info, encoder.norm.state_dict() if mean_pooled else None


def load_at_size(weights, shape, given, path):
    """The ViT of a file, at the image size of --image-size, loaded strictly. given: the size flags that were
    given; all but the image size must be as in the file."""
    for flag in given.keys() - {"image_size"}:
        has = shape.get(flag, "a size of its own")
        if given[flag] != has:
            raise UserError(f"--{flag.replace('_', '-')} {given[flag]}: {path} has {has}; leave the flag out")
    size = given.get("image_size", shape["image_size"])
    encoder = ViT(**{**shape, "image_size": [size[0], size[-1]]})
    grid = [side // shape["patch_size"] for side in shape["image_size"]]
    try:
        positions = resize_positions(weights["pos_embed"], grid, encoder.grid)
        load_strictly(encoder, {**weights, "pos_embed": positions})
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: does not fit a ViT: {one_line(error, 250)}") from None
    return encoder


# ------------------------------------------------------------------------------------------------------------
# Labelled sets
# ------------------------------------------------------------------------------------------------------------
VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()


def voc_labels(dataset):
    """For each image 20 numbers, 1 for the classes that it shows, else 0. An object marked difficult does not
    count (Ericsson et al., CVPR 2021)."""
    labels = []
    for path in dataset.targets:
        objects = ElementTree.parse(path).iter("object")
        shown = {thing.findtext("name") for thing in objects if thing.findtext("difficult") != "1"}
        labels.append([float(name in shown) for name in VOC_CLASSES])
    return labels


class TransferSet(NamedTuple):
    """A set of MixedAE Table 2, and how torchvision opens it."""

    kind: str  # torchvision's class
    train: list  # the arguments that choose its training splits
    test: list  # and its test splits
    metric: str  # of the literature
    sizes: tuple  # how many training and test images there must be; with `lists`, how many lines these have
    by_hand: str = ""  # what must be done by hand
    lists: tuple = (None, None)  # text files that list the training and the test images, if splits do not
    names: Callable = None  # set -> the names of its samples, as these files have them
    labels: Callable = attrgetter("_labels")  # set -> labels
    classes: Callable = attrgetter("classes")  # set -> names of the classes


# The transfer sets of MixedAE Table 2, except CIFAR, which data.py opens.
SETS = {
    "aircraft": TransferSet("FGVCAircraft", ["trainval"], ["test"], "mean_per_class", (6667, 3333)),
    "caltech101": TransferSet(
        "Caltech101",
        [""],
        [""],
        "mean_per_class",
        (2416, 6728),
        by_hand="it has no official split: put train.txt and test.txt of Ericsson et al. (on GitHub "
        "linusericsson/ssl-transfer, caltech101-splits/) into caltech101/",
        lists=("caltech101/train.txt", "caltech101/test.txt"),
        names=lambda d: [f"{d.categories[y]}/image_{i:04d}.jpg" for y, i in zip(d.y, d.index)],
        labels=attrgetter("y"),
        classes=attrgetter("categories"),
    ),
    "cars": TransferSet(
        "StanfordCars",
        ["train"],
        ["test"],
        "top1",
        (8144, 8041),
        by_hand="its download is dead: put cars_train/, cars_test/, devkit/ and "
        "cars_test_annos_withlabels.mat into stanford_cars/",
        labels=lambda d: [y for _, y in d._samples],
    ),
    "dtd": TransferSet("DTD", ["train", "val"], ["test"], "top1", (3760, 1880)),
    "flowers": TransferSet("Flowers102", ["train", "val"], ["test"], "mean_per_class", (2040, 6149)),
    "food": TransferSet("Food101", ["train"], ["test"], "top1", (75750, 25250)),
    "pets": TransferSet("OxfordIIITPet", ["trainval"], ["test"], "mean_per_class", (3680, 3669)),
    "sun397": TransferSet(
        "SUN397",
        [""],
        [""],
        "top1",
        (19850, 19850),
        by_hand="its download is dead: put the folder SUN397/ with Training_01.txt and Testing_01.txt of its "
        "Partitions.zip there",
        lists=("SUN397/Training_01.txt", "SUN397/Testing_01.txt"),
        names=lambda d: [file.relative_to(d._data_dir).as_posix() for file in d._image_files],
    ),
    "voc2007": TransferSet(
        "VOCDetection",
        ["2007 trainval"],
        ["2007 test"],
        "map11",
        (5011, 4952),
        labels=voc_labels,
        classes=lambda d: VOC_CLASSES,
    ),
}


def choose_listed(dataset, names, path):
    """The samples of a set that a text file of paths lists -> (set, number of lines). names: for each sample
    its name as such files write it, without a slash in front."""
    place = {name: i for i, name in enumerate(names)}
    # A line is a path and, in Ericsson et al.'s lists, a label behind it. Torchvision leaves their class of
    # backgrounds out.
    lines = [line.split()[0].strip("/") for line in path.read_text().splitlines() if line.strip()]
    wanted = [line for line in lines if not line.startswith("BACKGROUND_Google/")]
    missing = [line for line in wanted if line not in place]
    if missing:
        raise ValueError(f"{len(missing)} images that {path} lists are not there, the first is {missing[0]}")
    return dataset.choose([place[line] for line in wanted]), len(lines)


def open_transfer_set(name, args):
    """A row of SETS -> (training set, test set), sizes checked."""
    row, root, sets = SETS[name], Path(args.data_root), []
    kind = getattr(torchvision.datasets, row.kind)
    try:
        for splits, path, size in zip((row.train, row.test), row.lists, row.sizes):
            # Open the split, which may consist of several of torchvision's or be chosen by a list of files.
            parts = [kind(root, *split.split(), download=args.download) for split in splits]
            labelled = [(part, row.labels(part)) for part in parts]
            dataset = LabeledDataset(labelled, row.classes(parts[0]))
            found = len(dataset)
            if path:
                dataset, found = choose_listed(dataset, row.names(parts[0]), root / path)

            # Check that it is whole.
            if found != size:
                raise ValueError(f"there are {found} images, not {size}; is it complete?")
            dataset[0]  # some sets notice only now that scipy or a file is missing
            sets.append(dataset)
    except Exception as error:  # each set and each server fails in its own way
        advice = row.by_hand or "add --download, which needs a network"
        advice = "pip install scipy" if "scipy" in str(error).lower() else advice
        raise UserError(
            f"--data {name}: {one_line(error, 250)} -- looked below {args.data_root} (--data-root); {advice}"
        ) from None
    return sets


def open_labelled(name, args):
    """A word of --data -> (training set, test set, metric)."""
    # Open a transfer set, or any other set. With --evaluate a folder without train/ and val/ is tested whole.
    if name in SETS:
        train_set, test_set = open_transfer_set(name, args)
        metric = SETS[name].metric
    else:
        metric = "top1"
        found, held_out = open_sets(replace_args(args, data=name))
        held_out = found if held_out is None and args.evaluate else held_out
        if not found.classes or held_out and not held_out.classes:
            raise UserError(
                f"--data {name}: has no labels; below train/ and val/ there must be one folder per class, "
                "and no image beside these folders"
            )
        if held_out is None:
            raise UserError(
                f"--data {name}: has no test images; put them into {name}/val or {name}/test, beside "
                f"{name}/train"
            )
        train_set, test_set = (
            LabeledDataset([(part, part.labels)], part.classes) for part in (found, held_out)
        )

    # Check that there is something to tell apart.
    differ = sorted(set(train_set.classes) ^ set(test_set.classes))
    if differ:
        raise UserError(
            f"--data {name}: training and test images have different classes, the first that differs is "
            f"{differ[0]}"
        )
    if len(train_set.classes) < 2:
        raise UserError(f"--data {name}: has one class only; nothing can be told apart")
    return fewer_labels(train_set, args), test_set, metric


def fewer_labels(train_set, args):
    """--label-fraction of each class's images, at least one, always the same ones for a seed."""
    if args.label_fraction == 1:
        return train_set
    labels = torch.tensor(train_set.labels)
    if labels.ndim > 1:
        raise UserError("--label-fraction: is for one label per image; leave it out for voc2007")
    order, chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(args.seed)), []
    for label in labels.unique():
        ids = order[labels[order] == label].tolist()
        chosen += ids[: max(1, round(args.label_fraction * len(ids)))]
    return train_set.choose(sorted(chosen))


def main(argv=None):
    """Parse, join the processes, then measure attention, evaluate finished runs, or make new ones."""

    def program(args, argv, device):
        if args.objects:
            return measure_objects(args, device)
        return evaluate(args, device) if args.evaluate else transfer(args, argv, device)

    run_program("finetune.py", argv, parse_args, program)


if __name__ == "__main__":
    main()
