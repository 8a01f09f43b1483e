"""Lets a torchvision, torchaudio and torchcodec that were built for CUDA stand beside a CPU build of torch.

Comes in: the moment at which somebody imports one of them. Goes out: what its missing C extension leaves open, or
nothing at all where the package is sound. Must not import torch, nor anything beside the standard library, when it is
loaded: it runs at the end of every `import torch`.

The registry's wheels of the three link CUDA, so beside a CPU torch their C extensions do not load:
- torchvision swallows that and then fails with "operator torchvision::nms does not exist"; it gets the two schemas.
- torchaudio raises the loader's error; it is told that there is no extension, which it knows how to live with.
- torchcodec raises the loader's OSError, which vLLM does not expect of an import; it becomes an ImportError.
Each failure would take nearly every VLM processor of transformers, or the whole of vLLM, with it, and the tensor code
that these use needs no extension.

It reaches every process through the entry point group `torch.backends`, which torch itself loads when it is imported:
vLLM's spawned engine and its model-inspection subprocess import torchvision before vLLM reads any plugin of its own.
TORCH_DEVICE_BACKEND_AUTOLOAD=0 switches that group off; `install()` can then be called by hand.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

Run = Callable[[ModuleType], None]

VISION = "torchvision"
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[Any] = []  # torch drops a library's schemas when its object dies


def install() -> None:
    """Puts the repair in front of the next import of the three packages. Cheap, and safe to call more than once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    started = sys.modules.get(VISION)
    if started is not None and not hasattr(started, "extension"):
        _define_missing()  # torchvision's first line imports torch, whose last lines called us: this is the moment


def status() -> dict[str, Any]:
    """`{"needed", "active", "detail"}`: whether this installation needs the repair, and whether it works here.

    Imports torch and torchvision.
    """
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec(VISION) is None:
        return {"needed": False, "active": False, "detail": "torch or torchvision is not installed"}
    why = _unloadable()
    try:
        importlib.import_module(VISION)
    except (ImportError, OSError, RuntimeError) as error:
        return {"needed": why is not None, "active": False, "detail": f"torchvision cannot be imported: {error}"}
    if why is None:
        return {"needed": False, "active": False, "detail": "torchvision and torch fit together"}
    detail = f"torchvision's C extension does not load ({why}); two schemas stand in, its tensor transforms work"
    return {"needed": True, "active": bool(_libraries), "detail": detail}


class _Finder(MetaPathFinder):
    """Finds the modules to repair where Python would, and has the repair run beside their own code."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The usual spec with the loader wrapped; None for every other module."""
        repair = _REPAIRS.get(fullname)
        if repair is None:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, repair)
        return spec


class _Loader(Loader):
    """A module's own loader, with a repair that is handed the step "run the module's code"."""

    def __init__(self, inner: Any, repair: Callable[[ModuleType, Run], None]) -> None:
        self._inner = inner
        self._repair = repair

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the inner loader does."""
        module: ModuleType | None = self._inner.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Runs the module's code, repaired."""
        self._repair(module, self._inner.exec_module)

    def __getattr__(self, name: str) -> Any:
        """Everything else (sources, resources, path) is the inner loader's."""
        return getattr(self._inner, name)


def _define_schemas(module: ModuleType, run: Run) -> None:
    """torchvision: its own code registers fake kernels for `nms` and `qnms`, so the schemas must be there before."""
    _define_missing()
    run(module)


def _define_missing() -> None:
    if not _libraries and _unloadable() is not None:
        library = importlib.import_module("torch").library.Library(VISION, "FRAGMENT")
        for schema in SCHEMAS:
            library.define(schema)
        _libraries.append(library)


def _forgive_missing_extension(module: ModuleType, run: Run) -> None:
    """torchaudio: an extension that does not load counts as one that is not there."""
    run(module)
    load: Callable[[str], bool] = vars(module)["_load_lib"]

    def load_or_say_no(lib: str) -> bool:
        try:
            return load(lib)
        except OSError:
            if _cpu_only():
                return False
            raise

    vars(module)["_load_lib"] = load_or_say_no


def _raise_import_error(module: ModuleType, run: Run) -> None:
    """torchcodec: those who can do without it catch ImportError."""
    try:
        run(module)
    except OSError as error:
        if _cpu_only():
            raise ImportError(f"{module.__name__} does not load beside a CPU build of torch: {error}") from error
        raise


_REPAIRS: dict[str, Callable[[ModuleType, Run], None]] = {
    VISION: _define_schemas,
    "torchaudio._extension.utils": _forgive_missing_extension,  # the module with the function that loads its extension
    "torchcodec": _raise_import_error,
}


def _cpu_only() -> bool:
    """Whether torch is a CPU build. With a CUDA torch a package that does not load is an error, not ours to hide."""
    version = importlib.import_module("torch").version
    return version.cuda is None and version.hip is None


def _unloadable() -> str | None:
    """Why torchvision's C extension does not load beside a CPU torch; None when it does, or when torch has CUDA."""
    spec = PathFinder.find_spec(VISION)
    if spec is None or not _cpu_only():
        return None
    extension = PathFinder.find_spec("_C", spec.submodule_search_locations)
    if extension is None or extension.origin is None:
        return "it has none"
    try:
        importlib.import_module("torch").ops.load_library(extension.origin)
    except OSError as error:
        return str(error.__cause__ or error)
    return None
