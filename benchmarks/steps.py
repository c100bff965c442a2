"""Rates and gains of all components of a ViT-S against plain forward passes of the same images.

    python benchmarks/steps.py [--images 128] [--classes 10 28 1000] [--rounds 3] [--threads 1]

What is compared: `first_step` for the sixty components of focus-vit-small at 70 pixels, along the gradient, its signs and
those of mini-batches, over one forward pass of all images. Every ratio is that of medians over rounds in which both take
turns, so that a busy machine slows both alike.
"""
import argparse
import statistics
import time

import torch

import vitplast as vp
from vitplast.models import FOCUS, anatomy, evaluating
from vitplast.theory import first_step

BATCH = 32


def forward(model, images):
    "A plain forward pass of all images."
    with evaluating(model):
        for batch in images.split(BATCH):
            model(batch)


def clock(f, *args) -> float:
    started = time.perf_counter()
    f(*args)
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 28, 1000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    g = torch.Generator().manual_seed(0)
    for classes in args.classes:
        model = vp.load(FOCUS, img_size=70)
        anatomy(model).reset_head(classes)
        images = torch.randn(args.images, 3, 70, 70, generator=g)
        labels = torch.randint(classes, (args.images,), generator=g)
        forward(model, images[:BATCH])
        rounds = [(clock(forward, model, images), clock(first_step, model, images, labels)) for _ in range(args.rounds)]
        plain, step = (statistics.median(times) for times in zip(*rounds))
        print(f"{classes} classes: {step:.1f} s, {step / plain:.0f} forward passes of {plain:.2f} s", flush=True)


if __name__ == "__main__":
    main()
