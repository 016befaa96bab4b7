"""A PEFT adapter directory: adapter_config.json and adapter_model.safetensors, as peft 0.5 to 0.21 write them.

Keys are `base_model.model.<module>.<part>`: the parts of a low-rank update, or a weight of the model that was trained
whole (`modules_to_save`, biases, resized embeddings). An update of a parameter that is no module's `weight`, such as
stacked experts, is keyed by the module that holds it, `.base_layer` once more for each further one.

Source: peft/utils/save_and_load.py (get_peft_model_state_dict), tuners/lora/layer.py (Linear, Embedding, ParamWrapper).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transcoder.disk import there
from transcoder.errors import Problem, refuse
from transcoder.formats.safetensors import INDEX_NAME, SINGLE_NAME, Shard, read_shard
from transcoder.hfconfig import read_json
from transcoder.spec import TensorSpec

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONFIG_LIMIT = 16 << 20  # bytes
LARGEST = 1e6  # rank and alpha
PREFIX = "base_model.model."
FLOATS = ("bfloat16", "float16", "float32")
_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
_PART = re.compile(r"(?P<module>.+)\.(?P<part>" + "|".join(re.escape(part) for part in _PARTS) + ")")
# Fields that make an update something else than scale · B · A, where they are set.
_OTHER_ARITHMETIC = (
    "alora_invocation_tokens", "arrow_config", "fan_in_fan_out", "kasa_config", "layer_replication", "lora_bias",
    "megatron_config", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
_OTHER_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")  # ways to begin that change the base model, too


@dataclass(frozen=True)
class Peft:
    """What an adapter directory holds, before a payload byte is read."""

    path: Path
    config: Mapping[str, Any]
    shard: Shard
    parts: Mapping[str, Mapping[str, TensorSpec]]  # module → part (a, b, magnitude, …) → tensor
    whole: Mapping[str, TensorSpec]  # weights that were trained whole, by their names in the model
    warnings: tuple[str, ...]

    def alpha(self, module: str) -> float:
        """`lora_alpha` of a module; the first pattern that fits the end of its name counts, as in PEFT."""
        found = next((value for key, value in self.config["alpha_pattern"].items() if _fits(key, module)), None)
        return float(self.config["lora_alpha"] if found is None else found)

    def scale(self, module: str, rank: int) -> float:
        """What B · A is multiplied with."""
        return self.alpha(module) / (rank**0.5 if self.config.get("use_rslora") else rank)

    def rank(self, module: str) -> int:
        """The rank that the config gives a module."""
        found = next((value for key, value in self.config["rank_pattern"].items() if _fits(key, module)), None)
        return int(self.config["r"] if found is None else found)


def _fits(key: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", module) is not None


def is_peft(path: Path) -> bool:
    """Whether a directory is a PEFT adapter's, which may carry the config of its model, but not its weights."""
    present = [there(path / name) for name in (CONFIG, SINGLE_NAME, INDEX_NAME)]
    return present == [True, False, False]


def open_peft(path: Path, follow_links: bool = False) -> Peft:
    """The adapter, its config understood and its header validated. Raises InputError for what cannot be merged."""
    if not there(path / CONFIG):
        problem = Problem(file=CONFIG, expected="a PEFT adapter directory", found="no such file")
        raise refuse("not-found" if not path.is_dir() else "adapter", f"{path} is not a PEFT adapter", [problem])
    config = _config(path)
    if not there(path / WEIGHTS):
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8])
        hint = "adapter_model.bin is a pickle: save the adapter anew with safetensors"
        problem = Problem(file=WEIGHTS, expected="the adapter's weights", found=found, hint=hint)
        raise refuse("no-weights", f"{path} holds no safetensors weights", [problem])
    shard = read_shard(path / WEIGHTS, follow_links)
    parts, whole = _sorted(shard)
    _check_parts(parts)
    return Peft(path, config, shard, parts, whole, tuple(_remarks(config)))


