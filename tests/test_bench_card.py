"""`octavo bench` on a card, and the scripts of benchmarks/gpu: their logic, on this CPU by Triton's interpreter."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import quick_triton  # noqa: F401
from conftest import tiny_args
from octavo.args import ModelArgs, MoEArgs
from octavo.bench import card, measure
from octavo.bench.card import CardBench, card_plan, step_nbytes
from octavo.bench.limits import MemoryWatch, Sizes, copy_bandwidth, link_bandwidth, matrix_rate, seconds_of
from octavo.bench.synthetic import card_model, synthetic_model
from octavo.errors import OptionError
from octavo.experts.card import CachedExperts
from octavo.kernels.card import CardExperts, CardLinear
from octavo.model import Mixtral
from octavo.plan import read_of_step, touched_experts, weights_at
from octavo.plan_card import CardPlacement
from octavo.quant.formats import Packed
from octavo.quant.quantize import dequantize
from run_octavo import refused, run

CPU = torch.device("cpu")
SCRIPTS = Path(__file__).parents[1] / "benchmarks" / "gpu"
LIMITS = Sizes(copy=1 << 12, matrix=16, link=1 << 12, repeats=2)
FIGURES = ("prefill_tok_s", "decode_tok_s", "bytes_per_token", "copy_limit_gbs", "decode_fraction_of_limit")
MORE = ("matrix_limit_tflops", "prefill_fraction_of_limit", "prefill_cold_seconds", "peak_rss_bytes")
needs_no_card = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card, which is then used")


def args_of(**changes: object) -> ModelArgs:
    """One small layer: the interpreter takes milliseconds for every line of a kernel."""
    small = {"n_layers": 1, "vocab_size": 16, "hidden_dim": 16, "n_heads": 2, "n_kv_heads": 1, "moe": MoEArgs(4, 2)}
    return tiny_args(**(small | changes))


@pytest.fixture
def _briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure may come of one measurement here."""
    monkeypatch.setattr(card, "PREFILLS", 1)
    monkeypatch.setattr(card, "WATCHED", 1)
    monkeypatch.setattr(measure, "SHORT", 1)


# ---------------------------------------- limits


def test_limits_count_what_is_moved_and_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(limit(CPU, LIMITS) > 0 for limit in (copy_bandwidth, matrix_rate, link_bandwidth))
    monkeypatch.setattr("octavo.bench.limits.seconds_of", lambda work, device, repeats: work() is None or 0.5)
    assert copy_bandwidth(CPU, LIMITS) == 2 * (2 * 4096)  # read and written
    assert matrix_rate(CPU, LIMITS) == 2 * (2 * 16**3)
    assert link_bandwidth(CPU, LIMITS) == 2 * 4096


def test_seconds_are_of_one_time_without_the_first() -> None:
    calls = []
    assert 0 <= seconds_of(lambda: calls.append(1), CPU, 5) < 1
    assert len(calls) == 6


def test_a_cpu_has_no_memory_of_a_card() -> None:
    watch = MemoryWatch(CPU)
    with watch.aside():
        torch.zeros(1000)
    watch.note()
    assert (watch.allocated, watch.used) == (0, 0)


# ---------------------------------------- random weights


def weights_of(model: Mixtral) -> dict[str, torch.Tensor]:
    """Every matrix and parameter, of experts in the cache's memory those of the host."""
    found = {name: parameter.data for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, CardLinear):
            found[name] = module.matrix.data
        elif isinstance(module, CardExperts):
            for number, expert in enumerate(module._alive):
                found[f"{name}.{number}"] = torch.cat([matrix.data.flatten().view(torch.uint8) for matrix in expert])
        elif isinstance(module, CachedExperts):
            for number in range(module.n_experts):
                found[f"{name}.{number}"] = module.cache._host[module.layer, number].data
    return found


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_random_weights_are_the_same_for_a_seed_wherever_experts_are(bits: int) -> None:
    args = args_of(n_layers=2)
    expert = weights_at(args, bits).expert
    one, again, other = (weights_of(card_model(args, bits, CPU, seed)) for seed in (5, 5, 6))
    cached = weights_of(card_model(args, bits, CPU, 5, CardPlacement(3 * expert, 3)))
    assert one.keys() == again.keys() == cached.keys()
    for name, value in one.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value.flatten(), cached[name].flatten())
        assert torch.equal(value, other[name]) == name.endswith("norm.weight")
    assert not torch.equal(one["layers.0.feed_forward.experts.0"], one["layers.0.feed_forward.experts.1"])
    assert not torch.equal(one["layers.0.attention.wq"], one["layers.1.attention.wq"])


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_random_weights_are_spread_as_those_of_synthetic_models(bits: int) -> None:
    args = args_of(dim=128, hidden_dim=128, head_dim=64, vocab_size=256)

    def spread(model: Mixtral) -> dict[str, float]:
        found = {name: float(p.float().std()) for name, p in model.named_parameters() if p.dim() == 2}
        for name, module in model.named_modules():
            if hasattr(module, "matrix"):
                matrix = module.matrix
                if isinstance(module, CardLinear):
                    kind, data = matrix.kind, matrix.data
                    shape = (kind.rows, kind.cols)
                    weight = data if kind.format is None else dequantize(Packed(data, kind.format, shape))
                else:
                    weight = matrix.weight if bits == 16 else dequantize(matrix.weight)
                found[name] = float(weight.float().std())
        return found

    made, expected = spread(card_model(args, bits, CPU)), spread(synthetic_model(args, bits))
    assert made.keys() == expected.keys()
    assert len(made) == 7
    for name, value in made.items():
        assert value == pytest.approx(expected[name], rel=0.05)
        assert value == pytest.approx(1 if name == "tok_embeddings.weight" else 128**-0.5, rel=0.1)


