import dataclasses

import jax
import numpy as np
import pytest

from emloc_jax.errors import ConfigError, ProjectorError
from emloc_jax.kernels import make_projector
from emloc_jax.offload._cost_memory import peak_alive, projector_bytes
from emloc_jax.offload._cost_model import (
    Hardware,
    compare,
    lane_times,
    predict,
    predicted_timeline,
)
from emloc_jax.offload._lane_times import LaneTimes, closed_form
from emloc_jax.offload._simulate import simulated_seconds
from emloc_jax.offload._timeline import Span, Timeline
from emloc_jax.offload._timeline_summary import summarize
from emloc_jax.offload._workload import BlockShape, Setting, Workload

# Table 1 of arXiv 2406.10181: llama-7B in fp16 on a commodity workstation, batch and length theirs.
LLAMA_BLOCK = BlockShape(((4096, 4096),) * 4 + ((4096, 11008),) * 2 + ((11008, 4096),))
LLAMA = Workload((LLAMA_BLOCK,) * 32, tokens=2048, outside=BlockShape((), frozen=2 * 32000 * 4096))


def workstation(bandwidth, **figures):
    return Hardware(
        to_host=bandwidth,
        to_device=bandwidth,
        host_adam=LLAMA_BLOCK.trained / 0.06,
        forward_seconds=0.0122,
        backward_seconds=0.0281,
        **figures,
    )


SMALL = Workload((BlockShape(((8, 8), (8, 16)), frozen=4),) * 3, tokens=5)
MACHINE = Hardware(1e3, 2e3, 1e4, flops=1e5, latency=0.01, compress_rate=1e4, apply_rate=1e5)


@pytest.mark.parametrize(
    ("bandwidth", "offload", "delayed", "lsp"), [(20e9, 3.2, 1.9, 1.31), (10e9, 3.7, 2.8, 1.32)]
)
def test_table_1_by_formula(bandwidth, offload, delayed, lsp):
    """14 GB of parameters cross each way; LSP: seven kernels of 2048 x 2048 in fp32 per block."""
    full = 14e9 / 32 / bandwidth
    times = LaneTimes(32, 0.0122, 0.0281, d2h=full, host=0.06, h2d=full)
    assert round(closed_form(times, "offload"), 1) == offload
    assert round(closed_form(times, "offload_delayed"), 1) == delayed
    core = 7 * 2048**2
    times = LaneTimes(
        32,
        0.0122,
        0.0281,
        d2h=4 * core / bandwidth,
        host=0.06 * core / LLAMA_BLOCK.trained,
        h2d=4 * core / bandwidth,
    )
    assert round(closed_form(times, "lsp"), 2) == lsp
    np.testing.assert_allclose(simulated_seconds(times, "lsp"), closed_form(times, "lsp"))


@pytest.mark.parametrize("bandwidth", [10e9, 20e9])
def test_table_1_by_shapes_and_simulation(bandwidth):
    by_name = {p.schedule: p for p in compare(workstation(bandwidth), LLAMA, Setting(2048))}
    native = by_name["native"]
    np.testing.assert_allclose(native.seconds, 32 * 0.0403)
    np.testing.assert_allclose(native.slowdown, 1.0)
    assert 3.2 <= by_name["offload"].seconds <= 3.7
    assert 1.9 <= by_name["offload_delayed"].seconds <= 2.8
    assert by_name["layerwise"].seconds <= 0.85 * by_name["offload"].seconds
    assert by_name["lsp"].slowdown <= 1.02
    exact = predict(workstation(bandwidth), LLAMA, "lsp", Setting(2048, wire="float32"))
    assert 1.305 <= exact.seconds <= 1.325
    np.testing.assert_allclose(exact.seconds, exact.formula)


def test_native_update_on_the_device():
    machine = workstation(16e9, device_adam=LLAMA_BLOCK.trained / 1e-3)
    np.testing.assert_allclose(predict(machine, LLAMA, "native").seconds, 32 * 0.0413)


