"""From the flag --data to the batches that a method sees. Behind that: pictures, charts, the run's folder.

Reading order of the project: vit -> mrmae -> mixedae -> cae -> **data** -> train -> finetune -> dense.

    --data NAME | FOLDER | LIST.txt
        -- open_sets -------------> training set, val set: set[i] -> (uint8 (3, height, width), label)
    a step of the run
        -- ResumableBatchSampler -> [(epoch, i), ...]: the samples of a micro-batch
        -- TrainDataset ----------> each of them read and augmented (train_transform), a broken one replaced
        -- collate ---------------> uint8 (B, 3, height, width), labels, names of broken ones
        -- normalize -------------> float32 (B, 3, height, width), on the device

Nothing random is carried from one step to the next: each draw is seeded anew by what it is for. The order of
an epoch depends on (seed, epoch), the augmentation of a sample on (seed, epoch, sample), and masks on (seed,
step, micro-batch, process), see train.forward_backward. So a run that resumes at a step draws there what it
would have drawn without the stop. (train.py says when its weights are then equal bit for bit. Most masks are
drawn on the device of the model, and for the same seed a CPU and a card draw different ones.)

Each loader process has its own copy of the data set, made when the process starts. If the epoch were an
attribute of the data set, these copies would never see it change; so each index carries its epoch.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import math
import os
import shlex
import signal
import struct
import subprocess
import sys
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.utils import make_grid
from tqdm import tqdm

from vit import UserError, bounded, one_line, print_rank0, unit_float


# ------------------------------------------------------------------------------------------------------------
# Pixels as a model sees them, and seeds
# ------------------------------------------------------------------------------------------------------------
MEAN = (0.485, 0.456, 0.406)  # of ImageNet
STD = (0.229, 0.224, 0.225)


def channels(values, images):
    """Three numbers, one per channel, in the shape (3, 1, 1) and on the device of the images."""
    return torch.tensor(values, device=images.device).view(3, 1, 1)


def normalize(images, mean=MEAN, std=STD):
    """uint8 (B, 3, height, width) -> float32 with about mean 0 and deviation 1 in each channel."""
    return (images.float() / 255 - channels(mean, images)) / channels(std, images)


def denormalize(images, mean=MEAN, std=STD):
    """The inverse of `normalize`, for pictures: to floats where [0, 1] is black to white."""
    return images * channels(std, images) + channels(mean, images)


def seed_of(*what):
    """Any numbers and strings -> a 64-bit seed that depends on all of them."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=8).digest(), "little")


def seed_torch(*what):
    """Seed torch's generators with a function of `what`. (torch.manual_seed does the same at a hundred times
    the cost.)"""
    torch.default_generator.manual_seed(seed_of(*what))
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed_of(*what))


# ------------------------------------------------------------------------------------------------------------
# Sets: len(set) and set[i] -> (uint8 (3, height, width), label). `classes` is a list of names, empty without
# labels; `labels` has a number for each image; `name(i)` is what a message calls sample i. (LabeledDataset,
# for the sets of torchvision, stands further down. The sets of dense.py have masks or objects in place of
# labels.)
# ------------------------------------------------------------------------------------------------------------
@dataclass
class ImageFiles:
    """Image files with labels, or without (label -1): what a folder or a list holds."""

    paths: list
    labels: list | None = None
    classes: list = field(default_factory=list)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        label = self.labels[i] if self.labels else -1
        return decode(self.paths[i]), label

    def name(self, i):
        return self.paths[i]


def triangle(u, v):
    """An equilateral triangle with its corners at radius 1, for SHAPES."""
    # Turn the point by a multiple of 120 degrees, so that its nearest edge is the one across the v axis.
    third = 2 * np.pi / 3
    angle = (np.arctan2(u, v) + third / 2) % third - third / 2
    return np.cos(third / 2) - np.hypot(u, v) * np.cos(angle)


def rectangle(u, v, length, width):
    """A rectangle of 2 length x 2 width, for SHAPES."""
    return np.minimum(length - np.abs(u), width - np.abs(v))


# Name -> f(u, v): positive inside the shape, and about the distance to its edge. The object's radius is 1.
SHAPES = {
    "disc": lambda u, v: 0.9 - np.hypot(u, v),
    "ring": lambda u, v: 0.25 - np.abs(np.hypot(u, v) - 0.7),
    "triangle": triangle,
    "square": lambda u, v: rectangle(u, v, 0.75, 0.75),
    "frame": lambda u, v: 0.18 - np.abs(rectangle(u, v, 0.62, 0.62)),
    "cross": lambda u, v: np.maximum(rectangle(u, v, 0.9, 0.28), rectangle(v, u, 0.9, 0.28)),
    "bar": lambda u, v: rectangle(u, v, 0.95, 0.3),
    "crescent": lambda u, v: np.minimum(0.9 - np.hypot(u, v), np.hypot(u - 0.45, v) - 0.65),
    "heart": lambda u, v: 0.62 - np.hypot(u, v * 1.1 - 0.55 * np.sqrt(np.abs(u)) + 0.15),
    "star": lambda u, v: 0.62 + 0.3 * np.cos(5 * np.arctan2(u, v)) - np.hypot(u, v),
}


