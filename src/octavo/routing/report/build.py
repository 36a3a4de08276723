"""A report: what was measured of a model, as a page, as PNG files and as CSV files."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from octavo.errors import OptionError
from octavo.experts import RoutingTrace
from octavo.routing.compare import Finding
from octavo.routing.experts import ExpertLayer, RouterLayer
from octavo.routing.replay import Curve
from octavo.routing.report.figures import Missing, cache_figure, trace_figures
from octavo.routing.report.kinds import Figure
from octavo.routing.report.page import render
from octavo.routing.report.png import save_png
from octavo.routing.report.tokens import TokenView, token_view
from octavo.routing.report.weight_figures import expert_figures, findings_figure, router_figures

SUMMARY = ("load", "domain-distance", "repetition", "findings", "experts-cosine", "cache")
NO_TRACE = (
    "The text and everything that is measured on it (load, domains, repetition, a cache)",
    "octavo routing report FOLDER, or octavo routing report TRACE.safetensors",
)
NO_ROUTERS = ("The routers", "octavo routing report MODEL, or --model MODEL beside a trace")
NO_EXPERTS = (
    "The experts' weights (likeness, spectra, alignment with the router)",
    "octavo routing report FOLDER, or --only weights",
)
NO_CURVES = ("What a cache would hold", "octavo routing replay TRACE.safetensors")


@dataclass(frozen=True, eq=False)
class Report:
    """Everything on the page.

    Attributes:
        title: its heading.
        facts: names and values below it.
        figures: in the order of the page.
        tokens: the text, if there is a trace.
        found: sentences for the summary.
        remarks: what was measured how.
        left_out: what is missing, and how to get it.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    figures: tuple[Figure, ...]
    tokens: TokenView | None = None
    found: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    left_out: tuple[Missing, ...] = ()

    def html(self) -> str:
        """The page, one file that loads nothing."""
        return render(
            self.title,
            self.facts,
            self.figures,
            tokens=self.tokens,
            found=self.found,
            remarks=self.remarks,
            left_out=self.left_out,
        )

    def write(self, path: str | Path) -> None:
        """Write the page beside its place, and move it there.

        Raises:
            OptionError: the place cannot be written.
        """
        path = Path(path)
        beside = path.with_name(f".{path.name}.new-{os.getpid()}")
        try:
            beside.write_text(self.html(), encoding="utf-8")
            beside.replace(path)
        except OSError as error:
            raise _unwritable(path, error) from None
        finally:
            with suppress(OSError):
                beside.unlink(missing_ok=True)

    def write_figures(self, folder: str | Path, progress: Callable[[int, int], None] | None = None) -> list[Path]:
        """Write every figure as PNG, and its data as CSV, into a folder, which is made if need be.

        Args:
            progress: is told how many figures of how many are written.

        Returns:
            The files.

        Raises:
            OptionError: the folder cannot be written, or matplotlib is not installed.
        """
        folder = Path(folder)
        written = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for number, figure in enumerate(self.figures, start=1):
                table, picture = (folder / f"{figure.key}.{kind}" for kind in ("csv", "png"))
                with table.open("w", encoding="utf-8", errors="replace", newline="") as file:
                    csv.writer(file).writerows(figure.rows())
                save_png(figure, picture)
                written += [table, picture]
                if progress is not None:
                    progress(number, len(self.figures))
        except OSError as error:
            raise _unwritable(folder, error) from None
        return written


def build_report(
    trace: RoutingTrace | None = None,
    routers: Sequence[RouterLayer] = (),
    experts: Sequence[ExpertLayer] = (),
    curves: Sequence[Curve] = (),
    findings: Sequence[Finding] | None = None,
    *,
    model: str | None = None,
    revision: str | None = None,
    date: str = "",
    remarks: Sequence[str] = (),
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Make a report of what there is; the page says what is missing.

    Args:
        trace: its routing.
        routers: by `octavo.routing.experts.analyse_routers`.
        experts: by `octavo.routing.experts.analyse_experts`.
        curves: by `octavo.routing.replay.curves`, of the trace.
        findings: by `octavo.routing.compare.findings`; None where nobody looked.
        model, revision: what it is of; by default what the trace says.
        date: of the report.
        remarks: sentences about how it was measured.
        seed: of what is drawn for intervals.
        progress: is told what is measured next.

    Raises:
        OptionError: there is nothing to report on.
    """
    if trace is None and not routers and not experts:
        raise OptionError("there is nothing to report on", hint="give a trace, routers or experts")
    figures: list[Figure] = []
    left_out: list[Missing] = []
    if trace is None:
        left_out.append(NO_TRACE)
    else:
        of_trace, missing = trace_figures(trace, seed=seed, progress=progress)
        figures += of_trace
        left_out += missing
    if findings is not None:
        figures.append(findings_figure(findings))
    if routers:
        figures += router_figures(routers)
    else:
        left_out.append(NO_ROUTERS)
    if experts:
        figures += expert_figures(experts)
    else:
        left_out.append(NO_EXPERTS)
    if curves and trace is not None:
        figures.append(cache_figure(curves, trace.n_layers * trace.experts))
    elif trace is not None:
        left_out.append(NO_CURVES)
    model = model or (None if trace is None else trace.model)
    revision = revision or (None if trace is None else trace.revision)
    by_key = {figure.key: figure for figure in figures}
    found = [finding.text for finding in findings or ()]
    found += [by_key[key].found[0] for key in SUMMARY if key in by_key and by_key[key].found]
    return Report(
        title=model or "A model of experts",
        facts=tuple(_facts(trace, routers, experts, model, revision, date)),
        figures=tuple(figures),
        tokens=None if trace is None else token_view(trace),
        found=tuple(found),
        remarks=tuple(remarks),
        left_out=tuple(left_out),
    )


def _facts(
    trace: RoutingTrace | None,
    routers: Sequence[RouterLayer],
    experts: Sequence[ExpertLayer],
    model: str | None,
    revision: str | None,
    date: str,
) -> list[tuple[str, str]]:
    facts = [("Model", model or "not said")]
    if revision:
        facts.append(("Revision", revision))
    if trace is not None:
        facts.append(("Experts", f"{trace.top_k} of {trace.experts} for a token, in each of {trace.n_layers} layers"))
        facts.append(("Tokens", f"{trace.n_tokens:,}"))
        facts.append(("Documents", f"{int(trace.document_ids[-1]) + 1:,}"))
        if trace.labels:
            facts.append(("Domains", f"{len(trace.domains)}"))
    elif routers:
        facts.append(("Experts", f"{len(routers[0].norms)} in each of {len(routers)} layers"))
    if experts:
        facts.append(("Layers whose experts were compared", ", ".join(str(one.layer) for one in experts)))
    if date:
        facts.append(("Date", date))
    return facts


def _unwritable(path: Path, error: OSError) -> OptionError:
    return OptionError(
        f"{path}: cannot be written ({error.strerror})", hint="is the disk full, or the folder not yours to write?"
    )