def test_wire_bytes():
    full = 32 * LLAMA_BLOCK.trained
    core = 32 * 7 * 2048**2
    machine = workstation(16e9)
    for schedule, wire, expected in [
        ("native", "bfloat16", 0),
        ("offload", "bfloat16", 2 * full),
        ("layerwise", "float32", 4 * full),
        ("lsp", "bfloat16", 2 * core),
        ("lsp_serial", "float32", 4 * core),
    ]:
        prediction = predict(machine, LLAMA, schedule, Setting(2048, wire=wire))
        assert prediction.bytes_to_host == prediction.bytes_to_device == expected
        moved = summarize(
            predicted_timeline(machine, LLAMA, schedule, prediction.setting, steps=3)
        ).steps[1]
        assert moved.bytes_to_host == moved.bytes_to_device == expected
    both_ways = 2 * predict(machine, LLAMA, "lsp", Setting(2048)).bytes_to_host
    assert both_ways / LLAMA.model_bytes <= 0.30


def test_lane_times_by_hand():
    """Two kernels (8, 8) and (8, 16) at fraction 0.5: cores (4, 4) and (4, 8); 5 tokens, nnz 2."""
    times = lane_times(MACHINE, SMALL, "lsp", Setting(0.5, nnz=2, wire="float32"))
    products = 2 * 5 * (64 + 128)
    np.testing.assert_allclose(times.forward, products / 1e5)
    np.testing.assert_allclose(times.backward, (2 * products + 2 * 5 * (16 + 32)) / 1e5)
    np.testing.assert_allclose(times.compress, 5 * 2 * (16 + 24) / 1e4)
    np.testing.assert_allclose(times.apply, 2 * (8 * (4 + 8) + 8 * (8 + 16)) / 1e5)
    np.testing.assert_allclose(times.d2h, 0.01 + 4 * 48 / 1e3)
    np.testing.assert_allclose(times.h2d, 0.01 + 4 * 48 / 2e3)
    np.testing.assert_allclose(times.host, 48 / 1e4)
    full = lane_times(MACHINE, SMALL, "layerwise", Setting(wire="float32"))
    np.testing.assert_allclose(full.backward, 3 * products / 1e5)
    np.testing.assert_allclose(full.host, 192 / 1e4)
    np.testing.assert_allclose(full.compress, 0)
    cached = lane_times(MACHINE, SMALL, "lsp", Setting(0.5, nnz=2, cached=True))
    np.testing.assert_allclose(cached.compress, 2 * 5 * (8 * 4 + 8 * 4 + 8 * 4 + 16 * 8) / 1e5)
    lifts = 8 * 4 * 4 + 8 * 4 * 8 + 8 * 4 * 8 + 8 * 8 * 16
    np.testing.assert_allclose(cached.apply, 2 * lifts / 1e5)


def test_measured_seconds_replace_the_flop_rate():
    machine = dataclasses.replace(MACHINE, forward_seconds=[0.1, 0.2, 0.3], backward_seconds=0.5)
    times = lane_times(machine, SMALL, "lsp", Setting(4))
    assert times.forward.tolist() == [0.1, 0.2, 0.3]
    assert times.backward.tolist() == [0.5] * 3
    short = dataclasses.replace(machine, forward_seconds=[0.1, 0.2])
    with pytest.raises(ConfigError, match="2 blocks were given for a model of 3"):
        lane_times(short, SMALL, "lsp", Setting(4))


def test_what_is_trained_outside_the_blocks_is_one_more_block():
    work = dataclasses.replace(SMALL, outside=BlockShape((), host=100), embed_seconds=0.125)
    times = lane_times(MACHINE, work, "lsp", Setting(4, wire="float32"))
    assert times.blocks == 4 and times.embed == 0.0
    assert (times.forward[0], times.backward[0]) == (0.125, 0.0)
    np.testing.assert_allclose(times.d2h[0], 0.01 + 4 * 100 / 1e3)
    timeline = predicted_timeline(MACHINE, work, "lsp", Setting(4, wire="float32"), steps=4)
    assert {s.block for s in timeline.spans if s.name == "download"} == {-1, 0, 1, 2}
    prediction = predict(MACHINE, work, "lsp", Setting(4, wire="float32"))
    assert prediction.bytes_to_host == 4 * (100 + 3 * 32)


@pytest.mark.parametrize("cached", [False, True])
def test_projector_bytes_are_those_of_projectors(cached):
    for d, size, nnz in [(48, 16, 4), (300, 200, 4), (70, 70, 1)]:
        projector = make_projector(0, d, size, nnz)
        expected = projector.nbytes + cached * d * size * 4
        assert projector_bytes(d, size, Setting(size, nnz, cached=cached)) == expected
    assert jax.tree.leaves(projector)


