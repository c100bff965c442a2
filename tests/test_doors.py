"""Inputs that were tried from outside, a table for each door: what is meant is taken, what is not is said in one sentence."""
import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import timm
import torch
from conftest import noise, tiny_vit
from PIL import Image
from test_cli import invoke

import vitplast as vp
from vitplast.data import Split, measure
from vitplast.models import prepare
from vitplast.runs import Store, sweep
from vitplast.theory import gradient_bounds


def broken(name):
    "A small network with one number that is none."
    model = tiny_vit()
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[0] = torch.nan
    return model


def task_of(images=8, labels=None, dtype=torch.uint8, kind=torch.long, validation=8):
    "A task whose training split is as the arguments say."
    fine = Split(torch.zeros(8, 3, 16, 16, dtype=torch.uint8), torch.arange(8) % 2)
    labels = torch.arange(images) % 2 if labels is None else torch.tensor(labels)
    train = Split(torch.zeros(images, 3, 16, 16, dtype=dtype), labels.to(kind))
    return vp.Task("made", ("a", "b"), train, Split(fine.images[:validation], fine.labels[:validation]), fine, test_sources=8)


API = {
    "a NaN that the fast path does not read": (lambda: vp.plasticity(broken("blocks.1.attn.qkv.bias"), noise(4), noise(4, 1), fast=True), ValueError, r"MHA of block 1 .*: its weights are NaN or infinite"),
    "a NaN in a norm": (lambda: vp.plasticity(broken("blocks.0.norm2.bias"), noise(4), noise(4, 1), pairs="all"), ValueError, "LN2 of block 0 .*NaN"),
    "labels shorter than pictures": (lambda: task_of(labels=[0, 1]), ValueError, "train: 8 images and 2 labels, expected as many"),
    "a label of -100": (lambda: task_of(labels=[0] * 7 + [-100]), ValueError, "train: labels from -100 to 0, expected 0 to 1, one of 2 classes"),
    "a label of 99": (lambda: task_of(labels=[0] * 7 + [99]), ValueError, "train: labels from 0 to 99, expected 0 to 1"),
    "labels that are not whole": (lambda: task_of(kind=torch.float32), ValueError, "train: labels of torch.float32, expected torch.int64"),
    "pictures that are floats": (lambda: task_of(dtype=torch.float32), ValueError, r"train: images \(8, 3, 16, 16\) of torch.float32, expected bytes"),
    "an empty validation split": (lambda: task_of(validation=0), ValueError, "validation: 0 images and 0 labels"),
    "labels beside gradients": (lambda: gradient_bounds(tiny_vit(num_classes=3), noise(2), torch.tensor([0, 3])), ValueError, "labels"),
    "a model's name": (lambda: vp.plasticity("formula-vit", noise(2), noise(2)), TypeError, "model 'formula-vit' is a str: expected a network, as vp.load gives it"),
    "no name": (lambda: vp.task(""), ValueError, "unknown task '': no folder or table of that name"),
    "a model in a grid": (lambda: vp.Grid(("digits",), models=(tiny_vit(),)), TypeError, "model: a VisionTransformer, expected a name or a path, which other processes can read"),
    "an empty grid": (lambda: vp.Grid(()), ValueError, r"tasks=\(\): expected a list with at least one entry"),
    "no grids": (lambda: sweep([], "unused"), ValueError, "no grids: expected at least one"),
    "a number as a grid": (lambda: sweep(3, "unused"), TypeError, "grid 3: expected a vp.Grid or several"),
    "a dictionary among grids": (lambda: sweep([{}], "unused"), TypeError, "grid {} is a dict: expected a vp.Grid, or the name of a preset"),
    "a batch that is a dictionary": (lambda: vp.plasticity(tiny_vit(), {"picture": noise(2)}, noise(2)), TypeError, r"x: entries .'picture'., expected one of .'pixel_values'"),
    "dictionaries of other lengths": (lambda: vp.plasticity(tiny_vit(), {"pixel_values": noise(3)}, {"pixel_values": noise(2)}), ValueError, "x has 3 images and y has 2"),
    "half a seed": (lambda: vp.Grid(("digits",), seeds=(0.5,)), ValueError, "seed=0.5: expected a whole number"),
    "a preset that is none": (lambda: sweep("offlin", "unused"), ValueError, "unknown preset or file 'offlin'; nearest known: .'offline'"),
    "the old images of a foreign network": (lambda: measure(tiny_vit(), "digits", n=4), ValueError, "source: expected the pictures that this model was pretrained on"),
    "old images that are the new ones": (lambda: measure("formula-vit-tiny", "digits", "digits", n=4), ValueError, "source and target are both 'digits'"),
}


