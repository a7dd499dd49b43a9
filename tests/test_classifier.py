from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from project import ImageClassifier, ImageDataModule
from project.errors import ConfigError
from project.evaluation.epoch_metrics import EpochMetrics
from project.models.heads import CosineHead, MLPHead
from project.models.loading import load_backbone
from project.task import SingleLabel
from tests.conftest import BACKBONE, FEATURES


def build(weights: Path, **options: object) -> ImageClassifier:
    return ImageClassifier(BACKBONE, str(weights), image_size=32, **options)  # type: ignore[arg-type]


IMAGES = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)


def test_encode_then_classify_equals_forward(weights: Path) -> None:
    for trainable, shape in (("head", (4, FEATURES)), ("layer4", (4, 192, 2, 2)), ("all", (4, 3, 32, 32))):
        model = build(weights, trainable=trainable, classes=["a", "b"]).eval()
        rows = model.encode(IMAGES)
        assert rows.shape == shape
        assert not rows.requires_grad
        assert torch.equal(model.classify(rows), model(IMAGES))


def test_optimizer_gets_only_trainable_parameters(weights: Path) -> None:
    model = build(weights, trainable="layer4", classes=["a", "b"], optimizer=partial(torch.optim.AdamW, lr=0.1))
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    expected = [*model.backbone.stages["layer4"].parameters(), *model.head.parameters()]
    assert optimized == {id(parameter) for parameter in expected}
    names = ["layer4", "layer4 (no decay)", "head", "head (no decay)"]
    assert [group["name"] for group in optimizer.param_groups] == names


def test_classifier_works_with_a_plain_lightning_trainer(weights: Path, photos: Path, tmp_path: Path) -> None:
    model = build(weights, head=partial(MLPHead, hidden=8))
    trainer = pl.Trainer(
        max_epochs=1, default_root_dir=tmp_path, enable_progress_bar=False, logger=False, log_every_n_steps=1
    )
    with pytest.warns(UserWarning):  # Lightning warns about modules in eval mode and about num_workers
        trainer.fit(model, datamodule=ImageDataModule(str(photos), num_workers=0))
    assert model.classes == ("blue", "green", "red")
    assert "val/accuracy" in trainer.callback_metrics
    path = next(tmp_path.rglob("*.ckpt"))
    restored = ImageClassifier.load_from_checkpoint(path).eval()
    assert torch.equal(restored(IMAGES), model.eval()(IMAGES))


def test_unfreeze_and_train_mode_do_not_change_the_frozen_stages(weights: Path) -> None:
    model = build(weights, classes=["a", "b"])
    before = model.backbone.fingerprint(model.cut)
    model.unfreeze()
    model.train()
    for module in model.modules():
        module.training = True
    loss = model(IMAGES).sum()
    loss.backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert model.backbone.fingerprint(model.cut) == before


def test_float_and_uint8_images_give_equal_logits(weights: Path) -> None:
    model = build(weights, classes=["a", "b"]).eval()
    torch.testing.assert_close(model(IMAGES), model(IMAGES.float() / 255), rtol=1e-5, atol=1e-5)


def test_top5_is_logged_only_for_more_than_five_classes() -> None:
    probabilities, labels = torch.eye(6)[[0, 1, 2, 3, 4, 5]] * 0.9 + 0.1 / 6, torch.tensor([0, 1, 2, 3, 4, 0])
    five, six = (EpochMetrics("val", SingleLabel(), list(names)) for names in ("abcde", "abcdef"))
    five.update((torch.tensor(1.0), 5), probabilities[:5, :5], labels[:5])
    assert not any("top5" in name for name in five.compute(torch.device("cpu")))
    six.update((torch.tensor(1.0), 6), probabilities, labels)
    values = six.compute(torch.device("cpu"))
    assert values["val/accuracy"] == pytest.approx(5 / 6)
    assert values["val/recall_of/a"] == pytest.approx(0.5)
    assert values["val/top5"] >= values["val/accuracy"]
    assert values["val/ece"] == pytest.approx(abs(probabilities[0, 0].item() - 5 / 6), abs=1e-5)
    assert 0 < values["val/f1"] < 1


