"""tokenlab: a JAX laboratory for token-level methods."""

__version__ = "0.1.0"
