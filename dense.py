"""What a pre-trained encoder is worth where every pixel counts: semantic segmentation, and detection with
masks.

Reading order of the project: vit -> mrmae -> mixedae -> cae -> data -> train -> finetune -> **dense**.

    python dense.py --task segment --encoder runs/mixedae/encoder.pt --head linear     # on drawn scenes
    python dense.py --task segment --encoder none --head linear                        # its baseline
    python dense.py --task segment --encoder ... --data path/to/ADEChallengeData2016   # or in that layout
    python dense.py --task detect --encoder ... --data path/to/coco                    # or in that layout
    python dense.py --evaluate runs/mixedae-segment-shapes                             # a finished run again
    python dense.py --evaluate runs/mixedae-segment-shapes --predict path/to/images    # your own images

A task decides what is trained on top of the encoder. With patches of p = 16 pixels:

    segment     images (B, 3, height, width)
                -- encoder, trained: outputs of blocks 4, 6, 8, 12 of 12 --> four of (B, D, h, w)
                -- MultiScaleNeck --> four maps (B, D, ..) of strides 4, 8, 16, 32
                -- UperHead, enlarged --> scores (B, classes, height, width)
                or, with --head linear:
                -- encoder, frozen: its features --> (B, D, h, w)
                -- BatchNorm, linear, enlarged --> scores (B, classes, height, width)

    detect      a list of images (3, height, width) of any sizes
                -- DetectorTransform: normalised, padded --> (B, 3, ..)
                -- Pyramid: encoder, trained, and neck --> five maps (B, width, ..) of strides 4 to 64
                -- region proposal network --> boxes that may hold an object
                -- heads of Mask R-CNN --> an image's boxes (N, 4), classes (N,), masks (N, 1, height, width)

Sources: MixedAE Sec. 4.2 and 4.3, CAE Sec. 5.2 and Appendix A, MR-MAE Sec. 4.2. What they leave open:
    - Segmentation follows BEiT's and CAE's code (which is mmsegmentation's), without their learned relative
      position bias, which the papers do not mention. Photometric distortion is torchvision's colour jitter:
      see `SceneTransform`. BatchNorm is synchronised between processes on CUDA alone.
    - Detection is torchvision's Mask R-CNN: see `Detector`. Not here: Cascade Mask R-CNN (MixedAE Sec. 4.3,
      CAE Table 7), ViTDet's window attention, and the second augmentation of CAE's code (resize, crop,
      resize), which its paper does not mention.
    - best.pt is the epoch that is best on the test set: an optimistic number. results.json has the last
      epoch's too.
"""

import argparse
import contextlib
import functools
import io
import json
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import nn
from torchvision import tv_tensors
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork, masks_to_boxes
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

try:  # an optional package: COCO's files, its masks, its evaluation
    from pycocotools import coco, cocoeval
    from pycocotools import mask as coco_mask
except ImportError:
    coco = None

from data import (
    SHAPES,
    SHAPES_TRAIN,
    SHAPES_VAL,
    SUFFIXES,
    RunFolder,
    Shapes,
    TrainDataset,
    decode,
    normalize,
    open_folder,
    picture_sheet,
    seed_of,
)
from finetune import (
    add_encoder_args,
    check_encoder_args,
    confusion_matrix,
    example_of,
    init_linear,
    keep_best,
    layer_decay_groups,
    load_finished,
    open_encoder,
    read_batches,
    replace_args,
    start_testing,
    write_confusion,
    write_results,
)
from train import (
    Parser,
    add_run_args,
    create_run,
    facts_of,
    inference,
    run_loop,
    run_program,
    share_of_batch,
)
from vit import (
    UserError,
    add_size_args,
    bounded,
    one_line,
    positive_int,
    print_rank0,
    set_drop_paths,
    size_int,
)

IGNORE = 255  # the class of pixels that count for nothing, in training and in testing


# ------------------------------------------------------------------------------------------------------------
# Maps of several scales, for both tasks
# ------------------------------------------------------------------------------------------------------------
def tapped_blocks(depth):
    """The blocks that both tasks read: 4, 6, 8 and 12 of 12 (CAE's and BEiT's code), in proportion at other
    depths; a shallow encoder gives one of them twice."""
    return [max(1, round(depth * block / 12)) for block in (4, 6, 8, 12)]


class MultiScaleNeck(nn.Module):
    """Four maps (B, D, h, w) of a ViT with patches of 16 pixels -> maps of strides 4, 8, 16 and 32 (BEiT's
    and CAE's code). For UperNet and for Mask R-CNN with --neck fpn."""

    def __init__(self, width):
        super().__init__()
        up = partial(nn.ConvTranspose2d, width, width, kernel_size=2, stride=2)
        four_times = nn.Sequential(up(), nn.BatchNorm2d(width), nn.GELU(), up())
        half = nn.MaxPool2d(2, ceil_mode=True)
        self.by_stride = nn.ModuleList([four_times, up(), nn.Identity(), half])

    def forward(self, maps):
        return [scale(x) for scale, x in zip(self.by_stride, maps)]


# ------------------------------------------------------------------------------------------------------------
# Semantic segmentation: UperNet (Xiao et al., ECCV 2018) on a ViT, as BEiT's and CAE's code has it, or one
# linear layer
# ------------------------------------------------------------------------------------------------------------
def resize_like(x, other):
    """(B, C, h, w), bilinearly resized to the height and width of the other."""
    return F.interpolate(x, size=other.shape[-2:], mode="bilinear", align_corners=False)


class UperHead(nn.Module):
    """UperNet's head: four maps (B, D, ..) of strides 4 to 32 -> scores (B, classes, ..) of the finest
    one."""

    def __init__(self, width, channels, classes, pools=(1, 2, 3, 6)):
        super().__init__()
        layer = Conv2dNormActivation  # a convolution, BatchNorm, ReLU
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), layer(width, channels, 1)) for size in pools
        )
        self.bottleneck = layer(width + len(pools) * channels, channels, 3)
        self.lateral = nn.ModuleList(layer(width, channels, 1) for _ in range(3))
        self.smooth = nn.ModuleList(layer(channels, channels, 3) for _ in range(3))
        self.fuse = layer(4 * channels, channels, 3)
        self.dropout = nn.Dropout2d(0.1)
        self.classify = init_linear(nn.Conv2d(channels, classes, 1))

    def forward(self, maps):
        # Pool the coarsest map at several sizes, which lets each place see the whole image.
        last = maps[-1]
        pooled = [resize_like(pool(last), last) for pool in self.pools]
        top = self.bottleneck(torch.cat([last, *pooled], dim=1))

        # Hand down from level to level what the coarser one knows.
        levels = [*(lateral(x) for lateral, x in zip(self.lateral, maps)), top]
        for i in (2, 1, 0):
            levels[i] = levels[i] + resize_like(levels[i + 1], levels[i])
        levels[:3] = [smooth(x) for smooth, x in zip(self.smooth, levels)]

        # Bring all levels to the finest one's size, and classify its places.
        levels = [resize_like(x, levels[0]) for x in levels]
        return self.classify(self.dropout(self.fuse(torch.cat(levels, dim=1))))


