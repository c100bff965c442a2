"What a selection trains through: masks against counts, peft's adapters against their formulas, few pictures, other tasks."
import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vitplast as vp
from vitplast.models import chosen_places
from vitplast.training import finetune_many, fused, updated
from vitplast.training.recipe import with_shots

MODEL, TASK = vp.load("formula-vit-tiny"), vp.task("digits")
SHORT = vp.FinetuneConfig(steps=3, batch_size=8, eval_every=3, lr=0.3)
WIDTH = MODEL.embed_dim
HEAD = 10 * (WIDTH + 1)


def moved(run) -> dict:
    "Which numbers of each tensor of the network are others than before, without the head's."
    own = dict(run.model.named_parameters())
    return {n: own[n] != p for n, p in MODEL.named_parameters() if n in own and not n.startswith("head.") and not torch.equal(own[n], p)}


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["MHA", "FC1@1", "LN1", "MHA.v+LN2", "FC2.bias"]), st.floats(0, 1), st.integers(0, 5))
def test_so_many_numbers_at_random(selection, share, seed):
    places = chosen_places(selection, MODEL, head=False)
    own = dict(MODEL.named_parameters())
    there = {n: torch.ones_like(own[n], dtype=bool) if m is None else m for n, m in places.items()}
    total = sum(int(m.sum()) for m in there.values())
    number = max(1, round(share * total))
    found = updated(MODEL, places, f"random:{number}", seed)
    assert sum(int(m.sum()) for m in found.values()) == number
    assert all(not (m & ~there[n]).any() for n, m in found.items())
    again = updated(MODEL, places, f"random:{number}", seed)
    assert found.keys() == again.keys() and all(torch.equal(found[n], again[n]) for n in found)


def test_every_number_has_the_same_chance():
    places = chosen_places("LN1@0", MODEL, head=False)
    counts = sum(torch.cat([updated(MODEL, places, "random:8", s).get(n, torch.zeros(WIDTH)).float() for n in places]) for s in range(400))
    expected = 400 * 8 / (2 * WIDTH)
    assert abs(counts - expected).max() < 5 * expected**0.5 and counts.sum() == 3200


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["MHA", "FC1@1", "MHA.v", "FC2"]), st.floats(0, 1), st.integers(0, 5))
def test_columns_are_whole_and_fill_the_number(selection, share, seed):
    places = chosen_places(selection, MODEL, head=False)
    own = dict(MODEL.named_parameters())
    matrices = {n: torch.ones_like(own[n], dtype=bool) if m is None else m for n, m in places.items() if own[n].ndim == 2}
    sizes = [int(size) for m in matrices.values() for size in m.sum(0)]
    number = max(min(sizes), round(share * sum(sizes)))
    found = updated(MODEL, places, f"columns:{number}", seed)
    taken = sum(int(m.sum()) for m in found.values())
    assert number - max(sizes) < taken <= number
    for name, mask in found.items():
        assert ((mask == matrices[name]).all(0) | ~mask.any(0)).all()


def test_what_is_not_drawn_stays_to_the_last_bit():
    for update in ("random:100", "columns:200"):
        run = vp.finetune(MODEL, TASK, "MHA+FC1", replace(SHORT, update=update, weight_decay=0.1))
        drawn = updated(MODEL, chosen_places("MHA+FC1", MODEL, head=False), update, 0)
        changed = moved(run)
        assert changed and all(not (c & ~drawn[n]).any() for n, c in changed.items())
        assert run.n_trained == HEAD + sum(int(m.sum()) for m in drawn.values())


