"""From logits to a token: the options a person may set, and pure functions over one row of logits.

The order is fixed, and each stage is skipped when its option is off::

    logit_bias, repetition penalty, frequency / presence -> temperature, top_k, top_p, min_p -> one draw

Everything works on one sequence's float32 logits `[V]` (V vocabulary); `octavo.sampling_batch` makes the same choices
for a whole batch. Randomness comes from an explicit CPU `torch.Generator`, one uniform number per token, so a seed
gives the same draws on every device and for every vocabulary, and a sequence's tokens never depend on what else is
being generated.

Shapes: V vocabulary, N candidates left after top_k (N = V when top_k is off).
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo.errors import OctavoError, OptionError

# Below this, float32 logits divided by the temperature overflow; the distribution is the argmax long before.
GREEDY_BELOW = 1e-6
# float32 takes what is above 3e38 for infinite, and a logit of -inf over that is NaN.
MAX_DIVISOR = 1e38
# Sizes in which to look for the largest logits, before a whole vocabulary is sorted.
FEW = (64, 1024)
MAX_LOGPROBS = 20
MAX_CHOICES = 128


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop. Immutable, checked when made; every default stands here.

    Attributes:
        temperature: divides the logits; 0 (or less than 1e-6) is greedy: the likeliest token, the lowest id
            among equals.
        top_p: keep the smallest set of likeliest tokens whose probability reaches this (nucleus); 1 is off.
        top_k: keep the k likeliest tokens, and all that equal the k-th; 0 is off.
        min_p: drop tokens less likely than this share of the likeliest one's probability; 0 is off.
        repetition_penalty: divides positive and multiplies negative logits of every token already in the
            prompt or the reply (CTRL, arXiv:1909.05858, as transformers does); 1 is off.
        frequency_penalty: subtracted from a token's logit for each time it stands in the reply; 0 is off.
        presence_penalty: subtracted from a token's logit if it stands in the reply at all; 0 is off.
        seed: of the random numbers; None draws a fresh one. The i-th of n replies uses seed + i.
        max_tokens: at most this many new tokens; None goes on until the context is full.
        stop: strings that end the reply; they are not part of it. One string, or several.
        stop_ids: token ids that end the reply, besides the model's own end-of-sequence ids.
        logit_bias: added to the logits of single tokens, {token id: bias}.
        logprobs: None for none; k reports each chosen token's log-probability and the k likeliest
            tokens'. They are the model's own: log-softmax of the logits before bias, penalties, temperature
            and filters.
        n: how many replies to one prompt.

    Raises:
        OptionError: a value of the wrong type or out of range; the message names field, value and range.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 512
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logit_bias: dict[int, float] = field(default_factory=dict, hash=False)
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))

    @classmethod
    def from_options(cls, options: Mapping[str, object], base: SamplingParams | None = None) -> SamplingParams:
        """Parameters from names and values as a person writes them.

        Args:
            options: field name to value. A value is native (from TOML, JSON or Python) or text, as after
                `-o`: numbers are parsed, "none" is None where None is allowed, `stop_ids` is "2,32000",
                `logit_bias` is "5:-100,7:2.5" and `stop` is one stop string, taken as it is.
            base: fields not named come from here, by default from the defaults.

        Raises:
            OptionError: an unknown name (the hint has the nearest known one), or a value that will not do.
        """
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise _unknown_option(name, known)
        parsed: dict[str, Any] = {name: _parse(name, value) for name, value in options.items()}
        return replace(base or cls(), **parsed)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalizes(self) -> bool:
        """Whether the choice depends on the tokens before it, so that a `History` must be kept."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


# ---------------------------------------- checking and parsing


def _bad(name: str, value: object, expected: str, hint: str | None = None) -> OptionError:
    return OptionError(f"{name} is {value!r}; expected {expected}", hint)


def _number(expected: str, accept: Callable[[float], bool], hint: str | None = None) -> Callable[..., float]:
    def check(name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise _bad(name, value, expected, hint)
        try:
            number = float(value)
        except OverflowError:  # an int beyond float's range
            raise _bad(name, value, expected, hint) from None
        if not (math.isfinite(number) and accept(number)):
            raise _bad(name, value, expected, hint)
        return number

    return check


def _integer(low: int, high: int | None, *, optional: bool, hint: str | None = None) -> Callable[..., Any]:
    expected = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    if optional:
        expected += ", or none"

    def check(name: str, value: object) -> int | None:
        if value is None and optional:
            return None
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise _bad(name, value, expected, hint)
        number = int(value)
        if number < low or (high is not None and number > high):
            raise _bad(name, value, expected, hint)
        return number

    return check


def _check_stop(name: str, value: object) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, Iterable):
        raise _bad(name, value, "one or more stop strings")
    stops = tuple(stops)
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise _bad(name, value, "strings that are not empty", "leave stop out to stop at no string")
    return tuple(dict.fromkeys(stops))