class Shapes:
    """Drawn images: a textured object near the centre of a cluttered background; the class is its shape.

    These are the single-centric-object images that MixedAE Sec. 3.4 builds on, each with the mask and the box
    of its object. Colours, texture, size, rotation and background vary at random and tell nothing about the
    class. Index i of a split is always the same image, and `train` and `val` share none.
    """

    def __init__(self, image_size, split, length):
        self.image_size = tuple(image_size)
        self.split = split
        self.length = length
        self.classes = list(SHAPES)
        # Coordinates of the pixels: y (height, 1) and x (1, width). The unit is half the short side.
        short = min(self.image_size)
        axes = [np.linspace(-side / short, side / short, side, dtype=np.float32) for side in self.image_size]
        self.coordinates = np.meshgrid(*axes, indexing="ij", sparse=True)

    def __len__(self):
        return self.length

    def rng(self, i):
        """The generator that draws image i."""
        return np.random.default_rng(seed_of("shapes", self.split, i))

    @property
    def labels(self):
        # The class is the first thing that `draw` draws.
        return [int(self.rng(i).integers(len(SHAPES))) for i in range(self.length)]

    def __getitem__(self, i):
        sample = self.draw(i)
        return sample["image"], sample["label"]

    def name(self, i):
        return f"drawing {i} of shapes/{self.split}"

    def draw(self, i):
        """{"image": uint8 (3, height, width), "label": int, "mask": bool (height, width), "box": (x0, y0, x1,
        y1) in pixels, ends excluded}. The mask and the box are for measures and for dense.py."""
        rng = self.rng(i)
        label = int(rng.integers(len(SHAPES)))
        canvas = self.background(rng)
        cx, cy, radius, turn = rng.uniform([-0.25, -0.25, 0.4, -np.pi], [0.25, 0.25, 0.75, np.pi]).tolist()
        canvas, mask, box = self.put(rng, canvas, label, cx, cy, radius, turn)
        return {"image": self.finish(canvas), "label": label, "mask": mask, "box": box}

    def background(self, rng):
        """(3, height, width) in [0, 1]: a texture, and clutter: half-transparent rectangles anywhere."""
        y, x = self.coordinates
        canvas = self.texture(rng)
        for _ in range(6):
            cx, cy, w, h = rng.uniform([-1, -1, 0.05, 0.05], [1, 1, 0.35, 0.35]).tolist()
            colour = rng.uniform(0, 1, (3, 1, 1)).astype(np.float32)
            box = np.ix_(range(3), np.abs(y - cy)[:, 0] < h, np.abs(x - cx)[0] < w)
            canvas[box] = 0.5 * canvas[box] + 0.5 * colour
        return canvas

    def put(self, rng, canvas, label, cx, cy, radius, turn):
        """Draw an object on the canvas -> canvas, its mask (height, width), its box."""
        # Turn, shift and scale the coordinates of the image into those of the object.
        y, x = self.coordinates
        cos, sin = math.cos(turn) / radius, math.sin(turn) / radius
        u = cos * (x - cx) + sin * (y - cy)
        v = cos * (y - cy) - sin * (x - cx)

        # Blend in a texture of its own, with an edge one pixel wide. `inside` is a distance in radii of the
        # object: times `radius` it is in halves of the short side, and times half the short side in pixels.
        inside = list(SHAPES.values())[label](u, v)  # (height, width)
        alpha = np.clip(0.5 + inside * radius * min(self.image_size) / 2, 0, 1)  # (height, width)
        canvas = (1 - alpha) * canvas + alpha * self.texture(rng)

        # The mask has at least one pixel, however small the image.
        mask = alpha >= 0.5 * alpha.max()
        places = np.argwhere(mask)  # (pixels of the object, 2): row and column of each
        y0, x0 = places.min(axis=0).tolist()
        y1, x1 = (places.max(axis=0) + 1).tolist()
        return canvas, torch.from_numpy(mask), (x0, y0, x1, y1)

    def texture(self, rng):
        """Two colours blended by a wave of random direction and length: (3, height, width) in [0, 1]."""
        y, x = self.coordinates
        first, second = rng.uniform(0, 1, (2, 3, 1, 1)).astype(np.float32)
        turn, frequency, phase = rng.uniform([0, 1, 0], [np.pi, 12, 2 * np.pi]).tolist()
        wave = 0.5 + 0.5 * np.sin(frequency * math.cos(turn) * x + frequency * math.sin(turn) * y + phase)
        return first + wave * (second - first)

    @staticmethod
    def finish(canvas):
        """The canvas in [0, 1] -> uint8 (3, height, width)."""
        return torch.from_numpy((canvas * 255).astype(np.uint8))


# ------------------------------------------------------------------------------------------------------------
# --data: from a word to sets
# ------------------------------------------------------------------------------------------------------------
NAMES = ("shapes", "cifar10", "cifar100")
SHAPES_TRAIN, SHAPES_VAL = 10_000, 2_000  # ours: how many drawings


