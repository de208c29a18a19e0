"""Where the files of a run lie, and which checkpoint it goes on from."""
