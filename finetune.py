"""What a pre-trained encoder is worth: fine-tuning, linear and attentive probing, k nearest neighbours, semantic segmentation, detection with masks.

Reading order of the project: vit -> mrmae -> mixedae -> cae -> data -> train -> **finetune**.

    python finetune.py --encoder runs/mixedae/encoder.pt --protocol linear --cache-features            # a probe on `shapes`, in a minute
    python finetune.py --encoder none --protocol linear --cache-features                               # its baseline: a random encoder
    python finetune.py --encoder mae_pretrain_vit_base.pth --protocol finetune --data path/to/imagenet   # a published file
    python finetune.py --encoder ... --protocol finetune --data aircraft cars pets                     # several sets, one row of a table
    python finetune.py --evaluate runs/a runs/b --data ... --predict path/to/images                    # finished classifiers, as an ensemble
    python finetune.py --encoder ... --protocol segment --data path/to/ADEChallengeData2016            # or any folder in its layout, or `shapes`
    python finetune.py --encoder ... --protocol detect --data path/to/coco                             # the same

A protocol decides what is trained on top of the encoder:

    finetune    images -- encoder, all of it trained --> mean of the patch tokens (B, D) -- new LayerNorm, linear --> logits (B, classes)
    linear      images -- encoder, frozen --> CLS or mean of the patches (B, D) -- BatchNorm without affine, linear --> logits
    attentive   images -- encoder, frozen --> patches (B, L, D) -- cross-attention of one learned query --> (B, D) -- BatchNorm, linear --> logits
    segment     images -- encoder, trained --> outputs of four blocks (B, D, h, w) -- four scales -- UperNet --> a class for each pixel
                images -- encoder, frozen --> patches -- BatchNorm, linear (--head linear) --> a class for each pixel
    detect      images -- encoder, trained --> outputs of four blocks, or of the last -- a pyramid of five maps -- Mask R-CNN --> boxes, classes, masks

Sources: MixedAE Sec. 4.2 and 4.3 (as MAE), MAE's code for fine-tuning and linear probing, CAE Sec. 5.2 and Appendix A for attentive probing,
MR-MAE Sec. 4.1. Where they differ from what stands here (ours, because libraries do it):
    - MixUp, CutMix and RandAugment are torchvision's. MixUp's partner is the neighbour in the batch (timm: the batch reversed); RandAugment,
      with timm's scale of 10, applies both operations always, with one magnitude, by bilinear interpolation (timm: each with probability .5,
      with magnitude noise .5, "increasing" operations, bicubic).
    - CAE's code fine-tunes with a learned relative position bias, which its paper does not mention; it is not here.
    - The random crop of the probes tries ten times for a crop that fits (the authors' draw once and clamp it).
    - BatchNorm uses its running statistics at test time (CAE's code uses those of the test batch).
    - The linear probe's BatchNorm averages over all batches (MAE's code forgets, with momentum .1): see `Classifier`.
    - MixedAE does not say how Table 2 was trained; here it is fine-tuning as on ImageNet, VOC2007 with a binary cross-entropy a class.
    - Segmentation follows BEiT's and CAE's code (which is mmsegmentation's), without their learned relative position bias; photometric distortion is
      torchvision's colour jitter, see data.SceneTransform. BatchNorm is synchronised between processes on CUDA alone.
    - Detection is torchvision's Mask R-CNN: see `Detector`. Cascade Mask R-CNN (MixedAE Sec. 4.3, CAE Table 7) and ViTDet's window attention are not here, nor
      the second augmentation of CAE's code (resize, crop, resize), which its paper does not mention.
    - best.pt is the epoch that is best on the test set, as MAE's code counts it: an optimistic number. results.json has the last epoch's too.
"""
import argparse
import colorsys
import contextlib
import csv
import io
import json
import sys
import xml.etree.ElementTree
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.datasets
from PIL import Image
from torch import nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork, MultiScaleRoIAlign  # the first: convolution, BatchNorm, ReLU
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks
from tqdm import tqdm

import cae
import train
from data import (IGNORE, MEAN, NAMES, STD, BrokenImages, Cover, Labelled, ObjectTransform, RunFolder, Samples, SceneTransform, add_data_args, as_target,
                  coco_tools, collate, decode, heat_map, loader, normalize, open_folder, open_objects, open_scenes, open_sets, picture_sheet, quietly,
                  read_log, train_transform)
from mrmae import from_official_mcmae
from train import (RANGES, Parser, add_run_args, assemble, check_ranges, end_epoch, in_turn, inference, learning_rate, load_checkpoint,
                   lr_at, on_device, resume, run_program, work)
from train import parse_args as train_args
from vit import (UserError, ViT, add_size_args, build_encoder, drop_paths, init_weights, load_file, pack_encoder, read_shape, resize_positions, say,
                 strip_prefixes, unpack_encoder)

# --------------------------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------------------------
# What differs between protocols. Batches and rates are ours, for a laptop, and fine-tuning's epochs; the papers' are README commands.
DEFAULTS = {
    "finetune": dict(epochs=10, batch_size=64, warmup_epochs=1, weight_decay=0.05, crop_scale=[0.08, 1.0]),  # MAE's code; crop_scale: timm's
    "linear": dict(epochs=90, batch_size=256, warmup_epochs=10, weight_decay=0.0, crop_scale=[0.08, 1.0]),  # MAE's code: LARS without decay
    "attentive": dict(epochs=90, batch_size=256, warmup_epochs=10, weight_decay=0.0, crop_scale=[0.08, 1.0]),  # CAE Appendix A
    "segment": dict(epochs=5, batch_size=16, warmup_epochs=0.5, weight_decay=0.05),  # CAE's code, but for the epochs
    "detect": dict(epochs=1, batch_size=8, warmup_epochs=0.1, weight_decay=0.05, image_size=[128]),  # weight decay: CAE's code
}
DENSE = ("segment", "detect")
LIMITS = {**RANGES, "drop_path": (0, 1), "layer_decay": (1e-6, 1 + 1e-9), "smoothing": (0, 1), "mixup": (0, 1e9), "cutmix": (0, 1e9), "erasing": (0, 1 + 1e-9),
           "head_width": (1, 1e6), "proposals": (1, 1e6), "rois": (4, 1e6), "randaugment": (0, 11), "label_fraction": (1e-9, 1 + 1e-9), "neighbours": (1, 1e9),
           "heads": (1, 1e9)}
FREE_FLAGS = train.FREE_FLAGS | {"evaluate", "predict", "several", "neighbours"}  # may differ when a run resumes


