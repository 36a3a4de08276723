"""One random model in every layout: the same names, numbers, logits and tokenizer through every reader."""

from __future__ import annotations

import functools
import json
import struct
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import layouts
from layouts import CASES, PLAIN, QUANTISED, Case, Sample, State, make_sample
from octavo import LLM
from octavo.args import MoEArgs
from octavo.checkpoint import open_checkpoint
from octavo.checkpoint.names import canonical_shapes
from octavo.errors import CheckpointError
from octavo.load import load_model
from octavo.model import Mixtral
from tiny_folder import make_tiny_folder

TEXT = "The quick brown fox, l'été"
IDS = torch.tensor([[1, 5, 300, 77, 419, 12, 12, 260, 33, 8, 90, 151, 2, 64, 7, 400]])
Written = tuple[Sample, Path, State]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("tokenizer") / "model") / "tokenizer.model"


@pytest.fixture(scope="session")
def written(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    """Write a case, once; into a folder whose name is a lie."""
    samples: dict[object, Sample] = {}

    @functools.cache
    def write(name: str) -> Written:
        case = CASES[name]
        if case.changes not in samples:
            samples[case.changes] = make_sample(tokenizer, **dict(case.changes))
        return samples[case.changes], *write_case(case, samples[case.changes], tmp_path_factory.mktemp(name))

    return write


def write_case(case: Case, sample: Sample, place: Path) -> tuple[Path, State]:
    lie = "mixtral-hf.safetensors" if case.layout.startswith("gguf") else "mixtral-4bit-mlx.gguf"
    folder = place / lie
    folder.mkdir()
    return folder, case.write(sample, folder)


def reference(sample: Sample, values: State) -> Mixtral:
    """The model in float32 with these weights."""
    model = Mixtral(sample.args)
    missing, unexpected = model.load_state_dict(values, strict=False)
    assert (missing, unexpected) == (["output.weight"] if sample.args.tie_embeddings else [], [])
    return model.eval().requires_grad_(False)


def reads_the_same(case: Case, sample: Sample, folder: Path, values: State, *, vocab_size: int = 420) -> None:
    model, tokenizer = load_model(folder, dtype="float32")
    assert open_checkpoint(folder).layout_name == case.layout
    assert tokenizer is not None
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, values[name]), name
    ids = IDS % vocab_size
    logits, expected = model(ids), reference(sample, values)(ids)
    assert torch.equal(logits, expected)
    assert logits.isfinite().all()


# ---------------------------------------- the matrix


@pytest.mark.parametrize("name", PLAIN)
def test_plain_layouts_give_the_model_that_was_written(name: str, written: Callable[[str], Written]) -> None:
    sample, folder, values = written(name)
    assert all(torch.equal(values[key], tensor) for key, tensor in sample.state.items())
    reads_the_same(CASES[name], sample, folder, values)


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_layouts_give_what_their_own_code_makes_of_them(name: str, written: Callable[[str], Written]) -> None:
    sample, folder, values = written(name)
    assert any(not torch.equal(values[key], tensor) for key, tensor in sample.state.items())
    reads_the_same(CASES[name], sample, folder, values)


@pytest.mark.parametrize("name", [name for name in CASES if "mlx-npz-" not in name or name.endswith("-g64")])
def test_an_llm_of_any_layout_has_the_tokenizer(name: str, written: Callable[[str], Written]) -> None:
    """Text becomes the same tokens; with the same weights, so do the replies."""
    sample, folder, values = written(name)
    llm = LLM.load(folder, dtype="float32")
    plain = LLM(reference(sample, values), open_checkpoint(written("hf")[1]).tokenizer())
    reply, expected = (one.generate(TEXT, temperature=0, max_tokens=6) for one in (llm, plain))
    assert (reply.token_ids, reply.text, reply.usage) == (expected.token_ids, expected.text, expected.usage)
    assert llm.eos_ids == {2}


def test_names_and_numbers_are_the_same_in_all_plain_layouts(written: Callable[[str], Written]) -> None:
    sample = written("hf")[0]
    for name, case in PLAIN.items():
        if case.changes:
            continue
        checkpoint = open_checkpoint(written(name)[1])
        assert set(checkpoint) == set(sample.state), name
        for key, tensor in sample.state.items():
            assert torch.equal(checkpoint.read(key).float(), tensor), (name, key)


