"""`octavo routing ablate`: effects equal slow formulas, planted structure is found, and nothing is no effect."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import tiny_model
from octavo.checkpoint import open_checkpoint
from octavo.errors import OptionError, PromptError, TokenizerError
from octavo.experts import StreamedExperts
from octavo.hooks import observed
from octavo.kernels.modules import uses_kernels
from octavo.llm import LLM
from octavo.load import build_model
from octavo.model import Mixtral, Routing
from octavo.plan import Placement
from octavo.routing.ablate import Effect, Figures, encode_documents, measure, sweep
from octavo.routing.interventions import (
    Disable,
    Force,
    Intervention,
    Project,
    Random,
    RandomProject,
    Shuffled,
    Swap,
    TopK,
    applied,
)
from octavo.routing.texts import Document, built_in_documents
from run_octavo import refused, run, terminal
from stores import make_source, quantise
from tiny_folder import make_tiny_folder

E, K = 8, 2
MODEL = tiny_model()
TEXTS = [[(7 * i + 3 * i * i + seed) % 101 for i in range(n)] for seed, n in enumerate((30, 41, 2, 25))]
LABELS = ["a", "b", "a", "b"]


@pytest.fixture(scope="module")
def menny() -> LLM:
    return LLM.load("menny")


def read(model: Mixtral, ids: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Logits and choices of a text."""
    chosen: list[Routing] = []
    with observed(model, chosen.extend):
        logits = model(torch.tensor([ids]))[0]
    return logits, [one.topk_ids_TK for one in chosen]


def read_with(interventions: list[Intervention], ids: list[int]) -> tuple[Tensor, list[Tensor]]:
    with applied(MODEL, interventions):
        return read(MODEL, ids)


def assert_nothing(effect: Effect) -> None:
    """To the last bit."""
    for figures in (effect.overall, *effect.by_domain.values()):
        assert figures.before == figures.after
        assert [float(part) for part in figures.difference] == [0, 0, 0]
        assert [float(part) for part in figures.kl] == [0, 0, 0]
        assert float(figures.flipped.value) == 0
    assert effect.migration.value.tolist() == [0] * len(effect.moved)
    for moved in effect.moved:
        assert np.array_equal(moved, np.diag(np.diag(moved)))


def test_what_changes_nothing_has_no_effect_at_all(menny: LLM) -> None:
    ids = [menny.model.args.vocab_size - 1 - i for i in range(40)]
    swap = Swap(2, 1, 6)
    for identity in ([], [TopK(K)], [swap, swap], [Swap(None, 3, 0), Swap(None, 0, 3)]):
        effect = measure(menny, [ids, ids[::-1]], identity, labels=["x", "y"])
        assert_nothing(effect)
        assert effect.moved.sum() == 5 * K * effect.overall.n_tokens == 5 * K * 78


def test_an_expert_that_nobody_chooses_is_not_missed() -> None:
    few = [TEXTS[0][:4]]
    _, chosen = read(MODEL, few[0])
    idle = [(layer, e) for layer, ids in enumerate(chosen) for e in range(E) if not (ids == e).any()]
    assert idle
    for layer, expert in idle:
        assert_nothing(measure(MODEL, few, [Disable(layer, (expert,))]))


@pytest.mark.parametrize("interventions", [[Disable(0, (3,))], [TopK(1)], [Force(1, (5,)), Disable(0, (1, 2))]])
def test_figures_are_those_of_slow_formulas(interventions: list[Intervention]) -> None:
    effect = measure(MODEL, TEXTS, interventions, labels=LABELS)
    found: dict[str, list[list[float]]] = {"a": [], "b": []}
    gone, counts, moved = [0.0, 0.0], 0, np.zeros((2, E, E))
    for ids, label in zip(TEXTS, LABELS, strict=True):
        (before, chosen), (after, other) = read(MODEL, ids), read_with(interventions, ids)
        for at in range(len(ids) - 1):
            p, q = (F.softmax(logits[at].double(), dim=0) for logits in (before, after))
            losses = [float(F.cross_entropy(logits[at], torch.tensor(ids[at + 1]))) for logits in (before, after)]
            kl, flipped = float((p * (p / q).log()).sum()), float(p.argmax() != q.argmax())
            found[label].append([*losses, losses[1] - losses[0], kl, flipped])
            counts += K
            for layer in range(2):
                was, now = (set(c[layer][at].tolist()) for c in (chosen, other))
                gone[layer] += len(was - now)
                for expert in was & now:
                    moved[layer, expert, expert] += 1
                for lost in was - now:
                    for gained in now - was:
                        moved[layer, lost, gained] += 1 / len(now - was)
    assert effect.overall.n_tokens == sum(map(len, TEXTS)) - len(TEXTS) == counts // K
    assert_means(effect.overall, found["a"] + found["b"])
    assert set(effect.by_domain) == {"a", "b"}
    for label, rows in found.items():
        assert_means(effect.by_domain[label], rows)
    np.testing.assert_allclose(effect.migration.value, np.array(gone) / counts)
    np.testing.assert_allclose(effect.moved, moved, atol=1e-9)
    assert effect.interventions == tuple(map(str, interventions))
    assert effect.migration.value.max() > 0.03


