"""The ledger against what a stage is known to do, and against other counters of the system."""

import json
import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.memory import Ledger, Peak, Reading, _ledger, _ledger_device, _resident, peak_between

MIB = 2**20


class Allocator:
    """A device whose counters are those of an allocator that we drive."""

    def __init__(self):
        self.now = self.peak = 0

    def take(self, count):
        self.now += count
        self.peak = max(self.peak, self.now)

    def readings(self):
        return (Reading(self.now, self.peak),)


@pytest.fixture
def allocator(monkeypatch):
    made = Allocator()
    monkeypatch.setattr(_ledger, "device_readings", made.readings)
    return made


def test_bounds_contain_the_true_peak_and_say_when_they_are_it():
    random = np.random.default_rng(0)
    for _ in range(200):
        use = np.abs(np.cumsum(random.integers(-5, 6, size=30)))
        peaks = np.maximum.accumulate(use)
        first, last = sorted(random.choice(30, size=2, replace=False))
        found = peak_between(
            Reading(int(use[first]), int(peaks[first])), Reading(int(use[last]), int(peaks[last]))
        )
        true = use[first : last + 1].max()
        assert found.at_least <= true <= found.at_most
        if peaks[last] > peaks[first]:
            assert found.exact and found.at_most == true


def test_a_stage_below_an_earlier_peak_is_given_bounds(allocator):
    ledger = Ledger()
    with ledger.stage("high"):
        allocator.take(100)
        allocator.take(-90)
    with ledger.stage("low"):
        allocator.take(20)
    with ledger.stage("higher"):
        allocator.take(200)
    high, low, higher = (row.device_peak for row in ledger.rows)
    assert (high, low, higher) == (Peak(100, 100), Peak(30, 100), Peak(230, 230))
    device = next(c for c in ledger.table().columns if c.header == "device")
    assert list(device.cells) == ["100 B", "<= 100 B", "230 B"]


def test_visits_join(allocator, tmp_path):
    ledger = Ledger(tmp_path)
    for visit, count in enumerate((70, 10)):
        with ledger.stage("evaluation", predicted=count):
            allocator.take(count)
            (tmp_path / f"answers_{visit}.json").write_bytes(bytes(count))
    (row,) = ledger.rows
    assert (row.visits, row.predicted_bytes, row.left_bytes) == (2, 70, 80)
    assert row.device_peak == Peak(80, 80)


def test_files_that_stay_are_counted_to_the_byte(tmp_path):
    (tmp_path / "log").write_bytes(bytes(10))
    (tmp_path / "old").write_bytes(bytes(50))
    ledger = Ledger(tmp_path)
    with ledger.stage("training"):
        with (tmp_path / "log").open("ab") as log:
            log.write(bytes(7))
        fresh = tmp_path / "fresh"
        fresh.write_bytes(bytes(30))
        fresh.rename(tmp_path / "old")  # replaced, and smaller than before
        (tmp_path / "checkpoints" / "1").mkdir(parents=True)
        (tmp_path / "checkpoints" / "1" / "weights").write_bytes(bytes(1000))
        (tmp_path / "scratch").write_bytes(bytes(500))
        (tmp_path / "scratch").unlink()
    assert ledger.rows[0].left_bytes == 7 + 30 + 1000


@pytest.mark.skipif(not _resident.reset_resident_peak(), reason="the peak cannot start anew here")
def test_the_resident_peak_is_of_the_stage_alone():
    ledger = Ledger()
    with ledger.stage("outer"):
        with ledger.stage("much"):
            block = np.ones(64 * MIB, np.uint8)
            del block
        with ledger.stage("little"):
            pass
    much, little, outer = ledger.rows
    for row in ledger.rows:
        assert row.resident_peak.at_most - row.resident_peak.at_least < MIB
    grown = much.resident_peak.at_least - little.resident_peak.at_most
    assert 60 * MIB < grown < 80 * MIB
    assert outer.resident_peak.at_least >= much.resident_peak.at_least
    # Another counter of the same thing: what is resident now, in pages.
    pages = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    assert abs(pages - little.resident_after_bytes) < 16 * MIB


def test_what_the_machine_does_not_tell_is_not_measured(tmp_path, monkeypatch):
    nowhere = tmp_path / "nowhere"
    for name in ("_STATUS", "_CLEAR"):
        monkeypatch.setattr(_resident, name, nowhere / name)
    monkeypatch.setattr("emloc_jax.memory._ledger_files._IO", nowhere / "io")
    monkeypatch.setattr(resource, "getrusage", refuse)
    monkeypatch.setattr(jax, "live_arrays", refuse)
    monkeypatch.setattr(_ledger_device.jax, "local_devices", lambda: [Mute()])
    ledger = Ledger()
    with ledger.stage("training"):
        pass
    (row,) = json.loads(json.dumps(ledger.to_dict()))["stages"]
    measured = {"stage", "visits", "seconds"}
    assert {name for name, value in row.items() if value is not None} == measured
    table = ledger.table()
    assert [column.header for column in table.columns] == ["stage", "seconds", "predicted"]
    assert table.caption == "not measured here: device, pinned, resident, written"


def refuse(*args):
    raise OSError("not here")


class Mute:
    def memory_stats(self):
        raise NotImplementedError


def test_without_a_reset_the_peak_is_the_start_s(monkeypatch):
    monkeypatch.setattr(_ledger, "reset_resident_peak", lambda: False)
    used = iter([Reading(None, 10)] * 3 + [Reading(None, 30)])
    monkeypatch.setattr(_ledger, "resident_reading", lambda: next(used))
    ledger = Ledger()
    with ledger.stage("training"):
        pass
    assert ledger.rows[0].resident_peak == Peak(30, 30)
    assert "since the start" in ledger.to_dict()["sources"]["resident_peak"]


def test_an_error_goes_through_and_its_stage_is_there():
    ledger = Ledger()
    with pytest.raises(KeyError, match="mine"), ledger.stage("training"):
        raise KeyError("mine")
    assert [row.stage for row in ledger.rows] == ["training"]


def test_pinned_arrays_are_seen():
    kind = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    ledger = Ledger()
    with ledger.stage("before"):
        pass
    with ledger.stage("spill"):
        kept = jax.device_put(jnp.ones((3, MIB), jnp.bfloat16), kind)
    before, spill = (row.pinned_host_bytes for row in ledger.rows)
    assert spill - before == kept.nbytes == 6 * MIB
