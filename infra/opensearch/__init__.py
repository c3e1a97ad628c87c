"""OpenSearch: document index, API keys and webhooks."""
