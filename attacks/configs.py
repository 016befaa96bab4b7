"""`config.json`: numbers that would be loops, types that are not numbers, code that it asks for."""

# ruff: noqa: E501 (a case is one line)

from __future__ import annotations

import json
from typing import Any

from attacks.bench import Bench
from attacks.case import attack
from attacks.model import CONFIG

HF = "hf2mcore"


def reject(needle: str = "config") -> Any:
    """A configuration that must be refused."""
    return attack("reject", "hf", HF, needle)


def raw(bench: Bench, text: str | bytes) -> None:
    """Replace the file."""
    path = bench.source / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


SPOILT = {
    "billion": (10**9, "a number that would be a loop of a billion steps"),
    "negative": (-2, "a negative number"),
    "zero": (0, "zero"),
    "float": (2.5, "a fraction"),
    "text": ("2", "text"),
    "true": (True, "a boolean"),
    "list": ([2], "a list"),
    "huge": (10**400, "a number of 400 digits"),
    "one_more": (..., "a number that is one too large"),
}
FIELDS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size", "head_dim")  # fmt: skip


def _enter() -> None:
    for field in FIELDS:
        for word, (value, said) in SPOILT.items():
            number = CONFIG[field] + 1 if value is ... else value

            def build(bench: Bench, field: str = field, number: Any = number) -> None:
                bench.config(**{field: number})

            build.__name__, build.__doc__ = f"{field}_{word}", f"`{field}` is {said}."
            attack("reject", "hf", "hf2mcore", rf"{field}|shape|layers|vocab|heads|tensor")(build)


_enter()


@reject()
def not_json(bench: Bench) -> None:
    """A configuration cut short."""
    raw(bench, json.dumps(CONFIG)[:-10])


@reject()
def a_list(bench: Bench) -> None:
    """A configuration that is an array."""
    raw(bench, "[1, 2]")


@reject()
def null(bench: Bench) -> None:
    """A configuration that is null."""
    raw(bench, "null")


@reject()
def not_a_number(bench: Bench) -> None:
    """NaN for the norm's epsilon."""
    raw(bench, json.dumps(CONFIG | {"rms_norm_eps": float("nan")}))


@reject()
def infinity(bench: Bench) -> None:
    """Infinity for a size."""
    raw(bench, json.dumps(CONFIG | {"vocab_size": float("inf")}))


@reject()
def number_that_is_infinite_once_read(bench: Bench) -> None:
    """1e999 is legal JSON and no finite number."""
    raw(bench, json.dumps(CONFIG | {"rope_theta": 1234.5}).replace("1234.5", "1e999"))


@reject()
def digits(bench: Bench) -> None:
    """An integer of a million digits, which takes minutes to convert."""
    raw(bench, json.dumps(CONFIG | {"vocab_size": 12345}).replace("12345", "7" * 1_000_000))


