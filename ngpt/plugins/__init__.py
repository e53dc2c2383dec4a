"""Plug-ins: files and packages that add to the tables of choices, and what results record about them."""
