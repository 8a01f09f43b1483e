"""What every test may use: a quiet environment, the torchvision repair, a free port, the tiny model.

Goes out: fixtures `free_port` and `tiny_vlm`. The environment is set before anything imports torch or vLLM.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from noria import repair
from tests.postgres import programs

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
repair.install()


def pytest_report_header() -> str:
    """Says which databases the store's suite runs on, so that a run without PostgreSQL is seen to be one."""
    found = programs()
    return f"store: sqlite and postgresql ({found})" if found else "store: sqlite only; no PostgreSQL server programs"


@pytest.fixture
def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random LLaVA checkpoint that transformers, vLLM and gptqmodel load."""
    from tests.tiny import build_tiny_vlm

    return build_tiny_vlm(tmp_path_factory.mktemp("tiny") / "vlm")