class Segmenter(nn.Module):
    """--task segment: an encoder and a head. forward(images, masks) -> loss (), {}; logits(images) ->
    (B, classes, height, width), of images of any size.

    --head uper trains all but the position table; --head linear leaves the encoder as it is.
    """

    def __init__(self, encoder, args, classes):
        super().__init__()
        D = encoder.width
        self.encoder = encoder
        self.classes = classes
        self.frozen = args.head == "linear"
        if self.frozen:
            encoder.requires_grad_(False)
            batch_norm = nn.BatchNorm2d(D, affine=False, eps=1e-6, momentum=None)  # as in linear probing
            self.head = nn.Sequential(batch_norm, init_linear(nn.Conv2d(D, classes, 1)))
            return
        set_drop_paths(encoder, args.drop_path)
        encoder.norm = nn.Identity()  # maps are raw outputs of blocks
        self.taps = tapped_blocks(len(encoder.blocks))
        self.scales = MultiScaleNeck(D)
        self.head = UperHead(D, args.head_width or D, classes)
        self.auxiliary = nn.Sequential(  # a second head on the third map, in training alone
            Conv2dNormActivation(D, 256, 3), nn.Dropout2d(0.1), init_linear(nn.Conv2d(256, classes, 1))
        )

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def scores(self, images):
        """Normalised images (B, 3, height, width) -> fp32 scores (B, classes, height, width) of the head and,
        in training an UperNet, of the auxiliary one."""
        # Pad the right and the lower edge to whole patches.
        p = self.encoder.patch_size
        height, width = images.shape[-2:]
        images = F.pad(images, [0, -width % p, 0, -height % p])

        # Score the places of the maps.
        if self.frozen:
            with torch.no_grad():
                patches = self.encoder.features(images)["patches"]  # (B, L, D)
            h = images.shape[-2] // p
            scores = [self.head(rearrange(patches, "b (h w) d -> b d h w", h=h))]
        else:
            maps = self.encoder.features(images, taps=self.taps)["taps"]  # four of (B, D, h, w), raw
            scores = [self.head(self.scales(maps))]
            if self.training:
                scores.append(self.auxiliary(maps[2]))

        # Enlarge them to the size of the images, and cut the padding off.
        return [resize_like(x.float(), images)[..., :height, :width] for x in scores]

    def logits(self, images):
        return self.scores(images)[0]

    def forward(self, images, masks):
        """masks (B, height, width) of classes and IGNORE. The mean is over all pixels, ignored ones too, as
        in mmsegmentation; the auxiliary head counts for .4 (CAE's code)."""
        losses = [
            F.cross_entropy(scores, masks.long(), ignore_index=IGNORE, reduction="sum") / masks.numel()
            for scores in self.scores(images)
        ]
        return losses[0] + 0.4 * sum(losses[1:]), {}


