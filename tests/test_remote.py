"""A model behind an address: what is asked, what comes back, and every way in which a server can fail."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from huggingface_hub.inference._providers import CONVERSATIONAL_AUTO_ROUTER

from octavo.chat import Message, Persona
from octavo.cli.conversation import Conversation
from octavo.completion import Usage
from octavo.errors import HubError, OptionError, PromptError
from octavo.llm import LLM
from octavo.remote import RemoteModel, TooLongError
from octavo.sampling import SamplingParams
from octavo_server import serve
from run_octavo import refused, run
from scripted_api import Asked, Server, delta, half, hangs, reply, sends, serving
from tiny_folder import make_tiny_folder

pytestmark = pytest.mark.usefixtures("no_keys")
QUESTION = [{"role": "user", "content": "Who are you?"}]
QUESTIONS = ("Who are you?", "Où est la bibliothèque ?", "Tell me everything")
KEY = "sk-something-secret"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as one:
        yield one


# ---------------------------------------- what is asked


def test_a_reply_comes_in_chunks_with_usage_and_timings_at_the_end(server: Server) -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 3}}
    server.script = reply("I am ", "", "nobody, l\u00e0", finish="length", usage=usage)
    stream = RemoteModel(server.address).stream(QUESTION)
    with pytest.raises(RuntimeError, match="not finished"):
        _ = stream.result
    chunks = list(stream)
    assert [chunk.text for chunk in chunks] == ["I am ", "nobody, l\u00e0", ""]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, "length"]
    assert chunks[-1].usage == Usage(7, 5, 3)
    result = stream.result
    assert (result.text, result.finish_reason, result.usage) == ("I am nobody, l\u00e0", "length", Usage(7, 5, 3))
    timings = result.timings
    assert timings == chunks[-1].timings
    assert 0 < timings.time_to_first_token < 10
    assert timings.tokens_per_second == pytest.approx(4 / timings.decode_seconds)


def test_only_what_is_not_off_is_sent(server: Server) -> None:
    remote = RemoteModel(server.address)
    neutral = SamplingParams(temperature=1.0, max_tokens=None)
    list(remote.stream(QUESTION, neutral))
    always = {"model": "scripted", "messages": QUESTION, "stream": True, "stream_options": {"include_usage": True}}
    assert server.posts == [always | {"temperature": 1.0}]
    options = {"top_p": 0.9, "frequency_penalty": 0.5, "presence_penalty": -0.5, "seed": 3, "max_tokens": 9}
    extensions = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}
    biased = {"stop": ("\n", "end"), "logit_bias": {5: -100.0}}
    list(remote.stream(QUESTION, neutral, **options, **extensions, **biased, temperature=0))
    sent = {"temperature": 0.0, "stop": ["\n", "end"], "logit_bias": {"5": -100.0}}
    assert server.posts[1] == always | options | extensions | sent


@pytest.mark.parametrize("option", [{"stop_ids": (2,)}, {"logprobs": 0}, {"n": 2}])
def test_what_the_api_has_no_field_for_is_refused(server: Server, option: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(option))} is ") as refusal:
        RemoteModel(server.address).stream(QUESTION, **option)
    assert refusal.value.hint
    assert not server.posts


def test_a_persona_speaks_unless_the_messages_say_who(server: Server) -> None:
    remote, menny = RemoteModel(server.address), Persona.load("menny")
    list(remote.stream(QUESTION, persona="menny"))
    assert server.posts[0]["messages"] == [{"role": "system", "content": menny.system}, *QUESTION]
    mine = [Message("system", "Arr."), Message("user", "Who?")]
    list(remote.stream(mine, persona=menny, seed=1))
    assert server.posts[1]["messages"] == [{"role": one.role, "content": one.content} for one in mine]
    with pytest.raises(PromptError, match="blank"):
        remote.stream([{"role": "user", "content": " "}])


def test_models_are_listed_and_chosen(server: Server) -> None:
    assert RemoteModel(server.address).models() == ["scripted", "other"]
    assert RemoteModel(server.address).model == "scripted"
    list(RemoteModel(server.address, model="other").stream(QUESTION))
    assert server.posts[0]["model"] == "other"
    assert [one.path for one in server.asked] == ["/v1/models", "/v1/models", "/v1/chat/completions"]
    server.script = lambda asked: asked.send({"object": "list", "data": []})
    with pytest.raises(HubError, match="lists no model"):
        _ = RemoteModel(server.address).model


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_every_way_to_write_a_base_address(server: Server, path: str) -> None:
    remote = RemoteModel(server.address.removesuffix("/v1") + path)
    assert [chunk.text for chunk in remote.stream(QUESTION)] == ["Hello", ""]
    assert [one.path for one in server.asked] == ["/v1/models", "/v1/chat/completions"]


@pytest.mark.parametrize(
    "address",
    [
        "",
        "menny",
        "localhost:8000",
        "127.0.0.1:8000/v1",
        "ftp://host/v1",
        "http://",
        "http://host:x/v1",
        "http://[::1/v1",
        "a/b/c",
        "./x",
        "http://me:secret@host/v1",
        "https://host/v1?key=secret",
        "http://host/v1#secret",
    ],
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(OptionError) as refusal:
        RemoteModel(address)
    assert refusal.value.hint
    assert "secret" not in refusal.value.message


# ---------------------------------------- Octavo's own server


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A tiny chat model whose context a few questions fill."""
    return LLM.load(make_tiny_folder(tmp_path_factory.mktemp("remote") / "tiny", max_seq_len=128), device="cpu")


