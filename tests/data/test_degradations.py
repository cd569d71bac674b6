"""BSR degradation: each part against what it is defined as, and the whole as a function of its generator."""

import numpy as np
import pytest
from PIL import Image

from dalle2_jax.data import degradations
from dalle2_jax.data.transforms import CROP_X, CROP_Y, Views


def smooth(height, width):
    """A picture without fine detail, different along both axes and between channels."""
    y, x = np.mgrid[:height, :width] / np.array([height, width]).reshape(2, 1, 1)
    return np.stack([x, y, 0.5 + 0.5 * np.sin(3 * x + 2 * y)], axis=-1).astype(np.float32)


@pytest.mark.parametrize("variant", degradations.BSR)
@pytest.mark.parametrize("shape", [(128, 128), (96, 160), (256, 96)])
def test_the_result_has_the_size_the_range_and_the_place_of_the_picture(variant, shape):
    """Trap: height and width exchanged, which squares would not show."""
    picture = smooth(*shape)
    small = degradations.resized(picture, (shape[0] // 4, shape[1] // 4), Image.Resampling.BOX)
    errors = []
    for seed in range(12):
        found = degradations.bsr(picture, 4, np.random.default_rng(seed), variant)
        assert found.shape == small.shape and found.dtype == np.float32
        assert found.min() >= 0 and found.max() <= 1
        errors.append(np.abs(found - small).mean())
    # it is still the same picture at the same place
    assert np.median(errors) < (0.015 if variant == "light" else 0.04)
    mirrored = np.abs(degradations.bsr(picture, 4, np.random.default_rng(0), variant) - small[::-1, ::-1])
    assert mirrored.mean() > 3 * np.median(errors)


def test_it_is_a_function_of_its_generator_and_differs_between_pictures():
    picture = smooth(64, 64)
    one, same, other = (degradations.bsr(picture, 4, np.random.default_rng(s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).mean() > 1e-3
    views = Views(image_size=64, low_res_size=16, crop_size=16, low_res_bsr="full")
    image = Image.fromarray((picture * 255).astype(np.uint8))
    draws = np.full(8, 0.5)
    made = views.make(image, draws)
    again = views.make(image, np.where(np.isin(np.arange(8), (CROP_Y, CROP_X)), 0.1, draws))
    assert made["low_res"].shape == (16, 16, 3) and made["low_res"].dtype == np.float32
    assert -1 <= made["low_res"].min() < 0 < made["low_res"].max() <= 1
    # the window of the target has no say in how the small picture is made
    np.testing.assert_array_equal(made["low_res"], again["low_res"])
    assert not np.array_equal(made["image"], again["image"])


def test_the_full_variant_degrades_more_than_the_light_one():
    rng = np.random.default_rng(0)
    picture = np.kron(rng.random((16, 16, 3)), np.ones((16, 16, 1))).astype(np.float32)
    small = degradations.resized(picture, (64, 64), Image.Resampling.BOX)
    error = {
        variant: np.mean(
            [
                np.abs(degradations.bsr(picture, 4, np.random.default_rng(s), variant) - small)
                for s in range(40)
            ]
        )
        for variant in degradations.BSR
    }
    assert error["full"] > 1.3 * error["light"] > 0


def test_kernels_have_the_moments_they_are_asked_for():
    angle = 0.6
    kernel = degradations.gaussian_kernel(41, (9.0, 2.0), angle, shift=1.5)
    assert kernel.sum() == pytest.approx(1) and kernel.min() >= 0
    y, x = np.mgrid[:41, :41] - 20.0
    mean = np.array([(kernel * x).sum(), (kernel * y).sum()])
    np.testing.assert_allclose(mean, [1.5, 1.5], atol=1e-3)
    dx, dy = x - mean[0], y - mean[1]
    covariance = np.array([[(kernel * a * b).sum() for a in (dx, dy)] for b in (dx, dy)])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    np.testing.assert_allclose(covariance, turn @ np.diag([9.0, 2.0]) @ turn.T, atol=0.02)


def test_convolution_is_the_weighed_neighbourhood_with_mirrored_borders():
    rng = np.random.default_rng(0)
    picture, kernel = rng.random((9, 13, 3)).astype(np.float32), rng.random((5, 5))
    found = degradations.convolved(picture, kernel)
    assert found.shape == picture.shape
    padded = np.pad(picture, [(2, 2), (2, 2), (0, 0)], mode="reflect")
    for y, x in ((0, 0), (4, 6), (8, 12)):
        window = padded[y : y + 5, x : x + 5]
        np.testing.assert_allclose(found[y, x], (window * kernel[..., None]).sum(axis=(0, 1)), rtol=1e-4)
    tiny = degradations.convolved(picture[:2, :3], np.full((25, 25), 1 / 625))
    assert tiny.shape == (2, 3, 3) and np.isfinite(tiny).all()


def test_taking_every_fourth_pixel_after_the_shifted_kernel_keeps_the_place():
    """The middle of a block of 4 x 4, where a box filter looks too, and not its corner."""
    picture = smooth(64, 64)
    kernel = degradations.gaussian_kernel(25, (2.0, 2.0), shift=1.5)
    found = degradations.convolved(picture, kernel)[::4, ::4][4:-4, 4:-4]
    box = degradations.resized(picture, (16, 16), Image.Resampling.BOX)[4:-4, 4:-4]
    np.testing.assert_allclose(found, box, atol=5e-3)
    corner = degradations.gaussian_kernel(25, (2.0, 2.0))
    assert np.abs(degradations.convolved(picture, corner)[::4, ::4][4:-4, 4:-4] - box).max() > 0.02


def test_noise_has_its_level_and_its_kinds():
    flat = np.full((64, 64, 3), 0.5, np.float32)
    levels, grey = [], 0
    for seed in range(60):
        noise = degradations._noisy(flat, np.random.default_rng(seed), 10, 10) - flat
        levels.append(noise.std() * 255)
        grey += np.allclose(noise[..., 0], noise[..., 1], atol=1e-6)
    assert 10 < grey < 40  # four in ten
    assert 9.8 < np.max(levels) < 10.4 and np.min(levels) > 2


def test_a_factor_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="factor 4 does not divide a picture of 62 x 64"):
        degradations.bsr(smooth(62, 64), 4, np.random.default_rng(0))
