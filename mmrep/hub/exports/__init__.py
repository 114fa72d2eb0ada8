"""Models of ours in the layout of other libraries: one file for each target."""
