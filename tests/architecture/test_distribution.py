"""The wheel contains all files of the packages, and the lock satisfies the declared dependencies."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PACKAGES = ("freshline", "ingest", "query", "streams", "schemas", "infra")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def files_of(package: str) -> set[str]:
    deploy = ROOT / "infra" / "deploy"
    found = (file for file in (ROOT / package).rglob("*") if file.is_file() and deploy not in file.parents)
    return {file.relative_to(ROOT).as_posix() for file in found if "__pycache__" not in file.parts}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> set[str]:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [built] = folder.glob("freshline-*.whl")
    with zipfile.ZipFile(built) as opened:
        return set(opened.namelist())


def test_the_wheel_contains_exactly_the_files_of_the_packages(wheel):
    content = {name for name in wheel if ".dist-info/" not in name}
    assert content == set().union(*map(files_of, PACKAGES))


@pytest.mark.parametrize(
    "name", ["infra/local/pom.xml", "infra/local/checksums.sha256", "query/api/console.html", "streams/py.typed"]
)
def test_the_wheel_contains_data_files(wheel, name):
    assert name in wheel


@pytest.mark.parametrize(
    "requirement", [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]], ids=lambda text: text
)
def test_the_lock_satisfies(requirement):
    wanted = Requirement(requirement)
    locked = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    versions = [version for name, version in locked if normal(name) == normal(wanted.name)]
    assert versions, f"{wanted.name} is not locked: run `make lock`"
    assert all(version in wanted.specifier for version in versions), "run `make lock`"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
