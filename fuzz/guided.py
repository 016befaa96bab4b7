"""One target under atheris: `python -m fuzz.guided NAME SECONDS FOLDER`, which keeps what it learns in FOLDER."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["transcoder"]):
    from fuzz import judge
    from fuzz.targets import TARGETS

MAX_LENGTH = 1 << 15  # bytes of an input


class Session:
    """Runs inputs, writes down each kind of finding once and goes on."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.target = name, folder, TARGETS[name]
        self.seeds = [path.read_bytes() for path in judge.corpus(name)]
        self.seen: set[str] = set()
        self.counts: Counter[str] = Counter()

    def run(self, data: bytes) -> None:
        """One input."""
        kind, text = judge.judged(self.target, data)
        self.counts[kind] += 1
        if sum(self.counts.values()) % 500 == 0:
            print(f"OUTCOMES {dict(self.counts)}", flush=True)
        if text and judge.signature(text) not in self.seen:
            self.seen.add(judge.signature(text))
            self.keep(data, text)

    def keep(self, data: bytes, text: str) -> None:
        """Write the smallest input found with the same signature, and say so."""
        kind = judge.signature(text)
        small = judge.smallest(self.target, data)
        name = f"{self.name}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}"
        (self.folder / "findings").mkdir(exist_ok=True)
        (self.folder / "findings" / name).write_bytes(small)
        print(f"FINDING {name} ({len(small)} bytes): {judge.finding(self.target, small)}", flush=True)

    def mutate(self, data: bytes, limit: int, seed: int) -> bytes:
        """libFuzzer's own edits and ours, most of them repaired so that they pass the first checks.

        One in three starts from a kept input: what libFuzzer learns is mostly damaged already.
        """
        rng = Random(seed)
        data = rng.choice(self.seeds) if rng.random() < 0.35 else data
        data = bytes(atheris.Mutate(data, limit)) if rng.random() < 0.3 else self.edited(rng, data)
        return (self.target.repair(data) if rng.random() < 0.85 else data)[:limit]

    def edited(self, rng: Random, data: bytes) -> bytes:
        """Our own edit, where the input is of its kind."""
        try:
            return self.target.edit(rng, data)
        except Exception:
            return bytes(atheris.Mutate(data, MAX_LENGTH))


def main(name: str, seconds: str, folder: str) -> None:
    """Fuzz until the time is over; libFuzzer ends the process."""
    learned = Path(folder) / "learned" / name
    learned.mkdir(parents=True, exist_ok=True)
    limits = [
        f"-max_total_time={seconds}",
        f"-max_len={MAX_LENGTH}",
        "-timeout=60",
        "-rss_limit_mb=3000",
        "-reduce_inputs=0",
    ]
    session = Session(name, Path(folder))
    arguments = [
        "fuzz",
        str(learned),
        str(judge.CORPUS / name),
        *limits,
        "-print_final_stats=1",
        "-len_control=0",
        "-mutate_depth=2",
    ]
    atheris.Setup(arguments, session.run, custom_mutator=session.mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
