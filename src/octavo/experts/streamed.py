"""The model's seam, answered from the disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from octavo.experts.cache import DiskCache, Held
from octavo.experts.prefetch import Prefetch
from octavo.kernels.ops import Matrix, PartedMatrix, Weight, moe_part, waited
from octavo.quant.formats import Format, Packed

Kind = tuple[Format | None, tuple[int, int]]
"""Format (None: bfloat16) and shape of a matrix."""


class StreamedExperts(nn.Module):
    """All experts of a layer, read into a cache when tokens choose them; see `octavo.model.Experts`.

    Args:
        layer: its number.
        kinds: of w1, w3 and w2 of each expert.
        cache: of all layers.

    Attributes:
        prefetch: reads ahead for the next layer, by what its router would choose now; None to leave it.
    """

    def __init__(self, layer: int, kinds: Sequence[Sequence[Kind]], cache: DiskCache) -> None:
        super().__init__()
        self.layer, self.cache = layer, cache
        self._kinds = kinds
        self.prefetch: Prefetch | None = None

    def forward(self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """Return y_TD: the weighted sum of the chosen experts, the same bits as with all of them in memory.

        Raises:
            CheckpointError: an expert cannot be read.
            ResourceError: others have taken the memory that the budget promised.
        """
        y_TD, before = torch.zeros(x_TD.shape, dtype=torch.float32), waited()
        numbers = sorted(set(topk_ids_TK.flatten().tolist()))
        for helds in self._groups(numbers, x_TD, in_any_order=topk_ids_TK.shape[1] <= 2):
            if not all(self.cache.is_verified(held) for held in helds):
                self._check(helds)
            experts = {held.key[1]: self._matrices(held) for held in helds}
            moe_part(y_TD, x_TD, topk_ids_TK, topk_weights_TK, experts)
            self._check(helds)
        self.cache.end_layer(self.layer)
        self.cache.counters.layers[self.layer].wait_seconds += waited() - before
        return y_TD.to(x_TD.dtype)

    def _groups(self, numbers: list[int], x_TD: Tensor, *, in_any_order: bool) -> Iterator[list[Held]]:
        """Experts to compute with at once: those that are left, when slots hold them all; else one after another.

        Meanwhile others are read into the slots that are free. A token's sum is the same whichever of two experts
        comes first, so that with two those come first that are there; more are added up by rising number.
        """
        if in_any_order:
            numbers = sorted(numbers, key=lambda number: not self.cache.holds((self.layer, number)))
        waiting, taken = deque(numbers), deque[Held]()
        try:
            while waiting or taken:
                while waiting and (held := self.cache.take((self.layer, waiting[0]))) is not None:
                    taken.append(held)
                    waiting.popleft()
                if not waiting:
                    self._read_ahead(numbers, x_TD)
                group = [taken[0]] if waiting else list(taken)
                yield group
                for held in group:
                    self.cache.give_back(held)
                    taken.popleft()
        finally:
            for held in taken:
                self.cache.give_back(held)

    def _read_ahead(self, numbers: list[int], x_TD: Tensor) -> None:
        """What the next layer will need: of a prompt that chose every expert here, surely nearly every one there."""
        following = self.layer + 1
        if len(numbers) == len(self._kinds) and len(x_TD) > len(numbers) and self.cache.has_layer(following):
            ahead: Sequence[int] = range(len(self._kinds))
        elif self.prefetch is not None:
            ahead = self.prefetch.guess(self.layer, x_TD)
        else:
            return
        for number in ahead:
            if not self.cache.prefetch((following, number)):
                return

    def _check(self, helds: Sequence[Held]) -> None:
        for held in helds:
            self.cache.check(held)

    def _matrices(self, held: Held) -> tuple[Matrix, Matrix, Matrix]:
        w1, w3, w2 = (
            PartedMatrix(
                format, shape, [(piece.address, piece.nbytes, piece.read and piece.read.native) for piece in parts]
            )
            for (format, shape), parts in zip(self._kinds[held.key[1]], held.matrices, strict=True)
        )
        return w1, w3, w2

    def extra_repr(self) -> str:
        """Number, and the share of memory, for print(model)."""
        return f"{len(self._kinds)} experts, {self.cache.nbytes} bytes in memory for all layers"


def kind_of(weight: Weight) -> Kind:
    """Format and shape of a matrix."""
    rows, cols = weight.shape
    return weight.format if isinstance(weight, Packed) else None, (rows, cols)
