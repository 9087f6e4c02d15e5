"""PEFT adapter folders in and out. A folder is untrusted input: everything is checked before it is allocated.

Only ``adapter_config.json`` and ``adapter_model.safetensors`` are read, and only adapters that ``W + scale * B A``
expresses. No PEFT is needed for either direction.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedllm.core import Tensors
from fedllm.errors import FedError
from fedllm.lowrank import LowRank, as_lowrank, fill

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
)  # fmt: skip
"""Files that ``save_pretrained`` of a tokenizer writes."""

BESIDE = ("README.md", "aggregate.json", *TOKENIZER)
"""All that may lie beside an adapter's two files where it is overwritten."""

_MAX_CONFIG = 4 << 20  # bytes; a full name for each of 20 000 modules
_MAX_HEADER = 16 << 20  # bytes; 100 000 tensors
_MAX_PATTERNS = 10_000  # 0.2 ms each to compile
_MAX_MATCHES = 1_000_000  # names x modules: a second
_MAX_SEARCHES = 10_000  # patterns that repeat something x modules: 0.3 ms each at the longest names
_DTYPES = ("BF16", "F16", "F32")

_MODULE = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")
_PREFIX = "base_model.model."
_KEY = re.compile(
    r"base_model\.model\.(?P<module>[^/]{1,256}?)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[A-Za-z0-9_-]{1,64}))?\.weight"
)
"""A state dict saved by hand names its adapter too: ``...lora_A.default.weight``."""

_REPEATED = re.compile(r"[*+?{]")
_ANYWHERE = r"(.*\.)?"

_ANY_VALUE = frozenset(
    [
        *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core"),
        *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
        *("inference_mode", "lora_dropout", "runtime_config", "qalora_group_size", "fan_in_fan_out"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    ]
)
"""Keys that are read, that select modules, or that only say how B and A began or how the base stores its weight."""

_ALLOWED = {"bias": ("none",), "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal")}
"""Other initialisations (PiSSA, OLoRA, LoftQ ...) also change the base weights, so that B A is not the update."""


@dataclass(frozen=True)
class Adapter:
    """One PEFT folder's LoRA update.

    Args:
        updates: ``scale * B A`` by the name of the module that owns the weight (``model.layers.0.self_attn.q_proj``),
            in float32, the scale folded into B.
        base_model: name or path of the model it was trained on, where the folder says so.
        targets: ``target_modules`` where they name exactly the modules in ``updates`` by their endings, else ``None``.
        rank: ``r`` of the config; single modules may differ through ``rank_pattern``.
        task_type: as in the config.
        extras: tensors beside the factors, by their name in the model: biases, and modules that were trained whole.
        modules_to_save, bias: as in the config; they name the extras.
    """

    updates: dict[str, LowRank]
    base_model: str | None
    targets: tuple[str, ...] | None
    rank: int
    task_type: str | None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"


def read(folder: Path, *, max_bytes: int = 8 << 30, extras: bool = False) -> Adapter:
    """The adapter in a PEFT folder.

    Memory: the tensors in float32 (at most twice the file), twice the largest of them while it is converted, and
    256 MiB for the headers, however large the file claims to be.

    Args:
        max_bytes: the largest ``adapter_model.safetensors`` that is opened.
        extras: read biases and wholly trained modules too; without it they are refused.

    Raises:
        FedError: where the folder is not a LoRA adapter that ``B A`` expresses, or is damaged; names the file.
    """
    folder = inside(Path(folder))
    try:
        config_file = _file(folder, CONFIG, _MAX_CONFIG)
        weights_file = _file(folder, WEIGHTS, max_bytes)
        config = _config(config_file, extras)
        updates, beside = _updates(weights_file, config, extras)
    except OSError as error:
        raise FedError(f"{folder} cannot be read: {error.strerror or error}.") from error
    return Adapter(
        updates=updates,
        base_model=config["base_model_name_or_path"],
        targets=_targets(config, updates),
        rank=config["r"],
        task_type=config["task_type"],
        extras=beside,
        modules_to_save=config["modules_to_save"],
        bias=config["bias"],
    )


