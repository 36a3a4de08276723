"""Key-value caches: what attention remembers of the tokens it has seen.

A cache holds a *row* per sequence and remembers, for every slot of every row, the position of the token that lies
there (-1: nothing). One rule then says what a query may see, for a growing cache, a rolling one, a padded batch and
a prompt read in chunks alike (``visible``). Shapes: B rows, T new tokens, S slots, H key-value heads, K head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from octavo.args import ModelArgs
from octavo.errors import PromptError


def visible(query_BT: Tensor, key_BS: Tensor, window: int | None) -> Tensor:
    """Return the bool mask [B, 1, T, S] of the key positions each query position may attend to.

    A query sees itself and what came before it, within the window. A pad (-1) sees only pads, so that its softmax
    stays finite, and is seen by none but pads.
    """
    query, key = query_BT[:, :, None], key_BS[:, None, :]
    mask = (key >= 0) & (key <= query) | (key == query)
    if window is not None:
        mask &= query - key < window
    return mask[:, None]


@dataclass(eq=False, slots=True)
class Memory:
    """A step's cache itself, for kernels that write keys and values to their slots and read them there."""

    k_LBHSK: Tensor  # views of the cache, L layers of it
    v_LBHSK: Tensor
    slots_BT: Tensor  # int64, where each new key and value belong
    mask_BTS: Tensor | None  # bool, what each new token sees once all are there; None for all up to its own slot
    prepared: Any = None  # what the kernels make of it, for the step's other layers


class Step(Protocol):
    """Where one forward's tokens go and what they see: made once a forward, used by every layer.

    ``causal`` stands for the plain lower-triangular mask, so that a fused attention kernel can take over.
    """

    positions_BT: Tensor
    causal: bool

    @property
    def mask(self) -> Tensor | None:
        """The bool mask [B, 1, T, S] of visible slots, or None where all are visible."""
        ...

    def update(self, layer: int, k_BTHK: Tensor, v_BTHK: Tensor) -> tuple[Tensor, Tensor]:
        """Store this layer's new keys and values; return all that the queries attend over, [B, H, S, K] each."""
        ...

    @property
    def memory(self) -> Memory | None:
        """The cache itself, to be used instead of ``update``; None where it cannot be written before it is read."""
        ...


