"""Formula images: reproducible from arguments alone, labels that fit the pixels."""
import pytest
import torch

from vitplast.data import FormulaConfig, FormulaImages
from vitplast.data.formula import FAMILIES, pixel_grid, random_affine


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_same_arguments_give_the_same_images_whatever_the_global_state():
    torch.manual_seed(1)
    first = FormulaImages().sample(20, generator())
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    second = FormulaImages().sample(20, generator())
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    torch.manual_seed(1)
    FormulaImages().sample(20, generator())
    assert torch.equal(state, torch.random.get_rng_state())  # the global generator was never drawn from
    assert not torch.equal(first.images, FormulaImages().sample(20, generator(1)).images)


@pytest.mark.parametrize("size", [16, 32, 48])
def test_ranges_and_shapes(size):
    formula = FormulaImages(FormulaConfig(size=size, n_shapes=5, n_textures=7))
    b = formula.sample(64, generator())
    assert b.images.shape == (64, 3, size, size) and b.mask.shape == (64, size, size) and formula.n_classes == 15
    for values in (b.images, b.mask):
        assert torch.isfinite(values).all() and 0 <= values.min() and values.max() <= 1
    assert b.shape.min() >= 0 and b.shape.max() < 15
    assert b.front.min() == b.back.min() == -1 and max(b.front.max(), b.back.max()) < 7


@pytest.mark.parametrize("family", FAMILIES)
def test_classes_differ_more_than_their_images(family):
    grid, f = pixel_grid(24), FAMILIES[family](6, generator(), "cpu")
    classes = torch.arange(6).repeat_interleave(40)
    masks = f(classes, grid, generator(1), 0.3 * torch.ones(240)).view(6, 40, -1)
    centre = masks.mean(1)
    within = (masks - centre[:, None]).norm(dim=-1).mean()
    assert 0.01 < masks.mean() < 0.9 and torch.pdist(centre).mean() > 0.5 * within


def test_the_curriculum_starts_grey_and_ends_in_colour():
    formula = FormulaImages()
    easy, hard = (formula.sample(50, generator(), difficulty=d).images for d in (0.0, None))

    def saturation(images):
        return (images.amax(1) - images.amin(1)).mean()

    assert saturation(easy) < 0.1 < saturation(hard)


def test_a_flat_texture_has_no_label():
    b = FormulaImages(FormulaConfig(n_shapes=2)).sample(400, generator())
    corner = b.images[:, :, :4, :4].flatten(2).std(2).mean(1)  # nearly always background
    flat = b.back == -1
    assert 0.2 < flat.float().mean() < 0.4 and corner[flat].median() < 0.7 * corner[~flat].median()


def test_affine_maps_keep_orientation_and_stay_in_range():
    warp = random_affine(generator(), torch.ones(500))
    assert (torch.linalg.det(warp.matrix) > 0).all() and warp.shift.abs().max() <= 0.3


@pytest.mark.parametrize("kwargs", [dict(size=0), dict(n_shapes=-1), dict(n_textures=0)])
def test_bad_configuration(kwargs):
    (name, value), = kwargs.items()
    with pytest.raises(ValueError, match=f"{name}={value}: expected a positive integer"):
        FormulaConfig(**kwargs)
