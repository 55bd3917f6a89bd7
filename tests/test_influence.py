"""Influence and removal against retraining without the examples: in closed form, and by Newton's method."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

import implicitgrad as ig
from implicitgrad import influence
from implicitgrad.influence import Influence
from implicitgrad.linalg import CG, MultiShiftCG

PENALTY = 1e-2


def linear(y: Tensor, X: Tensor) -> Tensor:
    return X @ y


def square(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().mean()


def penalty(y: Tensor) -> Tensor:
    return 0.5 * PENALTY * y.dot(y)


class Problem(NamedTuple):
    """A linear model with its loss, data, and how to train it on part of the data."""

    loss: Callable[[Tensor, Tensor], Tensor]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    minimise: Callable[[Tensor, Tensor], Tensor]

    def influence(self, **options: object) -> Influence:
        settings = {"regulariser": penalty, **options}
        return Influence(linear, self.loss, self.minimise(*self.train), self.train, **settings)

    def without(self, group: list[int]) -> Tensor:
        left = torch.ones(len(self.train[0]), dtype=torch.bool)
        left[group] = False
        return self.minimise(self.train[0][left], self.train[1][left])

    def test_losses(self, y: Tensor) -> Tensor:
        X, t = self.test
        return torch.stack([self.loss(linear(y, X[i : i + 1]), t[i : i + 1]) for i in range(len(t))])

    def effect(self, group: list[int]) -> Tensor:
        """Change of the test losses by retraining without the group."""
        return self.test_losses(self.without(group)) - self.test_losses(self.minimise(*self.train))


def fit_ridge(X: Tensor, t: Tensor) -> Tensor:
    return torch.linalg.solve(X.mT @ X / len(t) + PENALTY * torch.eye(X.shape[1]), X.mT @ t / len(t))


def fit_logistic(X: Tensor, t: Tensor) -> Tensor:
    """Newton's method in closed form; the full step descends on this problem from zero."""
    y = X.new_zeros(X.shape[1])
    for _ in range(12):
        p = torch.sigmoid(X @ y)
        slope = X.mT @ (p - t) / len(t) + PENALTY * y
        curvature = (X.mT * (p * (1 - p))) @ X / len(t) + PENALTY * torch.eye(X.shape[1])
        y = y - torch.linalg.solve(curvature, slope)
    assert torch.linalg.vector_norm(slope) < 1e-12
    return y


@pytest.fixture
def ridge() -> Problem:
    X, noise = torch.randn(40, 5), 0.3 * torch.randn(40)
    t = X @ torch.randn(5) + noise
    return Problem(square, (X[:30], t[:30]), (X[30:], t[30:]), fit_ridge)


@pytest.fixture
def cancer() -> Problem:
    features, labels = load_breast_cancer(return_X_y=True)
    X = torch.as_tensor(features)
    X = torch.cat([(X - X.mean(0)) / X.std(0), torch.ones(len(X), 1)], dim=1)
    t = torch.as_tensor(labels, dtype=torch.float64)
    order = torch.randperm(len(t))
    train, test = order[:455], order[455:]
    return Problem(binary_cross_entropy_with_logits, (X[train], t[train]), (X[test], t[test]), fit_logistic)


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.reshape(-1), b.reshape(-1)]))[0, 1].item()


# --- against retraining -----------------------------------------------------------------------------------------------


def test_scores_follow_leave_one_out_retraining_on_breast_cancer(cancer: Problem) -> None:
    sample = torch.randperm(455)[:60].tolist()
    exact = torch.stack([cancer.effect([i]) for i in sample], dim=1)
    scores = cancer.influence().scores(*cancer.test)[:, sample]
    assert scores.shape == (114, 60)
    assert correlation(scores, exact) > 0.99
    # not only in shape: the sign and the size are those of the retrained model, up to terms of second order
    assert torch.linalg.matrix_norm(scores - exact) < 0.2 * torch.linalg.matrix_norm(exact)
    assert correlation(scores.sum(0), exact.sum(0)) > 0.99


