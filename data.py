"""Data sets, transforms, loaders, and the folder that a run writes: the one file that knows file formats, image mean and deviation.

Reading order of the project: vit -> mrmae -> mixedae -> cae -> **data** -> train -> finetune.

    --data NAME | FOLDER | LIST.txt -- open_sets --> train and val set: index -> (uint8 (3, H, W) of any size, label); open_scenes: with a mask in place of
        the label, open_objects: with boxes and a mask an object
        -- Samples: fetch, augment, replace what is broken -- Batches: which samples, in which order -- DataLoader -->
    uint8 (B, 3, H, W), on the device -- normalize --> floats

Randomness has no state, so a run that was stopped anywhere goes on exactly as if it had not been: the order of an epoch is a
function of (seed, epoch), the augmentation of a sample one of (seed, epoch, sample). The epoch reaches the loader's workers
inside the index, because an attribute would go stale in them.
"""
import colorsys
import contextlib
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2
from torchvision.utils import make_grid
from tqdm import tqdm

from vit import UserError, say

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, for every set
STD = (0.229, 0.224, 0.225)
COLOURS = [(0.90, 0.30, 0.24), (0.20, 0.60, 0.86), (0.95, 0.77, 0.06), (0.18, 0.80, 0.44),  # of images, runs, layers in pictures
           (0.61, 0.35, 0.71), (0.90, 0.49, 0.13), (0.10, 0.74, 0.61), (0.50, 0.55, 0.55)]
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def channels(values, images):
    return torch.tensor(values, device=images.device).view(3, 1, 1)


def normalize(images, mean=MEAN, std=STD):
    """uint8 (B, 3, H, W) -> float32, normalised, by default with the ImageNet mean and standard deviation."""
    return (images.float() / 255 - channels(mean, images)) / channels(std, images)


def denormalize(images):
    """The inverse of `normalize`, to floats where [0, 1] is black to white."""
    return images * channels(STD, images) + channels(MEAN, images)


def seed_of(*what):
    """Any numbers and strings -> a 64-bit seed that depends on all of them."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=8).digest(), "little")


def seed_torch(*what):
    """Seed torch's generators with a function of `what`. (torch.manual_seed does the same at a hundred times the cost.)"""
    torch.default_generator.manual_seed(seed_of(*what))
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed_of(*what))


