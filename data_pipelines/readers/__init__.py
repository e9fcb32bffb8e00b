"""Readers: from files of any kind to documents, and to rejects for what is malformed."""