@pytest.mark.parametrize("selection, rank", [("MHA", 2), ("FC1@1", 1), ("MHA+FC1+FC2", 3)])
def test_a_low_rank_update_has_its_rank_and_size(selection, rank):
    run = vp.finetune(MODEL, TASK, selection, replace(SHORT, update=f"lora:{rank}"))
    before, own, size = dict(MODEL.named_parameters()), dict(run.model.named_parameters()), 0
    names = [n for n in chosen_places(selection, MODEL, head=False) if n.endswith(".weight")]
    assert moved(run).keys() == set(names)
    for n in names:
        assert torch.linalg.matrix_rank((own[n] - before[n]).double(), rtol=1e-5) == rank
        size += rank * sum(own[n].shape)
    assert run.n_trained == HEAD + size and not hasattr(run.model, "peft_config")
    assert {type(m) for m in run.model.modules()} == {type(m) for m in MODEL.modules()} | {torch.nn.Linear}


def test_queries_and_values_leave_the_keys():
    run = vp.finetune(MODEL, TASK, "MHA.q+MHA.v", replace(SHORT, update="lora:2"))
    for name, changed in moved(run).items():
        q, k, v = changed.any(1).chunk(3)
        assert name.endswith("qkv.weight") and q.any() and v.any() and not k.any()


def test_ia3_multiplies_outputs_and_inner_inputs():
    run = vp.finetune(MODEL, TASK, "MHA.k+MHA.v+FC2", replace(SHORT, update="ia3"))
    before, own = dict(MODEL.named_parameters()), dict(run.model.named_parameters())
    for i in range(len(MODEL.blocks)):
        W, V = (d[f"blocks.{i}.attn.qkv.weight"] for d in (before, own))
        b, c = (d[f"blocks.{i}.attn.qkv.bias"] for d in (before, own))
        factor = (V * W).sum(1) / (W * W).sum(1)
        assert torch.allclose(V, factor[:, None] * W, atol=1e-6) and torch.allclose(c, factor * b, atol=1e-5)
        assert torch.equal(V[:WIDTH], W[:WIDTH]) and (factor[WIDTH:] != 1).any()
        W, V = (d[f"blocks.{i}.mlp.fc2.weight"] for d in (before, own))
        factor = (V * W).sum(0) / (W * W).sum(0)
        assert torch.allclose(V, factor * W, atol=1e-6) and (factor != 1).any()
        assert torch.equal(own[f"blocks.{i}.mlp.fc2.bias"], before[f"blocks.{i}.mlp.fc2.bias"])


def test_first_step_of_lora_is_that_of_its_formula():
    "After one step of plain SGD the update is -rate * 2 * (gradient of the matrix A^T) A: B alone moves, as it began at zero."
    config = replace(SHORT, steps=1, eval_every=1, momentum=0.0, warmup=0.0, clip=None, update="lora:2", lr=0.01)
    run = vp.finetune(MODEL, TASK, "FC1@1", config)
    name = "blocks.1.mlp.fc1.weight"
    change = (dict(run.model.named_parameters())[name] - dict(MODEL.named_parameters())[name]).double()
    plain = vp.finetune(MODEL, TASK, "FC1@1", replace(config, update=None))
    gradient = -(dict(plain.model.named_parameters())[name] - dict(MODEL.named_parameters())[name]).double() / 0.01
    _, _, V = torch.linalg.svd(change)
    rows = V[:2]  # what A spans
    assert torch.allclose(change @ rows.T @ rows, change, atol=1e-7)
    A = torch.linalg.lstsq(gradient @ rows.T, change @ rows.T).solution  # a positive map of what A lets through
    assert (torch.linalg.eigvals(-A).real > 0).all()


@pytest.mark.parametrize("update, selection", [("lora:2", "MHA"), ("ia3", "MHA+FC2"), ("random:50", "FC1"), ("columns:600", "FC1")])
def test_a_saved_run_gives_the_same_logits(tmp_path, update, selection):
    run = vp.finetune(MODEL, TASK, selection, replace(SHORT, update=update))
    run.save(tmp_path / "run")
    again = vp.load_run(tmp_path / "run", MODEL)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(run.model(x), again.model(x)) and again.config.update == update


