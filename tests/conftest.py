"""What every test runs under: one thread, no network; and where the real data lies."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
ALONE = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}


def pytest_configure() -> None:
    """Before any test module imports a library that reads these; the commands that tests start inherit them."""
    os.environ.update(OFFLINE | ALONE)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background: children would not hear Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real corpora: ``FEDLLM_DATA``, or ``../shared/data`` beside the checkout."""
    given = os.environ.get("FEDLLM_DATA")
    if given and not Path(given).is_dir():
        pytest.fail(f"FEDLLM_DATA={given} is not a folder: give one that exists, or unset it to skip these tests.")
    folder = Path(given) if given else Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real data: FEDLLM_DATA is not set and ../shared/data does not exist beside the checkout.")
    return folder.resolve()
