"""A good Megatron checkpoint of the model, written without the tool: a draft that a case may spoil before."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attacks.model import FFN, GROUPS, HEAD, HEADS, HIDDEN, LAYERS, VOCAB, model, write_side_files
from attacks.opcodes import Call, Name, New, Pairs, dumps
from attacks.zipping import saved, tensor_item

DCP = "torch.distributed.checkpoint"
QKV, FC1 = "decoder.layers.self_attention.linear_qkv.weight", "decoder.layers.mlp.linear_fc1.weight"
EMBEDDING = "embedding.word_embeddings.weight"


def rows_of(payload: bytes, shape: tuple[int, ...], start: int, stop: int) -> bytes:
    """Rows of a bfloat16 matrix."""
    width = 2 * shape[1]
    return payload[start * width : stop * width]


def megatron() -> dict[str, tuple[tuple[int, ...], bytes]]:
    """The good model under Megatron's stacked names."""
    tensors = {name: (shape, payload) for name, (_, shape, payload) in model().items()}
    found = {EMBEDDING: tensors["model.embed_tokens.weight"], "output_layer.weight": tensors["lm_head.weight"]}
    found["decoder.final_layernorm.weight"] = tensors["model.norm.weight"]
    layers = [{key.partition(f"layers.{n}.")[2]: row for key, row in tensors.items() if f"layers.{n}." in key}
              for n in range(LAYERS)]  # fmt: skip
    found[QKV] = (LAYERS, (HEADS + 2 * GROUPS) * HEAD, HIDDEN), b"".join(map(_qkv, layers))
    fc1 = b"".join(row["mlp.gate_proj.weight"][1] + row["mlp.up_proj.weight"][1] for row in layers)
    found[FC1] = (LAYERS, 2 * FFN, HIDDEN), fc1
    plain = {"self_attn.o_proj": "self_attention.linear_proj", "mlp.down_proj": "mlp.linear_fc2"}
    norms = {"input_layernorm": "self_attention.linear_qkv", "post_attention_layernorm": "mlp.linear_fc1"}
    names = {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in plain.items()}
    names |= {f"{theirs}.weight": f"{ours}.layer_norm_weight" for theirs, ours in norms.items()}
    for theirs, ours in names.items():
        shape = layers[0][theirs][0]
        found[f"decoder.layers.{ours}"] = (LAYERS, *shape), b"".join(row[theirs][1] for row in layers)
    return found


def _qkv(rows: dict[str, tuple[tuple[int, ...], bytes]]) -> bytes:
    found, heads = b"", HEADS // GROUPS * HEAD
    for group in range(GROUPS):
        for name, height in (("q", heads), ("k", HEAD), ("v", HEAD)):
            shape, payload = rows[f"self_attn.{name}_proj.weight"]
            found += rows_of(payload, shape, group * height, (group + 1) * height)
    return found


