"""Seconds of a finetuning run against the block that trains, with what lies before it computed once, and at every step.

    python benchmarks/prefix.py [--model formula-vit] [--size 32] [--task digits] [--steps 40] [--runs 3]

The same run three times: the whole network at every step; what lies before the block computed once, for the first run of
a block; and for the next ones, which find it there, as those of a grid do. One thread; only the ratios are worth quoting.
The accuracies must be the same.
"""
import argparse
import time
from importlib import import_module

import torch

import vitplast as vp
from vitplast.models import anatomy
from vitplast.training.prefix import KEPT


def timed(model, task, what, config, reuse) -> tuple:
    "Seconds of a run, and its accuracy."
    module = import_module("vitplast.training.finetune")
    own = module.reused
    module.reused = own if reuse else lambda *_: None
    try:
        started = time.perf_counter()
        run = vp.finetune(model, task, what, config)
        return time.perf_counter() - started, run.test_accuracy
    finally:
        module.reused = own


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="formula-vit")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--task", default="digits")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    options = {} if asked.model.startswith("formula") else {"img_size": asked.size}
    model, task = vp.load(asked.model, **options), vp.task(asked.task, size=asked.size)
    config = vp.FinetuneConfig(steps=asked.steps, eval_every=max(1, asked.steps // 4))
    timed(model, task, "FC1@0", config, False)  # warms up
    print("trains    whole network    first run    next runs    accuracy")
    depth = len(anatomy(model).blocks)
    for what in (*(f"FC1@{i}" for i in range(0, depth, max(1, depth // 6))), "head"):
        KEPT.clear()
        runs = [min(timed(model, task, what, config, False) for _ in range(asked.runs)), timed(model, task, what, config, True)]
        runs.append(min(timed(model, task, what, config, True) for _ in range(asked.runs)))
        whole, *others = (seconds for seconds, _ in runs)
        same = {accuracy for _, accuracy in runs}
        ratios = "".join(f"{other / whole:13.2f}" for other in others)
        print(f"{what:8}{whole:13.2f} s {ratios}    {'the same' if len(same) == 1 else sorted(same)}")


if __name__ == "__main__":
    main()
