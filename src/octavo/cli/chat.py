"""`octavo chat`: a conversation, line by line."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

import octavo
from octavo.cli.options import (
    NO_PERSONA,
    choose_persona,
    load,
    model_options,
    parse_pairs,
    sampling,
    speaker_options,
    take_loading,
)
from octavo.cli.terminal import decode, note, show, stdin_is_terminal, tell_error
from octavo.errors import OptionError, PromptError, UserError

if TYPE_CHECKING:
    from octavo.chat import Persona
    from octavo.cli.conversation import Conversation
    from octavo.llm import LLM, Stream
    from octavo.remote import RemoteModel, RemoteStream

PROMPT = "> "
COMMANDS = {
    "/reset": "forget what was said",
    "/persona": "NAME, FILE or none: speak as somebody else; alone, say who speaks",
    "/help": "this list",
    "/quit": "leave, as Ctrl-D does",
}
_COMMAND = re.compile(r"/[a-zA-Z]+")


@click.command("chat")
@model_options
@click.option(
    "--remote", metavar="URL|NAME", help="A model elsewhere: an OpenAI-compatible address, or one on Hugging Face."
)
@speaker_options
def command(
    model: str | None,
    dtype: str | None,
    device: str | None,
    bits: str | None,
    memory: str | None,
    gpu_memory: str | None,
    verbose: bool,
    remote: str | None,
    persona: str | None,
    system: str | None,
    pairs: tuple[str, ...],
) -> None:
    """Talk to a model.

    Ctrl-C stops a reply; /quit or Ctrl-D leaves, /help lists the commands. When the conversation outgrows the
    model's context, its oldest turns are forgotten, with a note. When stdin is not a terminal, each of its lines
    is a turn, and stdout gets the replies alone.

    With --remote the model runs elsewhere, and --model is its name there (by default the first that is served). The key
    is OCTAVO_API_KEY, or HF_TOKEN for Hugging Face.

    \b
    octavo chat
    octavo chat --model ./mixtral --system "Answer in one sentence." -o temperature=0.3
    octavo chat --model ./mixtral-4bit --memory 12GiB
    octavo chat --model ./mixtral-4bit --gpu-memory 24GiB
    octavo chat --remote http://127.0.0.1:8000/v1
    octavo chat --remote mistralai/Mixtral-8x7B-Instruct-v0.1
    """
    options = parse_pairs(pairs)
    loading = take_loading(options)
    if remote is not None:
        here = {"--dtype": dtype, "--device": device, "--bits": bits, "--memory": memory, "--gpu-memory": gpu_memory}
        _refuse_here(here | {"--verbose": verbose} | {f"-o {name}": True for name in loading})
    speaker = choose_persona(persona, model if remote is None else remote)
    params = sampling(speaker, options)  # what is misspelt should not wait for the model
    interactive = stdin_is_terminal()
    llm: LLM | RemoteModel
    if remote is None:
        llm = load(model, dtype, device, bits, memory, loading, gpu_memory)
        if interactive:
            _greet(_about(model, llm), speaker)
        if not llm.converses:
            note("the model has no chat template; asked as Mistral's first chat models are")
    else:
        from octavo.remote import RemoteModel

        llm = RemoteModel(remote, model=model)
        llm.fields(params)
        if interactive:
            _greet(llm.model if remote == llm.model else f"{llm.model} at {remote}", speaker)
    from octavo.cli.conversation import Conversation

    _Chat(Conversation(llm, speaker, system, options), interactive, verbose).run()


def _refuse_here(given: Mapping[str, object]) -> None:
    """Refuse options that say how a model is loaded, where none is."""
    for name, value in given.items():
        if value:
            raise OptionError(
                f"{name} is for a model on this machine, and --remote names one that runs elsewhere",
                hint="leave one of the two out",
            )


def _about(model: str | None, llm: LLM) -> str:
    from octavo.llm import SHIPPED

    args = llm.model.args
    size = f"{_size(args.n_params)} parameters"
    if args.moe:
        size += f", {_size(args.n_active_params)} a token"
    return f"{SHIPPED if model is None else model}, {size}, context {llm.context:,} tokens"


def _greet(about: str, persona: Persona | None) -> None:
    who = f"; persona {persona.name}" if persona else ""
    note(f"octavo {octavo.__version__}: {about}{who}")
    note("Ctrl-C stops a reply, /quit or Ctrl-D leaves, /help lists the commands")


def _size(count: int) -> str:
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return str(count)


class _Chat:
    """Reads turns and commands until there are no more."""

    def __init__(self, conversation: Conversation, interactive: bool, verbose: bool) -> None:
        self._conversation = conversation
        self._interactive = interactive
        self._verbose = verbose
        self._told_prefetch = False
        self._line = 0
        if interactive:
            with contextlib.suppress(ImportError):  # line editing and history, where Python has them
                import readline  # noqa: F401

    def run(self) -> None:
        """Until /quit or the end of stdin. In a pipe an error or Ctrl-C ends it too."""
        while True:
            try:
                line = self._read()
                if line is None or not self._take(line.strip()):
                    return
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                note("\n/quit or Ctrl-D leaves")
            except UserError as error:
                if not self._interactive:
                    raise
                tell_error(error)

    def _read(self) -> str | None:
        """The next line, or None at the end of stdin.

        Raises:
            PromptError: it is not UTF-8.
        """
        if self._interactive:
            return self._ask()
        line = sys.stdin.buffer.readline() if sys.stdin is not None else b""
        self._line += 1
        return decode(line, f"line {self._line} of stdin") if line else None

    def _ask(self) -> str | None:
        try:
            if sys.stdout.isatty():
                return input(PROMPT)
            click.echo(PROMPT, nl=False, err=True)  # stdout is for replies
            return sys.stdin.readline() or None
        except EOFError:
            click.echo(err=True)
            return None
        except UnicodeDecodeError:
            raise PromptError("what was typed is not valid UTF-8", hint="is the terminal set to UTF-8?") from None

    def _take(self, line: str) -> bool:
        """Heed one line; False to leave."""
        word, _, rest = line.partition(" ")
        if _COMMAND.fullmatch(word):  # a path, such as /usr/bin, is not one
            return self._command(word.lower(), rest.strip())
        if line:
            self._reply(line)
        return True

    def _command(self, word: str, rest: str) -> bool:
        if word == "/quit":
            return False
        if word == "/reset":
            self._conversation.reset()
            note("forgotten")
        elif word == "/persona":
            self._persona(rest)
        else:
            if word != "/help":
                note(f"there is no command {word}; these are:")
            for name, meaning in COMMANDS.items():
                note(f"  {name:<9} {meaning}")
        return True

    def _persona(self, name: str) -> None:
        from octavo.chat import Persona

        if name:
            self._conversation.become(None if name.lower() == NO_PERSONA else Persona.load(name))
        persona = self._conversation.persona
        who = persona.name if persona else NO_PERSONA
        note(f"persona: {who}" + ("" if name else f"; these ship: {', '.join(Persona.shipped())}"))

    def _reply(self, text: str) -> None:
        try:
            stream, dropped = self._conversation.ask(text)
        except KeyboardInterrupt:  # a server may let one wait
            if not self._interactive:
                raise
            note("stopped")
            return
        if dropped:
            note(f"the context is full: forgot the oldest {dropped} of the exchanges (/reset forgets all)")
        stopped = False
        try:
            with stream:
                for chunk in stream:
                    show(chunk.text)
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            stopped = True
        finally:
            show("\n")
            self._conversation.answer(stream.result.text)
        if self._interactive:
            self._tell(stream, stopped)
        if self._verbose:
            from octavo.cli.memory import tell_experts

            tell_experts(stream.result.experts)
        from octavo.remote import RemoteModel

        llm = self._conversation.llm
        if not isinstance(llm, RemoteModel) and llm.prefetch_note and not self._told_prefetch:
            self._told_prefetch = True
            note(llm.prefetch_note)

    def _tell(self, stream: Stream | RemoteStream, stopped: bool) -> None:
        """How the reply went, where a person reads along."""
        result = stream.result
        said = f"{result.usage.completion_tokens} tokens, {result.timings.tokens_per_second:.0f} tok/s"
        if stopped:
            said += "; stopped"
        elif result.finish_reason == "length":
            context = self._conversation.llm.context
            full = context is not None and result.usage.total_tokens >= context
            said += "; cut short: the context is full" if full else "; cut short (-o max_tokens=N allows more)"
        note(said)
