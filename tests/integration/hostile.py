"""A corpus of checkpoints and configs as a stranger might write them.

Each checkpoint is made of a good one. All aim at what a file can make a process do: import ``evil_marker``, which the
tests put on the path, make the file ``poisoned``, start a program, or reach the network.
"""

from __future__ import annotations

import builtins
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


class Calls:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


CALLS = {
    "os.system": Calls(os.system, "touch poisoned"),
    "os.mkdir": Calls(os.mkdir, "poisoned"),
    "open": Calls(open, "poisoned", "w"),
    "exec": Calls(builtins.exec, "import evil_marker"),
    "eval": Calls(builtins.eval, "__import__('evil_marker')"),
    "import_module": Calls(importlib.import_module, "evil_marker"),
    "Popen": Calls(subprocess.Popen, ["touch", "poisoned"]),
    "rmtree": Calls(shutil.rmtree, "precious"),
    "getattr": Calls(getattr, "", "join"),
    "torch.load": Calls(torch.load, "other.ckpt"),
    "torch.hub": Calls(torch.hub.load, "stranger/repository", "net"),
    "torch.jit": Calls(torch.jit.load, "evil.pt"),
    "torch.save": Calls(torch.save, {}, "poisoned"),
}
#: Where in a checkpoint pickled code can lie.
PLACES: dict[str, Callable[[Checkpoint, Any], None]] = {
    "state_dict": lambda c, x: c["state_dict"].update({"head.bias": x}),
    "hyper_parameters": lambda c, x: c["hyper_parameters"].update(backbone=x),
    "init_args": lambda c, x: c["hyper_parameters"]["optimizer"]["init_args"].update(lr=x),
    "callbacks": lambda c, x: c["callbacks"].update(Mine=x),
    "optimizer_states": lambda c, x: c["optimizer_states"][0]["state"].update({99: x}),
    "lr_schedulers": lambda c, x: c.update(lr_schedulers=[x]),
    "loops": lambda c, x: c["loops"].update(fit_loop=x),
    "transfer": lambda c, x: c["transfer"].update(classes=x),
    "a key of its own": lambda c, x: c.update(more=x),
    "a key of a dict": lambda c, x: c.update(more={(x, 1): 1}),
}


def zipped(pickled: bytes) -> bytes:
    """A file as torch.save writes it, with this as its pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def torchscript() -> bytes:
    """A program of TorchScript."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 would rather export
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), buffer)
    return buffer.getvalue()


def tarred(pickled: bytes) -> bytes:
    """A file as torch wrote it before 2017."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            member = tarfile.TarInfo(name)
            member.size = len(pickled)
            archive.addfile(member, io.BytesIO(pickled))
    return buffer.getvalue()


def saved(checkpoint: Any, zipped: bool = True) -> bytes:
    """The bytes that torch.save writes."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


#: Pickles by hand: classes that are not to be imported, attributes set, old ways to call.
PICKLES = {
    "a class of a stranger's": b"cevil_marker\nHead\n.",
    "a call of a stranger's": b"cevil_marker\nHead\n)R.",
    "an object built": b"cevil_marker\nHead\n)\x81}b.",
    "INST": b"(S'touch poisoned'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'touch poisoned'\no.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0etouch poisoned\x85R.",
    "EXT1": b"\x80\x02\x82\x01.",
    "a dotted name": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c\x0etouch poisoned\x85R.",
    "PERSID": b"Pevil_marker\n.",
    "no end": b"\x80\x02}" + b"(" * 1000,
}
#: Files whole.
FILES: dict[str, Callable[[Checkpoint], bytes]] = {
    **{f"pickle, {name}": (lambda c, raw=raw: zipped(raw)) for name, raw in PICKLES.items()},
    **{f"plain pickle, {name}": (lambda c, raw=raw: raw) for name, raw in PICKLES.items()},
    "legacy format": lambda c: saved({**c, "more": CALLS["os.system"]}, zipped=False),
    "tar format": lambda c: tarred(pickle.dumps(CALLS["os.system"])),
    "torchscript": lambda c: torchscript(),
    "a numpy array of objects": lambda c: saved({**c, "more": np.array([CALLS["os.system"]], dtype=object)}),
    "a module whole": lambda c: saved({**c, "more": torch.nn.Linear(2, 2)}),
    "a partial": lambda c: saved({**c, "more": __import__("functools").partial(os.system, "touch poisoned")}),
}

