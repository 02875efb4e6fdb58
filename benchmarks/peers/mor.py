"""A block of Mixture-of-Recursions in PyTorch, driven over standard input.

Three recursions of one shared block over embeddings, forward and backward. Keys are of the tokens
that a recursion keeps. ``gathered`` runs the block on those alone; ``masked`` runs it on all tokens
and throws the rest away. Runs in an environment of its own (``pip install torch numpy``), from
parameters and inputs in FOLDER/given.npz; it leaves results in FOLDER/MODE.npz, prints ``ready``,
then for each line it reads does one piece of work. It imports nothing of tokenlab.

python mor.py gathered|masked FOLDER --threads N
"""

import argparse
import pathlib
import sys
import time

import numpy as np
import torch
from torch.nn import functional

RECURSIONS, ALPHA = 3, 0.1
HEADS = 6


def norm(x, scale):
    """Root mean square of the last axis is one, then the scale."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-5) * scale


def rotated(x, positions):
    """Pairs of the two halves of each head turned by position."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-torch.arange(half) / half)
    angle = positions[:, None, :, None] * frequency
    sin, cos = angle.sin(), angle.cos()
    first, second = x.split(half, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def block(p, x, positions, visible):
    """Pre-norm attention and SwiGLU; ``visible`` is None for causal order."""
    batch, length, width = x.shape
    y = norm(x, p["mixer_norm.scale"])
    q, k, v = (
        (y @ p[f"mixer.{name}.kernel"]).view(batch, length, HEADS, -1).transpose(1, 2)
        for name in "qkv"
    )
    q, k = rotated(q, positions), rotated(k, positions)
    read = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=visible is None
    )
    x = x + read.transpose(1, 2).reshape(batch, length, width) @ p["mixer.out.kernel"]
    y = norm(x, p["feedforward_norm.scale"])
    gated = functional.silu(y @ p["feedforward.gate.kernel"]) * (y @ p["feedforward.up.kernel"])
    return x + gated @ p["feedforward.down.kernel"]


def recursions(p, x, masked):
    """The loop: each router keeps some of the tokens that the one before it kept."""
    batch, length, width = x.shape
    every = torch.arange(length).expand(batch, length)
    kept = torch.ones(batch, length, dtype=torch.bool)
    for number in range(RECURSIONS):
        score = (x @ p[f"router_{number}"])[..., 0]
        count = max(1, length * (RECURSIONS - number) // RECURSIONS)
        ranked = score.detach().masked_fill(~kept, -torch.inf)
        index = ranked.topk(count, dim=1).indices.sort(dim=1).values
        kept = torch.zeros_like(kept).scatter(1, index, True)
        gate = ALPHA * torch.sigmoid(score)
        if masked:
            causal = torch.ones(length, length, dtype=torch.bool).tril()
            visible = causal & (kept[:, None, None, :] | torch.eye(length, dtype=torch.bool))
            y = block(p, x, every, visible)
            x = x + torch.where(kept[..., None], gate[..., None] * y, 0.0)
        else:
            places = index[..., None].expand(-1, -1, width)
            y = block(p, x.gather(1, places), index, None)
            x = x.scatter_add(1, places, gate.gather(1, index)[..., None] * y)
    return norm(x, p["norm"])


def main():
    """Parses the command line, leaves results, and serves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=["gathered", "masked"])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    given = {k: torch.from_numpy(x) for k, x in np.load(options.folder / "given.npz").items()}
    x, weight = given.pop("x"), given.pop("weight")
    params = {name: leaf.requires_grad_() for name, leaf in given.items()}

    def work():
        for leaf in params.values():
            leaf.grad = None
        out = recursions(params, x, options.mode == "masked")
        (out * weight).sum().backward()
        return out.detach()

    out = work()
    gradients = {name: leaf.grad.numpy() for name, leaf in params.items()}
    np.savez(options.folder / f"{options.mode}.npz", out=out.numpy(), **gradients)
    print("ready", sum(leaf.numel() for leaf in params.values()), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        work()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
