"""ImageDataModule: a source, split, transformed and batched."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from project.data.dataset import ImageDataset, ImageLoader, NamedImageDataset, collate
from project.data.image_index import ImageInfo, Index
from project.data.image_io import list_images
from project.data.mixup import BatchMixer
from project.data.samplers import EpochOrder, EpochSampler
from project.data.sources.base import Sample, Source, quote_names
from project.data.sources.factory import SourceArgument, open_source
from project.data.sources.files import Files
from project.data.split_loader import SplitLoader
from project.data.splits import HoldOut, lacking, split
from project.data.transforms import Augment, Transform, evaluation, training
from project.errors import ConfigError, DataError
from project.preprocessing import Preprocessing
from project.runtime import lightning_internals
from project.runtime.console import print_rank_zero, progress_counter
from project.runtime.seeding import run_seed, seed_at
from project.runtime.signals import ignore_signals
from project.runtime.system import cache_folder, cores


class ImageDataModule(pl.LightningDataModule):
    """Batches of images, uint8 ``(B, 3, H, W)``, and labels ``(B,)``, int64.

    The constructor reads no data: :meth:`prepare_data`, :meth:`setup`, :attr:`splits` and :attr:`classes` prepare the
    source, once.

    How an image is resized and cropped comes from the backbone's weights: :class:`~project.classifier.ImageClassifier`
    sets :attr:`preprocessing` when Lightning sets both up. Without it, set it yourself.

    Args:
        root: Folder of images, ``root/CLASS/*`` or ``root/{train,val,test}/CLASS/*``; or a table of them, CSV, TSV or
            Parquet, with columns path, label and, if you like, split and group.
        source: Another source of labelled images, in place of ``root``: ``project.data.sources.Digits``, a data set of
            torchvision such as ``torchvision.datasets.CIFAR10``, or ``project.data.published.HuggingFace``.
        predict: An image, or a folder of images at any depth, to predict.
        batch_size: Images a batch, of each process.
        num_workers: Processes that read images; by default one fewer than there are cores, one at least, eight at most.
        val_fraction: Share of each class that is held out for validation, where the data has no split of its own.
        test_fraction: The same for the test.
        fold: Validate one fold of several and train on the others, such as 2/5, the second of five; train and val of
            the data are put together for it.
        split_seed: Seed of the hold-out and of the folds.
        augment: What is done to training images at random: none, flip, standard (random crop, flip, colour), trivial
            or rand (the crop, the flip, and TrivialAugment or RandAugment); or a list of torchvision.transforms.v2,
            each with its class_path and init_args.
        mixup: Mix pairs of training images: parameter of MixUp's Beta distribution, such as 0.2; 0 for none.
        cutmix: Put a part of one training image into another: parameter of CutMix's Beta distribution, such as 1.0; 0
            for none. With both, each batch gets one of the two.
        balance: Make up for classes of different sizes: sampler draws images of each class equally often, loss weighs
            the errors of each class equally, none does neither.
        on_bad_image: What to do about an image that cannot be read: stop and name it, or skip it in all epochs.
        pin_memory: Copy batches into page-locked memory, which makes their way to a GPU faster, where there is one.
    """

    def __init__(
        self,
        root: str | None = None,
        source: SourceArgument | None = None,
        predict: str | None = None,
        batch_size: int = 32,
        num_workers: int | None = None,
        val_fraction: float = 0.2,
        test_fraction: float = 0.0,
        fold: str | None = None,
        split_seed: int = 0,
        augment: Augment | list[dict[str, Any] | nn.Module] = "none",
        mixup: float = 0.0,
        cutmix: float = 0.0,
        balance: Literal["none", "sampler", "loss"] = "none",
        on_bad_image: Literal["stop", "skip"] = "stop",
        pin_memory: bool = True,
    ) -> None:
        super().__init__()
        if root is not None and source is not None:
            raise ConfigError(
                "data.root and data.source are both given: keep one; --data.source null drops a config's."
            )
        if batch_size < 1:
            raise ConfigError(f"data.batch_size has to be at least 1, not {batch_size}.")
        if num_workers is not None and num_workers < 0:
            raise ConfigError(f"data.num_workers has to be at least 0, not {num_workers}.")
        if any(parameter != 0 and not 0.01 <= parameter <= 100 for parameter in (mixup, cutmix)):
            raise ConfigError("data.mixup and data.cutmix have to be 0, or from 0.01 to 100.")
        self.root = root
        self.source = open_source(root if root is not None else source)
        self.predict_path = predict
        self.batch_size = batch_size
        self.num_workers = min(max(cores() - 1, 1), 8) if num_workers is None else num_workers
        self.augment = augment
        self.mixes = bool(mixup or cutmix)
        self.balance = balance
        self.pin_memory = pin_memory and torch.accelerator.is_available()
        self.preprocessing: Preprocessing | None = None
        #: The loaders of train, val and test, one object each for all runs.
        self.loaders = {
            name: SplitLoader(functools.partial(self._split_loader, name), self.epoch)
            for name in ("train", "val", "test")
        }
        #: How images are held out: a checkpoint keeps it, lest another fit train on what this one held.
        self.hold_out = HoldOut(val_fraction, test_fraction, fold, split_seed)
        self._mix = mixup, cutmix
        self._skip = on_bad_image == "skip"

    @functools.cached_property
    def name(self) -> str:  # type: ignore[override]  # cached, so that Lightning may set it as well
        """Name of the data, in folders of runs. It is known without reading the data."""
        return self.source.name if self.source else "data"

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes, in the order of their indices; ``None`` without labelled data.

        Calls :meth:`Source.prepare` if needed.
        """
        return self.source.classes if self.source else None

    @functools.cached_property
    def splits(self) -> dict[str, list[Sample]]:
        """Samples by ``train``, ``val`` and ``test``. The first time, the data is prepared and images may be read.

        Raises:
            DataError: The data is not fit to be trained on.
        """
        if self.source is None:
            return {}
        self.source.require()
        found = split(self.source.splits, self.facts, self.hold_out)
        if self._skip:
            found = {name: self._readable(samples, name) for name, samples in found.items()}
        for number, name in enumerate(self.source.classes):
            if all(sample.label != number for sample in found["train"]):
                raise DataError(
                    f"No image of class {name!r} is left to train on: all are held out, or cannot be read. "
                    "Add images of it, or remove it."
                )
        return found

    def facts(self, samples: Sequence[Sample], source: Source | None = None) -> list[ImageInfo]:
        """What is known of images; those not known yet are read.

        Args:
            samples: Whose.
            source: Reads them; by default that of the data.
        """
        source = source or self.source
        assert source is not None  # there would be no samples
        with progress_counter("Reading images") as done:
            return Index(cache_folder()).facts(source, samples, done)

    def _readable(self, samples: list[Sample], where: str, source: Source | None = None) -> list[Sample]:
        known = self.facts(samples, source)
        bad = [sample.name for sample, facts in zip(samples, known, strict=True) if facts.error]
        if bad:
            print_rank_zero(
                f"Data: skips {len(bad)} of {len(samples)} images of {where}, which cannot be read: {quote_names(bad)}"
            )
        return [sample for sample, facts in zip(samples, known, strict=True) if not facts.error]

    def prepare_data(self) -> None:
        """Prepare and split the data, in one process, so that the others find in the caches what it has read."""
        _ = self.splits
        if self._skip and self.predict_path is not None:
            _ = self.predicted

    def setup(self, stage: str) -> None:
        """Check that there are images for what is about to be done.

        Raises:
            ConfigError: No data was named.
            DataError: A split is empty.
        """
        if stage == "predict":
            if self.predict_path is None:
                raise ConfigError("Nothing to predict: name an image or a folder with --data.predict PATH.")
            return
        if self.source is None:
            raise ConfigError("No data: name a folder of images with --data.root PATH.")
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]
        for name in needed:
            if not self.splits[name]:
                raise lacking(name, self.source.splits, self.hold_out)

    @property
    def class_weights(self) -> list[float] | None:
        """Weight of each class in the loss that makes up for their sizes, with a mean of 1 over the training images."""
        if self.balance != "loss":
            return None
        counts = self.class_counts["train"]
        return [len(self.splits["train"]) / (len(counts) * count) if count else 0.0 for count in counts]

    def training_weights(self) -> torch.Tensor | None:
        """How often each training image is to come, relative to the others; ``None`` for each once an epoch."""
        if self.balance != "sampler":
            return None
        counts = self.class_counts["train"]
        return torch.tensor([1 / counts[sample.label] for sample in self.splits["train"]])

    @functools.cached_property
    def class_counts(self) -> dict[str, list[int]]:
        """How many images of each class there are, in the order of the classes, by split."""
        counts = {name: Counter(sample.label for sample in samples) for name, samples in self.splits.items()}
        return {name: [count[label] for label in range(len(self.classes or ()))] for name, count in counts.items()}

    def order(self, split_name: str) -> EpochOrder:
        """In which order the images of a split come: the train split's shuffled, unless it is over-fitted on.

        The seed is that of the run, if Lightning's ``seed_everything`` was called.
        """
        trains = split_name == "train" and not getattr(self.trainer, "overfit_batches", 0)
        weights = self.training_weights() if trains else None
        return self._order(len(self.splits[split_name]), trains, weights)

    def _order(self, count: int, trains: bool = False, weights: torch.Tensor | None = None) -> EpochOrder:
        rank, world_size = getattr(self.trainer, "global_rank", 0), getattr(self.trainer, "world_size", 1)
        return EpochOrder(count, trains, run_seed(), weights, rank, world_size, self.batch_size)

    def skip_batches(self, split_name: str) -> int:
        """Number of batches of this epoch that a resumed fit has trained on already."""
        if split_name != "train" or self.trainer is None or not lightning_internals.is_resuming_epoch(self.trainer):
            return 0
        return lightning_internals.training_batches(self.trainer).processed

    def training_transform(self) -> Transform:
        """What is done to an image of the train split."""
        return training(self._known(), self.augment)

    def evaluation_transform(self) -> Transform:
        """What is done to an image of any other split."""
        return evaluation(self._known())

    def epoch(self) -> int:
        """Number of the present epoch; 0 for all of them while a few batches are over-fitted on."""
        if self.trainer is None or self.trainer.overfit_batches:  # type: ignore[attr-defined]
            return 0
        return int(self.trainer.current_epoch)

    def train_dataloader(self) -> SplitLoader:
        """Batches of the train split, shuffled and augmented."""
        return self._loader_of("train")

    def val_dataloader(self) -> SplitLoader:
        """Batches of the validation split."""
        return self._loader_of("val")

    def test_dataloader(self) -> SplitLoader:
        """Batches of the test split."""
        return self._loader_of("test")

    def _loader_of(self, name: str) -> SplitLoader:
        self.loaders[name].close()  # a run may have other settings than the one before
        return self.loaders[name]

    def teardown(self, stage: str) -> None:
        """End the processes that read images."""
        for loader in self.loaders.values():
            loader.close()

    def on_exception(self, exception: BaseException) -> None:
        """End the processes that read images."""
        self.teardown("")

    @functools.cached_property
    def predicted(self) -> list[Sample]:
        """The images to predict.

        Raises:
            DataError: There are none.
        """
        path = Path(str(self.predict_path)).expanduser()
        if not path.exists():
            raise DataError(f"data.predict: there is no file or folder {self.predict_path}.")
        samples = [Sample(str(file), 0) for file in (list_images(path).images if path.is_dir() else [path])]
        if self._skip:
            samples = self._readable(samples, str(path), Files())
        if not samples:
            raise DataError(f"data.predict: there are no images in {self.predict_path}.")
        return samples

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of images, uint8 ``(B, 3, H, W)``, and their paths."""
        dataset = NamedImageDataset(self.predicted, Files(), self.evaluation_transform())
        return self._loader(dataset, EpochSampler(self._order(len(dataset))))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Mix the images of a training batch, on the device."""
        if self.mixes and self.trainer is not None and self.trainer.training:
            batch_idx = lightning_internals.training_batches(self.trainer).ready
            seed = seed_at(run_seed(), "mix", self.trainer.current_epoch, batch_idx, self.trainer.global_rank)
            return BatchMixer(len(self.classes or ()), *self._mix)(batch, seed)
        return batch

    def _known(self) -> Preprocessing:
        if self.preprocessing is None:
            raise ConfigError("ImageDataModule.preprocessing is not set: it comes from an ImageClassifier's backbone.")
        return self.preprocessing

    def _split_loader(self, name: str) -> DataLoader[Any]:
        assert self.source is not None  # setup() has refused it
        transform = self.training_transform() if name == "train" else self.evaluation_transform()
        dataset = ImageDataset(self.splits[name], self.source, transform, run_seed())
        return self._loader(dataset, EpochSampler(self.order(name), lambda: self.skip_batches(name) * self.batch_size))

    def _loader(self, dataset: ImageDataset, sampler: EpochSampler) -> DataLoader[Any]:
        return ImageLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=collate,
            worker_init_fn=ignore_signals,
            pin_memory=self.pin_memory,
        )
