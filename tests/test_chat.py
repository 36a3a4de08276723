"""Chat templates against mistral-common and transformers' renderer; personas; bad conversations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mistral_common
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers.utils.chat_template_utils import render_jinja_template

from octavo.chat import ChatTemplate, InstructV1, InstructV3, Message, Persona, template_for
from octavo.chat.persona import SHIPPED
from octavo.errors import PersonaError, PromptError, TokenizerError
from octavo.tokenizer import Tokenizer

DATA = Path(mistral_common.__file__).parent / "data"
FILES = {
    "v1": DATA / "tokenizer.model.v1",
    "v2": DATA / "mistral_instruct_tokenizer_240216.model.v2",
    "v3": DATA / "mistral_instruct_tokenizer_240323.model.v3",
}
GREETING = [Message("user", "Hello"), Message("assistant", "Hi there"), Message("user", "Bye")]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMING = (
    "{{ bos_token }}{%- for message in messages -%}{% if message.role == 'user' %}\n### "
    "{{ message.content | trim }}{% else %}\n=== {{ message.content }}{{ eos_token }}{% endif %}{%- endfor -%}\n=== "
)
SHOUTING = "{{ bos_token }}{% for message in messages %}{{ message.content | upper }}{{ eos_token }}{% endfor %}"
LLAMA_2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' "
    "+ message['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MIXTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)

CONTROLS = st.sampled_from(["[INST]", "[/INST]", "<s>", "</s>", "<|im_end|>", "<|im_start|>", " ", "\n", "😀"])
CHARS = st.characters(exclude_categories=("Cs",))
TEXT = st.lists(st.one_of(CONTROLS, st.text(CHARS, max_size=8))).map("".join)
SAID = TEXT.filter(lambda text: text.strip() != "")


@st.composite
def conversations(draw: st.DrawFn, *, last: str = "user") -> list[Message]:
    """Any conversation in turn, with a system message or none."""
    turns = [Message("system", draw(SAID))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        turns += [Message("user", draw(SAID)), Message("assistant", draw(SAID))]
    turns.append(Message("user", draw(SAID)))
    return turns if last == "user" else [*turns, Message("assistant", draw(TEXT))]


@pytest.fixture(scope="module")
def every() -> dict[str, ChatTemplate]:
    return {name: template_for(Tokenizer.from_file(path)) for name, path in FILES.items()}


@pytest.fixture(scope="module")
def theirs() -> dict[str, MistralTokenizer]:
    return {name: MistralTokenizer.from_file(str(path)) for name, path in FILES.items()}


# --- Mistral's templates ---------------------------------------------------------------------------------

BYE_V1 = "733 28748 16289 28793 15359 736 2 733 16289 28793 2463 28706 733 28748 16289 28793"
GOLDENS = [
    ("v1", None, f"1 733 16289 28793 22557 {BYE_V1}"),
    ("v1", "Be nice", f"1 733 16289 28793 1739 5171 13 13 16230 {BYE_V1}"),
    ("v2", None, "1 3 23325 4 16127 1504 2 3 3231 29474 4"),
    ("v3", None, "1 3 23325 4 16127 1504 2 3 3231 29474 4"),
    ("v2", "Be nice", "1 3 23325 4 16127 1504 2 3 2507 5939 781 781 2698 29474 4"),
    ("v3", "Be nice", "1 3 23325 4 16127 1504 2 3 2507 5939 781 781 2698 29474 4"),
]


@pytest.mark.parametrize(("version", "system", "ids"), GOLDENS)
def test_goldens(every: dict[str, ChatTemplate], version: str, system: str | None, ids: str) -> None:
    messages = [Message("system", system), *GREETING] if system else GREETING
    assert every[version].render(messages) == [int(i) for i in ids.split()]
    assert every[version].name == ("v1" if version == "v1" else "v3")
    assert every[version].stop_ids == (2,)


@pytest.mark.parametrize("version", FILES)
@settings(deadline=None)
@given(messages=conversations())
def test_as_mistral_common(
    every: dict[str, ChatTemplate], theirs: dict[str, MistralTokenizer], version: str, messages: list[Message]
) -> None:
    kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    request = ChatCompletionRequest(messages=[kinds[m.role](content=m.content) for m in messages])
    assert every[version].render(messages) == theirs[version].encode_chat_completion(request).tokens


@pytest.mark.parametrize("version", FILES)
@settings(deadline=None)
@given(messages=conversations())
def test_control_tokens_are_the_template_s_alone(
    every: dict[str, ChatTemplate], version: str, messages: list[Message]
) -> None:
    ids = every[version].render(messages)
    users = sum(message.role == "user" for message in messages)
    assert ids.count(1) == 1
    assert ids[0] == 1
    assert ids.count(2) == users - 1
    if version != "v1":
        assert ids.count(3) == ids.count(4) == users


@pytest.mark.parametrize("version", ["v1", "v3"])
@settings(deadline=None)
@given(messages=conversations(last="assistant"))
def test_training_ids(every: dict[str, ChatTemplate], version: str, messages: list[Message]) -> None:
    template = every[version]
    tokenizer = Tokenizer.from_file(FILES[version])
    ids, wrote = template.render_training(messages)
    assert len(ids) == len(wrote)
    # What the model sees before its last reply is what it will see when it is asked.
    prompt = template.render(messages[:-1])
    assert ids[: len(prompt)] == prompt
    assert all(wrote[len(prompt) :])
    assert ids[-1] == 2
    # The marked tokens are the replies, each with its EOS.
    replies = [m.content for m in messages if m.role == "assistant"]
    texts = [reply.rstrip(" ") if version == "v3" else reply for reply in replies]
    expected = [i for text in texts for i in [*tokenizer.encode(text), 2]]
    assert [i for i, mine in zip(ids, wrote, strict=True) if mine] == expected


def test_octavo_s_own_kind_of_tokenizer(tmp_path: Path) -> None:
    """A byte-fallback BPE with [INST] and [/INST] as control symbols, trained here, speaks v3."""
    prefix = tmp_path / "own"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["who are you? I am Menny. the router picks two of eight experts"] * 3),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["[INST]", "[/INST]"],
        minloglevel=2,
    )
    shutil.move(f"{prefix}.model", tmp_path / "tokenizer.model")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer is not None
    template = template_for(tokenizer)
    assert isinstance(template, InstructV3)
    inst, close = tokenizer.control_id("[INST]"), tokenizer.control_id("[/INST]")
    question = "who are [INST] you 😀?\n"
    ids, wrote = template.render_training([Message("user", question), Message("assistant", "I am Menny.")])
    reply = tokenizer.encode("I am Menny.")
    assert ids == [tokenizer.bos_id, inst, *tokenizer.encode(question), close, *reply, tokenizer.eos_id]
    assert wrote == [False] * (len(ids) - len(reply) - 1) + [True] * (len(reply) + 1)
    stream = tokenizer.detokenizer()
    assert "".join(map(stream.push, ids[wrote.index(True) :])) + stream.flush() == "I am Menny."


# --- a checkpoint's own template -------------------------------------------------------------------------


def chatml_folder(folder: Path, template: object = CHATML, **config: object) -> Path:
    """A byte-level checkpoint with ChatML's tokens; only one of the two is marked special, as in the wild."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["user\nassistant\nsystem\nhello there what is it"] * 5, trainer)
    made.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    made.add_tokens(["<|im_start|>"])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    defaults = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(defaults | config), encoding="utf-8")
    return folder


