"""Rotary frequencies against transformers, and the rotation against complex numbers."""

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from emloc_jax.models.rope import RopeScaling, apply_rope, rope_frequencies, rope_tables


@pytest.mark.parametrize(
    "theta, scaling, hf",
    [
        (1e5, RopeScaling("linear", 4.0), dict(rope_type="linear", factor=4.0)),
        (
            5e5,
            RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
            dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                 original_max_position_embeddings=8192),
        ),
    ],
)  # fmt: skip
def test_scaled_frequencies_are_those_of_transformers(theta, scaling, hf):
    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=1, rope_parameters={"rope_theta": theta, **hf}
    )
    expected, _ = ROPE_INIT_FUNCTIONS[hf["rope_type"]](config)
    ours = rope_frequencies(128, theta, scaling)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-6)
    assert ours.dtype == np.float32


def test_rotation_is_multiplication_by_a_unit_complex_number():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 8))
    positions = rng.integers(0, 40, (2, 5))
    angles = positions[..., None, None] * 100.0 ** (-np.arange(0, 8, 2) / 8)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    tables = rope_tables(rope_frequencies(8, 100.0), jnp.asarray(positions))
    ours = apply_rope(jnp.asarray(x, jnp.float32), *tables)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_angles_stay_fp32_under_bf16():
    """At position 4001 a bf16 angle would be off by up to 8 radians."""
    x = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    turned = apply_rope(x, *rope_tables(rope_frequencies(2, 1e4), jnp.full((1, 1), 4001)))
    expected = [np.cos(4001) - np.sin(4001), np.cos(4001) + np.sin(4001)]
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_allclose(turned[0, 0, 0].astype(jnp.float32), expected, atol=1e-2)