def assert_means(figures: Figures, rows: list[list[float]]) -> None:
    estimates = (figures.before, figures.after, figures.difference, figures.kl, figures.flipped)
    assert figures.n_tokens == len(rows)
    np.testing.assert_allclose([float(one.value) for one in estimates], np.mean(rows, axis=0), rtol=2e-5, atol=2e-6)
    assert all(one.low <= one.value <= one.high for one in estimates)
    assert all(one.low >= 0 for one in (figures.before, figures.after, figures.kl, figures.flipped))


def test_a_domain_alone_has_the_figures_it_has_among_others() -> None:
    among = measure(MODEL, TEXTS, [TopK(1)], labels=LABELS)
    alone = measure(MODEL, [TEXTS[1], TEXTS[3]], [TopK(1)])
    assert alone.by_domain == {}
    for name in ("before", "after", "difference", "kl", "flipped"):
        assert float(getattr(among.by_domain["b"], name).value) == pytest.approx(
            float(getattr(alone.overall, name).value), abs=1e-12
        )


# ------------------------------------------------------------------ windows


@pytest.mark.parametrize("window", [3, 7, 12, 40, 41, 100])
def test_each_token_is_predicted_once_from_the_window_it_is_in(window: int) -> None:
    ids = TEXTS[1]
    losses = []
    for begin in range(0, len(ids) - 1, window - 1):
        part = ids[begin : begin + window]
        losses += F.cross_entropy(read(MODEL, part)[0][:-1], torch.tensor(part[1:]), reduction="none").tolist()
    assert len(losses) == len(ids) - 1
    figures = measure(MODEL, [ids], [], window=window).overall
    assert figures.n_tokens == len(losses)
    assert float(figures.before.value) == pytest.approx(np.mean(losses), rel=1e-5)


def test_windows_of_a_text_with_bos_all_begin_with_it(menny: LLM) -> None:
    assert menny.tokenizer is not None
    bos = menny.tokenizer.bos_id
    ids = [bos, *range(100, 120)]
    losses = []
    for part in (ids[:8], [bos, *ids[7:14]], [bos, *ids[13:20]], [bos, *ids[19:]]):
        n_again = 0 if part is ids[:8] or not losses else 1
        logits, _ = read(menny.model, part)
        losses += F.cross_entropy(logits[n_again:-1], torch.tensor(part[n_again + 1 :]), reduction="none").tolist()
    figures = measure(menny, [ids], [], window=8).overall
    assert figures.n_tokens == len(losses) == len(ids) - 1
    assert float(figures.before.value) == pytest.approx(np.mean(losses), rel=1e-5)


def test_no_window_is_longer_than_the_context() -> None:
    model = tiny_model(max_seq_len=16)
    long = [i % 101 for i in range(50)]
    lengths: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    measure(model, [long], [])
    measure(LLM(model, None, context=9), [long], [])
    hook.remove()
    assert max(lengths[:8]) == 16
    assert lengths[-1] <= 9 == lengths[8]


# ------------------------------------------------------------------ planted structure


def planted(plant: Callable[[Mixtral], None]) -> Mixtral:
    model = copy.deepcopy(MODEL)
    with torch.no_grad():
        plant(model)
    return model


def test_swapping_copies_changes_nothing_and_swapping_others_does() -> None:
    def plant(model: Mixtral) -> None:
        experts = model.layers[1].feed_forward.experts
        experts[6].load_state_dict(experts[2].state_dict())

    model = planted(plant)
    same = measure(model, TEXTS, [Swap(1, 2, 6)])
    assert [float(part) for part in same.overall.difference] == [0, 0, 0]
    assert float(same.overall.kl.value) == 0
    assert same.migration.value[1] > 0.1  # the choices did change
    other = measure(model, TEXTS, [Swap(1, 2, 5)])
    assert other.overall.kl.low > 0


