"""Execute the book's notebooks top to bottom; prints the seconds of each page.

    python tools/reproduce.py [NOTEBOOK ...]    keeps their outputs; all pages of nbs/_toc.yml without arguments
    python tools/reproduce.py --smoke           all pages in a copy that is thrown away, two at a time; of every store of
                                                results one record is measured again, the others are found

With VITPLAST_SCALE the experiment pages run at another scale (nbs/showing/scales.ipynb): their outputs go to _build/SCALE,
their records to nbs/results-SCALE, and the book stays as it is.
"""
import json
import math
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import yaml
from nbclient import NotebookClient

from vitplast.data import SUITES
from vitplast.files import replacing
from vitplast.runs import Store, as_line
from vitplast.showing.scales import SETTING

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"


def pages(nbs=NBS) -> list:
    "Notebooks in the order of the table of contents, but the first page last: it shows what the others found."
    toc = yaml.safe_load((nbs / "_toc.yml").read_text())
    names = [*(c["file"] for part in toc["parts"] for c in part["chapters"]), toc["root"]]
    return [p for name in names if (p := nbs / f"{name}.ipynb").exists()]


def execute(path, keep=True) -> float:
    "Run one notebook in its own folder, print its seconds, and write it back, or beside the book, with its outputs."
    started, notebook = time.monotonic(), nbformat.read(path, as_version=4)
    limit = None if keep else 1800  # a sweep at full scale is one cell, and takes hours
    quiet = {"kernel_name": "python3", "extra_arguments": ["--log-level=40"]}
    NotebookClient(notebook, timeout=limit, resources={"metadata": {"path": str(path.parent)}}, **quiet).execute()
    if keep:
        scale = os.environ.get(SETTING) or "stored"
        out = path if scale == "stored" else ROOT / "_build" / scale / path.parent.name / path.name
        out.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, out)
    seconds = time.monotonic() - started
    print(f"{seconds:7.1f} s  {path.parent.name}/{path.name}", flush=True)
    return seconds


def is_elsewhere(record) -> bool:
    "Whether a record is of pictures that are not installed everywhere, or of weights that do not ship."
    pictures = {*SUITES["real"], "openclipart/mask"} - {"digits_plain"}
    return any(isinstance(value, str) and value in pictures for value in record.values()) or record.get("pretraining") == "second"


# run by IPython before each page
WITHOUT = """
import vitplast.data.dense, vitplast.data.real
def refused(name):
    raise FileNotFoundError(f"{name}: a page must run where these pictures are not installed, and found no stored record")
def unless_plain(name, root=None, found=vitplast.data.real.find_real):
    return found(name, root) if name == "digits_plain" else refused(name)
vitplast.data.real.find_real = unless_plain
vitplast.data.dense.find_groups = lambda root=None: refused("openclipart")
"""


def hide_pictures(folder):
    "Pages find no pictures but those that every machine has, whatever is installed on this one."
    start = Path(folder) / "profile_default/startup"
    start.mkdir(parents=True)
    (start / "without.py").write_text(WITHOUT)
    os.environ["IPYTHONDIR"] = str(folder)


def forget_one(folder) -> dict:
    "Take one record out of a compacted store; returns it by its key."
    records = Store(folder).records()
    gone = min(k for k, record in records.items() if not is_elsewhere(record))
    (folder / "runs.jsonl").write_text("".join(as_line(r, k) for k, r in records.items() if k != gone))
    return {gone: records[gone]}


def numbers(value, place=()) -> dict:
    "All numbers in nested lists and dictionaries but those of time and memory, by their place."
    if isinstance(value, (int, float)):
        return {place: float(value)}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = {}
    for k, v in items:
        if k not in ("seconds", "passes", "peak_memory", "together"):
            found |= numbers(v, (*place, k))
    return found


def note_seconds(seconds):
    "Keep what each page takes, for the page to say; a number that is half right stays, so that files change with pages."
    file = NBS / "results/seconds.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    kept = {}
    for name, now in sorted(seconds.items()):
        rough = max(1, int(float(f"{now:.1g}" if now < 10 else f"{now:.2g}")))
        before = known.get(name, 0)
        kept[name] = before if before / 2 <= now <= 2 * before else rough
    with replacing(file) as new:
        new.write_text(json.dumps(kept, indent=1) + "\n")


def smoke():
    "Every page in a copy of the book, which no page can tell from the real one; fails if a page does, or measures nothing."
    with tempfile.TemporaryDirectory() as folder:
        nbs = Path(folder) / "nbs"
        shutil.copytree(NBS, nbs, ignore=shutil.ignore_patterns("_build", ".ipynb_checkpoints"))
        (Path(folder) / "vitplast").symlink_to(ROOT / "vitplast")
        hide_pictures(Path(folder) / "ipython")
        stores = [f.parent for f in sorted(nbs.glob("results/*/runs.jsonl"))]
        forgotten = {store: forget_one(store) for store in stores}
        os.environ["OMP_NUM_THREADS"] = "1"
        names = [str(p.relative_to(nbs).with_suffix("")) for p in pages(nbs)]
        with ThreadPoolExecutor(2) as pool:
            seconds = list(pool.map(lambda page: execute(page, keep=False), pages(nbs)))
        note_seconds(dict(zip(names, seconds)))
        for store, records in forgotten.items():
            for name, old in records.items():
                new = Store(store).records().get(name)
                if new is None:
                    raise SystemExit(f"no page has measured record {name} of {store.name} again: its key has changed, or no page reads it")
                before, now = numbers(old), numbers(new)  # a newer record may say more
                apart = max(abs(a - now.get(place, math.inf)) / max(abs(a), 1e-6) for place, a in before.items())
                print(f"{store.name}: record {name} measured again, numbers within {apart:.1%} of the stored ones")


if __name__ == "__main__":
    started = time.monotonic()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:IProgress not found,ignore::FutureWarning:torch.jit._script"}
    if sys.argv[1:] == ["--smoke"]:
        smoke()
    else:
        for page in [Path(a).resolve() for a in sys.argv[1:]] or pages():
            execute(page)
    print(f"{time.monotonic() - started:7.1f} s  in all")