def open_sets(args):
    """--data -> (training set, val set or None)."""
    if args.data == "shapes":
        size = args.image_size
        return Shapes(size, "train", SHAPES_TRAIN), Shapes(size, "val", SHAPES_VAL)
    if args.data in NAMES:
        return open_torchvision(args)
    path = Path(args.data)
    if os.path.isdir(args.data):  # not path.is_dir(): Path("") is the current folder
        folders = {}  # name in lower case -> folder
        with contextlib.suppress(OSError):  # `open_folder` reports the error
            folders = {folder.name.lower(): folder for folder in path.iterdir() if folder.is_dir()}
        for val in ("val", "valid", "validation", "test"):
            if {"train", val} <= folders.keys():
                return open_folder(folders["train"]), open_folder(folders[val])
        return open_folder(path), None
    if path.suffix == ".txt" and os.path.isfile(path):
        return open_list(path), None
    raise UserError(
        f"--data {args.data}: neither a set ({', '.join(NAMES)}) nor an existing folder or .txt list"
    )


# ------------------------------------------------------------------------------------------------------------
# Transforms, of uint8 tensors
# ------------------------------------------------------------------------------------------------------------
@dataclass
class ResizeToCover:
    """Resize (bicubic, antialiased, the aspect ratio kept) so that image_size is just covered."""

    image_size: list

    def __call__(self, image):
        scale = max(new / old for new, old in zip(self.image_size, image.shape[-2:]))
        size = [max(new, round(old * scale)) for new, old in zip(self.image_size, image.shape[-2:])]
        return v2.functional.resize(image, size, v2.InterpolationMode.BICUBIC)


def center_crop(image_size):
    """The largest centred crop of the asked aspect ratio, at image_size."""
    return v2.Compose([ResizeToCover(image_size), v2.CenterCrop(image_size)])


def train_transform(args):
    """--augment (MAE Table 1e). "random-crop" is MAE's and MixedAE's (Sec. 4.1: "random cropping and
    flipping")."""
    if args.augment == "none":
        return center_crop(args.image_size)
    if args.augment == "fixed-crop":  # 224 of 256, in proportion
        larger = [round(side * 256 / 224) for side in args.image_size]
        return v2.Compose([ResizeToCover(larger), v2.RandomCrop(args.image_size), v2.RandomHorizontalFlip()])

    # Crop a share of the image at random, with an aspect ratio of 3/4 to 4/3 times that of image_size.
    height, width = args.image_size
    ratio = (3 / 4 * width / height, 4 / 3 * width / height)
    bicubic = v2.InterpolationMode.BICUBIC
    crop = v2.RandomResizedCrop(args.image_size, args.crop_scale, ratio, bicubic)
    steps = [crop, v2.RandomHorizontalFlip()]
    if args.augment == "color-jitter":  # the strengths are MoCo v2's; MAE gives none
        steps.append(v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8))
    return v2.Compose(steps)


# ------------------------------------------------------------------------------------------------------------
# Samples and batches
# ------------------------------------------------------------------------------------------------------------
@dataclass
class TrainDataset:
    """(epoch, i) -> (image uint8 (3, height, width) or None, label, names of broken samples met).

    A broken sample is replaced by another one of the same set, drawn from (seed, epoch, i) like the
    augmentation. After ten broken ones in a row the image is None, and the run ends: see BrokenImages.count.
    A label that is a mask or a dict of objects (dense.py) is transformed together with its image.
    """

    dataset: object
    transform: object
    seed: int = 0

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        # Seed torch's generator. With --workers 0 it is the one of the training process, which therefore
        # seeds it again before it draws masks.
        epoch, i = index
        seed_torch(self.seed, "augment", epoch, i)

        broken = []
        while len(broken) < 10:
            try:
                image, label = self.dataset[i]
            except Exception as error:  # PIL and torchvision raise errors of all kinds for bad files
                broken.append(broken_name(self.dataset, i, error))
                i = int(torch.randint(len(self.dataset), ()))
                continue
            if isinstance(label, (tv_tensors.Mask, dict)):
                return *self.transform(image, label), broken
            return self.transform(image), label, broken
        return None, -1, broken


def collate(samples):
    """Samples -> images uint8 (B, 3, height, width); labels (B,), with several labels per image (B, classes),
    or masks (B, height, width); and the names of broken samples. If labels are dicts of objects, images and
    labels are lists. If a sample could not be made, images and labels are None."""
    images, labels, broken = zip(*samples)
    names = sum(broken, [])
    if any(image is None for image in images):
        return None, None, names
    if isinstance(labels[0], dict):
        return list(images), list(labels), names
    labels = [torch.as_tensor(label) for label in labels]
    return torch.stack(images), torch.stack(labels), names


