"""Every count of the papers, recomputed: parameters and operations from the model, columns from the draws."""

import functools
import math
import statistics

import pytest
import torch

from fedllm.errors import FedError
from fedllm.federation.budget import Level, assign, draws, expected, level, plus, totals
from fedllm.lowrank import LowRank
from fedllm.models.build import build, describe
from fedllm.models.cnn import Adapter, SmallCNN, YiCNN
from fedllm.models.factorized import factorize, ranks
from fedllm.models.flanc import FlancResNet
from fedllm.models.flops import Meter, forward_cost, params, sizes, trainable
from fedllm.models.lowrank_conv import Spec, adapt, adaptable
from fedllm.models.network import Network
from fedllm.models.resnet import ExitResNet, ResNet, stage_rounds
from fedllm.models.transformer import MaskedLM

CIFAR, TINY = (3, 32, 32), (3, 64, 64)
COHORT = 10


def hybrid(rho, alpha, make=ResNet):
    """The low-rank model of FedLMT's Def. 3.2."""
    model = describe(make)
    return factorize(model, ranks(model, model.anatomy(), rho, alpha))


def resnet(**settings):
    return describe(lambda: ResNet(**settings))


def exits(b):
    return describe(lambda: ExitResNet(stages=b))


def flanc(f):
    return describe(lambda: FlancResNet(width=f))


def printed(number):
    """Three significant digits and a unit, as FedLMT prints: 701466 -> 701K."""
    unit, size = next((u, s) for u, s in (("M", 1e6), ("K", 1e3)) if number >= s)
    digits = 2 - math.floor(math.log10(number / size))
    return f"{number / size:.{digits}f}{unit}"


TABLE_1 = {
    "width": (lambda b: resnet(width=b / 4), "701K [35.8M] 2.80M [141M] 6.29M [315M] 11.2M [559M]"),
    "fedhm": (lambda b: hybrid(9, (0.01, 0.15, 0.6, 1.4)[b - 1]), "927K [296M] 1.96M [324M] 5.28M [415M] 11.2M [576M]"),
    "flanc": (lambda b: flanc((0.25, 0.75, 1.25, 1.75)[b - 1]), "531K [57.1M] 2.36M [207M] 6.01M [436M] 11.5M [744M]"),
    "fedlmt": (lambda b: hybrid((1, 3, 5)[b - 1], (0.03, 0.15, 0.4)[b - 1]), "422K [23.5M] 1.43M [140M] 3.43M [283M]"),
}


@pytest.mark.parametrize("method", TABLE_1)
def test_table_1(method):
    make, row = TABLE_1[method]
    cells = row.split()
    for b, (count, operations) in enumerate(zip(cells[::2], cells[1::2], strict=True), start=1):
        model = make(b)
        assert printed(params(model)) == count
        assert f"[{printed(forward_cost(model, CIFAR).total)}]" == operations


def test_table_1_depth_meets_the_operations_but_not_every_parameter():
    paper = ((449e3, 0.006), (1.58e6, 0.006), (5.15e6, 0.06), (13.2e6, 0.006))
    operations = ["231M", "404M", "557M", "692M"]
    for b, (count, tolerance) in enumerate(paper, start=1):
        assert params(exits(b)) == pytest.approx(count, rel=tolerance)
        assert printed(forward_cost(exits(b), CIFAR).total) == operations[b - 1]


def test_a_full_pass_term_by_term():
    """The stem and stage 1 have five norms of 64 x 32 x 32, later stages five each (a shortcut's is one of them)."""
    cost = forward_cost(resnet(), CIFAR)
    assert cost.norm == 5 * 64 * 32**2 + 5 * (128 * 16**2 + 256 * 8**2 + 512 * 4**2)
    assert cost.pool == 512 * 4 * 4
    assert cost.total == cost.macs + 5 * cost.norm + cost.pool
    convs = cost.macs - 512 * 10
    assert forward_cost(resnet(), TINY).macs - 512 * 10 == 4 * convs


def test_macs_of_one_layer_by_hand():
    conv = describe(lambda: torch.nn.Conv2d(3, 5, 3, 2, 1))
    assert forward_cost(conv, (3, 8, 8)).macs == 4 * 4 * 5 * 3 * 9  # outputs x filters x (channels x kernel)
    linear = describe(lambda: torch.nn.Linear(7, 4))
    assert forward_cost(linear, (7,)).macs == 28


