"""Train a model from scratch: router and experts together, on a CPU or a GPU, resumable at every checkpoint.

What a step computes is a pure function of the weights, the optimiser's state and the step's number: there is no
dropout, and the order of the rows follows from seed and step. So a resumed run repeats the losses of an
uninterrupted one bit for bit: on the CPU always, given the same number of threads; on CUDA up to the order in
which atomic additions happen (in the backward passes of the embedding and of attention). A run may change devices at a
checkpoint; rounding then differs, and nothing else.

A step asks nothing of the device that it would have to wait for. What a step has to say (its losses, its norm) is
read when the next one is under way, and before anything is written that must not be wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.args import ModelArgs
from octavo.checkpoint.writer import save_folder
from octavo.errors import ConfigError
from octavo.model import Mixtral
from octavo.train.attention import use_training_attention
from octavo.train.config import LossConfig, OptimConfig, TrainConfig
from octavo.train.data import Batch, Order, Rows, load_rows, load_tokenizer
from octavo.train.device import HostCopy, Moment, choose_device, choose_dtype, matrix_rate
from octavo.train.experts import grouped_products, use_training_experts
from octavo.train.flops import flops_per_token
from octavo.train.losses import RouterTap, load_balancing_loss, router_z_loss, weighted_cross_entropy
from octavo.train.progress import MetricsFile, Pace, Stop, make_bar, say
from octavo.train.state import checkpoints, load_newest, save_checkpoint

INIT_STD = 0.02
TOKENIZER_SETTINGS = ("tokenizer_config.json", "added_tokens.json", "chat_template.jinja")


@dataclass(frozen=True)
class HeldOut:
    """Evaluation on held-out rows.

    Attributes:
        loss: nats a token, over every target.
        perplexity: exp(loss).
        spoken_loss: nats a token, over what the model would speak itself (assistant turns and plain text).
        tokens: targets counted.
    """

    loss: float
    perplexity: float
    spoken_loss: float
    tokens: int


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        step: optimiser steps taken in all, earlier sittings included.
        finished: False if it was stopped (Ctrl-C) and can be resumed.
        ce: training cross-entropy of the last step, NaN if none was taken.
        heldout: the last evaluation, or None.
        model_folder: the exported model in HF layout; None if not finished.
        tokens_per_s: tokens trained on a second in this sitting, pads, evaluation and writing left out; NaN if no
            step was taken.
        mfu: model FLOP utilisation in this sitting (`octavo.train.progress.Speed`); NaN likewise.
    """

    step: int
    finished: bool
    ce: float
    heldout: HeldOut | None
    model_folder: Path | None
    tokens_per_s: float
    mfu: float


@dataclass
class StepMetrics:
    """One optimiser step, a line of metrics.jsonl; `load[layer][expert]` are shares of the assignments."""

    step: int
    loss: float
    ce: float
    balance: float
    z: float
    lr: float
    grad_norm: float
    tokens: int
    load: list[list[float]] = field(default_factory=list)


@dataclass
class LaunchedStep:
    """A step that the device may still be computing.

    Attributes:
        metrics: what the host knows of it already; the rest is NaN.
    """

    metrics: StepMetrics
    numbers: HostCopy
    weight_of: LossConfig

    def read(self) -> StepMetrics:
        """Wait for the step, and complete its metrics."""
        sums, counts_LE = self.numbers.read()
        ce, balance, z, norm = sums.tolist()
        loss = ce + self.weight_of.balance * balance + self.weight_of.z * z
        return dataclasses.replace(
            self.metrics, loss=loss, ce=ce, balance=balance, z=z, grad_norm=norm, load=_shares(counts_LE)
        )


def init_weights(model: nn.Module, seed: int) -> None:
    """Fill the parameters in place: matrices from N(0, 0.02), norm weights with ones.

    The projections that write into the residual stream (wo, w2) are scaled by 1 / sqrt(2 * n_layers), so that
    the stream's variance does not grow with depth (GPT-2, Radford et al. 2019, section 2.3). The numbers are
    drawn on the CPU in the order of the names, so they do not depend on the device.
    """
    generator = torch.Generator().manual_seed(seed)
    n_layers: int = model.args.n_layers  # type: ignore[assignment, union-attr]
    residual_std = INIT_STD / math.sqrt(2 * n_layers)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim < 2:
                parameter.fill_(1.0)
                continue
            std = residual_std if name.split(".")[-2:-1] in (["wo"], ["w2"]) else INIT_STD
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


