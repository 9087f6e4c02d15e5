"""Damaged and hostile input, by the thousand: each must end in a result or in one sentence.

    python benchmarks/mutations.py                                   # the figures of results/mutations.json, 10 minutes
    python benchmarks/mutations.py adapters=200 recipes=50 rows=20 runs=20 checkpoints=5 seed=7

A case is a sound folder or page with one to three seeded changes. It is read by the command that a user would type, in
a process that may take 1 GiB beyond its start. Counted are exceptions that are no ``FedError``, cases past 20 seconds,
cases past that memory, and files written or changed outside the case's own folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from fedllm.cli import main as fedllm
from fedllm.lowrank import LowRank
from fedllm.models.libraries import quiet_libraries
from fedllm.storage import peft_folder

CASES = {"adapters": 3000, "recipes": 600, "rows": 300, "runs": 400, "checkpoints": 50, "seed": 1}
SECONDS = 20.0
MEMORY = 1 << 30
SCALARS: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 7, 10**9, -(10**18), 2**64, 0.5, -0.0, 1e-320, 1e308, float("inf"), float("nan")),
    *(
        "",
        " ",
        "a",
        "x" * 5000,
        "../../etc/passwd",
        "/dev/zero",
        "${oc.env:HOME}",
        "\x00",
        "\ud800",
        "é",
        "1e5",
        "null",
    ),
]
VALUES: list[Any] = [
    *SCALARS,
    [],
    {},
    [[]],
    [1, "a", None],
    {"a": {"b": []}},
    ["q_proj", 3],
    {"name": "fedhl"},
    [0] * 300,
]
PATTERNS = ["(a+)+$", ".*a.*a.*b", "(", "q_proj|v_proj", "[", "a{99999}", "x" * 600]

Change = Callable[[random.Random, Path], None]
"""Spoils a sound copy in place."""


class Overtime(BaseException):
    """A case past its seconds; no library's ``except Exception`` takes it."""


# --- changes of JSON, text and bytes


def replaced(draw: random.Random, page: Any) -> Any:
    """``page`` with one value, somewhere in it, dropped, renamed or replaced."""
    if isinstance(page, dict) and page and draw.random() < 0.8:
        key = draw.choice(sorted(page, key=str))
        kind = draw.random()
        rest = {name: value for name, value in page.items() if name != key}
        if kind < 0.15:
            return rest
        if kind < 0.25:
            return rest | {draw.choice(["x", "", f"{key}_", "__class__"]): page[key]}
        return page | {key: replaced(draw, page[key])}
    if isinstance(page, list) and page and draw.random() < 0.8:
        place = draw.randrange(len(page))
        return [*page[:place], replaced(draw, page[place]), *page[place + 1 :]]
    return draw.choice(VALUES)


def spoil_json(file: Path) -> Change:
    def change(draw: random.Random, folder: Path) -> None:
        (folder / file).write_text(json.dumps(replaced(draw, json.loads((folder / file).read_text()))))

    return change


def spoil_bytes(file: Path) -> Change:
    """Flips, cuts, doubles, empties, or puts something else in the file's place."""

    def change(draw: random.Random, folder: Path) -> None:
        path = folder / file
        body = bytearray(path.read_bytes())
        kind = draw.randrange(9)
        if kind == 0 and body:
            for _ in range(draw.choice([1, 8, 64])):
                body[draw.randrange(len(body))] ^= 1 << draw.randrange(8)
        elif kind == 1:
            body = body[: draw.randrange(len(body) + 1)]
        elif kind == 2:
            body += body
        elif kind == 3:
            body = bytearray()
        elif kind == 4:
            body[: min(8, len(body))] = struct.pack("<Q", draw.choice([0, 1, 1 << 40, (1 << 64) - 1]))[: len(body)]
        elif kind == 5:
            body = bytearray(b"[" * 100_000)
        elif kind == 6:
            body = bytearray(b"\xff\xfe\x00" * 50)
        elif kind == 7:
            path.unlink()
            draw.choice([lambda: path.mkdir(), lambda: path.symlink_to("/dev/zero"), lambda: os.mkfifo(path)])()
            return
        else:
            path.unlink()
            path.symlink_to(folder.parent / "outside" / "precious.txt")
            return
        path.write_bytes(body)

    return change


