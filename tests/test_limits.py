"""Memory stays within bounds that the system enforces, whatever the size of the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import EXAMPLE, succeed, transcode, tree

SYNTHETIC = Path(__file__).parent.parent / "benchmarks" / "synthetic.py"
SIZES = {"layers": 6, "hidden": 1024, "ffn": 4096, "heads": 16, "kv-heads": 8, "vocabulary": 32000, "shard-mb": 90}
LIMIT = 110 << 20  # bytes of private memory: the interpreter, NumPy, thread stacks and --memory 32MiB
BELOW = "import resource\nresource.setrlimit(resource.RLIMIT_DATA, ({0}, {0}))"

NO_THREAD = """
import threading
def start(thread):
    raise RuntimeError("can't start new thread")
threading.Thread.start = start
"""
NO_MEMORY = """
import transcoder.engine as engine
def converted(*arguments):
    raise MemoryError
engine.converted = converted
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 300 MB."""
    folder = tmp_path_factory.mktemp("source") / "model"
    options = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
    subprocess.run([sys.executable, SYNTHETIC, folder, *options], check=True, capture_output=True, timeout=60)
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) > 2 * LIMIT
    return folder


def test_a_model_larger_than_the_memory_goes_there_and_back(tmp_path: Path, source: Path) -> None:
    driver, size = BELOW.format(LIMIT), ("--memory", "32MiB", "--no-sync")
    done = transcode("hf2mcore", source, tmp_path / "m", "--tp", 2, "--pp", 2, *size, driver=driver)
    assert done.code == 0, done.err
    done = transcode("mcore2hf", tmp_path / "m", tmp_path / "hf", *size, driver=driver)
    assert done.code == 0, done.err
    assert tree(tmp_path / "hf") == tree(source)


@pytest.mark.parametrize("driver", [NO_THREAD, NO_MEMORY])
def test_too_little_memory_is_four_and_leaves_nothing_visible(tmp_path: Path, driver: str) -> None:
    done = transcode("hf2mcore", EXAMPLE, tmp_path / "m", driver=driver)
    assert (done.code, "out of memory" in done.err, "Traceback" in done.err) == (4, True, False), done.err
    assert not (tmp_path / "m").exists()
    succeed("hf2mcore", EXAMPLE, tmp_path / "m", "--resume")
