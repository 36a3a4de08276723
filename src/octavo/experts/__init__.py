"""Experts that lie on disk: a pool of slots with a budget in bytes, and the call on the model's seam that uses it."""

from octavo.experts.cache import CacheCounters, ExpertCache, LayerCounters
from octavo.experts.streamed import StreamedExperts

__all__ = ["CacheCounters", "ExpertCache", "LayerCounters", "StreamedExperts"]
