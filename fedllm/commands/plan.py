"""``fedllm plan``: who would train what, before anything heavy is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence


def show_plan(arguments: Sequence[str], as_json: bool) -> None:
    """Prints the plan of a recipe, as tables or for programs."""
    from rich.console import Console

    from fedllm.federation.build import build_federation
    from fedllm.federation.plan import show
    from fedllm.models.libraries import quiet_libraries
    from fedllm.recipe import load

    quiet_libraries()
    recipe = load([*arguments, "run.plan=true"])
    planned = build_federation(recipe).plan()
    if as_json:
        print(json.dumps(planned))
    else:
        show(recipe, planned, Console())