def test_a_sweep_finds_the_experts_that_say_something() -> None:
    speaking = {0: 5, 1: 2}

    def plant(model: Mixtral) -> None:
        for layer, speaker in speaking.items():
            for number, expert in enumerate(model.layers[layer].feed_forward.experts):
                expert.w2.weight.mul_(3 if number == speaker else 0)

    model = planted(plant)
    found = sweep(model, TEXTS, labels=LABELS)
    assert dict(enumerate(found.kl.value.argmax(axis=1))) == speaking
    dumb = measure(model, TEXTS, [Swap(0, 1, 2), Swap(1, 3, 4)])
    assert [float(part) for part in dumb.overall.kl] == [0, 0, 0]


def test_a_sweep_is_one_measurement_for_each_expert() -> None:
    found = sweep(MODEL, TEXTS, labels=LABELS)
    assert found.difference.value.shape == found.kl.value.shape == found.load.shape == (2, E)
    counts = np.zeros((2, E))
    for ids in TEXTS:
        for layer, chosen in enumerate(read(MODEL, ids)[1]):
            counts[layer] += np.bincount(chosen[:-1].flatten(), minlength=E)
    for layer, expert in ((0, 0), (0, 7), (1, 3)):
        one = measure(MODEL, TEXTS, [Disable(layer, (expert,))], labels=LABELS)
        assert found.difference.value[layer, expert] == pytest.approx(float(one.overall.difference.value), abs=1e-12)
        assert found.kl.value[layer, expert] == pytest.approx(float(one.overall.kl.value), abs=1e-12)
        for label, figures in one.by_domain.items():
            rise = found.by_domain[label].value[layer, expert]
            assert rise == pytest.approx(float(figures.difference.value), abs=1e-12)
    assert found.n_tokens == 94
    np.testing.assert_allclose(found.load, counts / counts.sum(axis=1, keepdims=True))


def test_shuffled_and_random_routing_ruin_a_trained_model(menny: LLM) -> None:
    texts, _ = encode_documents(menny, built_in_documents()[:3])
    for one in (Shuffled(), Random()):
        effect = measure(menny, texts, [one])
        assert effect.overall.difference.low > 3
        last = measure(menny, texts, [type(one)(layer=4)])
        assert last.overall.difference.value < effect.overall.difference.value
        assert last.migration.value[:4].tolist() == [0] * 4
        assert last.migration.value[4] > 0.4


# ------------------------------------------------------------------ controls


def test_controls_are_others_of_the_same_kind() -> None:
    mine = [Disable(1, (2, 5)), TopK(1, 0)]
    effect = measure(MODEL, TEXTS, mine, controls=6, seed=3)
    assert len({one.interventions for one in effect.controls}) == len(effect.controls) == 6
    for one in effect.controls:
        disabled, kept = one.interventions
        assert kept == "topk:0:1"
        layer, experts = disabled.removeprefix("disable:").split(":")
        numbers = [int(e) for e in experts.split(",")]
        assert layer == "1"
        assert len(set(numbers)) == 2
        assert not {2, 5} & set(numbers)
        again = measure(MODEL, TEXTS, [Disable(1, tuple(numbers)), TopK(1, 0)])
        assert one.difference == pytest.approx(float(again.overall.difference.value), abs=1e-12)
    assert effect.excess is not None
    mean = np.mean([one.difference for one in effect.controls])
    assert float(effect.excess.value) == pytest.approx(float(effect.overall.difference.value) - mean, abs=1e-12)
    assert effect.excess.low < effect.excess.value < effect.excess.high
    repeated = measure(MODEL, TEXTS, mine, controls=6, seed=3)
    assert repeated.controls == effect.controls
    assert measure(MODEL, TEXTS, mine).excess is None


def test_there_are_no_more_controls_than_others() -> None:
    effect = measure(MODEL, TEXTS[:1], [Disable(0, (4,))], controls=50)
    assert sorted(one.interventions for one in effect.controls) == [(f"disable:0:{e}",) for e in range(E) if e != 4]


def test_experts_of_a_layer_are_controlled_for_together() -> None:
    """Else a control could disable what is disabled already, or the same one twice."""
    effect = measure(MODEL, TEXTS[:1], [Disable(0, (4,)), Disable(0, (1,)), Disable(0, (4, 2))], controls=4)
    assert effect.interventions == ("disable:0:4,1,2",)
    assert all(len(one.interventions[0].split(",")) == 3 for one in effect.controls)