def test_counting_needs_no_weights_and_changes_none():
    model = build(SmallCNN, torch.Generator().manual_seed(0))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    forward_cost(model, (3, 16, 16))
    assert model.training
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_ranks_of_the_resnet():
    model, anatomy = resnet(), resnet().anatomy()
    assert list(dict.fromkeys(ranks(model, anatomy, 1, 0.15).values())) == [10, 19, 38, 77]
    assert list(dict.fromkeys(ranks(model, anatomy, 1, 0.03).values())) == [2, 4, 8, 15]
    assert list(dict.fromkeys(ranks(model, anatomy, 1, 0.4).values())) == [26, 51, 102, 205]
    for alpha, pair in ((0.01, [3, 5]), (0.15, [38, 77]), (0.6, [154, 307]), (1.4, [358, 717])):
        assert list(dict.fromkeys(ranks(model, anatomy, 9, alpha).values())) == pair


def test_classes_only_change_the_head():
    assert params(resnet(classes=100)) - params(resnet()) == 90 * 513
    assert params(resnet(classes=200)) - params(resnet()) == 190 * 513


def test_other_printed_sizes_of_fedlmt():
    """FedHMv2's toy model has 20.7 % of the parameters; Table 4 trains (3, 0.2)."""
    assert 100 * params(hybrid(9, 0.2)) / params(resnet()) == pytest.approx(20.7, abs=0.1)
    assert printed(params(hybrid(3, 0.2))) == "1.82M"


@pytest.mark.parametrize("alpha", [0.01, 0.15, 0.6, 1.4])
def test_what_pfedlmt_shares_does_not_depend_on_the_capacity(alpha):
    model, full = hybrid(9, alpha), resnet()
    names = dict(model.named_parameters())
    shared = {name for name, number in model.anatomy().numbers(names).items() if number <= 9}
    body = [p.numel() for module in (full.stem, full.stages[0], full.stages[1]) for p in module.parameters()]
    assert sum(names[name].numel() for name in shared) == sum(body)


# Table 2: 100 clients, the first 33 of level b4, then 33 of b3, then 34 of b2; X sums over the drawn clients.

LEVELS = ("b4", "b3", "b2")
ROUNDS = {"cifar10": 2000, "cifar100": 3000}


def by_level(make):
    """The levels b4, b3, b2 of a family."""
    return [level(name, make(int(name[1])), CIFAR) for name in LEVELS]


def digits3(number):
    return float(f"{number:.3g}")


def as_table_1(levels, rounded_params):
    """The paper's CIFAR columns multiply its own Table 1: operations of three digits, and for FedHM parameters too."""
    return [
        Level(
            each.name,
            int(digits3(each.params)) if rounded_params else each.params,
            int(digits3(each.forward_cost)),
            each.down_params,
            each.up_params,
        )
        for each in levels
    ]


TABLE_2 = {
    "width": {"cifar10": ("134.7", "6.75"), "cifar100": ("201.5", "10.10")},
    "fedhm": {"cifar10": ("122.6", "8.77"), "cifar100": ("183.3", "13.12")},
    "flanc": {"cifar10": ("132.0", "9.22"), "cifar100": ("197.6", "13.80")},
}


def units(value, cell):
    """How far ``value`` is from a printed cell, in units of the cell's last digit."""
    return abs(value - float(cell)) * 10 ** len(cell.split(".")[1])


@functools.cache
def heterogeneous(method):
    return by_level(TABLE_1[method][0])


@pytest.mark.parametrize("data", ROUNDS)
@pytest.mark.parametrize("method", TABLE_2)
def test_table_2_as_printed_for_seed_31(method, data):
    comm, flops = TABLE_2[method][data]
    drawn = draws(assign(100, LEVELS), COHORT, ROUNDS[data], 31)
    run = totals(as_table_1(heterogeneous(method), rounded_params=method != "width"), drawn)
    assert units(run.comm_paper_gb, comm) <= 0.6
    one_cell_off = (method, data) == ("fedhm", "cifar10")  # 8.757 computed, 8.77 printed
    assert units(run.flops_paper_1e12, flops) <= (1.5 if one_cell_off else 0.6)


