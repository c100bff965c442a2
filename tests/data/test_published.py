"""The published suite, read from tiny files of exactly the published formats, and what is wrong with files named."""
import hashlib
import pickle
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

import vitplast as vp
from vitplast.data import published
from vitplast.data import PAPER
from vitplast.data.measuring import pair_source


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("VITPLAST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def shades(labels, size=32, channels=3):
    "Images whose brightness is their label: what was read can be compared with what was written."
    return np.stack([np.full((size, size, channels), 2 * y, np.uint8) for y in labels])


def brightness_is_label(task):
    return all(torch.equal((s.images.float().mean((1, 2, 3)) / 2).round().long(), s.labels) for s in (task.train, task.validation, task.test))


def write_cifar(root, monkeypatch, kind, n_classes, key, per_class=5):
    "The Python version of CIFAR: pickled dictionaries of rows, red then green then blue, and a file of names."
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    lists = {"train_list": [], "test_list": []}
    for part, names in (("train_list", [n for n, _ in kind.train_list]), ("test_list", [n for n, _ in kind.test_list])):
        for name in names:
            labels = list(range(n_classes)) * per_class
            rows = shades(labels).transpose(0, 3, 1, 2).reshape(len(labels), -1)
            (folder / name).write_bytes(pickle.dumps({"data": rows, key: labels}))
            lists[part].append([name, md5(folder / name)])
    meta = dict(kind.meta)
    (folder / meta["filename"]).write_bytes(pickle.dumps({meta["key"]: [f"class {i}" for i in range(n_classes)]}))
    monkeypatch.setattr(kind, "meta", meta | {"md5": md5(folder / meta["filename"])})
    for part, value in lists.items():
        monkeypatch.setattr(kind, part, value)
    return folder


@pytest.mark.parametrize("name, kind, n_classes, key", [
    ("cifar10", datasets.CIFAR10, 10, "labels"), ("cifar100", datasets.CIFAR100, 100, "fine_labels"),
])  # fmt: skip
def test_cifar(root, monkeypatch, name, kind, n_classes, key):
    write_cifar(root, monkeypatch, kind, n_classes, key)
    task = vp.task(name, size=48, root=root, progress=False)
    n_train = {"cifar10": 5, "cifar100": 1}[name] * 5 * n_classes  # files, images of a class in each
    assert task.n_classes == n_classes and len(task.test) == 5 * n_classes
    assert len(task.train) == n_train * 4 // 5 and len(task.validation) == n_train // 5
    assert task.train.images.shape[1:] == (3, 32, 32) and task.test.images.shape[1:] == (3, 48, 48)
    assert brightness_is_label(task) and task.classes[3] == "class 3"
    images, _ = task.batch(torch.arange(8), torch.Generator().manual_seed(0))
    assert images.shape == (8, 3, 48, 48) and images.dtype == torch.uint8


def test_a_changed_cifar_file_is_never_unpickled(root, monkeypatch):
    folder = write_cifar(root, monkeypatch, datasets.CIFAR10, 10, "labels")

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("code from a data file ran",))

    (folder / "data_batch_2").write_bytes(pickle.dumps({"data": Bomb(), "labels": []}))
    with pytest.raises(FileNotFoundError, match=r"cifar-10-batches-py is incomplete or damaged .*vp.task\(\"cifar10\", root=.*download=True\)"):
        vp.task("cifar10", root=root)


