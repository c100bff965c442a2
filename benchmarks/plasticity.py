"""Plasticity of a random ViT against two plain timm forward passes of the same images, on one core, and its peak memory.

    python benchmarks/plasticity.py [--sizes base large huge] [--pairs 8] [--rounds 3]

Every ratio is that of medians over rounds in which all ways take turns, so that a busy machine slows all alike. Each
memory figure is the peak of a process of its own, weights and libraries included.
"""
import argparse
import re
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch

import vitplast as vp
from bounds import MODELS, random_model
from vitplast.models import anatomy, evaluating
from vitplast.theory import make_plan

WAYS = {
    "embedding, shared": dict(inputs="embedding", fast=True),
    "embedding, plain": dict(inputs="embedding", fast=False),
    "native": dict(inputs="native"),
    "embedding, all pairs": dict(inputs="embedding", pairs="all"),
    "native, all pairs": dict(inputs="native", pairs="all"),
    "branches": dict(of="branch"),
    "branches, all pairs": dict(of="branch", pairs="all"),
}


def images(n, model, seed):
    "Batches of one image each, made when they are asked for."
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(1, *anatomy(model).image_shape, generator=g) for _ in range(n))


def measure(model, n, batch, **way):
    return vp.plasticity(model, images(n, model, 0), images(n, model, 1), batch_size=batch, **way)


def forward(model, n, batch):
    "Two plain forward passes per pair, in batches as large as the estimator's."
    with evaluating(model):
        for side in (0, 1):
            held = list(images(n, model, side))
            for i in range(0, n, 2 * batch):
                model(torch.cat(held[i : i + 2 * batch]))


def clock(f, *args, **kwargs) -> float:
    started = time.perf_counter()
    f(*args, **kwargs)
    return time.perf_counter() - started


def compare(size, n, rounds):
    "Seconds per pair of every way over those of two forward passes."
    model, seconds, once = random_model(MODELS[size]), {}, []
    batch = min(n, 8)
    with torch.no_grad():
        width = anatomy(model).embed(next(images(1, model, 0))).shape[-1]
    for _ in range(rounds):
        seconds.setdefault("forward", []).append(clock(forward, model, n, batch))
        with torch.no_grad():
            once.append(clock(make_plan, anatomy(model), width))
        for name, way in WAYS.items():
            seconds.setdefault(name, []).append(clock(measure, model, n, batch, **way))
    base = statistics.median(seconds["forward"])
    print(f"\n{MODELS[size]}, {n} pairs, batches of {batch}: two forward passes {1000 * base / n:.0f} ms per pair")
    for name in WAYS:
        found = statistics.median(seconds[name])
        print(f"  {name:22s} {found / base:5.2f} of two forward passes", end="")
        spread = [s / b for s, b in zip(seconds[name], seconds["forward"])]
        without = f"; {(found - statistics.median(once)) / base:.2f} without the plan, made once" if "shared" in name else ""
        print(f" (rounds: {min(spread):.2f} to {max(spread):.2f}{without})")


def peak(size, n, batch, name):
    "Peak memory (GiB) and seconds of one measurement in a process of its own."
    done = subprocess.run([sys.executable, __file__, "--child", size, str(n), str(batch), name], capture_output=True, text=True, check=True)
    memory, seconds = map(float, done.stdout.split())
    print(f"  {size:5s} {n:3d} + {n:<3d} images, batch {batch}: {name:22s} {memory:5.2f} GiB, {seconds:6.1f} s")


def child(size, n, batch, name):
    model = random_model(MODELS[size])
    seconds = clock(measure, model, int(n), int(batch), **WAYS[name])
    status = Path("/proc/self/status").read_text()  # resource's maximum would include the parent's, before exec
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20, seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="+", default=["base"], choices=list(MODELS))
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="only the peak memory")
    parser.add_argument("--child", nargs=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "[0-9]+ groups of images")  # few pairs are enough to take the time
    if args.child:
        child(*args.child)
        sys.exit()
    for size in [] if args.memory else args.sizes:
        compare(size, args.pairs, args.rounds)
    print("\npeak memory")
    for size in args.sizes:
        for name in WAYS:
            for n in (8, 32) if size == "base" else (8,):
                peak(size, n, 8, name)
