"""Where a case works: the attacked folder, files of somebody else, and the place of the result."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attacks.checkpoint import Draft, write_checkpoint
from attacks.model import SECRET, write_model


@dataclass(frozen=True)
class Bench:
    """Where a case works: `source` is attacked, `outside` must not be touched, `out` is where the result goes."""

    place: Path

    @property
    def source(self) -> Path:
        """The attacked model or checkpoint, with its tracker."""
        return self.place / "source"

    @property
    def folder(self) -> Path:
        """The iteration's folder of the attacked checkpoint."""
        return self.source / "iter_0000000"

    @property
    def first(self) -> Path:
        """The first shard of the attacked model."""
        return self.source / "model-00001-of-00002.safetensors"

    @property
    def second(self) -> Path:
        """The other one."""
        return self.source / "model-00002-of-00002.safetensors"

    @property
    def outside(self) -> Path:
        """Files of somebody else."""
        return self.place / "outside"

    @property
    def stranger(self) -> Path:
        """A good model of somebody else, made when it is first asked for."""
        if not (self.outside / "model").exists():
            write_model(self.outside / "model")
        return self.outside / "model"

    @property
    def out(self) -> Path:
        """The destination's parent."""
        return self.place / "out"

    def rewrite(self, plan: Draft) -> None:
        """Replace the attacked checkpoint."""
        shutil.rmtree(self.folder)
        write_checkpoint(self.folder, plan)

    def config(self, **changes: Any) -> None:
        """Change the attacked model's configuration; None stays None, `...` removes a field."""
        path = self.source / "config.json"
        rows = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in rows.items() if value is not ...}))


def open_bench(place: Path, base: Path) -> Bench:
    """A copy of a good folder, and the neighbours of every case."""
    bench = Bench(place)
    shutil.copytree(base, bench.source, symlinks=True)
    bench.outside.mkdir()
    bench.out.mkdir()
    (bench.outside / "secret.txt").write_bytes(SECRET)
    return bench
