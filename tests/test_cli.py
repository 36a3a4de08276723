"""The command line: what it prints where, what it costs, and that it says what the library says."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

import octavo
from octavo.chat import Message, Persona
from octavo.cli import VERBS, octavo_command
from octavo.cli.chat import COMMANDS
from octavo.cli.conversation import Conversation
from octavo.completion import REPLY_SHARE
from octavo.errors import PromptError
from octavo.kernels import backend
from octavo.llm import LLM
from run_octavo import command, refused, run, terminal
from tiny_folder import make_tiny_folder
from train_fixtures import make_world, tables

HEAVY = ("torch", "numpy", "sentencepiece", "tokenizers", "safetensors", "huggingface_hub", "jinja2", "tqdm")
GREEDY = ("-o", "temperature=0", "-o", "max_tokens=24")
ENDLESS = ("-o", "temperature=0.5", "-o", "max_tokens=none", "-o", "logit_bias=2:-100")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def folder(home: Path) -> Path:
    """A chat model."""
    return make_tiny_folder(home / "chat" / "tiny")


@pytest.fixture(scope="module")
def base(home: Path) -> Path:
    """A model without a chat template."""
    return make_tiny_folder(home / "base" / "tiny", converses=False)


@pytest.fixture(scope="module")
def talker(home: Path) -> Path:
    """A chat model that never comes to an end."""
    return make_tiny_folder(home / "talker" / "tiny", max_seq_len=1_000_000, sliding_window=8)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM.load(folder, device="cpu")


@pytest.fixture
def persona(tmp_path: Path) -> Path:
    path = tmp_path / "pirate.toml"
    path.write_text('name = "Pirate"\nsystem = "Arr."\n[sampling]\ntemperature = 0\nmax_tokens = 7\n')
    return path


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


# ---------------------------------------- help


@pytest.mark.parametrize("args", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)])
def test_help_is_quick_and_imports_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys\n"
        "from octavo.cli import main\n"
        f"try: main({args!r})\n"
        "except SystemExit as end: assert not end.code\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
    # By the processor's clock: on the wall's, other people's work counts too.
    seconds = min(cpu_seconds([sys.executable, "-c", f"from octavo.cli import main; main({args!r})"]) for _ in range(3))
    assert seconds <= 0.3


def cpu_seconds(line: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(line, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_names_every_verb_and_version_the_version() -> None:
    done = run()
    assert "Usage: octavo" in done.out + done.err
    done = run("--help")
    assert done.code == 0
    for verb in VERBS:
        assert re.search(rf"^  {verb} ", done.out, re.MULTILINE)
    assert run("--version").out == f"octavo {octavo.__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_has_at_most_thirteen_flags(verb: str) -> None:
    found = octavo_command.get_command(click.Context(octavo_command), verb)
    assert found is not None
    assert len([one for one in found.params if isinstance(one, click.Option)]) <= 13
    assert found.help


def test_a_command_line_that_cannot_be_read() -> None:
    for args in (["nonsense"], ["generate", "--nonsense"], ["generate", "one", "two"], ["train"]):
        done = run(*args)
        assert done.code == 2
        assert done.out == ""
        assert "Error:" in done.err


# ---------------------------------------- generate


def test_generate_answers_as_the_library_does(folder: Path, llm: LLM) -> None:
    reply = llm.chat([user("Who are you?")], temperature=0, max_tokens=24)
    done = run("generate", "--model", folder, *GREEDY, "Who are you?")
    assert (done.code, done.out, done.err) == (0, reply.text + "\n", "")


def test_generate_raw_goes_on_from_the_text(folder: Path, llm: LLM) -> None:
    done = run("generate", "--model", folder, *GREEDY, "--raw", "The quick")
    assert (done.code, done.err) == (0, "")
    assert done.out == llm.generate("The quick", temperature=0, max_tokens=24).text + "\n"


def test_generate_completes_with_a_model_that_does_not_chat(base: Path) -> None:
    llm = LLM.load(base, device="cpu")
    done = run("generate", "--model", base, *GREEDY, "The quick")
    assert done.out == llm.generate("The quick", temperature=0, max_tokens=24).text + "\n"
    assert done.err == "the model has no chat template: PROMPT is completed as plain text (--raw says so silently)\n"
    asked = run("generate", "--model", base, *GREEDY, "--system", "Be nice", "The quick")
    expected = llm.chat([system("Be nice"), user("The quick")], temperature=0, max_tokens=24)
    assert (asked.out, asked.err) == (expected.text + "\n", "")


@pytest.mark.parametrize("args", [[], ["-"]])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_generate_reads_stdin(folder: Path, args: list[str], end: bytes) -> None:
    text = "Où est\nla bibliothèque ?"
    piped = run("generate", "--model", folder, *GREEDY, *args, stdin=text.encode() + end)
    assert piped == run("generate", "--model", folder, *GREEDY, text, stdin=b"not read")


def test_generate_json_is_one_object(folder: Path, llm: LLM) -> None:
    options = ("-o", "temperature=0.9", "-o", "seed=5", "-o", "n=3", "-o", "logprobs=2", "-o", "max_tokens=5")
    done = run("generate", "-m", folder, *options, "--json", "Who?")
    assert done.out.count("\n") == 1
    said = json.loads(done.out)
    expected = llm.chat([user("Who?")], temperature=0.9, seed=5, n=3, logprobs=2, max_tokens=5).to_dict()
    del said["timings"], expected["timings"]
    assert said == expected
    assert len(said["choices"]) == 3


@pytest.mark.parametrize("option", ["n=2", "logprobs=3"])
def test_generate_drops_nothing_silently(folder: Path, option: str) -> None:
    refused(run("generate", "-m", folder, "-o", option, "Who?"), option.split("=")[0], hint="--json")
    for flag in ("--system", "--persona"):
        refused(run("generate", "-m", folder, "--raw", flag, "menny", "Who?"), "--raw", flag)


def test_a_persona_brings_its_prompt_and_options(folder: Path, llm: LLM, persona: Path) -> None:
    question, mine = user("Who are you?"), ["generate", "-m", folder, "--persona", persona, "Who are you?"]
    said = run(*mine).out
    assert said == llm.chat([system("Arr."), question], temperature=0, max_tokens=7).text + "\n"
    longer = run(*mine, "-o", "max_tokens=12").out
    assert longer == llm.chat([system("Arr."), question], temperature=0, max_tokens=12).text + "\n"
    other = run(*mine, "--system", "Be nice").out
    assert other == llm.chat([system("Be nice"), question], temperature=0, max_tokens=7).text + "\n"
    assert len({said, longer, other}) == 3


def test_the_shipped_model_speaks_as_menny(folder: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.llm.shipped_model", lambda: folder)  # any model can show who was asked to speak
    seeded = ("-o", "seed=1", "-o", "max_tokens=9")
    expected = llm.chat([user("Who?")], persona=Persona.load("menny"), seed=1, max_tokens=9).text + "\n"
    assert run("generate", *seeded, "Who?").out == expected
    assert run("chat", *seeded, stdin=b"Who?").out == expected
    plain = llm.chat([user("Who?")], seed=1, max_tokens=9).text + "\n"
    assert run("generate", *seeded, "--persona", "none", "Who?").out == plain != expected


def test_text_flows_and_a_closed_pipe_ends_it_quietly(talker: Path) -> None:
    line = command("generate", "-m", talker, *ENDLESS, "Tell me everything")
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert len(process.stdout.read(10)) == 10  # though the reply will never be complete
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1


def test_ctrl_c_ends_generate(talker: Path) -> None:
    line = command("generate", "-m", talker, *ENDLESS, "Tell me everything")
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.stderr.read().strip() == b""
        assert process.wait(60) == 130


def test_output_survives_an_encoding_that_lacks_characters(folder: Path) -> None:
    line = command("generate", "-m", folder, *GREEDY, "Où est la bibliothèque ?")
    done = subprocess.run(line, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=True)
    assert done.stdout.isascii()
    assert done.stderr == b""


# ---------------------------------------- chat, in a pipe


def test_chat_in_a_pipe_prints_replies_alone(folder: Path, llm: LLM) -> None:
    done = run("chat", "-m", folder, *GREEDY, stdin="Who are you?\n\n  \nOù ?\r\n".encode())
    first = llm.chat([user("Who are you?")], temperature=0, max_tokens=24).text
    turns = [user("Who are you?"), {"role": "assistant", "content": first}, user("Où ?")]
    second = llm.chat(turns, temperature=0, max_tokens=24).text
    assert (done.code, done.out, done.err) == (0, f"{first}\n{second}\n", "")


def test_chat_commands(folder: Path, llm: LLM, persona: Path) -> None:
    lines = f"/persona {persona}\nWho?\n/reset\nWho?\n/persona none\n/reset\nWho?\n/persona\n/nonsense\n/quit\nWho?\n"
    done = run("chat", "-m", folder, "--system", "Be nice", "-o", "max_tokens=6", "-o", "seed=3", stdin=lines.encode())
    pirate = llm.chat([system("Arr."), user("Who?")], temperature=0, max_tokens=6).text
    nobody = llm.chat([user("Who?")], seed=3, max_tokens=6).text
    assert (done.code, done.out) == (0, f"{pirate}\n{pirate}\n{nobody}\n")
    said = done.err.splitlines()
    assert said[:4] == ["persona: Pirate", "forgotten", "persona: none", "forgotten"]
    assert said[4] == f"persona: none; these ship: {', '.join(Persona.shipped())}"
    assert said[5].startswith("there is no command /nonsense")
    assert [line.split()[0] for line in said[6:]] == list(COMMANDS)


def test_chat_takes_a_path_for_text(folder: Path, llm: LLM) -> None:
    done = run("chat", "-m", folder, *GREEDY, stdin=b"/usr/bin is what?")
    assert done.out == llm.chat([user("/usr/bin is what?")], temperature=0, max_tokens=24).text + "\n"


def test_chat_says_when_a_model_was_not_made_for_it(base: Path) -> None:
    done = run("chat", "-m", base, *GREEDY, stdin=b"Who?")
    assert done.code == 0
    assert done.err == "the model has no chat template; asked as Mistral's first chat models are\n"


def test_chat_without_a_line_has_nothing_to_say(folder: Path) -> None:
    done = run("chat", "-m", folder)
    assert (done.code, done.out, done.err) == (0, "", "")


def test_a_long_chat_forgets_its_beginning_and_says_so(home: Path) -> None:
    small = make_tiny_folder(home / "small" / "tiny", max_seq_len=96)
    done = run("chat", "-m", small, "--system", "Be nice", "-o", "max_tokens=30", stdin=b"How do you do?\n" * 8)
    assert done.code == 0
    assert "the context is full" in done.err
    assert "/reset" in done.err


# ---------------------------------------- conversations


def test_a_conversation_always_leaves_room_and_keeps_its_system_prompt(home: Path) -> None:
    llm = LLM.load(make_tiny_folder(home / "room" / "tiny", max_seq_len=120), device="cpu")
    conversation = Conversation(llm, None, "Be nice", {"max_tokens": "20", "temperature": "0"})
    forgot = 0
    for number in range(12):
        stream, dropped = conversation.ask(f"Question {number}: how do you do?")
        forgot += dropped
        result = [list(stream), stream.result][1]
        conversation.answer(result.text)
        assert result.usage.prompt_tokens + min(20, 120 // REPLY_SHARE) <= 120
        assert result.usage.total_tokens <= 120
        assert conversation.turns[-1] == Message("assistant", result.text)
        kept = [Message("system", "Be nice"), *conversation.turns[:-1]]
        assert result.usage.prompt_tokens == len(llm.template.render(kept))
        assert len(conversation.turns) == 2 * (number + 1 - forgot)
    assert forgot > 0


def test_what_cannot_be_asked_changes_nothing(llm: LLM) -> None:
    conversation = Conversation(llm, None, None, {"temperature": "0", "max_tokens": "5"})
    stream, _ = conversation.ask("Who?")
    conversation.answer([list(stream), stream.result][1].text)
    before = list(conversation.turns)
    with pytest.raises(PromptError, match="context"):
        conversation.ask("word " * 500)
    with pytest.raises(PromptError, match="blank"):
        conversation.ask(" ")
    stream, _ = conversation.ask("Said, then taken back")
    stream.close()
    conversation.answer("")
    assert conversation.turns == before
    assert not llm.engine.has_work


# ---------------------------------------- chat, on a terminal


def test_chat_on_a_terminal(talker: Path) -> None:
    with terminal("chat", "-m", talker, *ENDLESS) as screen:
        banner = screen.wait_for("> ")
        assert f"octavo {octavo.__version__}: {talker}" in banner
        assert "parameters" in banner
        assert len(banner.splitlines()) == 3  # two, and the prompt
        screen.interrupt(until="/quit or Ctrl-D leaves")  # there was nothing to stop
        screen.wait_for("> ")
        screen.type("Tell me everything\n")
        screen.wait_for("everything\r\n")
        screen.wait_for_characters(20)
        screen.type("\x03")
        told = screen.wait_for("> ")
        assert re.search(r"\d+ tokens, \d+ tok/s; stopped", told)
        screen.type("/persona nobody\n")
        assert "hint: " in screen.wait_for("> ")
        screen.type("And more\n")
        screen.wait_for("more\r\n")
        screen.wait_for_characters(20)
        screen.type("\x03")
        assert "stopped" in screen.wait_for("> ")
        screen.type("\x04")
        assert screen.wait() == 0
        assert "Traceback" not in screen.seen


def test_chat_with_replies_to_a_file(folder: Path, llm: LLM, tmp_path: Path) -> None:
    """A person types, but stdout goes elsewhere: prompts and notes stay on the terminal."""
    out = tmp_path / "replies"
    master, slave = os.openpty()
    with out.open("wb") as file:
        process = subprocess.Popen(command("chat", "-m", folder, *GREEDY), stdin=slave, stdout=file, stderr=slave)
    os.write(master, b"Who?\n/quit\n")
    assert process.wait(120) == 0
    assert out.read_text() == llm.chat([user("Who?")], temperature=0, max_tokens=24).text + "\n"
    seen = os.read(master, 65536).decode()
    assert "octavo" in seen
    assert "> " in seen
    os.close(slave)
    os.close(master)


# ---------------------------------------- train


def test_train_then_generate(tmp_path: Path) -> None:
    config = tmp_path / "tiny.toml"
    config.write_text(to_toml(tables(make_world(tmp_path / "world"), tmp_path / "run")))
    done = run("train", "--json", config)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["finished"] is True
    assert result["step"] == 12
    assert result["model"] == str(tmp_path / "run" / "model")
    assert result["heldout"]["loss"] > 0
    reply = run("generate", "--model", result["model"], *GREEDY, "What is 1 plus 2?")
    assert reply.code == 0
    assert reply.err in ("", f"{backend()}\n")  # bfloat16 weights are computed with by the kernels there are
    refused(run("train", "--no-resume", config), str(tmp_path / "run"), hint="resume")
    again = run("train", config)
    assert (again.code, again.out) == (0, "")


def to_toml(tree: dict[str, object], path: str = "") -> str:
    """Nested tables as TOML; numbers, strings and lists are written as in JSON."""
    lines = [f"[{path}]\n"] if path else []
    lines += [f"{key} = {json.dumps(value)}\n" for key, value in tree.items() if not isinstance(value, dict)]
    for key, value in tree.items():
        if isinstance(value, dict):
            lines.append(to_toml(value, f"{path}.{key}" if path else key))
    return "".join(lines)
