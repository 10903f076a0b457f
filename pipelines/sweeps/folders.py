"""Where a sweep keeps what is not a result."""

TRIALS = "trials"
"""The folder of a search's trials."""

SEARCH_RECORD = "search.json"
"""Beside the trials: what they are trials of."""
