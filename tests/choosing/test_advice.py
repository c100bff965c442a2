"""Advice against what it is made of: criteria, suggested rates, counted costs, short runs by hand."""
import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import tiny_vit
from timm.models.vision_transformer import VisionTransformer

import vitplast as vp
from vitplast.choosing import budgeted, place_sizes, read_advice, suggest_rates
from vitplast.choosing.advice import OF_KINDS, OF_PLACES, doubts_of
from vitplast.choosing.candidates import FREE, NORMS, WHOLE, costs
from vitplast.choosing.sample import pictures_of, with_few
from vitplast.data import Split
from vitplast.models import Selection, prepare

CONFIG = vp.FinetuneConfig(steps=8, eval_every=4, batch_size=8)


def named(**kwargs):
    model = tiny_vit(**kwargs).float()
    model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    return model


@pytest.fixture(scope="module")
def task():
    def split(n, seed):
        g = torch.Generator().manual_seed(seed)
        labels = torch.arange(n) % 3
        images = torch.randint(0, 120, (n, 3, 16, 16), generator=g, dtype=torch.uint8)
        images[labels == 1, :, :8] += 90
        images[labels == 2, :, :, :8] += 90
        return Split(images, labels)

    return vp.Task("halves", ("none", "top", "left"), split(60, 0), split(30, 1), split(30, 2), 30)


@pytest.fixture(scope="module")
def advice(task):
    return vp.advise(named(), task, config=CONFIG, images=24)


def values_of(task, criterion):
    frame = vp.criteria(named(), task, criterion, images=24)
    return {f"{r.component}@{r.block}": r.value for r in frame.itertuples()}


def test_kinds_are_in_the_order_of_their_gradients_and_places_in_that_of_theirs(advice, task):
    of_kinds, of_places = values_of(task, OF_KINDS), values_of(task, OF_PLACES)
    for row in advice.table.itertuples():
        atoms = Selection.of(row.selection, named()).atoms
        assert row.criterion == pytest.approx(sum(of_kinds[f"{k}@{b}"] for b, k in atoms), rel=1e-5)
    first = advice.table[:3]
    assert set(first.selection) == set(WHOLE) and first.criterion.is_monotonic_decreasing
    assert advice.table.selection.tolist()[-2:] == [NORMS, "head"]
    assert advice.table.selection[3] == budgeted(named(), pd.Series(of_places), FREE)
    assert advice.places.criterion.tolist() == pytest.approx([of_places[f"{k}@{b}"] for b, k in zip(advice.places.block, advice.places.component)], rel=1e-5)


def test_rates_are_those_that_are_suggested(advice, task):
    suggested = suggest_rates(named(), task, list(advice.table.selection), CONFIG, images=24)
    assert advice.table.lr.tolist() == pytest.approx(suggested.lr.tolist())


def test_costs_are_counted(advice, task):
    for row in advice.table.itertuples():
        with vp.trainable(named(num_classes=3), row.selection) as training:
            n = training.n_trained
        head = 3 * 12 + 3
        assert row.trained == n - head and row.optimizer_bytes == 4 * n
        assert row.share == pytest.approx((n - head) / (training.total - head))
    model = named(num_classes=3)
    x, labels = prepare(model, task.train.images[:4]), task.train.labels[:4]
    found = costs(model, ["head", "MHA"], x, labels, 8, "adamw")
    # the class token that enters the head is a view of all five, in float32
    assert found.activation_bytes["head"] == 8 * 5 * 12 * 4
    assert found.activation_bytes["MHA"] > 2 * found.activation_bytes["head"]
    assert found.optimizer_bytes["head"] == 8 * (3 * 12 + 3)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("budget", [0.02, 0.1, 0.4, 1.0])
def test_nothing_goes_beyond_a_budget(task, budget):
    advice = vp.advise(named(), task, budget, CONFIG, images=24)
    assert advice.table["share"].max() <= budget and advice.table.selection.iloc[-1] == "head"
    assert any("random places" in d for d in advice.doubts)


def test_without_a_budget_a_mixed_set_has_a_fifth(advice):
    mixed = [s for s in advice.table.selection if s not in (*WHOLE, NORMS, "head")]
    sizes = place_sizes(named())
    assert len(mixed) == 1 and sum(sizes[f"{k}@{b}"] for b, k in Selection.of(mixed[0], named()).atoms) <= FREE * sum(p.numel() for p in named().parameters())


