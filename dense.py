"""Test a pre-trained encoder on semantic segmentation, and on detection with masks.

Reading order of the project: vit -> mrmae -> mixedae -> cae -> data -> train -> finetune -> **dense**.

    python dense.py --task segment --encoder runs/mixedae/encoder.pt --head linear     # on drawn scenes
    python dense.py --task segment --encoder none --head linear                        # its baseline
    python dense.py --task segment --encoder ... --data path/to/ADEChallengeData2016   # or in that layout
    python dense.py --task detect --encoder ... --data path/to/coco                    # or in that layout
    python dense.py --evaluate runs/mixedae-segment-shapes                             # a finished run again
    python dense.py --evaluate runs/mixedae-segment-shapes --predict path/to/images    # your own images

A task decides what is trained on top of the encoder. With patches of 16 pixels:

    --task segment: images (B, 3, height, width)
        -- encoder, trained ------------------> outputs of blocks 4, 6, 8, 12 of 12: four of (B, D, h, w)
        -- MultiScaleNeck --------------------> four maps (B, D, ..) of strides 4, 8, 16, 32
        -- UperHead, enlarged ----------------> scores (B, classes, height, width)

    --task segment --head linear: images (B, 3, height, width)
        -- encoder, frozen -------------------> features of the patches (B, D, h, w)
        -- BatchNorm, linear, enlarged -------> scores (B, classes, height, width)

    --task detect: a list of images (3, height, width) of any sizes
        -- DetectorTransform: normalise, pad -> images (B, 3, ..) of one size
        -- Pyramid: encoder, trained, neck ---> five maps (B, channels, ..) of strides 4 to 64
        -- region proposal network -----------> boxes that may hold an object
        -- heads of Mask R-CNN ---------------> per image boxes (N, 4), classes (N,), masks (N, 1, ..)

To read one run from its flags to results.json, begin with `program`. It builds the model and a task, makes a
Run of the model, and gives both to `run_task` of finetune.py, which runs `train_loop` of train.py. These call

    task.prepare        of a loaded batch: what the model is called with
    model.forward       the loss, and numbers for the log
    task.schedule       the learning rate
    task.test           at an epoch's end: the numbers of the test set; writes best.pt
    task.results        after the last step: results.json, predictions and pictures

Sources: MixedAE Sec. 4.2 and 4.3, CAE Sec. 5.2 and Appendix A, MR-MAE Sec. 4.2. What differs from them:
    - Segmentation follows BEiT's and CAE's code (which is mmsegmentation's), without their learned relative
      position bias, which the papers do not mention. Photometric distortion is torchvision's colour jitter:
      see `SceneTransform`. BatchNorm is synchronised between processes on CUDA alone.
    - Detection is torchvision's Mask R-CNN: see `Detector`. Not here: Cascade Mask R-CNN, with which all
      detection numbers of MixedAE (Sec. 4.3) and CAE's Table 7 were made, so these cannot be repeated with
      this file; ViTDet's window attention and relative positions; and the second augmentation of CAE's code
      (resize, crop, resize), which its paper does not mention.
"""

import argparse
import json
import math
import os
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property, partial
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import nn
from torchvision import tv_tensors
from torchvision.models import detection
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork, box_convert, masks_to_boxes
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
    ImageFiles,
    RunFolder,
    Shapes,
    TrainDataset,
    broken_name,
    normalize,
    open_folder,
    open_image,
    picture_sheet,
    read_text,
    seed_of,
    writing,
)
from finetune import (
    EVALUATE_FLAGS,
    Tested,
    add_encoder_args,
    add_layer_args,
    check_encoder_args,
    confusion_matrix,
    example_of,
    init_linear,
    layer_decay_groups,
    load_finished,
    note_useless,
    open_encoder,
    read_batches,
    replace_args,
    run_task,
    start_testing,
    write_confusion,
    write_numbers,
)
from train import (
    add_run_args,
    create_run,
    facts_of,
    first_phase,
    inference,
    resolve_warmup,
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
    and CAE's code). For UperNet and for Mask R-CNN with --neck fpn.

    narrowing: whether each doubling of the size halves the channels, as in ViTDet; see `SimplePyramid`.
    """

    def __init__(self, width, narrowing=False, norm=nn.BatchNorm2d):
        super().__init__()
        at_8, at_4 = (width // 2, width // 4) if narrowing else (width, width)  # channels at these strides
        up = partial(nn.ConvTranspose2d, kernel_size=2, stride=2)
        four_times = nn.Sequential(up(width, at_8), norm(at_8), nn.GELU(), up(at_8, at_4))
        coarser = nn.MaxPool2d(2, ceil_mode=True)  # ceil_mode is ours: of a map of one row a row is left
        self.by_stride = nn.ModuleList([four_times, up(width, at_8), nn.Identity(), coarser])

    def forward(self, maps):
        return [layer(x) for layer, x in zip(self.by_stride, maps)]


# ------------------------------------------------------------------------------------------------------------
# Semantic segmentation: UperNet (Xiao et al., ECCV 2018) on a ViT, as BEiT's and CAE's code has it, or one
# linear layer
# ------------------------------------------------------------------------------------------------------------
def resize_like(x, other):
    """(B, C, h, w), bilinearly resized to the height and width of the other."""
    return F.interpolate(x, size=other.shape[-2:], mode="bilinear", align_corners=False)


class UperHead(nn.Module):
    """UperNet's head: four maps (B, D, ..) of strides 4 to 32 -> scores (B, classes, ..), stride 4."""

    def __init__(self, width, channels, classes):
        super().__init__()
        conv = Conv2dNormActivation  # a convolution, BatchNorm, ReLU
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), conv(width, channels, 1)) for size in (1, 2, 3, 6)
        )
        self.bottleneck = conv(width + 4 * channels, channels, 3)
        self.lateral = nn.ModuleList(conv(width, channels, 1) for _ in range(3))
        self.smooth = nn.ModuleList(conv(channels, channels, 3) for _ in range(3))
        self.fuse = conv(4 * channels, channels, 3)
        self.dropout = nn.Dropout2d(0.1)
        self.classify = init_linear(nn.Conv2d(channels, classes, 1))

    def forward(self, maps):
        # Pool the coarsest map at several sizes, which lets each place see the whole image.
        last = maps[-1]
        pooled = [resize_like(pool(last), last) for pool in self.pools]
        top = self.bottleneck(torch.cat([last, *pooled], dim=1))  # (B, channels, ..), stride 32

        # Add each level, enlarged, to the next finer one.
        levels = [*(lateral(x) for lateral, x in zip(self.lateral, maps)), top]  # four of (B, channels, ..)
        for i in (2, 1, 0):
            levels[i] = levels[i] + resize_like(levels[i + 1], levels[i])
        levels[:3] = [smooth(x) for smooth, x in zip(self.smooth, levels)]

        # Bring all levels to the finest one's size, and classify its places.
        levels = [resize_like(x, levels[0]) for x in levels]  # four of (B, channels, ..), stride 4
        return self.classify(self.dropout(self.fuse(torch.cat(levels, dim=1))))


