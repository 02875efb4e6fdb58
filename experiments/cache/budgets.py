"""All caches on a published model: perplexity and needle recall against the tokens they may read.

SmolLM2-135M reads 1000 tokens of held-out prose, of which each layer then keeps or reads a budget,
and goes on one token at a time: on the text itself, and on the end of a sentence that was hidden in
other text, which gives a number of four digits.

Command:  python -m tokenlab models fetch smollm2_135m
          python -m tokenlab data fetch english_prose
          python -m tokenlab study experiments/cache/budgets.py
Hardware: two CPU cores, twenty-two minutes of one, most of it compilation.
Expected: in nats per token of a hidden number, lower is better, at 96, 192 and 384 tokens of 1000,
          where a full cache has 0.16: TokenSelect 0.22, 0.21, 0.21; PageTopK 0.43, 0.20, 0.16; EMS
          0.80, 0.68, 0.35; SnapKV 0.85, 0.56, 0.28; ActQKV 1.30, 0.69, 0.37; LouisKV 1.29, 1.05,
          0.79; H2O 2.46, 1.48, 1.11; sinks and window 2.70, 2.73, 1.54, whose window has one of the
          two sentences at last. Three seeds do not tell LouisKV from that at 96 and 384, nor ActQKV
          at 96, though both means lie far below.
"""

import dataclasses
import functools

import numpy as np

from tokenlab.cache import (
    EMS,
    ActQKV,
    CachePolicy,
    FullCache,
    LouisKV,
    PageTopK,
    SinkCache,
    TokenSelect,
)
from tokenlab.core.context import View
from tokenlab.data import TfdsCorpus
from tokenlab.decode import score_continuation
from tokenlab.interop import load_pretrained
from tokenlab.interop.assets import fetch_model
from tokenlab.study import Claim, Measured, Study, Trial
from tokenlab.tokenizers import Tokenizer

SENTENCE = " The number of the {animal} is {number}."
QUESTION = " Remember: the number of the {animal} is"
BUDGETS = (96, 192, 384)
ANIMALS = ("otter", "raven", "badger", "heron", "lynx", "turtle")


@functools.cache
def published() -> tuple[View, Tokenizer, list[list[int]]]:
    """SmolLM2-135M, its tokenizer, and long held-out texts as its ids."""
    model, params, tokenizer = load_pretrained(fetch_model("smollm2_135m"))
    documents = TfdsCorpus(name="english_prose").documents("held_out")
    texts = [tokenizer.encode(document.text[:20_000]) for document in documents]
    return View(model=model, params=params), tokenizer, [t for t in texts if len(t) > 3000]


def planted(
    tokenizer: Tokenizer, hay: list[int], *, depth: float, length: int, animal: str, number: int
) -> tuple[list[int], list[int]]:
    """A prompt of ``length`` tokens with the sentence at ``depth``, and the number it asks for."""
    sentence, question, answer = (
        tokenizer.encode(part.format(animal=animal, number=number))
        for part in (SENTENCE, QUESTION, " {number}")
    )
    count = length - 1 - len(sentence) - len(question)
    at = int(depth * count)
    return [tokenizer.bos_id, *hay[:at], *sentence, *hay[at:count], *question], answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget(Trial):
    """Perplexity of the text after a prompt, and whether hidden numbers are repeated.

    Attributes:
        policy: the policy.
        budget: earlier tokens that a layer keeps or reads.
        prompt: tokens of a prompt.
        written: tokens of text after it.
        depths: where in the prompt sentences are hidden, as shares of it.
    """

    policy: CachePolicy
    budget: int
    prompt: int = 1000
    written: int = 32
    depths: tuple[float, ...] = (0.2, 0.7)

    def measure(self, *, seed: int) -> Measured:
        """One text and one prompt for each depth."""
        view, tokenizer, texts = published()
        rng = np.random.default_rng(seed)
        text, start = texts[seed % len(texts)], int(rng.integers(0, 1500))
        end = start + self.prompt - 1
        prompts = [[tokenizer.bos_id, *text[start:end]]]
        rest = [text[end : end + self.written]]
        for depth in self.depths:
            text = texts[rng.integers(len(texts))]
            animal, number = rng.choice(ANIMALS), int(rng.integers(1000, 10_000))
            prompt, answer = planted(
                tokenizer, text[start:], depth=depth, length=self.prompt, animal=animal,
                number=number,
            )  # fmt: skip
            prompts.append(prompt)
            rest.append(answer)
        scored = score_continuation(view, self.policy, prompts, rest)
        needles = scored.logp[1:].sum(axis=1) / scored.lengths[1:]
        return Measured(
            figures={
                "text/perplexity": float(np.exp(-scored.logp[0].mean())),
                "needle/nats_per_token": float(-needles.mean()),
                "needle/repeated": float(scored.repeated[1:].mean()),
            },
            costs={"budget": float(self.budget)},
        )


def policies(budget: int) -> dict[str, CachePolicy]:
    """Every policy at a budget; windows of 32 tokens where there is one."""
    return {
        "sink and recent": SinkCache(budget=budget),
        "H2O": EMS(budget=budget, redundant=2.0, score="global", slack=16),
        "SnapKV": EMS(budget=budget, redundant=2.0, score="local", slack=16),
        "EMS": EMS(budget=budget, slack=16),
        "PageTopK": PageTopK(budget=budget, page=16, window=32),
        "TokenSelect": TokenSelect(budget=budget, sinks=4, window=32),
        "LouisKV": LouisKV(budget=budget, sinks=4, window=32),
        "ActQKV": ActQKV(budget=budget, sinks=16, window=32, block=16),
    }


def study() -> Study:
    """A tenth, a fifth and three eighths of the prompt."""
    arms = {"full cache at 1000": Budget(policy=FullCache(), budget=1000)}
    claims, claim = [], functools.partial(Claim, metric="needle/nats_per_token")
    for budget in BUDGETS:
        arms |= {
            f"{name} at {budget}": Budget(policy=policy, budget=budget)
            for name, policy in policies(budget).items()
        }
        claims += [
            claim(arm=f"{name} at {budget}", than=f"sink and recent at {budget}")
            for name in ("EMS", "PageTopK", "TokenSelect", "LouisKV", "ActQKV")
        ]
    return Study(
        name="budgets",
        question="Which caches keep a hidden number that sinks and a window lose?",
        arms=arms,
        matched="budget",
        claims=tuple(claims),
        seeds=(0, 1, 2),
    )
