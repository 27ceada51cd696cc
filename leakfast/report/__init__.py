"""The report: one HTML file that needs nothing else, and the figures as PNG and PDF beside it. Demands a run with
completions; rounds here, computes nothing. No script, no request leaves the page."""

from leakfast.report.page import report

__all__ = ["report"]
