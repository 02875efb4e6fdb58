"""Logits of a published model by transformers, float32, for ``benchmarks/parity.py``.

python logits.py MODEL TOKENS.npy LOGITS.npy TEXT: MODEL is a folder or a .gguf file. Prints the ids
that the peer's own tokenizer gives TEXT (a file), as JSON.
"""

import argparse
import json
import pathlib

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main():
    """Parses the command line and writes the logits."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "tokens", "logits", "text"):
        parser.add_argument(name, type=pathlib.Path)
    options = parser.parse_args()
    where = {"pretrained_model_name_or_path": options.model}
    if options.model.is_file():
        where = {
            "pretrained_model_name_or_path": options.model.parent,
            "gguf_file": options.model.name,
        }
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.from_numpy(np.load(options.tokens))).logits
    np.save(options.logits, logits.numpy())
    tokenizer = AutoTokenizer.from_pretrained(**where)
    text = options.text.read_text()
    print(json.dumps(tokenizer(text, add_special_tokens=False)["input_ids"]), flush=True)


if __name__ == "__main__":
    main()
