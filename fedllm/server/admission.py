"""What an update must be before it may touch the state. Nothing is repaired: a reply is admitted whole or refused."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median_low
from typing import Any

import torch
from torch import Tensor

from fedllm.core import Reply, Tensors, within
from fedllm.lowrank import LowRank
from fedllm.server.factors import FAR, beyond, factor_steps, grown

COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

LARGEST = 1e18
"""The largest norm of a factor, or of ``|B| |A|``, that is averaged: squares stay inside float32."""


UNUSUAL = 10.0
"""An update this many times larger or smaller than the cohort's median is remarked on."""


def trained(reply: Reply) -> Tensors:
    """What this reply must look like: the ``adapter/`` group of what was sent, or all of it where there is none."""
    return within("adapter", reply.sent) or reply.sent


def admit(
    replies: Sequence[Reply],
    expected: Callable[[Reply], Tensors] = trained,
    *,
    norm_bound: float | None = None,
    factors: Callable[[Reply], Tensors] | None = None,
    sent_known: bool = True,
) -> tuple[list[Reply], dict[str, str]]:
    """The replies that may be averaged, in their order, and the others' client ids with the reason, a sentence each.

    A reply must return exactly the names that it was expected to, each with the expected kind, shape and rank, of a
    floating dtype, finite, and small enough to be averaged in float32. Two replies of one id are both refused: nobody
    can tell which is meant.

    Args:
        expected: tensors with the names, shapes and ranks to be returned; their values serve ``norm_bound`` alone.
        norm_bound: also refuse a reply whose ``|| returned - expected ||_F`` over the whole model is more than this
            many times the (low) median of the replies that passed. It takes more than half of them to move that median
            past the honest ones. ``None`` turns it off; so does a median of 0, which gives no unit to compare with.
        factors: the products whose factors the rule averages one by one, of a reply; each factor is bounded then, by
            what the cohort's did and by what was sent. ``None``: products are averaged, and any factors of one will do.
        sent_known: whether what was sent is; without it the cohort alone bounds a factor.
    """
    copies = Counter(reply.client.id for reply in replies)
    refused: dict[str, str] = {}
    admitted = []
    for reply in replies:
        if copies[reply.client.id] > 1:
            refused[reply.client.id] = f"The id replied {copies[reply.client.id]} times in one round."
            continue
        reason = misfit(reply.returned, expected(reply))
        if reason is None and factors is not None and sent_known and (why := grown(reply, factors, expected)):
            reason = f"{why}: this rule averages factors, and one so large would replace all others."
        if reason is None:
            admitted.append(reply)
        else:
            refused[reply.client.id] = reason
    if factors is not None and admitted:
        for id, why in beyond(factor_steps(admitted, factors, expected), FAR).items():
            refused[id] = f"{why}; this rule averages factors, and the bound is {FAR:g} times."
        admitted = [reply for reply in admitted if reply.client.id not in refused]
    if norm_bound is None or not admitted:
        return admitted, refused
    norms = {reply.client.id: moved(reply.returned, expected(reply)) for reply in admitted}
    middle = median_low(norms.values())
    for reply in admitted:
        norm = norms[reply.client.id]
        if middle > 0 and norm > norm_bound * middle:
            refused[reply.client.id] = (
                f"The update's norm, {norm:.3g}, is {norm / middle:.3g} times the cohort's median, {middle:.3g}; "
                f"the bound is {norm_bound:g} times."
            )
    return [reply for reply in admitted if reply.client.id not in refused], refused


