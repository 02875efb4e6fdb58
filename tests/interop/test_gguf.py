"""GGUF files: the same model as its safetensors, quantised tensors, and what is refused."""

import gguf
import jax
import numpy as np
import published
import pytest

from tokenlab.core.errors import UserError
from tokenlab.interop import load_pretrained
from tokenlab.interop.gguf_file import GgufFile
from tokenlab.interop.gguf_tokenizer import tokenizer_of
from tokenlab.models import LinearScaling

FAMILIES = pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3_text"])


def plain(name, tmp_path):
    """A model that a GGUF file can hold: windows as Gemma has them, no rotary scaling."""
    model, params, tokenizer = load_pretrained(published.folder(name, tmp_path / name))
    family = published.family_named(name)
    config = family.config(model) | {"final_logit_softcapping": None}
    for key in ("rope_parameters", "rope_scaling", "layer_types", "use_sliding_window"):
        config.pop(key, None)
    config["query_pre_attn_scalar"] = config["head_dim"]
    if family.gemma:  # one more turn than the five layers that have a window
        config |= {"num_hidden_layers": 7, "rope_theta": 5e5, "rope_local_base_freq": 1e4}
        params |= {"block_5": params["block_0"], "block_6": params["block_1"]}
    return family.model(config), params, tokenizer


@FAMILIES
def test_a_file_gives_the_model_it_was_written_from(name, tmp_path):
    model, params, tokenizer = plain(name, tmp_path)
    path = published.gguf_file(name, model, params, tmp_path / "m.gguf")
    found = load_pretrained(path)
    assert found.model == model and len(model.block.kinds()) == (6 if "gemma" in name else 1)
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    text = published.TEXT[:500]
    assert found.tokenizer.encode(text) == tokenizer.encode(text)
    assert found.tokenizer.vocab_size == tokenizer.vocab_size
    assert found.tokenizer.chat_template == "{{ m }}"


def test_quantised_tensors_are_dequantised(tmp_path):
    rows = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("w", gguf.quants.quantize(rows, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "q.gguf")
    assert file.names == ["w"]
    step = np.abs(rows).max(axis=1, keepdims=True) / 127
    assert np.all(np.abs(file.read("w") - rows) <= step)


@pytest.mark.parametrize("keep", [2, 100, 0.3, 0.9])
def test_a_truncated_file_says_so(keep, tmp_path):
    model, params, _ = plain("llama", tmp_path)
    path = published.gguf_file("llama", model, params, tmp_path / "m.gguf")
    content = path.read_bytes()
    path.write_bytes(content[: keep if keep > 1 else int(keep * len(content))])
    with pytest.raises(UserError, match=r"m.gguf is not a whole GGUF file"):
        load_pretrained(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 3}, r"tensor 'blk.2.\w+.weight' is missing; the checkpoint is not whole"),
        ({"layers": 1}, r"tensor 'blk.1.\w+.weight' is not expected"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken' of a GGUF file is not supported"),
    ],
)
def test_what_a_file_lacks_or_has_too_much_is_named(options, message, tmp_path):
    model, params, _ = plain("llama", tmp_path)
    path = published.gguf_file("llama", model, params, tmp_path / "m.gguf", **options)
    with pytest.raises(UserError, match=message):
        load_pretrained(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"general.architecture": "rwkv"},
            "architecture 'rwkv' is not supported; these are: llama",
        ),
        ({"llama.attention.head_count_kv": [1, 2]}, "layers of different shape in a GGUF file"),
        ({"llama.attention.sliding_window": 8}, "a window in a GGUF file of llama is not supp"),
        ({"llama.rope.scaling.type": "yarn"}, "rotary scaling 'yarn' is not supported"),
        ({"llama.embedding_length": None}, "no whole number 'hidden_size'"),
    ],
)
def test_metadata_that_cannot_be_computed_says_why(change, message, tmp_path):
    model, params, _ = plain("llama", tmp_path)
    file = GgufFile(published.gguf_file("llama", model, params, tmp_path / "m.gguf"))
    assert file.family().model(file.config()) == model
    file.metadata = {k: v for k, v in (file.metadata | change).items() if v is not None}
    with pytest.raises(UserError, match=message):
        file.family().model(file.config())


def test_linear_scaling_is_read(tmp_path):
    model, params, _ = plain("qwen3", tmp_path)
    file = GgufFile(published.gguf_file("qwen3", model, params, tmp_path / "m.gguf"))
    file.metadata |= {"qwen3.rope.scaling.type": "linear", "qwen3.rope.scaling.factor": 4.0}
    found = file.family().model(file.config())
    assert found.block.mixer.rope_scaling == LinearScaling(factor=4.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, "tokenizer 't5' of a GGUF file is not supported"),
        ({"tokenizer.ggml.model": "llama"}, "a tokenizer that puts a space before every text"),
        ({"tokenizer.ggml.tokens": None}, "has no 'tokenizer.ggml.tokens', which its tokenizer"),
    ],
)
def test_a_tokenizer_that_cannot_be_made(changes, message, tmp_path):
    model, params, _ = plain("llama", tmp_path)
    metadata = GgufFile(published.gguf_file("llama", model, params, tmp_path / "m.gguf")).metadata
    changed = {k: v for k, v in (metadata | changes).items() if v is not None}
    with pytest.raises(UserError, match=message):
        tokenizer_of(changed)


def test_pieces_with_scores_merge_as_sentencepiece_does():
    """The pair whose result scores highest merges first."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3] + [6] * 256
    pieces = ["a", "b", "c", "\u2581", "ab", "bc", "abc", "\u2581a"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens + pieces,
        "tokenizer.ggml.token_type": types + [1] * len(pieces),
        "tokenizer.ggml.scores": [0.0] * 259 + [-9, -9, -9, -9, -2.0, -1.0, -3.0, -4.0],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": False,
    }
    made = tokenizer_of(metadata)

    def written(text):
        return [(tokens + pieces)[i] for i in made.encode(text)]

    assert written("abc") == ["abc"] and written("ab") == ["ab"]
    # "bc" scores above "ab", so it is made first, and "a" is left alone beside it.
    assert written("abcbc") == ["abc", "bc"] and written("abbc") == ["ab", "bc"]
    assert written(" a\n") == ["\u2581a", "<0x0A>"]
    assert made.decode(made.encode("\u2581 é\xff")) == "\u2581 é\xff".encode()
