"""The training loop of every stage: resumable at any step, on one process or many.

What a step sees is a function of (seed, step, process), so a resumed run goes on as if it had never
stopped. A run's folder holds `state/` (everything to go on from), `log.jsonl`, `curves.png` and
`weights.safetensors` (the moving average); `stages` adds `recipes.jsonl`. `accelerate` decides on
devices and processes.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from .curves import plot_curves, read_log
from .muon import Muon
from .recipe import Optimiser, Run

log = logging.getLogger(__name__)
STATE, LOG, WEIGHTS, CURVES = "state", "log.jsonl", "weights.safetensors", "curves.png"
VITAL = ("loss", "grad_norm")  # what breaks the weights if it is no number
SHOWN = 4  # numbers beside the progress bar


class Stage(Protocol):
    """What is trained. `module(*batch)` returns scalars by name, `loss` among them."""

    @property
    def module(self) -> nn.Module: ...

    def matrices(self) -> list[nn.Parameter]:
        """Return the parameters that Muon trains; AdamW trains the others."""
        ...

    def batch(self, step: int, process: int) -> tuple[Any, ...]:
        """Return what `module` takes at a step (0-based) in a process."""
        ...

    def evaluate(self, module: Any) -> dict[str, float]:
        """Return numbers of the averaged module for the log."""
        ...

    def save(self, module: Any, path: Path) -> None:
        """Write the averaged module as a file that the package loads."""
        ...

    def release(self, module: Any, path: Path) -> None:
        """Write it as it is meant to be given away."""
        ...


class Progress:
    """How far a run has come, as `accelerate` checkpoints it.

    `sums` are (total, count) of every number since the log's last line.
    """

    def __init__(self) -> None:
        self.step, self.seconds = 0, 0.0
        self.sums: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "seconds": self.seconds, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        self.sums = dict(state["sums"])


def cpu_only() -> bool:
    """Say whether there is no device but the CPU: `accelerate` must be told, or each of several
    processes would train alone."""
    return not torch.accelerator.is_available()


class Trainer:
    """One run of a stage in a folder, from where the folder's last checkpoint stands."""

    def __init__(self, stage: Stage, run: Run, optimiser: Optimiser, folder: Path):
        self.stage, self.recipe, self.optimiser, self.folder = stage, run, optimiser, folder
        logging.getLogger("accelerate").setLevel(logging.WARNING)
        self.accelerator = Accelerator(cpu=cpu_only(), mixed_precision=run.precision)
        self._averaged = AveragedModel(stage.module, multi_avg_fn=_ema(optimiser.ema))
        self._averaged.to(self.accelerator.device).eval()
        plain = _optimisers(stage, optimiser, run)
        self._rates = [one.param_groups[0]["lr"] for one in plain]
        self._module, *self._optimisers = self.accelerator.prepare(stage.module, *plain)
        self.progress = Progress()
        self.accelerator.register_for_checkpointing(self.progress, self._averaged)
        self._main = self.accelerator.is_main_process
        folder.mkdir(parents=True, exist_ok=True)
        self._resume()

    def run(self, until: int | None = None) -> None:
        """Train to the last step, or stop with a checkpoint at `until`."""
        last = min(self.recipe.steps, until or self.recipe.steps)
        if self.progress.step >= last:
            return
        self._began = time.monotonic() - self.progress.seconds
        bar = tqdm(
            total=self.recipe.steps, initial=self.progress.step, disable=not self._main,
            mininterval=1.0, desc=self.folder.name,
        )  # fmt: skip
        with bar, _single_core_thread() as ahead:
            coming = self._prepare(ahead, self.progress.step)
            while self.progress.step < last:
                batch = coming.result()
                if self.progress.step + 1 < last:
                    coming = self._prepare(ahead, self.progress.step + 1)
                self._step(batch)
                bar.update()
                self._report(bar, done=self.progress.step == last)
        self.accelerator.end_training()

    def release(self, path: Path) -> None:
        """Write the averaged module as it is meant to be given away."""
        if self._main:
            self.stage.release(self._averaged.module, path)

    def _prepare(self, ahead: ThreadPoolExecutor, step: int) -> Future[tuple[Any, ...]]:
        return ahead.submit(self.stage.batch, step, self.accelerator.process_index)

    def _step(self, batch: tuple[Any, ...]) -> None:
        factor = self.optimiser.factor(self.progress.step, self.recipe.steps)
        for one, rate in zip(self._optimisers, self._rates, strict=True):
            for group in one.param_groups:
                group["lr"] = rate * factor
        device = self.accelerator.device
        moved = (x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in batch)
        with self.accelerator.autocast():
            parts = self._module(*moved)
        self.accelerator.backward(parts["loss"])
        norm = self.accelerator.clip_grad_norm_(self._module.parameters(), self.optimiser.clip)
        for one in self._optimisers:
            one.step()
            one.zero_grad()
        self._averaged.update_parameters(self.accelerator.unwrap_model(self._module))
        self._add({**parts, "grad_norm": torch.as_tensor(norm)})
        self.progress.step += 1
        self.progress.seconds = time.monotonic() - self._began

    def _add(self, parts: dict[str, Tensor]) -> None:
        """Sum for the log. A part is NaN where a batch has none of it; VITAL ones are not."""
        for name, value in parts.items():
            value = value.detach().float()
            there = torch.ones_like(value).bool() if name in VITAL else ~torch.isnan(value)
            pair = torch.stack([torch.where(there, value, 0.0), there.float()])
            known = self.progress.sums.get(name, torch.zeros(2))
            self.progress.sums[name] = known.to(value.device) + pair

    def _report(self, bar: Any, *, done: bool) -> None:
        """Write what is due after a step: a line of the log, a checkpoint, curves."""
        step, run = self.progress.step, self.recipe
        line: dict[str, float] = {}
        if step % run.log_every == 0 or step == run.steps:
            line = self._means()
            bar.set_postfix({name: f"{line[name]:.3g}" for name in list(line)[:SHOWN]})
        if (step % run.evaluate_every == 0 or step == run.steps) and self._main:
            line |= self.stage.evaluate(self._averaged.module)
        if line and self._main:
            whole = {"step": step, "seconds": round(self.progress.seconds, 1), **line}
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(whole) + "\n")
        if step % run.save_every == 0 or done:
            if self._main:
                self.stage.save(self._averaged.module, self.folder / WEIGHTS)
                plot_curves(self.folder / LOG, self.folder / CURVES)
            self._checkpoint()  # last: what a run that is done left must be whole

    def _means(self) -> dict[str, float]:
        """Return the means since the last line, over all processes."""
        self._share_sums()
        pairs = {name: self.progress.sums[name].tolist() for name in sorted(self.progress.sums)}
        self.progress.sums = {}
        return {name: total / count for name, (total, count) in pairs.items() if count}

    def _share_sums(self) -> None:
        """Give every process the mean of all their sums: one checkpoint is for all of them.

        Raises `FloatingPointError`, in all of them, if a vital one is no number.
        """
        sums = self.progress.sums
        for name in sorted(sums):
            shared = self.accelerator.reduce(sums[name].to(self.accelerator.device), "mean")
            assert isinstance(shared, Tensor)
            sums[name] = shared
        for name in VITAL:
            if name in sums and not torch.isfinite(sums[name][0]):
                raise FloatingPointError(
                    f"the {name} is {float(sums[name][0])} at step {self.progress.step}; lower lr "
                    "and matrix_lr and train on: the last good checkpoint is in "
                    f"{self.folder / STATE}"
                )

    def _resume(self) -> None:
        """Load the newest whole checkpoint, and drop what was logged after it."""
        state = self.folder / STATE
        if not state.is_dir():  # killed between the two renames of a checkpoint
            state = state.with_name("state.old")
        if state.is_dir():
            self.accelerator.load_state(str(state))
            log.info("%s goes on from step %d", self.folder, self.progress.step)
        journal = self.folder / LOG
        if self._main and journal.exists():
            kept = [line for line in read_log(journal) if line["step"] <= self.progress.step]
            journal.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")

    def _checkpoint(self) -> None:
        """Write a checkpoint beside the last one, then put it in its place: one is always whole."""
        self._share_sums()
        state = self.folder / STATE
        fresh, old = state.with_name("state.new"), state.with_name("state.old")
        if self._main:
            shutil.rmtree(fresh, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(fresh), safe_serialization=True)
        self.accelerator.wait_for_everyone()
        if self._main:
            if state.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.replace(state, old)
            os.replace(fresh, state)
            shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()


