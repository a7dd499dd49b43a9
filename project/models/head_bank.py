"""Many linear heads on the same rows, evaluated together: one matrix product computes the logits of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from project.models.lbfgs import Minimum, minimize
from project.task import Task

MAX_PASSES = 300
NO_FOLD = torch.iinfo(torch.int64).max  # for a head that trains on all rows: no row has this fold
MIN_VARIANCE = 1e-12  # relative to the second moment: rounding errors give smaller ones, so the feature is constant
LOGITS = 2**20  # logits to compute at once, so that they fit in a CPU's cache
STREAMED_ROWS = 4096  # rows to read at once


@dataclass(frozen=True)
class TrainingRows:
    """The training rows of this rank.

    Attributes:
        read: Returns the features of a slice, float32 ``(B, D)``, on the device.
        labels: int64 ``(N,)``, on the device.
        folds: Cross-validation fold of each row, int64 ``(N,)``, on the device; negative for rows that are never held
            out.
        targets: Maps labels ``(B,)`` to target weights ``(B, C)``, see :meth:`~project.task.Task.target_weights`.
        in_memory: Whether to keep scaled rows in memory. If not, each pass reads all features again.
        sum_over_ranks: Sums a tensor over the ranks, in place; ``None`` for a single process.
        from_rank_zero: Replaces a tensor by that of rank zero, in place; ``None`` for a single process.
    """

    read: Callable[[slice], torch.Tensor]
    labels: torch.Tensor
    folds: torch.Tensor
    targets: Callable[[torch.Tensor], torch.Tensor]
    in_memory: bool = True
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None
    from_rank_zero: Callable[[torch.Tensor], torch.Tensor] | None = None

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the ranks."""
        return tensor if self.sum_over_ranks is None else self.sum_over_ranks(tensor)

    def agree(self, condition: torch.Tensor) -> torch.Tensor:
        """Where a condition ``(K,)`` holds on all ranks. Rounding may differ between processors."""
        if self.sum_over_ranks is None:
            return condition
        holds, ranks = self.sum_over_ranks(torch.stack([condition.double(), torch.ones_like(condition).double()]))
        agreed: torch.Tensor = holds == ranks
        return agreed

    def slices(self, size: int) -> Iterator[slice]:
        """Consecutive slices of the rows; a single empty one if this rank has no rows."""
        for begin in range(0, max(len(self.labels), 1), size):
            yield slice(begin, min(begin + size, len(self.labels)))


