"""What a tenant may have written: answers of a language model cost money."""

from infra.generation.port import GenerationError
from infra.web.limits import OverLimit, TenantLimit


class OverBudget(GenerationError):
    """The tenant has used up its tokens for now."""


class GenerationBudget:
    """Tokens of each tenant's answers. Each answer counts as the longest it may be, as nobody knows before.

    Args:
        tokens_per_minute: of one tenant; 0 sets no limit.
        tokens_per_answer: the longest answer.
    """

    def __init__(self, *, tokens_per_minute: int, tokens_per_answer: int) -> None:
        self._limit = TenantLimit("tokens of answers in a minute", per_minute=tokens_per_minute)
        self._tokens_per_answer = tokens_per_answer

    def spend(self, tenant: str) -> None:
        """Count an answer for the tenant.

        Raises:
            OverBudget: there is not enough left.
        """
        try:
            self._limit.take(tenant, self._tokens_per_answer)
        except OverLimit as error:
            raise OverBudget(str(error)) from error
