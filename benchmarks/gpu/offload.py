"""4 bits within budgets of the card's memory: experts come from the host's, beside what the link and the hits allow.

    python benchmarks/gpu/offload.py --budgets 24GiB 16GiB 12GiB

First all experts lie on the card, then all of them go through a cache that has room for all, then the budgets. The
experts lie in pinned memory of the host: 25 GB.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from common import Setting, forget, log, options, setting

from octavo.bench.card import WATCHED, CardBench, card_plan
from octavo.bench.measure import context_for
from octavo.bench.synthetic import card_model
from octavo.plan import parse_size
from octavo.plan_card import CardPlacement, CardPlan

BITS, PROMPT, DECODE = 4, 512, 128
BUDGETS = ("24GiB", "16GiB", "12GiB", "8GiB")


def measure(where: Setting, plan: CardPlan, prompt: int, decode: int) -> dict[str, Any]:
    """One placement, with weights of its own, which are gone afterwards."""
    model = card_model(where.args, BITS, where.device, placement=plan.placement)
    log(f"weights are made; {'all on the card' if plan.placement is None else plan.placement}")
    return {"bits": BITS} | CardBench(model, prompt, decode, 1, plan, sizes=where.sizes).run()


def main() -> None:
    """Measure, placement after placement."""
    parser = options(__doc__)
    parser.add_argument("--budgets", nargs="*", default=BUDGETS)
    chosen = parser.parse_args()
    where = setting(chosen)
    prompt, decode = (2, 2) if where.tiny else (PROMPT, DECODE)
    context = context_for(where.args, prompt, decode + WATCHED, 1)
    resident = card_plan(where.args, where.device, BITS, context, 1)
    expert, moe = resident.weights.expert, where.args.moe
    assert moe is not None
    slots = where.args.n_layers * moe.num_experts
    everything = dataclasses.replace(resident, placement=CardPlacement(slots * expert, slots))
    where.tell("offload-resident", measure(where, resident, prompt, decode))
    forget()
    where.tell("offload-everything-fits", measure(where, everything, prompt, decode))
    forget()
    if where.tiny:  # a budget of a process would be a gigabyte
        half = dataclasses.replace(resident, placement=CardPlacement(slots // 2 * expert, slots // 2))
        where.tell("offload-half", measure(where, half, prompt, decode))
        return
    for budget in chosen.budgets:
        plan = card_plan(where.args, where.device, BITS, context, 1, parse_size(budget))
        where.tell(f"offload-{budget}", measure(where, plan, prompt, decode))
        forget()


if __name__ == "__main__":
    main()
