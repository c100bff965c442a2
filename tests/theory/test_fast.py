"""Shared work of the embedding protocol: the same numbers as the plain estimator, chosen where it is less."""
import sys

import pytest
import torch
from architectures import BUILD, build, inputs_of
from conftest import noise, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st

import vitplast as vp
from vitplast.models import anatomy
from vitplast.theory import make_plan
from vitplast.theory.fast import shared_distances, sharing_pays
from vitplast.theory.plasticity import pair_distances


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32), ratio=st.sampled_from([0.5, 1.0, 2.0, 4.0]), depth=st.integers(1, 3), pairs=st.integers(1, 4), size=st.floats(-3, 3),
    bias=st.booleans(), norm=st.sampled_from(["layernorm", "rmsnorm"]),
)  # fmt: skip
def test_shared_distances_are_the_plain_ones(seed, ratio, depth, pairs, size, bias, norm):
    model = tiny_vit(seed, mlp_ratio=ratio, depth=depth, qkv_bias=bias, proj_bias=bias, norm_layer=norm)
    parts = anatomy(model)
    with torch.no_grad():
        x, y = (10**size * torch.randn(pairs, 5, 12, generator=torch.Generator().manual_seed(seed + i), dtype=torch.float64) for i in range(2))
        plain = pair_distances(parts, x, y, "embedding")
        shared = shared_distances(make_plan(parts, 12), x, y)
    for a, b in zip(plain, shared):
        assert torch.allclose(a, b, rtol=1e-9, atol=0)


@pytest.mark.parametrize("condition", [2, 4, 6])
def test_differences_where_a_layer_is_weakest(condition):
    model = tiny_vit(embed_dim=24, mlp_ratio=4.0)
    with torch.no_grad():
        fc1 = model.blocks[1].mlp.fc1
        U, _, V = torch.linalg.svd(fc1.weight, full_matrices=False)
        fc1.weight.copy_((U @ torch.diag(torch.logspace(0, -condition, 24, dtype=torch.float64)) @ V).float())
        x, size = torch.randn(4, 5, 24, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 8.0, 0.0, 64.0])
        y = x + size[:, None, None] * V[-1].float()
        exact = ((x - y).double() @ fc1.weight.T).flatten(1).norm(dim=1)
        model.float()
        found = shared_distances(make_plan(anatomy(model), 24), x, y)[1][8]  # FC1 of the second block
    assert torch.allclose(found.double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", BUILD)
def test_single_precision_agrees_to_a_hundred_thousandth(name):
    model, (x, y) = build(name).float(), (inputs_of(name, 6), inputs_of(name, 6, seed=1))
    x, y = (t if t.dtype == torch.long else t.float() for t in (x, y))
    plain, shared = (vp.plasticity(model, x, y, fast=fast) for fast in (False, True))
    for column in ("plasticity", "max_ratio"):
        assert (plain[column] / shared[column] - 1).abs().max() < 1e-5


def test_nearly_equal_images_lose_no_digits(model):
    x = noise(4).float()
    y = x + 1e-4 * noise(4, 1).float()
    exact = vp.plasticity(model, x.double(), y.double(), fast=False).plasticity
    shared = vp.plasticity(model.float(), x, y, fast=True).plasticity
    assert (shared / exact - 1).abs().max() < 2e-2  # rounding of the tokens themselves, 1e-7 of a difference of 1e-4
    plain = vp.plasticity(model, x, y, fast=False).plasticity
    assert (shared / exact - 1).abs().max() < 2 * (plain / exact - 1).abs().max() + 1e-5


def test_the_choice_follows_the_count():
    parts = anatomy(tiny_vit(embed_dim=48, mlp_ratio=4.0))
    shapes = [c.weights().W.shape for c in parts.components if c.kind in ("FC1", "FC2")]
    for n_tokens in (1, 5, 50):
        plain, shared = sum(2 * n_tokens * m * k for m, k in shapes), (n_tokens + 4) * 48**2
        once = sum(m * min(k, 48) ** 2 for m, k in shapes)
        for pairs in (1, 2, 3, 10, 1000, float("inf")):
            assert sharing_pays(parts, n_tokens, 48, pairs) == (pairs * plain > pairs * shared + once if pairs < float("inf") else plain > shared)
    assert not sharing_pays(parts, 5, 48, 1) and sharing_pays(parts, 5, 48, 10)


def test_it_is_chosen_by_itself(monkeypatch):
    module, used = sys.modules["vitplast.theory.plasticity"], []  # vp.plasticity is the function
    monkeypatch.setattr(module, "shared_distances", lambda *args: used.append(1) or shared_distances(*args))
    model = tiny_vit(embed_dim=96, mlp_ratio=4.0)  # five tokens: sharing pays from the second pair on, or later
    first = next(n for n in range(2, 50) if sharing_pays(anatomy(model), 5, 96, n))
    for n, inputs, expected in ((first - 1, "embedding", False), (first, "embedding", True), (40, "native", False)):
        used.clear()
        vp.plasticity(model, noise(n), noise(n, 1), inputs=inputs)
        assert bool(used) == expected
    vp.plasticity(model, noise(40).split(10), noise(40, 1).split(10))
    assert used
