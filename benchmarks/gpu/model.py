"""Prefill and decode of the whole model at one precision, beside the card's limits: `octavo bench` for several sizes.

    python benchmarks/gpu/model.py --bits 16 --runs planned batch-64 prefill

Weights are made once; every run has an engine of its own.

Runs:
    planned      batch 1, as a person has it who gives --gpu-memory: beside the plan's memory
    batch-N      N sequences side by side
    prefill      a prompt of 2,048 tokens, read at once
"""

from __future__ import annotations

from common import forget, log, options, setting

from octavo.bench.card import WATCHED, CardBench, card_plan
from octavo.bench.measure import context_for
from octavo.bench.synthetic import card_model

PROMPT, LONG_PROMPT, DECODE = 512, 2048, 128
STEPS_OF_PREFILL = 4  # of decoding, where the prompt is what counts


def main() -> None:
    """Measure, run after run."""
    parser = options(__doc__)
    parser.add_argument("--bits", type=int, required=True, choices=(16, 8, 4))
    parser.add_argument("--runs", nargs="+", default=["planned"])
    chosen = parser.parse_args()
    where = setting(chosen)
    prompt, long_prompt, decode = (2, 3, 2) if where.tiny else (PROMPT, LONG_PROMPT, DECODE)
    context = context_for(where.args, prompt, decode + WATCHED, 1)
    plan = card_plan(where.args, where.device, chosen.bits, context, 1)
    model = card_model(where.args, chosen.bits, where.device)
    log(f"{chosen.bits} bits: weights are made")
    for run in chosen.runs:
        batch = int(run.removeprefix("batch-")) if run.startswith("batch-") else 1
        bench = CardBench(
            model,
            long_prompt if run == "prefill" else prompt,
            STEPS_OF_PREFILL if run == "prefill" else decode,
            batch,
            plan if run == "planned" else None,
            sizes=where.sizes,
        )
        where.tell(f"model-{chosen.bits}-{run}", {"bits": chosen.bits} | bench.run())
        forget()


if __name__ == "__main__":
    main()
