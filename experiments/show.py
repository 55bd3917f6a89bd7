"""Shows runs to a human: a table on the screen and in a file, and the figure."""

from pathlib import Path

from experiments.figure import draw_figure
from experiments.metrics import Record
from experiments.table import format_table


def show(runs: list[list[Record]], heading: str, folder: Path) -> None:
    """Prints the table and leaves `table.txt`, `heading` on its first line, and `figure.png` in `folder`."""
    text = f"{heading}\n\n{format_table(runs)}\n"
    (folder / "table.txt").write_text(text)
    draw_figure(runs, heading, folder / "figure.png")
    print(f"\n{text}")