def test_bits_that_a_card_does_not_compute_with_are_refused() -> None:
    with pytest.raises(OptionError, match="q3"):
        card_model(args_of(), 3, CPU)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}], ids=["own", "tied"])
def test_bytes_of_a_step_are_those_of_the_plan(bits: int, changes: dict[str, Any]) -> None:
    args = args_of(n_layers=2, **changes)
    weights = weights_at(args, bits)
    expected = read_of_step(weights, touched_experts(args, 1)) + (weights.embedding if args.tie_embeddings else 0)
    placements = (None, CardPlacement(4 * weights.expert, 4))
    for placement in placements:
        model = card_model(args, bits, CPU, placement=placement)
        assert step_nbytes(model, 2) == expected
        assert step_nbytes(model, 3) - step_nbytes(model, 2) == 2 * weights.expert


# ---------------------------------------- measuring


@pytest.mark.usefixtures("_briefly")
def test_every_figure_with_all_experts_on_the_card() -> None:
    args = args_of()
    plan = card_plan(args, CPU, 16, 64, 2)
    model = card_model(args, 16, CPU)
    found = CardBench(model, 2, 1, 2, plan, sizes=LIMITS).run()
    assert all(found[key] > 0 for key in (*FIGURES, *MORE))
    assert found["experts_seen"]
    assert 2 <= found["experts_per_step"] <= 4
    assert found["bytes_per_step"] == round(step_nbytes(model, found["experts_per_step"]))
    assert found["bytes_per_token"] == round(step_nbytes(model, found["experts_per_step"]) / 2)
    assert found["plan"]["card_total"] == plan.card.total
    assert not {"hit_rate", "card_peak_bytes"} & found.keys()
    json.dumps(found)


@pytest.mark.usefixtures("_briefly")
def test_what_is_missing_is_counted_beside_what_the_link_allows() -> None:
    args = args_of()
    expert = weights_at(args, 16).expert
    model = card_model(args, 16, CPU, placement=CardPlacement(2 * expert, 2))
    found = CardBench(model, 2, 5, 1, sizes=LIMITS).run()
    assert found["hits"] + found["misses"] == 5 * 2
    assert found["misses"] > 0  # two slots for four experts
    assert found["computed_by_cpu"] == 0  # bfloat16
    assert found["bytes_copied_per_token"] == round(found["misses"] * expert / 5)
    assert found["hit_rate"] == found["hits"] / 10
    by_memory = found["copy_limit_gbs"] * 1e9 / found["bytes_per_step"]
    by_link = found["link_limit_gbs"] * 1e9 / found["bytes_copied_per_token"]
    assert found["allowed_by_link_tok_s"] == pytest.approx(by_link, rel=1e-3)
    assert found["allowed_tok_s"] == pytest.approx(min(by_link, by_memory), rel=1e-3)
    assert found["decode_fraction_of_allowed"] == pytest.approx(found["decode_tok_s"] / found["allowed_tok_s"])
    json.dumps(found)


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    with pytest.raises(OptionError, match="a context of"):
        CardBench(card_model(args_of(), 16, CPU), 300, 4, 1)


# ---------------------------------------- the command


@needs_no_card
def test_without_a_card_it_is_said() -> None:
    refused(run("bench", "--shape", "menny", "--device", "cuda"), "device is 'cuda', which cannot be used here")
    refused(run("bench", "--model", "menny", "--device", "cuda"), "device is 'cuda', which cannot be used here")


def test_options_that_do_not_go_together_are_refused() -> None:
    refused(run("bench", "--shape", "menny", "--gpu-memory", "1GiB"), "--gpu-memory needs a GPU", hint="--device cuda")
    refused(run("bench", "--shape", "menny", "--device", "cuda", "--store", "there"), "--store belongs to the CPU")
    refused(
        run("bench", "--shape", "menny", "--device", "cuda", "--routing", "uniform"), "--routing belongs to the CPU"
    )


