"""From a campaign to its trials: phases, budgets, changes, searches."""
