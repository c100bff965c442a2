"""Corruptions against scipy, closed formulas and measured statistics."""
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d

from vitplast.data import CORRUPTIONS, FormulaImages, corrupt
from vitplast.data.corruptions import LARGE, SMALL, smear, snow


@pytest.fixture(scope="module")
def images():
    return FormulaImages(dtype=torch.float64).sample(64, torch.Generator().manual_seed(0)).images


@pytest.mark.parametrize("severity", range(1, 6))
def test_contrast_is_the_formula(images, severity):
    c = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    x = images.numpy()
    mean = x.mean((2, 3), keepdims=True)
    np.testing.assert_allclose(corrupt(images, "contrast", severity), np.clip((x - mean) * c + mean, 0, 1), atol=1e-12)


@pytest.mark.parametrize("side, table", [(32, SMALL), (64, SMALL), (65, LARGE), (224, LARGE)])
def test_noise_has_the_stated_deviation_for_the_image_size(side, table):
    grey = torch.full((8, 3, side, side), 0.5, dtype=torch.float64)
    for s in (1, 2):  # low severities: nothing is cut at 0 or 1
        assert corrupt(grey, "gaussian_noise", s).std().item() == pytest.approx(table["gaussian_noise"][s - 1], rel=0.03)
        assert corrupt(grey, "speckle_noise", s).std().item() == pytest.approx(0.5 * table["speckle_noise"][s - 1], rel=0.03)


def test_speckle_spares_black(images):
    assert corrupt(0 * images, "speckle_noise", 5).abs().max() == 0 < corrupt(0 * images, "gaussian_noise", 5).max()


@pytest.mark.parametrize("radius, sigma", [(6, 1.0), (9, 2.5), (20, 15.0)])
@pytest.mark.parametrize("angle, axis, origin", [(0.0, 3, 1), (math.pi / 2, 2, 1), (-math.pi / 2, 2, -1)])
def test_motion_blur_along_an_axis_is_scipys_correlation(images, radius, sigma, angle, axis, origin):
    half = np.exp(-np.arange(2 * radius + 1) ** 2 / (2 * sigma**2))
    kernel = np.concatenate([np.zeros(2 * radius), half / half.sum()])  # centred on its first tap
    if origin < 0:
        kernel = kernel[::-1]
    expected = correlate1d(images.numpy(), kernel, axis=axis, mode="nearest")
    blurred = smear(images, radius, sigma, torch.full((len(images),), angle, dtype=torch.float64))
    np.testing.assert_allclose(blurred, expected, atol=1e-12)


IMAGEMAGICK = [  # convert -virtual-pixel edge -motion-blur RADIUSxSIGMA+ANGLE, version 6.9.11, of the image in the test
    (3, 1.5, 30, [
        [40, 101, 132, 86, 110, 115, 61, 48],
        [128, 135, 139, 169, 176, 104, 110, 130],
        [102, 176, 129, 116, 170, 217, 197, 144],
        [60, 105, 135, 117, 125, 115, 135, 223],
        [82, 74, 61, 75, 149, 170, 163, 177],
        [137, 239, 176, 147, 170, 158, 126, 66],
        [12, 41, 143, 215, 209, 185, 106, 80],
        [88, 90, 59, 84, 139, 176, 157, 165],
    ]),
    (9, 2.5, -100, [
        [0, 26, 117, 96, 79, 136, 80, 29],
        [17, 66, 109, 109, 114, 122, 89, 60],
        [16, 107, 127, 99, 146, 132, 141, 84],
        [30, 109, 136, 102, 137, 130, 126, 133],
        [24, 97, 122, 71, 111, 173, 139, 158],
        [35, 114, 150, 84, 113, 180, 151, 161],
        [27, 94, 123, 131, 148, 193, 162, 100],
        [36, 97, 114, 107, 129, 183, 162, 109],
    ]),
]


