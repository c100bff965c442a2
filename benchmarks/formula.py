"""Formula images per second, on one core and on a GPU if there is one: python benchmarks/formula.py"""
import time

import torch

from vitplast.data import FormulaConfig, FormulaImages
from vitplast.training import hardware


def rate(size, device, batch, seconds=5.0) -> float:
    "Images drawn per second."
    formula, g = FormulaImages(FormulaConfig(size=size), device), torch.Generator(device).manual_seed(0)
    formula.sample(batch, g)
    n, started = 0, time.monotonic()
    while time.monotonic() - started < seconds:
        formula.sample(batch, g).images.sum().item()  # waits for the GPU
        n += batch
    return n / (time.monotonic() - started)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for device, batch in [("cpu", 64)] + [("cuda", 4096)] * torch.cuda.is_available():
        print(hardware(device))
        for size in (32, 64):
            print(f"  {size} x {size}: {rate(size, device, batch):,.0f} images/s")
