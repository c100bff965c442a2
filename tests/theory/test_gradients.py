"""Gradient bounds: measured gradients against plain backward, gains against random signals through functions written out."""
import math

import pytest
import torch
from conftest import WORST, noise, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from test_theory import attend

from vitplast.models import Attention, GPTConfig, Linear, Norm, anatomy, build
from vitplast.theory import gradient_bounds
from vitplast.theory.gradients import gain


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


@pytest.mark.parametrize("kind", ["linear", "LayerNorm", "RMSNorm"])
def test_the_gain_of_linear_layers_and_norms_is_the_exact_one(kind):
    "The largest gradient over all signals of norm 1 is the norm of the Jacobian by the parameters."
    g = torch.Generator().manual_seed(0)
    x, (first, second) = torch.randn(2, 3, 4, generator=g, dtype=torch.float64), torch.randn(2, 4, generator=g, dtype=torch.float64)
    if kind == "linear":
        w = Linear(torch.randn(5, 4, generator=g, dtype=torch.float64), torch.randn(5, generator=g, dtype=torch.float64))
        f = lambda W, b: x @ W.T + b  # noqa: E731
    else:
        w = Norm(first, second, 1e-3, kind == "LayerNorm")
        u = x - x.mean(-1, keepdim=True) if w.centred else x
        f = lambda gamma, beta: gamma * u / (u.square().mean(-1, keepdim=True) + w.eps).sqrt() + beta  # noqa: E731
    J = torch.autograd.functional.jacobian(f, tuple(w[:2]))
    exact = torch.linalg.matrix_norm(torch.cat([j.reshape(f(*w[:2]).numel(), -1) for j in J], 1), 2).item()
    assert math.isclose(gain(w, x), exact, rel_tol=1e-9)


def test_the_model_is_left_alone():
    model = tiny_vit(num_classes=4).train()
    model.blocks[0].attn.qkv.weight.requires_grad_(False)
    gradient_bounds(model, noise(2), torch.tensor([0, 1]))
    assert not model.blocks[0].attn.qkv.weight.requires_grad and model.blocks[1].attn.qkv.weight.requires_grad
    assert model.training and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match="labels: 0 to 9, expected 0 to 3"), torch.no_grad():
        gradient_bounds(model, noise(2), torch.tensor([0, 9]))
    for labels in (torch.tensor([0, 1, 2]), torch.tensor([0.0, 1.0]), [0, 1]):
        with pytest.raises(ValueError, match="labels: .*expected 2 whole numbers in a tensor"):
            gradient_bounds(model, noise(2), labels)
    with pytest.raises(TypeError, match="images: torch.float32, model: torch.float64"):
        gradient_bounds(model, noise(2, dtype=torch.float32), torch.tensor([0, 1]))
    assert model.training and not any(m._forward_hooks for m in model.modules()) and not model.blocks[0].attn.qkv.weight.requires_grad


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="the model has no head: expected one"):
        gradient_bounds(tiny_vit(), noise(2), torch.tensor([0, 1]))


def test_gradients_of_a_language_model_against_autograd():
    model = build(GPTConfig(context=12, width=16, depth=2, heads=2), 5)
    x, labels = torch.randint(256, (2, 3, 12))
    frame = gradient_bounds(model, x, labels)
    torch.nn.functional.cross_entropy(model(x).logits.flatten(0, 1), labels.flatten()).backward()
    for row in frame.itertuples():
        c = anatomy(model).components[row.Index]
        assert row.gradient == pytest.approx(math.hypot(*(p.grad.norm().item() for p in c.parameters.values())), rel=1e-4)
    assert (frame.gradient <= frame.bound * (1 + 1e-5)).all()
    with pytest.raises(ValueError, match=r"labels: shape \(3,\), expected \(3, 12\)|no head"):
        gradient_bounds(model, x, labels[:, 0])
    with pytest.raises(ValueError, match=r"labels: shape \(3, 11\), expected \(3, 12\)"):
        gradient_bounds(model, x, labels[:, :11])
    with pytest.raises(TypeError, match="this GPT2Model has no head: expected a GPT2LMHeadModel"):
        gradient_bounds(model.transformer, x, labels)
