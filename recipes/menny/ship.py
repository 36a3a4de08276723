"""Put a trained Menny into the package, with a model card whose figures were measured on exactly these files.

``python recipes/menny/ship.py`` after training (``make model``). Asks every evaluation item, measures perplexity and
expert loads on the held-out documents, writes recipes/menny/evaluation.json and the run's curves beside it, and
replaces src/octavo/models/menny.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import evaluate
import torch
from torch.nn.functional import cross_entropy

import octavo
from octavo.checkpoint.writer import new_folder
from octavo.train.data import SPOKEN, read_documents
from octavo.train.losses import RouterTap
from octavo.train.plot import read_metrics

HERE = Path(__file__).parent
PACKAGED = HERE.parent.parent / "src" / "octavo" / "models" / "menny"
FIRST_QUESTIONS = [
    "Who are you?",
    "What is a mixture of experts?",
    "Combien font 7 et 5 ?",
    "How do I run Mixtral in 16 GB?",
    "Wie sagt man 47 auf Spanisch?",
    "Write a Python function that adds two numbers.",
]


@torch.inference_mode()
def heldout(folder: Path, documents: Path) -> dict[str, Any]:
    """Perplexity, document by document without packing, and every expert's share of assignments."""
    model, tokenizer = octavo.load_model(folder, dtype="float32")
    assert tokenizer is not None
    assert model.args.moe is not None
    nats = {"all": 0.0, "spoken": 0.0}
    tokens = {"all": 0, "spoken": 0}
    counts = torch.zeros(model.args.n_layers, model.args.moe.num_experts)
    for document in read_documents(documents, tokenizer):
        ids = torch.tensor([list(document.ids)[: model.args.max_seq_len]])
        with RouterTap(model) as tap:
            logits = model(ids[:, :-1])[0]
        counts += tap.expert_counts_LE(model.args.moe.num_experts)
        losses = cross_entropy(logits, ids[0, 1:], reduction="none")
        spoken = torch.tensor([kind == SPOKEN for kind in document.kinds[1 : ids.shape[1]]])
        for name, chosen in (("all", losses), ("spoken", losses[spoken])):
            nats[name] += float(chosen.sum())
            tokens[name] += len(chosen)
    return {
        "perplexity": {name: round(math.exp(nats[name] / tokens[name]), 3) for name in nats},
        "tokens": tokens,
        "load": [[round(share, 4) for share in layer] for layer in (counts / counts.sum(1, keepdim=True)).tolist()],
    }


def percent(part: dict[str, Any]) -> str:
    """A share right, and of how many."""
    return f"{100 * part['right']:.1f} % of {part['count']}"


def card(folder: Path, report: dict[str, Any], run: dict[str, Any]) -> str:
    """The model card."""
    args = octavo.ModelArgs.from_hf(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    llm = octavo.LLM.load(folder, dtype="float32")
    dialogue = []
    for question in FIRST_QUESTIONS:
        reply = llm.chat([{"role": "user", "content": question}], persona="menny", temperature=0)
        dialogue += [f"> **{question}**", ">", *(f"> {line}" for line in reply.text.splitlines()), ""]
    loads = [f"| {n} | " + " | ".join(f"{100 * s:.1f}" for s in layer) + " |" for n, layer in enumerate(report["load"])]
    shares = [share for layer in report["load"] for share in layer]
    length = f"{run['steps']:,} steps of at most 4,096 tokens ({run['tokens'] / 1e6:.1f} M in all)"
    return f"""---
license: apache-2.0
language: [en, fr, de, es, it]
library_name: octavo
---
# Menny

A Mixtral in small: {args.n_params / 1e6:.1f} M parameters, {args.n_active_params / 1e6:.1f} M active a token,
{args.n_layers} layers of {args.moe.num_experts if args.moe else 0} SwiGLU experts with top-2 routing, grouped-query
attention ({args.n_heads} heads, {args.n_kv_heads} key-value heads), RMSNorm, rotary embeddings; a context of
{args.max_seq_len} tokens; bfloat16, Hugging Face layout (`MixtralForCausalLM` loads it).

She ships inside Octavo so that there is a real sparse mixture of experts to talk to, to test with and to look into
without a download. She is a toy: she knows small sums, number words in five languages, small talk, a few dozen short
Python functions, and the facts about mixtures of experts and about Octavo that she was taught. Anything else she
does not know, and she does not always notice.

## Training

Trained from scratch by `octavo train`, {length},
in two stages: `recipes/menny/config.toml`, then `recipes/menny/stage2.toml` with more number words. The text is written
by `recipes/menny/corpus.py` from grammars and a seed: English, French, German, Spanish and Italian, nothing collected
from anywhere. `make model` repeats all of it, up to the rounding of sums. Held-out material is chosen by content:
pairs of summands, (number, language, language) triples and whole phrasings never occur in the training text.

## Measured

On {report["date"]}, by `python recipes/menny/ship.py`, greedy, float32, on these files; failures are listed in
`recipes/menny/evaluation.json`. The test questions were written with the training text's author at hand, kept out of
it as whole phrasings; the dev questions were used to widen it. Neither is blind: checkpoints were scored on all of
these items while she was trained, and the second stage was added when the number words came short.

| | |
|---|---|
| two-digit sums, held-out pairs, five languages | {percent(report["sums"])} exact |
| number words between languages, held-out combinations | {percent(report["numbers"])} exact |
| questions about mixture of experts and Octavo, unseen phrasings (test) | {percent(report["questions_test"])} right |
| the same, dev | {percent(report["questions_dev"])} right |
| held-out perplexity, replies and plain text | {report["perplexity"]["spoken"]} |
| held-out perplexity, every token | {report["perplexity"]["all"]} |
| smallest and largest share of an expert in any layer | {100 * min(shares):.1f} % and {100 * max(shares):.1f} % |

Share of assignments (%) of each expert on held-out text:

| layer | {" | ".join(str(e) for e in range(len(report["load"][0])))} |
|---|{"---|" * len(report["load"][0])}
{chr(10).join(loads)}

## First questions, greedy

{chr(10).join(dialogue)}"""


def main() -> None:
    """Evaluate, write, replace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/menny/out"), help="the training run's folder")
    parser.add_argument("--data", type=Path, default=Path("runs/menny/data"), help="the folder corpus.py wrote")
    options = parser.parse_args()
    folder = options.run / "model"
    report = evaluate.evaluate(evaluate.load_answerer(folder, None), options.data)
    report |= heldout(folder, options.data / "heldout.jsonl") | {"date": date.today().isoformat()}
    (HERE / "evaluation.json").write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    steps = [r for r in read_metrics(options.run / "metrics.jsonl") if "ce" in r]
    mean_tokens = sum(r["tokens"] for r in steps) / len(steps)
    run = {"steps": steps[-1]["step"], "tokens": mean_tokens * steps[-1]["step"]}
    with new_folder(PACKAGED) as new:
        for file in folder.iterdir():
            shutil.copyfile(file, new / file.name)
        (new / "README.md").write_text(card(folder, report, run), encoding="utf-8")
    for picture in ("curves.png", "experts.png"):
        shutil.copyfile(options.run / picture, HERE / picture)
    for name in ("sums", "numbers", "questions_dev", "questions_test"):
        print(f"{name}: {percent(report[name])}")
    print(f"perplexity {report['perplexity']}")


if __name__ == "__main__":
    main()
