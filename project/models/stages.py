"""Split networks into named stages.

Running the stages in sequence gives bit-identical results to the network's own ``forward``. Families that are not in
the table are a single stage, ``body``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

#: Whether a new stage starts at a child, given its path, the child and the previous child.
StartsStage = Callable[[str, nn.Module, nn.Module | None], bool]


class Stage(nn.Sequential):
    """A part of a network.

    Args:
        modules: Modules to run in sequence, by name.
        channels_last: Whether its maps are ``(B, H, W, K)`` instead of ``(B, K, H, W)``.
    """

    def __init__(self, modules: OrderedDict[str, nn.Module], channels_last: bool = False) -> None:
        super().__init__(modules)
        self.channels_last = channels_last


def _at(*prefixes: str) -> StartsStage:
    return lambda path, child, previous: path.startswith(prefixes)


def _after_pooling(path: str, child: nn.Module, previous: nn.Module | None) -> bool:
    return isinstance(previous, nn.MaxPool2d)


def _downsampling(path: str, child: nn.Module, previous: nn.Module | None) -> bool:
    """Whether a child contains a strided convolution."""
    return any(isinstance(module, nn.Conv2d) and max(module.stride) > 1 for module in child.modules())


@dataclass(frozen=True)
class Family:
    """How to split a family of networks.

    Attributes:
        starts_stage: Where a new stage starts.
        expanded: Containers whose children are treated as children of the network.
        functional: Modules for operations that ``forward`` applies in functional form, by the name of the next child.
        names: Name of the i-th stage, from 0.
        channels_last: Whether the stages output maps ``(B, H, W, K)`` instead of ``(B, K, H, W)``.
    """

    starts_stage: StartsStage
    expanded: tuple[str, ...] = ()
    functional: Mapping[str, tuple[Callable[[], nn.Module], ...]] = field(default_factory=dict)
    names: Callable[[int], str] = lambda index: f"stage{index}" if index else "stem"
    channels_last: bool = False

    def children(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The network as a chain of named modules."""
        for name, child in model.named_children():
            for index, module in enumerate(self.functional.get(name, ())):
                yield f"{name}_before{index}", module()
            if name in self.expanded:
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


#: First child of each stage after the stem in torchvision's ConvNeXt and Swin.
FOUR_STAGES = ("features.1", "features.2", "features.4", "features.6")

#: Families by package and class name of the network.
FAMILIES: dict[str, Family] = {
    "torchvision.ResNet": Family(_at("layer"), functional={"fc": (nn.Flatten,)}, names=_layer),
    "torchvision.VGG": Family(_after_pooling, ("features",), {"classifier": (nn.Flatten,)}, _vgg_block),
    "torchvision.DenseNet": Family(
        _at("features.denseblock"), ("features",), {"classifier": (nn.ReLU, _pool, nn.Flatten)}, _block
    ),
    "torchvision.MobileNetV2": Family(_downsampling, ("features",), {"classifier": (_pool, nn.Flatten)}),
    "torchvision.MobileNetV3": Family(_downsampling, ("features",), {"classifier": (nn.Flatten,)}),
    "torchvision.EfficientNet": Family(_downsampling, ("features",), {"classifier": (nn.Flatten,)}),
    "torchvision.ConvNeXt": Family(_at(*FOUR_STAGES), ("features",)),
    "torchvision.RegNet": Family(_at("trunk_output.block"), ("trunk_output",), {"fc": (nn.Flatten,)}, _block),
    "torchvision.SwinTransformer": Family(_at(*FOUR_STAGES), ("features",), channels_last=True),
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
        The stages in order. The last one outputs pooled features ``(B, D)``. They share the model's parameters.
    """
    family = FAMILIES.get(f"{type(model).__module__.split('.')[0]}.{type(model).__name__}")
    if family is None:
        return OrderedDict(body=model)
    groups: list[OrderedDict[str, nn.Module]] = [OrderedDict()]
    previous: nn.Module | None = None
    for path, child in family.children(model):
        if groups[-1] and family.starts_stage(path, child, previous):
            groups.append(OrderedDict())
        groups[-1][path.replace(".", "_")] = child
        previous = child
    return OrderedDict((family.names(index), Stage(group, family.channels_last)) for index, group in enumerate(groups))
