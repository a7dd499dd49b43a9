"""Names of backbones to architectures: torchvision's classifiers, and ``timm/NAME``."""

from __future__ import annotations

import importlib.util
import re
import textwrap
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torchvision
from torch import nn
from torchvision.models import WeightsEnum

from project.errors import ModelError, WeightsError, nearest
from project.models import weights as files
from project.preprocessing import Preprocessing

#: The names that mean "the pretrained weights this network is known by", in either zoo.
DEFAULT = "DEFAULT"
ARTICLE = "IMAGENET1K_V1"


class Architecture(Protocol):
    """A network that is known by name, before it is built."""

    name: str

    def names(self) -> list[str]:
        """The pretrained weights there are."""

    def fetch(self, weights: str) -> Path:
        """Bring the file of these weights here, from the cache or the network."""

    def preprocessing(self, weights: str | None) -> Preprocessing:
        """What these weights ask of an image; where ``None`` or unknown, what the architecture's usual ones ask."""

    def reference(self) -> Mapping[str, torch.Tensor]:
        """Names and tensors of the whole network, its classifier included, in order."""

    def build(self, state: files.State | None) -> tuple[nn.Module, int]:
        """The network without its classifier, and the width of its features."""

    def fixed_size(self, model: nn.Module) -> int | None:
        """Side in pixels of the only images that the network takes; ``None`` where it takes any."""


def architecture(name: str) -> Architecture:
    """Look a backbone up.

    Args:
        name: A torchvision classifier, or ``timm/NAME``.

    Raises:
        ModelError: There is none of that name; the message has the nearest.
    """
    if name.startswith("timm/"):
        return Timm(name)
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        if importlib.util.find_spec("timm") is not None:
            import timm

            known += [f"timm/{other}" for other in timm.list_models()]
        raise ModelError(
            f"model.backbone: unknown backbone {name!r}. {nearest(name, known)}Known: torchvision's names, timm/NAME."
        )
    return Torchvision(name)