EVIL = {"class_path": "evil_marker.Head", "init_args": {}}
SHELL = {"class_path": "os.system", "init_args": {"command": "touch poisoned"}}
POPEN = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "poisoned"]}}
LAYER = {"class_path": "torch.nn.TransformerEncoderLayer", "init_args": {"activation": "evil_marker.function"}}
LAMBDA = "torch.optim.lr_scheduler.LambdaLR"
#: Hyper-parameters of plain types, which name code.
NAMES: dict[str, dict[str, Any]] = {
    "another instantiator": {"_instantiator": "evil_marker.function"},
    "an instantiator of a shell": {"_instantiator": "os.system"},
    "Lightning's instantiator": {"_instantiator": "lightning.pytorch.cli.instantiate_module", "head": EVIL},
    "Lightning's instantiator of another class": {
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
        "_class_path": "evil_marker.Head",
    },
    "another class": {"_class_path": "evil_marker.Head"},
    "a stranger's head": {"head": EVIL},
    "a shell as the head": {"head": SHELL},
    "a program as the head": {"head": POPEN},
    "a stranger's optimizer": {"optimizer": EVIL},
    "a program as the optimizer": {"optimizer": POPEN},
    "a stranger's scheduler": {"scheduler": EVIL},
    "a head in a head": {"head": {**LAYER, "init_args": {"activation": EVIL}}},
    "a function in a head": {"head": LAYER},
    "a program in a head": {"head": {**LAYER, "init_args": {"activation": POPEN}}},
    "a class in an optimizer": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": EVIL}}},
    "a function in a scheduler": {"scheduler": {"class_path": LAMBDA, "init_args": {"lr_lambda": "os.system"}}},
    "a stranger's function in a scheduler": {
        "scheduler": {"class_path": LAMBDA, "init_args": {"lr_lambda": "evil_marker.function"}}
    },
    "by way of a module of torch": {"head": {"class_path": "torch.nn.modules.module.os.system", "init_args": {}}},
    "a function of torch that loads": {"head": {"class_path": "torch.hub.load", "init_args": {"repo_or_dir": "a/b"}}},
    "a network of a library's that is downloaded": {
        "head": {"class_path": "torchmetrics.functional.image.lpips.Vgg16", "init_args": {}}
    },
    "a program of torch": {"head": {"class_path": "torch.utils.model_dump.__main__.main", "init_args": {}}},
    "the command line itself": {"head": {"class_path": "lightning.pytorch.cli.LightningCLI", "init_args": {}}},
    "the classifier itself": {"head": {"class_path": "project.classifier.ImageClassifier", "init_args": {}}},
    "a network that downloads": {
        "head": {"class_path": "torchvision.models.get_model", "init_args": {"name": "vgg11"}}
    },
    "a class path that is none": {"head": {"class_path": ["evil_marker", "Head"], "init_args": {}}},
    "arguments that are none": {"head": {"class_path": "torch.nn.Linear", "init_args": "evil_marker"}},
    "a part by its name alone": {"optimizer": "evil_marker.Head"},
    "a part in a file": {"optimizer": "http://127.0.0.1:9/evil.yaml"},
    "weights of a stranger's package": {"weights": "pkg:evil_marker"},
    "weights in a module of a package": {"weights": "pkg:evil_package.inside"},
    "weights from the network": {"weights": "http://127.0.0.1:9/evil.pth"},
    "weights of a shell": {"weights": "pipe:touch poisoned/.pth"},
    "a backbone of the hub": {"backbone": "timm/hf-hub:stranger/evil", "weights": "DEFAULT"},
    "a backbone of the hub by another name": {"backbone": "timm/hf_hub:stranger/evil", "weights": None},
    "a backbone in a folder": {"backbone": "timm/local-dir:.", "weights": "DEFAULT"},
    "a backbone of a module": {"backbone": "evil_marker", "weights": None},
    "a key of nobody's": {"evil_marker": "evil_marker.Head"},
}


