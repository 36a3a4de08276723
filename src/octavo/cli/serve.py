"""`octavo serve`: the model behind OpenAI's API."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from octavo.cli.options import (
    BITS,
    GPU_MEMORY_HELP,
    PAGE_BYTES,
    SERVER_BYTES,
    choose_persona,
    left_of,
    load,
    parse_pairs,
    take_loading,
)
from octavo.cli.terminal import note
from octavo.errors import OptionError

if TYPE_CHECKING:
    from octavo.checkpoint import Checkpoint
    from octavo.serve.worker import Worker

LOADING = ("bits", "dtype", "device", "context", "batch", "prefix", "trace", "prefetch")
PAGE = "/ui"


@click.command("serve")
@click.argument("model", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; others need a key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 picks a free one.")
@click.option("--memory", metavar="SIZE", help="All that may be taken, such as 12GiB: what does not fit is streamed.")
@click.option("--gpu-memory", metavar="SIZE", help=GPU_MEMORY_HELP)
@click.option(
    "--api-key",
    "keys",
    multiple=True,
    metavar="KEY|@FILE",
    help="Who sends it may come in. A file has a key a line. Repeatable; also OCTAVO_API_KEY.",
)
@click.option("--ui", is_flag=True, help="Serve the chat page too, at /ui/.")
@click.option(
    "--option", "-o", "pairs", multiple=True, metavar="KEY=VALUE",
    help="Of the model: bits, dtype, device, context, batch, prefix, trace, prefetch. Of the server: drain, max_queue, "
    "max_per_key, body_limit, cors, log_prompts, header_timeout, read_timeout, write_timeout, keep_alive. Repeatable.",
)  # fmt: skip
def command(
    model: str | None,
    host: str,
    port: int,
    memory: str | None,
    gpu_memory: str | None,
    keys: tuple[str, ...],
    ui: bool,
    pairs: tuple[str, ...],
) -> None:
    """Serve MODEL, by default the one that ships, to clients of OpenAI's API.

    Prints the address that clients need as base_url, and logs to stderr. SIGTERM or Ctrl-C ends it once the replies
    under way are finished, after 30 seconds at most (-o drain=N); a second one ends it at once.

    \b
    octavo serve
    octavo serve ./mixtral-4bit --memory 12GiB --ui
    octavo serve ./mixtral --host 0.0.0.0 --api-key @keys.txt -o max_per_key=4
    """
    try:
        import octavo.serve.app as api
        from octavo.serve import server
    except ImportError as error:
        raise OptionError(
            f"serving needs the package {error.name}, which is not installed", "pip install 'octavo[serve]'"
        ) from None
    from octavo.llm import SHIPPED
    from octavo.serve.config import ServeConfig, check_host, read_keys, take_options
    from octavo.serve.worker import Worker

    options = parse_pairs(pairs)
    settings = take_options(options, LOADING)
    found = read_keys(keys)
    hosts = check_host(host, found)
    name = SHIPPED if model is None else model
    config = ServeConfig(model_id=_model_id(name), keys=found, hosts=hosts, **settings)
    sock = server.bind(host, port)
    try:
        memory = left_of(memory, PAGE_BYTES if ui else SERVER_BYTES)
        loading = _loading(options, name, memory, gpu_memory)
        dtype, device, bits = (loading.pop(key) for key in ("dtype", "device", "bits"))
        llm = load(name, dtype, device, bits, memory, loading, gpu_memory)
        worker = Worker(llm, max_queue=config.max_queue, max_per_key=config.max_per_key)
        app = api.create_app(worker, config)
        if ui:
            _mount(app, worker, model, config.model_id)
            note(f"the page is at {PAGE}/ of the same address")
        _log_to_stderr()
        server.serve(app, worker, config, sock, ready=_announce)
    finally:
        sock.close()


def _announce(url: str) -> None:
    """The one line of data."""
    click.echo(url)
    sys.stdout.flush()


def _model_id(name: str) -> str:
    """What clients call the model: a Hub id as it is, a folder by its own name, so that no path is told."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


def _loading(options: dict[str, str], name: str, memory: str | None, gpu_memory: str | None) -> dict[str, Any]:
    """What `LLM.load` is given, and how many sequences at a time, which is said with its reason."""
    from octavo.checkpoint import open_checkpoint
    from octavo.llm import PREFIX_BYTES, SHIPPED, find_model
    from octavo.plan import parse_size
    from octavo.serve.batch import batch_for

    said = {key: options.pop(key, None) for key in ("bits", "dtype", "device")}
    bits, wanted, prefix = said["bits"], options.pop("batch", None), options.pop("prefix", None)
    if bits is not None and bits not in BITS:
        raise OptionError(f"bits is {bits!r}; expected one of {', '.join(BITS)}", "such as -o bits=4")
    if wanted is not None and not wanted.strip().isdecimal():
        raise OptionError(f"batch is {wanted!r}; expected an integer", "such as -o batch=8")
    bounded = memory is not None or gpu_memory is not None
    prefix_bytes = (0 if bounded else PREFIX_BYTES) if prefix is None else 0 if prefix == "0" else parse_size(prefix)
    loading = take_loading(options)
    checkpoint: Checkpoint = open_checkpoint(find_model(name))
    batch = batch_for(
        checkpoint,
        dtype="float32" if said["dtype"] is None and name == SHIPPED and gpu_memory is None else said["dtype"],
        device=said["device"],
        bits=bits,
        memory=memory,
        gpu_memory=gpu_memory,
        context=loading.get("context"),
        prefix_bytes=prefix_bytes,
        wanted=None if wanted is None else int(wanted),
    )
    note(batch.reason)
    return {**said, **loading, "max_batch_size": batch.size, "prefix_bytes": prefix_bytes, "whole_cache": True}


def _mount(app: Any, worker: Worker, model: str | None, name: str) -> None:
    """The chat page, beside the API."""
    try:
        from octavo.ui.local import LocalModel
        from octavo.ui.page import mount
    except ImportError as error:
        raise OptionError(
            f"the page needs the package {error.name}, which is not installed", "pip install 'octavo[ui]'"
        ) from None
    persona = choose_persona(None, model)
    speaker = None if persona is None else persona.name.lower()
    mount(app, LocalModel(worker.llm, worker), PAGE, persona=speaker, name=name)


def _log_to_stderr() -> None:
    """A line a request, and what uvicorn warns of."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    for name, level in (("octavo.serve", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
