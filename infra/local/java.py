"""Which Java runs what.

A JDK is judged by the ``release`` file in its directory, so nothing needs to be started to find one.
"""

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
SYSTEM_PLACES: Final = (
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
        vector_module: whether ``jdk.incubator.vector`` is in it; OpenSearch computes distances faster with it.
    """

    home: Path
    version: int
    vector_module: bool


def inspect(home: Path) -> Java | None:
    """The Java in a directory, None if there is none that says its version."""
    try:
        release = (home / "release").read_text(encoding="utf-8")
    except OSError:
        return None
    version = re.search(r'^JAVA_VERSION="(\d+)', release, re.MULTILINE)
    if version is None or not (home / "bin" / "java").exists():
        return None
    return Java(home, int(version[1]), VECTOR_MODULE in release)


def installed() -> Iterator[Java]:
    """Every Java found: those named by the environment, then the PATH's, then the system's from the newest."""
    homes = [Path(os.environ[name]) for name in ("OPENSEARCH_JAVA_HOME", "JAVA_HOME") if os.environ.get(name)]
    if on_path := shutil.which("java"):
        homes.append(Path(on_path).resolve().parent.parent)
    yield from filter(None, map(inspect, homes))
    places = [home for place, pattern in SYSTEM_PLACES for home in place.expanduser().glob(pattern)]
    yield from sorted(filter(None, map(inspect, places)), key=lambda java: java.version, reverse=True)


def for_kafka() -> Java:
    """The first Java new enough for Kafka.

    Raises:
        StackError: there is none.
    """
    for java in installed():
        if java.version >= KAFKA_JAVA:
            return java
    raise StackError(
        f"Kafka needs Java {KAFKA_JAVA} or newer and none was found through JAVA_HOME, PATH or the system's folders.\n"
        "Install one (Debian: apt-get install openjdk-17-jre-headless; macOS: brew install openjdk) or set JAVA_HOME."
    )


def for_opensearch() -> Java | None:
    """The first Java new enough for OpenSearch that has the vector module, None where there is none."""
    return next((java for java in installed() if java.version >= OPENSEARCH_JAVA and java.vector_module), None)
