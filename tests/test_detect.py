"""Detection: COCO's format, drawn objects, transforms, necks, COCO's metric, whole runs."""
import json
import os
import shutil
import signal
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import conftest
import data
import finetune
from conftest import randomize
from test_train import checkpoint, interrupt_at, one_line
from vit import ViT

pytest.importorskip("pycocotools", reason="pycocotools is optional, and computes COCO's metric")
SMALL = "--head-width 16 --proposals 20 --rois 16 --image-size 32".split()
QUICK = ["--protocol", "detect", "--neck", "simple", *"--workers 0 --device cpu --epochs 1 --batch-size 4".split(), *SMALL]
run = partial(conftest.run, main=finetune.main, defaults=QUICK)
COLOURS = {3: (250, 30, 30), 7: (30, 30, 250)}  # by COCO's number of the category


def rectangle(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]  # a polygon


def picture(seed):
    """(image, [(category, [x, y, w, h]), ...]): one or two rectangles, apart, of their category's colour."""
    rng = np.random.default_rng(seed)
    image = rng.integers(90, 140, (40, 48, 3)).astype(np.uint8)
    things = [(int(rng.choice([3, 7])), [int(rng.integers(0, 6)) + 24 * k, int(rng.integers(0, 16)), *map(int, rng.integers(12, 18, 2))]) for k in range(1 + seed % 2)]
    for category, (x, y, w, h) in things:
        image[y : y + h, x : x + w] = COLOURS[category]
    return image, things


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """8 training and 5 test images; of each split the first has no annotation, the second a crowd alone, the third a crowd as well."""
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    for split, count in (("train2017", 8), ("val2017", 5)):
        (root / split).mkdir()
        notes, images = [], []
        for i in range(count):
            image, things = picture(10 * count + i)
            number = 100 * count + i
            images.append({"id": number, "file_name": f"{number:012d}.png", "height": 40, "width": 48})
            Image.fromarray(image).save(root / split / images[-1]["file_name"])
            for category, box in things if i > 1 else []:
                notes.append({"category_id": category, "image_id": number, "bbox": box, "segmentation": rectangle(*box), "area": box[2] * box[3], "iscrowd": 0})
            if i in (1, 2):
                lengths = {"size": [40, 48], "counts": [40 * 40, 40 * 8]}  # the last eight columns
                notes.append({"category_id": 3, "image_id": number, "bbox": [40, 0, 8, 40], "segmentation": lengths, "area": 320, "iscrowd": 1})
        content = {"images": images, "annotations": [{"id": k, **note} for k, note in enumerate(notes, start=1)],
                   "categories": [{"id": 7, "name": "blue thing"}, {"id": 3, "name": "red thing"}]}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return conftest.write_encoder(tmp_path_factory, (32, 32), 8, 16, 2, 2)


def open_both(folder):
    return data.open_objects(finetune.argparse.Namespace(data=str(folder), image_size=[64, 64], resize="jitter"))


def detector(*flags, depth=12, patch_size=16, image_size=(64, 64)):
    args = finetune.parse_args([*QUICK, "--drop-path", "0", *map(str, flags)])
    args.image_size = image_size
    return finetune.Detector(randomize(ViT(image_size, patch_size, 16, depth, 2)), args, {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]}, 2)


def normalised(image):
    return (image - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)


def batch(*counts, size=(64, 64)):
    """Images with so many objects each."""
    targets = []
    for count in counts:
        boxes = [[4.0 + 12 * k, 6.0, 14.0 + 12 * k, 40.0] for k in range(count)]
        masks = [torch.zeros(size, dtype=torch.uint8) for _ in boxes]
        for mask, (x0, y0, x1, y1) in zip(masks, boxes):
            mask[int(y0) : int(y1), int(x0) : int(x1)] = 1
        targets.append(data.v2.ToPureTensor()(data.as_target(boxes, [1 + k % 2 for k in range(count)], masks, size)))
    return [torch.rand(3, *size) for _ in counts], targets


