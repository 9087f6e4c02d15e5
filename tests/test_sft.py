"""The SFT worker: what it trains, what it leaves alone, and what two hundred client-rounds leave behind."""

import copy
import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from fedllm.algorithms import LOW_RANK
from fedllm.core import Client, Model, Reply, Round
from fedllm.data.encoding import encode, tokens
from fedllm.errors import FedError
from fedllm.lowrank import LowRank, fill
from fedllm.models.inference import generate, held_out_loss
from fedllm.models.language import LanguageModel, load, skeleton, tokenizer
from fedllm.workers.lora import target_shapes
from fedllm.workers.settings import SFT
from fedllm.workers.sft import SFTWorker

PICO = LanguageModel("pico")
CPU = torch.device("cpu")


def make(settings: SFT, model: LanguageModel = PICO) -> SFTWorker:
    tok = tokenizer(model)
    rows = encode(tok, [f"Question: {i} + 1?\nAnswer:" for i in range(24)], [f" {i + 1}" for i in range(24)], 64)
    parts = {"c0": rows[:12], "c1": rows[12:20], "c2": rows[20:]}
    return SFTWorker(settings, load(model, CPU, seed=0), tok, parts, rounds=4)


def adapter(worker: SFTWorker, rank: int, seed: int = 0) -> dict[str, LowRank]:
    rng = torch.Generator().manual_seed(seed)
    shapes = target_shapes(skeleton(PICO), worker.settings.targets)
    return {name: fill(LowRank.zeros(*shape), rank, rng) for name, shape in shapes.items()}


def depth(worker: SFTWorker) -> tuple[int, int]:
    """Hooks on all modules, and how many functions deep the base model's forward is wrapped."""
    hooks = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in worker.model.modules()
    )
    forward, layers = worker.model.get_base_model().forward, 0
    while (inner := getattr(forward, "__wrapped__", None)) is not None:
        forward, layers = inner, layers + 1
    return hooks, layers


def test_two_hundred_client_rounds_leave_nothing_behind():
    worker = make(SFT(steps=1, batch_size=2))
    sent = adapter(worker, 4)

    def client_rounds(n: int) -> tuple:
        for i in range(n):
            worker.of(Client(f"c{i % 3}", 8, 4)).train(sent, {}, Round(1 + i % 4, 0))
        gc.collect()
        tensors = sum(1 for o in gc.get_objects() if isinstance(o, torch.Tensor))
        return (*depth(worker), tensors, len(worker.trainer.callback_handler.callbacks))

    after_two = client_rounds(2)
    assert client_rounds(198) == after_two


def test_the_same_client_and_round_train_the_same_whatever_came_before():
    worker, other = make(SFT(steps=3, batch_size=2, dropout=0.1)), make(SFT(steps=3, batch_size=2, dropout=0.1))
    sent = adapter(worker, 4)
    other.of(Client("c1", 8, 2)).train(adapter(other, 2, seed=5), {}, Round(3, 0))
    torch.manual_seed(99)  # what anyone else does with the global generator changes nothing
    first, _, _ = worker.of(Client("c0", 12, 4)).train(sent, {}, Round(2, 7))
    second, _, _ = other.of(Client("c0", 12, 4)).train(sent, {}, Round(2, 7))
    for name in sent:
        assert torch.equal(first[name].B, second[name].B) and torch.equal(first[name].A, second[name].A)


def test_training_leaves_the_global_generators_alone():
    worker = make(SFT(steps=1))
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    worker.of(Client("c0", 12, 4)).train(adapter(worker, 4), {}, Round(1, 0))
    assert torch.equal(torch.rand(3), expected)


def test_train_mutates_nothing_it_was_given():
    worker = make(SFT(steps=2, optimizer="kept"))
    sent, seat = adapter(worker, 4), worker.of(Client("c0", 12, 4))
    before = copy.deepcopy(sent)
    _, memory, _ = seat.train(sent, {}, Round(1, 0))
    kept = copy.deepcopy(memory)
    seat.train(sent, memory, Round(2, 0))
    assert all(torch.equal(sent[n].B, before[n].B) and torch.equal(sent[n].A, before[n].A) for n in sent)
    assert memory.keys() == kept.keys() and all(torch.equal(memory[k], kept[k]) for k in kept)


