"""The data module: splits, transforms and batches the images of a source."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from project.data.class_balance import Balance, ClassBalance
from project.data.dataset import ImageDataset, ImageLoader, collate
from project.data.image_index import ImageInfo, Index
from project.data.mixup import BatchMixer
from project.data.prediction_inputs import FileList, PredictionImages, find_images, images_of_source
from project.data.prediction_loader import PredictionImageSet, PredictionLoader
from project.data.samplers import EpochOrder, EpochSampler
from project.data.sources.base import Sample, Source, quote_names
from project.data.sources.factory import SourceArgument, open_source
from project.data.sources.files import Files
from project.data.split_fingerprint import name_fingerprint
from project.data.split_loader import SplitLoader
from project.data.splits import (
    HoldOut,
    Place,
    Placed,
    assign_places,
    empty_split_error,
    limit_classes,
    split,
    stratified_folds,
    unused_fractions,
)
from project.data.transforms import Augment, Transform, evaluation, training
from project.errors import ConfigError, DataError, join_names
from project.preprocessing import Preprocessing
from project.runtime import lightning_internals
from project.runtime.console import print_rank_zero, progress_counter
from project.runtime.distributed import ProcessGroup
from project.runtime.seeding import derive_seed, run_seed
from project.runtime.signals import ignore_signals
from project.runtime.system import cache_folder, cores


class ImageDataModule(pl.LightningDataModule):
    """Batches of images, uint8 ``(B, 3, H, W)``, and labels, int64 ``(B,)``.

    The constructor does no I/O. :meth:`prepare_data`, :meth:`setup`, :attr:`splits` and :attr:`classes` prepare the
    source on first use.

    Resize and crop come from the backbone's weights: :class:`~project.classifier.ImageClassifier` sets
    :attr:`preprocessing` when Lightning sets up both. Without a classifier, set it yourself.

    Args:
        root: Folder of images, ``root/CLASS/*`` or ``root/{train,val,test}/CLASS/*``; or a table (CSV, TSV or Parquet)
            with columns path and label, and optionally split and group.
        source: Source of labeled images, instead of ``root``: ``project.data.sources.Digits``, a torchvision data set
            such as ``torchvision.datasets.CIFAR10``, or ``project.data.published.HuggingFace``.
        predict: Images to predict: files, folders, glob patterns, tables, tar files, or - for names on standard input.
            The flag --images sets it. By default, all images of root or source.
        batch_size: Batch size per process.
        num_workers: Number of worker processes that load images. Default: number of cores - 1, from 1 to 8.
        val_fraction: Fraction of each class to hold out for validation if the data has no val split.
        test_fraction: Fraction of each class to hold out for the test if the data has no test split.
        fold: Cross-validation fold, such as 2/5: validate on the second of five folds, train on the others. The train
            and val splits of the data are merged first.
        split_seed: Seed of the held-out split, of the folds and of the images that per_class keeps.
        per_class: Number of training images to use of each class, chosen at random once val and test are held out;
            all by default.
        augment: Random transforms of training images: none, flip, standard (random crop, flip, color), trivial or rand
            (random crop, flip, and TrivialAugment or RandAugment); or a list of torchvision.transforms.v2 classes, each
            with class_path and init_args.
        mixup: MixUp of training images: alpha of the Beta distribution, such as 0.2; 0 disables it.
        cutmix: CutMix of training images: alpha of the Beta distribution, such as 1.0; 0 disables it. If mixup is set
            too, one of the two is chosen at random for each batch.
        balance: Compensate for class imbalance: sampler draws each class equally often, loss weights each class
            equally in the loss, none does neither.
        on_bad_image: When an image cannot be read: stop with its name, or skip it in every epoch. The command predict
            has its own flag, --on_bad_image.
        pin_memory: Copy batches to pinned memory, for faster transfer to a GPU if there is one.
    """

    def __init__(
        self,
        root: str | None = None,
        source: SourceArgument | None = None,
        predict: str | list[str] | None = None,
        batch_size: int = 32,
        num_workers: int | None = None,
        val_fraction: float = 0.2,
        test_fraction: float = 0.0,
        fold: str | None = None,
        split_seed: int = 0,
        per_class: int | None = None,
        augment: Augment | list[dict[str, Any] | nn.Module] = "none",
        mixup: float = 0.0,
        cutmix: float = 0.0,
        balance: Balance = "none",
        on_bad_image: Literal["stop", "skip"] = "stop",
        pin_memory: bool = True,
    ) -> None:
        super().__init__()
        if root is not None and source is not None:
            raise ConfigError(
                "data.root and data.source are both set; keep one. --data.source null overrides a config file."
            )
        if batch_size < 1:
            raise ConfigError(f"data.batch_size must be at least 1, got {batch_size}.")
        if num_workers is not None and num_workers < 0:
            raise ConfigError(f"data.num_workers must be at least 0, got {num_workers}.")
        if any(alpha != 0 and not 0.01 <= alpha <= 100 for alpha in (mixup, cutmix)):
            raise ConfigError("data.mixup and data.cutmix must each be 0, or from 0.01 to 100.")
        self.root = root
        self.source = open_source(root if root is not None else source)
        self.predict_inputs = [predict] if isinstance(predict, str) else predict
        #: Whether predict records the images that cannot be read; otherwise they stop it.
        self.records_bad_images = False
        #: Numbers of the images that this rank predicts, int64, ascending; ``None`` for its share of all.
        self.predict_numbers: np.ndarray | None = None
        #: The loader of the current or latest prediction.
        self.predict_loader: PredictionLoader | None = None
        self.batch_size = batch_size
        self.given_workers = num_workers
        self.num_workers = min(max(cores() - 1, 1), 8) if num_workers is None else num_workers
        self.augment = augment
        self.mixes = bool(mixup or cutmix)
        self.balance = balance
        self.pin_memory = pin_memory and torch.accelerator.is_available()
        self.preprocessing: Preprocessing | None = None
        #: Preprocessings of other backbones that predict the same images.
        self.further_preprocessings: Sequence[Preprocessing] = ()
        #: The loaders of train, val and test. Every run uses the same objects.
        self.loaders = {
            name: SplitLoader(functools.partial(self._image_loader, name), self.current_epoch)
            for name in ("train", "val", "test")
        }
        #: Split settings. Checkpoints store them, so that a resumed fit holds out the same images.
        self.hold_out = HoldOut(val_fraction, test_fraction, fold, split_seed, per_class)
        self._places: dict[Sample, Place] = {}
        self._mix_alphas = mixup, cutmix
        self._skips_bad_images = on_bad_image == "skip"

    @functools.cached_property
    def name(self) -> str:  # type: ignore[override]  # a cached property, because Lightning assigns to it
        """Name of the data in run folders. It is known without reading the data."""
        return self.source.name if self.source else "data"

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names in the order of their indices; ``None`` without labeled data. Prepares the source."""
        return self.source.classes if self.source else None

    @functools.cached_property
    def splits(self) -> dict[str, list[Sample]]:
        """Samples of ``train``, ``val`` and ``test``. The first access prepares the source and may read images.

        Raises:
            DataError: The data cannot be trained on.
        """
        if self.source is None:
            return {}
        self.source.require()
        for name, reason in unused_fractions(self.source.splits, self.hold_out).items():
            print_rank_zero(f"Data: {name} has no effect, because {reason}")
        splits = split(self.source.splits, self._placed, self.hold_out)
        if self._skips_bad_images:
            splits = {name: self._skip_unreadable(samples, name) for name, samples in splits.items()}
        if self.hold_out.per_class is not None:
            splits["train"] = self._limit_classes(splits["train"], self.hold_out.per_class)
        trained = {sample.label for sample in splits["train"]}
        for label, name in enumerate(self.source.classes):
            if label not in trained:
                raise DataError(
                    f"Class {name!r} has no training images left: all are held out or cannot be read. "
                    "Add images to it, or remove it."
                )
        return splits

    def image_infos(self, samples: Sequence[Sample], source: Source | None = None) -> list[ImageInfo]:
        """Properties of images, from the image index; images that are not indexed are read.

        Args:
            samples: N samples.
            source: The source that reads them. Default: :attr:`source`.

        Returns:
            N properties.
        """
        source = source or self.source
        assert source is not None  # there are no samples without a source
        with progress_counter("Reading images") as on_progress:
            return Index(cache_folder()).infos(source, samples, on_progress)

    def _placed(self, samples: Sequence[Sample]) -> Placed:
        """Samples with their places. The search for near-duplicates is slow: parts of earlier samples keep theirs."""
        if not all(sample in self._places for sample in samples):
            self._places = dict(assign_places(samples, self.image_infos(samples), self.hold_out.split_seed))
        return [(sample, self._places[sample]) for sample in samples]

    def _skip_unreadable(self, samples: list[Sample], where: str) -> list[Sample]:
        infos = self.image_infos(samples)
        bad = [sample.name for sample, info in zip(samples, infos, strict=True) if info.error]
        if bad:
            print_rank_zero(
                f"Data: skipping {len(bad)} of {len(samples)} images of {where} that cannot be read: {quote_names(bad)}"
            )
        return [sample for sample, info in zip(samples, infos, strict=True) if not info.error]

    def _limit_classes(self, samples: list[Sample], count: int) -> list[Sample]:
        assert self.source is not None
        kept = limit_classes(self._placed(samples), self.image_infos(samples), count, self.hold_out.split_seed)
        print_rank_zero(
            f"Data: {len(kept):,} of {len(samples):,} training images are used, at most {count} of each class "
            "(data.per_class)"
        )
        sizes = Counter(sample.label for sample in kept)
        few = [f"{name} ({sizes[label]})" for label, name in enumerate(self.source.classes) if sizes[label] < count]
        if few:
            print_rank_zero(f"Data: fewer training images than data.per_class: {join_names(few)}")
        return kept

    def prepare_data(self) -> None:
        """Prepare and split the data in one process, so that the other ranks find it in the caches."""
        if not getattr(self.trainer, "predicting", False):
            _ = self.splits

    def setup(self, stage: str) -> None:
        """Check that the splits that a stage needs have images.

        Raises:
            ConfigError: No data was specified.
            DataError: A split is empty.
        """
        if stage == "predict":
            if self.predict_inputs is None and self.source is None:
                raise ConfigError("Nothing to predict. Pass images or folders with --images PATH.")
            _ = self.predict_images
            return
        if self.source is None:
            raise ConfigError("No data. Pass an image folder with --data.root PATH.")
        for name in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]:
            if not self.splits[name]:
                raise empty_split_error(name, self.source.splits, self.hold_out)

    @property
    def class_weights(self) -> list[float] | None:
        """Class weights for the loss, inverse to class size, with a mean of 1 over the training images."""
        return self.class_balance.loss_weights

    @property
    def class_balance(self) -> ClassBalance:
        """How much each class counts in training."""
        return ClassBalance(self.balance, self.class_counts["train"])

    @property
    def training_labels(self) -> torch.Tensor:
        """Label of each training image, int64 ``(N,)``."""
        return torch.tensor([sample.label for sample in self.splits["train"]])

    @functools.cached_property
    def class_counts(self) -> dict[str, list[int]]:
        """Number of images of each class, in the order of the classes, by split."""
        counts = {name: Counter(sample.label for sample in samples) for name, samples in self.splits.items()}
        return {name: [count[label] for label in range(len(self.classes or ()))] for name, count in counts.items()}

    def training_folds(self, count: int) -> torch.Tensor:
        """Cross-validation fold of each training image, int64 ``(N,)``; see :func:`stratified_folds`.

        Args:
            count: Maximum number of folds.
        """
        return torch.tensor(stratified_folds(self._placed(self.splits["train"]), count))

    @functools.cached_property
    def validation_fingerprint(self) -> str:
        """SHA-256 of the names, labels and order of the validation images, see :func:`name_fingerprint`."""
        return name_fingerprint(self.splits["val"])

    def order(self, split_name: str) -> EpochOrder:
        """Image order of a split. The train split is shuffled and balanced, except with ``overfit_batches``.

        The seed is that of Lightning's ``seed_everything``, if it was called.
        """
        shuffle = split_name == "train" and not getattr(self.trainer, "overfit_batches", 0)
        weights = self.class_balance.sampling_weights(self.training_labels) if shuffle else None
        return self._order(len(self.splits[split_name]), shuffle, weights)

    def _order(self, count: int, shuffle: bool = False, weights: torch.Tensor | None = None) -> EpochOrder:
        rank, world_size = getattr(self.trainer, "global_rank", 0), getattr(self.trainer, "world_size", 1)
        return EpochOrder(count, shuffle, run_seed(), weights, rank, world_size, self.batch_size)

    def skip_batches(self, split_name: str) -> int:
        """Number of batches to skip in this epoch, because a resumed fit has already trained on them."""
        if split_name != "train" or self.trainer is None or not lightning_internals.is_resuming_epoch(self.trainer):
            return 0
        return lightning_internals.training_batches(self.trainer).processed

    def training_transform(self) -> Transform:
        """Transform of the train split."""
        return training(self._require_preprocessing(), self.augment)

    def evaluation_transform(self) -> Transform:
        """Transform of all other splits."""
        return evaluation(self._require_preprocessing())

    def _require_preprocessing(self) -> Preprocessing:
        if self.preprocessing is None:
            raise ConfigError("ImageDataModule.preprocessing is not set. Copy it from an ImageClassifier's backbone.")
        return self.preprocessing

    def current_epoch(self) -> int:
        """The current epoch; always 0 with ``overfit_batches``, so that every epoch has the same batches."""
        if self.trainer is None or self.trainer.overfit_batches:  # type: ignore[attr-defined]
            return 0
        return int(self.trainer.current_epoch)

    def train_dataloader(self) -> SplitLoader:
        """Batches of the train split, shuffled and augmented."""
        return self._reset_loader("train")

    def val_dataloader(self) -> SplitLoader:
        """Batches of the validation split."""
        return self._reset_loader("val")

    def test_dataloader(self) -> SplitLoader:
        """Batches of the test split."""
        return self._reset_loader("test")

    def _reset_loader(self, name: str) -> SplitLoader:
        self.loaders[name].close()  # settings may have changed since the last run
        return self.loaders[name]

    def teardown(self, stage: str) -> None:
        """Stop the worker processes."""
        for loader in self.loaders.values():
            loader.close()

    def on_exception(self, exception: BaseException) -> None:
        """Stop the worker processes."""
        self.teardown("")

    @functools.cached_property
    def predict_images(self) -> PredictionImages:
        """The images to predict. In a distributed run, rank zero lists the files for all ranks.

        Raises:
            ConfigError: Inputs cannot be combined.
            DataError: An input does not exist, or there are no images.
        """
        if self.predict_inputs is None:
            assert self.source is not None  # setup() raises without a source
            return images_of_source(self.source)
        ranks, images = ProcessGroup(), None
        with ranks.propagate_errors():
            if ranks.rank == 0:
                images = find_images(self.predict_inputs)
        files = images.samples if images is not None and isinstance(images.samples, FileList) else None
        files = ranks.gather(files)[0]
        if images is None:
            images = PredictionImages(Files(), files) if files is not None else find_images(self.predict_inputs)
        return images

    def predict_dataloader(self) -> PredictionLoader:
        """Batches of images and their paths: :class:`~project.data.prediction_loader.PredictionBatch`.

        The images are a list of tensors, uint8 ``(B, 3, H, W)``: in :attr:`preprocessing` and in each of
        :attr:`further_preprocessings`.
        """
        source, samples = self.predict_images
        preprocessings = [self._require_preprocessing(), *self.further_preprocessings]
        images = PredictionImageSet(samples, source, preprocessings, self.records_bad_images)
        numbers = self.predict_numbers
        if numbers is None:
            numbers = np.arange(len(samples))[ProcessGroup().rank_slice(len(samples))]
        self.predict_loader = PredictionLoader(images, numbers, self.batch_size, self.num_workers, self.pin_memory)
        return self.predict_loader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Mix the images of a training batch, on the device."""
        if self.mixes and self.trainer is not None and self.trainer.training:
            batch_idx = lightning_internals.training_batches(self.trainer).ready
            seed = derive_seed(run_seed(), "mix", self.trainer.current_epoch, batch_idx, self.trainer.global_rank)
            return BatchMixer(len(self.classes or ()), *self._mix_alphas)(batch, seed)
        return batch

    def _image_loader(self, name: str) -> DataLoader[Any]:
        assert self.source is not None  # setup() raises without a source
        transform = self.training_transform() if name == "train" else self.evaluation_transform()
        dataset = ImageDataset(self.splits[name], self.source, transform, run_seed())
        return self._loader(dataset, EpochSampler(self.order(name), lambda: self.skip_batches(name) * self.batch_size))

    def training_images(self, part: slice | Sequence[int]) -> DataLoader[Any]:
        """Batches of a part of the training images, once each, in the given order, without augmentation.

        Args:
            part: A slice of the split, or indices of images.
        """
        assert self.source is not None  # there are no splits without a source
        samples = self.splits["train"]
        chosen = samples[part] if isinstance(part, slice) else [samples[index] for index in part]
        dataset = ImageDataset(chosen, self.source, self.evaluation_transform())
        return self._loader(dataset, range(len(dataset)), persistent_workers=False)

    def _loader(
        self, dataset: ImageDataset, sampler: Iterable[int], persistent_workers: bool = True
    ) -> DataLoader[Any]:
        return ImageLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=persistent_workers and self.num_workers > 0,
            collate_fn=collate,
            worker_init_fn=ignore_signals,
            pin_memory=self.pin_memory,
        )
