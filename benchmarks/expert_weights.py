"""A report by weights alone of a checkpoint with real Mixtral 8x7B tensor sizes: its peak memory and seconds.

``python benchmarks/expert_weights.py`` on a quiet machine, with 6 GB of disk for two layers of random bfloat16 (a tiny
vocabulary), which are removed afterwards. `octavo routing report --only weights` runs as a process of its own, with
everything: cosines, matched neurons, spectra, CKA, alignment, findings, and the page. Prints JSON, and writes it to
benchmarks/results/expert_weights.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from octavo.shapes import shape

RESULTS = Path(__file__).parent / "results" / "expert_weights.json"
SHAPE = "mixtral-8x7b"
VOCABULARY = 256


def make_checkpoint(folder: Path, layers: int) -> None:
    """Write random weights, one shard for each expert."""
    import torch
    from safetensors.torch import save_file

    args = dataclasses.replace(shape(SHAPE, layers), vocab_size=VOCABULARY)
    assert args.moe is not None
    weight_map: dict[str, str] = {}
    torch.manual_seed(0)

    def save(shapes: dict[str, tuple[int, ...]]) -> None:
        file = f"model-{len(set(weight_map.values())):05}.safetensors"
        tensors = {name: (torch.randn(size) * size[-1] ** -0.5).bfloat16() for name, size in shapes.items()}
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    ends = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (args.vocab_size, args.dim))
    save(ends | {"model.norm.weight": (args.dim,)})
    queries, keys = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    for layer in range(layers):
        start = f"model.layers.{layer}."
        attention = {"q": (queries, args.dim), "k": (keys, args.dim), "v": (keys, args.dim), "o": (args.dim, queries)}
        block = {f"{start}self_attn.{which}_proj.weight": size for which, size in attention.items()}
        block |= {f"{start}{norm}.weight": (args.dim,) for norm in ("input_layernorm", "post_attention_layernorm")}
        sparse = f"{start}block_sparse_moe."
        save(block | {f"{sparse}gate.weight": (args.moe.num_experts, args.dim)})
        up, down = (args.hidden_dim, args.dim), (args.dim, args.hidden_dim)
        for expert in range(args.moe.num_experts):
            save({f"{sparse}experts.{expert}.{w}.weight": down if w == "w2" else up for w in ("w1", "w2", "w3")})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(args.to_hf()))


def measure(folder: Path, threads: int) -> dict[str, float]:
    """Run the command; its peak memory is what the system counted for this one process."""
    page = folder / "report.html"
    command = [sys.executable, "-m", "octavo", "routing", "report", str(folder), "--only", "weights", "-o", str(page)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return {
        "seconds": round(seconds, 1),
        "peak_rss_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "page_bytes": page.stat().st_size,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="where to make the checkpoint, by default a temporary folder")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        # In a process of its own: this one stays small, for the other begins as its copy.
        maker = multiprocessing.get_context("spawn").Process(target=make_checkpoint, args=(folder, options.layers))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit("the checkpoint could not be made")
        nbytes = sum(path.stat().st_size for path in folder.iterdir())
        found = measure(folder, options.threads)
    report = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "shape": SHAPE,
        "layers": options.layers,
        "threads": options.threads,
        "checkpoint_bytes": nbytes,
        **found,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
