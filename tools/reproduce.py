"""Execute the book's notebooks top to bottom and keep their outputs; prints the seconds of each page.

    python tools/reproduce.py [NOTEBOOK ...]        all pages of nbs/_toc.yml without arguments
"""
import os
import sys
import time
from pathlib import Path

import nbformat
import yaml
from nbclient import NotebookClient

NBS = Path(__file__).resolve().parents[1] / "nbs"


def pages() -> list:
    "Notebooks in the order of the table of contents."
    toc = yaml.safe_load((NBS / "_toc.yml").read_text())
    names = [toc["root"], *(c["file"] for part in toc["parts"] for c in part["chapters"])]
    return [p for name in names if (p := NBS / f"{name}.ipynb").exists()]


def execute(path):
    "Run one notebook in its own folder and write it back with its outputs."
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    nbformat.write(notebook, path)


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:IProgress not found,ignore::FutureWarning:torch.jit._script"}
    for page in [Path(a).resolve() for a in sys.argv[1:]] or pages():
        started = time.monotonic()
        execute(page)
        print(f"{time.monotonic() - started:7.1f} s  {page.relative_to(NBS)}", flush=True)