@pytest.mark.parametrize("rslora", [False, True])
def test_alpha_is_folded_out_and_in(rslora):
    """SGD steps depend on the split of the scale; a step of 0 does not: what is sent comes back, for any alpha."""
    worker = make(SFT(steps=1, learning_rate=0.0, alpha=7.0, rslora=rslora))
    sent = {
        n: LowRank(torch.randn(64, 3, generator=torch.Generator().manual_seed(1)), u.A)
        for n, u in adapter(worker, 3).items()
    }
    back, _, _ = worker.of(Client("c0", 12, 3)).train(sent, {}, Round(1, 0))
    for name in sent:
        torch.testing.assert_close(back[name].dense(), sent[name].dense(), rtol=1e-6, atol=1e-7)


def test_the_scale_of_a_rank():
    assert SFT(alpha="2r").scale(8) == 2.0  # 2 * 8 / 8
    assert SFT(alpha=16).scale(8) == 2.0  # 16 / 8
    assert SFT(alpha=16, rslora=True).scale(4) == 8.0  # 16 / sqrt(4)
    with pytest.raises(FedError, match="multiple of the rank"):
        SFT(alpha="r2")


def test_steps_and_learning_rate_of_a_round():
    settings = SFT(epochs=3, batch_size=4, accumulation=2, learning_rate=1.0)
    assert settings.steps_for(17) == 9  # 17 rows are 5 batches, 3 steps an epoch
    assert SFT(steps=5).steps_for(17) == 5
    assert [SFT(learning_rate=1.0, schedule="linear").learning_rate_in(t, 4) for t in (1, 2, 3, 4)] == [
        1.0,
        0.75,
        0.5,
        0.25,
    ]


def test_serving_is_base_plus_update_at_any_rank_and_dense():
    """logits(W0 + B A) by adapter = logits of a model whose weights were changed; also for a dense update."""
    worker = make(SFT(steps=1))
    rng = torch.Generator().manual_seed(2)
    low = {
        n: LowRank(torch.randn(64, 5, generator=rng) / 8, torch.randn(5, 64, generator=rng) / 8)
        for n in adapter(worker, 1)
    }
    plain = load(PICO, CPU, seed=0)
    for name, update in low.items():
        plain.get_submodule(name).weight.data += update.dense()
    ids = torch.arange(3, 23)[None]
    for update in (low, {n: u.dense() for n, u in low.items()}):
        with worker.serving(update) as model, torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    with worker.serving({}) as model, torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, load(PICO, CPU, seed=0)(input_ids=ids).logits)


def test_frozen_part_is_added_and_not_trained():
    """FLoRA's client: training on top of W with B = 0 starts at the loss of W, and W itself is not returned."""
    worker = make(SFT(steps=1, learning_rate=0.0, batch_size=12))
    rng = torch.Generator().manual_seed(2)
    W = {n: LowRank(torch.randn(64, 2, generator=rng), torch.randn(2, 64, generator=rng)) for n in adapter(worker, 1)}
    back, _, on_top = worker.of(Client("c0", 12, 4)).train(adapter(worker, 4), {}, Round(1, 0), frozen=W)
    _, _, without = worker.of(Client("c0", 12, 4)).train(adapter(worker, 4), {}, Round(1, 0))
    rows = [
        r
        for r in encode(
            tokenizer(PICO), [f"Question: {i} + 1?\nAnswer:" for i in range(12)], [f" {i + 1}" for i in range(12)], 64
        )
    ]
    with worker.serving(W) as model:
        assert on_top["train_loss"] == pytest.approx(held_out_loss(model, rows, 0, 12), rel=1e-4)
    assert without["train_loss"] != pytest.approx(on_top["train_loss"], rel=1e-3)
    assert all(update.norm() == 0 for update in back.values())


@pytest.mark.parametrize("optimizer", ["fresh", "kept"])
def test_one_factor_trains_and_the_other_comes_back_to_the_bit(optimizer):
    """Through two rounds; B trains first, for while it is zero A has no gradient."""
    worker = make(SFT(steps=2, batch_size=2, optimizer=optimizer))
    seat, held = worker.of(Client("c0", 12, 4)), adapter(worker, 4)
    for factor, other in ("BA", "AB"):
        memory = {}
        for index in (1, 2):
            start = held
            held, memory, _ = seat.train(start, memory, Round(index, 0), factors=factor)
            assert all(torch.equal(getattr(held[name], other), getattr(start[name], other)) for name in start)
            assert all(not torch.equal(getattr(held[name], factor), getattr(start[name], factor)) for name in start)
    assert all(not torch.equal(W.A, held[name].A) for name, W in seat.train(held, {}, Round(3, 0))[0].items())


