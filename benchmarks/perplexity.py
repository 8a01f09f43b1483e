"""What eyes cost the embedded model's language: perplexity of a text by two homes' live versions, GPTQ weights in vLLM.

Comes in: a text file; a home that serves the plain model and one that serves the model that sees, or none, and both
are built. Goes out: JSON as `python -m train model card --perplexity` reads it. The engines run one after the other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from noria.registry import Manifest, Registry
from noria.settings import Settings
from noria.store import Store
from tests.servers import start_server
from train.models.add import Progress, make_live
from train.models.embedded.build import build_blank, build_embedded

WINDOW = 257  # tokens; of each but the text's very first, 256 are guessed from those before them in the window


def main() -> None:
    """Measures both and prints the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.perplexity", description=__doc__)
    parser.add_argument("text", type=Path, nargs="?", default=Path("docs/decisions.md"))
    parser.add_argument("--plain", type=Path, help="a home whose live version is the plain model")
    parser.add_argument("--eyes", type=Path, help="a home whose live version sees")
    parser.add_argument("--tokens", type=int, default=3000, help="how much of the text is read")
    arguments = parser.parse_args()
    text = arguments.text.read_text()
    told: dict[str, Any] = {"text": f"{arguments.text.name} (sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"}
    with tempfile.TemporaryDirectory() as scratch:
        for name, build in (("plain", build_blank), ("eyes", build_embedded)):
            home = getattr(arguments, name) or _built(Path(scratch) / name, build)
            with start_server(home) as server:
                told["tokens"], told[name] = perplexity(server.url, text, arguments.tokens)
            print(f"{name}: {told[name]:.3f}", file=sys.stderr)
    print(json.dumps(told))


def _built(home: Path, build: Callable[[Registry, Settings, Progress], Manifest]) -> Path:
    home.mkdir(parents=True)
    settings = Settings(home=home)
    with Store.open(settings.store_url) as store:
        registry = Registry(settings.models_dir, store)
        make_live(registry, build(registry, settings, lambda stage, share: None))
    return home


def perplexity(url: str, text: str, most: int) -> tuple[int, float]:
    """How many tokens were guessed, and exp of the mean of their negative log-probabilities."""
    with httpx.Client(base_url=url, timeout=600) as client:
        ids = _post(client, "/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"][:most]
        nats = count = 0.0
        for start in range(0, len(ids) - 1, WINDOW - 1):
            window = ids[start : start + WINDOW]
            asked = {"model": "noria", "prompt": window, "max_tokens": 1, "prompt_logprobs": 0, "store": False}
            found = _post(client, "/v1/completions", asked)["choices"][0]["prompt_logprobs"][1:]
            nats -= sum(one[str(token)]["logprob"] for one, token in zip(found, window[1:], strict=True))
            count += len(found)
    return int(count), math.exp(nats / count)


def _post(client: httpx.Client, path: str, body: dict[str, object]) -> Any:
    answer = client.post(path, json=body)
    answer.raise_for_status()
    return answer.json()


if __name__ == "__main__":
    main()
