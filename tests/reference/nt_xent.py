"""The contrastive loss of SimCLR, one anchor at a time."""

import torch


def nt_xent(z_a, z_b, temperature):
    """SimCLR eq. 1 in float64, averaged over the 2B anchors: a () tensor that can be differentiated.

    l(i, j) = -log( exp(sim(z_i, z_j) / t) / sum_{k != i} exp(sim(z_i, z_k) / t) ),  sim = cosine.
    """
    batch = len(z_a)
    views = [z.double() for z in z_a] + [z.double() for z in z_b]
    total = torch.zeros((), dtype=torch.float64, device=z_a.device)
    for i in range(2 * batch):
        positive = i + batch if i < batch else i - batch
        denominator = torch.zeros_like(total)
        for k in range(2 * batch):
            if k != i:
                denominator = denominator + torch.exp(_cosine(views[i], views[k]) / temperature)
        numerator = torch.exp(_cosine(views[i], views[positive]) / temperature)
        total = total - torch.log(numerator / denominator)
    return total / (2 * batch)


def _cosine(u, v):
    return (u * v).sum() / ((u * u).sum().sqrt() * (v * v).sum().sqrt())
