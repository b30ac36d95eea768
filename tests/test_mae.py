"""MAE against reference numbers of the authors' code, and the facts of MR-MAE Sec. 3.1."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import data
import mrmae
import train
import vit
from conftest import assert_gradients, build, randomize

GOLDEN = torch.load(Path(__file__).parent / "golden" / "mae_tiny.pt", weights_only=True)
MASK = GOLDEN["mask"].bool()
SIZES = (
    "--image-size 32 --patch-size 4 --width 48 --depth 2 --heads 4 "
    "--decoder-width 32 --decoder-depth 2 --decoder-heads 4"
).split()
CLOSE = dict(atol=5e-6, rtol=0)


@pytest.fixture
def model():
    model = build("mae", *SIZES)
    model.load_state_dict(mrmae.from_official_mae({"model": GOLDEN["state_dict"]}))  # strict
    return model


def random_mask(batch, patches, hidden):
    return torch.rand(batch, patches).argsort(1) < hidden


def test_forward_and_gradients_are_the_authors(model):
    out = model.predict(GOLDEN["images"], MASK)
    assert_close(out["pred"], GOLDEN["pred"], **CLOSE)
    assert_close(out["target"], GOLDEN["target_norm"], **CLOSE)
    order = GOLDEN["ids_keep"].argsort(1)  # theirs are shuffled, ours in raster order
    latent = torch.cat([GOLDEN["latent"][:, :1], vit.gather_tokens(GOLDEN["latent"][:, 1:], order)], dim=1)
    assert_close(out["latent"], latent, **CLOSE)
    assert torch.equal(out["mask"], MASK)

    loss, metrics = model(GOLDEN["images"], MASK)
    assert_close(loss, GOLDEN["loss"], **CLOSE)
    assert metrics["recon"] == loss and not metrics["recon"].requires_grad
    loss.backward()
    assert_gradients(model, mrmae.from_official_mae(GOLDEN["grads"]), 5e-6)


@pytest.mark.parametrize("norm_pix, name", [(True, "loss"), (False, "loss_norm_pix_false")])
def test_low_contrast_patches_show_where_eps_stands(model, norm_pix, name):
    model.norm_pix = norm_pix
    target = model.predict(GOLDEN["flat_case"]["images"], MASK)["target"]
    loss = mrmae.reconstruction_loss(GOLDEN["pred"], target, MASK)
    assert_close(loss, GOLDEN["flat_case"][name], **CLOSE)


def test_raw_pixels(model):
    model.norm_pix = False
    assert_close(model(GOLDEN["images"], MASK)[0], GOLDEN["loss_norm_pix_false"], **CLOSE)


def test_eq_1_against_loops():
    pred, target, mask = torch.randn(2, 5, 6), torch.randn(2, 5, 6), random_mask(2, 5, 3)
    errors = [((pred[b, l] - target[b, l]) ** 2).mean() for b in range(2) for l in range(5) if mask[b, l]]
    assert_close(mrmae.reconstruction_loss(pred, target, mask), sum(errors) / 6)


def test_no_gradient_reaches_predictions_at_visible_patches():
    pred, mask = torch.randn(2, 8, 12, requires_grad=True), random_mask(2, 8, 6)
    mrmae.reconstruction_loss(pred, torch.randn(2, 8, 12), mask).backward()
    assert (pred.grad[~mask] == 0).all() and (pred.grad[mask] != 0).all()


def test_hidden_pixels_do_not_reach_the_latent_and_random_masks_hide_the_asked_number():
    model = randomize(build("mae", "--mask-ratio", 0.6))
    images = torch.randn(64, 3, 16, 16)
    mask = model.predict(images)["mask"]
    assert (mask.sum(1) == 16 - int(16 * 0.4)).all()  # the authors round the visible part down
    assert (mask.float().mean(0) - 0.6).abs().max() < 0.25  # every place is hidden about as often
    changed = images + vit.unpatchify(torch.randn(64, 16, 48) * mask.unsqueeze(-1), (4, 4), 4)
    assert torch.equal(model.predict(images, mask)["latent"], model.predict(changed, mask)["latent"])


def test_mask_token_stands_at_hidden_places_only():
    model, seen = randomize(build("mae")), {}
    model.decoder.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0]))
    out = model.predict(torch.randn(2, 3, 16, 16))
    embedded = model.decoder.embed(out["latent"])
    for x, tokens, hidden in zip(seen["x"], embedded, out["mask"]):
        assert_close(x[0], tokens[0])
        assert_close(x[1:][hidden], model.decoder.mask_token[0].expand(12, -1))
        assert_close(x[1:][~hidden], tokens[1:])


@pytest.mark.parametrize("size, parameters", [("base", 111_655_680), ("micro", None)])
def test_published_sizes(size, parameters):
    args = train.parse_args(["--method", "mae", "--size", size, "--image-size", "224", "--patch-size", "16"])
    with torch.device("meta"):
        model = mrmae.MAE(args)
    if parameters:  # the authors' counts
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters
        assert sum(p.numel() for p in model.encoder.parameters()) == 85_798_656
    assert model.num_visible == 49


@pytest.mark.parametrize("norm_pix", [True, False])
def test_pictures_are_in_range_and_show_the_visible_patches(norm_pix):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    flag = "--norm-pix" if norm_pix else "--no-norm-pix"
    model, pixels = build("mae", flag, "--mean", *mean, "--std", *std), torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        pictures = model.visualize((pixels - data.channels(mean, pixels)) / data.channels(std, pixels))
    title = "reconstruction\n(true mean, std)" if norm_pix else "reconstruction"
    assert list(pictures) == ["image", "visible patches", title]
    assert all(picture.shape == (4, 3, 16, 16) for picture in pictures.values())
    assert all(picture.min() >= 0 and picture.max() <= 1 for picture in pictures.values())
    assert_close(pictures["image"], pixels)
    for title in list(pictures)[1:]:
        shown = vit.patchify(pictures["image"] - pictures[title], 4).abs().amax(-1) < 1e-6
        assert (shown.sum(1) == 4).all()
