"""Detection: COCO's format, drawn objects, transforms, necks, COCO's metric, whole runs."""

import argparse
import json
import math
import os
import re
import shutil
import signal
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch.testing import assert_close
from torchvision.ops import box_iou
from torchvision.transforms import v2

import conftest
import data
import dense
from conftest import randomize
from test_train import checkpoint, interrupt_at, one_line
from vit import ViT

pytest.importorskip("pycocotools", reason="pycocotools is optional, and computes COCO's metric")
SMALL = "--head-width 16 --proposals 20 --rois 16 --image-size 32".split()
QUICK = "--task detect --neck simple --workers 0 --device cpu --epochs 1 --batch-size 4".split() + SMALL
run = partial(conftest.run, main=dense.main, defaults=QUICK)
evaluate = partial(conftest.run, main=dense.main, defaults="--task detect --workers 0 --device cpu".split())
COLOURS = {3: (250, 30, 30), 7: (30, 30, 250)}  # by COCO's number of the category
MEAN, STD = [0.5, 0.4, 0.3], [0.1, 0.2, 0.3]
TERMS = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}
KEYS = ("ap", "ap50", "ap75", "ap_small")  # there are no larger objects here


def rectangle(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]  # a polygon


def picture(seed):
    """(image, [(category, [x, y, w, h]), ...]): one or two rectangles, apart, of their category's colour."""
    rng = np.random.default_rng(seed)
    image = rng.integers(90, 140, (40, 48, 3)).astype(np.uint8)
    things = []
    for k in range(1 + seed % 2):
        category, x, y = int(rng.choice([3, 7])), int(rng.integers(0, 6)) + 24 * k, int(rng.integers(0, 16))
        w, h = map(int, rng.integers(12, 18, 2))
        image[y : y + h, x : x + w] = COLOURS[category]
        things.append((category, [x, y, w, h]))
    return image, things


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """8 training and 5 test images; of each split the first has no annotation, the second a crowd alone, the
    third a crowd as well."""
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    for split, count in (("train2017", 8), ("val2017", 5)):
        (root / split).mkdir()
        notes, images = [], []
        for i in range(count):
            image, things = picture(10 * count + i)
            number = 100 * count + i
            name = f"{number:012d}.png"
            images.append({"id": number, "file_name": name, "height": 40, "width": 48})
            Image.fromarray(image).save(root / split / name)
            shapes = [(category, box, rectangle(*box), 0) for category, box in things if i > 1]
            if i in (1, 2):
                lengths = {"size": [40, 48], "counts": [40 * 40, 40 * 8]}  # the last eight columns
                shapes.append((3, [40, 0, 8, 40], lengths, 1))
            for category, box, mask, crowd in shapes:
                note = {"id": 1 + len(notes), "category_id": category, "image_id": number, "bbox": box}
                area = box[2] * box[3]
                notes.append({**note, "segmentation": mask, "area": area, "iscrowd": crowd})
        categories = [{"id": 7, "name": "blue thing"}, {"id": 3, "name": "red thing"}]
        content = {"images": images, "annotations": notes, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def copy(coco, tmp_path):
    """copy(change) -> a new copy of `coco`, changed by change(its folder)."""

    def make(change):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(coco, tmp_path / "copy")
        change(tmp_path / "copy")
        return tmp_path / "copy"

    return make


def rewrite(change, split="train2017"):
    """A change for `copy`: change(the content of an annotation file)."""

    def change_file(root):
        file = root / "annotations" / f"instances_{split}.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return change_file


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return conftest.write_encoder(tmp_path_factory, (32, 32), 8, 16, 2, 2)


def open_split(folder, split):
    return dense.open_objects(argparse.Namespace(data=str(folder)), split)


def transform(size, resize):
    return dense.ObjectTransform(argparse.Namespace(image_size=size, resize=resize), data.MEAN)


def results(out):
    return json.loads((out / "results.json").read_text())


def predictions(out):
    return (out / "predictions.json").read_text()


def detector(*flags, depth=12, patch_size=16, image_size=(64, 64)):
    args = dense.parse_args([*QUICK, "--drop-path", "0", *map(str, flags)])
    args.image_size = image_size
    encoder = randomize(ViT(image_size, patch_size, 16, depth, 2))
    return dense.Detector(encoder, args, {"mean": MEAN, "std": STD}, 2)


def watch(module, seen):
    """Append (inputs, output) of each forward of the module to `seen`."""
    module.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))


def normalised(image):
    return data.normalize(255 * image, MEAN, STD)


def batch(*counts, size=(64, 64)):
    """Images with so many objects each."""
    targets = []
    for count in counts:
        boxes = [[4.0 + 12 * k, 6.0, 14.0 + 12 * k, 40.0] for k in range(count)]
        masks = torch.zeros(count, *size, dtype=torch.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes):
            mask[int(y0) : int(y1), int(x0) : int(x1)] = 1
        target = dense.as_target(boxes, [1 + k % 2 for k in range(count)], masks)
        targets.append(v2.ToPureTensor()(target))
    return [torch.rand(3, *size) for _ in counts], targets


