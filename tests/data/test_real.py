"""The suite of real pictures on small folders of the same layout, and on the packages where they are installed."""
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from test_folders import picture

import vitplast as vp
from vitplast.data import real
from vitplast.data.copies import originals
from vitplast.data.folders import joined

SPLITS = ("train", "validation", "test")


def cartoon(path, seed, large=False):
    "A drawing with a transparent margin."
    image = picture(seed).convert("RGBA")
    image.putalpha(Image.fromarray(np.pad(np.full((40, 40), 255, np.uint8), 4)))
    path.parent.mkdir(parents=True, exist_ok=True)
    (image.resize((5000, 4100)) if large else image).save(path)


@pytest.fixture
def root(tmp_path, monkeypatch):
    "All packages in small: six drawings a class, twenty emoji of two kinds by two hands, twelve cells."
    monkeypatch.setenv("VITPLAST_REAL", str(tmp_path))
    monkeypatch.setattr(real, "find_spec", lambda name: None)
    seed = 0
    for folders in real.CLIPART.values():
        for i in range(6):
            cartoon(tmp_path / "openclipart/png" / folders[i % len(folders)] / f"{i}.png", seed := seed + 1)
        for folder in folders:
            (tmp_path / "openclipart/png" / folder).mkdir(parents=True, exist_ok=True)
    cartoon(tmp_path / "openclipart/png/tools/huge.png", 999, large=True)
    cartoon(tmp_path / "openclipart/png/tools" / sorted(real.BLANK)[0], 998)
    listed = []
    for kind, n in (("face", 20), ("tool", 20), ("country-flag", 20), ("rare", 3)):
        for i in range(n):
            name = f"{kind}-{i}.png"
            listed.append({"image": name, "subcategory": kind, "has_img_google": True, "has_img_twitter": i != 99})
            for h, hand in enumerate(real.HANDS):
                file = tmp_path / f"node_modules/emoji-datasource-{hand}/img/{hand}/64/{name}"
                file.parent.mkdir(parents=True, exist_ok=True)
                picture(seed := seed + 1).save(file)
    listed.append({"image": "none.png", "subcategory": "face", "has_img_google": True, "has_img_twitter": False})
    (tmp_path / "node_modules/emoji-datasource-google/emoji.json").write_text(json.dumps(listed))
    cells = tmp_path / "elpv_dataset/data"
    (cells / "images").mkdir(parents=True)
    lines = []
    for i in range(16):
        picture(seed := seed + 1).convert("L").save(cells / f"images/cell{i}.png")
        lines.append(f"images/cell{i}.png  {(0.0, 1.0, 1 / 3, 2 / 3)[i % 4]}   {('mono', 'poly')[i % 2]}")
    (cells / "labels.csv").write_text("\n".join(lines))
    return tmp_path


def test_the_suite_at_any_size(root):
    made = {t.name: t for t in vp.tasks("real", size=14)}
    assert list(made) == list(real.REAL) and {t.test.images.shape[1:] for t in made.values()} == {(3, 14, 14)}
    assert made["openclipart"].n_classes == 27 and sum(len(getattr(made["openclipart"], s)) for s in SPLITS) == 27 * 6
    assert made["solar"].classes == ("defect", "sound") and sum(len(getattr(made["solar"], s)) for s in SPLITS) == 8
    assert made["emoji"].classes == ("face", "tool") and made["emoji"].test_sources * 2 == len(made["emoji"].test)
    assert made["openclipart"].test.images[:, :, 0, 0].min() == 255  # transparent is white
    assert vp.task("emoji", size=14, root=root).test.images.equal(made["emoji"].test.images)


