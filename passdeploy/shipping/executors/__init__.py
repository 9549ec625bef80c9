"""One file per backend: executes an engine with numpy and the backend alone."""