class Torchvision:
    """A classifier of :mod:`torchvision.models`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._zoo: type[WeightsEnum] = torchvision.models.get_model_weights(name)

    def names(self) -> list[str]:
        return list(self._zoo.__members__)  # DEFAULT is among them

    def fetch(self, weights: str) -> Path:
        if weights not in self.names():
            raise _unknown_weights(weights, self)
        return files.from_url(self._zoo[weights].url)

    def preprocessing(self, weights: str | None) -> Preprocessing:
        entry = self._zoo[weights] if weights in self.names() else next(iter(self._zoo.__members__.values()))
        preset = entry.transforms()
        return Preprocessing(
            resize=preset.resize_size[0],
            crop=preset.crop_size[0],
            interpolation=preset.interpolation.value,
            mean=tuple(preset.mean),
            std=tuple(preset.std),
        )

    def reference(self) -> Mapping[str, torch.Tensor]:
        state: Mapping[str, torch.Tensor] = self._whole(None).state_dict()
        return state

    def build(self, state: files.State | None) -> tuple[nn.Module, int]:
        model = self._whole(state)
        # Inception's and GoogLeNet's auxiliary heads are classifiers of ImageNet too, used in training alone.
        dropped = [name for name, _ in model.named_children() if name.lower().startswith("aux")]
        for name in dropped:
            setattr(model, name, None)
        if dropped:
            model.aux_logits = False  # type: ignore[assignment]
        path, classifier = [(p, m) for p, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Identity())
        if state is not None:
            self._load(model, state, tuple(f"{name}." for name in [path, *dropped]))
        width = classifier.in_features if isinstance(classifier, nn.Linear) else classifier.in_channels
        return model, width

    def fixed_size(self, model: nn.Module) -> int | None:
        if isinstance(model, torchvision.models.MaxVit):  # windows that have to fill the image
            return self.preprocessing(None).crop
        side: int | None = getattr(model, "image_size", None)  # ViT: a learned position for each patch
        return side

    def _whole(self, state: files.State | None) -> nn.Module:
        options: dict[str, Any] = {}
        if self.name in ("inception_v3", "googlenet"):
            # Their weights were made with another normalisation, which the network itself applies.
            options = {"transform_input": True, "init_weights": True}
        if state is not None and "conv_proj.weight" in state:
            # A ViT has one position for each patch of the images it was trained on: 512 px in some weights.
            positions = state["encoder.pos_embedding"].shape[1] - 1
            options["image_size"] = int(positions**0.5) * state["conv_proj.weight"].shape[-1]
        model: nn.Module = torchvision.models.get_model(self.name, weights=None, **options)
        return model

    def _load(self, model: nn.Module, state: files.State, dropped: tuple[str, ...]) -> None:
        for key in list(state):
            if key.startswith(dropped):
                del state[key]
            elif ".denselayer" in key:  # DenseNet's files are of a time when names could hold a dot
                state[re.sub(r"\.(norm|conv)\.([12])\.", r".\1\2.", key)] = state.pop(key)
        if not hasattr(state, "_metadata"):  # safetensors has no version numbers, and MNASNet asks for its own
            state = OrderedDict(state)
            vars(state)["_metadata"] = vars(model.state_dict())["_metadata"]
        try:
            missing, unexpected = model.load_state_dict(state, strict=False)
        except RuntimeError as error:  # shapes differ
            raise _another_network(self.name, str(error).split("\n")[1].strip()) from error
        missing = [key for key in missing if not key.endswith("num_batches_tracked")]
        for kind, keys in (("lacks", missing), ("has an unknown", unexpected)):
            if keys:
                raise _another_network(self.name, f"it {kind} {keys[0]!r}")


class Timm:
    """A network of timm, by its architecture and, optionally, tag: ``timm/resnet50`` or ``timm/resnet50.a1_in1k``."""

    def __init__(self, name: str) -> None:
        if importlib.util.find_spec("timm") is None:
            raise ModelError(f"model.backbone: {name} needs timm. Install it: pip install timm")
        import timm

        self._timm = timm
        self.name = name
        self._model, _, self._tag = name.removeprefix("timm/").partition(".")
        if not timm.is_model(self._model):
            known = timm.list_models()
            raise ModelError(f"model.backbone: timm has no {self._model!r}. {nearest(self._model, known)}")
        if self._tag and self._tag not in self._tags():
            raise ModelError(
                f"model.backbone: timm/{self._model} has no tag {self._tag!r}, but {', '.join(self._tags())}."
            )

    def _tags(self) -> list[str]:
        return [entry.partition(".")[2] for entry in self._timm.list_pretrained(f"{self._model}.*")]

    def names(self) -> list[str]:
        return [*self._tags(), DEFAULT]

    def _config(self, weights: str | None) -> dict[str, Any]:
        tag = weights if weights in self._tags() else self._tag
        config = self._timm.get_pretrained_cfg(f"{self._model}.{tag}" if tag else self._model)
        return dict(vars(config)) if config else {}

    def fetch(self, weights: str) -> Path:
        # The article's name is the default of ``model.weights``; timm's networks are known by a tag of their own.
        if weights not in (ARTICLE, *self.names()):
            raise _unknown_weights(weights, self)
        config = self._config(weights)
        if config.get("hf_hub_id"):
            return files.from_hub(config["hf_hub_id"], config.get("hf_hub_filename") or "model.safetensors")
        if config.get("url"):
            return files.from_url(config["url"])
        raise WeightsError(f"model.weights: timm has no pretrained weights for {self._model!r}; give a file, or null.")

    def preprocessing(self, weights: str | None) -> Preprocessing:
        config = self._config(weights)
        crop = config["input_size"][-1]
        return Preprocessing(
            resize=int(crop / config["crop_pct"]),
            crop=crop,
            interpolation=config["interpolation"],
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            squash=config["crop_mode"] == "squash",
        )

    def reference(self) -> Mapping[str, torch.Tensor]:
        state: Mapping[str, torch.Tensor] = self._timm.create_model(self._model).state_dict()
        return state

    def build(self, state: files.State | None) -> tuple[nn.Module, int]:
        model: Any = self._timm.create_model(self._model, num_classes=0) if state is None else self._load(state)
        return model, int(getattr(model, "head_hidden_size", None) or model.num_features)

    def fixed_size(self, model: nn.Module) -> int | None:
        config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        return int(config["input_size"][-1]) if config.get("fixed_input_size") else None

    def _load(self, state: files.State) -> Any:
        # Where the number of classes differs from the file's, timm loads what fits and leaves the rest random. So the
        # network is built with the file's own number, loaded strictly, and loses its classifier after that.
        names = self._config(None).get("classifier")
        classifier = state.get(f"{names if isinstance(names, str) or not names else names[0]}.weight")
        classes = 0 if classifier is None else classifier.shape[0]
        overlay = {"state_dict": state, "num_classes": classes, "label_offset": 0}
        try:
            model: Any = self._timm.create_model(
                self._model, pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay
            )
        except (RuntimeError, KeyError) as error:
            why = textwrap.shorten(str(error).split("\n")[-1], 120, placeholder=" ...")
            raise _another_network(self.name, why) from error
        model.pretrained_cfg.pop("state_dict", None)
        if classes:
            model.reset_classifier(0)
        return model


def _unknown_weights(weights: str, of: Architecture) -> WeightsError:
    return WeightsError(
        f"model.weights: {of.name} has no weights {weights!r}. It has {', '.join(of.names())}; "
        "or give a file, pkg:NAME, or null for random ones."
    )


def _another_network(name: str, why: str) -> WeightsError:
    return WeightsError(f"model.weights: these are not the weights of {name}: {why}.")
