"""Parts of the retriever's training program."""
