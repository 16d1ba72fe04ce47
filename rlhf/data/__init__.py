"""Reading, validating, fetching and splitting records."""