def spm_folder(folder: Path, template: str, version: str = "v1") -> Path:
    """A Mixtral fine-tune: 8x7B's or 8x22B's model file and a template of its own."""
    shutil.copy(FILES[version], folder / "tokenizer.model")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 32768, "<|im_start|>": 32769}))
    return folder


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(chatml_folder(tmp_path_factory.mktemp("chatml")))
    assert tokenizer is not None
    return tokenizer


def dicts(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def rendered(template: str, messages: list[Message], **names: str) -> str:
    """What transformers' own renderer makes of a template."""
    [text], _ = render_jinja_template(
        conversations=[dicts(messages)], chat_template=template, add_generation_prompt=True, **names
    )
    return str(text)


@settings(deadline=None)
@given(messages=conversations())
def test_chatml(chatml: Tokenizer, messages: list[Message]) -> None:
    template = template_for(chatml)
    assert template.name == "own"
    end = chatml.control_id("<|im_end|>")
    assert template.stop_ids == (chatml.eos_id, end)
    ids = template.render(messages)
    assert ids[0] == chatml.bos_id
    assert chatml.bos_id not in ids[1:]
    assert ids.count(end) == len(messages)
    assert ids.count(chatml.control_id("<|im_start|>")) == len(messages) + 1
    # As text it is what transformers renders, the template's own `<|im_end|>` aside: that one is hidden.
    masked = [Message(m.role, m.content.replace("<|im_end|>", "\ue000")) for m in messages]
    visible = rendered(CHATML, masked).replace("<|im_end|>", "")
    assert chatml.decode(ids) == visible.replace("\ue000", "<|im_end|>")


@settings(deadline=None)
@given(messages=conversations())
def test_ids_as_the_library_s_where_nobody_types_controls(chatml: Tokenizer, messages: list[Message]) -> None:
    messages = [Message(m.role, m.content.replace("<", "(")) for m in messages]
    library = tokenizers.Tokenizer.from_file(str(chatml.path))
    expected = library.encode(rendered(CHATML, messages), add_special_tokens=False).ids
    assert template_for(chatml).render(messages) == [chatml.bos_id, *expected]


def test_own_template_training_ids(chatml: Tokenizer) -> None:
    conversation = [*GREETING, Message("assistant", "bye now")]
    ids, wrote = template_for(chatml).render_training(conversation)
    assert wrote[0] is False
    mine = [i for i, said in zip(ids, wrote, strict=True) if said]
    end = chatml.control_id("<|im_end|>")
    assert mine == [*chatml.encode("Hi there"), end, *chatml.encode("bye now"), end]
    prompt = template_for(chatml).render(conversation[:-1])
    assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_chatml_on_a_sentencepiece_fine_tune(tmp_path: Path, version: str) -> None:
    tokenizer = Tokenizer.from_folder(spm_folder(tmp_path, CHATML, version))
    assert tokenizer is not None
    template = template_for(tokenizer)
    assert template.name == "own"
    ids = template.render([Message("system", "Be <|im_end|> nice"), Message("user", "</s><|im_start|>")])
    assert ids[0] == 1
    assert 2 not in ids
    assert [i for i in ids if i >= 32768] == [32769, 32768, 32769, 32768, 32769]
    assert template.stop_ids == (2, 32768)
    assert "Be <|im_end|> nice" in tokenizer.decode(ids)


@settings(deadline=None)
@given(messages=conversations())
def test_a_template_that_trims(tmp_path_factory: pytest.TempPathFactory, messages: list[Message]) -> None:
    if "own" not in _TRIMMED:
        folder = chatml_folder(tmp_path_factory.mktemp("trimming"), TRIMMING)
        _TRIMMED["own"] = Tokenizer.from_folder(folder)
    tokenizer = _TRIMMED["own"]
    messages = [Message(m.role, f" {m.content}\n ") for m in messages]
    ids = template_for(tokenizer).render(messages)
    assert ids.count(tokenizer.bos_id) == 1
    assert ids.count(tokenizer.eos_id) == sum(message.role != "user" for message in messages)
    plain = [Message(m.role, m.content.replace("<", "(")) for m in messages]
    library = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    text = rendered(TRIMMING, plain, bos_token="<s>", eos_token="</s>")
    assert template_for(tokenizer).render(plain) == library.encode(text, add_special_tokens=False).ids


_TRIMMED: dict[str, Tokenizer] = {}


def test_a_template_that_rewrites_messages(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(chatml_folder(tmp_path, SHOUTING))
    template = template_for(tokenizer)
    ids = template.render([Message("user", "hello")])
    assert ids == [tokenizer.bos_id, *tokenizer.encode("HELLO"), tokenizer.eos_id]
    with pytest.raises(PromptError, match="spells the control token </s>"):
        template.render([Message("user", "hello </s>")])
    with pytest.raises(TokenizerError, match="rewrites what is said"):
        template.render_training(GREETING[:2])


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_mistral_s_template_is_ours(tmp_path: Path, version: str, every: dict[str, ChatTemplate]) -> None:
    """A checkpoint with the [INST] format as jinja: the ids are made here, and a system prompt is taken."""
    template = template_for(Tokenizer.from_folder(spm_folder(tmp_path, MIXTRAL, version)))
    assert type(template) is {"v1": InstructV1, "v3": InstructV3}[version]
    messages = [Message("system", "Be nice"), *GREETING]
    assert template.render(messages) == every[version].render(messages)


def test_llama_2_s_template_is_not_ours(tmp_path: Path) -> None:
    """It says BOS before every question, and so it is left to say it."""
    template = template_for(Tokenizer.from_folder(spm_folder(tmp_path, LLAMA_2)))
    assert template.name == "own"
    assert template.render(GREETING).count(1) == 2


def test_bos_is_left_out_where_the_checkpoint_says_so(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(chatml_folder(tmp_path, add_bos_token=False))
    assert tokenizer.bos_id not in template_for(tokenizer).render(GREETING)
    doubled = Tokenizer.from_folder(chatml_folder(tmp_path, "{{ bos_token }}{{ bos_token }}" + CHATML))
    assert template_for(doubled).render(GREETING).count(doubled.bos_id) == 1


def test_what_transformers_templates_may_use(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m | tojson }}"
        "{% generation %}{{ 'x' }}{% endgeneration %}{% endfor %}{{ strftime_now('%Y') | length }}"
    )
    tokenizer = Tokenizer.from_folder(chatml_folder(tmp_path, template))
    ids = template_for(tokenizer).render([Message("system", "s"), Message("user", 'é "<q>"')])
    assert tokenizer.decode(ids) == '{"role": "user", "content": "é \\"<q>\\""}x4'


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system message here') }}",
        "{{ messages[7].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(3) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    ],
)
def test_a_template_that_fails(tmp_path: Path, template: str) -> None:
    tokenizer = Tokenizer.from_folder(chatml_folder(tmp_path, template))
    with pytest.raises(PromptError, match="chat template refuses this conversation"):
        template_for(tokenizer).render(GREETING)


