import numpy as np
import pytest

from tests.checkpoints.tiny import save_tiny


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(3, 48, (2, 11))


@pytest.fixture
def llama_folder(tmp_path):
    """A tiny untied llama of our own for each test to spoil."""
    save_tiny(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def sharded_folder(tmp_path):
    save_tiny(tmp_path / "base", shard="4KB")
    return tmp_path / "base"
