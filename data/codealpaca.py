"""Fetches Code Alpaca: `python data/codealpaca.py --out DIR`, then `data.name=codealpaca data.path=DIR`.

Writes DIR/train.jsonl: 20,022 rows of the Hub, or with `--labelled` the file that has a language beside every row, its
nine languages of FedHL only, for `data.name=rosetta_alpaca`.
"""

from __future__ import annotations

import sys

from fedllm.tasks.code import CodeAlpaca, RosettaAlpaca
from fedllm.tasks.download import command


def main(arguments: list[str] | None = None) -> int:
    """0: written; 2: it cannot be had, said in one sentence."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--labelled" in given:
        given.remove("--labelled")
        said = "Fetch the language-labelled Code Alpaca (CC BY-NC 4.0: not for commerce) into local JSON Lines."
        return command(said, RosettaAlpaca, "train", None, given)
    said = (
        "Fetch Code Alpaca (20,022 instructions, CC BY-NC 4.0: not for commerce); --labelled: the file with languages."
    )
    return command(said, CodeAlpaca, "train", 20022, given)


if __name__ == "__main__":
    sys.exit(main())
