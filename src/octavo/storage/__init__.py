"""Containers of tensors: bytes of files, near or far, and the formats that keep named tensors in them.

Nothing here knows what a tensor means to a model; names are those on disk.
"""
