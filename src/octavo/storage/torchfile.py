"""``.pt`` and ``.pth``: a dictionary of tensors as ``torch.save`` writes it, which is a pickle beside raw bytes.

Unpickling can run code, so nothing but torch's restricted unpickler ever reads one here; and before it does, the
pickle's instructions are looked through, for it may name nothing but what makes tensors.
"""

from __future__ import annotations

import math
import pickletools
import re
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import IO, Any

import torch
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.storage.files import FETCH_AGAIN, MappedFile, PlainFile
from octavo.storage.safetensors import DTYPE_NAMES, as_tensor
from octavo.storage.source import ListedSource, Rows, TensorInfo, matrix_shape, row_range

WRAPPERS = ("model", "state_dict")  # under which trainers keep the weights
MAX_PICKLE_BYTES = 1 << 22  # 1,000 tensors take some 150 KB
LEGACY_PICKLES = 5  # before torch 1.6: magic number, version, machine, the dictionary, and the order of the bytes
# What a dictionary of tensors is made of. torch's unpickler knows more (sets, byte arrays, counters), with which a
# few bytes can ask for any amount of memory or time.
_PLAIN_NAME = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter)"
    r"|torch(\.storage)? \w+Storage"
    r"|torch (Size|device|(bfloat|float|u?int)\d+|bool|float8_\w+)"
)


class TorchFile(ListedSource):
    """The tensors of one .pt or .pth file of this machine.

    A dictionary of tensors is expected, by itself or as the entry "model" or "state_dict" of another one. Entries
    that are no tensors (a step count, options) are left out: whoever needs a weight asks for it by name.

    Raises:
        CheckpointError: the file is damaged, holds code, no tensors, or tensors that are not plain arrays.
    """

    def __init__(self, file: MappedFile | PlainFile) -> None:
        self.location = file.location
        self._file = file
        zipped = bytes(file.read(0, min(4, file.size)).numpy()) == b"PK\x03\x04"
        members = _look_through(file, zipped)
        self._tensors = _load(file, zipped)
        self.infos = {name: _describe(file, name, tensor) for name, tensor in self._tensors.items()}
        self._begins = {name: _begin(file, name, tensor, members) for name, tensor in self._tensors.items() if zipped}

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        """A view where the file is mapped; transposed tensors are copied into row order."""
        info, tensor = self.info(name), self._tensors[name]
        first, last = row_range(rows, info.shape, name)
        shape = info.shape if rows is None else (last - first, *matrix_shape(info.shape)[1:])
        if name not in self._begins:
            return tensor.reshape(matrix_shape(info.shape) or (1,))[first:last].reshape(shape).contiguous()
        begin, size = self._begins[name], info.dtype.itemsize
        if tensor.is_contiguous():
            row = math.prod(matrix_shape(info.shape)[1:]) * size
            return as_tensor(self._file.read(begin + first * row, begin + last * row), info.dtype, shape)
        spread = sum((n - 1) * step for n, step in zip(info.shape, tensor.stride(), strict=True)) + 1
        data = as_tensor(self._file.read(begin, begin + spread * size), info.dtype, (spread,))
        whole = data.as_strided(info.shape, tensor.stride())
        return whole.reshape(matrix_shape(info.shape))[first:last].reshape(shape).contiguous()


def _load(file: MappedFile | PlainFile, zipped: bool) -> dict[str, Tensor]:
    """Learn where each tensor lies; of a file older than torch 1.6, read all of them.

    torch's own mapping would be writable, which the system refuses for a file that is larger than its memory, and its
    pages would count as ours. In its fake mode it makes tensors without data that know their places in the file.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode() if zipped else nullcontext():
            return _state(file, torch.load(file.path, map_location="cpu", weights_only=True))
    except CheckpointError:
        raise
    except Exception as error:  # a broken pickle can make the unpickler fail in any way
        raise _broken(file, f"torch cannot load it ({type(error).__name__})") from None


def _begin(file: MappedFile | PlainFile, name: str, tensor: Tensor, members: Sequence[int]) -> int:
    """Return where a tensor's bytes begin in a zip archive, whose members begin or end at ``members``."""
    storage = tensor.untyped_storage()
    begin, nbytes = int(storage._checkpoint_offset or 0), int(storage.nbytes())
    limit = next((end for end in members if end > begin), 0)
    if begin + nbytes > limit:
        raise _broken(file, f"{name!r} should take {nbytes} bytes, of which {limit - begin} are there")
    return begin + int(tensor.storage_offset()) * tensor.dtype.itemsize


