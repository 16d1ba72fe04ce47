"""Settings: what may be set, how a pipeline's file is read, and errors that name file and line."""
