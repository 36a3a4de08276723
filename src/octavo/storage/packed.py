"""Quantised weights seen as plain ones, over any source of tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from octavo.errors import CheckpointError, ConfigError
from octavo.storage.packed_gptq import GroupedTensor
from octavo.storage.packed_int8 import Int8Tensor
from octavo.storage.packed_mlx import MlxTensor, mlx_quantize
from octavo.storage.packing import PackedTensor
from octavo.storage.source import Rows, TensorInfo, TensorSource, row_range

__all__ = ["mlx_quantize", "undo_packing"]

_STACKED_SCALES = re.compile(r"(.*cond_ffn\.)scales([123])")


def undo_packing(source: TensorSource, config: Mapping[str, Any]) -> TensorSource:
    """Show every quantised weight of MLX (affine), AWQ (gemm), GPTQ or gpt-fast (int8) as one plain tensor.

    A weight is found by the names of its parts, as formats changed their minds about which tensors to quantise; dtypes
    and shapes are looked at when it is first asked for.

    Args:
        source: tensors as they are stored.
        config: config.json, for what shapes cannot tell: ``quantization`` (MLX's bits or group size) and
            ``quantization_config`` (AWQ's version, GPTQ's checkpoint_format).

    Returns:
        ``source`` itself where nothing is quantised. Otherwise a source with ``X.weight`` for ``X.qweight`` and its
        kin, of the scales' dtype; other tensors as they are.

    Raises:
        CheckpointError: a part of a weight is absent.
        ConfigError: ``quantization`` or ``quantization_config`` is no object.
    """
    settings = {key: _settings(source, config, key) for key in ("quantization", "quantization_config")}
    mlx_settings = settings["quantization"] or settings["quantization_config"]
    names = source.names()
    present = set(names)
    makers: dict[str, _Maker] = {}
    parts: dict[str, str] = {}  # every part's name, and the name of the weight it belongs to
    for name in names:
        base, _, kind = name.rpartition(".")
        weight = f"{base}.weight"
        if kind == "qweight":
            _check_parts(source, base, present)
            makers[weight] = partial(GroupedTensor, source, base, settings["quantization_config"])
            parts |= {f"{base}.{part}": weight for part in ("qweight", "qzeros", "scales", "g_idx")}
        elif kind == "scales" and weight in present:
            makers[weight] = partial(_with_scales, source, base, mlx_settings)
            parts |= {f"{base}.{part}": weight for part in ("weight", "scales", "biases")}
        elif (match := _STACKED_SCALES.fullmatch(name)) and (stacked := f"{match[1]}w{match[2]}") in present:
            makers[stacked] = partial(Int8Tensor, source, stacked, name)
            parts |= {stacked: stacked, name: stacked}
    return _Unpacked(source, list(dict.fromkeys(parts.get(name, name) for name in names)), makers) if makers else source


_Maker = Callable[[], PackedTensor]


class _Unpacked(TensorSource):
    def __init__(self, source: TensorSource, names: list[str], makers: Mapping[str, _Maker]) -> None:
        self.location = source.location
        self._source = source
        self._names = dict.fromkeys(names)
        self._makers = makers
        self._packed: dict[str, PackedTensor] = {}

    def names(self) -> list[str]:
        return list(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def info(self, name: str) -> TensorInfo:
        packed = self._find(name)
        return self._source.info(name) if packed is None else packed.info

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        packed = self._find(name)
        if packed is None:
            return self._source.read(name, rows)
        first, last = row_range(rows, packed.info.shape, name)
        matrix = packed.rows(first, last)
        return matrix.view(packed.info.shape) if rows is None else matrix

    def _find(self, name: str) -> PackedTensor | None:
        if name not in self._names:
            raise self.unknown(name)
        if name in self._makers and name not in self._packed:
            self._packed[name] = self._makers[name]()
        return self._packed.get(name)


def _with_scales(source: TensorSource, base: str, settings: Mapping[str, Any]) -> PackedTensor:
    if source.info(f"{base}.weight").dtype == torch.uint32:
        return MlxTensor(source, base, settings)
    return Int8Tensor(source, f"{base}.weight", f"{base}.scales")


def _check_parts(source: TensorSource, base: str, present: set[str]) -> None:
    missing = [part for part in ("qzeros", "scales") if f"{base}.{part}" not in present]
    if missing or f"{base}.weight" in present:
        wrong = f"holds no '{base}.{missing[0]}'" if missing else f"holds '{base}.weight' too"
        raise CheckpointError(
            f"{source.location}: holds '{base}.qweight', but {wrong}", hint="the checkpoint is incomplete or mixed up"
        )


def _settings(source: TensorSource, config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{source.location}: config.json has {key} {value!r}; expected an object",
            hint='such as {"bits": 4, "group_size": 64}',
        )
    return value
