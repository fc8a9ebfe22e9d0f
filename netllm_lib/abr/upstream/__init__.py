"""The files of the original: read without running anything in them, found in a tree, imported as a run folder."""
