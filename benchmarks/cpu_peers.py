"""Octavo beside llama.cpp, transformers and torch's own low-bit products, at real Mixtral 8x7B dimensions.

``python benchmarks/cpu_peers.py`` on a quiet machine with 24 GiB of memory and 20 GB of disk to spare; half an hour.
Random weights, the first layers of the model. Each engine runs in a process of its own; whole runs take turns, in the
opposite order every other round, and medians are compared. Prompts and replies are random tokens, so that routing
spreads over the experts. Prefill is one prompt of 512 tokens, decoding 64 tokens behind a prompt of 16: the median of
stretches of 8 tokens, as `octavo bench` has it. The peers may read the long prompt once before they are measured.
Behind the last attention llama.cpp goes on with the one token whose logits are wanted: at 4 layers that spares it a
quarter of the feed-forward work, at all 32 a thirty-second. So it is also measured where all logits are wanted, which
costs 512 times the output's work instead: the fairer figure for the whole model, and a little too low.

Writes benchmarks/results/cpu_peers.json after every round.

Engines:
    octavo-8, -4, -3, -2, -16    `octavo bench --bits N`; with -batch8 behind it, eight sequences at once
    llama-q4_0, -q4_k, ...       llama.cpp through llama-cpp-python, GGUF files of the same shape, all matrices in that
                                 encoding, read into memory (no mmap), so that it may repack them for its best kernels
    transformers                 bfloat16, experts by grouped_mm; -eager: by a loop over them
    product-octavo-q4, -q8, ...  one 14336 x 4096 product at 1 and at 128 tokens, of eight matrices in turn
    product-torch-int4, -int8    the same by torch's _weight_int4pack_mm_for_cpu (groups of 128) and _weight_int8pack_mm
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from random_gguf import BLOCKS, gguf_nbytes, weight_scale, write_gguf
from torch import Tensor

from octavo.shapes import shape

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu_peers.json"
SHAPE = "mixtral-8x7b"
PROMPT, SHORT_PROMPT, STRETCH = 512, 16, 8  # tokens
ROWS, COLS, COPIES = 14336, 4096, 8  # of a product; so many matrices do not fit into a cache
PRODUCT_SECONDS = 1.5
SPARE_DISK = 2_000_000_000

ENGINES = (
    "octavo-4",
    "llama-q4_0",
    "llama-q4_k",
    "octavo-8",
    "llama-q8_0",
    "octavo-3",
    "llama-q3_k",
    "octavo-2",
    "llama-q2_k",
    "octavo-4-batch8",
    "transformers",
    "product-octavo-q4",
    "product-torch-int4",
    "product-octavo-q8",
    "product-torch-int8",
)
NEEDED = {"llama": ("llama_cpp", "gguf"), "transformers": ("transformers",)}
"""Packages by the beginning of an engine's name."""

KEPT = (
    "prefill_tok_s",
    "decode_tok_s",
    "bytes_per_token",
    "read_limit_gbs",
    "decode_fraction_of_limit",
    "prefill_fraction_of_limit",
    "outside_kernels_fraction",
    "peak_rss_bytes",
)
"""What is taken over of `octavo bench --json`."""


# ---------------------------------------- measuring, in a process of its own


class Sizes(NamedTuple):
    """What is measured."""

    layers: int
    prompt: int
    decode: int
    threads: int