def test_group_effect_follows_retraining_without_groups(cancer: Problem) -> None:
    known = cancer.influence()
    groups = [torch.randperm(455)[:20].tolist() for _ in range(8)]
    exact = torch.stack([cancer.effect(group) for group in groups])
    predicted = torch.stack([known.group_effect(group, *cancer.test) for group in groups])
    assert correlation(predicted, exact) > 0.98
    newton = torch.stack([cancer.test_losses(known.remove(group)) for group in groups])
    step = newton - cancer.test_losses(known.params)
    assert torch.linalg.matrix_norm(step - exact) < 0.1 * torch.linalg.matrix_norm(exact)


def test_removal_is_exact_where_the_objective_is_quadratic(ridge: Problem) -> None:
    known = ridge.influence()
    for group in ([0], [3, 17, 4], list(range(20))):
        assert torch.linalg.vector_norm(known.remove(group) - ridge.without(group)) < 1e-12


def test_leave_one_out_scores_of_ridge_are_exact_but_for_the_leverage(ridge: Problem) -> None:
    """Without a penalty `y_i - y = H⁻¹∇loss_i / (N (1 - h_i))` with the leverage `h_i = x_iᵀH⁻¹x_i / N`."""
    (X, t), (X_test, t_test) = ridge.train, ridge.test
    y = torch.linalg.lstsq(X, t).solution
    inverse = torch.linalg.inv(X.mT @ X)
    leverage = ((X @ inverse) * X).sum(1)
    moved = inverse @ (X * (X @ y - t).unsqueeze(1)).mT / (1 - leverage)  # columns y_i - y, exact
    slopes = X_test * (X_test @ y - t_test).unsqueeze(1)
    scores = Influence(linear, square, y, ridge.train).scores(*ridge.test)
    torch.testing.assert_close(scores, slopes @ moved * (1 - leverage), rtol=1e-10, atol=1e-14)


def test_the_error_of_removal_is_quadratic_in_the_distance_moved(cancer: Problem) -> None:
    known = cancer.influence()
    order = torch.randperm(455)[:64].tolist()
    moved, error = [], []
    for size in (1, 4, 16, 64):
        exact = cancer.without(order[:size])
        moved.append(torch.linalg.vector_norm(exact - known.params))
        error.append(torch.linalg.vector_norm(known.remove(order[:size]) - exact))
    orders = torch.stack(error).log().diff() / torch.stack(moved).log().diff()
    assert (torch.stack(error) < 0.25 * torch.stack(moved)).all()
    # the constant in front differs from group to group, so the order is read off between the ends
    ends = (error[-1] / error[0]).log() / (moved[-1] / moved[0]).log()
    assert 1.7 < ends < 2.5, orders


def test_removal_also_takes_back_what_lacks_of_stationary(ridge: Problem) -> None:
    off = fit_ridge(*ridge.train) + 0.1
    known = Influence(linear, square, off, ridge.train, regulariser=penalty, on_unconverged="ignore")
    assert torch.linalg.vector_norm(known.remove([5, 6]) - ridge.without([5, 6])) < 1e-12


# --- against the formulas written out ---------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("numbers_per_block", [1000, 2**22])  # 32 examples at a time, or all
def test_scores_equal_the_dense_formula(
    cancer: Problem, monkeypatch: pytest.MonkeyPatch, curvature: str, damping: float, numbers_per_block: int
) -> None:
    monkeypatch.setattr(influence, "NUMBERS_PER_BLOCK", numbers_per_block)
    known = cancer.influence(curvature=curvature, damping=damping)
    y, (X, t), (X_test, t_test) = known.params, cancer.train, cancer.test
    p = torch.sigmoid(X @ y)
    H = (X.mT * (p * (1 - p))) @ X / 455 + (PENALTY + damping) * torch.eye(31)
    rows = X * (p - t).unsqueeze(1) + PENALTY * y
    test_rows = X_test * (torch.sigmoid(X_test @ y) - t_test).unsqueeze(1)
    want = test_rows @ torch.linalg.solve(H, rows.mT) / 455
    # Cholesky of a matrix of condition 1e3, so rounding is far below
    torch.testing.assert_close(known.scores(X_test, t_test), want, rtol=1e-9, atol=1e-13)
    itself = ((rows - PENALTY * y) * torch.linalg.solve(H, rows.mT).mT).sum(1) / 455
    torch.testing.assert_close(known.self_influence(), itself, rtol=1e-9, atol=1e-13)
    group = [400, 3, 77]
    torch.testing.assert_close(known.group_effect(group, X_test, t_test), want[:, group].sum(1), rtol=1e-9, atol=1e-13)