def test_a_projections_controls_are_random_directions() -> None:
    effect = measure(MODEL, TEXTS[:1], [Project(1, 3, np.ones(32))], controls=3)
    assert all(one.interventions[0].startswith("random-project:1:3:") for one in effect.controls)
    assert len(effect.controls) == 3
    direct = [RandomProject(1, 3, int(one.interventions[0].rsplit(":", 1)[1])) for one in effect.controls]
    again = [float(measure(MODEL, TEXTS[:1], [one]).overall.difference.value) for one in direct]
    assert [one.difference for one in effect.controls] == pytest.approx(again, abs=1e-12)


@pytest.mark.parametrize("interventions", [[], [TopK(1)], [Shuffled(), Random()], [Disable(0, (0, 1, 2, 3, 4))]])
def test_what_has_no_controls_says_so(interventions: list[Intervention]) -> None:
    with pytest.raises(OptionError, match="nothing random to compare"):
        measure(MODEL, TEXTS, interventions, controls=2)


# ------------------------------------------------------------------ kernels and the disk


def test_kernels_and_streamed_experts_honour_what_is_done(tmp_path: Path) -> None:
    store = tmp_path / "store"
    quantise(make_source(tmp_path), store, 4)
    resident = build_model(open_checkpoint(store), kernels=True)
    streamed = build_model(open_checkpoint(store), placement=Placement(1 << 16, 3))
    assert uses_kernels(resident)
    assert any(isinstance(module, StreamedExperts) for module in streamed.modules())
    for one in (
        Disable(None, (3,)),
        TopK(1),
        TopK(4),
        Force(1, (2,)),
        Shuffled(),
        Random(),
        Project(0, 1, np.ones(64)),
    ):
        effects = [measure(model, TEXTS, [one], labels=LABELS) for model in (resident, streamed)]
        assert json.dumps(effects[0].as_dict()) == json.dumps(effects[1].as_dict())
        assert effects[0].overall.kl.value > 0
        assert effects[0].migration.value.max() > 0 or one == TopK(4)
        if isinstance(one, Disable):
            assert effects[0].moved[:, :, 3].sum() == 0 < effects[0].moved[:, 3].sum()
    for model in (resident, streamed):
        assert_nothing(measure(model, TEXTS, [TopK(K), Swap(0, 1, 2), Swap(0, 2, 1)]))


# ------------------------------------------------------------------ progress and errors


def test_progress_counts_every_token_of_every_forward() -> None:
    seen: list[tuple[int, int]] = []
    measure(MODEL, TEXTS, [TopK(1)], progress=lambda *now: seen.append(now))
    assert seen[-1] == (2 * 98, 2 * 98)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert {total for _, total in seen} == {196}


def test_an_interruption_leaves_the_model_as_it_was() -> None:
    def interrupt(done: int, total: int) -> None:
        if done > 60:
            raise KeyboardInterrupt

    plain = MODEL(torch.tensor([TEXTS[0]]))
    with pytest.raises(KeyboardInterrupt):
        measure(MODEL, TEXTS, [Random()], progress=interrupt)
    assert torch.equal(MODEL(torch.tensor([TEXTS[0]])), plain)


def test_bad_input_is_refused(menny: LLM) -> None:
    cases: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (OptionError, "dense", lambda: measure(tiny_model(moe=None), TEXTS, [])),
        (OptionError, "dense", lambda: sweep(tiny_model(moe=None), TEXTS)),
        (OptionError, "there is no layer 2", lambda: measure(MODEL, TEXTS, [Disable(2, (1,))])),
        (OptionError, "3 labels for 4", lambda: measure(MODEL, TEXTS, [], labels=["a"] * 3)),
        (OptionError, "window is 2", lambda: measure(MODEL, TEXTS, [], window=2)),
        (OptionError, "controls is -1", lambda: measure(MODEL, TEXTS, [Disable(0, (1,))], controls=-1)),
        (OptionError, "level is 1", lambda: measure(MODEL, TEXTS, [], level=1)),
        (OptionError, "tokens is 1", lambda: encode_documents(menny, [Document(text="a")], 1)),
        (OptionError, "are left", lambda: sweep(tiny_model(moe=MODEL.args.moe.__class__(2, 2)), TEXTS)),
        (PromptError, "no text has two tokens", lambda: measure(MODEL, [], [])),
        (PromptError, "no text has two tokens", lambda: sweep(MODEL, [[1], []])),
        (PromptError, "token 101; the model knows 0 to 100", lambda: measure(MODEL, [[1, 101]], [])),
        (PromptError, "token -1", lambda: measure(MODEL, [[1, -1]], [])),
        (TokenizerError, "no tokenizer", lambda: encode_documents(LLM(MODEL, None), [Document(text="a")])),
    ]
    for kind, words, call in cases:
        with pytest.raises(kind, match=words) as caught:
            call()
        assert getattr(caught.value, "hint", None), words


