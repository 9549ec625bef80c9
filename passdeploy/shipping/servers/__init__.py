"""One file per inference server: writes the folder that the server loads."""
