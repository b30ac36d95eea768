"""What a pre-trained encoder is worth to a classifier: fine-tuning, linear and attentive probes, neighbours.

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

A protocol decides what is trained on top of the encoder:

    finetune    images -- encoder, all of it trained --> mean of the patch tokens (B, D)
                    -- new LayerNorm, linear --> logits (B, classes)
    linear      images -- encoder, frozen --> CLS or mean of the patch tokens (B, D)
                    -- BatchNorm without affine, linear --> logits
    attentive   images -- encoder, frozen --> patch tokens (B, L, D)
                    -- cross-attention of one learned query --> (B, D) -- BatchNorm, linear --> logits

Sources: MixedAE Sec. 4.2 (as MAE), MAE's code for fine-tuning and linear probing, CAE Sec. 5.2 and Appendix A
for attentive probing, MR-MAE Sec. 4.1. They differ from what stands here (ours, because libraries do it):
    - MixUp, CutMix and RandAugment are torchvision's. MixUp's partner is the neighbour in the batch (timm:
      the batch reversed); RandAugment, with timm's scale of 10, applies both operations always, with one
      magnitude, by bilinear interpolation (timm: each with probability .5, with magnitude noise .5,
      "increasing" operations, bicubic).
    - CAE's code fine-tunes with a learned relative position bias, which its paper does not mention; it is not
      here.
    - The random crop of the probes tries ten times for a crop that fits (the authors' draws once and clamps).
    - BatchNorm uses its running statistics at test time (CAE's code uses those of the test batch), and the
      linear probe's averages over all batches (MAE's code forgets, with momentum .1): see `Classifier`.
    - MixedAE does not say how Table 2 was trained; here it is fine-tuning as on ImageNet, VOC2007 with a
      binary cross-entropy a class.
    - best.pt is the epoch that is best on the test set, as MAE's code counts it: an optimistic number.
      results.json has the last epoch's too.
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
from collections import defaultdict, namedtuple
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
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
    broken_name,
    center_crop,
    collate,
    fixed_images,
    heat_map,
    load_batches,
    normalize,
    open_folder,
    open_sets,
    picture_sheet,
    train_transform,
)
from mrmae import from_official_mcmae
from train import (
    add_run_args,
    create_run,
    facts_of,
    first_phase,
    inference,
    load_checkpoint,
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
    find_weights,
    init_weights,
    load_file,
    load_strictly,
    natural_float,
    one_line,
    pack_encoder,
    print_rank0,
    read_shape,
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
    """A last layer, linear or of 1 x 1 convolutions, as the authors' code initialises it."""
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