def test_cocos_format(coco):
    train_set, test_set = open_both(coco)
    assert train_set.classes == ["red thing", "blue thing"] and train_set.category_ids == [3, 7]  # by their numbers, not by their order in the file
    assert train_set.image_ids == [802, 803, 804, 805, 806, 807] and test_set.image_ids == [500, 501, 502, 503, 504]  # what has no object is tested, not trained on
    for dataset, i, seed in ((train_set, 0, 82), (train_set, 1, 83), (test_set, 3, 53)):
        (image, target), (true, things) = dataset[i], picture(seed)
        assert torch.equal(image, torch.from_numpy(true).permute(2, 0, 1))
        assert target["boxes"].tolist() == [[x, y, x + w, y + h] for _, (x, y, w, h) in things]
        assert [dataset.category_ids[k - 1] for k in target["labels"].tolist()] == [category for category, _ in things]  # without the crowd of 802
        for mask, (_, (x, y, w, h)) in zip(target["masks"], things):
            assert mask[y : y + h, x : x + w].all() and mask.sum() == w * h
    assert [len(test_set[i][1]["labels"]) for i in (0, 1)] == [0, 0] and test_set[0][1]["masks"].shape == (0, 40, 48)


def test_drawn_objects_have_tight_boxes_and_do_not_cover_each_other():
    dataset, other, counts = data.DrawnObjects((64, 96), "train", 40), data.DrawnObjects((64, 96), "val", 40), set()
    for i in range(40):
        image, target = dataset[i]
        assert torch.equal(image, dataset[i][0]) and not torch.equal(image, other[i][0])
        counts.add(len(target["labels"]))
        assert (target["masks"].sum(dim=0) <= 1).float().mean() > 0.99  # a corner of a square may touch
        for (x0, y0, x1, y1), mask in zip(target["boxes"].int().tolist(), target["masks"]):
            inside = mask[y0:y1, x0:x1]
            assert inside.sum() == mask.sum() and inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            assert (y1 - y0) * (x1 - x0) < 64 * 64 / 3
    assert counts == {1, 2, 3, 4}
    truth = other.truth
    assert sum(len(other[i][1]["labels"]) for i in range(40)) == len(truth.anns)
    note = truth.anns[1]
    assert torch.equal(torch.from_numpy(truth.annToMask(note)), other[note["image_id"]][1]["masks"][0].as_subclass(torch.Tensor))


@pytest.mark.parametrize("resize", ["multi-scale", "jitter"])
def test_image_boxes_and_masks_stay_together(coco, resize):
    train_set, sizes, dropped, filled = open_both(coco)[0], set(), 0, 0
    transform = data.ObjectTransform([64, 80], resize)
    for step in range(120):
        image, target = transform(*train_set[step % 6])
        assert type(image) is torch.Tensor is type(target["boxes"]) and image.dtype == torch.uint8 and len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
        sizes.add(tuple(image.shape[-2:]))
        filled += image[:, 0, 0].tolist() == [int(255 * channel) for channel in data.MEAN]
        dropped += len(target["labels"]) < len(train_set[step % 6][1]["labels"])
        for box, label, mask in zip(target["boxes"], target["labels"], target["masks"]):
            if mask.sum() < 50:
                continue
            ys, xs = mask.nonzero().unbind(1)
            assert_close(box, torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float(), atol=1.5 if resize == "multi-scale" else 0, rtol=0)
            colour = image[:, mask.bool()].float().median(dim=1).values
            assert (colour[0] > colour[2]) == (train_set.category_ids[label - 1] == 3)
    if resize == "multi-scale":
        assert {min(size) for size in sizes} <= {round(64 * part / 25) for part in range(15, 26)} and len(sizes) > 6 and max(map(max, sizes)) <= 80 and not dropped
    else:
        assert sizes == {(64, 80)} and dropped > 0 and filled > 10  # cropped away; filled with the mean colour


