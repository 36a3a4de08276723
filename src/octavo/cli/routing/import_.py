"""`octavo routing import`: routing that vLLM or OLMoE's scripts recorded, as a trace."""

from __future__ import annotations

from pathlib import Path

import click

from octavo.cli.routing.shared import check_place
from octavo.cli.terminal import note

KINDS = ("vllm", "olmoe")


@click.command("import")
@click.argument("file")
@click.option("--from", "kind", type=click.Choice(KINDS), required=True, help="Who recorded it.")
@click.option("--experts", "n_experts", type=int, required=True, metavar="N", help="How many a layer has.")
@click.option("--out", "-o", required=True, metavar="FILE", help="Where to: a safetensors file.")
@click.option("--model", "-m", metavar="M", help="Whose routing it is: its tokenizer gives the tokens' text.")
@click.option("--label", "-l", metavar="NAME", help="What the text is; by default the file's name.")
def command(file: str, kind: str, n_experts: int, out: str, model: str | None, label: str | None) -> None:
    """Turn routing recorded elsewhere into a trace.

    FILE is, of vLLM, routed experts as .npy, .npz, or the API's response as .json or .jsonl; of OLMoE's scripts, the
    .jsonl with exp_ids. The path of the trace goes to stdout.

    \b
    octavo routing import routed.npy --from vllm --experts 128 -o trace.safetensors
    octavo routing import c4_results.jsonl --from olmoe --experts 64 -m allenai/OLMoE-1B-7B-0924 -o trace.safetensors
    """
    from octavo.routing.imports import from_olmoe, from_vllm
    from octavo.routing.trace import tokenizer_of

    check_place(out, "trace.safetensors")
    read = from_vllm if kind == "vllm" else from_olmoe
    tokenizer = None if model is None else tokenizer_of(model)
    trace = read(file, n_experts=n_experts, tokenizer=tokenizer, label=label, model=model)
    trace.save(Path(out))
    text = "" if model is None or trace.pieces is not None else "; it has no token ids, and so no text"
    n_documents = int(trace.document_ids[-1]) + 1
    note(
        f"{trace.n_tokens:,} tokens; {n_documents:,} document{'s' * (n_documents > 1)}; {trace.n_layers} layers, "
        f"{trace.top_k} of {trace.experts} experts{text}"
    )
    click.echo(out)
