"""The `emloc` command line."""

from emloc_jax.cli._main import main as main
