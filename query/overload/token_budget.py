"""Token budget of each tenant for generated answers."""

from infra.generation.port import GenerationError
from infra.web.limits import OverLimit, TenantLimit


class OverBudget(GenerationError):
    """The tenant's token budget is exhausted for now."""


class GenerationBudget:
    """Tokens per minute and tenant. Each answer counts as the longest allowed one, since its length is not known yet.

    Args:
        tokens_per_minute: budget of each tenant; 0 for unlimited.
        tokens_per_answer: maximum length of an answer.
    """

    def __init__(self, *, tokens_per_minute: int, tokens_per_answer: int) -> None:
        self._limit = TenantLimit("tokens of answers in a minute", per_minute=tokens_per_minute)
        self._tokens_per_answer = tokens_per_answer

    def spend(self, tenant: str) -> None:
        """Take one answer from the budget.

        Raises:
            OverBudget: the budget does not suffice.
        """
        try:
            self._limit.take(tenant, self._tokens_per_answer)
        except OverLimit as error:
            raise OverBudget(str(error)) from error
