"""The journal of a campaign, its lock, and the state it describes."""
