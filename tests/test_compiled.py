"""Compiled blocks compute what the modules do, and the same bits for a token alone, in company and in any chunk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from conftest import needs_compiled, tiny_args
from octavo import kernels
from octavo.args import MoEArgs
from octavo.bench.synthetic import synthetic_model
from octavo.cache import KVCache, NoCache, RollingKVCache, make_cache
from octavo.compiled import KernelBlock
from octavo.engine import Engine
from octavo.kernels import reference
from octavo.kernels.modules import KernelExperts
from octavo.kernels.ops import Matrix, spent
from octavo.model import Mixtral, ResidentExperts, RMSNorm, Router, Routing, TransformerBlock, rotary_embedding
from octavo.quant.formats import FORMATS
from octavo.quant.quantize import dequantize, quantize
from octavo.sampling import SamplingParams

pytestmark = [needs_compiled, pytest.mark.usefixtures("own_kernels")]
BITS = (16, 8, 4, 3, 2)
FLOATS = (torch.float32, torch.bfloat16)


def made(bits: int, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Mixtral:
    """A random model on kernels, whose norms are no ones."""
    model = synthetic_model(tiny_args(**changes), bits, seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(1 + 0.1 * random(*parameter.shape, seed=seed))
    return model.to(dtype)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(cache: KVCache, lengths: list[int], pads: list[int]) -> KVCache:
    """Random keys and values for so many tokens a row, the first of them pads."""
    args, dtype = cache.args, cache.k_LBHSK.dtype
    for row, (tokens, n_pads) in enumerate(zip(lengths, pads, strict=True)):
        positions = torch.cat((torch.full((n_pads,), -1), torch.arange(tokens - n_pads)))[None]
        step = cache.rows(row, row + 1).begin(tokens, positions if n_pads else None)
        for layer in range(args.n_layers):
            kv = random(2, 1, tokens, args.n_kv_heads, args.head_dim, seed=10 * row + layer)
            step.update(layer, *kv.to(dtype))
    return cache


def layers(forward: Callable[..., Tensor], model: Mixtral, x_B1D: Tensor, cache: Any, positions: Any = None) -> Tensor:
    """Every layer's result for the same x: [L, B, 1, D]."""
    step = cache.begin(1, positions)
    rotation = rotary_embedding(step.positions_BT, model.args.head_dim, model.args.rope_theta)
    return torch.stack([forward(block, x_B1D, rotation, step, i) for i, block in enumerate(model.layers)])


@contextmanager
def inputs_of(model: Mixtral, path: str) -> Iterator[list[Tensor]]:
    """What a module of every layer is given, layer by layer."""
    seen: list[Tensor] = []
    modules = [block.get_submodule(path) for block in model.layers]
    hooks = [module.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for module in modules]
    yield seen
    for hook in hooks:
        hook.remove()


