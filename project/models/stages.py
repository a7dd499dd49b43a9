"""Split networks into named stages.

Running the stages in sequence gives bit-identical results to the network's own ``forward``. A family whose networks are
a sequence of modules is in :data:`FAMILIES`, and one with other operations between them in
:data:`project.models.chains.CHAINS`. Other networks are a single stage, ``body``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from project.models.chains import CHAINS, REASONS
from project.models.cut import WHOLE
from project.models.network_parts import divide
from project.models.stage_starts import (
    STAGE_NAMES,
    StageNames,
    StartsStage,
    after_pooling,
    at,
    downsampling,
    numbered,
    vgg_blocks,
)


class Stage(nn.Sequential):
    """A part of a network.

    Args:
        modules: Modules to run in sequence, by name.
        channels_last: Whether its maps are ``(B, H, W, K)`` instead of ``(B, K, H, W)``.
    """

    def __init__(self, modules: OrderedDict[str, nn.Module], channels_last: bool = False) -> None:
        super().__init__(modules)
        self.channels_last = channels_last


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
    names: StageNames = STAGE_NAMES
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


#: First child of each stage after the stem in torchvision's ConvNeXt and Swin.
FOUR_STAGES = ("features.1", "features.2", "features.4", "features.6")

#: Families by package and class name of the network.
FAMILIES: dict[str, Family] = {
    "torchvision.ResNet": Family(at("layer"), functional={"fc": (nn.Flatten,)}, names=numbered("layer")),
    "torchvision.VGG": Family(after_pooling, ("features",), {"classifier": (nn.Flatten,)}, vgg_blocks(5)),
    "torchvision.DenseNet": Family(
        at("features.denseblock"), ("features",), {"classifier": (nn.ReLU, _pool, nn.Flatten)}, numbered("block")
    ),
    "torchvision.MobileNetV2": Family(downsampling, ("features",), {"classifier": (_pool, nn.Flatten)}),
    "torchvision.MobileNetV3": Family(downsampling, ("features",), {"classifier": (nn.Flatten,)}),
    "torchvision.EfficientNet": Family(downsampling, ("features",), {"classifier": (nn.Flatten,)}),
    "torchvision.ConvNeXt": Family(at(*FOUR_STAGES), ("features",)),
    "torchvision.RegNet": Family(at("trunk_output.block"), ("trunk_output",), {"fc": (nn.Flatten,)}, numbered("block")),
    "torchvision.SwinTransformer": Family(at(*FOUR_STAGES), ("features",), channels_last=True),
    "timm.ResNet": Family(at("layer"), names=numbered("layer")),
    "timm.VGG": Family(after_pooling, ("features",), names=vgg_blocks(5)),
    "timm.DenseNet": Family(at("features.denseblock"), ("features",), names=numbered("block")),
    "timm.EfficientNet": Family(downsampling, ("blocks",)),
    "timm.MobileNetV3": Family(downsampling, ("blocks",)),
    "timm.ConvNeXt": Family(at("stages."), ("stages",)),
    "timm.RegNet": Family(at("s1", "s2", "s3", "s4"), names=numbered("block")),
}


def split_into_stages(model: nn.Module) -> OrderedDict[str, nn.Module]:
    """Split a network without its classifier into named stages.

    Args:
        model: Maps images ``(B, 3, H, W)`` to features ``(B, D)``.

    Returns:
        The stages in order. The last one outputs pooled features ``(B, D)``. They share the model's parameters.
    """
    name = family_name(model)
    chain = CHAINS.get(name)
    if chain is not None and chain.indivisible(model) is None:
        return divide(model, chain)
    family = FAMILIES.get(name)
    if family is None:
        return OrderedDict({WHOLE: model})
    groups: list[OrderedDict[str, nn.Module]] = [OrderedDict()]
    previous: nn.Module | None = None
    for path, child in family.children(model):
        if groups[-1] and family.starts_stage(path, child, previous):
            groups.append(OrderedDict())
        groups[-1][path.replace(".", "_")] = child
        previous = child
    return OrderedDict((family.names(index), Stage(group, family.channels_last)) for index, group in enumerate(groups))


def reason_for_single_stage(model: nn.Module) -> str | None:
    """Why a network is a single stage; ``None`` if it has several, or if its family is not known."""
    name = family_name(model)
    chain = CHAINS.get(name)
    return chain.indivisible(model) if chain is not None else REASONS.get(name)


def family_name(model: nn.Module) -> str:
    """Package and class name of a network: the key of :data:`FAMILIES` and of the chains."""
    return f"{type(model).__module__.split('.')[0]}.{type(model).__name__}"
