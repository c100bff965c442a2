"""Gradient bounds: measured gradients against plain backward, gains against random signals through functions written out."""
import math

import pytest
import torch
from conftest import WORST, noise, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from test_theory import attend

from vitplast.components import Attention, anatomy
from vitplast.gradients import gain, gradient_bounds


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 4), heads=st.integers(1, 3), d_head=st.integers(1, 3), size=st.floats(-2, 2), causal=st.booleans(), rotary=st.booleans())
def test_no_signal_lifts_an_attention_above_its_gain(seed, n, heads, d_head, size, causal, rotary):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    h, k, d = heads, d_head, 4
    leaves = [draw(h, k, d), draw(h, k), draw(h, k, d), draw(h, k), draw(h, k, d), draw(h, k), draw(h, d, k), draw(d)]
    w = Attention(*leaves, 0.7, causal, rotary)
    turn = torch.linalg.qr(draw(n, k, k).detach()).Q if rotary else torch.eye(k, dtype=torch.float64).expand(n, -1, -1)
    x, signal = (10**size * draw(2, n, d)).detach(), draw(2, n, d).detach()
    gradients = torch.autograd.grad(sum((s * attend(w, t, turn)).sum() for s, t in zip(signal, x)), leaves)
    norm = math.sqrt(sum(q.square().sum().item() for q in gradients))
    assert norm <= gain(w, x) * signal.norm().item() * (1 + 1e-9)
    if not rotary:
        assert gradients[3].norm() <= 1e-10 * (1 + norm)  # the key bias


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 3), norm=st.sampled_from([None, "rmsnorm"]), bias=st.booleans())
def test_measured_gradients_are_those_of_backward_and_below_the_bound(seed, scale, norm, bias):
    model = tiny_vit(seed, num_classes=4, norm_layer=norm, qkv_bias=bias)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(scale)
    x, labels = noise(5, seed), torch.arange(5) % 4
    frame = gradient_bounds(model, x, labels)
    torch.nn.functional.cross_entropy(model(x), labels).backward()
    for c, row in zip(anatomy(model).components, frame.itertuples()):
        assert math.isclose(row.gradient, math.sqrt(sum(p.grad.square().sum().item() for p in c.parameters.values())), rel_tol=1e-9)
        WORST[f"gradient of {c.kind}"] = max(WORST.get(f"gradient of {c.kind}", 0.0), row.gradient / row.bound)
    assert (frame.gradient <= frame.bound * (1 + 1e-9)).all() and (frame.gradient > 0).all()


def test_the_model_is_left_alone():
    model = tiny_vit(num_classes=4).train()
    model.blocks[0].attn.qkv.weight.requires_grad_(False)
    gradient_bounds(model, noise(2), torch.tensor([0, 1]))
    assert not model.blocks[0].attn.qkv.weight.requires_grad and model.blocks[1].attn.qkv.weight.requires_grad
    assert model.training and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match=r"labels: shape \(2,\), 0 to 9; expected \(2,\), 0 to 3"), torch.no_grad():
        gradient_bounds(model, noise(2), torch.tensor([0, 9]))
    with pytest.raises(ValueError, match=r"labels: shape \(3,\)"):
        gradient_bounds(model, noise(2), torch.tensor([0, 1, 2]))
    assert model.training and not any(m._forward_hooks for m in model.modules()) and not model.blocks[0].attn.qkv.weight.requires_grad


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="the model has no head: expected one"):
        gradient_bounds(tiny_vit(), noise(2), torch.tensor([0, 1]))
