"""What the terminal shows during and after a campaign."""
