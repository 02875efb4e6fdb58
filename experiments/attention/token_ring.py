"""TokenRing: what travels round a ring of devices, and what a step of it would take.

The step time is predicted, for no speed can be seen on virtual devices of one CPU: the longest of
the products and of the bytes each way at the link's bandwidth. The setting is the one that the
authors report, four A10 GPUs, 24,000 tokens and 32 heads of width 128; their 7.6 ms for a round of
the ring give the bandwidth. The collectives are those of the compiled program on virtual devices,
whose result is compared with one device's.

Paper:    Wang et al., "TokenRing: An Efficient Parallelism Framework for Infinite-Context LLMs via
          Bidirectional Communication", 2024, arXiv:2412.20501
Command:  python -m tokenlab study experiments/attention/token_ring.py
Hardware: one CPU core, two minutes.
Expected: half the step time of the ring where every head has keys of its own, a longer one where
          four heads share them; three messages per device and step, results equal to rounding.
"""

import dataclasses
import json
import os
import subprocess
import sys

from tokenlab.attention import RingAttention, SequenceAttention, TokenRing, step_cost
from tokenlab.study import Bound, Claim, Measured, Study, Trial

TOKENS, DEVICES, HEADS, WIDTH = 24_000, 4, 32, 128
PEAK = 125e12  # of an A10 in bfloat16, the vendor's, per second
ROUND = 7.6e-3  # seconds of a round of the ring, as the authors measured it
BANDWIDTH = TOKENS // DEVICES * 2 * HEADS * WIDTH * 2 / ROUND


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime(Trial):
    """Predicted, of devices that are all linked with each other.

    Attributes:
        part: the algorithm.
        kv_heads: key heads of the 32 query heads.
    """

    part: SequenceAttention
    kv_heads: int

    def measure(self, *, seed: int) -> Measured:
        """Milliseconds and megabytes of a step; nothing depends on the seed."""
        del seed
        cost = step_cost(
            self.part, tokens=TOKENS // DEVICES, heads=HEADS, kv_heads=self.kv_heads, width=WIDTH,
            flops=PEAK, bandwidth=BANDWIDTH,
        )  # fmt: skip
        figures = {
            "step/milliseconds": 1e3 * cost.seconds,
            "step/compute_milliseconds": 1e3 * cost.compute_seconds,
            "step/megabytes_one_way": cost.forward_bytes / 1e6,
            "step/megabytes_other_way": cost.backward_bytes / 1e6,
        }
        return Measured(figures=figures, costs={"kv_heads": self.kv_heads})


SCRIPT = """
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
from tokenlab.attention import RingAttention, TokenRing
from tokenlab.train.mesh import MeshShape, placed_on

name, seed = sys.argv[1], int(sys.argv[2])
part, devices = {"RingAttention": RingAttention, "TokenRing": TokenRing}[name](), jax.device_count()
shape = (1, 64 * devices, 4, 16)
q, k, v = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(seed), 3))
positions = jnp.arange(shape[1])[None]
tokens = {"positions": positions, "segments": jnp.ones_like(positions)}
alone = part(q=q, k=k, v=v, **tokens, scale=0.25)
with placed_on(MeshShape(sequence=devices, data=1).build()):
    compiled = jax.jit(lambda q, k, v: part(q=q, k=k, v=v, **tokens, scale=0.25)).lower(q, k, v)
    compiled = compiled.compile()
    found = compiled(q, k, v)
pattern = r"= f32\\[([\\d,]*)\\]\\S* collective-permute(?:-start)?\\("
sizes = [np.prod([*map(int, dims.split(","))]) for dims in re.findall(pattern, compiled.as_text())]
error = max(float(jnp.abs(a - b).max()) for a, b in zip(found, alone))
print(json.dumps({"messages": len(sizes), "bytes": 4 * int(sum(sizes)), "error": error}))
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled(Trial):
    """The program of virtual devices.

    Attributes:
        part: the algorithm.
        devices: how many.
    """

    part: SequenceAttention
    devices: int

    def measure(self, *, seed: int) -> Measured:
        """Messages, bytes and the largest difference from one device."""
        flags = f"--xla_force_host_platform_device_count={self.devices}"
        name = type(self.part).__name__
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, name, str(seed)],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        found = json.loads(done.stdout.splitlines()[-1])
        steps = self.devices - 1
        one, other = self.part.sent(heads=4, kv_heads=4, width=16, itemsize=4)
        figures = {
            "program/messages_per_step": found["messages"] / steps,
            "program/bytes_over_formula": found["bytes"] / (steps * 64 * (one + other)),
            "program/error": found["error"],
        }
        return Measured(figures=figures, costs={"kv_heads": 4})


def study() -> Study:
    """Queries that travel against keys that do, with and without shared keys."""
    ring, ours = RingAttention(), TokenRing()
    arms: dict[str, Trial] = {
        f"{name}-{kv}-keys": StepTime(part=part, kv_heads=kv)
        for name, part in (("ring", ring), ("token-ring", ours))
        for kv in (32, 8)
    }
    programs = [f"token-ring-on-{devices}" for devices in (4, 8)]
    arms |= {name: Compiled(part=ours, devices=int(name[-1])) for name in programs}
    arms["ring-on-4"] = Compiled(part=ring, devices=4)

    def near(arm: str, metric: str, value: float) -> tuple[Bound, Bound]:
        return (
            Bound(arm=arm, metric=metric, limit=value - 0.001),
            Bound(arm=arm, metric=metric, limit=value + 0.001, side="below"),
        )

    return Study(
        name="token_ring",
        question="Does moving queries and results both ways beat moving keys and values one way?",
        arms=arms,
        matched="kv_heads",
        claims=(
            Claim(
                arm="token-ring-32-keys",
                than="ring-32-keys",
                metric="step/milliseconds",
                margin=0.4,
                relative=True,
            ),
            Claim(arm="ring-8-keys", than="token-ring-8-keys", metric="step/milliseconds"),
            *(
                bound
                for arm in programs
                for bound in (
                    *near(arm, "program/messages_per_step", 3),
                    *near(arm, "program/bytes_over_formula", 1),
                    Bound(arm=arm, metric="program/error", limit=1e-5, side="below"),
                )
            ),
        ),
    )