def test_two_drawings_of_one_emoji_share_a_split(root):
    found = real.find_real("emoji")
    where = {}
    for split in SPLITS:
        for image in getattr(vp.task("emoji", size=64), split).images:
            where[image.numpy().tobytes()] = split
    for one, other in zip(found.files[: len(found.files) // 2], found.files[len(found.files) // 2 :]):
        assert one.name == other.name and one != other
        a, b = (where[np.array(Image.open(f).convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)).transpose(2, 0, 1).tobytes()] for f in (one, other))
        assert a == b


def test_the_shift_trains_on_one_hand_and_tests_on_the_other(root):
    task = vp.task("emoji/shift", size=48)
    hands = {h: {np.array(Image.open(f).convert("RGB")).transpose(2, 0, 1).tobytes() for f in root.glob(f"node_modules/*/img/{h}/64/*.png")} for h in real.HANDS}
    for split, hand in zip(SPLITS, ("google", "google", "twitter")):
        assert {i.numpy().tobytes() for i in getattr(task, split).images} <= hands[hand]
    assert (len(task.train), len(task.validation), len(task.test)) == (32, 8, 40)


def test_large_and_empty_drawings_are_left_out_and_counted(root):
    found, large = real.find_clipart()
    assert large == 1 and len(found.files) == 27 * 6 and not {f.name for f in found.files} & {"huge.png", *real.BLANK}


def test_numbers_that_are_linked_either_way_are_one():
    together = joined(np.array([0, 0, 1, 2, 3]), np.array([5, 6, 6, 7, 8]))
    assert together[0] == together[1] == together[2] and len(set(together.tolist())) == 3


def test_plain_digits_are_the_scans(root):
    task, data = vp.task("digits_plain", size=8), load_digits()
    mine = {(i[0].numpy().tobytes(), int(c)) for s in SPLITS for i, c in zip(getattr(task, s).images, getattr(task, s).labels)}
    assert mine == {((255 - x * (255 / 16)).round().astype(np.uint8).tobytes(), int(c)) for x, c in zip(data.images, data.target)}


@pytest.mark.parametrize("gone, name, message", [
    ("openclipart", "openclipart", "openclipart: no drawings in .*openclipart/png; to get it: apt-get install openclipart-png"),
    ("openclipart/png/food/fruit", "openclipart", "openclipart: no .*/food/fruit; to get it: apt-get install openclipart-png"),
    ("elpv_dataset", "solar", "solar: no photographs in .*; to get it: pip install --no-deps elpv-dataset"),
    ("elpv_dataset/data/labels.csv", "solar", "solar: 1 of 1 files are missing, first .*labels.csv; to get them: pip install"),
    ("elpv_dataset/data/images/cell4.png", "solar", "solar: 1 of 8 files are missing, first .*cell4.png"),
    ("node_modules/emoji-datasource-twitter", "emoji", "emoji: no drawings by twitter in .*; to get it: npm install --prefix .* emoji-datasource-google@15.1.2 emoji-datasource-twitter@15.1.2"),
    ("node_modules/emoji-datasource-google/emoji.json", "emoji/shift", "emoji: 1 of 1 files are missing, first .*emoji.json"),
    ("node_modules/emoji-datasource-twitter/img/twitter/64/face-3.png", "emoji", "emoji: 1 of 80 files are missing, first .*face-3.png"),
])  # fmt: skip
def test_what_is_missing_is_named_with_the_command(root, monkeypatch, gone, name, message):
    path = root / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    first_there = real.first_there
    monkeypatch.setattr(real, "first_there", lambda task, what, places, command: first_there(task, what, [p for p in places if p is None or str(p).startswith(str(root))], command))
    with pytest.raises(FileNotFoundError, match=message):
        vp.task(name, size=14)


def test_names_and_options_of_the_suite(root):
    with pytest.raises(ValueError, match="unknown task 'openclipar'.*nearest known: .'openclipart'"):
        vp.task("openclipar")
    with pytest.raises(TypeError, match=r"task 'solar' takes no .'crop'.: expected some of .'root'"):
        vp.task("solar", crop=0.5)
    grid = vp.Grid(("solar", "digits"), models=("formula-vit",), selections=("MHA",), lrs=(0.1,), seeds=(0,))
    assert [r.identity()["images"] for r in grid.runs()] == [1, 1]


@pytest.mark.skipif(not real.Path("/usr/share/openclipart/png").is_dir(), reason="needs openclipart-png")
def test_the_installed_clip_art_shows_something():
    task = vp.task("openclipart", size=70)
    pictures = np.concatenate([getattr(task, s).images.numpy() for s in SPLITS])
    assert len(pictures) == 1803 and task.n_classes == 27 and pictures.reshape(len(pictures), -1).std(1).min() > 1
    assert len(set(originals(pictures).tolist())) < len(pictures)  # there are copies
    assert task.test_sources == len(set(originals(task.test.images.numpy()).tolist()))


@pytest.mark.parametrize("name, size", [("glyphs", 70), ("breeds", 70)])
def test_offline_tasks_at_seventy_pixels(name, size):
    task = vp.task(name, size=size)
    assert task.test.images.shape[1:] == (3, size, size) and pd.Series(task.test.labels.numpy()).nunique() == task.n_classes
