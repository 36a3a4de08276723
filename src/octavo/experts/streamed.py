"""The model's seam, answered from the disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from octavo.experts.cache import ExpertCache, Slot
from octavo.kernels.ops import Matrix, Weight, moe_part
from octavo.quant.formats import Format, Packed


class StreamedExperts(nn.Module):
    """All experts of a layer, read into a cache's slots when tokens choose them; see `octavo.model.Experts`.

    Args:
        layer: its number.
        experts: w1, w3 and w2 of each, as they lie in mapped files; of these only shapes and formats are used.
        cache: of all layers.
    """

    def __init__(self, layer: int, experts: Sequence[tuple[Weight, Weight, Weight]], cache: ExpertCache) -> None:
        super().__init__()
        self.layer, self.cache = layer, cache
        self._kinds = [tuple(_kind(weight) for weight in expert) for expert in experts]

    def forward(self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """Return y_TD: the weighted sum of the chosen experts, the same bits as with all of them in memory.

        Raises:
            CheckpointError: an expert cannot be read.
        """
        y_TD = torch.zeros(x_TD.shape, dtype=torch.float32)
        for number, tensors in self._each(topk_ids_TK):
            w1, w3, w2 = (_matrix(kind, data) for kind, data in zip(self._kinds[number], tensors, strict=True))
            moe_part(y_TD, x_TD, topk_ids_TK, topk_weights_TK, number, (w1, w3, w2))
        return y_TD.to(x_TD.dtype)

    def _each(self, topk_ids_TK: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
        """The chosen experts and the bytes of their matrices, each kept until the next is asked for.

        What is being read meanwhile is as much as there are slots for. A token's sum is the same whichever of two
        experts comes first, so that with two those come first that are there; more are added up by rising number.
        """
        waiting = deque(torch.unique(topk_ids_TK).tolist())
        if topk_ids_TK.shape[1] <= 2:
            waiting = deque(sorted(waiting, key=lambda number: not self.cache.holds((self.layer, number))))
        taken: deque[tuple[int, Slot]] = deque()
        try:
            while waiting or taken:
                while waiting and (slot := self.cache.take((self.layer, waiting[0]))) is not None:
                    taken.append((waiting.popleft(), slot))
                number, slot = taken[0]
                yield number, self.cache.wait(slot)
                taken.popleft()
                self.cache.give_back(slot)
        finally:
            for _, slot in taken:
                self.cache.give_back(slot)

    def extra_repr(self) -> str:
        """Number, and the share of memory, for print(model)."""
        return f"{len(self._kinds)} experts, {self.cache.n_slots} slots for all layers"


_Kind = tuple[Format | None, tuple[int, int]]
"""Format (None: bfloat16) and shape of a matrix."""


def _kind(weight: Weight) -> _Kind:
    rows, cols = weight.shape
    return weight.format if isinstance(weight, Packed) else None, (rows, cols)


def _matrix(kind: _Kind, data: Tensor) -> Matrix:
    format, shape = kind
    return Matrix(data.view(torch.bfloat16).view(shape) if format is None else Packed(data, format, shape))