#: Names of functions are plain strings to ``load``, which makes no scheduler: the parser alone would import them.
INERT = ("a function in a scheduler", "a stranger's function in a scheduler")


def hostile_checkpoints(good: Checkpoint) -> dict[str, Callable[[], bytes]]:
    """Builders of the files, by name."""

    def copy() -> Checkpoint:
        whole: Checkpoint = torch.load(io.BytesIO(saved(good)), weights_only=True)
        return whole

    def placed(place: str, call: Calls) -> bytes:
        checkpoint = copy()
        PLACES[place](checkpoint, call)
        return saved(checkpoint)

    def named(values: dict[str, Any]) -> bytes:
        checkpoint = copy()
        checkpoint["hyper_parameters"].update(values)
        return saved(checkpoint)

    return {
        **{f"code in {place}": (lambda p=place: placed(p, CALLS["os.system"])) for place in PLACES},
        **{f"a call of {name}": (lambda n=name: placed("a key of its own", CALLS[n])) for name in CALLS},
        **{name: (lambda make=make: make(copy())) for name, make in FILES.items()},
        **{name: (lambda v=values: named(v)) for name, values in NAMES.items()},
    }


def part(key: str, value: str) -> str:
    """A config that sets one key."""
    section, name = key.split(".")
    return f"{section}:\n  {name}: {value}\n"


