"""The offline suite: nothing leaks, nothing depends on the machine, every label can be seen in its image."""
import hashlib
import os
import subprocess
import sys
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

import vitplast as vp
from vitplast.data import offline
from vitplast.data import FormulaConfig, FormulaImages, OFFLINE, corrupt
from vitplast.data.offline import (
    CHARACTERS, COPIES, TASK_SEED, breed_contours, glyphs, ground, photo, render,
    warp,
)
from vitplast.data.reading import SPLITS, split_indices


@pytest.mark.parametrize("name", OFFLINE)
def test_every_task_of_the_suite(name):
    task = vp.task(name)
    assert task.name == name
    splits = [getattr(task, s) for s in SPLITS]
    for split in splits:
        assert split.images.dtype == torch.uint8 and split.images.shape[1:] == (3, 32, 32) and len(split.images) == len(split)
        assert split.labels.unique().tolist() == list(range(task.n_classes))  # no class is missing anywhere
        assert split.images.float().std() > 15
    hashes = [{hashlib.sha256(image.numpy()).digest() for image in s.images} for s in splits]
    assert not (hashes[0] & hashes[1] or hashes[0] & hashes[2] or hashes[1] & hashes[2])
    assert 0 < task.test_sources <= len(task.test)
    assert task.n_classes == {"glyphs": 100, "clipart": 100, "sketch": 100, "textures": 102, "breeds": 37}.get(name, 10)


def test_no_handwriting_crosses_the_digit_splits():
    data, task = load_digits(), vp.task("digits")
    parts = split_indices(data.target, range(10))
    assert sorted(np.concatenate(parts)) == list(range(1797))
    distinct = [len(np.unique(data.data[p], axis=0)) for p in parts]
    assert len(np.unique(data.data, axis=0)) == sum(distinct)  # also no copy of an image in another split
    for part, name, copies in zip(parts, SPLITS, COPIES):
        assert torch.equal(getattr(task, name).labels, torch.from_numpy(data.target[part]).repeat(copies))
        share = np.bincount(data.target[part]) / len(part)
        assert abs(share - np.bincount(data.target) / 1797).max() < 0.01
    assert task.test_sources == len(parts[2])


def test_corrupted_digits_are_the_corrupted_digits():
    clean, spoilt = vp.task("digits"), vp.task("digits_c/contrast@5")
    for name in SPLITS:
        assert torch.equal(getattr(spoilt, name).images, corrupt(getattr(clean, name).images, "contrast", 5))
        assert torch.equal(getattr(spoilt, name).labels, getattr(clean, name).labels)
    milder, within = vp.task("digits_c/contrast@1"), lambda t: t.test.images.float().flatten(2).std(2).mean()
    assert within(milder) / within(spoilt) == pytest.approx(0.75 / 0.15, rel=0.1)


def test_no_outline_crosses_the_glyph_splits():
    """A mask that covers nearly the same points as another of its character in another split would be a leak."""
    masks, character, cut, family = glyphs()
    role = np.array([0, 0, 1, 2])[(cut + family) % 4]
    for c in range(len(CHARACTERS)):
        rows = character == c
        m = masks[rows].flatten(1)
        shared = m @ m.T
        overlap = shared / (m.sum(1)[:, None] + m.sum(1) - shared)
        across = torch.from_numpy(role[rows][:, None] != role[rows])
        assert overlap[across].max() <= 0.95
        assert set(role[rows]) == {0, 1, 2}
    assert all(len(set(cut[role == r])) == 4 for r in range(3))
    assert len(masks) > 1450


