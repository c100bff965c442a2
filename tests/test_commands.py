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
from vitplast.commands import recipe_of


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
    given = dict.fromkeys(("selection", "steps", "batch_size", "optimizer", "lr"))
    assert recipe_of(tmp_path / "a.yaml", given)["lr"] > 0
    for other in ({"optimizer": "adamw"}, {"selection": "LN2@0"}):
        assert "lr" not in recipe_of(tmp_path / "a.yaml", given | other)  # it was for another one
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


def no_room(*args, **kwargs):
    "As a full disk answers."
    raise OSError(28, "No space left on device")


def test_a_full_disk_when_the_run_is_saved_costs_no_training(pictures, tmp_path, monkeypatch):
    base = ("finetune", "formula-vit", pictures, "--selection", "LN1@5", "--lr", 0.1, "--steps", 8, "--batch", 8, "--device", "cpu", "--save")
    whole = invoke(*base, tmp_path / "whole", "--json")
    begun, place = tmp_path / "run/unfinished.safetensors", tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("vitplast.training.saving.write_tensors", no_room)
        done = invoke(*base, place)
    assert done.exit_code == 1 and "No space left on device" in done.output and "is kept, the same command goes on from it" in done.output
    assert begun.exists() and not (place / "run.json").exists()
    with monkeypatch.context() as patch:  # no step is taken again
        patch.setattr("vitplast.data.Task.batch", None)
        patch.setattr("torch.optim.SGD.step", None)
        done = invoke(*base, place, "--json")
    assert done.exit_code == 0 and "going on from" in done.output and not begun.exists(), done.output
    one, two = (json.loads(d.stdout[d.stdout.index("{"):]) for d in (whole, done))
    same = ("selection", "trained", "validation_accuracy", "test_accuracy")
    assert [one[k] for k in same] == [two[k] for k in same]
    assert sorted(p.name for p in place.iterdir()) == ["README.md", "run.json", "trained.safetensors"]


def test_pictures_that_cannot_be_read_are_left_out_when_asked(pictures, tmp_path):
    for name in ("blue", "red"):
        (tmp_path / "p" / name).mkdir(parents=True)
        for file in (pictures / name).iterdir():
            (tmp_path / "p" / name / file.name).write_bytes(file.read_bytes())
    (tmp_path / "p/red/broken.png").write_bytes(b"no picture")
    base = ("finetune", "formula-vit", tmp_path / "p", "--selection", "LN1@5", "--lr", 0.1, "--steps", 2, "--batch", 8, "--device", "cpu", "--save")
    refused = invoke(*base, tmp_path / "a")
    assert refused.exit_code == 1 and "1 of 41 images cannot be read" in refused.output and "--skip-corrupt" in refused.output
    with pytest.warns(UserWarning, match="1 of 41 images cannot be read"):
        done = invoke(*base, tmp_path / "a", "--skip-corrupt")
    assert done.exit_code == 0, done.output
    again = invoke("finetune", "formula-vit", "digits_plain", "--skip-corrupt", "--save", tmp_path / "b")
    assert again.exit_code == 1 and "--skip-corrupt: digits_plain is no folder of your own" in again.output


@pytest.mark.parametrize("lr, warned", [(1e-12, True), (0.1, False)])
def test_a_network_that_has_learnt_nothing_is_said_to(pictures, tmp_path, lr, warned):
    "Of 4 and 4 validation pictures half is chance; colours are learnt in eight steps."
    done = invoke("finetune", "formula-vit", pictures, "--selection", "LN1", "--lr", lr, "--steps", 8, "--batch", 8, "--device", "cpu", "--save", tmp_path / "run")
    reached = vp.load_run(tmp_path / "run").validation_accuracy
    assert (reached <= 0.5) == warned, "the test needs a network at chance, and one that is not"
    assert ("is not above 50.0%, the share of its most frequent class" in done.output) == warned


def test_a_loose_picture_is_predicted_without_a_label(saved, pictures, tmp_path):
    for name in ("blue", "red"):
        (tmp_path / "p" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "p" / name / f"{i}.png").write_bytes((pictures / name / f"{i}.png").read_bytes())
    (tmp_path / "p/loose.png").write_bytes((pictures / "red/9.png").read_bytes())
    with pytest.warns(UserWarning, match="1 of 7 pictures lie in no class folder, first loose.png: predicted without a label"):
        done = invoke("predict", saved[0], tmp_path / "p", "--out", tmp_path / "a.csv", "--report", tmp_path / "a.html", "--device", "cpu")
    frame = pd.read_csv(tmp_path / "a.csv")
    known = frame[frame.label.notna()]
    assert len(frame) == 7 and frame.file[frame.label.isna()].tolist() == [str(tmp_path / "p/loose.png")]
    assert known.label.tolist() == [f.split("/")[-2] for f in known.file]
    share = f"{(known['label'] == known['class']).mean():.1%} of 6 pictures right"
    assert share in done.stdout and share in (tmp_path / "a.html").read_text() and "1 more have no label" in (tmp_path / "a.html").read_text()