def _check_stop_ids(name: str, value: object) -> tuple[int, ...]:
    values = (value,) if isinstance(value, numbers.Integral) else value
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise _bad(name, value, "token ids")
    check = _integer(0, None, optional=False)
    return tuple(dict.fromkeys(check(name, one) for one in values))


def _check_logit_bias(name: str, value: object) -> dict[int, float]:
    expected = "{token id: finite bias}"
    if not isinstance(value, Mapping):
        raise _bad(name, value, expected)
    check_id = _integer(0, None, optional=False)
    check_bias = _number(expected, lambda _: True, "a bias of -100 bans a token")
    return {check_id(f"{name}'s token", key): check_bias(name, bias) for key, bias in value.items()}


_GREEDY_HINT = "0 is greedy, 0.7 the default, more is bolder"
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "temperature": _number("a finite number of at least 0", lambda x: x >= 0, _GREEDY_HINT),
    "top_p": _number("a number above 0 and up to 1", lambda x: 0 < x <= 1, "1 keeps every token"),
    "top_k": _integer(0, None, optional=False, hint="0 keeps every token"),
    "min_p": _number("a number from 0 to 1", lambda x: 0 <= x <= 1, "0 keeps every token"),
    "repetition_penalty": _number("a finite number above 0", lambda x: x > 0, "1 is off, 1.1 a mild penalty"),
    "frequency_penalty": _number("a number from -2 to 2", lambda x: -2 <= x <= 2, "0 is off"),
    "presence_penalty": _number("a number from -2 to 2", lambda x: -2 <= x <= 2, "0 is off"),
    "seed": _integer(0, 2**63 - 1, optional=True),
    "max_tokens": _integer(1, None, optional=True, hint="none goes on until the context is full"),
    "stop": _check_stop,
    "stop_ids": _check_stop_ids,
    "logit_bias": _check_logit_bias,
    "logprobs": _integer(0, MAX_LOGPROBS, optional=True),
    "n": _integer(1, MAX_CHOICES, optional=False),
}

_INTEGERS = ("top_k", "seed", "max_tokens", "logprobs", "n")
_OPTIONAL = ("seed", "max_tokens", "logprobs")


def _unknown_option(name: str, known: Sequence[str]) -> OptionError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    near = near or [one for one in known if one.startswith(name)][:1]
    hint = f"did you mean {near[0]}?" if near else f"known options: {', '.join(known)}"
    return OptionError(f"unknown sampling option {name!r}", hint)


def _parse(name: str, value: object) -> object:
    """`value` as the field's own type where it is text; anything else is left to the field's check."""
    if name == "logit_bias" and isinstance(value, Mapping):
        # JSON and TOML know only text as keys.
        return {_parse_number(name, key, int): bias for key, bias in value.items()}
    if not isinstance(value, str) or name == "stop":
        return value
    if name in _OPTIONAL and value.strip().lower() == "none":
        return None
    if name == "stop_ids":
        return tuple(_parse_number(name, part, int) for part in value.split(",") if part.strip())
    if name == "logit_bias":
        pairs = [part.partition(":") for part in value.split(",") if part.strip()]
        return {_parse_number(name, key, int): _parse_number(name, bias, float) for key, _, bias in pairs}
    return _parse_number(name, value, int if name in _INTEGERS else float)


def _parse_number(name: str, text: object, kind: type[int] | type[float]) -> object:
    if not isinstance(text, str):
        return text
    try:
        return kind(text)
    except ValueError:
        shape = {"logit_bias": "id:bias,id:bias", "stop_ids": "id,id"}.get(name)
        what = "an integer" if kind is int else "a number"
        hint = f"write {name}={shape}" if shape else "leave the option out for its default"
        raise OptionError(f"{name} is {text!r}; expected {what}", hint) from None


# ---------------------------------------- adjustments


