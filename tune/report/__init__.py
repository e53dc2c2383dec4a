"""The report as HTML and Markdown, and its figures."""
