"""A streamed emulator is the one that is made in memory, byte for byte."""

import pytest
import torch

from emloc_jax.streaming import stream_emulator
from tests.checkpoints.tiny import save_tiny
from tests.streaming.tiny_run import (
    CHUNK,
    batches,
    in_memory,
    layer_kernels_of,
    opened,
    same_folder,
)

RULES = [(".*/down_proj", 0.3), (".*(gate|up|q|v)_proj", 0.5)]
CASES = {
    "two_sided": dict(weighting="two_sided", ratios=0.5),
    "rules": dict(weighting="two_sided", ratios=RULES, skip=".*/q_proj"),
    "one_sided": dict(weighting="one_sided", ratios=0.25),
    "plain": dict(weighting="plain", ratios=0.5),
    "energy": dict(weighting="one_sided", energy=0.8),
    "budget": dict(weighting="two_sided", budget=9000, skip=".*/(q|k)_proj"),
}


def stream(folder, model_folder, case, *, data=None, **options):
    load = {k: options.pop(k) for k in ("scan_layers", "compute_dtype") if k in options}
    base = opened(model_folder, abstract=True, **load)
    return stream_emulator(
        folder,
        base,
        batches() if data is None else data,
        kernels=layer_kernels_of(base),
        rules={"note": "same"},
        seed=3,
        chunk=CHUNK,
        **CASES[case],
        **options,
    )


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder, "llama_biased", torch.float32, num_hidden_layers=3)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_same_bytes_as_in_memory(tmp_path, model_folder, case):
    in_memory(tmp_path / "whole", opened(model_folder), batches(), **CASES[case])
    stream(tmp_path / "streamed", model_folder, case, activations=2000)
    assert not same_folder(tmp_path / "whole", tmp_path / "streamed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["streamed", "whole"]
