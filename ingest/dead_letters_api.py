"""Dead letters over HTTP: each tenant sees, repeats and drops its own."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response

from infra.kafka.dead_letters import DeadLetterRecord
from infra.web.credentials import AccessOf
from infra.web.problems import ProblemRaised, problems_told
from ingest.dead_letters import DeadLetterQueue, NoSuchDeadLetter, listed, shown
from schemas.dead_letters import DeadLetterContent, DeadLetters, LetterId, Replayed
from schemas.problems import ProblemType
from schemas.search import Access

MAX_LISTED = 1_000


def dead_letter_routes(letters: DeadLetterQueue, writer: AccessOf) -> APIRouter:
    """The routes. Records that cannot be decoded name no tenant for certain: they are for the command line alone."""
    router = APIRouter(prefix="/v1/dead-letters")
    reader = Depends(writer)

    async def find(access: Access, letter_id: str) -> DeadLetterRecord:
        try:
            return await letters.find(letter_id, tenant=access.tenant)
        except NoSuchDeadLetter as error:
            raise ProblemRaised(ProblemType.NOT_FOUND, str(error)) from error

    @router.get("", responses=problems_told(401, 403, 422, 503))
    async def list_dead_letters(
        access: Annotated[Access, reader],
        kind: Annotated[str | None, Query(max_length=100, description="Only those of this kind.")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_LISTED, description="Most letters to list; all are counted.")] = 100,
    ) -> DeadLetters:
        """Events that could not be processed and that nobody has dealt with. They are kept for 30 days."""
        return listed(await letters.open(tenant=access.tenant, kind=kind), limit)

    @router.get("/{letter_id}", responses=problems_told(401, 403, 404, 422, 503))
    async def get_dead_letter(letter_id: LetterId, access: Annotated[Access, reader]) -> DeadLetterContent:
        """One of them, with what it holds."""
        return shown(await find(access, letter_id))

    @router.post("/{letter_id}/replay", status_code=202, responses=problems_told(401, 403, 404, 422, 503))
    async def replay_dead_letter(letter_id: LetterId, access: Annotated[Access, reader]) -> Replayed:
        """Send it once more, as a new event of the same version; a newer version of its document supersedes it."""
        return await letters.replay(await find(access, letter_id))

    @router.delete("/{letter_id}", status_code=204, responses=problems_told(401, 403, 404, 422, 503))
    async def drop_dead_letter(letter_id: LetterId, access: Annotated[Access, reader]) -> Response:
        """Close it without doing anything else: the document stays as it is."""
        await letters.drop(await find(access, letter_id))
        return Response(status_code=204)

    return router
