"""The weights of a torch model in our tree, for every family."""

import numpy as np

from emloc_jax.models import hf_tensor_names


def tree_of(model, config):
    """Torch weights as an unrolled tree of float32 NumPy arrays."""
    state = model.state_dict()
    params = {}
    for path, tensor in hf_tensor_names(config).items():
        array = state[tensor.class_name].numpy().astype(np.float32)
        assert array.shape == tensor.shape, path
        *parents, leaf = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = tensor.to_parameter(array)
    return params
