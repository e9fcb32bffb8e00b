"""report.html: what a run did to the documents, for people, as one page that loads nothing and runs nothing."""

from data_pipelines.report.writing import write

__all__ = ["write"]
