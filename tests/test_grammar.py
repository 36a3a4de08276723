"""Grammars: whatever tokens are drawn of those allowed, the reply is JSON, and valid against its schema."""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jsonschema
import mistral_common
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import OptionError
from octavo.grammar import CACHED, MAX_SCHEMA_CHARS, Grammar, GrammarConstraint
from octavo.llm import LLM
from octavo.tokenizer import Tokenizer
from test_chat import chatml_folder

MIXTRAL = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
PADDING = 7  # logits that the tokenizer has no ids for
ENDING = '}]",:01'

ADDRESS = {
    "type": "object",
    "properties": {
        "street": {"type": "string", "maxLength": 12},
        "number": {"type": "integer", "minimum": 1, "maximum": 999},
        "tags": {"type": "array", "items": {"enum": ["home", "work"]}, "maxItems": 3},
    },
    "required": ["street", "number", "tags"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {"node": {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/node"}}}}},
    "$ref": "#/$defs/node",
}


class Kind:
    """A tokenizer with its grammar, and what a random walk needs to know."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: tuple[int, ...]) -> None:
        self.tokenizer, self.stop_ids = tokenizer, stop_ids
        self.grammar = Grammar(tokenizer, tokenizer.n_vocab + PADDING, stop_ids)
        self.closing = {text: [i for i in tokenizer.encode(text) if tokenizer.decode([i]) == text] for text in ENDING}
        # What brings a reply to its end soonest, the best first.
        self.ends = [stop_ids, *([i for text in group for i in self.closing[text]] for group in ('}]"', ",:", "01"))]

    def walk(self, constraint: GrammarConstraint, rng: random.Random, limit: int = 900) -> list[int] | None:
        """Tokens drawn from those allowed, more and more such as end the reply; None if it did not end."""
        ids: list[int] = []
        for at in range(limit):
            allowed_V = constraint.allowed()
            groups = (
                [[i for i in group if allowed_V[i]] for group in self.ends] if rng.random() < 0.7 + at / 400 else []
            )
            ids.append(rng.choice(next(filter(None, groups), None) or allowed_V.nonzero().flatten().tolist()))
            constraint.accept(ids[-1])
            if ids[-1] in self.stop_ids:
                return ids
        return None


@pytest.fixture(scope="module")
def menny() -> LLM:
    return LLM.load("menny")


@pytest.fixture(scope="module")
def kinds(menny: LLM, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    """SentencePiece of two sizes, and a byte-level tokenizer.json one of whose stop ids has a text."""
    chatml = Tokenizer.from_folder(chatml_folder(tmp_path_factory.mktemp("chatml")))
    assert menny.tokenizer is not None
    assert chatml is not None
    speaking = chatml.control_id("<|im_start|>")
    assert speaking is not None
    assert chatml.decode([speaking]) == "<|im_start|>"
    return {
        "menny": Kind(menny.tokenizer, (2,)),
        "mixtral": Kind(Tokenizer.from_file(MIXTRAL), (2,)),
        "bytes": Kind(chatml, (int(chatml.eos_id or 0), speaking)),
    }


# --- random schemas --------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "naïve", "two words", 'quo"te', "{", "😀"])
KEYS = st.text("ab ü", max_size=3)
VALUES = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), st.text('abé"\\\n ', max_size=4))


@st.composite
def bounded(draw: st.DrawFn, low: str, high: str, least: int, most: int) -> dict[str, int]:
    """Two limits, either of which may be absent."""
    first, second = sorted([draw(st.integers(least, most)), draw(st.integers(least, most))])
    return {key: value for key, value in ((low, first), (high, second)) if draw(st.booleans())}


def scalars() -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["integer", "null"]}]),
        bounded("minimum", "maximum", -50, 50).map(lambda limits: {"type": "integer", **limits}),
        bounded("minimum", "maximum", -5, 5).map(lambda limits: {"type": "number", **limits}),
        bounded("minLength", "maxLength", 0, 5).map(lambda limits: {"type": "string", **limits}),
        st.sampled_from(["date", "uuid", "made-up"]).map(lambda name: {"type": "string", "format": name}),
        st.just({"type": "string", "pattern": "^[a-c]{2,4}x?$"}),
        st.lists(VALUES, min_size=1, max_size=3).map(lambda values: {"enum": values}),
        VALUES.map(lambda value: {"const": value}),
    )


@st.composite
def objects(draw: st.DrawFn, inner: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    properties = draw(st.dictionaries(NAMES, inner, max_size=3))
    made = {"type": "object", "properties": properties, "required": [n for n in properties if draw(st.booleans())]}
    return made | draw(st.sampled_from([{}, {"additionalProperties": False}, {"additionalProperties": True}]))


def composites(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(
        objects(inner),
        st.tuples(inner, bounded("minItems", "maxItems", 0, 3)).map(lambda p: {"type": "array", "items": p[0], **p[1]}),
        st.lists(inner, min_size=1, max_size=3).map(lambda schemas: {"anyOf": schemas}),
    )


SCHEMAS = st.recursive(scalars(), composites, max_leaves=6)
JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=8),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=8,
)


def valid(text: str, schema: dict[str, Any]) -> bool:
    """Whether a text is JSON and valid against the schema."""
    try:
        jsonschema.validate(json.loads(text), schema)
    except (json.JSONDecodeError, jsonschema.ValidationError):
        return False
    return True


@pytest.mark.parametrize("name", ["menny", "bytes"])
@settings(deadline=None, max_examples=150)
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_every_walk_obeys_its_schema(kinds: dict[str, Kind], name: str, schema: dict[str, Any], seed: int) -> None:
    kind = kinds[name]
    ids = kind.walk(kind.grammar.json_schema(schema)(), random.Random(seed))
    assert ids is not None
    assert ids[-1] in kind.stop_ids
    assert not set(ids[:-1]) & set(kind.stop_ids)
    text = kind.tokenizer.decode(ids[:-1])
    jsonschema.validate(json.loads(text), schema)


@settings(deadline=None, max_examples=100)
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_the_reply_may_end_where_it_is_whole_and_nowhere_else(
    kinds: dict[str, Kind], schema: dict[str, Any], seed: int
) -> None:
    kind = kinds["menny"]
    ids = kind.walk(kind.grammar.json_schema(schema)(), random.Random(seed))
    assert ids is not None
    constraint = kind.grammar.json_schema(schema)()
    for at, token_id in enumerate(ids):
        text = kind.tokenizer.decode(ids[:at])
        if constraint.allowed()[2]:
            assert valid(text, schema)
        elif not text[-1:].isdigit():  # of a bounded number llguidance takes fewer spellings than JSON: no -0
            assert not valid(text, schema)
        constraint.accept(token_id)


@pytest.mark.parametrize("name", ["menny", "mixtral", "bytes"])
@pytest.mark.parametrize("schema", [ADDRESS, TREE, {"type": "object"}, {}], ids=["address", "tree", "object", "any"])
def test_walks_of_every_kind_of_tokenizer(kinds: dict[str, Kind], name: str, schema: dict[str, Any]) -> None:
    kind = kinds[name]
    make = kind.grammar.json_schema(schema)
    walks = [kind.walk(make(), random.Random(seed)) for seed in range(8)]
    done = [kind.tokenizer.decode(ids) for ids in walks if ids is not None]
    assert len(done) >= 6
    for text in done:
        jsonschema.validate(json.loads(text.removesuffix("<|im_start|>")), schema)


@pytest.mark.parametrize("name", ["menny", "mixtral", "bytes"])
@settings(deadline=None, max_examples=30)
@given(value=st.dictionaries(KEYS, JSON, max_size=3), data=st.data())
def test_any_way_of_cutting_a_text_is_open(
    kinds: dict[str, Kind], name: str, value: dict[str, Any], data: st.DataObject
) -> None:
    """What the tokenizer makes of any JSON, plain or indented, and of the text cut anywhere."""
    kind = kinds[name]
    text = json.dumps(value, ensure_ascii=False, indent=data.draw(st.sampled_from([None, 2])))
    cut = data.draw(st.integers(0, len(text)))
    # A part that does not open the text is encoded without the blank that SentencePiece puts first.
    rest = kind.tokenizer.encode("\n" + text[cut:])
    lead = kind.tokenizer.encode("\n")
    ways = [kind.tokenizer.encode(text)]
    if rest[: len(lead)] == lead:
        ways.append([*kind.tokenizer.encode(text[:cut]), *rest[len(lead) :]])
    for ids in ways:
        if kind.tokenizer.decode(ids) != text:
            continue
        constraint = kind.grammar.json_object()()
        for token_id in ids:
            assert constraint.allowed()[token_id]
            constraint.accept(token_id)
        assert constraint.allowed()[list(kind.stop_ids)].all()


def test_a_reply_may_begin_with_one_blank(kinds: dict[str, Kind]) -> None:
    kind = kinds["menny"]
    blank, *brace = kind.tokenizer.encode("{")
    assert kind.tokenizer.token_name(blank) == "\u2581"
    for ids in ([blank, *brace], brace):
        constraint = kind.grammar.json_object()()
        for token_id in ids:
            constraint.accept(token_id)
        assert kind.tokenizer.decode(ids) == "{"
    constraint = kind.grammar.json_object()()
    constraint.accept(blank)
    assert not constraint.allowed()[blank]


@pytest.mark.parametrize("name", ["menny", "mixtral", "bytes"])
def test_no_control_token_and_no_padding(kinds: dict[str, Kind], name: str) -> None:
    """Within a string anything may come, but neither of these, nor a stop id that has a text."""
    kind = kinds[name]
    tokenizer = kind.tokenizer
    constraint = kind.grammar.json_schema({"type": "string"})()
    for token_id in kind.closing['"']:
        constraint.accept(token_id)
    allowed_V = constraint.allowed()
    assert allowed_V.dtype == torch.bool
    assert allowed_V.shape == (tokenizer.n_vocab + PADDING,)
    assert not allowed_V[-PADDING:].any()
    controls = [i for i in range(tokenizer.n_vocab) if tokenizer.control_id(tokenizer.token_name(i)) == i]
    assert {*kind.stop_ids} <= {*controls}
    assert not allowed_V[controls].any()
    assert allowed_V.sum() > tokenizer.n_vocab / 2


def test_a_stop_id_that_is_a_plain_word(menny: LLM) -> None:
    """It ends the reply, and so it may not stand within a string."""
    tokenizer = menny.tokenizer
    assert tokenizer is not None
    word = tokenizer.encode("the")[0]
    assert tokenizer.decode([word]) == "the"
    constraint = Grammar(tokenizer, tokenizer.n_vocab, [2, word]).json_schema({"type": "string"})()
    quote = next(i for i in range(tokenizer.n_vocab) if tokenizer.token_name(i) == '"')
    constraint.accept(quote)
    assert not constraint.allowed()[word]
    constraint.accept(quote)
    assert constraint.allowed()[[2, word]].all()


def test_white_space_does_not_go_on_for_ever(kinds: dict[str, Kind]) -> None:
    kind = kinds["menny"]
    constraint = kind.grammar.json_object()()
    for token_id in kind.tokenizer.encode('{"a":'):
        constraint.accept(token_id)
    blank = [i for i in range(kind.tokenizer.n_vocab) if kind.tokenizer.detokenizer(mid_text=True).push(i).isspace()]
    drawn = 0
    while (possible := [i for i in blank if constraint.allowed()[i]]) and drawn < 100:
        constraint.accept(min(possible, key=lambda i: len(kind.tokenizer.token_name(i))))
        drawn += 1
    assert 1 <= drawn <= 33


# --- schemas that cannot be used -------------------------------------------------------------------------


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


REFUSED = [
    (3, "must be a JSON object, found int"),
    ({"type": "strin"}, "Invalid type: strin"),
    ({"type": 5}, "type must be a string"),
    ({"not": {}}, "Unimplemented keys.*not"),
    ({"properties": {"a": {"uniqueItems": True}}}, "uniqueItems"),
    ({"type": "string", "pattern": "("}, "unclosed group"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum .5. is greater than maximum .3."),
    ({"required": ["b"], "type": "object", "additionalProperties": False}, "'b' is unsatisfiable"),
    ({"$ref": "#/nowhere"}, "'/nowhere' does not exist"),
    ({"$ref": "http://127.0.0.1:9/schema"}, "does not fetch"),
    ({"$ref": "#"}, "nothing satisfies it"),
    ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "nothing satisfies"),
    (nested(200), "recursion limit"),
    (nested(5000), "nested too deeply"),
    ({"enum": ["x" * MAX_SCHEMA_CHARS]}, "100,000 are the limit"),
    ({"const": float("nan")}, "not JSON"),
    ({"const": {1}}, "not JSON"),
    ({"const": "\ud800"}, "hex escape"),
    (
        {"allOf": [{"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in range(10)]} for i in range(9)]},
        "too large",
    ),
]


@pytest.mark.parametrize(("schema", "says"), REFUSED, ids=[str(at) for at in range(len(REFUSED))])
def test_schemas_that_cannot_be_used(kinds: dict[str, Kind], schema: Any, says: str) -> None:
    with pytest.raises(OptionError, match=says) as caught:
        kinds["menny"].grammar.json_schema(schema)
    assert caught.value.message.startswith("response_format: ")
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300


HEAVY = {
    "many properties": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}},
    "counted": {"type": "string", "pattern": "^(a?){500}a{500}$"},
    "counted twice": {"type": "string", "pattern": "((((a{100}){100}){100}){100})"},
    "branching": {"type": "string", "pattern": "^" + "(a|b|c|d|e)*" * 200 + "$"},
    "long": {"type": "string", "minLength": 10**9},
    "doubling": {
        "$defs": {
            f"d{i}": {"type": "object", "properties": {k: {"$ref": f"#/$defs/d{i + 1}"} for k in "ab"}}
            for i in range(40)
        }
        | {"d40": {"type": "null"}},
        "$ref": "#/$defs/d0",
    },
}


@pytest.mark.parametrize("name", HEAVY)
def test_schemas_that_could_take_for_ever(kinds: dict[str, Kind], name: str) -> None:
    """They are legal, and so they are used, in the time that their size deserves."""
    kind, rng, start = kinds["menny"], random.Random(3), time.perf_counter()
    constraint = kind.grammar.json_schema(HEAVY[name])()
    for _ in range(40):
        constraint.accept(rng.choice(constraint.allowed().nonzero().flatten().tolist()))
    assert time.perf_counter() - start < 10


def test_a_schema_that_becomes_too_much_on_the_way(kinds: dict[str, Kind]) -> None:
    """The reply fails; it does not just end."""
    kind = kinds["menny"]
    constraint = kind.grammar.json_schema({"type": "object", "properties": {f"p{i}": {} for i in range(6000)}})()
    brace = next(i for i in range(kind.tokenizer.n_vocab) if kind.tokenizer.token_name(i) == "<0x7B>")
    with pytest.raises(OptionError, match=r"response_format: .*items"):
        constraint.accept(brace)
    with pytest.raises(OptionError, match=r"response_format: .*items"):
        constraint.allowed()


def test_a_token_that_was_not_allowed(kinds: dict[str, Kind]) -> None:
    constraint = kinds["menny"].grammar.json_object()()
    (token_id,) = kinds["menny"].closing["]"]
    assert not constraint.allowed()[token_id]
    with pytest.raises(OptionError, match="response_format"):
        constraint.accept(token_id)


def test_lark(kinds: dict[str, Kind]) -> None:
    """`<[3]>` is the control token [INST], which no text could bring about."""
    kind = kinds["menny"]
    ids = kind.walk(kind.grammar.lark('start: <[3]> ("yes" | "no")')(), random.Random(1))
    assert ids is not None
    assert ids[0] == 3
    assert kind.tokenizer.decode(ids) in ("yes", "no")
    with pytest.raises(OptionError, match="response_format: "):
        kind.grammar.lark("start: nowhere")


def test_what_a_grammar_needs(menny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert menny.tokenizer is not None
    with pytest.raises(OptionError, match="no end-of-text token"):
        Grammar(menny.tokenizer, menny.tokenizer.n_vocab, [-1, menny.tokenizer.n_vocab])
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(OptionError, match="llguidance") as caught:
        Grammar(menny.tokenizer, menny.tokenizer.n_vocab, [2])
    assert caught.value.hint == "pip install 'octavo[serve]'"


# --- many at once, and a real model ----------------------------------------------------------------------


def test_compiled_once_and_kept_within_bounds(menny: LLM) -> None:
    assert menny.tokenizer is not None
    grammar = Grammar(menny.tokenizer, menny.tokenizer.n_vocab, [2])
    grammar.json_schema(ADDRESS)
    first = list(grammar._compiled.values())
    grammar.json_schema(json.loads(json.dumps(ADDRESS)))
    assert list(grammar._compiled.values()) == first
    for most in range(CACHED + 5):
        grammar.json_schema({"type": "integer", "minimum": 0, "maximum": most})
        grammar.json_schema(ADDRESS)  # in use, and so kept
    assert len(grammar._compiled) == CACHED
    assert first[0] in grammar._compiled.values()


def test_constraints_do_not_disturb_each_other(kinds: dict[str, Kind]) -> None:
    """Made in many threads and walked at the same time, they give what they give alone."""
    kind = kinds["menny"]
    schemas = [ADDRESS, TREE, {"type": "array", "items": {"type": "integer"}, "minItems": 3}]
    alone = [kind.walk(kind.grammar.json_schema(schemas[n % 3])(), random.Random(n)) for n in range(9)]
    fresh = Kind(kind.tokenizer, kind.stop_ids)
    together: dict[int, list[int] | None] = {}

    def one(n: int) -> None:
        together[n] = fresh.walk(fresh.grammar.json_schema(schemas[n % 3])(), random.Random(n))

    threads = [threading.Thread(target=one, args=(n,)) for n in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[n] for n in range(9)] == alone


@pytest.mark.parametrize("seed", range(3))
def test_a_real_model_at_a_high_temperature(menny: LLM, kinds: dict[str, Kind], seed: int) -> None:
    """Menny never saw a schema, and all the same fills one in."""
    kind, generator = kinds["menny"], torch.Generator().manual_seed(seed)
    prompt = menny.template.render([{"role": "user", "content": "Where do you live?"}])
    constraint, ids = kind.grammar.json_schema(ADDRESS)(), list(prompt)
    for _ in range(150):
        logits_V = menny.model(torch.tensor([ids]))[0, -1].float()
        allowed_V = constraint.allowed()[: len(logits_V)]
        probs_V = (logits_V / 1.5).masked_fill(~allowed_V, -torch.inf).softmax(-1)
        ids.append(int(torch.multinomial(probs_V, 1, generator=generator)))
        constraint.accept(ids[-1])
        if ids[-1] == 2:
            break
    assert ids[-1] == 2
    jsonschema.validate(json.loads(kind.tokenizer.decode(ids[len(prompt) : -1])), ADDRESS)
