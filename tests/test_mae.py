"""MAE against reference numbers of the authors' code, and the facts of Sec. 3.1."""
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import mrmae
import vit
from conftest import assert_gradients, build, randomize

GOLDEN = torch.load(Path(__file__).parent / "golden" / "mae_tiny.pt", weights_only=True)
SIZES = "--image-size 32 --patch-size 4 --width 48 --depth 2 --heads 4 --decoder-width 32 --decoder-depth 2 --decoder-heads 4".split()


@pytest.fixture
def model():
    model = build("mae", *SIZES)
    model.load_state_dict(mrmae.from_official_mae({"model": GOLDEN["state_dict"]}))  # strict
    return model


def test_forward_and_gradients_are_the_authors(model):
    mask = GOLDEN["mask"].bool()
    out = model.predict(GOLDEN["images"], mask)
    assert_close(out["pred"], GOLDEN["pred"], atol=5e-6, rtol=0)
    assert_close(out["target"], GOLDEN["target_norm"], atol=5e-6, rtol=0)
    order = GOLDEN["ids_keep"].argsort(1)  # theirs are shuffled, ours in raster order
    theirs = torch.cat([GOLDEN["latent"][:, :1], vit.take(GOLDEN["latent"][:, 1:], order)], dim=1)
    assert_close(out["latent"], theirs, atol=5e-6, rtol=0)
    assert torch.equal(out["mask"], mask)

    loss, metrics = model(GOLDEN["images"], mask)
    assert_close(loss, GOLDEN["loss"], atol=5e-6, rtol=0)
    assert metrics["recon"] == loss and not metrics["recon"].requires_grad
    loss.backward()
    assert_gradients(model, mrmae.from_official_mae(GOLDEN["grads"]), 5e-6)


def test_low_contrast_patches_show_where_eps_stands(model):
    flat, mask = GOLDEN["flat_case"], GOLDEN["mask"].bool()
    for norm_pix, loss in ((True, flat["loss"]), (False, flat["loss_norm_pix_false"])):
        model.norm_pix = norm_pix
        target = model.predict(flat["images"], mask)["target"]
        assert_close(mrmae.reconstruction_loss(GOLDEN["pred"], target, mask), loss, atol=5e-6, rtol=0)


def test_raw_pixels(model):
    model.norm_pix = False
    assert_close(model(GOLDEN["images"], GOLDEN["mask"].bool())[0], GOLDEN["loss_norm_pix_false"], atol=5e-6, rtol=0)


def test_eq_1_against_loops():
    pred, target, mask = torch.randn(2, 5, 6), torch.randn(2, 5, 6), torch.rand(2, 5).argsort(1) < 3
    total = sum(((pred[b, l] - target[b, l]) ** 2).mean() for b in range(2) for l in range(5) if mask[b, l])
    assert_close(mrmae.reconstruction_loss(pred, target, mask), total / 6)


def test_no_gradient_reaches_predictions_at_visible_patches():
    pred, mask = torch.randn(2, 8, 12, requires_grad=True), torch.rand(2, 8).argsort(1) < 6
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
    model, images, seen = randomize(build("mae")), torch.randn(2, 3, 16, 16), {}
    model.decoder.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0]))
    out = model.predict(images)
    embedded = model.decoder.embed(out["latent"])
    for b in range(2):
        assert_close(seen["x"][b, 0], embedded[b, 0])
        assert_close(seen["x"][b, 1:][out["mask"][b]], model.decoder.mask_token[0].expand(12, -1))
        assert_close(seen["x"][b, 1:][~out["mask"][b]], embedded[b, 1:])


@pytest.mark.parametrize("size, parameters", [("base", 111_655_680), ("micro", None)])
def test_published_sizes(size, parameters):
    import train

    args = train.parse_args(["--method", "mae", "--size", size, "--image-size", "224", "--patch-size", "16"])
    with torch.device("meta"):
        model = mrmae.MAE(args)
    if parameters:
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters  # the authors' count
        assert sum(p.numel() for p in model.encoder.parameters()) == 85_798_656
    assert model.num_visible == 49


def test_pictures_are_in_range_and_show_the_visible_patches():
    model, images = build("mae"), torch.randn(4, 3, 16, 16) * 0.5
    pictures, numbers = model.visualize(images)
    assert pictures.shape == (4, 3, 3, 16, 16) and pictures.min() >= 0 and pictures.max() <= 1 and numbers == {}
    assert len(model.panels) == 3
    shown = vit.patchify(pictures[:, 0] - pictures[:, 1], 4).abs().amax(-1) < 1e-6
    assert (shown.sum(1) == 4).all()