class Segmenter(nn.Module):
    """--task segment: an encoder and a head. forward(images, masks) -> loss (), {}; logits(images) ->
    (B, classes, height, width), of images of any size.

    --head uper trains all but the position table; --head linear keeps the encoder frozen.
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
        else:
            set_drop_paths(encoder, args.drop_path)
            encoder.norm = nn.Identity()  # the maps are raw outputs of blocks
            self.taps = tapped_blocks(len(encoder.blocks))  # the blocks whose outputs are read
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

    def all_logits(self, images):
        """Normalised images (B, 3, height, width) -> a list: the fp32 scores (B, classes, height, width) of
        the head and, with --head uper in training mode, those of the auxiliary head."""
        # Pad the right and the lower edge to whole patches.
        p = self.encoder.patch_size
        height, width = images.shape[-2:]
        images = F.pad(images, [0, -width % p, 0, -height % p])

        # Score the places of a map: patches, or UperNet's places of stride 4.
        if self.frozen:
            patches = self.encoder.features(images)["patches"]  # (B, L, D)
            h = images.shape[-2] // p
            logits = [self.head(rearrange(patches, "b (h w) d -> b d h w", h=h))]
        else:
            maps = self.encoder.features(images, taps=self.taps)["taps"]  # four of (B, D, h, w), raw
            logits = [self.head(self.scales(maps))]
            if self.training:
                logits.append(self.auxiliary(maps[2]))

        # Enlarge them to the size of the images, and cut the padding off.
        return [resize_like(x.float(), images)[..., :height, :width] for x in logits]

    def logits(self, images):
        return self.all_logits(images)[0]

    def forward(self, images, masks):
        """masks (B, height, width) of classes and IGNORE. The sum over the pixels is divided by the number of
        all of them, ignored ones included, as in mmsegmentation; the auxiliary head counts for .4 (CAE's
        code)."""
        losses = [
            F.cross_entropy(logits, masks.long(), ignore_index=IGNORE, reduction="sum") / masks.numel()
            for logits in self.all_logits(images)
        ]
        return losses[0] + 0.4 * sum(losses[1:]), {}


def segment_image(model, image, window):
    """Scores (1, classes, height, width) of one normalised image (1, 3, height, width): the mean over windows
    of the given size, two thirds of it apart."""
    sides = image.shape[-2:]
    total = torch.zeros(1, model.classes, *sides, device=image.device)
    count = torch.zeros_like(total)

    # Windows begin every two thirds of their size; the last one of a row or column is moved back to end at
    # the edge.
    tops, lefts = (
        sorted({min(start, max(side - size, 0)) for start in range(0, side, size * 2 // 3)})
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
    return {  # a class that never occurs has 0 / 0, which nanmean leaves out
        "miou": 100 * (hits / (truth + found - hits)).nanmean().item(),
        "mean_accuracy": 100 * (hits / truth).nanmean().item(),
        "pixel_accuracy": 100 * (hits.sum() / matrix.sum()).item(),
    }


# ------------------------------------------------------------------------------------------------------------
# Detection with instance masks: torchvision's Mask R-CNN (He et al., ICCV 2017) on a ViT
# ------------------------------------------------------------------------------------------------------------
class SimplePyramid(MultiScaleNeck):
    """The neck of ViTDet (Li et al., ECCV 2022), which MR-MAE Sec. 4.2 follows: the map (B, D, h, w) of the
    last block, four times -> maps (B, channels, ..) of strides 4, 8, 16 and 32 (for patches of 16 pixels).
    Unlike in an FPN no map is added to another."""

    def __init__(self, D, channels):
        norm = partial(LayerNorm2d, eps=1e-6)
        super().__init__(D, narrowing=True, norm=norm)
        conv = partial(Conv2dNormActivation, norm_layer=norm, activation_layer=None)
        # Per map two convolutions, each with its LayerNorm. They are unpacked so that all four layers of a
        # map are numbered 0 to 3 in the state dict.
        self.lateral = nn.ModuleList(
            nn.Sequential(*conv(given, channels, 1), *conv(channels, channels, 3))
            for given in (D // 4, D // 2, D, D)
        )

    def forward(self, maps):
        return [lateral(x) for lateral, x in zip(self.lateral, super().forward(maps))]


class Pyramid(nn.Module):
    """What Mask R-CNN calls a backbone, an encoder and its neck: normalised images (B, 3, height, width) ->
    {"0": (B, channels, height / 4, width / 4), "1", "2", "3", "pool"} of strides 4, 8, 16, 32 and 64 for
    patches of 16 pixels, in proportion for others.

    Necks: "fpn", four blocks through MultiScaleNeck and torchvision's FPN (CAE's code); "simple", the last
    block through SimplePyramid.
    """

    def __init__(self, encoder, neck, channels):
        super().__init__()
        self.encoder = encoder
        self.out_channels = channels  # torchvision reads it
        encoder.norm = nn.Identity()  # the maps are raw outputs of blocks
        D, depth = encoder.width, len(encoder.blocks)
        if neck == "fpn":
            self.taps = tapped_blocks(depth)
            self.scales = MultiScaleNeck(D)
            self.fpn = FeaturePyramidNetwork([D] * 4, channels)
        else:
            encoder.pos_embed.requires_grad_(True)  # ViTDet trains the position table
            self.taps = [depth] * 4
            self.scales = SimplePyramid(D, channels)
            self.fpn = nn.Identity()

    def forward(self, images):
        maps = self.encoder.features(images, taps=self.taps)["taps"]  # four of (B, D, h, w)
        maps = self.fpn({str(i): x for i, x in enumerate(self.scales(maps))})
        maps["pool"] = maps["3"][..., ::2, ::2]  # the fifth level, for large proposals
        # fp32: torchvision builds anchors in this dtype, and bf16's 8-bit significand cannot represent
        # coordinates up to 1333.
        return {name: x.float() for name, x in maps.items()}


class DetectorTransform(detection.transform.GeneralizedRCNNTransform):
    """What a Detector does with its images first: normalise, in testing resize, pad to one size that
    `size_divisible` divides. torchvision's own transform would resize test images without antialiasing, but
    training images are resized with it."""

    def resize(self, image, target=None):
        if self.training:
            return image, target  # ObjectTransform has resized it
        return ShortestSize(self.min_size, self.max_size)(image, target)


def decode_fp32(decode, codes, boxes):
    """Under AMP the heads' box regressions (torchvision's "codes") are bf16, and boxes would take their
    dtype: too coarse for coordinates."""
    return decode(codes.float(), boxes)


class Detector(detection.MaskRCNN):
    """--task detect: Mask R-CNN on an encoder. With targets forward(images, targets) -> loss (), its five
    terms; without, forward(images) -> for each image a dict of "boxes" (N, 4), "labels" (N,), "scores" (N,)
    and "masks" (N, 1, height, width) in [0, 1]. images: a list of (3, height, width) in [0, 1] of any size.

    Heads are those of torchvision's second version: four convolutions and one linear layer for boxes, four
    convolutions for masks. With --neck simple each of these convolutions is followed by a LayerNorm, as in
    ViTDet; with --neck fpn those for boxes by a BatchNorm, those for masks by no norm. Losses are
    torchvision's (CAE's code has a GIoU loss for boxes).
    """

    def __init__(self, encoder, args, info, classes):
        p = encoder.patch_size
        channels = args.head_width
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
            Pyramid(encoder, args.neck, channels),
            rpn_anchor_generator=detection.anchor_utils.AnchorGenerator(
                [p * 2**i for i in range(1, 6)], (0.5, 1.0, 2.0)
            ),
            # One convolution in CAE's code, two in ViTDet.
            rpn_head=detection.rpn.RPNHead(channels, 3, conv_depth=1 if is_fpn else 2),
            rpn_pre_nms_top_n_train=2 * args.proposals,  # as detectron2 has it: 2000, of which 1000 are kept
            rpn_post_nms_top_n_train=args.proposals,
            rpn_pre_nms_top_n_test=args.proposals,
            rpn_post_nms_top_n_test=args.proposals,
            box_batch_size_per_image=args.rois,
            box_head=detection.faster_rcnn.FastRCNNConvFCHead(
                (channels, 7, 7), [channels] * 4, [4 * channels], norm
            ),
            box_predictor=detection.faster_rcnn.FastRCNNPredictor(4 * channels, classes + 1),
            mask_head=detection.mask_rcnn.MaskRCNNHeads(
                channels, [channels] * 4, 1, None if is_fpn else norm
            ),
            mask_predictor=detection.mask_rcnn.MaskRCNNPredictor(channels, channels, classes + 1),
        )

        # Pad images to a multiple of 4 p, the stride of the coarsest map: torchvision's anchors lie right
        # only where all strides divide the image.
        self.transform = DetectorTransform(
            min(args.image_size), max(args.image_size), info["mean"], info["std"], size_divisible=4 * p
        )

        # torchvision's RoI pooling has no argument for the strides of its maps. It derives them from its
        # first batch (size of the map over size of the image before padding, rounded to a power of 2) and
        # keeps them, so a thin first image would make them wrong for the whole run. So call it once with
        # sizes that are exact: an image of 8 x 8 patches, maps of 32, 16, 8 and 4 places.
        maps = {str(i): torch.zeros(1, 1, side, side) for i, side in enumerate((32, 16, 8, 4))}
        for pool in (self.roi_heads.box_roi_pool, self.roi_heads.mask_roi_pool):
            pool(maps, [torch.zeros(0, 4)], [(8 * p, 8 * p)])

        # Decode boxes in fp32 (see `decode_fp32`).
        for coder in (self.rpn.box_coder, self.roi_heads.box_coder):
            coder.decode = partial(decode_fp32, coder.decode)
        self.to(memory_format=torch.channels_last)  # the layout of LayerNorm2d's output

    @property
    def encoder(self):
        """Where finetune.py looks for the encoder of any model."""
        return self.backbone.encoder

    def forward(self, images, targets=None):
        # torchvision has one switch, `training`, for two things: whether a part returns losses or what it
        # found, and how BatchNorm and drop path behave. Here the targets decide the first, by the attribute
        # of these four modules alone; train() and eval() decide the second, for all that these contain.
        for part in (self, self.transform, self.rpn, self.roi_heads):
            part.training = targets is not None
        output = super().forward(images, targets)
        if targets is None:
            return output
        return sum(output.values()), {name: loss.detach() for name, loss in output.items()}


def coco_results(found, image_id, category_ids):
    """What a Detector found in an image -> rows of COCO's format of results: bbox is x, y, width, height; a
    mask is a run-length encoding (RLE)."""
    boxes = box_convert(found["boxes"].double(), "xyxy", "xywh")
    masks = (found["masks"][:, 0] > 0.5).permute(1, 2, 0)  # (height, width, N)
    rles = coco_mask.encode(np.asfortranarray(masks, dtype=np.uint8))
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[label - 1],
            "bbox": box.tolist(),
            "score": score.item(),
            "segmentation": {**rle, "counts": rle["counts"].decode()},
        }
        for box, label, score, rle in zip(boxes, found["labels"], found["scores"], rles)
    ]


def detection_metrics(truth, rows):
    """COCO's evaluation of `rows`, as `coco_results` makes them -> box_ap, box_ap50, box_ap75, box_ap_small,
    .._medium, .._large and the same of masks, in per cent; a size that no object has does not count."""
    metrics = {}
    keys = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    for name, kind, left_out in (("box", "bbox", "segmentation"), ("mask", "segm", "bbox")):
        # Give pycocotools copies, because it writes into the rows. It tells small, medium and large objects
        # by the area of a row's bbox, if there is one; for masks it must be the mask's: leave the bbox out.
        own = [{key: row[key] for key in row.keys() - {left_out}} for row in rows]
        with redirect_stdout(None):  # pycocotools prints
            found = truth.loadRes(own) if own else coco.COCO()  # loadRes wants at least one row
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
    """A factor of both schedules that rises from 0 to 1 during the warm-up."""
    return min(1.0, epoch / warmup_epochs) if warmup_epochs else 1.0


def linear_lr(epoch, lr, warmup_epochs, epochs, min_lr):
    """The schedule of segmentation: a straight line from lr to min_lr (power 1 in BEiT's and CAE's code)."""
    return warm_up(epoch, warmup_epochs) * (min_lr + (lr - min_lr) * (1 - epoch / epochs))


# Where detection drops its rate, as shares of the run. CAE's code: epochs 9 and 11 of 12. ViTDet, and the
# public detector of MR-MAE's group: steps 163,889 and 177,546 of 184,375.
LR_DROPS = {"fpn": (9 / 12, 11 / 12), "simple": (8 / 9, 26 / 27)}


def step_lr(epoch, lr, warmup_epochs, epochs, min_lr, drops):
    """The schedule of detection: lr, a tenth of it from the first drop on, a hundredth from the second on;
    never below min_lr."""
    passed = sum(epoch >= epochs * drop for drop in drops)
    return warm_up(epoch, warmup_epochs) * max(min_lr, lr * 0.1**passed)


# ------------------------------------------------------------------------------------------------------------
# Tasks: how a batch becomes a model's input, how an image is tested, and by what numbers
# ------------------------------------------------------------------------------------------------------------
class DenseEvalDataset(TrainDataset):
    """(epoch, i) -> (image and truth as they are, broken names), for testing. Of a broken sample both are
    None, as `collate` knows them."""

    def __getitem__(self, index):
        i = index[1]
        try:
            return *self.dataset[i], []
        except Exception as error:  # bad files make PIL and torchvision raise all kinds
            return None, None, [broken_name(self.dataset, i, error)]


@dataclass
class DenseTask(Tested):
    """A model, the images that it is tested on, and what both tasks do alike."""

    args: argparse.Namespace
    model: nn.Module
    info: dict  # of the encoder: mean and std
    device: torch.device
    test_set: object
    seen: int = 0  # how many images `my_images` has read

    def images_at(self, ids, consequence):
        """(i, image, truth) of the test images with these indices. A broken one is named, with the
        consequence, and left out."""
        samples = DenseEvalDataset(self.test_set, None)
        batches = read_batches(samples, [[i] for i in ids], self.args, torch.device("cpu"), consequence)
        for i, (images, truths) in zip(ids, batches):
            if images is not None:
                yield i, images[0], truths[0]

    def my_images(self, consequence):
        """`images_at` for this process's share of the test images, which are consecutive. Each image is
        looked at by itself, so no result depends on the number of processes."""
        shares = torch.arange(len(self.test_set)).tensor_split(dist.get_world_size())
        for i, image, truth in self.images_at(shares[dist.get_rank()].tolist(), consequence):
            self.seen += 1
            yield i, image, truth

    def measure(self, folder):
        """The numbers of the test set; `Tested.test` calls it at an epoch's end. No file is written before
        the end of the run, so `folder` is not used."""
        return self.results(folder=None)

    def best_file(self):
        """What best.pt holds; for detection also COCO's ids of the classes."""
        return {**super().best_file(), "category_ids": getattr(self.test_set, "category_ids", None)}

    def draw_examples(self, folder, name, legend=()):
        """pictures/NAME: image, truth if it is known, and prediction of up to eight test images. legend: see
        `picture_sheet`."""
        rows = []
        count = len(self.test_set)
        for _, image, truth in self.images_at(range(0, count, math.ceil(count / 8)), "it is not drawn"):
            row = {"image": squared(image)}
            if not self.args.predict:
                row["truth"] = self.paint(image, truth)
            row["prediction"] = self.paint(image, self.predict(image))
            rows.append(row)
        if rows:
            panels = {title: torch.stack([row[title] for row in rows]) / 255 for title in rows[0]}
            folder.write_picture(name, picture_sheet(panels, legend))