class ResumableBatchSampler:
    """The indices [(epoch, i), ...] of each micro-batch of one process, for the steps from `start` to the end
    of the run. What loader processes had read ahead when a run stopped is read again.

    B' = batch_size x world x accumulate. Batch k of an epoch is order[k B' : (k + 1) B'], of which each
    process and then each of its micro-batches takes a contiguous slice, so that the n consecutive images that
    MixedAE mixes do not depend on the number of processes. What is left at the end of an epoch is dropped.
    """

    def __init__(self, length, batch_size, accumulate, rank, world, seed, epochs):
        self.global_batch = world * accumulate * batch_size  # B'
        if self.global_batch > length:
            raise UserError(
                f"a batch of {self.global_batch} images ({batch_size} x {world} processes x {accumulate} "
                f"accumulated) is larger than the set of {length}; lower --batch-size"
            )
        self.length = length
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.rank = rank
        self.seed = seed
        self.start = 0  # steps that were done before: train.resume sets it
        self.steps_per_epoch = length // self.global_batch
        self.steps = epochs * self.steps_per_epoch

    def __len__(self):
        return (self.steps - self.start) * self.accumulate

    def __iter__(self):
        for step in range(self.start, self.steps):
            # Shuffle anew where an epoch begins. A resumed run may begin inside one: it draws the order of
            # that epoch again, which comes out the same, and goes on at batch k.
            epoch, k = divmod(step, self.steps_per_epoch)
            if step == self.start or k == 0:
                generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
                order = torch.randperm(self.length, generator=generator)

            # Take this process's share of the step's batch, micro-batch by micro-batch.
            batch = order[k * self.global_batch :][: self.global_batch]
            batch = batch.view(-1, self.accumulate, self.batch_size)  # (processes, micro-batches, images)
            for micro_batch in batch[self.rank]:
                yield [(epoch, i) for i in micro_batch.tolist()]


# ------------------------------------------------------------------------------------------------------------
# The measure of MixedAE Sec. 3.4, for train.py's log
# ------------------------------------------------------------------------------------------------------------
def object_awareness(maps, masks):
    """MixedAE Sec. 3.4 as a number: the share of attention that falls on the object, and the share of the
    image that the object covers. An encoder that looks everywhere alike has equal shares.

    maps (B, h, w), each with the sum 1; masks bool (B, height, width) -> two floats.
    """
    area = F.adaptive_avg_pool2d(masks.float(), maps.shape[1:])  # (B, h, w): the covered share of each patch
    return (maps * area).sum(dim=(1, 2)).mean().item(), area.mean().item()


# ============================================================================================================
# A first reading may stop here. What follows: flags, image files, folders and lists, torchvision's sets,
# loader processes, broken images, pictures, charts, and the run's folder.
# ============================================================================================================
def add_data_args(parser, names=NAMES, default="shapes", nargs=None):
    """The flags of --data and of augmentation, for train.py and finetune.py. names: the sets that the help
    lists; nargs: how many words --data takes."""
    add = parser.add_argument_group("data").add_argument

    # Where the images are.
    what = f"a set ({', '.join(names)}), a folder (./cifar10 for one of that name), or a .txt of image paths"
    add("--data", default=default, nargs=nargs, help=what)
    add("--data-root", default="datasets", help="where torchvision's sets lie, or go with --download")
    add("--download", action="store_true", help="let torchvision download the set into --data-root")

    # What is done to each training image.
    add(
        "--augment",
        choices=("none", "fixed-crop", "random-crop", "color-jitter"),
        default="random-crop",
        help="none; a crop of fixed size (224 of 256) and a flip; "
        "a crop of random size and a flip (MAE, MixedAE Sec. 4.1); "
        "the same with colour jitter (MAE Table 1e)",
    )
    add(
        "--crop-scale",
        type=unit_float,
        nargs=2,
        default=[0.2, 1.0],
        metavar=("MIN", "MAX"),
        help="share of the image that a random crop covers (MAE: .2 to 1)",
    )


def add_statistics_args(add, what, mean=None, std=None):
    """--mean and --std, for all programs. what: the help of --mean; mean, std: their defaults."""
    three = dict(nargs=3, metavar=("R", "G", "B"))
    add("--mean", type=unit_float, default=mean, help=what, **three)
    add("--std", type=bounded(float, 1e-3, 1), default=std, help="the same, the deviation", **three)


def check_data_args(parser, args):
    """What the types of the flags cannot check."""
    if not 0 < args.crop_scale[0] <= args.crop_scale[1]:
        parser.error(f"--crop-scale {args.crop_scale[0]} {args.crop_scale[1]}: needs 0 < MIN <= MAX <= 1")


# ------------------------------------------------------------------------------------------------------------
# Image files of every kind, for ImageFiles and for train.py --draw
# ------------------------------------------------------------------------------------------------------------
say_once = functools.cache(print_rank0)  # once per process, so loader processes may each say it again


def open_image(path):
    """An image file as a PIL image, in any format that PIL knows except PostScript (EPS): that it would hand
    to Ghostscript, which runs it as a program."""
    Image.init()  # loads all formats
    return Image.open(path, formats=[name for name in Image.ID if name != "EPS"])


def decode(path):
    """An image file -> uint8 RGB (3, height, width), as `from_pil` has it.

    JPEGs are read by torchvision, which is about twice as fast as PIL. PIL reads all else: other formats,
    JPEGs that torchvision refuses, and JPEGs so large that PIL warns or refuses, because they could fill the
    memory. (A damaged PNG can crash torchvision's decoder, and the process with it.)
    """
    if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe would wait for ever
        raise ValueError("it is no regular file")
    data = np.fromfile(path, dtype=np.uint8)
    image = None
    if bytes(data[:2]) == b"\xff\xd8":  # a JPEG
        # Torchvision has deprecated its decoders. A version without them raises an AttributeError.
        with warnings.catch_warnings(), contextlib.suppress(RuntimeError, AttributeError, struct.error):
            warnings.simplefilter("ignore", DeprecationWarning)
            if jpeg_pixels(data) <= (Image.MAX_IMAGE_PIXELS or math.inf):
                image = torchvision.io.decode_image(
                    torch.from_numpy(data), mode="RGB", apply_exif_orientation=True
                )
    if image is None:
        with open_image(path) as file:
            image = from_pil(file)

    # Refuse an image so thin that it would fill the memory once its short side is as long as asked.
    height, width = image.shape[1:]
    if max(height, width) > 1000 * min(height, width):
        raise ValueError(f"{width} x {height} pixels are too thin to be enlarged")
    return image


