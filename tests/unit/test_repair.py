"""The torchvision repair: needed processes work with it and fail without it; a sound torchvision is left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

IMPORT_PROCESSOR = """
import json, sys
result = {}
try:
    from transformers import LlavaProcessor
    result["processor"] = LlavaProcessor.__name__
except Exception as error:
    while error.__cause__ is not None:  # transformers hides the reason under its own ModuleNotFoundError
        error = error.__cause__
    result["error"] = f"{type(error).__name__}: {error}"
repair = sys.modules.get("noria.repair")
result["registered"] = bool(repair and repair._libraries)
print("RESULT " + json.dumps(result))
"""


def run(code: str, *, autoload: bool) -> dict[str, Any]:
    """Runs code in a fresh interpreter, with or without torch's autoload group; the object it prints as RESULT."""
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "1" if autoload else "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == 1, done.stderr
    result: dict[str, Any] = json.loads(lines[0].removeprefix("RESULT "))
    return result


@pytest.fixture(scope="module")
def needed() -> bool:
    """Whether this machine's torchvision is broken, asked of torchvision itself, without the repair."""
    code = (
        "import json\n"
        "try:\n    import torchvision; broken = False\n"
        "except (RuntimeError, OSError): broken = True\n"
        "print('RESULT ' + json.dumps({'broken': broken}))"
    )
    return bool(run(code, autoload=False)["broken"])


def test_a_processor_imports_with_the_repair(needed: bool) -> None:
    result = run(IMPORT_PROCESSOR, autoload=True)
    assert result == {"processor": "LlavaProcessor", "registered": needed}


def test_torchvision_may_come_before_torch(needed: bool) -> None:
    """Its own first line then imports torch, and the repair arrives in the middle of the import."""
    code = (
        "import json, torchvision, sys\n"
        "print('RESULT ' + json.dumps({'registered': bool(sys.modules['noria.repair']._libraries)}))"
    )
    assert run(code, autoload=True) == {"registered": needed}


def test_without_the_repair_it_fails_exactly_where_torchvision_is_broken(needed: bool) -> None:
    result = run(IMPORT_PROCESSOR, autoload=False)
    assert result["registered"] is False
    if needed:
        assert "torchvision::nms" in result["error"]
        assert "processor" not in result
    else:
        assert result["processor"] == "LlavaProcessor"


def test_status_says_what_was_found(needed: bool) -> None:
    code = "import json\nfrom noria import repair\nprint('RESULT ' + json.dumps(repair.status()))"
    status = run(code, autoload=True)
    assert (status["needed"], status["active"]) == (needed, needed)
    assert ("C extension does not load" in status["detail"]) is needed


def test_it_reaches_what_vllm_starts() -> None:
    """vLLM's model inspection and its spawned engine begin with these imports, before any plugin of vLLM is read."""
    code = (
        "import sys, json\n"
        "import vllm.model_executor.models.registry, vllm.v1.engine.core\n"
        "print('RESULT ' + json.dumps({'torchvision': 'torchvision' in sys.modules}))"
    )
    assert run(code, autoload=True) == {"torchvision": True}


def test_the_transforms_work_and_the_operators_are_not_faked(needed: bool) -> None:
    code = (
        "import json, torch\n"
        "from torchvision.ops import nms\n"
        "from torchvision.transforms.v2 import functional as F\n"
        "image = F.resize(torch.arange(3 * 8 * 8, dtype=torch.float32).reshape(3, 8, 8), [4, 4])\n"
        "try:\n    kept = nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([0.5]), 0.5).tolist()\n"
        "except (NotImplementedError, RuntimeError):\n    kept = None\n"
        "print('RESULT ' + json.dumps({'shape': list(image.shape), 'kept': kept}))"
    )
    assert run(code, autoload=True) == {"shape": [3, 4, 4], "kept": None if needed else [0]}


def test_loading_the_repair_imports_nothing_heavy() -> None:
    code = (
        "import sys, json\n"
        "from noria import repair\n"
        "repair.install(); repair.install()\n"
        "finders = [f for f in sys.meta_path if type(f).__module__ == 'noria.repair']\n"
        "heavy = sorted({'torch', 'torchvision', 'transformers', 'pydantic'} & set(sys.modules))\n"
        "print('RESULT ' + json.dumps({'finders': len(finders), 'heavy': heavy}))"
    )
    assert run(code, autoload=True) == {"finders": 1, "heavy": []}
