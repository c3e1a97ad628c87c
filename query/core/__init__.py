"""Pure rules of retrieval and answering."""
