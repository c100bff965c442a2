"""The scale of a page: what it computes follows, what its text claims is said and not raised."""
import os
from dataclasses import replace

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient

from vitplast.runs import GPU, PRESETS, Store, all_runs
from vitplast.showing import Caption, Scale, at_scale, counted
from vitplast.showing.scales import PUBLISHED, SCALES, SETTING, durations, rescaled, say_claims

NBS = os.path.join(os.path.dirname(__file__), "../../nbs")


@pytest.mark.parametrize("preset", [p for p in PRESETS if p not in ("paper", "offline")])
def test_a_scale_keeps_what_a_page_names(preset):
    stored = PRESETS[preset]
    assert rescaled(preset, "stored") == rescaled(preset, "offline-cpu") == stored
    smoke, longer = rescaled(preset, "smoke"), rescaled(preset, "offline")
    for old, small, large in zip(stored, smoke, longer, strict=True):
        assert (small.models, small.selections) == (old.models, old.selections)
        large_network = "focus" in old.models[0]
        n = len(small.tasks)
        assert small.tasks == tuple(t for t in old.tasks if t in small.tasks) and (n == min(2, len(old.tasks)) if large_network else n >= min(2, len(old.tasks)))
        assert len(small.lrs) == 1 or not large_network
        of_all = len(replace(small, tasks=old.tasks).runs())
        assert n <= 2 or len(small.runs()) <= 160
        assert large_network or n == len(old.tasks) or of_all > 160  # no task is dropped without need
        assert len(small.seeds) == 1 and len(small.lrs) <= 2 and {*small.lrs} <= {*old.lrs} and small.config.steps < 10 and not small.extend
        assert replace(small, config=old.config, tasks=old.tasks, seeds=old.seeds, lrs=old.lrs, extend=old.extend) == old
        assert replace(large, config=old.config) == old and large.config.steps == GPU.steps
        for name in ("clip_head", "clip", "update", "shots", "head_lr", "optimizer"):
            assert getattr(small.config, name) == getattr(large.config, name) == getattr(old.config, name)


def test_smoke_keeps_tasks_that_the_grids_of_a_network_share():
    first, second = rescaled("places-cpu", "smoke")
    assert first.tasks == second.tasks == ("glyphs", "digits_c/contrast@5")  # the second grid has neither the digits nor all corruptions
    real = [g.tasks for p in ("places-real-cpu", "peft-cpu", "advice-cpu") for g in rescaled(p, "smoke") if "focus" in g.models[0]]
    assert set(real) == {("openclipart", "solar")}


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


def test_claims_are_said_and_the_page_goes_on(capsys):
    shell = InteractiveShell()
    claims = say_claims(shell)
    assert say_claims(shell) is claims and len(shell.ast_transformers) == 1
    shell.run_cell("x = 3\nassert x == 3\nassert x > 5, 'small'\nfor y in (1, 9):\n    assert y > 5\nz = missing\nassert x\nx + 1")
    out = capsys.readouterr().out
    assert "as in the text: 3 of 5" in out and "differs: x > 5\n" in out and "differs: y > 5\n" in out
    assert "not at this scale: z = missing (NameError(" in out and "Out[" in out and ": 4\n" in out
    assert "z" not in shell.user_ns and claims.failed == [] and claims.held == 0
    shell.run_cell("def f(a):\n    assert a\n    return a\nw = f(1)")
    assert capsys.readouterr().out == "as in the text: all of 1\n" and shell.user_ns["w"] == 1
    assert shell.run_cell("missing").success and "not at this scale: missing" in capsys.readouterr().out
    assert shell.run_cell("").success and shell.run_cell("v = 1").success and capsys.readouterr().out == ""
    assert isinstance(shell.run_cell("raise KeyboardInterrupt").error_in_exec, KeyboardInterrupt)


PRETENDS = """
import pathlib, platform
exists = pathlib.Path.exists
pathlib.Path.exists = lambda self, **how: str(self) != "/proc/cpuinfo" and exists(self, **how)
platform.processor = lambda: "NVIDIA Pretended"
"""


def run_at_smoke(folder, notebook):
    "Run a page of experiments at the scale smoke, with empty stores, on a machine that calls itself a GPU; returns what it shows."
    (folder / "experiments").mkdir()
    (folder / "results").symlink_to(os.path.abspath(os.path.join(NBS, "results")))
    (folder / "sitecustomize.py").write_text(PRETENDS)
    environment = {**os.environ, SETTING: "smoke", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    client = NotebookClient(notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(folder / "experiments")}})
    client.execute(env=environment)
    return [o.get("text", "") + o.get("data", {}).get("text/markdown", "") for c in notebook.cells for o in c.get("outputs", []) if o.get("name") != "stderr"]


def test_another_device_is_said_and_stops_nothing(tmp_path):
    "What a page of experiments does, in four cells; the book's own pages are run by the next test."
    cells = [
        'from vitplast.runs import stored_runs, sweep\nfrom vitplast.showing import at_scale\n\nHERE = at_scale("offline-cpu")\nHERE',
        'from dataclasses import replace\n\n(grid,) = HERE.grids("offline-cpu")\ngrid = replace(grid, tasks=("clipart",), selections=("LN1", "head"))\nruns = sweep(grid, HERE.store("some"), progress=False)',
        'assert len(runs) == 24\nassert not any("NVIDIA" in r["device"] for r in stored_runs(HERE.store("some")))\nassert runs.seed.nunique() == 1',
        "len(runs[runs.lr == 0.01]), runs.pivot(index='seed', columns='lr', values='gone')",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    head, said, broken = run_at_smoke(tmp_path, notebook)
    assert "**smoke** | 154 |" in head and "ran at *smoke*" in head
    assert said.startswith("as in the text: 1 of 3\ndiffers: len(runs) == 24\ndiffers: not any(") and broken.startswith("not at this scale: (len(runs")
    records = Store(tmp_path / "results-smoke/some").records()
    assert len(records) == 4 and {r["device"] for r in records.values()} == {"NVIDIA Pretended, 1 threads"}


@pytest.mark.long
@pytest.mark.parametrize("page", ["few", "training", "pairs"])
def test_a_page_runs_through_at_smoke(tmp_path, page):
    shown = run_at_smoke(tmp_path, nbformat.read(os.path.join(NBS, f"experiments/{page}.ipynb"), as_version=4))
    assert any("ran at *smoke*" in t for t in shown) and any("as in the text: " in t for t in shown)
    assert page == "pairs" or any("differs: " in t for t in shown)