class Exactly(TorchFunctionMode):
    """Lets attention compute in float64; what goes in and out is rounded as ever."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return func(*(tensor.double() for tensor in args), **kwargs).to(args[0].dtype)


# ---------------------------------------- as the modules do


class Case(NamedTuple):
    model: Mixtral
    cache: KVCache
    rows: tuple[int, int]  # of the cache, that are decoded
    idle_B: Tensor  # bool: the new token is a pad
    gap: int  # between a row's last position and its next; 0 where the cache counts by itself


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n_kv_heads, window = draw(st.integers(1, 3)), draw(st.sampled_from((None, 5, 9)))
    seed, dtype = draw(st.integers(0, 99)), draw(st.sampled_from((*FLOATS, torch.float32)))
    shape = {
        "dim": draw(st.sampled_from((24, 64, 100))),
        "hidden_dim": draw(st.sampled_from((40, 128))),
        "head_dim": draw(st.sampled_from((8, 16, 20, 64))),
        "n_kv_heads": n_kv_heads,
        "n_heads": n_kv_heads * draw(st.sampled_from((1, 2, 3, 4, 8))),
        "moe": draw(st.sampled_from((None, MoEArgs(4, 2), MoEArgs(3, 1), MoEArgs(5, 5)))),
    }
    model = made(draw(st.sampled_from(BITS)), dtype, seed, sliding_window=window, **shape)
    first, batch = draw(st.integers(0, 2)), draw(st.integers(1, 5))
    n = first + batch + draw(st.integers(0, 1))
    lengths = draw(st.lists(st.integers(1, 20), min_size=n, max_size=n)) if draw(st.booleans()) else [n + 3] * n
    pads = [draw(st.integers(0, length - 1)) for length in lengths] if draw(st.booleans()) else [0] * n
    idle = torch.tensor(draw(st.lists(st.booleans(), min_size=batch, max_size=batch))) & draw(st.booleans())
    cache = KVCache(model.args, n, capacity=4, dtype=dtype)
    if window and draw(st.booleans()):
        cache = RollingKVCache(model.args, n, dtype=dtype)
        idle &= False  # such a pad may or may not see what it overwrites; nobody sees the pad
    gap = draw(st.integers(1, 4)) if idle.any() or draw(st.booleans()) else 0
    return Case(model, filled(cache, lengths, pads), (first, first + batch), idle, gap)


@settings(max_examples=80, deadline=None)
@given(cases())
def test_a_decode_step_is_what_the_modules_compute(case: Case) -> None:
    model, cache, rows, idle_B, gap = case
    for step in range(3):  # a growing cache moves meanwhile
        following = cache.positions_BS[slice(*rows)].amax(1, keepdim=True) + gap
        positions = following.masked_fill(idle_B[:, None], -1) if gap else None
        x = random(len(idle_B), 1, model.args.dim, seed=step).to(model.dtype)
        before, theirs, watched = (copy.deepcopy(cache) for _ in range(3))
        ours = layers(KernelBlock.forward, model, x, cache.rows(*rows), positions)
        with inputs_of(model, "ffn_norm") as attended:  # what follows then goes module by module
            assert torch.equal(ours, layers(KernelBlock.forward, model, x, watched.rows(*rows), positions))
        assert torch.equal(cache.k_LBHSK, watched.k_LBHSK)
        with Exactly(), inputs_of(model, "ffn_norm") as expected, inputs_of(model, "attention.wo") as mixed:
            layers(TransformerBlock.forward, model, x, theirs.rows(*rows), positions)
        wrote_the_same(cache, theirs, before)
        for layer, block in enumerate(model.layers):
            found, wanted = attended[layer], expected[layer]
            if x.dtype == torch.float32:
                eps = 5e-6 * float(theirs.v_LBHSK[layer].abs().max())
                allowed = rounding(mixed[layer], eps, block.attention.wo.matrix)
                assert ((found - wanted).abs() <= allowed + 1e-6 * wanted.abs()).all()
            else:  # a rounding to bfloat16 may fall to either side anywhere
                most = (wanted.float() - x.float()).abs().max()
                assert ((found - wanted).float().abs() <= 0.02 * most + 2**-7 * wanted.float().abs()).all()


def test_bfloat16_is_rounded_where_torch_stores_it() -> None:
    run = decoding(16, dtype=torch.bfloat16, n_layers=4, dim=200, n_heads=8)
    with inputs_of(run.model, "ffn_norm") as found:
        run()
    with Exactly(), inputs_of(run.model, "ffn_norm") as wanted:
        run(TransformerBlock.forward)
    assert (torch.stack(found) != torch.stack(wanted)).float().mean() <= 0.02


def rounding(x: Tensor, eps: float, w: Matrix) -> Tensor:
    """How far w x may move where x moves by eps: about as far, but a number at the edge is rounded to either side."""
    if isinstance(w.weight, Tensor):
        wide, low, high = w.weight.float(), (x - eps).bfloat16().float(), (x + eps).bfloat16().float()
    else:
        wide, low, high = dequantize(w.weight), reference.rounded(x - eps), reference.rounded(x + eps)
    return ((high - low).abs() + eps) @ wide.abs().T


def wrote_the_same(ours: KVCache, theirs: KVCache, before: KVCache) -> None:
    """Values are the same bits; keys have been rotated, and differ in the last; no other slot has changed."""
    assert torch.equal(ours.positions_BS, theirs.positions_BS)
    assert torch.equal(ours.v_LBHSK, theirs.v_LBHSK)
    k, wanted = ours.k_LBHSK.float(), theirs.k_LBHSK.float()
    last_bit = 2**-7 if ours.k_LBHSK.dtype == torch.bfloat16 else 0
    assert ((k - wanted).abs() <= last_bit * wanted.abs() + 1e-6 * wanted.abs().amax(-1, keepdim=True)).all()
    written, changed = theirs.v_LBHSK[:, :, :, : before.capacity], ours.k_LBHSK[:, :, :, : before.capacity]
    assert not ((changed != before.k_LBHSK).any(-1) & (written == before.v_LBHSK).all(-1)).any()


def test_caches_offer_their_memory_where_it_can_be_written_first() -> None:
    assert NoCache(torch.zeros(2, 1).long(), None, None).memory is None
    growing, rolling = KVCache(tiny_args(), 2), RollingKVCache(tiny_args(sliding_window=5), 2)
    assert rolling.begin(2).memory is None  # the second token's slot may hold what the first still sees
    assert growing.begin(2).memory.slots_BT.tolist() == [[0, 1], [0, 1]]
    for cache in (growing, rolling):
        memory = cache.begin(1).memory
        assert memory.k_LBHSK.data_ptr() == cache.k_LBHSK.data_ptr()
        assert memory.slots_BT.tolist() == [[2], [2]]


# ---------------------------------------- the same bits


def start(model: Mixtral, batch: int = 3) -> tuple[Tensor, KVCache]:
    """New tokens, and a cache with rows of different lengths."""
    lengths = [3 + 5 * (row % 4) for row in range(batch)]
    return torch.arange(11, 11 + batch), filled(make_cache(model.args, batch, dtype=model.dtype), lengths, [0] * batch)


def decoded(model: Mixtral, ids_B: Tensor, cache: Any, steps: int = 2) -> Tensor:
    """Logits [B, steps, V] of a few greedy steps, of which a cache itself knows nothing."""
    cache, found = copy.deepcopy(cache), []
    for _ in range(steps):
        found.append(model(ids_B[:, None], cache=cache)[:, 0])
        ids_B = found[-1].argmax(-1)
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("window", [None, 7])
def test_a_row_gives_the_same_bits_alone_and_in_company_on_any_threads(
    bits: int, dtype: torch.dtype, window: int | None
) -> None:
    model = made(bits, dtype, sliding_window=window, head_dim=20)
    for batch in (2, 3, 11):  # up to 8 tokens are multiplied in another way than many
        ids, cache = start(model, batch)
        kernels.set_threads(1)
        together = decoded(model, ids, cache)
        for row in range(batch):
            assert torch.equal(decoded(model, ids[row : row + 1], cache.rows(row, row + 1))[0], together[row])
        for threads in (2, 3):
            kernels.set_threads(threads)
            assert torch.equal(decoded(model, ids, cache), together)


def test_pads_before_a_row_change_no_bit() -> None:
    model = made(4)
    ids, cache = start(model, 1)
    padded = KVCache(model.args, 1)
    padded.rows(0, 1).begin(9, torch.tensor([[-1] * 6 + [0, 1, 2]]))
    for ours, theirs in ((padded.k_LBHSK, cache.k_LBHSK), (padded.v_LBHSK, cache.v_LBHSK)):
        ours[:, :, :, 6:9] = theirs[:, :, :, :3]
    assert torch.equal(decoded(model, ids, padded), decoded(model, ids, cache))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_every_instruction_set_gives_the_same_bits(bits: int, dtype: torch.dtype) -> None:
    model, results = made(bits, dtype, head_dim=20, n_heads=6), []
    for name in kernels.available()[:-1]:  # all but torch
        kernels.use(name)
        results.append(decoded(model, *start(model)))
    assert len(results) >= 2
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("bits", [16, 4])
def test_not_a_number_spoils_its_own_row_alone(bits: int) -> None:
    run = decoding(bits)
    clean = run()
    run.x[1, 0, 5] = float("nan")
    assert run()[:, 1].isnan().all()
    assert torch.equal(run()[:, [0, 2]], clean[:, [0, 2]])


@pytest.mark.parametrize(("window", "dtype"), [(None, torch.float32), (7, torch.float32), (None, torch.bfloat16)])
def test_greedy_tokens_of_a_sequence_are_the_same_beside_others(window: int | None, dtype: torch.dtype) -> None:
    model = made(4, dtype, sliding_window=window)
    prompts = [[(7 * i + 3 * j) % model.args.vocab_size for j in range(2 + 3 * i)] for i in range(6)]
    together = generated(model, prompts)
    assert [len(told) for told in together] == [12] * 6
    assert together == [generated(model, [prompt])[0] for prompt in prompts]


def generated(model: Mixtral, prompts: list[list[int]]) -> list[list[Any]]:
    """Every prompt's tokens, with their log-probabilities."""
    engine = Engine(model, max_batch_size=3, prefill_chunk=4)
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=3)
    told: dict[int, list[Any]] = {engine.add(prompt, params): [] for prompt in prompts}
    while engine.has_work:
        for event in engine.step():
            told[event.seq_id].append((event.token_id, event.logprobs))
    return list(told.values())


