"""What the runs of a pipeline left in the store, for the commands that show it."""
