"""Folders of pictures: what is read, what is left out and said, and that no copy of a picture lies on both sides of a split."""
import shutil
import unicodedata
import warnings
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import vitplast as vp
from vitplast.data import folders
from vitplast.data.copies import near_pairs, originals, small_pictures

SPLITS = ("train", "validation", "test")


def picture(seed, size=(48, 48)) -> Image.Image:
    "A picture of soft blots, unlike that of any other seed."
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def fill(root, classes=("bird", "cat"), n=10, start=0):
    "n pictures of each class, every one another."
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            picture(start + 100 * c + i).save(root / name / f"{start}-{i}.png")
    return root


def sides(task) -> list:
    "The bytes of the pictures of each split."
    return [{image.numpy().tobytes() for image in getattr(task, s).images} for s in SPLITS]


def saved_again(image, kind) -> Image.Image:
    "A copy as the web makes them."
    if kind == "smaller":
        return image.resize((40, 40), Image.Resampling.BICUBIC)
    if kind == "jpeg":
        image.save(file := BytesIO(), "JPEG", quality=80)
        return Image.open(file)
    return image.copy()


@pytest.mark.parametrize("kind", ["equal", "smaller", "jpeg"])
def test_copies_lie_in_one_split_and_are_counted(tmp_path, kind):
    fill(tmp_path, n=20)
    for i in range(0, 20, 2):
        saved_again(picture(i), kind).save(tmp_path / "bird" / f"copy {i}.png")
    with pytest.warns(UserWarning, match="10 of 50 pictures are copies of others .the same, or nearly so.; all copies of one lie in one split"):
        task = vp.task(tmp_path, size=16)
    small = {name: small_pictures(getattr(task, name).images) for name in SPLITS}
    for one in SPLITS:
        for other in SPLITS:
            if one != other:  # by brute force: no picture is within ten steps of one in another split
                assert np.sqrt(((small[one][:, None] - small[other]) ** 2).mean(2)).min() > 10
    assert task.test_sources == len(set(originals(task.test.images.numpy()).tolist())) <= len(task.test)
    assert sum(len(getattr(task, s)) for s in SPLITS) == 50
    with pytest.warns(UserWarning, match="10 of 50 pictures are copies"):  # also when it comes from the cache
        vp.task(tmp_path, size=16)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=25))
def test_originals_are_the_ones_that_were_drawn(seeds):
    pictures = np.stack([np.array(picture(s, (16, 16))).transpose(2, 0, 1) for s in seeds])
    expected = [list(dict.fromkeys(seeds)).index(s) for s in seeds]
    assert originals(pictures).tolist() == expected


def test_the_search_tree_misses_no_near_pair():
    rng = np.random.default_rng(0)
    small = rng.uniform(0, 255, (200, 192)).astype(np.float32)
    small[100:] = small[:100] + rng.normal(0, np.linspace(0.1, 8, 100)[:, None], (100, 192))
    apart = np.sqrt(((small[:, None] - small) ** 2).mean(2))
    expected = {(i, j) for i, j in np.argwhere(apart <= 4) if i < j}
    assert {tuple(sorted(p)) for p in near_pairs(small)} == expected and 30 < len(expected) < 70


def test_flat_pictures_that_differ_are_no_copies():
    flat = np.stack([np.full((3, 8, 8), v, np.uint8) for v in (100, 101, 100, 130)])
    assert originals(flat).tolist() == [0, 1, 0, 2]


def test_copies_leave_training_and_validation_where_the_splits_are_given(tmp_path):
    for i, part in enumerate(("train", "val", "test")):
        fill(tmp_path / part, n=6, start=20 * i)
    shutil.copy(tmp_path / "test/cat/40-1.png", tmp_path / "train/cat/a copy.png")
    shutil.copy(tmp_path / "test/cat/40-2.png", tmp_path / "val/cat/another.png")
    shutil.copy(tmp_path / "val/bird/20-3.png", tmp_path / "train/bird/a third.png")
    with pytest.warns(UserWarning, match="3 of 39 pictures are copies of others.*; 3 of them left training or validation"):
        task = vp.task(tmp_path, size=48)
    assert [len(s) for s in sides(task)] == [12, 12, 12] and not (sides(task)[0] & sides(task)[1] | sides(task)[0] & sides(task)[2] | sides(task)[1] & sides(task)[2])
    assert np.array(picture(40)).transpose(2, 0, 1).tobytes() in sides(task)[2]


@pytest.mark.parametrize("names, sizes, said", [
    (("train", "validation", "test"), (20, 20, 20), None), (("Train", "Val", "Test"), (20, 20, 20), None), (("train", "valid", "test"), (20, 20, 20), None),
    (("train", "test"), (16, 4, 20), None), (("train", "val"), (16, 4, 20), "no test split; its validation split is tested on"),
])  # fmt: skip
def test_folders_of_splits_are_read_as_they_are(tmp_path, names, sizes, said):
    for i, part in enumerate(names):
        fill(tmp_path / part, n=10, start=20 * i)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        task = vp.task(tmp_path, size=48)
    assert tuple(len(getattr(task, s)) for s in SPLITS) == sizes and task.classes == ("bird", "cat")
    assert [said in str(w.message) for w in caught] == ([True] if said else [])
    last = {np.array(picture(20 * (len(names) - 1) + 100 * c + i)).transpose(2, 0, 1).tobytes() for c in range(2) for i in range(10)}
    assert sides(task)[2] == last