@pytest.mark.parametrize("neck", ["simple", "fpn"])
@pytest.mark.parametrize("size", [(64, 64), (33, 50), (200, 31), (40, 48)])
def test_strides_are_4_8_16_32_at_any_input_size(neck, size):
    model, seen, image = detector("--neck", neck, image_size=(64, 96)).eval(), {}, torch.rand(3, *size)
    model.backbone.register_forward_hook(lambda module, inputs, maps: seen.update(images=inputs[0], maps=maps))
    model([image])
    padded, scale = seen["images"].shape[-2:], min(64 / min(size), 96 / max(size))
    resized = data.v2.functional.resize(image, [int(side * scale) for side in size], antialias=True)  # as training images are
    assert_close(seen["images"][0, :, : resized.shape[1], : resized.shape[2]], normalised(resized), atol=1e-4, rtol=0)
    assert [side % 32 for side in padded] == [0, 0] and all(side <= pad < side + 32 for side, pad in zip(resized.shape[1:], padded))
    for (name, x), stride in zip(seen["maps"].items(), (4, 8, 16, 32, 64)):
        assert x.shape[1] == 16 and x.shape[-2:] == tuple(-(-side // stride) for side in padded), name
    assert_close(seen["maps"]["pool"], torch.nn.functional.max_pool2d(seen["maps"]["3"], 1, stride=2))  # FPN's last level
    assert model.roi_heads.box_roi_pool.scales == model.roi_heads.mask_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    assert model.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert detector("--neck", neck, patch_size=8).roi_heads.box_roi_pool.scales == [1 / 2, 1 / 4, 1 / 8, 1 / 16]


def test_training_images_are_normalised_and_padded_not_resized():
    model, (images, targets), seen = detector().train(), batch(1, 2, size=(48, 40)), []
    model.backbone.register_forward_hook(lambda module, inputs, maps: seen.append(inputs[0]))
    model(images, targets)
    assert seen[0].shape == (2, 3, 64, 64) and not seen[0][..., 48:, :].any() and not seen[0][..., 40:].any()
    assert_close(seen[0][1, :, :48, :40], normalised(images[1]))


@pytest.mark.parametrize("neck", ["simple", "fpn"])
def test_boxes_stay_fp32_under_amp(neck):
    """A place among 1333 pixels needs more bits than bf16 has."""
    model, (images, targets), seen = detector("--neck", neck).train(), batch(1, 2), []
    model.rpn.register_forward_hook(lambda module, inputs, output: seen.append(output[0][0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(images, targets)[0].backward()
        found = model.eval()(images)
    assert [proposals.dtype for proposals in seen] == [torch.float32] * 2 and (seen[1] != seen[1].bfloat16()).any()
    assert {result["boxes"].dtype for result in found} == {torch.float32}


def test_flags_reach_the_model():
    model = detector("--drop-path", 0.3, "--proposals", 30, "--rois", 12, depth=4)
    assert [block.drop_path for block in model.encoder.blocks] == pytest.approx([0, 0.1, 0.2, 0.3]) and model.roi_heads.fg_bg_sampler.batch_size_per_image == 12
    assert model.rpn.pre_nms_top_n() == model.rpn.post_nms_top_n() == 60 and model.eval().rpn.pre_nms_top_n() == model.rpn.post_nms_top_n() == 30
    for neck, convolutions in (("simple", 2), ("fpn", 1)):
        model = detector("--neck", neck)
        assert len(model.rpn.head.conv) == convolutions and len([m for m in model.roi_heads.box_head.modules() if isinstance(m, torch.nn.Conv2d)]) == 4
        assert any(isinstance(m, torch.nn.BatchNorm2d) for m in model.roi_heads.box_head.modules()) == (neck == "fpn")
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.roi_heads.mask_head.modules())  # which may see an empty batch


def test_necks_see_the_asked_blocks():
    for neck, numbers in (("simple", [12] * 4), ("fpn", [4, 6, 8, 12])):
        model, outputs, seen = detector("--neck", neck).eval(), [], []
        for block in model.encoder.blocks:
            block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        model.backbone.scales.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
        model([torch.rand(3, 64, 64)])
        for number, x in zip(numbers, seen[0], strict=True):
            assert_close(x, outputs[number - 1][:, 1:].transpose(1, 2).unflatten(2, (4, 4)))


def test_the_simple_pyramid_is_vitdets():
    """Step by step: transposed convolutions halve the width each time, then a 1 x 1 and a 3 x 3 convolution, a LayerNorm after each but the last scaling."""
    F, neck, x = torch.nn.functional, randomize(finetune.SimplePyramid(16, 8)), torch.randn(2, 16, 4, 6)

    def norm(x, layer):
        return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], layer.weight, layer.bias, 1e-6).permute(0, 3, 1, 2)

    def up(x, layer, width):
        assert layer.weight.shape == (2 * width, width, 2, 2)
        return F.conv_transpose2d(x, layer.weight, layer.bias, stride=2)

    four, two = neck.by_stride[0], neck.by_stride[1]
    scaled = [up(F.gelu(norm(up(x, four[0], 8), four[1])), four[3], 4), up(x, two, 8), x, F.max_pool2d(x, 2)]
    for found, y, (first, norm1, second, norm2) in zip(neck([x] * 4), scaled, neck.lateral, strict=True):
        assert_close(found, norm(F.conv2d(norm(F.conv2d(y, first.weight), norm1), second.weight, padding=1), norm2))


@pytest.mark.parametrize("neck", ["simple", "fpn"])
@pytest.mark.parametrize("counts", [(2, 1), (3, 0), (0, 0)])
def test_every_parameter_gets_a_gradient_also_without_objects(neck, counts):
    model = detector("--neck", neck).train()
    loss, terms = model(*batch(*counts))
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters()) and not model.encoder.pos_embed.requires_grad
    assert_close(loss.detach(), sum(terms.values()))
    assert terms.keys() == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}
    if counts == (0, 0):
        assert terms["loss_mask"] == 0 == terms["loss_box_reg"]
        assert all(torch.isfinite(buffer).all() for buffer in model.buffers())