class Segmentation(DenseTask):
    """A Segmenter, and the scenes that it is tested on."""

    metric = "miou"  # chooses best.pt

    schedule = staticmethod(linear_lr)

    def prepare(self, images, masks=None):
        """A batch -> what the model is called with."""
        return normalize(images, self.info["mean"], self.info["std"]), masks

    def predict(self, image):
        """uint8 (3, height, width) -> classes (height, width). The image is resized to the short side of
        --image-size, and scored in windows or at once (--window)."""
        small = v2.functional.resize(image.to(self.device), [min(self.args.image_size)])
        small, _ = self.prepare(small[None])
        window = small.shape[-2:] if self.args.window == "whole" else self.args.image_size
        with inference(self.args, self.device):
            scores = segment_image(self.model, small, window)
        return resize_like(scores, image).argmax(dim=1)[0]

    def results(self, folder):
        """What results.json holds. Rank 0, which has the folder, writes the other files of a finished run."""
        # Count how often class i was taken for class j, over all test pixels.
        start_testing(self.model)
        classes = self.test_set.classes
        count = len(classes)
        matrix = torch.zeros(count, count, dtype=torch.long, device=self.device)
        for _, image, truth in self.my_images("it does not count"):
            truth = truth.to(self.device).long()
            known = truth != IGNORE
            matrix += confusion_matrix(self.predict(image)[known], truth[known], count)
        dist.all_reduce(matrix)

        # Write, and summarise.
        if folder:
            write_confusion(folder, matrix, classes)
            legend = list(zip(classes, PALETTE.tolist()))[:20]  # ADE20K has 150 classes
            self.draw_examples(folder, "segmentation.png", legend)
        return segmentation_metrics(matrix.cpu())

    def paint(self, image, labels):
        """Labels (height, width) as a picture, without the image; what is ignored is black."""
        return squared(PALETTE[labels.long().cpu()].permute(2, 0, 1))

    def predict_files(self, paths, folder):
        """--predict: a mask for each image. Classes are numbered as in the training masks (on `shapes` from
        1, the background). A mask's name is the image's path in the given folder: in/b.jpg has in-b.png. Each
        process writes those of its own images, so `folder`, which only rank 0 has, is not used."""
        files = ["-".join(path.parts) for path in paths]
        same_file = Counter(files)
        same_stem = Counter(Path(file).stem for file in files)
        first = int(self.args.first_label != "0")  # the number of the first class
        for i, image, _ in self.my_images("it gets no mask"):
            mask = Image.fromarray((first + self.predict(image)).byte().cpu().numpy())

            # Keep the ending where images differ in it alone, and number those of the same name.
            name = Path(files[i]).stem
            if same_stem[name] > 1:
                name = files[i]
            if same_file[files[i]] > 1:
                name = f"{i}-{name}"
            path = Path(self.args.out, f"{name[-250:]}.png")  # no disk takes longer names
            with writing(path):
                mask.save(path)