# --------------------------------------------------------------------------------------------------------------------
# Decoding
# --------------------------------------------------------------------------------------------------------------------
def from_pil(image):
    """A PIL image -> uint8 RGB (3, H, W): grey and palettes expanded, alpha dropped, EXIF rotation applied, 16 bits / 256."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # PIL would clip 16 bits to white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def decode(path):
    """An image file -> uint8 RGB (3, H, W), as `from_pil` has it.

    JPEGs go to torchvision's decoder, which is about twice as fast as PIL; everything else, and what it cannot read, to PIL.
    (On damaged PNGs torchvision's decoder can take the process with it.)
    """
    data = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
    if data[:2].tolist() == [0xFF, 0xD8]:  # a JPEG
        with warnings.catch_warnings(), contextlib.suppress(RuntimeError, AttributeError):
            warnings.simplefilter("ignore", DeprecationWarning)
            return torchvision.io.decode_image(data, mode="RGB", apply_exif_orientation=True)
    with Image.open(path) as image:
        return from_pil(image)


# --------------------------------------------------------------------------------------------------------------------
# Sets: len(set) and set[i] -> (uint8 (3, H, W), label); `classes` is a list of names, empty without labels, `labels` one of numbers
# --------------------------------------------------------------------------------------------------------------------
class Files:
    """Image files with labels, or without (label -1)."""

    def __init__(self, paths, labels=None, classes=()):
        self.paths, self.labels, self.classes = paths, labels, list(classes)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return decode(self.paths[i]), self.labels[i] if self.labels else -1

    def name(self, i):
        return self.paths[i]


class Labelled:
    """Samples of data sets with their labels at hand: set[i] -> (uint8 (3, h, w), label). parts: [(data set, labels), ...]."""

    def __init__(self, parts, classes, chosen=None):
        self.parts, self.classes = parts, list(classes)
        self.where = [(part, i) for part, (_, labels) in enumerate(parts) for i in range(len(labels))] if chosen is None else chosen

    def __len__(self):
        return len(self.where)

    @property
    def labels(self):
        """N classes, or lists of numbers for many labels an image."""
        return [self.label(i) for i in range(len(self))]

    def label(self, i):
        part, j = self.where[i]
        return self.parts[part][1][j]

    def __getitem__(self, i):
        part, j = self.where[i]
        image = self.parts[part][0][j][0]
        return image if isinstance(image, torch.Tensor) else from_pil(image), self.label(i)  # torchvision's sets give PIL images

    def name(self, i):
        part, j = self.where[i]
        dataset = self.parts[part][0]
        return dataset.name(j) if hasattr(dataset, "name") else f"sample {j} of {type(dataset).__name__}"

    def choose(self, indices):
        return Labelled(self.parts, self.classes, [self.where[i] for i in indices])


def regular_polygon(u, v, corners):
    """Signed inside-ness of a regular polygon of circumradius 1, for coordinates u, v (H, W): positive inside."""
    sector = 2 * np.pi / corners
    angle = (np.arctan2(u, v) + sector / 2) % sector - sector / 2
    return np.cos(sector / 2) - np.hypot(u, v) * np.cos(angle)


SHAPES = {  # name -> signed inside-ness: > 0 inside, about 1 unit per object radius
    "disc": lambda u, v: 0.9 - np.hypot(u, v),
    "ring": lambda u, v: 0.25 - np.abs(np.hypot(u, v) - 0.7),
    "triangle": lambda u, v: regular_polygon(u, v, 3),
    "square": lambda u, v: 0.75 - np.maximum(np.abs(u), np.abs(v)),
    "frame": lambda u, v: 0.18 - np.abs(np.maximum(np.abs(u), np.abs(v)) - 0.62),
    "cross": lambda u, v: np.maximum(np.minimum(0.9 - np.abs(u), 0.28 - np.abs(v)), np.minimum(0.9 - np.abs(v), 0.28 - np.abs(u))),
    "bar": lambda u, v: np.minimum(0.95 - np.abs(u), 0.3 - np.abs(v)),
    "crescent": lambda u, v: np.minimum(0.9 - np.hypot(u, v), np.hypot(u - 0.45, v) - 0.65),
    "heart": lambda u, v: 0.62 - np.hypot(u, v * 1.1 - 0.55 * np.sqrt(np.abs(u)) + 0.15),
    "star": lambda u, v: 0.62 + 0.3 * np.cos(5 * np.arctan2(u, v)) - np.hypot(u, v),
}


class Shapes:
    """Drawn images: one textured object near the centre of a cluttered background; its class is the shape alone.

    The single-centric-object images that MixedAE Sec. 3.4 builds on, with a mask and a box to measure by. Colours, texture, size,
    rotation and background are nuisance. Deterministic: index i of a split is always the same image, and `train` and `val` share none.
    """

    def __init__(self, image_size, split, length):
        self.image_size, self.split, self.length = tuple(image_size), split, length
        self.classes = list(SHAPES)
        short = min(self.image_size)
        self.coordinates = np.meshgrid(*(np.linspace(-s / short, s / short, s, dtype=np.float32) for s in self.image_size), indexing="ij")  # y, x

    def __len__(self):
        return self.length

    def rng(self, i):
        return np.random.default_rng(seed_of("shapes", self.split, i))

    @property
    def labels(self):
        return [int(self.rng(i).integers(len(SHAPES))) for i in range(self.length)]  # the first draw of `draw`

    def __getitem__(self, i):
        sample = self.draw(i)
        return sample["image"], sample["label"]

    def name(self, i):
        return f"drawing {i} of shapes/{self.split}"

    def draw(self, i):
        """{"image": uint8 (3, H, W), "label": int, "mask": bool (H, W), "box": (x0, y0, x1, y1) in pixels, ends excluded}."""
        rng = self.rng(i)
        label = int(rng.integers(len(SHAPES)))
        canvas = self.background(rng)
        cx, cy, radius, turn = rng.uniform([-0.25, -0.25, 0.4, -np.pi], [0.25, 0.25, 0.75, np.pi]).tolist()
        canvas, mask, box = self.put(rng, canvas, label, cx, cy, radius, turn)
        return {"image": self.finish(canvas), "label": label, "mask": mask, "box": box}

    def background(self, rng):
        """(H, W, 3) in [0, 1]: a texture and clutter, which are boxes of this image's own palette, anywhere."""
        y, x = self.coordinates
        canvas = self.texture(rng)
        for _ in range(6):
            cx, cy, w, h = rng.uniform([-1, -1, 0.05, 0.05], [1, 1, 0.35, 0.35]).tolist()
            box = (np.abs(x - cx) < w) & (np.abs(y - cy) < h)
            canvas[box] = 0.5 * canvas[box] + 0.5 * rng.uniform(0, 1, 3).astype(np.float32)
        return canvas

    def put(self, rng, canvas, label, cx, cy, radius, turn):
        """An object on the canvas; the unit of centre and radius is half the short side -> canvas, mask (H, W), box."""
        y, x = self.coordinates
        cos, sin = math.cos(turn) / radius, math.sin(turn) / radius
        u, v = cos * (x - cx) + sin * (y - cy), cos * (y - cy) - sin * (x - cx)
        inside = list(SHAPES.values())[label](u, v)  # (H, W)
        alpha = np.clip(0.5 + inside * radius * min(self.image_size) / 2, 0, 1)[..., None]  # an edge one pixel wide
        canvas = (1 - alpha) * canvas + alpha * self.texture(rng)
        mask = alpha[..., 0] >= 0.5 * alpha.max()  # at least a pixel, however small the image
        (rows,), (columns,) = mask.any(1).nonzero(), mask.any(0).nonzero()
        return canvas, torch.from_numpy(mask), (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)

    @staticmethod
    def finish(canvas):
        return torch.from_numpy((canvas * 255).astype(np.uint8)).permute(2, 0, 1).contiguous()

    def texture(self, rng):
        """Two colours blended by a wave of random direction and length: (H, W, 3) in [0, 1]."""
        y, x = self.coordinates
        first, second = rng.uniform(0, 1, (2, 3)).astype(np.float32)
        turn, frequency, phase = rng.uniform([0, 1, 0], [np.pi, 12, 2 * np.pi]).tolist()
        wave = 0.5 + 0.5 * np.sin(frequency * math.cos(turn) * x + frequency * math.sin(turn) * y + phase)
        return first + wave[..., None] * (second - first)


def object_awareness(maps, masks):
    """MixedAE Sec. 3.4 as a number: the share of attention that falls on the object, and the share of the image that the object covers.

    maps (B, h, w), each with the sum 1; masks bool (B, H, W) -> two floats. An encoder that looks everywhere alike has equal shares.
    """
    area = torch.nn.functional.adaptive_avg_pool2d(masks.float(), maps.shape[1:])  # the object's share of each patch, (B, h, w)
    return (maps * area).sum(dim=(1, 2)).mean().item(), area.mean().item()


# --------------------------------------------------------------------------------------------------------------------
# Scenes: a class for each pixel
# --------------------------------------------------------------------------------------------------------------------
IGNORE = 255  # the class of pixels that count for nothing, in training and in testing


def try_some(dataset):
    """Read up to fifty samples, for the mistakes that only reading shows and a user can mend (UserError: a mask of another size, a label too large). Files that
    cannot be read are left to training and testing, which name them."""
    for i in torch.linspace(0, len(dataset) - 1, min(len(dataset), 50)).long().tolist():
        try:
            dataset[i]
        except UserError:
            raise
        except Exception:
            pass


class Scenes:
    """Images with a mask in ADE20K's layout: set[i] -> (uint8 (3, H, W), Mask uint8 (H, W) of classes 0 .. len(classes) - 1 and IGNORE).

    folder/images/SPLIT/NAME.jpg has its mask in folder/annotations/SPLIT/NAME.png, where 0 and 255 are ignored and classes count from 1. A mask fits
    its image after the image's EXIF rotation.
    """

    def __init__(self, folder, split, classes):
        self.classes, images = list(classes), Path(folder) / "images" / split
        self.paths = sorted(str(path) for path in images.glob("*") if path.suffix.lower() in SUFFIXES) if images.is_dir() else []
        if not self.paths:
            raise UserError(f"{images}: no images in it")
        self.masks = [str(Path(folder) / "annotations" / split / f"{Path(path).stem}.png") for path in self.paths]
        missing = [mask for mask in self.masks if not os.path.isfile(mask)]
        if missing:
            raise UserError(f"{folder}: {len(missing)} of {len(self.masks)} masks are missing, the first is {missing[0]}")
        try_some(self)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        image, mask = decode(self.paths[i]), np.array(Image.open(self.masks[i]))
        if mask.ndim != 2 or mask.shape != image.shape[-2:]:
            raise UserError(f"{self.masks[i]}: has the shape {' x '.join(map(str, mask.shape))}, its image (after its EXIF rotation) "
                            f"{' x '.join(map(str, image.shape[-2:]))}; a mask is one channel of the same size")
        mask = np.where(mask == IGNORE, 0, mask)
        if mask.max() > len(self.classes):
            raise UserError(f"{self.masks[i]}: has the label {mask.max()}; labels are 0 or 255 (ignored) and 1 to {len(self.classes)}, a line each in classes.txt")
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
        return sample["image"], tv_tensors.Mask((sample["mask"] * (1 + sample["label"])).to(torch.uint8))


# --------------------------------------------------------------------------------------------------------------------
# Objects: a box, a class and a mask each. image_ids[i] and category_ids[k - 1] are COCO's ids of image i and of label k; COCO's evaluation compares with truth
# --------------------------------------------------------------------------------------------------------------------
def coco_tools():
    """pycocotools, an optional package: COCO's files, its masks, its evaluation."""
    try:
        import pycocotools.coco
        import pycocotools.cocoeval
        import pycocotools.mask
    except ImportError:
        raise UserError("--protocol detect reads COCO's files and computes its metric with pycocotools: pip install pycocotools") from None
    return pycocotools


def quietly(function, *args):
    """function(*args) without what pycocotools prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args)


def as_target(boxes, labels, masks, size):
    """Objects as transforms and torchvision's detectors want them: boxes (N, 4) x0 y0 x1 y1 in pixels, labels (N,) from 1, masks uint8 (N, H, W)."""
    return {"boxes": tv_tensors.BoundingBoxes(torch.tensor(boxes, dtype=torch.float32).view(-1, 4), format="XYXY", canvas_size=size),
            "labels": torch.tensor(labels, dtype=torch.long), "masks": tv_tensors.Mask(torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.uint8))}


