"""Stores: what `octavo quantize` writes lies as the kernels read it, and comes back from there bit for bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from xxhash import xxh3_64_hexdigest

from conversions import SHARD, contents
from octavo.args import ModelArgs, MoEArgs
from octavo.checkpoint import open_checkpoint
from octavo.checkpoint.names import canonical_shapes
from octavo.checkpoint.store import store_files
from octavo.convert import Conversion, plan_conversion, plan_quantization
from octavo.errors import CheckpointError, OptionError
from octavo.llm import shipped_model
from octavo.quant.formats import FORMATS
from octavo.quant.presets import preset
from octavo.quant.quantize import dequantize, quantize
from stores import (
    FORMATS_OF,
    INDEX,
    SIZES,
    expected_format,
    header,
    make_source,
    mapped_file,
    quantise,
    same,
    same_packed,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16, in Hugging Face layout."""
    return make_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def store(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """At 3 bits, in several files."""
    target = tmp_path_factory.mktemp("store") / "model"
    quantise(source, target, 3, shard_bytes=SHARD)
    return target


# ---------------------------------------- what is in it


@pytest.mark.parametrize("bits", FORMATS_OF)
@pytest.mark.parametrize("size", SIZES)
def test_every_matrix_lies_there_as_it_is_quantised(size: str, bits: str, tmp_path: Path) -> None:
    source = open_checkpoint(make_source(tmp_path, **SIZES[size]))
    store = quantise(tmp_path / "model", tmp_path / "store", bits)
    assert (store.layout_name, store.is_store, store.args) == ("octavo", True, source.args)
    assert store.names() == source.names()
    assert set(store.stored) == set(store)
    store.check()
    for name in source:
        info, plain = store.info(name), source.read(name)
        assert (info.name, info.dtype, info.shape, info.file) == (name, plain.dtype, plain.shape, "model.safetensors")
        format = expected_format(name, bits)
        if format is None:
            assert store.packed(name) is None
            assert same(store.read(name), plain)
            assert (info.encoding, info.nbytes) == ("BF16", plain.nbytes)
        else:
            expected = quantize(plain, FORMATS[format])
            assert same_packed(store.packed(name), expected), name
            assert same(store.read(name), dequantize(expected, torch.bfloat16)), name
            assert (info.encoding, info.nbytes) == (f"octavo {format}", expected.data.nbytes)


@pytest.mark.parametrize("mapped", [True, False])
def test_rows_are_those_of_the_whole(mapped: bool, tmp_path: Path) -> None:
    make_source(tmp_path, **SIZES["odd"])
    quantise(tmp_path / "model", tmp_path / "store", 2)
    store = open_checkpoint(tmp_path / "store", mapped=mapped)
    for name in ("layers.1.feed_forward.experts.3.w1.weight", "layers.0.attention.wk.weight", "tok_embeddings.weight"):
        whole = store.read(name)
        count = len(whole)
        for first, last in ((0, 0), (0, 1), (3, 3), (15, 17), (16, 16), (5, count), (count - 1, count), (0, count)):
            if last <= count:
                assert same(store.read(name, (first, last)), whole[first:last]), (name, first, last)
        with pytest.raises(OptionError, match=f"rows 1 to {count + 1}"):
            store.read(name, (1, count + 1))


def test_overrides_are_written_and_read_back(source: Path, tmp_path: Path) -> None:
    overrides = {"output.weight": "q8", "layers.0.*.w?.weight": "q2", "layers.1.feed_forward.experts.7.w2.weight": "16"}
    store = quantise(source, tmp_path / "store", 4, overrides=overrides)
    plain = open_checkpoint(source)
    formats = preset(4, plain.names(), overrides)
    assert {formats.get(name) for name in plain} == {"q8", "q4", "q2", None}
    for name in plain:
        format = formats.get(name)
        if format is None:
            assert store.packed(name) is None
            assert same(store.read(name), plain.read(name)), name
        else:
            assert same_packed(store.packed(name), quantize(plain.read(name), FORMATS[format])), name
    assert formats["output.weight"] == "q8"
    assert formats["layers.0.attention.wq.weight"] == "q2"
    assert "layers.1.feed_forward.experts.7.w2.weight" not in formats
    store.verify()
    config = json.loads((tmp_path / "store" / "config.json").read_text())["quantization_config"]
    assert config == {
        "quant_method": "octavo", "version": 1, "bits": 4, "method": "optimal", "overrides": overrides,
    }  # fmt: skip


def test_the_method_is_the_one_that_was_asked_for(source: Path, tmp_path: Path) -> None:
    name = "layers.0.attention.wo.weight"
    plain = open_checkpoint(source).read(name)
    rtn, optimal = (quantise(source, tmp_path / method, 4, method=method).packed(name) for method in ("rtn", "optimal"))
    assert same_packed(rtn, quantize(plain, FORMATS["q4"], "rtn"))
    assert same_packed(optimal, quantize(plain, FORMATS["q4"], "optimal"))
    assert rtn is not None
    assert optimal is not None
    assert not torch.equal(rtn.data, optimal.data)


@pytest.mark.parametrize("changes", [{"moe": None}, {"tie_embeddings": True}, {"moe": MoEArgs(3, 1)}], ids=str)
def test_other_models_too(changes: dict[str, Any], tmp_path: Path) -> None:
    make_source(tmp_path, **changes)
    store, plain = quantise(tmp_path / "model", tmp_path / "store", 3), open_checkpoint(tmp_path / "model")
    assert store.layout_name == ("octavo-dense" if plain.args.moe is None else "octavo")
    store.check()
    store.verify()
    for name in plain:
        format = expected_format(name, "3")
        if format is not None:
            assert same_packed(store.packed(name), quantize(plain.read(name), FORMATS[format])), name
    assert ("output.weight" in store) is not plain.args.tie_embeddings


@pytest.mark.parametrize("to", ["mistral", "mlx", "gguf"])
def test_the_sources_layout_does_not_matter(to: str, source: Path, tmp_path: Path) -> None:
    """What GGUF widens is stored as it was, and its tokenizer is unpacked."""
    plan_conversion(source, tmp_path / "source", to=to).run()
    stores = [quantise(path, tmp_path / f"store-{path.name}", 2) for path in (source, tmp_path / "source")]
    files = [contents(tmp_path / f"store-{path.name}") for path in (source, tmp_path / "source")]
    assert files[0]["model.safetensors"] == files[1]["model.safetensors"]
    assert stores[0].args == stores[1].args
    assert "tokenizer.model" in files[1]
    assert "tokenizer.json" in files[1]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_dtype_is_the_sources(dtype: str, source: Path, tmp_path: Path) -> None:
    plan_conversion(source, tmp_path / "source", to="mistral", dtype=dtype).run()
    store = quantise(tmp_path / "source", tmp_path / "store")
    assert {store.read(name).dtype for name in store} == {getattr(torch, dtype)}
    name = "layers.0.attention.wq.weight"
    packed = store.packed(name)
    assert packed is not None
    assert same(store.read(name), dequantize(packed, getattr(torch, dtype)))
    assert json.loads((tmp_path / "store" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("bits", FORMATS_OF)
def test_menny(bits: str, tmp_path: Path) -> None:
    store, plain = quantise(shipped_model(), tmp_path / "menny", bits, method="rtn"), open_checkpoint(shipped_model())
    store.verify()
    assert store.tokenizer() is not None
    assert store.eos_ids == plain.eos_ids
    for name in plain:
        before, after = plain.read(name).float(), store.read(name).float()
        error = (after - before).norm() / before.norm()
        limit = {None: 0.0, "q8": 0.01, "q4": 0.12, "q3": 0.25, "q2": 0.55}[expected_format(name, bits)]
        assert error <= limit, (name, error)


# ---------------------------------------- and back again


@pytest.mark.parametrize("to", ["hf", "mistral", "mlx", "gguf"])
def test_it_converts_to_every_layout(to: str, store: Path, tmp_path: Path) -> None:
    plan_conversion(store, tmp_path / "plain", to=to).run()
    quantised, plain = open_checkpoint(store), open_checkpoint(tmp_path / "plain")
    assert set(quantised) == set(plain)
    for name in quantised:
        assert torch.equal(plain.read(name).to(torch.bfloat16), quantised.read(name)), name
    if to != "gguf":
        config = tmp_path / "plain" / ("params.json" if to == "mistral" else "config.json")
        assert "quantization_config" not in json.loads(config.read_text())


def test_a_store_is_not_quantised_again(store: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a store already") as raised:
        plan_quantization(store, tmp_path / "again", bits=2)
    assert "octavo convert" in str(raised.value.hint)
    plan_conversion(store, tmp_path / "plain", to="hf").run()
    quantise(tmp_path / "plain", tmp_path / "again", 2).verify()


# ---------------------------------------- where it lies


def check_placement(files: list[tuple[dict[str, Any], int]], args: ModelArgs, alignment: int, others: int = 1) -> None:
    """Experts whole and first, everything aligned, nothing between.

    Args:
        files: header and begin of data of each.
        alignment: at least, of the place of every expert in its file, in bytes.
        others: the same of every tensor but an expert.
    """
    seen: set[str] = set()
    for entries, begin in files:
        assert begin % 4096 == 0
        places = {n: e["data_offsets"] for n, e in entries.items() if n != "__metadata__"}
        in_order = sorted(places, key=places.__getitem__)
        assert [places[name][1] for name in in_order[:-1]] == [places[name][0] for name in in_order[1:]]
        assert places[in_order[0]][0] == 0
        experts = [name for name in in_order if "feed_forward.w" in name or ".experts." in name]
        assert in_order[: len(experts)] == experts
        for i in range(0, len(experts), 3):
            stems = {name[:-9] for name in experts[i : i + 3]}
            assert len(stems) == 1
            assert [name[-9:-7] for name in experts[i : i + 3]] == ["w1", "w3", "w2"]
            assert (begin + places[experts[i]][0]) % alignment == 0
        for name in in_order:
            assert (begin + places[name][0]) % (64 if name in experts else others) == 0, name
        assert not seen & places.keys()
        seen |= places.keys()
    assert seen == canonical_shapes(args).keys()


@pytest.mark.parametrize("shard_bytes", [1, SHARD, 10**10])
def test_experts_are_whole_and_first(shard_bytes: int, source: Path, tmp_path: Path) -> None:
    store = quantise(source, tmp_path / "store", 4, shard_bytes=shard_bytes)
    paths = sorted((tmp_path / "store").glob("*.safetensors"))
    check_placement([header(path) for path in paths], store.args, 64, 64)
    assert len(paths) == 1 if shard_bytes == 10**10 else len(paths) >= 3
    if shard_bytes == SHARD:
        assert all(path.stat().st_size <= SHARD + header(path)[1] for path in paths)
    assert (tmp_path / "store" / INDEX).exists() == (len(paths) > 1)


@pytest.mark.parametrize("moe", [MoEArgs(8, 2), None])
@pytest.mark.parametrize("bits", FORMATS_OF)
def test_real_experts_are_whole_pages(bits: str, moe: MoEArgs | None) -> None:
    """Planned only: 8x7B and 8x22B."""
    for args in (
        ModelArgs(4096, 32, 128, 14336, 32, 8, 32000, moe=moe),
        ModelArgs(6144, 56, 128, 16384, 48, 8, 32768, moe=moe),
    ):
        shapes = canonical_shapes(args)
        formats = {name: FORMATS[format] for name in shapes if (format := expected_format(name, bits))}
        files = store_files(args, formats, lambda name: torch.bfloat16, "optimal", 5_000_000_000)
        headers = [(json.loads(file.header[8:]), len(file.header)) for file in files]
        check_placement(headers, args, 4096, 4096)
        assert all(file.size <= 5_010_000_000 for file in files)
        assert all(begin <= 1_000_000 for _, begin in headers)
        weights = sum(map(math.prod, shapes.values()))
        assert sum(file.size for file in files) * 8 / weights <= int(bits) + (1.1 if moe else 2.5)


def test_odd_sizes_of_mixed_precision_are_read_right(tmp_path: Path) -> None:
    """Matrices that are kept push others off the boundary, where kernels need them: these are copied to one."""
    overrides = {"layers.*.feed_forward.experts.*.w1.weight": "16", "layers.*.wq.weight": "16"}
    args = {"dim": 34, "head_dim": 6, "n_heads": 3, "n_kv_heads": 1, "hidden_dim": 25}
    make_source(tmp_path, **args)
    store, plain = (
        quantise(tmp_path / "model", tmp_path / "store", 3, overrides=overrides),
        open_checkpoint(tmp_path / "model"),
    )
    store.verify()
    for name in plain:
        packed = store.packed(name)
        if packed is None:
            assert same(store.read(name), plain.read(name))
        else:
            assert packed.data.data_ptr() % 64 == 0
            assert same_packed(packed, quantize(plain.read(name), packed.format))


def test_the_safetensors_library_reads_it(store: Path) -> None:
    checkpoint = open_checkpoint(store)
    found = set()
    for path in store.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata()["format"] == "pt"
            said = json.loads(file.metadata()["octavo"])
            assert said["version"] == 1
            assert said["tensors"].keys() == set(file.keys())
            for name in file.keys():  # noqa: SIM118  # it is no dict
                tensor, entry, packed = file.get_tensor(name), said["tensors"][name], checkpoint.packed(name)
                assert entry["xxh3"] == xxh3_64_hexdigest(tensor.view(torch.uint8).numpy().tobytes())
                if packed is None:
                    assert same(tensor, checkpoint.read(name))
                    assert entry.keys() == {"xxh3"}
                else:
                    assert same(tensor, packed.data)
                    expected = (packed.format.name, list(packed.shape), "BF16")
                    assert (entry["format"], entry["shape"], entry["dtype"]) == expected
                found.add(name)
    assert found == set(checkpoint)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc to see mappings")
def test_what_is_packed_is_not_copied(store: Path) -> None:
    checkpoint = open_checkpoint(store)
    for name in checkpoint:
        packed = checkpoint.packed(name)
        if packed is not None:
            assert packed.data.data_ptr() % 64 == 0
            assert mapped_file(packed.data.data_ptr()) == str(store / checkpoint.info(name).file)


def test_packed_is_for_stores(source: Path, store: Path) -> None:
    plain = open_checkpoint(source)
    assert not plain.is_store
    assert {plain.packed(name) for name in plain} == {None}
    for checkpoint in (plain, open_checkpoint(store)):
        with pytest.raises(CheckpointError, match=r"holds no tensor called 'nonsense\.weight'"):
            checkpoint.packed("nonsense.weight")


# ---------------------------------------- the same bytes every time


def test_two_runs_give_the_same_bytes(source: Path, store: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        quantise(source, tmp_path / "store", 3, shard_bytes=SHARD)
    finally:
        torch.set_num_threads(threads)
    assert contents(tmp_path / "store") == contents(store)


def interrupted(conversion: Conversion, calls: int) -> None:
    """Run it until Ctrl-C in the progress bar."""
    left = iter(range(calls))

    def progress(nbytes: int) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversion.run(progress)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.7, 1.0])
def test_what_was_interrupted_ends_in_the_same_bytes(
    fraction: float, source: Path, store: Path, tmp_path: Path
) -> None:
    """Also between the last piece and the header with its checksum."""
    conversion = plan_quantization(source, tmp_path / "target", bits=3, shard_bytes=SHARD)
    calls = sum(len(file.pieces) + 1 for file in conversion.files)
    interrupted(conversion, int((calls - 1) * fraction))
    assert not (tmp_path / "target").exists()
    plan_quantization(source, tmp_path / "target", bits=3, shard_bytes=SHARD).run()
    assert contents(tmp_path / "target") == contents(store)


@pytest.mark.parametrize("changed", [{"bits": 2}, {"method": "rtn"}, {"overrides": {"output.weight": "q8"}}], ids=str)
def test_other_options_do_not_go_on_with_it(changed: dict[str, Any], source: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"bits": 8, "shard_bytes": SHARD}
    interrupted(plan_quantization(source, tmp_path / "target", **options), 20)
    with pytest.raises(CheckpointError, match="from another source or with other options"):
        plan_quantization(source, tmp_path / "target", **(options | changed)).run()
    plan_quantization(source, tmp_path / "target", **options).run()
