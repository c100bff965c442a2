"""How criteria are judged, against enumeration, residuals and numpy; what a budget buys, against its definition."""
import json
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import tiny_vit
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from vitplast.choosing import budgeted, chance, correlation, gains, greedy, kinds_of, lost_by, mean_interval, partial_correlation, place_sizes, regrets, score_table, scores, short_runs, standing, together
from vitplast.models import KINDS, Selection, anatomy
from vitplast.runs import run_frame, stored_runs

PLACES = [f"{kind}@{block}" for block in range(3) for kind in KINDS]


def random_places(seed, n=None):
    "A number for every place."
    values = np.random.default_rng(seed).normal(size=len(PLACES))
    return pd.Series(values, PLACES)[: n or len(PLACES)]


def ranks(v):
    "Ranks of numbers without ties."
    return np.argsort(np.argsort(np.asarray(v))).astype(float)


def test_correlation_is_pearsons_of_ranks_where_there_are_numbers():
    v, g = random_places(0), random_places(1)
    assert correlation(v, g) == pytest.approx(np.corrcoef(ranks(v), ranks(g))[0, 1])
    some = v.where(kinds_of(PLACES).ne("LN1"))
    kept = some.dropna().index
    assert correlation(some, g) == pytest.approx(np.corrcoef(ranks(v[kept]), ranks(g[kept]))[0, 1])
    assert correlation(v * 0, g) == 0 and np.isnan(correlation(v[:2], g))


def test_regrets_are_means_over_all_ways_to_break_ties():
    v, g = pd.Series([2.0, 2, 1, 1, 0], PLACES[:5]), random_places(2, 5)
    orders = [a + b + (4,) for a in permutations((0, 1)) for b in permutations((2, 3))]
    exact = np.mean([(g.max() - g.iloc[o[0]], g.max() - g.iloc[list(o[:3])].max()) for o in orders], 0)
    np.testing.assert_allclose(regrets(v, g, rounds=4000), exact, atol=0.04)
    assert regrets(v, g)[0] == pytest.approx(exact[0])
    seen = random_places(7, 5)
    by_seen = np.mean([g.max() - g[seen.iloc[list(o[:3])].idxmax()] for o in orders])
    assert regrets(v, g, seen, 4000)[1] == pytest.approx(by_seen, abs=0.04)
    first, three = regrets(random_places(3), random_places(4))
    best = random_places(3).sort_values(ascending=False).index
    assert first == random_places(4).max() - random_places(4)[best[0]]
    assert three == random_places(4).max() - random_places(4)[best[:3]].max()


def test_a_place_that_is_not_ranked_is_never_chosen():
    g = pd.Series([9.0, 1, 2, 3], ["LN1@0", "MHA@0", "FC1@0", "FC2@0"])
    v = pd.Series([np.nan, 3, 2, 1], g.index)
    assert regrets(v, g) == (8.0, 6.0)


def test_chance_is_the_mean_over_all_choices():
    g = random_places(5, 9)
    found = chance(g)
    assert found["first"] == pytest.approx(np.mean([g.max() - x for x in g]))
    exact = np.mean([g.max() - max(three) for three in combinations(g, 3)])
    assert found["best of three"] == pytest.approx(exact)


def test_partial_correlation_is_that_of_residuals():
    a, b, c = (random_places(i) for i in (6, 7, 8))
    X = np.column_stack([np.ones(len(a)), ranks(c)])
    left = [ranks(v) - X @ np.linalg.lstsq(X, ranks(v), rcond=None)[0] for v in (a, b)]
    assert partial_correlation(a, b, c) == pytest.approx(np.corrcoef(*left)[0, 1])


def test_scores_of_an_oracle_and_of_its_opposite():
    g = random_places(9)
    oracle = scores(g, g)
    assert oracle["first"] == oracle["best of three"] == 0
    assert oracle["all"] == oracle["matrices"] == oracle["within kinds"] == pytest.approx(1)
    assert scores(-g, g)["first"] == pytest.approx(np.ptp(g))
    table = score_table({"t": pd.DataFrame({"a": g, "b": -g})}, g.to_frame("t"))
    assert table.loc[("a", "t"), "all"] == pytest.approx(1) and table.loc[("b", "t"), "all"] == pytest.approx(-1)