@pytest.mark.parametrize("case", API)
def test_the_library(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, kind, message = API[case]
    with pytest.raises(kind, match=message):
        call()
    assert not list(tmp_path.iterdir())


def test_what_is_meant_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = {"tasks": ["digits"], "models": ["formula-vit-tiny"], "selections": ["mha"], "lrs": [0.1], "seeds": [0], "config": {"steps": 1, "eval_every": 1}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert sweep("plan.json", tmp_path / "store", "serial", progress=False).component.tolist() == ["MHA"]
    with pytest.warns(UserWarning, match="x: values from 0 to 255 look like bytes; expected normalised images"):
        vp.plasticity(tiny_vit(), 255 * noise(3).sigmoid().round(), 255 * noise(3, 1).sigmoid().round())
    model = vp.load("formula-vit-tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the extremes of pictures, normalised
        vp.components(model)
        prepared = prepare(model, torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 32, 32))
        warnings.filterwarnings("ignore", "[0-9]+ (groups|of)|every pair is linked")
        vp.plasticity(model, prepared, prepared.flip(0))


def test_the_name_of_a_task_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        (tmp_path / "digits/a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"digits/a/{i}.png")
    named, drawn = (measure("formula-vit-tiny", target, n=4, inputs="native").plasticity for target in ("./digits", "digits"))
    monkeypatch.chdir("/")
    assert measure("formula-vit-tiny", "digits", n=4, inputs="native").plasticity.equals(drawn) and not named.equals(drawn)


FILES = {  # a JSON file -> what is said
    "{}": 'expected {"tasks": [...], ...} or a list of those', "[]": 'expected {"tasks": [...], ...} or a list of those', "3": "expected {", '{"tasks": ["digits"], "seeds": [0.5]}': "seed=0.5: expected a whole number",
    '{"tasks": ["digits"], "config": {"momentum": "x"}}': "momentum='x': expected a number in [0, 1)", '{"tasks": ["digits"], "config": {"steps": true}}': "steps=True: expected a positive integer",
    '{"tasks": ["digits"], "lrs": [-1]}': "lr=-1.0: expected a positive number", '{"tasks": ["digits"], "lr": [1]}': "unknown setting 'lr'; nearest known: ['lrs']",
}  # fmt: skip


@pytest.mark.parametrize("text", FILES)
def test_grids_in_files(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").write_text(text)
    result = invoke("sweep", "plan.json", "--dry-run")
    assert result.exit_code == 1 and FILES[text] in result.output and result.output.count("\n") == 1, result.output
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


COMMANDS = {
    "the old images of a foreign network": (["measure", "test_vit", "--untrained"], "source: expected the pictures that this model was pretrained on"),
    "old images that are the new ones": (["measure", "formula-vit-tiny", "--source", "digits"], "source and target are both 'digits'"),
    "one folder in two spellings": (["measure", "formula-vit-tiny", "--source", ".", "--target", "./"], "source and target are both"),
    "an empty target": (["measure", "formula-vit-tiny", "--target", ""], "unknown task ''"),
    "a file that is there": (["measure", "formula-vit-tiny", "--out", "there.csv"], "--out there.csv: exists; --overwrite replaces it"),
    "a folder that is not": (["measure", "formula-vit-tiny", "--out", "no/where.csv"], "--out no/where.csv: expected an existing folder"),
    "a checkpoint that is not": (["measure", "test_vit", "--checkpoint", "no.safetensors"], "no.safetensors: no such file"),
    "weights in a file that can hold code": (["measure", "test_vit", "--checkpoint", "there.csv"], "there.csv: expected a .safetensors file"),
    "weights and none": (["measure", "test_vit", "--untrained", "--checkpoint", "w.safetensors"], "--untrained and --checkpoint w.safetensors: expected one of them"),
    "no model": (["measure", ""], "unknown model ''"),
    "a device that is not": (["measure", "formula-vit-tiny", "--device", "cdua"], "device 'cdua': expected one of ['auto', 'cpu'"),
    "a device of a sweep": (["sweep", "offline-cpu", "--device", "cdua"], "device 'cdua': expected one of"),
    "a device of the demonstration": (["demo", "--device", "cdua", "--out", "there.csv"], "device 'cdua': expected one of"),
    "weights for a model that has its own": (["sweep", "offline-cpu", "--checkpoint", "there.csv"], "formula-vit has weights of its own"),
    "weights for a sweep that are not": (["sweep", "offline-cpu", "--checkpoint", "no.safetensors"], "formula-vit has weights of its own, expected the name of one of timm's networks"),
    "a checkpoint without weights": (["convert", "there.csv"], "there.csv: not a checkpoint of PyTorch"),
    "no checkpoint": (["convert", "no.pth"], "no.pth: no such file"),
    "a conversion to a pickle": (["convert", "no.pth", "--out", "there.pth"], "there.pth: expected a name that ends in .safetensors"),
    "a preset that is none": (["sweep", "offlin"], "unknown preset or file 'offlin'"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_the_command_line(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.csv").write_text("kept")
    arguments, message = COMMANDS[case]
    result = invoke(*arguments)
    assert result.exit_code == 1 and message in result.output and result.output.count("\n") == 1, result.output
    assert [p.name for p in tmp_path.iterdir()] == ["there.csv"] and (tmp_path / "there.csv").read_text() == "kept"


def test_own_weights_from_a_pickle_to_a_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("test_vit", num_classes=5)
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, "run.pth")
    done = invoke("convert", "run.pth", "--model", "test_vit")
    assert done.exit_code == 0 and "run.safetensors: 80 tensors of run.pth, its 'state_dict'; names without 'module.'" in done.output.replace("\n", " ")
    assert "they are test_vit's: vp.load('test_vit@run.safetensors')" in done.output
    again = invoke("convert", "run.pth")
    assert again.exit_code == 1 and "run.safetensors: exists" in again.output
    for c, name in enumerate(("bird", "cat")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.random.default_rng(10 * c + i).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(f"photos/{name}/{i}.png")
    grid = {"tasks": ["photos"], "models": ["test_vit"], "selections": ["LN1"], "lrs": [0.1], "seeds": [0], "config": {"steps": 1, "eval_every": 1, "batch_size": 2}}
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    for name, options in (("a", ["--checkpoint", "run.safetensors"]), ("b", [])):
        if name == "b":
            (tmp_path / "grid.json").write_text(json.dumps(grid | {"models": ["test_vit@run.safetensors"]}))
        result = invoke("sweep", "grid.json", "--store", name, "--executor", "serial", "--device", "auto", *options)
        assert result.exit_code == 0, result.output
    keys = [sorted(p.name for p in (tmp_path / s).glob("*.json")) for s in "ab"]
    assert keys[0] == keys[1] and len(keys[0]) == 2  # a run and a probe
    alone = vp.finetune(vp.load("test_vit@run.safetensors"), "photos", "LN1", vp.FinetuneConfig(steps=1, eval_every=1, batch_size=2, lr=0.1))
    records = [json.loads(p.read_text())["record"] for p in (tmp_path / "a").glob("*.json")]
    assert [r["test_accuracy"] for r in records if "test_accuracy" in r] == [alone.test_accuracy]
    assert [r["model"] for r in records if "test_accuracy" in r] == [f"test_vit@{tmp_path}/run.safetensors"]


def test_a_script_that_would_start_itself_again_is_told(tmp_path):
    (tmp_path / "mine.py").write_text("from vitplast.runs import choose\nchoose('processes', 2)\n")
    done = subprocess.run([sys.executable, "mine.py"], capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert done.returncode == 1 and "mine.py: worker processes import the script that starts them" in done.stderr


def test_no_gpu_is_seen_where_the_cpu_is_asked_for():
    script = "import os, vitplast.cli, torch; vitplast.cli.chosen_device('cpu'); print(torch.cuda.is_available(), repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["False", "''"]


def test_a_seed_beyond_all_bounds_is_a_usage_error():
    assert invoke("measure", "formula-vit-tiny", "--seed", 99999999999999999999).exit_code == 2


def test_a_dry_run_creates_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("sweep", "offline-cpu", "--dry-run", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["runs"] == 924 and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="expected a folder for the store"):
        (tmp_path / "file").write_text("")
        Store(tmp_path / "file" / "store")


def test_weights_that_cannot_be_fetched_are_said_soon(monkeypatch):
    import socket
    import time

    def unknown(*args, **kwargs):
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr("vitplast.models.checkpoints.getproxies", dict)
    started = time.monotonic()
    with pytest.raises(FileNotFoundError, match="are not in the cache and could not be fetched") as caught:
        vp.load("vit_tiny_patch16_224")
    assert time.monotonic() - started < 20 and "\n" not in str(caught.value)
