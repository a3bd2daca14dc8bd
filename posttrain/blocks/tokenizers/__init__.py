"""Text to tokens: `tokenizer` holds the block, `templates` the chat templates that ship."""
