"""What `octavo convert` writes: nothing is lost on the way round, and the tools it is for run it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaTokenizer, MistralForCausalLM, MixtralForCausalLM

import layouts
from layouts import CASES, Sample, gguf_state, hf, hf_state, make_sample, mlx
from octavo import LLM
from octavo.args import MoEArgs
from octavo.cache import make_cache
from octavo.checkpoint import open_checkpoint
from octavo.convert import plan_conversion
from octavo.llm import shipped_model
from octavo.load import load_model
from octavo.model import Mixtral
from octavo.tokenizer import Tokenizer
from octavo.tokenizer.hf_write import tokenizer_json
from octavo.tokenizer.spm_proto import SpmModel
from run_octavo import run
from tiny_folder import make_tiny_folder

TARGETS = ("hf", "mistral", "mlx", "gguf")
TEXTS = ("The quick brown fox", " a  b\n\tc", "l'été, 😀 ?", "")
IDS = torch.tensor([[1, 5, 300, 77, 419, 12, 12, 260, 33, 8, 90, 151, 2, 64, 7, 400]])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("tokenizer") / "model") / "tokenizer.model"


def convert(source: Path, target: Path, to: str, **options: Any) -> Path:
    plan_conversion(source, target, to=to, **options).run()
    return target


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        part = load_file(path)
        assert not found.keys() & part.keys()
        found |= part
    return found


def same_bytes(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(ours[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def greedy(model: Mixtral, ids: list[int], tokens: int) -> list[int]:
    cache, new, out = make_cache(model.args, 1), ids, []
    for _ in range(tokens):
        new = [int(model(torch.tensor([new]), cache=cache, last_only=True).argmax())]
        out += new
    return out


# ---------------------------------------- there and back again


def go_round(source: Path, place: Path, **options: Any) -> Path:
    """hf -> mistral -> mlx -> gguf -> hf."""
    for to in ("mistral", "mlx", "gguf", "hf"):
        source = convert(source, place / f"as-{to}", to, **options)
    return source


@pytest.mark.parametrize("shard_bytes", [10**10, 300_000], ids=["whole", "shards"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_all_the_way_round_every_byte_comes_back(
    dtype: torch.dtype, shard_bytes: int, tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "source").mkdir()
    hf(make_sample(tokenizer), tmp_path / "source", dtype=dtype, shard="1MB" if shard_bytes < 10**10 else "5GB")
    back = go_round(tmp_path / "source", tmp_path, shard_bytes=shard_bytes)
    same_bytes(tensors_of(back), tensors_of(tmp_path / "source"))
    assert (back / "model.safetensors.index.json").exists() == (shard_bytes < 10**10)
    assert (back / "tokenizer.model").exists()
    kept = ("hidden_size", "num_experts_per_tok", "rope_theta", "max_position_embeddings", "eos_token_id", "dtype")
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (back, tmp_path / "source"))
    theirs["rope_theta"] = theirs["rope_parameters"]["rope_theta"]
    assert {key: ours[key] for key in kept} == {key: theirs[key] for key in kept}


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_embeddings": True},
        {"moe": None},
        {"head_dim": 16, "n_kv_heads": 4, "vocab_size": 32002, "n_layers": 1},
        {"sliding_window": 7, "norm_eps": 1e-6, "rope_theta": 12_345.5, "max_seq_len": 99, "moe": MoEArgs(3, 1)},
    ],
    ids=["tied", "dense", "odd", "settings"],
)
def test_other_shapes_go_round_too(changes: dict[str, object], tokenizer: Path, tmp_path: Path) -> None:
    small = {"dim": 32, "hidden_dim": 48, "head_dim": 8} | changes
    (tmp_path / "source").mkdir()
    hf(make_sample(tokenizer, **small), tmp_path / "source")
    back = go_round(tmp_path / "source", tmp_path)
    same_bytes(tensors_of(back), tensors_of(tmp_path / "source"))
    assert [open_checkpoint(tmp_path / f"as-{to}").args for to in TARGETS] == [make_sample(tokenizer, **small).args] * 4


def test_all_ends_of_texts_go_round(tokenizer: Path, tmp_path: Path) -> None:
    """A chat model may have several."""
    (tmp_path / "source").mkdir()
    hf(make_sample(tokenizer), tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text('{"eos_token_id": [2, 4], "temperature": 0.7}')
    back = go_round(tmp_path / "source", tmp_path)
    assert all(LLM.load(tmp_path / f"as-{to}").eos_ids == {2, 4} for to in TARGETS)
    assert json.loads((back / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": [2, 4]}
    assert json.loads((tmp_path / "as-mlx" / "generation_config.json").read_text())["temperature"] == 0.7


def test_a_tensor_of_another_dtype_keeps_it(tokenizer: Path, tmp_path: Path) -> None:
    """Routers and norms of float32 in a bfloat16 model, as training leaves them: not all numbers fit bfloat16."""
    sample = make_sample(tokenizer)
    theirs = {name: tensor.bfloat16() for name, tensor in hf_state(sample).items()}
    for name in theirs:
        if name.endswith(("gate.weight", "layernorm.weight", "model.norm.weight")):
            theirs[name] = hf_state(sample)[name] + 1e-6
    source = tmp_path / "source"
    source.mkdir()
    save_file(theirs, source / "model.safetensors")
    layouts.finish(sample, source, "config.json", layouts.hf_config(sample))
    same_bytes(tensors_of(go_round(source, tmp_path)), theirs)


@pytest.mark.parametrize(
    "name",
    [
        "hf-fused",
        "mistral-stacked",
        "mistral-pth",
        "mlx-npz-8-files",
        "mlx-lm",
        "gguf-2-files",
        "gguf-split",
        "gpt-fast-old",
        "mlx-npz-5-bit-g64",
        "mlx-lm-mixed",
        "gguf-q5_1",
        "gguf-q4_k",
        "gpt-fast-int8",
        "awq",
    ],
)
def test_every_layout_becomes_every_other(name: str, tokenizer: Path, tmp_path: Path) -> None:
    """The numbers stay as they were read, and so does the tokenizer."""
    sample = make_sample(tokenizer, **dict(CASES[name].changes))
    (tmp_path / "source").mkdir()
    CASES[name].write(sample, tmp_path / "source")
    before, tokens = load_model(tmp_path / "source", dtype="float32")
    assert tokens is not None
    for to in TARGETS:
        after, tokens_after = load_model(convert(tmp_path / "source", tmp_path / to, to), dtype="float32")
        assert torch.equal(after(IDS), before(IDS)), to
        assert tokens_after is not None
        assert [tokens_after.encode(text) for text in TEXTS] == [tokens.encode(text) for text in TEXTS]


# ---------------------------------------- quantised


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
@pytest.mark.parametrize("width", [128, 144], ids=["", "rows-of-no-whole-blocks"])
def test_gguf_blocks_are_the_package_s(dtype: str, width: int, tokenizer: Path, tmp_path: Path) -> None:
    sample = make_sample(tokenizer, hidden_dim=width)
    (tmp_path / "source").mkdir()
    hf(sample, tmp_path / "source")
    path = convert(tmp_path / "source", tmp_path / "model.gguf", "gguf", dtype=dtype)
    for tensor in gguf.GGUFReader(path).tensors:
        whole = gguf_tensor(sample, tensor.name)
        kind = GGMLQuantizationType[dtype.upper()]
        if whole.ndim == 1 or "ffn_gate_inp" in tensor.name:
            kind = GGMLQuantizationType.F32
        elif whole.shape[-1] % 32:
            kind = GGMLQuantizationType.F16
        assert tensor.tensor_type == kind
        blocks = quantize(whole, kind)
        assert np.array_equal(tensor.data.view(np.uint8), blocks.view(np.uint8))
        assert np.array_equal(dequantize(tensor.data, kind), dequantize(blocks, kind))


def gguf_tensor(sample: Sample, name: str) -> np.ndarray:
    """A tensor of the source, as GGUF stacks it."""
    ours = [sample.state[one] for one in gguf_state(sample, merged=True)[name]]
    return (torch.stack(ours) if "_exps" in name else ours[0]).numpy()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_mlx_groups_are_mlx_s(bits: int, dtype: torch.dtype, tokenizer: Path, tmp_path: Path) -> None:
    """Packed numbers, scales and biases, byte for byte."""
    core = mlx()
    (tmp_path / "source").mkdir()
    hf(make_sample(tokenizer), tmp_path / "source", dtype=dtype)
    plain = core.load(str(convert(tmp_path / "source", tmp_path / "plain", "mlx") / "model.safetensors"))
    packed = core.load(
        str(convert(tmp_path / "source", tmp_path / "packed", "mlx", dtype=f"q{bits}") / "model.safetensors")
    )
    quantised = [name.removesuffix(".scales") for name in packed if name.endswith(".scales")]
    assert len(quantised) == 2 * 7 + 2
    for module in quantised:
        expected = core.quantize(plain.pop(f"{module}.weight"), 64, bits)
        for part, array in zip(("weight", "scales", "biases"), expected, strict=True):
            ours = packed.pop(f"{module}.{part}")
            assert (ours.dtype, ours.shape) == (array.dtype, array.shape)
            assert core.array_equal(ours, array), (module, part)
    assert packed.keys() == plain.keys()
    assert all(core.array_equal(array, plain[name]) for name, array in packed.items())


# ---------------------------------------- transformers


@pytest.mark.parametrize(
    "name",
    ["hf", "hf-dense", "mistral-stacked", "mistral-pth", "mlx-npz", "mlx-lm-4-bit", "gguf-f16", "gguf-q4_0", "awq"],
)
def test_transformers_runs_it(name: str, tokenizer: Path, tmp_path: Path) -> None:
    """Weights, tokenizer and greedy tokens."""
    case = CASES[name]
    (tmp_path / "source").mkdir()
    case.write(make_sample(tokenizer, **dict(case.changes)), tmp_path / "source")
    folder = convert(tmp_path / "source", tmp_path / "converted", "hf")
    kind = MistralForCausalLM if dict(case.changes) else MixtralForCausalLM
    peer, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    llm = LLM.load(tmp_path / "source", dtype="float32")
    with torch.inference_mode():
        expected = peer.eval()(IDS, use_cache=False).logits
        theirs = peer.generate(IDS, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.allclose(llm.model(IDS), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert greedy(llm.model, IDS[0].tolist(), 24) == theirs[0, IDS.shape[1] :].tolist()
    same_tokenizer(llm, folder)


def same_tokenizer(llm: LLM, folder: Path) -> None:
    """Of transformers: the one it chooses itself; and LlamaTokenizer, which drops a space that a text begins with."""
    assert llm.tokenizer is not None
    for kind in (AutoTokenizer, LlamaTokenizer):
        peer = kind.from_pretrained(folder)
        assert (peer.bos_token_id, peer.eos_token_id) == (llm.tokenizer.bos_id, llm.tokenizer.eos_id)
        for text in TEXTS if kind is AutoTokenizer else map(str.strip, TEXTS):
            ids = llm.tokenizer.encode(text, bos=llm.tokenizer.adds_bos)
            assert peer(text).input_ids == ids, (kind, text)
            assert peer.decode(ids, skip_special_tokens=True) == llm.tokenizer.decode(ids)


TOKENIZERS = {
    "mixtral-8x7b": lambda: mistral_common_data() / "tokenizer.model.v1",
    "mixtral-8x22b": lambda: mistral_common_data() / "mistral_instruct_tokenizer_240323.model.v3",
    "menny": lambda: shipped_model() / "tokenizer.model",
}


def mistral_common_data() -> Path:
    peer = pytest.importorskip("mistral_common", reason="mistral-common is not installed, which has this tokenizer")
    return Path(peer.__file__).parent / "data"


@pytest.fixture(scope="module", params=TOKENIZERS)
def both_kinds(request: pytest.FixtureRequest) -> tuple[sentencepiece.SentencePieceProcessor, tokenizers.Tokenizer]:
    """A tokenizer.model, and the tokenizer.json that is made of it."""
    path = TOKENIZERS[request.param]()
    tokenizer = Tokenizer.from_file(path)
    data = tokenizer_json(SpmModel.from_bytes(path.read_bytes(), path.name), (), tokenizer.bos_id)
    assert data is not None
    return sentencepiece.SentencePieceProcessor(model_file=str(path)), tokenizers.Tokenizer.from_str(data.decode())


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40) | st.text("ab AE,.\n\u2581é 1", max_size=40))
@example(text=" Hello")
@example(text="  two\n\n  lines\t")
@example(text="\u2581\u2581 a")
def test_tokenizer_json_gives_the_ids_of_tokenizer_model(both_kinds: Any, text: str) -> None:
    spm, peer = both_kinds
    text = text.replace("\0", "")  # which ends a text for SentencePiece
    ids = spm.encode(text)
    assert peer.encode(text).ids == [spm.bos_id(), *ids]
    assert peer.encode(text, add_special_tokens=False).ids == ids
    assert peer.decode(ids) == spm.decode(ids)


# ---------------------------------------- MLX

# In float32 both sum the same products in other orders; a sum of 256 then differs by some 1e-6 of its size, and two
# layers with a softmax in between make 1e-5 of it. MLX's packed products multiply before they add the bias: as much.
MLX_TOLERANCE = 1e-4


@pytest.mark.parametrize("dtype", [None, "q8", "q4"], ids=str)
@pytest.mark.parametrize("name", ["hf", "hf-dense", "mistral-stacked", "gguf-q8_0"])
def test_mlx_lm_runs_it(name: str, dtype: str | None, tokenizer: Path, tmp_path: Path) -> None:
    core = mlx()
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed, which would run this")
    case = CASES[name]
    (tmp_path / "source").mkdir()
    case.write(make_sample(tokenizer, **dict(case.changes)), tmp_path / "source")
    wide = convert(tmp_path / "source", tmp_path / "wide", "hf", dtype="float32")
    folder = convert(wide, tmp_path / "converted", "mlx", dtype=dtype, shard_bytes=100_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    peer, tokens = mlx_lm.load(str(folder))
    llm = LLM.load(folder, dtype="float32")
    expected = llm.model(IDS)
    theirs = torch.from_numpy(np.array(peer(core.array(IDS.numpy()))))
    assert torch.allclose(theirs, expected, rtol=0, atol=MLX_TOLERANCE * float(expected.abs().max()))
    assert theirs[0, -1].argmax() == expected[0, -1].argmax()
    assert llm.tokenizer is not None
    assert [tokens.encode(text) for text in TEXTS] == [llm.tokenizer.encode(text, bos=True) for text in TEXTS]


def test_mlx_lm_runs_what_only_fits_in_part(tokenizer: Path, tmp_path: Path) -> None:
    """Rows of 96 are no whole groups of 64, so w2 stays as it is."""
    core = mlx()
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed, which would run this")
    (tmp_path / "source").mkdir()
    hf(make_sample(tokenizer, hidden_dim=96), tmp_path / "source", dtype=torch.float32)
    folder = convert(tmp_path / "source", tmp_path / "converted", "mlx", dtype="q4")
    assert {name.split(".")[-2] for name in tensors_of(folder) if "switch_mlp" in name and "scales" in name} == {
        "gate_proj",
        "up_proj",
    }
    expected = load_model(folder)[0](IDS)
    theirs = torch.from_numpy(np.array(mlx_lm.load(str(folder))[0](core.array(IDS.numpy()))))
    assert torch.allclose(theirs, expected, rtol=0, atol=MLX_TOLERANCE * float(expected.abs().max()))


# ---------------------------------------- llama.cpp

NEEDED = (
    *("general.architecture", "llama.context_length", "llama.embedding_length", "llama.block_count"),
    *("llama.feed_forward_length", "llama.rope.dimension_count", "llama.rope.freq_base", "llama.attention.head_count"),
    *("llama.attention.head_count_kv", "llama.attention.layer_norm_rms_epsilon", "llama.expert_count"),
    *("llama.expert_used_count", "llama.vocab_size", "tokenizer.ggml.model", "tokenizer.ggml.tokens"),
    *("tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.bos_token_id"),
    *("tokenizer.ggml.eos_token_id", "tokenizer.ggml.unknown_token_id", "tokenizer.ggml.add_bos_token"),
)


def test_the_gguf_package_reads_all_that_llama_cpp_needs(tokenizer: Path, tmp_path: Path) -> None:
    sample = make_sample(tokenizer, head_dim=16, vocab_size=431, moe=MoEArgs(6, 3))
    (tmp_path / "source").mkdir()
    hf(sample, tmp_path / "source")
    ours = gguf.GGUFReader(convert(tmp_path / "source", tmp_path / "model.gguf", "gguf"))
    (tmp_path / "theirs").mkdir()
    layouts.gguf_folder(sample, tmp_path / "theirs", encoding="BF16")
    theirs = gguf.GGUFReader(tmp_path / "theirs" / "a.gguf")
    assert [key for key in NEEDED if key not in ours.fields] == []
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert (ours.fields[key].contents(), ours.fields[key].types) == (field.contents(), field.types), key
    expected = {tensor.name: tensor for tensor in theirs.tensors}
    assert sorted(tensor.name for tensor in ours.tensors) == sorted(expected)
    for tensor in ours.tensors:
        peer = expected[tensor.name]
        assert (tensor.tensor_type, list(tensor.shape)) == (peer.tensor_type, list(peer.shape))
        assert np.array_equal(tensor.data, peer.data)


def llama_cpp(path: Path) -> Any:
    """A model that keeps keys and values in float32; its own default is float16."""
    peer = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed, which would run this")
    return peer.Llama(str(path), n_ctx=128, n_threads=1, verbose=False, logits_all=True, type_k=0, type_v=0)


def llama_cpp_logits(path: Path, ids: list[int]) -> Tensor:
    peer = llama_cpp(path)
    peer.eval(ids)
    return torch.tensor(peer.scores[: len(ids)])


@pytest.mark.parametrize("name", ["hf", "hf-dense", "mistral-stacked", "gguf-tied", "gguf-split", "mlx-npz-4-bit-g32"])
def test_llama_cpp_runs_it(name: str, tokenizer: Path, tmp_path: Path) -> None:
    """In float32: tokenizer, logits and greedy tokens."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed, which would run this")
    case = CASES[name]
    (tmp_path / "source").mkdir()
    case.write(make_sample(tokenizer, **dict(case.changes)), tmp_path / "source")
    path = convert(tmp_path / "source", tmp_path / "model.gguf", "gguf", dtype="float32")
    llm, peer = LLM.load(path), llama_cpp(path)
    assert llm.tokenizer is not None
    for text in TEXTS:
        assert peer.tokenize(text.encode(), add_bos=True, special=False) == llm.tokenizer.encode(text, bos=True)
    expected = llm.model(IDS)[0]
    assert torch.allclose(
        llama_cpp_logits(path, IDS[0].tolist()), expected, rtol=0, atol=1e-4 * float(expected.abs().max())
    )
    theirs = [token for token, _ in zip(peer.generate(IDS[0].tolist(), temp=0.0), range(16), strict=False)]
    assert greedy(llm.model, IDS[0].tolist(), 16) == theirs


