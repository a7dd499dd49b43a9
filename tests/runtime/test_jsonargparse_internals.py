"""The private function of jsonargparse that decides what a class that replaces another keeps: a contract test."""

import jsonargparse
import torch
from torch.optim import Optimizer

from project.runtime.jsonargparse_internals import arguments_of_their_class

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


def test_a_class_starts_from_its_own_defaults_while_it_is_active() -> None:
    assert weight_decay("--optimizer=AdamW") == 0.5, "without it jsonargparse keeps the argument"
    with arguments_of_their_class():
        assert weight_decay("--optimizer=AdamW") == torch.optim.AdamW([torch.zeros(1)]).defaults["weight_decay"], (
            CHANGED
        )
        assert weight_decay("--optimizer=torch.optim.sgd.SGD") == 0.5, "the same class under its other path"
    assert weight_decay("--optimizer=AdamW") == 0.5