# ---------------------------------------- one tensor, some rows


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_rows_are_rows_of_the_whole(written: Callable[[str], Written], data: st.DataObject) -> None:
    checkpoint = opened(written, data.draw(st.sampled_from(list(CASES))))
    name = data.draw(st.sampled_from(checkpoint.names()))
    whole = checkpoint.read(name)
    begin = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(begin, len(whole)))
    rows = data.draw(st.sampled_from([(begin, end), slice(begin, end), range(begin, end)]))
    some = checkpoint.read(name, rows)
    assert some.dtype == whole.dtype == checkpoint.info(name).dtype
    assert some.shape == (end - begin, *whole.shape[1:])
    assert torch.equal(some, whole[begin:end])


_opened: dict[str, object] = {}


def opened(written: Callable[[str], Written], name: str):  # type: ignore[no-untyped-def]
    if name not in _opened:
        _opened[name] = open_checkpoint(written(name)[1])
    return _opened[name]


@pytest.mark.parametrize("name", CASES)
def test_stored_tensors_can_be_read_in_rows_too(name: str, written: Callable[[str], Written]) -> None:
    """Under the names on disk: experts stacked, attention joined, as the file has them."""
    stored = opened(written, name).stored
    for key in stored:
        whole = stored.read(key)
        matrix = whole.flatten(0, -2) if whole.ndim > 2 else whole
        assert (tuple(whole.shape), whole.dtype) == (stored.info(key).shape, stored.info(key).dtype)
        assert torch.equal(stored.read(key, (1, len(matrix) // 2 + 1)), matrix[1 : len(matrix) // 2 + 1])


def data_bytes(path: Path) -> int:
    """What a file holds besides its headers, found without Octavo."""
    if path.suffix == ".safetensors":
        return path.stat().st_size - 8 - struct.unpack("<Q", path.read_bytes()[:8])[0]
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:  # numpy's headers of small arrays take 128 bytes; MLX's too
            headers = [len_of_npy_header(archive.open(member).read(12)) for member in archive.infolist()]
            return sum(member.file_size for member in archive.infolist()) - sum(headers)
    if path.suffix == ".gguf":
        return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)
    return sum(tensor.nbytes for tensor in torch.load(path, weights_only=True).values())


def len_of_npy_header(head: bytes) -> int:
    return 10 + struct.unpack("<H", head[8:10])[0] if head[6] == 1 else 12 + struct.unpack("<I", head[8:12])[0]


@pytest.mark.parametrize("name", CASES)
def test_info_tells_shape_dtype_file_and_bytes(name: str, written: Callable[[str], Written]) -> None:
    sample, folder, _ = written(name)
    checkpoint = opened(written, name)
    per_file: Counter[str] = Counter()
    for key, shape in canonical_shapes(sample.args).items():
        info, tensor = checkpoint.info(key), checkpoint.read(key)
        assert (info.name, info.shape, info.dtype) == (key, shape, tensor.dtype)
        assert tuple(tensor.shape) == shape
        per_file[info.file] += info.nbytes
    expected = {p.name: n for p in folder.iterdir() if p.suffix in layouts.WEIGHTS and (n := data_bytes(p))}
    if name == "mlx-npz-with-gate":  # scales may lie in another file than their weights
        assert per_file.total() == sum(expected.values())
    else:
        assert per_file == expected


# ---------------------------------------- other shapes

SHAPES: dict[str, dict[str, object]] = {
    "wide-heads": {"head_dim": 16},
    "narrow-heads": {"head_dim": 4, "n_heads": 6, "n_kv_heads": 3},
    "full-kv-heads": {"n_kv_heads": 4},
    "3-experts-top-1": {"moe": MoEArgs(3, 1)},
    "1-expert": {"moe": MoEArgs(1, 1)},
    "12-experts-top-4": {"moe": MoEArgs(12, 4)},
    "tied": {"tie_embeddings": True},
    "hidden-is-dim": {"hidden_dim": 32},
    "dim-is-all": {"hidden_dim": 32, "head_dim": 8, "n_kv_heads": 4, "vocab_size": 420},
    "vocab-32002": {"vocab_size": 32002, "n_layers": 1},
    "vocab-421": {"vocab_size": 421},
    "one-layer": {"n_layers": 1},
    "eleven-layers": {"n_layers": 11, "moe": MoEArgs(2, 1)},
}
# Those whose names or transforms differ; mlx-lm's and AWQ's are Hugging Face's.
KINDS = (
    "hf",
    "hf-fused",
    "mistral-stacked",
    "mistral-pth",
    "mlx-npz",
    "mlx-stacked",
    "gguf-f16",
    "gguf-split",
    "gpt-fast",
    "gpt-fast-old",
    "mlx-npz-4-bit-g32",
    "gptq",
)


@pytest.mark.parametrize("shape", SHAPES)
def test_other_shapes_in_every_layout(shape: str, tokenizer: Path, tmp_path: Path) -> None:
    small = {"dim": 32, "hidden_dim": 48, "head_dim": 8} | SHAPES[shape]
    for name in KINDS:
        # Groups of 32 fit only here, and where w2 is square nothing tells whether it is transposed: see below.
        groups = {"dim": 64, "hidden_dim": 64 if small["hidden_dim"] == 32 else 96, "head_dim": 32}
        fitted = small | groups if CASES[name] in QUANTISED.values() else small
        if name == "gpt-fast-old" and fitted["hidden_dim"] == fitted["dim"]:
            continue
        sample = make_sample(tokenizer, seed=3, **fitted)
        place = tmp_path / name
        place.mkdir()
        case = CASES[name]
        if name == "gptq":
            case = Case("hf", functools.partial(layouts.packed_folder, method="gptq", group=32))
        folder, values = write_case(case, sample, place)
        reads_the_same(case, sample, folder, values, vocab_size=sample.args.vocab_size)


def test_where_w2_is_square_gpt_fast_is_taken_for_the_newer_one(tokenizer: Path, tmp_path: Path) -> None:
    """Nothing in the file tells them apart; no published model has such a shape."""
    sample = make_sample(tokenizer, dim=32, hidden_dim=32, head_dim=8)
    folder, _ = write_case(CASES["gpt-fast-old"], sample, tmp_path)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.layout_name == "gpt-fast"
    name = "layers.0.feed_forward.experts.5.w2.weight"
    assert torch.equal(checkpoint.read(name).float(), sample.state[name].T)


# ---------------------------------------- folders that hold several things


def test_gpt_fast_s_two_files_lie_in_one_folder(tokenizer: Path, tmp_path: Path) -> None:
    sample = make_sample(tokenizer)
    layouts.gpt_fast(sample, tmp_path)
    values = layouts.gpt_fast_int8(sample, tmp_path)
    with pytest.raises(CheckpointError, match=r"model.pth and in model_int8.pth") as error:
        load_model(tmp_path)
    assert "path of one file" in str(error.value.hint)
    for file, expected in (("model.pth", sample.state), ("model_int8.pth", values)):
        model, tokens = load_model(tmp_path / file, dtype="float32")
        assert tokens is not None
        assert torch.equal(model(IDS), reference(sample, expected)(IDS))


def test_weights_in_several_formats_are_one_model(tokenizer: Path, tmp_path: Path) -> None:
    """Hugging Face's safetensors come first; a file's path chooses another."""
    sample, other = make_sample(tokenizer), make_sample(tokenizer, seed=1)
    layouts.mistral_stacked(other, tmp_path)
    layouts.gguf_folder(other, tmp_path)
    layouts.hf(sample, tmp_path)
    assert torch.equal(load_model(tmp_path, dtype="float32")[0](IDS), reference(sample, sample.state)(IDS))
    chosen, _ = load_model(tmp_path / "a.gguf", dtype="float32")
    assert torch.equal(chosen(IDS), reference(other, other.state)(IDS))


def test_hugging_face_s_and_the_authors_files_may_lie_side_by_side(tokenizer: Path, tmp_path: Path) -> None:
    """As in Mistral's own repositories: model-*.safetensors with config.json, consolidated.* with params.json."""
    sample, other = make_sample(tokenizer), make_sample(tokenizer, seed=1)
    layouts.mistral(other, tmp_path, kind="safetensors")
    layouts.hf(sample, tmp_path, shard="1MB")
    assert torch.equal(load_model(tmp_path, dtype="float32")[0](IDS), reference(sample, sample.state)(IDS))
    chosen, _ = load_model(tmp_path / "consolidated.safetensors", dtype="float32")
    assert torch.equal(chosen(IDS), reference(other, other.state)(IDS))


def test_the_wrong_configuration_is_one_error(tokenizer: Path, tmp_path: Path) -> None:
    """Its layers, experts or sizes are not the weights'."""
    for name in ("hf", "hf-fused", "mistral-stacked", "gpt-fast", "mlx-stacked"):
        folder, _ = write_case(CASES[name], make_sample(tokenizer), (tmp_path / name).mkdir() or tmp_path / name)
        right = json.loads((folder / "config.json").read_text())
        for key, value in {"num_local_experts": 4, "num_hidden_layers": 3, "intermediate_size": 128}.items():
            (folder / "config.json").write_text(json.dumps(right | {key: value}))
            with pytest.raises(CheckpointError) as error:
                load_model(folder)
            assert str(folder) in error.value.message
            assert "config.json" in str(error.value.hint)