class Detection(DenseTask):
    """A Detector, and the images that it is tested on."""

    metric = "box_ap"  # chooses best.pt

    def schedule(self, epoch, lr, warmup_epochs, epochs, min_lr):
        """`step_lr` with the drops that suit the neck."""
        return step_lr(epoch, lr, warmup_epochs, epochs, min_lr, LR_DROPS[self.args.neck])

    def prepare(self, images, targets):
        """A batch -> what the model is called with. The Detector normalises."""
        return [image / 255 for image in images], targets

    def predict(self, image):
        """uint8 (3, height, width) -> what the Detector finds in it, at its own size."""
        with inference(self.args, self.device):
            found = self.model([image.to(self.device) / 255])[0]
        return {name: value.cpu() for name, value in found.items()}

    def find(self):
        """What is found in all test images, in their order, as rows of COCO's format of results."""
        mine = []
        test_set = self.test_set
        for i, image, _ in self.my_images("nothing is found in it"):
            mine += coco_results(self.predict(image), test_set.image_ids[i], test_set.category_ids)
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
        return sum(parts, [])

    def results(self, folder):
        """What results.json holds. Rank 0, which has the folder, writes the other files of a finished run."""
        start_testing(self.model)
        rows = self.find()
        if folder:
            self.write(folder, rows)
        return detection_metrics(self.test_set.truth, rows)

    def write(self, folder, rows):
        """predictions.json and pictures/detection.png, after a test and after --predict."""
        folder.write_text("predictions.json", json.dumps(rows))
        self.draw_examples(folder, "detection.png")

    def paint(self, image, target):
        """Masks, boxes and names of objects on their image; of found ones those with a score above .5."""
        if "scores" in target:
            sure = target["scores"] > 0.5
            masks = target["masks"][sure, 0] > 0.5
            target = as_target(target["boxes"][sure], target["labels"][sure], masks)
        image, target = squared(image, target)
        labels = target["labels"] - 1
        if len(labels):
            colours = list(map(tuple, PALETTE[labels % IGNORE].tolist()))  # any number of classes
            names = [self.test_set.classes[k] for k in labels]
            image = draw_segmentation_masks(image, target["masks"].bool(), alpha=0.5, colors=colours)
            image = draw_bounding_boxes(image, target["boxes"], names, colors=colours, fill_labels=True)
        return image

    def predict_files(self, paths, folder):
        """--predict: predictions.json, COCO's format of results, and categories.json, the names of the
        classes. An image whose name is a number, as COCO's are, goes by that number, any other by its path in
        the given folder. If two have the same number, all go by their paths."""
        ids = [int(path.stem) if str(path.with_suffix("")).isdecimal() else str(path) for path in paths]
        if len(set(ids)) < len(paths):
            ids = list(map(str, paths))
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
    """The model of a task, to train it or to load it. saved: {"classes": names, "info": of the encoder}, or
    best.pt, which has both."""
    if args.task == "segment":
        return Segmenter(encoder, args, len(saved["classes"]))
    return Detector(encoder, args, saved["info"], len(saved["classes"]))