@pytest.mark.parametrize("method", TABLE_2)
def test_table_2_from_exact_counts(method):
    """Seed 31 meets the printed columns to 0.3 %; another seed scatters around the expectation.

    X draws of 10 of 100 without replacement have variance 10 T var(params) (100 - 10)/(100 - 1): 0.4 % of the column.
    """
    for data, rounds in ROUNDS.items():
        comm, flops = (float(cell) for cell in TABLE_2[method][data])
        levels, clients = heterogeneous(method), assign(100, LEVELS)
        run = totals(levels, draws(clients, COHORT, rounds, 31))
        assert run.comm_paper_gb == pytest.approx(comm, rel=0.003)
        assert run.flops_paper_1e12 == pytest.approx(flops, rel=0.003)
        count = {each.name: each.params for each in levels}
        spread = statistics.pstdev(count[name] for name in clients) * (COHORT * rounds * 90 / 99) ** 0.5 / 1e9
        center = totals(levels, expected(clients, COHORT, rounds)).comm_paper_gb
        assert spread < 0.006 * center
        for seed in range(5):
            assert abs(totals(levels, draws(clients, COHORT, rounds, seed)).comm_paper_gb - center) < 3 * spread


@pytest.mark.parametrize("data, comm, flops", [("cifar10", "223.5", "11.18"), ("cifar100", "335.2", "16.77")])
def test_table_2_fedavg(data, comm, flops):
    full = as_table_1([level("b4", resnet(), CIFAR)], rounded_params=False)
    run = totals(full, draws(["b4"] * 100, COHORT, ROUNDS[data], 31))
    assert units(run.comm_paper_gb, comm) <= 0.5
    assert units(run.flops_paper_1e12, flops) <= 0.5 + 1e-6


@pytest.mark.parametrize("data, comm, flops", [("cifar10", "28.62", "2.80"), ("cifar100", "42.93", "4.20")])
def test_table_2_fedlmt_trains_the_weakest_level_everywhere(data, comm, flops):
    low = as_table_1([level("b2", TABLE_1["fedlmt"][0](2), CIFAR)], rounded_params=False)
    run = totals(low, {"b2": COHORT * ROUNDS[data]})
    assert run.comm_paper_gb == pytest.approx(float(comm), rel=5e-4)  # the paper multiplies 1,430,538 rounded to 1.431M
    assert units(run.flops_paper_1e12, flops) <= 0.5


@pytest.mark.parametrize("data", ROUNDS)
def test_table_2_depthfl_from_the_papers_own_parameters(data):
    """Its 5.15M for b3 fits no exits of its FLOPs; with it, and 13.258M counted for b4, both columns are met."""
    comm, flops = {"cifar10": ("132.9", "11.01"), "cifar100": ("198.6", "16.49")}[data]
    count = {"b4": params(exits(4)), "b3": 5.15e6, "b2": 1.58e6}
    levels = [
        Level(name, int(count[name]), int(digits3(forward_cost(exits(int(name[1])), CIFAR).total)), 0, 0)
        for name in LEVELS
    ]
    run = totals(levels, draws(assign(100, LEVELS), COHORT, ROUNDS[data], 31))
    assert units(run.comm_paper_gb, comm) <= 0.5
    assert units(run.flops_paper_1e12, flops) <= 1.0


def test_table_2_tiny_imagenet_operations():
    """64 x 64 images, and exact costs here: the printed cells follow without rounding."""
    drawn = draws(assign(100, LEVELS), COHORT, 3000, 31)
    rows = {
        "40.36": [level(n, resnet(width=int(n[1]) / 4), TINY) for n in LEVELS],
        "52.50": [level(n, TABLE_1["fedhm"][0](int(n[1])), TINY) for n in LEVELS],
        "65.94": [level(n, exits(int(n[1])), TINY) for n in LEVELS],
        "55.20": [level(n, TABLE_1["flanc"][0](int(n[1])), TINY) for n in LEVELS],
    }
    for cell, levels in rows.items():
        assert units(totals(levels, drawn).flops_paper_1e12, cell) <= 1.0
    assert units(totals([level("b4", resnet(), TINY)], {"b4": 30_000}).flops_paper_1e12, "67.02") <= 0.6
    assert units(totals([level("b2", hybrid(3, 0.15), TINY)], {"b2": 30_000}).flops_paper_1e12, "16.74") <= 0.6


def transformer(width=1.0):
    return describe(lambda: MaskedLM(width=width))


def test_table_2_wikitext():
    """200 rounds of 5; b4, b3, b2 are widths 1, 3/4, 1/2."""
    levels = [level(n, transformer(int(n[1]) / 4), (64,), torch.long) for n in LEVELS]
    full = totals(levels, {"b4": 1000})
    assert units(full.comm_paper_gb, "10.36") <= 0.5
    assert units(full.flops_paper_1e12, "0.39") <= 0.5
    mixed = totals(levels, draws(assign(100, LEVELS), 5, 200, 31))
    assert mixed.comm_paper_gb == pytest.approx(7.50, rel=0.003)
    assert units(mixed.flops_paper_1e12, "0.275") <= 0.5


