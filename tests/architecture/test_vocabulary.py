"""Retired terms and vague module names are absent from code, tests and documentation.

The terms and their replacements are the rows of "Retired terms" in docs/glossary.md; this module adds the forms
in which each term is recognised. Names are split into words first: ``told_waiting`` and ``ToldWaiting`` both contain
*told*.

    python tests/architecture/test_vocabulary.py [path...]

lists the uses below the paths, or of the whole project, and exits with 1 if there are any.
"""

import io
import re
import sys
import tokenize
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GLOSSARY = "docs/glossary.md"
FOLDERS = ("freshline", "ingest", "query", "streams", "schemas", "infra", "bench", "chaos", "tests", "docs", "ci")
SUFFIXES = {".py", ".md", ".lua", ".js", ".html", ".toml", ".yml", ".yaml", ".json", ".java", ""}
NOT_READ = {
    "CHANGELOG.md": "names what was renamed",
    "LICENSE": "not ours",
    "tests/architecture/test_vocabulary.py": "contains the terms",
}


@dataclass(frozen=True)
class Forms:
    """How a retired term is recognised: regular expressions of lower-case words, separated by one space.

    Attributes:
        text: matches anywhere, in names and in prose.
        name: matches in names of Python code and keys of JSON only, for words that prose may use.
    """

    text: str = ""
    name: str = ""


FORMS = {
    "hit share": Forms(r"hit shares?"),
    "late answers": Forms(r"late answers?|answers? (?:is|are|was|were) late"),
    "past the objective": Forms(r"past the objective|past objective"),
    "behind": Forms(
        r"(?:is|are|was|were|be|been|falls?|fell|falling|far|too far) behind(?= ?[.,;:)]| by| on|$)", name=r"behind"
    ),
    "left aside": Forms(r"(?:left|leaves?|leaving) aside"),
    "look again": Forms(r"look(?:s|ed|ing)? again"),
    "look": Forms(r"(?:one|a|no|each|every|another|shared|first|second|last|next) looks?", name=r"looks?(?! up)"),
    "tells": Forms(r"tells?|telling"),
    "says": Forms(r"says|said"),
    "knows": Forms(r"knows|knew"),
    "hears": Forms(r"hears?|hearing"),
    "stands": Forms(r"stands?(?! for| alone| ins?\b)|stood"),
    "lies": Forms(r"lies|lain"),
    "comes": Forms(r"comes(?! from| with)"),
    "goes": Forms(r"goes"),
    "Standing": Forms(r"standing"),
    "Standings": Forms(r"standings"),
    "SharedLook": Forms(r"shared looks?"),
    "told": Forms(r"told"),
    "heard": Forms(r"heard"),
    "proof": Forms(name=r"proofs?"),
    "HitPath": Forms(r"hit ?paths?"),
    "at once": Forms(name=r"(?<!\w )at once"),
    "line": Forms(r"(?:waits?|waiting|stands?|wait their turn) in (?:a |the )?line"),
    "refused": Forms(
        r"refused (?:questions?|misses)|(?:questions?|miss|misses) (?:(?:that )?(?:is|are|was|were) )?refused"
    ),
    "overtaken": Forms(r"overtak(?:en|es?|ing)|overtook"),
    "refill": Forms(r"refill(?:s|ed|ing)?"),
    "letter": Forms(r"(?<!dead )letters?(?! spacing)"),
    "parked": Forms(r"park(?:ed|s)?"),
    "News": Forms(r"news"),
    "Lexicon": Forms(r"lexicons?"),
    "Mentions": Forms(name=r"mentions"),
    "Courier": Forms(r"couriers?"),
    "Redelivery": Forms(r"(?:class|webhooks?) redeliver(?:y|ies)|redeliver(?:y|ies) of webhooks"),
    "Placing": Forms(name=r"placing"),
    "place again": Forms(r"plac(?:e|es|ed|ing) again"),
    "judge": Forms(r"judge[sd]?|judging"),
    "settle": Forms(r"settl(?:e[sd]?|ing)"),
    "doomed": Forms(r"doom(?:s|ed)?"),
    "leg": Forms(r"legs?"),
    "window": Forms(
        r"(?:vector|lexical|leg's|retriever's|candidate|fused|full) windows?"
        r"|windows? of (?:a|each|the|both) (?:leg|retriever)s?|search \. window",
        name=r"windows",
    ),
    "places": Forms(
        r"(?:\d+|eighty|fifty|ten|two|best|their|all|in|of|its) places(?! where)|places of",
        name=r"places|place of|of place",
    ),
    "announcement": Forms(r"announc(?:ements?|e|es|ed|ing)"),
    "siblings": Forms(r"siblings?"),
    "rehearsal": Forms(r"rehears(?:als?|e[sd]?|ing)"),
    "written anew": Forms(r"writ(?:es?|ten|ing) anew"),
    "anew": Forms(r"anew"),
    "filled again": Forms(r"fill(?:s|ed|ing)? again"),
    "mend": Forms(r"mend(?:s|ed|ing)?"),
    "what was lost": Forms(r"what (?:was|is|were) lost"),
    "it costs": Forms(r"(?:what )?it costs"),
    "for ever": Forms(r"for ever"),
    "somebody": Forms(r"somebody|anybody|everybody"),
    "nobody": Forms(r"nobody"),
    "whoever": Forms(r"whoever|whomever"),
}
"""Forms of each term of the glossary's table."""

