"""Routers and experts of a model by their weights alone: one matrix at a time, near or far, in any layout."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from octavo.checkpoint import Checkpoint, open_checkpoint
from octavo.errors import CheckpointError, OptionError
from octavo.hub import REPO_ID, BaseMoE, RemoteFolder, find_moe
from octavo.hub.experts import LogicalTensor
from octavo.hub.families import Layout, choose_layout, family_of
from octavo.hub.models import MATRICES, MatrixName
from octavo.storage.files import place_of

PARALLEL = 4  # routers of a distant model on their way at a time: each lies alone in its shard


class ExpertWeights(ABC):
    """The routers and experts of one model.

    Attributes:
        name: as it was asked for: a path, a Hub id, or "menny".
        revision: the commit that is read; None for what is no repository.
        n_layers: dense ones included.
        n_experts: in a sparse layer; shared experts are not counted.
        top_k: experts that a token is sent to.
        sparse_layers: the layers that have a router.
        remote: whether it is read from the Hub.
    """

    name: str
    revision: str | None
    n_layers: int
    n_experts: int
    top_k: int
    sparse_layers: tuple[int, ...]
    remote: bool

    @property
    @abstractmethod
    def fetched(self) -> int:
        """Bytes received over the network so far."""

    @abstractmethod
    def _read_router(self, layer: int) -> Tensor: ...

    @abstractmethod
    def _read_expert(self, layer: int, expert: int, matrix: MatrixName) -> Tensor: ...

    @abstractmethod
    def _expert_nbytes(self, layer: int, expert: int, matrix: MatrixName) -> int: ...

    def router(self, layer: int) -> Tensor:
        """Return a layer's router, float32 [experts, dim].

        Raises:
            OptionError: there is no such layer, or it is dense.
            CheckpointError: the tensor is missing or damaged.
            HubError: it cannot be fetched.
        """
        self.check_layer(layer)
        router = _own(self._read_router(layer)).float()
        if router.ndim != 2 or router.shape[0] != self.n_experts:
            raise CheckpointError(
                f"{self.name}: the router of layer {layer} has shape {list(router.shape)}, "
                f"expected [{self.n_experts}, dim]",
                hint="is this the configuration that came with these weights?",
            )
        return router

    def routers(self, layers: Sequence[int] | None = None) -> list[Tensor]:
        """Return the routers of several layers, by default of all that have one; a few at a time from the Hub."""
        chosen = self.choose_layers(layers)
        if not self.remote or len(chosen) == 1:
            return [self.router(layer) for layer in chosen]
        for layer in chosen:  # headers one after the other, so that none is fetched twice
            self._router_header(layer)
        with ThreadPoolExecutor(PARALLEL) as pool:
            return list(pool.map(self.router, chosen))

    @abstractmethod
    def _router_header(self, layer: int) -> None: ...

    def expert(self, layer: int, expert: int, matrix: MatrixName) -> Tensor:
        """Return one matrix of one expert, [out, in], of the stored dtype (of the dequantised one where quantised).

        It is memory of its own: nothing of the file stays in memory when it is let go.

        Args:
            layer: which; one of ``sparse_layers``.
            expert: 0 to ``n_experts`` - 1.
            matrix: "w1" (gate, [hidden, dim]), "w2" (down, [dim, hidden]) or "w3" (up, as w1).

        Raises:
            OptionError: there is no such layer, expert or matrix.
            CheckpointError: the tensor is missing or damaged, or kept in a way that is not known.
            HubError: it cannot be fetched.
        """
        self.check_layer(layer)
        if matrix not in MATRICES or not 0 <= expert < self.n_experts:
            raise OptionError(
                f"{self.name}: has no expert {expert!r}, matrix {matrix!r}",
                hint=f"experts are 0 to {self.n_experts - 1}, matrices {', '.join(MATRICES)}",
            )
        tensor = _own(self._read_expert(layer, expert, matrix))
        if tensor.ndim != 2 or not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
            raise CheckpointError(
                f"{self.name}: {matrix} of expert {expert} in layer {layer} is {list(tensor.shape)} of {tensor.dtype}, "
                "expected a matrix of float32, bfloat16 or float16",
                hint="is it quantised in a way that Octavo does not know?",
            )
        return tensor

    def experts_nbytes(self, layers: Sequence[int] | None = None) -> int:
        """Return the bytes that all experts of some layers take as they are stored, reckoned from the first expert."""
        chosen = self.choose_layers(layers)
        one = sum(self._expert_nbytes(chosen[0], 0, matrix) for matrix in MATRICES)
        return one * self.n_experts * len(chosen)

    def check_layer(self, layer: int) -> None:
        """Refuse a layer without experts.

        Raises:
            OptionError: there is no such layer, or it is dense.
        """
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < self.n_layers:
            raise OptionError(
                f"{self.name}: has no layer {layer!r}",
                hint=f"there are {self.n_layers}: layers 0 to {self.n_layers - 1}",
            )
        if layer not in self.sparse_layers:
            raise OptionError(
                f"{self.name}: layer {layer} is dense, it has no router and no experts",
                hint=f"the layers that have are {_ranges(self.sparse_layers)}",
            )

    def choose_layers(self, layers: Sequence[int] | None) -> tuple[int, ...]:
        """Return the layers that are meant, in order and each once: by default all that have experts.

        Raises:
            OptionError: none, or one that does not exist or is dense.
        """
        if layers is None:
            return self.sparse_layers
        for layer in layers:
            self.check_layer(layer)
        if not layers:
            raise OptionError(f"{self.name}: no layer is asked for", hint="give one or more, such as 0,15")
        return tuple(sorted(set(layers)))


class _Mixtral(ExpertWeights):
    """A Mixtral-class checkpoint in any layout, by canonical names."""

    def __init__(self, name: str, checkpoint: Checkpoint) -> None:
        args = checkpoint.args
        if args.moe is None:
            raise dense(name)
        self.name, self.checkpoint = name, checkpoint
        self.revision = _commit(checkpoint)
        self.remote = isinstance(checkpoint.folder, RemoteFolder)
        self.n_layers, self.n_experts, self.top_k = args.n_layers, args.moe.num_experts, args.moe.num_experts_per_tok
        self.sparse_layers = tuple(range(args.n_layers))

    @property
    def fetched(self) -> int:
        return _fetched(self.checkpoint)

    def _read_router(self, layer: int) -> Tensor:
        return self.checkpoint.read(f"layers.{layer}.feed_forward.gate.weight")

    def _router_header(self, layer: int) -> None:
        self.checkpoint.info(f"layers.{layer}.feed_forward.gate.weight")

    def _read_expert(self, layer: int, expert: int, matrix: MatrixName) -> Tensor:
        return self.checkpoint.read(f"layers.{layer}.feed_forward.experts.{expert}.{matrix}.weight")

    def _expert_nbytes(self, layer: int, expert: int, matrix: MatrixName) -> int:
        return self.checkpoint.info(f"layers.{layer}.feed_forward.experts.{expert}.{matrix}.weight").nbytes


class _Family(ExpertWeights):
    """Any other family of the Hub's, by the table of `octavo.hub.families`."""

    def __init__(self, name: str, checkpoint: Checkpoint, moe: BaseMoE) -> None:
        self.name, self.checkpoint, self._moe = name, checkpoint, moe
        self.revision = _commit(checkpoint)
        self.remote = isinstance(checkpoint.folder, RemoteFolder)
        assert moe.top_k is not None  # find_moe finds it
        self.n_layers, self.n_experts, self.top_k = moe.n_layers, moe.n_experts, moe.top_k
        self.sparse_layers = tuple(layer for layer in range(moe.n_layers) if moe.layer_kind(layer) == "sparse")
        family = family_of(checkpoint.config, f"{checkpoint.location}/config.json")
        # Read from the checkpoint's own source, which maps no file for longer than a tensor is used.
        self._layout: Layout = choose_layout(
            family.layouts, checkpoint.stored.names(), self.sparse_layers, checkpoint.location
        )

    @property
    def fetched(self) -> int:
        return _fetched(self.checkpoint) + self._moe.fetched

    def _read_router(self, layer: int) -> Tensor:
        return self.checkpoint.stored.read(self._layout.router.format(layer=layer))

    def _router_header(self, layer: int) -> None:
        self.checkpoint.stored.info(self._layout.router.format(layer=layer))

    def _read_expert(self, layer: int, expert: int, matrix: MatrixName) -> Tensor:
        return self._tensor(layer, expert, matrix).read()

    def _expert_nbytes(self, layer: int, expert: int, matrix: MatrixName) -> int:
        return self._tensor(layer, expert, matrix).nbytes

    def _tensor(self, layer: int, expert: int, matrix: MatrixName) -> LogicalTensor:
        place = self._layout.matrices[MATRICES.index(matrix)]
        router = self._layout.router.format(layer=layer)
        return LogicalTensor(self.checkpoint.stored, place, layer, expert, self.n_experts, router)


