"""Accuracy by generation is what the task's checker says of greedy completions."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from kernels_pallas.block_sparse_attention import SlidingWindow
from tokenlab import config
from tokenlab.cache import FullCache, RingCache
from tokenlab.core.errors import UserError
from tokenlab.data.tasks import Addition, AssociativeRecall
from tokenlab.decode import Autoregressive, Decoder, Generation, Greedy
from tokenlab.evals import TaskAccuracy, task
from tokenlab.models import llama
from tokenlab.tokenizers import ByteTokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Student(Decoder):
    """Adds well where no carry is handed on, badly elsewhere, after some thought."""

    thoughts: int = 0
    lucky: int = 1

    def behind(self, processors):
        return self

    def __call__(self, view, prompts, *, key, on_tokens=None):
        assert self.max_new_tokens == self.thoughts + 3
        first = jax.random.randint(key, (), 0, self.lucky) == 0
        alphabet = ADDITION.tokenizer
        answers = []
        for prompt in prompts:
            a, b = map(int, alphabet.decode(prompt).decode().rstrip("=").split("+"))
            digits = zip(str(a).zfill(2), str(b).zfill(2), strict=True)
            chained = a % 10 + b % 10 > 9 and sum(map(int, next(digits))) == 9
            total = str(a + b + chained).zfill(3) if first else "000"
            thoughts = [1] * self.thoughts
            answers.append([*thoughts, *alphabet.encode(total), alphabet.eos_id])
        tokens = np.array(answers, np.int32)
        nothing = np.zeros(tokens.shape, np.float32)
        return Generation(
            tokens=tokens,
            lengths=np.full(len(answers), tokens.shape[1]),
            logp_model=nothing,
            logp_behaviour=nothing,
            ledger=None,
        )


ADDITION = Addition(digits=2, chained=0.5)


@pytest.mark.parametrize("batch_size", [64, 7])
@pytest.mark.parametrize("thoughts", [0, 2])
def test_accuracy_is_known_for_a_student_whose_mistakes_are_known(batch_size, thoughts):
    evaluation = TaskAccuracy(
        task=ADDITION, problems=64, batch_size=batch_size, thoughts=thoughts,
        decoder=Student(thoughts=thoughts),
    )  # fmt: skip
    figures = evaluation(model=nn.Module(), params={}, tokenizer=ADDITION.tokenizer)
    assert figures["accuracy_at_0"] == figures["accuracy_at_1"] == 1
    assert figures["accuracy_at_2"] == 0
    assert 0.1 < figures["accuracy"] < 0.95
    error = math.sqrt(figures["accuracy"] * (1 - figures["accuracy"]) / 64)
    assert figures["standard_error"] == pytest.approx(error)


def test_one_right_attempt_is_enough():
    """Each batch is answered as well as can be in a third of the attempts."""

    def accuracy(attempts, lucky):
        evaluation = TaskAccuracy(
            task=ADDITION, problems=64, batch_size=1, attempts=attempts,
            decoder=Student(lucky=lucky),
        )  # fmt: skip
        run = {"model": nn.Module(), "params": {}, "tokenizer": ADDITION.tokenizer}
        return evaluation(**run)["accuracy"]

    best = accuracy(1, 1)
    shares = [accuracy(attempts, 3) / best for attempts in (1, 2, 30)]
    assert shares[0] < shares[1] < shares[2] == 1.0
    assert shares[0] == pytest.approx(1 / 3, abs=0.15)
    assert shares[1] == pytest.approx(5 / 9, abs=0.15)


def untrained(recall, *, seed, **sizes):
    model = llama(
        vocab_size=recall.tokenizer.vocab_size, num_heads=2, num_kv_heads=1, **sizes
    )  # fmt: skip
    tokens = jnp.zeros((1, 4), int)
    where = {"positions": tokens, "segments": tokens + 1}
    return model, nn.meta.unbox(model.init(jax.random.key(seed), tokens, **where)["params"])


def share_right(model, params, problems):
    """Of the problems whose answer is the likeliest token behind the whole prompt."""
    ids = jnp.asarray([problem.prompt for problem in problems])
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    out = model.apply({"params": params}, ids, positions=positions, segments=jnp.ones_like(ids))
    logits = model.apply({"params": params}, out.hidden[:, -1:], method="logits")
    answers = jnp.asarray([problem.answer[0] for problem in problems])
    return float(jnp.mean(jnp.argmax(logits[:, 0], axis=1) == answers))


def test_an_untrained_model_scores_what_its_argmax_gets():
    recall = AssociativeRecall(keys=2, values=2, pairs=2, queries=1)
    model, params = untrained(recall, seed=5, dim=8, num_layers=1, hidden_dim=8)
    evaluation = TaskAccuracy(task=recall, problems=40, batch_size=16)
    figures = evaluation(model=model, params=params, tokenizer=recall.tokenizer)
    problems = recall.problems(seed=(task._STREAM, 0), count=40)
    assert figures["accuracy"] == pytest.approx(share_right(model, params, problems))


def test_the_end_of_a_prompt_is_read_through_the_cache_of_the_decoder():
    """Token by token, a ring of three reads what a window of four shows, which is not all."""
    recall = AssociativeRecall(keys=6, values=6, pairs=5, queries=1)
    model, params = untrained(recall, seed=1, dim=16, num_layers=2, hidden_dim=16)
    # So that an untrained model tells keys apart.
    params = jax.tree.map(lambda x: 4 * x, params)
    windowed = config.replace(model, {"block.mixer.rule": SlidingWindow(size=4)})
    problems = recall.problems(seed=(task._STREAM, 0), count=64)

    def found(**fields):
        decoder = Autoregressive(sampler=Greedy(), **fields)
        evaluation = TaskAccuracy(task=recall, problems=64, decoder=decoder)
        return evaluation(model=model, params=params, tokenizer=recall.tokenizer)["accuracy"]

    whole, near = (share_right(one, params, problems) for one in (model, windowed))
    assert whole != near
    ring = RingCache(budget=3)
    assert found(cache=ring, prefill_chunk=1) == pytest.approx(near)
    assert found(cache=FullCache(), prefill_chunk=1) == pytest.approx(whole)
    assert found(cache=ring) == pytest.approx(whole)  # the prompt is read whole


def test_another_tokenizer_is_refused():
    with pytest.raises(UserError, match="alphabet"):
        TaskAccuracy(task=ADDITION)(model=nn.Module(), params={}, tokenizer=ByteTokenizer())


def test_problems_are_not_those_of_training():
    trained = {tuple(p.prompt) for p in Addition(digits=6).problems(seed=0, count=2000)}
    asked = Addition(digits=6).problems(seed=(task._STREAM, 0), count=200)
    assert not trained & {tuple(problem.prompt) for problem in asked}