class Coordinates:
    """Scaled features along their principal axes, with a constant appended for the bias.

    Each feature is divided by the square root of its standard deviation, and all by one number that makes the mean
    variance 1. Division by the standard deviation itself would give nearly constant features the same influence as all
    others, and no division too little. On pretrained features, the square root has the smallest held-out loss: see
    "Scaling of the features" in ``docs/performance.md``.

    Along the principal axes, a diagonal approximates the Hessian of a head well.

    Args:
        rows: The training rows.
        bias: Whether the heads have a bias. Without one, the features are scaled but not centered.
    """

    def __init__(self, rows: TrainingRows, bias: bool) -> None:
        self._rows, self._bias = rows, bias
        count, mean, second = self._moments()
        variance = (second - mean**2).clamp_min(0)
        deviation, varies = variance.sqrt(), variance > MIN_VARIANCE * second
        self._scale = (deviation * deviation[varies].mean()).sqrt().where(varies, 1.0).float()
        self._mean = (mean if bias else torch.zeros_like(mean)).float()
        self._matrix = self._scaled(slice(None)) if rows.in_memory else None
        basis = None
        if self._matrix is not None and len(self._matrix) == count < len(mean):
            basis = torch.linalg.qr(self._matrix.T).Q  # the span of the rows contains the solution
            self._matrix = self._matrix @ basis
        self._axes = _eigenvectors(self._second_moment() / count)
        if rows.from_rank_zero is not None:  # of equal eigenvalues, processors find different eigenvectors
            self._axes = rows.from_rank_zero(self._axes.contiguous())
        if self._matrix is not None:
            self._matrix = self._with_constant(self._matrix @ self._axes)
        if basis is not None:
            self._axes = basis @ self._axes

    def _moments(self) -> tuple[int, torch.Tensor, torch.Tensor]:
        """Number of rows on all ranks, and means of the features and of their squares, float64 ``(D,)``."""
        sums: list[torch.Tensor] = []
        for part in self._rows.slices(STREAMED_ROWS):
            features = self._rows.read(part).double()
            count = features.new_full(features.shape[1:], len(features))
            sums.append(torch.stack([count, features.sum(0), features.square().sum(0)]))
        count, first, second = self._rows.total(torch.stack(sums).sum(0))
        return int(count[0]), first / count, second / count

    def _second_moment(self) -> torch.Tensor:
        matrix, moment = self._matrix, torch.zeros(1, 1, device=self._mean.device)
        for part in self._rows.slices(STREAMED_ROWS):
            values: torch.Tensor = self._scaled(part) if matrix is None else matrix[part]
            moment = moment + values.T @ values
        return self._rows.total(moment)

    def _scaled(self, part: slice) -> torch.Tensor:
        return (self._rows.read(part) - self._mean) / self._scale

    def _with_constant(self, values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values, torch.ones_like(values[:, :1])], 1) if self._bias else values

    @property
    def penalized(self) -> torch.Tensor:
        """Whether the penalty applies to each parameter, bool ``(R,)``: not to the bias."""
        size = self._axes.shape[1]
        penalized: torch.Tensor = torch.arange(size + self._bias, device=self._axes.device) < size
        return penalized

    def along_axes(self, part: slice) -> torch.Tensor:
        """Coordinates of a slice ``(B, R)``."""
        if self._matrix is not None:
            return self._matrix[part]
        return self._with_constant(self._scaled(part) @ self._axes)

    def rows(self, part: slice) -> torch.Tensor:
        """Rows of a slice: their products with lifted parameters are the logits."""
        if self._matrix is not None:
            return self._matrix[part]
        return self._with_constant(self._scaled(part))

    def lift(self, parameters: torch.Tensor) -> torch.Tensor:
        """Parameters for coordinates ``(M, R)`` to those for :meth:`rows`. It is cheaper to rotate them than rows."""
        if self._matrix is not None:
            return parameters
        axes, size = self._axes.to(parameters.dtype), self._axes.shape[1]
        return torch.cat([parameters[:, :size] @ axes.T, parameters[:, size:]], 1)

    def lower(self, gradient: torch.Tensor) -> torch.Tensor:
        """The transpose of :meth:`lift`, for gradients."""
        if self._matrix is not None:
            return gradient
        axes, size = self._axes.to(gradient.dtype), self._axes.shape[1]
        return torch.cat([gradient[:, :size] @ axes, gradient[:, size:]], 1)

    def head(self, parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight ``(C, D)`` and bias ``(C,)`` of a linear layer, float32, given parameters ``(C, R)``."""
        exact = parameters.double()
        weight = exact[:, : self._axes.shape[1]] @ self._axes.double().T / self._scale.double()
        if not self._bias:
            return weight.float(), None
        return weight.float(), (exact[:, -1] - weight @ self._mean.double()).float()

    def parameters(self, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Parameters ``(C, R)`` of a linear layer: the inverse of :meth:`head`, within the span of the rows."""
        along = (weight * self._scale) @ self._axes
        return along if bias is None else torch.cat([along, (bias + weight @ self._mean)[:, None]], 1)


def _eigenvectors(matrix: torch.Tensor) -> torch.Tensor:
    """Eigenvectors of a symmetric matrix ``(R, R)``, as columns.

    Single precision may fail where many eigenvalues are equal, as with features that are always 0.
    """
    vectors: torch.Tensor
    try:
        _, vectors = torch.linalg.eigh(matrix)
    except RuntimeError:  # LinAlgError is one
        ridge = 1e-9 * torch.arange(len(matrix), dtype=torch.float64, device=matrix.device)
        _, vectors = torch.linalg.eigh(matrix.double() + ridge.diag())
    return vectors.to(matrix.dtype)


class HeadBank:
    """K linear heads of one set of rows. Their parameters are ``(K, C, R)``, see :class:`Coordinates`.

    Args:
        rows: The training rows.
        coordinates: Their coordinates.
        held_out: The fold that each head does not train on ``(K,)``; :data:`NO_FOLD` for none.
        task: Gives the loss.
        classes: Number C of classes.
    """

    def __init__(
        self, rows: TrainingRows, coordinates: Coordinates, held_out: torch.Tensor, task: Task, classes: int
    ) -> None:
        self._rows, self._coordinates, self._held_out = rows, coordinates, held_out
        self._task, self._classes = task, classes
        weights = [
            self._trains_on(part, held_out).T @ self._targets(part).sum(1) for part in rows.slices(STREAMED_ROWS)
        ]
        self._weight = rows.total(torch.stack(weights).sum(0))

    def zeros(self) -> torch.Tensor:
        """Parameters of heads that predict all classes with equal probability."""
        shape = (len(self._held_out), self._classes, len(self._coordinates.penalized))
        return torch.zeros(shape, device=self._held_out.device)

    def solve(self, start: torch.Tensor, penalty: float, tolerance: float) -> Minimum:
        """Minimize, for each head, the summed loss plus ``penalty / 2`` times the squared norm of its weights.

        The weights are those of scaled features, see :class:`Coordinates`; the bias is not penalized. This is
        scikit-learn's objective with ``C = 1 / penalty``.

        Args:
            start: Initial parameters ``(K, C, R)``.
            penalty: L2 penalty.
            tolerance: Relative tolerance of the objective.
        """
        strength, shape = self._strength(penalty), start.shape[1:]

        def objective(parameters: torch.Tensor, heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            value, gradient = self._objective(parameters.view(-1, *shape), heads, strength[heads])
            return value, gradient.flatten(1)

        curvature = (self._curvature(start) + strength).clamp_min(torch.finfo(start.dtype).eps)
        solution = minimize(objective, start.flatten(1), curvature.flatten(1), tolerance, MAX_PASSES, self._rows.agree)
        return solution._replace(parameters=solution.parameters.view_as(start))

    def gradient_norm(self, parameters: torch.Tensor, penalty: float) -> float:
        """Largest component of the gradient of the mean loss with its penalty, computed in float64."""
        heads = torch.arange(len(self._held_out), device=self._held_out.device)
        _, gradient = self._objective(parameters.double(), heads, self._strength(penalty).double())
        return float(gradient.abs().max())

    def held_out_scores(self, parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss and accuracy of each head on the fold that it does not train on, float64 ``(K,)``."""
        lifted = self._coordinates.lift(parameters.flatten(0, 1))
        sums = torch.zeros(3, len(self._held_out), dtype=torch.float64, device=parameters.device)
        for part in self._parts(len(lifted)):
            logits, targets = self._logits(self._coordinates.rows(part), lifted), self._targets(part)
            weight = targets.sum(1, keepdim=True)
            predicted = self._task.predict(logits.flatten(0, 1)).label.view(logits.shape[:2])
            correct = weight * (predicted == self._task.labels(self._rows.labels[part])[:, None])
            losses, _ = self._task.loss_and_gradient(logits, targets)
            scores = torch.stack([losses, correct, weight.expand_as(losses)])
            sums += (scores * (1 - self._trains_on(part, self._held_out))).sum(1, dtype=torch.float64)
        losses, correct, weight = self._rows.total(sums)
        return losses / weight, correct / weight

    def held_out_logits(self, parameters: torch.Tensor) -> torch.Tensor:
        """Logits of each row by the head that does not train on it, ``(N, C)``, where head k does not train on fold k.

        Those of rows that are never held out come from the first head.
        """
        lifted = self._coordinates.lift(parameters.flatten(0, 1))
        logits = torch.empty(len(self._rows.labels), self._classes, device=parameters.device)
        for part in self._parts(len(lifted)):
            of_all_heads = self._logits(self._coordinates.rows(part), lifted)
            head = self._rows.folds[part].clamp_min(0)
            logits[part] = of_all_heads[torch.arange(len(head), device=head.device), head]
        return logits

    def _objective(
        self, parameters: torch.Tensor, heads: torch.Tensor, strength: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss with penalty of some heads ``(K,)``, and its gradient ``(K, C, R)``."""
        lifted = self._coordinates.lift(parameters.flatten(0, 1))
        loss = torch.zeros(len(heads), dtype=torch.float64, device=parameters.device)
        gradient = torch.zeros_like(lifted)
        for part in self._parts(len(lifted)):
            rows, targets = (tensor.to(lifted.dtype) for tensor in (self._coordinates.rows(part), self._targets(part)))
            trains = self._trains_on(part, self._held_out[heads])
            losses, residuals = self._task.loss_and_gradient(self._logits(rows, lifted), targets)
            loss += (losses * trains).sum(0, dtype=torch.float64)
            gradient.addmm_(residuals.mul_(trains[..., None]).flatten(1).T, rows)
        total, weight = self._rows.total, self._weight[heads]
        gradient = total(self._coordinates.lower(gradient)).view_as(parameters) / weight[:, None, None]
        penalized = strength * parameters
        value = (total(loss) / weight).to(parameters.dtype) + (penalized * parameters).sum((1, 2)) / 2
        return value, gradient + penalized

    def _curvature(self, parameters: torch.Tensor) -> torch.Tensor:
        """Diagonal of the Hessian of each head's mean loss, ``(K, C, R)``."""
        curvature = torch.zeros_like(parameters.flatten(0, 1))
        lifted = self._coordinates.lift(parameters.flatten(0, 1))
        for part in self._parts(len(lifted)):
            logits = self._logits(self._coordinates.rows(part), lifted)
            second = self._task.curvature(logits, self._targets(part))
            second *= self._trains_on(part, self._held_out)[..., None]
            curvature.addmm_(second.flatten(1).T, self._coordinates.along_axes(part).square())
        return self._rows.total(curvature).view_as(parameters) / self._weight[:, None, None]

    def _strength(self, penalty: float) -> torch.Tensor:
        """Penalty of each parameter relative to the mean loss, ``(K, 1, R)``."""
        # scikit-learn has one vector for two classes, whose softmax has two of half its length.
        factor = penalty * (2 if self._classes == 2 else 1)
        return (self._coordinates.penalized * factor / self._weight[:, None])[:, None]

    def _targets(self, part: slice) -> torch.Tensor:
        return self._rows.targets(self._rows.labels[part])

    def _trains_on(self, part: slice, held_out: torch.Tensor) -> torch.Tensor:
        """1 where a head trains on a row, else 0: ``(B, K)``."""
        return (self._rows.folds[part, None] != held_out).float()

    def _logits(self, rows: torch.Tensor, lifted: torch.Tensor) -> torch.Tensor:
        """Logits of all heads ``(B, K, C)``."""
        return (rows @ lifted.T).view(len(rows), -1, self._classes)

    def _parts(self, width: int) -> Iterator[slice]:
        return self._rows.slices(max(LOGITS // width, 64) if self._rows.in_memory else STREAMED_ROWS)
