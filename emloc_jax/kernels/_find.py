"""Discovery: which leaves of a parameter tree are kernels, asked of the model itself."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from flax import linen as nn
from flax import struct
from flax.core import meta

from emloc_jax.kernels._box import Box, is_leaf, peel
from emloc_jax.kernels._handlers import handler_for, kernel_names
from emloc_jax.kernels._layout import Layout
from emloc_jax.kernels._materialize import materialize
from emloc_jax.kernels._paths import flatten_leaves, set_leaves

__all__ = ["KernelSpec", "find_kernels"]


@dataclasses.dataclass(frozen=True)
class KernelSpec:
    """What discovery learnt about one kernel.

    Attributes:
      path: '/'-joined path of the leaf.
      module_type: class name of the module that owns it.
      handler: name of the handler, or None when the kernel only works by unboxing (slow path).
      reason: why there is no handler; empty otherwise.
      layout: axes of the kernel. Without a handler: last axis out, the others in.
      stack_shape: leading axes added by `nn.scan` or `nn.vmap`.
      in_shape, out_shape: canonical input and output axes.
      dtype: dtype of the stored array.
      input_group: path of the first kernel that reads the very same input (itself if none does);
        members share one second moment.
      tied: whether an embedding is used both as lookup table and as head.
    """

    path: str
    module_type: str
    handler: str | None
    reason: str
    layout: Layout
    stack_shape: tuple[int, ...]
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: Any
    input_group: str
    tied: bool = False

    @property
    def d_in(self) -> int:
        """Size of an input row."""
        return math.prod(self.in_shape)

    @property
    def d_out(self) -> int:
        """Size of an output row."""
        return math.prod(self.out_shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stored array."""
        canonical = np.empty(self.in_shape + self.out_shape, np.bool_)
        return self.stack_shape + self.layout.from_canonical(canonical).shape


@struct.dataclass
class _Probe(Box):
    """Passes its value through and tells the recorder, by path, who read it."""

    fast: ClassVar[bool] = False  # so that an intercepted `apply` can be asked, too

    value: Any
    path: str = struct.field(pytree_node=False, default="")
    recorder: Any = struct.field(pytree_node=False, default=None)

    def unbox(self) -> Any:
        return self.value

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "_Probe":
        if index != 0:
            self.recorder.odd_axes.add(self.path)
        return super().remove_axis(index, params)


class _Recorder:
    """What the interceptor saw; compared by identity, so it may sit in a treedef."""

    def __init__(self):
        self.uses: dict[
            str, Any
        ] = {}  # path -> (module type, handler, reason, layout, inner shape)
        self.inputs: dict[str, list[Any]] = {}  # path -> inputs seen, kept alive so ids stay unique
        self.lookups: set[str] = set()
        self.odd_axes: set[str] = set()

    def __call__(self, next_fn: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if module.scope is not None and context.method_name != "setup":
            self._see(module, context.method_name, args, kwargs)
        return next_fn(*args, **kwargs)

    def _see(self, module: nn.Module, method: str, args: Any, kwargs: Any) -> None:
        assert module.scope is not None
        own = module.scope.variables().get("params", {})
        probes = {name: p for name, p in own.items() if isinstance(p, _Probe)}
        handler, name = handler_for(type(module), method), kernel_names(type(module))
        if handler is not None and name in probes:
            probe = probes.pop(name)
            self._see_kernel(module, probe, handler, args, kwargs)
        if name is not None:
            return  # What else a handled module owns is its bias.
        for probe in probes.values():
            shape = meta.unbox(probe.value).shape
            if len(shape) >= 2 and probe.path not in self.uses:
                reason = "no handler is registered for this module type."
                layout = Layout(num_in=len(shape) - 1)
                self.uses[probe.path] = (type(module).__name__, None, reason, layout, shape)

    def _see_kernel(self, module: Any, probe: _Probe, handler: Any, args: Any, kwargs: Any) -> None:
        use = handler(module, args, kwargs)
        kind, shape = type(module).__name__, meta.unbox(probe.value).shape
        if isinstance(use, str):
            layout = Layout(num_in=len(shape) - 1)
            self.uses[probe.path] = (kind, None, use, layout, shape)
        elif use.rows is None:
            self.lookups.add(probe.path)
        else:
            self.uses[probe.path] = (kind, kind, "", use.layout, shape)
            key = None if use.input_key is None else (id(use.inputs), use.input_key)
            self.inputs.setdefault(probe.path, []).append((key, use.inputs))


def find_kernels(
    apply: Callable[..., Any], params: Mapping[str, Any], *args: Any, **kwargs: Any
) -> dict[str, KernelSpec]:
    """Lists the kernels that `apply({"params": params}, *args, **kwargs)` uses, in tree order.

    Traces the model once on abstract values; nothing is computed. A lookup table that is never
    used as a head is not a kernel; neither is a parameter with fewer than two axes.

    Args:
      apply: `model.apply` of a linen module (arrays, or shapes with dtypes, are fine as arguments).
      params: parameter tree; boxed kernels are seen as the arrays they stand for.
      *args: what the model is called on.
      **kwargs: likewise.

    Returns:
      `{path: KernelSpec}`; kernels whose module has no handler come with `handler=None`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> model, x = nn.Dense(3), jnp.ones((1, 2))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> spec = find_kernels(model.apply, params, x)["kernel"]
      >>> spec.handler, spec.d_in, spec.d_out, spec.stack_shape
      ('Dense', 2, 3, ())
    """
    recorder = _Recorder()

    def trace(params: Any, args: Any, kwargs: Any) -> Any:
        params = materialize(params)
        flat = flatten_leaves(params)
        probes = {path: _Probe(leaf, path, recorder) for path, leaf in flat.items()}
        with nn.intercept_methods(recorder):
            return apply({"params": set_leaves(params, probes)}, *args, **kwargs)

    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_leaf)
    dynamic = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")]

    def trace_arrays(params: Any, arrays: Any) -> Any:
        filled = list(leaves)
        for i, array in zip(dynamic, arrays, strict=True):
            filled[i] = array
        return trace(params, *jax.tree.unflatten(treedef, filled))

    jax.eval_shape(trace_arrays, params, [leaves[i] for i in dynamic])
    return _specs(recorder, jax.eval_shape(materialize, params))


def _specs(recorder: _Recorder, params: Any) -> dict[str, KernelSpec]:
    groups: dict[Any, str] = {}
    specs = {}
    for path, leaf in flatten_leaves(params).items():
        if path not in recorder.uses:
            continue
        kind, handler, reason, layout, inner = recorder.uses[path]
        array = peel(leaf)
        stack = array.shape[: len(array.shape) - len(inner)]
        if path in recorder.odd_axes or stack + tuple(inner) != array.shape:
            handler, reason = None, "its layers are not stacked on the leading axis."
        key = (stack, tuple(key for key, _ in recorder.inputs.get(path, [(None, None)])))
        alone = handler is None or None in key[1]
        specs[path] = KernelSpec(
            path=path,
            module_type=kind,
            handler=handler,
            reason=reason,
            layout=layout,
            stack_shape=stack,
            in_shape=layout.in_shape(inner),
            out_shape=layout.out_shape(inner),
            dtype=array.dtype,
            input_group=path if alone else groups.setdefault(key, path),
            tied=path in recorder.lookups,
        )
    return specs
