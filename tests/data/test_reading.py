"""Splits that do not leak, files read or refused by name, crops against torchvision, a cache that is whole or not there."""
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

import vitplast as vp
from vitplast.data import reading
from vitplast.data import RandomCrops, Split, Task, agreement, decode
from vitplast.data.folders import folder_task
from vitplast.data.reading import (
    cached, crop, read_image, split_indices, write_split,
)
from vitplast.training import FinetuneConfig


def test_splits_are_stratified_disjoint_and_complete():
    labels = np.random.default_rng(0).integers(0, 7, 1000)
    for shares in ((0.6, 0.2, 0.2), (0.8, 0.2), (0.64, 0.16, 0.2)):
        parts = split_indices(labels, range(7), shares)
        assert sorted(np.concatenate(parts)) == list(range(1000)) and len(parts) == len(shares)
        for part, share in zip(parts, shares):
            assert abs(np.bincount(labels[part]) - share * np.bincount(labels)).max() <= 1
        again = split_indices(labels, range(7), shares)
        assert all((a == b).all() for a, b in zip(parts, again))


def test_a_class_too_small_to_split():
    with pytest.raises(ValueError, match="class 'b' has 2 images: expected at least 3, one each for train, validation, test"):
        split_indices([0, 0, 0, 1, 1], "ab")
    with pytest.raises(ValueError, match="class 'b' has 1 image: expected at least 2, one each for train, validation"):
        split_indices([0, 0, 1], "ab", (0.8, 0.2))


@pytest.fixture
def photos(tmp_path):
    rng, root = np.random.default_rng(0), tmp_path / "photos"
    for c, name in enumerate(("bird", "cat", "dog")):
        (root / name).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 80, (20 + i, 30, 3), dtype=np.uint8)
            pixels[..., c] += 150
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def test_a_folder_of_class_folders(photos):
    (photos / "cat" / "notes.txt").write_text("not an image")
    (photos / ".cache").mkdir()
    (photos / "cat" / "._1.png").write_bytes(b"what the Finder leaves on foreign disks")
    task = vp.task(photos, size=16)
    assert task.classes == ("bird", "cat", "dog") and [len(s) for s in (task.train, task.validation, task.test)] == [18, 6, 6]
    for split in (task.train, task.validation, task.test):
        assert torch.equal(split.images.float().mean((2, 3)).argmax(1), split.labels)  # the brightest channel is the class
    pixels = {image.numpy().tobytes() for split in (task.train, task.validation, task.test) for image in split.images}
    assert len(pixels) == 30
    assert torch.equal(vp.task(str(photos), size=16).test.images, task.test.images)


def test_worker_processes_decode_the_same(photos):
    assert torch.equal(folder_task(photos, 16, workers=2).train.images, folder_task(photos, 16, workers=0).train.images)


@pytest.mark.parametrize("mode, colour, expected", [
    ("L", 200, (200, 200, 200)), ("1", 1, (255, 255, 255)), ("P", 0, (0, 0, 0)), ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
    ("RGBA", (10, 20, 30, 0), (255, 255, 255)), ("RGBA", (10, 20, 30, 255), (10, 20, 30)), ("LA", (100, 0), (255, 255, 255)),
    ("I;16", 32768, (128, 128, 128)), ("I;16", 65535, (255, 255, 255)), ("I;16", 700, (2, 2, 2)),
])  # fmt: skip
def test_any_mode_becomes_rgb_on_white_paper(tmp_path, mode, colour, expected):
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new(mode, (40, 20), colour).save(path)
    pixels, aspect = read_image(path, 8)
    assert pixels.shape == (3, 8, 8) and aspect == 2
    assert np.abs(pixels.transpose(1, 2, 0).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("mode, value", [("I", 40000), ("F", 0.5)])
def test_depths_without_a_known_white_are_refused(tmp_path, mode, value):
    Image.new(mode, (4, 4), value).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=f"x.tif: not a readable image .mode {mode}: expected 8 or 16 bits"):
        read_image(tmp_path / "x.tif", 4)


def test_labels_that_are_no_class():
    with pytest.raises(ValueError, match=r"labels \[-1, 2\]: expected 0 to 1, one of 2 classes"):
        split_indices([0, 1, 2, -1] * 5, "ab")


def test_the_centre_or_the_whole(tmp_path):
    pixels = np.full((10, 30, 3), 128, np.uint8)
    pixels[:, 10:20] = 255  # the middle third
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert set(read_image(tmp_path / "x.png", 10)[0].flatten()) == {255}
    whole, aspect = read_image(tmp_path / "x.png", 30, part=None)
    assert aspect == 3 and whole[:, :, :8].max() == whole[:, :, -8:].max() == 128 and whole[:, :, 13:17].min() == 255