def test_together_ranks_what_is_missing_last():
    values = pd.DataFrame({"a": [1.0, 2, np.nan], "b": [3.0, 1, 2]}, PLACES[:3])
    assert together(values, ["a", "b"]).tolist() == [2.5, 2, 1.5]
    g = pd.Series([1.0, 5, 2], PLACES[:3]).to_frame("t")
    lost = lost_by({"t": values}, g, [("a",), ("a", "b")])
    assert lost.loc["t"].to_dict() == {"a": 0, "a + b": 4}


def frame_of(rows):
    "A frame of runs: (task, component, rate, validation, test)."
    names = ["task", "component", "lr", "validation_accuracy", "test_accuracy"]
    return pd.DataFrame(rows, columns=names)


def test_gains_pick_by_validation_and_start_at_the_head():
    runs = frame_of([
        ("t", "head", 0.1, 0.5, 0.40), ("t", "head", 1.0, 0.6, 0.30),
        ("t", "MHA@0", 0.1, 0.7, 0.50), ("t", "MHA@0", 1.0, 0.6, 0.90),
        ("t", "LN1@0", 0.1, 0.2, 0.20),
    ])
    assert gains(runs)["t"].round(9).to_dict() == {"MHA@0": 20, "LN1@0": -10}
    assert gains(runs, of="validation_accuracy")["t"].round(9).to_dict() == {"MHA@0": 10, "LN1@0": -40}
    with pytest.raises(ValueError, match="'head' on t"):
        gains(runs[runs.component != "head"])
    with pytest.raises(ValueError, match="seeds \\[0, 1\\]"):
        gains(runs.assign(seed=[0, 0, 0, 0, 1]))


def test_intervals_are_students():
    v = [1.0, 2.5, 0.0, 4.0, 3.0]
    low, high = stats.t.interval(0.95, len(v) - 1, np.mean(v), stats.sem(v))
    assert mean_interval(v) == pytest.approx((np.mean(v), low, high))


def test_short_runs_take_the_lowest_loss_over_rates_at_a_step():
    curves = pd.DataFrame({"task": "t", "component": ["a", "a", "a", "b"], "lr": [0.1, 1.0, 9.0, 0.1], "step": [10, 10, 10, 10], "loss": [3.0, 2.0, 0.0, 4.0]})
    assert short_runs(curves, 10, (0.1, 1.0))["t"].to_dict() == {"a": -2, "b": -4}
    with pytest.raises(ValueError, match=r"step=11: expected the end of an interval, \[10\]"):
        short_runs(curves, 11, (0.1,))


@given(st.lists(st.tuples(st.floats(-9, 9), st.integers(1, 50)), min_size=1, max_size=15), st.integers(1, 120))
def test_greedy_takes_in_order_whatever_fits(rows, budget):
    values = pd.Series([v for v, _ in rows], PLACES[: len(rows)])
    sizes = pd.Series([n for _, n in rows], values.index)
    if sizes.min() > budget:
        with pytest.raises(ValueError, match="nothing fits"):
            greedy(values, sizes, budget)
        return
    found, spent = greedy(values, sizes, budget), 0
    order = sorted(values.index, key=lambda p: (-values[p], PLACES.index(p)))
    for place in order:  # each one is in exactly if it fitted when its turn came
        fits = spent + sizes[place] <= budget
        assert (place in found) == fits
        spent += sizes[place] * fits
    assert spent <= budget and found == [p for p in order if p in found]


def test_budgets_of_a_model():
    model = tiny_vit(num_classes=3)
    sizes = place_sizes(model)
    own = {f"{c.kind}@{c.block}": sum(p.numel() for p in c.parameters.values()) for c in anatomy(model).components}
    assert sizes.to_dict() == own
    inner = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("head."))
    values = pd.Series(range(len(sizes)), sizes.index, dtype=float)
    for share in (0.05, 0.3, 1.0):
        atoms = Selection.of(budgeted(model, values, share), model).atoms
        assert sum(sizes[f"{kind}@{block}"] for block, kind in atoms) <= share * inner
    assert set(Selection.of(budgeted(model, values, 1.0), model).atoms) == {(int(p[-1]), p[:-2]) for p in sizes.index}


