"""Bounds: never violated on random models, equal to the formulas written out with full decompositions, honest about assumptions."""
import math

import numpy as np
import pytest
import torch
from conftest import noise, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st

import vitplast as vp
from vitplast.bounds import spectral_norm, spectral_norm_product

KEYS = ["block", "component"]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), heads=st.sampled_from([1, 2, 3]), d_head=st.sampled_from([1, 4, 5]), depth=st.integers(1, 2), inputs=st.sampled_from(["embedding", "native"]),
    scale=st.floats(0.1, 3), size=st.sampled_from([8, 16, 24]), flip=st.booleans(),
)  # fmt: skip
def test_mean_at_most_max_at_most_bound(seed, heads, d_head, depth, inputs, scale, size, flip):
    model = tiny_vit(seed, embed_dim=heads * d_head * 2, num_heads=heads * 2, depth=depth, img_size=size)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.bias[: block.attn.attn_dim] = 0  # the published theorem has no query bias
            block.attn.qkv.weight.mul_(scale)
            block.norm1.weight.mul_(-1 if flip else 1)
    x, y = noise(4, seed + 1, size), noise(4, seed + 2, size)
    y[0] = x[0] + 1e-4 * y[0]  # a close pair sees the derivative
    seen, bound = vp.plasticity(model, x, y, inputs=inputs), vp.bounds(model, torch.cat([x, y]), inputs=inputs)
    assert seen[KEYS].equals(bound[KEYS]) and bound.proven.all()
    assert (seen.plasticity <= seen.max_ratio * (1 + 1e-12)).all()
    assert (seen.max_ratio <= bound.bound * (1 + 1e-7)).all()  # the close pair's difference has lost some digits


def test_formulas_written_out_with_full_decompositions(model):
    x = noise(3)
    frame = vp.bounds(model, x, inputs="embedding").set_index(KEYS)
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


@given(seed=st.integers(0, 10**6), k=st.integers(1, 6), d=st.integers(6, 20), scale=st.floats(1e-6, 1e6))
@settings(max_examples=50, deadline=None)
def test_spectral_norm_of_a_product_is_exact(seed, k, d, scale):
    g = torch.Generator().manual_seed(seed)
    left, right = scale * torch.randn(2, 3, k, d, generator=g, dtype=torch.float64)
    exact = np.linalg.svd(left.mT.numpy() @ right.numpy(), compute_uv=False)[:, 0]
    assert np.allclose(spectral_norm_product(left, right), exact, rtol=1e-10, atol=0)
    assert np.allclose(spectral_norm(left), np.linalg.norm(left.numpy(), 2, axis=(-2, -1)), rtol=1e-12, atol=0)


def test_a_query_bias_is_not_covered_and_said_so():
    with_bias, without = vp.bounds(tiny_vit(), radius=1.0), vp.bounds(tiny_vit(qkv_bias=False), radius=1.0)
    assert not with_bias.proven[with_bias.component == "MHA"].any() and with_bias.proven[with_bias.component != "MHA"].all()
    assert without.proven.all()


def test_without_images_the_norms_fall_back_on_eps(model):
    frame = vp.bounds(model, radius=3.0).set_index(KEYS)
    eps = model.blocks[0].norm1.eps
    assert np.isclose(frame.bound[0, "LN1"], model.blocks[0].norm1.weight.abs().max().item() / math.sqrt(eps))
    assert frame.radius[1, "MHA"] == 3.0 and frame.n_tokens[1, "MHA"] == 5


def test_a_zero_spread_is_infinite_and_not_a_number():
    model = tiny_vit()
    with torch.no_grad():
        model.patch_embed.proj.weight.zero_(), model.patch_embed.proj.bias.fill_(1), model.pos_embed.fill_(1), model.cls_token.fill_(1)
    for block in model.blocks:
        block.norm1.eps = 0.0
    frame = vp.bounds(model, noise(2))
    assert np.isinf(frame.bound[frame.component == "LN1"]).all()


@pytest.mark.parametrize("kwargs, message", [
    ({}, "no global Lipschitz constant: expected images"),
    (dict(radius=0.0), "radius=0.0: expected a positive number"),
    (dict(radius=math.nan), "radius=nan"),
    (dict(radius=1.0, kind="shrap"), "kind='shrap': expected one of"),
    (dict(radius=1.0, inputs="both"), "inputs='both'"),
    (dict(x=[]), "no images"),
    (dict(x=noise(2)[..., :8]), r"expected \(N, 3, 16, 16\)"),
])  # fmt: skip
def test_bad_input(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        vp.bounds(model, **kwargs)


def test_a_radius_smaller_than_the_tokens_is_refused(model):
    needed = vp.bounds(model, noise(2)).radius.max()
    with pytest.raises(ValueError, match=f"smaller than the tokens' own at MHA of block 0.*expected at least {needed:.6g}"):
        vp.bounds(model, noise(2), radius=0.9 * needed)
    larger = vp.bounds(model, noise(2), radius=2 * needed)
    assert (larger.radius.dropna() == 2 * needed).all()