# ---------------------------------------- hooks

PASSED_OVER = (
    "attention_norm", "attention", "attention.wq", "attention.wk", "attention.wv", "attention.wo",
    "ffn_norm", "feed_forward", "feed_forward.gate", "feed_forward.experts",
)  # fmt: skip


class Decoding(NamedTuple):
    """A model, rows of different lengths, and the input of their next token."""

    model: Mixtral
    cache: KVCache
    x: Tensor

    def __call__(self, forward: Callable[..., Tensor] = KernelBlock.forward) -> Tensor:
        return layers(forward, self.model, self.x, copy.deepcopy(self.cache))

    def operations(self) -> list[str]:
        with torch.autograd.profiler.profile() as profile:
            self()
        return [event.name for event in profile.function_events]


def decoding(bits: int = 8, **changes: Any) -> Decoding:
    model = made(bits, **changes)
    return Decoding(model, start(model)[1], random(3, 1, model.args.dim).to(model.dtype))


def near(found: Tensor, expected: Tensor) -> bool:
    """All but equal: a rounding of activations may fall to either side."""
    return bool(((found - expected).abs() <= 0.01 * expected.abs().max()).all())


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("path", PASSED_OVER)
def test_a_hook_is_called_while_it_is_there(path: str, pre: bool) -> None:
    run, calls = decoding(), []
    expected, fast = run(), run.operations()
    module = run.model.layers[1].get_submodule(path)
    hook = (module.register_forward_pre_hook if pre else module.register_forward_hook)(lambda *_: calls.append(path))
    hooked, slow = run(), run.operations()
    assert calls == [path] * 2
    assert near(hooked, expected)
    assert torch.equal(hooked[0], expected[0])
    assert ("aten::scaled_dot_product_attention" in slow) == path.startswith("attention")
    hook.remove()
    assert torch.equal(run(), expected)
    assert run.operations() == fast != slow
    assert "aten::scaled_dot_product_attention" not in fast
    assert len(calls) == 2