@pytest.mark.parametrize("name, file", [("DejaVuSans", "DejaVuSans.ttf"), ("STIXGeneral", "STIXGeneral.ttf")])
def test_glyphs_are_those_that_pillow_draws(name, file):
    """Against another rasteriser, at eight times the size and averaged down."""
    masks, character, cut, family = glyphs()
    font = ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", file), 8 * 44)
    agree = {}
    for r in np.flatnonzero((family == list(offline.CUTS).index(name)) & (cut == 0)):
        c = CHARACTERS[character[r]]
        drawn, picture = Image.new("L", (700, 700)), Image.new("L", (512, 512))
        ImageDraw.Draw(drawn).text((150, 100), c, fill=255, font=font)
        ink = drawn.crop(drawn.getbbox())
        picture.paste(ink, (256 - ink.width // 2, 256 - ink.height // 2))
        theirs, ours = np.array(picture.reduce(8)) > 127, masks[r, 0].numpy() > 0.5
        agree[c] = (theirs & ours).sum() / (theirs | ours).sum()
    assert np.median([*agree.values()]) > 0.9 and min(agree.values()) > 0.6, min(agree, key=agree.get)


def test_task_classes_are_not_those_of_the_pretraining():
    ours, theirs = ground(32), FormulaImages(FormulaConfig())
    pretrained = theirs.families["contour"]
    assert not torch.isin(ours.textures.gain.float(), theirs.textures.gain).any()
    assert torch.cdist(breed_contours().amplitude.float(), pretrained.amplitude).min() > 0.05
    assert FormulaConfig().seed != TASK_SEED


def test_breeds_are_variants_of_six_species():
    a = breed_contours().amplitude
    species = torch.arange(37) % 6
    distance = torch.cdist(a, a)
    same = (species[:, None] == species) & ~torch.eye(37, dtype=bool)
    assert distance[same].mean() < 0.9 * distance[species[:, None] != species].mean() and distance[same].min() > 0


def test_a_source_can_be_seen_in_its_rendering():
    """The same random numbers with and without the source: the pictures differ, and only in a part of the pixels."""
    source = torch.zeros(64, 1, 32, 32, dtype=torch.float64)
    source[:, :, 8:24, 14:18] = 1
    formula = ground(32)

    def drawn(s):
        g = torch.Generator().manual_seed(0)
        return photo(warp(s, formula, g), formula, g)

    changed = ((drawn(source) - drawn(0 * source)).abs().amax(1) > 8 / 255).double().mean((1, 2))
    assert (changed > 0.02).double().mean() > 0.9 and changed.max() < 0.6


def test_the_sketch_hides_colour_and_the_clipart_is_outlined():
    for name, saturated in (("sketch", False), ("clipart", True), ("glyphs", True)):
        images = vp.task(name).test.images[:200].float()
        assert ((images.amax(1) - images.amin(1)).mean() > 20) == saturated
    assert (vp.task("clipart").test.images.amax(1) < 40).float().mean() > 0.02  # black lines


def test_labels_can_be_learnt_from_pixels_a_little():
    """Raw pixels beat chance on textures three times over: labels belong to their images."""
    task = vp.task("textures", size=8)
    warnings.simplefilter("ignore", ConvergenceWarning)  # a rough fit will do
    x = [torch.fft.fft2(getattr(task, s).images.double().mean(1)).abs().flatten(1)[:, 1:].log1p().numpy() for s in ("train", "test")]
    model = LogisticRegression(max_iter=50).fit(x[0], task.train.labels)
    assert model.score(x[1], task.test.labels) > 3 / 102


def test_any_size():
    assert vp.task("digits", size=48).test.images.shape[1:] == (3, 48, 48)


def test_renderings_repeat_the_sources_copy_by_copy():
    masks, character, *_ = glyphs()
    labels = torch.from_numpy(character)
    splits = render(masks, labels, ([0, 5], [1], [2]), (2, 1, 1), photo, 16, (0, 1, 2))
    assert splits["train"][1].tolist() == [*labels[[0, 5]].tolist()] * 2 and splits["test"][0].shape == (1, 3, 16, 16)


DIGEST = """
import hashlib, pathlib, sys, tempfile
import numpy as np
import torch
from vitplast.data import offline

sha = hashlib.sha256()
offline.COPIES = (1, 1, 1)
for name in sys.argv[1:]:
    with tempfile.TemporaryDirectory() as folder:
        offline.build(name, 16, pathlib.Path(folder))
        for path in sorted(pathlib.Path(folder).glob("*.images.npy")):
            sha.update(np.load(path).tobytes())
print(torch.backends.cpu.get_cpu_capability(), sha.hexdigest())
"""


@pytest.mark.parametrize("names", [
    ["digits_c/snow@5"], pytest.param(["digits", "sketch", "clipart", "glyphs", "textures", "breeds", "digits_c/motion_blur@5"], marks=pytest.mark.long),
])  # fmt: skip
def test_the_bytes_do_not_depend_on_the_processor(names):
    """With the machine's own vector instructions and with the baseline's, with two threads and with one: other roundings, the same bytes."""
    found = []
    for capability, threads in ((None, "2"), ("default", "1")):
        env = {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"} | {"OMP_NUM_THREADS": threads}
        env |= {"ATEN_CPU_CAPABILITY": capability} if capability else {}
        said = subprocess.run([sys.executable, "-c", DIGEST, *names], env=env, capture_output=True, text=True, check=True).stdout
        found.append(said.split())
    assert found[1][0] == "DEFAULT" and found[0][1] == found[1][1], found
