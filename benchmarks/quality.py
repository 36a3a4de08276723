"""What the low-bit formats lose: weights beside GGUF's formats, and the shipped model's words at every precision.

``python benchmarks/quality.py`` prints the tables of docs/formats.md and writes benchmarks/results/quality.json. It
measures no time, so the machine may be busy; it takes some minutes.

Weights: the root mean square of the error over that of the weights, on random matrices of three distributions and on
the shipped model's experts. GGUF's formats are quantised by llama.cpp's own C code, without an importance matrix, and
dequantised by the gguf package; where llama-cpp-python or gguf is missing these rows are left out, and the script says
so.

Model: the recipe's held-out documents, all of them, made anew from its committed seeds and read one by one as
recipes/menny/ship.py reads them. Residual stream, norms, router and attention core are in float32; every other product
is computed by octavo.kernels, also that of the bfloat16 weights to which the others are compared.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import math
import os
import platform
import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, nll_loss

from octavo.chat import template_for
from octavo.checkpoint import Checkpoint, open_checkpoint
from octavo.checkpoint.names import canonical_shapes
from octavo.kernels import backend
from octavo.kernels.ops import Weight
from octavo.llm import shipped_model
from octavo.load import assemble, load_model
from octavo.model import Mixtral
from octavo.quant.formats import FORMATS
from octavo.quant.presets import preset
from octavo.quant.quantize import METHODS, dequantize, quantize
from octavo.train.data import SPOKEN, Document, tokenize_document

RESULTS = Path(__file__).parent / "results" / "quality.json"
RECIPE = Path(__file__).parents[1] / "recipes" / "menny"
GGUF_FORMATS = ("Q8_0", "Q4_0", "Q4_K", "IQ4_XS", "Q3_K", "Q2_K")
SEED = 0
SIZE = 4096  # rows and columns of the random matrices
CHUNK_ROWS = 512  # of GGUF's formats at a time: the gguf package dequantises with large temporaries

Restore = Callable[[Tensor], Tensor]
"""Quantise and dequantise: float32 [rows, cols] to float32 [rows, cols]."""


# ---------------------------------------- weights


def random_matrices(rows: int) -> dict[str, Tensor]:
    """Random float32 [rows, SIZE]; the size of weights does not matter to any of the formats."""
    rng = np.random.default_rng(SEED)
    shape = (rows, SIZE)
    drawn = {
        "Gaussian": rng.standard_normal(shape, dtype=np.float32),
        "Student t, 5 degrees": rng.standard_t(5, shape),
        "Laplace": rng.laplace(size=shape),
    }
    return {name: torch.from_numpy(x.astype(np.float32, copy=False)) for name, x in drawn.items()}


def shipped_experts(checkpoint: Checkpoint) -> Tensor:
    """All expert matrices of the shipped model, one below the other; they have the same number of columns."""
    names = [name for name in canonical_shapes(checkpoint.args) if ".experts." in name]
    return torch.cat([checkpoint.read(name).float() for name in names])


def ours(name: str, method: str) -> Restore:
    """One of Octavo's formats."""
    return lambda w: dequantize(quantize(w, FORMATS[name], method))


