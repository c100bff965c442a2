"""What the versions in keys stand for: every path that makes records, computed again, gives the stored numbers.

A test that fails here says that TRAINING_VERSION, PROBE_VERSION, MEASURING_VERSION, LANDSCAPE_VERSION or PICTURES_VERSION no longer
means what it did: records kept under it are of other numbers. Raise the version, say why in the changelog, and write the
numbers anew:

    python tests/test_golden.py --write
"""
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitplast as vp
from vitplast.data import OFFLINE, PICTURES_VERSION, PUBLISHED_NORMALISATION, RandomCrops, Split, Task, decode, named_images
from vitplast.models import prepare
from vitplast.theory import MEASURING_VERSION, gradient_bounds
from vitplast.training import LANDSCAPE_VERSION, PROBE_VERSION, TRAINING_VERSION, finetune_many, loss_surface, rate_surface

GOLDEN = Path(__file__).parent / "golden"
MODEL, TASK = "formula-vit-tiny", "digits"
VERSIONS = {"training": TRAINING_VERSION, "probe": PROBE_VERSION, "measuring": MEASURING_VERSION, "landscape": LANDSCAPE_VERSION, "pictures": PICTURES_VERSION}
BASE = vp.FinetuneConfig(steps=5, batch_size=16, eval_every=5, lr=0.1)
PATHS = {  # every setting that changes what a step computes
    "sgd": ("MHA", {}),
    "joint clip": ("MHA", {"clip_head": "joint", "clip": 0.5}),
    "no clip": ("FC1", {"clip": None, "lr": 0.01}),
    "adamw": ("FC2", {"optimizer": "adamw", "lr": 0.003, "weight_decay": 0.1}),
    "accumulation": ("LN1", {"accumulate": 3, "weight_decay": 0.01}),
    "bf16": ("MHA", {"bf16": True}),
    "final norm": ("LN2", {"final_norm": True, "watch": ("MHA",), "momentum": 0.5, "warmup": 0.4}),
    "rate of the head": ("FC1", {"head_lr": 0.01, "seed": 3}),
    "fitted head": ("FC1", {"head_lr": 0}),
    "rows of a tensor": ("MHA.v+FC1.bias", {"weight_decay": 0.1}),
    "some blocks": ("all@-2:", {}),
    "everything": ("all", {"lr": 0.03}),
    "head": ("head", {}),
    "random numbers": ("MHA+LN1", {"update": "random:500"}),
    "columns": ("FC1", {"update": "columns:1000"}),
    "low rank": ("MHA+FC2", {"update": "lora:2"}),
    "factors": ("MHA.k+MHA.v+FC2", {"update": "ia3"}),
    "few pictures": ("LN2", {"shots": 2}),
}


def small(augmented=False) -> Task:
    "A few of the digits, as they are or randomly cropped."
    whole = vp.task(TASK)
    parts = [Split(s.images[:n].clone(), s.labels[:n].clone()) for s, n in ((whole.train, 96), (whole.validation, 32), (whole.test, 32))]
    return Task(TASK, whole.classes, *parts, test_sources=32, augment=RandomCrops(32, torch.linspace(0.5, 2, 96)) if augmented else None)


def came_of(run) -> dict:
    "Losses and gradient norms of the first five steps with the validation loss, and how many pictures were right."
    h = run.history
    norms = [h[c].fillna(0).tolist() for c in ("grad_norm", "head_grad_norm")]
    right = [32 * run.validation_accuracy, 32 * run.test_accuracy]
    return {"numbers": [*h.loss, *norms[0], *norms[1], h.validation_loss.iloc[-1]], "pictures": right}


def trained() -> dict:
    "What comes of five steps on every path, one by one and together."
    model, task, found = vp.load(MODEL), small(), {}
    for name, (selection, settings) in PATHS.items():
        found[name] = came_of(vp.finetune(model, task, selection, replace(BASE, **settings)))
    normalised = vp.load(MODEL)
    normalised.pretrained_cfg = normalised.pretrained_cfg | PUBLISHED_NORMALISATION
    found["published normalisation"] = came_of(vp.finetune(normalised, task, "MHA", BASE))
    found["crops"] = came_of(vp.finetune(model, small(augmented=True), "MHA", BASE))
    for name in ("sgd", "adamw", "joint clip", "rate of the head", "rows of a tensor"):
        selection, settings = PATHS[name]
        config = replace(BASE, **settings)
        for run in finetune_many(model, task, selection, [config, replace(config, lr=config.lr / 2, seed=7)]):
            found[f"{name}, together, seed {run.config.seed}"] = came_of(run)
    return found


