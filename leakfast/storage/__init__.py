"""Everything that touches the disk: the run directory with its manifest and journal, atomic writes, locks, documents
with line numbers, the columns of every table, and the seeds. Demands a folder that may be written; knows no persona,
no model and no behavior."""
