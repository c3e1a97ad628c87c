"""Discovery of Java installations by the ``release`` file in their directories."""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from infra.local.state import StackError

VECTOR_MODULE: Final = "jdk.incubator.vector"
KAFKA_JAVA: Final = 17
OPENSEARCH_JAVA: Final = 21
SYSTEM_DIRECTORIES: Final = (
    (Path("/usr/lib/jvm"), "*"),
    (Path("/Library/Java/JavaVirtualMachines"), "*/Contents/Home"),
    (Path("~/.sdkman/candidates/java"), "*"),
)


@dataclass(frozen=True, slots=True)
class Java:
    """A Java installation.

    Attributes:
        home: its directory.
        version: feature version, such as 21.
        vector_module: whether it contains ``jdk.incubator.vector``, with which OpenSearch computes distances faster.
    """

    home: Path
    version: int
    vector_module: bool


def inspect(home: Path) -> Java | None:
    """The Java installation in a directory; None without one, or with an unknown version."""
    try:
        release = (home / "release").read_text(encoding="utf-8")
    except OSError:
        return None
    version = re.search(r'^JAVA_VERSION="(\d+)', release, re.MULTILINE)
    if version is None or not (home / "bin" / "java").exists():
        return None
    return Java(home, int(version[1]), VECTOR_MODULE in release)


def installed() -> Iterator[Java]:
    """All Java installations: from environment variables, then the PATH, then system directories, newest first."""
    homes = [Path(os.environ[name]) for name in ("OPENSEARCH_JAVA_HOME", "JAVA_HOME") if os.environ.get(name)]
    if on_path := shutil.which("java"):
        homes.append(Path(on_path).resolve().parent.parent)
    yield from filter(None, map(inspect, homes))
    system = [home for directory, pattern in SYSTEM_DIRECTORIES for home in directory.expanduser().glob(pattern)]
    yield from sorted(filter(None, map(inspect, system)), key=lambda java: java.version, reverse=True)


def for_kafka() -> Java:
    """The first Java installation that is new enough for Kafka.

    Raises:
        StackError: no such installation was found.
    """
    for java in installed():
        if java.version >= KAFKA_JAVA:
            return java
    raise StackError(
        f"Kafka requires Java {KAFKA_JAVA} or newer; none was found by JAVA_HOME, PATH or in system directories.\n"
        "Install one (Debian: apt-get install openjdk-17-jre-headless; macOS: brew install openjdk) or set JAVA_HOME."
    )


def for_opensearch() -> Java | None:
    """The first Java installation that is new enough for OpenSearch and has the vector module; None without one."""
    return next((java for java in installed() if java.version >= OPENSEARCH_JAVA and java.vector_module), None)