def program(args, argv, device):
    """Train and test on one set, or evaluate a finished run -> exit code."""
    if args.evaluate:
        return evaluate(args, device)

    # Open the encoder and the data. The seed makes a random encoder the same in all processes.
    torch.manual_seed(args.seed)
    encoder, info, _ = open_encoder(args)
    args = replace_args(
        args,
        method=info["method"],
        image_size=encoder.config["image_size"],
        out=args.out or f"runs/{info['method']}-{args.task}-{Path(args.data).name}",
    )
    train_set, test_set = open_set(args, "train"), open_set(args, "val")
    if train_set.classes != test_set.classes:
        raise UserError(f"--data {args.data}: its training and test files have different categories")

    # Train on --label-fraction of the images, but on one batch of all processes at least. The seed chooses.
    if args.label_fraction:
        batch = args.batch_size * args.accumulate * dist.get_world_size()
        count = max(batch, round(args.label_fraction * len(train_set)))
        ids = np.random.default_rng(args.seed).permutation(len(train_set))[:count].tolist()
        train_set = ChosenSamples(train_set, ids)

    # Build the model; every process starts from the same head.
    torch.manual_seed(args.seed)
    model = build_model(encoder, {"info": info, "classes": test_set.classes}, args)
    # Let BatchNorm see the batches of all processes. SyncBatchNorm runs on CUDA only.
    if dist.get_world_size() > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(device).train()
    task = TASKS[args.task](args, model, info, device, test_set)
    transform = SceneTransform if args.task == "segment" else ObjectTransform
    samples = TrainDataset(train_set, transform(args, info["mean"]), args.seed)

    # Make the run, or go on with it. Without --lr and --blr the rate is ours, for a laptop.
    default_lr = 1e-2 if args.task == "segment" and args.head == "linear" else 1e-3
    groups = layer_decay_groups(model, args.layer_decay, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)
    run = create_run(
        args,
        device,
        model,
        optimizer=optimizer,
        example=example_of(samples, task.prepare, device),
        facts=facts_of(train_set),
        default_lr=default_lr,
        min_lr=0.0,
        schedule=task.schedule,
        prepare=task.prepare,
        export=dict,  # no encoder.pt
    )
    header = (
        f"{args.task} with {args.encoder} on {args.data}: {len(train_set)} training and {len(test_set)} test "
        f"images, {len(test_set.classes)} classes, {task.metric}"
    )
    return run_task(run, argv, header, samples, task)[0]


def evaluate(args, device):
    """--evaluate: the numbers of a finished run on its own test set or on --data's, or with --predict what it
    finds in the images of a folder -> exit code."""
    # Load the run. Flags without a default (--data, --window, --first-label ...) have the run's value unless
    # they are given. The others, such as --precision and --workers, are those of this call, given or not.
    # Flags of the model may be repeated, but not changed.
    run = args.evaluate[0]
    model, saved = load_finished(run, args, device, build_model)
    own = saved["args"]
    given = {flag: value for flag, value in vars(args).items() if value is not None}
    for flag in MODEL_FLAGS:
        value = given.get(flag, own.get(flag))
        if value != own.get(flag):
            raise UserError(
                f"--{flag.replace('_', '-')} {value}: {run} has {own.get(flag)}; leave the flag out"
            )
    given |= {"image_size": own["image_size"], "out": args.out or "runs/evaluate"}
    args = argparse.Namespace(**{**own, **given})
    if args.task == "detect":
        check_pycocotools()

    # A mask must not replace an image: of a folder all images below it are read, of a file's folder only one.
    root = Path(args.predict or "")
    single = os.path.isfile(root)
    root = root.parent if single else root
    out = Path(args.out).resolve()
    images = root.resolve()
    if args.predict and (out == images or not single and out.is_relative_to(images)):
        raise UserError(f"--out {args.out}: lies among the images of --predict, which masks could replace")
    in_use = args.task == "segment" and any(out.glob("*.png")) and not os.path.exists(out / ".lock")
    if args.predict and in_use:
        raise UserError(f"--out {args.out}: holds images that masks could replace; choose another folder")

    # Take the folder for what will be written.
    folder = RunFolder(args.out) if dist.get_rank() == 0 else None
    dist.barrier()  # the folder is there for all

    # Open the images.
    if args.predict:
        test_set = ImageFiles([args.predict]) if single else open_folder(root)
        test_set.classes, test_set.category_ids = saved["classes"], saved["category_ids"]
    else:
        test_set = open_set(args, "val")
    if test_set.classes != saved["classes"]:
        raise UserError(f"--data {args.data}: has other classes than {run} was trained on")
    task = TASKS[args.task](args, model, saved["info"], device, test_set)

    # Predict, or test.
    if args.predict:
        task.predict_files([Path(path).relative_to(root) for path in test_set.paths], folder)
        seen = torch.tensor(task.seen, device=device)
        dist.all_reduce(seen)
        if not seen:
            raise UserError(f"--predict {args.predict}: none of its {len(test_set)} images can be read")
        left_out = f"; {len(test_set) - seen} broken, left out"
        print_rank0(f"{args.out}: what is found in {seen} images of {args.predict}{left_out}")
        return 0
    results = task.results(folder)
    if folder:
        write_numbers(folder, f"{run} on {args.data}", results)
    return 0


# ============================================================================================================
# A first reading may stop here. What follows: flags, pictures, sets and transforms of both tasks.
# ============================================================================================================
# Flags of the model of a run: with --evaluate they can only be repeated.
MODEL_FLAGS = ("task", "head", "head_width", "neck", "proposals", "rois")

# Epochs, batches, image size and head width are ours, for a laptop. Layer decay and drop path are CAE's for
# ViT-B (Appendix A and its code).
DEFAULTS = {
    "segment": dict(
        epochs=5,
        batch_size=share_of_batch(16, multiple=2),
        layer_decay=0.65,
        drop_path=0.1,
        image_size=None,
    ),
    "detect": dict(
        epochs=1,
        batch_size=share_of_batch(8),
        layer_decay=0.75,
        drop_path=0.2,
        image_size=[128],
        head_width=32,
    ),
}


def parse_args(argv=None):
    """Flags -> args. Two phases, --task first, because each task has flags and defaults of its own."""
    task, parser = first_phase("dense.py", "task", TASKS, "segment", "what the encoder is to do", argv)

    # Collect its flags.
    add_encoder_args(parser)
    add_run_args(parser)
    add_size_args(parser, decoder=False)
    add = parser.add_argument_group(task).add_argument
    add(
        "--data",
        help="shapes, or a folder in the layout of ADE20K (segment) or of COCO (detect) [shapes; with "
        "--evaluate the run's own]",
    )
    add(
        "--label-fraction",
        type=bounded(float, 1e-9, 1),
        help="train on this share of the training images, at least a batch (ours) [all]",
    )
    add(
        "--head-width",
        type=size_int,
        help="channels of UperNet [the encoder's width], or of the neck and the heads of Mask R-CNN (the "
        "papers: 256)",
    )
    add_layer_args(add)
    if task == "segment":
        add(
            "--first-label",
            choices=("0", "1"),
            help="the number of the first class in masks: 1, with 0 and 255 ignored (ADE20K); or 0, with 255 "
            "[1, but masks that seem to count from 0 are refused; with --evaluate as the run]",
        )
        add(
            "--head",
            choices=("uper", "linear"),
            default="uper",
            help="UperNet, everything trained; or a linear layer on the patches of the frozen encoder",
        )
        add(
            "--window",
            choices=("slide", "whole"),
            help="test on windows of the crop's size, two thirds of it apart, or on the whole image at once "
            "[slide; with --evaluate as the run]",
        )
    else:
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
            help="training images: short side .6 to 1 of the smaller --image-size (CAE: 480 to 800), "
            "long side at most the larger; or .1 to 2 of --image-size, then a crop of it (ViTDet). Test "
            "images: short side the smaller --image-size, long side at most the larger",
        )
        add(
            "--proposals",
            type=positive_int,
            default=100,
            help="boxes that the first stage hands on (ours; detectron2: 1000)",
        )
        add(
            "--rois",
            type=bounded(int, 4, 65536),
            default=32,
            help="of these, boxes of an image that the heads learn from (ours; detectron2: 512)",
        )
    parser.set_defaults(size=None, **DEFAULTS[task])

    # Parse, and check what takes more than one flag.
    args = parser.parse_args(argv)
    if args.evaluate:
        # The model's flags have defaults, which hide whether they were given. Parse again with None as their
        # default.
        useful = EVALUATE_FLAGS.union(MODEL_FLAGS, ["window", "first_label"])
        note_useless(parser, argv, "--evaluate", vars(args).keys() - useful)
        parser.set_defaults(**dict.fromkeys((*MODEL_FLAGS, "image_size")))
        args = parser.parse_args(argv)
    check_encoder_args(parser, args)
    resolve_warmup(args, most=args.epochs / 10)
    if args.evaluate:
        if len(args.evaluate) > 1:
            parser.error(f"--evaluate {' '.join(args.evaluate)}: there are no ensembles here; give one run")
        return args
    args.data = "shapes" if args.data is None else args.data
    if task == "detect" and args.compile and args.resize == "multi-scale":
        parser.error("--compile: wants images of one size, so --resize jitter")
    if task == "segment" and args.head == "uper" and args.batch_size < 2:
        parser.error("--batch-size 1: BatchNorm needs at least 2 images; use 2 or more")
    if task == "segment" and args.head == "linear":
        note_useless(parser, argv, "--head linear", ("head_width", "layer_decay", "drop_path"))
    return args


