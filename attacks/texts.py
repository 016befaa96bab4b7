"""`run_config.yaml` and the side folder of a checkpoint: tags, aliases, and configurations that lie."""

# ruff: noqa: E501 (a case is one line)

from __future__ import annotations

from typing import Any

from attacks.bench import Bench
from attacks.case import attack
from attacks.model import FFN, GROUPS, HEAD, HEADS, HIDDEN, LAYERS, VOCAB
from attacks.pickles import SHELL

# Nothing but the YAML tells the configuration.
LINES = ("mcore2hf {src} {dst} --no-sync --arch LlamaForCausalLM",)
GOOD = f"""model:
  _target_: megatron.bridge.models.gpt_provider.GPTModelProvider
  num_layers: {LAYERS}
  hidden_size: {HIDDEN}
  ffn_hidden_size: {FFN}
  num_attention_heads: {HEADS}
  num_query_groups: {GROUPS}
  kv_channels: {HEAD}
  vocab_size: {VOCAB}
  share_embeddings_and_output_weights: false
  normalization: RMSNorm
  layernorm_epsilon: 1.0e-05
  gated_linear_unit: true
  activation_func: {{_target_: torch.nn.functional.silu, _call_: false}}
  add_bias_linear: false
  add_qkv_bias: false
  qk_layernorm: false
  position_embedding_type: rope
  rotary_base: 10000.0
  seq_length: 64
  bf16: true
  params_dtype: {{_target_: torch.bfloat16, _call_: false}}
"""


