"""Sources of documents: a folder, a git history, a file of events. All speak to the ingest API like anybody else."""