def learning_rate(step: int, optim: OptimConfig) -> float:
    """The rate of step 0, 1, ...: linear warm-up to `lr`, then a cosine down to `min_lr_ratio * lr`."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    done = (step - optim.warmup_steps) / max(1, optim.steps - optim.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * cosine)


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101), fused; decay on matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


class Trainer:
    """A model, its optimiser and its data; `train` drives it.

    Args:
        config: see `octavo.train.config`.

    Raises:
        UserError: data, tokenizer or device are not as the config says.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        self.device = choose_device(config.run.device)
        self.dtype, self.dtype_reason = choose_dtype(config.run.dtype, self.device)
        self.tokenizer = tokenizer = load_tokenizer(config.data.tokenizer)
        if tokenizer.n_vocab > config.model.vocab_size:
            raise ConfigError(
                f"[model] vocab_size is {config.model.vocab_size}, but {config.data.tokenizer} has "
                f"{tokenizer.n_vocab} tokens",
                hint=f"set vocab_size = {tokenizer.n_vocab}",
            )
        cache, seq_len = config.run.out / "rows", config.data.seq_len
        self.rows = load_rows(config.data.train, tokenizer, seq_len, cache, progress=True)
        self.heldout_rows: Rows | None = None
        if config.data.heldout is not None:
            self.heldout_rows = load_rows(config.data.heldout, tokenizer, seq_len, cache, progress=True)
        rows_per_step = config.optim.batch_rows * config.optim.accumulation
        self.order = Order(len(self.rows), rows_per_step, config.run.seed)
        self.model = Mixtral(training_args(config.model, seq_len))
        if self.device.type == "cuda":
            use_training_attention(self.model)
        self.grouped, self.experts_reason = grouped_products(self.device, self.dtype, config.model)
        use_training_experts(self.model, self.grouped)
        init_weights(self.model, config.run.seed)
        self.model.to(self.device).train()
        self.optimizer = make_optimizer(self.model, config.optim)
        self.step = 0

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def train_step(self) -> StepMetrics:
        """Read the rows of step `self.step`, update the weights once and count the step."""
        return self.launch_step().read()

    def launch_step(self) -> LaunchedStep:
        """`train_step`, without waiting for the device; later calls see its weights whether it was read or not."""
        config, optim = self.config, self.config.optim
        rate = learning_rate(self.step, optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rows = self.rows.batch(self.order.rows_of(self.step), config.loss.user_loss_weight)
        whole = rows.to(self.device)
        total_weight = whole.weights.sum().clamp_min(1e-6)
        sums = torch.zeros(3, device=self.device)
        counts: list[Tensor] = []
        for n in range(optim.accumulation):
            part = slice(n * optim.batch_rows, (n + 1) * optim.batch_rows)
            terms, counts_LE = self._backward(Batch(*(tensor[part] for tensor in whole)), total_weight)
            sums += terms
            counts.append(counts_LE)
        clip = optim.grad_clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        unknown = math.nan
        metrics = StepMetrics(self.step, unknown, unknown, unknown, unknown, rate, unknown, rows.n_tokens)
        numbers = HostCopy(self.device, torch.cat([sums, norm[None]]), torch.stack(counts).sum(0))
        return LaunchedStep(metrics, numbers, config.loss)

    def _backward(self, batch: Batch, total_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Forward and backward of one part of a step.

        Returns:
            This part's share of (cross-entropy, balance, z), and how often experts were chosen [L, E].
        """
        loss_config, moe = self.config.loss, self.config.model.moe
        real = batch.positions >= 0
        with RouterTap(self.model) as tap:
            with self._autocast():
                logits_BTV = self.model(batch.ids, positions_BT=batch.positions)
            ce = weighted_cross_entropy(logits_BTV, batch.targets, batch.weights) / total_weight
            if moe is None:
                torch.autograd.backward(ce)
                zero = ce.new_zeros(())
                return torch.stack([ce.detach(), zero, zero]), torch.zeros(0, 0)
            balance = load_balancing_loss(
                tap.logits_TE, moe.num_experts_per_tok, real, per_layer=loss_config.balance_per_layer
            )
            z = router_z_loss(tap.logits_TE, real)
            share = 1 / self.config.optim.accumulation
            loss: Tensor = ce + share * (loss_config.balance * balance + loss_config.z * z)
            torch.autograd.backward(loss)
            counts = tap.expert_counts_LE(moe.num_experts, real)
            return torch.stack([ce, share * balance, share * z]).detach(), counts

    @torch.no_grad()
    def evaluate(self) -> HeldOut | None:
        """Loss on the first `eval_rows` held-out rows; None without held-out text."""
        if self.heldout_rows is None:
            return None
        rows, size = self.heldout_rows, self.config.optim.batch_rows
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        self.model.eval()
        for start in range(0, min(len(rows), self.config.run.eval_rows), size):
            stop = min(start + size, self.config.run.eval_rows)
            batch = rows.batch(slice(start, stop)).to(self.device)
            with self._autocast():
                logits_BTV = self.model(batch.ids, positions_BT=batch.positions)
            spoken = batch.spoken.float()
            for n, weights in enumerate((batch.weights, spoken)):
                sums[n] += weighted_cross_entropy(logits_BTV, batch.targets, weights)
                sums[n + 2] += weights.sum()
        self.model.train()
        nats, spoken_nats, tokens, spoken_tokens = sums.tolist()
        loss = nats / max(1.0, tokens)
        return HeldOut(loss, math.exp(min(loss, 80.0)), spoken_nats / max(1.0, spoken_tokens), int(tokens))

    def state(self) -> dict[str, Any]:
        """Everything the next step depends on."""
        return {
            "step": self.step,
            "config": self.config.to_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }

    def load_state(self, state: dict[str, Any], where: str) -> list[str]:
        """Continue from `state()`.

        Returns:
            The settings that differ from the checkpoint's, as text; the present config holds.

        Raises:
            ConfigError: the checkpoint is of a model of another shape.
        """
        was, now = _flat(state["config"]), _flat(self.config.to_dict())
        changed = {key: (was.get(key), now.get(key)) for key in {**was, **now} if was.get(key) != now.get(key)}
        if shape := next((key for key in changed if key.startswith("model.")), None):
            old, new = changed[shape]
            raise ConfigError(
                f"{where}: this run's {shape} was {old}, and the config now says {new}",
                hint="choose another [run] out, or delete the old one",
            )
        self.model.load_state_dict(state["model"])
        settings = [{key: group[key] for key in group if key != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, present in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(present)  # torch would go on with the checkpoint's
        torch.set_rng_state(state["rng"])
        self.step = int(state["step"])
        return [f"{key}: {old} -> {new}" for key, (old, new) in changed.items()]

    def export(self, folder: Path) -> None:
        """Write the model in HF layout, bfloat16, with its tokenizer beside it.

        Raises:
            CheckpointError: the folder cannot be written; an older one stays whole.
        """
        tokenizer = self.tokenizer
        beside = [tokenizer.path.with_name(name) for name in TOKENIZER_SETTINGS]
        files = (tokenizer.path, *(path for path in beside if path.exists()))
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        with tempfile.TemporaryDirectory() as temporary:
            generation = Path(temporary) / "generation_config.json"
            generation.write_text(json.dumps({**ids, "do_sample": False}, indent=2) + "\n", encoding="utf-8")
            save_folder(
                self.config.model,
                self.model.state_dict(),
                folder,
                dtype=torch.bfloat16,
                config=ids,
                copy=(*files, generation),
            )


def training_args(args: ModelArgs, seq_len: int) -> ModelArgs:
    """The same model with the sliding window that keeps a row's documents apart (`octavo.train.data.positions`).

    Positions count further than a row is long, so the context is widened too; neither changes a weight.
    """
    window = seq_len + 1 if args.sliding_window is None else min(args.sliding_window, seq_len + 1)
    return dataclasses.replace(args, sliding_window=window, max_seq_len=max(args.max_seq_len, (seq_len + 1) ** 2))


def _shares(counts_LE: Tensor) -> list[list[float]]:
    if not counts_LE.numel():
        return []
    shares = counts_LE.double() / counts_LE.sum(-1, keepdim=True).clamp_min(1)
    return [[round(share, 5) for share in layer] for layer in shares.tolist()]


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def train(config: TrainConfig, resume: bool = True) -> TrainResult:
    """Train until `[optim] steps`, or until Ctrl-C.

    Writes into `[run] out`: checkpoints/, metrics.jsonl, rows/ (tokenised text, reused), and at the end
    model/ (HF layout, bfloat16), curves.png and experts.png. If there is a checkpoint and `resume` is true, goes
    on from it and says so.

    Raises:
        UserError: a setting or a file is not usable, or a checkpoint cannot be written.
    """
    threads = torch.get_num_threads()
    try:
        return _Run(config, resume).drive()
    finally:
        torch.set_num_threads(threads)


class _Run:
    """One sitting of a training run: the loop, and what it writes."""

    def __init__(self, config: TrainConfig, resume: bool) -> None:
        self.config = config
        self.out = config.run.out
        self.folder = self.out / "checkpoints"
        newest = load_newest(self.folder) if resume else None
        if not resume and checkpoints(self.folder):
            raise ConfigError(f"{self.out} holds a run already", hint="resume it, or choose another [run] out")
        self.trainer = Trainer(config)
        if newest is not None:
            path, state = newest
            changed = self.trainer.load_state(state, str(path))
            say(f"resuming from {path}, step {self.trainer.step}")
            for line in changed:
                say(f"  changed since: {line}")
        self.metrics = MetricsFile(self.out / "metrics.jsonl", self.trainer.step)
        self.saved = self.trainer.step if newest is not None else -1
        self.ce = math.nan
        self.heldout: HeldOut | None = None
        self.launched: LaunchedStep | None = None
        self.bar: Any = None
        self.pace = Pace(math.nan)

    def introduce(self) -> None:
        trainer, args, optim = self.trainer, self.config.model, self.config.optim
        say(
            f"{args.n_params / 1e6:.2f} M parameters, {args.n_active_params / 1e6:.2f} M active; "
            f"{trainer.device.type}, {str(trainer.dtype).removeprefix('torch.')} ({trainer.dtype_reason})"
        )
        epochs = optim.steps * trainer.order.rows_per_step / len(trainer.rows)
        say(
            f"{len(trainer.rows):,} rows, {trainer.rows.n_targets:,} targets; {optim.steps:,} steps of "
            f"{trainer.order.rows_per_step} rows, {epochs:.1f} epochs"
        )
        if trainer.step < optim.steps:
            self.measure()

    def measure(self) -> None:
        """Find what the device can do, and say it, with how the experts are laid out."""
        trainer, args = self.trainer, self.config.model
        rate = matrix_rate(trainer.device, trainer.dtype)
        flops = flops_per_token(args, trainer.rows.mean_visible(args.sliding_window))
        self.pace = Pace(flops / rate)
        say(
            f"{flops / 1e6:,.1f} MFLOPs a token; the device multiplies matrices at {rate / 1e12:.3g} TFLOP/s (measured)"
        )
        if args.moe is not None and trainer.device.type == "cuda":
            layout = "in grouped products" if trainer.grouped else "one by one"
            say(f"experts are computed {layout}: {trainer.experts_reason}")

    def drive(self) -> TrainResult:
        self.introduce()
        trainer, run, steps = self.trainer, self.config.run, self.config.optim.steps
        stop = Stop()
        self.bar = make_bar(trainer.step, steps)
        with stop.listening(), self.bar:
            self.pace.restart(Moment(trainer.device))
            while trainer.step < steps and not stop.asked:
                launched = trainer.launch_step()
                self.read()
                self.launched = launched
                if _due(trainer.step, run.eval_every) and trainer.step < steps:
                    self.evaluate()
                if _due(trainer.step, run.checkpoint_every):
                    self.checkpoint()
            if self.saved != trainer.step:
                self.checkpoint()
        return self.finish(trainer.step >= steps)

    def read(self) -> None:
        """Take in what the newest step says that was not read yet."""
        launched, self.launched = self.launched, None
        if launched is None:
            return
        metrics = launched.read()
        self.check(metrics)
        self.ce = metrics.ce
        self.pace.add(metrics.tokens, launched.numbers.moment)
        self.bar.update()
        if metrics.step % self.config.run.log_every == 0:
            speed = self.pace.lap()
            self.metrics.add({**dataclasses.asdict(metrics), **speed.record})
            self.bar.set_postfix_str(f"loss {metrics.ce:.3f}, {speed}")

    def check(self, metrics: StepMetrics) -> None:
        """Stop before a run that has blown up writes over checkpoints that have not."""
        if not (math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm)):
            found = checkpoints(self.folder)
            raise ConfigError(
                f"step {metrics.step}: the loss is {metrics.loss} and its gradient {metrics.grad_norm}",
                hint="lower [optim] lr or set grad_clip" + (f"; {found[-1]} is whole" if found else ""),
            )

    def evaluate(self) -> None:
        self.read()
        self.heldout = self.trainer.evaluate()
        if self.heldout is not None:
            self.metrics.add({"step": self.trainer.step, "heldout": dataclasses.asdict(self.heldout)})
            say(
                f"step {self.trainer.step}: training {self.ce:.4f}, held-out {self.heldout.loss:.4f} "
                f"(spoken {self.heldout.spoken_loss:.4f}, perplexity {self.heldout.perplexity:.3f})"
            )
        self.pace.restart(Moment(self.trainer.device))

    def checkpoint(self) -> None:
        self.read()
        save_checkpoint(self.folder, self.trainer.step, self.trainer.state(), self.config.run.keep)
        self.saved = self.trainer.step
        self.pace.restart(Moment(self.trainer.device))

    def finish(self, finished: bool) -> TrainResult:
        folder: Path | None = None
        if finished:
            self.evaluate()
            folder = self.out / "model"
            self.trainer.export(folder)
            say(f"the model is in {folder}")
        else:
            say(f"stopped at step {self.trainer.step}; run the same command to go on from {self.folder}")
        speed = self.pace.whole()
        if self.pace.tokens:
            say(f"trained on {self.pace.tokens:,} tokens, {speed}")
        self.draw()
        return TrainResult(self.trainer.step, finished, self.ce, self.heldout, folder, *speed)

    def draw(self) -> None:
        from octavo.train.plot import plot_run

        try:
            plot_run(self.metrics.path, self.out)
        except ImportError:
            say("no curves drawn: matplotlib is not installed")
            say("hint: pip install 'octavo[train]'")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
