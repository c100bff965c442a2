"""The theorems against brute force on random weights of any scale: mean ratio <= largest ratio <= bound, always.

The functions are written out here once more, from their definitions, in float64; Jacobians are formed in full."""
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import WORST
from hypothesis import example, given, settings, target
from hypothesis import strategies as st

from vitplast.models import Attention, Linear, Norm
from vitplast.theory import linear_bound, norm_bound
from vitplast.theory.attention import (
    Ball, ball_attention, column_sum, enclosing_ball, extremes, hull_attention,
    join_balls, join_heads, published_attention,
)
from vitplast.theory.linear import (
    GELU_SLOPES, mlp_bound, spectral_norm, spectral_norm_product,
)
from vitplast.theory.norms import spreads

FEW, MANY = {"deadline": None}, {"deadline": None, "derandomize": True}
exponents = st.floats(-3, 3)


def record(label, measured, bound):
    "Remember the largest measured / bound; hypothesis looks for larger ones. One call per label and case."
    if bound > 0 and math.isfinite(bound):
        WORST[label] = max(WORST.get(label, 0.0), float(measured / bound))
        target(float(measured / bound), label=label)


# ---- brute force


def attend(w, x, turn):
    "Attention of tokens x (n, d), token by token and head by head; turn (n, d_head, d_head)."
    rows = []
    for i in range(len(x)):
        total = w.b_o
        for h in range(len(w.Q)):
            seen = range(i + 1) if w.causal else range(len(x))
            query = turn[i] @ (w.Q[h] @ x[i] + w.b_q[h])
            score = torch.stack([query @ turn[j] @ (w.K[h] @ x[j] + w.b_k[h]) * w.scale for j in seen])
            weight = torch.exp(score - score.max())
            value = torch.stack([w.V[h] @ x[j] + w.b_v[h] for j in seen])
            total = total + w.O[h] @ (weight @ value / weight.sum())
        rows.append(total)
    return torch.stack(rows)


def jacobian_norm(f, x) -> float:
    return np.linalg.norm(torch.func.jacrev(f)(x).reshape(-1, x.numel()).numpy(), 2)


def check_chain(component, f, images, bound, rounding):
    "mean <= max <= bound over all pairs of images (N, n, d); `rounding` is the size of an error in f."
    ratios = []
    for x, y in itertools.combinations(images, 2):
        if (apart := (x - y).norm().item()) > 0:
            ratios.append(max(0.0, (f(x) - f(y)).norm().item() - rounding) / apart)
    if ratios:
        assert np.mean(ratios) <= max(ratios) * (1 + 1e-12)
        assert max(ratios) <= bound * (1 + 1e-9), (max(ratios), bound)
        record(f"{component} pair", max(ratios), bound)


def draw_tokens(g, images, n, d, size, offset, special):
    "Token matrices (images, n, d) with a common mean, and one of the awkward cases."
    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x = 10.0**size * (normal(images, n, d) + offset * normal(d))
    if special == "outlier":
        x[0, 0] *= 100
    if special == "constant":
        x[:] = x[:, :, :1]  # all coordinates of a token alike
    if special == "same tokens":
        x[:] = x[:, :1]
    if special == "close":
        x[1:] = x[:1] + 1e-4 * x[1:]
    return x


tokens = st.fixed_dictionaries(dict(
    seed=st.integers(0, 2**32), images=st.integers(1, 3), n=st.integers(1, 5), size=exponents, offset=st.floats(0, 30),
    special=st.sampled_from(["", "outlier", "constant", "same tokens", "close"]),
))  # fmt: skip

# ---- attention


