"""DySpec: a draft tree that grows where the draft is confident, against trees of fixed shape.

Paper:    Xiong et al., "DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure",
          2024, arXiv:2410.11744.
Command:  python -m tokenlab data fetch english_prose
          python -m tokenlab study experiments/decode/dyspec.py
Hardware: two CPU cores, ten minutes, of which six train target and draft once.
Expected: does not hold with this pair: at 16 nodes and temperature 0.6 2.16 tokens per pass, as a
          chain (2.09) and a bushy tree (2.19), less than a deeper one (2.36); at temperature 1
          1.89 against 2.28 to 2.58. A node is ranked by the draft's probability of its token, and
          an unsure draft is accepted far more often than that, so its trees grow too bushy.
"""

import pathlib

from tokenlab.decode import Categorical, FirstTokens, Temperature
from tokenlab.decode.speculative import Chains, DynamicTree, FixedTree, Speculative
from tokenlab.files import load_module
from tokenlab.study import Claim, Study

# The same target, draft and prompts.
spectr = load_module(pathlib.Path(__file__).with_name("spectr.py"))

DRAFTERS = {
    "dynamic": DynamicTree(size=16, deepest=16),
    "chain": Chains(length=16),
    "bushy": FixedTree(branches=(4, 3)),
    "deep": FixedTree(branches=(4, 1, 1, 1)),
}


def study() -> Study:
    """Four shapes of 16 nodes at two temperatures."""
    arms, claims = {}, []
    for value in (0.6, 1.0):
        shape = (FirstTokens(count=spectr.VOCABULARY), Temperature(value=value))
        for name, drafter in DRAFTERS.items():
            decoder = Speculative(
                drafter=drafter, sampler=Categorical(processors=shape), max_new_tokens=64,
                end_ids=(),
            )  # fmt: skip
            arms[f"{name}, {value}"] = spectr.writing(decoder)
        claims += [
            Claim(
                arm=f"dynamic, {value}", than=f"{name}, {value}", better="higher", margin=0.05,
                metric="decode/tokens_per_pass", relative=True,
            )
            for name in list(DRAFTERS)[1:]
        ]  # fmt: skip
    return Study(
        name="dyspec",
        question="Does a tree that follows the draft's confidence write more per pass?",
        arms=arms,
        matched="nodes",
        claims=tuple(claims),
    )