class NoCache:
    """The step of a forward without a cache: training, and logits at every position."""

    memory = None

    def __init__(self, ids_BT: Tensor, positions_BT: Tensor | None, window: int | None) -> None:
        self.causal = positions_BT is None and (window is None or ids_BT.shape[1] <= window)
        self.mask: Tensor | None = None
        if positions_BT is None:
            positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand(ids_BT.shape)
        self.positions_BT = positions_BT
        if not self.causal:
            self.mask = visible(positions_BT, positions_BT, window)

    def update(self, layer: int, k_BTHK: Tensor, v_BTHK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values as they are, [B, H, T, K] each."""
        return k_BTHK.transpose(1, 2), v_BTHK.transpose(1, 2)


class SavedRow(NamedTuple):
    """Keys and values of one sequence, outside any cache."""

    k_LHSK: Tensor
    v_LHSK: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.k_LHSK.nbytes + self.v_LHSK.nbytes


class KVCache:
    """A cache that grows by doubling, up to the model's context; rows too take memory only once they are used.

    Args:
        args: the model's shape.
        batch_size: rows at most.
        capacity: slots a row has to begin with.
        rows: that are there to begin with; with all of them and the whole context for capacity it never grows.
        dtype, device: of keys and values; must be the model's.

    Attributes:
        lengths: tokens each row has seen, pads included.
    """

    def __init__(
        self,
        args: ModelArgs,
        batch_size: int,
        *,
        capacity: int = 256,
        rows: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.args = args
        self.lengths = [0] * batch_size
        self.padded = [False] * batch_size
        capacity = min(capacity, args.max_seq_len)
        shape = (args.n_layers, rows, args.n_kv_heads, capacity, args.head_dim)
        self.k_LBHSK = torch.zeros(shape, dtype=dtype, device=device)
        self.v_LBHSK = torch.zeros(shape, dtype=dtype, device=device)
        self.positions_BS = torch.full((rows, capacity), -1, dtype=torch.int64, device=device)

    @property
    def capacity(self) -> int:
        """Slots a row holds now."""
        return self.positions_BS.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return 2 * self.k_LBHSK.numel() * self.k_LBHSK.element_size()

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token's keys and values."""
        layers, _, heads, _, numbers = self.k_LBHSK.shape
        return 2 * layers * heads * numbers * self.k_LBHSK.element_size()

    def rows(self, start: int, stop: int) -> RowView:
        """Return a view of rows start..stop-1, which a forward takes for its cache."""
        self._reserve(rows=stop)
        return RowView(self, start, stop)

    def begin(self, tokens: int, positions_BT: Tensor | None = None) -> Step:
        """Make room for a forward over every row; see ``RowView.begin``."""
        return self.rows(0, len(self.lengths)).begin(tokens, positions_BT)

    def reset_row(self, row: int) -> None:
        """Forget a row."""
        self._reserve(rows=row + 1)
        self.lengths[row] = 0
        self.padded[row] = False
        self.positions_BS[row] = -1

    def wipe(self) -> None:
        """Forget every row, whatever state they are in, and leave no number behind."""
        self.lengths = [0] * len(self.lengths)
        self.padded = [False] * len(self.lengths)
        self.positions_BS.fill_(-1)
        self.k_LBHSK.zero_()
        self.v_LBHSK.zero_()

    def wipe_row(self, row: int) -> None:
        """Zero a row that may hold NaN: masked out is not enough, for 0 * NaN is NaN in attention's sum."""
        self.k_LBHSK[:, row] = 0
        self.v_LBHSK[:, row] = 0

    def copy_row(self, source: int, target: int) -> None:
        """Overwrite row ``target`` with row ``source``."""
        self._reserve(rows=max(source, target) + 1)
        used = min(self.lengths[source], self.capacity)
        for tensor in (self.k_LBHSK, self.v_LBHSK):
            tensor[:, target, :, :used] = tensor[:, source, :, :used]
        self.positions_BS[target] = self.positions_BS[source]
        self.lengths[target] = self.lengths[source]
        self.padded[target] = self.padded[source]

    def save_row(self, row: int) -> SavedRow:
        """Copy what a row holds, which must be all that it has seen.

        Raises:
            ValueError: the first of it was overwritten since, or pads are among it.
        """
        n = self.lengths[row]
        if n > self.capacity or self.padded[row]:
            raise ValueError(f"row {row} does not hold all of its {n} tokens")
        return SavedRow(self.k_LBHSK[:, row, :, :n].clone(), self.v_LBHSK[:, row, :, :n].clone())

    def restore_row(self, row: int, saved: SavedRow, n: int) -> None:
        """Overwrite a row with the first n tokens of what `save_row` returned."""
        self.reset_row(row)
        self._reserve(slots=n)
        self.k_LBHSK[:, row, :, :n] = saved.k_LHSK[:, :, :n]
        self.v_LBHSK[:, row, :, :n] = saved.v_LHSK[:, :, :n]
        self.positions_BS[row, :n] = torch.arange(n, device=self.positions_BS.device)
        self.lengths[row] = n

    def _reserve(self, rows: int = 0, slots: int = 0) -> None:
        """Make room for so many rows of so many slots."""
        have = self.positions_BS.shape
        more_rows = _growth(have[0], rows, len(self.lengths))
        more_slots = _growth(have[1], slots, self.args.max_seq_len)
        if more_rows or more_slots:
            pad = torch.nn.functional.pad
            self.k_LBHSK = pad(self.k_LBHSK, (0, 0, 0, more_slots, 0, 0, 0, more_rows))
            self.v_LBHSK = pad(self.v_LBHSK, (0, 0, 0, more_slots, 0, 0, 0, more_rows))
            self.positions_BS = pad(self.positions_BS, (0, more_slots, 0, more_rows), value=-1)

    def _step(self, rows: slice, starts: list[int], positions_BT: Tensor, plain: bool) -> Step:
        self._reserve(slots=max(starts) + positions_BT.shape[1])
        return _GrowingStep(self, rows, starts, positions_BT, plain)


class RollingKVCache(KVCache):
    """A cache of exactly ``sliding_window`` slots a row: the oldest token makes room for the newest.

    Memory is bounded whatever the length. The n-th token of a row lies in slot n modulo the window.
    """

    def __init__(
        self,
        args: ModelArgs,
        batch_size: int,
        *,
        rows: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        window = args.sliding_window or args.max_seq_len
        super().__init__(args, batch_size, capacity=window, rows=rows, dtype=dtype, device=device)

    def _step(self, rows: slice, starts: list[int], positions_BT: Tensor, plain: bool) -> Step:
        return _RollingStep(self, rows, starts, positions_BT)


class RowView:
    """Some rows of a cache, with the interface that ``Mixtral.forward`` uses."""

    def __init__(self, cache: KVCache, start: int, stop: int) -> None:
        self._cache = cache
        self._rows = slice(start, stop)

    @property
    def lengths(self) -> list[int]:
        """Tokens each row of the view has seen, pads included."""
        return self._cache.lengths[self._rows]

    def begin(self, tokens: int, positions_BT: Tensor | None = None) -> Step:
        """Make room for ``tokens`` new tokens a row.

        Args:
            tokens: how many, T.
            positions_BT: their positions, -1 for a pad; by default what follows each row's last token.

        Raises:
            PromptError: they do not fit into the model's context.
        """
        cache, starts = self._cache, self.lengths
        limit = cache.args.max_seq_len
        if max(starts) + tokens > limit:
            raise PromptError(
                f"{max(starts) + tokens} tokens do not fit into the model's context of {limit}",
                hint="shorten the prompt, or ask for fewer tokens",
            )
        if positions_BT is not None:
            cache.padded[self._rows] = [True] * len(starts)
            positions_BT = positions_BT.expand(len(starts), tokens)
        else:
            positions_BT = self._next_positions(tokens)
        step = cache._step(self._rows, starts, positions_BT, plain=not any(cache.padded[self._rows]))
        cache.lengths[self._rows] = [start + tokens for start in starts]
        return step

    def _next_positions(self, tokens: int) -> Tensor:
        positions_BS = self._cache.positions_BS[self._rows]
        if any(self._cache.padded[self._rows]):
            starts_B = positions_BS.amax(dim=1) + 1
        else:
            starts_B = torch.tensor(self.lengths, device=positions_BS.device)
        return starts_B[:, None] + torch.arange(tokens, device=positions_BS.device)


class _GrowingStep:
    """Token t of row b goes to slot ``starts[b] + t``; queries see slots 0..end-1."""

    def __init__(self, cache: KVCache, rows: slice, starts: list[int], positions_BT: Tensor, plain: bool) -> None:
        self._cache, self._rows = cache, rows
        self.positions_BT = positions_BT
        tokens, window = positions_BT.shape[1], cache.args.sliding_window
        self._end = max(starts) + tokens
        self._slots_BT: Tensor | None = None
        if min(starts) == max(starts):
            cache.positions_BS[rows, self._end - tokens : self._end] = positions_BT
        else:
            first_B = torch.tensor(starts, device=positions_BT.device)
            self._slots_BT = first_B[:, None] + torch.arange(tokens, device=positions_BT.device)
            cache.positions_BS[rows].scatter_(1, self._slots_BT, positions_BT)
        self._window = window
        self._in_order = plain and (window is None or self._end <= window)  # a token sees all up to its own slot
        self._plain = self._in_order and self._slots_BT is None
        self.causal = self._plain and self._end == tokens and tokens > 1

    @cached_property
    def mask(self) -> Tensor | None:
        """None for a single token in order too."""
        if self._plain and (self.causal or self.positions_BT.shape[1] == 1):
            return None
        return visible(self.positions_BT, self._cache.positions_BS[self._rows, : self._end], self._window)

    @cached_property
    def memory(self) -> Memory | None:
        """Views of the slots in use."""
        slots_BT = self._slots_BT
        if slots_BT is None:
            tokens = self.positions_BT.shape[1]
            slots_BT = torch.arange(self._end - tokens, self._end, device=self.positions_BT.device)
            slots_BT = slots_BT.expand(self.positions_BT.shape)
        k_LBHSK, v_LBHSK = (x[:, self._rows, :, : self._end] for x in (self._cache.k_LBHSK, self._cache.v_LBHSK))
        return Memory(k_LBHSK, v_LBHSK, slots_BT, None if self._in_order or self.mask is None else self.mask[:, 0])

    def update(self, layer: int, k_BTHK: Tensor, v_BTHK: Tensor) -> tuple[Tensor, Tensor]:
        """Write, and return views of the slots in use."""
        k_BHSK = self._write(self._cache.k_LBHSK[layer, self._rows], k_BTHK)
        v_BHSK = self._write(self._cache.v_LBHSK[layer, self._rows], v_BTHK)
        return k_BHSK, v_BHSK

    def _write(self, cached_BHSK: Tensor, new_BTHK: Tensor) -> Tensor:
        new_BHTK = new_BTHK.transpose(1, 2)
        if self._slots_BT is None:
            cached_BHSK[:, :, self._end - new_BHTK.shape[2] : self._end] = new_BHTK
        else:
            _scatter_slots(cached_BHSK, self._slots_BT, new_BHTK)
        return cached_BHSK[:, :, : self._end]


class _RollingStep:
    """Queries see the ring as it was and the new tokens beside it; then the ring takes up the last of them.

    Writing first would overwrite what the first queries of a chunk must still see.
    """

    causal = False

    def __init__(self, cache: KVCache, rows: slice, starts: list[int], positions_BT: Tensor) -> None:
        self._cache, self._rows = cache, rows
        self.positions_BT = positions_BT
        window, tokens = cache.capacity, positions_BT.shape[1]
        self._kept = min(tokens, window)
        first_B = torch.tensor(starts, device=positions_BT.device) + (tokens - self._kept)
        self._slots_BT = (first_B[:, None] + torch.arange(self._kept, device=positions_BT.device)) % window
        ring_BS = cache.positions_BS[rows]
        self.mask: Tensor | None = visible(positions_BT, torch.cat((ring_BS, positions_BT), dim=1), window)
        ring_BS.scatter_(1, self._slots_BT, positions_BT[:, -self._kept :])

    @cached_property
    def memory(self) -> Memory | None:
        """The ring, for one token a row: what that overwrites lies beyond its window."""
        if self.positions_BT.shape[1] != 1:
            return None
        cache = self._cache
        mask = visible(self.positions_BT, cache.positions_BS[self._rows], cache.capacity)
        return Memory(cache.k_LBHSK[:, self._rows], cache.v_LBHSK[:, self._rows], self._slots_BT, mask[:, 0])

    def update(self, layer: int, k_BTHK: Tensor, v_BTHK: Tensor) -> tuple[Tensor, Tensor]:
        """Return ring and new tokens, [B, H, window + T, K]; then write the ring."""
        k_BHSK = self._write(self._cache.k_LBHSK[layer, self._rows], k_BTHK)
        v_BHSK = self._write(self._cache.v_LBHSK[layer, self._rows], v_BTHK)
        return k_BHSK, v_BHSK

    def _write(self, ring_BHSK: Tensor, new_BTHK: Tensor) -> Tensor:
        new_BHTK = new_BTHK.transpose(1, 2)
        seen_BHSK = torch.cat((ring_BHSK, new_BHTK), dim=2)
        _scatter_slots(ring_BHSK, self._slots_BT, new_BHTK[:, :, -self._kept :])
        return seen_BHSK


class StaticStep:
    """One token for each of a cache's first rows, by tensors of which only the numbers differ from step to step.

    Args:
        cache: made at its full size.
        n_slots: that are looked at: all that hold a token, and the new one's.
        lengths_B: int64, tokens that each row has seen.
        live_B: bool, whether a row takes part. One that does not is computed with too, and what it leaves in the slot
            behind its last token is overwritten by its next one.
    """

    causal = False

    def __init__(self, cache: KVCache, n_slots: int, lengths_B: Tensor, live_B: Tensor) -> None:
        rows = len(lengths_B)
        self.positions_BT = lengths_B[:, None]
        slots_BT = self.positions_BT % cache.capacity
        there_BS = cache.positions_BS[:rows]
        there_BS.scatter_(1, slots_BT, torch.where(live_B[:, None], self.positions_BT, there_BS.gather(1, slots_BT)))
        self.mask = visible(self.positions_BT, there_BS[:, :n_slots], cache.args.sliding_window)
        self.mask.scatter_(3, slots_BT[:, None, None], True)  # itself, or the softmax of one that is not live is NaN
        k_LBHSK, v_LBHSK = (x[:, :rows, :, :n_slots] for x in (cache.k_LBHSK, cache.v_LBHSK))
        self.memory = Memory(k_LBHSK, v_LBHSK, slots_BT, self.mask[:, 0])

    def update(self, layer: int, k_BTHK: Tensor, v_BTHK: Tensor) -> tuple[Tensor, Tensor]:
        """Write, and return views of the slots that are looked at."""
        k_BHSK, v_BHSK = self.memory.k_LBHSK[layer], self.memory.v_LBHSK[layer]
        _scatter_slots(k_BHSK, self.memory.slots_BT, k_BTHK.transpose(1, 2))
        _scatter_slots(v_BHSK, self.memory.slots_BT, v_BTHK.transpose(1, 2))
        return k_BHSK, v_BHSK


def _growth(have: int, want: int, limit: int) -> int:
    return 0 if want <= have else min(max(want, 2 * have), limit) - have


def _scatter_slots(cached_BHSK: Tensor, slots_BT: Tensor, new_BHTK: Tensor) -> None:
    cached_BHSK.scatter_(2, slots_BT[:, None, :, None].expand_as(new_BHTK), new_BHTK)


def make_cache(
    args: ModelArgs,
    batch_size: int,
    *,
    whole: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> KVCache:
    """Return the cache that suits the model: rolling when it has a sliding window shorter than its context.

    Args:
        args: the model's shape.
        batch_size: rows at most.
        whole: make it as large as it can become, so that it never grows: growing needs room for two at a time.
        dtype, device: of keys and values; must be the model's.
    """
    rows = batch_size if whole else 1
    if args.sliding_window is not None and args.sliding_window < args.max_seq_len:
        return RollingKVCache(args, batch_size, rows=rows, dtype=dtype, device=device)
    if whole:
        return KVCache(args, batch_size, capacity=args.max_seq_len, rows=rows, dtype=dtype, device=device)
    return KVCache(args, batch_size, dtype=dtype, device=device)
