import pickle
from pathlib import Path

import pytest

from project.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FrozenError,
    ModelError,
    ProjectError,
    WeightsError,
    did_you_mean,
)

ERRORS = (CheckpointError, ConfigError, DataError, FrozenError, ModelError, WeightsError)


@pytest.mark.parametrize("error_class", ERRORS)
def test_every_user_error_is_a_project_error_with_its_message(error_class):
    with pytest.raises(ProjectError, match=r"^model\.backbone: no\.$"):
        raise error_class("model.backbone: no.")


@pytest.mark.parametrize("error_class", ERRORS)
def test_fields_fill_the_message_and_survive_pickling(error_class):
    error = error_class("{path} {reason} {hint}", path=Path("a {b}.jpg"), reason="is {empty}.", hint="Remove it.")
    for copy in (error, pickle.loads(pickle.dumps(error))):
        assert type(copy) is error_class
        assert str(copy) == "a {b}.jpg is {empty}. Remove it."
        assert (copy.path, copy.reason, copy.hint) == ("a {b}.jpg", "is {empty}.", "Remove it.")


def test_message_without_fields_is_not_formatted():
    error = ProjectError("data.augment: {'class_path': 3}.")
    assert str(error) == error.reason == "data.augment: {'class_path': 3}."
    assert (error.path, error.hint) == (None, "")


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("resnet5", ["resnet50", "vgg16"], "Did you mean 'resnet50'? "),
        ("layer5", ["layer1", "layer4"], "Did you mean 'layer4' or 'layer1'? "),
        ("layer5", ["layer1", "layer2", "layer3", "head"], "Did you mean 'layer3', 'layer2' or 'layer1'? "),
        ("adamw", ["SGD", "Adam", "AdamW"], "Did you mean 'AdamW' or 'Adam'? "),
        ("AdamX", ["RAdam", "AdamW", "Adam", "SGD"], "Did you mean 'Adam', 'AdamW' or 'RAdam'? "),
        ("quux", ["resnet50"], ""),
        ("quux", [], ""),
    ],
)
def test_did_you_mean_suggests_at_most_three_similar_names(word, known, expected):
    assert did_you_mean(word, known) == expected