@pytest.mark.parametrize(("dtype", "share"), [("float16", 0.95), ("bfloat16", 0.95), ("q8_0", 0.85), ("q4_0", 0.85)])
def test_llama_cpp_runs_menny_in_fewer_bits(dtype: str, share: float, tmp_path: Path) -> None:
    """It rounds activations too, to 16 or to 8 bits, so some near ties fall otherwise."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed, which would run this")
    path = convert(shipped_model(), tmp_path / "model.gguf", "gguf", dtype=dtype)
    llm = LLM.load(path, dtype="float32")
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode("Question: What is 2 + 3?\nAnswer: 2 + 3 is 5.\n" * 4, bos=True)
    ours, theirs = llm.model(torch.tensor([ids]))[0], llama_cpp_logits(path, ids)
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() >= share


# ---------------------------------------- mistral-inference


def test_params_json_is_what_mistral_inference_reads(tokenizer: Path, tmp_path: Path) -> None:
    """Its ModelArgs' fields, of their types, and one consolidated file under the names of its modules."""
    sample = make_sample(tokenizer)
    (tmp_path / "source").mkdir()
    hf(sample, tmp_path / "source")
    folder = convert(tmp_path / "source", tmp_path / "converted", "mistral", shard_bytes=1000)
    params = json.loads((folder / "params.json").read_text())
    assert {key: params[key] for key in layouts.params(sample)} == layouts.params(sample)
    assert params["rope_theta"] == 1e6  # its own default, but written: other readers have others
    assert set(params["moe"]) == {"num_experts", "num_experts_per_tok"}
    same_bytes(load_file(folder / "consolidated.safetensors"), {n: t.bfloat16() for n, t in sample.state.items()})
    assert (folder / "tokenizer.model").read_bytes() == tokenizer.read_bytes()


# ---------------------------------------- the shipped model


@pytest.fixture(scope="module")
def menny() -> Callable[[LLM], list[Any]]:
    def speak(llm: LLM) -> list[Any]:
        prompts = ["What is 2 + 3?", "Who are you?"]
        replies = llm.generate(prompts, temperature=0, max_tokens=24)
        chat = llm.chat([{"role": "user", "content": prompts[1]}], temperature=0, max_tokens=16)
        return [reply.token_ids for reply in [*replies, chat]]

    return speak


@pytest.mark.parametrize("to", TARGETS)
def test_menny_speaks_the_same_from_every_layout(to: str, menny: Callable[[LLM], list[Any]], tmp_path: Path) -> None:
    """Through the command line."""
    target = tmp_path / ("menny.gguf" if to == "gguf" else "menny")
    done = run("convert", shipped_model(), target, "--to", to)
    assert done.code == 0, done.err
    assert menny(LLM.load(target, dtype="float32")) == menny(LLM.load("menny"))
