"""Observers of questions and cache hits."""

from collections.abc import Mapping
from dataclasses import dataclass

from typing_extensions import override

from query.answers.answer import AnswerObserver
from query.answers.refresh_ahead import RefreshAhead
from query.operations.auditor import Auditor
from schemas.queries import QueryRequest
from schemas.search import Access


@dataclass(frozen=True, slots=True)
class Observers(AnswerObserver):
    """Passes questions to refresh-ahead and hits to the auditor."""

    auditor: Auditor
    refresh: RefreshAhead

    @override
    def on_question(self, key: str, request: QueryRequest, access: Access) -> None:
        self.refresh.on_question(key, request, access)

    @override
    def on_hit(self, tenant: str, key: str, body: bytes, positions: Mapping[int, int]) -> None:
        self.auditor.on_hit(tenant, key, body, positions)
