"""Tiny published models: folders and GGUF files to load, made from ``tests/interop/fixtures``."""

import functools
import json
import pathlib
import re
import shutil

import gguf
import jax.numpy as jnp
import numpy as np
import tokenizers

from tokenlab.interop.families import family_named
from tokenlab.interop.tensors import parameters
from tokenlab.tokenizers import PretrainedTokenizer

FIXTURES = pathlib.Path(__file__).resolve().parent / "interop" / "fixtures"
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text")
SPECIAL = ("<bos>", "<eos>", "<pad>")
TEXT = pathlib.Path(functools.__file__).read_text()[:20_000]


@functools.cache
def tokenizer_json(kind="bytes", size=310):
    """A trained ``tokenizer.json``: byte-level, or with byte fallback as SentencePiece has it."""
    if kind == "bytes":
        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        made.normalizer = tokenizers.normalizers.NFC()
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        letters, special = tokenizers.pre_tokenizers.ByteLevel.alphabet(), list(SPECIAL)
    else:
        size += 110  # what the bytes take
        made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
        made.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
        made.decoder = tokenizers.decoders.Sequence(
            [
                tokenizers.decoders.Replace("\u2581", " "),
                tokenizers.decoders.ByteFallback(),
                tokenizers.decoders.Fuse(),
            ]
        )
        letters = []
        special = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=letters, show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    spec = json.loads(made.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].startswith("<0x")]
    return json.dumps(spec).encode()


def tokenizer(kind="bytes"):
    return PretrainedTokenizer(
        model=tokenizer_json(kind), pad_id=2, bos_id=0, eos_id=1, chat_template="{{ messages }}"
    )


def folder(name, where, *, size=310):
    """A folder as a hub has it, of the fixture ``name``."""
    shutil.copytree(FIXTURES / name, where, ignore=shutil.ignore_patterns("*.npz"))
    (where / "tokenizer.json").write_bytes(tokenizer_json(size=size))
    settings = {f"{token[1:-1]}_token": token for token in SPECIAL}
    (where / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": "{{ m }}"})
    )
    return where


def expected(name):
    """Tokens and the float32 logits that transformers computes."""
    with np.load(FIXTURES / name / "expected.npz") as arrays:
        return jnp.asarray(arrays["tokens"], jnp.int32), arrays["logits"]


def gguf_file(name, model, params, path, *, pre="gpt-2", layers=None):
    """Writes ``params`` as a GGUF file: the other way round than the reader, by its own code."""
    family = family_named(name)
    writer = gguf.GGUFWriter(path, family.gguf)
    mixer = model.attentions()[0]
    width = mixer.width(model.dim)
    windows = [m.rule.size for m in model.attentions() if hasattr(m.rule, "size")]
    bases = [m.rope_base for m in model.attentions() if not hasattr(m.rule, "size")]
    writer.add_block_count(layers or model.num_layers)
    writer.add_context_length(model.max_length)
    writer.add_embedding_length(model.dim)
    writer.add_feed_forward_length(model.block.kinds()[0].feedforward.hidden_dim)
    writer.add_head_count(mixer.num_heads)
    writer.add_head_count_kv(mixer.num_kv_heads)
    writer.add_key_length(width)
    writer.add_layer_norm_rms_eps(model.norm.epsilon)
    writer.add_rope_freq_base(bases[0])
    if windows:
        writer.add_sliding_window(windows[0])
    for where, _, tensor, form in parameters(model, family, "gguf"):
        value = functools.reduce(lambda tree, key: tree[key], where.split("/"), params)
        value = np.asarray(value, np.float32)
        value = value.T if form == "transposed" else value
        if family.permuted and re.search(r"/[qk]/kernel$", where):
            halves = value.reshape(-1, 2, width // 2, value.shape[-1])
            value = halves.swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(tensor, np.ascontiguousarray(value))
    _tokenizer_metadata(writer, pre)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tokenizer_metadata(writer, pre):
    spec = json.loads(tokenizer_json())
    vocabulary = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in spec["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ m }}")