def jpeg_pixels(data):
    """How many pixels the header of a JPEG announces. (PIL takes fifty times as long to say so.)"""
    # Walk through the segments up to the first frame header (kind C0, C1 or C2). A segment is 0xFF, its kind,
    # its length (which counts all from itself on), and its content; in a frame header that is depth, height,
    # width and more.
    place = 2  # behind the two bytes with which every JPEG begins
    kind, length, height, width = struct.unpack_from(">xBHxHH", data, place)
    while kind not in (0xC0, 0xC1, 0xC2):
        place += 2 + length
        kind, length, height, width = struct.unpack_from(">xBHxHH", data, place)
    return height * width


def from_pil(image):
    """A PIL image -> uint8 RGB (3, height, width): grey and palettes expanded, the EXIF rotation applied,
    numbers of 16 or 32 bits scaled to 8, what is transparent laid over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # integers of 16 or 32 bits and floats: PIL's `convert` would clip them to 255
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if not 0 <= low <= high < math.inf:  # NaN fails every comparison
            raise ValueError(f"its values go from {low} to {high}; they must be finite, and not negative")
        say_once(
            f"note: mode {image.mode}: white is the first of 1, 255, 1023, 4095, 16383, 65535, .. that no "
            f"value of an image exceeds"
        )

        # Scale to 8 bits. If no value exceeds 1, 1 is white. Else guess the bit depth from the largest value:
        # the smallest of 8, 10, 12, 14, 16 (the depths that cameras write), 18, ... bits that holds it. Each
        # image has its own guess: in a set of 12 bits, one whose largest value is 1000 is taken for 10 bits
        # and comes out four times too bright.
        if high <= 1:
            values = np.rint(255 * values)
        bits = 8
        while high >= 2**bits:
            bits += 2
        image = Image.fromarray((values // 2 ** (bits - 8)).astype(np.uint8))

    # Lay what is transparent over white, whatever colour lies beneath.
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return v2.functional.pil_to_tensor(image.convert("RGB")).contiguous()  # channels first in memory, too


# ------------------------------------------------------------------------------------------------------------
# Folders, lists and torchvision's sets, for `open_sets`, finetune.py and dense.py
# ------------------------------------------------------------------------------------------------------------
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def open_folder(folder):
    """A folder -> ImageFiles. Its first level of folders are the classes; if images lie directly in it, there
    are no labels."""

    def refuse(error):
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{error.filename}: there is no such file or folder; check the path")
        raise UserError(
            f"{error.filename}: no images in it can be read ({error.strerror}); let it be read, or move it "
            f"away"
        )

    # Walk through it, following links. Enter each real folder at most once per class (two classes may link to
    # the same images), and `folder` itself never again, so that links in circles come to an end. Leave out
    # the folders of runs, whose pictures are no data. Sort the folders, so that the result does not depend on
    # the order in which the file system has them.
    found = []  # (path, class)
    top = os.path.realpath(folder)
    listed = set()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        parts = Path(root).relative_to(folder).parts  # () in `folder` itself, else (class, ...)
        if len(parts) == 1:  # a class begins; the one before is finished
            listed = {top}
        real = os.path.realpath(root)
        is_run = parts and ".lock" in names and "pictures" in folders
        if real in listed or is_run:
            folders.clear()  # os.walk goes on into what is left in `folders`: here nothing
            continue
        listed.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            (os.path.join(root, name), "".join(parts[:1]))
            for name in names
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    found.sort()  # index i must be the same file in all processes and restarts
    if not found:
        raise UserError(f"{folder}: no images in it (looked for {', '.join(SUFFIXES)} at any depth)")

    # Name the classes.
    paths, class_names = map(list, zip(*found))
    if "" in class_names:
        return ImageFiles(paths)
    classes, labels = np.unique(class_names, return_inverse=True)
    return ImageFiles(paths, labels.tolist(), classes.tolist())


def read_text(path):
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark, as some programs write it. Bytes that
    are not UTF-8 stay as they are."""
    content = Path(path).read_bytes()
    utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))  # its byte order mark
    return content.decode("utf-16" if utf16 else "utf-8-sig", "surrogateescape")


def open_list(path):
    """A .txt with one image path per line, absolute or relative to the list's own folder -> ImageFiles
    without labels. The paths are sorted, so the order of the lines does not matter."""
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); give a list in UTF-8") from None
    paths = sorted(str(path.parent / line.strip()) for line in lines if line.strip())
    if not paths:
        raise UserError(f"{path}: names no image; give one path per line")
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of its {len(paths)} image files do not exist, such as {missing[:1]}"
        )
    return ImageFiles(paths)