def _look_through(file: MappedFile | PlainFile, zipped: bool) -> list[int]:
    """Check a file's pickles without executing them; return where the members of its archive begin or end."""
    try:
        if zipped:
            with zipfile.ZipFile(file.path) as archive, archive.open(_find_pickle(file, archive)) as pickle:
                _check_pickle(file, pickle)
                return sorted([*(member.header_offset for member in archive.infolist()), archive.start_dir])
        else:
            with file.path.open("rb") as pickle:
                for _ in range(LEGACY_PICKLES):
                    _check_pickle(file, pickle)
            return []
    except CheckpointError:
        raise
    except Exception as error:  # damaged archives and pickles fail in many ways
        raise _broken(file, f"its pickle cannot be read ({type(error).__name__})") from None


def _find_pickle(file: MappedFile | PlainFile, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    members = archive.infolist()
    if len({member.filename for member in members}) < len(members):
        raise _broken(file, "its zip archive holds a member twice")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise _broken(file, "its zip archive is compressed, which torch.save never does")
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise CheckpointError(
            f"{file.location}: is a TorchScript archive, which is made of code; this code was not run",
            hint="get the model as .safetensors, which cannot carry code",
        )
    pickles = [member for member in members if member.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
        raise _broken(file, f"expected one data.pkl of at most {MAX_PICKLE_BYTES} bytes")
    return pickles[0]


def _check_pickle(file: MappedFile | PlainFile, pickle: IO[bytes]) -> None:
    begin = pickle.tell()
    for opcode, argument, position in pickletools.genops(pickle):
        if position is not None and position - begin > MAX_PICKLE_BYTES:
            raise _broken(file, f"its pickle is longer than {MAX_PICKLE_BYTES} bytes")
        if opcode.name == "GLOBAL" and _PLAIN_NAME.fullmatch(str(argument)):
            continue
        if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST"):
            what = str(argument).replace(" ", ".") if argument else "functions of its own"
            raise CheckpointError(
                f"{file.location}: holds more than plain tensors: it calls {what}; this code was not run",
                hint="get the model as .safetensors, which cannot carry code",
            )


def _state(file: MappedFile | PlainFile, loaded: Any) -> dict[str, Tensor]:
    """Find the dictionary of tensors, and take the tensors out of it."""
    if isinstance(loaded, Mapping):
        inner = next((loaded[key] for key in WRAPPERS if isinstance(loaded.get(key), Mapping)), loaded)
        tensors = {name: value.detach() for name, value in inner.items() if isinstance(value, Tensor)}
        if tensors and all(isinstance(name, str) for name in tensors):
            return tensors
    found = "Tensor" if isinstance(loaded, Tensor) else f"{type(loaded).__name__} without any"
    raise CheckpointError(
        f"{file.location}: expected a dictionary of tensors by name, found {found}",
        hint="save the model's state_dict() alone",
    )


def _describe(file: MappedFile | PlainFile, name: str, tensor: Tensor) -> TensorInfo:
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(
            f"{file.location}: {name!r} is a tensor of {tensor.dtype} on {tensor.device}, {tensor.layout}; expected a"
            " dense one with values",
            hint="save plain tensors of floats or integers",
        )
    # A tensor may lie on its bytes with stride 0, so that a few of them stand for any number of values.
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"{file.location}: {name!r} has shape {list(tensor.shape)}, but fewer bytes than that",
            hint="save it with .contiguous()",
        )
    return TensorInfo(name, tensor.dtype, tuple(tensor.shape), tensor.nbytes, file.name, DTYPE_NAMES[tensor.dtype])


def _broken(file: MappedFile | PlainFile, why: str) -> CheckpointError:
    return CheckpointError(f"{file.location}: not a whole torch file: {why}", hint=FETCH_AGAIN)
