"""`octavo routing stats`: what a trace says of a model's routing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from octavo.cli.routing.shared import parse_layers
from octavo.cli.terminal import note, show
from octavo.errors import OptionError

if TYPE_CHECKING:
    import numpy as np

    from octavo.experts import RoutingTrace
    from octavo.routing.stats import Measured, Vocabulary

METRICS = (
    "load", "load-variation", "repetition", "coactivation", "transition", "domain-specialisation", "domain-contrast",
    "domain-distance", "vocabulary", "entropy", "saturation",
)  # fmt: skip
PLAIN = {"load variation": "", "router entropy": " bits"}  # units of what is no share
TOP = 3  # token ids of an expert


@click.command("stats")
@click.argument("trace", metavar="TRACE", type=click.Path(path_type=Path))
@click.option("--by-domain", is_flag=True, help="Repetition of each domain on its own.")
@click.option("--layers", metavar="L,L", help="Only show these, such as 0,15,31; all are computed.")
@click.option(
    "--metric", "metrics", multiple=True, metavar="NAME", help=f"Only this: {', '.join(METRICS)}. Repeatable."
)
@click.option("--later", metavar="TRACE", type=click.Path(path_type=Path), help="Of a later checkpoint: saturation.")
@click.option("--level", type=float, default=0.99, show_default=True, help="Of all intervals of a metric together.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of resamples and shuffled labels.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with everything.")
def command(
    trace: Path,
    by_domain: bool,
    layers: str | None,
    metrics: tuple[str, ...],
    later: Path | None,
    level: float,
    seed: int,
    as_json: bool,
) -> None:
    """Say how the tokens of TRACE were routed: every metric with its interval, denominator and baseline.

    Without --metric there is everything that the trace has data for. Tables show of each layer the least and the most,
    and how many entries lie off the baseline; --json has them all. Intervals hold together for a whole metric.

    \b
    octavo routing stats trace.safetensors
    octavo routing stats trace.safetensors --metric repetition --by-domain --layers 0,15,31
    octavo routing stats early.safetensors --later late.safetensors --metric saturation
    """
    from octavo.experts import read_trace

    for name in metrics:
        if name not in METRICS:
            raise OptionError(f"--metric {name}: there is no such metric", hint=f"one of {', '.join(METRICS)}")
    if "saturation" in metrics and later is None:
        raise OptionError("--metric saturation: takes a trace of a later checkpoint", hint="--later TRACE")
    found = read_trace(trace)
    shown = _layers(layers, found.n_layers)
    wanted = metrics or tuple(name for name in METRICS if name != "saturation" or later is not None)
    results: list[Measured | Vocabulary] = []
    for name in dict.fromkeys(wanted):
        try:
            results += _measure(name, found, later, by_domain=by_domain, level=level, seed=seed)
        except OptionError as error:
            if name in metrics or error.message.startswith("level"):
                raise
            note(f"{name} is left out: {error.message}")
    if as_json:
        click.echo(json.dumps(_as_dict(found, results, shown), allow_nan=False))
    else:
        show("\n".join(_lines(found, results, shown)) + "\n")


def _measure(
    name: str, trace: RoutingTrace, later: Path | None, *, by_domain: bool, level: float, seed: int
) -> list[Measured | Vocabulary]:
    from octavo.experts import read_trace
    from octavo.routing import stats

    if name == "saturation" and later is not None:
        return [stats.saturation(trace, read_trace(later), level=level, seed=seed)]
    if name == "repetition":
        return list(stats.repetition(trace, by_domain, level=level, seed=seed))
    found: Any = stats.METRICS[name](trace, level=level, seed=seed)
    return [found]


def _layers(text: str | None, n_layers: int) -> list[int]:
    found = parse_layers(text) or list(range(n_layers))
    for layer in found:
        if not 0 <= layer < n_layers:
            raise OptionError(
                f"--layers {text}: the trace has no layer {layer}", hint=f"it has {n_layers}: 0 to {n_layers - 1}"
            )
    return found


# ---------------------------------------- tables


def _lines(trace: RoutingTrace, results: Sequence[Measured | Vocabulary], layers: list[int]) -> Iterator[str]:
    from octavo.routing.stats import Distance, Vocabulary

    about = f" of {trace.model}" if trace.model else ""
    yield f"{trace.n_tokens:,} tokens, {int(trace.document_ids[-1]) + 1:,} documents{about}"
    yield f"{trace.n_layers} layers, {trace.top_k} of {trace.experts} experts a token"
    for one in results:
        measured = one.summary if isinstance(one, Vocabulary) else one
        yield ""
        yield f"{measured.name}: shown with the interval at {measured.level:g} of all {measured.value.size:,} together"
        yield f"  of:       {measured.denominator}"
        yield f"  baseline: {measured.baseline_name}"
        if measured.note:
            yield f"  note:     {measured.note}"
        yield from _table(trace, measured, layers)
        if isinstance(one, Distance):
            more = "more than" if one.specialised else "no more than"
            yield f"  domains are routed differently by {more} chance (p = {one.p_value:.3g})"
        if isinstance(one, Vocabulary):
            yield from _top_lines(one, layers)
        yield from _published(measured.name)


def _table(trace: RoutingTrace, measured: Measured, layers: list[int]) -> Iterator[str]:
    import numpy as np

    flat = len(measured.axes) - ("domain" in measured.axes) == 1  # one number a layer
    rows = [["domain"] * ("domain" in measured.axes) + ["layer"]]
    rows[0] += ["value", "interval", "baseline"] if flat else ["least", "", "most", "", "off the baseline"]
    for domain, layer, at in _rows(trace, measured, layers):
        row = [" ".join(domain.split())] * ("domain" in measured.axes) + [str(layer)]
        value, low, high = measured.value[at], measured.low[at], measured.high[at]
        if flat:
            of = None if measured.baseline is None else np.broadcast_to(measured.baseline, measured.value.shape)[at]
            row += [*_shown(measured, value, low, high), "" if of is None else _number(measured, of)]
        elif np.isnan(value).all():
            row += ["none"]
        else:
            for which in (np.nanargmin(value), np.nanargmax(value)):
                entry = np.unravel_index(which, value.shape)
                told = " ".join(f"{axis} {i}" for axis, i in zip(measured.axes[-value.ndim :], entry, strict=True))
                number, interval = _shown(measured, value[entry], low[entry], high[entry])
                row += [f"{told}: {number}", interval]
            off = int((measured.beside[at] != 0).sum())
            row += [f"{off} of {int((~np.isnan(value)).sum())}"]
        rows.append(row)
    wide = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    for row in rows:
        yield "  " + "  ".join(f"{text:<{width}}" for text, width in zip(row, wide, strict=False)).rstrip()


def _rows(trace: RoutingTrace, measured: Measured, layers: list[int]) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    by_domain = "domain" in measured.axes
    n_layers = measured.value.shape[measured.axes.index("layer")]
    for number, domain in enumerate(trace.domains if by_domain else ("",)):
        for layer in layers:
            if layer < n_layers:
                yield domain, layer, (number, layer) if by_domain else (layer,)


def _shown(measured: Measured, value: float, low: float, high: float) -> tuple[str, str]:
    return _number(measured, value), f"[{_number(measured, low)}, {_number(measured, high)}]"


def _number(measured: Measured, value: float) -> str:
    if value != value:
        return "none"
    if measured.name in PLAIN:
        return f"{value:.3f}{PLAIN[measured.name]}"
    return f"{100 * value:.1f} %"


def _published(name: str) -> Iterator[str]:
    from octavo.routing.published import REPETITION

    metric = {"repetition of the first choice": "first", "repetition of any choice": "any"}.get(name)
    ranges = [one for one in REPETITION if one.metric == metric]
    if ranges:
        one = ranges[0]
        told = ", ".join(f"layer {one.layer} {100 * one.low:.1f}-{100 * one.high:.1f} %" for one in ranges)
        yield f"  published of {one.model}, whose even routing gives {100 * one.baseline:.1f} %: {told}"
        yield f"  over {one.n_domains} domains [{one.source}, {one.table}]"


def _top_lines(vocabulary: Vocabulary, layers: list[int]) -> Iterator[str]:
    yield "  ids that go to one expert most, layer by layer"
    for layer in layers:
        tops = [(top[0], expert) for expert, top in enumerate(vocabulary.top_by_expert(layer, 1)) if top]
        for top, expert in sorted(tops, key=lambda one: (-one[0].share, -one[0].count, one[1]))[:TOP]:
            text = "" if top.piece is None else f" {json.dumps(top.piece, ensure_ascii=False)}"
            share = f"{100 * top.share:.0f} % of its {top.count} tokens"
            yield f"  layer {layer}: id {top.token_id}{text}, {share} to expert {expert}"


# ---------------------------------------- JSON


def _as_dict(trace: RoutingTrace, results: Sequence[Measured | Vocabulary], layers: list[int]) -> dict[str, object]:
    import dataclasses

    from octavo.routing.published import REPETITION

    told = [_measured_dict(one, layers) for one in results]
    return {
        "model": trace.model,
        "revision": trace.revision,
        "tokens": trace.n_tokens,
        "documents": int(trace.document_ids[-1]) + 1,
        "layers": trace.n_layers,
        "experts": trace.experts,
        "top_k": trace.top_k,
        "domains": None if trace.labels is None else list(trace.domains),
        "metrics": told,
        "published": [dataclasses.asdict(one) for one in REPETITION],
    }


def _measured_dict(one: Measured | Vocabulary, layers: list[int]) -> dict[str, object]:
    import dataclasses

    import numpy as np

    from octavo.routing.stats import Distance, Vocabulary

    measured = one.summary if isinstance(one, Vocabulary) else one
    axis = measured.axes.index("layer")
    kept = [layer for layer in layers if layer < measured.value.shape[axis]]

    def numbers(array: np.ndarray[Any, Any] | None) -> object:
        if array is None:
            return None
        return _finite(np.take(np.broadcast_to(array, measured.value.shape), kept, axis=axis).tolist())

    found: dict[str, object] = {
        "name": measured.name,
        "axes": list(measured.axes),
        "layers": kept,
        "value": numbers(measured.value),
        "low": numbers(measured.low),
        "high": numbers(measured.high),
        "baseline": numbers(measured.baseline),
        "denominator": measured.denominator,
        "baseline_name": measured.baseline_name,
        "level": measured.level,
        "note": measured.note,
    }
    if isinstance(one, Distance):
        found |= {"null_high": numbers(one.null_high), "p_value": one.p_value, "specialised": one.specialised}
    if isinstance(one, Vocabulary):
        found["ids"] = len(one.token_ids)
        found["top_tokens"] = [
            [[dataclasses.asdict(top) for top in of_expert] for of_expert in one.top_by_expert(layer, TOP)]
            for layer in kept
        ]
    return found


def _finite(value: Any) -> object:
    """Lists of numbers, with null for what is none."""
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return value if value == value and abs(value) != float("inf") else None
