"""Euler's identities (Theorem 35): what function-preserving maps demand of the gradients that our backward pass returns."""
import pytest
import torch
from conftest import noise, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st

from vitplast.models import anatomy, rescale
from vitplast.theory import gradient_bounds
from vitplast.theory.gradients import backward, requiring_all

BLOCKS = range(2)


def gradients(model, seed=0, n=5):
    "Weights and their gradients, by full name, from our backward pass; and norms, embedding and head from plain autograd."
    x, labels = noise(n, seed), torch.arange(n) % 4
    parts = anatomy(model)
    _, _, own = backward(model, parts, x, labels)
    found = {name: g for c, gs in zip(parts.components, own) for name, g in zip(c.parameters, gs)}
    with requiring_all(model):
        rest = {n: p for n, p in model.named_parameters() if n not in found}
        found |= dict(zip(rest, torch.autograd.grad(torch.nn.functional.cross_entropy(model(x), labels), rest.values())))
    return {n: p.detach() for n, p in model.named_parameters()}, found


def close(a, b, scale):
    return (a - b).abs().max() <= 1e-12 * scale


def build(seed, **kwargs):
    return tiny_vit(seed, num_classes=4, **kwargs)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), scaled=st.booleans())
def test_scalings_of_norms_and_branches(seed, scaled):
    p, g = gradients(build(seed, init_values=0.3 if scaled else None), seed)
    size = max(t.abs().max() for t in g.values()) * 100
    for b in (f"blocks.{i}." for i in BLOCKS):
        for norm, reader in (("norm1", "attn.qkv"), ("norm2", "mlp.fc1")):
            w, s, r = f"{b}{norm}.weight", f"{b}{norm}.bias", f"{b}{reader}.weight"
            left, right = p[w] * g[w] + p[s] * g[s], (p[r] * g[r]).sum(0)
            assert close(left, right, size) and not close(p[w] * g[w], right, size)
            # a reader meets nothing along 1/gamma
            null = g[r] @ (1 / p[w]) - g[f"{b}{reader}.bias"] * (p[s] / p[w]).sum()
            assert null.abs().max() <= 1e-10 * size
        for scale, writer in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            W, bias = f"{b}{writer}.weight", f"{b}{writer}.bias"
            if scaled:
                whole = (p[W] * g[W]).sum(1) + p[bias] * g[bias]
                assert close(whole, p[f"{b}{scale}.gamma"] * g[f"{b}{scale}.gamma"], size)
                assert not close(g[W].sum(0), torch.zeros(()), size)
            else:  # nothing is gained along the ones
                assert close(g[W].sum(0), torch.zeros(()), size) and close(g[bias].sum(), torch.zeros(()), size)


@pytest.mark.parametrize("seed", range(3))
def test_bases_inside_heads(seed):
    p, g = gradients(build(seed), seed)
    size = max(t.abs().max() for t in g.values()) * 100
    for b in (f"blocks.{i}.attn." for i in BLOCKS):
        W, dW = (t[f"{b}qkv.weight"].view(3, 3, 4, 12) for t in (p, g))
        bias, db = (t[f"{b}qkv.bias"].view(3, 3, 4) for t in (p, g))
        O, dO = (t[f"{b}proj.weight"].view(12, 3, 4).movedim(0, 1) for t in (p, g))
        for h in range(3):
            values = dW[2, h] @ W[2, h].T + torch.outer(db[2, h], bias[2, h])
            assert close(values, O[h].T @ dO[h], size) and not close(values, dO[h].T @ O[h], size)
            queries = dW[0, h] @ W[0, h].T + torch.outer(db[0, h], bias[0, h])
            keys = dW[1, h] @ W[1, h].T
            assert close(queries, keys.T, size) and not close(queries, keys, size)


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_the_size_of_the_stream(eps):
    "Over all writers: <w, g> sums to -2 eps dL/deps, by central differences."
    model = build(1)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    for m in norms:
        m.eps = eps
    p, g = gradients(model)
    writers = [n for n in p if n.startswith(("cls_token", "pos_embed", "patch_embed")) or ".proj." in n or ".fc2." in n]
    total = sum((p[n] * g[n]).sum().item() for n in writers)

    def loss(factor):
        for m in norms:
            m.eps = eps * factor
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(model(noise(5, 0)), torch.arange(5) % 4).item()

    h = 1e-4
    slope = (loss(1 + h) - loss(1 - h)) / (2 * h)  # by the logarithm of eps
    assert abs(total + 2 * slope) <= 1e-7 + 1e-5 * abs(slope)
    assert eps < 0.01 or abs(total) > 1e-4


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_what_maps_do_to_gradients(seed):
    "Theorem 34: shift and read by their formulas, write not at all."
    model = build(seed)
    p, g = gradients(model, seed)
    size = 1 + max(t.abs().max() for t in g.values())
    for name in ("write", "read", "shift"):
        twin = rescale(model, seed=seed, **{name: 2.0})
        q, h = gradients(twin, seed)
        for n in p:
            if name == "write":
                assert (h[n] - g[n]).abs().max() <= 1e-8 * size, n
            elif name == "shift" and n.endswith("attn.proj.weight"):
                bias, W, beta = (n.replace("attn.proj.weight", other) for other in ("attn.qkv.bias", "attn.qkv.weight", "norm1.bias"))
                # what values get beyond what makes up for the shift of the norm
                more = (q[bias] - p[bias] + p[W] @ (q[beta] - p[beta]))[24:]
                expected = g[n] + torch.outer(g[n.replace("weight", "bias")], more)
                assert (h[n] - expected).abs().max() <= 1e-8 * size
            elif name == "shift" and n.endswith("mlp.fc1.weight"):
                norm = n.replace("mlp.fc1.weight", "norm2.bias")
                expected = g[n] + torch.outer(g[n.replace("weight", "bias")], q[norm] - p[norm])
                assert (h[n] - expected).abs().max() <= 1e-8 * size and (h[n] - g[n]).abs().max() > 1e-8
            elif name == "read" and ".norm" not in n:
                assert (h[n] - g[n]).abs().max() <= 1e-7 * size, n


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), c=st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_products_of_plasticity_and_gradient_stay(seed, c):
    "LN1 and what reads it move in opposite directions, by the same factor."
    model = build(seed)
    x, labels = noise(5, seed), torch.arange(5) % 4
    one, other = (gradient_bounds(m, x, labels).set_index(["block", "component"]).gradient for m in (model, rescale(model, LN1=c)))
    for b in BLOCKS:
        assert abs(other[b, "LN1"] * c / one[b, "LN1"] - 1) < 1e-9
        assert abs(other[b, "LN2"] / one[b, "LN2"] - 1) < 1e-9