def parse_args(argv=None):
    """Flags -> args. Two phases, --protocol first, because each protocol has flags and defaults of its own."""
    argv = sys.argv[1:] if argv is None else list(argv)
    first = Parser(prog="finetune.py", add_help=False, allow_abbrev=False)
    first.add_argument("--protocol", choices=DEFAULTS, default="linear", help="what is trained on top of the encoder")
    protocol = first.parse_known_args(argv)[0].protocol

    parser = Parser(prog=f"finetune.py --protocol {protocol}", parents=[first], allow_abbrev=False, description=__doc__.splitlines()[0],
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("what to evaluate").add_argument
    add("--encoder", default="runs/mixedae/encoder.pt", help="an encoder.pt, a published file (README.md lists them), or none: random weights")
    add("--evaluate", nargs="+", metavar="RUN", help="evaluate these finished runs, several as an ensemble of averaged probabilities, and stop")
    add("--predict", metavar="FOLDER", help="with --evaluate: what it finds in the images of this folder: classes as a CSV, masks, or COCO's format of results")
    if protocol not in DENSE:
        add("--label-fraction", type=float, default=1.0, help="use this share of each class's training images (ours)")
    add("--mean", type=float, nargs=3, metavar=("R", "G", "B"), help="what images are normalised with [as encoder.pt says; published files: ImageNet's, but timm's "
        "augreg files want .5 .5 .5]")
    add("--std", type=float, nargs=3, metavar=("R", "G", "B"), help="the same, the deviation [timm's augreg files: .5 .5 .5]")
    add_run_args(parser)
    layouts = {"segment": "ADE20K's layout: images/ and annotations/, each with training/ and validation/, and classes.txt",
               "detect": "COCO's: annotations/instances_train*.json and instances_val*.json, and folders of images named as the files from train and val on"}
    add_data_args(parser, [*NAMES, *SETS], dense=layouts.get(protocol, ""), nargs="+", default=None)
    add_size_args(parser, decoder=False)
    if protocol == "finetune":
        add_finetune_args(parser)
    elif protocol == "segment":
        add_segment_args(parser)
    elif protocol == "detect":
        add_detect_args(parser)
    else:
        add = parser.add_argument_group("probes").add_argument
        add("--cache-features", action="store_true", help="compute the features once, of the whole image: no augmentation, but seconds instead of minutes. They stay in "
            "memory: attentive, ViT-B at 224 pixels, .6 MB an image; else 3 kB")
        add("--neighbours", type=int, default=20, help="k of the k-nearest-neighbour accuracy that cached features give for free (DINO: 20)")
    if protocol in ("finetune", "linear"):
        add("--feature", choices=("cls", "mean"), help="the class token or the mean of the patch tokens [finetune: mean; linear: as the encoder's authors]")
    parser.set_defaults(**{"image_size": None, "patch_size": None, "size": None, **DEFAULTS[protocol]})

    args = parser.parse_args(argv)
    check_ranges(parser, args, LIMITS)
    if args.predict and not args.evaluate:
        parser.error(f"--predict {args.predict}: goes with --evaluate RUN")
    args.data = args.data or ([] if args.evaluate else ["shapes"])
    args.several = len(args.data) > 1
    names = [Path(name).name for name in args.data]
    if twice := [data for data, name in zip(args.data, names) if names.count(name) > 1]:
        parser.error(f"--data {' '.join(twice)}: runs of the same name would share a folder; give them one by one, each with its --out")
    if protocol == "segment":
        check_segment_args(parser, args)
    if protocol == "detect":
        if args.compile and args.resize == "multi-scale" and not args.evaluate:
            parser.error("--compile: wants images of one size, so --resize jitter")
        if min(args.image_size) < 32:
            parser.error(f"--image-size {' '.join(map(str, args.image_size))}: detection wants 32 pixels or more")
    if (args.mean is None) != (args.std is None) or not all(value > 0 for value in args.std or ()):
        parser.error(f"--mean {args.mean} --std {args.std}: give both, and a deviation above 0")
    return args


def add_segment_args(parser):
    """Numbers of CAE's code for ViT-B at 512 pixels (Appendix A), which is BEiT's."""
    add = parser.add_argument_group("segmentation").add_argument
    add("--head", choices=("uper", "linear"), default="uper", help="UperNet with everything trained, or a linear layer on the patches of the frozen encoder")
    add("--head-width", type=int, help="uper: its channels [the encoder's width]")
    add("--layer-decay", type=float, help="uper: each layer below the head learns at this much of the rate above it [.65]")
    add("--drop-path", type=float, help="uper: stochastic depth of the last block, rising linearly from 0 in the first [.1]")
    add("--scale", type=float, nargs=2, default=[0.5, 2.0], metavar=("MIN", "MAX"), help="training images are resized to this much of the crop, at random")
    add("--window", choices=("slide", "whole"), help="test on windows of the crop's size, two thirds of it apart, or on the whole image at once [slide; with "
        "--evaluate as the run]")


def check_segment_args(parser, args):
    """One clear line for flags that a linear head has no use for; else their defaults."""
    for flag, default in (("head_width", None), ("layer_decay", 0.65), ("drop_path", 0.1)):
        if args.head == "linear" and getattr(args, flag) is not None:
            parser.error(f"--{flag.replace('_', '-')} goes with --head uper; a linear head leaves the encoder as it is")
        if getattr(args, flag) is None:
            setattr(args, flag, default)
    if not args.evaluate and args.window is None:
        args.window = "slide"
    if not 0 < args.scale[0] <= args.scale[1] < 100:
        parser.error(f"--scale {args.scale[0]} {args.scale[1]}: needs 0 < MIN <= MAX")


def add_detect_args(parser):
    """CAE's numbers (Appendix A and its code) for ViT-B, where a laptop can follow. Test images have a short side of the smaller --image-size, a long one of at
    most the larger."""
    add = parser.add_argument_group("detection").add_argument
    add("--neck", choices=("fpn", "simple"), default="fpn", help="maps of four strides from four blocks, then torchvision's FPN (CAE); or all from the last block, as "
        "ViTDet and MR-MAE have them")
    add("--resize", choices=("multi-scale", "jitter"), default="multi-scale", help="training images: short side .6 to 1 of the smaller --image-size (CAE: 480 to 800), "
        "long side at most the larger; or .1 to 2 of --image-size, then a crop of it (ViTDet)")
    add("--head-width", type=int, default=32, help="channels of the neck and the heads; ours (the papers: 256)")
    add("--proposals", type=int, default=100, help="boxes that the first stage hands on, in training twice as many; ours (torchvision, detectron2: 1000)")
    add("--rois", type=int, default=32, help="of these, boxes of an image that the heads learn from; ours (detectron2, mmdetection: 512)")
    add("--layer-decay", type=float, default=0.75, help="each layer below the neck learns at this much of the rate above it")
    add("--drop-path", type=float, default=0.2, help="stochastic depth of the last block, rising linearly from 0 in the first")


def add_finetune_args(parser):
    """Numbers of MAE's code for ViT-B at 224 pixels, which MixedAE Sec. 4.2 follows; CAE's (Appendix A) are the same ones."""
    add = parser.add_argument_group("fine-tuning").add_argument
    add("--layer-decay", type=float, default=0.65, help="each layer below the head learns at this much of the rate above it")
    add("--drop-path", type=float, default=0.1, help="stochastic depth of the last block, rising linearly from 0 in the first")
    add("--smoothing", type=float, default=0.1, help="label smoothing")
    add("--mixup", type=float, default=0.8, help="alpha of MixUp; 0: off")
    add("--cutmix", type=float, default=1.0, help="alpha of CutMix; 0: off. With both, a coin decides for each batch")
    add("--randaugment", type=int, default=9, help="magnitude of two RandAugment operations, of 10 as timm counts; 0: off")
    add("--erasing", type=float, default=0.25, help="probability of erasing a random box of an image")


# --------------------------------------------------------------------------------------------------------------------
# Encoders
# --------------------------------------------------------------------------------------------------------------------
def from_cae(weights):
    """A CAE encoder's names, its prefix `encoder.` stripped, -> ours; the regressor's position table would take the encoder's place."""
    return cae.from_official({name: value for name, value in weights.items() if not name.endswith("rd_pos_embed")})


# Published layouts: how to know one by its names; where the weights lie in a file (or they are the file); what turns its names into those
# of our ViT; the feature that its authors probe; heads by width, which no state dict shows. The first that fits is taken.
Layout = namedtuple("Layout", "name sign inside convert feature heads")
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
LAYOUTS = (Layout("CAE", "blocks.0.attn.q_bias", ("model", "module", "state_dict"), from_cae, "cls", {**HEADS, 384: 12}),
           Layout("MCMAE", "blocks3.0.norm1.weight", ("model",), lambda weights: strip_prefixes(from_official_mcmae(weights)), "mean", HEADS),
           Layout("DINO", "", ("teacher", "student"), dict, "cls", HEADS),
           Layout("MAE or timm", "", ("model", "state_dict"), dict, "cls", HEADS))
LEFT_ASIDE = ("head", "fc_norm", "pre_logits", "decoder", "mask_token", "regressor", "project", "lm_head", "stage_fusion")  # what is no part of an encoder


def changed(args, **values):
    """A copy of args with other values."""
    return argparse.Namespace(**{**vars(args), **values})


def read_published(state, path, heads):
    """A published file's content -> (weights by our names, shape of the ViT, feature that its authors probe, layout)."""
    if "args" in state and ({"optimizer", "step"} <= state.keys() or {"config", "info", "classes"} <= state.keys()):
        raise UserError(f"{path}: a checkpoint of this project, not an encoder; give the encoder.pt of the run that made it")
    for layout in LAYOUTS:
        weights = next((state[key] for key in layout.inside if isinstance(state.get(key), dict)), {} if layout.name == "DINO" else state)
        weights = strip_prefixes({name: value for name, value in weights.items() if isinstance(name, str) and isinstance(value, torch.Tensor)})
        if weights and (not layout.sign or layout.sign in weights):
            break
    weights = layout.convert(weights)
    try:
        shape = read_shape(weights)
        width = shape["width"]
        if shape["channels"] != 3:
            raise ValueError
    except (KeyError, ValueError, IndexError, TypeError, ZeroDivisionError):
        raise UserError(f"{path}: no Vision Transformer for colour images in it (looked for patch_embed.proj.weight, pos_embed and "
                        f"blocks.0.mlp.fc1.weight)") from None
    if heads is None and width not in layout.heads:
        raise UserError(f"{path}: its file does not say how many heads a ViT of width {width} has; give --heads")
    return weights, {**shape, "heads": heads or layout.heads[width]}, layout.feature, layout.name


def match(weights, shape, path, layout):
    """The encoder's tensors of a published file, all of them, and none in the encoder that ours has not: else a UserError that names them."""
    ours = {name: tuple(value.shape) for name, value in ViT(**shape).state_dict().items()}
    left = weights.keys() - ours.keys()
    wrong = [f"no {name}" for name in ours if name not in weights]
    wrong += [f"{name} {tuple(weights[name].shape)} (here {size})" for name, size in ours.items() if name in weights and tuple(weights[name].shape) != size]
    wrong += [f"{name}, which our ViT has not" for name in sorted(left) if not name.startswith(LEFT_ASIDE)]
    if wrong:
        raise UserError(f"{path}: does not fit a ViT: {', '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}")
    say(f"{path}: {layout} layout, all {len(ours)} tensors of the encoder found, {len(left)} others (heads, decoder) left aside")
    return {name: weights[name] for name in ours}


def open_encoder(args):
    """--encoder -> (ViT at --image-size, info, state of a LayerNorm for mean features or None). info has method, feature, mean, std."""
    info, fc_norm, path = {"method": "random", "feature": "mean", "mean": list(MEAN), "std": list(STD)}, None, args.encoder
    given = {flag: getattr(args, flag) for flag in ("image_size", "patch_size", "size", "width", "depth", "heads") if getattr(args, flag) is not None}
    statistics = {key: value for key, value in (("mean", args.mean), ("std", args.std)) if value}
    if path == "none":
        words = [word for flag, value in given.items() for word in (f"--{flag.replace('_', '-')}", *(value if isinstance(value, list) else [value]))]
        return build_encoder(train_args(["--method", "mixedae", *map(str, words)])), {**info, **statistics}, None

    state = load_file(path)
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds no weights by name")
    if {"config", "state_dict"} <= state.keys():
        info = unpack_encoder(state, path)[1]
        weights, shape = state["state_dict"], {key: value for key, value in state["config"].items() if key != "kind"}
    else:
        weights, shape, info["feature"], layout = read_published(state, path, args.heads)
        info["method"] = Path(path).stem
        if {"fc_norm.weight", "fc_norm.bias"} <= weights.keys() and "norm.weight" not in weights:
            fc_norm, info["feature"] = {key: weights.pop(f"fc_norm.{key}") for key in ("weight", "bias")}, "mean"
            weights |= {f"norm.{key}": value for key, value in fc_norm.items()}
            fills = args.protocol == "finetune" and args.feature != "cls"
            say(f"{path}: fine-tuned with mean pooling; its fc_norm {'fills the new LayerNorm' if fills else 'stands for norm'}")
        weights = match(weights, shape, path, layout)

    for flag in given.keys() - {"image_size"}:
        if given[flag] != shape.get(flag):
            raise UserError(f"--{flag.replace('_', '-')} {given[flag]}: {path} has {shape.get(flag, 'a size of its own')}; leave the flag out")
    size = given.get("image_size", shape["image_size"])
    encoder = ViT(**{**shape, "image_size": [size[0], size[-1]]})
    grid = [side // shape["patch_size"] for side in shape["image_size"]]
    encoder.load_state_dict({**weights, "pos_embed": resize_positions(weights["pos_embed"], grid, encoder.grid)})
    return encoder, {**info, **statistics}, fc_norm


# --------------------------------------------------------------------------------------------------------------------
# Labelled sets
# --------------------------------------------------------------------------------------------------------------------
VOC_CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep sofa train "
               "tvmonitor").split()


def voc_labels(dataset):
    """Which classes an image shows, (20,) each; an object marked difficult does not count (Ericsson et al., CVPR 2021)."""
    labels = []
    for path in dataset.targets:
        objects = xml.etree.ElementTree.parse(path).getroot().iter("object")
        shown = {thing.findtext("name") for thing in objects if thing.findtext("difficult", "0").strip() == "0"}
        labels.append([float(name in shown) for name in VOC_CLASSES])
    return labels


# The transfer sets of MixedAE Table 2 but for CIFAR, which data.py opens: torchvision's class, arguments of the training splits and of
# the test split (or lists of files that choose one), labels, classes, the metric of the literature, sizes, and what to do by hand.
Row = namedtuple("Row", "kind train test labels classes metric sizes by_hand")
SETS = {
    "aircraft": Row("FGVCAircraft", [{"split": "trainval"}], {"split": "test"}, lambda d: d._labels, lambda d: d.classes, "mean_per_class", (6667, 3333), ""),
    "caltech101": Row("Caltech101", "caltech101/train.txt", "caltech101/test.txt", lambda d: d.y, lambda d: d.categories, "mean_per_class", (2416, 6728),
                      "it has no official split: put Ericsson et al.'s lists of lines like accordion/image_0001.jpg into caltech101/train.txt and caltech101/test.txt"),
    "cars": Row("StanfordCars", [{"split": "train"}], {"split": "test"}, lambda d: [y for _, y in d._samples], lambda d: d.classes, "top1", (8144, 8041),
                "its download is dead: put cars_train/, cars_test/, devkit/ and cars_test_annos_withlabels.mat into stanford_cars/"),
    "dtd": Row("DTD", [{"split": "train"}, {"split": "val"}], {"split": "test"}, lambda d: d._labels, lambda d: d.classes, "top1", (3760, 1880), ""),
    "flowers": Row("Flowers102", [{"split": "train"}, {"split": "val"}], {"split": "test"}, lambda d: d._labels, lambda d: d.classes,
                   "mean_per_class", (2040, 6149), ""),
    "food": Row("Food101", [{"split": "train"}], {"split": "test"}, lambda d: d._labels, lambda d: d.classes, "top1", (75750, 25250), ""),
    "pets": Row("OxfordIIITPet", [{"split": "trainval"}], {"split": "test"}, lambda d: d._labels, lambda d: d.classes, "mean_per_class", (3680, 3669), ""),
    "sun397": Row("SUN397", "SUN397/Training_01.txt", "SUN397/Testing_01.txt", lambda d: d._labels, lambda d: d.classes, "top1", (19850, 19850),
                  "its download is dead: put the folder SUN397/ with Training_01.txt and Testing_01.txt of its Partitions.zip there"),
    "voc2007": Row("VOCDetection", [{"year": "2007", "image_set": "trainval"}], {"year": "2007", "image_set": "test"}, voc_labels,
                   lambda d: VOC_CLASSES, "map11", (5011, 4952), ""),
}


def list_chooses(dataset, labels, path, sizes):
    """Indices of a data set's images that a text file of `sizes` paths names, '/abbey/sun_x.jpg' or 'accordion/image_0001.jpg'."""
    if hasattr(dataset, "_image_files"):  # SUN397, whose own order depends on the disk
        place = {"/" + file.relative_to(dataset._data_dir).as_posix(): i for i, file in enumerate(dataset._image_files)}
    else:  # Caltech101
        place = {f"/{dataset.categories[y]}/image_{dataset.index[i]:04d}.jpg": i for i, y in enumerate(labels)}
    lines = ["/" + line.strip().lstrip("/") for line in Path(path).read_text().splitlines() if line.strip()]
    if sizes and len(lines) != sizes:
        raise UserError(f"{path}: lists {len(lines)} images, not {sizes}; is it complete?")
    background = [line for line in lines if line.startswith("/BACKGROUND_Google/")]
    if background:
        say(f"{path}: {len(background)} of its {len(lines)} images are of BACKGROUND_Google, which torchvision leaves out")
        lines = [line for line in lines if line not in set(background)]
    missing = [line for line in lines if line not in place]
    if missing:
        raise UserError(f"{path}: {len(missing)} of its {len(lines)} images are not there, the first is {missing[0]}")
    return [place[line] for line in lines]


def open_transfer_set(name, args):
    """A row of SETS -> (training set, test set), sizes checked."""
    row = SETS[name]
    kind, root = getattr(torchvision.datasets, row.kind), Path(args.data_root)
    extra = {"download": args.download}
    try:
        if isinstance(row.train, str):  # a list of files is the split
            dataset = kind(root, **extra)
            labels = row.labels(dataset)
            whole = Labelled([(dataset, labels)], row.classes(dataset))
            train, test = (whole.choose(list_chooses(dataset, labels, root / path, size)) for path, size in zip((row.train, row.test), row.sizes))
        else:
            parts = [kind(root, **{**split, **extra}) for split in row.train]
            train = Labelled([(part, row.labels(part)) for part in parts], row.classes(parts[0]))
            last = kind(root, **{**row.test, **extra})
            test = Labelled([(last, row.labels(last))], row.classes(last))
        train[0], test[0]  # read one of each: some sets find out only here that scipy or a file is missing
    except UserError:
        raise
    except Exception as error:  # each set and each server fails in its own way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        advice = "pip install scipy" if "scipy" in reason.lower() else row.by_hand or ("is there a network?" if args.download else "add --download")
        raise UserError(f"--data {name}: {reason} -- looked below {args.data_root} (--data-root); {advice}") from None
    if not isinstance(row.train, str) and (len(train), len(test)) != row.sizes:
        raise UserError(f"--data {name}: {len(train)} training and {len(test)} test images below {args.data_root}, not {row.sizes[0]} and {row.sizes[1]}; "
                        f"is it complete?")
    return train, test


def open_labelled(name, args):
    """A word of --data -> (training set, test set, metric)."""
    if name in SETS:
        train, test = open_transfer_set(name, args)
        metric = SETS[name].metric
    else:
        found = open_sets(changed(args, data=name))
        if found[1] is None and args.evaluate:
            found = found[0], found[0]  # a folder without train/ and val/ is tested whole
        if not all(part is None or part.classes for part in found):
            raise UserError(f"--data {name}: has no labels; a labelled folder has one folder a class below train/ and val/")
        if found[1] is None:
            raise UserError(f"--data {name}: has no test images; put them into {name}/val or {name}/test, beside {name}/train")
        if list(found[0].classes) != list(found[1].classes):
            differ = sorted(set(found[0].classes) ^ set(found[1].classes))
            raise UserError(f"--data {name}: training and test images have different classes, the first that differs is {differ[0]}")
        train, test = (Labelled([(part, part.labels)], part.classes) for part in found)
        metric = "top1"
    if len(train.classes) < 2:
        raise UserError(f"--data {name}: has one class only ({train.classes[0]}); nothing can be told apart")
    if args.label_fraction < 1:
        train = fewer_labels(train, args)
    return train, test, metric


def fewer_labels(train, args):
    """--label-fraction of each class's images, at least one, always the same ones for a seed."""
    if isinstance(train.label(0), list):
        raise UserError("--label-fraction: is for one label an image; leave it out for voc2007")
    by_class = {}
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed)).tolist()
    for i in order:
        by_class.setdefault(train.label(i), []).append(i)
    return train.choose(sorted(i for ids in by_class.values() for i in ids[: max(1, round(args.label_fraction * len(ids)))]))


