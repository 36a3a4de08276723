"""One model written in every layout that Octavo reads, by the formats' own writers where these install.

Nothing here goes through `octavo.checkpoint`: names, shapes and orders come from the formats themselves. A writer
fills a folder and returns the weights it then holds, by canonical name in float32, as the format's own code gives
them back: for quantised layouts that differs from what was put in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

from conftest import tiny_model
from octavo.args import ModelArgs, MoEArgs

State = dict[str, Tensor]
FP16, BF16 = torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Sample:
    """A model to write: its shape, its weights by canonical name in float32, and a tokenizer.model."""

    args: ModelArgs
    state: State
    tokenizer: Path


def make_sample(tokenizer: Path, seed: int = 0, **changes: object) -> Sample:
    """A random model whose numbers float16 and bfloat16 hold exactly; its rows are whole groups of 128."""
    fields: dict[str, object] = {"dim": 128, "hidden_dim": 256, "head_dim": 32, "vocab_size": 420}
    model = tiny_model(seed, **(fields | changes))
    state = {name: p.bfloat16().half().float() for name, p in model.named_parameters()}
    return Sample(model.args, state, tokenizer)


# ---------------------------------------- the small files beside


def hf_config(sample: Sample) -> dict[str, Any]:
    args = sample.args
    config: dict[str, Any] = {
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "max_position_embeddings": args.max_seq_len,
        "rope_theta": args.rope_theta,
        "rms_norm_eps": args.norm_eps,
        "sliding_window": args.sliding_window,
        "tie_word_embeddings": args.tie_embeddings,
        "model_type": "mixtral" if args.moe else "mistral",
    }
    if args.moe:
        config |= {"num_local_experts": args.moe.num_experts, "num_experts_per_tok": args.moe.num_experts_per_tok}
    return config


def params(sample: Sample) -> dict[str, Any]:
    """As mistral-inference has them: rope_theta is left out."""
    args = sample.args
    keys = ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size")
    found: dict[str, Any] = {key: getattr(args, key) for key in keys}
    if args.tie_embeddings:
        found["tied_embeddings"] = True
    if args.moe:
        found["moe"] = {"num_experts_per_tok": args.moe.num_experts_per_tok, "num_experts": args.moe.num_experts}
    return found


def finish(sample: Sample, folder: Path, name: str, config: dict[str, Any]) -> None:
    """Put the configuration and the tokenizer beside the weights."""
    (folder / name).write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(sample.tokenizer.read_bytes())


# ---------------------------------------- names


def each_expert(sample: Sample) -> Iterator[tuple[int, int]]:
    """Every layer and expert."""
    assert sample.args.moe
    return ((n, e) for n in range(sample.args.n_layers) for e in range(sample.args.moe.num_experts))


def stack(sample: Sample, layer: int, matrix: str) -> Tensor:
    """One matrix of all experts, [experts, out, in]."""
    assert sample.args.moe
    prefix = f"layers.{layer}.feed_forward.experts."
    return torch.stack([sample.state[f"{prefix}{e}.{matrix}.weight"] for e in range(sample.args.moe.num_experts)])


def half_split(tensor: Tensor, head_dim: int) -> Tensor:
    """Rotary pairs half a head apart."""
    return tensor.view(-1, head_dim // 2, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)


def side_by_side(tensor: Tensor, head_dim: int) -> Tensor:
    """Undo `half_split`."""
    return tensor.view(-1, 2, head_dim // 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)


HF_BLOCK = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attention.w{w}": f"self_attn.{w}_proj" for w in "qkvo"},
    "feed_forward.gate": "block_sparse_moe.gate",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
HF_ENDS = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
GGUF_BLOCK = {
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    **{f"attention.w{w}": f"attn_{w}" for w in "qkv"},
    "attention.wo": "attn_output",
    "feed_forward.gate": "ffn_gate_inp",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}
GGUF_ENDS = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
GGUF_EXPERT = {"w1": "gate", "w2": "down", "w3": "up"}


def hf_name(name: str) -> str:
    """Hugging Face's name of a canonical tensor, one per expert."""
    module = name.removesuffix(".weight")
    if module in HF_ENDS:
        return f"{HF_ENDS[module]}.weight"
    _, layer, rest = module.split(".", 2)
    theirs = HF_BLOCK.get(rest) or rest.replace("feed_forward", "block_sparse_moe")
    return f"model.layers.{layer}.{theirs}.weight"