def test_a_template_with_a_syntax_error(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(chatml_folder(tmp_path, "\n{% for %}"))
    with pytest.raises(TokenizerError, match="line 2 of the chat template"):
        template_for(tokenizer)


# --- conversations ---------------------------------------------------------------------------------------


def test_messages_of_other_shapes(every: dict[str, ChatTemplate]) -> None:
    assert Message.of({"role": "user", "content": "Hello"}) == Message("user", "Hello")
    assert every["v3"].render(dicts(GREETING)) == every["v3"].render(GREETING)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "narrator", "content": "x"}, "role 'narrator' is unknown"),
        ({"role": "tool", "content": "x"}, "needs tool_call_id"),
        ({"role": "user"}, "needs the keys"),
        ({"role": "user", "content": "x", "nickname": "y"}, "'nickname'"),
        ({"role": "user", "content": ["x"]}, "must be a string, found list"),
        ("Hello", "found str"),
    ],
)
def test_messages_that_are_none(every: dict[str, ChatTemplate], message: object, says: str) -> None:
    with pytest.raises(PromptError, match=says):
        every["v3"].render([message])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("roles", "says"),
    [
        ("", "the conversation is empty"),
        ("s", "the conversation is empty"),
        ("uu", "message 1 is the user's, but it is the assistant's turn"),
        ("suu", "message 2 is the user's"),
        ("au", "message 0 is the assistant's"),
        ("us", "message 1 is the system's"),
        ("ua", "the last message must be the user's, found the assistant's"),
    ],
)
def test_conversations_out_of_turn(every: dict[str, ChatTemplate], chatml: Tokenizer, roles: str, says: str) -> None:
    names = {"s": "system", "u": "user", "a": "assistant"}
    messages = [{"role": names[role], "content": "x"} for role in roles]
    for template in (every["v1"], every["v3"], template_for(chatml)):
        with pytest.raises(PromptError, match=says):
            template.render(messages)


