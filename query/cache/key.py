"""Which questions share an answer."""

import json
import unicodedata
from dataclasses import dataclass
from hashlib import blake2b

from schemas.cache_keys import ENTRY_VERSION
from schemas.index import metadata_text
from schemas.queries import QueryRequest
from schemas.search import Access


@dataclass(frozen=True, slots=True)
class AnswerMaker:
    """Everything besides question and reader that decides an answer.

    Attributes:
        generation: index generation that is searched.
        model: fingerprint of the embedding model.
        generator: name of the generator.
        fusion: number of fused candidates and rank constant, as text.
    """

    generation: str
    model: str
    generator: str
    fusion: str


def normalised(question: str) -> str:
    """The question as it is searched: compatibility characters unified (NFKC), lower case, single blanks.

    Lower case, not case folding: the index's analyser lowers too, so what shares a key also finds the same passages;
    folding ``ß`` to ``ss`` would not.
    """
    return " ".join(unicodedata.normalize("NFKC", question).lower().split())


def cache_key(request: QueryRequest, access: Access, maker: AnswerMaker) -> str:
    """Key of the answer, 32 hexadecimal characters: equal for requests that must get the same answer, and only those.

    ``min_position`` is not part of the key: it affects the time of the answer, not its content.
    """
    identity = {
        "entry": ENTRY_VERSION,
        "generation": maker.generation,
        "model": maker.model,
        "fusion": maker.fusion,
        "tenant": access.tenant,
        "groups": sorted(set(access.groups)),
        "query": normalised(request.query),
        "top_k": request.top_k,
        "metadata": request.include_metadata,
        "filters": {name: _any_of(wanted) for name, wanted in (request.filters or {}).items()},
        "generator": maker.generator if request.generate else None,
    }
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _any_of(wanted: object) -> list[str]:
    """A filter's values as the index compares them; their order does not matter."""
    return sorted({metadata_text(value) for value in (wanted if isinstance(wanted, tuple) else (wanted,))})
