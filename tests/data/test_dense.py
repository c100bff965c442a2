"""Labels of pixels against masks that are known otherwise: painted by hand, or read from the files."""
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import vitplast as vp
from vitplast.data import SUITES, dense, real
from vitplast.data.formula import FormulaBatch, FormulaConfig, FormulaImages

SPLITS = ("train", "validation", "test")
GROUP = {subject: group for group, many in dense.GROUPS.items() for subject in many}
COLOURS = {"animal": (250, 0, 0), "person": (0, 250, 0), "plant": (0, 0, 250), "sign": (250, 250, 0), "tool": (0, 250, 250)}


def disc(path, colour, seed):
    "A disc of one colour on nothing, in a wide margin; its size is its own."
    image = Image.new("RGBA", (90, 120), (255, 255, 255, 0))
    draw, wide = ImageDraw.Draw(image), 60 - seed % 40
    draw.ellipse((10, 30, 10 + wide, 90 - seed % 17), fill=(*colour, 255))
    draw.rectangle((20, 40, 22 + seed % 7, 42 + seed % 11), fill=(9, 9, 9, 255))  # no two are copies
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture
def root(tmp_path, monkeypatch):
    "Ten discs of each subject, a full frame, and a thread of a drawing; no ground has their colours."
    monkeypatch.setenv("VITPLAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(real, "first_there", lambda task, what, places, command, found=real.first_there: found(task, what, places[:1], command))
    place, seed = tmp_path / "openclipart/png", 0
    for subject, folders in real.CLIPART.items():
        for folder in folders:
            (place / folder).mkdir(parents=True, exist_ok=True)
        for i in range(10):
            disc(place / folders[0] / f"{i}.png", COLOURS.get(GROUP.get(subject), (128, 128, 128)), seed := seed + 1)
    Image.new("RGB", (80, 60), (250, 0, 0)).save(place / "animals/birds/photograph.png")
    thread = Image.new("RGBA", (200, 200))
    ImageDraw.Draw(thread).line((0, 0, 199, 199), fill=(0, 0, 0, 255))
    thread.save(place / "tools/thread.png")
    Image.new("RGBA", (50, 50)).save(place / "plants/nothing.png")
    return tmp_path


def by_hand(image):
    "The group of every pixel of a picture by its colour, -1 near an edge, where ground and drawing mix."
    colours = np.array([*COLOURS.values()])
    far = np.abs(image.numpy().transpose(1, 2, 0)[:, :, None].astype(int) - colours).max(-1)
    return np.where(far.min(-1) < 2, 1 + far.argmin(-1), 0)


def test_drawings_are_labelled_where_they_are(root, monkeypatch):
    monkeypatch.setattr(FormulaImages, "paint", lambda self, mask, shape, g: FormulaBatch(mask.new_full((len(mask), 3, 40, 40), 0.5), *[shape] * 3, mask))
    task = vp.task("openclipart/mask", size=40, root=root)
    assert task.dense and task.classes == ("background", *dense.GROUPS) and task.train.images.shape[1:] == (3, 40, 40)
    for split in SPLITS:
        images, labels = getattr(task, split)
        for image, mine in zip(images, labels.numpy()):
            seen, grey = by_hand(image), (np.abs(image.numpy().astype(int) - 128) < 2).all(0)
            assert (mine[seen > 0] == seen[seen > 0]).all() and (mine[grey] == 0).all()
            assert (seen > 0).any() and grey.mean() > 0.1 and ((seen > 0) | grey).mean() > 0.6
            assert len(np.unique(mine[mine > 0])) == 1


def test_what_has_no_mask_is_left_out_and_a_drawing_has_one_split(root):
    found = dense.find_groups(root)
    assert len(found.files) == 14 * 10 + 3
    task = vp.task("openclipart/mask", size=40, root=root)
    assert sum(len(getattr(task, s)) for s in SPLITS) == 14 * 10 * dense.MADE and len(task.test) // dense.MADE - 3 <= task.test_sources <= len(task.test) // dense.MADE
    shares = {f.stem: dense.covered(dense.cut_out(f)) for f in found.files}
    assert shares["photograph"] == 1 and shares["thread"] < 0.05 and shares["nothing"] == 0
    assert 0.7 < shares["0"] < 0.85  # pi / 4 of its frame


def test_copies_of_a_drawing_share_a_split(root, monkeypatch):
    place = root / "openclipart/png"
    for i in range(10):  # each bird twice, as a mammal
        for folder in ("animals/mammals",):
            Image.open(place / f"animals/birds/{i}.png").save(place / folder / f"{i}.png")
    drawings = []
    monkeypatch.setattr(dense, "on_grounds", lambda made, size, seed, whole=dense.on_grounds: drawings.append(made) or whole(made, size, seed))
    vp.task("openclipart/mask", size=40, root=root)
    seen = [{d.tobytes() for d in made} for made in drawings]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    assert sum(map(len, seen)) == 13 * 10


def test_a_drawing_is_where_it_was_put():
    "One opaque square, drawn half as large as a picture to as large: one square of one colour."
    square = Image.new("RGBA", (20, 20), (10, 200, 30, 255))
    images, inside = dense.on_grounds([square] * 40, 24, seed=3)
    again, _ = dense.on_grounds([square] * 40, 24, seed=3)
    assert torch.equal(images, again) and images.dtype == torch.uint8
    sides = []
    for image, mask in zip(images, inside):
        assert torch.equal((image == torch.tensor([10, 200, 30])[:, None, None]).all(0), mask)
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all() and len(rows) == len(columns)
        sides.append(len(rows))
    assert 12 <= min(sides) < 15 and 21 < max(sides) <= 24 and len({tuple(m.nonzero()[0].tolist()) for m in inside}) > 20


def test_half_transparent_pixels_are_mixed():
    ghost = Image.new("RGBA", (20, 20), (255, 255, 255, 102))  # 40%
    images, inside = dense.on_grounds([ghost] * 8, 20, seed=0)
    bare, _ = dense.on_grounds([Image.new("RGBA", (20, 20))] * 8, 20, seed=0)
    assert not inside.any() and not torch.equal(images, bare)
    lighter = images.double() - (0.4 * 255 + 0.6 * bare.double())
    touched = (images != bare).any(1, keepdim=True).expand_as(images)
    assert lighter[touched].abs().max() <= 1.1


def test_shapes_are_labelled_by_the_family_that_drew_them(monkeypatch):
    "Each split holds shapes of its own, and each pixel of a shape is of its family."
    drawn, own = [], FormulaImages.draw
    monkeypatch.setattr(FormulaImages, "draw", lambda self, shape, g: drawn.append(own(self, shape, g)) or drawn[-1])
    classes, splits, sources = dense.shapes(16)
    assert classes == ("background", "contour", "stroke", "fractal") and sources == 57
    images = torch.cat([images for images, _ in splits.values()])
    labels = torch.cat([labels for _, labels in splits.values()])
    mask, shape = (torch.cat([getattr(b, name) for b in drawn]) for name in ("mask", "shape"))
    assert images.shape == (2016, 3, 16, 16) and torch.equal(labels > 0, mask > 0.5)
    for family, low in (("contour", 0), ("stroke", 96), ("fractal", 192)):
        rows = (shape >= low) & (shape < low + 96)
        assert set(labels[rows].unique().tolist()) == {0, classes.index(family)}
    each = [set(s.tolist()) for s in shape.split([len(split[1]) for split in splits.values()])]
    assert [len(s) for s in each] == [174, 57, 57] and len(set.union(*each)) == 288


def test_shapes_are_none_of_the_pretraining():
    ours, theirs = dense.ground(16).families, FormulaImages(FormulaConfig(size=16)).families
    assert not torch.isclose(ours["contour"].amplitude.float(), theirs["contour"].amplitude).any(1).all()
    assert dense.ground(16).config.seed != FormulaConfig().seed


def test_the_suite_and_what_is_wrong(root, tmp_path):
    assert SUITES["dense"] == ("shapes/mask", "openclipart/mask")
    made = vp.tasks("dense", size=16, root=root)
    assert [t.name for t in made] == [*SUITES["dense"]] and all(t.dense for t in made)
    assert all(getattr(t, s).labels.shape[1:] == (16, 16) for t in made for s in SPLITS)
    assert vp.task("shapes/mask").test.labels.shape[1:] == (32, 32)  # by default
    with pytest.raises(ValueError, match="unknown task 'shapes/masks'.*nearest known: .'shapes/mask'"):
        vp.task("shapes/masks")
    with pytest.raises(TypeError, match=r"task 'shapes/mask' takes no .'augment'.: expected some of .'root'"):
        vp.task("shapes/mask", augment=True)
    with pytest.raises(FileNotFoundError, match="openclipart: no drawings in .*to get it: apt-get install openclipart-png"):
        vp.task("openclipart/mask", size=16, root=tmp_path / "elsewhere")


def test_another_package_is_another_task(root):
    before = vp.task("openclipart/mask", size=16, root=root)
    disc(root / "openclipart/png/tools/new.png", COLOURS["tool"], 1234)
    after = vp.task("openclipart/mask", size=16, root=root)
    assert sum(len(getattr(after, s)) - len(getattr(before, s)) for s in SPLITS) == dense.MADE


def test_runs_of_a_dense_task_have_its_version():
    grid = vp.Grid(SUITES["dense"], models=("formula-vit",), selections=("MHA",), lrs=(0.1,), seeds=(0,))
    assert [r.identity()["images"] for r in grid.runs()] == [1, 1]


@pytest.mark.skipif(not real.Path("/usr/share/openclipart/png").is_dir(), reason="needs openclipart-png")
def test_the_installed_drawings():
    task = vp.task("openclipart/mask", size=32)
    assert [len(getattr(task, s)) for s in SPLITS] == [984, 338, 352] and task.test_sources == 157
    shares = torch.bincount(task.test.labels.flatten(), minlength=6) / task.test.labels.numel()
    assert 0.7 < shares[0] < 0.8 and (shares[1:] > 0.03).all()
