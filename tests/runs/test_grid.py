"""Grids: what runs there are, and that a run's key changes with everything it depends on and with nothing else."""
import json
import re
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vitplast as vp
from vitplast.files import key, later
from vitplast.models import CHOICES, SHIPPED
from vitplast.runs import (
    Grid, PRESETS, RunConfig, Store, all_runs, published_results, read_grids,
)
from vitplast.data import folder_contents
from vitplast.runs.sweep import of_record
from vitplast.runs.grid import further_rate, next_rate
from vitplast.training.recipe import ALLOWED, COUNT
from vitplast.training import FinetuneConfig

TINY = Grid(("digits", "sketch"), selections=("MHA", "LN1+FC1"), lrs=(0.1, 1), seeds=(0, 7), optimizers=("sgd", "adamw"))


def names(runs):
    return {key(run.identity()) for run in runs}


def test_a_grid_is_a_product():
    runs = TINY.runs()
    assert len(runs) == len(set(runs)) == len(names(runs)) == 2 * 2 * 2 * 2 * 2
    assert [r.config.seed for r in runs] == [0] * 16 + [7] * 16  # stopped half way, every component has a seed
    one = next(r for r in runs if (r.task, r.components, r.config.lr, r.config.seed, r.config.optimizer) == ("sketch", "LN1+FC1", 1, 7, "adamw"))
    assert str(one) == "formula-vit sketch LN1+FC1 adamw lr=1 seed=7"
    assert one.base() == next(r for r in runs if r.task == "sketch").base() and one.base().task == "sketch"
    assert all_runs([TINY, TINY]) == all_runs(TINY) == runs


def test_presets_hold_the_published_grid():
    published = published_results()
    runs = all_runs(PRESETS["paper"])
    assert len(runs) == len(names(runs))
    main = [r for r in runs if r.model == "vit_base_patch16_224.orig_in21k" and r.config.optimizer == "sgd"]
    assert len(main) == 924
    cells = {(r.task, r.components) for r in main}
    assert {t for t, _ in cells} == set(published.task) and len(cells) == 77
    assert {r.config.seed for r in runs} == {0, 42, 3407}
    for cell in cells:
        mine = [r for r in main if (r.task, r.components) == cell]
        assert len(mine) == 12 and len({r.config.lr for r in mine}) == 4 and len({r.config.steps for r in mine}) == 1
    rates = {r.task: sorted({q.config.lr for q in main if q.task == r.task}) for r in main}
    for r in runs:
        assert (r.config.batch_size, r.config.momentum, r.config.clip, r.normalisation) == (512, 0.9, 1.0, "published")
        assert abs(r.config.warmup * r.config.steps - 2000) < 1e-9
        if r.config.optimizer == "adamw":
            assert min(abs(r.config.lr * 100 - lr) for lr in rates[r.task]) < 1e-12
    assert len(runs) - 924 == 2 * 84 + 4 * 84  # two larger models on one task, AdamW on four


def test_presets_differ_in_data_only():
    assert {name: len(all_runs(grids)) for name, grids in PRESETS.items()} == {"paper": 1428, "offline": 1428, "offline-cpu": 924, "offline-cpu-separate": 616, "real-cpu": 328, "twins-cpu": 688, "twins-real-cpu": 101, "places-cpu": 1488, "places-real-cpu": 2175, "adamw-cpu": 132, "advice-cpu": 180, "matched-cpu": 840, "peft-cpu": 660, "unions-cpu": 1020, "few-cpu": 504, "elsewhere-cpu": 84, "ablations-cpu": 784, "dense-cpu": 140, "text-cpu": 192}
    cpu = all_runs(PRESETS["offline-cpu"])
    assert {r.components for r in cpu} == set(CHOICES) == {"LN1", "MHA", "LN2", "FC1", "FC2", "all", "head"}
    assert len({r.task for r in cpu}) == 11 and len({r.config.lr for r in cpu}) == 4 and len({r.config.seed for r in cpu}) == 3
    joint = [r.config.clip_head == "joint" for name in ("paper", "offline", "offline-cpu") for r in all_runs(PRESETS[name])]
    separate = all_runs(PRESETS["offline-cpu-separate"])
    assert all(joint) and {r.config.clip_head for r in separate} == {"separate"} and PRESETS["offline-cpu-separate"][0].extend
    real = all_runs(PRESETS["real-cpu"])
    assert {(r.model, r.size, r.config.bf16) for r in real} == {("focus-vit-small", 70, "auto")} and all(g.extend for g in PRESETS["real-cpu"])
    joint = [r for r in real if r.config.clip_head == "joint"]
    assert len(joint) == 48 and {replace(r, config=replace(r.config, clip_head="separate")) for r in joint} < set(real)
    first = [replace(r, config=replace(r.config, clip_head="separate")) for r in cpu if r.config.seed < 2]
    assert first == separate