class CocoObjects:
    """COCO's format: folder/annotations/instances_NAME.json, images in folder/NAME/. set[i] -> (uint8 (3, H, W), target as `as_target` makes it).

    Crowds and boxes without area are no objects to train on (COCO's own train2017 has both); in testing COCO's evaluation treats crowds as it does. An image
    without an object is tested, not trained on, as in detectron2 and mmdetection, and so is one that resizing would make thinner than two pixels.
    """

    def __init__(self, path, training, image_size, resize):
        self.path, self.images = path, Path(path).parent.parent / Path(path).stem.removeprefix("instances_")
        try:
            self.truth = quietly(coco_tools().coco.COCO, str(path))
            self.truth.dataset.setdefault("info", {})  # some versions of pycocotools want it
            self.image_ids, self.category_ids = sorted(self.truth.imgs), sorted(self.truth.cats)
            self.classes = [str(self.truth.cats[k]["name"]) for k in self.category_ids]
            files = [record["file_name"] for record in self.truth.dataset["images"] if record["height"] * record["width"] > 0]
        except Exception as error:  # not JSON, or of another shape
            raise UserError(f"{path}: not in COCO's format ({type(error).__name__}: {str(error).splitlines()[0][:100]})") from None
        if not self.classes or not files or len(files) != len(self.image_ids):
            raise UserError(f"{path}: has {len(self.classes)} categories, {len(files)} images and {len(self.image_ids)} different numbers of images")
        if missing := [name for name in files if not (self.images / name).is_file()]:
            raise UserError(f"{path}: {len(missing)} of its {len(files)} images are missing, the first is {self.images / missing[0]}")
        self.label_of = {k: label for label, k in enumerate(self.category_ids, start=1)}
        self.check_annotations()
        if training:
            self.image_ids = self.trainable(image_size, resize)
        if not any(map(self.objects, self.image_ids)):
            raise UserError(f"{path}: none of its images has an object")
        try_some(self)

    def check_annotations(self):
        """A UserError for a wrong annotation; what may be missing is filled in."""
        flat = []
        for k, annotation in enumerate(self.truth.dataset.get("annotations", []), start=1):
            if wrong := self.mistake(annotation):
                raise UserError(f"{self.path}: annotation {annotation.get('id')} {wrong}")
            if min(annotation["bbox"][2:]) <= 0:
                flat.append(f"{annotation['bbox']} of annotation {annotation.get('id')}")
            annotation |= {"id": k, "iscrowd": annotation.get("iscrowd") or 0}  # COCO's evaluation takes an id of 0 for none, and one of two equal ids
            if annotation.get("area") is None:
                annotation["area"] = float(coco_tools().mask.area(self.truth.annToRLE(annotation)))
        quietly(self.truth.createIndex)
        if flat:
            say(f"warning: {self.path}: {len(flat)} boxes have no area and are not trained on, the first is {flat[0]}")

    def trainable(self, image_size, resize):
        """Ids of the images to train on."""
        sides = {i: least_side((record["height"], record["width"]), image_size, resize) for i, record in self.truth.imgs.items()}
        if thin := [i for i in self.image_ids if sides[i] < 2]:
            say(f"warning: {self.path}: {len(thin)} images are too thin for --image-size and --resize and not trained on, "
                f"the first is {self.truth.imgs[thin[0]]['file_name']}")
        return [i for i in self.image_ids if self.objects(i) and sides[i] >= 2]

    def mistake(self, annotation):
        """What is wrong with an annotation, in words, or None."""
        box, mask, image = annotation.get("bbox"), annotation.get("segmentation"), self.truth.imgs.get(annotation.get("image_id"))
        if image is None:
            return f"is of the image {annotation.get('image_id')}, which is none of its images"
        if annotation.get("category_id") not in self.label_of:
            return f"has the category {annotation.get('category_id')}, which is none of its {len(self.label_of)} categories"
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in box):
            return f"has the bbox {box}; it must be x, y, width, height"
        if isinstance(mask, dict):
            size = [image["height"], image["width"]]
            return None if mask.get("size") == size else f"has a mask of {mask.get('size')} pixels, its image {size}"
        if not mask or not all(isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in mask):
            return "has no segmentation that Mask R-CNN could learn from: it must be polygons of three points or more, x, y, x, y, .., or run lengths"

    def objects(self, image):
        return [annotation for annotation in self.truth.imgToAnns[image] if not annotation["iscrowd"] and min(annotation["bbox"][2:]) > 0]

    def __len__(self):
        return len(self.image_ids)

    def __getitem__(self, i):
        image, annotations = decode(self.name(i)), self.objects(self.image_ids[i])
        size, record = tuple(image.shape[-2:]), self.truth.imgs[self.image_ids[i]]
        if size != (record["height"], record["width"]):
            raise UserError(f"{self.name(i)}: has (after its EXIF rotation) {size[0]} x {size[1]} pixels, its annotations are for "
                            f"{record['height']} x {record['width']}")
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (annotation["bbox"] for annotation in annotations)]
        masks = [torch.from_numpy(self.truth.annToMask(annotation)) for annotation in annotations]
        return image, as_target(boxes, [self.label_of[annotation["category_id"]] for annotation in annotations], masks, size)

    def name(self, i):
        return str(self.images / self.truth.imgs[self.image_ids[i]]["file_name"])


