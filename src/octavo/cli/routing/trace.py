"""`octavo routing trace`: record which experts the tokens of texts are routed to."""

from __future__ import annotations

import time
from pathlib import Path

import click

from octavo.cli.options import BITS
from octavo.cli.routing.shared import Bar, check_place, documents_of, text_options
from octavo.cli.terminal import note


@click.command("trace")
@click.argument("model")
@text_options
@click.option("--out", "-o", required=True, metavar="FILE", help="Where to: a safetensors file.")
@click.option("--generate", "-n", type=int, default=0, metavar="N", help="After each text, up to N tokens of a reply.")
@click.option("--logits", is_flag=True, help="Record the routers' logits too.")
@click.option("--tokens", type=int, metavar="N", help="At most so many tokens of each label, replies not counted.")
@click.option("--memory", metavar="SIZE", help="All that may be taken, such as 12GiB: what does not fit is streamed.")
@click.option("--bits", type=click.Choice(BITS), metavar="N", help="8, 4, 3 or 2: quantise the weights while loading.")
def command(
    model: str,
    files: tuple[str, ...],
    texts: tuple[str, ...],
    labels: tuple[str, ...],
    out: str,
    generate: int,
    logits: bool,
    tokens: int | None,
    memory: str | None,
    bits: str | None,
) -> None:
    """Record which experts the tokens of each --text are routed to, in every layer.

    MODEL is a folder, a weights file, a Hub id or menny. FILES are more texts; without any, the built-in ones are
    taken: five languages, sums and code. The path of the trace goes to stdout.

    \b
    octavo routing trace menny -o trace.safetensors
    octavo routing trace ./mixtral -t poems.txt -l poems -t code.jsonl -l code --memory 12GiB -o trace.safetensors
    octavo routing trace ./mixtral src/*.py --label code -o trace.safetensors
    """
    from octavo.cli.options import load
    from octavo.llm import find_model
    from octavo.routing.trace import revision_of, trace_documents

    check_place(out, "trace.safetensors")
    documents = documents_of(texts, files, labels)
    folder = find_model(model)
    llm = load(model, None, None, bits, memory, {"prefix_bytes": 0})
    began = time.perf_counter()
    with Bar("routing") as bar:
        trace = trace_documents(
            llm,
            documents,
            generate=generate,
            logits=logits,
            tokens=tokens,
            model=model,
            revision=revision_of(folder),
            progress=bar,
        )
    trace.save(Path(out))
    n_documents, n_decoded = len(trace.labels or ()), 0 if trace.decoded is None else int(trace.decoded.sum())
    replies = f", {n_decoded:,} of them decoded" if n_decoded else ""
    note(
        f"{trace.n_tokens:,} tokens{replies}; {n_documents:,} document{'s' * (n_documents > 1)}; "
        f"{', '.join(trace.domains)}; {trace.n_layers} layers, {trace.top_k} of {trace.experts} experts; "
        f"{time.perf_counter() - began:.1f} s"
    )
    click.echo(out)