class History:
    """The tokens before the next one, as the penalties want them. Grows in place, one token at a time.

    Attributes:
        seen_V: bool, whether the token stands in the prompt or the reply.
        counts_V: float32, how often the token stands in the reply.
    """

    def __init__(self, prompt_ids: Sequence[int], vocab_size: int) -> None:
        self.seen_V = torch.zeros(vocab_size, dtype=torch.bool)
        self.seen_V[torch.as_tensor(prompt_ids, dtype=torch.int64)] = True
        self.counts_V = torch.zeros(vocab_size)

    def append(self, token_id: int) -> None:
        """Takes in the token just generated."""
        self.seen_V[token_id] = True
        self.counts_V[token_id] += 1


def add_logit_bias(logits_V: Tensor, bias: Mapping[int, float]) -> Tensor:
    """`logits_V` with each biased token's bias added."""
    ids = torch.tensor(list(bias.keys()), dtype=torch.int64)
    return logits_V.index_add(0, ids, torch.tensor(list(bias.values()), dtype=logits_V.dtype))


def penalize_repetition(logits_V: Tensor, seen_V: Tensor, penalty: float) -> Tensor:
    """Seen tokens' logits divided by `penalty` where positive, multiplied where not (arXiv:1909.05858)."""
    penalized_V = torch.where(logits_V < 0, logits_V * penalty, logits_V / penalty)
    return torch.where(seen_V, penalized_V, logits_V)


def penalize_frequency(logits_V: Tensor, counts_V: Tensor, frequency: float, presence: float) -> Tensor:
    """`logits - frequency * count - presence * [count > 0]`, counts over the reply only, as OpenAI does."""
    return logits_V - frequency * counts_V - presence * (counts_V > 0)


def adjust(logits_V: Tensor, params: SamplingParams, history: History | None = None) -> Tensor:
    """Bias and penalties, in that order. Returns `logits_V` itself when all are off.

    `history` may be None only where `params.penalizes` is false.
    """
    if params.logit_bias:
        logits_V = add_logit_bias(logits_V, params.logit_bias)
    if params.penalizes:
        if history is None:
            raise ValueError("penalties need the history of the sequence")
        if params.repetition_penalty != 1.0:
            logits_V = penalize_repetition(logits_V, history.seen_V, params.repetition_penalty)
        if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
            logits_V = penalize_frequency(logits_V, history.counts_V, params.frequency_penalty, params.presence_penalty)
    return logits_V


# ---------------------------------------- filters


def filter_top_k(logits_N: Tensor, k: int) -> Tensor:
    """-inf for all but the `k` largest and whatever equals the k-th: no sort's whim decides among equals."""
    if not 0 < k < logits_N.numel():
        return logits_N
    return logits_N.masked_fill(logits_N < logits_N.topk(k).values[-1], -torch.inf)


def filter_top_p(logits_N: Tensor, p: float) -> Tensor:
    """-inf outside the nucleus: the fewest likeliest tokens whose probabilities sum to at least `p`.

    At least one token stays; among equals at the edge the lowest ids (Holtzman et al., arXiv:1904.09751).
    """
    if p >= 1.0:
        return logits_N
    weights_N = weights(logits_N - logits_N.max())
    total = weights_N.cumsum(0)[-1]  # not sum(), whose order of adding depends on how many there are
    # A nucleus is mostly small: look among the few largest before sorting a whole vocabulary. Logits are compared, as
    # two that differ may have the same probability after rounding.
    for size in (*FEW, logits_N.numel()):
        size = min(size, logits_N.numel())
        largest, ids = logits_N.topk(size)
        cumulative = weights_N[ids].cumsum(0) / total
        if float(cumulative[-1]) >= p:
            break
    n_kept = min(int((cumulative < p).sum()) + 1, size)
    edge = largest[n_kept - 1]
    keep_N = logits_N > edge
    at_edge = (logits_N == edge).nonzero().squeeze(1)
    keep_N[at_edge[: n_kept - int(keep_N.sum())]] = True
    return logits_N.masked_fill(~keep_N, -torch.inf)


def filter_min_p(logits_N: Tensor, p: float) -> Tensor:
    """-inf for tokens less likely than `p` times the likeliest token's probability (arXiv:2407.01082)."""
    if p <= 0.0:
        return logits_N
    # A ratio of probabilities is a difference of logits: no softmax needed.
    return logits_N.masked_fill(logits_N < logits_N.max() + math.log(p), -torch.inf)


def _filter(logits_N: Tensor, params: SamplingParams) -> Tensor:
    """Temperature, top_p and min_p. The largest logit becomes 0, so no temperature overflows."""
    scaled_N = (logits_N - logits_N.max()) / min(params.temperature, MAX_DIVISOR)
    return filter_min_p(filter_top_p(scaled_N, params.top_p), params.min_p)