def test_cocos_format(coco):
    train_set, test_set = open_split(coco, "train"), open_split(coco, "val")
    assert train_set.classes == [
        "red thing",
        "blue thing",
    ]  # by their numbers, not by their order in the file
    assert train_set.category_ids == [3, 7]
    assert train_set.image_ids == [802, 803, 804, 805, 806, 807]  # what has no object is not trained on
    assert test_set.image_ids == [500, 501, 502, 503, 504]
    for dataset, i, seed in ((train_set, 0, 82), (train_set, 1, 83), (test_set, 3, 53)):
        (image, target), (true, things) = dataset[i], picture(seed)
        assert torch.equal(image, torch.from_numpy(true).permute(2, 0, 1))
        assert target["boxes"].tolist() == [[x, y, x + w, y + h] for _, (x, y, w, h) in things]
        found = [dataset.category_ids[k - 1] for k in target["labels"].tolist()]
        assert found == [category for category, _ in things]  # without the crowd of 802
        for mask, (_, (x, y, w, h)) in zip(target["masks"], things):
            assert mask[y : y + h, x : x + w].all() and mask.sum() == w * h
    assert [len(test_set[i][1]["labels"]) for i in (0, 1)] == [0, 0]
    assert test_set[0][1]["masks"].shape == (0, 40, 48) and test_set[0][1]["boxes"].shape == (0, 4)


def test_drawn_objects_have_tight_boxes_and_do_not_cover_each_other():
    dataset, other = (dense.DrawnObjects((64, 96), split, 40) for split in ("train", "val"))
    counts = set()
    for i in range(40):
        image, target = dataset[i]
        assert torch.equal(image, dataset[i][0]) and not torch.equal(image, other[i][0])
        counts.add(len(target["labels"]))
        assert (target["masks"].sum(dim=0) <= 1).float().mean() > 0.99  # a corner of a square may touch
        for (x0, y0, x1, y1), mask in zip(target["boxes"].int().tolist(), target["masks"]):
            inside = mask[y0:y1, x0:x1]
            assert inside.sum() == mask.sum() and inside[0].any() and inside[-1].any()
            assert inside[:, 0].any() and inside[:, -1].any()
            assert (y1 - y0) * (x1 - x0) < 64 * 64 / 3
    assert counts == {1, 2, 3, 4}
    truth = other.truth
    assert sum(len(other[i][1]["labels"]) for i in range(40)) == len(truth.anns)
    for note in list(truth.anns.values())[:9]:
        target = other[note["image_id"]][1]
        x, y, w, h = note["bbox"]
        k = target["boxes"].tolist().index([x, y, x + w, y + h])
        mask = target["masks"][k].as_subclass(torch.Tensor)
        assert torch.equal(torch.from_numpy(truth.annToMask(note)), mask) and note["area"] == mask.sum()
        assert target["labels"][k] == note["category_id"]


@pytest.mark.parametrize("resize", ["multi-scale", "jitter"])
def test_image_boxes_and_masks_stay_together(coco, resize):
    train_set, sizes, dropped, filled = open_split(coco, "train"), set(), 0, 0
    change = transform([64, 80], resize)
    for step in range(120):
        image, target = change(*train_set[step % 6])
        boxes, labels, masks = target["boxes"], target["labels"], target["masks"]
        assert type(image) is torch.Tensor is type(boxes) and image.dtype == torch.uint8
        assert len(boxes) == len(labels) == len(masks)
        sizes.add(tuple(image.shape[-2:]))
        filled += image[:, 0, 0].tolist() == [int(255 * channel) for channel in data.MEAN]
        dropped += len(labels) < len(train_set[step % 6][1]["labels"])
        for box, label, mask in zip(boxes, labels, masks):
            if mask.sum() < 50:
                continue
            ys, xs = mask.nonzero().unbind(1)
            tight = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()
            assert_close(box, tight, atol=1.5 if resize == "multi-scale" else 0, rtol=0)
            colour = image[:, mask.bool()].float().median(dim=1).values
            assert (colour[0] > colour[2]) == (train_set.category_ids[label - 1] == 3)
    if resize == "multi-scale":
        assert {min(size) for size in sizes} <= {round(64 * part / 25) for part in range(15, 26)}
        assert len(sizes) > 6 and max(map(max, sizes)) <= 80 and not dropped
    else:
        assert (
            sizes == {(64, 80)} and dropped > 0 and filled > 10
        )  # cropped away; filled with the mean colour


@pytest.mark.parametrize("resize", ["multi-scale", "jitter"])
@pytest.mark.parametrize("size", [(1, 900), (800, 19)])
def test_thin_images_keep_two_pixels_and_their_objects(resize, size):
    model = detector("--neck", "fpn", image_size=(32, 32)).train()
    for _ in range(10):
        target = dense.as_target([[0, 0, size[1], size[0]]], [2], torch.ones(1, *size))
        image, target = transform([32, 32], resize)(torch.zeros(3, *size, dtype=torch.uint8), target)
        assert min(image.shape[-2:]) >= 2 and target["masks"].shape[1:] == image.shape[1:]
        loss, _ = model([image / 255], [target])
        assert loss.isfinite()


