"""Barlow Twins (arXiv 2103.03230), one pair of dimensions at a time."""

import torch


def barlow_twins(z_a, z_b, redundancy_weight):
    """Eq. 1 and 2 in float64: a () tensor that can be differentiated.

    Each dimension is standardised over the batch, by the biased variance plus 1e-5 as in the released code.
    """
    a, b = _standardised(z_a.double()), _standardised(z_b.double())
    samples, dimensions = a.shape
    total = torch.zeros((), dtype=torch.float64)
    for i in range(dimensions):
        for j in range(dimensions):
            c = sum(a[n, i] * b[n, j] for n in range(samples)) / samples
            total = total + ((1 - c) ** 2 if i == j else redundancy_weight * c**2)
    return total


def _standardised(z):
    columns = []
    for column in z.T:
        mean = sum(column) / len(column)
        variance = sum((value - mean) ** 2 for value in column) / len(column)
        columns.append((column - mean) / (variance + 1e-5) ** 0.5)
    return torch.stack(columns, 1)
