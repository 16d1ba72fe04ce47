"""From what annotation tools export to comparison sets."""