@pytest.mark.parametrize("neck", ["simple", "fpn"])
def test_both_necks_learn_one_batch(neck):
    torch.manual_seed(0)
    model, (images, targets) = detector("--neck", neck, depth=2, patch_size=8).train(), batch(2, 1)
    for image, target in zip(images, targets):
        image[:, target["masks"].bool().any(dim=0)] *= 0.2
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(images, targets)[0].backward()
        optimizer.step()
    for buffer in model.modules():  # as many steps as these leave running means behind
        if isinstance(buffer, torch.nn.BatchNorm2d):
            buffer.reset_running_stats()
            buffer.momentum = None
    with torch.no_grad():
        for _ in range(5):
            model(images, targets)
        found = model.eval()(images)
    for one, target in zip(found, targets):
        overlap = data.torchvision.ops.box_iou(target["boxes"], one["boxes"][one["scores"] > 0.5])
        assert overlap.shape[1] and (overlap.max(dim=1).values > 0.5).all()


def test_layer_decay_reaches_the_encoder_inside_the_detector():
    model = detector(depth=4)
    groups = finetune.layer_decay_groups(model, 0.5, 0.05)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scale[id(model.encoder.patch_embed.proj.weight)] == 0.5**5 and scale[id(model.encoder.blocks[3].mlp.fc1.weight)] == 0.5
    assert scale[id(model.backbone.scales.by_stride[1].weight)] == scale[id(model.roi_heads.box_predictor.cls_score.weight)] == 1
    assert len(scale) == sum(p.requires_grad for p in model.parameters())


def test_the_schedule_falls_at_9_and_11_of_12_epochs():
    assert [finetune.steps(epoch, 1.0, 0.5, 12, 0.0) for epoch in (0, 0.25, 0.5, 8.99, 9, 10.9, 11, 12)] == pytest.approx([0, 0.5, 1, 1, 0.1, 0.1, 0.01, 0.01])


def perfect(truth):
    """The truth as a prediction."""
    return [{"image_id": note["image_id"], "category_id": note["category_id"], "bbox": note["bbox"], "score": 0.9, "segmentation": truth.annToRLE(note)}
            for note in truth.anns.values() if not note["iscrowd"]]


