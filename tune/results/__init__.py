"""Derived files: summaries, status, costs, comparison, verification, claims ledger."""
