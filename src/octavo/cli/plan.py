"""`octavo plan`: whether a machine can run a model, how, and how fast at most."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from octavo.cli.headers import Model, read_model
from octavo.cli.memory import entry, experts_in_words, plan_to_json, precision_row, precision_table, rate
from octavo.cli.options import SHAPE_BITS
from octavo.cli.plan_card import CardReport
from octavo.cli.terminal import note
from octavo.devices import DEVICES, Device, known_device
from octavo.errors import OptionError
from octavo.machine import disk_bandwidth, free_memory, nvidia_gpu, physical_memory
from octavo.plan import (
    CHUNK,
    DEFAULT_CONTEXT,
    PRECISIONS,
    MemoryPlan,
    Weights,
    footprint_of,
    make_plan,
    parse_size,
    show_size,
    verdict,
    weights_at,
)

if TYPE_CHECKING:
    from octavo.experts.replay import TracedPlan

HERE = DEVICES["this machine"]
SAMPLE = 1 << 30  # bytes that memory's bandwidth is measured with: more than caches hold
READS = 9
NOT_STREAMED = "not so: experts are read from disk in 16 bits or fewer"


@click.command("plan")
@click.argument("model", metavar="MODEL|SHAPE")
@click.option("--memory", metavar="SIZE", help="All that may be taken, such as 24GiB; by default what is free.")
@click.option(
    "--gpu-memory",
    metavar="SIZE",
    help="All that may be taken of a GPU; by default its memory. --memory is the host's.",
)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="NAME",
    help=f"cpu, cuda or metal-unified for this machine's, or one of {', '.join(list(DEVICES)[1:])}.",
)
@click.option(
    "--bits", type=click.Choice(("32", *SHAPE_BITS)), metavar="N", help="32, 16, 8, 4, 3 or 2: keep to this precision."
)
@click.option(
    "--context", type=click.IntRange(1), metavar="N", help=f"Tokens of prompt and reply; by default {DEFAULT_CONTEXT}."
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Sequences at once.")
@click.option("--trace", metavar="FILE", help="Place the experts by a recorded routing trace, and replay it.")
@click.option("--measure", is_flag=True, help="First measure this machine's memory and disk, for some seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: str,
    memory: str | None,
    gpu_memory: str | None,
    device: str,
    bits: str | None,
    context: int | None,
    batch: int,
    trace: str | None,
    measure: bool,
    as_json: bool,
) -> None:
    """Say whether MODEL runs in some memory, how, and how fast at most. Nothing is loaded.

    MODEL is a folder, a store, a weights file, a Hub id (of which only headers are fetched), menny, or a shape:
    mixtral-8x7b, mixtral-8x22b, mistral-7b. In SIZE a GB is 1000^3 bytes and a GiB 1024^3; G alone means GiB.

    \b
    octavo plan mixtral-8x7b
    octavo plan ./mixtral --memory 12GiB --measure
    octavo plan mixtral-8x7b --memory 12GiB --trace trace.safetensors
    octavo plan mistralai/Mixtral-8x22B-Instruct-v0.1 --device h200 --context 32768
    octavo plan mixtral-8x7b --device rtx-4090 --memory 48GiB
    """
    budget = None if memory is None else parse_size(memory)
    gpu_budget = None if gpu_memory is None else parse_size(gpu_memory)
    found = read_model(model)
    where = _device(device, budget, gpu_budget)
    if measure:
        if where.name != HERE.name:
            raise OptionError(f"--measure measures this machine, not {where.name}", hint="leave one of them out")
        where = _measured(where, found.folder)
    context = min(DEFAULT_CONTEXT, found.args.max_seq_len) if context is None else context
    precision = None if bits is None else int(bits)
    report: Report | CardReport
    if where.kind == "cuda":
        if trace is not None:
            raise OptionError(
                "--trace places experts for a CPU; a GPU's cache goes by what was used last", "leave it out"
            )
        budget = _host_memory(device) if budget is None else budget
        report = CardReport.of(found, where, gpu_budget, budget, precision, context, batch, (gpu_memory, memory))
    else:
        if gpu_memory is not None:
            raise OptionError(f"--gpu-memory bounds a GPU, and --device is {device}", "--device cuda")
        plan = make_plan(
            found.args, where.usable if budget is None else budget, precision, context, batch, store=found.store
        )
        traced = None if trace is None else _replayed(trace, plan)
        report = Report(found, where, traced or plan, memory, traced, trace, plan.share)
    click.echo(json.dumps(report.as_dict(), indent=2) if as_json else "\n".join(report.lines()))


def _replayed(path: str, plan: MemoryPlan) -> TracedPlan | None:
    """The plan by a trace; None where every expert is in memory."""
    from octavo.experts.replay import plan_from_trace
    from octavo.experts.trace import read_trace

    trace = read_trace(Path(path))
    trace.check(plan.args)
    if plan.placement is None:
        note("every expert is in memory: there is nothing for trace to do")
        return None
    return plan_from_trace(trace, plan)


# ---------------------------------------- devices


def _device(name: str, budget: int | None, gpu_budget: int | None) -> Device:
    """The device that is meant; its memory is what is free, where it is this machine's and no budget is given."""
    if name == "cpu":
        return dataclasses.replace(HERE, memory=free_memory() if budget is None else budget)
    if name == "cuda":
        unknown = dataclasses.replace(HERE, name="a GPU", kind="cuda", memory=gpu_budget or 0, read=None, source="")
        try:
            called, free = nvidia_gpu()
        except OptionError:
            if gpu_budget is None:
                raise
            return unknown  # of which all that counts is said
        return dataclasses.replace(known_device(called) or unknown, name=called, memory=free)
    if name in ("metal", "metal-unified"):
        memory = physical_memory() if budget is None else budget
        return dataclasses.replace(HERE, kind="unified", memory=memory, read=None, source="")
    known = known_device(name)
    if known is None:
        raise OptionError(
            f"--device {name!r} is not known; expected cpu, cuda, metal-unified, or {', '.join(list(DEVICES)[1:])}",
            hint="for another, give its memory: --memory 16GB, or of a GPU --device cuda --gpu-memory 16GB",
        )
    return known


