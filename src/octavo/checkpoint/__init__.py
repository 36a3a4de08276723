"""Weights on disk: what a tensor is called there, how it lies, and how to read and write it."""

from octavo.checkpoint.checkpoint import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