def test_the_perfect_prediction_has_100_and_what_lies_in_a_crowd_costs_nothing(coco):
    truth = open_both(coco)[1].truth
    numbers = finetune.detection_metrics(truth, perfect(truth))
    assert numbers.keys() == {f"{kind}_{key}" for kind in ("box", "mask") for key in ("ap", "ap50", "ap75", "ap_small")}  # no larger objects here
    assert all(value == pytest.approx(100) for value in numbers.values())
    region = {"image_id": 501, "category_id": 3, "bbox": [41, 3, 6, 20], "score": 0.99,
              "segmentation": data.coco_tools().mask.frPyObjects(rectangle(41, 3, 6, 20), 40, 48)[0]}
    assert finetune.detection_metrics(truth, [*perfect(truth), region])["box_ap"] == pytest.approx(100)
    assert finetune.detection_metrics(truth, [*perfect(truth), {**region, "image_id": 500}])["box_ap"] < 99  # where there is no crowd
    assert set(finetune.detection_metrics(truth, []).values()) == {0.0}


def test_annotations_may_be_numbered_in_any_way(coco, tmp_path):
    """COCO's evaluation takes the number 0 for no annotation, and one of two equal ones."""
    for number in (lambda k: k, lambda k: 1):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(coco, tmp_path / "copy")
        changed_notes(tmp_path / "copy", lambda c: [note.update(id=number(k), area=None) for k, note in enumerate(c["annotations"])], "val2017")
        truth = open_both(tmp_path / "copy")[1].truth
        assert finetune.detection_metrics(truth, perfect(truth))["box_ap"] == pytest.approx(100)


def test_a_result_row_is_the_box_and_the_mask_that_were_found():
    masks = torch.zeros(1, 1, 10, 12)
    masks[0, 0, 2:5, 3:9] = 0.7
    found = {"boxes": torch.tensor([[3.0, 2.0, 9.0, 5.0]]), "labels": torch.tensor([2]), "scores": torch.tensor([0.5]), "masks": masks}
    (row,) = finetune.coco_results(found, 17, [3, 7])
    decoded = data.coco_tools().mask.decode({**row["segmentation"], "counts": row["segmentation"]["counts"].encode()})
    assert (row["image_id"], row["category_id"], row["bbox"], row["score"]) == (17, 7, [3, 2, 6, 3], 0.5) and (decoded == (masks[0, 0] > 0.5).numpy()).all()
    json.dumps(row)


def official(truth_file, predictions_file, kind):
    """pycocotools by itself, from files."""
    tools = data.coco_tools()
    truth, rows = tools.coco.COCO(str(truth_file)), json.loads(predictions_file.read_text())
    if kind == "segm":
        rows = [{key: value for key, value in row.items() if key != "bbox"} for row in rows]
    evaluation = tools.cocoeval.COCOeval(truth, truth.loadRes(rows), kind)
    evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    return 100 * evaluation.stats[:4]


@pytest.fixture(scope="module")
def trained(coco, encoder, tmp_path_factory):
    """A run that has learned its few images."""
    out = tmp_path_factory.mktemp("trained") / "run"
    run("--encoder", encoder, "--data", coco, "--out", out, "--epochs", 16, "--batch-size", 2, "--lr", 5e-3, "--layer-decay", 1, "--drop-path", 0)
    return out


def test_a_run_learns_and_its_ap_is_pycocotools(coco, trained):
    results = json.loads((trained / "results.json").read_text())
    assert results["box_ap50"] > 5 and results["mask_ap50"] > 5
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        numbers = official(coco / "annotations" / "instances_val2017.json", trained / "predictions.json", kind)
        assert_close(numbers, np.array([results[f"{name}_{key}"] for key in ("ap", "ap50", "ap75", "ap_small")]), atol=1e-6, rtol=0)
    assert {"checkpoint.pt", "best.pt", "predictions.json", "log.jsonl", "pictures"} <= set(os.listdir(trained)) and (trained / "pictures" / "detection.png").exists()
    last = json.loads((trained / "log.jsonl").read_text().splitlines()[-1])
    assert last["box_ap"] == pytest.approx(results["box_ap"]) and {"loss_mask", "loss_classifier"} <= last.keys()