def test_memory_by_hand():
    work = dataclasses.replace(
        SMALL, outside=BlockShape((), device=10, frozen=90), rounding_bytes=2, workspace=1000
    )
    native = predict(MACHINE, work, "native")
    parameters = 2 * (3 * 196 + 100)
    assert native.device["parameters"] == parameters + 2 * (3 * 192 + 10)
    assert native.device["moments"] == 8 * (3 * 192 + 10)
    assert native.device["gradients"] == 4 * 192
    assert native.device["activations"] == 2 * 5 * (3 * 8 + (8 + 8 + 8 + 16))
    assert native.device["workspace"] == 1000
    assert native.host_bytes == 0
    lsp = predict(MACHINE, work, "lsp", Setting(4, nnz=2))
    assert lsp.device["moments"] == 8 * 10
    assert lsp.host["moments"] == 8 * 3 * 32
    assert lsp.device["gradients"] == 4 * 192  # one block's in a fit
    assert lsp.device["projectors"] == 3 * (
        3 * projector_bytes(8, 4, Setting(4, nnz=2)) + projector_bytes(16, 4, Setting(4, nnz=2))
    )
    assert lsp.device_bytes == sum(lsp.device.values())
    several = predict(MACHINE, dataclasses.replace(work, micro_batches=2), "lsp", Setting(4, nnz=2))
    assert several.device["gradients"] == max(4 * (3 * 32 + 10), 4 * 192)


def test_what_waits_in_the_queues_counts_as_memory():
    setting = Setting(4, wire="float32")
    slow = dataclasses.replace(MACHINE, to_host=1.0, latency=0.0)
    assert predict(slow, SMALL, "lsp", setting).device["in_flight"] == 3 * 4 * 32
    quick = dataclasses.replace(MACHINE, to_host=1e9, to_device=1e9, latency=0.0, apply_rate=None)
    # Gradients leave at once, and updates are applied when the backward pass is over.
    timeline = predicted_timeline(quick, SMALL, "lsp", setting)
    down = [(("device", "backward"), ("d2h", "download"))]
    up = [(("h2d", "upload"), ("device", "apply"))]
    sizes = {block: 4 * 32 for block in range(3)}
    assert peak_alive(timeline, down, sizes) == 4 * 32
    assert peak_alive(timeline, up, sizes) == 2 * 4 * 32
    assert predict(quick, SMALL, "lsp", setting).device["in_flight"] == 3 * 4 * 32
    assert predict(quick, SMALL, "lsp", setting).host["in_flight"] == 2 * 4 * 32


def test_peak_alive_counts_bytes_between_two_stages():
    ways = [(("device", "backward"), ("d2h", "download"))]
    spans = [Span("device", 0, b, "backward", 2.0 - b, 3.0 - b) for b in (2, 1, 0)]
    spans += [Span("d2h", 0, b, "download", 9.0 - b, 10.0 - b) for b in (2, 1, 0)]
    assert peak_alive(Timeline(spans), ways, {0: 1, 1: 10, 2: 100}) == 111
    spans[-1] = Span("d2h", 0, 0, "download", 3.0, 4.0)
    spans[-2] = Span("d2h", 0, 1, "download", 2.0, 2.5)
    assert peak_alive(Timeline(spans), ways, {0: 1, 1: 10, 2: 100}) == 110
    assert peak_alive(Timeline(), ways, {}) == 0


def test_bad_figures_are_refused():
    with pytest.raises(ConfigError, match="`to_host` is 0"):
        Hardware(0, 1, 1, flops=1)
    with pytest.raises(ConfigError, match="Neither `flops`"):
        Hardware(1, 1, 1, forward_seconds=1.0)
    with pytest.raises(ConfigError, match="no floating-point dtype"):
        Setting(4, wire="int8")
    with pytest.raises(ConfigError, match="0 blocks"):
        Workload((), tokens=1)
    with pytest.raises(ProjectorError, match="from 1 to 8"):
        predict(MACHINE, SMALL, "lsp", Setting(9))
    with pytest.raises(ProjectorError, match="nnz is 4"):
        predict(MACHINE, SMALL, "lsp", Setting(2, nnz=4))
    with pytest.raises(ConfigError, match="give it"):
        machine = dataclasses.replace(MACHINE, flops=None, forward_seconds=1, backward_seconds=1)
        predict(machine, SMALL, "lsp", Setting(4, cached=True))
    with pytest.raises(ConfigError, match="'zero' is unknown"):
        predict(MACHINE, SMALL, "zero")
