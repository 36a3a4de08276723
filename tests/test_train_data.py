"""Documents, rows and batches: nothing lost, nothing seen that should not be, the same batch at the same step."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import tiny_model
from octavo.chat import template_for
from octavo.errors import ConfigError
from octavo.tokenizer import Tokenizer
from octavo.train.data import (
    PAD,
    READ,
    SPOKEN,
    START,
    Document,
    Order,
    Rows,
    load_rows,
    load_tokenizer,
    pack,
    positions,
    tokenize_document,
)
from octavo.train.losses import RouterTap, load_balancing_loss, weighted_cross_entropy
from train_fixtures import CONTROLS, make_tokenizer, sums

documents = st.lists(
    st.lists(st.integers(1, 100), min_size=1, max_size=30).map(
        lambda ids: Document(ids, bytes([START] + [READ + i % 2 for i in ids[1:]]))
    ),
    min_size=1,
    max_size=200,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def pieces_of(rows: Rows) -> Counter[tuple[tuple[int, ...], bytes]]:
    """The documents (or pieces of long ones) that lie in the rows."""
    found: Counter[tuple[tuple[int, ...], bytes]] = Counter()
    for tokens, kinds in zip(rows.tokens, rows.kinds, strict=True):
        starts = [*np.flatnonzero(kinds == START), int((kinds != PAD).sum())]
        for start, stop in itertools.pairwise(starts):
            found[tuple(map(int, tokens[start:stop])), kinds[start:stop].tobytes()] += 1
    return found


@given(docs=documents, row_len=st.integers(2, 24))
@settings(deadline=None, max_examples=60)
def test_every_token_of_every_document_appears_once_and_in_order(docs: list[Document], row_len: int):
    rows = pack(docs, row_len)
    expected: Counter[tuple[tuple[int, ...], bytes]] = Counter()
    for ids, kinds in docs:
        for begin in range(0, len(ids), row_len):
            piece = slice(begin, begin + row_len)
            expected[tuple(ids[piece]), bytes([START]) + kinds[piece][1:]] += 1
    assert pieces_of(rows) == expected
    assert (rows.kinds[:, 0] == START).all(), "every row opens with a document"
    padded = rows.kinds == PAD
    assert (padded[:, 1:] >= padded[:, :-1]).all(), "pads are on the right"


def test_packing_wastes_little():
    rng = np.random.default_rng(0)
    docs = [Document([1] * n, bytes([START] + [SPOKEN] * (n - 1))) for n in rng.integers(10, 90, 5000)]
    rows = pack(docs, 257)
    assert (rows.kinds == PAD).mean() < 0.02


@given(docs=documents, row_len=st.integers(2, 24))
@settings(deadline=None, max_examples=40)
def test_positions_put_documents_out_of_each_others_window(docs: list[Document], row_len: int):
    """Within a document positions count up by one; the next begins further off than any window reaches."""
    rows = pack(docs, row_len)
    for kinds, at in zip(rows.kinds, positions(rows.kinds), strict=True):
        real = at[kinds != PAD]
        steps = np.diff(real)
        begins = kinds[kinds != PAD][1:] == START
        assert (steps[~begins] == 1).all()
        assert (steps[begins] == row_len + 1).all()
        assert (at[kinds == PAD] == -1).all()


@given(rows=st.integers(1, 50), per_step=st.integers(1, 70), seed=st.integers(0, 5), step=st.integers(0, 40))
@settings(deadline=None, max_examples=60)
def test_order_is_a_function_of_seed_and_step_and_reads_every_row_once_an_epoch(
    rows: int, per_step: int, seed: int, step: int
):
    walked = Order(rows, per_step, seed)
    everything = np.concatenate([walked.rows_of(s) for s in range(step + 1)])
    assert np.array_equal(Order(rows, per_step, seed).rows_of(step), everything[step * per_step :])
    for epoch in range(len(everything) // rows):
        assert sorted(everything[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_documents_in_a_row_are_read_as_if_each_stood_alone():
    """Logits and router losses of packed documents are those of the documents one by one, unpadded."""
    rng = np.random.default_rng(3)
    docs = []
    for length in (7, 12, 5, 9, 14, 3):
        ids = rng.integers(1, 101, length).tolist()
        docs.append(Document(ids, bytes([START] + [SPOKEN] * (length - 1))))
    rows = pack(docs, 40)
    model = tiny_model(sliding_window=40, max_seq_len=40 * 40)
    alone = tiny_model()
    batch = rows.batch(slice(None))
    with RouterTap(model) as tap:
        packed_loss = weighted_cross_entropy(
            model(batch.ids, positions_BT=batch.positions), batch.targets, batch.weights
        )
    single_loss, logits = 0.0, []
    for ids, _ in docs:
        with RouterTap(alone) as single:
            out = alone(torch.tensor([ids]))
        single_loss += float(weighted_cross_entropy(out[:, :-1], torch.tensor([ids[1:]]), torch.ones(1, len(ids) - 1)))
        logits.append(single.logits_TE)
    assert float(packed_loss) == pytest.approx(single_loss, rel=1e-5)
    real = batch.positions >= 0
    assert int(real.sum()) == sum(len(ids) for ids, _ in docs), "no row is full, so every token is an input"
    pooled = [torch.cat(layer) for layer in zip(*logits, strict=True)]
    expected = load_balancing_loss(pooled, 2)
    torch.testing.assert_close(load_balancing_loss(tap.logits_TE, 2, real), expected, rtol=1e-4, atol=1e-5)


def test_batch_weights_and_targets():
    kinds = np.array([[START, READ, SPOKEN, SPOKEN, START, SPOKEN, PAD]], dtype=np.uint8)
    rows = Rows(np.arange(10, 17, dtype=np.int32)[None], kinds)
    batch = rows.batch(slice(None), user_loss_weight=0.25)
    assert batch.ids.tolist() == [[10, 11, 12, 13, 14, 15]]
    assert batch.targets.tolist() == [[11, 12, 13, 14, 15, 16]]
    assert batch.weights.tolist() == [[0.25, 1, 1, 0, 1, 0]]
    assert batch.spoken.tolist() == [[False, True, True, False, True, False]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 11, 12]]
    assert rows.n_targets == 4


def test_conversations_and_text_become_marked_tokens(tokenizer: Tokenizer):
    template = template_for(tokenizer)
    turns = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}]
    ids, kinds = tokenize_document({"messages": turns}, tokenizer, template)
    assert ids == template.render_training(turns)[0]
    assert kinds[0] == START
    assert tokenizer.decode([i for i, k in zip(ids, kinds, strict=True) if k == SPOKEN]).strip() == "4"
    ids, kinds = tokenize_document({"text": "2 + 2 = 4"}, tokenizer, template)
    assert ids == [tokenizer.bos_id, *tokenizer.encode("2 + 2 = 4"), tokenizer.eos_id]
    assert list(kinds) == [START] + [SPOKEN] * (len(ids) - 1)


@pytest.mark.parametrize("line", ['{"text": 3}', "[]", '{"other": "x"}', "{", '{"messages": [{"role": "user"}]}'])
def test_a_line_that_is_no_document_is_named(tmp_path: Path, tokenizer: Tokenizer, line: str):
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(ConfigError, match=r"train\.jsonl:3: "):
        load_rows(path, tokenizer, 16, tmp_path / "rows")


@pytest.mark.parametrize(("content", "message"), [(b"", "no text"), (b'{"text": "\xff"}', "UTF-8")])
def test_a_file_without_text_is_an_error(tmp_path: Path, tokenizer: Tokenizer, content: bytes, message: str):
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_rows(path, tokenizer, 16, tmp_path / "rows")


def test_missing_files_are_named(tmp_path: Path, tokenizer: Tokenizer):
    with pytest.raises(ConfigError, match="absent"):
        load_rows(tmp_path / "absent.jsonl", tokenizer, 16, tmp_path)
    for path in (tmp_path / "absent.model", tmp_path):
        with pytest.raises(ConfigError, match="no tokenizer"):
            load_tokenizer(path)


def test_rows_are_cached_until_anything_changes(tmp_path: Path, tokenizer: Tokenizer):
    path, cache = tmp_path / "train.jsonl", tmp_path / "rows"
    path.write_text("".join(json.dumps(d) + "\n" for d in sums(50)))

    def files() -> set[str]:
        return {p.name for p in cache.iterdir()}

    first = load_rows(path, tokenizer, 32, cache)
    made = files()
    again = load_rows(path, tokenizer, 32, cache)
    assert files() == made
    assert np.array_equal(first.tokens, again.tokens)
    assert np.array_equal(first.kinds, again.kinds)

    other = make_tokenizer(tmp_path / "other", vocab_size=310, controls=[])
    changes: list[Callable[[], Rows]] = [
        lambda: load_rows(path, tokenizer, 40, cache),
        lambda: load_rows(path, other, 32, cache),
        lambda: (path.write_text('{"text": "new"}\n'), load_rows(path, tokenizer, 32, cache))[1],
    ]
    for number, change in enumerate(changes, start=2):
        change()
        assert len(files()) == number
    assert CONTROLS, "the fixture's tokenizer speaks v3, the other one v1"


def test_a_damaged_cache_is_made_again(tmp_path: Path, tokenizer: Tokenizer):
    path, cache = tmp_path / "train.jsonl", tmp_path / "rows"
    path.write_text("".join(json.dumps(d) + "\n" for d in sums(20)))
    first = load_rows(path, tokenizer, 32, cache)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-20])
    again = load_rows(path, tokenizer, 32, cache)
    assert np.array_equal(first.tokens, again.tokens)
    assert np.array_equal(load_rows(path, tokenizer, 32, cache).tokens, first.tokens)
