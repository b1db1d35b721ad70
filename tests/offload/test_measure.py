import jax.numpy as jnp
import numpy as np
import pytest

from emloc_jax.offload._link import SimulatedLink
from emloc_jax.offload._measure import measure_hardware


def slow_adam(gradient):
    import time

    time.sleep(0.02)
    return gradient


def measured(**options):
    sizes = {"nbytes": 1 << 21, "elements": 1 << 10, "width": 32, "repeats": 2}
    link = SimulatedLink(2e7, latency=0.02)
    return measure_hardware(link, slow_adam, dtype=jnp.float32, **(sizes | options))


def test_a_simulated_link_is_measured_as_it_was_set():
    hardware = measured()
    np.testing.assert_allclose(hardware.to_host, 2e7, rtol=0.2)
    np.testing.assert_allclose(hardware.to_device, 2e7, rtol=0.2)
    np.testing.assert_allclose(hardware.latency, 0.02, atol=0.02)
    assert 0.5 * (1 << 10) / 0.02 < hardware.host_adam <= (1 << 10) / 0.02
    assert hardware.flops > 0 and hardware.compress_rate > 0 and hardware.apply_rate > 0
    assert hardware.host_memory > 1 << 20


def test_given_figures_replace_measured_ones():
    hardware = measured(nbytes=1 << 12, host_memory=123, forward_seconds=0.5)
    assert (hardware.host_memory, hardware.forward_seconds) == (123, 0.5)
    with pytest.raises(TypeError):
        measured(nbytes=1 << 12, no_such_figure=1)
