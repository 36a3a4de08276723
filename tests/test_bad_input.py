"""Bad input is told in one line with a hint, whatever it is; a traceback is a bug.

(A full disk and Ctrl-C while a training checkpoint is written are in test_train.py; the Hub's refusals in test_hub.py.)
"""

from __future__ import annotations

import json
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from octavo.errors import UserError
from octavo.load import load_model
from octavo.storage.safetensors import INDEX, SINGLE
from run_octavo import command, refused, run
from tiny_folder import make_tiny_folder

MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing wrong in it."""
    return make_tiny_folder(tmp_path_factory.mktemp("bad") / "tiny")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "tiny"))


def ask(folder: Path, *args: object, stdin: bytes = b"") -> Any:
    return run("generate", "--model", folder, "-o", "max_tokens=4", *(args or ("Who?",)), stdin=stdin)


def edit_config(folder: Path, **changes: object) -> None:
    """Set keys of config.json; None takes one out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def read_parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and data."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_parts(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def edit_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    header, data = read_parts(folder / SINGLE)
    change(header)
    (folder / SINGLE).write_bytes(join_parts(header, data))


def test_the_whole_folder_is_fine(folder: Path) -> None:
    assert ask(folder).code == 0


# ---------------------------------------- folders and weights


def test_no_such_folder(tmp_path: Path) -> None:
    for verb in ("generate", "chat"):
        done = run(verb, "--model", tmp_path / "nowhere", stdin=b"Who?")
        refused(done, str(tmp_path / "nowhere"), "no such folder", hint="folder with config.json")
    refused(run("generate", "--model", "nowhere", "Who?"), "nowhere: no such folder")
    refused(run("generate", "--model", "", "Who?"), "")


def test_a_weights_file_stands_for_its_folder(folder: Path) -> None:
    assert ask(folder / SINGLE).code == 0
    refused(ask(folder / "config.json"), "config.json", "no kind of weights file", hint=".gguf")


def test_an_empty_folder(tmp_path: Path) -> None:
    refused(ask(tmp_path), str(tmp_path), SINGLE, INDEX)


def test_an_index_that_names_an_absent_shard(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(tensors)
    half = len(names) // 2
    shards = {"model-00001-of-00002.safetensors": names[:half], "model-00002-of-00002.safetensors": names[half:]}
    for shard, mine in shards.items():
        save_file({name: tensors[name] for name in mine}, folder / shard)
    weight_map = {name: shard for shard, mine in shards.items() for name in mine}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert ask(folder).code == 0
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(ask(folder), INDEX, "model-00002-of-00002.safetensors", hint="incomplete")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map | {"lm_head.weight": "../tiny/elsewhere"}}))
    refused(ask(folder), "elsewhere")
    for nonsense in ("[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"lm_head.weight": 7}}', "{", ""):
        (folder / INDEX).write_text(nonsense)
        refused(ask(folder), INDEX)


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.001, 0.01, 0.5, 0.99999])
def test_a_truncated_weights_file(folder: Path, share: float) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[: int(len(data) * share)])
    refused(ask(folder), SINGLE, "not a whole safetensors file", hint="fetch it again")


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**31, 2**63, 2**64 - 1])
def test_a_header_of_absurd_length(folder: Path, length: int) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(struct.pack("<Q", length) + data[8:])
    refused(ask(folder), SINGLE)


