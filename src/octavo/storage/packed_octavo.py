"""Octavo's own stores: safetensors shards that hold quantised matrices as the kernels read them.

Each such matrix is a tensor U8 [nbytes]. The header's ``__metadata__`` has under ``octavo`` a JSON text: the version,
and of every tensor the checksum of its bytes (XXH3, 64 bits); of a quantised one its format and shape too, and the
dtype it is dequantised to. `octavo.checkpoint.store` writes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_64

from octavo.errors import CheckpointError, ConfigError
from octavo.quant.formats import FORMATS, PANEL_ROWS, Format, Packed
from octavo.quant.quantize import dequantize
from octavo.storage.files import ByteFile, MappedFile, parse_json
from octavo.storage.safetensors import DTYPE_NAMES, DTYPES, SafetensorsFile, ShardedSafetensors, as_tensor
from octavo.storage.source import ListedSource, MergedSource, Rows, TensorInfo, TensorSource, row_range

KEY = "octavo"
"""Of ``__metadata__``; and the ``quant_method`` of config.json."""
VERSION = 1
FLOATS = tuple(DTYPE_NAMES[dtype] for dtype in (torch.float32, torch.bfloat16, torch.float16))
"""What quantised tensors may be dequantised to."""
ALIGNMENT = 64
MAX_SIZE = 1 << 31  # rows or columns
NEWER = "a newer Octavo reads it: pip install -U octavo"
DAMAGED = "the store is damaged; fetch it again, or quantise the original weights again"


def declares_store(config: Mapping[str, Any], where: str) -> bool:
    """Whether a config.json says that the weights beside it are a store's.

    Args:
        config: its content.
        where: what to call it in messages.

    Raises:
        ConfigError: a store's of a newer version, or of none.
    """
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping) or settings.get("quant_method") != KEY:
        return False
    version = settings.get("version")
    if type(version) is not int or version < 1:
        raise ConfigError(
            f"{where}: quantization_config.version is {_short(version)}; expected {VERSION}", hint=DAMAGED
        )
    if version > VERSION:
        raise ConfigError(
            f"{where}: is of a store of version {_short(version)}; this Octavo reads version {VERSION}",
            hint=NEWER,
        )
    return True


def open_shard(file: ByteFile, *, in_store: bool) -> TensorSource:
    """Open a safetensors file, which may be a store's.

    Args:
        file: its bytes.
        in_store: config.json says that it is.

    Raises:
        CheckpointError: it is damaged, of a newer version, or should be a store's and is not.
    """
    shard = SafetensorsFile(file)
    if KEY in shard.metadata:
        return StoreFile(shard)
    if in_store:
        raise CheckpointError(
            f"{file.location}: belongs to a store by its config.json, but has no {KEY!r} in its header's metadata",
            hint="was it written by something else? quantise the original weights again",
        )
    return shard


def store_file(source: TensorSource, name: str) -> StoreFile | None:
    """Return the file of a store that holds a tensor; None if what holds it is no store's.

    Raises:
        CheckpointError: there is no such tensor.
    """
    while isinstance(source, MergedSource | ShardedSafetensors):
        source = source.owner(name)
    return source if isinstance(source, StoreFile) else None


@dataclass(frozen=True)
class _Kept:
    """One tensor of a store: what it is read as, the checksum of its bytes, and how these are quantised if they are."""

    info: TensorInfo
    xxh3: str
    format: Format | None

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.info.shape
        return rows, cols


class StoreFile(ListedSource):
    """One file of a store, its quantised matrices seen as plain ones.

    What is read whole is compared with its checksum, but for mapped files: there `verify` is called once for all.

    Raises:
        CheckpointError: of a newer version, or the metadata does not fit the tensors.
    """

    def __init__(self, shard: SafetensorsFile) -> None:
        self.location = shard.location
        self._shard = shard
        self._check = not isinstance(shard.file, MappedFile)
        self._kept = _read_metadata(shard)
        self.infos = {name: kept.info for name, kept in self._kept.items()}

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        """Dequantised, a panel of rows at a time; a plain tensor as it lies there."""
        info = self.info(name)
        kept = self._kept[name]
        if kept.format is None:
            if rows is not None:
                return self._shard.read(name, rows)
            return as_tensor(self._bytes(name, check=self._check), info.dtype, info.shape)
        if rows is None:
            return dequantize(self._packed(kept, kept.format), info.dtype)
        first, last = row_range(rows, info.shape, name)
        begin, end = first // PANEL_ROWS, -(-last // PANEL_ROWS)
        panel = kept.format.panel_nbytes(kept.shape[1])
        data = self._shard.read(name, (begin * panel, end * panel))
        skipped = begin * PANEL_ROWS
        part = Packed(data, kept.format, (min(end * PANEL_ROWS, kept.shape[0]) - skipped, kept.shape[1]))
        return dequantize(part, info.dtype, (first - skipped, last - skipped))

    def packed(self, name: str) -> Packed | None:
        """Return a quantised matrix as the kernels read it, a view of a mapped file; None for a plain tensor."""
        self.info(name)
        kept = self._kept[name]
        return None if kept.format is None else self._packed(kept, kept.format)

    def verify(self, name: str) -> int:
        """Compare a tensor's bytes with their checksum; return how many there are.

        Raises:
            CheckpointError: they are others than were written.
        """
        self.info(name)
        return self._bytes(name, check=True).numel()

    def compare(self, name: str, parts: Iterable[memoryview]) -> None:
        """Compare a tensor's bytes, which somebody else has read, with their checksum.

        Raises:
            CheckpointError: they are others than were written, or there is no such tensor.
        """
        self.info(name)
        sum, expected = xxh3_64(), self._kept[name].xxh3
        for part in parts:
            sum.update(part)
        if (found := sum.hexdigest()) != expected:
            raise CheckpointError(
                f"{self.location}: the bytes of {name!r} are not those that were written (their checksum is {found};"
                f" expected {expected})",
                hint=DAMAGED,
            )

    def _packed(self, kept: _Kept, format: Format) -> Packed:
        data = self._bytes(kept.info.name, check=self._check)
        # Never so in what Octavo writes, but for the smallest of models whose formats are mixed.
        data = data if data.data_ptr() % ALIGNMENT == 0 else data.clone()
        return Packed(data, format, kept.shape)

    def _bytes(self, name: str, *, check: bool) -> Tensor:
        entry = self._shard.entries[name]
        data = self._shard.file.read(entry.begin, entry.end)
        if check:
            self.compare(name, [memoryview(data.numpy())])  # type: ignore[arg-type]
        return data


def _read_metadata(shard: SafetensorsFile) -> dict[str, _Kept]:
    text = shard.metadata[KEY]
    if not isinstance(text, str):
        raise _broken(shard, f"{KEY!r} in its header is {_short(text)}; expected a text of JSON")
    try:
        said = parse_json(text.encode("utf-8", "surrogatepass"), f"{KEY!r} in its header")
    except ConfigError as error:
        raise _broken(shard, error.message) from None
    version = said.get("version")
    if type(version) is int and version > VERSION:
        raise CheckpointError(
            f"{shard.location}: is of a store of version {_short(version)}; this Octavo reads version {VERSION}",
            hint=NEWER,
        )
    if type(version) is not int or version < 1:
        raise _broken(shard, f"its version is {_short(version)}; expected {VERSION}")
    listed = said.get("tensors")
    if not isinstance(listed, dict):
        raise _broken(shard, f"its tensors are {_short(listed)}; expected an object of one entry for each")
    for names, others, what in (
        (shard.infos, listed, "holds {!r}, of which its metadata say nothing"),
        (listed, shard.infos, "lists {!r} in its metadata, and does not hold it"),
    ):
        absent = [name for name in names if name not in others]
        if absent:
            raise _broken(shard, "it " + what.format(absent[0]))
    return {name: _kept(shard, info, listed[name]) for name, info in shard.infos.items()}


def _kept(shard: SafetensorsFile, info: TensorInfo, entry: Any) -> _Kept:
    if not isinstance(entry, dict):
        raise _broken(shard, f"the entry of {info.name!r} is {_short(entry)}; expected an object")
    xxh3 = entry.get("xxh3")
    if not isinstance(xxh3, str) or not re.fullmatch("[0-9a-f]{16}", xxh3):
        raise _broken(shard, f"the checksum of {info.name!r} is {_short(xxh3)}; expected 16 hexadecimal digits")
    if info.dtype != torch.uint8 and "format" not in entry:
        return _Kept(info, xxh3, None)
    if info.dtype != torch.uint8:
        raise _broken(shard, f"{info.name!r} has a format, and the dtype {info.encoding}; expected U8")
    format, shape = _format(shard, info.name, entry.get("format")), _shape(shard, info.name, entry.get("shape"))
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in FLOATS:
        raise _broken(shard, f"the dtype of {info.name!r} is {_short(dtype)}; expected one of {', '.join(FLOATS)}")
    expected = format.nbytes(*shape)
    if info.shape != (expected,):
        raise _broken(
            shard,
            f"{info.name!r} has the shape {list(info.shape)}; {format.name} of {list(shape)} takes {expected} bytes",
        )
    return _Kept(
        TensorInfo(info.name, DTYPES[dtype], shape, info.nbytes, info.file, f"{KEY} {format.name}"), xxh3, format
    )


def _format(shard: SafetensorsFile, name: str, value: Any) -> Format:
    if not isinstance(value, str) or value not in FORMATS:
        raise CheckpointError(
            f"{shard.location}: the format of {name!r} is {_short(value)}; expected one of {', '.join(FORMATS)}",
            hint="the store is damaged, or newer than this version of Octavo",
        )
    return FORMATS[value]


def _shape(shard: SafetensorsFile, name: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and 0 < n < MAX_SIZE for n in value):
        raise _broken(shard, f"the shape of {name!r} is {_short(value)}; expected [rows, columns]")
    return value[0], value[1]


def _broken(shard: SafetensorsFile, why: str) -> CheckpointError:
    return CheckpointError(f"{shard.location}: not a whole file of a store: {why}", hint=DAMAGED)


def _short(value: object) -> str:
    """A value as messages show it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
