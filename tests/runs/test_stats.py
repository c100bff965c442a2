"""Statistics against scipy, and against cases that can be counted by hand."""
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from vitplast.runs import (
    accuracy_table, best_rates, chosen, compare, corrected, friedman,
    rank_correlation, rate_gaps, relative_gain, summarise,
)
from vitplast.runs.stats import rank_biserial, t_interval


def runs_of(rows, task="digits", model="m", optimizer="sgd") -> pd.DataFrame:
    names = ["component", "lr", "seed", "validation_accuracy", "test_accuracy", "diverged"]
    return pd.DataFrame(rows, columns=names).assign(task=task, model=model, optimizer=optimizer)


RUNS = runs_of([
    ("MHA", 0.1, 0, 0.9, 0.5, False), ("MHA", 0.1, 1, 0.7, 0.7, False), ("MHA", 0.3, 0, 0.7, 0.9, False), ("MHA", 0.3, 1, 0.8, 0.8, False),
    ("LN1", 0.1, 0, 0.4, 0.4, False), ("LN1", 0.1, 1, 0.4, 0.6, False), ("LN1", 0.3, 0, 0.95, 0.9, False), ("LN1", 0.3, 1, 0.1, 0.1, True),
])  # fmt: skip


def test_selection_on_validation_on_test_and_of_a_rate_that_diverged():
    assert best_rates(RUNS).droplevel([0, 1, 2]).to_dict() == {"MHA": 0.1, "LN1": 0.1}  # 0.3 has the better mean for LN1, but a seed diverged
    assert best_rates(RUNS, "test").droplevel([0, 1, 2]).to_dict() == {"MHA": 0.3, "LN1": 0.1}
    assert chosen(RUNS).test_accuracy.tolist() == [0.5, 0.7, 0.4, 0.6] and set(chosen(RUNS).selection) == {"validation"}
    assert chosen(RUNS, "test").test_accuracy.tolist() == [0.9, 0.8, 0.4, 0.6] and set(chosen(RUNS, "test").selection) == {"test"}
    with pytest.raises(ValueError, match="unknown selection 'tset'; nearest known: .'test'"):
        best_rates(RUNS, "tset")


def test_when_all_rates_diverge_the_best_of_them_is_named():
    assert best_rates(RUNS.assign(diverged=True)).droplevel([0, 1, 2]).to_dict() == {"MHA": 0.1, "LN1": 0.3}


def test_a_summary_by_hand():
    row = summarise(RUNS).set_index("component").loc["MHA"]
    assert row["mean"] == pytest.approx(0.6) and row["std"] == pytest.approx(np.sqrt(0.02)) and row["lr"] == 0.1
    half = 12.706204736 * np.sqrt(0.02) / np.sqrt(2)  # the t quantile of one degree of freedom, from a table
    assert (row.ci_low, row.ci_high) == pytest.approx((0.6 - half, 0.6 + half))
    assert (row.n_seeds, row.n_diverged, row.n_runs, row.selection) == (2, 0, 4, "validation")
    assert summarise(RUNS).set_index("component").n_diverged["LN1"] == 1


def test_cells_are_never_mixed():
    both = pd.concat([RUNS, RUNS.assign(test_accuracy=1 - RUNS.test_accuracy, optimizer="adamw"), RUNS.assign(model="n", task="glyphs")])
    summary = summarise(both)
    assert len(summary) == 6 and summary.n_runs.eq(4).all()
    assert accuracy_table(summary[(summary.model == "m") & (summary.optimizer == "adamw")]).loc["digits"].to_dict() == pytest.approx({"MHA": 0.4, "LN1": 0.5})
    with pytest.raises(ValueError, match=r"model: \['m', 'n'\], expected rows of one"):
        accuracy_table(summary)
    with pytest.raises(ValueError, match="no runs of LN1 on 'glyphs'"):
        accuracy_table(summary[~((summary.task == "glyphs") & (summary.component == "LN1"))].assign(model="m", optimizer="sgd").drop_duplicates(["task", "component"]))


def test_gains_over_the_probe():
    table = pd.DataFrame({"MHA": [0.6, 0.3]}, index=["a", "b"])
    gains = relative_gain(table, pd.DataFrame({"task": ["b", "a"], "accuracy": [0.4, 0.5]}))
    assert gains.MHA.to_dict() == pytest.approx({"a": 0.2, "b": -0.25})
    with pytest.raises(ValueError, match=r"no linear probe for \['b'\]"):
        relative_gain(table, pd.DataFrame({"task": ["a"], "accuracy": [0.5]}))


def test_gap_between_rates():
    gaps = rate_gaps(RUNS).set_index("component")
    assert gaps.loc["MHA", ["best", "worst", "gap"]].tolist() == pytest.approx([0.85, 0.6, 0.25])
    assert gaps.loc["MHA", "std"] == pytest.approx(np.std([0.5, 0.7, 0.9, 0.8], ddof=1))


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.sampled_from([0.9, 0.95, 0.99]))
def test_interval_of_a_mean_as_scipy(values, confidence):
    assume(np.ptp(values) > 1e-3)  # scipy warns of values that are nearly equal
    assert np.allclose(t_interval(values, confidence), stats.ttest_1samp(values, 0).confidence_interval(confidence), rtol=1e-6, atol=1e-9)
    assert t_interval([values[0]] * 4) == (values[0], values[0])


def test_one_value_has_no_interval():
    assert np.isnan(t_interval([0.5])).all()


