"""The naming table: what each tensor of the model is called on disk, and how it lies there.

Canonical names are the module tree's, which are Mistral's own: ``layers.N.attention.wq.weight`` and so on, with
rotary pairs side by side. A layout is a tuple of rules. A rule says which canonical tensors make up one stored tensor
(often just one; the rows of several lie one below the other) and by which transform each of them lies there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from octavo.args import ModelArgs, MoEArgs

Shape = tuple[int, ...]


class Transform:
    """How a canonical tensor lies on disk; this one: as it is.

    Attributes:
        by_row: a canonical row is a stored row, at the same place.
    """

    by_row = True

    def stored_shape(self, shape: Shape) -> Shape:
        """Return the shape on disk of a tensor whose canonical shape is ``shape``."""
        return shape

    def read(self, stored: Tensor, args: ModelArgs) -> Tensor:
        """Return the canonical tensor, a view of ``stored`` where that is possible."""
        return stored

    def write(self, tensor: Tensor, args: ModelArgs) -> Tensor:
        """Return the stored tensor of a canonical one."""
        return tensor


class HalfSplitRope(Transform):
    """Rows permuted within each head: rotary pairs are (j, j + d/2) on disk, (2j, 2j + 1) here."""

    by_row = False

    def read(self, stored: Tensor, args: ModelArgs) -> Tensor:
        """A copy, with pairs side by side."""
        return stored.view(-1, 2, args.head_dim // 2, stored.shape[1]).transpose(1, 2).reshape(stored.shape)

    def write(self, tensor: Tensor, args: ModelArgs) -> Tensor:
        """A copy, with pairs half a head apart."""
        return tensor.view(-1, args.head_dim // 2, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)


class Transposed(Transform):
    """Columns are rows on disk."""

    by_row = False

    def stored_shape(self, shape: Shape) -> Shape:
        """[in, out]."""
        return shape[::-1]

    def read(self, stored: Tensor, args: ModelArgs) -> Tensor:
        """A view."""
        return stored.T

    def write(self, tensor: Tensor, args: ModelArgs) -> Tensor:
        """A view."""
        return tensor.T


SAME, HALF_SPLIT, TRANSPOSED = Transform(), HalfSplitRope(), Transposed()


@dataclass(frozen=True)
class Rule:
    """One stored tensor.

    Attributes:
        stored: its name, with the placeholders {layer} and {expert}.
        parts: the canonical tensors whose rows it holds, in that order. Where these have an {expert} and ``stored``
            has none, it holds the parts of expert 0, then those of expert 1, and so on.
        transform: of every part.
        stacked: the experts have a dimension of their own, [experts, rows, columns].
    """

    stored: str
    parts: tuple[str, ...]
    transform: Transform = SAME
    stacked: bool = False


@dataclass(frozen=True)
class Layout:
    """How one family of tools names and lays out a model."""

    name: str
    rules: tuple[Rule, ...]


_ATTENTION = "layers.{layer}.attention."
_EXPERT = "layers.{layer}.feed_forward.experts.{expert}."
_DENSE = "layers.{layer}.feed_forward."
_ROUTER = "layers.{layer}.feed_forward.gate.weight"
_MATRICES = ("w1", "w2", "w3")


def _rule(stored: str, canonical: str, transform: Transform = SAME) -> Rule:
    return Rule(stored, (canonical,), transform)


def _stack(stored: str, *matrices: str, transform: Transform = SAME, stacked: bool = True) -> Rule:
    return Rule(stored, tuple(f"{_EXPERT}{w}.weight" for w in matrices), transform, stacked)


_MISTRAL_ENDS = tuple(_rule(name, name) for name in ("tok_embeddings.weight", "norm.weight", "output.weight"))
_MISTRAL_NORMS = tuple(
    _rule(name, name) for name in ("layers.{layer}.attention_norm.weight", "layers.{layer}.ffn_norm.weight")
)
_MISTRAL_COMMON = (
    *_MISTRAL_ENDS,
    *_MISTRAL_NORMS,
    *(_rule(f"{_ATTENTION}{w}.weight", f"{_ATTENTION}{w}.weight") for w in ("wq", "wk", "wv", "wo")),
)
_HF_COMMON = (
    _rule("model.embed_tokens.weight", "tok_embeddings.weight"),
    _rule("model.norm.weight", "norm.weight"),
    _rule("lm_head.weight", "output.weight"),
    _rule("model.layers.{layer}.input_layernorm.weight", "layers.{layer}.attention_norm.weight"),
    _rule("model.layers.{layer}.post_attention_layernorm.weight", "layers.{layer}.ffn_norm.weight"),
    _rule("model.layers.{layer}.self_attn.q_proj.weight", f"{_ATTENTION}wq.weight", HALF_SPLIT),
    _rule("model.layers.{layer}.self_attn.k_proj.weight", f"{_ATTENTION}wk.weight", HALF_SPLIT),
    _rule("model.layers.{layer}.self_attn.v_proj.weight", f"{_ATTENTION}wv.weight"),
    _rule("model.layers.{layer}.self_attn.o_proj.weight", f"{_ATTENTION}wo.weight"),
)
_GGUF_COMMON = (
    _rule("token_embd.weight", "tok_embeddings.weight"),
    _rule("output_norm.weight", "norm.weight"),
    _rule("output.weight", "output.weight"),
    _rule("blk.{layer}.attn_norm.weight", "layers.{layer}.attention_norm.weight"),
    _rule("blk.{layer}.ffn_norm.weight", "layers.{layer}.ffn_norm.weight"),
    _rule("blk.{layer}.attn_q.weight", f"{_ATTENTION}wq.weight"),
    _rule("blk.{layer}.attn_k.weight", f"{_ATTENTION}wk.weight"),
    _rule("blk.{layer}.attn_v.weight", f"{_ATTENTION}wv.weight"),
    _rule("blk.{layer}.attn_output.weight", f"{_ATTENTION}wo.weight"),
)
_HF_ROUTER = "model.layers.{layer}.block_sparse_moe.gate.weight"
_HF_EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}."
_SWITCH = "model.layers.{layer}.block_sparse_moe.switch_mlp."
_GPT_FAST = "layers.{layer}.block_sparse_moe."
_GGUF_W = {"w1": "gate", "w2": "down", "w3": "up"}

HF = Layout(
    "hf",
    (
        *_HF_COMMON,
        _rule(_HF_ROUTER, _ROUTER),
        *(_rule(_HF_EXPERT + f"{w}.weight", f"{_EXPERT}{w}.weight") for w in _MATRICES),
    ),
)
"""Hugging Face, one tensor per expert and matrix: how Mixtral is published. Early mlx-lm kept these names."""

HF_FUSED = Layout(
    "hf-fused",
    (
        *_HF_COMMON,
        _rule("model.layers.{layer}.mlp.gate.weight", _ROUTER),
        _stack("model.layers.{layer}.mlp.experts.gate_up_proj", "w1", "w3"),
        _stack("model.layers.{layer}.mlp.experts.down_proj", "w2"),
    ),
)
"""Hugging Face, fused: how transformers 5 holds experts, and saves them with ``save_original_format=False``."""

MLX = Layout(
    "mlx",
    (
        *_HF_COMMON,
        _rule(_HF_ROUTER, _ROUTER),
        _stack(f"{_SWITCH}gate_proj.weight", "w1"),
        _stack(f"{_SWITCH}down_proj.weight", "w2"),
        _stack(f"{_SWITCH}up_proj.weight", "w3"),
    ),
)
"""mlx-lm: Hugging Face's names, experts stacked."""