class LabeledDataset:
    """Several data sets as one, whose labels are known without reading an image: for CIFAR here, and for the
    sets of finetune.py.

    parts: [(data set, labels), ...]; samples: [(data set, index in it, label), ...], or None for all. A label
    is a number; with several labels per image it is a list of 0 and 1.
    """

    def __init__(self, parts, classes, samples=None):
        self.classes = list(classes)
        whole = [(part, j, label) for part, labels in parts for j, label in enumerate(labels)]
        self.samples = samples or whole

    def __len__(self):
        return len(self.samples)

    @property
    def labels(self):
        return [label for _, _, label in self.samples]

    def __getitem__(self, i):
        part, j, label = self.samples[i]
        image = part[j][0]
        if not isinstance(image, torch.Tensor):  # torchvision's sets give PIL images
            image = from_pil(image)
        return image, label

    def name(self, i):
        part, j, _ = self.samples[i]
        return part.name(j) if hasattr(part, "name") else f"sample {j} of {type(part).__name__}"

    def choose(self, indices):
        """A set of these samples alone, for finetune.py's subsets and published splits."""
        return LabeledDataset([], self.classes, [self.samples[i] for i in indices])


def open_torchvision(args):
    """cifar10 or cifar100 -> (training set, test set)."""
    kind = getattr(torchvision.datasets, args.data.upper())
    try:
        sets = [kind(args.data_root, train=train, download=args.download) for train in (True, False)]
    except Exception as error:  # each set and each server fails in its own way
        raise UserError(
            f"--data {args.data}: {one_line(error)} -- put its files below {args.data_root} (--data-root) "
            f"or add --download"
        ) from None
    return tuple(LabeledDataset([(dataset, dataset.targets)], dataset.classes) for dataset in sets)


# ------------------------------------------------------------------------------------------------------------
# Loader processes: the training loop gets its batches from `load_batches`
# ------------------------------------------------------------------------------------------------------------
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def available_cores():
    """Cores that this process may use, shared among the training processes of this machine: the default of
    --workers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def load_batches(dataset, batches, workers, pin_memory):
    """Yields what `collate` returns, for each list of indices in `batches`. If a loader process dies or gets
    no shared memory, that is a UserError of code 1."""
    stream = None
    failure = None
    try:
        stream = iter(
            DataLoader(
                dataset,
                batch_sampler=batches,
                num_workers=workers,
                collate_fn=collate_in_worker if workers else collate,
                pin_memory=pin_memory,
                worker_init_fn=ignore_signals,
                prefetch_factor=4 if workers else None,
            )
        )
        # When a loader process dies, torch's handler of SIGCHLD raises an error in whatever line the training
        # process has come to. Remove the handler (for the rest of the program): then the error is raised
        # here, when the next batch is asked for.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield from stream
    except Exception as error:
        if not workers:
            raise
        failure = error

    if failure is not None:
        # Drop every reference to the stream, also those of the error's traceback: that ends the other loader
        # processes before we report.
        failure.__traceback__ = failure.__cause__ = failure.__context__ = None
        del stream
        # If code of ours raised the error in a loader process, torch's text begins with "Caught" and holds
        # the traceback from there. Whoever wrote the data set or the transform needs it: raise it as it is,
        # unless it comes from `share` and says that no shared memory is left.
        text = str(failure) or type(failure).__name__
        if text.startswith("Caught") and "No space left" not in text and "shared memory" not in text:
            raise failure
        reason = text.strip().splitlines()[-1][:120]
        raise UserError(
            f"a loader process failed ({reason}); lower --workers (0: none), or give more memory or shared "
            f"memory (in docker: --shm-size), and start the same command again",
            code=1,
        )


def ignore_signals(worker):
    """In a loader process: a signal to the whole group must not end it before the training process has
    saved."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def collate_in_worker(samples):
    """`collate` for loader processes, which hand batches over in shared memory. Torch would move them there
    in a background thread; if no shared memory is left, that thread's error is lost, and the training process
    waits for ever. We move them here, so that the error reaches it."""
    batch = collate(samples)
    share(batch)
    return batch


def share(batch):
    """Move the tensors of a batch to shared memory, in place."""
    if isinstance(batch, torch.Tensor):
        batch.share_memory_()
    elif isinstance(batch, (list, tuple, dict)):
        for part in batch.values() if isinstance(batch, dict) else batch:
            share(part)


# ------------------------------------------------------------------------------------------------------------
# Broken images
# ------------------------------------------------------------------------------------------------------------
def broken_name(dataset, i, error):
    """What a message calls a sample that cannot be read: its name and, in brackets, the reason. (A UserError
    says both itself.)"""
    if isinstance(error, UserError):
        return str(error)
    reason = one_line(error, 500).partition(" '")[0].rstrip(":")  # without the quoted file name at its end
    return f"{dataset.name(i)} ({reason})"


@dataclass
class BrokenImages:
    """Names and counts the broken images that one process met; more than 10 and more than 1 % of what it saw
    are too many. consequence: what becomes of them."""

    consequence: str = "another image takes its place"
    names: list = field(default_factory=list)
    seen: int = 0
    too_many: bool = False

    def note(self, names):
        """Name those that were not named before."""
        for name in names:
            if name not in self.names:
                tqdm.write(f"warning: {name} is broken; {self.consequence}", file=sys.stderr)
                self.names.append(name)

    def count(self, images, labels, names):
        """What `collate` returned -> (images, labels). The broken ones are noted, the others counted, and
        `too_many` is kept up to date. If `collate` could make no batch, that is a UserError."""
        self.note(names)
        if images is None:
            raise self.error()
        self.seen += len(images)
        self.too_many = len(self.names) > 10 and len(self.names) > 0.01 * self.seen
        return images, labels

    def error(self, total=None):
        """total: how many images there are; None: as many as were seen."""
        total = total or self.seen + len(self.names)
        return UserError(
            f"too many broken images: {len(self.names)} of {total}, the first is {self.names[0]}; repair or "
            f"remove them",
            code=1,
        )


