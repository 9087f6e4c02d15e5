"""The recipe: one strict YAML page that describes a run."""

from fedllm.recipe.page import Recipe, load

__all__ = ["Recipe", "load"]
