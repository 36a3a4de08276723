"""Experts that do not all fit into memory: a budget in bytes, and the call on the model's seam that keeps it."""

from octavo.experts.cache import CacheCounters, DiskCache, ExpertCache, LayerCounters
from octavo.experts.replay import placement_from_trace
from octavo.experts.streamed import StreamedExperts
from octavo.experts.trace import Routed, RoutingTrace, read_trace, record

__all__ = [
    "CacheCounters",
    "DiskCache",
    "ExpertCache",
    "LayerCounters",
    "Routed",
    "RoutingTrace",
    "StreamedExperts",
    "placement_from_trace",
    "read_trace",
    "record",
]
