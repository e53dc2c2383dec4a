"""Terminal views during and after a campaign."""
