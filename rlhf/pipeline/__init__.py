"""From a pipeline file to committed results: planning, running, importing and exporting."""
