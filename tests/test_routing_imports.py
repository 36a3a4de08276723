"""Routing of others: read as it was written, and refused in a line, whatever is wrong with it."""

from __future__ import annotations

import base64
import io
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import CheckpointError, OptionError, UserError
from octavo.experts import RoutingTrace, read_trace
from octavo.llm import shipped_model
from octavo.routing import imports
from octavo.routing.imports import from_olmoe, from_vllm
from octavo.routing.trace import tokenizer_of
from run_octavo import refused, run

DTYPES = ("uint8", "uint16", "int16", "int32", "int64")


def chosen(tokens: int, layers: int = 3, top_k: int = 2, experts: int = 8, seed: int = 0) -> np.ndarray:
    """Random routing, int16, in which no layer looks dense."""
    order = np.random.default_rng(seed).random((tokens, layers, experts)).argsort(axis=2)
    return order[:, :, :top_k].astype(np.int16)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def encoded(array: np.ndarray) -> str:
    return base64.b64encode(npy(array)).decode()


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def is_of(trace: RoutingTrace, ids: np.ndarray, n_experts: int = 8) -> None:
    np.testing.assert_array_equal(trace.topk_ids, ids)
    assert trace.topk_ids.dtype == np.int16
    assert trace.n_experts == n_experts


# ---------------------------------------- vLLM


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 9),
    layers=st.integers(1, 4),
    top_k=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    order=st.sampled_from("CF"),
    how=st.sampled_from(["array", "npy", "npz", "packed npz"]),
)
def test_an_array_in_every_form(
    tokens: int, layers: int, top_k: int, dtype: str, order: Any, how: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ids = np.asarray(chosen(tokens, layers, top_k) + 1, dtype=dtype, order=order)
    path = tmp_path_factory.mktemp("vllm") / "a"
    source: Any = ids
    if how == "npy":
        source = write(path.with_suffix(".npy"), npy(ids))
    elif how != "array":
        source = path.with_suffix(".npz")
        (np.savez if how == "npz" else np.savez_compressed)(source, routed_experts=ids, token_ids=np.arange(tokens + 1))
    trace = from_vllm(source, n_experts=9, label="x")
    is_of(trace, ids, 9)
    assert (trace.labels, trace.decoded, trace.pieces) == (("x",), None, None)
    assert (trace.token_ids is None) == ("npz" not in how)
    if "npz" in how:
        assert trace.token_ids.tolist() == list(range(tokens))  # the reply's last token is not routed


def test_token_ids_and_text_by_hand() -> None:
    tokenizer = tokenizer_of(str(shipped_model()))
    tokens = tokenizer.encode("Who are you?", bos=True)
    ids = chosen(len(tokens))
    trace = from_vllm(ids, n_experts=8, token_ids=tokens, tokenizer=tokenizer, model="a/b")
    is_of(trace, ids)
    assert ("".join(trace.pieces), trace.model, trace.labels) == ("<s>Who are you?", "a/b", ("vllm",))
    for wrong in (tokens[:-1], [*tokens, 1, 2], [-1] * len(tokens), ["a"] * len(tokens), [tokens]):
        with pytest.raises(CheckpointError, match=r"token_ids: (there are|expected)"):
            from_vllm(ids, n_experts=8, token_ids=wrong)


def responses(ids: np.ndarray, n_prompt: int, form: str) -> dict[str, Any]:
    """What vLLM's API says: since 0.22, in 0.21 and the same with nothing generated but the first token."""
    tokens = [100 + at for at in range(len(ids) + 1)]
    choice: dict[str, Any] = {"index": 0, "token_ids": tokens[n_prompt:]}
    response: dict[str, Any] = {"choices": [choice], "prompt_token_ids": tokens[:n_prompt]}
    if form == "whole":
        choice["routed_experts"] = encoded(ids.astype(np.uint8))
    else:
        response["prompt_routed_experts"] = ids[:n_prompt].tolist()
        reply = ids[n_prompt:].tolist()
        choice["routed_experts"] = reply if reply or form == "apart" else None
    return response


@settings(max_examples=30, deadline=None)
@given(n_prompt=st.integers(1, 5), n_reply=st.integers(0, 4), form=st.sampled_from(["whole", "apart", "apart, null"]))
def test_responses_of_the_api(n_prompt: int, n_reply: int, form: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    ids = chosen(n_prompt + n_reply)
    folder = tmp_path_factory.mktemp("api")
    response = responses(ids, n_prompt, form)
    trace = from_vllm(write(folder / "one.json", json.dumps(response, indent=1)), n_experts=8)
    is_of(trace, ids)
    assert trace.token_ids.tolist() == [100 + at for at in range(len(ids))]
    assert trace.decoded.tolist() == [False] * n_prompt + [True] * n_reply
    assert trace.labels == ("one",)
    both = write(folder / "both.jsonl", f"{json.dumps(response)}\n\n{json.dumps(response)}")
    twice = from_vllm(both, n_experts=8, label="x")
    is_of(twice, np.concatenate([ids, ids]))
    assert (twice.labels, twice.documents.tolist()) == (("x", "x"), [0] * len(ids) + [1] * len(ids))


def test_a_response_without_token_ids_and_of_two_choices(tmp_path: Path) -> None:
    first, second = chosen(6), chosen(5, seed=1)
    response = {
        "choices": [{"routed_experts": encoded(first)}, {"routed_experts": encoded(second)}],
        "usage": {"prompt_tokens": 4},
    }
    trace = from_vllm(write(tmp_path / "a.json", json.dumps(response)), n_experts=8)
    is_of(trace, np.concatenate([first, second]))
    assert trace.token_ids is None
    assert trace.decoded.tolist() == [False] * 4 + [True] * 2 + [False] * 4 + [True]
    del response["usage"]
    assert from_vllm(write(tmp_path / "a.json", json.dumps(response)), n_experts=8).decoded is None


def test_prompt_and_reply_apart_in_one_npz(tmp_path: Path) -> None:
    ids = chosen(7)
    for n_prompt in (4, 7):
        np.savez(tmp_path / "a.npz", routed_experts=ids[n_prompt:], prompt_routed_experts=ids[:n_prompt])
        trace = from_vllm(tmp_path / "a.npz", n_experts=8)
        is_of(trace, ids)
        assert trace.decoded.tolist() == [False] * n_prompt + [True] * (7 - n_prompt)


def test_dense_layers_are_left_out() -> None:
    ids = chosen(5, layers=4) + np.int16(1)
    ids[:, 0] = 0
    ids[2, 1] = [0, 3]
    is_of(from_vllm(ids, n_experts=9), ids[:, 1:], 9)
    with pytest.raises(CheckpointError, match="holds nothing but zeros"):
        from_vllm(np.zeros((4, 3, 2), np.uint8), n_experts=8)
    is_of(from_vllm(np.zeros((4, 3, 1), np.uint8), n_experts=8), np.zeros((4, 3, 1)))  # of one expert, it may be so


# ---------------------------------------- OLMoE


def olmoe(ids: np.ndarray, **more: Any) -> str:
    return json.dumps({"exp_ids": ids.transpose(0, 2, 1).tolist(), **more})


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3), tokens=st.booleans())
def test_olmoe_lines(lengths: list[int], tokens: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    routed = [chosen(length, layers=4, top_k=3, seed=at) for at, length in enumerate(lengths)]
    lines = [
        olmoe(ids, predicted_token_ids=[0] * len(ids), **({"input_ids": list(range(len(ids)))} if tokens else {}))
        for ids in routed
    ]
    path = write(tmp_path_factory.mktemp("olmoe") / "c4_results.jsonl", "\n".join(lines) + "\n")
    trace = from_olmoe(path, n_experts=8, model="allenai/OLMoE-1B-7B-0924")
    is_of(trace, np.concatenate(routed))
    assert trace.labels == ("c4_results",) * len(lengths)
    assert np.bincount(trace.documents).tolist() == lengths
    assert (trace.token_ids is None) != tokens
    if tokens:
        assert trace.token_ids.tolist() == [token for length in lengths for token in range(length)]


# ---------------------------------------- what is wrong


class Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (Path("was_unpickled"),)  # type: ignore[return-value]


GOOD = chosen(4)


def with_header(text: str, data: bytes = b"") -> bytes:
    padded = text.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded + data


def changed(at: tuple[int, ...], value: int, dtype: str = "int16") -> np.ndarray:
    ids = GOOD.astype(dtype)
    ids[at] = value
    return ids


def header_of(shape: str, descr: str = "<i2") -> str:
    return f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"


objects = np.empty(1, object)
objects[0] = Evil()
BAD_NPY: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"is no \.npy file"),
    "text": (b"hello, this is no array at all", r"is no \.npy file"),
    "a pickle": (pickle.dumps(Evil()), r"is no \.npy file"),
    "objects": (npy(objects), "its header tells of no array of integers"),
    "truncated": (npy(GOOD)[:-1], r"\[4, 3, 2\] of int16 take 48 bytes, it has 47"),
    "too long": (npy(GOOD) + b"x", "take 48 bytes, it has 49"),
    "huge": (with_header(header_of("(1000000000, 1000000, 8)")), "take 16000000000000000 bytes, it has 0"),
    "endless shape": (with_header(header_of("(" + "9" * 190 + ",)")), "its header tells of no|bytes, it has 0"),
    "a header that is code": (with_header("{'descr': __import__('os')}"), "its header tells of no array"),
    "a cut header": (npy(GOOD)[:40], "its header tells of no array"),
    "floats": (npy(GOOD.astype(np.float32)), "its header tells of no array of integers"),
    "big-endian": (npy(GOOD.astype(">i2")), "its header tells of no array of integers"),
    "two dimensions": (npy(GOOD[0]), r"is \[3, 2\]; expected \[tokens, layers, experts chosen\]"),
    "no tokens": (npy(GOOD[:0]), r"is \[0, 3, 2\]; expected .* one token at least"),
    "not computed": (npy(changed((1, 0, 0), -1)), "holds the expert -1; expected 0 to 7"),
    "too high": (npy(changed((1, 0, 0), 8)), "holds the expert 8; expected 0 to 7"),
    "as 65536 + 1": (npy(changed((1, 0, 0), 65537, "int32")), "holds the expert 65537; expected 0 to 7"),
    "above int64": (npy(changed((1, 0, 0), 1 << 63, "uint64")), "holds the expert 9223372036854775808"),
    "repeated": (npy(np.array([[[1, 2]], [[3, 3]]])), r"token 1 is routed to \[3, 3\] in layer 0: an expert is rep"),
}


