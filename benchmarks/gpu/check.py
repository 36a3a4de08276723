"""Is it right? Every kernel beside a reference in higher precision, then tiny models on the card beside the CPU.

    python benchmarks/gpu/check.py [--parts kernels bits graphs cached parity]

Inputs are fresh random numbers (--seed), and outputs are made in memory that is full of NaN, so that what is not
written shows. The exit code is 1 where anything is wrong; every line says what was compared and how far off it was.

Parts:
    kernels   products and experts at the model's sizes, for 1 to 64 tokens, at 16, 8 and 4 bits, beside float64
    bits      low-bit products have the bits of the CPU's compiled kernels, and of themselves one token at a time
    graphs    a recorded graph that is replayed on other inputs has the bits of launches one by one
    cached    the engine's tokens with all experts on the card and with half of them in the host's memory
    parity    tiny models of all of tests/test_parity.py's configurations, logits on the card beside the CPU's
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Setting, error, forget, log, options, replayed, setting
from torch import Tensor

from octavo import kernels
from octavo.bench.synthetic import card_model, random_packed
from octavo.checkpoint import open_checkpoint
from octavo.engine import Engine
from octavo.experts import record
from octavo.kernels import ops
from octavo.kernels.card import CardExperts, linear, moe, moe_into, to_card
from octavo.kernels.reference import Weight, rounded
from octavo.load import build_model, build_on_card
from octavo.model import Mixtral
from octavo.plan import weights_at
from octavo.plan_card import CardPlacement
from octavo.quant.formats import FORMATS, Packed
from octavo.quant.quantize import dequantize
from octavo.sampling import SamplingParams

NEAR = 5e-3
"""The relative error allowed of results that are rounded to bfloat16. Low-bit products are compared with exact
ones of the same rounded activations; between an expert's two halves a rounding may tip over."""
TOKENS = (1, 2, 5, 8, 17, 64, 300)
"""Few, as decoding has, odd ones, and a prompt's. Each has kernels of its own, which take seconds to be compiled."""
MOST_ON_HOST = 60 << 30
"""Bytes of experts in the host's memory."""
PARITY = 5e-2
"""Of a token's logits, in a model of three layers whose numbers are rounded to bfloat16 on both sides."""
PARTS = ("kernels", "bits", "graphs", "cached", "parity")
TESTS = Path(__file__).parents[2] / "tests"


class Report:
    """What is compared, at which bits and numbers of tokens, and how many comparisons were wrong."""

    def __init__(self, where: Setting, bits: list[int], tokens: list[int]) -> None:
        self.where, self.bits, self.tokens, self.failed = where, bits, tokens, 0

    def near(self, step: str, found: Tensor, expected: Tensor, most: float) -> None:
        """Tell the error; a NaN is too large."""
        self.told(step, bool((off := error(found, expected)) <= most), error=off, most=most)

    def same(self, step: str, found: Tensor, expected: Tensor) -> None:
        """Tell whether all bits agree, and how many numbers don't."""
        differ = int((found != expected).sum()) + int(found.isnan().sum())
        self.told(step, differ == 0, differ=differ, of=found.numel())

    def told(self, step: str, right: bool, **figures: float) -> None:
        """Tell anything."""
        self.failed += not right
        self.where.tell(f"check-{step}", {"right": right} | figures)