NEEDS_A_READER = {"full": "no pattern separates a full queue from full text or a full disk"}


@dataclass(frozen=True)
class Allowed:
    """An ordinary or foreign use of a retired word.

    Attributes:
        term: the retired term.
        around: regular expression of the words around it; the match must contain the word.
        where: prefix of the paths in which it is allowed.
    """

    term: str
    around: str
    reason: str
    where: str = ""


ALLOWED = (
    Allowed(
        "letter",
        r"(?:capital|upper case|lower case|small|single) letters?|letters?(?:,| and| or) (?:digits?|marks?|numbers?)",
        "of an alphabet",
    ),
    Allowed("letter", r"letters?", "of an alphabet", where="streams/parsing/charsets.py"),
    Allowed("tells", r"t tell than", "a stop word", where="infra/generation/sentences.py"),
    Allowed("nobody", r"nobody", "a user of the system", where="infra/local/servers.py"),
)


@dataclass(frozen=True)
class Use:
    path: str
    line: int
    found: str
    use: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.found} → {self.use}"


def retired(glossary: str) -> dict[str, str]:
    """Replacement of each retired term, from the text of the glossary."""
    found = {}
    for row in re.findall(r"^\|(.+)\|$", glossary.partition("## Retired terms")[2], re.MULTILINE)[2:]:
        terms, use = (cell.strip() for cell in row.split("|"))
        for term in re.split(r"[,;]\s*", re.sub(r"\s*\([^)]*\)|`", "", terms)):
            found[term] = use.replace("`", "")
    return found


class Vocabulary:
    """Finds retired terms in text."""

    def __init__(self, replacements: dict[str, str], allowed: Sequence[Allowed] = ALLOWED) -> None:
        self._replacements = replacements
        self._terms = [term for term in FORMS if term in replacements]
        self._anywhere = _any_of([FORMS[term].text for term in self._terms])
        self._in_names = _any_of([FORMS[term].name for term in self._terms])
        self._allowed = [(one, re.compile(rf"\b(?:{one.around})\b")) for one in allowed]
        self.needed: set[Allowed] = set()
        """Entries of the list of allowed uses that have matched."""

    def check(self, path: str, content: str) -> list[Use]:
        """Uses of retired terms in a file, by line; one per line and word."""
        prose, names = _parts(path, content)
        found = {}
        for lines, pattern in ((prose, self._anywhere), (names, self._in_names)):
            text, starts = _joined(lines)
            for match in pattern.finditer(text):
                term = self._terms[int(str(match.lastgroup)[1:])]
                if not self._is_allowed(term, path, text, match):
                    line, words = lines[bisect_right(starts, match.start()) - 1][0], match.group()
                    found[line, words] = Use(path, line, words, self._replacements[term])
        return [found[key] for key in sorted(found)]

    def _is_allowed(self, term: str, path: str, text: str, match: re.Match[str]) -> bool:
        first = max(match.start() - 80, 0)
        around = text[first : match.end() + 80]
        for one, pattern in self._allowed:
            if one.term == term and path.startswith(one.where):
                for context in pattern.finditer(around):
                    if context.start() + first <= match.start() and match.end() <= context.end() + first:
                        self.needed.add(one)
                        return True
        return False


