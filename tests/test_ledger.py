import pytest
import torch
from safetensors.torch import save

from fedllm.lowrank import LowRank
from fedllm.wire.serialization import flatten, size, unflatten


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_size_is_that_of_the_file_to_the_byte(dtype):
    tensors = {
        "model.layers.0.self_attn.q_proj": LowRank(torch.zeros(64, 3, dtype=dtype), torch.zeros(3, 640, dtype=dtype)),
        "frozen/é": torch.zeros(7, 5, dtype=dtype),
        "r_max": torch.tensor(5),
        "empty": LowRank(torch.zeros(4, 0), torch.zeros(0, 4)),
    }
    assert size(tensors) == len(save(flatten(tensors)))
    assert size({}) == 0  # nothing is sent


def test_flatten_and_back():
    tensors = {"a": LowRank(torch.ones(2, 1), torch.ones(1, 3)), "b": torch.arange(3)}
    back = unflatten(flatten(tensors))
    assert list(back) == ["a", "b"]
    assert torch.equal(back["a"].B, tensors["a"].B) and torch.equal(back["a"].A, tensors["a"].A)
    assert torch.equal(back["b"], tensors["b"])
