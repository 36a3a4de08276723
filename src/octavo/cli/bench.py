"""`octavo bench`: how fast a model runs here, and how close that is to what the machine can do."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from octavo.cli.options import SHAPE_BITS
from octavo.cli.terminal import note
from octavo.errors import OptionError

if TYPE_CHECKING:
    from octavo.args import ModelArgs
    from octavo.bench.card import CardBench
    from octavo.bench.measure import Bench


class _How(NamedTuple):
    """What is measured, by the options of these names."""

    memory: str | None
    gpu_memory: str | None
    routing: str | None
    prompt: int
    decode: int
    batch: int


@click.command()
@click.option("--shape", metavar="NAME", help="Random weights of this shape, such as mixtral-8x7b.")
@click.option("--layers", type=click.IntRange(1), metavar="N", help="So many of the shape's layers.")
@click.option("--model", "-m", metavar="M", help="A real model instead: a folder, store, weights file or Hub id.")
@click.option(
    "--bits", type=click.Choice(SHAPE_BITS), metavar="N", help="16, 8, 4, 3 or 2; 4 for a shape, a model's own for it."
)
@click.option("--memory", metavar="SIZE", help="Run within so much, such as 12GiB: what does not fit is streamed.")
@click.option("--device", metavar="DEVICE", default="cpu", show_default=True, help="cpu, or cuda for a GPU.")
@click.option("--gpu-memory", metavar="SIZE", help="Of the GPU's so much: experts beyond it come from the host's.")
@click.option("--store", metavar="DIR", help="Where a shape's weights are written (once), to be streamed.")
@click.option("--routing", metavar="HOW", help="uniform, sticky:P or trace:FILE, in the place of the routers' choice.")
@click.option("--prompt", type=click.IntRange(1), default=512, show_default=True, metavar="N", help="Prompt tokens.")
@click.option("--decode", type=click.IntRange(1), default=64, show_default=True, metavar="N", help="Decode steps.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Sequences at once.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    shape: str | None,
    layers: int | None,
    model: str | None,
    bits: str | None,
    memory: str | None,
    device: str,
    gpu_memory: str | None,
    store: str | None,
    routing: str | None,
    prompt: int,
    decode: int,
    batch: int,
    as_json: bool,
) -> None:
    """Measure prefill and decode, beside the machine's read bandwidth and integer dot products.

    Prompts are random tokens, and replies are sampled, so that routing spreads over the experts. With --memory, what
    is read from the disk is measured too, beside what the disk can do, and what the same choices would have read by
    the cache's rules. With --routing sticky:P each expert of the last token stays with probability P. On a machine
    with other work the figures mean little.

    With --device cuda the limits are the card's: a copy within its memory, a large bfloat16 product, and with
    --gpu-memory the link from the host. A shape's weights are then made on the card.

    \b
    octavo bench --shape mixtral-8x7b --layers 4 --bits 4 --prompt 512 --decode 64
    octavo bench --shape mixtral-8x7b --bits 4 --memory 12GiB --store ./random-4bit --routing uniform
    octavo bench --model ./mixtral-4bit --batch 8 --json
    octavo bench --shape mixtral-8x7b --bits 4 --device cuda --gpu-memory 24GiB
    """
    if (shape is None) == (model is None):
        raise OptionError(
            "octavo bench needs either --shape or --model", hint="such as --shape mixtral-8x7b --layers 4"
        )
    for option, value in (("--layers", layers), ("--store", store)):
        if model is not None and value is not None:
            raise OptionError(f"{option} belongs to --shape; a model has its own", hint="leave one of them out")
    if store is not None and bits == "16":
        raise OptionError("--store is for low-bit weights, and --bits is 16", hint="give --bits 8, 4, 3 or 2")

    on_card = device.partition(":")[0] != "cpu"
    for option, given in (("--store", store), ("--routing", routing)):
        if on_card and given is not None:
            raise OptionError(
                f"{option} belongs to the CPU, and --device is {device}",
                hint="leave one of them out; on a GPU experts come from the host's memory, as the routers choose",
            )
    if gpu_memory is not None and not on_card:
        raise OptionError("--gpu-memory needs a GPU, and --device is cpu", hint="give --device cuda")

    started = time.perf_counter()
    how = _How(memory, gpu_memory, routing, prompt, decode, batch)
    wanted = None if bits is None else int(bits)
    bench: Bench | CardBench
    if on_card:
        bench = _prepare_card(shape, layers, model, wanted, device, how)
        note(f"{device}; ready after {time.perf_counter() - started:.1f} s")
    else:
        bench = _prepare(shape, layers, model, wanted, store, how)
        from octavo.kernels import backend

        note(f"{backend()}; ready after {time.perf_counter() - started:.1f} s")
    found = {"shape": shape, "model": model, "layers": bench.model.args.n_layers}
    found |= {"bits": bits or (None if model else "4"), "routing": routing}
    found |= bench.run()
    click.echo(json.dumps(found, indent=2) if as_json else "\n".join((_card if on_card else _readable)(found)))


def _prepare(
    shape: str | None,
    layers: int | None,
    model: str | None,
    bits: int | None,
    store: str | None,
    how: _How,
) -> Bench:
    """Check everything that can be checked before weights are written or loaded."""
    from octavo.bench.measure import Bench, context_for
    from octavo.bench.routing import parse_routing
    from octavo.bench.synthetic import synthetic_model
    from octavo.checkpoint import open_checkpoint
    from octavo.llm import LLM, find_model
    from octavo.plan import MemoryPlan, make_plan, parse_size
    from octavo.shapes import shape as shape_of

    args = open_checkpoint(find_model(model)).args if model is not None else shape_of(str(shape), layers)
    choice = None if how.routing is None else parse_routing(how.routing, args)
    context = context_for(args, how.prompt, how.decode, how.batch)
    options: dict[str, Any] = {}
    if how.memory is not None:
        options = {"memory": how.memory, "context": context, "max_batch_size": how.batch}
        if how.routing is not None and how.routing.startswith("trace:"):
            options["trace"] = Path(how.routing.removeprefix("trace:")).expanduser()
    plan = None
    if model is None and how.memory is not None:
        plan = make_plan(args, parse_size(how.memory), bits or 4, context, how.batch)
        if plan.placement is not None and store is None:
            raise OptionError(
                f"not all experts fit into {how.memory} of memory, and a shape has none on the disk to be read",
                hint="give --store DIR, where they are written once",
            )
    if model is None and store is None:
        return Bench(synthetic_model(args, bits or 4), how.prompt, how.decode, how.batch, plan, choice)
    if model is None:
        model, bits = str(_write_store(args, bits or 4, Path(str(store)).expanduser())), None
    llm = LLM.load(model, dtype="bfloat16", bits=None if bits == 16 else bits, **options)
    memory_plan = llm.plan if isinstance(llm.plan, MemoryPlan) else None
    return Bench(llm.model, how.prompt, how.decode, how.batch, memory_plan, choice)


def _prepare_card(
    shape: str | None, layers: int | None, model: str | None, bits: int | None, device: str, how: _How
) -> CardBench:
    """The same on a card."""
    from octavo.bench.card import WATCHED, CardBench, card_plan
    from octavo.bench.measure import context_for
    from octavo.bench.synthetic import card_model
    from octavo.checkpoint import open_checkpoint
    from octavo.llm import LLM, find_model
    from octavo.load import parse_device
    from octavo.plan import parse_size
    from octavo.plan_card import CardPlan
    from octavo.shapes import shape as shape_of

    place = parse_device(device)
    args = open_checkpoint(find_model(model)).args if model is not None else shape_of(str(shape), layers)
    context = context_for(args, how.prompt, how.decode + WATCHED, how.batch)
    if model is not None:
        sizes = {"gpu_memory": how.gpu_memory, "memory": how.memory}
        given: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
        if given:
            given |= {"context": context, "max_batch_size": how.batch}
        llm = LLM.load(model, dtype="bfloat16", device=device, bits=None if bits == 16 else bits, **given)
        plan = llm.plan if isinstance(llm.plan, CardPlan) else None
        return CardBench(llm.model, how.prompt, how.decode, how.batch, plan)
    budget, host = (None if size is None else parse_size(size) for size in (how.gpu_memory, how.memory))
    planned = card_plan(args, place, bits or 4, context, how.batch, budget, host)
    made = card_model(args, bits or 4, place, placement=planned.placement)
    return CardBench(made, how.prompt, how.decode, how.batch, planned)


def _write_store(args: ModelArgs, bits: int, folder: Path) -> Path:
    from octavo.bench.synthetic import plan_synthetic
    from octavo.cli.convert import run_conversion

    conversion = plan_synthetic(args, bits, folder)
    if conversion is not None:
        note(f"{folder}: {conversion.nbytes / 1e9:.1f} GB of random weights are written, once")
        run_conversion(conversion)
    return folder


def _readable(found: dict[str, Any]) -> Iterator[str]:
    yield (
        f"prefill {found['prefill_tok_s']:8.1f} tokens/s   {found['prefill_fraction_of_limit']:6.1%} of "
        f"{found['dot_limit_gops']:.0f} G integer operations/s"
    )
    yield (
        f"decode  {found['decode_tok_s']:8.1f} tokens/s   {found['decode_fraction_of_limit']:6.1%} of "
        f"{found['read_limit_gbs']:.1f} GB/s, {found['bytes_per_token'] / 1e6:.1f} MB a token"
    )
    if "hit_rate" in found:
        yield from _disk(found)
    memory = f"peak memory {found['peak_rss_bytes'] / 1e9:.2f} GB"
    if "plan" in found:
        memory += f" (predicted {found['plan']['total'] / 1e9:.2f}, allowed {found['plan']['budget'] / 1e9:.2f})"
    yield (
        f"outside the kernels {found['outside_kernels_fraction']:.1%} of decode time; {memory}; "
        f"{found['backend']}, {found['threads']} threads"
    )


def _disk(found: dict[str, Any]) -> Iterator[str]:
    """What was streamed."""
    read, wait = found["bytes_read_per_token"] / 1e6, found["wait_seconds_per_token"] * 1e3
    line = f"disk    {read:.1f} MB a token, {wait:.1f} ms waited for it; {found['disk_limit_gbs']:.2f} GB/s at most"
    if found["allowed_by_disk_tok_s"] is not None:
        line += (
            f", which allows {found['allowed_by_disk_tok_s']:.1f} tokens/s: "
            f"{found['decode_fraction_of_allowed']:.1%} of that"
        )
    yield line
    plan = found["plan"]
    yield (
        f"experts {plan['share']:.1%} in memory, {plan['pinned']} of them pinned, and {plan['slots']} tails; "
        f"hit rate {found['hit_rate']:.1%}, by the cache's rules {found['replay_hit_rate']:.1%}; "
        f"first prompt {found['prefill_cold_seconds']:.1f} s"
    )


def _card(found: dict[str, Any]) -> Iterator[str]:
    yield (
        f"prefill {found['prefill_tok_s']:8.1f} tokens/s   {found['prefill_fraction_of_limit']:6.1%} of "
        f"{found['matrix_limit_tflops']:.0f} T operations/s"
    )
    yield (
        f"decode  {found['decode_tok_s']:8.1f} tokens/s   {found['decode_fraction_of_limit']:6.1%} of "
        f"{found['copy_limit_gbs']:.0f} GB/s, {found['bytes_per_token'] / 1e6:.1f} MB a token"
    )
    if "hit_rate" in found:
        yield (
            f"link    {found['bytes_copied_per_token'] / 1e6:.1f} MB a token at {found['link_limit_gbs']:.1f} GB/s at "
            f"most; hit rate {found['hit_rate']:.1%}, which allows {found['allowed_tok_s']:.1f} tokens/s: "
            f"{found['decode_fraction_of_allowed']:.1%} of that"
        )
    memory = f"peak memory of the process {found['peak_rss_bytes'] / 1e9:.2f} GB"
    if "card_used_bytes" in found:
        memory = (
            f"card {found['card_used_bytes'] / 1e9:.2f} GB, {found['card_peak_bytes'] / 1e9:.2f} of tensors; {memory}"
        )
    if "plan" in found:
        memory += f" (predicted {found['plan']['card_total'] / 1e9:.2f} and {found['plan']['host_total'] / 1e9:.2f})"
    yield f"{memory}; {found['device']}"