def _host_memory(device: str) -> int | None:
    """What is free beside this machine's GPU, if it tells; of another machine nothing is known."""
    if device != "cuda":
        return None
    with suppress(OptionError):
        return free_memory()
    return None


def _measured(device: Device, folder: Path | None) -> Device:
    """The same with bandwidths of now: of memory by the kernels' threads, of the disk that the model lies on."""
    import torch

    from octavo.kernels import read_bandwidth, threads
    from octavo.kernels.ops import Matrix

    disk, disk_source = _measured_disk(folder)
    rows = max(1, min(SAMPLE, free_memory() // 4) >> 13)
    matrix = Matrix(torch.empty(rows, 1024, dtype=torch.int64).random_().view(torch.bfloat16))
    reads = sorted(read_bandwidth([matrix]) for _ in range(READS))
    source = f"measured: {threads()} thread{'s' * (threads() > 1)}, the median of {READS} reads"
    return dataclasses.replace(
        device,
        read=reads[READS // 2],
        disk=disk,
        source=source,
        disk_source=disk_source,
    )


def _measured_disk(folder: Path | None) -> tuple[float, str]:
    """By the model's own files, if they are many enough, as decoding would read them; else by a file made for it."""
    from octavo.experts.reader import SAMPLE
    from octavo.experts.reader import disk_bandwidth as by_files
    from octavo.kernels import backend

    files = [] if folder is None else [path for path in folder.glob("*.safetensors") if path.is_file()]
    if backend().compiled and sum(path.stat().st_size for path in files) >= SAMPLE:
        first, again = by_files(files)
        return again, f"measured: past the page cache, again and again ({show_size(first)}/s the first time)"
    found = disk_bandwidth(folder if folder is not None and os.access(folder, os.W_OK) else Path.cwd())
    return found, "measured: past the page cache"


# ---------------------------------------- what is printed


@dataclasses.dataclass(frozen=True)
class Report:
    """A plan as people and programs read it.

    Attributes:
        model: of which it is.
        device: where.
        plan: how.
        memory: the budget as it was given.
        traced: the plan again, if a trace placed its experts.
        trace: that trace's file.
        even: how much of the experts would be in memory without it, and so the hit rate of even routing.
    """

    model: Model
    device: Device
    plan: MemoryPlan
    memory: str | None
    traced: TracedPlan | None
    trace: str | None
    even: float

    def lines(self) -> Iterator[str]:
        """One screen."""
        plan, args = self.plan, self.plan.args
        experts = f"{args.moe.num_experts_per_tok} of {args.moe.num_experts} experts" if args.moe else "dense"
        counts = f"{args.n_params:,} parameters, {args.n_active_params:,} active ({experts}, {args.n_layers} layers)"
        where = f"{self.device.name} ({f'--memory {self.memory}' if self.memory else self._given})"
        sequences = "1 sequence" if plan.batch == 1 else f"{plan.batch} sequences"
        yield from entry("model", f"{self.model.title}: {counts}")
        yield from entry("memory", f"{show_size(plan.budget)} of {where}, for {sequences} of {plan.context:,} tokens")
        yield ""
        yield from precision_table(map(self._row, self._precisions()), "process")
        yield ""
        yield from entry("plan", self._chosen(), plan.reason)
        if self.traced is not None:
            yield from entry("routing", self._routing(self.traced))
        yield from entry("ceiling", *self._ceilings())
        yield from entry("run", *self._commands())

    def as_dict(self) -> dict[str, Any]:
        """For --json; sizes in bytes."""
        plan, device = self.plan, self.device
        return {
            "model": self.model.title,
            "parameters": plan.args.n_params,
            "active_parameters": plan.args.n_active_params,
            "device": dataclasses.asdict(device),
            "budget": plan.budget,
            "context": plan.context,
            "batch": plan.batch,
            "precisions": [self._row(weights) for weights in self._precisions()],
            "plan": plan_to_json(plan),
            "trace": None if self.traced is None else self._replay(self.traced),
            "ceilings": {
                "read_bytes_per_step": round(plan.read_bytes),
                "disk_bytes_per_step": round(plan.disk_bytes),
                "decode_tok_s_memory": self._by_memory,
                "decode_tok_s_disk": self._by_disk,
                "decode_tok_s": self._decode,
                "decode_tok_s_expected": self._expected,
                "prefill_tok_s_disk": plan.prefill_tok_s(device.disk),
            },
            "prepare": None if self._obstacle else self._prepare,
            "command": None if self._obstacle else self._chat(plan.weights),
            "obstacle": self._obstacle,
            "instead": None if self._instead is None else self._chat(self._instead),
        }

    def _precisions(self) -> list[Weights]:
        own = [self.plan.weights] if self.plan.bits is None else []
        return own + [weights_at(self.plan.args, bits) for bits in PRECISIONS]

    def _row(self, weights: Weights) -> dict[str, Any]:
        plan = self.plan
        size = footprint_of(plan.args, weights, plan.context, plan.batch)
        says = verdict(plan.args, weights, plan.budget, plan.context, plan.batch)
        return precision_row(weights, size, says)

    def _chosen(self) -> str:
        plan, size = self.plan, self.plan.footprint
        experts, cache = experts_in_words(plan), show_size(size.kv_cache)
        return f"{plan.weights.label} in {show_size(size.total)}: {experts}; KV cache {cache}"

    def _routing(self, traced: TracedPlan) -> str:
        pinned, slots = len(traced.placement.pinned), traced.placement.slots
        return (
            f"{self.trace}: {traced.found.hit_rate:.1%} of the bytes asked for would have been there "
            f"({self.even:.1%} if routing were even, without the trace), by {pinned} pinned experts and {slots} slots "
            f"for tails; counted over {traced.counted:,} "
            + ("tokens that pinned none" if traced.batch == 1 else f"steps of {traced.batch} sequences")
        )

    def _replay(self, traced: TracedPlan) -> dict[str, Any]:
        found = {"hits": traced.found.hits, "misses": traced.found.misses, "hit_rate": traced.found.hit_rate}
        return {"file": self.trace, "counted_steps": traced.counted, **found, "even_hit_rate": self.even}

    @property
    def _given(self) -> str:
        """What the budget is, where nobody named it."""
        if self.device.kind == "unified":
            return "three quarters of it"
        return "its memory" if self.device in DEVICES.values() else "what is free"

    @property
    def _by_memory(self) -> float | None:
        read = self.device.read
        return None if read is None else self.plan.decode_tok_s(read, self.device.disk)[0]

    @property
    def _expected(self) -> float | None:
        read = self.device.read
        return None if read is None else self.plan.expected_tok_s(read, self.device.disk)

    @property
    def _by_disk(self) -> float | None:
        return self.plan.decode_tok_s(1.0, self.device.disk)[1]

    @property
    def _decode(self) -> float | None:
        known = [rate for rate in (self._by_memory, self._by_disk) if rate is not None]
        return min(known) if known else None

    def _ceilings(self) -> Iterator[str]:
        """Decode, prefill, and where the bandwidths come from."""
        plan, device, steps = self.plan, self.device, "token" if self.plan.batch == 1 else "step"
        parts, sources = [], []
        if device.read is not None:
            each = f"{show_size(plan.read_bytes)} a {steps} at {show_size(device.read)}/s"
            parts.append(f"{rate(self._by_memory)} by memory ({each})")
            sources.append(f"memory: {device.source}")
        if plan.placement:
            each = f"{show_size(plan.disk_bytes)} a {steps} at {show_size(device.disk)}/s"
            parts.append(f"{rate(self._by_disk)} by disk ({each})")
            sources.append(f"disk: {device.disk_source}")
        if self._decode is None:
            yield "unknown: so is this device's bandwidth; name the device, such as --device 'RTX 4090'"
            return
        together = "" if plan.batch == 1 else f" for {plan.batch} sequences together"
        if plan.disk_bytes and self._expected is not None:
            parts.append(f"{rate(self._expected)} to be expected")
        yield f"decode at most {rate(self._decode)} tok/s{together}: {', '.join(parts)}"
        if (prefill := plan.prefill_tok_s(device.disk)) is not None:
            yield f"prompts at most {rate(prefill)} tok/s by disk: {CHUNK} tokens read what is streamed once"
        guess = " (a guess: --measure measures)" if device.source == HERE.source else ""
        yield f"{'; '.join(sources)}{guess}"

    @property
    def _obstacle(self) -> str | None:
        """What keeps this plan from running today."""
        return NOT_STREAMED if self.plan.placement and self.plan.bits == 32 else None

    @property
    def _instead(self) -> Weights | None:
        """The best precision that fits whole."""
        plan = self.plan
        if plan.bits is None or self._obstacle is None:
            return None
        possible = (weights_at(plan.args, bits) for bits in PRECISIONS)
        return next(
            (w for w in possible if verdict(plan.args, w, plan.budget, plan.context, plan.batch) == "fits"), None
        )

    def _commands(self) -> Iterator[str]:
        plan = self.plan
        if self._obstacle is None:
            if self._prepare is not None:
                yield self._prepare
            yield self._chat(plan.weights)
            return
        yield self._obstacle
        if self._instead is not None:
            size = footprint_of(plan.args, self._instead, plan.context, plan.batch)
            yield f"today ({show_size(size.total)}): {self._chat(self._instead)}"
        else:
            yield "today, nothing runs within it"

    @property
    def _store(self) -> str | None:
        """The folder to make first, where experts are to be read in another form than the checkpoint has them in."""
        plan, source = self.plan, self.model.source
        if plan.placement is None or plan.bits is None or (plan.bits == 16 and self.model.dtype == "bfloat16"):
            return None
        name = os.path.basename(os.path.normpath(source)) if self.model.folder is None else os.path.normpath(source)
        return f"{name}-{plan.bits}bit"

    @property
    def _prepare(self) -> str | None:
        """The command that makes it."""
        if self._store is None:
            return None
        words = ["octavo", "quantize", self.model.source, self._store, "--bits", str(self.plan.bits)]
        if self.plan.bits == 16:
            words = ["octavo", "convert", self.model.source, self._store, "--to", "hf", "--dtype", "bfloat16"]
        return shlex.join(words)

    def _chat(self, weights: Weights) -> str:
        """The command line for a precision."""
        plan = self.plan
        store = self._store if weights is plan.weights else None
        words = ["octavo", "chat", "--model", store or self.model.source]
        if weights.bits in (8, 4, 3, 2) and store is None:
            words += ["--bits", str(weights.bits)]
        dtype = "float32" if weights.bits == 32 else "bfloat16"
        converted = store is not None and weights.bits == 16
        if weights.bits is not None and dtype != self.model.dtype and not converted:
            words += ["--dtype", dtype]
        if weights.bits in (16, 32):
            words += ["--device", "cpu"]
        if plan.placement or self.memory:
            words += ["--memory", self.memory or f"{plan.budget // 10**8 / 10}GB"]
            if plan.context != min(DEFAULT_CONTEXT, plan.args.max_seq_len):
                words += ["-o", f"context={plan.context}"]
            if self.traced is not None and weights is plan.weights:
                words += ["-o", f"trace={self.trace}"]
        return shlex.join(words)
