"""Renders the report as HTML with figures, and as Markdown."""