class AttentiveHead(nn.Module):
    """CAE Sec. 5.2: one cross-attention of a learned query over the frozen patches; no MLP, no skip;
    BatchNorm without affine; linear.

    As in CAE's code the query starts at zero (so every patch counts the same at first), query, keys and
    values pass a LayerNorm each, and keys have no bias. CAE's code lets the class token in as a key; the
    paper says patches, and so do we.
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
    """An encoder and what its protocol trains: forward(inputs, targets) -> loss (), {} and logits(inputs) ->
    (B, classes).

    inputs: normalised images (B, 3, height, width), or with cached features what `features` returned for
    them. fc_norm: weights of the LayerNorm for mean features, from a fine-tuned file, or None.
    """

    def __init__(self, encoder, info, fc_norm, args, classes, multi_label):
        super().__init__()
        self.encoder = encoder
        self.multi_label = multi_label
        self.frozen = args.protocol != "finetune"
        D = encoder.width

        # Choose the feature: the flag's, else the one that the encoder's authors probe, and the mean to
        # fine-tune.
        feature = "patches"
        if args.protocol != "attentive":
            feature = args.feature or (info["feature"] if self.frozen else "mean")
        if feature == "cls" and not encoder.num_prefix_tokens:
            raise UserError("--feature cls: this encoder has no class token; use mean")
        self.info = {**info, "feature": feature}

        # Probe: freeze the encoder, train a head.
        self.fc_norm = nn.Identity()
        if self.frozen:
            encoder.requires_grad_(False)
        if args.protocol == "attentive":
            self.head = AttentiveHead(D, encoder.config["heads"], classes)  # CAE-B's 12 are its encoder's
        elif args.protocol == "linear":
            # eps: MAE's code. Its running mean forgets (momentum .1) and needs some fifty steps to forget its
            # start at zero. Frozen features do not move, so here it is the average of all batches (None),
            # right from the first.
            batch_norm = nn.BatchNorm1d(D, affine=False, eps=1e-6, momentum=None)
            self.head = nn.Sequential(batch_norm, init_linear(nn.Linear(D, classes)))

        # Fine-tune: train everything. MAE's code trains the position table too (after it was resized), CAE's
        # keeps it fixed.
        else:
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
        """A batch as it is loaded -> what the model is called with. Cached features are that already."""
        if images.ndim == 4:
            images = normalize(images, self.info["mean"], self.info["std"])
        return images, labels

    def features(self, images):
        """Normalised images (B, 3, height, width) -> (B, D), for the attentive protocol (B, L, D)."""
        tokens = self.encoder.encode(self.encoder.embed(images))  # (B, 1 + L, D); no graph if it is frozen
        if self.info["feature"] == "cls":
            return tokens[:, 0]
        patches = tokens[:, self.encoder.num_prefix_tokens :]
        return patches.mean(dim=1) if self.info["feature"] == "mean" else patches

    def logits(self, inputs):
        features = self.features(inputs) if inputs.ndim == 4 else inputs
        return self.head(self.fc_norm(features)).float()

    def forward(self, inputs, targets):
        """targets: classes (B,), or their probabilities (B, classes)."""
        logits = self.logits(inputs)
        loss = F.binary_cross_entropy_with_logits if self.multi_label else F.cross_entropy
        return loss(logits, targets), {}


# ------------------------------------------------------------------------------------------------------------
# Optimizers
# ------------------------------------------------------------------------------------------------------------
def layer_decay_groups(model, layer_decay, weight_decay):
    """Parameter groups of AdamW with layer-wise learning rates (MAE's code, after BEiT): the loop multiplies
    the rate of a group by its "lr_scale" = layer_decay^(depth + 1 - layer).

    Layer 0: class token, positions, patch embedding; layer i: block i; layer depth + 1: all that follows. No
    weight decay on one-dimensional parameters, positions and the class token.
    """
    depth, groups = len(model.encoder.blocks), {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
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
    """Layer-wise adaptive rate scaling (You et al.), as MAE's linear probe has it: a matrix's step, weight
    decay included, is scaled by trust |w| / |step|; vectors take plain steps with neither. The learning rate
    stands outside the momentum."""

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
                buffer = self.state[p].setdefault("mu", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(step)
                p.sub_(group["lr"] * buffer)


# Of each protocol: our absolute learning rate for a laptop, and where the schedule ends.
RATES = {
    "finetune": (1e-3, 1e-6),  # AdamW; the end: MAE's code
    "linear": (6.4, 0.0),  # LARS; both are MAE's code's, .1 x 16384 / 256
    "attentive": (0.1, 1e-6),  # SGD; the end: CAE's code
}


def build_optimizer(model, args):
    """AdamW with layer decay (MAE's code), LARS (MAE's code), or SGD with Nesterov momentum (CAE Appendix A,
    its code)."""
    if args.protocol == "finetune":
        groups = layer_decay_groups(model, args.layer_decay, args.weight_decay)
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)
    params = [p for p in model.parameters() if p.requires_grad]
    if args.protocol == "linear":
        return LARS(params, weight_decay=args.weight_decay)
    return torch.optim.SGD(params, lr=0.0, momentum=0.9, nesterov=True, weight_decay=args.weight_decay)


# ------------------------------------------------------------------------------------------------------------
# Augmentation of fine-tuning
# ------------------------------------------------------------------------------------------------------------
def fine_tuning_transform(args, mean):
    """Crop and flip as in pre-training (--augment), then RandAugment, on uint8 tensors."""
    magnitude = getattr(args, "randaugment", 0)  # the probes have none
    if not magnitude:
        return train_transform(args)
    augment = v2.RandAugment(  # of two operations, v2's default
        magnitude=magnitude,
        num_magnitude_bins=11,
        interpolation=v2.InterpolationMode.BILINEAR,
        fill=[int(255 * channel) for channel in mean],
    )
    return v2.Compose([train_transform(args), augment])


def erase(images, probability):
    """Random erasing: in each of the normalised images (B, C, height, width), with this probability, a random
    box is replaced by normal noise.

    As in torchvision's RandomErasing the box covers .02 to .33 of the image, and its height is .3 to 3.3
    times its width. torchvision takes one image at a time, which keeps a GPU waiting; here one `torch.where`
    erases the whole batch.
    """
    B, _, height, width = images.shape

    # Draw area and aspect, hence the sides; a side that is longer than the image's is cut.
    area = height * width * torch.empty(B).uniform_(0.02, 0.33)
    aspect = torch.empty(B).uniform_(math.log(0.3), math.log(3.3)).exp()
    h = (area * aspect).sqrt().round().clamp(max=height)
    w = (area / aspect).sqrt().round().clamp(max=width)

    # Draw where the box begins, and which images have one.
    top = (torch.rand(B) * (height - h + 1)).floor()
    left = (torch.rand(B) * (width - w + 1)).floor()
    chosen = torch.rand(B) < probability

    # Mark the rows and columns of the boxes; a pixel is inside if both of its own are.
    y, x = torch.arange(height), torch.arange(width)
    rows = (y >= top[:, None]) & (y < (top + h)[:, None]) & chosen[:, None]  # (B, height)
    columns = (x >= left[:, None]) & (x < (left + w)[:, None])  # (B, width)
    inside = (rows[:, None, :, None] & columns[:, None, None, :]).to(images.device)  # (B, 1, height, width)
    return torch.where(inside, torch.randn_like(images), images)


def augmented(images, labels, args, info, classes, multi_label):
    """A batch on the device -> normalised images, and targets (B, classes): random erasing, MixUp or CutMix,
    label smoothing."""
    # Erase after normalising, because the noise is that of normalised pixels.
    x = erase(normalize(images, info["mean"], info["std"]), args.erasing)

    # Mix; with both kinds a coin decides for each batch.
    targets = labels if multi_label else F.one_hot(labels, classes).float()  # (B, classes)
    kinds = [(v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)]
    mixers = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha]
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
    """(epoch, i) -> (image, whether it is broken, broken names) for testing: every sample counts once, so a
    broken image is shown black, and named.

    The transform is MAE's: 256 pixels for 224, then the centre. An image that has the size already stays as
    it is.
    """

    def __init__(self, dataset, image_size):
        self.image_size = image_size
        larger = [int(side * 256 / 224) if side <= 224 else side for side in image_size]
        super().__init__(dataset, v2.Compose([ResizeToCover(larger), v2.CenterCrop(self.image_size)]))

    def __getitem__(self, index):
        _, i = index
        try:
            image, _ = self.dataset[i]
        except Exception as error:  # bad files make PIL and torchvision raise all kinds
            black = torch.zeros(3, *self.image_size, dtype=torch.uint8)
            return black, True, [broken_name(self.dataset, i, error)]
        return image if list(image.shape[-2:]) == self.image_size else self.transform(image), False, []


class CachedFeatures(torch.utils.data.TensorDataset):
    """Features in place of images: (epoch, i) -> (feature, label, no broken names)."""

    def __getitem__(self, index):
        return *super().__getitem__(index[1]), []


def read_batches(dataset, chunks, args, device, consequence):
    """The given chunks (lists of indices) as batches (images, labels) on the device. Broken samples are
    named, with the consequence; more than 10 and more than 1 % of them stop the run."""
    broken, indices = BrokenImages(consequence), [[(0, i) for i in chunk] for chunk in chunks]
    stream = load_batches(dataset, indices, args.workers, device.type == "cuda")
    quiet = dist.get_rank() > 0
    for images, labels, names in tqdm(stream, "testing", len(chunks), leave=False, disable=quiet):
        broken.note(names)
        if len(broken.names) > max(10, 0.01 * len(dataset)):
            raise UserError(
                f"too many broken images: {len(broken.names)} of {len(dataset)}, the first is "
                f"{broken.names[0]}; repair or remove them",
                code=1,
            )
        yield (None, None) if images is None else to_device((images, labels), device)


def predict_dataset(function, dataset, args, device):
    """function(images of a batch) -> (b, ...), over a whole set that is shared out over the processes -> (N,
    ...) float32, in order, on every process. Every sample counts once, whatever the number of processes. With
    --predict the row of a broken image is NaN."""
    # Take every world-th chunk. A process without one looks at another's, to know the shape of a result.
    chunks, rank = torch.arange(len(dataset)).split(args.batch_size), dist.get_rank()
    mine = chunks[rank % len(chunks) :: dist.get_world_size()]
    out = None
    consequence = "it is left out" if args.predict or args.objects else "it counts as a black image"
    batches = read_batches(dataset, [chunk.tolist() for chunk in mine], args, device, consequence)
    for chunk, (images, broken) in zip(mine, batches):
        with inference(args, device):
            values = function(images).float()
        if args.predict:
            values[broken] = math.nan
        if out is None:
            out = torch.zeros(len(dataset), *values.shape[1:], device=device)
        if rank < len(chunks):
            out[chunk.to(device)] = values

    # Each row is filled by one process, so the sum is exact.
    dist.all_reduce(out)
    return out


def predict_logits(model, samples, args, device):
    """A classifier's scores (N, classes) of images or of cached features."""
    return predict_dataset(lambda images: model.logits(model.prepare(images)[0]), samples, args, device)


def cache_features(model, dataset, args, device):
    """Look at every image of a set once -> its features (N, D), for the attentive protocol (N, L, D), in
    place of images."""
    samples = EvalDataset(dataset, args.image_size)
    features = predict_dataset(lambda images: model.features(model.prepare(images)[0]), samples, args, device)
    return CachedFeatures(features.cpu(), torch.tensor(dataset.labels))


def confusion_matrix(predicted, labels, classes):
    """How often class i was taken for class j: (classes, classes)."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def average_precision_11(scores, positive):
    """VOC2007's: the mean over the recalls 0, .1, .., 1 of the best precision at that recall or a higher one.
    scores (N,), positive (N,)."""
    hits = positive[scores.argsort(descending=True, stable=True)].double()
    recall = hits.cumsum(0) / hits.sum().clamp(min=1)  # where there is nothing to find, the result is 0
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    levels = torch.arange(11, dtype=torch.float64) / 10 - 1e-9  # a recall of just .3 reaches the level .3
    return torch.stack([(precision * (recall >= level)).max() for level in levels]).mean()


def compute_metrics(scores, labels, metric):
    """scores (N, classes) and labels of the whole test set
    -> {metric: per cent}. Never an average of batches."""
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
    """The numbers of a test set, from its scores (N, classes). Rank 0, which has the folder, writes
    confusion.csv if an image has one label."""
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
    """What the model is called with, for DDP's first pass: the first and the last sample."""
    batch = collate([samples[0, i] for i in (0, len(samples) - 1)])
    return prepare(*to_device(BrokenImages().count(*batch), device))


def start_testing(model):
    """Eval mode, with the same buffers everywhere: since the last step each process has BatchNorm statistics
    of its own."""
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)
    model.eval()