def test_json_and_back(tmp_path):
    for grids in PRESETS.values():
        file = tmp_path / "plan.json"
        file.write_text(json.dumps([asdict(g) for g in grids]))
        assert read_grids(file) == grids
        assert names(all_runs(read_grids(file))) == names(all_runs(grids))
    file.write_text(json.dumps({"tasks": ["digits"], "lrs": [1]}))
    assert names(all_runs(read_grids(file))) == names(all_runs(Grid(["digits"], lrs=[1.0])))


@pytest.mark.parametrize("text, match", [
    ("{", "not a list of grids"),
    ('{"tasks": "digits"}', "tasks='digits': expected a list with at least one entry"),
    ('{"task": ["digits"]}', "unknown setting 'task'; nearest known: .'tasks'"),
    ('{"lrs": [0.1]}', "not a list of grids .*tasks"),
    ('{"tasks": ["digts"]}', "unknown task 'digts'; nearest known: .'digits'"),
    ('{"tasks": ["digits"], "models": ["formula-vitt"]}', "unknown model 'formula-vitt'; nearest known: .'formula-vit'"),
    ('{"tasks": ["digits"], "selections": ["MHAA"]}', "selection 'MHAA': 'MHAA' at character 1: expected LN1, .*; nearest: MHA"),
    ('{"tasks": ["digits"], "optimizers": ["adam"]}', "adam"),
    ('{"tasks": ["digits"], "lrs": [-1]}', "-1"),
    ('{"tasks": ["digits"], "lrs": ["0.1"]}', r"lrs=\['0.1'\]: expected numbers"),
    ('{"tasks": ["digits"], "seeds": [0, 0]}', r"seeds=\[0, 0\]: expected each entry once"),
    ('{"tasks": ["digits"], "config": {"stepps": 3}}', "stepps.*steps"),
    ('{"tasks": ["digits"], "normalisation": "paper"}', "unknown normalisation 'paper'.*published"),
])  # fmt: skip
def test_what_is_wrong_in_a_plan(tmp_path, text, match):
    file = tmp_path / "plan.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{file}: not a list of grids (")) as error:
        read_grids(file)
    assert re.search(match, str(error.value)), error.value


CHANGES = {
    "model": "test_vit", "task": "glyphs", "components": "LN1", "size": 70, "normalisation": "published",
    "lr": 0.2, "seed": 5, "steps": 7, "batch_size": 3, "optimizer": "adamw", "momentum": 0.5, "weight_decay": 0.1, "warmup": 0.2, "clip": 2.0,
    "eval_every": 3, "final_norm": True, "accumulate": 2, "bf16": True, "log_every": 2, "watch": ("MHA",),
    "clip_head": "joint", "head_lr": 0.5, "patience": 2, "class_weights": True, "update": "lora:4", "shots": 3, "also": ("glyphs",),
}  # fmt: skip


@given(st.sets(st.sampled_from(sorted(CHANGES))))
def test_the_key_knows_every_setting(changed):
    run = RunConfig("focus-vit-small", "digits", "MHA")
    own = {k: v for k, v in CHANGES.items() if k in changed and k in run.__dataclass_fields__}
    shared = {k: v for k, v in CHANGES.items() if k in changed and k not in own}
    other = replace(run, config=replace(run.config, **shared), **own)
    assert (key(other.identity()) == key(run.identity())) == (not changed)
    assert RunConfig.from_record(json.loads(json.dumps(asdict(other)))) == other


def test_every_setting_is_among_them():
    assert set(CHANGES) == {*RunConfig.__dataclass_fields__, *vp.FinetuneConfig.__dataclass_fields__} - {"config"}


def test_a_size_that_is_the_models_own_is_left_out():
    for model, own, other in (("formula-vit", 32, None), ("focus-vit-small", 224, 70), ("vit_tiny_patch16_224", 224, 64)):
        run = RunConfig(model, "digits", "MHA")
        assert "size" not in run.identity() and RunConfig(model, "digits", "MHA", size=own) == run
        if other:
            assert RunConfig(model, "digits", "MHA", size=other).identity() == run.identity() | {"size": other}
    for model, size, message in (("formula-vit", 64, "formula-vit takes images of 32 pixels"), ("focus-vit-small", 71, "takes multiples of 14 pixels; nearest: .70, 84."), ("formula-vit", 0, "expected a positive integer"), ("formula-vit", True, "expected a positive integer")):
        with pytest.raises(ValueError, match=f"size={size}: .*{message}"):
            vp.Grid(("digits",), models=(model,), size=size)