def test_gauss_newton_of_a_net_differs_from_its_hessian_and_equals_its_formula() -> None:
    X, t = torch.randn(12, 3), torch.randint(2, (12,))
    net = ig.functional(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)))
    params = net.parameters()
    flat, unravel = ig.tree.ravel(params)
    outputs = lambda v: net(unravel(v), X)
    J = torch.func.jacrev(outputs)(flat)  # (12, 2, n)
    p = torch.softmax(outputs(flat), 1)
    S = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    H = torch.einsum("nci,ncd,ndj->ij", J, S, J) / 12 + 0.1 * torch.eye(len(flat))
    rows = torch.func.jacrev(lambda v: cross_entropy(outputs(v), t, reduction="none"))(flat)
    known = Influence(
        net, cross_entropy, params, (X, t), curvature="gauss_newton", damping=0.1, on_unconverged="ignore"
    )
    torch.testing.assert_close(known.scores(X, t), rows @ torch.linalg.solve(H, rows.mT) / 12)
    exact = Influence(net, cross_entropy, params, (X, t), damping=0.1, on_unconverged="ignore")
    assert (exact.operator.to_dense() - known.operator.to_dense()).abs().max() > 1e-3


def test_trees_as_parameters_and_data_give_what_tensors_give(ridge: Problem) -> None:
    def model(params: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
        return inputs["a"] @ params["u"] + inputs["b"] @ params["v"]

    split = lambda X: {"b": X[:, 2:], "a": X[:, :2]}
    y = fit_ridge(*ridge.train)
    params = {"u": y[:2].requires_grad_(), "v": y[2:]}
    (X, t), (X_test, t_test) = ridge.train, ridge.test
    by_tree = Influence(
        model, square, params, (split(X), t), regulariser=lambda p: penalty(torch.cat([p["u"], p["v"]]))
    )
    torch.testing.assert_close(by_tree.scores(split(X_test), t_test), ridge.influence().scores(X_test, t_test))
    left = by_tree.remove(torch.arange(30) < 3)
    assert left.keys() == params.keys() and not left["u"].requires_grad
    torch.testing.assert_close(torch.cat([left["u"], left["v"]]), ridge.without([0, 1, 2]))


def test_iterative_and_direct_solves_agree(cancer: Problem) -> None:
    direct, iterative = cancer.influence(), cancer.influence(solver=CG())
    torch.testing.assert_close(iterative.scores(*cancer.test), direct.scores(*cancer.test), rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(iterative.remove([1, 2]), direct.remove([1, 2]), rtol=1e-6, atol=1e-10)


def test_a_model_that_vmap_cannot_batch_gives_the_same_scores(ridge: Problem) -> None:
    def model(y: Tensor, X: Tensor) -> Tensor:
        return X @ y if X.sum() < 1e9 else X.new_zeros(len(X))  # a branch on values

    by_one = Influence(model, square, fit_ridge(*ridge.train), ridge.train, regulariser=penalty)
    torch.testing.assert_close(by_one.scores(*ridge.test), ridge.influence().scores(*ridge.test))


def test_params_changed_in_place_afterwards_change_nothing(ridge: Problem) -> None:
    y = fit_ridge(*ridge.train)
    known = Influence(linear, square, y, ridge.train, regulariser=penalty)
    y.zero_()
    torch.testing.assert_close(known.remove([7]), ridge.without([7]))
    torch.testing.assert_close(known.scores(*ridge.test), ridge.influence().scores(*ridge.test))


def test_params_handed_out_are_copies(ridge: Problem) -> None:
    for params in (fit_ridge(*ridge.train), {"u": fit_ridge(*ridge.train)[:2], "v": fit_ridge(*ridge.train)[2:]}):
        model = linear if isinstance(params, Tensor) else lambda y, X: X @ torch.cat([y["u"], y["v"]])
        known = Influence(model, square, params, ridge.train, on_unconverged="ignore")
        before, left = known.scores(*ridge.test), ig.tree.ravel(known.remove([7]))[0]
        for leaf in ig.tree.leaves(known.params):
            leaf.zero_()
        assert torch.equal(known.scores(*ridge.test), before)
        assert torch.equal(ig.tree.ravel(known.remove([7]))[0], left)


def test_float32_stays_float32(ridge: Problem) -> None:
    y, X, t = fit_ridge(*ridge.train).float(), ridge.train[0].float(), ridge.train[1].float()
    scores = Influence(linear, square, y, (X, t), regulariser=penalty).scores(X, t)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), ridge.influence().scores(*ridge.train), rtol=1e-3, atol=1e-5)


