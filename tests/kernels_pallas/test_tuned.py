"""Block sizes: explicit, then tuned, then derived; and the tuner that writes the tuned ones."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.block_sparse_attention import BlockSparseAttentionConfig, Causal
from kernels_pallas.block_sparse_attention import cost as attention
from kernels_pallas.block_sparse_attention.specs import tuned_key
from kernels_pallas.common import aot, dispatch, predict, tune, tuned
from kernels_pallas.common.schedule import schedules
from kernels_pallas.linear_cross_entropy import LinearCrossEntropyConfig
from kernels_pallas.linear_cross_entropy.specs import Tile

KIND = "TPU v6 lite"
CALL = {"queries": 4096, "keys": 4096, "width": 128, "dtype": jnp.bfloat16, "rule": Causal()}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a table for an operation, in place of the shipped one."""
    monkeypatch.setattr(tuned, "path", lambda op: tmp_path / f"{op}.json")

    def write(op, entries):
        tuned.store(tmp_path / f"{op}.json", KIND, entries)

    yield write
    tuned._read.cache_clear()


@pytest.fixture
def v6e():
    """Tracing for a TPU that is not there."""
    devices = np.asarray(aot.tpu_devices(aot.TPUS["v6e"])[:1])
    with jax.set_mesh(jax.sharding.Mesh(devices, ("device",))):
        yield


def test_the_device_kind_is_that_of_the_mesh(v6e):
    assert dispatch.device_kind() == KIND


def test_a_cpu_has_no_tuned_sizes(table):
    table("op", {"key": {"block": 1}})
    assert tuned.lookup("op", "key") == {}


def test_keys_are_found_exactly_and_for_their_device_only(table, v6e, tmp_path):
    table("op", {"key": {"block": 1}})
    tuned.store(tmp_path / "op.json", "TPU v5 lite", {"other": {"block": 2}})
    assert tuned.lookup("op", "key") == {"block": 1}
    assert tuned.lookup("op", "other") == tuned.lookup("op", "ke") == {}
    assert tuned.lookup("no_such_op", "key") == {}


def test_attention_takes_explicit_then_tuned_then_derived_tiles(table, v6e):
    key = tuned_key("forward", jnp.bfloat16, 128, Causal())
    assert key == "forward bfloat16 128 Causal()"
    table("block_sparse_attention", {key: {"block_q": 2048, "block_k": 256, "cycles": 1}})
    config = BlockSparseAttentionConfig()
    assert config.tiles("forward", **CALL) == (2048, 256)
    assert BlockSparseAttentionConfig(block_k=128).tiles("forward", **CALL) == (2048, 128)
    # Another pass, and rows that are shorter than the tile.
    assert config.tiles("backward", **CALL) == (1024, 512)
    assert config.tiles("forward", **(CALL | {"queries": 1500})) == (512, 512)


def test_a_backward_tile_is_its_own_or_that_of_the_forward_pass():
    both = BlockSparseAttentionConfig(block_q=256, block_k=128)
    assert both.tiles("backward", **CALL) == (256, 128)
    apart = BlockSparseAttentionConfig(block_q=256, block_k=128, backward_q=512)
    assert apart.tiles("forward", **CALL) == (256, 128)
    assert apart.tiles("backward", **CALL) == (512, 128)


def test_the_loss_takes_explicit_then_tuned_then_derived_tiles(table, v6e):
    sizes = {"tokens": 8192, "vocabulary": 32768, "width": 2304, "itemsize": 2}
    derived = LinearCrossEntropyConfig().tile("forward", **sizes)
    entry = {"tokens": 384, "vocabulary": 640, "cycles": 1}
    table("linear_cross_entropy", {"forward bfloat16 2304": entry})
    config = LinearCrossEntropyConfig()
    assert config.tile("forward", **sizes) == Tile(tokens=384, vocabulary=640) != derived
    assert LinearCrossEntropyConfig(block_tokens=128).tile("forward", **sizes).tokens == 128
    assert config.tile("by_hidden", **sizes) != Tile(tokens=384, vocabulary=640)
    assert config.tile("forward", **(sizes | {"tokens": 256})).tokens == 256


def test_storing_keeps_all_other_entries_and_sorts(tmp_path):
    file = tmp_path / "tuned.json"
    tuned.store(file, "b", {"y": {"block": 1}, "x": {"block": 2}})
    tuned.store(file, "a", {"z": {"block": 3}})
    tuned.store(file, "b", {"y": {"block": 4}})
    assert json.loads(file.read_text()) == {
        "a": {"z": {"block": 3}},
        "b": {"x": {"block": 2}, "y": {"block": 4}},
    }
    assert file.read_text().index('"a"') < file.read_text().index('"b"')
    assert os.listdir(tmp_path) == ["tuned.json"]


