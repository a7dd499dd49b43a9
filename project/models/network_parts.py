"""Divide a network into parts whose sequence repeats the network's own ``forward``, operation by operation.

Some networks are not a plain sequence of modules: a vision transformer adds tokens and position embeddings that are
parameters of the network itself. Its ``forward`` is therefore described as steps, see :class:`Chain`. A part is a copy
of the network that has only some of its modules, with the steps that use them, so that all tensors keep their names.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from project.models.cut import WHOLE
from project.models.fingerprint import named_tensors
from project.models.stage_starts import STAGE_NAMES, StageNames, StartsStage

#: An operation of the network's ``forward``, given the network and the value.
Operation = Callable[[Any, Any], Any]
#: Calls a child of a container, given the network, the child and the value.
ChildCall = Callable[[Any, Any, Any], Any]


class Step(NamedTuple):
    """An operation, and the path of its module or method; for a function, its name."""

    path: str
    run: Operation


class TokenLayout(NamedTuple):
    """The tokens ``(B, P + N, D)`` that the blocks of a transformer output.

    Attributes:
        prefix: Number P of class and register tokens.
        has_class_token: Whether the first one is a class token.
        norm: Path of the final normalization.
    """

    prefix: int
    has_class_token: bool
    norm: str


def call_child(network: Any, child: Any, value: Any) -> Any:
    """Call a child with the value as its only argument."""
    return child(value)


@dataclass(frozen=True)
class Chain:
    """The ``forward`` of a family of networks as a sequence of steps.

    Attributes:
        steps: Names of modules and methods, separated by spaces, and functions. ``blocks.*`` is a step for each child
            of ``blocks``.
        starts_stage: Where a new stage starts; by default at each child of ``blocks.*``.
        names: Names of the stages.
        call: How to call a child of ``blocks.*``.
        end: Converts the output of each stage but the last one to a tensor.
        shared: Modules without parameters that all stages need, such as tables of rotary embeddings; each gets a copy.
        last: Other tensors and modules that belong to the last stage. By default, a tensor belongs to the stem, and a
            module to the stage of the module before it.
        norm: Final normalization of a transformer that outputs tokens; empty for other networks.
        channels_last: Whether the stages output maps ``(B, H, W, K)`` instead of ``(B, K, H, W)``.
        indivisible: Why a network of the family is not a chain; ``None`` if it is one.
    """

    steps: tuple[str | Operation, ...]
    starts_stage: StartsStage | None = None
    names: StageNames = STAGE_NAMES
    call: ChildCall = call_child
    end: Operation | None = None
    shared: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    norm: str = ""
    channels_last: bool = False
    indivisible: Callable[[Any], str | None] = lambda network: None

    def stages(self, network: nn.Module) -> list[list[Step]]:
        """The steps of each stage."""
        stages: list[list[Step]] = [[]]
        previous: nn.Module | None = None
        for step, expanded in self._steps(network):
            child = _attribute(network, step.path)
            module = child if isinstance(child, nn.Module) else None
            starts = self.starts_stage(step.path, module, previous) if self.starts_stage else expanded
            if stages[-1] and starts:
                stages.append([])
            stages[-1].append(step)
            previous = module
        if self.end is not None:
            for stage in stages[:-1]:
                stage.append(Step("end", self.end))
        return stages

    def _steps(self, network: nn.Module) -> Iterator[tuple[Step, bool]]:
        """The steps, and whether each is a child of a container."""
        for item in self.steps:
            if not isinstance(item, str):
                yield Step(getattr(item, "__name__", ""), item), False
                continue
            for name in item.split():
                path = name.removesuffix(".*")
                if path == name:
                    yield Step(path, functools.partial(_call, path)), False
                    continue
                for child, _ in _attribute(network, path).named_children():
                    step = Step(f"{path}.{child}", functools.partial(_call_child, f"{path}.{child}", self.call))
                    yield step, True

    def tokens(self, network: Any) -> TokenLayout | None:
        """Layout of the tokens, if the blocks output tokens."""
        if not self.norm:
            return None
        has_class_token = any(getattr(network, name, None) is not None for name in ("cls_token", "class_token"))
        return TokenLayout(getattr(network, "num_prefix_tokens", 1), has_class_token, self.norm)


class Part(nn.Module):
    """A stage: a part of a network.

    Args:
        network: A copy of the network with some of its modules, under their own names.
        steps: The operations of this stage.
        tensors: Names of all parameters and buffers of the whole network, in order.
        tokens: Layout of the output of the blocks of a transformer.
        channels_last: Whether the output maps are ``(B, H, W, K)`` instead of ``(B, K, H, W)``.
    """

    def __init__(
        self,
        network: nn.Module,
        steps: Sequence[Step],
        tensors: tuple[str, ...],
        tokens: TokenLayout | None,
        channels_last: bool,
    ) -> None:
        super().__init__()
        self.network = network
        self.operations = [step.run for step in steps]
        self.tensors = tensors
        self.tokens = tokens
        self.channels_last = channels_last
        paths = [step.path for step in steps]
        self._blocks_end = paths.index(tokens.norm) if tokens and tokens.norm in paths else len(steps)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Run the operations, on the output of the previous part or, for the first one, on images ``(B, 3, H, W)``."""
        for operation in self.operations:
            value = operation(self.network, value)
        return value

    def run_blocks(self, value: torch.Tensor) -> torch.Tensor:
        """Run the operations before the final normalization: tokens ``(B, P + N, D)``."""
        for operation in self.operations[: self._blocks_end]:
            value = operation(self.network, value)
        return value


