"""Training on a card: what is counted, measured and laid out for it. All but the last section runs on any machine."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import tiny_args, tiny_model
from octavo.args import MoEArgs
from octavo.cache import visible
from octavo.cli.train import command
from octavo.errors import ConfigError
from octavo.model import Mixtral
from octavo.train import device as device_module
from octavo.train import trainer as trainer_module
from octavo.train.attention import use_training_attention
from octavo.train.data import START, Document, Rows, pack, positions
from octavo.train.device import HostCopy, Moment, choose_device, matrix_rate
from octavo.train.experts import TrainingExperts, grouped_linear, grouped_products, use_training_experts
from octavo.train.flops import flops_per_token, matrix_params
from octavo.train.losses import RouterTap
from octavo.train.progress import Pace
from octavo.train.state import checkpoints, load_newest, save_checkpoint
from octavo.train.trainer import Trainer, train
from train_fixtures import make_config, make_world, tables

CPU = torch.device("cpu")
needs_grouped = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="grouped products come with torch 2.10")
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """test_train.py looks at them; they take longer than a run."""
    monkeypatch.setattr(trainer_module._Run, "draw", lambda _run: None)


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# What a step costs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moe", [None, MoEArgs(8, 2), MoEArgs(4, 3)])
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"n_kv_heads": 4, "hidden_dim": 40}])
def test_flops_are_those_that_torch_counts_in_a_step(moe: MoEArgs | None, changes: dict[str, Any]):
    """torch counts the whole square of attention, and the sum over experts, which the convention leaves out."""
    args = tiny_args(moe=moe, **changes)
    model = Mixtral(args)
    use_training_experts(model)
    ids = torch.randint(0, args.vocab_size, (3, 17))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    sum_of_experts = 6 * args.n_layers * moe.num_experts_per_tok * args.dim if moe else 0
    assert counter.get_total_flops() == ids.numel() * (flops_per_token(args, visible=17) + sum_of_experts)


def test_flops_of_mixtral_follow_from_its_active_parameters():
    args = tiny_args(dim=4096, n_layers=32, head_dim=128, hidden_dim=14336, n_heads=32, n_kv_heads=8, vocab_size=32000)
    norms = (2 * args.n_layers + 1) * args.dim
    assert matrix_params(args) == args.n_active_params - args.vocab_size * args.dim - norms == 12_748_587_008
    assert flops_per_token(args, 0) == 6 * 12_748_587_008
    assert flops_per_token(args, 4096) - flops_per_token(args, 0) == 12 * 32 * 4096 * 4096


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    row_len=st.integers(2, 20),
    window=st.none() | st.integers(1, 25),
)
@settings(deadline=None)
def test_visible_tokens_are_those_of_the_mask(lengths: list[int], row_len: int, window: int | None):
    rows = pack([Document([1] * n, bytes([START]) + bytes([3]) * (n - 1)) for n in lengths], row_len)
    at = torch.from_numpy(positions(rows.kinds)[:, :-1].copy())
    mask = visible(at, at, min(window or row_len, row_len))[:, 0]
    seen = mask.sum(-1)[at >= 0]
    assert rows.mean_visible(window) == pytest.approx(seen.double().mean().item())


def test_visible_tokens_are_counted_in_parts_too():
    kinds = np.array([[START, 3, 3, 0, 0]] * 4096 + [[START, 0, 0, 0, 0]] * 4096, dtype=np.uint8)
    assert Rows(np.zeros((8192, 5), dtype=np.int32), kinds).mean_visible() == (1 + 2 + 3 + 1) / 4


# What the device can do, and how fast a run is ----------------------------------------------------------------


class Clock(Moment):
    """A device on which every moment comes a millisecond after the one before."""

    now = 0.0

    def __init__(self, device: torch.device) -> None:
        super().__init__(CPU)
        Clock.now += 0.001
        self._time = Clock.now


def test_the_matrix_rate_is_work_by_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device_module, "Moment", Clock)
    assert matrix_rate(CPU, torch.float32) == pytest.approx(2 * 512**3 / 0.001)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_matrix_rate_leaves_random_numbers_alone(dtype: torch.dtype):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    start = Moment(CPU)
    rate = matrix_rate(CPU, dtype)
    assert Moment(CPU).since(start) >= 0.03
    assert 0 < rate < 1e15
    assert torch.equal(torch.get_rng_state(), before)


def test_pace_counts_steps_and_nothing_between_them():
    def at(seconds: float) -> Moment:
        moment = Moment(CPU)
        moment._time = seconds
        return moment

    pace = Pace(utilisation=0.001)
    assert math.isnan(pace.whole().tokens_per_s)
    pace.restart(at(10))
    pace.add(100, at(11))
    pace.add(100, at(12))
    assert pace.lap() == (100, pytest.approx(0.1))
    pace.restart(at(50))  # an evaluation took 38 s
    pace.add(300, at(51))
    assert pace.lap() == (300, pytest.approx(0.3))
    assert pace.whole() == (pytest.approx(500 / 3), pytest.approx(1 / 6))
    assert str(pace.whole()) == "167 tok/s, MFU 16.7%"
    assert pace.whole().record == {"tokens_per_s": 167, "mfu": 0.1667}


def test_a_run_says_its_speed_everywhere(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(trainer_module, "matrix_rate", lambda device, dtype: 1e9)
    config = make_config(world, tmp_path, model={"sliding_window": 5})
    result = train(config)
    flops = flops_per_token(config.model, Trainer(config).rows.mean_visible(5))
    steps = [line for line in lines_of(tmp_path) if "ce" in line]
    assert len(steps) == 12
    for line in steps:
        assert line["mfu"] == pytest.approx(line["tokens_per_s"] * flops / 1e9, rel=1e-3)
        assert line["tokens_per_s"] > 0
    assert min(s["tokens_per_s"] for s in steps) - 1 < result.tokens_per_s < max(s["tokens_per_s"] for s in steps) + 1
    assert result.mfu == pytest.approx(result.tokens_per_s * flops / 1e9)
    said = capsys.readouterr().err
    assert f"{flops / 1e6:,.1f} MFLOPs a token; the device multiplies matrices at 0.001 TFLOP/s (measured)" in said
    tokens = sum(s["tokens"] for s in steps)
    assert f"trained on {tokens:,} tokens, {result.tokens_per_s:,.0f} tok/s, MFU {result.mfu:.1%}" in said
    assert "experts are computed" not in said, "on a CPU there is one way"
    again = train(config)  # there is nothing left to train
    assert math.isnan(again.tokens_per_s)
    assert math.isnan(again.mfu)
    said = capsys.readouterr().err
    assert "measured" not in said
    assert "trained on" not in said


def test_json_has_the_speed_and_null_where_nothing_was_trained(world: Path, tmp_path: Path):
    config = tmp_path / "tiny.toml"
    made = tables(world, tmp_path / "run", optim={"steps": 2}, data={"heldout": None})
    made["model.moe"] = made["model"].pop("moe")
    lines = [f"[{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in t.items()) for name, t in made.items()]
    config.write_text("".join(lines))
    first, second = (
        json.loads(CliRunner().invoke(command, ["--json", str(config)], standalone_mode=False).stdout) for _ in "12"
    )
    assert first["tokens_per_s"] > 0
    assert 0 < first["mfu"] < 1
    assert (second["finished"], second["tokens_per_s"], second["mfu"]) == (True, None, None)


# Grouped products ---------------------------------------------------------------------------------------------


def both_layouts(moe: MoEArgs, tokens: int, avoid: int = 0) -> tuple[Any, Any]:
    """(y, gradients of x, weights and parameters) of experts one by one and in groups; nobody chooses `avoid` many."""
    torch.manual_seed(0)
    args = tiny_args(moe=moe)
    one_by_one, grouped = TrainingExperts(args, moe), TrainingExperts(args, moe, grouped=True)
    assert list(grouped.state_dict()) == list(one_by_one.state_dict())
    grouped.load_state_dict(one_by_one.state_dict())
    x, logits = torch.randn(tokens, args.dim), torch.randn(tokens, moe.num_experts)
    logits[:, :avoid] = -100.0
    results = []
    for module in (one_by_one, grouped):
        x_TD = x.clone().requires_grad_()
        ranked, ids = logits.topk(moe.num_experts_per_tok)
        weights = ranked.softmax(-1).requires_grad_()
        for _ in range(2):  # gradients add up
            with torch.autocast("cpu", torch.bfloat16):
                y = module(x_TD, ids, weights)
            y.square().sum().backward()
        results.append((y, x_TD.grad, weights.grad, {name: p.grad for name, p in module.named_parameters()}))
    return results[0], results[1]


@needs_grouped
@pytest.mark.parametrize(
    ("experts", "top_k", "tokens", "avoid"), [(8, 2, 53, 0), (8, 2, 53, 3), (4, 1, 1, 0), (5, 5, 7, 0)]
)
def test_grouped_products_are_the_products_one_by_one(experts: int, top_k: int, tokens: int, avoid: int):
    plain, grouped = both_layouts(MoEArgs(experts, top_k), tokens, avoid)
    torch.testing.assert_close(grouped[0], plain[0], rtol=1e-2, atol=1e-5)
    largest = plain[1].abs().max().item()  # x has one rounding more: its gradient is summed in bfloat16
    torch.testing.assert_close(grouped[1], plain[1], rtol=2e-2, atol=1e-2 * largest)
    torch.testing.assert_close(grouped[2], plain[2], rtol=1e-2, atol=1e-5)
    unused = 0
    for name, gradient in grouped[3].items():
        assert gradient.dtype == torch.float32
        if plain[3][name] is None or not plain[3][name].any():
            unused += 1
            assert torch.equal(gradient, torch.zeros_like(gradient)), name
        else:
            torch.testing.assert_close(gradient, plain[3][name], rtol=1e-2, atol=1e-5, msg=name)
    assert unused >= 3 * avoid


@needs_grouped
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), seed=st.integers(0, 99))
@settings(deadline=None)
def test_each_group_meets_its_own_weight(counts: list[int], seed: int):
    torch.manual_seed(seed)
    x_ND = torch.randn(sum(counts), 16).bfloat16().requires_grad_()
    weights = [torch.randn(24, 16).requires_grad_() for _ in counts]
    ends = torch.tensor(counts).cumsum(0).int()
    out = grouped_linear(x_ND, ends, weights)
    pull = torch.randn_like(out)
    ours = torch.autograd.grad(out, [x_ND, *weights], pull)
    parts = [F.linear(part, w.bfloat16()) for part, w in zip(x_ND.split(counts), weights, strict=True)]
    expected = torch.cat(parts)
    theirs = torch.autograd.grad(expected, [x_ND, *weights], pull)
    torch.testing.assert_close(out, expected)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@needs_grouped
def test_a_card_that_leaves_an_empty_groups_gradient_unwritten_does_no_harm(monkeypatch: pytest.MonkeyPatch):
    """As of compute capability 10 does, where memory holds what was there before."""
    plain = F.grouped_mm

    def forgetful(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
        out = plain(a, b, offs=offs)
        if out.ndim == 3:
            out[offs.diff(prepend=offs.new_zeros(1)) == 0] = math.nan
        return out

    monkeypatch.setattr("octavo.train.experts._grouped_mm", forgetful)
    _, grouped = both_layouts(MoEArgs(8, 2), 20, avoid=4)
    assert all(gradient.isfinite().all() for gradient in grouped[3].values())


def test_where_grouped_products_do_not_apply_the_reason_is_said(monkeypatch: pytest.MonkeyPatch):
    card, bf16, fits = torch.device("cuda"), torch.bfloat16, tiny_args()
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr("octavo.train.experts._grouped_mm", lambda: None)
    assert grouped_products(card, bf16, fits) == (True, "the card's compute capability is 9.0")
    assert grouped_products(CPU, bf16, fits)[0] is False
    assert "bfloat16" in grouped_products(card, torch.float32, fits)[1]
    assert grouped_products(card, bf16, tiny_args(hidden_dim=44)) == (
        False, "they take rows of a multiple of 16 bytes",
    )  # fmt: skip
    capability = (8, 6)
    assert grouped_products(card, bf16, fits)[0] is False
    monkeypatch.setattr("octavo.train.experts._grouped_mm", None)
    assert "2.10" in grouped_products(card, bf16, fits)[1]


@needs_grouped
def test_a_run_in_groups_learns_what_a_run_one_by_one_learns(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And goes on from its checkpoint, and it from its."""
    config = make_config(world, tmp_path, optim={"accumulation": 2, "lr": 2e-3}, run={"dtype": "bfloat16"})
    plain, taking_over = Trainer(config), Trainer(config)
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "grouped_products", lambda *_: (True, "asked for"))
        grouped, resumed = Trainer(config), Trainer(config)
    assert [t.grouped for t in (plain, taking_over, grouped, resumed)] == [False, False, True, True]
    first = [[t.train_step() for _ in range(3)] for t in (plain, grouped)]
    save_checkpoint(tmp_path, 3, grouped.state(), keep=1)
    for trainer in (resumed, taking_over):
        newest = load_newest(tmp_path)
        assert newest is not None
        trainer.load_state(newest[1], "here")
    then = [[t.train_step() for _ in range(3)] for t in (plain, grouped, resumed, taking_over)]
    assert then[1] == then[2], "bit for bit"
    for others in (first[1], then[1], then[3]):
        alone = first[0] if others is first[1] else then[0]
        assert [s.ce for s in others] == pytest.approx([s.ce for s in alone], rel=5e-4)
        assert [s.grad_norm for s in others] == pytest.approx([s.grad_norm for s in alone], rel=1e-2)


