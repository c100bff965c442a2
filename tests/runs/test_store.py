"""Records are whole or not there: killed writers, two writers, a full disk, damage."""
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitplast.files import canonical, key, replacing
from vitplast.runs import Store

WRITER = """
import sys
from vitplast.runs import Store
store, i = Store(sys.argv[1]), 0
while True:
    i += 1
    store.put({"i": i % 7}, {"values": [i] * 2000})
"""


def test_a_writer_killed_at_any_moment_leaves_whole_records(tmp_path):
    for attempt in range(5):
        process = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path])
        while not list(tmp_path.glob("*.json")):
            time.sleep(0.02)
        time.sleep(0.03 * (attempt + 1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for i in range(7):
            record = Store(tmp_path).get({"i": i})
            assert record is None or len(set(record["values"])) == 1
    assert len(Store(tmp_path)) > 0 and not list(tmp_path.glob("*.damaged"))


def test_two_writers_share_a_folder(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, tmp_path]) for _ in range(2)]
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("*.json"))) < 7 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    assert all(Store(tmp_path).get({"i": i}) for i in range(7))
    for w in writers:
        w.kill(), w.wait()


@pytest.mark.parametrize("damage", [lambda t: t[:-40], lambda t: t.replace("0.25", "0.75"), lambda t: "", lambda t: "[1]", lambda t: '{"record": {}}'])
def test_damage_is_named_and_set_aside(tmp_path, damage):
    store = Store(tmp_path)
    store.put({"a": 1}, {"accuracy": 0.25})
    path = store.path({"a": 1})
    path.write_text(damage(path.read_text()))
    with pytest.warns(UserWarning, match=rf"{path.name}: damaged record .* set aside as {path.stem}.damaged"):
        assert store.get({"a": 1}) is None
    assert not path.exists() and path.with_suffix(".damaged").exists()
    store.put({"a": 1}, {"accuracy": 0.5})
    assert store.get({"a": 1}) == {"accuracy": 0.5}


def test_a_full_disk_loses_nothing_that_was_there(tmp_path, monkeypatch):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"), replacing(target) as file:
        file.write_text("new")
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


@given(st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.text(max_size=5)), max_size=5))
def test_the_key_does_not_depend_on_the_order_and_the_text_is_exact(d):
    shuffled = dict(reversed(d.items()))
    assert key(d) == key(shuffled) and json.loads(canonical(d)) == d
    assert key(d | {"one more": 1}) != key(d)


def test_numbers_that_json_cannot_hold(tmp_path):
    store = Store(tmp_path)
    store.put({}, {"loss": [1.0, math.nan, -math.inf], "nested": {"x": (math.inf, "text", True)}})
    assert store.get({}) == {"loss": [1.0, None, None], "nested": {"x": [None, "text", True]}}


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(ValueError, match="expected a folder for the store, found a file on the way"):
        Store(tmp_path / "runs")


def claimed(store, config) -> bool:
    with store.claim(config) as mine:
        return mine


def test_a_claim_is_of_one_process_and_dies_with_it(tmp_path):
    store, holder = Store(tmp_path), f"import sys, time; from vitplast.runs import Store\nwith Store({str(tmp_path)!r}).claim({{'a': 1}}) as mine:\n    print(mine, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", holder], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "True"
    assert not claimed(store, {"a": 1}) and claimed(store, {"a": 2})
    process.kill(), process.wait()
    assert claimed(store, {"a": 1}) and claimed(store, {"a": 1}) and not list(tmp_path.iterdir())


def test_a_claim_is_given_up_on_an_error(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(KeyError), store.claim({}) as mine:
        assert mine
        raise KeyError
    assert claimed(store, {})


def test_compacting_keeps_everything(tmp_path):
    store, records = Store(tmp_path), {i: {"value": [i, None, 0.1 * i]} for i in range(9)}
    for i, r in records.items():
        store.put({"i": i}, r)
        if i % 4 == 0:
            store.compact()
    store.put({"i": 3}, {"value": "new"})
    store.put_failure({"i": 5}, "no"), store.put_failure({"i": 77}, "never")
    assert store.failures() == {key({"i": 77}): "never"}
    store.compact()
    assert {i: store.get({"i": i}) for i in records} == records | {3: {"value": "new"}} and len(store) == 9 == len(store.records())
    assert sorted(f.name for f in tmp_path.iterdir()) == [".compact.lock", f"{key({'i': 77})}.failed", "runs.jsonl"]
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    (tmp_path / "runs.jsonl").write_text("\n".join([lines[0].replace("value", "Value"), *lines[1:]]) + "\n")
    with pytest.warns(UserWarning, match="runs.jsonl, line 1: damaged record"):
        store.compact()
    assert len(Store(tmp_path)) == 8 and (tmp_path / "runs.damaged").read_text().count("Value") == 1


def test_compacted_while_others_write(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, tmp_path]) for _ in range(2)]
    deadline, store = time.monotonic() + 30, Store(tmp_path)
    while len(store) < 7 and time.monotonic() < deadline:
        time.sleep(0.05)
    for _ in range(20):
        store.compact()
        assert len(store.records()) == 7 and all(len(set(store.get({"i": i})["values"])) == 1 for i in range(7))
    for w in writers:
        w.kill(), w.wait()


def test_a_record_is_computed_once(tmp_path):
    store, calls = Store(tmp_path), []

    def compute():
        calls.append(1)
        return {"value": 0.5, "nothing": math.nan}

    assert store.kept({"a": 1}, compute) == store.kept({"a": 1}, compute) == {"value": 0.5, "nothing": None}
    assert Store(tmp_path).kept({"a": 1}, compute)["value"] == 0.5 and len(calls) == 1


def test_records_by_what_they_hold(tmp_path):
    store = Store(tmp_path)
    for i in range(4):
        store.put({"i": i}, {"kind": "ab"[i % 2], "i": i, "values": [i]})
    assert sorted(r["i"] for r in store.where(kind="a")) == [0, 2] and store.where(kind="a", i=1) == []
    assert [r["i"] for r in store.where(values=[3])] == [3] and len(store.where()) == 4 and store.where(other=1) == []