NAME = "model.embed_tokens.weight"
ABSURD: dict[str, Callable[[dict[str, Any]], object]] = {
    "a huge shape": lambda header: header[NAME].update(shape=[2**40, 2**40]),
    "a shape beyond every integer": lambda header: header[NAME].update(shape=[10**30]),
    "a negative size": lambda header: header[NAME].update(shape=[-420, -32]),
    "a fractional size": lambda header: header[NAME].update(shape=[420.5, 32]),
    "a shape of text": lambda header: header[NAME].update(shape="420"),
    "a shape of lists": lambda header: header[NAME].update(shape=[[420], 32]),
    "no shape": lambda header: header[NAME].pop("shape"),
    "no offsets": lambda header: header[NAME].pop("data_offsets"),
    "one offset": lambda header: header[NAME].update(data_offsets=[0]),
    "offsets backwards": lambda header: header[NAME].update(data_offsets=[8, 0]),
    "offsets beyond the file": lambda header: header[NAME].update(
        data_offsets=[2**62, 2**62 + header[NAME]["data_offsets"][1] - header[NAME]["data_offsets"][0]]
    ),
    "overlapping offsets": lambda header: header["lm_head.weight"].update(data_offsets=header[NAME]["data_offsets"]),
    "an unknown dtype": lambda header: header[NAME].update(dtype="F7"),
    "a dtype of another size": lambda header: header[NAME].update(dtype="F64"),
    "a dtype of numbers": lambda header: header[NAME].update(dtype=[32]),
    "an entry that is no object": lambda header: header.update({NAME: 3}),
    "an unknown tensor": lambda header: header.update(stranger=header.pop(NAME)),
    "nothing": lambda header: header.clear(),
}


@pytest.mark.parametrize("kind", ABSURD)
def test_a_header_that_lies(folder: Path, kind: str) -> None:
    edit_header(folder, ABSURD[kind])
    refused(ask(folder), str(folder))


def test_tensors_of_the_wrong_shape_are_named(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(3, 5)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / SINGLE)
    refused(ask(folder), "model.layers.1.self_attn.k_proj.weight has shape [3, 5]", "model.norm.weight is missing")


# ---------------------------------------- config.json


