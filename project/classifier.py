"""ImageClassifier: a backbone, of which some or all is frozen, and a head, as a LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from project.checkpoints.restore import CheckpointMixin
from project.checkpoints.resume_checks import on_meta
from project.checkpoints.resumed_optimizer import validate_schedule
from project.config.class_path import ClassSpec
from project.errors import ConfigError, DataError, FrozenError
from project.evaluation.epoch_metrics import EpochMetrics
from project.features.provider import RowComputation, StoredFeatures
from project.features.row_loader import RowBatch
from project.models.backbone import Backbone, load_backbone
from project.models.heads import LinearHead
from project.models.loss import mean_over_processes
from project.models.optimizers import ArticleSGD
from project.models.schedules import Interval
from project.runtime import lightning_internals
from project.runtime.distributed import processes
from project.runtime.unsupported import refuse_unsupported
from project.task import SingleLabel, Task, Weight

HeadCallable = Callable[[int, int], nn.Module]
OptimizerCallable = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerCallable = Callable[[Optimizer], LRScheduler]
#: The command line knows a name alone; from Python a loaded backbone is taken as well.
if TYPE_CHECKING:
    BackboneName = str | Backbone
else:
    BackboneName = str


class Step(NamedTuple):
    """What a step makes of a batch, its padding left out.

    Attributes:
        loss: Its sum over the batch, and the weight to divide that by.
        probabilities: ``(B, C)``, float32, without a gradient.
        labels: int64 ``(B,)``.
        features: ``(B, D)``, what the head is given, without a gradient.
    """

    loss: tuple[torch.Tensor, Weight]
    probabilities: torch.Tensor
    labels: torch.Tensor
    features: torch.Tensor


class ImageClassifier(CheckpointMixin, pl.LightningModule):
    """A pretrained backbone and a new head; what is frozen stays bit for bit what it was.

    ``encode`` and ``classify`` are its two halves: images to rows at the cut, rows to logits.

    Args:
        backbone: A torchvision classifier, or ``timm/NAME``. From Python also a loaded
            :class:`~project.models.backbone.Backbone`, whose frozen stages are then shared, not copied.
        weights: A name of torchvision's or timm's weights, a file, ``pkg:NAME`` of an installed package, or null for
            random ones.
        trainable: What trains besides the head: head (nothing), a stage such as layer4 (from it to the end), or all.
        image_size: Side of the network's input in pixels; by default what the weights ask for.
        head: Class of the head; it gets the width of the features and the number of classes.
        optimizer: Class of the optimizer and its arguments.
        scheduler: Class of the learning-rate scheduler and its arguments. ``T_max`` and ``total_steps`` are the fit's
            length by default.
        scheduler_interval: Whether it is stepped once an epoch or once a step; by default once an epoch, and
            OneCycleLR and CyclicLR once a step.
        label_smoothing: Share of each label that is spread over all classes, in [0, 1).
        class_weights: Weight of each class in the loss, in order of the classes' names.
        channels_last: Keep images and weights in channels_last memory format, the faster one on CPUs and tensor cores.
        compile: Run the backbone through torch.compile.
        classes: Names of the classes; by default those of the data or of the checkpoint.

    Raises:
        ModelError: Unknown backbone or stage.
        WeightsError: Weights that are unknown, missing, altered, unsafe, or of another network.
        ConfigError: Arguments out of their range.
    """

    def __init__(
        self,
        backbone: BackboneName = "resnet50",
        weights: str | None = "IMAGENET1K_V1",
        trainable: str = "head",
        image_size: int | None = None,
        head: HeadCallable = LinearHead,
        optimizer: OptimizerCallable = ArticleSGD,
        scheduler: SchedulerCallable | None = None,
        scheduler_interval: Interval | None = None,
        label_smoothing: float = 0.0,
        class_weights: list[float] | None = None,
        channels_last: bool = True,
        compile: bool = False,
        classes: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone"] if isinstance(backbone, Backbone) else [])
        self.hparams.pop("_instantiator", None)
        for part in ("head", "optimizer", "scheduler"):  # plain types alone, so that the checkpoint loads safely
            if self.hparams[part] is not None:
                self.hparams[part] = ClassSpec.of(self.hparams[part]).as_dict()
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"model.label_smoothing has to be at least 0 and less than 1, not {label_smoothing}.")

        loaded = backbone if isinstance(backbone, Backbone) else load_backbone(backbone, weights, image_size)
        self.cut = loaded.cut_at(trainable)
        if loaded is backbone:
            self.backbone = loaded.specialized(self.cut)
            self.hparams.update(backbone=loaded.name, image_size=loaded.origin.image_size)
        else:
            self.backbone = loaded
            self.backbone.freeze(self.cut)
        #: SHA-256 of the frozen stages as they were loaded.
        self.frozen_sha256 = self.backbone.fingerprint(self.cut) if self.cut.trainable else self.backbone.sha256
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self.backbone.to(memory_format=self._layout)
        self.hparams["weights"] = (
            loaded.origin.weights
        )  # of a file, the whole path: checkpoints are loaded from anywhere
        if compile:
            self.backbone.compile_halves()
        self.task: Task = SingleLabel()
        self.head: nn.Module = nn.Identity()
        #: The stored rows that the present or the last fit trains on; ``None`` where it computes features anew.
        self.stored_features: StoredFeatures | None = None
        if classes is not None:
            self._name_classes(classes)

    def _name_classes(self, classes: Sequence[str]) -> None:
        """Make the parts whose size is the number of classes: head, loss weights, metrics."""
        self.hparams["classes"] = list(classes)
        head = ClassSpec.from_dict(self.hparams["head"])
        self.head = head.construct("model.head", nn.Module, self.backbone.feature_dim, len(classes))
        weights = self.hparams["class_weights"]
        if weights is not None and len(weights) != len(classes):
            raise ConfigError(f"model.class_weights: {len(weights)} weights for {len(classes)} classes ({classes}).")
        if weights is not None and min(weights) < 0:
            raise ConfigError(f"model.class_weights have to be at least 0, not {min(weights)}.")
        self.loss_weights: torch.Tensor | None
        self.register_buffer("loss_weights", None if weights is None else torch.tensor(weights), persistent=False)
        for stage in ("train", "val", "test"):
            self.add_module(f"{stage}_metrics", EpochMetrics(stage, self.task, classes))

    def setup(self, stage: str) -> None:
        """Take the classes from the data, and tell the data what the weights ask of an image.

        Raises:
            DataError: The data's classes are not those that the head was trained on.
            ConfigError: Nothing names the classes, or the precision would change the frozen weights.
        """
        precision = str(self.trainer.precision)
        if precision.endswith("-true") and precision != "32-true" and self.cut.frozen:
            raise ConfigError(
                f"trainer.precision {precision} would round the frozen weights. Use {precision.split('-')[0]}-mixed."
                if precision != "64-true"
                else "trainer.precision 64-true would convert the frozen weights. Use 32-true."
            )
        refuse_unsupported(getattr(self.trainer, "callbacks", []))
        self.backbone.freeze(self.cut)  # somebody may have called unfreeze() since
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "preprocessing"):
            data.preprocessing = self.backbone.preprocessing
        named = getattr(data, "classes", None)
        if named and self.classes and tuple(named) != self.classes:
            raise DataError(
                f"The data's classes ({', '.join(named)}) are not the model's ({', '.join(self.classes)})."
                "\nUse the data that the checkpoint was trained on, or start a new fit without --ckpt_path."
            )
        if named and not self.classes:
            self._name_classes(named)
        balance = getattr(data, "class_weights", None) if stage == "fit" else None
        if balance is not None:
            if self.hparams["class_weights"] is not None:
                raise ConfigError("data.balance loss and model.class_weights are both given: keep one.")
            self.loss_weights = torch.tensor(balance, device=self.device)
        if not self.classes:
            raise ConfigError("Nothing names the classes: give --data.root PATH to train, or --ckpt_path X.ckpt.")

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Run the frozen half: images to rows at the cut, without a gradient graph.

        Args:
            images: ``(B, 3, H, W)``, uint8 or float in [0, 1].

        Returns:
            Features ``(B, D)`` with ``trainable: head``, else maps ``(B, K, h, w)``.
        """
        return self.backbone.encode(images.contiguous(memory_format=self._layout), self.cut)

    def refine(self, rows: torch.Tensor) -> torch.Tensor:
        """Run the trainable stages of the backbone: rows at the cut to features ``(B, D)``."""
        return self.backbone.refine(rows, self.cut)

    def classify(self, rows: torch.Tensor) -> torch.Tensor:
        """Run the trained half: rows at the cut to logits ``(B, C)``."""
        logits: torch.Tensor = self.head(self.refine(rows))
        return logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images ``(B, 3, H, W)``, uint8 or float in [0, 1], to logits ``(B, C)``."""
        return self.classify(self.encode(images))

    def row_computation(self, device: torch.device, precision: str) -> RowComputation:
        """How rows of the frozen half are computed.

        Args:
            device: Where the model is.
            precision: Lightning's name of the precision, such as 32-true.
        """
        layout = "channels_last" if self.hparams["channels_last"] else "contiguous"
        return RowComputation(self.backbone, self.cut, self.encode, layout, device, precision)

    def _step(self, batch: Any, stage: str) -> Step:
        inputs, targets, *rest = batch
        stored = isinstance(batch, RowBatch)
        features = self.refine(inputs.to(self.backbone.mean.dtype) if stored else self.encode(inputs))
        logits = self.head(features).float()
        if rest and processes() > 1:  # one that has nothing but padding takes part with a loss of 0: the others wait
            valid = rest[0]
            logits, targets, features = logits[valid], targets[valid], features[valid]
        probabilities = self.task.probabilities(logits.detach())
        loss = self.task.loss(logits, targets, self.loss_weights, self.hparams["label_smoothing"])
        labels = self.task.labels(targets)
        self.epoch_metrics(stage).add(loss, probabilities, labels)
        return Step(loss, probabilities, labels, features.detach())

    def epoch_metrics(self, stage: str) -> EpochMetrics:
        """What the epoch of a stage, ``train``, ``val`` or ``test``, adds up to so far."""
        return cast(EpochMetrics, self.get_submodule(f"{stage}_metrics"))

    def _epoch_end(self, stage: str) -> None:
        # The loss is logged here rather than in each step: over stored rows, log() would take a fifth of an epoch.
        # And what is logged is the same in all processes already: log(sync_dist=True) is reduced when somebody looks,
        # and the progress bar looks in the first process alone, which then waits for the others for ever.
        values = self.epoch_metrics(stage).take(self.device)
        if stage == "train" and not values["train/loss"].isfinite():
            raise ConfigError(
                f"The training loss is no number any more in epoch {self.current_epoch + 1}: the fit has diverged.\n"
                "Lower the learning rate (model.optimizer.lr). The checkpoints of the epochs before are whole."
            )
        of_classes = {name: values.pop(name) for name in list(values) if "_of/" in name}
        shown = [name for name in values if name.endswith(("/loss", "/accuracy"))]
        self.log_dict({name: values.pop(name) for name in shown}, prog_bar=True)
        self.log_dict(values)
        if self.trainer.state.fn != "fit":
            self.log_dict(of_classes)
        elif of_classes:
            self._log_at_once(of_classes)

    def _log_at_once(self, values: dict[str, torch.Tensor]) -> None:
        """Log the scores of each class: of a hundred, log() would take twice as long as an epoch on rows."""
        for known in (self.trainer.callback_metrics, self.trainer.logged_metrics):
            known.update(values)
        if not self.trainer.sanity_checking:
            step = lightning_internals.logging_step(self.trainer)  # as Lightning counts for all else
            numbers = {**{name: float(value) for name, value in values.items()}, "epoch": self.current_epoch}
            for logger in self.loggers:
                logger.log_metrics(numbers, step)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Loss of a batch of images ``(B, 3, H, W)`` and labels ``(B,)``."""
        return mean_over_processes(*self._step(batch, "train").loss)

    def validation_step(  # type: ignore[override]
        self, batch: Any, batch_idx: int
    ) -> Step:
        """Loss and metrics of a batch; what is known of each image is for callbacks to look at."""
        return self._step(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Loss and metrics of a batch."""
        self._step(batch, "test")

    def predict_step(self, batch: tuple[torch.Tensor, Sequence[str]], batch_idx: int) -> Any:
        """Paths and probabilities ``(B, C)``, float32, of a batch of images and their paths."""
        images, paths = batch
        return paths, self.task.probabilities(self(images))

    def on_train_epoch_end(self) -> None:
        """Log the metrics of the epoch."""
        self._epoch_end("train")

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the epoch."""
        self._epoch_end("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the test."""
        self._epoch_end("test")

    def configure_optimizers(self) -> Any:
        """The injected optimizer over all that trains, and the injected scheduler."""
        optimizer, scheduler = self.make_optimizer(self.parameter_groups())
        if scheduler is None:
            return optimizer
        validate_schedule(self.make_optimizer(on_meta(self.parameter_groups()))[1])
        monitor, interval = getattr(scheduler, "monitor", "val/loss"), self.scheduler_interval()
        found = {"scheduler": scheduler, "monitor": monitor, "interval": interval, "frequency": 1}
        if isinstance(scheduler, ReduceLROnPlateau):
            found["interval"] = "epoch"
        if isinstance(scheduler, ReduceLROnPlateau) and str(monitor).startswith("val/"):
            if self.trainer.check_val_every_n_epoch is None:
                raise ConfigError(
                    "model.scheduler: ReduceLROnPlateau needs a validation at the end of an epoch. Leave "
                    "trainer.check_val_every_n_epoch null out, or use another scheduler."
                )
            if self.trainer.limit_val_batches == 0:
                raise ConfigError(
                    f"model.scheduler: ReduceLROnPlateau watches {monitor}, and this fit has no validation "
                    "(trainer.limit_val_batches 0). Use another scheduler."
                )
            found["frequency"] = self.trainer.check_val_every_n_epoch
        return {"optimizer": optimizer, "lr_scheduler": found}

    def on_fit_start(self) -> None:
        """Check that what is frozen is what was loaded.

        Raises:
            FrozenError: It has changed.
        """
        for stage in ("train", "val", "test"):
            self.epoch_metrics(stage).reset()  # an epoch that was broken off left its own
        self._check_frozen("before training")

    def on_train_end(self) -> None:
        """Check it again.

        Raises:
            FrozenError: It has changed.
        """
        self._check_frozen("in training")

    def _check_frozen(self, when: str) -> None:
        loaded, now = self.frozen_sha256, self.backbone.fingerprint(self.cut)
        if now != loaded:
            raise FrozenError(
                f"The frozen part of {self.backbone.name} has changed {when}: SHA-256 {loaded} as loaded, now {now}."
                "\nSome callback or code writes to it; do not use the checkpoints of this run."
            )