# Attention ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_training_attention_is_attention(n_kv_heads: int):
    torch.manual_seed(0)
    args = tiny_args(n_kv_heads=n_kv_heads, sliding_window=6)
    plain, training = Mixtral(args), Mixtral(args)
    use_training_attention(training)
    assert [name for name, _ in training.named_parameters()] == [name for name, _ in plain.named_parameters()]
    training.load_state_dict(plain.state_dict())
    ids = torch.randint(0, args.vocab_size, (2, 11))
    at = torch.arange(11).expand(2, 11).clone()
    at[1, 8:] = -1
    for positions_BT in (None, at):
        outs = [model(ids, positions_BT=positions_BT) for model in (plain, training)]
        torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-6)
        for out, model in zip(outs, (plain, training), strict=True):
            model.zero_grad()
            out.square().sum().backward()
        for (name, a), (_, b) in zip(plain.named_parameters(), training.named_parameters(), strict=True):
            if a.grad is not None and b.grad is not None:
                torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5 * float(a.grad.abs().max()), msg=name)


def test_training_attention_shows_torch_heads_that_do_not_share_keys(monkeypatch: pytest.MonkeyPatch):
    """Which is what the memory-efficient kernel asks for."""
    model = tiny_model(n_kv_heads=1)
    use_training_attention(model)
    seen = []
    plain = F.scaled_dot_product_attention

    def look(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append((q.shape, k.shape, v.shape))
        return plain(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", look)
    model(torch.zeros(1, 5, dtype=torch.int64))
    assert seen == [((1, 4, 5, 8),) * 3] * 2


# Steps that wait for nothing ----------------------------------------------------------------------------------


@contextlib.contextmanager
def without_numbers(trainer: Trainer) -> Iterator[None]:
    """Move a trainer to a device of shapes alone: whatever asks it for a number fails."""
    nothing = torch.device("meta")
    trainer.device = nothing
    trainer.model.to(nothing)
    trainer.optimizer = torch.optim.AdamW(trainer.model.parameters())  # fused, it asks which device it is
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
        patch.setattr(trainer_module, "HostCopy", lambda _device, *tensors: tensors)
        yield


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optim": {"accumulation": 2, "grad_clip": 0.0}, "loss": {"balance_per_layer": True}},
        {"model": {"moe": None}},
    ],
)
@needs_grouped
def test_a_step_asks_the_device_for_nothing(world: Path, tmp_path: Path, changes: dict[str, Any]):
    trainer = Trainer(make_config(world, tmp_path, **changes))
    use_training_attention(trainer.model)
    use_training_experts(trainer.model, grouped=True)
    with without_numbers(trainer):
        launched = trainer.launch_step()
        numbers, counts_LE = launched.numbers  # type: ignore[misc]
    assert numbers.device.type == "meta"
    assert numbers.shape == (4,)
    assert counts_LE.shape == ((2, 4) if trainer.config.model.moe else (0, 0))
    assert launched.metrics.tokens > 0
    assert trainer.step == 1