@pytest.mark.parametrize(
    "key", ["model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "num_local_experts"]
)
def test_a_config_without_a_key(folder: Path, key: str) -> None:
    edit_config(folder, **{key: None})
    refused(ask(folder), str(folder / "config.json"), key)


NONSENSE = [
    {"hidden_size": 0},
    {"hidden_size": -32},
    {"hidden_size": "32"},
    {"hidden_size": 33},
    {"hidden_size": 10**30},
    {"num_hidden_layers": 10**9},
    {"num_local_experts": 10**9},
    {"num_experts_per_tok": 9},
    {"vocab_size": 10**18},
    {"head_dim": 7},
    {"num_key_value_heads": 3},
    {"max_position_embeddings": 0},
    {"rms_norm_eps": -1},
    {"rope_theta": "big"},
    {"rope_theta": 0},
    {"sliding_window": -1},
    {"sliding_window": [1, 2]},
    {"sliding_window": [[1]]},
    {"rope_parameters": [1]},
    {"rope_parameters": {"rope_type": "yarn"}},
    {"hidden_act": "gelu"},
    {"model_type": "llama"},
    {"model_type": ["mixtral"]},
]


@pytest.mark.parametrize("change", NONSENSE, ids=str)
def test_a_config_with_nonsense(folder: Path, change: dict[str, object]) -> None:
    edit_config(folder, **change)
    refused(ask(folder), str(folder))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\ufeff{}", '{"model_type": "mixtral"', "[" * 100_000])
def test_a_config_that_is_no_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refused(ask(folder), str(folder / "config.json"))
    (folder / "config.json").unlink()
    refused(ask(folder), "config.json: no such file")


def test_a_tokenizer_or_generation_config_that_is_damaged(folder: Path) -> None:
    for text in ('{"eos_token_id": "two"}', "[]", "{"):
        (folder / "generation_config.json").write_text(text)
        refused(ask(folder), "generation_config.json")
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"not a model")
    refused(ask(folder), "tokenizer.model")
    (folder / "tokenizer.model").unlink()
    refused(ask(folder, "--raw", "Who?"), "tokenizer", hint="tokenizer.model")
    refused(run("chat", "-m", folder, stdin=b"Who?"), "tokenizer", hint="tokenizer.model")


# ---------------------------------------- prompts


def test_a_prompt_longer_than_the_context(folder: Path) -> None:
    for args in (("--raw", "word " * 400), ("word " * 400,), ("--json", "word " * 400)):
        refused(ask(folder, *args), "the model's context holds 256", hint="shorten")
    refused(run("chat", "-m", folder, stdin=b"word " * 400), "the model's context holds 256")


@pytest.mark.parametrize("raw", [(), ("--raw",)])
def test_an_empty_prompt(folder: Path, raw: tuple[str, ...]) -> None:
    for args, stdin in ((("",), b""), (("  ",), b""), (("-",), b""), ((), b""), ((), b"\n")):
        done = run("generate", "--model", folder, *raw, *args, stdin=stdin)
        refused(done, "the prompt is empty", hint="word")


def test_stdin_that_is_not_utf_8(folder: Path) -> None:
    latin = "Où est la bibliothèque ?".encode("latin-1")
    refused(ask(folder, "-", stdin=latin), "stdin is not valid UTF-8", "byte 1 is 0xf9", hint="iconv")
    refused(ask(folder, "-", stdin=b"half a character \xc3"), "not valid UTF-8")
    chat = run("chat", "-m", folder, "-o", "max_tokens=2", stdin=b"Who?\n" + latin)
    assert chat.out.count("\n") >= 1  # the first line was a turn
    refused(replace(chat, out=""), "line 2 of stdin is not valid UTF-8", hint="iconv")


def test_an_argument_that_is_not_utf_8(folder: Path) -> None:
    line = [one.encode() for one in command("generate", "--model", folder, "WHAT")]
    done = subprocess.run([*line[:-1], "Où".encode("latin-1")], capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 2
    assert "not valid Unicode" in done.stderr


# ---------------------------------------- options and personas


@pytest.mark.parametrize(
    ("pair", "says", "hint"),
    [
        ("temprature=0.5", "'temprature'", "did you mean temperature?"),
        ("temperature=-1", "temperature is -1", "0 is greedy"),
        ("temperature=warm", "temperature is 'warm'", ""),
        ("temperature", "-o 'temperature': expected key=value", "temperature=0"),
        ("=0", "''", ""),
        ("top_p=0", "top_p is 0", "1 keeps"),
        ("max_tokens=0", "max_tokens is 0", "none"),
        ("logit_bias=99999:1", "99999", "token ids"),
        ("stop=", "stop", ""),
    ],
)
def test_a_bad_sampling_option(folder: Path, pair: str, says: str, hint: str) -> None:
    for verb, stdin in ((("generate", "Who?"), b""), (("chat",), b"Who?")):
        refused(run(*verb, "--model", folder, "-o", pair, stdin=stdin), says, hint=hint)


@pytest.mark.parametrize("option", [("--dtype", "float12"), ("--device", "toaster"), ("--device", "cuda:77")])
def test_a_bad_dtype_or_device(folder: Path, option: tuple[str, str]) -> None:
    refused(ask(folder, *option, "Who?"), option[1])


PERSONAS = [
    ('name = "Ann"\nsytem = "Be nice"\n', "'sytem'", "did you mean 'system'?"),
    ('name = "Ann"\nsystem = "Be nice"\n[sampling]\ntemprature = 0.5\n', "'temprature'", "temperature"),
    ('name = "Ann"\nsystem = "Be nice"\n[sampling]\ntemperature = -1\n', "temperature is -1", "0 is greedy"),
    ('name = "Ann"\n', "'system' is missing", "name ="),
    ('name = "Ann"\nsystem = 3\n', "system must be a string", ""),
    ('name = "Ann\n', "not valid TOML", ""),
]


@pytest.mark.parametrize(("text", "says", "hint"), PERSONAS)
def test_a_persona_file_with_a_typo(folder: Path, tmp_path: Path, text: str, says: str, hint: str) -> None:
    path = tmp_path / "ann.toml"
    path.write_text(text)
    for verb, stdin in ((("generate", "Who?"), b""), (("chat",), b"Who?")):
        refused(run(*verb, "--model", folder, "--persona", path, stdin=stdin), str(path), says, hint=hint)


def test_a_persona_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    refused(ask(folder, "--persona", "meny", "Who?"), "'meny'", hint="did you mean 'menny'?")
    refused(ask(folder, "--persona", tmp_path / "no.toml", "Who?"), "no.toml: no such persona file")
    (tmp_path / "latin.toml").write_bytes(b'name = "Ren\xe9"\nsystem = ""\n')
    refused(ask(folder, "--persona", tmp_path / "latin.toml", "Who?"), "not UTF-8")


MODEL = "[model]\ndim = 8\nn_layers = 1\nhead_dim = 7\nhidden_dim = 8\nn_heads = 1\nn_kv_heads = 1\nvocab_size = 9\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no such file"),
        ("[model", "not valid TOML"),
        ("[modle]\n", "'modle'"),
        ("", "[model]"),
        ("[model]\n[data]\n[optim]\n[run]\n", "[model] lacks the key 'dim'"),
        (MODEL + "[data]\n[optim]\n[run]\n", "[model] head_dim is 7"),
    ],
)
def test_a_bad_training_config(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "bad.toml"
    if text is not None:
        path.write_text(text)
    refused(run("train", path), str(path), says)


def test_the_real_program_ends_as_told(tmp_path: Path) -> None:
    done = subprocess.run(command("generate", "--model", tmp_path / "nowhere", "Who?"), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]


# ---------------------------------------- whatever else may be in the files

RELAXED = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)
ODD = st.sampled_from([0, -1, 1, 2, 7, 2**31, 2**63, 10**30, 1.5, float("inf"), "8", "", [], {}, True]) | JSON


