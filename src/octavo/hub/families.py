"""The family table: how each family of sparse models names and stores its routers and experts.

Names, counts and layouts are facts of the published repositories and of transformers 5, which also saves experts
fused ("gate_up_proj"). Whatever the storage, the logical expert is w2(act(w1 x) * w3 x): w1 the gate and w3 the up
projection, [intermediate, hidden], w2 the down projection, [hidden, intermediate].
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from octavo.errors import CheckpointError, ConfigError

Half = Literal["first", "second", "even", "odd"]
HINT_CONFIG = "is this the config.json that came with these weights?"


@dataclass(frozen=True)
class Matrix:
    """Where one matrix of an expert lies.

    Attributes:
        name: of the tensor, with the placeholders {layer} and, where each expert has its own, {expert}.
        stacked: all experts lie in this tensor, one after the other along its first axis.
        half: of the expert's output rows: gate and up share a tensor, as halves or row by row in turn.
        transposed: it lies as [in, out].
        mxfp4: kept as NAME_blocks and NAME_scales.
    """

    name: str
    stacked: bool = False
    half: Half | None = None
    transposed: bool = False
    mxfp4: bool = False

    def stored(self, layer: int, expert: int) -> str:
        """The name of the tensor that holds (the main part of) it."""
        return self.name.format(layer=layer, expert=expert) + ("_blocks" if self.mxfp4 else "")


@dataclass(frozen=True)
class Layout:
    """One way of storing a sparse layer.

    Attributes:
        w1: the gate projection.
        w2: the down projection.
        w3: the up projection.
        router: the name of the router's matrix [experts, hidden].
        router_extras: further tensors of the router that not every model has.
        others: the same of the layer: shared experts, biases of experts.
    """

    w1: Matrix
    w2: Matrix
    w3: Matrix
    router: str
    router_extras: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def matrices(self) -> tuple[Matrix, Matrix, Matrix]:
        """w1, w2 and w3."""
        return self.w1, self.w2, self.w3

    def prefixed(self, prefix: str) -> Layout:
        """The same under longer names."""
        w1, w2, w3 = (replace(matrix, name=prefix + matrix.name) for matrix in self.matrices)
        extras, others = (tuple(prefix + name for name in names) for names in (self.router_extras, self.others))
        return Layout(w1, w2, w3, prefix + self.router, extras, others)


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: for messages.
        model_types: of ``config.json``.
        architectures: of ``config.json``; they decide where a model_type stands for several families.
        layouts: how its checkpoints are found to be stored.
        n_layers, n_experts, top_k: where ``config.json`` tells them; the first of the keys that is there.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    layouts: tuple[Layout, ...]
    n_layers: tuple[str, ...] = ("num_hidden_layers",)
    n_experts: tuple[str, ...] = ("num_local_experts", "num_experts", "n_routed_experts")
    top_k: tuple[str, ...] = ("num_experts_per_tok",)


def _apart(block: str, w1: str, w2: str, w3: str, extras: tuple[str, ...] = (), others: tuple[str, ...] = ()) -> Layout:
    """One tensor for each matrix of each expert."""
    w1, w2, w3 = (f"{block}.experts.{{expert}}.{w}.weight" for w in (w1, w2, w3))
    return Layout(Matrix(w1), Matrix(w2), Matrix(w3), f"{block}.gate.weight", extras, others)


def _fused(
    gate_up: str,
    down: str,
    router: str,
    extras: tuple[str, ...] = (),
    others: tuple[str, ...] = (),
    *,
    transposed: bool = False,
) -> Layout:
    """Two tensors a layer, [experts, ...]; gate and up share one."""
    w1 = Matrix(gate_up, stacked=True, half="first", transposed=transposed)
    w2 = Matrix(down, stacked=True, transposed=transposed)
    return Layout(w1, w2, replace(w1, half="second"), router, extras, others)


def _gpt_oss(*, mxfp4: bool) -> Layout:
    """Gate and up in turn; [experts, out, in] in MXFP4, [experts, in, out] otherwise."""
    w1 = Matrix(f"{_MLP}.experts.gate_up_proj", stacked=True, half="even", transposed=not mxfp4, mxfp4=mxfp4)
    return Layout(
        w1=w1,
        w2=Matrix(f"{_MLP}.experts.down_proj", stacked=True, transposed=not mxfp4, mxfp4=mxfp4),
        w3=replace(w1, half="odd"),
        router=f"{_MLP}.router.weight",
        router_extras=(f"{_MLP}.router.bias",),
        others=(f"{_MLP}.experts.gate_up_proj_bias", f"{_MLP}.experts.down_proj_bias"),
    )


def _three(mlp: str) -> tuple[str, ...]:
    return tuple(f"{mlp}.{w}_proj.weight" for w in ("gate", "up", "down"))


_SPARSE = "model.layers.{layer}.block_sparse_moe"
_MLP = "model.layers.{layer}.mlp"
_FUSED = (f"{_MLP}.experts.gate_up_proj", f"{_MLP}.experts.down_proj")
_BIAS = "e_score_correction_bias"  # added to the scores when experts are chosen, not when they are weighed

_SHARED = (
    *_three(f"{_MLP}.shared_expert"),
    f"{_MLP}.shared_expert_gate.weight",
    *_three(f"{_MLP}.shared_experts"),
)
_TRANSFORMERS_5 = _fused(*_FUSED, f"{_MLP}.gate.weight", (f"{_MLP}.{_BIAS}", f"{_MLP}.gate.{_BIAS}"), _SHARED)
_PHI_TRANSFORMERS_5 = _fused(*_FUSED, f"{_MLP}.router.weight")
_MIXTRAL = _apart(_SPARSE, "w1", "w2", "w3", (f"{_SPARSE}.{_BIAS}",))
_MISTRAL = _apart("layers.{layer}.feed_forward", "w1", "w2", "w3")
_QWEN = _apart(_MLP, "gate_proj", "down_proj", "up_proj", (f"{_MLP}.gate.{_BIAS}",), _SHARED)
_DBRX_FFN = "transformer.blocks.{layer}.ffn"
_DBRX = Layout(
    w1=Matrix(f"{_DBRX_FFN}.experts.mlp.w1", stacked=True),
    w2=Matrix(f"{_DBRX_FFN}.experts.mlp.w2", stacked=True, transposed=True),
    w3=Matrix(f"{_DBRX_FFN}.experts.mlp.v1", stacked=True),
    router=f"{_DBRX_FFN}.router.layer.weight",
)
_GRANITE_SHARED = tuple(f"model.layers.{{layer}}.shared_mlp.{w}_linear.weight" for w in ("input", "output"))
_GRANITE = tuple(
    _fused(f"{_SPARSE}.{gate_up}", f"{_SPARSE}.{down}", f"{_SPARSE}.{router}", (), _GRANITE_SHARED)
    for gate_up, down, router in (
        ("input_linear.weight", "output_linear.weight", "router.layer.weight"),
        ("experts.gate_up_proj", "experts.down_proj", "router.weight"),
    )
)
_LLAMA_BLOCK = "model.layers.{layer}.feed_forward"
_LLAMA = _fused(
    f"{_LLAMA_BLOCK}.experts.gate_up_proj",
    f"{_LLAMA_BLOCK}.experts.down_proj",
    f"{_LLAMA_BLOCK}.router.weight",
    (),
    _three(f"{_LLAMA_BLOCK}.shared_expert"),
    transposed=True,
)

FAMILIES = (
    Family("Mixtral", ("mixtral",), ("MixtralForCausalLM",), (_MIXTRAL, _TRANSFORMERS_5, _MISTRAL)),
    Family("Phi-3.5-MoE", ("phimoe",), ("PhiMoEForCausalLM", "PhimoeForCausalLM"), (_MIXTRAL, _PHI_TRANSFORMERS_5)),
    Family("MiniMax-M2", ("minimax_m2",), ("MiniMaxM2ForCausalLM",), (_MIXTRAL, _TRANSFORMERS_5)),
    Family(
        "MiniMax-Text-01",
        ("minimax", "minimax_text_01"),
        ("MiniMaxForCausalLM", "MiniMaxText01ForCausalLM"),
        (_MIXTRAL, _TRANSFORMERS_5),
    ),
    Family("Qwen-MoE", ("qwen2_moe",), ("Qwen2MoeForCausalLM",), (_QWEN, _TRANSFORMERS_5)),
    Family("Qwen3-MoE", ("qwen3_moe",), ("Qwen3MoeForCausalLM",), (_QWEN, _TRANSFORMERS_5)),
    Family("OLMoE", ("olmoe",), ("OlmoeForCausalLM",), (_QWEN, _TRANSFORMERS_5)),
    Family("DeepSeek-V2", ("deepseek_v2",), ("DeepseekV2ForCausalLM",), (_QWEN, _TRANSFORMERS_5)),
    Family("DeepSeek-V3", ("deepseek_v3",), ("DeepseekV3ForCausalLM",), (_QWEN, _TRANSFORMERS_5)),
    Family("GLM-4.5", ("glm4_moe",), ("Glm4MoeForCausalLM",), (_QWEN, _TRANSFORMERS_5)),
    Family(
        "DBRX",
        ("dbrx",),
        ("DbrxForCausalLM",),
        (_DBRX,),
        n_layers=("n_layers",),
        n_experts=("ffn_config.moe_num_experts",),
        top_k=("ffn_config.moe_top_k",),
    ),
    Family("Granite-MoE", ("granitemoe", "granitemoeshared"), ("GraniteMoeForCausalLM",), _GRANITE),
    Family("gpt-oss", ("gpt_oss",), ("GptOssForCausalLM",), (_gpt_oss(mxfp4=True), _gpt_oss(mxfp4=False))),
    Family(
        "Llama 4",
        ("llama4", "llama4_text"),
        ("Llama4ForConditionalGeneration", "Llama4ForCausalLM"),
        (_LLAMA.prefixed("language_model."), _LLAMA),
        n_layers=("text_config.num_hidden_layers", "num_hidden_layers"),
        n_experts=("text_config.num_local_experts", "num_local_experts"),
        top_k=("text_config.num_experts_per_tok", "num_experts_per_tok"),
    ),
)
"""The table."""

MISTRAL_PARAMS = Family(
    "Mixtral, as Mistral stores it",
    (),
    (),
    (_MISTRAL,),
    n_layers=("n_layers",),
    n_experts=("moe.num_experts",),
    top_k=("moe.num_experts_per_tok",),
)
"""Recognised by a ``params.json`` in the place of ``config.json``."""


@dataclass(frozen=True)
class Counts:
    """What a configuration tells of a sparse model.

    Attributes:
        n_layers: dense layers included.
        n_experts: in a sparse layer, shared experts not counted.
        top_k: experts that a token is sent to.
        sparse: the layers that have experts.
    """

    n_layers: int
    n_experts: int
    top_k: int
    sparse: tuple[int, ...]


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """Return the row of the table for a ``config.json``: by architecture, then by model_type.

    Raises:
        ConfigError: the table has none.
    """
    architectures = config.get("architectures")
    named = architectures if isinstance(architectures, list) else []
    model_type = config.get("model_type")
    for family in FAMILIES:
        if any(name in named for name in family.architectures):
            return family
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    raise ConfigError(
        f"{where}: model_type {model_type!r} is none of the known families of sparse models "
        f"({', '.join(family.name for family in FAMILIES)})",
        hint="describe it yourself: write a subclass of octavo.hub.BaseMoE",
    )


def read_counts(family: Family, config: Mapping[str, Any], where: str) -> Counts:
    """Read layers, experts and top-k, and which layers are sparse.

    Raises:
        ConfigError: one of them is missing or makes no sense.
    """
    n_layers, n_experts, top_k = (
        _positive(keys, config, where) for keys in (family.n_layers, family.n_experts, family.top_k)
    )
    if max(n_layers, n_experts) > 65_536 or top_k > n_experts:
        raise ConfigError(
            f"{where}: {n_layers} layers of {n_experts} experts, {top_k} for each token, make no sense",
            hint=HINT_CONFIG,
        )
    text = config.get("text_config")
    sparse = _sparse_layers(text if isinstance(text, Mapping) else config, n_layers, where)
    return Counts(n_layers, n_experts, top_k, sparse)


def choose_layout(layouts: Sequence[Layout], names: Collection[str], layers: Iterable[int], where: str) -> Layout:
    """Return the layout by which one of these layers has a router and a first expert.

    Raises:
        CheckpointError: there is none; or these names mean different things in different families.
    """
    fits: list[Layout] = []
    for layout, layer in itertools.product(layouts, layers):
        wanted = (layout.router.format(layer=layer), *(matrix.stored(layer, 0) for matrix in layout.matrices))
        if all(name in names for name in wanted) and layout not in fits:
            fits.append(layout)
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise CheckpointError(
            f"{where}: {fits[0].w1.name} is stored in different ways by different families",
            hint="octavo.hub.find_moe tells them apart by config.json",
        )
    expected = " or ".join(dict.fromkeys(layout.w1.name for layout in layouts))
    raise CheckpointError(
        f"{where}: holds no experts by the names of its family ({expected})",
        hint="`octavo tensors` lists the names that are there; are the weights quantised, or of another model?",
    )


def layouts_like(expert: str, router: str) -> tuple[Layout, ...]:
    """Return the layouts of the family in which an expert's matrix and the router have these names; that one first."""
    found = [
        (layout, family)
        for family in FAMILIES
        for layout in family.layouts
        if router == layout.router and expert in (matrix.name for matrix in layout.matrices)
    ]
    return tuple(dict.fromkeys(other for layout, family in found for other in (layout, *family.layouts)))


