"""Training; thin, so that the time of a step is the time of the network.

A checkpoint holds no state of a generator and none of the schedule: each step seeds its random numbers from (seed,
step, process), the learning rate is a function of the step, a batch one of (seed, epoch, number). So a run that goes on
is the run that was not interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import mvit3_kernels

from . import checkpoint
from .checkpoint import AVERAGE, TRAINED
from .checks import check_batch_norm, count_classes
from .config import TrainConfig
from .data import Loaders
from .data.identity import identity
from .distributed import World, data_parallel
from .ema import INITIAL_SHARE, Ema
from .epochs import best_epochs, better, history_row
from .errors import Stopped, TrainingError
from .network import build_model, load_weights, train_mode
from .optimizer import build_optimizer
from .options import UsageError
from .progress import Listener, Progress
from .runtime import autocast, precision, use_ops
from .schedule import Schedule, rate_factor
from .screen import count
from .signals import StopSignals
from .tasks import Evaluation, evaluate, open_task

STOP_STEPS = 10  # steps between two agreements of several GPUs on whether to stop; on a CPU it is each step


class Trainer:
    """A network in training. `fit` runs it to its end, or to a signal; `train_epoch` and `evaluate_epoch` are its
    parts."""

    def __init__(
        self,
        config: TrainConfig,
        loaders: Loaders,
        world: World,
        listener: Listener | None = None,
        pretrained: bool = True,
    ) -> None:
        self.config, self.loaders, self.world, self.device = config, loaders, world, world.device
        self.listener = listener if listener and world.first else Listener()
        loaders.train.say = loaders.val.say = self.listener.say
        run, self.task = config.run, open_task(config.model.name)
        self.num_classes = count_classes(config, loaders, self.task)
        check_batch_norm(config, world, self.task)
        self.steps_per_epoch = len(loaders.train) // run.accumulate
        if not self.steps_per_epoch:
            raise UsageError(
                f"run.accumulate must be at most the batches of an epoch, {len(loaders.train)}, got {run.accumulate}"
            )
        self.total_steps = config.schedule.epochs * self.steps_per_epoch
        self.effective_batch = config.data.batch_size * world.size * run.accumulate
        self.folder, self.progress, self.signals = Path(run.output), Progress(), StopSignals()

        self.model = build_model(config, self.num_classes, self.device, pretrained, self.listener.say)
        self.ema = Ema(self.model, config.ema.momentum, config.ema.warmup) if config.ema.enabled else None
        if run.sync_bn and world.size > 1:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.factor = rate_factor(config.optimizer, self.effective_batch)
        self.optimizer = build_optimizer(self.model, config.optimizer, self.factor)
        self.schedule = Schedule(config.schedule, self.optimizer, self.steps_per_epoch, self.factor)
        self._schedule_from = 0.0  # step of the schedule that is reached, though some of an epoch may be done again
        self.data_identity = data_identity(config, loaders) if world.first else {}
        if self.schedule.note:
            self.listener.say(self.schedule.note)
        self.criterion = self.task.criterion(config, self.model, loaders, self.num_classes, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision(run, self.device) is torch.float16)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        # On the device, and read where it costs no waiting: sum of losses, steps that counted, steps skipped, skipped
        # in a row.
        self._counts = torch.zeros(4, device=self.device)
        self._read_steps = 1 if self.device.type == "cpu" else run.log_steps
        self._recorded = 0.0, 0  # sum and number of this epoch's losses when a loss was last told
        self._clock = time.perf_counter()
        self._statistics = [
            b for m in (self.model, self.ema and self.ema.module) if m for b in m.buffers() if b.is_floating_point()
        ]
        self._healthy = [b.clone() for b in self._statistics]
        self._said: set[str] = set()  # remarks about evaluations
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = not run.deterministic and len(config.sampler.sizes) < 2

    # Parts that wrap the network are made by the first step, after a checkpoint was loaded.

    def _wrap(self) -> None:
        run = self.config.run
        self.network = self.task.network(self.model)
        if run.compile:
            self.network.compile()
        if self.world.size > 1:
            self.network = data_parallel(self.network)
        self._graph = None
        if run.cuda_graph:
            self._graph = mvit3_kernels.cuda_graph_step(
                self.network,
                self.criterion,
                self.optimizer,
                autocast=precision(run, self.device),
                scaler=self.scaler if self.scaler.is_enabled() else None,
                max_norm=self.config.optimizer.clip_grad or None,
                warmup=3 if self.world.size == 1 else 11,
            )

    def fit(self) -> bool:
        """Trains to the end, with a checkpoint and a row of `progress.history` after each epoch; False where a signal
        ended it before.

        Raises:
            TrainingError: the loss stays without a finite value.
            DataError, OSError: images cannot be read, or a checkpoint cannot be written; the last good one is kept.
        """
        with self.signals:
            try:
                while self.progress.epoch < self.config.schedule.epochs:
                    self.train_epoch()
                    self.evaluate_epoch()
            except Stopped:
                self.save()
                return False
        return True

    def train_epoch(self) -> None:
        """The rest of the present epoch's steps."""
        if not hasattr(self, "network"):
            self._wrap()
        p, run = self.progress, self.config.run
        train_mode(self.model, self.config.model)
        self.criterion.begin_epoch(p.epoch)
        wait_before = p.wait_seconds
        self._recorded = p.loss_sum, p.steps
        batches = self.loaders.train.epoch(p.epoch, p.batch)
        with use_ops(run.ops):
            while p.batch < self.steps_per_epoch * run.accumulate:
                if run.max_steps and p.step >= run.max_steps:
                    raise Stopped
                started = time.perf_counter()
                lr = self.schedule.set(
                    max(p.step * self.schedule.steps_per_epoch / self.steps_per_epoch, self._schedule_from)
                )
                images = self._step(batches)
                p.step += 1
                p.batch += run.accumulate
                p.wait_seconds = wait_before + self.loaders.train.wait_seconds
                p.images += images
                end = p.batch == self.steps_per_epoch * run.accumulate
                if p.step % self._read_steps == 0 or end:
                    self._read()
                    if p.step % run.log_steps == 0 or end or p.step == 1:
                        self.listener.on_loss(self, self._mean_loss(), lr)
                seconds = time.perf_counter() - started
                p.seconds += seconds
                self.listener.on_step(self, images, seconds)
                if self._must_stop(p.step):
                    raise Stopped
                if run.save_steps and p.step % run.save_steps == 0 and not end:
                    self.save()

    def _mean_loss(self) -> float:
        """Over the steps since it was last asked for, those that counted."""
        p, (total, steps) = self.progress, self._recorded
        self._recorded = p.loss_sum, p.steps
        return (p.loss_sum - total) / (p.steps - steps) if p.steps > steps else math.nan

    def _step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> int:
        """One update of the weights; returns the number of images in all processes."""
        run, seen = self.config.run, 0
        if self._graph is not None:
            batch = self._next(batches)
            self._seed()
            images, targets = self.criterion.mix(*batch)
            loss = self._graph(images, targets)
            bad = (~loss.isfinite()).float()
            seen = len(images)
        else:
            loss = 0.0
            for part in range(run.accumulate):
                images, labels = self._next(batches)
                if part == 0:
                    self._seed()
                seen += len(images)
                images, targets = self.criterion.mix(images if run.channels_last else images.contiguous(), labels)
                # with adding up the gradients of the processes
                wait = self.world.size > 1 and part < run.accumulate - 1
                with self.network.no_sync() if wait else nullcontext():
                    with autocast(run, self.device):
                        piece = self.criterion(self.network(images), targets) / run.accumulate
                    self.scaler.scale(piece).backward()
                loss = loss + piece.detach()
            bad = self._update()
        if self.ema is not None:
            self.ema.update()
        total, steps, skipped, row = self._counts.unbind()
        loss = torch.where(bad > 0, 0.0, loss.float())
        self._counts = torch.stack((total + loss, steps + 1 - bad, skipped + bad, (row + bad) * bad))
        return seen * self.world.size

    def _next(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        batch = next(batches, None)
        if batch is None:
            raise TrainingError(
                f"the training images ended before the epoch did: {len(self.loaders.train.unreadable)} are unreadable"
            )
        return batch

    def _update(self) -> Tensor:
        """Clips, and updates the weights where the gradient is finite; 1.0 where it is not, 0.0 where it is. The GPU is
        not waited for."""
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        if self.config.optimizer.clip_grad:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.optimizer.clip_grad, norm, foreach=True)
        bad = (~norm.isfinite()).float()
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif getattr(self.optimizer, "_step_supports_amp_scaling", False):
            # As GradScaler asks a fused optimiser to leave out a step.
            self.optimizer.grad_scale, self.optimizer.found_inf = None, bad
            self.optimizer.step()
            del self.optimizer.grad_scale, self.optimizer.found_inf
        elif not bad:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return bad

    def _seed(self) -> None:
        """Makes the random numbers of this step (dropout, mixing) a function of seed, step and process. Called when its
        first batch is
        there: the first batch of an iteration draws from torch's generator, in whichever step that is."""
        words = np.random.SeedSequence((self.config.run.seed, self.progress.step, self.world.rank)).generate_state(3)
        seed = int(words[0]) << 32 | int(words[1])
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index or 0].manual_seed(seed)
        if self.criterion.mixup is not None:
            np.random.seed(words[2])  # noqa: NPY002 -- timm draws from it

    def _read(self) -> None:
        """Takes the counts from the device; puts running statistics right that a skipped step has spoilt."""
        p, run = self.progress, self.config.run
        total, steps, skipped, row = self.world.mean(self._counts).tolist()
        steps, skipped = round(steps), round(skipped)
        self._counts[:3] = 0
        self.last_loss = total / steps if steps else math.nan
        p.loss_sum, p.steps, p.skipped = p.loss_sum + total, p.steps + steps, p.skipped + skipped
        p.unreadable = len(self.loaders.train.unreadable)
        if not skipped:
            torch._foreach_copy_(self._healthy, self._statistics)
            return
        if not math.isfinite(float(nn.utils.get_total_norm(self._statistics))):
            torch._foreach_copy_(self._statistics, self._healthy)
        self.listener.say(
            f"step {p.step}: the gradient is not finite, {count(skipped, 'step')} skipped ({p.skipped} so far)"
        )
        if row >= run.max_bad_steps:
            kept = self.folder / checkpoint.LAST
            raise TrainingError(
                f"the loss or its gradient was not finite in {round(row)} steps in a row, up to step {p.step} of "
                f"{self.total_steps}; "
                f"try a lower optimizer.lr or optimizer.clip_grad"
                + (f"; the last good checkpoint is {kept}" if kept.exists() else "; there is no checkpoint yet")
            )

    def evaluate_epoch(self) -> None:
        """Ends an epoch whose steps are done: evaluates, adds a row to the history, saves."""
        p, config, lr = self.progress, self.config, self.schedule.rate
        end = p.epoch + 1 == config.schedule.epochs
        evaluations: dict[str, Evaluation] = {}
        if end or (p.epoch + 1) % config.run.eval_epochs == 0:
            for weights, model in ((TRAINED, self.model), (AVERAGE, self.ema and self.ema.module)):
                if model is not None:
                    self.world.sync_buffers(model)
                    evaluations[weights] = self.evaluate(model)
        judged = better(evaluations)
        share = self.ema and self.ema.initial_share(p.step)
        p.history.append(history_row(p, self.task.scores, evaluations, lr, share))
        for weights, found in evaluations.items():
            if found.not_finite:
                self.listener.say(
                    f"epoch {p.epoch + 1}: the {weights} weights give no finite output for {found.not_finite} of "
                    f"{found.total} "
                    f"validation images; they are {self.task.lost}, and these weights are not kept as the best"
                )
            for remark in found.remarks:
                if remark not in self._said:
                    self._said.add(remark)
                    self.listener.say(remark)
        p.epoch, p.batch = p.epoch + 1, 0
        p.loss_sum, p.steps, p.images, p.seconds, p.wait_seconds = 0.0, 0, 0, 0.0, 0.0
        also = []
        if evaluations:
            p.weights = judged or p.weights
            for name, value in evaluations[judged or TRAINED].kept.items():
                setattr(p, name, value)
        score = evaluations[judged].values[self.task.scores.best] if judged else None
        if score is not None and score > p.best:
            p.best, p.best_epoch, p.best_weights = score, p.epoch, p.weights
            also.append(checkpoint.BEST)
        if config.run.save_epochs and p.epoch % config.run.save_epochs == 0:
            also.append(f"epoch_{p.epoch:04}.pt")
        keep = config.run.keep_best
        best = best_epochs(p.history, self.task.scores, keep) if keep > 1 else []
        if evaluations and p.epoch in best:
            also.append(checkpoint.best_of(p.epoch))
        self.save(also)
        if best and self.world.first:
            checkpoint.keep_best(self.folder, best)
        self.listener.on_epoch(self)

    def evaluate(self, model: nn.Module) -> Evaluation:
        """On the validation part. A single process stops at once where a signal asks for it; several finish."""
        stopped = (lambda: self.signals.asked) if self.world.size == 1 else (lambda: False)
        batches = self.listener.evaluating(self, self.loaders.val, len(self.loaders.val))
        names, source = self.loaders.class_names, self.loaders.val.source
        meter = self.task.meter(self.config, self.num_classes, names, source, self.world, self.world.first)
        return evaluate(model, batches, self.config.run, meter, self.device, stopped)

    def _must_stop(self, step: int) -> bool:
        if self.device.type == "cuda" and step % STOP_STEPS and self.world.size > 1:
            return False
        return self.world.any(self.signals.asked)

    # Checkpoints

    @property
    def weights(self) -> str:
        """The weights that a checkpoint made now is used with. Before the first evaluation it is the average where that
        has forgotten the initial weights."""
        fresh = self.ema is None or self.ema.initial_share(self.progress.step) > INITIAL_SHARE
        return self.progress.weights or (TRAINED if fresh else AVERAGE)

    def spent(self) -> float:
        """Seconds of all starts until now, evaluation and saving included."""
        now = time.perf_counter()
        self.progress.total_seconds += now - self._clock
        self._clock = now
        return self.progress.total_seconds

    def content(self) -> dict[str, object]:
        """The run as it stands, as plain values and tensors."""
        self.spent()
        return {
            "state_dict": self.model.state_dict(),
            "ema_state_dict": self.ema.module.state_dict() if self.ema else {},
            "weights": self.weights,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.progress),
            "config": self.config.to_dict(),
            "num_classes": self.num_classes,
            "class_names": list(self.loaders.class_names),
            **self.task.recorded(self.loaders),
            "data": self.data_identity,
            "world_size": self.world.size,
            "steps_per_epoch": self.steps_per_epoch,
            "schedule_steps_per_epoch": self.schedule.steps_per_epoch,
            "schedule_from": self._schedule_from,
            "version": mvit3_kernels.__version__,
        }

    def save(self, also: list[str] | tuple[str, ...] = ()) -> None:
        """Writes `last.pt`, under the names in `also` too."""
        if float(self._counts[1:].sum()):
            self._read()
        if not self.world.first:
            return
        try:
            checkpoint.save(self.folder, self.content(), also)
        except OSError as error:
            kept = self.folder / checkpoint.LAST
            message = f"no checkpoint could be written: {error.strerror or error}"
            raise OSError(
                error.errno,
                message + (f"; the last good one is kept: {kept}" if kept.exists() else ""),
                str(self.folder),
            ) from None

    def load(self, content: dict[str, object]) -> None:
        """Goes on where a checkpoint was made. CheckpointError where it belongs to another network."""
        load_weights(self.model, content["state_dict"], "the checkpoint", self.config.model.name)
        if self.ema is not None:
            load_weights(
                self.ema.module,
                content["ema_state_dict"] or content["state_dict"],
                "the checkpoint",
                self.config.model.name,
            )
        fresh = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(content["optimizer"])
        for group, options in zip(self.optimizer.param_groups, fresh, strict=True):
            group.update(options)
        if content["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(content["scaler"])
        self.progress = Progress(**content["progress"])
        self.progress.starts += 1
        self._convert(content)
        if self.ema is not None:
            self.ema.steps = self.progress.step
        for row in self.progress.history:  # of a version that did not have these columns
            row |= {"weights": row.get("weights"), "ema_initial_share": row.get("ema_initial_share")}
        torch._foreach_copy_(self._healthy, self._statistics)

    def _convert(self, content: dict[str, object]) -> None:
        """Puts the progress into this run's steps, where the checkpoint's had another number of images: what share of
        the epoch is done stays, rounded down to whole steps, and the schedule goes on by the share of the training that
        is done; it never goes back."""
        p, now, accumulate = self.progress, self.steps_per_epoch, content["config"]["run"]["accumulate"]
        done = p.batch // accumulate
        # of a version that did not save it
        then = content.get("steps_per_epoch") or ((p.step - done) // p.epoch if p.epoch else now)
        unit = content.get("schedule_steps_per_epoch") or then
        if unit != now:
            self.schedule = Schedule(self.config.schedule, self.optimizer, unit, self.factor)
        self._schedule_from = content.get("schedule_from", 0.0)
        if then != now or accumulate != self.config.run.accumulate:
            self._schedule_from = max(self._schedule_from, (p.epoch + done / then) * unit)
            done = min(done * now // then, now)
            p.batch, p.step = done * self.config.run.accumulate, p.epoch * now + done
            self.listener.say(
                f"steps have another number of images than the checkpoint's: {now} make an epoch now, not {then}"
            )


def data_identity(config: TrainConfig, loaders: Loaders) -> dict[str, object]:
    """What the images of both parts are known by, and how a message names them."""
    return {
        "name": config.data.root or config.data.source,
        "train": identity(loaders.train.source),
        "val": identity(loaders.val.source),
    }