def hf_state(sample: Sample) -> State:
    """One tensor per expert."""
    rotary = ("wq.weight", "wk.weight")
    d = sample.args.head_dim
    return {hf_name(n): half_split(t, d) if n.endswith(rotary) else t for n, t in sample.state.items()}


def without_experts(named: State) -> State:
    return {name: tensor for name, tensor in named.items() if ".experts." not in name}


def canonical(sample: Sample, theirs: State) -> State:
    """Undo `hf_state`, or what mlx-lm makes of it (experts stacked)."""
    found: State = {}
    for name in sample.state:
        tensor = theirs.get(hf_name(name))
        if tensor is None:
            _, layer, _, _, expert, matrix, _ = name.split(".")
            kind = {"w1": "gate", "w2": "down", "w3": "up"}[matrix]
            tensor = theirs[f"model.layers.{layer}.block_sparse_moe.switch_mlp.{kind}_proj.weight"][int(expert)]
        rotary = name.endswith(("wq.weight", "wk.weight"))
        found[name] = side_by_side(tensor, sample.args.head_dim) if rotary else tensor
    return found


# ---------------------------------------- Hugging Face


def hf(sample: Sample, folder: Path, *, dtype: torch.dtype = BF16, original: bool = True, shard: str = "5GB") -> State:
    """By transformers."""
    theirs = without_experts(hf_state(sample))
    if sample.args.moe:
        theirs = {name.replace("block_sparse_moe", "mlp"): t for name, t in theirs.items()}
        for n in range(sample.args.n_layers):
            gate_up = torch.cat([stack(sample, n, "w1"), stack(sample, n, "w3")], dim=1)
            theirs[f"model.layers.{n}.mlp.experts.gate_up_proj"] = gate_up
            theirs[f"model.layers.{n}.mlp.experts.down_proj"] = stack(sample, n, "w2")
    config = hf_config(sample) | {"bos_token_id": 1, "eos_token_id": 2}
    config.pop("model_type")
    peer = (
        MixtralForCausalLM(MixtralConfig(**config)) if sample.args.moe else MistralForCausalLM(MistralConfig(**config))
    )
    missing, unexpected = peer.load_state_dict(theirs, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if sample.args.tie_embeddings else [], [])
    peer.to(dtype).save_pretrained(folder, save_original_format=original, max_shard_size=shard)
    (folder / "tokenizer.model").write_bytes(sample.tokenizer.read_bytes())
    return sample.state


# ---------------------------------------- Mistral


def mistral_stacked(sample: Sample, folder: Path, *, config: str = "config.json") -> State:
    """Eight files of different keys; experts one below the other, w2 of each transposed."""
    theirs = {n.replace("feed_forward", "block_sparse_moe"): t for n, t in without_experts(sample.state).items()}
    for n in range(sample.args.n_layers):
        for w in ("w1", "w2", "w3"):
            experts = stack(sample, n, w)
            experts = experts.transpose(1, 2) if w == "w2" else experts
            theirs[f"layers.{n}.block_sparse_moe.{w}"] = experts.reshape(-1, sample.args.dim)
    for i in range(8):
        part = {name: theirs[name].to(BF16) for name in list(theirs)[i::8]}
        torch.save(part, folder / f"consolidated.{i:02}.pt")
    finish(sample, folder, config, params(sample) if config == "params.json" else hf_config(sample))
    return sample.state