MISTRAL = Layout(
    "mistral",
    (
        *_MISTRAL_COMMON,
        _rule(_ROUTER, _ROUTER),
        *(_rule(f"{_EXPERT}{w}.weight", f"{_EXPERT}{w}.weight") for w in _MATRICES),
    ),
)
"""mistral-inference (with params.json), and MLX's first examples: the canonical names themselves."""

MISTRAL_STACKED = Layout(
    "mistral-stacked",
    (
        *_MISTRAL_COMMON,
        _rule(f"{_GPT_FAST}gate.weight", _ROUTER),
        _stack(f"{_GPT_FAST}w1", "w1", stacked=False),
        _stack(f"{_GPT_FAST}w2", "w2", transform=TRANSPOSED, stacked=False),
        _stack(f"{_GPT_FAST}w3", "w3", stacked=False),
    ),
)
"""The authors' first files, ``consolidated.00.pt`` to ``07.pt``: experts one below the other, w2 transposed."""

GGUF = Layout(
    "gguf",
    (
        *_GGUF_COMMON,
        _rule("blk.{layer}.ffn_gate_inp.weight", _ROUTER),
        *(_stack("blk.{layer}." + f"ffn_{stored}_exps.weight", w) for w, stored in _GGUF_W.items()),
    ),
)
"""llama.cpp, experts merged."""

