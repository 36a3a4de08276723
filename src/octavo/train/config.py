"""A training run described in one TOML file.

    [model]                     fields of `ModelArgs`
    [model.moe]                 fields of `MoEArgs`; without this table the model is dense
    [data]                      train, heldout, tokenizer, seq_len
    [optim]                     steps, lr, warmup_steps, min_lr_ratio, weight_decay, betas, grad_clip, ...
    [loss]                      balance, z, user_loss_weight, balance_per_layer
    [run]                       out, seed, device, dtype, threads, eval_every, checkpoint_every, ...

**Paths are relative to the current folder**, as in every other command line, so a recipe is started from the
project's root. Every key is checked: an unknown one is an error that names its nearest neighbour.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from octavo.args import ModelArgs, MoEArgs
from octavo.errors import ConfigError

T = TypeVar("T")
DTYPES = ("auto", "float32", "bfloat16")
_HELP = "the tables and their keys are described in octavo/train/config.py"


@dataclass(frozen=True)
class DataConfig:
    """Where the text is and how it is cut.

    Attributes:
        train: documents, one JSON object a line: {"messages": [...]} or {"text": "..."}.
        heldout: documents the model never trains on; None switches evaluation off.
        tokenizer: a tokenizer file, or the folder that holds one.
        seq_len: tokens the model sees in one row.
    """

    train: Path
    tokenizer: Path
    seq_len: int
    heldout: Path | None = None


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with a linear warm-up and a cosine down to `min_lr_ratio * lr`.

    Attributes:
        steps: optimiser steps of the whole run.
        lr: peak learning rate.
        batch_rows: rows of `seq_len` tokens in one forward pass.
        accumulation: forward passes in one step; a step sees batch_rows * accumulation rows.
        weight_decay: decoupled, on matrices only (norm weights have none).
        grad_clip: largest global gradient norm; 0 switches clipping off.
    """

    steps: int
    lr: float = 2e-3
    warmup_steps: int = 200
    min_lr_ratio: float = 0.05
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    grad_clip: float = 1.0
    batch_rows: int = 16
    accumulation: int = 1


