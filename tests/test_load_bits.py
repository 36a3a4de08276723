"""Models with low-bit weights: quantised while loading, or opened from a store; the same tokens both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import octavo
from octavo import kernels
from octavo.convert import plan_conversion, plan_quantization
from octavo.engine import Engine
from octavo.errors import OptionError, UserError
from octavo.kernels.modules import KernelExperts, KernelLinear
from octavo.llm import shipped_model
from octavo.model import Mixtral
from stores import make_source, quantise
from tiny_folder import make_tiny_folder

BITS = ("8", "4", "3", "2")
TEXT = "What is a mixture of experts? A router sends every token to two of eight experts. 7 + 5 = 12."


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shipped model at every precision."""
    made = {bits: tmp_path_factory.mktemp("stores") / bits for bits in BITS}
    for bits, folder in made.items():
        plan_quantization(shipped_model(), folder, bits=bits).run()
    return made


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.tensor([octavo.LLM.load("menny").tokenizer.encode(TEXT)])  # type: ignore[union-attr]


def logits(source: Path, ids: Tensor, **options: Any) -> Tensor:
    return octavo.load_model(source, dtype="float32", **options)[0](ids)


def divergence(expected: Tensor, found: Tensor) -> float:
    """Mean KL in nats a token."""
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("bits", BITS)
def test_a_store_computes_what_quantising_while_loading_does(bits: str, stores: dict[str, Path], ids: Tensor) -> None:
    assert torch.equal(logits(stores[bits], ids), logits(shipped_model(), ids, bits=bits))


def test_more_bits_are_closer_to_the_original(ids: Tensor) -> None:
    whole = logits(shipped_model(), ids)
    far = [divergence(whole, logits(shipped_model(), ids, bits=int(bits))) for bits in BITS]
    assert far == sorted(far)
    assert far[0] < 0.01
    assert far[1] < 0.2
    assert far[3] < 1


@pytest.mark.parametrize("bits", BITS)
def test_the_shipped_model_still_adds(bits: str, stores: dict[str, Path]) -> None:
    for llm in (octavo.LLM.load("menny", bits=bits), octavo.LLM.load(stores[bits], dtype="float32")):
        assert llm.uses_kernels
        reply = llm.chat([{"role": "user", "content": "Combien font 7 et 5 ?"}], temperature=0)
        assert "12" in reply.text


def test_every_matrix_but_router_and_embedding_is_low_bit() -> None:
    model, _ = octavo.load_model(shipped_model(), bits=4)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name, _ in model.named_parameters()} == {
        "tok_embeddings", "attention_norm", "ffn_norm", "gate", "norm",
    }  # fmt: skip
    assert sum(isinstance(module, KernelLinear) for module in model.modules()) == 4 * model.args.n_layers + 1
    assert sum(isinstance(module, KernelExperts) for module in model.modules()) == model.args.n_layers


def test_a_store_is_used_as_it_is_mapped(stores: dict[str, Path]) -> None:
    checkpoint = octavo.open_checkpoint(stores["4"])
    packed = checkpoint.packed("layers.0.feed_forward.experts.3.w1.weight")
    assert packed is not None
    again = checkpoint.packed("layers.0.feed_forward.experts.3.w1.weight")
    assert again is not None
    assert packed.data.data_ptr() == again.data.data_ptr()


@pytest.mark.parametrize("changes", [{"moe": None}, {"tie_embeddings": True}, {"sliding_window": 7}])
def test_every_kind_of_model_runs_quantised(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = make_tiny_folder(tmp_path / "model", **changes)
    plan_quantization(folder, tmp_path / "store", bits="8").run()
    ids = torch.arange(3, 23)[None]
    found, whole = logits(tmp_path / "store", ids), logits(folder, ids)
    assert torch.equal(found, logits(folder, ids, bits=8))
    assert (found - whole).abs().median() < 0.03 * whole.std()  # random routers are easily tipped over


def test_prefill_equals_decoding_step_by_step(ids: Tensor) -> None:
    model, _ = octavo.load_model(shipped_model(), dtype="float32", bits=4)
    greedy = octavo.SamplingParams(temperature=0, max_tokens=24)
    expected = generate(model, ids[0].tolist(), greedy, prefill_chunk=512)
    assert generate(model, ids[0].tolist(), greedy, prefill_chunk=3) == expected


def generate(model: Mixtral, prompt: list[int], params: octavo.SamplingParams, **options: int) -> list[int | None]:
    engine = Engine(model, **options)
    engine.add(prompt, params)
    found = []
    while engine.has_work:
        found += [event.token_id for event in engine.step()]
    return found


def test_bfloat16_weights_run_on_kernels_too(tmp_path: Path) -> None:
    llm = octavo.LLM.load(shipped_model(), dtype="bfloat16")
    assert llm.uses_kernels == kernels.backend().compiled
    plain, _ = octavo.load_model(shipped_model(), dtype="bfloat16")
    ids = torch.arange(300, 330)[None]
    assert divergence(plain(ids), llm.model(ids)) < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits is 5; expected one of 8, 4, 3, 2"),
        ({"bits": 4, "device": "meta"}, "device is 'meta'; low-bit weights are for the CPU or a CUDA GPU"),
    ],
)
def test_options_that_make_no_sense_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        octavo.load_model(shipped_model(), **options)


def test_a_store_is_not_quantised_again(stores: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match="is a store, which has its own precision"):
        octavo.load_model(stores["4"], bits=8)


def test_a_damaged_store_is_not_loaded(stores: dict[str, Path], tmp_path: Path) -> None:
    damaged = tmp_path / "store"
    damaged.mkdir()
    for path in stores["4"].iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    with (damaged / "model.safetensors").open("r+b") as file:
        file.seek(-100_000, 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(UserError, match="checksum"):
        octavo.load_model(damaged)


def test_float16_is_refused_beside_low_bit_weights(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    plan_conversion(source, tmp_path / "half", to="hf", dtype="float16").run()
    quantise(tmp_path / "half", tmp_path / "store")
    asked: list[tuple[Path, dict[str, Any]]] = [(tmp_path / "store", {}), (source, {"bits": 4, "dtype": "float16"})]
    for folder, options in asked:
        with pytest.raises(OptionError, match="dtype is float16") as error:
            octavo.load_model(folder, **options)
        assert "--dtype bfloat16" in str(error.value.hint)
    assert octavo.load_model(tmp_path / "store", dtype="bfloat16")[0].dtype == torch.bfloat16
