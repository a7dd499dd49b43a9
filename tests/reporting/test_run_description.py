"""Descriptions of configured classes."""

import torch

from project.reporting.run_description import format_class


def test_class_is_formatted_as_a_call() -> None:
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.0, "foreach": None}}
    assert format_class(sgd) == "SGD(lr=0.1, momentum=0.0)"
    assert format_class({"class_path": "project.models.heads.LinearHead"}) == "LinearHead"
    assert format_class(None) == "none"


def test_default_arguments_of_an_instance_are_omitted() -> None:
    adam = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1, "betas": [0.9, 0.999], "foreach": None}}
    assert format_class(adam, torch.optim.AdamW([torch.zeros(1)])) == "AdamW(lr=0.1)"