def write(
    folder: Path,
    updates: Tensors,
    *,
    base_model: str | None,
    targets: Sequence[str] | None = None,
    scale: float = 1.0,
    task_type: str | None = "CAUSAL_LM",
    overwrite: bool = False,
    extras: Mapping[str, Tensor] | None = None,
    modules_to_save: Sequence[str] = (),
    bias: str = "none",
) -> None:
    """Writes ``updates`` as a folder that ``peft.PeftModel.from_pretrained`` loads: all of it, or nothing.

    A product is written with the factors it has; a dense matrix as the SVD at its numerical rank. PEFT has no rank 0:
    a module that did not change gets one direction with B = 0.

    Args:
        updates: by module name, as in ``Adapter.updates``.
        targets: ``target_modules``; by default every module's full name, which is never wrong.
        scale: LoRA's scale in the written config, ``alpha = scale * r``; B is divided by it.
        overwrite: replace an adapter that is already in ``folder``. Anything else in there is never replaced.
        extras, modules_to_save, bias: as in ``Adapter``.

    Raises:
        FedError: where there is nothing to write, a value is not finite, or ``folder`` is taken.
    """
    folder = Path(folder)
    products = {name: _writable(name, update) for name, update in updates.items()}
    if not products:
        raise FedError(f"there is no update to write to {folder}: it needs at least one module.")
    if not math.isfinite(scale) or scale == 0:
        raise FedError(f"an adapter's scale is a finite number other than 0, got {scale}.")
    tensors = {}
    for name, update in products.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = update.A.float().contiguous().clone()
        tensors[f"base_model.model.{name}.lora_B.weight"] = (update.B.float() / scale).contiguous()
    for name, value in (extras or {}).items():
        if not bool(torch.isfinite(value).all()):
            raise FedError(f"{name} holds NaN or infinite values, so it was not written.")
        tensors[_PREFIX + name] = value.float().contiguous().clone()
    ranks = {name: update.rank for name, update in products.items()}
    config = _lora_config(ranks, base_model, targets or sorted(ranks), scale, task_type)
    config |= {"bias": bias, "modules_to_save": list(modules_to_save) or None}
    try:
        _place(folder, tensors, config, overwrite)
    except OSError as error:
        raise FedError(f"the adapter cannot be written to {folder}: {error.strerror or error}.") from error


