"""Grids: what runs there are, and that a run's key changes with everything it depends on and with nothing else."""
import json
import re
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vitplast as vp
from vitplast.check import published_results
from vitplast.freezing import CHOICES
from vitplast.grid import PRESETS, Grid, RunConfig, all_runs, folder_contents, read_grids
from vitplast.models import SHIPPED
from vitplast.store import key

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
    assert {name: len(all_runs(grids)) for name, grids in PRESETS.items()} == {"paper": 1428, "offline": 1428, "offline-cpu": 616}
    cpu = all_runs(PRESETS["offline-cpu"])
    assert {r.components for r in cpu} == set(CHOICES) == {"LN1", "MHA", "LN2", "FC1", "FC2", "all", "head"}
    assert len({r.task for r in cpu}) == 11 and len({r.config.lr for r in cpu}) == 4 and len({r.config.seed for r in cpu}) == 2


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
    ('{"tasks": ["digits"], "selections": ["MHAA"]}', "unknown components 'MHAA'; nearest known: .'MHA'"),
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
    "model": "formula-vit-tiny", "task": "glyphs", "components": "LN1", "normalisation": "published",
    "lr": 0.2, "seed": 5, "steps": 7, "batch_size": 3, "optimizer": "adamw", "momentum": 0.5, "weight_decay": 0.1, "warmup": 0.2, "clip": 2.0,
    "eval_every": 3, "final_norm": True, "accumulate": 2, "bf16": True, "log_every": 2, "watch": ("MHA",),
}  # fmt: skip


@given(st.sets(st.sampled_from(sorted(CHANGES))))
def test_the_key_knows_every_setting(changed):
    run = RunConfig("formula-vit", "digits", "MHA")
    own = {k: v for k, v in CHANGES.items() if k in changed and k in run.__dataclass_fields__}
    shared = {k: v for k, v in CHANGES.items() if k in changed and k not in own}
    other = replace(run, config=replace(run.config, **shared), **own)
    assert (key(other.identity()) == key(run.identity())) == (not changed)
    assert RunConfig.from_dict(json.loads(json.dumps(asdict(other)))) == other


def test_every_setting_is_among_them():
    assert set(CHANGES) == {*RunConfig.__dataclass_fields__, *vp.FinetuneConfig.__dataclass_fields__} - {"config"}


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


def test_published_normalisation():
    run = RunConfig("formula-vit-tiny", "digits", "MHA")
    own, published = (replace(run, normalisation=n).load_model().pretrained_cfg for n in ("own", "published"))
    assert published["mean"] == (0.485, 0.456, 0.406) and published["std"] == (0.229, 0.224, 0.225) and own["mean"] != published["mean"]