# --- loud -------------------------------------------------------------------------------------------------------------


def test_report_holds_the_gradient_norm_and_every_solve(ridge: Problem) -> None:
    with ig.diagnostics() as log:
        known = ridge.influence()
        known.scores(*ridge.test)
        known.remove([1])
    assert log == [known.report] and known.report.converged
    assert [solve.kind for solve in known.report.solves] == ["adjoint", "tangent"]
    assert known.report.solves[0].right_hand_sides == 10
    off = known.params + 0.01
    moved = Influence(linear, square, off, ridge.train, regulariser=penalty, on_unconverged="ignore").report
    X, t = ridge.train
    slope = X.mT @ (X @ off - t) / 30 + PENALTY * off
    assert moved.inner_residual == pytest.approx(torch.linalg.vector_norm(slope).item())
    assert not moved.inner_converged


def test_params_that_are_not_stationary_and_solves_that_do_not_converge_warn_where_called(ridge: Problem) -> None:
    off = fit_ridge(*ridge.train) + 0.1
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        Influence(linear, square, off, ridge.train, regulariser=penalty)  # off
        ridge.influence(solver=CG(max_iter=1)).scores(*ridge.test)  # short
    lines = Path(__file__).read_text().splitlines()
    marked = [next(i for i, text in enumerate(lines, 1) if text.endswith(mark)) for mark in ("# off", "# short")]
    assert [(message.lineno, message.category) for message in messages] == [
        (marked[0], ig.ConvergenceWarning),
        (marked[1], ig.ConvergenceWarning),
    ]
    with pytest.raises(ig.ConvergenceError, match="training objective"):
        Influence(linear, square, off, ridge.train, regulariser=penalty, on_unconverged="raise")
    with pytest.raises(ig.ConvergenceError, match="tangent"):
        ridge.influence(solver=CG(max_iter=1), on_unconverged="raise").remove([0])


def test_a_loss_that_is_no_mean_of_single_losses_is_refused(ridge: Problem) -> None:
    total = lambda outputs, targets: square(outputs, targets) * len(targets)
    with pytest.raises(ValueError, match="mean over examples"):
        Influence(linear, total, fit_ridge(*ridge.train), ridge.train)
    weighted = lambda outputs, targets: cross_entropy(outputs, targets, weight=torch.tensor([1.0, 5.0]))
    X, t = torch.randn(12, 3), torch.arange(12) % 2
    net = ig.functional(nn.Linear(3, 2))
    zeros = {name: torch.zeros_like(value) for name, value in net.parameters().items()}
    for params in (net.parameters(), zeros):  # at zero every label has the same loss, but not the same slope
        with pytest.raises(ValueError, match="class weights"):
            Influence(net, weighted, params, (X, t), on_unconverged="ignore")
    t[::5] = -100
    with pytest.raises(ValueError, match="ignored labels"):
        Influence(net, cross_entropy, net.parameters(), (X, t), on_unconverged="ignore")


