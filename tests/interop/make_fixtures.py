"""Writes ``fixtures/``: a tiny random model of each family, and the logits of transformers.

Run where torch and transformers are: ``PEER/bin/python tests/interop/make_fixtures.py``.
"""

import json
import pathlib
import shutil

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).resolve().parent / "fixtures"
SMALL = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
}
MODELS = {
    "llama": transformers.LlamaConfig(
        **SMALL, tie_word_embeddings=False, rope_parameters=LLAMA3, rms_norm_eps=1e-5
    ),
    "qwen2": transformers.Qwen2Config(
        **SMALL,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
    ),
    "qwen3": transformers.Qwen3Config(**SMALL, tie_word_embeddings=False, head_dim=8),
    "gemma3_text": transformers.Gemma3TextConfig(
        **SMALL | {"num_hidden_layers": 5},
        head_dim=8,
        query_pre_attn_scalar=12,
        sliding_window=4,
        layer_types=[
            f"{kind}_attention" for kind in ["sliding", "sliding", "full", "sliding", "sliding"]
        ],
        rope_parameters=GEMMA_ROPE,
        final_logit_softcapping=30.0,
    ),
}


def main():
    for number, (name, config) in enumerate(MODELS.items()):
        torch.manual_seed(number)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                scale = 0.2 if "norm" in path else 0.4
                one = 1.0 if "norm" in path and "gemma" not in name else 0.0
                parameter.copy_(one + scale * torch.randn(parameter.shape))
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        (folder / "model.safetensors").chmod(0o644)
        (folder / "generation_config.json").unlink(missing_ok=True)
        tokens = torch.randint(0, SMALL["vocab_size"], (1, 14))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            logits = model(tokens).logits
        np.savez_compressed(folder / "expected.npz", tokens=tokens.numpy(), logits=logits.numpy())
        written = json.loads((folder / "config.json").read_text())
        written.pop("transformers_version", None)
        (folder / "config.json").write_text(json.dumps(written, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
