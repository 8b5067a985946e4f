"""One script a published number."""
