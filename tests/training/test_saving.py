"""A saved run: the same logits to the last bit on every architecture, refused upon other weights, damaged files named."""
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from architectures import HEADED, SEQUENCES, build
from conftest import tiny_vit
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

import vitplast as vp
from vitplast.models import anatomy, prepare
from vitplast.training import confusion, finetune_many, merge, per_class, predict

CONFIG = vp.FinetuneConfig(steps=4, eval_every=2, batch_size=8, lr=0.05)
ABOUT = {"mean": (0.5,) * 3, "std": (0.25,) * 3}


def headed(seed=0, **kwargs):
    "A small network that says how its pictures are normalised."
    model = tiny_vit(seed, num_classes=3, **kwargs)
    model.pretrained_cfg = dict(ABOUT)
    return model


@pytest.fixture
def run(stripes):
    return vp.finetune(headed(), stripes, "MHA@1+LN1", CONFIG)


@pytest.mark.parametrize("name", [n for n in HEADED if n not in SEQUENCES])
def test_every_architecture_comes_back_to_the_last_bit(stripes, tmp_path, name):
    model = build(name)
    model.pretrained_cfg = dict(getattr(model, "pretrained_cfg", {})) | ABOUT
    run = vp.finetune(model, stripes, "FC1@-1+LN1", CONFIG)
    again = vp.load_run(run.save(tmp_path / "run"), model)
    x = prepare(run.model, stripes.test.images)
    with torch.no_grad():
        assert torch.equal(anatomy(run.model).logits(x), anatomy(again.model).logits(x))
    kept = set(load_file(tmp_path / "run/trained.safetensors"))
    weights = {n for n, _ in model.named_parameters()}
    assert kept & weights == {n for n in run.replaced} | (anatomy(run.model).head().keys() & weights)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), build(name).parameters()))  # left alone


@pytest.mark.parametrize("what", ["all", "head", "MHA.v@0", "FC1.bias"])
def test_every_selection_comes_back(stripes, tmp_path, what):
    run = vp.finetune(headed(), stripes, what, CONFIG)
    again = vp.load_run(run.save(tmp_path), headed())
    assert all(torch.equal(p, q) for p, q in zip(run.model.state_dict().values(), again.model.state_dict().values()))
    pd.testing.assert_frame_equal(again.history, run.history, check_exact=True)
    same = ("task", "components", "config", "classes", "crop", "replaced", "best_step", "validation_accuracy", "test_accuracy", "diverged", "n_trained", "seconds", "bf16")
    assert all(getattr(again, name) == getattr(run, name) for name in same)


def test_a_head_that_is_fitted_and_the_last_norm_come_back(stripes, tmp_path):
    for name, changes in (("a", {"head_lr": 0}), ("b", {"final_norm": True})):
        run = vp.finetune(headed(), stripes, "LN2", vp.FinetuneConfig(steps=2, eval_every=2, batch_size=8, **changes))
        again = vp.load_run(run.save(tmp_path / name), headed())
        assert all(torch.equal(p, q) for p, q in zip(run.model.state_dict().values(), again.model.state_dict().values()))


def test_runs_that_were_trained_together_are_saved_alike(stripes, tmp_path):
    configs = [vp.FinetuneConfig(steps=2, eval_every=2, batch_size=8, lr=lr) for lr in (0.01, 0.1)]
    for i, run in enumerate(finetune_many(headed(), stripes, "FC2@0", configs)):
        again = vp.load_run(run.save(tmp_path / str(i)), headed())
        assert all(torch.equal(p, q) for p, q in zip(run.model.state_dict().values(), again.model.state_dict().values()))
        assert set(again.replaced) == {"blocks.0.mlp.fc2.weight", "blocks.0.mlp.fc2.bias"}


