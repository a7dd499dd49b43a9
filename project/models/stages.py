"""How each family of networks is cut into named stages.

A stage list is a chain: running its modules one after another gives, bit for bit, what the network's own ``forward``
gives. Families that are not in the table are one stage, ``body``: they can be frozen whole or trained whole.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

#: Says whether a new stage begins at a child, from its path, the child, and the child before it.
Begins = Callable[[str, nn.Module, nn.Module | None], bool]


def _at(*prefixes: str) -> Begins:
    return lambda path, child, before: path.startswith(prefixes)


def _after_pooling(path: str, child: nn.Module, before: nn.Module | None) -> bool:
    return isinstance(before, nn.MaxPool2d)


def _downsampling(path: str, child: nn.Module, before: nn.Module | None) -> bool:
    """Whether a child halves the resolution, with a strided convolution."""
    return any(isinstance(module, nn.Conv2d) and max(module.stride) > 1 for module in child.modules())


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        begins: Where a new stage begins.
        opened: Containers whose children are told apart.
        before: What ``forward`` does in functional form, by the child that it comes before.
        names: Name of the i-th stage, i counted from 0.
    """

    begins: Begins
    opened: tuple[str, ...] = ()
    before: Mapping[str, tuple[Callable[[], nn.Module], ...]] = field(default_factory=dict)
    names: Callable[[int], str] = lambda index: f"stage{index}" if index else "stem"

    def children(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The network as a chain of named modules."""
        for name, child in model.named_children():
            for index, step in enumerate(self.before.get(name, ())):
                yield f"{name}_before{index}", step()
            if name in self.opened:
                for inner, grandchild in child.named_children():
                    yield f"{name}.{inner}", grandchild
            else:
                yield name, child


def _pool() -> nn.Module:
    return nn.AdaptiveAvgPool2d(1)


def _layer(index: int) -> str:
    return f"layer{index}" if index else "stem"


def _block(index: int) -> str:
    return f"block{index}" if index else "stem"


def _vgg_block(index: int) -> str:
    return f"block{index + 1}" if index < 5 else "fc"


#: torchvision's ConvNeXt and Swin: patches, blocks, and three times a downsampling with its blocks.
BEFORE_FOUR = ("features.1", "features.2", "features.4", "features.6")

#: Keyed by the package and class of the network.
FAMILIES: dict[str, Family] = {
    "torchvision.ResNet": Family(_at("layer"), before={"fc": (nn.Flatten,)}, names=_layer),
    "torchvision.VGG": Family(_after_pooling, ("features",), {"classifier": (nn.Flatten,)}, _vgg_block),
    "torchvision.DenseNet": Family(
        _at("features.denseblock"), ("features",), {"classifier": (nn.ReLU, _pool, nn.Flatten)}, _block
    ),
    "torchvision.MobileNetV2": Family(_downsampling, ("features",), {"classifier": (_pool, nn.Flatten)}),
    "torchvision.MobileNetV3": Family(_downsampling, ("features",), {"classifier": (nn.Flatten,)}),
    "torchvision.EfficientNet": Family(_downsampling, ("features",), {"classifier": (nn.Flatten,)}),
    "torchvision.ConvNeXt": Family(_at(*BEFORE_FOUR), ("features",)),
    "torchvision.RegNet": Family(_at("trunk_output.block"), ("trunk_output",), {"fc": (nn.Flatten,)}, _block),
    "torchvision.SwinTransformer": Family(_at(*BEFORE_FOUR), ("features",)),
    "timm.ResNet": Family(_at("layer"), names=_layer),
    "timm.VGG": Family(_after_pooling, ("features",), names=_vgg_block),
    "timm.DenseNet": Family(_at("features.denseblock"), ("features",), names=_block),
    "timm.EfficientNet": Family(_downsampling, ("blocks",)),
    "timm.MobileNetV3": Family(_downsampling, ("blocks",)),
    "timm.ConvNeXt": Family(_at("stages."), ("stages",)),
    "timm.RegNet": Family(_at("s1", "s2", "s3", "s4"), names=_block),
}


def split_into_stages(model: nn.Module) -> OrderedDict[str, nn.Module]:
    """Split a network without its classifier into named stages.

    Args:
        model: Maps images ``(B, 3, H, W)`` to features ``(B, D)``.

    Returns:
        The stages in order; the last one ends in pooled features ``(B, D)``. They share the model's parameters.
    """
    family = FAMILIES.get(f"{type(model).__module__.split('.')[0]}.{type(model).__name__}")
    if family is None:
        return OrderedDict(body=model)
    groups: list[OrderedDict[str, nn.Module]] = [OrderedDict()]
    before: nn.Module | None = None
    for path, child in family.children(model):
        if groups[-1] and family.begins(path, child, before):
            groups.append(OrderedDict())
        groups[-1][path.replace(".", "_")] = child
        before = child
    return OrderedDict((family.names(index), nn.Sequential(group)) for index, group in enumerate(groups))