def test_a_train_is_a_class_where_it_holds_pictures(tmp_path):
    fill(tmp_path, ("boat", "train", "test"), n=5)
    task = vp.task(tmp_path, size=16)
    assert task.classes == ("boat", "test", "train") and sum(len(getattr(task, s)) for s in SPLITS) == 15


def test_what_lies_deeper_is_read_and_what_is_left_out_is_said(tmp_path):
    fill(tmp_path, n=5)
    (tmp_path / "cat/from the shelter/2024").mkdir(parents=True)
    picture(900).save(tmp_path / "cat/from the shelter/2024/tom.png")
    (tmp_path / "cat/.thumbnails").mkdir()
    picture(901).save(tmp_path / "cat/.thumbnails/tom.png")
    picture(902).save(tmp_path / "loose.png")
    (tmp_path / "cat/phone.HEIC").write_bytes(b"x")
    (tmp_path / "cat/notes.txt").write_text("x")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        task = vp.task(tmp_path, size=16)
    assert sum(len(getattr(task, s)) for s in SPLITS) == 11
    assert [str(w.message).partition(": ")[2] for w in caught] == ["1 pictures are left out, they are in no class folder: loose.png", "1 pictures are left out, they are of no readable kind: cat/phone.HEIC"]


def test_two_spellings_of_one_class_are_one_class(tmp_path):
    for i, form in enumerate(("NFC", "NFD")):
        fill(tmp_path, (unicodedata.normalize(form, "Bär"),), n=5, start=20 * i)
    fill(tmp_path, ("cat",), n=5, start=60)
    task = vp.task(tmp_path, size=16)
    assert task.classes == ("B\u00e4r", "cat") and sum(len(getattr(task, s)) for s in SPLITS) == 15


def test_crops_and_flips_are_an_option(tmp_path):
    fill(tmp_path)
    still, moving = vp.task(tmp_path, size=24), vp.task(tmp_path, size=24, augment=True)
    assert still.augment is None and torch.equal(still.test.images, moving.test.images) and torch.equal(still.train.labels, moving.train.labels)
    g, rows = torch.Generator().manual_seed(0), torch.arange(4)
    once, again = moving.batch(rows, g)[0], moving.batch(rows, g)[0]
    assert once.shape == (4, 3, 24, 24) and not torch.equal(once, again) and moving.train.images.shape[-1] == round(24 / 0.875)


def test_a_folder_is_decoded_once(tmp_path, monkeypatch):
    fill(tmp_path)
    first, calls = vp.task(tmp_path, size=16), []
    monkeypatch.setattr(folders, "decode", lambda *args, **kwargs: calls.append(args))
    assert torch.equal(vp.task(f"{tmp_path}/", size=16).train.images, first.train.images) and not calls
    monkeypatch.undo()
    picture(999).save(tmp_path / "cat" / "0-0.png")  # another picture of the same name
    assert sides(vp.task(tmp_path, size=16)) != sides(first)


def test_large_pictures_are_refused_with_the_way_out(tmp_path):
    fill(tmp_path, n=4)
    with pytest.raises(ValueError, match=r"8 of 8 images cannot be read: .*pixels.*max_pixels= allows larger images"):
        vp.task(tmp_path, size=16, max_pixels=1000)
    assert len(vp.task(tmp_path, size=16, max_pixels=48 * 48).train) == 4
    assert Image.MAX_IMAGE_PIXELS == 89478485


@pytest.mark.parametrize("make, message", [
    (lambda p: None, "0 class folders, expected at least 2"), (lambda p: fill(p, ("cat",)), "1 class folders, expected at least 2"),
    (lambda p: [(p / part / "cat").mkdir(parents=True) for part in ("train", "test")], "(train|test): 1 class folders"),
    (lambda p: [fill(p / "train", n=4), fill(p / "test", n=4, start=20), shutil.rmtree(p / "train/cat"), shutil.copytree(p / "test/cat", p / "train/cat")], "no picture of class 'cat' is left for training"), (lambda p: fill(p, n=2), "class 'bird' has 2 images: expected at least 3"),
    (lambda p: [fill(p / part, n=4, start=i) for i, part in ((0, "train"), (20, "test"), (40, "more"))], r"holds \['more'\] beside its splits, expected train/, val/ and test/, or class folders"),
    (lambda p: [fill(p / "train", n=4), fill(p / "test", ("bird", "dog"), n=4, start=20)], "test: class 'dog' is not among the training classes"),
    (lambda p: [shutil.copy(fill(p, n=1) / "cat/0-0.png", p / "cat" / f"{i}.png") for i in range(9)] and fill(p, ("bird",), n=9), "class 'cat' has 1 image: expected at least 3.*; copies of a picture count once, in the class of the first of them"),
])  # fmt: skip
def test_folders_that_are_no_task(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        vp.task(tmp_path, size=16)
