"""Parameter groups of an optimizer: one per stage, with a learning rate by depth, and without decay where it hurts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from project.errors import ConfigError

#: Suffix of the group with a stage's parameters that are not decayed.
NO_DECAY = " (no decay)"
#: The group of an optimizer that accepts a single one.
ALL = "all"
#: Names of parameters of several dimensions that are not decayed: biases of attention, class and register tokens,
#: position embeddings, and the factor of each channel in a residual branch.
NOT_DECAYED = re.compile(r"bias|token|pos_emb|position|rel_pos|class_embedding|layer_scale")


def stage_groups(stages: Mapping[str, nn.Module]) -> list[dict[str, Any]]:
    """The trainable parameters of each stage that has any.

    Args:
        stages: Modules by name, from the input to the head.

    Returns:
        For each stage ``{"name": ..., "params": [...], "decayed": [...]}``; ``decayed`` is whether each parameter may
        be decayed, see :func:`is_decayed`.
    """
    groups = []
    for name, stage in stages.items():
        trained = [item for item in stage.named_parameters() if item[1].requires_grad]
        decayed = [is_decayed(stage.get_submodule(path.rpartition(".")[0]), path, value) for path, value in trained]
        if trained:
            groups.append({"name": name, "params": [value for _, value in trained], "decayed": decayed})
    return groups


def is_decayed(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter: to the weights of products and convolutions only.

    A bias, a scale or a position does not make a network more complex, and decay would change what it represents
    (He et al., arXiv:1812.01187; DeiT, arXiv:2012.12877).

    Args:
        module: The module that it belongs to.
        name: Its name, or its path, of which only the last part matters.
        parameter: The parameter.
    """
    is_norm = isinstance(module, (nn.LayerNorm, nn.RMSNorm))  # of maps, it has weights of several dimensions
    return parameter.dim() > 1 and not is_norm and not NOT_DECAYED.search(name.rpartition(".")[2])


def arrange_groups(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]], lr_decay: float) -> list[int]:
    """Set learning rates by depth, and split the groups of stages by weight decay.

    The learning rate of the head is the optimizer's, and each stage before it has ``lr_decay`` times that of the next
    one: discriminative fine-tuning (Howard and Ruder, arXiv:1801.06146), the layer decay of BEiT (arXiv:2106.08254).

    The groups are split only if the optimizer decays weights.

    Args:
        optimizer: A new one, changed in place.
        groups: From :func:`stage_groups`, as the optimizer got them.
        lr_decay: Factor in (0, 1].

    Returns:
        The depth of each group of the optimizer: 0 for the head, 1 for the last stage, and so on.

    Raises:
        ConfigError: The optimizer has no learning rate to multiply.
    """
    arranged, depths = [], []
    last = len(groups) - 1
    for number, (group, source) in enumerate(zip([*optimizer.param_groups], groups, strict=True)):
        if lr_decay != 1:
            if not isinstance(group.get("lr"), (int, float)):
                raise ConfigError(
                    f"model.lr_decay: {type(optimizer).__name__} has no learning rate to multiply. "
                    "Set --model.optimizer.lr, or --model.lr_decay 1."
                )
            group["lr"] *= lr_decay ** (last - number)
        parts = [group]
        if group.get("weight_decay") and not all(source["decayed"]):
            kept, exempt = (
                [parameter for parameter, flag in zip(group["params"], source["decayed"], strict=True) if flag is side]
                for side in (True, False)
            )
            parts = [{**group, "params": kept}] if kept else []
            parts.append({**group, "name": f"{group['name']}{NO_DECAY}", "params": exempt, "weight_decay": 0.0})
        arranged += parts
        depths += [last - number] * len(parts)
    optimizer.param_groups[:] = arranged
    return depths


def parameter_indices(names: Sequence[str], groups: Sequence[Mapping[str, Any]]) -> list[list[int]] | None:
    """Positions of the parameters of each group of an optimizer.

    Args:
        names: Names of the optimizer's groups.
        groups: From :func:`stage_groups`.

    Returns:
        For each name, the indices among the parameters of all groups; ``None`` if a name is of none of the groups.
    """
    indices: dict[str, list[int]] = {ALL: []}
    for group in groups:
        name, exempt_name, start = group["name"], f"{group['name']}{NO_DECAY}", len(indices[ALL])
        numbers = range(start, start + len(group["params"]))
        exempt = [index for index, decayed in zip(numbers, group["decayed"], strict=True) if not decayed]
        indices[ALL] += numbers
        indices[exempt_name] = exempt
        indices[name] = [index for index in numbers if exempt_name not in names or index not in exempt]
    return [indices[name] for name in names] if all(name in indices for name in names) else None
