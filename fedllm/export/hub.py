"""A run's model on the Hugging Face Hub: which files, the check before, the upload with its retries.

Private unless told otherwise, nothing but what ``--dry-run`` lists, and the token is only ever in the library's hands.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedllm.core import Reply, Tensors
from fedllm.errors import FedError
from fedllm.export import adapter_folder
from fedllm.export import merge as merging
from fedllm.export import model_card as card
from fedllm.export.merge import Merged
from fedllm.export.secrets import refuse_keys, without_paths
from fedllm.lowrank import as_lowrank
from fedllm.models import language
from fedllm.recipe import page as recipes
from fedllm.recipe.sections import Hub, Recipe
from fedllm.reports import run_record as story
from fedllm.reports.formatting import size
from fedllm.reports.plots.run import PLOTS
from fedllm.reports.report import ASKED
from fedllm.storage import files
from fedllm.storage import peft_folder as adapters
from fedllm.storage import run_folder as folder

T = TypeVar("T")

Parcel = dict[str, Path | bytes]
"""What is uploaded: the path in the repository, and the file or the bytes."""

TRIES, FIRST_WAIT = 5, 1.0
"""Of every request that may pass: 1, 2, 4 and 8 seconds between them."""

PASSING = {408, 425, 429, 500, 502, 503, 504}
"""Answers that another try may change."""

PNG = b"\x89PNG\r\n\x1a\n"
LARGEST_TEXT = 1 << 30
"""Bytes of a text that is read to be uploaded."""

TEXT = {".json", ".jsonl", ".yaml", ".md", ".txt", ".jinja"}


def export(
    recipe: Recipe, federation: Any, state: Tensors, replies: Sequence[Reply], memories: Mapping[str, Tensors]
) -> None:
    """Writes a finished run's adapters: the server's, and with ``hub.clients`` each client's own of the last round."""
    kind = recipe.worker.exported
    federation.export(recipe.output / kind, of_rank(recipe.algorithm.served(state), recipe.hub.rank))
    if recipe.hub.clients:
        files.make_folder(recipe.output / f"{kind}_clients")
    for reply in replies if recipe.hub.clients else ():
        own = recipe.algorithm.personal(reply, memories.get(reply.client.id, {}))
        federation.export(recipe.output / f"{kind}_clients" / reply.client.id, own, reply.client)
    folder.write(recipe.output / "versions.json", json.dumps(card.versions(), indent=1))


def of_rank(update: Tensors, rank: int | None) -> Tensors:
    """Every update of a weight as its best approximation of at most this rank; all of it without one."""
    if rank is None:
        return update
    return {name: W if name.startswith("shared/") else as_lowrank(W).truncate(rank) for name, W in update.items()}


def rank_remark(recipe: Recipe) -> str:
    """A sentence where the exported adapter's rank is far above what any client trained; else empty."""
    place = recipe.output / "adapter" / adapters.CONFIG
    trained = max(recipe.clients.rank) if isinstance(recipe.clients.rank, tuple | list) else recipe.clients.rank
    if not place.is_file() or not isinstance(trained, int):
        return ""
    config = json.loads(place.read_text(encoding="utf-8"))
    most = max([config["r"], *config["rank_pattern"].values()])
    if most <= 2 * trained:
        return ""
    return (
        f"the adapter's rank is up to {most}, the clients' at most {trained}: hub.rank={trained} exports its best "
        "approximation of that rank, which is smaller and quicker to serve"
    )


def ready(recipe: Recipe) -> None:
    """Before a run whose end is a merged model or an upload: raises FedError where that cannot work."""
    named(recipe.hub)
    if recipe.hub.push or recipe.hub.merged:
        _has_adapter(recipe)
    if recipe.hub.push and not recipe.hub.dry_run:
        check(recipe.hub)


def publish(recipe: Recipe, console: Console) -> None:
    """What a run that has just ended is to end in: ``hub.merged``, ``hub.push``; what fails says how to try again."""
    out, settings = recipe.output, recipe.hub
    if remark := rank_remark(recipe):
        console.print(f"[dim]{remark}[/dim]", soft_wrap=True)
    if settings.merged:
        measured = merged_model(out, recipe, settings)
        console.print(f"[dim]merged model: {out / 'merged'} ({measured.dtype})[/dim]", soft_wrap=True)
    if not settings.push:
        return
    try:
        push(out, settings, console)
    except FedError as error:
        raise FedError(f"{error} The run itself is whole: `fedllm push {out}` uploads it.") from error