def spoil_tensors(file: Path) -> Change:
    """Renames, drops, adds, reshapes or retypes a tensor, or makes its values extreme."""

    def change(draw: random.Random, folder: Path) -> None:
        tensors = load_file(folder / file)
        name = draw.choice(sorted(tensors))
        tensor = tensors.pop(name)
        kind = draw.randrange(6)
        if kind == 0:
            tensors[draw.choice(["x", name + ".x", "../" + name, name.replace("lora_A", "lora_C"), "é" * 300])] = tensor
        elif kind == 1:
            tensors["base_model.model.more.lora_A.weight"] = tensor.clone()
        elif kind == 2:
            tensors[name] = draw.choice(
                [tensor.flatten(), tensor[:0], tensor[:, :1], tensor[None], tensor.T]
            ).contiguous()
        elif kind == 3:
            kinds = [torch.int8, torch.bool, torch.float64, torch.float16, torch.float8_e4m3fn, torch.complex64]
            tensors[name] = tensor.to(draw.choice(kinds))
        elif kind == 4:
            tensors[name] = tensor * draw.choice([float("nan"), float("inf"), 1e30, 1e-30, 0.0])
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / file)

    return change


def spoil_patterns(draw: random.Random, folder: Path) -> None:
    file = folder / peft_folder.CONFIG
    page = json.loads(file.read_text())
    table = {draw.choice(PATTERNS) + str(n): draw.choice([1, 2, 4, "x"]) for n in range(draw.choice([1, 30, 3000]))}
    file.write_text(json.dumps(page | {draw.choice(["rank_pattern", "alpha_pattern"]): table}))


def spoil_lines(file: Path) -> Change:
    """Changes one row of a JSON-lines file: a value, the text around it, or the row's end."""

    def change(draw: random.Random, folder: Path) -> None:
        lines = (folder / file).read_text().splitlines()
        place = draw.randrange(len(lines))
        kind = draw.randrange(5)
        if kind < 3:
            lines[place] = json.dumps(replaced(draw, json.loads(lines[place])))
        elif kind == 3:
            lines[place] = draw.choice(["", "{", lines[place] + ",", "[" * 5000, '{"question": "' + "a" * 10**7 + '"}'])
        else:
            lines.insert(place, draw.choice(["null", "[]", "3", '"text"', "{}", "\ufeff{}"]))
        (folder / file).write_text("\n".join(lines) + "\n", errors="surrogatepass")

    return change


def spoil_yaml(file: Path) -> Change:
    """Changes a page's values, or its text: aliases, tags, tabs, depth."""

    def change(draw: random.Random, folder: Path) -> None:
        text = (folder / file).read_text()
        if draw.random() < 0.6:
            page = replaced(draw, yaml.safe_load(text))
            (folder / file).write_text(yaml.dump(page, allow_unicode=True), errors="surrogatepass")
            return
        lines = text.splitlines()
        place = draw.randrange(len(lines) + 1)
        bomb = "a: &a [x,x,x,x]\nb: &b [*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b]\nd: [*c,*c,*c,*c]"
        odd = [
            "\tx: 1",
            "x: !!python/object:os.system {}",
            bomb,
            "[" * 3000,
            "x: 1\nx: 2",
            "? [a]\n: b",
            "x: " + "9" * 6000,
            "- 1",
        ]
        lines.insert(place, draw.choice(odd))
        (folder / file).write_text("\n".join(lines))

    return change


def spoil_checkpoint(draw: random.Random, folder: Path) -> None:
    """Edits the newest checkpoint and vouches for it again, so that no digest tells."""
    newest = max((folder / "checkpoint").glob("round_*"))
    file = newest / "checkpoint.json"
    page = json.loads(file.read_text().partition("\n")[2])
    if draw.random() < 0.35:
        spoil_tensors(Path("state.safetensors"))(draw, newest)
        page["sha256"]["state.safetensors"] = hashlib.sha256((newest / "state.safetensors").read_bytes()).hexdigest()
    else:
        page = replaced(draw, page)
    body = json.dumps(page)
    file.write_text(hashlib.sha256(body.encode()).hexdigest() + "\n" + body + "\n")


# --- the kinds of cases: what is sound, how it is spoilt, who reads it


def sound_adapter(folder: Path) -> None:
    g = torch.Generator().manual_seed(0)
    updates = {
        f"model.layers.{n}.self_attn.{target}": LowRank(torch.randn(8, 2, generator=g), torch.randn(2, 8, generator=g))
        for n in range(2)
        for target in ("q_proj", "v_proj")
    }
    peft_folder.write(folder, updates, base_model="pico", targets=("q_proj", "v_proj"))


