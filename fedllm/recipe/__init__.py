"""The recipe: one strict YAML page that describes a run."""

from fedllm.recipe.page import load
from fedllm.recipe.sections import Recipe

__all__ = ["Recipe", "load"]
