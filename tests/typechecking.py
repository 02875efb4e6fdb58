"""The type checker that tests apply to every signature of the library."""

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function):
    """Checks calls, but not dataclasses: JAX fills pytrees with shapes, specs and placeholders."""
    return function if function.__qualname__.endswith("__init__") else _check(function)
