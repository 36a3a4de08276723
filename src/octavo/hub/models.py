"""Routers and experts of a sparse model by the tensor, near or far.

>>> moe = Mixtral8x7B()
>>> moe.get_router_metadata(0).fetch().shape  # 64 KiB of a repository of 93 GB  # doctest: +SKIP
torch.Size([8, 4096])
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, overload

import torch
from torch import Tensor

from octavo.errors import CheckpointError, OptionError
from octavo.hub.client import REPO_ID
from octavo.hub.experts import LogicalTensor
from octavo.hub.families import (
    HINT_CONFIG,
    MISTRAL_PARAMS,
    Counts,
    Layout,
    Matrix,
    choose_layout,
    family_of,
    layouts_like,
    read_counts,
)
from octavo.hub.remote import RemoteFolder
from octavo.storage.files import MappedFile
from octavo.storage.folder import Folder, LocalFolder
from octavo.storage.safetensors import INDEX, SINGLE, SafetensorsFile, ShardedSafetensors
from octavo.storage.source import MergedSource, TensorSource

MatrixName = Literal["w1", "w2", "w3"]
MATRICES: tuple[MatrixName, ...] = ("w1", "w2", "w3")
INDICES = (INDEX, "consolidated.safetensors.index.json")
CONFIG, PARAMS = "config.json", "params.json"


@dataclass
class TensorMetadata:
    """Where a tensor lies, and the ways to get it.

    Attributes:
        model_id: "owner/name" on the Hub, or a folder.
        tensor_name: of the stored tensor; of a stacked one, this object stands for one expert's part.
        hf_filename: the file that holds it.
        local_path: that file on this machine, once `download_file` was called.
        revision: the commit it is read at; None for a folder.
    """

    model_id: str
    tensor_name: str
    hf_filename: str
    local_path: str | None = None
    revision: str | None = field(default=None, repr=False)
    _folder: Folder | None = field(default=None, repr=False, compare=False)
    _logical: LogicalTensor | None = field(default=None, repr=False, compare=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor that `fetch` and `load` return. Reads the file's header."""
        return self._tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor that `fetch` and `load` return; [out, in] for an expert. Reads the file's header."""
        return self._tensor.shape

    @property
    def nbytes(self) -> int:
        """Bytes that `fetch` reads. Reads the file's header.

        Less than the tensor's own where it is stored quantised; more where an expert's gate and up projections lie
        interleaved or transposed in one tensor: either takes the expert's whole part of it.
        """
        return self._tensor.nbytes

    def fetch(self) -> Tensor:
        """Read this tensor's bytes only.

        Returns:
            ``dtype``, ``shape``; quantised experts are dequantised.

        Raises:
            CheckpointError: the file is damaged, or holds something else than the model's family and counts ask for.
            HubError: it cannot be fetched.
        """
        return self._tensor.read()

    def download_file(self) -> str:
        """Download the whole file into the Hub's cache, set ``local_path``, and return it.

        Raises:
            HubError: it cannot be fetched.
        """
        self.local_path = self._download(self.hf_filename)
        return self.local_path

    def load(self) -> Tensor:
        """Read the tensor from the whole file, which is downloaded first if ``local_path`` is not set.

        Returns:
            The same as `fetch`.

        Raises:
            UserError: as `fetch` and `download_file`.
        """
        files = {self.hf_filename: self.local_path or self.download_file()}
        tensor = self._tensor
        for scales in tensor.parts()[1:]:  # may lie in another shard
            name = _file_of(tensor.source, scales)
            files[name] = files.get(name) or self._download(name)
        local = MergedSource([SafetensorsFile(MappedFile(Path(path))) for path in files.values()], self.model_id)
        return replace(tensor, source=local, router=tensor.router if tensor.router in local else None).read()

    def _download(self, name: str) -> str:
        folder = self._home
        return str(folder.download(name) if isinstance(folder, RemoteFolder) else Path(folder.location) / name)

    @property
    def _home(self) -> Folder:
        self._folder = self._folder or _open_folder(self.model_id, self.revision)
        return self._folder

    @property
    def _tensor(self) -> LogicalTensor:
        if self._logical is None:  # made by hand
            file = MappedFile(Path(self.local_path)) if self.local_path else self._home.file(self.hf_filename)
            self._logical = LogicalTensor(SafetensorsFile(file), Matrix(self.tensor_name))
        return self._logical


