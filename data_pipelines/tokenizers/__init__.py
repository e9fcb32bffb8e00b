"""What one does with tokenizers besides training them: compare them on text, drop pieces."""