def keep_best(run, value, content):
    """Write content() to best.pt if the test result is the best so far (MAE's code)."""
    if value >= run.state["best"]:
        run.state["best"] = value
        saved = {**content(), "epoch": run.state["step"] // run.batches.steps_per_epoch}
        if run.folder:
            run.folder.write("best.pt", lambda file: torch.save(saved, file))


# ------------------------------------------------------------------------------------------------------------
# One run
# ------------------------------------------------------------------------------------------------------------
@dataclass
class Task:
    """A classifier, and the samples that it is trained and tested on."""

    args: argparse.Namespace
    model: Classifier
    device: torch.device
    train_samples: TrainDataset | CachedFeatures
    test_samples: EvalDataset | CachedFeatures
    test_set: LabeledDataset
    metric: str  # chooses best.pt

    def measure(self, folder):
        """The numbers of the test set; see `report`."""
        start_testing(self.model)
        scores = predict_logits(self.model, self.test_samples, self.args, self.device)
        self.model.train()
        return report(folder, scores, self.test_set, self.metric)

    def test(self, run, epoch_ends):
        """For the loop: at an epoch's end the numbers of the test set, and best.pt."""
        if not epoch_ends:
            return {}
        numbers = self.measure(run.folder)
        keep_best(run, numbers[self.metric], self.finished)
        return numbers

    def results(self, folder):
        """What results.json holds. Rank 0 writes the other files of a finished run."""
        results = self.measure(folder)
        if folder and self.args.protocol == "finetune":
            folder.write("encoder.pt", lambda file: torch.save(self.export(), file))
        if folder and self.args.protocol == "attentive":
            self.show_attention(folder)
        if self.model.multi_label or not isinstance(self.train_samples, CachedFeatures):
            return results

        # With cached features the nearest neighbours cost nothing more. Of patches they compare the means.
        (seen, known), (unseen, labels) = self.train_samples.tensors, self.test_samples.tensors
        seen, unseen = (x.view(len(x), -1, x.shape[-1]).mean(dim=1).to(self.device) for x in (seen, unseen))
        votes = nearest_neighbours(seen, known, unseen, len(self.test_set.classes))
        return {**results, f"knn_{self.metric}": compute_metrics(votes, labels, self.metric)[self.metric]}

    def finished(self):
        """What best.pt holds: all that --evaluate needs."""
        return {
            "model": self.model.state_dict(),
            "config": self.model.encoder.config,
            "info": self.model.info,
            "args": vars(self.args),
            "classes": list(self.test_set.classes),
            "metric": self.metric,
        }

    def export(self):
        """encoder.pt of a fine-tuned encoder, to probe or to mimic (MR-MAE). The LayerNorm of mean features
        stands for its final norm."""
        encoder, info = copy.deepcopy(self.model.encoder), self.model.info
        if info["feature"] == "mean":
            encoder.norm = self.model.fc_norm
        method = f"{info['method']}-finetune"
        return pack_encoder(encoder, method, info["feature"], info["mean"], info["std"])

    @torch.no_grad()
    def show_attention(self, folder):
        """pictures/attention.png: where the learned query looks (CAE Fig. 5), heads averaged, on eight test
        images."""
        model, attention = self.model.eval(), self.model.head.attn
        images, _ = fixed_images(self.test_set, self.args.image_size, 8)
        attention.record = True
        model.logits(model.prepare(images.to(self.device))[0])
        maps = attention.recorded.float().mean(dim=1).unflatten(-1, model.encoder.grid)  # (8, 1, h, w)
        panels = {"image": images / 255, "attention of\nthe query": heat_map(maps[:, 0].cpu(), images)}
        folder.write_picture("attention.png", picture_sheet(panels))


def write_confusion(folder, matrix, classes):
    """confusion.csv, rows the true classes. matrix: see `confusion_matrix`."""
    rows = [[name, *row] for name, row in zip(classes, matrix.tolist())]
    write_csv(folder, "confusion.csv", [["true \\ predicted", *classes], *rows])


def write_numbers(folder, said, results):
    """results.json, and a line that shows it."""
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
    # Build the classifier. A run that goes on caches the features of its own encoder, whatever lies at
    # --encoder now.
    torch.manual_seed(args.seed)
    model = Classifier(*opened, args, len(test_set.classes), metric == "map11").to(device)
    checkpoint = Path(args.out, "checkpoint.pt")
    if checkpoint.exists():
        given = copy.deepcopy(model.encoder.state_dict())
        with contextlib.suppress(RuntimeError, ValueError):  # `resume` will say why it does not fit
            load_strictly(model, load_checkpoint(checkpoint, args)["model"])
        same = all(value.equal(given[name]) for name, value in model.encoder.state_dict().items())
        if model.frozen and not same:
            print_rank0(
                f"note: {args.encoder} has other weights than when {args.out} began; it goes on with its "
                f"own, and another --out would take the new ones"
            )

    # Choose what is trained on: features, images cropped and flipped, or images augmented in all ways.
    prepare = model.prepare
    folder = None
    if model.frozen and args.cache_features:
        # Take the run's folder before the long work, not after it.
        folder = RunFolder(args.out) if dist.get_rank() == 0 else None
        model.eval()
        train_samples = cache_features(model, train_set, args, device)
        test_samples = cache_features(model, test_set, args, device)
        args.workers = 0  # there is nothing left to load
    else:
        transform = fine_tuning_transform(args, model.info["mean"])
        train_samples = TrainDataset(train_set, transform, args.seed)
        test_samples = EvalDataset(test_set, args.image_size)
    if not model.frozen:
        about_set = {"classes": len(test_set.classes), "multi_label": model.multi_label}
        prepare = partial(augmented, args=args, info=model.info, **about_set)
    task = Task(args, model, device, train_samples, test_samples, test_set, metric)

    # Make the run, or go on with it.
    optimizer = build_optimizer(model.train(), args)
    laptop_lr, min_lr = RATES[args.protocol]
    run = create_run(
        args,
        device,
        model,
        optimizer,
        example_of(train_samples, prepare, device),
        facts_of(train_set),
        laptop_lr,
        min_lr=min_lr,
        schedule=lr_at,
        prepare=prepare,
        export=dict,
        folder=folder,
    )
    header = (
        f"{args.protocol} of {args.encoder} on {args.data}: {len(train_set)} training and {len(test_set)} "
        f"test images, {len(train_set.classes)} classes, {metric}; features: {model.info['feature']}"
    )
    return run_task(run, argv, header, train_samples, task)


def run_task(run, argv, header, dataset, task):
    """Train, then test once more -> (exit code, what results.json holds or, of a run that is not at its end,
    None). task: has test(run, epoch_ends), results(folder) and metric, as `Task`."""
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
    """Train and test on one set after the other; several make a row as in MixedAE Table 2 -> exit code."""
    if args.batch_size < 2:
        raise UserError("--batch-size 1: BatchNorm needs at least 2 images; use 2 or more")

    # Open the encoder and all sets, to find out what is missing before hours of work. Every process starts
    # from the same random encoder, if it is one.
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
    return code


# ------------------------------------------------------------------------------------------------------------
# --evaluate, --predict
# ------------------------------------------------------------------------------------------------------------
def load_finished(path, args, device, build):
    """A run folder or its best.pt -> (model in eval mode, the whole file). build(encoder, saved, args) makes
    the model of the file's encoder, content and flags. args: of this call, in which the flags of a model may
    only repeat what the run has."""
    file = Path(path) / "best.pt" if Path(path).is_dir() else Path(path)
    saved = load_file(file)
    try:
        check_statistics(saved["info"])
        model = build(ViT(**saved["config"]), saved, argparse.Namespace(**saved["args"]))
        load_strictly(model, saved["model"])
    except Exception as error:  # a damaged or foreign file makes them raise all kinds
        raise UserError(f"{file}: not a best.pt of this program ({one_line(error)})") from None

    # Refuse what the run does otherwise.
    own = {**saved["config"], **saved["info"]}
    for flag in ("image_size", "patch_size", "width", "depth", "heads", "mean", "std", "feature"):
        value = getattr(args, flag, None)
        if flag == "image_size" and value:
            value = [value[0], value[-1]]
        if value not in (None, own.get(flag)):
            flag = flag.replace("_", "-")
            raise UserError(f"--{flag} {value}: {file} has {own.get(flag)}; leave the flag out")

    # Say what it is: its own test set chose it, so its number there is too good.
    last = "beside it lies no results.json, so the run is not finished"
    with contextlib.suppress(OSError, ValueError, KeyError):
        results = json.loads((file.parent / "results.json").read_text())
        results[f"best_{saved['metric']}"]  # --evaluate writes none
        last = f"after the last epoch it was {results[saved['metric']]:.2f}"
    print_rank0(
        f"{file}: epoch {saved.get('epoch', 'unknown')} of {saved['args']['epochs']}, the best of its run by "
        f"{saved['metric']} on its own test set; {last}"
    )
    return model.to(device).eval(), saved


def evaluate(args, device):
    """--evaluate: one classifier, or the ensemble of several (MR-MAE Table 4: their probabilities are
    averaged), on --data, else on its own test set; with --predict the classes of a folder's images, or of one
    image."""

    def build(encoder, saved, run_args):
        classes, multi_label = saved["classes"], saved["metric"] == "map11"
        return Classifier(encoder, saved["info"], None, run_args, len(classes), multi_label)

    # Load the runs.
    models, runs = zip(*[load_finished(path, args, device, build) for path in args.evaluate])
    own, metric = runs[0]["args"], runs[0]["metric"]

    # Open the images. Without --data they are those of the first run, and lie where they lay then.
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

    # Average the probabilities, each model's on images of its own size.
    p = 0
    for model in models:
        samples = EvalDataset(dataset, model.encoder.config["image_size"])
        logits = predict_logits(model, samples, args, device)
        p = p + (logits.sigmoid() if model.multi_label else logits.softmax(dim=1)) / len(models)
    if dist.get_rank() > 0:
        return 0

    # Write the numbers, or the classes: of many labels an image the best, and what is likelier than not. A
    # file that cannot be read has none.
    folder = RunFolder(args.out or "runs/evaluate")
    if not args.predict:
        write_numbers(folder, f"{' + '.join(args.evaluate)} on {name}", report(folder, p, dataset, metric))
        return 0
    read = ~p[:, :1].isnan()  # (N, 1)
    if not read.any():
        raise UserError(f"--predict {args.predict}: none of its {len(p)} images can be read")
    shown = F.one_hot(p.argmax(dim=1), len(dataset.classes)).bool() | ((p >= 0.5) & (metric == "map11"))
    shown &= read
    rows = [[files.paths[i], dataset.classes[c], f"{p[i, c]:.6f}"] for i, c in shown.nonzero().tolist()]
    write_csv(folder, "predictions.csv", [["file", "class", "probability"], *rows])
    print_rank0(f"{folder.path / 'predictions.csv'}: {read.sum()} images; {(~read).sum()} broken, left out")
    return 0


# ------------------------------------------------------------------------------------------------------------
# --objects: does an encoder look at the objects? MixedAE Sec. 3.4 and Fig. 5, in numbers and as a picture
# ------------------------------------------------------------------------------------------------------------
SMALL = 0.4  # ours: an object that covers less of its image than this; a larger one is hard to miss


class BoxedImages(TrainDataset):
    """(epoch, i) -> (image and, as a fourth channel, which pixels lie in its box (255, else 0), -1, broken
    names). A broken image has an empty box, which leaves it out of every mean."""

    def __init__(self, dataset, boxes, image_size):
        super().__init__(dataset, center_crop(image_size))
        self.boxes = boxes  # of each sample, a list of [x0, y0, x1, y1] in pixels, ends included
        self.image_size = image_size

    def __getitem__(self, index):
        _, i = index
        try:
            image, _ = self.dataset[i]
        except Exception as error:  # bad files make PIL and torchvision raise all kinds
            empty = torch.zeros(4, *self.image_size, dtype=torch.uint8)
            return empty, -1, [broken_name(self.dataset, i, error)]

        # Draw the box, then resize and crop it together with the image.
        mask = torch.zeros_like(image[:1])
        for x0, y0, x1, y1 in self.boxes[i]:
            mask[:, y0 : y1 + 1, x0 : x1 + 1] = 255
        return self.transform(torch.cat([image, mask])), -1, []  # uint8 (4, height, width)


def read_boxes(path, dataset, folder):
    """A table with the columns file (relative to the set's folder), x0, y0, x1, y1 (pixels, ends included);
    several rows of a file count as one object -> for each sample of the set a list of boxes, which is empty
    if the table has none."""
    boxes = defaultdict(list)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if not {"file", "x0", "y0", "x1", "y1"} <= set(rows.fieldnames or ()):
                raise ValueError(f"its columns are {rows.fieldnames}")
            for row in rows:
                box = [int(row[corner]) for corner in ("x0", "y0", "x1", "y1")]
                x0, y0, x1, y1 = box
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


def patch_attention(encoder, images):
    """The attention of the last block on normalised images (B, 3, height, width), mean over heads, with the
    patches alone as keys -> (B, N, L), each row with the sum 1. Query 0 is CLS, if the encoder has one."""
    attention = encoder.features(images, attention=True)["attention"]  # (B, H, N, N)
    attention = attention.float().mean(dim=1)[:, :, encoder.num_prefix_tokens :]  # (B, N, L)
    return attention / attention.sum(dim=2, keepdim=True)


def patch_areas(boxed, grid):
    """Samples of `BoxedImages` (B, 4, height, width) -> how much of each patch the box covers, (B, L)."""
    return F.adaptive_avg_pool2d((boxed[:, 3] > 127).float(), grid).flatten(1)


def object_shares(attention, areas):
    """attention (B, N, L) of `patch_attention`, areas (B, L) of `patch_areas` -> (B, 3): the share of the
    image that the object covers, the share of the attention of CLS that falls on it, and the same for the
    patches that lie wholly in it, on average. NaN where there is no CLS or no such patch. An encoder that
    looks everywhere alike has three equal shares."""
    share = (attention * areas.unsqueeze(1)).sum(dim=2)  # of each query's attention, (B, N)
    prefix = attention.shape[1] - attention.shape[2]
    of_cls = share[:, 0] if prefix else torch.full_like(share[:, 0], math.nan)
    inside = (areas == 1).float()  # (B, L)
    of_patches = (share[:, prefix:] * inside).sum(dim=1) / inside.sum(dim=1)
    return torch.stack([areas.mean(dim=1), of_cls, of_patches], dim=1)


def average_shares(shares):
    """shares (images, 3) of `object_shares` -> their means over all images, and over those with a small
    object, as results.json has them. The smallest objects hold no whole patch and are missing in "patches";
    "patches_area" is the area of the others, which is what even attention of patches would give."""
    area, numbers = shares[:, 0], {}
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


def measure_objects(args, device):
    """--objects: the same held-out images for every encoder, at the encoder's own image size; nothing is
    trained -> exit code. results.json has what `average_shares` says of each encoder; pictures/objects.png
    shows what `object_panels` draws, on eight images, those with a small object first."""
    # Open the encoders, the images and their boxes.
    opened = {}
    for path in args.encoder:
        torch.manual_seed(args.seed)
        opened[path] = open_encoder(replace_args(args, encoder=path))
    folder = args.data[0]
    train_set, val_set = open_sets(replace_args(args, data=folder))
    dataset = train_set if val_set is None else val_set
    table = args.objects if Path(args.objects).exists() else Path(folder, args.objects)
    boxes = read_boxes(table, dataset, folder)

    results, panels, ids = {}, {}, None
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    for number, (path, (encoder, info, _)) in enumerate(opened.items(), start=1):
        encoder.to(device).eval()

        def look(boxed):
            images = normalize(boxed[:, :3], info["mean"], info["std"])
            return patch_attention(encoder, images), patch_areas(boxed, encoder.grid)

        # Measure the shares of all images.
        samples = BoxedImages(dataset, boxes, encoder.config["image_size"])
        shares = predict_dataset(lambda boxed: object_shares(*look(boxed)), samples, args, device).cpu()
        results[path] = average_shares(shares)
        print_rank0(f"{path}: {results[path]}")

        # Choose the images to draw, for all encoders the same.
        if ids is None:
            small = (shares[order, 0] > 0) & (shares[order, 0] < SMALL)
            ids = torch.cat([order[small], order[~small]])[:8].tolist()
            print_rank0(f"{int((shares[:, 0] > 0).sum())} of {len(dataset)} images count")

        # Draw its maps beside the images, in which all but the box is darkened.
        boxed, _, _ = collate([samples[0, i] for i in ids])  # (b, 4, height, width)
        panels.setdefault("image, box", boxed[:, :3] / 255 * (0.3 + 0.7 * (boxed[:, 3:] > 127)))
        with torch.no_grad():
            attention, areas = look(boxed.to(device))
        name = Path(path).resolve().parent.name if Path(path).name == "encoder.pt" else Path(path).stem
        for title, maps in object_panels(encoder, attention.cpu(), areas.cpu(), panels["image, box"]).items():
            panels[f"{number} {name[:18]}\n{title}"] = maps

    # Write.
    if dist.get_rank() == 0:
        out = RunFolder(args.out or "runs/objects")
        out.write_text("results.json", json.dumps(results, indent=1))
        out.write_picture("objects.png", picture_sheet(panels))
        print_rank0(f"{out.path}: results.json, pictures/objects.png")
    return 0


# ============================================================================================================
# A first reading may stop here. What follows: flags, encoders of every layout, the sets of MixedAE Table 2.
# ============================================================================================================
# What differs between protocols. Batches are ours, for a laptop, and fine-tuning's epochs; the papers' are in
# docs.
PROBE = dict(epochs=90, batch_size=256, weight_decay=0.0)  # MAE's code, and CAE's
DEFAULTS = {
    "finetune": dict(epochs=10, batch_size=64, weight_decay=0.05),  # MAE's code
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
        help="an encoder.pt, a published file, or none: random weights",
    )
    add("--evaluate", nargs="+", metavar="RUN", help="evaluate these finished runs, and stop")
    add(
        "--predict",
        metavar="FOLDER",
        help="with --evaluate: what is found in the images of this folder (finetune.py: or in this image)",
    )
    add(
        "--mean",
        type=unit_float,
        nargs=3,
        metavar=("R", "G", "B"),
        help="what images are normalised with [as encoder.pt "
        "says; published files: ImageNet's, but timm's augreg files want .5 .5 .5]",
    )
    add(
        "--std",
        type=bounded(float, 1e-3, 1),
        nargs=3,
        metavar=("R", "G", "B"),
        help="the same, the deviation",
    )


def parse_args(argv=None):
    """Flags -> args. Two phases, --protocol first, because each protocol has flags and defaults of its
    own."""
    argv = sys.argv[1:] if argv is None else list(argv)
    what = "what is trained on top of the encoder"
    protocol, parser = first_phase("finetune.py", "protocol", DEFAULTS, "linear", what, argv)

    # Collect its flags.
    add_encoder_args(parser, nargs="+")
    parser.add_argument(
        "--objects",
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
            help="the class token or the mean of the patch tokens [finetune: mean; "
            "linear: as the encoder's authors]",
        )
    if protocol == "finetune":
        add_finetune_args(add)
    else:
        add(
            "--cache-features",
            action="store_true",
            help="compute the features once, of the whole image: no augmentation, "
            "but seconds instead of minutes. In memory: attentive, ViT-B at 224 pixels, .6 MB an image; else "
            "3 kB",
        )
    defaults = DEFAULTS[protocol]
    parser.set_defaults(
        image_size=None,
        patch_size=None,
        size=None,
        crop_scale=[0.08, 1.0],  # MAE's code, and CAE's
        **{**defaults, "batch_size": share_of_batch(defaults["batch_size"], multiple=2)},
    )

    # Parse, and check what takes more than one flag.
    args = parser.parse_args(argv)
    resolve_warmup(args, WARMUP[protocol])
    args.data = args.data or ([] if args.evaluate else ["shapes"])

    # --objects compares encoders on one folder; everything else takes one encoder.
    args.encoder = [args.encoder] if isinstance(args.encoder, str) else args.encoder
    check_encoder_args(parser, args)
    if args.objects == "" or args.objects and args.evaluate:
        parser.error("--objects: wants a table of boxes, and goes without --evaluate")
    if args.objects and (len(args.data) > 1 or args.data[0] in (*NAMES, *SETS)):
        parser.error(f"--objects: takes one folder, not --data {' '.join(args.data)}")
    if not args.objects and len(args.encoder) > 1:
        parser.error(f"--encoder {' '.join(args.encoder)}: one encoder a run, unless --objects compares them")
    if not args.objects:
        args.encoder = args.encoder[0]
    if args.evaluate and len(args.data) > 1:
        parser.error(f"--evaluate: one set at a time, not --data {' '.join(args.data)}")
    if len({Path(name).name for name in args.data}) < len(args.data):
        parser.error(
            f"--data {' '.join(args.data)}: two of the same name would share a folder; give them one by one, "
            f"each with its --out"
        )
    return args


def add_finetune_args(add):
    """Numbers of MAE's code for ViT-B at 224 pixels, which MixedAE Sec. 4.2 follows; CAE's (Appendix A) are
    the same."""
    add(
        "--layer-decay",
        type=bounded(float, 1e-6, 1),
        default=0.65,
        help="each layer below the head learns at this much of the rate above it",
    )
    add(
        "--drop-path",
        type=bounded(float, 0, 0.99),
        default=0.1,
        help="stochastic depth of the last block, rising linearly from 0 in the first",
    )
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
    if args.predict == "" or args.predict and not args.evaluate:
        parser.error(f"--predict {args.predict}: goes with --evaluate RUN, and names images")
    if (args.mean is None) != (args.std is None):
        parser.error("--mean and --std: give both")
    if args.evaluate and args.image_size == parser.get_default("image_size"):
        args.image_size = None  # the run's own
    if args.image_size and len(args.image_size) > 2:
        parser.error(f"--image-size takes one number or two (height width), not {len(args.image_size)}")


# ------------------------------------------------------------------------------------------------------------
# Encoders
# ------------------------------------------------------------------------------------------------------------
# Published layouts: how to know one by its names; what turns these into the names of our ViT; the feature
# that its authors probe; heads by width, which no state dict shows. The first that fits is taken.
Layout = namedtuple("Layout", "name sign convert feature heads")
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
LAYOUTS = (
    Layout("CAE", "blocks.0.attn.q_bias", cae.from_official, "cls", {**HEADS, 384: 12}),
    Layout("MCMAE", "blocks3.0.norm1.weight", from_official_mcmae, "mean", HEADS),
    Layout("MAE, DINO or timm", "pos_embed", dict, "cls", HEADS),
)
# What is no part of an encoder, by the names of the layouts.
LEFT_ASIDE = (
    "head",
    "fc_norm",
    "pre_logits",
    "decoder",
    "mask_token",
    "lm_head",
    "regresser",
    "pretext_neck",
    "encoder_to_",
    "rd_pos_embed",
    "stage",
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

        # Let the LayerNorm of mean features stand for the last one, and leave aside what is no encoder.
        mean_pooled = "fc_norm.weight" in found and "norm.weight" not in found
        if mean_pooled:
            found = rename(found, [(r"^fc_norm\.", "norm.")])
        kept = {name: value for name, value in found.items() if not name.startswith(LEFT_ASIDE)}

        # Read the shape of the ViT off them.
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
    known = {
        "method": "cae" if layout.name == "CAE" else Path(path).stem,
        "feature": "mean" if mean_pooled else layout.feature,
    }
    return weights, shape, known, mean_pooled


def open_encoder(args):
    """--encoder -> (ViT at --image-size, info, weights of a LayerNorm for mean features or None). info has
    method, feature, mean, std."""
    path, mean_pooled = args.encoder, False
    info = {"method": "random", "feature": "mean", "mean": list(MEAN), "std": list(STD)}
    flags = ("image_size", "patch_size", "size", "width", "depth", "heads")
    given = {flag: value for flag, value in vars(args).items() if flag in flags and value is not None}

    # Make a random encoder, as train.py would start from; or read our own file, or a published one.
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
    else:
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
    """The ViT of a file, at the image size that is asked for, loaded strictly. given: the size flags that
    were given."""
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
    """Which classes an image shows, (20,) each; an object marked difficult does not count (Ericsson et al.,
    CVPR 2021)."""
    labels = []
    for path in dataset.targets:
        objects = ElementTree.parse(path).iter("object")
        shown = {thing.findtext("name") for thing in objects if thing.findtext("difficult") != "1"}
        labels.append([float(name in shown) for name in VOC_CLASSES])
    return labels


# The transfer sets of MixedAE Table 2 but for CIFAR, which data.py opens: torchvision's class; arguments that
# choose its training splits and its test splits; the metric of the literature; sizes; what to do by hand. If
# files list what is trained and tested on: these, and a function that gives the names of all samples as the
# files have them. Then functions that give labels and classes.
Row = namedtuple(
    "Row",
    "kind train test metric sizes by_hand lists names labels classes",
    defaults=["", (None, None), None, attrgetter("_labels"), attrgetter("classes")],
)
SETS = {
    "aircraft": Row("FGVCAircraft", ["trainval"], ["test"], "mean_per_class", (6667, 3333)),
    "caltech101": Row(
        "Caltech101",
        [""],
        [""],
        "mean_per_class",
        (2416, 6728),
        "it has no official split: put Ericsson et al.'s lists of lines like "
        "accordion/image_0001.jpg into caltech101/train.txt and caltech101/test.txt",
        ("caltech101/train.txt", "caltech101/test.txt"),
        lambda d: [f"{d.categories[y]}/image_{i:04d}.jpg" for y, i in zip(d.y, d.index)],
        attrgetter("y"),
        attrgetter("categories"),
    ),
    "cars": Row(
        "StanfordCars",
        ["train"],
        ["test"],
        "top1",
        (8144, 8041),
        "its download is dead: put cars_train/, cars_test/, devkit/ and cars_test_annos_withlabels.mat into "
        "stanford_cars/",
        labels=lambda d: [y for _, y in d._samples],
    ),
    "dtd": Row("DTD", ["train", "val"], ["test"], "top1", (3760, 1880)),
    "flowers": Row("Flowers102", ["train", "val"], ["test"], "mean_per_class", (2040, 6149)),
    "food": Row("Food101", ["train"], ["test"], "top1", (75750, 25250)),
    "pets": Row("OxfordIIITPet", ["trainval"], ["test"], "mean_per_class", (3680, 3669)),
    "sun397": Row(
        "SUN397",
        [""],
        [""],
        "top1",
        (19850, 19850),
        "its download is dead: put the folder SUN397/ with Training_01.txt and Testing_01.txt of its "
        "Partitions.zip there",
        ("SUN397/Training_01.txt", "SUN397/Testing_01.txt"),
        lambda d: [file.relative_to(d._data_dir).as_posix() for file in d._image_files],
    ),
    "voc2007": Row(
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
    """The samples of a set that a text file of paths lists -> (set, number of lines). names: of all samples,
    as such files have them, but for a slash in front."""
    place = {name: i for i, name in enumerate(names)}
    lines = [line.strip("/") for line in path.read_text().split()]
    wanted = [line for line in lines if not line.startswith("BACKGROUND_Google/")]  # torchvision has it not
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
            dataset[0]  # some sets find out only here that scipy or a file is missing
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
    # Open a transfer set, or any other set; to evaluate, a folder without a split is tested whole.
    if name in SETS:
        train_set, test_set = open_transfer_set(name, args)
        metric = SETS[name].metric
    else:
        metric = "top1"
        found, held_out = open_sets(replace_args(args, data=name))
        held_out = found if held_out is None and args.evaluate else held_out
        if not found.classes or held_out and not held_out.classes:
            raise UserError(
                f"--data {name}: has no labels; a labelled folder has one folder a class below train/ and "
                "val/"
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
        raise UserError("--label-fraction: is for one label an image; leave it out for voc2007")
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