class BaseMoE:
    """A sparse model by its tensors' names. A subclass says what they are; `find_moe` finds it out.

    Nothing is fetched before it is needed: the list of files and their index for metadata, a header of 64 KiB for
    shapes, a tensor's bytes for the tensor.

    Args:
        model_id: "owner/name" or a folder, in the place of the class's.
        revision: branch, tag or commit, for a Hub id.

    Attributes:
        model_id: "owner/name" on the Hub, or a folder.
        n_experts: in a sparse layer.
        n_layers: dense ones included.
        expert_tensor_name_template: with {layer} and {expert}.
        router_tensor_name_template: with {layer}.
        top_k: experts that a token is sent to, where `find_moe` found it.

    Where the templates are those of a known family, its other layouts are recognised too, such as fused experts.
    """

    model_id: str
    n_experts: int
    n_layers: int
    expert_tensor_name_template: str
    router_tensor_name_template: str
    top_k: int | None = None

    def __init__(self, model_id: str | Path | None = None, revision: str | None = None) -> None:
        if model_id is not None:
            self.model_id = str(model_id)
        self._revision = revision

    @functools.cached_property
    def folder(self) -> Folder:
        """Where the model's files lie.

        Raises:
            HubError: there is no such repository or revision, or the Hub cannot be reached.
            OptionError: a revision is asked for of a folder.
        """
        return _open_folder(self.model_id, self._revision)

    @property
    def revision(self) -> str | None:
        """The commit that everything is read at; None for a folder."""
        return self.folder.commit if isinstance(self.folder, RemoteFolder) else None

    @property
    def fetched(self) -> int:
        """Bytes received over the network so far; 0 for a folder."""
        return self.folder.fetched if isinstance(self.folder, RemoteFolder) else 0

    @functools.cached_property
    def weight_map(self) -> Mapping[str, str]:
        """The name of every tensor, and of the file it lies in."""
        return {name: _file_of(self._source, name) for name in self._source}

    def layer_kind(self, layer: int) -> Literal["sparse", "dense"]:
        """Whether a layer has experts.

        Raises:
            OptionError: there is no such layer.
            CheckpointError: no layer has a router by the name that is known.
        """
        _check_index("layer", layer, min(self.n_layers, self._layers_there))
        return "sparse" if self._layout.router.format(layer=layer) in self.weight_map else "dense"

    def get_router_metadata(self, layer: int) -> TensorMetadata | None:
        """Return where a layer's router lies, [n_experts, hidden]; None for a dense layer, which has none.

        Raises:
            OptionError: there is no such layer.
            UserError: as `folder` and `layer_kind`.
        """
        if self.layer_kind(layer) == "dense":
            return None
        return self._whole(self._layout.router.format(layer=layer))

    @overload
    def get_experts_metadata(self, layer: int, matrix: MatrixName | None = None) -> list[TensorMetadata]: ...

    @overload
    def get_experts_metadata(self, layer: int, matrix: Literal["all"]) -> list[dict[MatrixName, TensorMetadata]]: ...

    def get_experts_metadata(
        self, layer: int, matrix: MatrixName | Literal["all"] | None = None
    ) -> list[TensorMetadata] | list[dict[MatrixName, TensorMetadata]]:
        """Return where a layer's experts lie, one after the other; [] for a dense layer, which has none.

        Args:
            layer: which.
            matrix: "w1" (gate, [intermediate, hidden]), "w2" (down, [hidden, intermediate]), "w3" (up, as w1), or
                "all": a dict of the three for each expert. By default the one that the class's template names.

        Raises:
            OptionError: there is no such layer, or the class's template does not tell how that matrix is called.
            CheckpointError: an expert is missing, or there are more than ``n_experts``.
            UserError: as `folder` and `layer_kind`.
        """
        if self.layer_kind(layer) == "dense":
            return []
        if matrix == "all":
            every = {name: self._experts(layer, self._matrix(name)) for name in MATRICES}
            return [{name: every[name][expert] for name in MATRICES} for expert in range(self.n_experts)]
        return self._experts(layer, self._matrix(matrix))

    get_experts_metdata = get_experts_metadata
    """The published spelling."""

    def get_expert_metadata(self, layer: int, expert: int, matrix: MatrixName | None = None) -> TensorMetadata:
        """Return where one matrix of one expert lies.

        Raises:
            OptionError: there is no such layer or expert; the layer is dense.
            UserError: as `get_experts_metadata`.
        """
        _check_index("expert", expert, self.n_experts)
        experts = self.get_experts_metadata(layer, matrix)
        if not experts:
            raise OptionError(f"{self.model_id}: layer {layer} is dense, it has no experts", hint="take another layer")
        return experts[expert]

    def get_others_metadata(self, layer: int) -> list[TensorMetadata]:
        """Return a sparse layer's further tensors, as its family has them: biases, shared experts; whole tensors.

        Raises:
            UserError: as `layer_kind`.
        """
        if self.layer_kind(layer) == "dense":
            return []
        layout = self._layout
        names = (name.format(layer=layer) for name in layout.router_extras + layout.others)
        return [self._whole(name) for name in names if name in self.weight_map]

    @functools.cached_property
    def _source(self) -> TensorSource:
        return _open_source(self.folder)

    @functools.cached_property
    def _layout(self) -> Layout:
        expert, router = self.expert_tensor_name_template, self.router_tensor_name_template
        layouts = layouts_like(expert, router)
        if layouts:
            return choose_layout(layouts, self.weight_map, range(self.n_layers), self.folder.location)
        if not any(router.format(layer=layer) in self.weight_map for layer in range(self.n_layers)):
            raise CheckpointError(
                f"{self.folder.location}: holds no tensor called {router!r}, with a layer below {self.n_layers}",
                hint="`octavo tensors` lists the names that are there",
            )
        if "{expert}" not in expert:
            raise OptionError(
                f"{expert!r}: the template has no {{expert}}, and is of no known family",
                hint="put it in, or use find_moe",
            )
        own = Matrix(expert)
        return Layout(own, own, own, router)

    @functools.cached_property
    def _layers_there(self) -> int:
        """Layers of which there is any tensor."""
        return 1 + max(_numbers(self._layout.router, self.weight_map), default=self.n_layers)

    def _matrix(self, name: MatrixName | None) -> Matrix:
        template = self.expert_tensor_name_template
        layouts = layouts_like(template, self.router_tensor_name_template)
        if not layouts and name is not None:
            raise OptionError(
                f"matrix={name!r}: {template!r} is the template of no known family, so the others' names are not known",
                hint="leave matrix out, or write a subclass for each",
            )
        if name is None:  # the one at the template's place, in whichever layout this is
            names = [matrix.name for matrix in layouts[0].matrices] if layouts else [template]
            return self._layout.matrices[names.index(template)]
        if name not in MATRICES:
            raise OptionError(f"matrix={name!r}: expected {', '.join(MATRICES)} or all")
        return self._layout.matrices[MATRICES.index(name)]

    def _experts(self, layer: int, matrix: Matrix) -> list[TensorMetadata]:
        if matrix.stored(layer, self.n_experts) in self.weight_map and not matrix.stacked:
            raise CheckpointError(
                f"{self.folder.location}: layer {layer} has more than {self.n_experts} experts",
                hint="find_moe counts them",
            )
        router = self._layout.router.format(layer=layer)
        return [
            self._metadata(LogicalTensor(self._source, matrix, layer, expert, self.n_experts, router))
            for expert in range(self.n_experts)
        ]

    def _whole(self, name: str) -> TensorMetadata:
        return self._metadata(LogicalTensor(self._source, Matrix(name)))

    def _metadata(self, tensor: LogicalTensor) -> TensorMetadata:
        if tensor.name not in self.weight_map:
            raise CheckpointError(
                f"{self.folder.location}: holds no tensor called {tensor.name!r}",
                hint="`octavo tensors` lists the names that are there",
            )
        file = self.weight_map[tensor.name]
        return TensorMetadata(self.model_id, tensor.name, file, None, self.revision, self.folder, tensor)


