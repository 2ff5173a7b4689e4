"""The installed package, the type checkers and the folders agree, and every file stays readable."""

import ast
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("compiler", "calib", "backends")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MAX_LINES = 350

each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))


@pytest.fixture(scope="module")
def setuptools_table() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_listed_packages_are_the_folders_with_source(setuptools_table):
    folders = {".".join(("dfqc", *path.parent.relative_to(ROOT).parts)) for path in SOURCES}
    assert sorted(setuptools_table["packages"]) == sorted(folders)


def test_mapping_covers_every_top_level_folder(setuptools_table):
    assert setuptools_table["package-dir"] == {f"dfqc.{folder}": folder for folder in FOLDERS}


@pytest.mark.parametrize("folder", FOLDERS)
def test_type_checkers_see_the_source(folder):
    link = ROOT / ".typing" / "dfqc" / folder
    assert link.resolve() == ROOT / folder
    assert link.is_symlink()
    assert not link.readlink().is_absolute(), "an absolute link is broken in the next clone"


@pytest.mark.parametrize("folder", FOLDERS)
def test_types_are_published(folder):
    assert (ROOT / folder / "py.typed").is_file()


def test_every_package_folder_has_an_init():
    assert [str(p.parent) for p in SOURCES if not (p.parent / "__init__.py").exists()] == []


@each_source
def test_source_is_short_enough_to_read_in_one_go(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{path.relative_to(ROOT)} has {lines} lines: split it"


@each_source
def test_source_opens_with_what_comes_in_and_goes_out(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
