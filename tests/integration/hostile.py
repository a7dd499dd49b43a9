"""A corpus of malicious checkpoints, configs and flags.

Each checkpoint is a modified valid one. The payloads import ``evil_marker``, which the tests put on the path, create
the file ``poisoned``, start a program, or access the network.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import io
import os
import pickle
import shutil
import subprocess
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Checkpoint = dict[str, Any]


class Payload:
    """An object that calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


PAYLOADS = {
    "os.system": Payload(os.system, "touch poisoned"),
    "os.mkdir": Payload(os.mkdir, "poisoned"),
    "open": Payload(open, "poisoned", "w"),
    "exec": Payload(builtins.exec, "import evil_marker"),
    "eval": Payload(builtins.eval, "__import__('evil_marker')"),
    "import_module": Payload(importlib.import_module, "evil_marker"),
    "Popen": Payload(subprocess.Popen, ["touch", "poisoned"]),
    "rmtree": Payload(shutil.rmtree, "precious"),
    "getattr": Payload(getattr, "", "join"),
    "torch.load": Payload(torch.load, "other.ckpt"),
    "torch.hub": Payload(torch.hub.load, "stranger/repository", "net"),
    "torch.jit": Payload(torch.jit.load, "evil.pt"),
    "torch.save": Payload(torch.save, {}, "poisoned"),
}
#: Functions that put a payload into a checkpoint, by place.
INJECTIONS: dict[str, Callable[[Checkpoint, Any], None]] = {
    "state_dict": lambda c, x: c["state_dict"].update({"head.bias": x}),
    "hyper_parameters": lambda c, x: c["hyper_parameters"].update(backbone=x),
    "init_args": lambda c, x: c["hyper_parameters"]["optimizer"]["init_args"].update(lr=x),
    "callbacks": lambda c, x: c["callbacks"].update(Custom=x),
    "optimizer_states": lambda c, x: c["optimizer_states"][0]["state"].update({99: x}),
    "lr_schedulers": lambda c, x: c.update(lr_schedulers=[x]),
    "loops": lambda c, x: c["loops"].update(fit_loop=x),
    "transfer": lambda c, x: c["transfer"].update(classes=x),
    "an unknown key": lambda c, x: c.update(extra=x),
    "a dict key": lambda c, x: c.update(extra={(x, 1): 1}),
}


def zip_format(pickled: bytes) -> bytes:
    """A file in the current format of torch.save with the given pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def torchscript() -> bytes:
    """A TorchScript file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated in torch 2.14
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), buffer)
    return buffer.getvalue()


def tar_format(pickled: bytes) -> bytes:
    """A file in the tar format that torch wrote before 2017."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            member = tarfile.TarInfo(name)
            member.size = len(pickled)
            archive.addfile(member, io.BytesIO(pickled))
    return buffer.getvalue()


def serialize(checkpoint: Any, zip_format: bool = True) -> bytes:
    """The bytes that torch.save writes."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer, _use_new_zipfile_serialization=zip_format)
    return buffer.getvalue()


#: Handwritten pickles: forbidden imports, object construction, and legacy opcodes.
RAW_PICKLES = {
    "third-party class": b"cevil_marker\nHead\n.",
    "call of a third-party class": b"cevil_marker\nHead\n)R.",
    "NEWOBJ and BUILD": b"cevil_marker\nHead\n)\x81}b.",
    "INST": b"(S'touch poisoned'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'touch poisoned'\no.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0etouch poisoned\x85R.",
    "EXT1": b"\x80\x02\x82\x01.",
    "dotted name": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c\x0etouch poisoned\x85R.",
    "PERSID": b"Pevil_marker\n.",
    "truncated": b"\x80\x02}" + b"(" * 1000,
}
#: Complete files, made from a valid checkpoint.
FILES: dict[str, Callable[[Checkpoint], bytes]] = {
    **{f"zip format, {name}": (lambda c, raw=raw: zip_format(raw)) for name, raw in RAW_PICKLES.items()},
    **{f"plain pickle, {name}": (lambda c, raw=raw: raw) for name, raw in RAW_PICKLES.items()},
    "legacy format": lambda c: serialize({**c, "extra": PAYLOADS["os.system"]}, zip_format=False),
    "tar format": lambda c: tar_format(pickle.dumps(PAYLOADS["os.system"])),
    "torchscript": lambda c: torchscript(),
    "numpy array of objects": lambda c: serialize({**c, "extra": np.array([PAYLOADS["os.system"]], dtype=object)}),
    "pickled module": lambda c: serialize({**c, "extra": torch.nn.Linear(2, 2)}),
    "functools.partial": lambda c: serialize({**c, "extra": functools.partial(os.system, "touch poisoned")}),
}