def test_trying_is_short_runs_by_hand_and_the_test_pictures_stay_unseen(task, advice):
    model = named()
    tried = vp.advise(model, task, config=CONFIG, images=24, attempts=2)
    first = advice.table.selection[advice.table.selection != "head"].iloc[:2].tolist()
    seen = tried.table.dropna(subset="validation_accuracy")
    assert set(seen.selection) == {*first, "head"} and tried.tried
    assert seen.validation_accuracy.is_monotonic_decreasing
    broken = replace(task, test=Split(task.test.images, (task.test.labels + 1) % 3))
    short = replace(CONFIG, steps=2, eval_every=2)
    for row in seen.itertuples():
        before = advice.table.set_index("selection").lr[row.selection]
        by_hand = {lr: vp.finetune(model, broken, row.selection, replace(short, lr=lr)).validation_accuracy for lr in (before, before / 3)}
        assert row.validation_accuracy == max(by_hand.values()) == by_hand[row.lr]


def test_the_model_is_left_alone(task):
    model = named()
    before, grads = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    vp.advise(model, task, config=CONFIG, images=24)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == grads


def test_its_forms_are_those_of_its_selection(advice, tmp_path):
    names = advice.param_names()
    with vp.trainable(named(), advice.selection, head=False) as training:
        assert names == training.names
    groups = advice.param_groups(named(num_classes=3))
    assert groups[0]["lr"] == advice.lr and groups[0]["name"] == advice.selection
    (tmp_path / "a.yaml").write_text(advice.yaml())
    assert read_advice(tmp_path / "a.yaml") == {"selection": advice.selection, "lr": advice.lr, "optimizer": "sgd", "steps": 8, "batch_size": 8}
    assert yaml.safe_load(advice.yaml())["task"] == "halves"
    text = str(advice)
    assert text.startswith(f"Train {advice.selection} at {advice.lr:.2g} (sgd).") and all(d in text for d in advice.doubts)
    with pytest.raises(ValueError, match="optimizer='adamw': the rate .* was advised for sgd"):
        advice.finetune(optimizer="adamw")
    assert advice.finetune(optimizer="adamw", lr=0.001, steps=1, eval_every=1).config.lr == 0.001
    run = advice.finetune(steps=2, eval_every=2)
    assert run.components == advice.selection and run.config.lr == advice.lr and run.config.steps == 2


