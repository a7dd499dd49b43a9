"""The solved head is that of scikit-learn on scaled features, with the penalty of the smallest held-out loss."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch.nn import functional

from project.models import head_solver
from project.models.head_bank import Coordinates, HeadBank, TrainingRows
from project.models.head_solver import HeadSolution, solve_head, solver_device, standard_error
from project.task import SingleLabel

FOLDS = 5
TASK = SingleLabel()


def training_rows(
    features: np.ndarray,
    labels: np.ndarray,
    in_memory: bool = True,
    weights: torch.Tensor | None = None,
    smoothing: float = 0.0,
) -> TrainingRows:
    x, y, classes = torch.tensor(features, dtype=torch.float32), torch.tensor(labels), int(labels.max()) + 1

    def targets(part: torch.Tensor) -> torch.Tensor:
        return TASK.target_weights(part, classes, weights, smoothing)

    return TrainingRows(lambda part: x[part], y, torch.arange(len(y)) % FOLDS, targets, in_memory)


def data(rows: int, features: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    x, y = make_classification(
        rows,
        features,
        n_informative=min(features, 12),
        n_redundant=0,
        n_classes=classes,
        n_clusters_per_class=1,
        flip_y=0.1,
        random_state=seed,
    )
    scale = np.random.default_rng(seed).uniform(0.1, 10, features)
    return x * scale + scale, y  # features of different means and scales


def scaled(x: np.ndarray, centered: bool = True) -> np.ndarray:
    """Features as :class:`~project.models.head_bank.Coordinates` scales them."""
    deviation = x.std(0)
    return (x - x.mean(0) * centered) / np.sqrt(deviation * deviation.mean())


def reference(x: np.ndarray, y: np.ndarray, penalty: float, bias: bool = True, **options: object) -> LogisticRegression:
    model = LogisticRegression(C=1 / penalty, fit_intercept=bias, tol=1e-10, max_iter=20_000, **options)
    return model.fit(scaled(x, bias), y)


def probabilities(solution: HeadSolution, x: np.ndarray) -> np.ndarray:
    return functional.linear(torch.tensor(x, dtype=torch.float32), solution.weight, solution.bias).softmax(1).numpy()


@pytest.mark.parametrize("in_memory", [True, False], ids=["in memory", "streamed"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    ("rows", "features", "classes"), [(600, 20, 4), (150, 300, 3), (200, 9, 2)], ids=["tall", "wide", "binary"]
)
def test_equals_scikit_learn(rows: int, features: int, classes: int, bias: bool, in_memory: bool) -> None:
    x, y = data(rows, features, classes)
    solution = solve_head(training_rows(x, y, in_memory), TASK, classes, FOLDS, bias)
    model = reference(x, y, solution.penalty, bias)
    expected = model.predict_proba(scaled(x, bias))
    assert solution.converged
    assert solution.gradient_norm < (1e-4 if bias else 3e-4)  # features that are not centered are larger
    assert (solution.bias is not None) is bias
    np.testing.assert_allclose(probabilities(solution, x), expected, atol=2e-3)
    assert log_loss(y, probabilities(solution, x)) == pytest.approx(log_loss(y, expected), rel=2e-3)


def test_held_out_scores_equal_those_of_scikit_learn() -> None:
    x, y = data(500, 20, 3)
    solution = solve_head(training_rows(x, y), TASK, 3, FOLDS)
    fold = np.arange(len(y)) % FOLDS
    features = scaled(x)
    for score in solution.scores[4::3]:
        for number in range(FOLDS):
            train, held_out = fold != number, fold == number
            model = LogisticRegression(C=1 / score.penalty, tol=1e-8, max_iter=10_000).fit(features[train], y[train])
            predicted = model.predict_proba(features[held_out])
            assert float(score.losses[number]) == pytest.approx(log_loss(y[held_out], predicted), rel=0.01)
            assert float(score.accuracies[number]) == pytest.approx(
                (predicted.argmax(1) == y[held_out]).mean(), abs=0.011
            )


def test_the_penalty_has_the_smallest_held_out_loss() -> None:
    x, y = load_digits(return_X_y=True)
    progress: list[tuple[int, int]] = []
    solution = solve_head(
        training_rows(x, y), TASK, 10, FOLDS, on_progress=lambda done, total: progress.append((done, total))
    )
    assert [done for done, _ in progress] == [*range(1, len(solution.scores) + 2)]
    assert progress[-1][0] == progress[-1][1]
    losses = [score.loss for score in solution.scores]
    assert solution.chosen.loss == min(losses)
    assert solution.penalty == solution.chosen.penalty
    assert solution.chosen not in (solution.scores[0], solution.scores[-1])
    penalties = [score.penalty for score in solution.scores]
    assert penalties == sorted(penalties, reverse=True)
    assert len(penalties) >= 10 and penalties[0] / penalties[9] == pytest.approx(1e5)


def test_one_standard_error_takes_a_stronger_penalty() -> None:
    x, y = data(80, 50, 3, seed=3)
    best = solve_head(training_rows(x, y), TASK, 3, FOLDS)
    rule = solve_head(training_rows(x, y), TASK, 3, FOLDS, one_standard_error=True)
    assert rule.chosen.penalty > best.chosen.penalty
    assert rule.chosen.loss <= best.chosen.loss + standard_error(best.chosen.losses)


@pytest.mark.parametrize("noise", [0.01, 1000], ids=["nearly separable", "labels of noise"])
def test_penalties_are_added_while_the_best_one_is_at_the_end(noise: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 2 if noise < 1 else 200))
    y = (x[:, 0] + rng.normal(size=1000) * noise > 0).astype(int)
    solution = solve_head(training_rows(x, y), TASK, 2, FOLDS)
    assert len(solution.scores) > 10
    outermost = solution.scores[-1 if noise < 1 else 0]
    assert outermost.loss > solution.chosen.loss - head_solver.MIN_GAIN


def test_no_penalties_are_added_where_all_losses_are_negligible() -> None:
    y = np.arange(200) % 2
    x = np.random.default_rng(0).normal(size=(200, 3)) + 100 * y[:, None]
    assert len(solve_head(training_rows(x, y), TASK, 2, FOLDS).scores) <= 11


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, [1.0, 0.2, 3.0]])
def test_class_weights_and_label_smoothing_are_those_of_the_training_loss(
    smoothing: float, weights: list[float] | None
) -> None:
    x, y = data(300, 10, 3)
    class_weights = None if weights is None else torch.tensor(weights)
    solution = solve_head(training_rows(x, y, weights=class_weights, smoothing=smoothing), TASK, 3, FOLDS)
    assert solution.bias is not None
    features, labels = torch.tensor(x), torch.tensor(y)
    std = torch.from_numpy((x - x.mean(0)).std(0) / scaled(x).std(0))
    weight = (solution.weight * std).double().requires_grad_()
    bias = (solution.bias + solution.weight @ features.mean(0).float()).double().requires_grad_()
    logits = functional.linear((features - features.mean(0)) / std, weight, bias)
    loss, _ = TASK.loss(logits, labels, None if weights is None else class_weights.double(), smoothing)
    (loss + solution.penalty / 2 * weight.square().sum()).backward()
    assert weight.grad is not None and bias.grad is not None
    assert float(weight.grad.abs().max()) / len(y) < 5e-5
    assert float(bias.grad.abs().max()) / len(y) < 5e-5


def test_ranks_sum_their_gradients() -> None:
    """Two ranks with half of the rows each: one thread each, whose sums wait for each other."""
    import threading

    x, y = data(401, 12, 3)
    barrier, slots = threading.Barrier(2), [torch.empty(0), torch.empty(0)]

    def total(rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def add(tensor: torch.Tensor) -> torch.Tensor:
            slots[rank] = tensor
            barrier.wait(60)
            result = slots[0] + slots[1]
            barrier.wait(60)
            return result

        return add

    solutions: dict[int, HeadSolution] = {}

    def run(rank: int) -> None:
        whole = training_rows(x, y)
        part = slice(0, 150) if rank == 0 else slice(150, 401)
        features = torch.tensor(x, dtype=torch.float32)[part]
        rows = TrainingRows(
            lambda inner: features[inner],
            whole.labels[part],
            whole.folds[part],
            whole.targets,
            sum_over_ranks=total(rank),
        )
        solutions[rank] = solve_head(rows, TASK, 3, FOLDS)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    alone = solve_head(training_rows(x, y), TASK, 3, FOLDS)
    assert torch.equal(solutions[0].weight, solutions[1].weight)
    assert solutions[0].penalty == alone.penalty
    torch.testing.assert_close(solutions[0].weight, alone.weight, atol=1e-3, rtol=1e-2)


def test_a_sample_chooses_the_penalty_and_all_rows_give_the_head() -> None:
    x, y = data(800, 15, 3)
    solution = solve_head(training_rows(x, y, in_memory=False), TASK, 3, FOLDS, sample=training_rows(x[::2], y[::2]))
    sampled = solve_head(training_rows(x[::2], y[::2]), TASK, 3, FOLDS)
    assert solution.penalty == sampled.penalty
    expected = reference(x, y, solution.penalty).predict_proba(scaled(x))
    np.testing.assert_allclose(probabilities(solution, x), expected, atol=2e-3)


def test_constant_features_get_no_weight() -> None:
    x, y = data(200, 6, 2)
    x[:, 3] = 7.5
    solution = solve_head(training_rows(x, y), TASK, 2, FOLDS)
    assert float(solution.weight[:, 3].abs().max()) < 1e-6
    assert solution.weight.isfinite().all()


def test_constant_features_do_not_change_the_scale_of_the_others() -> None:
    """Their variances are rounding errors, which would lower the mean deviation."""
    x, y = data(20, 6, 2)
    rng = np.random.default_rng(0)
    constant = rng.uniform(100, 1000, 40) * (1 + 1e-7 * rng.normal(size=(20, 40)))
    alone, together = (
        solve_head(training_rows(features, y), TASK, 2, FOLDS) for features in (x, np.hstack([x, constant]))
    )
    assert together.penalty == alone.penalty
    torch.testing.assert_close(together.weight[:, :6], alone.weight, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("rows", [60, 500])
def test_features_that_are_always_0(rows: int, in_memory: bool) -> None:
    """The second moment of such features has many equal eigenvalues."""
    x, y = data(rows, 300, 2)
    x[:, ::2] = 0
    solution = solve_head(training_rows(x, y, in_memory), TASK, 2, FOLDS)
    assert solution.converged
    assert float(solution.weight[:, ::2].abs().max()) < 1e-6


def test_eigenvectors_in_double_precision_where_single_precision_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    eigh = torch.linalg.eigh

    def fail(matrix: torch.Tensor) -> object:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("failed to converge")
        return eigh(matrix)

    x, y = data(300, 10, 3)
    expected = solve_head(training_rows(x, y), TASK, 3, FOLDS)
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    actual = solve_head(training_rows(x, y), TASK, 3, FOLDS)
    torch.testing.assert_close(actual.weight, expected.weight, atol=1e-3, rtol=0.02)


def test_a_rank_without_rows() -> None:
    x, y = data(50, 4, 2)
    whole = training_rows(x, y)
    empty = TrainingRows(
        lambda part: torch.zeros(0, 4), whole.labels[:0], whole.folds[:0], whole.targets, True, lambda tensor: tensor
    )
    assert [*empty.slices(10)] == [slice(0, 0)]


def test_a_fold_without_weight_does_not_count() -> None:
    x, y = data(100, 6, 2)
    rows = training_rows(x, y, weights=torch.tensor([1.0, 0.0]))
    folds = torch.tensor(y) * torch.arange(100).remainder(2) + torch.arange(100).remainder(2)
    rows = replace(rows, folds=torch.where(torch.tensor(y) == 1, 2, folds.remainder(2)))
    solution = solve_head(rows, TASK, 2, 3)
    assert solution.chosen.losses[2].isnan()
    assert np.isfinite(solution.chosen.loss)


def test_a_class_that_a_fold_does_not_train_on() -> None:
    x, y = data(100, 6, 2)
    y[7] = 2
    solution = solve_head(training_rows(x, y), TASK, 3, FOLDS)
    assert solution.weight.isfinite().all()
    assert all(score.losses.isfinite().all() for score in solution.scores)


def test_without_folds_the_penalty_is_fixed() -> None:
    x, y = data(40, 300, 3)
    rows = replace(training_rows(x, y), folds=torch.full((40,), -1))
    solution = solve_head(rows, TASK, 3, 0)
    assert solution.scores == [] and solution.chosen is None and solution.penalty == head_solver.FIXED_PENALTY
    assert solution.converged
    expected = reference(x, y, head_solver.FIXED_PENALTY).predict_proba(scaled(x))
    np.testing.assert_allclose(probabilities(solution, x), expected, atol=2e-3)


def test_rows_that_are_never_held_out_train_all_heads() -> None:
    """The only row of a class would be wrong with every penalty in the fold that does not train on it."""
    x, y = data(101, 6, 2)
    y[100] = 2
    rows = training_rows(x, y)
    never = torch.where(rows.labels == 2, -1, rows.folds)
    held_out, trained = (solve_head(replace(rows, folds=folds), TASK, 3, FOLDS) for folds in (rows.folds, never))
    assert trained.chosen.losses[0] < held_out.chosen.losses[0] - 0.1
    torch.testing.assert_close(trained.chosen.losses[1:], held_out.chosen.losses[1:], atol=0.05, rtol=0.1)


def test_few_rows_are_not_scaled_by_their_own_deviations() -> None:
    """Of features that are mostly 0, those that are not in a few rows would otherwise dominate."""
    rng = np.random.default_rng(0)
    y = np.arange(210) % 2
    x = (rng.random((210, 400)) < 0.05) * 0.1 * rng.random((210, 400))
    x[:, :5] = 2 * y[:, None] + rng.normal(size=(210, 5))
    solution = solve_head(training_rows(x[:10], y[:10]), TASK, 2, FOLDS)
    assert (probabilities(solution, x[10:]).argmax(1) == y[10:]).mean() > 0.9


def test_heads_are_solved_on_the_device_of_the_features_if_it_has_float64() -> None:
    for name, expected in (("cpu", "cpu"), ("cuda:1", "cuda:1"), ("mps", "cpu")):
        assert solver_device(torch.device(name)) == torch.device(expected)


def test_it_is_deterministic() -> None:
    x, y = data(300, 30, 4)
    first, second = (solve_head(training_rows(x, y), TASK, 4, FOLDS) for _ in range(2))
    assert torch.equal(first.weight, second.weight)


def test_a_solution_that_has_not_converged_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("project.models.head_bank.MAX_PASSES", 3)
    x, y = data(300, 30, 4)
    assert not solve_head(training_rows(x, y), TASK, 4, FOLDS).converged


def test_parameters_invert_head() -> None:
    x, y = data(300, 10, 3)
    coordinates = Coordinates(training_rows(x, y), bias=True)
    parameters = torch.randn(3, 11, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(coordinates.parameters(*coordinates.head(parameters)), parameters, atol=1e-4, rtol=1e-4)


def test_heads_of_a_bank_are_independent() -> None:
    x, y = data(300, 10, 3)
    rows = training_rows(x, y)
    coordinates = Coordinates(rows, bias=True)
    together = HeadBank(rows, coordinates, torch.tensor([0, 3, -1]), TASK, 3)
    solved = together.solve(together.zeros(), 1.0, 1e-7).parameters
    for index, fold in enumerate([0, 3, -1]):
        alone = HeadBank(rows, coordinates, torch.tensor([fold]), TASK, 3)
        expected = alone.solve(alone.zeros(), 1.0, 1e-7).parameters
        torch.testing.assert_close(solved[index], expected[0], atol=2e-3, rtol=1e-2)
    assert not any(torch.allclose(solved[a], solved[b], atol=1e-3) for a, b in itertools.combinations(range(3), 2))


def test_a_feature_of_a_large_scale_does_not_dominate_the_head_of_few_images() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(3).repeat(305)
    x = torch.randn(len(y), 200, generator=generator) + torch.randn(3, 200, generator=generator)[y] / 4
    x[:, 0] *= 30  # raw features: accuracy 0.70
    solution = solve_head(training_rows(x[:15].numpy(), y[:15].numpy()), TASK, 3, FOLDS)
    predicted = functional.linear(x[15:], solution.weight, solution.bias).argmax(1)
    assert float((predicted == y[15:]).float().mean()) > 0.72


@pytest.mark.parametrize("in_memory", [True, False], ids=["in memory", "streamed"])
def test_out_of_fold_logits_are_those_of_heads_without_the_row(in_memory: bool) -> None:
    x, y = data(500, 20, 3)
    solution = solve_head(training_rows(x, y, in_memory), TASK, 3, FOLDS, out_of_fold=True)
    assert solution.out_of_fold is not None
    actual, fold = solution.out_of_fold.softmax(1).numpy(), np.arange(len(y)) % FOLDS
    for number in range(FOLDS):
        model = LogisticRegression(C=1 / solution.penalty, tol=1e-8, max_iter=10_000)
        model.fit(scaled(x)[fold != number], y[fold != number])
        # Coordinates are scaled by all rows, those of the fold included.
        expected = model.predict_proba(scaled(x)[fold == number])
        np.testing.assert_allclose(actual[fold == number], expected, atol=0.02)


def test_out_of_fold_logits_are_computed_only_if_requested_and_possible() -> None:
    x, y = data(60, 10, 3)
    rows = training_rows(x, y)
    assert solve_head(rows, TASK, 3, FOLDS).out_of_fold is None
    assert solve_head(rows, TASK, 3, 0, out_of_fold=True).out_of_fold is None
    assert solve_head(rows, TASK, 3, FOLDS, sample=rows, out_of_fold=True).out_of_fold is None
