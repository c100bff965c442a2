"""Selections: every text is read as the grammar says or refused with its place; one set of parameters has one text."""
import re

import pytest
import torch
from architectures import BUILD, build
from conftest import tiny_vit
from hypothesis import given
from hypothesis import strategies as st

import vitplast as vp
from vitplast.models import CHOICES, KINDS, Selection, anatomy, chosen_places
from vitplast.models.selection import PARTS, canonical_text

DEEP = vp.load("formula-vit")  # six blocks
PART = {"LN1": "norm1", "MHA": "attn", "LN2": "norm2", "FC1": "mlp.fc1", "FC2": "mlp.fc2"}


def rows_of(model, text) -> dict:
    "What a selection trains, without the head: name -> indices of its rows."
    found = chosen_places(text, model, head=False)
    own = dict(model.named_parameters())
    return {n: frozenset(range(len(own[n]))) if m is None else frozenset(m.flatten(1).any(1).nonzero().flatten().tolist() if m.ndim > 1 else m.nonzero().flatten().tolist()) for n, m in found.items()}


def by_hand(item, blocks) -> dict:
    "Independent of the adapters: timm's own names, thirds of qkv, Python's own slices."
    kind, _, part = item.partition(".")
    found, own = {}, dict(DEEP.named_parameters())
    for b in blocks:
        for name, p in own.items():
            if not name.startswith(f"blocks.{b}.{PART[kind]}."):
                continue
            rest, rows = name.removeprefix(f"blocks.{b}.{PART[kind]}."), range(len(p))
            if part in ("weight", "bias") and not rest.endswith(part):
                continue
            if part in ("qkv", "q", "k", "v") and not rest.startswith("qkv") or part == "proj" and not rest.startswith("proj"):
                continue
            if part in ("q", "k", "v"):
                rows = rows["qkv".index(part) * len(p) // 3 :][: len(p) // 3]
            found[name] = frozenset(rows)
    return found


items = st.sampled_from([k if not p else f"{k}.{p}" for k in KINDS for p in ("", *PARTS[k])])
bounds = st.none() | st.integers(-6, 6)
places = st.none() | st.integers(-6, 5) | st.builds(slice, bounds, bounds, st.none() | st.integers(1, 4))


def spelled(item, place) -> str:
    if place is None:
        return item
    if isinstance(place, int):
        return f"{item}@{place}"
    start, stop, step = ("" if v is None else str(v) for v in (place.start, place.stop, place.step))
    return f"{item}@{start}:{stop}" + f":{step}" * bool(step)


@given(st.lists(st.tuples(items, places), min_size=1, max_size=5), st.randoms())
def test_any_text_means_what_python_says(chosen, random):
    expected, texts = {}, []
    for item, place in chosen:
        blocks = range(6) if place is None else range(6)[place] if isinstance(place, slice) else [range(6)[place]]
        if not blocks:
            with pytest.raises(ValueError, match="expected at least one block"):
                Selection.of(spelled(item, place), DEEP)
            continue
        texts.append(spelled(item, place))
        for name, rows in by_hand(item, blocks).items():
            expected[name] = expected.get(name, frozenset()) | rows
    if not texts:
        return
    selection = Selection.of("+".join(texts), DEEP)
    assert rows_of(DEEP, selection) == expected
    random.shuffle(texts)
    others = ["+".join(texts).lower(), " + ".join(texts), selection.text, [*texts, texts[0]]]
    assert {Selection.of(other, DEEP).text for other in others} == {selection.text}


@given(st.sets(st.tuples(st.integers(0, 5), st.sampled_from(KINDS)), min_size=1))
def test_one_set_has_one_text_and_the_text_gives_the_set(cells):
    whole = {cell: Selection.read(cell[1]).atoms[0, cell[1]] for cell in cells}
    text = canonical_text(whole, 6)
    assert Selection.of(text, DEEP).atoms == whole and Selection.of(text, DEEP).text == text


@pytest.mark.parametrize("text, place, expected", [
    ("", 1, "expected LN1, "), ("MHA+", 5, "'nothing' at character 5: expected LN1, "), ("MHAA", 1, "nearest: MHA"), ("MHA+fc3@1", 5, "nearest: FC2, FC1"),
    ("MHA@", 5, "expected a block .3, -1. or a slice"), ("MHA@1.5", 5, "expected a block"), ("MHA@3-5", 5, "expected a block"), ("MHA@a:b", 5, "expected a block"),
    ("MHA@1,2", 5, "expected a block"), ("LN1+ MHA@::0", 10, "a slice with a step of at least 1"), ("MHA.prj", 5, "nearest: proj"), ("LN1.v", 5, "expected weight, bias"),
    ("all.bias", 5, "no part: all is whole"), ("head@1", 6, "no blocks: there is one head"), ("MHA@3.v", 5, "expected a block"),
])  # fmt: skip
def test_what_cannot_be_read_is_named_with_its_place(text, place, expected):
    with pytest.raises(ValueError, match=expected) as error:
        Selection.of(text, DEEP)
    assert f"at character {place}:" in str(error.value) and repr(text) in str(error.value)


@pytest.mark.parametrize("text", ["MHA@6", "MHA@-7", "FC1@0:7", "FC1@-7:", "all@9", "LN1+FC1@12:"])
def test_blocks_beyond_the_depth_are_refused(text):
    with pytest.raises(ValueError, match="the model has 6 blocks"):
        Selection.of(text, DEEP)


@pytest.mark.parametrize("wrong", [3, None, [1], [None], {"MHA": 1}.values()])
def test_what_is_no_text(wrong):
    with pytest.raises(TypeError, match="expected text or components"):
        Selection.of(wrong, DEEP)


def test_texts_that_name_blocks_need_a_model():
    assert Selection.read("fc1+MHA.q").text == "MHA.q+FC1"
    with pytest.raises(ValueError, match="names blocks: expected a model"):
        Selection.read("MHA@0")


@pytest.mark.parametrize("name", BUILD)
def test_parts_of_every_architecture(name):
    """q, k, v and proj are disjoint and together the whole; so are weight and bias. What a part names changes its output and nothing else does."""
    model = build(name)
    for c in [c for c in anatomy(model).components if c.block == 0]:
        size = lambda text: sum(p.numel() if m is None else int(m.sum()) for n, m in chosen_places(text, model, head=False).items() for p in [c.parameters[n]])
        whole = sum(p.numel() for p in c.parameters.values())
        halves = [sum(p.numel() for n, p in c.parameters.items() if n.endswith("bias") == (half == "bias")) for half in ("weight", "bias")]
        assert size(f"{c.kind}@0") == whole
        found = [size(f"{c.kind}.{half}@0") if n else 0 for half, n in zip(("weight", "bias"), halves)]
        assert found == halves
        if c.kind == "MHA":
            sizes = [size(f"MHA.{part}@0") for part in ("q", "k", "v", "proj")]
            assert sum(sizes) == whole and size("MHA.qkv@0") == sum(sizes[:3])


@pytest.mark.parametrize("part", ["q", "k", "v", "proj"])
def test_a_part_is_what_its_letter_says(part):
    "Overwriting the part in the model changes that field of the component's weights and no other."
    model = tiny_vit()
    component = vp.components(model)[1]
    before = [w.clone() for w in component.weights()[:8]]
    with torch.no_grad():
        for name, mask in chosen_places(f"MHA.{part}@0", model, head=False).items():
            p = dict(model.named_parameters())[name]
            p.copy_(p + 1 if mask is None else torch.where(mask, p + 1, p))
    changed = [not torch.equal(a, b) for a, b in zip(before, component.weights()[:8])]
    assert changed == [letter == part for letter in ("q", "q", "k", "k", "v", "v", "proj", "proj")]


def test_all_of_some_blocks_holds_what_is_no_components():
    model = tiny_vit(init_values=0.1, num_classes=2)
    last = set(chosen_places("all@-1", model, head=False))
    assert last == {n for n, _ in model.named_parameters() if n.startswith("blocks.1.")} and any(".ls1." in n for n in last)
    assert str(Selection.of("+".join(f"{k}@1" for k in KINDS), model)) != "all@1"  # without the layer scale
    assert set(chosen_places("all@:", model, head=False)) == {n for n, _ in model.named_parameters() if n.startswith("blocks.")}
    assert set(chosen_places("ALL", model)) == set(dict(model.named_parameters()))


def test_components_are_of_this_model():
    model, other = tiny_vit(), tiny_vit()
    assert str(Selection.of(vp.components(model)[5:7], model)) == "LN1@1+MHA@1"
    with pytest.raises(ValueError, match=re.escape("MHA of block 1 (blocks.1.attn, ") + ".*belongs to another model"):
        Selection.of([vp.components(other)[6]], model)


def test_choices_are_what_a_plain_word_may_be():
    assert CHOICES == (*KINDS, "all", "head")
    assert [str(Selection.of(c.upper(), tiny_vit())) for c in CHOICES] == list(CHOICES)