def test_runs_of_another_size_are_not_pooled():
    at_70, at_98 = (of_record(json.loads(json.dumps(RunConfig("focus-vit-small", "digits", "MHA", size=s).identity()))) for s in (70, 98))
    assert at_70["recipe"] != at_98["recipe"]


def test_the_key_knows_the_weights(tmp_path):
    file = tmp_path / "mine.safetensors"
    contents = bytearray((SHIPPED / "formula-vit-tiny.safetensors").read_bytes())
    file.write_bytes(contents)
    run = RunConfig(str(file), "digits", "MHA")
    before = key(run.identity())
    assert key(run.identity()) == before
    contents[-1] ^= 1
    file.write_bytes(contents)
    assert key(run.identity()) != before


def test_the_key_knows_the_images_of_a_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.png").write_bytes(b"12")
    run = RunConfig("formula-vit", str(tmp_path), "MHA")
    before = key(run.identity())
    (tmp_path / "a/2.png").write_bytes(b"1")
    folder_contents.cache_clear()
    assert key(run.identity()) != before


def test_a_file_overwritten_with_as_many_bytes_is_another_task(tmp_path):
    "Sizes and names are the same; within one tick of the file system's clock the note in the cache must not be believed."
    file, seen = tmp_path / "a/1.png", set()
    file.parent.mkdir()
    for contents in (b"12", b"21", b"33"):
        file.write_bytes(contents)
        folder_contents.cache_clear()
        seen.add(folder_contents(tmp_path))
    assert len(seen) == 3


def test_contents_of_a_folder_are_read_once(tmp_path, monkeypatch):
    from vitplast.data import folders

    read = []
    monkeypatch.setattr(folders, "SETTLED", 0.0)
    monkeypatch.setattr(folders, "fingerprint", lambda file: read.append(file.name) or "0" * 12)
    for name in ("a.png", "b.jpg", "notes.txt", "._a.png"):
        (tmp_path / name).write_bytes(b"1")
    for _ in range(3):
        folder_contents.cache_clear()
        folder_contents(tmp_path)
    assert sorted(read) == ["a.png", "b.jpg"]
    (tmp_path / "b.jpg").write_bytes(b"22")
    folder_contents.cache_clear()
    folder_contents(tmp_path)
    assert read[2:] == ["b.jpg"]


def test_two_spellings_of_a_folder_or_a_file_are_one_run(tmp_path, monkeypatch):
    here = tmp_path / "pictures"
    (here / "a").mkdir(parents=True)
    (here / "a/1.png").write_bytes(b"12")
    (tmp_path / "mine.safetensors").write_bytes((SHIPPED / "formula-vit-tiny.safetensors").read_bytes())
    monkeypatch.chdir(tmp_path)
    spellings = [here, "pictures", "./pictures/", f"{here}/", "pictures/../pictures"]
    runs = [RunConfig(str(m), s, "MHA") for m in ("mine.safetensors", tmp_path / "mine.safetensors") for s in spellings]
    assert len(set(runs)) == 1 == len(names(runs))
    (tmp_path / "moved").mkdir()
    shutil.copytree(here, tmp_path / "moved/pictures")  # the same pictures elsewhere
    assert names([RunConfig("mine.safetensors", "moved/pictures", "MHA")]) == names(runs[:1])
    (tmp_path / "moved/pictures/a/1.png").write_bytes(b"21")
    assert names([RunConfig("mine.safetensors", "moved/pictures", "MHA")]) == names(runs[:1]), "known until a sweep begins"
    folder_contents.cache_clear()
    assert names([RunConfig("mine.safetensors", "moved/pictures", "MHA")]) != names(runs[:1])


@pytest.mark.parametrize("one, other", [
    ("MHA+FC1", "FC1+MHA"), ("mha", "MHA"), ("MHA+head", "MHA"), ("FC1@-2:", "FC1@2:4"), ("MHA@0:4", "MHA"),
    ("MHA.q+MHA.k+MHA.v", "MHA.qkv"), ("blocks.1.attn", "MHA@1"), ("head+head", "head"),
])  # fmt: skip
def test_texts_that_mean_the_same_are_one_run(one, other):
    runs = [RunConfig("formula-vit-tiny", "digits", text) for text in (one, other)]
    assert runs[0] == runs[1] and len(names(runs)) == 1


