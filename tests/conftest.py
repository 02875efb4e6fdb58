"""Guards every test runs under: CPU only, no network, no silent rank promotion."""

import os
import pathlib
import random
import socket

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import pytest

# Shapes and types in signatures are checked wherever a test calls.
jaxtyping.install_import_hook(["tokenlab", "kernels_pallas"], "typechecking.checked")

from tokenlab import config
from tokenlab.files import load_module

CHECKOUT = pathlib.Path(__file__).resolve().parent.parent
jax.config.update("jax_numpy_rank_promotion", "raise")


# Compiling takes most of the suite's time, and most of that goes into making small programs fast.
# With XLA's own optimisations of CPU code off, results differ in rounding only. Programs are
# compiled as users compile them in all that tests start as processes of their own (tests/e2e, the
# notebooks), and wherever XLA_FLAGS is set, if only to nothing, as `make smoke` does.
QUICK_COMPILING = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):  # later ones have no other emitters
    QUICK_COMPILING += " --xla_cpu_use_fusion_emitters=false"
if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = QUICK_COMPILING
    jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))  # XLA reads its flags once, here
    del os.environ["XLA_FLAGS"]  # neither for libtpu, which knows others, nor for what tests start
jax.config.update("jax_compilation_cache_dir", str(CHECKOUT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


# What also runs on the newest supported JAX: every place where an interface of it is used, one case
# of every test, and of TPUs one generation. Models and decoders are flax and jax.numpy: one test of
# a file shows that it runs.
SMOKE = {"kernels_pallas", "models", "train", "decode", "golden", "e2e"}
ONE_OF_A_FILE = {"models", "decode"}
# But for what says nothing of interfaces: predicted times, random shapes, compiling all of them.
NOT_SMOKE = {
    "test_attention_speed",
    "test_beam",
    "test_constraints",
    "test_drafted_trees",
    "test_every_shape",
    "test_linear_cross_entropy_properties",
    "test_scoring",
    "test_step_entropy",
    "test_tuned",
}
OTHER_GENERATIONS = ("v5p", "v6e", "tpu7x")
# Where a NaN is an error at the operation that makes it.
WITHOUT_NANS = {"models", "cache", "decode"}


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="only what is marked slow")


def pytest_collection_modifyitems(config, items):
    seen = set()
    for item in items:
        told = item.path.parent.name in SMOKE and item.path.stem not in NOT_SMOKE
        told = told and item.get_closest_marker("slow") is None
        if told and not any(name in item.name for name in OTHER_GENERATIONS):
            one = item.path.parent.name in ONE_OF_A_FILE
            test = (item.path, None if one else item.originalname)
            if test not in seen:
                item.add_marker(pytest.mark.smoke)
            seen.add(test)
    slow = config.getoption("--slow")
    out = [item for item in items if (item.get_closest_marker("slow") is not None) != slow]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]


@pytest.fixture(autouse=True)
def _nans_are_errors(request):
    with jax.debug_nans(request.path.parent.name in WITHOUT_NANS):
        yield


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_go_with_their_module():
    """Every program takes memory maps, of which a process has 65,530: not enough for the suite."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Only loopback and local sockets connect."""
    connect = socket.socket.connect

    def guarded(self, address):
        remote = isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost")
        if remote:
            raise RuntimeError(f"a test tried to reach {address}; tests run without a network")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="module")
def unchecked():
    """No type checker: for stand-ins, and for the errors that users without one see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def corpus_folder(tmp_path):
    """A working folder with sixty short text files under ``corpus/``."""
    rng = random.Random(0)
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "while",
        "nobody",
        "in",
        "town",
        "looks",
        "on",
    ]
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(60):
        count = rng.randint(5, 60)
        text = " ".join(rng.choice(words) for _ in range(count)).capitalize() + f" {number}.\n"
        (folder / f"{number:02}.txt").write_text(text)
    return tmp_path


@pytest.fixture
def tiny(corpus_folder):
    """The experiment of ``tests/tiny.py`` over ``corpus_folder``."""
    pattern = str(corpus_folder / "corpus/*.txt")
    return config.replace(
        load_module(CHECKOUT / "tests/tiny.py").config(),
        {"data.corpus.pattern": pattern, "evals.held_out.corpus.pattern": pattern},
    )