def adapters(draw: random.Random, sound: Path, folder: Path) -> list[str]:
    case = shutil.copytree(sound / "adapter", folder / "adapter")
    config, weights = Path(peft_folder.CONFIG), Path(peft_folder.WEIGHTS)
    changes = [
        spoil_json(config),
        spoil_json(config),
        spoil_bytes(config),
        spoil_bytes(weights),
        spoil_tensors(weights),
    ]
    spoilt(draw, case, [*changes, spoil_tensors(weights), spoil_patterns])
    rule = draw.choice(["fedit", "flora", "flexlora", "fedhl"])
    return ["aggregate", rule, str(sound / "adapter"), str(case), "--out", str(folder / "out")]


def recipes(draw: random.Random, sound: Path, folder: Path) -> list[str]:
    page = draw.choice(sorted(sound.glob("recipes/*.yaml")))
    shutil.copy(page, folder / "mine.yaml")
    spoilt(draw, folder, [spoil_yaml(Path("mine.yaml"))])
    return ["plan", f"recipe={folder / 'mine.yaml'}", "data.train_rows=40", "data.test_rows=4"]


def rows(draw: random.Random, sound: Path, folder: Path) -> list[str]:
    case = shutil.copytree(sound / "rows", folder / "rows")
    spoilt(
        draw,
        case,
        [spoil_lines(Path("train.jsonl")), spoil_lines(Path("test.jsonl")), spoil_bytes(Path("train.jsonl"))],
    )
    return ["plan", "recipe=smoke", "data.name=gsm8k", f"data.path={case}", "data.train_rows=20", "data.test_rows=4"]


def runs(draw: random.Random, sound: Path, folder: Path) -> list[str]:
    case = shutil.copytree(sound / "run", folder / "run")
    changes: list[Change] = []
    for file in sorted(path.relative_to(case) for path in case.rglob("*") if path.is_file() and path.suffix != ".png"):
        changes.append(spoil_bytes(file))
        if file.suffix == ".json":
            changes += [spoil_json(file)] * 2
        if file.suffix == ".yaml":
            changes += [spoil_yaml(file)] * 4
        if file.suffix == ".jsonl":
            changes += [spoil_lines(file)] * 2
    spoilt(draw, case, changes)
    scored = ["evaluate", str(case), "rows=2", "generate=false", "resamples=20", f"output={folder / 'scores'}"]
    return draw.choice([["report", str(case)], ["compare", str(case)], ["push", str(case), "--dry-run"], scored])


def checkpoints(draw: random.Random, sound: Path, folder: Path) -> list[str]:
    case = shutil.copytree(sound / "unfinished", folder / "unfinished")
    spoilt(draw, case, [spoil_checkpoint], most=1)
    return [*SMALL, "run.resume=true", "run.rounds=2", f"run.output={case}"]


KINDS = {kind.__name__: kind for kind in (adapters, recipes, rows, runs, checkpoints)}
SMALL = ["train", "recipe=smoke", "worker.steps=1", "data.train_rows=24", "data.test_rows=2", "eval.generate=false"]


def spoilt(draw: random.Random, folder: Path, changes: list[Change], most: int = 3) -> None:
    """One to ``most`` changes; a later one that finds its file gone is left out."""
    for _ in range(draw.choice([1] * 6 + [2] * 2 + [3]) if most > 1 else 1):
        with contextlib.suppress(Exception):
            draw.choice(changes)(draw, folder)


def prepare(scratch: Path) -> None:
    """The sound input of each kind."""
    scratch.mkdir()
    sound_adapter(scratch / "adapter")
    shutil.copytree(Path(__file__).parents[1] / "recipes", scratch / "recipes")
    (scratch / "rows").mkdir()
    lines = [
        json.dumps({"question": f"What is {n} + 2?", "answer": f"It is {n + 2}.\n#### {n + 2}"}) for n in range(30)
    ]
    for name in ("train", "test"):
        (scratch / "rows" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    for name in ("run", "unfinished"):
        with contextlib.redirect_stdout(io.StringIO()):
            assert fedllm([*SMALL, "run.rounds=1", "run.overwrite=false", f"run.output={scratch / name}"]) == 0


# --- running them


def outcome(argv: list[str]) -> str:
    """``done``, ``refused``, or what went wrong."""

    def too_long(signum: int, frame: Any) -> None:
        raise Overtime

    signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            code = fedllm(argv)
    except Overtime:
        return "hang"
    except MemoryError:
        return "memory"
    except (KeyboardInterrupt, SystemExit) as error:
        return f"traceback: {type(error).__name__}"
    except BaseException as error:  # a Rust panic is no Exception
        where = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in where if "fedllm" in frame.filename] or where
        return (
            f"traceback: {type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}: {str(error)[:120]}"
        )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    lines = said.getvalue().strip().splitlines()
    if code == 2 and not (lines and lines[-1].startswith("fedllm: ")):
        return "refused without a sentence"
    return {0: "done", 2: "refused"}.get(code, f"exit code {code}")


