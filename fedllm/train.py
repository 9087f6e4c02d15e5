"""A whole federated run: recipe -> clients -> rounds -> report.

accelerate launch fedllm/train.py recipe=NAME [a.b=c ...]
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # launched by path: sys.path starts with this folder, whose modules are not top-level ones
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import fedllm  # noqa: F401, I001  (before torch: it says how long OpenMP's threads spin)
import torch
from rich.console import Console

from fedllm.federation.build import build_federation
from fedllm.storage import checkpoint
from fedllm.storage import files

from fedllm.storage import run_folder as folder

from fedllm.export import hub

from fedllm.reports import report

from fedllm.reports import trackers as tracking
from fedllm.recipe import page as recipes
from fedllm.storage.checkpoint import Checkpoint
from fedllm.errors import FedError
from fedllm.core import Algorithm, Client, Federation, Fleet, Reply, Tensors, Worker
from fedllm.fleets import multiprocess as accelerate
from fedllm.fleets import data_parallel as together
from fedllm.fleets.processes import Processes, joined
from fedllm.fleets.resumed import Waiting
from fedllm.fleets.interrupt import once
from fedllm.wire.serialization import canonical
from fedllm.models.libraries import quiet_libraries
from fedllm.federation.plan import show
from fedllm.core import Display
from fedllm.progress import Progress
from fedllm.rounds import Interrupted, federate, own_scores
from fedllm.reports.run_record import json_in


PARALLEL: dict[str, Any] = {"clients": accelerate, "ddp": together, "fsdp": together}
"""``run.parallel`` -> how several processes work: ``ready``, then ``lead`` on rank 0 and ``serve`` on the others."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs it. 0: done; 2: something the user can mend, said in one sentence on stderr; 130: stopped by Ctrl-C."""
    quiet_libraries()
    recipe = None
    try:
        with joined() as processes:
            try:
                recipe = recipes.load(sys.argv[1:] if arguments is None else arguments)
            except FedError:
                if processes.rank:
                    return 2  # rank 0 says it
                raise
            torch.set_num_threads(recipe.run.threads or max(1, len(os.sched_getaffinity(0)) // processes.local_size))
            parallel = PARALLEL[recipe.run.parallel]
            with parallel.ready(processes, recipe):
                parallel.serve(processes, lambda: _hand(recipe)) if processes.rank else train(recipe, processes)
    except (FedError, KeyboardInterrupt) as error:
        at_once = (
            "stopped at once: run.resume=true goes on from the last finished round."
            if recipe is not None and folder.begun(recipe.output)
            else "stopped at once: no run was begun, and nothing was written."
        )
        print(f"fedllm: {str(error) or at_once}", file=sys.stderr)
        return 2 if isinstance(error, FedError) and not isinstance(error, Interrupted) else 130
    return 0


def _hand(recipe: recipes.Recipe) -> tuple[Algorithm, Worker]:
    """What a process needs that trains clients and does not lead."""
    return recipe.algorithm, build_federation(recipe).worker(lambda loss: None)


Lead = Callable[[Worker, Display, Callable[[], bool]], tuple[Worker, Fleet]]
"""The worker and the fleet of a run, of a loaded worker, the display, and whether somebody asked the run to stop."""


def train(
    recipe: recipes.Recipe,
    processes: Processes,
    *,
    federation: Federation | None = None,
    lead: Lead | None = None,
    notes_of: Callable[[], Sequence[str]] = lambda: (),
) -> None:
    """One recipe, from its rows to its report.

    Args:
        federation: of clients that are known already; by default the recipe's own.
        lead: makes the fleet; by default the launch's, of ``run.parallel``.
        notes_of: what the fleet has to say of the run when it has ended.
    """
    run, out, console = recipe.run, recipe.output, Console()
    if not run.plan:
        folder.check(out, resume=run.resume, overwrite=run.overwrite)
        tracking.ready(run.tracker)
        hub.ready(recipe)
    if federation is None:
        federation = build_federation(recipe)
    if run.plan:
        show(recipe, federation.plan(), console)
        return
    resumed = _resumed(recipe)
    title = f"{recipe.name}: {recipe.rule}, {len(federation.clients)} clients, {recipe.models}"
    with Progress(run.rounds, title, console) as display, once() as interrupted:
        processes.tell({"do": "start"})
        made = federation.worker(display.step)
        with folder.held(out), _kept(out):  # from here on nothing should fail that the user could have been told before
            folder.check(out, resume=run.resume, overwrite=run.overwrite)
            begun = _begun(recipe, federation, resumed)
            rows, hint = _federated(recipe, federation, begun, made, processes, display, interrupted, lead)
    promise = recipe.guarantee(federation.clients)
    told = federation.notes[:1] if recipe.unpublished != out else federation.notes
    notes = [*told, *notes_of(), *promise.lines]
    if recipe.eval.alone is not None:
        notes = [*notes, "A client alone trains for as many steps on its own rows as it does in the federation."]
    summary = {"title": title, "rows": rows, "notes": notes}
    with _kept(out):
        folder.write(out / "summary.json", json.dumps(summary, indent=1))
        written = report.write(out)
    report.print_summary(summary, console)
    exported = recipe.worker.exported
    console.print(f"[dim]report: {written}   {exported}: {out / exported}[/dim]", soft_wrap=True)
    if hint:
        console.print(f"[dim]curves: {hint}[/dim]", soft_wrap=True)
    hub.publish(recipe, console)


@contextmanager
def _kept(out: Path) -> Iterator[None]:
    """Says what is left of a run that its folder or its disk has failed."""
    try:
        yield
    except (files.Unwritten, OSError) as error:
        if isinstance(error, OSError) and error.errno not in files.LASTING:
            raise
        told = str(error) if isinstance(error, FedError) else f"{out}: {files.cause(error)}."
        kept = (
            "The last finished round is kept, and run.resume=true goes on from it once that is mended."
            if (out / folder.MARK).is_file()
            else "There is no run in that folder any more."
        )
        raise FedError(f"{told} {kept}") from error


def _federated(
    recipe: recipes.Recipe,
    federation: Federation,
    done: Checkpoint,
    made: Worker,
    processes: Processes,
    display: Display,
    interrupted: Callable[[], bool],
    lead: Lead | None = None,
) -> tuple[list[dict[str, Any]], str]:
    """Plays the rounds after ``done`` and exports what came of them; the summary's rows, and how to see the curves."""
    run, out, algorithm = recipe.run, recipe.output, recipe.algorithm
    tolerant = run.on_client_error == "refuse"
    if lead is None:
        worker, fleet = PARALLEL[run.parallel].lead(processes, made, display, tolerant=tolerant)
    else:
        worker, fleet = lead(made, display, interrupted)
    base = _base(recipe, worker, display)
    guarantee = recipe.guarantee(federation.clients)
    with closing(tracking.open_tracker(run.tracker, out, dict(recipe.page))) as tracker:

        def close(records: list[dict[str, Any]], state: Tensors) -> None:
            """Scores the last record's round if that is due, and makes its line public."""
            record = records[-1]
            last = record["round"] == run.rounds
            if last or (recipe.eval.every and record["round"] % recipe.eval.every == 0):
                record["eval"] = _score(out, worker, display, f"round_{record['round']:04d}", algorithm.served(state))
                record["eval"] |= own_scores(records)
            folder.append_line(out / "rounds.jsonl", record)
            tracker.log(record)
            display.finish_round(record)

        state, memories, records = done.state, done.memories, list(done.records)
        replies: Sequence[Reply] = []
        if records:
            close(records, state)
        rounds = federate(
            algorithm,
            federation.clients,
            worker,
            Waiting(recipe.faults.around(fleet), done.interrupted, done.finished),
            display,
            state=state,
            memories=done.memories,
            first=done.index + 1,
            rounds=run.rounds,
            seed=run.seed,
            participation=recipe.clients.participation,
            policy=replace(recipe.policy, privacy=guarantee),
            records=records,
            stop=interrupted,
        )
        try:
            for outcome in rounds:
                if recipe.unpublished != out:
                    folder.append_line(recipe.unpublished / "rounds.jsonl", outcome.private)
                state, memories, replies = outcome.state, outcome.memories, outcome.replies
                records.append(outcome.record)
                done = Checkpoint(outcome.round.index, state, memories, records, recipe.page)
                checkpoint.save(recipe.unpublished / "checkpoint", done)
                close(records, state)
        except Interrupted as stopped:
            part = replace(done, interrupted=stopped.rnd, finished=stopped.finished)
            checkpoint.save(recipe.unpublished / "checkpoint", part)
            raise
        if not records:
            raise FedError(
                "privacy.epsilon is spent before the first round: nothing was trained. Give a larger budget, or fewer "
                "rounds a client."
            )
        if records[-1]["round"] < run.rounds:
            print(
                f"fedllm: stopped after round {records[-1]['round']} of {run.rounds}: the next would pass "
                f"privacy.epsilon={recipe.privacy.epsilon:g}, since rounds that were begun twice count twice.",
                file=sys.stderr,
            )
            records[-1]["eval"] = _score(out, worker, display, "last", algorithm.served(state))
        rows = [{"name": "base model", **base}] if base else []
        rows.append({"name": f"federated ({recipe.rule})", **records[-1]["eval"]})
        if recipe.eval.clients:
            for reply in replies:
                own = algorithm.personal(reply, memories.get(reply.client.id, {}))
                scores = _score(out, worker, display, f"client_{reply.client.id}", own)
                rows.append({"name": f"client {reply.client.id}, its own model", **scores})
        for place in recipe.eval.alone_of(len(federation.clients)):
            rows += _alone(recipe, federation, worker, fleet, display, federation.clients[place], records)
        hub.export(recipe, federation, state, replies, memories)
        return rows, tracker.hint


def _resumed(recipe: recipes.Recipe) -> Checkpoint | None:
    """Where the run that is to be resumed stands; None where a new one is to begin. Only reads.

    Raises:
        FedError: there is nothing to resume from, it is of another recipe, or there is more of it than is asked for.
    """
    run, out = recipe.run, recipe.output
    if not run.resume:
        return None
    shown = recipe.eval.clients or recipe.hub.clients  # no checkpoint keeps the last round's replies: play it again
    done = checkpoint.load(recipe.unpublished / "checkpoint", recipe.page, until=run.rounds - 1 if shown else None)
    known = out / "rounds.jsonl"
    if done is None and known.is_file() and known.stat().st_size:
        raise FedError(f"{out} has rounds and no checkpoint to resume from: run.overwrite=true starts anew.")
    if done and done.index > run.rounds:
        raise FedError(
            f"run.rounds={run.rounds}, and the run in {out} has {done.index} rounds: it cannot be made shorter."
        )
    if done and done.page["run"]["rounds"] != run.rounds:
        follows = (
            "what changes over the rounds, such as a learning rate's schedule, follows the new number from here on."
        )
        print(
            f"fedllm: run.rounds was {done.page['run']['rounds']} and is {run.rounds} now: {follows}", file=sys.stderr
        )
    return done


def _begun(recipe: recipes.Recipe, federation: Federation, done: Checkpoint | None) -> Checkpoint:
    """The folder made ready, and where the run stands: what it left, or round 0 of a new one."""
    run, out = recipe.run, recipe.output
    known = recipe.guarantee(federation.clients).partition(federation.partition)
    folder.prepare(out, recipes.dump(recipe), known, overwrite=run.overwrite and not run.resume)
    if recipe.unpublished != out:
        folder.keep_back(recipe.unpublished)
        folder.write(recipe.unpublished / "partition.json", json.dumps(federation.partition, indent=1))
    first = canonical(recipe.algorithm.init(federation.model, federation.clients))
    if done is not None:
        checkpoint.check_state(done, first, out)
    else:
        done = Checkpoint(0, first, {}, [], recipe.page)
        checkpoint.save(recipe.unpublished / "checkpoint", done)
    folder.write_lines(out / "rounds.jsonl", done.records[:-1])
    return done


def _base(recipe: recipes.Recipe, worker: Worker, display: Display) -> dict[str, float]:
    """The untouched model's scores; once a run, also when it is resumed."""
    kept = recipe.output / "eval" / "base.json"
    if not recipe.eval.base:
        return {}
    if known := json_in(kept):
        return {key: float(value) for key, value in known.items()}
    scores = _score(recipe.output, worker, display, "base", {})
    folder.write(kept, json.dumps(scores))
    return scores


def _score(out: Path, worker: Worker, display: Display, name: str, update: Tensors) -> dict[str, float]:
    """Metrics of the base model plus ``update``; its generations go to ``eval/NAME.jsonl``."""
    display.evaluating(name)
    score = worker.evaluate(update)
    if score.generations:
        folder.write_lines(out / "eval" / f"{name}.jsonl", score.generations)
    return score.metrics


def _alone(
    recipe: recipes.Recipe,
    federation: Federation,
    worker: Worker,
    fleet: Fleet,
    display: Display,
    client: Client,
    records: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """A federation of one, in the rounds that counted this client's update: its rows and steps, nobody to average with.

    No row where no round did.
    """
    took_part = [record["round"] for record in records if client.id in record["clients"]]
    if not took_part:
        return []
    display.evaluating(f"client {client.id} alone")
    algorithm = federation.alone
    state: Tensors = algorithm.init(federation.model, [client])
    memories: Mapping[str, Tensors] = {}
    for index in took_part:
        for outcome in federate(
            algorithm, [client], worker, fleet, display,
            state=state, memories=memories, first=index, rounds=index, seed=recipe.run.seed,
        ):  # fmt: skip
            state, memories = outcome.state, outcome.memories
    scores = _score(recipe.output, worker, display, f"alone_{client.id}", algorithm.served(state))
    return [{"name": f"client {client.id} alone", **scores}]


if __name__ == "__main__":
    sys.exit(main())