class Mixtral8x7B(BaseMoE):
    """Mixtral 8x7B, or with another model_id a model of its shape."""

    model_id = "mistralai/Mixtral-8x7B-v0.1"
    n_experts = 8
    n_layers = 32
    expert_tensor_name_template = "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight"
    router_tensor_name_template = "model.layers.{layer}.block_sparse_moe.gate.weight"


def find_moe(model: str | Path, revision: str | None = None) -> BaseMoE:
    """Recognise a sparse model by its configuration and its tensors' names.

    Args:
        model: "owner/name" on the Hub, or a folder.
        revision: branch, tag or commit, for a Hub id.

    Returns:
        The counts of its configuration, and the layout that its tensors have.

    Raises:
        ConfigError: it is of none of the known families (`octavo.hub.families`), or lacks a count.
        CheckpointError: it has no experts, or its tensors are not those that its configuration tells of.
        HubError: there is no such repository or revision, or the Hub cannot be reached.
    """
    moe = BaseMoE(model, revision)
    files = moe.folder.files()
    name = PARAMS if PARAMS in files and CONFIG not in files else CONFIG
    where = f"{moe.folder.location}/{name}"
    config = moe.folder.json(name)
    family = MISTRAL_PARAMS if name == PARAMS else family_of(config, where)
    counts = read_counts(family, config, where)
    layout = choose_layout(family.layouts, moe.weight_map, counts.sparse, moe.folder.location)
    extra = config.get("num_nextn_predict_layers")  # layers that predict further ahead follow the model's own
    _check_counts(layout, counts, moe.weight_map, extra if isinstance(extra, int) else 0, where)
    moe._layout = layout
    moe.n_layers, moe.n_experts, moe.top_k = counts.n_layers, counts.n_experts, counts.top_k
    moe.expert_tensor_name_template, moe.router_tensor_name_template = layout.w1.name, layout.router
    return moe