def check_free(folder: Path, *, overwrite: bool = False) -> None:
    """Raises FedError where ``write`` would not put an adapter; for asking before the work is done."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise FedError(f"{folder} is not a folder: give the adapter another place.")
    entries = {entry.name for entry in folder.iterdir()}
    if not entries:
        return
    if not overwrite:
        raise FedError(
            f"{folder} is not empty and was left as it is: give an empty or new folder, or ask to overwrite."
        )
    foreign = sorted(entries - {CONFIG, WEIGHTS, *BESIDE})
    if foreign or CONFIG not in entries:
        found = f"it holds {foreign[0]}" if foreign else f"there is no {CONFIG} in it"
        raise FedError(f"only a folder with nothing but an adapter is overwritten, and {folder} is not: {found}.")


def inside(folder: Path) -> Path:
    """The folder of the adapter's own name, one deeper, where PEFT saved one that is not called ``default``.

    Raises:
        FedError: where there are several.
    """
    if (folder / CONFIG).is_file():
        return folder
    found = sorted(x.parent for x in folder.glob(f"*/{CONFIG}") if not x.parent.is_symlink())
    if len(found) > 1:
        raise FedError(f"{folder} holds several adapters: {', '.join(x.name for x in found)}. Give one of them.")
    return found[0] if found else folder


def _file(folder: Path, name: str, limit: int) -> Path:
    """The regular file ``folder/name``, links resolved, inside the folder and at most ``limit`` bytes."""
    if not folder.is_dir():
        raise FedError(f"{folder} is not a folder: give the folder that PEFT's save_pretrained wrote.")
    root = folder.resolve()
    try:
        path = (root / name).resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        raise FedError(_missing(folder, name)) from None
    except RuntimeError as error:  # a loop of links, before Python 3.13
        raise FedError(f"{folder / name} is a link to itself.") from error
    if not path.is_relative_to(root):
        raise FedError(f"{folder / name} is a link that leaves the folder: copy the file itself there.")
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FedError(f"{folder / name} is not a regular file.")
    if status.st_size > limit:
        raise FedError(f"{folder / name} has {status.st_size} bytes, and at most {limit} are read.")
    return path


def _missing(folder: Path, name: str) -> str:
    if name == WEIGHTS and (folder / "adapter_model.bin").exists():
        return (
            f"{folder} has its weights in adapter_model.bin, a pickle, which can run code when it is loaded. "
            "If you trust it, load it with peft.PeftModel.from_pretrained and save it with save_pretrained: "
            f"that writes {WEIGHTS}."
        )
    return f"{folder} has no {name}: give a folder that PEFT's save_pretrained wrote."


def _config(path: Path, extras: bool = False) -> dict[str, Any]:
    """The config, every key that is used checked for type and range, and refused where B A does not express it."""
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FedError(f"{path} is not valid JSON: {_line(error)}.") from error
    if not isinstance(config, dict):
        raise FedError(f"{path} must hold a JSON object, and holds a {type(config).__name__}.")
    if config.get("peft_type") != "LORA":
        raise FedError(f"{path}: peft_type must be LORA, got {_short(config.get('peft_type'))}.")
    for key, value in config.items():
        if key in _ANY_VALUE or (extras and key in ("bias", "modules_to_save")):
            continue
        if key in _ALLOWED:
            if any(value is allowed or (isinstance(value, str) and value == allowed) for allowed in _ALLOWED[key]):
                continue
        elif value is None or value is False or value in ("", [], {}):
            continue
        how = " --extras average or drop says what becomes of it." if key in ("bias", "modules_to_save") else ""
        raise FedError(
            f"{path}: {_short(key)} = {_short(value)} is more than scale * B A, so it cannot be aggregated.{how}"
        )
    checked: dict[str, Any] = {
        "r": _rank(path, "r", config.get("r")),
        "lora_alpha": _number(path, "lora_alpha", config.get("lora_alpha")),
        "use_rslora": config.get("use_rslora") or False,
        "rank_pattern": _table(path, config, "rank_pattern", _rank),
        "alpha_pattern": _table(path, config, "alpha_pattern", _number),
        "target_modules": config.get("target_modules"),
        "selects": any(config.get(k) for k in ("layers_to_transform", "layers_pattern", "exclude_modules")),
        "base_model_name_or_path": config.get("base_model_name_or_path"),
        "task_type": config.get("task_type"),
        "bias": config.get("bias") or "none",
        "modules_to_save": config.get("modules_to_save") or (),
    }
    _check_extras(path, checked)
    if not isinstance(checked["use_rslora"], bool):
        raise FedError(f"{path}: use_rslora must be true or false, got {_short(checked['use_rslora'])}.")
    for key in ("base_model_name_or_path", "task_type"):
        if not isinstance(checked[key], str | None):
            raise FedError(f"{path}: {key} must be a string, got {_short(checked[key])}.")
    return checked


def _check_extras(path: Path, checked: dict[str, Any]) -> None:
    if checked["bias"] not in ("none", "all", "lora_only"):
        raise FedError(f"{path}: bias must be none, all or lora_only, got {_short(checked['bias'])}.")
    named = checked["modules_to_save"]
    if not isinstance(named, list | tuple) or not all(isinstance(n, str) and _MODULE.fullmatch(n) for n in named):
        raise FedError(f"{path}: modules_to_save must be a list of modules' names, got {_short(named)}.")
    checked["modules_to_save"] = tuple(sorted(set(named)))


def _short(value: object) -> str:
    """A value from a file, as one short line."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _line(error: BaseException) -> str:
    """A library's message in one line; it may quote the file."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())[:200]


def _rank(path: Path, key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1 << 20:
        raise FedError(f"{path}: a rank in {key} must be a whole number from 1 to {1 << 20}, got {_short(value)}.")
    return value


def _number(path: Path, key: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= 1e9:  # NaN compares false
        raise FedError(f"{path}: {key} must be a number of at most 1e9, got {_short(value)}.")
    return float(value)


def _table(
    path: Path, config: Mapping[str, Any], key: str, check: Callable[[Path, str, object], Any]
) -> dict[re.Pattern[str], Any]:
    """A pattern table, compiled as PEFT matches it: a module's whole dotted name, or the end of one, as a regex."""
    table = config.get(key) or {}
    if not isinstance(table, dict):
        raise FedError(f"{path}: {key} must map patterns to numbers, got {_short(table)}.")
    if len(table) > _MAX_PATTERNS:
        raise FedError(f"{path}: {key} has {len(table)} patterns, and at most {_MAX_PATTERNS} are read.")
    compiled = {}
    for pattern, value in table.items():
        if len(pattern) > 512 or _slow(pattern):
            raise FedError(f"{path}: {key} has {_short(pattern)}, which could take for ever to match: write names.")
        try:
            compiled[re.compile(rf"{_ANYWHERE}({pattern})$")] = check(path, key, value)
        except (re.error, RecursionError, OverflowError) as error:
            raise FedError(
                f"{path}: {key} has {_short(pattern)}, which is no regular expression: {_line(error)}."
            ) from error
    return compiled


