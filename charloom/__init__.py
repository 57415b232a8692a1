"""Character-level language models with small recurrent networks: train, sample, serve.

    import charloom
    model = charloom.load("models/demo")
    model.generate("The ", max_tokens=200, temperature=0.8, seed=7).text

Names are imported when first used, so that `import charloom` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from charloom.errors import CharloomError
    from charloom.model import Generation, Model, Stream, load
    from charloom.params import SamplingParams

    __version__: str

__all__ = [
    "CharloomError",
    "Generation",
    "Model",
    "SamplingParams",
    "Stream",
    "__version__",
    "load",
]

_HOMES = {
    "CharloomError": "charloom.errors",
    "Generation": "charloom.model",
    "Model": "charloom.model",
    "SamplingParams": "charloom.params",
    "Stream": "charloom.model",
    "load": "charloom.model",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _installed_version()
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'charloom' has no attribute {name!r}")
    globals()[name] = value
    return value


def _installed_version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # slow, and seldom needed

    try:
        return version("charloom")
    except PackageNotFoundError:
        return "0+uninstalled"  # a checkout on the path, which has no metadata


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