def push_run(
    run: Path,
    *,
    repo: str | None = None,
    dry_run: bool = False,
    public: bool = False,
    merged: bool = False,
    clients: bool = False,
    dtype: Any = None,
    license: str | None = None,
) -> None:
    """``fedllm push RUN``; what is not said, but for the dry run, is taken from the run's own ``hub`` section.

    A folder that is no run's and holds an adapter is uploaded as it is, with a card.
    """
    alone = not (run / "recipe.yaml").is_file() and (adapters.inside(run) / adapters.CONFIG).is_file()
    settings = Hub() if alone else _recipe_of(run).hub
    settings = dataclasses.replace(
        settings,
        repo=repo or settings.repo,
        dry_run=dry_run,
        private=not public and settings.private,
        merged=merged or settings.merged,
        clients=clients or settings.clients,
        dtype=dtype or settings.dtype,
        license=license or settings.license,
    )
    (push_adapter if alone else push)(run, settings, Console())


def push_adapter(folder: Path, settings: Hub, console: Console) -> None:
    """Uploads an adapter folder that no run made, or lists it with ``dry_run``.

    Raises:
        FedError: as ``push``, the folder is not a sound adapter, or a merged model or clients are asked for.
    """
    named(settings)
    if settings.merged or settings.clients:
        raise FedError(f"{folder} is an adapter and no run: --merged and --clients are of runs. `fedllm merge` merges.")
    if not settings.dry_run:
        check(settings)
    place = adapters.inside(folder)
    known = story.json_in(place / adapter_folder.RECORD)
    record = {"rule": str(known.get("rule", "")), **known}
    page = adapter_folder.card(place, record, settings.license)
    parcel: Parcel = adapter_files(folder, place, "") | {"README.md": page.encode()}
    if known:
        parcel[adapter_folder.RECORD] = json.dumps(card.shareable(known), indent=1).encode()
    _refuse_secrets(parcel)
    parcel = dict(sorted(parcel.items()))
    show(parcel, settings, console)
    if not settings.dry_run:
        console.print(f"uploaded: {upload(parcel, settings)}", soft_wrap=True)


def push(run: Path, settings: Hub, console: Console) -> None:
    """Uploads what ``settings`` ask for in one commit, or lists it with ``dry_run``.

    Raises:
        FedError: not a finished run, no repository, no token, no way to the Hub, no right to write there, or the
            repository is public and ``settings.private``.
    """
    named(settings)
    if not settings.dry_run:
        check(settings)
    licence = settings.license or known_licence(run)
    parcel = pack(run, settings, licence)
    show(parcel, settings, console)
    if settings.dry_run:
        return
    url = upload(parcel, settings)
    console.print(f"uploaded: {url}", soft_wrap=True)


def named(settings: Hub) -> None:
    """Raises FedError where the repository has a name that none can have."""
    if settings.repo and not card.HUB_ID.fullmatch(settings.repo):
        raise FedError(
            f"{settings.repo!r} is no repository's name: give OWNER/NAME, of letters, digits, '-', '_' and '.'."
        )


def check(settings: Hub) -> None:
    """Raises FedError where an upload cannot work, before any work is done."""
    from huggingface_hub import get_token

    if not settings.repo:
        raise FedError("where to? Give the repository: --repo OWNER/NAME, or hub.repo=OWNER/NAME in the recipe.")
    if not language.hub_reachable():
        raise FedError("the Hub cannot be reached (or HF_HUB_OFFLINE is set), so nothing was uploaded.")
    if get_token() is None:
        raise FedError(
            "there is no Hugging Face token: run `hf auth login`, or set HF_TOKEN, with a token that may write."
        )


def pack(run: Path, settings: Hub, licence: str | None) -> Parcel:
    """Everything that is uploaded. Makes the merged model in ``run/merged`` where it is asked for and missing.

    Raises:
        FedError: the run is not finished, a file holds a token, or a client's adapter is asked for and was not kept.
    """
    told = story.read(run)
    recipe = _recipe_of(run)
    _has_adapter(recipe)
    if not (run / "adapter" / adapters.CONFIG).is_file():
        raise FedError(f"{run} has no adapter/ yet: the run is not finished. run.resume=true ends it.")
    measured = merged_model(run, recipe, settings) if settings.merged else None
    plots = sorted(name for name in (*PLOTS, *ASKED) if os.path.lexists(run / "plots" / f"{name}.png"))
    parcel: Parcel = {}
    if measured:
        parcel |= _merged_files(run)
    parcel |= adapter_files(run, run / "adapter", "adapter/" if measured else "")
    if settings.clients:
        kept = sorted((run / "adapter_clients").glob(f"*/{adapters.CONFIG}"))
        if not kept:
            raise FedError(f"{run} kept no client's adapter: train with hub.clients=true.")
        for file in kept:
            parcel |= adapter_files(run, file.parent, f"clients/{file.parent.name}/")
    parcel |= {f"plots/{name}.png": _picture(run, name) for name in plots}
    parcel["rounds.jsonl"] = files.read_bytes(files.check_own(run, run / "rounds.jsonl"), LARGEST_TEXT)
    parcel["recipe.yaml"] = card.recipe_page(told).encode()
    known = {key: str(value) for key, value in story.json_in(run / "versions.json").items()} or card.versions()
    page = card.text(run, told, licence=licence, known=known, plots=plots, merged=measured, repo=settings.repo)
    parcel["README.md"] = page.encode()
    for name in ("README.md", "rounds.jsonl"):
        parcel[name] = without_paths(parcel[name], told.recipe, run)  # type: ignore[arg-type]  # both are bytes
    _refuse_secrets(parcel)
    return dict(sorted(parcel.items()))


