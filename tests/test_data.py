"""Data: every kind of image, broken ones, folders and lists, drawn shapes, and randomness without state."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.testing import assert_close

import data
import train
from conftest import TINY, run
from data import ResumableBatchSampler, TrainDataset, decode
from vit import UserError


def args(*flags):
    return train.parse_args([*TINY, *map(str, flags)])


def gradient_image():
    """RGB, red grows to the right, green downwards: orientation and channels can be told."""
    y, x = np.mgrid[:24, :32]
    return Image.fromarray(np.stack([x * 8, y * 10, np.full_like(x, 60)], -1).astype(np.uint8))


def test_every_kind_of_image_becomes_upright_rgb(tmp_path):
    rgb = gradient_image()
    true = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
    grey = torch.from_numpy(np.array(rgb.convert("L"))).expand(3, -1, -1)

    def check(name, image, expected, tolerance, **options):
        image.save(tmp_path / name, **options)
        decoded = decode(str(tmp_path / name))
        assert decoded.dtype == torch.uint8 and decoded.shape == expected.shape, name
        assert (decoded.int() - expected.int()).abs().float().mean() <= tolerance, name

    check("rgb.png", rgb, true, 0)
    check("rgb.jpg", rgb, true, 3, quality=95)
    check("rgb.bmp", rgb, true, 0)
    check("rgb.tif", rgb, true, 0)
    check("rgb.webp", rgb, true, 0, lossless=True)
    check("grey.png", rgb.convert("L"), grey, 0)
    check("grey.jpg", rgb.convert("L"), grey, 3, quality=95)
    check("rgba.png", rgb.convert("RGBA"), true, 0)
    check("cmyk.jpg", rgb.convert("CMYK"), true, 8, quality=95)
    check("palette.png", rgb.quantize(256), true, 8)
    deep = np.array(rgb.convert("L")).astype(np.uint16) * 256 + 77
    check("rgb.gif", rgb, true, 8)
    check("deep.png", Image.fromarray(deep), grey, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    check("turned.jpg", rgb.rotate(90, expand=True), true, 3, exif=exif, quality=95)
    check("turned.png", rgb.rotate(90, expand=True), true, 0, exif=exif)
    check("turned.webp", rgb.rotate(90, expand=True), true, 0, exif=exif, lossless=True)


RAMP = np.linspace(0, 1, 24 * 32).reshape(24, 32)
GREY = (RAMP * 255.999).astype(int)


def ramp(largest, kind):
    """From black to white, as numbers of a kind."""
    return (RAMP * largest).astype(kind)


@pytest.mark.parametrize(
    "name, pixels",
    [
        ("a.tif", ramp(1, np.float32)),
        ("a.tif", ramp(255, np.float32)),
        ("a.tif", ramp(4095, np.float32)),
        ("a.tif", ramp(255, np.int32)),
        ("a.tif", ramp(4095, np.int32)),
        ("a.tif", ramp(65535, np.int32)),
        ("a.tif", ramp(2**30 - 1, np.int32)),
        ("a.png", ramp(255, np.uint16)),
        ("a.png", ramp(1023, np.uint16)),
        ("a.png", ramp(4095, np.uint16)),
        ("a.png", ramp(16383, np.uint16)),
        ("a.png", ramp(65535, np.uint16)),
        ("a.tif", ramp(4095, ">u2")),
    ],
    ids=lambda value: f"{value.dtype} {value.max():g}" if isinstance(value, np.ndarray) else value,
)
def test_numbers_become_grey_from_black_to_white(name, pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / name)
    decoded = decode(tmp_path / name).int().numpy()
    assert decoded.shape == (3, 24, 32) and np.abs(decoded - GREY).max() <= 1
    assert decoded.min() == 0 and decoded.max() == 255


def test_integers_of_0_and_1_are_black_and_white(tmp_path):
    Image.fromarray(np.uint16([[0, 1]])).save(tmp_path / "a.png")
    assert decode(tmp_path / "a.png").tolist() == [[[0, 255]]] * 3


@pytest.mark.parametrize(
    "pixels, words",
    [
        (ramp(100, np.int32) - 5, "from -5 to 95"),
        (ramp(1, np.float32) - 0.5, "from -0.5 to 0.5"),
        (np.where(RAMP > 0.5, np.nan, RAMP), "from nan to nan"),
        (np.where(RAMP > 0.5, np.inf, RAMP), "from 0.0 to inf"),
    ],
    ids=["negative integers", "negative floats", "nan", "infinite"],
)
def test_numbers_without_black_and_white_are_refused(pixels, words, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=words):
        decode(tmp_path / "a.tif")


def test_what_is_taken_for_white_is_said_once_a_set(tmp_path, capsys):
    data.say_once.cache_clear()
    for i in range(3):
        Image.fromarray(ramp(4095, np.uint16)).save(tmp_path / f"{i}.png")
    list(data.open_folder(tmp_path)[i] for i in range(3))
    assert capsys.readouterr().out.count("note: mode I;16: white is") == 1


BLUE = np.broadcast_to(np.uint8([0, 0, 255]), (24, 32, 3))


def transparent(mode, alpha):
    """Blue, or black of mode LA, whose left half has this alpha."""
    veil = np.full((24, 32, 1), 255, np.uint8)
    veil[:, :16] = alpha
    colour = BLUE if mode == "RGBA" else BLUE[..., :1]
    return Image.fromarray(np.concatenate([colour, veil], -1), mode)


def palette():
    """Colour 1, in the left half, is transparent; colour 0 is blue."""
    image = Image.fromarray(np.repeat(np.uint8([[1] * 16 + [0] * 16]), 24, axis=0), "P")
    image.putpalette([0, 0, 255, 90, 90, 90])
    return image


@pytest.mark.parametrize(
    "name, image, options, left, right",
    [
        ("a.png", transparent("RGBA", 0), {}, (255, 255, 255), (0, 0, 255)),
        ("a.png", transparent("RGBA", 127), {}, (128, 128, 255), (0, 0, 255)),
        ("a.webp", transparent("RGBA", 0), {"lossless": True}, (255, 255, 255), (0, 0, 255)),
        ("a.tif", transparent("RGBA", 0), {}, (255, 255, 255), (0, 0, 255)),
        ("a.png", transparent("LA", 0), {}, (255, 255, 255), (0, 0, 0)),
        ("a.png", palette(), {"transparency": 1}, (255, 255, 255), (0, 0, 255)),
        ("a.png", palette(), {"transparency": b"\xff\x7f"}, (173, 173, 173), (0, 0, 255)),
        ("a.gif", palette(), {"transparency": 1}, (255, 255, 255), (0, 0, 255)),
        ("a.png", palette().convert("RGB"), {"transparency": (90, 90, 90)}, (255, 255, 255), (0, 0, 255)),
    ],
    ids="RGBA half webp tif LA palette half-palette gif key".split(),
)
def test_what_is_transparent_is_laid_over_white(name, image, options, left, right, tmp_path):
    image.save(tmp_path / name, **options)
    decoded = decode(tmp_path / name)
    assert decoded[:, 5, 5].tolist() == list(left) and decoded[:, 5, 25].tolist() == list(right)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30}], ids=str)
def test_plain_files_are_decoded_to_the_bit(mode, options, tmp_path):
    image = gradient_image().convert(mode)
    image.save(tmp_path / "a.jpg", **options)
    by_torchvision = torchvision.io.decode_image(tmp_path / "a.jpg", mode="RGB")
    assert torch.equal(decode(tmp_path / "a.jpg"), by_torchvision)
    image.save(tmp_path / "a.png")
    assert np.array_equal(decode(tmp_path / "a.png").permute(1, 2, 0), np.array(image.convert("RGB")))


@pytest.mark.parametrize(
    "name, options",
    [
        ("a.png", {}),
        ("a.jpg", {}),
        ("a.jpg", {"progressive": True, "icc_profile": b"x" * 90_000}),
        ("a.jpg", {"optimize": True, "comment": b"\xff\xc0\x00\x11\x08\x00\x01\x00\x01\x03"}),
    ],
    ids=["png", "jpg", "progressive", "comment"],
)
def test_too_many_pixels_are_refused(name, options, tmp_path, monkeypatch):
    gradient_image().save(tmp_path / name, **options)
    assert decode(tmp_path / name).shape == (3, 24, 32)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 32 // 2 - 1)
    with pytest.raises(Image.DecompressionBombError, match="exceeds limit"):
        decode(tmp_path / name)


@pytest.mark.parametrize(
    "name, length, reason",
    [
        ("a.png", 0, "cannot identify image file"),
        ("a.txt", 10, "cannot identify image file"),
        ("a.jpg", 2, "cannot identify image file"),
        ("a.jpg", 300, "Truncated File Read"),
        ("a.jpg", 700, "image file is truncated ("),
        ("a.png", 60, "image file is truncated"),
        ("a.png", None, "[Errno 2] No such file or directory"),
        ("a.eps", 10_000, "cannot identify image file"),
        ("pipe.png", -1, "it is no regular file"),
        ("thin.png", -1, "2002 x 2 pixels are too thin"),
        ("thin.jpg", -1, "2002 x 2 pixels are too thin"),
    ],
    ids=str,
)
def test_a_broken_file_is_named_once_with_the_reason(name, length, reason, tmp_path, capsys):
    """PostScript is a program, so it is not opened."""
    path = tmp_path / name
    if path.stem == "pipe":
        os.mkfifo(path)
    elif path.stem == "thin":
        Image.new("RGB", (2002, 2)).save(path)
    elif path.suffix != ".txt":
        gradient_image().save(path)
    else:
        path.write_text("not an image")
    if length is None:
        path.unlink()
    elif length >= 0:
        os.truncate(path, length)
    picture = str(tmp_path / "whole.png")
    gradient_image().save(picture)
    samples = TrainDataset(data.ImageFiles([str(path), picture]), data.center_crop((16, 16)))
    broken = data.BrokenImages()
    broken.count(*data.collate([samples[0, 0], samples[2, 0]]))  # the second draws it again
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"warning: {path} ({reason}") and line.count(name) == 1
    assert line.endswith(") is broken; another image takes its place")


def test_a_broken_image_is_named_and_replaced(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "set")
    bad = tmp_path / "set" / "train" / "class0" / "00.png"
    bad.write_bytes(bad.read_bytes()[:100])
    other = tmp_path / "set" / "train" / "class1" / "01.png"
    flipped = bytearray(other.read_bytes())
    flipped[60] ^= 1  # one bit of the pixels: some decoders crash on it
    other.write_bytes(flipped)
    flags = ("--data", tmp_path / "set", "--out", tmp_path / "run", "--epochs", 2, "--val-images", 8)
    run("--method", "mae", *flags)
    error = capsys.readouterr().err
    assert error.count(f"warning: {bad} (") == 1 and error.count("01.png (") == 1

    samples = TrainDataset(data.open_folder(tmp_path / "set" / "train"), data.train_transform(args()), 0)
    image, label, broken = samples[0, 0]
    assert len(broken) == 1 and broken[0].startswith(f"{bad} (") and image.shape == (3, 16, 16)
    assert torch.equal(samples[0, 0][0], image)  # the replacement is a function of (seed, epoch, sample) too


def test_too_many_broken_images_stop_the_run(folder, tmp_path, capsys):
    for i in range(12):
        (tmp_path / "all").mkdir(exist_ok=True)
        (tmp_path / "all" / f"{i}.jpg").write_bytes(b"not a jpeg")
    run("--method", "mae", "--data", tmp_path / "all", "--out", tmp_path / "run", code=1)
    assert "too many broken images: 1" in capsys.readouterr().err.strip().splitlines()[-1]

    shutil.copytree(folder / "train", tmp_path / "some")
    for i in range(20):
        (tmp_path / "some" / "class0" / f"bad{i}.jpg").write_bytes(b"not a jpeg")
    run("--method", "mae", "--data", tmp_path / "some", "--out", tmp_path / "run2", "--epochs", 3, code=1)
    assert "too many broken images: 1" in capsys.readouterr().err.strip().splitlines()[-1]
    assert (tmp_path / "run2" / "checkpoint.pt").exists()  # nothing computed is lost


def test_folders(folder, tmp_path):
    train_set, val_set = data.open_sets(args("--data", folder))
    assert len(train_set) == 40 and len(val_set) == 8 and train_set.classes == ["class0", "class1"]
    assert [train_set[i][1] for i in range(40)] == [0] * 20 + [1] * 20 and train_set.paths == sorted(
        train_set.paths
    )
    classes, none = data.open_sets(args("--data", folder / "train"))
    assert len(classes) == 40 and none is None
    (folder / "train" / "class0" / "up").symlink_to(
        folder / "train"
    )  # a link that leads back up, and hidden files
    (folder / "train" / ".hidden.png").write_bytes(b"")
    assert len(data.open_sets(args("--data", folder / "train"))[0]) == 40
    (folder / "train" / "class0" / "up").unlink()
    (folder / "train" / ".hidden.png").unlink()
    flat, _ = data.open_sets(args("--data", folder / "train" / "class0"))
    assert len(flat) == 20 and flat.classes == [] and flat[0][1] == -1


def test_the_pictures_of_a_run_are_no_data(folder, tmp_path):
    """Not even if the run's folder lies in the set's."""
    shutil.copytree(folder / "val" / "class0", tmp_path / "set")
    out = data.RunFolder(tmp_path / "set" / "runs" / "a")
    out.write_picture("a.png", gradient_image())
    (flat, _) = data.open_sets(args("--data", tmp_path / "set"))
    assert len(flat) == 4 and flat.classes == []


class Listing:
    """os.scandir, which gives names in any order, with the names in order or in the opposite order."""

    def __init__(self, scandir, path, opposite):
        with scandir(path) as entries:
            self.entries = iter(sorted(entries, key=lambda entry: entry.name, reverse=opposite))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.entries)


@pytest.mark.parametrize(
    "images, links, expected",
    [
        # Crosswise: each class has the image of y.
        (["x/x.png", "y/y.png"], {"x/link": "y"}, ["x/link/y.png", "x/x.png", "y/y.png"]),
        (["a/1.png"], {"b": "a"}, ["a/1.png", "b/1.png"]),
        # Up: to the folder itself, to its parent, to a class.
        (["a/1.png", "b/2.png"], {"a/up": "", "up": ""}, ["a/1.png", "b/2.png"]),
        (["a/1.png", "b/2.png"], {"a/up": ".."}, ["a/1.png", "b/2.png"]),
        (["a/b/1.png"], {"a/b/up": "a"}, ["a/b/1.png"]),
        # Two folders with links to each other.
        (["a/1.png", "b/2.png"], {"a/x": "b", "b/y": "a"}, ["a/1.png", "a/x/2.png", "b/2.png", "b/y/1.png"]),
        # Two ways to the same images within a class: the first name counts.
        (["a/z/1.png"], {"a/l": "a/z", "a/k": "a/z"}, ["a/k/1.png"]),
        # A chain of links, and links to a hidden folder.
        (
            ["a/1.png", "b/2.png", "c/3.png"],
            {"a/b": "b", "b/c": "c"},
            ["a/1.png", "a/b/2.png", "a/b/c/3.png", "b/2.png", "b/c/3.png", "c/3.png"],
        ),
        ([".store/1.png"], {"a": ".store", "b": ".store"}, ["a/1.png", "b/1.png"]),
    ],
    ids="crosswise alias up parent class mutual twice chain hidden".split(),
)
def test_links_are_followed_in_one_order_and_end(images, links, expected, tmp_path, monkeypatch):
    root = tmp_path / "set"
    for image in images:
        (root / image).parent.mkdir(parents=True, exist_ok=True)
        (root / image).write_bytes(b"")
    for link, target in links.items():
        (root / link).symlink_to(root / target)
    scandir = os.scandir
    lists = []
    for opposite in (False, True):
        monkeypatch.setattr(os, "scandir", lambda path: Listing(scandir, path, opposite))
        found = data.open_folder(root)
        lists.append((found.paths, found.labels, found.classes))
    assert lists[0] == lists[1]
    assert [os.path.relpath(path, root) for path in lists[0][0]] == expected


def test_the_work_of_many_links_is_bounded(tmp_path, monkeypatch):
    # Eight folders, each with links to all of them: there are more than 100,000 ways through them.
    for i in range(8):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / f"{i}.png").write_bytes(b"")
        for j in range(8):
            (tmp_path / f"{i}" / f"to{j}").symlink_to(tmp_path / f"{j}")
    found = data.open_folder(tmp_path)
    assert len(found) == 64 and found.labels == [i for i in range(8) for _ in range(8)]
    monkeypatch.chdir(tmp_path)
    here = data.open_folder(data.Path("."))
    assert [os.path.abspath(path) for path in here.paths] == found.paths


def test_a_list_names_paths_relative_to_itself(folder):
    (folder / "list.txt").write_text("train/class1/01.png\n\ntrain/class0/00.png\n")
    listed, _ = data.open_sets(args("--data", folder / "list.txt"))
    assert [path[-6:] for path in listed.paths] == ["00.png", "01.png"]
    (folder / "list.txt").write_text("train/class1/01.png\nmissing.png\n")
    with pytest.raises(UserError, match="missing.png"):
        data.open_sets(args("--data", folder / "list.txt"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_lists_of_any_encoding(encoding, tmp_path):
    # The names of files are bytes: a list that is not Unicode names them by the same bytes.
    name = os.fsdecode("é.png".encode("latin-1")) if encoding == "latin-1" else "é.png"
    gradient_image().save(tmp_path / name)
    (tmp_path / "list.txt").write_bytes("é.png\r\n\r\n".encode(encoding))
    assert data.open_list(tmp_path / "list.txt").paths == [str(tmp_path / name)]


def refuse(*args, **kwargs):
    raise PermissionError(13, "Permission denied", str(args[0]))


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test", "Valid"])
def test_split_folders(val, tmp_path):
    for split in ("train", val):
        (tmp_path / split / "a").mkdir(parents=True)
        gradient_image().save(tmp_path / split / "a" / f"{split}.png")
    train_set, val_set = data.open_sets(args("--data", tmp_path))
    assert train_set.classes == ["a"] and train_set.name(0).endswith("train/a/train.png")
    assert val_set.name(0).endswith(f"{val}/a/{val}.png")


def test_data_that_cannot_be_read_gets_one_line(folder, tmp_path, monkeypatch):
    (tmp_path / "half.txt").write_bytes(b"\xff\xfea")
    (tmp_path / "list.txt").write_bytes(b"")
    scandir, locked = os.scandir, str(folder / "train" / "class1")
    monkeypatch.setattr(os, "scandir", lambda path: refuse(path) if str(path) == locked else scandir(path))
    for name, words in (
        ("", "--data : neither a set"),
        (folder, f"{locked}: no images in it can be read .Permission denied.; "),
        (tmp_path / "half.txt", "half.txt: cannot be read .*truncated data"),
        (tmp_path / "list.txt", "list.txt: names no image"),
    ):
        with pytest.raises(UserError, match=words):
            data.open_sets(args("--data", name))

    # A list, and a folder, whose content is not for this user.
    stat = os.stat
    monkeypatch.setattr(data.Path, "read_bytes", refuse)
    with pytest.raises(UserError, match="list.txt: cannot be read .*Permission denied"):
        data.open_sets(args("--data", tmp_path / "list.txt"))
    inside = str(folder) + os.sep
    monkeypatch.setattr(os, "stat", lambda p, **k: refuse(p) if str(p).startswith(inside) else stat(p, **k))
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=f"{folder}: no images in it can be read"):
        data.open_sets(args("--data", folder))


@pytest.mark.parametrize(
    "text, error, words",
    [
        ("DataLoader worker (pid 7) died\nCaught a signal", UserError, "failed .Caught a signal.; lower"),
        ("Caught OSError in worker 0\nOSError: No space left", UserError, "failed .OSError: No space left"),
        ("Caught ValueError in worker 0\nValueError: theirs", ValueError, "^Caught ValueError"),
    ],
    ids=["death", "memory", "their error"],
)
def test_what_a_loader_process_raised_is_told_from_its_death(text, error, words, monkeypatch):
    def loader(*args, **kwargs):
        yield from [1, 2]
        raise ValueError(text)

    monkeypatch.setattr(data, "DataLoader", loader)
    batches = data.load_batches(None, None, 2, False)
    assert [next(batches), next(batches)] == [1, 2]
    with pytest.raises(error, match=words) as caught:
        next(batches)
    assert type(caught.value) is error and getattr(caught.value, "code", 1) == 1


def test_a_run_folder_that_is_deleted_is_made_again(tmp_path):
    out = data.RunFolder(tmp_path / "runs" / "a")
    name = os.fsdecode(b"\xff") + "x" * 249  # the name of a file may be any bytes
    for i in range(2):
        shutil.rmtree(tmp_path / "runs")
        out.write_text("table.csv", f"{name},1")
        out.write_picture("a.png", gradient_image())
        out.log({"step": i, "epoch": 0})
        assert os.fsdecode((out.path / "table.csv").read_bytes()) == f"{name},1"
        assert data.read_log(out.path) == [{"step": i, "epoch": 0}]
        assert (out.path / "pictures" / "a.png").exists()
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "runs").write_text("")  # something else lies there now
    with pytest.raises(UserError, match="could not be written") as caught:
        out.log({"step": 2})
    assert caught.value.code == 1


def test_a_sets_name_wins_over_a_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "cifar10")
    with pytest.raises(UserError, match="--download"):
        data.open_sets(args("--data", "cifar10"))
    assert len(data.open_sets(args("--data", "./cifar10"))[0]) == 40


def test_cifar_through_torchvision(tmp_path, monkeypatch):
    import pickle

    import torchvision

    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (10, 3072), dtype=np.uint8)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (root / name).write_bytes(pickle.dumps({"data": pixels, "labels": list(range(10))}))
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(
        torchvision.datasets.cifar, "check_integrity", lambda *a: True
    )  # the stand-in has other checksums
    train_set, val_set = data.open_sets(args("--data", "cifar10", "--data-root", tmp_path))
    assert len(train_set) == 50 and len(val_set) == 10 and train_set.classes == list("abcdefghij")
    image, label = val_set[3]
    assert label == 3 and torch.equal(image, torch.from_numpy(pixels[3].reshape(3, 32, 32)))


def test_normalize_and_its_inverse():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    assert_close(data.normalize(images)[0, 2, 1, 1], (images[0, 2, 1, 1] / 255 - 0.406) / 0.225)
    assert_close(data.denormalize(data.normalize(images)) * 255, images.float(), atol=1e-3, rtol=0)


def test_labels_without_images_are_those_of_the_images():
    shapes = data.Shapes((16, 16), "val", 30)
    assert shapes.labels == [shapes[i][1] for i in range(30)] and len(set(shapes.labels)) > 5


def test_shapes_are_deterministic_disjoint_and_truly_labelled():
    draw = lambda split, i, size=(48, 64): data.Shapes(size, split, 400).draw(i)
    first = draw("train", 7)
    assert torch.equal(first["image"], draw("train", 7)["image"]) and first["image"].shape == (3, 48, 64)
    images = {draw(split, i)["image"].numpy().tobytes() for split in ("train", "val") for i in range(50)}
    assert len(images) == 100
    labels = [draw("train", i)["label"] for i in range(200)]
    assert set(labels) == set(range(10))
    assert data.Shapes((4, 4), "train", 400).draw(65)["mask"].any()  # any size
    for i in range(50):
        sample = draw("val", i)
        x0, y0, x1, y1 = sample["box"]
        mask = sample["mask"]
        assert (
            mask[y0:y1, x0:x1].sum() == mask.sum()
            and mask[y0].any()
            and mask[y1 - 1].any()
            and mask[:, x0].any()
            and mask[:, x1 - 1].any()
        )
        assert 0.02 < mask.float().mean() < 0.6
        assert abs((x0 + x1) / 2 - 32) < 20 and abs((y0 + y1) / 2 - 24) < 20  # near the centre


def test_augmentation_is_a_function_of_seed_epoch_and_sample(folder):
    dataset, transform = data.open_folder(folder / "train"), data.train_transform(args())
    samples = TrainDataset(dataset, transform, seed=1)
    torch.rand(3)
    one = samples[2, 5][0]
    torch.rand(7)
    assert torch.equal(samples[2, 5][0], one)
    assert not torch.equal(samples[3, 5][0], one)
    assert not torch.equal(TrainDataset(dataset, transform, seed=2)[2, 5][0], one)


def test_batches_are_contiguous_slices_of_one_order():
    whole = [[i for _, i in batch] for batch in ResumableBatchSampler(50, 24, 1, 0, 1, seed=3, epochs=2)]
    assert len(whole) == 4 and len(set(whole[0] + whole[1])) == 48 and whole[2] != whole[0]
    parts = [
        [batch for batch in ResumableBatchSampler(50, 4, 3, rank, 2, seed=3, epochs=2)] for rank in (0, 1)
    ]
    for k in range(4):  # each rank, then each micro-batch
        joined = [i for rank in (0, 1) for batch in parts[rank][3 * k : 3 * k + 3] for _, i in batch]
        assert joined == whole[k]
    assert {epoch for epoch, _ in parts[0][0]} == {0} and {epoch for epoch, _ in parts[0][-1]} == {1}
    later = ResumableBatchSampler(50, 4, 3, 1, 2, seed=3, epochs=2)
    later.start = 3
    assert list(later) == parts[1][9:] and len(later) == 3
    with pytest.raises(UserError, match="larger than the set of 50"):
        ResumableBatchSampler(50, 26, 1, 0, 2, seed=0, epochs=1)


def test_fixed_images_are_always_the_same_and_of_all_classes(folder):
    dataset = data.open_folder(folder / "train")  # sorted by class
    images, masks = data.fixed_images(dataset, (20, 20), 8)
    assert torch.equal(images, data.fixed_images(dataset, (20, 20), 8)[0]) and masks is None
    samples = [dataset[i] for i in range(40)]
    labels = [label for image in images for other, label in samples if torch.equal(image, other)]
    assert len(labels) == 8 and set(labels) == {0, 1}
    shapes = data.Shapes((16, 24), "val", 20)
    images, masks = data.fixed_images(shapes, (16, 24), 5)
    drawn = [shapes.draw(i) for i in range(20)]
    mask_of = {tuple(sample["image"].flatten().tolist()): sample["mask"] for sample in drawn}
    assert all(torch.equal(mask_of[tuple(i.flatten().tolist())], mask) for i, mask in zip(images, masks))


def test_object_awareness_is_the_attention_that_falls_on_the_object():
    masks = torch.zeros(2, 4, 8, dtype=torch.bool)
    masks[0, :2, :4] = True  # one of eight 2 x 2 patches fully and its right neighbour
    masks[1, 0, 0] = True  # a quarter of the first patch
    maps = torch.zeros(2, 2, 4)
    maps[0, 0, 0], maps[0, 1, 3], maps[1, 0, 0] = 0.75, 0.25, 1.0
    attention, area = data.object_awareness(maps, masks)
    assert attention == pytest.approx((0.75 + 0.25) / 2) and area == pytest.approx((8 / 32 + 1 / 32) / 2)
    attention, area = data.object_awareness(torch.full((2, 2, 4), 1 / 8), masks)
    assert attention == pytest.approx(area)  # who looks everywhere alike


@pytest.mark.parametrize(
    "flags, crops, jitters",
    [
        ("none", False, False),
        ("fixed-crop", True, False),
        ("random-crop", True, False),
        ("color-jitter", True, True),
    ],
)
def test_augment(flags, crops, jitters):
    transform = data.train_transform(train.parse_args(["--augment", flags, "--image-size", "32", "48"]))
    y, x = torch.meshgrid(torch.arange(60), torch.arange(90), indexing="ij")
    image = torch.stack([2 * x, 3 * y, 0 * x + 128]).to(
        torch.uint8
    )  # red: where across, green: where down, blue: a colour that no crop changes
    views = []
    for seed in range(20):
        data.seed_torch(seed)
        views.append(transform(image))
    assert all(view.shape == (3, 32, 48) and view.dtype == torch.uint8 for view in views)
    assert any(not torch.equal(view, views[0]) for view in views) == crops
    assert any((view[2] != 128).any() for view in views) == jitters
    across = [abs(int(view[0, 16, 40]) - int(view[0, 16, 8])) for view in views]  # red over 32 columns
    down = [int(view[1, 30, 24]) - int(view[1, 2, 24]) for view in views]  # green over 28 rows
    if flags in ("none", "fixed-crop"):  # one size: 60 x 90 to 32 x 48, or to 37 x 55 (8 / 7 of that)
        scale = 60 / 32 if flags == "none" else 90 / 55
        assert all(
            abs(a - 32 * 2 * scale) <= 4 and abs(d - 28 * 3 * scale) <= 6 for a, d in zip(across, down)
        ), (across, down)
    else:
        assert max(across) - min(across) > 10
    stretch = [1.0] if jitters else [a / 64 / (d / 84) for a, d in zip(across, down)]
    assert (
        0.7 < min(stretch) and max(stretch) < 1.4
    )  # 3/4 to 4/3, also where the image asked for is not square
    assert len({bool(view[0, 16, 40] > view[0, 16, 8]) for view in views}) == (
        1 if flags == "none" else 2
    )  # flipped


def test_heat_is_relative_to_the_mean_so_that_even_attention_shows_as_such():
    maps = torch.zeros(3, 4, 4)
    maps[0, 0, 0] = 1  # all on one patch
    maps[1] = 0.3  # even
    heat = data.heat_map(maps, torch.zeros(3, 3, 8, 8))
    assert heat.shape == (3, 3, 8, 8) and (heat[0, :, 2:] == 0).all() and (heat[0, :, :2, :2] == 1).all()
    torch.testing.assert_close(heat[1, :, 5, 5], torch.tensor([0.75, 0.0, 0.0]))  # dark red, everywhere
    assert (heat[1] == heat[1, :, :1, :1]).all() and (heat[2] == 0).all()


def test_curves_compare_runs(tmp_path):
    for name, values in (("a", (1.0, 0.5, 0.2)), ("b", (0.9, 0.8, 0.7))):
        (tmp_path / name).mkdir()
        rows = [
            {"step": i, "epoch": i / 2, "lr": 0.1, "loss": value, "accuracy_layers": [0.2, value]}
            for i, value in enumerate(values)
        ]
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, both = (
        np.array(data.curves(folders)) for folders in ([tmp_path / "a"], [tmp_path / "a", tmp_path / "b"])
    )
    assert (
        one.shape == both.shape and one.shape[1] > 2 * 400
    )  # a chart for the loss, one for the layers; no chart for step, epoch, lr
    red, blue = (tuple(int(255 * c) for c in data.COLOURS[i]) for i in (0, 1))
    assert (one == red).all(-1).any() and not (one == blue).all(-1).any()
    assert (both == red).all(-1).any() and (both == blue).all(-1).any()
    (tmp_path / "a" / "log.jsonl").open("a").write(
        '{"step": 4, "lo{"step": 5}\nnull\n7\n{"epoch": 1}\n'
    )  # a line that a full disk cut short, and others that are no rows
    assert np.array_equal(np.array(data.curves([tmp_path / "a"])), one)
    assert data.curves([tmp_path / "none"]) is None
    (tmp_path / "a" / "log.jsonl").write_text(json.dumps({"step": 1, "epoch": 0.1, "loss": 1.0}) + "\n")
    assert data.curves([tmp_path / "a"]) is None


def test_a_line_goes_through_its_points():
    lines = {"rise": [(0, 0.0), (1, 1.0)], "fall": [(0, 1.0), (1, 0.0)]}
    chart = np.array(data.line_chart("t", lines, {"rise": (0, 2), "fall": (1, 2)}))
    for colour, sign in ((data.COLOURS[0], -1), (data.COLOURS[1], 1)):
        rows, columns = (chart[44:] == [int(255 * c) for c in colour]).all(-1).nonzero()
        slope = np.polyfit(columns, rows, 1)[0]
        assert np.sign(slope) == sign and np.ptp(columns) > 300 and np.ptp(rows) > 150


def test_a_legend_stands_below_the_pictures():
    panels = {"a": torch.rand(2, 3, 64, 64)}
    plain = np.array(data.picture_sheet(panels))
    pixels = np.array(data.picture_sheet(panels, [("one", [255, 0, 0]), ("two", [0, 0, 255])]))
    assert pixels.shape == (len(plain) + 30, *plain.shape[1:]) and (pixels[: len(plain)] == plain).all()
    below = pixels[len(plain) :]
    assert (below[5, 8] == [255, 0, 0]).all() and (below[20, 8] == [0, 0, 255]).all()
    assert (below[:15, 20:] < 128).any() and (below[15:, 20:] < 128).any()  # their names


def test_ticks_are_round_numbers():
    for low, high in ((0.414, 0.678), (1, 4), (3, 1234), (-1, 1), (0.0001, 0.00012)):
        ticks = data.round_ticks(low, high)
        assert 2 <= len(ticks) <= 7 and low <= ticks[0] and ticks[-1] <= high
        assert all(len(f"{tick:.4g}".strip("-0.").replace(".", "")) <= 4 for tick in ticks)
    assert data.round_ticks(2.7, 2.7).tolist() == [2.7]
    assert data.round_ticks(0.414, 0.678).tolist() == pytest.approx([0.45, 0.5, 0.55, 0.6, 0.65])


def test_pictures_are_titled_and_hold_the_panels():
    for titles, head in ((("a", "b", "c"), 19), (("a", "b\nsecond line", "c"), 34)):
        panels = {title: torch.rand(2, 3, 64, 64) for title in titles}
        pixels = np.array(data.picture_sheet(panels))
        assert (
            pixels.shape == (head + 4 + 2 * (128 + 4), 4 + 3 * (128 + 4), 3) and (pixels[:head] < 128).any()
        )
        corner = (panels["b\nsecond line" if head == 34 else "b"][0, :, 0, 0] * 255).byte().numpy()
        assert np.abs(pixels[head + 4, 4 + 132].astype(int) - corner).max() <= 1
