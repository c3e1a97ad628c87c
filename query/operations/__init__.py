"""Health and readiness, statistics, alerting, the freshness auditor, and explanations of answers."""
