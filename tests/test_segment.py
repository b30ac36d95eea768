"""Semantic segmentation: layout, transform, heads, windows, metrics, whole runs."""
import argparse
import json
import os
import signal
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision import tv_tensors

import conftest
import data
import finetune
import vit
from conftest import randomize
from test_train import checkpoint, interrupt_at, one_line
from vit import ViT

QUICK = "--protocol segment --workers 0 --device cpu --epochs 2 --batch-size 4".split()
run = partial(conftest.run, main=finetune.main, defaults=QUICK)


def scene(seed, size=(20, 28)):
    """An image whose colour is its class, one of four in each quarter, with a strip of ignored pixels."""
    rng = np.random.default_rng(seed)
    mask = np.kron(rng.integers(1, 5, (2, 2)), np.ones((size[0] // 2, size[1] // 2), int)).astype(np.uint8)
    image = (np.stack([mask * 50, 255 - mask * 50, mask * 20], axis=2) + rng.integers(0, 9, (*size, 3))).astype(np.uint8)
    mask[:2] = 0
    return image, mask


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    for split, count in (("training", 12), ("validation", 5)):
        for part in ("images", "annotations"):
            (root / part / split).mkdir(parents=True)
        for i in range(count):
            image, mask = scene(100 * count + i)
            Image.fromarray(image).save(root / "images" / split / f"{i:02d}.png")
            Image.fromarray(mask).save(root / "annotations" / split / f"{i:02d}.png")
    (root / "classes.txt").write_text("sky\nroad\ntree\ncar\n")
    return root


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return conftest.write_encoder(tmp_path_factory, (16, 16), 4, 32, 4, 2)


def parse(*flags):
    return finetune.parse_args([*QUICK, *narrow(flags), *map(str, flags)])


def narrow(flags):
    return [] if "linear" in flags else ["--head-width", "8"]


def segmenter(*flags, classes=5, **options):
    return finetune.Segmenter(randomize(ViT((32, 32), 16, 16, 12, 2, **options)), parse(*flags), classes)


def test_ade20ks_layout(scenes):
    train_set, test_set = data.open_scenes(argparse.Namespace(data=str(scenes)))
    assert (len(train_set), len(test_set)) == (12, 5) and train_set.classes == ["sky", "road", "tree", "car"]
    image, mask = train_set[3]
    true = scene(1203)[1]
    assert torch.equal(mask[2:].long(), torch.from_numpy(true[2:].astype(int)) - 1) and (mask[:2] == data.IGNORE).all()
    (scenes / "classes.txt").rename(scenes / "away.txt")
    (scenes / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + "".join(f"{i}\t0.1\t1\t1\tthing {i}\n" for i in range(1, 151)))
    assert len(data.scene_classes(scenes)) == 150 and data.scene_classes(scenes)[149] == "thing 150"
    (scenes / "objectInfo150.txt").unlink()
    (scenes / "away.txt").rename(scenes / "classes.txt")


def test_image_and_mask_stay_together(scenes):
    train_set = data.Scenes(scenes, "training", ["sky", "road", "tree", "car"])
    transform = data.SceneTransform((24, 16), scale=(1.5, 1.5))
    transform.rest = lambda image, mask: data.v2.RandomHorizontalFlip(1.0)(image, mask)  # colours as they are
    right = []
    for i in range(12):
        image, mask = transform(*train_set[i])
        assert image.shape == (3, 24, 16) and mask.shape == (24, 16) and type(image) is torch.Tensor
        seen = mask != data.IGNORE
        right += [((image[0].float() / 50).round() - 1 == mask)[seen].float().mean().item()]
    assert np.mean(right) > 0.9  # but at the edges of blocks, where colours mix
    small = data.SceneTransform((64, 64), scale=(0.5, 0.5))
    image, mask = small(*train_set[0])
    assert image.shape == (3, 64, 64) and (mask == data.IGNORE).float().mean() > 0.2  # filled


def test_drawn_scenes_are_the_drawings_of_shapes_with_their_class():
    scenes, shapes = data.DrawnScenes((32, 32), "val", 50), data.Shapes((32, 32), "val", 50)
    assert scenes.classes == ["background", *shapes.classes]
    for i in range(50):
        drawn, (image, mask) = shapes.draw(i), scenes[i]
        assert torch.equal(mask > 0, drawn["mask"]) and set(mask.unique().tolist()) == {0, 1 + drawn["label"]} and torch.equal(image, drawn["image"])


def test_colours_are_distorted_but_not_exchanged():
    red, transform = torch.zeros(3, 16, 16, dtype=torch.uint8), data.SceneTransform((16, 16))
    red[0] = 200
    for _ in range(100):
        image, mask = transform(red, tv_tensors.Mask(torch.zeros(16, 16, dtype=torch.uint8)))
        seen = image[:, mask != data.IGNORE].float().mean(1)
        assert seen.argmax() == 0


def test_the_schedule_has_no_jump():
    rates = [finetune.poly(epoch / 100, 1.0, 0.5, 5, 0.0) for epoch in range(501)]
    assert rates[0] == 0 and rates[-1] == 0 and max(abs(a - b) for a, b in zip(rates, rates[1:])) < 0.021 and rates[50] == max(rates) == pytest.approx(0.9)
    assert finetune.poly(0, 1.0, 0, 5, 0.0) == 1


def test_masks_of_other_kinds(scenes, tmp_path):
    image, mask = scene(1)
    mask[3, 3] = 255
    for part in ("images", "annotations"):
        (tmp_path / part / "training").mkdir(parents=True)
    for name, kind in (("a", "L"), ("b", "P"), ("c", "I;16")):
        Image.fromarray(image).save(tmp_path / "images" / "training" / f"{name}.png")
        picture = Image.fromarray(mask.astype(np.uint16)) if kind == "I;16" else Image.fromarray(mask)
        if kind == "P":
            picture.putpalette(list(range(256)) * 3)
        picture.save(tmp_path / "annotations" / "training" / f"{name}.png")
    found = [sample[1] for sample in data.Scenes(tmp_path, "training", ["a", "b", "c", "d"])]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]) and found[0][3, 3] == data.IGNORE == found[0][0, 0]


def test_taps_are_the_asked_blocks():
    assert [finetune.tapped_blocks(depth) for depth in (12, 24, 4, 1)] == [[4, 6, 8, 12], [8, 12, 16, 24], [1, 2, 3, 4], [1, 1, 1, 1]]
    model, images, seen = segmenter().eval(), torch.randn(1, 3, 32, 32), {}
    outputs = []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    model.scales.register_forward_hook(lambda module, inputs, output: seen.update(maps=inputs[0]))
    model.logits(images)
    for number, given in zip((4, 6, 8, 12), seen["maps"]):
        assert_close(given, outputs[number - 1][:, 1:].transpose(1, 2).unflatten(2, (2, 2)))


@pytest.mark.parametrize("size", [(32, 64), (33, 50), (16, 16), (100, 31)])
def test_strides_are_4_8_16_32_at_any_input_size(size):
    model, seen = segmenter().eval(), {}
    model.scales.register_forward_hook(lambda module, inputs, output: seen.update(maps=output))
    assert model.logits(torch.randn(1, 3, *size)).shape == (1, 5, *size)
    for stride, given in zip((4, 8, 16, 32), seen["maps"]):
        patches = [side + -side % 16 for side in size]
        assert tuple(given.shape[-2:]) == tuple(-(-side // stride) for side in patches)


@pytest.mark.parametrize("size", [(48, 48), (112, 48)])
def test_the_linear_head_sees_the_encoders_own_features(size):
    model, images = segmenter("--head", "linear").eval(), torch.randn(1, 3, *size)
    patches = model.encoder.features(images)["patches"].transpose(1, 2).unflatten(2, (size[0] // 16, -1))  # an odd number of patches, unpadded
    assert_close(model.logits(images), finetune.resized(model.head(patches), size))


@pytest.mark.parametrize("flags", [(), ("--head", "linear"), ("--drop-path", 0.3)])
def test_every_trained_parameter_gets_a_gradient_and_a_frozen_encoder_none(flags):
    model = segmenter(*flags).train()
    loss, _ = model(torch.randn(4, 3, 40, 32), torch.randint(0, 5, (4, 40, 32), dtype=torch.uint8))
    loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
    assert all(not p.requires_grad for p in model.encoder.parameters()) == ("linear" in flags) and model.encoder.training == ("linear" not in flags)


def test_the_loss_is_a_mean_over_pixels_that_count_and_ignored_ones_have_no_gradient():
    model = segmenter("--drop-path", 0).eval()  # in eval there is no auxiliary head and no dropout
    images, masks = torch.randn(2, 3, 32, 32), torch.randint(0, 5, (2, 32, 32), dtype=torch.uint8)
    masks[:, :10] = data.IGNORE
    scores, total = model.logits(images), 0
    for b in range(2):
        for y in range(10, 32):
            for x in range(32):
                total = total - scores[b, :, y, x].log_softmax(0)[masks[b, y, x].long()]
    assert_close(model(images, masks)[0], total / (2 * 32 * 32), atol=1e-4, rtol=1e-4)  # over all pixels, as mmsegmentation
    assert model(images, torch.full_like(masks, data.IGNORE))[0] == 0
    training = model.train()
    torch.manual_seed(0)
    main, auxiliary = (torch.nn.functional.cross_entropy(part, masks.long(), ignore_index=255, reduction="none").mean() for part in training.scores(images))
    torch.manual_seed(0)
    assert_close(training(images, masks)[0], main + 0.4 * auxiliary)


def test_metrics_on_a_case_counted_by_hand():
    matrix = torch.tensor([[6, 2, 0], [1, 3, 0], [0, 0, 0]])  # the third class does not occur
    found = finetune.segmentation_metrics(matrix)
    assert found == pytest.approx({"miou": 100 * (6 / 9 + 3 / 6) / 2, "mean_accuracy": 100 * (6 / 8 + 3 / 4) / 2, "pixel_accuracy": 75.0})
    assert set(finetune.segmentation_metrics(torch.diag(torch.tensor([5, 1, 9]))).values()) == {100.0}


def test_sliding_windows_are_averaged_where_they_overlap():
    class Local(torch.nn.Module):
        def logits(self, images):  # says where in its window a pixel lies
            return torch.arange(images.shape[-1], dtype=torch.float32).expand(1, 1, *images.shape[-2:]).clone()

    image = torch.zeros(1, 3, 6, 10)
    scores = finetune.segment_image(Local(), image, (6, 6), "slide")[0, 0, 0]
    expected = [np.mean([x - start for start in (0, 4) if start <= x < start + 6]) for x in range(10)]
    assert_close(scores, torch.tensor(expected, dtype=torch.float32))
    model = segmenter().eval()
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(finetune.segment_image(model, image, (32, 32), "slide"), finetune.segment_image(model, image, (32, 32), "whole"))


@pytest.mark.parametrize("flags", [(), ("--head", "linear"), ("--window", "whole")], ids=lambda flags: " ".join(flags))
def test_runs_write_what_was_promised_and_evaluating_gives_the_same_numbers(flags, scenes, encoder, tmp_path, capsys):
    run("--encoder", encoder, "--data", scenes, "--out", tmp_path / "run", *narrow(flags), *flags)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results.keys() == {"miou", "mean_accuracy", "pixel_accuracy", "best_miou"}
    assert {"checkpoint.pt", "best.pt", "confusion.csv", "log.jsonl"} <= set(os.listdir(tmp_path / "run")) and (tmp_path / "run" / "pictures" / "segmentation.png").exists()
    counted = sum((scene(500 + i)[1] > 0).sum() for i in range(5))
    confusion = np.loadtxt(tmp_path / "run" / "confusion.csv", delimiter=",", skiprows=1, usecols=(1, 2, 3, 4))
    assert confusion.sum() == counted  # at the size of the files, without what is ignored
    capsys.readouterr()
    run("--evaluate", tmp_path / "run", "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["miou"] == pytest.approx(results["best_miou"])
    run("--evaluate", tmp_path / "run", "--out", tmp_path / "out", "--predict", scenes / "images" / "validation")
    predicted = [np.array(Image.open(tmp_path / "out" / f"{i:02d}.png")) for i in range(5)]
    truth = [scene(500 + i)[1] for i in range(5)]
    right = sum(((p == t) & (t > 0)).sum() for p, t in zip(predicted, truth))
    best = np.trace(confusion) if results["best_miou"] == pytest.approx(results["miou"]) else None
    assert best is None or right == best


def test_a_model_that_can_see_the_class_learns_it(scenes, encoder, tmp_path):
    run("--encoder", encoder, "--data", scenes, "--out", tmp_path / "run", "--epochs", 25, "--lr", 3e-3, "--drop-path", 0, "--scale", 1, 1, "--head-width", 8)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["pixel_accuracy"] > 60  # chance: 25; most of the rest lies on edges


def test_a_stopped_run_goes_on_as_if_it_had_not_been(scenes, encoder, tmp_path, monkeypatch):
    flags = ("--encoder", encoder, "--data", scenes, "--head-width", 8)
    run(*flags, "--out", tmp_path / "whole")
    interrupt_at(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGTERM))
    run(*flags, "--out", tmp_path / "stopped", code=143)
    monkeypatch.undo()
    run(*flags, "--out", tmp_path / "stopped")
    whole, stopped = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "stopped")
    assert all(torch.equal(value, stopped["model"][name]) for name, value in whole["model"].items())


def test_mistakes_get_one_line(scenes, encoder, tmp_path, capsys):
    import shutil

    def broken(change):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(scenes, tmp_path / "bad")
        change(tmp_path / "bad")
        return tmp_path / "bad"

    mask = "annotations/training/03.png"
    for change, words in (
        (lambda root: Image.fromarray(np.full((20, 28), 9, np.uint8)).save(root / mask), ("03.png: has the label 9; labels are 0 or 255 (ignored) and 1 to 4",)),
        (lambda root: Image.fromarray(np.ones((20, 20), np.uint8)).save(root / mask), ("03.png: has the shape 20 x 20, its image (after its EXIF rotation) 20 x 28",)),
        (lambda root: Image.fromarray(np.ones((20, 28, 3), np.uint8)).save(root / mask), ("03.png: has the shape 20 x 28 x 3",)),
        (lambda root: (root / mask).unlink(), ("1 of 12 masks are missing, the first is", "03.png")),
        (lambda root: (root / "classes.txt").unlink(), ("no classes.txt",)),
        (lambda root: (root / "classes.txt").write_text("sky\n"), ("names 1 classes",)),
        (lambda root: (root / "classes.txt").write_text("sky\n\nroad\n"), ("one by an empty line",)),
        (lambda root: shutil.rmtree(root / "images/validation"), ("images/validation: no images in it",)),
        (lambda root: shutil.rmtree(root / "images"), ("neither shapes nor a folder with images/ and annotations/",)),
    ):
        run("--encoder", encoder, "--data", broken(change), "--out", tmp_path / "run", code=2)
        one_line(capsys, *words)
    for flags, words in ((("--image-size", 2), ("image size 2 x 2",)), (("--scale", 0, 1), ("--scale 0.0 1.0",)), (("--head-width", 0), ("--head-width 0",)),
                         (("--batch-size", 1), ("--batch-size 1",)), (("--head", "linear", "--drop-path", 0.1), ("--drop-path goes with --head uper",)),
                         (("--label-fraction", 0.1), ("unrecognized",))):
        run("--encoder", encoder, "--data", scenes, "--out", tmp_path / "run", *flags, code=2)
        one_line(capsys, *words)


def test_broken_files_are_named_and_do_not_count(scenes, encoder, tmp_path, capsys):
    import shutil

    shutil.copytree(scenes, tmp_path / "bad")
    (tmp_path / "bad/images/validation/01.png").write_bytes(b"no image")
    (tmp_path / "bad/annotations/validation/02.png").write_bytes(b"no mask")
    (tmp_path / "bad/images/training/05.png").write_bytes(b"no image")
    run("--encoder", encoder, "--data", tmp_path / "bad", "--out", tmp_path / "run", "--head-width", 8)
    error = capsys.readouterr().err
    assert all(name in error for name in ("validation/01.png is broken; it does not count", "validation/02.png is broken", "training/05.png is broken; another"))
    confusion = np.loadtxt(tmp_path / "run" / "confusion.csv", delimiter=",", skiprows=1, usecols=(1, 2, 3, 4))
    assert confusion.sum() == sum((scene(500 + i)[1] > 0).sum() for i in (0, 3, 4))
    run("--evaluate", tmp_path / "run", "--predict", tmp_path / "bad" / "images" / "validation", "--out", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["00.png", "02.png", "03.png", "04.png"]


def test_shapes_and_convolution_stages(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHAPES_TRAIN", 16)
    monkeypatch.setattr(data, "SHAPES_VAL", 6)
    stem = {"widths": [8, 12], "depths": [1, 1], "mlp_ratios": [2.0, 2.0]}
    torch.save(vit.pack_encoder(ViT((64, 64), 16, 32, 2, 2, class_token=False, stem=stem), "mae", "mean", data.MEAN, data.STD), tmp_path / "conv.pt")
    for flags in (("--head", "linear"), ("--head-width", 8)):
        run("--encoder", tmp_path / "conv.pt", "--data", "shapes", "--out", tmp_path / flags[1].__class__.__name__, *flags, "--epochs", 1)
        assert "miou" in json.loads((tmp_path / flags[1].__class__.__name__ / "results.json").read_text())
