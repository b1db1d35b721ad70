"""The same verbs for Flax NNX models: a functional view of a module whose kernels may be boxed."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from flax import linen as nn
from flax import nnx
from flax.core import meta
from flax.nnx.nn import dtypes
from flax.traverse_util import unflatten_dict

from emloc_jax.errors import ConfigError
from emloc_jax.kernels import flatten_leaves, is_box

__all__ = ["functional", "with_params"]

Module = TypeVar("Module", bound=nnx.Module)


def functional(model: nnx.Module) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A pure `apply` and a parameter tree, with which all of this library works as for linen.

    `apply({"params": params}, *args, **kwargs)` is `model(*args, **kwargs)` with these parameters;
    `method="encode"` calls another method. Layers of exactly the types `nnx.Linear`,
    `LinearGeneral`, `Einsum`, `Conv` and `Embed` compute as their linen namesakes do, which is how
    boxed kernels reach them; `find_kernels` lists any other kernel with the reason why it has no
    fast path. The model itself is not changed, and shares its arrays with what is returned.

    Variables that are not parameters (batch statistics, random streams) have the values of this
    moment in every call, and what a call changes in them is dropped. Switch dropout off with
    `model.eval()` before, or hand `rngs` to a model that takes them.

    Args:
      model: any NNX module whose layers are not stacked by `nnx.vmap` or `nnx.scan`.

    Returns:
      `apply`, and the parameters as nested dicts of arrays, all keys strings.

    Example:
      >>> import jax.numpy as jnp
      >>> from emloc_jax.kernels import find_kernels
      >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> apply, params = functional(model)
      >>> find_kernels(apply, params, jnp.ones((1, 3)))["kernel"].handler
      'Dense'
    """
    twin = nnx.merge(*nnx.split(model))  # other modules, the same arrays
    handled = set(_use_linen_layers(twin))
    graph, state, rest = nnx.split(twin, nnx.Param, ...)
    flat = [(path, variable) for path, variable in nnx.to_flat_state(state)]
    params = unflatten_dict({_key(path): v.get_raw_value() for path, v in flat})
    # The closure must not keep alive what the caller lets go.
    slots = [(path, v.replace(jax.eval_shape(lambda x: x, v.get_raw_value()))) for path, v in flat]

    def apply(
        variables: Mapping[str, Any], *args: Any, method: str | None = None, **kwargs: Any
    ) -> Any:
        given = _values(slots, variables["params"])
        others = {path: value for path, value in given.items() if path not in handled}
        # Interception sees matrices; a box around anything smaller (discovery's) is taken off.
        matrices = {path: x for path, x in others.items() if len(meta.unbox(x).shape) >= 2}
        shown = {"/".join(_key(path)): x for path, x in matrices.items()}
        read: Any = NnxParameters().apply({"params": shown}) if shown else {}
        filled = []
        for path, slot in slots:
            value = given[path]
            if path in matrices:
                value = read["/".join(_key(path))]
            elif path in others:
                value = meta.unbox(value)
            filled.append((path, slot.replace(value)))
        module = nnx.merge(graph, nnx.from_flat_state(filled), rest)
        return (module if method is None else getattr(module, method))(*args, **kwargs)

    return apply, params


def with_params(model: Module, params: Mapping[str, Any]) -> Module:
    """A module like `model` with other parameters, merged ones say; `model` is not changed.

    Args:
      model: the module that `functional` was given.
      params: arrays, in the tree that `functional` returned.

    Returns:
      A new module; it shares everything else with `model`.

    Raises:
      ConfigError: a parameter is missing or unknown, has another shape, or is boxed.

    Example:
      >>> import jax.numpy as jnp
      >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> _, params = functional(model)
      >>> doubled = with_params(model, {**params, "kernel": 2 * params["kernel"]})
      >>> bool(jnp.all(doubled.kernel[...] == 2 * model.kernel[...]))
      True
    """
    boxed = [path for path, leaf in flatten_leaves(params).items() if is_box(leaf)]
    if boxed:
        raise ConfigError(
            f"A module cannot hold the boxed kernels {boxed}; use merge(params, adapters) or "
            "materialize(params) first."
        )
    graph, state, rest = nnx.split(model, nnx.Param, ...)
    slots = [(path, variable) for path, variable in nnx.to_flat_state(state)]
    given = _values(slots, params)
    for path, slot in slots:
        if slot.get_raw_value().shape != given[path].shape:
            raise ConfigError(
                f"Parameter '{'/'.join(_key(path))}' has shape {given[path].shape}; the module's "
                f"is {slot.get_raw_value().shape}."
            )
    filled = [(path, slot.replace(given[path])) for path, slot in slots]
    return nnx.merge(graph, nnx.from_flat_state(filled), rest)


def _key(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(part) for part in path)