# ------------------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------------------
# A colour for each class, from a seed whose first colours lie far apart; what is ignored is black.
PALETTE = torch.randint(64, 256, (256, 3), generator=torch.Generator().manual_seed(1743)).byte()
PALETTE[IGNORE] = 0


def squared(image, *target):
    """A picture, and the objects in it if they are given, padded to a square and resized to 256 x 256."""
    pad = v2.CenterCrop(max(image.shape[-2:]))  # it pads what is smaller
    return v2.Resize([256, 256])(pad(image, *target))


# ------------------------------------------------------------------------------------------------------------
# Sets
# ------------------------------------------------------------------------------------------------------------
DRAWN = {"train": SHAPES_TRAIN, "val": SHAPES_VAL}  # how many drawings


def open_set(args, split):
    """--data -> its set for the task, of the split "train" or "val"."""
    return (open_scenes if args.task == "segment" else open_objects)(args, split)


class ChosenSamples(torch.utils.data.Subset):
    """The samples of a set with these indices; their names and the classes are those of the whole set."""

    @property
    def classes(self):
        return self.dataset.classes

    def name(self, i):
        return self.dataset.name(self.indices[i])


def readable_samples(dataset):
    """Read up to 50 evenly spaced samples -> the indices of those that can be read. What a user can mend (a
    UserError: a mask of another size, a label too large) fails here, before training and not hours into it.
    Files that cannot be read are left to training and testing, which name them."""
    readable = []
    for i in range(0, len(dataset), math.ceil(len(dataset) / 50)):
        try:
            dataset[i]
            readable.append(i)
        except UserError:
            raise
        except Exception:
            pass
    return readable


def random_crop(size, mean, outside):
    """A random crop. An image that is smaller is first padded with the mean colour, a mask with `outside`."""
    # `fill` goes by type: the image is a plain tensor. (Labels are plain tensors too, but v2 treats only the
    # first as an image.)
    fill = {torch.Tensor: [int(255 * channel) for channel in mean], tv_tensors.Mask: outside}
    return v2.RandomCrop(size, pad_if_needed=True, fill=fill)


# ------------------------------------------------------------------------------------------------------------
# Scenes: a class for each pixel
# ------------------------------------------------------------------------------------------------------------
class Scenes(ImageFiles):
    """Images with a mask in ADE20K's layout: set[i] -> (uint8 (3, height, width), Mask uint8 (height, width)
    of classes 0 .. len(classes) - 1 and IGNORE).

    folder/images/SPLIT/NAME.jpg has its mask in folder/annotations/SPLIT/NAME.png; if images lie in folders
    of their own, so do masks. There classes count from 1, and 0 and 255 are ignored; with --first-label 0
    they count from 0, and 255 alone is ignored. A mask fits its image after the image's EXIF rotation.
    """

    def __init__(self, folder, split, classes, first_label):
        paths = open_folder(Path(folder, "images", split)).paths
        images, annotations = (Path(folder, part, split) for part in ("images", "annotations"))
        masks = [annotations / Path(path).relative_to(images).with_suffix(".png") for path in paths]
        twice = [mask for mask, count in Counter(masks).items() if count > 1]
        if twice:
            raise UserError(f"{folder}: two images share the mask {twice[0]}; give each a name of its own")
        missing = [mask for mask in masks if not mask.is_file()]
        if missing:
            raise UserError(
                f"{folder}: {len(missing)} of {len(masks)} masks are missing, the first is {missing[0]}"
            )
        super().__init__(paths, masks, classes)
        self.first = int(first_label != "0")

        # Judge the masks. A few test images may well lack a class, so these do not tell how masks count: they
        # are taken to count from 1 if nothing else is said.
        if split == "validation":
            first_label = first_label or "1"
        seen = [np.unique(open_image(masks[i])) for i in readable_samples(self)]
        judge_masks(masks[0].parent, seen, classes, first_label)

    def __getitem__(self, i):
        image, file = super().__getitem__(i)
        mask = np.array(open_image(file))
        if mask.shape != image.shape[-2:]:
            raise UserError(
                f"{file}: has the shape {mask.shape}, its image (after its EXIF rotation) "
                f"{tuple(image.shape[-2:])}; a mask is one channel of the same size"
            )
        end = self.first + len(self.classes)
        known = np.isin(mask, [*range(end), IGNORE])
        if not known.all():
            raise UserError(
                f"{file}: has the label {mask[~known][0]} ({mask.dtype}); labels are "
                f"{'0 or ' * self.first}255 (ignored) and {self.first} to {end - 1}, whole numbers, one per "
                f"line of classes.txt"
            )
        labels = mask.astype(np.uint8) - self.first  # in uint8 0 - 1 is 255, which is IGNORE
        return image, tv_tensors.Mask(np.where(mask == IGNORE, IGNORE, labels))


def judge_masks(where, seen, classes, first_label):
    """Refuse masks whose labels are not what they are taken for. seen: the labels that occur, of each mask
    that was read; first_label: --first-label, or None if nobody gave it.

    Masks count from 0, it seems, if 0 is in more than half of them and the last class in none, although more
    than .8 of the numbers occur. Where many are missing, as of ADE20K's 150 classes in 50 masks, the last one
    says nothing.
    """
    if not seen:
        raise UserError(f"{where}: none of the masks that were tried can be read")
    labels = set().union(*seen)
    k = len(classes)
    said = f"{where}: the {len(seen)} masks that could be read hold the labels {sorted(map(int, labels))}"
    if labels <= {0, IGNORE} and (labels != {0} or first_label != "0"):
        raise UserError(
            f"{said}, so there is nothing to learn (255 is always ignored, 0 unless --first-label 0); write "
            f"into each pixel the number of its class, which is its line in classes.txt (one less with "
            f"--first-label 0)"
        )
    zeros = sum(0 in labels_of_mask for labels_of_mask in seen)
    if not first_label and k not in labels and len(labels) > 0.8 * k and zeros > len(seen) / 2:
        raise UserError(
            f"{said} and never {k}, with {k} classes. If they count from 0, give --first-label 0: j is line "
            f"j + 1 of classes.txt. If 0 is to be ignored, and {classes[-1]} is rare, give --first-label 1"
        )


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
    """Names of the classes 1, 2, ..: the lines of classes.txt, or the last column of ADE20K's own
    objectInfo150.txt, which has a head line."""
    for path, first in ((folder / "classes.txt", 0), (folder / "objectInfo150.txt", 1)):
        if os.path.isfile(path):
            try:
                lines = read_text(path).rstrip().splitlines()[first:]
            except (OSError, UnicodeError) as error:
                raise UserError(f"{path}: cannot be read ({one_line(error)}); write it in UTF-8") from None
            classes = [line.split("\t")[-1].strip() for line in lines]
            if all(classes) and 2 <= len(classes) < IGNORE:
                return classes
            raise UserError(
                f"{path}: names {len(classes)} classes, {classes.count('')} of them by an empty line; there "
                f"must be 2 to {IGNORE - 1}, one per line"
            )
    raise UserError(
        f"--data {folder}: neither shapes nor a folder in ADE20K's layout: no classes.txt in it (one class "
        f"per line; ADE20K has objectInfo150.txt)"
    )