@pytest.mark.parametrize("name", ["blocks.0.mlp.fc1.weight", "blocks.1.attn.qkv.weight", "norm.bias", "cls_token"])
def test_another_base_is_refused_also_where_it_trained(run, tmp_path, name):
    model = headed()
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[0] += 1e-12
    with pytest.raises(ValueError, match=f"1 of .* others, first {name}"):
        vp.load_run(run.save(tmp_path), model)


def test_bases_that_are_no_such_network(run, tmp_path):
    run.save(tmp_path)
    with pytest.raises(ValueError, match="has no blocks.1.norm1.weight"):
        vp.load_run(tmp_path, headed(depth=1))
    with pytest.raises(ValueError, match="others, first"):
        vp.load_run(tmp_path, headed(embed_dim=24))
    with pytest.raises(ValueError, match=r"not loaded by name: expected it, in Python, as vp.load_run\(folder, model\)"):
        vp.load_run(tmp_path)
    with pytest.raises(TypeError, match="is a str: expected a network"):
        vp.load_run(tmp_path, "formula-vit")


def test_a_network_that_was_loaded_by_name_is_loaded_again(tmp_path):
    task, model = vp.task("digits_plain", size=32), vp.load("formula-vit*LN1=8")
    run = vp.finetune(model, task, "LN1@5", vp.FinetuneConfig(steps=1, eval_every=1))
    again = vp.load_run(run.save(tmp_path))
    assert again.model.loaded_as == ("formula-vit*LN1=8", {})
    pd.testing.assert_frame_equal(again.predict(task), run.predict(task))


def test_damaged_files_are_named(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="no saved run, expected run.json and trained.safetensors"):
        vp.load_run(tmp_path / "none", headed())
    run.save(tmp_path / "a")
    tensors, note = tmp_path / "a/trained.safetensors", tmp_path / "a/run.json"
    whole, text = tensors.read_bytes(), note.read_text()
    tensors.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        vp.load_run(tmp_path / "a", headed())
    tensors.write_bytes(whole)
    note.write_text("{")
    with pytest.raises(ValueError, match="not the note of a run"):
        vp.load_run(tmp_path / "a", headed())
    note.write_text(json.dumps(json.loads(text) | {"format": 99}))
    with pytest.raises(ValueError, match="format 99.* reads 1"):
        vp.load_run(tmp_path / "a", headed())


@pytest.mark.parametrize("folder", [5, None, ["a"], b"a"])
def test_what_is_no_folder_is_named(folder):
    with pytest.raises(TypeError, match=f"is a {type(folder).__name__}: expected the folder of a saved run"):
        vp.load_run(folder)


