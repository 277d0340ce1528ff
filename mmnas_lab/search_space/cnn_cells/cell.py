"""A cell of the supernet: every candidate operation on every edge, weighted by alpha."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmnas_lab.search_space.cnn_cells.mixed_ops import Fan, MakeOp, total
from mmnas_lab.search_space.cnn_cells.mixtures import mixtures
from mmnas_lab.search_space.cnn_cells.vocabulary import edges


class MixedCell(nn.Module):
    """Inputs (B, C, H, W) to the list of its nodes, each (B, C, H / stride, W / stride).

    Node i is the sum over its sources of the mixed operation on the edge (DARTS eq. 1 and 2).

    With `partial` = k > 1 (PC-DARTS, arXiv 1907.05737) the operations read the first C / k channels alone,
    the others pass by (at stride 2 through a 2x2 max pooling), and the channels are shuffled in k groups.
    Shuffle and sum over sources commute, so a node is shuffled once.

    Args:
        edge_ops: names of the operations of each edge.
        make: the operations by name.
        num_inputs: of the cell.
        num_nodes: M.
        channels: C.
        reduction: edges from the inputs have stride 2.
        partial: k; divides C.
    """

    def __init__(
        self,
        edge_ops: Sequence[tuple[str, ...]],
        make: dict[str, MakeOp],
        num_inputs: int,
        num_nodes: int,
        channels: int,
        reduction: bool,
        partial: int,
    ) -> None:
        super().__init__()
        self.num_inputs, self.num_nodes, self.partial = num_inputs, num_nodes, partial
        every = edges(num_inputs, num_nodes)
        last = num_inputs + num_nodes - 1
        # By source: the numbers of the edges that leave it; one for each later node.
        self.leaving = [[e for e, (source, _) in enumerate(every) if source == j] for j in range(last)]
        self.strides = [2 if reduction and j < num_inputs else 1 for j in range(last)]
        self.fans = nn.ModuleList(
            Fan([edge_ops[e] for e in leaving], make, channels // partial, stride)
            for leaving, stride in zip(self.leaving, self.strides, strict=True)
        )

    def forward(
        self,
        inputs: Sequence[Tensor],
        weights: Tensor,
        edge_weights: Tensor | None,
        drop_path: float,
        sparse: bool = False,
    ) -> list[Tensor]:
        """The nodes.

        Args:
            inputs: states 0 to num_inputs - 1.
            weights: (E, K) mixing weights.
            edge_weights: (E,) weights of the edges (PC-DARTS eq. 4); None for 1.
            drop_path: probability with which a sample loses an edge, in training.
            sparse: many weights are 0, and operations that have no other are not computed.
        """
        states = list(inputs)
        terms: list[list[Tensor]] = [[] for _ in range(self.num_nodes)]
        passing: list[list[Tensor]] = [[] for _ in range(self.num_nodes)]
        if edge_weights is not None:
            weights = weights * edge_weights[:, None]
        fans: Any = self.fans
        for j, (fan, leaving) in enumerate(zip(fans, self.leaving, strict=True)):
            x = states[j]
            active = x[:, : x.shape[1] // self.partial]
            parts = fan(active, weights[leaving], sparse)
            first = self.num_nodes - len(leaving)  # the first node that reads state j
            others = None
            if self.partial > 1:
                others = self._passing(
                    x, j, len(leaving), None if edge_weights is None else edge_weights[leaving]
                )
            for n, part in enumerate(parts):
                other = None if others is None else others[n]
                if self.training and drop_path > 0:
                    keep = kept(part, drop_path)
                    part = part * keep
                    other = None if other is None else other * keep
                terms[first + n].append(part)
                if other is not None:
                    passing[first + n].append(other)
            if j + 1 >= self.num_inputs:
                node = j + 1 - self.num_inputs
                states.append(self._node(terms[node], passing[node]))
                terms[node], passing[node] = [], []
        return states[self.num_inputs :]

    def _passing(self, x: Tensor, j: int, count: int, edge_weights: Tensor | None) -> Sequence[Tensor]:
        """The channels that pass by, for each of the edges that leave state j."""
        rest = x[:, x.shape[1] // self.partial :]
        if self.strides[j] == 2:
            rest = F.max_pool2d(rest, 2)
        if edge_weights is None:
            return [rest] * count
        return mixtures(edge_weights[:, None], [rest])

    def _node(self, terms: list[Tensor], passing: list[Tensor]) -> Tensor:
        node = total(terms)
        if not passing:
            return node
        joined = torch.cat([node, total(passing)], 1)
        return shuffle(joined, self.partial)


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channel c of group g to place c * groups + g; the order in memory is kept."""
    if x.is_contiguous(memory_format=torch.channels_last):
        last = x.permute(0, 2, 3, 1).unflatten(-1, (groups, -1))
        return last.transpose(-1, -2).flatten(-2).permute(0, 3, 1, 2)
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def kept(x: Tensor, probability: float) -> Tensor:
    """(B, 1, 1, 1) factors for drop-path: 0 with the given probability, else 1 / (1 - probability)."""
    keep = torch.rand(len(x), 1, 1, 1, device=x.device, dtype=x.dtype) >= probability
    return keep.to(x.dtype) / (1 - probability)
