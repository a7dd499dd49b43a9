"""L-BFGS for many convex problems at once (Liu and Nocedal, "On the limited memory BFGS method", 1989).

The two-loop recursion runs on inner products, so that an iteration reads the stored steps twice, in two matrix products
(Chen et al., "Large-scale L-BFGS using MapReduce", 2014).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

HISTORY = 8  # steps and gradient changes that approximate the inverse Hessian
SUFFICIENT_DECREASE = 1e-4  # Armijo's constant
PATIENCE = 10  # passes without a decrease that exceeds rounding errors
#: Values of K problems ``(K,)`` and their gradients ``(K, P)``, given their parameters ``(K, P)`` and numbers ``(K,)``.
Objective = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Minimum(NamedTuple):
    """Result of :func:`minimize`.

    Attributes:
        parameters: ``(K, P)``.
        passes: Number of evaluations of the objective.
        converged: Whether each problem has converged, bool ``(K,)``.
    """

    parameters: torch.Tensor
    passes: int
    converged: torch.Tensor


def minimize(
    objective: Objective,
    start: torch.Tensor,
    curvature: torch.Tensor,
    tolerance: float,
    max_passes: int,
    agree: Callable[[torch.Tensor], torch.Tensor] = lambda condition: condition,
) -> Minimum:
    """Minimize K independent convex functions. Each pass evaluates all that have not converged.

    A problem has converged if the decrease that a preconditioned gradient step predicts is at most ``tolerance`` times
    its value, or if rounding errors hide any decrease.

    Args:
        objective: Evaluates problems.
        start: Initial parameters ``(K, P)``.
        curvature: Approximate diagonal of the Hessians ``(K, P)``, positive: the preconditioner.
        tolerance: Relative tolerance of the value.
        max_passes: Maximum number of evaluations.
        agree: Where a condition ``(K,)`` holds on all ranks, so that all of them take the same steps.
    """
    count, size = start.shape
    unit = curvature.rsqrt()  # in these units, the Hessian has about the same diagonal everywhere
    rounding = 4 * torch.finfo(start.dtype).eps
    result, problems = start.clone(), torch.arange(count, device=start.device)
    converged = torch.zeros(count, dtype=torch.bool, device=start.device)
    # Steps, changes of the gradient, and last the gradient.
    vectors = start.new_zeros(count, 2 * HISTORY + 1, size)
    x, (value, gradient) = start, objective(start, problems)
    vectors[:, -1] = gradient * unit
    step, scale, stalled = torch.ones_like(value), torch.ones_like(value), torch.zeros_like(value)
    for passes in range(1, max_passes + 1):
        products = vectors @ vectors.mT
        done = products[:, -1, -1] * scale / 2 <= tolerance * value
        done = agree(done | (stalled >= PATIENCE))
        if done.any():
            result[problems[done]] = x[done]
            converged[problems[done]] = True
            if done.all():
                return Minimum(result, passes, converged)
            problems, x, unit, value, step, scale, stalled, vectors, products = (
                item[~done] for item in (problems, x, unit, value, step, scale, stalled, vectors, products)
            )
        newest = (passes - 2) % HISTORY
        weights = _direction(products, scale, newest)
        move = (weights[:, None] @ vectors)[:, 0] * step[:, None]
        trial = x + move * unit
        new_value, new_gradient = objective(trial, problems)
        slope = (weights * products[:, -1]).sum(1)
        accepted = agree(new_value <= value + SUFFICIENT_DECREASE * step * slope + rounding * value.abs())
        stalled = torch.where(new_value < value - rounding * value.abs(), 0, stalled + 1)
        # A rejected step is stored as zeros, which have no effect.
        oldest, mask = (newest + 1) % HISTORY, accepted[:, None]
        change = torch.where(mask, new_gradient * unit - vectors[:, -1], 0)
        vectors[:, oldest] = torch.where(mask, move, 0)
        vectors[:, HISTORY + oldest] = change
        vectors[:, -1] += change
        along, squared = (vectors[:, oldest] * change).sum(1), change.square().sum(1)
        scale = torch.where(along > 0, along / squared.clamp_min(torch.finfo(x.dtype).tiny), scale)
        x, value = torch.where(mask, trial, x), torch.where(accepted, new_value, value)
        step = torch.where(accepted, torch.ones_like(step), step / 4)
    result[problems] = x
    return Minimum(result, max_passes, converged)


def _direction(products: torch.Tensor, scale: torch.Tensor, newest: int) -> torch.Tensor:
    """The two-loop recursion.

    Args:
        products: Inner products of the stored vectors ``(K, 2 H + 1, 2 H + 1)``.
        scale: Initial inverse Hessian of each problem ``(K,)``.
        newest: Index of the latest step.

    Returns:
        Weights of the vectors ``(K, 2 H + 1)`` whose sum is the negative inverse Hessian times the gradient.
    """
    weights, factors = torch.zeros_like(products[:, 0]), []
    weights[:, -1] = -1
    order = [(newest - age) % HISTORY for age in range(HISTORY)]
    curved = products[:, :HISTORY, HISTORY:-1].diagonal(dim1=1, dim2=2)
    inverse = torch.where(curved > 0, 1 / curved, 0)
    for index in order:
        factor = inverse[:, index] * (weights * products[:, index]).sum(1)
        weights[:, HISTORY + index] -= factor
        factors.append(factor)
    weights *= scale[:, None]
    for index, factor in zip(reversed(order), reversed(factors), strict=True):
        weights[:, index] += factor - inverse[:, index] * (weights * products[:, HISTORY + index]).sum(1)
    return weights