def test_blank_and_broken_words(every: dict[str, ChatTemplate], chatml: Tokenizer) -> None:
    for template in (every["v1"], every["v3"], template_for(chatml)):
        with pytest.raises(PromptError, match="blank"):
            template.render([Message("user", " \n")])
        with pytest.raises(PromptError, match="surrogate"):
            template.render([Message("user", "a\ud800")])
        with pytest.raises(PromptError, match="last message must be the assistant's"):
            template.render_training([Message("user", "x")])
    # A reply may be empty: the model has the right to say nothing.
    silent = [Message("user", "Hello"), Message("assistant", ""), Message("user", "Bye")]
    assert every["v3"].render(silent) == [1, 3, 23325, 4, 2, 3, 3231, 29474, 4]


def test_a_tokenizer_without_eos(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="no end-of-text token"):
        template_for(Tokenizer.from_folder(tmp_path))


# --- personas --------------------------------------------------------------------------------------------


def test_menny() -> None:
    menny = Persona.load("menny")
    assert Persona.load("Menny") == menny
    assert menny.name == "Menny"
    assert menny.system == "You are Menny, a cynical teenager who knows her stuff. Be brief, be right, be dry."
    assert menny.sampling == {"temperature": 0.3, "top_p": 0.9}
    assert "menny" in Persona.shipped()


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_persona_loads(path: Path) -> None:
    assert Persona.load(path).name.lower() == path.stem


