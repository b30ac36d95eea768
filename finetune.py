"""What a pre-trained encoder is worth to a classifier: fine-tuning, linear and attentive probing, nearest
neighbours.

Reading order of the project: vit -> mrmae -> mixedae -> cae -> data -> train -> **finetune** -> dense.

    python finetune.py --encoder runs/mixedae/encoder.pt --protocol linear --cache-features     # a probe on
    `shapes`
    python finetune.py --encoder none --protocol linear --cache-features                        # its baseline
    python finetune.py --encoder mae_pretrain_vit_base.pth --protocol finetune --data path/to/imagenet
    python finetune.py --encoder ... --protocol finetune --data aircraft cars pets              # a row of a
    table
    python finetune.py --evaluate runs/a runs/b --data ...                                      # as an
    ensemble python finetune.py --evaluate runs/a --predict path/to/images

A protocol decides what is trained on top of the encoder:

    finetune    images -- encoder, all of it trained --> mean of the patch tokens (B, D)
                    -- new LayerNorm, linear --> logits (B, classes)
    linear      images -- encoder, frozen --> CLS or mean of the patch tokens (B, D)
                    -- BatchNorm without affine, linear --> logits
    attentive   images -- encoder, frozen --> patch tokens (B, L, D)
                    -- cross-attention of one learned query --> (B, D) -- BatchNorm, linear --> logits

Sources: MixedAE Sec. 4.2 (as MAE), MAE's code for fine-tuning and linear probing, CAE Sec. 5.2 and Appendix A
for attentive probing, MR-MAE Sec. 4.1. Where they differ from what stands here (ours, because libraries do
it):
    - MixUp, CutMix and RandAugment are torchvision's. MixUp's partner is the neighbour in the batch (timm:
      the batch reversed); RandAugment, with timm's scale of 10, applies both operations always, with one
      magnitude, by bilinear interpolation (timm: each with probability .5, with magnitude noise .5,
      "increasing" operations, bicubic).
    - CAE's code fine-tunes with a learned relative position bias, which its paper does not mention; it is not
      here.
    - The random crop of the probes tries ten times for a crop that fits (the authors' draw once and clamp
      it).
    - BatchNorm uses its running statistics at test time (CAE's code uses those of the test batch), and the
      linear probe's averages over all batches (MAE's code forgets, with momentum .1): see `Classifier`.
    - MixedAE does not say how Table 2 was trained; here it is fine-tuning as on ImageNet, VOC2007 with a
      binary cross-entropy a class.
    - best.pt is the epoch that is best on the test set, as MAE's code counts it: an optimistic number.
      results.json has the last epoch's too.
"""

import argparse
import csv
import io
import json
import sys
import xml.etree.ElementTree
from collections import namedtuple
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.datasets
from torch import nn
from torchvision.transforms import v2
from tqdm import tqdm