def test_a_report_of_mistakes_as_pictures(saved, pictures, tmp_path):
    page, asked = tmp_path / "a.html", ("predict", saved[0], pictures, "--device", "cpu", "--report")
    done = invoke(*asked, page)
    assert done.exit_code == 0 and f"{page} written" in done.output, done.output
    frame, text = vp.load_run(saved[0]).predict(pictures), page.read_text()
    wrong = int((frame["label"] != frame["class"]).sum())
    assert f"{wrong} wrong." in text and text.count("<img") <= 24 and "data:image/png;base64," in text
    assert "exists; --overwrite replaces it" in invoke(*asked, page).output
    assert "expected two files" in invoke(*asked, tmp_path / "b.html", "--out", tmp_path / "x/../b.html").output
    assert not (tmp_path / "b.html").exists()
    assert "expected a name that ends in .html" in invoke(*asked, tmp_path / "a.csv").output
    alone = invoke("predict", saved[0], pictures / "red", "--device", "cpu", "--report", page, "--overwrite", "--json")
    assert len(json.loads(alone.stdout[: alone.stdout.rindex("]") + 1])) == 20 and "Least sure" in page.read_text()


def test_a_run_upon_a_network_of_ones_own_says_who_can_load_it(pictures, tmp_path):
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)  # not by vp.load: without a name
    run = vp.finetune(model, str(pictures), "LN1", vp.FinetuneConfig(steps=1, eval_every=1, batch_size=8))
    run.save(tmp_path / "run")
    for command in (("predict", tmp_path / "run", pictures), ("merge", tmp_path / "run", tmp_path / "whole")):
        done = invoke(*command)
        assert done.exit_code == 1 and "in Python, as vp.load_run(folder, model)" in done.output and "Traceback" not in done.output
    assert vp.load_run(tmp_path / "run", model).components == "LN1"


def test_json_and_another_form_are_not_both_given(pictures):
    done = invoke("advise", "formula-vit", pictures, "--json", "--format", "yaml")
    assert done.exit_code == 1 and "--json and --format yaml: two forms, expected one of them" in done.output


SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 16, "patch_size": 8}


def of_transformers(name, folder):
    "A small network with random weights and its image processor, saved as transformers saves them."
    import torch
    import transformers as t

    build = {
        "vit": lambda: (t.ViTForImageClassification(t.ViTConfig(**SMALL, intermediate_size=40)), t.ViTImageProcessor(size={"height": 16, "width": 16})),
        "deit": lambda: (t.DeiTForImageClassification(t.DeiTConfig(**SMALL, intermediate_size=40)), t.DeiTImageProcessor(size={"height": 20, "width": 20}, crop_size={"height": 16, "width": 16}, do_center_crop=True)),
        "dinov2": lambda: (t.Dinov2ForImageClassification(t.Dinov2Config(**SMALL, mlp_ratio=2)), t.BitImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16})),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = build[name]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name, crop", [("vit", 1.0), ("deit", 0.8), ("dinov2", 0.8)])
def test_networks_of_transformers_go_all_the_way(name, crop, pictures, tmp_path):
    import torch
    from transformers import pipeline

    base, device = of_transformers(name, tmp_path / "base"), ("--device", "cpu")
    done = invoke("advise", base, pictures, "--images", 8, "--steps", 8, "--batch", 8, *device, "--format", "yaml", "--out", tmp_path / "a.yaml")
    assert done.exit_code == 0, done.output
    done = invoke("finetune", base, pictures, "--advice", tmp_path / "a.yaml", "--save", tmp_path / "run", *device)
    assert done.exit_code == 0, done.output
    done = invoke("predict", tmp_path / "run", pictures, "--out", tmp_path / "a.csv", *device)
    assert done.exit_code == 0, done.output
    done = invoke("merge", tmp_path / "run", tmp_path / "whole")
    assert done.exit_code == 0, done.output
    run, frame = vp.load_run(tmp_path / "run"), pd.read_csv(tmp_path / "a.csv")
    assert run.crop == crop and run.classes == ("blue", "red")
    whole = pipeline("image-classification", str(tmp_path / "whole"))
    torch.testing.assert_close(whole.model.classifier.weight, run.model.classifier.weight)
    for row in frame.itertuples():
        said = whole(row.file, top_k=2)
        assert {s["label"] for s in said} == {"blue", "red"}
        # the pixels differ a little, by how each of two libraries resizes
        assert {s["label"]: s["score"] for s in said}[row[2]] == pytest.approx(row.probability, abs=0.05)
    again = vp.load(tmp_path / "whole")
    assert {k: tuple(again.pretrained_cfg[k]) for k in ("mean", "std")} == {k: tuple(run.model.pretrained_cfg[k]) for k in ("mean", "std")}
    assert again.pretrained_cfg["crop_pct"] == pytest.approx(crop)
