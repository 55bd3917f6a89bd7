"""Every Python example in the README and in docs/ runs as it stands."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
EXAMPLES = [
    pytest.param(code, id=f"{file.name}-{number}")
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", file.read_text(), re.DOTALL), 1)
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code: str) -> None:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # what a reader has
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, "example", "exec"), {"__name__": "example"})
    finally:
        torch.set_default_dtype(dtype)


def test_readme_has_its_sections_in_order() -> None:
    readme = (ROOT / "README.md").read_text()
    headings = re.findall(r"^## (.*)$", readme, re.MULTILINE)
    assert headings == ["Two commands", "An example", "What is different", "Map of the code", "Methods"]
