"""ImageClassifier: LightningModule of a partly or fully frozen backbone and a head."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from project.checkpoints.compatibility import validate_classes
from project.checkpoints.restore import CheckpointMixin
from project.checkpoints.resume_checks import copy_groups
from project.checkpoints.resumed_optimizer import validate_scheduler
from project.config.class_path import ClassSpec
from project.data.prediction_loader import PredictionBatch
from project.errors import ConfigError, FrozenError
from project.evaluation.answers.calibration import KEY, Answers
from project.evaluation.answers.policy import AnswerPolicy
from project.evaluation.epoch_logging import log_epoch
from project.evaluation.epoch_metrics import EpochMetrics
from project.evaluation.step_outputs import Outputs, StepOutput
from project.features.frozen_prefix import PrefixSpec
from project.features.provider import StoredFeatures
from project.features.row_loader import RowBatch
from project.models.adapters import AdapterName, make_adapter
from project.models.backbone import Backbone, BatchNormMode
from project.models.cut import Cut
from project.models.heads import HeadCallable, LinearHead
from project.models.ineffective_settings import validate_cut, validate_fit
from project.models.l2_sp import L2SP
from project.models.loading import load_backbone
from project.models.loss import global_mean_loss
from project.models.optimizers import ArticleSGD
from project.models.readout import FeatureKind, validate_features
from project.models.schedules import Interval, frequency_of
from project.models.training_settings import validate_training_settings
from project.models.unfreezing import WARMUP, UnfreezingSchedule, WarmUp, plain_entries, scaled_rates
from project.models.weight_average import WeightAverage
from project.runtime import lightning_internals
from project.runtime.distributed import world_size
from project.runtime.unsupported import refuse_unsupported
from project.task import SingleLabel, Task

STAGES = ("train", "val", "val_ema", "test")
OptimizerCallable = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerCallable = Callable[[Optimizer], LRScheduler]
#: The command line accepts only a name; Python code can also pass a loaded backbone.
if TYPE_CHECKING:
    BackboneName = str | Backbone
else:
    BackboneName = str


class ImageClassifier(CheckpointMixin, pl.LightningModule):
    """A pretrained backbone and a new head. What is frozen of the backbone is bit-identical after training.

    ``encode`` maps images to rows at the cut, ``classify`` maps rows to logits.

    Args:
        backbone: A torchvision classifier, or ``timm/NAME``. Python code can also pass a loaded
            :class:`~project.models.backbone.Backbone`; its frozen stages are shared, not copied.
        weights: A name of torchvision's or timm's weights, a file, ``pkg:NAME`` of an installed package, or null for
            random weights.
        trainable: First stage to train: head (the head only), a stage such as layer4 or blocks.10 (it and all later
            ones), or all; -2 trains the last two stages. The head is always trained.
        image_size: Image size in pixels; by default that of the weights.
        head: Class of the head; it is called with the width of the features and the number of classes.
        optimizer: Class and arguments of the optimizer.
        scheduler: Class and arguments of the learning-rate scheduler. ``T_max`` and ``total_steps`` default to the
            length of the fit. project.models.schedules.WarmupCosine is a linear warm-up and a cosine.
        scheduler_interval: Step the scheduler every epoch or every step; by default every epoch, but every step for
            WarmupCosine, OneCycleLR and CyclicLR.
        label_smoothing: Label smoothing of the cross-entropy, in [0, 1).
        class_weights: Weight of each class in the loss, in the order of the class names.
        channels_last: Use the channels_last memory format, which is faster on CPUs and tensor cores.
        compile: Compile the backbone with torch.compile.
        classes: Class names; by default those of the data or of the checkpoint.
        head_init: Initial head: solved is the best linear head of the training images (L2-regularized logistic
            regression, the penalty chosen by cross-validation), solved_1se the same with the strongest penalty within
            one standard error of the best; random; auto is solved if the head is linear and the features fit in
            memory, or are stored. A head with a method fit, such as PrototypeHead, computes itself in its place.
        features: Which outputs of the backbone are the features: last, the output of the last stage; stages, the
            averaged outputs of all stages. For vision transformers: cls, the class token; mean, the mean of the patch
            tokens; cls+mean; last4, the class tokens of the last four blocks.
        lr_decay: Factor of the learning rate per stage towards the input, in (0, 1]: the head has the optimizer's
            rate, the last stage lr_decay times this rate, and so on.
        scheduler_frequency: Step the scheduler only at every so many epochs or steps.
        ema: Decay of an exponential moving average of the trained weights, such as 0.999. Each validation evaluates
            the average, too, and best.ckpt has the better of the two. Null for no average.
        batch_norm: BatchNorm in trained stages: frozen keeps the pretrained running statistics and trains only scale
            and shift; train normalizes with the statistics of each batch and updates the running ones.
        l2_sp: Strength alpha of the penalty alpha/2 times the squared distance of the trained stages' weights from the
            pretrained ones (L2-SP); 0 for none.
        interpolate: After a fit that trains stages of the backbone: off keeps the best epoch; auto also validates
            weights between the start of the fit and the best epoch (WiSE-FT), and keeps the best.
        adapter: What is trained of the stages that trainable names: none, all of it; bias, the biases; norm, the scales
            and biases of normalization layers; lora, low-rank updates of the weights of linear layers and convolutions.
        lora_rank: Rank of the updates of lora; 8 by default.
        lora_targets: Parts of the names of the layers that lora updates, such as qkv or layer4.0; by default all linear
            layers, and all convolutions that are not grouped.
        schedule: Staged unfreezing, instead of trainable: the first trainable stage after so many epochs, as in {0:
            head, 3: layer4, 6: layer3}; or a list such as [head, layer4, layer3], whose next entry begins when val/loss
            stops improving.
        schedule_patience: With a list: the next entry begins after so many validations without a lower val/loss; by
            default 2.
        schedule_warmup: The learning rate of a newly trained stage increases linearly over so many epochs.

    Raises:
        ModelError: Unknown backbone or stage.
        WeightsError: The weights are unknown, missing, modified, unsafe, or of another network.
        ConfigError: An argument is out of range.
    """

    def __init__(
        self,
        backbone: BackboneName = "resnet50",
        weights: str | None = "IMAGENET1K_V1",
        trainable: str | int = "head",
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
        head_init: Literal["auto", "solved", "solved_1se", "random"] = "auto",
        features: FeatureKind = "last",
        lr_decay: float = 1.0,
        scheduler_frequency: int = 1,
        ema: float | None = None,
        batch_norm: BatchNormMode = "frozen",
        l2_sp: float = 0.0,
        interpolate: Literal["off", "auto"] | bool = "off",
        adapter: AdapterName = "none",
        lora_rank: int | None = None,
        lora_targets: list[str] | None = None,
        schedule: dict[int | str, str | int] | list[str | int] | None = None,
        schedule_patience: int | None = None,
        schedule_warmup: float = WARMUP,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone"] if isinstance(backbone, Backbone) else [])
        self.hparams.pop("_instantiator", None)
        for part in ("head", "optimizer", "scheduler"):  # plain types, so that checkpoints load with weights_only
            if self.hparams[part] is not None:
                self.hparams[part] = ClassSpec.of(self.hparams[part]).as_dict()
        self.hparams["trainable"] = str(trainable)
        self.hparams["interpolate"] = interpolate or "off"  # YAML parses off as a boolean
        self.hparams["schedule"] = plain_entries(schedule)
        validate_training_settings(self.hparams)
        adapts = make_adapter(adapter, lora_rank, lora_targets)

        loaded = backbone if isinstance(backbone, Backbone) else load_backbone(backbone, weights, image_size)
        self.cut = loaded.cut_at(str(trainable))
        #: Staged unfreezing; ``None`` if the cut stays where it is.
        self.unfreezing: UnfreezingSchedule | None = None
        if self.hparams["schedule"] is not None:
            self.unfreezing = UnfreezingSchedule.parse(self.hparams["schedule"], schedule_patience, loaded.cut_at)
        #: Warm-up of each stage that is trained later than the first ones.
        self.warm_ups: dict[str, WarmUp] = {}
        #: Whether the fit moves the cut, which :class:`project.trainer.Trainer` does.
        self.follows_schedule = False
        cuts = (self.cut,) if self.unfreezing is None else self.unfreezing.cuts
        self.cut = cuts[0]
        validate_cut(self.hparams, self.last_cut)
        for cut in cuts:
            validate_features(features, cut)
        self.backbone = loaded.specialized(self.last_cut, adapts) if loaded is backbone else loaded
        if adapts is not None:
            self.cut = self.backbone.adapt(adapts, self.cut)
            try:
                validate_features(features, self.cut)
            except ConfigError as error:
                raise ConfigError(
                    f"model.features {features} reads stages before {self.cut.trainable[0]}, the first one of which "
                    f"model.adapter {adapter} trains a part.\nUse --model.features last, or another adapter."
                ) from error
        if loaded is backbone:
            self.hparams.update(backbone=loaded.name, image_size=loaded.origin.image_size)
        self.backbone.freeze(self.cut)
        self.backbone.set_features(features)
        self.backbone.set_batch_norm(batch_norm)
        #: SHA-256 of what is frozen, as loaded.
        self.frozen_sha256 = self.backbone.frozen_fingerprint(self.cut) if self.cut.trainable else self.backbone.sha256
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self.backbone.to(memory_format=self._layout)
        # Before a checkpoint is loaded, the weights are the pretrained ones.
        self._l2_sp = L2SP(l2_sp, self._parameters_of(self.last_cut).items()) if l2_sp else None
        self.hparams["weights"] = loaded.origin.weights  # absolute path of a file, valid in any working directory
        if compile:
            self.backbone.compile_halves()
        self.task: Task = SingleLabel()
        self.head: nn.Module = nn.Identity()
        #: Whether the head has its initial weights, at least for one class: neither trained nor loaded.
        self.head_is_new = True
        #: Moving average of the trained weights in a fit; ``None`` for none.
        self.average: WeightAverage | None = None
        #: Calibrated answers of the loaded checkpoint; ``None`` if it has none, or if no checkpoint was loaded.
        self.answers: Answers | None = None
        #: How :meth:`predict_step` answers besides the probabilities; ``None`` for probabilities only.
        self.answer_policy: AnswerPolicy | None = None
        #: Whether :meth:`predict_step` returns the features, too.
        self.outputs_features = False
        #: Stored features of the current or latest fit; ``None`` if the fit runs the backbone on every batch.
        self.stored_features: StoredFeatures | None = None
        if classes is not None:
            self._set_classes(classes)

    def _set_classes(self, classes: Sequence[str]) -> None:
        """Create the parts that depend on the classes: head, loss weights, metrics."""
        self.hparams["classes"] = list(classes)
        head = ClassSpec.from_dict(self.hparams["head"])
        self.head = head.construct("model.head", nn.Module, self.backbone.feature_dim, len(classes))
        weights = self.hparams["class_weights"]
        if weights is not None and len(weights) != len(classes):
            raise ConfigError(
                f"model.class_weights: {len(weights)} weights for {len(classes)} classes ({classes}). Give one each."
            )
        if weights is not None and min(weights) < 0:
            raise ConfigError(f"model.class_weights must be at least 0, not {min(weights)}.")
        self.loss_weights: torch.Tensor | None
        self.register_buffer("loss_weights", None if weights is None else torch.tensor(weights), persistent=False)
        for stage in STAGES:
            self.add_module(f"{stage}_metrics", EpochMetrics(stage, self.task, classes))

    def setup(self, stage: str) -> None:
        """Set the classes from the data, and the preprocessing of the data from the weights.

        Raises:
            DataError: The classes of the data differ from those of the model.
            ConfigError: The classes are unknown, or the precision would change the frozen weights.
        """
        refuse_unsupported(getattr(self.trainer, "callbacks", []))
        if stage == "fit" and self.unfreezing is not None and not self.follows_schedule:
            raise ConfigError("model.schedule needs project.trainer.Trainer, whose callback moves the cut. Use it.")
        self.backbone.freeze(self.cut)  # unfreeze() may have been called
        self.use_data(getattr(self.trainer, "datamodule", None), str(self.trainer.precision), stage == "fit")
        self.average = None
        if stage == "fit":
            validate_fit(self.hparams, self.backbone, self.last_cut, self.trainer.limit_val_batches != 0)
            self.average = None if self.hparams["ema"] is None else WeightAverage(self.hparams["ema"])
        if stage == "fit" and self.classes and not self.parameter_groups():
            lightning_internals.skip_ddp(self.trainer)

    def use_data(self, data: Any, precision: str, trains: bool) -> None:
        """Set the classes and their loss weights from the data, and the preprocessing of the data from the weights.

        Args:
            data: A data module, or ``None``.
            precision: Precision in Lightning's notation, such as 32-true.
            trains: Whether the model will be trained, so that the data's class weights apply.

        Raises:
            DataError: The classes of the data differ from those of the model.
            ConfigError: The classes are unknown, or the precision would change the frozen weights.
        """
        if precision.endswith("-true") and precision != "32-true" and self.has_frozen_tensors:
            raise ConfigError(
                f"trainer.precision {precision} would round the frozen weights. Use {precision.split('-')[0]}-mixed."
                if precision != "64-true"
                else "trainer.precision 64-true would convert the frozen weights. Use 32-true."
            )
        if hasattr(data, "preprocessing"):
            data.preprocessing = self.backbone.preprocessing
        classes = getattr(data, "classes", None)
        if classes and not self.classes:
            self._set_classes(classes)
        validate_classes(classes or self.classes, self.classes)
        balanced_weights = getattr(data, "class_weights", None) if trains else None
        if balanced_weights is not None:
            if self.hparams["class_weights"] is not None:
                raise ConfigError("data.balance=loss and model.class_weights exclude each other. Remove one of them.")
            self.loss_weights = torch.tensor(balanced_weights, device=self.device)
        if not self.classes:
            raise ConfigError("Class names are unknown. Pass --data.root PATH to train, or --ckpt_path X.ckpt.")

    @property
    def has_frozen_tensors(self) -> bool:
        """Whether a part of the backbone is not trained."""
        return bool(self.cut.frozen) or self.backbone.adapter is not None

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load parameters, see :meth:`torch.nn.Module.load_state_dict`; the head is no longer new."""
        self.head_is_new = False
        if not hasattr(state_dict, "_metadata"):  # a checkpoint has no version numbers, which MNASNet reads
            state_dict = OrderedDict(state_dict)
            vars(state_dict)["_metadata"] = vars(self.state_dict())["_metadata"]
        return super().load_state_dict(state_dict, strict, assign)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Validate a checkpoint, see :class:`CheckpointMixin`, and restore its calibrated answers.

        Raises:
            CheckpointError: The checkpoint does not fit the model, or is damaged.
            ConfigError: A changed argument cannot take effect in a resumed fit.
        """
        super().on_load_checkpoint(checkpoint)
        self.answers = Answers.from_state(checkpoint.get(KEY), len(self.classes), self.backbone.feature_dim)

    def make_policy(
        self, coverage: float | None = None, max_error: float | None = None, false_alarms: float | None = None
    ) -> AnswerPolicy:
        """How to answer new images; see :meth:`~project.evaluation.answers.calibration.Answers.policy`.

        Raises:
            ConfigError: The checkpoint has no calibrated answers, or too few images for a value.
        """
        if self.answers is None:
            given = {"coverage": coverage, "max_error": max_error, "false_alarms": false_alarms}
            names = " and ".join(name for name, value in given.items() if value is not None) or "calibration"
            raise ConfigError(
                f"{names}: the checkpoint has no calibrated answers. A fit adds them to best.ckpt when it ends; this "
                "is another checkpoint, or it was written by an interrupted fit or an earlier version.\n"
                "Use best.ckpt of a completed fit with validation images, or fit again."
            )
        return self.answers.policy(coverage, max_error, false_alarms)

    def outputs(self, rows: torch.Tensor, policy: AnswerPolicy | None = None) -> Outputs:
        """Run the trainable suffix, the head and an answer policy on rows at the cut.

        Args:
            rows: See :meth:`encode`.
            policy: By default :attr:`answer_policy`.
        """
        features = self.refine(rows)
        probabilities = self.task.probabilities(self.head(features))
        answers = None
        policy = policy or self.answer_policy
        if policy is not None:
            answers = policy(probabilities.cpu().numpy(), features.float().cpu().numpy())
        return Outputs(probabilities, answers, features if self.outputs_features else None)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Run the frozen prefix: images to rows at the cut, without a gradient graph.

        Args:
            images: ``(B, 3, H, W)``, uint8 or float in [0, 1].

        Returns:
            Features ``(B, D)`` if only the head trains, else maps ``(B, K, h, w)`` or tokens ``(B, N, K)``.
        """
        return self.backbone.encode(images.contiguous(memory_format=self._layout), self.cut)

    def refine(self, rows: torch.Tensor) -> torch.Tensor:
        """Run the trainable suffix of the backbone: rows at the cut to features ``(B, D)``."""
        return self.backbone.refine(rows, self.cut)

    def classify(self, rows: torch.Tensor) -> torch.Tensor:
        """Run the trainable suffix and the head: rows at the cut to logits ``(B, C)``."""
        logits: torch.Tensor = self.head(self.refine(rows))
        return logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images ``(B, 3, H, W)``, uint8 or float in [0, 1], to logits ``(B, C)``."""
        return self.classify(self.encode(images))

    def prefix_spec(self, device: torch.device, precision: str) -> PrefixSpec:
        """Describe the computation of rows, for the feature store.

        Args:
            device: Device of the model.
            precision: Precision in Lightning's notation, such as 32-true.
        """
        layout = "channels_last" if self.hparams["channels_last"] else "contiguous"
        return PrefixSpec(self.backbone, self.cut, self.encode, layout, device, precision)

    def _rows(self, batch: Any) -> torch.Tensor:
        """Rows at the cut, of a batch of images or of stored rows."""
        return batch[0].to(self.backbone.mean.dtype) if isinstance(batch, RowBatch) else self.encode(batch[0])

    def _step(self, batch: Any, stage: str, rows: torch.Tensor | None = None) -> StepOutput:
        _, targets, *rest = batch
        features = self.refine(self._rows(batch) if rows is None else rows)
        logits = self.head(features).float()
        if rest and world_size() > 1:  # a rank with only padding contributes a loss of 0, so the others do not hang
            valid = rest[0]
            logits, targets, features = logits[valid], targets[valid], features[valid]
        probabilities = self.task.probabilities(logits.detach())
        loss = self.task.loss(logits, targets, self.loss_weights, self.hparams["label_smoothing"])
        labels = self.task.labels(targets)
        self.epoch_metrics(stage).update(loss, probabilities, labels)
        return StepOutput(loss, probabilities, labels, features.detach())

    def epoch_metrics(self, stage: str) -> EpochMetrics:
        """Metrics of the current epoch of a stage: ``train``, ``val``, ``val_ema`` (averaged weights) or ``test``."""
        return cast(EpochMetrics, self.get_submodule(f"{stage}_metrics"))

    @property
    def validates_average(self) -> bool:
        """Whether validations evaluate the averaged weights, too: not before the first step, as there are none."""
        return self.average is not None and self.average.updates > 0

    def _log_epoch(self, stage: str) -> None:
        values = self.epoch_metrics(stage).compute(self.device)
        if stage == "train" and not values["train/loss"].isfinite():
            raise ConfigError(
                f"Training diverged in epoch {self.current_epoch + 1}: the loss is NaN or inf.\n"
                "Lower the learning rate (model.optimizer.lr). Checkpoints of earlier epochs are intact."
            )
        penalty = self._l2_sp_penalty() if stage == "train" else None
        if penalty is not None:
            values["train/l2_sp"] = penalty.detach()
        if stage == "val_ema":
            values = {name: value for name, value in values.items() if "_of/" not in name}
        log_epoch(self, values)

    def _parameters_of(self, cut: Cut) -> dict[str, nn.Parameter]:
        """Parameters of the trainable stages of a cut, by name."""
        stages = ((name, self.backbone.stages[name]) for name in cut.trainable)
        return {f"{stage}.{name}": value for stage, module in stages for name, value in module.named_parameters()}

    def _l2_sp_penalty(self) -> torch.Tensor | None:
        """The L2-SP penalty of the trained stages, a float32 scalar; ``None`` if there is none."""
        trained = {name: value for name, value in self._parameters_of(self.cut).items() if value.requires_grad}
        return self._l2_sp(trained) if self._l2_sp is not None and trained else None

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Mean loss of a batch of images ``(B, 3, H, W)`` or stored rows, and labels ``(B,)``.

        The L2-SP penalty is added; the metric ``train/loss`` does not contain it.
        """
        loss = global_mean_loss(*self._step(batch, "train").loss)
        penalty = self._l2_sp_penalty()
        return loss if penalty is None else loss + penalty

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Take a step with the warm-up of newly trained stages, and update the averaged weights.

        The average ignores a step that the gradient scaler skips.
        """
        wrapped = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        scaler = None if self.average is None else getattr(self.trainer.precision_plugin, "scaler", None)
        scale = 0.0 if scaler is None else scaler.get_scale()
        with scaled_rates(wrapped, self.rate_factor) if self.warm_ups else nullcontext():
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        skipped = scaler is not None and scaler.get_scale() < scale  # the scaler then decreases its scale
        if self.average is not None and not skipped:
            self.average.update(self.trained_tensors())

    def validation_step(self, batch: Any, batch_idx: int) -> StepOutput:  # type: ignore[override]
        """Update the metrics; return the outputs of each image for callbacks.

        The frozen prefix runs once, also where averaged weights are validated.
        """
        if self.average is None or not self.validates_average:
            return self._step(batch, "val")
        rows = self._rows(batch)
        output = self._step(batch, "val", rows)
        with self.average.applied(self.trained_tensors(detached=False)):
            return output._replace(averaged=self._step(batch, "val_ema", rows))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Update the metrics."""
        self._step(batch, "test")

    def predict_step(self, batch: PredictionBatch, batch_idx: int) -> Any:
        """Paths, and float32 probabilities ``(B, C)``, of a batch of images in one preprocessing, or of their rows.

        With an :attr:`answer_policy`, the third item are the answers. With :attr:`outputs_features`, the third item are
        the answers or ``None``, and the fourth one are the features ``(B, D)``.
        """
        (inputs,) = batch.inputs
        rows = inputs.to(self.backbone.mean.dtype) if batch.encoded else self.encode(inputs)
        probabilities, answers, features = self.outputs(rows)
        if features is not None:
            return batch.images.names, probabilities, answers, features
        return (batch.images.names, probabilities, *([] if answers is None else [answers]))

    def on_train_epoch_end(self) -> None:
        """Log the metrics of the epoch."""
        self._log_epoch("train")

    def on_validation_epoch_start(self) -> None:
        """Use the averaged buffers of rank zero on all ranks: those of BatchNorm depend on the batches of a rank."""
        if self.average is not None and world_size() > 1:
            parameters = dict(self.named_parameters())
            self.average.from_rank_zero(self.average.tensors.keys() - parameters.keys())

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the epoch."""
        self._log_epoch("val")
        if self.validates_average:
            self._log_epoch("val_ema")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the epoch."""
        self._log_epoch("test")

    def configure_optimizers(self) -> Any:
        """Create the optimizer of all trainable parameters, and the scheduler; none if there are no parameters."""
        if not self.parameter_groups():
            return []
        optimizer, scheduler = self.make_optimizer(self.parameter_groups())
        if scheduler is None:
            return optimizer
        validate_scheduler(self.make_optimizer(copy_groups(self.parameter_groups()))[1])
        monitor, interval = getattr(scheduler, "monitor", "val/loss"), self.scheduler_interval()
        # lr_scheduler_step() counts the steps, as Lightning would count the batches of each epoch.
        frequency = frequency_of(self.hparams) if interval == "epoch" else 1
        config = {"scheduler": scheduler, "monitor": monitor, "interval": interval, "frequency": frequency}
        if isinstance(scheduler, ReduceLROnPlateau):
            config["interval"] = "epoch"
        if isinstance(scheduler, ReduceLROnPlateau) and str(monitor).startswith("val/"):
            if self.trainer.check_val_every_n_epoch is None:
                raise ConfigError(
                    "model.scheduler: ReduceLROnPlateau requires validation at the end of epochs. Remove "
                    "trainer.check_val_every_n_epoch=null or use another scheduler."
                )
            if self.trainer.limit_val_batches == 0:
                raise ConfigError(
                    f"model.scheduler: ReduceLROnPlateau monitors {monitor}, but this fit has no validation "
                    "(trainer.limit_val_batches=0). Use another scheduler."
                )
            config["frequency"] = self.trainer.check_val_every_n_epoch
        return {"optimizer": optimizer, "lr_scheduler": config}

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        """Step the scheduler, if it is its turn: see ``scheduler_frequency``."""
        if self.scheduler_interval() == "epoch" or self.global_step % frequency_of(self.hparams) == 0:
            super().lr_scheduler_step(scheduler, metric)

    def rate_factor(self, stage: str) -> float:
        """Factor of a stage's learning rate in the next optimizer step: 0 while it is frozen, below 1 in its warm-up.

        Args:
            stage: Name of a stage, or ``head``.
        """
        if stage in self.cut.frozen:
            return 0.0
        warm_up = self.warm_ups.get(stage)
        return 1.0 if warm_up is None else warm_up.factor(self.global_step)

    def on_fit_start(self) -> None:
        """Prepare the metrics and averages of a fit, and check that the frozen tensors are unchanged since loading.

        Raises:
            FrozenError: They have changed.
        """
        self.answers = None  # those of a checkpoint are not of the weights that follow
        for stage in STAGES:
            self.epoch_metrics(stage).reset()  # discard batches of an interrupted epoch
        if self.average is not None:
            self.average.place(self.trained_tensors())
        self.check_frozen("before training")

    def on_train_end(self) -> None:
        """Check that the frozen tensors are unchanged after training.

        Raises:
            FrozenError: They have changed.
        """
        self.check_frozen("during training")
        self.head_is_new = False

    def check_frozen(self, when: str) -> None:
        """Check that the frozen tensors are as loaded.

        Args:
            when: When they may have changed, for the message.

        Raises:
            FrozenError: They have changed.
        """
        loaded, now = self.frozen_sha256, self.backbone.frozen_fingerprint(self.cut)
        if now != loaded:
            part = "stages" if self.backbone.adapter is None else "tensors"
            raise FrozenError(
                f"The frozen {part} of {self.backbone.name} changed {when}: SHA-256 {loaded} as loaded, {now} now."
                "\nA callback or other code modifies them. Fix it, and discard the checkpoints of this run."
            )
