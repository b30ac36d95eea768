"""Semantic segmentation: layout, transform, heads, windows, metrics, whole runs."""

import argparse
import json
import os
import pickle
import re
import shutil
import signal
from functools import partial

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torchvision import tv_tensors

import conftest
import data
import dense
import vit
from conftest import randomize
from test_train import checkpoint, interrupt_at, one_line
from vit import UserError, ViT

QUICK = "--task segment --workers 0 --device cpu --epochs 2 --batch-size 4".split()
CLASSES = ["sky", "road", "tree", "car"]
run = partial(conftest.run, main=dense.main, defaults=QUICK)


def scene(seed, size=(20, 28)):
    """An image whose colour is its class, one of four in each quarter, with a strip of ignored pixels."""
    rng = np.random.default_rng(seed)
    quarter = np.ones((size[0] // 2, size[1] // 2), int)
    mask = np.kron(rng.integers(1, 5, (2, 2)), quarter).astype(np.uint8)
    image = np.stack([mask * 50, 255 - mask * 50, mask * 20], axis=2) + rng.integers(0, 9, (*size, 3))
    mask[:2] = 0
    return image.astype(np.uint8), mask


def write_scenes(root, split, pairs):
    """{name: (image, mask)} as a split of a set; each is an array or a PIL image."""
    for part, pictures in zip(("images", "annotations"), zip(*pairs.values())):
        (root / part / split).mkdir(parents=True)
        for name, picture in zip(pairs, pictures):
            if isinstance(picture, np.ndarray):
                picture = Image.fromarray(picture)
            kind = "TIFF" if picture.mode in "IF" else "PNG"  # PIL knows a file by its content
            picture.save(root / part / split / f"{name}.png", kind)


def counted(numbers):
    """How many pixels of these validation masks count."""
    return sum((scene(500 + i)[1] > 0).sum() for i in numbers)


def results(out):
    return json.loads((out / "results.json").read_text())


def confusion(out):
    return np.loadtxt(out / "confusion.csv", delimiter=",", skiprows=1, usecols=(1, 2, 3, 4))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    for split, count in (("training", 12), ("validation", 5)):
        write_scenes(root, split, {f"{i:02d}": scene(100 * count + i) for i in range(count)})
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return conftest.write_encoder(tmp_path_factory, (16, 16), 4, 32, 4, 2)


def segmenter(*flags, classes=5):
    args = dense.parse_args([*QUICK, "--head-width", "8", *map(str, flags)])
    return dense.Segmenter(randomize(ViT((32, 32), 16, 16, 12, 2)), args, classes)


def transform(size, scale):
    return dense.SceneTransform(argparse.Namespace(image_size=list(size)), data.MEAN, scale)


def test_ade20ks_layout(scenes, tmp_path):
    args = argparse.Namespace(data=str(scenes), first_label=None)
    train_set, test_set = (dense.open_scenes(args, split) for split in ("train", "val"))
    assert (len(train_set), len(test_set)) == (12, 5) and train_set.classes == CLASSES
    image, mask = train_set[3]
    true = scene(1203)[1]
    assert torch.equal(mask[2:].long(), torch.from_numpy(true[2:].astype(int)) - 1)
    assert (mask[:2] == dense.IGNORE).all()
    lines = [f"{i}\t0.1\t1\t1\tthing {i}\n" for i in range(1, 151)]
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + "".join(lines))
    assert dense.scene_classes(tmp_path) == [f"thing {i}" for i in range(1, 151)]


def test_image_and_mask_stay_together(scenes):
    train_set = dense.Scenes(scenes, "training", CLASSES, None)
    large = transform((24, 16), (1.5, 1.5))
    large.rest = lambda image, mask: dense.v2.RandomHorizontalFlip(1.0)(image, mask)  # colours as they are
    right = []
    for i in range(12):
        image, mask = large(*train_set[i])
        assert image.shape == (3, 24, 16) and mask.shape == (24, 16) and type(image) is torch.Tensor
        seen = mask != dense.IGNORE
        right += [((image[0].float() / 50).round() - 1 == mask)[seen].float().mean().item()]
    assert np.mean(right) > 0.9  # but at the edges of blocks, where colours mix
    image, mask = transform((64, 64), (0.5, 0.5))(*train_set[0])
    assert image.shape == (3, 64, 64) and (mask == dense.IGNORE).float().mean() > 0.2  # filled


def test_drawn_scenes_are_the_drawings_of_shapes_with_their_class():
    scenes, shapes = dense.DrawnScenes((32, 32), "val", 50), data.Shapes((32, 32), "val", 50)
    assert scenes.classes == ["background", *shapes.classes]
    for i in range(50):
        drawn, (image, mask) = shapes.draw(i), scenes[i]
        assert torch.equal(image, drawn["image"]) and torch.equal(mask > 0, drawn["mask"])
        assert set(mask.unique().tolist()) == {0, 1 + drawn["label"]}


def test_colours_are_distorted_but_not_exchanged():
    red = torch.zeros(3, 16, 16, dtype=torch.uint8)
    red[0] = 200
    for _ in range(100):
        mask = tv_tensors.Mask(torch.zeros(16, 16, dtype=torch.uint8))
        image, mask = transform((16, 16), (0.5, 2.0))(red, mask)
        assert image[:, mask != dense.IGNORE].float().mean(1).argmax() == 0


def test_the_schedule_has_no_jump():
    rates = [dense.linear_lr(epoch / 100, 1.0, 0.5, 5, 0.0) for epoch in range(501)]
    assert rates[0] == 0 and rates[-1] == 0 and rates[50] == max(rates) == pytest.approx(0.9)
    assert max(abs(a - b) for a, b in zip(rates, rates[1:])) < 0.021
    assert dense.linear_lr(0, 1.0, 0, 5, 0.0) == 1


def test_masks_of_other_kinds(tmp_path):
    image, mask = scene(1)
    mask[3, 3] = 255
    palette = Image.fromarray(mask)
    palette.putpalette(list(range(256)) * 3)
    kinds = {"L": mask, "P": palette, "I;16": mask.astype(np.uint16), "I": mask.astype(np.int32)}
    kinds["F"] = mask.astype(np.float32)  # of whole numbers
    write_scenes(tmp_path, "training", {kind: (image, picture) for kind, picture in kinds.items()})
    for first, classes in (("1", CLASSES), ("0", [*CLASSES, "boat"])):
        found = [sample[1] for sample in dense.Scenes(tmp_path, "training", classes, first)]
        assert all(torch.equal(found[0], other) for other in found) and found[0].dtype == torch.uint8
        assert found[0][3, 3] == dense.IGNORE and found[0][0, 0] == (dense.IGNORE if first == "1" else 0)
        assert torch.equal(found[0][5:].long(), torch.from_numpy(mask[5:].astype(int)) - int(first))


def test_masks_of_one_bit(tmp_path):
    image, mask = scene(1)
    bits = Image.fromarray(mask > 2).convert("1", dither=Image.Dither.NONE)
    write_scenes(tmp_path, "training", {"a": (image, bits)})
    with pytest.raises(UserError, match="labels .0, 1. and never 2"):
        dense.Scenes(tmp_path, "training", ["far", "near"], None)
    found = dense.Scenes(tmp_path, "training", ["far", "near"], "0")[0][1]
    assert torch.equal(found.bool(), torch.from_numpy(mask > 2)) and found.max() == 1


FROM_0 = "give --first-label 0: j is line j + 1", "give --first-label 1"
EMPTY = "nothing to learn", "255 is always ignored"
SETS = {  # labels of each mask that was read, how many classes, --first-label; words of the refusal, if any
    "two classes, from 0": ([{0, 1}] * 9, 2, None, "9 masks", "[0, 1] and never 2, with 2 classes", *FROM_0),
    "some without 0": ([{0, 1}, {0, 1}, {1}] * 3, 2, None, "[0, 1] and never 2", *FROM_0),
    "four classes, from 0": (
        [{0, 1}, {0, 2}, {0, 3, 255}],
        4,
        None,
        "[0, 1, 2, 3, 255] and never 4",
        *FROM_0,
    ),
    "VOC's 21, of which three are not read": (
        [{0, j, 255} for j in range(1, 18)],
        21,
        None,
        "never 21",
        *FROM_0,
    ),
    "0 and 255": ([{0, 255}] * 9, 2, None, "[0, 255]", *EMPTY),
    "0 and 255, from 0": ([{0, 255}, {0}] * 9, 2, "0", "[0, 255]", *EMPTY),
    "0 and 255, from 1": ([{0, 255}] * 9, 2, "1", "[0, 255]", *EMPTY),
    "0 alone": ([{0}] * 9, 2, None, "[0]", *EMPTY),
    "255 alone": ([{255}] * 9, 2, "0", "[255]", *EMPTY),
    "no mask could be read": ([], 2, None, "can be read"),
    "two classes": ([{0, 1, 2}] * 9, 2, None),
    "the last class is rare": ([{0, 1}] * 49 + [{0, 2}], 2, None),
    "the last class is not read, and 0 is rare": ([{1, 2, 3}] * 6 + [{0, 1}] * 5, 4, None),
    "the last class is not read, and 0 does not occur": ([{1, 2, 3, 255}] * 9, 4, None),
    "the last class is not read, as others are not": ([{0, 1}, {0, 2}] * 9, 4, None),
    "ADE20K's 150, of which 110 are read": ([{0, *range(j, 61 + j)} for j in range(1, 51)], 150, None),
    "from 1, somebody says": ([{0, 1}] * 9, 2, "1"),
    "from 0, somebody says": ([{0, 1}] * 9, 2, "0"),
    "from 0, and of all classes the first alone is read": ([{0}] * 9, 2, "0"),
}


def cases(table, given):
    """A table's rows as parameters: what is given, and words of the line that answers."""
    return [pytest.param(*row[:given], row[given:], id=name) for name, row in table.items()]


@pytest.mark.parametrize("seen, count, first_label, words", cases(SETS, 3))
def test_a_set_is_judged_by_the_labels_that_were_read(seen, count, first_label, words):
    classes = [f"class {k}" for k in range(1, count + 1)]
    judge = partial(dense.judge_masks, "here", seen, classes, first_label)
    if not words:
        return judge()
    with pytest.raises(UserError) as error:
        judge()
    assert all(word in str(error.value) for word in ("here: ", *words)), str(error.value)


ONE, ZERO = "are 0 or 255 (ignored) and 1 to 4, whole numbers", "are 255 (ignored) and 0 to 3, whole numbers"
LABELS = {  # what stands in one pixel of a mask; --first-label; words of the refusal
    "too large": (np.uint8(9), None, "b.png: has the label 9 (uint8)", ONE),
    "too large, from 0": (np.uint8(4), "0", "b.png: has the label 4 (uint8)", ZERO),
    "-1": (np.int32(-1), None, "has the label -1 (int32)", ONE),
    "-1, from 0": (np.int32(-1), "0", "has the label -1 (int32)", ZERO),
    "more than 8 bits": (np.uint16(256), "0", "has the label 256 (uint16)", ZERO),
    "a fraction": (np.float32(0.5), None, "has the label 0.5 (float32)", ONE),
    "no number": (np.float32(np.nan), None, "has the label nan (float32)", ONE),
}


@pytest.mark.parametrize("label, first_label, words", cases(LABELS, 2))
def test_a_mask_with_a_label_that_is_none_is_refused(label, first_label, words, tmp_path):
    image, mask = scene(1)
    mask = np.where(mask == 0, 255, mask - (first_label == "0")).astype(label.dtype)
    bad = mask.copy()
    bad[7, 7] = label
    write_scenes(tmp_path, "training", {"a": (image, mask), "b": (image, bad)})
    with pytest.raises(UserError) as error:
        dense.Scenes(tmp_path, "training", CLASSES, first_label)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_taps_are_the_asked_blocks():
    taps = {12: [4, 6, 8, 12], 24: [8, 12, 16, 24], 4: [1, 2, 3, 4], 1: [1, 1, 1, 1]}
    assert {depth: dense.tapped_blocks(depth) for depth in taps} == taps
    model, outputs, seen = segmenter().eval(), [], {}
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    model.scales.register_forward_hook(lambda module, inputs, output: seen.update(maps=inputs[0]))
    model.logits(torch.randn(1, 3, 32, 32))
    for number, given in zip((4, 6, 8, 12), seen["maps"], strict=True):
        assert_close(given, rearrange(outputs[number - 1][:, 1:], "b (h w) d -> b d h w", h=2))


@pytest.mark.parametrize("size", [(32, 64), (33, 50), (16, 16), (100, 31)])
def test_strides_are_4_8_16_32_at_any_input_size(size):
    model, seen = segmenter().eval(), {}
    model.scales.register_forward_hook(lambda module, inputs, output: seen.update(maps=output))
    assert model.logits(torch.randn(1, 3, *size)).shape == (1, 5, *size)
    padded = [side + -side % 16 for side in size]
    for stride, given in zip((4, 8, 16, 32), seen["maps"], strict=True):
        assert tuple(given.shape[-2:]) == tuple(-(-side // stride) for side in padded)


@pytest.mark.parametrize("size", [(48, 48), (112, 48)])
def test_the_linear_head_sees_the_encoders_own_features(size):
    model, images = segmenter("--head", "linear").eval(), torch.randn(1, 3, *size)
    patches = model.encoder.features(images)["patches"]
    maps = rearrange(patches, "b (h w) d -> b d h w", h=size[0] // 16)  # an odd number of patches, unpadded
    assert_close(model.logits(images), dense.resize_like(model.head(maps), images))


@pytest.mark.parametrize("flags", [(), ("--head", "linear"), ("--drop-path", 0.3)])
def test_every_trained_parameter_gets_a_gradient_and_a_frozen_encoder_none(flags):
    model = segmenter(*flags).train()
    loss, _ = model(torch.randn(4, 3, 40, 32), torch.randint(0, 5, (4, 40, 32), dtype=torch.uint8))
    loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
    frozen = "linear" in flags
    assert all(not p.requires_grad for p in model.encoder.parameters()) == frozen
    assert model.encoder.training != frozen


def test_the_loss_is_a_mean_over_pixels_that_count_and_ignored_ones_have_no_gradient():
    model = segmenter("--drop-path", 0).eval()  # in eval there is no auxiliary head and no dropout
    images, masks = torch.randn(2, 3, 32, 32), torch.randint(0, 5, (2, 32, 32), dtype=torch.uint8)
    masks[:, :10] = dense.IGNORE
    scores, total = model.logits(images), 0
    for b in range(2):
        for y in range(10, 32):
            for x in range(32):
                total = total - scores[b, :, y, x].log_softmax(0)[masks[b, y, x].long()]
    loss = total / (2 * 32 * 32)  # over all pixels, as mmsegmentation
    assert_close(model(images, masks)[0], loss, atol=1e-4, rtol=1e-4)
    assert model(images, torch.full_like(masks, dense.IGNORE))[0] == 0
    model.train()
    torch.manual_seed(0)
    main, auxiliary = (
        cross_entropy(part, masks.long(), ignore_index=255, reduction="none").mean()
        for part in model.all_logits(images)
    )
    torch.manual_seed(0)
    assert_close(model(images, masks)[0], main + 0.4 * auxiliary)


def test_metrics_on_a_case_counted_by_hand():
    matrix = torch.tensor([[6, 2, 0], [1, 3, 0], [0, 0, 0]])  # the third class does not occur
    by_hand = {
        "miou": 100 * (6 / 9 + 3 / 6) / 2,
        "mean_accuracy": 100 * (6 / 8 + 3 / 4) / 2,
        "pixel_accuracy": 75.0,
    }
    assert dense.segmentation_metrics(matrix) == pytest.approx(by_hand)
    assert set(dense.segmentation_metrics(torch.diag(torch.tensor([5, 1, 9]))).values()) == {100.0}


def test_sliding_windows_are_averaged_where_they_overlap():
    class Local(torch.nn.Module):
        classes = 1

        def logits(self, images):  # says where in its window a pixel lies
            return torch.arange(images.shape[-1], dtype=torch.float32).expand(1, 1, *images.shape[-2:])

    scores = dense.segment_image(Local(), torch.zeros(1, 3, 6, 10), (6, 6))[0, 0, 0]
    expected = [np.mean([x - start for start in (0, 4) if start <= x < start + 6]) for x in range(10)]
    assert_close(scores, torch.tensor(expected, dtype=torch.float32))
    model, image = segmenter().eval(), torch.randn(1, 3, 32, 32)
    assert torch.equal(dense.segment_image(model, image, (32, 32)), model.logits(image))


def test_a_picture_has_a_colour_a_class_and_shows_ignored_pixels_black():
    classes = torch.tensor([[0, 1], [dense.IGNORE, 0]]).repeat_interleave(64, 0).repeat_interleave(64, 1)
    picture = dense.Segmentation.paint(None, None, classes)
    corners = picture[:, [10, 10, -10, -10], [10, -10, 10, -10]].T.tolist()
    assert corners[0] == corners[3] and corners[2] == [0, 0, 0] and corners[1] not in (corners[0], corners[2])
    assert len({tuple(colour) for colour in dense.PALETTE.tolist()}) == 256


@pytest.mark.parametrize(
    "flags",
    [("--head-width", 8), ("--head", "linear"), ("--head-width", 8, "--window", "whole")],
    ids=["uper", "linear", "whole"],
)
def test_runs_write_what_was_promised_and_evaluating_gives_the_same_numbers(flags, scenes, encoder, tmp_path):
    out = tmp_path / "run"
    run("--encoder", encoder, "--data", scenes, "--out", out, *flags)
    last = results(out)
    assert last.keys() == {"miou", "mean_accuracy", "pixel_accuracy", "best_miou"}
    assert {"checkpoint.pt", "best.pt", "confusion.csv", "log.jsonl"} <= set(os.listdir(out))
    assert (out / "pictures" / "segmentation.png").exists()
    matrix = confusion(out)
    assert matrix.sum() == counted(range(5))  # at the size of the files, without what is ignored

    run("--evaluate", out, "--out", tmp_path / "out")
    assert results(tmp_path / "out")["miou"] == pytest.approx(last["best_miou"])
    run("--evaluate", out, "--out", tmp_path / "out", "--predict", scenes / "images" / "validation")
    predicted = [np.array(Image.open(tmp_path / "out" / f"{i:02d}.png")) for i in range(5)]
    truth = [scene(500 + i)[1] for i in range(5)]
    right = sum(((p == t) & (t > 0)).sum() for p, t in zip(predicted, truth))
    if last["best_miou"] == pytest.approx(last["miou"]):
        assert right == np.trace(matrix)


def test_evaluating_takes_another_window_but_no_other_model(scenes, encoder, tmp_path, capsys):
    run("--encoder", encoder, "--data", scenes, "--out", tmp_path / "run", "--head", "linear", "--epochs", 1)
    run("--evaluate", tmp_path / "run", "--out", tmp_path / "slide")
    run("--evaluate", tmp_path / "run", "--out", tmp_path / "whole", "--window", "whole")
    assert (confusion(tmp_path / "run") == confusion(tmp_path / "slide")).all()
    assert (confusion(tmp_path / "run") != confusion(tmp_path / "whole")).any()
    run("--evaluate", tmp_path / "run", "--out", tmp_path / "same", "--head", "linear")
    capsys.readouterr()
    others = ("task", "detect", "segment"), ("head", "uper", "linear"), ("patch-size", 8, 4)
    for flag, value, own in others:
        run("--evaluate", tmp_path / "run", "--out", tmp_path / "other", f"--{flag}", value, code=2)
        one_line(capsys, f"--{flag} {value}: {tmp_path / 'run'}", f" has {own}; leave the flag out")

    # Nor does it take the folder of a run; and flags without effect are named.
    run("--evaluate", tmp_path / "run", "--out", tmp_path / "run", code=2)
    one_line(capsys, f"--out {tmp_path / 'run'}: holds a run")
    run("--evaluate", tmp_path / "run", "--out", tmp_path / "same", "--lr", 1, "--seed", 0)
    assert re.search("note: .*--lr, .*--seed.*: without effect with --evaluate", capsys.readouterr().out)

    # Masks never land among the images, and a folder of broken images is a mistake.
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(b"no image")
    predict = ("--evaluate", tmp_path / "run", "--predict", images, "--out")
    for out in (images, images / "masks"):
        run(*predict, out, code=2)
        one_line(capsys, "lies among the images of --predict")
    run(*predict, tmp_path / "masks", code=2)
    assert "none of its 1 images can be read" in capsys.readouterr().err

    # Of a single image only its own folder counts: other folders may lie below that.
    single = ("--evaluate", tmp_path / "run", "--predict", images / "b.png", "--out")
    Image.fromarray(scene(1)[0]).save(images / "b.png")
    run(*single, images, code=2)
    one_line(capsys, "lies among the images of --predict")
    run(*single, images / "masks")
    assert (images / "masks" / "b.png").exists()
    capsys.readouterr()
    run(*single, scenes / "annotations" / "training", code=2)
    one_line(capsys, "holds images that masks could replace")


def test_masks_that_count_from_0(scenes, encoder, tmp_path, capsys):
    """A set is the same to a run, its evaluation and its predictions whether its masks count from 1 (0 is
    ignored) or from 0 (255 is): but for the numbers in the masks that it writes."""

    def train_and_predict(data, out, *first):
        run("--encoder", encoder, "--data", data, "--out", out, "--head", "linear", "--epochs", 1, *first)
        run("--evaluate", out, "--out", out / "masks", "--predict", scenes / "images" / "validation")
        return np.stack([Image.open(file) for file in sorted((out / "masks").glob("*.png"))])

    root = tmp_path / "from-0"
    shutil.copytree(scenes, root)
    for file in root.glob("annotations/*/*.png"):
        Image.fromarray(np.array(Image.open(file)) - np.uint8(1)).save(file)  # 0 becomes 255
    run("--encoder", encoder, "--data", root, "--out", tmp_path / "refused", code=2)
    one_line(
        capsys,
        "from-0/annotations/training: the 12 masks",
        "[0, 1, 2, 3, 255] and never 4",
        "--first-label 0",
    )
    assert not (tmp_path / "refused").exists()

    one, zero, again, other = (tmp_path / name for name in ("one", "zero", "again", "other"))
    masks = train_and_predict(scenes, one)
    assert (masks == train_and_predict(root, zero, "--first-label", 0) + 1).all() and 1 in masks
    run("--evaluate", zero, "--out", again)
    run("--evaluate", zero, "--data", scenes, "--first-label", 1, "--out", other)
    assert results(one) == results(zero)
    assert all((confusion(one) == confusion(out)).all() for out in (zero, again, other))


def test_a_share_of_the_training_images(scenes, encoder, tmp_path, monkeypatch):
    """At least a batch; always the same ones for a seed."""

    def share(*flags):
        opened = []

        def stop(dataset, *_):
            opened.append(dataset)
            raise UserError("enough")

        monkeypatch.setattr(dense, "TrainDataset", stop)
        flags = ("--head", "linear", "--batch-size", 2, "--accumulate", 2, *flags)
        run("--encoder", encoder, "--data", scenes, "--out", tmp_path, *flags, code=2)
        return pickle.loads(pickle.dumps(opened[0]))  # as a loader process gets it

    def names(dataset):
        return [dataset.name(i) for i in range(len(dataset))]

    whole, half = share(), share("--label-fraction", 0.5)
    assert len(whole) == 12 and half.classes == CLASSES
    assert len(set(names(half))) == len(half) == 6 and set(names(half)) < set(names(whole))
    for i, name in enumerate(names(half)):
        assert torch.equal(half[i][1], whole[names(whole).index(name)][1])
    assert names(share("--label-fraction", 0.5, "--epochs", 7, "--lr", 1)) == names(half)
    assert set(names(share("--label-fraction", 0.5, "--seed", 1))) != set(names(half))
    least = share("--label-fraction", 0.01)
    assert len(least) == 4 and set(names(least)) < set(names(half))
    assert set(names(share("--label-fraction", 1))) == set(names(whole))


def test_a_model_that_can_see_the_class_learns_it(scenes, encoder, tmp_path):
    sizes = ("--head-width", 8, "--drop-path", 0)
    run("--encoder", encoder, "--data", scenes, "--out", tmp_path, *sizes, "--epochs", 25, "--lr", 3e-3)
    assert results(tmp_path)["pixel_accuracy"] > 60  # chance: 25; most of the rest lies on edges


def test_a_stopped_run_goes_on_as_if_it_had_not_been(scenes, encoder, tmp_path, monkeypatch):
    flags = ("--encoder", encoder, "--data", scenes, "--head-width", 8)
    run(*flags, "--out", tmp_path / "whole")
    interrupt_at(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGTERM))
    run(*flags, "--out", tmp_path / "stopped", code=143)
    monkeypatch.undo()
    run(*flags, "--out", tmp_path / "stopped")
    whole, stopped = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "stopped")
    assert all(torch.equal(value, stopped["model"][name]) for name, value in whole["model"].items())
    assert results(tmp_path / "whole") == results(tmp_path / "stopped")


def test_mistakes_get_one_line(scenes, encoder, tmp_path, capsys):
    def write_mask(shape, value):
        array = np.full(shape, value, np.uint8)
        return lambda root: Image.fromarray(array).save(root / "annotations/training/03.png")

    def write_classes(text):
        return lambda root: (root / "classes.txt").write_text(text)

    for change, *words in (
        (write_mask((20, 28), 9), "03.png: has the label 9 (uint8)"),
        (
            write_mask((20, 20), 1),
            "03.png: has the shape (20, 20), its image (after its EXIF rotation) (20, 28)",
        ),
        (write_mask((20, 28, 3), 1), "03.png: has the shape (20, 28, 3)"),
        (
            lambda root: (root / "annotations/training/03.png").unlink(),
            "1 of 12 masks are missing, the first is",
            "03.png",
        ),
        (
            lambda root: shutil.copy(root / "images/training/03.png", root / "images/training/03.jpeg"),
            "two images share the mask",
            "03.png",
        ),
        (lambda root: (root / "classes.txt").unlink(), "bad: neither shapes nor a folder", "no classes.txt"),
        (write_classes("sky\n"), "names 1 classes"),
        (
            lambda root: (root / "classes.txt").write_text("sky\n", encoding="utf-16"),
            "names 1 classes",
        ),
        (write_classes("sky\n\nroad\n"), "names 3 classes, 1 of them by an empty line"),
        (lambda root: shutil.rmtree(root / "images/validation"), "images/validation: there is no such file"),
        (lambda root: shutil.rmtree(root / "images"), "images/training: there is no such file or folder"),
    ):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(scenes, tmp_path / "bad")
        change(tmp_path / "bad")
        run("--encoder", encoder, "--data", tmp_path / "bad", "--out", tmp_path / "run", code=2)
        one_line(capsys, *words)
    for flags, word in (
        (("--image-size", 2), "image size 2 x 2"),
        (("--head-width", 0), "--head-width: 0: must be"),
        (("--batch-size", 1), "--batch-size 1"),
        (("--label-fraction", 0), "--label-fraction: 0: must be"),
        (("--first-label", 2), "--first-label: invalid choice"),
        (("--evaluate", "a", "b"), "--evaluate a b: there are no ensembles"),
        (("--evaluate", encoder), "not a best.pt"),
        (("--predict", scenes), "goes with --evaluate"),
    ):
        run("--encoder", encoder, "--data", scenes, "--out", tmp_path / "run", *flags, code=2)
        one_line(capsys, word)


def test_broken_files_are_named_and_do_not_count(scenes, encoder, tmp_path, capsys):
    root, out = tmp_path / "bad", tmp_path / "run"
    shutil.copytree(scenes, root)
    (root / "images/validation/01.png").write_bytes(b"no image")
    (root / "annotations/validation/02.png").write_bytes(b"no mask")
    (root / "images/training/05.png").write_bytes(b"no image")
    run("--encoder", encoder, "--data", root, "--out", out, "--head-width", 8, "--label-fraction", 1)
    error = capsys.readouterr().err
    for name in ("validation/01", "validation/02", "training/05"):
        what = "another image takes its place" if "training" in name else "it does not count"
        assert re.search(rf"images/{name}.png \(.*\) is broken; {what}", error)
    assert confusion(out).sum() == counted((0, 3, 4))
    run("--evaluate", out, "--predict", root / "images" / "validation", "--out", tmp_path / "out")
    found = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert found == ["00.png", "02.png", "03.png", "04.png"]


def test_every_file_gets_a_mask_of_its_own_whatever_its_name(scenes, encoder, tmp_path):
    """With its ending where some differ in this alone, and with a number where not even then."""
    run("--encoder", encoder, "--data", scenes, "--out", tmp_path / "run", "--head", "linear", "--epochs", 1)

    def masks(*names):
        shutil.rmtree(tmp_path / "named", ignore_errors=True)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        for name in names:
            (tmp_path / "named" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(scene(500)[0]).save(tmp_path / "named" / name)
        run("--evaluate", tmp_path / "run", "--predict", tmp_path / "named", "--out", tmp_path / "out")
        return {path.name for path in (tmp_path / "out").glob("*.png")}

    long = "n" * 251  # with the ending as long as a name can be
    assert masks("a-b/c.jpg", "a/b-c.jpg") == {"0-a-b-c.jpg.png", "1-a-b-c.jpg.png"}
    assert masks(f"{long}.png") == {f"{long[-250:]}.png"}
    assert masks("a.jpg", "a.png", "in/b.png") == {"a.jpg.png", "a.png.png", "in-b.png"}
    flags = ("--evaluate", tmp_path / "run", "--predict", tmp_path / "named", "--out", tmp_path / "named")
    run(*flags, code=2)  # would replace a.png
    single = tmp_path / "named" / "a.jpg"
    run("--evaluate", tmp_path / "run", "--predict", single, "--out", tmp_path / "single")
    assert [path.name for path in (tmp_path / "single").glob("*.png")] == ["a.png"]


def test_shapes_and_convolution_stages(tmp_path, monkeypatch):
    monkeypatch.setitem(dense.DRAWN, "train", 16)
    monkeypatch.setitem(dense.DRAWN, "val", 6)
    stem = {"widths": [8, 12], "depths": [1, 1], "mlp_ratios": [2.0, 2.0]}
    encoder = ViT((64, 64), 16, 32, 2, 2, class_token=False, stem=stem)
    packed = vit.pack_encoder(encoder, "mae", "mean", data.MEAN, data.STD)
    torch.save(packed, tmp_path / "conv.pt")
    for name, flags in (("linear", ("--head", "linear")), ("uper", ("--head-width", 8))):
        out = tmp_path / name
        run("--encoder", tmp_path / "conv.pt", "--data", "shapes", "--out", out, *flags, "--epochs", 1)
        assert "miou" in results(out)
