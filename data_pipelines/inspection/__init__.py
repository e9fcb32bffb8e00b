"""What lies on disk, for people: documents with what is known of them, summaries, and the path of one document."""