def _slow(pattern: str) -> bool:
    """Whether backtracking could go beyond a square: more than one repetition, or more than two groups."""
    repeated_group = re.search(r"\)[*+?{]", pattern)
    return bool(repeated_group) or len(_REPEATED.findall(pattern)) > 1 or pattern.count("(") > 2


def _matched(table: Mapping[re.Pattern[str], Any], module: str, default: Any) -> Any:
    return next((value for pattern, value in table.items() if pattern.match(module)), default)


def _updates(
    path: Path, config: Mapping[str, Any], extras: bool = False
) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    """Every module's ``scale * B A`` and the tensors beside them; the header is checked before the first is read."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > _MAX_HEADER:
        raise FedError(f"{path} is damaged: its header claims {header} bytes, and at most {_MAX_HEADER} are read.")
    try:
        with safe_open(path, framework="pt", device="cpu") as tensors:  # checks shapes against the file's size
            beside = [key for key in sorted(tensors.keys()) if extras and _is_extra(key, config)]
            shapes, names = _shapes(path, tensors, beside)
            scales = _scales(path, shapes, config)
            products = {module: _product(path, tensors, module, names, scale) for module, scale in scales.items()}
            return products, {key.removeprefix(_PREFIX): _extra(path, tensors, key) for key in beside}
    except SafetensorError as error:
        raise FedError(f"{path} is not a whole safetensors file: {_line(error)}.") from error


def _is_extra(key: str, config: Mapping[str, Any]) -> bool:
    """Whether the config names this tensor: a bias, or a value of a module that was trained whole."""
    module, _, kind = key.removeprefix(_PREFIX).rpartition(".")
    if (
        not key.startswith(_PREFIX)
        or ".lora_" in key
        or kind not in ("weight", "bias")
        or not _MODULE.fullmatch(module)
    ):
        return False
    whole = any(f".{module}.".find(f".{name}.") >= 0 for name in config["modules_to_save"])
    return whole or (kind == "bias" and config["bias"] != "none")


def _extra(path: Path, tensors: Any, key: str) -> Tensor:
    if tensors.get_slice(key).get_dtype() not in _DTYPES:
        raise FedError(f"{path}: {_short(key)} is not one of {', '.join(_DTYPES)}.")
    value = tensors.get_tensor(key).to(torch.float32, copy=True)
    if not bool(torch.isfinite(value).all()):
        raise FedError(f"{path}: {key} holds NaN or infinite values: the training diverged, leave it out.")
    return value


def _shapes(
    path: Path, tensors: Any, beside: Sequence[str] = ()
) -> tuple[dict[str, dict[str, tuple[int, ...]]], dict[tuple[str, str], str]]:
    """``{module: {"A": shape, "B": shape}}`` and ``{(module, "A"): name in the file}``, from the header alone."""
    names = {}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    adapters: set[str | None] = set()
    for key in sorted(set(tensors.keys()) - set(beside)):
        match = _KEY.fullmatch(key)
        if match is None and not key.startswith(_PREFIX) and _KEY.fullmatch(_PREFIX + key):
            raise FedError(
                f"{path} has the tensor {_short(key)}, and PEFT's names begin with {_PREFIX!r}: save the adapter with "
                "save_pretrained, or PEFT applies none of it."
            )
        if match is None or not _MODULE.fullmatch(match["module"]):
            raise FedError(
                f"{path} has the tensor {_short(key)}, and only base_model.model.MODULE.lora_A.weight and lora_B.weight"
                " are read: biases, DoRA, embeddings and fully trained modules cannot be aggregated as B A."
            )
        view = tensors.get_slice(key)
        if view.get_dtype() not in _DTYPES:
            raise FedError(f"{path}: {_short(key)} is {view.get_dtype()}, and only {', '.join(_DTYPES)} are read.")
        shape = tuple(view.get_shape())
        if len(shape) != 2 or min(shape) < 1:
            raise FedError(f"{path}: {_short(key)} has the shape {list(shape)[:8]}, and a factor is a matrix.")
        adapters.add(match["adapter"])
        names[match["module"], match["factor"]] = key
        shapes.setdefault(match["module"], {})[match["factor"]] = shape
    if len(adapters) > 1:
        raise FedError(
            f"{path} holds several adapters ({', '.join(sorted(map(str, adapters)))}): save one of them alone."
        )
    if not shapes:
        raise FedError(f"{path} holds no tensor: there is nothing to aggregate.")
    return shapes, names


def _scales(
    path: Path, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], config: Mapping[str, Any]
) -> dict[str, float]:
    """Each module's ``alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA; raises where config and shapes disagree."""
    for table in (config["rank_pattern"], config["alpha_pattern"]):
        searches = sum(bool(_REPEATED.search(pattern.pattern.removeprefix(_ANYWHERE))) for pattern in table)
        if len(shapes) * len(table) > _MAX_MATCHES or len(shapes) * searches > _MAX_SEARCHES:
            raise FedError(f"{path}: {len(table)} patterns for {len(shapes)} modules take too long to match.")
    scales = {}
    for module, factors in shapes.items():
        if len(factors) < 2:
            raise FedError(f"{path}: {module} has lora_{next(iter(factors))} and not the other factor.")
        (r_A, _), (_, r_B) = factors["A"], factors["B"]
        r = _matched(config["rank_pattern"], module, config["r"])
        if not r_A == r_B == r:
            raise FedError(f"{path}: {module} has rank {r_A} in lora_A and {r_B} in lora_B, and {CONFIG} says {r}.")
        alpha = _matched(config["alpha_pattern"], module, config["lora_alpha"])
        scales[module] = alpha / math.sqrt(r) if config["use_rslora"] else alpha / r
    return scales