def test_experts_one_by_one_do_ask(world: Path, tmp_path: Path):
    """So the test above would notice."""
    trainer = Trainer(make_config(world, tmp_path))
    with without_numbers(trainer), pytest.raises(NotImplementedError, match="meta"):
        trainer.launch_step()


def test_a_step_read_late_says_what_it_would_have_said_at_once(world: Path, tmp_path: Path):
    at_once, late = (Trainer(make_config(world, tmp_path)) for _ in range(2))
    expected = [at_once.train_step() for _ in range(4)]
    launched = [late.launch_step() for _ in range(4)]
    assert [step.read() for step in launched] == expected
    assert all(math.isfinite(step.loss) and step.load for step in expected)


def test_a_run_writes_every_step_in_its_order(world: Path, tmp_path: Path):
    config = make_config(world, tmp_path, optim={"steps": 7}, run={"eval_every": 3, "checkpoint_every": 2, "keep": 9})
    train(config)
    alone = Trainer(config)
    expected: list[tuple[int, Any]] = []
    for step in range(1, 8):
        expected.append((step, asdict(alone.train_step())))
        if step in (3, 6, 7):
            heldout = alone.evaluate()
            assert heldout is not None
            expected.append((step, {"step": step, "heldout": asdict(heldout)}))
    found = lines_of(tmp_path)
    measured = ("tokens_per_s", "mfu")
    assert [(line["step"], {k: v for k, v in line.items() if k not in measured}) for line in found] == expected
    assert all(list(line)[-2:] == list(measured) for line in found if "ce" in line)
    assert [path.name[-5:-3] for path in checkpoints(tmp_path / "checkpoints")] == ["02", "04", "06", "07"]


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_step_that_blows_up_is_found_before_a_checkpoint_is_written(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
):
    plain = trainer_module.weighted_cross_entropy
    calls = iter(range(1, 99))

    def blow_up(*tensors: Tensor) -> Tensor:
        return plain(*tensors) * (math.nan if next(calls) == at else 1.0)

    monkeypatch.setattr(trainer_module, "weighted_cross_entropy", blow_up)
    config = make_config(world, tmp_path, data={"heldout": None}, optim={"steps": 4}, run={"checkpoint_every": 2})
    with pytest.raises(ConfigError, match=f"step {at}: the loss is nan"):
        train(config)
    assert [line["step"] for line in lines_of(tmp_path)] == list(range(1, at))
    found = load_newest(tmp_path / "checkpoints")
    assert (found is None) == (at <= 2)
    if found is not None:
        assert found[1]["step"] == 2
        assert all(p.isfinite().all() for p in found[1]["model"].values())