def _picture(run: Path, name: str) -> Path:
    """A plot of the run's, as a file of its own that is a picture."""
    file = files.check_own(run, run / "plots" / f"{name}.png")
    with file.open("rb") as stream:
        if stream.read(len(PNG)) != PNG:
            raise FedError(f"{file} is no PNG picture, and nothing was uploaded: `fedllm report {run}` draws it again.")
    return file


def _merged_files(run: Path) -> Parcel:
    """The merged model's files, which are those that were written when it was made."""
    written = story.mapping(story.json_in(run / "merged.json").get("files"))
    there = {path.name: files.check_own(run, path) for path in sorted((run / "merged").iterdir())}
    other = sorted(
        name for name in there.keys() | written.keys() if name not in there or written.get(name) != _size(there[name])
    )
    if other:
        raise FedError(
            f"{run / 'merged'}: {other[0]} is not as the merge wrote it, and nothing was uploaded. Remove that folder, "
            "and it is made again."
        )
    return dict(there)


def adapter_files(run: Path, place: Path, prefix: str) -> Parcel:
    """A PEFT folder's two files and its tokenizer; a base model that is a folder of this machine is not named.

    Raises:
        FedError: one is a link, or they are no adapter.
    """
    for name in (adapters.CONFIG, adapters.WEIGHTS):
        files.check_own(run, place / name)
    adapters.read(place, extras=True)
    beside = [name for name in adapters.TOKENIZER if os.path.lexists(place / name)]
    config = json.loads((place / adapters.CONFIG).read_text())
    name = config.get("base_model_name_or_path")
    if isinstance(name, str) and card.shareable(name) != name:
        config["base_model_name_or_path"] = card.shareable(name)
    return {
        prefix + adapters.CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
        prefix + adapters.WEIGHTS: place / adapters.WEIGHTS,
        **{prefix + name: files.check_own(run, place / name) for name in beside},
    }


def merged_model(run: Path, recipe: Recipe, settings: Hub) -> Merged:
    """What was measured of ``run/merged``, which is made where it is missing or of another adapter or dtype."""
    note, place = run / "merged.json", run / "merged"
    known = story.json_in(note)
    if place.is_symlink():
        raise FedError(f"{place} is a link, and no link is followed out of a run's folder: put a folder there.")
    files.check_own(run, run / "adapter" / adapters.WEIGHTS)
    with (run / "adapter" / adapters.WEIGHTS).open("rb") as stream:
        made_of = {"adapter": hashlib.file_digest(stream, "sha256").hexdigest(), "dtype": settings.dtype}
    if place.is_dir() and known.get("made_of") == made_of and isinstance(known.get("files"), dict):
        try:
            return TypeAdapter(Merged).validate_python(known["measured"])
        except (KeyError, ValueError) as error:
            raise FedError(
                f"{note} is not what a merge writes: remove it and {place}, and it is made again."
            ) from error
    if place.exists():
        shutil.rmtree(place)
    texts = [str(row["prompt"]) for row in card.last_scores(run, story.read(run)) if row.get("prompt")]
    measured = merging.merge(
        recipe.model, run / "adapter", place, dtype=settings.dtype, seed=recipe.run.seed, texts=texts
    )
    written = {path.name: path.stat().st_size for path in sorted(place.iterdir())}
    told = {"made_of": made_of, "measured": dataclasses.asdict(measured), "files": written}
    folder.write(note, json.dumps(told, indent=1))
    return measured


