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
def test_a_workers_traceback_is_not_shown(kind):
    """A DataLoader raises a worker's error again with the traceback as its message."""
    from_worker = (
        "Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        f'  File "x.py", line 1, in y\nproject.errors.{kind.__name__}: a.jpg is truncated.\nDelete it.\n'
    )
    assert str(kind(from_worker)) == "a.jpg is truncated.\nDelete it."


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
