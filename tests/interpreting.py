"""The interpreter that finds most: races, memory read before it is written, reads out of bounds."""

from jax.experimental.pallas import tpu as pltpu

# The default clock is of two entries for one core, so that all copies are one thread's, and
# ordered; with many, two copies hardly ever share an entry, which are given at random.
STRICT = pltpu.InterpretParams(
    detect_races=True,
    uninitialized_memory="nan",
    out_of_bounds_reads="raise",
    vector_clock_size=512,
)