def test_the_jitter_follows_the_larger_side_of_the_crop():
    sizes = []
    for _ in range(200):
        change = transform([40, 80], "jitter")
        change.crop = lambda image, target: (sizes.append(tuple(image.shape[-2:])), (image, target))[1]
        target = dense.as_target([[0, 0, 100, 100]], [1], torch.ones(1, 100, 100))
        change(torch.zeros(3, 100, 100, dtype=torch.uint8), target)
    heights = [height for height, _ in sizes]
    assert all(height == width for height, width in sizes)
    assert 4 <= min(heights) < 8 and 72 < max(heights) <= 80  # .1 to 2 times what fits into 40 x 80


@pytest.mark.parametrize("neck", ["simple", "fpn"])
@pytest.mark.parametrize("size", [(64, 64), (33, 50), (200, 31), (40, 48)])
def test_strides_are_4_8_16_32_at_any_input_size(neck, size):
    model, seen, image = detector("--neck", neck, image_size=(64, 96)).eval(), [], torch.rand(3, *size)
    watch(model.backbone, seen)
    model([image])
    (images, maps), scale = seen[0], min(64 / min(size), 96 / max(size))
    # As training images are:
    resized = v2.functional.resize(image, [int(side * scale) for side in size], antialias=True)
    shown = images[0, :, : resized.shape[1], : resized.shape[2]]
    assert_close(shown, normalised(resized), atol=1e-4, rtol=0)
    padded = images.shape[-2:]
    assert [side % 64 for side in padded] == [0, 0]  # so that anchors of the coarsest map lie right, too
    assert all(side <= pad < side + 64 for side, pad in zip(resized.shape[1:], padded))
    for (name, x), stride in zip(maps.items(), (4, 8, 16, 32, 64), strict=True):
        assert x.shape[1] == 16 and x.shape[-2:] == tuple(-(-side // stride) for side in padded), name
    assert_close(maps["pool"], F.max_pool2d(maps["3"], 1, stride=2))  # FPN's last level
    heads = model.roi_heads
    assert heads.box_roi_pool.scales == heads.mask_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    assert heads.box_roi_pool.output_size == (7, 7) and heads.mask_roi_pool.output_size == (14, 14)
    assert model.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    half = detector("--neck", neck, patch_size=8)
    assert half.roi_heads.box_roi_pool.scales == [1 / 2, 1 / 4, 1 / 8, 1 / 16]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_images_with_targets_are_normalised_and_padded_not_resized(mode):
    model, (images, targets), seen = detector(), batch(1, 2, size=(48, 40)), []
    watch(model.backbone, seen)
    getattr(model, mode)()(images, targets)
    shown = seen[0][0]
    assert shown.shape == (2, 3, 64, 64) and not shown[..., 48:, :].any() and not shown[..., 40:].any()
    assert_close(shown[1, :, :48, :40], normalised(images[1]))


def test_a_loss_in_eval_mode_moves_no_statistics():
    """The loop asks for one before each save."""
    model, (images, targets) = detector("--neck", "fpn").eval(), batch(1, 2)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def moved():
        return any(not torch.equal(before[name], buffer) for name, buffer in model.named_buffers())

    loss, terms = model(images, targets)
    assert loss.isfinite() and terms.keys() == TERMS and norms and not any(m.training for m in norms)
    assert not moved()
    assert {"boxes", "labels", "scores", "masks"} == model(images)[0].keys()  # testing goes on as ever
    assert not any(m.training for m in model.modules())
    assert all(m.training for m in model.train().modules())
    assert model(images, targets)[1].keys() == TERMS and moved()
    assert not any(m.training for m in model.eval().modules())


@pytest.mark.parametrize("neck", ["simple", "fpn"])
def test_boxes_stay_fp32_under_amp(neck):
    """A place among 1333 pixels needs more bits than bf16 has."""
    model, (images, targets), seen = detector("--neck", neck).train(), batch(1, 2), []
    watch(model.rpn, seen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(images, targets)[0].backward()
        found = model.eval()(images)
    proposals = [output[0][0] for _, output in seen]
    assert [boxes.dtype for boxes in proposals] == [torch.float32] * 2
    assert (proposals[1] != proposals[1].bfloat16()).any()
    assert {result["boxes"].dtype for result in found} == {torch.float32}


def test_flags_reach_the_model():
    model = detector("--drop-path", 0.3, "--proposals", 30, "--rois", 12, depth=4)
    assert [block.drop_path for block in model.encoder.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == 12
    assert (model.rpn.pre_nms_top_n(), model.rpn.post_nms_top_n()) == (60, 30)
    assert model.eval().rpn.pre_nms_top_n() == model.rpn.post_nms_top_n() == 30
    for neck, convolutions in (("simple", 2), ("fpn", 1)):
        model = detector("--neck", neck)
        box_head, mask_head = (
            [*head.modules()] for head in (model.roi_heads.box_head, model.roi_heads.mask_head)
        )
        assert len(model.rpn.head.conv) == convolutions
        assert len([m for m in box_head if isinstance(m, torch.nn.Conv2d)]) == 4
        assert any(isinstance(m, torch.nn.BatchNorm2d) for m in box_head) == (neck == "fpn")
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in mask_head)  # it may see an empty batch


def test_necks_see_the_asked_blocks():
    for neck, numbers in (("simple", [12] * 4), ("fpn", [4, 6, 8, 12])):
        model, outputs, seen = detector("--neck", neck).eval(), [], []
        for block in model.encoder.blocks:
            watch(block, outputs)
        watch(model.backbone.scales, seen)
        model([torch.rand(3, 64, 64)])
        for number, x in zip(numbers, seen[0][0], strict=True):
            assert_close(x, rearrange(outputs[number - 1][1][:, 1:], "b (h w) d -> b d h w", h=4))


def test_the_simple_pyramid_is_vitdets():
    """Step by step: transposed convolutions halve the width each time, then a 1 x 1 and a 3 x 3 convolution,
    a LayerNorm after each but the last scaling."""
    neck, x = randomize(dense.SimplePyramid(16, 8)), torch.randn(2, 16, 4, 6)

    def norm(x, layer):
        x = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], layer.weight, layer.bias, 1e-6)
        return x.permute(0, 3, 1, 2)

    def up(x, layer, width):
        assert layer.weight.shape == (2 * width, width, 2, 2)
        return F.conv_transpose2d(x, layer.weight, layer.bias, stride=2)

    four, two = neck.by_stride[0], neck.by_stride[1]
    four_times = up(F.gelu(norm(up(x, four[0], 8), four[1])), four[3], 4)
    scaled = [four_times, up(x, two, 8), x, F.max_pool2d(x, 2)]
    for found, y, (first, norm1, second, norm2) in zip(neck([x] * 4), scaled, neck.lateral, strict=True):
        y = norm(F.conv2d(y, first.weight), norm1)
        assert_close(found, norm(F.conv2d(y, second.weight, padding=1), norm2))


@pytest.mark.parametrize("neck", ["simple", "fpn"])
@pytest.mark.parametrize("counts", [(2, 1), (3, 0), (0, 0)])
def test_every_parameter_gets_a_gradient_also_without_objects(neck, counts):
    model = detector("--neck", neck).train()
    loss, terms = model(*batch(*counts))
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert model.encoder.pos_embed.requires_grad == (neck == "simple")  # ViTDet trains it
    assert_close(loss.detach(), sum(terms.values()))
    assert terms.keys() == TERMS
    if counts == (0, 0):
        assert terms["loss_mask"] == 0 == terms["loss_box_reg"]
        assert all(torch.isfinite(buffer).all() for buffer in model.buffers())


@pytest.mark.parametrize("neck", ["simple", "fpn"])
def test_both_necks_learn_one_batch(neck):
    torch.manual_seed(0)
    flags = "--neck", neck, "--proposals", 40
    model, (images, targets) = detector(*flags, depth=2, patch_size=8).train(), batch(2, 1)
    for image, target in zip(images, targets):
        image[:, target["masks"].bool().any(dim=0)] *= 0.2
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(images, targets)[0].backward()
        optimizer.step()
    for module in model.modules():  # as many steps as these leave running means behind
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for _ in range(5):
            model(images, targets)
        found = model.eval()(images)
    for one, target in zip(found, targets):
        overlap = box_iou(target["boxes"], one["boxes"][one["scores"] > 0.5])
        assert overlap.shape[1] and (overlap.max(dim=1).values > 0.5).all()


def test_layer_decay_reaches_the_encoder_inside_the_detector():
    model = detector(depth=4)
    groups = dense.layer_decay_groups(model, 0.5, 0.05)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scale[id(model.encoder.patch_embed.proj.weight)] == 0.5**5
    assert scale[id(model.encoder.blocks[3].mlp.fc1.weight)] == 0.5
    assert scale[id(model.backbone.scales.by_stride[1].weight)] == 1
    assert scale[id(model.roi_heads.box_predictor.cls_score.weight)] == 1
    assert len(scale) == sum(p.requires_grad for p in model.parameters())


def test_each_neck_has_the_schedule_of_its_authors():
    """CAE's code drops the rate at epochs 9 and 11 of 12; ViTDet and the detector of MR-MAE's group at steps
    163,889 and 177,546 of 184,375, which are 8/9 and 26/27."""
    cae = dense.LR_DROPS["fpn"]
    rates = {0: 0, 0.25: 0.5, 0.5: 1, 8.99: 1, 9: 0.1, 10.9: 0.1, 11: 0.01, 12: 0.01}
    assert {epoch: dense.step_lr(epoch, 1.0, 0.5, 12, 0.0, cae) for epoch in rates} == pytest.approx(rates)
    args = dense.parse_args(["--task", "detect", "--neck", "simple"])
    schedule = dense.Detection(args, None, {}, None, None).schedule
    steps = {163_887: 1, 163_890: 0.1, 177_545: 0.1, 177_547: 0.01, 184_375: 0.01}
    found = {step: schedule(step / 184_375 * 25, 1.0, 0.0, 25, 0.0) for step in steps}
    assert found == pytest.approx(steps)


def perfect(truth):
    """The truth as a prediction."""
    keys = ("image_id", "category_id", "bbox")
    notes = [note for note in truth.anns.values() if not note["iscrowd"]]
    masks = [truth.annToRLE(note) for note in notes]
    return [
        {**{key: note[key] for key in keys}, "score": 0.9, "segmentation": mask}
        for note, mask in zip(notes, masks)
    ]


def test_the_perfect_prediction_has_100_and_what_lies_in_a_crowd_costs_nothing(coco):
    truth = open_split(coco, "val").truth
    numbers = dense.detection_metrics(truth, perfect(truth))
    assert numbers.keys() == {f"{kind}_{key}" for kind in ("box", "mask") for key in KEYS}
    assert all(value == pytest.approx(100) for value in numbers.values())
    mask = dense.coco_mask.frPyObjects(rectangle(41, 3, 6, 20), 40, 48)[0]
    region = {"image_id": 501, "category_id": 3, "bbox": [41, 3, 6, 20], "score": 0.99, "segmentation": mask}
    before = dict(region)
    assert dense.detection_metrics(truth, [*perfect(truth), region])["box_ap"] == pytest.approx(100)
    assert region == before  # pycocotools would write into it
    elsewhere = {**region, "image_id": 500}  # where there is no crowd
    assert dense.detection_metrics(truth, [*perfect(truth), elsewhere])["box_ap"] < 99
    assert set(dense.detection_metrics(truth, []).values()) == {0.0}


@pytest.mark.parametrize("first, step", [(0, 1), (1, 0)])
def test_annotations_may_be_numbered_in_any_way(copy, first, step):
    """COCO's evaluation takes the number 0 for no annotation, and one of two equal ones."""

    def change(content):
        for k, note in enumerate(content["annotations"]):
            note.update(id=first + step * k, area=None)

    truth = open_split(copy(rewrite(change, "val2017")), "val").truth
    assert dense.detection_metrics(truth, perfect(truth))["box_ap"] == pytest.approx(100)


def test_a_result_row_is_the_box_and_the_mask_that_were_found():
    masks = torch.zeros(1, 1, 10, 12)
    masks[0, 0, 2:5, 3:9] = 0.7
    boxes, labels, scores = torch.tensor([[3.0, 2.0, 9.0, 5.0]]), torch.tensor([2]), torch.tensor([0.5])
    found = {"boxes": boxes, "labels": labels, "scores": scores, "masks": masks}
    (row,) = dense.coco_results(found, 17, [3, 7])
    rle = row["segmentation"]
    decoded = dense.coco_mask.decode({**rle, "counts": rle["counts"].encode()})
    assert (row["image_id"], row["category_id"], row["bbox"], row["score"]) == (17, 7, [3, 2, 6, 3], 0.5)
    assert (decoded == (masks[0, 0] > 0.5).numpy()).all()
    json.dumps(row)


def test_a_picture_shows_what_is_found_with_a_score_above_a_half(coco):
    test_set = open_split(coco, "val")
    task = dense.Detection(None, None, None, None, test_set)
    image, boxes = test_set[3][0], torch.tensor([[2.0, 2, 14, 14], [30, 20, 44, 38]])
    masks = torch.zeros(2, 1, 40, 48)
    masks[0, 0, 2:14, 2:14] = masks[1, 0, 20:38, 30:44] = 0.9
    found = {
        "boxes": boxes,
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.9, 0.4]),
        "masks": masks,
    }
    plain = dense.squared(image)
    painted = (task.paint(image, found) != plain).any(dim=0)  # (256, 256); 4 pixels above and below are 21
    assert plain.shape == (3, 256, 256) and painted[36:90, 16:70].float().mean() > 0.9
    assert not painted[130:].any()
    nothing = {name: value[:0] for name, value in found.items()}
    assert torch.equal(task.paint(image, nothing), plain)