def write_cifar10_c(root, per_severity=40):
    folder = root / "CIFAR-10-C"
    folder.mkdir(parents=True, exist_ok=True)
    labels = np.tile(np.arange(10), per_severity // 10)
    for corruption in ("contrast", "gaussian_noise", "motion_blur", "snow", "speckle_noise"):
        np.save(folder / f"{corruption}.npy", np.concatenate([shades(labels) + 40 * s for s in range(5)]))
    np.save(folder / "labels.npy", np.tile(labels, 5))
    return folder


@pytest.mark.parametrize("severity", [1, 5])
def test_cifar10_c_reads_its_severity(root, severity):
    write_cifar10_c(root, 100)
    task = vp.task(f"cifar10_c/speckle_noise@{severity}", size=32, root=root, progress=False)
    assert [len(s) for s in (task.train, task.validation, task.test)] == [60, 20, 20]  # 64, 16 and 20% of ten a class
    for split in (task.train, task.validation, task.test):
        assert torch.equal((split.images.float().mean((1, 2, 3)) - 40 * (severity - 1)) / 2, split.labels.float())
    assert task.classes[0] == "airplane" and task.name == f"cifar10_c/speckle_noise@{severity}"


def flowers_folder(root, monkeypatch, per_split=2):
    "Flowers102: numbered JPEGs, labels from 1 in imagelabels.mat, image numbers of the splits in setid.mat."
    folder = root / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    labels = np.tile(np.arange(102), 3 * per_split)
    for i, y in enumerate(labels, 1):
        Image.fromarray(shades([y], 40)[0][:30]).save(folder / "jpg" / f"image_{i:05d}.jpg", quality=95)
    savemat(folder / "imagelabels.mat", {"labels": labels[None] + 1})
    ids = np.split(np.arange(1, len(labels) + 1), 3)
    savemat(folder / "setid.mat", dict(zip(("trnid", "valid", "tstid"), (i[None] for i in ids))))
    table = {k: (name, md5(folder / name) if k != "image" else value) for k, (name, value) in datasets.Flowers102._file_dict.items()}
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", table)
    return folder


def test_flowers102_keeps_its_own_splits(root, monkeypatch):
    flowers_folder(root, monkeypatch)
    task = vp.task("flowers102", size=32, root=root, workers=0, progress=False)
    assert [len(s) for s in (task.train, task.validation, task.test)] == [204, 204, 204] and task.n_classes == 102
    assert brightness_is_label(task) and task.train.images.shape[1:] == (3, 37, 37)  # 32 / 0.875
    assert torch.allclose(task.augment.aspects, torch.tensor(40 / 30))


def pet_folder(root, per_class=5):
    "Oxford-IIIT Pet: images named by breed and number; lists of name, class from 1, species, breed."
    folder = root / "oxford-iiit-pet"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for part in ("trainval", "test"):
        lines = []
        for y in range(37):
            for i in range(per_class):
                name = f"Breed_{y:02}_{part}_{i}"
                Image.fromarray(shades([y], 20)[0]).save(folder / "images" / f"{name}.jpg", quality=95)
                lines.append(f"{name} {y + 1} 1 1")
        (folder / "annotations" / f"{part}.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_pet(root):
    pet_folder(root)
    task = vp.task("pet", size=16, root=root, workers=0, progress=False)
    assert [len(s) for s in (task.train, task.validation, task.test)] == [148, 37, 185] and task.n_classes == 37
    assert brightness_is_label(task)


def domainnet_folder(root, domain="clipart", n_classes=4, per_class=10, lists=True):
    base = root / "domainnet"
    lines = {"train": [], "test": []}
    for y in range(n_classes):
        (base / domain / f"class_{y}").mkdir(parents=True)
        for i in range(per_class):
            name = f"{domain}/class_{y}/{domain}_{y:03}_{i:06}.jpg"
            Image.fromarray(shades([y], 20)[0]).save(base / name, quality=95)
            lines["test" if i < 3 else "train"].append(f"{name} {y}")
    for part in lines if lists else ():
        (base / f"{domain}_{part}.txt").write_text("\n".join(lines[part]) + "\n")
    return base


@pytest.mark.parametrize("lists, sizes", [(True, [24, 4, 12]), (False, [24, 8, 8])])
def test_domainnet_with_and_without_its_lists(root, lists, sizes):
    domainnet_folder(root, "sketch", lists=lists)
    task = vp.task("domainnet/sketch", size=16, root=root, workers=0, progress=False)
    assert [len(s) for s in (task.train, task.validation, task.test)] == sizes and task.classes == tuple(f"class_{i}" for i in range(4))
    assert brightness_is_label(task)


@pytest.mark.parametrize("spoil, message", [
    (lambda base: (base / "clipart/class_2/clipart_002_000004.jpg").unlink(), r"1 of 40 listed images are missing, first .*clipart/class_2/clipart_002_000004.jpg"),
    (lambda base: (base / "clipart_test.txt").write_text("clipart/class_0/clipart_000_000000.jpg\n"), "clipart_test.txt, line 1: .*expected a path and a label"),
    (lambda base: (base / "clipart_test.txt").write_text("clipart/class_0/clipart_000_000000.jpg 2\n"), "the lists give label 0 for 'class_0' and 2 for 'class_0'; expected one label for each class"),
    (lambda base: (base / "clipart/class_1/clipart_001_000005.jpg").write_bytes(b"\xff\xd8\xff"), "1 of 24 images cannot be read: .*clipart_001_000005.jpg"),
])  # fmt: skip
def test_a_spoilt_domainnet(root, spoil, message):
    spoil(domainnet_folder(root))
    with pytest.raises(ValueError, match=message):
        vp.task("domainnet/clipart", size=16, root=root, workers=0, progress=False)
    assert not list((root.parent / "cache").glob("*"))  # no half task


def test_skipped_images_are_another_task(root):
    base = domainnet_folder(root)
    (base / "clipart/class_1/clipart_001_000005.jpg").write_bytes(b"")
    with pytest.warns(UserWarning, match="1 of 24 images"):
        task = vp.task("domainnet/clipart", size=16, root=root, workers=0, skip_corrupt=True, progress=False)
    assert len(task.train) == len(task.augment.aspects) == 23 and brightness_is_label(task)


def test_domainnet_classes_are_numbered_by_its_lists(root):
    """The authors sort without regard to case: tent 307, The_Eiffel_Tower 308. Sorted by bytes, capitals come first."""
    base = domainnet_folder(root, n_classes=3)
    renamed = dict(zip(("class_0", "class_1", "class_2"), ("aircraft_carrier", "tent", "The_Eiffel_Tower")))
    for old, new in renamed.items():
        (base / "clipart" / old).rename(base / "clipart" / new)
        for part in ("train", "test"):
            path = base / f"clipart_{part}.txt"
            path.write_text(path.read_text().replace(old, new))
    how = dict(size=16, root=root, workers=0, progress=False)
    listed = vp.task("domainnet/clipart", **how)
    assert listed.classes == tuple(renamed.values()) and brightness_is_label(listed)
    for part in ("train", "test"):
        (base / f"clipart_{part}.txt").unlink()
    assert vp.task("domainnet/clipart", **how).classes == listed.classes


def test_flowers_unpacked_in_part(root, monkeypatch):
    folder = flowers_folder(root, monkeypatch)
    for i in (7, 8):
        (folder / "jpg" / f"image_{i:05d}.jpg").unlink()
    with pytest.raises(ValueError, match=r"flowers102: .* incomplete or damaged \(2 of 612 listed images are missing, first .*image_00007.jpg"):
        vp.task("flowers102", size=32, root=root)


def test_a_damaged_folder_is_repaired_by_a_download(root, archive):
    folder = write_cifar10_c(root)
    (folder / "snow.npy").write_bytes((folder / "snow.npy").read_bytes()[:5000])
    (folder / "my_fog.npy").write_bytes(b"mine")
    assert len(vp.task("cifar10_c/snow@5", size=32, root=root, download=True, progress=False).test) == 10
    assert (folder / "my_fog.npy").read_bytes() == b"mine"


def test_a_class_that_skipping_empties_is_named(root):
    base = domainnet_folder(root)
    for file in (base / "clipart" / "class_2").iterdir():
        file.write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no image of class 'class_2' is left in train"):
        vp.task("domainnet/clipart", size=16, root=root, workers=0, skip_corrupt=True, progress=False)


def change_labels(folder):
    np.save(folder / "labels.npy", np.roll(np.load(folder / "labels.npy"), 1))


def change_pixels(folder):
    images = np.load(folder / "snow.npy")
    images[161, 3, 4, 0] ^= 1
    np.save(folder / "snow.npy", images)


@pytest.mark.parametrize("change", [change_labels, change_pixels])
def test_changed_arrays_are_another_task(root, change):
    folder = write_cifar10_c(root)
    before = vp.task("cifar10_c/snow@5", size=32, root=root, progress=False)
    change(folder)
    after = vp.task("cifar10_c/snow@5", size=32, root=root, progress=False)
    assert not (torch.equal(before.train.images, after.train.images) and torch.equal(before.test.labels, after.test.labels) and torch.equal(before.train.labels, after.train.labels))


def test_a_changed_list_and_a_changed_place_are_other_tasks(root, monkeypatch):
    base = domainnet_folder(root)
    how = dict(size=16, workers=0, progress=False)
    monkeypatch.chdir(root.parent)
    assert len(vp.task("domainnet/clipart", root="data", **how).test) == 12
    train, test = base / "clipart_train.txt", base / "clipart_test.txt"
    lines = train.read_text().splitlines()
    train.write_text("\n".join(lines[:-2]))
    test.write_text(test.read_text() + "\n".join(lines[-2:]))
    assert len(vp.task("domainnet/clipart", root="data", **how).test) == 14
    elsewhere = root.parent / "elsewhere"
    other = domainnet_folder(elsewhere / "data")
    for file in other.glob("clipart/*/*.jpg"):
        Image.new("RGB", (20, 20), (200, 200, 200)).save(file)
    monkeypatch.chdir(elsewhere)
    assert vp.task("domainnet/clipart", root="data", **how).test.images.min() > 150


def test_the_linear_probe_sees_training_images_as_it_sees_the_others(root):
    domainnet_folder(root, n_classes=2, per_class=20)
    task = vp.task("domainnet/clipart", size=32, root=root, workers=0, progress=False)
    assert task.train.images.shape[-1] == 37 and task.still(torch.arange(3)).shape == (3, 3, 32, 32)
    assert vp.linear_probe(vp.load("formula-vit"), task) == 1.0  # two flat greys


def test_more_detail_is_kept_on_request(root):
    domainnet_folder(root)
    task = vp.task("domainnet/clipart", size=16, root=root, stored=64, workers=0, progress=False)
    assert task.train.images.shape[-1] == 64 and task.batch(torch.arange(2), torch.Generator())[0].shape[-1] == 16


@pytest.mark.parametrize("spoil, message", [
    (lambda f: (f / "snow.npy").write_bytes(b""), "snow.npy: not a complete .npy file"),
    (lambda f: np.save(f / "labels.npy", np.array(3)), "1 labels and 200 images"),
    (lambda f: np.save(f / "labels.npy", np.full(200, 11)), r"labels \[11\]: expected 0 to 9"),
    (lambda f: np.save(f / "labels.npy", np.zeros(7)), "7 labels and 200 images of snow, expected five times"),
    (lambda f: (f / "snow.npy").write_bytes((f / "snow.npy").read_bytes()[:5000]), "snow.npy: not a complete .npy file"),
    (lambda f: np.save(f / "snow.npy", np.zeros((200, 32, 32))), r"snow.npy: float64 \(200, 32, 32\), expected bytes"),
    (lambda f: np.save(f / "snow.npy", np.array([{}] * 200), allow_pickle=True), "snow.npy: not a complete .npy file"),
])  # fmt: skip
def test_spoilt_arrays(root, spoil, message):
    spoil(write_cifar10_c(root))
    with pytest.raises(ValueError, match=message):
        vp.task("cifar10_c/snow@5", root=root, progress=False)


@pytest.mark.parametrize("name", PAPER)
def test_missing_files_are_named_with_the_way_to_get_them(root, name):
    with pytest.raises(FileNotFoundError, match="is not there. Get it " + ("from http" if name.startswith("domainnet") else "with vp.task")):
        vp.task(name, root=root)


@pytest.fixture
def archive(root, monkeypatch, tmp_path):
    "A tar of a small CIFAR-10-C behind a web server of this machine."
    write_cifar10_c(tmp_path / "unpacked")
    path = tmp_path / "served" / "CIFAR-10-C.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        tar.add(tmp_path / "unpacked" / "CIFAR-10-C", "CIFAR-10-C")
    handler = partial(SimpleHTTPRequestHandler, directory=path.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(published, "CIFAR10_C", (f"http://127.0.0.1:{server.server_port}/{path.name}", md5(path)))
        yield path
        server.shutdown()


def names_below(root):
    return sorted(p.name for p in root.iterdir())


def test_a_download_is_verified_unpacked_and_moved(root, archive):
    task = vp.task("cifar10_c/snow@5", size=32, root=root, download=True, progress=False)
    assert names_below(root) == ["CIFAR-10-C"] and task.n_classes == 10
    archive.unlink()  # what is there is not downloaded again
    assert len(vp.task("cifar10_c/contrast@5", size=32, root=root, download=True, progress=False).test) == len(task.test)


@pytest.mark.parametrize("spoil", [
    lambda path: path.write_bytes(path.read_bytes()[:-3000]),  # the connection broke
    lambda path: path.write_bytes(b"<html>503</html>"),
    lambda path: path.unlink(),
])  # fmt: skip
def test_a_bad_download_leaves_nothing_behind(root, archive, spoil):
    spoil(archive)
    with pytest.raises(FileNotFoundError, match="cifar10_c/snow@5 could not be downloaded"):
        vp.task("cifar10_c/snow@5", root=root, download=True)
    assert names_below(root) == []


def test_a_root_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="pet could not be downloaded to .*file"):
        published.fetch(tmp_path / "file" / "below", "pet", None)


def test_an_interrupted_download_leaves_nothing_behind(root, monkeypatch):
    def broken(url, folder, md5):
        (folder / "CIFAR-10-C").mkdir()
        (folder / "CIFAR-10-C" / "snow.npy").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(published, "download_and_extract_archive", broken)
    with pytest.raises(KeyboardInterrupt):
        vp.task("cifar10_c/snow@5", root=root, download=True)
    assert names_below(root) == []


def test_a_changed_folder_is_decoded_again(root):
    base = domainnet_folder(root, lists=False)
    how = dict(size=16, root=root, workers=0, progress=False)
    before = len(vp.task("domainnet/clipart", **how).train)
    for i in range(10, 20):
        Image.fromarray(shades([0], 20)[0]).save(base / "clipart" / "class_0" / f"{i}.jpg")
    assert len(vp.task("domainnet/clipart", **how).train) > before


def test_pair_source_samples_all_classes(tmp_path):
    for y in range(20):
        (tmp_path / f"n{y:08}").mkdir()
        for i in range(10):
            Image.fromarray(shades([y], 20)[0]).save(tmp_path / f"n{y:08}" / f"{i}.JPEG", quality=95)
    images = pair_source(tmp_path, 100, size=16)
    seen = (images.float().mean((1, 2, 3)) / 2).round().long()
    assert images.shape == (100, 3, 16, 16) and images.dtype == torch.uint8 and len(seen.unique()) > 15
    assert torch.equal(images, pair_source(tmp_path, 100, size=16)) and not torch.equal(images, pair_source(tmp_path, 100, size=16, seed=1))
    with pytest.raises(ValueError, match="200 images below it, expected at least 201"):
        pair_source(tmp_path, 201)


def test_a_paper_task_can_be_finetuned(root):
    domainnet_folder(root, n_classes=2, per_class=20)
    task = vp.task("domainnet/clipart", size=32, root=root, workers=0, progress=False)
    run = vp.finetune(vp.load("formula-vit"), task, ["LN1"], vp.FinetuneConfig(steps=4, batch_size=8, eval_every=2))
    assert len(run.history) == 4 and 0 <= run.test_accuracy <= 1
