"""Files inside installed packages: `pkg://PACKAGE/PATH`."""

import importlib.util
from pathlib import Path

from zofo.errors import ZofoError

PACKAGE_SCHEME = "pkg://"


def package_file(name: str) -> Path:
    """The file behind `pkg://PACKAGE/PATH`, without importing the package."""
    package, _, inner = name.removeprefix(PACKAGE_SCHEME).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ZofoError(
            f"{name} names the package {package!r}, which is not installed: pip install it (see the README)"
        )
    path = Path(spec.submodule_search_locations[0]) / inner
    if not path.exists() or ".." in Path(inner).parts:
        raise ZofoError(f"{name}: the installed package {package} has no file {inner!r}")
    return path