def random_tokens(count: int) -> list[int]:
    """Token ids of the model."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(3, shape(SHAPE).vocab_size, (count,), generator=generator).tolist()


def time_engine(read: Callable[[list[int]], None], forget: Callable[[], None], sizes: Sizes) -> dict[str, float]:
    """Prefill and decoding.

    Args:
        read: computes the logits of the last of some tokens, which follow those that were read before.
        forget: begins anew.
        sizes: of it all.
    """
    prompt, reply = random_tokens(sizes.prompt), random_tokens(sizes.decode)
    read(prompt)  # what is done but once, such as reserving memory
    forget()
    started = time.perf_counter()
    read(prompt)
    prefill = time.perf_counter() - started
    forget()
    read(random_tokens(SHORT_PROMPT))
    rates = []
    for begin in range(0, len(reply), STRETCH):
        stretch = reply[begin : begin + STRETCH]
        started = time.perf_counter()
        for token in stretch:
            read([token])
        rates.append(len(stretch) / (time.perf_counter() - started))
    return {
        "prefill_tok_s": sizes.prompt / prefill,
        "decode_tok_s": statistics.median(rates),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def measure_llama(file: Path, sizes: Sizes) -> dict[str, Any]:
    """llama.cpp by its own interface: one batch for the prompt, then token by token."""
    import llama_cpp as lc

    lines: list[str] = []

    @lc.llama_log_callback
    def log(level: int, text: bytes, _: Any) -> None:
        lines.append(text.decode(errors="replace"))

    lc.llama_log_set(log, None)
    lc.llama_backend_init()
    model_params = lc.llama_model_default_params()
    model_params.load_mode = lc.LLAMA_LOAD_MODE_NONE  # no mmap: weights may be repacked
    model_params.n_gpu_layers = 0
    model = lc.llama_model_load_from_file(os.fsencode(file), model_params)
    params = lc.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 1024, PROMPT, PROMPT
    params.n_threads = params.n_threads_batch = sizes.threads
    context = lc.llama_init_from_model(model, params) if model else None
    if context is None:
        raise SystemExit("".join(lines[-20:]))
    memory, batch = lc.llama_get_memory(context), lc.llama_batch_init(PROMPT, 0, 1)
    position, all_logits = 0, False

    def read(tokens: list[int]) -> None:
        nonlocal position
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = all_logits or i == len(tokens) - 1
        position += len(tokens)
        if lc.llama_decode(context, batch):
            raise SystemExit("".join(lines[-20:]))
        logits = lc.llama_get_logits_ith(context, len(tokens) - 1)  # waits for them
        if logits[0] - logits[0] != 0:
            raise SystemExit(f"{file.name}: the logits are not finite")

    def forget() -> None:
        nonlocal position
        lc.llama_memory_clear(memory, True)
        position = 0

    found: dict[str, Any] = time_engine(read, forget, sizes)
    all_logits = True  # else the last layer's experts see but one token, which is a quarter of the work at 4 layers
    forget()
    started = time.perf_counter()
    read(random_tokens(sizes.prompt))
    found["prefill_all_logits_tok_s"] = sizes.prompt / (time.perf_counter() - started)
    found["buffers"] = [" ".join(line.split()[1:]) for line in lines if "model buffer size" in line]
    return found | {"system": lc.llama_print_system_info().decode()}


def measure_transformers(experts: str, sizes: Sizes) -> dict[str, Any]:
    """MixtralForCausalLM in bfloat16, its weights made where they lie."""
    from transformers import DynamicCache, MixtralConfig, MixtralForCausalLM
    from transformers.initialization import no_init_weights

    torch.set_num_threads(sizes.threads)
    config = MixtralConfig(**shape(SHAPE, sizes.layers).to_hf())
    with no_init_weights():
        model = MixtralForCausalLM._from_config(
            config, dtype=torch.bfloat16, experts_implementation=experts, attn_implementation="sdpa"
        ).eval()
    fill_random(model)
    cache = DynamicCache(config=model.config)

    @torch.inference_mode()
    def read(tokens: list[int]) -> None:
        out = model(torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        if not torch.isfinite(out.logits).all():
            raise SystemExit("transformers: the logits are not finite")

    def forget() -> None:
        nonlocal cache
        cache = DynamicCache(config=model.config)

    found = time_engine(read, forget, sizes)
    return found | {"experts": model.config._experts_implementation, "dtype": str(model.dtype)}


@torch.no_grad()
def fill_random(model: torch.nn.Module) -> None:
    """Norms of ones; routers are drawn, larger matrices copied from a pool of random numbers, each from elsewhere."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(1 << 25, generator=generator).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        scale = weight_scale(name, parameter.shape)
        if parameter.dim() == 1:
            parameter.fill_(1)
        elif parameter.numel() < 1 << 20:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        else:
            scaled, flat, done = pool * scale, parameter.view(-1), 0
            while done < len(flat):
                begin = int(torch.randint(len(pool), (), generator=generator))
                piece = scaled[begin : begin + len(flat) - done]
                flat[done : done + len(piece)] = piece
                done += len(piece)


