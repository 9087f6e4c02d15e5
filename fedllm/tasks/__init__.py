"""One file per corpus (a family shares one), and the table of them.

A new task is a frozen dataclass that extends `fedllm.tasks.task.Task`: two templates, the columns it needs, where its
rows come from and how an answer is scored; and a line here.
"""

from fedllm.tasks.gsm8k import GSM8K, WordProblems
from fedllm.tasks.task import Task

TASKS: dict[str, type[Task]] = {
    "gsm8k": GSM8K,
    "word_problems": WordProblems,
}
"""Every task by the name that ``data.name`` takes."""
