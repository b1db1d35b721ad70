import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.adapters import correct, correction_report
from emloc_jax.errors import OutputExistsError, RatioError
from tests.adapters.cases import Moment, make_case, product


def make_moments(tokens=40):
    inputs = np.random.default_rng(2).standard_normal((3, tokens, 12)) * np.geomspace(2, 0.2, 12)
    sums = np.swapaxes(inputs, -1, -2) @ inputs
    return inputs, {"block/kernel": Moment(jnp.asarray(sums, jnp.float32))}


@pytest.mark.parametrize("bound", ["row", "kernel", "column"])
@pytest.mark.parametrize("weighted", [False, True])
def test_figures_against_the_corrected_adapter_itself(bound, weighted):
    case = make_case("scanned", ratio=2.0, b_scale=0.2)
    inputs, moments = make_moments()
    options = {"limit": 1.0, "bound": bound, "moments": moments if weighted else None}
    report = correction_report(case.adapters, case.params, case.emulator, **options)
    corrected = correct(case.adapters, case.params, case.emulator, **options)["block/kernel"]
    after, before = product(corrected), product(case.adapter)
    assert report.weighted == weighted
    for layer, entry in enumerate(report.kernels):
        assert entry.path == f"block/kernel[{layer}]" and entry.rank == 4
        target = case.emulated[layer] + before[layer]
        maps = [case.kernel[layer] + adapter[layer] - target for adapter in (before, after)]
        u = np.linalg.svd(case.lora_a[layer], full_matrices=False)[0]
        expected = [np.linalg.norm(u.T @ m) / np.linalg.norm(u.T @ target) for m in maps]
        got = [entry.mismatch_before, entry.mismatch_after]
        np.testing.assert_allclose(got, expected, rtol=1e-4)
        assert expected[1] < expected[0] or weighted
        if weighted:
            x = inputs[layer]
            expected = [np.linalg.norm(x @ m) / np.linalg.norm(x @ target) for m in maps]
            np.testing.assert_allclose(
                [entry.inputs_before, entry.inputs_after], expected, rtol=1e-3
            )
        else:
            assert entry.inputs_before is None and entry.inputs_after is None
        change = np.linalg.norm(after[layer] - before[layer]) / np.linalg.norm(before[layer])
        assert entry.ratio == pytest.approx(change, rel=1e-4)


def test_share_of_bounded_rows():
    case = make_case()
    shares = [
        correction_report(case.adapters, case.params, case.emulator, limit=limit).mean().bounded
        for limit in (0.0, 0.3, 1e6, math.inf)
    ]
    assert shares[0] == 1 and 0 <= shares[1] <= 1 and shares[2:] == [0, 0]


def test_an_untrained_adapter_corrected_in_full_has_an_infinite_ratio():
    case = make_case(b_scale=0.0)
    report = correction_report(case.adapters, case.params, case.emulator, limit=math.inf)
    assert math.isinf(report.kernels[0].ratio) and report.kernels[0].mismatch_after < 1e-5
    bounded = correction_report(case.adapters, case.params, case.emulator)
    assert bounded.kernels[0].ratio == 0 and bounded.kernels[0].bounded == 1


def test_prints_as_a_table_with_means():
    case = make_case("scanned")
    text = str(correction_report(case.adapters, case.params, case.emulator, limit=0.5))
    assert "limit 0.5 per row" in text and "block/kernel[2]" in text and "mean" in text
    assert "on inputs" not in text
    _, moments = make_moments()
    text = str(correction_report(case.adapters, case.params, case.emulator, moments=moments))
    assert "calibration-weighted" in text and "on inputs" in text


def test_saves_as_strict_json_and_overwrites_nothing(tmp_path):
    case = make_case(b_scale=0.0)
    report = correction_report(case.adapters, case.params, case.emulator, limit=math.inf)
    path = tmp_path / "correction.json"
    report.save(path)
    saved = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert saved["limit"] == "inf" and saved["kernels"][0]["ratio"] == "inf"
    assert saved["kernels"][0]["path"] == "block/kernel"
    assert saved["kernels"][0]["inputs_before"] is None
    with pytest.raises(OutputExistsError):
        report.save(path)


def test_an_impossible_limit_is_refused():
    case = make_case()
    with pytest.raises(RatioError):
        correction_report(case.adapters, case.params, case.emulator, limit=-1)
