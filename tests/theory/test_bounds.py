"""Bounds: never violated on random models, equal to the formulas written out with full decompositions, honest about assumptions."""
import math

import numpy as np
import pytest
import torch
from conftest import WORST, noise, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st

import vitplast as vp
from vitplast.theory import KINDS_OF_BOUND

KEYS = ["block", "component"]


def check_model(seed, heads, d_head, depth, inputs, scale, size, flip, bias, norm):
    "A whole model in all three kinds, with what its images show and what `lipschitz` finds."
    model = tiny_vit(seed, embed_dim=heads * d_head * 2, num_heads=heads * 2, depth=depth, img_size=size, norm_layer=norm)
    with torch.no_grad():
        for block in model.blocks:
            if not bias:
                block.attn.qkv.bias[: block.attn.attn_dim] = 0
            block.attn.qkv.weight.mul_(scale)
            block.norm1.weight.mul_(-1 if flip else 1)
    x, y = noise(4, seed + 1, size), noise(4, seed + 2, size)
    y[0] = x[0] + 1e-4 * y[0]  # a close pair sees the derivative
    both = torch.cat([x, y])
    seen, bound = vp.plasticity(model, x, y, inputs=inputs), vp.bounds(model, both, inputs=inputs, kind=KINDS_OF_BOUND, batch_size=3)
    assert (bound.proven | (bound.kind == "published")).all() and bound.proven.all() == (not bias)
    assert (seen.plasticity <= seen.max_ratio * (1 + 1e-12)).all()
    wide = bound.pivot(index=KEYS, columns="kind", values="bound").loc[list(map(tuple, seen[KEYS].values))]
    seen = seen.set_index(KEYS)
    assert (seen.max_ratio <= wide.hull * (1 + 1e-7)).all()  # the close pair's difference has lost some digits
    assert (wide.hull <= wide.sharp * (1 + 1e-6)).all()
    assert bias or (wide.sharp <= wide.published * (1 + 1e-9)).all()
    lower = vp.lipschitz(model, both, inputs=inputs, iterations=5, steps=3).set_index(KEYS)
    assert (lower.pair >= seen.max_ratio * (1 - 1e-7)).all() and (lower.lower <= wide.hull * (1 + 1e-9)).all()
    assert (lower[["pair", "local", "adversarial"]].max(axis=1) == lower.lower).all() and (lower.local <= lower.adversarial).all()
    for (_, kind), low, high in zip(lower.index, lower.lower, wide.hull):
        WORST[f"{kind} of a model"] = max(WORST.get(f"{kind} of a model", 0.0), low / high)


