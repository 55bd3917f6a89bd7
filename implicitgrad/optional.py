"""The one door for packages that `import implicitgrad` does not need."""

import importlib
from types import ModuleType


def require(name: str, extra: str) -> ModuleType:
    """The module `name`, of a package that the extra `extra` installs.

    Raises:
        ImportError: it is not installed; says how to get it.

    Example:
        >>> require("cvxpyy", extra="cvxpy")
        Traceback (most recent call last):
        ImportError: cvxpyy is not installed; get it with: pip install "implicitgrad[cvxpy]"
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != name.split(".")[0]:
            raise  # installed, but something that it needs is not
        raise ImportError(f'{name} is not installed; get it with: pip install "implicitgrad[{extra}]"') from None