EVIL = {"class_path": "evil_marker.Head", "init_args": {}}
SHELL = {"class_path": "os.system", "init_args": {"command": "touch poisoned"}}
POPEN = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "poisoned"]}}
LAYER = {"class_path": "torch.nn.TransformerEncoderLayer", "init_args": {"activation": "evil_marker.function"}}
LAMBDA = "torch.optim.lr_scheduler.LambdaLR"
#: Hyper-parameters of plain types that name code.
HYPER_PARAMETERS: dict[str, dict[str, Any]] = {
    "third-party instantiator": {"_instantiator": "evil_marker.function"},
    "os.system as instantiator": {"_instantiator": "os.system"},
    "Lightning's instantiator": {"_instantiator": "lightning.pytorch.cli.instantiate_module", "head": EVIL},
    "Lightning's instantiator with a class path": {
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
        "_class_path": "evil_marker.Head",
    },
    "class path of the model": {"_class_path": "evil_marker.Head"},
    "third-party head": {"head": EVIL},
    "os.system as head": {"head": SHELL},
    "subprocess as head": {"head": POPEN},
    "third-party optimizer": {"optimizer": EVIL},
    "subprocess as optimizer": {"optimizer": POPEN},
    "third-party scheduler": {"scheduler": EVIL},
    "nested third-party class in head": {"head": {**LAYER, "init_args": {"activation": EVIL}}},
    "third-party function in head": {"head": LAYER},
    "nested subprocess in head": {"head": {**LAYER, "init_args": {"activation": POPEN}}},
    "third-party class in optimizer": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": EVIL}}},
    "os.system in scheduler": {"scheduler": {"class_path": LAMBDA, "init_args": {"lr_lambda": "os.system"}}},
    "third-party function in scheduler": {
        "scheduler": {"class_path": LAMBDA, "init_args": {"lr_lambda": "evil_marker.function"}}
    },
    "os.system through a torch module": {"head": {"class_path": "torch.nn.modules.module.os.system", "init_args": {}}},
    "torch.hub.load": {"head": {"class_path": "torch.hub.load", "init_args": {"repo_or_dir": "a/b"}}},
    "torchmetrics class that downloads weights": {
        "head": {"class_path": "torchmetrics.functional.image.lpips.Vgg16", "init_args": {}}
    },
    "torch script": {"head": {"class_path": "torch.utils.model_dump.__main__.main", "init_args": {}}},
    "LightningCLI": {"head": {"class_path": "lightning.pytorch.cli.LightningCLI", "init_args": {}}},
    "ImageClassifier as head": {"head": {"class_path": "project.classifier.ImageClassifier", "init_args": {}}},
    "torchvision function that downloads weights": {
        "head": {"class_path": "torchvision.models.get_model", "init_args": {"name": "vgg11"}}
    },
    "class path is a list": {"head": {"class_path": ["evil_marker", "Head"], "init_args": {}}},
    "init_args is a string": {"head": {"class_path": "torch.nn.Linear", "init_args": "evil_marker"}},
    "optimizer is a string": {"optimizer": "evil_marker.Head"},
    "optimizer is a URL": {"optimizer": "http://127.0.0.1:9/evil.yaml"},
    "weights of a third-party package": {"weights": "pkg:evil_marker"},
    "weights of a third-party submodule": {"weights": "pkg:evil_package.inside"},
    "weights at a URL": {"weights": "http://127.0.0.1:9/evil.pth"},
    "weights from a pipe": {"weights": "pipe:touch poisoned/.pth"},
    "backbone of the hub": {"backbone": "timm/hf-hub:stranger/evil", "weights": "DEFAULT"},
    "backbone of the hub, alternative spelling": {"backbone": "timm/hf_hub:stranger/evil", "weights": None},
    "backbone in a local folder": {"backbone": "timm/local-dir:.", "weights": "DEFAULT"},
    "third-party module as backbone": {"backbone": "evil_marker", "weights": None},
    "unknown key": {"evil_marker": "evil_marker.Head"},
}


