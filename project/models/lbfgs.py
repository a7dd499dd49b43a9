"""L-BFGS for many convex problems at once (Liu and Nocedal, "On the limited memory BFGS method", 1989)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

HISTORY = 10  # pairs of steps and gradient changes that approximate the inverse Hessian
SUFFICIENT_DECREASE = 1e-4  # Armijo's constant
PATIENCE = 10  # passes without a decrease that exceeds rounding errors
#: Values of problems ``(K,)`` and their gradients ``(R, K, C)``, given their parameters and numbers.
Objective = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Minimum(NamedTuple):
    """Result of :func:`minimize`.

    Attributes:
        parameters: ``(R, K, C)``.
        passes: Number of evaluations of the objective.
        converged: Whether each problem has converged, bool ``(K,)``.
    """

    parameters: torch.Tensor
    passes: int
    converged: torch.Tensor


def minimize(
    objective: Objective, start: torch.Tensor, inverse_curvature: torch.Tensor, tolerance: float, max_passes: int
) -> Minimum:
    """Minimize K independent convex functions. Each pass evaluates all that have not converged.

    A problem has converged if the decrease that a preconditioned gradient step predicts is at most ``tolerance`` times
    its value, or if rounding errors hide any decrease.

    Args:
        objective: Evaluates problems.
        start: Initial parameters ``(R, K, C)``.
        inverse_curvature: Approximate diagonal of the inverse Hessians ``(R, K, C)``, the preconditioner.
        tolerance: Relative tolerance of the value.
        max_passes: Maximum number of evaluations.
    """
    result = start.clone()
    problems = torch.arange(start.shape[1], device=start.device)
    converged = torch.zeros(len(problems), dtype=torch.bool, device=start.device)
    x, diagonal = start, inverse_curvature
    value, gradient = objective(x, problems)
    step, scale, stalled = torch.ones_like(value), torch.ones_like(value), torch.zeros_like(value)
    pairs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for passes in range(1, max_passes + 1):
        done = _dot(gradient, diagonal * gradient) * scale / 2 <= tolerance * value
        done |= stalled >= PATIENCE
        if done.any():
            result[:, problems[done]] = x[:, done]
            converged[problems[done]] = True
            if done.all():
                return Minimum(result, passes, converged)
            keep = ~done
            problems, value, step, scale, stalled = (item[keep] for item in (problems, value, step, scale, stalled))
            x, gradient, diagonal = x[:, keep], gradient[:, keep], diagonal[:, keep]
            pairs = [(s[:, keep], y[:, keep], inverse[keep]) for s, y, inverse in pairs]
        direction = -_inverse_hessian_product(gradient, pairs, diagonal, scale)
        slope = _dot(direction, gradient)
        trial = x + step[:, None] * direction
        new_value, new_gradient = objective(trial, problems)
        rounding = 4 * torch.finfo(x.dtype).eps * value.abs()
        accepted = new_value <= value + SUFFICIENT_DECREASE * step * slope + rounding
        stalled = torch.where(new_value < value - rounding, 0, stalled + 1)
        mask = accepted[:, None]
        # A rejected step adds a pair of zeros, which changes nothing.
        s, y = ((trial - x) * mask, (new_gradient - gradient) * mask)
        product = _dot(s, y)
        curved = product > 0
        inverse = torch.where(curved, 1 / product.where(curved, torch.ones_like(product)), 0)
        scale = torch.where(curved, product / _dot(y, diagonal * y).clamp_min(torch.finfo(x.dtype).tiny), scale)
        pairs = [*pairs[-(HISTORY - 1) :], (s, y, inverse)]
        x, gradient = torch.where(mask, trial, x), torch.where(mask, new_gradient, gradient)
        value = torch.where(accepted, new_value, value)
        step = torch.where(accepted, torch.ones_like(step), step / 4)
    result[:, problems] = x
    return Minimum(result, max_passes, converged)


def _dot(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Inner product of each problem's vectors ``(R, K, C)``: ``(K,)``."""
    return (left * right).sum((0, 2))


def _inverse_hessian_product(
    gradient: torch.Tensor,
    pairs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    diagonal: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    """The two-loop recursion: approximate inverse Hessian times gradient."""
    product, factors = gradient.clone(), []
    for s, y, inverse in reversed(pairs):
        factors.append(inverse * _dot(s, product))
        product -= factors[-1][:, None] * y
    product *= diagonal * scale[:, None]
    for (s, y, inverse), factor in zip(pairs, reversed(factors), strict=True):
        product += (factor - inverse * _dot(y, product))[:, None] * s
    return product
