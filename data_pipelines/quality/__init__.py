"""Quality models: what makes a score of a document's words, how it is trained, and what a pipeline does with scores."""
