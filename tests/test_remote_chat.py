"""Conversations with a model behind an address, and `octavo chat --remote`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from octavo.chat import Persona
from octavo.cli.conversation import Conversation
from octavo.completion import REPLY_SHARE
from octavo.errors import HubError
from octavo.remote import RemoteModel, TooLongError
from octavo.sampling import SamplingParams
from run_octavo import refused, run, terminal
from scripted_api import Asked, Server, delta, half, hangs, reply, sends, serving

pytestmark = pytest.mark.usefixtures("no_keys")
QUESTION = [{"role": "user", "content": "Who are you?"}]
QUESTIONS = ("Who are you?", "Où est la bibliothèque ?", "Tell me everything")
KEY = "sk-something-secret"


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as one:
        yield one


# ---------------------------------------- conversations


def too_long_beyond(turns: int) -> Callable[[Asked], None]:
    """A server with a context of so many messages."""

    def script(asked: Asked) -> None:
        if asked.json and len(asked.json["messages"]) > turns:
            error = {"message": "This model's maximum context length is 3", "code": "context_length_exceeded"}
            return asked.send({"error": error}, 400)
        return reply("Yes.")(asked)

    return script


def test_a_conversation_forgets_its_oldest_turns_when_the_server_says_so(server: Server) -> None:
    server.script = too_long_beyond(6)
    conversation = Conversation(RemoteModel(server.address), None, "Be nice", {})
    forgot = []
    for number in range(5):
        stream, dropped = conversation.ask(f"Question {number}")
        list(stream)
        conversation.answer(stream.result.text)
        forgot.append(dropped)
    assert forgot == [0, 0, 0, 1, 1]
    sent = [one["content"] for one in server.posts[-1]["messages"]]
    assert sent == ["Be nice", "Question 2", "Yes.", "Question 3", "Yes.", "Question 4"]
    before = list(conversation.turns)
    server.script = too_long_beyond(0)
    with pytest.raises(TooLongError, match="maximum context length"):
        conversation.ask("Question 5")
    assert conversation.turns == before


def test_once_a_reply_is_cut_short_room_is_left_for_the_next(server: Server) -> None:
    """A server whose tokens are four characters, and whose context is 100 of them."""

    def script(asked: Asked) -> None:
        if asked.command == "GET":
            return reply()(asked)
        n_prompt = sum(len(one["content"]) for one in asked.json["messages"]) // 4
        n_reply = min(asked.json["max_tokens"], 100 - n_prompt)
        if n_reply < 1:
            return asked.send({"error": {"message": "the prompt is too long"}}, 400)
        usage = {"prompt_tokens": n_prompt, "completion_tokens": n_reply}
        return reply("word" * n_reply, finish="length", usage=usage)(asked)

    server.script = script
    conversation = Conversation(RemoteModel(server.address), None, "Be nice!", {"max_tokens": "40"})
    replies, room = [], 100 // REPLY_SHARE
    for number in range(10):
        stream, _ = conversation.ask(f"What is {number}")
        list(stream)
        conversation.answer(stream.result.text)
        replies.append(stream.result.usage.completion_tokens)
    cut = next(at for at, tokens in enumerate(replies) if tokens < room)
    assert set(replies[:cut]) == {40}
    assert conversation.llm.context == 100
    assert min(replies[cut + 1 :]) >= room


@pytest.mark.parametrize(
    "said",
    [
        "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens.",
        "the prompt has 600 tokens; the model's context holds 512, at least one of them for the reply",
        "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000 `inputs` tokens",
        "the request exceeds the available context size. try increasing the context size",
        "prompt is too long: 210000 tokens > 200000 maximum",
        "Please reduce the length of the messages or completion.",
    ],
)
def test_servers_say_too_long_in_their_own_words(server: Server, said: str) -> None:
    server.script = sends({"error": {"message": said}}, 400)
    with pytest.raises(TooLongError):
        RemoteModel(server.address, model="x").stream(QUESTION)
    server.script = half({"error": {"message": said}})
    with pytest.raises(TooLongError):
        list(RemoteModel(server.address, model="x").stream(QUESTION))
    server.script = sends({"error": {"message": said}}, 500)  # whatever it says, another try would not help
    with pytest.raises(HubError):
        RemoteModel(server.address, model="x").stream(QUESTION)


# ---------------------------------------- octavo chat --remote


def test_chat_with_a_model_elsewhere(server: Server) -> None:
    server.script = reply("I am ", "far away")
    args = ("chat", "--remote", server.address, "-m", "other", "--system", "Be nice", "-o", "top_k=3", "-o", "seed=1")
    done = run(*args, stdin=b"Who?\nWhere?\n")
    assert (done.code, done.out, done.err) == (0, "I am far away\nI am far away\n", "")
    assert [one.path for one in server.asked] == ["/v1/chat/completions"] * 2
    assert [one["content"] for one in server.posts[1]["messages"]] == ["Be nice", "Who?", "I am far away", "Where?"]
    assert {(one["model"], one["top_k"], one["seed"]) for one in server.posts} == {("other", 3, 1)}
    done = run("chat", "--remote", server.address, "--persona", "menny", stdin=b"Who?")
    menny = Persona.load("menny")
    assert server.posts[2]["messages"][0] == {"role": "system", "content": menny.system}
    assert server.posts[2]["temperature"] == SamplingParams.from_options(menny.sampling).temperature


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (["--memory", "1GiB"], "--memory"),
        (["--bits", "4"], "--bits"),
        (["--dtype", "float32"], "--dtype"),
        (["--device", "cpu"], "--device"),
        (["--verbose"], "--verbose"),
        (["-o", "context=64"], "-o context"),
        (["-o", "logprobs=1"], "logprobs"),
        (["-o", "stop_ids=2"], "stop_ids"),
        (["-o", "temprature=1"], "temprature"),
    ],
)
def test_chat_refuses_what_has_no_meaning_elsewhere(server: Server, args: list[str], name: str) -> None:
    refused(run("chat", "--remote", server.address, *args, stdin=b"Who?"), name)
    assert not server.asked


def test_chat_elsewhere_on_a_terminal(server: Server) -> None:
    def endless(asked: Asked) -> None:
        if asked.command == "GET":
            return reply()(asked)
        asked.begin_events()
        while not asked.server.over.wait(0.02):
            asked.event(delta("on and "))
        return None

    server.script = endless
    with terminal("chat", "--remote", server.address) as screen:
        assert f"scripted at {server.address}" in screen.wait_for("> ")
        screen.type("Tell me everything\n")
        screen.wait_for("on and on")
        screen.type("\x03")
        assert "; stopped" in screen.wait_for("> ")
        server.script = hangs
        screen.type("And now?\n")
        while len(server.posts) < 2:
            pass
        screen.interrupt(until="stopped")
        screen.wait_for("> ")
        server.script = sends({"error": {"message": "closed for today"}}, 503)
        screen.type("Again?\n")
        assert "closed for today" in screen.wait_for("> ")
        server.script = reply("Here I am")
        screen.type("Are you there?\n")
        screen.wait_for("Here I am")
        screen.wait_for("> ")
        screen.type("\x04")
        assert screen.wait() == 0
        assert "Traceback" not in screen.seen
    told = [one["content"] for one in server.posts[-1]["messages"]]
    assert told[0] == "Tell me everything"
    assert told[1].startswith("on and on")
    assert told[2:] == ["Are you there?"]  # what got no reply is not remembered
