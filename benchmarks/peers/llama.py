"""Hugging Face's Llama of the 15M preset's shape in PyTorch, driven over standard input.

Runs in an environment of its own (``pip install torch transformers``): prints ``ready``, then for
each line it reads does one piece of work and prints its seconds. It imports nothing of tokenlab.

python llama.py train BATCH LENGTH | decode BATCH PROMPT NEW [--model FOLDER]
"""

import argparse
import sys
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "intermediate_size": 1024,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}


def trainer(model, batch, length):
    """One optimiser step on random tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    tokens = torch.randint(SHAPE["vocab_size"], (batch, length))

    def step():
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def decoder(model, batch, prompt, new):
    """Greedy continuation of random prompts, by exactly ``new`` tokens."""
    tokens = torch.randint(model.config.vocab_size, (batch, prompt))
    options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
    mask = torch.ones_like(tokens)

    @torch.inference_mode()
    def write():
        return model.generate(tokens, attention_mask=mask, **options).shape

    return write


def main():
    """Parses the command line and serves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=["train", "decode"])
    parser.add_argument("sizes", nargs="+", type=int)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--model", help="a folder with a published model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(
            options.model, attn_implementation="sdpa", dtype=torch.float32
        )
    else:
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="sdpa"))
    work = {"train": trainer, "decode": decoder}[options.work](model, *options.sizes)
    model.train(options.work == "train")
    work()
    print("ready", sum(p.numel() for p in model.parameters()), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        work()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