# ------------------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------------------
# Red, blue, yellow, green, violet, orange, turquoise, grey: for the images that mixedae.py mixes, and for the
# runs in a chart.
COLOURS = [
    [value / 255 for value in bytes.fromhex(colour)]
    for colour in ("e54c3d", "3399db", "f2c40f", "2ecc70", "9c59b5", "e57d21", "1abd9c", "808c8c")
]


def fixed_images(dataset, image_size, count):
    """The same `count` images of a set each time, centred -> uint8 (count, 3, height, width); and the masks
    of their objects, bool (count, height, width), or None if the set is not `shapes`. The images are picked
    at random, because files are sorted by class and the first ones would all be of one class."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count].tolist()
    samples = TrainDataset(dataset, center_crop(image_size))  # broken ones are replaced
    images, _ = BrokenImages().count(*collate([samples[0, i] for i in order]))
    masks = torch.stack([dataset.draw(i)["mask"] for i in order]) if isinstance(dataset, Shapes) else None
    return images, masks


def heat_map(maps, images):
    """maps (B, h, w), not negative -> heat from black over red and yellow to white, (B, 3, height, width), as
    large as the images. The scale of each map is relative to its mean: a patch with the mean is dark red, one
    with four times the mean or more is white. So attention that looks everywhere alike is evenly dark red."""
    mean = maps.mean(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    heat = (maps / (4 * mean)).clamp(max=1).unsqueeze(1)  # (B, 1, h, w) in [0, 1]
    heat = F.interpolate(heat, images.shape[-2:])
    return (3 * heat - channels([0, 1, 2], heat)).clamp(0, 1)


def picture_sheet(panels, legend=()):
    """{title: (B, 3, height, width) in [0, 1]} -> one PIL image: a row per image, a titled column per panel,
    enlarged if small. legend: pairs of a name and its colour (three numbers to 255), written below, one per
    line."""
    # Lay the pictures out on a grid.
    pictures = torch.stack([panel.float().cpu() for panel in panels.values()], dim=1)  # (B, panels, 3, ..)
    zoom = max(1, round(128 / pictures.shape[-2]))
    pictures = F.interpolate(pictures.flatten(0, 1).clamp(0, 1), scale_factor=zoom)
    grid = make_grid(pictures, nrow=len(panels), padding=4, pad_value=1)
    grid = v2.functional.to_pil_image(grid)

    # Write the titles above, and the legend below.
    head = 4 + 15 * max(title.count("\n") + 1 for title in panels)
    sheet = ImageOps.expand(grid, (0, head, 0, 15 * len(legend)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, title in enumerate(panels):
        draw.text((4 + i * (pictures.shape[-1] + 4), 2), title, "black")
    for i, (name, colour) in enumerate(legend):
        y = head + grid.height + 15 * i
        draw.rectangle([4, y, 14, y + 10], tuple(colour))
        draw.text((20, y), name, "black")
    return sheet


# ------------------------------------------------------------------------------------------------------------
# Charts of the log
# ------------------------------------------------------------------------------------------------------------
# Numbers of a log row that no chart shows.
NOT_CHARTED = {"step", "epoch", "lr", "images_per_s", "data_wait", "memory_mb", "skipped_steps"}
# Numbers that are drawn into the chart of another one, to compare the two.
SAME_CHART = {"homocon_floor": "homocon", "object_area": "object_attention", "through_H": "skipped"}


def read_log(folder):
    """The rows of a run's log.jsonl; lines that are no rows, such as one that a kill cut short, are left
    out."""
    path = Path(folder) / "log.jsonl"
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and {"step", "epoch"} <= row.keys()]


def curves(folders):
    """The logs of several runs -> one PIL image with a chart for each number of a log row, or None if no log
    has two rows. A number is drawn against the epoch (MixedAE Fig. 6b); a list, one value per layer, is drawn
    against the layer, as the last row has it (Fig. 6a). A run has the same colour in all charts."""
    charts = defaultdict(lambda: defaultdict(list))  # title -> `lines` of line_chart
    styles = {}
    for number, folder in enumerate(folders):
        rows = read_log(folder)
        run = "/".join(Path(folder).parts[-2:])
        if len(rows) < 2:  # one row makes no line
            continue
        for row in rows:
            for key in sorted(row.keys() - NOT_CHARTED):
                values = np.array(row[key], dtype=float)  # () or (layers,)
                if not np.isfinite(values).all():
                    continue
                title = SAME_CHART.get(key, key)
                line = run if title == key else f"{run} {key}"
                styles[line] = (number, 2 if title == key else 1)
                if values.ndim:
                    charts[f"{key}, last row, against the layer"][line] = [*enumerate(values, start=1)]
                else:
                    charts[f"{title} against the epoch"][line].append((row["epoch"], values))
    if not charts:
        return None

    # Put the charts side by side, three in a row, the loss first.
    order = sorted(charts, key=lambda title: (not title.startswith("loss "), title))
    tiles = [v2.functional.pil_to_tensor(line_chart(title, charts[title], styles)) for title in order]
    return v2.functional.to_pil_image(make_grid(tiles, nrow=3, pad_value=255))


def line_chart(title, lines, styles):
    """{name: [(x, y), ...]} -> a PIL image with round ticks on both axes and a legend of two columns. styles:
    {name: (number of the colour, line width)}."""
    # Draw three times as large, to reduce the picture at the end: that smooths lines and letters.
    zoom = 3
    chart = Image.new("RGB", (420 * zoom, 262 * zoom), "white")
    draw = ImageDraw.Draw(chart)
    font = ImageFont.load_default(11 * zoom)

    def write(x, y, text, colour="black", anchor="la"):
        draw.text((zoom * x, zoom * y), text, colour, font, anchor)

    # Find the ranges. The corner of the axes is at (50, 236); above them is the legend.
    points = np.concatenate([np.array(line, dtype=float) for line in lines.values()])
    low, high = points.min(axis=0), points.max(axis=0)
    top = 28 + 14 * math.ceil(len(lines) / 2)

    def place(x, y):
        shares = (np.array([x, y]) - low) / np.maximum(high - low, 1e-9)
        return tuple(zoom * (np.array([50, 236]) + shares * [355, top - 236]))

    # Draw the axes.
    write(50, 4, title)
    for y in round_ticks(low[1], high[1]):
        left, up = place(low[0], y)
        draw.line([(left, up), (405 * zoom, up)], "lightgrey", zoom)
        write(44, up / zoom, f"{y:.4g}", anchor="rm")
    whole = not (points[:, 0] % 1).any()  # then no tick between two whole numbers, such as layers
    for x in round_ticks(low[0], high[0]):
        if whole and x % 1:
            continue
        write(place(x, low[1])[0] / zoom, 242, f"{x:.4g}", anchor="ma")

    # Draw the lines and their names.
    for i, (name, line) in enumerate(lines.items()):
        number, width = styles[name]
        colour = tuple(int(255 * c) for c in COLOURS[number % len(COLOURS)])
        draw.line([place(*point) for point in line], colour, width * zoom, joint="curve")
        write(50 + 185 * (i % 2), 20 + 14 * (i // 2), name, colour)
    return chart.reduce(zoom)


def round_ticks(low, high):
    """Up to seven round numbers from low to high, 1, 2 or 5 times a power of ten apart."""
    if low == high:
        return np.array([low])
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / 6))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 6)
    return step * np.arange(math.ceil(low / step), math.floor(high / step) + 1)


# ------------------------------------------------------------------------------------------------------------
# A run's folder. Only rank 0 has one.
# ------------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def writing(path):
    """Turn an error while a file is written into a UserError of code 1. The file's folder is made again if
    somebody has deleted it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise UserError(f"{path} could not be written ({one_line(error)})", code=1) from None