@pytest.mark.parametrize("path", [path for path in PASSED_OVER if path != "feed_forward.gate"])
def test_what_a_hook_returns_is_used(path: str) -> None:
    run = decoding()
    for block in run.model.layers:
        block.get_submodule(path).register_forward_hook(lambda module, inputs, out: 0.5 * out)
    with inputs_of(run.model, "ffn_norm") as attended:
        found = run()
    assert torch.equal(found, run())
    if path.startswith("attention"):
        assert torch.equal(found, run(TransformerBlock.forward))
    blocks = zip(attended, run.model.layers, strict=True)
    assert torch.equal(found, torch.stack([h + block.feed_forward(block.ffn_norm(h)) for h, block in blocks]))
    assert not near(found, decoding()())


@pytest.mark.parametrize("bits", BITS)
def test_a_router_hook_sees_every_token_and_may_route_it_elsewhere(bits: int) -> None:
    run = decoding(bits)
    expected, seen = run(), []
    hooks = [gate.register_forward_hook(lambda module, inputs, out: seen.append(out)) for gate in run.model.routers()]
    with inputs_of(run.model, "ffn_norm") as attended:
        assert torch.equal(run(), expected)
    for routing, h, block in zip(seen, attended, run.model.layers, strict=True):
        wanted = Router.forward(block.feed_forward.gate, block.ffn_norm(h).flatten(0, 1))
        assert torch.equal(routing.topk_ids_TK, wanted.topk_ids_TK)
        assert torch.allclose(routing.logits_TE, wanted.logits_TE, atol=1e-4)
    for hook in hooks:
        hook.remove()

    def elsewhere(module: nn.Module, inputs: Any, out: Routing) -> Routing:
        return Routing((out.topk_ids_TK + 1) % 8, out.topk_weights_TK.flip(-1), out.logits_TE)

    for gate in run.model.routers():
        gate.register_forward_hook(elsewhere)
    found = run()
    assert not near(found, expected)
    for y, routing, h, block in zip(found, seen, attended, run.model.layers, strict=True):
        ids, weights, _ = elsewhere(block, None, routing)
        out = block.feed_forward.experts(block.ffn_norm(h).flatten(0, 1), ids, weights)
        assert torch.equal(y, h + out.view_as(h))