@pytest.mark.parametrize("text, message", [("", "expected selection and lr"), ("selection: MHA", "expected selection and lr"), ("selection: MHA\nlr: x", "could not convert"), ("selection: MHA\nlr: 0.1\nstep: 3", "nearest known: \\['steps'"), ("{", "no advice"), ("selection: 3\nlr: 0.1", "expected text"), ("selection: MHA\nlr: -1", "lr=-1.0"), ("selection: MHA\nlr: .nan", "lr=nan"), ("selection: MHA\nlr: true", "a number as lr"), ("selection: MHA\nlr: 0.1\nsteps: x", "steps='x'")])
def test_files_that_hold_no_advice(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_advice(tmp_path / "a.yaml")


@pytest.mark.parametrize("budget", [0, 1.5, -1, "5%", True])
def test_budgets_that_are_none(task, budget):
    with pytest.raises(ValueError, match="expected a share of the parameters"):
        vp.advise(named(), task, budget)


def test_attempts_that_are_none(task):
    with pytest.raises(ValueError, match="attempts=-1"):
        vp.advise(named(), task, attempts=-1)


def test_close_candidates_are_named(advice):
    table = advice.table.assign(criterion=np.linspace(1, 0.9, len(advice.table)))
    assert any("cannot be told apart" in d for d in doubts_of(table, None, 99, 3, "sgd", 500))
    table = table.assign(criterion=[2.0 ** -i for i in range(len(table))])
    assert not any("cannot be told apart" in d for d in doubts_of(table, None, 99, 3, "sgd", 500))
    assert any("99 pictures of 30 classes" in d for d in doubts_of(table, None, 99, 30, "sgd", 500))
    assert any("With AdamW" in d for d in doubts_of(table, None, 99, 3, "adamw", 500))
    assert any("With 15 pictures of 3 classes" in d for d in doubts_of(table, None, 15, 3, "sgd", 15))
    assert len(doubts_of(table, None, 99, 3, "sgd", 500)) < len(doubts_of(table, None, 99, 3, "adamw", 15))


@pytest.mark.parametrize("size", ["40kB", "0.1MB", "1 MB", "1gb"])
def test_nothing_needs_more_bytes_than_a_budget(task, size):
    limit = float(size.lower().rstrip("gmkb ")) * {"k": 1e3, "m": 1e6, "g": 1e9}[size.lower().strip()[-2]]
    advice = vp.advise(named(), task, size, CONFIG, images=24)
    assert (advice.table.optimizer_bytes + advice.table.activation_bytes <= limit).all()
    assert advice.table.selection.iloc[-1] == "head"
    if size == "1gb":
        assert {*WHOLE, NORMS} <= {*advice.table.selection}
    assert (~advice.table.selection.isin([*WHOLE, NORMS, "head"])).sum() <= 1


def test_bytes_below_the_smallest_candidate(task):
    with pytest.raises(ValueError, match="budget=1 kB: the smallest need, of 'head' with 8 pictures in a batch, is .* smaller batches need less"):
        vp.advise(named(), task, "1kB", CONFIG, images=24)


def test_a_share_may_be_text_and_best_is_no_limit(task, advice):
    assert vp.advise(named(), task, "0.4", CONFIG, images=24).table["share"].max() <= 0.4
    assert vp.advise(named(), task, "best", CONFIG, images=24).table.selection.tolist() == advice.table.selection.tolist()


def test_without_labels_there_are_no_rates(task):
    one = vp.advise(named(), task, config=CONFIG, images=12, labels=False)
    relabelled = replace(task, train=Split(task.train.images, task.train.labels.flip(0)))
    other = vp.advise(named(), relabelled, config=CONFIG, images=12, labels=False)
    assert one.table.selection.tolist() == other.table.selection.tolist() and one.places.equals(other.places)
    assert one.selection == "MHA" and one.table.lr.isna().all() and "needs labels" in str(one)
    assert one.param_names() and one.regex() and one.peft_config(2).r == 2
    for form in ("yaml", "trainer_code", "param_groups"):
        with pytest.raises(ValueError, match="advice without labels has no learning rate"):
            getattr(one, form)()
    with pytest.raises(ValueError, match="attempts=1 without labels"):
        vp.advise(named(), task, config=CONFIG, attempts=1, labels=False)


def test_without_labels_from_a_folder_in_any_depth(tmp_path):
    from PIL import Image

    g = np.random.default_rng(0)
    for i in range(12):
        file = tmp_path / f"{'deep/er/' * (i % 2)}{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(g.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(file)
    advice = vp.advise(named(), tmp_path, config=CONFIG, images=6, labels=False)
    assert advice.selection == "MHA" and advice.name == str(tmp_path)


def test_rates_of_low_rank_updates_are_those_of_their_matrices(task):
    plain, low = (suggest_rates(named(), task, ["MHA", "FC1"], replace(CONFIG, update=u), images=24) for u in (None, "lora:4"))
    assert plain.equals(low)
    for update, optimizer in (("random:9", "sgd"), ("lora:4", "adamw")):
        with pytest.raises(ValueError, match=f"update='{update}' with {optimizer}: no rule"):
            suggest_rates(named(), task, ["MHA"], replace(CONFIG, update=update, optimizer=optimizer))


def test_large_networks_are_looked_at_through_fewer_pictures():
    # numbers in the blocks times tokens, as a picture needs multiplications
    large = VisionTransformer(img_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6, mlp_ratio=8)
    inner = sum(p.numel() for p in large.blocks.parameters()) * 197
    assert inner > 5e9 and pictures_of(large) == 16
    small = VisionTransformer(img_size=112, patch_size=16, embed_dim=384, depth=12, num_heads=6)
    assert sum(p.numel() for p in small.blocks.parameters()) * 50 < 5e9 and pictures_of(small) == 64


def test_a_large_task_is_cut_in_its_order():
    task = vp.task("digits")
    few = with_few(task, 256, 0)
    rows = [int((task.train.images == image).all((1, 2, 3)).nonzero()[0]) for image in few.train.images[:40]]
    assert len(few.train) == 256 and rows == sorted(rows) and few.augment is None
    assert torch.equal(few.train.labels[:40], task.train.labels[rows])
    whole = with_few(task, len(task.train) + 5, 0)
    assert torch.equal(whole.train.images, task.train.images)