def digest_of(folder: Path) -> str:
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        whole.update(str(path.relative_to(folder)).encode())
        whole.update(path.read_bytes() if path.is_file() else b"")
    return whole.hexdigest()


def work(kind: str, seed: int, numbers: list[int], scratch: Path, answers: Connection) -> None:
    """Cases ``numbers`` of a kind, one answer each: number, outcome, and whether something outside was changed."""
    quiet_libraries()
    outside = scratch / "outside"
    used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for number in numbers:
        draw = random.Random(f"{kind} {seed} {number}")
        folder = scratch / f"{kind}_{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        argv = KINDS[kind](draw, scratch / "sound", folder)
        before = digest_of(outside)
        answers.send((number, "started", False))
        ended = outcome(argv)
        answers.send((number, ended, digest_of(outside) != before))
        if not ended.startswith(("done", "refused")):
            shutil.copytree(
                folder, scratch.parent / "kept" / folder.name, symlinks=True, dirs_exist_ok=True, copy_function=_copied
            )
        shutil.rmtree(folder, ignore_errors=True)
    answers.send((-1, "end", False))


def _copied(source: str, target: str) -> None:
    if Path(source).is_file():
        shutil.copy2(source, target, follow_symlinks=False)


def run_kind(kind: str, count: int, seed: int, scratch: Path) -> dict[str, Any]:
    """All cases of a kind, in processes that are replaced where one hangs or dies."""
    found: dict[int, str] = {}
    written = []
    left = list(range(count))
    began = time.monotonic()
    while left:
        mine, theirs = multiprocessing.get_context("spawn").Pipe(duplex=False)
        child = multiprocessing.get_context("spawn").Process(target=work, args=(kind, seed, left, scratch, theirs))
        child.start()
        theirs.close()
        current = left[0]
        while True:  # seconds of the case's own, and those of its making
            try:
                answered = mine.poll(SECONDS + 20)
                number, ended, changed = mine.recv() if answered else (current, "hang", False)
            except EOFError:
                number, ended, changed = current, "memory or a crash of the process", False
                answered = False
            if number < 0:
                break
            current = number
            if ended == "started":
                continue
            found[number] = ended
            if ended not in ("done", "refused"):
                print(f"{kind} {number}: {ended}", file=sys.stderr, flush=True)
            if changed:
                written.append(number)
            if not answered:
                break
        child.kill()
        child.join()
        left = [number for number in range(count) if number not in found]
        left = [number for number in left if number > max(found, default=-1)]
    kinds = Counter("traceback" if ended.startswith("traceback") else ended for ended in found.values())
    worst = {f"{kind} {n}": ended for n, ended in sorted(found.items()) if ended not in ("done", "refused")}
    seconds = round(time.monotonic() - began)
    return {"cases": count, "seconds": seconds, "ended": dict(kinds), "written_outside": written, "worst": worst}


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    unknown = set(given) - {*CASES, "keep"}
    if unknown:
        sys.exit(f"mutations: {', '.join(sorted(unknown))}: give some of {', '.join(CASES)}.")
    keep = given.pop("keep", None)
    asked = CASES | {key: int(value) for key, value in given.items()}
    seed = asked.pop("seed")
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary) / "work"
        scratch.mkdir()
        (scratch / "outside").mkdir()
        (scratch / "outside" / "precious.txt").write_text("not of this case\n")
        prepare(scratch / "sound")
        figures = {kind: run_kind(kind, count, seed, scratch) for kind, count in asked.items()}
        if keep:
            shutil.copytree(scratch.parent / "kept", keep, symlinks=True, dirs_exist_ok=True)
    print(json.dumps({"seed": seed, **figures}, indent=1))
    bad = sum(len(figure["worst"]) + len(figure["written_outside"]) for figure in figures.values())
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
