"""The naming table: what each tensor of the model is called on disk, and how it lies there.

Canonical names are the module tree's, which are Mistral's own: ``layers.N.attention.wq.weight`` and so on. A layout
is a tuple of rules; a rule says under which name a canonical tensor is stored and by which transform.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from octavo.args import ModelArgs

Shape = tuple[int, ...]


class Transform(Protocol):
    """How a stored tensor becomes a canonical one."""

    def stored_shape(self, shape: Shape, args: ModelArgs) -> Shape:
        """Return the shape on disk of a tensor whose canonical shape is ``shape``."""
        ...

    def read(self, stored: Tensor, args: ModelArgs, expert: int) -> Tensor:
        """Return the canonical tensor, a view of ``stored`` where that is possible."""
        ...

    def write(self, tensor: Tensor, args: ModelArgs) -> Tensor:
        """Return the stored tensor of a canonical one."""
        ...


class Same:
    """Stored as it is."""

    def stored_shape(self, shape: Shape, args: ModelArgs) -> Shape:
        """The same."""
        return shape

    def read(self, stored: Tensor, args: ModelArgs, expert: int) -> Tensor:
        """The same."""
        return stored

    def write(self, tensor: Tensor, args: ModelArgs) -> Tensor:
        """The same."""
        return tensor


class HalfSplitRope(Same):
    """Rows permuted within each head: rotary pairs are (j, j + d/2) on disk, (2j, 2j + 1) here."""

    def read(self, stored: Tensor, args: ModelArgs, expert: int) -> Tensor:
        """A copy, with pairs side by side."""
        return stored.view(-1, 2, args.head_dim // 2, stored.shape[1]).transpose(1, 2).reshape(stored.shape)

    def write(self, tensor: Tensor, args: ModelArgs) -> Tensor:
        """A copy, with pairs half a head apart."""
        return tensor.view(-1, args.head_dim // 2, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)


class _Stacked:
    """One tensor holds a matrix of every expert; experts are read out of it as views."""

    def stored_shape(self, shape: Shape, args: ModelArgs) -> Shape:
        """[E, out, in]."""
        assert args.moe is not None  # only expert rules use this
        return (args.moe.num_experts, *shape)

    def read(self, stored: Tensor, args: ModelArgs, expert: int) -> Tensor:
        """The expert's matrix."""
        return stored[expert]

    def write(self, tensor: Tensor, args: ModelArgs) -> Tensor:
        """Not offered: Octavo writes experts one by one, which every reader understands."""
        raise TypeError("the fused layout is read, not written")


@dataclass(frozen=True)
class _StackedHalf(_Stacked):
    """As ``_Stacked``, where gate (half 0) and up (half 1) share a tensor of twice the rows."""

    half: int

    def stored_shape(self, shape: Shape, args: ModelArgs) -> Shape:
        """[E, 2 out, in]."""
        experts, rows, columns = super().stored_shape(shape, args)
        return (experts, 2 * rows, columns)

    def read(self, stored: Tensor, args: ModelArgs, expert: int) -> Tensor:
        """The expert's half."""
        return stored[expert].chunk(2)[self.half]


SAME = Same()


@dataclass(frozen=True)
class Rule:
    """``canonical`` and ``stored`` are names with the placeholders {layer} and {expert}."""

    canonical: str
    stored: str
    transform: Transform = SAME


_HF_COMMON = (
    Rule("tok_embeddings.weight", "model.embed_tokens.weight"),
    Rule("norm.weight", "model.norm.weight"),
    Rule("output.weight", "lm_head.weight"),
    Rule("layers.{layer}.attention_norm.weight", "model.layers.{layer}.input_layernorm.weight"),
    Rule("layers.{layer}.ffn_norm.weight", "model.layers.{layer}.post_attention_layernorm.weight"),
    Rule("layers.{layer}.attention.wq.weight", "model.layers.{layer}.self_attn.q_proj.weight", HalfSplitRope()),
    Rule("layers.{layer}.attention.wk.weight", "model.layers.{layer}.self_attn.k_proj.weight", HalfSplitRope()),
    Rule("layers.{layer}.attention.wv.weight", "model.layers.{layer}.self_attn.v_proj.weight"),
    Rule("layers.{layer}.attention.wo.weight", "model.layers.{layer}.self_attn.o_proj.weight"),
)
_EXPERT = "layers.{layer}.feed_forward.experts.{expert}."

HF = (
    *_HF_COMMON,
    Rule("layers.{layer}.feed_forward.gate.weight", "model.layers.{layer}.block_sparse_moe.gate.weight"),
    *(
        Rule(f"{_EXPERT}{w}.weight", "model.layers.{layer}.block_sparse_moe.experts.{expert}." + f"{w}.weight")
        for w in ("w1", "w2", "w3")
    ),
)
"""Hugging Face, one tensor per expert and matrix: how Mixtral is published."""

HF_FUSED = (
    *_HF_COMMON,
    Rule("layers.{layer}.feed_forward.gate.weight", "model.layers.{layer}.mlp.gate.weight"),
    Rule(f"{_EXPERT}w1.weight", "model.layers.{layer}.mlp.experts.gate_up_proj", _StackedHalf(0)),
    Rule(f"{_EXPERT}w3.weight", "model.layers.{layer}.mlp.experts.gate_up_proj", _StackedHalf(1)),
    Rule(f"{_EXPERT}w2.weight", "model.layers.{layer}.mlp.experts.down_proj", _Stacked()),
)
"""Hugging Face, fused: how transformers 5 holds experts, and saves them with ``save_original_format=False``."""

HF_DENSE = (
    *_HF_COMMON,
    Rule("layers.{layer}.feed_forward.w1.weight", "model.layers.{layer}.mlp.gate_proj.weight"),
    Rule("layers.{layer}.feed_forward.w2.weight", "model.layers.{layer}.mlp.down_proj.weight"),
    Rule("layers.{layer}.feed_forward.w3.weight", "model.layers.{layer}.mlp.up_proj.weight"),
)
"""Hugging Face, a dense Mistral."""

IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Stored by old writers, computed by every reader."""

Layout = Sequence[Rule]


@dataclass(frozen=True)
class Stored:
    """Where one canonical tensor is found."""

    name: str
    expert: int
    transform: Transform


_NUMBERS = re.compile(r"\.(\d+)(?=\.)")


def find(layout: Layout, canonical: str) -> Stored:
    """Return where ``layout`` keeps the tensor called ``canonical``.

    Raises:
        KeyError: the layout has no rule for it.
    """
    numbers = [int(n) for n in _NUMBERS.findall(canonical)]
    template = canonical
    for placeholder in (".{layer}", ".{expert}")[: len(numbers)]:
        template = _NUMBERS.sub(placeholder, template, count=1)
    layer, expert = (*numbers, 0, 0)[:2]
    for rule in layout:
        if rule.canonical == template:
            return Stored(rule.stored.format(layer=layer, expert=expert), expert, rule.transform)
    raise KeyError(canonical)


def recognise(names: Sequence[str], args: ModelArgs) -> Layout:
    """Return the layout that these stored names follow, told by the experts' own names."""
    if args.moe is None:
        return HF_DENSE
    return HF_FUSED if any(name.endswith(".mlp.experts.gate_up_proj") for name in names) else HF
