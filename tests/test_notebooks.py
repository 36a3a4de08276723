"""The notebooks of `examples/` run from end to end, on a repository served here, and show what they say they show."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from safetensors.torch import save_file

from hub_server import HubServer
from octavo.shapes import shape

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
WITH_OUTPUTS = "deep_dive.ipynb"  # of the model that ships: read without being run
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
LAYERS, EXPERTS, HIDDEN, INNER = 2, 8, 128, 256


def run_notebook(path: Path, environment: dict[str, str], shown: str) -> tuple[Any, Any]:
    """Execute a copy; return it, and the value of an expression in the end."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({shown}))"))
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute(env=environment)
    return notebook, json.loads(text_of(notebook.cells[-1]))


def text_of(cell: Any) -> str:
    return "".join(output.get("text") or output["data"]["text/plain"] for output in cell.outputs)


def write_sharded(folder: Path) -> dict[str, torch.Tensor]:
    """A Mixtral of one shard a layer, with routers and experts alone."""
    torch.manual_seed(0)
    shapes = {"w1": (INNER, HIDDEN), "w2": (HIDDEN, INNER), "w3": (INNER, HIDDEN)}
    weight_map: dict[str, str] = {}
    everything: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        start = f"model.layers.{layer}.block_sparse_moe."
        part = {f"{start}gate.weight": torch.randn(EXPERTS, HIDDEN).bfloat16()}
        for expert in range(EXPERTS):
            part |= {f"{start}experts.{expert}.{w}.weight": torch.randn(s).bfloat16() for w, s in shapes.items()}
        save_file(part, folder / f"model-{layer}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{layer}.safetensors")
        everything |= part
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "model_type": "mixtral",
        "num_hidden_layers": LAYERS,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return everything


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_outputs_are_kept_of_the_one_that_needs_no_download(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = code_cells(notebook)
    if path.name != WITH_OUTPUTS:
        assert code
        assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
        return
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(cell.outputs for cell in code)
    assert path.stat().st_size < 400_000
    kinds = {output.output_type for cell in code for output in cell.outputs}
    assert kinds == {"stream", "display_data"}  # no error, and nothing on stderr:
    assert all(output.get("name", "stdout") == "stdout" for cell in code for output in cell.outputs)


def test_every_notebook_is_executed_here() -> None:
    assert [path.name for path in NOTEBOOKS] == [WITH_OUTPUTS, "tensors.ipynb"]


def test_tensors(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = write_sharded(folder)
    start = "model.layers.0.block_sparse_moe."
    with HubServer({"org/tiny": folder}) as hub:
        environment = hub.environment(tmp_path / "home", OCTAVO_NOTEBOOK_MODEL="org/tiny", JUPYTER_PLATFORM_DIRS="1")
        notebook, (router, norm, after_router, fetched) = run_notebook(
            EXAMPLES / "tensors.ipynb",
            environment,
            "[router.tolist(), y.norm().item(), after_router, moe.fetched]",
        )
        sent = hub.sent()

    assert torch.equal(torch.tensor(router), tensors[f"{start}gate.weight"].float())
    w1, w2, w3 = (tensors[f"{start}experts.0.{w}.weight"].float() for w in ("w1", "w2", "w3"))
    x = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(0))
    assert math.isclose(norm, (w2 @ (torch.nn.functional.silu(w1 @ x) * (w3 @ x))).norm().item(), rel_tol=1e-4)

    beside = sum((folder / name).stat().st_size for name in ("config.json", "model.safetensors.index.json"))
    router_bytes, expert_bytes = EXPERTS * HIDDEN * 2, 3 * INNER * HIDDEN * 2
    assert after_router <= beside + 65_536 + router_bytes
    assert fetched == after_router + expert_bytes == sent

    shown = "\n".join(text_of(cell) for cell in notebook.cells if cell.cell_type == "code")
    assert "org/tiny: 2 layers, 8 experts, 2 for each token" in shown
    assert f"tensor_name='{start}gate.weight', hf_filename='model-0.safetensors', local_path=None)" in shown
    assert f"torch.bfloat16 [8, 128] {router_bytes:,} bytes" in shown.replace("128], ", "128] ")
    assert f"w2: [128, 256], {expert_bytes // 3:,} bytes of model-0.safetensors" in shown


def told(cell: Any) -> str:
    """What a cell printed, without quoted pieces of text, and with one space between words."""
    text = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    return " ".join(re.sub(r"'[^']*'", "''", text).split())


def close(kept: str, found: str) -> bool:
    """Whether two numbers are the same but for another processor's rounding, which sends a few tokens elsewhere."""
    decimals = len(kept.partition(".")[2])
    a, b = (float(number.replace(",", "")) for number in (kept, found))
    return math.isclose(a, b, rel_tol=0.05, abs_tol=0.01 if decimals > 1 else 1.0)


def check_kept(kept: Any, found: Any) -> None:
    """Compare the outputs that are kept with those of a run."""
    stale = "the outputs that are kept are not those of the code; run jupyter execute --inplace on the notebook"
    numbers: list[tuple[str, str]] = []
    for one, other in zip(code_cells(kept), code_cells(found)[:-1], strict=True):
        assert NUMBER.sub("#", told(one)) == NUMBER.sub("#", told(other)), stale
        numbers += zip(NUMBER.findall(told(one)), NUMBER.findall(told(other)), strict=True)
        pictures = [sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in (one, other)]
        assert pictures[0] == pictures[1], stale
    assert len(numbers) > 200
    assert sum(close(*pair) for pair in numbers) >= 0.95 * len(numbers), stale


def test_deep_dive(tmp_path: Path) -> None:
    path = EXAMPLES / WITH_OUTPUTS
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment = {**os.environ, **offline, "JUPYTER_PLATFORM_DIRS": "1", "OMP_NUM_THREADS": "1"}
    wanted = {
        "error": "error",
        "weights": "weights.sum().item()",
        "parts": "[sum(parts.values()), sum(active.values())]",
        "tokens": "trace.n_tokens",
        "idlest": "load.low.min()",
        "first": "(first.low - first.baseline).tolist()",
        "vocabulary": "vocabulary.summary.value.tolist()",
        "preferred": "[int((one == 1).sum()) for one in contrast.beside]",
        "chance": "float(stats.domain_distance(words).p_value)",
        "odd": "len(found)",
        "rise": "{change: [float(part) for part in one] for change, one in rise.items()}",
        "hits": "{curve.policy: curve.hit_rate for curve in replayed}",
        "page": "page_nbytes",
    }
    notebook, found = run_notebook(
        path, environment, "{" + ", ".join(f"{name!r}: {value}" for name, value in wanted.items()) + "}"
    )

    assert found["error"] < 1e-5  # the formula by hand, and the model
    assert math.isclose(found["weights"], 1, abs_tol=1e-6)
    mixtral = shape("mixtral-8x7b")
    assert found["parts"] == [mixtral.n_params, mixtral.n_active_params] == [46_702_792_704, 12_879_925_248]
    shown = "\n".join(told(cell) for cell in code_cells(notebook))
    assert "sum 46,702,792,704 12,879,925,248" in shown
    assert "is Mixtral 8x7B 46.70 B True" in shown
    assert "27 + 15 = 42." in shown

    # What the text around the cells says of them.
    assert found["tokens"] > 10_000
    assert found["idlest"] > 0.05
    assert all(above > 0 for above in found["first"])
    assert found["vocabulary"][0] > 0.99
    assert found["vocabulary"] == sorted(found["vocabulary"], reverse=True)
    assert min(found["preferred"]) >= 1
    assert found["chance"] <= 0.01
    assert found["odd"] == 0
    rise = found["rise"]
    assert rise["disable:4:1"][1] < 0 < rise["disable:4:1"][2]
    assert 0 < rise["disable:4:3"][1] <= rise["disable:4:3"][2] < rise["disable:0:3"][1]
    assert rise["topk:*:1"][1] > 0
    assert rise["shuffle"][1] > 1
    hits = found["hits"]
    assert all(best >= lru for best, lru in zip(hits["belady"], hits["lru"], strict=True))
    assert hits["lru"][0] == 0 < hits["belady"][0]
    assert hits["lru"][-1] == 1
    assert 100_000 < found["page"] < 5_000_000
    check_kept(nbformat.read(path, as_version=4), notebook)