class DrawnObjects(Shapes):
    """`shapes` as CocoObjects are, with one to four objects an image, anywhere, half as large as there in proportion to the image."""

    def __init__(self, *args):
        super().__init__(*args)
        self.image_ids, self.category_ids = list(range(self.length)), list(range(1, 1 + len(SHAPES)))

    def __getitem__(self, i):
        rng = np.random.default_rng(seed_of("objects", self.split, i))
        canvas, placed, labels, masks, boxes = self.background(rng), [], [], [], []
        half = np.array(self.image_size[::-1]) / min(self.image_size)  # of width and height
        for _ in range(int(rng.integers(1, 5))):
            label, radius, turn = int(rng.integers(len(SHAPES))), *rng.uniform([0.2, -np.pi], [0.375, np.pi]).tolist()
            for cx, cy in rng.uniform(radius - half, half - radius, (20, 2)).tolist():
                if all(math.hypot(cx - x, cy - y) > radius + r for x, y, r in placed):  # a place where it covers no other
                    canvas, mask, box = self.put(rng, canvas, label, cx, cy, radius, turn)
                    placed.append((cx, cy, radius))
                    labels, masks, boxes = [*labels, 1 + label], [*masks, mask.to(torch.uint8)], [*boxes, box]
                    break
        return self.finish(canvas), as_target(boxes, labels, masks, self.image_size)

    @functools.cached_property
    def truth(self):
        """The objects of the whole split, as pycocotools holds them."""
        tools, annotations, (H, W) = coco_tools(), [], self.image_size
        for i in self.image_ids:
            target = self[i][1]
            for (x0, y0, x1, y1), label, mask in zip(target["boxes"].tolist(), target["labels"].tolist(), target["masks"]):
                annotations.append({"id": 1 + len(annotations), "image_id": i, "category_id": label, "bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": 0,
                                    "area": int(mask.sum()), "segmentation": tools.mask.encode(np.asfortranarray(mask.numpy()))})
        truth = tools.coco.COCO()
        truth.dataset = {"info": {}, "images": [{"id": i, "file_name": f"{i}.png", "height": H, "width": W} for i in self.image_ids], "annotations": annotations,
                         "categories": [{"id": k, "name": name} for k, name in zip(self.category_ids, self.classes)]}
        quietly(truth.createIndex)
        return truth


# --------------------------------------------------------------------------------------------------------------------
# --data: from a word to sets
# --------------------------------------------------------------------------------------------------------------------
NAMES = ("shapes", "cifar10", "cifar100")
SHAPES_TRAIN, SHAPES_VAL = 10_000, 2_000  # ours


def add_data_args(parser, names=NAMES, dense="", **several):
    """names: of the sets to speak of. dense: the folder that `open_scenes` or `open_objects` takes; else for `open_sets`. several: nargs and default, if --data
    takes more than one."""
    group = parser.add_argument_group("data")
    group.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="loader processes of each training process")
    several = {"default": "shapes", **several}
    if dense:
        group.add_argument("--data", **several, help=f"shapes, or a folder in {dense}")
        parser.set_defaults(data_root="datasets", download=False)  # nothing to download
        return
    group.add_argument("--data", **several, help=f"a set ({', '.join(names)}), a folder (./cifar10 for one of that name), or a .txt of image paths")
    group.add_argument("--data-root", default="datasets", help="where torchvision's sets lie, or go with --download")
    group.add_argument("--download", action="store_true", help="let torchvision download the set into --data-root")
    group.add_argument("--augment", choices=("none", "fixed-crop", "random-crop", "color-jitter"), default="random-crop",
                       help="none; crop of fixed size (224 of 256), flip; crop of random size, flip (Sec. 4.1); the same with colour jitter (MAE Table 1e)")
    group.add_argument("--crop-scale", type=float, nargs=2, default=[0.2, 1.0], metavar=("MIN", "MAX"),
                       help="share of the image that a random crop covers (MAE: .2 to 1)")