# ---------------------------------------- the scripts


@pytest.fixture
def _scripts(monkeypatch: pytest.MonkeyPatch, _briefly: None) -> Iterator[None]:
    """Their folder comes first, as it does for a script; other modules are left as they were."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(SCRIPTS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def script(monkeypatch: pytest.MonkeyPatch, line: str, *more: object) -> object:
    """Run one in this process; return what it exits with."""
    name, *options = shlex.split(line)
    monkeypatch.setattr(sys, "argv", [name, *options, *map(str, more)])
    try:
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    except SystemExit as end:
        return end.code
    return 0


QUICK = {
    "check.py --parts kernels graphs --bits 16 --tokens 1 12": 10,
    "check.py --parts bits --bits 16 --tokens 1": 1,
    "model.py --bits 16 --runs planned": 1,
    "memory.py": 1,
    "attention.py": 17,
    "transformers_peer.py": 3,
    "plain_torch.py": 1,
}
"""Scripts that run within seconds, and how many lines they tell."""


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("line", QUICK)
@pytest.mark.usefixtures("_scripts")
def test_scripts_run_without_a_card(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "results.jsonl"
    code = script(monkeypatch, line, "--device", "cpu", "--tiny", "--layers", 1, "--out", out)
    assert code in (0, None)
    found = [json.loads(text) for text in out.read_text().splitlines()]
    assert len(found) == QUICK[line]
    assert all(one["tiny"] and one.get("right", True) for one in found)
    failed = [one for one in found if "failed" in one and one["step"] != "check"]
    assert all(one["step"].startswith("attention-") for one in failed), failed  # not every kernel is on a CPU
    if "skipped" in found[0]:
        assert "card" in found[0]["skipped"]


def steps() -> list[str]:
    text = (SCRIPTS / "run.sh").read_text().replace("$i", "1").replace("$bits", "4")
    return re.findall(r"^ +step \d+ (.*?)(?: &)?$", text, re.MULTILINE)


@needs_no_card
@pytest.mark.parametrize("line", steps())
@pytest.mark.usefixtures("_scripts")
def test_what_run_asks_of_scripts_they_take(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there is no CUDA device here" in str(script(monkeypatch, line))


@pytest.mark.parametrize("name", ["run.sh", "setup.sh"])
def test_shell_scripts_can_be_read_by_a_shell(name: str) -> None:
    assert subprocess.run(["sh", "-n", SCRIPTS / name]).returncode == 0


# ---------------------------------------- the report

LINES = [
    {"step": "model-16-planned", "decode_fraction_of_limit": 0.8, "decode_tok_s": 120.0, "card_used_bytes": 104,
     "plan": {"card_total": 100}},
    {"step": "transformers-eager", "decode_tok_s": 10.0},
    {"step": "transformers-grouped_mm", "decode_tok_s": 31.0},
    {"step": "transformers-batched_mm", "failed": "too large"},
    {"step": "model-4-planned", "decode_tok_s": 340.0},
    {"step": "model-4-planned", "decode_tok_s": 360.0},
    {"step": "offload-resident", "decode_tok_s": 100.0},
    {"step": "offload-everything-fits", "decode_tok_s": 94.0},
    {"step": "check-parity-tied", "right": False},
    {"step": "check-linear", "right": True},
]  # fmt: skip


def test_the_report_tells_which_bars_are_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.jsonl"
    tiny = {"step": "model-8-planned", "tiny": True, "decode_tok_s": 999.0}
    file.write_text("".join(json.dumps(line) + "\n" for line in [tiny, *({"tiny": False} | one for one in LINES)]))
    monkeypatch.setattr(sys, "argv", ["report.py", str(file)])
    runpy.run_path(str(SCRIPTS / "report.py"), run_name="__main__")
    told = {line[:58].strip(): line[58:].split() for line in capsys.readouterr().out.splitlines()[1:12]}
    assert told["bf16, batch 1: share of the copy bandwidth"][2:] == ["0.800", "met"]
    assert told["bf16, batch 1: times transformers"][2:] == ["3.871", "NOT", "MET"]
    assert told["4 bits, batch 1: tokens/s"][2:] == ["360.0", "met"]  # the later of two
    assert told["8 bits, batch 1: tokens/s"][2:] == ["-", "not", "measured"]
    assert told["room for all: cached beside resident"][2:] == ["0.940", "NOT", "MET"]
    assert told["memory on the card: share off the plan"][2:] == ["0.040", "NOT", "MET"]
    assert told["parity, card and CPU: configurations that differ"][2:] == ["1", "NOT", "MET"]