def check_attention(case, d, heads, d_head, logs, bias, scale, causal, rotary):
    g = torch.Generator().manual_seed(case.pop("seed"))
    x = draw_tokens(g, d=d, **case)
    N, n, _ = x.shape

    def normal(*shape, log=0.0):
        return 10.0**log * torch.randn(*shape, generator=g, dtype=torch.float64)

    Q, K, V = (normal(heads, d_head, d, log=log) for log in logs[:3])
    b_q, b_k, b_v = (bias * normal(heads, d_head) for _ in range(3))
    w = Attention(Q, b_q, K, b_k, V, b_v, normal(heads, d, d_head, log=logs[3]), normal(d), scale, causal, rotary)
    turn = torch.linalg.qr(normal(n, d_head, d_head)).Q if rotary else torch.eye(d_head, dtype=torch.float64).expand(n, -1, -1)
    ball = enclosing_ball(x.flatten(0, 1))
    on_hull, on_ball = hull_attention(w, extremes(w, x), n), ball_attention(w, ball, n)
    assert on_hull <= on_ball * (1 + 1e-6)
    f = lambda t: attend(w, t, turn)  # noqa: E731
    reach = sum((w.O[h].norm() * (w.V[h].norm() * x.norm(dim=-1).max() + w.b_v[h].norm())).item() for h in range(heads))
    name = "MHA" if n > 1 else "MHA of one token"
    check_chain(name, f, x, on_hull, 1e-12 * n * (reach + w.b_o.norm().item()))
    mixture = torch.rand(N, generator=g, dtype=torch.float64)
    inside = (mixture[:, None, None] * x).sum(0) / mixture.sum()
    local = max(jacobian_norm(f, x[0]), jacobian_norm(f, inside))
    assert local <= on_hull * (1 + 1e-6) + 1e-250, (local, on_hull)
    record(f"{name} local", local, on_hull)
    anywhere = torch.randn(n, d, generator=g, dtype=torch.float64)
    anywhere = ball.centre + ball.radius * anywhere / anywhere.norm(dim=1, keepdim=True)
    assert jacobian_norm(f, anywhere) <= on_ball * (1 + 1e-6) + 1e-250
    if not rotary:
        unbiased = w._replace(b_q=torch.zeros_like(b_q))
        r = x.norm(dim=-1).max()
        published = published_attention(unbiased, r.item(), n)
        assert jacobian_norm(lambda t: attend(unbiased, t, turn), x[0]) <= published * (1 + 1e-9)
        assert ball_attention(unbiased, Ball(torch.zeros(d, dtype=torch.float64), r), n) <= published * (1 + 1e-9)  # Theorem 18


attention_cases = given(
    case=tokens, d=st.integers(1, 5), heads=st.integers(1, 3), d_head=st.integers(1, 3), logs=st.tuples(*[exponents] * 4),
    bias=st.sampled_from([0.0, 1.0, 100.0]), scale=st.sampled_from([1.0, 0.5]), causal=st.booleans(), rotary=st.booleans(),
)  # fmt: skip


@settings(max_examples=120, **FEW)
@attention_cases
def test_attention(**case):
    check_attention(**case)


@pytest.mark.long
@settings(max_examples=6000, **MANY)
@attention_cases
def test_attention_long(**case):
    check_attention(**case)


@pytest.mark.parametrize("b", [0.0, 1.0, 850.0, 1e6])
def test_a_query_bias_breaks_the_published_formula_and_not_ours(b):
    "Solved by hand: opposite tokens (0, r), (0, -r), Q = 0, K = V = O = 1; the norm of the Jacobian is sqrt(1 + r^2 b^2)."
    eye, none = torch.eye(2, dtype=torch.float64)[None], torch.zeros(1, 2, dtype=torch.float64)
    w = Attention(0 * eye, none + torch.tensor([b, 0.0]), eye, none, eye, none, eye, none[0], 1.0)
    x = torch.tensor([[0.0, 0.1], [0.0, -0.1]], dtype=torch.float64)
    true = math.hypot(1, 0.1 * b)
    assert math.isclose(jacobian_norm(lambda t: attend(w, t, eye.expand(2, -1, -1)), x), true, rel_tol=1e-9)
    assert math.isclose(published_attention(w, 0.1, 2), 6**0.5, rel_tol=1e-12)
    for ours in (ball_attention(w, enclosing_ball(x), 2), hull_attention(w, extremes(w, x[None]), 2)):
        assert true <= ours * (1 + 1e-12) and ours <= 1.5 * true