GGUF_SPLIT = Layout(
    "gguf-split",
    (
        *_GGUF_COMMON,
        _rule("blk.{layer}.ffn_gate_inp.weight", _ROUTER),
        *(
            _rule("blk.{layer}.ffn_" + stored + ".{expert}.weight", f"{_EXPERT}{w}.weight")
            for w, stored in _GGUF_W.items()
        ),
    ),
)
"""llama.cpp before about April 2024, one tensor per expert."""

_GPT_FAST_COMMON = (
    *_MISTRAL_ENDS,
    *_MISTRAL_NORMS,
    Rule(f"{_ATTENTION}wqkv.weight", tuple(f"{_ATTENTION}{w}.weight" for w in ("wq", "wk", "wv"))),
    _rule(f"{_ATTENTION}wo.weight", f"{_ATTENTION}wo.weight"),
    _rule(f"{_GPT_FAST}gate.weight", _ROUTER),
    _stack(f"{_GPT_FAST}cond_ffn.w1", "w1"),
    _stack(f"{_GPT_FAST}cond_ffn.w3", "w3"),
)
GPT_FAST = Layout("gpt-fast", (*_GPT_FAST_COMMON, _stack(f"{_GPT_FAST}cond_ffn.w2", "w2")))
"""gpt-fast: wq, wk and wv in one, experts stacked."""

GPT_FAST_OLD = Layout(
    "gpt-fast-old", (*_GPT_FAST_COMMON, _stack(f"{_GPT_FAST}cond_ffn.w2", "w2", transform=TRANSPOSED))
)
"""gpt-fast before March 2024: w2 transposed."""

HF_DENSE = Layout(
    "hf-dense",
    (
        *_HF_COMMON,
        _rule("model.layers.{layer}.mlp.gate_proj.weight", f"{_DENSE}w1.weight"),
        _rule("model.layers.{layer}.mlp.down_proj.weight", f"{_DENSE}w2.weight"),
        _rule("model.layers.{layer}.mlp.up_proj.weight", f"{_DENSE}w3.weight"),
    ),
)
"""Hugging Face and mlx-lm, a dense Mistral."""

MISTRAL_DENSE = Layout(
    "mistral-dense", (*_MISTRAL_COMMON, *(_rule(f"{_DENSE}{w}.weight", f"{_DENSE}{w}.weight") for w in _MATRICES))
)
"""mistral-inference, a dense Mistral."""

GGUF_DENSE = Layout(
    "gguf-dense",
    (
        *_GGUF_COMMON,
        *(_rule("blk.{layer}." + f"ffn_{stored}.weight", f"{_DENSE}{w}.weight") for w, stored in _GGUF_W.items()),
    ),
)
"""llama.cpp, a dense Mistral."""

OCTAVO = Layout("octavo", MISTRAL.rules)
"""A store of `octavo quantize`: the canonical names themselves, and each file says how its tensors are quantised."""

OCTAVO_DENSE = Layout("octavo-dense", MISTRAL_DENSE.rules)
"""A store of a dense Mistral."""

LAYOUTS = (HF, HF_FUSED, MLX, MISTRAL, MISTRAL_STACKED, GGUF, GGUF_SPLIT, GPT_FAST, GPT_FAST_OLD)
DENSE_LAYOUTS = (HF_DENSE, MISTRAL_DENSE, GGUF_DENSE)
STORES = {MISTRAL: OCTAVO, MISTRAL_DENSE: OCTAVO_DENSE}
"""A store's layout by the one that has its names; these two cannot be told apart by names."""


@dataclass(frozen=True)
class Part:
    """A canonical tensor within a stored one: its rows there, seen as a matrix, run from ``first`` to ``last``."""

    canonical: str
    shape: Shape
    first: int
    last: int


@dataclass(frozen=True)
class Stored:
    """A tensor on disk, and what it is made of."""

    name: str
    shape: Shape
    parts: tuple[Part, ...]
    transform: Transform