def distribution(logits_V: Tensor, params: SamplingParams, history: History | None = None) -> Tensor:
    """The exact probabilities `sample` draws from, float64 `[V]`; one-hot when greedy."""
    logits_V = adjust(logits_V.float(), params, history)
    if params.greedy:
        probs_V = torch.zeros(logits_V.numel(), dtype=torch.float64)
        probs_V[logits_V.argmax()] = 1.0
        return probs_V
    weights_V = weights(_filter(filter_top_k(logits_V, params.top_k), params))
    return weights_V / weights_V.sum()


# ---------------------------------------- choosing


def sample(logits_V: Tensor, params: SamplingParams, generator: torch.Generator, history: History | None = None) -> int:
    """One token id from one row of logits.

    Args:
        logits_V: float `[V]` on the CPU; left as it is.
        params: what to do with them.
        generator: a CPU generator; advanced by one float64 uniform, not at all when greedy.
        history: the tokens before; needed where `params.penalizes`.

    Raises:
        OctavoError: the logits hold NaN or +inf, or not one finite value.
    """
    logits_V = adjust(logits_V.float(), params, history)
    if params.greedy:
        best = logits_V.argmax()  # the first of equals, and NaN before anything
        _require_finite(logits_V[best], logits_V)
        return int(best)
    _require_finite(logits_V.max(), logits_V)  # NaN and +inf both show in the maximum
    if 0 < params.top_k < logits_V.numel():
        # All later stages then work on few candidates; `nonzero` gives them in the order of their ids.
        ids_N = (logits_V >= logits_V.topk(params.top_k).values[-1]).nonzero().squeeze(1)
        return int(ids_N[_draw(_filter(logits_V[ids_N], params), generator)])
    return _draw(_filter(logits_V, params), generator)


def weights(logits_N: Tensor) -> Tensor:
    """Unnormalised probabilities of logits whose largest is 0; any shape.

    float64, as many of them will be summed, and as devices' exponentials then differ too little to change a draw.
    """
    return logits_N.double().exp()


def _draw(logits_N: Tensor, generator: torch.Generator) -> int:
    """An index drawn with probability softmax(logits), by inverting the cumulative sum of the weights.

    The first index whose cumulative weight exceeds u * total, u in [0, 1): a weight of 0 is never drawn.
    """
    cumulative_N = weights(logits_N).cumsum(0)
    return int(torch.searchsorted(cumulative_N, uniform(generator) * cumulative_N[-1], right=True))


def uniform(generator: torch.Generator) -> Tensor:
    """The random number of one draw: float64 `[1]` in [0, 1), on the CPU."""
    return torch.rand(1, generator=generator, dtype=torch.float64)


def _require_finite(largest: Tensor, logits_V: Tensor) -> None:
    if math.isfinite(float(largest)):
        return
    n_bad = int((logits_V.isnan() | (logits_V == torch.inf)).sum())
    what = f"{n_bad} NaN or infinite" if n_bad else "no finite"
    raise OctavoError(f"the model's logits hold {what} values; no token can be chosen from them")


class TokenLogprobs(NamedTuple):
    """A chosen token's log-probability under the model itself, and the likeliest tokens', best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def token_logprobs(logits_V: Tensor, token_id: int, k: int) -> TokenLogprobs:
    """Log-softmax of the model's own logits, untouched by this module: of `token_id` and of the top k."""
    (found,) = tokens_logprobs(logits_V[None], [token_id], k)
    return found


def tokens_logprobs(logits_TV: Tensor, token_ids: Sequence[int], k: int) -> list[TokenLogprobs]:
    """The same for T tokens, each with the logits it was chosen from."""
    logprobs_TV = logits_TV.float().log_softmax(-1)
    values_TK, ids_TK = logprobs_TV.topk(min(k, logprobs_TV.shape[-1]))
    chosen_T = logprobs_TV[torch.arange(len(token_ids)), torch.tensor(token_ids, dtype=torch.int64)]
    found = []
    for token_id, logprob, values, ids in zip(
        token_ids, chosen_T.tolist(), values_TK.tolist(), ids_TK.tolist(), strict=True
    ):
        pairs = zip(ids, values, strict=True)
        found.append(TokenLogprobs(token_id, logprob, tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))))
    return found


def make_generator(seed: int | None, index: int = 0) -> torch.Generator:
    """A CPU generator for a prompt's `index`-th reply: seeded with seed + index, afresh when None."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed((seed + index) % 2**63)
    return generator