def _config(path: Path) -> dict[str, Any]:
    config = read_json(path / CONFIG, CONFIG_LIMIT)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = str(config.get("peft_type")) if isinstance(config, dict) else type(config).__name__
        raise refuse("adapter", "only LoRA adapters can be read", [Problem(file=CONFIG, expected="LORA", found=found)])
    config = {"alpha_pattern": {}, "rank_pattern": {}} | {
        key: value for key, value in config.items() if value is not None
    }
    problems = [
        Problem(file=CONFIG, message=f"{key} = {config[key]!r:.80}", hint="merge this adapter with PEFT")
        for key in _OTHER_ARITHMETIC
        if config.get(key)
    ]
    if problems:
        raise refuse("adapter", "the adapter is of a variant that is more than scale * B @ A", problems)
    problems = [*_odd_numbers(config)] or [*_odd_patterns(config)]
    if problems:
        raise refuse("adapter", "the adapter's config cannot be understood", problems)
    return config


def _odd_numbers(config: Mapping[str, Any]) -> Iterator[Problem]:
    for key, pattern, kinds in (("r", "rank_pattern", (int,)), ("lora_alpha", "alpha_pattern", (int, float))):
        table = config[pattern] if isinstance(config[pattern], dict) else {pattern: config[pattern]}
        for name, value in {key: config.get(key), **table}.items():
            if type(value) not in kinds or not 0 < value < LARGEST:
                yield Problem(file=CONFIG, message=f"{name} = {value!r:.80}", expected="a positive number")


def _odd_patterns(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Expressions that are none, or could take forever: these need a repeated group, or many repetitions."""
    for key in (*config["rank_pattern"], *config["alpha_pattern"]):
        try:
            re.compile(key)
        except (re.error, RecursionError, OverflowError) as error:
            yield Problem(file=CONFIG, message=f"{key!r:.120}: {error}", expected="a regular expression")
            continue
        if len(key) > 500 or re.search(r"\)[*+?{]", key) or len(re.findall(r"[*+{]", key)) > 2:
            expected = "a regular expression with at most two repetitions, of no group"
            yield Problem(file=CONFIG, message=f"{key!r:.120}", expected=expected)


def _remarks(config: Mapping[str, Any]) -> Iterator[str]:
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_OTHER_BASE):
        yield f"the adapter began as {start}: it belongs to the base model that PEFT changed then, not to the original"


def _sorted(shard: Shard) -> tuple[dict[str, dict[str, TensorSpec]], dict[str, TensorSpec]]:
    parts: dict[str, dict[str, TensorSpec]] = {}
    whole, problems = dict[str, TensorSpec](), []
    for spec in shard.tensors:
        name = spec.name.removeprefix(PREFIX)
        if name == spec.name or spec.dtype.name not in FLOATS:
            expected = f"a key that begins with {PREFIX}, of a float type"
            problems.append(Problem(file=shard.name, tensor=spec.name, expected=expected, found=spec.dtype.name))
        elif match := _PART.fullmatch(name):
            parts.setdefault(match["module"], {})[_PARTS[match["part"]]] = spec
        else:
            whole[name.replace(".base_layer.", ".")] = spec
    if problems:
        raise refuse("adapter", "the adapter holds other things than updates and weights", problems)
    return parts, whole


def _check_parts(parts: Mapping[str, Mapping[str, TensorSpec]]) -> None:
    known = ({"a", "b"}, {"a", "b", "magnitude"}, {"embedding_a", "embedding_b"})
    problems = [
        Problem(file=WEIGHTS, tensor=module, expected="lora_A and lora_B", found=", ".join(sorted(found)))
        for module, found in parts.items()
        if set(found) not in known or any(len(spec.shape) != 2 for part, spec in found.items() if part != "magnitude")
    ]
    if problems:
        raise refuse("adapter", "an update is not whole", problems)
