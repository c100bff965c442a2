"""Train, save, use: the three commands as a person meets them."""
import json
import subprocess
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_cli import COMMAND, invoke

import vitplast as vp


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "Two classes of small pictures that differ by their colour."
    place, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, base in (("blue", (20, 20, 180)), ("red", (180, 20, 20))):
        (place / name).mkdir()
        for i in range(20):
            pixels = np.clip(base + draw.normal(0, 30, (40, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(place / name / f"{i}.png")
    return place


@pytest.fixture(scope="module")
def saved(pictures, tmp_path_factory):
    place = tmp_path_factory.mktemp("saved") / "run"
    asked = ("finetune", "formula-vit", pictures, "--selection", "LN1@5", "--lr", 0.1, "--steps", 8, "--batch", 8, "--device", "cpu", "--save", place, "--json")
    done = invoke(*asked)
    assert done.exit_code == 0, done.output
    return place, json.loads(done.stdout[done.stdout.index("{"):])


def test_what_finetune_says_is_what_it_saved(saved, pictures):
    place, said = saved
    run = vp.load_run(place)
    assert said["selection"] == run.components == "LN1@5" and said["test_accuracy"] == run.test_accuracy
    assert run.classes == ("blue", "red") and run.config.lr == said["lr"] == 0.1
    again = vp.finetune(vp.load("formula-vit"), str(pictures), "LN1@5", run.config)
    assert again.test_accuracy == run.test_accuracy and again.crop == run.crop


def test_predictions_are_those_of_python(saved, pictures, tmp_path):
    place, _ = saved
    done = invoke("predict", place, pictures, "--out", tmp_path / "a.csv", "--every-class", "--device", "cpu")
    assert done.exit_code == 0, done.output
    frame, expected = pd.read_csv(tmp_path / "a.csv"), vp.load_run(place).predict(pictures, every_class=True)
    pd.testing.assert_frame_equal(frame, expected)
    assert f"{(frame['label'] == frame['class']).mean():.1%} of 40 pictures right" in done.stdout
    assert invoke("predict", place, pictures, "--out", tmp_path / "a.csv").exit_code == 1  # exists
    rows = json.loads(invoke("predict", place, pictures / "red", "--json", "--device", "cpu").stdout)
    assert len(rows) == 20 and set(rows[0]) == {"file", "class", "probability"}


def test_a_rate_is_suggested_and_augmented_pictures_train(pictures, tmp_path):
    asked = ("finetune", "formula-vit", pictures, "--steps", 3, "--batch", 8, "--augment", "--class-weights", "--patience", 2, "--device", "cpu", "--save", tmp_path / "run")
    done = invoke(*asked)
    assert done.exit_code == 0 and "suggested" in done.output and "test pictures right" in done.output, done.output
    config = vp.load_run(tmp_path / "run").config
    assert config.class_weights and config.patience == 2
    assert invoke(*asked).exit_code == 1


@pytest.mark.parametrize("args, message", [
    (("finetune", "formula-vit", "digits_plain", "--augment", "--save", "x"), "no folder of your own"),
    (("finetune", "formula-vit", "digitz", "--save", "x"), "unknown task 'digitz'"),
    (("finetune", "formula-vit", "digits_plain", "--selection", "MHZ", "--lr", "0.1", "--save", "x"), "nearest: MHA"),
    (("predict", "nothing", "."), "no saved run"),
    (("merge", "nothing", "x"), "no saved run"),
])
def test_what_is_refused(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke(*args)
    assert done.exit_code == 1 and message in done.output and "Traceback" not in done.output


def test_merge_refuses_what_no_library_builds(saved, tmp_path):
    done = invoke("merge", saved[0], tmp_path / "whole")
    assert done.exit_code == 1 and "no architecture that timm or transformers build by name" in done.output


def test_advice_in_every_form_and_finetuning_by_it(pictures, tmp_path):
    base = ("advise", "formula-vit", pictures, "--device", "cpu", "--images", 16, "--steps", 8, "--batch", 8, "--budget", 0.1)
    text = invoke(*base)
    assert text.exit_code == 0 and "Train " in text.stdout and "Best first" in text.stdout, text.output
    table = json.loads(invoke(*base, "--json").stdout)["candidates"]
    selection = table[0]["selection"]
    assert f"Train {selection} at" in text.stdout
    names = [line for line in invoke(*base, "--format", "names").stdout.splitlines() if line.startswith("blocks.")]
    with vp.trainable(vp.load("formula-vit"), selection, head=False) as training:
        assert names == training.names
    lora = json.loads(invoke(*base, "--format", "peft", "--rank", 2).stdout)
    assert lora["r"] == 2 and set(lora["target_modules"]) == {n.rpartition(".")[0] for n in names if "norm" not in n}
    for form in ("regex", "groups", "trainer", "axolotl"):
        assert invoke(*base, "--format", form).exit_code == 0
    assert invoke(*base, "--format", "yaml", "--out", tmp_path / "a.yaml").exit_code == 0
    done = invoke("finetune", "formula-vit", pictures, "--advice", tmp_path / "a.yaml", "--device", "cpu", "--save", tmp_path / "run", "--json")
    assert done.exit_code == 0, done.output
    run = vp.load_run(tmp_path / "run")
    assert (run.components, run.config.lr, run.config.steps, run.config.batch_size) == (selection, table[0]["lr"], 8, 8)
    refused = invoke(*base, "--format", "yamll")
    assert refused.exit_code == 1 and "nearest known: ['yaml'" in refused.output


def test_a_killed_finetuning_goes_on_to_the_same_numbers(pictures, tmp_path):
    base = ("finetune", "formula-vit", pictures, "--selection", "MHA", "--lr", 0.02, "--steps", 64, "--batch", 8, "--device", "cpu")
    asked = [str(a) for a in (*base, "--save", tmp_path / "a")]
    process = subprocess.Popen([*COMMAND, *asked], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    begun = tmp_path / "a/unfinished.safetensors"
    while not begun.exists() and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert begun.exists() and not (tmp_path / "a/run.json").exists()
    done = invoke(*asked)
    assert done.exit_code == 0 and "going on from" in done.output and not begun.exists(), done.output
    run = vp.load_run(tmp_path / "a")
    config = replace(run.config, bf16=run.bf16)  # what was settled by the clock when it began
    whole = vp.finetune(vp.load("formula-vit"), str(pictures), "MHA", config)
    np.testing.assert_allclose(run.history.loss, whole.history.loss, rtol=1e-3, atol=1e-4)
    assert run.best_step == whole.best_step


def test_a_folder_of_pictures_is_not_saved_into_and_nothing_is_trained_for_it(pictures):
    before = sorted(pictures.rglob("*"))
    done = invoke("finetune", "formula-vit", pictures, "--steps", 2, "--lr", 0.1, "--device", "cpu", "--save", pictures)
    assert done.exit_code == 1 and "holds 'blue', expected an empty or a new folder" in done.output
    assert sorted(pictures.rglob("*")) == before
