"""Which experts each sequence's tokens are routed to, watched while an engine computes them."""

from __future__ import annotations

import itertools
import math
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.hooks import RemovableHandle

from octavo.engine import Engine
from octavo.errors import OptionError
from octavo.experts.trace import Routed
from octavo.hooks import observe
from octavo.llm import LLM
from octavo.model import Routing

Array = npt.NDArray[Any]
Computing = tuple[tuple[int, int], ...]
FORWARDS = 64  # so many are shared out at a time: one by one, that would cost a small model 2 % of its time


class RoutingWatch:
    """Keeps the experts that watched sequences were routed to; thread-safe.

    One thread steps the engine, any others watch, ask and forget. The model's routers have hooks only as long as
    something is watched: with them the compiled kernels compute a block in parts, to the same result.

    Args:
        source: an engine, or an `LLM`, whose engine is meant.
        weights, logits: keep these too.

    Attributes:
        n_layers, n_experts, top_k: of the model.

    Raises:
        OptionError: the model is dense.
    """

    def __init__(self, source: Engine | LLM, *, weights: bool = False, logits: bool = False) -> None:
        self._engine = source.engine if isinstance(source, LLM) else source
        moe = self._engine.model.args.moe
        if moe is None:
            raise OptionError("the model is dense; there is no routing to watch", hint="watch a model of experts")
        self._routers = self._engine.model.routers()
        self.n_layers, self.n_experts, self.top_k = len(self._routers), moe.num_experts, moe.num_experts_per_tok
        self._lock = threading.Lock()
        self._weights, self._logits = weights, logits
        self._watched: dict[int, list[Routed]] = {}
        self._caught: dict[int, tuple[int, list[Routed]]] = {}  # unasked for: since which `catch`, and their experts
        self._catching: set[int] = set()
        self._n_catches = 0
        self._hooks: list[RemovableHandle] = []
        self._noted: deque[tuple[Computing, Sequence[Routing]]] = deque()  # forwards that are not shared out yet

    def watch(self, seq_id: int) -> None:
        """Keep the experts of this sequence from now on, and those that `catch` has caught."""
        with self._lock:
            self._share_out()
            _, caught = self._caught.pop(seq_id, (0, []))
            self._watched.setdefault(seq_id, caught)
            self._set_hooks()

    def forget(self, seq_id: int) -> None:
        """Drop what was kept of a sequence, and keep no more; nothing happens if it is not watched."""
        with self._lock:
            self._share_out()
            self._watched.pop(seq_id, None)
            self._set_hooks()

    @contextmanager
    def catch(self) -> Iterator[None]:
        """Keep the experts of all sequences meanwhile.

        A sequence has no id before it is queued, and may be computed before a `watch` comes: queue and watch it inside.
        What is not watched in the end is dropped.
        """
        with self._lock:
            self._share_out()
            self._n_catches += 1
            mine = self._n_catches
            self._catching.add(mine)
            self._set_hooks()
        try:
            yield
        finally:
            with self._lock:
                self._share_out()
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
        return self.routed(seq_id).ids[start:]

    def routed(self, seq_id: int) -> Routed:
        """The experts of the same tokens as `ids`, with weights and logits where these are kept."""
        with self._lock:
            self._share_out()
            kept = self._watched.get(seq_id, [])
            if len(kept) > 1:
                kept[:] = [Routed.joined(kept)]
            return kept[0] if kept else self._nothing()

    def _nothing(self) -> Routed:
        def empty(width: int, dtype: npt.DTypeLike = np.float32) -> Array:
            return np.empty((0, self.n_layers, width), dtype)

        weights, logits = empty(self.top_k) if self._weights else None, empty(self.n_experts) if self._logits else None
        return Routed(empty(self.top_k, np.int16), weights, logits)

    def _set_hooks(self) -> None:
        """Hooks on the routers as long as they are needed.

        A forward may be running, and see them from its middle on. Torch copies a module's hooks before it calls
        them, so another thread may add and remove some.
        """
        needed = bool(self._watched or self._catching)
        if needed and not self._hooks:
            self._hooks = observe(self._routers, self._note)
        elif not needed and self._hooks:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []

    def _note(self, layers: Sequence[Routing]) -> None:
        """Keep a forward, and no more: the model waits for this."""
        self._noted.append((self._engine.computing, layers))
        if len(self._noted) >= FORWARDS:
            with self._lock:
                self._share_out()

    def _share_out(self) -> None:
        """Give each sequence its tokens of the forwards; before anybody begins or ends to watch."""
        noted = [self._noted.popleft() for _ in range(len(self._noted))]  # the engine goes on adding
        parts = [(of, layers) for of, layers in noted if sum(n for _, n in of) == len(layers[0].topk_ids_TK)]
        if not parts:  # others' forwards, not the engine's
            return
        routed = Routed.of([layers for _, layers in parts], weights=self._weights, logits=self._logits)
        seq_ids, counts = zip(*itertools.chain.from_iterable(of for of, _ in parts), strict=True)
        of_token = np.repeat(seq_ids, counts)
        for seq_id in dict.fromkeys(seq_ids):
            kept = self._kept(seq_id)
            if kept is not None:
                kept.append(routed.select(of_token == seq_id))

    def _kept(self, seq_id: int) -> list[Routed] | None:
        """Where to put a sequence's experts, if anywhere."""
        if seq_id in self._watched:
            return self._watched[seq_id]
        if self._catching:
            return self._caught.setdefault(seq_id, (self._n_catches, []))[1]
        return None