@settings(max_examples=40, **FEW)
@given(seed=st.integers(0, 2**32), c=st.floats(-1e3, 1e3).filter(lambda c: c == 0 or abs(c) > 1e-6))
def test_scaling_the_output_scales_the_bounds_and_order_does_not_matter(seed, c):
    g = torch.Generator().manual_seed(seed)
    Q, K, V = torch.randn(3, 2, 3, 6, generator=g, dtype=torch.float64)
    b = torch.randn(3, 2, 3, generator=g, dtype=torch.float64)
    w = Attention(Q, b[0], K, b[1], V, b[2], torch.randn(2, 6, 3, generator=g, dtype=torch.float64), b[0, 0].repeat(2), 0.5)
    x = torch.randn(2, 4, 6, generator=g, dtype=torch.float64)
    shuffled, scaled, ball = x[:, torch.randperm(4, generator=g)], w._replace(O=c * w.O), enclosing_ball(x.flatten(0, 1))
    hull = hull_attention(w, extremes(w, x), 4)
    assert math.isclose(hull_attention(w, extremes(w, shuffled), 4), hull, rel_tol=1e-9)
    assert math.isclose(hull_attention(scaled, extremes(scaled, x), 4), abs(c) * hull, rel_tol=1e-9)
    assert math.isclose(ball_attention(scaled, ball, 4), abs(c) * ball_attention(w, ball, 4), rel_tol=1e-9)
    assert math.isclose(published_attention(scaled, 2.0, 4), abs(c) * published_attention(w, 2.0, 4), rel_tol=1e-9)


def test_one_token_is_a_linear_map_and_the_bound_is_exact():
    g = torch.Generator().manual_seed(0)
    Q, K, V = torch.randn(3, 1, 3, 6, generator=g, dtype=torch.float64)
    none = torch.zeros(1, 3, dtype=torch.float64)
    w = Attention(Q, none, K, none, V, none, torch.randn(1, 6, 3, generator=g, dtype=torch.float64), none[0].repeat(2), 1.0)
    x = torch.randn(5, 1, 6, generator=g, dtype=torch.float64)
    assert math.isclose(hull_attention(w, extremes(w, x), 1), np.linalg.norm(w.O[0] @ V[0], 2), rel_tol=1e-12)


@settings(max_examples=60, **FEW)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 6), width=st.floats(0, 8), causal=st.booleans())
def test_no_column_of_weights_sums_to_more(seed, n, width, causal):
    rng = np.random.default_rng(seed)
    score = rng.uniform(0, width, (n, n))
    worst = np.zeros((n, n))
    worst[:, 0] = width  # all prefer the first token, all others are equally far below
    visible = np.tri(n) if causal else np.ones((n, n))
    sums = [(np.exp(s) * visible / (np.exp(s) * visible).sum(1, keepdims=True)).sum(0).max() for s in (score, worst)]
    bound = column_sum(n, torch.tensor([width], dtype=torch.float64), causal).item()
    assert max(sums) <= bound * (1 + 1e-12) and bound <= n * (1 + 1e-12)
    assert math.isclose(sums[1], bound, rel_tol=1e-9)


@settings(max_examples=60, **FEW)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 12), d=st.integers(1, 4), offset=st.sampled_from([0.0, 1e6]))
def test_no_point_lies_outside_a_ball_and_it_is_nearly_smallest(seed, n, d, offset):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(n, d)) + offset
    ball = enclosing_ball(torch.from_numpy(points))
    distance = np.linalg.norm(points - ball.centre.numpy(), axis=1)
    assert distance.max() <= ball.radius.item() * (1 + 1e-9)
    widest = max((np.linalg.norm(a - b) for a, b in itertools.combinations(points, 2)), default=0.0)
    assert widest / 2 * (1 - 1e-9) <= ball.radius.item() <= 1.05 * widest * math.sqrt(d / (2 * (d + 1))) + 1e-6  # Jung's theorem
    other = enclosing_ball(torch.from_numpy(points + rng.normal(size=d)))
    both = join_balls(ball, other)
    assert all((b.centre - both.centre).norm() + b.radius <= both.radius * (1 + 1e-9) + 1e-9 for b in (ball, other))