def test_counts_without_a_mask_are_of_all_tokens():
    model = tiny_model()
    with RouterTap(model) as tap:
        model(torch.randint(0, 101, (2, 9)))
    expected = [np.bincount(ids.flatten(), minlength=8).tolist() for ids in tap.topk_ids_TK]
    assert tap.expert_counts_LE(8).tolist() == expected


def test_numbers_on_the_host_are_there_at_once():
    start = Moment(CPU)
    copy = HostCopy(CPU, torch.arange(3), torch.ones(2))
    assert [t.tolist() for t in copy.read()] == [[0, 1, 2], [1, 1]]
    assert copy.moment.since(start) >= 0


# Going on -----------------------------------------------------------------------------------------------------


def test_settings_of_the_optimiser_are_the_present_ones(world: Path, tmp_path: Path):
    """A checkpoint's optimiser state brings its own, which once won without a word."""
    earlier = Trainer(make_config(world, tmp_path))
    earlier.train_step()
    earlier.train_step()
    save_checkpoint(tmp_path / "checkpoints", 2, earlier.state(), keep=1)
    now = {"weight_decay": 0.3, "betas": [0.8, 0.9], "eps": 1e-6}
    trainer = Trainer(make_config(world, tmp_path, optim=now))
    newest = load_newest(tmp_path / "checkpoints")
    assert newest is not None
    changed = trainer.load_state(newest[1], "here")
    assert any("weight_decay: 0.1 -> 0.3" in line for line in changed)
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.3, 0.0]
    for group in trainer.optimizer.param_groups:
        assert (group["betas"], group["eps"], group["fused"]) == ((0.8, 0.9), 1e-6, True)
    steps = {float(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == {2.0}, "what was learnt stays"


@pytest.mark.parametrize("name", ["cuda:99", "cuda:0" if not torch.cuda.is_available() else "cuda:98"])
def test_a_card_that_is_not_there_is_an_error(name: str):
    with pytest.raises(ConfigError, match=f"'{name}' is not available here"):
        choose_device(name)


# On a card ----------------------------------------------------------------------------------------------------


@needs_card
def test_a_step_on_a_card_does_not_synchronise(world: Path, tmp_path: Path):
    trainer = Trainer(make_config(world, tmp_path, run={"device": "cuda", "dtype": "bfloat16"}))
    if not trainer.grouped:
        pytest.skip(f"experts one by one: {trainer.experts_reason}")
    trainer.train_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        launched = trainer.launch_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(launched.read().loss)


@needs_card
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_goes_from_cpu_to_card_and_back(world: Path, tmp_path: Path, dtype: str):
    changes = {"optim": {"lr": 1e-3}, "data": {"heldout": None}}
    stay = train(make_config(world, tmp_path / "stay", run={"dtype": dtype}, **changes))
    for device, steps in (("cpu", 4), ("cuda", 8), ("cpu", 12)):
        move = {"optim": {**changes["optim"], "steps": steps}, "data": changes["data"]}
        result = train(make_config(world, tmp_path / "move", run={"device": device, "dtype": dtype}, **move))
        assert result.step == steps
        assert result.tokens_per_s > 0
        assert 0 < result.mfu < 1
    assert result.ce == pytest.approx(stay.ce, rel=5e-2)


@needs_card
def test_the_matrix_rate_of_a_card():
    card = choose_device("cuda")
    assert matrix_rate(card, torch.bfloat16) > 1e12