#: ``load`` builds no scheduler and does not resolve these strings; only the parser would import them.
INERT_IN_LOAD = ("os.system in scheduler", "third-party function in scheduler")


def hostile_checkpoints(valid: Checkpoint) -> dict[str, Callable[[], bytes]]:
    """Functions that build the files, by name."""

    def copy() -> Checkpoint:
        checkpoint: Checkpoint = torch.load(io.BytesIO(serialize(valid)), weights_only=True)
        return checkpoint

    def with_payload(place: str, payload: Payload) -> bytes:
        checkpoint = copy()
        INJECTIONS[place](checkpoint, payload)
        return serialize(checkpoint)

    def with_hyper_parameters(values: dict[str, Any]) -> bytes:
        checkpoint = copy()
        checkpoint["hyper_parameters"].update(values)
        return serialize(checkpoint)

    return {
        **{f"code in {place}": (lambda p=place: with_payload(p, PAYLOADS["os.system"])) for place in INJECTIONS},
        **{f"call of {name}": (lambda n=name: with_payload("an unknown key", PAYLOADS[n])) for name in PAYLOADS},
        **{name: (lambda build=build: build(copy())) for name, build in FILES.items()},
        **{name: (lambda v=values: with_hyper_parameters(v)) for name, values in HYPER_PARAMETERS.items()},
    }


def config(key: str, value: str) -> str:
    """A config that sets one key."""
    section, name = key.split(".")
    return f"{section}:\n  {name}: {value}\n"


