"""alula inside other libraries."""
