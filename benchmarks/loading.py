"""Training images per second through the cache of vitplast and through torchvision's transforms, on one core.

    python benchmarks/loading.py

Both give random resized crops of 224 x 224, mirrored half of the time, of the same JPEG files of 500 x 375. The ratios are of one run.
"""
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from vitplast.data import RandomCrops, Split, Task, decode

N, BATCH, SIZE = 256, 64, 224


def write_photos(folder):
    "Smooth noise, which compresses like a photograph."
    rng = np.random.default_rng(0)
    for i in range(N):
        coarse = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{i:04}.jpg", quality=90)
    return sorted(folder.iterdir())


def timed(batches) -> float:
    "Images per second."
    started, n = time.monotonic(), 0
    for images in batches:
        n += len(images)
    return n / (time.monotonic() - started)


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        photos, cache = Path(temporary) / "photos", Path(temporary) / "train.npy"
        photos.mkdir()
        files = write_photos(photos)

        transform = v2.Compose([v2.ToImage(), v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip(), v2.ToDtype(torch.uint8)])

        def plain():
            for i in range(0, N, BATCH):
                yield torch.stack([transform(Image.open(f).convert("RGB")) for f in files[i : i + BATCH]])

        started = time.monotonic()
        _, aspects = decode(files, cache, 256, part=None, workers=0)
        filling = N / (time.monotonic() - started)

        images = torch.from_numpy(np.load(cache, mmap_mode="c"))
        split = Split(images, torch.zeros(N, dtype=torch.long))
        task = Task("photos", ("a",), split, split, split, N, RandomCrops(SIZE, aspects))

        def cached(device="cpu", augment=True):
            g = torch.Generator().manual_seed(0)
            for _ in range(4):
                for rows in torch.randperm(N, generator=g).split(BATCH):
                    batch = task.batch(rows, g, device)[0] if augment else images[rows].to(device)
                    yield batch
            if device == "cuda":
                torch.cuda.synchronize()

        by_torchvision, by_cache, read = timed(plain()), timed(cached()), timed(cached(augment=False))
        print(f"torchvision: decode and crop        {by_torchvision:7,.0f} images/s")
        print(f"vitplast: filling the cache, once   {filling:7,.0f} images/s  {filling / by_torchvision:5.1f} x")
        print(f"vitplast: read and crop on the CPU  {by_cache:7,.0f} images/s  {by_cache / by_torchvision:5.1f} x")
        print(f"vitplast: read, for a GPU to crop   {read:7,.0f} images/s  {read / by_torchvision:5.1f} x")
        if torch.cuda.is_available():
            timed(cached("cuda"))
            on_gpu = timed(cached("cuda"))
            print(f"vitplast: read and crop on the GPU  {on_gpu:7,.0f} images/s  {on_gpu / by_torchvision:5.1f} x")


if __name__ == "__main__":
    main()