def open_folder(folder):
    """A folder -> Files. Its first level of folders are the classes; if images lie directly in it, there are no labels."""
    found, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(root))
        folders[:] = [f for f in folders if not f.startswith(".") and os.path.realpath(os.path.join(root, f)) not in seen]  # a link may lead back up
        found += [os.path.join(root, name) for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    found.sort()
    if not found:
        raise UserError(f"{folder}: no images in it (looked for {', '.join(SUFFIXES)} at any depth)")
    parts = [Path(path).relative_to(folder).parts for path in found]
    if any(len(part) == 1 for part in parts):
        return Files(found)
    classes = sorted({part[0] for part in parts})
    number = {name: i for i, name in enumerate(classes)}
    return Files(found, [number[part[0]] for part in parts], classes)


def open_list(path):
    """A .txt with one image path a line, relative to the list's own folder -> Files without labels."""
    try:
        paths = [str(path.parent / line.strip()) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path}: cannot be read as a text of image paths") from None
    if not paths:
        raise UserError(f"{path}: no image paths in it")
    missing = [p for p in paths if not os.path.isfile(p)]
    if missing:
        raise UserError(f"{path}: {len(missing)} of its {len(paths)} files do not exist, the first is {missing[0]}")
    return Files(sorted(paths))


def open_torchvision(args):
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[args.data]
    try:
        sets = [kind(args.data_root, train=train, download=args.download) for train in (True, False)]
        return tuple(Labelled([(dataset, dataset.targets)], dataset.classes) for dataset in sets)
    except Exception as error:  # each set and each server fails in its own way
        raise UserError(f"--data {args.data}: {str(error).splitlines()[0]} -- put its files below {args.data_root} "
                        f"(--data-root) or add --download") from None


def open_sets(args):
    """--data -> (train set, val set or None)."""
    if args.data == "shapes":
        return Shapes(args.image_size, "train", SHAPES_TRAIN), Shapes(args.image_size, "val", SHAPES_VAL)
    if args.data in NAMES:
        return open_torchvision(args)
    path = Path(args.data)
    if path.is_dir():
        val = next((path / name for name in ("val", "test") if (path / name).is_dir()), None)
        if (path / "train").is_dir() and val:
            return open_folder(path / "train"), open_folder(val)
        return open_folder(path), None
    if path.suffix == ".txt" and path.is_file():
        return open_list(path), None
    raise UserError(f"--data {args.data}: neither a set ({', '.join(NAMES)}) nor an existing folder or .txt list")


def scene_classes(folder):
    """Names of the classes 1, 2, ..: a line each of classes.txt, or the last column of ADE20K's own objectInfo150.txt."""
    for name in ("classes.txt", "objectInfo150.txt"):
        path = Path(folder) / name
        if path.is_file():
            lines = [line.split("\t")[-1].strip() for line in path.read_text(errors="replace").rstrip().splitlines()]
            classes = lines if name == "classes.txt" else lines[1:]
            if not 2 <= len(classes) < IGNORE or not all(classes):
                raise UserError(f"{path}: names {len(classes)} classes{'' if all(classes) else ', one by an empty line'}; there must be 2 to {IGNORE - 1}, a line each")
            return classes
    raise UserError(f"{folder}: no classes.txt in it (a line for each class; ADE20K has objectInfo150.txt)")


def open_scenes(args, splits=("training", "validation")):
    """--data -> sets with masks, of the given splits."""
    if args.data == "shapes":
        drawn = {"training": ("train", SHAPES_TRAIN), "validation": ("val", SHAPES_VAL)}
        return [DrawnScenes(args.image_size, *drawn[split]) for split in splits]
    folder = Path(args.data)
    if not (folder / "images").is_dir() or not (folder / "annotations").is_dir():
        raise UserError(f"--data {args.data}: neither shapes nor a folder with images/ and annotations/, each with training/ and validation/ (ADE20K's layout)")
    classes = scene_classes(folder)
    return [Scenes(folder, split, classes) for split in splits]


def open_objects(args, splits=("train", "val")):
    """--data -> sets with boxes and masks, of the given splits."""
    coco_tools()
    if args.data == "shapes":
        return [DrawnObjects(args.image_size, split, {"train": SHAPES_TRAIN, "val": SHAPES_VAL}[split]) for split in splits]
    sets = []
    for split in splits:
        found = sorted(Path(args.data, "annotations").glob(f"instances_{split}*.json"))
        if len(found) != 1:
            raise UserError(f"--data {args.data}: neither shapes nor a folder in COCO's layout; it needs one annotations/instances_{split}*.json and has {len(found)}")
        sets.append(CocoObjects(found[0], split == "train", args.image_size, args.resize))
    if any(part.classes != sets[0].classes for part in sets):
        raise UserError(f"--data {args.data}: its train and val files have different categories")
    return sets


# --------------------------------------------------------------------------------------------------------------------
# Samples and batches
# --------------------------------------------------------------------------------------------------------------------
class Cover:
    """Resize (bicubic, the aspect ratio kept) so that image_size is just covered: uint8 (3, h, w) -> (3, >= H, >= W)."""

    def __init__(self, image_size):
        self.image_size = image_size

    def __call__(self, image):
        scale = max(new / old for new, old in zip(self.image_size, image.shape[-2:]))
        size = [max(new, round(old * scale)) for new, old in zip(self.image_size, image.shape[-2:])]
        return v2.functional.resize(image, size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)


def centred(image_size):
    """The largest centred crop of the asked aspect ratio, at image_size."""
    return v2.Compose([Cover(image_size), v2.CenterCrop(image_size)])


def train_transform(args):
    """--augment (MAE Table 1e), on uint8 tensors: "random-crop" is MAE's and MixedAE's own (Sec. 4.1: "random cropping and flipping")."""
    H, W = args.image_size
    if args.augment == "none":
        return centred(args.image_size)
    if args.augment == "fixed-crop":  # 224 of 256, in proportion
        crop = [Cover([round(H * 256 / 224), round(W * 256 / 224)]), v2.RandomCrop(args.image_size)]
    else:
        crop = [v2.RandomResizedCrop(args.image_size, scale=args.crop_scale, ratio=(3 / 4 * W / H, 4 / 3 * W / H),
                                     interpolation=v2.InterpolationMode.BICUBIC, antialias=True)]
    # The strengths are MoCo v2's; MAE gives none.
    jitter = [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)] if args.augment == "color-jitter" else []
    return v2.Compose([*crop, v2.RandomHorizontalFlip(), *jitter])


