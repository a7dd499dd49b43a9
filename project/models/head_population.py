"""Many heads of one class, each with its own optimizer settings, trained on the same batches as one batched module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from project.errors import ModelError
from project.models.parameter_groups import stage_groups

BETAS, EPSILON = (0.9, 0.999), 1e-8  # torch's defaults of AdamW


class HeadPopulation:
    """K heads of one class, each trained by AdamW (Loshchilov and Hutter, arXiv:1711.05101).

    Each head takes the same steps as if it were trained alone by :class:`torch.optim.AdamW`, with weight decay only
    on the parameters that :func:`~project.models.parameter_groups.is_decayed` selects.

    Args:
        heads: K heads with equal shapes, which stay as they are. Parameters that require no gradient are not trained.
        learning_rates: Learning rate of each head, ``(K,)``.
        weight_decays: Weight decay of each head, ``(K,)``.
        device: Device of the heads.

    Raises:
        ModelError: The heads have no parameters to train.
    """

    def __init__(
        self,
        heads: Sequence[nn.Module],
        learning_rates: Sequence[float],
        weight_decays: Sequence[float],
        device: torch.device,
    ) -> None:
        self._module = copy.deepcopy(heads[0]).to(device)
        parameters, buffers = (
            {name: value.to(device) for name, value in stacked.items()} for stacked in stack_module_state([*heads])
        )
        trained = [name for name, parameter in heads[0].named_parameters() if parameter.requires_grad]
        if not trained:
            raise ModelError(f"{type(heads[0]).__name__} has no parameters to train.")
        (group,) = stage_groups({"head": heads[0]})
        self._decayed = dict(zip(trained, group["decayed"], strict=True))
        self._parameters = {name: parameters[name].detach().requires_grad_() for name in parameters if name in trained}
        self._constants = {name: value.detach() for name, value in parameters.items() if name not in trained} | buffers
        self._means = {name: torch.zeros_like(value) for name, value in self._parameters.items()}
        self._squares = {name: torch.zeros_like(value) for name, value in self._parameters.items()}
        self._scales = {name: torch.empty_like(value) for name, value in self._parameters.items()}
        self._rates = torch.tensor(learning_rates, device=device)
        self._decays = torch.tensor(weight_decays, device=device)
        self._steps = 0

    def logits(self, features: torch.Tensor, training: bool = False) -> torch.Tensor:
        """Logits of all heads ``(B, K, C)``.

        Args:
            features: ``(B, D)``.
            training: Whether dropout is active.
        """
        self._module.train(training)

        def run(tensors: Any) -> torch.Tensor:
            logits: torch.Tensor = functional_call(self._module, tensors, (features,))
            return logits

        with _OneProduct():
            batched = vmap(run, out_dims=1, randomness="different")
            logits: torch.Tensor = batched({**self._parameters, **self._constants})
            return logits

    def step(self, features: torch.Tensor, loss: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Take one step of AdamW with each head.

        Args:
            features: ``(B, D)``.
            loss: Maps logits ``(B, K, C)`` to the sum of the heads' losses.
        """
        total = loss(self.logits(features, training=True))
        gradients = torch.autograd.grad(total, [*self._parameters.values()], allow_unused=True)
        self._steps += 1
        first, second = (1 - beta**self._steps for beta in BETAS)  # corrections of the moments, which start from 0
        with torch.no_grad():
            for (name, parameter), gradient in zip(self._parameters.items(), gradients, strict=True):
                if gradient is None:  # the head does not use it
                    continue
                shape = (-1, *[1] * (parameter.dim() - 1))
                rates, decays = self._rates.view(shape), self._decays.view(shape)
                mean = self._means[name].lerp_(gradient, 1 - BETAS[0])
                square = self._squares[name].mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
                # In place, and with few passes over the memory: this takes as long as the matrix products.
                scale = torch.sqrt(square, out=self._scales[name]).add_(EPSILON * second**0.5)
                scale.div_(rates * (second**0.5 / first))
                if self._decayed[name]:
                    parameter.mul_(1 - rates * decays)
                parameter.addcdiv_(mean, scale, value=-1)


class _OneProduct(TorchFunctionMode):
    """Context in which K linear layers of the same input are computed as one matrix product.

    ``vmap`` alone would compute K small products, at a quarter of the speed.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear and not kwargs and args[0].dim() == args[1].dim() == 2:
            return _Linear.apply(*args, *[None] * (3 - len(args)))
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    """A linear layer with its own rule for ``vmap``. Autograd records the operations of that rule."""

    @staticmethod
    def forward(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return inputs @ weight.T if bias is None else torch.addmm(bias, inputs, weight.T)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Save nothing: there is no ``backward``, as autograd records what :meth:`vmap` computes."""

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, int]:
        def at_front(tensor: torch.Tensor, dim: int | None) -> torch.Tensor:
            return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

        input_dim, weight_dim, bias_dim = in_dims
        weight = at_front(weight, weight_dim)  # (K, C, D)
        if input_dim is None:
            outputs = (inputs @ weight.flatten(0, 1).T).view(len(inputs), *weight.shape[:2])
        else:
            outputs = torch.bmm(inputs.movedim(input_dim, 0), weight.transpose(1, 2)).movedim(0, 1)
        return outputs if bias is None else outputs + at_front(bias, bias_dim), 1