def _product(path: Path, tensors: Any, module: str, names: Mapping[tuple[str, str], str], scale: float) -> LowRank:
    factors = {}
    for factor in "BA":
        key = names[module, factor]
        tensor = tensors.get_tensor(key)
        if not bool(torch.isfinite(tensor).all()):
            raise FedError(f"{path}: {key} holds NaN or infinite values: the training diverged, leave it out.")
        factors[factor] = tensor.to(torch.float32, copy=True)  # some versions map the file: keep nothing of it
    B = factors["B"].mul_(scale)
    if not bool(torch.isfinite(B).all()):
        raise FedError(f"{path}: {module}'s lora_B overflows float32 when it is multiplied by its scale {scale:g}.")
    return LowRank(B, factors["A"])


def _targets(config: Mapping[str, Any], updates: Mapping[str, object]) -> tuple[str, ...] | None:
    """The config's names, where they are a list that every update ends in and nothing narrows."""
    named = config["target_modules"]
    if not isinstance(named, list) or not all(isinstance(target, str) for target in named) or config["selects"]:
        return None
    targets = tuple(sorted(set(named)))
    if all(any(f".{name}".endswith(f".{target}") for target in targets) for name in updates):
        return targets
    return None


def _writable(name: str, update: Tensor | LowRank) -> LowRank:
    """The update as finite factors of rank 1 or more."""
    if not _MODULE.fullmatch(name) or len(name) > 256:
        raise FedError(f"{name!r} is not the dotted name of a module.")
    tensors = (update.B, update.A) if isinstance(update, LowRank) else (update,)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise FedError(f"the update of {name} holds NaN or infinite values, so it was not written.")
    product = update if isinstance(update, LowRank) else as_lowrank(update).balanced()
    return product if product.rank else fill(product, 1, torch.Generator().manual_seed(0))


def _lora_config(
    ranks: Mapping[str, int], base_model: str | None, targets: Sequence[str], scale: float, task_type: str | None
) -> dict[str, Any]:
    """The config as PEFT writes it. Where ranks differ, every module is named, longest name first: PEFT takes the first
    name that is the end of a module's."""
    r = Counter(ranks.values()).most_common(1)[0][0]
    mixed = len(set(ranks.values())) > 1
    names = sorted(ranks, key=lambda name: (-len(name), name)) if mixed else []
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "revision": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": _alpha(scale, r),
        "rank_pattern": {name: ranks[name] for name in names},
        "alpha_pattern": {name: _alpha(scale, ranks[name]) for name in names},
        "target_modules": list(targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def _alpha(scale: float, r: int) -> int | float:
    alpha = scale * r
    return int(alpha) if alpha == int(alpha) else alpha


def _place(folder: Path, tensors: dict[str, Tensor], config: Mapping[str, Any], overwrite: bool) -> None:
    """Both files in a folder of their own next to ``folder``, then one rename."""
    check_free(folder, overwrite=overwrite)
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (folder.parent / f".{folder.name}.{secrets.token_hex(4)}.{part}" for part in ("new", "old"))
    try:
        fresh.mkdir()
        (fresh / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, fresh / WEIGHTS, metadata={"format": "pt"})
        (fresh / WEIGHTS).chmod(stat.S_IMODE((fresh / CONFIG).stat().st_mode))  # safetensors: for the owner alone
        for path in (fresh / CONFIG, fresh / WEIGHTS, fresh):
            _sync(path)
        if folder.exists() and any(folder.iterdir()):
            folder.rename(old)
        fresh.rename(folder)
        _sync(folder.parent)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
