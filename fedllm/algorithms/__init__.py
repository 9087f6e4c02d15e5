"""One file per paper, and the table of them."""

from fedllm.algorithms.fedhl import FedHL
from fedllm.algorithms.fedit import FedIT
from fedllm.algorithms.flexlora import FlexLoRA
from fedllm.algorithms.flora import FLoRA
from fedllm.algorithms.zero_padding import ZeroPadding
from fedllm.core import Algorithm

ALGORITHMS: dict[str, type[Algorithm]] = {
    "fedit": FedIT,
    "zero_padding": ZeroPadding,
    "flexlora": FlexLoRA,
    "flora": FLoRA,
    "fedhl": FedHL,
}
"""Every rule by the name that ``algorithm.name`` takes."""