@dataclass
class Chunk:
    """A stored piece of a tensor; `at` and `length` are filled in when the draft is written."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    item: bytes
    path: Any = "__0_0.distcp"
    at: Any = None
    length: Any = None
    transform: Any = None


@dataclass
class Entry:
    """A tensor of the plan."""

    shape: Any
    chunks: list[Chunk]
    dtype: str = "bfloat16"


@dataclass
class Draft:
    """A checkpoint before it is written: the plan, to be spoilt."""

    entries: dict[str, Entry] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    more_state: list[tuple[Any, Any]] = field(default_factory=list)
    more_storage: list[tuple[Any, Any]] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    is_laid: bool = False

    def lay(self) -> None:
        """Give every item its place, once: what is changed later is a lie."""
        if self.is_laid:
            return
        self.is_laid = True
        for entry in self.entries.values():
            for chunk in entry.chunks:
                name = chunk.path if isinstance(chunk.path, str) and chunk.at is None else "__0_0.distcp"
                start = len(self.files.setdefault(name, b""))
                self.files[name] += chunk.item if chunk.at is None else b""
                chunk.at = start if chunk.at is None else chunk.at
                chunk.length = len(chunk.item) if chunk.length is None else chunk.length
        for key, item in self.objects.items():
            self.places[key] = len(self.files.setdefault("__0_1.distcp", b"")), len(item)
            self.files["__0_1.distcp"] += item

    def pickle(self) -> bytes:
        """`.metadata`."""
        state = [(key, self._tensor(entry)) for key, entry in self.entries.items()]
        state += [(key, New(Name(f"{DCP}.metadata", "BytesStorageMetadata"), {})) for key in self.objects]
        storage = [(index(key, chunk.offsets), info(chunk.path, chunk.at, chunk.length, chunk.transform))
                   for key, entry in self.entries.items() for chunk in entry.chunks]  # fmt: skip
        storage += [
            (index(key, None), info("__0_1.distcp", start, length)) for key, (start, length) in self.places.items()
        ]
        fields = {"state_dict_metadata": Pairs((*state, *self.more_state)), "planner_data": None,
                  "storage_data": Pairs((*storage, *self.more_storage))}  # fmt: skip
        return dumps(New(Name(f"{DCP}.metadata", "Metadata"), {**fields, **self.attributes}))

    def _tensor(self, entry: Entry) -> New:
        name = Name(f"{DCP}.metadata", "ChunkStorageMetadata")
        chunks = [New(name, {"offsets": size(row.offsets), "sizes": size(row.sizes)}) for row in entry.chunks]
        fields = {"properties": properties(entry.dtype), "size": size(entry.shape), "chunks": chunks}
        return New(Name(f"{DCP}.metadata", "TensorStorageMetadata"), fields)


def size(value: Any) -> Any:
    """A torch.Size, or the value as it is if it is not a tuple."""
    return Call(Name("torch", "Size"), (value,)) if isinstance(value, tuple) else value


def properties(dtype: str) -> New:
    """As torch pickles TensorProperties."""
    layout = Call(Name("torch.serialization", "_get_layout"), ("torch.strided",))
    memory = Call(Name(f"{DCP}.metadata", "_MEM_FORMAT_ENCODING"), (0,))
    return New(Name(f"{DCP}.metadata", "TensorProperties"), (Name("torch", dtype), layout, False, memory, False))


def index(key: Any, offsets: Any) -> New:
    """A MetadataIndex."""
    return New(Name(f"{DCP}.metadata", "MetadataIndex"), {"fqn": key, "offset": size(offsets), "index": None})


def info(path: Any, at: Any, length: Any, transform: Any = None) -> New:
    """A _StorageInfo."""
    state = {"relative_path": path, "offset": at, "length": length}
    more = {} if transform is None else {"transform_descriptors": transform}
    return New(Name(f"{DCP}.filesystem", "_StorageInfo"), state | more)


def draft() -> Draft:
    """The good checkpoint: stacked tensors in one chunk for each layer, the others whole."""
    found = Draft()
    for key, (shape, payload) in megatron().items():
        stacked = len(shape) > 1 and key.startswith("decoder.layers")
        step = len(payload) // LAYERS if stacked else len(payload)
        whole = [((0,) * len(shape), shape)]
        boxes = [((n, *(0,) * (len(shape) - 1)), (1, *shape[1:])) for n in range(LAYERS)] if stacked else whole
        chunks = [Chunk(offsets, sizes, tensor_item("bfloat16", sizes, payload[n * step : (n + 1) * step]))
                  for n, (offsets, sizes) in enumerate(boxes)]  # fmt: skip
        found.entries[key] = Entry(shape, chunks)
    return found


def arguments(**changes: Any) -> dict[str, Any]:
    """What `args` of common.pt says."""
    known = {"num_layers": LAYERS, "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "num_attention_heads": HEADS,
             "group_query_attention": True, "num_query_groups": GROUPS, "kv_channels": HEAD, "seq_length": 64,
             "max_position_embeddings": 64, "position_embedding_type": "rope", "rotary_base": 10000,
             "rotary_percent": 1.0, "swiglu": True, "add_bias_linear": False, "normalization": "RMSNorm",
             "norm_epsilon": 1e-5, "untie_embeddings_and_output_weights": True, "tensor_model_parallel_size": 1,
             "pipeline_model_parallel_size": 1, "padded_vocab_size": VOCAB}  # fmt: skip
    return known | changes


def common(**changes: Any) -> dict[str, Any]:
    """What common.pt holds."""
    args = New(Name("argparse", "Namespace"), arguments())
    known = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": {"singleton_local_shards": False},
    }
    return known | changes


def write_checkpoint(folder: Path, plan: Draft | None = None) -> None:
    """An iteration's folder, with the model's side files in `hf/`."""
    plan = plan or draft()
    (folder / "hf").mkdir(parents=True, exist_ok=True)
    write_side_files(folder / "hf")
    plan.lay()
    (folder / ".metadata").write_bytes(plan.pickle())
    for name, data in plan.files.items():
        (folder / name).write_bytes(data)
    (folder / "common.pt").write_bytes(saved(common()))
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}
    (folder / "metadata.json").write_text(json.dumps(backend))
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("0")