def test_any_number_of_categories_has_colours():
    """Objects365 has 365, LVIS 1,203."""
    test_set = argparse.Namespace(classes=[f"thing {k}" for k in range(365)])
    task = dense.Detection(None, None, None, None, test_set)
    image, masks = torch.zeros(3, 40, 48, dtype=torch.uint8), torch.ones(2, 40, 48)
    for label in (256, 257, 365):
        boxes = [[0.0, 0, 48, 40]] * 2
        picture = task.paint(image, dense.as_target(boxes, [label, 1], masks))
        assert picture.shape == (3, 256, 256) and picture.any()


def official(truth_file, rows, kind):
    """pycocotools by itself."""
    truth = dense.coco.COCO(str(truth_file))
    if kind == "segm":
        rows = [{key: value for key, value in row.items() if key != "bbox"} for row in rows]
    evaluation = dense.cocoeval.COCOeval(truth, truth.loadRes(rows), kind)
    evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    return 100 * evaluation.stats[:4]


@pytest.fixture(scope="module")
def trained(coco, encoder, tmp_path_factory):
    """A run that has learned its few images."""
    out = tmp_path_factory.mktemp("trained") / "run"
    recipe = "--epochs 16 --batch-size 2 --lr 5e-3 --layer-decay 1 --drop-path 0".split()
    run("--encoder", encoder, "--data", coco, "--out", out, *recipe)
    return out


