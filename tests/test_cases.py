"""Every folder of ../shared/cases: the command of its README, and what is right.

A case is a line of the command, the exit code and what is said. All run in this process; those that need a run of their
own are in the files that test what they are about, and named here.
"""

from __future__ import annotations

import json
import re
import resource
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedllm.cli import main

CASES = Path(__file__).parents[2] / "shared/cases"
GSM8K = Path(__file__).parents[2] / "shared/data/gsm8k"


@dataclass(frozen=True)
class Case:
    """One command of a case.

    Args:
        line: what comes after ``fedllm``; HERE is the case's folder, OUT a new one.
        said: a pattern of stderr, or of stdout where the code is 0.
        metric: of ``OUT/result.json``, with its value.
    """

    line: str
    code: int = 2
    said: str = ""
    metric: tuple[str, float] | None = None


SCORE = "task=word_problems data.test_rows=8 generate=false output=OUT"
ALPACA = "plan recipe=smoke data.name=alpaca data.held_out=0 data.path=HERE"

RIGHT: dict[str, list[Case]] = {
    "adapter-in-a-folder-of-its-name": [
        Case("aggregate fedit HERE/adapter --out OUT", 0),
        Case(f"evaluate HERE/adapter model=pico {SCORE}", 0),
    ],
    "adapter-keys-with-its-name": [
        Case("aggregate fedit HERE/adapter --out OUT", 0),
        Case(f"evaluate HERE/adapter model=pico {SCORE}", 0, metric=("loss", 5.6016)),
    ],
    "adapter-keys-without-prefix": [
        Case(f"evaluate HERE/adapter model=pico {SCORE}", 2, "fit no module"),
        Case("aggregate fedit HERE/adapter --out OUT", 2, "base_model.model"),
    ],
    "attack-pattern-takes-hours": [Case("aggregate flora HERE/adapter --out OUT", 2, "for ever")],
    "attack-recipe-a-billion-clients": [
        Case("plan recipe=smoke clients.rank=2 clients.count=1000000000", 2, "clients"),
        Case(f"plan recipe=smoke clients.rank=2 clients.count={2**70}", 2, "clients"),
    ],
    "attack-recipe-name-is-a-list": [
        Case("plan recipe=HERE/algorithm.yaml", 2, "algorithm.name"),
        Case("plan recipe=HERE/data.yaml", 2, "data.name"),
        Case("plan recipe=smoke robust.name=[krum]", 2, "robust.name"),
    ],
    "attack-recipe-number-of-5000-digits": [
        Case(f"plan recipe=HERE/{page}.yaml", 2) for page in ("digits", "date", "tag", "bool")
    ],
    "attack-rho-found-too-late": [Case("plan recipe=vision_smoke algorithm.name=pfedlmt", 2, "0 to 6")],
    "base-weights-with-prefix": [
        Case(f"evaluate HERE/model {SCORE}", 2, "lm_head.weight"),
        Case(f"evaluate HERE/model-right {SCORE}", 0, metric=("loss", 5.5544)),
    ],
    "encoder-decoder-model": [
        Case("plan recipe=smoke model.name=HERE/model worker.targets=[q,v]", 2, "no causal language model")
    ],
    "evaluate-learned-positions": [
        Case(f"evaluate HERE/model task=gsm8k data.path={GSM8K} rows=4 max_new_tokens=50 output=OUT", 2, "places 256")
    ],
    "gsm8k-gold-is-a-fraction": [
        Case("evaluate model=pico task=gsm8k data.path=HERE/test.jsonl max_new_tokens=4 output=OUT", 0,
             metric=("exact_match", 0.0)),
    ],
    "humaneval-fenced-answer": [
        Case("evaluate HERE/model task=humaneval data.path=HERE/test.jsonl allow_code_execution=true "
             "max_new_tokens=300 output=OUT", 0, metric=("pass_at_1_fenced", 1.0)),
    ],
    "humaneval-first-space": [
        Case("evaluate HERE/model task=humaneval data.path=HERE/test.jsonl allow_code_execution=true "
             "max_new_tokens=120 output=OUT", 0, metric=("pass_at_1", 1.0)),
    ],
    "humaneval-rows-without-solution": [
        Case("evaluate model=pico task=humaneval data.path=HERE/test.jsonl allow_code_execution=true "
             "max_new_tokens=8 output=OUT", 0, metric=("pass_at_1", 0.0)),
    ],
    "json-rows-under-a-key": [Case(ALPACA, 0, r"12 (training )?rows|12 of 12|trained on 12|rows +12")],
    "jsonl-lines-end-in-commas": [Case(ALPACA, 2, "comma")],
    "rouge-chinese": [
        Case("evaluate HERE/model task=dolly data.path=HERE/rows max_new_tokens=80 output=OUT", 0,
             metric=("rouge_l", 1.0)),
    ],
    "row-number-after-held-out": [
        Case("plan recipe=smoke data.name=dolly data.held_out=8 data.path=HERE", 2, r"row 21\b")
    ],
    "rows-with-half-a-surrogate": [Case(ALPACA, 2, "line 4: .*half a character")],
    "tokenizer-larger-than-embedding": [
        Case("evaluate HERE/model task=word_problems data.test_rows=4 max_new_tokens=4 output=OUT", 2, "up to 259"),
        Case("plan recipe=smoke model.name=HERE/model", 2, "up to 259"),
    ],
    "tokenizer-without-pad-or-eos": [
        Case("evaluate HERE/model task=word_problems data.test_rows=4 max_new_tokens=4 output=OUT", 2, "eos_token"),
    ],
    "weights-file-is-a-pointer": [Case(f"evaluate HERE/model {SCORE}", 2, "Git LFS")],
}  # fmt: skip