def test_kept_moments_change_the_second_round_and_fresh_ones_do_not():
    results = {}
    for policy in ("fresh", "kept"):
        worker = make(SFT(steps=2, batch_size=4, learning_rate=1e-2, optimizer=policy))
        sent, seat = adapter(worker, 4), worker.of(Client("c0", 12, 4))
        _, memory, _ = seat.train(sent, {}, Round(1, 0))
        assert bool(memory) == (policy == "kept")
        with_memory, _, _ = seat.train(sent, memory, Round(2, 0))
        without, _, _ = seat.train(sent, {}, Round(2, 0))
        results[policy] = all(torch.equal(with_memory[n].B, without[n].B) for n in sent)
    assert results == {"fresh": True, "kept": False}


def test_every_rank_trains_at_its_own_size_and_the_loss_falls():
    worker = make(SFT(steps=30, batch_size=4, learning_rate=1e-2))
    for rank in (1, 7, 64):
        sent = adapter(worker, rank)
        with worker.serving(sent) as model:
            rows = [
                r
                for r in encode(
                    tokenizer(PICO),
                    [f"Question: {i} + 1?\nAnswer:" for i in range(12)],
                    [f" {i + 1}" for i in range(12)],
                    64,
                )
            ]
            before = held_out_loss(model, rows, 0, 8)
        back, _, metrics = worker.of(Client("c0", 12, rank)).train(sent, {}, Round(1, 0))
        assert all(update.rank == rank for update in back.values()) and metrics["steps"] == 30
        trainable = sum(p.numel() for p in worker.model.parameters() if p.requires_grad)
        assert trainable == sum(rank * (d_out + d_in) for d_out, d_in in (u.shape for u in back.values()))
        with worker.serving(back) as model:
            assert held_out_loss(model, rows, 0, 8) < before - 0.1


@pytest.mark.parametrize(
    ("bits", "layer", "stored"), [("4bit", "Linear4bit", torch.uint8), ("8bit", "Linear8bitLt", torch.int8)]
)
def test_a_quantised_base_trains_on_the_cpu(bits, layer, stored, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install -e '.[quantization]'")
    load(PICO, CPU, seed=0).save_pretrained(tmp_path)
    tokenizer(PICO).save_pretrained(tmp_path)
    worker = make(SFT(steps=20, batch_size=4, learning_rate=1e-2), LanguageModel(str(tmp_path), quantization=bits))
    base = worker.model.get_base_model().get_submodule("model.layers.0.self_attn.q_proj").get_base_layer()
    assert type(base).__name__ == layer and base.weight.dtype == stored
    sent = adapter(worker, 4)
    back, _, metrics = worker.of(Client("c0", 12, 4)).train(sent, {}, Round(1, 0))
    assert all(update.B.dtype == torch.float32 and update.norm() > 0 for update in back.values())
    assert metrics["train_loss"] < 5.6


def test_gradient_checkpointing_changes_nothing_but_memory():
    results = []
    for checkpointing in (False, True):
        worker = make(SFT(steps=2, batch_size=2, accumulation=2, gradient_checkpointing=checkpointing))
        back, _, _ = worker.of(Client("c0", 12, 4)).train(adapter(worker, 4), {}, Round(1, 0))
        results.append(back)
    for name in results[0]:
        torch.testing.assert_close(results[0][name].dense(), results[1][name].dense(), rtol=1e-4, atol=1e-7)


def test_unknown_target_names_the_ones_there_are():
    with pytest.raises(FedError, match=r"'qq_proj'.*q_proj"):
        target_shapes(skeleton(PICO), ["qq_proj"])


def test_generation_is_the_same_in_any_batch():
    model, tok = load(PICO, CPU, seed=0), tokenizer(PICO)
    prompts = ["a", "Question: much longer than the first", "mid size"]
    alone = [generate(model, tok, [p], max_new_tokens=5, batch_size=1)[0] for p in prompts]
    assert generate(model, tok, prompts, max_new_tokens=5, batch_size=3) == alone


def test_what_a_model_was_published_with_does_not_change_its_answers():
    """Greedy is the likeliest token each time, also where generation_config.json asks for a penalty or for beams."""
    model, tok = load(PICO, CPU, seed=0), tokenizer(PICO)
    plain = generate(model, tok, ["a", "Question"], max_new_tokens=8, batch_size=2)
    ids = tok("a")["input_ids"]
    for _ in range(8):
        ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    assert plain[0] == tok.decode(ids[1:], skip_special_tokens=True)
    published = GenerationConfig(repetition_penalty=5.0, num_beams=3, no_repeat_ngram_size=1, suppress_tokens=[ids[1]])
    model.generation_config = published
    assert generate(model, tok, ["a", "Question"], max_new_tokens=8, batch_size=2) == plain
    assert model.generation_config is published
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert generate(wrapped, tok, ["a", "Question"], max_new_tokens=8, batch_size=2) == plain
    assert model.generation_config is published


def test_a_mixture_of_experts_trains_its_cross_entropy_and_still_generates():
    """TRL's trainer turns the router's loss on for such models: it was counted in nats, and generation broke."""
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=259, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_experts=4,
        num_experts_per_tok=2, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    tok = tokenizer(PICO)
    rows = encode(tok, ["Question: 1 + 1?\nAnswer:"] * 4, [" 2"] * 4, 64)
    sent = {n: fill(LowRank.zeros(*s), 2, torch.Generator()) for n, s in target_shapes(base, ["q_proj"]).items()}
    worker = SFTWorker(SFT(targets=("q_proj",), steps=1, batch_size=4, learning_rate=0.0), base, tok, {"c0": rows}, 1)
    _, _, metrics = worker.of(Client("c0", 4, 2)).train(sent, {}, Round(1, 0))
    with worker.serving({}) as served:
        assert metrics["train_loss"] == pytest.approx(held_out_loss(served, rows, tok.pad_token_id, 4), rel=1e-5)
        assert len(generate(served, tok, ["a", "bc"], max_new_tokens=3, batch_size=2)) == 2


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt():
    """As with ``add_eos_token=true``: a prompt is to be continued, and a row ends once."""
    plain, ending = tokenizer(PICO), tokenizer(PICO)
    ending._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", plain.bos_token_id), ("</s>", plain.eos_token_id)]
    )
    assert ending("ab")["input_ids"][-1] == ending.eos_token_id
    assert tokens(ending, ["ab", ""]) == [[ending.bos_token_id, *ids] for ids in plain(["ab", ""])["input_ids"]]
    (row,) = encode(ending, ["ab"], [" c"], 64)
    assert row.input_ids.count(ending.eos_token_id) == 1 and row.labels[-1] == ending.eos_token_id