@settings(max_examples=60, **FEW)
@given(seed=st.integers(0, 2**32), heads=st.integers(1, 4), width=st.integers(1, 4), d=st.integers(1, 8), zero=st.booleans())
def test_joined_heads_are_at_most_their_sum_and_at_least_what_is_reached(seed, heads, width, d, zero):
    g = torch.Generator().manual_seed(seed)
    O, B = torch.randn(heads, d, width, generator=g).double(), torch.randn(heads, width, d, generator=g).double()
    if zero:
        O[0] = 0
    each = spectral_norm_product(O.mT, B)  # heads that are linear maps: the sum's norm is known
    total = np.linalg.norm(sum(o @ b for o, b in zip(O.numpy(), B.numpy())), 2)
    joined = join_heads(O, each)
    assert total <= joined * (1 + 1e-9) and joined <= each.sum().item() * (1 + 1e-12)


# ---- norms


def check_norm(case, d, eps, log, centred, zero_gains):
    g = torch.Generator().manual_seed(case.pop("seed"))
    x = draw_tokens(g, d=d, **case)
    gamma = 10.0**log * torch.randn(d, generator=g, dtype=torch.float64)
    gamma[: zero_gains * (d - 1)] = 0
    w = Norm(gamma, torch.randn(d, generator=g, dtype=torch.float64), eps, centred)
    sigma = spreads(x, w).min().item()
    second = [np.mean(t**2) if not centred else np.var(t) if np.ptp(t) > 0 else 0.0 for t in x.numpy().reshape(-1, d)]
    expected = math.sqrt(min(second) + eps)
    assert math.isclose(sigma, expected, rel_tol=1e-9, abs_tol=1e-150)
    sharp, published = norm_bound(w, sigma), norm_bound(w, sigma, "published")
    assert sharp <= published * (1 + 1e-12)
    if sigma == 0:
        assert published == math.inf
        return

    def f(t):
        u = t - t.mean(-1, keepdim=True) if centred else t
        return gamma * u / (u.square().mean(-1, keepdim=True) + eps).sqrt() + w.beta

    lost = 1e-13 * x.abs().max().item() * published  # digits lost in taking the mean away
    check_chain("LN", f, x, sharp, lost + 1e-13 * f(x).norm().item())
    at = x.flatten(0, 1)[spreads(x, w).argmin()][None]
    local = jacobian_norm(f, at)
    assert local <= sharp * (1 + 1e-6) + lost / sigma
    record("LN local", local, sharp)


norm_cases = given(case=tokens, d=st.integers(1, 8), eps=st.sampled_from([0.0, 1e-6, 1e-2]), log=exponents, centred=st.booleans(), zero_gains=st.booleans())


@settings(max_examples=100, **FEW)
@norm_cases
def test_norms(**case):
    check_norm(**case)


@pytest.mark.long
@settings(max_examples=3000, **MANY)
@norm_cases
def test_norms_long(**case):
    check_norm(**case)


@settings(max_examples=60, **FEW)
@given(seed=st.integers(0, 2**32), d=st.integers(2, 10), sigma=st.floats(0.11, 10), eps=st.sampled_from([0.0, 1e-2]))
def test_the_sharp_bound_of_a_norm_is_reached(seed, d, sigma, eps):
    "The pair u, -u of Theorem 7."
    gamma = np.random.default_rng(seed).normal(size=d)
    C = np.eye(d) - 1 / d
    e = np.linalg.svd(np.diag(gamma) @ C)[2][0]
    u = torch.from_numpy(e - e.mean()) * math.sqrt(d * (sigma**2 - eps)) / np.linalg.norm(e - e.mean())
    w = Norm(torch.from_numpy(gamma), torch.zeros(d), eps)
    f = lambda t: torch.nn.functional.layer_norm(t, (d,), w.gamma, eps=eps)  # noqa: E731
    assert math.isclose((f(u) - f(-u)).norm() / (2 * u).norm(), norm_bound(w, sigma), rel_tol=1e-9)


@pytest.mark.parametrize("sigma", [-1.0, math.nan])
def test_a_spread_that_is_none_is_refused(sigma):
    with pytest.raises(ValueError, match=f"sigma={sigma}: expected a positive number"):
        norm_bound(Norm(torch.ones(3), torch.zeros(3), 1e-6), sigma)


