"""Hybrid retrieval: k-NN and BM25 search, rank fusion, passage cache, one version per document."""