def test_table_2_wikitext_fedlmt_factorises_the_tables_and_the_decoder_too():
    """Feed-forward layers alone, as the text says, leave over 8M: 2.65M needs all but attention, at rank 30."""
    low = hybrid(0, 30 / 128, MaskedLM)
    run = totals([level("b2", low, (64,), torch.long)], {"b2": 1000})
    assert units(run.comm_paper_gb, "2.65") <= 0.5
    assert units(run.flops_paper_1e12, "0.106") <= 0.5
    ffn = describe(MaskedLM)
    factorize(ffn, {name: 30 for name in ffn.anatomy().layers if name.startswith("layers.")})
    assert params(ffn) > 8e6


# Table 7: the clients' capacity grows stage by stage, all of them at b_s in stage s.

TABLE_7 = {
    "width": (lambda b: resnet(width=b / 4), ("164.1", "8.22"), ("246.2", "12.32")),
    "progfed": (lambda b: resnet(stages=b), ("148.7", "9.16"), ("223.0", "13.73")),
}


@pytest.mark.parametrize("method", TABLE_7)
def test_table_7(method):
    make, *rows = TABLE_7[method]
    levels = [level(f"b{b}", make(b), CIFAR) for b in (1, 2, 3, 4)]
    for rounds, (comm, flops) in zip(ROUNDS.values(), rows, strict=True):
        plan = stage_rounds(rounds)
        assert sum(plan) == rounds
        run = plus(*(totals([each], {each.name: COHORT * t}) for each, t in zip(levels, plan, strict=True)))
        assert units(run.comm_paper_gb, comm) <= 0.5
        assert run.flops_paper_1e12 == pytest.approx(float(flops), rel=0.0015)


def test_table_7_depthfl():
    count = [params(exits(1)), 1.58e6, 5.15e6, params(exits(4))]
    for rounds, comm, flops in ((2000, "183.7", "11.63"), (3000, "275.5", "17.44")):
        plan = stage_rounds(rounds)
        assert units(sum(c * COHORT * t for c, t in zip(count, plan, strict=True)) / 1e9, comm) <= 0.5
        costs = [digits3(forward_cost(exits(b), CIFAR).total) for b in (1, 2, 3, 4)]
        assert units(sum(c * COHORT * t for c, t in zip(costs, plan, strict=True)) / 1e12, flops) <= 1.0


def fedloru(rank, classes):
    model = resnet(classes=classes)
    return adapt(model, adaptable(model, model.anatomy()), {"shared": Spec(rank)})


@pytest.mark.parametrize(
    "rank, classes, cell",
    [
        (128, 10, "4.59M"),
        (96, 10, "3.44M"),
        (64, 10, "2.30M"),
        (128, 100, "4.63M"),
        (96, 100, "3.49M"),
        (64, 100, "2.35M"),
    ],
)
def test_fedloru_trains_factors_stem_norms_and_head(rank, classes, cell):
    model = fedloru(rank, classes)
    assert printed(trainable(model)) == cell
    factors = sum(p.numel() for name, p in model.named_parameters() if ".shared." in name)
    assert factors == rank * sum(c.weight.shape[0] + c.weight[0].numel() for c in stage_convs(resnet()))
    assert printed(params(resnet(classes=classes))) == "11.2M"


def stage_convs(model):
    return [m for m in model.stages.modules() if isinstance(m, torch.nn.Conv2d)]


@pytest.mark.parametrize("rank_factor, cell", [(1.80, 4.58), (2.445, 3.44), (3.81, 2.30)])
def test_fedhm_in_fedloru(rank_factor, cell):
    """rank = c_out / rank_factor, from the second block on."""
    assert params(hybrid(3, 1 / rank_factor)) / 1e6 == pytest.approx(cell, abs=0.006)


def test_yi_networks():
    """Megabytes of float32 (2^20). CNN-4 is printed as 3.81, which no FC1 near the stated 800 units gives: 4.04."""
    mib = [4 * params(describe(lambda kind=kind: YiCNN(kind))) / 2**20 for kind in range(1, 6)]
    for kind, cell in ((1, 10.00), (2, 6.92), (3, 5.04), (5, 2.55)):
        assert mib[kind - 1] == pytest.approx(cell, abs=0.01)
    assert mib[3] == pytest.approx(4.04, abs=0.01)
    wide = describe(lambda: YiCNN(1, 100))
    assert params(wide) - params(describe(YiCNN)) == 90 * 501