def ggufs(name: str) -> Restore:
    """One of GGUF's formats, by llama.cpp's quantiser."""
    import gguf
    import llama_cpp

    library = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base.*"))))
    quantize_chunk = library.ggml_quantize_chunk
    quantize_chunk.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    kind = gguf.GGMLQuantizationType[name]
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]

    def restore(w: Tensor) -> Tensor:
        out = torch.empty_like(w)
        for rows, restored in zip(w.split(CHUNK_ROWS), out.split(CHUNK_ROWS), strict=True):
            x = rows.contiguous().numpy()
            packed = np.zeros((len(x), x.shape[1] // elements * nbytes), dtype=np.uint8)
            written = quantize_chunk(int(kind), x.ctypes.data, packed.ctypes.data, 0, *x.shape, None)
            if written != packed.nbytes:
                raise SystemExit(f"llama.cpp wrote {written} bytes of {name}; expected {packed.nbytes}")
            restored.copy_(torch.from_numpy(gguf.dequantize(packed, kind)))
        return out

    return restore


def contenders(with_gguf: bool) -> list[dict[str, Any]]:
    """Formats with their bits per weight, most bits first."""
    found: list[dict[str, Any]] = []
    for format in FORMATS.values():
        for method in METHODS if format.books else METHODS[:1]:  # at 8 bits both methods are the same
            name = f"{format.name}, {method}" if format.books else format.name
            found.append({"format": name, "bits": format.bits_per_weight, "restore": ours(format.name, method)})
    if with_gguf:
        import gguf

        for name in GGUF_FORMATS:
            elements, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
            found.append({"format": f"GGUF {name}", "bits": 8 * nbytes / elements, "restore": ggufs(name)})
    return sorted(found, key=lambda one: -one["bits"])


def relative_error(w: Tensor, restored: Tensor) -> float:
    """Root mean square of the error over that of the weights."""
    return math.sqrt(float((w - restored).square().sum(dtype=torch.float64) / w.square().sum(dtype=torch.float64)))


def weight_errors(matrices: dict[str, Tensor], with_gguf: bool) -> list[dict[str, Any]]:
    """Every format on every matrix."""
    rows = []
    for one in contenders(with_gguf):
        restore = one.pop("restore")
        one["relative_error"] = {name: round(relative_error(w, restore(w)), 5) for name, w in matrices.items()}
        print(json.dumps(one), file=sys.stderr, flush=True)
        rows.append(one)
    return rows


def weights_table(rows: list[dict[str, Any]]) -> str:
    """In markdown."""
    names = list(rows[0]["relative_error"])
    lines = [f"| format | bits per weight | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    for row in rows:
        errors = " | ".join(f"{100 * error:.2f} %" for error in row["relative_error"].values())
        lines.append(f"| {row['format']} | {row['bits']:g} | {errors} |")
    return "\n".join(lines)


# ---------------------------------------- the shipped model


def held_out(checkpoint: Checkpoint, limit: int | None) -> list[Document]:
    """The recipe's held-out documents, as recipes/menny/corpus.py writes them, in its order."""
    sys.path.insert(0, str(RECIPE))
    import corpus
    from parts import evaluation_sets

    sums = evaluation_sets.sums(random.Random("sums"))
    numbers = evaluation_sets.numbers(random.Random("numbers"))
    records = corpus.held_out_documents(random.Random("held out"), sums, numbers)
    tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    template = template_for(tokenizer)
    return [tokenize_document(record, tokenizer, template) for record in records[:limit]]


def model_at(checkpoint: Checkpoint, bits: int, method: str) -> Mixtral:
    """The shipped model, its matrices multiplied by octavo.kernels; 16 bits are bfloat16."""
    formats = {} if bits == 16 else preset(bits, checkpoint.names())

    def plain(name: str) -> Tensor:
        return checkpoint.read(name).to(torch.float32).contiguous()

    def weight(name: str) -> Weight:
        w = checkpoint.read(name)
        return quantize(w, FORMATS[formats[name]], method) if name in formats else w.to(torch.bfloat16).contiguous()

    return assemble(checkpoint.args, plain, weight)


def bits_per_parameter(checkpoint: Checkpoint, bits: int) -> float:
    """Of the whole model, with what is kept in bfloat16, and with padding."""
    shapes = canonical_shapes(checkpoint.args)
    formats = {} if bits == 16 else preset(bits, shapes)
    nbytes = sum(
        FORMATS[formats[name]].nbytes(*shape) if name in formats else 2 * math.prod(shape)
        for name, shape in shapes.items()
    )
    return 8 * nbytes / checkpoint.args.n_params


@dataclass
class Tally:
    """Sums over documents; lists have one number a document.

    Attributes:
        nats: of the tokens the model speaks (replies and plain text), as ship.py has them.
        nats_all: of every token.
        kl: KL(bf16 || this) summed over the places of spoken tokens.
        kl_all: over every place.
        agree: spoken places where both models like the same token best.
    """

    nats: list[float]
    nats_all: float = 0.0
    kl: float = 0.0
    kl_all: float = 0.0
    agree: int = 0

    def add(self, logits_TV: Tensor, base_TV: Tensor, targets_T: Tensor, spoken_T: Tensor) -> None:
        """Count a document: this model's logits and the bfloat16 model's log-probabilities."""
        logprobs_TV = log_softmax(logits_TV.double(), -1)
        losses_T = nll_loss(logprobs_TV, targets_T, reduction="none")
        kl_T = kl_div(logprobs_TV, base_TV, reduction="none", log_target=True).sum(-1)
        same_T = logprobs_TV.argmax(-1) == base_TV.argmax(-1)
        self.nats.append(float(losses_T[spoken_T].sum()))
        self.nats_all += float(losses_T.sum())
        self.kl += float(kl_T[spoken_T].sum())
        self.kl_all += float(kl_T.sum())
        self.agree += int(same_T[spoken_T].sum())


@torch.inference_mode()
def judge(models: dict[str, Mixtral], base: str, documents: Iterable[Document]) -> dict[str, Any]:
    """Let every model read every document; all are compared with the model called ``base``."""
    tallies = {name: Tally([]) for name in models}
    spoken_tokens: list[int] = []
    all_tokens = 0
    for document in documents:
        ids = torch.tensor([list(document.ids)])[:, : models[base].args.max_seq_len]
        targets_T = ids[0, 1:]
        spoken_T = torch.tensor([kind == SPOKEN for kind in document.kinds[1 : ids.shape[1]]])
        base_TV = log_softmax(models[base](ids[:, :-1])[0].double(), -1)
        for name, model in models.items():
            tallies[name].add(model(ids[:, :-1])[0], base_TV, targets_T, spoken_T)
        spoken_tokens.append(int(spoken_T.sum()))
        all_tokens += len(targets_T)
    tokens = sum(spoken_tokens)
    reference = np.array(tallies[base].nats)
    precisions = {}
    for name, tally in tallies.items():
        more = np.array(tally.nats) - reference
        precisions[name] = {
            "perplexity": round(math.exp(sum(tally.nats) / tokens), 5),
            "ratio": round(math.exp(more.sum() / tokens), 5),
            "ratio_standard_error": round(float(more.std(ddof=1) * math.sqrt(len(more)) / tokens), 5),
            "perplexity_all": round(math.exp(tally.nats_all / all_tokens), 5),
            "kl": round(tally.kl / tokens, 7),
            "kl_all": round(tally.kl_all / all_tokens, 7),
            "same_first_choice": round(tally.agree / tokens, 5),
        }
    return {
        "documents": len(spoken_tokens),
        "tokens": {"all": all_tokens, "spoken": tokens},
        "precisions": precisions,
    }


def shipped_quality(checkpoint: Checkpoint, limit: int | None) -> dict[str, Any]:
    """The shipped model at every precision."""
    base = "16, bfloat16"
    rows: dict[str, tuple[int, Mixtral]] = {base: (16, model_at(checkpoint, 16, METHODS[0]))}
    for bits in (8, 4, 3, 2):
        for method in METHODS if bits < 8 else METHODS[:1]:
            rows[f"{bits}, {method}" if bits < 8 else str(bits)] = (bits, model_at(checkpoint, bits, method))
    rows["16, float32 arithmetic, torch"] = (16, load_model(shipped_model(), dtype="float32")[0])
    report = judge({name: model for name, (_, model) in rows.items()}, base, held_out(checkpoint, limit))
    for name, (bits, _) in rows.items():
        report["precisions"][name]["bits_per_parameter"] = round(bits_per_parameter(checkpoint, bits), 3)
    return report


def model_table(report: dict[str, Any]) -> str:
    """In markdown."""
    lines = [
        "| bits, method | bits per parameter | perplexity | ratio to bfloat16 | KL(bfloat16, this), nats per token |"
        " same first choice |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in report["precisions"].items():
        ratio = f"{row['ratio']:.4f} ± {row['ratio_standard_error']:.4f}" if row["kl"] else "1"
        lines.append(
            f"| {name} | {row['bits_per_parameter']:.2f} | {row['perplexity']:.4f} | {ratio} | {row['kl']:.6f} |"
            f" {100 * row['same_first_choice']:.2f} % |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print the tables, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=SIZE, help="of the random matrices")
    parser.add_argument("--documents", type=int, help="only so many of the held-out documents")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    missing = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{' and '.join(missing)} not installed: GGUF's formats are left out", file=sys.stderr)
    checkpoint = open_checkpoint(shipped_model())
    matrices = random_matrices(options.rows) | {"Menny's experts": shipped_experts(checkpoint)}
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "kernels": backend().name,
        "torch": torch.__version__,
        "matrices": {name: list(w.shape) for name, w in matrices.items()},
        "weights": weight_errors(matrices, with_gguf=not missing),
        "menny": shipped_quality(checkpoint, options.documents),
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    tokens = report["menny"]["tokens"]
    print(f"Relative weight error, root mean square:\n\n{weights_table(report['weights'])}\n")
    print(f"Menny, {tokens['spoken']} held-out tokens of replies and plain text:\n\n{model_table(report['menny'])}")


if __name__ == "__main__":
    main()