HEAD, OPTIMIZER, SCHEDULER, SOURCE = "model.head", "model.optimizer", "model.scheduler", "data.source"
POPEN_YAML = "{class_path: subprocess.Popen, init_args: {args: [touch, poisoned]}}"
EVIL_YAML = "{class_path: evil_marker.Head}"
FOLDER = "class_path: torchvision.datasets.ImageFolder, init_args: {root: photos"
#: Configs that name code, access the network or exhaust the parser.
CONFIGS: dict[str, str] = {
    "YAML tag that calls": "model: !!python/object/apply:os.system ['touch poisoned']\n",
    "YAML tag that instantiates": "model: !!python/object/new:subprocess.Popen [[touch, poisoned]]\n",
    "YAML tag that imports": "model: !!python/module:evil_marker\n",
    "YAML tag that names a class": "model: {head: !!python/name:evil_marker.Head }\n",
    "YAML tag in a string": config(HEAD, "\"!!python/object/apply:os.system ['touch poisoned']\""),
    "allow_imports in the config": f"allow_imports: [evil_marker]\n{config(HEAD, EVIL_YAML)}",
    "allow_imports in the section of the verb": f"fit: {{allow_imports: evil_marker}}\n{config(HEAD, EVIL_YAML)}",
    **{
        f"{kind} as {key}": config(key, value)
        for key in (
            *(HEAD, OPTIMIZER, SCHEDULER, SOURCE, "data.augment"),
            *("trainer.logger", "trainer.profiler", "trainer.strategy", "trainer.accelerator"),
        )
        for kind, value in (("third-party class", EVIL_YAML), ("subprocess", POPEN_YAML))
    },
    **{
        f"third-party class in the list {key}": config(key, f"[{EVIL_YAML}]")
        for key in ("data.augment", "trainer.callbacks", "trainer.plugins", "trainer.logger")
    },
    "third-party class by name": config(HEAD, "evil_marker.Head"),
    "third-party function": config(HEAD, "evil_marker.function"),
    "os.system": config(HEAD, "os.system"),
    "os.system through a torch module": config(HEAD, "torch.nn.modules.module.os.system"),
    "script that runs on import": config(HEAD, "torch.utils.model_dump.__main__.main"),
    "nested third-party class in head": config(
        HEAD, f"{{class_path: torch.nn.TransformerEncoderLayer, init_args: {{activation: {EVIL_YAML}}}}}"
    ),
    "os.system in scheduler": config(SCHEDULER, f"{{class_path: {LAMBDA}, init_args: {{lr_lambda: os.system}}}}"),
    "third-party function in scheduler": config(
        SCHEDULER, f"{{class_path: {LAMBDA}, init_args: {{lr_lambda: evil_marker.function}}}}"
    ),
    "third-party class in an untyped argument": config(
        "trainer.profiler",
        f"{{class_path: lightning.pytorch.profilers.PyTorchProfiler, init_args: {{schedule: {EVIL_YAML}}}}}",
    ),
    "third-party class in dict_kwargs": config(
        SOURCE,
        f"{{class_path: torchvision.datasets.ImageNet, init_args: {{root: x}}, dict_kwargs: {{loader: {EVIL_YAML}}}}}",
    ),
    "third-party class in a logger's argument": config(
        "trainer.logger",
        "{class_path: lightning.pytorch.loggers.TensorBoardLogger, init_args: {save_dir: x, sub_dir: "
        + EVIL_YAML
        + "}}",
    ),
    "third-party function in a callback": config(
        "trainer.callbacks",
        "[{class_path: lightning.pytorch.callbacks.LambdaCallback, init_args: {on_fit_start: evil_marker.function}}]",
    ),
    "third-party class in a plugin": config(
        "trainer.plugins",
        "[{class_path: lightning.pytorch.plugins.AsyncCheckpointIO, init_args: {checkpoint_io: " + EVIL_YAML + "}}]",
    ),
    "third-party function in a transform": config(
        "data.augment", "[{class_path: torchvision.transforms.v2.Lambda, init_args: {lambd: evil_marker.function}}]"
    ),
    **{
        f"{loader} as image loader": config(SOURCE, f"{{{FOLDER}, loader: {loader}}}}}")
        for loader in (
            *("evil_marker.function", "os.system", "torch.load", "torch.hub.load", "torch.ops.load_library"),
            *("torch.utils.cpp_extension.load", "torchvision.datasets.utils.extract_archive"),
            *("torchvision.datasets.mnist.extract_archive", "lightning.pytorch.core.saving.load_hparams_from_yaml"),
            *("lightning.fabric.utilities.cloud_io._load", "torchvision.io.read_video", "subprocess.check_output"),
        )
    },
    **{f"model config at {url}": f"model: {url}\n" for url in ("http://127.0.0.1:9/a.yaml", "memory://a.yaml")},
    "optimizer config at a URL": config(OPTIMIZER, "simplecache::http://127.0.0.1:9/a.yaml"),
    "interpolation": config("data.root", "${oc.env:HOME}${evil_marker.function:}"),
    "jsonnet": 'local a = importstr "precious"; {model: {head: a}}',
    "billion laughs": "a: &a [x,x]\nb: &b [*a,*a]\nmodel: {classes: *b, head: *b}\n",
    "recursive alias": "model: &m {head: *m}\n",
    "deep nesting": "model: " + "[" * 3000,
}
SCHEMES = ("http", "https", "ftp", "s3", "gcs", "hf", "github", "memory", "file", "simplecache::http", "zip://a::http")
#: Flags that name code or access the network.
FLAGS: dict[str, list[str]] = {
    **{f"-c with {scheme}": ["-c", f"{scheme}://127.0.0.1:9/evil.yaml"] for scheme in SCHEMES},
    **{f"--config={scheme}": [f"--config={scheme}://127.0.0.1:9/evil.yaml"] for scheme in SCHEMES[:4]},
    **{
        f"URL as {key}": [f"--{key}", "http://127.0.0.1:9/evil.yaml"]
        for key in (HEAD, OPTIMIZER, SOURCE, "model", "data", "trainer", "features", "trainer.callbacks")
    },
    "checkpoint at a URL": ["--ckpt_path", "http://127.0.0.1:9/evil.ckpt"],
    "checkpoint in a registry": ["--ckpt_path", "registry:stranger/evil"],
    "third-party head": ["--model.head", "evil_marker.Head"],
    "help of a third-party class": ["--model.head.help", "evil_marker.Head"],
    "help of os.system": ["--model.head.help", "os.system"],
}
