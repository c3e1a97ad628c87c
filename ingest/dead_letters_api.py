"""Dead-letter API. Each tenant lists, replays and drops its own."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response

from infra.kafka.dead_letters import DeadLetterRecord
from infra.web.credentials import AccessOf
from infra.web.problems import ProblemRaised, problem_responses
from ingest.dead_letters import DeadLetterQueue, NoSuchDeadLetter, listed, shown
from schemas.dead_letters import DeadLetterContent, DeadLetterId, DeadLetters, Replayed
from schemas.problems import ProblemType
from schemas.search import Access

MAX_LISTED = 1_000


def dead_letter_routes(dead_letters: DeadLetterQueue, writer: AccessOf) -> APIRouter:
    """Routes of the dead-letter API. Undecodable records have no tenant: use the command line for them."""
    router = APIRouter(prefix="/v1/dead-letters")
    reader = Depends(writer)

    async def find(access: Access, dead_letter_id: str) -> DeadLetterRecord:
        try:
            return await dead_letters.find(dead_letter_id, tenant=access.tenant)
        except NoSuchDeadLetter as error:
            raise ProblemRaised(ProblemType.NOT_FOUND, str(error)) from error

    @router.get("", responses=problem_responses(401, 403, 422, 503))
    async def list_dead_letters(
        access: Annotated[Access, reader],
        kind: Annotated[str | None, Query(max_length=100, description="Only dead letters of this kind.")] = None,
        limit: Annotated[
            int, Query(ge=1, le=MAX_LISTED, description="Maximum number to list. The counts include all.")
        ] = 100,
    ) -> DeadLetters:
        """List the open dead letters: events that could not be processed. They are retained for 30 days."""
        return listed(await dead_letters.open(tenant=access.tenant, kind=kind), limit)

    @router.get("/{dead_letter_id}", responses=problem_responses(401, 403, 404, 422, 503))
    async def get_dead_letter(dead_letter_id: DeadLetterId, access: Annotated[Access, reader]) -> DeadLetterContent:
        """Get a dead letter with its content."""
        return shown(await find(access, dead_letter_id))

    @router.post("/{dead_letter_id}/replay", status_code=202, responses=problem_responses(401, 403, 404, 422, 503))
    async def replay_dead_letter(dead_letter_id: DeadLetterId, access: Annotated[Access, reader]) -> Replayed:
        """Republish the event with the same version and close the dead letter. A newer version supersedes it."""
        return await dead_letters.replay(await find(access, dead_letter_id))

    @router.delete("/{dead_letter_id}", status_code=204, responses=problem_responses(401, 403, 404, 422, 503))
    async def drop_dead_letter(dead_letter_id: DeadLetterId, access: Annotated[Access, reader]) -> Response:
        """Close the dead letter without replaying it. The document stays unchanged."""
        await dead_letters.drop(await find(access, dead_letter_id))
        return Response(status_code=204)

    return router