models = given(
    seed=st.integers(0, 10**6), heads=st.sampled_from([1, 2, 3]), d_head=st.sampled_from([2, 4, 5]), depth=st.integers(1, 2), inputs=st.sampled_from(["embedding", "native"]),
    scale=st.floats(0.1, 3), size=st.sampled_from([8, 16, 24]), flip=st.booleans(), bias=st.booleans(), norm=st.sampled_from([None, "rmsnorm"]),
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@models
def test_mean_at_most_max_at_most_lower_at_most_bound(**case):
    check_model(**case)


@pytest.mark.long
@settings(max_examples=500, deadline=None, derandomize=True)
@models
def test_mean_at_most_max_at_most_lower_at_most_bound_long(**case):
    check_model(**case)


def test_formulas_written_out_with_full_decompositions(model):
    x = noise(3)
    frame = vp.bounds(model, x, inputs="embedding", kind="published").set_index(KEYS)
    with torch.no_grad():
        tokens = model._pos_embed(model.patch_embed(x)).numpy()
    r, n, d, h = np.linalg.norm(tokens, axis=-1).max(), tokens.shape[1], 12, 3
    for i, block in enumerate(model.blocks):
        s = {k: v.numpy() for k, v in block.state_dict().items()}
        sigma = np.sqrt(tokens.var(-1) + block.norm1.eps).min()
        assert np.isclose(frame.bound[i, "LN1"], abs(s["norm1.weight"]).max() / sigma, rtol=1e-12)
        assert np.isclose(frame.sigma[i, "LN1"], sigma, rtol=1e-12)
        assert np.isclose(frame.bound[i, "FC2"], np.linalg.svd(s["mlp.fc2.weight"])[1][0], rtol=1e-12)
        total = 0
        for k in range(h):
            rows = [slice(part * d + k * d // h, part * d + (k + 1) * d // h) for part in range(3)]
            Q, K, V = (s["attn.qkv.weight"][row] for row in rows)
            O = s["attn.proj.weight"][:, k * d // h : (k + 1) * d // h]
            A = Q.T @ K / math.sqrt(d // h)
            norms = [np.linalg.svd(m)[1][0] for m in (O, V, A)]
            total += norms[0] * norms[1] * math.sqrt(3 * n + (12 * n + 3) * r**4 * norms[2] ** 2)
        assert np.isclose(frame.bound[i, "MHA"], total, rtol=1e-10) and frame.n_tokens[i, "MHA"] == n
        assert np.isclose(frame.radius[i, "MHA"], r, rtol=1e-12)


def test_a_query_bias_is_not_covered_and_said_so():
    with_bias, without = (vp.bounds(tiny_vit(qkv_bias=b), radius=1.0, kind="published") for b in (True, False))
    assert not with_bias.proven[with_bias.component == "MHA"].any() and with_bias.proven[with_bias.component != "MHA"].all()
    assert without.proven.all() and (without.reason == "").all()
    assert set(with_bias.reason) == {"", "not covered by the theorem: a query bias"}


def test_the_sharp_bound_by_hand_on_a_model(model):
    "Theorem 17 and 16 written out with full decompositions, on the ball around the origin."
    frame = vp.bounds(model, radius=2.0, kind="sharp").set_index(KEYS)
    n, d, h, r = 5, 12, 3, 2.0
    for i, block in enumerate(model.blocks):
        s, each, into = {k: v.numpy() for k, v in block.attn.state_dict().items()}, [], []
        for k in range(h):
            rows = [slice(part * d + k * d // h, part * d + (k + 1) * d // h) for part in range(3)]
            Q, K, V = (s["qkv.weight"][row] for row in rows)
            O, scale = s["proj.weight"][:, k * d // h : (k + 1) * d // h], (d // h) ** -0.5
            A, u = np.linalg.norm(scale * Q.T @ K, 2), np.linalg.norm(scale * K.T @ s["qkv.bias"][rows[0]])
            kappa = u + r * A
            N = n / (1 + (n - 1) * math.exp(-2 * r * kappa))
            each.append(np.linalg.norm(O @ V, 2) * (math.sqrt(N * (1 + r**2 * kappa**2)) + r**2 * A))
            into.append(math.sqrt(each[-1]) * np.linalg.svd(O, full_matrices=False)[0])
        joined = np.linalg.norm(np.concatenate(into, 1), 2) * math.sqrt(sum(each))
        assert np.isclose(frame.bound[i, "MHA"], joined, rtol=1e-10) and joined < sum(each)
    assert frame.proven.all() and (frame.domain.xs("MHA", level="component") == "5 tokens of norm at most 2").all()


def test_the_domain_is_measured_over_all_batches(model):
    x = noise(7)
    whole, parts = (vp.bounds(model, x, inputs="native", kind=KINDS_OF_BOUND, batch_size=b).set_index([*KEYS, "kind"]) for b in (7, 2))
    same = whole.drop(index=[i for i in whole.index if i[1:] == ("MHA", "sharp")])
    assert np.allclose(same.bound, parts.bound[same.index], rtol=1e-12)
    balls = whole.bound.xs(("MHA", "sharp"), level=("component", "kind")), parts.bound.xs(("MHA", "sharp"), level=("component", "kind"))
    assert (balls[0] <= balls[1] * 1.001).all()  # joined balls are larger, and both hold
    lonely = vp.bounds(model, [x[:3], x[3:]], inputs="native", kind="hull").set_index(KEYS).bound
    assert np.allclose(lonely, whole.bound.xs("hull", level="kind"), rtol=1e-12)


def test_columns_that_never_act_are_left_out_in_the_paper_s_protocol(model):
    frame = vp.bounds(model, noise(3), kind=("published", "sharp")).set_index([*KEYS, "kind"])
    W = model.blocks[1].mlp.fc2.weight.detach().numpy()
    assert np.isclose(frame.bound[1, "FC2", "published"], np.linalg.norm(W, 2), rtol=1e-12)
    assert np.isclose(frame.bound[1, "FC2", "sharp"], np.linalg.norm(W[:, :12], 2), rtol=1e-12)
    assert frame.domain[1, "FC2", "sharp"] == "tokens with 12 coordinates held" and frame.domain[1, "FC1", "sharp"] == "all tokens"


def test_a_given_spread_is_the_domain_of_the_norms(model):
    own = vp.bounds(model, noise(3), inputs="native").sigma.min()
    frame = vp.bounds(model, noise(3), inputs="native", sigma=own / 2)
    assert (frame.sigma.dropna() == own / 2).all() and frame.domain[0] == f"tokens of spread at least {own / 2:.4g}"
    with pytest.raises(ValueError, match="sigma=100: larger than the tokens' own at LN1 of block 0.*expected at most"):
        vp.bounds(model, noise(3), inputs="native", sigma=100)


def test_the_hull_by_hand_on_a_model(model):
    "Theorem 19 written out token by token, with full decompositions."
    x = noise(3)
    frame = vp.bounds(model, x, kind="hull").set_index(KEYS)
    with torch.no_grad():
        tokens = model._pos_embed(model.patch_embed(x)).numpy()
    n, d, h = 5, 12, 3

    def widest(points):  # (images, n, k)
        return max(np.linalg.norm(image[:, None] - image[None], axis=-1).max() for image in points)

    for i, block in enumerate(model.blocks):
        s, each, into = {k: v.numpy() for k, v in block.attn.state_dict().items()}, [], []
        for k in range(h):
            rows = [slice(part * d + k * d // h, part * d + (k + 1) * d // h) for part in range(3)]
            Q, K, V = (s["qkv.weight"][row] for row in rows)
            O, scale = s["proj.weight"][:, k * d // h : (k + 1) * d // h], (d // h) ** -0.5
            query = tokens @ Q.T + s["qkv.bias"][rows[0]]
            kappa = scale * np.linalg.norm(query @ K, axis=-1).max()
            zeta, alpha = widest(tokens @ (O @ V).T) / 2, scale * widest(tokens @ (Q.T @ K).T) / 2
            omega = min(kappa * widest(tokens), scale * np.linalg.norm(query, axis=-1).max() * widest(tokens @ K.T))
            N = n / (1 + (n - 1) * math.exp(-omega))
            each.append(math.sqrt(N * (np.linalg.norm(O @ V, 2) ** 2 + (kappa * zeta) ** 2)) + zeta * alpha)
            into.append(math.sqrt(each[-1]) * np.linalg.svd(O, full_matrices=False)[0])
        joined = np.linalg.norm(np.concatenate(into, 1), 2) * math.sqrt(sum(each))
        assert np.isclose(frame.bound[i, "MHA"], joined, rtol=1e-10)


def test_the_default_is_proven_and_huge_domains_are_infinite(model):
    assert vp.bounds(model, noise(2)).proven.all() and (vp.bounds(model, noise(2)).kind == "sharp").all()
    frame = vp.bounds(model, radius=1e200, kind=("published", "sharp"))
    far = frame[frame.component == "MHA"]
    assert np.isinf(far.bound).all() and far.reason.ne("").all()


def test_weights_that_are_not_finite_are_named(model):
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[0, 0] = math.nan
    for function in (vp.bounds, vp.lipschitz):
        with pytest.raises(ValueError, match="FC1 of block 1.*its weights are NaN or infinite"):
            function(model, noise(2))


def test_a_kind_that_is_named_twice_is_computed_once(model):
    twice, once = vp.bounds(model, radius=1.0, kind=["sharp", "published", "sharp"]), vp.bounds(model, radius=1.0, kind="sharp")
    assert len(twice) == 2 * len(once) and twice[twice.kind == "sharp"].bound.tolist() == once.bound.tolist()


def test_tokens_that_are_not_finite_are_named(model):
    with torch.no_grad():
        model.blocks[1].norm1.weight.fill_(1e308), model.blocks[1].norm1.bias.fill_(1e308)
    for function in (vp.bounds, vp.lipschitz):
        with pytest.raises(ValueError, match="MHA of block 1.*its tokens are NaN or infinite"):
            function(model, noise(2), inputs="native")


def test_without_images_the_norms_fall_back_on_eps(model):
    frame = vp.bounds(model, radius=3.0, kind="published").set_index(KEYS)
    eps = model.blocks[0].norm1.eps
    assert np.isclose(frame.bound[0, "LN1"], model.blocks[0].norm1.weight.abs().max().item() / math.sqrt(eps))
    assert frame.radius[1, "MHA"] == 3.0 and frame.n_tokens[1, "MHA"] == 5


def test_a_zero_spread_is_infinite_and_not_a_number():
    model = tiny_vit()
    with torch.no_grad():
        model.patch_embed.proj.weight.zero_(), model.patch_embed.proj.bias.fill_(1), model.pos_embed.fill_(1), model.cls_token.fill_(1)
    for block in model.blocks:
        block.norm1.eps = 0.0
    frame = vp.bounds(model, noise(2), kind=KINDS_OF_BOUND)
    flat = frame[frame.component == "LN1"]
    assert np.isinf(flat.bound).all() and (flat.reason == "a token has no spread and eps = 0: sigma = 0").all()


@pytest.mark.parametrize("kwargs, message", [
    ({}, "no global Lipschitz constant; expected images"),
    (dict(radius=0.0), "radius=0.0: expected a positive number"),
    (dict(radius=math.nan), "radius=nan"),
    (dict(radius=1.0, sigma=0.0), "sigma=0.0: expected a positive number"),
    (dict(radius=1.0, sigma=-1), "sigma=-1"),
    (dict(radius=1.0, kind=("sharp", "best")), "kind='best': expected one of"),
    (dict(radius="1"), "radius='1': expected a positive number"), (dict(radius=True), "radius=True"),
    (dict(radius=1.0, kind=None), "kind=None: expected one of"),
    (dict(radius=1.0, kind=()), r"kind=\(\): expected one of"),
    (dict(radius=1.0, kind="hull"), "the hull is that of images: expected x"),
    (dict(radius=1.0, kind="shrap"), "kind='shrap': expected one of"),
    (dict(radius=1.0, inputs="both"), "inputs='both'"),
    (dict(x=[]), "no images"),
    (dict(x=noise(2)[..., :8]), r"expected \(N, 3, 16, 16\)"),
])  # fmt: skip
def test_bad_input(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        vp.bounds(model, **kwargs)


def test_a_radius_smaller_than_the_tokens_is_refused(model):
    needed = vp.bounds(model, noise(2), kind="published").radius.max()
    with pytest.raises(ValueError, match=f"smaller than the tokens' own at MHA of block 0.*expected at least {needed:.6g}"):
        vp.bounds(model, noise(2), radius=0.9 * needed)
    with pytest.raises(ValueError, match="smaller than the tokens' own"):
        vp.bounds(model, noise(2), radius=0.9999 * needed)
    own = vp.bounds(model, noise(2), kind="published").radius
    rounded = vp.bounds(model, noise(2), radius=(1 - 1e-6) * needed, kind="published").radius  # as by another forward pass
    assert rounded.max() == needed and (rounded.dropna() >= own.dropna()).all()  # the ball holds the tokens
    larger = vp.bounds(model, noise(2), radius=2 * needed)
    assert (larger.radius.dropna() == 2 * needed).all()