def mistral(sample: Sample, folder: Path, *, kind: str = "pth", dtype: torch.dtype = BF16) -> State:
    """One file under the names of the authors' code."""
    theirs = {name: tensor.to(dtype) for name, tensor in sample.state.items()}
    if kind == "pth":
        torch.save(theirs, folder / "consolidated.00.pth")
    else:
        save_file(theirs, folder / "consolidated.safetensors")
    finish(sample, folder, "params.json", params(sample))
    return sample.state


# ---------------------------------------- MLX


def mlx() -> Any:
    return pytest.importorskip("mlx.core", reason="MLX is not installed, which writes these layouts")


def to_mlx(tensor: Tensor) -> Any:
    return mlx().array(tensor.numpy()).astype(mlx().float16)


def from_mlx(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array.astype(mlx().float32)))


@dataclass(frozen=True)
class Groups:
    """MLX's group quantisation; what it leaves out is kept as it is."""

    bits: int
    group_size: int = 32
    leaves_out: tuple[str, ...] = (".gate.",)

    def covers(self, name: str, tensor: Tensor) -> bool:
        return tensor.ndim > 1 and not any(word in name for word in self.leaves_out)

    @property
    def config(self) -> dict[str, Any]:
        return {"quantization": {"group_size": self.group_size, "bits": self.bits}}


def mlx_arrays(named: State, groups: Groups | None) -> tuple[dict[str, Any], State]:
    """Arrays as MLX stores them, and the numbers that it then computes with."""
    arrays, values = {}, {}
    for name, tensor in named.items():
        array = to_mlx(tensor)
        if groups and groups.covers(name, tensor):
            module = name.removesuffix(".weight")
            parts = mlx().quantize(array, groups.group_size, groups.bits)
            arrays |= {f"{module}.{part}": a for part, a in zip(("weight", "scales", "biases"), parts, strict=True)}
            values[name] = from_mlx(mlx().dequantize(*parts, groups.group_size, groups.bits))
        else:
            arrays[name] = array
            values[name] = tensor
    return arrays, values


def mlx_npz(sample: Sample, folder: Path, *, groups: Groups | None = None, files: int = 1) -> State:
    """The first examples: the authors' names, params.json's keys in config.json."""
    arrays, values = mlx_arrays(sample.state, groups)
    for i in range(files):
        part = {name: arrays[name] for name in list(arrays)[i::files]}
        mlx().savez(folder / ("weights.npz" if files == 1 else f"weights.{i}.npz"), **part)
    quantization = groups.config if groups else {}
    finish(sample, folder, "config.json", params(sample) | {"model_type": "mixtral"} | quantization)
    return values


def mlx_single(sample: Sample, folder: Path, *, groups: Groups | None = None) -> State:
    """Early mlx-lm: Hugging Face's names, one tensor per expert."""
    arrays, values = mlx_arrays(hf_state(sample), groups)
    mlx().save_safetensors(str(folder / "weights.00.safetensors"), arrays)
    finish(sample, folder, "config.json", hf_config(sample) | (groups.config if groups else {}))
    return canonical(sample, values)


def mlx_stacked(sample: Sample, folder: Path, *, groups: Groups | None = None) -> State:
    """mlx-lm: experts stacked. Written without its model, for shapes that this does not know."""
    theirs = without_experts(hf_state(sample))
    for n in range(sample.args.n_layers):
        for w, kind in GGUF_EXPERT.items():
            theirs[f"model.layers.{n}.block_sparse_moe.switch_mlp.{kind}_proj.weight"] = stack(sample, n, w)
    arrays, values = mlx_arrays(theirs, groups)
    mlx().save_safetensors(str(folder / "model.safetensors"), arrays)
    finish(sample, folder, "config.json", hf_config(sample) | (groups.config if groups else {}))
    return canonical(sample, values)


