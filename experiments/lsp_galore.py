"""GaLore (Zhao et al., arXiv 2403.03507) from Optax, for models whose layers are scanned."""

import jax
import optax
from optax.contrib import scale_by_galore

GALORE = {"rank": 128, "update_proj_gap": 200, "scale": 0.25}


def galore(params, kernels):
    """GaLore for the kernels of scanned layers, one layer at a time; Adam for the rest."""
    inner = scale_by_galore(**GALORE)
    scanned = {path for path, spec in kernels.items() if spec.stack_shape}

    def axes(state):
        return state._replace(
            count=None,
            projector=0,
            base_optimizer_state=jax.tree.map(lambda _: 0, state.base_optimizer_state),
        )

    def init(leaf):
        return jax.vmap(inner.init, out_axes=axes(jax.eval_shape(inner.init, leaf[0])))(leaf)

    def update(updates, state, params=None):
        del params
        fixed = axes(state)
        return jax.vmap(inner.update, (0, fixed), (0, fixed))(updates, state)

    def kind(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return "kernels" if name in scanned else "rest"

    layers = each_leaf(optax.GradientTransformation(init, update))
    return optax.partition(
        {"kernels": layers, "rest": optax.scale_by_adam()},
        jax.tree.map_with_path(kind, params),
    )


def each_leaf(tx):
    """Every leaf with a state of its own."""

    def init(params):
        return [tx.init(leaf) for leaf in jax.tree.leaves(params)]

    def update(updates, state, params=None):
        del params
        leaves, treedef = jax.tree.flatten(updates)
        done = [tx.update(leaf, own) for leaf, own in zip(leaves, state, strict=True)]
        return treedef.unflatten([u for u, _ in done]), [s for _, s in done]

    return optax.GradientTransformation(init, update)