def test_yi_macs_by_hand():
    """conv1 28^2 16 75, conv2 10^2 32 400, then the matrices."""
    macs = 28**2 * 16 * 75 + 10**2 * 32 * 400 + 800 * 2000 + 2000 * 500 + 500 * 10
    assert forward_cost(describe(YiCNN), CIFAR).total == macs


def test_yi_adapters():
    """511 h + 10 on FC2's output, 2011 h + 10 on FC1's; at h = 500 the latter is as large as CNN-1's FC2 and FC3."""
    for hidden in (20, 40, 60, 80):
        assert params(describe(lambda h=hidden: Adapter("decomposition", 500, h))) == 511 * hidden + 10
    largest = describe(lambda: Adapter("direct", 2000, 500))
    cnn = describe(YiCNN)
    assert params(largest) == sum(p.numel() for layer in (cnn.fc2, cnn.fc3) for p in layer.parameters())


def test_the_two_conventions_differ_by_eight():
    full = level("b4", resnet(), CIFAR)
    run = totals([full], {"b4": 20_000})
    assert run.comm_bytes == pytest.approx(8 * run.comm_paper_gb * 1e9)
    assert run.comm_bytes / 1e9 == pytest.approx(1787.8, abs=0.05)


def test_fixed_broadcasts_are_true_bytes_only():
    one = Level("b1", 10, 100, 3, 2)
    plain, fixed = totals([one], {"b1": 4}), totals([one], {"b1": 4}, fixed_params=7)
    assert plain.comm_bytes == 4 * 4 * (3 + 2)
    assert fixed.comm_bytes - plain.comm_bytes == 4 * 7
    assert fixed.comm_paper_gb == plain.comm_paper_gb == 40 / 1e9


def test_draws_of_seed_31():
    """The counts that FedLMT's printed communication identifies; the remainder of 100/3 goes to the weakest level."""
    clients = assign(100, LEVELS)
    assert [clients.count(name) for name in LEVELS] == [33, 33, 34]
    assert list(draws(clients, 10, 2000, 31).values()) == [6681, 6516, 6803]
    assert list(draws(clients, 10, 3000, 31).values()) == [9943, 9831, 10226]
    assert list(draws(clients, 5, 200, 31).values()) == [332, 327, 341]


def test_draws_leave_the_global_generator_alone():
    import numpy as np

    before = np.random.get_state()[1].tolist()  # type: ignore[index]
    draws(["b1"] * 4, 2, 3, 0)
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]


def test_fewer_clients_than_levels():
    assert assign(2, LEVELS) == ["b4", "b3"]
    assert assign(4, LEVELS) == ["b4", "b3", "b2", "b2"]


def test_a_level_that_nobody_declared():
    with pytest.raises(FedError, match="b9"):
        totals([Level("b1", 1, 1, 1, 1)], {"b9": 1})


def test_sizes_of_a_payload():
    payload = {"W": torch.zeros(3, 4), "M": LowRank(torch.zeros(5, 2), torch.zeros(2, 7))}
    assert sizes(payload) == 12 + 10 + 14


@pytest.mark.parametrize("first_reads_a_gradient", [False, True])
def test_a_meter_counts_forward_and_backward_by_hand(first_reads_a_gradient):
    """8 x (5 -> 3): forward 2 * 5 * 3 an example, the weight's gradient as much, the input's where one is asked for.

    Two steps: 8 counted, then 3 of the same kind: 11 times.
    """
    layer, meter = torch.nn.Linear(5, 3), Meter()
    for place, examples in enumerate((8, 3)):
        with meter.step(examples, fresh=place == 0):
            layer(torch.ones(examples, 5, requires_grad=first_reads_a_gradient)).sum().backward()
    assert meter.flops == 11 * 2 * 5 * 3 * (3 if first_reads_a_gradient else 2)


@pytest.mark.parametrize(("name", "shape"), [("cnn1", (3, 16, 16)), ("yi5", (3, 32, 32)), ("resnet18", (3, 16, 16))])
def test_a_meter_s_forward_pass_is_twice_the_multiply_adds(name, shape):
    net = build(Network(name=name).maker("plain", 10), torch.Generator().manual_seed(0))
    meter = Meter()
    with meter.step(2, fresh=True):
        net(torch.zeros(2, *shape))
    assert meter.flops == 2 * 2 * forward_cost(net, shape).macs