def mlx_lm(sample: Sample, folder: Path, *, bits: int | None = None, mixed: bool = False) -> State:
    """mlx-lm by its own code: model, quantisation, writer.

    Args:
        bits: of groups of 64; None leaves float16.
        mixed: w2 of every layer gets 6 bits in groups of 32, which only config.json tells.
    """
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed, which writes this layout")
    from mlx.utils import tree_flatten
    from mlx_lm.models.mixtral import Model, ModelArgs
    from mlx_lm.utils import dequantize_model, quantize_model, save_config, save_model

    config = hf_config(sample)
    peer = Model(ModelArgs.from_dict(config))
    peer.load_weights(list(peer.sanitize({n: to_mlx(t) for n, t in hf_state(sample).items()}).items()))
    if bits:
        special = {"group_size": 32, "bits": 6}
        choose = (lambda path, module: special if "down_proj" in path else True) if mixed else None
        peer, config = quantize_model(peer, config, 64, bits, quant_predicate=choose)
    save_model(folder, peer)
    save_config(config, folder / "config.json")
    (folder / "tokenizer.model").write_bytes(sample.tokenizer.read_bytes())
    plain = dict(tree_flatten(dequantize_model(peer).parameters()))
    return canonical(sample, {name: from_mlx(array) for name, array in plain.items()})


# ---------------------------------------- GGUF

SCALE_OFFSETS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def random_blocks(encoding: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Blocks of a kind that the package only reads: random numbers under small scales."""
    elements, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[encoding]]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // elements, nbytes), dtype=np.uint8)
    for offset in SCALE_OFFSETS[encoding]:
        scales = rng.uniform(1e-4, 4e-4, blocks.shape[:-1]).astype(np.float16)
        blocks[..., offset : offset + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def gguf_state(sample: Sample, *, merged: bool) -> dict[str, list[str]]:
    """Every tensor's name there, and the canonical tensors that are stacked in it."""
    found: dict[str, list[str]] = {}
    for name in sample.state:
        module = name.removesuffix(".weight")
        if module in GGUF_ENDS:
            theirs = GGUF_ENDS[module]
        else:
            _, layer, rest = module.split(".", 2)
            if ".experts." in rest:
                _, _, expert, matrix = rest.split(".")
                end = f"{GGUF_EXPERT[matrix]}_exps" if merged else f"{GGUF_EXPERT[matrix]}.{expert}"
                theirs = f"blk.{layer}.ffn_{end}"
            else:
                theirs = f"blk.{layer}.{GGUF_BLOCK[rest]}"
        found.setdefault(f"{theirs}.weight", []).append(name)
    return found


def gguf_metadata(sample: Sample, writer: gguf.GGUFWriter, *, theta: bool) -> None:
    args = sample.args
    writer.add_block_count(args.n_layers)
    writer.add_context_length(args.max_seq_len)
    writer.add_embedding_length(args.dim)
    writer.add_feed_forward_length(args.hidden_dim)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.n_kv_heads)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    for add in (writer.add_rope_dimension_count, writer.add_key_length, writer.add_value_length):
        add(args.head_dim)
    if theta:
        writer.add_rope_freq_base(args.rope_theta)
    if args.moe:
        writer.add_expert_count(args.moe.num_experts)
        writer.add_expert_used_count(args.moe.num_experts_per_tok)


