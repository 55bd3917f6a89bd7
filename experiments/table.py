"""Text tables."""

import statistics

from experiments.metrics import Record, by_method, incumbents


def format_table(runs: list[list[Record]]) -> str:
    """One row per method: the model with the lowest validation loss, and what finding it took.

    Args:
        runs: records of one run per seed; with several seeds cells read mean ± standard deviation.
    """
    header = ("method", "penalties", "validation loss", "test loss", "test accuracy", "inner solves", "seconds")
    methods = [by_method(run) for run in runs]
    return align([header, *(_row([groups[name] for groups in methods]) for name in methods[0])])


def align(rows: list[tuple[str, ...]]) -> str:
    """Rows of equal length as lines: a rule under the first, the first column to the left, all others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _row(runs: list[list[Record]]) -> tuple[str, ...]:
    best = [incumbents(records)[-1] for records in runs]
    return (
        best[0].label,
        str(best[0].num_penalties),
        mean_and_deviation([record.validation_loss for record in best], 4),
        mean_and_deviation([record.test_loss for record in best], 4),
        mean_and_deviation([record.test_accuracy for record in best], 4),
        str(len(runs[0])),
        mean_and_deviation([sum(record.seconds for record in records) for records in runs], 1),
    )


def mean_and_deviation(values: list[float], num_digits: int) -> str:
    """`mean ± standard deviation`, or the value if there is only one."""
    mean = f"{statistics.mean(values):.{num_digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{num_digits}f}"