def segment_image(model, image, window):
    """Scores (1, classes, height, width) of one normalised image (1, 3, height, width): the mean over windows
    of the given size, two thirds of it apart."""
    sides = image.shape[-2:]
    total = torch.zeros(1, model.classes, *sides, device=image.device)
    count = torch.zeros(1, 1, *sides, device=image.device)

    # The last window of a row or column ends at the edge.
    tops, lefts = (
        sorted({min(start, max(side - size, 0)) for start in range(0, side, max(1, size * 2 // 3))})
        for side, size in zip(sides, window)
    )
    for top in tops:
        for left in lefts:
            place = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            total[place] += model.logits(image[place])
            count[place] += 1
    return total / count


def segmentation_metrics(matrix):
    """Confusion matrix (classes, classes), rows the truth -> {"miou", "mean_accuracy", "pixel_accuracy"} in
    per cent; classes that never occur do not count."""
    matrix = matrix.double()
    hits, truth, found = matrix.diag(), matrix.sum(dim=1), matrix.sum(dim=0)
    return {  # of a class that never occurs both shares are 0 / 0
        "miou": 100 * (hits / (truth + found - hits)).nanmean().item(),
        "mean_accuracy": 100 * (hits / truth).nanmean().item(),
        "pixel_accuracy": 100 * (hits.sum() / matrix.sum()).item(),
    }


# ------------------------------------------------------------------------------------------------------------
# Detection with instance masks: torchvision's Mask R-CNN (He et al., ICCV 2017) on a ViT
# ------------------------------------------------------------------------------------------------------------
class SimplePyramid(nn.Module):
    """The neck of ViTDet (Li et al., ECCV 2022), which MR-MAE Sec. 4.2 follows: the map (B, D, h, w) of the
    last block, four times -> maps (B, width, ..) of strides 4, 8, 16 and 32 (for patches of 16 pixels), each
    made by itself."""

    def __init__(self, D, width):
        super().__init__()
        norm = partial(LayerNorm2d, eps=1e-6)
        up = partial(nn.ConvTranspose2d, kernel_size=2, stride=2)
        four_times = nn.Sequential(up(D, D // 2), norm(D // 2), nn.GELU(), up(D // 2, D // 4))
        self.by_stride = nn.ModuleList([four_times, up(D, D // 2), nn.Identity(), nn.MaxPool2d(2)])
        self.lateral = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, width, 1, bias=False),
                norm(width),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                norm(width),
            )
            for channels in (D // 4, D // 2, D, D)
        )

    def forward(self, maps):
        scaled = [scale(x) for scale, x in zip(self.by_stride, maps)]
        return [lateral(x) for lateral, x in zip(self.lateral, scaled)]


class Pyramid(nn.Module):
    """What Mask R-CNN calls a backbone, an encoder and its neck: normalised images (B, 3, height, width) ->
    {"0": (B, width, height / 4, width / 4), "1", "2", "3", "pool": stride 64} for patches of 16 pixels, in
    proportion for others.

    Necks: "fpn", four blocks through MultiScaleNeck and torchvision's FPN (CAE's code); "simple", see there.
    """

    def __init__(self, encoder, neck, width):
        super().__init__()
        self.encoder = encoder
        self.out_channels = width  # torchvision reads it
        encoder.norm = nn.Identity()  # maps are raw outputs of blocks
        D, depth = encoder.width, len(encoder.blocks)
        if neck == "fpn":
            self.taps = tapped_blocks(depth)
            self.scales = MultiScaleNeck(D)
            self.fpn = FeaturePyramidNetwork([D] * 4, width)
        else:
            self.taps = [depth] * 4
            self.scales = SimplePyramid(D, width)
            self.fpn = nn.Identity()

    def forward(self, images):
        maps = self.encoder.features(images, taps=self.taps)["taps"]  # four of (B, D, h, w)
        maps = self.fpn({str(i): x for i, x in enumerate(self.scales(maps))})
        maps["pool"] = maps["3"][..., ::2, ::2]  # the fifth level, for large proposals
        # fp32: torchvision builds anchors in this dtype, and bf16's 8-bit significand cannot represent
        # coordinates up to 1333.
        return {name: x.float() for name, x in maps.items()}


class DetectorTransform(GeneralizedRCNNTransform):
    """What a Detector does with its images first: normalise, in testing resize, pad to one size that
    `size_divisible` divides. torchvision's own resizes without antialiasing, which training images have."""

    def resize(self, image, target=None):
        if self.training:
            return image, target  # ObjectTransform has resized it
        return rescale(image, target, fit(image, self.min_size[0], self.max_size))


def decode_fp32(decode, codes, boxes):
    """Under AMP the heads' codes are bf16, and boxes would take their dtype: too coarse for coordinates."""
    return decode(codes.float(), boxes)


class Detector(MaskRCNN):
    """--task detect: Mask R-CNN on an encoder. With targets forward(images, targets) -> loss (), its five
    terms; without, forward(images) -> for each image a dict of "boxes" (N, 4), "labels" (N,), "scores" (N,)
    and "masks" (N, 1, height, width) in [0, 1]. images: a list of (3, height, width) in [0, 1] of any size.

    Heads are those of torchvision's second version: four convolutions and one linear layer for boxes, four
    convolutions for masks. Beside ViTDet's neck each convolution has a LayerNorm, as there; beside CAE's
    those for boxes a BatchNorm. Losses are torchvision's (CAE's code has a GIoU loss for boxes).
    """

    def __init__(self, encoder, args, info, classes):
        p, width = encoder.patch_size, args.head_width
        if p not in (4, 8, 16, 32):
            raise UserError(
                f"--task detect: its maps have strides of p / 4, p / 2, p and 2 p; torchvision wants powers "
                f"of 2, so patches of 4, 8, 16 or 32 pixels, not {p}"
            )
        set_drop_paths(encoder, args.drop_path)
        is_fpn = args.neck == "fpn"
        norm = nn.BatchNorm2d if is_fpn else partial(LayerNorm2d, eps=1e-6)

        # Build it. Anchors are 8 times the stride of their map: 32 to 512 pixels with patches of 16.
        super().__init__(
            Pyramid(encoder, args.neck, width),
            rpn_anchor_generator=AnchorGenerator(
                tuple((2 * p * 2**i,) for i in range(5)), ((0.5, 1.0, 2.0),) * 5
            ),
            rpn_head=RPNHead(width, 3, conv_depth=1 if is_fpn else 2),  # as CAE's code and ViTDet
            rpn_pre_nms_top_n_train=2 * args.proposals,
            rpn_post_nms_top_n_train=2 * args.proposals,
            rpn_pre_nms_top_n_test=args.proposals,
            rpn_post_nms_top_n_test=args.proposals,
            box_batch_size_per_image=args.rois,
            box_head=FastRCNNConvFCHead((width, 7, 7), [width] * 4, [4 * width], norm),
            box_predictor=FastRCNNPredictor(4 * width, classes + 1),
            mask_head=MaskRCNNHeads(width, [width] * 4, 1, None if is_fpn else norm),
            mask_predictor=MaskRCNNPredictor(width, width, classes + 1),
        )
        self.transform = DetectorTransform(
            min(args.image_size), max(args.image_size), info["mean"], info["std"], size_divisible=2 * p
        )

        # torchvision's pooling guesses the maps' strides once, from its first batch: size of the map over
        # size of the image before padding, rounded to a power of 2. A thin image would give a wrong one, for
        # good. So show it sizes that are exact: an image of 8 x 8 patches, maps of 32, 16, 8 and 4 places.
        maps = {str(i): torch.zeros(1, 1, side, side) for i, side in enumerate((32, 16, 8, 4))}
        for pool in (self.roi_heads.box_roi_pool, self.roi_heads.mask_roi_pool):
            pool(maps, [torch.zeros(0, 4)], [(8 * p, 8 * p)])
        for coder in (self.rpn.box_coder, self.roi_heads.box_coder):
            coder.decode = partial(decode_fp32, coder.decode)
        self.to(memory_format=torch.channels_last)  # as LayerNorm2d's output is

    @property
    def encoder(self):
        return self.backbone.encoder

    def forward(self, images, targets=None):
        # torchvision's parts return losses if their own `training` is set. What they contain (BatchNorm, drop
        # path) stays as train() or eval() left it, so that a loss can be computed in eval mode too.
        for part in (self, self.transform, self.rpn, self.roi_heads):
            part.training = targets is not None
        found = super().forward(images, targets)
        if targets is None:
            return found
        return sum(found.values()), {name: loss.detach() for name, loss in found.items()}


def coco_results(found, image_id, category_ids):
    """What a Detector found in an image -> rows of COCO's format of results: bbox is x, y, width, height; a
    mask is a run-length encoding (RLE)."""
    rows = []
    for i, (x0, y0, x1, y1) in enumerate(found["boxes"].tolist()):
        mask = (found["masks"][i, 0] > 0.5).numpy()  # (height, width)
        rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        row = {
            "image_id": image_id,
            "category_id": category_ids[found["labels"][i] - 1],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": found["scores"][i].item(),
            "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
        }
        rows.append(row)
    return rows


def detection_metrics(truth, rows):
    """COCO's evaluation of `rows`, as `coco_results` makes them -> box_ap, box_ap50, box_ap75, box_ap_small,
    .._medium, .._large and the same of masks, in per cent; a size that no object has does not count."""
    metrics = {}
    keys = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        # Without its bbox a row's area is that of its mask.
        own = [{key: row[key] for key in row if kind == "bbox" or key != "bbox"} for row in rows]
        with quiet():
            found = truth.loadRes(own) if own else coco.COCO()
            evaluation = cocoeval.COCOeval(truth, found, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        stats = zip(keys, evaluation.stats)
        metrics |= {f"{name}_{key}": 100 * float(value) for key, value in stats if value >= 0}
    return metrics


# ------------------------------------------------------------------------------------------------------------
# Schedules
# ------------------------------------------------------------------------------------------------------------
def warm_up(epoch, warmup_epochs):
    """A ramp from 0 to 1, by which both schedules are multiplied."""
    return min(1.0, epoch / warmup_epochs) if warmup_epochs else 1.0


def linear_lr(epoch, lr, warmup_epochs, epochs, min_lr):
    """The schedule of segmentation: a straight line from lr to min_lr (power 1 in BEiT's and CAE's code)."""
    return warm_up(epoch, warmup_epochs) * (min_lr + (lr - min_lr) * (1 - epoch / epochs))


def step_lr(epoch, lr, warmup_epochs, epochs, min_lr):
    """The schedule of detection: lr, a tenth of it from 9/12 of the run on, a hundredth from 11/12 on (CAE's
    code: epochs 9 and 11 of 12); never below min_lr."""
    drops = (epoch >= epochs * 9 / 12) + (epoch >= epochs * 11 / 12)
    return warm_up(epoch, warmup_epochs) * max(min_lr, lr * 0.1**drops)


# ------------------------------------------------------------------------------------------------------------
# Tasks: how a batch becomes a model's input, how an image is tested, and by what numbers
# ------------------------------------------------------------------------------------------------------------
class DenseEvalDataset(torch.utils.data.Dataset):
    """(epoch, i) -> (image and truth as they are, broken names), for testing. Of a broken sample both are
    None, as `collate` knows them."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        i = index[1]
        try:
            return *self.dataset[i], []
        except Exception as error:  # bad files make PIL and torchvision raise all kinds
            return None, None, [str(error) if isinstance(error, UserError) else self.dataset.name(i)]


def each_test_image(task, consequence):
    """(i, image, truth) of the test images of this process. Each is looked at by itself, so no result depends
    on the number of processes. A broken one is named, with the consequence, and left out."""
    mine = range(dist.get_rank(), len(task.test_set), dist.get_world_size())
    start_testing(task.model)
    samples, chunks = DenseEvalDataset(task.test_set), [[i] for i in mine]
    batches = read_batches(samples, chunks, task.args, task.device, consequence)
    for i, (images, truths) in zip(mine, batches):
        if images is not None:
            yield i, images[0], truths[0]
    task.model.train()


def finished_run(task):
    """What best.pt holds: all that --evaluate needs."""
    return {
        "model": task.model.state_dict(),
        "config": task.model.encoder.config,
        "info": task.info,
        "args": vars(task.args),
        "classes": list(task.test_set.classes),
        "category_ids": getattr(task.test_set, "category_ids", None),
        "metric": task.metric,
    }


def test_epoch(task, run, epoch_ends):
    """For the loop: at an epoch's end the numbers of the test set, and best.pt."""
    if not epoch_ends:
        return {}
    metrics = task.metrics(task.find())
    keep_best(run, metrics[task.metric], partial(finished_run, task))
    return metrics


def test_results(task, folder):
    """What results.json holds. Rank 0, which has the folder, writes the other files of a finished run."""
    found = task.find()
    if folder:
        task.write(folder, found)
    return task.metrics(found)


@dataclass
class Segmentation:
    """A Segmenter, and the scenes that it is tested on."""

    args: argparse.Namespace
    model: Segmenter
    info: dict  # of the encoder: mean and std
    device: torch.device
    test_set: object

    metric = "miou"  # chooses best.pt
    metrics = staticmethod(segmentation_metrics)
    schedule = staticmethod(linear_lr)
    test = test_epoch
    results = test_results

    def prepare(self, images, masks=None):
        """A batch -> what the model is called with."""
        return normalize(images, self.info["mean"], self.info["std"]), masks

    def predict(self, image):
        """uint8 (3, height, width) -> classes (height, width), from the image with its short side resized to
        the crop's, through windows of the crop's size or at once."""
        small = v2.functional.resize(image, [min(self.args.image_size)])
        small, _ = self.prepare(small.unsqueeze(0).to(self.device))
        window = small.shape[-2:] if self.args.window == "whole" else self.args.image_size
        with inference(self.args, self.device):
            scores = segment_image(self.model, small, window)
        return resize_like(scores, image).argmax(dim=1)[0]

    def find(self):
        """The confusion matrix (classes, classes) of all test pixels, rows the truth."""
        classes = len(self.test_set.classes)
        matrix = torch.zeros(classes, classes, dtype=torch.long, device=self.device)
        for _, image, truth in each_test_image(self, "it does not count"):
            counts = truth != IGNORE
            matrix += confusion_matrix(self.predict(image)[counts], truth[counts].long(), classes)
        dist.all_reduce(matrix)
        if not matrix.any():
            raise UserError(
                f"--data {self.args.data}: no pixel of its test images counts; are all ignored, or broken?"
            )
        return matrix.cpu()

    def write(self, folder, matrix):
        write_confusion(folder, matrix, self.test_set.classes)
        draw_examples(self, folder, "segmentation.png")

    def paint(self, image, classes):
        """Classes (height, width) as a picture; what is ignored is black."""
        return squared(PALETTE[classes.long().cpu()].permute(2, 0, 1))

    def predict_files(self, root, folder):
        """--predict: masks with the files' names, in which k is the class in line k of classes.txt."""
        for i, image, _ in each_test_image(self, "it gets no mask"):
            mask = Image.fromarray((1 + self.predict(image)).to(torch.uint8).cpu().numpy())
            name = Path(self.test_set.name(i)).relative_to(root).with_suffix(".png")
            mask.save(Path(self.args.out, "-".join(name.parts)))


@dataclass
class Detection:
    """A Detector, and the images that it is tested on."""

    args: argparse.Namespace
    model: Detector
    info: dict  # of the encoder: mean and std
    device: torch.device
    test_set: object

    metric = "box_ap"  # chooses best.pt
    schedule = staticmethod(step_lr)
    test = test_epoch
    results = test_results

    def prepare(self, images, targets):
        """A batch -> what the model is called with. The Detector normalises."""
        return [image / 255 for image in images], targets

    def predict(self, image):
        """uint8 (3, height, width) -> what the Detector finds in it, at its own size."""
        with inference(self.args, self.device):
            found = self.model([image.to(self.device) / 255])[0]
        return {name: value.cpu() for name, value in found.items()}

    def find(self):
        """What is found in all test images, as rows of COCO's format of results."""
        mine, ids = {}, self.test_set.image_ids
        for i, image, _ in each_test_image(self, "nothing is found in it"):
            mine[i] = coco_results(self.predict(image), ids[i], self.test_set.category_ids)
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
        found = {i: rows for part in parts for i, rows in part.items()}
        return [row for i in sorted(found) for row in found[i]]

    def metrics(self, rows):
        return detection_metrics(self.test_set.truth, rows)

    def write(self, folder, rows):
        folder.write_text("predictions.json", json.dumps(rows))
        draw_examples(self, folder, "detection.png")

    def paint(self, image, target):
        """Masks, boxes and names of objects on their image; of found ones those with a score above .5."""
        if "scores" in target:
            sure = target["scores"] > 0.5
            masks = target["masks"][sure, 0] > 0.5
            target = as_target(target["boxes"][sure], target["labels"][sure], masks)
        image, target = squared(image, target)
        labels = target["labels"] - 1
        if len(labels):
            colours = list(map(tuple, PALETTE[labels].tolist()))
            names = [self.test_set.classes[k] for k in labels]
            image = draw_segmentation_masks(image, target["masks"].bool(), alpha=0.5, colors=colours)
            image = draw_bounding_boxes(image, target["boxes"], names, colors=colours, fill_labels=True)
        return image

    def predict_files(self, root, folder):
        """--predict: predictions.json, COCO's format of results. An image whose name is a number, as COCO's
        are, goes by that number, any other by its path in the folder. categories.json names the classes."""
        paths = [Path(path).relative_to(root) for path in self.test_set.paths]
        names = [str(path.with_suffix("")) for path in paths]
        ids = [int(name) if name.isdecimal() else str(path) for name, path in zip(names, paths)]
        self.test_set.image_ids = ids
        rows = self.find()
        if folder:
            self.write(folder, rows)
            categories = dict(zip(self.test_set.category_ids, self.test_set.classes))
            folder.write_text("categories.json", json.dumps(categories))


TASKS = {"segment": Segmentation, "detect": Detection}


# ------------------------------------------------------------------------------------------------------------
# One run
# ------------------------------------------------------------------------------------------------------------
def build_model(encoder, saved, args):
    """The model of a task, to train it or to load it. saved: what best.pt holds, of which this needs the
    names of the classes and the encoder's info."""
    if args.task == "segment":
        return Segmenter(encoder, args, len(saved["classes"]))
    return Detector(encoder, args, saved["info"], len(saved["classes"]))


def train_task(args, argv, device):
    """Train and test on one set -> exit code."""
    # Open the encoder and the data. Every process starts from the same random encoder, if it is one.
    torch.manual_seed(args.seed)
    encoder, info, _ = open_encoder(args)
    out = args.out or f"runs/{info['method']}-{args.task}-{Path(args.data).name}"
    args = replace_args(args, method=info["method"], image_size=encoder.config["image_size"], out=out)
    train_set, test_set = open_set(args, "train"), open_set(args, "val")
    if train_set.classes != test_set.classes:
        raise UserError(f"--data {args.data}: its training and test files have different categories")

    # Build the model; every process starts from the same head.
    folder = RunFolder(args.out) if dist.get_rank() == 0 else None
    torch.manual_seed(args.seed)
    model = build_model(encoder, {"info": info, "classes": test_set.classes}, args)
    if dist.get_world_size() > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(device).train()
    task = TASKS[args.task](args, model, info, device, test_set)
    transform = SceneTransform if args.task == "segment" else ObjectTransform
    samples = TrainDataset(train_set, transform(args, info["mean"]), args.seed)

    # Make the run, or go on with it.
    groups = layer_decay_groups(model, args.layer_decay, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)
    run = create_run(
        args,
        device,
        model,
        optimizer,
        example_of(samples, task.prepare, device),
        facts_of(train_set),
        1e-2 if getattr(args, "head", "") == "linear" else 1e-3,  # ours, for a laptop
        min_lr=0.0,
        schedule=task.schedule,
        prepare=task.prepare,
        export=dict,  # no encoder.pt
        folder=folder,
    )
    header = (
        f"{args.task} with {args.encoder} on {args.data}: {len(train_set)} training and {len(test_set)} test "
        f"images, {len(test_set.classes)} classes, {task.metric}"
    )
    code = run_loop(run, argv, header, samples, task.test)

    # Write the results.
    if code or run.state["step"] < run.batches.steps:
        return code
    return write_results(run, task, task.metric)[0]


def evaluate(args, argv, device):
    """--evaluate: the numbers of a finished run on its own test set or on --data's, or with --predict what it
    finds in the images of a folder -> exit code."""
    # Load the run; its task and sizes are its own.
    model, saved = load_finished(args.evaluate[0], device, build_model)
    own, out = saved["args"], args.out or "runs/evaluate"
    data = args.data or own["data"]
    window = getattr(args, "window", None) or own.get("window")
    args = replace_args(
        args, data=data, image_size=own["image_size"], out=out, task=own["task"], window=window
    )
    folder = RunFolder(out) if dist.get_rank() == 0 else None
    dist.barrier()  # the folder is there for all

    # Open the images.
    test_set = open_folder(args.predict) if args.predict else open_set(args, "val")
    if args.predict:
        test_set.classes, test_set.category_ids = saved["classes"], saved["category_ids"]
    if test_set.classes != saved["classes"]:
        raise UserError(f"--data {data}: has other classes than {args.evaluate[0]} was trained on")
    task = TASKS[args.task](args, model, saved["info"], device, test_set)

    # Predict, or test.
    if args.predict:
        task.predict_files(args.predict, folder)
        print_rank0(f"{out}: what is found in {len(test_set)} images of {args.predict}")
        return 0
    results = task.results(folder)
    if folder:
        folder.write_text("results.json", json.dumps(results, indent=1))
    shown = ", ".join(f"{key} {value:.2f}" for key, value in results.items())
    print_rank0(f"{args.evaluate[0]} on {data}: {shown}")
    return 0


# ============================================================================================================
# A first reading may stop here. What follows: flags, pictures, sets and transforms of both tasks.
# ============================================================================================================
# Epochs and batches are ours, for a laptop; the other numbers are CAE's for ViT-B (Appendix A and its code).
DEFAULTS = {
    "segment": dict(
        epochs=5,
        batch_size=share_of_batch(16, multiple=2),
        warmup_epochs=0.5,
        layer_decay=0.65,
        drop_path=0.1,
    ),
    "detect": dict(
        epochs=1,
        batch_size=share_of_batch(8),
        warmup_epochs=0.1,
        layer_decay=0.75,
        drop_path=0.2,
        image_size=[128],
        head_width=32,
    ),
}


def parse_args(argv=None):
    """Flags -> args. Two phases, --task first, because each task has flags and defaults of its own."""
    # Find the task.
    argv = sys.argv[1:] if argv is None else list(argv)
    first = Parser(prog="dense.py", add_help=False, allow_abbrev=False)
    first.add_argument("--task", choices=TASKS, default="segment", help="what the encoder is to do")
    task = first.parse_known_args(argv)[0].task

    # Collect its flags.
    parser = Parser(
        prog=f"dense.py --task {task}",
        parents=[first],
        allow_abbrev=False,
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_encoder_args(parser)
    add_run_args(parser)
    add_size_args(parser, decoder=False)
    add = parser.add_argument_group(task).add_argument
    layout = "ADE20K" if task == "segment" else "COCO"
    add("--data", help=f"shapes, or a folder in {layout}'s layout [shapes; with --evaluate the run's own]")
    add(
        "--head-width",
        type=size_int,
        help="channels of UperNet [the encoder's width], or of the neck and the heads of Mask R-CNN (the "
        "papers: 256)",
    )
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
    add_task_args = add_segment_args if task == "segment" else add_detect_args
    add_task_args(add)
    parser.set_defaults(**{"image_size": None, "patch_size": None, "size": None, **DEFAULTS[task]})

    # Parse, and check what takes more than one flag.
    args = parser.parse_args(argv)
    check_encoder_args(parser, args)
    if args.evaluate:
        if len(args.evaluate) > 1:
            parser.error(f"--evaluate {' '.join(args.evaluate)}: there are no ensembles here; give one run")
        return args
    args.data = args.data or "shapes"
    if task == "detect" and args.compile and args.resize == "multi-scale":
        parser.error("--compile: wants images of one size, so --resize jitter")
    if task == "segment" and args.scale[0] > args.scale[1]:
        parser.error(f"--scale {args.scale[0]} {args.scale[1]}: needs MIN <= MAX")
    if task == "segment" and args.batch_size < 2:
        parser.error("--batch-size 1: BatchNorm needs at least 2 images; use 2 or more")
    return args


def add_segment_args(add):
    add(
        "--head",
        choices=("uper", "linear"),
        default="uper",
        help="UperNet, everything trained; or a linear layer on the patches of the frozen encoder",
    )
    add(
        "--scale",
        type=bounded(float, 0.01, 100),
        nargs=2,
        default=[0.5, 2.0],
        metavar=("MIN", "MAX"),
        help="training images are resized to this much of the crop, at random",
    )
    add(
        "--window",
        choices=("slide", "whole"),
        help="test on windows of the crop's size, two thirds of it apart, or on the whole image at once "
        "[slide; with --evaluate as the run]",
    )


def add_detect_args(add):
    add(
        "--neck",
        choices=("fpn", "simple"),
        default="fpn",
        help="maps of four strides from four blocks, then FPN (CAE); or all from the last block (ViTDet, "
        "MR-MAE)",
    )
    add(
        "--resize",
        choices=("multi-scale", "jitter"),
        default="multi-scale",
        help="training images: short side .6 to 1 of the smaller --image-size (CAE: 480 to 800), long side "
        "at most the larger; or .1 to 2 of --image-size, then a crop of it (ViTDet). Test images: short side "
        "the smaller --image-size, long side at most the larger",
    )
    add(
        "--proposals",
        type=positive_int,
        default=100,
        help="boxes that the first stage hands on, in training twice as many (ours; torchvision: 1000)",
    )
    add(
        "--rois",
        type=bounded(int, 4, 65536),
        default=32,
        help="of these, boxes of an image that the heads learn from (ours; detectron2: 512)",
    )


# ------------------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------------------
# A colour for each class, from a seed whose first colours lie far apart; what is ignored is black.
PALETTE = torch.randint(64, 256, (256, 3), generator=torch.Generator().manual_seed(1743)).byte()
PALETTE[IGNORE] = 0


def squared(image, *target):
    """A picture, and the objects in it if they are given, padded to a square of 256 pixels."""
    pad = v2.CenterCrop(max(image.shape[-2:]))  # it pads what is smaller
    return v2.Compose([pad, v2.Resize([256, 256])])(image, *target)


def draw_examples(task, folder, name):
    """pictures/NAME: image, truth if it is known, and prediction of up to eight test images."""
    task.model.eval()
    samples, rows = DenseEvalDataset(task.test_set), []
    for i in torch.linspace(0, len(samples) - 1, min(8, len(samples))).long().tolist():
        image, truth, broken = samples[0, i]
        if broken:
            continue
        row = {"image": squared(image)}
        if not isinstance(truth, int):
            row["truth"] = task.paint(image, truth)
        row["prediction"] = task.paint(image, task.predict(image))
        rows.append(row)
    if rows:
        panels = {title: torch.stack([row[title] for row in rows]) / 255 for title in rows[0]}
        folder.write_picture(name, picture_sheet(panels))


# ------------------------------------------------------------------------------------------------------------
# Sets
# ------------------------------------------------------------------------------------------------------------
DRAWN = {"train": SHAPES_TRAIN, "val": SHAPES_VAL}  # how many drawings


def open_set(args, split):
    """--data -> its set for the task, of the split "train" or "val"."""
    return (open_scenes if args.task == "segment" else open_objects)(args, split)


def try_some(dataset):
    """Read up to 50 evenly spaced samples, so that what a user can mend (a UserError: a mask of another size,
    a label too large) fails before training and not hours into it. Files that cannot be read are left to
    training and testing, which name them."""
    for i in torch.linspace(0, len(dataset) - 1, min(len(dataset), 50)).long().tolist():
        try:
            dataset[i]
        except UserError:
            raise
        except Exception:
            pass


# ------------------------------------------------------------------------------------------------------------
# Scenes: a class for each pixel
# ------------------------------------------------------------------------------------------------------------
class Scenes:
    """Images with a mask in ADE20K's layout: set[i] -> (uint8 (3, height, width), Mask uint8 (height, width)
    of classes 0 .. len(classes) - 1 and IGNORE).

    folder/images/SPLIT/NAME.jpg has its mask in folder/annotations/SPLIT/NAME.png, where 0 and 255 are
    ignored and classes count from 1. A mask fits its image after the image's EXIF rotation.
    """

    def __init__(self, folder, split, classes):
        self.classes = classes
        images = Path(folder, "images", split)
        found = [path for path in images.glob("*") if path.suffix.lower() in SUFFIXES]
        self.paths = sorted(map(str, found))
        if not found:
            raise UserError(f"{images}: no images in it")
        masks = Path(folder, "annotations", split)
        self.masks = [masks / f"{Path(path).stem}.png" for path in self.paths]
        missing = [mask for mask in self.masks if not mask.is_file()]
        if missing:
            raise UserError(
                f"{folder}: {len(missing)} of {len(self.masks)} masks are missing, the first is {missing[0]}"
            )
        try_some(self)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        image, mask = decode(self.paths[i]), np.array(Image.open(self.masks[i]))
        if mask.shape != image.shape[-2:]:
            raise UserError(
                f"{self.masks[i]}: has the shape {mask.shape}, its image (after its EXIF rotation) "
                f"{tuple(image.shape[-2:])}; a mask is one channel of the same size"
            )
        mask = np.where(mask == IGNORE, 0, mask)
        if mask.max() > len(self.classes):
            raise UserError(
                f"{self.masks[i]}: has the label {mask.max()}; labels are 0 or 255 (ignored) and 1 to "
                f"{len(self.classes)}, a line each in classes.txt"
            )
        return image, tv_tensors.Mask(mask.astype(np.uint8) - np.uint8(1))  # 0 becomes 255

    def name(self, i):
        return self.paths[i]


class DrawnScenes(Shapes):
    """`shapes` as scenes: class 0 is the background."""

    def __init__(self, *args):
        super().__init__(*args)
        self.classes = ["background", *self.classes]

    def __getitem__(self, i):
        sample = self.draw(i)
        mask = sample["mask"] * (1 + sample["label"])
        return sample["image"], tv_tensors.Mask(mask, dtype=torch.uint8)


def scene_classes(folder):
    """Names of the classes 1, 2, ..: a line each of classes.txt, or the last column of ADE20K's own
    objectInfo150.txt, which has a head line."""
    for path, first in ((folder / "classes.txt", 0), (folder / "objectInfo150.txt", 1)):
        if path.is_file():
            lines = path.read_text(errors="replace").rstrip().splitlines()[first:]
            classes = [line.split("\t")[-1].strip() for line in lines]
            if all(classes) and 2 <= len(classes) < IGNORE:
                return classes
            raise UserError(
                f"{path}: names {len(classes)} classes, {classes.count('')} of them by an empty line; there "
                f"must be 2 to {IGNORE - 1}, a line each"
            )
    raise UserError(
        f"--data {folder}: neither shapes nor a folder in ADE20K's layout: no classes.txt in it (a line for "
        f"each class; ADE20K has objectInfo150.txt)"
    )


def open_scenes(args, split):
    """--data -> a set with masks."""
    if args.data == "shapes":
        return DrawnScenes(args.image_size, split, DRAWN[split])
    folder = Path(args.data)
    name = {"train": "training", "val": "validation"}[split]
    return Scenes(folder, name, scene_classes(folder))


class SceneTransform:
    """Training images and masks together, as BEiT's and CAE's code do: the short side resized to .5 to 2
    times the crop's (--scale), a random crop of which no class fills more than .75 (of ten tries), flip,
    photometric distortion.

    Theirs adds up to 32 of 255 to the brightness (here a factor, .875 to 1.125), distorts before it fills
    what a crop lacks (with the mean colour; it is ignored), and draws contrast's place in the order by a coin
    (here the order is fixed).
    """

    def __init__(self, args, mean):
        self.scale = args.scale
        self.short = min(args.image_size)
        fill = {tv_tensors.Image: [int(255 * channel) for channel in mean], tv_tensors.Mask: IGNORE}
        self.crop = v2.RandomCrop(args.image_size, pad_if_needed=True, fill=fill)
        strengths = {"brightness": 0.125, "contrast": 0.5, "saturation": 0.5, "hue": 0.05}
        jitters = [v2.ColorJitter(**{name: strength}) for name, strength in strengths.items()]
        distortions = [v2.RandomApply([jitter], p=0.5) for jitter in jitters]
        self.rest = v2.Compose([v2.RandomHorizontalFlip(), *distortions])

    def __call__(self, image, mask):
        # Resize: the image bilinearly, the mask to the nearest pixel.
        low, high = self.scale
        ratio = low + (high - low) * torch.rand(()).item()
        short = max(2, round(ratio * self.short))
        image, mask = v2.Resize([short])(tv_tensors.Image(image), mask)

        # Crop, and try again where one class fills nearly all.
        for _ in range(10):
            part, labels = self.crop(image, mask)
            counts = torch.bincount(labels[labels != IGNORE].long())
            if len(counts) and counts.max() <= 0.75 * counts.sum():
                break

        # Flip, and distort the colours.
        part, labels = self.rest(part, labels)
        return part.as_subclass(torch.Tensor), labels


# ------------------------------------------------------------------------------------------------------------
# Objects: a box, a class and a mask each. Of a set, image_ids[i] and category_ids[k - 1] are COCO's ids of
# image i and of label k; `truth` is what COCO's evaluation compares with.
# ------------------------------------------------------------------------------------------------------------
def quiet():
    """A context in which pycocotools does not print."""
    return contextlib.redirect_stdout(io.StringIO())


def index_truth(truth):
    """Let pycocotools index the annotations of `truth`, and fill in what may be missing."""
    notes = truth.dataset["annotations"]
    for number, note in enumerate(notes, start=1):
        # COCO's evaluation takes an id of 0 for none, and one of two equal ids.
        note |= {"id": number, "iscrowd": note.get("iscrowd") or 0}
    with quiet():
        truth.createIndex()
    for note in notes:
        if note.get("area") is None:
            note["area"] = float(coco_mask.area(truth.annToRLE(note)))


def as_target(boxes, labels, masks):
    """Objects as transforms and torchvision's detectors want them: boxes (N, 4) x0 y0 x1 y1 in pixels, labels
    (N,) from 1, masks (N, height, width)."""
    boxes = torch.as_tensor(boxes, dtype=torch.float32).view(-1, 4)
    return {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=masks.shape[-2:]),
        "labels": torch.as_tensor(labels, dtype=torch.long),
        "masks": tv_tensors.Mask(masks, dtype=torch.uint8),
    }


class CocoObjects:
    """COCO's format: folder/annotations/instances_NAME.json, images in folder/NAME/. set[i] -> (uint8
    (3, height, width), target as `as_target` makes it).

    Crowds and boxes without area are no objects to train on (COCO's own train2017 has both); in testing
    COCO's evaluation treats crowds as it does. An image without an object is tested, not trained on, as in
    detectron2 and mmdetection.
    """

    def __init__(self, path, training):
        # Read the file, and check that it is whole.
        self.folder = path.parent.parent / path.stem.removeprefix("instances_")
        try:
            with quiet():
                self.truth = coco.COCO(str(path))
            records = self.truth.dataset["images"]
            missing = [r["file_name"] for r in records if not (self.folder / r["file_name"]).is_file()]
            self.image_ids = sorted(self.truth.imgs)
            if len(self.image_ids) < len(records):
                raise ValueError(f"{len(records)} images with {len(self.image_ids)} different ids")
            self.category_ids = sorted(self.truth.cats)
            self.classes = [str(self.truth.cats[k]["name"]) for k in self.category_ids]
            for note in self.truth.dataset.setdefault("annotations", []):
                mistake = self.mistake(note)
                if mistake:
                    raise ValueError(f"annotation {note.get('id')} {mistake}")
        except Exception as error:  # not JSON, or of another shape
            what = f"{type(error).__name__}: {one_line(error, 250)}"
            raise UserError(f"{path}: not in COCO's format ({what})") from None
        if missing:
            raise UserError(
                f"{path}: {len(missing)} of its {len(records)} images are missing, the first is "
                f"{self.folder / missing[0]}"
            )
        self.truth.dataset.setdefault("info", {})  # some versions of pycocotools want it
        index_truth(self.truth)

        # Choose the images to train on.
        flat = [note for note in self.truth.anns.values() if min(note["bbox"][2:]) <= 0]
        if flat:
            print_rank0(
                f"warning: {path}: {len(flat)} boxes have no area and are not trained on, the first is "
                f"{flat[0]['bbox']}"
            )
        with_objects = [i for i in self.image_ids if self.objects(i)]
        if not with_objects:
            raise UserError(f"{path}: none of its images has an object")
        if training:
            self.image_ids = with_objects
        try_some(self)

    def mistake(self, note):
        """What is wrong with an annotation, in words, or None."""
        image, category, box = note.get("image_id"), note.get("category_id"), note.get("bbox")
        if image not in self.truth.imgs:
            return f"is of the image {image}, which is none of its images"
        if category not in self.category_ids:
            return f"has the category {category}, which is none of its {len(self.classes)} categories"
        numbers = [value for value in box or () if isinstance(value, (int, float)) and math.isfinite(value)]
        if len(numbers) != 4 or len(box) != 4:
            return f"has the bbox {box}; it must be x, y, width, height"
        mask, record = note.get("segmentation") or [()], self.truth.imgs[image]
        if isinstance(mask, dict):
            whole = mask.get("size") == [record["height"], record["width"]]
        else:
            whole = all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in mask)
        if not whole:
            return (
                "has no segmentation that Mask R-CNN could learn from: it must be polygons of three points "
                "or more, x, y, x, y, .., or run lengths of the image's size"
            )

    def objects(self, image_id):
        """The annotations of an image that are objects to train on."""
        notes = self.truth.imgToAnns[image_id]
        return [note for note in notes if not note["iscrowd"] and min(note["bbox"][2:]) > 0]

    def __len__(self):
        return len(self.image_ids)

    def __getitem__(self, i):
        image, notes = decode(self.name(i)), self.objects(self.image_ids[i])
        record = self.truth.imgs[self.image_ids[i]]
        size = (record["height"], record["width"])
        if tuple(image.shape[-2:]) != size:
            raise UserError(
                f"{self.name(i)}: has (after its EXIF rotation) {tuple(image.shape[-2:])} pixels, its "
                f"annotations are for {size}"
            )
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (note["bbox"] for note in notes)]
        labels = [1 + self.category_ids.index(note["category_id"]) for note in notes]
        masks = torch.zeros(len(notes), *size, dtype=torch.uint8)
        for k, note in enumerate(notes):
            masks[k] = torch.from_numpy(self.truth.annToMask(note))
        return image, as_target(boxes, labels, masks)

    def name(self, i):
        return str(self.folder / self.truth.imgs[self.image_ids[i]]["file_name"])


class DrawnObjects(Shapes):
    """`shapes` as CocoObjects are, with one to four objects an image, anywhere, half as large as there in
    proportion to the image."""

    def __init__(self, *args):
        super().__init__(*args)
        self.image_ids = list(range(self.length))
        self.category_ids = list(range(1, 1 + len(SHAPES)))

    def __getitem__(self, i):
        rng = np.random.default_rng(seed_of("objects", self.split, i))
        canvas = self.background(rng)
        half = np.array(self.image_size[::-1]) / min(self.image_size)  # of width and height
        placed, objects = [], []
        for _ in range(int(rng.integers(1, 5))):
            # Find a place where the object covers no other; twenty tries.
            label = int(rng.integers(len(SHAPES)))
            radius, turn = rng.uniform([0.2, -np.pi], [0.375, np.pi]).tolist()
            for cx, cy in rng.uniform(radius - half, half - radius, (20, 2)).tolist():
                if all(math.hypot(cx - x, cy - y) > radius + r for x, y, r in placed):
                    canvas, mask, box = self.put(rng, canvas, label, cx, cy, radius, turn)
                    placed.append((cx, cy, radius))
                    objects.append((box, 1 + label, mask))
                    break
        boxes, labels, masks = zip(*objects)
        return self.finish(canvas), as_target(boxes, labels, torch.stack(masks))

    @functools.cached_property
    def truth(self):
        """The objects of the whole split, as pycocotools holds them: a perfect result."""
        notes = []
        for i in self.image_ids:
            target = self[i][1]
            perfect = {
                **target,
                "masks": target["masks"][:, None],
                "scores": torch.ones(len(target["labels"])),
            }
            notes += coco_results(perfect, i, self.category_ids)
        height, width = self.image_size
        truth = coco.COCO()
        truth.dataset = {
            "info": {},
            "images": [{"id": i, "height": height, "width": width} for i in self.image_ids],
            "annotations": notes,
            "categories": [{"id": k} for k in self.category_ids],
        }
        index_truth(truth)
        return truth


def open_objects(args, split):
    """--data -> a set with boxes and masks."""
    if coco is None:
        raise UserError(
            "--task detect reads COCO's files and computes its metric with pycocotools: pip install "
            "pycocotools"
        )
    if args.data == "shapes":
        return DrawnObjects(args.image_size, split, DRAWN[split])
    found = sorted(Path(args.data, "annotations").glob(f"instances_{split}*.json"))
    if len(found) != 1:
        raise UserError(
            f"--data {args.data}: neither shapes nor a folder in COCO's layout; it needs one "
            f"annotations/instances_{split}*.json and has {len(found)}"
        )
    return CocoObjects(found[0], split == "train")


def fit(image, short, long):
    """The factor that brings the short side of an image to `short`, or its long one to `long` if that is
    less."""
    return min(short / min(image.shape[-2:]), long / max(image.shape[-2:]))


def rescale(image, target, scale):
    """An image and its objects, resized; thin images keep two pixels."""
    size = [max(2, int(scale * side)) for side in image.shape[-2:]]
    return v2.Resize(size)(image, target)


class ObjectTransform:
    """Training images with their objects: resize (--resize), flip. "multi-scale": the short side to .6 to 1
    of min(image_size), in eleven steps (CAE Appendix A: 480 to 800), the long one at most max(image_size).
    "jitter": to .1 to 2 times image_size, then a crop of it, filled with the mean colour (ViTDet)."""

    def __init__(self, args, mean):
        self.resize = args.resize
        self.image_size = args.image_size
        # v2 takes the first plain tensor for the image, and leaves labels as they are.
        fill = {torch.Tensor: [int(255 * channel) for channel in mean], tv_tensors.Mask: 0}
        self.crop = v2.RandomCrop(args.image_size, pad_if_needed=True, fill=fill)
        clean = [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(), v2.ToPureTensor()]
        self.rest = v2.Compose([v2.RandomHorizontalFlip(), *clean])

    def __call__(self, image, target):
        if self.resize == "multi-scale":
            # Choose the short side.
            part = 15 + int(torch.randint(11, ()))
            short = round(min(self.image_size) * part / 25)
            image, target = rescale(image, target, fit(image, short, max(self.image_size)))
        else:
            # Choose the scale, then crop. Boxes are those of what is left of the masks, as ViTDet's.
            whole = min(new / old for new, old in zip(self.image_size, image.shape[-2:]))
            image, target = rescale(image, target, whole * (0.1 + torch.rand(1) * 1.9))
            image, target = self.crop(image, target)
            left = target["masks"].bool().flatten(1).any(dim=1)
            masks = target["masks"][left]
            boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])  # ends excluded
            target = as_target(boxes, target["labels"][left], masks)
        return self.rest(image, target)


def main(argv=None):
    """Parse, join the processes, then evaluate a finished run or make a new one."""

    def program(args, argv, device):
        return (evaluate if args.evaluate else train_task)(args, argv, device)

    run_program("dense.py", argv, parse_args, program)


if __name__ == "__main__":
    main()