@reject()
def depth(bench: Bench) -> None:
    """Brackets that overflow a recursive parser."""
    raw(bench, '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")


@reject()
def depth_of_65(bench: Bench) -> None:
    """One level more than the limit."""
    raw(bench, json.dumps(CONFIG)[:-1] + ', "a": ' + "[" * 65 + "]" * 65 + "}")


@reject()
def duplicate_key(bench: Bench) -> None:
    """Two layer counts: readers differ in which they believe."""
    raw(bench, '{"num_hidden_layers": 1, ' + json.dumps(CONFIG)[1:])


@reject()
def above_the_limit(bench: Bench) -> None:
    """17 MB, most of it spaces."""
    raw(bench, json.dumps(CONFIG)[:-1] + " " * 17_000_000 + "}")


@reject()
def not_utf8(bench: Bench) -> None:
    """A configuration in UTF-16."""
    raw(bench, json.dumps(CONFIG).encode("utf-16"))


@attack("reject", "hf", "hf2mcore roundtrip", "config.json")
def missing(bench: Bench) -> None:
    """No configuration."""
    (bench.source / "config.json").unlink()


@reject("architectur|EvilForCausalLM")
def unknown_architecture(bench: Bench) -> None:
    """A class that no recipe knows."""
    bench.config(architectures=["EvilForCausalLM"], model_type="evil")


@reject("architectur")
def architecture_that_is_a_path(bench: Bench) -> None:
    """A class name that would be a path or a module."""
    bench.config(architectures=["../../outside/model"], model_type="os.system")


@reject("architectur")
def architecture_with_dunders(bench: Bench) -> None:
    """A class name that a lookup by attribute would find."""
    bench.config(architectures=["__builtins__"], model_type="__class__")


@reject("architectur")
def architectures_is_text(bench: Bench) -> None:
    """A list is wanted."""
    bench.config(architectures={"a": 1}, model_type=None)


@reject("architectur")
def two_architectures(bench: Bench) -> None:
    """Two classes that disagree."""
    bench.config(architectures=["LlamaForCausalLM", "MixtralForCausalLM"])


@attack("warn", "hf", HF, "quant")
def unknown_quantisation(bench: Bench) -> None:
    """A quantisation that cannot be decoded is announced; the files hold plain weights."""
    bench.config(quantization_config={"quant_method": "evil", "bits": 4})


@reject("quant")
def quantisation_that_is_a_list(bench: Bench) -> None:
    """A quantisation that is no object."""
    bench.config(quantization_config=[1])


@reject("quant|scale|weight_block")
def quantisation_of_plain_weights(bench: Bench) -> None:
    """FP8 blocks are announced, and the files hold bfloat16 without scales."""
    bench.config(quantization_config={"quant_method": "fp8", "weight_block_size": [0, 0], "fmt": "e4m3"})


@reject("tie|lm_head")
def tied_with_another_output_layer(bench: Bench) -> None:
    """The configuration says that the output layer is the embedding, the files hold another."""
    bench.config(tie_word_embeddings=True)


@reject("bias")
def bias_that_no_file_holds(bench: Bench) -> None:
    """Biases are promised and absent."""
    bench.config(attention_bias=True)


@attack("warn", "hf", "hf2mcore plan", "auto_map|remote code|\\.py")
def auto_map(bench: Bench) -> None:
    """Code is asked for: reported, never run."""
    (bench.source / "modeling_evil.py").write_text(
        "import os\nopen(os.environ['ATTACK_CANARY'], 'a').write('auto_map')\nclass Evil: pass\n"
    )
    bench.config(auto_map={"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"})


@attack("warn", "hf", "hf2mcore plan", "auto_map|remote code|repository")
def auto_map_of_a_hub_repository(bench: Bench) -> None:
    """Code of another repository is asked for."""
    bench.config(auto_map={"AutoModelForCausalLM": "evil/repository--modeling.Evil"})


@attack("warn", "hf", "hf2mcore plan", "hidden_act")
def activation_that_is_code(bench: Bench) -> None:
    """Text that an `eval` would run."""
    bench.config(hidden_act="__import__('os').system('echo sang >> $ATTACK_CANARY')")


@attack("reject", "hf", "hf2mcore plan", "config|hidden_size|integer")
def size_that_is_code(bench: Bench) -> None:
    """Arithmetic in a number's place."""
    bench.config(hidden_size="__import__('os').system('echo sang >> $ATTACK_CANARY')")


@attack("warn", "hf", "hf2mcore plan", "dtype|os.system")
def dtype_that_is_code(bench: Bench) -> None:
    """A dtype that names a function."""
    bench.config(torch_dtype="os.system", dtype="os.system")


@attack("ok", "hf", "hf2mcore plan roundtrip")
def unknown_fields(bench: Bench) -> None:
    """Fields that nobody knows are legal."""
    bench.config(zzz={"deep": [1, [2, [3]]]}, note="\u001b[31m\u202e", _name_or_path="../../outside")


@attack("ok", "hf", "hf2mcore plan roundtrip")
def byte_order_of_keys(bench: Bench) -> None:
    """Keys in another order, and no head size, which the other numbers imply."""
    raw(bench, json.dumps({key: CONFIG[key] for key in sorted(CONFIG, reverse=True) if key != "head_dim"}))


@attack("ok", "hf", "hf2mcore plan roundtrip")
def depth_of_40(bench: Bench) -> None:
    """Deep, but below the limit."""
    raw(bench, json.dumps(CONFIG)[:-1] + ', "a": ' + "[" * 40 + "]" * 40 + "}")
