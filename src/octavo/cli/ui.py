"""`octavo ui`: the chat page in a browser."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from octavo.cli.options import (
    GPU_MEMORY_HELP,
    PAGE_BYTES,
    choose_persona,
    left_of,
    load,
    parse_pairs,
    sampling,
    take_loading,
)
from octavo.cli.terminal import note
from octavo.errors import OptionError

if TYPE_CHECKING:
    from octavo.ui.backend import Backend

NEEDED = ("fastapi", "uvicorn", "gradio")


@click.command("ui")
@click.argument("model", required=False)
@click.option(
    "--remote", metavar="NAME|URL", help="A model elsewhere: a Hub id, or the address of an OpenAI-compatible API."
)
@click.option("--host", default="127.0.0.1", show_default=True, metavar="HOST", help="The address to listen on.")
@click.option("--port", default=7860, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--memory", metavar="SIZE", help="All that may be taken, such as 12GiB: what does not fit is streamed.")
@click.option("--gpu-memory", metavar="SIZE", help=GPU_MEMORY_HELP)
@click.option(
    "--api-key", "keys", multiple=True, metavar="KEY|@FILE", help="The password of the page, as octavo serve's."
)
@click.option(
    "--option", "-o", "pairs", multiple=True, metavar="KEY=VALUE",
    help="A sampling option to begin with, such as temperature=0; or context=N. Repeatable.",
)  # fmt: skip
def command(
    model: str | None,
    remote: str | None,
    host: str,
    port: int,
    memory: str | None,
    gpu_memory: str | None,
    keys: tuple[str, ...],
    pairs: tuple[str, ...],
) -> None:
    """Chat with a model on a page in the browser, and watch which experts speak.

    Prints the page's address. Without MODEL the model that ships with Octavo speaks. The page is this machine's
    alone; with another --host it needs a password, --api-key, which the browser asks for (any user name will do).
    Ctrl-C ends it.

    \b
    octavo ui
    octavo ui ./mixtral-4bit --memory 12GiB
    octavo ui --remote mistralai/Mixtral-8x7B-Instruct-v0.1
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise OptionError(f"the page needs {', '.join(missing)}", hint="pip install 'octavo[ui]'")
    from octavo.serve.config import ServeConfig, check_host, read_keys

    options = parse_pairs(pairs)
    loading = take_loading(options)
    if remote is not None and (model is not None or memory is not None or gpu_memory is not None or loading):
        hint = "leave out MODEL, --memory, --gpu-memory and -o context=N"
        raise OptionError("--remote has its model elsewhere", hint=hint)
    persona = None if remote is not None else choose_persona(None, model)
    sampling(persona, options)  # what is misspelt should not wait for the model
    given = read_keys(keys)
    config = ServeConfig("octavo", keys=given, hosts=check_host(host, given))
    from octavo.serve.gate import Gate
    from octavo.serve.server import bind
    from octavo.ui.page import application
    from octavo.ui.server import run

    with ExitStack() as closing:
        sock = closing.enter_context(bind(host, port))
        backend: Backend
        if remote is not None:
            from octavo.remote import RemoteModel

            name, backend = remote, RemoteModel(remote)
        else:
            from octavo.llm import SHIPPED
            from octavo.serve.worker import Worker
            from octavo.ui.local import LocalModel

            llm = load(model, None, None, None, left_of(memory, PAGE_BYTES), loading, gpu_memory)
            name = SHIPPED if model is None else model
            backend = LocalModel(llm, closing.enter_context(Worker(llm)))
        speaker = None if persona is None else persona.name.lower()
        app = application(backend, persona=speaker, options=options, name=name)
        run(Gate(app, config), sock, _announce)


def _announce(address: str) -> None:
    click.echo(address)
    sys.stdout.flush()
    note("Ctrl-C ends it")
