"""Parameter trees seen as flat dictionaries of paths."""

from collections.abc import Mapping
from typing import Any

import jax

from emloc_jax.kernels._box import is_leaf

__all__ = ["flatten_leaves", "get_leaf", "set_leaves"]


def flatten_leaves(params: Mapping[str, Any]) -> dict[str, Any]:
    """Maps each '/'-joined path to its leaf; a boxed kernel counts as one leaf.

    Example:
      >>> flatten_leaves({"head": {"kernel": 1, "bias": 2}})
      {'head/bias': 2, 'head/kernel': 1}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)
    return {"/".join(_key_name(key) for key in path): leaf for path, leaf in leaves}


def get_leaf(params: Mapping[str, Any], path: str) -> Any:
    """The leaf (or subtree) at `path`.

    Raises:
      KeyError: there is nothing at `path`.
    """
    node: Any = params
    for key in path.split("/"):
        if not isinstance(node, Mapping) or key not in node:
            raise KeyError(f"No parameter at '{path}': '{key}' is missing.")
        node = node[key]
    return node


def set_leaves(params: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `params` with the leaves at the given paths replaced; nothing else is copied.

    Raises:
      KeyError: a path does not exist.

    Example:
      >>> set_leaves({"head": {"kernel": 1, "bias": 2}}, {"head/kernel": 7})
      {'head': {'kernel': 7, 'bias': 2}}
    """
    result = dict(params)
    copied: set[tuple[str, ...]] = {()}  # Branches that are already copies of ours.
    for path, leaf in leaves.items():
        *branch, name = path.split("/")
        get_leaf(params, path)
        node: Any = result
        for depth, key in enumerate(branch, start=1):
            if tuple(branch[:depth]) not in copied:
                node[key] = dict(node[key])
                copied.add(tuple(branch[:depth]))
            node = node[key]
        node[name] = leaf
    return result


def _key_name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))