STORES = [Path(__file__).parents[2] / "nbs/results" / name for name in ("offline-cpu", "offline-cpu-separate")]


@dataclass(frozen=True)
class Grown(FinetuneConfig):
    "A configuration of the future: a setting that stood for 1 before it existed."

    dummy: int = later(3, before=1)


@pytest.mark.parametrize("folder", STORES, ids=lambda p: p.name)
def test_a_setting_that_comes_later_orphans_no_record(folder, monkeypatch):
    monkeypatch.setitem(ALLOWED, "dummy", COUNT)
    records = Store(folder).records()
    runs = {k: RunConfig.from_record(r) for k, r in records.items() if "history" in r}
    assert len(runs) >= 300 and all(key(run.identity()) == k for k, run in runs.items())
    for k, run in list(runs.items())[::25]:
        old = replace(run, config=Grown.from_record(records[k]["config"]))
        new = replace(run, config=replace(old.config, dummy=3))
        assert old.config.dummy == 1 and key(old.identity()) == k != key(new.identity())


def test_a_path_is_a_folder_and_a_head_that_is_fixed_does_not_train(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert RunConfig("formula-vit-tiny", "digits", "MHA").task == "digits"
    assert RunConfig("formula-vit-tiny", Path("digits"), "MHA").task == str(tmp_path / "digits")
    with pytest.raises(ValueError, match="selection 'head' with head_lr=0: nothing would train"):
        RunConfig("formula-vit-tiny", "digits", "head", FinetuneConfig(head_lr=0))


def test_stored_runs_were_clipped_jointly_and_say_so():
    for folder, clip in zip(STORES, ("joint", "separate")):
        found = {r["config"]["clip_head"] for r in Store(folder).records().values() if "history" in r}
        assert found == {clip}


def test_rates_go_on_in_their_own_ratio():
    assert [next_rate((0.01, 0.03, 0.1, 0.3), up) for up in (True, False)] == [1.0, 0.003]
    assert [next_rate((1e-3, 4e-3, 1.6e-2), up) for up in (True, False)] == [0.064, 0.00025]
    assert next_rate((0.1, 0.2), True) == 0.4 and next_rate((0.1, 0.2), False) == 0.05
    with pytest.raises(ValueError, match="at least two"):
        next_rate((0.1,), True)


@given(st.lists(st.sampled_from([0.001, 0.003, 0.01, 0.03, 0.1, 0.3]), min_size=2, max_size=6, unique=True), st.integers(-12, 12))
def test_extension_ends_where_the_best_rate_is_inside_or_after_four_rates(rates, peak):
    "For an accuracy with its peak anywhere: the best rate ends inside, or four rates were added on one side."
    given_rates, tried = sorted(rates), sorted(rates)
    accuracy = lambda lr: -abs(np.log10(lr) * 2 - peak)
    while (rate := further_rate(given_rates, tried, max(tried, key=accuracy))) is not None:
        assert rate not in tried and (rate > max(tried) or rate < min(tried))
        tried.append(rate)
    below, above = (sum(r < given_rates[0] for r in tried), sum(r > given_rates[-1] for r in tried))
    best = max(tried, key=accuracy)
    assert below <= 4 and above <= 4
    assert min(tried) < best < max(tried) or best == min(tried) and below == 4 or best == max(tried) and above == 4


def test_published_normalisation():
    run = RunConfig("formula-vit-tiny", "digits", "MHA")
    own, published = (replace(run, normalisation=n).load_model().pretrained_cfg for n in ("own", "published"))
    assert published["mean"] == (0.485, 0.456, 0.406) and published["std"] == (0.229, 0.224, 0.225) and own["mean"] != published["mean"]


def test_a_grid_names_twins():
    grid = Grid(("digits",), ("formula-vit-tiny", "formula-vit-tiny*LN1=8"), ("LN1",), (0.1,), (0,))
    one, two = grid.runs()
    assert one.identity()["weights"] == two.identity()["weights"] and one.identity() != two.identity()
    assert torch.equal(two.load_model().blocks[0].norm1.weight, 8 * one.load_model().blocks[0].norm1.weight)
    with pytest.raises(ValueError, match="expected LN1=8"):
        Grid(("digits",), ("formula-vit-tiny*LN1=8.0",))
