"""Weights on disk: what a tensor is called there, how it lies, and how to read and write it."""
