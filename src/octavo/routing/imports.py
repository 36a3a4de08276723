"""Routing that others have recorded, as a trace of ours: vLLM's routed experts, and what OLMoE's analysis writes.

Whatever is read may be anybody's. Sizes are checked before memory is taken, and nothing is unpickled.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from octavo.errors import CheckpointError, OptionError
from octavo.experts import RoutingTrace
from octavo.experts.trace import MAX_EXPERTS
from octavo.routing.trace import token_pieces
from octavo.storage.files import PlainFile
from octavo.storage.npz import NpzFile
from octavo.tokenizer import Tokenizer

Array = npt.NDArray[Any]
MAX_LINE_BYTES = 256 << 20  # of JSON, which takes some ten times as much once it is read
_HEADER = re.compile(
    rb"\{'descr': '[<|]([iu][1248])', 'fortran_order': (True|False), 'shape': \(([0-9, ]{1,200})\), \}\s*"
)
_VLLM = "vLLM returns routed experts where it runs with --enable-return-routed-experts"
_OLMOE = 'a line is {"input_ids": [...], "exp_ids": [...]}, exp_ids of [tokens, experts chosen, layers]'
_SHAPE = "[tokens, layers, experts chosen]"


def from_vllm(
    source: str | Path | Array,
    *,
    n_experts: int,
    token_ids: Sequence[int] | Array | None = None,
    tokenizer: Tokenizer | None = None,
    label: str | None = None,
    model: str | None = None,
) -> RoutingTrace:
    """The routed experts that vLLM returned.

    A layer in which every token has only zeros is dense, to vLLM, and is left out.

    Args:
        source: `CompletionOutput.routed_experts`, of [tokens, layers, experts chosen], or a file: .npy of it; .npz of
            `routed_experts`, and perhaps `prompt_routed_experts` (which vLLM 0.21 kept apart) and `token_ids`; .json
            of a response of the API, or .jsonl of one a line. Each choice of a response is a document: prompt and
            reply.
        n_experts: of a layer.
        token_ids: of one array, where the source does not say; the reply's last token, which is not routed, may be
            among them.
        tokenizer: gives the tokens their text.
        label: what it is an example of; by default the file's name without its ending.
        model: whose routing it is.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or holds no such routing.
        OptionError: n_experts is out of range, or token_ids fit no array.
    """
    path = None if isinstance(source, np.ndarray) else Path(source)
    if path is None:
        found = [_Sequence("the array", _integers(source, "the array"))]
    elif path.suffix == ".npy":
        found = [_Sequence(str(path), _read_npy(_opened(path), path.stat().st_size, str(path)))]
    elif path.suffix == ".npz":
        found = [_of_npz(path)]
    elif path.suffix in (".json", ".jsonl"):
        found = [one for where, response in _json(path) for one in _of_response(response, where)]
    else:
        raise CheckpointError(f"{path}: expected .npy, .npz, .json or .jsonl", hint=_VLLM)
    if token_ids is not None:
        if len(found) != 1 or found[0].token_ids is not None:
            raise OptionError(f"token_ids are of one array; {found[0].where} needs none", hint="leave them out")
        given = _token_ids(token_ids, len(found[0].ids), "token_ids")
        found = [_Sequence(found[0].where, found[0].ids, given, found[0].n_prompt)]
    label = label or ("vllm" if path is None else path.stem)
    return _trace(_without_dense_layers(found), n_experts, tokenizer, label, model)


def from_olmoe(
    path: str | Path,
    *,
    n_experts: int,
    tokenizer: Tokenizer | None = None,
    label: str | None = None,
    model: str | None = None,
) -> RoutingTrace:
    """The .jsonl that OLMoE's analysis scripts write and read; each line is a document.

    Args:
        path: of lines with `exp_ids`, [tokens, experts chosen, layers], best first, and as a rule `input_ids`.
        n_experts, tokenizer, label, model: as for `from_vllm`.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or holds no such routing.
        OptionError: n_experts is out of range.
    """
    path = Path(path)
    found = []
    for where, row in _json(path, by_line=True):
        if not isinstance(row, dict) or "exp_ids" not in row:
            raise CheckpointError(f"{where}: has no exp_ids", hint=_OLMOE)
        ids = _integers(row["exp_ids"], f"{where}: exp_ids", "[tokens, experts chosen, layers]", _OLMOE)
        ids = ids.transpose(0, 2, 1)
        tokens = row.get("input_ids")
        read = None if tokens is None else _token_ids(tokens, len(ids), f"{where}: input_ids", spare=0)
        found.append(_Sequence(where, ids, read))
    return _trace(found, n_experts, tokenizer, label or path.stem, model)


@dataclass(frozen=True)
class _Sequence:
    """Routing of one document: ids of [tokens, layers, experts chosen], of any integer dtype.

    `n_prompt` of the tokens were a prompt, where that is known.
    """

    where: str
    ids: Array
    token_ids: Array | None = None
    n_prompt: int | None = None


def _trace(
    found: Sequence[_Sequence], n_experts: int, tokenizer: Tokenizer | None, label: str, model: str | None
) -> RoutingTrace:
    if not 1 <= n_experts <= MAX_EXPERTS:
        raise OptionError(f"there are {n_experts} experts; expected 1 to {MAX_EXPERTS}", hint="such as 8, of Mixtral's")
    first = found[0]
    for one in found:
        if one.ids.shape[1:] != first.ids.shape[1:]:
            (layers, top_k), (others, other_k) = first.ids.shape[1:], one.ids.shape[1:]
            raise CheckpointError(
                f"{one.where}: is of {others} layers and {other_k} experts a token; "
                f"{first.where} is of {layers} and {top_k}",
                hint="import what different models did one by one",
            )
        _check(one, n_experts)
    lengths = [len(one.ids) for one in found]
    tokens = [one.token_ids for one in found if one.token_ids is not None]
    known = len(tokens) == len(found)
    told = [one.n_prompt for one in found if one.n_prompt is not None]
    split = zip(told, lengths, strict=True) if len(told) == len(found) else None
    return RoutingTrace(
        np.concatenate([one.ids.astype(np.int16) for one in found]),
        np.concatenate(tokens) if known else None,
        documents=np.repeat(np.arange(len(found), dtype=np.int32), lengths),
        decoded=None if split is None else np.concatenate([np.arange(length) >= prompt for prompt, length in split]),
        pieces=_pieces(tokens, tokenizer) if known and tokenizer is not None else None,
        labels=(label,) * len(found),
        n_experts=n_experts,
        model=model,
    )


def _check(one: _Sequence, n_experts: int) -> None:
    """See that it is a trace by itself, so that an error can say where it is not."""
    low, high = int(one.ids.min()), int(one.ids.max())
    if low < 0:
        hint = "vLLM marks tokens so that it did not compute: turn its prefix caching off, or update it"
        raise CheckpointError(f"{one.where}: holds the expert {low}; expected 0 to {n_experts - 1}", hint=hint)
    if high >= n_experts:
        raise CheckpointError(
            f"{one.where}: holds the expert {high}; expected 0 to {n_experts - 1}", hint="how many experts has a layer?"
        )
    try:
        RoutingTrace(one.ids.astype(np.int16), n_experts=n_experts)
    except OptionError as error:
        raise CheckpointError(f"{one.where}: {error.message}", hint="was it recorded as a whole?") from None


def _without_dense_layers(found: Sequence[_Sequence]) -> list[_Sequence]:
    shapes = {one.ids.shape[1:] for one in found}
    if len(shapes) != 1 or found[0].ids.shape[2] == 1:  # of one expert a token, 0 may be a choice
        return list(found)
    routed = np.any([one.ids.any(axis=(0, 2)) for one in found], axis=0)
    if not routed.any():
        hint = "vLLM leaves zeros where its kernels do not tell; try another MoE backend"
        raise CheckpointError(f"{found[0].where}: holds nothing but zeros", hint=hint)
    return [_Sequence(one.where, one.ids[:, routed], one.token_ids, one.n_prompt) for one in found]


def _pieces(tokens: Sequence[Array], tokenizer: Tokenizer) -> tuple[str, ...]:
    return tuple(piece for ids in tokens for piece in token_pieces(tokenizer, ids.tolist()))


# ---------------------------------------- vLLM's forms


def _of_npz(path: Path) -> _Sequence:
    file = NpzFile(PlainFile(path))
    if "routed_experts" not in file:
        there = ", ".join(file.names()[:5]) or "nothing"
        raise CheckpointError(f"{path}: holds no routed_experts (it holds {there})", hint=_VLLM)
    where = f"{path}: routed_experts"
    ids, n_prompt = _integers(file.read("routed_experts").numpy(), where, empty="prompt_routed_experts" in file), None
    if "prompt_routed_experts" in file:
        prompt = _integers(file.read("prompt_routed_experts").numpy(), f"{path}: prompt_routed_experts")
        ids, n_prompt = _joined(prompt, ids, where), len(prompt)
    tokens = file.read("token_ids").numpy() if "token_ids" in file else None
    read = None if tokens is None else _token_ids(tokens, len(ids), f"{path}: token_ids")
    return _Sequence(str(path), ids, read, n_prompt)


def _of_response(response: Any, where: str) -> Iterator[_Sequence]:
    """The choices of an API's response."""
    choices = response.get("choices") if isinstance(response, dict) else None
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
        raise CheckpointError(f"{where}: has no choices; expected a response of vLLM's API", hint=_VLLM)
    apart = response.get("prompt_routed_experts")
    for number, choice in enumerate(choices):
        at = f"{where}, choice {number}"
        routed = choice.get("routed_experts")
        if routed is None and apart is None:
            raise CheckpointError(f"{at}: has no routed_experts", hint=_VLLM)
        prompt_ids = choice.get("prompt_token_ids") or response.get("prompt_token_ids")
        reply_ids = choice.get("token_ids")
        if apart is None:
            ids = _encoded(routed, f"{at}: routed_experts")
            n_prompt = _n_prompt(prompt_ids, response)
        else:
            prompt = _encoded(apart, f"{where}: prompt_routed_experts")
            ids, n_prompt = prompt, len(prompt)
            if routed not in (None, []):
                ids = _joined(prompt, _encoded(routed, f"{at}: routed_experts", empty=True), at)
        tokens = None
        if prompt_ids is not None and reply_ids is not None:
            if not isinstance(prompt_ids, list) or not isinstance(reply_ids, list):
                raise CheckpointError(f"{at}: token ids are no list", hint=_VLLM)
            tokens = _token_ids([*prompt_ids, *reply_ids], len(ids), f"{at}: prompt_token_ids and token_ids")
        if n_prompt is not None and not 0 <= n_prompt <= len(ids):
            raise CheckpointError(f"{at}: has a prompt of {n_prompt} tokens, but {len(ids)} are routed", hint=_VLLM)
        yield _Sequence(at, ids, tokens, n_prompt)


