"""Training: it learns, it resumes bit for bit, and nothing that befalls it damages the last checkpoint."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from octavo.errors import CheckpointError, ConfigError
from octavo.load import load_model
from octavo.train.config import TrainConfig
from octavo.train.data import PAD, Rows
from octavo.train.losses import weighted_cross_entropy
from octavo.train.state import checkpoints, load_newest, save_checkpoint
from octavo.train.trainer import (
    INIT_STD,
    StepMetrics,
    Trainer,
    init_weights,
    learning_rate,
    make_optimizer,
    train,
)
from train_fixtures import make_config, make_world, tables

TESTS = Path(__file__).parent
RECIPE = TESTS.parent / "recipes" / "menny" / "config.toml"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def metrics_of(out: Path) -> list[dict[str, Any]]:
    """The records of a run, without what the clock decides."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in ("tokens_per_s", "mfu")} for record in records]


def steps_of(trainer: Trainer, count: int) -> list[StepMetrics]:
    return [trainer.train_step() for _ in range(count)]


# What it learns -----------------------------------------------------------------------------------------------


def test_a_short_run_learns_and_writes_all_it_promises(world: Path, tmp_path: Path, capsys: Any):
    out = tmp_path / "out"
    result = train(make_config(world, out, optim={"steps": 150, "lr": 1e-2}, run={"eval_every": 75}))
    records = metrics_of(out)
    losses = [r["ce"] for r in records if "ce" in r]
    assert len(losses) == 150
    assert losses[0] == pytest.approx(math.log(320), abs=0.15), "an untrained model is close to uniform"
    assert losses[-1] < 1.6
    assert result.finished
    assert result.step == 150
    assert result.heldout is not None
    assert result.heldout.loss < 1.6
    assert result.heldout.perplexity == pytest.approx(math.exp(result.heldout.loss))
    loads = np.array([r["load"] for r in records if "ce" in r])
    assert loads.shape == (150, 2, 4)
    assert np.allclose(loads.sum(-1), 1, atol=1e-4)
    assert [r["step"] for r in records if "heldout" in r] == [75, 150]
    for picture in ("curves.png", "experts.png"):
        assert (out / picture).read_bytes()[:4] == b"\x89PNG"
    captured = capsys.readouterr()
    assert captured.out == "", "stdout is data"
    assert "held-out" in captured.err

    model, tokenizer = load_model(out / "model")
    assert tokenizer is not None
    assert model.dtype == torch.bfloat16
    state = load_newest(out / "checkpoints")
    assert state is not None
    assert all(
        torch.equal(parameter, state[1]["model"][name].bfloat16()) for name, parameter in model.named_parameters()
    )
    assert json.loads((out / "model" / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_id
    assert model.args == make_config(world, out).model, "the training window is not the model's"


def test_a_dense_model_trains_too(world: Path, tmp_path: Path):
    out = tmp_path / "out"
    result = train(make_config(world, out, model={"moe": None}, optim={"steps": 40, "lr": 1e-2}))
    assert result.ce < 4.0
    assert metrics_of(out)[0]["load"] == []
    assert (out / "curves.png").exists()
    assert not (out / "experts.png").exists()
    model, _ = load_model(out / "model")
    assert model.args.moe is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_short_run_learns_on_cuda(world: Path, tmp_path: Path):
    config = make_config(world, tmp_path, optim={"steps": 60, "lr": 1e-2}, run={"device": "cuda", "dtype": "auto"})
    assert train(config).ce < 3.0


# What a step is -----------------------------------------------------------------------------------------------


def test_accumulated_parts_make_the_step_of_the_whole(world: Path, tmp_path: Path):
    """Cross-entropy and its gradients, that is: the balance loss is not linear in the batch."""
    quiet = {"balance": 0.0, "user_loss_weight": 0.3}
    whole = Trainer(make_config(world, tmp_path, loss=quiet, optim={"batch_rows": 8}))
    parts = Trainer(make_config(world, tmp_path, loss=quiet, optim={"batch_rows": 2, "accumulation": 4}))
    for a, b in zip(steps_of(whole, 4), steps_of(parts, 4), strict=True):
        assert a.ce == pytest.approx(b.ce, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
        assert a.tokens == b.tokens
        assert a.load == b.load


def test_what_pads_hold_changes_neither_losses_nor_weights(world: Path, tmp_path: Path):
    clean, noisy = (Trainer(make_config(world, tmp_path)) for _ in range(2))
    pads = noisy.rows.kinds == PAD
    assert pads.any()
    rubbish = np.random.default_rng(0).integers(0, 320, noisy.rows.tokens.shape)
    noisy.rows = Rows(np.where(pads, rubbish, noisy.rows.tokens).astype(np.int32), noisy.rows.kinds)
    assert steps_of(clean, 3) == steps_of(noisy, 3)
    for a, b in zip(clean.model.parameters(), noisy.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_user_loss_weight_zero_trains_on_what_the_model_speaks(world: Path, tmp_path: Path):
    trainer = Trainer(make_config(world, tmp_path, loss={"user_loss_weight": 0.0}))
    batch = trainer.rows.batch(trainer.order.rows_of(0))
    with torch.no_grad():
        logits = trainer.model(batch.ids, positions_BT=batch.positions)
        spoken = batch.spoken.float()
        expected = weighted_cross_entropy(logits, batch.targets, spoken) / spoken.sum()
    assert trainer.train_step().ce == pytest.approx(expected.item(), rel=1e-5)


def test_learning_rate_warms_up_and_falls_along_a_cosine(world: Path, tmp_path: Path):
    optim = make_config(world, tmp_path, optim={"steps": 110, "warmup_steps": 10, "lr": 1.0, "min_lr_ratio": 0.1}).optim
    rates = [learning_rate(step, optim) for step in range(110)]
    assert rates[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert 0.1 < rates[-1] < 0.101
    assert learning_rate(500, optim) == pytest.approx(0.1)


def test_initial_weights_follow_the_seed_and_the_depth(world: Path, tmp_path: Path):
    model = Trainer(make_config(world, tmp_path, model={"dim": 64, "hidden_dim": 64})).model
    before = {name: p.clone() for name, p in model.named_parameters()}
    init_weights(model, 0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    init_weights(model, 1)
    for name, p in model.named_parameters():
        if p.ndim < 2:
            assert torch.equal(p, torch.ones_like(p)), name
        else:
            assert not torch.equal(p, before[name]), name
            writes_to_stream = name.endswith(("wo.weight", "w2.weight"))
            std = INIT_STD / math.sqrt(4) if writes_to_stream else INIT_STD
            assert p.std().item() == pytest.approx(std, rel=0.15), name


def test_only_matrices_decay(world: Path, tmp_path: Path):
    config = make_config(world, tmp_path)
    optimizer = make_optimizer(Trainer(config).model, config.optim)
    decayed = {p.ndim: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decayed == {1: 0.0, 2: 0.1}


# Going on -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_repeats_every_loss_bit_for_bit(world: Path, tmp_path: Path, dtype: str, capsys: Any):
    out = tmp_path / "out"
    config = make_config(world, out, optim={"accumulation": 2}, run={"dtype": dtype, "keep": 9})
    train(config)
    through = metrics_of(out)
    weights = (out / "model" / "model.safetensors").read_bytes()
    first, last = checkpoints(out / "checkpoints")
    assert (first.name, last.name) == ("step-0000006.pt", "step-0000012.pt")
    last.unlink()
    capsys.readouterr()
    result = train(config)
    assert f"resuming from {first}, step 6" in capsys.readouterr().err
    assert result.step == 12
    resumed = metrics_of(out)
    assert [r for r in resumed if "ce" in r] == [r for r in through if "ce" in r]
    assert resumed == through
    assert (out / "model" / "model.safetensors").read_bytes() == weights


def test_a_finished_run_is_not_trained_further(world: Path, tmp_path: Path):
    config = make_config(world, tmp_path / "out", optim={"steps": 3})
    train(config)
    before = (tmp_path / "out" / "model" / "model.safetensors").read_bytes()
    result = train(config)
    assert (result.step, result.finished) == (3, True)
    assert (tmp_path / "out" / "model" / "model.safetensors").read_bytes() == before


def test_changes_of_settings_are_said_and_changes_of_shape_refused(world: Path, tmp_path: Path, capsys: Any):
    out = tmp_path / "out"
    small = {"batch_rows": 1}
    train(make_config(world, out, optim={"steps": 2} | small))
    train(make_config(world, out, optim={"steps": 4} | small))
    assert "optim.steps: 2 -> 4" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"model\.hidden_dim was 32.*says 64"):
        train(make_config(world, out, model={"hidden_dim": 64}))
    with pytest.raises(ConfigError, match=r"model\.moe"):
        train(make_config(world, out, model={"moe": None}))
    with pytest.raises(ConfigError, match="holds a run already"):
        train(make_config(world, out), resume=False)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path):
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-0000004.pt", "step-0000005.pt"]
    newest = load_newest(tmp_path)
    assert newest is not None
    assert newest[1] == {"step": 5}
    assert load_newest(tmp_path / "absent") is None


def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path: Path):
    save_checkpoint(tmp_path, 1, {"step": 1, "x": torch.zeros(1000)}, keep=2)
    newest = save_checkpoint(tmp_path, 2, {"step": 2, "x": torch.zeros(1000)}, keep=2)
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"step-0000002\.pt") as caught:
        load_newest(tmp_path)
    assert caught.value.hint == "delete this file to resume from step-0000001.pt"
    newest.unlink()
    assert load_newest(tmp_path) is not None


# Mishaps ------------------------------------------------------------------------------------------------------


def child(script: str, *args: Any) -> subprocess.Popen[str]:
    """A Python process of its own, so that its limits and signals are real."""
    paths = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(condition: Any, process: subprocess.Popen[str], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "the run did not get going"
        time.sleep(0.002)


TRAIN_FOREVER = """
import sys
from pathlib import Path
from train_fixtures import make_config
from octavo.train.trainer import train
result = train(make_config(Path(sys.argv[1]), Path(sys.argv[2]), optim={"steps": 100000}, run={"checkpoint_every": 3}))
print(result.step, result.finished)
"""


def test_ctrl_c_finishes_the_step_writes_a_checkpoint_and_says_how_to_go_on(world: Path, tmp_path: Path):
    out = tmp_path / "out"
    process = child(TRAIN_FOREVER, world, out)
    wait_for(lambda: len(checkpoints(out / "checkpoints")) >= 2, process)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr
    assert "run the same command to go on" in stderr
    step, finished = stdout.split()
    assert finished == "False"
    newest = load_newest(out / "checkpoints")
    assert newest is not None
    assert newest[1]["step"] == int(step)
    assert metrics_of(out)[-1]["step"] == int(step)
    assert not (out / "model").exists()


SAVE_FOREVER = """
import sys, torch
from pathlib import Path
from octavo.train.state import save_checkpoint
for step in range(1, 100000):
    save_checkpoint(Path(sys.argv[1]), step, {"step": step, "x": torch.full((2_000_000,), step)}, keep=2)
"""


def test_a_kill_in_the_midst_of_writing_leaves_the_checkpoint_before_whole(tmp_path: Path):
    process = child(SAVE_FOREVER, tmp_path)
    wait_for(lambda: len(checkpoints(tmp_path)) == 2, process)
    wait_for(lambda: any(path.stat().st_size > 1000 for path in tmp_path.glob("*.tmp")), process)
    process.kill()
    process.communicate(timeout=60)
    newest = load_newest(tmp_path)
    assert newest is not None
    assert (newest[1]["x"] == newest[1]["step"]).all()
    assert not list(tmp_path.glob("*.tmp")), "leftovers are swept up"


FULL_DISK = """
import resource, sys
from pathlib import Path
from train_fixtures import make_config
from octavo.errors import UserError
from octavo.train.trainer import train
world, out = Path(sys.argv[1]), Path(sys.argv[2])
def config(steps):
    return make_config(world, out, optim={"steps": steps}, run={"checkpoint_every": 2})
train(config(2))
size = (out / "checkpoints" / "step-0000002.pt").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
try:
    train(config(4))
except UserError as error:
    print(type(error).__name__, error.message, "|", error.hint)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="the system has no limit on file sizes")
def test_a_full_disk_is_one_error_and_the_checkpoint_before_stays_whole(world: Path, tmp_path: Path):
    out = tmp_path / "out"
    process = child(FULL_DISK, world, out)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert stdout.startswith("CheckpointError")
    assert "step-0000004.pt" in stdout
    assert "File too large" in stdout
    assert f"{out / 'checkpoints' / 'step-0000002.pt'} is whole" in stdout
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-0000002.pt"]
    newest = load_newest(out / "checkpoints")
    assert newest is not None
    assert newest[1]["step"] == 2
    assert train(make_config(world, out, optim={"steps": 4})).step == 4


def test_a_run_that_blows_up_stops_before_it_writes(world: Path, tmp_path: Path):
    changes = {"optim": {"lr": 1e30, "grad_clip": 0.0}, "run": {"checkpoint_every": 1, "keep": 20}}
    with pytest.raises(ConfigError, match="the loss is") as caught:
        train(make_config(world, tmp_path / "out", **changes))
    assert caught.value.hint is not None
    assert "lower [optim] lr" in caught.value.hint
    for path in checkpoints(tmp_path / "out" / "checkpoints"):
        state = torch.load(path, weights_only=True)
        assert all(p.isfinite().all() for p in state["model"].values()), path.name


def test_without_matplotlib_the_run_goes_on_and_says_so_once(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it now fails as if it were absent
    result = train(make_config(world, tmp_path / "out", optim={"steps": 2}))
    assert result.finished
    captured = capsys.readouterr().err
    assert captured.count("matplotlib is not installed") == 1
    assert "hint: pip install 'octavo[train]'" in captured


# The config ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "change", "message", "hint"),
    [
        ("optim", {"learning_rat": 1}, r"\[optim\] has an unknown key 'learning_rat'", None),
        ("optim", {"warmup": 1}, "unknown key 'warmup'", "did you mean warmup_steps?"),
        ("model", {"n_layer": 1}, "unknown key 'n_layer'", "did you mean n_layers?"),
        ("model", {"moe": {"num_expert": 8}}, "unknown key 'num_expert'", "did you mean num_experts?"),
        ("model", {"dim": None}, r"\[model\] lacks the key 'dim'", None),
        ("model", {"n_heads": 3}, "n_kv_heads", None),
        ("data", {"train": None}, r"\[data\] lacks the key 'train'", None),
        ("data", {"train": 3}, r"\[data\] train must be a path, not 3", None),
        ("data", {"seq_len": 1}, r"\[data\] seq_len must be between 2 and", None),
        ("data", {"seq_len": 10**6}, r"\[data\] seq_len must be between 2 and", None),
        ("optim", {"steps": 0}, r"\[optim\] steps must be at least 1, not 0", None),
        ("optim", {"steps": 1.5}, r"\[optim\] steps must be a whole number, not 1.5", None),
        ("optim", {"steps": True}, r"\[optim\] steps must be a whole number, not True", None),
        ("optim", {"lr": "fast"}, r"\[optim\] lr must be a number, not 'fast'", None),
        ("optim", {"lr": -1}, r"\[optim\] lr must be greater than 0", None),
        ("optim", {"lr": math.nan}, r"\[optim\] lr must be", None),
        ("optim", {"betas": [0.9]}, r"\[optim\] betas must be a list of 2 numbers", None),
        ("optim", {"betas": [0.9, 1.0]}, r"\[optim\] betas must be in \[0, 1\)", None),
        ("loss", {"user_loss_weight": 2}, r"\[loss\] user_loss_weight must be between 0 and 1", None),
        ("loss", {"balance_per_layer": 1}, r"\[loss\] balance_per_layer must be true or false", None),
        ("run", {"dtype": "float8"}, r"\[run\] dtype must be one of auto, float32, bfloat16", None),
        ("run", {"keep": 0}, r"\[run\] keep must be at least 1", None),
    ],
)
def test_a_wrong_key_or_value_is_named(
    world: Path, tmp_path: Path, table: str, change: dict[str, Any], message: str, hint: str | None
):
    with pytest.raises(ConfigError, match=message) as caught:
        TrainConfig.from_dict(tables(world, tmp_path, **{table: change}), where="run.toml")
    assert caught.value.message.startswith("run.toml: ")
    if hint is not None:
        assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("[model\n", "not valid TOML"),
        ("[modle]\n", "unknown table 'modle'"),
        ("[model]\n", r"the table \[data\] is missing"),
        ("model = 3\n[data]\n[optim]\n[run]\n", "model must be a table"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, content: str | None, message: str):
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        TrainConfig.from_toml(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"vocab_size": 100}}, "vocab_size is 100, but .* has 3[0-9]+ tokens"),
        ({"run": {"device": "toaster"}}, "'toaster' is no device"),
        ({"run": {"device": "mps"}}, "'mps' is not available here"),
        ({"data": {"heldout": "absent.jsonl"}}, "absent.jsonl: cannot be read"),
    ],
)
def test_what_only_the_machine_can_tell_is_an_error_too(world: Path, tmp_path: Path, change: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        train(make_config(world, tmp_path / "out", **change))


def test_the_recipe_of_the_shipped_model_is_a_valid_config():
    config = TrainConfig.from_toml(RECIPE)
    assert config.model.moe is not None
    assert 2 * config.model.n_params <= 22_000_000, "it ships in bfloat16, in at most 22 MB"
    assert TrainConfig.from_dict(config.to_dict()) == config