def test_evaluating_gives_the_same_numbers_and_predicting_keeps_cocos_numbers(coco, trained, tmp_path):
    run("--evaluate", trained, "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["box_ap"] == pytest.approx(json.loads((trained / "results.json").read_text())["best_box_ap"])
    run("--evaluate", trained, "--out", tmp_path / "out2", "--predict", coco / "val2017")
    assert (tmp_path / "out2" / "predictions.json").read_text() == (tmp_path / "out" / "predictions.json").read_text()
    assert all((tmp_path / out / "pictures" / "detection.png").exists() for out in ("out", "out2"))
    images = json.loads((tmp_path / "out2" / "images.json").read_text())
    assert images["images"][1] == {"id": 501, "file_name": "000000000501.png"} and images["categories"] == [{"id": 3, "name": "red thing"}, {"id": 7, "name": "blue thing"}]
    shutil.copytree(coco / "val2017", tmp_path / "named")
    (tmp_path / "named" / "000000000503.png").rename(tmp_path / "named" / "some name.png")
    (tmp_path / "named" / "broken.png").write_bytes(b"no image")
    run("--evaluate", trained, "--out", tmp_path / "out3", "--predict", tmp_path / "named")
    names = {record["id"]: record["file_name"] for record in json.loads((tmp_path / "out3" / "images.json").read_text())["images"]}
    assert names[6] == "some name.png" and {row["image_id"] for row in json.loads((tmp_path / "out3" / "predictions.json").read_text())} <= set(names) - {5}


@pytest.mark.parametrize("flags", [("--neck", "fpn"), ("--resize", "jitter", "--recompute", "--accumulate", 2, "--batch-size", 2)], ids=lambda flags: flags[1])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(flags, coco, encoder, tmp_path, monkeypatch):
    flags = ("--encoder", encoder, "--data", coco, "--epochs", 4, *flags)
    run(*flags, "--out", tmp_path / "whole")
    interrupt_at(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGTERM))
    run(*flags, "--out", tmp_path / "stopped", code=143)
    monkeypatch.undo()
    run(*flags, "--out", tmp_path / "stopped", "--workers", 1)
    whole, stopped = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "stopped")
    assert all(torch.equal(value, stopped["model"][name]) for name, value in whole["model"].items())
    assert (tmp_path / "whole" / "predictions.json").read_text() == (tmp_path / "stopped" / "predictions.json").read_text()


