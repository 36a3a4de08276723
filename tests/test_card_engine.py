"""Whole models on the card, which here is this CPU under Triton's interpreter: loading, decoding, two placements."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import quick_triton  # noqa: F401
from conftest import tiny_args, tiny_model
from octavo.cache import KVCache, RollingKVCache, StaticStep, make_cache
from octavo.card import CardBlock
from octavo.checkpoint import open_checkpoint
from octavo.decode import Decoder
from octavo.engine import Engine
from octavo.errors import OptionError
from octavo.experts.card import CachedExperts
from octavo.load import build_on_card
from octavo.model import Mixtral
from octavo.plan_card import CardPlacement
from octavo.sampling import SamplingParams
from stores import make_source, quantise

CPU = torch.device("cpu")
SLOTS = 3  # of 8 experts: prompts are computed in groups


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    source = make_source(folder, n_layers=1, dim=32, head_dim=8, hidden_dim=48)
    quantise(source, folder / "store", 8)
    return folder / "store"


def on_card(store: Path, placement: CardPlacement | None = None) -> Mixtral:
    checkpoint = open_checkpoint(store)
    checkpoint.check()
    return build_on_card(checkpoint, CPU, torch.bfloat16, placement=placement)


def tokens(model: Mixtral) -> dict[int, list[int]]:
    """Two sequences, of which one joins when the other has begun."""
    engine = Engine(model, max_batch_size=2, context=32, ahead=True)
    found: dict[int, list[int]] = {engine.add([5, 6, 7], SamplingParams(max_tokens=3, temperature=1.0, seed=1)): []}
    while engine.has_work:
        for event in engine.step():
            assert event.error is None, event.error
            found[event.seq_id].append(event.token_id or 0)
            if len(found) == 1:
                found[engine.add([8, 9], SamplingParams(max_tokens=2, temperature=0))] = []
    return found


def test_tokens_do_not_depend_on_placement(store: Path) -> None:
    resident = on_card(store)
    assert all(isinstance(block, CardBlock) for block in resident.layers)
    expected = tokens(resident)
    assert [len(one) for one in expected.values()] == [3, 2]
    expert = resident.layers[0].feed_forward.experts.table.nbytes
    cached = on_card(store, CardPlacement((SLOTS + 1) * expert, SLOTS, frozenset({(0, 2)})))
    assert tokens(cached) == expected
    (cache,) = {module.cache for module in cached.modules() if isinstance(module, CachedExperts)}
    total = cache.counters.total
    assert total.misses > 0
    assert total.hits > 0
    assert cache.nbytes >= (SLOTS + 1) * expert


def test_three_bits_are_refused(store: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_source(tmp_path, n_layers=1))
    with pytest.raises(OptionError, match=r"q3; a GPU computes with q8, q4 and bfloat16"):
        build_on_card(checkpoint, CPU, torch.bfloat16, bits=3)


# ---------------------------------------- steps of static shape


@pytest.mark.parametrize("window", [None, 6])
def test_a_static_step_is_a_step(window: int | None) -> None:
    """One token at a time, with rows of other lengths beside; also past the end of a ring."""
    model = tiny_model(seed=1, sliding_window=window, max_seq_len=24)
    plain, static = (make_cache(model.args, 4, whole=True) for _ in range(2))
    assert isinstance(static, RollingKVCache if window else KVCache)
    ids = torch.randint(0, model.args.vocab_size, (3, 20), generator=torch.Generator().manual_seed(0))
    decoder = Decoder(model, static)
    with torch.inference_mode():
        for cache in (plain, static):
            for row, n in enumerate((5, 2, 9)):
                model(ids[row : row + 1, :n], cache=cache.rows(row, row + 1))
        kept = static.k_LBHSK[:, 2].clone()
        for step in range(10):  # two rows; the third one takes no part, and keeps what it has
            expected = model(ids[:2, 9 + step, None], cache=plain.rows(0, 2))[:, 0]
            found = decoder.step(ids[:2, 9 + step])
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert static.lengths == plain.lengths
        n = min(9, static.capacity)
        live = static.positions_BS[2] >= 0
        assert torch.equal(static.positions_BS[2], plain.positions_BS[2])
        assert torch.equal(static.k_LBHSK[:, 2, :, live][:, :, :n], kept[:, :, live][:, :, :n])
        expected = model(ids[2:3, :4], cache=plain.rows(2, 3))
        found = model(ids[2:3, :4], cache=static.rows(2, 3))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_row_that_takes_no_part_leaves_no_trace() -> None:
    """What is written behind its last token is not seen, and its logits are numbers."""
    args = tiny_args()
    cache = make_cache(args, 3, whole=True)
    cache.lengths[:] = [4, 7, 0]
    cache.positions_BS[0, :4] = torch.arange(4)
    cache.positions_BS[1, :7] = torch.arange(7)
    step = StaticStep(cache, 16, torch.tensor([4, 7, 0]), torch.tensor([True, False, False]))
    assert step.mask.sum(-1).flatten().tolist() == [5, 8, 1]
    assert cache.positions_BS[:, :9].amax(1).tolist() == [4, 6, -1]


def test_buckets() -> None:
    model = tiny_model(max_seq_len=1000)
    decoder = Decoder(model, make_cache(model.args, 40, whole=True))
    assert [decoder._n_rows(n) for n in (1, 2, 3, 4, 5, 6, 7, 9, 13, 25, 39)] == [1, 2, 3, 4, 6, 6, 8, 12, 16, 32, 40]
    assert [decoder._n_slots(n) for n in (1, 256, 257, 513, 999)] == [256, 256, 512, 1000, 1000]