def canonical_shapes(args: ModelArgs) -> dict[str, Shape]:
    """Return every tensor of a model and its shape, as the model has them: a tied output is not one of its own."""
    moe, q, kv = args.moe, args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    shapes: dict[str, Shape] = {"tok_embeddings.weight": (args.vocab_size, args.dim)}
    attention = {"wq": (q, args.dim), "wk": (kv, args.dim), "wv": (kv, args.dim), "wo": (args.dim, q)}
    up, down = (args.hidden_dim, args.dim), (args.dim, args.hidden_dim)
    for layer in range(args.n_layers):
        block = f"layers.{layer}."
        shapes[f"{block}attention_norm.weight"] = (args.dim,)
        shapes |= {f"{block}attention.{w}.weight": shape for w, shape in attention.items()}
        shapes[f"{block}ffn_norm.weight"] = (args.dim,)
        if moe:
            shapes[f"{block}feed_forward.gate.weight"] = (moe.num_experts, args.dim)
        for expert in [f"experts.{e}." for e in range(moe.num_experts)] if moe else [""]:
            feed_forward = f"{block}feed_forward.{expert}"
            shapes |= {f"{feed_forward}{w}.weight": down if w == "w2" else up for w in _MATRICES}
    shapes["norm.weight"] = (args.dim,)
    if not args.tie_embeddings:
        shapes["output.weight"] = (args.vocab_size, args.dim)
    return shapes


def stored_tensors(layout: Layout, args: ModelArgs) -> Iterator[Stored]:
    """Give every tensor that a model of this shape has in this layout: embeddings first, then layer by layer."""
    shapes = canonical_shapes(args)
    ends = [rule for rule in layout.rules if "{layer}" not in rule.stored]
    blocks = [rule for rule in layout.rules if "{layer}" in rule.stored]
    first, last = ends[:1], [rule for rule in ends[1:] if rule.parts[0] in shapes]
    yield from (_stored(rule, args, shapes, 0, 0) for rule in first)
    for layer in range(args.n_layers):
        yield from (_stored(rule, args, shapes, layer, 0) for rule in blocks if "{expert}" not in rule.stored)
        each = [rule for rule in blocks if "{expert}" in rule.stored]
        for expert in range(args.moe.num_experts if args.moe and each else 0):
            yield from (_stored(rule, args, shapes, layer, expert) for rule in each)
    yield from (_stored(rule, args, shapes, 0, 0) for rule in last)


def _stored(rule: Rule, args: ModelArgs, shapes: dict[str, Shape], layer: int, expert: int) -> Stored:
    experts: Collection[int] = (expert,)
    if "{expert}" not in rule.stored and "{expert}" in rule.parts[0]:
        experts = range(args.moe.num_experts if args.moe else 1)
    parts: list[Part] = []
    row = 0
    shape: Shape = ()
    for name in (template.format(layer=layer, expert=e) for e in experts for template in rule.parts):
        shape = rule.transform.stored_shape(shapes[name])
        parts.append(Part(name, shapes[name], row, row + shape[0]))
        row += shape[0]
    whole = (len(experts), row // len(experts), *shape[1:]) if rule.stacked else (row, *shape[1:])
    return Stored(rule.stored.format(layer=layer, expert=expert), whole, tuple(parts), rule.transform)


def recognise(names: Collection[str], args: ModelArgs, shape_of: Callable[[str], Shape] | None = None) -> Layout | None:
    """Return the layout that stored names follow: the one of which they hold the most.

    Args:
        names: as stored.
        args: the model's shape.
        shape_of: of a stored tensor; tells apart layouts that differ in nothing else.

    Returns:
        None where they follow no layout at all.
    """
    small = replace(args, n_layers=1, moe=MoEArgs(1, 1) if args.moe else None)
    shares: dict[Layout, float] = {}
    for layout in LAYOUTS if args.moe else DENSE_LAYOUTS:
        expected = [stored.name for stored in stored_tensors(layout, small)]
        shares[layout] = sum(name in names for name in expected) / len(expected)
    best = [layout for layout, share in shares.items() if share == max(shares.values())]
    if not shares[best[0]]:
        return None
    if len(best) == 1 or shape_of is None:
        return best[0]
    # All but the number of experts, of which `small` has one.
    found = {s: [t for t in stored_tensors(s, small) if t.name in names] for s in best}
    return max(best, key=lambda layout: sum(shape_of(t.name)[1:] == t.shape[1:] for t in found[layout]))