def _positive(keys: tuple[str, ...], config: Mapping[str, Any], where: str) -> int:
    for key in keys:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None:
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        raise ConfigError(f"{where}: {key} is {value!r}; expected a positive whole number", hint=HINT_CONFIG)
    raise ConfigError(f"{where}: lacks {' or '.join(keys)}", hint=HINT_CONFIG)


def _sparse_layers(config: Mapping[str, Any], n_layers: int, where: str) -> tuple[int, ...]:
    """The layers that have experts, by whichever of the families' keys are there (each means one thing only)."""
    layers = range(n_layers)
    kinds, listed = config.get("mlp_layer_types"), config.get("moe_layers")
    try:
        if kinds is not None:
            return tuple(i for i in layers if kinds[i] == "sparse")
        if listed is not None:
            return tuple(i for i in layers if i in listed)
        first = config.get("first_k_dense_replace") or 0
        dense = config.get("mlp_only_layers") or ()
        every = config.get("decoder_sparse_step") or config.get("interleave_moe_layer_step") or 1
        frequency = config.get("moe_layer_freq") or 1
        return tuple(i for i in layers if i >= first and i not in dense and (i + 1) % every == 0 and i % frequency == 0)
    except (TypeError, LookupError):
        raise ConfigError(f"{where}: which layers have experts makes no sense", hint=HINT_CONFIG) from None