def gguf_tokenizer(sample: Sample, writer: gguf.GGUFWriter) -> None:
    """The tokens of tokenizer.model, as llama.cpp's converter writes them."""
    spm = sentencepiece.SentencePieceProcessor(model_file=str(sample.tokenizer))
    tests = ((spm.IsUnknown, 2), (spm.IsControl, 3), (spm.IsUnused, 5), (spm.IsByte, 6))
    ids = range(spm.vocab_size())
    padding = range(len(ids), sample.args.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([spm.IdToPiece(i) for i in ids] + [f"[PAD{i}]" for i in padding])
    writer.add_token_scores([spm.GetScore(i) for i in ids] + [-1000.0] * len(padding))
    writer.add_token_types([next((kind for is_, kind in tests if is_(i)), 1) for i in ids] + [5] * len(padding))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def gguf_folder(
    sample: Sample, folder: Path, *, encoding: str = "F16", merged: bool = True, parts: int = 1, theta: bool = True
) -> State:
    """By the gguf package. Norms are F32, and so is the router, except in files before the merge of experts."""
    names = gguf_state(sample, merged=merged)
    writer = gguf.GGUFWriter(folder / "a.gguf", "llama", split_max_tensors=-(-len(names) // parts) if parts > 1 else 0)
    gguf_metadata(sample, writer, theta=theta)
    gguf_tokenizer(sample, writer)
    values: State = {}
    for number, (theirs, ours) in enumerate(names.items()):
        whole = torch.stack([sample.state[name] for name in ours]) if "_exps" in theirs else sample.state[ours[0]]
        keeps = whole.ndim == 1 or (merged and "ffn_gate_inp" in theirs)
        kind = GGMLQuantizationType["F32" if keeps else encoding]
        known = encoding not in SCALE_OFFSETS or keeps
        data = quantize(whole.numpy(), kind) if known else random_blocks(encoding, tuple(whole.shape), number)
        writer.add_tensor(theirs, data, raw_dtype=kind)
        back = torch.from_numpy(np.array(dequantize(data, kind))).view(whole.shape)
        values |= dict(zip(ours, back if "_exps" in theirs else [back], strict=True))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


# ---------------------------------------- gpt-fast


def gpt_fast_state(sample: Sample, *, old: bool) -> State:
    theirs = {n.replace("feed_forward", "block_sparse_moe"): t for n, t in without_experts(sample.state).items()}
    for n in range(sample.args.n_layers):
        attention = f"layers.{n}.attention."
        theirs[f"{attention}wqkv.weight"] = torch.cat([theirs.pop(f"{attention}w{w}.weight") for w in "qkv"])
        for w in ("w1", "w2", "w3"):
            whole = stack(sample, n, w)
            whole = whole.transpose(1, 2).contiguous() if old and w == "w2" else whole
            theirs[f"layers.{n}.block_sparse_moe.cond_ffn.{w}"] = whole
    return theirs


def gpt_fast(sample: Sample, folder: Path, *, old: bool = False) -> State:
    """model.pth as its converter leaves it, beside the repository's config.json."""
    theirs = {name: tensor.to(BF16) for name, tensor in gpt_fast_state(sample, old=old).items()}
    torch.save(theirs, folder / "model.pth")
    finish(sample, folder, "config.json", hf_config(sample))
    return sample.state


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers, a scale for each row (of experts in float32), and their product in bfloat16, which gpt-fast runs in."""
    scales = weight.abs().amax(-1) / 127
    numbers = (weight / scales[..., None]).round().clamp(-128, 127).to(torch.int8)
    product = (numbers.float() * scales.bfloat16().float()[..., None]).bfloat16().float()
    return numbers, scales if weight.ndim == 3 else scales.bfloat16(), product


def gpt_fast_int8(sample: Sample, folder: Path) -> State:
    """model_int8.pth: every linear but the router, one scale for each output."""
    theirs, values = State(), State()
    for name, tensor in gpt_fast_state(sample, old=False).items():
        if tensor.ndim == 1 or name.endswith(("gate.weight", "tok_embeddings.weight")):
            theirs[name], values[name] = tensor.to(BF16), tensor
            continue
        scales = name.replace("cond_ffn.w", "cond_ffn.scales") if tensor.ndim == 3 else name[:-6] + "scales"
        theirs[name], theirs[scales], values[name] = int8_rows(tensor)
    torch.save(theirs, folder / "model_int8.pth")
    finish(sample, folder, "config.json", hf_config(sample))
    return _split_gpt_fast(sample, values)


def _split_gpt_fast(sample: Sample, theirs: State) -> State:
    found: State = {}
    for name in sample.state:
        _, layer, *rest = (*name.split("."), "", "")
        attention = f"layers.{layer}.attention.wqkv.weight"
        if name.endswith(("wq.weight", "wk.weight", "wv.weight")):
            sizes = [sample.state[f"layers.{layer}.attention.w{w}.weight"].shape[0] for w in "qkv"]
            found[name] = theirs[attention].split(sizes)["qkv".index(name[-8])]
        elif ".experts." in name:
            found[name] = theirs[f"layers.{layer}.block_sparse_moe.cond_ffn.{rest[3]}"][int(rest[2])]
        else:
            found[name] = theirs[name.replace("feed_forward", "block_sparse_moe")]
    return found


# ---------------------------------------- AWQ and GPTQ

IN_ORDER, AWQ_ORDER = tuple(range(8)), (0, 2, 4, 6, 1, 3, 5, 7)


def grouped(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """4-bit numbers [in, out], zeros and float16 scales [groups, out], and the matrix [out, in] they stand for."""
    columns = weight.T.reshape(-1, group, weight.shape[0])
    low, high = columns.amin(1).clamp(max=0), columns.amax(1).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=1e-5).half()
    zeros = (-low / scales.float()).round().clamp(1, 15)
    numbers = (columns / scales.float()[:, None] + zeros[:, None]).round().clamp(0, 15)
    back = ((numbers - zeros[:, None]) * scales.float()[:, None]).half().float()
    return numbers.flatten(0, 1).long(), zeros.long(), scales, back.flatten(0, 1).T


def words(numbers: Tensor, order: tuple[int, ...]) -> Tensor:
    """Eight neighbours of a row in an int32; the i-th lowest four bits hold neighbour ``order[i]``."""
    eights = numbers.view(numbers.shape[0], -1, 8)[:, :, list(order)]
    packed = (eights << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def packed_folder(sample: Sample, folder: Path, *, method: str, group: int = 64) -> State:
    """AWQ (gemm) or GPTQ safetensors: every linear but router and output."""
    theirs, values = State(), State()
    for name, tensor in hf_state(sample).items():
        if tensor.ndim == 1 or "gate.weight" in name or not name.startswith("model.layers."):
            theirs[name], values[name] = tensor.half(), tensor
            continue
        base = name.removesuffix(".weight")
        numbers, zeros, theirs[f"{base}.scales"], values[name] = grouped(tensor, group)
        if method == "awq":
            theirs[f"{base}.qweight"], theirs[f"{base}.qzeros"] = words(numbers, AWQ_ORDER), words(zeros, AWQ_ORDER)
        else:
            theirs[f"{base}.qweight"] = words(numbers.T.contiguous(), IN_ORDER).T.contiguous()
            theirs[f"{base}.qzeros"] = words(zeros - 1, IN_ORDER)
            theirs[f"{base}.g_idx"] = (torch.arange(tensor.shape[1]) // group).int()
    save_file({n: t.contiguous() for n, t in theirs.items()}, folder / "model.safetensors", {"format": "pt"})
    extra = {"version": "gemm", "zero_point": True} if method == "awq" else {"desc_act": False, "sym": False}
    quantization = {"quant_method": method, "bits": 4, "group_size": group, **extra}
    finish(sample, folder, "config.json", hf_config(sample) | {"quantization_config": quantization})
    return canonical(sample, values)


# ---------------------------------------- all of them


@dataclass(frozen=True)
class Case:
    """A way to write a model, the name that Octavo gives its layout, and changes to the model's shape."""

    layout: str
    write: Callable[[Sample, Path], State]
    changes: tuple[tuple[str, object], ...] = ()


DENSE = (("moe", None),)
WIDE = (("dim", 256), ("hidden_dim", 512), ("head_dim", 64), ("n_layers", 1), ("moe", MoEArgs(2, 1)))
PLAIN = {
    "hf": Case("hf", hf),
    "hf-fp16-shards": Case("hf", partial(hf, dtype=FP16, shard="1MB")),
    "hf-fused": Case("hf-fused", partial(hf, original=False)),
    "hf-fused-fp32-shards": Case("hf-fused", partial(hf, original=False, dtype=torch.float32, shard="3MB")),
    "hf-dense": Case("hf-dense", hf, DENSE),
    "mistral-stacked": Case("mistral-stacked", mistral_stacked),
    "mistral-stacked-params": Case("mistral-stacked", partial(mistral_stacked, config="params.json")),
    "mistral-pth": Case("mistral", mistral),
    "mistral-safetensors": Case("mistral", partial(mistral, kind="safetensors", dtype=FP16)),
    "mistral-dense": Case("mistral-dense", mistral, DENSE),
    "mlx-npz": Case("mistral", mlx_npz),
    "mlx-npz-8-files": Case("mistral", partial(mlx_npz, files=8)),
    "mlx-single": Case("hf", mlx_single),
    "mlx-stacked": Case("mlx", mlx_stacked),
    "mlx-lm": Case("mlx", mlx_lm),
    "gguf-f32": Case("gguf", partial(gguf_folder, encoding="F32")),
    "gguf-f16": Case("gguf", gguf_folder),
    "gguf-bf16": Case("gguf", partial(gguf_folder, encoding="BF16")),
    "gguf-2-files": Case("gguf", partial(gguf_folder, parts=2)),
    "gguf-no-theta": Case("gguf", partial(gguf_folder, theta=False)),
    "gguf-tied": Case("gguf", gguf_folder, (("tie_embeddings", True),)),
    "gguf-split": Case("gguf-split", partial(gguf_folder, merged=False)),
    "gguf-dense": Case("gguf-dense", gguf_folder, DENSE),
    "gpt-fast": Case("gpt-fast", gpt_fast),
    "gpt-fast-old": Case("gpt-fast-old", partial(gpt_fast, old=True)),
}
QUANTISED = {
    **{
        f"mlx-npz-{bits}-bit-g{size}": Case("mistral", partial(mlx_npz, groups=Groups(bits, size)))
        for bits in (2, 3, 4, 5, 6, 8)
        for size in (32, 64, 128)
    },
    "mlx-npz-with-gate": Case("mistral", partial(mlx_npz, groups=Groups(4, leaves_out=()), files=8)),
    "mlx-npz-no-embeddings": Case("mistral", partial(mlx_npz, groups=Groups(4, leaves_out=(".gate.", "tok_emb")))),
    "mlx-single-4-bit": Case("hf", partial(mlx_single, groups=Groups(4, 64))),
    "mlx-stacked-3-bit": Case("mlx", partial(mlx_stacked, groups=Groups(3, 64))),
    **{f"mlx-lm-{bits}-bit": Case("mlx", partial(mlx_lm, bits=bits)) for bits in (2, 4, 8)},
    "mlx-lm-mixed": Case("mlx", partial(mlx_lm, bits=4, mixed=True)),
    **{
        f"gguf-{name.lower()}": Case("gguf", partial(gguf_folder, encoding=name))
        for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
    },
    **{f"gguf-{name.lower()}": Case("gguf", partial(gguf_folder, encoding=name), WIDE) for name in SCALE_OFFSETS},
    "gguf-split-q4_0": Case("gguf-split", partial(gguf_folder, encoding="Q4_0", merged=False)),
    "gpt-fast-int8": Case("gpt-fast", gpt_fast_int8),
    "awq": Case("hf", partial(packed_folder, method="awq")),
    "gptq": Case("hf", partial(packed_folder, method="gptq")),
}
CASES = PLAIN | QUANTISED
WEIGHTS = (".safetensors", ".npz", ".pt", ".pth", ".gguf")
