"""transformers' Mixtral on the same card: bfloat16, the full shape, random weights made where they lie.

    python benchmarks/gpu/transformers_peer.py --ways grouped_mm batched_mm --compile

Ways are transformers' experts implementations: `grouped_mm`, `batched_mm` and `eager`, a loop over experts. The cache
is its static one. With --compile each is measured compiled too (torch.compile, mode "reduce-overhead", which replays
CUDA graphs); where that does not work, the line says why. Prompts and replies are as long as model.py's. Weights are
made once.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from common import Setting, fill_random, forget, log, options, setting, time_peer
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, StaticCache

try:
    from transformers.initialization import no_init_weights
except ImportError:  # transformers before 5.1
    from transformers.modeling_utils import no_init_weights

PROMPT, DECODE = 2048, 64
WAYS = ("grouped_mm", "batched_mm", "eager")


def make(where: Setting) -> MixtralForCausalLM:
    """The model on the card, without a byte of it on the host."""
    config = MixtralConfig(**where.args.to_hf())
    with no_init_weights(), where.device:
        model = MixtralForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    fill_random(model)
    return model


@torch.no_grad()
def measure(
    model: MixtralForCausalLM, way: str, compiled: bool, where: Setting, sizes: tuple[int, int]
) -> dict[str, Any]:
    """Prefill and decoding by one experts implementation; decoding alone where it is compiled."""
    torch._dynamo.reset()
    model.set_experts_implementation(way)
    prompt, decode = sizes
    length = max(prompt, decode + 32) + 8
    cache = StaticCache(config=model.config, max_cache_len=length)
    forward = torch.compile(model.forward, mode="reduce-overhead") if compiled else model.forward
    seen = 0

    def read(ids: Tensor) -> None:
        nonlocal seen
        step = forward if ids.shape[1] == 1 else model.forward  # prompts of any length are not compiled for each
        at = torch.arange(seen, seen + ids.shape[1], device=where.device)
        if compiled:
            torch.compiler.cudagraph_mark_step_begin()
        out = step(ids, position_ids=at[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        seen += ids.shape[1]
        if seen in (16, prompt) and not torch.isfinite(out.logits).all():
            raise SystemExit("transformers: the logits are not finite")
        out.logits[0, -1].argmax().item()  # a token is not there before it can be read

    def begin_anew() -> None:
        nonlocal seen
        seen = 0
        cache.reset()

    return time_peer(read, begin_anew, where, 0 if compiled else prompt, decode)


def main() -> None:
    """Measure, way after way."""
    parser = options(__doc__)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--compile", action="store_true", help="each way compiled too, where that works")
    chosen = parser.parse_args()
    where = setting(chosen)
    sizes = (20, 4) if where.tiny else (PROMPT, DECODE)
    model = make(where)
    log("transformers: weights are made")
    for compiled in (False, True) if chosen.compile else (False,):
        for way in chosen.ways:
            step = f"transformers-{way}{'-compiled' if compiled else ''}"
            if compiled and not where.has_graphs:
                where.skip(step, "CUDA graphs need a card")
                continue
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = measure(model, way, compiled, where, sizes)
            except Exception as problem:  # whatever stops theirs is told, and the next way is measured
                where.tell(step, {"failed": f"{type(problem).__name__}: {str(problem).splitlines()[:1]}"})
            else:
                where.tell(step, found | where.limits())
            forget()


if __name__ == "__main__":
    main()