class EachOnce(torch.utils.data.Dataset):
    """(epoch, i) -> (image, label, broken names) for testing: every sample counts once, so a broken image is shown black, and named.

    The transform is MAE's: 256 pixels for 224, then the centre; an image that has the size already is left as it is (ours).
    """

    def __init__(self, dataset, image_size):
        self.dataset, self.image_size = dataset, list(image_size)
        self.crop = v2.Compose([Cover([int(s * 256 / 224) if s <= 224 else s for s in image_size]), v2.CenterCrop(self.image_size)])

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        _, i = index
        try:
            image, label = self.dataset[i]
        except Exception:  # bad files make PIL and torchvision raise all kinds
            return torch.zeros(3, *self.image_size, dtype=torch.uint8), self.dataset.label(i), [self.dataset.name(i)]
        return image if list(image.shape[-2:]) == self.image_size else self.crop(image), label, []


# --------------------------------------------------------------------------------------------------------------------
# What is trained on top of an encoder
# --------------------------------------------------------------------------------------------------------------------
class AttentiveHead(nn.Module):
    """CAE Sec. 5.2: one cross-attention of a learned query over the frozen patches; no MLP, no skip; BatchNorm without affine; linear.

    As in CAE's code the query starts at zero (so every patch counts the same at first), query, keys and values pass a LayerNorm each,
    and keys have no bias. CAE's code lets the class token in as a key; the paper says patches, and so do we.
    """

    def __init__(self, width, heads, classes):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.q, self.k, self.v, self.proj = nn.Linear(width, width), nn.Linear(width, width, bias=False), nn.Linear(width, width), nn.Linear(width, width)
        self.apply(init_weights)
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.fc = started(nn.Linear(width, classes))

    def attend(self, patches):
        """patches (B, L, D) -> attention of the query (B, H, 1, L), values (B, H, L, D / H)."""
        q, k, v = self.q(self.norm_q(self.query)), self.k(self.norm_k(patches)), self.v(self.norm_v(patches))  # (1, 1, D), (B, L, D) twice
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))  # (1, H, 1, D / H), (B, H, L, D / H) twice
        return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1), v

    def forward(self, patches):  # (B, L, D) -> logits
        attention, v = self.attend(patches)
        pooled = (attention.to(v.dtype) @ v).transpose(1, 2).flatten(1)  # (B, D)
        return self.fc(self.norm(self.proj(pooled)))


def started(layer, std=0.01):
    """A last layer, linear or of 1 x 1 convolutions, as the authors' code starts it."""
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


