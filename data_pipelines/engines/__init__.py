"""Engines run one function over many tasks; the functions go from file to file and know nothing of engines."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol


class Engine(Protocol):
    """Runs tasks somewhere. `function` is a module's own function and tasks can be pickled."""

    def map(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
        """Yields function(task) for each task, in the order of the tasks; raises what a task raises."""
        ...
