"""A study on many workers: processes of one machine, each with a GPU of its own, or actors of a Ray cluster. The driver alone
writes the run; a worker has a folder of its own, and sends what it made. Demands pipeline; measures nothing itself."""

from leakfast.cluster.driver import run

__all__ = ["run"]