def test_shapes_need_no_files(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHAPES_TRAIN", 8)
    monkeypatch.setattr(data, "SHAPES_VAL", 3)
    run("--encoder", encoder, "--data", "shapes", "--out", tmp_path)
    assert "mask_ap" in json.loads((tmp_path / "results.json").read_text())


def changed_notes(root, change, split="train2017"):
    file = root / "annotations" / f"instances_{split}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_mistakes_get_one_line(coco, encoder, tmp_path, capsys, monkeypatch):
    def broken(change):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(coco, tmp_path / "bad")
        change(tmp_path / "bad")
        return tmp_path / "bad"

    def notes(change):
        return lambda root: changed_notes(root, change)

    for change, words in (
        (notes(lambda c: c["annotations"][3].update(category_id=5)), ("annotation 4 has the category 5, which is none of its 2 categories",)),
        (notes(lambda c: c["annotations"][3].update(image_id=5)), ("annotation 4 is of the image 5, which is none",)),
        (notes(lambda c: c["annotations"][3].pop("segmentation")), ("annotation 4 has no segmentation that Mask R-CNN",)),
        (notes(lambda c: c["annotations"][3].pop("bbox")), ("annotation 4 has the bbox None",)),
        (notes(lambda c: c["annotations"][3].update(bbox=[1, 2, 3])), ("annotation 4 has the bbox [1, 2, 3]; it must be x, y, width, height",)),
        (notes(lambda c: c["annotations"][3].update(segmentation=[[1, 2, 3, 4]])), ("annotation 4 has no segmentation that Mask R-CNN", "three points")),
        (notes(lambda c: c["annotations"][0].update(segmentation={"size": [4, 8], "counts": [32]})), ("annotation 1 has a mask of [4, 8] pixels, its image [40, 48]",)),
        (notes(lambda c: c["images"].append(c["images"][0])), ("2 categories, 9 images and 8 different numbers",)),
        (notes(lambda c: c["images"][3].update(height=41)), ("000000000803.png: has", "40 x 48 pixels, its annotations are for 41 x 48")),
        (notes(lambda c: c["categories"].clear()), ("has 0 categories",)),
        (notes(lambda c: c.pop("images")), ("not in COCO's format",)),
        (notes(lambda c: c["annotations"].clear()), ("train2017.json: none of its images has an object",)),
        (lambda root: changed_notes(root, lambda c: c["annotations"].clear(), "val2017"), ("val2017.json: none of its images has an object",)),
        (lambda root: (root / "annotations/instances_train2017.json").write_text("no json"), ("not in COCO's format",)),
        (lambda root: (root / "train2017/000000000804.png").unlink(), ("1 of its 8 images are missing, the first is", "000000000804.png")),
        (lambda root: shutil.rmtree(root / "annotations"), ("one annotations/instances_train*.json and has 0",)),
        (lambda root: shutil.copy(root / "annotations/instances_train2017.json", root / "annotations/instances_train2014.json"), ("and has 2",)),
        (lambda root: changed_notes(root, lambda c: c["categories"][0].update(name="x"), "val2017"), ("different categories",)),
    ):
        run("--encoder", encoder, "--data", broken(change), "--out", tmp_path / "run", code=2)
        one_line(capsys, *words)
    for flags, words in ((("--image-size", 16), ("--image-size 16: detection wants 32",)), (("--rois", 3), ("--rois 3",)), (("--head-width", 0), ("--head-width 0",)), (("--compile",), ("--resize jitter",)),
                         (("--label-fraction", 0.1), ("unrecognized",)), (("--encoder", "none", "--patch-size", 2), ("patches of 4, 8, 16 or 32 pixels, not 2",))):
        run("--encoder", encoder, "--data", coco, "--out", tmp_path / "run", *flags, code=2)
        one_line(capsys, *words)
    monkeypatch.setitem(finetune.sys.modules, "pycocotools.coco", None)
    run("--encoder", encoder, "--data", coco, "--out", tmp_path / "run", code=2)
    one_line(capsys, "pip install pycocotools")


def test_boxes_without_area_are_said_and_left_out(coco, encoder, tmp_path, capsys):
    shutil.copytree(coco, tmp_path / "bad")
    changed_notes(tmp_path / "bad", lambda c: c["annotations"][2].update(bbox=[3, 4, 0, 9]))
    train_set = open_both(tmp_path / "bad")[0]
    assert "1 boxes have no area and are not trained on, the first is [3, 4, 0, 9] of annotation 3" in capsys.readouterr().out
    assert all((target["boxes"][:, 2:] > target["boxes"][:, :2]).all() for _, target in (train_set[i] for i in range(len(train_set))))


def test_images_that_resizing_makes_too_thin_are_said_and_left_out(coco, tmp_path, capsys):
    shutil.copytree(coco, tmp_path / "bad")
    Image.fromarray(np.zeros((19, 800, 3), np.uint8)).save(tmp_path / "bad/train2017/000000000803.png")
    changed_notes(tmp_path / "bad", lambda c: c["images"][3].update(height=19, width=800))
    assert open_both(tmp_path / "bad")[0].image_ids == [802, 804, 805, 806, 807]
    assert "1 images are too thin for --image-size and --resize and not trained on, the first is 000000000803.png" in capsys.readouterr().out
    assert data.least_side((480, 640), [1024, 1024], "jitter") == pytest.approx(76.8) and data.least_side((100, 4000), [800, 1333], "multi-scale") == pytest.approx(33.3, abs=0.1)


def test_broken_files_are_named(coco, encoder, tmp_path, capsys):
    shutil.copytree(coco, tmp_path / "bad")
    (tmp_path / "bad/val2017/000000000503.png").write_bytes(b"no image")
    (tmp_path / "bad/train2017/000000000804.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((1, 900, 3), np.uint8)).save(tmp_path / "bad/val2017/000000000504.png")
    changed_notes(tmp_path / "bad", lambda c: c["images"][4].update(height=1, width=900), "val2017")
    run("--encoder", encoder, "--data", tmp_path / "bad", "--out", tmp_path / "run", "--batch-size", 6)
    error = capsys.readouterr().err
    assert all(words in error for words in ("000000000503.png is broken; nothing is found in it", "000000000804.png is broken; another")) and "000000000504.png" not in error  # thin, but whole
    assert not {row["image_id"] for row in json.loads((tmp_path / "run" / "predictions.json").read_text())} & {503}
