"""Octavo: sparse mixture-of-experts language models on the memory a person has."""

__version__ = "0.1.0.dev0"
