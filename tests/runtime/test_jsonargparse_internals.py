"""Contract tests of the private API of jsonargparse."""

from collections.abc import Callable

import jsonargparse
import torch
from torch.optim import Optimizer

from project.runtime.jsonargparse_internals import accepted_class_paths, class_change_resets_arguments

CHANGED = (
    f"jsonargparse {jsonargparse.__version__} has changed what project/runtime/jsonargparse_internals.py relies on"
)


def weight_decay(*flags: str) -> float:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Optimizer, "optimizer", skip={"params"})
    decay: float = parser.parse_args(["--optimizer=torch.optim.SGD", "--optimizer.weight_decay=0.5", *flags])[
        "optimizer.init_args.weight_decay"
    ]
    return decay


def test_replacing_class_starts_from_its_own_defaults() -> None:
    assert weight_decay("--optimizer=AdamW") == 0.5, "by default jsonargparse keeps the argument"
    with class_change_resets_arguments():
        assert weight_decay("--optimizer=AdamW") == torch.optim.AdamW([torch.zeros(1)]).defaults["weight_decay"], (
            CHANGED
        )
        assert weight_decay("--optimizer=torch.optim.sgd.SGD") == 0.5, "another path of the same class"
    assert weight_decay("--optimizer=AdamW") == 0.5


def test_accepted_classes_of_an_option_are_listed() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--optimizer", type=Callable[[list[torch.Tensor]], Optimizer] | None)
    parser.add_argument("--number", type=int)
    assert {"torch.optim.SGD", "torch.optim.AdamW"} <= {*accepted_class_paths(parser, "optimizer")}, CHANGED
    assert accepted_class_paths(parser, "number") == accepted_class_paths(parser, "unknown") == []
