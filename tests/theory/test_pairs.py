"""All pairs and the limit of close pairs: brute force, exact variances, cancellation, memory, bad input."""
import warnings

import numpy as np
import pytest
import torch
from architectures import BUILD, SEQUENCES, build, inputs_of
from conftest import noise, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st

import vitplast as vp
from vitplast.models import INPUTS, anatomy, evaluating, visit
from vitplast.theory.pairs import (
    all_pairs_statistics, distances, jackknife_variances, two_way_variances,
)


def every_ratio(model, x, y, inputs):
    "Ratios (components, N, M), one pair at a time."
    parts, kept = anatomy(model), {}
    with evaluating(model):
        for side, images in (("x", x), ("y", y)):
            visit(parts, images, inputs, lambda i, c, a, b: kept.update({(side, i): (a.double(), b.double())}))
    h = torch.zeros(len(parts.components), len(x), len(y), dtype=torch.float64)
    for i in range(len(h)):
        (p, fp), (q, fq) = kept["x", i], kept["y", i]
        for j in range(len(x)):
            for k in range(len(y)):
                h[i, j, k] = (fp[j] - fq[k]).norm() / (p[j] - q[k]).norm()
    return h.numpy()


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", BUILD)
def test_brute_force_agrees(name, inputs):
    model, x, y = build(name), inputs_of(name, 4), inputs_of(name, 3, seed=1)
    h = every_ratio(model, x, y, inputs)
    for batch in (2, 64):
        frame = vp.plasticity(model, x, y, inputs=inputs, pairs="all", batch_size=batch)
        assert np.allclose(frame.plasticity, h.mean((1, 2)), rtol=1e-9, atol=0) and np.allclose(frame.max_ratio, h.max((1, 2)), rtol=1e-9, atol=0)
        assert (frame.n_pairs == 12).all() and (frame.zero_pairs == 0).all()


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("ratio", [0.5, 2.0, 4.0])
def test_single_precision_agrees(inputs, ratio):
    model, x, y = tiny_vit(mlp_ratio=ratio), noise(5), noise(6, 1)
    exact = every_ratio(model, x, y, inputs).mean((1, 2))
    frame = vp.plasticity(model.float(), x.float().split(2), y.float(), inputs=inputs, pairs="all")
    assert np.allclose(frame.plasticity, exact, rtol=1e-5, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32), n=st.integers(1, 6), m=st.integers(1, 6), features=st.sampled_from([1, 7, 20000]),
    near=st.floats(-8, 1), offset=st.sampled_from([0.0, 1.0, 1000.0]), double=st.booleans(),
)  # fmt: skip
def test_distances_do_not_cancel(seed, n, m, features, near, offset, double):
    g = torch.Generator().manual_seed(seed)
    base = offset + torch.randn(1, features, generator=g, dtype=torch.float64)
    a = base + torch.randn(n, features, generator=g, dtype=torch.float64)
    b = torch.cat([a[: m // 2] + 10**near * torch.randn(len(a[: m // 2]), features, generator=g, dtype=torch.float64), base + torch.randn(m, features, generator=g, dtype=torch.float64)])[:m]  # fmt: skip
    a, b = (a, b) if double else (a.float(), b.float())
    exact = (a.double()[:, None] - b.double()).norm(dim=-1)
    assert torch.allclose(distances(a, b), exact, rtol=1e-9 if double else 1e-5, atol=0)


def test_equal_images_have_distance_zero():
    a = noise(5).flatten(1).float()
    assert (distances(a, a).diagonal() == 0).all() and (distances(a, a) > 0).sum() == 20


def test_the_error_is_unbiased_for_two_samples():
    rng, found, means = np.random.default_rng(0), [], []
    for _ in range(4000):
        h = rng.normal(size=(4, 1)) * 0.5 + rng.normal(size=6) * 0.2 + rng.normal(size=(4, 6))
        found.append(sum(v for v, _ in two_way_variances(h))), means.append(h.mean())
    truth = 0.25 / 4 + 0.04 / 6 + 1 / 24
    assert np.mean(found) == pytest.approx(truth, rel=0.1) and np.var(means) == pytest.approx(truth, rel=0.1)


@given(seed=st.integers(0, 2**32), n=st.integers(2, 7), m=st.integers(2, 7))
@settings(max_examples=50, deadline=None)
def test_jackknife_by_leaving_out(seed, n, m):
    "Against means computed anew without each image; without shared images it is the two-way variance plus that of the rest."
    rng = np.random.default_rng(seed)
    h = rng.exponential(size=(n, m))
    apart = jackknife_variances(h, np.arange(n), 100 + np.arange(m))
    without = [np.delete(h, i, 0).mean() for i in range(n)], [np.delete(h, j, 1).mean() for j in range(m)]
    for (variance, dof), w in zip(apart, without):
        assert variance == pytest.approx(np.var(w) * (len(w) - 1)) and dof == len(w) - 1
    row, column = h.mean(1, keepdims=True), h.mean(0, keepdims=True)
    rest = ((h - row - column + h.mean()) ** 2).sum() / ((n - 1) * (m - 1)) / h.size
    exact = row.var(ddof=1) / n + column.var(ddof=1) / m - rest
    assert sum(v for v, _ in apart) - rest == pytest.approx(exact)
    assert sum(v for v, _ in two_way_variances(h)) == pytest.approx(max(exact, rest))
    shared = rng.integers(0, 3, size=n), rng.integers(2, 5, size=m)  # images return, some on both sides
    images = np.unique(np.concatenate(shared))
    side = {i: (i in shared[0]) + 2 * (i in shared[1]) for i in images}
    left = {i: h[(shared[0] != i)[:, None] & (shared[1] != i)] for i in images}
    if all(len(v) for v in left.values()):
        expected = []
        for s in (1, 2, 3):
            group = [left[i].mean() for i in images if side[i] == s]
            expected += [np.var(group) * (len(group) - 1) if len(group) > 1 else np.nan] * bool(group)
        assert [v for v, _ in jackknife_variances(h, *shared)] == pytest.approx(expected, nan_ok=True)


def test_within_one_set(model):
    x = noise(6)
    with pytest.warns(UserWarning, match="6 of 36 pairs coincide"):
        frame = vp.plasticity(model, x, x, pairs="all", inputs="native")
    with pytest.warns(UserWarning, match="6 different images on one side: an interval from fewer than 10"):
        warnings.simplefilter("always")
        vp.plasticity(model, x.repeat(2, 1, 1, 1), noise(12, 1), pairs="all")
    h = every_ratio(model, x, x, "native")[:, ~np.eye(6, dtype=bool)]
    assert np.allclose(frame.plasticity, h.mean(1), rtol=1e-9) and (frame.n_pairs == 30).all() and (frame.zero_pairs == 6).all()
    assert (frame.ci_low < frame.plasticity).all() and (frame.std_error > 0).all()


def test_images_that_return_are_not_new_images(model):
    x, y = noise(5), noise(5, 1)
    once, twice = (vp.plasticity(model, x.repeat(k, 1, 1, 1), y.repeat(k, 1, 1, 1), pairs="all") for k in (1, 3))
    assert np.allclose(once.plasticity, twice.plasticity, rtol=1e-9) and (twice.std_error > 0.95 * once.std_error).all()


def test_constant_ratios_have_no_error():
    found = all_pairs_statistics(np.full((3, 4), 2.0), np.arange(3), 10 + np.arange(4), 0.95)
    assert found["plasticity"] == found["ci_low"] == found["ci_high"] == 2 and found["std_error"] == 0
    nothing = all_pairs_statistics(np.full((3, 3), np.nan), np.arange(3), np.arange(3), 0.95)
    assert np.isnan(nothing["plasticity"]) and nothing["n_pairs"] == 0 and nothing["zero_pairs"] == 9


def test_both_protocols_pass_every_image_once(model):
    counts = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, args, out, i=i: counts.update({i: counts.get(i, 0) + len(args[0])}))
    vp.plasticity(model, noise(5), noise(7, 1), pairs="all", inputs="native", batch_size=4)
    assert counts == {0: 12, 1: 12}


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", BUILD)
def test_the_limit_of_close_pairs(name, inputs):
    "Against pairs of tokens that are a millionth of the way."
    model, x, y = build(name), inputs_of(name, 3), inputs_of(name, 3, seed=1)
    limit, parts, t = vp.plasticity(model, x, y, inputs=inputs, pairs="limit"), anatomy(model), 1e-5
    from vitplast.theory.plasticity import pair_distances

    with evaluating(model):
        a, b = parts.embed(x), parts.embed(y)
        apart, moved = pair_distances(parts, a, a + t * (b - a), inputs)
    assert np.allclose((moved / apart).mean(1), limit.plasticity, rtol=2e-3)
    local = vp.lipschitz(model, x, inputs=inputs, iterations=200, steps=1).local
    linear = limit.component.isin(["FC1", "FC2"])
    assert (limit.max_ratio[~linear] <= local[~linear] * (1 + 1e-2)).all()  # no direction is stretched by more
    assert set(SEQUENCES) <= set(BUILD)


def test_the_limit_leaves_nothing_behind(model):
    vp.plasticity(model, noise(3), noise(3, 1), pairs="limit")
    assert not any(m._forward_hooks for m in model.modules()) and torch.backends.mha.get_fastpath_enabled()
    with torch.autograd.forward_ad.dual_level():
        pass  # no level is open


@pytest.mark.parametrize("arguments, message", [
    (dict(pairs="al"), r"pairs='al': expected one of \('paired', 'all', 'limit'\)"), (dict(inputs="natve", pairs="all"), "inputs='natve'"),
    (dict(confidence=1.0), "confidence=1.0"), (dict(batch_size=0), "batch_size=0"), (dict(fast="yes"), "fast='yes': expected None or False"),
    (dict(fast=True, inputs="native"), 'fast=True: .* shares the work of inputs="embedding"'), (dict(fast=True, pairs="all"), "fast=True"),
])  # fmt: skip
def test_bad_arguments(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        vp.plasticity(model, noise(3), noise(3, 1), **arguments)


def test_what_is_no_stream_of_images(model):
    for x, found in ((3, "int"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"y: {found}, expected a tensor or an iterable of batches"):
            vp.plasticity(model, noise(3), x)


def test_an_error_in_the_stream_leaves_the_model_as_it_was(model):
    def broken():
        yield noise(2)
        raise OSError("the disk is gone")

    model.train()
    for pairs in ("paired", "all", "limit"):
        with pytest.raises(OSError, match="the disk is gone"):
            vp.plasticity(model, broken(), noise(4), pairs=pairs, batch_size=1)
        assert model.training and not any(m._forward_hooks for m in model.modules())


def test_too_few_images(model):
    for pairs in ("paired", "limit"):
        with pytest.raises(ValueError, match="1 pair of images: expected at least 2"):
            vp.plasticity(model, noise(1), noise(1, 1), pairs=pairs)
    for x, y, name in ((noise(1), noise(5), "x"), (noise(5), noise(1), "y")):
        with pytest.raises(ValueError, match=f"{name} has 1 image: expected at least 2"):
            vp.plasticity(model, x, y, pairs="all")
    with pytest.raises(ValueError, match="0 pair|x has 0 image"):
        vp.plasticity(model, [], [], pairs="all")
    with pytest.raises(ValueError, match='x has 4 images and y has 3.*pairs="all" takes any'):
        vp.plasticity(model, noise(4), noise(3))


def test_source_and_target_of_different_sizes(model):
    with pytest.raises(ValueError, match=r"y: shape \(3, 3, 24, 24\), expected \(N, 3, 16, 16\)"):
        vp.plasticity(model, noise(3), noise(3, size=24), pairs="all")


def test_half_precision_is_refused_unless_forced(model):
    x, y = noise(4), noise(4, 1)
    exact = vp.plasticity(model, x, y, inputs="native").plasticity
    half = model.bfloat16()
    with pytest.raises(TypeError, match=r"torch.bfloat16: expected float32 or float64.*0.8%.*force=True"):
        vp.plasticity(half, x.bfloat16(), y.bfloat16())
    for pairs in ("paired", "all"):
        for inputs in INPUTS:
            found = vp.plasticity(half, x.bfloat16(), y.bfloat16(), inputs=inputs, pairs=pairs, force=True)
            assert found.plasticity.notna().all() and (found.std_error > 0).all()
    close = vp.plasticity(half, x.bfloat16(), y.bfloat16(), inputs="native", force=True).plasticity
    assert (close / exact - 1).abs().max() < 0.1


@pytest.mark.parametrize("pairs", ["paired", "all", "limit"])
def test_an_overflow_of_half_precision_is_named(pairs):
    model = tiny_vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight.mul_(1e5)
    with pytest.raises(ValueError, match="FC1 of block 1.*NaN or infinite, and torch.float16 ends at 65504"):
        vp.plasticity(model.half(), noise(3).half(), noise(3, 1).half(), pairs=pairs, force=True)


def test_the_device_is_an_argument_and_comes_back(model):
    x, y = noise(3), noise(3, 1)
    assert vp.plasticity(model, x, y, device="cpu").equals(vp.plasticity(model, x, y))
    with pytest.raises(ValueError, match="device='nowhere': not to be used here"):
        vp.plasticity(model, x, y, device="nowhere")
    assert next(model.parameters()).device.type == "cpu" and model.training is False


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("pairs", ["paired", "all", "limit"])
def test_a_gpu_gives_the_same_numbers(model, inputs, pairs):
    x, y = noise(4), noise(5, 1)[: 5 if pairs == "all" else 4]
    here, there = (vp.plasticity(model, x, y, inputs=inputs, pairs=pairs, device=d) for d in ("cpu", "cuda"))
    assert np.allclose(here.plasticity, there.plasticity, rtol=1e-9) and next(model.parameters()).device.type == "cpu"
