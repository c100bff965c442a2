"""Runs of one group trained as one computation against one by one, our training step against a plain loop, and runs per hour.

    python benchmarks/finetuning.py [--model formula-vit] [--runs 1 4 12 48] [--steps 8] [--device cuda] [--bf16] [--compile]
    python benchmarks/finetuning.py --model focus-vit-small --size 70 --components LN1 MHA LN2 FC1 FC2 --step-only

Everything in one run on one machine; only the ratios are worth quoting. Trained together and alone, the losses must agree
to three digits (float32; to 1e-9 in float64, see tests/test_batched.py), and so must ours and the plain loop's.
On a CPU the training has one thread, as in a sweep; at the end, whole short runs by one process with all cores are compared
with one process per core.
"""
import argparse
import copy
import tempfile
import time
from dataclasses import replace
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

import vitplast as vp
from vitplast.data import Split
from vitplast.models import prepare
from vitplast.runs import Grid, choose, cores, one_thread, sweep
from vitplast.training import (
    finetune_many, image_order, memory_per_run, new_head, warmup_cosine,
)


def few(split) -> Split:
    "So few images that reading the accuracy costs nothing."
    return Split(split.images[:1], split.labels[:1])


def seconds_of(function, device, repeats=3) -> tuple:
    "The result, and the shortest of several times after one to warm up."
    times = []
    for repeat in range(repeats + 1):
        started = time.perf_counter()
        result = function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return result, min(times[1:])


def plain_loop(model, task, names, config) -> list:
    "What one writes by hand: requires_grad set, torch.optim.SGD, one loss per step."
    model = copy.deepcopy(model)
    new_head(model, task.n_classes, config.seed)
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum), []
    model.train()
    for step, rows in enumerate(image_order(len(task.train), config.steps, config.batch_size, config.seed)):
        optimizer.param_groups[0]["lr"] = config.lr * warmup_cosine(step, config.steps, config.warmup)
        x, y = (t[rows].to(parameters[0].device) for t in task.train)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=config.bf16):
            loss = F.cross_entropy(model(prepare(model, x)).float(), y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def together_and_alone(model, task, component, config, counts, device, compiled):
    "Seconds per run and step, for groups of several sizes."
    print(f"\n{component}: {memory_per_run(model, task, component, config) / 2**20:.0f} MiB for one more run")
    seeds, rates = range((max(counts) + 3) // 4), (0.01, 0.03, 0.1, 0.3)
    configs = [replace(config, lr=lr, seed=seed) for seed, lr in product(seeds, rates)]
    alone, one = seconds_of(lambda: vp.finetune(model, task, component, configs[0], compiled=compiled), device)
    for n in counts:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        runs, seconds = seconds_of(lambda: finetune_many(model, task, component, configs[:n], compiled=compiled), device, 1 if n > 12 else 2)
        assert np.allclose(runs[0].history.loss, alone.history.loss, rtol=5e-2 if config.bf16 else 1e-3)
        peak = f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if device == "cuda" else ""
        print(f"  {n:3d} runs together: {1e3 * seconds / n / config.steps:7.2f} ms per run and step, alone {1e3 * one / config.steps:7.2f}: {n * one / seconds:5.2f} x{peak}")


def in_turn(functions, device, repeats=5) -> tuple:
    "The results, and the median seconds of each, called by turns after one turn to warm up."
    times = np.zeros((repeats + 1, len(functions)))
    for turn in times:
        results = []
        for i, function in enumerate(functions):
            started = time.perf_counter()
            results.append(function())
            if device == "cuda":
                torch.cuda.synchronize()
            turn[i] = time.perf_counter() - started
    return results, np.median(times[1:], 0)


def against_plain(model, task, component, config, device):
    "Our training against the loop by hand, the same losses."
    config = replace(config, eval_every=config.steps, clip_head="joint")
    names = {n for n, p in vp.finetune(model, task, component, replace(config, steps=1, eval_every=1)).model.named_parameters() if p.requires_grad}
    ways = [lambda: vp.finetune(model, task, component, config), lambda: plain_loop(model, task, names, config)]
    (ours, theirs), (mine, plain) = in_turn(ways, device)
    assert np.allclose(ours.history.loss, theirs, rtol=5e-2 if config.bf16 else 1e-3)
    print(
        f"  {component:4s} {'bfloat16' if config.bf16 else 'float32 '} ours {1e3 * mine / config.steps:7.2f} ms, plain loop {1e3 * plain / config.steps:7.2f} ms:"
        f" {mine / plain:.3f} of its time, losses and gradient norms recorded",
        flush=True,
    )


def runs_per_hour(name):
    "Whole runs of the offline-cpu grid's length through a store, by one process with all cores' threads and by one process per core."
    grid = Grid(("digits",), models=(name,), lrs=(0.03,), seeds=(0, 1), config=vp.FinetuneConfig(steps=240, eval_every=60))
    model, task, threads = vp.load(name), vp.task("digits"), torch.get_num_threads()
    vp.finetune(model, task, "MHA", vp.FinetuneConfig(steps=5, eval_every=5))
    started = time.perf_counter()
    for run in grid.runs():
        vp.finetune(model, task, run.components, run.config)
    one = time.perf_counter() - started
    print(f"  one process, {threads} threads: {3600 * len(grid.runs()) / one:6.0f} runs per hour")
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        frame = sweep(grid, folder, "processes", progress=False)
        many = time.perf_counter() - started
        print(f"  {frame.attrs['executor']}, with their start: {3600 * len(frame) / many:6.0f} runs per hour, {one / many:.2f} x")


def main():
    "Print all ratios."
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="formula-vit")
    parser.add_argument("--runs", nargs="+", type=int, default=[1, 4, 12, 48])
    parser.add_argument("--components", nargs="+", default=["LN1", "MHA", "FC1"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--size", type=int, help="side of the images in pixels; the model's own without it")
    parser.add_argument("--step-only", action="store_true", help="only the training step, in float32 and in bfloat16")
    args = parser.parse_args()
    size = {"img_size": args.size} if args.size else {}
    model = vp.load(args.model, **size).to(args.device)
    task = vp.task("digits", size=args.size) if args.size else vp.task("digits")
    light = replace(task, validation=few(task.validation), test=few(task.test))
    config = vp.FinetuneConfig(lr=0.03, steps=args.steps, eval_every=args.steps, batch_size=args.batch, bf16=args.bf16)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, one thread of {cores()} cores"
    print(f"{args.model}, batch {args.batch}, {args.steps} steps, {'bfloat16' if args.bf16 else 'float32'}; {where}")
    with one_thread():
        for component in () if args.step_only else args.components:
            together_and_alone(model, light, component, config, args.runs, args.device, args.compile)
        print("\na training step, medians of five runs by turns")
        for component, bf16 in product(args.components, (False, True) if args.step_only else (args.bf16,)):
            against_plain(model, light, component, replace(config, bf16=bf16), args.device)
        if args.device == "cpu" and not args.step_only:
            fast, slow = (seconds_of(lambda: vp.finetune(model, light, "MHA", replace(config, bf16=b)), "cpu")[1] for b in (True, False))
            print(f"\nbfloat16 instead of float32, MHA: {slow / fast:.2f} x the speed")
    if args.device == "cpu" and not args.step_only:
        print(f"\n{choose('local').words}")
        runs_per_hour(args.model)


if __name__ == "__main__":
    main()