def test_corrections_by_hand():
    p = [0.01, 0.04, 0.03, 0.005]
    assert np.allclose(corrected(p), [0.03, 0.06, 0.06, 0.02])
    assert np.allclose(corrected(p, "bonferroni"), [0.04, 0.16, 0.12, 0.02])
    assert np.allclose(corrected(p, "bh"), [0.02, 0.04, 0.04, 0.02])
    with pytest.raises(ValueError, match="unknown correction 'homl'; nearest known: .'holm'"):
        corrected(p, "homl")


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_rejects_as_its_definition(p):
    for alpha in (0.01, 0.05, 0.2):
        rejected = [False] * len(p)
        for k, i in enumerate(np.argsort(p, kind="stable")):  # step down, stop at the first that stays
            if p[i] * (len(p) - k) > alpha:
                break
            rejected[i] = True
        assert [bool(q <= alpha) for q in corrected(p)] == rejected


@given(st.integers(0, 10**6), st.integers(5, 12))
def test_comparison_as_scipy(seed, n):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(rng.normal(size=(n, 3)), columns=["MHA", "FC1", "LN1"])
    for alternative in ("two-sided", "greater"):
        found = compare(table, alternative=alternative, correction="bonferroni").set_index("against")
        for other in ("FC1", "LN1"):
            row, t = found.loc[other], stats.ttest_rel(table.MHA, table[other], alternative=alternative)
            assert np.isclose(row.p_t, t.pvalue) and np.isclose(row.p_t_corrected, min(1, 2 * t.pvalue))
            assert np.isclose(row.p_wilcoxon, stats.wilcoxon(table.MHA, table[other], alternative=alternative).pvalue)
            assert np.isclose(row.d_z * np.sqrt(n), t.statistic) and row.wins + row.losses == n
            assert np.allclose((row.ci_low, row.ci_high), stats.ttest_rel(table.MHA, table[other]).confidence_interval())
            signed = stats.wilcoxon(table.MHA, table[other], alternative="greater").statistic  # the sum of the positive ranks
            assert np.isclose(row.rank_biserial, 2 * signed / (n * (n + 1) / 2) - 1)


def test_comparison_of_equals_and_of_too_few():
    table = pd.DataFrame({"MHA": [0.5, 0.6], "FC1": [0.5, 0.6]})
    row = compare(table).iloc[0]
    assert (row.p_t, row.p_wilcoxon, row.difference, row.rank_biserial) == (1, 1, 0, 0) and np.isnan(row.d_z)
    with pytest.raises(ValueError, match="1 tasks: expected at least 2"):
        compare(table.head(1))
    with pytest.raises(ValueError, match="unknown component 'FC11'; nearest known: .'FC1'"):
        compare(table, others=["FC11"])


def test_rank_biserial_by_hand():
    assert rank_biserial([1, 2, -3, 0]) == pytest.approx(0) and rank_biserial([4, 2, -1]) == pytest.approx(4 / 6) and rank_biserial([0, 0]) == 0


@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(3, 7))
def test_friedman_as_scipy_and_as_its_formula(seed, n, k):
    table = pd.DataFrame(np.random.default_rng(seed).normal(size=(n, k)), columns=list("abcdefg")[:k])
    found = friedman(table)
    assert np.allclose((found.statistic, found.p), stats.friedmanchisquare(*table.to_numpy().T))
    mean_ranks = stats.rankdata(-table, axis=1).mean(0)
    assert np.allclose(found.ranks[list(table.columns)], mean_ranks)
    assert np.isclose(found.statistic, 12 * n / (k * (k + 1)) * ((mean_ranks - (k + 1) / 2) ** 2).sum())


@pytest.mark.parametrize("k, q", [(3, 2.343), (5, 2.728), (7, 2.949), (10, 3.164)])  # Demšar (2006), table 5
def test_critical_differences_of_the_literature(k, q):
    table = pd.DataFrame(np.random.default_rng(k).normal(size=(11, k)))
    assert friedman(table).critical_difference == pytest.approx(q * np.sqrt(k * (k + 1) / 66), rel=1e-3)


def test_too_little_for_friedman():
    with pytest.raises(ValueError, match="3 tasks and 2 components: expected at least 2 tasks and 3 components"):
        friedman(pd.DataFrame(np.ones((3, 2))))


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(3, 5))
@settings(deadline=None, max_examples=25)
def test_rank_correlation_as_scipy_and_all_orders(seed, n, k):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, n, k))
    frame = pd.DataFrame({"task": np.repeat(np.arange(n), k), "component": list("abcde")[:k] * n, "plasticity": x.ravel(), "test_accuracy": y.ravel()})
    found = rank_correlation(frame.sample(frac=1, random_state=seed))

    def mean_rho(order):
        return np.mean([stats.spearmanr(x[i][list(order)], y[i]).statistic for i in range(n)])

    assert found.mean == pytest.approx(mean_rho(range(k))) and found.n_groups == n
    null = np.array([mean_rho(order) for order in permutations(range(k))])
    tails = np.mean(null >= found.mean - 1e-12), np.mean(null <= found.mean + 1e-12)
    assert found.p == pytest.approx(min(1, 2 * min(tails)))
    if n < 3:
        assert np.isnan(found.ci_low)
    else:
        assert -1 <= found.ci_low <= found.ci_high <= 1


def test_rank_correlation_says_what_is_missing():
    frame = pd.DataFrame({"task": ["a", "a", "b"], "component": ["x", "y", "x"], "plasticity": [1.0, 2, 3], "test_accuracy": [1.0, 2, 3]})
    with pytest.raises(ValueError, match="expected plasticity and test_accuracy of at least 2 components, each on every task"):
        rank_correlation(frame)
    with pytest.raises(ValueError, match="is the same for every component of a task"):
        rank_correlation(frame.head(2).assign(plasticity=1.0))
