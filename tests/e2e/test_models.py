"""Published models on the command line."""

import json

import published
import pytest


@pytest.fixture
def model(tmp_path):
    return published.folder("gemma3_text", tmp_path / "model")


def test_a_published_model_writes_and_is_scored(tokenlab, model):
    greedy = ("generate", "--model", model, "--prompt", "The ", "--tokens", 8, "--temperature", 0)
    out, _ = tokenlab(*greedy)
    assert out.startswith("The ") and "tokens, mean log-probability" in out
    assert tokenlab(*greedy)[0] == out
    cached, _ = tokenlab(*greedy, "--cache", "PagedCache(page=4)", "--prefill-chunk", 2)
    assert cached.startswith(out) and "cache_tokens_dropped: 0" in cached
    size = sum(path.stat().st_size for path in model.parent.glob("corpus/*.txt"))
    score = ("eval", "--model", model, "--text", "corpus/*.txt", "--length", 32)
    out, _ = tokenlab(*score)
    assert "bits_per_byte" in out and f"{size:,}" in out
    part, _ = tokenlab(*score, "--documents", 3)
    assert f"{size:,}" not in part


def test_mistakes_are_one_line_and_exit_2(tokenlab, model):
    score = ["eval", "--model", model]
    cases = [
        (["generate", "--prompt", "x"], "give generate a run folder or --model PATH"),
        (["eval", "run", "--model", model], "give eval a run folder or --model PATH"),
        ([*score, "--text", "corpus/*.txt", "--step", 3], "--step names a checkpoint of a run"),
        (score, "give eval --model a --corpus NAME or --text PATTERN"),
        ([*score, "--text", "no/*.txt"], "no file matches 'no/*.txt'"),
        ([*score, "--text", "corpus/*.txt", "--stride", 0], "stride 0 must be in 1..length"),
        (["eval", "run", "--documents", 3], "--documents is for --model"),
        (["generate", "--model", "gone", "--prompt", "x"], "gone is neither a folder with"),
        (
            ["generate", "--model", model, "--prompt", "x", "--cache", "SinkCash(budget=9)"],
            "--cache: unknown part 'SinkCash'; did you mean 'SinkCache'?",
        ),
        (
            ["generate", "--model", model, "--prompt", "x", "--cache", "SinkCache(budget=4)"],
            "budget of 4 tokens for 4 sinks",
        ),
        (["models", "fetch"], "name a model: tokenlab models fetch"),
        (["models", "fetch", "smollm"], "no known model 'smollm'; did you mean 'smollm2_135m'?"),
    ]
    for arguments, message in cases:
        _, err = tokenlab(*arguments, code=2)
        assert message in err, (arguments, err)
        assert err.count("\n") == 1 and "Traceback" not in err
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    long = [*score, "--text", "corpus/*.txt", "--length", 128]
    assert "--length 128 exceeds the context of 64" in tokenlab(*long, code=2)[1]


def test_models_are_listed(tokenlab):
    out, _ = tokenlab("models")
    assert json.loads(out)["smollm2_135m"]["licence"] == "Apache-2.0"
