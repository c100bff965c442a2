"""Tables and data sets of other libraries: the same pictures in any form are the same task, and what is none is named."""
import os
from io import BytesIO

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_folders import fill, picture, sides
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset

import vitplast as vp
from vitplast.data import folder_contents
from vitplast.data.datasets import bytes_of
from vitplast.data.folders import find_pictures

SPLITS = ("train", "validation", "test")


class Pairs(Dataset):
    "Pictures and labels by number."

    def __init__(self, pictures, labels, **attributes):
        self.pictures, self.labels = pictures, labels
        self.__dict__.update(attributes)

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        return self.pictures[i], self.labels[i]


PICTURES = [picture(100 * c + i) for c in range(2) for i in range(10)]
LABELS = [c for c in range(2) for _ in range(10)]


def hugging(pictures, labels, names=("bird", "cat"), **more):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")}
    features |= {k: datasets.ClassLabel(names=list(names)) for k in more}
    return datasets.Dataset.from_dict({"image": pictures, "label": labels} | more, features=datasets.Features(features))


def alike(a, b):
    "Whether two tasks hold the same pictures and labels in each split."
    return sides(a) == sides(b) and all(getattr(a, s).labels.tolist() == getattr(b, s).labels.tolist() for s in SPLITS)


def table(path, rows, columns=("file", "label"), **how):
    pd.DataFrame(rows, columns=list(columns)).to_csv(path, index=False, **how)
    return path


@pytest.fixture
def folder(tmp_path):
    "Ten birds and ten cats, which are also PICTURES."
    return fill(tmp_path / "photos")


def test_a_folder_a_table_and_data_sets_of_the_same_pictures_are_alike(folder, tmp_path):
    expected = vp.task(folder, size=16)
    files = find_pictures(folder)
    rows = [(os.path.relpath(f, tmp_path), files.classes[c]) for f, c in zip(files.files, files.labels)]
    order = [PICTURES[int(f.stem.split("-")[1]) + 10 * c] for f, c in zip(files.files, files.labels)]
    labels = files.labels.tolist()
    given = [
        table(tmp_path / "mine.csv", rows),
        str(table(tmp_path / "mine.tsv", rows, ("Path ", "CLASS"), sep="\t", encoding="utf-8-sig")),
        Pairs(order, labels, classes=["bird", "cat"]),
        Pairs([np.array(p) for p in order], [files.classes[c] for c in labels]),
        Pairs([torch.from_numpy(np.array(p)).movedim(2, 0) for p in order], torch.tensor(labels), classes=("bird", "cat")),
        Subset(Pairs(order + PICTURES, labels + LABELS, classes=["bird", "cat"]), range(20)),
        hugging(order, labels),
    ]
    for one in given:
        task = vp.task(one, size=16)
        assert task.classes == ("bird", "cat") and alike(task, expected), one


