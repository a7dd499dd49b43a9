"""Registry of architectures: torchvision's classifiers and ``timm/NAME``."""

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

from project.errors import ModelError, WeightsError, did_you_mean
from project.models import weights as weight_files
from project.preprocessing import Preprocessing

#: Names of a network's default pretrained weights.
DEFAULT = "DEFAULT"
ARTICLE = "IMAGENET1K_V1"


class Architecture(Protocol):
    """Interface of a named network that is not built yet."""

    name: str

    def names(self) -> list[str]:
        """Names of the available pretrained weights."""

    def fetch(self, weights: str) -> Path:
        """Path of the weight file, downloaded if it is not cached."""

    def preprocessing(self, weights: str | None) -> Preprocessing:
        """Preprocessing of these weights; that of the default weights if ``None`` or unknown."""

    def reference(self) -> Mapping[str, torch.Tensor]:
        """State dict of the whole network, classifier included."""

    def build(self, state: weight_files.State | None) -> tuple[nn.Module, int]:
        """Build the network without its classifier; returns it and the width of its features."""

    def fixed_size(self, model: nn.Module) -> int | None:
        """The only supported image size in pixels; ``None`` if any size works."""


def architecture(name: str) -> Architecture:
    """Look up an architecture by name.

    Args:
        name: A torchvision classifier, or ``timm/NAME``.

    Raises:
        ModelError: The name is unknown; the message suggests similar names.
    """
    if name.startswith("timm/"):
        return Timm(name)
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        if importlib.util.find_spec("timm") is not None:
            import timm

            known += [f"timm/{other}" for other in timm.list_models()]
        raise ModelError(
            f"model.backbone: unknown backbone {name!r}. {did_you_mean(name, known)}"
            "Use the name of a torchvision classifier, or timm/NAME."
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
        return weight_files.from_url(self._zoo[weights].url)

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

    def build(self, state: weight_files.State | None) -> tuple[nn.Module, int]:
        model = self._whole(state)
        # The auxiliary heads of Inception and GoogLeNet are ImageNet classifiers, used only in training.
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
        if isinstance(model, torchvision.models.MaxVit):  # the image size must be a multiple of its windows
            return self.preprocessing(None).crop
        side: int | None = getattr(model, "image_size", None)  # ViT: one learned position embedding per patch
        return side

    def _whole(self, state: weight_files.State | None) -> nn.Module:
        options: dict[str, Any] = {}
        if self.name in ("inception_v3", "googlenet"):
            # Their weights expect another normalization, which the network applies to its input.
            options = {"transform_input": True, "init_weights": True}
        if state is not None and "conv_proj.weight" in state:
            # The number of position embeddings depends on the training image size, 512 px for some weights.
            positions = state["encoder.pos_embedding"].shape[1] - 1
            options["image_size"] = int(positions**0.5) * state["conv_proj.weight"].shape[-1]
        model: nn.Module = torchvision.models.get_model(self.name, weights=None, **options)
        return model

    def _load(self, model: nn.Module, state: weight_files.State, dropped: tuple[str, ...]) -> None:
        for key in list(state):
            if key.startswith(dropped):
                del state[key]
            elif ".denselayer" in key:  # DenseNet's files use old tensor names with a dot
                state[re.sub(r"\.(norm|conv)\.([12])\.", r".\1\2.", key)] = state.pop(key)
        if not hasattr(state, "_metadata"):  # safetensors has no version numbers, which MNASNet reads
            state = OrderedDict(state)
            vars(state)["_metadata"] = vars(model.state_dict())["_metadata"]
        try:
            missing, unexpected = model.load_state_dict(state, strict=False)
        except RuntimeError as error:  # shapes differ
            raise _wrong_network(self.name, str(error).split("\n")[1].strip()) from error
        missing = [key for key in missing if not key.endswith("num_batches_tracked")]
        for kind, keys in (("missing", missing), ("unexpected", unexpected)):
            if keys:
                raise _wrong_network(self.name, f"{kind} tensor {keys[0]!r}")


class Timm:
    """A timm network, with an optional tag: ``timm/resnet50`` or ``timm/resnet50.a1_in1k``."""

    def __init__(self, name: str) -> None:
        if importlib.util.find_spec("timm") is None:
            raise ModelError(f"model.backbone: {name} needs timm. Install it: pip install timm")
        import timm

        self._timm = timm
        self.name = name
        self._model, _, self._tag = name.removeprefix("timm/").partition(".")
        if not timm.is_model(self._model):
            known = timm.list_models()
            raise ModelError(f"model.backbone: timm has no {self._model!r}. {did_you_mean(self._model, known)}")
        if self._tag and self._tag not in self._tags():
            raise ModelError(
                f"model.backbone: timm/{self._model} has no tag {self._tag!r}. Available: {', '.join(self._tags())}."
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
        # ARTICLE is the default of ``model.weights``; for timm it means the network's default tag.
        if weights not in (ARTICLE, *self.names()):
            raise _unknown_weights(weights, self)
        config = self._config(weights)
        if config.get("hf_hub_id"):
            return weight_files.from_hub(config["hf_hub_id"], config.get("hf_hub_filename") or "model.safetensors")
        if config.get("url"):
            return weight_files.from_url(config["url"])
        raise WeightsError(
            f"model.weights: timm has no pretrained weights for {self._model!r}. Pass a file, or null for random ones."
        )

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

    def build(self, state: weight_files.State | None) -> tuple[nn.Module, int]:
        model: Any = self._timm.create_model(self._model, num_classes=0) if state is None else self._load(state)
        return model, int(getattr(model, "head_hidden_size", None) or model.num_features)

    def fixed_size(self, model: nn.Module) -> int | None:
        config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        return int(config["input_size"][-1]) if config.get("fixed_input_size") else None

    def _load(self, state: weight_files.State) -> Any:
        # If the number of classes differs from the file's, timm loads non-strictly and leaves the rest random.
        # So build the network with the file's number of classes, load strictly, then remove the classifier.
        names = self._config(None).get("classifier")
        classifier = state.get(f"{names if isinstance(names, str) or not names else names[0]}.weight")
        num_classes = 0 if classifier is None else classifier.shape[0]
        overlay = {"state_dict": state, "num_classes": num_classes, "label_offset": 0}
        try:
            model: Any = self._timm.create_model(
                self._model, pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay
            )
        except (RuntimeError, KeyError) as error:
            reason = textwrap.shorten(str(error).split("\n")[-1], 120, placeholder=" ...")
            raise _wrong_network(self.name, reason) from error
        model.pretrained_cfg.pop("state_dict", None)
        if num_classes:
            model.reset_classifier(0)
        return model


def _unknown_weights(weights: str, arch: Architecture) -> WeightsError:
    return WeightsError(
        f"model.weights: {arch.name} has no weights {weights!r}. Available: {', '.join(arch.names())}. "
        "Or pass a file, pkg:NAME, or null for random weights."
    )


def _wrong_network(name: str, reason: str) -> WeightsError:
    return WeightsError(f"model.weights: the weights do not match {name}: {reason}.")