HEAD, OPTIMIZER, SCHEDULER, SOURCE = "model.head", "model.optimizer", "model.scheduler", "data.source"
POPEN_YAML = "{class_path: subprocess.Popen, init_args: {args: [touch, poisoned]}}"
EVIL_YAML = "{class_path: evil_marker.Head}"
FOLDER = "class_path: torchvision.datasets.ImageFolder, init_args: {root: photos"
#: Configs whose text names code, or reaches out.
CONFIGS: dict[str, str] = {
    "a tag that calls": "model: !!python/object/apply:os.system ['touch poisoned']\n",
    "a tag that makes": "model: !!python/object/new:subprocess.Popen [[touch, poisoned]]\n",
    "a tag that imports": "model: !!python/module:evil_marker\n",
    "a tag that names": "model: {head: !!python/name:evil_marker.Head }\n",
    "a tag in a value": part(HEAD, "\"!!python/object/apply:os.system ['touch poisoned']\""),
    "a widening of what is allowed": f"allow_imports: [evil_marker]\n{part(HEAD, EVIL_YAML)}",
    "a widening in the verb's own": f"fit: {{allow_imports: evil_marker}}\n{part(HEAD, EVIL_YAML)}",
    **{
        f"{what} as {key}": part(key, value)
        for key in (
            *(HEAD, OPTIMIZER, SCHEDULER, SOURCE, "data.augment"),
            *("trainer.logger", "trainer.profiler", "trainer.strategy", "trainer.accelerator"),
        )
        for what, value in (("a stranger's class", EVIL_YAML), ("a program", POPEN_YAML))
    },
    **{
        f"a stranger's class in {key}": part(key, f"[{EVIL_YAML}]")
        for key in ("data.augment", "trainer.callbacks", "trainer.plugins", "trainer.logger")
    },
    "a stranger's class by its name": part(HEAD, "evil_marker.Head"),
    "a stranger's function": part(HEAD, "evil_marker.function"),
    "a shell": part(HEAD, "os.system"),
    "a shell by way of torch": part(HEAD, "torch.nn.modules.module.os.system"),
    "a program that runs when imported": part(HEAD, "torch.utils.model_dump.__main__.main"),
    "a head in a head": part(
        HEAD, f"{{class_path: torch.nn.TransformerEncoderLayer, init_args: {{activation: {EVIL_YAML}}}}}"
    ),
    "a function in a scheduler": part(SCHEDULER, f"{{class_path: {LAMBDA}, init_args: {{lr_lambda: os.system}}}}"),
    "a stranger's function in a scheduler": part(
        SCHEDULER, f"{{class_path: {LAMBDA}, init_args: {{lr_lambda: evil_marker.function}}}}"
    ),
    "an argument of any kind": part(
        "trainer.profiler",
        f"{{class_path: lightning.pytorch.profilers.PyTorchProfiler, init_args: {{schedule: {EVIL_YAML}}}}}",
    ),
    "more arguments": part(
        SOURCE,
        f"{{class_path: torchvision.datasets.ImageNet, init_args: {{root: x}}, dict_kwargs: {{loader: {EVIL_YAML}}}}}",
    ),
    "what a logger is given": part(
        "trainer.logger",
        "{class_path: lightning.pytorch.loggers.TensorBoardLogger, init_args: {save_dir: x, sub_dir: "
        + EVIL_YAML
        + "}}",
    ),
    "what a callback calls": part(
        "trainer.callbacks",
        "[{class_path: lightning.pytorch.callbacks.LambdaCallback, init_args: {on_fit_start: evil_marker.function}}]",
    ),
    "what a plugin wraps": part(
        "trainer.plugins",
        "[{class_path: lightning.pytorch.plugins.AsyncCheckpointIO, init_args: {checkpoint_io: " + EVIL_YAML + "}}]",
    ),
    "a transform of a stranger's": part(
        "data.augment", "[{class_path: torchvision.transforms.v2.Lambda, init_args: {lambd: evil_marker.function}}]"
    ),
    **{
        f"images read by {loader}": part(SOURCE, f"{{{FOLDER}, loader: {loader}}}}}")
        for loader in (
            *("evil_marker.function", "os.system", "torch.load", "torch.hub.load", "torch.ops.load_library"),
            *("torch.utils.cpp_extension.load", "torchvision.datasets.utils.extract_archive"),
            *("torchvision.datasets.mnist.extract_archive", "lightning.pytorch.core.saving.load_hparams_from_yaml"),
            *("lightning.fabric.utilities.cloud_io._load", "torchvision.io.read_video", "subprocess.check_output"),
        )
    },
    **{
        f"a config at {url} as the model": f"model: {url}\n" for url in ("http://127.0.0.1:9/a.yaml", "memory://a.yaml")
    },
    "a config elsewhere as a part": part(OPTIMIZER, "simplecache::http://127.0.0.1:9/a.yaml"),
    "interpolation": part("data.root", "${oc.env:HOME}${evil_marker.function:}"),
    "jsonnet": 'local a = importstr "precious"; {model: {head: a}}',
    "a million laughs": "a: &a [x,x]\nb: &b [*a,*a]\nmodel: {classes: *b, head: *b}\n",
    "itself": "model: &m {head: *m}\n",
    "deeply nested": "model: " + "[" * 3000,
}
SCHEMES = ("http", "https", "ftp", "s3", "gcs", "hf", "github", "memory", "file", "simplecache::http", "zip://a::http")
#: Flags, without a file.
FLAGS: dict[str, list[str]] = {
    **{f"-c with {scheme}": ["-c", f"{scheme}://127.0.0.1:9/evil.yaml"] for scheme in SCHEMES},
    **{f"--config={scheme}": [f"--config={scheme}://127.0.0.1:9/evil.yaml"] for scheme in SCHEMES[:4]},
    **{
        f"a config elsewhere for {key}": [f"--{key}", "http://127.0.0.1:9/evil.yaml"]
        for key in (HEAD, OPTIMIZER, SOURCE, "model", "data", "trainer", "features", "trainer.callbacks")
    },
    "a checkpoint elsewhere": ["--ckpt_path", "http://127.0.0.1:9/evil.ckpt"],
    "a checkpoint in a registry": ["--ckpt_path", "registry:stranger/evil"],
    "a stranger's head": ["--model.head", "evil_marker.Head"],
    "help about a stranger's class": ["--model.head.help", "evil_marker.Head"],
    "help about a shell": ["--model.head.help", "os.system"],
}
