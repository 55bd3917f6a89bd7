"""The main job: what it leaves behind, reproducible, and resumable at any point."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from experiments import comparison as comparison_module
from experiments.metrics import Record, by_method, incumbents, read_records
from experiments.summarize import summarize
from tests.experiments.small_job import CONF, SMALL, compose

METHODS = ["hypergradient_descent", "parzen_search", "random_search", "grid_search"]
PNG = b"\x89PNG\r\n\x1a\n"


def _run(folder: Path, *overrides: str, resume: bool = False) -> list[Record]:
    config = compose(*overrides)
    folder.mkdir(exist_ok=True)
    settings = OmegaConf.to_container(config.comparison, resolve=True)
    return hydra.utils.instantiate(config.comparison).run(folder, settings, resume)


def _timeless(records: list[Record]) -> list[Record]:
    return [dataclasses.replace(record, seconds=0.0) for record in records]


def test_job_leaves_table_metrics_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = _run(tmp_path)
    assert read_records(tmp_path / "metrics.jsonl") == records
    assert {name: len(group) for name, group in by_method(records).items()} == dict.fromkeys(METHODS, 4)
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG)
    table = (tmp_path / "table.txt").read_text()
    assert table in capsys.readouterr().out
    assert all(
        column in table for column in ("validation loss", "test loss", "test accuracy", "inner solves", "seconds")
    )


def test_hypergradient_descent_lowers_the_validation_loss_at_each_solve(tmp_path: Path) -> None:
    losses = [record.validation_loss for record in by_method(_run(tmp_path))["hypergradient_descent"]]
    assert losses == sorted(losses, reverse=True)


def test_incumbent_is_chosen_by_validation_loss_alone(tmp_path: Path) -> None:
    group = by_method(_run(tmp_path))["random_search"]
    for solve, best in enumerate(incumbents(group), start=1):
        assert best.validation_loss == min(record.validation_loss for record in group[:solve])


def test_same_seed_gives_same_numbers_and_another_seed_others(tmp_path: Path) -> None:
    first, second = _timeless(_run(tmp_path / "first")), _timeless(_run(tmp_path / "second"))
    assert first == second
    assert _timeless(_run(tmp_path / "third", "seed=1")) != first


@pytest.mark.parametrize("interrupted_at", [2, 7, 12])
def test_resumed_run_equals_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted_at: int
) -> None:
    whole = _run(tmp_path / "whole")
    save, num_saved = comparison_module.save_checkpoint, 0

    def interrupt(*arguments: object) -> None:
        # between the line in metrics.jsonl and the checkpoint: the worst moment
        nonlocal num_saved
        num_saved += 1
        if num_saved == interrupted_at:
            raise KeyboardInterrupt
        save(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(comparison_module, "save_checkpoint", interrupt)
        _run(tmp_path / "parts")
    resumed = _run(tmp_path / "parts", resume=True)
    assert _timeless(resumed) == _timeless(whole)
    assert read_records(tmp_path / "parts" / "metrics.jsonl") == resumed


def test_finished_run_resumes_without_a_solve(tmp_path: Path) -> None:
    assert _run(tmp_path) == _run(tmp_path, resume=True)


def test_resuming_with_other_settings_raises(tmp_path: Path) -> None:
    _run(tmp_path)
    with pytest.raises(ValueError, match="same settings"):
        _run(tmp_path, "seed=1", resume=True)


def test_job_without_resume_starts_over(tmp_path: Path) -> None:
    _run(tmp_path)
    assert len(_run(tmp_path, "num_solves=3")) == 3 * len(METHODS)


def test_digits_work(tmp_path: Path) -> None:
    records = _run(tmp_path, "dataset=digits", "num_solves=2")
    assert all(record.validation_loss < 2.3 for record in records)  # log(10): a guess at random
    assert "digits: 64 features, 10 classes" in (tmp_path / "table.txt").read_text()


def test_command_line_multirun_and_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "experiments.run", "--multirun", "seed=0,1", f"hydra.sweep.dir={tmp_path}", *SMALL]
    subprocess.run(command, cwd=CONF.parent, check=True, capture_output=True)
    folder = tmp_path / "breast_cancer"
    assert sorted(path.name for path in folder.iterdir()) == ["seed=0", "seed=1"]
    capsys.readouterr()
    summarize(folder)
    assert "±" in capsys.readouterr().out
    assert (folder / "figure.png").read_bytes().startswith(PNG)


def test_summary_of_nothing_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multirun"):
        summarize(tmp_path)
