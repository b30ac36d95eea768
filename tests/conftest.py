import gc
import sys
from pathlib import Path

import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

torch.set_num_threads(1)  # the models are tiny

import train  # noqa: E402
import vit  # noqa: E402
from data import MEAN, STD, Shapes  # noqa: E402

TINY = (
    "--image-size 16 --patch-size 4 --width 32 --depth 2 --heads 2 --decoder-width 16 --decoder-depth 1 "
    "--decoder-heads 2 --batch-size 8 --workers 0 --device cpu"
).split()


def pytest_collection_finish(session):
    """Each run ends with a garbage collection; let it not search all that was imported, for half a second."""
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """48 little images in two class folders each of train/ (40) and val/ (8)."""
    root, shapes = tmp_path_factory.mktemp("images"), Shapes((20, 20), "test", 48)
    for i in range(48):
        path = root / ("train" if i < 40 else "val") / f"class{i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(shapes[i][0]).save(path)
    return root


def build(method, *flags):
    """A tiny model from flags, as the command line would build it."""
    args = train.parse_args(["--method", method, *TINY, *map(str, flags)])
    return train.METHODS[method](args)


def randomize(model):
    """Move every parameter off its initial value, so that a missing bias or scale shows."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def write_encoder(tmp_path_factory, *shape):
    """An encoder.pt of a random ViT -> its path."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "encoder.pt"
    torch.save(vit.pack_encoder(randomize(vit.ViT(*shape)), "mae", "cls", MEAN, STD), path)
    return path


def assert_gradients(model, grads, tolerance):
    """Every trained parameter has the given gradient {name: tensor}, and no other is given."""
    assert grads.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, grads[name], atol=tolerance, rtol=0)


def run(*flags, code=0, main=train.main, defaults=TINY):
    """train.main, or another program's, in-process with tiny sizes; asserts the exit code."""
    try:
        main([*defaults, *map(str, flags)])
        left = 0
    except SystemExit as error:
        left = error.code
    assert left == code