class RunFolder:
    """args.json, log.jsonl, checkpoint.pt, encoder.pt and pictures/, written so that a kill or a full disk
    harms none of them."""

    failed = False  # whether a save failed: then the program ends with code 1

    def __init__(self, path):
        self.path = Path(path)
        try:
            (self.path / "pictures").mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / ".lock", "w")
        except OSError as error:
            raise UserError(
                f"--out {path}: cannot be written ({error.strerror}); choose another folder"
            ) from None
        try:
            # The system frees the lock when this process dies, in whatever way.
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--out {path}: another process is using this folder; stop it or choose another folder"
            ) from None
        except OSError:
            print(f"warning: {path} cannot be locked; let no second run use it", file=sys.stderr)

    def write(self, name, write):
        """write(file) into a temporary file, then rename it: the old file survives whatever happens."""
        path = self.path / name
        temporary = self.path / f"{name}.tmp"
        try:
            with writing(path):
                with open(temporary, "wb") as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def write_text(self, name, text):
        # Names of files may hold bytes that are not UTF-8: write them unchanged.
        self.write(name, lambda file: file.write(text.encode(errors="surrogateescape")))

    def write_picture(self, name, image):
        self.write(f"pictures/{name}", lambda file: image.save(file, "PNG"))

    def write_args(self, args, argv):
        """args.json: the flags, and what else one needs to repeat the run."""
        commit = ""  # without git, or outside a repository
        words = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
        with contextlib.suppress(OSError):
            commit = subprocess.run(words, capture_output=True, text=True).stdout.strip()
        command = shlex.join([Path(sys.argv[0]).name, *argv])
        facts = {**vars(args), "torch": torch.__version__, "command": command, "commit": commit}
        self.write_text("args.json", json.dumps(facts, indent=1))

    def log(self, row):
        """Append a row to log.jsonl."""
        path = self.path / "log.jsonl"
        with writing(path), open(path, "a") as file:
            file.write(json.dumps(row) + "\n")

    def cut_log(self, step):
        """Drop the rows after `step`, which a resumed run writes again, and lines that were cut short."""
        rows = [json.dumps(row) + "\n" for row in read_log(self.path) if row["step"] <= step]
        self.write_text("log.jsonl", "".join(rows))
