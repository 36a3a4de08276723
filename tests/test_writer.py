"""A model folder is written whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import tiny_model
from octavo.checkpoint import open_checkpoint
from octavo.checkpoint.writer import new_folder, save_folder
from octavo.load import load_model


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    first, second = tiny_model(1), tiny_model(2, n_layers=3)
    for model in (first, second):
        save_folder(model.args, model.state_dict(), tmp_path / "model", shard_bytes=40_000)
    again, _ = load_model(tmp_path / "model")
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in again.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("tied", [False, True])
def test_the_index_counts_the_bytes_of_the_shards(tied: bool, tmp_path: Path) -> None:
    """A tied output is stored once, and counted once."""
    model = tiny_model(tie_embeddings=tied)
    save_folder(model.args, model.state_dict(), tmp_path, dtype=torch.bfloat16, shard_bytes=40_000)
    stored = open_checkpoint(tmp_path).stored
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(stored.info(name).nbytes for name in stored)
    assert index["metadata"]["total_size"] == 2 * model.args.n_params


def test_what_fails_half_way_leaves_the_old_folder(tmp_path: Path) -> None:
    model = tiny_model()
    save_folder(model.args, model.state_dict(), tmp_path / "model")

    def write_half() -> None:
        with new_folder(tmp_path / "model") as new:
            (new / "config.json").write_text("{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    load_model(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, "tests")
from conftest import tiny_model
from octavo.checkpoint.writer import save_folder
from octavo.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
model = tiny_model(5)
try:
    save_folder(model.args, model.state_dict(), sys.argv[1])
except CheckpointError as error:
    print(error.message, "|", error.hint)
"""


def test_a_full_disk_is_one_error_and_the_old_folder_stays(tmp_path: Path) -> None:
    model = tiny_model()
    save_folder(model.args, model.state_dict(), tmp_path / "model")
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "model")], capture_output=True, text=True, cwd=root
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "model") in done.stdout
    assert "disk full" in done.stdout
    again, _ = load_model(tmp_path / "model")
    assert torch.equal(again.norm.weight, model.norm.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def mapped_file(address: int) -> str:
    """The file whose mapping holds an address, or nothing."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *rest = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in span.split("-"))
        if start <= address < end:
            return rest[4] if len(rest) == 5 else ""
    return ""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc to see mappings")
def test_weights_stay_mapped(tmp_path: Path) -> None:
    """Experts are read from the file when they are used, not when the model is loaded."""
    model = tiny_model()
    save_folder(model.args, model.state_dict(), tmp_path)
    loaded, _ = load_model(tmp_path, device="cpu")
    copied = [
        n for n, p in loaded.named_parameters() if mapped_file(p.data_ptr()) != str(tmp_path / "model.safetensors")
    ]
    assert copied == [f"layers.{n}.attention.{w}.weight" for n in (0, 1) for w in ("wq", "wk")]
