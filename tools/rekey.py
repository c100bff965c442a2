"""Move the records of stores to the keys that the present code gives them, after measuring a sample of each again.

    python tools/rekey.py STORE [STORE ...] [--sample N]

For when the form of a key changes and what is computed does not. A sample that comes out otherwise (an accuracy by more
than two pictures, another number by more than a percent) leaves its store as it was. Runs and probes are computed here,
other records by the page of the store's name, in a copy of the book.
"""
import argparse
import os
import random
import shutil
import tempfile
from pathlib import Path

from reproduce import NBS, ROOT, execute, numbers

from vitplast.data import task
from vitplast.files import key, replacing, restored
from vitplast.runs import RunConfig, Store, as_line, model_contents, task_contents
from vitplast.runs.executors import compute, materials
from vitplast.theory import MEASURING_VERSION
from vitplast.training import LANDSCAPE_VERSION, PROBE_VERSION, TRAINING_VERSION, FinetuneConfig, linear_probe

PICTURES, PERCENT = 2, 0.01  # what a number may be off
KIND_OF = {  # a field that tells what a record is of -> the versions that its key holds
    "history": {"training": TRAINING_VERSION},
    "probe": {"probing": PROBE_VERSION},
    "plasticity": {"measuring": MEASURING_VERSION},
    "surface": {"training": TRAINING_VERSION, "landscape": LANDSCAPE_VERSION},
    "gradient": {"training": TRAINING_VERSION, "measuring": MEASURING_VERSION},
}
NAMES = {
    "probe": ("model", "task", "normalisation", "weights", "images", "probe"),
    "plasticity": ("model", "target", "inputs", "weights", "images"),
    "surface": ("target", "weights", "images", "of", "kind", "block"),
    "gradient": ("target", "weights", "images"),
}


def renamed(name, record) -> tuple:
    "The present identity of a record, and the record with it."
    kind = next(k for k in KIND_OF if k in record)
    found = {k: v for k, v in record.items() if k != "code"} | KIND_OF[kind]
    found["images"] = task_contents(record.get("task", record.get("target")))
    if kind == "history":
        identity = RunConfig.from_record(found).identity()
        return identity, identity | found | {"config": restored(FinetuneConfig, found["config"])}
    if kind == "surface" and "of" not in found:
        found |= landscape_of(name, record)
    identity = {k: found[k] for k in (*NAMES[kind], *KIND_OF[kind])}
    return identity, identity | found


def landscape_of(name, record) -> dict:
    "Of what a landscape is that does not say so: the place that gives its key."
    about = {k: record[k] for k in ("target", "weights", "images", "code")}
    for of, blocks in (("loss", (None, *range(6))), ("rate", range(6))):
        for kind in ("LN1", "MHA", "LN2", "FC1", "FC2"):
            for block in blocks:
                place = {"of": of, "kind": kind, "block": block}
                if key(about | place) == name:
                    return place
    raise ValueError(f"{name}: no place in the network gives this key")


def off_by(record) -> str:
    "A run or a probe computed again: how far it is from its record, in words; ValueError if too far."
    run = RunConfig.from_record({"config": {}, "components": "head"} | record)
    n = len(task(run.task).test)
    if "probe" in record:
        again = {"accuracy": linear_probe(*materials(run))}
        pairs = [(record["accuracy"], again["accuracy"])]
    else:
        [(kind, again)] = compute([run])
        if kind == "error":
            raise ValueError(again)
        pairs = [(record[s], again[s]) for s in ("test_accuracy", "validation_accuracy")]
    apart = max(abs(a - b) for a, b in pairs) * n
    if apart > PICTURES:
        raise ValueError(f"{run}: {apart:.1f} pictures of {n} apart from its record, expected at most {PICTURES}")
    return f"{run}: {apart:.1f} pictures of {n}"


def measured_again(folder, records, sample):
    "Other records of a store, by its page in a copy of the book; ValueError if a number is too far off."
    with tempfile.TemporaryDirectory() as copy:
        nbs = Path(copy) / "nbs"
        shutil.copytree(NBS, nbs, ignore=shutil.ignore_patterns("_build", ".ipynb_checkpoints"))
        (Path(copy) / "vitplast").symlink_to(ROOT / "vitplast")
        store = nbs / "results" / folder.name
        write(store, {k: r for k, r in records.items() if k not in sample})
        execute(nbs / "experiments" / f"{folder.name}.ipynb", keep=False)
        new = Store(store).records()
        for name in sample:
            if name not in new:
                raise ValueError(f"record {name} of {folder.name} was not measured again: the page gives it another key")
            apart = max(abs(a - b) / max(abs(a), 1e-6) for a, b in zip(numbers(records[name]), numbers(new[name])))
            print(f"{folder.name}: {name} measured again, numbers within {apart:.2%}", flush=True)
            if apart > PERCENT:
                raise ValueError(f"record {name} of {folder.name}: numbers are off by {apart:.1%}")


def write(folder, records):
    "Write a store as one file of lines, sorted by key; nothing stays under an old key."
    with replacing(Path(folder) / "runs.jsonl") as file:
        file.write_text("".join(as_line(records[k], k) for k in sorted(records)))
    for old in Path(folder).glob("*.json*"):
        if old.name != "runs.jsonl":
            old.unlink()


def rekey(folder, n):
    "Move one store."
    old = Store(folder).records()
    new = {key(identity): record for identity, record in (renamed(k, r) for k, r in old.items())}
    if len(new) < len(old):
        raise ValueError(f"{folder}: {len(old)} records would have {len(new)} keys")
    wrong = [r["model"] for r in new.values() if "model" in r and r["weights"] != model_contents(r["model"]) and "untrained" not in r["model"]]
    if wrong:
        raise ValueError(f"{folder}: records of other weights than those that are here: {sorted(set(wrong))}")
    choose = random.Random(0)
    for kinds in (("history",), ("probe",), ("plasticity", "surface", "gradient")):
        mine = sorted(k for k, r in new.items() if any(kind in r for kind in kinds))
        sample = choose.sample(mine, min(n, len(mine)))
        if sample and kinds[0] == "plasticity":
            measured_again(Path(folder), new, sample)
        elif sample:
            print("\n".join(off_by(new[k]) for k in sample), flush=True)
    write(folder, new)
    print(f"{folder}: {len(new)} records, {len(new.keys() - old.keys())} of them under new keys", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stores", nargs="+", type=Path)
    parser.add_argument("--sample", type=int, default=3, help="records of each kind that are computed again")
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    for folder in given.stores:
        rekey(folder, given.sample)