@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan")])
def test_shares_that_are_none(share):
    with pytest.raises(ValueError, match="expected a share"):
        budgeted(tiny_vit(), pd.Series(dtype=float), share)


def test_a_place_without_a_size():
    with pytest.raises(ValueError, match="none of MHA@0"):
        greedy(pd.Series({"MHA@0": 1.0}), pd.Series({"LN1@0": 3}), 5)


def a_run(selection, task, validation, test, lr=0.1, seed=0, **more) -> dict:
    return {"model": "m", "optimizer": "sgd", "task": task, "component": selection, "lr": lr, "seed": seed, "diverged": False, "validation_accuracy": validation, "test_accuracy": test} | more


def test_the_standing_of_a_selection_is_at_rates_by_validation_over_the_tasks_that_both_have():
    runs = [a_run("MHA", "u", 0.5, 0.60, 0.1), a_run("MHA", "u", 0.4, 0.99, 0.3), a_run("MHA", "v", 0.5, 0.54, seed=0), a_run("MHA", "v", 0.7, 0.56, seed=1)]
    runs += [a_run("MHA", "w", 0.5, 0.70), a_run("MHA", "x", 0.5, 0.01), a_run("all", "u", 0.1, 0.61), a_run("all", "v", 0.1, 0.5)]
    runs += [a_run("head", t, 0.3, 0.5) for t in "uvw"]
    found = standing(pd.DataFrame(runs))
    assert set(found.index) == {("MHA", "head"), ("MHA", "all"), ("all", "head"), ("head", "all")}
    assert found.tasks.to_dict() == {("MHA", "head"): 3, ("MHA", "all"): 2, ("all", "head"): 2, ("head", "all"): 2}
    half = 4.302653 * np.std([10, 5, 20], ddof=1) / 3**0.5  # a table of Student's t, two degrees of freedom
    assert found.loc[("MHA", "head")].tolist() == pytest.approx([3, 35 / 3, 35 / 3 - half, 35 / 3 + half], abs=1e-4)
    assert found.loc[("MHA", "all"), "mean"] == pytest.approx((-1 + 5) / 2)
    assert standing(pd.DataFrame(runs), ["MHA"], ["head"]).index.tolist() == [("MHA", "head")]


def test_what_has_no_standing():
    runs = [a_run("MHA", "u", 0.5, 0.6), a_run("head", "v", 0.5, 0.6)]
    with pytest.raises(ValueError, match="no task with runs of both MHA and head"):
        standing(pd.DataFrame(runs), ["MHA"], ["head"])
    with pytest.raises(ValueError, match="unknown selection 'FC1'"):
        standing(pd.DataFrame(runs), ["FC1"], ["head"])
    with pytest.raises(ValueError, match="expected those of one"):
        standing(pd.DataFrame([a_run("MHA", "u", 0.5, 0.6, recipe=1), a_run("MHA", "u", 0.5, 0.6, recipe=2, steps=3)]).assign(clip_head="joint", head_lr=None))
    with pytest.raises(ValueError, match="expected rows of one"):
        standing(pd.DataFrame([a_run("MHA", "u", 0.5, 0.6), a_run("head", "u", 0.5, 0.6, model="n")]))


def test_the_standing_in_a_store_is_that_of_its_lines():
    store = Path(__file__).parents[2] / "nbs/results/offline-cpu-separate"
    best = {}
    for line in (store / "runs.jsonl").read_text().splitlines():
        r = json.loads(line)["record"]
        if r["config"]["seed"]:  # the rule for several seeds is that of `chosen`
            continue
        cell = best.setdefault((r["task"], r["components"]), [])
        cell.append((r["diverged"], -r["validation_accuracy"], r["config"]["lr"], 100 * r["test_accuracy"]))
    tasks = sorted({t for t, _ in best})
    runs = run_frame(stored_runs(store))
    found = standing(runs[runs.seed.eq(0)], [*KINDS, "all"])
    for one, other in found.index:
        gain = [min(best[t, one])[-1] - min(best[t, other])[-1] for t in tasks]
        row = found.loc[(one, other)]
        assert row.tasks == len(tasks) == 11 and row["mean"] == pytest.approx(np.mean(gain))
        assert row.high - row["mean"] == pytest.approx(2.228139 * np.std(gain, ddof=1) / 11**0.5, rel=1e-5)