class SceneTransform:
    """Training images and masks together, as BEiT's and CAE's code do: the short side resized to .5 to 2 times the crop's, a random crop of which no
    class fills more than .75 (of ten tries), flip, photometric distortion.

    Theirs adds up to 32 of 255 to the brightness (here a factor, .875 to 1.125), distorts before it fills what a crop lacks (with the mean colour; it is
    ignored), and draws contrast's place in the order by a coin (here any order).
    """

    def __init__(self, image_size, scale=(0.5, 2.0), mean=MEAN):
        self.image_size, self.scale = list(image_size), scale
        fill = {tv_tensors.Image: [int(255 * channel) for channel in mean], tv_tensors.Mask: IGNORE}
        self.crop = v2.RandomCrop(self.image_size, pad_if_needed=True, fill=fill)
        jitters = ({"brightness": 0.125}, {"contrast": 0.5}, {"saturation": 0.5}, {"hue": 0.05})
        self.rest = v2.Compose([v2.RandomHorizontalFlip(), *(v2.RandomApply([v2.ColorJitter(**jitter)], p=0.5) for jitter in jitters)])

    def __call__(self, image, mask):
        ratio = self.scale[0] + (self.scale[1] - self.scale[0]) * torch.rand(()).item()
        short = max(2, round(ratio * min(self.image_size)))
        image, mask = v2.functional.resize(tv_tensors.Image(image), [short], antialias=True), v2.functional.resize(mask, [short])  # bilinear; nearest
        for _ in range(10):
            part, labels = self.crop(image, mask)
            counts = torch.bincount(labels[labels != IGNORE].flatten().long())
            if len(counts) and counts.max() <= 0.75 * counts.sum():
                break
        part, labels = self.rest(part, labels)
        return part.as_subclass(torch.Tensor), labels


class ObjectTransform:
    """Training images with their objects: resize, flip. "multi-scale": the short side to .6 to 1 of min(image_size), in eleven steps (CAE Appendix A: 480 to
    800), the long one at most max(image_size). "jitter": to .1 to 2 times image_size, then a crop of it, filled with the mean colour (ViTDet)."""

    def __init__(self, image_size, resize, mean=MEAN):
        self.crops = resize == "jitter"
        if self.crops:
            fill = {torch.Tensor: [int(255 * channel) for channel in mean], tv_tensors.Mask: 0}  # v2 takes the first plain tensor for the image, and labels as they are
            self.resize = v2.Compose([v2.ScaleJitter(image_size, scale_range=(0.1, 2.0), antialias=True), v2.RandomCrop(image_size, pad_if_needed=True, fill=fill)])
        else:
            self.resize = v2.RandomShortestSize([round(min(image_size) * part / 25) for part in range(15, 26)], max_size=max(image_size), antialias=True)
        self.rest = v2.Compose([v2.RandomHorizontalFlip(), v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(), v2.ToPureTensor()])

    def __call__(self, image, target):
        image, target = self.resize(image, target)
        if self.crops:  # boxes of what the crop has left of the masks, as ViTDet's
            left = target["masks"].flatten(1).bool().any(dim=1)
            masks = target["masks"][left]
            boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])  # ends excluded
            target = as_target(boxes.tolist(), target["labels"][left].tolist(), list(masks), image.shape[-2:])
        return self.rest(image, target)


def least_side(size, image_size, resize):
    """The least short side, in pixels, that ObjectTransform makes of an image of size (h, w)."""
    if resize == "jitter":
        return 0.1 * min(size) * min(new / old for new, old in zip(image_size, size))
    return min(0.6 * min(image_size), min(size) * max(image_size) / max(size))


class Samples(torch.utils.data.Dataset):
    """(epoch, i) -> (image uint8 (3, H, W) or None, label, names of broken samples met).

    A broken sample is replaced by another one of the same set, drawn from (seed, epoch, i) like the augmentation; after ten broken
    ones in a row the image is None, and the training process decides.
    """

    def __init__(self, dataset, transform, seed=0):
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        epoch, i = index
        seed_torch(self.seed, "augment", epoch, i)
        broken = []
        while len(broken) < 10:
            try:
                image, label = self.dataset[i]
            except Exception as error:  # bad files make PIL and torchvision raise all kinds
                broken.append(str(error) if isinstance(error, UserError) else self.dataset.name(i))
                i = int(torch.randint(len(self.dataset), ()))
            else:
                return *(self.transform(image, label) if isinstance(label, (tv_tensors.Mask, dict)) else (self.transform(image), label)), broken
        return None, -1, broken


def collate(samples):
    """Samples -> images (B, 3, H, W) uint8 and labels (B,) or masks (B, H, W), or with objects lists of both, or None twice if one could not be made;
    names of broken samples."""
    images, labels, broken = zip(*samples)
    names = [name for names in broken for name in names]
    if any(image is None for image in images):
        return None, None, names
    if isinstance(labels[0], dict):
        return list(images), list(labels), names
    return torch.stack(images), torch.stack(labels) if isinstance(labels[0], torch.Tensor) else torch.tensor(labels), names


class Batches(torch.utils.data.Sampler):
    """The indices [(epoch, i), ...] of each micro-batch of one process, for the steps from `start` to the end of the run.

    B' = batch_size x world x accumulate. Batch k of an epoch is order[k B' : (k + 1) B'], of which each process and then each of
    its micro-batches takes a contiguous slice, so that groups of neighbours (MixedAE) do not depend on the number of processes.
    What is left at the end of an epoch is dropped.
    """

    def __init__(self, length, batch_size, accumulate, rank, world, seed, epochs):
        self.shape = (world, accumulate, batch_size)
        self.global_batch = world * accumulate * batch_size  # B'
        if self.global_batch > length:
            raise UserError(f"a batch of {self.global_batch} images ({batch_size} x {world} processes x {accumulate} accumulated) is "
                            f"larger than the set of {length}; lower --batch-size")
        self.length, self.rank, self.seed, self.start = length, rank, seed, 0
        self.steps_per_epoch = length // self.global_batch
        self.steps = epochs * self.steps_per_epoch

    def __len__(self):
        return (self.steps - self.start) * self.shape[1]

    def __iter__(self):
        order, order_epoch = None, None
        for step in range(self.start, self.steps):
            epoch, k = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch))
                order, order_epoch = torch.randperm(self.length, generator=generator), epoch
            for micro_batch in order[k * self.global_batch :][: self.global_batch].view(self.shape)[self.rank]:
                yield [(epoch, i) for i in micro_batch.tolist()]


