"""Which experts each sequence's tokens are routed to, watched while an engine computes them."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from octavo.engine import Engine
from octavo.errors import OptionError
from octavo.llm import LLM
from octavo.model import Routing

Array = npt.NDArray[Any]


class RoutingWatch:
    """Keeps the experts that watched sequences were routed to; thread-safe.

    One thread steps the engine, any others watch, ask and forget. The model's routers have hooks only as long as
    something is watched: with them the compiled kernels compute a block in parts, to the same result.

    Args:
        source: an engine, or an `LLM`, whose engine is meant.

    Attributes:
        n_layers, n_experts, top_k: of the model.

    Raises:
        OptionError: the model is dense.
    """

    def __init__(self, source: Engine | LLM) -> None:
        self._engine = source.engine if isinstance(source, LLM) else source
        moe = self._engine.model.args.moe
        if moe is None:
            raise OptionError("the model is dense; there is no routing to watch", hint="watch a model of experts")
        self._routers = self._engine.model.routers()
        self.n_layers, self.n_experts, self.top_k = len(self._routers), moe.num_experts, moe.num_experts_per_tok
        self._lock = threading.Lock()
        self._watched: dict[int, list[Array]] = {}
        self._caught: dict[int, tuple[int, list[Array]]] = {}  # unasked for: since which `catch`, and their experts
        self._catching: set[int] = set()
        self._n_catches = 0
        self._hooks: list[RemovableHandle] = []

    def watch(self, seq_id: int) -> None:
        """Keep the experts of this sequence from now on, and those that `catch` has caught."""
        with self._lock:
            _, caught = self._caught.pop(seq_id, (0, []))
            self._watched.setdefault(seq_id, caught)
            self._set_hooks()

    def forget(self, seq_id: int) -> None:
        """Drop what was kept of a sequence, and keep no more; nothing happens if it is not watched."""
        with self._lock:
            self._watched.pop(seq_id, None)
            self._set_hooks()

    @contextmanager
    def catch(self) -> Iterator[None]:
        """Keep the experts of all sequences meanwhile.

        A sequence has no id before it is queued, and may be computed before a `watch` comes: queue and watch it inside.
        What is not watched in the end is dropped.
        """
        with self._lock:
            self._n_catches += 1
            mine = self._n_catches
            self._catching.add(mine)
            self._set_hooks()
        try:
            yield
        finally:
            with self._lock:
                self._catching.remove(mine)
                oldest = min(self._catching, default=math.inf)
                self._caught = {seq_id: one for seq_id, one in self._caught.items() if one[0] >= oldest}
                self._set_hooks()

    def ids(self, seq_id: int, start: int = 0) -> Array:
        """The experts so far.

        Args:
            start: leave out so many of the first tokens.

        Returns:
            [tokens, layers, top_k], int16, best first: of the tokens that were computed for this sequence, prompt and
            reply. A prompt's beginning that was computed for another sequence before is not among them, and the
            reply's last token never is. No tokens for a sequence that is not watched.
        """
        with self._lock:
            kept = self._watched.get(seq_id, [])
            if len(kept) > 1:
                kept[:] = [np.concatenate(kept)]
            whole = kept[0] if kept else np.empty((0, self.n_layers, self.top_k), np.int16)
        return whole[start:]

    def _set_hooks(self) -> None:
        """Hooks on the routers as long as they are needed.

        A forward may be running, and see them from its middle on. Torch copies a module's hooks before it calls
        them, so another thread may add and remove some.
        """
        needed = bool(self._watched or self._catching)
        if needed and not self._hooks:
            forward: list[Tensor] = []  # what the one that runs chose so far, by layer; others' hooks left it elsewhere
            self._hooks = [
                router.register_forward_hook(partial(self._note, forward, layer))
                for layer, router in enumerate(self._routers)
            ]
        elif not needed and self._hooks:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []

    def _note(self, forward: list[Tensor], layer: int, router: nn.Module, inputs: Any, routing: Routing) -> None:
        """Take down a layer; with the last one, give each sequence its rows."""
        if layer == 0:
            forward.clear()
        if layer != len(forward):  # the hooks came when this forward was under way
            return
        forward.append(routing.topk_ids_TK)
        if layer + 1 < self.n_layers:
            return
        computing = self._engine.computing
        if sum(count for _, count in computing) != len(routing.topk_ids_TK):  # not the engine's forward
            return
        ids_TLK = torch.stack(forward, dim=1).to(torch.int16).cpu().numpy()
        with self._lock:
            start = 0
            for seq_id, count in computing:
                kept = self._kept(seq_id)
                if kept is not None:
                    kept.append(ids_TLK[start : start + count].copy())
                start += count

    def _kept(self, seq_id: int) -> list[Array] | None:
        """Where to put a sequence's experts, if anywhere."""
        if seq_id in self._watched:
            return self._watched[seq_id]
        if self._catching:
            return self._caught.setdefault(seq_id, (self._n_catches, []))[1]
        return None