def _n_prompt(prompt_ids: Any, response: Mapping[str, Any]) -> int | None:
    if isinstance(prompt_ids, list):
        return len(prompt_ids)
    usage = response.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return count if type(count) is int else None


def _encoded(value: Any, where: str, *, empty: bool = False) -> Array:
    """Nested lists, or a .npy file in base64."""
    if not isinstance(value, str):
        return _integers(value, where, empty=empty)
    try:
        data = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise CheckpointError(f"{where}: is no base64 ({error})", hint=_VLLM) from None
    return _read_npy(io.BytesIO(data), len(data), where, empty=empty)


def _joined(prompt: Array, reply: Array, where: str) -> Array:
    if not len(reply):
        return prompt
    if prompt.shape[1:] != reply.shape[1:]:
        raise CheckpointError(f"{where}: the prompt is {list(prompt.shape)}, the reply {list(reply.shape)}", hint=_VLLM)
    return np.concatenate([prompt, reply])


# ---------------------------------------- numbers of unknown origin


def _integers(value: Any, where: str, shape: str = _SHAPE, hint: str = _VLLM, *, empty: bool = False) -> Array:
    """An array of three dimensions, none of them 0; or of no tokens, where that may be.

    Raises:
        CheckpointError: it is something else.
    """
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError, RecursionError):
        raise CheckpointError(f"{where}: is not {shape}: lists in it have different lengths", hint=hint) from None
    if empty and 0 in array.shape[:1]:
        return np.empty((0, 1, 1), np.int16)
    if array.dtype.kind not in "iu" and array.size:
        raise CheckpointError(f"{where}: is {array.dtype}; expected integers", hint=hint)
    if array.ndim != 3 or not array.size:
        raise CheckpointError(f"{where}: is {list(array.shape)}; expected {shape}, one token at least", hint=hint)
    return array