def ignore_signals(worker):
    """A signal to the whole group must not take the workers before the training process has saved; it ends them itself."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def loader(samples, batches, workers, pin_memory):
    """A DataLoader that yields what `collate` returns, for each index list of `batches`."""
    return DataLoader(samples, batch_sampler=batches, num_workers=workers, collate_fn=collate, pin_memory=pin_memory,
                      worker_init_fn=ignore_signals, prefetch_factor=4 if workers else None)


class BrokenImages:
    """Names and counts the broken images that one process met; more than 10 and more than 1 % of what it saw are too many."""

    def __init__(self):
        self.names, self.seen, self.too_many = [], 0, False

    def count(self, images, names):
        """Take note of what `collate` returned; a UserError if a batch could not be filled at all."""
        for name in names:
            if name not in self.names:
                tqdm.write(f"warning: {name} is broken; another image takes its place", file=sys.stderr)
                self.names.append(name)
        if images is None:
            raise self.error()
        self.seen += len(images)
        self.too_many = len(self.names) > 10 and len(self.names) > 0.01 * self.seen

    def error(self):
        return UserError(f"too many broken images: {len(self.names)} of {self.seen + len(self.names)}, the first is {self.names[0]}; "
                         f"repair or remove them", code=1)


def some_images(dataset, image_size, count):
    """`count` images of a set in a fixed random order (its files are sorted by class), centred -> uint8 (count, 3, H, W), and of
    `shapes` what each pixel shows, (count, H, W): 0 background, 1 + class the object; else None."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count].tolist()
    samples = Samples(dataset, centred(image_size), seed=0)  # broken ones are replaced
    images, _, names = collate([samples[0, i] for i in order])
    BrokenImages().count(images, names)
    drawn = [dataset.draw(i) for i in order] if isinstance(dataset, Shapes) else []
    return images, torch.stack([sample["mask"] * (1 + sample["label"]) for sample in drawn]) if drawn else None


# --------------------------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------------------------
NOT_CHARTED = {"step", "epoch", "lr", "images_per_s", "data_wait", "memory_mb"}
LEVELS = {"homocon_floor": "homocon", "object_area": "object_attention", "through_H": "skipped"}  # drawn in the chart of the other, to compare with


def heat_map(maps, images):
    """maps (B, h, w), not negative, over images (B, 3, H, W) in [0, 1]: black-red-yellow-white heat on the dimmed grey image, (B, 3, H, W)."""
    heat = maps / maps.amax(dim=(1, 2), keepdim=True)  # (B, h, w) in [0, 1]
    heat = v2.functional.resize(heat, images.shape[-2:], interpolation=v2.InterpolationMode.NEAREST).unsqueeze(1)  # (B, 1, H, W)
    hot = (3 * heat - torch.arange(3, device=heat.device).view(3, 1, 1)).clamp(0, 1)  # (B, 3, H, W)
    return 0.35 * images.mean(dim=1, keepdim=True) + 0.65 * hot


def outline(maps, pictures, mass=0.5, colour=(0.0, 0.4, 1.0)):
    """A contour on pictures (B, 3, H, W) around the largest values of maps (B, h, w) that together hold `mass` of their sum (CAE Fig. 4)."""
    values, order = maps.flatten(1).sort(dim=1, descending=True)  # (B, L)
    before = values.cumsum(dim=1) - values  # mass of the larger ones
    inside = torch.zeros_like(values).scatter(1, order, (before < mass * values.sum(dim=1, keepdim=True)).float()).view_as(maps)
    inside = v2.functional.resize(inside, pictures.shape[-2:], interpolation=v2.InterpolationMode.NEAREST).unsqueeze(1)  # (B, 1, H, W)
    edge = inside - (1 - torch.nn.functional.max_pool2d(1 - inside, 3, stride=1, padding=1))  # the pixels inside that touch the outside
    return torch.where(edge > 0, torch.tensor(colour).view(3, 1, 1), pictures)


def picture_sheet(panels, titles):
    """panels (B, k, 3, H, W) in [0, 1] -> one PIL image: a row per image, a titled column per panel, enlarged if small."""
    zoom = max(1, round(128 / panels.shape[-2]))
    panels = panels.cpu().repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    grid = v2.functional.to_pil_image(make_grid(panels.flatten(0, 1), nrow=panels.shape[1], padding=4, pad_value=1))
    head = 4 + 15 * max(title.count("\n") + 1 for title in titles)
    sheet = Image.new("RGB", (grid.width, grid.height + head), "white")
    sheet.paste(grid, (0, head))
    for i, title in enumerate(titles):
        ImageDraw.Draw(sheet).text((4 + i * (panels.shape[-1] + 4), 2), title, fill="black")
    return sheet


def patch_scatter(features, regions, title):
    """Patch features (B, h, w, D) on their first two principal components (CAE Fig. 6 uses t-SNE, which needs a further package), coloured
    by what the patch shows: by `regions` (B, H, W), as `some_images` gives them, the one that more than half of its pixels belong to
    (Appendix B); grey is background -> a PIL image."""
    count = int(regions.max()) + 1
    shares = torch.nn.functional.one_hot(regions, count).permute(0, 3, 1, 2).float()  # (B, count, H, W)
    share, label = torch.nn.functional.adaptive_avg_pool2d(shares, features.shape[1:3]).max(dim=1)  # (B, h, w)
    x = features.flatten(0, 2).double()
    x = x - x.mean(dim=0)
    variance, directions = torch.linalg.eigh(x.T @ x)  # ascending
    points = x @ directions[:, -2:].flip(1)
    low, high = points.quantile(0.005, dim=0), points.quantile(0.995, dim=0)
    points = ((points - low) / (high - low).clamp(min=1e-9)).clamp(0, 1) * 320 + 10
    chart = Image.new("RGB", (340, 360), "white")
    draw = ImageDraw.Draw(chart)
    draw.text((8, 2), f"{title}: {100 * variance[-2:].sum() / variance.sum():.0f} % of the variance", fill="black")
    clear = (share > 0.5).flatten()
    for (u, v), c in sorted(zip(points[clear].tolist(), label.flatten()[clear].tolist()), key=lambda point: point[1]):  # background first
        colour = "lightgrey" if c == 0 else tuple(int(255 * part) for part in colorsys.hsv_to_rgb((c - 1) / (count - 1), 0.9, 0.85))
        draw.ellipse((u - 1, v + 17, u + 1, v + 19), fill=colour)
    return chart


