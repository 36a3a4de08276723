"""What a report is made from: a trace, a model here, or a model on the Hub; measured as far as it can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from octavo.errors import OptionError
from octavo.experts import RoutingTrace, read_trace
from octavo.routing.compare import Finding, findings
from octavo.routing.experts import ExpertLayer, RouterLayer, analyse_experts, analyse_routers, steps
from octavo.routing.replay import Curve, curves
from octavo.routing.report.build import Report, build_report
from octavo.routing.report.kinds import few
from octavo.routing.texts import Document, built_in_documents, read_documents
from octavo.routing.trace import revision_of, trace_documents
from octavo.routing.weights import ExpertWeights, open_weights
from octavo.storage.files import PlainFile
from octavo.storage.safetensors import SafetensorsFile

Only = Literal["routers", "weights", "trace"]
ONLY: tuple[Only, ...] = get_args(Only)
LARGE = 256 << 20  # bytes of a layer's experts from which on comparing them takes minutes
LARGE_LAYERS = 4
Tell = Callable[[str, int, int], None]
"""Is told what is done, how much of it, and how much there is."""


@dataclass
class _Material:
    """What was measured so far, and how."""

    trace: RoutingTrace | None = None
    routers: Sequence[RouterLayer] = ()
    experts: Sequence[ExpertLayer] = ()
    curves: Sequence[Curve] = ()
    findings: list[Finding] | None = None
    model: str | None = None
    revision: str | None = None
    remarks: list[str] = field(default_factory=list)


def report_on(
    source: str,
    *,
    texts: Sequence[str] = (),
    labels: Sequence[str] = (),
    only: Only | None = None,
    layers: Sequence[int] | None = None,
    memory: str | None = None,
    model: str | None = None,
    date: str = "",
    tell: Tell | None = None,
    remark: Callable[[str], None] | None = None,
) -> Report:
    """Measure a trace or a model, and report on it.

    A trace is shown as it is, with the weights of `model` beside it. Of a model in a local folder, weights are compared
    and the routing of texts is traced; of one on the Hub only the routers are fetched, unless `only` asks for more.

    Args:
        source: a trace's file, a model's folder or file, a Hub id, or "menny".
        texts: files that are traced instead of the built-in texts.
        labels: what they are, see `read_documents`.
        only: of a model, only this part.
        layers: whose experts are compared; by default all, and 4 of a large model's.
        memory: all that the model may take while it is traced, such as "12GiB".
        model: whose weights stand beside a trace.
        date: of the report.
        tell: is told how far it is.
        remark: is given what a user should know at once.

    Raises:
        UserError: options that do not go together, a trace or a model that cannot be read, a dense model.
    """
    tell = tell or (lambda what, done, total: None)
    remark = remark or (lambda text: None)
    is_trace = _is_trace(source)
    if is_trace and (texts or labels or memory):
        raise OptionError("--text, --label and --memory are for a model, and this is a trace", "leave them out")
    if is_trace and only is not None and model is None:
        raise OptionError(f"--only {only} is of a model, and this is a trace", hint="give --model, or leave it out")
    if labels and not texts:
        raise OptionError("--label belongs to a --text", hint="give the file too")
    if not is_trace and model is not None:
        raise OptionError(f"--model goes with a trace; {source} is taken for a model", hint="leave --model out")
    documents = [] if is_trace else read_documents(texts, labels) if texts else built_in_documents()
    material = _Material(model=model if is_trace else source)
    if is_trace:
        material.trace = read_trace(source)
        material.model = model or material.trace.model
    name = model if is_trace else source
    if name is not None and only != "trace":
        weights = open_weights(name)
        if material.trace is not None:
            _check(material.trace, weights)
        material.revision = weights.revision
        part: Only | None = only or ("routers" if weights.remote else None)
        _weigh(material, weights, part, layers, tell)
        if weights.remote:
            said = f"{name} is on the Hub: {weights.fetched:,} bytes were fetched"
            said += ", of the routers alone" if part == "routers" else ""
            material.remarks.append(said + ".")
            remark(said)
        only = part
    if not is_trace and only in (None, "trace"):
        _trace(material, source, documents, memory, tell)
        read = (
            ", ".join(Path(text).name for text in texts) or "the texts that Octavo has built in (--text takes others)"
        )
        material.remarks.append(f"The model read {len(documents)} documents: {read}.")
    if material.trace is not None:
        material.curves = _replay(material, tell)
    shown = material.model
    if shown is not None and Path(shown).expanduser().exists():  # a page may be passed on: no path of this machine
        shown = Path(shown).expanduser().resolve().name
    return build_report(
        material.trace,
        material.routers,
        material.experts,
        material.curves,
        material.findings,
        model=shown,
        revision=material.revision,
        date=date,
        remarks=material.remarks,
        progress=lambda name: tell(f"statistics: {name.lower()}", 0, 0),
    )


def _is_trace(source: str) -> bool:
    """Whether it is a file that holds a trace, or one that is not there and is called like one."""
    path = Path(source)
    if path.suffix != ".safetensors" or path.is_dir():
        return False
    return not path.exists() or "topk_ids" in SafetensorsFile(PlainFile(path))


def _check(trace: RoutingTrace, weights: ExpertWeights) -> None:
    of_trace = (trace.n_layers, trace.top_k)
    of_model = (len(weights.sparse_layers), weights.top_k)
    fits = trace.experts <= weights.n_experts if trace.n_experts is None else trace.experts == weights.n_experts
    if of_trace != of_model or not fits:
        raise OptionError(
            f"the trace is of {trace.n_layers} layers that choose {trace.top_k} of {trace.experts} experts; "
            f"{weights.name} has {of_model[0]} that choose {weights.top_k} of {weights.n_experts}",
            hint="give the model that the trace was recorded with",
        )


def _weigh(
    material: _Material, weights: ExpertWeights, only: Only | None, layers: Sequence[int] | None, tell: Tell
) -> None:
    """Routers of all layers; experts of those that are asked for."""
    total, done = len(weights.sparse_layers), 0

    def routed(steps_done: int) -> None:
        nonlocal done
        done += steps_done
        tell("routers", done, total)

    if layers is not None:
        layers = weights.choose_layers(layers)  # what is wrong is said before anything is computed
    material.routers = analyse_routers(weights, progress=routed)
    if only != "routers":
        chosen = weights.sparse_layers if layers is None else tuple(layers)
        if layers is None and len(chosen) > LARGE_LAYERS and weights.experts_nbytes(chosen[:1]) > LARGE:
            chosen = tuple(chosen[at] for at in few(len(chosen), LARGE_LAYERS))
            material.remarks.append(
                f"Experts of layers {', '.join(map(str, chosen))} were compared, of {len(weights.sparse_layers)}; "
                "--layers chooses others."
            )
        total, done = steps(weights, chosen), 0

        def compared(steps_done: int) -> None:
            nonlocal done
            done += steps_done
            tell("experts", done, total)

        material.experts = list(analyse_experts(weights, chosen, progress=compared))
        material.remarks.append(
            f"Where neurons were paired, {material.experts[0].n_matched:,} of one expert, drawn at random, were paired "
            "with all of the other."
        )
    material.findings = findings(material.routers, material.experts)


def _trace(material: _Material, source: str, documents: Sequence[Document], memory: str | None, tell: Tell) -> None:
    from octavo.llm import LLM, find_model

    material.trace = trace_documents(
        LLM.load(source, memory=memory, prefix_bytes=0),
        documents,
        logits=True,
        model=source,
        revision=revision_of(find_model(source)),
        progress=lambda done, total: tell("tokens", done, total),
    )


def _replay(material: _Material, tell: Tell) -> list[Curve]:
    """Cache curves; none where the trace is too short for them."""
    assert material.trace is not None
    try:
        return curves(material.trace, progress=lambda done, total: tell("cache curves", done, total))
    except OptionError as error:
        material.remarks.append(f"No cache was replayed: {error.message}.")
        return []
