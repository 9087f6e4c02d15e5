"""Looks for what must not leave a machine: keys of services, and paths that name people and machines."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedllm.errors import FedError

KEYS: dict[str, re.Pattern[bytes]] = {
    "a Hugging Face token": re.compile(rb"\b(?:hf|api_org)_[A-Za-z0-9]{20,}|\bhf_(?:jwt|oauth)_[A-Za-z0-9._-]{20,}"),
    "a key of OpenAI, Anthropic or the like": re.compile(rb"\bsk-[A-Za-z0-9_-]{20,}"),
    "a key of AWS": re.compile(
        rb"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}\b|(?i:aws_?secret_?access_?key)\W{1,6}[A-Za-z0-9/+=]{40}"
    ),
    "a token of GitHub": re.compile(rb"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_[A-Za-z0-9_]{30,}"),
    "a token of GitLab": re.compile(rb"\bgl(?:pat|dt|rt|ptt|cbt)-[A-Za-z0-9_-]{20,}"),
    "a key of Weights & Biases": re.compile(
        rb"\bwandb_v\d_[A-Za-z0-9_]{20,}|(?i:wandb)\W{0,3}\w{0,20}\W{1,6}[0-9a-f]{40}\b"
    ),
    "a token of Slack": re.compile(
        rb"\bxox[a-z]-[A-Za-z0-9-]{10,}|\bxapp-[A-Za-z0-9-]{10,}|hooks\.slack\.com/services/\w+/\w+"
    ),
    "a key of Google": re.compile(rb"\bAIza[A-Za-z0-9_-]{35}|\bya29\.[A-Za-z0-9_-]{20,}|\bGOCSPX-[A-Za-z0-9_-]{20,}"),
    "a key of Azure": re.compile(rb"\bAccountKey=[A-Za-z0-9+/=]{40,}"),
    "a key of Stripe": re.compile(rb"\b[sr]k_(?:live|test)_[A-Za-z0-9]{16,}"),
    "a token of a package index": re.compile(rb"\bnpm_[A-Za-z0-9]{36}|\bpypi-AgE[A-Za-z0-9_-]{40,}"),
    "a key of Replicate": re.compile(rb"\br8_[A-Za-z0-9]{30,}"),
    "a private key": re.compile(rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"),
    "a signed token (JWT)": re.compile(rb"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),
}
"""What the keys of the usual services look like."""

NAMED = re.compile(r"(?i)(?:^|_)(?:api_?key|access_?key|token|secret|password|passwd|credentials?)(?:_|$)")
"""Variables of the environment that hold a secret."""

SHORTEST = 12
"""Characters; a shorter value of such a variable may stand in any text."""

HOME = re.compile(rb"(?:/home/|/Users/|[A-Za-z]:(?:\\\\?|/)Users(?:\\\\?|/))[^/\\\s\"'`<>|:]+|(?<![\w/.])/root(?=/)")
"""The folder of a person."""

REST = rb"(?:[/\\]+[^/\\\s\"'`<>|:]+)*"


def refuse_keys(name: str, held: bytes, token: str | None) -> None:
    """Checks a text that is to be uploaded.

    Args:
        token: of the Hub, as this process knows it.

    Raises:
        FedError: it holds a key of a service, or the value of a secret of this process's environment.
    """
    found = next((what for what, pattern in KEYS.items() if pattern.search(held)), None)
    if token and len(token) >= SHORTEST and token.encode() in held:
        found = "a Hugging Face token"
    for variable, value in os.environ.items():
        if found is None and NAMED.search(variable) and len(value) >= SHORTEST and value.encode() in held:
            found = f"the value of {variable}"
    if found is not None:
        raise FedError(f"{name} holds {found}, and nothing was uploaded: take it out of the run's files.")


def without_paths(text: bytes, page: Mapping[str, Any], run: Path) -> bytes:
    """The text with every folder of this machine cut to its last part.

    Args:
        page: a recipe, whose paths are such folders wherever the text has them.
        run: the run's folder.
    """
    known = {str(run.absolute()), str(run.resolve()), str(Path.cwd()), str(Path.home()), *absolute(page)} - {"/", ""}
    for path in sorted(known, key=len, reverse=True):
        text = re.sub(re.escape(path.encode()) + REST, _last, text)
    return re.sub(rb"(?:" + HOME.pattern + rb")" + REST, _last, text)


def _last(found: re.Match[bytes]) -> bytes:
    return re.split(rb"[/\\]+", found[0].rstrip(b"/\\"))[-1]


def absolute(page: Any) -> Iterator[str]:
    """Every absolute path in a page."""
    if isinstance(page, Mapping):
        for value in page.values():
            yield from absolute(value)
    elif isinstance(page, list):
        for value in page:
            yield from absolute(value)
    elif isinstance(page, str) and re.match(r"(?:[/~]|[A-Za-z]:[\\/])[^\s]", page) and "\n" not in page:
        yield page.rstrip("/\\")