def _any_of(forms: Sequence[str]) -> re.Pattern[str]:
    """Matches whole words; the group that matches is named by the index of its form."""
    groups = "|".join(f"(?P<n{number}>{form})" for number, form in enumerate(forms) if form)
    return re.compile(rf"(?<![\w'])(?:{groups})(?!\w)")


Lines = list[tuple[int, str]]


def _parts(path: str, content: str) -> tuple[Lines, Lines]:
    """What is read of a file, in lines: all of it, and its names. The first line of all is its path."""
    lines = content.splitlines()
    names: Lines = []
    if path.endswith(".py"):
        lines, names = _python(lines, content, sample_texts=path.startswith("tests/"))
    elif path.endswith(".json"):
        names = [(n, key) for n, line in enumerate(lines, 1) for key in re.findall(r'"(\w+)":', line)]
    elif path == GLOSSARY:
        lines = content.partition("## Retired terms")[0].splitlines()
    names = [(n, f"{name} ;") for n, name in [(1, Path(path).stem), *names]]  # No form matches across two names.
    return [(1, path), *enumerate(lines, 1)], names


def _python(lines: list[str], content: str, *, sample_texts: bool) -> tuple[list[str], Lines]:
    """Lines and names of a module. Strings of tests other than docstrings are sample texts, and are blanked."""
    lines, names, starts_statement = list(lines), [], True
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type == tokenize.NAME:
            names.append((token.start[0], token.string))
        if token.type == tokenize.STRING and sample_texts and not starts_statement:
            (first, start), (last, end) = token.start, token.end
            for n in range(first, last + 1):
                line = lines[n - 1]
                left, right = (start if n == first else 0), (end if n == last else len(line))
                lines[n - 1] = line[:left] + '"' * (right - left) + line[right:]
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            starts_statement = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    return lines, names


def _joined(lines: Lines) -> tuple[str, list[int]]:
    """The lines as words in one text, and where each of them starts: a sentence may continue on the next line."""
    text, starts = [], []
    at = 0
    for _, line in lines:
        words = line.replace("\u2019", "'")
        words = re.sub(r"^\s*(?:#:?|//|--|\*|>)\s", "", words)
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", words)
        words = re.sub(r"(?<=\w)[_-]+(?=\w)|\b_+|_+\b|\*\*|`", " ", words)
        words = re.sub(r"(?<=\w)\.(?=\w)", " . ", words)
        words = " ".join(words.lower().split()) + " "
        starts.append(at)
        text.append(words)
        at += len(words)
    return "".join(text), starts


def files(root: Path) -> Iterator[Path]:
    yield from (file for file in root.iterdir() if file.is_file())
    for folder in FOLDERS:
        yield from (root / folder).rglob("*")


def uses(root: Path, vocabulary: Vocabulary, below: Sequence[str] = ("",)) -> list[Use]:
    """Uses of retired terms in the files of the project whose paths begin with one of those in ``below``."""
    found = []
    for file in sorted(files(root)):
        path = file.relative_to(root).as_posix()
        hidden = any(part.startswith((".", "__pycache__")) for part in Path(path).parts)
        is_text = file.is_file() and file.suffix in SUFFIXES and not hidden
        if is_text and path not in NOT_READ and path.startswith(tuple(below)):
            found += vocabulary.check(path, file.read_text(encoding="utf-8"))
    return found