@pytest.fixture(scope="module")
def said(llm: LLM) -> dict[str, str]:
    """What the model replies when it is asked here, before anybody else owns it."""
    return {one: llm.chat([user(one)], temperature=0, max_tokens=24).text for one in QUESTIONS}


@pytest.fixture(scope="module")
def octavo(llm: LLM, said: dict[str, str]) -> Iterator[str]:
    with serve(llm, keys=(KEY,)) as address:
        yield address


def test_a_reply_from_octavos_server_is_the_models_own(octavo: str, said: dict[str, str], llm: LLM) -> None:
    remote = RemoteModel(octavo, api_key=KEY)
    assert remote.models() == ["tiny", *Persona.shipped()]
    for question, text in said.items():
        stream = remote.stream([user(question)], temperature=0, max_tokens=24)
        assert "".join(chunk.text for chunk in stream) == text == stream.result.text
        usage = stream.result.usage
        assert usage.prompt_tokens == len(llm.template.render([user(question)]))
        assert (usage.completion_tokens == 24) == (stream.result.finish_reason == "length")
    options = {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 5, "stop": "z", "logit_bias": {5: -100.0}}
    replies = []
    for _ in range(2):  # a seed gives the same reply again
        stream = remote.stream([user("Who?")], temperature=1.5, max_tokens=12, **options)
        replies.append("".join(chunk.text for chunk in stream))
    assert replies[0] == replies[1]


def test_what_octavos_server_refuses(octavo: str) -> None:
    with pytest.raises(HubError, match="refuses the key"):
        RemoteModel(octavo, api_key="wrong").models()
    with pytest.raises(HubError, match="wants a key"):
        list(RemoteModel(octavo, model="tiny").stream(QUESTION))
    with pytest.raises(HubError, match="no model 'nobody'") as refusal:
        RemoteModel(octavo, model="nobody", api_key=KEY).stream(QUESTION)
    assert refusal.value.hint == "it has tiny, menny"
    with pytest.raises(HubError, match=r"refuses the request \(400\).*logit_bias"):
        RemoteModel(octavo, api_key=KEY).stream(QUESTION, logit_bias={5: 1000.0})
    with pytest.raises(TooLongError, match="holds 128"):
        RemoteModel(octavo, api_key=KEY).stream([user("word " * 200)])


def test_a_long_conversation_with_octavos_server_goes_on(octavo: str) -> None:
    options = {"max_tokens": "20", "temperature": "0"}
    conversation = Conversation(RemoteModel(octavo, api_key=KEY), None, "Be nice", options)
    forgot = 0
    for number in range(8):
        stream, dropped = conversation.ask(f"Question {number}: how do you do?")
        list(stream)
        conversation.answer(stream.result.text)
        forgot += dropped
        assert stream.result.usage.total_tokens <= 128
        assert conversation.turns[-2].content.startswith(f"Question {number}")
    assert forgot > 3


# ---------------------------------------- keys