def divide(network: nn.Module, chain: Chain) -> OrderedDict[str, nn.Module]:
    """Divide a network into parts, which share its parameters and buffers.

    Args:
        network: The network; it is not changed.
        chain: Its ``forward``.

    Returns:
        A :class:`Part` for each stage, by name, in order.
    """
    stages = chain.stages(network)
    owner = {step.path: index for index, stage in enumerate(stages) for step in stage}
    owner |= dict.fromkeys(chain.last, len(stages) - 1)
    containers = {path[:end] for path in owner for end, letter in enumerate(path) if letter == "."}
    _assign(network, "", owner, containers, 0)
    tensors = tuple(name for name, _ in named_tensors(network))
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for index, steps in enumerate(stages):
        kept = {path for path, stage in owner.items() if stage == index} | set(chain.shared)
        part = _reduced(network, "", kept, containers)
        for name in chain.shared if index else ():  # a copy, as one stage may be frozen and another one not
            setattr(part, name, copy.deepcopy(getattr(network, name)))
        parts[chain.names(index)] = Part(part, steps, tensors, chain.tokens(network), chain.channels_last)
    return parts


def whole_tensors(parts: Iterable[nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers of all parts of a network, with the names and in the order of the network.

    Tensors that an adapter has added come last.
    """
    found: dict[str, torch.Tensor] = {}
    names: tuple[str, ...] = ()
    for part in parts:
        assert isinstance(part, Part)
        found |= dict(named_tensors(part.network))
        names = part.tensors
    order = dict.fromkeys([*(name for name in names if name in found), *found])
    return ((f"{WHOLE}.{name}", found[name]) for name in order)


def _assign(module: nn.Module, prefix: str, owner: dict[str, int], containers: set[str], current: int) -> int:
    """Add to ``owner`` the tensors and modules that no step names, and return the stage of the last module."""
    for name in (*module._parameters, *module._buffers):
        owner.setdefault(prefix + name, current)
    for name, child in module._modules.items():
        path = prefix + name
        if path in containers and child is not None:
            current = _assign(child, f"{path}.", owner, containers, current)
        else:
            current = owner.setdefault(path, current)
    return current


def _reduced(module: nn.Module, prefix: str, kept: set[str], containers: set[str]) -> nn.Module:
    """Copy a module with only some of its tensors and children."""
    reduced = copy.copy(module)
    tables: Mapping[str, dict[str, Any]] = {
        table: {name: value for name, value in getattr(module, table).items() if prefix + name in kept}
        for table in ("_parameters", "_buffers", "_modules")
    }
    for name, child in module._modules.items():
        if prefix + name in containers and child is not None:
            tables["_modules"][name] = _reduced(child, f"{prefix}{name}.", kept, containers)
    reduced.__dict__.update(tables)
    return reduced


def _attribute(network: Any, path: str) -> Any:
    """The module or method at a path; ``None`` if there is none."""
    for name in path.split("."):
        network = getattr(network, name, None)
    return network


def _call(path: str, network: Any, value: Any) -> Any:
    return _attribute(network, path)(value)


def _call_child(path: str, call: ChildCall, network: Any, value: Any) -> Any:
    return call(network, _attribute(network, path), value)
