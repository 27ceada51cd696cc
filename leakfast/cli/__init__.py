"""The command line, one file a command; the only place that prints. Leaves all work to the stages."""