# ---- linear layers and the MLP


def check_linear(case, d, m, log, held):
    g = torch.Generator().manual_seed(case.pop("seed"))
    x = draw_tokens(g, d=d, **case)
    moving = torch.arange(d) >= min(held, d)
    x[..., ~moving] = x[0, 0, ~moving]
    W = 10.0**log * torch.randn(m, d, generator=g, dtype=torch.float64)
    w = Linear(W, torch.randn(m, generator=g, dtype=torch.float64))
    f = lambda t: t @ W.T + w.b  # noqa: E731
    bound = linear_bound(w, moving)
    assert bound <= linear_bound(w) * (1 + 1e-12)
    exact = np.linalg.norm(W[:, moving].numpy(), 2) if moving.any() else 0.0
    assert math.isclose(bound, exact, rel_tol=1e-10, abs_tol=1e-300)
    check_chain("FC", f, x, bound, 1e-13 * d * W.norm().item() * x.norm().item() + 1e-15 * w.b.norm().item())


def check_mlp(case, d, m, log, held):
    g = torch.Generator().manual_seed(case.pop("seed"))
    x = draw_tokens(g, d=d, **case)
    first = Linear(10.0**log * torch.randn(m, d, generator=g).double(), torch.randn(m, generator=g).double())
    second = Linear(torch.randn(d, m, generator=g).double(), torch.zeros(d).double())
    f = lambda t: torch.nn.functional.gelu(t @ first.W.T + first.b) @ second.W.T  # noqa: E731
    sharp, product = mlp_bound(first, second), mlp_bound(first, second, kind="published")
    assert sharp <= product * (1 + 1e-12)
    reach = second.W.norm() * (first.W.norm() * x.norm() + len(x) * x.shape[1] * first.b.norm())
    check_chain("MLP", f, x, sharp, 1e-13 * reach.item())
    local = jacobian_norm(f, x[0])
    assert local <= sharp * (1 + 1e-9)
    record("MLP local", local, sharp)


linear_cases = given(case=tokens, d=st.integers(1, 6), m=st.integers(1, 6), log=exponents, held=st.integers(0, 6))


@settings(max_examples=60, **FEW)
@linear_cases
def test_linear(**case):
    check_linear(**case)


@pytest.mark.long
@settings(max_examples=1500, **MANY)
@linear_cases
def test_linear_long(**case):
    check_linear(**case)


@settings(max_examples=60, **FEW)
@linear_cases
def test_mlp(**case):
    check_mlp(**case)


@pytest.mark.long
@settings(max_examples=1500, **MANY)
@linear_cases
def test_mlp_long(**case):
    check_mlp(**case)


def test_the_slopes_of_gelu():
    t = torch.linspace(-10, 10, 200001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(torch.nn.functional.gelu(t).sum(), t)
    assert math.isclose(slope.min(), GELU_SLOPES[0], abs_tol=1e-9) and math.isclose(slope.max(), GELU_SLOPES[1], abs_tol=1e-9)
    assert slope.min() >= GELU_SLOPES[0] - 1e-15 and slope.max() <= GELU_SLOPES[1] + 1e-15


@settings(max_examples=60, **FEW)
@given(seed=st.integers(0, 2**32), k=st.integers(1, 6), d=st.integers(1, 12), log=st.floats(-150, 150))
@example(seed=0, k=1, d=1, log=-150.0)
def test_spectral_norms_are_exact_at_any_scale(seed, k, d, log):
    left, right = np.random.default_rng(seed).normal(size=(2, 3, k, d))
    exact = np.linalg.svd(left.transpose(0, 2, 1) @ right, compute_uv=False)[:, 0]
    assert np.allclose(spectral_norm_product(10**log * torch.from_numpy(left), torch.from_numpy(right)), 10**log * exact, rtol=1e-10, atol=0)
    each = 10**log * np.linalg.norm(left, 2, axis=(-2, -1))
    assert np.allclose(spectral_norm(10**log * torch.from_numpy(left)), each, rtol=1e-12, atol=0)
    assert np.allclose(spectral_norm(10**log * torch.from_numpy(left).mT), each, rtol=1e-12, atol=0)