@pytest.mark.parametrize("radius, sigma, degrees, expected", IMAGEMAGICK)
def test_motion_blur_is_imagemagicks(radius, sigma, degrees, expected):
    """The authors' tool; it cuts to whole grey levels where we have fractions."""
    image = torch.tensor((37 * np.arange(64) ** 2 % 256).reshape(1, 1, 8, 8)).double()
    found = smear(image, radius, sigma, torch.tensor([math.radians(degrees)], dtype=torch.float64))[0, 0]
    assert (found - torch.tensor(expected)).abs().max() <= 1


def test_every_image_is_blurred_along_its_own_line(images):
    angle = torch.linspace(-1, 1, len(images), dtype=torch.float64)
    together = smear(images, 8, 2.0, angle)
    for i in (0, 17, 63):
        assert torch.equal(smear(images[i : i + 1], 8, 2.0, angle[i : i + 1])[0], together[i])


def test_snow_without_flakes_bleaches_by_the_formula(images):
    """A threshold that no flake reaches leaves kept * x + (1 - kept) * max(x, 1.5 grey + 0.5)."""
    x = images.numpy()
    grey = 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
    expected = 0.8 * x + 0.2 * np.maximum(x, 1.5 * grey + 0.5)
    found = snow(images, (0.1, 0.1, 2.0, 9.0, 8, 3, 0.8), torch.Generator().manual_seed(0))
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_flakes_fall_twice_the_second_time_turned(images):
    black = 0 * images
    fallen = snow(black, (0.3, 0.3, 1.25, 0.65, 14, 12, 1.0), torch.Generator().manual_seed(0))
    assert torch.allclose(fallen, fallen.flip(2, 3)) and fallen.min() >= 0 and 0.02 < fallen.mean() < 0.5


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_bytes_and_floats_seeds_and_ranges(images, name):
    as_bytes = (images * 255).round().to(torch.uint8)
    for severity in (1, 5):
        x = corrupt(as_bytes, name, severity)
        assert x.dtype == torch.uint8 and x.shape == as_bytes.shape
        assert torch.equal(x, corrupt(as_bytes, name, severity))  # nothing but the seed decides
        y = corrupt(as_bytes.double() / 255, name, severity)
        assert y.min() >= 0 and y.max() <= 1 and ((y * 255).round() == x).all()
    other = corrupt(as_bytes, name, 5, torch.Generator().manual_seed(1))
    assert torch.equal(x, other) == (name == "contrast")


def test_the_global_generator_is_left_alone(images):
    state = torch.random.get_rng_state()
    for name in CORRUPTIONS:
        corrupt(images, name)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("severity", [0, 6, -1, 2.5, 5.0, True, "3"])
def test_a_severity_that_does_not_exist(images, severity):
    with pytest.raises(ValueError, match=f"severity={severity!r}: expected an integer from 1 to 5"):
        corrupt(images, "snow", severity)


@pytest.mark.parametrize("bad, message", [
    (lambda x: x[0], r"shape \(3, 32, 32\): expected \(N, 3, H, W\)"),
    (lambda x: x[:, :1], "expected"),
    (lambda x: x * 255, r"images range from 0 to 255: expected floats in \[0, 1\] or bytes"),
    (lambda x: x * math.nan, "images range from nan"),
])  # fmt: skip
def test_bad_images(images, bad, message):
    with pytest.raises(ValueError, match=message):
        corrupt(bad(images), "contrast")


def test_integers_are_neither_bytes_nor_floats(images):
    with pytest.raises(TypeError, match="images are torch.int64: expected bytes or floats"):
        corrupt(images.long(), "snow")


def test_unknown_names_get_the_nearest():
    with pytest.raises(ValueError, match="unknown corruption ..snow"):
        corrupt(torch.zeros(1, 3, 8, 8), ["snow"])
    with pytest.raises(ValueError, match="unknown corruption 'motionblur'; nearest known: .'motion_blur'"):
        corrupt(torch.zeros(1, 3, 8, 8), "motionblur")