def open_weights(model: str | Path, revision: str | None = None) -> ExpertWeights:
    """Open a model's routers and experts; nothing but names and headers is read yet.

    One rule says how: what `octavo.checkpoint` knows as a Mixtral, in whatever layout (Hugging Face, Mistral, MLX,
    GGUF, gpt-fast, our own stores), is read through it; every other model by the table of families, `octavo.hub`.

    Args:
        model: a folder or weights file, "owner/name" on the Hub, or "menny", the shipped model.
        revision: branch, tag or commit, for a Hub id.

    Raises:
        CheckpointError: there is no such model, it is dense, or its tensors are not those of its configuration.
        ConfigError: it is of no known family, or its configuration makes no sense.
        OptionError: a revision of what is no Hub id.
        HubError: there is no such repository or revision, or the Hub cannot be reached.
    """
    from octavo.llm import SHIPPED, shipped_model

    name = str(model)
    if name == SHIPPED and revision is None:
        model = shipped_model()
    # What is fetched is kept, so that it is fetched once; what lies here is not mapped: mapped pages count as memory.
    remote = isinstance(model, str) and REPO_ID.fullmatch(model) is not None and not os.path.exists(model)
    checkpoint = open_checkpoint(model, revision, mapped=remote)
    if checkpoint.layout is not None:
        return _Mixtral(name, checkpoint)
    if checkpoint.metadata or Path(os.path.expanduser(model)).is_file():
        checkpoint.check()  # says what is amiss: the table knows only folders of safetensors
    return _Family(name, checkpoint, find_moe(model, revision))


def dense(name: str) -> CheckpointError:
    """What to say of a model without experts."""
    return CheckpointError(
        f"{name}: is a dense model, it has neither routers nor experts", hint="give a mixture of experts"
    )


def _own(tensor: Tensor) -> Tensor:
    """The same values, with nothing of a mapped file left in memory."""
    place = place_of(tensor)
    if place is None:
        return tensor
    tensor = tensor.clone()
    place.file.let_go()
    return tensor


def _commit(checkpoint: Checkpoint) -> str | None:
    return checkpoint.folder.commit if isinstance(checkpoint.folder, RemoteFolder) else None


def _fetched(checkpoint: Checkpoint) -> int:
    return checkpoint.folder.fetched if isinstance(checkpoint.folder, RemoteFolder) else 0


def _ranges(layers: Sequence[int]) -> str:
    """[1, 2, 3, 5] as "1-3, 5"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