def _values(slots: list[Any], params: Mapping[str, Any]) -> dict[tuple[Any, ...], Any]:
    """The value of each parameter by its path in the module."""
    leaves = flatten_leaves(params)
    paths = {"/".join(_key(path)): path for path, _ in slots}
    if leaves.keys() != paths.keys():
        raise ConfigError(
            "These are not the parameters of this module: missing are "
            f"{sorted(paths.keys() - leaves.keys())}, unknown "
            f"{sorted(leaves.keys() - paths.keys())}. Use the tree that `functional` returned."
        )
    return {paths[name]: leaf for name, leaf in leaves.items()}


class NnxParameters(nn.Module):
    """Parameters that layers without a linen namesake read: shown to interception, unboxed."""

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        """All of them by path."""
        assert self.scope is not None
        return {name: meta.unbox(value) for name, value in self.scope.variables()["params"].items()}


def _use_linen_layers(model: nnx.Module) -> Iterator[tuple[Any, ...]]:
    """Gives every layer with a linen namesake a class that computes by it; yields its
    parameters' paths."""
    for path, layer in nnx.iter_graph(model):
        kind = _TWINS.get(type(layer))
        if kind is not None and _is_usual(layer):
            layer.__class__ = kind
            yield from ((*path, name) for name in ("embedding", "kernel", "bias"))


def _is_usual(layer: Any) -> bool:
    """Whether a layer has no arithmetic of its own, and what linen's namesake can express."""
    usual = {
        "promote_dtype": (dtypes.promote_dtype,),
        "preferred_element_type": (None,),
        "dot_general": (None, jax.lax.dot_general),
        "dot_general_cls": (None,),
        "batch_axis": ({},),
        "bias_shape": (None,),
        "einsum_op": (jax.numpy.einsum,),
        "conv_general_dilated": (jax.lax.conv_general_dilated,),
        "mask": (None,),
    }
    return all(
        any(getattr(layer, name) is good or getattr(layer, name) == good for good in allowed)
        for name, allowed in usual.items()
        if hasattr(layer, name)
    )


def _run(
    namesake: nn.Module, layer: Any, *args: Any, sharding: Any, method: str | None = None
) -> Any:
    """The linen module on the parameters of the layer, boxed or not."""
    if sharding is not None:
        raise ConfigError(
            f"A {type(namesake).__name__} was called with out_sharding={sharding}; a boxed kernel "
            "has no such option. Constrain what the layer returns instead."
        )
    held = {name: getattr(layer, name, None) for name in ("kernel", "bias", "embedding")}
    params = {name: v.get_raw_value() for name, v in held.items() if isinstance(v, nnx.Variable)}
    return namesake.apply({"params": params}, *args, method=method)


def _shared(layer: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in ("dtype", "param_dtype", *names)}


class _Linear(nnx.Linear):
    def __call__(self, inputs: Any, out_sharding: Any = None) -> Any:
        options = _shared(self, "use_bias", "precision")
        return _run(nn.Dense(self.out_features, **options), self, inputs, sharding=out_sharding)


class _LinearGeneral(nnx.LinearGeneral):
    def __call__(self, inputs: Any, out_sharding: Any = None) -> Any:
        options = _shared(self, "use_bias", "precision", "axis")
        return _run(
            nn.DenseGeneral(self.out_features, **options), self, inputs, sharding=out_sharding
        )


class _Einsum(nnx.Einsum):
    def __call__(self, inputs: Any, einsum_str: str | None = None, out_sharding: Any = None) -> Any:
        text = self.einsum_str if einsum_str is None else einsum_str
        options = _shared(self, "precision")
        namesake = nn.Einsum(tuple(self.kernel_shape), text, use_bias=False, **options)
        return _run(namesake, self, inputs, sharding=out_sharding)


class _Conv(nnx.Conv):
    def __call__(self, inputs: Any, out_sharding: Any = None) -> Any:
        options = _shared(
            self,
            "kernel_size",
            "strides",
            "padding",
            "input_dilation",
            "kernel_dilation",
            "feature_group_count",
            "use_bias",
            "precision",
        )
        return _run(nn.Conv(self.out_features, **options), self, inputs, sharding=out_sharding)


class _Embed(nnx.Embed):
    def _namesake(self) -> nn.Embed:
        return nn.Embed(self.num_embeddings, self.features, **_shared(self))

    def __call__(self, inputs: Any, out_sharding: Any = None) -> Any:
        return _run(self._namesake(), self, inputs, sharding=out_sharding)

    def attend(self, query: Any, out_sharding: Any = None) -> Any:
        return _run(self._namesake(), self, query, method="attend", sharding=out_sharding)


_TWINS: dict[type, type] = {
    nnx.Linear: _Linear,
    nnx.LinearGeneral: _LinearGeneral,
    nnx.Einsum: _Einsum,
    nnx.Conv: _Conv,
    nnx.Embed: _Embed,
}