def open_scenes(args, split):
    """--data -> a set with masks."""
    if args.data == "shapes":
        return DrawnScenes(args.image_size, split, DRAWN[split])
    folder = Path(args.data)
    name = "training" if split == "train" else "validation"
    return Scenes(folder, name, scene_classes(folder), args.first_label)


class SceneTransform:
    """Training images and masks together, as BEiT's and CAE's code do: the short side resized to .5 to 2
    times the crop's, a random crop of which no class fills more than .75 (of ten tries), flip, photometric
    distortion.

    mmsegmentation's distortion differs from ours in four points. It adds up to 32 of 255 to the brightness,
    where ours multiplies by .875 to 1.125. It scales S of HSV, where ours blends with grey. It distorts a
    small image before it is padded with the mean colour, ours after it; but the loss ignores the padding. And
    its contrast comes second or last, at random, where ours always comes second.
    """

    def __init__(self, args, mean, scale=(0.5, 2.0)):
        self.scale = scale
        self.short = min(args.image_size)
        self.crop = random_crop(args.image_size, mean, IGNORE)
        jitters = [
            v2.ColorJitter(brightness=0.125),
            v2.ColorJitter(brightness=0.5),  # what mmsegmentation calls contrast: pixels times .5 to 1.5
            v2.ColorJitter(saturation=0.5),
            v2.ColorJitter(hue=0.1),  # mmsegmentation: 18 of OpenCV's 180, which is a tenth of the circle
        ]
        distortions = [v2.RandomApply([jitter]) for jitter in jitters]  # each with probability .5
        self.rest = v2.Compose([v2.RandomHorizontalFlip(), *distortions])

    def __call__(self, image, mask):
        # Resize: the image bilinearly, the mask to the nearest pixel.
        ratio = torch.empty(()).uniform_(*self.scale).item()
        short = max(2, round(ratio * self.short))
        image, mask = v2.Resize([short])(image, mask)

        # Crop, and try again where one class fills nearly all.
        for _ in range(10):
            part, labels = self.crop(image, mask)
            counts = torch.bincount(labels[labels != IGNORE].long())
            if len(counts) and counts.max() <= 0.75 * counts.sum():
                break

        # Flip, and distort the colours.
        return self.rest(part, labels)


# ------------------------------------------------------------------------------------------------------------
# Objects, each with a box, a class and a mask. Of a set, image_ids[i] and category_ids[k - 1] are COCO's ids
# of image i and of label k; `truth` is what COCO's evaluation compares with.
# ------------------------------------------------------------------------------------------------------------
def coco_truth(content):
    """The content of a file in COCO's format -> the same, indexed by pycocotools for its evaluation."""
    truth = coco.COCO()
    truth.dataset = {"info": {}, **content}  # some versions of pycocotools want "info"

    # Number the annotations anew, because COCO's evaluation reads the id 0 as "no match", and counts two
    # annotations with equal ids once. Fill in what may be missing.
    for number, note in enumerate(content["annotations"], start=1):
        note |= {"id": number, "iscrowd": note.get("iscrowd") or 0}
    with redirect_stdout(None):  # pycocotools prints
        truth.createIndex()
    for note in content["annotations"]:
        if note.get("area") is None:
            note["area"] = float(coco_mask.area(truth.annToRLE(note)))
    return truth


def as_target(boxes, labels, masks):
    """Objects as transforms and torchvision's detectors want them: boxes (N, 4) x0 y0 x1 y1 in pixels, labels
    (N,) from 1, masks (N, height, width)."""
    boxes = torch.as_tensor(boxes, dtype=torch.float32).view(-1, 4)
    return {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=masks.shape[-2:]),
        "labels": torch.as_tensor(labels, dtype=torch.long),
        "masks": tv_tensors.Mask(masks, dtype=torch.uint8),
    }


def run_lengths(text):
    """The run lengths in COCO's compressed text, as pycocotools writes them -> a list of numbers.

    A character is 48 + six bits: five bits of a number, from the lowest on, and whether more of it follow.
    The highest bit of a number is its sign. From the fourth run on, a number is the difference from the run
    two before.
    """
    lengths = []
    number = 0  # what has been read of the next number
    place = 0  # how many bits of it
    for character in text:
        bits = ord(character) - 48
        number |= (bits & 31) << place
        place += 5
        if not bits & 32:  # the last five bits
            number -= (bits & 16) << (place - 4)  # the sign, if it is set
            if len(lengths) > 2:
                number += lengths[-2]
            lengths.append(number)
            number = 0
            place = 0
    if place:
        raise ValueError("compressed run lengths break off")
    return lengths


def mistake_of(note, images, categories):
    """What is wrong with an annotation of COCO's format, in words, or None. images: {id: record}."""
    image, category, box = note["image_id"], note["category_id"], note["bbox"]
    if image not in images:
        return f"is of the image {image}, which is none of its images"
    if category not in categories:
        return f"has the category {category}, which is none of its {len(categories)} categories"
    width, height = images[image]["width"], images[image]["height"]
    where = f"in an image of {width} x {height} pixels"

    # Check the box: it must have four numbers, and touch the image. A box given by its corners can be told if
    # it lies in the lower right part of the image: read as x, y, width and height, it ends far outside.
    if (
        len(box or ()) != 4
        or not np.isfinite(box).all()
        or box[0] > width
        or box[1] > height
        or min(box[0] + box[2], box[1] + box[3]) < 0
        or (box[0] < box[2] <= width and box[1] < box[3] <= height and sum(box) > 1.1 * (width + height))
        or (min(box[2:]) > 0 and max(box) < 1)
    ):
        return (
            f"has the bbox {box} {where}; it must be x, y, width, height in pixels of this image, not "
            f"corners (instead of x, y, x1, y1 write x, y, x1 - x, y1 - y) and not shares of the image"
        )
    area = note.get("area") or 0
    if not isinstance(area, (int, float)) or not 0 <= area <= 1e10:  # COCO's evaluation counts no larger ones
        return f"has the area {area!r}; it must be a number of pixels, or be left out: then it is the mask's"

    # Check the mask. pycocotools crashes on points that are far away, or nowhere (NaN), and can wait for ever
    # if run lengths do not add up to the image.
    mask = note.get("segmentation") or [()]  # no mask is an empty polygon, which has too few points
    if isinstance(mask, dict):
        counts = mask["counts"]
        lengths = run_lengths(counts) if isinstance(counts, str) else counts
        whole = mask["size"] == [height, width] and sum(lengths) == height * width and min(lengths) >= 0
    else:
        whole = all(len(p) >= 6 and len(p) % 2 == 0 and np.abs(p).max() < 1e5 for p in mask)
    if not whole:
        return (
            f"has the segmentation {one_line(mask, 60)} {where}; it must be polygons of three points or more "
            f"in it, x, y, x, y, .., or run lengths of the image's size that add up to its pixels"
        )