def line_chart(title, lines):
    """lines {name: [(x, y), ...]} -> a PIL image with the extremes of both axes and a legend."""
    width, left, top = 420, 50, 28 + 14 * math.ceil(len(lines) / 3)  # a legend of three columns
    bottom = top + 194
    height = bottom + 26
    chart = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(chart)
    xs, ys = (np.array(axis) for axis in zip(*(point for line in lines.values() for point in line)))
    (x0, x_span), (y0, y_span) = ((v.min(), max(np.ptp(v), 1e-9)) for v in (xs, ys))

    def place(x, y):
        return left + (x - x0) / x_span * (width - left - 15), bottom - (y - y0) / y_span * (bottom - top)

    draw.text((left, 4), title, fill="black")
    for part in (0, 0.5, 1):
        x, y = x0 + part * x_span, y0 + part * y_span
        draw.line([place(x0, y), place(x0 + x_span, y)], fill="lightgrey")
        draw.text((left - 6, place(x0, y)[1]), f"{y:.3g}", fill="black", anchor="rm")
        draw.text((place(x, y0)[0], bottom + 6), f"{x:.3g}", fill="black", anchor="ma")
    for i, (name, line) in enumerate(lines.items()):
        colour = tuple(int(255 * c) for c in COLOURS[i % len(COLOURS)])
        draw.line([place(*point) for point in line], fill=colour, width=2)
        draw.text((left + i % 3 * (width - left) / 3, 20 + 14 * (i // 3)), name, fill=colour)
    return chart


def read_log(folder):
    """The rows of a run's log.jsonl; lines that a kill or a full disk cut short are left out."""
    path, rows = Path(folder) / "log.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def curves(folders):
    """The logs of one run folder or of several, to compare them -> one PIL image: each number against the epoch (MixedAE Fig. 6b), each
    list, as the last row has it, against the layer (Fig. 6a). None if there are fewer than two rows."""
    charts, several = {}, len(folders) > 1  # title -> {line: [(x, y), ...]}
    names = [Path(folder).name for folder in folders]
    for folder, name in zip(folders, names):
        rows, run = read_log(folder), name if names.count(name) == 1 else str(folder)
        for row in rows if len(rows) > 1 else ():
            for name in [name for name in row if name not in NOT_CHARTED]:
                title = LEVELS.get(name, name)
                label = run if title == name else f"{run} {name}" if several else name
                values = row[name] if isinstance(row[name], list) else [row[name]]
                if not all(math.isfinite(value) for value in values):
                    continue
                if isinstance(row[name], list):
                    charts.setdefault(f"{name}, last row, against the layer", {})[label] = list(enumerate(values, start=1))
                else:
                    charts.setdefault(f"{title} against the epoch", {}).setdefault(label, []).append((row["epoch"], row[name]))
    if not charts:
        return None
    tiles = [v2.functional.pil_to_tensor(line_chart(title, charts[title])) for title in sorted(charts)]
    height = max(tile.shape[1] for tile in tiles)
    tiles = [v2.functional.pad(tile, [0, 0, 0, height - tile.shape[1]], fill=255) for tile in tiles]
    return v2.functional.to_pil_image(make_grid(tiles, nrow=3, pad_value=255))


# --------------------------------------------------------------------------------------------------------------------
# A run's folder. Only rank 0 writes.
# --------------------------------------------------------------------------------------------------------------------
class RunFolder:
    """args.json, log.jsonl, checkpoint.pt, encoder.pt and pictures/, written so that a kill or a full disk harms none of them."""

    def __init__(self, path):
        self.path, self.failed = Path(path), False
        try:
            (self.path / "pictures").mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / ".lock", "w")
        except OSError as error:
            raise UserError(f"--out {path}: cannot be written ({error.strerror}); choose another folder") from None
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed by the system when this process dies, in whatever way
        except (BlockingIOError, PermissionError):
            raise UserError(f"--out {path}: another process is training in this folder; stop it or choose another folder") from None
        except OSError as error:
            print(f"warning: {path} cannot be locked ({error.strerror}); see to it that no second run uses it", file=sys.stderr)

    def write(self, name, write):
        """write(file) into a temporary file, then rename: the old file survives whatever happens. A failure is told, not raised -> success."""
        temporary, path = self.path / (name + ".tmp"), self.path / name
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
            return True
        except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
            self.warn(name, error)
            with contextlib.suppress(OSError):
                temporary.unlink()
            return False

    def warn(self, name, error):
        self.failed = True
        tqdm.write(f"warning: {self.path / name} could not be written ({str(error).splitlines()[0]}); the old one stays", file=sys.stderr)

    def log(self, row):
        try:
            with open(self.path / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            self.warn("log.jsonl", error)

    def cut_log(self, step):
        """Drop the rows after `step`, which a resumed run writes again, and a last line that a kill cut short."""
        rows = [json.dumps(row) + "\n" for row in read_log(self.path) if row["step"] <= step]
        self.write("log.jsonl", lambda file: file.write("".join(rows).encode()))

    def describe(self, args, argv):
        """args.json: the flags, and what else one needs to repeat the run."""
        commit = None
        with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or no repository
            commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()
        facts = {**vars(args), "torch": torch.__version__, "command": shlex.join([Path(sys.argv[0]).name, *argv]), "commit": commit}
        self.write("args.json", lambda file: file.write(json.dumps(facts, indent=1).encode()))

    def curves(self):
        if chart := curves([self.path]):
            self.picture("curves.png", chart)

    def picture(self, name, image):
        self.write(f"pictures/{name}", lambda file: image.save(file, "PNG"))
