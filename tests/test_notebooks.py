"""The notebooks of `examples/` run from end to end, on a repository served here, and show what they say they show."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from safetensors.torch import save_file

from hub_server import HubServer

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_kept_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


def test_every_notebook_is_executed_here() -> None:
    assert [path.name for path in NOTEBOOKS] == ["tensors.ipynb"]


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