def test_outputs_that_are_trees_are_checked_too() -> None:
    X, t = torch.randn(12, 3), torch.randn(12)
    model = lambda y, X: {"mean": X @ y, "size": X.square().sum(1)}
    loss = lambda outputs, targets: (outputs["mean"] - targets).square().mean()
    y = torch.linalg.lstsq(X, t).solution
    flat = Influence(linear, lambda outputs, targets: (outputs - targets).square().mean(), y, (X, t))
    torch.testing.assert_close(Influence(model, loss, y, (X, t)).scores(X, t), flat.scores(X, t))
    with pytest.raises(ValueError, match="mean over examples"):
        Influence(model, lambda outputs, targets: len(targets) * loss(outputs, targets), y, (X, t))
    with pytest.raises(ValueError, match=r"net\.eval\(\)"):
        Influence(lambda y, X: model(y, X - X.mean(0)), loss, y, (X, t))


@pytest.mark.parametrize("layer", [nn.Dropout(), nn.BatchNorm2d(3)], ids=["dropout", "batch normalisation"])
def test_a_model_whose_examples_depend_on_each_other_is_refused_in_training_mode_only(layer: nn.Module) -> None:
    X, t = torch.randn(12, 3, 2, 2), torch.arange(12) % 2
    net = nn.Sequential(layer.double(), nn.Flatten(), nn.Linear(12, 2))
    params = ig.functional(net).parameters()

    def scores() -> Tensor:
        net_fn = ig.functional(net)
        return Influence(net_fn, cross_entropy, params, (X, t), damping=1.0, on_unconverged="ignore").scores(X, t)

    with pytest.raises(ValueError, match=r"net\.eval\(\)"):
        scores()
    net.eval()
    assert scores().isfinite().all()


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([], ValueError, "1 to 29 of 30"),
        (list(range(30)), ValueError, "1 to 29 of 30"),
        ([1, 30], ValueError, "0 to 29"),
        ([-1], ValueError, "0 to 29"),
        ([4, 4], ValueError, "different"),
        ([0.0, 1.0], TypeError, "integers"),
        ([True, False], TypeError, "mask"),
        ([[1, 2]], TypeError, "one dimension"),
    ],
)
def test_refuses_indices_that_name_no_proper_group(
    ridge: Problem, indices: list, error: type[Exception], message: str
) -> None:
    known = ridge.influence()
    with pytest.raises(error, match=message):
        known.remove(indices)
    with pytest.raises(error, match=message):
        known.group_effect(indices, *ridge.test)


def test_refuses_bad_options_and_data(ridge: Problem) -> None:
    y, (X, t) = fit_ridge(*ridge.train), ridge.train
    make = lambda train, **options: Influence(linear, square, y, train, **options)
    with pytest.raises(ValueError, match="curvature"):
        make((X, t), curvature="fisher")
    with pytest.raises(ValueError, match="damping"):
        make((X, t), damping=-1.0)
    with pytest.raises(ValueError, match="on_unconverged"):
        make((X, t), on_unconverged="shout")
    with pytest.raises(TypeError, match="pair"):
        make(X)
    with pytest.raises(ValueError, match="one number of examples"):
        make((X, t[1:]))
    with pytest.raises(TypeError, match="tensors"):
        make((X, 3.0))
    with pytest.raises(TypeError, match="dtype"):
        Influence(linear, square, torch.arange(5), ridge.train)
    for solver in ("cg", CG, MultiShiftCG((0.0,))):
        with pytest.raises(TypeError, match=r"solver must be a LinearSolver like CG\(\), got"):
            make((X, t), solver=solver)
    with pytest.raises(FloatingPointError, match="derivative of the loss in the outputs"):
        make((X, torch.full_like(t, float("nan"))))
    with pytest.raises(ValueError, match="scalar"):
        Influence(linear, lambda outputs, targets: outputs - targets, y, ridge.train)