class Classifier(nn.Module):
    """An encoder and what its protocol trains. forward(inputs, targets) -> loss (), {}; logits(inputs) -> (B, classes).

    inputs: normalised images (B, 3, H, W), or with cached features what `features` returned for them.
    """

    def __init__(self, encoder, info, fc_norm, args, classes, multi_label):
        super().__init__()
        self.encoder, self.protocol, self.multi_label = encoder, args.protocol, multi_label
        self.frozen = args.protocol != "finetune"
        self.feature = "patches" if args.protocol == "attentive" else args.feature or (info["feature"] if self.frozen else "mean")
        if self.feature == "cls" and not encoder.first:
            raise UserError("--feature cls: this encoder has no class token; use mean")
        D = encoder.width
        if self.frozen:
            encoder.requires_grad_(False)
            # eps: MAE's code. Its running mean forgets (momentum .1) and needs some fifty steps to forget its start at zero; the features
            # of a frozen encoder do not move, so here it is the average of all batches (None), which is right from the first one on.
            batch_norm = nn.BatchNorm1d(D, affine=False, eps=1e-6, momentum=None)
            heads = encoder.config["heads"]  # CAE-B's are 12, as its encoder's
            self.head = AttentiveHead(D, heads, classes) if args.protocol == "attentive" else nn.Sequential(batch_norm, started(nn.Linear(D, classes)))
            return
        encoder.pos_embed.requires_grad_(True)  # MAE's code: trained, after it was resized
        drop_paths(encoder, args.drop_path)
        self.fc_norm = nn.Identity()
        if self.feature == "mean":  # the mean of raw patch tokens, then a LayerNorm of its own, in place of the encoder's
            encoder.norm, self.fc_norm = nn.Identity(), nn.LayerNorm(D, eps=1e-6)
            if fc_norm:
                self.fc_norm.load_state_dict(fc_norm)
        self.head = started(nn.Linear(D, classes), std=2e-5)  # MAE's code

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def features(self, images):
        """Normalised images (B, 3, H, W) -> (B, D), for the attentive protocol (B, L, D)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            tokens = self.encoder.encode(self.encoder.embed(images))  # (B, 1 + L, D), without a class token (B, L, D)
        if self.feature == "cls":
            return tokens[:, 0]
        patches = tokens[:, self.encoder.first :]
        return patches.mean(dim=1) if self.feature == "mean" else patches

    def logits(self, inputs):
        features = self.features(inputs) if inputs.ndim == 4 else inputs
        return self.head(features if self.frozen else self.fc_norm(features)).float()

    def forward(self, inputs, targets):
        """targets: classes (B,), or their probabilities (B, classes)."""
        logits = self.logits(inputs)
        loss = F.binary_cross_entropy_with_logits(logits, targets) if self.multi_label else F.cross_entropy(logits, targets)
        return loss, {}


# --------------------------------------------------------------------------------------------------------------------
# Semantic segmentation: UperNet (Xiao et al., ECCV 2018) on a ViT, as BEiT's and CAE's code has it, or one linear layer
# --------------------------------------------------------------------------------------------------------------------
class Scales(nn.Module):
    """Four maps (B, D, h, w) of a ViT with patches of 16 pixels -> maps of strides 4, 8, 16 and 32."""

    def __init__(self, width):
        super().__init__()
        up = partial(nn.ConvTranspose2d, width, width, kernel_size=2, stride=2)
        self.by_stride = nn.ModuleList([nn.Sequential(up(), nn.BatchNorm2d(width), nn.GELU(), up()), up(), nn.Identity(), nn.MaxPool2d(2, ceil_mode=True)])

    def forward(self, maps):
        return [scale(x) for scale, x in zip(self.by_stride, maps)]


def resized(x, size):
    """(B, C, h, w) -> (B, C, *size), bilinear."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class UperHead(nn.Module):
    """Pyramid pooling on the coarsest map, a top-down path to the finest one, all levels together: four maps (B, D, ...) -> (B, classes, h, w) of the finest."""

    def __init__(self, width, channels, classes, pools=(1, 2, 3, 6), dropout=0.1):
        super().__init__()
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(size), Conv2dNormActivation(width, channels, 1)) for size in pools)
        self.bottleneck = Conv2dNormActivation(width + len(pools) * channels, channels, 3)
        self.lateral = nn.ModuleList(Conv2dNormActivation(width, channels, 1) for _ in range(3))
        self.smooth = nn.ModuleList(Conv2dNormActivation(channels, channels, 3) for _ in range(3))
        self.fuse = Conv2dNormActivation(4 * channels, channels, 3)
        self.dropout, self.classify = nn.Dropout2d(dropout), started(nn.Conv2d(channels, classes, 1))

    def forward(self, maps):
        last = maps[-1]
        pooled = [resized(pool(last), last.shape[-2:]) for pool in self.pools]
        levels = [lateral(x) for lateral, x in zip(self.lateral, maps)] + [self.bottleneck(torch.cat([last, *pooled], dim=1))]
        for i in (2, 1, 0):  # top-down
            levels[i] = levels[i] + resized(levels[i + 1], levels[i].shape[-2:])
        levels[:3] = [smooth(x) for smooth, x in zip(self.smooth, levels)]
        return self.classify(self.dropout(self.fuse(torch.cat([resized(x, levels[0].shape[-2:]) for x in levels], dim=1))))


def tapped_blocks(depth):
    """Blocks 4, 6, 8 and 12 of 12 (CAE's and BEiT's code), in proportion at other depths; a shallow encoder has one of them twice."""
    return [max(1, round(depth * block / 12)) for block in (4, 6, 8, 12)]


