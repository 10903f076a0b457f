"""The `asgo` command line."""