ELSEWHERE = {
    "attack-adapter-old-left-behind": "tests/test_files.py: what a kill leaves is removed",
    "attack-checkpoint-record-without-clients": "tests/test_files.py: forged records",
    "attack-data-line-of-100-mb": "test_a_line_of_100_mb_and_what_is_no_file below",
    "attack-disk-full": "tests/test_files.py: a file limit; slow: a run under one",
    "attack-killed-while-a-checkpoint-is-replaced": "tests/test_files.py: a round written again is never missing",
    "attack-link-at-the-writing-name": "tests/test_files.py: links in a run's folder",
    "attack-push-sends-a-linked-file": "tests/test_hub.py: no link is followed",
    "attack-recipe-reads-the-environment": "tests/test_plain_yaml.py",
    "attack-run-page-of-aliases": "tests/test_plain_yaml.py",
    "attack-stop-iteration-ends-the-tests": "tests/test_code.py (issue 11, scores)",
    "attack-update-of-another-dtype": "tests/test_admission.py (issue 11, admission)",
    "attack-regauged-factors": "tests/test_admission.py (issue 11, admission)",
    "attack-mfedloru-with-a-guard": "tests/test_robust.py (issue 11, algorithms)",
    "completions-cut-unsaid": "issue 11, scores",
    "disk-full": "tests/test_files.py, as attack-disk-full",
    "image-set-in-several-files": "tests/test_vision.py (issue 11)",
    "model-path-of-another-folder": "tests/test_files.py: paths of a recipe are absolute",
    "two-evaluations-one-output": "tests/test_files.py: two evaluations",
    "all-linear-targets": "issue 13: targets",
    "alpaca-input-null-or-absent": "issue 13: own data",
    "chat-messages-rows": "issue 13: own data",
    "csv-rows": "issue 13: own data",
    "own-column-names": "issue 13: own data",
}
"""Cases that a process of their own, another test or another issue looks at."""

COMMANDS = [(name, place) for name, cases in RIGHT.items() for place in range(len(cases))]


def test_every_case_is_looked_at() -> None:
    if not CASES.is_dir():
        pytest.skip("../shared/cases is not here")
    assert {path.name for path in CASES.iterdir() if path.is_dir()} <= RIGHT.keys() | ELSEWHERE.keys()
    assert not RIGHT.keys() & ELSEWHERE.keys()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "place"), COMMANDS)
def test_a_case_gives_what_its_readme_calls_right(
    name: str, place: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (CASES / name).is_dir():
        pytest.skip(f"../shared/cases/{name} is not here")
    case = RIGHT[name][place]
    line = case.line.replace("HERE", str(CASES / name)).replace("OUT", str(tmp_path / "out"))
    code = main(line.split())
    told = capsys.readouterr()
    assert code == case.code, told.err
    if code == 2:
        assert len(told.err.strip().splitlines()) == 1 and told.err.startswith("fedllm: "), told.err
        assert re.search(case.said, told.err), told.err
    if case.metric is not None:
        key, value = case.metric
        found = json.loads((tmp_path / "out/result.json").read_text())["metrics"][key]["value"]
        assert found == pytest.approx(value, abs=5e-5)


@pytest.mark.parametrize("what", ["a long line", "many lists", "a device", "a pipe"])
def test_a_line_of_100_mb_and_what_is_no_file(what: str, tmp_path: Path) -> None:
    """Refused in a sentence, within 700 MB: the text twice, and no more."""
    import os

    from fedllm.data.sources import local
    from fedllm.errors import FedError

    file = tmp_path / "train.jsonl"
    if what == "a device":
        file.symlink_to("/dev/zero")
    elif what == "a pipe":
        os.mkfifo(file)
    else:
        row = '{"question": "%s"}' % ("a" * 10**8) if what == "a long line" else '{"a": [%s[]]}' % ("[]," * 33_000_000)
        file.write_text(row)
        del row
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FedError, match=r"no regular file|no row is that long|neither"):
        local(str(tmp_path))["train"]()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700 * 1024  # kB


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": "x"},\n{"a": "y"}\n', "line 1: the line ends in a comma"),
        ('{"a": "x"}\n{"a": "\\ud83d"}\n', "half a character (a lone surrogate)"),
        ('{"a": "x"}\n[1]\n', "row 2: a row is a JSON object"),
    ],
)
def test_rows_that_are_none_are_told_why(text: str, said: str, tmp_path: Path) -> None:
    from fedllm.data.sources import read
    from fedllm.errors import FedError

    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(FedError, match=re.escape(said)):
        read(tmp_path / "train.jsonl")