def test_a_run_learns_and_its_ap_is_pycocotools(coco, trained):
    last = results(trained)
    assert last["box_ap50"] > 5 and last["mask_ap50"] > 5
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        rows = json.loads(predictions(trained))
        numbers = official(coco / "annotations" / "instances_val2017.json", rows, kind)
        assert_close(numbers, np.array([last[f"{name}_{key}"] for key in KEYS]), atol=1e-6, rtol=0)
    assert {"checkpoint.pt", "best.pt", "predictions.json", "log.jsonl"} <= set(os.listdir(trained))
    assert (trained / "pictures" / "detection.png").exists()
    row = json.loads((trained / "log.jsonl").read_text().splitlines()[-1])
    assert row["box_ap"] == pytest.approx(last["box_ap"]) and {"loss_mask", "loss_classifier"} <= row.keys()


def test_evaluating_gives_the_same_numbers_and_predicting_keeps_cocos_numbers(coco, trained, tmp_path):
    evaluate("--evaluate", trained, "--out", tmp_path / "test")
    assert results(tmp_path / "test")["box_ap"] == pytest.approx(results(trained)["best_box_ap"])
    evaluate("--evaluate", trained, "--out", tmp_path / "predict", "--predict", coco / "val2017")
    assert predictions(tmp_path / "predict") == predictions(tmp_path / "test")
    assert all((tmp_path / out / "pictures" / "detection.png").exists() for out in ("test", "predict"))

    # Files of other names, one of them broken.
    shutil.copytree(coco / "val2017", tmp_path / "named")
    (tmp_path / "named" / "more").mkdir()
    (tmp_path / "named" / "000000000503.png").rename(tmp_path / "named" / "more" / "some name.png")
    (tmp_path / "named" / "broken.png").write_bytes(b"no image")
    evaluate("--evaluate", trained, "--out", tmp_path / "names", "--predict", tmp_path / "named")
    new_name = {503: "more/some name.png"}
    rows = json.loads(predictions(tmp_path / "test"))
    renamed = [{**row, "image_id": new_name.get(row["image_id"], row["image_id"])} for row in rows]
    assert any(row["image_id"] == new_name[503] for row in renamed)
    found = json.loads(predictions(tmp_path / "names"))
    assert sorted(map(json.dumps, found)) == sorted(map(json.dumps, renamed))


