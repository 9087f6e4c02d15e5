"""A federation across machines: stock Flower carries the messages, fedllm runs on both ends."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fedllm.errors import FedError

TESTED = "1.42"
"""The minor version of flwr whose unpublished names ``api`` uses; another one may have moved them."""


def require_flower() -> None:
    """Raises FedError where flwr is missing, or is not the version this was tested with."""
    try:
        found = version("flwr")
    except PackageNotFoundError:
        raise FedError(
            "fedllm serve and fedllm join need Flower: pip install -c constraints.txt '.[flower]' in the checkout."
        ) from None
    if found.rpartition(".")[0] != TESTED:
        raise FedError(
            f"flwr {found} is installed, and fedllm talks to flwr {TESTED}: its protocol changes with every minor "
            f"version. Install flwr {TESTED} on the server and on every node."
        )
