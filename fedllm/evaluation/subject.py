"""The model under test: a run, an adapter, a folder or an id of the Hub."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedllm.config.schema import parse_section
from fedllm.errors import FedError
from fedllm.evaluation.settings import SCORED, Settings
from fedllm.models import language
from fedllm.models.language import LanguageModel
from fedllm.models.peft_adapter import with_adapter
from fedllm.recipe import page as recipes
from fedllm.storage.peft_folder import inside
from fedllm.tasks.task import Task


@dataclass(frozen=True)
class Subject:
    """The model under test: a base, an adapter on it or none, and a seed for ``pico``'s random weights."""

    base: LanguageModel
    adapter: Path | None
    seed: int


def task_of(name: str, settings: Settings, run: recipes.Recipe | None) -> tuple[Task, str | None]:
    """The task, with the run's own keys where it was trained on this task, and the path of its rows."""
    section: dict[str, Any] = {}
    known = {f.name for f in dataclasses.fields(SCORED[name])}
    if run is not None and run.data_name == name:
        page = run.page["data"]
        section = {key: value for key, value in page.items() if key in known | {"path"}}
    section |= settings.data
    path = section.pop("path", None)
    if path is not None and not isinstance(path, str):
        raise FedError(f"data.path={path!r}: a file or a folder.")
    return parse_section(SCORED[name], section, "data"), path


def subject_of(settings: Settings, run: recipes.Recipe | None) -> Subject:
    """What is to be scored; nothing is loaded."""
    if run is not None:
        if run.algorithm.any_model:
            raise FedError(
                f"run={settings.run}: {run.algorithm_name} leaves every client its own adapter, and there is no common "
                "one to score. Give adapter=RUN/adapter_clients/ID, which hub.clients=true keeps."
            )
        found = Path(str(settings.run)) / "adapter"
        if not (found / "adapter_config.json").is_file():
            raise FedError(
                f"run={settings.run} has no adapter/ yet: the run is not finished. run.resume=true continues it."
            )
        return Subject(run.model, found, run.run.seed)
    adapter, name = None, settings.model
    if settings.adapter is not None:
        adapter = inside(Path(settings.adapter))
        config = adapter / "adapter_config.json"
        if not config.is_file():
            raise FedError(f"adapter={adapter} is not a PEFT folder: there is no adapter_config.json in it.")
        try:
            name = name or json.loads(config.read_text()).get("base_model_name_or_path")
        except (ValueError, AttributeError) as error:
            raise FedError(f"{config} is not a PEFT config: {error}") from error
        if not name:
            raise FedError(f"adapter={adapter} does not say which model it is for: give model=... too.")
    if name is None:
        raise FedError("what is to be scored? Give model=ID_OR_FOLDER, adapter=PEFT_FOLDER or run=FOLDER.")
    base = LanguageModel(name, settings.revision, settings.dtype, settings.quantization)
    return Subject(base, adapter, settings.seed)


def loaded(subject: Subject) -> Any:
    """The model under test, in eval mode, on this process's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    model = language.load(subject.base, device, subject.seed)
    if subject.adapter is None:
        return model
    return with_adapter(model, subject.adapter, subject.base.name)