def known_licence(run: Path) -> str | None:
    """The base model's licence: from the card beside its weights, or from the Hub where it answers."""
    from huggingface_hub import ModelCard, model_info
    from huggingface_hub.errors import HTTPError

    name = card.base_of(story.read(run))
    page = Path(name).expanduser() / "README.md"
    if page.is_file():
        try:
            found = ModelCard.load(page).data.to_dict().get("license")
        except (OSError, ValueError):
            return None
    elif card.HUB_ID.fullmatch(name) and language.hub_reachable():
        try:
            data = model_info(name).card_data
        except (HTTPError, OSError, ValueError):
            return None
        found = data.to_dict().get("license") if data else None
    else:
        return None
    return found if isinstance(found, str) else None


def show(parcel: Parcel, settings: Hub, console: Console) -> None:
    """The files with their sizes, and where they go."""
    sizes = {name: _size(source) for name, source in parcel.items()}
    listed = Table(box=None, pad_edge=False, show_header=False)
    listed.add_column(no_wrap=True)
    listed.add_column(justify="right", no_wrap=True)
    for name, count in sizes.items():
        listed.add_row(Text(name), size(count))
    console.print(listed)
    where = settings.repo or "(no --repo given)"
    kind = "private" if settings.private else "public"
    verb = "would be uploaded" if settings.dry_run else "to upload"
    console.print(f"{len(parcel)} files, {size(sum(sizes.values()))}, {verb} to {where} ({kind})", soft_wrap=True)


def upload(parcel: Parcel, settings: Hub) -> str:
    """Makes the repository where it is missing and commits the files at once; its address."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api, repo = HfApi(), str(settings.repo)
    attempt(lambda: api.create_repo(repo, private=settings.private, exist_ok=True), repo)
    info = attempt(lambda: api.model_info(repo), repo)
    if settings.private and not info.private:
        raise FedError(f"{repo} exists and is public, and nothing was uploaded: give --public, or another --repo.")
    message = f"fedllm {card.fedllm.__version__}: adapter" + (" and merged model" if settings.merged else "")

    def commit() -> Any:
        added = [
            CommitOperationAdd(name, source if isinstance(source, bytes) else str(source))
            for name, source in parcel.items()
        ]
        return api.create_commit(repo, added, commit_message=message)

    attempt(commit, repo)
    return f"{api.endpoint}/{repo}"


def attempt(action: Callable[[], T], repo: str, wait: Callable[[float], None] = time.sleep) -> T:
    """The action's result; again, twice as late each time, where the Hub's answer or the network may pass.

    Raises:
        FedError: with what the Hub said, after the last try or where no other try would help.
    """
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    for number in range(1, TRIES + 1):
        try:
            return action()
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if status not in PASSING or number == TRIES:
                raise FedError(_refused(status, repo, error)) from error
        except HTTPError as error:
            if number == TRIES:
                raise FedError(
                    f"the Hub did not answer in {TRIES} tries ({type(error).__name__}): {repo} was not uploaded."
                ) from error
        wait(FIRST_WAIT * 2 ** (number - 1))
    raise AssertionError("unreachable")


def _refused(status: int, repo: str, error: Exception) -> str:
    said = " ".join(str(getattr(error, "server_message", None) or error).split())[:300]
    known = {
        401: f"the Hub does not accept the token, so {repo} was not uploaded: run `hf auth login` again.",
        403: f"the token may not write to {repo}: take a token with the write role, or a repository of yours.",
        404: f"the Hub has no {repo}, or the token may not see it.",
    }
    return known.get(status, f"the Hub refused the upload to {repo} with {status}: {said}")


def _recipe_of(run: Path) -> Recipe:
    if not (run / "recipe.yaml").is_file():
        raise FedError(f"{run} is no run's folder: it has no recipe.yaml. Give the folder that run.output named.")
    return recipes.load([f"recipe={run / 'recipe.yaml'}"])


def _has_adapter(recipe: Recipe) -> None:
    if recipe.worker.exported != "adapter":
        raise FedError(
            f"worker.name={recipe.worker_name} trains no adapter of a language model, and push uploads those."
        )
    if recipe.algorithm.any_model:
        raise FedError(
            f"algorithm.name={recipe.algorithm_name} leaves every client its own adapter, and push uploads the common "
            "one: hub.clients=true keeps the clients' in adapter_clients/."
        )


def _size(source: Path | bytes) -> int:
    return len(source) if isinstance(source, bytes) else source.stat().st_size


def _refuse_secrets(parcel: Mapping[str, Path | bytes]) -> None:
    """Raises FedError where a text file holds a key."""
    from huggingface_hub import get_token

    token = get_token()
    for name, source in parcel.items():
        if Path(name).suffix not in TEXT:
            continue
        refuse_keys(name, source if isinstance(source, bytes) else files.read_bytes(source, LARGEST_TEXT), token)