import cae
import train
from data import (
    MEAN,
    NAMES,
    STD,
    BrokenImages,
    LabeledDataset,
    ResizeToCover,
    RunFolder,
    TrainDataset,
    add_data_args,
    collate,
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
    Parser,
    add_run_args,
    create_run,
    facts_of,
    inference,
    load_checkpoint,
    local_rank0_first,
    lr_at,
    run_loop,
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
    init_weights,
    load_file,
    natural_float,
    one_line,
    pack_encoder,
    print_rank0,
    read_shape,
    resize_positions,
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
    """An encoder and what its protocol trains. forward(inputs, targets) -> loss (), {}; logits(inputs) -> (B,
    classes).

    inputs: normalised images (B, 3, height, width), or with cached features what `features` returned for
    them.
    fc_norm: weights of the LayerNorm for mean features, from a fine-tuned file, or None.
    """

    def __init__(self, encoder, info, fc_norm, args, classes, multi_label):
        super().__init__()
        self.encoder = encoder
        self.multi_label = multi_label
        self.frozen = args.protocol != "finetune"
        D = encoder.width

        # Choose the feature: the flag's, else the one that the encoder's authors probe, and the mean to
        # fine-tune.
        self.feature = "patches"
        if args.protocol != "attentive":
            self.feature = args.feature or (info["feature"] if self.frozen else "mean")
        if self.feature == "cls" and not encoder.num_prefix_tokens:
            raise UserError("--feature cls: this encoder has no class token; use mean")

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

        # Fine-tune: train everything, positions too (MAE's code: after they were resized).
        else:
            encoder.pos_embed.requires_grad_(True)
            set_drop_paths(encoder, args.drop_path)
            if self.feature == "mean":
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

    def features(self, images):
        """Normalised images (B, 3, height, width) -> (B, D), for the attentive protocol (B, L, D)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            tokens = self.encoder.encode(self.encoder.embed(images))  # (B, 1 + L, D)
        if self.feature == "cls":
            return tokens[:, 0]
        patches = tokens[:, self.encoder.num_prefix_tokens :]
        return patches.mean(dim=1) if self.feature == "mean" else patches

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
                if p.grad is None:
                    continue
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
    if not args.randaugment:
        return train_transform(args)
    fill = [int(255 * channel) for channel in mean]
    augment = v2.RandAugment(
        num_ops=2,
        magnitude=args.randaugment,
        num_magnitude_bins=11,
        fill=fill,
        interpolation=v2.InterpolationMode.BILINEAR,
    )
    return v2.Compose([train_transform(args), augment])


def augmented(images, labels, args, info, classes, multi_label):
    """A batch on the device -> normalised images, and targets (B, classes): random erasing image by image,
    MixUp or CutMix, label smoothing."""
    # Erase boxes, with normal noise, so after normalising.
    x = normalize(images, info["mean"], info["std"])
    erase = v2.RandomErasing(p=args.erasing, value="random")
    x = torch.stack([erase(image) for image in x])

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
class EvalDataset(torch.utils.data.Dataset):
    """(epoch, i) -> (image, label, broken names) for testing: every sample counts once, so a broken image is
    shown black, and named.

    The transform is MAE's: 256 pixels for 224, then the centre. An image that has the size already stays as
    it is.
    """

    def __init__(self, dataset, image_size):
        self.dataset = dataset
        self.image_size = list(image_size)
        larger = [int(side * 256 / 224) if side <= 224 else side for side in image_size]
        self.crop = v2.Compose([ResizeToCover(larger), v2.CenterCrop(self.image_size)])

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        _, i = index
        try:
            image, label = self.dataset[i]
        except Exception:  # bad files make PIL and torchvision raise all kinds
            black = torch.zeros(3, *self.image_size, dtype=torch.uint8)
            return black, self.dataset.label(i), [self.dataset.name(i)]
        return image if list(image.shape[-2:]) == self.image_size else self.crop(image), label, []


class CachedFeatures(torch.utils.data.Dataset):
    """Features in place of images: (epoch, i) -> (feature, label, no broken names)."""

    def __init__(self, features, labels):
        self.features = features.cpu()
        self.labels = labels.tolist()

    def __len__(self):
        return len(self.features)

    def __getitem__(self, index):
        return self.features[index[1]], self.labels[index[1]], []


def read_batches(dataset, chunks, args, device, consequence="it counts as a black image"):
    """The given chunks (lists of indices) as batches (images, labels) on the device. Broken samples are
    named, with the consequence; more than 10 and more than 1 % of them stop the run."""
    rank, broken = dist.get_rank(), 0
    indices = [[(0, i) for i in chunk] for chunk in chunks]
    stream = load_batches(dataset, indices, args.workers, device.type == "cuda")
    for images, labels, names in tqdm(
        stream, desc="testing", total=len(chunks), leave=False, disable=rank > 0
    ):
        for name in names:
            broken += 1
            tqdm.write(f"warning: {name} is broken; {consequence}", file=sys.stderr)
            if broken > 10 and broken > 0.01 * len(dataset):
                raise UserError(
                    f"too many broken images: {broken}, the last is {name}; repair or remove them", code=1
                )
        yield (None, None) if images is None else to_device((images, labels), device)


def predict_dataset(function, dataset, args, device):
    """function(images of a batch) -> (b, ...), over a whole set that is shared out over the processes -> (N,
    ...) float32, in order, on every process. Every sample counts once, whatever the number of processes."""
    # Take every world-th chunk. A process without one looks at the first, to know the shape of a result.
    chunks = torch.arange(len(dataset)).split(args.batch_size)
    mine = chunks[dist.get_rank() :: dist.get_world_size()]
    out = None
    batches = read_batches(dataset, [chunk.tolist() for chunk in mine or chunks[:1]], args, device)
    for chunk, (images, _) in zip(mine or chunks[:1], batches):
        with inference(args, device):
            values = function(images).float()
        if out is None:
            out = torch.zeros(len(dataset), *values.shape[1:], device=device)
        if mine:
            out[chunk.to(device)] = values

    # Each row is filled by one process, so the sum is exact.
    dist.all_reduce(out)
    return out


def confusion_matrix(predicted, labels, classes):
    """How often class i was taken for class j: (classes, classes)."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def average_precision_11(scores, positive):
    """VOC2007's: the mean over the recalls 0, .1, .., 1 of the best precision at that recall or a higher one.
    scores (N,), positive (N,)."""
    if not positive.any():
        return torch.zeros((), dtype=torch.float64)  # nothing to find
    hits = positive[scores.argsort(descending=True, stable=True)].double()
    recall = hits.cumsum(0) / hits.sum()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    levels = torch.arange(11, dtype=torch.float64) / 10 - 1e-9  # a recall of just .3 reaches the level .3
    return torch.stack([precision[recall >= level].max() for level in levels]).mean()


def compute_metrics(scores, labels, metric):
    """scores (N, classes) and labels of the whole test set -> {metric: per cent}. Never an average of
    batches."""
    scores, labels = scores.cpu(), labels.cpu()
    if metric == "map11":
        columns = zip(scores.T, labels.T)
        return {metric: 100 * torch.stack([average_precision_11(s, y > 0) for s, y in columns]).mean().item()}
    matrix = confusion_matrix(scores.argmax(dim=1), labels, scores.shape[1]).double()
    hits, truth = matrix.diag(), matrix.sum(dim=1)
    results = {"top1": 100 * (hits.sum() / truth.sum()).item()}
    if metric == "mean_per_class":
        results[metric] = 100 * (hits[truth > 0] / truth[truth > 0]).mean().item()
    return results


def nearest_neighbours(train, train_labels, test, classes, k=20, temperature=0.07):
    """Scores (N, classes) of the weighted k-nearest-neighbour vote of DINO's code: cosine similarity, weights
    exp(similarity / .07), k = 20."""
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    votes = []
    for part in test.split(1024):
        similarity, ids = (part @ train.T).topk(min(k, len(train)), dim=1)  # (b, k)
        weights = (similarity / temperature).exp()
        labels = train_labels.to(test.device)[ids]  # (b, k)
        votes.append(torch.zeros(len(part), classes, device=test.device).scatter_add(1, labels, weights))
    return torch.cat(votes)


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
        if run.folder:
            run.folder.write("best.pt", lambda file: torch.save(content(), file))


# ------------------------------------------------------------------------------------------------------------
# One run
# ------------------------------------------------------------------------------------------------------------
class Task:
    """A classifier, the samples that it is trained and tested on, and how a batch becomes its input."""

    def __init__(self, args, train_set, test_set, metric, model, info, device):
        self.args = args
        self.metric = metric
        self.model = model
        self.info = info
        self.device = device
        self.test_set = test_set
        self.classes = test_set.classes
        self.labels = torch.tensor(test_set.labels)
        self.test_samples = EvalDataset(test_set, args.image_size)
        self.neighbours = {}

        # Choose what is trained on: features, images cropped and flipped, or images augmented in all ways.
        self.prepare = self.normalized
        if model.frozen and args.cache_features:
            self.cache(train_set)
        elif model.frozen:
            self.train_samples = TrainDataset(train_set, train_transform(args), args.seed)
        else:
            transform = fine_tuning_transform(args, info["mean"])
            self.train_samples = TrainDataset(train_set, transform, args.seed)
            self.prepare = partial(
                augmented, args=args, info=info, classes=len(self.classes), multi_label=model.multi_label
            )

    def normalized(self, images, labels=None):
        """A batch -> what the model is called with. Cached features are that already."""
        return images if images.ndim < 4 else normalize(images, self.info["mean"], self.info["std"]), labels

    def cache(self, train_set):
        """Features in place of images, for training and testing, and the k-nearest-neighbour result that
        comes with them."""
        self.model.eval()

        def features(images):
            return self.model.features(self.normalized(images)[0])

        labels = torch.tensor(train_set.labels)
        train_samples = EvalDataset(train_set, self.args.image_size)
        # Look at every image once: (N, D), for the attentive protocol (N, L, D).
        seen = predict_dataset(features, train_samples, self.args, self.device)
        unseen = predict_dataset(features, self.test_samples, self.args, self.device)
        self.train_samples = CachedFeatures(seen, labels)
        self.test_samples = CachedFeatures(unseen, self.labels)
        self.args.workers = 0  # there is nothing left to load
        if not self.model.multi_label:
            seen, unseen = (x if x.ndim == 2 else x.mean(dim=1) for x in (seen, unseen))
            votes = nearest_neighbours(seen, labels, unseen, len(self.classes))
            value = compute_metrics(votes, self.labels, self.metric)[self.metric]
            self.neighbours = {f"knn_{self.metric}": value}

    def scores(self):
        """Scores (N, classes) of the test set, in order."""
        start_testing(self.model)

        def logits(images):
            return self.model.logits(self.normalized(images)[0])

        scores = predict_dataset(logits, self.test_samples, self.args, self.device)
        self.model.train()
        return scores

    def test(self, run, epoch_ends):
        """For the loop: at an epoch's end the numbers of the test set, and best.pt."""
        if not epoch_ends:
            return {}
        numbers = compute_metrics(self.scores(), self.labels, self.metric)
        keep_best(run, numbers[self.metric], self.finished)
        return numbers

    def results(self, folder):
        """What results.json holds. Rank 0 writes the other files of a finished run."""
        scores = self.scores()
        if folder:
            if not self.model.multi_label:
                matrix = confusion_matrix(scores.argmax(dim=1).cpu(), self.labels, len(self.classes))
                write_confusion(folder, matrix, self.classes)
            if self.args.protocol == "finetune":
                folder.write("encoder.pt", lambda file: torch.save(self.export(), file))
            if self.args.protocol == "attentive":
                self.show_attention(folder)
        return {**compute_metrics(scores, self.labels, self.metric), **self.neighbours}

    def finished(self):
        """What best.pt holds: all that --evaluate needs."""
        info = {**self.info, "feature": self.model.feature}
        return {
            "model": self.model.state_dict(),
            "config": self.model.encoder.config,
            "info": info,
            "args": vars(self.args),
            "classes": list(self.classes),
            "metric": self.metric,
        }

    def export(self):
        """encoder.pt of a fine-tuned encoder, to probe or to mimic (MR-MAE). The LayerNorm of mean features
        stands for its final norm."""
        model, info = self.model, self.info
        state_dict = model.encoder.state_dict()
        if model.feature == "mean":
            state_dict |= {f"norm.{name}": value for name, value in model.fc_norm.state_dict().items()}
        method = f"{info['method']}-finetune"
        return pack_encoder(model.encoder, method, model.feature, info["mean"], info["std"], state_dict)

    @torch.no_grad()
    def show_attention(self, folder):
        """pictures/attention.png: where the learned query looks (CAE Fig. 5), heads averaged, on eight test
        images."""
        samples, model = EvalDataset(self.test_set, self.args.image_size), self.model.eval()
        chosen = torch.linspace(0, len(samples) - 1, 8).long().tolist()
        images = torch.stack([samples[0, i][0] for i in chosen])
        attention = model.head.attn
        attention.record = True
        model.logits(self.normalized(images.to(self.device))[0])
        maps = attention.recorded.float().mean(dim=1).view(8, *model.encoder.grid).cpu()  # (8, h, w)
        attention.record = False
        panels = {"image": images / 255, "attention of\nthe query": heat_map(maps, images)}
        folder.write_picture("attention.png", picture_sheet(panels))


def write_confusion(folder, matrix, classes):
    """confusion.csv, rows the true classes. matrix: see `confusion_matrix`."""
    rows = [[name, *row] for name, row in zip(classes, matrix.tolist())]
    write_csv(folder, "confusion.csv", [["true \\ predicted", *classes], *rows])


def write_csv(folder, name, rows):
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    folder.write_text(name, text.getvalue())


def replace_args(args, **values):
    """A copy of args with other values."""
    return argparse.Namespace(**{**vars(args), **values})


def run_set(args, argv, name, device):
    """Train and test on one set -> (exit code, what results.json holds, and the set's metric)."""
    # Open the encoder and the data. Every process starts from the same random encoder, if it is one.
    torch.manual_seed(args.seed)
    encoder, info, fc_norm = open_encoder(args)
    out = str(Path(args.out or "runs") / f"{info['method']}-{args.protocol}-{Path(name).name}")
    if args.out and len(args.data) == 1:
        out = args.out
    args = replace_args(
        args, data=name, method=info["method"], image_size=encoder.config["image_size"], out=out
    )
    train_set, test_set, metric = local_rank0_first(args, partial(open_labelled, name, args))
    if args.batch_size < 2:
        raise UserError("--batch-size 1: BatchNorm needs at least 2 images; use 2 or more")

    # Build the classifier. Features are cached with the run's own encoder, whatever lies at --encoder now.
    folder = RunFolder(args.out) if dist.get_rank() == 0 else None
    torch.manual_seed(args.seed)
    model = Classifier(encoder, info, fc_norm, args, len(test_set.classes), metric == "map11").to(device)
    load_own_weights(model, args)
    task = Task(args, train_set, test_set, metric, model, info, device)

    # Make the run, or go on with it.
    optimizer = build_optimizer(model.train(), args)
    laptop_lr, min_lr = RATES[args.protocol]
    run = create_run(
        args,
        device,
        model,
        optimizer,
        example_of(task.train_samples, task.prepare, device),
        facts_of(train_set),
        laptop_lr,
        min_lr=min_lr,
        schedule=lr_at,
        prepare=task.prepare,
        export=dict,
        folder=folder,
    )
    header = (
        f"{args.protocol} of {args.encoder} on {name}: {len(train_set)} training and {len(test_set)} test "
        f"images, {len(train_set.classes)} classes, {metric}; features: {model.feature}"
    )
    code = run_loop(run, argv, header, task.train_samples, task.test)
    if code or run.state["step"] < run.batches.steps:
        return code, None

    # Write the results.
    return write_results(run, task, metric)


def load_own_weights(model, args):
    """The weights of the run that is to go on, if there is one, before anything is made of them. If they do
    not fit, `resume` will say why."""
    path = Path(args.out) / "checkpoint.pt"
    if path.exists():
        try:
            model.load_state_dict(load_checkpoint(path, args)["model"])
        except RuntimeError:
            pass


def write_results(run, task, metric):
    """results.json of a finished run, and its last line -> (exit code, the results and the metric)."""
    results = task.results(run.folder)
    if run.folder:
        results[f"best_{metric}"] = run.state["best"]
        run.folder.write_text("results.json", json.dumps(results, indent=1))
        already = "finished already, " if run.batches.start == run.batches.steps else ""
        shown = ", ".join(f"{key} {value:.2f}" for key, value in results.items())
        print(f"{run.args.out}: {already}{shown}", flush=True)
    return int(bool(run.folder and run.folder.failed)), {"metric": metric, **results}


def transfer(args, argv, device):
    """One set after the other; several make a row as in MixedAE Table 2 -> exit code."""
    # Find out what is missing before hours of work.
    if len(args.data) > 1:
        size = open_encoder(args)[0].config["image_size"]
        for name in args.data:
            opened = replace_args(args, data=name, image_size=size)
            local_rank0_first(args, partial(open_labelled, name, opened))

    # Train.
    numbers = []
    for name in args.data:
        code, results = run_set(args, argv, name, device)
        if results is None:
            return code
        numbers.append(results[results["metric"]])

    # Print the row.
    if len(args.data) > 1:
        cells = [f"{number:.1f}" for number in [*numbers, sum(numbers) / len(numbers)]]
        print_rank0(
            "\n".join(
                [
                    "| " + " | ".join([*args.data, "Avg."]) + " |",
                    "|---" * len(cells) + "|",
                    "| " + " | ".join(cells) + " |",
                ]
            )
        )
    return code


# ------------------------------------------------------------------------------------------------------------
# --evaluate, --predict
# ------------------------------------------------------------------------------------------------------------
def load_finished(path, device, build, keys=()):
    """A run folder or its best.pt -> (model in eval mode, the whole file). build(encoder, saved, args) ->
    model."""
    file = Path(path) / "best.pt" if Path(path).is_dir() else Path(path)
    saved = load_file(file)
    if (
        not isinstance(saved, dict)
        or not {"model", "config", "info", "args", "classes", "metric", *keys} <= saved.keys()
    ):
        raise UserError(f"{file}: not a best.pt of this program")
    try:
        model = build(ViT(**saved["config"]), saved, argparse.Namespace(**saved["args"]))
        model.load_state_dict(saved["model"])
    except (RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{file}: not a whole best.pt ({one_line(error)})") from None
    return model.to(device).eval(), saved


def evaluate(args, argv, device):
    """--evaluate: one classifier, or the ensemble of several (MR-MAE Table 4: their probabilities are
    averaged), on --data, else on its own test set; with --predict the classes of a folder's images."""

    def build(encoder, saved, run_args):
        return Classifier(
            encoder, saved["info"], None, run_args, len(saved["classes"]), saved["metric"] == "map11"
        )

    # Load the runs; an ensemble needs the same classes.
    models = [load_finished(path, device, build) for path in args.evaluate]
    first = models[0][1]
    classes, metric = first["classes"], first["metric"]
    for path, (_, saved) in zip(args.evaluate, models):
        if (saved["classes"], saved["metric"]) != (classes, metric):
            raise UserError(
                f"--evaluate: {path} has other classes than {args.evaluate[0]}; an ensemble needs the same"
            )

    # Open the images.
    size = models[0][0].encoder.config["image_size"]
    name = args.data[0] if args.data else first["args"]["data"]
    if args.predict:
        files = open_folder(args.predict)
        dataset = LabeledDataset([(files, [-1] * len(files))], classes)
    else:
        root = (
            first["args"]["data_root"] if not args.data and args.data_root == "datasets" else args.data_root
        )
        opened = replace_args(args, image_size=size, label_fraction=1.0, data_root=root)
        dataset, metric = local_rank0_first(args, partial(open_labelled, name, opened))[1:]
        if list(dataset.classes) != classes:
            raise UserError(f"--data {name}: has other classes than {args.evaluate[0]} was trained on")

    # Average the probabilities, each model's on images of its own size.
    p = 0
    for model, saved in models:

        def probabilities(images):
            logits = model.logits(normalize(images, saved["info"]["mean"], saved["info"]["std"]))
            return logits.sigmoid() if model.multi_label else logits.softmax(dim=1)

        samples = EvalDataset(dataset, model.encoder.config["image_size"])
        p = p + predict_dataset(probabilities, samples, args, device) / len(models)

    # Write the classes (of many labels an image the best, and what is likelier than not), or the numbers.
    if dist.get_rank() > 0:
        return 0
    folder = RunFolder(args.out or "runs/evaluate")
    if args.predict:
        shown = F.one_hot(p.argmax(dim=1), len(classes)).bool() | ((p >= 0.5) & (metric == "map11"))
        rows = [[files.paths[i], classes[c], f"{p[i, c]:.6f}"] for i, c in shown.nonzero().tolist()]
        write_csv(folder, "predictions.csv", [["file", "class", "probability"], *rows])
        print(f"{folder.path / 'predictions.csv'}: {len(files)} images", flush=True)
        return 0
    labels = torch.tensor(dataset.labels)
    results = compute_metrics(p, labels, metric)
    folder.write_text("results.json", json.dumps(results, indent=1))
    if metric != "map11":
        write_confusion(folder, confusion_matrix(p.argmax(dim=1).cpu(), labels, len(classes)), classes)
    shown = ", ".join(f"{key} {value:.2f}" for key, value in results.items())
    print(f"{' + '.join(args.evaluate)} on {name}: {shown}", flush=True)
    return 0


# ============================================================================================================
# A first reading may stop here. What follows: flags, encoders of every layout, the sets of MixedAE Table 2.
# ============================================================================================================
# What differs between protocols. Batches are ours, for a laptop, and fine-tuning's epochs; the papers' are in
# docs.
DEFAULTS = {
    "finetune": dict(
        epochs=10, batch_size=64, warmup_epochs=1, weight_decay=0.05, crop_scale=[0.08, 1.0]
    ),  # MAE's code
    "linear": dict(
        epochs=90, batch_size=256, warmup_epochs=10, weight_decay=0.0, crop_scale=[0.08, 1.0]
    ),  # MAE's code
    "attentive": dict(
        epochs=90, batch_size=256, warmup_epochs=10, weight_decay=0.0, crop_scale=[0.08, 1.0]
    ),  # CAE's
}


def add_encoder_args(parser):
    """The flags that say what is evaluated; dense.py has them too."""
    add = parser.add_argument_group("what to evaluate").add_argument
    add(
        "--encoder",
        default="runs/mixedae/encoder.pt",
        help="an encoder.pt, a published file, or none: random weights",
    )
    add("--evaluate", nargs="+", metavar="RUN", help="evaluate these finished runs, and stop")
    add("--predict", metavar="FOLDER", help="with --evaluate: what is found in the images of this folder")
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
    # Find the protocol.
    argv = sys.argv[1:] if argv is None else list(argv)
    first = Parser(prog="finetune.py", add_help=False, allow_abbrev=False)
    first.add_argument(
        "--protocol", choices=DEFAULTS, default="linear", help="what is trained on top of the encoder"
    )
    protocol = first.parse_known_args(argv)[0].protocol

    # Collect its flags.
    parser = Parser(
        prog=f"finetune.py --protocol {protocol}",
        parents=[first],
        allow_abbrev=False,
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_encoder_args(parser)
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
        **{**defaults, "batch_size": share_of_batch(defaults["batch_size"], multiple=2)},
    )

    # Parse, and check what takes more than one flag.
    args = parser.parse_args(argv)
    args.data = args.data or ([] if args.evaluate else ["shapes"])
    check_encoder_args(parser, args)
    if args.evaluate and len(args.data) > 1:
        parser.error(f"--evaluate: one set at a time, not --data {' '.join(args.data)}")
    names = [Path(name).name for name in args.data]
    twice = [data for data, name in zip(args.data, names) if names.count(name) > 1]
    if twice:
        parser.error(
            f"--data {' '.join(twice)}: runs of the same name would share a folder; give them one by one, "
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
    add("--smoothing", type=bounded(float, 0, 0.99), default=0.1, help="label smoothing")
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
    if args.image_size and len(args.image_size) > 2:
        parser.error(f"--image-size takes one number or two (height width), not {len(args.image_size)}")


# ------------------------------------------------------------------------------------------------------------
# Encoders
# ------------------------------------------------------------------------------------------------------------
def from_cae(weights):
    """A CAE encoder's names, its prefix `encoder.` stripped -> ours. The regressor's position table would
    take the place of the encoder's."""
    return cae.from_official(
        {name: value for name, value in weights.items() if not name.endswith("rd_pos_embed")}
    )


# Published layouts: how to know one by its names; where the weights lie in a file (or they are the file);
# what turns its names into those of our ViT; the feature that its authors probe; heads by width, which no
# state dict shows. The first that fits is taken.
Layout = namedtuple("Layout", "name sign inside convert feature heads")
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
LAYOUTS = (
    Layout(
        "CAE", "blocks.0.attn.q_bias", ("model", "module", "state_dict"), from_cae, "cls", {**HEADS, 384: 12}
    ),
    Layout(
        "MCMAE",
        "blocks3.0.norm1.weight",
        ("model",),
        lambda w: strip_prefixes(from_official_mcmae(w)),
        "mean",
        HEADS,
    ),
    Layout("DINO", "", ("teacher", "student"), dict, "cls", HEADS),
    Layout("MAE or timm", "", ("model", "state_dict"), dict, "cls", HEADS),
)
# What is no part of an encoder.
LEFT_ASIDE = (
    "head",
    "fc_norm",
    "pre_logits",
    "decoder",
    "mask_token",
    "regressor",
    "project",
    "lm_head",
    "stage_fusion",
)


def read_published(state, path, heads):
    """A published file's content -> (weights by our names, shape of the ViT, its layout)."""
    if "args" in state and (
        {"optimizer", "step"} <= state.keys() or {"config", "info", "classes"} <= state.keys()
    ):
        raise UserError(
            f"{path}: a checkpoint of this project, not an encoder; give the encoder.pt of the run"
        )

    # Find the layout, and the weights in the file.
    for layout in LAYOUTS:
        inside = next((state[key] for key in layout.inside if isinstance(state.get(key), dict)), None)
        if inside is None:
            inside = {} if layout.name == "DINO" else state
        weights = {
            name: value for name, value in inside.items() if isinstance(name, str) and torch.is_tensor(value)
        }
        weights = strip_prefixes(weights)
        if weights and (not layout.sign or layout.sign in weights):
            break

    # Read the shape of the ViT off them.
    try:
        weights = layout.convert(weights)
        shape = read_shape(weights)
        if shape["channels"] != 3:
            raise ValueError("not for colour images")
    except (KeyError, ValueError, IndexError, TypeError, ZeroDivisionError):
        raise UserError(
            f"{path}: no Vision Transformer for colour images in it (looked for patch_embed.proj.weight, "
            f"pos_embed and blocks.0.mlp.fc1.weight)"
        ) from None
    shape["heads"] = heads or layout.heads.get(shape["width"])
    if shape["heads"] is None:
        raise UserError(
            f"{path}: its file does not say how many heads a ViT of width {shape['width']} has; give --heads"
        )
    return weights, shape, layout


def open_encoder(args):
    """--encoder -> (ViT at --image-size, info, weights of a LayerNorm for mean features or None). info has
    method, feature, mean, std."""
    path, fc_norm = args.encoder, None
    info = {"method": "random", "feature": "mean", "mean": list(MEAN), "std": list(STD)}
    flags = ("image_size", "patch_size", "size", "width", "depth", "heads")
    given = {flag: getattr(args, flag) for flag in flags if getattr(args, flag) is not None}
    statistics = {key: getattr(args, key) for key in ("mean", "std") if getattr(args, key)}

    # A random encoder is what train.py would start from.
    if path == "none":
        words = []
        for flag, value in given.items():
            words += [f"--{flag.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
        made = build_encoder(train.parse_args(["--method", "mae", *words]))
        return made, {**info, **statistics}, None

    # Read our own file, or a published one.
    state = load_file(path)
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds no weights by name")
    if {"config", "state_dict"} <= state.keys():
        encoder, info = unpack_encoder(state, path)
        weights, shape = state["state_dict"], encoder.config
    else:
        weights, shape, layout = read_published(state, path, args.heads)
        info = {**info, "method": Path(path).stem, "feature": layout.feature}
        if {"fc_norm.weight", "fc_norm.bias"} <= weights.keys() and "norm.weight" not in weights:
            fc_norm = {key: weights.pop(f"fc_norm.{key}") for key in ("weight", "bias")}
            info["feature"] = "mean"
            weights |= {f"norm.{key}": value for key, value in fc_norm.items()}
            print_rank0(
                f"{path}: fine-tuned with mean pooling; its fc_norm stands for norm, and fills a new "
                "LayerNorm"
            )
        others = [name for name in weights if name.startswith(LEFT_ASIDE)]
        weights = {name: value for name, value in weights.items() if name not in others}
        print_rank0(
            f"{path}: {layout.name} layout, {len(weights)} tensors of the encoder, {len(others)} others "
            f"(heads, decoder) left aside"
        )

    # Build it at the size that is asked for, and load it strictly.
    for flag in given.keys() - {"image_size"}:
        if given[flag] != shape.get(flag):
            has = shape.get(flag, "a size of its own")
            raise UserError(f"--{flag.replace('_', '-')} {given[flag]}: {path} has {has}; leave the flag out")
    size = given.get("image_size", shape["image_size"])
    encoder = ViT(**{**shape, "image_size": [size[0], size[-1]]})
    grid = [side // shape["patch_size"] for side in shape["image_size"]]
    try:
        positions = resize_positions(weights["pos_embed"], grid, encoder.grid)
        encoder.load_state_dict({**weights, "pos_embed": positions})
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{path}: does not fit a ViT: {one_line(error, 250)}") from None
    return encoder, {**info, **statistics}, fc_norm


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
        objects = xml.etree.ElementTree.parse(path).getroot().iter("object")
        shown = {
            thing.findtext("name") for thing in objects if thing.findtext("difficult", "0").strip() == "0"
        }
        labels.append([float(name in shown) for name in VOC_CLASSES])
    return labels


# The transfer sets of MixedAE Table 2 but for CIFAR, which data.py opens: torchvision's class; arguments of
# the training splits and of the test split, or lists of files that choose one; what gives labels and classes;
# the metric of the literature; sizes; and what to do by hand.
Row = namedtuple("Row", "kind train test labels classes metric sizes by_hand")
TRAIN, VAL, TEST, TRAINVAL = ({"split": split} for split in ("train", "val", "test", "trainval"))
VOC = {"year": "2007", "image_set": "trainval"}
SETS = {
    "aircraft": Row(
        "FGVCAircraft", [TRAINVAL], TEST, "_labels", "classes", "mean_per_class", (6667, 3333), ""
    ),
    "caltech101": Row(
        "Caltech101",
        "caltech101/train.txt",
        "caltech101/test.txt",
        "y",
        "categories",
        "mean_per_class",
        (2416, 6728),
        "it has no official split: put Ericsson et al.'s lists of lines like "
        "accordion/image_0001.jpg into caltech101/train.txt and caltech101/test.txt",
    ),
    "cars": Row(
        "StanfordCars",
        [TRAIN],
        TEST,
        lambda d: [y for _, y in d._samples],
        "classes",
        "top1",
        (8144, 8041),
        "its download is dead: put cars_train/, cars_test/, devkit/ and cars_test_annos_withlabels.mat into "
        "stanford_cars/",
    ),
    "dtd": Row("DTD", [TRAIN, VAL], TEST, "_labels", "classes", "top1", (3760, 1880), ""),
    "flowers": Row(
        "Flowers102", [TRAIN, VAL], TEST, "_labels", "classes", "mean_per_class", (2040, 6149), ""
    ),
    "food": Row("Food101", [TRAIN], TEST, "_labels", "classes", "top1", (75750, 25250), ""),
    "pets": Row("OxfordIIITPet", [TRAINVAL], TEST, "_labels", "classes", "mean_per_class", (3680, 3669), ""),
    "sun397": Row(
        "SUN397",
        "SUN397/Training_01.txt",
        "SUN397/Testing_01.txt",
        "_labels",
        "classes",
        "top1",
        (19850, 19850),
        "its download is dead: put the folder SUN397/ with Training_01.txt and Testing_01.txt of its "
        "Partitions.zip there",
    ),
    "voc2007": Row(
        "VOCDetection",
        [VOC],
        {**VOC, "image_set": "test"},
        voc_labels,
        lambda d: VOC_CLASSES,
        "map11",
        (5011, 4952),
        "",
    ),
}


def attribute(dataset, what):
    """A column of SETS, the name of an attribute or a function, of a data set."""
    return what(dataset) if callable(what) else getattr(dataset, what)


def list_chooses(dataset, labels, path, size):
    """Indices of a data set's images that a text file of `size` paths names, '/abbey/sun_x.jpg' or
    'accordion/image_0001.jpg'."""
    # Name the images as the lists do.
    if hasattr(dataset, "_image_files"):  # SUN397, whose own order depends on the disk
        place = {
            "/" + file.relative_to(dataset._data_dir).as_posix(): i
            for i, file in enumerate(dataset._image_files)
        }
    else:  # Caltech101
        place = {
            f"/{dataset.categories[y]}/image_{dataset.index[i]:04d}.jpg": i for i, y in enumerate(labels)
        }

    # Read the list; torchvision leaves a class of Caltech101 out.
    lines = ["/" + line.strip().lstrip("/") for line in Path(path).read_text().splitlines() if line.strip()]
    if len(lines) != size:
        raise UserError(f"{path}: lists {len(lines)} images, not {size}; is it complete?")
    wanted = [line for line in lines if not line.startswith("/BACKGROUND_Google/")]
    if len(wanted) < len(lines):
        print_rank0(
            f"{path}: {len(lines) - len(wanted)} of its {len(lines)} images are of BACKGROUND_Google, which "
            f"torchvision leaves out"
        )
    missing = [line for line in wanted if line not in place]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of its {len(lines)} images are not there, the first is {missing[0]}"
        )
    return [place[line] for line in wanted]


def open_transfer_set(name, args):
    """A row of SETS -> (training set, test set), sizes checked."""
    row, root = SETS[name], Path(args.data_root)
    kind = partial(getattr(torchvision.datasets, row.kind), root, download=args.download)

    def labelled(parts):
        return LabeledDataset(
            [(part, attribute(part, row.labels)) for part in parts], attribute(parts[0], row.classes)
        )

    try:
        if isinstance(row.train, str):  # a list of files is the split
            whole = labelled([kind()])
            ((dataset, labels),) = whole.parts
            train_set, test_set = (
                whole.choose(list_chooses(dataset, labels, root / path, size))
                for path, size in zip((row.train, row.test), row.sizes)
            )
        else:
            train_set, test_set = (
                labelled([kind(**split) for split in row.train]),
                labelled([kind(**row.test)]),
            )
        train_set[0], test_set[0]  # some sets find out only here that scipy or a file is missing
    except UserError:
        raise
    except Exception as error:  # each set and each server fails in its own way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        advice = row.by_hand or ("is there a network?" if args.download else "add --download")
        advice = "pip install scipy" if "scipy" in reason.lower() else advice
        raise UserError(
            f"--data {name}: {reason} -- looked below {args.data_root} (--data-root); {advice}"
        ) from None
    found = (len(train_set), len(test_set))
    if not isinstance(row.train, str) and found != row.sizes:
        raise UserError(
            f"--data {name}: {found[0]} training and {found[1]} test images below {args.data_root}, not "
            f"{row.sizes[0]} and {row.sizes[1]}; is it complete?"
        )
    return train_set, test_set


def open_labelled(name, args):
    """A word of --data -> (training set, test set, metric)."""
    # Open a transfer set, or any other set; to evaluate, a folder without a split is tested whole.
    if name in SETS:
        train_set, test_set = open_transfer_set(name, args)
        metric = SETS[name].metric
    else:
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
        metric = "top1"

    # Check that there is something to tell apart.
    differ = sorted(set(train_set.classes) ^ set(test_set.classes))
    if differ:
        raise UserError(
            f"--data {name}: training and test images have different classes, the first that differs is "
            f"{differ[0]}"
        )
    if len(train_set.classes) < 2:
        raise UserError(
            f"--data {name}: has one class only ({train_set.classes[0]}); nothing can be told apart"
        )
    return fewer_labels(train_set, args), test_set, metric


def fewer_labels(train_set, args):
    """--label-fraction of each class's images, at least one, always the same ones for a seed."""
    if args.label_fraction == 1:
        return train_set
    if isinstance(train_set.label(0), list):
        raise UserError("--label-fraction: is for one label an image; leave it out for voc2007")
    by_class = {}
    for i in torch.randperm(len(train_set), generator=torch.Generator().manual_seed(args.seed)).tolist():
        by_class.setdefault(train_set.label(i), []).append(i)
    chosen = [ids[: max(1, round(args.label_fraction * len(ids)))] for ids in by_class.values()]
    return train_set.choose(sorted(i for ids in chosen for i in ids))


def main(argv=None):
    """Parse, join the processes, then evaluate finished runs or make new ones."""

    def program(args, argv, device):
        return (evaluate if args.evaluate else transfer)(args, argv, device)

    run_program("finetune.py", argv, parse_args, program)


if __name__ == "__main__":
    main()
