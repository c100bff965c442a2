"""Tasks: no leak between splits, the same on every call, folders read or refused by name."""
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import vitplast as vp
from vitplast.images import FormulaConfig, FormulaImages
from vitplast.tasks import COPIES, digits, pretraining_images, render, split_indices


def test_no_handwriting_crosses_the_digit_splits():
    data, task = load_digits(), digits()
    parts = split_indices(data.target, range(10))
    assert sorted(np.concatenate(parts)) == list(range(1797))
    distinct = [len(np.unique(data.data[p], axis=0)) for p in parts]
    assert len(np.unique(data.data, axis=0)) == sum(distinct)  # also no copy of an image in another split
    for part, name in zip(parts, COPIES):
        split = getattr(task, name)
        assert len(split) == COPIES[name] * len(part)
        assert torch.equal(split.labels, torch.from_numpy(data.target[part]).repeat(COPIES[name]))
        share = np.bincount(data.target[part]) / len(part)
        assert abs(share - np.bincount(data.target) / 1797).max() < 0.01


def test_digits_are_bytes_and_the_same_every_time():
    task = digits()
    again = digits.__wrapped__()
    for name in COPIES:
        split = getattr(task, name)
        assert split.images.dtype == torch.uint8 and split.images.shape[1:] == (3, 32, 32)
        assert torch.equal(split.images, getattr(again, name).images)
    assert task.test_sources == len(task.test) // 4
    assert task.n_classes == 10 and task.classes[3] == "3" and "4316 train" in repr(task)


def test_a_digit_can_be_seen_in_its_rendering():
    """The same random numbers with and without the digit: the pictures differ, and only in a part of the pixels."""
    source = torch.zeros(64, 1, 32, 32)
    source[:, :, 8:24, 14:18] = 1
    formula = FormulaImages(FormulaConfig(seed=999))
    drawn, empty = (render(s, formula, torch.Generator().manual_seed(0)).float() for s in (source, 0 * source))
    changed = ((drawn - empty).abs().amax(1) > 8).float().mean((1, 2))
    assert (changed > 0.02).float().mean() > 0.9 and changed.max() < 0.6


def test_pretraining_images_are_the_same_every_time():
    a = pretraining_images(300)
    assert torch.equal(a[:256], pretraining_images(256)) and a.dtype == torch.uint8 and not torch.equal(a, pretraining_images(300, seed=2))


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for c, name in enumerate(("bird", "cat", "dog")):
        (tmp_path / name).mkdir()
        for i in range(10):
            pixels = rng.integers(0, 80, (20 + i, 30, 3), dtype=np.uint8)
            pixels[..., c] += 150
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_a_folder_of_class_folders(photos):
    (photos / "cat" / "notes.txt").write_text("not an image")
    (photos / ".cache").mkdir()
    task = vp.task(photos, size=16)
    assert task.classes == ("bird", "cat", "dog") and [len(s) for s in (task.train, task.validation, task.test)] == [18, 6, 6]
    for split in (task.train, task.validation, task.test):
        assert torch.equal(split.images.float().mean((2, 3)).argmax(1), split.labels)  # the brightest channel is the class
    pixels = {image.numpy().tobytes() for split in (task.train, task.validation, task.test) for image in split.images}
    assert len(pixels) == 30
    assert torch.equal(vp.task(str(photos), size=16).test.images, task.test.images)


def test_grey_alpha_and_palette_images_are_converted(photos):
    for i, mode in enumerate(("L", "RGBA", "P", "LA", "1")):
        Image.new(mode, (40, 20)).save(photos / "cat" / f"{mode}.png")
    assert vp.task(photos, size=8).train.images.shape[1:] == (3, 8, 8)


def test_the_centre_square_is_kept(tmp_path):
    for name, value in (("a", 0), ("b", 255)):
        (tmp_path / name).mkdir()
        pixels = np.full((10, 30, 3), 128, np.uint8)
        pixels[:, 10:20] = value  # the middle third
        for i in range(3):
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    split = vp.task(tmp_path, size=10).test
    assert [set(image.flatten().tolist()) for image in split.images] == [{0}, {255}]


def damage(path):
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize("spoil, message", [
    (lambda root: damage(root / "dog" / "3.png"), r"dog/3.png: not a readable image"),
    (lambda root: (root / "dog" / "3.jpg").write_text("hello"), r"dog/3.jpg: not a readable image"),
    (lambda root: [f.unlink() for f in list((root / "dog").iterdir())[1:]], "class 'dog' has 1 image: expected at least 3"),
    (lambda root: (root / "empty").mkdir(), "class 'empty' has 0 images: expected at least 3"),
    (lambda root: [d.rename(root / "train" / d.name) for d in [*root.iterdir()] if (root / "train").mkdir(exist_ok=True) is None], "1 class folders, expected at least 2"),
])  # fmt: skip
def test_bad_folders_are_refused_by_name(photos, spoil, message):
    spoil(photos)
    with pytest.raises(ValueError, match=message):
        vp.task(photos, size=8)


def test_an_empty_folder_and_one_with_splits(tmp_path):
    with pytest.raises(ValueError, match="0 class folders"):
        vp.task(tmp_path)
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="expected the class folders themselves"):
        vp.task(tmp_path)


def test_unknown_tasks_and_sizes():
    with pytest.raises(ValueError, match="unknown task 'digts'.*nearest known: .'digits'"):
        vp.task("digts")
    with pytest.raises(ValueError, match="size=64: the images of 'digits' have side 32"):
        vp.task("digits", size=64)