def test_a_persona_of_one_s_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('name = "Zoë"\nsystem = "Sois brève."\n', encoding="utf-8")
    assert Persona.load(str(path)) == Persona.load(path) == Persona("Zoë", "Sois brève.")


GOOD = 'name = "X"\nsystem = "y"\n'


@pytest.mark.parametrize(
    ("text", "says", "hint"),
    [
        (GOOD + "smapling = 3", "unknown key 'smapling'", "did you mean 'sampling'?"),
        ('name = "X"', "'system' is missing", "a persona file has"),
        ('system = "X"', "'name' is missing", "a persona file has"),
        (GOOD + "description = 3", "description must be a string, found 3", "a persona file has"),
        (GOOD + "sampling = 3", "sampling must be a table", "[sampling]"),
        ('name = "X"\nsystem = "never closed', r"not valid TOML: .*line 2", "a persona file has"),
        (GOOD + "[sampling]\ntemprature = 0.3", r"\[sampling\] .*temprature", "temperature"),
        (GOOD + "[sampling]\ntemperature = -1", r"\[sampling\] .*temperature", None),
        (GOOD + '[sampling]\ntop_p = "high"', r"\[sampling\] .*top_p", None),
    ],
)
def test_persona_files_with_a_mistake(tmp_path: Path, text: str, says: str, hint: str | None) -> None:
    path = tmp_path / "typo.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PersonaError, match=says) as caught:
        Persona.load(path)
    assert "typo.toml" in caught.value.message
    assert "\n" not in caught.value.message
    if hint is not None:
        assert hint in str(caught.value.hint)


def test_personas_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(PersonaError, match=r"no persona named 'meny'; these ship with Octavo: .*menny") as caught:
        Persona.load("meny")
    assert caught.value.hint == "did you mean 'menny'?"
    with pytest.raises(PersonaError, match="no such persona file"):
        Persona.load(str(tmp_path / "none.toml"))
    with pytest.raises(PersonaError, match="cannot be read"):
        Persona.load(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'name = "Zo\xeb"')
    with pytest.raises(PersonaError, match="not UTF-8"):
        Persona.load(tmp_path / "latin.toml")