def _single_core_thread() -> ThreadPoolExecutor:
    """Return a thread whose tensor work stays on one core.

    With a team of cores of its own it would keep the training thread's team waiting.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(1)
    # a thread takes the process's number over when it is first asked, so it is asked before
    pool.submit(torch.get_num_threads).result()
    pool.submit(torch.set_num_threads, 1).result()
    torch.set_num_threads(threads)  # a part of that setting is the whole process's
    return pool


def _optimisers(stage: Stage, optimiser: Optimiser, run: Run) -> list[torch.optim.Optimizer]:
    matrices = [p for p in stage.matrices() if p.requires_grad]
    known = {id(p) for p in matrices}
    others = [p for p in stage.module.parameters() if p.requires_grad and id(p) not in known]
    made: list[torch.optim.Optimizer] = []
    if matrices:
        made.append(
            Muon(
                matrices, optimiser.matrix_lr,
                momentum=optimiser.momentum, weight_decay=optimiser.weight_decay,
                dtype=torch.bfloat16 if run.precision == "bf16" else torch.float32,
            )
        )  # fmt: skip
    if others:
        made.append(torch.optim.AdamW(others, optimiser.lr, (0.9, 0.98), weight_decay=0.0))
    return made


def _ema(decay: float):
    """Return an average that forgets the random start: the decay grows with the steps seen."""

    @torch.no_grad()
    def update(averages: Sequence[Tensor], now: Sequence[Tensor], seen: Tensor | int) -> None:
        count = int(seen)
        share = 1 - min(decay, (1 + count) / (10 + count))
        for average, value in zip(averages, now, strict=True):
            average.lerp_(value.to(average), share)

    return update