def poison(where: Setting, nbytes: int) -> None:
    """Leave NaN in the memory that the next tensors get."""
    torch.full((nbytes // 4 + 1,), torch.nan, device=where.device)


def random_weight(rows: int, cols: int, bits: int, where: Setting) -> Weight:
    """A matrix on the device with a variance of 1 / cols."""
    if bits == 16:
        return (torch.randn(rows, cols, device=where.device) * cols**-0.5).to(torch.bfloat16)
    data = torch.empty(FORMATS[f"q{bits}"].nbytes(rows, cols), dtype=torch.uint8, device=where.device).random_()
    return random_packed(data, FORMATS[f"q{bits}"], (rows, cols))


def exact(weight: Weight) -> Tensor:
    """A matrix in float64."""
    return (dequantize(weight) if isinstance(weight, Packed) else weight).double()


def seen_by(weight: Weight, x: Tensor) -> Tensor:
    """Activations as products with a matrix see them, in float64."""
    return (rounded(x.float()) if isinstance(weight, Packed) else x.to(torch.bfloat16)).double()


def exact_expert(x_TD: Tensor, w1: Weight, w3: Weight, w2: Weight) -> Tensor:
    """w2(silu(w1 x) * w3 x) in float64, rounded only where the kernels round activations."""
    x = seen_by(w1, x_TD)
    hidden = F.silu(x @ exact(w1).T) * (x @ exact(w3).T)
    return seen_by(w2, hidden.float()) @ exact(w2).T


def random_routing(tokens: int, where: Setting) -> tuple[Tensor, Tensor]:
    """Ids and weights of tokens that choose evenly."""
    moe_args = where.args.moe
    assert moe_args is not None
    scores = torch.rand(tokens, moe_args.num_experts, device=where.device)
    best, ids = scores.topk(moe_args.num_experts_per_tok)
    return ids, best.softmax(-1)


def made_experts(bits: int, where: Setting) -> list[tuple[Weight, Weight, Weight]]:
    """The experts of one layer."""
    args = where.args
    assert args.moe is not None
    up, down = (args.hidden_dim, args.dim), (args.dim, args.hidden_dim)
    return [
        (random_weight(*up, bits, where), random_weight(*up, bits, where), random_weight(*down, bits, where))
        for _ in range(args.moe.num_experts)
    ]


def check_kernels(report: Report, where: Setting) -> None:
    """Products and experts beside float64."""
    args = where.args
    shapes = {(args.hidden_dim, args.dim), (args.dim, args.hidden_dim), (args.vocab_size, args.dim)}
    for bits in report.bits:
        for rows, cols in sorted(shapes):
            weight = random_weight(rows, cols, bits, where)
            matrix, reference = to_card(weight, where.device), exact(weight)
            for tokens in report.tokens:
                x = torch.randn(tokens, cols, device=where.device).to(torch.bfloat16)
                poison(where, tokens * rows * 2)
                name = f"linear-{bits}-{rows}x{cols}-{tokens}"
                report.near(name, linear(x, matrix), seen_by(weight, x) @ reference.T, NEAR)
        forget()
        experts = made_experts(bits, where)
        table = CardExperts([tuple(to_card(w, where.device) for w in expert) for expert in experts])
        for tokens in report.tokens:
            x = torch.randn(tokens, args.dim, device=where.device).to(torch.bfloat16)
            ids, weights = random_routing(tokens, where)
            parts = torch.full((*ids.shape, args.dim), torch.nan, device=where.device)
            moe_into(parts, x, ids, weights, table.table)
            expected = torch.empty_like(parts, dtype=torch.float64)
            for number, expert in enumerate(experts):
                rows_T, places_T = (ids == number).nonzero(as_tuple=True)
                if len(rows_T):
                    out = exact_expert(x[rows_T], *expert) * weights[rows_T, places_T, None].double()
                    expected[rows_T, places_T] = out
            report.near(f"experts-{bits}-{tokens}", parts, expected, NEAR)
            report.near(f"mixture-{bits}-{tokens}", moe(x, ids, weights, table.table), expected.sum(1), NEAR)
        forget()


def on_cpu(weight: Weight) -> Weight:
    """A copy in the CPU's memory."""
    return weight._replace(data=weight.data.cpu()) if isinstance(weight, Packed) else weight.cpu()


def check_bits(report: Report, where: Setting) -> None:
    """Low-bit: the CPU's bits, and those of one token at a time."""
    args = where.args
    compiled = kernels.backend().compiled
    if not compiled:
        where.skip("check-bits-cpu", f"no compiled kernels: {kernels.backend().reason}")
    for bits in sorted({8, 4} & set(report.bits)):
        weight = random_weight(args.hidden_dim, args.dim, bits, where)
        matrix, experts = to_card(weight, where.device), made_experts(bits, where)
        table = CardExperts([tuple(to_card(w, where.device) for w in expert) for expert in experts]).table
        if compiled:
            cpu_matrix = ops.Matrix(on_cpu(weight))
            cpu_experts = ops.ExpertSet([tuple(on_cpu(w) for w in expert) for expert in experts])
        for tokens in report.tokens:
            x = torch.randn(tokens, args.dim, device=where.device).to(torch.bfloat16)
            ids, weights = random_routing(tokens, where)
            product, mixture = linear(x, matrix), moe(x, ids, weights, table)
            alone = torch.cat([linear(x[i : i + 1], matrix) for i in range(tokens)])
            report.same(f"alone-linear-{bits}-{tokens}", product, alone)
            one_by_one = [moe(x[i : i + 1], ids[i : i + 1], weights[i : i + 1], table) for i in range(tokens)]
            report.same(f"alone-mixture-{bits}-{tokens}", mixture, torch.cat(one_by_one))
            if compiled:
                report.same(f"cpu-linear-{bits}-{tokens}", product.cpu(), ops.linear(x.cpu(), cpu_matrix))
                there = (x.cpu(), ids.cpu(), weights.cpu())
                report.same(f"cpu-mixture-{bits}-{tokens}", mixture.cpu(), ops.moe(*there, cpu_experts))
        forget()


def check_graphs(report: Report, where: Setting) -> None:
    """A graph of experts, replayed with other tokens and other choices."""
    if not where.has_graphs:
        where.skip("check-graphs", "CUDA graphs need a card")
        return
    for bits in report.bits:
        experts = [tuple(to_card(w, where.device) for w in expert) for expert in made_experts(bits, where)]
        table = CardExperts(experts).table
        for tokens in (1, 8, 64):
            x = torch.randn(tokens, where.args.dim, device=where.device).to(torch.bfloat16)
            ids, weights = random_routing(tokens, where)
            out = torch.empty_like(x)

            def work(out: Tensor = out, inputs: tuple[Tensor, Tensor, Tensor] = (x, ids, weights)) -> None:
                out.copy_(moe(*inputs, table))  # noqa: B023

            replay = replayed(work, where)
            for turn in range(3):
                new_ids, new_weights = random_routing(tokens, where)
                x.copy_(torch.randn_like(x))
                ids.copy_(new_ids)
                weights.copy_(new_weights)
                out.fill_(torch.nan)
                replay()
                report.same(f"graph-{bits}-{tokens}-{turn}", out, moe(x, ids, weights, table))
        forget()


def tokens_of(model: Mixtral, batch: int, steps: int) -> Tensor:
    """What an engine draws for some prompts."""
    engine = Engine(model, max_batch_size=batch, context=steps + 64, whole_cache=True)
    generator = torch.Generator().manual_seed(5)
    ids: dict[int, list[int]] = {}
    for row in range(batch):
        prompt = torch.randint(0, model.args.vocab_size, (5 + 3 * row,), generator=generator).tolist()
        ids[engine.add(prompt, SamplingParams(max_tokens=steps, temperature=1.0, seed=row))] = []
    while engine.has_work:
        for event in engine.step():
            if event.error:
                raise event.error
            ids[event.seq_id].append(int(event.token_id))
    return torch.tensor([ids[key] for key in sorted(ids)])


def check_cached(report: Report, where: Setting) -> None:
    """Placement never changes tokens."""
    args, steps = where.args, 8 if where.tiny else 48
    assert args.moe is not None
    number = args.n_layers * args.moe.num_experts
    for bits in report.bits:
        expert = weights_at(args, bits).expert
        if number * expert > MOST_ON_HOST:
            where.skip(f"check-cached-{bits}", "the host would hold too much; --layers 8 takes less")
            continue
        expected = {}
        for slots in (None, number, number // 2, args.moe.num_experts):
            placement = None if slots is None else CardPlacement(slots * expert, slots)
            model = card_model(args, bits, where.device, placement=placement)
            for batch in (1, 3):
                found = tokens_of(model, batch, steps)
                expected.setdefault(batch, found)
                if slots is not None:
                    report.same(f"cached-{bits}-{slots}-{batch}", found, expected[batch])
            del model
            forget()


def run_recorded(model: Mixtral, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, T, V] on the CPU, and the experts that routers chose [B, T, layers, K], by number."""
    with record(model) as recording:
        logits = model(ids_BT.to(model.device)).cpu()
    chosen = [routing.topk_ids_TK.cpu().sort().values for routing in recording.forwards[0]]
    return logits, torch.stack(chosen, 1).unflatten(0, ids_BT.shape)


def compare(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Errors of tokens, relative: the most up to where a sequence's routing differs, and the median of all.

    Where two scores are close, rounding decides between experts; from there on a sequence is another one.
    """
    errors_BT = (found[0] - expected[0]).norm(dim=-1) / expected[0].norm(dim=-1)
    alike_BT = (found[1] == expected[1]).flatten(2).all(2).cumprod(1).bool()
    return {
        "most": float(errors_BT[alike_BT].max()) if alike_BT.any() else torch.nan,
        "median": float(errors_BT.median()),
        "alike": float(alike_BT.float().mean()),
    }


def check_parity(report: Report, where: Setting) -> None:
    """All configurations of the parity tests, as transformers wrote them: bfloat16 on the card and on the CPU."""
    sys.path.insert(0, str(TESTS))
    from test_parity import CONFIGS, mixtral

    for name in list(CONFIGS)[:1] if where.tiny else CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            mixtral(CONFIGS[name], seed=sum(name.encode())).save_pretrained(folder)
            checkpoint = open_checkpoint(folder)
            ids = torch.randint(3, 97, (3, 37), generator=torch.Generator().manual_seed(1))
            exact = run_recorded(build_model(checkpoint, dtype="float32", device="cpu"), ids)
            cpu = run_recorded(build_model(checkpoint, dtype="bfloat16", device="cpu", kernels=True), ids)
            card = run_recorded(build_on_card(checkpoint, where.device, torch.bfloat16), ids)
        off, lost, loses = compare(card, cpu), compare(cpu, exact), compare(card, exact)
        right = off["most"] <= PARITY and off["median"] <= PARITY and loses["median"] <= 1.5 * lost["median"]
        figures = {"most": off["most"], "median": off["median"], "alike": off["alike"]}
        report.told(f"parity-{name}", right, **figures, median_of_cpu=lost["median"], median_of_card=loses["median"])


def steps(chosen: list[str]) -> Iterator[Callable[[Report, Setting], None]]:
    """The functions of the parts."""
    for part in chosen:
        yield globals()[f"check_{part}"]


def main() -> None:
    """Check, and end with 1 where something is wrong."""
    parser = options(__doc__)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 8, 4], choices=(16, 8, 4))
    parser.add_argument("--seed", type=int, help="of all inputs; a new one every time by default")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="at a time")
    chosen = parser.parse_args()
    where = setting(chosen)
    seed = torch.seed() % 2**31 if chosen.seed is None else chosen.seed
    torch.manual_seed(seed)
    log(f"--seed {seed}")
    report = Report(where, chosen.bits, chosen.tokens)
    with torch.inference_mode():
        for step in steps(chosen.parts):
            step(report, where)
    where.tell("check", {"parts": list(chosen.parts), "seed": seed, "failed": report.failed})
    raise SystemExit(1 if report.failed else 0)


if __name__ == "__main__":
    main()
