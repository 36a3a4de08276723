"""AWQ and GPTQ: w = (q - zero) * scale, one zero and scale for a group of inputs of every output.

Both keep ``qweight`` and ``qzeros`` as int32 words of several numbers, and the matrix transposed, [in, out]:

- AWQ (version gemm): qweight [in, out / 8], qzeros [groups, out / 8]; in a word the outputs are interleaved.
- GPTQ: qweight [in * bits / 32, out], qzeros [groups, out * bits / 32], and maybe ``g_idx`` [in], the group of each
  input; the zeros are stored less one, unless checkpoint_format is gptq_v2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.storage.packing import PackedTensor, chunks, describe, misfit
from octavo.storage.source import TensorInfo, TensorSource

FORMATS = {"awq": ("gemm",), "gptq": ("gptq", "gptq_v2")}  # the first where the configuration names none
# The place in a word, counted from the lowest bits, of outputs 0 to 7: AWQ puts the even ones first.
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class GroupedTensor(PackedTensor):
    """One AWQ or GPTQ matrix; which of them it is, the shapes tell, and bits and group size too.

    Args:
        source: holds ``base.qweight``, ``base.qzeros``, ``base.scales`` and maybe ``base.g_idx``.
        base: their common name.
        settings: ``quantization_config`` of config.json.

    Raises:
        CheckpointError: a part is absent or of another shape or dtype, or it is a variant Octavo does not read.
    """

    def __init__(self, source: TensorSource, base: str, settings: Mapping[str, Any]) -> None:
        self._source, self._base = source, base
        name = f"{base}.weight"
        parts = [source.info(f"{base}.{part}") for part in ("qweight", "qzeros", "scales")]
        self._ordered = f"{base}.g_idx" in source
        index = [source.info(f"{base}.g_idx")] if self._ordered else []
        self._bits, method = _recognise(source, name, parts)
        self._awq = method == "awq"
        variant = _variant(source, name, method, settings)
        self._zero_offset = 1 if variant == "gptq" else 0
        qweight, _, scales = parts
        groups, outputs = scales.shape
        inputs = qweight.shape[0] if self._awq else qweight.shape[0] * 32 // self._bits
        if inputs % groups or any(part.shape != (inputs,) or part.dtype != torch.int32 for part in index):
            raise misfit(source, name, parts + index, f"{inputs} inputs should make {groups} groups")
        encoding = f"{method} {self._bits}-bit g{inputs // groups}"
        self.info = describe(source, name, parts + index, (outputs, inputs), scales.dtype, encoding)

    def rows(self, first: int, last: int) -> Tensor:
        """Rows are the packed matrix's columns, so all of that is read, and as many columns undone as are asked for."""
        qweight, qzeros, scales = (
            self._source.read(f"{self._base}.{part}") for part in ("qweight", "qzeros", "scales")
        )
        inputs = self.info.shape[1]
        group = self._groups(inputs, scales.shape[0])
        out = torch.empty(last - first, inputs, dtype=self.info.dtype)
        per = 32 // self._bits
        for begin, end in chunks(first // per, -(-last // per), inputs * per):  # columns of words of qzeros
            columns = slice(max(begin * per, first), min(end * per, last))
            inside = slice(columns.start - begin * per, columns.stop - begin * per)
            zeros = self._across(qzeros[:, begin:end])[:, inside]
            zeros = (zeros + self._zero_offset) & ((1 << self._bits) - 1)  # as a stored -1 must give 0 again
            if self._awq:
                numbers = self._across(qweight[:, begin:end])[:, inside]
            else:
                numbers = self._down(qweight[:, columns])
            piece = (numbers - zeros[group]).to(self.info.dtype) * scales[:, columns][group]
            out[columns.start - first : columns.stop - first] = piece.T
        return out

    def _groups(self, inputs: int, groups: int) -> Tensor:
        if not self._ordered:
            return torch.arange(inputs) // (inputs // groups)
        group = self._source.read(f"{self._base}.g_idx").long()
        if bool(((group < 0) | (group >= groups)).any()):
            raise CheckpointError(
                f"{self._source.location}: '{self._base}.g_idx' names groups outside 0 to {groups - 1}",
                hint="the file is damaged; fetch it again",
            )
        return group

    def _across(self, words: Tensor) -> Tensor:
        """Numbers of words that hold neighbours of a row: [rows, columns * per]."""
        places = AWQ_PLACES if self._awq else range(32 // self._bits)
        shifts = torch.tensor([place * self._bits for place in places], dtype=torch.int32)
        return ((words[:, :, None] >> shifts) & ((1 << self._bits) - 1)).flatten(1)

    def _down(self, words: Tensor) -> Tensor:
        """Numbers of words that hold neighbours of a column: [rows * per, columns]."""
        shifts = torch.arange(0, 32, self._bits, dtype=torch.int32)
        return ((words[:, None, :] >> shifts[:, None]) & ((1 << self._bits) - 1)).flatten(0, 1)


def _recognise(source: TensorSource, name: str, parts: list[TensorInfo]) -> tuple[int, str]:
    """Return bits, and "awq" or "gptq"."""
    qweight, qzeros, scales = parts
    if qweight.dtype != torch.int32 or qzeros.dtype != torch.int32 or any(len(part.shape) != 2 for part in parts):
        raise misfit(source, name, parts, "qweight and qzeros should be int32 matrices")
    if any(0 in part.shape for part in parts) or qzeros.shape[0] != scales.shape[0]:
        raise misfit(source, name, parts, "qzeros and scales should have one row for every group")
    bits, rest = divmod(qzeros.shape[1] * 32, scales.shape[1])
    if not rest and bits == 3:
        raise CheckpointError(
            f"{source.location}: {name!r} is packed with 3 bits; Octavo reads 2, 4 and 8",
            hint="choose a 4-bit version of the model",
        )
    if not rest and bits == 4 and qweight.shape[1] == qzeros.shape[1]:
        return bits, "awq"
    if not rest and bits in (2, 4, 8) and qweight.shape[1] == scales.shape[1]:
        return bits, "gptq"
    raise misfit(source, name, parts, "neither as AWQ (version gemm) nor as GPTQ")


def _variant(source: TensorSource, name: str, method: str, settings: Mapping[str, Any]) -> str:
    """Return the variant of the format, checked against what the configuration says."""
    keys = ("version", "format", "checkpoint_format") if method == "awq" else ("checkpoint_format", "format")
    said = next((settings[key] for key in keys if settings.get(key) is not None), FORMATS[method][0])
    said_method = settings.get("quant_method", method)
    variant = str(said).lower()
    if said_method != method or variant not in FORMATS[method] or settings.get("zero_point") is False:
        raise CheckpointError(
            f"{source.location}: {name!r} is packed as {method}, config.json says {said_method} {said},"
            f" zero_point {settings.get('zero_point')}; Octavo reads AWQ gemm, GPTQ and GPTQ v2, with zero points",
            hint="choose another version of the model",
        )
    return variant