def test_loss_uses_label_smoothing_and_class_weights(weights: Path) -> None:
    labels = torch.tensor([0, 1, 1, 0])
    model = build(weights, classes=["a", "b"], label_smoothing=0.2, class_weights=[1.0, 3.0])
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    loss = model.training_step((IMAGES, labels), 0)
    expected = torch.nn.CrossEntropyLoss(torch.tensor([1.0, 3.0]), label_smoothing=0.2)(model(IMAGES), labels)
    torch.testing.assert_close(loss, expected)


def test_hyper_parameters_are_plain_types(weights: Path) -> None:
    model = build(weights, head=CosineHead, classes=["a", "b"])
    assert model.hparams["head"] == {"class_path": "project.models.heads.CosineHead", "init_args": {}}
    assert model.hparams["optimizer"] == {"class_path": "project.models.optimizers.ArticleSGD", "init_args": {}}


def test_optimizer_that_cannot_be_saved_is_rejected(weights: Path) -> None:
    with pytest.raises(ConfigError, match=r"functools\.partial"):
        build(weights, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))


def test_injected_backbone_is_shared_and_can_be_restored_from_hyper_parameters(weights: Path) -> None:
    backbone = load_backbone(BACKBONE, str(weights), 32)
    first, second = (ImageClassifier(backbone, trainable="layer4", classes=["a", "b"]) for _ in range(2))
    assert first.backbone.stages["layer3"] is second.backbone.stages["layer3"]
    assert first.backbone.stages["layer4"] is not second.backbone.stages["layer4"]
    arguments = {name: first.hparams[name] for name in ("backbone", "weights", "image_size")}
    assert arguments == {"backbone": BACKBONE, "weights": str(weights), "image_size": 32}
    assert first.identity() == ImageClassifier(**arguments, trainable="layer4", classes=["a", "b"]).identity()


class FrozenProjection(torch.nn.Module):
    """A head with a frozen layer."""

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(in_features, 4).requires_grad_(False)
        self.out = torch.nn.Linear(4, num_classes)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.out(self.proj(features))


def test_checkpoint_contains_the_frozen_parts_of_a_head(weights: Path) -> None:
    model = build(weights, head=FrozenProjection, classes=["a", "b"])
    expected = {"head.proj.weight", "head.proj.bias", "head.out.weight", "head.out.bias"}
    assert set(model._without_frozen(model.state_dict())) == expected
    model.freeze()
    assert "head.out.weight" in model._without_frozen(model.state_dict()), "independent of requires_grad"


@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, torch.optim.AdamW])
def test_optimizers_with_one_parameter_group_also_train_stages(optimizer: type, weights: Path) -> None:
    model = build(weights, trainable="layer4", classes=["a", "b"], optimizer=partial(optimizer, lr=0.1))
    count = sum(len(group["params"]) for group in model.configure_optimizers().param_groups)
    assert count == len([*model.backbone.stages["layer4"].parameters(), *model.head.parameters()])


def test_a_schedule_copies_the_stages_that_it_will_train(weights: Path) -> None:
    shared = load_backbone(BACKBONE, str(weights))
    model = ImageClassifier(shared, schedule={0: "head", 2: "layer3"}, classes=["a", "b"])
    assert not model.cut.trainable and model.hparams["schedule"] == {0: "head", 2: "layer3"}
    own = [name for name in shared.stages if model.backbone.stages[name] is not shared.stages[name]]
    assert own == ["layer3", "layer4"]
    assert [group["name"] for group in model.parameter_groups()] == ["layer3", "layer4", "head"]
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())


def test_a_plain_lightning_trainer_cannot_follow_a_schedule(weights: Path, photos: Path) -> None:
    model = build(weights, schedule=["head", "layer4"])
    trainer = pl.Trainer(max_epochs=1, enable_progress_bar=False, logger=False, enable_checkpointing=False)
    with pytest.raises(ConfigError, match=r"model.schedule needs project.trainer.Trainer"):
        trainer.fit(model, datamodule=ImageDataModule(str(photos), num_workers=0))
