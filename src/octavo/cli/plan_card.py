"""What `octavo plan` says of a card, which is our word for a GPU, and of the host beside it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from typing import Any

from octavo.cli.headers import Model
from octavo.cli.memory import entry, experts_in_words, plan_to_json, precision_row, precision_table, rate
from octavo.devices import DEVICES, Device
from octavo.plan import CHUNK, DEFAULT_CONTEXT, Weights, show_size, weights_at
from octavo.plan_card import CARD_PRECISIONS, CardPlan, card_footprint, card_verdict, make_card_plan, not_on_a_card
from octavo.quant.formats import FORMATS


@dataclasses.dataclass(frozen=True)
class CardReport:
    """A plan for a card as people and programs read it.

    Attributes:
        model: of which it is.
        device: where.
        plan: how.
        gpu_memory: the card's budget as it was given.
        memory: the host's as it was given.
    """

    model: Model
    device: Device
    plan: CardPlan
    gpu_memory: str | None
    memory: str | None

    @classmethod
    def of(
        cls,
        model: Model,
        device: Device,
        gpu_budget: int | None,
        host_budget: int | None,
        bits: int | None,
        context: int,
        batch: int,
        given: tuple[str | None, str | None],
    ) -> CardReport:
        """Plan, and report.

        Args:
            model: what is known of it.
            device: the card.
            gpu_budget: of it; by default its memory.
            host_budget: beside it; None for any number.
            bits: as for `make_card_plan`.
            context: see there.
            batch: see there.
            given: both budgets as they were given, the card's first.

        Raises:
            OptionError: see there; or a store has weights that no card computes with.
        """
        for name in sorted(model.formats):
            if FORMATS[name].bits not in CARD_PRECISIONS:
                raise not_on_a_card(f"{model.title} has weights of {FORMATS[name].bits} bits")
        gpu_budget = device.usable if gpu_budget is None else gpu_budget
        plan = make_card_plan(model.args, gpu_budget, host_budget, bits, context, batch, store=model.store)
        return cls(model, device, plan, *given)

    def lines(self) -> Iterator[str]:
        """One screen."""
        plan, args = self.plan, self.plan.args
        experts = f"{args.moe.num_experts_per_tok} of {args.moe.num_experts} experts" if args.moe else "dense"
        counts = f"{args.n_params:,} parameters, {args.n_active_params:,} active ({experts}, {args.n_layers} layers)"
        given = (
            f"--gpu-memory {self.gpu_memory}" if self.gpu_memory else "its memory" if self._named else "what is free"
        )
        sequences = "1 sequence" if plan.batch == 1 else f"{plan.batch} sequences"
        yield from entry("model", f"{self.model.title}: {counts}")
        yield from entry(
            "card",
            f"{show_size(plan.gpu_budget)} of {self.device.name} ({given}), for {sequences} of {plan.context:,} tokens",
        )
        of = "" if plan.host_budget is None else f" of {show_size(plan.host_budget)}"
        yield from entry(
            "host",
            f"{show_size(plan.host.total)}{of}: {show_size(plan.host.experts)} of experts, and "
            f"{show_size(plan.host.base)} for the process",
        )
        yield ""
        yield from precision_table(map(self._row, self._precisions()), "CUDA")
        yield ""
        in_all = f"{plan.weights.label} in {show_size(plan.card.total)}: {experts_in_words(plan)}"
        yield from entry("plan", f"{in_all}; KV cache {show_size(plan.card.kv_cache)}", plan.reason)
        yield from entry("ceiling", *self._ceilings())
        yield from entry("run", self._command)

    def as_dict(self) -> dict[str, Any]:
        """For --json; sizes in bytes."""
        plan = self.plan
        by_memory, by_link = self._rates
        known = [one for one in (by_memory, by_link) if one is not None]
        link = self.device.link
        return {
            "model": self.model.title,
            "parameters": plan.args.n_params,
            "active_parameters": plan.args.n_active_params,
            "device": dataclasses.asdict(self.device),
            "budget": plan.gpu_budget,
            "host_budget": plan.host_budget,
            "context": plan.context,
            "batch": plan.batch,
            "precisions": [self._row(weights) for weights in self._precisions()],
            "plan": plan_to_json(plan),
            "ceilings": {
                "read_bytes_per_step": round(plan.read_bytes),
                "link_bytes_per_step": round(plan.link_bytes),
                "decode_tok_s_memory": by_memory,
                "decode_tok_s_link": by_link,
                "decode_tok_s": min(known) if known and self._all_known else None,
                "decode_tok_s_together": self._together,
                "prefill_tok_s_link": None if link is None else plan.prefill_tok_s(link),
            },
            "command": self._command,
            **dict.fromkeys(("trace", "prepare", "obstacle", "instead")),  # what a plan for a CPU may have besides
        }

    @property
    def _named(self) -> bool:
        """Whether it is a card by its data sheet, not this machine's."""
        return self.device in DEVICES.values()

    def _precisions(self) -> list[Weights]:
        own = [self.plan.weights] if self.plan.bits is None else []
        return own + [weights_at(self.plan.args, bits) for bits in CARD_PRECISIONS]

    def _row(self, weights: Weights) -> dict[str, Any]:
        plan = self.plan
        size = card_footprint(plan.args, weights, plan.context, plan.batch)
        says = card_verdict(plan.args, weights, plan.gpu_budget, plan.host_budget, plan.context, plan.batch)
        return precision_row(weights, size, says)

    @property
    def _rates(self) -> tuple[float | None, float | None]:
        """The most tokens a second by the card's memory, and by the link where experts are copied."""
        by_memory, by_link = self.plan.decode_tok_s(self.device.read or 1.0, self.device.link or 1.0)
        return by_memory if self.device.read else None, by_link if self.device.link else None

    @property
    def _all_known(self) -> bool:
        return self.device.read is not None and (self.device.link is not None or not self.plan.link_bytes)

    @property
    def _together(self) -> float | None:
        read, link = self.device.read, self.device.link
        return None if read is None or link is None else self.plan.together_tok_s(read, link)

    def _ceilings(self) -> Iterator[str]:
        """Decode, prefill, and where the bandwidths come from."""
        plan, device, step = self.plan, self.device, "token" if self.plan.batch == 1 else "step"
        if device.read is None or not self._all_known:
            yield "unknown: so are this card's bandwidths; name the device, such as --device 'RTX 4090'"
            return
        by_memory, by_link = self._rates
        each = f"{show_size(plan.read_bytes)} a {step} at {show_size(device.read)}/s"
        parts = [f"{rate(by_memory)} by the card's memory ({each})"]
        if by_link is not None and device.link is not None:
            each = f"{show_size(plan.link_bytes)} a {step} at {show_size(device.link)}/s if routing is even"
            parts.append(f"{rate(by_link)} by the link from the host ({each})")
            parts.append(f"{rate(self._together)} if nothing is computed meanwhile")
        most = min(one for one in (by_memory, by_link) if one is not None)
        together = "" if plan.batch == 1 else f" for {plan.batch} sequences together"
        yield f"decode at most {rate(most)} tok/s{together}: {', '.join(parts)}"
        if device.link is not None and (prefill := plan.prefill_tok_s(device.link)) is not None:
            yield f"prompts at most {rate(prefill)} tok/s by the link: {CHUNK} tokens need each expert once"
        link = "; link: PCIe by its specification, one way" if plan.link_bytes else ""
        yield f"memory: {device.source}{link}"

    @property
    def _command(self) -> str:
        plan = self.plan
        words = ["octavo", "chat", "--model", self.model.source, "--device", "cuda"]
        budget = self.gpu_memory or (f"{plan.gpu_budget // 10**8 / 10:g}GB" if self._named else None)
        if budget is not None:  # of this machine's card what is free is taken anyway
            words += ["--gpu-memory", budget]
        if plan.bits not in (None, 16):
            words += ["--bits", str(plan.bits)]
        if self.model.dtype != "bfloat16":
            words += ["--dtype", "bfloat16"]
        if self.memory is not None:
            words += ["--memory", self.memory]
        if plan.context != min(DEFAULT_CONTEXT, plan.args.max_seq_len):
            words += ["-o", f"context={plan.context}"]
        return shlex.join(words)