def vocabulary(root: Path = ROOT) -> Vocabulary:
    return Vocabulary(retired((root / GLOSSARY).read_text(encoding="utf-8")))


def test_no_retired_term_is_used():
    current = vocabulary()
    found = [str(one) for one in uses(ROOT, current)]
    assert not found, "\n".join(found)
    assert [one for one in ALLOWED if one not in current.needed] == []


def test_every_retired_term_of_the_glossary_is_recognised():
    terms = retired((ROOT / GLOSSARY).read_text(encoding="utf-8"))
    assert len(terms) > 40
    assert set(terms) == FORMS.keys() | NEEDS_A_READER.keys()


def test_no_module_has_a_vague_name():
    vague = re.compile(r"(?:.*_)?(?:utils?|helpers?|common|misc|managers?|base|stuff|things|tools|shared|various)")
    folders = [ROOT / name for name in FOLDERS]
    modules = [
        file for folder in folders for file in (folder, *folder.rglob("*")) if file.suffix == ".py" or file.is_dir()
    ]
    assert len(modules) > 100
    assert [str(file.relative_to(ROOT)) for file in modules if vague.fullmatch(file.stem)] == []


@pytest.mark.parametrize(
    ("path", "content", "found"),
    [
        ("streams/a.py", "told_waiting = 1\n", (1, "told")),
        ("streams/a.py", "x = 1\n\n\nclass LetterShare:\n    pass\n", (4, "letter")),
        ("streams/a.py", "def behind(x): ...\n", (1, "behind")),
        ("streams/a.py", "self._at_once = None\n", (1, "at once")),
        ("streams/a.py", "x = 1  # The index says so.\n", (1, "says")),
        ("streams/a.py", 'raise ValueError("the letter is gone")\n', (1, "letter")),
        ("tests/unit/test_a.py", 'def test_a():\n    """Whoever reads it."""\n', (2, "whoever")),
        ("tests/unit/test_a.py", "def test_news_is_sent(): ...\n", (1, "news")),
        ("docs/a.md", "# A\n\nEach `leg` has results.\n", (3, "leg")),
        ("docs/a.md", "The cache\nhit share rises.\n", (2, "hit share")),
        ("docs/a.md", "The hit\nshare rises.\n", (1, "hit share")),
        ("docs/a.json", '{\n  "behind": 1\n}\n', (2, "behind")),
        ("infra/redis/a.lua", "-- settled before\n", (1, "settled")),
        ("infra/letters.py", "", (1, "letters")),
    ],
)
def test_a_planted_term_is_reported(path, content, found):
    assert [(one.line, one.found) for one in vocabulary().check(path, content)] == [found]


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("streams/a.py", "dead_letter = DeadLetter  # A dead\n# letter.\n"),
        ("streams/a.py", "loop.run_forever()  # The record behind the first one.\n"),
        ("tests/unit/test_a.py", 'TEXT = "The stork stands on one leg."\n'),
        ("tests/unit/test_a.py", "connection_refused = outstanding = look_up = CALLS_AT_ONCE\n"),
        ("query/api/a.html", "window.addEventListener('load', start)\n"),
        ("docs/a.md", "Names have 32 letters, digits or hyphens. ONNX stands for an exchange format.\n"),
        (GLOSSARY, "# Glossary\n\n## Retired terms\n\n| leg | retriever |\n"),
    ],
)
def test_ordinary_uses_are_not_reported(path, content):
    assert vocabulary().check(path, content) == []


def main(below: Sequence[str]) -> int:
    root = Path.cwd()
    found = uses(root, vocabulary(root), below or ("",))
    counts = Counter(one.found for one in found)
    summary = ", ".join(f"{word} {n}" for word, n in counts.most_common())
    sys.stdout.write("\n".join([*map(str, found), f"{len(found)} uses: {summary}", ""]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
