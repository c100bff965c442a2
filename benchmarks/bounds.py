"""All bounds of a random ViT-Base against full singular value decompositions of the same matrices, on one core.

    python benchmarks/bounds.py [--sizes base large huge]

Both compute the published and the sharp bound of every component on the ball of one radius, in float64, in the same
run; the numbers must agree to 1e-6. Then the time of ours over the sizes, and what measuring the domain of the hull adds
to a plain forward pass over the same images.
"""
import argparse
import math
import time

import timm
import torch

import vitplast as vp
from vitplast.models import Attention, Linear, components

MODELS = {"base": "vit_base_patch16_224", "large": "vit_large_patch16_224", "huge": "vit_huge_patch14_224"}
RADIUS, IMAGES = 28.0, 4


def random_model(name):
    "A model with normal weights of standard deviation 0.02 and unit gains."
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    model, g = model.to_empty(device="cpu"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.normal_(1.0 if "norm" in key and key.endswith("weight") else 0.0, 0.02, generator=g)
    return model.eval()


def norm(matrix) -> float:
    "Largest of all singular values."
    return torch.linalg.svdvals(matrix)[0].item()


def by_full_decompositions(model, n) -> list:
    "The published and the sharp bounds, every d x d product formed and decomposed."
    published, sharp = [], []
    for c in components(model):
        w = c.weights()
        w = w._replace(**{k: v.detach().double() for k, v in w._asdict().items() if isinstance(v, torch.Tensor)})
        if isinstance(w, Linear):
            published.append(norm(w.W)), sharp.append(published[-1])
        elif isinstance(w, Attention):
            claimed, each, into = 0.0, [], []
            for Q, b_q, K, V, O in zip(w.Q, w.b_q, w.K, w.V, w.O):
                A, OV = norm(w.scale * Q.T @ K), norm(O @ V)
                claimed += norm(O) * norm(V) * math.sqrt(3 * n + (12 * n + 3) * RADIUS**4 * A**2)
                kappa = (w.scale * K.T @ b_q).norm().item() + RADIUS * A
                columns = n / (1 + (n - 1) * math.exp(-2 * RADIUS * kappa))
                each.append(OV * (math.sqrt(columns * (1 + (RADIUS * kappa) ** 2)) + RADIUS**2 * A))
                into.append(math.sqrt(each[-1]) * torch.linalg.svd(O, full_matrices=False).U)
            published.append(claimed), sharp.append(norm(torch.cat(into, 1)) * math.sqrt(sum(each)))
        else:
            d = len(w.gamma)
            published.append(w.gamma.abs().max().item() / math.sqrt(w.eps))
            sharp.append(norm(torch.diag(w.gamma) @ (torch.eye(d).double() - 1 / d)) / math.sqrt(w.eps))
    return published + sharp


def timed(f, *args, **kwargs) -> tuple:
    "What f returns, and its seconds."
    started = time.monotonic()
    result = f(*args, **kwargs)
    return result, time.monotonic() - started


def main(sizes):
    torch.set_num_threads(1)
    for size in sizes:
        model = random_model(MODELS[size])
        frame, ours = timed(vp.bounds, model, radius=RADIUS, kind=("published", "sharp"))
        print(f"{size}: {len(model.blocks)} blocks of width {model.embed_dim}, published and sharp bounds in {ours:.1f} s")
        if size == "base":
            slow, seconds = timed(by_full_decompositions, model, int(frame.n_tokens.max()))
            worst = max(abs(a / b - 1) for a, b in zip(frame.bound, slow))
            assert worst < 1e-6, worst
            print(f"  by full decompositions {seconds:.1f} s: ours {seconds / ours:.1f} times faster, largest relative difference {worst:.0e}")
        images = torch.randn(IMAGES, 3, 224, 224, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            forward = timed(model, images)[1]
        hull = timed(vp.bounds, model, images, inputs="native", kind="hull")[1]
        weights = timed(vp.bounds, model, radius=RADIUS, kind="sharp")[1]
        print(f"  hull of {IMAGES} images {hull:.1f} s, of it {hull - weights:.1f} s over the images; a forward pass {forward:.1f} s: {(hull - weights) / forward:.1f} times")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=MODELS, default=list(MODELS))
    main(parser.parse_args().sizes)
