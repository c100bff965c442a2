"""A made-up store against the published table: what agrees, what differs, what is missing, and what does not count."""
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from vitplast.cli import app
from vitplast.files import key
from vitplast.runs import (
    PRESETS, all_runs, as_line, check, published_results, published_table,
    welch,
)
from vitplast.runs.check import PUBLISHED_MODEL
from vitplast.training import TRAINING_VERSION
from vitplast.training.recipe import NEUTRAL
from vitplast.models import CHOICES

MAIN = [r for r in all_runs(PRESETS["paper"]) if r.model == PUBLISHED_MODEL and r.config.optimizer == "sgd"]


def record(run, test, validation):
    history = {name: [1.0] for name in ("step", "lr", "loss", "grad_norm", "validation_loss", "validation_accuracy")}
    rest = {"best_step": 1, "validation_accuracy": validation, "test_accuracy": test, "diverged": False, "n_trained": 1, "seconds": 1.0, "together": 1}
    return asdict(run) | rest | {"history": history, "training": TRAINING_VERSION}


def write(folder, records):
    "Straight into one compacted file: a thousand small files take a minute to sync."
    folder.mkdir(exist_ok=True)
    lines = [as_line(r, key({"n": i})) for i, r in enumerate(records)]
    (folder / "runs.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    "All 924 runs. Validation likes the rate 1e-2, test the rate 3e-2, which lies five points higher; MHA on pet is far too low."
    rng, tests = np.random.default_rng(0), {}
    published = published_results().set_index(["task", "component"])
    records = []
    for run in MAIN:
        mean, std = published.loc[(run.task, run.components)] if run.components != "head" else (0.5, 0.01)
        test = mean + std * rng.standard_normal() + {1e-2: 0.0, 3e-2: 0.05}.get(run.config.lr, -0.2)
        test -= 0.05 * ((run.task, run.components) == ("pet", "MHA"))
        tests[run.task, run.components, run.config.lr, run.config.seed] = test
        records.append(record(run, test, 0.9 if run.config.lr == 1e-2 else 0.1))
    probe = {"model": PUBLISHED_MODEL, "task": "pet", "normalisation": "published", "probe": "test", "accuracy": 0.88}
    return write(tmp_path_factory.mktemp("paper"), [*records, probe]), tests


def test_every_cell_is_compared_as_scipy_would(made_up):
    folder, tests = made_up
    held = check(folder)
    assert len(held) == 2 * 11 * 7
    for cell in held[held.component != "linear_probe"].itertuples():
        rate = 1e-2 if cell.selection == "validation" else 3e-2
        mine = [v for (t, c, lr, _), v in tests.items() if (t, c, lr) == (cell.task, cell.component, rate)]
        theirs = published_results().query(f"task == '{cell.task}' and component == '{cell.component}'").iloc[0]
        expected = stats.ttest_ind_from_stats(np.mean(mine), np.std(mine, ddof=1), 3, theirs["mean"], theirs["std"], 3, equal_var=False)
        assert (cell.lr, cell.n_seeds) == (rate, 3) and cell.p == pytest.approx(expected.pvalue, rel=1e-6)
        assert cell.verdict == ("agrees" if expected.pvalue >= 0.05 else "differs")
        assert (cell.ci_low + cell.ci_high) / 2 == pytest.approx(cell.difference, abs=1e-12)
    sound = held[held.selection == "validation"].set_index(["task", "component"])
    assert sound.verdict["pet", "MHA"] == "differs" and sound.difference["pet", "MHA"] < -0.04
    assert (sound.verdict == "differs").sum() < 12  # chance gives 3.3 of 66
    assert sound.verdict["pet", "linear_probe"] == "no interval" and sound.verdict["cifar10", "linear_probe"] == "missing"
    optimistic = held[held.selection == "test"].difference.mean() - sound.difference.mean()
    assert optimistic > 0.03


def test_welch_is_scipys():
    rng = np.random.default_rng(1)
    for n, m in ((2, 3), (3, 3), (7, 4)):
        a, b = rng.normal(size=n), rng.normal(size=m) * 3
        for confidence in (0.8, 0.95):
            theirs = stats.ttest_ind(a, b, equal_var=False)
            mine = welch(a.mean(), a.std(ddof=1), n, b.mean(), b.std(ddof=1), m, confidence)
            assert np.allclose(mine, (*theirs.confidence_interval(confidence), theirs.pvalue))
    assert np.isnan(welch(0.5, np.nan, 1, 0.4, 0.1, 3)).all()
    assert welch(0.5, 0.0, 3, 0.5, 0.0, 3) == (0, 0, 1)


def test_only_the_published_settings_count(tmp_path):
    run = next(r for r in MAIN if (r.task, r.components) == ("pet", "MHA"))
    shorter = replace(run, config=replace(run.config, steps=100))
    other = [replace(run, config=replace(run.config, optimizer="adamw")), replace(run, normalisation="own"), replace(run, model="formula-vit"), shorter]
    with pytest.raises(ValueError, match="no run of the published settings in .*vitplast sweep paper.*found 4 others.*pet"):
        check(write(tmp_path / "others", [record(r, 0.5, 0.5) for r in other]))
    neutral = replace(run, config=replace(run.config, accumulate=1, bf16=False, log_every=1, watch=("LN1",), also=("glyphs",)))
    assert set(NEUTRAL) == {"accumulate", "bf16", "log_every", "watch", "also"}
    twice = [record(run, 0.5, 0.5), record(neutral, 0.5, 0.5)]  # one run, computed in two ways
    old = {k: v for k, v in twice[0]["config"].items() if k not in ("clip_head", "head_lr")}  # before there were these
    older = [record(run, 0.9, 0.9) | {"training": 0}, record(run, 0.5, 0.5) | {"config": old}]
    held = check(write(tmp_path / "mixed", [older[0], *twice, record(shorter, 0.9, 0.9), older[1]]), ("validation",))
    (cell,) = held[held.n_seeds > 0].itertuples()
    assert (cell.task, cell.component, cell.n_seeds, cell.mean, cell.verdict) == ("pet", "MHA", 1, 0.5, "no interval")
    assert (held.verdict == "missing").sum() == 76
    with pytest.raises(FileNotFoundError, match="no such store"):
        check(tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


def test_the_published_table_is_that_of_the_package():
    table = published_table()
    assert table.shape == (11, 7) and set(table.columns) == set(CHOICES) - {"head"} | {"linear_probe"}
    means = {k: round(100 * v, 2) for k, v in table.mean().items()}
    assert means == {"MHA": 90.75, "FC1": 90.68, "FC2": 90.31, "LN2": 89.93, "LN1": 89.82, "all": 90.85, "linear_probe": 64.22}


def test_the_command(made_up, tmp_path):
    done = CliRunner().invoke(app, ["check", str(made_up[0]), "--selection", "validation"])
    assert done.exit_code == 0 and "rates chosen on validation" in done.stdout and "rates chosen on test" not in done.stdout
    pet = next(line for line in done.stdout.splitlines() if line.startswith("pet"))
    assert "*" in pet.split("(")[1] + pet.split("(")[2][:8] and "of 66 cells with an interval agree" in done.stdout and "10 are missing" in done.stdout and "points in the median cell" in done.stdout
    as_json = CliRunner().invoke(app, ["check", str(made_up[0]), "--json"])
    assert len(json.loads(as_json.stdout)) == 154
    for args, message in ((["--selection", "tset"], "--selection 'tset': expected one of"), (["--confidence", "2"], "--confidence 2.0")):
        bad = CliRunner().invoke(app, ["check", str(made_up[0]), *args])
        assert bad.exit_code == 1 and message in bad.output
    assert "no such store" in CliRunner().invoke(app, ["check", str(tmp_path / "nothing")]).output
