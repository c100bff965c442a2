"""Plasticity against numpy brute force that reads the weights directly, intervals, streams and bad input."""
import math

import numpy as np
import pytest
import torch
from conftest import noise, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st

import vitplast as vp
from vitplast.theory.pairs import bootstrap_interval, fingerprints, pair_groups

COLUMNS = ["block", "depth", "component", "inputs", "plasticity", "std_error", "ci_low", "ci_high", "max_ratio", "n_pairs", "zero_pairs"]


def brute_force(model, images):
    "Per component the tokens in and out of one image each, in both protocols, from the state dict with numpy alone."
    s = {k: v.double().numpy() for k, v in model.state_dict().items()}
    heads, (p, eps) = model.blocks[0].attn.num_heads, (model.patch_embed.patch_size[0], model.blocks[0].norm1.eps)

    def norm(x, name):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * s[f"{name}.weight"] + s[f"{name}.bias"]

    def linear(x, name):
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    def attention(x, name):
        d = x.shape[-1]
        q, k, v = np.split(linear(x, f"{name}.qkv"), 3, -1)
        out = []
        for h in range(heads):
            cut = slice(h * d // heads, (h + 1) * d // heads)
            score = np.exp(q[:, cut] @ k[:, cut].T / math.sqrt(d // heads))
            out.append(score / score.sum(-1, keepdims=True) @ v[:, cut])
        return linear(np.concatenate(out, -1), f"{name}.proj")

    def gelu(x):
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    found = {"embedding": [], "native": []}
    for image in images.double().numpy():
        n = image.shape[-1] // p
        patches = image.reshape(3, n, p, n, p).transpose(1, 3, 0, 2, 4).reshape(n * n, -1)
        tokens = patches @ s["patch_embed.proj.weight"].reshape(-1, patches.shape[-1]).T + s["patch_embed.proj.bias"]
        e = x = np.concatenate([s["cls_token"][0], tokens]) + s["pos_embed"][0]
        rows = {"embedding": [], "native": []}
        for i in range(len(model.blocks)):
            b = f"blocks.{i}"
            padded = np.zeros((len(e), s[f"{b}.mlp.fc2.weight"].shape[1]))
            padded[:, : e.shape[1]] = e
            rows["embedding"] += [(e, norm(e, f"{b}.norm1")), (e, attention(e, f"{b}.attn")), (e, norm(e, f"{b}.norm2")), (e, linear(e, f"{b}.mlp.fc1")), (padded, linear(padded, f"{b}.mlp.fc2"))]
            h = norm(x, f"{b}.norm1")
            a = attention(h, f"{b}.attn")
            x2 = x + a
            k = norm(x2, f"{b}.norm2")
            u = linear(k, f"{b}.mlp.fc1")
            y = linear(gelu(u), f"{b}.mlp.fc2")
            rows["native"] += [(x, h), (h, a), (x2, k), (k, u), (gelu(u), y)]
            x = x2 + y
        for inputs in rows:
            found[inputs].append(rows[inputs])
    return found


def brute_ratios(model, x, y, inputs):
    "Ratios (pairs, components)."
    a, b = brute_force(model, x)[inputs], brute_force(model, y)[inputs]
    return np.array([[np.linalg.norm(fo - go) / np.linalg.norm(fi - gi) for (fi, fo), (gi, go) in zip(p, q)] for p, q in zip(a, b)])


@pytest.mark.parametrize("inputs", ["embedding", "native"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_brute_force_agrees(inputs, dtype, tolerance):
    model, x, y = tiny_vit(), noise(5, 1), 2 * noise(5, 2)
    expected = brute_ratios(model, x, y, inputs)
    frame = vp.plasticity(model.to(dtype), x.to(dtype), y.to(dtype), inputs=inputs, batch_size=2)
    assert np.allclose(frame.plasticity, expected.mean(0), rtol=tolerance, atol=0)
    assert np.allclose(frame.max_ratio, expected.max(0), rtol=tolerance, atol=0)
    assert list(frame) == COLUMNS and (frame.n_pairs == 5).all() and (frame.inputs == inputs).all()
    assert (frame.ci_low <= frame.plasticity).all() and (frame.plasticity <= frame.ci_high).all() and (frame.ci_high <= frame.max_ratio + 1e-9).all()


def test_batches_and_streams_change_nothing(model):
    x, y = noise(7, 1), noise(7, 2)
    whole = vp.plasticity(model, x, y)
    for source in ([x[:3], x[3:]], ((b, torch.zeros(len(b))) for b in x.split(2))):
        again = vp.plasticity(model, source, y.split(5), batch_size=3)
        assert np.allclose(again.plasticity, whole.plasticity, rtol=1e-12) and np.allclose(again.ci_high, whole.ci_high, rtol=1e-9)
    shorter = vp.plasticity(model, iter(x.split(2)), [y[:4]])
    assert (shorter.n_pairs == 4).all()


def test_a_pair_that_coincides_is_counted_and_left_out(model):
    x, y = noise(4, 1), noise(4, 2)
    y[1] = x[1]
    with pytest.warns(UserWarning, match="1 of 4 pairs coincide"):
        frame = vp.plasticity(model, x, y)
    rest = vp.plasticity(model, x[[0, 2, 3]], y[[0, 2, 3]])
    assert (frame.zero_pairs == 1).all() and (frame.n_pairs == 3).all() and np.allclose(frame.plasticity, rest.plasticity, rtol=1e-12)
    with pytest.warns(UserWarning, match="4 of 4"):
        assert vp.plasticity(model, x, x).plasticity.isna().all()


def test_dropout_is_off_while_measuring_and_back_afterwards():
    model = tiny_vit(proj_drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5).train()
    first, second = (vp.plasticity(model, noise(4, 1), noise(4, 2), inputs="native") for _ in range(2))
    assert first.equals(second) and model.training and all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


@settings(max_examples=25, deadline=None)
@given(c=st.floats(-50, 50).filter(lambda c: abs(c) > 1e-3), kind=st.sampled_from(["FC1", "FC2", "LN1"]))
def test_scaling_a_component_scales_its_plasticity(c, kind):
    model, x, y = tiny_vit(), noise(3, 1), noise(3, 2)
    before = vp.plasticity(model, x, y).set_index(["block", "component"]).plasticity
    with torch.no_grad():
        for part in vp.components(model):
            if part.kind == kind:
                for p in part.parameters.values():
                    p.mul_(c)
    after = vp.plasticity(model, x, y).set_index(["block", "component"]).plasticity
    ratio = (after / before).unstack()
    assert np.allclose(ratio[kind], abs(c), rtol=1e-9) and np.allclose(ratio.drop(columns=kind), 1, rtol=1e-12)


def test_pairs_that_share_an_image_are_one_group():
    assert list(pair_groups(np.array([1.0, 2, 3, 4]), np.array([5.0, 6, 5, 8]))) == [0, 1, 0, 2]
    assert list(pair_groups(np.array([1.0, 2, 3]), np.array([2.0, 3, 1]))) == [0, 0, 0]  # a cycle joins all
    assert list(pair_groups(np.array([1.0, 2]), np.array([3.0, 4]))) == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fingerprints_recognise_equal_images_across_batches(dtype):
    images = noise(50).to(dtype)
    images[30] = images[4]
    images[31] = images[5]
    images[31, 0, 0, 0] += 1e-6  # nearly equal is not equal
    alone = torch.cat([fingerprints(i[None]) for i in images]).numpy()
    together = fingerprints(images).numpy()
    groups = pair_groups(np.concatenate([alone, together]), np.arange(100))
    assert len(set(groups)) == 49 and groups[30] == groups[4] and (groups[:50] == groups[50:]).all()


def test_intervals_cover_and_cycled_images_make_them_wider():
    rng, hits = np.random.default_rng(0), 0
    for i in range(100):
        low, high, _ = bootstrap_interval(rng.exponential(size=(60, 1)), np.arange(60), resamples=300, seed=i)[:, 0]
        hits += low <= 1 <= high
    assert 85 <= hits <= 100  # nominal 95 of 100
    effects = rng.normal(size=8)[np.arange(80) % 8][:, None]
    cycled = np.diff(bootstrap_interval(effects, np.arange(80) % 8)[:2, 0])
    naive = np.diff(bootstrap_interval(effects, np.arange(80))[:2, 0])
    assert cycled > 2 * naive


def test_cycled_images_are_seen_by_the_front_door(model):
    x, y = noise(40, 1), noise(4, 2).repeat(10, 1, 1, 1)
    with pytest.warns(UserWarning, match="4 groups of images that share none: an interval from fewer than 10"):
        few = vp.plasticity(model, x, y)
    ratios = torch.tensor(brute_ratios(model, x, y, "embedding")).view(10, 4, -1).mean(0)  # of each y
    assert np.allclose(few.ci_low, bootstrap_interval(ratios.numpy(), np.arange(4))[0], rtol=0.02)  # up to the order of the groups
    with pytest.warns(UserWarning, match="no interval"):
        assert vp.plasticity(model, x, x.roll(1, 0)).ci_low.isna().all()


BAD = {
    "bytes": (lambda x: (x * 10).to(torch.uint8), TypeError, "torch.uint8, expected normalised floats"),
    "wrong precision": (lambda x: x.float(), TypeError, "torch.float32, expected the model's torch.float64"),
    "wrong size": (lambda x: x[..., :8], ValueError, r"shape \(4, 3, 16, 8\), expected \(N, 3, 16, 16\)"),
    "wrong channels": (lambda x: x[:, :1], ValueError, r"expected \(N, 3, 16, 16\)"),
    "no batch": (lambda x: [x[0]], ValueError, r"shape \(3, 16, 16\)"),
    "NaN": (lambda x: x * torch.where(x == x.max(), math.nan, 1.0), ValueError, "1 values are NaN or infinite"),
    "infinite": (lambda x: x / 0, ValueError, "NaN or infinite"),
    "not a tensor": (lambda x: [x.numpy()], TypeError, "ndarray, expected a tensor"),
    "one image": (lambda x: [x[:1]], ValueError, "1 pair of images: expected at least 2"),
    "none": (lambda x: [], ValueError, "0 pair"),
    "other length": (lambda x: x[:3], ValueError, "x has 4 images and y has 3"),
}


@pytest.mark.parametrize("spoil, error, message", BAD.values(), ids=BAD)
def test_bad_images(model, spoil, error, message):
    with pytest.raises(error, match=message):
        vp.plasticity(model, noise(4), spoil(noise(4, 1)))


def test_tokens_that_are_not_finite_are_named(model):
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"FC1 of block 1 \(.*its (tokens|weights) are NaN or infinite"):
        vp.plasticity(model, noise(4), noise(4, 1))


def test_batches_of_different_size_are_named(model):
    with pytest.raises(ValueError, match=r"y: shape \(2, 3, 8, 8\), expected"):
        vp.plasticity(model, noise(4), [noise(2), noise(2)[..., :8, :8]])
    for size in (0, -1, 2.0):
        with pytest.raises(ValueError, match=f"batch_size={size}: expected a positive integer"):
            vp.plasticity(model, noise(2), noise(2, 1), batch_size=size)


def test_bad_settings(model):
    with pytest.raises(ValueError, match="inputs='nativ'"):
        vp.plasticity(model, noise(2), noise(2, 1), inputs="nativ")
    with pytest.raises(ValueError, match="pairs='al'"):
        vp.plasticity(model, noise(2), noise(2, 1), pairs="al")
    with pytest.raises(ValueError, match="confidence=95"):
        vp.plasticity(model, noise(2), noise(2, 1), confidence=95)
    with pytest.raises(TypeError, match="bfloat16: expected float32 or float64"):
        vp.plasticity(model.bfloat16(), noise(2).bfloat16(), noise(2, 1).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fingerprints_tell_signs_and_black_and_white_apart(dtype):
    g = torch.Generator().manual_seed(0)
    white = torch.randint(0, 2, (500, 1, 8, 8), generator=g).to(dtype)
    for images in (white, 2 * white - 1, torch.cat([2 * white - 1, 1 - 2 * white])):
        distinct = len({tuple(i.flatten().tolist()) for i in images})
        assert len(set(fingerprints(images).tolist())) == distinct
