"""The `eosin` command, run folders, processes and artefacts on disk."""
