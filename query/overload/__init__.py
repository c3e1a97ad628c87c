"""Overload protection: admission control, bulkheads, circuit breakers, deadlines, retry and token budgets."""