@pytest.fixture(scope="module", autouse=True)
def modest() -> Any:
    """However absurd the sizes in a file, nobody allocates them."""
    before = peak_bytes()
    yield
    assert peak_bytes() - before < 400 * MEGABYTE


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def loads_or_refuses(folder: Path) -> None:
    """Either the model loads and gives logits, or a UserError says why not."""
    try:
        model, _ = load_model(folder, device="cpu")
    except UserError:
        return
    assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, model.args.vocab_size)


@RELAXED
@given(data=st.binary(max_size=200))
@example(data=b"")
@example(data=struct.pack("<Q", 2) + b"{}")
@example(data=struct.pack("<Q", 2**63) + b"{}")
@example(data=struct.pack("<Q", 4) + b"null")
@example(data=struct.pack("<Q", 9) + b'{"a":[1]}')
def test_random_bytes_for_weights(folder: Path, data: bytes) -> None:
    (folder / SINGLE).write_bytes(data)
    with pytest.raises(UserError):
        load_model(folder, device="cpu")


@RELAXED
@given(data=st.data())
def test_a_weights_file_with_a_few_bytes_changed(whole: Path, folder: Path, data: st.DataObject) -> None:
    body = bytearray((whole / SINGLE).read_bytes())
    end = 8 + struct.unpack("<Q", body[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    (folder / SINGLE).write_bytes(body)
    loads_or_refuses(folder)


@RELAXED
@given(data=st.data())
def test_a_header_with_an_odd_value(whole: Path, folder: Path, data: st.DataObject) -> None:
    header, body = read_parts(whole / SINGLE)
    name = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    where = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "entry", "size", "offset", "metadata"]))
    odd = data.draw(ODD)
    if where == "entry":
        header[name] = odd
    elif where == "metadata":
        header["__metadata__"] = odd
    elif where == "size":
        header[name]["shape"][0] = odd
    elif where == "offset":
        header[name]["data_offsets"][data.draw(st.integers(0, 1))] = odd
    else:
        header[name][where] = odd
    (folder / SINGLE).write_bytes(join_parts(header, body))
    loads_or_refuses(folder)


@RELAXED
@given(data=st.data())
def test_a_config_with_an_odd_value(whole: Path, folder: Path, data: st.DataObject) -> None:
    config = json.loads((whole / "config.json").read_text())
    extra = ["rope_parameters", "rope_scaling", "_sliding_window", "sliding_window"]
    for key in data.draw(st.lists(st.sampled_from([*sorted(config), *extra]), min_size=1, max_size=3)):
        config[key] = data.draw(ODD)
    (folder / "config.json").write_text(json.dumps(config))
    loads_or_refuses(folder)


@RELAXED
@given(data=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_random_bytes_for_config(folder: Path, data: bytes) -> None:
    (folder / "config.json").write_bytes(data)
    with pytest.raises(UserError):
        load_model(folder, device="cpu")