def _token_ids(value: Any, n_tokens: int, where: str, *, spare: int = 1) -> Array:
    """As many token ids as tokens, of up to so many more.

    Raises:
        CheckpointError: there are others, or they are no token ids.
    """
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError, RecursionError):
        raise CheckpointError(f"{where}: expected a list of token ids", hint="integers from 0 up") from None
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.min(initial=0) < 0 or array.max(initial=0) >= 1 << 31:
        raise CheckpointError(f"{where}: expected a list of token ids", hint="integers from 0 up")
    if not 0 <= len(array) - n_tokens <= spare:
        raise CheckpointError(
            f"{where}: there are {len(array)} token ids, and {n_tokens} tokens are routed",
            hint="the last token of a reply is not routed; are the ids of another text?",
        )
    return array[:n_tokens].astype(np.int64)


# ---------------------------------------- files of unknown origin


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})", hint="is it there, and a file?") from None


def _read_npy(file: IO[bytes], size: int, where: str, *, empty: bool = False) -> Array:
    """A .npy file of integers, with the header that numpy writes; see numpy.lib.format."""

    def broken(why: str) -> CheckpointError:
        return CheckpointError(f"{where}: {why}", hint="save the array with numpy.save; Python objects are not read")

    with file:
        head = file.read(10)
        if head[:7] != b"\x93NUMPY\x01" or len(head) < 10:
            raise broken("is no .npy file of version 1")
        length = int.from_bytes(head[8:10], "little")
        header = file.read(length)
        found = _HEADER.fullmatch(header)
        if found is None:
            raise broken("its header tells of no array of integers")
        dtype, shape = np.dtype(found[1].decode()), tuple(int(n) for n in re.findall(rb"[0-9]+", found[3]))
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes != size - 10 - length:
            raise broken(f"{list(shape)} of {dtype} take {nbytes} bytes, it has {size - 10 - length}")
        array = np.frombuffer(file.read(nbytes), dtype)
    return _integers(array.reshape(shape, order="F" if found[2] == b"True" else "C"), where, empty=empty)


def _json(path: Path, *, by_line: bool = False) -> list[tuple[str, Any]]:
    """What a .json file holds, or each line of a .jsonl file, and where."""
    found = []
    by_line = by_line or path.suffix == ".jsonl"
    with _opened(path) as file:
        for number in range(1, 1 << 62):
            data = file.readline(MAX_LINE_BYTES + 1) if by_line else file.read(MAX_LINE_BYTES + 1)
            if not data:
                break
            where = f"{path}, line {number}" if by_line else str(path)
            if len(data) > MAX_LINE_BYTES:
                raise CheckpointError(
                    f"{where}: is longer than {MAX_LINE_BYTES >> 20} MiB",
                    hint="one response or text a line of a .jsonl",
                )
            if data.strip():
                found.append((where, _parsed(data, where)))
    if not found:
        raise CheckpointError(f"{path}: is empty", hint="was it written as a whole?")
    return found


def _parsed(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not JSON ({error})", hint="was it written as a whole?") from None