def test_the_published_centre_crop_is_torchvisions(tmp_path):
    """Short side to 64, centre 56: the part 56 / 64, up to the rounding of two resizes."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((360, 240), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "x.png")
    expected = tv.center_crop(tv.resize(picture, 64, interpolation=tv.InterpolationMode.BICUBIC), 56)
    found, _ = read_image(tmp_path / "x.png", 56, part=0.875)
    difference = np.abs(np.array(expected).transpose(2, 0, 1).astype(int) - found)
    assert difference.mean() < 1.5 and difference.max() < 20


def test_an_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (40, 20)).save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg", 8)[1] == 0.5


def damage(path):
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize("spoil, message", [
    (lambda root: damage(root / "dog" / "3.png"), r"1 of 30 images cannot be read: .*dog/3.png: not a readable image.*skip_corrupt=True"),
    (lambda root: (root / "dog" / "3.jpg").write_text("hello"), r"1 of 31 .*dog/3.jpg: not a readable image"),
    (lambda root: [damage(f) for f in (root / "cat").iterdir()], r"10 of 30 images cannot be read: .*; \.\.\."),
    (lambda root: [f.unlink() for f in list((root / "dog").iterdir())[1:]], "class 'dog' has 1 image: expected at least 3"),
    (lambda root: (root / "empty").mkdir(), "class 'empty' has 0 images: expected at least 3"),
    (lambda root: [d.rename(root / "train" / d.name) for d in [*root.iterdir()] if (root / "train").mkdir(exist_ok=True) is None], "1 class folders, expected at least 2"),
])  # fmt: skip
def test_bad_folders_are_refused_by_name(photos, spoil, message):
    spoil(photos)
    with pytest.raises(ValueError, match=message):
        vp.task(photos, size=8)


def test_corrupt_images_are_skipped_on_request(photos):
    damage(photos / "dog" / "3.png")
    damage(photos / "cat" / "0.png")
    with pytest.warns(UserWarning, match="2 of 30 images cannot be read: .*cat/0.png.*dog/3.png"):
        task = vp.task(photos, size=8, skip_corrupt=True)
    assert len(task.train) + len(task.validation) + len(task.test) == 28
    for split in (task.train, task.validation, task.test):
        assert torch.equal(split.images.float().mean((2, 3)).argmax(1), split.labels)  # labels still fit their images


@pytest.mark.parametrize("aspect", [0.2, 0.7, 1.0, 1.5, 6.0])
def test_boxes_are_distributed_as_torchvisions(aspect):
    """Means and spreads of area, ratio and place of 3,000 crops against torchvision's own sampler."""
    torch.manual_seed(0)
    height, width = 2000, round(2000 * aspect)
    theirs = torch.tensor([RandomResizedCrop.get_params(torch.empty(3, height, width), (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(3000)]).double()
    top, left, h, w = theirs.T
    crops = RandomCrops(8, torch.full((3000,), width / height))
    ours = crops.boxes(torch.arange(3000), torch.Generator().manual_seed(0))

    def features(left, top, w, h):
        return torch.stack([w * h, (aspect * w / h).log(), left / (1 - w + 1e-6), top / (1 - h + 1e-6)])

    a = features(left / width, top / height, w / width, h / height)
    b = features(*ours.T)
    loose = [(s[:, 2:] if s is ours else torch.stack([w / width, h / height], 1)).amax(1) < 0.95 for s in (theirs, ours)]
    for i, (x, y) in enumerate(zip(a, b)):
        if i >= 2:  # a crop as long as a side has no choice of place along it
            x, y = x[loose[0]], y[loose[1]]
        error = (x.var() / len(x) + y.var() / len(y)).sqrt() if len(x) > 30 else 1.0
        assert abs(x.mean() - y.mean()) < 4 * error + 2e-3
        assert len(x) <= 30 or abs(x.std() - y.std()) < 0.1 * x.std() + 2e-3
    assert aspect in (0.2, 6.0) or loose[1].sum() > 1000
    assert ours.min() >= 0 and (ours[:, :2] + ours[:, 2:]).max() <= 1 + 1e-12


def test_a_crop_is_torchvisions_crop():
    rng = np.random.default_rng(0)
    smooth = torch.from_numpy(np.array(Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((96, 96), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    box = torch.tensor([[24 / 96, 12 / 96, 48 / 96, 60 / 96]], dtype=torch.float64)
    expected = tv.resized_crop(smooth, 12, 24, 60, 48, (64, 64), interpolation=tv.InterpolationMode.BILINEAR, antialias=False)
    for mirror, picture in ((1.0, expected), (-1.0, expected.flip(-1))):
        found = crop(smooth[None], box, torch.tensor([mirror]), 64)[0]
        inner = (found.int() - picture.int()).abs()[:, 4:-4, 4:-4]  # at the border one sees beyond the box, the other does not
        assert inner.max() <= 2


def test_crops_of_a_squeezed_cache_are_those_of_the_original(tmp_path):
    """An original of 300 x 200, kept as a square of 128: its crops differ from the original's by a few grey levels."""
    rng = np.random.default_rng(1)
    original = Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)).resize((300, 200), Image.Resampling.BICUBIC)
    original.save(tmp_path / "x.png")
    squeezed, aspect = read_image(tmp_path / "x.png", 128, part=None)
    box = RandomCrops(64, torch.tensor([aspect])).boxes(torch.tensor([0]), torch.Generator().manual_seed(3))
    left, top, w, h = (box[0] * torch.tensor([300, 200, 300, 200])).round().int().tolist()
    exact = torch.tensor([[left / 300, top / 200, w / 300, h / 200]], dtype=torch.float64)
    expected = tv.resized_crop(original, top, left, h, w, (64, 64), interpolation=tv.InterpolationMode.BILINEAR)
    found = crop(torch.from_numpy(squeezed.copy())[None], exact, torch.ones(1), 64)[0]
    difference = np.abs(np.array(expected).transpose(2, 0, 1).astype(int) - found.numpy())[:, 3:-3, 3:-3]
    assert difference.mean() < 3


def test_the_centre_of_a_squeezed_cache_is_the_centre_of_the_original():
    pixels = np.full((10, 30, 3), 100, np.uint8)
    pixels[:, 10:20] = 200  # the middle third
    whole = torch.from_numpy(np.array(Image.fromarray(pixels).resize((60, 60), Image.Resampling.NEAREST))).permute(2, 0, 1)[None]
    crops = RandomCrops(16, torch.tensor([3.0]))
    assert crops.centre(whole, torch.tensor([0])).unique().tolist() == [200]
    square = torch.arange(64, dtype=torch.uint8).expand(1, 3, 64, 64)  # each column its number
    found = RandomCrops(56, torch.tensor([1.0])).centre(square, torch.tensor([0]))
    assert torch.equal(found[0, 0, 0], torch.arange(4, 60, dtype=torch.uint8))  # 56 of 64 columns, from the fifth on


def test_augmented_batches_depend_on_the_generator_alone():
    images = torch.randint(0, 256, (20, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    split = Split(images, torch.arange(20) % 2)
    task = vp.Task("t", ("a", "b"), split, split, split, 20, augment=RandomCrops(16, torch.ones(20)))
    rows = torch.tensor([3, 5, 7])
    first, labels = task.batch(rows, torch.Generator().manual_seed(1))
    again, _ = task.batch(rows, torch.Generator().manual_seed(1))
    other, _ = task.batch(rows, torch.Generator().manual_seed(2))
    assert torch.equal(first, again) and not torch.equal(first, other) and labels.tolist() == [1, 1, 1]
    plain, _ = vp.Task("t", ("a", "b"), split, split, split, 20).batch(rows, None)
    assert torch.equal(plain, images[rows])


def test_finetuning_sees_the_augmented_images(model, stripes):
    """Left half or right half bright: mirrored half of the time, the classes cannot be told apart, and the loss stays up."""
    images = stripes.train.images.clone()
    images[stripes.train.labels == 0, :, :, :8] += 100
    crops = RandomCrops(16, torch.ones(64), area=(0.99, 1.0), ratio=(1.0, 1.0))
    plain = replace(stripes, train=Split(images, stripes.train.labels))
    config = FinetuneConfig(lr=0.1, steps=40, eval_every=40)
    losses = [vp.finetune(model, t, "all", config).history.loss.tail(10).mean() for t in (plain, replace(plain, augment=crops))]
    assert losses[0] < 0.3 and losses[1] > 0.4


def fill(folder, n=4, fail=False):
    for name in reading.SPLITS:
        write_split(folder, name, np.full((n, 3, 8, 8), 7, np.uint8), np.zeros(n))
    if fail:
        raise KeyboardInterrupt
    return {"classes": ["a"], "test_sources": n}


def folders(root):
    return sorted(p.name for p in root.iterdir())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VITPLAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_task_is_made_once(cache):
    made = []

    def build(folder):
        made.append(1)
        return fill(folder)

    first, second = (cached("x/y@5", {"size": 8}, build) for _ in range(2))
    assert len(made) == 1 and torch.equal(first.train.images, second.train.images) and first.name == "x/y@5"
    cached("x/y@5", {"size": 9}, build)
    assert len(made) == 2 and len(folders(cache)) == 2 and all(f.startswith("x-y@5-") for f in folders(cache))


def test_an_interrupted_build_leaves_nothing(cache):
    with pytest.raises(KeyboardInterrupt):
        cached("x", {}, lambda folder: fill(folder, fail=True))
    assert folders(cache) == []


@pytest.mark.parametrize("spoil", [
    lambda f: (f / "train.images.npy").write_bytes((f / "train.images.npy").read_bytes()[:200]),
    lambda f: (f / "test.labels.npy").unlink(),
    lambda f: (f / "task.json").write_text("{"),
    lambda f: (f / "task.json").write_text("[]"),
    lambda f: (f / "test.images.npy").write_bytes(b""),
    lambda f: (f / "test.images.npy").write_bytes(b"PK\x03\x04garbage"),
    lambda f: np.save(f / "train.labels.npy", np.array(1)),
    lambda f: np.save(f / "validation.labels.npy", np.zeros(2, dtype=np.int64)),
])  # fmt: skip
def test_a_damaged_copy_is_made_again(cache, spoil):
    cached("x", {}, fill)
    spoil(cache / folders(cache)[0])
    with pytest.warns(UserWarning, match="not a complete task .*; it is made again"):
        task = cached("x", {}, fill)
    assert task.train.images.sum() == 4 * 3 * 64 * 7


def test_two_builders_at_once_end_with_one_task(cache):
    barrier, tasks = threading.Barrier(2), []

    def build(folder):
        barrier.wait(10)
        return fill(folder)

    threads = [threading.Thread(target=lambda: tasks.append(cached("x", {}, build))) for _ in range(2)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert len(tasks) == 2 and len(folders(cache)) == 1


def test_arrays_that_hold_python_objects_are_refused(cache):
    cached("x", {}, fill)
    folder = cache / folders(cache)[0]
    np.save(folder / "train.labels.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="not a complete task"):
        reading.read_task(folder)


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VITPLAST_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(ValueError, match="set VITPLAST_CACHE to a folder that can be written"):
        cached("x", {}, fill)


def test_a_full_disk_is_an_error_and_not_a_crash(tmp_path, monkeypatch):
    def no_room(fd, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", no_room)
    with pytest.raises(OSError, match="No space left"):
        reading.new_array(tmp_path / "x.npy", 4, 8)


def test_decoding_says_how_far_it_is(photos, tmp_path, capsys):
    decode(sorted((photos / "cat").iterdir()), tmp_path / "x.npy", 8, progress=True)
    assert "decoding" in capsys.readouterr().err
    assert len(np.load(tmp_path / "x.npy")) == 10


def small_task(images, labels, classes="ab", **changes):
    split = Split(images, labels)
    return Task("small", tuple(classes), **{"train": split, "validation": split, "test": split, "test_sources": len(labels)} | changes)


PIXELS = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
MAPS = torch.arange(32).view(2, 4, 4) % 2


def test_labels_may_belong_to_pictures_pixels_or_tokens():
    assert small_task(PIXELS, MAPS).dense and not small_task(PIXELS, MAPS[:, 0, 0]).dense
    assert not small_task(torch.zeros(2, 4, dtype=torch.long), MAPS[:, 0]).dense


@pytest.mark.parametrize("images, labels, message", [
    (PIXELS, MAPS[:, :3], r"labels \(2, 3, 4\) of images \(2, 3, 4, 4\), expected one of each, \(2,\), or one of each place, \(2, 4, 4\)"),
    (PIXELS, MAPS * 0, "no training pixel is of class 'b', expected some of every class"),
    (PIXELS, MAPS + 1, "labels from 1 to 2, expected 0 to 1"),
    (PIXELS.float(), MAPS, r"torch.float32, expected bytes \(N, 3, H, W\), or token numbers"),
    (torch.zeros(2, 5, dtype=torch.long), MAPS[:, 0], r"labels \(2, 4\) of images \(2, 5\), expected one of each"),
])  # fmt: skip
def test_labels_that_fit_no_place_are_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        small_task(images, labels)


def test_dense_tasks_are_not_augmented_and_splits_are_of_one_kind():
    crops = RandomCrops(4, torch.ones(2))
    with pytest.raises(ValueError, match="would move the pictures and not their labels"):
        small_task(PIXELS, MAPS, augment=crops)
    with pytest.raises(ValueError, match="expected the same in every split"):
        small_task(PIXELS, MAPS, test=Split(PIXELS, MAPS[:, 0, 0]))


def test_mean_iou_is_that_of_sklearn():
    from sklearn.metrics import jaccard_score

    g = torch.Generator().manual_seed(0)
    for classes in (2, 5):
        labels, said = torch.randint(classes, (2, 7, 6, 6), generator=g)
        said = torch.where(torch.rand(said.shape, generator=g) < 0.5, labels, said)
        expected = jaccard_score(labels.flatten(), said.flatten(), average="macro")
        assert agreement(said, labels) == pytest.approx(expected, rel=1e-12)
    # a class that is neither there nor predicted counts for nothing
    assert agreement(labels * 0 + 3, labels * 0 + 3) == 1.0
    assert agreement(labels[0], labels[0] * 0) == (labels[0] == 0).double().mean()
