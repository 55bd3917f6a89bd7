"""Several methods of choosing penalties, each given the same number of inner solves."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiments.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from experiments.dataset import Dataset
from experiments.methods import Method
from experiments.metrics import Record, append_record, by_method, keep_records
from experiments.regression import Fit, accuracy, implicit_fit, loss
from experiments.show import show
from implicitgrad.linalg import LinearSolver


@dataclass(frozen=True)
class Comparison:
    """Trains on the train part, chooses on the validation part, and shows the test part beside it.

    Args:
        dataset: the three parts.
        solver: solves the adjoint systems.
        methods: for each name a function from the number of features to the method.
        num_solves: inner solves each method may use.
    """

    dataset: Dataset
    solver: LinearSolver
    methods: dict[str, Callable[[int], Method]]
    num_solves: int

    def run(self, folder: Path, settings: dict[str, Any], resume: bool) -> list[Record]:
        """All records; leaves `metrics.jsonl`, `checkpoint.pt`, `table.txt` and `figure.png` in `folder`.

        Args:
            folder: an existing directory.
            settings: all that decides the numbers, kept in the checkpoint.
            resume: go on from the checkpoint in `folder`; otherwise what a former run left there is overwritten.

        Raises:
            ValueError: the checkpoint was made with other settings.
        """
        records = self._measure(folder / "metrics.jsonl", folder / "checkpoint.pt", settings, resume)
        show([records], str(self.dataset), folder)
        return records

    def _measure(self, metrics: Path, saved: Path, settings: dict[str, Any], resume: bool) -> list[Record]:
        if not resume:
            saved.unlink(missing_ok=True)
        checkpoint = load_checkpoint(saved, settings)
        metrics.touch()
        records = keep_records(metrics, checkpoint.num_records)
        states = dict(checkpoint.methods)

        fit = implicit_fit(self.solver, self.dataset.num_classes)
        with tqdm(total=len(self.methods) * self.num_solves, initial=len(records), unit="solve") as progress:
            for name, make in self.methods.items():
                progress.set_description(name.replace("_", " "))
                method = make(self.dataset.num_features)
                if name in states:
                    method.load_state_dict(states[name])
                for solve in range(len(by_method(records).get(name, [])), self.num_solves):
                    records.append(self._solve(fit, method, name, solve + 1))
                    append_record(metrics, records[-1])
                    states[name] = method.state_dict()
                    save_checkpoint(saved, Checkpoint(settings, len(records), states))
                    progress.update()
        return records

    def _solve(self, fit: Fit, method: Method, name: str, solve: int) -> Record:
        started = time.perf_counter()
        x = method.propose()
        log_penalties = x.tolist()  # before `observe`, which may move x in place
        y = fit(x, *self.dataset.train)
        validation_loss = loss(y, self.dataset.validation)
        method.observe(x, validation_loss)
        seconds = time.perf_counter() - started

        with torch.no_grad():
            return Record(
                method=name,
                num_penalties=method.num_penalties,
                solve=solve,
                validation_loss=validation_loss.item(),
                test_loss=loss(y, self.dataset.test).item(),
                test_accuracy=accuracy(y, self.dataset.test),
                seconds=seconds,
                x=log_penalties,
            )