def test_files_whose_numbers_are_equal_go_by_their_paths(coco, trained, tmp_path):
    (tmp_path / "named").mkdir()
    for name in ("503.png", "0503.png", "7.png"):
        shutil.copy(coco / "val2017" / "000000000503.png", tmp_path / "named" / name)
    evaluate("--evaluate", trained, "--out", tmp_path / "out", "--predict", tmp_path / "named")
    rows = json.loads(predictions(tmp_path / "out"))
    assert {row["image_id"] for row in rows} == {"503.png", "0503.png", "7.png"}


def test_evaluating_takes_no_other_model(trained, tmp_path, capsys):
    evaluate("--evaluate", trained, "--out", tmp_path, *SMALL, "--neck", "simple")
    capsys.readouterr()
    for flag, value, own in (("proposals", 100, 20), ("rois", 32, 16), ("neck", "fpn", "simple")):
        evaluate("--evaluate", trained, "--out", tmp_path, f"--{flag}", value, code=2)
        one_line(capsys, f"--{flag} {value}: {trained} has {own}; leave the flag out")


JITTER = "--resize jitter --recompute --accumulate 2 --batch-size 2".split()


@pytest.mark.parametrize("flags", [("--neck", "fpn"), JITTER], ids=["fpn", "jitter"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(flags, coco, encoder, tmp_path, monkeypatch):
    flags = ("--encoder", encoder, "--data", coco, "--epochs", 4, *flags)
    run(*flags, "--out", tmp_path / "whole")
    interrupt_at(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGTERM))
    run(*flags, "--out", tmp_path / "stopped", code=143)
    monkeypatch.undo()
    run(*flags, "--out", tmp_path / "stopped", "--workers", 1)
    whole, stopped = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "stopped")
    assert all(torch.equal(value, stopped["model"][name]) for name, value in whole["model"].items())
    assert predictions(tmp_path / "whole") == predictions(tmp_path / "stopped")


def test_shapes_need_no_files(encoder, tmp_path, monkeypatch):
    monkeypatch.setitem(dense.DRAWN, "train", 8)
    monkeypatch.setitem(dense.DRAWN, "val", 3)
    run("--encoder", encoder, "--data", "shapes", "--out", tmp_path)
    assert "mask_ap" in results(tmp_path)


def note(k, **values):
    """A change of annotation k of the training file."""
    return rewrite(lambda content: content["annotations"][k].update(values))


def lengths(*counts, size=(40, 48)):
    return {"size": list(size), "counts": list(counts)}


def compressed(height=40, width=48):
    """The run lengths of a mask as COCO's tools write them: text."""
    mask = np.asfortranarray(np.eye(height, width, dtype=np.uint8))
    return {"size": [40, 48], "counts": dense.coco_mask.encode(mask)["counts"].decode()}


@pytest.mark.parametrize("seed", range(3))
def test_compressed_run_lengths_are_read_as_pycocotools_writes_them(seed):
    ends = np.random.default_rng(seed).choice(np.arange(1, 400_000), 40, replace=False)
    lengths = np.diff([0, *sorted(ends), 400_000]).tolist()
    packed = dense.coco_mask.frPyObjects({"size": [400, 1000], "counts": lengths}, 400, 1000)
    assert dense.run_lengths(packed["counts"].decode()) == lengths
    with pytest.raises(ValueError, match="break off"):
        dense.run_lengths(packed["counts"].decode() + "P")