class CocoObjects(ImageFiles):
    """COCO's format: folder/annotations/instances_NAME.json, images in folder/NAME/. set[i] -> (uint8
    (3, height, width), target as `as_target` makes it).

    Crowds, and boxes without area, are not trained on (COCO's own train2017 has both). In testing COCO's
    evaluation ignores what is found in a crowd. An image without an object is tested, not trained on, as in
    detectron2 and mmdetection.
    """

    def __init__(self, path, training):
        # Read the file, and check that it is whole.
        folder = path.parent.parent / path.stem.removeprefix("instances_")
        try:
            content = json.loads(path.read_text())
            images = {record["id"]: record for record in sorted(content["images"], key=itemgetter("id"))}
            for record in images.values():
                record |= {side: int(record[side]) for side in ("height", "width")}
            files = {i: folder / record["file_name"] for i, record in images.items()}
            categories = {record["id"]: str(record["name"]) for record in content["categories"]}
            for name, by_id in (("images", images), ("categories", categories)):
                if len(by_id) < len(content[name]):
                    raise ValueError(f"{len(content[name])} {name} with {len(by_id)} different ids")
            for note in content.setdefault("annotations", []):
                mistake = mistake_of(note, images, categories)
                if mistake:
                    raise ValueError(f"annotation {note.get('id')} {mistake}")
        except Exception as error:  # not JSON, or of another shape
            what = f"{type(error).__name__}: {one_line(error, 400)}"
            raise UserError(f"{path}: not in COCO's format ({what})") from None
        missing = [file for file in files.values() if not file.is_file()]
        if missing:
            raise UserError(
                f"{path}: {len(missing)} of its {len(files)} images are missing, the first is {missing[0]}"
            )
        self.truth = coco_truth(content)

        # Collect the objects of each image to train on.
        objects = {i: [] for i in images}
        flat = []
        for note in content["annotations"]:
            if min(note["bbox"][2:]) <= 0:
                flat.append(note["bbox"])
            elif not note["iscrowd"]:
                objects[note["image_id"]].append(note)
        if flat:
            print_rank0(
                f"warning: {path}: {len(flat)} boxes have no area and are not trained on, the first is "
                f"{flat[0]}"
            )
        if not any(objects.values()):
            raise UserError(f"{path}: none of its images has an object")
        if not training and max(map(len, objects.values())) > 100:
            print_rank0(f"warning: {path}: COCO's AP counts 100 detections per image; some have more objects")

        # Choose the images.
        self.image_ids = [i for i in objects if objects[i] or not training]
        self.category_ids = sorted(categories)
        super().__init__(
            [str(files[i]) for i in self.image_ids],
            [objects[i] for i in self.image_ids],
            [categories[k] for k in self.category_ids],
        )
        readable_samples(self)

    def __getitem__(self, i):
        image, notes = super().__getitem__(i)
        record = self.truth.imgs[self.image_ids[i]]
        size = (record["height"], record["width"])
        found = tuple(image.shape[-2:])
        if found != size:
            raise UserError(
                f"{self.paths[i]}: has (after its EXIF rotation) {found} pixels, its annotations are for "
                f"{size}"
            )
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (note["bbox"] for note in notes)]
        labels = [1 + self.category_ids.index(note["category_id"]) for note in notes]
        masks = [self.truth.annToMask(note) for note in notes]
        return image, as_target(boxes, labels, np.reshape(masks, (-1, *size)))


class DrawnObjects(Shapes):
    """Drawings with one to four objects per image, anywhere, half as large as those of `Shapes`. A sample is
    one of CocoObjects."""

    category_ids = list(range(1, 1 + len(SHAPES)))

    @property
    def image_ids(self):
        return range(self.length)

    def __getitem__(self, i):
        rng = np.random.default_rng(seed_of("objects", self.split, i))
        canvas = self.background(rng)
        half = np.array(self.image_size[::-1]) / min(self.image_size)  # of width and height
        placed = []
        objects = []
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

    @cached_property
    def truth(self):
        """The objects of the whole split as pycocotools holds them."""
        # Write them as rows of results, because `coco_results` makes boxes and RLEs in COCO's form. It wants
        # scores, which truth does not have: give it the labels in their place.
        notes = []
        for i in self.image_ids:
            target = self[i][1]
            masks = target["masks"].unsqueeze(1)
            perfect = {**target, "masks": masks, "scores": target["labels"]}
            notes += coco_results(perfect, i, self.category_ids)
        height, width = self.image_size
        content = {
            "images": [{"id": i, "height": height, "width": width} for i in self.image_ids],
            "annotations": notes,
            "categories": [{"id": k} for k in self.category_ids],
        }
        return coco_truth(content)


def check_pycocotools():
    if coco is None:
        raise UserError(
            "--task detect reads COCO's files and computes its metric with pycocotools: pip install "
            "pycocotools"
        )


def open_objects(args, split):
    """--data -> a set with boxes and masks."""
    check_pycocotools()
    if args.data == "shapes":
        return DrawnObjects(args.image_size, split, DRAWN[split])
    found = sorted(Path(args.data, "annotations").glob(f"instances_{split}*.json"))
    if len(found) != 1:
        raise UserError(
            f"--data {args.data}: neither shapes nor a folder in COCO's layout; it needs one "
            f"annotations/instances_{split}*.json and has {len(found)}"
        )
    return CocoObjects(found[0], split == "train")


class KeepTwoPixels:
    """What the next two classes add to torchvision's transforms, which round the sides of a thin image down
    to 0: no side becomes shorter than two pixels."""

    def make_params(self, flat_inputs):
        size = super().make_params(flat_inputs)["size"]
        return {"size": [max(2, side) for side in size]}


class ShortestSize(KeepTwoPixels, v2.RandomShortestSize):
    """(shorts, long): the short side to one of `shorts`, or the long one to `long` if that is smaller."""


class ScaleJitter(KeepTwoPixels, v2.ScaleJitter):
    """((width, height), (low, high)): to low to high times the largest size that fits."""


class ObjectTransform:
    """Training images with their objects: resize (--resize), flip. "multi-scale": the short side to .6 to 1
    of min(image_size), in eleven steps (CAE Appendix A: 480 to 800), the long one at most max(image_size).
    "jitter": to .1 to 2 times image_size, then a crop of it, filled with the mean colour (ViTDet)."""

    def __init__(self, args, mean):
        size = args.image_size
        shorts = [round(min(size) * part / 25) for part in range(15, 26)]
        self.jitter = args.resize == "jitter"
        self.scale = ScaleJitter(size[::-1], (0.1, 2.0)) if self.jitter else ShortestSize(shorts, max(size))
        self.crop = random_crop(size, mean, 0)
        self.rest = v2.Compose(
            [
                v2.RandomHorizontalFlip(),
                v2.ClampBoundingBoxes(),
                v2.SanitizeBoundingBoxes(),
                v2.ToPureTensor(),
            ]
        )

    def __call__(self, image, target):
        image, target = self.scale(image, target)
        if self.jitter:
            # Crop. Boxes are those of what is left of the masks, as ViTDet's.
            image, target = self.crop(image, target)
            left = target["masks"].bool().any(dim=(1, 2))
            masks = target["masks"][left]
            boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])  # a box ends behind its last pixel
            target = as_target(boxes, target["labels"][left], masks)
        return self.rest(image, target)


def main(argv=None):
    """Parse, join the processes, then evaluate a finished run or make a new one."""
    run_program("dense.py", argv, parse_args, program)


if __name__ == "__main__":
    main()