def _check_counts(layout: Layout, counts: Counts, names: Mapping[str, str], extra: int, where: str) -> None:
    """Refuse a configuration that tells of other layers and experts than there are."""
    there = _numbers(layout.router, names)
    sparse = tuple(layer for layer in range(counts.n_layers) if layout.router.format(layer=layer) in names)
    if not set(range(counts.n_layers)) <= there or max(there) >= counts.n_layers + extra:
        raise CheckpointError(
            f"{where}: tells of {counts.n_layers} layers, the tensors are of layers {min(there)} to {max(there)}",
            hint=HINT_CONFIG,
        )
    if sparse != counts.sparse:
        layer = min(set(sparse) ^ set(counts.sparse))
        said, found = ("sparse", "dense") if layer in counts.sparse else ("dense", "sparse")
        raise CheckpointError(f"{where}: layer {layer} should be {said}, by its tensors it is {found}", HINT_CONFIG)
    for layer in sparse:
        for matrix in layout.matrices:
            one_more = () if matrix.stacked else (matrix.stored(layer, counts.n_experts),)
            wrong = [matrix.stored(layer, e) for e in range(counts.n_experts) if matrix.stored(layer, e) not in names]
            wrong += [name for name in one_more if name in names]
            if wrong:
                state = "is there" if wrong[0] in names else "is missing"
                raise CheckpointError(f"{where}: tells of {counts.n_experts} experts, {wrong[0]} {state}", HINT_CONFIG)


def _numbers(template: str, names: Iterable[str]) -> set[int]:
    """The layers that any tensor is of."""
    start = re.compile(re.escape(template.partition("{layer}")[0]) + r"(\d{1,6})\.")
    return {int(found[1]) for name in names if (found := start.match(name))}


def _open_folder(model_id: str, revision: str | None) -> Folder:
    path = Path(model_id).expanduser()
    if REPO_ID.fullmatch(model_id) and not path.is_dir():
        return RemoteFolder(model_id, revision)
    if revision is not None:
        raise OptionError(
            f"{model_id}: is a folder, which has no revision {revision!r}", hint="revisions are the Hub's; leave it out"
        )
    return LocalFolder(path)


def _open_source(folder: Folder) -> TensorSource:
    files = folder.files()
    for index in INDICES:
        if index in files:
            return ShardedSafetensors(folder, index)
    found = [SINGLE] if SINGLE in files else [name for name in files if name.endswith(".safetensors")]
    if not found:
        raise CheckpointError(
            f"{folder.location}: holds no safetensors weights",
            hint="octavo.checkpoint.open_checkpoint reads more kinds, of Mixtral-class models",
        )
    sources = [SafetensorsFile(folder.file(name)) for name in found]
    return sources[0] if len(sources) == 1 else MergedSource(sources, folder.location)


def _file_of(source: TensorSource, name: str) -> str:
    """Which file holds a tensor; told by an index where there is one, so that no header is read."""
    if isinstance(source, ShardedSafetensors):
        return source.weight_map[name]
    return source.info(name).file


def _check_index(kind: str, value: int, count: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
        raise OptionError(f"{kind} {value!r} is out of range", hint=f"there are {count}: {kind}s 0 to {count - 1}")