# ---------------------------------------- what is changed in between


@pytest.mark.parametrize("decoded_before", [False, True])
def test_other_experts_are_used_as_soon_as_they_are_there(decoded_before: bool) -> None:
    run, args = decoding(4), tiny_args()
    own = [block.feed_forward.experts for block in run.model.layers]
    expected = run() if decoded_before else decoding(4)()
    shapes = ((args.hidden_dim, args.dim), (args.hidden_dim, args.dim), (args.dim, args.hidden_dim))
    drawn = [tuple(quantize(random(*shape, seed=e), FORMATS["q4"], "rtn") for shape in shapes) for e in range(8)]
    for other in (ResidentExperts(args, MoEArgs(8, 2)).requires_grad_(False), KernelExperts(drawn)):
        for block in run.model.layers:
            block.feed_forward.experts = other
        with inputs_of(run.model, "ffn_norm") as attended:
            found = run()
        assert torch.equal(found, run())
        for y, h, block in zip(found, attended, run.model.layers, strict=True):
            x = block.ffn_norm(h).flatten(0, 1)
            assert torch.equal(y, h + other(x, *block.feed_forward.gate(x)[:2]).view_as(h))
    for block, experts in zip(run.model.layers, own, strict=True):
        block.feed_forward.experts = experts
    assert torch.equal(run(), expected)


def put_another_wq(block: Any) -> None:
    block.attention.wq = nn.Linear(32, 32, bias=False).requires_grad_(False)


def put_another_gate(block: Any) -> None:
    block.feed_forward.gate = Router(32, MoEArgs(8, 2)).requires_grad_(False)


def put_another_norm(block: Any) -> None:
    block.attention_norm = RMSNorm(32, 1.0).requires_grad_(False)


def choose_one_expert(block: Any) -> None:
    block.feed_forward.gate.top_k = 1


def put_another_weight(block: Any) -> None:
    block.feed_forward.gate.weight = nn.Parameter(random(8, 32, seed=9), requires_grad=False)


def convert_the_gate_alone(block: Any) -> None:
    block.feed_forward.gate.bfloat16()


def put_other_data(block: Any) -> None:
    block.attention_norm.weight.data = 2 * torch.ones(32)


def assign_a_state(block: Any) -> None:
    block.load_state_dict({name: random(*w.shape, seed=3) for name, w in block.state_dict().items()}, assign=True)


CHANGES = (
    put_another_wq, put_another_gate, put_another_norm, choose_one_expert, put_another_weight, convert_the_gate_alone,
    put_other_data, assign_a_state,
)  # fmt: skip


