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
    nearest,
)

KINDS = (CheckpointError, ConfigError, DataError, FrozenError, ModelError, WeightsError)


@pytest.mark.parametrize("kind", KINDS)
def test_every_mistake_is_a_project_error_and_says_what_it_was_given(kind):
    with pytest.raises(ProjectError, match=r"^model\.backbone: no\.$"):
        raise kind("model.backbone: no.")


@pytest.mark.parametrize("kind", KINDS)
def test_fields_make_the_message_and_survive_another_process(kind):
    error = kind("{path} {reason} {hint}", path=Path("a {b}.jpg"), reason="is {empty}.", hint="Remove it.")
    for each in (error, pickle.loads(pickle.dumps(error))):
        assert type(each) is kind
        assert str(each) == "a {b}.jpg is {empty}. Remove it."
        assert (each.path, each.reason, each.hint) == ("a {b}.jpg", "is {empty}.", "Remove it.")


def test_a_message_without_fields_is_taken_as_it_is():
    error = ProjectError("data.augment: {'class_path': 3}.")
    assert str(error) == error.reason == "data.augment: {'class_path': 3}."
    assert (error.path, error.hint) == (None, "")


@pytest.mark.parametrize(
    ("word", "known", "said"),
    [
        ("resnet5", ["resnet50", "vgg16"], "Did you mean 'resnet50'? "),
        ("layer5", ["layer1", "layer4"], "Did you mean 'layer4' or 'layer1'? "),
        ("layer5", ["layer1", "layer2", "layer3", "head"], "Did you mean 'layer3', 'layer2' or 'layer1'? "),
        ("quux", ["resnet50"], ""),
        ("quux", [], ""),
    ],
)
def test_nearest_says_at_most_three_names_or_nothing(word, known, said):
    assert nearest(word, known) == said