def test_a_table_survives_a_kill_while_it_is_written(tmp_path):
    """The process dies just before the new file takes the old one's place."""
    file = tmp_path / "tuned.json"
    tuned.store(file, "a", {"x": {"block": 1}})
    before = file.read_text()
    script = (
        "import os, pathlib, signal\n"
        "from kernels_pallas.common import tuned\n"
        "os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"tuned.store(pathlib.Path({str(file)!r}), 'a', {{'x': {{'block': 2}}}})\n"
    )
    root = str(pathlib.Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": root})
    assert done.returncode < 0
    assert file.read_text() == before


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    file = tmp_path / "tuned.json"
    tuned.store(file, "a", {"x": {"block": 1}})

    def fail(*paths):
        raise OSError("no room")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no room"):
        tuned.store(file, "a", {"x": {"block": 2}})
    assert os.listdir(tmp_path) == ["tuned.json"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no_such_op", "--shape", "x"], "no operation 'no_such_op'; use one of block_sparse"),
        (["block_sparse_attention", "--shape", "x"], "has no shape 'x'; use one of laptop-512"),
        (
            ["block_sparse_attention", "--shape", "tpu-4096", "--topology", "v9:1x1"],
            "no peaks of 'v9:1x1'; known are",
        ),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, said):
    with pytest.raises(SystemExit) as stopped:
        tune.main(arguments)
    message = str(stopped.value)
    assert message.startswith("tune: ") and said in message and "\n" not in message


def test_the_first_as_fast_as_any_that_compiles_wins():
    cycles = {128: 30.0, 256: 10.05, 512: 10.0, 1024: None}

    def predictor(which, sizes):
        if cycles[sizes["block"]] is None:
            raise aot.CannotCompile("out of VMEM")
        return cycles[sizes["block"]]

    best, trials = tune.search("forward", [{"block": n} for n in cycles], predictor)
    assert best == tune.Trial(sizes={"block": 256}, cycles=10.05)
    assert [trial.cycles for trial in trials] == list(cycles.values())
    assert trials[-1].refusal == "out of VMEM"
    assert tune.search("forward", [{"block": 1024}], predictor)[0] is None


def test_tuning_writes_the_best_of_each_pass(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tuned, "path", lambda op: tmp_path / "tuned.json")
    cycles = {"forward": 512, "backward": 256}

    def predicted(found, peak, which, shape, dtype, sizes):
        assert peak == predict.PEAKS["v6e"]
        return abs(sizes["block_q"] - cycles[which]) + sizes["block_k"]

    monkeypatch.setattr(attention, "predicted", predicted)
    monkeypatch.setattr(tune, "schedules", lambda *args, **options: [None])
    tune.main(["block_sparse_attention", "--shape", "laptop-512", "--topology", aot.TPUS["v6e"]])
    found = json.loads((tmp_path / "tuned.json").read_text())[KIND]
    best = {key.split()[0]: (entry["block_q"], entry["block_k"]) for key, entry in found.items()}
    assert best == {"forward": (512, 256), "backward": (256, 512)}
    assert "forward" in capsys.readouterr().out


def test_a_candidate_is_really_compiled_and_judged():
    """On one head of 512 tokens."""
    options = {"which": "forward", "shape": "laptop-512", "dtype": "bfloat16"}
    sizes = attention.candidates(**options)[0]
    program = "kernels_pallas.block_sparse_attention.cost:kernel"
    (found,) = schedules(program, topology=aot.TPUS["v6e"], **options, **sizes)
    cycles = attention.predicted(found, predict.PEAKS["v6e"], sizes=sizes, **options)
    shape = attention.SHAPES["laptop-512"]
    pairs = shape.batch * shape.heads * shape.length**2
    assert pairs * 2 * shape.width / predict.PEAKS["v6e"].multiply_adds / 2 < cycles < pairs


@pytest.mark.parametrize("op", ["block_sparse_attention", "linear_cross_entropy"])
def test_shipped_tables_name_devices_and_fit(op):
    """Whatever is shipped was written by the tuner: sizes in whole lanes, with their cycles."""
    table = tuned.read(tuned.path(op))
    assert {"TPU v5 lite", "TPU v6 lite"} <= set(table)
    for entries in table.values():
        for sizes in entries.values():
            assert sizes["cycles"] > 0
            assert all(size % 128 == 0 for name, size in sizes.items() if name != "cycles")
