"""`octavo routing experts`: routers and experts compared by their weights alone."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from octavo.cli.routing.shared import Bar, check_place, parse_layers
from octavo.cli.terminal import note
from octavo.errors import OptionError

if TYPE_CHECKING:
    from octavo.routing.experts import ExpertLayer, RouterLayer
    from octavo.routing.weights import ExpertWeights

SHOWN_KS = (1, 64, 512)


@click.command("experts")
@click.argument("model")
@click.option("--routers", is_flag=True, help="Only routers: 2 MiB of a model of 93 GB.")
@click.option("--layers", metavar="L,L,...", help="Only these, such as 0,15 or 0-3; by default all.")
@click.option("--all", "every", is_flag=True, help="Of a Hub id: fetch and compare all experts.")
@click.option("--neurons", type=int, metavar="N", help="Neurons of an expert to match with another's; 256.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit, for a Hub id.")
@click.option("--json", "json_wanted", is_flag=True, help="Print one JSON object, without singular values.")
@click.option("--out", "-o", metavar="FILE", help="Write everything, singular values too, as FILE.npz.")
def command(
    model: str,
    routers: bool,
    layers: str | None,
    every: bool,
    neurons: int | None,
    revision: str | None,
    json_wanted: bool,
    out: str | None,
) -> None:
    """Compare the routers and experts of MODEL by their weights alone, and say what is odd about them.

    MODEL is a folder, a weights file, a Hub id or menny. Of a Hub id only routers are fetched, unless --layers or
    --all asks for experts. A layer of Mixtral 8x7B takes minutes, and no more than 2 GB of memory.

    \b
    octavo routing experts menny
    octavo routing experts mistralai/Mixtral-8x7B-v0.1
    octavo routing experts ./mixtral --layers 0,15,31 -o experts.npz
    """
    from octavo.routing.compare import findings
    from octavo.routing.experts import NEURONS, analyse_experts, analyse_routers, as_arrays, as_json, steps
    from octavo.routing.weights import open_weights

    target = _target(out)
    weights = open_weights(model, revision)
    chosen = weights.choose_layers(parse_layers(layers))
    routers = routers_only(weights, chosen, routers=routers, experts=every or layers is not None)
    with Bar("routers", len(chosen), unit=" layers") as bar:
        rows = analyse_routers(weights, chosen, bar.add)
    found: list[ExpertLayer] = []
    if not routers:
        with Bar("experts", steps(weights, chosen), unit=" steps") as bar:
            wanted = NEURONS if neurons is None else neurons
            found = list(analyse_experts(weights, chosen, neurons=wanted, progress=bar.add))
    odd = findings(rows, found)
    if target is not None:
        _write(target, as_arrays(rows, found))
    if json_wanted:
        told: dict[str, Any] = {"model": weights.name, "revision": weights.revision}
        told |= {"routers": [as_json(one) for one in rows], "experts": [as_json(one) for one in found]}
        click.echo(json.dumps(told | {"findings": [without_nan(vars(one)) for one in odd]}))
    else:
        lines = [*_router_lines(rows), *_expert_lines(found)]
        lines += ["", *(f"layer {one.layer}: {one.text}" for one in odd)] if odd else []
        click.echo("\n".join(lines))
    tell_fetched(weights)


def routers_only(weights: ExpertWeights, layers: Sequence[int], *, routers: bool, experts: bool) -> bool:
    """Whether experts are left out, which of a Hub id they are until they are asked for; say what they cost."""
    if routers or not weights.remote:
        return routers
    from octavo.plan import show_size

    nbytes = weights.experts_nbytes(layers)
    if experts:
        note(f"{weights.name}: experts of {show_size(nbytes)} are to be fetched, unless they were before")
        return False
    note(f"{weights.name}: routers only; the experts are {show_size(nbytes)} to fetch: --all, or some --layers")
    return True


def tell_fetched(*models: ExpertWeights) -> None:
    """Say what came over the network."""
    for weights in models:
        if weights.remote:
            note(f"{weights.name}@{(weights.revision or '')[:8]}: {weights.fetched:,} bytes were fetched")


def without_nan(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers that JSON lacks as null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


def _target(out: str | None) -> Path | None:
    """Refuse a file that cannot be written, before minutes are spent."""
    if out is None:
        return None
    if not out.endswith(".npz"):
        raise OptionError(f"--out {out}: expected a name that ends in .npz", hint="such as -o experts.npz")
    check_place(out, "experts.npz")
    return Path(out)


def _write(path: Path, arrays: Mapping[str, Any]) -> None:
    """Beside, and then renamed: no half a file is left behind."""
    import numpy as np

    from octavo.checkpoint.writer import cannot_write

    beside = path.with_name(f".{path.stem}.new-{os.getpid()}.npz")
    try:
        np.savez_compressed(beside, **arrays)
        beside.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        beside.unlink(missing_ok=True)


def _router_lines(rows: Sequence[RouterLayer]) -> list[str]:
    """One line a layer: norms, and cosines of different rows."""
    lines = ["routers        norm of rows             cosine of rows (independent: 0)"]
    lines += ["layer     least  median    most      mean    most  between"]
    for one in rows:
        low, middle, high = (f"{value:8.4f}" for value in _quantiles(one.norms))
        mean, most, pair = _off_diagonal(one.cosine)
        lines.append(f"{one.layer:5}  {low}{middle}{high}  {mean:8.3f}{most:8.3f}  {pair}")
    return lines


def _expert_lines(layers: Sequence[ExpertLayer]) -> list[str]:
    """Some lines a layer: means over pairs of different experts, beside what independence would give."""
    lines: list[str] = []
    for one in layers:
        lines += ["", f"layer {one.layer}, experts             w1        w2        w3   independent"]
        width = {matrix: one.spectra[matrix].shape[1] for matrix in one.cosine}
        rows = [("mean cosine", {m: _off_diagonal(c)[0] for m, c in one.cosine.items()}, "0")]
        null = sum(one.matched_null.values()) / len(one.matched_null)
        name = f"the same, {one.n_matched} matched"
        rows += [(name, {m: _off_diagonal(c)[0] for m, c in one.matched.items()}, f"{null:.3f}")]
        lines += [
            f"  {name:<22}" + "".join(f"{of[m]:10.3f}" for m in ("w1", "w2", "w3")) + f"   {independent:>11}"
            for name, of, independent in rows
        ]
        ranks = "".join(f"{one.effective_rank[m].mean():10.1f}" for m in ("w1", "w2", "w3"))
        lines.append(f"  {'effective rank':<22}{ranks}   of {width['w1']:>8}")
        lines.append(f"  {'mean linear CKA':<22}{_off_diagonal(one.cka)[0]:10.3f}{one.cka_null:34.3f}")
        lines.append(f"  {'router aligned, k =':<22}" + "".join(f"{k:10}" for k in _shown(one)))
        at = [one.ks.tolist().index(k) for k in _shown(one)]
        for name, values in (("own router row", one.alignment), ("the others' rows", one.alignment_null)):
            lines.append(f"  {name:<22}" + "".join(f"{_mean(values[:, k]):10.3f}" for k in at))
    return lines


def _shown(one: ExpertLayer) -> list[int]:
    """The ks with published figures, where the model is so large; else its quarters."""
    ks = one.ks.tolist()
    shown = [k for k in SHOWN_KS if k in ks]
    return shown if len(shown) == len(SHOWN_KS) else sorted({ks[0], ks[len(ks) // 3], ks[2 * len(ks) // 3]})


def _quantiles(values: Any) -> tuple[float, float, float]:
    return float(values.min()), float(sorted(values.tolist())[len(values) // 2]), float(values.max())


def _mean(values: Any) -> float:
    kept = [value for value in values.tolist() if math.isfinite(value)]
    return sum(kept) / len(kept) if kept else math.nan


def _off_diagonal(cosines: Any) -> tuple[float, float, str]:
    """Mean and largest over pairs, and which pair that is."""
    count = len(cosines)
    pairs = [(float(cosines[i, j]), f"{i} and {j}") for i in range(count) for j in range(i + 1, count)]
    pairs = [pair for pair in pairs if math.isfinite(pair[0])]
    if not pairs:
        return math.nan, math.nan, "-"
    return sum(value for value, _ in pairs) / len(pairs), *max(pairs)
