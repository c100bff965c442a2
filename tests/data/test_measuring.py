"""Images by name, distributions of pairs, and the `measure` command."""
import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import vitplast as vp
from vitplast.cli import app
from vitplast.data import DISTRIBUTIONS, Split, measure, measuring, named_images
from vitplast.data.folders import find_pictures
from vitplast.data.measuring import draw_pairs, matched
from vitplast.data.reading import read_image
from vitplast.models import prepare


def invoke(*args):
    return CliRunner().invoke(app, ["measure", *map(str, args)])


@pytest.fixture
def folder(tmp_path):
    g = np.random.default_rng(0)
    for i in range(12):
        (tmp_path / "photos" / f"{i % 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(g.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "photos" / f"{i % 3}" / f"{i}.png")
    return tmp_path / "photos"


def split(n, classes, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 8, 8).clone()
    return Split(images, torch.randint(classes, (n,), generator=g))


def test_named_images(folder):
    a, b, c = (named_images("digits", 20, 32, seed) for seed in (0, 0, 1))
    assert torch.equal(a.images, b.images) and not torch.equal(a.images, c.images) and a.images.shape == (20, 3, 32, 32)
    test = vp.task("digits").test
    found = (test.images[:, None].flatten(2) == a.images[0].flatten()).all(-1).flatten()
    assert found.any() and (test.labels[found] == a.labels[0]).any()
    assert named_images("formula", 3, 32).labels is None and named_images(str(folder), 12, 16).images.shape == (12, 3, 16, 16)
    for name, n, message in (("digits", 10**6, "digits: 1,436 test images, expected at least 1,000,000"), (folder, 13, "12 images below it, expected at least 13"), ("digitz", 3, "nearest known: .*digits")):
        with pytest.raises(ValueError, match=message):
            named_images(name, n, 32)


@pytest.mark.parametrize("n, classes", [(40, 2), (41, 7), (30, 1), (9, 9)])
def test_matched_pairs_are_what_they_say(n, classes):
    target = split(n, classes)
    for distribution, same in (("same-class", True), ("other-class", False)):
        first, second = matched(target, distribution, torch.Generator().manual_seed(0))
        assert ((target.labels[first] == target.labels[second]) == same).all()
        assert len(torch.cat([first, second]).unique()) == 2 * len(first)
    counts = target.labels.bincount()
    assert len(matched(target, "same-class", torch.Generator())[0]) == (counts // 2).sum()  # as many as there can be
    assert len(matched(target, "other-class", torch.Generator())[0]) >= (n // 2 if counts.max() <= n // 2 else 0)


def test_draws_depend_on_the_seed_alone_and_use_each_image_once():
    target, source = split(60, 4), split(60, 4, seed=1)
    for distribution in DISTRIBUTIONS:
        x, y = draw_pairs(distribution, target, 10, source, seed=3)
        again = draw_pairs(distribution, target, 10, source, seed=3)
        assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and x.shape == y.shape == (10, 3, 8, 8) and x.dtype == y.dtype == torch.uint8
        if distribution in ("target", "same-class", "other-class"):
            assert len(torch.cat([x, y])[:, 0, 0, 0].unique()) == 20
        if distribution in ("corrupted", "augmented"):
            assert len(x[:, 0, 0, 0].unique()) == 10
    assert not torch.equal(draw_pairs("corrupted", target, 10)[1], target.images[:10])


def test_bad_draws():
    target = split(10, 2)
    with pytest.raises(ValueError, match="distribution='targt': expected one of"):
        draw_pairs("targt", target, 2)
    with pytest.raises(ValueError, match="target: 5 pairs from 10 images of the target, expected 6"):
        draw_pairs("target", target, 6)
    with pytest.raises(ValueError, match="same-class pairs need classes"):
        draw_pairs("same-class", Split(target.images, None), 2)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_measure_is_plasticity_of_the_drawn_pairs(distribution):
    frame = measure("formula-vit-tiny", "glyphs", n=12, inputs="native", distribution=distribution, seed=2, batch_size=5)
    needed = {"target": 24, "same-class": None, "other-class": None}.get(distribution, 12)
    target, source = named_images("glyphs", needed, 32, 2), named_images("formula", 12, 32, 2)
    model = vp.load("formula-vit-tiny")
    x, y = (prepare(model, t) for t in draw_pairs(distribution, target, 12, source, 2))
    expected = vp.plasticity(model, x, y, inputs="native")
    assert np.allclose(frame.plasticity, expected.plasticity, rtol=1e-6)
    assert (frame.distribution == distribution).all() and (frame.source == ("formula" if distribution == "source-target" else "glyphs")).all()


def test_all_pairs_within_the_target(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "loose.png")
    with pytest.warns(UserWarning, match="6 of 36 pairs coincide"):
        frame = measure("formula-vit-tiny", "digits", n=6, inputs="embedding", pairs="all", distribution="target")
    assert (frame.n_pairs == 30).all() and (frame.pairs == "all").all()
    for target in ("formula", str(tmp_path)):
        with pytest.raises(ValueError, match="same-class pairs need classes|0 class folders, expected at least 2"):
            measure("formula-vit-tiny", target, n=6, distribution="same-class")
    with pytest.raises(ValueError, match="distribution='corrupted': its pairs are given"):
        measure("formula-vit-tiny", "digits", n=6, pairs="all", distribution="corrupted")


@pytest.mark.parametrize("distribution", ["same-class", "other-class"])
def test_pairs_by_class_of_class_folders(folder, distribution, monkeypatch):
    found, seen = find_pictures(folder), []
    every = {read_image(f, 16)[0].tobytes(): label for f, label in zip(found.files, found.labels)}
    monkeypatch.setattr(measuring, "plasticity", lambda model, *streams, **_: seen.extend(torch.cat(list(s)) for s in streams) or pd.DataFrame({"a": [1]}))
    monkeypatch.setattr(measuring, "prepare", lambda model, images: images)
    monkeypatch.setattr(measuring, "anatomy", lambda model: SimpleNamespace(image_shape=(3, 16, 16)))
    measure("formula-vit-tiny", folder, n=4, distribution=distribution, inputs="native")
    first, second = ([every[image.numpy().tobytes()] for image in side] for side in seen)
    assert len(first) == len(second) == 4 and len({image.numpy().tobytes() for side in seen for image in side}) == 8
    assert [a == b for a, b in zip(first, second)] == [distribution == "same-class"] * 4
    with pytest.raises(ValueError, match=f"{distribution}: . pairs from 12 images of the target, expected 7"):
        measure("formula-vit-tiny", folder, n=7, distribution=distribution)


def test_folders_are_cropped_as_the_task_is(folder, monkeypatch):
    model, seen = vp.load("formula-vit-tiny"), []
    monkeypatch.setattr(measuring, "pair_source", lambda *args, **how: seen.append(how["crop"]) or torch.zeros(4, 3, 32, 32, dtype=torch.uint8))
    for about, expected in (({}, 1.0), ({"crop_pct": 0.9}, 0.9)):
        model.pretrained_cfg = model.pretrained_cfg | about
        with pytest.warns(UserWarning):
            measure(model, folder, "digits", n=4, inputs="native")
        assert seen[-1] == expected
    with pytest.warns(UserWarning):
        measure(model, folder, "digits", n=4, inputs="native", crop=0.3)
    assert seen[-1] == 0.3


def test_command_writes_the_frame_and_the_figure(tmp_path, folder):
    out = tmp_path / "frame.csv"
    result = invoke("formula-vit-tiny", "--target", folder, "--n", 12, "--inputs", "native", "--pairs", "all", "--out", out)
    assert result.exit_code == 0 and re.search(r"MHA +\d\.\d+", result.output), result.output
    frame = pd.read_csv(out)
    assert len(frame) == 5 * 4 and (frame.n_pairs == 144).all() and (frame.inputs == "native").all() and (frame.model == "formula-vit-tiny").all()
    svg = out.with_suffix(".svg").read_text()
    assert svg.startswith("<svg") and "native inputs" in svg and "theoretical rank" in svg
    shown = invoke("formula-vit-tiny", "--n", 12, "--json", "--out", out, "--overwrite")
    rows = json.loads(shown.stdout)
    assert {r["inputs"] for r in rows} == {"embedding", "native"} and len(rows) == 40


def test_command_measures_an_untrained_timm_model(tmp_path):
    for i in range(3):
        Image.fromarray(np.full((20, 20, 3), 80 * i, np.uint8)).save(tmp_path / f"{i}.png")
    result = invoke("test_vit", "--untrained", "--n", 3, "--inputs", "embedding", "--source", "formula", "--target", tmp_path, "--out", tmp_path / "a.csv")
    assert result.exit_code == 0, result.output
    assert pd.read_csv(tmp_path / "a.csv").plasticity.notna().all()


@pytest.mark.parametrize("arguments, message", [
    (["formula-vitt"], "unknown model 'formula-vitt'; nearest known: \\['formula-vit"), (["formula-vit", "--target", "digitz"], "unknown task 'digitz'"),
    (["formula-vit", "--inputs", "natve"], "--inputs 'natve': expected one of"), (["formula-vit", "--pairs", "al"], "pairs='al': expected one of"),
    (["formula-vit", "--distribution", "x"], "distribution='x': expected one of"), (["formula-vit", "--out", "frame.txt"], "expected a name that ends in .csv"),
    (["formula-vit", "--device", "tpu"], "device 'tpu': expected one of"), (["formula-vit", "--untrained"], "takes no further arguments"),
])  # fmt: skip
def test_bad_arguments_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments, "--n", 3)
    assert result.exit_code == 1 and re.search(message, result.output) and "Traceback" not in result.output, result.output
    assert not list(tmp_path.iterdir())


def test_models_of_other_inputs_are_refused(model):
    from architectures import build

    with pytest.raises(ValueError, match="the model takes token sequences, expected images"):
        measure(build("GPT-2"), "digits", n=2)


def test_branches_of_two_names():
    frame = measure("formula-vit-tiny", "digits", n=16, pairs="all", of="branch")
    model = vp.load("formula-vit-tiny")
    x, y = (prepare(model, named_images(name, 16, 32).images) for name in ("formula", "digits"))
    expected = vp.plasticity(model, x, y, pairs="all", of="branch")
    assert set(frame.inputs) == {"native"} and list(frame.source) == ["formula"] * len(expected)
    pd.testing.assert_frame_equal(frame[[*expected]], expected)
    with pytest.raises(ValueError, match="inputs='embedding': a branch gets the stream"):
        measure("formula-vit-tiny", "digits", n=16, inputs="embedding", of="branch")


def test_what_is_kept_of_both():
    frames = {k: pd.DataFrame(v) for k, v in measuring.measured("formula-vit-tiny", "digits", inputs="embedding", n=8).items()}
    expected = measure("formula-vit-tiny", "digits", n=8, inputs="embedding", pairs="all")
    assert np.allclose(frames["plasticity"].plasticity, expected.plasticity) and (frames["plasticity"].n_pairs == 64).all()
    both = frames["plasticity"].merge(frames["bounds"], on=["inputs", "block", "depth", "component"])
    assert len(both) == 2 * len(expected) and (both.max_ratio <= both.bound * (1 + 1e-5)).all()


def test_bounds_are_of_the_pictures_that_were_measured(folder):
    model = vp.load("formula-vit-tiny")
    model.pretrained_cfg = dict(model.pretrained_cfg) | {"crop_pct": 0.5}
    found = pd.DataFrame(measuring.measured(model, str(folder), "formula", n=8)["bounds"]).query("kind == 'hull'").bound.to_numpy()
    for crop, same in ((0.5, True), (1.0, False)):
        images = torch.cat([named_images("formula", 8, 32).images, named_images(str(folder), 8, 32, crop=crop).images])
        assert np.allclose(found, vp.bounds(model, prepare(model, images), inputs="native", kind="hull").bound) == same