@dataclass(frozen=True)
class LossConfig:
    """What is minimised: cross-entropy + balance * load_balancing_loss + z * router_z_loss.

    Attributes:
        balance: coefficient of the load-balancing loss; 0 switches it off.
        z: coefficient of the router z-loss.
        balance_per_layer: balance every layer by itself instead of all layers pooled.
        user_loss_weight: weight of the tokens the model reads but does not speak (system and user turns);
            1 counts every token alike, 0 trains on the replies alone. Plain text always weighs 1.
    """

    balance: float = 0.01
    z: float = 0.001
    balance_per_layer: bool = False
    user_loss_weight: float = 1.0


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives, and how often it looks up from its work (all `_every` in steps, 0 for never).

    Attributes:
        out: the run's folder: checkpoints/, metrics.jsonl, curves.png, experts.png, model/.
        seed: of the initial weights and of the order of the rows.
        device: "auto" (CUDA if there is one), "cpu", "cuda", "cuda:1".
        dtype: of matrix products; weights and optimiser state stay float32. "auto" is bfloat16 on a device
            that computes in it, else float32.
        threads: CPU threads; 0 leaves the choice to torch.
        keep: checkpoints kept, newest first.
    """

    out: Path
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 0
    log_every: int = 10
    eval_every: int = 500
    eval_rows: int = 256
    checkpoint_every: int = 500
    keep: int = 2


@dataclass(frozen=True)
class TrainConfig:
    """Everything `octavo.train.trainer.train` needs to know; see the module's docstring for the file."""

    model: ModelArgs
    data: DataConfig
    optim: OptimConfig
    run: RunConfig
    loss: LossConfig = field(default_factory=LossConfig)

    @classmethod
    def from_toml(cls, path: str | Path) -> TrainConfig:
        """Read and check a configuration file.

        Raises:
            ConfigError: no such file, not TOML, a key unknown, missing, of the wrong type or nonsensical.
        """
        path = Path(path)
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file", hint="give the path of a training TOML") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}", hint="is it a text file in UTF-8?") from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path}: not valid TOML: {error}", hint=_HELP) from None
        try:
            return cls.from_dict(table, where=str(path))
        except ConfigError as error:  # ModelArgs knows no file
            message = error.message if error.message.startswith(str(path)) else f"{path}: [model] {error.message}"
            raise ConfigError(message, error.hint or _HELP) from None

    @classmethod
    def from_dict(cls, table: dict[str, Any], where: str = "training config") -> TrainConfig:
        """Build from nested tables, as TOML gives them; `where` opens every error message.

        Raises:
            ConfigError: a key unknown, missing, of the wrong type or nonsensical.
        """
        _check_keys(table, [f.name for f in dataclasses.fields(cls)], where, "")
        for name in ("model", "data", "optim", "run"):
            if name not in table:
                raise ConfigError(f"{where}: the table [{name}] is missing")
        config = cls(
            model=_model_args(table["model"], where),
            data=_build(DataConfig, table["data"], where, "data"),
            optim=_build(OptimConfig, table["optim"], where, "optim"),
            loss=_build(LossConfig, table.get("loss", {}), where, "loss"),
            run=_build(RunConfig, table["run"], where, "run"),
        )
        _check_values(config, where)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Nested tables of plain values (paths as strings), for the checkpoint and for messages."""
        return typing.cast("dict[str, Any]", _plain(dataclasses.asdict(self)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _check_keys(table: Any, known: list[str], where: str, section: str) -> None:
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: {section} must be a table, not {table!r}")
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
            place = f"[{section}] has an unknown key" if section else "unknown table"
            raise ConfigError(f"{where}: {place} {key!r}", hint=hint)


def _build(cls: type[T], table: Any, where: str, section: str, skip: tuple[str, ...] = ()) -> T:
    """Fill a frozen dataclass from a table, checking names and types."""
    fields = [f for f in dataclasses.fields(typing.cast(Any, cls)) if f.name not in skip and f.init]
    _check_keys(table, [f.name for f in fields], where, section)
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for f in fields:
        if f.name in table:
            values[f.name] = _coerce(table[f.name], hints[f.name], f"{where}: [{section}] {f.name}")
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: [{section}] lacks the key {f.name!r}")
    try:
        return cls(**values)
    except ConfigError as error:  # from a dataclass that checks itself
        raise ConfigError(f"{where}: [{section}] {error.message}", hint=error.hint) from None


def _coerce(value: Any, kind: Any, name: str) -> Any:
    """`value` as the annotated type `kind`, or a ConfigError that says what was expected."""
    if isinstance(kind, types.UnionType):
        inner_kind = next(k for k in typing.get_args(kind) if k is not type(None))
        return None if value is None else _coerce(value, inner_kind, name)
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        if isinstance(value, list) and len(value) == len(inner):
            return tuple(_coerce(item, k, name) for item, k in zip(value, inner, strict=True))
        raise ConfigError(f"{name} must be a list of {len(inner)} numbers, not {value!r}")
    if kind is Path and isinstance(value, (str, Path)) and str(value):
        return Path(value)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind in (bool, str) and isinstance(value, kind):
        return value
    words = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}
    raise ConfigError(f"{name} must be {words.get(kind, 'a string')}, not {value!r}")


def _model_args(table: Any, where: str) -> ModelArgs:
    """[model] and, if there, [model.moe]; ModelArgs itself checks that the numbers fit each other."""
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: model must be a table, not {table!r}")
    flat = {key: value for key, value in table.items() if key != "moe"}
    moe = _build(MoEArgs, table["moe"], where, "model.moe") if "moe" in table else None
    args = _build(ModelArgs, flat, where, "model", skip=("moe",))
    return dataclasses.replace(args, moe=moe)


def _check_values(config: TrainConfig, where: str) -> None:
    """Ranges. The message names the key and says what it must be."""
    data, optim, loss, run = config.data, config.optim, config.loss, config.run
    rules: list[tuple[bool, str, Any, str]] = [
        (2 <= data.seq_len <= config.model.max_seq_len, "[data] seq_len", data.seq_len,
         f"between 2 and the model's max_seq_len, {config.model.max_seq_len}"),
        (optim.steps >= 1, "[optim] steps", optim.steps, "at least 1"),
        (optim.lr > 0, "[optim] lr", optim.lr, "greater than 0"),
        (optim.warmup_steps >= 0, "[optim] warmup_steps", optim.warmup_steps, "at least 0"),
        (0 <= optim.min_lr_ratio <= 1, "[optim] min_lr_ratio", optim.min_lr_ratio, "between 0 and 1"),
        (optim.weight_decay >= 0, "[optim] weight_decay", optim.weight_decay, "at least 0"),
        (all(0 <= b < 1 for b in optim.betas), "[optim] betas", list(optim.betas), "in [0, 1)"),
        (optim.eps > 0, "[optim] eps", optim.eps, "greater than 0"),
        (optim.grad_clip >= 0, "[optim] grad_clip", optim.grad_clip, "at least 0 (0 for no clipping)"),
        (optim.batch_rows >= 1, "[optim] batch_rows", optim.batch_rows, "at least 1"),
        (optim.accumulation >= 1, "[optim] accumulation", optim.accumulation, "at least 1"),
        (loss.balance >= 0, "[loss] balance", loss.balance, "at least 0"),
        (loss.z >= 0, "[loss] z", loss.z, "at least 0"),
        (0 <= loss.user_loss_weight <= 1, "[loss] user_loss_weight", loss.user_loss_weight,
         "between 0 and 1"),
        (run.dtype in DTYPES, "[run] dtype", run.dtype, "one of " + ", ".join(DTYPES)),
        (run.seed >= 0, "[run] seed", run.seed, "at least 0"),
        (run.threads >= 0, "[run] threads", run.threads, "at least 0 (0 for torch's choice)"),
        (run.log_every >= 1, "[run] log_every", run.log_every, "at least 1"),
        (run.eval_every >= 0, "[run] eval_every", run.eval_every, "at least 0 (0 for never)"),
        (run.eval_rows >= 1, "[run] eval_rows", run.eval_rows, "at least 1"),
        (run.checkpoint_every >= 0, "[run] checkpoint_every", run.checkpoint_every,
         "at least 0 (0: at the end only)"),
        (run.keep >= 1, "[run] keep", run.keep, "at least 1"),
    ]  # fmt: skip
    for holds, name, value, expected in rules:
        if not holds:
            raise ConfigError(f"{where}: {name} must be {expected}, not {value!r}")