def suspects(
    replies: Sequence[Reply],
    expected: Callable[[Reply], Tensors],
    before: Mapping[str, str],
    now: Mapping[str, str],
    factors: Callable[[Reply], Tensors] | None = None,
) -> dict[str, str]:
    """Of admitted replies, those that a person should look at, by client id, a sentence each. Nothing else is done.

    Args:
        before: digest of what each client returned the last time, by its id.
        now: digest of what it returned this time.
        factors: as in ``admit``.
    """
    replies = [reply for reply in replies if reply.returned]  # some rules send nothing
    if not replies:
        return {}
    norms = {reply.client.id: _distance(reply.returned, expected(reply)) for reply in replies}
    middle = median_low(norms.values())
    found = {}
    if factors is not None:
        found = {id: f"{why}." for id, why in beyond(factor_steps(replies, factors, expected), UNUSUAL).items()}
    for id, norm in norms.items():
        if norm == 0:
            found[id] = "It returned what it was sent: it has not trained."
        elif before.get(id) == now[id]:
            found[id] = "It returned, to the bit, what it returned the last time."
        elif middle > 0 and not 1 / UNUSUAL < norm / middle < UNUSUAL:
            times = norm / middle
            found[id] = f"Its update's norm, {norm:.3g}, is {times:.3g} times the cohort's median, {middle:.3g}."
    for reply in replies:
        if all(_is_zero(value) for value in reply.returned.values()):
            found[reply.client.id] = "It returned nothing but zeros."
    return found


def _is_zero(value: Tensor | LowRank) -> bool:
    """Also where it is a product of factors of which one is not zero, and where its values are below any normal."""
    values = value.B if isinstance(value, LowRank) else value
    return not bool((values.abs() >= torch.finfo(torch.float32).tiny).any())


def _distance(returned: Tensors, sent: Tensors) -> float:
    """``moved`` for a warning: through Gram matrices in float64, which cost a hundredth of a QR."""
    squares = 0.0
    for name, start in sent.items():
        end = returned[name]
        if isinstance(end, LowRank) and isinstance(start, LowRank):
            if not (torch.equal(end.B, start.B) and torch.equal(end.A, start.A)):
                apart = end - start
                B, A = apart.B.double(), apart.A.double()
                squares += max(float(((B.T @ B) * (A @ A.T)).sum()), 0.0)
        elif isinstance(end, Tensor) and isinstance(start, Tensor):
            squares += float((end.double() - start.double()).square().sum())
    return math.sqrt(squares)


def moved(returned: Tensors, sent: Tensors) -> float:
    """``|| returned - sent ||_F`` over the whole model: of the products where they are products."""
    squares = 0.0
    for name, start in sent.items():
        end = returned[name]
        if isinstance(end, LowRank) and isinstance(start, LowRank):
            squares += (end - start).norm() ** 2
        elif isinstance(end, Tensor) and isinstance(start, Tensor):
            squares += float((end.double() - start.double()).square().sum())
    return math.sqrt(squares)


KNOWN = frozenset({"train_loss", "personal_loss", "steps", "tokens", "seconds", "flops"})
"""What a client may tell of its training, beside ``own_...``: scores of its own model."""

COUNTED = ("steps", "tokens", "seconds", "flops")