def test_a_layer_that_is_not_named_holds_nothing_of_the_client_before():
    worker = make(SFT(steps=1, batch_size=4, learning_rate=0.0))
    whole = adapter(worker, 4)
    few = dict([next(iter(whole.items()))])
    client, rnd = Client("c0", 12, 4), Round(1, 0)
    alone = worker.of(client).train(few, {}, rnd)[2]["train_loss"]
    big = {name: LowRank(torch.ones_like(M.B), M.A) for name, M in whole.items()}
    assert worker.of(client).train(big, {}, rnd)[2]["train_loss"] != pytest.approx(alone, rel=1e-4)
    returned, _, metrics = worker.of(client).train(few, {}, rnd)
    assert metrics["train_loss"] == pytest.approx(alone, rel=1e-6) and returned.keys() == few.keys()


def test_moments_of_a_weight_that_had_no_gradient_are_not_asked_for():
    """An expert that no token was sent to has no state in AdamW, and starts with none again."""
    worker = make(SFT(steps=1, batch_size=4, optimizer="kept"))
    sent, client = adapter(worker, 4), Client("c0", 12, 4)
    _, memory, _ = worker.of(client).train(sent, {}, Round(1, 0))
    name = next(iter(sent))
    less = {key: value for key, value in memory.items() if not key.startswith(f"{name}/B/")}
    assert len(less) == len(memory) - 3
    assert worker.of(client).train(sent, less, Round(2, 0))[2]["steps"] == 1


def test_held_out_loss_is_the_mean_over_completion_tokens():
    """Against a row-by-row computation: the padding and the order of the rows do not enter."""
    model, tok = load(PICO, CPU, seed=0), tokenizer(PICO)
    rows = encode(tok, ["ab", "a much longer prompt"], [" cd", " e"], 64)
    total, count = 0.0, 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1].detach()
        labels = torch.tensor(row.labels)[1:]
        total += float(nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="sum"))
        count += row.trained
    assert held_out_loss(model, rows, tok.pad_token_id, 2) == pytest.approx(total / count, rel=1e-5)


def test_all_rules_run_a_round():
    worker = make(SFT(steps=2, batch_size=2))
    shapes = target_shapes(skeleton(PICO), worker.settings.targets)
    model = Model({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    for name, rule in LOW_RANK.items():
        algorithm = rule()
        client = Client("c0", 12, 4)
        state = algorithm.init(model, [client])
        sent = algorithm.download(state, client, Round(1, 0))
        returned, _, metrics = algorithm.local(worker.of(client), sent, {}, Round(1, 0))
        assert set(algorithm.trained(Reply(client, sent, returned))) == set(shapes) and metrics["steps"] == 2, name
