"""Logits of a published model, ours against those of transformers, on real text.

python -m benchmarks.parity --model PATH --peer PYTHON [--corpus NAME] [--positions 1000]

PYTHON is an interpreter with torch and transformers. The peer reads PATH by itself, and then the
folder that ``save_pretrained`` writes; both must agree with us, token ids included.
"""

import argparse
import json
import pathlib
import subprocess
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokenlab.data.corpora import TfdsCorpus
from tokenlab.interop import Pretrained, load_pretrained, save_pretrained

_CHUNK = 100


def our_logits(found: Pretrained, tokens: np.ndarray):
    """Logits of all positions, some rows at a time, because the vocabulary may be large."""
    apply: Any = jax.jit(found.model.apply, static_argnames="method")
    positions = jnp.arange(tokens.shape[1])[None]
    given = {"positions": positions, "segments": jnp.ones_like(positions)}
    out = apply({"params": found.params}, jnp.asarray(tokens), **given)
    for start in range(0, tokens.shape[1], _CHUNK):
        hidden = out.hidden[:, start : start + _CHUNK]
        yield np.asarray(apply({"params": found.params}, hidden, method="logits"))[0]


def compare(name: str, found: Pretrained, tokens: np.ndarray, theirs: np.ndarray) -> None:
    """Prints one line."""
    worst, same = 0.0, 0
    start = 0
    for ours in our_logits(found, tokens):
        part = theirs[0, start : start + len(ours)]
        worst = max(worst, float(np.abs(ours - part).max()))
        same += int((ours.argmax(-1) == part.argmax(-1)).sum())
        start += len(ours)
    print(f"{name}: largest difference of logits {worst:.2e}, same arg-max {same} of {start}")


def main() -> None:
    """Parses the command line and compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--peer", required=True, help="an interpreter with torch and transformers")
    parser.add_argument("--corpus", default="english_prose")
    parser.add_argument("--positions", type=int, default=1000)
    options = parser.parse_args()
    found = load_pretrained(options.model)
    text = TfdsCorpus(name=options.corpus).documents("held_out")[0].text[: 10 * options.positions]
    ids = found.tokenizer.encode(text)
    tokens = np.asarray([[found.tokenizer.bos_id, *ids]])[:, : options.positions]
    peer = pathlib.Path(__file__).parent / "peers" / "logits.py"
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        np.save(folder / "tokens.npy", tokens)
        (folder / "text").write_bytes(text)
        save_pretrained(folder / "written", *found)
        for name, model in (("published", options.model), ("written", folder / "written")):
            files = [folder / "tokens.npy", folder / "logits.npy", folder / "text"]
            command = [options.peer, peer, model.resolve(), *files]
            done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, check=True)
            same = json.loads(done.stdout.splitlines()[-1]) == ids
            compare(name, found, tokens, np.load(folder / "logits.npy", mmap_mode="r"))
            print(
                f"  {len(ids)} token ids of {len(text)} bytes: {'equal' if same else 'NOT equal'}"
            )


if __name__ == "__main__":
    main()