@pytest.mark.parametrize("decoded_before", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_put_in_place_is_used(change: Callable[[Any], None], decoded_before: bool) -> None:
    run = decoding()
    if decoded_before:
        run()
    for block in run.model.layers:
        change(block)
    assert near(run(), run(TransformerBlock.forward))


def test_a_model_made_while_torch_computed_goes_on_with_kernels_around_it() -> None:
    kernels.use("reference")
    run = decoding()
    kernels.use(None)
    assert near(run(), decoding()())


def test_positions_may_be_given_once_for_all_rows() -> None:
    model = made(4)
    ids_BT = torch.arange(10).view(2, 5)
    found = model(ids_BT, cache=KVCache(model.args, 2), positions_BT=torch.arange(5)[None])
    assert torch.equal(found, read(model, ids_BT, [5]))


@pytest.mark.parametrize("moe", [None, MoEArgs(8, 2)])
def test_torch_computes_in_the_middle_and_takes_no_kernel(moe: MoEArgs | None) -> None:
    run = decoding(4, moe=moe)
    expected, nbytes = run(), spent()[1]
    kernels.use("reference")
    found = run()
    kernels.use(None)
    assert spent()[1] == nbytes
    assert not torch.equal(found, expected)
    assert near(found, expected)
    assert torch.equal(run(), expected)


def test_parameters_that_move_are_followed() -> None:
    model, wide = made(4, torch.bfloat16), made(4)
    before, expected = decoded(model, *start(model)), decoded(wide, *start(wide))
    model.to(torch.float32)
    assert torch.equal(decoded(model, *start(model)), expected)
    old = [parameter.data for parameter in model.parameters()]
    model._apply(torch.clone)
    for tensor in old:
        tensor.fill_(float("nan"))
    assert torch.equal(decoded(model, *start(model)), expected)
    assert torch.equal(decoded(model.to(torch.bfloat16), *start(model)), before)


def test_parameters_that_change_in_place_are_followed() -> None:
    model, fresh = made(4), made(4)
    before, state = decoded(model, *start(model)), made(4, seed=1).state_dict()
    model.load_state_dict(state)
    fresh.load_state_dict(state)
    after = decoded(model, *start(model))
    assert not torch.equal(before, after)
    assert torch.equal(after, decoded(fresh, *start(fresh)))


# ---------------------------------------- chunks


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("window", [None, 7])
def test_a_prompt_gives_the_same_bits_in_chunks_of_any_size(bits: int, dtype: torch.dtype, window: int | None) -> None:
    model = made(bits, dtype, sliding_window=window, head_dim=20)
    ids_BT = torch.arange(2 * 30).view(2, 30)
    whole = read(model, ids_BT, [30])
    for sizes in ([1] * 30, [7, 1, 22], [9, 21]):
        assert torch.equal(read(model, ids_BT, sizes), whole)
    kernels.set_threads(1)
    assert torch.equal(read(model, ids_BT[:1], [16, 14]), whole[:1])


def test_a_long_prompt_gives_the_bits_of_its_chunks() -> None:
    """So long that it is computed in parts."""
    model = made(4, max_seq_len=2048, dim=24)
    ids_BT = (7 * torch.arange(2 * 700) % model.args.vocab_size).view(2, 700)
    assert torch.equal(read(model, ids_BT, [700]), read(model, ids_BT, [333, 367]))


def test_pads_between_a_prompts_chunks_change_no_bit() -> None:
    model = made(4)
    ids_BT = torch.arange(12).view(1, 12)
    cache = KVCache(model.args, 1)
    positions = torch.tensor([[-1, 0, 1, -1, -1, 2, 3, 4]])
    model(ids_BT[:, [0, 0, 1, 0, 0, 2, 3, 4]], positions_BT=positions, cache=cache)
    rest = model(ids_BT[:, 5:], positions_BT=torch.arange(5, 12)[None], cache=cache)
    assert torch.equal(rest, read(model, ids_BT, [12])[:, 5:])


@pytest.mark.parametrize("window", [None, 7])
def test_a_prompt_is_what_the_modules_compute(window: int | None) -> None:
    model, called = made(16, sliding_window=window, n_heads=6), list[Any]()
    ids_BT = torch.arange(3 * 25).view(3, 25)
    found = read(model, ids_BT, [11, 14])
    hooks = [block.attention.register_forward_hook(lambda *_: called.append(1)) for block in model.layers]
    expected = read(model, ids_BT, [11, 14])
    assert len(called) == 2 * len(model.layers)
    assert near(found, expected)
    for hook in hooks:
        hook.remove()


def read(model: Mixtral, ids_BT: Tensor, sizes: list[int]) -> Tensor:
    """Logits of a prompt in chunks of these sizes; in a cache that grows, whatever the window."""
    cache = KVCache(model.args, len(ids_BT), capacity=4, dtype=model.dtype)
    return torch.cat([model(chunk, cache=cache) for chunk in ids_BT.split(sizes, dim=1)], dim=1)


# ---------------------------------------- bytes


@pytest.mark.parametrize("bits", BITS)
def test_the_bytes_of_the_matrices_used_are_counted(bits: int) -> None:
    model, chosen = made(bits), []
    hooks = [g.register_forward_hook(lambda m, i, out: chosen.append(out.topk_ids_TK)) for g in model.routers()]
    counts = [spent()]
    for _ in range(2):  # module by module, and in one call
        decoded(model, *start(model), steps=1)
        counts.append(spent())
        for hook in hooks:
            hook.remove()
    used = [model.output.matrix]
    for block, ids_TK in zip(model.layers, chosen, strict=True):
        used += [getattr(block.attention, name).matrix for name in ("wq", "wk", "wv", "wo")]
        experts = block.feed_forward.experts.experts.experts
        assert len(ids_TK.unique()) < len(experts)
        used += [matrix for expert in ids_TK.unique().tolist() for matrix in experts[expert]]
    nbytes = sum(matrix.nbytes for matrix in used)
    assert counts[2][1] - counts[1][1] == counts[1][1] - counts[0][1] == nbytes
    assert counts[2][0] > counts[1][0] > counts[0][0]
