"""What custom autograd functions of projections have to refuse."""

from implicitgrad import internals


def refuse_nested_forward_mode() -> None:
    """Raise where torch drops a term of custom autograd functions.

    Raises:
        NotImplementedError: inside two nested forward-mode transforms.
    """
    if internals.num_forward_transforms() > 1:
        raise NotImplementedError(
            "forward mode over forward mode (jacfwd of jacfwd, jvp of jvp) is silently wrong through custom autograd "
            "functions in torch; use torch.func.hessian or jacfwd(jacrev(...))"
        )
