"""Our fusion networks' tensors under the names and in the layout of `reference/fusion.py`.

Ours is (B, L, C), the reference (B, C, L): the two-dimensional affines of LayerNorms are transposed.
"""

import re

import torch

OWN = [
    (r"^steps\.(\d+)\.(\d+)\.ops\.", r"cell.\1.step.\2."),
    (r"^ends\.(\d+)\.", r"cell.\1."),
    (r"^cells\.(\d+)\.end\.", r"cell.\1."),
    (r"^flatten\.", "head."),
    (r"^arch\.", ""),
    (r"linear\.(weight|bias)$", r"\1"),
    (r"value\.weight$", "weight_x"),
    (r"gate\.weight$", "weight_y"),
]


def named(network, genotype=None):
    """{reference name: (tensor of ours, whether it is transposed)} of parameters and running statistics."""
    features = network.features if genotype is None else network.names
    found = {}
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if name.endswith("num_batches_tracked"):
            continue
        own = re.sub(r"^reshape\.(\d+)\.", lambda m: f"reshape.{features[int(m[1])]}.", name)
        if genotype is not None:
            own = re.sub(
                r"^cells\.(\d+)\.ops\.(\d+)\.",
                lambda m: f"cell.{m[1]}.step.{m[2]}.{genotype.cells[int(m[1])].steps[int(m[2])].op}.",
                own,
            )
        for pattern, replacement in OWN:
            own = re.sub(pattern, replacement, own)
        kind = "ln" if tensor.ndim == 2 else "bn"
        own = re.sub(r"norm\.(\w+)$", rf"{kind}_\1", own)
        found[own] = (tensor, kind == "ln" and ".ln_" in own)
    return found


def reference_tensors(network, genotype=None, dtype=None):
    """Fresh leaves with our values; parameters ask for gradients."""
    return {
        name: (tensor.detach().T if transposed else tensor.detach())
        .to(dtype or tensor.dtype)
        .clone()
        .requires_grad_(tensor.requires_grad)
        for name, (tensor, transposed) in named(network, genotype).items()
    }


def scramble(network, generator):
    """Draw every parameter and every running statistic, so that no affine is 1 and 0."""
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        drawn = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        if name.endswith("norm.weight"):
            drawn = 1 + 0.3 * drawn
        elif name.endswith("running_var"):
            drawn = (0.5 * drawn).exp()
        elif name.endswith("weight"):
            drawn = drawn / tensor.shape[1] ** 0.5
        tensor.data.copy_(drawn)
    return network
