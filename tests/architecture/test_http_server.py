"""The parts of uvicorn that our HTTP protocol overrides are unchanged since the override was written."""

import hashlib
import inspect
import tomllib
from pathlib import Path

import pytest
import uvicorn
from packaging.requirements import Requirement
from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.http.flow_control import FlowControl

ROOT = Path(__file__).parents[2]
OVERRIDDEN = {
    httptools_impl: "1d4e1c579df41684",
    FlowControl: "126debcdaa894c83",
    uvicorn.Server: "06e799f7c58f8be6",
}


@pytest.mark.parametrize("part", OVERRIDDEN, ids=lambda part: part.__name__)
def test_overridden_parts_of_uvicorn_are_unchanged(part):
    current = hashlib.sha256(inspect.getsource(part).encode()).hexdigest()[:16]
    assert current == OVERRIDDEN[part], (
        f"{part.__name__} of uvicorn {uvicorn.__version__} differs from the one that http_protocol.py, "
        f"inline_responder.py and server.py of infra/web override: compare them, run "
        f"tests/property/test_http_protocol.py, then set {current}"
    )


@pytest.mark.parametrize("name", ["uvicorn", "httptools"])
def test_packages_with_overridden_parts_are_pinned(name):
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    [wanted] = [one for one in map(Requirement, listed) if one.name == name]
    assert [one.operator for one in wanted.specifier] == ["=="], f"pin {name}: infra/web overrides its internals"