def test_trainable_puts_the_layers_back():
    model = copy.deepcopy(MODEL)
    with vp.trainable(model, "FC1", head=False, update="lora:2") as training:
        assert all("lora_" in n for n in training.names) and training.n_trained == sum(p.numel() for p in training.chosen.values())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in MODEL.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), MODEL.parameters()))
    assert fused(model) is model


@pytest.mark.parametrize("update, selection, message", [
    ("lora", "MHA", "update='lora': expected a rank, as lora:4"), ("lorra:4", "MHA", "unknown update 'lorra'; nearest known: .'lora'"),
    ("random:0", "MHA", "expected how many, as random:1200"), ("ia3:2", "MHA", "update='ia3:2': expected ia3"),
    ("random:5000000", "MHA", "the selection has [0-9,]+ numbers, expected at most those"), ("columns:1", "MHA", "columns of the selection have"),
    ("columns:9000000", "FC1", "expected something between"), ("lora:2", "LN1", "is of a LayerNorm, expected a selection of linear layers"),
    ("lora:2", "MHA.bias", "changes blocks.0.attn.qkv.weight, which is not in the selection"), ("ia3", "FC1.weight", "changes blocks.0.mlp.fc1.bias"),
    ("random:3", "head", "nothing but a head trains"), (4, "MHA", "update=4: expected None, or text"),
])  # fmt: skip
def test_what_is_wrong_in_an_update(update, selection, message):
    with pytest.raises(ValueError, match=message):
        vp.finetune(MODEL, TASK, selection, replace(SHORT, update=update))


def test_few_pictures_of_each_class():
    for seed in (0, 1):
        few = with_shots(TASK, replace(SHORT, shots=3, seed=seed))
        assert torch.bincount(few.train.labels).tolist() == [3] * 10 and few.validation is TASK.validation
        there = {t.numpy().tobytes() for t in TASK.train.images[TASK.train.labels == 4]}
        assert {t.numpy().tobytes() for t in few.train.images[few.train.labels == 4]} <= there
    one, other = (with_shots(TASK, replace(SHORT, shots=3, seed=s)).train.images for s in (0, 1))
    assert not torch.equal(one, other)
    small = replace(TASK, train=type(TASK.train)(*(t[:40] for t in TASK.train)))
    with pytest.raises(ValueError, match="shots=20: class '.' of digits has . training pictures, expected at most those"):
        vp.finetune(MODEL, small, "MHA", replace(SHORT, shots=20))


def test_a_run_is_that_of_the_smaller_task():
    config = replace(SHORT, shots=2, seed=4)
    run = vp.finetune(MODEL, TASK, "LN1", config)
    other = vp.finetune(MODEL, with_shots(TASK, config), "LN1", replace(config, shots=None))
    assert run.history.equals(other.history)


def test_other_tasks_are_read_by_the_same_head_or_a_probe():
    noisy, glyphs = "digits_c/contrast@5", "glyphs"
    run = vp.finetune(MODEL, TASK, "FC2", replace(SHORT, also=(noisy, glyphs)))
    images = vp.task(noisy).test
    with torch.no_grad():
        logits = run.model(vp.models.prepare(run.model, images.images))
    assert run.elsewhere == {noisy: pytest.approx((logits.argmax(1) == images.labels).float().mean().item(), abs=1e-3), glyphs: vp.linear_probe(run.model, glyphs)}
    assert run.record()["elsewhere"] == run.elsewhere
    with pytest.raises(ValueError, match="also=.3,.: expected names of tasks"):
        replace(SHORT, also=(3,))
    with pytest.raises(ValueError, match="unknown task 'glyps'.*nearest"):
        vp.finetune(MODEL, TASK, "FC2", replace(SHORT, also=("glyps",)))


@pytest.mark.parametrize("name, value", [("update", "lora:2"), ("shots", 2), ("also", ("glyphs",))])
def test_runs_together_refuse(name, value):
    with pytest.raises(ValueError, match=f"runs with {name} are trained one by one"):
        finetune_many(MODEL, TASK, "MHA", [replace(SHORT, **{name: value})])
