"""The report of a pipeline: one page that shows what its runs did."""