def test_a_base_that_has_moved_is_named_with_the_ways_out(tmp_path):
    from vitplast.models import ViTConfig, build, save

    config = ViTConfig(size=32, width=24, depth=2)
    save(build(config), config, tmp_path / "base.safetensors")
    model = vp.load(tmp_path / "base.safetensors")
    run = vp.finetune(model, vp.task("digits_plain", size=32), "LN1", vp.FinetuneConfig(steps=1, eval_every=1))
    folder = run.save(tmp_path / "run")
    (tmp_path / "base.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.raises(ValueError, match=r"base.safetensors, which is not found .*--model, or in Python as vp.load_run\(folder, model\)"):
        vp.load_run(folder)
    assert vp.load_run(folder, vp.load(tmp_path / "moved.safetensors")).components == run.components


def test_nothing_is_overwritten_unasked(run, tmp_path):
    run.save(tmp_path / "a")
    with pytest.raises(ValueError, match="holds a run already"):
        run.save(tmp_path / "a")
    run.save(tmp_path / "a", overwrite=True)
    (tmp_path / "b").write_text("")
    with pytest.raises(ValueError, match="found a file"):
        run.save(tmp_path / "b")


def test_the_card_says_what_was_trained(run, tmp_path):
    text = (run.save(tmp_path) / "README.md").read_text()
    top = text.split("---")[1]
    assert "library_name: vitplast" in top and "pipeline_tag: image-classification" in top
    assert run.components in text and f"{run.test_accuracy:.1%}" in text and f"{run.n_trained:,}" in text


def test_predictions_are_softmax_of_pictures_prepared_by_hand(run, stripes, tmp_path):
    draw, files = np.random.default_rng(0), []
    for i, (w, h) in enumerate([(40, 20), (16, 16), (17, 33)]):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(draw.integers(0, 255, (h, w, 3), dtype=np.uint8)).save(files[-1])
    found = predict(run, tmp_path, every_class=True, batch=2)
    assert found.file.tolist() == list(map(str, files)) and "label" not in found
    for row, file in zip(found.itertuples(), files):
        image = Image.open(file)
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        image = image.resize((16, 16), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        x = (torch.tensor(np.array(image)).permute(2, 0, 1).double() / 255 - 0.5) / 0.25
        with torch.no_grad():
            exact = run.model(x[None]).softmax(1)[0]
        assert row.probability == pytest.approx(exact.max().item(), rel=1e-5)
        assert row[2] == run.classes[exact.argmax()]
        assert list(row[4:]) == pytest.approx(exact.tolist(), rel=1e-5)
    images = [Image.open(f) for f in files]
    assert predict(run, images).probability.tolist() == found.probability.tolist()
    assert predict(run, files[1]).probability.tolist() == found.probability.tolist()[1:2]
    assert predict(run, np.array(images[1])).probability.tolist() == found.probability.tolist()[1:2]


def test_folders_called_like_classes_are_labels(run, stripes, tmp_path):
    for i in range(6):
        place = tmp_path / run.classes[stripes.test.labels[i]]
        place.mkdir(exist_ok=True)
        Image.fromarray(stripes.test.images[i].permute(1, 2, 0).numpy()).save(place / f"{i}.png")
    found = predict(run, tmp_path).set_index("file")
    task = predict(run, stripes)
    for file, row in found.iterrows():
        i = int(file[-5])
        assert row["class"] == task["class"][i] and row["label"] == task["label"][i]
        assert row["probability"] == pytest.approx(task["probability"][i], rel=1e-6)
    table = confusion(run, tmp_path)
    assert table.to_numpy().sum() == 6
    (tmp_path / "other").mkdir()
    (tmp_path / "other/1.png").write_bytes((tmp_path / run.classes[0]).glob("*.png").__next__().read_bytes())
    with pytest.raises(ValueError, match="'other', none of"):
        predict(run, tmp_path)
    with pytest.raises(ValueError, match="classes are not known"):
        confusion(run, tmp_path / "other")


def test_confusion_against_scikit_learn(run, stripes):
    frame, table = predict(run, stripes), confusion(run)
    np.testing.assert_array_equal(table, confusion_matrix(frame["label"], frame["class"], labels=list(run.classes)))
    precision, recall, _, n = precision_recall_fscore_support(frame["label"], frame["class"], labels=list(run.classes), zero_division=np.nan)
    found = per_class(table)
    np.testing.assert_allclose(found[["precision", "recall", "pictures"]].to_numpy(float).T, [precision, recall, n])
    assert np.diag(table).sum() / len(frame) == run.test_accuracy


def test_pictures_that_cannot_be_read(run, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no picture")
    with pytest.raises(ValueError, match="bad.png: not a readable image.*skip_corrupt=True"):
        predict(run, tmp_path)
    with pytest.warns(UserWarning, match="1 of 2 pictures cannot be read, first .*bad.png"):
        assert predict(run, tmp_path, skip_corrupt=True).file.tolist() == [str(tmp_path / "good.png")]
    with pytest.raises(FileNotFoundError, match="no such picture"):
        predict(run, tmp_path / "nowhere")
    with pytest.raises(TypeError, match="pictures=3 is a int: expected a file, a folder, a list of pictures, or a task"):
        run.predict(3)
    with pytest.raises(TypeError, match="picture 1 is a int"):
        predict(run, [tmp_path / "good.png", 3])
    with pytest.raises(ValueError, match="batch=0"):
        predict(run, tmp_path, batch=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        predict(run, tmp_path / "empty")


def test_a_run_from_a_folder_has_no_test_pictures(run, tmp_path):
    with pytest.raises(ValueError, match="has no test pictures"):
        vp.load_run(run.save(tmp_path), headed()).confusion()


def test_merged_for_timm_and_transformers(stripes, tmp_path):
    from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

    model = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=0)
    run = vp.finetune(model, stripes, "LN1", CONFIG)
    back = timm.create_model(f"local-dir:{merge(run, tmp_path / 'timm')}", pretrained=True).eval()
    x = prepare(run.model, stripes.test.images)
    assert torch.equal(back(x), run.model(x))
    assert json.loads((tmp_path / "timm/config.json").read_text())["label_names"] == list(run.classes)
    with pytest.raises(ValueError, match="empty or a new folder"):
        merge(run, tmp_path / "timm")
    config = ViTConfig(hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=24, image_size=16, patch_size=8)
    model = ViTForImageClassification(config).eval()
    model.pretrained_cfg = dict(ABOUT)
    run = vp.finetune(model, stripes, "MHA", CONFIG)
    back = AutoModelForImageClassification.from_pretrained(merge(run, tmp_path / "hf")).eval()
    x = prepare(run.model, stripes.test.images)
    assert torch.equal(back(x).logits, run.model(x).logits)
    assert back.config.id2label == dict(enumerate(run.classes))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf")
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in stripes.test.images]
    torch.testing.assert_close(processor(pictures, return_tensors="pt").pixel_values, x.float(), atol=1e-6, rtol=0)


def test_a_network_without_a_name_is_not_merged(run, tmp_path):
    with pytest.raises(ValueError, match="no architecture that timm or transformers build by name"):
        merge(run, tmp_path / "x")


def test_tensors_and_note_of_two_runs_are_told_apart(run, stripes, tmp_path):
    other = vp.finetune(headed(), stripes, "MHA@1+LN1", vp.FinetuneConfig(steps=2, eval_every=2, batch_size=8, lr=0.01))
    run.save(tmp_path / "a")
    other.save(tmp_path / "b")
    (tmp_path / "a/trained.safetensors").write_bytes((tmp_path / "b/trained.safetensors").read_bytes())
    with pytest.raises(ValueError, match="of two runs, .* differs"):
        vp.load_run(tmp_path / "a", headed())
    vp.finetune(headed(), stripes, "LN1", CONFIG).save(tmp_path / "c")
    (tmp_path / "a/trained.safetensors").write_bytes((tmp_path / "c/trained.safetensors").read_bytes())
    with pytest.raises(ValueError, match="of two runs, .* is in one"):
        vp.load_run(tmp_path / "a", headed())
    note = json.loads((tmp_path / "a/run.json").read_text())
    del note["trained"]
    (tmp_path / "a/run.json").write_text(json.dumps(note))
    with pytest.raises(ValueError, match="not the note of a run"):
        vp.load_run(tmp_path / "a", headed())


def test_hidden_files_do_not_count(run, tmp_path):
    "What a killed process was writing, and the Finder's notes."
    for name in (".unfinished.safetensors.ab12", ".DS_Store"):
        (tmp_path / name).write_bytes(b"")
    assert (run.save(tmp_path) / "run.json").exists()


def test_a_folder_with_other_files_is_left_alone(run, tmp_path):
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(ValueError, match="holds 'picture.png', expected an empty or a new folder"):
        run.save(tmp_path)


def test_the_task_of_other_classes_is_refused(run, stripes):
    with pytest.raises(ValueError, match="has classes"):
        predict(run, replace(stripes, classes=("a", "b")))