class Segmenter(nn.Module):
    """forward(images, masks) -> loss (), {}; logits(images) -> (B, classes, H, W), of images of any size. Heads: "uper", all trained but the
    position table; "linear", on the frozen patches."""

    def __init__(self, encoder, args, classes):
        super().__init__()
        self.encoder, self.frozen, D = encoder, args.head == "linear", encoder.width
        self.taps = tapped_blocks(len(encoder.blocks))
        self.feature = "patches" if self.frozen else f"blocks {', '.join(map(str, self.taps))}"
        if self.frozen:
            encoder.requires_grad_(False)
            self.head = nn.Sequential(nn.BatchNorm2d(D, affine=False, eps=1e-6, momentum=None), started(nn.Conv2d(D, classes, 1)))  # as in linear probing
            return
        drop_paths(encoder, args.drop_path)
        encoder.norm = nn.Identity()  # maps are raw outputs of blocks
        channels = args.head_width or D
        self.scales, self.head = Scales(D), UperHead(D, channels, classes)
        self.auxiliary = nn.Sequential(Conv2dNormActivation(D, 256, 3), nn.Dropout2d(0.1), started(nn.Conv2d(256, classes, 1)))  # on the third map

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def scores(self, images):
        """Normalised images (B, 3, H, W) -> fp32 scores (B, classes, H, W) of the head and, in training an UperNet, of the auxiliary one. The right and
        lower edges are padded to whole patches."""
        p, (H, W) = self.encoder.patch_size, images.shape[-2:]
        images = F.pad(images, [0, -W % p, 0, -H % p])
        if self.frozen:
            with torch.no_grad():
                patches = self.encoder.features(images)["patches"]  # (B, L, D)
            found = [self.head(patches.transpose(1, 2).unflatten(2, (images.shape[-2] // p, -1)))]
        else:
            maps = self.encoder.features(images, taps=self.taps)["taps"]  # four of (B, D, h, w), raw
            found = [self.head(self.scales(maps)), *([self.auxiliary(maps[2])] if self.training else [])]
        return [resized(x.float(), images.shape[-2:])[..., :H, :W] for x in found]

    def logits(self, images):
        return self.scores(images)[0]

    def forward(self, images, masks):
        """masks (B, H, W) of classes and IGNORE. The mean is over all pixels, ignored ones too, as in mmsegmentation."""
        loss, *auxiliary = [F.cross_entropy(scores, masks.long(), ignore_index=IGNORE, reduction="sum") / masks.numel() for scores in self.scores(images)]
        return loss + 0.4 * sum(auxiliary), {}  # CAE's code; the auxiliary head works in training alone


def segment_image(model, image, crop, window):
    """Scores of one normalised image (1, 3, h, w): of the whole image, or the mean over windows of the crop's size, two thirds of it apart
    -> (1, classes, h, w)."""
    if window == "whole":
        return model.logits(image)
    sides = image.shape[-2:]
    starts = [sorted({min(start, max(side - size, 0)) for start in range(0, side, max(1, size * 2 // 3))}) for side, size in zip(sides, crop)]
    total, count = 0, torch.zeros(1, 1, *sides, device=image.device)
    for top in starts[0]:
        for left in starts[1]:
            part = image[..., top : top + crop[0], left : left + crop[1]]
            place = (left, sides[1] - left - part.shape[-1], top, sides[0] - top - part.shape[-2])
            total = total + F.pad(model.logits(part), place)
            count[..., top : top + part.shape[-2], left : left + part.shape[-1]] += 1
    return total / count


def segmentation_metrics(matrix):
    """Confusion matrix (classes, classes), rows the truth -> {"miou", "mean_accuracy", "pixel_accuracy"} in per cent; classes that never occur do not count."""
    matrix = matrix.double()
    hits, truth, union = matrix.diag(), matrix.sum(dim=1), matrix.sum(dim=1) + matrix.sum(dim=0) - matrix.diag()
    return {"miou": 100 * (hits[union > 0] / union[union > 0]).mean().item(), "mean_accuracy": 100 * (hits[truth > 0] / truth[truth > 0]).mean().item(),
            "pixel_accuracy": 100 * (hits.sum() / matrix.sum().clamp(min=1)).item()}


# --------------------------------------------------------------------------------------------------------------------
# Detection with instance masks: torchvision's Mask R-CNN (He et al., ICCV 2017) on a ViT
# --------------------------------------------------------------------------------------------------------------------
class SimplePyramid(nn.Module):
    """The neck of ViTDet (Li et al., ECCV 2022), which MR-MAE Sec. 4.2 follows: the map (B, D, h, w) of the last block, four times -> maps of strides 4, 8,
    16 and 32 (for patches of 16 pixels), each made by itself, all (B, width, ...)."""

    def __init__(self, D, width):
        super().__init__()
        norm, up = partial(LayerNorm2d, eps=1e-6), partial(nn.ConvTranspose2d, kernel_size=2, stride=2)
        four = nn.Sequential(up(D, D // 2), norm(D // 2), nn.GELU(), up(D // 2, D // 4))
        self.by_stride = nn.ModuleList([four, up(D, D // 2), nn.Identity(), nn.MaxPool2d(2)])
        self.lateral = nn.ModuleList(nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), norm(width),
                                                   nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width)) for channels in (D // 4, D // 2, D, D))

    def forward(self, maps):
        return [lateral(scale(x)) for x, scale, lateral in zip(maps, self.by_stride, self.lateral)]


class Pyramid(nn.Module):
    """What Mask R-CNN calls a backbone: normalised images (B, 3, H, W) -> {"0": (B, width, H/4, W/4), "1", "2", "3", "pool": (B, width, H/64, W/64)}
    for patches of 16 pixels, in proportion for others. Necks: "fpn", four blocks through `Scales` and torchvision's FPN (CAE's code); "simple", see there."""

    def __init__(self, encoder, neck, width):
        super().__init__()
        self.encoder, self.out_channels = encoder, width
        encoder.norm = nn.Identity()  # maps are raw outputs of blocks
        D, depth = encoder.width, len(encoder.blocks)
        if neck == "fpn":
            self.taps, self.scales, self.fpn = tapped_blocks(depth), Scales(D), FeaturePyramidNetwork([D] * 4, width)
        else:
            self.taps, self.scales, self.fpn = [depth] * 4, SimplePyramid(D, width), nn.Identity()

    def forward(self, images):
        maps = self.scales(self.encoder.features(images, taps=self.taps)["taps"])  # of strides 4, 8, 16, 32
        maps = self.fpn({str(i): x for i, x in enumerate(maps)})
        maps["pool"] = maps["3"][..., ::2, ::2]  # the fifth level, for large proposals
        return {name: x.float() for name, x in maps.items()}  # anchors take their type, and bf16 has 8 bits for a place among 1333 pixels


class DetectorTransform(GeneralizedRCNNTransform):
    """What a Detector does with its images first: normalise, in testing resize, pad to a batch whose sides `size_divisible` divides. torchvision's own resizes
    without antialiasing, which training images have."""

    def resize(self, image, target=None):
        if self.training:
            return image, target  # data.ObjectTransform has done it
        scale = min(self.min_size[0] / min(image.shape[-2:]), self.max_size / max(image.shape[-2:]))
        return v2.functional.resize(image, [max(1, int(scale * side)) for side in image.shape[-2:]], antialias=True), target


class Detector(MaskRCNN):
    """forward(images, targets) in training -> loss (), its five terms; in testing forward(images) -> a dict an image of "boxes" (N, 4), "labels" (N,),
    "scores" (N,) and "masks" (N, 1, h, w) in [0, 1]. images: a list of (3, h, w) in [0, 1] of any size.

    Heads are those of torchvision's second version: four convolutions and one linear layer for boxes, four convolutions for masks. Beside ViTDet's neck each
    convolution has a LayerNorm, as there; beside CAE's those for boxes a BatchNorm. Losses are torchvision's (CAE's code has a GIoU loss for boxes).
    """

    def __init__(self, encoder, args, info, classes):
        p, width = encoder.patch_size, args.head_width
        if p not in (4, 8, 16, 32):
            raise UserError(f"--protocol detect: its maps have strides of p / 4, p / 2, p and 2 p; torchvision wants powers of 2, so patches of 4, 8, 16 or 32 "
                            f"pixels, not {p}")
        drop_paths(encoder, args.drop_path)
        norm = nn.BatchNorm2d if args.neck == "fpn" else partial(LayerNorm2d, eps=1e-6)
        box_pool, mask_pool = (MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=size, sampling_ratio=2) for size in (7, 14))
        for pool in (box_pool, mask_pool):
            # It guesses the maps' strides once, from its first batch: size of the map / size of the image before padding, rounded to a power of 2. A thin image
            # would give a wrong one, for good. So its first batch is one whose sizes are exact: 8 patches wide, maps of 32, 16, 8 and 4 places.
            pool({str(i): torch.zeros(1, 1, side, side) for i, side in enumerate((32, 16, 8, 4))}, [torch.zeros(0, 4)], [(8 * p, 8 * p)])
        super().__init__(
            Pyramid(encoder, args.neck, width),
            rpn_anchor_generator=AnchorGenerator(tuple((2 * p * 2**i,) for i in range(5)), ((0.5, 1.0, 2.0),) * 5),  # 8 times the stride of each map: 32 .. 512 pixels
            rpn_head=RPNHead(width, 3, conv_depth=1 if args.neck == "fpn" else 2),  # as CAE's code and ViTDet
            rpn_pre_nms_top_n_train=2 * args.proposals, rpn_post_nms_top_n_train=2 * args.proposals,
            rpn_pre_nms_top_n_test=args.proposals, rpn_post_nms_top_n_test=args.proposals, box_batch_size_per_image=args.rois,
            box_roi_pool=box_pool, box_head=FastRCNNConvFCHead((width, 7, 7), [width] * 4, [4 * width], norm), box_predictor=FastRCNNPredictor(4 * width, classes + 1),
            mask_roi_pool=mask_pool, mask_head=MaskRCNNHeads(width, [width] * 4, 1, None if args.neck == "fpn" else norm),
            mask_predictor=MaskRCNNPredictor(width, width, classes + 1))
        self.transform = DetectorTransform(min(args.image_size), max(args.image_size), info["mean"], info["std"], size_divisible=2 * p)  # the stride of map "3"
        for coder in (self.rpn.box_coder, self.roi_heads.box_coder):  # under AMP the heads' codes are bf16, and boxes take their type: too coarse for places
            coder.decode = lambda codes, boxes, decode=coder.decode: decode(codes.float(), boxes)
        self.to(memory_format=torch.channels_last)  # as LayerNorm2d's output is
        self.feature = f"blocks {', '.join(map(str, dict.fromkeys(self.backbone.taps)))}"

    @property
    def encoder(self):
        return self.backbone.encoder

    def forward(self, images, targets=None):
        found = super().forward(images, targets)
        return (sum(found.values()), {name: loss.detach() for name, loss in found.items()}) if self.training else found


def coco_results(found, image_id, category_ids):
    """What a Detector found in an image -> rows of COCO's format of results: bbox is x, y, width, height; a mask is a run-length encoding (RLE)."""
    tools, rows = coco_tools(), []
    for (x0, y0, x1, y1), label, score, mask in zip(*(found[key].tolist() for key in ("boxes", "labels", "scores")), found["masks"].cpu()):
        rle = tools.mask.encode(np.asfortranarray((mask[0] > 0.5).numpy().astype(np.uint8)))
        rows.append({"image_id": image_id, "category_id": category_ids[label - 1], "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score,
                     "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}})
    return rows


def detection_metrics(truth, rows):
    """COCO's evaluation of `rows` (as `coco_results` makes them): box_ap, box_ap50, box_ap75, box_ap_small, .._medium, .._large and the same of masks, in per
    cent; a size that no object has does not count."""
    tools, numbers = coco_tools(), {}
    nothing = tools.coco.COCO()
    nothing.dataset = {**truth.dataset, "annotations": []}
    quietly(nothing.createIndex)
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        own = [{key: value for key, value in row.items() if kind == "bbox" or key != "bbox"} for row in rows]  # else the area of a mask were its box's
        evaluation = tools.cocoeval.COCOeval(truth, quietly(truth.loadRes, own) if own else nothing, kind)
        for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
            quietly(step)
        keys = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
        numbers |= {f"{name}_{key}": 100 * float(value) for key, value in zip(keys, evaluation.stats) if value >= 0}
    return numbers


# --------------------------------------------------------------------------------------------------------------------
# Optimizers
# --------------------------------------------------------------------------------------------------------------------
def layer_decay_groups(model, layer_decay, weight_decay):
    """Parameter groups of AdamW with layer-wise learning rates (MAE's code, after BEiT): "lr_scale" = layer_decay^(depth + 1 - layer).

    Layer 0: class token, positions, patch embedding; layer i: block i; layer depth + 1: all that follows. No weight decay on
    one-dimensional parameters, positions and the class token.
    """
    depth, groups = len(model.encoder.blocks), {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        part = name.rpartition("encoder.")[2].split(".")
        layer = 0 if part[0] in ("cls_token", "pos_embed", "patch_embed") else int(part[1]) + 1 if part[0] == "blocks" else depth + 1
        decay = 0.0 if p.ndim == 1 or part[0] in ("cls_token", "pos_embed") else weight_decay
        group = groups.setdefault((layer, decay), {"params": [], "weight_decay": decay, "lr_scale": layer_decay ** (depth + 1 - layer)})
        group["params"].append(p)
    return list(groups.values())


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al.), as MAE's linear probe has it: a matrix's step, weight decay included, is scaled by
    trust |w| / |step|; vectors take plain steps with neither. The rate stands outside the momentum."""

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


def poly(epoch, lr, warmup_epochs, epochs, min_lr):
    """The schedule of segmentation: a straight line from lr to min_lr (power 1 in BEiT's and CAE's code), times a ramp from 0 to 1 during warm-up."""
    ramp = min(1.0, epoch / warmup_epochs) if warmup_epochs else 1.0
    return ramp * (min_lr + (lr - min_lr) * (1 - epoch / epochs))


def steps(epoch, lr, warmup_epochs, epochs, min_lr):
    """The schedule of detection: lr, a tenth of it from 9/12 of the run on, a hundredth from 11/12 on (CAE's code: epochs 9 and 11 of 12), after a linear
    warm-up; never below min_lr."""
    ramp = min(1.0, epoch / warmup_epochs) if warmup_epochs else 1.0
    return ramp * max(min_lr, lr * 0.1 ** ((epoch >= epochs * 9 / 12) + (epoch >= epochs * 11 / 12)))


# Of each protocol: our absolute rate for a laptop, where the schedule ends, the schedule.
RATES = {
    "finetune": (1e-3, 1e-6, lr_at),  # AdamW; the end: MAE's code
    "linear": (6.4, 0.0, lr_at),  # LARS; both are MAE's code's, .1 x 16384 / 256
    "attentive": (0.1, 1e-6, lr_at),  # SGD; the end: CAE's code
    "segment": (1e-3, 0.0, poly),  # AdamW; the end: CAE's code
    "segment --head linear": (1e-2, 0.0, poly),  # AdamW
    "detect": (1e-3, 0.0, steps),  # AdamW
}


def build_optimizer(model, args):
    """AdamW with layer decay (MAE's code), LARS (MAE's code), or SGD with Nesterov momentum (CAE Appendix A and its code)."""
    if args.protocol in ("finetune", *DENSE):
        return torch.optim.AdamW(layer_decay_groups(model, args.layer_decay, args.weight_decay), lr=0.0, betas=(0.9, 0.999), fused=True)
    params = [p for p in model.parameters() if p.requires_grad]
    if args.protocol == "linear":
        return LARS(params, weight_decay=args.weight_decay)
    return torch.optim.SGD(params, lr=0.0, momentum=0.9, nesterov=True, weight_decay=args.weight_decay)


# --------------------------------------------------------------------------------------------------------------------
# What the model is called with in training
# --------------------------------------------------------------------------------------------------------------------
def fine_tuning_transform(args, mean):
    """Crop and flip as in pre-training (--augment), then RandAugment, on uint8 tensors."""
    parts = [train_transform(args)]
    if args.randaugment:
        parts.append(v2.RandAugment(num_ops=2, magnitude=args.randaugment, num_magnitude_bins=11, interpolation=v2.InterpolationMode.BILINEAR,
                                    fill=[int(255 * channel) for channel in mean]))
    return v2.Compose(parts)


def augmented(images, labels, args, info, classes, multi_label):
    """A batch on the device -> (normalised images, targets (B, classes)): erasing image by image, MixUp or CutMix, label smoothing."""
    x = normalize(images, info["mean"], info["std"])
    erase = v2.RandomErasing(p=args.erasing, value="random")  # of normal noise: after normalising
    x = torch.stack([erase(image) for image in x])
    targets = labels if multi_label else F.one_hot(labels, classes).float()  # (B, classes)
    mixers = [kind(alpha=alpha, num_classes=classes) for kind, alpha in ((v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)) if alpha]
    if mixers:
        x, targets = v2.RandomChoice(mixers)(x, targets)
    return x, targets if multi_label else targets * (1 - args.smoothing) + args.smoothing / classes


# --------------------------------------------------------------------------------------------------------------------
# Testing
# --------------------------------------------------------------------------------------------------------------------
def batches_of(dataset, chunks, args, device, then="it counts as a black image"):
    """The chunks of this process (lists of indices), as batches: (images, labels) on the device. Broken samples are named; more than 10 and more than 1 %
    of them stop the run."""
    rank, broken = dist.get_rank(), 0
    stream = loader(dataset, [[(0, i) for i in chunk] for chunk in chunks], args.workers, device.type == "cuda")
    for images, labels, names in tqdm(stream, desc="testing", total=len(chunks), leave=False, disable=rank > 0):
        for name in names:
            broken += 1
            tqdm.write(f"warning: {name} is broken; {then}", file=sys.stderr)
            if broken > 10 and broken > 0.01 * len(dataset):
                raise UserError(f"too many broken images: {broken}, the last is {name}; repair or remove them", code=1)
        yield (None, None) if images is None else on_device((images, labels), device)


def over_the_set(function, dataset, args, device):
    """function(uint8 images (b, 3, H, W)) -> (b, ...) over a whole set, shared out over the processes -> (N, ...) float32, in order, on
    every process. Every sample counts once, whatever the number of processes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    chunks = torch.arange(len(dataset)).split(args.batch_size)[rank::world]
    shape = torch.zeros(4, dtype=torch.long, device=device)  # of one result: how many axes, then their lengths
    mine = []
    for images, _ in batches_of(dataset, [chunk.tolist() for chunk in chunks], args, device):
        with inference(args, device):
            mine.append(function(images).float())
    if mine:
        tail = mine[0].shape[1:]
        shape[: len(tail) + 1] = torch.tensor([len(tail), *tail])
    dist.all_reduce(shape, dist.ReduceOp.MAX)  # a process without a sample does not know it
    out = torch.zeros(len(dataset), *shape[1 : 1 + shape[0]].tolist(), device=device)
    for chunk, values in zip(chunks, mine):
        out[chunk.to(device)] = values
    dist.all_reduce(out)  # each row is filled by one process, so the sum is exact
    return out


def confusion_matrix(predicted, labels, classes):
    """How often class i was taken for class j: (classes, classes)."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def average_precision_11(scores, positive):
    """VOC2007's: the mean over the recalls 0, .1, .., 1 of the best precision at that recall or a higher one. scores (N,), positive (N,)."""
    if not positive.any():
        return torch.zeros((), dtype=torch.float64)  # nothing to find
    hits = positive[scores.argsort(descending=True, stable=True)].double()
    recall, precision = hits.cumsum(0) / hits.sum(), hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    levels = torch.arange(11, dtype=torch.float64) / 10 - 1e-9  # a recall of just .3 reaches the level .3
    return torch.stack([precision[recall >= level].max() for level in levels]).mean()


def score(scores, labels, metric):
    """scores (N, classes) and labels -> {metric: per cent}, on the whole test set: never averaged over batches or processes."""
    scores, labels = scores.cpu(), labels.cpu()
    if metric == "map11":
        return {metric: 100 * torch.stack([average_precision_11(scores[:, c], labels[:, c] > 0) for c in range(scores.shape[1])]).mean().item()}
    matrix = confusion_matrix(scores.argmax(dim=1), labels, scores.shape[1]).double()
    results = {"top1": 100 * (matrix.diag().sum() / matrix.sum()).item()}
    if metric == "mean_per_class":
        seen = matrix.sum(dim=1) > 0
        results[metric] = 100 * (matrix.diag()[seen] / matrix.sum(dim=1)[seen]).mean().item()
    return results


def nearest_neighbours(train, train_labels, test, classes, k, temperature=0.07):
    """Scores (N, classes) of the weighted k-nearest-neighbour vote of DINO's code: cosine similarity, weights exp(similarity / .07)."""
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    votes = []
    for part in test.split(1024):
        similarity, ids = (part @ train.T).topk(min(k, len(train)), dim=1)  # (b, k)
        votes.append(torch.zeros(len(part), classes, device=test.device).scatter_add(1, train_labels.to(test.device)[ids], (similarity / temperature).exp()))
    return torch.cat(votes)


# --------------------------------------------------------------------------------------------------------------------
# One run
# --------------------------------------------------------------------------------------------------------------------
class Cached(torch.utils.data.Dataset):
    """Features in place of images: (epoch, i) -> (feature, label, no broken names)."""

    def __init__(self, features, labels):
        self.features, self.labels = features.cpu(), labels.tolist()

    def __len__(self):
        return len(self.features)

    def __getitem__(self, index):
        return self.features[index[1]], self.labels[index[1]], []


class Task:
    """A classifier, the samples that it is trained and tested on, and how a batch of either becomes its input."""

    def __init__(self, args, test_set, metric, encoder, info, fc_norm, device):
        self.args, self.info, self.device, self.metric = args, info, device, metric
        self.test_set, self.classes, self.labels = test_set, test_set.classes, torch.tensor(test_set.labels)
        self.model = Classifier(encoder, info, fc_norm, args, len(self.classes), metric == "map11").to(device)
        self.neighbours = {}
        self.testing = EachOnce(test_set, args.image_size)
        self.inputs = self.normalized

    def prepare(self, train_set):
        """What the model is trained on: augmented images or features."""
        args, info = self.args, self.info
        if self.model.frozen and args.cache_features:
            self.cache(train_set)
        elif self.model.frozen:
            self.samples = Samples(train_set, train_transform(args), args.seed)
        else:
            self.samples = Samples(train_set, fine_tuning_transform(args, info["mean"]), args.seed)
            self.inputs = partial(augmented, args=args, info=info, classes=len(self.classes), multi_label=self.model.multi_label)

    def normalized(self, images, labels=None):
        """A batch -> what the model is called with. Cached features are that already."""
        return images if images.ndim < 4 else normalize(images, self.info["mean"], self.info["std"]), labels

    def cache(self, train_set):
        """Features in place of images, for training and testing, and the k-nearest-neighbour numbers that come with them."""
        self.model.eval()
        labels, both = torch.tensor(train_set.labels), []
        for samples in (EachOnce(train_set, self.args.image_size), self.testing):
            both.append(over_the_set(lambda images: self.model.features(self.normalized(images)[0]), samples, self.args, self.device))
        self.samples, self.testing = Cached(both[0], labels), Cached(both[1], self.labels)
        self.args.workers = 0  # there is nothing left to load
        if not self.model.multi_label:
            pooled = [x if x.ndim == 2 else x.mean(dim=1) for x in both]
            votes = nearest_neighbours(pooled[0], labels, pooled[1], len(self.classes), self.args.neighbours)
            self.neighbours = {f"knn_{self.metric}": score(votes, self.labels, self.metric)[self.metric]}

    def example(self):
        """What the model is called with, for DDP's first pass: the first and the last sample."""
        images, labels, names = collate([self.samples[0, i] for i in (0, len(self.samples) - 1)])
        BrokenImages().count(images, names)
        return self.inputs(*on_device((images, labels), self.device))

    def test(self):
        """Scores (N, classes) of the test set, in order."""
        self.start_testing()
        scores = over_the_set(lambda images: self.model.logits(self.normalized(images)[0]), self.testing, self.args, self.device)
        self.model.train()
        return scores

    def start_testing(self):
        for buffer in self.model.buffers():  # each process has BatchNorm statistics of its own since the last step
            dist.broadcast(buffer, 0)
        self.model.eval()

    def numbers(self, scores):
        return score(scores, self.labels, self.metric)

    def results(self, folder):
        """Numbers of the test set for results.json; rank 0 writes the other files of a finished run."""
        scores = self.test()
        if folder:
            if self.labels.ndim == 1:
                write_confusion(folder, confusion_matrix(scores.argmax(dim=1).cpu(), self.labels, len(self.classes)), self.classes)
            if self.args.protocol == "finetune":
                folder.write("encoder.pt", lambda file: torch.save(self.export(), file))
            if self.args.protocol == "attentive":
                show_attention(folder, self.test_set, self)
        return {**self.numbers(scores), **self.neighbours}

    def finished(self):
        """What best.pt holds: all that --evaluate needs."""
        return {"model": self.model.state_dict(), "config": self.model.encoder.config, "info": {**self.info, "feature": self.model.feature},
                "args": vars(self.args), "classes": list(self.classes), "metric": self.metric}

    def export(self):
        """encoder.pt of a fine-tuned encoder, to probe or to mimic (MR-MAE). The LayerNorm of mean features stands for its final norm."""
        model, info, state_dict = self.model, self.info, self.model.encoder.state_dict()
        if model.feature == "mean":
            state_dict |= {f"norm.{name}": value for name, value in model.fc_norm.state_dict().items()}
        return pack_encoder(model.encoder, f"{info['method']}-finetune", model.feature, info["mean"], info["std"], state_dict)


def palette(count):
    """Colours of classes, neighbours apart."""
    return [tuple(int(255 * c) for c in colorsys.hsv_to_rgb(k / count, 0.5 + 0.5 * (k % 2), 1 - 0.3 * (k % 3))) for k in range(count)]


class EachWhole(EachOnce):
    """(epoch, i) -> (image and truth as they are, broken names) for testing; of a broken sample both are None, as `collate` knows them."""

    def __getitem__(self, index):
        try:
            return *self.dataset[index[1]], []
        except Exception as error:  # bad files make PIL and torchvision raise all kinds
            return None, None, [str(error) if isinstance(error, UserError) else self.dataset.name(index[1])]


class Dense(Task):
    """What Segmentation and Detection share; of Task they use start_testing, example and finished alone. Each has `metric`, which chooses best.pt,
    open(args, splits) -> sets, the name of the split to test on, and build(encoder, args, info, classes) -> model."""

    def __init__(self, args, test_set, model, info, device):
        self.args, self.info, self.device, self.test_set, self.classes = args, info, device, test_set, test_set.classes
        if dist.get_world_size() > 1 and device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model, self.testing = model.to(device), EachWhole(test_set, args.image_size)

    def one_by_one(self, then):
        """(i, image, truth) of the test images of this process, each by itself; a broken one is named, with what happens `then`, and left out."""
        mine = range(dist.get_rank(), len(self.testing), dist.get_world_size())
        self.start_testing()
        for i, (images, truths) in zip(mine, batches_of(self.testing, [[i] for i in mine], self.args, self.device, then)):
            if images is not None:
                yield i, images[0], truths[0]
        self.model.train()


class Segmentation(Dense):
    """A Segmenter and its scenes."""

    metric = "miou"
    open, test_split = staticmethod(open_scenes), "validation"

    @staticmethod
    def build(encoder, args, info, classes):
        return Segmenter(encoder, args, classes)

    def prepare(self, train_set):
        self.samples = Samples(train_set, SceneTransform(self.args.image_size, self.args.scale, self.info["mean"]), self.args.seed)

    def inputs(self, images, masks):
        return normalize(images, self.info["mean"], self.info["std"]), masks

    def predict(self, image):
        """uint8 (3, H, W) -> classes (H, W), from the image with its short side resized to the crop's."""
        small = v2.functional.resize(image, [min(self.args.image_size)], antialias=True).unsqueeze(0).to(self.device)
        small = normalize(small, self.info["mean"], self.info["std"])
        with inference(self.args, self.device):
            scores = segment_image(self.model, small, self.args.image_size, self.args.window)
        return resized(scores, image.shape[-2:]).argmax(dim=1)[0]

    def test(self):
        """Confusion matrix (classes, classes) of the test set, rows the truth; each image counts once, whatever the number of processes."""
        C = len(self.classes)
        matrix = torch.zeros(C, C, dtype=torch.long, device=self.device)
        for _, image, truth in self.one_by_one("it does not count"):
            counts = truth != IGNORE
            matrix += confusion_matrix(self.predict(image)[counts], truth[counts].long(), C)
        dist.all_reduce(matrix)
        if not matrix.any():
            raise UserError(f"--data {self.args.data}: no pixel of its test images counts; all are ignored, or broken")
        return matrix.cpu()

    def numbers(self, matrix):
        return segmentation_metrics(matrix)

    def results(self, folder):
        matrix = self.test()
        if folder:
            write_confusion(folder, matrix, self.classes)
            self.show(folder)
        return self.numbers(matrix)

    def show(self, folder):
        """pictures/segmentation.png: image, truth and prediction of eight test images; what is ignored has no colour."""
        self.model.eval()
        colours = palette(len(self.classes))
        rows, size = [], self.args.image_size
        for i in torch.linspace(0, len(self.testing) - 1, min(8, len(self.testing))).long().tolist():
            image, mask, _ = self.testing[0, i]
            if image is None:
                continue
            predicted = self.predict(image).cpu()
            image = v2.functional.resize(image, size, antialias=True)
            panels = [image]
            for labels in (mask.as_subclass(torch.Tensor), predicted):
                labels = v2.functional.resize(labels.unsqueeze(0), size, interpolation=v2.InterpolationMode.NEAREST)[0]
                panels.append(draw_segmentation_masks(image, torch.stack([labels == k for k in range(len(self.classes))]), alpha=0.7, colors=colours))
            rows.append(torch.stack(panels) / 255)
        if rows:
            folder.picture("segmentation.png", picture_sheet(torch.stack(rows), ["image", "truth", "prediction"]))

    def predict_files(self, files, root, folder):
        """--predict: masks in the layout of the training set's, with the files' names. Rank 0 has the folder."""
        for path in files.paths if folder else []:
            try:
                image = decode(path)
            except Exception:  # bad files make PIL and torchvision raise all kinds
                print(f"warning: {path} is broken; it gets no mask", file=sys.stderr)
                continue
            mask = Image.fromarray((1 + self.predict(image)).to(torch.uint8).cpu().numpy())
            name = "-".join(Path(path).relative_to(root).with_suffix(".png").parts)
            folder.write(name, lambda file, mask=mask: mask.save(file, "PNG"))
        say(f"{self.args.out}: masks of {len(files)} images; labels count from 1, as the lines of classes.txt")


class Detection(Dense):
    """A Detector and its images."""

    metric = "box_ap"
    open, test_split = staticmethod(open_objects), "val"
    build = Detector

    def prepare(self, train_set):
        self.samples = Samples(train_set, ObjectTransform(self.args.image_size, self.args.resize, self.info["mean"]), self.args.seed)

    def inputs(self, images, targets):
        return [image / 255 for image in images], targets  # the Detector normalises

    def predict(self, image):
        """uint8 (3, h, w) -> what the Detector finds in it, at its own size."""
        with inference(self.args, self.device):
            return self.model([image.to(self.device) / 255])[0]

    def test(self):
        """What is found in the test images, as COCO's format of results, on rank 0; None elsewhere. Each image is looked at by itself, in whatever process."""
        mine = []
        for i, image, _ in self.one_by_one("nothing is found in it"):
            mine += coco_results(self.predict(image), self.test_set.image_ids[i], self.test_set.category_ids)
        parts = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(mine, parts)
        return None if parts is None else sorted((row for part in parts for row in part), key=lambda row: row["image_id"])

    def numbers(self, rows):
        return {} if rows is None else detection_metrics(self.test_set.truth, rows)

    def results(self, folder):
        rows = self.test()
        if folder:
            write_json(folder, rows, "predictions.json")
            self.show(folder)
        return self.numbers(rows)

    def show(self, folder):
        """pictures/detection.png: image, truth where it is known, and what is found with a score above .5, of eight test images."""
        self.model.eval()
        sheet, colours, size = [], palette(len(self.classes)), max(256, min(self.args.image_size))
        titles = ["image", *(["truth"] if hasattr(self.test_set, "truth") else []), "found"]
        for i in torch.linspace(0, len(self.testing) - 1, min(8, len(self.testing))).long().tolist():
            image, truth, _ = self.testing[0, i]
            if image is None or size * min(image.shape[-2:]) < max(image.shape[-2:]):
                continue  # broken, or too thin to draw
            found = {key: value.cpu() for key, value in self.predict(image).items()}
            sure = found["scores"] > 0.5
            found = as_target(found["boxes"][sure].tolist(), found["labels"][sure].tolist(), list((found["masks"][sure, 0] > 0.5).to(torch.uint8)), image.shape[-2:])
            panels = []
            for objects in (None, truth, found) if "truth" in titles else (None, found):
                large, objects = v2.Resize(None, max_size=size)(image, objects)  # the long side
                if objects and len(objects["labels"]):
                    of_each = [colours[k - 1] for k in objects["labels"].tolist()]
                    large = draw_segmentation_masks(large, objects["masks"].bool(), alpha=0.5, colors=of_each)
                    large = draw_bounding_boxes(large, objects["boxes"], [self.classes[k - 1] for k in objects["labels"].tolist()], colors=of_each)
                panels.append(v2.functional.pad(large, [0, 0, size - large.shape[-1], size - large.shape[-2]], fill=255))
            sheet.append(torch.stack(panels) / 255)
        if sheet:
            folder.picture("detection.png", picture_sheet(torch.stack(sheet), titles))

    def finished(self):
        return {**super().finished(), "category_ids": list(self.test_set.category_ids)}

    def predict_files(self, files, root, folder):
        """--predict: predictions.json, COCO's format of results, and images.json, which says what its numbers mean. An image whose name is a number, as COCO's
        are, keeps it."""
        names = [Path(path).stem for path in files.paths]
        numbered = all(name.isdecimal() for name in names) and len(set(map(int, names))) == len(names)
        files.image_ids = [int(name) if numbered else i for i, name in enumerate(names, start=1)]
        rows = self.test()
        if folder:
            write_json(folder, rows, "predictions.json")
            images = [{"id": i, "file_name": str(Path(path).relative_to(root))} for i, path in zip(files.image_ids, files.paths)]
            write_json(folder, {"images": images, "categories": [{"id": k, "name": name} for k, name in zip(files.category_ids, self.classes)]}, "images.json")
            self.show(folder)
            print(f"{self.args.out}: predictions.json has {len(rows)} objects of {len(files)} images, images.json the names that its numbers stand for; "
                  f"pictures/detection.png shows eight", flush=True)


KINDS = {"segment": Segmentation, "detect": Detection}


def report(run, row, images, epoch_ends, task):
    """A log row; at an epoch's end with the numbers of the test set, and best.pt if they are the best so far."""
    if epoch_ends:
        row |= task.numbers(task.test())
    if not run.folder:
        return
    if not epoch_ends:
        return run.folder.log(row)
    if row[task.metric] >= max([old[task.metric] for old in read_log(task.args.out) if task.metric in old], default=0):
        run.folder.write("best.pt", lambda file: torch.save(task.finished(), file))
    end_epoch(run, row)


def run_set(args, argv, name, device):
    """Train and test on one set -> (exit code, what results.json holds, and the set's metric)."""
    torch.manual_seed(args.seed)  # every process starts from the same random encoder, if it is one, and from the same head
    encoder, info, fc_norm = open_encoder(args)
    place = f"{info['method']}-{args.protocol}-{Path(name).name}"
    out = args.out if args.out and not args.several else str(Path(args.out or "runs") / place)
    args = changed(args, data=name, method=info["method"], image_size=encoder.config["image_size"], out=out)
    if args.protocol not in ("finetune", "detect") and args.batch_size < 2:
        raise UserError("--batch-size 1: BatchNorm needs at least 2 images; use 2 or more")
    if kind := KINDS.get(args.protocol):
        (train_set, test_set), metric = kind.open(args), kind.metric
    else:
        train_set, test_set, metric = in_turn(args, partial(open_labelled, name, args))
    folder = RunFolder(args.out) if dist.get_rank() == 0 else None
    torch.manual_seed(args.seed)
    if kind:
        task = kind(args, test_set, kind.build(encoder, args, info, len(test_set.classes)), info, device)
    else:
        task = Task(args, test_set, metric, encoder, info, fc_norm, device)
    if (Path(args.out) / "checkpoint.pt").exists():  # features are those of the run's own encoder, whatever lies at --encoder now
        with contextlib.suppress(RuntimeError):  # of another shape: `resume` will name the flags
            task.model.load_state_dict(load_checkpoint(Path(args.out) / "checkpoint.pt", args)["model"])
    task.prepare(train_set)
    optimizer = build_optimizer(task.model.train(), args)
    laptop_lr, min_lr, schedule = RATES["segment --head linear" if getattr(args, "head", "") == "linear" else args.protocol]
    run = assemble(args, task.model, optimizer, task.example(), len(task.samples), laptop_lr, device, folder=folder, inputs=task.inputs,
                   min_lr=min_lr, schedule=schedule)
    sums = resume(run, FREE_FLAGS)
    dist.barrier()  # all have read the checkpoint before rank 0 writes the next
    if run.batches.start < run.batches.steps:
        if folder:
            folder.describe(args, argv)
            folder.cut_log(run.batches.start)
            announce(run, train_set, test_set, metric)
        code = work(run, task.samples, sums, partial(report, task=task))
        if code:
            return code, {}
    results = task.results(folder)
    if folder:
        results[f"best_{metric}"] = max([row[metric] for row in read_log(args.out) if metric in row], default=results[metric])
        write_json(folder, results)
        done = "" if run.batches.start < run.batches.steps else "finished already, "
        print(f"{args.out}: {done}{', '.join(f'{key} {value:.2f}' for key, value in results.items())}", flush=True)
    return int(bool(folder and folder.failed)), {"metric": metric, **results}


def announce(run, train_set, test_set, metric):
    args = run.args
    print(f"{args.protocol} of {args.encoder} on {args.data}: {len(train_set)} training and {len(test_set)} test images, {len(train_set.classes)} classes, {metric}; "
          f"features: {run.model.feature}\n{sum(p.numel() for p in run.model.parameters() if p.requires_grad)} trained parameters, batch "
          f"{run.batches.global_batch}, {learning_rate(run)}, {args.epochs} epochs x {run.batches.steps_per_epoch} steps, starting at step "
          f"{run.batches.start}", flush=True)
    if args.protocol == "linear" and run.batches.steps < 200:
        print(f"note: {run.batches.steps} steps are few for LARS, whose weights grow by some per cent a step; more --epochs or a smaller --batch-size help", flush=True)


def write_csv(folder, name, rows):
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    folder.write(name, lambda file: file.write(text.getvalue().encode()))


def write_json(folder, results, name="results.json"):
    folder.write(name, lambda file: file.write(json.dumps(results, indent=1 if isinstance(results, dict) else None).encode()))


def write_confusion(folder, matrix, classes):
    """confusion.csv, rows the true classes, and its picture, each row divided by its sum."""
    write_csv(folder, "confusion.csv", [["true \\ predicted", *classes], *([name, *row] for name, row in zip(classes, matrix.tolist()))])
    shares = matrix / matrix.sum(dim=1, keepdim=True).clamp(min=1)  # (classes, classes)
    picture = heat_map(shares.unsqueeze(0), torch.zeros(1, 3, *shares.shape)) / 0.65  # not over an image, so at full strength
    picture = v2.functional.resize(v2.functional.to_pil_image(picture[0]), [max(256, len(shares))] * 2, interpolation=v2.InterpolationMode.NEAREST)
    folder.picture("confusion.png", picture)


@torch.no_grad()
def show_attention(folder, test_set, task):
    """pictures/attention.png: where the learned query looks (CAE Fig. 5), heads averaged, on eight test images."""
    chosen, model = torch.linspace(0, len(test_set) - 1, 8).long().tolist(), task.model.eval()
    images = torch.stack([EachOnce(test_set, task.args.image_size)[0, i][0] for i in chosen])
    attention, _ = model.head.attend(model.features(task.normalized(images.to(task.device))[0]))  # (8, H, 1, L)
    maps = attention.float().mean(dim=1).view(8, *model.encoder.grid).cpu()
    images = images / 255
    folder.picture("attention.png", picture_sheet(torch.stack([images, heat_map(maps, images)], dim=1), ["image", "attention of\nthe query"]))


# --------------------------------------------------------------------------------------------------------------------
# --evaluate
# --------------------------------------------------------------------------------------------------------------------
def load_finished(path, device):
    """A run folder or its best.pt -> (classifier in eval mode, the rest of the file)."""
    file = Path(path) / "best.pt" if Path(path).is_dir() else Path(path)
    saved = load_file(file)
    if not isinstance(saved, dict) or not {"model", "config", "info", "args", "classes", "metric"} <= saved.keys():
        raise UserError(f"{file}: not a best.pt of finetune.py")
    try:
        encoder, run_args, classes = ViT(**saved["config"]), argparse.Namespace(**saved["args"]), len(saved["classes"])
        if kind := KINDS.get(run_args.protocol):
            model = kind.build(encoder, run_args, saved["info"], classes)
        else:
            model = Classifier(encoder, saved["info"], None, run_args, classes, saved["metric"] == "map11")
        model.load_state_dict(saved["model"])
    except (RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{file}: not a whole best.pt ({' '.join(str(error).split())[:150]})") from None
    return model.to(device).eval(), saved


def evaluate(args, device):
    """--evaluate: one classifier, or the ensemble of several (MR-MAE Table 4: their probabilities are averaged), on --data or --predict."""
    models = [load_finished(path, device) for path in args.evaluate]
    first = models[0][1]
    if first["args"]["protocol"] in DENSE:
        if len(models) > 1:
            raise UserError(f"--evaluate {' '.join(args.evaluate)}: segmentation and detection have no ensembles; give one run")
        return evaluate_dense(args, *models[0], device)
    for path, (_, saved) in zip(args.evaluate, models):
        if (saved["classes"], saved["metric"]) != (first["classes"], first["metric"]):
            raise UserError(f"--evaluate: {path} has other classes than {args.evaluate[0]}; an ensemble needs the same ones")

    def probabilities(dataset):
        """(N, classes), the mean over the models, each on images of its own size."""
        total = 0
        for model, saved in models:
            def of_images(images, model=model, info=saved["info"]):
                logits = model.logits(normalize(images, info["mean"], info["std"]))
                return logits.sigmoid() if model.multi_label else logits.softmax(dim=1)
            total = total + over_the_set(of_images, EachOnce(dataset, model.encoder.config["image_size"]), args, device)
        return total / len(models)

    place = Path(args.out or "runs/evaluate")
    if args.predict:
        files = open_folder(args.predict)
        p = probabilities(Labelled([(files, [-1] * len(files))], first["classes"]))
        shown = F.one_hot(p.argmax(dim=1), p.shape[1]).bool()  # the best class; for many labels an image also what is likelier than not
        if first["metric"] == "map11":
            shown |= p >= 0.5
        if dist.get_rank() == 0:
            rows = ([files.paths[i], first["classes"][c], f"{p[i, c]:.6f}"] for i, c in shown.nonzero().tolist())
            write_csv(RunFolder(place), "predictions.csv", [["file", "class", "probability"], *rows])
            print(f"{place / 'predictions.csv'}: {len(files)} images", flush=True)
        return 0
    chosen = {} if args.data or args.data_root != "datasets" else {"data_root": first["args"]["data_root"]}  # its own set, where it lay
    for name in args.data or [first["args"]["data"]]:
        opened = changed(args, **chosen, image_size=models[0][0].encoder.config["image_size"], label_fraction=1.0)
        _, test_set, metric = in_turn(args, partial(open_labelled, name, opened))
        if list(test_set.classes) != first["classes"]:
            raise UserError(f"--data {name}: has other classes than {args.evaluate[0]} was trained on")
        p, labels = probabilities(test_set), torch.tensor(test_set.labels)
        results = score(p, labels, metric)
        if dist.get_rank() == 0:
            folder = RunFolder(place / Path(name).name if args.several else place)
            write_json(folder, results)
            if labels.ndim == 1:
                write_confusion(folder, confusion_matrix(p.argmax(dim=1).cpu(), labels, len(test_set.classes)), test_set.classes)
            print(f"{' + '.join(args.evaluate)} on {name}: {', '.join(f'{key} {value:.2f}' for key, value in results.items())}", flush=True)
    return 0


def evaluate_dense(args, model, saved, device):
    """--evaluate of a segmentation or a detection: the numbers of its test set or of --data's, or with --predict what it finds in a folder's images."""
    given = {key: value for key in ("window",) if (value := getattr(args, key, None))}
    out, name = args.out or "runs/evaluate", args.data[0] if args.data else saved["args"]["data"]
    run_args = changed(argparse.Namespace(**saved["args"]), device=args.device, workers=args.workers, compile=args.compile, precision=args.precision,
                       data=name, out=out, **given)
    kind, folder = KINDS[run_args.protocol], RunFolder(out) if dist.get_rank() == 0 else None
    if args.predict:
        files = open_folder(args.predict)
        files.classes, files.category_ids = saved["classes"], saved.get("category_ids")
        kind(run_args, files, model, saved["info"], device).predict_files(files, args.predict, folder)
        return 0
    if args.several:
        raise UserError(f"--data {' '.join(args.data)}: give one set")
    test_set = kind.open(run_args, [kind.test_split])[0]
    if test_set.classes != saved["classes"]:
        raise UserError(f"--data {name}: has other classes than {args.evaluate[0]} was trained on")
    results = kind(run_args, test_set, model, saved["info"], device).results(folder)
    if folder:
        write_json(folder, results)
        print(f"{args.evaluate[0]} on {name}: {', '.join(f'{key} {value:.2f}' for key, value in results.items())}", flush=True)
    return 0


# --------------------------------------------------------------------------------------------------------------------
def transfer(args, argv, device):
    """One set after the other; several make a row as in MixedAE Table 2 -> exit code."""
    if args.several:  # find out what is missing before hours of work
        size = open_encoder(args)[0].config["image_size"]
        for name in args.data:
            opened = changed(args, data=name, image_size=size)
            in_turn(args, partial(KINDS[args.protocol].open, opened) if args.protocol in KINDS else partial(open_labelled, name, opened))
    rows = {}
    for name in args.data:
        code, rows[name] = run_set(args, argv, name, device)
        if code:
            return code
    if args.several and dist.get_rank() == 0:
        numbers = [results[results["metric"]] for results in rows.values()]
        print("| " + " | ".join([*map(str, rows), "Avg."]) + " |\n|" + "---|" * (len(rows) + 1) + "\n| " + " | ".join(f"{number:.1f}" for number in [*numbers, sum(numbers) / len(numbers)]) + " |")
    return 0


def main(argv=None):
    run_program("finetune.py", argv, parse_args, lambda args, argv, device: evaluate(args, device) if args.evaluate else transfer(args, argv, device))


if __name__ == "__main__":
    main()
