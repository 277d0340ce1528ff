"""The loss of a masked autoencoder (MAE, arXiv 2111.06377), one patch and one value at a time."""

import torch


def patches(image, patch):
    """The patches of an image (C, H, W), row by row: lists of values ordered by row, column, channel."""
    channels, height, width = image.shape
    return [
        [
            image[c, top + row, left + column]
            for row in range(patch)
            for column in range(patch)
            for c in range(channels)
        ]
        for top in range(0, height, patch)
        for left in range(0, width, patch)
    ]


def runs(feature, patch):
    """The runs of positions of a pooled feature (C, L): lists of values ordered by position, channel."""
    channels, length = feature.shape
    return [
        [feature[c, start + k] for k in range(patch) for c in range(channels)]
        for start in range(0, length, patch)
    ]


def loss(truth, output, masks, loss_on, normalise):
    """The mean over units of the mean squared error over a unit's values, in float64.

    Args:
        truth: for each sample the list of its units, each a list of values.
        output: likewise, what was reconstructed.
        masks: for each sample a list of bool, True where a unit was hidden.
        loss_on: `masked` or `all`.
        normalise: compare with the unit minus its mean, over its std (unbiased variance plus 1e-6).
    """
    errors = []
    for sample_truth, sample_output, mask in zip(truth, output, masks, strict=True):
        for unit_truth, unit_output, hidden in zip(sample_truth, sample_output, mask, strict=True):
            if not hidden and loss_on == "masked":
                continue
            wanted = [value.double() for value in unit_truth]
            if normalise:
                mean = sum(wanted) / len(wanted)
                variance = sum((value - mean) ** 2 for value in wanted) / (len(wanted) - 1)
                wanted = [(value - mean) / (variance + 1e-6) ** 0.5 for value in wanted]
            squares = [(one - other.double()) ** 2 for one, other in zip(wanted, unit_output, strict=True)]
            errors.append(sum(squares) / len(squares))
    return torch.stack(errors).mean()
