"""What an installation holds."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_is_listed() -> None:
    """An editable installation finds packages that a wheel would lack."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for file in (ROOT / "fmupsample").rglob("__init__.py")
    }
    assert found == {name for name in listed if name.split(".")[0] == "fmupsample"}
