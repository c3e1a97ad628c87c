"""From bytes that nobody vouches for to Markdown."""
