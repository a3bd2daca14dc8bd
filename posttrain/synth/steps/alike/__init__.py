"""What says the same: `dedup` by words, `semantic` by embeddings, `decontaminate` against the rows of a benchmark."""
