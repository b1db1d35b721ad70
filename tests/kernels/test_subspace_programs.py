"""What the compiled program of a compressed gradient holds, and boxes in odd places."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from emloc_jax.errors import ProjectorError, UnsupportedKernelError
from emloc_jax.kernels import (
    Layout,
    SubspaceKernel,
    TappedKernel,
    cache,
    identity_projector,
    intercept,
    make_projector,
    set_leaves,
    stack_projectors,
)

TOKENS, LAYERS = 4, 3


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


class Pair(nn.Module):
    """Two kernels of one matrix shape and its transpose."""

    d_in: int
    d_out: int

    @nn.compact
    def __call__(self, x, _=None):
        h = jnp.tanh(nn.Dense(self.d_out, name="up")(x))
        return x + nn.Dense(self.d_in, name="down")(h), None


class Stack(nn.Module):
    d_in: int
    d_out: int

    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(
            nn.remat(Pair, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        return blocks(self.d_in, self.d_out, name="layers")(x, None)[0]


def compiled(kind, d_in, d_out, size, *, cached=False):
    """The compiled gradient at the 'core's, the 'kernel's or the 'input'."""
    model, x = Stack(d_in, d_out), jnp.zeros((TOKENS, d_in))
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]

    def projector(d):
        p = stack_projectors([make_projector(i, d, size, 2) for i in range(LAYERS)])
        return cache(p) if cached else p

    def loss(differentiated, params, p, q, x):
        up, down = params["layers"]["up"]["kernel"], params["layers"]["down"]["kernel"]
        if kind == "core":
            up = SubspaceKernel(up, p, differentiated[0], q)
            down = SubspaceKernel(down, q, differentiated[1], p)
        elif kind == "kernel":
            up, down = differentiated
        else:
            x = differentiated
        boxed = set_leaves(params, {"layers/up/kernel": up, "layers/down/kernel": down})
        return jnp.sum(intercept(model.apply)({"params": boxed}, x))

    core = jax.ShapeDtypeStruct((LAYERS, size, size), jnp.float32)
    kernels = [params["layers"][name]["kernel"] for name in ("up", "down")]
    at = {"core": [core, core], "kernel": kernels, "input": x}[kind]
    gradient = jax.jit(jax.grad(loss))
    return gradient.lower(at, params, projector(d_in), projector(d_out), x).compile()


def dots(program, *shape):
    """Matrix products in the program whose result has these axes, in any order."""
    either = "|".join(",".join(map(str, axes)) for axes in (shape, shape[::-1]))
    # The kernels' own products have a TOKENS axis, gradients have none.
    return re.findall(rf"f32\[(?:{either})\]\S* (?:dot|custom-call)\(", program.as_text())


@pytest.mark.parametrize("cached", [False, True])
def test_no_product_of_the_gradients_shape_is_in_the_program(cached):
    program = compiled("core", 61, 83, 29, cached=cached)
    assert not dots(program, 61, 83)
    assert len(dots(program, 29, 29)) == 2


def test_the_search_finds_the_products_of_plain_gradients():
    assert len(dots(compiled("kernel", 61, 83, 29), 61, 83)) == 2


def used(kind, d, size):
    memory = compiled(kind, d, d, size).memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def test_memory_grows_with_the_square_of_the_subspace_only():
    small, wide, large = used("core", 128, 32), used("core", 256, 32), used("core", 128, 64)
    # A scan holds a layer's slices of the kernels, which the input's gradient needs too; six
    # gradients of a kernel would add 6 * 4 * (256^2 - 128^2) bytes.
    inputs = used("input", 256, 32) - used("input", 128, 32)
    assert wide - small - inputs < 0.1 * 4 * (256**2 - 128**2)
    cores = 4 * (64**2 - 32**2)
    assert 6 * cores <= large - small < 12 * cores


def test_residuals_are_projected_inputs_and_no_copies_of_kernels():
    many, d_in, d_out, size = 256, 96, 80, 8

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            y = nn.Dense(d_out, use_bias=False, name="up")(x)
            return jnp.pad(y, ((0, 0), (0, d_in - d_out))), None

    model = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
    kernel, x = jnp.zeros((LAYERS, d_in, d_out)), normal(0, many, d_in)
    p, q = (
        stack_projectors([make_projector(i, d, size, 2) for i in range(LAYERS)])
        for d in (d_in, d_out)
    )

    def forward(core, kernel, p, q):
        box = SubspaceKernel(kernel, p, core, q)
        return intercept(model().apply)({"params": {"up": {"kernel": box}}}, x, None)[0]

    def residuals(core, kernel, p, q):
        return jax.vjp(lambda core: forward(core, kernel, p, q), core)[1]

    core = jnp.zeros((LAYERS, size, size))
    scans = [
        equation
        for equation in jax.make_jaxpr(residuals)(core, kernel, p, q).eqns
        if equation.primitive.name == "scan"
    ]
    kept = [v.aval.shape for equation in scans for v in equation.outvars]
    assert (LAYERS, many, size) in kept  # x P
    assert (LAYERS, many, d_in) not in kept  # x
    assert kernel.shape not in kept
    assert p.values.shape not in kept and q.values.shape not in kept


@pytest.mark.parametrize("tokens", [(3, 7), (2, 16), (5,)])
def test_uncompressed_sides_and_permutations_give_the_plain_gradients(tokens):
    d_in, d_out = 37, 48
    model, x = nn.Dense(d_out), normal(0, *tokens, d_in)
    params = model.init(jax.random.key(1), x)["params"]

    def loss(kernel, params, x):
        y = intercept(model.apply)({"params": {**params, "kernel": kernel}}, x)
        return jnp.sum(jnp.sin(y))

    @jax.jit
    def compressed(core, params, x, p, q):
        box = SubspaceKernel(params["kernel"], p, core, q)
        return jax.grad(lambda c: loss(box.replace(core=c), params, x))(core)

    plain = jax.jit(jax.grad(loss))(params["kernel"], params, x)
    core = jnp.zeros((d_in, d_out))
    np.testing.assert_array_equal(compressed(core, params, x, None, None), plain)
    # With rows or columns in another order, XLA sums in another order on some processors.
    close = {"rtol": 1e-5, "atol": 1e-6}
    rows, columns = (np.random.default_rng(0).permutation(d) for d in (d_in, d_out))
    for p, q in ((None, columns), (rows, None), (rows, columns), (range(d_in), range(d_out))):
        boxes = [None if i is None else identity_projector(len(i), i) for i in (p, q)]
        got = np.asarray(compressed(core, params, x, *boxes))
        got = got if p is None else got[np.asarray(p)]
        got = got if q is None else got[:, np.asarray(q)]
        np.testing.assert_allclose(got, plain, **close)


def test_only_the_core_gets_a_gradient():
    model, x = nn.Dense(5), normal(0, 3, 6)
    params = model.init(jax.random.key(0), x)["params"]
    p, q = make_projector(0, 6, 4, 2), make_projector(1, 5, 3, 2)

    @jax.jit
    @jax.grad
    def gradients(floats):
        base, p_values, q_values, core = floats
        box = SubspaceKernel(base, p.replace(values=p_values), core, q.replace(values=q_values))
        y = intercept(model.apply)({"params": {**params, "kernel": box}}, x)
        return jnp.sum(y**2)

    base, p_values, q_values, core = gradients(
        (params["kernel"], p.values, q.values, jnp.zeros((4, 3)))
    )
    for zero in (base, p_values, q_values):
        assert not np.any(zero)
    assert np.all(np.asarray(core) != 0)


def test_a_tied_table_is_refused():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(10, 4, name="embed")
            return embed.attend(embed(ids))

    box = SubspaceKernel(
        normal(0, 10, 4), None, jnp.zeros((4, 6)), make_projector(0, 10, 6, 2), Layout(perm=(1, 0))
    )
    with pytest.raises(UnsupportedKernelError, match="'embed' looks rows up.*untie"):
        intercept(Tied().apply)({"params": {"embed": {"embedding": box}}}, jnp.arange(3))


def test_boxes_inside_metadata_and_other_boxes():
    model, x = nn.Dense(5, use_bias=False), normal(0, 3, 6)
    base, p, q = normal(1, 6, 5), make_projector(0, 6, 4, 2), make_projector(1, 5, 3, 2)

    def gradient(wrap):
        def loss(core):
            kernel = wrap(SubspaceKernel(base, p, core, q))
            return jnp.sum(intercept(model.apply)({"params": {"kernel": kernel}}, x) ** 2)

        return jax.grad(loss)(jnp.zeros((4, 3)))

    want = gradient(lambda box: box)
    partitioned = ("in", "out")
    chex.assert_trees_all_equal(gradient(lambda box: nn.Partitioned(box, ())), want)
    inner = gradient(lambda box: box.replace(base=nn.Partitioned(box.base, partitioned)))
    chex.assert_trees_all_equal(inner, want)
    tapped = gradient(lambda box: TappedKernel(box, moment=jnp.zeros((6, 6))))
    chex.assert_trees_all_equal(tapped, want)
    specs = nn.get_partition_spec({"k": SubspaceKernel(base, p, jnp.zeros((4, 3)), q)})["k"]
    assert specs.p.values == jax.sharding.PartitionSpec()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"p": make_projector(0, 7, 4, 2)}, r"'probe'.*\(6, 5\).*`p`.*\(7,\)"),
        ({"q": stack_projectors([make_projector(0, 5, 3, 2)] * 2)}, r"`q`.*\(2, 5\).*stacked"),
        ({"core": jnp.zeros((4, 4))}, r"\(4, 4\).*\(4, 3\)"),
        ({"core": jnp.zeros((4, 3), jnp.bfloat16)}, "bfloat16.*float32"),
        ({"p": None}, r"\(4, 3\).*\(6, 3\)"),
    ],
)
def test_ill_fitting_parts_are_refused(change, match):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5, name="probe")(x)

    parts = {"p": make_projector(0, 6, 4, 2), "q": make_projector(1, 5, 3, 2)}
    box = SubspaceKernel(jnp.zeros((6, 5)), core=jnp.zeros((4, 3)), **parts).replace(**change)
    with pytest.raises(ProjectorError, match=match):
        intercept(Model().apply)({"params": {"probe": {"kernel": box}}}, jnp.ones((2, 6)))
