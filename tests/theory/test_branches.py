"""Plasticity, share and cosine of branches: written out on every architecture, and the same for every twin."""
import numpy as np
import pytest
import torch
from architectures import BUILD, blocks_of, build, five, inputs_of
from conftest import noise, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st

import vitplast as vp
from vitplast.models import MOVES, SCALINGS, anatomy, normal_form, rescale
from vitplast.theory.branches import branch_measures

MEASURES = ["plasticity", "share", "cosine"]


def by_hand(name, model, x, y):
    "Measures (branches, 3, N), image by image, from weights read by name."
    found = []
    with torch.no_grad():
        for a, b in zip(anatomy(model).embed(x), anatomy(model).embed(y)):
            rows = []
            for block in blocks_of(name, model):
                (parts_a, a2), (parts_b, b2) = (five(block, t, "native") for t in (a, b))
                stream = [(a, b), (parts_a[2][0], parts_b[2][0]), (a2, b2)]
                centred = [(p - q) - (p - q).mean(1, keepdim=True) for p, q in stream]
                for before, after in zip(centred, centred[1:]):
                    added = after - before
                    rows.append([added.norm() / before.norm(), added.norm() / after.norm(), (added * before).sum() / added.norm() / before.norm()])
                a, b = a2, b2
            found.append(torch.tensor(rows))
    return torch.stack(found, -1).numpy()


@pytest.mark.parametrize("name", BUILD)
def test_branches_are_what_they_are_by_hand(name):
    model, x, y = build(name), inputs_of(name, 5), inputs_of(name, 5, seed=1)
    expected = by_hand(name, model, x, y)
    frame = vp.plasticity(model, x, y, of="branch", batch_size=3)
    assert np.allclose(frame[MEASURES].to_numpy(), expected.mean(-1), rtol=1e-9)
    assert np.allclose(frame.max_ratio, expected[:, 0].max(-1), rtol=1e-9)
    assert list(frame.component) == ["attention", "MLP"] * 2 and list(frame.block) == [0, 0, 1, 1] and set(frame.inputs) == {"native"}


def test_all_pairs_are_each_pair():
    model, x, y = tiny_vit(init_values=0.3), noise(4), noise(6, 1)
    frame = vp.plasticity(model, x, y, pairs="all", of="branch", batch_size=3)
    every = [vp.plasticity(model, x[[i] * 2], y[[j] * 2], of="branch") for i in range(4) for j in range(6)]
    for column in MEASURES:
        assert np.allclose(frame[column], np.mean([f[column] for f in every], 0), rtol=1e-9)
        low, high = ("ci_low", "ci_high") if column == "plasticity" else (f"{column}_low", f"{column}_high")
        assert (frame[low] < frame[column]).all() and (frame[column] < frame[high]).all()
    assert (frame.n_pairs == 24).all() and np.allclose(frame.max_ratio, np.max([f.max_ratio for f in every], 0))


def test_pairs_that_come_closer_have_a_limit():
    model, x, y = tiny_vit(), noise(12), noise(12, 1)
    limit = vp.plasticity(model, x, y, pairs="limit", of="branch")
    with torch.no_grad():
        parts = anatomy(model)
        a, b = parts.embed(x), parts.embed(y)
        near = branch_measures(parts, a, a + 1e-6 * (b - a), "paired").mean(-1)
    assert np.allclose(limit[MEASURES], near, rtol=1e-5)


@pytest.mark.parametrize("key", [k for k in (*SCALINGS, *MOVES) if k != "hidden"])
def test_no_map_changes_a_branch(key):
    model = tiny_vit(embed_dim=24, init_values=0.3, num_classes=4)
    x, y = noise(20), noise(20, 1)
    twin = rescale(model, **{key: 3.0})
    for pairs in ("paired", "all", "limit"):
        one, two = (vp.plasticity(m, x, y, pairs=pairs, of="branch") for m in (model, twin))
        assert np.allclose(one.select_dtypes("number"), two.select_dtypes("number"), rtol=1e-9, atol=1e-9), pairs
    changed = vp.plasticity(twin, x, y, inputs="native").plasticity / vp.plasticity(model, x, y, inputs="native").plasticity
    if key in ("LN1", "LN2", "MHA", "FC2", "stream", "write", "fold", "rotate"):
        assert (changed - 1).abs().max() > 0.05
    else:
        assert np.allclose(changed, 1)


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.sampled_from([k for k in (*SCALINGS, *MOVES) if k != "hidden"]), st.floats(0.1, 10), min_size=1, max_size=5), st.integers(0, 99))
def test_no_sequence_of_maps_does(changes, seed):
    model = tiny_vit(embed_dim=24, init_values=0.3, num_classes=4)
    one, two = (vp.plasticity(m, noise(12), noise(12, 1), of="branch") for m in (model, rescale(model, seed, **changes)))
    assert np.allclose(one[MEASURES], two[MEASURES], rtol=1e-8, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.dictionaries(st.sampled_from([k for k in SCALINGS if k != "hidden"]), st.integers(-4, 4).map(lambda k: 2.0**k), min_size=1))
def test_powers_of_two_change_no_bit(changes):
    model = tiny_vit(embed_dim=24, init_values=0.5, num_classes=4).float()
    x, y = noise(12).float(), noise(12, 1).float()
    for pairs in ("paired", "all"):
        one, two = (vp.plasticity(m, x, y, pairs=pairs, of="branch") for m in (model, rescale(model, **changes)))
        assert one.equals(two)


def test_a_normal_form_has_the_branches_of_its_model():
    model = tiny_vit(embed_dim=24, init_values=0.3, num_classes=4)
    one, two = (vp.plasticity(m, noise(12), noise(12, 1), of="branch") for m in (model, normal_form(model)))
    assert np.allclose(one[MEASURES], two[MEASURES], rtol=1e-9)


def test_a_mean_that_is_seen_counts():
    "RMSNorm sees the mean of a token, so that nothing is taken away there."
    model, x, y = tiny_vit(norm_layer="rmsnorm"), noise(12), noise(12, 1)
    with torch.no_grad():
        parts = anatomy(model)
        a, b = parts.embed(x), parts.embed(y)
        added = [model.blocks[0].attn(model.blocks[0].norm1(t)) for t in (a, b)]
    expected = ((added[0] - added[1]).flatten(1).norm(dim=1) / (a - b).flatten(1).norm(dim=1)).mean()
    assert np.isclose(vp.plasticity(model, x, y, of="branch").plasticity[0], expected)


def test_what_does_not_fit():
    model, x = tiny_vit(), noise(12)
    with pytest.raises(ValueError, match="of 'block'; nearest known: .*branch|unknown of"):
        vp.plasticity(model, x, noise(12, 1), of="block")
    with pytest.raises(ValueError, match="inputs='embedding': a branch gets the stream"):
        vp.plasticity(model, x, noise(12, 1), inputs="embedding", of="branch")
    y = torch.cat([x[:2], noise(10, 1)])
    with pytest.warns(UserWarning, match="2 of 12 pairs coincide at the input of attention of block 0"):
        frame = vp.plasticity(model, x, y, of="branch")
    assert (frame.zero_pairs == 2).all() and frame[MEASURES].notna().all(axis=None)
    with torch.no_grad():
        model.pos_embed.mul_(1e308)
    with pytest.raises(ValueError, match="attention of block 0: its tokens are NaN or infinite"):
        vp.plasticity(model, x, noise(12, 1), of="branch")
