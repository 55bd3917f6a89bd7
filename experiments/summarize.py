"""Means over seeds: `python -m experiments.summarize outputs/breast_cancer` after a `--multirun seed=0,1,2`."""

import argparse
from pathlib import Path

from experiments.metrics import read_records
from experiments.show import show


def main() -> None:
    """Shows the mean of all finished runs below a folder, and leaves table and figure in that folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds one folder per seed")
    summarize(parser.parse_args().folder)


def summarize(folder: Path) -> None:
    """The table and figure of the runs in the folders directly below `folder`.

    Raises:
        ValueError: there is no finished run, or the runs are of different data or lengths.
    """
    finished = sorted(folder.glob("*/table.txt"))
    headings = {path.read_text().splitlines()[0] for path in finished}
    runs = [read_records(path.with_name("metrics.jsonl")) for path in finished]
    lengths = {len(run) for run in runs}
    if len(headings) != 1 or len(lengths) != 1:
        raise ValueError(
            f"{folder} should hold finished runs of one kind, one folder per seed; found data {sorted(headings)} "
            f"and numbers of records {sorted(lengths)}. Run python -m experiments.run --multirun seed=0,1,2 first."
        )
    show(runs, headings.pop(), folder)


if __name__ == "__main__":
    main()