def write(bench: Bench, text: str | bytes) -> None:
    """Replace the YAML, and take away what else tells the configuration."""
    (bench.folder / "hf" / "config.json").unlink(missing_ok=True)
    (bench.folder / "run_config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())


def bomb() -> str:
    """Nine aliases of nine aliases …: 9**12 nodes."""
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    return "\n".join(rows) + "\n" + GOOD


def merge_bomb() -> str:
    """The same with merge keys."""
    rows = ["a0: &a0 {k0: 1, k1: 2}"]
    rows += [f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    return "\n".join(rows) + "\n" + GOOD


TEXTS: dict[str, tuple[str, Any]] = {
    "python_object": ("A tag that makes a call.", lambda: f"x: !!python/object/apply:os.system ['{SHELL}']\n{GOOD}"),
    "python_name": ("A tag that names a function.", lambda: f"x: !!python/name:os.system\n{GOOD}"),
    "python_module": ("A tag that imports.", lambda: f"x: !!python/module:attack_bait\n{GOOD}"),
    "python_tuple": ("A harmless tag of the same family.", lambda: f"x: !!python/tuple [1]\n{GOOD}"),
    "unknown_tag": ("A tag of a stranger.", lambda: f"x: !evil [1]\n{GOOD}"),
    "alias_bomb": (bomb.__doc__, bomb),
    "merge_bomb": (merge_bomb.__doc__, merge_bomb),
    "alias_of_itself": ("A list that holds itself.", lambda: f"x: &x [*x]\n{GOOD}"),
    "depth": ("Brackets that overflow a recursive parser.", lambda: f"x: {'[' * 20_000}{']' * 20_000}\n{GOOD}"),
    "depth_by_indentation": ("Two thousand levels of indentation.", lambda: "".join(f"{' ' * n}a:\n" for n in range(2000)) + GOOD),
    "duplicate_key": ("Two layer counts.", lambda: GOOD.replace("  hidden_size", "  num_layers: 1\n  hidden_size", 1)),
    "two_documents": ("Two documents.", lambda: f"{GOOD}---\n{GOOD}"),
    "list": ("No mapping.", lambda: "- 1\n- 2\n"),
    "model_is_text": ("`model` is text.", lambda: "model: x\n"),
    "not_utf8": ("Bytes that are no text.", lambda: b"model: \xff\xfe\xfa\n"),
    "nul": ("A NUL byte.", lambda: b"model: \0\n"),
    "billion_layers": ("10**9 layers.", lambda: GOOD.replace(f"num_layers: {LAYERS}", "num_layers: 1000000000")),
    "sexagesimal": ("A base-60 number, as YAML 1.1 has it.", lambda: GOOD.replace(f"num_layers: {LAYERS}", "num_layers: 1:30")),
    "layers_of_text": ("A layer count of text.", lambda: GOOD.replace(f"num_layers: {LAYERS}", "num_layers: 'two'")),
    "nan": ("A size that is not a number.", lambda: GOOD.replace(f"hidden_size: {HIDDEN}", "hidden_size: .nan", 1)),
    "unclosed": ("A quote that nothing closes.", lambda: GOOD + 'x: "\n'),
    "digits": ("A number of a hundred thousand digits.", lambda: GOOD.replace(f"vocab_size: {VOCAB}", "vocab_size: " + "9" * 100_000)),
    "large": ("17 MB of comment.", lambda: GOOD + "#" * 17_000_000 + "\n"),
    "cut_short": ("The end is missing.", lambda: "model: {num_layers: 2,"),
}  # fmt: skip


def _enter() -> None:
    for word, (said, make) in TEXTS.items():

        def build(bench: Bench, make: Any = make) -> None:
            write(bench, make())

        build.__name__, build.__doc__ = f"yaml_{word}", said
        attack("reject", "mcore", "", r"run_config\.yaml|num_layers|layers|hidden_size|vocab", *LINES)(build)


_enter()


@attack("ok", "mcore", "", "", *LINES)
def yaml_target_is_text(bench: Bench) -> None:
    """`_target_` names code, which stays text."""
    write(bench, GOOD + "hook:\n  _target_: os.system\n  _args_: ['echo sang >> $ATTACK_CANARY']\n")


@attack("ok", "mcore", "", "", *LINES)
def yaml_modest_aliases(bench: Bench) -> None:
    """A few aliases are ordinary YAML."""
    write(bench, "defaults: &d {a: 1}\nother: *d\nmore:\n  <<: *d\n  b: 2\n" + GOOD)


def carried(needle: str = "config") -> Any:
    """A lie in the model's files that the checkpoint carries."""
    return attack("reject", "mcore", "mcore2hf", needle)


@carried("layer|config|num_hidden")
def carried_config_of_another_model(bench: Bench) -> None:
    """`hf/config.json` says another number of layers."""
    path = bench.folder / "hf" / "config.json"
    path.write_text(path.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1000000000'))


@carried()
def carried_config_links_outside(bench: Bench) -> None:
    """`hf/config.json` is a link outside."""
    path = bench.folder / "hf" / "config.json"
    path.unlink()
    path.symlink_to(bench.stranger / "config.json")


@carried("hf")
def carried_folder_links_outside(bench: Bench) -> None:
    """`hf` itself is a link outside."""
    (bench.folder / "hf").rename(bench.outside / "hf")
    (bench.folder / "hf").symlink_to(bench.outside / "hf")


@attack("warn", "mcore", "mcore2hf", "")
def carried_file_links_to_a_secret(bench: Bench) -> None:
    """A side file in `hf/` that links outside must not be exported."""
    (bench.folder / "hf" / "secret.txt").symlink_to(bench.outside / "secret.txt")
    (bench.place / "absent").write_text("secret.txt")


@attack("warn", "mcore", "mcore2hf", "")
def carried_pickle(bench: Bench) -> None:
    """A pickle in `hf/` must not be exported into a folder that `from_pretrained` opens."""
    (bench.folder / "hf" / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")
    (bench.place / "absent").write_text("pytorch_model.bin")


@attack("warn", "mcore", "mcore2hf", "")
def carried_weights(bench: Bench) -> None:
    """Foreign weights in `hf/` would win over the exported ones."""
    from attacks.model import model, table, write_file

    write_file(bench.folder / "hf" / "model.safetensors", *table(dict(list(model().items())[:1])))