def told(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics under known names. What the server knows by itself, such as rank and rows, is not among them."""
    return {name: value for name, value in metrics.items() if name in KNOWN or _OWN.fullmatch(name)}


_OWN = re.compile(r"own_[A-Za-z0-9_]{1,60}")


def unreadable(metrics: object) -> str | None:
    """Why what a client told of its training cannot be written down, or ``None``."""
    if not isinstance(metrics, Mapping):
        return f"Its metrics are a {type(metrics).__name__}, and numbers by name were expected."
    for name, value in metrics.items():
        if not isinstance(name, str):
            return f"One of its metrics has a {type(name).__name__} for a name, and text was expected."
        if type(value) not in (int, float):
            return f"Its metric {name[:60]} is a {type(value).__name__}, and a number was expected."
        if not -LARGEST <= value <= LARGEST:
            return f"Its metric {name[:60]} is not finite, or so large that no sum would be."
        if value < 0 and name in COUNTED:
            return f"Its metric {name[:60]} is below 0."
    return None


def without_graph(returned: Any) -> Any:
    """The same values, of which none carries how it was computed; what is no tensors by name stays as it is."""
    if not isinstance(returned, Mapping):
        return returned
    return {name: _without_graph(value) for name, value in returned.items()}


def _without_graph(value: Any) -> Any:
    if isinstance(value, LowRank):
        graph = value.B.requires_grad or value.A.requires_grad
        return LowRank(value.B.detach(), value.A.detach()) if graph else value
    return value.detach() if isinstance(value, Tensor) else value


def plain(reply: Reply, expected: Tensors) -> Reply:
    """An admitted reply, no wider than what was expected: the state keeps its dtype."""
    returned = {name: _plain(value, expected[name]) for name, value in reply.returned.items()}
    return replace(reply, returned=returned, metrics=told(reply.metrics))


def _plain(value: Tensor | LowRank, wanted: Tensor | LowRank) -> Tensor | LowRank:
    if isinstance(value, LowRank) and isinstance(wanted, LowRank):
        B, A = _narrow(value.B, wanted.B), _narrow(value.A, wanted.A)
        return value if B is value.B and A is value.A else LowRank(B, A)
    assert isinstance(value, Tensor) and isinstance(wanted, Tensor)  # admission compared the kinds
    return _narrow(value, wanted)


def _narrow(value: Tensor, wanted: Tensor) -> Tensor:
    return value.to(wanted.dtype) if value.is_floating_point() and value.itemsize > wanted.itemsize else value


def misfit(returned: object, expected: Tensors) -> str | None:
    """Why this is not what was expected, or ``None``."""
    if not isinstance(returned, Mapping):
        return f"It returned a {type(returned).__name__}, and tensors by name were expected."
    missing = [name for name in expected if name not in returned]
    if missing:
        return f"{_some(missing)} missing from what was returned."
    surplus = [name for name in returned if name not in expected]
    if surplus:
        return f"{_some(surplus)} returned and never sent to be trained."
    return next((why for name in expected if (why := _misfit(name, returned[name], expected[name]))), None)


def _some(names: Sequence[str]) -> str:
    """``a is``, or ``a and 3 more are``."""
    first = str(names[0])[:200]
    return f"{first} is" if len(names) == 1 else f"{first} and {len(names) - 1} more are"


def _misfit(name: str, given: object, wanted: Tensor | LowRank) -> str | None:
    if isinstance(wanted, LowRank):
        if not isinstance(given, LowRank):
            return f"{name} is a {type(given).__name__}, and a LowRank was expected."
        if given.shape != wanted.shape:
            return f"{name} has the shape {given.shape}, and {wanted.shape} was expected."
        if given.rank != wanted.rank:
            return f"{name} has rank {given.rank}, and rank {wanted.rank} was expected."
        factors = {"B": given.B, "A": given.A}
        reason = next((why for key, factor in factors.items() if (why := _bad(f"{name}'s {key}", factor))), None)
        if reason is None and _size(given.B) * _size(given.A) > LARGEST:
            return f"{name} is so large (|B| |A| = {_size(given.B) * _size(given.A):.1e}) that averages would overflow."
        return reason
    if not isinstance(given, Tensor):
        return f"{name} is a {type(given).__name__}, and a Tensor was expected."
    if given.shape != wanted.shape:
        return f"{name} has the shape {tuple(given.shape)}, and {tuple(wanted.shape)} was expected."
    if not wanted.is_floating_point():  # a counter, not something that was trained
        return None if given.dtype == wanted.dtype else f"{name} is {given.dtype}, and {wanted.dtype} was expected."
    return _bad(name, given)


def _bad(name: str, tensor: Tensor) -> str | None:
    if tensor.dtype not in COMPUTED or tensor.layout != torch.strided or tensor.is_meta:
        return f"{name} is {tensor.dtype}, and a floating dtype of 16, 32 or 64 bits, dense, was expected."
    wrong = tensor.numel() - int(torch.isfinite(tensor).sum())
    if wrong:
        return f"{name} holds {wrong} values that are NaN or infinite."
    if _size(tensor) > LARGEST:
        return f"{name} is so large (a norm of {_size(tensor):.1e}) that averages would overflow."
    return None


def _size(tensor: Tensor) -> float:
    """Frobenius norm in float64: no square of a float32 overflows there."""
    return float(tensor.double().norm())
