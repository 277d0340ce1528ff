"""A feed-forward network, M2-Mixer's encoder of tables."""

from __future__ import annotations

from torch import Size, Tensor, nn

from mmnas_lab.search_space.mixers.encoder import Encoder, at_least_one


class FeedForward(Encoder):
    """The whole input, flattened, to one token: three linear layers with ReLU between them.

    Args:
        shape: of one sample.
        width: D.
        hidden: width of both hidden layers; null for D.
        dropout: after each ReLU.
    """

    def __init__(
        self, shape: tuple[int, ...], width: int, hidden: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        hidden = width if hidden is None else hidden
        at_least_one(width=width, hidden=hidden)
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(Size(shape).numel(), hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, width),
        )
        self.size = (1, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.layers(x)[:, None]
