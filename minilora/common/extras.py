"""Optional packages: errors that name the command that installs a missing one.

Each extra of pyproject.toml that the library imports is listed here with its packages. A function
that needs one calls `require` before it imports the package. minilora is not on PyPI, so the
command installs the extra from the folder of the source code.
"""

from importlib.util import find_spec

EXTRAS = {  # extra of pyproject.toml -> its packages, by the names that are imported
    "gguf": ("gguf",),
    "data": ("pyarrow",),
    "plot": ("matplotlib",),
    "track": ("tensorboard", "trackio", "wandb"),
    "sweep": ("optuna",),
    "serve": ("fastapi", "uvicorn"),
    "structured": ("llguidance",),
    "test": ("bitsandbytes",),  # read by verify and by adapters on layers of bitsandbytes
}


def require(purpose: str, *packages: str) -> None:
    """Raise an error if an optional package is not installed.

    Args:
        purpose: What the packages are needed for, as the start of the error's sentence.
        *packages: Names of packages in EXTRAS, all of one extra.

    Raises:
        ImportError: A package is not installed. The error names the command that installs it.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if not missing:
        return
    extra = next(extra for extra, members in EXTRAS.items() if missing[0] in members)
    raise ImportError(
        f"{purpose} needs {' and '.join(missing)}, which this Python does not have: run "
        f"pip install -e '.[{extra}]' in the folder of minilora's source code, or "
        f"pip install {' '.join(missing)}."
    )
