"""Emulator folders: exact round trips at the emulator's size, and refusals."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from emloc_jax.checkpoints import (
    EmulatorConfig,
    base_fingerprint,
    load_emulator,
    load_pretrained,
    save_emulator,
)
from emloc_jax.emulator import CompressionReport, compress
from emloc_jax.errors import CheckpointError, NonFiniteError, OutputExistsError
from emloc_jax.kernels import (
    Layout,
    LoraKernel,
    LowRankKernel,
    find_kernels,
    flatten_leaves,
    set_leaves,
)
from tests.checkpoints.tiny import save_tiny


def shrink(params, rank=3):
    """Random factors in place of every projection of the MLP."""
    rng, boxes = np.random.default_rng(0), {}
    for path, leaf in flatten_leaves(params).items():
        if "/mlp/" in path:
            *stack, d_in, d_out = leaf.shape
            left = jnp.asarray(rng.normal(size=(*stack, d_in, rank)), leaf.dtype)
            right = jnp.asarray(rng.normal(size=(*stack, rank, d_out)), leaf.dtype)
            boxes[path] = LowRankKernel(left, right)
    return set_leaves(params, boxes)


@pytest.fixture
def base(llama_folder):
    return load_pretrained(llama_folder)


@pytest.fixture
def folder(tmp_path, base):
    return save_emulator(tmp_path / "emulator", shrink(base.params), base=base)


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert [x.dtype for x in jax.tree.leaves(one)] == [x.dtype for x in jax.tree.leaves(other)]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(tmp_path, llama_folder, scan_layers, dtype):
    base = load_pretrained(llama_folder, scan_layers=scan_layers, dtype=dtype)
    emulator = shrink(base.params)
    rules = [["layers/.*/mlp/.*", 0.5]]
    save_emulator(
        tmp_path / "out",
        emulator,
        base=base,
        rules=rules,
        weighting="two_sided",
        calibration="moments:12",
        seed=3,
    )
    again = load_emulator(tmp_path / "out", base)
    same(again, emulator)
    same(load_emulator(tmp_path / "out", llama_folder), emulator)
    config = EmulatorConfig.read(tmp_path / "out" / "emulator_config.json")
    assert config.base_fingerprint == base_fingerprint(base) and config.rules == rules
    assert (config.weighting, config.seed) == ("two_sided", 3)
    assert set(config.ranks.values()) == {3} and config.calibration_fingerprint == "moments:12"
    shapes = load_emulator(tmp_path / "out", base, abstract=True)
    assert jax.tree.structure(shapes) == jax.tree.structure(emulator)
    assert [s.shape for s in jax.tree.leaves(shapes)] == [
        x.shape for x in jax.tree.leaves(emulator)
    ]


def test_layouts_of_other_models(tmp_path):
    """Attention kernels with head axes, an embedding as head, and a stack of experts."""
    head = LowRankKernel(jnp.ones((4, 2)), jnp.ones((2, 9)), Layout(perm=(1, 0)))
    tree = {
        "out": {"kernel": LowRankKernel(jnp.ones((2, 3, 1)), jnp.ones((1, 5)), Layout(num_in=2))},
        "embed": {"embedding": head},
        "experts": {"kernel": LowRankKernel(jnp.ones((7, 4, 2)), jnp.ones((7, 2, 6)))},
        "norm": {"scale": jnp.ones(4, jnp.float16)},
    }
    full = {"norm": {"scale": jnp.ones(4)}}
    save_emulator(tmp_path / "out", tree, base=full)
    same(load_emulator(tmp_path / "out", full), tree)
    same(load_emulator(tmp_path / "out", None), tree)


def test_what_compress_makes_is_kept_with_its_report(tmp_path, base):
    kernels = find_kernels(base.model.apply, base.params, jnp.zeros((1, 4), jnp.int32))
    emulator, report = compress(
        base.params, None, kernels=kernels, ratios={"layers/.*": 0.5}, weighting="plain"
    )
    save_emulator(tmp_path / "out", emulator, report, base=base)
    same(load_emulator(tmp_path / "out", base), emulator)
    assert CompressionReport.load(tmp_path / "out" / "report.json") == report
    config = EmulatorConfig.read(tmp_path / "out" / "emulator_config.json")
    assert config.weighting == "plain" and len(config.ranks) == 14
    assert config.ranks == {path: rank for path, rank in report.ranks.items() if rank}


def test_opens_without_the_base_and_at_its_own_size(folder, base, llama_folder):
    stored = sum(x.nbytes for x in load_file(folder / "emulator.safetensors").values())
    assert stored == sum(x.nbytes for x in jax.tree.leaves(shrink(base.params)))
    for file in llama_folder.iterdir():
        file.unlink()
    same(load_emulator(folder, None), shrink(base.params))


def test_another_base(tmp_path, folder):
    save_tiny(tmp_path / "other", seed=5)
    with pytest.raises(CheckpointError, match="was made from .*base.*other"):
        load_emulator(folder, load_pretrained(tmp_path / "other"))


def test_missing_and_damaged_factors(folder, base):
    file = folder / "emulator.safetensors"
    whole, path = load_file(file), "layers/1/mlp/up_proj/kernel"
    no_right = {name: x for name, x in whole.items() if name != f"{path}/right"}
    cases = {
        f"{path}: right is missing": no_right,
        f"{path}: rank 3, but left": whole | {f"{path}/left": np.ones((16, 2), np.float32)},
        f"{path}: stored both": whole | {path: np.ones((16, 24), np.float32)},
    }
    for message, tensors in cases.items():
        save_file(tensors, file)
        with pytest.raises(CheckpointError, match=message):
            load_emulator(folder, base)
    save_file(whole | {f"{path}/left": np.full((16, 3), np.nan, np.float32)}, file)
    with pytest.raises(NonFiniteError, match=path):
        load_emulator(folder, base)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="no whole safetensors"):
        load_emulator(folder, base)


def test_bad_configs(folder, base):
    file = folder / "emulator_config.json"
    whole = json.loads(file.read_text())
    for text in ("{", "[]", json.dumps(whole | {"format": "x/2"}), json.dumps(whole | {"new": 1})):
        file.write_text(text)
        with pytest.raises(CheckpointError, match="no emulator config"):
            load_emulator(folder, base)
    file.unlink()
    with pytest.raises(CheckpointError, match="no emulator folder"):
        load_emulator(folder, base)


def test_saving_what_is_no_emulator(tmp_path, base, folder):
    lora = LoraKernel(jnp.eye(4), jnp.ones((4, 1)), jnp.ones((1, 4)))
    cases = {"LoraKernel": lora, "not fp32": jnp.ones(3, jnp.int32)}
    for message, leaf in cases.items():
        with pytest.raises(CheckpointError, match=message):
            save_emulator(tmp_path / "new", {"a": {"kernel": leaf}}, base=base)
    with pytest.raises(NonFiniteError, match="a/kernel"):
        save_emulator(tmp_path / "new", {"a": {"kernel": jnp.array([jnp.inf])}}, base=base)
    with pytest.raises(OutputExistsError):
        save_emulator(folder, {"a": {"kernel": jnp.ones(3)}}, base=base)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "emulator"]
