import pytest
import torch

from project.models.weight_average import WeightAverage


def test_average_follows_the_formula_with_a_warm_up_of_the_decay() -> None:
    average, values = WeightAverage(0.5), torch.tensor([1.0, 4.0, 2.0, 8.0, 6.0, 1.0, 3.0, 9.0, 2.0, 5.0, 7.0])
    expected = torch.tensor(0.0)
    for number, value in enumerate(values):
        decay = min(0.5, (1 + number) / (10 + number)) if number else 0.0
        assert average.next_decay == pytest.approx(decay)
        expected = decay * expected + (1 - decay) * value
        average.update({"weight": value.clone(), "batches": torch.tensor(number)})
        torch.testing.assert_close(average.tensors["weight"], expected)
    assert decay == 0.5, "the warm-up has ended"
    assert average.tensors["batches"] == len(values) - 1, "counts are copied"
    assert average.updates == len(values)


def test_tensors_have_the_averaged_values_within_the_context_only() -> None:
    layer = torch.nn.Linear(2, 2)
    average, before = WeightAverage(0.9), layer.weight.detach().clone()
    average.update({"weight": torch.ones(2, 2)})
    parameters = {"weight": layer.weight}
    with pytest.raises(KeyError), torch.inference_mode(), average.applied(parameters):
        assert torch.equal(layer.weight, torch.ones(2, 2))
        raise KeyError
    assert layer.weight is parameters["weight"] and torch.equal(layer.weight, before)
    layer(torch.ones(1, 2)).sum().backward()


def test_average_of_bfloat16_weights_is_float32_and_applied_as_bfloat16() -> None:
    weight, average = torch.ones(2, dtype=torch.bfloat16), WeightAverage(0.999)
    average.update({"weight": weight})
    average.place({"weight": weight})
    average.updates = 10**6
    average.update({"weight": weight * 2})
    torch.testing.assert_close(average.tensors["weight"], torch.full((2,), 1.001))
    with average.applied({"weight": weight}):
        assert weight.dtype == torch.bfloat16


def test_the_average_of_an_added_tensor_starts_with_its_value() -> None:
    average = WeightAverage(0.5)
    average.update({"head": torch.zeros(1)})
    average.add({"head": torch.ones(1), "layer4": torch.ones(1)})
    assert {name: float(value) for name, value in average.tensors.items()} == {"head": 0, "layer4": 1}
    decay = average.next_decay
    average.update({"head": torch.zeros(1), "layer4": torch.zeros(1)})
    assert float(average.tensors["layer4"]) == pytest.approx(decay)
