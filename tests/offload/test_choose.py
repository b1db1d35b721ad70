import dataclasses

import pytest

from emloc_jax.errors import ConfigError, PlanError
from emloc_jax.offload._choose import choose, default_sizes
from emloc_jax.offload._cost_model import Hardware, predict
from emloc_jax.offload._workload import BlockShape, Setting, Workload

BLOCK = BlockShape(((512, 512),) * 4, frozen=100)
WORK = Workload((BLOCK,) * 6, tokens=64)
MACHINE = Hardware(
    to_host=1e8,
    to_device=1e8,
    host_adam=2e7,
    forward_seconds=0.01,
    backward_seconds=0.02,
    device_adam=1e9,
)


def test_the_largest_hidden_subspace_is_chosen():
    choice = choose(MACHINE, WORK, sizes=[64, 128, 256, 512])
    fits = [
        size
        for size in (64, 128, 256, 512)
        if predict(MACHINE, WORK, "lsp", Setting(size, 8)).slowdown <= 1.10
    ]
    assert fits and fits != [64, 128, 256, 512]
    assert choice.setting == Setting(max(fits), 8, "bfloat16")
    assert choice.prediction.row() == predict(MACHINE, WORK, "lsp", choice.setting).row()


def test_every_candidate_is_reported_with_its_verdict():
    choice = choose(MACHINE, WORK, sizes=[64, 512, 1024])
    rows = choice.rows()
    assert len(rows) == 3 * 2 * 2
    assert [row["verdict"] for row in rows].count("chosen") == 1
    verdicts = {row["subspace"]: row["verdict"] for row in rows if row["verdict"] != "chosen"}
    assert verdicts[64] == "fits"
    assert "x native, above 1.10: Adam on the host takes" in verdicts[512]
    assert "from 1 to 512" in verdicts[1024]
    assert all("device_bytes" in row for row in rows if row["subspace"] != 1024)


def test_a_looser_target_allows_a_larger_subspace():
    strict, loose = (choose(MACHINE, WORK, slowdown=slow).setting for slow in (1.05, 1.5))
    assert strict.subspace < loose.subspace


def test_memory_limits_are_kept():
    free = choose(MACHINE, WORK, slowdown=100.0).prediction
    machine = dataclasses.replace(MACHINE, host_memory=free.host_bytes // 2)
    small = choose(machine, WORK, slowdown=100.0)
    assert small.prediction.host_bytes <= machine.host_memory
    assert small.setting.subspace < free.setting.subspace
    assert any("on the host, above" in row["verdict"] for row in small.rows())


def test_when_nothing_fits_the_message_says_what_must_give():
    tight = dataclasses.replace(MACHINE, device_memory=1_000_000, host_memory=1000)
    with pytest.raises(PlanError) as info:
        choose(tight, WORK)
    message = str(info.value)
    assert "the memory of the device, 0.001 GB" in message and "parameters" in message
    assert "the memory of the host" in message and "moments" in message
    slow = dataclasses.replace(MACHINE, to_host=1e4)
    with pytest.raises(PlanError, match="is fastest with .* x native; the download takes"):
        choose(slow, WORK)
    costly = dataclasses.replace(MACHINE, compress_rate=1e6)
    with pytest.raises(PlanError, match="compressing and applying take"):
        choose(costly, WORK)


def test_when_no_setting_is_possible_the_reason_is_given():
    with pytest.raises(PlanError, match="from 1 to 512"):
        choose(MACHINE, WORK, sizes=[1024])


def test_sizes_are_fractions_where_kernels_differ_much():
    grouped = Workload((BlockShape(((576, 576), (576, 192), (576, 192), (576, 1536))),), tokens=1)
    assert default_sizes(grouped)[-1] == 1.0
    assert all(isinstance(size, float) for size in default_sizes(grouped))
    assert default_sizes(WORK) == (32, 48, 64, 96, 128, 192, 256, 384, 512)


def test_nothing_to_choose_from_is_refused():
    with pytest.raises(ConfigError, match="nothing to choose from"):
        choose(MACHINE, WORK, nnz=[])
    with pytest.raises(ConfigError, match="no kernel to compress"):
        default_sizes(Workload((BlockShape((), host=3),), tokens=1))
