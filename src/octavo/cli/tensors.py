"""`octavo tensors`: what a checkpoint holds, near or far, and one tensor of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from octavo.cli.terminal import note
from octavo.errors import OptionError

if TYPE_CHECKING:
    from octavo.checkpoint import Checkpoint
    from octavo.storage.source import TensorInfo

FETCH = "fetch"


@click.command("tensors")
@click.argument("words", nargs=-1, required=True, metavar="[fetch] MODEL [NAME]")
@click.option("--layer", "-l", type=int, metavar="L", help="Only of this layer.")
@click.option("--expert", "-e", type=int, metavar="E", help="Only of this expert, or what holds it among others.")
@click.option("--router", is_flag=True, help="Only routers.")
@click.option("--verify", is_flag=True, help="Of a store: first compare every tensor with its checksum.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of objects.")
@click.option("--out", "-o", metavar="FILE", help="Of fetch: where to; by default NAME.safetensors.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit, for a Hub id.")
def command(
    words: tuple[str, ...],
    layer: int | None,
    expert: int | None,
    router: bool,
    verify: bool,
    as_json: bool,
    out: str | None,
    revision: str | None,
) -> None:
    """List the tensors of MODEL, or fetch the one called NAME into a safetensors file.

    MODEL is a folder, a weights file, a Hub id or menny; a folder called fetch is ./fetch. Of a repository on the Hub
    only headers are fetched, or that one tensor. A line has the name on disk, encoding, shape, bytes and file;
    fetch prints the path it has written.

    \b
    octavo tensors mistralai/Mixtral-8x7B-v0.1 --layer 3 --expert 5
    octavo tensors ./mixtral --router --json
    octavo tensors fetch mistralai/Mixtral-8x7B-v0.1 model.layers.0.block_sparse_moe.gate.weight
    """
    if words[0] == FETCH:
        if len(words) != 3 or router or verify or as_json or (layer, expert) != (None, None):
            raise click.UsageError("fetch takes MODEL, NAME, --out and --revision; a folder called fetch is ./fetch")
        _fetch(words[1], words[2], out, revision)
        return
    if len(words) != 1 or out is not None:
        raise click.UsageError("expected one MODEL to list, or: fetch MODEL NAME [-o FILE]")
    checkpoint = _open(words[0], revision)
    if verify:
        checkpoint.verify()
        note(f"{checkpoint.location}: every tensor has its checksum")
    _list(checkpoint, layer, expert, router=router, as_json=as_json)


def _open(model: str, revision: str | None) -> Checkpoint:
    from octavo.checkpoint import open_checkpoint
    from octavo.llm import SHIPPED, shipped_model

    return open_checkpoint(shipped_model() if model == SHIPPED else model, revision)


def _list(checkpoint: Checkpoint, layer: int | None, expert: int | None, *, router: bool, as_json: bool) -> None:
    names = _of_layer(checkpoint, layer)
    if router or expert is not None:
        wanted = _special(checkpoint, expert, router=router)
        names = [name for name in names if name in wanted]
    if not names:
        raise OptionError(
            f"{checkpoint.location}: no tensor is of what was asked for", hint="without options all is listed"
        )
    infos = [checkpoint.stored.info(name) for name in names]
    if as_json:
        click.echo("[\n" + ",\n".join(json.dumps(_as_dict(info)) for info in infos) + "\n]")
    else:
        rows = [(i.name, i.encoding, str(list(i.shape)), f"{i.nbytes:,}", i.file) for i in infos]
        wide = [max(len(row[column]) for row in rows) for column in range(4)]
        for name, encoding, shape, size, file in rows:
            click.echo(f"{name:<{wide[0]}}  {encoding:<{wide[1]}}  {shape:<{wide[2]}}  {size:>{wide[3]}}  {file}")
    total = sum(info.nbytes for info in infos)
    note(f"{checkpoint.location}: {len(infos)} tensor{'s' * (len(infos) > 1)}, {total:,} bytes{_fetched(checkpoint)}")


def _as_dict(info: TensorInfo) -> dict[str, object]:
    return {
        "name": info.name,
        "dtype": str(info.dtype).removeprefix("torch."),
        "encoding": info.encoding,
        "shape": list(info.shape),
        "bytes": info.nbytes,
        "file": info.file,
    }


def _fetched(checkpoint: Checkpoint) -> str:
    """What came over the network."""
    from octavo.hub import RemoteFolder

    folder = checkpoint.folder
    return f"; {folder.fetched:,} bytes were fetched" if isinstance(folder, RemoteFolder) else ""


def _of_layer(checkpoint: Checkpoint, layer: int | None) -> list[str]:
    """The names on disk of a layer's tensors. In every layout, the first number of a name is the layer's."""
    names = checkpoint.stored.names()
    if layer is None:
        return names
    numbers = {name: int(found[1]) for name in names if (found := re.search(r"(?:^|\.)(\d{1,6})\.", name))}
    _check_index("layer", layer, 1 + max(numbers.values(), default=-1), checkpoint)
    return [name for name in names if numbers.get(name) == layer]


def _special(checkpoint: Checkpoint, expert: int | None, *, router: bool) -> set[str]:
    """The names on disk of the routers, and of the tensors that an expert lies in."""
    if checkpoint.layout is None:
        return _by_family(checkpoint, expert, router=router)
    from octavo.checkpoint.names import stored_tensors

    args = checkpoint.args
    if expert is not None:
        _check_index("expert", expert, args.moe.num_experts if args.moe else 0, checkpoint)
    found = set()
    for stored in stored_tensors(checkpoint.layout, args):
        for part in stored.parts:
            is_router = part.canonical.endswith(".feed_forward.gate.weight")
            if (router and is_router) or (expert is not None and f".experts.{expert}." in part.canonical):
                found.add(stored.name)
    return found


def _by_family(checkpoint: Checkpoint, expert: int | None, *, router: bool) -> set[str]:
    """The same of a model that is no Mixtral."""
    from octavo.hub.experts import LogicalTensor
    from octavo.hub.families import choose_layout, family_of, read_counts

    where = f"{checkpoint.location}/config.json"
    family = family_of(checkpoint.config, where)
    counts = read_counts(family, checkpoint.config, where)
    source = checkpoint.stored
    layout = choose_layout(family.layouts, source, counts.sparse, checkpoint.location)
    found: set[str] = set()
    if router:
        names = (layout.router, *layout.router_extras)
        found.update(name.format(layer=layer) for name in names for layer in counts.sparse)
    if expert is not None:
        _check_index("expert", expert, counts.n_experts, checkpoint)
        for layer in counts.sparse:
            for matrix in layout.matrices:
                found.update(LogicalTensor(source, matrix, layer, expert).parts())
    return found


def _check_index(kind: str, value: int, count: int, checkpoint: Checkpoint) -> None:
    if not 0 <= value < count:
        raise OptionError(
            f"{checkpoint.location}: has no {kind} {value}",
            hint=f"there are {count}: {kind}s 0 to {count - 1}"
            if count
            else "it has none; without options all is listed",
        )


def _fetch(model: str, name: str, out: str | None, revision: str | None) -> None:
    from octavo.storage.safetensors import save_tensors

    path = Path(out if out is not None else re.sub(r"[^\w.-]", "_", name) + ".safetensors")
    checkpoint = _open(model, revision)
    info = checkpoint.info(name)
    if path.resolve().parent == Path(checkpoint.folder.location).resolve() and path.name in checkpoint.folder.files():
        raise OptionError(f"--out {path}: is a file of the model itself", hint="give another name")
    shape = "x".join(map(str, info.shape))
    note(f"{info.nbytes:,} bytes of {info.file} are to be fetched: {name}, {info.encoding} {shape}")
    save_tensors({name: checkpoint.read(name)}, path, {"format": "pt"})
    note(f"written{_fetched(checkpoint)}")
    click.echo(str(path))