def test_a_server_gets_its_own_key_and_never_the_hubs(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    list(RemoteModel(server.address).stream(QUESTION))
    assert [one.headers["authorization"] for one in server.asked] == [None, None]
    monkeypatch.setenv("OCTAVO_API_KEY", KEY)
    list(RemoteModel(server.address).stream(QUESTION))
    assert {one.headers["authorization"] for one in server.asked[2:]} == {f"Bearer {KEY}"}
    assert all("hf_secret" not in str(one.headers) for one in server.asked)


def test_a_key_is_never_shown(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_API_KEY", KEY)
    server.script = lambda asked: asked.send({"error": {"message": f"bad key {KEY}\x1b[2J"}}, 401)
    done = run("chat", "--remote", server.address, stdin=b"Who?")
    refused(done, "refuses the key (401)", "bad key ***", hint="OCTAVO_API_KEY")
    assert KEY not in done.err
    assert "\x1b[2J" not in done.err
    assert KEY not in repr(RemoteModel(server.address))
    with pytest.raises(HubError) as refusal:
        RemoteModel(server.address).models()
    assert refusal.value.message.isprintable()


# ---------------------------------------- the Inference API, as far as it can be reached from here


@pytest.fixture
def hugging_face(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The scripted server in the place of Hugging Face's router."""
    monkeypatch.setattr(CONVERSATIONAL_AUTO_ROUTER, "base_url", server.address.removesuffix("/v1"))
    monkeypatch.setattr("octavo.remote.ROUTER", server.address)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    monkeypatch.setenv("OCTAVO_API_KEY", KEY)  # which is nothing to Hugging Face
    return server


@pytest.mark.parametrize("name", ["mistralai/Mixtral-8x7B-Instruct-v0.1", "owner/name:provider"])
def test_a_model_on_the_inference_api(hugging_face: Server, name: str) -> None:
    remote = RemoteModel(name)
    assert "".join(chunk.text for chunk in remote.stream(QUESTION)) == "Hello"
    (asked,) = hugging_face.asked
    assert (asked.path, asked.json["model"]) == ("/v1/chat/completions", name)
    assert asked.headers["authorization"] == "Bearer hf_mine"
    assert remote.models() == ["scripted", "other"]
    for option in ({"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.1}):
        with pytest.raises(OptionError, match="Inference API has no field"):
            remote.stream(QUESTION, **option)
    hugging_face.script = lambda asked: asked.send({"error": {"message": "no", "code": "model_not_supported"}}, 400)
    with pytest.raises(HubError, match="has no model"):
        remote.stream(QUESTION)


def test_the_inference_api_needs_a_token(hugging_face: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "mine")
    with pytest.raises(HubError, match="none of Hugging Face's"):
        RemoteModel("owner/name").stream(QUESTION)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="needs a token") as refusal:
        RemoteModel("owner/name").stream(QUESTION)
    assert "HF_TOKEN" in str(refusal.value.hint)
    assert not hugging_face.asked
    with pytest.raises(OptionError, match="names a model already"):
        RemoteModel("owner/name", model="other")


# ---------------------------------------- servers that say little


def test_without_usage_pieces_are_counted(server: Server) -> None:
    server.script = reply("a", "b", "c")
    stream = RemoteModel(server.address).stream(QUESTION)
    list(stream)
    assert stream.result.usage == Usage(0, 3)


def test_a_server_that_does_not_know_stream_options(server: Server) -> None:
    def script(asked: Asked) -> None:
        if asked.json and "stream_options" in asked.json:
            return asked.send({"detail": [{"loc": ["body", "stream_options"], "msg": "extra_forbidden"}]}, 422)
        return reply("Hello")(asked)

    server.script = script
    assert [chunk.text for chunk in RemoteModel(server.address).stream(QUESTION)] == ["Hello", ""]
    assert len(server.posts) == 2


# ---------------------------------------- faults


REFUSALS = {
    "no key": (sends({"error": {"message": "no API key"}}, 401), ("wants a key (401)", "no API key"), "OCTAVO_API_KEY"),
    "forbidden": (sends("not you", 403, content_type="text/plain"), ("(403)", "not you"), "OCTAVO_API_KEY"),
    "unknown model": (sends({"error": {"message": "no x"}}, 404), ("no model 'mine' (404)", "no x"), "/v1"),
    "too many": (sends({"error": "slow down"}, 429, retry_after="7"), ("(429)", "slow down"), "in 7 s"),
    "too many, until": (sends("", 429, retry_after="Fri, 1 May"), ("too many requests (429)",), "after Fri, 1 May"),
    "trouble": (sends({"error": {"message": "oops"}}, 500), ("in trouble (500)", "oops"), "later"),
    "bad gateway": (sends("<html>nginx</html>", 502, content_type="text/html"), ("in trouble (502)",), "later"),
    "refused": (sends({"message": "no penalties"}, 400), ("refuses the request (400)", "no penalties"), "option"),
    "JSON list": (sends([1, 2], 400), ("as an OpenAI-compatible API",), "/v1"),
    "HTML": (sends("<html>Hello</html>", content_type="text/html"), ("as an OpenAI-compatible API",), "/v1"),
    "plain JSON": (sends({"hello": "there"}), ("as an OpenAI-compatible API",), "/v1"),
    "nothing": (sends(""), ("as an OpenAI-compatible API",), "/v1"),
    "closed": (lambda asked: asked.connection.close(), ("connection broke",), "again"),
    "silence": (hangs, ("said nothing for 0.3 s",), "later"),
    "broken JSON": (half("{nonsense"), ("as an OpenAI-compatible API",), "/v1"),
    "other JSON": (half("[1, 2]"), ("as an OpenAI-compatible API",), "/v1"),
    "other shape": (half({"choices": [{"delta": {"content": 5}}]}), ("as an OpenAI-compatible API",), "/v1"),
    "cut": (half(), ("broke off in the middle",), "again"),
    "unfinished": (half("[DONE]", end=True), ("broke off in the middle",), "again"),
    "silence midway": (half(hang=True), ("said nothing for 0.3 s",), "later"),
    "error midway": (half({"error": {"message": "out of memory"}}), ("failed in the middle", "out of memory"), "again"),
    "filtered": (half(delta(None, "content_filter")), ("content filter",), "other words"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_fault_is_said_in_a_line_that_names_the_address(server: Server, name: str) -> None:
    server.script, words, hint = REFUSALS[name]
    remote = RemoteModel(server.address, model="mine", timeout=0.3)
    with pytest.raises(HubError) as refusal:
        list(remote.stream(QUESTION))
    for word in (server.address, *words):
        assert word in refusal.value.message
    assert refusal.value.hint is not None
    assert hint in refusal.value.hint
    assert "\n" not in refusal.value.message
    assert "<html>" not in refusal.value.message
    server.script = reply("Well again")
    assert "".join(chunk.text for chunk in remote.stream(QUESTION)) == "Well again"


def test_an_unknown_model_is_told_which_there_are(server: Server) -> None:
    listed = reply()
    server.script = lambda asked: listed(asked) if asked.command == "GET" else asked.send({"error": "unknown"}, 404)
    with pytest.raises(HubError, match="no model 'nobody'") as refusal:
        RemoteModel(server.address, model="nobody").stream(QUESTION)
    assert refusal.value.hint == "it has scripted, other"


def test_nobody_is_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(HubError, match="cannot be reached") as refusal:
            RemoteModel(address).stream(QUESTION)
    assert address in refusal.value.message


def test_a_server_that_lists_nothing(server: Server) -> None:
    server.script = sends("<html>not here</html>", 404)
    with pytest.raises(HubError, match="does not list its models") as refusal:
        RemoteModel(server.address).stream(QUESTION)
    assert "--model NAME" in str(refusal.value.hint)


def test_closing_hangs_up_and_keeps_what_came(server: Server) -> None:
    hung_up = threading.Event()

    def endless(asked: Asked) -> None:
        asked.begin_events()
        try:
            while not asked.server.over.wait(0.01):
                asked.event(delta("on and "))
        except OSError:
            hung_up.set()

    server.script = endless
    stream = RemoteModel(server.address, model="x").stream(QUESTION)
    with stream:
        first = next(stream)
    assert hung_up.wait(5)
    assert (stream.result.text, stream.result.finish_reason) == (first.text, "cancelled")
    assert list(stream) == []
    hung_up.clear()
    dropped = RemoteModel(server.address, model="x").stream(QUESTION)
    next(dropped)
    del dropped
    assert hung_up.wait(5)


@pytest.mark.parametrize("silent", [True, False])
def test_another_thread_may_hang_up(server: Server, silent: bool) -> None:
    """As a page's stop button does, while the reply's own thread waits for a server that says nothing, or talks."""
    hung_up = threading.Event()

    def script(asked: Asked) -> None:
        asked.begin_events()
        asked.event(delta("Half a "))
        if silent:
            asked.connection.settimeout(10)
            assert asked.rfile.read(1) == b""
            hung_up.set()
        try:
            while not hung_up.is_set():
                asked.event(delta("on and "))
        except OSError:
            hung_up.set()

    server.script = script
    stream = RemoteModel(server.address, model="x").stream(QUESTION)
    found: list[str] = [next(stream).text]
    reader = threading.Thread(target=lambda: found.extend(chunk.text for chunk in stream))
    reader.start()
    time.sleep(0.1)  # for the reader to wait; where it does not yet, less is tested
    stream.close()
    reader.join(5)
    assert not reader.is_alive()
    assert hung_up.wait(5)
    assert (stream.result.text, stream.result.finish_reason) == ("".join(found), "cancelled")
    server.script = reply("Hello")
    assert [chunk.text for chunk in RemoteModel(server.address).stream(QUESTION)] == ["Hello", ""]
