"""The scale of a page: what it computes follows, what its text claims is said and not raised."""
import json
import os
import shutil
from dataclasses import replace

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient

from vitplast.runs import PRESETS, Store, all_runs
from vitplast.showing import Caption, Scale, at_scale, counted
from vitplast.showing.scales import GPU, PUBLISHED, SCALES, SETTING, durations, rescaled, say_claims

NBS = os.path.join(os.path.dirname(__file__), "../../nbs")


@pytest.mark.parametrize("preset", [p for p in PRESETS if p not in ("paper", "offline")])
def test_a_scale_keeps_what_a_page_names(preset):
    stored = PRESETS[preset]
    assert rescaled(preset, "stored") == rescaled(preset, "offline-cpu") == stored
    smoke, longer = rescaled(preset, "smoke"), rescaled(preset, "offline")
    for old, small, large in zip(stored, smoke, longer, strict=True):
        assert (small.tasks, small.models, small.selections) == (old.tasks, old.models, old.selections)
        assert len(small.seeds) == 1 and len(small.lrs) <= 2 and {*small.lrs} <= {*old.lrs} and small.config.steps < 10 and not small.extend
        assert replace(small, config=old.config, seeds=old.seeds, lrs=old.lrs, extend=old.extend) == old
        assert replace(large, config=old.config) == old and large.config.steps == GPU.steps
        for name in ("clip_head", "clip", "update", "shots", "head_lr", "optimizer"):
            assert getattr(small.config, name) == getattr(large.config, name) == getattr(old.config, name)


def test_the_scales_of_a_gpu_are_the_presets_of_the_command_line():
    assert set(all_runs(rescaled("offline-cpu", "offline"))) < set(all_runs(PRESETS["offline"]))
    published = [*rescaled("offline-cpu", "paper"), *rescaled("ablations-cpu", "paper"), *rescaled("adamw-cpu", "paper")]
    assert all_runs(published) == all_runs(PRESETS["paper"])
    apart = all_runs(rescaled("offline-cpu-separate", "paper"))
    assert {replace(r, config=replace(r.config, clip_head="joint")) for r in apart} == set(all_runs(PUBLISHED["offline-cpu"]))


def test_a_scale_that_is_not_is_named(monkeypatch):
    monkeypatch.setenv(SETTING, "smoek")
    with pytest.raises(ValueError, match="VITPLAST_SCALE 'smoek'.*smoke"):
        at_scale("unions-cpu")
    monkeypatch.setenv(SETTING, "paper")
    with pytest.raises(ValueError, match="'unions-cpu' has no published counterpart"):
        at_scale("unions-cpu")
    monkeypatch.setenv(SETTING, "smoke")
    with pytest.raises(ValueError, match="in a notebook"):
        at_scale("unions-cpu")
    monkeypatch.delenv(SETTING)
    here = at_scale("unions-cpu")
    assert (here.name, here.results, here.few(128)) == ("stored", "../results", 128)


def test_folders_of_scales_are_apart(tmp_path, monkeypatch):
    (tmp_path / "page").mkdir()
    monkeypatch.chdir(tmp_path / "page")
    assert len({Scale(s).store("unions") for s in SCALES}) == len(SCALES)
    here = Scale("offline")
    assert here.measured("depth") == "../results/depth" and Scale("paper").measured("depth") == "../results-paper/depth"
    Store(here.store("depth")).put({"a": 1}, {"a": 1})
    assert here.measured("depth") == "../results-offline/depth"


def test_counts_are_words_and_captions_are_set_apart():
    assert [counted(n, "seed") for n in (0, 1, 12, 13, 1848)] == ["no seeds", "one seed", "twelve seeds", "13 seeds", "1,848 seeds"]
    assert Caption("a caption")._repr_markdown_() == "*a caption*"


def test_time_grows_with_steps_and_large_networks_on_gpus_are_not_guessed(monkeypatch):
    monkeypatch.chdir(os.path.join(NBS, "experiments"))
    one = [all_runs(rescaled("offline-cpu", s))[0] for s in ("smoke", "stored", "offline", "paper")]
    core, gpu = zip(*(durations([run]) for run in one))
    assert core[0] < core[1] < core[2] < core[3] and gpu[0] < gpu[1] < gpu[2] and gpu[3] is None
    assert durations(one[:2]) == pytest.approx([core[0] + core[1], gpu[0] + gpu[1]])


def test_claims_are_said_and_nothing_else_is_caught(capsys):
    shell = InteractiveShell()
    claims = say_claims(shell)
    assert say_claims(shell) is claims and len(shell.ast_transformers) == 1
    shell.run_cell("x = 3\nassert x == 3\nassert x > 5, 'small'\nfor y in (1, 9):\n    assert y > 5\nz = missing\nassert x\nx")
    out = capsys.readouterr().out
    assert "as in the text: 3 of 6" in out and "differs: x > 5\n" in out and "differs: y > 5\n" in out and "missing'" in out
    assert "Out[" in out or "3\n" in out  # the last expression is shown
    shell.run_cell("w = 1")
    assert capsys.readouterr().out == "" and shell.user_ns["w"] == 1
    result = shell.run_cell("missing")  # not a check: as ever
    assert isinstance(result.error_in_exec, NameError)


PRETENDS = """
import pathlib, platform
exists = pathlib.Path.exists
pathlib.Path.exists = lambda self, **how: str(self) != "/proc/cpuinfo" and exists(self, **how)
platform.processor = lambda: "NVIDIA Pretended"
"""


@pytest.mark.long
def test_a_page_runs_through_on_another_device_and_leaves_the_book_alone(tmp_path):
    "Every cell of a page at the scale smoke, with an empty store, on a machine that calls itself a GPU."
    (tmp_path / "experiments").mkdir()
    shutil.copytree(os.path.join(NBS, "results"), tmp_path / "results", ignore=lambda d, names: [n for n in names if n in ("places", "few", "elsewhere")])
    (tmp_path / "sitecustomize.py").write_text(PRETENDS)
    notebook = nbformat.read(os.path.join(NBS, "experiments/few.ipynb"), as_version=4)
    environment = {**os.environ, SETTING: "smoke", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    client = NotebookClient(notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(tmp_path / "experiments")}})
    client.execute(env=environment)
    texts = [o.get("text", "") + o.get("data", {}).get("text/markdown", "") for c in notebook.cells for o in c.get("outputs", [])]
    assert any("ran at *smoke*" in t for t in texts) and any("as in the text: " in t for t in texts) and any("differs: " in t for t in texts)
    grids = rescaled("few-cpu", "smoke")
    records = Store(tmp_path / "results-smoke/few").records()
    assert len(records) == len(all_runs(grids)) and {r["device"] for r in records.values()} == {"NVIDIA Pretended, 1 threads"}
    assert not (tmp_path / "results/few").exists() and json.loads(json.dumps(notebook.metadata))
