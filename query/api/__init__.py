"""HTTP interface: the FastAPI application, the fast path for cache hits, and the console page."""
