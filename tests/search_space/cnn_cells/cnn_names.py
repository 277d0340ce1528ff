"""Our supernet's tensors under the names of `reference/plain_cnn_cells.py`, one edge at a time."""

import re

import torch

FAN = re.compile(r"^(skeleton\.cells\.\d+)\.mixed\.fans\.(\d+)\.(own|shared)\.(\w+)\.(.+)$")


def named(network):
    """{reference name: (name of our tensor, part) -> index into it} of parameters and running statistics.

    The part of a tensor that belongs to one edge is a slice of its first dimension; what edges share, the
    running statistics of a pool, is whole and has the names of all of them.
    """
    found = {}
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if name.endswith("num_batches_tracked"):
            continue
        match = FAN.match(name)
        if not match:
            found[name] = (tensor, slice(None))
            continue
        cell, source, form, op, rest = match.groups()
        mixed = network.get_submodule(f"{cell}.mixed")
        fan, leaving = mixed.fans[int(source)], mixed.leaving[int(source)]
        own = [leaving[e] for e, _ in fan.edges_of[op]]
        size = len(tensor) // len(own)
        for i, e in enumerate(own):
            part = slice(i * size, (i + 1) * size) if form == "own" else slice(None)
            found[f"{cell}.edge.{e}.{op}.{rest}"] = (tensor, part)
    return found


def reference_tensors(network, dtype=torch.float64):
    """Copies of our values; parameters ask for gradients."""
    return {
        name: tensor.detach()[part].to(dtype).clone().requires_grad_(tensor.requires_grad)
        for name, (tensor, part) in named(network).items()
    }


def scramble(network, generator):
    """Draw every parameter and running statistic anew, so that no affine is 1 and no logit near 0."""
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        drawn = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        if name.endswith("running_var"):
            drawn = (0.5 * drawn).exp()
        elif tensor.ndim == 1 and name.endswith("weight"):
            drawn = 1 + 0.3 * drawn
        elif tensor.ndim == 4:
            drawn = drawn / tensor[0].numel() ** 0.5
        tensor.data.copy_(drawn)
    return network
