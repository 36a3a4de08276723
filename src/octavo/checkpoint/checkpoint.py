"""A checkpoint of any layout as one source of tensors, under canonical names and in canonical form."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from octavo.args import ModelArgs
from octavo.checkpoint.config import CONFIG, read_args, read_config, read_eos_ids
from octavo.checkpoint.names import STORES, Layout, Part, Stored, recognise, stored_tensors
from octavo.errors import CheckpointError, ConfigError, OptionError
from octavo.hub import REPO_ID, RemoteFolder, download_small
from octavo.quant.formats import Packed
from octavo.storage.files import MappedFile, PlainFile
from octavo.storage.folder import Folder, LocalFolder
from octavo.storage.packed import undo_packing
from octavo.storage.packed_octavo import StoreFile, declares_store, open_shard, store_file
from octavo.storage.safetensors import INDEX, SINGLE, ShardedSafetensors
from octavo.storage.source import MergedSource, Rows, TensorInfo, TensorSource, row_range
from octavo.tokenizer import Tokenizer

IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Stored by old writers, computed by every reader."""
SPLIT = re.compile(r"-(\d{5})-of-\d{5}\.gguf$")
GGUF_ENDS = tuple(f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom"))
MAX_STACKED_EXPERTS = 16_384
"""In all layers together; they are listed before the tensor that they lie in is looked at."""
VERIFIERS = 2  # threads; one of them may be waiting for the disk


class Checkpoint(TensorSource):
    """The weights of a model folder, file or repository, in whatever layout they lie there.

    A Mixtral-class model's tensors have canonical names (see `octavo.checkpoint.names`): its names, ``info`` and
    ``read`` are the same for every layout. The names on disk can be asked for too, and give the tensors as they lie
    there. Of another family's checkpoint only those are known.

    Attributes:
        stored: the tensors by their names on disk, quantisation undone.
        folder: the files.
        metadata: of a GGUF file; {} for every other kind.
        config: config.json; {} where there is none, and beside a GGUF file.
    """

    def __init__(
        self, folder: Folder, stored: TensorSource, metadata: Mapping[str, Any], config: Mapping[str, Any]
    ) -> None:
        self.location = stored.location if metadata else folder.location
        self.folder = folder
        self.metadata = metadata
        self.config = config
        self.stored = undo_packing(stored, config)

    @functools.cached_property
    def args(self) -> ModelArgs:
        """The model's shape.

        Raises:
            ConfigError: nothing tells it, what tells it makes no sense, or the architecture is another one.
        """
        if self.metadata:
            from octavo.storage.gguf_args import gguf_model_args

            return gguf_model_args(self.metadata, self.stored)
        return read_args(self.folder, self.config, self.stored)

    @functools.cached_property
    def layout(self) -> Layout | None:
        """How the tensors are named and lie on disk; None for a model that is no Mixtral or Mistral."""
        try:
            found = recognise(self.stored.names(), self.args, lambda name: self.stored.info(name).shape)
        except ConfigError:
            return None
        return STORES[found] if found in STORES and self.is_store else found

    @property
    def layout_name(self) -> str:
        """The layout's short name, such as "hf" or "gguf"; "unknown" for another family."""
        return self.layout.name if self.layout else "unknown"

    @functools.cached_property
    def is_store(self) -> bool:
        """Whether it is a store of `octavo quantize`, whose tensors `packed` gives as they lie there."""
        return any(store_file(self.stored, name) is not None for name in self.stored.names()[:1])

    @functools.cached_property
    def _places(self) -> dict[str, tuple[Stored, Part]]:
        """Where each canonical tensor lies."""
        if self.layout is None:
            return {}
        self._check_counts(self.layout)
        return {p.canonical: (s, p) for s in stored_tensors(self.layout, self.args) for p in s.parts}

    def names(self) -> list[str]:
        """Canonical names of the tensors that are there, layer by layer; names on disk for an unknown family."""
        present = set(self.stored.names())
        return [name for name, (s, _) in self._places.items() if s.name in present] or self.stored.names()

    def __contains__(self, name: object) -> bool:
        place = self._places.get(name) if isinstance(name, str) else None
        return name in self.stored if place is None else place[0].name in self.stored

    def info(self, name: str) -> TensorInfo:
        """Of a canonical tensor, or of one on disk. A canonical one's bytes are its share of what is on disk."""
        if name not in self._places:
            return self.stored.info(name)
        stored, part = self._places[name]
        whole = self.stored.info(stored.name)
        if whole.shape != stored.shape:
            raise CheckpointError(
                f"{self.location}: {stored.name} has shape {list(whole.shape)}, expected {list(stored.shape)}",
                hint="is this the config.json that came with these weights?",
            )
        nbytes = whole.nbytes * math.prod(part.shape) // math.prod(stored.shape)
        return TensorInfo(name, whole.dtype, part.shape, nbytes, whole.file, whole.encoding)

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        """Read a canonical tensor, or one as it lies on disk; a view of the file where layout and format allow it."""
        if name not in self._places:
            return self.stored.read(name, rows)
        info = self.info(name)
        stored, part = self._places[name]
        first, last = row_range(rows, info.shape, name)
        transform = stored.transform
        if transform.by_row:
            whole = len(stored.parts) == 1 and rows is None
            tensor = self.stored.read(stored.name, None if whole else (part.first + first, part.first + last))
            return tensor.view(last - first, *info.shape[1:])
        tensor = transform.read(self.stored.read(stored.name, (part.first, part.last)), self.args)
        return tensor if rows is None else tensor[first:last]

    def packed(self, name: str) -> Packed | None:
        """Return a quantised matrix of a store as the kernels read it: a view of a mapped file, not compared with its
        checksum.

        Returns:
            None for what is no quantised matrix of a store.

        Raises:
            CheckpointError: there is no such tensor, or its shape is another than the model's.
        """
        file, name = self._in_store(name)
        return None if file is None else file.packed(name)

    def compare(self, name: str, parts: Iterable[memoryview]) -> None:
        """Compare the bytes of a store's tensor, which somebody else has read, with their checksum.

        Nothing is compared where there are none, in what is no store.

        Raises:
            CheckpointError: they are others than were written, or there is no such tensor.
        """
        file, name = self._in_store(name)
        if file is not None:
            file.compare(name, parts)

    def _in_store(self, name: str) -> tuple[StoreFile | None, str]:
        """The file that holds a tensor if it is a store's, and what the tensor is called there."""
        self.info(name)
        place = self._places.get(name)
        name = name if place is None else place[0].name
        return store_file(self.stored, name), name

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Compare every tensor of a store with its checksum.

        Args:
            progress: called with a number of bytes that were found to be right, from time to time.

        Raises:
            CheckpointError: a tensor is damaged; the message names it and its file. Or this is no store.
        """
        if not self.is_store:
            raise CheckpointError(
                f"{self.location}: has no checksums (layout {self.layout_name})",
                hint="stores have, which `octavo quantize` writes",
            )
        files = ((name, store_file(self.stored, name)) for name in self.stored.names())
        tasks = [functools.partial(file.verify, name) for name, file in files if file is not None]
        with ThreadPoolExecutor(VERIFIERS) as pool:
            for nbytes in pool.map(lambda task: task(), tasks):
                if progress:
                    progress(nbytes)

    def check(self) -> None:
        """Compare every name, shape and dtype with the model's, both ways, before anything is read.

        Raises:
            CheckpointError: tensors are missing, misshapen or unknown; the message names all of them.
            ConfigError: see `args`.
        """
        args, layout = self.args, self.layout
        if layout is None:
            names = self.stored.names()
            raise CheckpointError(
                f"{self.location}: the tensors follow no known layout (the first is {names[0]!r})"
                if names
                else f"{self.location}: holds no tensor",
                hint="Octavo reads the layouts of Hugging Face, Mistral, MLX, llama.cpp and gpt-fast",
            )
        self._check_counts(layout)
        present = set(self.stored.names())
        expected = {stored.name: stored.shape for stored in stored_tensors(layout, args)}
        problems: list[str] = []
        for name, shape in expected.items():
            if name not in present:
                problems.append(f"{name} is missing")
                continue
            info = self.stored.info(name)
            if info.shape != shape:
                problems.append(f"{name} has shape {list(info.shape)}, expected {list(shape)}")
            elif not info.dtype.is_floating_point:
                problems.append(f"{name} has dtype {info.dtype}, expected a floating-point one")
        tied = {rule.stored for rule in layout.rules if rule.parts == ("output.weight",)}  # some store it twice
        known = expected.keys() | (tied if args.tie_embeddings else set())
        problems += [f"{n} is not part of this model" for n in sorted(present - known) if not IGNORED.fullmatch(n)]
        if problems:
            raise CheckpointError(
                f"{self.location}: weights and configuration do not fit each other: " + "; ".join(problems),
                hint="is this the config.json that came with these weights?",
            )

    def _check_counts(self, layout: Layout) -> None:
        """Refuse more layers and experts than the tensors could be of: to list billions would take for ever."""
        args, count = self.args, len(self.stored.names())
        experts = args.moe.num_experts if args.moe else 1
        apart = any("{expert}" in rule.stored for rule in layout.rules)
        limit = count if apart else max(count, MAX_STACKED_EXPERTS)
        if args.n_layers > count or args.n_layers * experts > limit:
            kind = f" of {experts} experts" if args.moe else ""
            raise CheckpointError(
                f"{self.location}: described as {args.n_layers} layers{kind}, which {count} tensors cannot be",
                hint="is this the config.json that came with these weights?",
            )

    @functools.cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """The end-of-text ids of generation_config.json; in a GGUF file those of text, turn and message.

        Raises:
            ConfigError: the file is damaged.
        """
        if self.metadata:
            found = (self.metadata.get(key) for key in GGUF_ENDS)
            return tuple(token_id for token_id in found if type(token_id) is int)
        return read_eos_ids(self.folder)

    def tokenizer(self) -> Tokenizer | None:
        """Read the tokenizer that lies beside the weights, or in a GGUF file.

        Raises:
            TokenizerError: its files are damaged.
        """
        if self.metadata:
            if "tokenizer.ggml.model" not in self.metadata:
                return None
            from octavo.tokenizer.gguf import tokenizer_from_gguf

            return tokenizer_from_gguf(self.metadata, self.location)
        return Tokenizer.from_folder(self.local_folder())

    def local_folder(self) -> Path:
        """Return the folder where the tokenizer's files lie; those of a repository are downloaded first."""
        if isinstance(self.folder, LocalFolder):
            return self.folder.path
        assert isinstance(self.folder, RemoteFolder)
        return download_small(self.folder)


def open_checkpoint(source: str | Path, revision: str | None = None, *, mapped: bool = True) -> Checkpoint:
    """Open a checkpoint in any layout, told by its content.

    Args:
        source: a folder; a weights file in one (a ``.gguf``, or one of several kinds that a folder holds); or text of
            the form "owner/name" that is no folder here: a repository of the Hub, of which only what is asked for is
            fetched.
        revision: branch, tag or commit, for a Hub id.
        mapped: map files into memory, and keep what is fetched in the cache. Otherwise what has been read and let go
            takes neither memory nor disk, as for a model that is read once from end to end.

    Raises:
        CheckpointError: there is no such folder, or no weights in a format Octavo reads.
        HubError: no such repository, or the Hub cannot be reached.
        OptionError: a revision of what is no repository.
    """
    if isinstance(source, str) and REPO_ID.fullmatch(source) and not os.path.exists(source):
        remote = RemoteFolder(source, revision, keep=mapped)
        return _open(remote, _weights(remote))
    path = Path(os.path.expanduser(source))
    if revision is not None:
        raise OptionError(
            f"revision is {revision!r}, but {path} is no Hub id", hint="only repositories of the Hub have revisions"
        )
    if os.path.isfile(path):  # unlike Path's, False where nobody may look
        return _open(LocalFolder(path.parent, mapped=mapped), [path.name])
    if not os.path.isdir(path):
        raise CheckpointError(
            f"{path}: no such folder", hint="give a folder with config.json and weights, a weights file, or a Hub id"
        )
    local = LocalFolder(path, mapped=mapped)
    return _open(local, _weights(local))


def _weights(folder: Folder) -> list[str]:
    """The files that hold the weights; where there are several kinds, the first of safetensors, npz, torch, GGUF."""
    files = folder.files()
    for index in (INDEX, SINGLE, "consolidated.safetensors.index.json"):
        if index in files:
            return [index]
    for suffixes in ((".safetensors",), (".npz",), (".pt", ".pth"), (".gguf",)):
        found = [name for name in files if name.endswith(suffixes)]
        if found:
            return found
    raise CheckpointError(
        f"{folder.location}: holds neither {SINGLE} nor {INDEX}, nor weights of any other kind",
        hint="Octavo reads .safetensors, .npz, .pt, .pth and .gguf",
    )


def _open(folder: Folder, weights: list[str]) -> Checkpoint:
    kind = weights[0].rpartition(".")[2]
    if kind == "gguf":
        from octavo.storage.gguf import open_gguf

        source = open_gguf(folder, _first_split(folder, weights))
        return Checkpoint(folder, source, source.metadata, {} if source.metadata else read_config(folder))
    config = read_config(folder)
    in_store = declares_store(config, f"{folder.location}/{CONFIG}")
    if weights[0].endswith(".safetensors.index.json"):
        sharded = ShardedSafetensors(folder, weights[0], functools.partial(open_shard, in_store=in_store))
        if isinstance(folder, LocalFolder):  # of a distant one, headers are read when they are needed
            sharded.check()
        return Checkpoint(folder, sharded, {}, config)
    sources = [_open_file(folder, name, kind, in_store) for name in weights]
    return Checkpoint(folder, sources[0] if len(sources) == 1 else MergedSource(sources, folder.location), {}, config)


def _first_split(folder: Folder, weights: list[str]) -> str:
    """The one model among GGUF files, by the first of its splits."""
    first = [name for name in weights if not (split := SPLIT.search(name)) or int(split[1]) == 1]
    if len(first) > 1:
        raise CheckpointError(
            f"{folder.location}: holds {len(first)} models: {', '.join(first)}",
            hint=f"give the path of one of them, such as {folder.location}/{first[0]}; one on the Hub, download first",
        )
    return (first or weights)[0]


def _open_file(folder: Folder, name: str, kind: str, in_store: bool) -> TensorSource:
    file = folder.file(name)
    if kind in ("pt", "pth"):
        if not isinstance(file, MappedFile | PlainFile):
            raise CheckpointError(
                f"{file.location}: torch files are read from this machine's disk only",
                hint=f"download it, and give the folder: hf download {folder.location.partition('@')[0]}",
            )
        from octavo.storage.torchfile import TorchFile

        return TorchFile(file)
    if kind == "safetensors":
        return open_shard(file, in_store=in_store)
    if kind == "npz":
        from octavo.storage.npz import NpzFile

        return NpzFile(file)
    raise CheckpointError(
        f"{file.location}: no kind of weights file", hint="Octavo reads .safetensors, .npz, .pt, .pth and .gguf"
    )