@pytest.mark.parametrize("kind", ["table", "torch", "hugging face", "hugging face, by split"])
def test_splits_stay_as_they_were_given(kind, tmp_path):
    fill(tmp_path)
    train, test = [i for i in range(20) if i % 10 < 7], [i for i in range(20) if i % 10 >= 7]
    if kind == "table":
        rows = [(f"{('bird', 'cat')[i // 10]}/0-{i % 10}.png", ("bird", "cat")[i // 10], ("Train", "TEST")[i in test]) for i in range(20)]
        given = table(tmp_path / "mine.csv", rows, ("file", "label", "split"))
    else:
        parts = {name: ([PICTURES[i] for i in rows], [LABELS[i] for i in rows]) for name, rows in (("train", train), ("test", test))}
        make = (lambda p: Pairs(*p, classes=("bird", "cat"))) if kind == "torch" else (lambda p: hugging(*p))
        given = {name: make(part) for name, part in parts.items()}
        given = datasets.DatasetDict(given) if "by split" in kind else given
    task = vp.task(given, size=16)
    expected = {np.array(PICTURES[i].resize((16, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1).tobytes() for i in test}
    assert sides(task)[2] == expected and len(task.train) + len(task.validation) == 14 and not sides(task)[0] & sides(task)[1]
    again = vp.task(given, size=16, augment=True)
    assert again.augment is not None and sides(again)[2] == expected and again.batch(torch.arange(4), torch.Generator())[0].shape == (4, 3, 16, 16)


def test_classes_keep_the_order_of_the_data_set(tmp_path):
    assert vp.task(Pairs(PICTURES, LABELS, classes=["zebra", "ant"]), size=8).classes == ("zebra", "ant")
    assert vp.task(Pairs(PICTURES, [9 + c for c in LABELS]), size=8).classes == ("9", "10")
    task = vp.task(hugging(PICTURES, LABELS, fine=LABELS[::-1]), size=8, label="fine")
    assert task.classes == ("bird", "cat")


def test_the_cache_knows_a_data_set_by_its_pictures_and_labels(tmp_path, monkeypatch):
    monkeypatch.setenv("VITPLAST_CACHE", str(tmp_path))
    vp.task(Pairs(PICTURES, LABELS), size=8)
    vp.task(Pairs(list(PICTURES), list(LABELS)), size=8)
    assert len(list(tmp_path.glob("Pairs-*"))) == 1
    vp.task(Pairs([*PICTURES[:-1], picture(999)], LABELS), size=8)
    vp.task(Pairs(PICTURES, LABELS[::-1]), size=8)
    assert len(list(tmp_path.glob("Pairs-*"))) == 3


def test_two_halves_may_change_places():
    half = [i for i in range(20) if i % 2], [i for i in range(20) if not i % 2]
    a, b = (Pairs([PICTURES[i] for i in rows], [LABELS[i] for i in rows]) for rows in half)
    one, other = vp.task({"train": a, "test": b}, size=48), vp.task({"test": a, "train": b}, size=48)
    assert not sides(one)[2] & sides(other)[2] and vp.task(a, size=48, name="mine").name == "mine"


def test_pictures_that_decode_otherwise_are_others():
    deep = [Image.fromarray(np.full((9, 9), v, np.uint16)) for v in (300, 40000)]
    flat = picture(3).resize((9, 6))
    turned = Image.Exif()
    turned[0x0112] = 6
    def saved(**how):
        flat.save(file := BytesIO(), "PNG", **how)
        return Image.open(BytesIO(file.getvalue()))
    assert len({bytes_of(p) for p in (*deep, saved(), saved(exif=turned), saved(transparency=(255, 255, 255)))}) == 5


def test_classes_of_parts_of_parts(tmp_path):
    whole = Pairs(PICTURES, LABELS, classes=["zebra", "ant"])
    nested = Subset(Subset(whole, range(20)), range(20))
    assert vp.task(nested, size=8).classes == vp.task(ConcatDataset([nested, whole]), size=8).classes == ("zebra", "ant")


def test_a_table_is_known_by_its_text_and_its_pictures(folder, tmp_path):
    rows = [(f"photos/{c}/0-{i}.png", c) for c in ("bird", "cat") for i in range(10)]
    file, seen = tmp_path / "mine.csv", set()

    def contents():
        folder_contents.cache_clear()
        return folder_contents(table(file, rows))

    seen |= {contents(), contents()}
    assert len(seen) == 1
    rows[0] = (rows[0][0], "cat")
    seen.add(contents())
    picture(77).save(tmp_path / rows[3][0])
    seen.add(contents())
    assert len(seen) == 3


def test_a_grid_and_the_command_line_take_tables(folder, tmp_path):
    file = table(tmp_path / "mine.csv", [(f"photos/{c}/0-{i}.png", c) for c in ("bird", "cat") for i in range(10)])
    config = vp.FinetuneConfig(steps=2, eval_every=2, batch_size=4)
    grid = vp.Grid((str(file),), models=("formula-vit-tiny",), selections=("LN1",), lrs=(0.1,), seeds=(0,), config=config)
    frame = vp.sweep(grid, tmp_path / "store", executor="serial", progress=False)
    alone = vp.finetune(vp.load("formula-vit-tiny"), file, "LN1", grid.runs()[0].config)
    assert frame.test_accuracy.tolist() == [alone.test_accuracy] and grid.runs()[0].identity()["task"] == "mine.csv"


WRONG_TABLES = [
    ("file,label\n", "0 classes to train on, expected at least 2"),
    ("", r"0 columns of files in .., expected one, as in file,label,split"),
    ("file,lable\na.png,x\n", r"0 columns of labels in .'file', 'lable'., expected one"),
    ("file,path,label\na,b,c\n", r"2 columns of files in"),
    ("file,label\nphotos/bird/0-0.png,bird\nphotos/none.png,cat\n", "1 of 2 files do not exist, first .*none.png"),
    ("file,label\nphotos/bird/0-0.png,bird\nphotos/bird/0-1.png,\n", "no label in line 3"),
    ("file,label\nphotos/bird/0-0.png,bird\nphotos/bird/0-0.png,cat\n", r"0-0.png has the labels .'bird', 'cat'."),
    ("file,label\nphotos/bird/0-0.png,bird\n", "1 classes to train on"),
    ("file,label,split\nphotos/bird/0-0.png,bird,train\nphotos/cat/0-0.png,cat,later\n", "split 'later', expected one of .'train'"),
    ("file,label,split\nphotos/bird/0-0.png,a,train\nphotos/cat/0-0.png,b,train\nphotos/cat/0-1.png,c,test\n", "class 'c' is not among the training classes"),
    ("file,label\nphotos/bird/0-0.png,a\nphotos/cat/0-0.png,b\n", "class 'a' has 1 image: expected at least 3"),
    ("file,label\nphotos/bird/0-0.png,bird,\n", "line 2 has 3 columns, expected 2: file, label"),
    ("file,label,label\na,b,c\n", "2 columns of labels in"),
    ("file,label\n\n\nphotos/bird/0-0.png,\n", "no label in line 4"),
    (b"file,label\n\xff\xfe,x\n", "not a table in UTF-8"),
]  # fmt: skip


@pytest.mark.parametrize("text, message", WRONG_TABLES)
def test_what_is_no_table_is_named(folder, tmp_path, text, message):
    file = tmp_path / "mine.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((ValueError, FileNotFoundError), match=f"mine.csv: .*{message}|{message}"):
        vp.task(file, size=8)


class Noise(Pairs):
    def __getitem__(self, i):
        return picture(int(torch.randint(10**6, ()))), self.labels[i]


class Endless(IterableDataset):
    def __iter__(self):
        yield from ()


@pytest.mark.parametrize("given, options, error, message", [
    (Pairs([torch.rand(3, 8, 8)] * 6, [0, 1] * 3), {}, TypeError, r"picture 0 of the data set: a float32 Tensor .3, 8, 8., expected a Pillow image or bytes: give the data set without its transform"),
    (Pairs([np.zeros((8, 8, 4), np.uint8)] * 6, [0, 1] * 3), {}, TypeError, r"a ndarray .8, 8, 4., expected .height, width, 3."),
    (Pairs(["cat.png"] * 6, [0, 1] * 3), {}, TypeError, "a  str .., expected a Pillow image"),
    (Pairs(PICTURES, [-1, *LABELS[1:]]), {}, ValueError, "picture 0 of the data set: label -1, expected the number or name of a class"),
    (Pairs(PICTURES, [*LABELS[1:], None]), {}, ValueError, "picture 19 of the data set: label None"),
    (Pairs(PICTURES, [0.5] * 20), {}, ValueError, "label 0.5"),
    (Pairs(PICTURES, [*LABELS[1:], 7], classes=("a", "b")), {}, ValueError, "picture 19 of the data set: label 7, expected 0 to 1"),
    (Pairs(PICTURES, [0] * 20), {}, ValueError, "1 classes to train on"),
    (Pairs([], []), {}, ValueError, "holds nothing"),
    (Noise(PICTURES, LABELS), {}, ValueError, "its pictures are others each time, expected a data set without random transforms"),
    (Endless(), {}, TypeError, "is a Endless: expected a name, a folder, a table, or a data set with a length"),
    ({"train": Pairs(PICTURES, LABELS), "later": Pairs(PICTURES, LABELS)}, {}, ValueError, "split 'later': expected some of"),
    (hugging(PICTURES, LABELS, fine=LABELS), {}, ValueError, "more than one column of labels in .'image', 'label', 'fine'.: expected its name, label=..."),
    (hugging(PICTURES, LABELS), {"label": "klass"}, ValueError, "no column of labels in .'image', 'label'.: expected its name, label=...; nearest: 'label'"),
    (hugging(PICTURES, LABELS), {"max_pixels": 9}, TypeError, "takes no .'max_pixels'.: expected some of"),
    (pd.DataFrame({"image": [1], "label": [2]}), {}, TypeError, "is a DataFrame: expected a name, a folder, a table"),
    ({"train": {"a": Pairs(PICTURES, LABELS)}}, {}, TypeError, "is a dict: expected a name"),
    (Pairs([np.zeros((0, 0, 3), np.uint8)] * 6, [0, 1] * 3), {}, TypeError, r"a ndarray .0, 0, 3., expected .height, width, 3."),
    (Pairs([None] * 6, [0, 1] * 3), {}, TypeError, "a  NoneType .., expected a Pillow image"),
    (Pairs(PICTURES, LABELS[:5]), {}, ValueError, "picture 19 of the data set: cannot be read .IndexError"),
    (Pairs(PICTURES, LABELS), {"crop": 1.5}, ValueError, "crop=1.5: expected a share of the short side, above 0 and up to 1"),
    (Pairs(PICTURES, LABELS), {"crop": "x"}, ValueError, "crop='x': expected a share"),
    ([(PICTURES[0], 0)], {}, TypeError, "is a list: expected a name"),
])  # fmt: skip
def test_what_is_no_data_set_is_named(given, options, error, message):
    with pytest.raises(error, match=message):
        vp.task(given, size=8, **options)


def test_a_data_set_is_cropped_as_the_model_was(folder):
    model = vp.load("formula-vit-tiny")
    model.pretrained_cfg = model.pretrained_cfg | {"crop_pct": 0.5}
    from vitplast.data import task_for

    whole, cropped = vp.task(folder, size=32), vp.task(folder, size=32, crop=0.5)
    for given in (folder, Pairs(PICTURES, LABELS, classes=("bird", "cat"))):
        assert sides(task_for(model, given))[2] == sides(cropped)[2] != sides(whole)[2]