def polygon(*numbers):
    return {"segmentation": [list(numbers)]}


BOX = "in an image of 48 x 40 pixels; it must be x, y, width, height in pixels of this image, not corners"
MASK = "in an image of 48 x 40 pixels; it must be polygons of three points or more"
NOTES = {  # what an annotation has, and words of what is wrong with it, if anything
    "another image": ({"image_id": 5}, "is of the image 5, which is none"),
    "another category": ({"category_id": 5}, "has the category 5, which is none of its 1 categories"),
    "no box": ({"bbox": None}, "has the bbox None", BOX),
    "three numbers": ({"bbox": [1, 2, 3]}, "has the bbox [1, 2, 3]", BOX),
    "a box of NaN": ({"bbox": [1, 2, 3, math.nan]}, "has the bbox [1, 2, 3, nan]", BOX),
    "corners": (
        {"bbox": [30, 20, 44, 36]},
        "has the bbox [30, 20, 44, 36]",
        BOX,
        "write x, y, x1 - x, y1 - y",
    ),
    "corners at the edge": ({"bbox": [20, 10, 48, 40]}, "has the bbox [20, 10, 48, 40]", BOX),
    "shares": ({"bbox": [0.25, 0, 0.5, 0.9]}, "has the bbox [0.25, 0, 0.5, 0.9]", BOX, "not shares"),
    "the area NaN": ({"area": math.nan}, "has the area nan; it must be a number of pixels, or be left out"),
    "the area infinite": ({"area": math.inf}, "has the area inf; it must be a number"),
    "a negative area": ({"area": -2}, "has the area -2; it must be a number"),
    "the area as text": ({"area": "20"}, "has the area '20'; it must be a number"),
    "no mask": ({"segmentation": None}, "has the segmentation [()]", MASK),
    "half a point": (polygon(1, 2, 3, 4, 5, 6, 7), "has the segmentation [[1, 2, 3, 4, 5, 6, 7]]", MASK),
    "two points": (polygon(1, 2, 3, 4), "has the segmentation [[1, 2, 3, 4]]", MASK),
    "a point of NaN": (polygon(1, 2, 9, math.nan, 9, 9), "has the segmentation [[1, 2, 9, nan,", MASK),
    "a point at infinity": (polygon(1, 2, 9, -math.inf, 9, 9), "[[1, 2, 9, -inf,", MASK),
    "a point far away": (polygon(1, 2, 1e9, 9, 9, 9), "[[1, 2, 1000000000.0,", MASK),
    "lengths of another size": ({"segmentation": lengths(32, size=(4, 8))}, "'size': [4, 8]", MASK),
    "too short lengths": ({"segmentation": lengths(100, 20)}, "'counts': [100, 20]", MASK, "add up to"),
    "too long lengths": ({"segmentation": lengths(1900, 30)}, "'counts': [1900, 30]", MASK),
    "negative lengths": ({"segmentation": lengths(-5, 1925)}, "'counts': [-5, 1925]", MASK),
    "too short text": ({"segmentation": compressed(20, 24)}, "'size': [40, 48]", MASK, "add up to"),
    "a wrong text": ({"segmentation": {"size": [40, 48], "counts": "T1U1"}}, "'counts': 'T1U1'", MASK),
    "a box elsewhere": ({"bbox": [500, 500, 20, 20]}, "has the bbox [500, 500, 20, 20]", BOX),
    "a box above the image": ({"bbox": [5, -30, 20, 20]}, "has the bbox [5, -30, 20, 20]", BOX),
    "a huge area": ({"area": 1e12}, "has the area 1000000000000.0; it must be a number"),
    "nothing unusual": ({},),
    "the whole image": ({"bbox": [0, 0, 48, 40]},),
    "a large box that ends a little outside": ({"bbox": [2, 3, 47, 39]},),
    "a box that goes far beyond one edge": ({"bbox": [30, 20, 29, 15]},),
    "one pixel in the corner": ({"bbox": [0, 0, 1, 1]},),
    "no width": ({"bbox": [0, 0.5, 0, 0.5]},),
    "no area": ({"area": None},),
    "the area 0": ({"area": 0},),
    "a polygon that leaves the image": (polygon(-20, -20, 90, -5, 60, 90),),
    "two polygons": ({"segmentation": rectangle(1, 2, 3, 4) + rectangle(5, 6, 7, 8)},),
    "run lengths": ({"segmentation": lengths(100, 20, 1800)},),
    "compressed run lengths": ({"segmentation": compressed()},),
}


@pytest.mark.parametrize("change, words", [pytest.param(row[0], row[1:], id=k) for k, row in NOTES.items()])
def test_what_is_wrong_with_an_annotation(change, words):
    whole = {"image_id": 1, "category_id": 3, "bbox": [4, 6, 10, 12], "segmentation": rectangle(4, 6, 10, 12)}
    mistake = dense.mistake_of({**whole, **change}, {1: {"width": 48, "height": 40}}, {3: "thing"})
    assert bool(mistake) == bool(words) and all(word in mistake for word in words), mistake