def measure_product(name: str, sizes: Sizes) -> dict[str, Any]:
    """One product at 1 and at 128 tokens."""
    torch.set_num_threads(sizes.threads)
    nbytes, multiply = torch_product(name) if "torch" in name else octavo_product(name.rpartition("-")[2], sizes)
    found: dict[str, Any] = {"bits_per_weight": 8 * nbytes / ROWS / COLS}
    for tokens in (1, 128):
        x = torch.randn(tokens, COLS, generator=torch.Generator().manual_seed(tokens)).to(torch.bfloat16)
        times: list[float] = []
        began = time.perf_counter()
        while time.perf_counter() - began < PRODUCT_SECONDS or len(times) < 3:
            started = time.perf_counter()
            for copy in range(COPIES):
                multiply(copy, x)
            times.append((time.perf_counter() - started) / COPIES)
        seconds = statistics.median(times[1:])
        found[f"m{tokens}_gflops"] = 2 * tokens * ROWS * COLS / seconds / 1e9
        found[f"m{tokens}_gb_s"] = nbytes / seconds / 1e9
    return found


Product = Callable[[int, Tensor], Tensor]


def torch_product(name: str) -> tuple[int, Product]:
    """Bytes of a matrix of torch's, and its product with x."""
    generator = torch.Generator().manual_seed(0)
    if name.endswith("int8"):
        weights8 = [
            torch.randint(-127, 128, (ROWS, COLS), dtype=torch.int8, generator=generator) for _ in range(COPIES)
        ]
        scales = torch.full((ROWS,), 1e-3, dtype=torch.bfloat16)
        return weights8[0].nbytes + scales.nbytes, lambda i, x: torch._weight_int8pack_mm(x, weights8[i], scales)
    codes = torch.randint(0, 16, (ROWS, COLS), dtype=torch.int32, generator=generator)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    weights4 = [packed.clone() for _ in range(COPIES)]
    scales_and_zeros = [torch.full((COLS // 128, ROWS, 2), 1e-3, dtype=torch.bfloat16) for _ in range(COPIES)]
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    nbytes = packed.nbytes + scales_and_zeros[0].nbytes
    return nbytes, lambda i, x: multiply(x, weights4[i], 128, scales_and_zeros[i])


def octavo_product(name: str, sizes: Sizes) -> tuple[int, Product]:
    """Bytes of a matrix of ours, and its product with x."""
    from octavo.kernels import linear, set_threads
    from octavo.kernels.ops import Matrix
    from octavo.quant.formats import FORMATS
    from octavo.quant.quantize import quantize

    set_threads(sizes.threads)
    w = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0))
    packed = quantize(w, FORMATS[name], "rtn")
    matrices = [Matrix(packed._replace(data=packed.data.clone())) for _ in range(COPIES)]
    return matrices[0].nbytes, lambda i, x: linear(x, matrices[i])


def measure(name: str, file: Path | None, sizes: Sizes) -> dict[str, Any]:
    """One run of an engine other than octavo-N, in this process."""
    if name.startswith("product"):
        return measure_product(name, sizes)
    if name.startswith("llama"):
        assert file is not None
        return measure_llama(file, sizes)
    return measure_transformers("eager" if name.endswith("eager") else "grouped_mm", sizes)


# ---------------------------------------- GGUF files


@contextlib.contextmanager
def gguf_files(engines: list[str], layers: int, scratch: Path | None, keep: bool) -> Iterator[dict[str, Path]]:
    """Files by engine, removed afterwards unless they are to be kept, or lay there before."""
    args = shape(SHAPE, layers)
    wanted = {name: name.partition("-")[2] for name in engines if name.startswith("llama")}
    with contextlib.ExitStack() as stack:
        folder = scratch
        if folder is None:
            runs = ROOT / "runs"
            runs.mkdir(exist_ok=True)
            make = tempfile.mkdtemp if keep else tempfile.TemporaryDirectory
            made = make(prefix="cpu-peers-", dir=runs)
            folder = Path(made if isinstance(made, str) else stack.enter_context(made))
        folder.mkdir(parents=True, exist_ok=True)
        files = {name: folder / f"{SHAPE}-{layers}-layers-{encoding}.gguf" for name, encoding in wanted.items()}
        missing = [name for name, file in files.items() if not file.exists()]
        needed, free = sum(gguf_nbytes(args, wanted[name]) for name in missing), shutil.disk_usage(folder).free
        if needed + SPARE_DISK > free:
            raise SystemExit(f"{folder}: {needed / 1e9:.1f} GB of files do not fit, {free / 1e9:.1f} GB are free")
        for name in missing:
            print(f"writing {files[name]}", file=sys.stderr, flush=True)
            if not keep:
                stack.callback(files[name].unlink, missing_ok=True)
            beside = files[name].with_suffix(".part")
            stack.callback(beside.unlink, missing_ok=True)
            write_gguf(beside, args, wanted[name], SHAPE)
            beside.rename(files[name])
        os.sync()
        yield files


# ---------------------------------------- taking turns


def run(name: str, file: Path | None, sizes: Sizes) -> dict[str, Any]:
    """One run of an engine in a process of its own."""
    if name.startswith("octavo"):
        bits, _, batch = name.removeprefix("octavo-").partition("-batch")
        command = [sys.executable, "-m", "octavo", "bench", "--json", "--shape", SHAPE, "--bits", bits]
        command += ["--layers", str(sizes.layers), "--prompt", str(sizes.prompt), "--decode", str(sizes.decode)]
        command += ["--batch", batch or "1"]
    else:
        command = [sys.executable, __file__, "--measure", name, *(["--file", str(file)] if file else [])]
        command += ["--layers", str(sizes.layers), "--prompt", str(sizes.prompt), "--decode", str(sizes.decode)]
        command += ["--threads", str(sizes.threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(sizes.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name} failed: {' '.join(command)}\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return {key: found[key] for key in (*KEPT, "backend")} if name.startswith("octavo") else found


Runs = dict[str, list[dict[str, Any]]]


def medians(runs: Runs) -> dict[str, dict[str, Any]]:
    """Of every figure of every engine; what is no figure is taken from the first run."""
    found: dict[str, dict[str, Any]] = {}
    for name, all_runs in runs.items():
        found[name] = {
            key: float(f"{statistics.median(one[key] for one in all_runs):.4g}")
            if isinstance(value, int | float)
            else value
            for key, value in all_runs[0].items()
        }
    return found


class Comparison(NamedTuple):
    """In words; an engine and its figure; and those of whom the best is the peer, with theirs."""

    words: str
    engine: str
    figure: str
    peers: list[str]
    peer_figure: str


def comparisons(engines: list[str]) -> Iterator[Comparison]:
    """All that is compared, whether it was measured or not."""
    llama = [name for name in engines if name.startswith("llama")]
    four = [name for name in llama if "q4_" in name]
    decode, prefill, whole = "decode_tok_s", "prefill_tok_s", "prefill_all_logits_tok_s"
    for what, figure, theirs in (
        ("decode", decode, decode),
        ("prefill", prefill, prefill),
        ("prefill (llama.cpp: all logits)", prefill, whole),
    ):
        yield Comparison(f"{what}, 4 bits, llama.cpp's best at 4 bits", "octavo-4", figure, four, theirs)
        yield Comparison(f"{what}, 4 bits, llama.cpp's best of all", "octavo-4", figure, llama, theirs)
        for bits, peer in ((8, "q8_0"), (3, "q3_k"), (2, "q2_k")):
            yield Comparison(
                f"{what}, {bits} bits, {peer.upper()}", f"octavo-{bits}", figure, [f"llama-{peer}"], theirs
            )
    for what, figure in (("decode", decode), ("prefill", prefill)):
        peers = ["transformers", "transformers-eager"]
        yield Comparison(f"{what}, 4 bits, transformers", "octavo-4", figure, peers, figure)
        for bits in (8, 3, 2):
            yield Comparison(f"{what}, {bits} bits, 4 bits", f"octavo-{bits}", figure, ["octavo-4"], figure)
    yield Comparison("decode, 4 bits, batch 8, batch 1", "octavo-4-batch8", decode, ["octavo-4"], decode)
    for bits in (4, 8):
        for figure, what in (("m1_gb_s", "bytes/s, 1 token"), ("m128_gflops", "operations/s, 128 tokens")):
            peer = f"product-torch-int{bits}"
            yield Comparison(f"product, {bits} bits, {what}, torch", f"product-octavo-q{bits}", figure, [peer], figure)


def ratios(runs: Runs) -> dict[str, dict[str, Any]]:
    """Medians over the rounds of the ratio to the peer with the best median."""
    found: dict[str, dict[str, Any]] = {}
    for words, engine, figure, peers, theirs in comparisons(list(runs)):
        peers = [peer for peer in peers if peer in runs]
        if engine not in runs or not peers:
            continue
        best = max(peers, key=lambda peer: statistics.median(one[theirs] for one in runs[peer]))
        each = [mine[figure] / its[theirs] for mine, its in zip(runs[engine], runs[best], strict=True)]
        found[words] = {
            "ratio": round(statistics.median(each), 3),
            "least": round(min(each), 3),
            "most": round(max(each), 3),
            "peer": best,
        }
    return found


def tables(report: dict[str, Any]) -> str:
    """In markdown."""
    engines = [
        "| engine | prefill tok/s | the same, all logits | decode tok/s | peak memory, GB |",
        "|---|---|---|---|---|",
    ]
    products = ["| product | bits per weight | GB/s, 1 token | GFLOP/s, 128 tokens |", "|---|---|---|---|"]
    for name, row in report["engines"].items():
        if name.startswith("product"):
            products.append(_row(name, row["bits_per_weight"], row["m1_gb_s"], row["m128_gflops"]))
        else:
            whole, peak = row.get("prefill_all_logits_tok_s"), row["peak_rss_bytes"] / 1e9
            engines.append(_row(name, row["prefill_tok_s"], whole, row["decode_tok_s"], peak))
    compared = ["| compared | ratio | least to most | peer |", "|---|---|---|---|"]
    for words, row in report["ratios"].items():
        compared.append(_row(words, row["ratio"], f"{row['least']:.3g} to {row['most']:.3g}", row["peer"]))
    parts = [part for part in (engines, products, compared) if len(part) > 2]
    return "\n\n".join("\n".join(part) for part in parts)


def _row(*cells: str | float | None) -> str:
    shown = ("" if cell is None else cell if isinstance(cell, str) else f"{cell:.3g}" for cell in cells)
    return f"| {' | '.join(shown)} |"


def installed(engines: list[str]) -> list[str]:
    """The engines that can run here; says which cannot."""
    unknown = [name for name in engines if not known(name)]
    if unknown:
        raise SystemExit(f"unknown engines: {', '.join(unknown)}; expected such as {', '.join(ENGINES)}")
    found = []
    for name in engines:
        missing = [p for p in NEEDED.get(name.partition("-")[0], ()) if importlib.util.find_spec(p) is None]
        if missing:
            print(f"{' and '.join(missing)} not installed: {name} is left out", file=sys.stderr)
        else:
            found.append(name)
    return found


def known(name: str) -> bool:
    """Whether there is an engine of that name."""
    kind, _, rest = name.partition("-")
    return {
        "octavo": rest.partition("-batch")[0] in ("16", "8", "4", "3", "2"),
        "llama": rest in BLOCKS,
        "transformers": rest in ("", "eager"),
        "product": rest in ("torch-int4", "torch-int8", "octavo-q8", "octavo-q4", "octavo-q3", "octavo-q2"),
    }.get(kind, False)


def machine() -> str:
    """In words."""
    found = [
        line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "name" in line
    ]
    return f"{platform.machine()}, {os.cpu_count()} cores, {found[0] if found else 'unknown'}"


def versions() -> dict[str, str]:
    """Of the peers."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "llama-cpp-python", "transformers", "gguf"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", default=",".join(ENGINES), help="names, separated by commas")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=PROMPT, help=f"tokens, {PROMPT} at most")
    parser.add_argument("--decode", type=int, default=64, help="tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, help="folder for the GGUF files; those that lie there are used")
    parser.add_argument("--keep", action="store_true", help="leave the GGUF files")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = Sizes(options.layers, min(options.prompt, PROMPT), options.decode, options.threads)
    if options.measure:
        print(json.dumps(measure(options.measure, options.file, sizes)))
        return
    engines = installed(options.engines.split(","))
    runs: Runs = {name: [] for name in engines}
    with gguf_files(engines, sizes.layers, options.scratch, options.keep) as files:
        for turn in range(options.rounds):
            for name in engines if turn % 2 == 0 else engines[::-1]:
                started = time.perf_counter()
                runs[name].append(run(name, files.get(name), sizes))
                shown = {k: round(v, 2) for k, v in runs[name][-1].items() if k.endswith(("tok_s", "gb_s", "gflops"))}
                print(
                    f"round {turn + 1} {name} {time.perf_counter() - started:.0f} s {shown}",
                    file=sys.stderr,
                    flush=True,
                )
            report = {
                "date": date.today().isoformat(),
                "machine": machine(),
                "versions": versions(),
                "shape": SHAPE,
                **sizes._asdict(),
                "rounds": turn + 1,
                "engines": medians(runs),
                "ratios": ratios(runs),
                "runs": runs,
            }
            options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(tables(report))


if __name__ == "__main__":
    main()