def measured() -> dict:
    "Plasticity, bounds, gradients, landscapes and probes of a small network."
    model, task = vp.load(MODEL), small()
    x, y = (prepare(model, named_images(name, 8, 32).images) for name in ("formula", TASK))
    found = {}
    for inputs in ("embedding", "native"):
        for pairs in ("paired", "all", "limit"):
            found[f"plasticity, {inputs}, {pairs}"] = vp.plasticity(model, x, y, inputs=inputs, pairs=pairs).plasticity.tolist()
        for kind in ("sharp", "published", "hull"):
            found[f"bounds, {inputs}, {kind}"] = vp.bounds(model, torch.cat([x, y]), inputs=inputs, kind=kind).bound.tolist()
    headed = vp.finetune(model, task, "head", BASE).model
    frame = gradient_bounds(headed, prepare(headed, task.train.images[:8]), task.train.labels[:8])
    found |= {f"gradients, {name}": frame[name].tolist() for name in ("gradient", "signal", "gain", "bound")}
    surface = loss_surface(headed, task, "FC1", 0, vp.FinetuneConfig(steps=4, lr=0.03, batch_size=16), size=3, n_images=16)
    found |= {"loss surface": surface.frame.loss.tolist(), "its path": surface.path.loss.tolist()}
    around = rate_surface(model, x[0], y[0], "MHA", 1, size=4, iterations=50)
    found |= {"rate surface": around.frame.rate.tolist(), "steepest": [around.steepest], "new image": [around.new["rate"]]}
    return found | {"probe": [vp.linear_probe(model, vp.task(TASK))]}


def drawn() -> np.ndarray:
    "The first picture of each split of every offline task, a row per task: (11 * 32, 3 * 32, 3)."
    rows = [[getattr(vp.task(name), split).images[0].permute(1, 2, 0).numpy() for split in ("train", "validation", "test")] for name in OFFLINE]
    return np.concatenate([np.concatenate(row, 1) for row in rows], 0)


def read(folder) -> np.ndarray:
    "A wide and a tall picture file as the other splits and as training shows them, and three random crops: (32, 7 * 32, 3)."
    g = np.random.default_rng(0)
    files = []
    for name, shape in (("wide", (40, 90)), ("tall", (90, 40))):
        smooth = Image.fromarray(g.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(shape[::-1], Image.Resampling.BICUBIC)
        smooth.save(folder / f"{name}.png")
        files.append(folder / f"{name}.png")
    decode(files, folder / "centre.npy", 32, 0.875)
    _, aspects = decode(files, folder / "whole.npy", 36, None)
    centre, whole = (torch.from_numpy(np.load(folder / f"{n}.npy")) for n in ("centre", "whole"))
    crops, rows = RandomCrops(32, aspects), torch.tensor([0, 1, 1])
    pictures = [*centre, *crops.centre(whole, torch.arange(2)), *crops(whole[rows], rows, torch.Generator().manual_seed(0))]
    return np.concatenate([p.permute(1, 2, 0).numpy() for p in pictures], 1)


def stored(name) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def test_versions_are_those_of_the_stored_numbers():
    assert stored("versions") == VERSIONS, "a version was raised: write the numbers anew, see the first lines of this file"


@pytest.mark.parametrize("name, compute", [("training", trained), ("measured", measured)], ids=["training", "measured"])
def test_numbers_are_the_stored_ones(name, compute):
    expected, found = stored(name), compute()
    assert found.keys() == expected.keys()
    for path, numbers in expected.items():
        tolerance, mine = 2e-2 if path == "bf16" else 3e-3 if path == "probe" else 1e-4, found[path]
        if isinstance(numbers, dict):
            assert np.allclose(mine["pictures"], numbers["pictures"], rtol=0, atol=2), path
            mine, numbers = mine["numbers"], numbers["numbers"]
        assert np.allclose(mine, numbers, rtol=tolerance, atol=0), f"{path}: {mine}, stored {numbers}"


@pytest.mark.parametrize("name", ["drawn", "read"])
def test_pictures_are_the_stored_ones(name, tmp_path):
    found = drawn() if name == "drawn" else read(tmp_path)
    expected = np.asarray(Image.open(GOLDEN / f"{name}.png")).astype(int)
    assert found.shape == expected.shape and abs(found - expected).max() <= (0 if name == "drawn" else 1)


def test_another_number_would_be_seen():
    "A path that changes a little changes its losses by more than the tolerance."
    other = vp.finetune(vp.load(MODEL), small(), "MHA", replace(BASE, momentum=0.899)).history.loss
    assert not np.allclose(other, stored("training")["sgd"]["numbers"][:5], rtol=1e-4, atol=0)


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    import tempfile

    GOLDEN.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    for name, numbers in (("versions", VERSIONS), ("training", trained()), ("measured", measured())):
        (GOLDEN / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    Image.fromarray(drawn()).save(GOLDEN / "drawn.png")
    with tempfile.TemporaryDirectory() as folder:
        Image.fromarray(read(Path(folder))).save(GOLDEN / "read.png")