BAD_FILES = (
    (note(3, category_id=5), "annotation 4 has the category 5, which is none of its 2 categories"),
    (note(3, bbox=7), "not in COCO's format (TypeError"),
    (note(3, bbox=[1, 2, 3, math.nan]), "train2017.json: ", "annotation 4 has the bbox [1, 2, 3, nan]"),
    (note(3, area=math.inf), "train2017.json: ", "annotation 4 has the area inf"),
    (rewrite(lambda c: c["images"].append(c["images"][0])), "9 images with 8 different ids"),
    (rewrite(lambda c: c["categories"].append(c["categories"][0])), "3 categories with 2 different ids"),
    (rewrite(lambda c: c["images"][3].update(id="3")), "not in COCO's format (TypeError"),
    (
        rewrite(lambda c: c["images"][3].update(height=41)),
        "803.png: has",
        "(40, 48) pixels",
        "are for (41, 48)",
    ),
    (rewrite(lambda c: c["categories"].clear()), "annotation 1 has the category 3, which is none of its 0"),
    (rewrite(lambda c: c.pop("images")), "not in COCO's format"),
    (rewrite(lambda c: c["annotations"].clear()), "train2017.json: none of its images has an object"),
    (
        rewrite(lambda c: c["annotations"].clear(), "val2017"),
        "val2017.json: none of its images has an object",
    ),
    (rewrite(lambda c: c["categories"][0].update(name="x"), "val2017"), "different categories"),
    (
        lambda root: (root / "annotations/instances_train2017.json").write_text("no json"),
        "not in COCO's format",
    ),
    (
        lambda root: (root / "train2017/000000000804.png").unlink(),
        "1 of its 8 images are missing, the first is",
        "000000000804.png",
    ),
    (lambda root: shutil.rmtree(root / "annotations"), "one annotations/instances_train*.json and has 0"),
    (
        lambda root: (root / "annotations/instances_train2014.json").write_text("{}"),
        "one annotations/instances_train*.json and has 2",
    ),
)
BAD_FLAGS = (
    (("--rois", 3), "--rois: 3: must be"),
    (("--head-width", 0), "--head-width: 0: must be"),
    (("--compile",), "--resize jitter"),
    (("--label-fraction", 2), "--label-fraction: 2: must be"),
    (("--first-label", 0), "unrecognized"),
    (("--encoder", "none", "--patch-size", 2), "patches of 4, 8, 16 or 32 pixels, not 2"),
)


def test_mistakes_get_one_line(coco, copy, encoder, tmp_path, capsys, monkeypatch):
    for change, *words in BAD_FILES:
        run("--encoder", encoder, "--data", copy(change), "--out", tmp_path / "run", code=2)
        one_line(capsys, *words)
    for flags, words in BAD_FLAGS:
        run("--encoder", encoder, "--data", coco, "--out", tmp_path / "run", *flags, code=2)
        one_line(capsys, words)
    monkeypatch.setattr(dense, "coco", None)
    run("--encoder", encoder, "--data", coco, "--out", tmp_path / "run", code=2)
    one_line(capsys, "pip install pycocotools")


def test_boxes_without_area_are_said_and_left_out(copy, capsys):
    train_set = open_split(copy(note(2, bbox=[3, 4, 0, 9])), "train")
    said = "1 boxes have no area and are not trained on, the first is [3, 4, 0, 9]"
    assert said in capsys.readouterr().out
    for i in range(len(train_set)):
        boxes = train_set[i][1]["boxes"]
        assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_more_objects_than_coco_counts_are_said_once(copy, capsys):
    def change(content):
        first = next(note for note in content["annotations"] if note["image_id"] % 100 == 3)
        content["annotations"] += [{**first, "iscrowd": k} for k in [0] * 101 + [1] * 9]

    def both(root):
        for split in ("train2017", "val2017"):
            rewrite(change, split)(root)

    root = copy(both)
    open_split(root, "train")
    assert not capsys.readouterr().out
    open_split(root, "val")
    assert capsys.readouterr().out.count("warning: ") == 1
    open_split(copy(lambda root: None), "val")
    assert not capsys.readouterr().out


def test_broken_files_are_named(copy, encoder, tmp_path, capsys):
    def make_thin(content):
        content["images"][4].update(height=1, width=900)
        for annotation in content["annotations"]:
            if annotation["image_id"] == 504:
                annotation["bbox"] = [5, 0, 9, 1]

    def change(root):
        (root / "val2017/000000000503.png").write_bytes(b"no image")
        (root / "train2017/000000000804.png").write_bytes(b"no image")
        Image.fromarray(np.zeros((1, 900, 3), np.uint8)).save(root / "val2017/000000000504.png")
        rewrite(make_thin, "val2017")(root)

    flags = ("--batch-size", 6, "--label-fraction", 0.1)  # all six, for a batch needs them
    run("--encoder", encoder, "--data", copy(change), "--out", tmp_path / "run", *flags)
    error = capsys.readouterr().err
    assert re.search(r"000000000503.png \(.*\) is broken; nothing is found in it", error)
    assert re.search(r"000000000804.png \(.*\) is broken; another", error)
    assert "000000000504.png" not in error  # thin, but whole
    assert 503 not in {row["image_id"] for row in json.loads(predictions(tmp_path / "run"))}