def test_texts_and_conversations_are_encoded_up_to_a_number_for_each_label(menny: LLM) -> None:
    talk = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "Menny."}]
    documents = [
        Document(text="One two three.", label="a"),
        Document(messages=talk, label="b"),
        Document(text="Four", label="a"),
    ]
    sequences, labels = encode_documents(menny, documents)
    assert labels == ["a", "b", "a"]
    assert menny.tokenizer is not None
    assert sequences[0] == menny.tokenizer.encode("One two three.", bos=True)
    assert sequences[1] == menny.template.render_training(talk)[0]
    n = len(sequences[0])
    fewer, labels = encode_documents(menny, documents, n + 1)
    assert labels == ["a", "b"]  # of one token nothing could be predicted
    assert fewer == [sequences[0], sequences[1][: n + 1]]


# ------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "poem.txt"
    path.write_text("The painter found an umbrella in the garden, and sold it to a stranger for ten coins.")
    return path


def test_the_command_prints_a_table_and_sentences(text: Path) -> None:
    done = run("routing", "ablate", "menny", "--text", text, "--disable", "3:5", "--disable", "3:1", "--controls", 2)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].startswith("disable:3:5,1: ")
    assert lines[2].startswith("all")
    assert "Choices that were made before and are not now, by layer: 0: 0.0%, 1: 0.0%, 2: 0.0%, 3:" in done.out
    assert "Of 2 random others of the same kind" in done.out
    assert "intervals hold together at 99%" in done.err
    same = run("routing", "ablate", "menny", "--text", text, "--do", "topk:*:2")
    assert "The loss is the same, to the last bit." in same.out


def test_the_commands_json_is_what_python_gives(text: Path, menny: LLM) -> None:
    other = text.with_name("other.txt")
    other.write_text("Sieben und fünf ist zwölf.")
    done = run("routing", "ablate", "menny", "-t", text, "-t", other, "--do", "shuffle:2", "--tokens", 20, "--json")
    assert done.code == 0, done.err
    documents = [Document(text=path.read_text(), label=path.stem) for path in (text, other)]
    sequences, labels = encode_documents(menny, documents, 20)
    expected = measure(menny, sequences, [Shuffled(layer=2)], labels=labels)
    assert json.loads(done.out) == {"model": "menny"} | expected.as_dict()
    assert set(expected.by_domain) == {"poem", "other"}


def test_a_sweep_prints_a_map(text: Path, tmp_path: Path) -> None:
    folder = make_tiny_folder(tmp_path / "tiny")
    done = run("routing", "ablate", folder, "--text", text, "--sweep", "--tokens", 30)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[1].split() == ["layer", *map(str, range(E))]
    assert [len(line.split()) for line in lines[2:4]] == [1 + E] * 2
    assert done.out.count("Matters most") == 3
    found = json.loads(run("routing", "ablate", folder, "--text", text, "--sweep", "--tokens", 30, "--json").out)
    assert [f"{rise:+.4f}" for rise in found["difference"]["value"][1]] == lines[3].split()[1:]


def test_the_command_refuses_what_makes_no_sense(text: Path, tmp_path: Path) -> None:
    ablate = ("routing", "ablate", "menny", "--text", text)
    refused(run(*ablate, "--disable", "9:1"), "disable:9:1: there is no layer 9", hint="0 to 4")
    refused(run(*ablate, "--disable", "5"), "--disable '5': expected LAYER:EXPERT")
    refused(run(*ablate, "--do", "topk:*:9"), "topk:*:9: expected 1 to 8")
    refused(run(*ablate, "--do", f"project:0:1:{tmp_path}/no.npy"), "no.npy: cannot be read")
    dense = make_tiny_folder(tmp_path / "dense", moe=None)
    refused(run("routing", "ablate", dense, "--text", text, "--sweep"), "the model is dense")
    (tmp_path / "empty.txt").write_text(" ")
    refused(run("routing", "ablate", "menny", "--text", tmp_path / "empty.txt", "--sweep"), "empty")
    for extra in ((), ("--sweep", "--disable", "1:1"), ("--sweep", "--controls", 2)):
        assert run(*ablate, *extra).code == 2, extra


def test_ctrl_c_ends_it_without_a_traceback(tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text("A mixture of experts sends every token to two of eight experts. " * 2000)
    folder = make_tiny_folder(tmp_path / "tiny")
    with terminal("routing", "ablate", folder, "--text", long, "--sweep") as one:
        one.resize(100)
        one.wait_for("tokens")
        one.type("\x03")
        assert one.wait() == 130
        assert "Traceback" not in one.seen
