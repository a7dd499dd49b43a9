"""Where the stages of a network start, and their names."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

#: Whether a new stage starts at a child, given its path, the child and the previous child.
StartsStage = Callable[[str, nn.Module | None, nn.Module | None], bool]
#: Name of the i-th stage, from 0.
StageNames = Callable[[int], str]


def at(*prefixes: str) -> StartsStage:
    """A stage starts at each child whose path has one of these prefixes."""
    return lambda path, child, previous: path.startswith(prefixes)


def at_exactly(*paths: str) -> StartsStage:
    """A stage starts at each of these paths."""
    return lambda path, child, previous: path in paths


def after_pooling(path: str, child: nn.Module | None, previous: nn.Module | None) -> bool:
    """A stage starts after each max pooling."""
    return isinstance(previous, nn.MaxPool2d)


def downsampling(path: str, child: nn.Module | None, previous: nn.Module | None) -> bool:
    """A stage starts at each child that contains a strided convolution."""
    modules = child.modules() if child is not None else ()
    return any(isinstance(module, nn.Conv2d) and max(module.stride) > 1 for module in modules)


def numbered(word: str) -> StageNames:
    """``stem``, then the word with a number from 1."""
    return lambda index: f"{word}{index}" if index else "stem"


#: Names of the stages of most networks: ``stem``, ``stage1``, …
STAGE_NAMES = numbered("stage")


def vgg_blocks(last: int) -> StageNames:
    """``block1`` to the last block, then ``fc``: networks without a stem, and with hidden linear layers at the end."""
    return lambda index: f"block{index + 1}" if index < last else "fc"


def transformer_blocks(index: int) -> str:
    """``stem``, then ``blocks.`` with a number from 0."""
    return f"blocks.{index - 1}" if index else "stem"
