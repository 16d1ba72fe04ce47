"""Convert annotation tools' exports and public data sets to comparison sets."""
