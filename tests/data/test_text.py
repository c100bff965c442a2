"""Sequences of text: labels against Python's own bytes, files in one split each, and what is too short or too long."""
import hashlib
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vitplast as vp
from vitplast.data import SUITES, TEXT, byte_task, library_text, next_bytes, suite_of, text_contents
from vitplast.data.text import ARCHIVE, BYTES, LEFT_OUT, held_out, library_files, split_files, texts_of, without_copies
from vitplast.models import build, GPTConfig
from vitplast.models.components import anatomy

PARTS = ("train", "validation", "test")


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=4), st.integers(1, 7))
def test_each_label_is_the_byte_behind(texts, length):
    windows = [(t[i : i + length], t[i + 1 : i + length + 1]) for t in texts for i in range(0, len(t) - length, length)]
    if not windows:
        with pytest.raises(ValueError, match=f"length={length}: the longest of {len(texts)} texts has {max(map(len, texts))} bytes, expected at least {length + 1}"):
            next_bytes(texts, length)
        return
    split = next_bytes(texts, length)
    assert [(bytes(a.tolist()), bytes(b.tolist())) for a, b in zip(*split)] == windows
    assert split.images.dtype == split.labels.dtype == torch.long


def test_no_file_is_in_two_splits_and_all_are_in_one():
    for kind in TEXT:
        texts, parts = texts_of(kind), split_files(texts_of(kind))
        digests = {n: [hashlib.sha256(t).digest() for t in part] for n, part in parts.items()}
        assert sorted(sum(digests.values(), [])) == sorted(hashlib.sha256(t).digest() for t in texts.values())
        assert len(set(sum(digests.values(), []))) == len(texts) and tuple(parts) == PARTS
        task = vp.task(kind)
        for name in PARTS:
            split = getattr(task, name)
            joined = b"".join(parts[name])
            assert bytes(split.images[0].tolist()) in joined and bytes(split.labels[-1].tolist()) in joined
            assert 0.95 * len(joined) < split.images.numel() < len(joined)


def test_a_paragraph_is_in_one_text():
    licence, own = "This is a licence, and long enough.", "what the second file says for itself"
    kept = without_copies({"a": f"{licence}\n\nfirst\n", "b": f"THIS is a  licence,\nand long enough.\r\n\r\n{own}\n"})
    assert kept == {"a": f"{licence}\n\nfirst\n", "b": f"{own}\n"}
    for kind in TEXT:
        paragraphs = [p.strip() for t in texts_of(kind).values() for p in set(t.decode(errors="replace").split("\n\n")) if len(p.strip()) > 60]
        assert len(paragraphs) == len(set(paragraphs))


def test_the_suite():
    assert SUITES["text"] == TEXT and {suite_of(n) for n in TEXT} == {"text"}
    task = vp.task("headers", 50)
    assert task.train.images.shape[1:] == task.train.labels.shape[1:] == (50,) and task.n_classes == 256
    assert task.classes[ord("a")] == "a" and task.classes[10] == "\\x0a" and len(set(BYTES)) == 256
    assert vp.task("prose").test.images.shape[1] == 128
    assert len({text_contents(n) for n in TEXT}) == 4
    with zipfile.ZipFile(ARCHIVE) as archive:
        assert {n for n in archive.namelist() if n.startswith("LICENCE")} == {"LICENCE-python", "LICENCE-scikit-learn", "LICENCE-torch"}
    assert ARCHIVE.stat().st_size < 600_000
    with pytest.raises(ValueError, match="unknown task 'pros': .*nearest known: .'prose'"):
        vp.task("pros")
    with pytest.raises(TypeError, match="task 'prose' takes no .'augment'"):
        vp.task("prose", augment=True)
    with pytest.raises(ValueError, match="prose, .*length=20000: the longest of"):
        vp.task("prose", 20_000)


def test_what_a_task_of_ones_own_must_have():
    good = {name: b"enough text for a window" for name in PARTS}
    assert len(byte_task("mine", good, 4).train) == 5
    with pytest.raises(ValueError, match="mine, test: length=30: the longest of 1 texts has 24 bytes, expected at least 31"):
        byte_task("mine", {n: b"x" * 40 for n in PARTS} | {"test": good["test"]}, 30)
    with pytest.raises(ValueError, match="mine: splits .'train'., expected"):
        byte_task("mine", {"train": b"abc"}, 1)
    with pytest.raises(TypeError, match="text 'abc' is a str: expected bytes"):
        next_bytes(["abc"], 1)
    for length in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="expected a positive integer"):
            next_bytes(b"abc", length)


def test_sequences_that_a_model_does_not_read():
    model = build(GPTConfig(vocabulary=200, context=16, width=16, depth=1, heads=2))
    x = torch.zeros(2, 16, dtype=torch.long)
    with pytest.raises(ValueError, match=r"shape \(2, 17\), expected \(N, n\) with n from 1 to 16"):
        anatomy(model).check(torch.zeros(2, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="numbers from 0 to 200, expected 0 to 199"):
        vp.plasticity(model, x, x.index_fill(1, torch.tensor([3]), 200))


def test_the_library_without_tests_packages_and_tables(tmp_path):
    for name in ("a.py", "json/b.py", "test/c.py", "x/tests/d.py", "site-packages/e.py", "encodings/f.py", "g.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert library_files(tmp_path) == {"a.py": b"a.py", "json/b.py": b"json/b.py"}
    with pytest.raises(FileNotFoundError, match="no sources of Python"):
        library_files(tmp_path / "nowhere")
    files, text = library_files(), library_text()
    assert sum(map(len, files.values())) == sum(map(len, text.values())) and 0.02 < len(text["validation"]) / len(text["train"]) < 0.12
    assert {Path(n).parts[0] for n in files}.isdisjoint(LEFT_OUT) and "argparse.py" in files


def test_the_control_task_was_held_out():
    assert all(held_out(name) for name in texts_of("python")) and not held_out("argparse.py")