@pytest.mark.parametrize("case", BAD_NPY)
def test_a_bad_npy(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, why = BAD_NPY[case]
    path = write(tmp_path / "a.npy", content)
    with pytest.raises(CheckpointError, match=why) as error:
        from_vllm(path, n_experts=8)
    assert str(path) in error.value.message
    assert error.value.hint
    response = {"choices": [{"routed_experts": base64.b64encode(content).decode()}]}
    with pytest.raises(CheckpointError, match=why) as error:
        from_vllm(write(tmp_path / "a.json", json.dumps(response)), n_experts=8)
    assert "a.json, choice 0" in error.value.message
    assert not (tmp_path / "was_unpickled").exists()


def response_of(**choice: Any) -> str:
    return json.dumps({"choices": [choice]})


LISTS = GOOD.tolist()
BAD_JSON: dict[str, tuple[str, str]] = {
    "empty": ("", "is empty"),
    "cut": ('{"choices": [', "not JSON"),
    "deep": ("[" * 100_000, "not JSON"),
    "not UTF-8": ("\udce9", "not JSON"),
    "a list": ("[]", "has no choices"),
    "no choices": ('{"choices": []}', "has no choices"),
    "odd choices": ('{"choices": [3]}', "has no choices"),
    "none": (response_of(text="hello"), "choice 0: has no routed_experts"),
    "no base64": (response_of(routed_experts="é"), "is no base64"),
    "half base64": (response_of(routed_experts=f"{encoded(GOOD)[:8]}!!!!{encoded(GOOD)[8:]}"), "is no base64"),
    "ragged": (response_of(routed_experts=[[[1, 2], [3]]]), "lists in it have different lengths"),
    "deep lists": (f'{{"choices": [{{"routed_experts": {"[" * 90 + "]" * 90}}}]}}', "is not|is |expected"),
    "NaN": ('{"choices": [{"routed_experts": [[[NaN, 1]]]}]}', "is float64; expected integers"),
    "floats": (response_of(routed_experts=[[[0.5, 1]]]), "is float64; expected integers"),
    "booleans": (response_of(routed_experts=[[[True, False]]]), "is bool; expected integers"),
    "strings": (response_of(routed_experts=[[["1", "2"]]]), "is <U1; expected integers"),
    "nulls": (response_of(routed_experts=[[[None, 2]]]), "is object; expected integers"),
    "huge numbers": (f'{{"choices": [{{"routed_experts": [[[{"9" * 40}, 2]]]}}]}}', "is object; expected integers"),
    "digits without end": (f'{{"choices": [{{"routed_experts": [[[{"9" * 9000}, 2]]]}}]}}', "not JSON"),
    "a mapping": (response_of(routed_experts={"a": 1}), "is object; expected integers"),
    "no tokens": (response_of(routed_experts=[]), r"is \[0\]; expected"),
    "no experts": (response_of(routed_experts=[[[]]]), r"is \[1, 1, 0\]; expected"),
    "other tokens": (
        json.dumps({"prompt_token_ids": [1], "choices": [{"token_ids": [2, 3], "routed_experts": LISTS}]}),
        "there are 3 token ids, and 4 tokens are routed",
    ),
    "token ids of a kind": (
        json.dumps({"prompt_token_ids": {"a": 1}, "choices": [{"token_ids": [2], "routed_experts": LISTS}]}),
        "token ids are no list",
    ),
    "odd token ids": (
        json.dumps({"prompt_token_ids": [1, 2, "x"], "choices": [{"token_ids": [2, 3], "routed_experts": LISTS}]}),
        "expected a list of token ids",
    ),
    "a longer prompt": (
        json.dumps({"usage": {"prompt_tokens": 5}, "choices": [{"routed_experts": LISTS}]}),
        "has a prompt of 5 tokens, but 4 are routed",
    ),
    "a negative prompt": (
        json.dumps({"usage": {"prompt_tokens": -5}, "choices": [{"routed_experts": LISTS}]}),
        "has a prompt of -5 tokens",
    ),
    "another reply": (
        json.dumps({"prompt_routed_experts": LISTS, "choices": [{"routed_experts": chosen(2, layers=2).tolist()}]}),
        r"the prompt is \[4, 3, 2\], the reply \[2, 2, 2\]",
    ),
    "another choice": (
        json.dumps({"choices": [{"routed_experts": LISTS}, {"routed_experts": chosen(2, top_k=1).tolist()}]}),
        "choice 1: is of 3 layers and 1 experts a token; .* is of 3 and 2",
    ),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_a_bad_response(case: str, tmp_path: Path) -> None:
    content, why = BAD_JSON[case]
    path = write(tmp_path / "a.json", content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=why) as error:
        from_vllm(path, n_experts=8)
    assert error.value.message.startswith(str(path))
    assert error.value.hint


BAD_OLMOE: dict[str, tuple[str, str]] = {
    "cut": ('{"input_ids": [1, 2', "not JSON"),
    "a list": ("[1]", "has no exp_ids"),
    "nothing of it": ('{"input_ids": [1]}', "has no exp_ids"),
    "ragged": ('{"exp_ids": [[[1], [2, 3]]]}', "lists in it have different lengths"),
    "NaN": ('{"exp_ids": [[[NaN]]]}', "exp_ids: is float64; expected integers"),
    "two dimensions": ('{"exp_ids": [[1, 2]]}', r"is \[1, 2\]; expected \[tokens, experts chosen, layers\]"),
    "no tokens": ('{"exp_ids": []}', r"is \[0\]; expected"),
    "fewer ids": (olmoe(GOOD, input_ids=[1, 2, 3]), "there are 3 token ids, and 4 tokens are routed"),
    "more ids": (olmoe(GOOD, input_ids=[1, 2, 3, 4, 5]), "there are 5 token ids, and 4 tokens are routed"),
    "negative ids": (olmoe(GOOD, input_ids=[1, 2, 3, -4]), "expected a list of token ids"),
    "no ids": (olmoe(GOOD, input_ids="abcd"), "expected a list of token ids"),
    "too high": (olmoe(changed((0, 0, 0), 64)), "holds the expert 64; expected 0 to 7"),
    "repeated": (olmoe(np.array([[[3, 3]]])), "is of 1 layers|an expert is repeated"),
    "repeated in a row": (
        olmoe(changed((2, 1, 0), int(GOOD[2, 1, 1]))),
        "token 2 .* in layer 1: an expert is repeated",
    ),
    "another model": (olmoe(chosen(3, layers=2)), "is of 2 layers and 2 experts a token; .*line 1 is of 3 and 2"),
}


@pytest.mark.parametrize("case", BAD_OLMOE)
def test_a_bad_line_of_olmoe(case: str, tmp_path: Path) -> None:
    line, why = BAD_OLMOE[case]
    path = write(tmp_path / "a.jsonl", f"{olmoe(GOOD, input_ids=[1, 2, 3, 4])}\n{line}\n")
    with pytest.raises(CheckpointError, match=why) as error:
        from_olmoe(path, n_experts=8)
    assert error.value.message.startswith(f"{path}, line 2")
    assert error.value.hint


def test_bad_files_and_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("none.npy", "none.npz", "none.json"):
        with pytest.raises(CheckpointError, match=name):
            from_vllm(tmp_path / name, n_experts=8)
    with pytest.raises(CheckpointError, match=r"none\.jsonl: cannot be read"):
        from_olmoe(tmp_path / "none.jsonl", n_experts=8)
    with pytest.raises(CheckpointError, match=r"a\.txt: expected \.npy, \.npz, \.json or \.jsonl"):
        from_vllm(write(tmp_path / "a.txt", "x"), n_experts=8)
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(CheckpointError, match=r"folder\.npy: cannot be read"):
        from_vllm(tmp_path / "folder.npy", n_experts=8)
    np.savez(tmp_path / "a.npz", other=GOOD)
    with pytest.raises(CheckpointError, match=r"holds no routed_experts \(it holds other\)"):
        from_vllm(tmp_path / "a.npz", n_experts=8)
    for n_experts in (0, -1, 1 << 16):
        with pytest.raises(OptionError, match=f"there are {n_experts} experts; expected 1 to 32768"):
            from_vllm(GOOD, n_experts=n_experts)
    two = write(tmp_path / "a.jsonl", "\n".join([response_of(routed_experts=LISTS)] * 2))
    with pytest.raises(OptionError, match="token_ids are of one array"):
        from_vllm(two, n_experts=8, token_ids=[1, 2, 3, 4])
    monkeypatch.setattr(imports, "MAX_LINE_BYTES", 50)
    for path in (two, write(tmp_path / "b.json", response_of(routed_experts=LISTS))):
        with pytest.raises(CheckpointError, match="is longer than"):
            from_vllm(path, n_experts=8)


def test_an_archive_that_unpacks_to_much_more(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("routed_experts.npy", npy(np.zeros((1 << 20, 4, 2), np.uint8)))
    with pytest.raises(CheckpointError, match="would unpack to"):
        from_vllm(tmp_path / "a.npz", n_experts=8)


def whole(kind: str) -> bytes:
    """A good file of a kind."""
    ids = chosen(3, layers=2)
    if kind == ".npy":
        return npy(ids)
    if kind == ".npz":
        file = io.BytesIO()
        np.savez(file, routed_experts=ids, token_ids=np.arange(3))
        return file.getvalue()
    if kind == ".json":
        return json.dumps(responses(ids, 2, "whole")).encode()
    return olmoe(ids, input_ids=[1, 2, 3]).encode()


@settings(max_examples=250, deadline=None)
@given(data=st.data(), kind=st.sampled_from([".npy", ".npz", ".json", ".jsonl"]))
def test_damage_is_an_error_in_a_line_or_a_trace(
    data: st.DataObject, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(whole(kind))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    path = write(tmp_path_factory.getbasetemp() / f"damaged{kind}", bytes(content))
    found: RoutingTrace | UserError
    try:
        found = (from_olmoe if kind == ".jsonl" else from_vllm)(path, n_experts=8)
    except UserError as error:
        found = error
    if isinstance(found, UserError):
        assert str(path) in found.message
        assert found.hint
    else:
        assert found.topk_ids.min() >= 0
        assert found.topk_ids.max() < 8


# ---------------------------------------- the command line


def test_on_the_command_line(tmp_path: Path) -> None:
    tokens = tokenizer_of(str(shipped_model())).encode("Who are you?", bos=True)
    lines = write(tmp_path / "c4.jsonl", olmoe(chosen(len(tokens)), input_ids=tokens))
    out = tmp_path / "a.safetensors"
    done = run("routing", "import", lines, "--from", "olmoe", "--experts", 8, "-m", "menny", "-l", "web", "-o", out)
    assert (done.code, done.out) == (0, f"{out}\n"), done
    assert done.err == f"{len(tokens)} tokens; 1 document; 3 layers, 2 of 8 experts\n"
    trace = read_trace(out)
    is_of(trace, chosen(len(tokens)))
    assert ("".join(trace.pieces), trace.labels, trace.model) == ("<s>Who are you?", ("web",), "menny")
    plain = write(tmp_path / "routed.npy", npy(GOOD))
    done = run("routing", "import", plain, "--from", "vllm", "--experts", 8, "--model", "menny", "-o", out)
    assert done.code == 0
    assert done.err.endswith("; it has no token ids, and so no text\n")
    is_of(read_trace(out), GOOD)
    assert read_trace(out).pieces is None


def test_refused_on_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    bad = write(tmp_path / "a.npy", npy(GOOD)[:-1])
    options = ("--experts", 8, "-o", out)
    refused(run("routing", "import", bad, "--from", "vllm", *options), str(bad), "take 48 bytes", hint="numpy.save")
    refused(run("routing", "import", tmp_path / "no.jsonl", "--from", "olmoe", *options), "no.jsonl: cannot be read")
    refused(run("routing", "import", bad, "--from", "vllm", "--experts", 8, "-o", tmp_path), "is a folder")
    assert run("routing", "import", bad, *options).code == 2
    assert run("routing", "import", bad, "--from", "sglang", *options).code == 2
    assert re.search("--experts", run("routing", "import", bad, "--from", "vllm", "-o", out).err)
    assert list(tmp_path.iterdir()) == [bad]
