"""What the federation costs on top of the optimizer steps: fixed overhead a client-round, and a whole run's ratio.

    python benchmarks/overhead.py                                            # the pico model
    python benchmarks/overhead.py model=HuggingFaceTB/SmolLM2-135M-Instruct steps=4 rounds=2

Ours and the alternative, one plain ``SFTTrainer.train()`` of as many optimizer steps on the same rows, batch size and
rank, run in one process, in turn. The overhead of a client-round is the time of one round with one step minus that of a
step inside a long ``train()``: all but the optimizer's work (factors in and out, a fresh optimizer, setting up).
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

from fedllm.algorithms.lora.fedhl import FedHL
from fedllm.core import Client, Model, Round
from fedllm.data.encoding import encode
from fedllm.fleets.local import Local
from fedllm.models.language import LanguageModel, load, skeleton, tokenizer
from fedllm.models.libraries import quiet_libraries
from fedllm.progress import Silent
from fedllm.rounds import federate
from fedllm.tasks.word_problems import generate
from fedllm.workers.lora import target_shapes
from fedllm.workers.settings import SFT
from fedllm.workers.sft import SFTWorker

DEFAULTS = {
    "model": "pico",
    "clients": "4",
    "rounds": "3",
    "steps": "100",
    "batch": "4",
    "rank": "8",
    "threads": "1",
    "out": "",
}


def main(arguments: list[str]) -> None:
    given = DEFAULTS | dict(argument.split("=", 1) for argument in arguments)
    quiet_libraries()
    torch.set_num_threads(int(given["threads"]))
    clients, rounds, steps = int(given["clients"]), int(given["rounds"]), int(given["steps"])
    batch, rank, name = int(given["batch"]), int(given["rank"]), LanguageModel(given["model"], dtype="float32")
    tok = tokenizer(name)
    problems = generate(clients * 50, seed=0, difficulty="easy")
    rows = encode(
        tok, [f"Question: {p['question']}\nAnswer:" for p in problems], [f" {p['answer']}" for p in problems], 512
    )
    members = [Client(f"c{i}", 50, rank) for i in range(clients)]
    parts = {member.id: rows[i * 50 : (i + 1) * 50] for i, member in enumerate(members)}
    shapes = target_shapes(skeleton(name), ("q_proj", "v_proj"))
    model = Model({module: torch.empty(shape, device="meta") for module, shape in shapes.items()})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    worker = SFTWorker(SFT(steps=steps, batch_size=batch), load(name, device, 0), tok, parts, rounds)
    plain = plain_trainer(name, device, tok, rows, batch, rank)

    one_step = SFTWorker(SFT(steps=1, batch_size=batch), load(name, device, 0), tok, parts, rounds)
    sent = FedHL().download(FedHL().init(model, members), members[0], Round(1, 0))
    client_rounds = [timed(lambda: one_step.of(members[0]).train(sent, {}, Round(1, 0))) for _ in range(30)][5:]

    ours, theirs = [], []
    for _ in range(3):  # in turn, so that a drifting machine slows both
        ours.append(timed(lambda: run(worker, model, members, rounds)))
        plain.args.max_steps = clients * rounds * steps
        plain.optimizer = plain.lr_scheduler = None
        theirs.append(timed(plain.train))
    total = clients * rounds * steps
    step = statistics.median(theirs) / total
    result = {
        "model": given["model"],
        "optimizer_steps": total,
        "ours_s": statistics.median(ours),
        "plain_s": statistics.median(theirs),
        "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        "step_ms": 1e3 * step,
        "client_round_overhead_ms": 1e3 * (statistics.median(client_rounds) - step),
        "settings": given,
        "torch": torch.__version__,
        "device": str(device),
    }
    print(json.dumps(result, indent=1))
    if given["out"]:
        Path(given["out"]).write_text(json.dumps(result, indent=1) + "\n")


def run(worker: SFTWorker, model: Model, members: list[Client], rounds: int) -> None:
    """The whole loop: download, train, admit, aggregate, ledger."""
    algorithm = FedHL()
    state = algorithm.init(model, members)
    loop = federate(
        algorithm, members, worker, Local(Silent()), Silent(), state=state, memories={}, first=1, rounds=rounds, seed=0
    )
    for _ in loop:
        pass


def plain_trainer(
    name: LanguageModel, device: torch.device, tok: object, rows: list, batch: int, rank: int
) -> SFTTrainer:
    """TRL as its documentation has it, on all rows, with the same settings."""
    peft = get_peft_model(
        load(name, device, 0), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"])
    )
    args = SFTConfig(
        output_dir=tempfile.gettempdir(), per_device_train_batch_size=batch,
        learning_rate=2e-4, lr_scheduler_type="constant",
        gradient_checkpointing=False, bf16=False, use_cpu=device.type == "cpu", max_length=None, report_to="none",
        save_strategy="no", logging_steps=1, disable_tqdm=True, dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    data = Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    trainer = SFTTrainer(model=peft, args=args, train_dataset=data, processing_class=tok)
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def timed(call) -> float:
    """Seconds."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main(sys.argv[1:])
