"""One file per corpus (a family shares one), and the table of them.

A new task is a frozen dataclass that extends `fedllm.tasks.task.Task`: two templates, the columns it needs, where its
rows come from and how an answer is scored; and a line here.
"""

from fedllm.tasks.alpaca import Alpaca
from fedllm.tasks.code import CodeAlpaca, RosettaAlpaca
from fedllm.tasks.dolly import Dolly
from fedllm.tasks.gsm8k import GSM8K, WordProblems
from fedllm.tasks.images import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST, Prototypes, TinyImageNet
from fedllm.tasks.task import Task
from fedllm.tasks.wikitext import WikiText2

TEXTS: dict[str, type[Task]] = {
    "gsm8k": GSM8K,
    "word_problems": WordProblems,
    "dolly": Dolly,
    "codealpaca": CodeAlpaca,
    "rosetta_alpaca": RosettaAlpaca,
    "alpaca": Alpaca,
}
"""For language models: a prompt and its target."""

TASKS: dict[str, type] = TEXTS | {
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
    "svhn": SVHN,
    "tiny_imagenet": TinyImageNet,
    "mnist": MNIST,
    "fashion_mnist": FashionMNIST,
    "wikitext2": WikiText2,
    "prototypes": Prototypes,
}
"""Every task by the name that ``data.name`` takes."""
