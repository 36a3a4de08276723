"""Whether a missing expert is sooner copied to the card, or computed by the CPU where it lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CostModel:
    """What a missing expert costs.

    Attributes:
        link: bytes a second from page-locked host memory to the card.
        expert: seconds of the CPU for an expert, however few its tokens.
        token: seconds more for each token.
    """

    link: float
    expert: float
    token: float

    def copying(self, nbytes: int) -> float:
        """Seconds to copy so many bytes."""
        return nbytes / self.link

    def computing(self, tokens: int) -> float:
        """Seconds of the CPU for one expert of so many tokens."""
        return self.expert + self.token * tokens


def choose(misses: Sequence[tuple[int, int]], expert_nbytes: int, cost: CostModel) -> set[int]:
    """Return the experts that the CPU should compute, so that the last of all is done soonest.

    Copies come one after another, and so do the CPU's experts; both go on at once. Among splits that end at the same
    time the one with the most copies is chosen, for what was copied stays.

    Args:
        misses: expert and number of its tokens.
        expert_nbytes: of each.
        cost: of both.
    """
    fewest_first = sorted(misses, key=lambda miss: (miss[1], miss[0]))
    chosen, cpu = 0, 0.0
    least = len(misses) * cost.copying(expert_nbytes)
    for n, (_, tokens) in enumerate(fewest_first, start=1):
        cpu += cost.computing(tokens)
        ends = max(cpu, (len(misses) - n) * cost.copying(expert_nbytes))
        if ends < least:
            chosen, least = n, ends
    return {expert for expert, _ in fewest_first[:chosen]}
